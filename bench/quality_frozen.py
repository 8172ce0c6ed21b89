"""What the quality bench asks of frozen features: the MTEB protocol, wrong labels, and speed.

    mteb       8 rows per label, 10 draws: the protocol's own classifier, and the head of jobs
    flips      10 % of the labels flipped: how many are flagged in the job's report
    features   a job's features against the bare trunk, in turns
    second     a second job on the same data against the first, and one of another seed

Not here: strategies (bench/quality.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from data_sets import DataSet, Row, Split
from quality_jobs import Workshop
from quality_peers import protocol_regression, targets
from quality_results import Targets, middle, spread

from core.datasets import Modality
from core.preprocessing import PreparedText, TextPreprocessor
from core.trunk import Trunk
from training.features import TOKENS_PER_BATCH
from training.fit import IntArray, fit

MTEB_ROWS, MTEB_DRAWS, MTEB_SEED = 8, 10, 42
FLIPPED = 0.1


@dataclass(frozen=True)
class Bench:
    """What parts share."""

    workshop: Workshop
    data: Path
    targets: Targets
    rounds: int


def mteb(bench: Bench) -> None:
    """Banking77 by MTEB's protocol (Muennighoff et al. 2023): each draw from a shuffle of all."""
    split = DataSet("banking", None).draw(bench.data, 0)
    truth, test_truth = targets(split)
    features = bench.workshop.plain_features(split.modality, split.train)
    tests = bench.workshop.plain_features(split.modality, split.test)
    theirs, ours = [], []
    for rows in protocol_draws(truth):
        theirs.append(protocol_regression(features[rows], truth[rows], tests, test_truth))
        head = fit(features[rows], truth[rows], int(truth.max()) + 1, seed=0).head
        ours.append(float((head.predict(tests).argmax(axis=1) == test_truth).mean()))
    print(f"protocol: {spread(theirs)}; with the head of jobs: {spread(ours)}")
    bench.targets.check("MTEB protocol", statistics.mean(theirs), least=0.79, most=0.81)
    gains = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    bench.targets.check("MTEB draws, the head of jobs over it", statistics.mean(gains), least=0.0)


def protocol_draws(truth: IntArray) -> list[IntArray]:
    """Return the rows of each draw: the first 8 of each label in an order shuffled ever further."""
    numbers = np.random.RandomState(MTEB_SEED)
    order = np.arange(len(truth))
    draws = []
    for _ in range(MTEB_DRAWS):
        numbers.shuffle(order)
        draws.append(
            np.concatenate([order[truth[order] == label][:MTEB_ROWS] for label in np.unique(truth)])
        )
    return draws


def flips(bench: Bench) -> None:
    """Flip labels at random, run a job, and read the rows that its report doubts.

    With ten rows of each class the model itself errs as often, so nothing is promised there.
    """
    for name, promised in (("banking", True), ("banking@10", False), ("clothing@60", False)):
        split = DataSet.parse(name).draw(bench.data, 0)
        rows, flipped = flip(split.train, seed=0)
        trained = bench.workshop.start(split.modality, rows)("feature_extraction")
        flagged = {number - 1 for number in trained.report.label_errors.row_numbers}
        hits = len(flagged & flipped)
        recall, precision = hits / len(flipped), hits / max(len(flagged), 1)
        found = f"{name}: {len(flipped)} of {len(rows)} labels flipped, {len(flagged)} flagged"
        print(f"{found}: share of the flips {recall:.3f}, precision {precision:.3f}")
        if promised:
            bench.targets.check(f"{name}: share of the flips flagged", recall, least=0.6)
            bench.targets.check(f"{name}: precision of the flags", precision, least=0.5)


def flip(rows: Sequence[Row], seed: int) -> tuple[list[Row], set[int]]:
    """Give a tenth of the rows another label, any as likely; return all rows, and which."""
    numbers = np.random.default_rng(seed)
    labels = sorted({label for _, label in rows})
    flipped = set(np.flatnonzero(numbers.random(len(rows)) < FLIPPED).tolist())
    return [
        (item, str(numbers.choice([other for other in labels if other != label])))
        if number in flipped
        else (item, label)
        for number, (item, label) in enumerate(rows)
    ], flipped


def features(bench: Bench) -> None:
    """Texts to features as jobs do it, against the trunk alone on prepared batches of one length.

    Both run one batch on each thread. Tokenising, sorting, and keeping what was computed for the
    next job is what jobs do besides.
    """
    split = DataSet("banking", None).draw(bench.data, 0)
    texts = [text for text, _ in split.train]
    trunk = bench.workshop.trunk(Modality.TEXT)
    batches = bucketed(trunk, texts)
    shares, rates = [], []
    for number in range(bench.rounds):
        bare = seconds(lambda: run_bare(trunk, batches, bench.workshop.threads))
        tenant = f"features-{number}"
        whole = seconds(
            lambda tenant=tenant: bench.workshop.plain_features(Modality.TEXT, split.train, tenant)
        )
        shares.append(bare / whole)
        rates.append(len(texts) / whole)
    print(f"{len(texts)} texts: {middle(rates)} a second; speed / bare: {middle(shares, '.3f')}")
    bench.targets.check("features / bare trunk", statistics.median(shares), least=0.95)


def bucketed(trunk: Trunk, texts: list[str]) -> list[list[PreparedText]]:
    """Prepare and sort all texts; cut them where padding would make a batch too large."""
    assert isinstance(trunk.preprocessor, TextPreprocessor)
    prepared = sorted(trunk.preprocessor.prepare_many(texts), key=lambda row: row.cost)
    batches: list[list[PreparedText]] = [[]]
    for row in prepared:
        if batches[-1] and row.cost * (len(batches[-1]) + 1) > TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(row)
    return batches


def run_bare(trunk: Trunk, batches: list[list[PreparedText]], threads: int) -> None:
    """Put every batch through the trunk."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(trunk.encode, batches))


def second(bench: Bench) -> None:
    """The same job twice; and, for what is made anew of kept features, one of another seed."""
    for name in ("banking", "banking@10", "clothing@60"):
        split = DataSet.parse(name).draw(bench.data, 0)
        bench.workshop.trunk(split.modality)
        show_second(bench, name, split)
    split = DataSet.parse("support@10").draw(bench.data, 0)
    job = bench.workshop.start(split.modality, split.train)
    took = [job("auto").seconds for _ in range(2)]
    print(f"support@10, auto: {took[0]:.2f} s, and {took[1]:.2f} s again")
    bench.targets.check("support@10: second auto / first", took[1] / took[0], most=0.15)


def show_second(bench: Bench, name: str, split: Split) -> None:
    """Run pairs of jobs, each pair as a new tenant."""
    shares, others = [], []
    for number in range(bench.rounds):
        job = bench.workshop.start(split.modality, split.train)
        jobs = [job("feature_extraction", seed=seed) for seed in (number, number, number + 100)]
        shares.append(jobs[1].seconds / jobs[0].seconds)
        others.append(jobs[2].seconds / jobs[0].seconds)
    for trained in jobs:
        stages = ", ".join(f"{stage} {took:.2f}" for stage, took in trained.stages.items())
        print(f"    {trained.seconds:.2f} s, {trained.cpu_seconds:.2f} s of CPU: {stages}")
    print(f"{name}: second job / first: {middle(shares, '.3f')}")
    print(f"{name}: another seed / first: {middle(others, '.3f')}")
    bench.targets.check(f"{name}: second job / first", statistics.median(shares), most=0.15)


def seconds(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
