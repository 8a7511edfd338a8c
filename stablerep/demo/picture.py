"""The demo in one picture: images by caption, and the scores."""

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from stablerep.demo.report import write_as_heading
from stablerep.demo.results import PROTOCOL_TITLES, RUN_TITLES, GridRow

MAX_BYTES = 200_000
_WIDTH, _MARGIN, _GAP = 1200, 40, 8
_NUM_CAPTIONS, _NUM_IMAGES, _IMAGE_SIZE = 6, 4, 128
_BAR_HEIGHT, _ROW_HEIGHT = 20, 34
_PROTOCOLS = ("linear_heldout", "knn20")
_PAPER, _INK, _SOFT, _RULE = "#ffffff", "#16191d", "#59616b", "#dfe3e7"
_COLOURS = {"stablerep": "#0072b2", "simclr": "#d55e00", "random": "#7a828b"}


def draw_picture(results: dict[str, Any], grid: Sequence[GridRow]) -> bytes:
    """A PNG of at most 200 kB: two columns of captions with their images, and the scores with intervals.

    Args:
        results: What `collect_results` returns.
        grid: Captions and images.
    """
    rows = grid[:_NUM_CAPTIONS]
    column_width = (_WIDTH - 3 * _MARGIN) // 2
    block_height = 34 + _IMAGE_SIZE + 26
    grid_height = -(-len(rows) // 2) * block_height
    height = 2 * _MARGIN + grid_height + 8 + 40 + len(RUN_TITLES) * _ROW_HEIGHT - (_ROW_HEIGHT - _BAR_HEIGHT)
    picture = Image.new("RGB", (_WIDTH, height), _PAPER)
    draw = ImageDraw.Draw(picture)
    for index, row in enumerate(rows):
        left = _MARGIN + (index % 2) * (column_width + _MARGIN)
        _draw_row(picture, draw, row, left, _MARGIN + index // 2 * block_height, column_width)
    for index, protocol in enumerate(_PROTOCOLS):
        left = _MARGIN + index * (column_width + _MARGIN)
        _draw_scores(draw, results, protocol, left, _MARGIN + grid_height + 8, column_width)
    return _encode(picture)


def _draw_row(
    picture: Image.Image, draw: ImageDraw.ImageDraw, row: GridRow, left: int, top: int, width: int
) -> None:
    draw.text((left, top), _shorten(draw, row.caption, _font(20), width), fill=_INK, font=_font(20))
    size = min(_IMAGE_SIZE, (width - (_NUM_IMAGES - 1) * _GAP) // _NUM_IMAGES)
    for index, encoded in enumerate(row.images[:_NUM_IMAGES]):
        with Image.open(io.BytesIO(encoded)) as image:
            scaled = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        picture.paste(scaled, (left + index * (size + _GAP), top + 34))


def _draw_scores(
    draw: ImageDraw.ImageDraw, results: dict[str, Any], protocol: str, left: int, top: int, width: int
) -> None:
    """Bars from 0 to 100 % with their intervals; the axis' zero is where the bars begin."""
    budget = results["budget"]
    what = f"{budget['label_by']} of {budget['num_test_scenes']:,} rendered test pictures"
    title = f"{PROTOCOL_TITLES[protocol]}: {what}, %"
    draw.text((left, top), write_as_heading(title), fill=_SOFT, font=_font(17))
    zero, scale = left + 168, (width - 168 - 70) / 1.0
    for index, (run, name) in enumerate(RUN_TITLES.items()):
        score = results["scores"][run][protocol]
        y = top + 40 + index * _ROW_HEIGHT
        draw.text((zero - 12, y + _BAR_HEIGHT / 2), name, fill=_INK, font=_font(17), anchor="rm")
        end, (low, high) = zero + scale * score["value"], (zero + scale * part for part in score["interval"])
        draw.rectangle((zero, y, end, y + _BAR_HEIGHT), fill=_COLOURS[run])
        draw.line((low, y + _BAR_HEIGHT / 2, high, y + _BAR_HEIGHT / 2), fill=_INK, width=2)
        for place in (low, high):
            draw.line((place, y + 5, place, y + _BAR_HEIGHT - 5), fill=_INK, width=2)
        text = f"{100 * score['value']:.1f}"
        draw.text((high + 10, y + _BAR_HEIGHT / 2), text, fill=_INK, font=_font(17), anchor="lm")
    bottom = top + 40 + len(RUN_TITLES) * _ROW_HEIGHT - (_ROW_HEIGHT - _BAR_HEIGHT)
    draw.line((zero, top + 36, zero, bottom + 4), fill=_RULE, width=1)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)  # Pillow's own, the same on every machine


def _shorten(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"


def _encode(picture: Image.Image) -> bytes:
    """PNG with as many colours of a palette as fit."""
    for num_colours in (256, 128, 64, 32, 16):
        buffer = io.BytesIO()
        picture.quantize(num_colours, dither=Image.Dither.FLOYDSTEINBERG).save(buffer, "PNG", optimize=True)
        if buffer.tell() <= MAX_BYTES:
            break
    return buffer.getvalue()
