"""What tests build by hand: a tokenizer, a tiny pipeline, a plan, a dataset without a model."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from data_gen.diffusion.noise import draw_noise, image_seed
from data_gen.shard_writer import ShardWriter, write_manifest
from data_gen.shards import SCHEMA_VERSION, DatasetManifest, Sample, Shard, hash_settings

FINGERPRINT = "0123456789ab"


@dataclass(frozen=True)
class Request:
    """Stands in for data_gen.diffusion.generator.ImageRequest."""

    key: str
    text: str
    image_indices: tuple[int, ...]


class NoiseGenerator:
    """Stands in for DiffusionGenerator where torch would only cost time: an image is its own noise."""

    def __init__(self, *_: Any) -> None:
        pass

    device = SimpleNamespace(type="cpu")
    fingerprints: ClassVar = {FINGERPRINT: {"device": "none"}}

    def generate(self, requests: Iterable[Any], seed: int) -> Iterator[Any]:
        for request in requests:
            seeds = tuple(image_seed(seed, request.key, index) for index in request.image_indices)
            images = tuple(
                (draw_noise(key, (8, 8, 3)) * 50 + 128).clip(0, 255).astype("uint8") for key in seeds
            )
            yield SimpleNamespace(
                request=request,
                images=images,
                image_seeds=seeds,
                guidance_scales=(2.0,) * len(seeds),
                fingerprints=(FINGERPRINT,) * len(seeds),
                failure=None,
            )

    def fingerprint(self) -> dict[str, Any]:
        return {"device": "none"}

    def count_truncated(self, texts: Sequence[str]) -> int:
        return 0


def build_tokenizer() -> Any:
    """A CLIP tokenizer without merges: each byte is a token, at the end of a word another one."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=24
    )


def save_tiny_pipeline(folder: Path) -> None:
    """A Stable Diffusion pipeline with random weights, saved like any other; 16×16 images, 8×8 latents."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    pipeline: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def save_tiny_sdxl_pipeline(folder: Path, tiny_pipeline: Path) -> Any:
    """A Stable Diffusion XL pipeline around the parts of the tiny one; saved, and returned."""
    from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    small: Any = DiffusionPipeline.from_pretrained(tiny_pipeline)
    text_config = CLIPTextConfig(**{**small.text_encoder.config.to_dict(), "projection_dim": 32})
    unet_config = {**small.unet.config, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet_config |= {"projection_class_embeddings_input_dim": 6 * 8 + 32, "cross_attention_dim": 64}
    pipeline: Any = StableDiffusionXLPipeline(
        vae=small.vae,
        text_encoder=small.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(text_config),
        tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer,
        unet=UNet2DConditionModel.from_config(unet_config),
        scheduler=small.scheduler,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def save_with_safety_checker(tiny_pipeline: Path, folder: Path, threshold: float) -> None:
    """The tiny pipeline with a small safety checker that flags what is nearer to a concept than this."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**layers, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=layers, vision_config=vision, projection_dim=16)
    )
    checker.concept_embeds.data.normal_()
    checker.special_care_embeds.data.normal_()
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(2.0)
    size = {"height": 32, "width": 32}
    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        tiny_pipeline,
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size=size, crop_size=size),
        requires_safety_checker=True,
    )
    pipeline.save_pretrained(folder)


def save_tiny_vae(folder: Path, latent_channels: int = 4, num_blocks: int = 2) -> None:
    """An AutoencoderTiny with random weights; with two blocks it fits the tiny pipeline."""
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(1)
    vae: Any = AutoencoderTiny(
        encoder_block_out_channels=(8,) * num_blocks,
        decoder_block_out_channels=(8,) * num_blocks,
        num_encoder_blocks=(1,) * num_blocks,
        num_decoder_blocks=(1,) * num_blocks,
        latent_channels=latent_channels,
    )
    vae.save_pretrained(folder)


def build_manifest(num_captions: int, num_images_per_caption: int = 2) -> DatasetManifest:
    """The plan of a dataset of one shard, for tests that write shards without a model."""
    settings = {"generator": {"model": "none"}, "seed": 0, "num_captions": num_captions}
    return DatasetManifest(
        schema_version=SCHEMA_VERSION,
        settings=settings,
        settings_hash=hash_settings(settings),
        captions_source={"files": [{"name": "captions.txt"}]},
        caption_files=(),
        extra_columns={},
        num_captions=num_captions,
        num_images_per_caption=num_images_per_caption,
        num_captions_per_shard=num_captions,
        num_shards=1,
        fingerprint={},
    )


def write_shard(root: Path, samples: list[Sample]) -> Shard:
    """A dataset of one shard."""
    root.mkdir(parents=True, exist_ok=True)
    manifest = build_manifest(len(samples))
    write_manifest(root, manifest)
    with ShardWriter(root, manifest, 0) as writer:
        for sample in samples:
            writer.write(sample)
        return writer.publish(num_planned=len(samples), seconds=1.0)


def read_stats(root: Path, name: str = "00000") -> dict[str, Any]:
    """A shard's completion marker."""
    stats: dict[str, Any] = json.loads((root / f"{name}_stats.json").read_text())
    return stats
