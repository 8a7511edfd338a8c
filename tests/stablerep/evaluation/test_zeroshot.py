"""Zero-shot classification against a naive loop and torchmetrics; prompts against what CLIP published."""

import sys
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from stablerep.evaluation import zeroshot
from stablerep.evaluation.prompts import PLAIN_TEMPLATES, fill_templates, read_templates
from stablerep.evaluation.statistics import wilson_interval
from stablerep.evaluation.zeroshot import embed_classes, zero_shot_classify


def encode(texts: Sequence[str]) -> Tensor:
    """A fixed random vector a text, of any length."""
    rows = [np.random.default_rng(zlib.crc32(text.encode())).normal(1, 3, 6) for text in texts]
    return torch.from_numpy(np.stack(rows))


def draw(num_images: int, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(num_classes, 8, generator=generator)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    return classes[labels] + torch.randn(num_images, 8, generator=generator), classes, labels


def test_openais_templates_are_eighty_and_seven_of_them() -> None:
    pytest.importorskip("open_clip")
    eighty, seven = read_templates("openai_80"), read_templates("openai_7")
    assert (len(eighty), len(set(eighty)), len(seven)) == (80, 80, 7)
    assert set(seven) < set(eighty)
    assert seven == (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    )


def test_templates_without_open_clip_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"openai_80 need open_clip.*pip install 'stablerep\[text\]'"):
        read_templates("openai_80")
    assert read_templates("plain") == ("a photo of a {}.",)


def test_underscores_of_class_names_become_spaces() -> None:
    assert fill_templates(["a {}.", "the {}!"], "apple_pie") == ["a apple pie.", "the apple pie!"]
    assert fill_templates(["a {}."], "{odd} {0}") == ["a {odd} {0}."]


def test_class_embeddings_are_normalised_means_of_normalised_prompts() -> None:
    names, templates = ["red_fox", "owl", "newt"], ["a {}.", "the {}.", "art of a {}."]
    expected = []
    for name in names:
        rows = [encode([t.replace("{}", name.replace("_", " "))])[0].numpy() for t in templates]
        mean = np.mean([row / np.linalg.norm(row) for row in rows], axis=0)
        expected.append(mean / np.linalg.norm(mean))
    for size in (1, 4, 100):
        embeddings = embed_classes(encode, names, templates, num_texts_per_batch=size)
        np.testing.assert_allclose(embeddings.numpy(), np.stack(expected), atol=1e-12)


def test_imagenets_published_names_are_taken_though_two_pairs_are_alike() -> None:
    open_clip = pytest.importorskip("open_clip")
    names = list(open_clip.IMAGENET_CLASSNAMES)
    assert len(names) - len(set(names)) == 2
    embeddings = embed_classes(encode, names, PLAIN_TEMPLATES)
    assert torch.equal(embeddings[names.index("missile")], embeddings[744])
    with pytest.raises(ValueError, match="class names must differ as words, got 'tench' twice"):
        embed_classes(encode, [*names, names[0]], PLAIN_TEMPLATES)


def test_accuracies_equal_torchmetrics() -> None:
    images, classes, labels = draw(500, 12)
    result = zero_shot_classify(5 * images, classes, labels)
    scores = torch.nn.functional.cosine_similarity(images[:, None], classes[None], dim=2)
    top1, top5 = (
        float(multiclass_accuracy(scores, labels, num_classes=12, average="micro", top_k=k)) for k in (1, 5)
    )
    assert 0.3 < top1 < top5 < 1
    assert (result.top1, result.top5) == pytest.approx((top1, top5))
    assert torch.equal(result.predictions, scores.argmax(dim=1))
    assert result.top1_interval == wilson_interval(round(500 * top1), 500)
    assert result.top5_interval == wilson_interval(int(result.in_top5.sum()), 500)


def test_slices_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    images, classes, labels = draw(50, 7)
    whole = zero_shot_classify(images, classes, labels)
    monkeypatch.setattr(zeroshot, "MAX_SCORES_IN_MEMORY", 21)
    sliced = zero_shot_classify(images, classes, labels)
    assert torch.equal(sliced.predictions, whole.predictions)
    assert torch.equal(sliced.in_top5, whole.in_top5)


def test_equal_scores_go_to_the_first_class_in_both_figures() -> None:
    images, classes = torch.ones(10, 4), torch.ones(10, 4)
    result = zero_shot_classify(images, classes, torch.arange(10))
    assert (result.top1, result.top5) == (0.1, 0.5)
    assert result.predictions.tolist() == [0] * 10
    assert result.in_top5.tolist() == [True] * 5 + [False] * 5


def test_top5_of_five_classes_is_not_given() -> None:
    images, classes, labels = draw(20, 5)
    result = zero_shot_classify(images, classes, labels)
    assert result.top5 is None
    assert result.top5_interval is None


def test_arguments_out_of_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="class names must differ as words, got 'red fox' twice"):
        embed_classes(encode, ["red_fox", "owl", "red fox"], PLAIN_TEMPLATES)
    with pytest.raises(ValueError, match="a template must hold {} once, got 'a {} {}'"):
        embed_classes(encode, ["owl"], ["a {} {}"])
    with pytest.raises(ValueError, match="a class name must hold a word, got '_'"):
        embed_classes(encode, ["_"], PLAIN_TEMPLATES)
    with pytest.raises(ValueError, match="class_names must be >= 1, got 0"):
        embed_classes(encode, [], PLAIN_TEMPLATES)
    with pytest.raises(ValueError, match="templates must be >= 1, got 0"):
        embed_classes(encode, ["owl"], [])
    with pytest.raises(ValueError, match="text embeddings must be finite and other than zero"):
        embed_classes(lambda texts: torch.zeros(len(texts), 4), ["owl"], PLAIN_TEMPLATES)
    with pytest.raises(ValueError, match=r"text embeddings must be \[1, E\], got \[2, 4\]"):
        embed_classes(lambda texts: torch.ones(2, 4), ["owl"], PLAIN_TEMPLATES)
    with pytest.raises(ValueError, match="templates must be openai_80, openai_7 or plain, got clip"):
        read_templates("clip")  # type: ignore[arg-type]  # what a config file may say
    images, classes, labels = draw(20, 7)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\)"):
        zero_shot_classify(images, classes[:5], labels)
    with pytest.raises(ValueError, match=r"\[N, E\] and \[C, E\], got \[20, 8\] and \[7, 7\]"):
        zero_shot_classify(images, classes[:, 1:], labels)
    images[3, 3] = torch.nan
    with pytest.raises(ValueError, match="image embeddings must be finite"):
        zero_shot_classify(images, classes, labels)
