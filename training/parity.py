"""Does the exported graph compute what torch computes? Asked before a trunk is stored.

The graph runs through `core.trunk`, the code that will serve it, on many shapes, and torch runs the
module as it was loaded; so an axis frozen by tracing, or a mask left out, is found here and not by
a person with a long text. Also here: the golden rows, by which every process that loads the trunk
asks the same again. Not here: the export (training.trunks).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer

from core.adapter_bank import BankedAdapter
from core.adapters import Adapter, Delta
from core.errors import ExportMismatch
from core.manifests import Slot, TrunkManifest
from core.preprocessing import (
    FloatArray,
    ImagePreprocess,
    Prepared,
    PreparedImage,
    PreparedText,
    TextPreprocess,
)
from core.tensors import write_tensors
from core.trunk import Trunk, agree, build_preprocessor
from training import deltas
from training.backbones import TorchBackbone


def max_difference(
    backbone: TorchBackbone,
    manifest: TrunkManifest,
    graph: bytes,
    batches: Sequence[Sequence[Prepared]],
) -> float:
    """Return the largest absolute difference between ONNX Runtime and torch over the batches.

    Raises `ExportMismatch` above the tolerance, for another shape, and for what is not a number.
    """
    preprocessor = build_preprocessor(
        backbone.preprocess, backbone.tokenizer_json or b"", max_pixels=1
    )
    largest = 0.0
    try:
        trunk = Trunk(manifest, graph, preprocessor, threads=1)
        for batch in batches:
            expected, actual = _torch_features(backbone, batch), trunk.encode(batch)
            if actual.shape != expected.shape:
                raise ExportMismatch("the exported graph returns another shape than torch")
            difference = float(np.abs(actual - expected).max())
            if not agree(actual, expected, manifest.precision):
                raise ExportMismatch(f"the exported graph differs from torch by {difference:.1e}")
            largest = max(largest, difference)
        if manifest.slots:
            largest = max(largest, _adapted_difference(backbone, trunk, batches))
    except ExportMismatch:
        raise
    except Exception as error:
        # ONNX Runtime's errors share no public base class.
        raise ExportMismatch("ONNX Runtime cannot run the exported graph") from error
    return largest


def _adapted_difference(
    backbone: TorchBackbone, trunk: Trunk, batches: Sequence[Sequence[Prepared]]
) -> float:
    """Compare adapted rows with `peft`'s: batches of one adapter, and of a different one each row.

    The deltas are random and far larger than any that are trained, so that they show.
    """
    slots, bank = trunk.manifest.slots, trunk.bank
    adapters = [random_adapter(slots, rank, seed=rank) for rank in (4, 16)]
    banked = [bank.add(adapter) for adapter in adapters]
    modules = [_with_adapter(backbone, slots, adapter) for adapter in adapters]
    largest = 0.0
    for batch in (batches[0], batches[-1]):
        plain = _torch_features(backbone, batch)
        adapted = [_torch_features(module, batch) for module in modules]
        cases: list[tuple[list[BankedAdapter | None], FloatArray]] = [
            ([banked[0]] * len(batch), adapted[0])
        ]
        mixed = [[None, *banked][row % 3] for row in range(len(batch))]
        cases.append((mixed, np.stack([[plain, *adapted][r % 3][r] for r in range(len(batch))])))
        for chosen, expected in cases:
            actual = trunk.encode(batch, bank.gather(chosen))
            difference = float(np.abs(actual - expected).max())
            if not agree(actual, expected, trunk.manifest.precision):
                raise ExportMismatch(f"the adapted graph differs from torch by {difference:.1e}")
            largest = max(largest, difference)
    return largest


def adapted_features(
    backbone: TorchBackbone, slots: Sequence[Slot], adapter: Adapter, rows: Sequence[Prepared]
) -> FloatArray:
    """Return torch's features of rows with an adapter whose deltas are of one rank."""
    named = [slot for slot in slots if slot.name in adapter.deltas]
    return _torch_features(_with_adapter(backbone, named, adapter), rows)


def random_adapter(slots: Sequence[Slot], rank: int, seed: int) -> Adapter:
    """Return deltas on these slots, each about a tenth as large as its input."""
    numbers = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, size: float) -> FloatArray:
        values: FloatArray = (size * numbers.standard_normal((rows, columns))).astype(np.float32)
        return values

    return Adapter(
        {
            slot.name: Delta(
                matrix(slot.in_dim, rank, slot.in_dim**-0.5),
                matrix(rank, slot.out_dim, 0.1 * rank**-0.5),
            )
            for slot in slots
        }
    )


