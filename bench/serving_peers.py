"""The scenarios of the serving bench that compare with peers (peer_servers)."""

from __future__ import annotations

import os
from collections.abc import Callable

from serving_figures import Bench
from serving_rig import Server, Service, text_body


def peers(bench: Bench) -> None:
    """The same model behind every peer: each server on one core, the generator on another."""
    serving, asking = sorted(os.sched_getaffinity(0))[:2]
    starts = _servers(bench, threads=1)
    for _ in range(bench.rounds):
        limit = bench.limit("one", bench.text_file(), core=serving)["rate"]
        rates = {
            name: _rates(bench, name, start().on_core(serving), core=asking)
            for name, start in starts.items()
        }
        for name, number, rate in _each(rates):
            bench.note(f"{name} at {number}: rate / in process", rate / limit)
        _note_lead(bench, rates)


def peers_two_cores(bench: Bench) -> None:
    """The same, all on every core, the generator too: the better of one and two threads of each."""
    choices = [_servers(bench, threads) for threads in (1, 2)]
    for _ in range(bench.rounds):
        rates: dict[str, dict[int, float]] = {}
        for name in choices[0]:
            found = [_rates(bench, name, starts[name]()) for starts in choices]
            rates[name] = {number: max(each[number] for each in found) for number in found[0]}
        _note_lead(bench, rates)


def _servers(bench: Bench, threads: int) -> dict[str, Callable[[], Server]]:
    """Return how Graft and each peer is started, with so many threads for the trunk."""
    manifest = bench.models.publish(bench.models.trunk("minilm"), "one")
    others = bench.peers.prepare(bench.models, manifest, threads)
    return {"graft": lambda: Service(bench.models, inference_threads=threads), **others}


def _rates(bench: Bench, name: str, server: Server, core: int | None = None) -> dict[int, float]:
    """Return requests a second at 8 and 32 callers, asked from a core."""
    body = text_body("one") if name == "graft" else bench.peers.body(name)
    rates = {}
    with server:
        for number in (8, 32):
            found = bench.load(server, number, [body], core=core)
            if found["statuses"].keys() != {"200"}:
                raise SystemExit(f"{name} at {number}: {found}")
            rates[number] = float(found["rate"])
    return rates


def _note_lead(bench: Bench, rates: dict[str, dict[int, float]]) -> None:
    for name, number, rate in _each(rates):
        if name != "graft":
            bench.note(f"{name} at {number}: graft / it", rates["graft"][number] / rate)


def _each(rates: dict[str, dict[int, float]]) -> list[tuple[str, int, float]]:
    return [(name, number, rate) for name, by in rates.items() for number, rate in by.items()]
