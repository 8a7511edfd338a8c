"""Reading the command line: dashes, shipped configs, and usage errors that name the nearest right option.

Nothing here imports more than the standard library, so that the front door stays fast.
"""

import difflib
import importlib
import inspect
import os
import re
import sys
from argparse import Action
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser as _Parser
else:
    _Parser = object


class UsageError(Exception):
    """A command line or config file that cannot be understood; its text is one line, the exit code is 2."""


class SuggestingErrors(_Parser):
    """Mixin for a jsonargparse parser: a usage error raises `UsageError` with the nearest right name.

    It stands first among the bases: `class FitParser(SuggestingErrors, LightningArgumentParser)`. Options are
    written out: an abbreviation is a misspelling, so that a new option never changes an old command.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `UsageError`, except in the inner parsers whose failures jsonargparse itself catches."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        # jsonargparse lists an option's classes in its message only where there are several.
        named = [action for action in parser._actions if f'"{action.dest}"' in message]
        types = " ".join(str(getattr(action, "_typehint", "")) for action in named)
        raise UsageError(explain_usage_error(message, list_option_names(parser._actions), types)) from ex


def set_parsing_rules() -> None:
    """Set what jsonargparse holds for the whole process: help from field docstrings, and no code by config.

    A config file may name a class only where an option asks for one, and never one of the standard library.
    """
    # Lightning 2.6 calls what jsonargparse 5 removes; setup.cfg keeps us below 5, so the user need not know.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    import jsonargparse

    jsonargparse.set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=[],  # giving a list at all makes the built-in one an error
    )


def use_underscores(args: Sequence[str]) -> list[str]:
    """Return `args` with underscores inside option names: `--image-format=a-b` → `--image_format=a-b`.

    What follows a bare `--` is left as it is.
    """
    end = list(args).index("--") if "--" in args else len(args)
    return [_underscored(arg) for arg in args[:end]] + list(args[end:])


def _underscored(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def fill_flags(args: Sequence[str], flags: Iterable[str]) -> list[str]:
    """Return `args` with `=true` on each of the `flags` (with their dashes) that no value follows."""
    following = [*args, "--"][1:]
    bare = set(flags)
    return [
        f"{arg}=true" if arg in bare and after.startswith("-") else arg
        for arg, after in zip(args, following, strict=True)
    ]


def locate_configs(args: Sequence[str]) -> list[str]:
    """Return `args` with each `configs/NAME.yaml` that is not in this folder replaced by the shipped file."""
    return [_located(arg) for arg in args]


def _located(arg: str) -> str:
    name, equals, value = arg.partition("=") if arg.startswith("--config=") else ("", "", arg)
    path = Path(value)
    if path.parts[:1] != ("configs",) or path.exists():
        return arg
    for root in (Path(__file__).parents[1], Path(sys.prefix) / "share" / "stablerep"):
        if (root / path).is_file():
            return f"{name}{equals}{root / path}"
    return arg


def list_option_names(actions: Iterable[Action]) -> list[str]:
    """Return the long options of a parser's actions without their leading dashes, in order."""
    return [option[2:] for action in actions for option in action.option_strings if option.startswith("--")]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most like `name`, or None when nothing is near.

    A dotted name is compared, in turn: as a whole leaf in another group (`model` for `generator.model`), by
    its leaf within its own group, and by its full spelling.
    """
    known = list(dict.fromkeys(known))
    group, _, leaf = name.rpartition(".")
    moved = [other for other in known if other.rpartition(".")[2] == leaf]
    if moved:
        return moved[0]
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == group}
    match = difflib.get_close_matches(leaf, siblings, n=1)
    if match:
        return siblings[match[0]]
    leaves = {other.rpartition(".")[2]: other for other in known}
    group_exists = bool(siblings) and bool(group)
    match = difflib.get_close_matches(name, [] if group_exists else known, n=1)
    if match:
        return match[0]
    match = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    return leaves[match[0]] if match else None


def suggest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean NAME?` for the nearest known name, or an empty string."""
    match = nearest(name, known)
    return f"; did you mean {prefix}{match}?" if match else ""


def explain_usage_error(message: str, known_options: Sequence[str], types: str = "") -> str:
    """Turn a jsonargparse error into one line that names the option and the nearest right one.

    Args:
        message: What the parser reported, often many lines.
        known_options: Every option of the parser, without leading dashes.
        types: Text that names the classes which the option takes, where `message` does not.

    Returns:
        One line without a trailing full stop.
    """
    if message.startswith("unrecognized arguments: "):
        return _explain_unrecognised(message.partition(": ")[2].split(), known_options)
    if match := re.match(r"(?:(?:Group|Subcommand) '([^']*)' does not accept o|O)ption '([^']*)'", message):
        group, option = match[1], match[2]
        nested = f"{group}.{option}"
        name = nested if group and any(o.startswith(f"{group}.") for o in known_options) else option
        return f"unknown option '{name}'{suggest(name, known_options)}"
    if match := re.search(r"argument (\S+): invalid choice: '([^']*)' \(choose from (.*)\)", message):
        choices = re.findall(r"[^\s,']+", match[3])
        return f"{match[1]}: unknown choice '{match[2]}'{suggest(match[2], choices)}"
    if match := re.match(r"the following arguments are required: (.*)", message):
        return "missing " + ", ".join(f"--{name}" for name in match[1].split(", "))
    key = re.match(r'Parser key "([^"]*)":', message)
    where = f"--{key[1]}: " if key else ""
    return where + (_explain_class(message, types) or _explain_value(message, start=key.end() if key else 0))


