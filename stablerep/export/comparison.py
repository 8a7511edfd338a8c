"""An export read back: every library must compute from it what the source computes."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.data
import torch
from PIL import Image
from torch import Tensor

from stablerep.export.timm_files import CONFIG_FILE, WEIGHTS_FILE
from stablerep.loading import EvaluationTransform, LoadedModel, load_model
from stablerep.loading.clip_models import (
    LOCAL_FOLDER,
    OPEN_CLIP_CONFIG,
    kept_root_logger,
    place_image_tower,
)

TOLERANCE = 1e-5
"""Largest difference of any output, absolute; on one machine in float32 most are equal bit for bit."""

_NUM_IMAGES = 4
_TEXTS = ["a red cube", "a photo of a dog", "two cats on a sofa, seen from above, in the rain at night"]


@dataclass(frozen=True)
class Comparison:
    """How far one form of the export is from the source.

    Attributes:
        form: What was loaded with what, and which output it is.
        difference: The largest absolute difference of any value.
    """

    form: str
    difference: float


@torch.no_grad()
def compare_forms(folder: Path, model: LoadedModel) -> list[Comparison]:
    """Loads each form back and compares its outputs on fixed images and texts with the source's.

    Args:
        folder: The export, as it stays; where its open_clip_config.json names a folder to be, open_clip is
            told where that is now.
        model: The source.

    Raises:
        ValueError: If a library cannot load the folder, or an output differs by more than `TOLERANCE`.
    """
    checks = [_check_timm_folder, _check_timm_weights, _check_transformers]
    if (folder / OPEN_CLIP_CONFIG).is_file():
        checks.append(_check_open_clip)
    found: list[Comparison] = []
    for check in [*checks, _check_own_loading]:
        found.extend(_run(check, folder, model))
    return found


def _run(
    check: Callable[[Path, LoadedModel], Iterator[tuple[str, Tensor, Tensor]]],
    folder: Path,
    model: LoadedModel,
) -> Iterator[Comparison]:
    name = check.__name__.removeprefix("_check_").replace("_", " ")
    try:
        outputs = list(check(folder, model))
    except Exception as error:  # whatever another library raises, the export is not what it should be
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the export cannot be loaded back ({name}): {type(error).__name__}: {reason}"
        ) from error
    for form, actual, expected in outputs:
        if actual.shape != expected.shape:
            raise ValueError(
                f"the export differs from its source: {form} is {list(actual.shape)}, expected "
                f"{list(expected.shape)}"
            )
        difference = float((actual.double() - expected.double()).abs().max())
        if not difference <= TOLERANCE:  # NaN too
            raise ValueError(
                f"the export differs from its source: {form} by {difference:.3g}, more than {TOLERANCE:g}"
            )
        yield Comparison(form, difference)


def draw_images(image_size: int) -> Tensor:
    """The fixed images, normalised: [4, 3, image_size, image_size]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_NUM_IMAGES, 3, image_size, image_size, generator=generator)


