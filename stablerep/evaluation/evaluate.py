"""`stablerep evaluate`: a frozen model's features, computed once, under the protocols of the field.

    stablerep evaluate --checkpoint LAST.ckpt --data DIR --protocols all
    stablerep evaluate compare RUN_A RUN_B          two runs on the same images, example by example
    stablerep evaluate summarize RUN RUN RUN        runs of several seeds: mean and spread
    stablerep evaluate cache ls | verify | prune    the features that are kept for later runs

A run leaves, in its output folder, `results.jsonl` and `predictions.npz` (see
`stablerep.evaluation.results`), `run.json` with settings, times and what could not be read, `report.md`,
`report.html` and `model-index.yml`.

plan.py        what can be known before the work; dry_run.py tells it
run.py         features, protocols, output, as one process or as a rank
protocols/     from features to rows
output.py      from rows to files
"""

import importlib
import json
import shlex

SUBCOMMANDS = {
    ("compare",): ("stablerep.evaluation.compare", "CompareConfig", "two runs on the same images"),
    ("summarize",): ("stablerep.evaluation.summarize", "SummarizeConfig", "runs of several seeds"),
    ("cache", "ls"): ("stablerep.evaluation.cache.ls", "ListConfig", "list the features that are kept"),
    ("cache", "verify"): ("stablerep.evaluation.cache.verify", "VerifyConfig", "check the kept features"),
    ("cache", "prune"): ("stablerep.evaluation.cache.prune", "PruneConfig", "delete kept features"),
}
"""Words after the verb → module, options, help; a module is imported when its words are called."""


_LISTS = (
    "protocols",
    "features",
    "linear.base_learning_rates",
    "knn.k",
    "robustness.corruptions",
    "robustness.severities",
)
_WHOLE = ("[", "all", "null")


def main(args: list[str]) -> int:
    """Runs the verb, or one of its subcommands, on the words after it.

    Returns:
        0; 1 if a requirement is not met, a protocol has failed, or `cache verify` finds damage.

    Raises:
        UsageError: If the words cannot be understood.
        ValueError: If the data, the model or a setting is wrong; the message names it.
        OSError: If a file is missing or the output cannot be written.
    """
    if args and not args[0].startswith("-"):
        return _run_subcommand(args)
    from stablerep.cli import VERBS, parse_config
    from stablerep.evaluation.config import EvaluateConfig

    config = parse_config(
        EvaluateConfig, complete_lists(args), prog="stablerep evaluate", description=VERBS["evaluate"].help
    )
    # Not at the top: the cache's commands do without torch.
    from stablerep.distributed import launch
    from stablerep.evaluation.run import check_devices, run, run_as_rank

    command = shlex.join(["stablerep", "evaluate", *args])
    if config.devices == 1 or config.dry_run:
        return run(config, command)
    if launch.is_started_by_us():
        launch.watch_parent()
        return run_as_rank(config, command)
    check_devices(config)
    try:
        return launch.run_ranks(launch.rank_command("evaluate", args), config.devices)
    except ChildProcessError as error:  # whose advice is for trainings
        raise ChildProcessError(str(error).partition(";")[0]) from error


def complete_lists(args: list[str]) -> list[str]:
    """Single values of options that take lists: `--protocols knn,ridge` is `--protocols=[knn,ridge]`.

    `--require 'knn20>=0.55'` may be given several times; each adds a requirement.
    """
    completed: list[str] = []
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        option = name.removeprefix("--")
        if not name.startswith("--") or option not in ("require", *_LISTS):
            completed.append(word)
            continue
        if not equals and (value := next(words, "")) == "":
            completed.append(word)  # which the parser says is without a value
        elif value.startswith(_WHOLE):
            completed.append(f"{name}={value}")
        elif option == "require":
            completed.append(f"{name}+={value}")
        else:
            completed.append(f"{name}=[{value}]")
    return completed


def _run_subcommand(args: list[str]) -> int:
    from stablerep.cli import UsageError, parse_config

    words = next((words for words in SUBCOMMANDS if tuple(args[: len(words)]) == words), None)
    if words is None:
        known = ", ".join(" ".join(words) for words in SUBCOMMANDS)
        raise UsageError(
            f"unknown word '{' '.join(args[:2])}' after evaluate; there are {known}, and options"
        )
    module_name, class_name, text = SUBCOMMANDS[words]
    module = importlib.import_module(module_name)
    rest = args[len(words) :]
    folders: list[str] = []
    if words[0] != "cache":  # the folders may stand alone
        while rest and not rest[0].startswith("-"):
            folders.append(rest.pop(0))
    if words == ("compare",):
        named = [f"--{name}={folder}" for name, folder in zip("ab", folders, strict=False)]
        rest = [*named, *folders[2:], *rest]
    elif folders:
        rest = [f"--folders={json.dumps(folders)}", *rest]
    config = parse_config(
        getattr(module, class_name), rest, prog=f"stablerep evaluate {' '.join(words)}", description=text
    )
    code: int = module.run(config)
    return code
