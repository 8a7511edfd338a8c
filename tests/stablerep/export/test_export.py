"""The export, from the command line to the libraries that load it; the oracle is the saved module."""

import json
import math
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import open_clip
import pytest
import timm
import timm.data
import torch
import torch.nn.functional as F
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from stablerep.cli import main
from stablerep.evaluation.results import Provenance, Row, write_results
from stablerep.export import comparison, timm_files
from stablerep.export import export as export_module
from stablerep.export.export import ExportConfig, run
from stablerep.loading import EvaluationTransform, LoadedModel, load_model
from stablerep.text import TextConfig, build_text_tower
from tests.stablerep.datasets import write_dataset
from tests.stablerep.models import (
    SMALL_TEXT,
    SMALL_VIT,
    TEXTS,
    disturb,
    draw_images,
    draw_picture,
    save_checkpoint,
)

TIMM_FILES = {"model.safetensors", "config.json", "README.md", "training_config.yaml", "SHA256SUMS"}
OPEN_CLIP_FILES = {"open_clip_model.safetensors", "open_clip_config.json"}


def export(tmp_path: Path, *options: str, name: str = "out") -> Path:
    assert main(["export", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / name), *options]) == 0
    return tmp_path / name


def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str, name: str = "out") -> str:
    """The export fails in one line, which is returned; no half-written folder is left."""
    before = {path for path in tmp_path.rglob("*") if ".partial" not in path.name}
    capsys.readouterr()
    assert main(["export", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / name), *options]) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("stablerep ")]
    assert len(lines) == 1, error
    assert set(tmp_path.rglob("*")) == before
    return lines[0]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def section(card: str, heading: str) -> str:
    return card.split(f"\n## {heading}\n")[1].split("\n## ")[0].strip()


# ---- the hub


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})

    @property
    def siblings(self) -> list[Any]:
        return [SimpleNamespace(rfilename=name) for name in self.files]

    @property
    def tags(self) -> list[str]:
        header = self.files.get("README.md", b"").decode().split("---\n")[1:2]
        return yaml.safe_load(header[0])["tags"] if header else []


