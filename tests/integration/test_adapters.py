"""Adapters: the trunk's deltas against `peft` itself, both ways, and rows of many models."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from core.adapters import CONFIG_FILE, WEIGHTS_FILE, Adapter, feed, read_adapter, write_adapter
from core.errors import DataError
from core.preprocessing import Prepared
from core.registry import Registry
from core.store import ArtifactStore
from core.trunk import Trunk, tolerance
from tests.integration.hf_models import save_image_model, save_text_model
from training import backbones, parity, trunks
from training.backbones import TorchBackbone

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
PACKAGED = ("minilm", "mobilenet-v2", "efficientnet-lite0")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TorchBackbone, Trunk]]:
    """The packaged backbones that take deltas, in torch and as trunks."""
    registry = Registry(ArtifactStore(str(tmp_path_factory.mktemp("store"))))
    made = {}
    for model in PACKAGED:
        trunk = trunks.ensure_trunk(
            registry, model, hf_models=(), threads=1, max_pixels=1, on_export=lambda: None
        )
        made[model] = backbones.load(model, ()), trunk
    return made


def batch_of(backbone: TorchBackbone) -> list[Prepared]:
    return next(parity.probes(backbone))


def with_peft(backbone: TorchBackbone, files: dict[str, bytes], folder: Path) -> np.ndarray:
    """Features of the batch with the adapter as `peft` loads it from a folder."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    module = copy.deepcopy(backbone.module)
    encoder = module.get_submodule(backbone.encoder_path)
    peft.PeftModel.from_pretrained(encoder, str(folder)).eval()
    with torch.inference_mode():
        features: np.ndarray = module(*parity.torch_inputs(backbone, batch_of(backbone))).numpy()
    return features


@pytest.mark.parametrize("rank", [4, 8, 16])
@pytest.mark.parametrize("model", PACKAGED)
def test_peft_loads_our_adapter_and_computes_the_same(
    model: str, rank: int, loaded: dict[str, tuple[TorchBackbone, Trunk]], tmp_path: Path
) -> None:
    backbone, trunk = loaded[model]
    slots = trunk.manifest.slots
    adapter = parity.random_adapter(slots, rank, seed=rank)
    expected = with_peft(backbone, write_adapter(adapter, slots, model), tmp_path / "adapter")
    rows = batch_of(backbone)
    plain = trunk.encode(rows)
    adapted = trunk.encode(rows, feed(adapter, slots))
    assert np.abs(adapted - expected).max() <= tolerance(expected)
    assert np.abs(adapted - plain).max() > 100 * tolerance(expected)


@pytest.mark.parametrize("model", PACKAGED)
def test_rows_of_several_models_and_of_none_share_a_batch(
    model: str, loaded: dict[str, tuple[TorchBackbone, Trunk]]
) -> None:
    backbone, trunk = loaded[model]
    slots = trunk.manifest.slots
    top = [slot for slot in slots if slot.block >= trunk.manifest.blocks - 2]
    adapters: list[Adapter | None] = [
        None,
        parity.random_adapter(slots, 4, seed=1),
        parity.random_adapter(top, 16, seed=2),
        None,
    ]
    row = batch_of(backbone)[0]
    banked = [adapter and trunk.bank.add(adapter) for adapter in adapters]
    together = trunk.encode([row] * 4, trunk.bank.gather(banked))
    alone = [trunk.encode([row], feed(adapter, slots))[0] for adapter in adapters]
    assert np.abs(together - np.stack(alone)).max() <= tolerance(together)
    assert np.array_equal(alone[0], trunk.encode([row], {})[0])
    differences = [np.abs(alone[i] - alone[0]).max() for i in (1, 2)]
    assert min(differences) > 100 * tolerance(together)


@pytest.mark.parametrize("model", PACKAGED)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_made_by_peft_is_read(
    model: str, use_rslora: bool, loaded: dict[str, tuple[TorchBackbone, Trunk]], tmp_path: Path
) -> None:
    backbone, trunk = loaded[model]
    module = copy.deepcopy(backbone.module)
    encoder = module.get_submodule(backbone.encoder_path)
    targets = ["query", "value"] if model == "minilm" else ["project_conv"]
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, init_lora_weights=False,
        use_rslora=use_rslora, rank_pattern={r"(.*\.)?[0-4]\..*": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    made = peft.get_peft_model(encoder, config).eval()
    made.save_pretrained(str(tmp_path))
    with torch.inference_mode():
        expected = module(*parity.torch_inputs(backbone, batch_of(backbone))).numpy()
    config_json, weights = ((tmp_path / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE))
    adapter = read_adapter(config_json, weights, trunk.manifest.slots)
    assert {delta.rank for delta in adapter.deltas.values()} == {2, 4}
    rows = batch_of(backbone)
    features = trunk.encode(rows, feed(adapter, trunk.manifest.slots))
    assert np.abs(features - expected).max() <= tolerance(expected)


@pytest.mark.parametrize(
    ("kind", "save"),
    [
        ("bert", save_text_model), ("roberta", save_text_model), ("mpnet", save_text_model),
        ("distilbert", save_text_model), ("vit", save_image_model), ("dinov2", save_image_model),
        ("convnext", save_image_model),
    ],
)  # fmt: skip
def test_other_encoders_have_slots_that_equal_peft(kind: str, save: object, tmp_path: Path) -> None:
    folder = str(save(kind, tmp_path / "model"))  # type: ignore[operator]
    backbone = backbones.load(f"hf:{folder}", (folder,))
    manifest, files = trunks.export(backbone)  # which compares them with peft
    assert manifest.blocks == 2
    assert len(manifest.slots) >= 4
    assert manifest.max_difference < 1e-4
    assert set(files) >= {"trunk.onnx"}


def test_an_encoder_without_such_layers_has_no_slots_and_still_exports(tmp_path: Path) -> None:
    folder = str(save_image_model("resnet", tmp_path / "model"))
    backbone = backbones.load(f"hf:{folder}", (folder,))
    backbone.encoder.encoder.stages = torch.nn.Sequential(*backbone.encoder.encoder.stages)
    manifest, _ = trunks.export(backbone)
    assert manifest.slots == ()


def changed(files: dict[str, bytes], **settings: object) -> Sequence[bytes]:
    config = json.loads(files[CONFIG_FILE]) | settings
    return json.dumps(config).encode(), files[WEIGHTS_FILE]


def test_adapters_that_are_more_or_other_than_deltas_are_refused(
    loaded: dict[str, tuple[TorchBackbone, Trunk]],
) -> None:
    slots = loaded["minilm"][1].manifest.slots
    files = write_adapter(parity.random_adapter(slots, 4, seed=0), slots, "minilm")
    for settings, reason in (
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "LoRA"),
        ({"modules_to_save": ["pooler"]}, "modules_to_save"),
        ({"lora_alpha": "x"}, "damaged"),
    ):
        with pytest.raises(DataError, match=reason):
            read_adapter(*changed(files, **settings), slots)
    with pytest.raises(DataError, match="no delta"):
        read_adapter(files[CONFIG_FILE], files[WEIGHTS_FILE], slots[1:])
    with pytest.raises(DataError, match="damaged"):
        read_adapter(files[CONFIG_FILE], files[WEIGHTS_FILE][:-8], slots)
    other = loaded["efficientnet-lite0"][1].manifest.slots
    wrong = [
        slot.model_copy(update={"name": name.name})
        for slot, name in zip(other, slots, strict=False)
    ]
    with pytest.raises(DataError, match=r"shape|no delta"):
        read_adapter(files[CONFIG_FILE], files[WEIGHTS_FILE], wrong)
