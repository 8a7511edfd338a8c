"""One evaluation: plan, features, protocols, output. As one process, or as each rank of a group."""

import dataclasses
import logging
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from stablerep import distributed
from stablerep.evaluation.cache.store import load_or_extract
from stablerep.evaluation.config import EvaluateConfig
from stablerep.evaluation.dry_run import describe_plan
from stablerep.evaluation.features import Features
from stablerep.evaluation.output import write_output
from stablerep.evaluation.plan import Plan, find_device, make_plan
from stablerep.evaluation.protocols import COLLECTIVE_PROTOCOLS, Evaluation, run_protocol, sort_rows
from stablerep.evaluation.reporting.markdown import build_table
from stablerep.evaluation.requirements import find_unmet, parse_requirement
from stablerep.evaluation.results import Row, write_results

_EXPECTED = (ValueError, OSError, MemoryError, torch.OutOfMemoryError, torch.linalg.LinAlgError)
logger = logging.getLogger(__name__)
_TIMEOUT = timedelta(hours=12)
"""What a rank waits for another at most: rank 0 alone hashes a set's images and trains the linear heads."""


def run(config: EvaluateConfig, command: str | None = None) -> int:
    """Evaluates as one process, or as one rank of a group that is up.

    Args:
        config: The options.
        command: What the report says was run.

    Returns:
        0; 1 if a requirement is not met or a protocol has failed.

    Raises:
        ValueError: If the data, the model or an option is wrong; the message names it.
        OSError: If a file is missing or the output cannot be written.
    """
    start = time.perf_counter()
    plan = make_plan(config)
    if config.dry_run:
        print(describe_plan(plan))
        return 0
    seconds = {"preparation": time.perf_counter() - start}
    evaluation = compute_features(plan)
    seconds["features"] = time.perf_counter() - start - seconds["preparation"]
    done = run_protocols(plan, evaluation, seconds)
    if distributed.rank() > 0:
        return 0
    seconds["total"] = time.perf_counter() - start
    failures = [f"{protocol} failed: {error}" for protocol, error in done.failures.items()]
    report = write_output(plan, evaluation, done.in_folder, seconds, command, failures)
    print(f"{report.title}\n\n{build_table(sort_rows(done.rows))}\n")
    for note in report.notes:
        print(f"note: {note}")
    print(plan.folder)
    for failure in failures:
        print(f"stablerep evaluate: {failure}", file=sys.stderr)
    unmet = _find_unmet(config, done)
    for miss in unmet:
        print(f"stablerep evaluate: not met: {miss}", file=sys.stderr)
    return 1 if unmet or failures else 0


@dataclass
class Done:
    """What the protocols gave, on rank 0.

    Args:
        rows: The scores of this run.
        in_folder: All that the folder has, those of earlier commands included.
        failures: Protocol → what stopped it.
    """

    rows: list[Row] = field(default_factory=list)
    in_folder: tuple[Row, ...] = ()
    failures: dict[str, Exception] = field(default_factory=dict)


def run_protocols(plan: Plan, evaluation: Evaluation, seconds: dict[str, float]) -> Done:
    """Runs the protocols and writes the scores of each as soon as they are there.

    A protocol that fails does not take the others with it, unless several ranks were in it.

    Args:
        plan: What to do.
        evaluation: What the protocols have to work with.
        seconds: Is given the time of each.

    Raises:
        ValueError: If the data or a setting is wrong, and there is no score of any protocol.
        OSError: If the scores cannot be written.
    """
    done = Done()
    is_first = distributed.rank() == 0
    # What all ranks take part in comes first; the rest is rank 0's, and the others leave.
    for protocol in sorted(plan.protocols, key=lambda name: name not in COLLECTIVE_PROTOCOLS):
        is_shared = protocol in COLLECTIVE_PROTOCOLS and distributed.world_size() > 1
        if not (is_first or is_shared):
            continue
        start = time.perf_counter()
        try:
            rows = run_protocol(protocol, evaluation)
        except Exception as error:
            if is_shared:
                raise
            if not isinstance(error, _EXPECTED):  # a fault of the program: where it is must be seen
                logger.exception("%s failed", protocol)
            done.failures[protocol] = error
            continue
        finally:
            seconds[protocol] = time.perf_counter() - start
        if rows:
            done.rows += rows
            done.in_folder = write_results(
                plan.folder,
                rows,
                plan.provenance,
                evaluation.features["test"].names,
                overwrite=plan.config.overwrite,
                sort=sort_rows,
            )
    if is_first and not done.rows and done.failures:
        raise next(iter(done.failures.values()))
    return done


def _find_unmet(config: EvaluateConfig, done: Done) -> list[str]:
    """The requirements that are not reached; those on what has failed are not, either."""
    unmet: list[str] = []
    for requirement in map(parse_requirement, config.require):
        try:
            unmet += map(str, find_unmet([requirement], done.rows))
        except ValueError:
            if not done.failures:
                raise
            unmet.append(f"{requirement.text}: there is no such score")
    return unmet


def compute_features(plan: Plan) -> Evaluation:
    """The features that the protocols share, from the cache or computed, on all ranks."""
    features: dict[str, Features] = {}
    for split in plan.needed_splits:
        found = load_or_extract(
            plan.model,
            plan.dataset,
            split,
            plan.settings,
            plan.cache,
            plan.fingerprints[split],
            feature_names=plan.needed_features,
        )
        if found is not None:
            features[split] = found
    return Evaluation(
        config=plan.config,
        model=plan.model,
        dataset=plan.dataset,
        settings=plan.settings,
        cache=plan.cache,
        fingerprint=plan.fingerprints["test"],
        features=features,
        feature_names=plan.feature_names,
    )


def check_devices(config: EvaluateConfig) -> None:
    """Refuses more ranks than there are accelerators.

    Raises:
        ValueError: Names both numbers.
    """
    device = find_device(config.device)
    if device.type == "cpu":
        return
    if device.index is not None:
        raise ValueError(f"device must name no index where devices is {config.devices}, got {config.device}")
    if config.devices > (num_accelerators := torch.accelerator.device_count()):
        raise ValueError(
            f"devices must be <= {num_accelerators}, the accelerators of this machine, got {config.devices}"
        )


def run_as_rank(config: EvaluateConfig, command: str) -> int:
    """Evaluates as one of the ranks that `stablerep.distributed.launch` started; see `run`."""
    rank = int(os.environ["LOCAL_RANK"])
    device = find_device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // config.devices))
    else:
        device = torch.device(device.type, rank)
        torch.accelerator.set_device_index(rank)
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, rank=rank, world_size=config.devices, timeout=_TIMEOUT)
    distributed.open_cpu_group(_TIMEOUT)
    try:
        code = run(dataclasses.replace(config, device=str(device)), command)
        dist.destroy_process_group()
        return code
    except (ValueError, OSError) as error:
        told = distributed.tell_failure(error)
        if not told.startswith(f"rank {rank}:"):
            return 1  # another rank has said it
        raise
    finally:
        distributed.close_cpu_group()
