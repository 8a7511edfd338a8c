"""One function for every form of model: each gives the features that its own library computes."""

import argparse
import json
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import v2

import stablerep
from stablerep.backbones import IMAGENET_MEAN, IMAGENET_STD, build_backbone, load_backbone
from stablerep.loading import EvaluationTransform, InputFormat, LoadedModel, load_model
from stablerep.text import TextConfig, Tokenizer, build_text_tower
from tests.stablerep.models import (
    SMALL_TEXT,
    SMALL_VIT,
    TEXTS,
    disturb,
    draw_images,
    draw_picture,
    save_checkpoint,
)

# ---- our checkpoints


def test_checkpoint_gives_what_evaluation_computes_today(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    model, images = load_model(tmp_path / "a.ckpt"), draw_images()
    expected = load_backbone(tmp_path / "a.ckpt")(images)
    assert torch.equal(model.extract(images)["cls"], expected)
    assert torch.equal(model.backbone(images), expected)
    assert (model.kind, model.architecture) == ("checkpoint", "vit_tiny_patch16_224")
    assert model.name == str(tmp_path / "a.ckpt")
    assert not model.training
    assert not model.has_text
    assert model.logit_scale is None


def test_every_feature_is_that_of_its_definition(tmp_path: Path) -> None:
    module = save_checkpoint(tmp_path / "a.ckpt")
    model, images = load_model(tmp_path / "a.ckpt"), draw_images()
    features = model.extract(images)
    assert tuple(features) == model.feature_names == ("cls", "patch_mean", "cls_last4", "projection")
    vit: Any = module.backbone
    tokens = vit.forward_features(images)
    torch.testing.assert_close(features["patch_mean"], tokens[:, 1:].mean(dim=1))
    hidden, blocks = vit._pos_embed(vit.patch_embed(images)), []
    for block in vit.blocks:
        hidden = block(hidden)
        blocks.append(vit.norm(hidden)[:, 0])
    torch.testing.assert_close(features["cls_last4"], torch.cat(blocks, dim=1))
    assert module.projection_head is not None
    torch.testing.assert_close(features["projection"], module.projection_head(vit(images)))


def test_features_come_from_one_pass(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    model, calls = load_model(tmp_path / "a.ckpt"), []
    model.backbone.patch_embed.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    model.extract(draw_images())
    assert len(calls) == 1


def test_a_shallow_model_has_no_last_four_blocks(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt", backbone_options=SMALL_VIT | {"depth": 3})
    assert load_model(tmp_path / "a.ckpt").feature_names == ("cls", "patch_mean", "projection")


@pytest.mark.parametrize("norm", ["batchnorm_per_view", "layernorm"])
def test_projection_head_of_either_norm_is_read(tmp_path: Path, norm: str) -> None:
    module = save_checkpoint(tmp_path / "a.ckpt", projection_norm=norm)
    images = draw_images()
    assert module.projection_head is not None
    expected = module.projection_head(module.backbone(images))
    torch.testing.assert_close(load_model(tmp_path / "a.ckpt").extract(images)["projection"], expected)


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_texts_and_images_are_encoded_as_in_training(tmp_path: Path, projection: Any) -> None:
    config = TextConfig(**SMALL_TEXT, projection=projection)
    module = save_checkpoint(tmp_path / "a.ckpt", config)
    model, images = load_model(tmp_path / "a.ckpt"), draw_images()
    assert module.text_head is not None
    assert module.text_tower is not None
    features = module.backbone(images)
    expected_images, expected_texts = module.text_head.project(
        features.unsqueeze(1), module.text_tower(Tokenizer(10)(TEXTS))
    )
    torch.testing.assert_close(model.encode_images(images), F.normalize(expected_images, dim=-1))
    torch.testing.assert_close(model.encode_image_features(features), model.encode_images(images))
    torch.testing.assert_close(model.encode_texts(TEXTS), F.normalize(expected_texts, dim=-1))
    assert model.has_text
    assert model.logit_scale == pytest.approx(module.text_head.logit_scale.exp().item())


def test_many_texts_are_those_of_one_by_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT))
    model = load_model(tmp_path / "a.ckpt")
    many = model.encode_texts([f"a picture of number {index}" for index in range(300)])
    torch.testing.assert_close(many[299:], model.encode_texts(["a picture of number 299"]))


def test_without_a_text_tower_texts_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    model = load_model(tmp_path / "a.ckpt")
    for call in (lambda: model.encode_texts(["a"]), lambda: model.encode_images(draw_images())):
        with pytest.raises(ValueError, match=r"a\.ckpt has no text tower"):
            call()


def test_moving_average_is_taken_on_demand(tmp_path: Path) -> None:
    module = save_checkpoint(tmp_path / "a.ckpt", ema=True)
    images = draw_images()
    average, last = load_model(tmp_path / "a.ckpt", ema=True), load_model(tmp_path / "a.ckpt")
    assert module.ema_backbone is not None
    assert torch.equal(average.backbone(images), module.ema_backbone(images))
    assert not torch.equal(average.backbone(images), last.backbone(images))
    assert average.digest != last.digest


def test_fresh_weights_are_those_of_the_seed_and_no_others(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT))
    torch.manual_seed(3)
    expected = load_backbone(tmp_path / "a.ckpt", random_init=True)
    torch.manual_seed(3)
    model = load_model(tmp_path / "a.ckpt", random_init=True)
    assert torch.equal(model.backbone(draw_images()), expected(draw_images()))
    assert model.feature_names == ("cls", "patch_mean", "cls_last4")
    assert not model.has_text


