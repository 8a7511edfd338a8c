"""What every test shares: two threads, fixed seeds, no network, and the opt-in markers."""

import os
import random
from pathlib import Path

# Before any import of the libraries that read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # as stablerep.arguments has it, with the reason
os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries that draw from the global state are what is seeded)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Stable Diffusion pipeline with random weights that makes 16×16 images at once."""
    from tests.data_gen.datasets import save_tiny_pipeline

    folder = tmp_path_factory.mktemp("model") / "tiny-pipeline"
    save_tiny_pipeline(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine, or the person who runs the tests, has not offered."""
    offered = {"gpu": torch.cuda.is_available(), "network": os.environ.get("RUN_NETWORK_TESTS") == "1"}
    for item in items:
        for marker, is_offered in offered.items():
            if item.get_closest_marker(marker) and not is_offered:
                item.add_marker(pytest.mark.skip(reason=f"no {marker} here"))
