"""The artifact store: whatever must last, as immutable objects under keys.

One class over `obstore`: a local directory, S3, GCS or Azure behave alike. An object is written
once: `put_new` is put-if-absent and atomic, so two writers of one key cannot both win and a reader
never sees half an object. Nothing is locked and nothing is overwritten.

Keys are built by `core.files` and `core.registry` from validated identifiers; not here.
Methods are blocking, except `put_stream`: a coroutine calls them through `asyncio.to_thread`.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, from_url

from core.errors import AlreadyExists, GraftError, NoSpace, NotFound, Unavailable

BUFFER_BYTES = 1 << 20
_PLAIN_KEY = re.compile(r"(?!.*\.\.)\w[\w./-]*", re.ASCII)
# How object_store's LocalFileSystem names what it has not finished.
_STAGED = re.compile(r"#[0-9]+\Z")
_REMOTE_OPTIONS: Any = {"timeout": timedelta(seconds=60), "connect_timeout": timedelta(seconds=5)}


@dataclass(frozen=True)
class StoredObject:
    """An object's key, its size in bytes, and when it was written by the store's clock."""

    key: str
    bytes: int
    modified_at: float


@contextmanager
def _translated(key: str) -> Iterator[None]:
    """Turn the store's errors into ours; messages hold neither the store's root nor its URL."""
    try:
        yield
    except AlreadyExistsError:
        raise AlreadyExists(f"{key} exists") from None
    except (FileNotFoundError, IsADirectoryError):
        raise NotFound(f"{key} does not exist") from None
    except GraftError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("the artifact store has no room left") from error
        raise Unavailable("the artifact store does not answer") from error
    except BaseError as error:
        # obstore reports a full disk as a generic error; only its text tells.
        if "No space left" in str(error) or "os error 28" in str(error):
            raise NoSpace("the artifact store has no room left") from error
        raise Unavailable("the artifact store does not answer") from error


class _RawReader(io.RawIOBase):
    """obstore's reader as a file of Python's, which can be used with `with` and by any library."""

    def __init__(self, reader: obstore.ReadableFile, key: str) -> None:
        super().__init__()
        self._reader = reader
        self._key = key

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _translated(self._key):
            data = self._reader.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._reader.seek(offset, whence))

    def tell(self) -> int:
        return int(self._reader.tell())


class ArtifactStore:
    """Immutable objects under `/`-separated keys.

    Every method may raise `Unavailable`; those that write may raise `NoSpace`.
    """

    def __init__(self, url: str) -> None:
        """Open a directory (made if missing) or an object store such as `s3://bucket/prefix`."""
        # The union of store classes that obstore's own functions accept has no public name.
        self._store: Any
        self._root: Path | None = None
        if "://" in url and not url.startswith("file://"):
            self._store = from_url(url, client_options=_REMOTE_OPTIONS)
        else:
            self._root = Path(url.removeprefix("file://")).absolute()
            self._store = LocalStore(self._root, mkdir=True, automatic_cleanup=True)

    def put_new(self, key: str, data: bytes | mmap.mmap) -> None:
        """Write an object that must not exist; raise `AlreadyExists` if it does.

        A large file is given as its mapping, which is not copied into memory.
        """
        with _translated(key):
            obstore.put(self._store, key, data, mode="create")

    async def put_stream(self, key: str, chunks: AsyncIterator[bytes]) -> None:
        """Write an object from chunks of any size, in bounded memory.

        If `chunks` raises, its error passes through and nothing is stored.
        """
        with _translated(key):
            await obstore.put_async(self._store, key, chunks, max_concurrency=2)

    def get(self, key: str) -> bytes:
        """Return an object's bytes; raise `NotFound`."""
        with _translated(key):
            # A thread of obstore's to read a small file costs ten times the reading.
            if self._root is not None and _PLAIN_KEY.fullmatch(key):
                return (self._root / key).read_bytes()
            return bytes(obstore.get(self._store, key).bytes())

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        """Yield an object's bytes in chunks; raise `NotFound` before the first."""
        with _translated(key):
            result = await obstore.get_async(self._store, key)
            async for chunk in result.stream(min_chunk_size=1 << 20):
                yield bytes(chunk)

    def open(self, key: str) -> IO[bytes]:
        """Open an object as a seekable, buffered file for reading; raise `NotFound`."""
        with _translated(key):
            reader = obstore.open_reader(self._store, key)
        return io.BufferedReader(_RawReader(reader, key), BUFFER_BYTES)

    def size(self, key: str) -> int | None:
        """Return an object's size in bytes, or None if there is no such object."""
        try:
            with _translated(key):
                return int(obstore.head(self._store, key)["size"])
        except NotFound:
            return None

    def walk(self, prefix: str) -> Iterator[StoredObject]:
        """Yield every object whose key begins with the folder `prefix`.

        Those of any one folder, with what is below it, come one after another: object stores list
        by name, and a directory is walked folder by folder.
        """
        with _translated(prefix):
            for page in obstore.list(self._store, prefix, chunk_size=1000):
                for entry in page:
                    modified_at = entry["last_modified"].timestamp()
                    yield StoredObject(entry["path"], entry["size"], modified_at)

    def children(self, prefix: str) -> list[str]:
        """Return the names of the folders right below the folder `prefix`, sorted."""
        with _translated(prefix):
            found = obstore.list_with_delimiter(self._store, prefix or None)
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found["common_prefixes"])

    def delete(self, *keys: str) -> None:
        """Delete objects; those that do not exist are passed over."""
        for key in keys:
            try:
                with _translated(key):
                    obstore.delete(self._store, key)
            except NotFound:
                pass

    def staged(self, prefix: str) -> Iterator[StoredObject]:
        """Yield the half-written files below a folder, of live writers and dead ones, in no order.

        Only a directory has them; what an object store keeps of an upload that was broken off, its
        lifecycle rule removes. Their keys end as no object's does, and are for `drop_staged` only.
        """
        if self._root is None:
            return
        with _translated(prefix):
            for folder, _, names in os.walk(self._root / prefix):
                for name in filter(_STAGED.search, names):
                    path = Path(folder, name)
                    with suppress(FileNotFoundError):  # its writer was done
                        status = path.stat()
                        key = path.relative_to(self._root).as_posix()
                        yield StoredObject(key, status.st_size, status.st_mtime)

    def drop_staged(self, key: str) -> None:
        """Remove a half-written file whose writer is gone."""
        assert self._root is not None
        assert _STAGED.search(key)
        with _translated(key):
            path = self._root / key
            path.unlink(missing_ok=True)
            with suppress(OSError):  # there is something else in it
                path.parent.rmdir()
