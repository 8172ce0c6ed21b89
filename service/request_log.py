"""One line of JSON for each request of a sample, and for every one that failed here.

It says what was asked for and how long it took; never an input, a label, a key or a raw path, for
none of them is in the record. Lines go to standard output, where a container's log is collected.
"""

from __future__ import annotations

import random
import sys
import time
from typing import TextIO

import orjson

from service.observation import RequestRecord

SERVER_ERROR = 500


class RequestLog:
    """Writes lines for a `fraction` of the requests; 0 turns it off."""

    def __init__(self, fraction: float, stream: TextIO | None = None) -> None:
        self._fraction = fraction
        self._stream = stream or sys.stdout

    def write(self, record: RequestRecord, seconds: float) -> None:
        """Write the line of a request, if its lot falls so."""
        if not self._fraction:
            return
        is_sampled = random.random() < self._fraction  # noqa: S311
        if not is_sampled and record.status < SERVER_ERROR:
            return
        line = {
            "time": round(time.time(), 3),
            "request_id": record.request_id,
            "method": record.method,
            "route": record.route,
            "status": record.status,
            "ms": round(seconds * 1000, 3),
        }
        if record.timing is not None:
            line |= {"model": record.model, "rows": record.rows, "failed_rows": record.failed_rows}
            line |= {"timing_ms": record.timing.milliseconds()}
        self._stream.write(orjson.dumps(line).decode() + "\n")
        self._stream.flush()