def _explain_unrecognised(tokens: Sequence[str], known_options: Sequence[str]) -> str:
    for token in tokens:
        if token.startswith("--"):
            name = token[2:].partition("=")[0]
            return f"unknown option --{name}{suggest(name, known_options, prefix='--')}"
    return f"unexpected argument '{' '.join(tokens)}'"


def _explain_value(message: str, start: int) -> str:
    """`expected int or null, got 'q'` where the parser listed types, else its own text on one line."""
    given = re.search(r"(?:Given value|Got value): (.*)", message)
    expected = list(dict.fromkeys(re.findall(r"Expected an? <class '(?:\w+\.)*(\w+)'>", message)))
    errors = re.search(r"Errors:\n(.*)\n\s*Given value type", message, flags=re.DOTALL)
    causes = errors[1].count("\n    - ") + 1 if errors else 1
    if given and expected and causes == len(expected):
        names = " or ".join("null" if name == "NoneType" else name for name in expected)
        return f"expected {names}, got {given[1]!r}"
    return " ".join(message[start:].split())


def _explain_class(message: str, types: str) -> str | None:
    """Explain a class path that does not exist, or an option that its class does not take."""
    if match := re.search(
        r"Problem with given class_path '([^']*)':\s*Option '([^']*)' is not accepted", message
    ):
        class_path, option = match.groups()
        parameters = list_parameters(class_path)
        return f"{class_path} has no option '{option}'{suggest(option, parameters)}"
    match = re.search(
        r"Problem with given class_path '([^']*)':|Expected a dot import path string: (\S+)", message
    )
    unknown = re.search(r"has no attribute|No module named|Expected a dot import path string", message)
    if not match or not unknown:
        return None
    class_path = match[1] or match[2]
    near = nearest_class(class_path, base_classes=re.findall(r"(?:\w+\.)+[A-Z]\w*", message + types))
    return f"unknown class '{class_path}'" + (f"; did you mean {near}?" if near else "")


def list_parameters(class_path: str) -> list[str]:
    """Return the names of a class's constructor parameters, those of its bases included."""
    found = _resolve(class_path)
    if not isinstance(found, type):
        return []
    names: dict[str, None] = {}
    for base in found.__mro__[:-1]:
        constructor: Callable[..., None] = vars(base).get("__init__", object.__init__)
        names.update(dict.fromkeys(inspect.signature(constructor).parameters))
    return [name for name in names if name not in ("self", "args", "kwargs")]


def nearest_class(class_path: str, base_classes: Iterable[str] = ()) -> str | None:
    """Return the class path most like `class_path`: in its own module, or among the known subclasses.

    Args:
        class_path: A dotted path or a bare class name that does not exist.
        base_classes: Dotted paths of classes whose already imported subclasses are candidates.
    """
    known: dict[str, str] = {}
    for base in base_classes:
        found = _resolve(base)
        if isinstance(found, type):
            known.update({cls.__name__: _public_path(cls) for cls in _all_subclasses(found)})
    module_path, _, name = class_path.rpartition(".")
    module = _resolve(module_path) if module_path else None
    members: dict[str, str] = {}
    if inspect.ismodule(module):
        members = {
            key: f"{module_path}.{key}" for key, value in vars(module).items() if isinstance(value, type)
        }
    for candidates in (members, known):
        match = difflib.get_close_matches(name, candidates, n=1)
        if match:
            return candidates[match[0]]
    return None


def _resolve(dotted: str) -> object | None:
    """Import a module or a module's member; None where there is none."""
    module_path, _, name = dotted.rpartition(".")
    try:
        return importlib.import_module(dotted)
    except ImportError:
        pass
    try:
        return getattr(importlib.import_module(module_path), name, None) if module_path else None
    except ImportError:
        return None


def _all_subclasses(base: type) -> set[type]:
    found = {base}
    children: list[type] = base.__subclasses__()
    for child in children:
        found |= _all_subclasses(child)
    return found


def _public_path(cls: type) -> str:
    """The shortest package that also shows the class: `lightning.pytorch.loggers.CSVLogger`."""
    parts = cls.__module__.split(".")
    for length in range(1, len(parts)):
        module = sys.modules.get(".".join(parts[:length]))
        if getattr(module, cls.__name__, None) is cls:
            return ".".join([*parts[:length], cls.__name__])
    return f"{cls.__module__}.{cls.__name__}"
