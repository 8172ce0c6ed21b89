"""The artifact store: written once, whole or not at all, and its troubles by their right names."""

from __future__ import annotations

import asyncio
import io
import resource
import signal
import threading
import zipfile
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import GenericError, PermissionDeniedError

from core.errors import AlreadyExists, NoSpace, NotFound, Unavailable
from core.store import ArtifactStore


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


def files(tmp_path: Path) -> list[str]:
    root = tmp_path / "store"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def test_what_is_put_is_read_back(store: ArtifactStore):
    store.put_new("a/b", b"data")
    assert store.get("a/b") == b"data"
    assert store.size("a/b") == 4
    with store.open("a/b") as file:
        assert file.read(2) == b"da"
        assert file.seek(-3, 2) == 1
        assert file.read() == b"ata"
        assert file.tell() == 4
        file.seek(0)
        assert list(file) == [b"data"]
    assert file.closed


def test_an_opened_object_is_a_file_to_any_library(store: ArtifactStore):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.txt", "x" * 3_000_000)
    store.put_new("a.zip", packed.getvalue())
    with store.open("a.zip") as file, zipfile.ZipFile(file) as archive:
        assert archive.read("a.txt") == b"x" * 3_000_000
    store.put_new("lines", b"one\ntwo\n")
    with io.TextIOWrapper(store.open("lines")) as text:
        assert list(text) == ["one\n", "two\n"]


def test_an_object_is_written_once(store: ArtifactStore):
    store.put_new("a/b", b"first")
    with pytest.raises(AlreadyExists):
        store.put_new("a/b", b"second")
    assert store.get("a/b") == b"first"


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_of_many_writers_one_wins_and_nobody_sees_half(store: ArtifactStore, size: int):
    start = threading.Barrier(16)

    def write(number: int) -> bool:
        start.wait(10)
        try:
            store.put_new("k/v", bytes([number]) * size)
        except AlreadyExists:
            assert len(store.get("k/v")) == size
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(write, range(16)))
    assert won.count(True) == 1
    assert store.get("k/v") == bytes([won.index(True)]) * size


def test_what_is_not_there(store: ArtifactStore):
    for read in (store.get, store.open):
        with pytest.raises(NotFound):
            read("no/such")
    assert store.size("no/such") is None
    assert list(store.walk("no")) == []
    assert store.children("no") == []
    store.delete("no/such")


def test_a_folder_is_not_an_object(store: ArtifactStore):
    store.put_new("a/b/c", b"x")
    with pytest.raises((NotFound, Unavailable)):
        store.get("a/b")
    assert store.size("a/b") is None


def test_walk_and_children_go_by_whole_names(store: ArtifactStore):
    for key in ("m/foo/1/x", "m/foo/10/x", "m/foobar/1/x", "m/x"):
        store.put_new(key, b"12")
    assert sorted(entry.key for entry in store.walk("m/foo")) == ["m/foo/1/x", "m/foo/10/x"]
    assert sorted(entry.key for entry in store.walk("m/foo/1")) == ["m/foo/1/x"]
    assert {entry.bytes for entry in store.walk("m")} == {2}
    assert store.children("m") == ["foo", "foobar"]
    assert store.children("") == ["m"]


def test_delete_passes_over_what_is_gone(store: ArtifactStore, tmp_path: Path):
    store.put_new("a/b", b"x")
    store.put_new("a/c", b"x")
    store.delete("a/b", "a/zz", "a/c")
    assert files(tmp_path) == []


@pytest.mark.anyio
async def test_a_stream_is_stored_whole(store: ArtifactStore):
    parts = [bytes([n]) * 3_000_000 for n in range(4)]
    await store.put_stream("a/b", chunks(*parts))
    read = [chunk async for chunk in store.stream("a/b")]
    assert b"".join(read) == b"".join(parts)
    assert len(read) > 1


@pytest.mark.anyio
@pytest.mark.parametrize("sent", [0, 1, 12])
async def test_a_stream_that_breaks_stores_nothing_and_says_why(
    store: ArtifactStore, tmp_path: Path, sent: int
):
    async def broken() -> AsyncIterator[bytes]:
        for _ in range(sent):
            yield b"x" * 1_000_000
        raise ArithmeticError("the caller's own")

    with pytest.raises(ArithmeticError):
        await store.put_stream("a/b", broken())
    assert files(tmp_path) == []


@pytest.mark.anyio
async def test_streaming_what_is_not_there(store: ArtifactStore):
    with pytest.raises(NotFound):
        await anext(store.stream("no/such"))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Make the kernel refuse to let any file grow beyond a size, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_the_kernel_cuts_leaves_nothing(store: ArtifactStore, tmp_path: Path):
    with largest_file(1000), pytest.raises((NoSpace, Unavailable)):
        store.put_new("a/b", b"x" * 100_000)
    assert files(tmp_path) == []
    store.put_new("a/b", b"y")
    assert store.get("a/b") == b"y"


def test_a_stream_that_the_kernel_cuts_leaves_nothing(store: ArtifactStore, tmp_path: Path):
    with largest_file(1000), pytest.raises((NoSpace, Unavailable)):
        asyncio.run(store.put_stream("a/b", chunks(*[b"x" * 1_000_000] * 12)))
    assert files(tmp_path) == []


# A disk cannot be filled here, so this is where obstore's and the kernel's words for it come in.
FULL = [
    OSError(28, "No space left on device"),
    OSError(122, "Disk quota exceeded"),
    GenericError("Generic LocalFileSystem error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_is_no_space(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(obstore, "put", fail)
    with pytest.raises(NoSpace) as refused:
        store.put_new("a/b", b"x")
    assert str(refused.value) == "the artifact store has no room left"


@pytest.mark.parametrize(
    "error", [GenericError("connect to /srv/secret"), PermissionDeniedError("/srv/secret"),
              OSError(5, "I/O", "/srv/secret")],
)  # fmt: skip
def test_other_trouble_is_unavailable_and_tells_no_path(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(obstore, "head", fail)
    monkeypatch.setattr(Path, "read_bytes", fail)
    for read in (store.size, store.get):
        with pytest.raises(Unavailable) as refused:
            read("a/b")
        assert "secret" not in str(refused.value)


def test_a_key_never_leads_out_of_the_store(tmp_path: Path):
    (tmp_path / "secret").write_bytes(b"x")
    store = ArtifactStore(str(tmp_path / "store"))
    for key in ("../secret", "a/../../secret", str(tmp_path / "secret")):
        with pytest.raises((NotFound, ValueError)):
            store.get(key)


def test_a_file_url_and_a_folder_are_the_same(tmp_path: Path):
    ArtifactStore(str(tmp_path)).put_new("a/b", b"x")
    assert ArtifactStore(f"file://{tmp_path}").get("a/b") == b"x"
