"""The multi-positive contrastive loss of StableRep (Tian et al., NeurIPS 2023, arXiv 2306.00984, section 3).

For anchor i with normalised embedding z_i, s_ij = z_i·z_j / τ, and P(i) the other images of i's caption,

    q_ij = exp(s_ij) / Σ_{k≠i} exp(s_ik)         the contrastive distribution
    p_ij = [j ∈ P(i)] / |P(i)|                   the ground truth: uniform over the caption's other images
    loss_i = H(p_i, q_i) = l_i − z_i·Z_i / (|P(i)| τ),    l_i = log Σ_{k≠i} exp(s_ik),  Z_i = Σ_{p∈P(i)} z_p

Z_i is the sum over i's caption less z_i, so no N×N mask is needed; and as s_ij = s_ji, the gradient of the
mean over the A anchors that have a positive (m_i = 1, for the others 0) is

    ∂L/∂z_i = 1/(A τ) · [ Σ_{j≠i} (m_i e^{s_ij − l_i} + m_j e^{s_ij − l_j}) z_j  −  2 m_i Z_i / |P(i)| ]

Each rank has the whole gradient of its own rows once it knows every z and every l: what is gathered is N·D
and N numbers, nothing in the backward. `stablerep.blockwise` computes the sums without an N×N matrix.

    paper   here            meaning
    τ       temperature
    N       num_images      images in the step, over all ranks
    m       -               images of a caption; may differ from caption to caption
    z       embeddings      output of the projection head

StableRep+ adds half of (images → texts plus texts → images), where s_ij = scale · image_i·text_j, the
positives of an image are the texts of its caption, and those of a text all images of its caption.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stablerep.blockwise import (
    MAX_UNSHIFTED,
    log_sum_exp_by_rows,
    multiply_exponentials,
    multiply_softmax_by_rows,
    sum_exponentials,
)
from stablerep.distributed import all_gather_rows, gather_sizes, is_distributed, rank, world_size

_SMALLEST_NORM = 1e-6


class ContrastiveLoss(NamedTuple):
    """What a loss returns.

    Attributes:
        loss: Scalar; the mean over ranks is the loss of the whole step.
        num_anchors_without_positive: Anchors of this rank that the mean leaves out, as nothing in the step
            shares their caption.
    """

    loss: Tensor
    num_anchors_without_positive: Tensor


class Queue(NamedTuple):
    """Embeddings of earlier steps, the same on every rank: columns that are compared with, but no anchors.

    Shapes:
        embeddings [Q, D], normalised; labels [Q]
    """

    embeddings: Tensor
    labels: Tensor


def normalize_embeddings(embeddings: Tensor) -> Tensor:
    """x / ‖x‖ in float32 (float64 stays); a zero vector stays zero and gets a zero gradient.

    Shapes:
        [..., D] -> [..., D]
    """
    normalized: Tensor = _Normalize.apply(
        embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    )
    return normalized


class _Normalize(torch.autograd.Function):
    """∂L/∂x = (g − z (z·g)) / ‖x‖; keeps z, where autograd would keep x and what lies between as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.reciprocal().masked_fill_(norm <= _SMALLEST_NORM, 0.0)
        z = x * inverse
        ctx.save_for_backward(z, inverse)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        z, inverse = ctx.saved_tensors
        along = (z * gradient).sum(dim=-1, keepdim=True)
        return torch.addcmul(gradient, z, along, value=-1).mul_(inverse)