def test_digest_is_of_the_weights_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    first = load_model(tmp_path / "a.ckpt").digest
    (tmp_path / "b.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes())
    assert load_model(tmp_path / "b.ckpt").digest == first
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    content["state_dict"]["backbone.norm.bias"][0] += 1e-4
    torch.save(content, tmp_path / "b.ckpt")
    assert load_model(tmp_path / "b.ckpt").digest != first
    assert len(first) == 64


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT))
    for key, name, value in (
        ("backbone.norm.bias", "backbone.norm.bias", math.nan),
        ("text_tower.ln_final.bias", "text.tower.ln_final.bias", math.inf),
        ("projection_head.1.running_mean", "projection_head.1.running_mean", math.nan),
    ):
        content = torch.load(tmp_path / "a.ckpt", weights_only=True)
        content["state_dict"][key][0] = value
        torch.save(content, tmp_path / "b.ckpt")
        with pytest.raises(ValueError, match=rf"b\.ckpt: weight {name} is not finite"):
            load_model(tmp_path / "b.ckpt")


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["state_dict"].pop("backbone.norm.weight"), "norm.weight"),
        (lambda c: c["state_dict"].update({"backbone.extra": torch.zeros(1)}), "extra"),
        (lambda c: c["state_dict"].update({"other.weight": torch.zeros(1)}), "unexpected other.weight"),
        (
            lambda c: c["state_dict"].pop("projection_head.3.bias"),
            "projection head does not fit its architecture: missing 3.bias",
        ),
        (
            lambda c: c["state_dict"].pop("text_tower.ln_final.bias"),
            "text tower does not fit its architecture: missing ln_final.bias",
        ),
        (
            lambda c: c["hyper_parameters"].update(text=None),
            "has a text tower, but its hyper-parameters do not describe it",
        ),
        (
            lambda c: c["state_dict"].update({"text_head.image_projection.weight": torch.zeros(3, 16)}),
            r"text head .*image_projection.weight is \[3, 16\] there and \[6, 16\] here",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_in_one_line(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    save_checkpoint(tmp_path / "a.ckpt", TextConfig(**SMALL_TEXT))
    change(tmp_path / "a.ckpt", edit)
    with pytest.raises(ValueError, match=rf"^checkpoint [^\n]*a\.ckpt[^\n]*{message}[^\n]*$"):
        load_model(tmp_path / "a.ckpt")


# ---- the authors' weights


def build_official(**options: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small backbone, and its weights under the authors' names with a projection head."""
    shape = {"patch_size": 8, "depth": 4, "embed_dim": 64, "num_heads": 1} | options
    vit = disturb(timm.create_model("vit_base_patch16_224", num_classes=0, img_size=24, **shape)).eval()
    mlp = disturb(build_official_mlp(64, 12, 8))
    weights = {f"visual.{key}": value for key, value in vit.state_dict().items()}
    return vit, weights | {f"image_mlp.{key}": value for key, value in mlp.state_dict().items()}


def build_official_mlp(in_features: int, hidden_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            layer1=nn.Linear(in_features, hidden_features),
            bn1=nn.BatchNorm1d(hidden_features),
            relu1=nn.ReLU(),
            layer2=nn.Linear(hidden_features, hidden_features),
            bn2=nn.BatchNorm1d(hidden_features),
            relu2=nn.ReLU(),
            layer3=nn.Linear(hidden_features, out_features),
        )
    )


@pytest.mark.parametrize("form", ["model", "state_dict", "bare", "module", "unprefixed", "safetensors"])
def test_official_weights_are_read_in_every_form(tmp_path: Path, form: str) -> None:
    vit, weights = build_official()
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    match form:
        case "model":
            torch.save({"model": weights, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path)
        case "state_dict":
            torch.save({"state_dict": weights}, path)
        case "bare":
            torch.save(weights, path)
        case "module":
            torch.save({"model": {f"module.{key}": value for key, value in weights.items()}}, path)
        case "unprefixed":
            torch.save(vit.state_dict(), path)
        case "safetensors":
            save_file(vit.state_dict(), path)
    model, images = load_model(path), draw_images(24)
    torch.testing.assert_close(model.extract(images)["cls"], vit(images))
    is_bare = form in ("unprefixed", "safetensors")
    assert (model.kind, model.input_format.image_size) == ("weights" if is_bare else "stablerep", 24)
    assert ("projection" in model.feature_names) != is_bare
    assert model.input_format.mean == IMAGENET_MEAN


@pytest.mark.parametrize("prefix", ["", "visual."])
def test_a_backbone_alone_is_nobodys_and_what_is_assumed_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str
) -> None:
    vit, weights = build_official()
    torch.save({"model": weights}, tmp_path / "official.pth")
    assert load_model(tmp_path / "official.pth").kind == "stablerep"
    assert not caplog.records
    torch.save({f"{prefix}{key}": value for key, value in vit.state_dict().items()}, tmp_path / "vit.pth")
    assert load_model(tmp_path / "vit.pth").kind == "weights"
    (record,) = caplog.records
    assert "heads of 64 channels, ImageNet's mean and deviation" in record.message


def test_official_projection_head_is_read(tmp_path: Path) -> None:
    vit, weights = build_official()
    mlp = build_official_mlp(64, 12, 8).eval()
    mlp.load_state_dict(
        {key.removeprefix("image_mlp."): v for key, v in weights.items() if key.startswith("image_mlp.")}
    )
    torch.save({"model": weights}, tmp_path / "a.pth")
    images = draw_images(24)
    projection = load_model(tmp_path / "a.pth").extract(images)["projection"]
    torch.testing.assert_close(projection, mlp(vit(images)))


def test_a_classifier_may_be_there_or_not(tmp_path: Path) -> None:
    vit, weights = build_official()
    weights["visual.head.weight"], weights["visual.head.bias"] = torch.zeros(5, 64), torch.zeros(5)
    torch.save({"model": weights}, tmp_path / "a.pth")
    torch.testing.assert_close(load_model(tmp_path / "a.pth").backbone(draw_images(24)), vit(draw_images(24)))


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_official_text_tower_is_read(tmp_path: Path, projection: Any) -> None:
    vit, weights = build_official()
    config = TextConfig(projection=projection, out_features=6, width=64, num_layers=2, num_heads=1)
    tower = build_text_tower(config).eval()
    weights |= tower.state_dict() | {"logit_scale": torch.tensor(1.5)}
    sides: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    if projection == "linear":
        weights["image_projection"] = matrix = torch.randn(64, 6)
        sides = {"image": lambda features: features @ matrix, "text": lambda features: features}
    else:
        for side in ("image", "text"):
            mlp = disturb(build_official_mlp(64, 12, 6)).eval()
            weights |= {f"{side}_projection.{key}": value for key, value in mlp.state_dict().items()}
            sides[side] = mlp
    torch.save({"model": weights}, tmp_path / "a.pth")
    model, images = load_model(tmp_path / "a.pth"), draw_images(24)
    expected = F.normalize(sides["image"](vit(images)), dim=-1)
    torch.testing.assert_close(model.encode_images(images), expected)
    expected = F.normalize(sides["text"](tower(Tokenizer()(TEXTS))), dim=-1)
    torch.testing.assert_close(model.encode_texts(TEXTS), expected)
    assert model.logit_scale == pytest.approx(torch.tensor(1.5).exp().item())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vit_small_patch16_224", (384, 12, 6)),
        ("vit_base_patch16_224", (768, 12, 12)),
        ("vit_large_patch16_224", (1024, 24, 16)),
        ("vit_base_patch32_224", (768, 12, 12)),
    ],
)
def test_published_shapes_are_recognised(name: str, shape: tuple[int, int, int]) -> None:
    from stablerep.loading.official import build_official as build

    with torch.device("meta"):
        weights = timm.create_model(name, num_classes=7).state_dict()
        backbone: Any = build({"model": {f"visual.{k}": v for k, v in weights.items()}}, "a.pth").backbone
    assert backbone.architecture == name
    assert backbone.backbone_options == {}
    assert (backbone.embed_dim, len(backbone.blocks), backbone.blocks[0].attn.num_heads) == shape


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("visual.norm.bias"), "does not fit its architecture: missing norm.bias"),
        (lambda w: w.pop("visual.cls_token"), "no vision transformer with a class token: missing cls_token"),
        (lambda w: w.update({"visual.reg": torch.zeros(1)}), "does not fit its architecture: unexpected reg"),
        (lambda w: w.update({"decoder.x": torch.zeros(1)}), "is not understood: unexpected decoder.x"),
        (lambda w: w.pop("image_mlp.bn2.bias"), "image_mlp does not fit its architecture: missing 4.bias"),
        (
            lambda w: w.update({"visual.blocks.3.attn.proj.bias": torch.zeros(3)}),
            r"blocks.3.attn.proj.bias is \[3\] there and \[64\] here",
        ),
        (lambda w: w.update({"visual.pos_embed": torch.zeros(1, 8, 64)}), "square of patches, got 7 patches"),
        (
            lambda w: w.update({"logit_scale": torch.zeros(())}),
            "a part of a text tower: missing positional_embedding",
        ),
    ],
)
def test_official_weights_that_do_not_fit_are_named(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    _, weights = build_official()
    edit(weights)
    torch.save({"model": weights}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"^checkpoint [^\n]*a\.pth[^\n]*{message}[^\n]*$"):
        load_model(tmp_path / "a.pth")


def test_fresh_weights_of_official_shapes(tmp_path: Path) -> None:
    vit, weights = build_official()
    torch.save({"model": weights}, tmp_path / "a.pth")
    model = load_model(tmp_path / "a.pth", random_init=True)
    assert {k: v.shape for k, v in model.backbone.state_dict().items()} == {
        k: v.shape for k, v in vit.state_dict().items()
    }
    assert not torch.allclose(model.backbone(draw_images(24)), vit(draw_images(24)))
    assert "projection" not in model.feature_names


class Surprise:
    def __reduce__(self) -> Any:
        return (Path, ("x",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not readable"),
        (b"not a checkpoint", "is not readable"),
        (pickle.dumps(Surprise(), protocol=2), "is not readable"),
        ({"model": {}}, "holds no weights"),
        ([1, 2], "holds no weights by name, but a list"),
    ],
)
def test_files_that_are_no_weights_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=rf"^checkpoint [^\n]*a\.pth[^\n]*{message}[^\n]*$"):
        load_model(path)


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"x": Surprise()}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth is not readable"):
        load_model(tmp_path / "a.pth")


