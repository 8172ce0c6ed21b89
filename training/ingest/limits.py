"""The bounds within which an upload is parsed.

What an operator may want to move is a setting; what no honest data set comes near is a constant
here. Not here: limits on the process itself, memory and time (training.worker).
"""

from __future__ import annotations

from dataclasses import dataclass

from core.settings import Settings

MIB = 1 << 20
MAX_ERRORS_KEPT = 100
UNREADABLE_SHARE = 0.01
"""Of the rows of a file: so many images that cannot be decoded are left out, and more refused."""

MAX_LABEL_CHARS = 200
MAX_LABELS_OF_ROW = 1000
MAX_VALUE = 1e30
"""Answers are float32, whose largest number is 3.4e38."""

MAX_IMAGE_BYTES = 64 * MIB
MAX_PATH_CHARS = 1024


@dataclass(frozen=True)
class Limits:
    """The settings that bound one upload; each is described in `core.settings`."""

    max_rows: int
    max_classes: int
    max_text_chars: int
    max_pixels: int
    max_zip_entries: int
    max_zip_ratio: int
    max_unpacked_bytes: int

    @classmethod
    def from_settings(cls, settings: Settings) -> Limits:
        """Take the limits out of the worker's settings."""
        return cls(
            max_rows=settings.max_rows,
            max_classes=settings.max_classes,
            max_text_chars=settings.max_text_chars,
            max_pixels=settings.max_pixels,
            max_zip_entries=settings.max_zip_entries,
            max_zip_ratio=settings.max_zip_ratio,
            max_unpacked_bytes=settings.max_unpacked_bytes,
        )

    @property
    def max_row_bytes(self) -> int:
        """The longest row of a text file: the longest text, escaped as JSON, and other columns.

        JSON may write one character as two escapes of six bytes each.
        """
        return 12 * self.max_text_chars + 65_536
