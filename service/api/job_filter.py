"""`GET /v1/fine_tuning/jobs?metadata[k]=v`: a tenant's jobs by their metadata.

There is no index of metadata. Jobs are read newest first, one request reads `MAX_SCANNED` of them
and a page more at most, and those that Redis has forgotten are an object of the store each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import Request

from core.errors import InvalidRequest
from core.jobs import Job
from service.job_history import JobHistory

PARAM = "metadata"
MAX_SCANNED = 2_000
_CHUNK = 200
_MAX_PAIRS, _MAX_KEY, _MAX_VALUE = 16, 64, 512


@dataclass(frozen=True)
class Page:
    """Jobs that fit. `scanned_to` is the job to go on behind when the search ended at its bound."""

    jobs: list[Job]
    has_more: bool
    scanned_to: str | None = None


def metadata_filter(request: Request) -> Mapping[str, str] | None:
    """Return the pairs that a job must have, none meaning no metadata at all; None for no filter.

    `metadata=null` asks for jobs without metadata, as in OpenAI's API. A key may itself hold
    brackets. Raises `InvalidRequest`.
    """
    pairs: dict[str, str] = {}
    wants_none = False
    for name, value in request.query_params.multi_items():
        if name == PARAM and value == "null":
            wants_none = True
        elif name.startswith(PARAM):
            key = name.removeprefix(f"{PARAM}[").removesuffix("]")
            is_pair = name == f"{PARAM}[{key}]" and 1 <= len(key) <= _MAX_KEY
            if not is_pair or key in pairs or len(value) > _MAX_VALUE:
                raise _refusal()
            pairs[key] = value
    if len(pairs) > _MAX_PAIRS or (wants_none and pairs):
        raise _refusal()
    return pairs if pairs or wants_none else None


def fits(job: Job, wanted: Mapping[str, str]) -> bool:
    """Tell whether a job's metadata has every pair, or is empty when no pair is wanted."""
    metadata = job.spec.get("metadata") or {}
    assert isinstance(metadata, dict)
    if not wanted:
        return not metadata
    return all(metadata.get(key) == value for key, value in wanted.items())


async def search(
    history: JobHistory,
    tenant: str,
    wanted: Mapping[str, str],
    *,
    after: str | None,
    limit: int,
    max_scanned: int = MAX_SCANNED,
) -> Page:
    """Return the newest fine-tune jobs behind `after` that fit."""
    found: list[Job] = []
    scanned = 0
    while chunk := await history.list(tenant, after=after, limit=_CHUNK):
        found += [job for job in chunk if fits(job, wanted)]
        if len(found) > limit:
            return Page(found[:limit], has_more=True)
        after = chunk[-1].id
        scanned += len(chunk)
        if scanned >= max_scanned:
            return Page(found, has_more=True, scanned_to=after)
    return Page(found, has_more=False)


def _refusal() -> InvalidRequest:
    return InvalidRequest(
        f"filter with up to {_MAX_PAIRS} different metadata[<key>]=<value>, or with metadata=null",
        param=PARAM,
    )
