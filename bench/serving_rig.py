"""What the serving bench runs on: a store with models, the real service, its peers, a generator.

Everything that is measured runs in fresh processes of its own and is stopped by its process id.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
import psutil
from pydantic import SecretStr

from cli import embedded_redis
from core.adapters import feed, write_adapter
from core.bootstrap import open_queue
from core.changes import Change
from core.identifiers import DEFAULT_TENANT, PRODUCTION
from core.manifests import DatasetReference, ModelManifest, Precision, TrunkManifest
from core.novelty import NOVELTY_FILE
from core.registry import Registry
from core.settings import Settings
from core.store import ArtifactStore
from core.trunk import Trunk
from training.export import export_head
from training.fit import Head
from training.novelty import estimate_novelty
from training.parity import random_adapter
from training.trunks import ensure_trunk

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 77
TEXT = "I still have not received my new card, I ordered it over a week ago"
"""17 tokens with the two that MiniLM's tokenizer adds."""

READY_SECONDS = 180.0


class Models:
    """A store with trunks and as many models on them as a scenario wants."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = Registry(ArtifactStore(str(folder)))

    def trunk(self, backbone: str, precision: Precision = "fp32") -> TrunkManifest:
        """Export a backbone, or find it exported."""
        return self.loaded(backbone, precision).manifest

    def loaded(self, backbone: str, precision: Precision = "fp32") -> Trunk:
        """Export a backbone, or find it exported, and load it."""
        return ensure_trunk(
            self.registry, backbone, precision=precision, hf_models=(), threads=1,
            max_pixels=25_000_000, on_export=lambda: None,
        )  # fmt: skip

    def publish(self, trunk: TrunkManifest, name: str, seed: int = 0) -> ModelManifest:
        """Publish and release a head of random weights."""
        return self.store(*self.make(trunk, name, seed))

    def make(
        self, trunk: TrunkManifest, name: str, seed: int
    ) -> tuple[ModelManifest, dict[str, bytes]]:
        """Return a head of random weights, ready to be stored."""
        head = self._head(trunk.dim, seed)
        random = np.random.default_rng(seed)
        sample = random.normal(size=(8, trunk.dim)).astype(np.float32) / np.sqrt(trunk.dim)
        draft = ModelManifest(
            tenant=DEFAULT_TENANT, name=name, version=0, job=f"ftjob-{time.monotonic_ns()}",
            attempt=1, created_at=time.time(), backbone=trunk.backbone, trunk=trunk.digest,
            modality=trunk.modality, dim=trunk.dim,
            labels=[f"{name}-label-{number}" for number in range(CLASSES)], files={},
            dataset=DatasetReference(file="file-bench", sha256="0" * 64, rows=1), training={},
            metrics={},
        )  # fmt: skip
        return draft, export_head(head, sample) | {NOVELTY_FILE: self._novelty(trunk.dim, seed)}

    def make_low_rank(
        self, trunk: Trunk, name: str, seed: int, rank: int = 8
    ) -> tuple[ModelManifest, dict[str, bytes]]:
        """Return a head of random weights with random deltas on every layer."""
        slots = trunk.manifest.slots
        adapter = random_adapter(slots, rank, seed)
        features = trunk.encode(trunk.golden_rows, feed(adapter, slots))
        draft, _ = self.make(trunk.manifest, name, seed)
        kind = {"kind": "low_rank", "rank": rank, "blocks": trunk.manifest.blocks}
        files = export_head(self._head(trunk.dim, seed), features)
        files |= write_adapter(adapter, slots, "bench") | {
            NOVELTY_FILE: self._novelty(trunk.dim, seed)
        }
        return draft.model_copy(update=kind), files

    def store(self, draft: ModelManifest, files: dict[str, bytes]) -> ModelManifest:
        """Publish and release what `make` made."""
        manifest = self.registry.publish(draft, files)
        aliases = {PRODUCTION: manifest.version}
        self.registry.releases.alias(
            DEFAULT_TENANT, draft.name, aliases, created_by="bench", reason="bench"
        )
        return manifest

    @staticmethod
    def _head(dim: int, seed: int) -> Head:
        random = np.random.default_rng(seed)
        weight = random.normal(size=(dim, CLASSES)).astype(np.float32)
        return Head(weight, random.normal(size=CLASSES).astype(np.float32))

    @staticmethod
    def _novelty(dim: int, seed: int) -> bytes:
        """Statistics as every job gives them, of two rows a class."""
        random = np.random.default_rng(seed)
        rows = random.normal(size=(2 * CLASSES, dim)).astype(np.float32)
        return estimate_novelty(rows, np.arange(2 * CLASSES) % CLASSES, CLASSES, seed=seed).write()

    def unpack(self, manifest: ModelManifest, folder: Path) -> None:
        """Write what the peers serve: the trunk, its tokenizer, and the head's arrays."""
        from core.linear_graph import read_linear_graph

        trunk = self.registry.trunk(manifest.trunk)
        for name in ("trunk.onnx", "tokenizer.json"):
            (folder / name).write_bytes(self.registry.trunk_file(trunk, name))
        weight, bias = read_linear_graph(self.registry.file(manifest, "head.onnx"))
        np.savez(folder / "head.npz", weight=weight, bias=bias)


