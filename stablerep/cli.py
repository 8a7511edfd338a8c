"""The front door: `stablerep VERB [options]`.

The table below names each verb's module; the module is imported when its verb is called and not before, so
that `stablerep --help` answers at once. This is the one file that knows both packages.
"""

import dataclasses
import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from stablerep import __version__
from stablerep.arguments import (
    SuggestingErrors,
    UsageError,
    fill_flags,
    locate_configs,
    set_parsing_rules,
    suggest,
    use_underscores,
)

Config = TypeVar("Config", bound=Any)


class Verb(NamedTuple):
    """Where a verb lives.

    With a `config` class the module has `run(config) -> int`, and this file parses the class's fields.
    Without one the module has `main(args) -> int` and parses for itself.
    """

    module: str
    config: str | None
    help: str


VERBS: dict[str, Verb] = {
    "generate": Verb(
        "data_gen.job.generate", "GenerateConfig", "captions to shards of images, by a diffusion model"
    ),
    "work": Verb("data_gen.job.worker", "WorkConfig", "join a dataset's generation job as one more worker"),
    "status": Verb("data_gen.job.status", "StatusConfig", "how far a dataset's generation job has come"),
    "verify": Verb("data_gen.verify", "VerifyConfig", "check a dataset's sizes, hashes and counts"),
    "repair": Verb("data_gen.repair", "RepairConfig", "bring a dataset's folder into order after a disaster"),
    "browse": Verb("data_gen.browse", "BrowseConfig", "static pages to look through a dataset"),
    "export-dataset": Verb(
        "data_gen.export_dataset", "ExportDatasetConfig", "write a dataset in another layout"
    ),
    "scenes": Verb(
        "data_gen.scenes", "ScenesConfig", "captions and rendered images of the built-in scene grammar"
    ),
    "fit": Verb("stablerep.fit", None, "train a vision transformer on shards"),
    "evaluate": Verb(
        "stablerep.evaluation.evaluate", None, "a frozen model under the field's protocols; a report"
    ),
    "export": Verb(
        "stablerep.export.export", None, "weights where timm, transformers and open_clip load them"
    ),
    "demo": Verb("stablerep.demo", "DemoConfig", "all of it in minutes, small, with an HTML report"),
}

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        args: The words after `stablerep`; None takes them from the command line.

    Returns:
        The exit code: 0 done, 1 a failure that one line explains, 2 a command that cannot be understood, 130
        interrupted. Any other exception is a bug and is raised.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    name = words[0] if words and words[0] in VERBS else None
    try:
        if name is None:
            return _answer_without_verb(words)
        if name == "fit" and args is None:  # a process of its own: what stops a run may come while it starts
            importlib.import_module("stablerep.runs.signals").hold_signals()
        return _run_verb(name, words[1:])
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else EXIT_OK if exit_.code is None else EXIT_FAILURE
    except KeyboardInterrupt:
        return _report(name, "interrupted", EXIT_INTERRUPTED, debug)
    except UsageError as error:
        return _report(name, str(error), EXIT_USAGE, debug)
    except (ValueError, OSError) as error:
        return _report(name, _one_line(error), EXIT_FAILURE, debug)


def _run_verb(name: str, args: list[str]) -> int:
    verb = VERBS[name]
    args = locate_configs(use_underscores(args))
    set_parsing_rules()
    module = importlib.import_module(verb.module)
    if verb.config is None:
        return module.main(args) or EXIT_OK
    config = parse_config(getattr(module, verb.config), args, prog=f"stablerep {name}", description=verb.help)
    return module.run(config) or EXIT_OK


def parse_config(config_class: type[Config], args: list[str], prog: str, description: str) -> Config:
    """Parse options and `--config` files into a frozen dataclass.

    Args:
        config_class: A dataclass whose attribute docstrings are the help texts.
        args: Options with underscores, `--config FILE`, `--print_config` or `--help`. An option of type bool
            may stand alone and is true then.
        prog: What the usage line calls the command.
        description: The first line of the help.

    Raises:
        UsageError: An option, a key of a config file or a value's type is not the class's.
    """
    import jsonargparse

    class Parser(SuggestingErrors, jsonargparse.ArgumentParser):
        """A jsonargparse parser whose errors name the nearest right option."""

    parser = Parser(prog=prog, description=f"{description[0].upper()}{description[1:]}.")
    parser.add_argument("--config", action="config", metavar="FILE", help="a YAML file with these options")
    parser.add_class_arguments(config_class, None)
    flags = [
        option
        for action in parser._actions
        if getattr(action, "_typehint", None) is bool
        for option in action.option_strings
    ]
    values = parser.instantiate(parser.parse_args(fill_flags(args, flags)))
    return config_class(**{field.name: values[field.name] for field in dataclasses.fields(config_class)})


def _answer_without_verb(words: list[str]) -> int:
    """Answer `--help`, `--version` and silence; raise `UsageError` on anything else."""
    if not words:
        print(_help_text(), file=sys.stderr)
        return EXIT_USAGE
    first = words[0]
    if first in ("--help", "-h", "help"):
        print(_help_text())
        return EXIT_OK
    if first == "--version":
        print(f"stablerep {__version__}")
        return EXIT_OK
    if first.startswith("-"):
        option = first.partition("=")[0]
        if option == "--config":
            raise UsageError("--config stands after the verb: stablerep VERB --config FILE")
        if any(word in VERBS for word in words):
            raise UsageError(f"{option} stands before the verb; options follow it: stablerep VERB {option}")
        raise UsageError(
            f"unknown option {option}{suggest(option[2:], ['help', 'version', 'debug', 'config'], '--')}"
        )
    hint = suggest(first, VERBS) or f"; the verbs are {', '.join(VERBS)}"
    raise UsageError(f"unknown verb '{first}'{hint}")


def _help_text() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "usage: stablerep VERB [options]",
            "",
            "Visual representations learnt from the images that a diffusion model makes of captions.",
            "",
            "verbs:",
            *(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()),
            "",
            "options of every verb:",
            "  --help          what the verb's options mean, with units",
            "  --config FILE   read options from a YAML file; later options win",
            "  --print_config  print the options in force as YAML",
            "  --debug         show the traceback of a failure",
            "",
            "stablerep --version prints the version.",
        ]
    )


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__


def _report(verb: str | None, message: str, code: int, debug: bool) -> int:
    """Print the one line that explains a failure, after the traceback if asked; return the exit code."""
    if debug:
        traceback.print_exc()
    where = f"stablerep {verb}" if verb else "stablerep"
    print(
        f"{where}: {message}" if code == EXIT_INTERRUPTED else f"{where}: error: {message}", file=sys.stderr
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