class Hub:
    """Does what the hub does, for one repository."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.repositories: dict[str, Repository] = {}

    def __call__(self, **options: Any) -> "Hub":
        return self

    @property
    def files(self) -> dict[str, bytes]:
        """What is in the repository that the tests push to."""
        files = self.repositories["someone/model"].files
        return {name: content for name, content in files.items() if name != ".gitattributes"}

    def model_info(self, repo_id: str) -> Repository:
        if repo_id not in self.repositories:
            response: Any = SimpleNamespace(headers={}, request=None)
            raise huggingface_hub.errors.RepositoryNotFoundError("404", response=response)
        return self.repositories[repo_id]

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        if self.error:
            raise self.error
        assert exist_ok
        self.repositories.setdefault(repo_id, Repository(private))  # one that is there stays as it is
        return f"https://hub/{repo_id}"

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]
    ) -> None:
        assert commit_message
        files = self.repositories[repo_id].files
        for name in [name for name in files for pattern in delete_patterns if fnmatch(name, pattern)]:
            del files[name]
        files |= {path.name: path.read_bytes() for path in folder_path.iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setenv("HF_TOKEN", "a token")
    return hub


# ---- timm and transformers


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An export without texts, and the module that it is of."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported")
    module = save_checkpoint(folder / "a.ckpt")
    return export(folder), module


def test_folder_holds_what_it_says(exported: tuple[Path, Any]) -> None:
    folder, _ = exported
    assert names_in(folder) == TIMM_FILES
    assert {path.name for path in folder.parent.iterdir()} == {"a.ckpt", "out"}
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1
    assert modes.pop() & 0o400


def test_timm_loads_the_folder(exported: tuple[Path, Any]) -> None:
    folder, module = exported
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(model(draw_images()), module.backbone(draw_images()))


def test_timm_loads_the_weights_alone(exported: tuple[Path, Any]) -> None:
    folder, module = exported
    arguments: dict[str, Any] = {"img_size": 16, "num_classes": 0, **SMALL_VIT}
    path = folder / "model.safetensors"
    model = timm.create_model("vit_tiny_patch16_224", checkpoint_path=path, **arguments).eval()
    assert torch.equal(model(draw_images()), module.backbone(draw_images()))
    assert set(load_file(path)) == set(module.backbone.state_dict())


def test_transformers_loads_the_folder(exported: tuple[Path, Any]) -> None:
    folder, module = exported
    model = AutoModel.from_pretrained(folder).eval()
    torch.testing.assert_close(model(draw_images()).pooler_output, module.backbone(draw_images()))


def test_every_transform_is_that_of_evaluation(exported: tuple[Path, Any]) -> None:
    folder, _ = exported
    picture = draw_picture()
    expected = EvaluationTransform(load_model(folder.parent / "a.ckpt").input_format)(picture)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    of_timm: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    torch.testing.assert_close(of_timm(picture), expected)
    processor: Any = AutoImageProcessor.from_pretrained(folder)
    torch.testing.assert_close(processor(picture)["pixel_values"][0], expected)


def test_the_folder_loads_as_the_checkpoint_does(exported: tuple[Path, Any]) -> None:
    folder, _ = exported
    source, loaded = load_model(folder.parent / "a.ckpt"), load_model(folder)
    assert loaded.input_format == source.input_format
    assert torch.equal(loaded.extract(draw_images())["cls_last4"], source.extract(draw_images())["cls_last4"])


@pytest.mark.parametrize("image_size", [16, 20, 32, 36, 64, 96, 112, 224, 384, 518])
def test_crop_passes_through_timms_rounding(image_size: int) -> None:
    from stablerep.backbones import IMAGENET_MEAN, IMAGENET_STD
    from stablerep.loading import InputFormat
    from stablerep.loading.timm_models import read_input_format

    resize_size = round(image_size * 256 / 224)
    form = InputFormat(image_size, IMAGENET_MEAN, IMAGENET_STD, crop_fraction=image_size / resize_size)
    crop_pct = timm_files.find_crop_pct(form)
    assert math.floor(image_size / crop_pct) == resize_size
    assert read_input_format({"input_size": (3, image_size, image_size), "crop_pct": crop_pct}, "") == form


def test_other_normalisation_passes_through(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt", image_size=32)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content["stablerep_backbone"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    torch.save(content, tmp_path / "a.ckpt")
    folder = export(tmp_path)
    cfg = timm.create_model(f"local-dir:{folder}", pretrained=True).pretrained_cfg
    assert (tuple(cfg["mean"]), tuple(cfg["std"])) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))  # type: ignore[index]


def test_a_name_that_says_it_all_has_no_arguments(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path / "a.ckpt", backbone="test_vit", backbone_options={"drop_path_rate": 0.1}, image_size=160
    )
    config = json.loads((export(tmp_path) / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("test_vit", 0)
    assert "model_args" not in config


def test_moving_average_is_exported_on_demand(tmp_path: Path) -> None:
    module = save_checkpoint(tmp_path / "a.ckpt", ema=True)
    model = timm.create_model(f"local-dir:{export(tmp_path, '--ema')}", pretrained=True).eval()
    assert module.ema_backbone is not None
    assert torch.equal(model(draw_images()), module.ema_backbone(draw_images()))


def test_official_weights_are_exported(tmp_path: Path) -> None:
    options: dict[str, Any] = {"patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 1, "img_size": 24}
    vit = disturb(timm.create_model("vit_base_patch16_224", num_classes=0, **options)).eval()
    torch.save({"model": {f"visual.{k}": v for k, v in vit.state_dict().items()}}, tmp_path / "a.ckpt")
    folder = export(tmp_path)
    assert names_in(folder) == TIMM_FILES - {"training_config.yaml"}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(model(draw_images(24)), vit(draw_images(24)))
    text = (folder / "README.md").read_text()
    assert "from a file that says nothing else" in text
    assert "authors of StableRep" not in text  # a backbone alone may be anybody's
    assert section(text, "Training data") == "Not recorded: such a file does not say."


def test_official_towers_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 1, "img_size": 24}
    vit = disturb(timm.create_model("vit_base_patch16_224", num_classes=0, **options)).eval()
    tower = build_text_tower(TextConfig(out_features=6, width=64, num_layers=2, num_heads=1)).eval()
    weights = {f"visual.{key}": value for key, value in vit.state_dict().items()} | tower.state_dict()
    matrix = torch.randn(64, 6)
    torch.save(
        {"model": weights | {"image_projection": matrix, "logit_scale": torch.ones(())}}, tmp_path / "a.ckpt"
    )
    folder = export(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    assert (
        "in the form in which the authors of StableRep publish theirs" in (folder / "README.md").read_text()
    )
    torch.testing.assert_close(model.encode_image(draw_images(24)), vit(draw_images(24)) @ matrix)
    tokens = open_clip.SimpleTokenizer()(TEXTS)
    torch.testing.assert_close(model.encode_text(tokens), tower(tokens))


# ---- open_clip


@pytest.mark.parametrize("by_name", [True, False])
def test_open_clip_loads_both_towers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_name: bool) -> None:
    options: dict[str, Any] = (
        {"backbone": "test_vit", "backbone_options": {}, "image_size": 160} if by_name else {}
    )
    module = save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT), **options)
    folder = export(tmp_path)
    assert names_in(folder) == TIMM_FILES | OPEN_CLIP_FILES
    name = f"local-dir:{folder}"
    tower = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]
    assert tower["timm_model_name"] == ("test_vit" if by_name else "local-dir:out")
    monkeypatch.chdir(tmp_path)
    model, preprocess = open_clip.create_model_from_pretrained(name)
    model.eval()
    images = draw_images(160 if by_name else 16)
    assert module.text_head is not None
    assert module.text_tower is not None
    expected = F.normalize(module.text_head.image_projection(module.backbone(images)), dim=-1)
    torch.testing.assert_close(model.encode_image(images, normalize=True), expected)
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    assert tokens.shape == (2, 10)
    expected = F.normalize(module.text_tower(tokens), dim=-1)
    torch.testing.assert_close(model.encode_text(tokens, normalize=True), expected)
    torch.testing.assert_close(model.logit_scale, module.text_head.logit_scale.squeeze(0))
    assert preprocess.transforms[-1].mean == pytest.approx([0.485, 0.456, 0.406])
    timm_model = timm.create_model(name, pretrained=True).eval()
    assert torch.equal(timm_model(images), module.backbone(images))


def test_exported_towers_load_as_the_checkpoint_does_wherever_the_folder_goes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT))
    source = load_model(tmp_path / "a.ckpt")
    moved = export(tmp_path).rename(tmp_path / "moved")
    loaded = load_model(moved)
    assert loaded.input_format == source.input_format
    torch.testing.assert_close(loaded.encode_images(draw_images()), source.encode_images(draw_images()))
    torch.testing.assert_close(loaded.encode_texts(TEXTS), source.encode_texts(TEXTS))
    assert loaded.logit_scale == pytest.approx(source.logit_scale)


def test_towers_are_found_by_the_name_that_the_user_gives_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT))
    monkeypatch.chdir(tmp_path)
    assert main(["export", "a.ckpt", "--output", "runs/out"]) == 0
    assert "open_clip looks for the backbone in runs/out" in capsys.readouterr().out
    model = open_clip.create_model("local-dir:runs/out").eval()
    assert module.text_head is not None
    expected = module.text_head.image_projection(module.backbone(draw_images()))
    torch.testing.assert_close(model.encode_image(draw_images()), expected)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_gelu_of_the_text_tower_passes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_gelu: bool
) -> None:
    module = save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT, quick_gelu=quick_gelu))
    folder = export(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert module.text_tower is not None
    torch.testing.assert_close(model.encode_text(tokens), module.text_tower(tokens))


def test_mlp_projection_is_refused_for_open_clip_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT, projection="mlp"))
    assert names_in(export(tmp_path)) == TIMM_FILES
    out = capsys.readouterr().out
    assert "no files for open_clip: open_clip has no MLP behind its towers" in out
    assert "MLPs: not in these files" in (tmp_path / "out" / "README.md").read_text()


# ---- whole or not at all


def test_an_export_that_differs_fails_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "a.ckpt")

    def save_damaged(weights: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(weights | {"norm.bias": weights["norm.bias"] + 2e-5}, path, metadata)

    monkeypatch.setattr(timm_files, "save_file", save_damaged)
    line = fails(tmp_path, capsys)
    assert "the export differs from its source: timm, local-dir: features by 2" in line
    assert "more than 1e-05" in line


def test_a_transform_that_differs_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "a.ckpt", image_size=32)
    monkeypatch.setattr(timm_files, "find_crop_pct", lambda form: 0.875)  # 36, where evaluation has 37
    assert "differs from its source: timm, local-dir: transform by" in fails(tmp_path, capsys)


def test_an_export_that_cannot_be_loaded_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    monkeypatch.setattr(timm_files, "build_model_args", lambda model: {"img_size": 16})
    assert "the export cannot be loaded back (timm folder): RuntimeError" in fails(tmp_path, capsys)


def test_a_way_back_that_loses_the_texts_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT))

    def load_damaged(path: Path) -> Any:
        model = load_model(path)
        model.text.text_projection = torch.nn.Linear(6, 6)  # type: ignore[union-attr]
        return model

    monkeypatch.setattr(comparison, "load_model", load_damaged)
    assert "differs from its source: stablerep.load_model: texts by" in fails(tmp_path, capsys)


def test_not_finite_weights_are_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content["state_dict"]["backbone.norm.bias"][0] = math.nan
    torch.save(content, tmp_path / "a.ckpt")
    assert "weight backbone.norm.bias is not finite" in fails(tmp_path, capsys)


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("precious")
    assert "is not empty" in fails(tmp_path, capsys)
    assert "holds precious.txt, which is of no export" in fails(tmp_path, capsys, "--overwrite")
    assert (tmp_path / "out" / "precious.txt").read_text() == "precious"
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in fails(tmp_path, capsys, name="file")


def test_only_an_export_as_it_was_written_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    of_others = tmp_path / "downloaded"
    of_others.mkdir()
    (of_others / "config.json").write_text("{}")
    assert "holds no SHA256SUMS" in fails(tmp_path, capsys, "--overwrite", name="downloaded")
    card = export(tmp_path) / "README.md"
    card.write_text(f"{card.read_text()}\nWhat we found.\n")
    assert "holds README.md, which is not what SHA256SUMS says" in fails(tmp_path, capsys, "--overwrite")
    assert "What we found." in card.read_text()
    assert (of_others / "config.json").read_text() == "{}"


def test_an_export_that_a_kill_left_aside_is_put_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    folder = export(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.rename(tmp_path / ".out.0123abcd.former")
    (tmp_path / ".out.0123abcd.partial").mkdir()  # it was about to take the place
    assert main(["export", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "out")]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_export_that_was_replaced_does_not_come_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    export(tmp_path, name="earlier").rename(tmp_path / ".out.0123abcd.former")  # a kill left it
    export(tmp_path)  # as though the one that replaced it had been deleted
    assert names_in(export(tmp_path, "--overwrite")) == TIMM_FILES
    assert {path.name for path in tmp_path.iterdir()} == {"a.ckpt", "out"}


def test_an_earlier_export_is_replaced_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT))
    export(tmp_path)
    module = save_checkpoint(tmp_path / "a.ckpt")
    assert "is not empty" in fails(tmp_path, capsys)
    folder = export(tmp_path, "--overwrite")
    assert names_in(folder) == TIMM_FILES
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(model(draw_images()), module.backbone(draw_images()))
    assert {path.name for path in tmp_path.iterdir()} == {"a.ckpt", "out"}


def test_a_failure_leaves_the_earlier_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "a.ckpt", image_size=32)
    export(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(timm_files, "find_crop_pct", lambda form: 0.5)
    fails(tmp_path, capsys, "--overwrite")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_an_empty_folder_and_missing_parents_are_taken(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "out").mkdir()
    export(tmp_path)
    assert names_in(export(tmp_path, name="new/parents/out")) == TIMM_FILES


def test_checksums_are_those_of_every_file(exported: tuple[Path, Any]) -> None:
    folder, _ = exported
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == TIMM_FILES - {"SHA256SUMS"}
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)


# ---- the card


def read_header(folder: Path) -> dict[str, Any]:
    text = (folder / "README.md").read_text()
    header: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return header


def test_licence_is_in_every_file_that_has_a_place_for_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT))
    folder = export(tmp_path, "--license", "cc-by-4.0")
    assert read_header(folder)["license"] == "cc-by-4.0"
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["license"] == "cc-by-4.0"
    for name in ("model.safetensors", "open_clip_model.safetensors"):
        with safe_open(folder / name, "pt") as file:
            assert file.metadata() == {"format": "pt", "license": "cc-by-4.0"}


def test_no_licence_is_assumed(exported: tuple[Path, Any]) -> None:
    folder, _ = exported
    assert read_header(folder)["license"] == "unknown"
    assert "Nobody has stated a licence for these weights" in (folder / "README.md").read_text()


def test_card_is_a_valid_one_of_the_hub(exported: tuple[Path, Any]) -> None:
    folder, _ = exported
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "timm"
    assert card.data.pipeline_tag == "image-feature-extraction"
    for heading in ("Use", "Training data", "Intended use", "Biases and limits", "Licence", "Citation"):
        assert f"\n## {heading}\n" in card.text


def run_in_blocks(text: str, folder: Path) -> dict[str, Any]:
    """Runs the card's Python, with its placeholder filled in."""
    names: dict[str, Any] = {"image": draw_picture()}
    for block in text.split("```python\n")[1:]:
        code = block.split("```")[0].replace("DIR", str(folder))
        exec(code.replace('"model.safetensors"', f'"{folder}/model.safetensors"'), names)
    return names


