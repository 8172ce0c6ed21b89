"""Tiny Hugging Face models with random weights, saved as their makers would, and data for them."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

WORDS = ["where", "is", "my", "card", "the", "lost", "money", "transfer", "failed", "help", "pin"]


def tokenizer_json(*, cls: str = "[CLS]", sep: str = "[SEP]", pad: str = "[PAD]") -> str:
    """A WordPiece tokenizer over a few words, special tokens first, pad token with id 0 or 1."""
    special = [pad, cls, sep, "[UNK]"] if cls == "[CLS]" else [cls, pad, sep, "[UNK]"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(set(WORDS))])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", special_tokens=[(t, vocabulary[t]) for t in (cls, sep)]
    )
    tokenizer.add_special_tokens(special)
    return tokenizer.to_str()


SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def _bert() -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(**SIZES, max_position_embeddings=40), add_pooling_layer=False
    )


def _roberta() -> nn.Module:
    return transformers.RobertaModel(
        transformers.RobertaConfig(**SIZES, max_position_embeddings=34, pad_token_id=1)
    )


def _mpnet() -> nn.Module:
    return transformers.MPNetModel(
        transformers.MPNetConfig(**SIZES, max_position_embeddings=34, pad_token_id=1)
    )


def _distilbert() -> nn.Module:
    return transformers.DistilBertModel(
        transformers.DistilBertConfig(
            vocab_size=32, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=30
        )
    )


TEXT_MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    # how to make it, the longest input it takes, the id it pads with
    "bert": (_bert, 40, 0),
    "roberta": (_roberta, 32, 1),
    "mpnet": (_mpnet, 32, 1),
    "distilbert": (_distilbert, 30, 0),
}


def save_text_model(kind: str, folder: Path) -> Path:
    """Save a text encoder with its tokenizer, as `save_pretrained` lays it out."""
    torch.manual_seed(0)
    make, _, pad_id = TEXT_MODELS[kind]
    _save(make(), folder)
    names = {"cls": "<s>", "sep": "</s>", "pad": "<pad>"} if pad_id else {}
    (folder / "tokenizer.json").write_text(tokenizer_json(**names))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1000})
    )
    return folder


def save_wide_model(folder: Path) -> Path:
    """Save a BERT whose blocks pass something on: those of a fresh model hardly do."""
    save_text_model("bert", folder)
    wide = transformers.BertConfig(**SIZES, max_position_embeddings=40, initializer_range=0.3)
    torch.manual_seed(0)
    transformers.BertModel(wide, add_pooling_layer=False).save_pretrained(folder)
    return folder


def exclusive_or(rows: int) -> bytes:
    """Texts whose label says whether one of two words is there, but not both."""
    numbers = random.Random(0)
    others = [word for word in WORDS if word not in ("card", "money")]
    lines = ["text,label"]
    for row in range(rows):
        first, second = row % 2, row // 2 % 2
        words = numbers.sample(others, 2) + ["card"] * first + ["money"] * second
        numbers.shuffle(words)
        lines.append(f"{' '.join(words)},{'one' if first != second else 'other'}")
    return "\n".join(lines).encode()


def spots(rows: int) -> bytes:
    """Images with a bright spot, or with none, on noise."""
    numbers = np.random.default_rng(0)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for row in range(rows):
            pixels = numbers.integers(0, 120, (32, 32, 3)).astype(np.uint8)
            if row % 2:
                top, left = numbers.integers(4, 22, 2)
                pixels[top : top + 6, left : left + 6] = 255
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "PNG")
            archive.writestr(f"{('plain', 'spot')[row % 2]}/{row}.png", image.getvalue())
    return buffer.getvalue()


def as_sentence_transformer(folder: Path, *modules: str, **pooling: Any) -> None:
    """Add the files by which sentence-transformers says how to pool."""
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    listed = [
        {"idx": i, "name": str(i), "path": paths.get(name, f"{i}_{name}"), "type": f"st.{name}"}
        for i, name in enumerate(("Transformer", "Pooling", *modules))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def _resnet() -> nn.Module:
    return transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
    )


def _convnext() -> nn.Module:
    return transformers.ConvNextModel(
        transformers.ConvNextConfig(
            hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, layer_scale_init_value=1.0
        )
    )


def _vit() -> nn.Module:
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))


def _dinov2() -> nn.Module:
    return transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
        )
    )


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
IMAGE_MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    # how to make it, and its preprocessor_config.json as found on the hub
    "resnet": (
        _resnet,
        {
            "feature_extractor_type": "ConvNextFeatureExtractor",
            "crop_pct": 0.875,
            "do_normalize": True,
            "do_resize": True,
            "resample": 3,
            "size": 56,
            **IMAGENET,
        },
    ),
    "convnext": (
        _convnext,
        {
            "image_processor_type": "ConvNextImageProcessor",
            "crop_pct": 0.875,
            "do_normalize": True,
            "do_resize": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "resample": 3,
            "size": {"shortest_edge": 384},
            **IMAGENET,
        },
    ),
    "vit": (
        _vit,
        {
            "image_processor_type": "ViTImageProcessor",
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 2,
            "size": {"height": 32, "width": 32},
        },
    ),
    "dinov2": (
        _dinov2,
        {
            "image_processor_type": "BitImageProcessor",
            "crop_size": {"height": 28, "width": 28},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": 32},
            **IMAGENET,
        },
    ),
}


def save_image_model(kind: str, folder: Path, **settings: Any) -> Path:
    """Save an image encoder with its processor's settings, some of them changed by `settings`."""
    torch.manual_seed(0)
    make, processor = IMAGE_MODELS[kind]
    _save(make(), folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | settings))
    return folder


def _save(model: nn.Module, folder: Path) -> None:
    logging: Any = transformers.logging
    logging.disable_progress_bar()
    saving: Any = model.eval()
    saving.save_pretrained(folder)
