"""Loading real backbones: does each give the features its makers meant, and refuse what it must?"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from core.backbones import BACKBONES
from core.datasets import Modality
from core.errors import DataError
from core.preprocessing import ImagePreprocess, ImagePreprocessor, TextPreprocess, TextPreprocessor
from tests.integration.hf_models import (
    IMAGE_MODELS,
    TEXT_MODELS,
    as_sentence_transformer,
    save_image_model,
    save_text_model,
    tokenizer_json,
)
from training import backbones
from training.backbones import TorchBackbone
from training.backbones.inverted_residuals import InvertedResiduals

TEXT = "Where is my card"


def load(folder: Path) -> TorchBackbone:
    return backbones.load(f"hf:{folder}", (str(folder),))


def features(backbone: TorchBackbone, texts: list[str]) -> np.ndarray:
    assert isinstance(backbone.preprocess, TextPreprocess)
    assert backbone.tokenizer_json is not None
    preprocessor = TextPreprocessor(backbone.preprocess, backbone.tokenizer_json)
    with torch.inference_mode():
        rows = []
        for text in texts:
            ids = torch.tensor([preprocessor.prepare(text).ids])
            rows.append(backbone.module(ids, torch.ones_like(ids))[0].numpy())
    return np.stack(rows)


# -- what is found ---------------------------------------------------------------------------


def test_the_digest_is_of_the_files_and_needs_no_torch() -> None:
    code = (
        "import sys; from training import backbones;"
        "print(backbones.digest('minilm', ()), 'torch' in sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert printed == [backbones.digest("minilm", ()), "False"]


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(BACKBONES["mobilenet-v2"], package="weights-that-nobody-has")
    monkeypatch.setitem(BACKBONES, "mobilenet-v2", row)
    with pytest.raises(DataError, match="weights-that-nobody-has is not installed") as caught:
        backbones.load("mobilenet-v2", ())
    assert caught.value.param == "model"


def test_the_digest_changes_with_any_file_that_is_read(tmp_path: Path) -> None:
    folder = save_text_model("bert", tmp_path)
    model, allowed = f"hf:{folder}", (str(folder),)
    before = backbones.digest(model, allowed)
    (folder / "README.md").write_text("not read")
    assert backbones.digest(model, allowed) == before
    (folder / "tokenizer.json").write_text(tokenizer_json() + "\n")
    assert backbones.digest(model, allowed) != before


@pytest.mark.parametrize("model", ["gpt", "hf:somewhere", "hf:"])
def test_a_model_that_is_not_offered_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not offer") as caught:
        backbones.load(model, (str(tmp_path),))
    assert caught.value.param == "model"


def test_no_message_holds_a_path(tmp_path: Path) -> None:
    for content in ({}, {"config.json": "{}"}, {"config.json": "{", "model.safetensors": "x"}):
        folder = tmp_path / f"model-{len(content)}"
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
        with pytest.raises(DataError) as caught:
            load(folder)
        assert str(tmp_path) not in caught.value.message
        assert caught.value.param == "model"


def test_weights_in_pickle_are_not_read(tmp_path: Path) -> None:
    folder = save_text_model("bert", tmp_path)
    weights = folder / "model.safetensors"
    torch.save({}, folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(DataError, match="safetensors"):
        load(folder)


def test_incomplete_weights_are_refused_instead_of_made_up(tmp_path: Path) -> None:
    folder = save_text_model("bert", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(DataError, match="incomplete"):
        load(folder)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_text_model("bert", tmp_path)
    tokenizer = json.loads(tokenizer_json())
    tokenizer["model"]["vocab"] |= {f"word{i}": 100 + i for i in range(20)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="more tokens"):
        load(folder)


def test_code_in_a_repository_is_not_run(tmp_path: Path) -> None:
    folder = save_text_model("bert", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(DataError):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_hub_entry_is_fetched_at_its_revision_and_without_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub itself cannot be reached from here; what is asked of it can be looked at."""
    folder, asked = save_text_model("bert", tmp_path), []

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append((repo, options["revision"]))
        assert not {"*.bin", "*.py", "*.pkl", "*"} & set(options["allow_patterns"])
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    entry = "org/name@0123abc"
    assert backbones.load(f"hf:{entry}", (entry,)).name == f"hf:{entry}"
    assert asked == [("org/name", "0123abc")]
    with pytest.raises(DataError, match="revision"):
        backbones.load("hf:org/name", ("org/name",))


