"""Laws of a dataset over time: extended, retried, repaired, verified; each image once, and the same bytes."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_gen.diffusion.generator import DiffusionGenerator
from data_gen.job.generate import GenerateConfig, run
from data_gen.job.plan import Plan
from data_gen.job.work_folder import MAX_DEATHS, Worker, WorkFolder
from data_gen.job.worker import WorkConfig
from data_gen.job.worker import run as run_worker
from data_gen.regenerate import Comparison
from data_gen.repair import RepairConfig
from data_gen.repair import run as repair
from data_gen.shards import list_complete_shards, read_manifest, read_samples, verify_shard
from data_gen.storage import Store
from data_gen.verify import VerifyConfig
from data_gen.verify import run as verify
from stablerep.cli import main
from tests.data_gen.conftest import CAPTIONS
from tests.data_gen.datasets import NoiseGenerator, read_stats

MakeConfig = Callable[..., GenerateConfig]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Caption and index of each image that is generated, with the tiny pipeline."""
    images: list[tuple[str, int]] = []
    generate = DiffusionGenerator.generate

    def record(self: DiffusionGenerator, requests: Any, seed: int) -> Any:
        images.extend((request.text, index) for request in requests for index in request.image_indices)
        return generate(self, requests, seed)

    monkeypatch.setattr(DiffusionGenerator, "generate", record)
    return images


def images_of(root: Path) -> dict[tuple[str, int], bytes]:
    return {
        (sample.caption, index): image
        for shard in list_complete_shards(root)
        for sample in read_samples(shard)
        for index, image in enumerate(sample.images)
    }


def files_of(root: Path, *suffixes: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if path.name.endswith(suffixes)}


# --- extend


def test_extend_makes_the_missing_images_alone_and_old_ones_keep_their_bytes(
    make_config: MakeConfig, dataset_copy: Path, drawn: list[tuple[str, int]], tmp_path: Path
) -> None:
    before = images_of(dataset_copy)
    assert run(make_config(num_images_per_caption=5, extend=True)) == 0
    assert sorted(drawn) == sorted((caption, index) for caption in CAPTIONS for index in (3, 4))
    after = images_of(dataset_copy)
    assert len(after) == 25
    assert {name: after[name] for name in before} == before
    assert run(make_config(num_images_per_caption=5, output=str(tmp_path / "fresh"))) == 0
    assert files_of(dataset_copy, ".tar", ".parquet") == files_of(tmp_path / "fresh", ".tar", ".parquet")
    assert {shard.num_images_per_caption for shard in list_complete_shards(dataset_copy)} == {5}
    assert verify(VerifyConfig(str(dataset_copy), deep=True)) == 0


