"""`bentoml build`: the Bento holds the service and its locked requirements, and serves."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cli.stack import free_port
from tests.containers.engine import ROOT, environment, output
from tests.containers.requirements import canonical, locked, names
from tests.waiting import eventually

pytestmark = pytest.mark.containers


@dataclass(frozen=True)
class Bento:
    """A built Bento, and the BENTOML_HOME that it lies in."""

    tag: str
    home: Path

    @property
    def env(self) -> dict[str, str]:
        """The environment in which BentoML finds it."""
        return environment() | {"BENTOML_HOME": str(self.home), "BENTOML_DO_NOT_TRACK": "True"}

    @property
    def folder(self) -> Path:
        """Its files."""
        return self.home / "bentos" / self.tag.replace(":", "/")

    def requirements(self, kind: str) -> set[str]:
        """Return the packages of `in`, as we name them, or of `txt`, as they are locked."""
        lines = (self.folder / "env" / "python" / f"requirements.{kind}").read_text().splitlines()
        return {canonical(line) for line in lines if line and not line.startswith("-")}


@pytest.fixture(scope="module")
def bento(tmp_path_factory: pytest.TempPathFactory) -> Bento:
    """A Bento built from this checkout."""
    home = tmp_path_factory.mktemp("bentoml")
    env = Bento("", home).env
    command = [sys.executable, "-m", "bentoml", "build", "--output", "tag"]
    printed = output(command, seconds=180, env=env)
    return Bento(re.sub(r"^.*__tag__:", "", printed, flags=re.DOTALL).strip(), home)


@pytest.fixture
def url(bento: Bento, tmp_path: Path) -> Iterator[str]:
    """Where the Bento is served, without a Redis."""
    port = free_port()
    settings = {
        "GRAFT_STORE_URL": str(tmp_path / "store"),
        "GRAFT_REDIS_URL": "redis://127.0.0.1:1",
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "bentoml", "serve", bento.tag,
             "--host", "127.0.0.1", "--port", str(port)],
            cwd=tmp_path,
            env=bento.env | settings,
            stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        assert process.wait(30) in (0, -15), (tmp_path / "log").read_text()


def test_holds_the_service_and_nothing_of_the_worker(bento: Bento) -> None:
    packed = {path.relative_to(bento.folder / "src") for path in bento.folder.glob("src/**/*.*")}
    ours = {
        path.relative_to(ROOT)
        for folder in ("core", "service")
        for ending in ("*.py", "*.lua")
        for path in (ROOT / folder).rglob(ending)
    }
    assert packed == ours | {Path("bentofile.yaml"), Path("constraints.txt")}


def test_requires_what_serving_and_its_traces_require(bento: Bento) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["service"] + extras["tracing"]
    assert names(bento.requirements("in")) == names(wanted)


def test_versions_are_those_of_the_lock(bento: Bento) -> None:
    pinned = bento.requirements("txt")
    assert names(bento.requirements("in")) < names(pinned)
    assert pinned <= locked()
    assert not names(pinned) & {"torch", "transformers", "onnx", "pyarrow"}


def test_serves(url: str) -> None:
    def ready() -> httpx.Response | None:
        with suppress(httpx.TransportError):
            answer = httpx.get(f"{url}/readyz")
            return answer if answer.is_success else None
        return None

    assert eventually(ready, 60, "the Bento is ready").json()["models"] == 0
    assert httpx.get(f"{url}/livez").status_code == 200
    models = httpx.get(f"{url}/v1/models").json()["data"]
    assert "minilm" in {model["id"] for model in models}
