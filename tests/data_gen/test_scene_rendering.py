"""Laws of the renderer, checked in its pixels: what is fixed is kept, what is open varies."""

import math
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from data_gen.scene_rendering import _distance, _place, render, render_image
from data_gen.scenes import (
    BACKGROUNDS,
    CATEGORIES,
    FILLS,
    RELATIONS,
    SHAPES,
    Scene,
    SceneObject,
    attributes_of,
    sample_scene,
    scene_rng,
)

Pixels = NDArray[np.uint8]


def render_one(index: int = 0, image_size: int = 64, **attributes: str) -> Pixels:
    """A scene of one object: a medium, red, solid circle on snow where `attributes` do not say otherwise."""
    described = {"shape": "circle", "colour": "red", "size": "medium", "fill": "solid", "background": "snow"}
    described |= attributes
    background = described.pop("background")
    scene = Scene((SceneObject(**described),), background)
    return render(scene, scene_rng(0, "render", index), image_size)


def red_pixels(picture: Pixels) -> NDArray[np.bool_]:
    red, green, blue = (picture[..., channel].astype(int) for channel in range(3))
    return (red > 110) & (red > 2 * green) & (red > 2 * blue)


def blue_pixels(picture: Pixels) -> NDArray[np.bool_]:
    red, green, blue = (picture[..., channel].astype(int) for channel in range(3))
    return (blue > 110) & (blue > 2 * red) & (blue > 1.3 * green)


def centre(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """(x, y) of a mask's centre of mass, pixels."""
    rows, columns = np.nonzero(mask)
    return float(columns.mean()), float(rows.mean())


def test_pixels_are_a_function_of_seed_stream_and_index() -> None:
    pictures = []
    for index in (0, 0, 1):
        rng = scene_rng(0, "pixels", index)
        pictures.append(render(sample_scene(rng), rng))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize("image_size", [16, 32, 64, 100])
def test_any_size_shows_the_same_scene(image_size: int) -> None:
    picture = render_one(image_size=image_size)
    assert picture.shape == (image_size, image_size, 3)
    assert picture.dtype == np.uint8
    small, large = centre(red_pixels(picture)), centre(red_pixels(render_one()))
    assert np.allclose(np.add(small, 0.5) / image_size, np.add(large, 0.5) / 64, atol=0.04)


def test_a_picture_below_16_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size must be >= 16 pixels, got 15"):
        render_one(image_size=15)


def test_the_pil_image_holds_the_same_pixels() -> None:
    scene = Scene((SceneObject("ring", "blue", "small", "dotted"),), "night")
    image = render_image(scene, scene_rng(0, "a", 0))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), render(scene, scene_rng(0, "a", 0)))


@pytest.mark.parametrize(("attribute", "values"), CATEGORIES.items())
def test_every_value_of_an_attribute_looks_different(attribute: str, values: tuple[str, ...]) -> None:
    pictures = [render_one(0, 64, **{"size": "large", attribute: value}).astype(int) for value in values]
    for index, picture in enumerate(pictures):
        for other in pictures[:index]:
            assert (np.abs(picture - other).max(axis=2) > 30).sum() > 40


