"""How well the embedded generator follows its captions, and how much of what they leave open still varies.

    python benchmarks/embedded_generator.py [--model FOLDER] [--num_captions 1000] …

Fidelity: captions that never occurred in training, word for word, about scenes with one object; and captions
with the eight (shape, colour) pairs that no training picture showed. A classifier (`scene_judge.py`) says
what each picture shows; a caption's attribute is right where the judge names the value that the caption says.

Diversity: for each caption, the entropy of the judge's answers over several pictures, averaged over captions
that leave the attribute open, as a share of the same figure for rendered scenes that the caption allows (as
many pictures a caption, so that the bias of small samples is the same on both sides). A wrong answer counts
as variety too, so the share is an upper bound. Captions are drawn until every attribute is open in as many
as asked for.

Writes benchmarks/results/embedded_generator.{json,md}.
"""

import json
import platform
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import auto_cli
from numpy.typing import NDArray
from scene_judge import SceneJudge, judge_images, load_judge
from tqdm import tqdm

from data_gen.captions import caption_id
from data_gen.diffusion.generator import DiffusionGenerator, ImageRequest
from data_gen.diffusion.models import GeneratorConfig, find_model
from data_gen.embedded.examples import SceneBank
from data_gen.embedded.text import NUM_TOKENIZER_CAPTIONS, draw_training_captions
from data_gen.embedded.training import StageConfig, draws_of
from data_gen.scene_rendering import render
from data_gen.scenes import (
    CATEGORIES,
    HELD_OUT_COMBINATIONS,
    Description,
    Mention,
    Scene,
    SceneObject,
    describe,
    sample_captions,
    sample_scene,
    scene_rng,
)
from stablerep.evaluation.statistics import wilson_interval

RESULTS = Path(__file__).parent / "results"
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5)


@dataclass(frozen=True)
class Share:
    """Right answers among those that the captions ask for."""

    num_right: int
    num_asked: int

    def __str__(self) -> str:
        low, high = wilson_interval(self.num_right, self.num_asked)
        return f"{self.num_right / self.num_asked:.1%} ({low:.1%} to {high:.1%}, n = {self.num_asked})"


