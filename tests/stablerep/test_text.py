import math
import sys
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from stablerep.optimizer import split_by_decay
from stablerep.text import ImageTextHead, TextConfig, Tokenizer, build_text_tower

SMALL: dict[str, Any] = {
    "out_features": 6,
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
    "context_length": 10,
}


def test_defaults_are_open_clips_published_text_config() -> None:
    config, ours = open_clip.get_model_config("ViT-B-16-quickgelu"), TextConfig()
    assert config["text_cfg"] == {
        "context_length": ours.context_length,
        "vocab_size": 49408,
        "width": ours.width,
        "heads": ours.num_heads,
        "layers": ours.num_layers,
    }
    assert (config["embed_dim"], config["quick_gelu"]) == (ours.out_features, ours.quick_gelu)


def test_tower_computes_what_open_clips_model_does_with_its_weights() -> None:
    config = TextConfig(**SMALL)
    tower = build_text_tower(config).eval()
    vision = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
    text = {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    model = open_clip.CLIP(6, vision, text, quick_gelu=True).eval()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("visual.")}
    del state["logit_scale"]
    tower.load_state_dict(state)
    tokens = Tokenizer(10)(["a red cube", "two dogs on a sofa in the rain, seen from above, at night"])
    torch.testing.assert_close(tower(tokens), model.encode_text(tokens))


def test_tower_is_causal_and_pooled_at_the_end_of_the_text() -> None:
    tower = build_text_tower(TextConfig(**SMALL)).eval()
    tokens = Tokenizer(10)(["a red cube"])
    padded = tokens.clone()
    padded[0, 6:] = 5  # behind the end
    assert int(tokens[0].argmax()) == 4
    torch.testing.assert_close(tower(tokens), tower(padded))


def test_tokens_are_open_clips() -> None:
    captions = ["a red cube", "Zwölf Boxkämpfer &amp; ein Hund 🐶", "word " * 100]
    tokens = Tokenizer(77)(captions)
    assert torch.equal(tokens, open_clip.get_tokenizer("ViT-B-16-quickgelu")(captions))
    assert tokens[2, -1] == tokens.max()  # a long caption ends as every other


def test_initial_scale_is_the_published_one_and_is_kept_in_its_bounds() -> None:
    head = ImageTextHead(8, TextConfig(**SMALL))
    assert head.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    for value, expected in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        with torch.no_grad():
            head.logit_scale.fill_(value)
        head.clamp_logit_scale()
        assert head.logit_scale.item() == pytest.approx(expected)


def test_scale_and_norms_alone_are_not_decayed() -> None:
    parts = nn.ModuleList([build_text_tower(TextConfig(**SMALL)), ImageTextHead(8, TextConfig(**SMALL))])
    names = {id(parameter): name for name, parameter in parts.named_parameters()}
    _, others = split_by_decay(parts.parameters())
    expected = {
        n for n, p in parts.named_parameters() if n.endswith("bias") or ".ln_" in n or "logit_scale" in n
    }
    assert {names[id(p)] for p in others} == expected


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_sides_meet_in_a_space_of_one_width(projection: Any) -> None:
    config = TextConfig(**SMALL, projection=projection, hidden_features=12)
    tower, head = build_text_tower(config), ImageTextHead(8, config)
    features = torch.randn(3, 2, 8)
    result = head(features, tower(Tokenizer(10)(["a", "b", "c"])), torch.arange(3))
    assert result.images.shape == (6, 6)
    assert torch.isfinite(result.loss.loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_weight": 0.0}, r"text.loss_weight must be > 0 \(leave text out instead\), got 0.0"),
        ({"num_layers": 0}, "text.num_layers must be >= 1, got 0"),
        ({"context_length": 2}, "text.context_length must be >= 3, start, end and a word, got 2"),
        ({"num_heads": 5}, "text.width must be a multiple of num_heads 5, got 512"),
    ],
)
def test_impossible_tower_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig(**options)


def test_missing_open_clip_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"model.text needs open_clip, .*pip install 'stablerep\[text\]'"):
        build_text_tower(TextConfig(**SMALL))
