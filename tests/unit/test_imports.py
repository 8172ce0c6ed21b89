"""What each process must never load, seen in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

TRAINING_ONLY = ("torch", "transformers", "onnx", "pyarrow")


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("service.app", (*TRAINING_ONLY, "training")),
        ("training.worker", (*TRAINING_ONLY, "onnxruntime", "bentoml", "service")),
        ("training.ingest", ("torch", "transformers", "onnx", "onnxruntime", "bentoml", "service")),
        ("training.pipeline", ("bentoml", "service", "redis")),
        ("cli.main", (*TRAINING_ONLY, "onnxruntime", "bentoml", "redis", "service", "training")),
    ],
)
def test_process_does_not_load(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(found.stdout.split())
    assert module.split(".")[0] in loaded
    assert not loaded & set(forbidden)
