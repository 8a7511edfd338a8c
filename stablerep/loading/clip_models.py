"""Models of open_clip: its own architectures, with weights by tag or file, a folder, or a hub id."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stablerep.arguments import suggest
from stablerep.loading.model import InputFormat, LoadedModel, TextSide, describe_resizing
from stablerep.loading.timm_models import HUB, LOCAL_FOLDER, TIMM_CONFIG, is_timm_config, read_folder_format

OPEN_CLIP_CONFIG = "open_clip_config.json"


@contextmanager
def kept_root_logger() -> Iterator[None]:
    """open_clip logs through the root logger, which then gets a handler that says our own lines again."""
    root = logging.getLogger()
    handler = logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


class _Matrix(nn.Module):
    """x @ weight, as open_clip writes its projections."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach())

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weight


class _TextTower(nn.Module):
    """open_clip's whole model, without its images."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.visual = nn.Identity()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(tokens)
        return features


class _LazyTokenizer:
    """open_clip's tokenizer, made when there is a first text: some are downloaded."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self._tokenize: Callable[[list[str]], Tensor] | None = None

    def __call__(self, texts: list[str]) -> Tensor:
        if self._tokenize is None:
            with kept_root_logger():
                self._tokenize = _import_open_clip().get_tokenizer(self.model_name)
        return self._tokenize(texts)


def load_open_clip(name: str, *, random_init: bool) -> LoadedModel:
    """A model of open_clip.

    "cls" is what the image tower returns before its projection into the joint space, where that can be told
    from the tower: for its own vision transformers and for timm's. The crop is that of timm's config.json
    where that lies in the folder, as in an export: open_clip's file does not say it.

    Args:
        name: `open_clip:ARCHITECTURE/TAG`, `open_clip:ARCHITECTURE/FILE`, `open_clip:hf-hub:ORG/NAME`, or a
            folder with open_clip_config.json.
        random_init: Fresh weights (torch's global seed), and no text tower.

    Raises:
        ValueError: If open_clip is not installed, does not know the name, or cannot load the weights.
        FileNotFoundError: If there is no such folder.
    """
    open_clip = _import_open_clip()
    spec = name.removeprefix("open_clip:")
    pretrained: str | None = None
    options: dict[str, Any] = {}
    folder: Path | None = None
    if spec.startswith(LOCAL_FOLDER) or Path(spec).is_dir():
        folder = Path(spec.removeprefix(LOCAL_FOLDER))
        model_name, options = f"{LOCAL_FOLDER}{folder}", _read_folder(folder)
        architecture = folder.resolve().name
    elif spec.startswith(HUB):
        model_name, architecture = spec, spec.removeprefix(HUB)
    else:
        model_name, _, tag = spec.partition("/")
        architecture, pretrained = model_name, tag or None
        _check_names(open_clip, model_name, pretrained, random_init)
    try:
        with kept_root_logger():
            model = open_clip.create_model(
                model_name,
                pretrained=None if random_init else pretrained,
                load_weights=not random_init,
                pretrained_text=not random_init,
                require_pretrained=not random_init,
                **options,
            )
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, AssertionError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name}: open_clip cannot load it: {reason}") from error
    loaded = _wrap(name, architecture, model_name, model.eval(), with_text=not random_init)
    if folder is not None and is_timm_config(folder / TIMM_CONFIG):
        crop_fraction = read_folder_format(folder).crop_fraction
        loaded.input_format = dataclasses.replace(loaded.input_format, crop_fraction=crop_fraction)
    return loaded


def _wrap(name: str, architecture: str, model_name: str, model: Any, with_text: bool) -> LoadedModel:
    input_format = _read_input_format(model, model_name)
    resizing = getattr(model.visual, "preprocess_cfg", {}).get("resize_mode", "shortest")
    backbone, image_projection = _split_image_tower(model.visual)
    scale = float(model.logit_scale.detach().exp())
    tower = _TextTower(model)  # takes the images out of the model, so that no weight is there twice
    text = None
    if with_text:
        text = TextSide(tower, image_projection, nn.Identity(), _LazyTokenizer(model_name), scale)
    return LoadedModel(
        name=name,
        architecture=architecture,
        kind="open_clip",
        backbone=backbone,
        input_format=input_format,
        text=text,
        remarks=describe_resizing(name, resizing, "shortest"),
    )


def _split_image_tower(visual: Any) -> tuple[nn.Module, nn.Module]:
    """The part whose output is probed, and the projection behind it."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, TimmModel) and "pool" not in dict(visual.head.named_children()):
        return visual.trunk, visual.head
    if isinstance(visual, VisionTransformer) and visual.proj is not None:
        projection = _Matrix(visual.proj)
        visual.proj = None
        return visual, projection
    return visual, nn.Identity()


def _read_folder(folder: Path) -> dict[str, Any]:
    """Checks a folder's configuration, and finds its image tower again where the folder was moved."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist")
    path = folder / OPEN_CLIP_CONFIG
    try:
        vision = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]["vision_cfg"]
    except FileNotFoundError:
        raise ValueError(f"folder {folder} has no {OPEN_CLIP_CONFIG}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not open_clip's: {type(error).__name__} {error}") from error
    return place_image_tower(folder, vision)


def place_image_tower(folder: Path, vision: Mapping[str, Any]) -> dict[str, Any]:
    """What `open_clip.create_model` must be told where the image tower is described by the folder itself.

    Args:
        folder: Where the folder is now.
        vision: Its `vision_cfg`.

    Returns:
        Arguments; none where the tower has a name of timm's.
    """
    tower = str(vision.get("timm_model_name") or "")
    if not tower.startswith(LOCAL_FOLDER) or not is_timm_config(folder / TIMM_CONFIG):
        return {}
    return {"vision_cfg": {**vision, "timm_model_name": f"{LOCAL_FOLDER}{folder}"}}


def _read_input_format(model: Any, model_name: str) -> InputFormat:
    visual = model.visual
    settings = dict(getattr(visual, "preprocess_cfg", {}))
    size = settings.get("size", getattr(visual, "image_size", 224))
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(set(sides)) != 1:
        raise ValueError(f"{model_name} takes images of {sides[0]} x {sides[1]} pixels, not square ones")
    return InputFormat(
        image_size=int(sides[0]),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        interpolation=settings.get("interpolation", "bicubic"),
        crop_fraction=1.0,  # open_clip resizes the shorter side to the size itself
    )


def _check_names(open_clip: Any, architecture: str, pretrained: str | None, random_init: bool) -> None:
    known = open_clip.list_models()
    if architecture not in known:
        raise ValueError(f"open_clip has no architecture {architecture!r}{suggest(architecture, known)}")
    if random_init:
        return
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained is None:
        raise ValueError(
            f"open_clip:{architecture} needs weights: open_clip:{architecture}/TAG or /FILE; its tags are "
            f"{', '.join(tags) or 'none'}"
        )
    if pretrained not in tags and not Path(pretrained).is_file():
        raise ValueError(
            f"open_clip:{architecture} has no weights {pretrained!r}, and there is no such file"
            f"{suggest(pretrained, tags)}"
        )


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            "models of open_clip need open_clip, which is not installed: pip install 'stablerep[text]'"
        ) from error
    return open_clip
