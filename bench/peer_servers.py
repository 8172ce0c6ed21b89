"""The peers of the serving bench: how each is started and asked.

Each serves the same trunk and head as one model of its own, in one process and with so many
ONNX Runtime threads; what cannot run here is left out by name.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from serving_rig import ROOT, TEXT, Models, Server, free_port

from core.manifests import ModelManifest

FOLDER = ROOT / "bench/peers"
BENTOML = ("bentoml_api", "bentoml_batchable")
OTHERS = ("fastapi", "litserve", "mlserver")


class Peers:
    """The chosen peers; `prepare` returns what starts each."""

    def __init__(
        self, names: list[str] | None, fastapi_python: str | None, mlserver_python: str | None
    ) -> None:
        self._pythons = {
            **dict.fromkeys(BENTOML, sys.executable),
            "fastapi": fastapi_python,
            "litserve": fastapi_python,
            "mlserver": mlserver_python,
        }
        self._names = [*BENTOML, *OTHERS] if names is None else names
        self._scratch = tempfile.TemporaryDirectory(prefix="graft-peers-")

    def prepare(
        self, models: Models, manifest: ModelManifest, threads: int
    ) -> dict[str, Callable[[], Server]]:
        """Unpack the model; return a starter for each peer that has a Python to run on."""
        folder = Path(self._scratch.name)
        models.unpack(manifest, folder)
        (folder / "model-settings.json").write_text(json.dumps(_MLSERVER_MODEL))
        missing = [name for name in self._names if self._pythons[name] is None]
        if missing:
            print(f"  left out, for they have no Python to run on: {', '.join(missing)}")
        return {
            name: lambda name=name, python=python: self._server(name, python, threads)  # type: ignore[misc]
            for name in self._names
            if (python := self._pythons[name])
        }

    def body(self, name: str) -> list[str]:
        """A request with one text, as the load generator takes it."""
        if name != "mlserver":
            return ["/predict", "application/json", json.dumps({"texts": [TEXT]})]
        tensor = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [TEXT]}
        return ["/v2/models/peer/infer", "application/json", json.dumps({"inputs": [tensor]})]

    def _server(self, name: str, python: str, threads: int) -> Server:
        port = free_port()
        env = {
            "PEER_FOLDER": self._scratch.name,
            "PEER_THREADS": str(threads),
            "PYTHONPATH": str(FOLDER),
            "BENTOML_HOME": str(Path(self._scratch.name) / "bentoml"),
            "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
        }
        if name in BENTOML:
            command = ["-m", "bentoml", "serve", f"{name}:Peer", "--port", str(port)]
            return Server([python, *command], port, "/readyz", env, FOLDER)
        if name == "fastapi":
            command = ["-m", "uvicorn", "fastapi_app:app", "--port", str(port), "--no-access-log"]
            return Server([python, *command], port, "/openapi.json", env, FOLDER)
        if name == "litserve":
            return Server([python, "litserve_app.py", str(port)], port, "/health", env, FOLDER)
        env |= {
            "MLSERVER_HTTP_PORT": str(port), "MLSERVER_GRPC_PORT": str(free_port()),
            "MLSERVER_METRICS_PORT": str(free_port()), "MLSERVER_PARALLEL_WORKERS": "0",
        }  # fmt: skip
        program = str(Path(python).parent / "mlserver")
        return Server([program, "start", self._scratch.name], port, "/v2/health/ready", env, FOLDER)


_MLSERVER_MODEL = {
    "name": "peer",
    "implementation": "mlserver_model.Peer",
    "max_batch_size": 32,
    "max_batch_time": 0.001,
}
