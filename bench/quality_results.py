"""The figures of a quality run: what is kept, the table, and which targets were met.

A target is checked when everything that it needs has been measured in the run, and not otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

FROZEN, GRADUAL, AUTO = "feature_extraction", "gradual", "auto"
MAX_ECE = {"banking": 0.03, "banking@10": 0.06}
MAX_SETFIT_SHARE = 0.2


@dataclass(frozen=True)
class Run:
    """One strategy on one draw. ECE is None for a peer, whose probabilities are not asked for."""

    accuracy: float
    seconds: float
    cpu_seconds: float
    ece: float | None = None


@dataclass
class Targets:
    """What was promised beside what was measured."""

    missed: list[str] = field(default_factory=list)

    def check(
        self, name: str, value: float, *, least: float = float("-inf"), most: float = float("inf")
    ) -> None:
        """Print a figure and whether it lies where it should."""
        bounds = [f"≥ {least:g}"] if least > float("-inf") else []
        bounds += [f"≤ {most:g}"] if most < float("inf") else []
        met = least <= value <= most
        print(f"target: {name}: {value:.4f} ({', '.join(bounds)}) {'met' if met else 'MISSED'}")
        if not met:
            self.missed.append(name)


class Results:
    """Runs by set, strategy and seed."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str], dict[int, Run]] = {}

    def add(self, name: str, strategy: str, seed: int, run: Run) -> None:
        """Keep a run."""
        self._runs.setdefault((name, strategy), {})[seed] = run

    def show(self) -> None:
        """Print the table, in Markdown."""
        print("\n| set | strategy | seeds | accuracy | over frozen | ECE | seconds | CPU seconds |")
        print("|---|---|---|---|---|---|---|---|")
        for (name, strategy), runs in self._runs.items():
            gains = self._differences(name, strategy, FROZEN)
            over = "" if strategy == FROZEN or not gains else spread(gains, "+.4f")
            eces = [run.ece for run in runs.values() if run.ece is not None]
            print(
                f"| {name} | {strategy} | {len(runs)} "
                f"| {spread([run.accuracy for run in runs.values()])} | {over} "
                f"| {spread(eces) if eces else ''} "
                f"| {middle([run.seconds for run in runs.values()])} "
                f"| {middle([run.cpu_seconds for run in runs.values()])} |"
            )

    def check(self, targets: Targets) -> None:
        """Check what the issue promises of the sets that were run."""
        banking, clothing = "banking@10", "clothing@60"
        self._check_mean(targets, banking, FROZEN, 0.845)
        self._check_gain(targets, banking, GRADUAL, FROZEN, 0.01)
        self._check_best(targets, banking)
        self._check_gain(targets, banking, AUTO, "setfit", -0.005)
        self._check_seconds(targets, banking)
        self._check_mean(targets, "banking", AUTO, 0.92)
        self._check_mean(targets, clothing, FROZEN, 0.81)
        for strategy in (GRADUAL, AUTO):
            self._check_gain(targets, clothing, strategy, FROZEN, 0.02)
        for (name, strategy), runs in self._runs.items():
            eces = [run.ece for run in runs.values() if run.ece is not None]
            if name in MAX_ECE and eces:
                mean = statistics.mean(eces)
                targets.check(f"{name} {strategy}: ECE", mean, most=MAX_ECE[name])

    def _mean(self, name: str, strategy: str) -> float | None:
        runs = self._runs.get((name, strategy))
        return statistics.mean(run.accuracy for run in runs.values()) if runs else None

    def _differences(self, name: str, strategy: str, other: str) -> list[float]:
        """Return the differences in accuracy on the draws that both were run on."""
        mine, theirs = self._runs.get((name, strategy), {}), self._runs.get((name, other), {})
        return [mine[seed].accuracy - theirs[seed].accuracy for seed in mine if seed in theirs]

    def _check_mean(self, targets: Targets, name: str, strategy: str, least: float) -> None:
        mean = self._mean(name, strategy)
        if mean is not None:
            targets.check(f"{name} {strategy}", mean, least=least)

    def _check_gain(
        self, targets: Targets, name: str, strategy: str, other: str, least: float
    ) -> None:
        gains = self._differences(name, strategy, other)
        if gains:
            label = f"{name} {strategy} over {other}, {len(gains)} draws"
            targets.check(label, statistics.mean(gains), least=least)

    def _check_best(self, targets: Targets, name: str) -> None:
        mine = self._mean(name, AUTO)
        singles = [self._mean(name, strategy) for strategy in (FROZEN, GRADUAL)]
        if mine is not None and None not in singles:
            best = max(single for single in singles if single is not None)
            targets.check(f"{name} auto against the best single one", mine - best, least=-0.005)

    def _check_seconds(self, targets: Targets, name: str) -> None:
        mine, theirs = self._runs.get((name, AUTO), {}), self._runs.get((name, "setfit"), {})
        shares = [mine[seed].seconds / theirs[seed].seconds for seed in mine if seed in theirs]
        if shares:
            label = f"{name} auto's seconds / setfit's"
            targets.check(label, statistics.median(shares), most=MAX_SETFIT_SHARE)


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Mean and standard deviation."""
    if len(values) < 2:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):.4f}"


def middle(values: Sequence[float], form: str = ".1f") -> str:
    """Median and range."""
    if len(values) < 2:
        return f"{values[0]:{form}}"
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}} – {high:{form}})"
