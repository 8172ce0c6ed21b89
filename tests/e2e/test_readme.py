"""The commands of the README, taken from it and run against a real stack."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.live_stack import LiveStack

README = Path("README.md").read_text(encoding="utf-8")
GRAFT_LINES = re.findall(r"^graft .+$", README, re.MULTILINE)
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(stack: LiveStack, *command: str) -> str:
    done = subprocess.run(
        command,
        env=os.environ | {"GRAFT_URL": stack.url, "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_is_something_to_run() -> None:
    assert len(GRAFT_LINES) >= 3
    assert len(SNIPPETS) == 1


def test_command_line(stack: LiveStack, tmp_path: Path) -> None:
    # In order, as a reader would: the first of them trains what the others ask about.
    for line in GRAFT_LINES:
        here = line.replace(" ./", f" {tmp_path}/")
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', here)]
        assert run(stack, sys.executable, "-m", "cli.main", *words[1:]).strip(), line


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_client(stack: LiveStack, snippet: str) -> None:
    code = snippet.replace("http://127.0.0.1:3000", stack.url)
    assert "job" in run(stack, sys.executable, "-c", code)
