"""StableRep: visual representations learnt from the images that a diffusion model makes of captions.

Reference: Tian et al., "StableRep: Synthetic Images from Text-to-Image Models Make Strong Visual
Representation Learners", NeurIPS 2023, https://arxiv.org/abs/2306.00984
"""

from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

__version__ = "0.1.0"


def load_model(
    path_or_id: "str | PathLike[str]", *, ema: bool = False
) -> "tuple[nn.Module, Callable[[Image], Tensor]]":
    """A frozen backbone and the transform of its images, for code of your own.

        backbone, transform = stablerep.load_model("runs/fit/checkpoints/last.ckpt")
        features = backbone(transform(image).unsqueeze(0))

    Args:
        path_or_id: A checkpoint of `stablerep fit`, the authors' `.pth`, a name of timm, a folder of timm or
            open_clip, `hf-hub:ORG/NAME`, or `open_clip:ARCHITECTURE/TAG` (see `stablerep.loading`).
        ema: Take the moving average of the weights; checkpoints of `stablerep fit` alone.

    Shapes:
        transform: image -> float32 [3, S, S]; backbone: [N, 3, S, S] -> [N, D]

    Returns:
        The backbone, in eval mode on the CPU, and the transform that evaluation applies.

    Raises:
        FileNotFoundError: If a file or folder is not there.
        ValueError: If the form is not understood, or the weights do not fit; names what does not.
    """
    from stablerep.loading import EvaluationTransform
    from stablerep.loading import load_model as load

    model = load(str(path_or_id), ema=ema)
    return model.backbone, EvaluationTransform(model.input_format)
