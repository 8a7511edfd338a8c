"""The pixels of `data_gen.scenes`: signed distances, fills, backgrounds, light and noise, in NumPy.

Everything that a caption may leave unsaid is drawn here, from the generator that is passed in. Lengths are in
units of a 64-pixel picture and scale with `image_size`.
"""

from __future__ import annotations

import colorsys
import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_gen.scenes import MIN_IMAGE_SIZE, Scene, SceneObject

Array = NDArray[np.floating[Any]]

_CANVAS = 64.0
_RADII = {"small": (8.5, 10.5), "medium": (13.0, 15.5), "large": (18.5, 21.5)}
_CROWD_SCALES = {1: 1.0, 2: 0.8, 3: 0.68}
_MAX_ROTATION_RADIANS = math.radians(35)
# hue in degrees, saturation, value: (low, high) each. The bands lie further apart than the light can bridge.
_COLOUR_BANDS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-6, 6), (0.85, 1.0), (0.75, 0.95)),
    "orange": ((25, 33), (0.85, 1.0), (0.92, 1.0)),
    "yellow": ((52, 60), (0.75, 1.0), (0.92, 1.0)),
    "green": ((105, 140), (0.7, 1.0), (0.5, 0.85)),
    "cyan": ((176, 188), (0.65, 1.0), (0.8, 1.0)),
    "blue": ((218, 236), (0.75, 1.0), (0.65, 0.95)),
    "purple": ((270, 285), (0.65, 0.95), (0.5, 0.75)),
    "pink": ((325, 342), (0.38, 0.6), (0.95, 1.0)),
    "white": ((0, 360), (0.0, 0.05), (0.95, 1.0)),
    "black": ((0, 360), (0.0, 0.3), (0.03, 0.12)),
}


