"""Laws of generation, on a tiny pipeline with random weights that is loaded like any other."""

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_gen.captions import caption_id
from data_gen.diffusion.generator import (
    NUM_CAPTIONS_PER_ENCODING,
    DiffusionGenerator,
    GeneratedCaption,
    ImageRequest,
    describe_machine,
    fingerprint_id,
)
from data_gen.diffusion.models import SCHEDULERS, GeneratorConfig, find_model
from data_gen.diffusion.noise import draw_noise, image_seed
from data_gen.diffusion.pipelines import keyed_noise
from tests.data_gen.datasets import save_tiny_sdxl_pipeline, save_with_safety_checker

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TEXTS = ("a red cube", "two green spheres", "ein blauer Ring", "猫と犬", "a dog")


def ask(texts: Sequence[str] = TEXTS, num_images: int = 3) -> list[ImageRequest]:
    """The first images of each caption."""
    return [ImageRequest(caption_id(text), text, tuple(range(num_images))) for text in texts]


@pytest.fixture
def build(tiny_pipeline: Path) -> Callable[..., DiffusionGenerator]:
    def make(num_images_per_batch: int = 4, **settings: Any) -> DiffusionGenerator:
        sampling = {"model": str(tiny_pipeline), "num_inference_steps": 2, "device": "cpu", **settings}
        config = GeneratorConfig(**sampling)
        return DiffusionGenerator(config, find_model(config), num_images_per_batch)

    return make


def by_seed(generated: list[GeneratedCaption]) -> dict[str, bytes]:
    return {
        seed: image.tobytes()
        for result in generated
        for seed, image in zip(result.image_seeds, result.images, strict=True)
    }


def test_equal_seed_low_bits_do_not_collide() -> None:
    first, second = image_seed(5, "a" * 32, 0), image_seed(5 + 2**32, "a" * 32, 0)
    assert first != second
    low_bits_equal = [int(first, 16), int(first, 16) + 2**32, int(first, 16) ^ 1 << 100]
    noises = {draw_noise(f"{key:032x}", (4, 8, 8)).tobytes() for key in low_bits_equal}
    assert len(noises) == 3


def test_noise_does_not_change_from_release_to_release() -> None:
    key = image_seed(0, "a" * 32, 0)
    assert key == "b2bcb923c2f37d50a1298a3b3e668b46"
    assert image_seed(7, "a" * 32 + "-1", 3) == "7c0f7731ec6a8d451ae9cad2e24d002b"
    digest = hashlib.sha256(draw_noise(key, (4, 8, 8)).tobytes()).hexdigest()
    assert digest[:16] == "2006b4fa8adae161"


def test_noise_is_that_of_philox_with_the_whole_key() -> None:
    key = image_seed(0, caption_id(TEXTS[0]), 1)
    words = np.array([int(key, 16) % 2**64, int(key, 16) >> 64], dtype=np.uint64)
    expected = np.random.Generator(np.random.Philox(key=words)).standard_normal((4, 8), dtype=np.float32)
    np.testing.assert_array_equal(draw_noise(key, (4, 8)), expected)


def test_noise_is_standard_normal_and_independent_between_images() -> None:
    noise = np.stack([draw_noise(image_seed(0, "x", index), (4, 32, 32)).ravel() for index in range(20)])
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert np.abs(np.corrcoef(noise) - np.eye(20)).max() < 0.1


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        ("cpu", {}),
        *(
            pytest.param("cuda", settings, marks=pytest.mark.gpu)
            for settings in (
                {},
                {"dtype": "float16"},
                {"dtype": "bfloat16", "int8": True, "channels_last": True, "guidance_scale": [1.0, 4.0]},
                {"dtype": "bfloat16", "compile": True},
            )
        ),
    ],
)
def test_same_image_whatever_the_batch_mates(
    build: Callable[..., DiffusionGenerator], device: str, settings: dict[str, Any]
) -> None:
    generator = build(device=device, **settings)
    together = by_seed(list(generator.generate(ask(num_images=3), seed=0)))
    alone = by_seed(
        [*generator.generate(ask(TEXTS[3:4], 3), seed=0), *generator.generate(ask(TEXTS[:1], 3), seed=0)]
    )
    backwards = by_seed(list(generator.generate(ask(TEXTS[::-1], 2), seed=0)))
    assert len(together) == 15
    assert alone == {seed: together[seed] for seed in alone}
    assert backwards == {seed: together[seed] for seed in backwards}


