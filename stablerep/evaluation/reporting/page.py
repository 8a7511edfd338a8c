"""`report.html`: one file with everything in it, which opens from disk and asks nothing of the network."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageOps

from stablerep.evaluation.formats import (
    describe_metric,
    describe_protocol,
    format_interval,
    format_settings,
    format_value,
    write_as_heading,
)
from stablerep.evaluation.geometry import covariance_spectrum
from stablerep.evaluation.reporting import figures
from stablerep.evaluation.reporting.analysis import (
    choose_points,
    count_confusions,
    list_confusable_rows,
    list_confused_pairs,
    project_to_plane,
    sort_by_preference,
)
from stablerep.evaluation.reporting.content import Picture, ReportContent
from stablerep.evaluation.reporting.markdown import collect_facts, list_notes
from stablerep.evaluation.results import Row

TEMPLATE_FILE, STYLE_FILE, SCRIPT_FILE = "report.html.jinja", "report.css", "report.js"
MAX_POINTS = 2000
MAX_CLASSES_IN_MATRIX = 30
MAX_CLASSES_WITH_TEXT = 16
"""In a larger matrix the cells are too small for numbers; they are in a tooltip, and read out."""
MAX_CLASSES_IN_LEGEND = 24
MAX_CONFUSIONS = 6
MAX_PAIRS = 12
NUM_HEADLINES = 4
THUMBNAIL_SIZE = 144
"""Longer side of a thumbnail, pixels: twice what it is shown at, for dense screens."""
_JPEG_QUALITY = 80


def build_page(content: ReportContent) -> str:
    """The page as HTML.

    Args:
        content: What to say.

    Raises:
        ValueError: If a feature is not finite.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of classes, images and folders are text that others wrote
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "heading": write_as_heading, "code": _code}
    confusable = list_confusable_rows(content, MAX_CONFUSIONS)
    fractions = [row for row in content.rows if describe_metric(row.metric).is_fraction]
    others = [row for row in content.rows if not describe_metric(row.metric).is_fraction]
    return environment.get_template(TEMPLATE_FILE).render(
        content=content,
        style_file=STYLE_FILE,
        script_file=SCRIPT_FILE,
        headlines=[_describe_row(row) for row in _choose_headlines(fractions)],
        scores=_describe_scores(fractions),
        has_optimistic=any(row.selection == "test" for row in fractions),
        measures=[_describe_row(row) for row in others],
        notes=list_notes(content),
        confusions=[_describe_confusion(row, content) for row in confusable],
        has_matrix=len(content.class_names) <= MAX_CLASSES_IN_MATRIX,
        has_text=len(content.class_names) <= MAX_CLASSES_WITH_TEXT,
        neighbours=_describe_neighbours(content),
        map=_describe_map(content, confusable),
        spectrum=_describe_spectrum(content),
        facts=collect_facts(content),
        figures=figures,
    )


