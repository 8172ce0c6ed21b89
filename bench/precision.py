"""int8 trunks beside fp32: time, memory, accuracy, and how far a row moves with its neighbours.

    python bench/precision.py --data ../shared/data [--rounds 30] [--draws 3]

In process, on one thread, the two trunks in turns; ratios are of CPU seconds of the calling thread,
which is the only one that works. Accuracy: Banking77, 10 rows of each class, the head fitted on the
trunk it is tested on. Spread: the same head and rows, each row among many random neighbours, and
what changes in its probabilities against the row alone; fp32 stands beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
from data_sets import Row, few_shot, read_banking

from core.manifests import Precision
from core.preprocessing import Prepared, PreparedText, TextPreprocessor
from core.registry import Registry
from core.store import ArtifactStore
from core.trunk import Trunk
from training import parity
from training.features import extract
from training.fit import Head, fit
from training.trunks import ensure_trunk

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
SHAPES = ((1, 16), (8, 16), (32, 16), (32, 64))
NEIGHBOURS = (1, 3, 7, 31)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--draws", type=int, default=3, help="few-shot draws")
    parser.add_argument("--rows", type=int, default=3080, help="test rows")
    parser.add_argument("--batches", type=int, default=200, help="random batches of the spread")
    chosen = parser.parse_args()
    train, test = (read_banking(chosen.data / "banking77" / f"{s}.csv") for s in ("train", "test"))
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(ArtifactStore(folder))
        trunks = {precision: load(registry, precision) for precision in PRECISIONS}
        print_times(trunks, chosen.rounds)
        heads = print_accuracy(trunks, train, test[: chosen.rows], chosen.draws)
        for precision in PRECISIONS:
            print_spread(trunks[precision], heads[precision], test, chosen.batches)


def load(registry: Registry, precision: Precision) -> Trunk:
    """Export a trunk, then load it anew and print what that took."""
    settings = {"hf_models": (), "threads": 1, "max_pixels": 1, "on_export": lambda: None}
    digest = ensure_trunk(registry, "minilm", precision=precision, **settings).manifest.digest
    resident = settled_bytes()
    began = time.thread_time()
    trunk = Trunk.load(registry, digest, threads=1, max_pixels=1)
    seconds = time.thread_time() - began
    print(
        f"{precision}: load {seconds:.2f} CPU s, {(settled_bytes() - resident) / 1e6:.0f} MB "
        f"resident, {trunk.manifest.max_difference:.1e} from torch"
    )
    return trunk


def settled_bytes() -> int:
    """Resident bytes once freed memory has been given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    resident: int = psutil.Process().memory_info().rss
    return resident


def print_times(trunks: dict[Precision, Trunk], rounds: int) -> None:
    numbers = np.random.default_rng(0)
    slots = trunks["fp32"].manifest.slots
    print("\nrows × tokens  deltas  fp32 ms  int8 ms  fp32/int8 (10 % – 90 % of rounds)")
    for rows, tokens in SHAPES:
        for rank in (0, 8):
            batch: list[Prepared] = [
                PreparedText(numbers.integers(1000, 20000, tokens).tolist()) for _ in range(rows)
            ]
            adapters = [
                parity.random_adapter(slots, rank, seed) for seed in range(rows if rank else 0)
            ]
            bank = trunks["fp32"].bank
            deltas = bank.gather([bank.add(adapter) for adapter in adapters])
            seconds: dict[Precision, list[float]] = defaultdict(list)
            for _ in range(rounds):
                for precision, trunk in trunks.items():
                    began = time.thread_time()
                    trunk.encode(batch, deltas)
                    seconds[precision].append(time.thread_time() - began)
            ratios = sorted(a / b for a, b in zip(*seconds.values(), strict=True))
            low, high = (ratios[int(q * (len(ratios) - 1))] for q in (0.1, 0.9))
            times = [1e3 * statistics.median(values) for values in seconds.values()]
            print(
                f"{rows:4} × {tokens:<6} {f'rank {rank}' if rank else 'none':>8} {times[0]:8.2f} "
                f"{times[1]:8.2f}  {statistics.median(ratios):.2f} ({low:.2f} – {high:.2f})"
            )


def print_accuracy(
    trunks: dict[Precision, Trunk], train: list[Row], test: list[Row], draws: int
) -> dict[Precision, Head]:
    """Print accuracies on the test rows, and return the heads of the last draw."""
    labels = sorted({label for _, label in train})
    truth = np.array([labels.index(label) for _, label in test])
    heads: dict[Precision, Head] = {}
    print(f"\nBanking77, 10 rows of each class, {len(test)} test rows")
    for precision, trunk in trunks.items():

        def features(rows: list[Row], trunk: Trunk = trunk) -> np.ndarray:
            texts = [text for text, _ in rows]
            return extract(trunk, texts, threads=1, on_progress=lambda *_: None)

        held_out = features(test)
        accuracies = []
        for seed in range(draws):
            rows = few_shot(train, 10, seed)
            targets = np.array([labels.index(label) for _, label in rows])
            heads[precision] = fit(features(rows), targets, len(labels), seed=seed).head
            predicted = heads[precision].predict(held_out).argmax(axis=1)
            accuracies.append(float((predicted == truth).mean()))
        print(f"{precision}: " + ", ".join(f"{accuracy:.4f}" for accuracy in accuracies))
    return heads


def print_spread(trunk: Trunk, head: Head, test: list[Row], batches: int) -> None:
    """Compare rows among random neighbours with the rows alone."""
    assert isinstance(trunk.preprocessor, TextPreprocessor)
    numbers = random.Random(0)
    prepared: list[Prepared] = list(trunk.preprocessor.prepare_many([text for text, _ in test]))
    alone: dict[int, np.ndarray] = {}
    largest, moved, changed = [], [], 0
    for number in range(batches):
        size = 1 + NEIGHBOURS[number % len(NEIGHBOURS)]
        rows = numbers.sample(range(len(prepared)), size)
        together = head.predict(trunk.encode([prepared[row] for row in rows]))
        for row, probabilities in zip(rows, together, strict=True):
            if row not in alone:
                alone[row] = head.predict(trunk.encode([prepared[row]]))[0]
            moved += list(np.abs(probabilities - alone[row]))
            largest.append(float(np.abs(probabilities - alone[row]).max()))
            changed += int(probabilities.argmax() != alone[row].argmax())
    print(
        f"\n{trunk.manifest.precision}: {len(largest)} rows in {batches} batches of 2 to 32: "
        f"|Δprobability| max {max(moved):.2g}, 99 % {np.quantile(moved, 0.99):.2g}; of each row's "
        f"largest: median {np.median(largest):.2g}, 99 % {np.quantile(largest, 0.99):.2g}; "
        f"label changed for {changed} rows"
    )


if __name__ == "__main__":
    main()
