"""Features from the cache, or computed and put there.

cache = FeatureCache(Path(default_cache_folder()))
fingerprints = fingerprint_set(dataset, cache.folder)          # on rank 0
features = load_or_extract(model, dataset, "train", settings, cache, fingerprints["train"])
"""

import dataclasses
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stablerep import distributed
from stablerep.evaluation.cache.files import (
    SCHEMA_VERSION,
    SUFFIX,
    DamagedFileError,
    digest_content,
    temporary_name,
    verify_file,
)
from stablerep.evaluation.extraction import ExtractionSettings, TextModel, check_error_budget, embed_texts
from stablerep.evaluation.features import FeatureModel, Features, extract_changed_features
from stablerep.evaluation.sets.labelled import LabelledImage, LabelledSet
from stablerep.evaluation.transforms import ImageChange, describe_eval_transform

logger = logging.getLogger(__name__)

_Place = tuple[int, str]
"""Number of a change and name of a feature."""

TEXT_FEATURE = "text"
_LIBRARIES = ("torch", "torchvision", "pillow")
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.uint8: "U8",
}
"""As safetensors names them."""


class CacheableModel(FeatureModel, Protocol):
    """A model that says what its weights are, and what it does with them."""

    @property
    def name(self) -> str:
        """What the user gave."""

    @property
    def digest(self) -> str:
        """sha256 of its weights."""

    @property
    def forward_digest(self) -> str:
        """sha256 of what it does with them."""


class CacheableTextModel(TextModel, Protocol):
    """A model with a text tower that says what its weights are, and what it does with them."""

    @property
    def name(self) -> str:
        """What the user gave."""

    @property
    def digest(self) -> str:
        """sha256 of its weights."""

    @property
    def forward_digest(self) -> str:
        """sha256 of what it does with them."""


@dataclass(frozen=True)
class FeatureKey:
    """What the values of a file depend on.

    Args:
        weights: Digest of the model's weights.
        forward: Digest of what the model does with them.
        data: Digest of the split's images, names and labels, or of the texts.
        transform: What is done with an image before the model sees it; "" for texts.
        feature: Name of the feature, or `text`.
        precision: Arithmetic of the model.
        storage: Type in which the values are kept.
        schema_version: Of the file's content.
    """

    weights: str
    forward: str
    data: str
    transform: str
    feature: str
    precision: str
    storage: str
    schema_version: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """Of all of it, 64 hex digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class FeatureCache:
    """A folder of features. What cannot be kept is a warning, as is what is damaged.

    Args:
        folder: Where; made when the first file is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: FeatureKey) -> Path:
        """Where the values are, if they are there."""
        return self.folder / f"{key.digest}{SUFFIX}"

    def has(self, key: FeatureKey) -> bool:
        """Whether there is a file; it is not verified."""
        return self.path(key).is_file()

    def load(self, key: FeatureKey) -> Features | None:
        """The values of one feature; None where there is no sound file, or one of something else."""
        path = self.path(key)
        try:
            header = verify_file(path)
            if json.loads(header.metadata["key"]) != asdict(key):
                raise DamagedFileError(f"{path} is of another key")
            features = _read(path, key, header.metadata)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, DamagedFileError) as error:
            logger.warning("%s: its features are computed anew", " ".join(str(error).split()))
            return None
        try:
            os.utime(path)  # what was used last is pruned last
        except OSError:
            logger.debug("%s: its time of use cannot be noted", path)
        return features

    def save(self, key: FeatureKey, features: Features, description: Mapping[str, str]) -> None:
        """Keeps the values of one feature.

        The file appears whole or not at all: a full disk leaves what was there, and is a warning.

        Args:
            key: What they depend on.
            features: The features, that of the key among them.
            description: What people are told of the file: model, data, split.
        """
        path = self.path(key)
        temporary = path.with_name(temporary_name(path.name))
        try:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _write(temporary, key, features, description)
                _flush(temporary)
                os.replace(temporary, path)
                _flush(self.folder)
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            logger.warning("features are not kept in %s: %s", path, " ".join(str(error).split()))


