"""JSONL uploads: one JSON object with "text" and "label", "labels" or "value" on each line.

Other keys and blank lines are ignored. Stricter than `json.loads` where it guesses: duplicate keys,
NaN and Infinity are errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO, NoReturn

from core.datasets import TARGET_COLUMNS, Modality, RowError, Task
from training.ingest.findings import missing_column, shown
from training.ingest.limits import Limits
from training.ingest.lines import BadLineError, Lines
from training.ingest.rows import Row, Unusable, kind
from training.ingest.targets import find_task


class _PlainJsonError(ValueError):
    """Raised inside the decoder for what Python accepts and JSON does not."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _PlainJsonError(f"the key {shown(key)} is there twice; remove one")
            seen.add(key)
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise _PlainJsonError(f"{name} is not JSON; write null, a number or a string")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def parse(source: BinaryIO, limits: Limits) -> Iterator[Row | RowError]:
    """Yield the rows of a JSONL file, and an error for each line that is not one.

    The first object's keys say which task all of them are of.
    """
    lines = Lines(source, limits.max_row_bytes)
    first = True
    task: Task | None = None
    while True:
        number = lines.begin_row()
        try:
            line = next(lines).rstrip("\r\n")
        except StopIteration:
            return
        except BadLineError as bad:
            yield bad.error
            first = False
            continue
        content = line.strip()
        if not content:
            continue
        if first and (content.startswith("[") or content == "{"):
            shape = "a JSON list" if content.startswith("[") else "JSON over several lines"
            yield RowError(
                line=number,
                reason=f'the file is {shape}; write JSONL: one {{"text": …, "label": …}} per line',
            )
            return
        first = False
        fields = _fields(number, line)
        if isinstance(fields, RowError):
            yield fields
            continue
        if task is None:
            found = find_task(list(fields))
            if isinstance(found, Unusable):
                yield RowError(line=number, column="value", reason=found.reason)
                return
            task = found
        target = _field(fields, TARGET_COLUMNS[task])
        yield Row(Modality.TEXT, _text(fields), target, task, line=number)


def _fields(number: int, line: str) -> dict[str, object] | RowError:
    try:
        value: object = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON at character {error.pos + 1}: {error.msg}; correct the line"
        return RowError(line=number, reason=reason)
    except _PlainJsonError as error:
        return RowError(line=number, reason=str(error))
    except RecursionError:
        return RowError(line=number, reason="the JSON is nested too deeply; flatten it")
    except ValueError:
        # Python refuses to read integers of thousands of digits.
        return RowError(line=number, reason="a number has too many digits; shorten it")
    if isinstance(value, dict):
        return value
    return RowError(
        line=number,
        reason=f'the line must be an object like {{"text": …, "label": …}}, not {kind(value)}',
    )


def _text(fields: dict[str, object]) -> object:
    if "image" in fields and "text" not in fields:
        return Unusable(
            "images cannot be sent as JSONL; "
            "upload Parquet with an image column, or a zip of images in class folders"
        )
    return _field(fields, "text")


def _field(fields: dict[str, object], name: str) -> object:
    if name in fields:
        return fields[name]
    return Unusable(missing_column(name, list(fields), noun="key"))
