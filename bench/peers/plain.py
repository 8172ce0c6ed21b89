"""What the peers share: the same trunk and head as Graft's, loaded the plain way.

`PEER_FOLDER` has `trunk.onnx`, `tokenizer.json` and `head.npz`; `PEER_THREADS` is the number of
ONNX Runtime's threads. Nothing of Graft is imported, so a peer runs in an environment of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer


class PlainModel:
    """One session of its own for one model."""

    def __init__(self) -> None:
        folder = Path(os.environ["PEER_FOLDER"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(os.environ["PEER_THREADS"])
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(
            str(folder / "trunk.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._names = [each.name for each in self._session.get_inputs()]
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(256)
        head = np.load(folder / "head.npz")
        self._weight, self._bias = head["weight"], head["bias"]

    def predict(self, texts: list[str]) -> list[int]:
        """Return the number of the likeliest class of each text."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        width = max(map(len, ids))
        input_ids = np.zeros((len(ids), width), np.int64)
        mask = np.zeros((len(ids), width), np.int64)
        for row, each in enumerate(ids):
            input_ids[row, : len(each)] = each
            mask[row, : len(each)] = 1
        arrays = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(input_ids),
        }
        feed = {name: arrays[name] for name in self._names}
        features = self._session.run(["features"], feed)[0]
        logits = features @ self._weight + self._bias
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return [int(n) for n in (powers / powers.sum(axis=1, keepdims=True)).argmax(axis=1)]
