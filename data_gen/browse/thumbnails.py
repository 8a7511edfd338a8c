"""Where a caption's images lie for the pages: all thumbnails in one sheet, and the originals if wanted.

A sheet is a JPEG of equal cells, row by row, `NUM_SHEET_COLUMNS` a row: one file a caption, and for the usual
number of images a caption one strip.
"""

import io
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_gen.shards import MAX_IMAGE_PIXELS, Sample, ShardError

NUM_SHEET_COLUMNS = 16
MAX_FILES_PER_FOLDER = 1000
_JPEG_QUALITY = 80
_PIL_FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class PictureFolder:
    """The image files of the pages.

    Args:
        build: Folder of the build.
        thumbnail_size: Longer side of a thumbnail in pixels.
        has_originals: Whether the images themselves are copied too.
        num_images_per_caption: Images of every caption.
    """

    build: Path
    thumbnail_size: int
    has_originals: bool
    num_images_per_caption: int

    @property
    def num_originals_per_folder(self) -> int:
        """Captions whose images share a folder."""
        return max(1, MAX_FILES_PER_FOLDER // max(1, self.num_images_per_caption))

    def write(self, shard_name: str, index: int, sample: Sample) -> None:
        """Writes the images of the sample at this place of its shard.

        Raises:
            ShardError: An image cannot be decoded, or is of another size than its sample says.
        """
        sheet = self.build / "images" / shard_name / str(index // MAX_FILES_PER_FOLDER) / f"{index}.jpg"
        sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet.write_bytes(build_sheet(sample, self.thumbnail_size))
        if not self.has_originals:
            return
        folder = self.build / "originals" / shard_name / str(index // self.num_originals_per_folder)
        folder.mkdir(parents=True, exist_ok=True)
        for image_index, image in enumerate(sample.images):
            (folder / f"{sample.key}.{image_index}.{sample.image_extension}").write_bytes(image)

    def remove(self, shard_name: str) -> None:
        """Removes what was written of a shard."""
        for kind in ("images", "originals"):
            shutil.rmtree(self.build / kind / shard_name, ignore_errors=True)


def build_sheet(sample: Sample, thumbnail_size: int) -> bytes:
    """The thumbnails of all images of a sample, as one JPEG.

    Args:
        sample: The caption and its images.
        thumbnail_size: Longer side of a thumbnail in pixels; an image that is smaller keeps its size.

    Raises:
        ShardError: An image cannot be decoded, or is of another size than its sample says.
    """
    shape = sample.width, sample.height
    thumbnails = [
        _read_thumbnail(sample, index, shape, thumbnail_size) for index in range(len(sample.images))
    ]
    width, height = thumbnails[0].size
    num_columns = min(len(thumbnails), NUM_SHEET_COLUMNS)
    num_rows = -(-len(thumbnails) // NUM_SHEET_COLUMNS)
    sheet = Image.new("RGB", (width * num_columns, height * num_rows))
    for index, thumbnail in enumerate(thumbnails):
        row, column = divmod(index, NUM_SHEET_COLUMNS)
        sheet.paste(thumbnail, (width * column, height * row))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _read_thumbnail(
    sample: Sample, image_index: int, shape: tuple[int, int], thumbnail_size: int
) -> Image.Image:
    where = f"image {sample.key}.{image_index}.{sample.image_extension}"
    try:
        with Image.open(io.BytesIO(sample.images[image_index]), formats=_PIL_FORMATS) as picture:
            if picture.size != shape or picture.width * picture.height > MAX_IMAGE_PIXELS:
                raise ShardError(
                    f"{where} is {picture.width}×{picture.height}, expected {shape[0]}×{shape[1]}"
                )
            scale = min(1.0, thumbnail_size / max(picture.size))
            cell = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
            picture.draft("RGB", cell)  # a JPEG is decoded at the next larger of its own fractions
            return picture.convert("RGB").resize(cell, Image.Resampling.LANCZOS, reducing_gap=2.0)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ShardError(f"{where} is not a readable image ({error})") from error
