"""Continuing from a fine-tuned model: its data and the new rows, fitted anew on its backbone.

A job whose `model` is a version, such as `support-intents@3`, is a job on that version's backbone
and on every row that the version was fitted on, besides its own. Fitting anew on all of it forgets
nothing, where going on from the weights on new rows alone would (McCloskey & Cohen 1989), and it
costs little: the features of the old rows are kept (training.feature_cache), and a linear head's
fit has one optimum, wherever it starts. New classes come with their rows.

Of rows with the same content the newest counts, so a wrong label is mended by posting the row
again. The new file's rows come first and keep their numbers. Not here: which version a reference
means (core.parents; service.api.job_creation pins it when the job is made).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256

from core.errors import DataError, NotFound
from core.files import FileStore
from core.manifests import ModelManifest
from core.tasks import Answer, find_other_task
from training.data import Dataset, count_labels, read_dataset, spread
from training.duplicates import content_key


@dataclass(frozen=True)
class Continued:
    """All rows of a continued model; `earlier` names the older files, newest first.

    `contents` has by file what its rows are known by (training.duplicates).
    """

    data: Dataset
    earlier: tuple[str, ...]
    contents: dict[str, set[bytes]]
    new_rows: int
    replaced_rows: int


def files_of(model: ModelManifest) -> tuple[str, ...]:
    """Return the files whose rows a version was fitted on, newest first."""
    return (model.dataset.file, *model.dataset.earlier)


def continue_data(files: FileStore, parent: ModelManifest, new: Dataset) -> Continued:
    """Return the new rows with those that `parent` was fitted on.

    Raises `DataError` if the modality is another, or a file of the parent's is gone.
    """
    if new.manifest.modality is not parent.modality:
        raise DataError(
            f"{parent.reference} reads {parent.modality}; the training file holds "
            f"{new.manifest.modality} rows",
            param="model",
        )
    other_task = find_other_task(parent.task, new.manifest)
    if other_task is not None:
        raise DataError(f"{parent.reference} cannot be continued: {other_task}", param="model")
    earlier = tuple(file for file in files_of(parent) if file != new.file)
    parts = [new, *(_read(files, file, parent) for file in earlier)]
    items: list[object] = []
    answers: list[Answer] = []
    seen: set[bytes] = set()
    contents: dict[str, set[bytes]] = {}
    for part in parts:
        keys = [content_key(item) for item in part.items]
        # Within one file nothing is left out: that is for the data report to find.
        fresh = [row for row, key in enumerate(keys) if key not in seen]
        items += [part.items[row] for row in fresh]
        answers += [part.answers[row] for row in fresh]
        contents[part.file] = set(keys)
        seen |= contents[part.file]
    digest = sha256("\n".join(part.manifest.sha256 for part in parts).encode()).hexdigest()
    manifest = new.manifest.model_copy(
        update={
            "rows": len(items),
            "counts": count_labels(answers),
            "values": spread(answers),
            "sha256": digest,
        }
    )
    return Continued(
        data=replace(new, manifest=manifest, items=items, answers=answers),  # type: ignore[arg-type]
        earlier=earlier,
        contents=contents,
        new_rows=new.manifest.rows,
        replaced_rows=sum(part.manifest.rows for part in parts) - len(items),
    )


def _read(files: FileStore, file_id: str, parent: ModelManifest) -> Dataset:
    try:
        files.get(file_id)
        return read_dataset(files, file_id, param="model")
    except NotFound:
        raise DataError(
            f"{file_id}, which {parent.reference} was fitted on, has been deleted: post all rows "
            f"in one file and name the backbone {parent.backbone}",
            param="model",
        ) from None