def test_an_extension_counts_the_new_images_alone(
    make_config: MakeConfig, dataset_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(make_config(num_images_per_caption=5, extend=True)) == 0
    assert "25 images in 3 shards, 10 of them new" in capsys.readouterr().out
    assert run(make_config(num_images_per_caption=5)) == 0
    assert "25 images in 3 shards, 0 of them new" in capsys.readouterr().out


def test_an_extension_that_was_interrupted_goes_on_and_can_be_extended_again(
    make_config: MakeConfig,
    dataset_copy: Path,
    drawn: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = images_of(dataset_copy)
    with monkeypatch.context() as context:
        context.setattr("data_gen.job.generate._run_workers", lambda *_: True)  # stopped at once
        assert run(make_config(num_images_per_caption=4, extend=True)) == 75
    assert run(make_config(num_images_per_caption=5, extend=True)) == 0
    assert sorted(drawn) == sorted((caption, index) for caption in CAPTIONS for index in (3, 4))
    after = images_of(dataset_copy)
    assert {name: after[name] for name in before} == before
    assert len(read_manifest(dataset_copy).extended_from) == 2


def test_an_extension_needs_the_word_and_never_cuts(make_config: MakeConfig, dataset_copy: Path) -> None:
    with pytest.raises(ValueError, match=r"is 3 there and 4 here; --extend makes the missing images alone"):
        run(make_config(num_images_per_caption=4))
    with pytest.raises(ValueError, match="a dataset can be extended, never cut"):
        run(make_config(num_images_per_caption=2, extend=True))
    with pytest.raises(ValueError, match=r"seed is 0 there and 1 here$"):
        run(make_config(seed=1, extend=True))
    with pytest.raises(ValueError, match="holds no dataset to extend"):
        run(make_config(output=str(dataset_copy.parent / "nothing"), extend=True))


# --- retry, spill, adopt


def test_retry_failed_makes_only_what_failed(
    make_config: MakeConfig,
    finished_dataset: Path,
    drawn: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_batch = DiffusionGenerator._run

    def flag_one(self: DiffusionGenerator, plans: Any) -> Any:
        images, _ = run_batch(self, plans)
        return images, ["non_finite" if plan.request.text == CAPTIONS[1] else None for plan in plans]

    config = make_config()
    with monkeypatch.context() as context:
        context.setattr(DiffusionGenerator, "_run", flag_one)
        assert run(config) == 1
    drawn.clear()
    assert run(config) == 1
    assert drawn == []
    assert run(dataclasses.replace(config, retry_failed=True)) == 0
    assert drawn == [(CAPTIONS[1], index) for index in range(3)]
    assert files_of(Path(config.output), ".tar", ".parquet") == files_of(finished_dataset, ".tar", ".parquet")


def test_a_worker_that_is_cut_off_loses_no_finished_sample(
    make_config: MakeConfig,
    finished_dataset: Path,
    drawn: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(num_captions_per_shard=5)
    run_batch = DiffusionGenerator._run
    batches = iter(range(3))

    def cut_off(self: DiffusionGenerator, plans: Any) -> Any:
        if next(batches) == 2:
            raise KeyboardInterrupt
        return run_batch(self, plans)

    with monkeypatch.context() as context:
        context.setattr(DiffusionGenerator, "_run", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    drawn.clear()
    assert run(config) == 0  # two batches of 4 hold the first two captions' 6 images
    assert drawn == [(caption, index) for caption in CAPTIONS[2:] for index in range(3)]
    assert images_of(Path(config.output)) == images_of(finished_dataset)
    assert not (Path(config.output) / ".work").exists()


def test_a_damaged_part_is_made_again(
    make_config: MakeConfig, finished_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    with monkeypatch.context() as context:
        context.setattr("data_gen.job.shard_job.ShardWriter.publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    (part,) = (Path(config.output) / ".work").glob("00000/part-*.tar")
    content = bytearray(part.read_bytes())
    content[3000] ^= 1
    part.write_bytes(content)
    assert run(config) == 0
    assert images_of(Path(config.output)) == images_of(finished_dataset)


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("missing", [["00001_stats.json"], ["00001_stats.json", "00001.parquet"]])
def test_a_whole_tar_without_its_marker_is_adopted(
    make_config: MakeConfig, dataset_copy: Path, drawn: list[tuple[str, int]], missing: list[str]
) -> None:
    before = files_of(dataset_copy, ".tar", ".parquet")
    for name in missing:
        (dataset_copy / name).unlink()
    assert run(make_config()) == 0
    assert drawn == []
    assert files_of(dataset_copy, ".tar", ".parquet") == before


def test_of_a_damaged_tar_only_the_damaged_samples_are_made_again(
    make_config: MakeConfig,
    dataset_copy: Path,
    finished_dataset: Path,
    drawn: list[tuple[str, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tar = dataset_copy / "00000.tar"
    second = next(row for row in pq.read_table(dataset_copy / "00000.parquet").to_pylist()[3:])
    content = bytearray(tar.read_bytes())
    content[second["tar_offset"] + 100] ^= 1
    tar.write_bytes(content)
    assert repair(RepairConfig(str(dataset_copy))) == 75
    assert "00000.tar: sha256 is" in capsys.readouterr().err
    assert run(make_config()) == 0
    assert drawn == [(CAPTIONS[1], index) for index in range(3)]
    assert files_of(dataset_copy, ".tar", ".parquet") == files_of(finished_dataset, ".tar", ".parquet")


def test_a_flipped_bit_in_a_samples_record_is_not_taken_over(
    make_config: MakeConfig, dataset_copy: Path, finished_dataset: Path, drawn: list[tuple[str, int]]
) -> None:
    tar = dataset_copy / "00000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"guidance_scales": [2.0', b'"guidance_scales": [3.0', 1))
    (dataset_copy / "00000_stats.json").unlink()
    assert repair(RepairConfig(str(dataset_copy))) == 75
    assert run(make_config()) == 0
    assert drawn
    assert files_of(dataset_copy, ".tar", ".parquet") == files_of(finished_dataset, ".tar", ".parquet")


# --- plans


def test_a_plan_is_not_replaced_while_a_worker_lives_and_leaves_nothing_when_it_is(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", NoiseGenerator)
    config = make_config()
    with monkeypatch.context() as context:
        context.setattr("data_gen.job.generate._run_workers", lambda *_: True)  # stopped at once
        assert run(config) == 75
    store = Store(config.output)
    living = folder_of(store, "living", host="elsewhere")
    assert living.claim("00000")
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        run(dataclasses.replace(config, seed=1))
    living.release("00000")
    living.set_aside("00001", "of the old plan")
    assert run(dataclasses.replace(config, seed=1)) == 0
    assert "dataset.json is replaced: nothing was made by its plan" in capsys.readouterr().err


def test_the_worker_that_writes_the_card_leaves_nothing_for_others_to_remove(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", NoiseGenerator)
    config = make_config()
    with monkeypatch.context() as context:
        context.setattr("data_gen.job.generate._run_workers", lambda *_: True)  # stopped at once
        assert run(config) == 75
    assert run_worker(WorkConfig(config.output, model=config.generator.model, device="cpu")) == 0
    assert (Path(config.output) / "SHA256SUMS").is_file()
    assert not (Path(config.output) / ".work").exists()


def test_a_job_in_this_process_is_seen_by_its_own_display(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    generate = NoiseGenerator.generate

    def look(self: NoiseGenerator, requests: Any, seed: int) -> Any:
        for made in generate(self, requests, seed):
            time.sleep(0.2)
            folder = WorkFolder(Store(make_config().output), Worker.of_this_process(), lease_seconds=60)
            seen.append(len(folder.list_reports()))
            yield made

    monkeypatch.setattr(NoiseGenerator, "generate", look)
    monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", NoiseGenerator)
    assert run(make_config()) == 0
    assert seen[-1] == 1


# --- repair


def test_repair_adopts_requeues_and_collects_orphans(
    make_config: MakeConfig, dataset_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset_copy / "00000_stats.json").unlink()
    tar = dataset_copy / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    dead = f"{os.uname().nodename}-4194304-abcdef"
    orphans = {
        "captions/00000-ffffffffffff.parquet": b"of a plan that never began",
        f".00009.tar.0000abcd.{os.uname().nodename}.4194304.tmp": b"half",
        f".work/workers/{dead}.json": json.dumps(
            {"name": dead, "host": Worker.of_this_process().host, "pid": 4194304, "updated": time.time()}
        ).encode(),
        ".work/00002/part-0.tar": b"of a shard that is finished",
    }
    for name, content in orphans.items():
        (dataset_copy / name).parent.mkdir(parents=True, exist_ok=True)
        (dataset_copy / name).write_bytes(content)
    assert main(["repair", "--dataset", str(dataset_copy)]) == 75
    output = capsys.readouterr()
    assert (
        "3 shards planned, 1 sound, 1 adopted, 1 to be made, 0 set aside; 4 left-over files removed"
        in output.out
    )
    assert "00001.tar: has" in output.err
    assert not any((dataset_copy / name).exists() for name in orphans)
    assert run(make_config()) == 0
    assert main(["repair", "--dataset", str(dataset_copy)]) == 0
    assert verify(VerifyConfig(str(dataset_copy), deep=True)) == 0


def test_repair_leaves_the_shard_of_a_living_worker_alone(dataset_copy: Path) -> None:
    (dataset_copy / "00001_stats.json").unlink()
    store = Store(dataset_copy)
    elsewhere = WorkFolder(store, Worker("other-1-abcdef", "other", 1, "there"), lease_seconds=60)
    assert elsewhere.claim("00001")
    assert repair(RepairConfig(str(dataset_copy))) == 75
    assert not (dataset_copy / "00001_stats.json").exists()
    elsewhere.release("00001")
    assert repair(RepairConfig(str(dataset_copy))) == 0


# --- verify


def test_images_made_again_are_equal_to_the_byte(
    dataset_copy: Path, tiny_pipeline: Path, capsys: pytest.CaptureFixture[str], drawn: list[tuple[str, int]]
) -> None:
    options = ["verify", "--dataset", str(dataset_copy), "--model", str(tiny_pipeline), "--device", "cpu"]
    assert main([*options, "--regenerate", "1"]) == 0
    assert "15 are equal to the byte, 0 close (made under another fingerprint), 0 otherwise" in (
        capsys.readouterr().out
    )
    assert len(drawn) == 15
    drawn.clear()
    assert main([*options, "--regenerate", "0.4"]) == 0
    assert 0 < len(drawn) < 15
    first = list(drawn)
    drawn.clear()
    assert main([*options, "--regenerate", "0.4"]) == 0
    assert drawn == first


def test_an_image_that_the_plan_does_not_give_is_named(
    dataset_copy: Path,
    tiny_pipeline: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "data_gen.diffusion.generator.draw_noise", lambda seed, shape: noise(seed[::-1], shape)
    )
    config = VerifyConfig(str(dataset_copy), regenerate=1.0, model=str(tiny_pipeline), device="cpu")
    assert verify(config) == 1
    assert "other pixels under the same fingerprint" in capsys.readouterr().err


def noise(seed: str, shape: tuple[int, ...]) -> Any:
    from data_gen.diffusion.noise import draw_noise

    return draw_noise(seed, shape)


def test_another_model_is_refused(dataset_copy: Path) -> None:
    config = VerifyConfig(str(dataset_copy), regenerate=1.0, device="cpu")
    with pytest.raises((ValueError, OSError), match="tiny-pipeline"):
        verify(config)
    with pytest.raises(ValueError, match=r"model embedded is sha256:\w+, and the plan's is sha256:\w+"):
        verify(dataclasses.replace(config, model="embedded"))


def test_missing_shards_alone_are_unfinished_not_bad(dataset_copy: Path) -> None:
    (dataset_copy / "00002_stats.json").unlink()
    assert verify(VerifyConfig(str(dataset_copy))) == 75


# --- captions and their columns


def test_extra_columns_reach_the_parquet_and_the_samples(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", NoiseGenerator)
    table = tmp_path / "captions.csv"
    table.write_text("text,label,weight\na cube,3,0.5\na ring,4,\n")
    columns = {"caption_column": "text", "extra_columns": ["label", "weight"]}
    config = make_config(captions=str(table), **columns)
    assert run(config) == 0
    (shard,) = list_complete_shards(config.output)
    assert [(sample.caption, dict(sample.extra)) for sample in read_samples(shard)] == [
        ("a cube", {"label": "3", "weight": "0.5"}),
        ("a ring", {"label": "4", "weight": ""}),
    ]
    rows = pq.read_table(shard.parquet_path, columns=["caption", "label"]).to_pylist()
    assert [row["label"] for row in rows] == ["3"] * 3 + ["4"] * 3


def test_numbered_repeats_are_generated_anew_under_their_own_noise(
    make_config: MakeConfig, captions_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", NoiseGenerator)
    captions_file.write_text("a cube\na ring\n a  cube\n\n")
    config = make_config(duplicates="number", num_captions_per_shard=9)
    assert run(config) == 0
    (shard,) = list_complete_shards(config.output)
    first, _, third = read_samples(shard)
    assert (first.caption_id, third.occurrence) == (third.caption_id, 1)
    assert third.key == f"{first.key}-1"
    assert not set(first.images) & set(third.images)
    dropped = make_config(output=str(captions_file.parent / "dropped"))
    assert run(dropped) == 0
    assert next(read_samples(list_complete_shards(dropped.output)[0])).images == first.images


def test_several_sources_of_several_formats_make_one_plan(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", NoiseGenerator)
    (tmp_path / "a.txt").write_text(CAPTIONS[0] + "\n" + CAPTIONS[1])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"caption": text}) + "\n" for text in CAPTIONS[2:]))
    one = make_config()
    several = make_config(captions=[str(tmp_path / "a.txt"), str(tmp_path / "*.jsonl")])
    assert run(one) == run(several) == 0


@pytest.mark.parametrize("caption", ["../../etc/passwd", "a/b\\c", "tab\there \x07 bell", "a.b.c", "-rf ."])
def test_a_caption_with_separators_or_control_characters_is_only_text(
    caption: str, make_config: MakeConfig, captions_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_gen.diffusion.generator.DiffusionGenerator", NoiseGenerator)
    captions_file.write_text(caption + "\n")
    config = make_config()
    assert run(config) == 0
    (sample,) = read_samples(list_complete_shards(config.output)[0])
    assert sample.key.isalnum()
    assert sample.caption == " ".join(caption.replace("\x07", " ").split())


# --- claims and deaths


def folder_of(store: Store, name: str, host: str = "", pid: int = 0, lease_seconds: float = 60) -> WorkFolder:
    """What a worker sees; of this machine and process unless said otherwise."""
    here = Worker.of_this_process()
    return WorkFolder(store, Worker(name, host or here.host, pid or here.pid, name), lease_seconds)


def let_pass(root: Path, seconds: float) -> None:
    """Makes each claim older."""
    for path in root.glob(".work/*/claim-*.json"):
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def test_a_claim_holds_while_its_worker_lives(tmp_path: Path) -> None:
    store = Store(tmp_path)
    mine, far = folder_of(store, "mine"), folder_of(store, "far", host="elsewhere", lease_seconds=3600)
    dead = folder_of(store, "dead", pid=4194304)
    assert far.claim("00000")
    assert not mine.claim("00000")
    let_pass(tmp_path, 2000)
    far.renew()
    let_pass(tmp_path, 2000)
    assert not mine.claim("00000")
    let_pass(tmp_path, 1600)
    assert mine.claim("00000")
    assert dead.claim("00001")
    assert mine.claim("00001")
    assert [death["worker"] for death in mine.read_deaths("00001")] == ["dead"]


def test_a_process_number_that_another_has_now_keeps_no_claim_alive(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert folder_of(store, "gone", pid=os.getppid(), lease_seconds=3600).claim("00000")
    assert not folder_of(store, "mine").claim("00000")
    let_pass(tmp_path, 3600)
    assert folder_of(store, "mine").claim("00000")


def test_a_claim_is_taken_over_by_one_alone_and_given_back_by_its_holder_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    late = folder_of(store, "late", host="elsewhere", lease_seconds=60)
    assert late.claim("00000")
    let_pass(tmp_path, 60)
    heirs = [folder_of(store, f"heir {index}", host=f"host {index}") for index in range(8)]
    with ThreadPoolExecutor(8) as executor:
        taken = list(executor.map(lambda heir: heir.claim("00000"), heirs))
    assert taken.count(True) == 1
    late.renew()
    late.release("00000")
    assert not folder_of(store, "mine").claim("00000")
    heirs[taken.index(True)].release("00000")
    assert folder_of(store, "mine").claim("00000")


def test_claims_given_back_and_taken_at_once_raise_nothing(tmp_path: Path) -> None:
    """Empty folders go, while others write into them."""
    store = Store(tmp_path)

    def claim_and_release(index: int) -> int:
        folder = folder_of(store, f"worker {index}", host=f"host {index}")
        num_claims = 0
        for _ in range(40):
            if folder.claim("00000"):
                num_claims += 1
                folder.release("00000")
        return num_claims

    with ThreadPoolExecutor(4) as executor:
        assert sum(executor.map(claim_and_release, range(4))) > 0


def test_deaths_at_one_sample_set_a_shard_aside_and_progress_counts_afresh(tmp_path: Path) -> None:
    folder = folder_of(Store(tmp_path), "mine")
    for index in range(MAX_DEATHS - 1):
        folder.record_death("00000", "killed", f"worker {index}", "here")
        folder.record_death("00000", "killed", f"worker {index}", "here")  # by another witness
    assert not folder.is_set_aside("00000")
    folder.write_part("00000", b"a sample")
    for index in range(MAX_DEATHS):
        assert not folder.is_set_aside("00000")
        folder.record_death("00000", "killed", f"later worker {index}", "here")
    assert folder.list_set_aside() == {"00000": f"killed (×{MAX_DEATHS})"}
    folder.forgive("00000")
    assert not folder.is_set_aside("00000")
    assert list(folder.read_parts("00000")) == [b"a sample"]


def test_deaths_of_one_place_do_not_speak_against_a_shard_while_others_live(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder_of(store, "healthy", host="elsewhere").report({})
    folder = folder_of(store, "mine")
    for index in range(MAX_DEATHS + 2):
        folder.record_death("00000", "killed", f"worker {index}", "a broken accelerator")
    assert not folder.is_set_aside("00000")
    folder.record_death("00000", "killed", "another worker", "another place")
    assert folder.is_set_aside("00000")


def test_a_shard_that_was_set_aside_is_told_with_its_reason(
    dataset_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("00001.tar", "00001.parquet", "00001_stats.json"):
        (dataset_copy / name).unlink()
    folder_of(Store(dataset_copy), "mine").set_aside("00001", "killed (×3)")
    assert verify(VerifyConfig(str(dataset_copy))) == 1
    output = capsys.readouterr()
    assert "00001.tar: not finished, set aside: killed (×3)" in output.err
    assert "3 shards planned, 2 sound, 0 bad, 0 missing, 1 set aside" in output.out
    assert repair(RepairConfig(str(dataset_copy))) == 1
    output = capsys.readouterr()
    assert "shard 00001 was set aside (killed (×3)); generate --retry_failed takes it up again" in output.err
    assert "0 to be made, 1 set aside" in output.out


def test_a_models_code_and_pickles_are_allowed_for_regeneration_too(
    dataset_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def regenerate(*inputs: Any) -> Comparison:
        asked.append(inputs)
        return Comparison(num_equal=1)

    monkeypatch.setattr("data_gen.verify.regenerate", regenerate)
    config = VerifyConfig(
        str(dataset_copy), regenerate=0.5, trust_remote_code=True, allow_pickle=True, num_threads=3
    )
    assert verify(config) == 0
    ((_, shards, fraction, work),) = asked
    assert (len(shards), fraction) == (3, 0.5)
    assert (work.trust_remote_code, work.allow_pickle, work.num_threads) == (True, True, 3)


def test_planned_captions_that_are_lost_are_named(make_config: MakeConfig, dataset_copy: Path) -> None:
    plan = Plan.read(Store(dataset_copy))
    shutil.rmtree(dataset_copy / "captions")
    (dataset_copy / "00001_stats.json").unlink()
    (dataset_copy / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"captions/00000-\w+\.parquet: missing, though the plan names it"):
        run(make_config())
    assert plan.manifest.settings_hash == read_manifest(dataset_copy).settings_hash


def test_the_dry_run_prints_size_time_and_cost_and_writes_nothing(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(dry_run=True, price_per_hour=3.0)
    assert run(config) == 0
    output = capsys.readouterr().out
    assert "5 captions × 3 = 15 images in 3 shards; 0 of them there already" in output
    assert "images/s each" in output
    assert "at 3 an hour and worker" in output
    assert run(dataclasses.replace(config, num_images_per_batch=1)) == 0
    assert not Path(config.output).exists()


def test_every_marker_adds_up_and_names_its_machine(finished_dataset: Path) -> None:
    for shard in list_complete_shards(finished_dataset):
        verify_shard(shard)
        stats = read_stats(finished_dataset, shard.name)
        assert stats["num_planned"] == stats["num_written"] + stats["num_failed"]
        assert all(
            (finished_dataset / f"fingerprints/{name}.json").is_file() for name in stats["fingerprints"]
        )
