"""Names and references: the only strings of a client's that ever reach a key or a path.

Every identifier matches `^[a-z0-9][a-z0-9_-]{0,62}$`, so none can climb out of its prefix.
Model references have three forms: `name` (its production alias), `name@3` (one version) and
`name:staging` (another alias). Not here: what a reference resolves to (core.registry).
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

from core.errors import InvalidRequest

IDENTIFIER_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
_IDENTIFIER = re.compile(IDENTIFIER_PATTERN.removesuffix("$") + r"\Z")
_REFERENCE = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9_-]{0,62})"
    r"(?:@(?P<version>[1-9][0-9]{0,8})|:(?P<alias>[a-z0-9][a-z0-9_-]{0,62}))?\Z"
)

DEFAULT_TENANT = "default"
PRODUCTION = "production"


def is_identifier(text: str) -> bool:
    """Tell whether `text` may be used as a name in a key or a path."""
    return _IDENTIFIER.match(text) is not None


def require_identifier(text: str, *, param: str) -> str:
    """Return `text` if it is an identifier; raise `InvalidRequest` naming `param` otherwise."""
    if not is_identifier(text):
        raise InvalidRequest(
            f"{param} must be 1 to 63 lower-case letters, digits, '-' or '_', "
            "beginning with a letter or digit",
            param=param,
        )
    return text


def _validate(text: str) -> str:
    if not is_identifier(text):
        raise ValueError(
            "must be 1 to 63 lower-case letters, digits, '-' or '_', "
            "beginning with a letter or digit"
        )
    return text


Identifier = Annotated[str, StringConstraints(max_length=63), AfterValidator(_validate)]


def new_id(prefix: str) -> str:
    """Return a fresh unguessable identifier such as `file-3f0c…` (96 random bits)."""
    return f"{prefix}-{secrets.token_hex(12)}"


@dataclass(frozen=True)
class ModelReference:
    """A parsed model reference; with `version` the alias is not used."""

    name: str
    version: int | None = None
    alias: str = PRODUCTION

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.name}@{self.version}"
        return self.name if self.alias == PRODUCTION else f"{self.name}:{self.alias}"

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """Parse `name`, `name@version` or `name:alias`; raise `InvalidRequest` for all else."""
        match = _REFERENCE.match(text)
        if match is None:
            raise InvalidRequest(
                "model must look like 'name', 'name@3' or 'name:alias'", param="model"
            )
        version = match["version"]
        return cls(match["name"], int(version) if version else None, match["alias"] or PRODUCTION)
