"""Text encoders in the Hugging Face layout: pooling, length and tokenizer.

A sentence-transformers directory says how it was trained to pool (`modules.json`), and that is
followed. Otherwise token vectors are averaged, the best of the plain poolings in Sentence-BERT
(Reimers & Gurevych 2019, arXiv 1908.10084, table 6), and scaled to unit length, so that features of
any encoder are of one size, and the absolute tolerance of a parity check means the same for all.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn

from core.datasets import Modality
from core.preprocessing import TextPreprocess
from training.backbones import TorchBackbone
from training.backbones.sources import Source, unusable

MAX_TOKENS = 512
"""Longest input of any text trunk: attention costs the square of it."""

Pooling = Literal["mean", "cls"]


class PooledText(nn.Module):
    """`input_ids` and `attention_mask`, int64 [n, tokens], to features, float32 [n, dim].

    Token types are no input: for a single text they are all zero.
    """

    def __init__(self, encoder: nn.Module, pooling: Pooling, normalise: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.normalise = normalise
        self.token_types = "token_type_ids" in inspect.signature(encoder.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.token_types:
            inputs["token_type_ids"] = torch.zeros_like(input_ids)
        output = self.encoder(**inputs)
        tokens: Tensor = output.last_hidden_state
        if self.pooling == "cls":
            pooled = tokens[:, 0]
        else:
            mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
            pooled = (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
        return nn.functional.normalize(pooled, dim=1) if self.normalise else pooled


def build(source: Source, encoder: nn.Module) -> TorchBackbone:
    """Make a backbone of a loaded text encoder.

    Raises `DataError` if it pools in an unknown way, or has no fast tokenizer of its own.
    """
    pooling, normalise = _pooling(source.root)
    tokenizer_json, tokenizer_limit = _tokenizer(source.root)
    config, embeddings = cast(Any, encoder).config, cast(Any, encoder).get_input_embeddings()
    if Tokenizer.from_str(tokenizer_json.decode()).get_vocab_size() > embeddings.num_embeddings:
        raise unusable("the tokenizer has more tokens than the model has embeddings")
    return TorchBackbone(
        name=source.name,
        modality=Modality.TEXT,
        dim=int(config.hidden_size if hasattr(config, "hidden_size") else config.dim),
        module=PooledText(encoder, pooling, normalise).eval(),
        preprocess=TextPreprocess(
            max_tokens=_max_tokens(source.root, encoder, tokenizer_limit),
            pad_id=int(config.pad_token_id or 0),
            inputs=("input_ids", "attention_mask"),
        ),
        tokenizer_json=tokenizer_json,
        digest=source.digest(),
        encoder_path="encoder",
    )


def _pooling(root: Path) -> tuple[Pooling, bool]:
    """Return how a sentence-transformers directory pools, or our own way for any other."""
    if not (root / "modules.json").is_file():
        return "mean", True
    pooling: Pooling = "mean"
    normalise = False
    for module in _read(root / "modules.json"):
        match str(module["type"]).rsplit(".", 1)[-1]:
            case "Transformer":
                pass
            case "Pooling":
                config = _read(root / Path(module["path"]).name / "config.json")
                pooling = _pooling_mode(config)
            case "Normalize":
                normalise = True
            case other:
                raise unusable(f"the sentence-transformers module {other} is not supported")
    return pooling, normalise


def _pooling_mode(config: dict[str, Any]) -> Pooling:
    prefix = "pooling_mode_"
    # Version 5 and later write one name, earlier ones a flag for each way.
    named = config.get("pooling_mode") or [
        key.removeprefix(prefix).removesuffix("_tokens").removesuffix("_token")
        for key, chosen in config.items()
        if key.startswith(prefix) and chosen
    ]
    modes = [named] if isinstance(named, str) else list(named)
    match modes:
        case [] | ["mean"]:
            return "mean"
        case ["cls"]:
            return "cls"
    raise unusable(f"pooling by {', '.join(map(str, modes))} is not supported")


def _tokenizer(root: Path) -> tuple[bytes, int]:
    """Return `tokenizer.json` and the longest input that the tokenizer's own config allows."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            root, local_files_only=True, trust_remote_code=False
        )
        limit = int(tokenizer.model_max_length)
        file = root / "tokenizer.json"
        if file.is_file():
            return file.read_bytes(), limit
        return tokenizer.backend_tokenizer.to_str().encode(), limit
    except Exception as error:
        # As with the weights: many types, with paths in them.
        raise unusable("the model has no tokenizer that the tokenizers library can run") from error


def _max_tokens(root: Path, encoder: nn.Module, tokenizer_limit: int) -> int:
    limits = [MAX_TOKENS, tokenizer_limit]
    if (root / "sentence_bert_config.json").is_file():
        limits.append(_read(root / "sentence_bert_config.json").get("max_seq_length") or MAX_TOKENS)
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin number positions from the padding index up.
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - reserved)
    return min(limits)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise unusable(f"{path.name} is missing or is not JSON") from error
