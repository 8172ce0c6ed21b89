"""The normal form of a data set, written row by row as Parquet.

Columns: `text` (string) or `image` (struct of `bytes` and `path`), and `label` (string), `labels`
(list of strings) or `value` (double). Row groups are bounded by rows and by bytes, so that a reader
holds little at a time. The same rows give the same bytes, whatever format they were uploaded in.

Not here: which rows are acceptable (training.ingest.rows, training.ingest.draft).
"""

from __future__ import annotations

from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from core.datasets import TARGET_COLUMNS, Modality, Task
from training.ingest.limits import MIB
from training.ingest.rows import EncodedImage
from training.ingest.targets import Target

ROW_GROUP_ROWS = 4096
ROW_GROUP_BYTES = 16 * MIB

_ITEM_TYPES: dict[Modality, Any] = {
    Modality.TEXT: pa.string(),
    Modality.IMAGE: pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
}
_TARGET_TYPES: dict[Task, Any] = {
    Task.SINGLE_LABEL: pa.string(),
    Task.MULTI_LABEL: pa.list_(pa.string()),
    Task.REGRESSION: pa.float64(),
}


class NormalFormWriter:
    """Writes one data set to `sink`; nothing is complete before `close`."""

    def __init__(self, sink: BinaryIO, modality: Modality, task: Task) -> None:
        column = TARGET_COLUMNS[task]
        self._schema: Any = pa.schema(
            [(modality.value, _ITEM_TYPES[modality]), (column, _TARGET_TYPES[task])]
        )
        # Statistics would copy whole texts into the footer; nobody filters by them.
        self._writer = pq.ParquetWriter(
            sink, self._schema, compression="zstd", use_dictionary=[column], write_statistics=False
        )
        self._items: list[str | dict[str, bytes | str | None]] = []
        self._targets: list[Target] = []
        self._buffered_bytes = 0

    def add(self, item: str | EncodedImage, target: Target) -> None:
        """Add a row."""
        if isinstance(item, str):
            size = len(item.encode())
            self._items.append(item)
        else:
            size = len(item.data)
            self._items.append({"bytes": item.data, "path": item.path})
        self._targets.append(target)
        self._buffered_bytes += size
        if len(self._items) >= ROW_GROUP_ROWS or self._buffered_bytes >= ROW_GROUP_BYTES:
            self._write_row_group()

    def close(self) -> None:
        """Write what is left, and the footer; `sink` stays open."""
        if self._items:
            self._write_row_group()
        self._writer.close()

    def discard(self) -> None:
        """Give up; what `sink` holds is of no use."""
        self._writer.close()

    def _write_row_group(self) -> None:
        columns = [
            pa.array(self._items, self._schema.field(0).type),
            pa.array(self._targets, self._schema.field(1).type),
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._items, self._targets, self._buffered_bytes = [], [], 0
