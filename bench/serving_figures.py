"""What a scenario of the serving bench measures with, and the figures that it has so far."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peer_servers import Peers
from serving_rig import ROOT, TEXT, Models, Server, confined


@dataclass
class Bench:
    """The options, the store that all scenarios share, and the figures of the one that runs."""

    models: Models
    rounds: int
    seconds: float
    many: int
    adapted: int
    swaps: int
    peers: Peers
    ratios: dict[str, list[float]] = field(default_factory=dict)

    def note(self, name: str, value: float) -> None:
        """Keep one round's figure."""
        self.ratios.setdefault(name, []).append(value)

    def show(self) -> None:
        """Print every figure's median and range, and forget them."""
        for name, values in self.ratios.items():
            low, high = min(values), max(values)
            print(f"  {name:<58} {statistics.median(values):9.3f}  [{low:.3f} – {high:.3f}]")
        self.ratios.clear()

    def limit(self, model: str, item: Path, core: int | None = None) -> dict[str, float]:
        """What the process reaches without HTTP."""
        folder = self.models.folder
        return self.script("in_process.py", folder, model, self.seconds, item, core=core)

    def script(self, name: str, *arguments: object, core: int | None = None) -> dict[str, float]:
        """What a script of this folder prints, run in a process of its own."""
        answer = subprocess.run(
            [sys.executable, str(ROOT / "bench" / name), *map(str, arguments)],
            cwd=ROOT, check=True, capture_output=True, preexec_fn=confined(core),
        ).stdout  # fmt: skip
        found: dict[str, float] = json.loads(answer)
        return found

    def text_file(self) -> Path:
        """The text, as a file."""
        path = self.models.folder / "text.txt"
        path.write_text(TEXT)
        return path

    def load(
        self, server: Server, concurrency: int, bodies: list[list[str]], **plan: Any
    ) -> dict[str, Any]:
        """What the load generator finds of a server."""
        return server.load(
            concurrency=concurrency, seconds=self.seconds, bodies=bodies,
            warm_seconds=min(1.0, self.seconds / 2), **plan,
        )  # fmt: skip
