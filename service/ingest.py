"""Streaming a multipart upload into the artifact store, without ever holding the file.

The service parses nothing of the file itself: it cuts the multipart envelope open as bytes come in
(`python-multipart`'s push parser) and passes the `file` part on, chunk by chunk. If anything is
wrong or the caller goes away, nothing is left in the store.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from core.errors import InvalidRequest, PayloadTooLarge, UnsupportedMedia

MAX_FIELD_BYTES = 1024
MAX_FIELDS = 16
MAX_BOUNDARY = 70  # RFC 2046, section 5.1.1
MAX_FILENAME = 255


class Upload:
    """A multipart request: iterate over `chunks()`, then read `filename`, `fields`, `bytes`."""

    def __init__(self, content_type: str, body: AsyncIterator[bytes], *, max_bytes: int) -> None:
        """Raises `UnsupportedMedia` when the request is not a multipart form."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not 1 <= len(boundary) <= MAX_BOUNDARY:
            raise UnsupportedMedia("send the file as multipart/form-data")
        self.filename: str | None = None
        self.fields: dict[str, str] = {}
        self.bytes = 0
        self._body = body
        self._max_bytes = max_bytes
        self._ready: deque[bytes] = deque()
        self._header = (b"", b"")
        self._disposition: dict[bytes, bytes] = {}
        self._value = bytearray()
        self._in_file = False
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the bytes of the part named `file`.

        Raises `InvalidRequest` for a damaged form or one without a file, `PayloadTooLarge`.
        """
        try:
            async for data in self._body:
                self._parser.write(data)
                while self._ready:
                    yield self._ready.popleft()
        except FormParserError:
            raise InvalidRequest("the multipart body is damaged", param="file") from None
        if not self._ended:
            raise InvalidRequest("the multipart body is cut short", param="file")
        if self.filename is None:
            raise InvalidRequest("the form has no part named 'file' with a file name", param="file")

    def _on_part_begin(self) -> None:
        self._disposition = {}
        self._header = (b"", b"")
        self._value.clear()
        self._in_file = False

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0] + data[start:end], self._header[1])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0], self._header[1] + data[start:end])

    def _on_header_end(self) -> None:
        name, value = self._header
        self._header = (b"", b"")
        if name.lower() == b"content-disposition":
            _, self._disposition = parse_options_header(value)

    def _on_headers_finished(self) -> None:
        filename = self._disposition.get(b"filename")
        if self._disposition.get(b"name") == b"file" and filename is not None:
            if self.filename is not None:
                raise InvalidRequest("send one file in a request", param="file")
            self._in_file = True
            self.filename = filename.decode("utf-8", "replace")[:MAX_FILENAME]

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_file:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise InvalidRequest(f"a form field is longer than {MAX_FIELD_BYTES} bytes")
            return
        self.bytes += end - start
        if self.bytes > self._max_bytes:
            raise PayloadTooLarge(f"the file is larger than {self._max_bytes} bytes", param="file")
        self._ready.append(data[start:end])

    def _on_part_end(self) -> None:
        if not self._in_file:
            if len(self.fields) == MAX_FIELDS:
                raise InvalidRequest(f"the form has more than {MAX_FIELDS} fields")
            name = self._disposition.get(b"name", b"").decode("utf-8", "replace")
            self.fields[name] = self._value.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self._ended = True
