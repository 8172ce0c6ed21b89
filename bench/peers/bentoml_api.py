"""BentoML, the plain way: one API method, one session."""

from __future__ import annotations

import bentoml
from plain import PlainModel


@bentoml.service(workers=1, traffic={"timeout": 60})
class Peer:
    """`POST /predict {"texts": [...]}`"""

    def __init__(self) -> None:
        self._model = PlainModel()

    @bentoml.api  # type: ignore[untyped-decorator]
    def predict(self, texts: list[str]) -> list[int]:
        """Class numbers."""
        return self._model.predict(texts)
