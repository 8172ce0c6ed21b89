"""Parquet uploads: `text` (string) or `image` (Hugging Face image struct), and a target.

The target is `label`, `labels` (a list) or `value` (a number). A label may be a string, an integer,
or the index of a Hugging Face ClassLabel, whose names are in the schema's `huggingface` metadata.
Other columns are not read. An error's line is the row, from 1.

A few bytes of Parquet can stand for terabytes: one long value, referred to a million times. So
what the footer says of rows and bytes is checked first, and then rows are read one at a time and
measured before they are copied; a larger batch would expand the value as often as it has rows, and
saves only 7 µs a row. Dictionary columns are not expanded; they rebuild a row group's dictionary
for each batch, at five times its size, so they are read in large batches from small row groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import SEEK_END
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from core.datasets import TARGET_COLUMNS, Modality, RowError, Task
from training.ingest.limits import (
    MAX_IMAGE_BYTES,
    MAX_LABEL_CHARS,
    MAX_LABELS_OF_ROW,
    MAX_PATH_CHARS,
    MIB,
    Limits,
)
from training.ingest.parquet_schema import class_names, inspect_schema
from training.ingest.rows import EncodedImage, Row, Unusable, too_many_image_bytes

_MAX_FOOTER_BYTES = 16 * MIB
_MAX_FOOTER_ITEMS = 100_000
_DICTIONARY_BATCH_ROWS = 4096
_MAX_DICTIONARY_GROUP_BYTES = 128 * MIB
# UTF-8 takes at most four bytes a character; whitespace around a label is stripped later.
_MAX_LABEL_BYTES = 16 * MAX_LABEL_CHARS
_IMAGE_LEAVES = ["image.bytes", "image.path"]
_DAMAGED = "the Parquet file is damaged; write it again"
_ENCRYPTED = "the Parquet file is encrypted; write it without encryption"
# pyarrow reports damage as any of these. Its ArrowMemoryError is a MemoryError too and passes.
_UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError)


def parse(source: BinaryIO, limits: Limits) -> Iterator[Row | RowError]:
    """Yield the rows of a Parquet file, or why it has none."""
    try:
        opened = _open_file(source)
    except MemoryError:
        raise
    except _UNREADABLE as error:
        yield _unreadable(error)
        return
    if isinstance(opened, RowError):
        yield opened
        return
    schema = opened.schema_arrow
    modality, task, problems = inspect_schema(schema)
    # What cannot be read is not measured.
    problems = problems or _size_problems(opened.metadata, schema, limits)
    if problems:
        yield from problems
        return
    yield from _rows(source, schema, modality, task, limits)


def _open_file(source: BinaryIO) -> Any:
    """Read the footer and return a `ParquetFile`, or why not."""
    size = source.seek(0, SEEK_END)
    source.seek(max(0, size - 8))
    tail = source.read(8)
    if tail.endswith(b"PARE"):
        return RowError(reason=_ENCRYPTED)
    if len(tail) < 8 or not tail.endswith(b"PAR1"):
        return RowError(reason="the Parquet file is cut off; write or upload it again")
    if int.from_bytes(tail[:4], "little") > _MAX_FOOTER_BYTES:
        return RowError(reason="the Parquet footer is too large; write fewer, larger row groups")
    source.seek(0)
    return pq.ParquetFile(
        source,
        buffer_size=MIB,
        pre_buffer=False,
        thrift_string_size_limit=_MAX_FOOTER_BYTES,
        thrift_container_size_limit=_MAX_FOOTER_ITEMS,
        page_checksum_verification=True,
    )


def _unreadable(error: BaseException, row: int | None = None) -> RowError:
    # A file with a plain footer and encrypted columns says so only in the text of the error.
    encrypted = "crypt" in str(error).lower()
    return RowError(line=row, reason=_ENCRYPTED if encrypted else _DAMAGED)


def _size_problems(metadata: Any, schema: Any, limits: Limits) -> list[RowError]:
    problems = []
    if metadata.num_rows > limits.max_rows:
        reason = f"there are more than {limits.max_rows} rows; upload fewer of them"
        problems.append(RowError(line=limits.max_rows + 1, reason=reason))
    # By row group only: pyarrow ends the process over a damaged column's metadata.
    group_bytes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    if sum(max(0, size) for size in group_bytes) > limits.max_unpacked_bytes:
        problems.append(RowError(reason=_unpacks_to_more(limits)))
    if max(group_bytes, default=0) > _MAX_DICTIONARY_GROUP_BYTES:
        reason = (
            f"a dictionary column is in a row group of more than {_MAX_DICTIONARY_GROUP_BYTES} "
            "bytes; cast the column to its value type"
        )
        problems += [
            RowError(column=name, reason=reason)
            for name in schema.names
            if name in ("text", "label", "labels")
            and pa.types.is_dictionary(schema.field(name).type)
        ]
    return problems


def _unpacks_to_more(limits: Limits) -> str:
    return (
        f"the rows unpack to more than {limits.max_unpacked_bytes} bytes; "
        "upload fewer or smaller ones"
    )


def _rows(
    source: BinaryIO, schema: Any, modality: Modality, task: Task, limits: Limits
) -> Iterator[Row | RowError]:
    leaves = ["text"] if modality is Modality.TEXT else _IMAGE_LEAVES
    read_item = _text if modality is Modality.TEXT else _image
    column, read_target = TARGET_COLUMNS[task], _READ[task]
    names = None if task is Task.REGRESSION else class_names(schema, task)
    row, unpacked = 0, 0
    try:
        items = _scalars(source, schema.field(modality.value), leaves)
        targets = _scalars(source, schema.field(column), [column])
        for item, target in zip(items, targets, strict=True):
            row += 1
            unpacked += _size(item) + _size(target)
            if unpacked > limits.max_unpacked_bytes:
                yield RowError(line=row, reason=_unpacks_to_more(limits))
                return
            yield Row(modality, read_item(item, limits), read_target(target, names), task, row)
    except MemoryError:
        raise
    except _UNREADABLE as error:
        yield _unreadable(error, row + 1)


def _scalars(source: BinaryIO, field: Any, leaves: list[str]) -> Iterator[Any]:
    """Yield one column's values; each has a reader of its own, for a batch size of its own."""
    is_dictionary = pa.types.is_dictionary(field.type)
    for batch in _open_file(source).iter_batches(
        _DICTIONARY_BATCH_ROWS if is_dictionary else 1, columns=leaves, use_threads=False
    ):
        yield from batch.column(0)


