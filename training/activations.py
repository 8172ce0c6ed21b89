"""The cut: a backbone from one block up, run on cached activations of the blocks below.

`capture` runs a backbone up to the cut, once for each row, and stops there. `Upper` is the rest of
it: everything below the cut is replaced by stand-ins that hand the cached activations through, so
frozen blocks cannot run in an epoch. How a backbone hands tensors from block to block is seen by
running it, not known; `Upper` is compared with the whole before it is used.

Activations are of one row, without padding: [tokens, dim] for text, [channels, height, width] (or
[positions, dim]) for images. Not here: which rows and views (training.views), training them
(training.gradual).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from core.datasets import Modality
from core.errors import DataError
from core.preprocessing import Prepared
from training import parity
from training.adaptable import find_blocks
from training.backbones import TorchBackbone

CHECK_TOLERANCE = 1e-4


class _Reached(Exception):
    """Carries the activations at the cut out of a backbone's forward."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@dataclass(frozen=True)
class Batch:
    """Activations of some rows, padded with zeros; `lengths` are their tokens, None for images."""

    hidden: Tensor
    lengths: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[Tensor], modality: Modality) -> Batch:
        """Put rows side by side."""
        if modality is Modality.IMAGE:
            return cls(torch.stack(list(rows)), None)
        lengths = torch.tensor([len(row) for row in rows])
        return cls(nn.utils.rnn.pad_sequence(list(rows), batch_first=True), lengths)


def capture(backbone: TorchBackbone, cut: int, rows: Sequence[Prepared]) -> list[Tensor]:
    """Return the activations that enter block `cut`, row by row; the blocks above do not run."""
    blocks = _blocks(backbone)

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(_hidden(args, kwargs))

    handle = blocks[cut].register_forward_pre_hook(stop, with_kwargs=True)
    inputs = parity.torch_inputs(backbone, rows)
    try:
        with torch.no_grad():
            backbone.module(*inputs)
    except _Reached as reached:
        hidden = reached.hidden
    finally:
        handle.remove()
    if backbone.modality is Modality.IMAGE:
        return [row.clone() for row in hidden]
    return [row[: int(n)].clone() for row, n in zip(hidden, inputs[1].sum(dim=1), strict=True)]


class Upper(nn.Module):
    """A copy of a backbone from block `cut` up: activations to features, float32 [n, dim].

    Raises `DataError` if the backbone's way from block to block cannot be cut.
    """

    def __init__(self, backbone: TorchBackbone, cut: int) -> None:
        super().__init__()
        self.modality = backbone.modality
        self.module = copy.deepcopy(backbone.module)
        self.encoder: nn.Module = self.module.get_submodule(backbone.encoder_path)
        self._recall = _Recall()
        probe = next(parity.probes(backbone))
        try:
            stem, in_tuples = _way_in(backbone, probe)
            # The stem stays where it is: some encoders look at its weights, if only for their type.
            self.module.get_submodule(stem).forward = self._recall
            blocks = _found(self.encoder)[1]
            for index in range(cut):
                blocks[index] = _Skip(in_tuples)
            with torch.no_grad():
                actual = self(Batch.of(capture(backbone, cut, probe), self.modality))
                expected = backbone.module(*parity.torch_inputs(backbone, probe))
            difference = float((actual - expected).abs().max())
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            raise DataError(
                "the backbone cannot be cut between its blocks", param="model"
            ) from error
        if not difference <= CHECK_TOLERANCE * max(1.0, float(expected.abs().max())):
            raise DataError("the backbone cannot be cut between its blocks", param="model")

    def forward(self, batch: Batch) -> Tensor:
        self._recall.hidden = batch.hidden
        rows = len(batch.hidden)
        if batch.lengths is None:
            # Its values are never read: the stem that would is not there any more.
            return cast(Tensor, self.module(torch.zeros(rows, 3, 1, 1)))
        positions = torch.arange(batch.hidden.shape[1])
        mask = (positions < batch.lengths[:, None]).long()
        return cast(Tensor, self.module(torch.zeros_like(mask), mask))


class _Recall:
    """In place of the stem's forward: gives the cached activations, whatever it is called with."""

    hidden: Tensor

    def __call__(self, *_: object, **__: object) -> Tensor:
        return self.hidden


class _Skip(nn.Module):
    """In place of a block below the cut: gives what it is given, in a tuple if the block does."""

    def __init__(self, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _hidden(args, kwargs)
        return (hidden,) if self.in_tuple else hidden


def _way_in(backbone: TorchBackbone, rows: Sequence[Prepared]) -> tuple[str, bool]:
    """Return the module whose output enters the first block, and whether blocks return tuples."""
    outputs: list[tuple[str, object]] = []
    entered: list[Tensor] = []
    in_tuples: list[bool] = []
    before: list[int] = []
    first = _blocks(backbone)[0]

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(_hidden(args, kwargs))
        before.append(len(outputs))

    handles = [
        module.register_forward_hook(
            lambda _, __, output, name=name: outputs.append((name, output))
        )
        for name, module in backbone.module.named_modules()
        if name
    ]
    handles += [
        first.register_forward_pre_hook(enter, with_kwargs=True),
        first.register_forward_hook(
            lambda _, __, output: in_tuples.append(isinstance(output, tuple))
        ),
    ]
    try:
        with torch.no_grad():
            backbone.module(*parity.torch_inputs(backbone, rows))
    finally:
        for handle in handles:
            handle.remove()
    # The outermost of the modules that give this very tensor is the last to do so.
    stem = [name for name, output in outputs[: before[0]] if output is entered[0]][-1]
    return stem, in_tuples[0]


def _blocks(backbone: TorchBackbone) -> nn.ModuleList:
    return _found(backbone.encoder)[1]


def _found(encoder: nn.Module) -> tuple[str, nn.ModuleList]:
    found = find_blocks(encoder)
    if found is None:
        raise DataError("the backbone has no list of blocks", param="model")
    return found


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs["hidden_states"]
    if not isinstance(hidden, Tensor):
        raise TypeError("a block is not given a tensor")
    return hidden