def test_what_the_card_says_to_run_runs(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT))
    folder = export(tmp_path)
    names = run_in_blocks((folder / "README.md").read_text(), folder)
    assert names["probabilities"].sum().item() == pytest.approx(1)
    expected = EvaluationTransform(load_model(tmp_path / "a.ckpt").input_format)(draw_picture())
    torch.testing.assert_close(names["transform"](draw_picture()), expected)


def save_run(tmp_path: Path) -> Path:
    """A run's folder with its configuration, beside the dataset that it names."""
    write_dataset(tmp_path / "data" / "shards", [4, 4])
    (tmp_path / "data" / "shards" / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# shards\n")
    save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    roots = [{"root": str(tmp_path / "data" / "shards")}, {"root": str(tmp_path / "data" / "gone")}]
    (tmp_path / "run" / "config.yaml").write_text(
        f"# as it was\n{yaml.safe_dump({'data': {'roots': roots}})}"
    )
    return tmp_path / "run" / "checkpoints" / "last.ckpt"


def test_card_tells_the_training_data_and_its_generator(tmp_path: Path) -> None:
    checkpoint = save_run(tmp_path)
    run(ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "out")))
    text = (tmp_path / "out" / "README.md").read_text()
    data = section(text, "Training data")
    assert data.startswith("What the datasets' own files said when this card was written")
    assert "### shards" in data
    assert "| images | generated, 4 planned for each of 8 captions |" in data
    assert "captions.txt" in data
    assert '| generator: model | `"none"` |' in data
    assert "| licence | cc0-1.0 |" in data
    assert "### gone\nIts `dataset.json` could not be read" in data
    assert "The data's own: cc0-1.0." in text
    assert "synthetic-data" in read_header(tmp_path / "out")["tags"]
    assert "trained with `stablerep fit`" in text
    assert "what their generator can draw" in section(text, "Biases and limits")


