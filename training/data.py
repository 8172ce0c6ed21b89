"""Reading a processed data set back: rows and labels, in the order of the file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from core.datasets import DatasetManifest, FileErrors, Modality
from core.errors import DataError
from core.files import FileStore


@dataclass(frozen=True)
class Dataset:
    """A labelled data set: texts or encoded images, and the label of each."""

    file: str
    manifest: DatasetManifest
    items: list[str] | list[bytes]
    labels: list[str]

    def targets(self, classes: list[str], *, param: str) -> npt.NDArray[np.int64]:
        """Return each row's index in `classes`; raise `DataError` for a label not among them."""
        index = {label: number for number, label in enumerate(classes)}
        unknown = sorted(set(self.labels) - index.keys())
        if unknown:
            shown = ", ".join(repr(label) for label in unknown[:5])
            raise DataError(f"labels that the training file does not have: {shown}", param=param)
        return np.array([index[label] for label in self.labels], np.int64)


def read_dataset(files: FileStore, file_id: str, *, param: str) -> Dataset:
    """Read a processed file; raise `DataError` naming `param` when it is not processed."""
    _, outcome = files.status(file_id)
    if isinstance(outcome, FileErrors):
        raise DataError(f"{file_id} is unusable: {outcome.summary()}", param=param)
    if outcome is None:
        raise DataError(f"{file_id} has not been processed", param=param)
    column = outcome.modality.value
    with files.open_data(file_id) as source:
        table = pq.read_table(source, columns=[column, "label"])
    values = table.column(column).to_pylist()
    items = values if outcome.modality is Modality.TEXT else [value["bytes"] for value in values]
    return Dataset(file_id, outcome, items, table.column("label").to_pylist())
