"""One full session for each model, the plain way: how many fit, and what they do.

    python bench/full_sessions.py <store> <trunk digest> <models> <megabytes> <seconds>

Loads the backbone's graph, without deltas, again and again: for as many models as are asked for, or
until the memory is used up. Prints JSON: their number, MB and milliseconds for each, and inputs per
second when 32 arrive at a time for models at random. Rows of one model share a run. There is no
HTTP, so a server made of them would be slower.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import psutil
from serving_rig import TEXT

from core.preprocessing import Prepared
from core.registry import Registry
from core.store import ArtifactStore
from core.trunk import Trunk
from training import backbones
from training.trunks import to_onnx

TOGETHER = 32


def main() -> None:
    """Load, measure and print."""
    registry = Registry(ArtifactStore(sys.argv[1]))
    shared = Trunk.load(registry, sys.argv[2], threads=1, max_pixels=1)
    graph = to_onnx(backbones.load(shared.manifest.backbone, ()), ())
    process = psutil.Process()
    models: list[Trunk] = []
    before, began = process.memory_info().rss, time.perf_counter()
    grown = 0
    while len(models) < int(sys.argv[3]) and grown < float(sys.argv[4]) * 1e6:
        models.append(Trunk(shared.manifest, graph, shared.preprocessor, threads=1))
        grown = process.memory_info().rss - before
    loaded = time.perf_counter() - began
    answer = {
        "models": len(models),
        "mb_each": grown / len(models) / 1e6,
        "load_ms": loaded / len(models) * 1000,
        "rate": _rate(models, float(sys.argv[5])),
    }
    print(json.dumps(answer))


def _rate(models: list[Trunk], seconds: float) -> float:
    random = np.random.default_rng(0)
    began, done = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        rows: dict[int, list[Prepared]] = {}
        for number in random.integers(len(models), size=TOGETHER).tolist():
            model = models[number]
            rows.setdefault(number, []).append(model.preprocessor.prepare(TEXT))  # type: ignore[arg-type]
        for number, prepared in rows.items():
            models[number].encode(prepared)
        done += TOGETHER
    return done / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
