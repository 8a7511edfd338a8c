"""The initial noise of an image as a pure function of (dataset seed, caption, image index).

Torch's CPU generator keeps the low 32 bits of a seed, so among 10⁸ images about a million pairs would share
their noise. Here a counter-based generator takes all 128 bits of a hash.
"""

import hashlib

import numpy as np
import numpy.typing as npt


def image_seed(seed: int, key: str, image_index: int) -> str:
    """First 128 bits of sha256("seed/key/image_index"), 32 hex digits.

    It does not depend on the rank, the shard, the batch, the number of images a caption, or the generator's
    settings: two guidance scales start from the same noise and compare in pairs.

    Args:
        seed: Seed of the dataset, any integer.
        key: The caption's id by content; of an equal caption further on, "caption_id-OCCURRENCE".
        image_index: Index of the image among its caption's, from 0.
    """
    return hashlib.sha256(f"{seed}/{key}/{image_index}".encode()).hexdigest()[:32]


def draw_noise(image_seed: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Standard normal noise from Philox keyed by the image's seed.

    Args:
        image_seed: 32 hex digits, from `image_seed`.
        shape: Shape of the latents of one image.

    Returns:
        float32 array of that shape.
    """
    generator = np.random.Generator(np.random.Philox(key=int(image_seed, 16)))
    return generator.standard_normal(shape, dtype=np.float32)