# ---- timm

TIMM_ARGS: dict[str, Any] = {"patch_size": 8, "depth": 4, "embed_dim": 16, "num_heads": 2, "img_size": 16}


def save_timm_folder(folder: Path, model: nn.Module, **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": TIMM_ARGS,
        "pretrained_cfg": {
            "input_size": [3, 16, 16],
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.4],
            "interpolation": "bilinear",
            "crop_pct": 0.9,
            "classifier": "head",
            "first_conv": "patch_embed.proj",
        },
    }
    (folder / "config.json").write_text(json.dumps(values | config))
    save_file(model.state_dict(), folder / "model.safetensors")


def build_timm(num_classes: int = 0) -> nn.Module:
    return disturb(timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **TIMM_ARGS)).eval()


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_timm_folder_gives_timms_features_without_its_classifier(
    tmp_path: Path, num_classes: int, prefix: str
) -> None:
    vit: Any = build_timm(num_classes)
    save_timm_folder(tmp_path / "m", vit, num_classes=num_classes)
    model, images = load_model(f"{prefix}{tmp_path / 'm'}"), draw_images()
    expected = vit.forward_head(vit.forward_features(images), pre_logits=True)
    assert torch.equal(model.backbone(images), expected)
    assert torch.equal(model.extract(images)["cls"], expected)
    assert model.feature_names == ("cls", "patch_mean", "cls_last4")
    assert (model.kind, model.architecture) == ("timm", "vit_tiny_patch16_224")
    assert model.input_format.mean == (0.5, 0.4, 0.3)
    assert model.input_format.interpolation == "bilinear"
    assert model.input_format.resize_size == 17  # ⌊16 / 0.9⌋, as timm rounds


