"""Releases over HTTP: what is posted holds in every process at once, and bad bodies say why."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from core.manifests import TrunkManifest
from tests.builders import add_text_trunk, publish

if TYPE_CHECKING:
    from tests.integration.service_process import ServiceProcess

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.integration.service_fixtures"]


@pytest.fixture(scope="module")
def trunk(service: ServiceProcess) -> TrunkManifest:
    return add_text_trunk(service.registry)


@pytest.fixture(scope="module")
def model(service: ServiceProcess, trunk: TrunkManifest) -> str:
    """Three versions, the first released."""
    first = publish(service.registry, trunk, "released", seed=1)
    for seed in (2, 3):
        publish(service.registry, trunk, "released", seed=seed, release=False)
    return first.name


async def post(http: httpx.AsyncClient, name: str, **body: Any) -> dict[str, Any]:
    response = await http.post(f"/v1/models/{name}/releases", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def answering(client: httpx.AsyncClient, name: str, key: str) -> str:
    response = await client.post(
        "/v1/predict", json={"model": name, "inputs": ["cat"]}, headers={"X-Routing-Key": key}
    )
    assert response.status_code == 200, response.text
    return str(response.json()["model"])


async def until_answers(client: httpx.AsyncClient, name: str, expected: set[str]) -> None:
    async with asyncio.timeout(15):
        while {await answering(client, name, str(n)) for n in range(24)} != expected:
            await asyncio.sleep(0.02)


async def test_a_split_holds_in_every_process_alike_and_is_taken_back(
    service: ServiceProcess, http: httpx.AsyncClient, model: str
):
    first = (await http.get(f"/v1/models/{model}/releases")).json()["data"][0]
    made = await post(
        http, model, traffic=[{"version": 1, "weight": 50}, {"version": 2, "weight": 50}],
        shadow=3, reason="try it", created_by="ann", behind=first["number"],
    )  # fmt: skip
    assert made["aliases"] == {"production": 1}
    async with service.one_client_per_process() as processes:
        for client in processes.values():
            await until_answers(client, model, {f"{model}@1", f"{model}@2"})
        for key in map(str, range(12)):
            found = {await answering(client, model, key) for client in processes.values()}
            assert len(found) == 1
        shown = (await http.get(f"/v1/models/{model}")).json()
        assert (shown["shadow"], len(shown["traffic"])) == (3, 2)
        back = await post(http, model, rollback_to=first["number"], reason="worse")
        assert (back["aliases"], back["traffic"], back["shadow"]) == ({"production": 1}, [], None)
        for client in processes.values():
            await until_answers(client, model, {f"{model}@1"})
    history = (await http.get(f"/v1/models/{model}/releases?limit=2")).json()
    assert [entry["number"] for entry in history["data"]] == [back["number"], made["number"]]
    assert history["has_more"] is True
    assert (history["data"][1]["created_by"], history["data"][1]["reason"]) == ("ann", "try it")
    older = await http.get(f"/v1/models/{model}/releases?after={made['number']}")
    assert older.json()["data"] == [first]
    assert older.json()["has_more"] is False


async def test_aliases_come_and_go_and_split_and_shadow_end_when_left_out(
    http: httpx.AsyncClient, model: str
):
    await post(http, model, aliases={"staging": 2}, shadow=2)
    made = await post(http, model, aliases={"staging": None, "canary": 3})
    assert made["aliases"] == {"production": 1, "canary": 3}
    assert made["shadow"] is None


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "aliases"),
    "an unknown field": ({"alias": {"production": 1}}, "alias"),
    "an alias that is no name": ({"aliases": {"../x": 1}}, "aliases"),
    "an alias of checkpoints": ({"aliases": {"ckpt-1": 1}}, "aliases"),
    "a version that is no number": ({"aliases": {"production": "x"}}, "aliases"),
    "version 0": ({"shadow": 0}, "shadow"),
    "a weight of nothing": ({"traffic": [{"version": 1, "weight": 0}]}, "traffic"),
    "a share without weight": ({"traffic": [{"version": 1}]}, "traffic"),
    "a version twice": ({"traffic": [{"version": 1, "weight": 1}] * 2}, "traffic"),
    "too many shares": ({"traffic": [{"version": 1, "weight": 1}] * 17}, "traffic"),
    "no production left": ({"aliases": {"production": None}, "shadow": 1}, "aliases"),
    "a rate beyond 1": ({"guard": {"max_error_rate": 2}}, "guard"),
    "a guard without a limit": ({"guard": {"min_rows": 5}}, "guard"),
    "a guard of no shadow": ({"guard": {"max_disagreement": 0.1}}, "guard"),
    "a rollback with more": ({"rollback_to": 1, "shadow": 1}, "rollback_to"),
    "too long a reason": ({"shadow": 1, "reason": "x" * 501}, "reason"),
}


@pytest.mark.parametrize(("body", "param"), BAD.values(), ids=BAD.keys())
async def test_a_bad_body_is_refused_by_field(
    http: httpx.AsyncClient, model: str, body: dict[str, Any], param: str
):
    response = await http.post(f"/v1/models/{model}/releases", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_a_first_release_has_nothing_to_be_taken_back_to(
    service: ServiceProcess, http: httpx.AsyncClient, trunk: TrunkManifest
):
    publish(service.registry, trunk, "unreleased", release=False)
    body = {"aliases": {"production": 1}, "guard": {"max_error_rate": 0.1}}
    response = await http.post("/v1/models/unreleased/releases", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "guard")


async def test_what_is_not_there_and_what_has_moved_on(http: httpx.AsyncClient, model: str):
    url = f"/v1/models/{model}/releases"
    for path, body, status in (
        (url, {"aliases": {"production": 99}}, 404),
        (url, {"rollback_to": 999}, 404),
        (url, {"aliases": {"production": 1}, "behind": 0}, 409),
        ("/v1/models/nobody/releases", {"aliases": {"production": 1}}, 404),
        ("/v1/models/No!/releases", {"aliases": {"production": 1}}, 400),
    ):
        assert (await http.post(path, json=body)).status_code == status
    assert (await http.get("/v1/models/nobody/releases")).status_code == 404
    assert (await http.get(f"{url}?limit=0")).status_code == 400


@pytest.mark.parametrize(
    ("name", "value"), [("X-Priority", "urgent"), ("X-Routing-Key", "k" * 257)]
)
async def test_a_header_that_makes_no_sense_is_refused(
    http: httpx.AsyncClient, model: str, name: str, value: str
):
    body = {"model": model, "inputs": ["cat"]}
    response = await http.post("/v1/predict", json=body, headers={name: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name.lower()


async def test_every_lane_is_answered(http: httpx.AsyncClient, model: str):
    body = {"model": model, "inputs": ["cat"]}
    for lane in ("high", "normal", "low"):
        response = await http.post("/v1/predict", json=body, headers={"X-Priority": lane})
        assert response.status_code == 200


async def test_models_are_listed_in_pages(http: httpx.AsyncClient, model: str):
    names: list[str] = []
    after = ""
    while True:
        page = (await http.get(f"/v1/models?limit=1&after={after}")).json()
        names += [entry["id"] for entry in page["data"] if entry["kind"] == "fine_tuned"]
        if not page["has_more"]:
            break
        after = names[-1]
    assert names == sorted(names)
    assert {"pets", "shapes", model} <= set(names)