def _with_adapter(
    backbone: TorchBackbone, slots: Sequence[Slot], adapter: Adapter
) -> TorchBackbone:
    adapted = dataclasses.replace(backbone, module=copy.deepcopy(backbone.module))
    deltas.inject(adapted.encoder, slots, adapter.rank)
    deltas.write(adapted.encoder, slots, adapter)
    return adapted


def input_names(backbone: TorchBackbone) -> list[str]:
    """Return the names of the graph's inputs, in the order in which the module takes them."""
    config = backbone.preprocess
    return list(config.inputs) if isinstance(config, TextPreprocess) else ["pixels"]


def probes(backbone: TorchBackbone) -> Iterator[list[Prepared]]:
    """Yield batches to compare on, the golden rows first: many sizes, lengths and paddings."""
    numbers = np.random.default_rng(0)
    config = backbone.preprocess
    if isinstance(config, ImagePreprocess):
        yield [_photograph(config, numbers), _noise(config, numbers)]
        yield [_photograph(config, numbers)]
        yield [_flat(config, 0), _noise(config, numbers), _flat(config, 255)]
        return
    assert backbone.tokenizer_json is not None
    vocabulary = Tokenizer.from_str(backbone.tokenizer_json.decode()).get_vocab_size()
    longest = config.max_tokens
    for lengths in ((7, 16, 3), (1,), (5,), (1, longest), (longest,), (33, 2, 64, 9, 33, 17, 1, 4)):
        yield [
            PreparedText([int(i) for i in numbers.integers(0, vocabulary, min(length, longest))])
            for length in lengths
        ]


def _photograph(config: ImagePreprocess, numbers: np.random.Generator) -> PreparedImage:
    """An image with the 1/f amplitude spectrum of natural scenes (Field 1987)."""
    height, width = config.crop
    spectrum = np.fft.rfft2(numbers.standard_normal((3, height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    waves = np.fft.irfft2(spectrum / frequency, s=(height, width))
    return _normalised(config, np.clip(128 + 50 * waves / waves.std(), 0, 255).round())


def _noise(config: ImagePreprocess, numbers: np.random.Generator) -> PreparedImage:
    return _normalised(config, numbers.integers(0, 256, (3, *config.crop)))


def _flat(config: ImagePreprocess, value: int) -> PreparedImage:
    return _normalised(config, np.full((3, *config.crop), value))


def _normalised(config: ImagePreprocess, values: np.ndarray) -> PreparedImage:
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (config.mean, config.std))
    return PreparedImage((values.astype(np.float32) - mean) / std)


def torch_inputs(backbone: TorchBackbone, rows: Sequence[Prepared]) -> tuple[torch.Tensor, ...]:
    """Return what the module takes for these rows, texts padded to the longest of them."""
    arrays = _arrays(backbone, rows)
    return tuple(torch.from_numpy(arrays[name]) for name in input_names(backbone))


def _arrays(backbone: TorchBackbone, rows: Sequence[Prepared]) -> dict[str, np.ndarray]:
    """Return the inputs by name, made without `core.trunk`, which they are to check."""
    config = backbone.preprocess
    if isinstance(config, ImagePreprocess):
        return {"pixels": np.stack([row.pixels for row in rows if isinstance(row, PreparedImage)])}
    texts = [row.ids for row in rows if isinstance(row, PreparedText)]
    width = max(map(len, texts))
    return {
        "input_ids": np.array([ids + [config.pad_id] * (width - len(ids)) for ids in texts]),
        "attention_mask": np.array([[1] * len(t) + [0] * (width - len(t)) for t in texts]),
        "token_type_ids": np.zeros((len(texts), width), np.int64),
    }


def _torch_features(backbone: TorchBackbone, rows: Sequence[Prepared]) -> FloatArray:
    with torch.inference_mode():
        features: FloatArray = backbone.module(*torch_inputs(backbone, rows)).numpy()
    return features


def golden(backbone: TorchBackbone, rows: Sequence[Prepared]) -> bytes:
    """Return `GOLDEN_FILE`: rows and torch's features of them, which every process replays."""
    features = {"features": _torch_features(backbone, rows)}
    return write_tensors(_arrays(backbone, rows) | features)
