"""The world that the embedded generator learnt from: scenes with known attributes, and captions about them.

A `Scene` fixes what can be said (shape, colour, size, fill, relation, background). `describe` says some of
it in words; `data_gen.scene_rendering.render` draws it. Whatever the caption leaves open, and all that no
caption ever says (place, rotation, exact hue, texture, light, noise), varies freely between two pictures of
one caption. That is the property of a text-to-image model which multi-positive learning feeds on, here with
the truth known.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    "heart": ("heart",),
    "ring": ("ring", "hoop"),
    "crescent": ("crescent", "moon shape"),
}
COLOURS: dict[str, tuple[str, ...]] = {
    "red": ("red", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
    "white": ("white",),
    "black": ("black",),
}
SIZES: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "big", "huge"),
}
FILLS: dict[str, tuple[str, ...]] = {
    "solid": ("solid", "plain"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "chequered"),
}
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "sky": ("in the sky", "among clouds", "in front of a cloudy sky"),
    "grass": ("on grass", "on a lawn", "in a meadow"),
    "sand": ("on sand", "on a beach", "in the desert"),
    "night": ("at night", "under the stars", "in the dark"),
    "brick": ("on a brick wall", "in front of bricks"),
    "snow": ("on snow", "in the snow", "on a snowy field"),
}
RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
CATEGORIES: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "fill": tuple(FILLS),
    "background": tuple(BACKGROUNDS),
}
"""The attributes of a scene with one object, each with its values in the order of their class indices."""

HELD_OUT_COMBINATIONS: frozenset[tuple[str, str]] = frozenset(
    (shape, CATEGORIES["colour"][(3 * index + 1) % len(COLOURS)]) for index, shape in enumerate(SHAPES)
)
"""(shape, colour) pairs that the embedded generator never saw: one colour for each shape."""

MIN_IMAGE_SIZE = 16
"""Least side of a picture in pixels: below it a small star is no star."""

_NUM_OBJECTS_PROBABILITIES = (0.6, 0.3, 0.1)
_MENTION_PROBABILITIES = {"shape": 0.92, "colour": 0.85, "size": 0.4, "fill": 0.5, "background": 0.6}
_PREFIXES = ("", "", "", "a picture of ", "a photo of ", "an image of ", "there is ")
_FILL_SUFFIXES = {"striped": "with stripes", "dotted": "with dots", "checkered": "with a checkered pattern"}


@dataclass(frozen=True)
class SceneObject:
    """One object; the values are keys of `SHAPES`, `COLOURS`, `SIZES` and `FILLS`."""

    shape: str
    colour: str
    size: str
    fill: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one to three objects on a background.

    With two or three objects, `relation` places `objects[0]` with regard to `objects[1]` ("left": it is to
    the left).
    """

    objects: tuple[SceneObject, ...]
    background: str
    relation: str | None = None


@dataclass(frozen=True)
class Mention:
    """What a caption says of one object; `None` is left open."""

    shape: str | None
    colour: str | None
    size: str | None
    fill: str | None


@dataclass(frozen=True)
class Description:
    """A caption and what it says: a `Mention` for each object in the text's order, background, relation."""

    text: str
    mentions: tuple[Mention, ...]
    background: str | None
    relation: str | None


def scene_rng(seed: int, stream: str, index: int) -> np.random.Generator:
    """Return the counter-based generator of one scene: a function of (seed, stream, index) alone.

    Args:
        seed: Any integer >= 0.
        stream: Names an independent sequence, such as "train" or "test".
        index: Position in the sequence, >= 0.
    """
    words = np.random.SeedSequence([seed, index, *stream.encode()])
    return np.random.Generator(np.random.Philox(words))


def sample_scene(
    rng: np.random.Generator,
    num_objects: int | None = None,
    exclude: Collection[tuple[str, str]] = (),
    only: Collection[tuple[str, str]] = (),
) -> Scene:
    """Draw a scene, every attribute uniform and independent.

    Args:
        rng: Source of randomness.
        num_objects: 1 to 3, or `None` for a draw with probabilities 0.6, 0.3 and 0.1.
        exclude: (shape, colour) pairs that no object may have.
        only: If not empty, the (shape, colour) pairs that objects are drawn from.

    Raises:
        ValueError: `num_objects` is not 1, 2 or 3.
    """
    if num_objects is None:
        num_objects = 1 + int(rng.choice(3, p=_NUM_OBJECTS_PROBABILITIES))
    if not 1 <= num_objects <= 3:
        raise ValueError(f"num_objects must be 1, 2 or 3, got {num_objects}")
    pairs = sorted(only) or [(s, c) for s in SHAPES for c in COLOURS if (s, c) not in exclude]
    objects = []
    for _ in range(num_objects):
        shape, colour = pairs[rng.integers(len(pairs))]
        objects.append(SceneObject(shape, colour, _choose(rng, SIZES), _choose(rng, FILLS)))
    relation = _choose(rng, RELATIONS) if num_objects > 1 else None
    return Scene(tuple(objects), _choose(rng, BACKGROUNDS), relation)


def describe(scene: Scene, rng: np.random.Generator) -> Description:
    """Say some of a scene in words: each attribute with a probability of its own, by one of its names.

    Every object keeps at least its shape or its colour, so that no caption is empty of meaning.
    """
    mentions = tuple(_mention(scene_object, rng) for scene_object in scene.objects)
    background = scene.background if rng.random() < _MENTION_PROBABILITIES["background"] else None
    relation = scene.relation if rng.random() < 0.7 else None
    phrases = [_noun_phrase(mention, rng) for mention in mentions]
    if len(phrases) == 1:
        text = phrases[0]
    elif relation is not None:
        text = f"{phrases[0]} {_choose_from(rng, RELATIONS[relation])} {phrases[1]}"
        text += f" and {phrases[2]}" if len(phrases) == 3 else ""
    else:
        text = " and ".join(phrases) if len(phrases) == 2 else f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
    if background is not None:
        text += " " + _choose_from(rng, BACKGROUNDS[background])
    return Description(_choose_from(rng, _PREFIXES) + text, mentions, background, relation)


