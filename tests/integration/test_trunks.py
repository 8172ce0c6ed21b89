"""Backbones to trunks: exported once, equal to torch, and refused when they are not."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from onnx import helper
from tokenizers import Tokenizer
from torch import Tensor, nn

from core.backbones import BACKBONES
from core.errors import Conflict, DataError, ExportMismatch
from core.manifests import TrunkManifest
from core.preprocessing import Prepared, PreparedImage, PreparedText
from core.registry import Registry
from core.store import ArtifactStore
from core.trunk import Trunk, tolerance
from tests.integration.hf_models import (
    IMAGE_MODELS,
    TEXT_MODELS,
    save_image_model,
    save_text_model,
)
from training import backbones, parity, trunks
from training.backbones import TorchBackbone, sources, wordllama
from training.quantization import is_quantisable


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(ArtifactStore(str(tmp_path / "store")))


def ensure(registry: Registry, model: str, *hf_models: str, exports: list[str]) -> Trunk:
    return trunks.ensure_trunk(
        registry,
        model,
        hf_models=hf_models,
        threads=1,
        max_pixels=10**6,
        on_export=lambda: exports.append(model),
    )


def torch_rows(backbone: TorchBackbone, rows: Sequence[Prepared]) -> np.ndarray:
    """Features one row at a time, without padding."""
    features = []
    with torch.inference_mode():
        for row in rows:
            if isinstance(row, PreparedText):
                ids = torch.tensor([row.ids])
                features.append(backbone.module(ids, torch.ones_like(ids)))
            else:
                features.append(backbone.module(torch.from_numpy(row.pixels[None])))
    stacked: np.ndarray = torch.cat(features).numpy()
    return stacked


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_text_encoders_end_to_end(kind: str, registry: Registry, tmp_path: Path) -> None:
    folder = str(save_text_model(kind, tmp_path / "model"))
    trunk = ensure(registry, f"hf:{folder}", folder, exports=[])
    words = ["where is my card", "help", "", "the lost money transfer failed " * 20]
    prepare = trunk.preprocessor.prepare
    rows: list[Prepared] = [prepare(text) for text in words]  # type: ignore[arg-type]
    expected = torch_rows(backbones.load(f"hf:{folder}", (folder,)), rows)
    np.testing.assert_allclose(trunk.encode(rows), expected, atol=1e-5)
    np.testing.assert_allclose(trunk.encode(rows[:1]), expected[:1], atol=1e-5)
    assert trunk.encode([]).shape == (0, 16)


@pytest.mark.parametrize("kind", IMAGE_MODELS)
def test_image_encoders_end_to_end(kind: str, registry: Registry, tmp_path: Path) -> None:
    folder = str(save_image_model(kind, tmp_path / "model"))
    trunk = ensure(registry, f"hf:{folder}", folder, exports=[])
    backbone = backbones.load(f"hf:{folder}", (folder,))
    numbers = np.random.default_rng(0)
    shape = (3, *trunk.preprocessor.config.crop)  # type: ignore[union-attr]
    rows = [PreparedImage(numbers.normal(size=shape).astype(np.float32)) for _ in range(5)]
    expected = torch_rows(backbone, rows)
    np.testing.assert_allclose(trunk.encode(rows), expected, atol=tolerance(expected))
    np.testing.assert_allclose(trunk.encode(rows[:1]), expected[:1], atol=tolerance(expected))


@pytest.mark.parametrize("model", BACKBONES)
def test_packaged_backbones_equal_torch(model: str, registry: Registry) -> None:
    exports: list[str] = []
    trunk = ensure(registry, model, exports=exports)
    assert exports == [model]
    assert 0 < trunk.manifest.max_difference < 1e-4
    row, slots = BACKBONES[model], trunk.manifest.slots
    assert trunk.dim == trunk.manifest.dim == backbones.load(model, ()).dim == row.dim
    assert (row.has_deltas, row.has_int8) == (bool(slots), is_quantisable(slots))
    again = ensure(registry, model, exports=exports)
    assert exports == [model]
    assert again.manifest == trunk.manifest


def test_wordllama_is_what_its_own_package_computes(registry: Registry) -> None:
    trunk = ensure(registry, "wordllama", exports=[])
    assert "wordllama" not in sys.modules
    texts = ["where is my card", " Grüße, 你好 \U0001f98b\n", "x", "a lost transfer " * 1000]
    # Its loader looks for the tokenizer in a folder that it does not have, and asks the hub.
    folder = sources.locate("wordllama", ()).root
    theirs = importlib.import_module("wordllama.inference").WordLlamaInference(
        safetensors.numpy.load_file(folder / wordllama.WEIGHTS)["embedding.weight"],
        Tokenizer.from_file(str(folder / wordllama.TOKENIZER)),
    )
    rows = [trunk.preprocessor.prepare(text) for text in (*texts, "")]  # type: ignore[arg-type]
    features = trunk.encode(rows)
    np.testing.assert_allclose(features[:-1], theirs.embed(texts, norm=True), atol=1e-5)
    assert not features[-1].any()  # no tokens: theirs divides by zero
    np.testing.assert_allclose(trunk.encode(rows[:1]), features[:1], atol=1e-6)


def test_a_known_trunk_loads_without_transformers(registry: Registry, tmp_path: Path) -> None:
    folder = str(save_text_model("bert", tmp_path / "model"))
    ensure(registry, f"hf:{folder}", folder, exports=[])
    code = f"""
