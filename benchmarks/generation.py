"""Images per second of generation, against the loop that people write.

    python benchmarks/generation.py [--num_repeats 5] …            the embedded model on the CPU
    python benchmarks/generation.py --workers true                 one pinned worker against one on each core
    python benchmarks/generation.py --full_size true --device cuda --dtype float16 --name generation_cuda

The loop calls a diffusers pipeline once a caption for all of its images and saves each. Ours is a worker of
`stablerep generate`, from the frozen plan to the published shard and the dataset's card. Both have the same
model, dtype, scheduler, steps, guidance, captions, cores, and JPEG quality. Loading and compiling are left
out on both sides.

Each side runs in processes of its own; the sides take turns, and a ratio is that of two neighbours in time. A
turn waits for a quiet machine. One in which others had more than `MAX_FOREIGN_SHARE` of the cores is run
again, and left out if no other try was better. FLOPs are counted by torch on the pipeline itself; the peak is
that of a large matrix product in the same dtype, measured here.

`--full_size` builds Stable Diffusion 1.5's architecture with random weights: its speed, not its pictures.

Writes benchmarks/results/{name}.{json,md}.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import compress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli

from data_gen.scenes import sample_captions
from stablerep.machine import read_processor_name

RESULTS = Path(__file__).parent / "results"
MAX_FOREIGN_SHARE = 0.03
MAX_TRIES = 6
MAX_SECONDS_TO_WAIT = 60.0
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Task:
    """What both sides have in common.

    Args:
        model: "embedded", a diffusers folder or a hub id.
        num_images_per_caption: Images of each caption.
        num_inference_steps: Denoising steps.
        guidance_scale: Weight of classifier-free guidance.
        dtype: Precision of weights and latents.
        device: Where it runs.
    """

    model: str
    num_images_per_caption: int
    num_inference_steps: int
    guidance_scale: float
    dtype: Literal["float32", "bfloat16", "float16"]
    device: str


@dataclass(frozen=True)
class Side:
    """One way to make the images.

    Args:
        name: Its row.
        cores: The cores of each of its processes; one thread a core.
        num_images_per_batch: Batch of the denoiser; None is the plain loop.
        options: Further fields of the generator's config.
    """

    name: str
    cores: tuple[tuple[int, ...], ...]
    num_images_per_batch: int | None = None
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Turn:
    """What a side did in one turn, all its processes together.

    Args:
        images_per_second: Images over the wall time until the last process had finished.
        outside_share: Wall time outside the pipeline over all of it: write, hash, publish, wait.
        encode_share: CPU time of the encoding thread over that of the cores.
        foreign_share: Time of the machine's cores that went to other processes.
    """

    images_per_second: float
    outside_share: float
    encode_share: float
    foreign_share: float


def measure(
    model: str = "embedded",
    num_images_per_caption: int = 4,
    num_inference_steps: int = 20,
    guidance_scale: float = 2.0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "cpu",
    num_captions: int = 8,
    num_repeats: int = 5,
    batch_sizes: tuple[int, ...] = (16, 32),
    compiled: bool = True,
    workers: bool = False,
    full_size: bool = False,
    name: str | None = None,
) -> None:
    """Measure and print; see the module.

    Args:
        model: "embedded", a diffusers folder or a hub id.
        num_images_per_caption: Images of each caption, for the loop the batch of its calls.
        num_inference_steps: Denoising steps.
        guidance_scale: Weight of classifier-free guidance.
        dtype: Precision of weights and latents.
        device: "cpu", or an accelerator.
        num_captions: Captions of a turn.
        num_repeats: Turns of each side.
        batch_sizes: Batches of the denoiser that are tried on our side.
        compiled: Try the compiled denoiser too.
        workers: Compare one worker on one core with a worker on each.
        full_size: Build and take Stable Diffusion 1.5's architecture with random weights.
        name: Name of the result files.
    """
    cores = tuple(sorted(os.sched_getaffinity(0)))
    if workers:
        sides, default_name = sides_for_workers(cores, batch_sizes[0]), "generation_workers"
    else:
        sides, default_name = sides_for_loop(cores, batch_sizes, compiled, device), "generation"
    with tempfile.TemporaryDirectory(prefix="stablerep-benchmark-") as folder, ExitStack() as stack:
        if full_size:
            model = str(save_full_size_pipeline(Path(folder) / "stable-diffusion-1.5-random"))
        task = Task(model, num_images_per_caption, num_inference_steps, guidance_scale, dtype, device)
        gigaflops = count_gigaflops(task)
        crews = [stack.enter_context(hire(side, task, Path(folder))) for side in sides]
        captions = sample_captions(num_captions, seed=0)
        turns: dict[str, list[Turn]] = {side.name: [] for side in sides}
        peaks = []
        for repeat in range(num_repeats):
            peaks.append(measure_peak(task))
            for side, crew in zip(sides, crews, strict=True):
                turn = take_turn(crew, captions)
                turns[side.name].append(turn)
                print(
                    f"{repeat + 1}/{num_repeats} {side.name}: {turn.images_per_second:.3f} images/s",
                    flush=True,
                )
    result = {
        "task": {**asdict(task), "model": Path(model).name, "num_captions": num_captions},
        "gigaflops_per_image": gigaflops,
        "peak_gigaflops_per_second": max(peaks),
        "machine": describe_machine(device, len(cores)),
        "sides": {name: [asdict(turn) for turn in taken] for name, taken in turns.items()},
    }
    table = build_table(result)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name or default_name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / f"{name or default_name}.md").write_text(table)
    print(table)


def sides_for_loop(
    cores: tuple[int, ...], batch_sizes: Sequence[int], compiled: bool, device: str
) -> list[Side]:
    """The loop first; then ours in one process with the same cores, then in one process a core."""
    sides = [Side("loop", (cores,))]
    sides += [Side(f"ours, batch {size}", (cores,), size) for size in batch_sizes]
    first, last = batch_sizes[0], batch_sizes[-1]
    if compiled:
        sides.append(Side(f"ours, batch {last}, compiled", (cores,), last, (("compile", True),)))
    if device == "cpu" and len(cores) > 1:
        sides.append(Side(f"ours, batch {first}, a worker a core", tuple((core,) for core in cores), first))
    return sides


def sides_for_workers(cores: tuple[int, ...], batch_size: int) -> list[Side]:
    """One pinned worker, and one on each core."""
    return [
        Side("one worker", (cores[:1],), batch_size),
        Side(f"{len(cores)} workers", tuple((core,) for core in cores), batch_size),
    ]


@dataclass(frozen=True)
class Report:
    """What one process says of its part of a turn.

    Args:
        num_images: Images made.
        seconds: Wall time.
        inside_seconds: Of that, inside the pipeline.
        encode_cpu_seconds: CPU time of the encoding.
        cpu_seconds: CPU time of the whole process.
    """

    num_images: int
    seconds: float
    inside_seconds: float
    encode_cpu_seconds: float
    cpu_seconds: float


class Crew:
    """The processes of one side, loaded and warm.

    Args:
        side: What they do.
        connections: One to each.
    """

    def __init__(self, side: Side, connections: list[Connection]) -> None:
        self.side, self._connections = side, connections

    def make(self, captions: Sequence[str]) -> list[Report]:
        """Makes the images of the captions, each process an equal part."""
        num = len(self._connections)
        for index, connection in enumerate(self._connections):
            connection.send(list(captions[index::num]))
        return [connection.recv() for connection in self._connections]


@contextmanager
def hire(side: Side, task: Task, folder: Path) -> Iterator[Crew]:
    """Starts a side's processes and waits until they have loaded and warmed up."""
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    for cores in side.cores:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, side, task, cores, folder), daemon=True)
        process.start()
        theirs.close()
        connections.append(ours)
        processes.append(process)
    crew = Crew(side, connections)
    num_warm_up = max(1, (side.num_images_per_batch or 1) // task.num_images_per_caption) * len(connections)
    crew.make(sample_captions(num_warm_up, seed=1))
    yield crew
    for connection in connections:
        connection.send(None)
    for process in processes:
        process.join()


def serve(connection: Connection, side: Side, task: Task, cores: tuple[int, ...], folder: Path) -> None:
    """A process of a side: makes images of the captions that it is sent until it is sent None."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    make = build_loop(task) if side.num_images_per_batch is None else build_ours(side, task)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for turn in iter(connection.recv, None):
            output = Path(place) / f"{time.monotonic_ns()}"
            output.mkdir()
            connection.send(make(turn, output))


def build_loop(task: Task) -> Callable[[list[str], Path], Report]:
    """Loads a pipeline; what comes back is the loop that people write around it."""
    import diffusers

    from data_gen.diffusion.models import GeneratorConfig, find_model

    diffusers.utils.logging.disable_progress_bar()
    folder = find_model(GeneratorConfig(model=task.model)).folder
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, task.dtype))
    pipeline = pipeline.to(task.device)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)

    def loop(captions: list[str], output: Path) -> Report:
        start, start_cpu, inside = time.perf_counter(), time.process_time(), 0.0
        for number, caption in enumerate(captions):
            before = time.perf_counter()
            images = pipeline(
                caption,
                num_images_per_prompt=task.num_images_per_caption,
                num_inference_steps=task.num_inference_steps,
                guidance_scale=task.guidance_scale,
                generator=generator,
            ).images
            inside += time.perf_counter() - before
            for index, image in enumerate(images):
                image.save(output / f"{number:05d}_{index}.jpg", quality=JPEG_QUALITY)
        seconds = time.perf_counter() - start
        num_images = len(captions) * task.num_images_per_caption
        return Report(num_images, seconds, inside, 0.0, time.process_time() - start_cpu)

    return loop


def build_ours(side: Side, task: Task) -> Callable[[list[str], Path], Report]:
    """What comes back makes a dataset of one shard with a model that is loaded once."""
    from data_gen.diffusion.models import GeneratorConfig
    from data_gen.exit_codes import EXIT_DONE
    from data_gen.job import shard_job, worker
    from data_gen.job.generate import GenerateConfig

    load_generator = worker.load_generator
    loaded: list[Any] = []
    encode = TimedFunction(shard_job.encode_image)

    def load_once(plan: Any, config: Any) -> Any:
        if not loaded:
            loaded.append(load_generator(plan, config))
            loaded[0].pipeline = TimedPipeline(loaded[0].pipeline)
        return loaded[0]

    worker.load_generator = load_once
    shard_job.encode_image = encode

    def make(captions: list[str], output: Path) -> Report:
        (output / "captions.txt").write_text("\n".join(captions) + "\n")
        config = GenerateConfig(
            captions=str(output / "captions.txt"),
            output=str(output / "dataset"),
            generator=GeneratorConfig(
                model=task.model,
                num_inference_steps=task.num_inference_steps,
                guidance_scale=task.guidance_scale,
                dtype=task.dtype,
                device=task.device,
                **dict(side.options),
            ),
            num_images_per_caption=task.num_images_per_caption,
            num_images_per_batch=side.num_images_per_batch or 1,
            num_captions_per_shard=len(captions),
            image_quality=JPEG_QUALITY,
        )
        plan = freeze(config)
        inside = loaded[0].pipeline.seconds if loaded else 0.0
        encoding = encode.cpu_seconds
        start, start_cpu = time.perf_counter(), time.process_time()
        code = worker.work(plan, config.worker_config(), threading.Event())
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        if code != EXIT_DONE:
            raise RuntimeError(f"the worker ended with {code}")
        return Report(
            len(captions) * task.num_images_per_caption,
            seconds,
            loaded[0].pipeline.seconds - inside,
            encode.cpu_seconds - encoding,
            cpu_seconds,
        )

    return make


def freeze(config: Any) -> Any:
    """The plan of a new dataset."""
    from data_gen.diffusion.models import find_model
    from data_gen.job.freeze import draft_plan, freeze_plan
    from data_gen.storage import Store

    store = Store(config.output)
    with tempfile.TemporaryDirectory() as folder:
        draft = draft_plan(config, find_model(config.generator), {}, store, Path(folder))
        return freeze_plan(store, draft, extend=False)


class TimedPipeline:
    """A pipeline that adds up the time inside of it."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline, self.seconds = pipeline, 0.0

    def __call__(self, **arguments: Any) -> Any:
        return self._time(self._pipeline, **arguments)

    def encode_prompt(self, **arguments: Any) -> Any:
        """The pipeline's own, timed."""
        return self._time(self._pipeline.encode_prompt, **arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def _time(self, function: Callable[..., Any], **arguments: Any) -> Any:
        start = time.perf_counter()
        output = function(**arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        return output


class TimedFunction:
    """A function that adds up its thread's CPU time."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.cpu_seconds = function, 0.0

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        start = time.thread_time()
        output = self._function(*inputs, **named)
        self.cpu_seconds += time.thread_time() - start
        return output


def take_turn(crew: Crew, captions: Sequence[str]) -> Turn:
    """One turn, run again while others use the machine; of `MAX_TRIES` disturbed ones, the least."""
    tries: list[Turn] = []
    for _ in range(MAX_TRIES):
        wait_until_quiet()
        start, busy = time.perf_counter(), read_busy_seconds()
        reports = crew.make(captions)
        seconds = time.perf_counter() - start
        foreign = read_busy_seconds() - busy - sum(report.cpu_seconds for report in reports)
        longest = max(report.seconds for report in reports)
        num_used = len({core for cores in crew.side.cores for core in cores})
        tries.append(
            Turn(
                images_per_second=sum(report.num_images for report in reports) / longest,
                outside_share=1 - sum(r.inside_seconds for r in reports) / sum(r.seconds for r in reports),
                encode_share=sum(r.encode_cpu_seconds for r in reports) / (longest * num_used),
                foreign_share=max(0.0, foreign / (seconds * (os.cpu_count() or 1))),
            )
        )
        if tries[-1].foreign_share <= MAX_FOREIGN_SHARE:
            break
    return min(tries, key=lambda turn: turn.foreign_share)


def wait_until_quiet() -> None:
    """Waits for a second in which others leave the machine alone, not for ever."""
    num_cores, deadline = os.cpu_count() or 1, time.perf_counter() + MAX_SECONDS_TO_WAIT
    while time.perf_counter() < deadline:
        start, busy = time.perf_counter(), read_busy_seconds()
        time.sleep(1.0)
        seconds = time.perf_counter() - start
        if read_busy_seconds() - busy <= MAX_FOREIGN_SHARE * seconds * num_cores:
            return


def read_busy_seconds() -> float:
    """Time that the machine's cores have worked since it started, all processes together."""
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    values = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    times = dict(zip(names, map(int, values), strict=False))
    busy = sum(value for name, value in times.items() if name not in ("idle", "iowait"))
    return busy / os.sysconf("SC_CLK_TCK")


def measure_peak(task: Task) -> float:
    """GFLOP/s of the best of several large matrix products."""
    wait_until_quiet()
    is_cpu = task.device == "cpu"
    size = 1536 if is_cpu else 8192
    matrix = torch.randn(size, size, dtype=getattr(torch, task.dtype), device=task.device)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        matrix @ matrix
        if not is_cpu:
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def count_gigaflops(task: Task) -> float:
    """GFLOPs of one image, from runs of one and of two steps."""
    from torch.utils.flop_counter import FlopCounterMode

    from data_gen.diffusion.models import GeneratorConfig, find_model
    from data_gen.diffusion.pipelines import load_pipeline

    config = GeneratorConfig(model=task.model, dtype=task.dtype)
    pipeline = load_pipeline(config, find_model(config)).to(task.device)
    flops = []
    for num_steps in (1, 2):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pipeline("a", num_inference_steps=num_steps, guidance_scale=task.guidance_scale, output_type="pt")
        flops.append(counter.get_total_flops())
    return (flops[0] + (task.num_inference_steps - 1) * (flops[1] - flops[0])) / 1e9


def save_full_size_pipeline(folder: Path) -> Path:
    """Stable Diffusion 1.5's architecture with random weights, as any pipeline's folder."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    text_config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    pipeline: Any = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        ),
        text_encoder=CLIPTextModel(text_config),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
        unet=UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            layers_per_block=2,
            attention_head_dim=8,
            cross_attention_dim=768,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    return folder


def describe_machine(device: str, num_cores: int) -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "processor": read_processor_name(),
        "num_cores": num_cores,
        "accelerator": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "torch": torch.__version__,
    }


def build_table(result: dict[str, Any]) -> str:
    """The Markdown of all figures: medians, lowest and highest in brackets."""
    task, machine, sides = result["task"], result["machine"], result["sides"]
    gigaflops, peak = result["gigaflops_per_image"], result["peak_gigaflops_per_second"]
    first, *_ = sides
    quiet = {
        name: [turn["foreign_share"] <= MAX_FOREIGN_SHARE for turn in turns] for name, turns in sides.items()
    }
    num_disturbed = sum(not is_quiet for turns in quiet.values() for is_quiet in turns)
    lines = [
        f"{task['model']}, {task['num_captions']} captions × {task['num_images_per_caption']} images a turn, "
        f"{task['num_inference_steps']} steps, guidance {task['guidance_scale']:g}, {task['dtype']}, "
        f"{machine['accelerator'] or machine['processor']}, {machine['num_cores']} cores, torch "
        f"{machine['torch']}; {gigaflops:,.1f} GFLOPs an image, matrix products at {peak:,.0f} GFLOP/s; "
        f"{len(sides[first])} turns a side, {num_disturbed} of all left out as disturbed by other processes.",
        "",
        f"| side | images/s | against {first} | share of peak | outside the pipeline | encoding beside it |",
        "|---|---|---|---|---|---|",
    ]
    for name, turns in sides.items():
        kept = list(compress(turns, quiet[name]))
        pairs = zip(turns, sides[first], strict=True)
        ratios = [
            turn["images_per_second"] / loop["images_per_second"]
            for turn, loop in compress(pairs, map(all, zip(quiet[name], quiet[first], strict=True)))
        ]
        if not kept or not ratios:
            lines.append(f"| {name} | – | – | – | – | – |")
            continue
        rates = [turn["images_per_second"] for turn in kept]
        outside, encode = (
            statistics.median(turn[share] for turn in kept) for share in ("outside_share", "encode_share")
        )
        lines.append(
            f"| {name} | {_spread(rates)} | {_spread(ratios)} | "
            f"{statistics.median(rates) * gigaflops / peak:.0%} | {outside:.2%} | {encode:.2%} |"
        )
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
