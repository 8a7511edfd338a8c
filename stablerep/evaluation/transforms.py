"""What is done with an image before the model sees it, and how that is said in words."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from stablerep.loading.model import InputFormat


@dataclass(frozen=True)
class ImageChange:
    """What is done with an image after the crop and before the normalisation, such as a corruption.

    Args:
        name: All that the outcome depends on, in words: it is a part of the transform, and of a cache's key.
        apply: From an image and its name to the image that the model sees; workers call it.

    Shapes:
        apply: uint8 [3, S, S] -> uint8 [3, S, S]
    """

    name: str
    apply: Callable[[Tensor, str], Tensor]


def build_train_transform(image_size: int) -> v2.Transform:
    """RandomResizedCrop of scale (0.08, 1), bicubic, and a horizontal flip; uint8 [3, size, size]."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(image_size, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )


def describe_eval_transform(input_format: InputFormat, change: ImageChange | None = None) -> str:
    """The evaluation transform in words, the same for equal transforms."""
    return (
        f"Resize({input_format.resize_size}, {input_format.interpolation}), "
        f"CenterCrop({input_format.image_size}), {f'{change.name}, ' if change else ''}"
        f"mean {list(input_format.mean)}, std {list(input_format.std)}"
    )
