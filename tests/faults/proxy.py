"""A TCP proxy that stands between a worker and Redis and misbehaves when told to."""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress
from enum import Enum

CHUNK_BYTES = 65536
SETTLED = b"succeeded"
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close by RST


class Mode(Enum):
    """What becomes of what is sent through the proxy."""

    OPEN = "open"
    SLOW = "slow"
    """Every answer is late."""
    BLACK_HOLE = "black hole"
    """Connections stay open and nothing comes through."""
    RESET = "reset"
    """Every connection is reset, at once and as soon as it is made."""
    DEAF = "deaf"
    """What is sent arrives, and the connection ends instead of the answer."""
    HALF_CLOSED = "half closed"
    """A job's end arrives; instead of the answer comes an end, and whatever follows is taken."""


class Proxy:
    """Listens on a port of its own, and forwards to a unix socket."""

    SLOW_SECONDS = 0.1

    def __init__(self, target: str) -> None:
        self._target = target
        self._mode = Mode.OPEN
        self._open: set[socket.socket] = set()
        self._cut: set[socket.socket] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def mode(self) -> Mode:
        """How the proxy behaves now."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        was, self._mode = self._mode, mode
        # Whatever was swallowed never comes, so these connections are of no use any more.
        if mode is Mode.RESET or was is Mode.BLACK_HOLE:
            for connection in list(self._open):
                self._reset(connection)

    def close(self) -> None:
        """End every connection."""
        self._server.close()
        for connection in list(self._open):
            self._reset(connection)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                if self._mode is Mode.RESET:
                    self._reset(client)
                    continue
                upstream = socket.socket(socket.AF_UNIX)
                try:
                    upstream.connect(self._target)
                except OSError:
                    client.close()
                    continue
                self._open |= {client, upstream}
                for source, sink in ((client, upstream), (upstream, client)):
                    arguments = (source, sink, source is upstream)
                    threading.Thread(target=self._forward, args=arguments, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if self._mode is Mode.BLACK_HOLE:
                    continue
                if is_answer and self._mode is Mode.DEAF:
                    break
                if not is_answer and self._mode is Mode.HALF_CLOSED and SETTLED in data:
                    self._cut.add(source)
                if is_answer and sink in self._cut:
                    sink.shutdown(socket.SHUT_WR)
                    while source.recv(CHUNK_BYTES):
                        continue
                if is_answer and self._mode is Mode.SLOW:
                    time.sleep(self.SLOW_SECONDS)
                sink.sendall(data)
        self._reset(source)
        self._reset(sink)

    def _reset(self, connection: socket.socket) -> None:
        self._open.discard(connection)
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
