"""Requirements as comparable words, and the lock."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tests.containers.engine import ROOT


def canonical(requirement: str) -> str:
    """Return a requirement as `name` or `name==version`, the name normalised, no local version."""
    name, _, version = requirement.strip().partition("==")
    name = re.sub(r"[-_.]+", "-", re.split(r"[<>=!~;\[ ]", name)[0]).lower()
    return f"{name}=={version.partition('+')[0]}" if version else name


def names(requirements: Iterable[str]) -> set[str]:
    """Return the names alone."""
    return {canonical(requirement).partition("==")[0] for requirement in requirements}


def locked() -> set[str]:
    """Return the pins of `constraints.txt`."""
    return {canonical(line) for line in (ROOT / "constraints.txt").read_text().splitlines()}