# -- text ------------------------------------------------------------------------------------


def test_minilm_gives_unit_vectors_that_know_what_is_alike() -> None:
    backbone = backbones.load("minilm", ())
    assert (backbone.modality, backbone.dim) == (Modality.TEXT, 384)
    assert isinstance(backbone.preprocess, TextPreprocess)
    assert backbone.preprocess.max_tokens == 256
    card, lost, cake = features(
        backbone, ["I lost my bank card", "my debit card is gone", "a recipe for apple cake"]
    )
    assert np.linalg.norm(card) == pytest.approx(1, abs=1e-5)
    assert card @ lost > 0.6 > 0.3 > card @ cake


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_length_and_padding_follow_the_model(kind: str, tmp_path: Path) -> None:
    _, longest, pad_id = TEXT_MODELS[kind]
    backbone = load(save_text_model(kind, tmp_path))
    assert isinstance(backbone.preprocess, TextPreprocess)
    assert (backbone.preprocess.max_tokens, backbone.preprocess.pad_id) == (longest, pad_id)
    assert features(backbone, [TEXT, TEXT * 100]).shape == (2, backbone.dim) == (2, 16)


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_without_pooling_settings_the_unit_mean_is_taken(kind: str, tmp_path: Path) -> None:
    folder = save_text_model(kind, tmp_path)
    backbone = load(folder)
    hidden = reference_hidden(folder, TEXT)
    mean = hidden.mean(axis=0)
    np.testing.assert_allclose(
        features(backbone, [TEXT])[0], mean / np.linalg.norm(mean), atol=1e-6
    )