def test_timm_folder_without_the_classifier_that_it_announces(tmp_path: Path) -> None:
    vit = build_timm()
    save_timm_folder(tmp_path / "m", vit, num_classes=5)
    model = load_model(tmp_path / "m")
    assert torch.equal(model.backbone(draw_images()), vit(draw_images()))


@pytest.mark.parametrize("key", ["norm.bias", "blocks.2.attn.qkv.weight"])
def test_timm_folder_without_another_weight_is_refused(tmp_path: Path, key: str) -> None:
    vit = build_timm()
    save_timm_folder(tmp_path / "m", vit, num_classes=5)
    state = {name: value for name, value in vit.state_dict().items() if name != key}
    save_file(state, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"m: timm cannot load it: missing [^\n]*{key}[^\n]*$"):
        load_model(tmp_path / "m")


def test_timm_folder_with_another_weight_is_refused(tmp_path: Path) -> None:
    vit = build_timm()
    save_timm_folder(tmp_path / "m", vit)
    save_file(vit.state_dict() | {"extra": torch.zeros(1)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match=r"m: timm cannot load it: unexpected extra$"):
        load_model(tmp_path / "m")


def test_weights_beside_their_config_are_what_it_says(tmp_path: Path) -> None:
    args = TIMM_ARGS | {"embed_dim": 128, "num_heads": 4}  # by the width alone they would be 2
    vit = disturb(timm.create_model("vit_tiny_patch16_224", num_classes=0, **args)).eval()
    save_timm_folder(tmp_path / "m", vit, model_args=args)
    model = load_model(tmp_path / "m" / "model.safetensors")
    assert torch.equal(model.backbone(draw_images()), vit(draw_images()))
    assert model.input_format == load_model(tmp_path / "m").input_format


def save_resized_folder(folder: Path) -> None:
    """Weights for images of 24 pixels beside a config for 16."""
    args = TIMM_ARGS | {"img_size": 24}
    save_timm_folder(folder, timm.create_model("vit_tiny_patch16_224", num_classes=0, **args))


def test_timm_folder_with_weights_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_resized_folder(tmp_path / "m")
    message = (
        r"m: its weights are not those of its config.json: pos_embed is \[1, 10, 16\] there and \[1, 5, 16\]"
    )
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "m")
    assert load_model(tmp_path / "m", random_init=True).input_format.image_size == 16


