"""What the documents list is what there is: events, error codes, metrics, modules."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.metrics import MetricWrapperBase

from core import errors
from service import metrics

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/api.md").read_text("utf-8")
SOURCE = "\n".join(
    path.read_text("utf-8")
    for folder in ("core", "service", "training")
    for pattern in ("*.py", "*.lua")
    for path in sorted((ROOT / folder).rglob(pattern))
)


ARCHITECTURE = (ROOT / "docs/architecture.md").read_text("utf-8")


def listed(header: str, column: int = 0) -> set[str]:
    """The names in backquotes in one column of the table that begins with `header`."""
    table = TEXT.split(header)[1].split("\n\n")[0]
    cells = [line.split(" | ")[column] for line in table.splitlines() if line.startswith("| ")]
    return set(re.findall(r"`([a-z_]+)`", "".join(cells)))


def test_events():
    told = listed("| event | data |")
    literal = r"""(?:reporter\.event\(|add_event\(\s*(?:entry|tenant, id),)\s*["']([a-z_]+)["']"""
    assert set(re.findall(literal, SOURCE)) <= told
    for event in told:
        assert re.search(rf"""["']{event}["']""", SOURCE), event


def test_error_codes():
    told = listed("| status | `code` | |", 1) | listed("| code | |")
    literal = re.findall(r"""\bcode="([a-z_]+)\"""", SOURCE)
    tree = {
        each.code
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.GraftError)
    }
    own = {errors.LeaseLost.code, errors.AlreadyExists.code}  # nobody outside a worker meets them
    assert told - {"method_not_allowed"} == (tree | set(literal)) - own


def test_modules():
    named = set(re.findall(r"`((?:core|service|training|cli|docs)/[^`<]*)`", ARCHITECTURE))
    assert len(named) > 50
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_metrics():
    counted = {
        each.describe()[0].name
        for each in vars(metrics).values()
        if isinstance(each, MetricWrapperBase)
    }
    assert listed("| metric | labels | |") == counted
