"""Worker processes that start in a moment: noise replaces `data_gen.diffusion.generator` and its torch.

Python runs `sitecustomize.py` from its path before anything else; it puts the stand-in into `sys.modules`.

    LIGHT_SECONDS   pause before each caption
    LIGHT_POISON    a worker that comes to this caption is killed
    LIGHT_BROKEN    a worker that comes to this caption raises
    LIGHT_BROKEN_PLACE  workers of the place with this number raise at every caption
    LIGHT_BROKEN_DEVICE  workers on this device raise at every caption
    LIGHT_FAILED    a caption that fails
    LIGHT_FAILURES  a file that gets a line for each error of these two kinds
    LIGHT_NUM_FAILURES  workers that draw wait until that file has so many lines
    LIGHT_HANG      a file; the worker that takes it away hangs at its caption
    LIGHT_HOLD      a file with a number; while it is there, workers wait at `caption NUMBER` and later ones
    LIGHT_LOG       a file that gets a line for each caption generated
    LIGHT_UNLOADED  the model cannot be loaded; the value says why
"""

import os
import sys
from pathlib import Path

_SITECUSTOMIZE = '''
import os, signal, sys, time, types


class _Finder:
    """Builds the stand-in when it is first imported, not at every start of Python."""

    def find_spec(self, name, path=None, target=None):
        if name != "data_gen.diffusion.generator":
            return None
        from importlib.machinery import ModuleSpec
        return ModuleSpec(name, self)

    def create_module(self, spec):
        from tests.data_gen.datasets import NoiseGenerator, Request

        class LightGenerator(NoiseGenerator):
            def __init__(self, config, *_):
                self.name = config.device
                if "LIGHT_UNLOADED" in os.environ:
                    raise OSError(os.environ["LIGHT_UNLOADED"])

            def generate(self, requests, seed):
                for request in requests:
                    while self.is_held(request.text):
                        time.sleep(0.02)
                    time.sleep(float(os.environ.get("LIGHT_SECONDS", "0")))
                    if request.text == os.environ.get("LIGHT_POISON"):
                        os.kill(os.getpid(), signal.SIGKILL)
                    if request.text == os.environ.get("LIGHT_BROKEN"):
                        raise RuntimeError(f"cannot draw {request.text}")
                    if self.is_broken():
                        if "LIGHT_FAILURES" in os.environ:
                            with open(os.environ["LIGHT_FAILURES"], "a") as file:
                                file.write(request.text + chr(10))
                        raise RuntimeError("this accelerator fell off the bus")
                    while self.count_failures() < int(os.environ.get("LIGHT_NUM_FAILURES", "0")):
                        time.sleep(0.02)
                    if "LIGHT_HANG" in os.environ:
                        try:
                            os.unlink(os.environ["LIGHT_HANG"])
                        except FileNotFoundError:
                            pass
                        else:
                            time.sleep(600)
                    if "LIGHT_LOG" in os.environ:
                        with open(os.environ["LIGHT_LOG"], "a") as file:
                            file.write(request.text + chr(10))
                    for made in super().generate([request], seed):
                        if request.text == os.environ.get("LIGHT_FAILED"):
                            made.failure = "safety_checker"
                        yield made

            def is_held(self, text):
                try:
                    with open(os.environ.get("LIGHT_HOLD", "")) as file:
                        return int(text.split()[-1]) >= int(file.read())
                except FileNotFoundError:
                    return False

            def is_broken(self):
                place = os.environ.get("STABLEREP_WORKER_PLACE", "").rpartition("/")[2]
                is_placed = place and place == os.environ.get("LIGHT_BROKEN_PLACE")
                return is_placed or self.name == os.environ.get("LIGHT_BROKEN_DEVICE")

            def count_failures(self):
                try:
                    with open(os.environ.get("LIGHT_FAILURES", "")) as file:
                        return len(file.readlines())
                except FileNotFoundError:
                    return 0

        module = types.ModuleType(spec.name)
        module.DiffusionGenerator = LightGenerator
        module.ImageRequest = Request
        module.describe_machine = lambda *_: NoiseGenerator().fingerprint()
        return module

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Finder())
'''


def light_environment(folder: Path, **variables: str) -> dict[str, str]:
    """Environment of a process, and of its children, that generate noise.

    Args:
        folder: Where the stand-in is written.
        variables: Of those above.
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    path = [str(folder), str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables}


def generate_command(captions: Path, output: Path, model: Path, *options: str) -> list[str]:
    """`stablerep generate` of 2 images a caption, 4 captions a shard, in a process of its own."""
    return [
        *(sys.executable, "-m", "stablerep.cli", "generate"),
        *("--captions", str(captions), "--output", str(output), "--generator.model", str(model)),
        *("--generator.device", "cpu", "--num_images_per_caption", "2", "--num_captions_per_shard", "4"),
        *("--spill_seconds", "0.001", *options),
    ]
