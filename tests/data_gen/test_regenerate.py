"""Laws of images made again: each is judged by the fingerprint that it was made again under."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_gen.diffusion.generator import DiffusionGenerator
from data_gen.verify import VerifyConfig
from data_gen.verify import run as verify


def test_images_remade_in_halved_batches_are_close_not_wrong(
    dataset_copy: Path,
    tiny_pipeline: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The batch of 4 fits once; those of 2 round otherwise, as another batch shape may."""
    run_batch, sizes = DiffusionGenerator._run, list[int]()

    def run_short_of_memory(self: DiffusionGenerator, plans: Any) -> Any:
        if self.num_images_per_batch == 4 and sizes:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(self.num_images_per_batch)
        images, failures = run_batch(self, plans)
        return (images if sizes[-1] == 4 else np.bitwise_xor(images, np.uint8(1))), failures

    monkeypatch.setattr(DiffusionGenerator, "_run", run_short_of_memory)
    config = VerifyConfig(str(dataset_copy), regenerate=1.0, model=str(tiny_pipeline), device="cpu")
    assert verify(config) == 0
    assert set(sizes) == {4, 2}
    output = capsys.readouterr()
    assert "4 are equal to the byte, 11 close (made under another fingerprint), 0 otherwise" in output.out
    assert "same fingerprint" not in output.err
