import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import data_gen
import stablerep
from stablerep.cli import main
from stablerep.demo import DemoConfig, run_demo
from stablerep.demo.budget import FULL, QUICK, Budget
from stablerep.demo.charts import build_line_chart
from stablerep.demo.picture import MAX_BYTES, draw_picture
from stablerep.demo.report import build_report
from stablerep.demo.results import (
    PROTOCOL_TITLES,
    RUN_TITLES,
    GridRow,
    compare_all,
    describe_scores,
    judge,
    read_curves,
)
from stablerep.demo.runner import claim_folder, fingerprint_steps, read_last_line, run_steps
from stablerep.demo.steps import CONFIG, Step, identify_sources, plan_steps
from stablerep.evaluation.results import Provenance, Row, read_results, write_results
from stablerep.evaluation.statistics import PairedDifference, paired_difference, wilson_interval

NUM_TEST = 400
NAMES = ("linear_heldout", "linear_bn_heldout", "linear_paper", "linear_bn_paper", "knn20")
HOLDS = {"stablerep": 0.8, "simclr": 0.5, "random": 0.2}
FAILS = {"stablerep": 0.505, "simclr": 0.5, "random": 0.2}
OUTSIDE = re.compile(
    r"""(?:src|href|url|action)\s*[=(]\s*["']?(?!data:)[^"'\s)]+|https?:|@import|<script""", re.I
)


def write_evaluation(folder: Path, answers: Mapping[str, torch.Tensor], data: str = "d") -> None:
    """An evaluation with these answers, of which 0 is right."""
    rows = []
    for protocol, answer in answers.items():
        num_right = int((answer == 0).sum())
        rows.append(
            Row(
                protocol=protocol,
                metric="accuracy",
                value=num_right / NUM_TEST,
                interval=wilson_interval(num_right, NUM_TEST),
                interval_method="Wilson, 95 %",
                n=NUM_TEST,
                selection="none",
                hyperparameters={},
                feature="cls",
                seconds=1.0,
                predictions=answer.numpy(),
                targets=np.zeros(NUM_TEST, dtype=np.int64),
            )
        )
    hashes = {"weights": folder.name, "data": data, "transform": "t"}
    provenance = Provenance("a.ckpt", "scenes", "Resize(73)", hashes, {"torch": "2"})
    folder.mkdir(parents=True, exist_ok=True)
    names = [str(index) for index in range(NUM_TEST)]
    write_results(folder, rows, provenance, names, overwrite=True)


def write_evaluations(folder: Path, accuracies: Mapping[str, float]) -> None:
    """Evaluations with the given share of test images right, the first ones."""
    for run, accuracy in accuracies.items():
        wrong = (torch.arange(NUM_TEST) >= accuracy * NUM_TEST).long()
        write_evaluation(folder / run, dict.fromkeys(NAMES, wrong))


def make_results(folder: Path, accuracies: Mapping[str, float]) -> dict[str, Any]:
    """What `collect_results` would return of a demo with these accuracies."""
    write_evaluations(folder, accuracies)
    differences = compare_all(folder)
    steps = plan_steps(Path("demo"), QUICK, "embedded", 0)
    return {
        "claim": judge(differences, "colour"),
        "scores": {run: describe_scores(read_results(folder / run)) for run in RUN_TITLES},
        "differences": [vars(difference) | {"holds": difference.holds} for difference in differences],
        "curves": {
            run: {"loss": [(10, 5.5), (20, 3.0)], "knn_top1": [(10, 0.2), (20, 0.4)]}
            for run in ("stablerep", "simclr")
        },
        "steps": [
            {"title": step.title, "command": step.command, "seconds": 61.0, "was_continued": False}
            for step in steps
        ],
        "options": vars(DemoConfig()),
        "budget": vars(QUICK) | {"num_images": QUICK.num_images, "chance": 0.125},
        "machine": {"processor": "a processor", "num_cores": 2},
        "versions": {"torch": "2"},
    }


def make_grid(caption: str = "a red circle on grass", num_captions: int = 8) -> list[GridRow]:
    rng = np.random.default_rng(0)
    images = []
    for _ in range(4):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    return [GridRow(caption, tuple(images), "png")] * num_captions


# --- the claim


def test_claim_holds_when_every_difference_is_above_its_interval(tmp_path: Path) -> None:
    write_evaluations(tmp_path, HOLDS)
    claim = judge(compare_all(tmp_path), "colour")
    assert claim["holds"]
    assert claim["verdict"].startswith("The claim holds: at naming the colour, ")
    assert "StableRep is 30.0 points above SimCLR" in claim["verdict"]