import sys
from core.registry import Registry
from core.store import ArtifactStore
from training.trunks import ensure_trunk
ensure_trunk(Registry(ArtifactStore({str(tmp_path / "store")!r})), {"hf:" + folder!r},
    hf_models=({folder!r},), threads=1, max_pixels=1, on_export=lambda: sys.exit("exported"))
sys.exit("transformers" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_same_files_under_two_names_are_one_trunk(registry: Registry, tmp_path: Path) -> None:
    exports: list[str] = []
    first, second = (str(save_text_model("bert", tmp_path / name)) for name in ("one", "two"))
    one = ensure(registry, f"hf:{first}", first, exports=exports)
    two = ensure(registry, f"hf:{second}", second, exports=exports)
    assert one.manifest.digest == two.manifest.digest
    assert len(exports) == 1


def test_an_export_is_reproducible(tmp_path: Path) -> None:
    backbone = load(tmp_path)
    (first, files), (second, _) = trunks.export(backbone), trunks.export(backbone)
    assert first.digest == second.digest
    assert set(files) == {"trunk.onnx", "preprocess.json", "golden.safetensors", "tokenizer.json"}
    assert str(tmp_path).encode() not in b"".join(files.values())


def test_a_damaged_trunk_is_not_used(registry: Registry, tmp_path: Path) -> None:
    folder = str(save_text_model("bert", tmp_path / "model"))
    trunk = ensure(registry, f"hf:{folder}", folder, exports=[])
    path = tmp_path / "store" / "trunks" / trunk.manifest.digest / "golden.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(Conflict):
        ensure(registry, f"hf:{folder}", folder, exports=[])


# -- what must not pass the check ------------------------------------------------------------


class Wrong(nn.Module):
    """Something that a tracer freezes or that differs from what was traced."""

    def __init__(self, module: nn.Module, fault: str) -> None:
        super().__init__()
        self.module, self.fault = module, fault
        self.calls = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        features: Tensor = self.module(input_ids, attention_mask)
        if self.fault == "length":  # a Python number, so a constant of the traced length
            return features * (1 + 0.01 * int(input_ids.shape[1]))
        if self.fault == "branch":  # decided once, when traced
            return features if bool((attention_mask == 0).any()) else -features
        if self.fault == "shape":
            return features[:, : 8 if torch.onnx.is_in_onnx_export() else None]
        if self.fault == "nan":
            return features / (input_ids.shape[0] - 1)
        self.calls += 1
        return features + 0.001 * self.calls


def load(tmp_path: Path) -> TorchBackbone:
    folder = str(save_text_model("bert", tmp_path))
    return backbones.load(f"hf:{folder}", (folder,))


@pytest.mark.parametrize("fault", ["length", "branch", "shape", "nan", "state"])
def test_a_graph_that_is_not_the_module_is_a_mismatch(fault: str, tmp_path: Path) -> None:
    backbone = load(tmp_path)
    wrong = dataclasses.replace(
        backbone,
        module=Wrong(backbone.module, fault).eval(),
        encoder_path=f"module.{backbone.encoder_path}",
    )
    with pytest.raises(ExportMismatch):
        trunks.export(wrong)


def test_what_torch_cannot_export_names_the_model(tmp_path: Path) -> None:
    class Unsupported(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.linalg.eigvals(torch.eye(2) * input_ids.sum()).real[None]

    wrong = dataclasses.replace(load(tmp_path), module=Unsupported(), encoder_path="")
    with pytest.raises(DataError) as caught:
        trunks.export(wrong)
    assert caught.value.param == "model"


def test_a_graph_with_weights_elsewhere_is_refused(tmp_path: Path) -> None:
    model = onnx.load_from_string(trunks.to_onnx(load(tmp_path), ()))
    trunks.require_self_contained(model.SerializeToString())
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    with pytest.raises(ExportMismatch, match="another file"):
        trunks.require_self_contained(model.SerializeToString())
    del model.graph.initializer[:]
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    model.graph.node.insert(0, constant)
    with pytest.raises(ExportMismatch, match="another file"):
        trunks.require_self_contained(model.SerializeToString())


def test_a_graph_that_cannot_run_is_a_mismatch(tmp_path: Path) -> None:
    backbone = load(tmp_path)
    manifest: TrunkManifest
    manifest, _ = trunks.export(backbone)
    with pytest.raises(ExportMismatch, match="cannot run"):
        parity.max_difference(backbone, manifest, b"no graph", list(parity.probes(backbone)))


def test_the_tolerance_grows_with_the_numbers_but_not_to_infinity() -> None:
    assert tolerance(np.array([0.5], np.float32)) == pytest.approx(1e-4)
    assert tolerance(np.array([-20.0], np.float32)) == pytest.approx(2e-3)
    assert not tolerance(np.array([np.inf], np.float32)) >= 0
