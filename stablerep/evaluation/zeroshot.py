"""Zero-shot classification: images against the text embeddings of class names.

With the prompts t of class c (`stablerep.evaluation.prompts`) and unit embeddings of texts and images,

    w_c = normalise(mean_t text(t)),        score(x, c) = image(x) · w_c,        prediction = argmax_c score.

Reference: Radford et al., CLIP, arXiv 2103.00020, section 3.1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stablerep.evaluation.inputs import check_labels, normalize_embeddings
from stablerep.evaluation.prompts import class_name_to_words, fill_templates, read_imagenet_class_names
from stablerep.evaluation.statistics import wilson_interval

MAX_SCORES_IN_MEMORY = 2**24  # 64 MiB of float32 scores at a time, a few times over


class ZeroShotResult(NamedTuple):
    """What `zero_shot_classify` returns; fractions, with Wilson's 95 % intervals.

    Attributes:
        top1: Share of images whose class has the highest score.
        top1_interval: Its interval.
        top5: Share of images whose class is among the five highest; None with five classes or fewer, where it
            would be 1 whatever the scores.
        top5_interval: Its interval.
        predictions: Class of the highest score, int64 [N].
        in_top5: Whether the class is among the five highest, bool [N].
    """

    top1: float
    top1_interval: tuple[float, float]
    top5: float | None
    top5_interval: tuple[float, float] | None
    predictions: Tensor
    in_top5: Tensor


def embed_classes(
    encode_texts: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    num_texts_per_batch: int = 256,
) -> Tensor:
    """Each class's normalised mean of its normalised prompt embeddings, in float32 (float64 stays).

    Args:
        encode_texts: Texts to embeddings [num_texts, E]; they need not be normalised.
        class_names: Names as the folders have them; underscores become spaces.
        templates: Prompts with one `{}` each.
        num_texts_per_batch: Texts handed over at a time, at least 1.

    Shapes:
        -> [C, E]

    Raises:
        ValueError: If there is no class, two classes have one name, a template is not of its form, or the
            embeddings are not [num_texts, E], finite and other than zero.
    """
    check_class_names(class_names)
    if num_texts_per_batch < 1:
        raise ValueError(f"num_texts_per_batch must be >= 1, got {num_texts_per_batch}")
    prompts = [prompt for name in class_names for prompt in fill_templates(templates, name)]
    embeddings = []
    for start in range(0, len(prompts), num_texts_per_batch):
        texts = prompts[start : start + num_texts_per_batch]
        encoded = encode_texts(texts)
        if encoded.ndim != 2 or len(encoded) != len(texts):
            raise ValueError(f"text embeddings must be [{len(texts)}, E], got {list(encoded.shape)}")
        embeddings.append(normalize_embeddings("text embeddings", encoded))
    means = torch.cat(embeddings).unflatten(0, (len(class_names), len(templates))).mean(dim=1)
    return normalize_embeddings("mean text embeddings", means)


def check_class_names(class_names: Sequence[str]) -> None:
    """Refuses names that prompts cannot tell apart; to be called before the work, too.

    The list of ImageNet's names that figures are published with calls two pairs of classes alike, "missile"
    and "sunglasses": it is taken as it is, and of equal scores the class with the lower index comes first.

    Raises:
        ValueError: If there is none, or two are the same words.
    """
    if not class_names:
        raise ValueError("class_names must be >= 1, got 0")
    words = [class_name_to_words(name) for name in class_names]
    if len(set(words)) < len(words) and tuple(class_names) != read_imagenet_class_names():
        twice = next(name for name in words if words.count(name) > 1)
        raise ValueError(f"class names must differ as words, got {twice!r} twice")


def zero_shot_classify(image_embeddings: Tensor, class_embeddings: Tensor, labels: Tensor) -> ZeroShotResult:
    """Top-1 and top-5 accuracy of the class embeddings on the images, taken in slices.

    Of equal scores the class with the lower index comes first, in both figures.

    Args:
        image_embeddings: Embeddings in the joint space; they need not be normalised.
        class_embeddings: What `embed_classes` returns.
        labels: Class indices of the images, in [0, C).

    Shapes:
        image_embeddings [N, E], class_embeddings [C, E], labels [N], on one device.

    Raises:
        ValueError: If the shapes do not match, there is no image, a label is out of its bounds, or an
            embedding is zero or not finite.
    """
    _check_shapes(image_embeddings, class_embeddings, labels)
    classes = normalize_embeddings("class embeddings", class_embeddings)
    ranks, predictions = [], []
    size = max(1, MAX_SCORES_IN_MEMORY // len(classes))
    for images, own in zip(image_embeddings.split(size), labels.long().split(size), strict=True):
        unit = normalize_embeddings("image embeddings", images)
        scores = unit @ classes.to(unit).T  # [N', C]
        own_scores = scores.gather(1, own[:, None])
        before = torch.arange(len(classes), device=scores.device) < own[:, None]
        ranks.append(((scores > own_scores) | ((scores == own_scores) & before)).sum(dim=1))
        predictions.append(scores.argmax(dim=1))
    rank = torch.cat(ranks)
    in_top5 = rank < 5
    num_images, num_top1, num_top5 = len(rank), int((rank == 0).sum()), int(in_top5.sum())
    has_top5 = len(classes) > 5
    return ZeroShotResult(
        top1=num_top1 / num_images,
        top1_interval=wilson_interval(num_top1, num_images),
        top5=num_top5 / num_images if has_top5 else None,
        top5_interval=wilson_interval(num_top5, num_images) if has_top5 else None,
        predictions=torch.cat(predictions),
        in_top5=in_top5,
    )


def _check_shapes(images: Tensor, classes: Tensor, labels: Tensor) -> None:
    if images.ndim != 2 or classes.ndim != 2 or images.shape[1] != classes.shape[1]:
        raise ValueError(
            "image_embeddings and class_embeddings must be [N, E] and [C, E], got "
            f"{list(images.shape)} and {list(classes.shape)}"
        )
    if len(images) == 0:
        raise ValueError("image_embeddings must be >= 1, got 0")
    check_labels("labels", labels, len(images), len(classes))
