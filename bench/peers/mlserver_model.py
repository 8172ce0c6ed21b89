"""MLServer with its adaptive batching: `POST /v2/models/peer/infer`, one BYTES text."""

from __future__ import annotations

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse
from plain import PlainModel


class Peer(MLModel):
    """One session."""

    async def load(self) -> bool:
        """Load the model."""
        self._model = PlainModel()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Class numbers."""
        texts = StringCodec.decode_input(payload.inputs[0])
        found = np.asarray(self._model.predict(list(texts)))
        output = NumpyCodec.encode_output("class", found.reshape(-1, 1))
        return InferenceResponse(model_name=self.name, outputs=[output])
