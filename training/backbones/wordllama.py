"""WordLlama: one fixed vector for each token, averaged (Miller 2024, `l2_supercat`, 256 numbers).

The vectors were distilled from the token embeddings of Llama 2 70B. A text costs its tokenizing and
a mean, about a ninetieth of MiniLM's time; the order of words is lost. As the package's own
`embed(…, norm=True)` does it: no special tokens, and a text is not cut.

The files are read from the package `wordllama`, which is not imported: its loader asks the hub.
"""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from core.datasets import Modality
from core.preprocessing import TextPreprocess
from training.backbones import TorchBackbone
from training.backbones.sources import Source, unusable

WEIGHTS = "weights/l2_supercat_256.safetensors"
TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"

MAX_TOKENS = 8192
"""More than the longest text that a data set may hold: a mean costs nothing by its length."""


class MeanOfVectors(nn.Module):
    """`input_ids` and `attention_mask`, int64 [n, tokens], to unit vectors, float32 [n, dim].

    A text without tokens becomes zeros.
    """

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        tokens, dim = vectors.shape
        self.vectors = nn.Embedding(tokens, dim, _weight=vectors)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.unsqueeze(-1).to(torch.float32)
        # The sum points where the mean does.
        return nn.functional.normalize((self.vectors(input_ids) * mask).sum(dim=1), dim=1)


def load(source: Source) -> TorchBackbone:
    """Load the packaged vectors; raise `DataError` if its files are not there."""
    weights, tokenizer = source.root / WEIGHTS, source.root / TOKENIZER
    if not {weights, tokenizer} <= set(source.files):
        raise unusable("the package wordllama does not hold the files that Graft was built for")
    vectors = load_file(weights)["embedding.weight"].to(torch.float32)
    return TorchBackbone(
        name=source.name,
        modality=Modality.TEXT,
        dim=vectors.shape[1],
        module=MeanOfVectors(vectors).eval().requires_grad_(False),
        preprocess=TextPreprocess(
            max_tokens=MAX_TOKENS, pad_id=0, inputs=("input_ids", "attention_mask")
        ),
        tokenizer_json=_without_special_tokens(tokenizer.read_bytes()),
        digest=source.digest(),
    )


def _without_special_tokens(tokenizer_json: bytes) -> bytes:
    """Llama's tokenizer begins every text with `<s>`, whose vector would be in every mean."""
    return json.dumps(json.loads(tokenizer_json) | {"post_processor": None}).encode()
