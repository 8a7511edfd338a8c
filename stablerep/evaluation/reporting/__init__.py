"""The report of an evaluation: `report.md`, `report.html` and the metadata of a model card.

content.py        what a report says, assembled by the verb
analysis.py       what is computed for it: confusions, a plane of the features, queries to show
markdown.py       report.md
page.py           report.html, one file that asks nothing of the network (needs the extra `report`)
model_index.py    the scores as Hugging Face `model-index`
"""

import importlib.util
from pathlib import Path

from stablerep.evaluation.reporting.content import NeighbourRow, Picture, ReportContent
from stablerep.evaluation.reporting.markdown import build_markdown
from stablerep.evaluation.results import replace_file

MARKDOWN_FILE, PAGE_FILE = "report.md", "report.html"

__all__ = [
    "MARKDOWN_FILE",
    "PAGE_FILE",
    "NeighbourRow",
    "Picture",
    "ReportContent",
    "build_markdown",
    "check_page_can_be_built",
    "write_report",
]


def check_page_can_be_built() -> None:
    """Refuses to go on without what report.html needs; to be called before the work.

    Raises:
        ValueError: If jinja2 is missing.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise ValueError("report.html needs jinja2: pip install 'stablerep[report]'")


def write_report(folder: str | Path, content: ReportContent, *, page: bool = True) -> None:
    """Writes report.md and, unless told otherwise, report.html, each whole or not at all.

    Args:
        folder: Where; it exists.
        content: What to say.
        page: Whether to write report.html.

    Raises:
        ValueError: If jinja2 is missing or the content contradicts itself.
        OSError: If a file cannot be written.
    """
    folder = Path(folder)
    html = None
    if page:
        check_page_can_be_built()
        from stablerep.evaluation.reporting.page import build_page

        html = build_page(content)
    replace_file(folder / MARKDOWN_FILE, build_markdown(content).encode())
    if html is not None:
        replace_file(folder / PAGE_FILE, html.encode(errors="replace"))
