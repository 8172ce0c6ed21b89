"""The torch side of an adaptable trunk: which layers take deltas, and a module that takes them.

A *slot* is a layer that a low-rank delta may be added to (Hu et al. 2021, arXiv 2106.09685):
`y = layer(x) + (x a) b`, another `a` and `b` for every row of a batch if need be (Sheng et al.
2023, arXiv 2311.03285). Slots are found, not listed, so any encoder has those it can have:

    blocks   the longest `ModuleList` of the encoder that is in no other
    slots    in each block, linear layers and 1×1 convolutions that are called once, row by row

A convolution is joined with the batch norm that follows it, if one does, and its delta takes the
norm's scale: the graph then still has one convolution where the checkpoint has two layers, and the
delta means what it means to `peft`, which adds it before the norm.

Not here: the graph that is made of it (training.trunks), training deltas (training.deltas).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from core.manifests import Slot

Inputs = tuple[Tensor, ...]


def find_blocks(encoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Return the encoder's blocks, in order, and their path; None if it has no list of them."""
    lists = [(name, m) for name, m in encoder.named_modules() if isinstance(m, nn.ModuleList)]
    outermost = [
        (name, blocks)
        for name, blocks in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    return max(outermost, key=lambda entry: len(entry[1]), default=None)


def find_slots(encoder: nn.Module, run: Callable[[], object], rows: int) -> tuple[Slot, ...]:
    """Return the encoder's slots, block by block from the bottom.

    `run` runs the encoder once on `rows` rows, by which layers are seen at work: one that is called
    twice, never, or on something other than one entry for each row cannot take deltas row by row.
    """
    found = find_blocks(encoder)
    if found is None:
        return ()
    path, blocks = found
    layers = {
        f"{path}.{block}.{name}": (block, layer)
        for block, module in enumerate(blocks)
        for name, layer in module.named_modules()
        if _takes_delta(layer)
    }
    calls: Counter[str] = Counter()
    with _watching(
        {name: layer for name, (_, layer) in layers.items()},
        lambda name, x, _: calls.update({name: 1 if x.dim() >= 3 and len(x) == rows else 2}),
    ):
        run()
    slots = []
    for name, (block, layer) in layers.items():
        if calls[name] != 1:
            continue
        slots.append(_slot(name, block, layer))
    return tuple(slots)


class Adaptable(nn.Module):
    """A copy of a backbone's module whose slots take deltas.

    Called with the module's own inputs, it computes the same as the module; with `a` [n or 1, in,
    rank] and `b` [n or 1, rank, out] of every slot behind them, what `peft` would.
    """

    def __init__(
        self, module: nn.Module, encoder_path: str, slots: Sequence[Slot], inputs: Inputs
    ) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)
        self._slots: list[_SlotLayer] = []
        encoder = self.module.get_submodule(encoder_path)
        norms = _norms_behind(encoder, slots, lambda: self.module(*inputs))
        for slot in slots:
            layer = encoder.get_submodule(slot.name)
            if isinstance(layer, nn.Linear):
                self._slots.append(_SlotLinear(layer))
            else:
                assert isinstance(layer, nn.Conv2d)
                path = norms.get(slot.name)
                norm = None if path is None else cast(nn.BatchNorm2d, encoder.get_submodule(path))
                self._slots.append(_SlotConvolution(layer, norm))
                if path is not None:
                    encoder.set_submodule(path, nn.Identity())
            encoder.set_submodule(slot.name, self._slots[-1])
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        own = len(inputs) - 2 * len(self._slots)
        deltas = iter(inputs[own:]) if own > 0 else iter(())
        for slot in self._slots:
            slot.a, slot.b = next(deltas, None), next(deltas, None)
        features: Tensor = self.module(*(inputs[:own] if own > 0 else inputs))
        return features


class _SlotLayer(nn.Module):
    a: Tensor | None = None
    b: Tensor | None = None


class _SlotLinear(_SlotLayer):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.a is None or self.b is None:
            return y
        if x.dim() == 3:
            return y + (x @ self.a) @ self.b
        return y + ((x.flatten(1, -2) @ self.a) @ self.b).view_as(y)


class _SlotConvolution(_SlotLayer):
    """A 1×1 convolution and, if `norm` is given, the batch norm behind it."""

    def __init__(self, layer: nn.Conv2d, norm: nn.BatchNorm2d | None) -> None:
        super().__init__()
        self.layer = layer
        self.scale: Tensor | None = None
        if norm is not None:
            assert norm.running_var is not None
            self.layer = nn.utils.fuse_conv_bn_eval(layer, norm)
            self.scale = (norm.weight * torch.rsqrt(norm.running_var + norm.eps)).detach()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.a is None or self.b is None:
            return y
        b = self.b if self.scale is None else self.b * self.scale
        delta = b.transpose(1, 2) @ (self.a.transpose(1, 2) @ x.flatten(2))
        return y + delta.view_as(y)


def _slot(name: str, block: int, layer: nn.Module) -> Slot:
    if isinstance(layer, nn.Linear):
        sizes = layer.in_features, layer.out_features
        return Slot(name=name, block=block, kind="linear", in_dim=sizes[0], out_dim=sizes[1])
    assert isinstance(layer, nn.Conv2d)
    sizes = layer.in_channels, layer.out_channels
    return Slot(name=name, block=block, kind="convolution", in_dim=sizes[0], out_dim=sizes[1])


def _takes_delta(layer: nn.Module) -> bool:
    if type(layer) is nn.Linear:
        return True
    return type(layer) is nn.Conv2d and (
        (layer.kernel_size, layer.stride, layer.groups, layer.padding)
        == ((1, 1), (1, 1), 1, (0, 0))
    )  # fmt: skip


def _norms_behind(
    encoder: nn.Module, slots: Sequence[Slot], run: Callable[[], object]
) -> dict[str, str]:
    """Return which convolution's output a batch norm takes: path of slot to path of norm."""
    convolutions = {
        slot.name: encoder.get_submodule(slot.name) for slot in slots if slot.kind == "convolution"
    }
    norms: dict[str, nn.Module] = {
        name: module
        for name, module in encoder.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats
    }
    # The outputs themselves are kept, so that no address is used twice.
    outputs: dict[int, tuple[str, Tensor]] = {}
    pairs: dict[str, str] = {}

    def see_convolution(name: str, _: Tensor, output: Tensor) -> None:
        outputs[id(output)] = name, output

    def see_norm(name: str, x: Tensor, _: Tensor) -> None:
        if id(x) in outputs:
            pairs[outputs[id(x)][0]] = name

    with _watching(convolutions, see_convolution), _watching(norms, see_norm):
        run()
    return pairs


@contextmanager
def _watching(
    modules: dict[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call `see(name, first input, output)` whenever one of the modules has run."""
    handles = [
        module.register_forward_hook(
            lambda _, inputs, output, name=name: see(name, inputs[0], output)
        )
        for name, module in modules.items()
    ]
    try:
        with torch.inference_mode():
            yield
    finally:
        for handle in handles:
            handle.remove()
