"""The physical lines of a text file, decoded from UTF-8, none ever held beyond a bound.

A line that cannot be given raises `BadLineError` with the error to report; the next call goes on
with the line after it. Lines keep their line ends, since quoted CSV fields may contain them.
"""

from __future__ import annotations

import codecs
from typing import BinaryIO

from core.datasets import RowError

_SKIP_BYTES = 1 << 20


class BadLineError(Exception):
    """Raised when a line is too long, belongs to a row that is, or is not UTF-8."""

    def __init__(self, error: RowError) -> None:
        super().__init__(error.reason)
        self.error = error


class Lines:
    """An iterator over the lines of `source`, from its start. `number` is that of the last one."""

    def __init__(self, source: BinaryIO, max_row_bytes: int) -> None:
        source.seek(0)
        self.number = 0
        self._source = source
        self._max_row_bytes = max_row_bytes
        self._offset = 0
        self._row_line = 1
        self._row_bytes = 0
        self._not_utf8 = False

    def begin_row(self) -> int:
        """Say that a row begins, and return the number of its first line."""
        self._row_line, self._row_bytes = self.number + 1, 0
        return self._row_line

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        raw = self._source.readline(self._max_row_bytes + 1)
        if not raw:
            raise StopIteration
        start = self._offset
        self.number += 1
        self._offset += len(raw)
        self._row_bytes += len(raw)
        if self._row_bytes > self._max_row_bytes:
            if not raw.endswith(b"\n"):
                self._skip_line()
            raise BadLineError(self._too_long())
        if start == 0 and raw.startswith(codecs.BOM_UTF8):
            start = len(codecs.BOM_UTF8)
            raw = raw[start:]
        return self._decode(raw, start)

    def _decode(self, raw: bytes, start: int) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            if not self._not_utf8:
                self._not_utf8 = True
                raise BadLineError(
                    RowError(
                        line=self.number,
                        reason=f"byte 0x{raw[error.start]:02x} at offset {start + error.start} "
                        "is not UTF-8; save the file as UTF-8",
                    )
                ) from None
            # Said once is enough: the encoding is the whole file's. Other errors are still found.
            return raw.decode(errors="replace")

    def _too_long(self) -> RowError:
        if self._row_line == self.number:
            reason = f"the line is longer than {self._max_row_bytes} bytes; shorten it"
        else:
            reason = (
                f"the row that begins here is longer than {self._max_row_bytes} bytes; "
                "close its double quote or shorten it"
            )
        return RowError(line=self._row_line, reason=reason)

    def _skip_line(self) -> None:
        while piece := self._source.readline(_SKIP_BYTES):
            self._offset += len(piece)
            if piece.endswith(b"\n"):
                return