def attributes_of(scene: Scene) -> dict[str, str]:
    """The value of each attribute of a scene with one object, keyed and ordered as `CATEGORIES`.

    Raises:
        ValueError: The scene has more objects.
    """
    if len(scene.objects) != 1:
        raise ValueError(f"scene must have 1 object, got {len(scene.objects)}")
    values = {**vars(scene.objects[0]), "background": scene.background}
    return {name: values[name] for name in CATEGORIES}


def sample_captions(num_captions: int, seed: int) -> list[str]:
    """Draw distinct captions from the grammar, of scenes with one to three objects.

    Args:
        num_captions: How many, >= 1.
        seed: The same seed gives the same captions; a longer list begins with the shorter one.

    Raises:
        ValueError: `num_captions` is below 1.
    """
    if num_captions < 1:
        raise ValueError(f"num_captions must be >= 1, got {num_captions}")
    captions: dict[str, None] = {}
    index = 0
    while len(captions) < num_captions:
        rng = scene_rng(seed, "captions", index)
        captions[describe(sample_scene(rng), rng).text] = None
        index += 1
    return list(captions)


@dataclass(frozen=True)
class ScenesConfig:
    """Write rendered scenes with labels (an image folder), captions from the grammar, or both."""

    output: str | None = None
    """Folder for the images: train/<label>/*.png and test/<label>/*.png, one object each."""
    label_by: Literal["shape", "colour", "size", "fill", "background"] = "shape"
    """The attribute that is the label."""
    num_train: int = 2000
    """Number of training images."""
    num_test: int = 1000
    """Number of test images."""
    image_size: int = 64
    """Side of the images in pixels."""
    captions: str | None = None
    """File for the captions, one a line."""
    num_captions: int = 1000
    """Number of distinct captions."""
    seed: int = 0
    """Seed of everything drawn."""


def run(config: ScenesConfig) -> int:
    """Write what `config` asks for; return the exit code.

    Raises:
        ValueError: Neither `output` nor `captions` is given, a number is out of its range, `output` holds
            files, or the captions file holds other text. Nothing has been written then.
    """
    _check(config)
    text = "\n".join(sample_captions(config.num_captions, config.seed)) + "\n"
    if config.captions is not None:
        path = Path(config.captions)
        if path.exists() and path.read_bytes() != text.encode():
            raise ValueError(f"captions file {path} holds other text; it is not overwritten")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{config.num_captions} captions in {path}")
    if config.output is not None:
        _write_images(config, Path(config.output))
    return 0


def _check(config: ScenesConfig) -> None:
    if config.output is None and config.captions is None:
        raise ValueError(
            "nothing to write: give --output FOLDER for images, --captions FILE for captions, or both"
        )
    for name, bound in (("num_train", 1), ("num_test", 1), ("num_captions", 1), ("seed", 0)):
        if getattr(config, name) < bound:
            raise ValueError(f"{name} must be >= {bound}, got {getattr(config, name)}")
    if config.image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size must be >= {MIN_IMAGE_SIZE} pixels, got {config.image_size}")
    root = Path(config.output) if config.output is not None else None
    if root is not None and root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise ValueError(f"output must be a new or empty folder, {root} is a file or holds files")


def _write_images(config: ScenesConfig, root: Path) -> None:
    from tqdm import tqdm

    from data_gen.scene_rendering import render_image

    counts = {"train": config.num_train, "test": config.num_test}
    splits = [(split, index) for split, count in counts.items() for index in range(count)]
    for split, index in tqdm(splits, desc="render", unit="image"):
        rng = scene_rng(config.seed, split, index)
        scene = sample_scene(rng, num_objects=1)
        folder = root / split / attributes_of(scene)[config.label_by]
        folder.mkdir(parents=True, exist_ok=True)
        render_image(scene, rng, config.image_size).save(folder / f"{index:06d}.png")
    print(f"{config.num_train} training and {config.num_test} test images in {root}")


def _choose(rng: np.random.Generator, options: dict[str, tuple[str, ...]]) -> str:
    return _choose_from(rng, tuple(options))


def _choose_from(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def _mention(scene_object: SceneObject, rng: np.random.Generator) -> Mention:
    says = {name: rng.random() < _MENTION_PROBABILITIES[name] for name in ("shape", "colour", "size", "fill")}
    if not says["shape"] and not says["colour"]:
        says["shape"] = True
    return Mention(**{name: getattr(scene_object, name) if said else None for name, said in says.items()})


def _noun_phrase(mention: Mention, rng: np.random.Generator) -> str:
    """Turn a mention into words, such as "a small striped red disc" or "a red disc with stripes"."""
    words, suffix = [], ""
    if mention.size is not None:
        words.append(_choose_from(rng, SIZES[mention.size]))
    if mention.fill is not None:
        if mention.fill in _FILL_SUFFIXES and rng.random() < 0.3:
            suffix = " " + _FILL_SUFFIXES[mention.fill]
        else:
            words.append(_choose_from(rng, FILLS[mention.fill]))
    if mention.colour is not None:
        words.append(_choose_from(rng, COLOURS[mention.colour]))
    words.append(_choose_from(rng, SHAPES[mention.shape]) if mention.shape is not None else "object")
    article = "an" if words[0][0] in "aeiou" else "a"
    return f"{article} {' '.join(words)}{suffix}"
