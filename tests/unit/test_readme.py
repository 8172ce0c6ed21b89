"""The README's table of settings says what `core.settings` says.

One row for each setting, in the order of the class: `| `GRAFT_NAME` | `default` | description |`. A
default is written as a string bare, as anything else in JSON; where there is none, the cell is –.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

from pydantic import SecretStr

from core import __version__
from core.settings import Settings

README = Path(__file__).parents[2] / "README.md"
ROW = re.compile(r"^\| `(GRAFT_[A-Z0-9_]+)` \| (.*?) \| (.+?) \|$", re.MULTILINE)


def written(default: object) -> str:
    """How a default looks in its cell."""
    if default is None:
        return "–"
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def test_the_version_is_said_once_to_packagers_and_once_to_programs():
    project = tomllib.loads((README.parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == __version__


def test_the_table_of_settings_is_that_of_the_code():
    rows = ROW.findall(README.read_text("utf-8"))
    assert rows == [
        (f"GRAFT_{name.upper()}", written(field.default), field.description)
        for name, field in Settings.model_fields.items()
    ]
