"""Results of pure functions that some job has computed already, in the artifact store.

    <tenant>/results/<key>      32 bytes of SHA-256 of the rest, and the result as safetensors

The key is a digest of all that a result can depend on: the function, every argument down to the
last row, and the *recipe*, which is Graft's own source and the versions of the libraries that
compute. Whoever asks with anything changed misses, and nobody has to remember a version number when
a function changes. So only pure functions may be asked for: nothing that reads a clock or a store.

Results are written create-exclusive and never changed, so workers share them without locks; the
oldest go when there are too many, too large or too old. A damaged one counts as absent. Not here:
features, which are kept row by row (training.feature_cache).
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load

from core.errors import AlreadyExists, NoSpace, NotFound, Unavailable
from core.store import ArtifactStore
from core.tensors import write_tensors
from core.trunk import Trunk

T = TypeVar("T")

MAX_RESULTS = 500
"""Results of one tenant; their names are listed whenever one is added."""

_DIGEST_BYTES = 32
_SECONDS_PER_DAY = 86_400
_JSON = "json"
_LIBRARIES = ("numpy", "pillow", "pydantic", "scikit-learn", "scipy", "tokenizers", "torch")


class Recalled(NamedTuple, Generic[T]):
    """A result, and whether an earlier job computed it."""

    result: T
    is_old: bool


class ResultCache:
    """What pure functions gave for a tenant's jobs. `max_bytes` = 0 keeps nothing."""

    def __init__(self, store: ArtifactStore, tenant: str, *, max_bytes: int, max_days: int) -> None:
        self._store = store
        self._folder = f"{tenant}/results"
        self._max_bytes = max_bytes
        self._max_days = max_days

    def recall(self, kind: type[T], function: Callable[..., T], *arguments: object) -> Recalled[T]:
        """Return `function(*arguments)`, a `kind`: as an earlier job had it, or computed and kept.

        `kind` is a pydantic model, or a dataclass of models, plain values and arrays.
        """
        if not self._max_bytes:
            return Recalled(function(*arguments), is_old=False)
        key = digest_of(function, arguments)
        known = self.find(key, kind)
        if known is not None:
            return Recalled(known, is_old=True)
        result = function(*arguments)
        self.keep(key, kind, result)
        return Recalled(result, is_old=False)

    def find(self, digest: str, kind: type[T]) -> T | None:
        """Return what was kept under a digest (`digest_of`), if anything was."""
        key = f"{self._folder}/{digest}"
        try:
            data = self._store.get(key)
            body = data[_DIGEST_BYTES:]
            if sha256(body).digest() == data[:_DIGEST_BYTES]:
                return _read(kind, body)
            self._store.delete(key)  # or it would be in the way of the next
        except (NotFound, Unavailable):
            pass
        return None

    def keep(self, digest: str, kind: type[T], result: T) -> None:
        """Keep a result; a store that is full or away only means that the next job computes it."""
        key, body = f"{self._folder}/{digest}", _write(kind, result)
        data = sha256(body).digest() + body
        if len(data) > self._max_bytes:
            return
        try:
            self._evict(len(data))
            self._store.put_new(key, data)
        except (AlreadyExists, NoSpace, Unavailable):
            pass

    def _evict(self, coming_bytes: int) -> None:
        """Remove the oldest results until the next one has room."""
        kept = sorted(self._store.walk(self._folder), key=lambda entry: entry.modified_at)
        total = sum(entry.bytes for entry in kept) + coming_bytes
        oldest = time.time() - self._max_days * _SECONDS_PER_DAY
        while kept:
            is_excess = total > self._max_bytes or len(kept) >= MAX_RESULTS
            if not is_excess and kept[0].modified_at >= oldest:
                break
            self._store.delete(kept[0].key)
            total -= kept.pop(0).bytes


def digest_of(function: Callable[..., object], arguments: Sequence[object]) -> str:
    """Return what names the result of a function of a module; raise `TypeError` for a closure."""
    if "<" in function.__qualname__:
        raise TypeError(f"{function.__qualname__} has no name of its own")
    digest = sha256(_recipe())
    _feed(digest, f"{function.__module__}.{function.__qualname__}")
    _feed(digest, arguments)
    return digest.hexdigest()


@cache
def _recipe() -> bytes:
    """Return a digest of what computes: the source, the libraries and the kind of machine."""
    digest = sha256()
    root = Path(__file__).parents[1]
    for package in ("core", "training"):
        for path in sorted((root / package).rglob("*.py")):
            _feed(digest, [path.relative_to(root).as_posix(), path.read_bytes()])
    _feed(digest, [importlib.metadata.version(name) for name in _LIBRARIES])
    _feed(digest, [platform.python_version(), platform.machine()])
    return digest.digest()


def _feed(digest: Any, value: object) -> None:
    """Add a value to a digest so that no two different ones look alike."""
    digest.update(f"{type(value).__qualname__} ".encode())
    match value:
        case None | bool() | int() | float() | str():
            digest.update(f"{value!r} ".encode("utf-8", "surrogatepass"))
        case bytes():
            digest.update(f"{len(value)} ".encode())
            digest.update(value)
        case np.ndarray():
            digest.update(f"{value.dtype.str} {value.shape} ".encode())
            digest.update(np.ascontiguousarray(value).data)
        case BaseModel():
            _feed(digest, value.model_dump_json())
        case Trunk():
            _feed(digest, value.manifest.digest)
        case Mapping():
            _feed(digest, list(value.items()))
        case Sequence():
            digest.update(f"{len(value)} ".encode())
            for each in value:
                _feed(digest, each)
        case _ if is_dataclass(value):
            for field in fields(value):
                _feed(digest, [field.name, getattr(value, field.name)])
        case _:
            raise TypeError(f"{type(value).__qualname__} cannot be told from another by content")


def _write(kind: type[T], result: T) -> bytes:
    arrays: dict[str, np.ndarray] = {}
    tree = _without_arrays(TypeAdapter(kind).dump_python(result), "", arrays)
    text = json.dumps(tree).encode()
    return write_tensors({_JSON: np.frombuffer(text, np.uint8), **arrays})


def _read(kind: type[T], body: bytes) -> T | None:
    try:
        arrays = load(body)
        tree = json.loads(arrays.pop(_JSON).tobytes())
        for place, array in arrays.items():
            *parents, name = place.split(".")
            node = tree
            for parent in parents:
                node = node[parent]
            node[name] = array
        return TypeAdapter(kind).validate_python(tree)
    except (KeyError, ValueError, SafetensorError):
        return None


def _without_arrays(value: Any, place: str, arrays: dict[str, np.ndarray]) -> Any:
    """Move the arrays of a dataclass, and of those in it, from a tree to `arrays` by place."""
    if isinstance(value, np.ndarray):
        arrays[place] = value
        return None
    if isinstance(value, dict):
        before = f"{place}." if place else ""
        return {
            name: _without_arrays(each, f"{before}{name}", arrays) for name, each in value.items()
        }
    return value
