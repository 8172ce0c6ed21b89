"""What is wrong with an upload: all errors counted, the first of them kept.

A user's own text comes into a message only through `shown` and `entry_name`, which shorten it and
escape what a terminal or a log would act on. Not here: what is an error (the other modules).
"""

from __future__ import annotations

from collections.abc import Sequence

from core.datasets import FileErrors, RowError
from training.ingest.limits import MAX_ERRORS_KEPT

_SHOWN_CHARS = 40
_SHOWN_NAMES = 10
_ENTRY_CHARS = 200

# Names that people give the two columns elsewhere, in lower case.
_ALIASES = {
    "text": {"text", "texts", "sentence", "content", "utterance", "message", "review", "body",
             "input", "question", "query", "prompt", "comment", "document", "tweet"},
    "label": {"label", "labels", "category", "class", "intent", "target", "sentiment", "tag",
              "topic", "output", "answer", "completion", "y"},
    "labels": {"labels"},
    "value": {"value"},
    "image": {"image", "images", "img", "picture", "photo"},
}  # fmt: skip


def shown(text: str) -> str:
    """Return `text` in quotes, at most 40 characters of it, control characters escaped."""
    return repr(text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…")


def shown_names(names: Sequence[str]) -> str:
    """Return the first ten of `names` as `shown`, and how many more there are."""
    listed = ", ".join(shown(name) for name in names[:_SHOWN_NAMES])
    more = len(names) - _SHOWN_NAMES
    return f"{listed} and {more} more" if more > 0 else listed


def entry_name(name: str) -> str:
    """Return a zip entry's name for `RowError.entry`, shortened and escaped if need be."""
    short = name if len(name) <= _ENTRY_CHARS else f"{name[:_ENTRY_CHARS]}…"
    return short if short.isprintable() else repr(short)[1:-1]


def missing_column(wanted: str, found: Sequence[str], *, noun: str = "column") -> str:
    """Return the reason for a missing column: what was found, and what to rename."""
    others = [name for name in found if name not in ("text", "image", "label")]
    alike = [name for name in others if name.strip().lower() in _ALIASES[wanted]]
    candidates = alike or others
    if len(candidates) == 1:
        remedy = f"rename {noun} {shown(candidates[0])} to '{wanted}'"
    else:
        remedy = f"name the {noun} that holds the {wanted} '{wanted}'"
    return f"there is no {noun} '{wanted}', only {shown_names(found) or 'none'}; {remedy}"


class Findings:
    """The errors of one upload, in the order found."""

    def __init__(self) -> None:
        self.total = 0
        self._kept: list[RowError] = []

    def add(self, error: RowError) -> None:
        """Count an error, and keep it if it is one of the first hundred."""
        self.total += 1
        if len(self._kept) < MAX_ERRORS_KEPT:
            self._kept.append(error)

    def result(self) -> FileErrors:
        """Return the errors by line; those of the whole file come last, entries stay in order."""
        by_line = sorted(
            self._kept, key=lambda error: (error.line is None, error.line if error.line else 0)
        )
        return FileErrors(errors=tuple(by_line), total=self.total)
