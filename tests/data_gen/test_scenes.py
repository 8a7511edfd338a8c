"""Laws of the scene grammar: what is drawn, what is said, and that the two never disagree."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_gen.scenes import (
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    FILLS,
    HELD_OUT_COMBINATIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Mention,
    Scene,
    attributes_of,
    describe,
    sample_captions,
    sample_scene,
    scene_rng,
)
from stablerep.cli import main

PREFIXES = ("a picture of ", "a photo of ", "an image of ", "there is ")
SUFFIXES = {
    " with stripes": "striped",
    " with dots": "dotted",
    " with a checkered pattern": "checkered",
}
NUM_SCENES = 600


def draw_scenes(num_scenes: int = NUM_SCENES) -> list[tuple[Scene, np.random.Generator]]:
    generators = [scene_rng(3, "test", index) for index in range(num_scenes)]
    return [(sample_scene(rng), rng) for rng in generators]


def split_once(text: str, names: dict[str, tuple[str, ...]]) -> tuple[str, str | None, str]:
    """(before, meaning, after) at the first of the names that stands between spaces, the longest first."""
    words = sorted(((word, name) for name, all_ in names.items() for word in all_), key=lambda w: -len(w[0]))
    for word, name in words:
        before, found, after = text.partition(f" {word} ")
        if found:
            return before, name, after
    return text, None, ""


def parse_noun_phrase(text: str) -> Mention:
    """What "a small striped red disc" says, word by word from the tables of synonyms."""
    article, _, rest = text.partition(" ")
    assert article == ("an" if rest[0] in "aeiou" else "a"), text
    said: dict[str, str | None] = {"shape": None, "colour": None, "size": None, "fill": None}
    for suffix, fill in SUFFIXES.items():
        if rest.endswith(suffix):
            rest, said["fill"] = rest.removesuffix(suffix), fill
    tables = {"size": SIZES, "fill": FILLS, "colour": COLOURS, "shape": SHAPES | {"": ("object",)}}
    for attribute, names in tables.items():  # the order of the words
        for name, synonyms in names.items():
            for synonym in synonyms:
                if f"{rest} ".startswith(f"{synonym} "):
                    assert said[attribute] is None, text
                    said[attribute], rest = name or None, rest[len(synonym) :].lstrip()
                    break
    assert rest == "", f"{text}: {rest!r} is no word of the grammar"
    return Mention(**said)


def parse(caption: str) -> tuple[list[Mention], str | None, str | None]:
    """(mentions, relation, background) of a caption, read without the code that wrote it."""
    for prefix in PREFIXES:
        caption = caption.removeprefix(prefix)
    background = None
    for name, phrases in BACKGROUNDS.items():
        for phrase in phrases:
            if caption.endswith(f" {phrase}"):
                caption, background = caption.removesuffix(f" {phrase}"), name
                break
    before, relation, after = split_once(caption, RELATIONS)
    parts = [before, after] if relation else [before]
    nouns = [noun for part in parts for half in part.split(", ") for noun in half.split(" and ")]
    return [parse_noun_phrase(noun) for noun in nouns], relation, background


def test_the_world_is_as_rich_as_promised() -> None:
    assert len(SHAPES) >= 8
    assert len(COLOURS) >= 10
    assert len(SIZES) >= 3
    assert len(FILLS) >= 4
    assert len(BACKGROUNDS) >= 6
    assert {len(scene.objects) for scene, _ in draw_scenes()} == {1, 2, 3}


def test_no_word_has_two_meanings() -> None:
    for tables in ((SHAPES, COLOURS, SIZES, FILLS), (BACKGROUNDS,), (RELATIONS,)):
        words = [word for table in tables for synonyms in table.values() for word in synonyms]
        assert len(words) == len(set(words))


def test_a_scene_is_a_function_of_seed_stream_and_index() -> None:
    def draw(seed: int, stream: str, index: int) -> tuple[Scene, str]:
        rng = scene_rng(seed, stream, index)
        scene = sample_scene(rng)
        return scene, describe(scene, rng).text

    place = (5, "train", 7)
    others = [(6, "train", 7), (5, "test", 7), (5, "train", 8)]
    assert draw(*place) == draw(*place)
    assert draw(*place) not in [draw(*other) for other in others]


def test_streams_do_not_run_into_each_other() -> None:
    drawn = {
        scene_rng(seed, stream, 0).integers(2**62) for seed in (0, 1) for stream in ("", "a", "ab", "ba")
    }
    assert len(drawn) == 8


def test_every_attribute_is_drawn_evenly() -> None:
    scenes = [sample_scene(scene_rng(0, "even", index), num_objects=1) for index in range(2000)]
    for attribute, values in CATEGORIES.items():
        if attribute == "background":
            counts = Counter(scene.background for scene in scenes)
        else:
            counts = Counter(getattr(scene.objects[0], attribute) for scene in scenes)
        expected = len(scenes) / len(values)
        assert set(counts) == set(values)
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_held_out_combinations_are_drawn_only_where_they_are_asked_for() -> None:
    assert {shape for shape, _ in HELD_OUT_COMBINATIONS} == set(SHAPES)
    assert len({colour for _, colour in HELD_OUT_COMBINATIONS}) == len(HELD_OUT_COMBINATIONS) == len(SHAPES)

    def pairs(**options: Any) -> set[tuple[str, str]]:
        scenes = [sample_scene(scene_rng(1, "pairs", index), **options) for index in range(800)]
        return {(drawn.shape, drawn.colour) for scene in scenes for drawn in scene.objects}

    everything = {(shape, colour) for shape in SHAPES for colour in COLOURS}
    assert pairs() == everything
    assert pairs(exclude=HELD_OUT_COMBINATIONS) == everything - HELD_OUT_COMBINATIONS
    assert pairs(only=HELD_OUT_COMBINATIONS) == HELD_OUT_COMBINATIONS


@pytest.mark.parametrize("num_objects", [0, 4])
def test_a_number_of_objects_out_of_range_is_refused(num_objects: int) -> None:
    with pytest.raises(ValueError, match=f"num_objects must be 1, 2 or 3, got {num_objects}"):
        sample_scene(scene_rng(0, "", 0), num_objects)


def test_a_caption_says_what_it_is_recorded_to_say_and_nothing_that_is_false() -> None:
    for scene, rng in draw_scenes():
        description = describe(scene, rng)
        mentions, relation, background = parse(description.text)
        assert tuple(mentions) == description.mentions, description.text
        assert (relation, background) == (description.relation, description.background), description.text
        assert len(mentions) == len(scene.objects)
        assert relation in (None, scene.relation)
        assert background in (None, scene.background)
        for mention, drawn in zip(mentions, scene.objects, strict=True):
            assert mention.shape is not None or mention.colour is not None
            for attribute in ("shape", "colour", "size", "fill"):
                assert getattr(mention, attribute) in (None, getattr(drawn, attribute)), description.text


def test_each_attribute_is_sometimes_said_and_sometimes_left_open() -> None:
    said = {name: Counter[bool]() for name in ("shape", "colour", "size", "fill", "background", "relation")}
    for scene, rng in draw_scenes():
        description = describe(scene, rng)
        said["background"][description.background is not None] += 1
        said["relation"][description.relation is not None] += 1
        for name in ("shape", "colour", "size", "fill"):
            said[name].update(getattr(mention, name) is not None for mention in description.mentions)
    for name, counts in said.items():
        assert min(counts[True], counts[False]) > 0.02 * NUM_SCENES, name


def test_every_synonym_is_used() -> None:
    text = " ".join(describe(scene, rng).text for scene, rng in draw_scenes(2000))
    tables = (SHAPES, COLOURS, SIZES, FILLS, BACKGROUNDS, RELATIONS)
    words = [word for table in tables for synonyms in table.values() for word in synonyms]
    assert [word for word in [*words, *SUFFIXES] if word not in text] == []


def test_captions_are_distinct_and_a_longer_list_begins_with_the_shorter() -> None:
    captions = sample_captions(500, seed=0)
    assert len(set(captions)) == 500
    assert sample_captions(100, seed=0) == captions[:100]
    assert len(set(captions) & set(sample_captions(500, seed=1))) < 50
    for caption in captions:
        parse(caption)


def test_a_number_of_captions_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="num_captions must be >= 1, got 0"):
        sample_captions(0, seed=0)


def run_scenes(*options: object) -> int:
    return main(["scenes", *map(str, options)])


def test_the_verb_writes_an_image_folder_and_captions(tmp_path: Path) -> None:
    captions, images = tmp_path / "new" / "captions.txt", tmp_path / "images"
    options = ["--captions", captions, "--num_captions", 20, "--output", images]
    assert run_scenes(*options, "--num_train", 30, "--num_test", 10, "--image_size", 32, "--seed", 4) == 0
    assert captions.read_text().splitlines() == sample_captions(20, seed=4)
    for split, num_images in (("train", 30), ("test", 10)):
        paths = sorted((images / split).rglob("*.png"), key=lambda path: path.name)
        scenes = [sample_scene(scene_rng(4, split, index), num_objects=1) for index in range(num_images)]
        assert [path.parent.name for path in paths] == [scene.objects[0].shape for scene in scenes]


def test_the_label_is_the_attribute_that_was_asked_for(tmp_path: Path) -> None:
    numbers = ("--num_train", 12, "--num_test", 1, "--image_size", 16)
    assert run_scenes("--output", tmp_path / "images", "--label_by", "background", *numbers) == 0
    paths = sorted((tmp_path / "images" / "train").rglob("*.png"), key=lambda path: path.name)
    scenes = [sample_scene(scene_rng(0, "train", index), num_objects=1) for index in range(12)]
    assert [path.parent.name for path in paths] == [scene.background for scene in scenes]


def test_attributes_are_those_of_one_object() -> None:
    scene = sample_scene(scene_rng(0, "any", 0), num_objects=1)
    assert list(attributes_of(scene)) == list(CATEGORIES)
    assert attributes_of(scene)["colour"] == scene.objects[0].colour
    with pytest.raises(ValueError, match="scene must have 1 object, got 2"):
        attributes_of(sample_scene(scene_rng(0, "any", 0), num_objects=2))


def test_the_verb_writes_the_same_pixels_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run_scenes("--output", tmp_path / name, "--num_train", 5, "--num_test", 5) == 0
    first, second = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.png")}
        for name in ("a", "b")
    )
    assert first == second
    assert len(set(first.values())) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to write: give --output FOLDER for images, --captions FILE for captions, or both"),
        (["--output={}/new", "--num_train=0"], "num_train must be >= 1, got 0"),
        (["--output={}/new", "--num_test=-1"], "num_test must be >= 1, got -1"),
        (["--output={}/new", "--image_size=15"], "image_size must be >= 16 pixels, got 15"),
        (["--captions={}/new/c.txt", "--num_captions=0"], "num_captions must be >= 1, got 0"),
        (["--captions={}/new/c.txt", "--seed=-1"], "seed must be >= 0, got -1"),
        (["--output={}/full", "--captions={}/new/c.txt"], "output must be a new or empty folder, "),
        (["--output={}/file"], "output must be a new or empty folder, "),
        (["--captions={}/file"], "captions file {}/file holds other text; it is not overwritten"),
        (["--captions={}/file/c.txt"], "{}/file"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_leaves_all_as_it_was(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    for name in ("file", "full/a"):
        (tmp_path / name).write_text("precious")
    assert run_scenes(*(option.format(tmp_path) for option in options)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stablerep scenes: error: ")
    assert message.format(tmp_path) in line
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {
        "file",
        "full",
        "full/a",
    }
    assert {(tmp_path / name).read_text() for name in ("file", "full/a")} == {"precious"}


def test_captions_that_are_there_already_are_written_again(tmp_path: Path) -> None:
    options = ["--captions", tmp_path / "captions.txt", "--num_captions", 3]
    assert run_scenes(*options) == run_scenes(*options) == 0
