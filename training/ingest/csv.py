"""CSV uploads: a header with `text` and a target, then one row per record (RFC 4180).

The target is `label`, or `labels` with `|` between them, or `value`. Fields are separated by `,`,
`;` or tabs, whichever makes a header with both columns: spreadsheets write any of the three, and
the header leaves no doubt. Quotes are read strictly, since a lenient reader changes texts silently.
Other columns and blank lines are ignored. An error's line is the physical line on which its row
begins. Labels are always strings here, `1` too.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from core.datasets import TARGET_COLUMNS, Modality, RowError, Task
from training.ingest.findings import missing_column
from training.ingest.limits import Limits
from training.ingest.lines import BadLineError, Lines
from training.ingest.rows import Row, Unusable
from training.ingest.targets import find_task, read_number, split_labels

_DELIMITERS = (",", ";", "\t")
_READ: dict[Task, Callable[[str], object]] = {
    Task.SINGLE_LABEL: str,
    Task.MULTI_LABEL: split_labels,
    Task.REGRESSION: read_number,
}
# The csv module tells its errors apart by their text only.
_QUOTE_REASONS = {
    "unexpected end of data": "a double quote that opens in this row is never closed; close it",
    "expected after": "text follows a closing double quote; "
    'write a double quote inside a quoted field twice ("")',
    "new-line character": "a carriage return stands outside quotes; put the field in double quotes",
}


@dataclass(frozen=True)
class _Table:
    """A file whose header has been read: the rest of its lines, and its columns."""

    lines: Lines
    reader: Any
    line: int
    columns: list[str]
    delimiter: str


def parse(source: BinaryIO, limits: Limits) -> Iterator[Row | RowError]:
    """Yield the rows of a CSV file, and an error for each record that is not one."""
    with _field_size_limit(limits.max_row_bytes):
        table = _open_table(source, limits)
        if isinstance(table, RowError):
            yield table
            return
        task = find_task(table.columns)
        if isinstance(task, Unusable):
            yield RowError(line=table.line, column="value", reason=task.reason)
            return
        problems = _header_problems(table, task)
        if problems:
            yield from problems
            return
        yield from _rows(table, task)


@contextmanager
def _field_size_limit(size: int) -> Iterator[None]:
    """Let fields be as long as a row may be; `Lines` bounds rows. The setting is the process's."""
    before = csv.field_size_limit(size)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _open_table(source: BinaryIO, limits: Limits) -> _Table | RowError:
    tables: list[_Table] = []
    problem = RowError(line=1, reason="the file has no header; begin it with text,label")
    for delimiter in _DELIMITERS:
        lines = Lines(source, limits.max_row_bytes)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        columns: list[str] = []
        line = 1
        try:
            while not columns:
                line = lines.begin_row()
                columns = [name.strip() for name in next(reader)]
        except StopIteration:
            return problem
        except BadLineError as bad:
            return bad.error
        except csv.Error as error:
            # A quoted name before another delimiter looks like a quote out of place.
            problem = RowError(line=line, reason=_quote_reason(error))
            continue
        tables.append(_Table(lines, reader, line, columns, delimiter))
        if "text" in columns and not set(columns).isdisjoint(TARGET_COLUMNS.values()):
            return tables[-1]
    # None fits: the one with the most columns is most likely meant, and is only reported on.
    return max(tables, key=lambda table: len(table.columns)) if tables else problem


def _header_problems(table: _Table, task: Task) -> list[RowError]:
    problems = []
    for name in ("text", TARGET_COLUMNS[task]):
        times = table.columns.count(name)
        if times == 0:
            reason = missing_column(name, table.columns)
        elif times > 1:
            reason = f"the header has {times} columns '{name}'; rename or remove all but one"
        else:
            continue
        problems.append(RowError(line=table.line, column=name, reason=reason))
    return problems


def _rows(table: _Table, task: Task) -> Iterator[Row | RowError]:
    text_at, target_at = map(table.columns.index, ("text", TARGET_COLUMNS[task]))
    read = _READ[task]
    while True:
        line = table.lines.begin_row()
        try:
            fields = next(table.reader)
        except StopIteration:
            return
        except BadLineError as bad:
            yield bad.error
        except csv.Error as error:
            # The reader forgets the row it was in and goes on with the next line.
            yield RowError(line=line, reason=_quote_reason(error))
        else:
            if len(fields) == len(table.columns):
                yield Row(Modality.TEXT, fields[text_at], read(fields[target_at]), task, line)
            elif fields:
                yield RowError(line=line, reason=_ragged(table, len(fields)))


def _ragged(table: _Table, found: int) -> str:
    delimiter = "a tab" if table.delimiter == "\t" else f"'{table.delimiter}'"
    return (
        f"the row has {found} {'field' if found == 1 else 'fields'} but the header has "
        f"{len(table.columns)}; put double quotes around a field that contains {delimiter}, "
        "and fill in missing ones"
    )


def _quote_reason(error: csv.Error) -> str:
    for fragment, reason in _QUOTE_REASONS.items():
        if fragment in str(error):
            return reason
    return "the row is not valid CSV; put fields with special characters in double quotes"
