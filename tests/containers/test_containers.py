"""The stack that `docker compose up` starts: confined, and nothing lost when parts of it die."""

from __future__ import annotations

import csv
import io
import itertools
import random
import time
from collections import defaultdict

import pytest

from tests.containers.engine import COMPOSE, Stack, environment, run
from tests.waiting import eventually

pytestmark = pytest.mark.containers

SERVICES = ("service", "worker", "redis")
QUESTION = "My parcel has not arrived yet, where is it?"
KILL_SUPERVISOR = """
import os, pathlib
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    if path.read_bytes().rstrip(b"\\0").endswith(b"/graft-worker"):
        os.kill(int(path.parent.name), 9)
"""


def pairs(data: bytes, rows: int, seed: int = 0) -> bytes:
    """Return a larger CSV: two messages of one label make a new one."""
    by_label = defaultdict(list)
    for row in csv.DictReader(io.StringIO(data.decode())):
        by_label[row["label"]].append(row["text"])
    chosen = random.Random(seed)
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(["text", "label"])
    for label, texts in sorted(by_label.items()):
        both = list(itertools.combinations(texts, 2))
        for one, other in chosen.sample(both, rows // len(by_label)):
            lines.writerow([f"{one} {other}", label])
    return text.getvalue().encode()


@pytest.fixture(scope="module")
def trained(stack: Stack, intents: bytes) -> str:
    """The id of a job that has made `intents@1`."""
    job = stack.succeeded(stack.train(stack.upload("train.csv", intents).id, "intents").id)
    assert job.fine_tuned_model == "intents@1"
    return job.id


def test_compose_refuses_to_start_without_a_key() -> None:
    ended = run([*COMPOSE, "--env-file", "/dev/null", "config"], env=environment())
    assert ended.returncode != 0
    assert "set GRAFT_API_KEY" in ended.stderr


def test_only_the_probes_are_open(stack: Stack) -> None:
    assert stack.get("/livez", key="").status_code == 200
    assert stack.get("/readyz", key="").json()["redis"] == "connected"
    for path in ("/v1/models", "/metrics", "/"):
        assert stack.get(path, key="").status_code == 401
        assert stack.get(path, key="wrong").status_code == 401
    assert stack.get("/v1/models").status_code == 200


@pytest.mark.parametrize("service", SERVICES)
def test_containers_are_confined(stack: Stack, service: str) -> None:
    found = stack.inspect(service)
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert 0 < host["Memory"] <= 8 << 30
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert stack.execute(service, "id", "-u").stdout.strip() not in ("", "0")
    assert stack.execute(service, "touch", "/x").returncode != 0
    published = [port for port in found["NetworkSettings"]["Ports"].values() if port]
    if service == "service":
        assert [[binding["HostIp"] for binding in port] for port in published] == [["127.0.0.1"]]
    else:
        assert published == []


def test_worker_does_not_know_the_key(stack: Stack) -> None:
    assert stack.key not in str(stack.inspect("worker")["Config"]["Env"])


def test_file_becomes_a_served_model(stack: Stack, trained: str) -> None:
    assert stack.job(trained).status == "succeeded"
    (prediction,) = stack.predict("intents", [QUESTION])
    assert prediction["label"] == "order_status"


def test_worker_killed_in_the_middle_of_a_job(stack: Stack, intents: bytes) -> None:
    file = stack.upload("many.csv", pairs(intents, rows=1200))
    created = stack.train(file.id, "survivor")
    eventually(lambda: stack.job(created.id).status == "running", 60, f"{created.id} runs")
    restarts = stack.inspect("worker")["RestartCount"]

    killed = stack.execute("worker", "python", "-c", KILL_SUPERVISOR)
    # The container dies with its worker, and this command with the container.
    assert killed.returncode in (0, 137), killed.stderr
    eventually(
        lambda: stack.inspect("worker")["RestartCount"] == restarts + 1, 30, "it is restarted"
    )

    job = stack.succeeded(created.id)
    assert job.fine_tuned_model == "survivor@1"
    assert (job.model_extra or {})["attempt"] == 2
    assert stack.get("/v1/models/survivor").json()["versions"] == [1]
    events = stack.openai.fine_tuning.jobs.list_events(created.id, limit=100).data
    kinds = [(event.model_extra or {})["event"] for event in events]
    assert kinds.count("published") == kinds.count("succeeded") == 1
    stack.healthy("worker")


@pytest.mark.parametrize("service", ["service", "worker"])
def test_stop_is_graceful(stack: Stack, service: str) -> None:
    began = time.monotonic()
    stack.compose("stop", service)
    seconds = time.monotonic() - began
    state = stack.inspect(service)["State"]
    stack.up()
    assert state["ExitCode"] in (0, 143)
    assert seconds < 15


def test_restart_loses_nothing(stack: Stack, trained: str) -> None:
    before = stack.predict("intents", [QUESTION])
    stack.compose("restart", seconds=120)
    for service in SERVICES:
        stack.healthy(service)
    assert stack.predict("intents", [QUESTION]) == before
    assert stack.job(trained).status == "succeeded"


def test_new_containers_find_the_old_data(stack: Stack, trained: str, intents: bytes) -> None:
    before = stack.predict("intents", [QUESTION])
    stack.down()
    stack.up()
    assert stack.predict("intents", [QUESTION]) == before
    assert stack.job(trained).status == "succeeded"
    fewer = b"".join(intents.splitlines(keepends=True)[:121])
    again = stack.succeeded(stack.train(stack.upload("fewer.csv", fewer).id, "intents").id)
    assert again.fine_tuned_model == "intents@2"