def render(scene: Scene, rng: np.random.Generator, image_size: int = 64) -> NDArray[np.uint8]:
    """Draw a scene; everything that `scene` does not fix is drawn from `rng`.

    Args:
        scene: What to show.
        rng: Decides place, rotation, exact colour, texture, light and noise.
        image_size: Side in pixels, >= 16.

    Shapes:
        returns: uint8 [image_size, image_size, 3], RGB.
    """
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size must be >= {MIN_IMAGE_SIZE} pixels, got {image_size}")
    scale = _CANVAS / image_size
    rows, columns = np.mgrid[0:image_size, 0:image_size].astype(np.float32)
    x, y = (columns + 0.5) * scale, (rows + 0.5) * scale
    picture = _background(scene.background, rng, x, y)
    for scene_object, (centre_x, centre_y, radius) in zip(scene.objects, _place(scene, rng), strict=True):
        _paint(picture, scene_object, rng, x - centre_x, y - centre_y, radius, scale)
    angle = rng.uniform(0, 2 * math.pi)
    slope = rng.uniform(0, 0.15) / (_CANVAS / 2)
    centred = (x - _CANVAS / 2) * math.cos(angle) + (y - _CANVAS / 2) * math.sin(angle)
    light = rng.uniform(0.85, 1.08) + slope * centred
    picture *= light[..., None]
    picture += rng.normal(0.0, rng.uniform(0.0, 0.03), picture.shape).astype(np.float32)
    return (np.clip(picture, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def render_image(scene: Scene, rng: np.random.Generator, image_size: int = 64) -> Image.Image:
    """Draw a scene as a PIL image; see `render`."""
    return Image.fromarray(render(scene, rng, image_size))


def _place(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Return (x, y, radius) an object: inside the picture, apart from each other, the relation kept."""
    crowd = _CROWD_SCALES[len(scene.objects)]
    radii = [rng.uniform(*_RADII[scene_object.size]) * crowd for scene_object in scene.objects]
    for attempt in range(1000):
        shrink = 0.97 ** max(0, attempt - 30)
        spots = []
        for radius in radii:
            margin = radius * shrink + 1.0
            spots.append(
                (
                    rng.uniform(margin, _CANVAS - margin),
                    rng.uniform(margin, _CANVAS - margin),
                    radius * shrink,
                )
            )
        if _apart(spots) and _related(spots, scene.relation):
            return spots
    raise RuntimeError(
        "no free place was found for the objects"
    )  # the radii have shrunk to nothing long before


def _apart(spots: list[tuple[float, float, float]]) -> bool:
    return all(
        math.hypot(first[0] - second[0], first[1] - second[1]) >= 1.02 * (first[2] + second[2])
        for index, first in enumerate(spots)
        for second in spots[:index]
    )


def _related(spots: list[tuple[float, float, float]], relation: str | None) -> bool:
    if relation is None:
        return True
    right, down = spots[1][0] - spots[0][0], spots[1][1] - spots[0][1]
    along, across = {
        "left": (right, down),
        "right": (-right, down),
        "above": (down, right),
        "below": (-down, right),
    }[relation]
    return along > 1.3 * abs(across)


def _paint(
    picture: Array,
    scene_object: SceneObject,
    rng: np.random.Generator,
    x: Array,
    y: Array,
    radius: float,
    scale: float,
) -> None:
    """Draw one object with its shadow and rim into `picture`; x and y are relative to its centre."""
    angle = rng.uniform(-_MAX_ROTATION_RADIANS, _MAX_ROTATION_RADIANS)
    cosine, sine = math.cos(angle), math.sin(angle)
    across, down = cosine * x + sine * y, -sine * x + cosine * y
    distance = (
        _distance(scene_object.shape, across / radius, down / radius) * radius
    )  # in canvas units, < 0 inside
    tone = _colour(scene_object.colour, rng)
    second = tone * 0.5 if scene_object.colour != "black" else tone * 0.4 + 0.4
    rim = tone * 0.35 if scene_object.colour != "black" else tone * 0.4 + 0.5
    pattern = _pattern(scene_object.fill, rng, across, down)[..., None]
    body = tone * (1 - pattern) + second * pattern
    body = np.where((distance > -1.3)[..., None], rim, body)
    shadow = 0.35 * np.clip(0.5 - (distance - 1.5) / 3.0, 0.0, 1.0)[..., None]
    picture *= 1 - shadow
    cover = np.clip(0.5 - distance / scale, 0.0, 1.0)[..., None]
    picture *= 1 - cover
    picture += body * cover


def _colour(name: str, rng: np.random.Generator) -> Array:
    hue, saturation, value = (rng.uniform(*band) for band in _COLOUR_BANDS[name])
    return np.array(colorsys.hsv_to_rgb(hue / 360.0 % 1.0, saturation, value), dtype=np.float32)


def _distance(shape: str, x: Array, y: Array) -> Array:
    """Signed distance to the outline of a shape of radius about one, negative inside (y points down)."""
    if shape == "circle":
        return np.hypot(x, y) - 0.92
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.8
    if shape == "triangle":
        lower = y + 0.08
        return np.maximum(lower, np.abs(x) * (math.sqrt(3) / 2) - lower / 2) - 0.56
    if shape == "star":
        return _star_distance(x, y, outer=1.08, inner=0.45)
    if shape == "cross":
        upright = np.maximum(np.abs(x) - 0.32, np.abs(y) - 0.98)
        return np.minimum(upright, np.maximum(np.abs(x) - 0.98, np.abs(y) - 0.32))
    if shape == "heart":
        side = 0.54
        u, v = (x - y + 0.15) / math.sqrt(2), (-x - y + 0.15) / math.sqrt(2)
        lobes = np.minimum(np.hypot(u - side, v), np.hypot(u, v - side)) - side
        return np.minimum(lobes, np.maximum(np.abs(u), np.abs(v)) - side)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72) - 0.23
    if shape == "crescent":
        return np.maximum(np.hypot(x, y) - 0.97, 0.78 - np.hypot(x - 0.42, y))
    raise ValueError(f"unknown shape {shape!r}")


def _star_distance(x: Array, y: Array, outer: float, inner: float) -> Array:
    """Distance to the nearest edge line of a five-pointed star, one tip up."""
    sector = 2 * math.pi / 5
    angle = np.arctan2(x, -y)
    folded = np.abs(np.mod(angle + sector / 2, sector) - sector / 2)
    radius = np.hypot(x, y)
    along, across = radius * np.cos(folded), radius * np.sin(folded)
    notch_along, notch_across = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    edge_along, edge_across = notch_along - outer, notch_across
    length = math.hypot(edge_along, edge_across)
    return ((along - outer) * edge_across - across * edge_along) / length


def _pattern(fill: str, rng: np.random.Generator, x: Array, y: Array) -> Array:
    """Share of the second tone in each pixel, 0 to 1, in the frame of the object."""
    period = rng.uniform(6.0, 8.0)
    phase_x, phase_y = rng.uniform(0, 2 * math.pi, size=2)
    turn = rng.uniform(0, math.pi)
    u = (math.cos(turn) * x + math.sin(turn) * y) * (2 * math.pi / period) + phase_x
    v = (-math.sin(turn) * x + math.cos(turn) * y) * (2 * math.pi / period) + phase_y
    if fill == "solid":
        return np.zeros_like(x)
    if fill == "striped":
        wave = np.sin(u)
    elif fill == "checkered":
        wave = 1.6 * np.sin(u * 0.75) * np.sin(v * 0.75)
    elif fill == "dotted":
        wave = np.cos(u) + np.cos(v) - 0.75
    else:
        raise ValueError(f"unknown fill {fill!r}")
    return np.clip(0.5 + 1.5 * wave, 0.0, 1.0)


def _background(name: str, rng: np.random.Generator, x: Array, y: Array) -> Array:
    """Draw a background of muted colours, so that objects stand out; float32 [H, W, 3] in 0 to 1."""
    size = x.shape[0]
    tint = rng.uniform(-0.04, 0.04, size=3).astype(np.float32)

    def mix(low: tuple[float, float, float], high: tuple[float, float, float], share: Array) -> Array:
        share = np.clip(share, 0.0, 1.0)[..., None]
        return np.asarray(low, np.float32) * (1 - share) + np.asarray(high, np.float32) * share + tint

    if name == "sky":
        clouds = np.clip(2.0 * _smooth_noise(rng, size, 5) + 0.6 * _smooth_noise(rng, size, 12) - 0.3, 0, 1)
        return mix((0.48, 0.64, 0.82), (0.86, 0.89, 0.92), clouds)
    if name == "grass":
        blades = 0.5 + 0.25 * _smooth_noise(rng, size, 32) + 0.35 * _smooth_noise(rng, size, 6)
        return mix((0.24, 0.34, 0.16), (0.45, 0.54, 0.28), blades)
    if name == "sand":
        angle = rng.uniform(-0.5, 0.5)
        ripples = np.sin(
            (y * math.cos(angle) + x * math.sin(angle)) * 0.7 + 2.0 * _smooth_noise(rng, size, 4)
        )
        return mix(
            (0.70, 0.60, 0.44), (0.86, 0.78, 0.62), 0.5 + 0.35 * ripples + 0.1 * _smooth_noise(rng, size, 32)
        )
    if name == "night":
        picture = mix((0.05, 0.06, 0.14), (0.14, 0.13, 0.26), 0.5 + 0.5 * _smooth_noise(rng, size, 4))
        for star_x, star_y, glow in rng.uniform(0, 1, size=(int(rng.integers(14, 28)), 3)):
            spot = (0.5 + 0.5 * glow) * np.exp(-((x - 64 * star_x) ** 2 + (y - 64 * star_y) ** 2) / 0.9)
            picture += spot[..., None].astype(np.float32)
        return picture
    if name == "brick":
        height, width = rng.uniform(6.5, 9.0), rng.uniform(14.0, 18.0)
        course = np.floor((y + rng.uniform(0, height)) / height)
        shifted = x + rng.uniform(0, width) + 0.5 * width * np.mod(course, 2)
        mortar = np.minimum(np.mod(y + rng.uniform(0, height), height), np.mod(shifted, width)) < 1.3
        wall = mix((0.44, 0.27, 0.22), (0.60, 0.40, 0.34), 0.5 + 0.5 * _smooth_noise(rng, size, 10))
        return np.where(mortar[..., None], np.float32(0.66) + tint, wall)
    if name == "snow":
        drifts = 0.5 + 0.6 * _smooth_noise(rng, size, 4) + 0.12 * _smooth_noise(rng, size, 32)
        return mix((0.74, 0.79, 0.86), (0.92, 0.94, 0.97), drifts)
    raise ValueError(f"unknown background {name!r}")


def _smooth_noise(rng: np.random.Generator, size: int, num_cells: int) -> Array:
    """Interpolate a grid of `num_cells` + 1 random values a side to [size, size]; about -1 to 1."""
    grid = rng.uniform(-1, 1, size=(num_cells + 1, num_cells + 1)).astype(np.float32)
    weights = _interpolation(size, num_cells)
    return weights @ grid @ weights.T


@lru_cache(maxsize=64)
def _interpolation(size: int, num_cells: int) -> Array:
    """The matrix [size, num_cells + 1] that interpolates linearly between grid points."""
    position = (np.arange(size, dtype=np.float32) + 0.5) / size * num_cells
    left = np.minimum(position.astype(int), num_cells - 1)
    share = position - left
    share = share * share * (3 - 2 * share)  # smoothstep: no creases at the grid points
    weights = np.zeros((size, num_cells + 1), np.float32)
    weights[np.arange(size), left] = 1 - share
    weights[np.arange(size), left + 1] = share
    return weights
