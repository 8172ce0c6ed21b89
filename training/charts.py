"""The geometry of a report's pictures; the template draws them as inline SVG.

Numbers in, coordinates out: nothing here knows of markup, so whatever text a picture shows goes
through the template's escaping like any other. Not here: colours and fonts
(templates/report.html.j2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from training.calibration import BINS, Bin
from training.learning_curve import LearningCurve
from training.report import Report

MATRIX_CLASSES = 20
"""With more classes a matrix is not legible; the commonest confusions are listed instead."""


@dataclass(frozen=True)
class Frame:
    """A plot's outer size and the box that its axes span, in SVG units."""

    width: int = 420
    height: int = 300
    left: int = 48
    right: int = 404
    top: int = 14
    bottom: int = 258

    def x(self, share: float) -> float:
        """Return where a share of the horizontal axis lies."""
        return round(self.left + share * (self.right - self.left), 1)

    def y(self, share: float) -> float:
        """Return where a share of the vertical axis lies; 1 is at the top."""
        return round(self.bottom - share * (self.bottom - self.top), 1)


@dataclass(frozen=True)
class Tick:
    """A mark on an axis and what stands beside it."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """An upright bar, and what it says when pointed at."""

    x: float
    y: float
    width: float
    height: float
    title: str
    opacity: float = 1.0


@dataclass(frozen=True)
class Dot:
    """A point with its error bar from `low` to `high`."""

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclass(frozen=True)
class Plot:
    """What the template draws: ticks on both axes, and bars, or dots joined by a line."""

    frame: Frame
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bars: tuple[Bar, ...] = ()
    dots: tuple[Dot, ...] = ()
    line: str = ""
    dashed: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a confusion matrix: `strength` 0 to 1 is its share of the row's rows."""

    rows: int
    strength: float
    is_right: bool


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix, a line per label: its cells by predicted label."""

    labels: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]


def reliability_diagram(bins: Sequence[Bin]) -> Plot:
    """Accuracy by confidence; bars fade with how few rows they stand for, the diagonal is ideal."""
    frame = Frame()
    most = max((b.rows for b in bins), default=1)
    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
    gap = 1.5
    bars = tuple(
        Bar(
            x=frame.x(n / BINS) + gap,
            y=frame.y(b.accuracy),
            width=round((frame.right - frame.left) / BINS - 2 * gap, 1),
            height=round(frame.bottom - frame.y(b.accuracy), 1),
            title=f"confidence {percent(b.confidence)}, accuracy {percent(b.accuracy)}, "
            f"{b.rows} rows",
            opacity=round(0.3 + 0.7 * math.sqrt(b.rows / most), 2),
        )
        for n, b in enumerate(bins)
        if b.rows
    )
    return Plot(
        frame,
        tuple(Tick(frame.x(t), percent(t)) for t in ticks),
        tuple(Tick(frame.y(t), percent(t)) for t in ticks),
        bars=bars,
        dashed=f"{frame.x(0)},{frame.y(0)} {frame.x(1)},{frame.y(1)}",
    )


def learning_plot(curve: LearningCurve) -> Plot:
    """Accuracy by rows, each doubling as wide as the other, and where the next is expected."""
    frame = Frame()
    last = curve.points[-1]
    expected = min(1.0, last.accuracy + curve.next_gain)
    low = min(p.accuracy - 2 * p.error for p in curve.points)
    high = max(*(p.accuracy + 2 * p.error for p in curve.points), expected)
    ticks = _round_ticks(max(0.0, low), min(1.0, high))
    floor, ceiling = ticks[0], ticks[-1]

    def y(value: float) -> float:
        return frame.y((min(max(value, floor), ceiling) - floor) / (ceiling - floor))

    places = [frame.x(0.08 + 0.28 * n) for n in range(len(curve.points) + 1)]
    dots = tuple(
        Dot(
            x=x,
            y=y(p.accuracy),
            low=y(p.accuracy - 1.96 * p.error),
            high=y(p.accuracy + 1.96 * p.error),
            title=f"{p.rows} rows: {percent(p.accuracy, 1)} ± {percent(p.error, 1)}",
        )
        for x, p in zip(places, curve.points, strict=False)
    )
    names = [f"{p.rows:,}" for p in curve.points] + [f"{2 * last.rows:,}?"]
    return Plot(
        frame,
        tuple(Tick(x, name) for x, name in zip(places, names, strict=True)),
        tuple(Tick(y(t), percent(t, 0 if ceiling - floor >= 0.05 else 1)) for t in ticks),
        dots=dots,
        line=" ".join(f"{dot.x},{dot.y}" for dot in dots),
        dashed=f"{dots[-1].x},{dots[-1].y} {places[-1]},{y(expected)}",
    )


def confusion_matrix(report: Report) -> Matrix | None:
    """The whole matrix, or None when there are too many classes to read one."""
    classes = report.metrics.classes
    if len(classes) > MATRIX_CLASSES:
        return None
    wrong = {(c.label, c.predicted): c.rows for c in report.confusions}

    def cell(label: str, predicted: str, rows: int, total: int) -> Cell:
        return Cell(rows, round(rows / max(total, 1), 3), label == predicted)

    return Matrix(
        tuple(c.label for c in classes),
        tuple(
            tuple(
                cell(
                    c.label,
                    other.label,
                    c.correct if c is other else wrong.get((c.label, other.label), 0),
                    c.rows,
                )
                for other in classes
            )
            for c in classes
        ),
    )


def percent(share: float, digits: int = 0) -> str:
    """Return a share as people write it."""
    return f"{100 * share:.{digits}f} %"


def _round_ticks(low: float, high: float) -> list[float]:
    """Return 3 to 6 round numbers from at or below `low` to at or above `high`."""
    span = max(high - low, 0.01)
    steps = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    step = next((s for s in steps if span / s <= 4), 0.25)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 6) for n in range(first, max(last, first + 1) + 1)]
