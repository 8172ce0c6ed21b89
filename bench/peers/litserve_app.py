"""LitServe with its batching."""

from __future__ import annotations

import sys

import litserve as ls
from plain import PlainModel


class Peer(ls.LitAPI):
    """`POST /predict {"texts": [...]}`, one text each."""

    def setup(self, device: str) -> None:
        """Load the model in the inference process."""
        self._model = PlainModel()

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads the types
        """The text."""
        return request["texts"][0]

    def batch(self, inputs: list[str]) -> list[str]:
        """Texts are batched as they are."""
        return inputs

    def predict(self, inputs: list[str]) -> list[int]:
        """Class numbers."""
        return self._model.predict(inputs)

    def unbatch(self, output: list[int]) -> list[int]:
        """One for each."""
        return output

    def encode_response(self, output: int) -> list[int]:
        """The answer."""
        return [output]


if __name__ == "__main__":
    api = Peer(max_batch_size=32, batch_timeout=0.001)
    ls.LitServer(api, accelerator="cpu").run(
        port=int(sys.argv[1]), host="127.0.0.1", generate_client_file=False
    )
