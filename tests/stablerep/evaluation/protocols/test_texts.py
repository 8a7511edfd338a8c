"""Zero-shot classification and retrieval of the verb: names of classes, several captions an image."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from stablerep.cli import main
from stablerep.evaluation.config import EvaluateConfig, ZeroShotConfig
from stablerep.evaluation.protocols.scores import list_scores
from stablerep.evaluation.protocols.texts import read_class_names
from stablerep.evaluation.sets import read_labelled_set
from stablerep.loading import load_model
from stablerep.loading.model import EvaluationTransform
from stablerep.text import TextConfig
from tests.stablerep.evaluation.evaluating import QUICK, evaluate, values_of
from tests.stablerep.models import SMALL_TEXT, save_checkpoint

EncodeImage = Callable[[str, int], bytes]
WriteTar = Callable[[Path, dict[str, bytes]], Path]
COLOURS = ("blue", "green", "red")


@pytest.fixture
def text_checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "plus.ckpt", TextConfig(**SMALL_TEXT), image_size=32)
    return tmp_path / "plus.ckpt"


@pytest.mark.e2e
def test_several_captions_an_image_are_retrieved_from_shards(
    text_checkpoint: Path, tmp_path: Path, encode_image: EncodeImage, write_tar: WriteTar
) -> None:
    """By a naive loop: any of an image's captions is a hit, as is any image of a caption."""
    captions = [[f"a {COLOURS[i % 3]} thing", f"photo number {i // 2}", f"one of {i}"] for i in range(12)]
    members = {}
    for index, own in enumerate(captions):
        members[f"{index:02d}.png"] = encode_image(COLOURS[index % 3], index)
        members[f"{index:02d}.txt"] = "\n".join(own).encode()
    write_tar(tmp_path / "data" / "test" / "0.tar", members)
    data = tmp_path / "data"
    results = evaluate(text_checkpoint, data, tmp_path / "out", "--protocols=[retrieval]")
    found = values_of(results)

    model = load_model(str(text_checkpoint))
    transform = EvaluationTransform(model.input_format)
    images = [image.decode(image.read_bytes()) for image in read_labelled_set(data).test]
    texts = sorted({text for own in captions for text in own})
    assert len(texts) == 3 + 6 + 12
    with torch.no_grad():
        pixels = torch.stack([transform(image) for image in images])
        similarities = normalize(model.encode_images(pixels)) @ normalize(model.encode_texts(texts)).T
    for k in (1, 5, 10):
        by_image = [
            any(texts[place] in own for place in row.argsort(descending=True)[:k])
            for row, own in zip(similarities, captions, strict=True)
        ]
        by_text = [
            any(text in captions[place] for place in column.argsort(descending=True)[:k])
            for column, text in zip(similarities.T, texts, strict=True)
        ]
        for direction, hits in (("image_to_text", by_image), ("text_to_image", by_text)):
            value = found[f"retrieval_{direction}", f"recall@{k}", "image_text"]
            assert value == pytest.approx(sum(hits) / len(hits))
    assert {row.n for row in results.rows} == {12, 21}


@pytest.mark.e2e
def test_classes_called_by_numbers_need_names_for_zero_shot(
    text_checkpoint: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", f"--checkpoint={text_checkpoint}", f"--data={shards}", *QUICK]
    assert main([*words, "--protocols=[zeroshot]"]) == 1
    assert "are called by numbers such as 0: zeroshot.class_names FILE gives them" in capsys.readouterr().err
    names = tmp_path / "names.txt"
    names.write_text("\n".join(COLOURS))
    option = f"--zeroshot.class_names={names}"
    by_file = evaluate(text_checkpoint, shards, tmp_path / "a", "--protocols=[zeroshot]", option)
    (shards / "classes.txt").write_text("\n".join(COLOURS))
    by_set = evaluate(text_checkpoint, shards, tmp_path / "b", "--protocols=[zeroshot]")
    assert values_of(by_file) == values_of(by_set)


def test_captions_of_some_images_alone_give_neither_retrieval_nor_alignment(
    shards: Path, write_tar: WriteTar, encode_image: EncodeImage
) -> None:
    members: dict[str, bytes] = {}
    for name, text in (("a", b"a hat"), ("b", b"a hat"), ("c", b"")):
        members |= {f"{name}.png": encode_image("red", 1), f"{name}.cls": b"1", f"{name}.txt": text}
    write_tar(shards / "test" / "00000.tar", members)
    dataset = read_labelled_set(shards)
    assert not dataset.has_captions
    config = EvaluateConfig(checkpoint="x", data="x")
    scores = list_scores(config, dataset, ["geometry"], ["cls"])
    assert {metric for _, metric, _ in scores} == {"uniformity", "rankme"}


def test_names_of_a_file_stand_for_numbers(shards: Path, tmp_path: Path) -> None:
    dataset = read_labelled_set(shards)
    with pytest.raises(ValueError, match=r"classes of .*shards are called by numbers such as 0: zeroshot"):
        read_class_names(EvaluateConfig(checkpoint="x", data="x"), dataset)
    (tmp_path / "names.txt").write_text("blue\ngreen\nred\n")
    named = ZeroShotConfig(class_names=str(tmp_path / "names.txt"))
    config = EvaluateConfig(checkpoint="x", data="x", zeroshot=named)
    assert read_class_names(config, dataset) == list(COLOURS)
