"""Identifiers and references: nothing that could leave its prefix gets through."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from core.errors import InvalidRequest
from core.identifiers import (
    IDENTIFIER_PATTERN,
    Identifier,
    ModelReference,
    is_identifier,
    new_id,
    require_identifier,
)

NAMES = st.from_regex(r"\A[a-z0-9][a-z0-9_-]{0,62}\Z")


@pytest.mark.parametrize("name", ["a", "0", "support-intents", "a" * 63, "a_b-c"])
def test_names(name: str):
    assert is_identifier(name)
    assert require_identifier(name, param="x") == name


@pytest.mark.parametrize(
    "name",
    ["", "-a", "_a", "A", "a" * 64, "a/b", "..", "a.b", "a\n", "a\x00", "é", "a b", "٣", "a@1"],
)
def test_not_names(name: str):
    assert not is_identifier(name)
    with pytest.raises(InvalidRequest) as refused:
        require_identifier(name, param="suffix")
    assert refused.value.param == "suffix"
    assert re.search(IDENTIFIER_PATTERN.removesuffix("$") + r"\Z", name) is None


def test_the_pydantic_type_agrees():
    class Model(BaseModel):
        name: Identifier

    assert Model(name="ok").name == "ok"
    for name in ("a\n", "../x", "a" * 64):
        with pytest.raises(ValidationError):
            Model(name=name)


@given(NAMES, st.none() | st.integers(1, 999_999_999))
def test_a_pinned_reference_reads_back(name: str, version: int | None):
    reference = ModelReference(name, version)
    assert ModelReference.parse(str(reference)) == reference


@given(NAMES, NAMES)
def test_an_alias_reads_back(name: str, alias: str):
    reference = ModelReference(name, alias=alias)
    assert ModelReference.parse(str(reference)) == reference


@pytest.mark.parametrize(
    "text",
    ["", "@1", "a@", "a@0", "a@-1", "a@1.5", "a@1:b", "a:b@1", "a@1234567890", "a:", "a@١", "a@1\n",
     "a/../b", "hf:org/x"],
)  # fmt: skip
def test_not_references(text: str):
    with pytest.raises(InvalidRequest) as refused:
        ModelReference.parse(text)
    assert refused.value.param == "model"


@given(st.text())
def test_any_text_parses_or_is_refused(text: str):
    try:
        reference = ModelReference.parse(text)
    except InvalidRequest:
        return
    assert is_identifier(reference.name)
    assert is_identifier(reference.alias)


def test_new_ids_are_identifiers_and_differ():
    ids = {new_id("file") for _ in range(100)}
    assert len(ids) == 100
    assert all(is_identifier(each) and each.startswith("file-") for each in ids)