def multi_positive_contrastive_loss(
    embeddings: Tensor, labels: Tensor, temperature: float = 0.1, queue: Queue | None = None
) -> ContrastiveLoss:
    """mean_i [ logsumexp_{j≠i} s_ij − mean_{p∈P(i)} s_ip ], s = z zᵀ / temperature.

    Each rank holds its own rows against the columns of all ranks. A rank returns
    world_size · Σ_local loss_i / (number of anchors with a positive, over all ranks): the mean over ranks is
    the single-process loss, and the gradient that DDP averages is the single-process gradient, also when
    ranks hold unequal numbers of images. With two views per label this is NT-Xent.

    Args:
        embeddings: Output of the projection head for this rank's images, not normalised, any float dtype;
            the loss is computed in float32 (float64 for float64) inside any autocast.
        labels: Integer label of each image; equal labels are positives, wherever in the step they stand.
        temperature: τ, above 0.
        queue: Earlier embeddings as further columns; those with an anchor's label are its positives too.

    Shapes:
        embeddings [N_local, D], labels [N_local] -> scalar

    Returns:
        The loss and the number of this rank's anchors without a positive, which the mean leaves out.

    Raises:
        ValueError: If temperature is not above 0 or the shapes do not match.

    Reference:
        Tian et al., StableRep, arXiv 2306.00984, section 3.2, equations 1 to 3.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    _check_shapes("embeddings", embeddings, "labels", labels)
    with torch.autocast(embeddings.device.type, enabled=False):
        z = normalize_embeddings(embeddings)  # [N_local, D]
        with torch.no_grad():
            step = _gather_step(z, labels, temperature, queue)
        loss: Tensor = _MultiPositiveLoss.apply(z, step)
    return ContrastiveLoss(loss, (~step.has_positive[step.own]).sum())


@dataclass(frozen=True)
class _Step:
    """What every rank knows of a step; the first N columns are its anchors, the rest is the queue.

    Attributes:
        columns: z of all ranks, then of the queue.
        sizes: How many of them each rank has.
        own: The columns of this rank's rows.
        caption: Index of each anchor's caption among the step's captions.
        caption_sum: Sum of the columns of each caption.
        anchor_sum: Likewise, of the anchors alone.
        num_positives: |P(i)| of each anchor.
        has_positive: m of each anchor.
        temperature: τ.

    Shapes:
        columns [N + Q, D], caption [N], caption_sum [C, D], anchor_sum [C, D], num_positives [N],
        has_positive [N]
    """

    columns: Tensor
    sizes: list[int]
    own: slice
    caption: Tensor
    caption_sum: Tensor
    anchor_sum: Tensor
    num_positives: Tensor
    has_positive: Tensor
    temperature: float

    @property
    def weights(self) -> Tensor:
        """m / A of each anchor, [N]."""
        return self.has_positive.to(self.columns.dtype) / self.has_positive.sum().clamp(min=1)

    @property
    def is_whole(self) -> bool:
        """Whether this rank's rows are all the columns, and the exponentials need no maximum taken off."""
        num_rows = self.own.stop - self.own.start
        return num_rows == len(self.columns) and 1 / self.temperature <= MAX_UNSHIFTED


def _gather_step(z: Tensor, labels: Tensor, temperature: float, queue: Queue | None) -> _Step:
    sizes = gather_sizes(len(z), z.device)
    columns, all_labels = all_gather_rows(z, sizes), all_gather_rows(labels, sizes)
    num_anchors = len(columns)
    if queue is not None:
        columns = torch.cat([columns, queue.embeddings.to(columns.dtype)])
        all_labels = torch.cat([all_labels, queue.labels])
    caption, caption_size = number_labels(all_labels)
    anchors = caption[:num_anchors]
    num_positives = caption_size[anchors] - 1
    caption_sum = _sum_by(caption, columns, len(caption_size))
    return _Step(
        columns=columns,
        sizes=sizes,
        own=_own_slice(sizes),
        caption=anchors,
        caption_sum=caption_sum,
        anchor_sum=caption_sum
        if queue is None
        else _sum_by(anchors, columns[:num_anchors], len(caption_size)),
        num_positives=num_positives,
        has_positive=num_positives > 0,
        temperature=temperature,
    )