def test_any_subset_of_the_images_is_made_alone(build: Callable[..., DiffusionGenerator]) -> None:
    generator = build()
    together = by_seed(list(generator.generate(ask(), seed=0)))
    wanted = [(2,), (0, 2), (1,)]
    some = [
        ImageRequest(caption_id(text), text, indices)
        for text, indices in zip(TEXTS[1:4], wanted, strict=True)
    ]
    made = list(generator.generate(some, seed=0))
    assert [result.request for result in made] == some
    assert [len(result.images) for result in made] == [1, 2, 1]
    assert by_seed(made) == {seed: together[seed] for seed in by_seed(made)}


def test_an_equal_caption_under_another_key_is_another_image(
    build: Callable[..., DiffusionGenerator],
) -> None:
    keys = [caption_id("a dog"), f"{caption_id('a dog')}-1"]
    made = by_seed(list(build().generate([ImageRequest(key, "a dog", (0, 1)) for key in keys], seed=0)))
    assert len(made) == len(set(made.values())) == 4


def test_requests_are_read_no_further_than_the_next_batches_need(
    build: Callable[..., DiffusionGenerator],
) -> None:
    read: list[int] = []

    def endless() -> Iterator[ImageRequest]:
        while True:
            read.append(len(read))
            yield ImageRequest(f"key{read[-1]}", "a dog", (0, 1))

    made = build().generate(endless(), seed=0)
    assert read == []
    for number in range(3):
        assert next(made).request.key == f"key{number}"
    assert len(read) == NUM_CAPTIONS_PER_ENCODING


def test_another_seed_caption_or_index_is_another_image(build: Callable[..., DiffusionGenerator]) -> None:
    generator = build()
    first, second = (by_seed(list(generator.generate(ask(num_images=2), seed=seed))) for seed in (0, 1))
    assert len({*first.values(), *second.values()}) == 20