def test_timm_name_with_fresh_weights() -> None:
    torch.manual_seed(1)
    model = load_model("test_vit.r160_in1k", random_init=True)
    torch.manual_seed(1)
    expected: Any = timm.create_model("test_vit").eval()
    expected.reset_classifier(0)
    images = draw_images(160)
    torch.testing.assert_close(model.backbone(images), expected(images))
    assert model.input_format.image_size == 160


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_convolutional_model_has_its_pooled_feature(name: str) -> None:
    model = load_model(name, random_init=True)
    images = draw_images(model.input_format.image_size)
    assert model.feature_names == ("cls",)
    features = model.extract(images)["cls"]
    assert features.ndim == 2
    assert torch.equal(features, model.backbone(images))


def test_transformer_without_a_class_token_has_its_pooled_feature() -> None:
    model = load_model("vit_tiny_patch16_224", random_init=True)
    pooled = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="avg", class_token=False)
    averaged = LoadedModel(
        name="a", architecture="a", kind="timm", backbone=pooled, input_format=model.input_format
    )
    images = draw_images(224, 1)
    assert averaged.feature_names == ("cls", "patch_mean")
    assert torch.equal(averaged.extract(images)["cls"], pooled(images))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Puts a folder into the hub's cache, from where it loads without a network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def add(repository: str, folder: Path) -> None:
        root, revision = cache / f"models--{repository.replace('/', '--')}", "0" * 40
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(revision)
        (root / "snapshots").mkdir()
        folder.rename(root / "snapshots" / revision)

    return add


