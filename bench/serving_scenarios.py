"""The scenarios of the serving bench: each compares what it starts itself, round by round."""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from serving_figures import Bench
from serving_peers import peers, peers_two_cores
from serving_rig import Models, Service, start_load, text_body

from core.head import Head
from core.identifiers import DEFAULT_TENANT
from core.manifests import ModelManifest, Precision
from core.trunk import Trunk

CONCURRENCY = (1, 8, 32)
FULL_SESSIONS_MB = 2_000
LOADED = 'graft_loads_total{outcome="loaded"}'
SWAP_EVERY_SECONDS = 0.25
"""Publishing and swapping take some 20 ms of the cores that serve."""


def text(bench: Bench) -> None:
    """17 tokens, fp32, one worker and one thread for its trunk: against the limit."""
    bench.models.publish(bench.models.trunk("minilm"), "one")
    for _ in range(bench.rounds):
        limit = bench.limit("one", bench.text_file())
        bench.note("in process: p50 ms", limit["p50_ms"])
        bench.note("in process: rate at batch 32", limit["rate"])
        with Service(bench.models) as service:
            found = {each: bench.load(service, each, [text_body("one")]) for each in CONCURRENCY}
        bench.note("p50 at 1 / in process (≤ 1.15)", found[1]["p50_ms"] / limit["p50_ms"])
        for number in CONCURRENCY:
            bench.note(f"rate at {number} / in process", found[number]["rate"] / limit["rate"])


def workers(bench: Bench) -> None:
    """Two service processes against one."""
    bench.models.publish(bench.models.trunk("minilm"), "one")
    for _ in range(bench.rounds):
        rates = {}
        for number in (1, 2):
            with Service(bench.models, workers=number) as service:
                # Ready is who is ready first, and would be given all of the kept connections.
                while _loads(service) < number:
                    time.sleep(0.1)
                rates[number] = bench.load(service, 32, [text_body("one")])["rate"]
        bench.note("rate at 32: two workers / one (≥ 1.7)", rates[2] / rates[1])


def overload(bench: Bench) -> None:
    """Half more than it can do, with a deadline of one second."""
    bench.models.publish(bench.models.trunk("minilm"), "one")
    deadline_ms = 1000
    for _ in range(bench.rounds):
        with Service(bench.models) as service:
            most = bench.load(service, 32, [text_body("one")])["rate"]
            found = bench.load(
                service, 400, [text_body("one")], rate=1.5 * most, timeout_ms=deadline_ms
            )
        bench.note("goodput at 1.5 x / most (≥ 0.9)", found["rate"] / most)
        bench.note("p99 of the answered / deadline (≤ 1)", found["p99_ms"] / deadline_ms)
        bench.note("requests that the generator could not send (0)", found["unsent"])
        bench.note(
            "refused share", 1 - found["statuses"].get("200", 0) / sum(found["statuses"].values())
        )


def image(bench: Bench) -> None:
    """A JPEG of 640 x 480, posted raw."""
    bench.models.publish(bench.models.trunk("efficientnet-lite0"), "picture")
    path = bench.models.folder / "photo.jpg"
    path.write_bytes(_photo())
    body = ["/v1/predict?model=picture", "image/jpeg", path.read_bytes().hex()]
    for _ in range(bench.rounds):
        limit = bench.limit("picture", path)
        with Service(bench.models) as service:
            one = bench.load(service, 1, [body])
            eight = bench.load(service, 8, [body])
        bench.note("p50 at 1 / in process (≤ 1.15)", one["p50_ms"] / limit["p50_ms"])
        bench.note("rate at 8 / in process", eight["rate"] / limit["rate"])


def many(bench: Bench) -> None:
    """As many models on one trunk: memory, loading, throughput over all, and the start."""
    for _ in range(bench.rounds):
        with tempfile.TemporaryDirectory(prefix="graft-many-") as folder:
            crowd = Models(Path(folder))
            trunk = crowd.trunk("minilm")
            one = crowd.publish(trunk, "one")
            names = [f"model-{number:05d}" for number in range(bench.many)]
            with Service(crowd, poll_seconds=0.2) as service:
                alone = bench.load(service, 32, [text_body("one")])["rate"]
                before = service.resident_bytes()
                for number, name in enumerate(names):
                    crowd.publish(trunk, name, number)
                while (live := _loaded(service)) <= bench.many:
                    time.sleep(0.1)
                grown = service.resident_bytes() - before
                bench.note("kB resident for each (≤ 300)", grown / live / 1000)
                found = bench.load(service, 32, [text_body(name) for name in names])
                bench.note("rate at 32 over all / one model (≥ 0.9)", found["rate"] / alone)
            with Service(crowd) as service:
                bench.note("start to ready, seconds (≤ 10)", service.start_seconds)
                bench.note("models in memory then", _loaded(service))
            bench.note("ms to load a head (≤ 1)", _load_head_ms(crowd, one))


