"""The limit that a server is measured against: prepare, trunk and head in one process, no HTTP.

    python bench/in_process.py <store> <model> <seconds> <text or image file>

Prints JSON: the median of one input at a time, and inputs per second in batches of 32 (a text) or
one by one (an image), on one ONNX Runtime thread.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from core.head import Head
from core.identifiers import DEFAULT_TENANT
from core.registry import Registry
from core.store import ArtifactStore
from core.trunk import Trunk

BATCH = 32


def main() -> None:
    """Measure and print."""
    store, name, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    registry = Registry(ArtifactStore(store))
    manifest = registry.manifest(DEFAULT_TENANT, name, 1)
    trunk = Trunk.load(registry, manifest.trunk, threads=1, max_pixels=25_000_000)
    head = Head.load(registry, manifest)
    path = Path(sys.argv[4])
    item = path.read_text() if path.suffix == ".txt" else path.read_bytes()
    batch = BATCH if isinstance(item, str) else 1

    def run(rows: int) -> float:
        began = time.perf_counter()
        prepared = [trunk.preprocessor.prepare(item) for _ in range(rows)]  # type: ignore[arg-type]
        head.predict(trunk.encode(prepared)).argmax(axis=1)
        return time.perf_counter() - began

    def repeat(rows: int) -> list[float]:
        run(rows)
        end = time.perf_counter() + seconds
        times = []
        while time.perf_counter() < end:
            times.append(run(rows))
        return times

    one, many = repeat(1), repeat(batch)
    answer = {"p50_ms": statistics.median(one) * 1000, "rate": batch * len(many) / sum(many)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
