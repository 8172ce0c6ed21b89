"""Adapters: the low-rank deltas of one fine-tuned model, and how a batch of them is fed.

    y = layer(x) + (x a) b        a [in, rank], b [rank, out], the scale folded into b

A trunk has a *slot* for every layer that takes a delta (`TrunkManifest.slots`), and two inputs for
each slot, `a` [m, in, rank] and `b` [m, rank, out]. A missing delta is zeros. One more input,
`rows` int64 [slots, n or 1], says which of a slot's m deltas each row takes; not fed, all take the
first. Trunks of before had no such input: there m is n, each row's own, or 1.

Files are those of `peft` (`adapter_config.json`, `adapter_model.safetensors`), so adapters go both
ways (training.deltas makes them). Not here: batches whose rows have several (core.adapter_bank),
the graph (training.trunks), running it (core.trunk).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from core.errors import DataError
from core.manifests import Slot
from core.preprocessing import FloatArray
from core.tensors import write_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PLAIN = {
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
}
"""What makes an adapter more than deltas on slots, and the value that says it does not."""

ROWS = "rows"
"""The input that says which delta of each slot a row takes."""

Deltas = Mapping[str, FloatArray | npt.NDArray[np.int64]]
"""A batch's deltas by the names of the graph's inputs."""


@dataclass(frozen=True)
class Delta:
    """What is added to one layer: `a` float32 [in, rank], `b` float32 [rank, out]."""

    a: FloatArray
    b: FloatArray

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return int(self.a.shape[1])


@dataclass(frozen=True, eq=False)
class Adapter:
    """One model's deltas by slot name; layers that are not named are as in the backbone."""

    deltas: Mapping[str, Delta]

    @property
    def rank(self) -> int:
        """The largest rank of its deltas, 0 if it has none."""
        return max((delta.rank for delta in self.deltas.values()), default=0)


def input_names(slot: Slot) -> tuple[str, str]:
    """Return the names of a slot's two inputs."""
    return f"{slot.name}.a", f"{slot.name}.b"


def feed(adapter: Adapter | None, slots: Sequence[Slot]) -> Deltas:
    """Return what to feed for a batch whose rows all have this adapter; {} for plain ones.

    The leading axis is 1. A slot that it does not name is fed zeros of rank 1, for rank 0 is what a
    plain batch feeds.
    """
    if adapter is None or not adapter.rank:
        return {}
    deltas: dict[str, FloatArray] = {}
    for slot in slots:
        delta = adapter.deltas.get(slot.name) or no_delta(slot)
        pair = (np.ascontiguousarray(matrix)[None] for matrix in (delta.a, delta.b))
        deltas.update(zip(input_names(slot), pair, strict=True))
    return deltas


def no_delta(slot: Slot) -> Delta:
    """Return what changes nothing, of rank 1."""
    return Delta(np.zeros((slot.in_dim, 1), np.float32), np.zeros((1, slot.out_dim), np.float32))


def write_adapter(adapter: Adapter, slots: Sequence[Slot], backbone: str) -> dict[str, bytes]:
    """Return the adapter as `peft` keeps one, for `PeftModel.from_pretrained` on the encoder.

    The scale is in `b`, so `lora_alpha` is the rank. The same adapter gives the same bytes.
    """
    named = [slot for slot in slots if slot.name in adapter.deltas]
    tensors: dict[str, FloatArray] = {}
    for slot in named:
        delta = adapter.deltas[slot.name]
        shape = (1, 1) if slot.kind == "convolution" else ()
        for name, matrix in (("lora_A", delta.a.T), ("lora_B", delta.b.T)):
            key = f"{_PREFIX}{slot.name}.{name}.weight"
            tensors[key] = matrix.reshape(*matrix.shape, *shape)
    ranks = {slot.name: adapter.deltas[slot.name].rank for slot in named}
    others = {name: rank for name, rank in ranks.items() if rank != adapter.rank}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": backbone,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
        "bias": "none",
    }
    return {
        CONFIG_FILE: json.dumps(config, indent=1).encode(),
        WEIGHTS_FILE: write_tensors(dict(sorted(tensors.items())), {"format": "pt"}),
    }


def read_adapter(config: bytes, weights: bytes, slots: Sequence[Slot]) -> Adapter:
    """Read an adapter that `peft` or `write_adapter` wrote, for a trunk with these slots.

    Raises `DataError` if it is no LoRA, changes a layer that has no slot, or has other shapes.
    """
    try:
        settings: dict[str, Any] = json.loads(config)
        tensors = load(weights)
        if settings.get("peft_type") != "LORA":
            raise DataError("only LoRA adapters can be used")
        for key, plain in _PLAIN.items():
            if settings.get(key, plain) not in (plain, None, [], {}):
                raise DataError(f"the adapter uses {key}, which is not supported")
        by_name = {slot.name: slot for slot in slots}
        names = {key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for key in tensors}
        if names - by_name.keys():
            raise DataError(f"the backbone takes no delta on {min(names - by_name.keys())}")
        return Adapter({n: _delta(by_name[n], tensors, settings) for n in sorted(names)})
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise DataError("the adapter's files are damaged") from error


def _delta(slot: Slot, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Delta:
    a, b = (
        np.asarray(tensors[f"{_PREFIX}{slot.name}.lora_{side}.weight"], np.float32) for side in "AB"
    )
    shape = (1, 1) if slot.kind == "convolution" else ()
    rank = len(a)
    if rank < 1 or (a.shape, b.shape) != (
        (rank, slot.in_dim, *shape),
        (slot.out_dim, rank, *shape),
    ):
        raise DataError(f"the adapter's delta on {slot.name} has another shape")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DataError(f"the adapter's delta on {slot.name} is not finite")
    alpha = _pattern(settings.get("alpha_pattern"), slot.name, settings["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    a, b = a.reshape(rank, -1).T, b.reshape(slot.out_dim, rank).T
    return Delta(a, b if scale == 1 else b * np.float32(scale))


def _pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """Return a layer's own value of a setting, found as `peft` finds it, or the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