def test_hub_id_is_loaded_through_timm(tmp_path: Path, hub: Callable[[str, Path], None]) -> None:
    vit = build_timm(5)
    save_timm_folder(tmp_path / "m", vit, num_classes=5)
    hub("someone/model", tmp_path / "m")
    model, images = load_model("hf-hub:someone/model"), draw_images()
    torch.testing.assert_close(model.backbone(images), vit.forward_head(vit.forward_features(images), True))  # type: ignore[operator]
    assert model.input_format.interpolation == "bilinear"


def test_hub_id_with_weights_of_another_shape_is_refused(
    tmp_path: Path, hub: Callable[[str, Path], None]
) -> None:
    save_resized_folder(tmp_path / "m")
    hub("someone/model", tmp_path / "m")
    with pytest.raises(ValueError, match=r"^hf-hub:someone/model: its weights are not those of its config"):
        load_model("hf-hub:someone/model")


def test_timm_name_is_loaded_from_the_hub(tmp_path: Path, hub: Callable[[str, Path], None]) -> None:
    vit = disturb(timm.create_model("test_vit")).eval()
    (tmp_path / "m").mkdir()
    save_file(vit.state_dict(), tmp_path / "m" / "model.safetensors")
    hub("timm/test_vit.r160_in1k", tmp_path / "m")
    images = draw_images(160)
    expected = vit.forward_head(vit.forward_features(images), pre_logits=True)  # type: ignore[operator]
    torch.testing.assert_close(load_model("test_vit").backbone(images), expected)


def test_what_the_hub_does_not_have_is_one_line(hub: object) -> None:
    with pytest.raises(ValueError, match=r"^hf-hub:someone/absent: timm cannot load it: [^\n]+$"):
        load_model("hf-hub:someone/absent")


# ---- open_clip

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 6,
    "vision_cfg": {"image_size": 16, "layers": 4, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def clip_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small architecture that open_clip knows by name for the time of a test."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", CLIP_CONFIG)
    return "tiny-clip"


def check_clip(model: LoadedModel, clip: Any) -> None:
    images, texts = draw_images(), open_clip.SimpleTokenizer(context_length=10)(TEXTS)
    torch.testing.assert_close(model.encode_images(images), clip.encode_image(images, normalize=True))
    torch.testing.assert_close(model.encode_texts(TEXTS), clip.encode_text(texts, normalize=True))
    assert model.logit_scale == pytest.approx(clip.logit_scale.exp().item())
    features = model.extract(images)
    assert torch.equal(features["cls"], model.backbone(images))
    torch.testing.assert_close(model.encode_image_features(features["cls"]), model.encode_images(images))
    assert model.kind == "open_clip"


def test_open_clip_weights_by_file(tmp_path: Path, clip_architecture: str) -> None:
    clip = disturb(open_clip.create_model(clip_architecture)).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    model = load_model(f"open_clip:{clip_architecture}/{tmp_path / 'clip.pt'}")
    check_clip(model, clip)
    assert model.feature_names == ("cls", "patch_mean", "cls_last4")
    assert model.input_format.crop_fraction == 1
    assert model.architecture == clip_architecture


def test_open_clip_features_are_those_of_their_definition(tmp_path: Path, clip_architecture: str) -> None:
    clip: Any = disturb(open_clip.create_model(clip_architecture)).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    features = load_model(f"open_clip:{clip_architecture}/{tmp_path / 'clip.pt'}").extract(draw_images())
    hidden, blocks = clip.visual._embeds(draw_images()), []
    for block in clip.visual.transformer.resblocks:
        hidden = block(hidden)
        blocks.append(clip.visual.ln_post(hidden))
    torch.testing.assert_close(features["cls"], blocks[-1][:, 0])
    torch.testing.assert_close(features["patch_mean"], blocks[-1][:, 1:].mean(dim=1))
    torch.testing.assert_close(features["cls_last4"], torch.cat([block[:, 0] for block in blocks], dim=1))


def save_clip_folder(folder: Path, config: dict[str, Any], **preprocess: Any) -> Any:
    text = open_clip.CLIP(**config)
    clip = disturb(text).eval()
    folder.mkdir()
    content = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return clip


