"""Every bench can be started: it finds what it imports, and its options parse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITHOUT_OPTIONS = {"in_process.py", "load_generator.py"}
"""Run by `serving.py`, with positions for arguments."""

RUN_ALL = """
import runpy, sys
for script in sys.argv[1:]:
    sys.path.insert(0, script.rpartition("/")[0])
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, script
    else:
        raise AssertionError(f"{script} did not stop at --help")
    print("helped", script)
    del sys.path[0]
"""
"""All in one interpreter: importing torch once takes seconds enough."""


def test_every_bench_says_how_it_is_used() -> None:
    scripts = [
        str(path)
        for path in sorted((ROOT / "bench").glob("*.py"))
        if "argparse" in path.read_text() and path.name not in WITHOUT_OPTIONS
    ]
    assert len(scripts) >= 5
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN_ALL, *scripts],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("helped ") == len(scripts)
    assert done.stdout.count("usage: ") == len(scripts)
