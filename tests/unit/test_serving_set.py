"""The serving set: one immutable picture of what can be served."""

from __future__ import annotations

from typing import Any, cast

import pytest

from core.errors import NotFound, Unavailable
from core.identifiers import ModelReference
from core.manifests import Release
from core.registry import Listing
from service.serving_set import IndexEntry, ModelState, ServingSet

RELEASE = Release(
    number=4, aliases={"production": 2}, created_at=0, created_by="t", reason="t", shadow=1
)
STATE = ModelState(Listing((1, 2, 3), 4), RELEASE, True, {3: "it is bad"})
KEY = ("default", "pets")
SET = ServingSet(is_complete=True).replace(KEY, STATE)


def test_what_is_refused_is_no_version_and_what_the_release_names_is_known():
    assert STATE.versions == (1, 2)
    assert STATE.named == {1, 2}
    assert ModelState().named == frozenset()


@pytest.mark.parametrize(("tenant", "name"), [("default", "cats"), ("other", "pets")])
def test_an_unknown_model_and_another_tenants_are_not_found(tenant: str, name: str):
    assert SET.state("default", ModelReference("pets")) is STATE
    with pytest.raises(NotFound):
        SET.state(tenant, ModelReference(name))
    with pytest.raises(Unavailable):
        ServingSet().state(tenant, ModelReference(name))


def test_the_index_tells_what_is_in_memory_and_why_something_cannot_be():
    assert SET.index({("default", "pets", 2)}) == [
        IndexEntry("default", "pets", 1, "UNLOADED"),
        IndexEntry("default", "pets", 2, "READY"),
        IndexEntry("default", "pets", 3, "UNAVAILABLE", "it is bad"),
    ]


def test_replace_leaves_the_old_set_as_it_was():
    changed = SET.replace(KEY, None)
    assert changed.models == {}
    assert changed.is_complete
    assert SET.models == {KEY: STATE}
    assert SET.replace(("default", "gone"), None).models == SET.models
    with pytest.raises(TypeError):
        cast("Any", SET.models)["default", "x"] = STATE
