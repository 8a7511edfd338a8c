"""Settings as they may be published: without the machine's folders, passwords, and accounts of loggers.

The rules, for keys and values alike:

- What stands under a key that is called password, secret, token, api_key or credential is replaced.
- Of an address (`https://…`) user, password and query are dropped; of one of a file the last part is left.
- Of an absolute path (`/a/b`, `~/a/b`, `C:\\a\\b`, `\\\\a\\b`) the last part is left, and of a home
  folder `~`. One within a text ends at a blank.
- Of `user@host:path` the user is dropped.
- Of `trainer.logger` the classes alone are left.

Nothing else is looked for: a password elsewhere, or a name in a relative path, stays.
"""

import re
from collections.abc import Mapping
from typing import Any

_REMOVED = "[removed]"

_SECRET_KEY = re.compile(r"password|secret|token|api[_-]?key|credential", re.IGNORECASE)
_ROOT = r"(?:(?<!:)[\\/]{2,}|/(?!/)|~[\w.-]*/|[A-Za-z]:[\\/])"
_START = r"(?:(?<![\w.~*?%+$)\]}\\/-])|(?<=(?<!\S)-\w))"  # not within a relative path, but after -I
_WHOLE_PATH = re.compile(rf"(?:[\w.+-]+@)?((?:[\w.+-]+:+)*?(?:file://)?)((?:{_ROOT}.*)|~[\w.-]*)", re.DOTALL)
_USER = re.compile(r"[\w.+-]+@(?=[\w.-]+:)")
_PLACE = re.compile(rf"(?P<scheme>[\w.+-]+)://(?P<rest>\S*)|{_START}(?P<path>{_ROOT}\S*)")
_HOMES = ("home", "users")


def publish_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a run's settings that keeps to the rules above."""
    published: dict[str, Any] = _publish(settings)
    trainer = published.get("trainer")
    if isinstance(trainer, dict) and "logger" in trainer:
        loggers = trainer["logger"]
        classes = [_name_logger(logger) for logger in (loggers if isinstance(loggers, list) else [loggers])]
        trainer["logger"] = classes if isinstance(loggers, list) else classes[0]
    return published


def publish_text(text: str) -> str:
    """A text that keeps to the rules above."""
    if found := _WHOLE_PATH.fullmatch(text):  # blanks and all
        return f"{found[1]}{_last_part(found[2])}"
    return _USER.sub("", _PLACE.sub(_publish_place, text))


def _name_logger(logger: Any) -> Any:
    return {"class_path": logger.get("class_path")} if isinstance(logger, dict) else logger


def _publish(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_publish(key): _publish_under(key, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_publish(inner) for inner in value]
    return publish_text(value) if isinstance(value, str) else value


def _publish_under(key: Any, value: Any) -> Any:
    is_secret = _SECRET_KEY.search(str(key)) and value is not None and not isinstance(value, bool)
    return _REMOVED if is_secret else _publish(value)


def _publish_place(found: re.Match[str]) -> str:
    if found["path"]:
        return _last_part(found["path"])
    scheme, rest = found["scheme"], found["rest"]
    if scheme in ("file", "local") or rest.startswith("/"):
        return f"{scheme}://{_last_part(rest)}"
    user, _, place = rest.rpartition("@")  # a password may hold "/"
    if re.search(r"[?#]", user):  # no telling where it ends
        return f"{scheme}://{_REMOVED}"
    return f"{scheme}://{re.split(r'[?#]', place)[0]}"


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[\\/]", path) if part]
    if not parts:
        return path
    *folders, last = parts
    if last.startswith("~") or (folders and folders[-1].lower() in _HOMES):
        return re.sub(r"^~?[\w.@+-]*", "~", last)
    return last
