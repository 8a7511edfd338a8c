"""`stablerep demo`: captions, diffusion, shards, two trainings, three evaluations, one page.

It runs the commands that anyone can run, one after another, and reports what came out:

    report.html    everything, in one file that asks nothing of the network
    demo.json      every figure of it
    picture.png    the images by caption and the scores
    steps.json     what was run and how long it took; a second `stablerep demo` goes on from it
    logs/          what the commands printed

The claim is that StableRep > SimCLR > random initialisation by more than the interval. Whether it holds is
computed from the predictions and said either way; the exit code says that the demo ran, not that it holds.
"""

import importlib.util
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stablerep.demo.budget import FULL, QUICK, Budget


@dataclass(frozen=True)
class DemoConfig:
    """Where the demo goes, and how large it is."""

    output: str = "demo"
    """Folder of the demo: new, empty, or of an earlier demo, whose finished steps are kept where their
    commands are still the same."""
    quick: bool = False
    """Under two minutes on two cores: shows that everything runs; too little training for the claim."""
    model: str = "embedded"
    """The generator: embedded, a diffusers folder or a hub id."""
    num_captions: int | None = None
    """Captions from the grammar; null is 400, or 128 if quick."""
    num_steps: int | None = None
    """Optimizer steps of each training; null is 150, or 12 if quick."""
    seed: int = 0
    """Seed of captions, scenes, images, trainings and probes."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")


def run(config: DemoConfig) -> int:
    """Runs what is not done yet, and writes the report.

    Returns:
        0, whether or not the claim holds.

    Raises:
        ValueError: If the folder is no demo's, an option is out of its range, or a step fails.
        OSError: If the output cannot be written.
    """
    budget = QUICK if config.quick else FULL
    changes = {
        name: value for name in ("num_captions", "num_steps") if (value := getattr(config, name)) is not None
    }
    return run_demo(config, replace(budget, **changes))


def run_demo(config: DemoConfig, budget: Budget) -> int:
    """The demo of any size; see `run`."""
    if importlib.util.find_spec("jinja2") is None:
        raise ValueError("the report needs jinja2: pip install 'stablerep[report]'")
    from stablerep.demo.runner import format_seconds, run_steps
    from stablerep.demo.steps import plan_steps

    root = Path(config.output)
    start = time.perf_counter()
    records = run_steps(root, plan_steps(root, budget, config.model, config.seed))

    from stablerep.demo.picture import draw_picture
    from stablerep.demo.report import build_report
    from stablerep.demo.results import choose_grid, collect_results

    results = collect_results(root, budget, records, asdict(config))
    grid = choose_grid(root / "shards")
    (root / "demo.json").write_text(
        json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    (root / "picture.png").write_bytes(draw_picture(results, grid))
    (root / "report.html").write_text(build_report(results, grid), encoding="utf-8")
    print(f"\n{results['claim']['verdict']}\n")
    print(f"{root / 'report.html'} ({format_seconds(time.perf_counter() - start)})")
    return 0
