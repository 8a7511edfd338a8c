"""Settings as they may be published: without folders of the machine, passwords, and accounts of loggers."""

import re
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

_PASSWORD = re.compile(r"(?<=://)[^/?#\s]*@")
_ROOT = r"(?:/(?!/)|~[\w.-]*/|[A-Za-z]:[\\/])"
_WHOLE_PATH = re.compile(rf"((?:[\w.+-]+:+)*?(?:file://)?)({_ROOT}.*)", re.DOTALL)
_PATH_IN_TEXT = re.compile(rf"(?<![^\s'\"=:,;(\[<>|]){_ROOT}(?:[^\s\\/]+[\\/])*")


def publish_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a run's settings that tells nothing of its machine.

    Absolute paths are cut to their last part, user and password are cut out of addresses, and of
    `trainer.logger` the classes alone are left.
    """
    published: dict[str, Any] = _publish(settings)
    trainer = published.get("trainer")
    if isinstance(trainer, dict) and "logger" in trainer:
        loggers = trainer["logger"]
        classes = [_name_logger(logger) for logger in (loggers if isinstance(loggers, list) else [loggers])]
        trainer["logger"] = classes if isinstance(loggers, list) else classes[0]
    return published


def _name_logger(logger: Any) -> Any:
    return {"class_path": logger.get("class_path")} if isinstance(logger, dict) else logger


def _publish(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _publish(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_publish(inner) for inner in value]
    return _publish_text(value) if isinstance(value, str) else value


def _publish_text(text: str) -> str:
    text = _PASSWORD.sub("", text)
    if found := _WHOLE_PATH.fullmatch(text):  # blanks and all
        return f"{found[1]}{PureWindowsPath(found[2]).name}"  # which knows both kinds of slashes
    return _PATH_IN_TEXT.sub("", text)