def draw_picture(width: int, height: int) -> Image.Image:
    """A fixed picture: gradients under noise."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:height, 0:width]
    ramp = np.stack([255 * rows / height, 255 * columns / width, 128 + 0 * rows], axis=-1)
    return Image.fromarray(np.clip(ramp + rng.normal(0, 30, ramp.shape), 0, 255).astype(np.uint8))


def _freeze(module: Any) -> Any:
    """In eval mode and without gradients, as the source is: else torch may choose other attention kernels."""
    return module.eval().requires_grad_(False)


def _draw_any_picture(model: LoadedModel) -> Image.Image:
    """One that the transform has to resize and to crop."""
    size = model.input_format.image_size
    return draw_picture(2 * size + 13, size + 31)


def _check_timm_folder(folder: Path, model: LoadedModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    loaded = _freeze(timm.create_model(f"{LOCAL_FOLDER}{folder}", pretrained=True))
    images, picture = draw_images(model.input_format.image_size), _draw_any_picture(model)
    transform: Any = timm.data.create_transform(
        **timm.data.resolve_model_data_config(loaded), is_training=False
    )
    yield "timm, local-dir: features", loaded(images), model.backbone(images)
    yield "timm, local-dir: transform", transform(picture), EvaluationTransform(model.input_format)(picture)


def _check_timm_weights(folder: Path, model: LoadedModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    loaded = _freeze(
        timm.create_model(
            config["architecture"],
            checkpoint_path=folder / WEIGHTS_FILE,
            num_classes=0,
            **config.get("model_args", {}),
        )
    )
    images = draw_images(model.input_format.image_size)
    yield "timm, checkpoint_path: features", loaded(images), model.backbone(images)


def _check_transformers(folder: Path, model: LoadedModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    with _quiet_transformers():
        from transformers import AutoImageProcessor, AutoModel

        loaded = _freeze(AutoModel.from_pretrained(folder, local_files_only=True))
        processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    images, picture = draw_images(model.input_format.image_size), _draw_any_picture(model)
    yield "transformers, AutoModel: features", loaded(images).pooler_output, model.backbone(images)
    expected = EvaluationTransform(model.input_format)(picture)
    yield "transformers, AutoImageProcessor", processor(picture)["pixel_values"][0], expected


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the bar and the advice that are of no use here."""
    of_torch = logging.getLogger("torch.utils._pytree")  # about what torchao does where it is installed
    level = of_torch.level
    of_torch.setLevel(logging.ERROR)
    from transformers.utils import logging as of_transformers

    verbosity, has_bar = of_transformers.get_verbosity(), of_transformers.is_progress_bar_enabled()
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        of_torch.setLevel(level)
        of_transformers.set_verbosity(verbosity)
        if has_bar:
            of_transformers.enable_progress_bar()


def _check_open_clip(folder: Path, model: LoadedModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    import open_clip

    name = f"{LOCAL_FOLDER}{folder}"
    config = json.loads((folder / OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))
    place = place_image_tower(folder, config["model_cfg"]["vision_cfg"])
    with kept_root_logger():
        loaded, preprocess = open_clip.create_model_from_pretrained(name, **place)
        tokenize = open_clip.get_tokenizer(name)
    _freeze(loaded)
    form = model.input_format
    images = draw_images(form.image_size)
    yield "open_clip: images", loaded.encode_image(images, normalize=True), model.encode_images(images)
    tokens = tokenize(_TEXTS)
    yield "open_clip: texts", loaded.encode_text(tokens, normalize=True), model.encode_texts(_TEXTS)
    yield "open_clip: logit_scale", *_compare_scales(loaded.logit_scale.exp().item(), model)
    picture = draw_picture(form.image_size, form.image_size)  # neither resized nor cropped
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (form.mean, form.std))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    yield "open_clip: normalisation", preprocess(picture), (pixels - mean) / std


def _check_own_loading(folder: Path, model: LoadedModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    loaded = load_model(folder)
    if loaded.input_format != model.input_format:
        raise ValueError(f"its input is {loaded.input_format}, expected {model.input_format}")
    images = draw_images(model.input_format.image_size)
    yield "stablerep.load_model: features", loaded.extract(images)["cls"], model.extract(images)["cls"]
    if loaded.logit_scale is not None:
        yield "stablerep.load_model: images", loaded.encode_images(images), model.encode_images(images)
        yield "stablerep.load_model: texts", loaded.encode_texts(_TEXTS), model.encode_texts(_TEXTS)
        yield "stablerep.load_model: logit_scale", *_compare_scales(loaded.logit_scale, model)


def _compare_scales(scale: float, model: LoadedModel) -> tuple[Tensor, Tensor]:
    """Of a scale of up to 100, the relative difference is what changes a probability."""
    assert model.logit_scale is not None
    return torch.tensor(scale / model.logit_scale), torch.tensor(1.0)
