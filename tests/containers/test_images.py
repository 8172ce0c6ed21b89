"""What is in the two images, and what is not."""

from __future__ import annotations

import json

import pytest

from tests.containers.engine import DOCKER, Images, docker, run
from tests.containers.requirements import canonical, locked, names

pytestmark = pytest.mark.containers

TRAINING = ["onnx", "pyarrow", "torch", "transformers"]
FOUND = (
    "import json, sys; from importlib.util import find_spec;"
    "print(json.dumps([name for name in sys.argv[1:] if find_spec(name)]))"
)


def installed(image: str, *modules: str) -> list[str]:
    """Return which of these modules an image has."""
    found: list[str] = json.loads(
        docker("run", "--rm", "--network", "none", image, "python", "-c", FOUND, *modules)
    )
    return found


def test_service_image_has_nothing_to_train_with(images: Images) -> None:
    asked = [*TRAINING, "sklearn", "scipy", "peft", "pip", "bentoml", "service"]
    assert installed(images.service, *asked) == ["bentoml", "service"]


def test_worker_image_has_nothing_to_serve_with(images: Images) -> None:
    asked = [*TRAINING, "bentoml", "pip", "training"]
    assert installed(images.worker, *asked) == [*TRAINING, "training"]


def test_both_images_run_as_the_same_user_who_is_not_root(images: Images) -> None:
    for image in (images.service, images.worker):
        assert docker("run", "--rm", image, "id", "-u") == "10001"
        assert docker("run", "--rm", image, "stat", "-c", "%u %a", "/data") == "10001 750"


def test_nothing_reports_to_its_maker(images: Images) -> None:
    # ONNX Runtime leaves a device id and a database of what it is going to send.
    for image in (images.service, images.worker):
        written = docker(
            "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--network", "none", image,
            "sh", "-c", "python -c 'import core.trunk' && find /tmp -type f",
        )  # fmt: skip
        assert written == ""


def test_versions_are_those_of_the_lock(images: Images) -> None:
    command = (
        "from importlib.metadata import distributions;"
        "print(*(d.name + '==' + d.version for d in distributions()), sep='\\n')"
    )
    for image in (images.service, images.worker):
        listed = {
            canonical(row) for row in docker("run", "--rm", image, "python", "-c", command).split()
        }
        # redis asks for async-timeout on Python before 3.11.3, which the lock was not made on.
        unlocked = {row for row in listed - locked() if not row.startswith("async-timeout==")}
        assert names(unlocked) == {"graft"}


def test_service_refuses_to_start_without_a_key(images: Images) -> None:
    ended = run([*DOCKER, "run", "--rm", images.service])
    assert ended.returncode != 0
    assert "without GRAFT_API_KEY the service binds to loopback only" in ended.stderr
