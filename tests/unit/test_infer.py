"""What an inference request of the Open Inference Protocol asks of the data plane."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from starlette.requests import Request

from core.datasets import Modality, Task
from core.errors import InvalidRequest
from core.settings import Settings
from service.api.inference.endpoints import infer
from service.caller import CALLER, Caller, Lane

pytestmark = pytest.mark.anyio


class Asked(Exception):
    """Ends a request where the data plane would begin."""


class Plane:
    """A data plane that knows one model of texts, and which lane it was asked in."""

    lane: Lane | None = None

    async def resolve(self, *_: Any, **__: Any) -> Any:
        manifest = SimpleNamespace(task=Task.SINGLE_LABEL, modality=Modality.TEXT)
        return SimpleNamespace(manifest=manifest)

    async def classify(self, *_: Any, **__: Any) -> Any:
        self.lane = CALLER.get().lane
        raise Asked


def request(plane: Plane, parameters: dict[str, Any]) -> Request:
    sent = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["cat"]}
    body = orjson.dumps({"parameters": parameters, "inputs": [sent]})
    state = SimpleNamespace(runtime=SimpleNamespace(settings=Settings(), predictor=plane))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    scope = {
        "type": "http", "method": "POST", "path": "/", "headers": [],
        "path_params": {"model": "pets"}, "app": SimpleNamespace(state=state),
    }  # fmt: skip
    return Request(scope, receive)


@pytest.mark.parametrize(
    ("priority", "lane"),
    [(None, Lane.LOW), (0, Lane.LOW), (1, Lane.HIGH), (2, Lane.NORMAL), (3, Lane.LOW),
     (2**63, Lane.LOW)],
)  # fmt: skip
async def test_a_priority_is_a_lane_and_without_one_the_header_holds(
    priority: int | None, lane: Lane
):
    CALLER.set(Caller(lane=Lane.LOW))
    plane = Plane()
    with pytest.raises(Asked):
        await infer(request(plane, {} if priority is None else {"priority": priority}))
    assert plane.lane is lane


async def test_a_priority_that_is_none_is_refused_by_name():
    with pytest.raises(InvalidRequest, match="priority"):
        await infer(request(Plane(), {"priority": -1}))
