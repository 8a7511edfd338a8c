"""What is done once for a dataset, by whichever worker claims it: the fidelity report and the card."""

import contextlib
import threading
from typing import TYPE_CHECKING

from data_gen.card import write_card
from data_gen.croissant import CHECKSUMS_NAME
from data_gen.diffusion.fidelity import (
    FIDELITY_NAME,
    UnmeasuredError,
    is_fidelity_due,
    measure_plan,
    write_fidelity,
)
from data_gen.job.plan import Plan
from data_gen.job.planned_model import find_planned_model, set_num_threads
from data_gen.job.shard_job import GivenBackError
from data_gen.job.work_folder import WorkFolder
from data_gen.messages import say
from data_gen.shards import list_complete_shards

if TYPE_CHECKING:
    from data_gen.job.worker import WorkConfig

_FIDELITY = "fidelity"
"""What is claimed, like a shard, by the worker that measures."""
_MAX_FIDELITY_DEATHS = 2


def measure_fidelity(
    plan: Plan, config: "WorkConfig", work_folder: WorkFolder, stop: threading.Event
) -> bool:
    """Measures what the plan's options change, where that is due and no other worker is at it.

    What cannot be measured, or has killed `_MAX_FIDELITY_DEATHS` workers, is recorded as unmeasured: no
    shard waits for it.

    Returns:
        Whether nothing is left to measure.
    """
    if not is_fidelity_due(plan):
        return True
    is_claimed = work_folder.claim(_FIDELITY)
    deaths = work_folder.read_deaths(_FIDELITY)
    try:
        if len(deaths) >= _MAX_FIDELITY_DEATHS:
            _give_fidelity_up(plan, f"{len(deaths)} workers died of it ({deaths[-1].get('reason')})")
        elif not is_claimed:
            return False
        elif is_fidelity_due(plan):  # not published and released just now
            set_num_threads(config.num_threads)
            report = measure_plan(plan, *find_planned_model(plan, config), stop)
            plan.check_stands()
            write_fidelity(plan, report.to_dict())
            for line in report.lines():
                say(line)
    except UnmeasuredError as error:
        _give_fidelity_up(plan, str(error))
    except GivenBackError:
        return False
    finally:
        with contextlib.suppress(OSError):
            work_folder.release(_FIDELITY)
    work_folder.clear(_FIDELITY)
    return True


def _give_fidelity_up(plan: Plan, reason: str) -> None:
    plan.check_stands()
    write_fidelity(plan, {"unmeasured": reason})
    say(f"full precision is not compared with, {FIDELITY_NAME} says so: {reason}")


def describe(plan: Plan, work_folder: WorkFolder) -> None:
    """Writes the card where it is missing or out of date: the last worker does."""
    if not plan.store.exists(CHECKSUMS_NAME) and work_folder.claim("card"):
        try:
            write_card(plan.store, plan.manifest, list_complete_shards(plan.store))
        finally:
            work_folder.release("card")
        work_folder.finish()  # the others may have left meanwhile
