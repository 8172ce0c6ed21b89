"""BentoML with its own adaptive batching."""

from __future__ import annotations

import bentoml
from plain import PlainModel


@bentoml.service(workers=1, traffic={"timeout": 60})
class Peer:
    """`POST /predict {"texts": [...]}`"""

    def __init__(self) -> None:
        self._model = PlainModel()

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=1000)  # type: ignore[untyped-decorator]
    def predict(self, texts: list[str]) -> list[int]:
        """Class numbers."""
        return self._model.predict(texts)
