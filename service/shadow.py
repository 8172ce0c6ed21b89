"""Shadows: a release's second version computes the same inputs, and nobody waits for it.

It runs after the answer, on a thread of its own. If it is plain and so is what answered,
on the same trunk, it costs its head alone, because the features are there; else its rows go
through the trunk in the lowest lane.
What cannot be kept up with is dropped, and what fails is counted; no request ever notices. Not
here: what follows from disagreement (service.auto_rollback).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from core.errors import GraftError, Overloaded
from core.manifests import ModelManifest
from core.preprocessing import FloatArray
from core.tasks import Answer, decide
from service.caller import Lane
from service.inputs import Input, InputPreparer
from service.live_models import LiveModel, Refused
from service.metrics import ModelLabels
from service.row_queue import Model
from service.serving_set import Slot

logger = logging.getLogger("graft.service")

MAX_WAITING = 64
"""Requests whose shadow has not run yet; more are dropped."""

DEADLINE_SECONDS = 5.0
BUSY_ROWS = 64
"""Rows before a trunk above which no shadow's rows are added."""

Compared = Callable[[LiveModel, int, int], None]
"""Is told the model that answered, and how many of its shadow's rows agreed and disagreed."""


@dataclass(frozen=True)
class Answered:
    """One request that was answered: features and outputs of the rows that could be.

    Without `inputs`, when the caller sent features.
    """

    model: LiveModel
    shadow: int
    inputs: Sequence[Input] | None
    features: FloatArray
    outputs: FloatArray


class Shadows:
    """Runs shadows one after the other. Belongs to one event loop."""

    def __init__(
        self,
        load: Callable[[Slot], Awaitable[LiveModel]],
        inputs: InputPreparer,
        on_compared: Compared,
        labels: ModelLabels,
    ) -> None:
        self._load = load
        self._inputs = inputs
        self._on_compared = on_compared
        self._labels = labels
        self._waiting: asyncio.Queue[Answered] = asyncio.Queue(MAX_WAITING)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="shadow")
        self._task: asyncio.Task[None] | None = None

    def offer(
        self,
        model: LiveModel,
        inputs: Sequence[Input] | None,
        features: Sequence[FloatArray | GraftError],
        outputs: Sequence[FloatArray | GraftError],
    ) -> None:
        """Let the shadow of the release that chose `model`, if it has one, compute this as well."""
        release = model.release
        if release is None or release.shadow in (None, model.manifest.version):
            return
        assert release.shadow is not None
        good = [
            (number, row, answer)
            for number, (row, answer) in enumerate(zip(features, outputs, strict=True))
            if not isinstance(row, GraftError) and not isinstance(answer, GraftError)
        ]
        if not good:
            return
        numbers, rows, answers = zip(*good, strict=True)
        items = None if inputs is None else [inputs[number] for number in numbers]
        answered = Answered(model, release.shadow, items, np.stack(rows), np.stack(answers))
        try:
            self._waiting.put_nowait(answered)
        except asyncio.QueueFull:
            self._count(model, "dropped", len(rows))
            return
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop; what waits is dropped."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        while not self._waiting.empty():
            answered = self._waiting.get_nowait()
            try:
                await self._compare(answered)
            except (GraftError, Refused):
                self._count(answered.model, "failed", len(answered.features))
            except Exception:
                logger.exception("shadow of %s", answered.model.manifest.reference)
                self._count(answered.model, "failed", len(answered.features))

    async def _compare(self, answered: Answered) -> None:
        manifest = answered.model.manifest
        shadow = await self._load((manifest.tenant, manifest.name, answered.shadow))
        features: FloatArray | None = answered.features
        adapters = answered.model.head.adapter, shadow.head.adapter
        if shadow.manifest.trunk != manifest.trunk or adapters != (None, None):
            features = await self._features(shadow, answered.inputs)
        if features is None:
            self._count(answered.model, "dropped", len(answered.features))
            return
        loop = asyncio.get_running_loop()
        outputs = await loop.run_in_executor(self._executor, shadow.head.predict, features)
        agreed = sum(
            agree(manifest, one, other)
            for one, other in zip(
                decide(manifest.task, answered.outputs, manifest.labels),
                decide(shadow.manifest.task, outputs, shadow.manifest.labels),
                strict=True,
            )
        )
        disagreed = len(outputs) - agreed
        self._count(answered.model, "agreed", agreed)
        self._count(answered.model, "disagreed", disagreed)
        self._on_compared(answered.model, agreed, disagreed)

    async def _features(
        self, shadow: LiveModel, inputs: Sequence[Input] | None
    ) -> FloatArray | None:
        """Return what the shadow's own trunk and adapter give, or None if that is busy."""
        batcher = shadow.trunk.batcher
        if inputs is None or batcher.queued_rows > BUSY_ROWS:
            return None
        deadline = time.monotonic() + DEADLINE_SECONDS
        turn: Model = shadow.manifest.name, "shadow"
        try:
            prepared = await self._inputs.prepare(
                shadow.trunk, inputs, deadline, model=turn, lane=Lane.LOW
            )
            rows = [row for row in prepared if not isinstance(row, GraftError)]
            found = await batcher.encode(
                rows, deadline, model=turn, lane=Lane.LOW, adapter=shadow.head.adapter
            )
        except Overloaded:
            return None
        sound = [row for row in found if not isinstance(row, GraftError)]
        if len(sound) != len(inputs):
            raise GraftError("the shadow could not compute every row")
        return np.stack(sound)

    def _count(self, model: LiveModel, outcome: str, rows: int) -> None:
        self._labels.meters(model.manifest.name).shadow_rows[outcome].inc(rows)


def agree(manifest: ModelManifest, answer: Answer, other: Answer) -> bool:
    """Tell whether another version says the same: of values, one in the interval of the answer."""
    if isinstance(answer, float) and isinstance(other, float):
        half_width = manifest.interval.half_width if manifest.interval else 0.0
        return abs(answer - other) <= half_width
    return answer == other
