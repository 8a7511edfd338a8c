"""Image–text retrieval: R@k both ways over the whole set.

    R@k = share of queries with a positive among the k candidates of the highest cosine similarity.

With b the similarity of a query's best positive,

    rank = 1 + number of negatives with similarity >= b,        a hit at k is rank <= k.

A negative as similar as the best positive counts against the model, so embeddings that have collapsed to a
point find nothing. Further positives of a query never push its best one back. A text occurs once among the
candidates however many images it describes, and all its images are its positives (`pair_captions`).

Reference: Karpathy and Fei-Fei, arXiv 1412.2306, for R@k both ways; Radford et al., CLIP, arXiv
2103.00020, for its zero-shot use.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stablerep.evaluation.inputs import normalize_embeddings
from stablerep.evaluation.statistics import wilson_interval

MAX_SIMILARITIES_IN_MEMORY = 2**24  # 64 MiB of float32 similarities at a time, a few times over


class Recall(NamedTuple):
    """R@k of one direction.

    Attributes:
        k: Candidates that are looked at.
        value: Share of queries with a positive among them.
        interval: Wilson's 95 % interval. It takes queries as independent, which images of one caption are not
            quite.
        num_queries: Queries.
    """

    k: int
    value: float
    interval: tuple[float, float]
    num_queries: int


class RetrievalResult(NamedTuple):
    """What `retrieval_recall` returns.

    Attributes:
        image_to_text: R@k of images as queries, one for each k.
        text_to_image: R@k of texts as queries.
        image_ranks: Rank of each image's best text, from 1, int64 [N].
        text_ranks: Rank of each text's best image, from 1, int64 [M].
    """

    image_to_text: tuple[Recall, ...]
    text_to_image: tuple[Recall, ...]
    image_ranks: Tensor
    text_ranks: Tensor


def pair_captions(captions: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """The distinct texts, in the order in which they first occur, and which image has which.

    Args:
        captions: The captions of each image; equal ones, of one image or of several, become one text.

    Shapes:
        -> the texts, and int64 [P, 2] pairs (image, text).

    Raises:
        ValueError: If an image has no caption.
    """
    index_of_text: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    for image, own in enumerate(captions):
        if not own:
            raise ValueError(f"captions of each image must be >= 1, got 0 of image {image}")
        indices = [index_of_text.setdefault(text, len(index_of_text)) for text in own]
        pairs += [(image, text) for text in dict.fromkeys(indices)]
    return list(index_of_text), torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def retrieval_recall(
    image_embeddings: Tensor, text_embeddings: Tensor, pairs: Tensor, *, ks: Sequence[int] = (1, 5, 10)
) -> RetrievalResult:
    """R@k both ways, by cosine similarity in float32 (float64 if both are); queries are taken in slices.

    Args:
        image_embeddings: Embeddings of the images; they need not be normalised.
        text_embeddings: Embeddings of the distinct texts.
        pairs: Which image has which text, (image, text); an image may have several texts and the reverse.
        ks: Each k, in [1, number of candidates] both ways.

    Shapes:
        image_embeddings [N, E], text_embeddings [M, E], pairs [P, 2], on one device.

    Raises:
        ValueError: If shapes do not match, an index or a k is out of its bounds, an image or a text has no
            partner, or an embedding is zero or not finite.
    """
    _check_arguments(image_embeddings, text_embeddings, pairs, ks)
    both = (image_embeddings.dtype, text_embeddings.dtype)
    dtype = torch.float64 if both == (torch.float64, torch.float64) else torch.float32
    images = normalize_embeddings("image embeddings", image_embeddings.to(dtype))
    texts = normalize_embeddings("text embeddings", text_embeddings.to(dtype))
    pairs = pairs.long().to(images.device)
    image_ranks = _rank_best_positives(images, texts, pairs)
    text_ranks = _rank_best_positives(texts, images, pairs.flip(1))
    return RetrievalResult(
        image_to_text=tuple(_recall(image_ranks, k) for k in ks),
        text_to_image=tuple(_recall(text_ranks, k) for k in ks),
        image_ranks=image_ranks,
        text_ranks=text_ranks,
    )


def _rank_best_positives(queries: Tensor, candidates: Tensor, pairs: Tensor) -> Tensor:
    query, order = pairs[:, 0].sort()
    positive = pairs[order, 1]
    size = max(1, MAX_SIMILARITIES_IN_MEMORY // len(candidates))
    ranks = []
    for start in range(0, len(queries), size):
        similarities = queries[start : start + size] @ candidates.T  # [Q', candidates]
        bounds = torch.tensor([start, start + len(similarities)], device=query.device)
        low, high = torch.searchsorted(query, bounds).tolist()
        rows, columns = query[low:high] - start, positive[low:high]
        best = similarities.new_full((len(similarities),), -torch.inf)
        best.scatter_reduce_(0, rows, similarities[rows, columns], "amax")
        similarities[rows, columns] = -torch.inf  # other positives are no rivals
        ranks.append(1 + (similarities >= best[:, None]).sum(dim=1))
    return torch.cat(ranks)


def _recall(ranks: Tensor, k: int) -> Recall:
    hits = int((ranks <= k).sum())
    return Recall(k, hits / len(ranks), wilson_interval(hits, len(ranks)), len(ranks))


def _check_arguments(images: Tensor, texts: Tensor, pairs: Tensor, ks: Sequence[int]) -> None:
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(
            "image_embeddings and text_embeddings must be [N, E] and [M, E], got "
            f"{list(images.shape)} and {list(texts.shape)}"
        )
    if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) == 0:
        raise ValueError(f"pairs must be [P, 2] with P >= 1, got {list(pairs.shape)}")
    for name, column, count in (("image", pairs[:, 0], len(images)), ("text", pairs[:, 1], len(texts))):
        if int(column.min()) < 0 or int(column.max()) >= count:
            raise ValueError(
                f"{name} indices of pairs must be in [0, {count}), got {int(column.min())} to "
                f"{int(column.max())}"
            )
        if num_alone := int((column.long().bincount(minlength=count) == 0).sum()):
            raise ValueError(f"each {name} must occur in pairs, got {num_alone} of {count} that do not")
    most = min(len(images), len(texts))
    if not ks or min(ks) < 1 or max(ks) > most:
        raise ValueError(f"ks must be in [1, {most}] (the number of candidates), got {list(ks)}")
