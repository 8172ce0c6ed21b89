"""Any Hugging Face encoder in a directory, through `transformers.AutoModel`.

What the model reads decides what it becomes: `input_ids` a text encoder, `pixel_values` an image
encoder. Safetensors only, no code from the repository, eager attention (the form that exports).
Every weight of the encoder must be in the file: transformers would fill a gap with random numbers.

Not here: pooling and preprocessing (hf_text, hf_image), finding the directory (sources).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn

from training.backbones import TorchBackbone, hf_image, hf_text
from training.backbones.sources import Source, unusable


def load(source: Source) -> TorchBackbone:
    """Load the encoder in `source.root`.

    Raises `DataError` with `param="model"` if it has no safetensors, is of an unknown type, is
    incomplete, or reads neither text nor images.
    """
    if not source.find(".safetensors"):
        raise unusable("the model has no safetensors weights")
    with _quiet():
        encoder = _encoder(source)
        match getattr(encoder, "main_input_name", None):
            case "input_ids":
                return hf_text.build(source, encoder)
            case "pixel_values":
                return hf_image.build(source, encoder)
    raise unusable("the model reads neither text nor images")


def _encoder(source: Source) -> nn.Module:
    try:
        encoder: nn.Module
        report: dict[str, Any]
        encoder, report = transformers.AutoModel.from_pretrained(
            source.root,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError, ImportError, RuntimeError,
        # SafetensorError and more, with paths in them; all say that the files are not an encoder.
        raise unusable("transformers cannot load the model") from error
    # The pooler of a text model or a ViT is not used, and often not saved.
    missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    if missing or report["mismatched_keys"]:
        raise unusable("the model's weights are incomplete")
    if getattr(encoder.config, "is_encoder_decoder", False):
        raise unusable("the model is an encoder-decoder; an encoder is needed")
    return encoder.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars and logging advice into the worker's log."""
    logging: Any = transformers.logging  # its functions carry no annotations
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