def test_card_claims_nothing_of_images_that_nobody_has_recorded(exported: tuple[Path, Any]) -> None:
    text = (exported[0] / "README.md").read_text()
    for heading in ("Biases and limits", "Intended use"):
        assert "enerat" not in section(text, heading)
    assert "trained with `stablerep fit`" not in text
    assert "from a training checkpoint" in text


def save_config(tmp_path: Path, **config: Any) -> None:
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))


def test_relative_datasets_are_those_of_where_the_run_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_run(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    write_dataset(elsewhere / "data" / "shards", [4])
    monkeypatch.chdir(elsewhere)
    for output, is_found in (("run", True), ("moved/from/run", False)):
        save_config(tmp_path, data={"root": "data/shards"}, output=output)
        run(ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "out"), overwrite=True))
        data = section((tmp_path / "out" / "README.md").read_text(), "Training data")
        assert ("for each of 8 captions" in data) is is_found
        assert ("could not be read" in data) is not is_found


def test_training_config_is_the_runs_own(tmp_path: Path) -> None:
    checkpoint = save_run(tmp_path)
    settings = {"model": {"temperature": 0.1}, "data": {"root": "data/sd15"}, "trainer": {"max_steps": 40}}
    save_config(tmp_path, **settings)
    run(ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "out")))
    assert yaml.safe_load((tmp_path / "out" / "training_config.yaml").read_text()) == settings


