"""A dataset's plan where it is worked on: the manifest, where it lies, and the captions of each shard."""

import hashlib
import io
from dataclasses import dataclass, field
from typing import BinaryIO

from data_gen.captions.planning import NUM_SHARDS_PER_CAPTION_FILE, PlannedCaption, read_planned_captions
from data_gen.diffusion.noise import image_seed
from data_gen.shards import MANIFEST_NAME, DatasetManifest, ShardError, read_manifest
from data_gen.storage import Store


def has_images(store: Store) -> bool:
    """Whether an image was made, or spilled, in a dataset's folder."""
    return any(name.endswith(".tar") for name in (*store.list(), *store.list(".work", recursive=True)))


@dataclass(frozen=True)
class Plan:
    """What is to be made, and where.

    Args:
        store: The dataset's folder.
        manifest: Its frozen plan.
    """

    store: Store
    manifest: DatasetManifest
    _caption_files: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, store: Store) -> "Plan":
        """The plan of the dataset that is there.

        Raises:
            FileNotFoundError: There is none.
            ShardError: Its manifest is damaged.
        """
        return cls(store, read_manifest(store))

    @property
    def shard_names(self) -> list[str]:
        """Every planned shard."""
        return [self.manifest.shard_name(index) for index in range(self.manifest.num_shards)]

    def captions(self, shard_index: int) -> list[PlannedCaption]:
        """The captions of a shard, in the order of its tar.

        Raises:
            ShardError: Their file is missing or damaged.
        """
        file_index = shard_index // NUM_SHARDS_PER_CAPTION_FILE
        if file_index >= len(self.manifest.caption_files):
            raise ShardError(f"{self.store.name_of(MANIFEST_NAME)}: names no captions of shard {shard_index}")
        entry = self.manifest.caption_files[file_index]
        content = self._read_captions(entry["name"], entry["sha256"])
        captions = read_planned_captions(content, shard_index % NUM_SHARDS_PER_CAPTION_FILE)
        expected = self.manifest.num_captions_in_shard(shard_index)
        if len(captions) != expected:
            raise ShardError(
                f"{self.store.name_of(entry['name'])}: {len(captions)} captions for shard {shard_index}, "
                f"expected {expected}"
            )
        return captions

    def image_seed(self, key: str, image_index: int) -> str:
        """The noise key of one image."""
        return image_seed(self.manifest.settings["seed"], key, image_index)

    def check_stands(self) -> None:
        """Raises ShardError if the dataset was given another plan since this one was read."""
        if read_manifest(self.store).settings_hash != self.manifest.settings_hash:
            raise ShardError(f"{self.store.url}: its plan was changed while this worker ran; start it again")

    def _read_captions(self, name: str, sha256: str) -> BinaryIO:
        """The file's content, checked once and kept until another one is asked for."""
        if name not in self._caption_files:
            try:
                content = self.store.read(name)
            except FileNotFoundError as error:
                raise ShardError(f"{self.store.name_of(name)}: missing, though the plan names it") from error
            if hashlib.sha256(content).hexdigest() != sha256:
                raise ShardError(f"{self.store.name_of(name)}: its sha256 is not the plan's")
            self._caption_files.clear()
            self._caption_files[name] = content
        return io.BytesIO(self._caption_files[name])
