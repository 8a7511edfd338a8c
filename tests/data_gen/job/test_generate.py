"""Laws of the whole job, run through the real verb: resume, refusal, counts, and every bad input."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_gen.diffusion.generator import DiffusionGenerator
from data_gen.diffusion.models import GeneratorConfig
from data_gen.job import shard_job
from data_gen.job.generate import GenerateConfig, run
from data_gen.shards import ShardError, list_complete_shards, read_manifest, read_samples, to_json
from data_gen.verify import VerifyConfig
from data_gen.verify import run as run_verify
from stablerep.cli import main
from tests.data_gen.conftest import CAPTIONS
from tests.data_gen.datasets import NoiseGenerator, read_stats

MakeConfig = Callable[..., GenerateConfig]


def data_files(root: Path) -> dict[str, bytes]:
    """Everything but the markers, which hold seconds, and the fingerprints of those who worked on it."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.endswith("_stats.json") and path.parent.name != "fingerprints"
    }


def finished_files(root: Path) -> dict[str, bytes]:
    """Those, without what workers tell each other."""
    return {name: content for name, content in data_files(root).items() if not name.startswith(".work/")}


def test_the_verb_writes_what_the_plan_says(
    make_config: MakeConfig, finished_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    options = [
        "--captions",
        *config.caption_patterns,
        "--output",
        config.output,
        "--generator.model",
        config.generator.model,
    ]
    options += [
        "--generator.num_inference_steps",
        "2",
        "--generator.device",
        "cpu",
        "--num_images_per_caption",
        "3",
    ]
    options += ["--num_captions_per_shard", "2", "--num_images_per_batch", "4"]
    assert main(["generate", *options]) == 0
    assert data_files(Path(config.output)) == data_files(finished_dataset)
    assert "5 captions planned" in capsys.readouterr().out
    assert main(["verify", "--dataset", config.output, "--deep"]) == 0


def test_dataset_holds_each_caption_once_with_all_of_its_images(finished_dataset: Path) -> None:
    manifest = read_manifest(finished_dataset)
    shards = list_complete_shards(finished_dataset)
    samples = [sample for shard in shards for sample in read_samples(shard)]
    assert [sample.caption for sample in samples] == CAPTIONS
    assert {len(sample.images) for sample in samples} == {3}
    assert (manifest.num_shards, manifest.num_captions, len(shards)) == (3, 5, 3)
    assert [shard.num_samples for shard in shards] == [2, 2, 1]
    assert len({image for sample in samples for image in sample.images}) == 15
    assert manifest.fingerprint["dtype"] == "float32"
    (caption_file,) = manifest.caption_files
    (fingerprint,) = {name for sample in samples for name in sample.fingerprints}
    assert (
        json.loads((finished_dataset / f"fingerprints/{fingerprint}.json").read_text())
        == manifest.fingerprint
    )
    assert {path.relative_to(finished_dataset).as_posix() for path in finished_dataset.rglob("*.*")} >= {
        *("dataset.json", "README.md", "croissant.json", caption_file["name"]),
        *(f"0000{index}{end}" for index in range(3) for end in (".tar", ".parquet", "_stats.json")),
    }


def test_card_and_croissant_describe_the_files(finished_dataset: Path) -> None:
    import yaml

    header = (finished_dataset / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(header)["configs"][0]["data_files"] == "*.tar"
    assert json.loads((finished_dataset / "croissant.json").read_text())["@type"] == "sc:Dataset"
    check = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=finished_dataset)
    assert check.returncode == 0
    listed = {line.split()[1] for line in (finished_dataset / "SHA256SUMS").read_text().splitlines()}
    assert {f"0000{index}{end}" for index in range(3) for end in (".tar", ".parquet")} <= listed


def test_a_finished_job_loads_no_model_and_changes_nothing(
    make_config: MakeConfig, dataset_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = data_files(dataset_copy)
    monkeypatch.setattr("data_gen.diffusion.generator.load_pipeline", None)
    assert run(make_config()) == 0
    assert data_files(dataset_copy) == before


@pytest.mark.parametrize("missing", [["00001_stats.json"], ["00000.tar", "00002.parquet"], ["00001.tar"]])
def test_resume_writes_identical_bytes(
    make_config: MakeConfig, dataset_copy: Path, finished_dataset: Path, missing: list[str]
) -> None:
    for name in missing:
        (dataset_copy / name).unlink()
    assert run(make_config()) == 0
    assert data_files(dataset_copy) == data_files(finished_dataset)


def test_resume_makes_missing_shards_alone(
    make_config: MakeConfig, dataset_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in dataset_copy.glob("00001*"):
        path.unlink()
    drawn: list[str] = []
    generate = DiffusionGenerator.generate

    def record(self: DiffusionGenerator, requests: Any, seed: int) -> Any:
        drawn.extend(request.text for request in requests)
        return generate(self, requests, seed)

    monkeypatch.setattr(DiffusionGenerator, "generate", record)
    assert run(make_config()) == 0
    assert drawn == CAPTIONS[2:4]


def test_killed_job_loses_only_the_shard_in_flight(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys, types\n"
        "from data_gen.job.generate import GenerateConfig, run\n"
        "from data_gen.diffusion.models import GeneratorConfig\n"
        "from tests.data_gen.datasets import NoiseGenerator, Request\n"
        "class Killed(NoiseGenerator):\n"
        "    def generate(self, requests, seed):\n"
        "        for made in super().generate(requests, seed):\n"
        "            if made.request.text == '猫と犬':\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
        "            yield made\n"
        "from data_gen.job.engines.ray_cluster import RayConfig\n"
        "from data_gen.job.engines.slurm import SlurmConfig\n"
        "light = types.ModuleType('data_gen.diffusion.generator')\n"
        "light.DiffusionGenerator = Killed\n"
        "light.ImageRequest = Request\n"
        "light.describe_machine = lambda *_: {}\n"
        "sys.modules['data_gen.diffusion.generator'] = light  # without torch, this takes a second\n"
        f"run({config!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    root = Path(config.output)
    assert [shard.name for shard in list_complete_shards(root)] == ["00000"]
    assert not (root / "00001.tar").exists()
    assert list(root.glob(".00001.tar.*.tmp"))
    first = (root / "00000.tar").stat().st_mtime_ns
    monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", NoiseGenerator)
    monkeypatch.setattr("data_gen.diffusion.generator.describe_machine", lambda *_: {})
    undisturbed = dataclasses.replace(config, output=str(tmp_path / "undisturbed" / root.name))
    assert run(config) == run(undisturbed) == 0
    assert data_files(root) == data_files(Path(undisturbed.output))
    assert (root / "00000.tar").stat().st_mtime_ns == first


def test_an_error_in_a_shard_costs_that_shard_alone(
    make_config: MakeConfig,
    finished_dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config()
    build_sample = shard_job._ShardJob._build_sample

    def break_at_the_fourth(self: Any, caption: Any, new: Any) -> Any:
        if caption.text == CAPTIONS[3]:
            raise RuntimeError("power cut")
        return build_sample(self, caption, new)

    with monkeypatch.context() as context:
        context.setattr(shard_job._ShardJob, "_build_sample", break_at_the_fourth)
        assert run(config) == 1
    root = Path(config.output)
    assert [shard.name for shard in list_complete_shards(root)] == ["00000", "00002"]
    assert "shard 00001 is set aside: RuntimeError: power cut (×3)" in capsys.readouterr().err
    assert run(dataclasses.replace(config, retry_failed=True)) == 0
    assert data_files(root) == data_files(finished_dataset)


def test_a_truncated_shard_is_named_and_made_again(
    make_config: MakeConfig, dataset_copy: Path, finished_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = dataset_copy / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:-5000])
    assert run_verify(VerifyConfig(str(dataset_copy))) == 1
    assert re.search(r"00001\.tar: has \d+ bytes, expected", capsys.readouterr().err)
    assert run(make_config()) == 0
    assert "00001.tar" in capsys.readouterr().err
    assert data_files(dataset_copy) == data_files(finished_dataset)


def test_verify_names_each_bad_shard_and_no_other(
    dataset_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = dataset_copy / "00000.tar"
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 4
    tar.write_bytes(content)
    (dataset_copy / "00002_stats.json").unlink()
    assert main(["verify", "--dataset", str(dataset_copy)]) == 1
    output = capsys.readouterr()
    assert "00000.tar: sha256" in output.err
    assert "00002.tar: not finished" in output.err
    assert "00001" not in output.err
    assert "3 shards planned, 1 sound, 1 bad, 1 missing, 0 set aside" in output.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "seed is 0 there and 5 here"),
        ({"num_images_per_caption": 2}, "num_images_per_caption is 3 there and 2 here"),
        ({"generator": {"guidance_scale": 3.0}}, "generator.guidance_scale is 2.0 there and 3.0 here"),
        ({"num_images_per_batch": 8}, "num_images_per_batch is 4 there and 8 here"),
        ({"limit": 2}, "num_captions is 5 there and 2 here"),
    ],
)
def test_other_settings_are_refused_with_both_values(
    make_config: MakeConfig, dataset_copy: Path, change: dict[str, Any], message: str
) -> None:
    before = data_files(dataset_copy)
    with pytest.raises(ValueError, match=re.escape(message)):
        run(make_config(**change))
    assert data_files(dataset_copy) == before


def test_device_and_place_are_no_part_of_the_plan(
    make_config: MakeConfig, dataset_copy: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_pipeline, tmp_path / "elsewhere" / "another-name")
    captions = shutil.copy(make_config().caption_patterns[0], tmp_path / "renamed.txt")
    config = make_config(captions=str(captions), generator={"model": str(model), "device": "auto"})
    assert run(config) == 0


def test_another_machine_is_named(
    make_config: MakeConfig, dataset_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = dataset_copy / "dataset.json"
    manifest = json.loads(path.read_text())
    manifest["fingerprint"]["torch"] = "1.0"
    path.write_text(to_json(manifest))
    (dataset_copy / "00002_stats.json").unlink()
    assert run(make_config()) == 0
    assert "torch was '1.0' and is" in capsys.readouterr().err


def test_planned_equals_written_plus_failed_and_the_exit_code_says_so(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_batch = DiffusionGenerator._run

    def flag_the_first(self: DiffusionGenerator, jobs: Any) -> Any:
        images, _ = run_batch(self, jobs)
        return images, ["safety_checker" if job.request.text == CAPTIONS[0] else None for job in jobs]

    monkeypatch.setattr(DiffusionGenerator, "_run", flag_the_first)
    config = make_config()
    assert run(config) == 1
    root = Path(config.output)
    assert [shard.num_samples for shard in list_complete_shards(root)] == [1, 2, 1]
    stats = read_stats(root)
    assert stats["num_planned"] == stats["num_written"] + stats["num_failed"]
    assert stats["failures_by_reason"] == {"safety_checker": 1}
    assert "4 written, 1 failed" in capsys.readouterr().out
    assert run(config) == 1
    assert run_verify(VerifyConfig(str(root), deep=True)) == 0


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
def test_images_are_stored_in_the_size_and_format_asked_for(
    make_config: MakeConfig, image_format: str
) -> None:
    config = make_config(image_format=image_format, stored_image_size=8, generator={"width": 24}, limit=1)
    assert run(config) == 0
    (shard,) = list_complete_shards(config.output)
    (sample,) = read_samples(shard)
    assert (sample.width, sample.height, sample.image_extension) == (12, 8, image_format)
    assert run_verify(VerifyConfig(config.output, deep=True)) == 0


def error_line(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Runs the verb, which must fail with one line and no traceback."""
    assert main(["generate", *options]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("stablerep generate: error: ")
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "captions.txt does not exist"),
        (b"", "captions.txt holds no caption"),
        (b"x" * 10_000, "line 1: a caption must have at most 8192 characters, got 10000"),
        (b"caf\xe9", "line 1: byte 0xe9 at offset 3 is not UTF-8"),
    ],
)
def test_bad_captions_give_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "captions.txt"
    if content is not None:
        path.write_bytes(content)
    assert message in error_line(capsys, "--captions", str(path), "--output", str(tmp_path / "out"))
    assert not list(tmp_path.glob("out/*"))


def test_an_unwritable_output_is_named_before_the_model_is_looked_for(
    tmp_path: Path, captions_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    output = str(tmp_path / "file" / "dataset")
    options = ["--captions", str(captions_file), "--output", output, "--generator.model", "/no/model"]
    assert f"output {output} cannot be written: Not a directory" in error_line(capsys, *options)


def test_a_missing_model_is_named(
    tmp_path: Path, captions_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--captions",
        str(captions_file),
        "--output",
        str(tmp_path / "out"),
        "--generator.model",
        "/no/model",
    ]
    assert "model folder /no/model does not exist" in error_line(capsys, *options)


@pytest.mark.parametrize(
    "name", ["00000.tar", "README.md", "croissant.json", "a.parquet", "00000_stats.json", "fidelity.json"]
)
def test_files_of_others_are_not_overwritten(name: str, make_config: MakeConfig) -> None:
    config = make_config()
    file = Path(config.output) / name
    file.parent.mkdir()
    file.write_bytes(b"precious")
    with pytest.raises(ValueError, match=f"holds {name} but no dataset.json"):
        run(config)
    assert [path.read_bytes() for path in file.parent.iterdir()] == [b"precious"]


def test_another_plan_that_begins_while_the_model_loads_is_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, begun = make_config(seed=1), {}

    class SlowToLoad(NoiseGenerator):
        def __init__(self, *_: Any) -> None:
            monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", NoiseGenerator)
            run(make_config(seed=0))
            begun.update(finished_files(Path(config.output)))

    monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", SlowToLoad)
    with pytest.raises(ValueError, match=r"its plan was changed while this worker ran"):
        run(config)
    assert finished_files(Path(config.output)) == begun


def test_a_damaged_manifest_is_named(make_config: MakeConfig, dataset_copy: Path) -> None:
    (dataset_copy / "dataset.json").write_text("{")
    with pytest.raises(ShardError, match=r"dataset.json: not readable as JSON"):
        run(make_config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images_per_caption": 0}, "num_images_per_caption must be >= 1, got 0"),
        ({"num_captions_per_shard": 0}, "num_captions_per_shard must be >= 1, got 0"),
        ({"num_images_per_batch": -1}, "num_images_per_batch must be >= 1, got -1"),
        ({"image_quality": 101}, "image_quality must be from 1 to 100, got 101"),
        ({"stored_image_size": 0}, "stored_image_size must be >= 1 pixel, got 0"),
    ],
)
def test_a_setting_out_of_its_range_is_named_with_its_bound(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(GenerateConfig(captions="none.txt", output="none", generator=GeneratorConfig(), **change))


def test_temporaries_of_killed_processes_are_removed_and_those_of_living_ones_stay(
    make_config: MakeConfig, dataset_copy: Path
) -> None:
    from data_gen.storage.local import temporary_name

    living = dataset_copy / temporary_name("00009.tar")
    dead = living.with_name(living.name.replace(f".{os.getpid()}.", ".4194304."))
    for path in (living, dead):
        path.write_bytes(b"part")
    assert run(make_config()) == 0
    assert (living.exists(), dead.exists()) == (True, False)


@pytest.mark.parametrize("name", ["paper", "balanced", "fast"])
def test_each_preset_is_a_config_that_a_job_takes(
    name: str, captions_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub cannot be reached from here, so the model is where it ends."""
    options = ["--config", f"configs/generate_{name}.yaml", "--captions", str(captions_file)]
    assert main(["generate", *options, "--output", str(tmp_path / "out")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]  # diffusers has its own say before it
    assert re.match(r"stablerep generate: error: hub model [\w./-]+ cannot be had", last)


def test_a_preset_runs_on_another_model(
    captions_file: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", NoiseGenerator)
    output = str(tmp_path / "out")
    options = ["--config", "configs/generate_fast.yaml", "--captions", str(captions_file), "--output", output]
    assert main(["generate", *options, "--generator.model", str(tiny_pipeline)]) == 0
    manifest = read_manifest(output)
    assert manifest.settings["num_images_per_caption"] == 10
    assert "Unvalidated preset" in manifest.note
    assert "Unvalidated preset" in (tmp_path / "out" / "README.md").read_text()