def test_no_file_names_a_folder_of_the_machine_or_a_password(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_run(tmp_path)
    save_checkpoint(checkpoint, TextConfig(**SMALL_TEXT))  # its open_clip_config.json names a folder
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["teacher"] = str(tmp_path / "teacher.ckpt")
    torch.save(content, checkpoint)
    logger = {
        "class_path": "lightning.pytorch.loggers.MLFlowLogger",
        "init_args": {"tracking_uri": "https://alice:hunter2@mlflow.corp", "save_dir": str(tmp_path)},
    }
    config = {
        "trainer": {"logger": [logger], "default_root_dir": str(tmp_path)},
        "data": {"root": str(tmp_path / "data" / "shards"), "mirror": "https://alice:hunter2@corp/sd15"},
        "output": str(tmp_path / "run"),
    }
    for number in range(2):
        if number == 0:
            save_config(tmp_path, **config)
        else:  # the hyper-parameters alone
            (tmp_path / "run" / "config.yaml").unlink()
        folder = tmp_path / f"out-{number}"
        results = write_scores(tmp_path / "scores", load_model(checkpoint))
        arguments = ["--output", str(folder), "--push", "someone/model", "--overwrite"]
        arguments += ["--results", str(results)]
        assert main(["export", str(checkpoint), *arguments]) == 0
        written = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert names_in(folder) == TIMM_FILES | OPEN_CLIP_FILES == hub.files.keys()
        for files in (written, hub.files):
            assert [name for name, content in files.items() if str(tmp_path).encode() in content] == []
            assert [name for name, content in files.items() if b"hunter2" in content] == []
    assert "teacher.ckpt" in written["training_config.yaml"].decode()


def test_card_says_no_more_of_a_dataset_and_of_scores_than_may_be_published(tmp_path: Path) -> None:
    checkpoint = save_run(tmp_path)
    path = tmp_path / "data" / "shards" / "dataset.json"
    manifest = json.loads(path.read_text())
    manifest["captions_source"] |= {"path": "/home/alice/c.txt"}
    manifest["settings"]["generator"] |= {"model": "/home/alice/models/sd15", "api_key": "hunter2"}
    manifest["note"] = "made in /home/alice"
    path.write_text(json.dumps(manifest))
    roots = [str(path.parent), "s3://alice:hunter2@bucket"]
    save_config(tmp_path, data={"roots": [{"root": root} for root in roots]})
    data = "s3://alice:hunter2@photographs"
    results = write_scores(tmp_path / "scores", load_model(checkpoint), data_name=data)
    run(ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "out"), results=str(results)))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "alice" not in text
    assert "hunter2" not in text
    assert '| generator: model | `"sd15"` |' in text
    assert "> made in ~" in text
    assert "### bucket" in text
    assert "On photographs" in text


