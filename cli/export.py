"""`graft export`: a model as a folder that needs no Graft.

model.onnx        inputs to probabilities (training.standalone)
model.json        its labels and what the service says of it
preprocess.json   how inputs are made of texts (with `tokenizer.json`) or images
adapter_*         of a model with an adapter, for `peft`
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from rich.progress import Progress

from cli.client import Client
from cli.failures import CommandError

MERGE_SECONDS = 600
KEPT = ("adapter_config.json", "adapter_model.safetensors")
OF_TRUNK = ("preprocess.json", "tokenizer.json")


def export_model(client: Client, model: str, folder: Path) -> str:
    """Write a model to a folder, which is made or empty; return the version that it was.

    Nothing is written if anything goes wrong. Raises `CommandError`.
    """
    if find_spec("onnx") is None:
        raise CommandError("this needs the packages of a worker: pip install 'graft[worker]'")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CommandError(f"{folder} is not empty; give a new folder")
    listed = client.model_files(model)
    # The version, for an alias may move meanwhile.
    reference = str(listed["model"])
    described = client.model(reference)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        parts, made = Path(scratch) / "parts", Path(scratch) / "made"
        made.mkdir()
        with Progress(transient=True) as progress:
            for file in progress.track(listed["data"], description=reference):
                _fetch(client, reference, file, parts)
        _merge(parts)
        shown = {"model": reference, "labels": described["labels"], "described": described}
        (made / "model.json").write_text(json.dumps(shown, ensure_ascii=False, indent=1))
        for name in ("model.onnx", *KEPT, *(f"trunk/{name}" for name in OF_TRUNK)):
            if (parts / name).exists():
                (parts / name).rename(made / PurePosixPath(name).name)
        made.replace(folder)
    return reference


def _fetch(client: Client, reference: str, file: dict[str, str], parts: Path) -> None:
    """Write one file into `parts`, if it is what the service says."""
    name = PurePosixPath(file["id"])
    if name.is_absolute() or ".." in name.parts:
        raise CommandError(f"{reference} has a file with a name that cannot be used")
    path = parts / name
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with path.open("wb") as target:
        for chunk in client.model_file(reference, file["id"]):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != file["sha256"]:
        raise CommandError(f"{file['id']} of {reference} did not arrive as it is stored; try again")


def _merge(parts: Path) -> None:
    command = [sys.executable, "-m", "training.standalone", str(parts)]
    try:
        ended = subprocess.run(  # noqa: S603 - our own module
            command, check=False, capture_output=True, text=True, timeout=MERGE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise CommandError(f"making model.onnx took more than {MERGE_SECONDS} s") from None
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise CommandError(f"model.onnx could not be made: {last}")