def test_open_clip_folder(tmp_path: Path) -> None:
    clip = save_clip_folder(tmp_path / "m", CLIP_CONFIG, interpolation="bilinear")
    model = load_model(tmp_path / "m")
    check_clip(model, clip)
    assert model.input_format == InputFormat(16, (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0)


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_resizing_that_is_not_the_models_own_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, library: str
) -> None:
    def save(folder: Path, mode: str) -> None:
        if library == "timm":
            input_ = {"input_size": [3, 16, 16], "crop_mode": mode}
            save_timm_folder(folder, build_timm(), pretrained_cfg=input_)
        else:
            save_clip_folder(folder, CLIP_CONFIG, resize_mode=mode)

    save(tmp_path / "own", "center" if library == "timm" else "shortest")
    assert load_model(tmp_path / "own").remarks == ()
    save(tmp_path / "m", "squash")
    (remark,) = load_model(tmp_path / "m").remarks
    assert remark.endswith(
        "m was made for images resized by squash; the shorter side and a central crop are used"
    )
    assert [record.message for record in caplog.records] == [remark]


def test_open_clip_folder_beside_a_config_of_transformers(tmp_path: Path) -> None:
    clip = save_clip_folder(tmp_path / "m", CLIP_CONFIG)
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": 6}))
    model = load_model(tmp_path / "m")
    check_clip(model, clip)
    assert model.input_format.crop_fraction == 1


def save_both_forms(folder: Path) -> tuple[Any, nn.Module]:
    """A folder for open_clip and for timm, as an export is; the two models of it."""
    clip = save_clip_folder(folder, CLIP_CONFIG)
    vit = build_timm()
    save_timm_folder(folder, vit)
    return clip, vit


def test_a_folder_is_cropped_for_alike_by_either_name(tmp_path: Path) -> None:
    save_both_forms(tmp_path / "m")
    forms = {load_model(f"{prefix}{tmp_path / 'm'}").input_format for prefix in ("", "open_clip:")}
    assert {form.resize_size for form in forms} == {17}  # of timm's config.json


def test_without_open_clip_the_backbone_of_a_text_model_still_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, vit = save_both_forms(tmp_path / "m")
    assert load_model(tmp_path / "m").has_text
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    model = load_model(tmp_path / "m")
    assert torch.equal(model.backbone(draw_images()), vit(draw_images()))
    assert not model.has_text
    assert "open_clip is not installed, so its text tower is left out" in caplog.text