def test_a_config_that_cannot_be_read_leaves_the_hyper_parameters(tmp_path: Path) -> None:
    checkpoint = save_run(tmp_path)
    (tmp_path / "run" / "config.yaml").write_text(f"data: [{tmp_path}")
    run(ExportConfig(checkpoint=str(checkpoint), output=str(tmp_path / "out")))
    content = yaml.safe_load((tmp_path / "out" / "training_config.yaml").read_text())
    assert content["model"]["backbone_options"] == SMALL_VIT


def test_without_a_run_the_hyper_parameters_are_the_training_config(exported: tuple[Path, Any]) -> None:
    folder, module = exported
    content = yaml.safe_load((folder / "training_config.yaml").read_text())
    assert content["model"]["backbone_options"] == SMALL_VIT
    assert content["model"]["temperature"] == module.temperature
    assert (
        "Not recorded: the checkpoint lay outside of its run's folder" in (folder / "README.md").read_text()
    )


def write_scores(
    folder: Path,
    model: LoadedModel,
    selection: str = "none",
    data_name: str = "/somewhere/shapes",
    **other: str,
) -> Path:
    folder.mkdir(exist_ok=True)
    row = Row("knn20", "accuracy", 0.625, (0.5, 0.7), "Wilson, 95 %", 64, selection, {"k": 20}, "cls", 1.5)
    hashes = {
        "weights": model.digest,
        "architecture": model.forward_digest,
        "data": "d",
        "transform": "t",
    } | other
    provenance = Provenance("a.ckpt", data_name, "Resize(18), CenterCrop(16)", hashes, {})
    write_results(folder, [row], provenance, ["x"], overwrite=True)
    return folder / "results.jsonl"