def test_claim_fails_when_one_difference_is_within_its_interval(tmp_path: Path) -> None:
    write_evaluations(tmp_path, HOLDS)
    wrong = torch.arange(NUM_TEST).flip(0)  # as many right as SimCLR and one more, on other images
    answers = {name: (wrong >= (0.5 * NUM_TEST + 1 if name == "knn20" else 1)).long() for name in NAMES}
    write_evaluation(tmp_path / "stablerep", answers)
    claim = judge(compare_all(tmp_path), "colour")
    assert not claim["holds"]
    assert "by k-NN, StableRep is not clearly above SimCLR (0.2 points, " in claim["verdict"]


def test_claim_says_below_when_the_order_is_turned_round(tmp_path: Path) -> None:
    write_evaluations(tmp_path, HOLDS | {"simclr": 0.1})
    claim = judge(compare_all(tmp_path), "colour")
    assert not claim["holds"]
    assert "SimCLR is below random initialisation (−10.0 points" in claim["verdict"]


def test_differences_are_those_of_bonett_and_price(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    answers = {run: torch.randint(0, 2, (NUM_TEST,), generator=random) for run in RUN_TITLES}
    for run, answer in answers.items():
        write_evaluation(tmp_path / run, dict.fromkeys(NAMES, answer))
    found = compare_all(tmp_path)
    assert [(each.above, each.below) for each in found] == [
        ("stablerep", "simclr"),
        ("simclr", "random"),
    ] * len(PROTOCOL_TITLES)
    for each in found:
        expected = paired_difference(answers[each.above] == 0, answers[each.below] == 0)
        assert PairedDifference(each.difference, each.low, each.high) == expected


def test_runs_on_other_images_are_not_compared(tmp_path: Path) -> None:
    write_evaluations(tmp_path, HOLDS)
    right = torch.zeros(NUM_TEST, dtype=torch.long)
    write_evaluation(tmp_path / "simclr", dict.fromkeys(NAMES, right), data="other")
    with pytest.raises(ValueError, match="stablerep and .*simclr were evaluated on other test images"):
        compare_all(tmp_path)
    write_evaluation(tmp_path / "simclr", {"knn20": right})
    with pytest.raises(ValueError, match="simclr has no score 'linear_heldout'"):
        compare_all(tmp_path)


# --- the page and the picture


@pytest.mark.parametrize(("accuracies", "says"), [(HOLDS, "The claim holds"), (FAILS, "does not hold")])
def test_page_and_figures_say_whether_the_claim_holds(
    accuracies: Mapping[str, float], says: str, tmp_path: Path
) -> None:
    results = make_results(tmp_path, accuracies)
    page = build_report(results, make_grid())
    assert says in page
    for run, accuracy in accuracies.items():
        low, high = results["scores"][run]["knn20"]["interval"]
        assert f"{100 * accuracy:.1f}<br><small>{100 * low:.1f} to {100 * high:.1f}</small>" in page
    for step in results["steps"]:
        assert step["command"] in page


def test_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    page = build_report(make_results(tmp_path, HOLDS), make_grid())
    assert OUTSIDE.findall(page) == []
    assert page.count('src="data:image/png;base64,') == 32


def test_captions_are_text_and_never_markup(tmp_path: Path) -> None:
    page = build_report(make_results(tmp_path, HOLDS), make_grid('<script>alert("x")</script>'))
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in page


def test_every_image_and_chart_has_a_description(tmp_path: Path) -> None:
    page = build_report(make_results(tmp_path, HOLDS), make_grid())
    assert all('alt="' in tag for tag in re.findall(r"<img[^>]*>", page))
    charts = re.findall(r"<svg[^>]*>", page)
    assert len(charts) == len(PROTOCOL_TITLES) + 2
    assert all('aria-label="' in tag and 'role="img"' in tag for tag in charts)


@pytest.mark.parametrize("num_captions", [1, 5, 8])
def test_picture_stays_under_its_size_whatever_the_images(num_captions: int, tmp_path: Path) -> None:
    content = draw_picture(make_results(tmp_path, HOLDS), make_grid(num_captions=num_captions))
    assert len(content) <= MAX_BYTES  # noise is what compresses worst
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "PNG"
        assert picture.width == 1200


def test_names_of_lines_that_end_together_do_not_overlap() -> None:
    points = [(0.0, 1.0), (10.0, 2.0)]
    chart = build_line_chart(
        {name: (name, points) for name in "abc"}, x_title="step", y_title="loss", percent=False
    )
    places = [line.label_y for line in chart.lines]
    assert np.diff(places).min() >= 16


def test_curves_skip_empty_cells(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("knn_top1,loss,step\n0.125,,0\n,5.5,9\n0.25,,10\n,5.0,19\n")
    assert read_curves(log) == {"loss": [(10, 5.5), (20, 5.0)], "knn_top1": [(0, 0.125), (10, 0.25)]}


# --- the steps


def scenes_step(root: Path, seed: int = 0, name: str = "scenes", inputs: tuple[str, ...] = ()) -> Step:
    """A step that takes no time: twelve captions."""
    path = root / f"{name}.txt"
    args = ("scenes", "--captions", str(path), "--num_captions", "12", "--seed", str(seed))
    return Step(name, "Write captions", args, (path,), inputs, 1.0)


def test_folder_of_others_is_refused_and_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    assert main(["demo", "--output", str(tmp_path), "--quick"]) == 1
    assert capsys.readouterr().err.strip() == (
        f"stablerep demo: error: output {tmp_path} holds files that no demo wrote: "
        "choose a new or empty folder"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"steps": []}', '{"schema": "stablerep-demo-0", "steps": []}']
)
def test_record_of_something_else_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text(content)
    with pytest.raises(ValueError, match="steps.json is"):
        claim_folder(tmp_path)


def test_missing_template_engine_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 1
    assert "pip install 'stablerep[report]'" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_finished_step_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    step = scenes_step(tmp_path)
    first = run_steps(tmp_path, [step])
    step.outputs[0].write_text("left alone")
    assert run_steps(tmp_path, [step]) == first
    assert step.outputs[0].read_text() == "left alone"
    assert capsys.readouterr().out.splitlines()[-1] == "[1/1] Write captions: already done"


def test_changed_step_and_those_that_build_on_it_are_run_again(tmp_path: Path) -> None:
    def steps(seed: int) -> list[Step]:
        return [
            scenes_step(tmp_path, seed, "a"),
            scenes_step(tmp_path, 0, "b", inputs=("a",)),
            scenes_step(tmp_path, 0, "c"),
        ]

    run_steps(tmp_path, steps(0))
    captions = (tmp_path / "a.txt").read_text()
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("of the first run")
    run_steps(tmp_path, steps(1))
    assert (tmp_path / "a.txt").read_text() not in (captions, "of the first run")
    assert (tmp_path / "b.txt").read_text() != "of the first run"
    assert (tmp_path / "c.txt").read_text() == "of the first run"


def test_missing_output_is_made_again(tmp_path: Path) -> None:
    step = scenes_step(tmp_path)
    run_steps(tmp_path, [step])
    step.outputs[0].unlink()
    run_steps(tmp_path, [step])
    assert step.outputs[0].exists()


def test_failed_step_is_one_line_with_its_log_and_is_not_done(tmp_path: Path) -> None:
    args = ("scenes", "--captions", str(tmp_path / "captions.txt"), "--num_captions", "0")
    step = Step("scenes", "Write captions", args, (tmp_path / "captions.txt",), (), 1.0)
    with pytest.raises(
        ValueError, match=r"step scenes failed: .*num_captions must be >= 1, got 0.*scenes\.txt"
    ):
        run_steps(tmp_path, [step])
    assert [record.done for record in claim_folder(tmp_path).values()] == [False]


def test_step_speaks_to_its_log_and_not_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    step = scenes_step(tmp_path)
    run_steps(tmp_path, [step])
    output = capsys.readouterr()
    assert "12 captions in" not in output.out + output.err
    assert (tmp_path / "logs" / "scenes.txt").read_text().startswith(f"$ {step.command}\n12 captions in")


def test_last_state_of_a_progress_bar_is_read(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("started\n\rgenerate:  10%\rgenerate:  20%\r")
    assert read_last_line(tmp_path / "log") == "generate:  20%"


def test_changed_model_changes_generation_and_what_follows(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = fingerprint_steps(plan_steps(Path("demo"), QUICK, str(tmp_path), 0))
    (tmp_path / "model.safetensors").write_bytes(b"12")
    after = fingerprint_steps(plan_steps(Path("demo"), QUICK, str(tmp_path), 0))
    assert [name for name in before if before[name] == after[name]] == ["scenes"]


def test_changed_config_file_changes_the_trainings_and_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    found = []
    for content in ("a: 1", "a: 2"):
        Path(CONFIG).write_text(content)
        found.append(fingerprint_steps(plan_steps(Path("demo"), QUICK, "embedded", 0)))
    assert [name for name in found[0] if found[0][name] == found[1][name]] == ["scenes", "generate"]


def test_changed_code_has_every_step_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "inner" / "module.py").write_text("a = 1")
    (package / "table.txt").write_text("no code")
    monkeypatch.setattr("stablerep.demo.runner.identify_sources", lambda: identify_sources(package))
    step = scenes_step(tmp_path / "demo")
    made = []
    for path, content in [("table.txt", "other"), ("inner/module.py", "a = 2"), ("new.py", "")]:
        run_steps(tmp_path / "demo", [step])
        step.outputs[0].write_text("of the code before")
        (package / path).write_text(content)
        run_steps(tmp_path / "demo", [step])
        made.append(step.outputs[0].read_text() != "of the code before")
    assert made == [False, True, True]


def test_the_code_that_counts_is_that_of_both_packages() -> None:
    packages = [Path(stablerep.__file__).parent, Path(data_gen.__file__).parent]
    assert identify_sources() == identify_sources(*packages) != identify_sources(packages[0])


@pytest.mark.parametrize("budget", [FULL, QUICK])
def test_both_trainings_see_as_many_images_and_differ_in_the_positives_alone(budget: Budget) -> None:
    def options(run: str) -> dict[str, str]:
        step = next(
            step for step in plan_steps(Path("demo"), budget, "embedded", 0) if step.name == f"fit-{run}"
        )
        words = list(step.args[1:])
        return dict(zip(words[::2], words[1::2], strict=True))

    ours, theirs = options("stablerep"), options("simclr")
    assert {name for name in ours if ours[name] != theirs[name]} == {
        *("--data.positives", "--data.num_captions_per_rank", "--data.num_views_per_caption", "--output")
    } - ({"--data.num_views_per_caption", "--data.num_captions_per_rank"} if budget is QUICK else set())
    counts = [
        int(found["--data.num_captions_per_rank"]) * int(found["--data.num_views_per_caption"])
        for found in (ours, theirs)
    ]
    assert counts == [budget.num_images_per_step] * 2


@pytest.mark.e2e
def test_small_demo_runs_end_to_end_and_does_nothing_twice(
    tmp_path: Path, cache_home: Path, tiny_pipeline: Path, capsys: pytest.CaptureFixture
) -> None:
    budget = replace(
        QUICK,
        num_captions=8,
        num_inference_steps=1,
        num_train_scenes=48,
        num_test_scenes=32,
        num_steps=2,
        num_warmup_steps=1,
        num_captions_per_step=4,
        num_steps_between_knn=1,
        fit_options=(
            *("--data.num_workers", "0"),
            *("--model.backbone_options", "{patch_size: 16, depth: 1, embed_dim: 16, num_heads: 2}"),
            *("--model.projection_hidden_features", "16"),
            *("--trainer.log_every_n_steps", "1"),
        ),
        num_probe_epochs=2,
    )
    root = tmp_path / "demo"
    config = DemoConfig(output=str(root), model=str(tiny_pipeline))
    assert run_demo(config, budget) == 0
    results = json.loads((root / "demo.json").read_text())
    assert results["budget"]["chance"] == 1 / 10
    page = (root / "report.html").read_text()
    output = capsys.readouterr()
    assert results["claim"]["verdict"] in output.out
    assert "Epoch" not in output.out + output.err
    assert OUTSIDE.findall(page) == []
    for run in results["curves"].values():  # both are of the trained weights at the end
        assert [step for step, _ in run["loss"]] == [1, 2]
        assert [step for step, _ in run["knn_top1"]] == [0, 1, 2]
    assert len((root / "picture.png").read_bytes()) <= MAX_BYTES
    for run in RUN_TITLES:
        assert (root / "evaluation" / run / "report.html").is_file()
    assert not (cache_home / "features").exists()
    for step in results["steps"]:
        assert step["done"]
        assert step["command"].startswith("stablerep ")
    before = {path: path.stat().st_mtime_ns for path in (root / "shards").iterdir()}
    assert run_demo(config, budget) == 0
    assert capsys.readouterr().out.count("already done") == len(results["steps"])
    assert {path: path.stat().st_mtime_ns for path in (root / "shards").iterdir()} == before
