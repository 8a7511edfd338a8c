"""What of a run's settings may be published."""

import pytest

from stablerep.export.privacy import publish_settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/alice/secret project/sd15", "sd15"),
        ("/home/alice/sd15/", "sd15"),
        ("~/secret/sd15", "sd15"),
        ("C:\\Users\\alice\\sd15", "sd15"),
        ("file:///home/alice/sd15", "file://sd15"),
        ("simplecache::file:///home/alice/sd15", "simplecache::file://sd15"),
        ("local-dir:/home/alice/vit", "local-dir:vit"),
        ("python /home/alice/run.py --root=/home/alice/sd15", "python run.py --root=sd15"),
        ("https://alice:pa@ss@mlflow.corp:5000/api", "https://mlflow.corp:5000/api"),
        ("s3://key:secret@bucket/sd15", "s3://bucket/sd15"),
    ],
)
def test_paths_are_cut_to_their_last_part_and_addresses_lose_their_passwords(
    text: str, expected: str
) -> None:
    settings = {"data": {"roots": [{"root": text, "weight": 1.0}]}}
    assert publish_settings(settings) == {"data": {"roots": [{"root": expected, "weight": 1.0}]}}


@pytest.mark.parametrize(
    "text",
    [
        "data/sd15",
        "https://host:80/a/b",
        "hf-hub:ORG/NAME",
        "bf16-mixed",
        "stablerep.callbacks.OnlineProbes",
        "",
    ],
)
def test_what_tells_nothing_of_the_machine_stays(text: str) -> None:
    settings = {"a": text, "b": [1, 0.5, None, True]}
    assert publish_settings(settings) == settings


def test_of_loggers_the_classes_alone_are_left() -> None:
    entity = {"class_path": "WandbLogger", "init_args": {"entity": "corp"}, "dict_kwargs": {"key": "k"}}
    bare = {"class_path": "WandbLogger"}
    assert publish_settings({"trainer": {"logger": entity, "devices": 2}}) == {
        "trainer": {"logger": bare, "devices": 2}
    }
    assert publish_settings({"trainer": {"logger": [entity, entity]}}) == {
        "trainer": {"logger": [bare, bare]}
    }
    assert publish_settings({"trainer": {"logger": None}}) == {"trainer": {"logger": None}}


def test_the_settings_themselves_stay() -> None:
    settings = {
        "trainer": {"logger": {"class_path": "A", "init_args": {"b": 1}}},
        "output": "/home/alice/run",
    }
    publish_settings(settings)
    assert settings["output"] == "/home/alice/run"
    assert settings["trainer"] == {"logger": {"class_path": "A", "init_args": {"b": 1}}}