def test_figures_of_these_weights_are_on_the_card(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    results = write_scores(tmp_path / "scores", load_model(tmp_path / "a.ckpt"))
    folder = export(tmp_path, "--results", str(results), "--name", "shapes-vit")
    text = (folder / "README.md").read_text()
    assert "# shapes-vit" in text
    evaluation = text.split("## Evaluation\n")[1].split("\n## ")[0]
    assert "On shapes (Resize(18), CenterCrop(16))" in evaluation
    assert "| knn20 |" in evaluation
    assert "62.5" in evaluation
    (index,) = read_header(folder)["model-index"]
    assert index["name"] == "shapes-vit"
    (result,) = index["results"]
    assert result["metrics"][0]["value"] == 0.625
    assert "/somewhere" not in text


def test_figures_of_other_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    model = load_model(tmp_path / "a.ckpt")
    results = write_scores(tmp_path / "scores", model, weights="0" * 64)
    assert "has no row of these weights" in fails(tmp_path, capsys, "--results", str(results))
    assert "does not exist" in fails(tmp_path, capsys, "--results", str(tmp_path / "none.jsonl"))


def test_figures_of_equal_weights_in_another_architecture_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "b.ckpt", backbone_options=SMALL_VIT | {"num_heads": 4})
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "a.ckpt")
    other = load_model(tmp_path / "b.ckpt")
    assert other.digest == load_model(tmp_path / "a.ckpt").digest
    results = write_scores(tmp_path / "scores", other)
    assert "but of another architecture" in fails(tmp_path, capsys, "--results", str(results))


def test_figures_chosen_on_test_are_said_to_be(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    model = load_model(tmp_path / "a.ckpt")
    for selection, is_said in (("validation", False), ("test", True)):
        results = write_scores(tmp_path / "scores", model, selection)
        text = (export(tmp_path, "--results", str(results), "--overwrite") / "README.md").read_text()
        assert ("and so optimistic" in text) is is_said


# ---- the push


def test_nothing_is_pushed_unless_asked(tmp_path: Path, hub: Hub) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    export(tmp_path)
    assert hub.repositories == {}


@pytest.mark.parametrize("private", [True, False])
def test_push_uploads_the_folder(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], private: bool
) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    folder = export(tmp_path, "--push", "someone/model", *(["--private"] if private else []))
    assert hub.repositories["someone/model"].private is private
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "pushed to https://hub/someone/model" in capsys.readouterr().out
    assert 'timm.create_model("hf-hub:someone/model", pretrained=True)' in hub.files["README.md"].decode()


def test_pushed_towers_name_their_repository(tmp_path: Path, hub: Hub) -> None:
    save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT))
    folder = export(tmp_path, "--push", "someone/model")
    before = json.loads((folder / "open_clip_config.json").read_text())
    pushed = json.loads(hub.files["open_clip_config.json"])
    assert before["model_cfg"]["vision_cfg"]["timm_model_name"] == "local-dir:out"
    assert pushed["model_cfg"]["vision_cfg"]["timm_model_name"] == "hf-hub:someone/model"
    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()
    for name, content in hub.files.items():
        (uploaded / name).write_bytes(content)
    for place in (folder, uploaded):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=place, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"a.ckpt", "out", "uploaded"}


def test_a_private_push_into_a_public_repository_sends_nothing(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    hub.repositories["someone/model"] = Repository(private=False)
    line = fails(tmp_path, capsys, "--push", "someone/model", "--private")
    assert "cannot push to someone/model: it is a public repository, and --private asks for a private" in line
    monkeypatch.setattr(export_module, "check_push", lambda *args, **options: None)  # public since then
    arguments = ["--output", str(tmp_path / "out"), "--push", "someone/model", "--private"]
    assert main(["export", str(tmp_path / "a.ckpt"), *arguments]) == 1
    assert "it is a public repository" in capsys.readouterr().err
    assert hub.files == {}


def test_the_repository_of_another_model_is_left_alone(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    files = {"README.md": b"---\ntags: [bert]\n---\nOurs.", "model.safetensors": b"weights"}
    hub.repositories["someone/model"] = Repository(False, dict(files))
    line = fails(tmp_path, capsys, "--push", "someone/model")
    assert "it holds README.md, and no card with the tag stablerep: name another repository" in line
    assert hub.files == files


def test_an_earlier_export_in_a_repository_is_replaced_on_demand_alone(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT))
    export(tmp_path, "--push", "someone/model", name="first")
    before = dict(hub.files)
    save_checkpoint(tmp_path / "a.ckpt")  # another model, and a name typed wrongly
    line = fails(tmp_path, capsys, "--push", "someone/model")
    assert "cannot push to someone/model: it holds an export: name another repository, or --overwr" in line
    monkeypatch.setattr(export_module, "check_push", lambda *args, **options: None)  # pushed since then
    arguments = ["--output", str(tmp_path / "out"), "--push", "someone/model"]
    assert main(["export", str(tmp_path / "a.ckpt"), *arguments]) == 1
    assert "not pushed to someone/model: it holds an export" in capsys.readouterr().err
    assert hub.files == before


def test_a_later_push_takes_the_place_of_the_earlier_one(tmp_path: Path, hub: Hub) -> None:
    save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT))
    export(tmp_path, "--push", "someone/model")
    assert hub.files.keys() == TIMM_FILES | OPEN_CLIP_FILES
    hub.repositories["someone/model"].files["figure.png"] = b"the owner's"
    save_checkpoint(tmp_path / "a.ckpt")  # without texts
    export(tmp_path, "--push", "someone/model", "--overwrite")
    assert hub.files.keys() == TIMM_FILES | {"figure.png"}


