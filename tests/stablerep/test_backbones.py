from pathlib import Path

import pytest
import torch
from torch import nn

from stablerep.backbones import (
    ProjectionHead,
    add_backbone_to_checkpoint,
    build_backbone,
    load_backbone,
)

TINY = {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}


def save_checkpoint(path: Path, backbone: nn.Module) -> None:
    checkpoint = {"state_dict": {f"backbone.{key}": value for key, value in backbone.state_dict().items()}}
    add_backbone_to_checkpoint(checkpoint, backbone)
    torch.save(checkpoint, path)


def test_features_are_the_class_token_after_the_final_norm() -> None:
    backbone = build_backbone("vit_tiny_patch16_224", 16, TINY).eval()
    images = torch.randn(2, 3, 16, 16)
    tokens = backbone.forward_features(images)  # type: ignore[operator]
    assert tokens.shape == (2, 1 + 4, 16)
    torch.testing.assert_close(backbone(images), tokens[:, 0])
    torch.testing.assert_close(backbone(images).mean(dim=1), torch.zeros(2), atol=1e-5, rtol=0)  # normed


def test_checkpoint_gives_back_the_same_features(tmp_path: Path) -> None:
    backbone = build_backbone("vit_tiny_patch16_224", 16, TINY).eval()
    save_checkpoint(tmp_path / "a.ckpt", backbone)
    loaded = load_backbone(tmp_path / "a.ckpt")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), backbone(images))
    assert (loaded.image_size, loaded.num_features, loaded.architecture) == (16, 16, "vit_tiny_patch16_224")
    assert len(loaded.mean) == len(loaded.std) == 3  # type: ignore[arg-type]
    assert not loaded.training


def test_random_init_is_the_same_architecture_with_other_weights(tmp_path: Path) -> None:
    backbone = build_backbone("vit_tiny_patch16_224", 16, TINY)
    save_checkpoint(tmp_path / "a.ckpt", backbone)
    fresh = load_backbone(tmp_path / "a.ckpt", random_init=True)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {
        k: v.shape for k, v in backbone.state_dict().items()
    }
    assert not torch.equal(fresh.blocks[0].attn.qkv.weight, backbone.blocks[0].attn.qkv.weight)  # type: ignore


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt is of another model"):
        load_backbone(tmp_path / "other.ckpt")


def test_checkpoint_with_other_weights_is_refused(tmp_path: Path) -> None:
    backbone = build_backbone("vit_tiny_patch16_224", 16, TINY)
    wide = build_backbone("vit_tiny_patch16_224", 16, TINY | {"embed_dim": 32})
    save_checkpoint(tmp_path / "a.ckpt", wide)
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    add_backbone_to_checkpoint(checkpoint, backbone)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"^checkpoint [^\n]*a\.ckpt does not fit its architecture: [^\n]*$"):
        load_backbone(tmp_path / "a.ckpt")


def test_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "stablerep_backbone": Path("x")}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match=r"code\.ckpt is not readable"):
        load_backbone(tmp_path / "code.ckpt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"])
def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "torn.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"torn\.ckpt is not readable"):
        load_backbone(tmp_path / "torn.ckpt")


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt does not exist"):
        load_backbone(tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "vit_tiny_patch16_22",
            {},
            "'vit_tiny_patch16_22' is not known to timm; did you mean vit_tiny_patch16_224",
        ),
        ("resnet18", {}, "backbone resnet18 "),
        ("vit_tiny_patch16_224", {"depht": 3}, "backbone vit_tiny_patch16_224 refuses .*depht"),
        ("vit_tiny_patch16_224", {"num_heads": 5}, "backbone vit_tiny_patch16_224 refuses"),
        ("vit_tiny_patch16_224", {"img_size": 32}, "backbone_options must not hold img_size"),
        ("vit_base_patch16_clip_224", {"global_pool": "avg"}, "does not pool a class token"),
    ],
)
def test_unusable_backbone_is_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(name, 16, TINY | options if name.startswith("vit") else options)


def test_batchnorm_statistics_are_per_view() -> None:
    head = ProjectionHead(4, 8, 3)
    features = torch.stack(
        [torch.randn(10, 4), 5 + 3 * torch.randn(10, 4)], dim=1
    )  # views differ in distribution
    together = head(features)
    for view in range(2):
        torch.testing.assert_close(together[:, view], head(features[:, view]))
    all_views = head(features.flatten(0, 1)).unflatten(0, (10, 2))
    assert (together - all_views).abs().max() > 0.05


def test_batchnorm_over_all_views_is_that_of_one_batch() -> None:
    head = ProjectionHead(4, 8, 3, norm="batchnorm_all_views")
    features = torch.randn(10, 2, 4)
    torch.testing.assert_close(head(features), head(features.flatten(0, 1)).unflatten(0, (10, 2)))


def test_layernorm_makes_embeddings_independent_of_the_batch() -> None:
    head = ProjectionHead(4, 8, 3, norm="layernorm")
    features = torch.randn(10, 2, 4)
    torch.testing.assert_close(head(features)[3:5], head(features[3:5]))


@pytest.mark.parametrize(
    ("name", "depth", "width"),
    [
        ("vit_small_patch16_224", 12, 384),
        ("vit_base_patch16_224", 12, 768),
        ("vit_large_patch16_224", 24, 1024),
    ],
)
def test_published_backbones_have_their_depth_and_width(name: str, depth: int, width: int) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name, 224)
    assert (len(backbone.blocks), backbone.num_features) == (depth, width)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_siglip_224", "vit_base_patch16_gap_224", "swin_tiny_patch4_window7_224"]
)
def test_backbone_without_a_class_token_is_refused(name: str) -> None:
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=f"backbone {name} does not pool a class token"),
    ):
        build_backbone(name, 224)
