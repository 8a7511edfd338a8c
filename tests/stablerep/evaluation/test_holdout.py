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


def test_the_share_is_one_of_captions_in_each_class() -> None:
    captions = torch.arange(70).repeat_interleave(3)
    labels = (captions >= 50).long()
    held_out = hold_out(labels, captions, fraction=0.2, seed=0).held_out
    assert labels[held_out].bincount().tolist() == [3 * 10, 3 * 4]


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