def refused_connection(monkeypatch: pytest.MonkeyPatch) -> Exception:
    """What the hub's own client raises where nobody answers."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, and not listened at
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(Exception, match="refused") as caught:
            huggingface_hub.HfApi(endpoint=address, token="a token").model_info("someone/model")
    return caught.value


@pytest.mark.parametrize("is_early", [True, False])
def test_a_push_without_a_network_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_early: bool
) -> None:
    with monkeypatch.context() as online:
        error = refused_connection(online)
    assert not isinstance(error, OSError | ValueError)  # the front door would take it for a bug
    save_checkpoint(tmp_path / "a.ckpt")
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setenv("HF_TOKEN", "a token")

    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "model_info" if is_early else "upload_folder", fail)
    if is_early:
        line = fails(tmp_path, capsys, "--push", "someone/model")
        assert f"cannot push to someone/model: {error}" in line
        return
    monkeypatch.setattr(hub, "model_info", lambda repository: Repository(False))
    arguments = ["export", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--push", "someone/model"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"out is written, but not pushed to someone/model: {error}; the same command with --overw" in line
    assert names_in(tmp_path / "out") == TIMM_FILES


def test_a_push_that_failed_may_be_tried_again(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    hub.error = ConnectionError("no route")
    arguments = ["export", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--push", "someone/model"]) == 1
    assert "not pushed to someone/model: no route" in capsys.readouterr().err
    hub.error = None
    export(tmp_path, "--push", "someone/model", "--overwrite")
    assert hub.files.keys() == TIMM_FILES


def test_a_push_without_a_token_is_refused_before_the_work(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "push needs a token of the Hugging Face hub" in fails(tmp_path, capsys, "--push", "someone/model")


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push", "model"], "push must be ORG/NAME, got model"),
        (["--push", "a/b/c"], "push must be ORG/NAME, got a/b/c"),
        (["--private"], "private needs push"),
        (["--license", ""], "license must be an identifier on one line"),
        (["--ema"], "has no moving average of its weights: ema needs ema_decay"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hub: Hub, options: list[str], message: str
) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    assert message in fails(tmp_path, capsys, *options)
    assert hub.repositories == {}


def spoil(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"not a checkpoint")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [(lambda path: None, "a.ckpt does not exist"), (spoil, "a.ckpt is not readable")],
)
def test_bad_checkpoints_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Callable[[Path], None], message: str
) -> None:
    prepare(tmp_path)
    assert message in fails(tmp_path, capsys)


def test_models_of_others_are_not_exported(tmp_path: Path, exported: tuple[Path, Any]) -> None:
    with pytest.raises(ValueError, match=r"export takes a checkpoint of stablerep fit, .*, a model of timm"):
        run(ExportConfig(checkpoint=str(exported[0]), output=str(tmp_path / "out")))


def test_checkpoint_may_be_an_option_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    arguments = [f"--output={tmp_path / 'out'}", "--checkpoint", str(tmp_path / "a.ckpt")]
    assert main(["export", *arguments, "--print_config"]) == 0
    (tmp_path / "export.yaml").write_text(capsys.readouterr().out)
    assert main(["export", "--config", str(tmp_path / "export.yaml")]) == 0
    assert names_in(tmp_path / "out") == TIMM_FILES


def test_missing_output_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "a.ckpt")]) == 2
    assert capsys.readouterr().err == "stablerep export: error: missing --output\n"