def test_padding_does_not_change_features(tmp_path: Path) -> None:
    backbone = load(save_text_model("mpnet", tmp_path))
    assert isinstance(backbone.preprocess, TextPreprocess)
    ids, pad = [0, 5, 6, 2], backbone.preprocess.pad_id
    with torch.inference_mode():
        alone = backbone.module(torch.tensor([ids]), torch.ones(1, 4, dtype=torch.int64))
        padded = backbone.module(
            torch.tensor([[*ids, pad, pad]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
        )
    torch.testing.assert_close(alone, padded, atol=1e-6, rtol=0)


def test_sentence_transformers_files_say_how_to_pool(tmp_path: Path) -> None:
    hidden = reference_hidden(save_text_model("bert", tmp_path / "plain"), TEXT)
    for number, (modules, pooling, expected) in enumerate(
        (
            ((), {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, hidden[0]),
            ((), {"pooling_mode": "mean"}, hidden.mean(axis=0)),
            (("Normalize",), {"pooling_mode": "cls"}, hidden[0] / np.linalg.norm(hidden[0])),
        )
    ):
        folder = save_text_model("bert", tmp_path / str(number))
        as_sentence_transformer(folder, *modules, **pooling)
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
        backbone = load(folder)
        np.testing.assert_allclose(features(backbone, [TEXT])[0], expected, atol=1e-6)
        assert isinstance(backbone.preprocess, TextPreprocess)
        assert backbone.preprocess.max_tokens == 12


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (("Dense",), {"pooling_mode": "mean"}, "Dense"),
        ((), {"pooling_mode_max_tokens": True}, "max"),
        ((), {"pooling_mode": ["cls", "mean"]}, "cls, mean"),
    ],
)
def test_pooling_that_cannot_be_followed_is_refused(
    modules: tuple[str, ...], pooling: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save_text_model("bert", tmp_path)
    as_sentence_transformer(folder, *modules, **pooling)
    with pytest.raises(DataError, match=message):
        load(folder)


def test_a_tokenizer_of_the_older_kind_is_converted(tmp_path: Path) -> None:
    folder = save_text_model("bert", tmp_path)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    backbone = load(folder)
    assert isinstance(backbone.preprocess, TextPreprocess)
    assert backbone.tokenizer_json is not None
    prepared = TextPreprocessor(backbone.preprocess, backbone.tokenizer_json).prepare(TEXT)
    assert prepared.ids == [
        vocabulary[token] for token in ("[CLS]", "where", "is", "my", "card", "[SEP]")
    ]


def reference_hidden(folder: Path, text: str) -> np.ndarray:
    """Token vectors as transformers' own tokenizer and model give them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        hidden: np.ndarray = model(**inputs).last_hidden_state[0].numpy()
    return hidden


# -- images ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "blocks", "parameters"),
    [("efficientnet-lite0", 16, 4_652_008), ("mobilenet-v2", 17, 3_504_872)],
)
def test_packaged_image_backbones_recognise_photographs(
    model: str, blocks: int, parameters: int
) -> None:
    """Through their own ImageNet classifiers: temple roofs in China, a flower with a bee near."""
    samples = importlib.import_module("sklearn.datasets").load_sample_images().images
    backbone = backbones.load(model, ())
    assert (backbone.modality, backbone.dim) == (Modality.IMAGE, 1280)
    assert isinstance(backbone.module, InvertedResiduals)
    assert len(backbone.module.blocks) == blocks
    assert sum(p.numel() for p in backbone.module.parameters()) == parameters
    assert isinstance(backbone.preprocess, ImagePreprocess)
    preprocessor = ImagePreprocessor(backbone.preprocess, 10**7)
    pixels = np.stack([preprocessor.prepare(png(sample)).pixels for sample in samples])
    with torch.inference_mode():
        logits = backbone.module.fc(backbone.module(torch.from_numpy(pixels)))
    top = logits.topk(5).indices.tolist()
    assert 698 in top[0]  # palace
    assert set(top[1]) & {308, 309, 985}  # fly, bee, daisy


@pytest.mark.parametrize("kind", IMAGE_MODELS)
def test_images_are_prepared_as_transformers_does(kind: str, tmp_path: Path) -> None:
    folder = save_image_model(kind, tmp_path)
    backbone = load(folder)
    assert isinstance(backbone.preprocess, ImagePreprocess)
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    # Sides in a ratio that leaves no fraction of a pixel: transformers cuts it, Graft rounds it.
    image = Image.fromarray(picture).resize((480, 320), Image.Resampling.BICUBIC)
    ours = ImagePreprocessor(backbone.preprocess, 10**7).prepare(png(np.asarray(image))).pixels
    processor: Any = transformers.AutoImageProcessor
    theirs = processor.from_pretrained(folder)(image, return_tensors="np")["pixel_values"][0]
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("kind", IMAGE_MODELS)
def test_images_are_pooled_as_the_architecture_means(kind: str, tmp_path: Path) -> None:
    folder = save_image_model(kind, tmp_path)
    backbone = load(folder)
    assert isinstance(backbone.preprocess, ImagePreprocess)
    pixels = torch.randn(2, 3, *backbone.preprocess.crop)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        output = model(pixel_values=pixels)
        expected = {
            "resnet": lambda: output.last_hidden_state.mean(dim=(2, 3)),
            "convnext": lambda: output.pooler_output,
            "vit": lambda: output.last_hidden_state[:, 0],
            "dinov2": lambda: output.last_hidden_state[:, 0],
        }[kind]()
        torch.testing.assert_close(backbone.module(pixels), expected, atol=1e-5, rtol=0)
    assert backbone.dim == expected.shape[1]


def test_a_processor_that_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    folder = save_image_model("vit", tmp_path, do_resize=False)
    with pytest.raises(DataError, match="image processor"):
        load(folder)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