def to_data_uri(image: Image.Image, size: int = THUMBNAIL_SIZE) -> str:
    """The image as a small JPEG in a data URI: RGB, transparent parts white, longer side at most `size`."""
    if image.mode.startswith(("I", "F")):  # Pillow cuts 16 bits to 8 by saturation
        values = np.asarray(image).astype(np.float64)
        span = float(values.max() - values.min()) or 1.0
        image = Image.fromarray(((values - values.min()) * (255 / span)).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    if max(image.size) > size:
        image = ImageOps.contain(image, (size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _choose_headlines(rows: Sequence[Row]) -> list[Row]:
    """One row a protocol."""
    first = {row.protocol: row for row in reversed(rows) if row.selection != "test"}
    return sort_by_preference([row for row in rows if first.get(row.protocol) is row])[:NUM_HEADLINES]


def _describe_scores(rows: Sequence[Row]) -> dict[str, Any] | None:
    if not rows:
        return None
    axis = figures.build_interval_axis(rows)
    described = []
    for row in rows:
        low, high = row.interval or (row.value, row.value)
        places = {"low": axis.place(low), "high": axis.place(high), "value": axis.place(row.value)}
        described.append(_describe_row(row) | {"places": places})
    return {"rows": described, "ticks": axis.ticks}


def _describe_row(row: Row) -> dict[str, Any]:
    metric = describe_metric(row.metric)
    return {
        "protocol": row.protocol,
        "title": write_as_heading(describe_protocol(row.protocol)),
        "metric": metric.title,
        "arrow": {True: "higher is better", False: "lower is better", None: ""}[metric.higher_is_better],
        "feature": row.feature,
        "value": row.value,
        "text": format_value(row.value, row.metric, num_decimals=1),
        "unit": " %" if metric.is_fraction else "",
        "interval": format_interval(row, num_decimals=1),
        "interval_method": row.interval_method,
        "n": row.n,
        "selection": row.selection,
        "settings": format_settings(row.hyperparameters),
        "seconds": row.seconds,
    }


def _describe_confusion(row: Row, content: ReportContent) -> dict[str, Any]:
    assert row.predictions is not None
    assert content.targets is not None
    names = content.class_names
    confusion = count_confusions(row.predictions, content.targets, len(names))
    shares, has_matrix = confusion.shares, len(names) <= MAX_CLASSES_IN_MATRIX
    pairs = [
        {"target": names[target], "prediction": names[prediction], "count": count, "share": share}
        for target, prediction, count, share in list_confused_pairs(confusion, MAX_PAIRS)
    ]
    present = np.flatnonzero(confusion.num_images)
    hardest = present[np.argsort(shares[present, present], kind="stable")][:MAX_PAIRS]
    return {
        "title": f"{write_as_heading(describe_protocol(row.protocol))} ({row.feature})",
        "counts": confusion.counts.tolist() if has_matrix else [],
        "shares": shares.tolist() if has_matrix else [],
        "num_images": confusion.num_images.tolist(),
        "pairs": pairs,
        "hardest": [
            {"name": names[index], "share": shares[index, index], "count": int(confusion.num_images[index])}
            for index in hardest.tolist()
        ],
    }


def _describe_neighbours(content: ReportContent) -> list[dict[str, Any]]:
    return [
        {
            "query": _describe_picture(row.query, content),
            "num_right": sum(picture.target == row.query.target for picture in row.neighbours),
            "neighbours": [
                _describe_picture(picture, content)
                | {"similarity": similarity, "is_right": picture.target == row.query.target}
                for picture, similarity in zip(row.neighbours, row.similarities, strict=True)
            ],
        }
        for row in content.neighbours
    ]


def _describe_picture(picture: Picture, content: ReportContent) -> dict[str, Any]:
    return {
        "source": to_data_uri(picture.image),
        "name": picture.name,
        "class_name": content.class_names[picture.target],
    }


def _describe_map(content: ReportContent, confusable: Sequence[Row]) -> dict[str, Any] | None:
    if content.features is None or len(content.features) < 2:
        return None
    plane = project_to_plane(content.features)
    chosen = choose_points(len(content.names), MAX_POINTS, content.seed)
    places = figures.place_points(plane.coordinates.numpy()[chosen])
    targets = np.zeros(len(chosen), dtype=int) if content.targets is None else content.targets[chosen]
    predicted = confusable[0].predictions if confusable else None
    groups: dict[int, list[tuple[int, float, float]]] = {}
    for index, (target, (x, y)) in enumerate(zip(targets.tolist(), places.tolist(), strict=True)):
        groups.setdefault(target, []).append((index, x, y))
    names = list(content.class_names) if content.targets is not None else [""]
    return {
        "groups": sorted(groups.items()),
        "class_names": names,
        "num_points": len(chosen),
        "shares": [f"{100 * share:.0f}" for share in plane.shares],
        "colours": [_choose_colour(index, len(names)) for index in range(len(names))],
        "has_legend": content.targets is not None and len(names) <= MAX_CLASSES_IN_LEGEND,
        "has_classes": content.targets is not None,
        "predicted_by": describe_protocol(confusable[0].protocol) if confusable else "",
        "data": {
            "names": [content.names[index] for index in chosen.tolist()],
            "classes": names,
            "targets": targets.tolist(),
            "predictions": None if predicted is None else predicted[chosen].tolist(),
        },
    }


def _choose_colour(index: int, num_classes: int) -> str:
    """Hue and lightness of a class on the map; neighbours on the colour circle differ in lightness, too."""
    angle = 360 * index / num_classes if num_classes <= 12 else 137.508 * index  # the golden angle
    shift = (-9, 5)[index % 2] if num_classes <= 12 else (-9, 5, -2)[index % 3]
    return f"--angle:{angle % 360:.0f};--shift:{shift}%"


def _describe_spectrum(content: ReportContent) -> figures.SpectrumChart | None:
    if content.features is None or len(content.features) < 2:
        return None
    return figures.build_spectrum_chart(covariance_spectrum(content.features).eigenvalues.cpu().numpy())


def _count(number: int) -> str:
    return f"{number:,}"


def _code(text: str) -> str:
    """Markdown's backquotes and stars away, for notes that both reports share."""
    return text.replace("`", "").replace("*", "")