def test_images_are_those_of_a_plain_call_of_the_pipeline(
    build: Callable[..., DiffusionGenerator], tiny_pipeline: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [image_seed(7, caption_id(TEXTS[0]), index) for index in range(4)]
    latents = torch.from_numpy(np.stack([draw_noise(seed, (4, 8, 8)) for seed in seeds]))
    expected = pipeline(
        [TEXTS[0]] * 4,
        latents=latents,
        num_inference_steps=2,
        guidance_scale=3.0,
        negative_prompt=["blurry"] * 4,
        output_type="np",
    ).images
    generator = build(guidance_scale=3.0, negative_prompt="blurry")
    (result,) = generator.generate(ask(TEXTS[:1], 4), seed=7)
    difference = np.abs(np.stack(result.images).astype(float) - 255 * expected)
    assert difference.max() < 1.0
    assert expected.std() > 0.01


def test_no_second_pass_at_guidance_one(
    build: Callable[..., DiffusionGenerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = {}
    for guidance_scale in (1.0, 2.0):
        generator = build(guidance_scale=guidance_scale)
        sizes: list[int] = []
        forward = generator.pipeline.unet.forward
        monkeypatch.setattr(
            generator.pipeline.unet,
            "forward",
            lambda x, *a, f=forward, s=sizes, **k: s.append(len(x)) or f(x, *a, **k),
        )
        list(generator.generate(ask(num_images=3), seed=0))
        batches[guidance_scale] = sizes
    assert batches == {1.0: [4] * 8, 2.0: [8] * 8}


def test_no_second_pass_where_no_scale_to_draw_guides(build: Callable[..., DiffusionGenerator]) -> None:
    generator, plain = build(guidance_scale=[0.5, 1.0]), build(guidance_scale=1.0)
    sizes: list[int] = []
    generator.pipeline.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    made = list(generator.generate(ask(), seed=0))
    assert set(sizes) == {4}
    assert {scale for result in made for scale in result.guidance_scales} == {0.5, 1.0}
    assert by_seed(made) == by_seed(list(plain.generate(ask(), seed=0)))


def test_a_whole_batch_is_decoded_at_once(build: Callable[..., DiffusionGenerator]) -> None:
    generator = build()
    sizes: list[int] = []
    generator.pipeline.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    list(generator.generate(ask(), seed=0))
    assert sizes == [4] * 4  # 15 images


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"guidance_scale": 1.0, "negative_prompt": "blurry"},
            r"where guidance_scale is 1 or below, got 'bl",
        ),
        ({"guidance_scale": [0.5, 1.0], "negative_prompt": "x"}, r"got 'x' at \[0.5, 1.0\]"),
    ],
)
def test_a_negative_prompt_that_nothing_leads_away_from_is_refused(
    build: Callable[..., DiffusionGenerator], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [("negative_prompt", "blurry"), ("guidance_scale", 3.0), ("num_inference_steps", 2), ("height", 16)],
)
def test_a_setting_that_the_pipeline_does_not_take_is_refused(
    build: Callable[..., DiffusionGenerator], monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    from diffusers import StableDiffusionPipeline

    whole = inspect.signature(StableDiffusionPipeline.__call__)
    rest = [parameter for parameter in whole.parameters.values() if parameter.name != name]

    def call(*_: Any, **__: Any) -> None:
        raise AssertionError("it is not run")

    call.__signature__ = whole.replace(parameters=rest)  # type: ignore[attr-defined]
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    with pytest.raises(ValueError, match=rf"^{name} must not be set for model .*StableDiffusionPipeline\)"):
        build(**{name: value})


def test_each_caption_is_encoded_once(build: Callable[..., DiffusionGenerator]) -> None:
    generator = build()
    rows: list[int] = []

    def count_rows(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        rows.append(len(inputs[0] if inputs else named["input_ids"]))

    generator.pipeline.text_encoder.register_forward_pre_hook(count_rows, with_kwargs=True)
    list(generator.generate(ask(num_images=6), seed=0))
    prompts_and_negative_prompts = [NUM_CAPTIONS_PER_ENCODING] * 2
    assert rows == prompts_and_negative_prompts


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_every_named_scheduler_gives_the_same_image_again(
    build: Callable[..., DiffusionGenerator], scheduler: str
) -> None:
    generator = build(scheduler=scheduler, num_inference_steps=3)
    assert type(generator.pipeline.scheduler).__name__ == SCHEDULERS[scheduler][0]
    first = by_seed(list(generator.generate(ask(TEXTS[:3], 2), seed=0)))
    again = by_seed(list(generator.generate(ask(TEXTS[2:3], 2), seed=0)))
    assert again == {seed: first[seed] for seed in again}
    assert len(set(first.values())) == 6


def test_size_and_dtype_are_as_asked_for(build: Callable[..., DiffusionGenerator]) -> None:
    generator = build(height=16, width=24, dtype="bfloat16")
    (result,) = generator.generate(ask(TEXTS[:1], 2), seed=0)
    assert {image.shape for image in result.images} == {(16, 24, 3)}
    assert generator.pipeline.unet.dtype == torch.bfloat16


def test_an_image_that_is_not_finite_fails_its_caption_alone(
    build: Callable[..., DiffusionGenerator],
) -> None:
    generator = build()
    latents = generator._latents
    bad = image_seed(0, caption_id(TEXTS[1]), 2)

    def poison(plans: Any) -> torch.Tensor:
        noise = latents(plans)
        for row, plan in enumerate(plans):
            if plan.seed == bad:
                noise[row] = float("nan")
        return noise

    generator._latents = poison  # type: ignore[method-assign]
    failures = [result.failure for result in generator.generate(ask(num_images=3), seed=0)]
    assert failures == [None, "non_finite", None, None, None]


def test_infinite_pixels_fail_their_caption_though_the_pipeline_clamps_them(
    build: Callable[..., DiffusionGenerator],
) -> None:
    generator = build()

    def overflow(_: Any, __: Any, decoded: torch.Tensor) -> torch.Tensor:
        decoded[1, :, :4] = float("inf")
        return decoded

    generator.pipeline.vae.decoder.register_forward_hook(overflow)
    failures = [result.failure for result in generator.generate(ask(TEXTS[:4], 2), seed=0)]
    assert failures == ["non_finite", None, "non_finite", None]


@pytest.mark.parametrize("threshold", [-2.0, 2.0])
def test_an_image_that_the_models_own_safety_checker_flags_fails_its_caption(
    tiny_pipeline: Path, tmp_path: Path, threshold: float
) -> None:
    """The similarity to each unwanted concept is in [-1, 1]: all images are flagged, or none."""
    save_with_safety_checker(tiny_pipeline, tmp_path / "model", threshold)
    config = GeneratorConfig(str(tmp_path / "model"), num_inference_steps=2, device="cpu")
    generator = DiffusionGenerator(config, find_model(config), 4)
    failures = {result.failure for result in generator.generate(ask(TEXTS[:2], 2), seed=0)}
    assert failures == ({"safety_checker"} if threshold < 0 else {None})


def test_truncated_captions_are_counted(build: Callable[..., DiffusionGenerator]) -> None:
    assert build().count_truncated([*TEXTS, "a cube " * 50]) == 1
    assert build().count_truncated([]) == 0


def test_an_sdxl_pipeline_goes_the_same_way(tiny_pipeline: Path, tmp_path: Path) -> None:
    pipeline = save_tiny_sdxl_pipeline(tmp_path, tiny_pipeline)
    config = GeneratorConfig(model=str(tmp_path), num_inference_steps=2, device="cpu")
    generator = DiffusionGenerator(config, find_model(config), 4)
    together = by_seed(list(generator.generate(ask(num_images=3), seed=0)))
    alone = by_seed(list(generator.generate(ask(TEXTS[4:], 3), seed=0)))
    assert alone == {seed: together[seed] for seed in alone}
    assert len(set(together.values())) == 15

    latents = torch.from_numpy(np.stack([draw_noise(seed, (4, 8, 8)) for seed in alone]))
    pipeline.set_progress_bar_config(disable=True)
    texts = [TEXTS[4]] * 3
    plain = pipeline(
        texts,
        latents=latents,
        num_inference_steps=2,
        guidance_scale=2.0,
        height=16,
        width=16,
        output_type="np",
    )
    ours = np.stack([np.frombuffer(pixels, np.uint8) for pixels in alone.values()]).astype(float)
    assert np.abs(ours - 255 * plain.images.reshape(3, -1)).max() < 1.0


def test_a_pipeline_of_an_unknown_family_is_prompted_with_text(
    build: Callable[..., DiffusionGenerator],
) -> None:
    generator = build()
    known = by_seed(list(generator.generate(ask(), seed=0)))
    generator._encodes_once = False
    made = by_seed(list(generator.generate(ask(), seed=0)))
    assert made.keys() == known.keys()
    for seed, pixels in made.items():  # the noise is that of `data_gen.diffusion.noise` there too
        difference = np.frombuffer(pixels, np.uint8).astype(int) - np.frombuffer(known[seed], np.uint8)
        assert np.abs(difference).max() <= 1
    alone = by_seed(list(generator.generate(ask(TEXTS[2:3]), seed=0)))
    assert alone == {seed: made[seed] for seed in alone}


def test_noise_that_is_not_one_row_an_image_is_refused(build: Callable[..., DiffusionGenerator]) -> None:
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion as module

    original = module.randn_tensor
    with keyed_noise(build().pipeline, ["0" * 32, "1" * 32]):
        first, second = (module.randn_tensor((2, 4, 8, 8)) for _ in range(2))
        assert not torch.equal(first, second)
        with pytest.raises(ValueError, match=r"draws noise of shape \[3, 4, 8, 8\] for 2 images"):
            module.randn_tensor((3, 4, 8, 8))
    assert module.randn_tensor is original


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_a_damaged_model_folder_is_named(tiny_pipeline: Path, tmp_path: Path, part: str) -> None:
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))
    (folder / part).unlink()
    config = GeneratorConfig(model=str(folder), device="cpu")
    with pytest.raises(OSError, match=r"model folder .*model cannot be loaded: "):
        DiffusionGenerator(config, find_model(config), 4)


