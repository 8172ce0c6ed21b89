"""Which files a backbone is read from, and one digest over them. Imports no torch.

    those of the table                inside installed packages, which are found but not imported
    hf:<directory>                    a directory in the Hugging Face layout
    hf:<org>/<name>@<revision>        a hub repository, fetched once into the hub's own cache

Only weights in safetensors, JSON, vocabularies and SentencePiece models are read or fetched: no
code and no pickle. The exceptions are the packaged `.pth` of the image backbones, whose hashes are
pinned and which are read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from core.backbones import BACKBONES, HF_PREFIX, Backbone, is_allowed
from core.errors import DataError

_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model")
_PACKAGED = {
    "minilm": ("model", _PATTERNS),
    "efficientnet-lite0": ("models", ("*.pth",)),
    "mobilenet-v2": ("weights", ("*.pth",)),
    "wordllama": ("", ("weights/*.safetensors", "tokenizers/*.json")),
}
"""In which folder of its package a backbone's files are, and which they are."""
_HUB_ENTRY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w.-]+)\Z")


@dataclass(frozen=True)
class Source:
    """The files of one backbone below `root`; `name` is what a job calls it."""

    name: str
    root: Path
    files: tuple[Path, ...]

    def digest(self) -> str:
        """Return the SHA-256 over the sorted relative names and hashes of the files."""
        total = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.relative_to(self.root).as_posix()}:{content}\n".encode())
        return total.hexdigest()

    def find(self, suffix: str) -> list[Path]:
        """Return the files at the top of the folder that have this suffix."""
        return [path for path in self.files if path.suffix == suffix and path.parent == self.root]


def locate(model: str, hf_models: tuple[str, ...]) -> Source:
    """Find a backbone's files; raise `DataError` with `param="model"` if it may not be used."""
    if not is_allowed(model, hf_models):
        raise unusable("this worker does not offer that model")
    if model.startswith(HF_PREFIX):
        return _scan(model, _hugging_face_root(model.removeprefix(HF_PREFIX)), _PATTERNS)
    package = _package(BACKBONES[model])
    if package is None:
        raise unusable(f"the package {BACKBONES[model].package} is not installed on this worker")
    folder, patterns = _PACKAGED[model]
    return _scan(model, package / folder, patterns)


def is_installed(backbone: Backbone) -> bool:
    """Tell whether the package with a backbone's weights is on this machine."""
    return _package(backbone) is not None


def _package(backbone: Backbone) -> Path | None:
    spec = find_spec(backbone.package.replace("-", "_"))
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def unusable(reason: str) -> DataError:
    """Return the error that says why a model cannot be a backbone; `reason` holds no path."""
    return DataError(reason, param="model")


def _scan(name: str, root: Path, patterns: tuple[str, ...]) -> Source:
    found = {
        path
        for pattern in patterns
        for path in root.rglob(pattern)
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    }
    if not found:
        raise unusable("the model's files are not on this worker")
    return Source(name, root, tuple(sorted(found)))


def _hugging_face_root(entry: str) -> Path:
    folder = Path(entry)
    if folder.is_dir():
        return folder.resolve()
    hub = _HUB_ENTRY.match(entry)
    if hub is None:
        raise unusable("the model is neither a directory of this worker nor 'org/name@revision'")
    from huggingface_hub import snapshot_download

    try:
        # With a commit hash as revision and a full cache, this asks nothing of the network.
        return Path(
            snapshot_download(hub["repo"], revision=hub["revision"], allow_patterns=list(_PATTERNS))
        )
    except (OSError, ValueError) as error:
        raise unusable("the model cannot be fetched from the hub") from error
