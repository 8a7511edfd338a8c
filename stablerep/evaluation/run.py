"""One evaluation: plan, features, protocols, output. As one process, or as each rank of a group."""

import dataclasses
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from stablerep import distributed
from stablerep.evaluation.cache.store import load_or_extract
from stablerep.evaluation.config import PROTOCOLS, EvaluateConfig
from stablerep.evaluation.dry_run import describe_plan
from stablerep.evaluation.features import Features
from stablerep.evaluation.output import write_output
from stablerep.evaluation.plan import Plan, find_device, make_plan
from stablerep.evaluation.protocols import COLLECTIVE_PROTOCOLS, Evaluation, run_protocol
from stablerep.evaluation.reporting.markdown import build_table
from stablerep.evaluation.requirements import find_unmet, parse_requirement
from stablerep.evaluation.results import Row

_TIMEOUT = timedelta(hours=12)
"""What a rank waits for another at most: rank 0 alone hashes a set's images and trains the linear heads."""


def run(config: EvaluateConfig, command: str | None = None) -> int:
    """Evaluates as one process, or as one rank of a group that is up.

    Args:
        config: The options.
        command: What the report says was run.

    Returns:
        0; 1 if a requirement is not met.

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
    rows: list[Row] = []
    is_first = distributed.rank() == 0
    # What all ranks take part in comes first; the rest is rank 0's, and the others leave.
    for protocol in sorted(plan.protocols, key=lambda name: name not in COLLECTIVE_PROTOCOLS):
        if is_first or protocol in COLLECTIVE_PROTOCOLS:
            protocol_start = time.perf_counter()
            rows += run_protocol(protocol, evaluation)
            seconds[protocol] = time.perf_counter() - protocol_start
    if not is_first:
        return 0
    rows.sort(key=lambda row: next(i for i, name in enumerate(PROTOCOLS) if row.protocol.startswith(name)))
    seconds["total"] = time.perf_counter() - start
    report = write_output(plan, evaluation, rows, seconds, command)
    print(f"{report.title}\n\n{build_table(rows)}\n")
    for note in report.notes:
        print(f"note: {note}")
    print(plan.folder)
    unmet = find_unmet([parse_requirement(text) for text in config.require], rows)
    for miss in unmet:
        print(f"stablerep evaluate: not met: {miss}", file=sys.stderr)
    return 1 if unmet else 0


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