def test_open_clip_with_an_image_tower_of_timm(tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
    clip = save_clip_folder(tmp_path / "m", CLIP_CONFIG | {"vision_cfg": vision})
    model, images = load_model(tmp_path / "m"), draw_images(160)
    torch.testing.assert_close(model.encode_images(images), clip.encode_image(images, normalize=True))
    assert torch.equal(model.extract(images)["cls"], clip.visual.trunk(images))


def test_open_clip_with_a_resnet_gives_its_output(tmp_path: Path) -> None:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    clip = save_clip_folder(tmp_path / "m", CLIP_CONFIG | {"vision_cfg": vision})
    model, images = load_model(tmp_path / "m"), draw_images(32)
    assert model.feature_names == ("cls",)
    torch.testing.assert_close(model.backbone(images), clip.visual(images))
    torch.testing.assert_close(model.encode_images(images), clip.encode_image(images, normalize=True))


def test_open_clip_with_fresh_weights(clip_architecture: str) -> None:
    torch.manual_seed(5)
    model = load_model(f"open_clip:{clip_architecture}", random_init=True)
    torch.manual_seed(5)
    clip: Any = open_clip.create_model(clip_architecture).eval()
    clip.visual.proj = None
    torch.testing.assert_close(model.backbone(draw_images()), clip.visual(draw_images()))
    assert not model.has_text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-33/openai", "no architecture 'ViT-B-33'; did you mean ViT-B-32"),
        ("open_clip:ViT-B-32", "open_clip:ViT-B-32 needs weights: .*its tags are openai"),
        ("open_clip:ViT-B-32/opnai", "no weights 'opnai', and there is no such file; did you mean openai"),
    ],
)
def test_misspelt_open_clip_names_are_answered(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        load_model(name)


def test_open_clip_folder_with_other_weights_is_refused(tmp_path: Path) -> None:
    save_clip_folder(tmp_path / "m", CLIP_CONFIG)
    save_file({"visual.proj": torch.zeros(16, 6)}, tmp_path / "m" / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"^[^\n]*m: open_clip cannot load it: [^\n]*Missing key[^\n]*$"):
        load_model(tmp_path / "m")


def test_missing_open_clip_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(
        ValueError, match=r"open_clip, which is not installed: pip install 'stablerep\[text\]'"
    ):
        load_model("open_clip:ViT-B-32/openai")


# ---- names, input, and the function for users' own code


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("none.ckpt", FileNotFoundError, "checkpoint none.ckpt does not exist"),
        ("runs/none.pth", FileNotFoundError, "checkpoint runs/none.pth does not exist"),
        ("someone/model", FileNotFoundError, "does not exist; a model on the hub is hf-hub:someone/model"),
        ("https://a.b/c.ckpt", ValueError, "checkpoint must be a local file, got https://a.b/c.ckpt"),
        ("vit_tiny_patch16_22", ValueError, "no name of timm; did you mean vit_tiny_patch16_224?"),
    ],
)
def test_names_that_are_nothing_are_answered(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        load_model(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_of_a_run_names_its_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match=r"its checkpoint is .*checkpoints/last\.ckpt"):
        load_model(tmp_path)


def test_moving_average_is_asked_of_checkpoints_alone(tmp_path: Path) -> None:
    _, weights = build_official()
    torch.save({"model": weights}, tmp_path / "a.pth")
    for name in (str(tmp_path / "a.pth"), "test_vit", "open_clip:ViT-B-32/openai"):
        with pytest.raises(ValueError, match="ema needs a checkpoint of stablerep fit"):
            load_model(name, ema=True)
    with pytest.raises(ValueError, match="ema and random_init exclude each other"):
        load_model("test_vit", ema=True, random_init=True)


def test_transform_is_torchvisions_on_upright_rgb() -> None:
    form = InputFormat(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 32 / 37)
    picture = draw_picture()
    expected = v2.Compose(
        [
            v2.Resize(37, v2.InterpolationMode.BILINEAR),
            v2.CenterCrop(32),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]),
        ]
    )(picture)
    transform = EvaluationTransform(form)
    torch.testing.assert_close(transform(picture), torch.as_tensor(expected))
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # shown turned by a quarter to the right
    torch.testing.assert_close(transform(turned), transform(picture))
    assert transform(picture.convert("L")).shape == (3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(picture), transform(picture))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be >= 1, got 0"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be > 0"),
        ({"mean": (0.5,)}, "mean and std must have 3 channels"),
        ({"interpolation": "cubic"}, "interpolation must be one of .*bicubic.*, got cubic"),
        ({"crop_fraction": 1.5}, r"crop_fraction must be in \(0, 1\], got 1.5"),
    ],
)
def test_impossible_input_is_refused(options: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"image_size": 16, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    with pytest.raises(ValueError, match=message):
        InputFormat(**(values | options))


@pytest.mark.parametrize("image_size", [16, 20, 32, 36, 64, 96, 224, 384])
def test_our_checkpoints_are_shown_images_as_published(tmp_path: Path, image_size: int) -> None:
    save_checkpoint(
        tmp_path / "a.ckpt", image_size=image_size, backbone_options=SMALL_VIT | {"patch_size": 4}
    )
    form = load_model(tmp_path / "a.ckpt").input_format
    assert form.resize_size == round(image_size * 256 / 224)
    assert (form.image_size, form.interpolation) == (image_size, "bicubic")


def test_load_model_for_users_code(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt")
    backbone, transform = stablerep.load_model(tmp_path / "a.ckpt")
    model = load_model(tmp_path / "a.ckpt")
    batch = transform(draw_picture()).unsqueeze(0)
    assert torch.equal(backbone(batch), model.backbone(batch))
    assert torch.equal(transform(draw_picture()), EvaluationTransform(model.input_format)(draw_picture()))


def test_equal_weights_of_another_number_of_heads_are_another_model() -> None:
    models = []
    for num_heads in (2, 4, 4):
        torch.manual_seed(0)
        backbone = build_backbone(
            "vit_tiny_patch16_224",
            16,
            {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": num_heads},
        )
        input_format = InputFormat(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        models.append(
            LoadedModel(
                name="x", architecture="x", kind="checkpoint", backbone=backbone, input_format=input_format
            )
        )
    two, four, same = models
    assert two.digest == four.digest == same.digest
    assert two.forward_digest != four.forward_digest == same.forward_digest
