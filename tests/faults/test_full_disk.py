"""The artifact store's disk is full at each write of a job, or of an upload."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.faults.disk import Disk, mounted
from tests.faults.faults import FOLDER, SWITCH
from tests.faults.rig import InvariantBroken, Rig
from tests.integration.service_process import ServiceProcess
from tests.waiting import eventually

WRITES = (
    "put-owner.json", "put-head.onnx", "put-golden.safetensors", "put-publication-1.json",
    "put-manifest.json", "put-release",
)  # fmt: skip
UPLOAD = b"text,label\n" + b"where is my card,card\nit failed,money\n" * 60_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "store") as disk:
        yield disk


@pytest.fixture
def rig(disk: Disk, rig: Rig) -> Iterator[Rig]:
    """A rig whose store is on the disk, and whose jobs can fill it."""
    (rig.faults / "ballast").symlink_to(disk.ballast)
    yield rig
    disk.free()


def was_refused(rig: Rig, job_id: str) -> bool:
    return any(event.type == "retrying" for event in rig.events(job_id))


def test_a_job_goes_on_when_there_is_room_again(disk: Disk, rig: Rig) -> None:
    rig.max_attempts = 100
    rig.start()
    for number, write in enumerate(WRITES):
        job_id = rig.enqueue(f"model-{number}", f"fill@{write}")
        eventually(lambda job_id=job_id: was_refused(rig, job_id), 20, f"no room at {write}")
        assert rig.registry.versions("default", f"model-{number}") in ([], [1])
        disk.free()
        job = rig.ended(job_id)
        assert job.status == "succeeded", (write, job.error)
    rig.check()


def test_a_job_fails_for_want_of_room(disk: Disk, rig: Rig) -> None:
    worker = rig.start()
    job_id = rig.enqueue("model", "fill@put-head.onnx!")
    error = rig.ended(job_id).error
    assert error is not None
    assert error.code == "no_space"
    # Whether the last of them has published, only one attempt more can tell.
    assert rig.job(job_id).attempt in (rig.max_attempts, rig.max_attempts + 1)
    rig.check()
    assert rig.registry.catalogue("default") == {}
    disk.free()
    rig.enqueue("behind")
    rig.finish(20)
    assert worker.poll() is None
    rig.check()


def test_without_its_translation_a_full_disk_is_not_told(disk: Disk, rig: Rig) -> None:
    rig.start(without=("room",))
    error = rig.ended(rig.enqueue("model", "fill@put-head.onnx!")).error
    assert error is not None
    assert error.code != "no_space"


def test_without_collection_a_full_disk_leaves_half_a_version(disk: Disk, rig: Rig) -> None:
    rig.start()
    rig.ended(rig.enqueue("model", "fill@put-golden.safetensors!"))
    with pytest.raises(InvariantBroken, match="is not listed"):
        rig.check_nothing_temporary()


def test_an_upload_is_refused(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    service = ServiceProcess(tmp_path, workers=1)
    service.app = "tests.faults.service:Graft"
    try:
        service.start()
        files = f"{service.url}/v1/files"

        def post() -> httpx.Response:
            form = {"purpose": "fine-tune"}
            return httpx.post(files, data=form, files={"file": ("a.csv", UPLOAD)}, timeout=30)

        disk.fill()
        refused = post()
        assert refused.status_code == 507
        assert refused.json()["error"]["code"] == "no_space"
        assert str(tmp_path) not in refused.text
        (tmp_path / SWITCH).touch()
        assert post().status_code == 503, "the guard is no guard"
        (tmp_path / SWITCH).unlink()
        assert httpx.get(files).json()["data"] == []
        disk.free()
        assert [path.name for path in disk.folder.rglob("*") if path.is_file()] == []
        assert post().status_code == 200
        assert len(httpx.get(files).json()["data"]) == 1
    finally:
        service.stop()
