"""Images of a shard that are made already, each checked before it is used again.

They lie in the parts that a worker spilled before it was stopped, or in a tar without a completion marker: of
a worker that was killed between the two, of a plan with fewer images a caption, or damaged since.
"""

import io
from dataclasses import dataclass, field
from typing import IO

from data_gen.job.plan import Plan
from data_gen.job.work_folder import WorkFolder
from data_gen.shards import Sample, ShardError, read_tar


@dataclass(frozen=True)
class StoredImage:
    """An encoded image with its provenance.

    Args:
        content: The encoded file.
        seed: Its noise key.
        guidance_scale: Weight of classifier-free guidance.
        fingerprint: Machine settings that it was made under.
        width: In pixels.
        height: In pixels.
    """

    content: bytes
    seed: str
    guidance_scale: float
    fingerprint: str
    width: int
    height: int


@dataclass(frozen=True)
class MadeImages:
    """What earlier workers left of a shard.

    Args:
        images: By caption key and image index.
        tar_sha256: Digest of the tar without a marker, None where there is none.
        problem: Why that tar could not be read to its end, None where it could.
    """

    images: dict[tuple[str, int], StoredImage] = field(default_factory=dict)
    tar_sha256: str | None = None
    problem: str | None = None


def collect_images(plan: Plan, shard_index: int, work_folder: WorkFolder | None) -> MadeImages:
    """Reads the images of a shard that can be used again.

    An image counts if its sample is sound (its sha256, its caption's id), and its noise key and settings are
    the plan's, or those of a plan that the dataset was extended from.

    Args:
        plan: The dataset's plan.
        shard_index: A shard without a completion marker.
        work_folder: Where parts were spilled; None leaves them out.
    """
    name = plan.manifest.shard_name(shard_index)
    made = MadeImages()
    for part in work_folder.read_parts(name) if work_folder else ():
        _add_images(made, plan, io.BytesIO(part), f"a spilled part of shard {name}")
    if not plan.store.exists(f"{name}.tar"):
        return made
    sha256 = plan.store.digest(f"{name}.tar")[1]
    where = plan.store.name_of(f"{name}.tar")
    with plan.store.open(f"{name}.tar") as file:
        problem = _add_images(made, plan, file, where)
    return MadeImages(made.images, sha256, problem)


def _add_images(made: MadeImages, plan: Plan, file: IO[bytes], where: str) -> str | None:
    """Adds every sound sample before the first bad one; returns what is wrong with that one."""
    try:
        for sample in read_tar(file, where):
            _add_sample(made, plan, sample)
    except ShardError as error:
        return str(error)
    return None


def _add_sample(made: MadeImages, plan: Plan, sample: Sample) -> None:
    manifest = plan.manifest
    if sample.settings_hash not in (manifest.settings_hash, *manifest.extended_from):
        return
    for index, content in enumerate(sample.images[: manifest.num_images_per_caption]):
        seed = sample.image_seeds[index]
        if seed == plan.image_seed(sample.key, index):
            made.images[sample.key, index] = StoredImage(
                content=content,
                seed=seed,
                guidance_scale=sample.guidance_scales[index],
                fingerprint=sample.fingerprints[index],
                width=sample.width,
                height=sample.height,
            )
