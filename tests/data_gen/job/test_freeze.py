"""Laws of a plan that takes the place of another: it tells of the machine that its images come from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_gen.job.generate import GenerateConfig, run
from data_gen.shards import read_manifest, to_json

MakeConfig = Callable[..., GenerateConfig]


def alter_fingerprint(root: Path) -> None:
    """As if the plan had been made on a machine with another torch."""
    path = root / "dataset.json"
    manifest = json.loads(path.read_text())
    manifest["fingerprint"]["torch"] = "1.0"
    path.write_text(to_json(manifest))


@pytest.mark.parametrize("changes", [{}, {"seed": 1}])
def test_a_plan_that_never_began_takes_the_fingerprint_of_the_machine_that_begins(
    changes: dict[str, Any],
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config()
    with monkeypatch.context() as context:
        context.setattr("data_gen.job.generate._run_workers", lambda *_: True)  # stopped at once
        assert run(config) == 75
    root = Path(config.output)
    here = read_manifest(root).fingerprint
    alter_fingerprint(root)
    assert run(make_config(**changes)) == 0
    assert read_manifest(root).fingerprint == here
    assert "bit-equal" not in capsys.readouterr().err


def test_without_old_images_none_is_said_to_differ(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker that joins does not freeze the plan."""
    from data_gen.job.worker import WorkConfig
    from data_gen.job.worker import run as run_worker

    config = make_config()
    with monkeypatch.context() as context:
        context.setattr("data_gen.job.generate._run_workers", lambda *_: True)
        assert run(config) == 75
    alter_fingerprint(Path(config.output))
    assert run_worker(WorkConfig(config.output, model=config.generator.model, device="cpu")) == 0
    assert "bit-equal" not in capsys.readouterr().err


def test_an_extension_keeps_the_fingerprint_of_the_old_images(
    make_config: MakeConfig, dataset_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alter_fingerprint(dataset_copy)
    assert run(make_config(num_images_per_caption=4, extend=True)) == 0
    assert read_manifest(dataset_copy).fingerprint["torch"] == "1.0"
    assert "torch was '1.0' and is" in capsys.readouterr().err