@pytest.mark.parametrize("device", ["cuda:77", "no-device"])
def test_a_device_that_is_not_there_is_named(build: Callable[..., DiffusionGenerator], device: str) -> None:
    with pytest.raises(ValueError, match=f"generator.device must be auto, cpu or .*, got {device} "):
        build(device=device)


class SmallMemory:
    """A pipeline's `__call__` on a device that holds so many images; records the sizes that were tried."""

    def __init__(self, pipeline: Any, max_images: int, error: Exception) -> None:
        self.pipeline, self.max_images, self.error = pipeline, max_images, error
        self.tried: list[int] = []

    def __call__(self, **arguments: Any) -> Any:
        self.tried.append(len(arguments["latents"]))
        if self.tried[-1] > self.max_images:
            raise self.error
        return self.pipeline(**arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError("Unable to allocate 2.00 GiB"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit_is_halved_and_no_image_is_lost(
    build: Callable[..., DiffusionGenerator], error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = build(num_images_per_batch=8)
    generator.pipeline = SmallMemory(generator.pipeline, 3, error)
    made = list(generator.generate(ask(), seed=0))
    assert generator.pipeline.tried == [8, 4] + [2] * 8
    assert generator.num_images_per_batch == 2
    assert by_seed(made) == by_seed(list(build(num_images_per_batch=2).generate(ask(), seed=0)))
    assert "stablerep generate: a batch of 8 images does not fit into memory" in capsys.readouterr().err


def test_images_after_a_halved_batch_carry_the_new_fingerprint(
    build: Callable[..., DiffusionGenerator],
) -> None:
    generator = build(num_images_per_batch=8)
    before = generator.fingerprint()
    assert generator.fingerprints == {}
    pipeline = SmallMemory(generator.pipeline, 8, torch.OutOfMemoryError("CUDA out of memory"))
    generator.pipeline = pipeline
    results = generator.generate(ask(), seed=0)
    made = [next(results), next(results)]
    pipeline.max_images = 4
    made += results
    ids = [fingerprint for result in made for fingerprint in result.fingerprints]
    old, new = fingerprint_id(before), fingerprint_id({**before, "num_images_per_batch": 4})
    assert ids == [old] * 8 + [new] * 7
    assert generator.fingerprints == {old: before, new: generator.fingerprint()}
    assert generator.fingerprint() == {**before, "num_images_per_batch": 4}


def test_a_device_that_holds_no_image_at_all_is_named(build: Callable[..., DiffusionGenerator]) -> None:
    generator = build(num_images_per_batch=4)
    generator.pipeline = SmallMemory(generator.pipeline, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(OSError, match=r"^cpu has too little memory for a batch of one image of 16×16 pixels"):
        list(generator.generate(ask(), seed=0))


@pytest.mark.parametrize("part", ["captions", "model"])
def test_too_little_memory_for_a_part_is_the_places_fault_not_the_captions(
    build: Callable[..., DiffusionGenerator], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    from diffusers import StableDiffusionPipeline

    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    generator = build()
    monkeypatch.setattr(StableDiffusionPipeline, "to" if part == "model" else "encode_prompt", run_out)
    with pytest.raises(OSError, match=rf"has too little memory for .*{part}.* \(CUDA out of memory\)"):
        list((build() if part == "model" else generator).generate(ask(), seed=0))


def test_another_error_is_not_taken_for_a_lack_of_memory(build: Callable[..., DiffusionGenerator]) -> None:
    generator = build()
    generator.pipeline = SmallMemory(generator.pipeline, 0, RuntimeError("mat1 and mat2 do not fit"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        list(generator.generate(ask(), seed=0))
    assert generator.num_images_per_batch == 4


@pytest.mark.gpu
def test_a_batch_that_a_gpu_cannot_hold_is_halved(build: Callable[..., DiffusionGenerator]) -> None:
    generator = build(device="cuda", num_images_per_batch=64, height=512, width=512)
    before = torch.cuda.memory_allocated()
    list(generator.generate(ask(TEXTS[:1], 2), seed=0))
    needed = torch.cuda.max_memory_allocated() - before
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 0.6 * needed) / total)
    try:
        made = list(generator.generate(ask(), seed=0))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [result.failure for result in made] == [None] * 5
    assert generator.num_images_per_batch < 64


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_that_of_the_image_on_every_device(
    build: Callable[..., DiffusionGenerator], device: str
) -> None:
    here = by_seed(list(build(device=device).generate(ask(TEXTS[:2]), seed=0)))
    on_cpu = by_seed(list(build().generate(ask(TEXTS[:2]), seed=0)))
    for seed, pixels in here.items():
        difference = np.frombuffer(pixels, np.uint8).astype(int) - np.frombuffer(on_cpu[seed], np.uint8)
        assert np.abs(difference).max() <= 2


@pytest.mark.parametrize(
    "change", [{"compile": True}, {"int8": True}, {"channels_last": True}, {"dtype": "bfloat16"}]
)
def test_each_option_that_rounds_otherwise_has_a_fingerprint_of_its_own(change: dict[str, Any]) -> None:
    plain, other = (describe_machine(GeneratorConfig(**c), "cpu", 1, 4) for c in ({}, change))
    assert fingerprint_id(plain) != fingerprint_id(other)


def test_the_fingerprint_names_the_processor() -> None:
    assert len(str(describe_machine(GeneratorConfig(), "cpu", 1, 4)["device"])) > len("cpu ")


def test_the_fingerprint_is_known_without_the_model(build: Callable[..., DiffusionGenerator]) -> None:
    generator = build(num_images_per_batch=3, dtype="bfloat16")
    fingerprint = generator.fingerprint()
    assert describe_machine(generator.config, "cpu", None, 3) == fingerprint
    other = describe_machine(generator.config, "cpu", torch.get_num_threads() + 1, 3)
    assert fingerprint_id(other) != fingerprint_id(fingerprint)
    plain_json = json.dumps(fingerprint, sort_keys=True, ensure_ascii=False)
    assert fingerprint_id(fingerprint) == hashlib.sha256(plain_json.encode()).hexdigest()[:12]