class Server:
    """A server process and what it started, as a context manager that waits until it answers."""

    def __init__(
        self, command: list[str], port: int, path: str, env: Mapping[str, str], cwd: Path = ROOT
    ) -> None:
        self.port = port
        self.start_seconds = 0.0
        self._command = command
        self._path = path
        # One for all that is asked: a client of its own costs each request 20 ms of these cores.
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        self._env = {**os.environ, "BENTOML_DO_NOT_TRACK": "True", **env}
        self._cwd = cwd
        self._core: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def on_core(self, number: int) -> Self:
        """Start it on this core alone, with all that it starts itself."""
        self._core = number
        return self

    def __enter__(self) -> Self:
        began = time.perf_counter()
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command, cwd=self._cwd, env=self._env, stdout=self._log,
            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=confined(self._core),
        )  # fmt: skip
        while not self._is_ready():
            if self._process.poll() is not None or time.perf_counter() - began > READY_SECONDS:
                self._log.seek(0)
                text = self._log.read().decode(errors="replace")[-3000:]
                self.__exit__(None, None, None)
                raise SystemExit(f"{' '.join(self._command)} did not start:\n{text}")
            time.sleep(0.02)
        self.start_seconds = time.perf_counter() - began
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(15)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()
        self.http.close()

    def resident_bytes(self) -> int:
        """Memory of the largest process: the one that serves."""
        assert self._process is not None
        parent = psutil.Process(self._process.pid)
        return max(each.memory_info().rss for each in [parent, *parent.children(recursive=True)])

    def load(self, **plan: Any) -> dict[str, Any]:
        """Run the load generator against this server; see `load_generator.Plan`."""
        process = start_load(port=self.port, **plan)
        answer, _ = process.communicate(timeout=plan["seconds"] + 120)
        found: dict[str, Any] = json.loads(answer)
        return found

    def _is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return self.http.get(self._path, timeout=5).status_code < 500
        return False


class Service(Server):
    """`bentoml serve` of Graft with a Redis of its own."""

    def __init__(self, models: Models, *, workers: int = 1, **settings: object) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="graft-b-"))
        self._redis: subprocess.Popen[bytes] | None = None
        port = free_port()
        env = {
            "GRAFT_STORE_URL": str(models.folder),
            "GRAFT_REDIS_URL": f"unix://{self._scratch}/redis.sock",
            "GRAFT_SERVICE_WORKERS": str(workers),
            "GRAFT_INFERENCE_THREADS": "1",
            "BENTOML_HOME": str(self._scratch / "bentoml"),
            **{f"GRAFT_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self._runner = asyncio.Runner()
        shared = open_queue(Settings(redis_url=SecretStr(env["GRAFT_REDIS_URL"])))
        self._queue, self._feed, _ = shared
        command = [sys.executable, "-m", "bentoml", "serve", "service.app:Graft"]
        super().__init__(
            [*command, "--host", "127.0.0.1", "--port", str(port)], port, "/readyz", env
        )

    def __enter__(self) -> Self:
        server = embedded_redis.find_server()
        assert server is not None, "no Redis server was found"
        path = self._scratch / "redis.sock"
        self._redis = subprocess.Popen(
            embedded_redis.command(server, self._scratch, path),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert embedded_redis.wait_until_answering(path, 30)
        return super().__enter__()

    def announce(self, model: str) -> None:
        """Say that a model has a new version, as the worker does that published it."""
        change = Change(tenant=DEFAULT_TENANT, model=model, type="published")
        self._runner.run(self._feed.publish(change))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._runner.run(self._queue.close())
        self._runner.close()
        if self._redis is not None:
            self._redis.terminate()
            self._redis.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)


def confined(core: int | None) -> Callable[[], None] | None:
    """What a new process has to call to stay on a core; None for any core."""
    return None if core is None else lambda: os.sched_setaffinity(0, {core})


def start_load(core: int | None = None, **plan: Any) -> subprocess.Popen[bytes]:
    """Start the load generator; its answer is one line of JSON on its standard output."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "bench/load_generator.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=confined(core),
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(plan).encode())
    process.stdin.close()
    process.stdin = None
    return process


def text_body(model: str, text: str = TEXT) -> list[str]:
    """A prediction of one text, as the generator takes it."""
    return [
        "/v1/predict", "application/json", json.dumps({"model": model, "inputs": [text]}),
    ]  # fmt: skip


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