def _write(path: Path, key: FeatureKey, features: Features, description: Mapping[str, str]) -> None:
    texts = {"names": features.names, "caption_ids": features.caption_ids, "captions": features.captions}
    tensors = {
        "values": features.values[key.feature].contiguous(),
        "labels": features.labels.contiguous(),
        "images": torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8),
        **({} if features.ignored is None else {"ignored": features.ignored.contiguous()}),
    }
    metadata = {
        "key": json.dumps(asdict(key), sort_keys=True),
        **description,
        "digest": features.digest,
        "unreadable": json.dumps(features.unreadable),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": json.dumps(
            {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}
        ),
    }
    metadata["sha256"] = digest_content(
        metadata,
        (
            (name, _DTYPES[tensor.dtype], tuple(tensor.shape), [_bytes_of(tensor)])
            for name, tensor in tensors.items()
        ),
    )
    save_file(tensors, path, metadata)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read(path: Path, key: FeatureKey, metadata: Mapping[str, str]) -> Features:
    with safe_open(path, framework="pt") as file:
        texts = json.loads(bytes(file.get_tensor("images").numpy()))
        return Features(
            values={key.feature: file.get_tensor("values")},
            labels=file.get_tensor("labels"),
            names=tuple(texts["names"]),
            caption_ids=tuple(texts["caption_ids"]),
            captions=tuple(map(tuple, texts["captions"])),
            digest=metadata["digest"],
            unreadable=tuple(json.loads(metadata["unreadable"])),
            ignored=file.get_tensor("ignored") if "ignored" in file.keys() else None,  # noqa: SIM118
        )


