"""The serving set: references resolved against one immutable picture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from core.errors import NotFound, Unavailable
from core.identifiers import ModelReference
from service.serving_set import LiveModel, ModelState, ServingSet


def live(trunk: str = "t") -> LiveModel:
    return cast("LiveModel", SimpleNamespace(manifest=SimpleNamespace(trunk=trunk)))


ONE, TWO = live("a"), live("b")
STATE = ModelState({1: ONE, 2: TWO}, {"production": 2, "old": 1, "broken": 3}, {3: "it is bad"}, 4)
SET = ServingSet(is_complete=True).replace(("default", "pets"), STATE)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [("pets", TWO), ("pets@1", ONE), ("pets@2", TWO), ("pets:old", ONE), ("pets:production", TWO)],
)
def test_a_reference_resolves_to_its_live_version(reference: str, expected: Any):
    assert SET.resolve("default", ModelReference.parse(reference)) is expected


@pytest.mark.parametrize("reference", ["cats", "pets@9", "pets:nothing"])
def test_an_unknown_reference_is_not_found(reference: str):
    with pytest.raises(NotFound):
        SET.resolve("default", ModelReference.parse(reference))


def test_another_tenant_finds_nothing():
    with pytest.raises(NotFound):
        SET.resolve("other", ModelReference.parse("pets"))


@pytest.mark.parametrize("reference", ["pets@3", "pets:broken"])
def test_a_refused_version_says_why(reference: str):
    with pytest.raises(Unavailable, match="it is bad"):
        SET.resolve("default", ModelReference.parse(reference))


def test_replace_leaves_the_old_set_as_it_was():
    changed = SET.replace(("default", "pets"), None)
    assert changed.models == {}
    assert changed.is_complete
    assert SET.live_versions == 2
    assert SET.replace(("default", "gone"), None).models == SET.models
    with pytest.raises(TypeError):
        cast("Any", SET.models)["default", "x"] = STATE


def test_trunks_are_those_that_live_versions_need():
    assert SET.trunks() == {"a", "b"}