def _text(scalar: Any, limits: Limits) -> object:
    return _string(scalar, 4 * limits.max_text_chars, f"shorten it to {limits.max_text_chars}")


def _image(scalar: Any, limits: Limits) -> object:
    if not scalar.is_valid:
        return None
    data = _value(scalar["bytes"])
    if data is None:
        return Unusable("the image has no bytes; embed the image files before writing the Parquet")
    size = _size(data)
    if size > MAX_IMAGE_BYTES:
        return Unusable(too_many_image_bytes(size))
    path = _string(scalar["path"], 4 * MAX_PATH_CHARS, f"shorten it to {MAX_PATH_CHARS}")
    if isinstance(path, Unusable):
        return Unusable(f"the path of the image: {path.reason}")
    return EncodedImage(data.as_py(), path)


def _label(scalar: Any, names: list[str] | None) -> object:
    value = _value(scalar)
    if value is None or not pa.types.is_integer(value.type):
        return _string(scalar, _MAX_LABEL_BYTES, f"shorten it to {MAX_LABEL_CHARS}")
    number = value.as_py()
    if names is None:
        return number
    if not 0 <= number < len(names):
        return Unusable(
            f"the label {number} has no name among the {len(names)} of the ClassLabel; "
            "correct it or remove the row"
        )
    return names[number]


def _labels(scalar: Any, names: list[str] | None) -> object:
    if not scalar.is_valid:
        return None
    if len(scalar) > MAX_LABELS_OF_ROW:
        return Unusable(f"there are {len(scalar)} labels; at most {MAX_LABELS_OF_ROW} are allowed")
    return [_label(each, names) for each in scalar]


def _number(scalar: Any, _: list[str] | None) -> object:
    return float(scalar.as_py()) if scalar.is_valid else None


_READ: dict[Task, Callable[[Any, list[str] | None], object]] = {
    Task.SINGLE_LABEL: _label,
    Task.MULTI_LABEL: _labels,
    Task.REGRESSION: _number,
}


def _value(scalar: Any) -> Any:
    """Return the scalar itself, out of its dictionary, or None for a null."""
    value = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
    return value if value is not None and value.is_valid else None


def _size(scalar: Any) -> int:
    """Return the bytes of a string or an image, 0 for what is small anyway."""
    value = _value(scalar)
    if isinstance(value, pa.StructScalar):
        value = _value(value["bytes"])
    if isinstance(value, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        return int(value.values.nbytes)
    return value.as_buffer().size if isinstance(value, pa.BinaryScalar) else 0


def _string(scalar: Any, max_bytes: int, remedy: str) -> str | Unusable | None:
    """Copy a string out of Arrow, unless it is longer than any that could be accepted."""
    value = _value(scalar)
    if value is None:
        return None
    size = _size(value)
    if size > max_bytes:
        return Unusable(f"the value is {size} bytes long; {remedy} characters")
    try:
        return str(value.as_py())
    except UnicodeDecodeError:
        return Unusable("the value is not UTF-8; write it as UTF-8")
