"""The report as one HTML file that needs nothing else: no script, no font, no address to fetch.

Every text comes through a template that escapes it; pictures are inline SVG drawn by the template
from plain numbers (training.charts), and thumbnails are re-encoded, so no byte of an upload reaches
a reader's decoder. Not here: what is in the report (training.report).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageOps

from core.preprocessing import IMAGE_FORMATS
from training.charts import confusion_matrix, learning_plot, percent, reliability_diagram
from training.data_report import RowSet
from training.report import MultiLabelReport, RegressionReport, Report

MAX_PICTURES = 24
"""Thumbnails of each list."""

_SIDE = 112
_TEMPLATES = Path(__file__).with_name("templates")
Pictures = dict[int, str]
"""Row numbers, from 1, to data URLs."""


def render(
    report: Report | MultiLabelReport | RegressionReport, worst: Pictures, known: Pictures,
    other: Pictures,
) -> bytes:  # fmt: skip
    """Return the page.

    If rows are images, there are thumbnails of the `worst` answers, of training rows that are
    `known` for something, and of `other` rows, those of the validation file.
    """
    given: dict[str, Any] = {}
    template = "regression.html.j2"
    if isinstance(report, Report):
        template = "report.html.j2"
        given["learning"] = learning_plot(report.learning_curve)
        given["matrix"] = confusion_matrix(report)
    elif isinstance(report, MultiLabelReport):
        template = "multi_label.html.j2"
    if not isinstance(report, RegressionReport):
        given["reliability"] = reliability_diagram(report.calibration.bins)
    made_at = datetime.fromtimestamp(report.created_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = _templates().get_template(template)
    return page.render(
        report=report, worst=worst, known=known, other=other, made_at=made_at, **given
    ).encode()


def thumbnails(rows: RowSet, *lists: Iterable[int]) -> Pictures:
    """Return small pictures of the first `MAX_PICTURES` rows of each list; none of texts."""
    pictures: Pictures = {}
    for numbers in lists:
        for number in islice(numbers, MAX_PICTURES):
            data = rows.items[number - 1]
            if isinstance(data, bytes) and number not in pictures:
                pictures[number] = _thumbnail(data)
    return pictures


def _thumbnail(data: bytes) -> str:
    # That it can be decoded within the limits was seen when its features were computed.
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        image.draft("RGB", (2 * _SIDE, 2 * _SIDE))  # a JPEG can be decoded at an eighth
        small = ImageOps.exif_transpose(image).convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _bytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "bytes": _bytes}
    return environment
