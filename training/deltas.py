"""Low-rank deltas on a torch encoder, through `peft`: put on, read off, written back.

`peft` starts `b` at zero, so a fresh delta changes nothing. Not here: training them
(training.tuning), files and serving (core.adapters).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.adapters import Adapter, Delta
from core.manifests import Slot

_NAME = "default"


def inject(encoder: nn.Module, slots: Sequence[Slot], rank: int) -> None:
    """Put fresh deltas of one rank on these slots of an encoder that has none, in place.

    Only they are trainable. Torch's global generator draws `a`, so seed it before.
    """
    # Imports transformers and accelerate: seconds that a job without deltas does not pay.
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[slot.name for slot in slots],
    )
    encoder.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        inject_adapter_in_model(config, encoder, adapter_name=_NAME)


def parameters(encoder: nn.Module, slots: Sequence[Slot]) -> Iterator[tuple[str, Tensor]]:
    """Yield the trainable tensors with their names, slot by slot."""
    for slot, layer in zip(slots, _layers(encoder, slots), strict=True):
        yield f"{slot.name}.a", layer.lora_A[_NAME].weight
        yield f"{slot.name}.b", layer.lora_B[_NAME].weight


def read(encoder: nn.Module, slots: Sequence[Slot]) -> Adapter:
    """Return the deltas on these slots as they are now."""
    deltas = {}
    for slot, layer in zip(slots, _layers(encoder, slots), strict=True):
        a = layer.lora_A[_NAME].weight.detach().flatten(1).T
        b = layer.lora_B[_NAME].weight.detach().flatten(1).T * layer.scaling[_NAME]
        deltas[slot.name] = Delta(a.contiguous().numpy().copy(), b.contiguous().numpy().copy())
    return Adapter(deltas)


def scale(encoder: nn.Module, slots: Sequence[Slot], share: float) -> None:
    """Let the deltas on these slots count for this part of what was trained; 1 is all of it."""
    for layer in _layers(encoder, slots):
        layer.set_scale(_NAME, share)


def write(encoder: nn.Module, slots: Sequence[Slot], adapter: Adapter) -> None:
    """Set the deltas on these slots, which have the adapter's rank, to those of `adapter`."""
    with torch.no_grad():
        for slot, layer in zip(slots, _layers(encoder, slots), strict=True):
            delta = adapter.deltas[slot.name]
            first, second = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
            first.copy_(torch.from_numpy(delta.a).T.reshape(first.shape))
            second.copy_(torch.from_numpy(delta.b).T.reshape(second.shape) / layer.scaling[_NAME])


def _layers(encoder: nn.Module, slots: Sequence[Slot]) -> list[Any]:
    return [encoder.get_submodule(slot.name) for slot in slots]