def low_rank(bench: Bench) -> None:
    """Models with deltas of rank 8 on every layer, another each request, against one plain one."""
    for _ in range(bench.rounds):
        with tempfile.TemporaryDirectory(prefix="graft-low-rank-") as folder:
            crowd = Models(Path(folder))
            trunk = crowd.loaded("minilm")
            plain = crowd.publish(trunk.manifest, "one")
            names = [f"model-{number:05d}" for number in range(bench.adapted)]
            with Service(crowd, poll_seconds=0.2) as service:
                one = [text_body(plain.name)]
                bench.load(service, 32, one)
                before = service.resident_bytes()  # warm: what grows from here on is the models'
                for number, name in enumerate(names):
                    last = crowd.store(*crowd.make_low_rank(trunk, name, number))
                while (live := _loaded(service)) <= bench.adapted:
                    time.sleep(0.1)
                grown = service.resident_bytes() - before
                bench.note("MB resident for each (≤ 1.5)", grown / live / 1e6)
                mixed = [text_body(name) for name in names]
                asked = [one, mixed, mixed[:1], one + mixed[:1], one]
                before_it, found, same, half, after_it = (
                    bench.load(service, 32, bodies)["rate"] for bodies in asked
                )
                alone = (before_it + after_it) / 2
                bench.note("rate at 32, all mixed / one plain (≥ 0.8)", found / alone)
                bench.note("rate at 32, one with deltas / one plain", same / alone)
                bench.note("rate at 32, plain and with deltas in turns / one plain", half / alone)
            bench.note("ms to load one (≤ 5)", _load_head_ms(crowd, last, trunk))
            full = bench.script(
                "full_sessions.py", folder, trunk.manifest.digest, bench.adapted,
                FULL_SESSIONS_MB, bench.seconds,
            )  # fmt: skip
            bench.note(f"full sessions, as many as {FULL_SESSIONS_MB} MB hold", full["models"])
            bench.note("full sessions: MB each", full["mb_each"])
            bench.note("full sessions: ms to load one", full["load_ms"])
            bench.note("rate at 32, all mixed / full sessions without HTTP", found / full["rate"])


def int8(bench: Bench) -> None:
    """The int8 trunk against the fp32 one, each with one model."""
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    for precision in precisions:
        bench.models.publish(bench.models.trunk("minilm", precision), precision)
    for _ in range(bench.rounds):
        rates = {}
        for precision in precisions:
            with Service(bench.models) as service:
                rates[precision] = bench.load(service, 32, [text_body(precision)])["rate"]
        bench.note("rate at 32: int8 / fp32 (≥ 1.5)", rates["int8"] / rates["fp32"])


def swaps(bench: Bench) -> None:
    """Hot swaps under load: failures, p99 against none, and memory."""
    for turn in range(bench.rounds):
        trunk = bench.models.trunk("minilm")
        name = f"swapped-{turn}"
        bench.models.publish(trunk, name)
        made = [bench.models.make(trunk, name, number) for number in range(bench.swaps)]
        with Service(bench.models) as service:
            seconds = max(bench.seconds, bench.swaps * SWAP_EVERY_SECONDS + 2)
            half: dict[str, Any] = {
                "concurrency": 8, "seconds": seconds / 2, "warm_seconds": 1.0,
                "bodies": [text_body(name)],
            }  # fmt: skip
            before = service.load(**half)
            load = start_load(
                port=service.port, concurrency=8, seconds=seconds, bodies=[text_body(name)]
            )
            time.sleep(1)
            memory = []
            times = []
            for number, (draft, files) in enumerate(made):
                began = time.perf_counter()
                version = bench.models.store(draft, files)
                service.announce(name)
                while _answering(service, name) != version.reference:
                    time.sleep(0.05)
                times.append(time.perf_counter() - began)
                time.sleep(max(0.0, SWAP_EVERY_SECONDS - times[-1]))
                if number + 1 in (bench.swaps // 10, bench.swaps):
                    memory.append(service.resident_bytes())
            is_under_load = load.poll() is None
            busy = json.loads(load.communicate(timeout=600)[0])
            after = service.load(**half)
        calm_p99 = (before["p99_ms"] + after["p99_ms"]) / 2
        failed = sum(n for status, n in busy["statuses"].items() if status != "200")
        bench.note("failed requests (0)", failed)
        bench.note("p99 with swaps / without (≤ 1.25)", busy["p99_ms"] / calm_p99)
        bench.note("memory, last swap / a tenth of them (≤ 1.05)", memory[-1] / memory[0])
        bench.note("ms from publishing to answering, median", statistics.median(times) * 1000)
        bench.note("all swaps were under load (1)", is_under_load)


def _answering(service: Service, name: str) -> str:
    """Which version answers."""
    path, _, body = text_body(name)
    headers = {"Content-Type": "application/json"}
    return str(service.http.post(path, content=body, headers=headers).json()["model"])


def _loaded(service: Service) -> int:
    """How many versions the service has in memory."""
    return int(service.http.get("/readyz").json()["versions"])


def _loads(service: Service) -> float:
    """How many versions all its processes have loaded."""
    text = service.http.get("/metrics").text
    (line,) = (line for line in text.splitlines() if line.startswith(LOADED))
    return float(line.removeprefix(LOADED))


def _load_head_ms(models: Models, model: ModelManifest, trunk: Trunk | None = None) -> float:
    """Milliseconds to read, check and replay one version; its golden rows go through the trunk."""
    times = []
    for _ in range(100):
        began = time.perf_counter()
        manifest = models.registry.manifest(DEFAULT_TENANT, model.name, model.version)
        Head.load(models.registry, manifest, trunk)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def _photo() -> bytes:
    """Something with edges and gradients, so that its JPEG is as large as a photograph's."""
    random = np.random.default_rng(0)
    small = random.integers(0, 255, (60, 80, 3), np.uint8)
    picture = Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=90)
    return data.getvalue()


SCENARIOS: dict[str, Callable[[Bench], None]] = {
    "text": text,
    "peers": peers,
    "peers_two_cores": peers_two_cores,
    "workers": workers,
    "overload": overload,
    "image": image,
    "many": many,
    "low_rank": low_rank,
    "int8": int8,
    "swaps": swaps,
}