@pytest.mark.parametrize(
    ("kind", "message"),
    [("shape", "unknown shape"), ("fill", "unknown fill"), ("background", "unknown back")],
)
def test_an_unknown_name_is_refused(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_one(0, 64, **{kind: "teapot"})


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_holds_in_the_pixels(relation: str) -> None:
    objects = (
        SceneObject("circle", "red", "medium", "solid"),
        SceneObject("square", "blue", "medium", "solid"),
        SceneObject("star", "white", "small", "solid"),
    )
    for index in range(20):
        scene = Scene(objects[: 2 + index % 2], "snow", relation)
        picture = render(scene, scene_rng(0, "relation", index))
        first, second = centre(red_pixels(picture)), centre(blue_pixels(picture))
        right, down = second[0] - first[0], second[1] - first[1]
        along, across = {
            "left": (right, down),
            "right": (-right, down),
            "above": (down, right),
            "below": (-down, right),
        }[relation]
        assert along > abs(across)


@pytest.mark.parametrize("shape", SHAPES)
def test_objects_lie_within_the_picture(shape: str) -> None:
    """At least 98 % of the area at any rotation; the tip of a large triangle may touch the frame."""
    steps = np.linspace(-1.4, 1.4, 71, dtype=np.float32)
    x, y = np.meshgrid(steps, steps)
    inside = _distance(shape, x, y) <= 0
    x, y = x[inside], y[inside]
    for index in range(60):
        rng = scene_rng(0, "place", index)
        scene = sample_scene(rng, num_objects=1 + index % 3)
        for centre_x, centre_y, radius in _place(scene, rng):
            angle = rng.uniform(-math.pi, math.pi) * 35 / 180
            across = centre_x + radius * (math.cos(angle) * x - math.sin(angle) * y)
            down = centre_y + radius * (math.sin(angle) * x + math.cos(angle) * y)
            assert ((across > 0) & (across < 64) & (down > 0) & (down < 64)).mean() > 0.98


@pytest.mark.parametrize("num_objects", [2, 3])
def test_objects_stand_apart(num_objects: int) -> None:
    for index in range(100):
        rng = scene_rng(0, "apart", index)
        spots = _place(sample_scene(rng, num_objects), rng)
        for second, (x, y, radius) in enumerate(spots):
            for other_x, other_y, other_radius in spots[:second]:
                assert math.hypot(x - other_x, y - other_y) > radius + other_radius


def test_sizes_are_told_apart_by_area() -> None:
    areas = {
        size: [int(red_pixels(render_one(index, size=size)).sum()) for index in range(20)]
        for size in ("small", "medium", "large")
    }
    assert max(areas["small"]) < min(areas["medium"])
    assert max(areas["medium"]) < min(areas["large"])


def test_place_varies_between_pictures_of_one_caption() -> None:
    centres = np.array([centre(red_pixels(render_one(index, size="small"))) for index in range(60)])
    assert centres.std(axis=0).min() > 10
    assert centres.min() < 16
    assert centres.max() > 48


def test_rotation_varies_between_pictures_of_one_caption() -> None:
    """The second moments of a cross's top half turn with it."""
    tilts = []
    for index in range(30):
        mask = red_pixels(render_one(index, shape="triangle", size="large"))
        rows, columns = np.nonzero(mask)
        top = rows <= np.quantile(rows, 0.1)
        tilts.append(columns[top].mean() - columns.mean())
    assert np.std(tilts) > 3


def test_hue_and_light_vary_between_pictures_of_one_caption() -> None:
    pictures = [render_one(index, colour="green", background="sky") for index in range(30)]
    greens = [
        picture[(picture[..., 1] > 1.5 * picture[..., 0]) & (picture[..., 1] > 1.5 * picture[..., 2])]
        for picture in pictures
    ]
    tones = np.array([np.median(pixels, axis=0) for pixels in greens if len(pixels)])
    assert len(tones) > 20
    assert tones.std(axis=0).min() > 5
    corners = np.array([picture[:4, :4].mean() for picture in pictures])
    assert corners.std() > 5


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("fill", FILLS)
def test_texture_varies_between_pictures_of_one_caption(background: str, fill: str) -> None:
    first, second = (render_one(index, background=background, fill=fill).astype(int) for index in (0, 1))
    assert np.abs(first - second).mean() > 4


@cache
def pixels_and_attributes() -> tuple[NDArray[np.float64], list[dict[str, str]]]:
    pixels, attributes = [], []
    for index in range(1500):
        rng = scene_rng(0, "probe", index)
        scene = sample_scene(rng, num_objects=1)
        picture = render(scene, rng, image_size=32).reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
        pixels.append(picture.ravel() / 255)
        attributes.append(attributes_of(scene))
    return np.array(pixels), attributes


@pytest.mark.parametrize(("attribute", "bound"), [("shape", 0.25), ("colour", 0.5), ("fill", 0.35)])
def test_a_linear_probe_on_raw_pixels_does_badly(attribute: str, bound: float) -> None:
    from sklearn.linear_model import RidgeClassifier

    pixels, attributes = pixels_and_attributes()
    labels = [values[attribute] for values in attributes]
    for alpha in (10.0, 100.0, 1000.0):
        probe = RidgeClassifier(alpha=alpha).fit(pixels[:1000], labels[:1000])
        assert probe.score(pixels[1000:], labels[1000:]) < bound