def _flush(path: Path) -> None:
    """Waits until a file's or a folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def build_keys(
    model: CacheableModel,
    settings: ExtractionSettings,
    fingerprint: str,
    feature_names: Sequence[str] | None = None,
    change: ImageChange | None = None,
) -> dict[str, FeatureKey]:
    """The keys of a split's features, by the features' names.

    Args:
        model: The model.
        settings: How features are computed.
        fingerprint: Of the split, from `fingerprint_set`.
        feature_names: Those that are asked for; None asks for all that the model offers.
        change: What else is done with each image.
    """
    return {
        name: FeatureKey(
            weights=model.digest,
            forward=model.forward_digest,
            data=fingerprint,
            transform=describe_eval_transform(model.input_format, change),
            feature=name,
            precision=settings.precision,
            storage=settings.storage,
        )
        for name in (model.feature_names if feature_names is None else feature_names)
    }


def load_or_extract(
    model: CacheableModel,
    dataset: LabelledSet,
    split: str,
    settings: ExtractionSettings,
    cache: FeatureCache | None,
    fingerprint: str,
    *,
    feature_names: Sequence[str] | None = None,
) -> Features | None:
    """Features of a split, those that the cache has from there. With ranks, each of them calls it.

    Args:
        model: The model.
        dataset: The set.
        split: Name of the split.
        settings: How to compute.
        cache: Where features are kept; None keeps none. Rank 0's is used.
        fingerprint: Of the split, from `fingerprint_set`, on rank 0; not read without a cache.
        feature_names: Those of the model's features that are asked for; None asks for all.

    Returns:
        The features on rank 0, None on the others.

    Raises:
        ValueError: As `extract_features`; the error budget holds for cached features too.
    """
    found = load_or_extract_changed(
        model, dataset, split, settings, cache, fingerprint, [None], feature_names=feature_names
    )
    return None if found is None else found[0]


def load_or_extract_changed(
    model: CacheableModel,
    dataset: LabelledSet,
    split: str,
    settings: ExtractionSettings,
    cache: FeatureCache | None,
    fingerprint: str,
    changes: Sequence[ImageChange | None],
    *,
    feature_names: Sequence[str] | None = None,
) -> list[Features] | None:
    """Features of a split under several changes, which are all of the same images.

    What the cache lacks is computed in one pass that decodes each image once.

    Args:
        model: As for `load_or_extract`.
        dataset: The set.
        split: Name of the split.
        settings: How to compute.
        cache: Where features are kept.
        fingerprint: Of the split.
        changes: What else is done with each image, at least one; None leaves it as it is.
        feature_names: As for `load_or_extract`.

    Returns:
        The features for each change on rank 0, None on the others.

    Raises:
        ValueError: As for `load_or_extract`.
    """
    images = dataset.splits[split]
    asked = tuple(model.feature_names if feature_names is None else feature_names)
    found: dict[_Place, Features] = {}
    if cache is not None and distributed.rank() == 0:
        found = _load(cache, model, images, settings, fingerprint, asked, changes)
    for _ in range(2):
        # An image that could not be read for some of them and could for others: all are computed anew.
        if len({(features.names, features.digest) for features in found.values()}) > 1:
            found = {}
        lacking = [(c, name) for c in range(len(changes)) for name in asked if (c, name) not in found]
        missing: list[_Place] = distributed.all_gather_objects(lacking)[0]
        if not missing:
            break
        found |= _extract(model, dataset, split, settings, cache, missing, changes)
    error = None
    if distributed.rank() == 0:
        try:
            unreadable = next(iter(found.values())).unreadable
            check_error_budget(unreadable, len(images), settings.error_budget_fraction, split)
        except ValueError as caught:
            error = caught
    distributed.raise_together(error)
    if distributed.rank() != 0:
        return None
    return [
        dataclasses.replace(
            found[number, asked[0]], values={name: found[number, name].values[name] for name in asked}
        )
        for number in range(len(changes))
    ]


def _load(
    cache: FeatureCache,
    model: CacheableModel,
    images: Sequence[LabelledImage],
    settings: ExtractionSettings,
    fingerprint: str,
    asked: Sequence[str],
    changes: Sequence[ImageChange | None],
) -> dict[_Place, Features]:
    """What the cache has; nothing if an image that was left out there can be read now."""
    found: dict[_Place, Features] = {}
    for number, change in enumerate(changes):
        for name, key in build_keys(model, settings, fingerprint, asked, change).items():
            if (features := cache.load(key)) is not None:
                found[number, name] = features
    for names in {features.names for features in found.values() if features.unreadable}:
        kept = set(names)
        if any(_is_readable(image) for image in images if image.name not in kept):
            return {}
    return found


def _is_readable(image: LabelledImage) -> bool:
    try:
        image.decode(image.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _extract(
    model: CacheableModel,
    dataset: LabelledSet,
    split: str,
    settings: ExtractionSettings,
    cache: FeatureCache | None,
    missing: Sequence[_Place],
    changes: Sequence[ImageChange | None],
) -> dict[_Place, Features]:
    """Computes features and keeps them under what was read, should that have changed since it was hashed."""
    numbers = sorted({number for number, _ in missing})
    names = list(dict.fromkeys(name for _, name in missing))
    extracted = extract_changed_features(
        model,
        dataset.splits[split],
        dataset,
        settings,
        [changes[number] for number in numbers],
        description=f"{split} features",
        feature_names=names,
    )
    found: dict[_Place, Features] = {}
    description = {"model": model.name, "data": dataset.name, "split": split}
    for number, features in zip(numbers, extracted or [], strict=False):
        for name, key in build_keys(model, settings, features.digest, names, changes[number]).items():
            found[number, name] = features
            if cache is not None:
                cache.save(key, features, description)
    return found


def load_or_embed_texts(
    model: CacheableTextModel,
    texts: Sequence[str],
    settings: ExtractionSettings,
    cache: FeatureCache | None,
    *,
    description: str,
) -> Tensor | None:
    """Text embeddings, from the cache if it has them. With ranks, each of them calls it.

    Args:
        model: A model with a text tower.
        texts: Captions or prompts, at least one.
        settings: How to compute.
        cache: Where they are kept; None keeps none. Rank 0's is used.
        description: What messages and the cache's list call them.

    Shapes:
        -> [len(texts), E], in the storage type

    Returns:
        The embeddings on rank 0, None on the others.

    Raises:
        ValueError: As `embed_texts`.
    """
    digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
    key = FeatureKey(
        weights=model.digest,
        forward=model.forward_digest,
        data=digest,
        transform="",
        feature=TEXT_FEATURE,
        precision=settings.precision,
        storage=settings.storage,
    )
    found = cache.load(key) if cache is not None and distributed.rank() == 0 else None
    is_found: bool = distributed.all_gather_objects(found is not None)[0]
    if is_found:
        return None if found is None else found.values[TEXT_FEATURE]
    values = embed_texts(model, texts, settings, description=description)
    if values is not None and cache is not None:
        features = _as_features(values, texts, digest)
        cache.save(key, features, {"model": model.name, "data": description, "split": ""})
    return values


def _as_features(values: Tensor, texts: Sequence[str], digest: str) -> Features:
    return Features(
        values={TEXT_FEATURE: values},
        labels=torch.arange(len(texts)),
        names=tuple(texts),
        caption_ids=("",) * len(texts),
        captions=((),) * len(texts),
        digest=digest,
        unreadable=(),
    )
