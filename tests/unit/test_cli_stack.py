from __future__ import annotations

import os
from pathlib import Path

import pytest

from cli import stack as stack_module
from cli.failures import CommandError
from cli.stack import CODE_ROOT, Stack, StackOptions, free_port, require_free_port


def options(data: Path, **environment: str) -> StackOptions:
    inherited = {"PATH": os.environ["PATH"], **environment}
    return StackOptions(data, free_port(), inherited, service_workers=2)


@pytest.fixture
def broken_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Code whose worker says what it was started with, and ends."""
    root = tmp_path / "code"
    (root / "training").mkdir(parents=True)
    (root / "cli").symlink_to(CODE_ROOT / "cli")
    names = "GRAFT_STORE_URL GRAFT_REDIS_URL GRAFT_SERVICE_WORKERS PYTHONSAFEPATH TMPDIR"
    (root / "training" / "worker.py").write_text(
        f"import os\nfor name in {names!r}.split(): print(name, os.environ.get(name))\n"
        "raise SystemExit('cannot work')\n"
    )
    monkeypatch.setattr(stack_module, "CODE_ROOT", root)
    return root


def test_a_process_that_ends_at_once_stops_all_and_shows_its_log(
    broken_code: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    ended = r"(?s)worker ended .*worker\.log.*cannot work"
    with pytest.raises(CommandError, match=ended), Stack(options(data)):
        pass
    told = dict(
        line.split(" ", 1) for line in (data / "logs" / "worker.log").read_text().splitlines()[:5]
    )
    assert told["GRAFT_STORE_URL"] == str(data / "store")
    assert told["GRAFT_REDIS_URL"].startswith(f"unix://{told['TMPDIR']}/")
    assert told["GRAFT_SERVICE_WORKERS"] == "2"
    assert told["PYTHONSAFEPATH"] == "1"
    assert not Path(told["TMPDIR"]).exists()


def test_a_redis_and_a_store_of_ones_own_are_used(broken_code: Path, tmp_path: Path) -> None:
    given = {"GRAFT_REDIS_URL": "redis://example:6379/1", "GRAFT_STORE_URL": "s3://bucket"}
    with pytest.raises(CommandError, match="cannot work"), Stack(options(tmp_path / "d", **given)):
        pass
    told = (tmp_path / "d" / "logs" / "worker.log").read_text()
    assert all(value in told for value in given.values())
    assert not (tmp_path / "d" / "redis").exists()


def test_without_any_redis_the_stack_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.embedded_redis.find_server", lambda: None)
    with pytest.raises(CommandError, match="no Redis found"), Stack(options(tmp_path)):
        pass


def test_a_long_temporary_path_leaves_no_room_for_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 70)))
    scratch = stack_module._make_scratch()
    assert len(bytes(scratch / "redis.sock")) < 104
    scratch.rmdir()


def test_a_free_port_is_free() -> None:
    require_free_port(free_port())
