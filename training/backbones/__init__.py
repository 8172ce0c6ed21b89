"""Pretrained encoders as torch modules: what a trunk is exported from.

`load` gives the module, its preprocessing and its tokenizer; `digest` names the same files by
content without importing torch, so that a job whose trunk exists never loads the torch model.
Everything is read from local files: weights that come inside packages, directories that the
operator listed, or a pinned revision of a hub repository.

    sources          which files a backbone is, and their digest
    hf               any Hugging Face encoder, through `transformers.AutoModel`; MiniLM is one
    wordllama        WordLlama's vectors, our own module
    inverted_residuals  our own module of which efficientnet_lite and mobilenet are two tables

Not here: the export to ONNX and its check (training.trunks), the table (core.backbones).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.datasets import Modality
from training.backbones import sources

if TYPE_CHECKING:
    from torch import nn

    from core.preprocessing import ImagePreprocess, TextPreprocess


@dataclass(frozen=True)
class TorchBackbone:
    """A pretrained encoder.

    `module` takes the inputs that `preprocess` names, in that order (for images: `pixels`, float32
    [n, 3, height, width]), and returns pooled features, float32 [n, dim]. It is in evaluation mode.
    `tokenizer_json` is None for images. `digest` is that of the files it was read from.
    `encoder_path` leads from `module` to the part that adapters are made for, without pooling.
    """

    name: str
    modality: Modality
    dim: int
    module: nn.Module
    preprocess: TextPreprocess | ImagePreprocess
    tokenizer_json: bytes | None
    digest: str
    encoder_path: str = ""

    @property
    def encoder(self) -> nn.Module:
        """What `transformers.AutoModel` or our own loader gives, before pooling."""
        return self.module.get_submodule(self.encoder_path)


def load(model: str, hf_models: tuple[str, ...]) -> TorchBackbone:
    """Load the backbone that `model` names.

    Raises `DataError` with `param="model"` if it is not offered, or cannot be used as an encoder.
    """
    source = sources.locate(model, hf_models)
    match source.name:
        case "wordllama":
            from training.backbones import wordllama

            return wordllama.load(source)
        case "mobilenet-v2":
            from training.backbones import mobilenet

            return mobilenet.load(source)
        case "efficientnet-lite0":
            from training.backbones import efficientnet_lite

            return efficientnet_lite.load(source)
        case _:
            from training.backbones import hf

            return hf.load(source)


def digest(model: str, hf_models: tuple[str, ...]) -> str:
    """Return the SHA-256 over the weights, configuration and tokenizer that `load` would read.

    Raises `DataError` with `param="model"` if the model is not offered or its files are not there.
    """
    return sources.locate(model, hf_models).digest()
