"""The demo's steps: each is one `stablerep` command that can be run by hand as well."""

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stablerep.arguments import locate_configs
from stablerep.demo.budget import Budget

CONFIG = "configs/embedded.yaml"


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        name: Key of its record and name of its log.
        title: What people call it.
        args: The words after `stablerep`.
        outputs: Files and folders that it makes; removed before it runs anew.
        inputs: Names of the steps that it builds on.
        expected_seconds: Wall time on two cores, from which the time left is told.
        can_continue: Whether it goes on with what an interrupted run of itself left.
        salt: What its outcome depends on beside its words and inputs.
    """

    name: str
    title: str
    args: tuple[str, ...]
    outputs: tuple[Path, ...]
    inputs: tuple[str, ...]
    expected_seconds: float
    can_continue: bool = False
    salt: str = ""

    @property
    def command(self) -> str:
        """The command line, ready to be pasted."""
        return shlex.join(["stablerep", *self.args])


def plan_steps(root: Path, budget: Budget, model: str, seed: int) -> list[Step]:
    """The steps, in order.

    Args:
        root: The demo's folder.
        budget: Their sizes.
        model: The generator: `embedded`, a diffusers folder or a hub id.
        seed: Seed of each of them, >= 0.
    """
    trainings = {
        "stablerep": _plan_fit(
            "stablerep",
            "Train StableRep: the images of a caption are each other's positives",
            {
                "data.positives": "caption",
                "data.num_captions_per_rank": budget.num_captions_per_step,
                "data.num_views_per_caption": budget.num_views_per_caption,
            },
            *(root, budget, seed),
        ),
        "simclr": _plan_fit(
            "simclr",
            "Train SimCLR: two crops of one image are each other's positives",
            {
                "data.positives": "image",
                "data.num_captions_per_rank": budget.num_captions_per_simclr_step,
                "data.num_views_per_caption": 2,
            },
            *(root, budget, seed),
        ),
    }
    return [
        _plan_scenes(root, budget, seed),
        _plan_generate(root, budget, model, seed),
        *trainings.values(),
        *(_plan_evaluate(name, name, root, budget, seed) for name in trainings),
        _plan_evaluate("random", "stablerep", root, budget, seed),
    ]


def _plan_scenes(root: Path, budget: Budget, seed: int) -> Step:
    num_images = budget.num_train_scenes + budget.num_test_scenes
    options = {
        "captions": root / "captions.txt",
        "num_captions": budget.num_captions,
        "output": root / "scenes",
        "label_by": budget.label_by,
        "num_train": budget.num_train_scenes,
        "num_test": budget.num_test_scenes,
        "seed": seed,
    }
    return Step(
        name="scenes",
        title=f"Write {budget.num_captions:,} captions and render {num_images:,} labelled scenes",
        args=("scenes", *_to_words(options)),
        outputs=(root / "captions.txt", root / "scenes"),
        inputs=(),
        expected_seconds=3 + num_images / 300,
    )


def _plan_generate(root: Path, budget: Budget, model: str, seed: int) -> Step:
    options = {
        "captions": root / "captions.txt",
        "output": root / "shards",
        "generator.model": model,
        "generator.num_inference_steps": budget.num_inference_steps,
        "generator.guidance_scale": f"{budget.guidance_scale:g}",
        "generator.dtype": budget.dtype,
        "num_images_per_caption": budget.num_images_per_caption,
        "num_captions_per_shard": 64,
        "seed": seed,
    }
    return Step(
        name="generate",
        title=f"Generate {budget.num_images:,} images by diffusion, {budget.num_images_per_caption} each",
        args=("generate", *_to_words(options)),
        outputs=(root / "shards",),
        inputs=("scenes",),
        expected_seconds=8 + 0.0085 * budget.num_images * budget.num_inference_steps,
        can_continue=True,
        salt=identify_model(model),
    )


def _plan_fit(
    name: str, title: str, options: Mapping[str, object], root: Path, budget: Budget, seed: int
) -> Step:
    options = {
        "data.root": root / "shards",
        **options,
        "trainer.max_steps": budget.num_steps,
        "model.optimizer.num_warmup_steps": budget.num_warmup_steps,
        "trainer.callbacks.data": root / "scenes",
        "trainer.callbacks.every_n_steps": budget.num_steps_between_knn,
        "seed_everything": seed,
        "output": root / name,
    }
    return Step(
        name=f"fit-{name}",
        title=title,
        args=("fit", "--config", CONFIG, *_to_words(options), *budget.fit_options),
        outputs=(root / name,),
        inputs=("scenes", "generate"),
        expected_seconds=10 + budget.num_steps * budget.num_images_per_step / 350,
        salt=identify_config(CONFIG),
    )


def _plan_evaluate(name: str, trained: str, root: Path, budget: Budget, seed: int) -> Step:
    options: dict[str, object] = {
        "checkpoint": root / trained / "checkpoints" / "last.ckpt",
        "data": root / "scenes",
        "output": root / "evaluation" / name,
        # Each set of weights is evaluated once, and the demo leaves nothing outside of its folder.
        "cache": "null",
        "linear.num_epochs": budget.num_probe_epochs,
        "linear.num_views": budget.num_probe_views,
        "linear.num_images_per_batch": 256,
        "seed": seed,
    }
    titles = {"stablerep": "StableRep", "simclr": "SimCLR", "random": "the same architecture, untrained"}
    flags = ("--random_init",) if name == "random" else ()
    num_images = budget.num_train_scenes * (1 + budget.num_probe_views) + budget.num_test_scenes
    return Step(
        name=f"evaluate-{name}",
        title=f"Evaluate {titles[name]}: linear probe and k-NN on the rendered scenes",
        args=("evaluate", *_to_words(options), *flags),
        outputs=(root / "evaluation" / name,),
        inputs=("scenes", f"fit-{trained}"),
        expected_seconds=10 + num_images / 900,
    )


def _to_words(options: Mapping[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def identify_config(name: str) -> str:
    """Digest of a config file's content, of the one that `fit` would read."""
    (path,) = locate_configs([name])
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def identify_sources(*folders: Path) -> str:
    """Digest of the names and contents of the Python files in these folders; by default both packages."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in folders or (package, package.with_name("data_gen")):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def identify_model(model: str) -> str:
    """Digest of the names, sizes and times of a model folder's files; the name itself for a hub id."""
    package = Path(__file__).parents[2] / "data_gen"
    folder = package / "embedded" / "pipeline" if model == "embedded" else Path(model)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not files:
        return model
    facts = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
    text = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in facts)
    return hashlib.sha256(text.encode()).hexdigest()
