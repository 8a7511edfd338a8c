"""What of a run's settings may be published."""

import pytest

from stablerep.export.privacy import publish_settings, publish_text


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
        ("/home/alice/my project/sd15 v2", "sd15 v2"),
        ("alice@cluster:/data/my project/sd15", "cluster:sd15"),
        ("//nas/alice/sd15", "sd15"),
        ("\\\\nas\\alice\\sd15", "sd15"),
        ("file://host/home/alice/sd15", "file://sd15"),
        ("sqlite:////home/alice/runs.db", "sqlite://runs.db"),
        ("cc -I/home/alice/include -O2", "cc -Iinclude -O2"),
        ("see `/home/alice/x`, {/home/alice/x}, @/home/alice/x", "see `x`, {x}, @x"),
        ("s3://AKIA:wJalr/XUt@minio:9000/b", "s3://minio:9000/b"),
        ("https://host/c?sig=hunter2#part", "https://host/c"),
        ("https://host/c?mail=a@b&sig=hunter2", "https://[removed]"),
        ("https://alice:hunter?2@host/c", "https://[removed]"),
        ("copied from https://alice:hunter2@host/c?d to /data/e", "copied from https://host/c to e"),
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
        "hf-hub:ORG/NAME@main",
        "s3://bucket/sd15/{00..99}.tar",
        "../data/*/images and/or ${ROOT}/images",
        "tcp://10.0.0.1:29500",
        "3 / 4",
        "bf16-mixed",
        "stablerep.callbacks.OnlineProbes",
        "",
    ],
)
def test_what_tells_nothing_of_the_machine_stays(text: str) -> None:
    settings = {"a": text, "b": [1, 0.5, None, True]}
    assert publish_settings(settings) == settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/alice", "~"),
        ("/mnt/nas/home/alice/", "~"),
        ("/Users/alice", "~"),
        ("C:\\Users\\alice", "~"),
        ("\\\\nas\\home\\alice", "~"),
        ("~alice", "~"),
        ("~alice/", "~"),
        ("see /home/alice, then {/home/alice}", "see ~, then {~}"),
    ],
)
def test_a_home_folder_does_not_name_its_owner(text: str, expected: str) -> None:
    assert publish_text(text) == expected


@pytest.mark.parametrize(
    "key", ["password", "WANDB_API_KEY", "apiKey", "access-token", "secret", "credentials"]
)
@pytest.mark.parametrize("value", ["hunter2", 1234, ["hunter2"], {"value": "hunter2"}])
def test_what_is_called_a_secret_is_removed(key: str, value: object) -> None:
    callbacks = [{"class_path": "Notifier", "init_args": {key: value, "period": 2}}]
    published = [{"class_path": "Notifier", "init_args": {key: "[removed]", "period": 2}}]
    assert publish_settings({"trainer": {"callbacks": callbacks}}) == {"trainer": {"callbacks": published}}


def test_a_secret_that_is_not_there_is_not_said_to_be() -> None:
    settings = {"token": None, "use_auth_token": False}
    assert publish_settings(settings) == settings


def test_keys_are_published_as_values_are() -> None:
    assert publish_settings({"weights": {"/home/alice/sd15": 0.5, 3: 1}}) == {"weights": {"sd15": 0.5, 3: 1}}


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
