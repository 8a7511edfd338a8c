"""What stays whole when training images are held out, and how much is."""

import pytest
import torch

from stablerep.evaluation.holdout import hold_out


def test_held_out_part_is_disjoint_complete_and_the_same_share_of_each_class() -> None:
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 2)
    fitted, held_out, split_by = hold_out(labels, None, fraction=0.1, seed=0)
    assert sorted(torch.cat([fitted, held_out]).tolist()) == list(range(62))
    assert labels[held_out].bincount().tolist() == [4, 2, 1]
    assert split_by == "image"


def test_of_several_labels_the_rarest_is_the_class() -> None:
    labels = torch.zeros(105, 3, dtype=torch.bool)
    labels[:, 0] = True
    labels[:20, 1] = True
    labels[:11, 2] = True
    labels[100:] = False
    fitted, held_out, _ = hold_out(labels, None, fraction=0.2, seed=0)
    assert sorted(torch.cat([fitted, held_out]).tolist()) == list(range(105))
    # Of images 0 to 10 the rarest label is the third, to 19 the second, to 99 the first, to 104 none.
    rarest = torch.bucketize(held_out, torch.tensor([11, 20, 100]), right=True)
    assert torch.bincount(rarest).tolist() == [2, 2, 16, 1]


@pytest.mark.parametrize("seed", range(5))
def test_images_of_a_caption_stay_together_though_their_classes_differ(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    captions = torch.randint(60, (400,), generator=generator) * 1000
    labels = torch.randint(3, (60,), generator=generator)[captions // 1000]
    labels[:10] = 2  # some captions have images of two classes
    fitted, held_out, split_by = hold_out(labels, captions, fraction=0.25, seed=seed)
    assert not set(captions[fitted].tolist()) & set(captions[held_out].tolist())
    assert sorted(torch.cat([fitted, held_out]).tolist()) == list(range(400))
    assert set(labels[held_out].tolist()) == set(labels[fitted].tolist()) == {0, 1, 2}
    assert split_by == "caption"


def test_without_captions_the_images_are_the_first_of_a_permutation_of_each_class() -> None:
    labels = torch.randint(4, (90,), generator=torch.Generator().manual_seed(0))
    held_out = hold_out(labels, None, fraction=0.3, seed=5).held_out
    generator, expected = torch.Generator().manual_seed(5), []
    for label in range(4):
        rows = (labels == label).nonzero().flatten()
        expected += rows[torch.randperm(len(rows), generator=generator)][: round(0.3 * len(rows))].tolist()
    assert held_out.tolist() == sorted(expected)


def test_captions_of_equal_size_fill_the_share_of_each_class() -> None:
    captions = torch.arange(70).repeat_interleave(3)
    labels = (captions >= 50).long()
    held_out = hold_out(labels, captions, fraction=0.2, seed=0).held_out
    assert labels[held_out].bincount().tolist() == [3 * 10, 3 * 4]


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_captions_of_unequal_size_never_exceed_the_share_of_images(seed: int, fraction: float) -> None:
    """Two classes of twenty captions, of 60, 30, 20, …, 3 images: what is short is less than a caption."""
    sizes = torch.tensor([60 // rank for rank in range(1, 21)] * 2)
    captions = torch.arange(40).repeat_interleave(sizes)
    labels = captions // 20
    fitted, held_out, split_by = hold_out(labels, captions, fraction=fraction, seed=seed)
    most = round(fraction * int(sizes[:20].sum()))
    for label in range(2):
        num_held_out = int((labels[held_out] == label).sum())
        left = captions[fitted][labels[fitted] == label].bincount()
        assert most - int(left[left > 0].min()) < num_held_out <= most
    assert not set(captions[fitted].tolist()) & set(captions[held_out].tolist())
    assert split_by == "caption"


@pytest.mark.parametrize("seed", range(5))
def test_where_no_caption_fits_the_smallest_is_held_out(seed: int) -> None:
    captions = torch.arange(3).repeat_interleave(torch.tensor([10, 8, 9]))
    held_out = hold_out(torch.zeros(27, dtype=torch.int64), captions, fraction=0.1, seed=seed).held_out
    assert captions[held_out].tolist() == [1] * 8


@pytest.mark.parametrize("seed", range(5))
def test_a_class_of_which_one_caption_is_more_than_half_is_split_by_image(seed: int) -> None:
    captions = torch.tensor([0] * 491 + list(range(1, 10)))
    labels = torch.zeros(500, dtype=torch.int64)
    _, held_out, split_by = hold_out(labels, captions, fraction=0.1, seed=seed)
    assert len(held_out) == 50
    assert split_by == "caption or image"


@pytest.mark.parametrize("seed", range(40))
def test_no_class_is_held_out_whole_though_captions_span_classes(seed: int) -> None:
    labels = torch.tensor([1, 2, 2, 1, 3, 3, 0, 0])
    captions = torch.tensor([0, 5, 3, 0, 5, 0, 2, 0])
    fitted, held_out, _ = hold_out(labels, captions, fraction=0.2, seed=seed)
    assert set(labels[fitted].tolist()) == {0, 1, 2, 3}
    assert len(held_out) > 0
    # Captions that each show both classes: more are asked for than leave a pair of images.
    fitted = hold_out(torch.arange(8) % 2, torch.arange(8) // 2, fraction=0.95, seed=seed).fitted
    assert fitted.tolist() == [int(fitted[0]), int(fitted[0]) + 1]


def test_captions_of_one_image_are_held_out_as_images_are() -> None:
    labels = torch.randint(5, (200,), generator=torch.Generator().manual_seed(0))
    by_image = hold_out(labels, None, fraction=0.2, seed=1)
    by_caption = hold_out(labels, torch.arange(200), fraction=0.2, seed=1)
    assert torch.equal(by_image.held_out, by_caption.held_out)
    assert not torch.equal(by_image.held_out, hold_out(labels, None, fraction=0.2, seed=2).held_out)


def test_a_class_of_one_caption_is_split_by_image_and_said_to_be() -> None:
    labels = torch.tensor([0] * 10 + [1] * 10)
    captions = torch.tensor([7] * 10 + [3] * 5 + [4] * 5)
    fitted, held_out, split_by = hold_out(labels, captions, fraction=0.3, seed=0)
    assert labels[held_out].bincount().tolist() == [3, 5]
    assert not set(captions[fitted].tolist()) & set(captions[held_out].tolist()) - {7}
    assert split_by == "caption or image"


def test_the_only_image_of_a_class_is_fitted() -> None:
    labels = torch.tensor([0, 0, 1, 2, 2])
    for seed in range(5):
        assert 2 in hold_out(labels, None, fraction=0.9, seed=seed).fitted
    with pytest.raises(ValueError, match="needs a class of at least 2 images, or a validation split"):
        hold_out(torch.arange(4), None, fraction=0.5, seed=0)


def test_arguments_out_of_bounds_are_refused() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"heldout_fraction must be in \(0, 1\), got 1"):
        hold_out(labels, None, fraction=1, seed=0)
    with pytest.raises(ValueError, match=r"groups must be \[4\], got \[3\]"):
        hold_out(labels, torch.arange(3), fraction=0.5, seed=0)
