"""`stablerep evaluate --dry_run`: the plan for a person, what the cache has, how long the rest will take."""

import dataclasses
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from stablerep.evaluation.cache.store import build_keys
from stablerep.evaluation.features import extract_features
from stablerep.evaluation.plan import Plan
from stablerep.evaluation.protocols.linear import count_augmented_images
from stablerep.evaluation.protocols.robustness import build_change

_NUM_TIMED_IMAGES = 64


class _Work(NamedTuple):
    """A line of the plan: images, and what of them the cache has and lacks."""

    name: str
    num_images: int
    cached: str
    missing: str


def describe_plan(plan: Plan) -> str:
    """The plan as text; times a batch of the test images as the measure of all."""
    config, model = plan.config, plan.model
    lines = [
        f"model       {plan.provenance.model}: {model.architecture}, {model.input_format.image_size} px, "
        f"weights {model.digest[:12]}",
        f"data        {plan.dataset.name}: {plan.dataset.targets}, {len(plan.dataset.classes)} of them",
        f"transform   {plan.provenance.transform}",
        f"protocols   {', '.join(plan.protocols)}",
        f"features    {', '.join(plan.feature_names)}",
        f"output      {plan.folder}",
        "",
        "             images  cached / to compute",
    ]
    num_images = 0
    for work in _list_work(plan):
        num_images += work.num_images if work.missing else 0
        lines.append(f"{work.name:<11} {work.num_images:>7}  {work.cached or '-'} / {work.missing or '-'}")
    seconds = _time_images(plan) * num_images / config.devices
    lines += ["", f"time        about {format_seconds(seconds)} for {num_images} images, then the probes"]
    return "\n".join([*lines, *(f"note        {note}" for note in plan.notes)])


def format_seconds(seconds: float) -> str:
    """`0 min 07 s`, `2 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _list_work(plan: Plan) -> Iterator[_Work]:
    names = plan.needed_features
    for split in plan.needed_splits:
        keys = build_keys(plan.model, plan.settings, plan.fingerprints[split], names)
        missing = [name for name in names if plan.cache is None or not plan.cache.has(keys[name])]
        cached = [name for name in names if name not in missing]
        yield _Work(split, len(plan.dataset.splits[split]), ", ".join(cached), ", ".join(missing))
    if "linear" in plan.protocols:
        num_images = count_augmented_images(plan.config, plan.dataset)
        yield _Work("linear", num_images, "", "augmented views")
    if "robustness" in plan.protocols:
        are_cached = _find_corruptions(plan)
        num_cached, num_missing = are_cached.count(True), are_cached.count(False)
        yield _Work(
            "robustness",
            num_missing * len(plan.dataset.test),
            f"{num_cached} corrupted copies" if num_cached else "",
            f"{num_missing} corrupted copies" if num_missing else "",
        )


def _find_corruptions(plan: Plan) -> list[bool]:
    """Whether the cache has the corrupted test images, for each corruption and severity."""
    config, found = plan.config.robustness, []
    for corruption in config.corruptions:
        for severity in config.severities:
            change = build_change(corruption, severity, plan.config.seed)
            (key,) = build_keys(
                plan.model, plan.settings, plan.fingerprints["test"], ["cls"], change
            ).values()
            found.append(plan.cache is not None and plan.cache.has(key))
    return found


def _time_images(plan: Plan) -> float:
    """Seconds an image, from files to features, of one process with its workers."""
    images = plan.dataset.test[:_NUM_TIMED_IMAGES]
    settings = dataclasses.replace(plan.settings, num_workers=0, error_budget_fraction=1.0)
    both, forward = 0.0, 0.0
    size = plan.model.input_format.image_size
    pixels = torch.zeros(min(len(images), settings.num_images_per_batch), 3, size, size)
    for _ in range(2):  # the first is for what is set up once
        start = time.perf_counter()
        extract_features(plan.model, images, plan.dataset, settings, description="timing")
        both = (time.perf_counter() - start) / len(images)
        start = time.perf_counter()
        for values in plan.model.extract(pixels.to(settings.device)).values():
            values.cpu()  # waits for the device
        forward = (time.perf_counter() - start) / len(pixels)
    decoding = max(0.0, both - forward)
    if plan.settings.num_workers == 0:
        return both
    return max(forward, decoding / plan.settings.num_workers)
