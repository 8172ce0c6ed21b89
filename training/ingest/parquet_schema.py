"""Which columns a Parquet upload has, whether their types will do, and the names of its classes.

Not here: reading rows (training.ingest.parquet).
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from core.datasets import TARGET_COLUMNS, Modality, RowError, Task
from training.ingest.findings import missing_column, shown
from training.ingest.rows import Unusable
from training.ingest.targets import find_task

_STRING_VIEW = pa.string_view()


def inspect_schema(schema: Any) -> tuple[Modality, Task, list[RowError]]:
    """Return what the rows hold, what is to be said of them, and what is wrong with the columns."""
    names: list[str] = schema.names
    modality = Modality.IMAGE if "image" in names else Modality.TEXT
    task = find_task(names)
    if isinstance(task, Unusable):
        return modality, Task.REGRESSION, [RowError(column="value", reason=task.reason)]
    if "text" in names and "image" in names:
        reason = "there are both a 'text' and an 'image' column; remove one of them"
        return modality, task, [RowError(column="image", reason=reason)]
    problems = []
    for name in (modality.value, TARGET_COLUMNS[task]):
        fits, wanted = _WANTED[name]
        if name not in names:
            reason = missing_column(name, names)
        elif names.count(name) > 1:
            reason = f"there are {names.count(name)} columns '{name}'; remove all but one"
        elif not fits(schema.field(name).type):
            found = shown(str(schema.field(name).type))
            reason = f"the type is {found} but must be {wanted}"
        else:
            continue
        problems.append(RowError(column=name, reason=reason))
    return modality, task, problems


def class_names(schema: Any, task: Task) -> list[str] | None:
    """Return the names that integer labels stand for, if they are Hugging Face ClassLabels."""
    column = TARGET_COLUMNS[task]
    found = schema.field(column).type
    if is_string(found.value_type if task is Task.MULTI_LABEL else found):
        return None
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])
        feature = described["info"]["features"][column]
        if task is Task.MULTI_LABEL:
            # As older and as newer releases of `datasets` write a list of them.
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, RecursionError):
        # No metadata of Hugging Face's, or none that makes sense: the integers are the labels.
        return None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    return None


def is_string(found: Any) -> bool:
    """Tell whether a column holds strings, perhaps as a dictionary."""
    found = _values(found)
    types = pa.types
    return bool(types.is_string(found) or types.is_large_string(found) or found == _STRING_VIEW)


def _values(found: Any) -> Any:
    return found.value_type if pa.types.is_dictionary(found) else found


def _is_label(found: Any) -> bool:
    return is_string(found) or bool(pa.types.is_integer(_values(found)))


def _is_label_list(found: Any) -> bool:
    types = pa.types
    is_list = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
    # A dictionary in a list cannot be measured before it is expanded.
    return bool(is_list and found.value_type == _values(found.value_type)) and _is_label(
        found.value_type
    )


def _is_number(found: Any) -> bool:
    types = pa.types
    return bool(types.is_integer(found) or types.is_floating(found) or types.is_decimal(found))


def _is_image(found: Any) -> bool:
    if not pa.types.is_struct(found):
        return False
    fields = {found.field(i).name: found.field(i).type for i in range(found.num_fields)}
    if len(fields) < found.num_fields or not {"bytes", "path"} <= fields.keys():
        return False
    types = pa.types
    is_binary = types.is_binary(fields["bytes"]) or types.is_large_binary(fields["bytes"])
    # Without any path at all, pandas writes the null type. A dictionary in a struct cannot be read.
    path = fields["path"]
    return bool(is_binary and (types.is_null(path) or (is_string(path) and path == _values(path))))


_WANTED = {
    "text": (is_string, "string; cast the column"),
    "label": (_is_label, "string or integer; cast the column, or write the class's name"),
    "labels": (_is_label_list, "a list of strings or integers; cast the column"),
    "value": (_is_number, "an integer, a float or a decimal; cast the column"),
    "image": (
        _is_image,
        "a struct of 'bytes' (binary) and 'path' (string), as Hugging Face datasets write images",
    ),
}