class _MultiPositiveLoss(torch.autograd.Function):
    """Σ over this rank's anchors, times world_size / A; backward: the closed form of this module's head."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, step: _Step) -> Tensor:
        own, temperature = step.own, step.temperature
        if step.is_whole:
            logs = sum_exponentials(z, None, 1 / temperature)[0].log()
        else:
            logs = log_sum_exp_by_rows(z, step.columns, 1 / temperature, own=own.start)
        positives = step.caption_sum[step.caption[own]].sub_(z)  # Z
        mean = positives.mul_(z).sum(dim=1) / step.num_positives[own].clamp(min=1) / temperature
        ctx.step, ctx.all_logs = step, all_gather_rows(logs, step.sizes)
        ctx.save_for_backward(z)
        has_positive = step.has_positive[own]  # a lonely anchor without any other column has l = −∞
        losses = torch.where(has_positive, logs - mean, 0.0)
        return (losses * step.weights[own]).sum() * world_size()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (z,), step, logs = ctx.saved_tensors, ctx.step, ctx.all_logs
        own, temperature, weights = step.own, step.temperature, step.weights
        if step.is_whole:
            factors = torch.where(step.has_positive, weights * torch.exp(-logs), 0.0)
            attraction = multiply_exponentials(z, None, 1 / temperature, factors, factors)[0]
        else:
            num_queued = len(step.columns) - len(logs)
            logs = torch.where(step.has_positive, logs, 0.0)
            attraction = multiply_softmax_by_rows(
                z,
                step.columns,
                1 / temperature,
                logs[own],
                torch.cat([logs, logs.new_zeros(num_queued)]),
                weights[own],
                torch.cat([weights, weights.new_zeros(num_queued)]),
                own=own.start,
            )
        captions = step.caption[own]
        positives = (step.caption_sum + step.anchor_sum)[captions].sub_(z, alpha=2)
        positives *= (weights[own] / step.num_positives[own].clamp(min=1))[:, None]
        attraction -= positives
        attraction *= gradient * world_size() / temperature
        return attraction, None


def image_text_contrastive_loss(
    images: Tensor, texts: Tensor, image_labels: Tensor, text_labels: Tensor, scale: Tensor
) -> ContrastiveLoss:
    """½ · mean over images of H(uniform over the caption's texts, softmax over all texts) + ½ · the converse.

    With one image and one text a caption this is CLIP's loss. As for `multi_positive_contrastive_loss`, the
    mean over ranks is the single-process loss, and so is the gradient that DDP averages, that of `scale` too.

    Args:
        images: Projected features of this rank's images, not normalised, any float dtype.
        texts: Projected features of this rank's texts.
        image_labels: Integer label of each image: its caption.
        text_labels: Integer label of each text.
        scale: Inverse temperature, a scalar above 0; its gradient is computed too.

    Shapes:
        images [N_local, D], texts [M_local, D], image_labels [N_local], text_labels [M_local], scale []
            -> scalar

    Returns:
        The loss and the number of this rank's images and texts whose caption the other side lacks.

    Raises:
        ValueError: If the shapes do not match.

    Reference:
        Tian et al., StableRep, arXiv 2306.00984, section 3.3; Radford et al., CLIP, arXiv 2103.00020.
    """
    _check_shapes("images", images, "image_labels", image_labels)
    _check_shapes("texts", texts, "text_labels", text_labels)
    if images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"images and texts must have one width, got {list(images.shape)} and {list(texts.shape)}"
        )
    with torch.autocast(images.device.type, enabled=False):
        a, b = normalize_embeddings(images), normalize_embeddings(texts)
        with torch.no_grad():
            step = _gather_pairs(a, b, image_labels, text_labels)
        loss: Tensor = _ImageTextLoss.apply(a, b, scale.to(a.dtype), step)
    lonely = [(~side.has_positive[side.own]).sum() for side in step]
    return ContrastiveLoss(loss, lonely[0] + lonely[1])


@dataclass(frozen=True)
class _Side:
    """The images or the texts of a step, of all ranks.

    Attributes:
        columns: Normalised features.
        sizes: How many of them each rank has.
        own: This rank's.
        caption: Index of each one's caption.
        caption_sum: Sum of this side's columns of each caption.
        num_positives: How many of the other side each one has.

    Shapes:
        columns [N, D], caption [N], caption_sum [C, D], num_positives [N]
    """

    columns: Tensor
    sizes: list[int]
    own: slice
    caption: Tensor
    caption_sum: Tensor
    num_positives: Tensor

    @property
    def has_positive(self) -> Tensor:
        """Whether each one has any, [N]."""
        return self.num_positives > 0

    @property
    def weights(self) -> Tensor:
        """½ / (those that have a positive) of each that has one, [N]."""
        return self.has_positive.to(self.columns.dtype) / (2 * self.has_positive.sum().clamp(min=1))


def _gather_pairs(a: Tensor, b: Tensor, image_labels: Tensor, text_labels: Tensor) -> tuple[_Side, _Side]:
    sizes = [gather_sizes(len(side), side.device) for side in (a, b)]
    columns = [all_gather_rows(*side) for side in zip((a, b), sizes, strict=True)]
    labels = [all_gather_rows(*side) for side in zip((image_labels, text_labels), sizes, strict=True)]
    caption, caption_size = number_labels(torch.cat(labels))
    num_captions = len(caption_size)
    captions = caption.split([len(side) for side in labels])
    counts = [torch.zeros_like(caption_size).index_add_(0, side, torch.ones_like(side)) for side in captions]
    images, texts = (
        _Side(
            columns=columns[side],
            sizes=sizes[side],
            own=_own_slice(sizes[side]),
            caption=captions[side],
            caption_sum=_sum_by(captions[side], columns[side], num_captions),
            num_positives=counts[1 - side][captions[side]],
        )
        for side in (0, 1)
    )
    return images, texts


class _ImageTextLoss(torch.autograd.Function):
    """Σ over this rank's images and texts, times world_size; backward in closed form, as for the images."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, step: tuple[_Side, _Side]) -> Tensor:
        # elsewhere to look at scale is to wait
        is_one_process = a.device.type == "cpu" and not is_distributed()
        ctx.step, ctx.is_whole = step, is_one_process and float(scale) <= MAX_UNSHIFTED
        if ctx.is_whole:
            logs = [sums.log() for sums in sum_exponentials(a, b, float(scale))]
        else:
            logs = [
                log_sum_exp_by_rows(own, other.columns, scale)
                for own, other in zip((a, b), (step[1], step[0]), strict=True)
            ]
        ctx.save_for_backward(a, b, scale)
        ctx.all_logs = [all_gather_rows(own, side.sizes) for own, side in zip(logs, step, strict=True)]
        loss = a.new_zeros(())
        for z, side, other, side_logs in zip((a, b), step, step[::-1], logs, strict=True):
            own = side.own
            mean = other.caption_sum[side.caption[own]].mul_(z).sum(dim=1)
            mean *= scale / side.num_positives[own].clamp(min=1)
            losses = torch.where(side.has_positive[own], side_logs - mean, 0.0)
            loss += (losses * side.weights[own]).sum()
        return loss * world_size()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        a, b, scale = ctx.saved_tensors
        weights = [side.weights for side in ctx.step]
        logs = [
            torch.where(side.has_positive, side_logs, 0.0)
            for side, side_logs in zip(ctx.step, ctx.all_logs, strict=True)
        ]
        if ctx.is_whole:
            factors = [w * torch.exp(-side_logs) for w, side_logs in zip(weights, logs, strict=True)]
            attractions = list(multiply_exponentials(a, b, float(scale), *factors))
        else:
            attractions = [
                multiply_softmax_by_rows(
                    z,
                    ctx.step[1 - side].columns,
                    scale,
                    logs[side][ctx.step[side].own],
                    logs[1 - side],
                    weights[side][ctx.step[side].own],
                    weights[1 - side],
                )
                for side, z in enumerate((a, b))
            ]
        of_scale, gradients = scale.new_zeros(()), []
        for index, (z, attraction) in enumerate(zip((a, b), attractions, strict=True)):
            side, other = ctx.step[index], ctx.step[1 - index]
            own, caption = side.own, side.caption[side.own]
            share = weights[index][own] / side.num_positives[own].clamp(min=1)
            share = share + _positive_share(other, weights[1 - index], len(side.caption_sum))[caption]
            attraction -= other.caption_sum[caption].mul_(share[:, None])
            if index == 0:  # either side's sum is the whole derivative by the scale
                of_scale = (z * attraction).sum()
            gradients.append(attraction.mul_(scale * gradient * world_size()))
        return gradients[0], gradients[1], of_scale * gradient * world_size(), None


def _positive_share(side: _Side, weights: Tensor, num_captions: int) -> Tensor:
    """w_j / |P(j)| of a side's members, which is one number a caption, [C]."""
    share = weights.new_zeros(num_captions)
    share[side.caption] = weights / side.num_positives.clamp(min=1)
    return share


def _check_shapes(name: str, rows: Tensor, labels_name: str, labels: Tensor) -> None:
    if rows.ndim != 2 or labels.shape != rows.shape[:1]:
        raise ValueError(
            f"{name} must be [N, D] and {labels_name} [N], got {list(rows.shape)}, {list(labels.shape)}"
        )


def number_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """A number for each label, equal for equal ones, and how many have each.

    Shapes:
        [N] -> [N], [C]
    """
    if labels.device.type != "cpu":
        return number_labels_without_waiting(labels)
    _, numbers, counts = labels.unique(return_inverse=True, return_counts=True)
    return numbers, counts


def number_labels_without_waiting(labels: Tensor) -> tuple[Tensor, Tensor]:
    """As `number_labels`, for an accelerator, which the host need not ask for C: the counts end in zeros.

    Shapes:
        [N] -> [N], [N]
    """
    ordered, order = labels.sort()
    is_new = torch.ones_like(ordered)
    is_new[1:] = ordered[1:] != ordered[:-1]
    numbers = torch.empty_like(ordered)
    numbers[order] = is_new.cumsum(0) - 1
    return numbers, torch.zeros_like(numbers).index_add_(0, numbers, torch.ones_like(numbers))


def _own_slice(sizes: list[int]) -> slice:
    first = sum(sizes[: rank()])
    return slice(first, first + sizes[rank()])


def _sum_by(index: Tensor, rows: Tensor, num_groups: int) -> Tensor:
    return rows.new_zeros(num_groups, rows.shape[1]).index_add_(0, index, rows)