def measure(
    model: str = "embedded",
    num_captions: int = 1000,
    num_open_captions: int = 20,
    num_images_per_caption: int = 24,
    num_table_captions: int = 300,
    num_table_open_captions: int = 6,
    num_inference_steps: int = 20,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    name: str = "embedded_generator",
) -> None:
    """Measure and print; see the module.

    Args:
        model: "embedded" or a diffusers folder.
        num_captions: Captions of each of the two fidelity figures at guidance 2.
        num_open_captions: Captions, at least, that leave an attribute open, for each attribute's diversity.
        num_images_per_caption: Pictures of each of them.
        num_table_captions: Fidelity captions of each row of the table over guidance.
        num_table_open_captions: The same for each row.
        num_inference_steps: Denoising steps.
        dtype: Precision of the generator.
        name: Name of the result files.
    """
    started = time.time()
    judge, judge_accuracies = load_judge()
    bench = _Bench(judge, model, num_inference_steps, dtype)
    trained_on = _training_captions(bench.files.folder.parent / "training.json")
    seen = draw_descriptions("held-out-captions", num_captions, trained_on, exclude=HELD_OUT_COMBINATIONS)
    unseen = [
        d
        for d in draw_descriptions("held-out-pairs", 3 * num_captions, trained_on, only=HELD_OUT_COMBINATIONS)
        if d.mentions[0].shape is not None and d.mentions[0].colour is not None
    ][:num_captions]
    open_ended = draw_open_descriptions(num_open_captions)
    rendered = render_diversity(judge, open_ended, num_images_per_caption)
    result: dict[str, Any] = {
        "judge": judge_accuracies,
        "fidelity": bench.fidelity(seen, 2.0),
        "unseen_pairs": bench.fidelity(unseen, 2.0),
        "diversity": _shares(bench.diversity(open_ended, num_images_per_caption, 2.0), rendered),
        "guidance": [],
    }
    seconds_per_image = bench.seconds / bench.num_images
    fewer = draw_open_descriptions(num_table_open_captions)
    fewer_rendered = render_diversity(judge, fewer, num_images_per_caption)
    for scale in GUIDANCE_SCALES:
        diversity = _shares(bench.diversity(fewer, num_images_per_caption, scale), fewer_rendered)
        row = {"guidance_scale": scale, "fidelity": bench.fidelity(seen[:num_table_captions], scale)}
        result["guidance"].append(row | {"diversity": diversity})
    result["settings"] = {
        "model": model,
        "identity": bench.files.identity,
        "num_inference_steps": num_inference_steps,
        "dtype": dtype,
        "num_open_captions": _count_open(open_ended),
        "num_table_open_captions": _count_open(fewer),
        "num_images_per_caption": num_images_per_caption,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "seconds": round(time.time() - started),
        "seconds_per_image": round(seconds_per_image, 4),
    }
    RESULTS.mkdir(exist_ok=True)
    table = build_table(result)
    (RESULTS / f"{name}.json").write_text(json.dumps(_plain(result), indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(table)
    print(table)


class _Bench:
    """One loaded generator, asked at several guidance scales."""

    def __init__(
        self, judge: SceneJudge, model: str, num_inference_steps: int, dtype: Literal["float32", "bfloat16"]
    ) -> None:
        self.judge = judge
        config = GeneratorConfig(model=model, num_inference_steps=num_inference_steps, dtype=dtype)
        files = find_model(config)
        self.files = files
        self.generator = DiffusionGenerator(config, files, num_images_per_batch=32)
        self.seconds, self.num_images = 0.0, 0

    def judged(
        self, descriptions: Sequence[Description], num_images: int, guidance_scale: float
    ) -> dict[str, NDArray[np.int64]]:
        """The judge's class of every picture: a dict of [captions, num_images]."""
        started = time.perf_counter()
        self.generator.config = replace(self.generator.config, guidance_scale=guidance_scale)
        requests = [ImageRequest(caption_id(d.text), d.text, tuple(range(num_images))) for d in descriptions]
        made = self.generator.generate(requests, seed=0)
        bar = tqdm(made, f"guidance {guidance_scale:g}", len(requests), mininterval=10)
        images = np.stack([image for result in bar for image in result.images])
        self.seconds += time.perf_counter() - started
        self.num_images += len(images)
        answers = judge_images(self.judge, images)
        return {name: values.reshape(len(requests), num_images) for name, values in answers.items()}

    def fidelity(self, descriptions: Sequence[Description], guidance_scale: float) -> dict[str, Share]:
        """Share of captions whose picture has the value that they say, by attribute."""
        answers = self.judged(descriptions, 1, guidance_scale)
        right: dict[str, list[bool]] = {name: [] for name in (*CATEGORIES, "shape and colour")}
        for row, description in enumerate(descriptions):
            said = said_attributes(description)
            for attribute, value in said.items():
                right[attribute].append(bool(answers[attribute][row, 0] == _class_of(attribute, value)))
            if "shape" in said and "colour" in said:
                right["shape and colour"].append(
                    all(answers[name][row, 0] == _class_of(name, said[name]) for name in ("shape", "colour"))
                )
        return {name: Share(sum(values), len(values)) for name, values in right.items() if values}

    def diversity(
        self, descriptions: Sequence[Description], num_images: int, guidance_scale: float
    ) -> dict[str, float]:
        """Mean entropy in bits by attribute; see `entropies`."""
        return entropies(descriptions, self.judged(descriptions, num_images, guidance_scale))


def said_attributes(description: Description) -> dict[str, str]:
    """What a caption about one object says: attribute → value."""
    (mention,) = description.mentions
    values = {**vars(mention), "background": description.background}
    return {name: values[name] for name in CATEGORIES if values[name] is not None}


def open_attributes(description: Description) -> list[str]:
    """What a caption about one object leaves open."""
    return [name for name in CATEGORIES if name not in said_attributes(description)]


def draw_descriptions(
    stream: str,
    num: int,
    leave_out: Collection[str],
    exclude: Collection[tuple[str, str]] = (),
    only: Collection[tuple[str, str]] = (),
) -> list[Description]:
    """Draw distinct captions of one-object scenes that are not in `leave_out`."""
    found: dict[str, Description] = {}
    index = 0
    while len(found) < num:
        rng = scene_rng(0, stream, index)
        description = describe(sample_scene(rng, 1, exclude, only), rng)
        if description.text not in leave_out:
            found[description.text] = description
        index += 1
    return list(found.values())


def draw_open_descriptions(num_per_attribute: int) -> list[Description]:
    """Draw captions of one-object scenes until each attribute is open in `num_per_attribute` of them."""
    missing, found, index = dict.fromkeys(CATEGORIES, num_per_attribute), [], 0
    while any(num > 0 for num in missing.values()):
        rng = scene_rng(0, "diversity-captions", index)
        description = describe(sample_scene(rng, 1, HELD_OUT_COMBINATIONS), rng)
        is_open = open_attributes(description)
        if any(missing[name] > 0 for name in is_open):
            found.append(description)
            for name in is_open:
                missing[name] -= 1
        index += 1
    return found


def _count_open(descriptions: Sequence[Description]) -> dict[str, int]:
    """In how many captions each attribute is open."""
    return {name: sum(name in open_attributes(d) for d in descriptions) for name in CATEGORIES}


def entropies(descriptions: Sequence[Description], answers: dict[str, NDArray[np.int64]]) -> dict[str, float]:
    """H = −Σ p log2 p of the answers over a caption's pictures, its mean over captions that leave it open."""
    collected: dict[str, list[float]] = {name: [] for name in CATEGORIES}
    for row, description in enumerate(descriptions):
        for name in open_attributes(description):
            p = np.unique(answers[name][row], return_counts=True)[1] / answers[name].shape[1]
            collected[name].append(float(-(p * np.log2(p)).sum()))
    return {name: float(np.mean(values)) for name, values in collected.items() if values}


def render_diversity(
    judge: SceneJudge, descriptions: Sequence[Description], num_images: int
) -> dict[str, float]:
    """`entropies` of rendered scenes that the captions allow."""
    images = []
    for row, description in enumerate(descriptions):
        for copy in range(num_images):
            rng = scene_rng(row, "diversity-rendered", copy)
            images.append(render(scene_for(description, rng), rng))
    answers = judge_images(judge, np.stack(images))
    return entropies(descriptions, {n: v.reshape(len(descriptions), num_images) for n, v in answers.items()})


def scene_for(description: Description, rng: np.random.Generator) -> Scene:
    """Draw a scene that a one-object caption allows: uniform in what it leaves open, no held-out pair."""
    mention: Mention = description.mentions[0]
    while True:
        drawn = sample_scene(rng, 1)
        said = {name: value for name, value in vars(mention).items() if value is not None}
        scene_object: SceneObject = replace(drawn.objects[0], **said)
        if (scene_object.shape, scene_object.colour) not in HELD_OUT_COMBINATIONS:
            return Scene((scene_object,), description.background or drawn.background)


def _training_captions(record_path: Path) -> set[str]:
    """Every caption that any part of the model read in training, from the record that its training left."""
    record = json.loads(record_path.read_text())
    num_scenes, denoiser = record["num_scenes"], record["denoiser"]
    num_steps = denoiser["num_steps"] + record["denoiser_restart"]["num_steps"]
    text_encoder, seed = StageConfig(**record["text_encoder"]), record["seed"]
    by_encoder = (
        description.text
        for step in tqdm(range(text_encoder.num_steps), "captions of the text encoder")
        for description in draw_training_captions(draws_of(seed, "text_encoder", step), text_encoder)
    )
    bank = SceneBank(np.empty((num_scenes, 0), np.uint8), record["seed"])
    num_epochs = -(-num_steps // (num_scenes // denoiser["num_examples_per_step"]))
    by_denoiser = (
        bank.describe(index, epoch).text
        for epoch in tqdm(range(num_epochs), "captions of the denoiser")
        for index in range(num_scenes)
    )
    return {*by_encoder, *by_denoiser, *sample_captions(NUM_TOKENIZER_CAPTIONS, seed)}


def _class_of(attribute: str, value: str) -> int:
    return CATEGORIES[attribute].index(value)


def _shares(generated: dict[str, float], rendered: dict[str, float]) -> dict[str, float]:
    """Entropy of generated pictures over that of rendered ones, by attribute, and their mean."""
    shares = {name: generated[name] / rendered[name] for name in generated}
    return shares | {"mean": float(np.mean(list(shares.values())))}


def build_table(result: dict[str, Any]) -> str:
    """The Markdown of all figures."""
    settings = result["settings"]
    lines = [
        f"Model {settings['identity'][:23]}…, {settings['num_inference_steps']} steps, "
        f"{settings['dtype']}, guidance 2 unless said; intervals: Wilson's, 95 %; "
        f"{settings['seconds_per_image']} s an image on {settings['num_threads']} threads.",
        "",
        "| attribute | judge on renderings | unseen captions | unseen pairs | entropy kept (captions) |",
        "|---|---|---|---|---|",
    ]
    for name in (*CATEGORIES, "shape and colour"):
        judge = f"{result['judge'][name]:.1%}" if name in result["judge"] else "–"
        kept = "–"
        if name in result["diversity"]:
            kept = f"{result['diversity'][name]:.0%} ({settings['num_open_captions'][name]})"
        unseen = result["unseen_pairs"].get(name, "–")
        lines.append(f"| {name} | {judge} | {result['fidelity'].get(name, '–')} | {unseen} | {kept} |")
    judge_mean = sum(result["judge"].values()) / len(result["judge"])
    lines.append(f"| mean | {judge_mean:.1%} | – | – | {result['diversity']['mean']:.0%} |")
    lines += [
        "",
        "| guidance | " + " | ".join(CATEGORIES) + " | entropy kept, mean |",
        "|---|" + "---|" * (len(CATEGORIES) + 1),
    ]
    for row in result["guidance"]:
        shares = [row["fidelity"][name] for name in CATEGORIES]
        cells = [f"{share.num_right / share.num_asked:.1%}" for share in shares]
        lines.append(
            f"| {row['guidance_scale']:g} | " + " | ".join(cells) + f" | {row['diversity']['mean']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Share):
        return asdict(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
