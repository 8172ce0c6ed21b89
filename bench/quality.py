"""How good are the models that jobs make: accuracy, calibration, wrong labels, and what it takes.

    python bench/quality.py --data ../shared/data [--only mteb strategies …]
                            [--sets banking@10 clothing@60 …] [--strategies gradual auto …]
                            [--seeds 0 1 2 3 4] [--setfit-python P]

Every figure is of whole jobs, without HTTP or a queue, and of the models that they publish. Of each
set, strategy and seed it prints a line, in the end a table (mean ± standard deviation over seeds;
seconds as median and range) and the targets of what was run; it exits with 1 if one is missed. The
peers see the same weights and rows in the same run: `sklearn` is its logistic regression on frozen
features, C by cross-validation; `setfit` wants an environment with `torch setfit`, and is bounded
by `--setfit-steps` or `--setfit-iterations`, for its own settings make 36,000 steps of 770 rows.
Absolute times drift on shared machines; compare within one run. Not here: what a client waits for
(bench/main_job.py), and what the job system promises (bench/jobs.py).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import quality_frozen
import torch
from data_sets import DataSet, Split
from quality_frozen import Bench
from quality_jobs import Workshop
from quality_peers import SetFit, searched_regression
from quality_results import AUTO, FROZEN, GRADUAL, Results, Run, Targets

from core.datasets import Modality

USUAL = (FROZEN, GRADUAL, AUTO)
JOBS = (*USUAL, "full")
STRATEGIES = (*JOBS, "sklearn", "setfit")
MOST_ROWS_OF_PEERS = 2_000
PARTS: dict[str, Callable[[Bench], None]] = {
    "mteb": quality_frozen.mteb,
    "flips": quality_frozen.flips,
    "features": quality_frozen.features,
    "second": quality_frozen.second,
}


def strategies(bench: Bench, options: argparse.Namespace) -> None:
    """Run every strategy on every draw, one draw after another, so that drift meets all alike."""
    results = Results()
    setfit = SetFit(options.setfit_python, options.setfit_iterations, options.setfit_steps)
    for data_set in options.sets:
        # Every draw of a whole set is the same.
        seeds = options.seeds if data_set.per_class is not None else options.seeds[:1]
        for seed in seeds:
            split = data_set.draw(options.data, seed, options.test_rows)
            bench.workshop.trunk(split.modality)
            for strategy in options.strategies:
                if strategy == "setfit" and seed not in seeds[: options.setfit_seeds]:
                    continue
                if strategy not in JOBS and (why := peer_is_out(strategy, split)):
                    print(f"{data_set} {strategy}: left out, for {why}")
                    continue
                run = measure(bench.workshop, split, strategy, seed, setfit, options.max_seconds)
                results.add(str(data_set), strategy, seed, run)
                ece = "" if run.ece is None else f", ECE {run.ece:.4f}"
                print(
                    f"{data_set} {strategy} seed {seed}: {run.accuracy:.4f}{ece}, "
                    f"{run.seconds:.1f} s, {run.cpu_seconds:.1f} s of CPU",
                    flush=True,
                )
    results.show()
    results.check(bench.targets)


def peer_is_out(strategy: str, split: Split) -> str | None:
    """Return why a peer is not run on a split; None if it is."""
    if len(split.train) > MOST_ROWS_OF_PEERS:
        return f"it takes hours on more than {MOST_ROWS_OF_PEERS:,} rows"
    if strategy == "setfit" and split.modality is not Modality.TEXT:
        return "it reads texts only"
    return None


def measure(
    workshop: Workshop, split: Split, strategy: str, seed: int, setfit: SetFit, max_seconds: int
) -> Run:
    """Run one strategy, a job's or a peer's, on one draw."""
    if strategy in JOBS:
        job = workshop.start(split.modality, split.train)
        trained = job(strategy, seed=seed, max_seconds=max_seconds)
        judged = workshop.judge(trained.manifest, split)
        return Run(judged.accuracy, trained.seconds, trained.cpu_seconds, judged.ece)
    found = (
        setfit.run(split, seed) if strategy == "setfit" else searched_regression(workshop, split)
    )
    return Run(found.accuracy, found.seconds, found.cpu_seconds)


def read_options() -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="folder with the bench data sets")
    parts = [*PARTS, "strategies"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    sets = [DataSet.parse(name) for name in ("banking@10", "clothing@60", "banking")]
    parser.add_argument("--sets", nargs="+", type=DataSet.parse, metavar="SET", default=sets,
                        help="source or source@rows per class")  # fmt: skip
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=[*USUAL, "sklearn"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--test-rows", type=int, help="judge on so many test rows only")
    parser.add_argument("--max-seconds", type=int, default=3600, help="of a job")
    parser.add_argument("--rounds", type=int, default=5, help="of what is measured in turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--setfit-python", help="python of an environment with setfit")
    parser.add_argument("--setfit-steps", type=int, default=500, help="-1: as iterations make")
    parser.add_argument("--setfit-iterations", type=int, help="pairs of each row, by two")
    parser.add_argument(
        "--setfit-seeds", type=int, default=1, help="the first so many of the seeds"
    )
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    if options.setfit_python and "setfit" not in options.strategies:
        options.strategies.append("setfit")
    if "setfit" in options.strategies and not options.setfit_python:
        parser.error("setfit needs --setfit-python")
    return options


def main() -> None:
    """Run the chosen parts; exit with 1 if a target is missed."""
    options = read_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="graft-quality-") as folder:
        workshop = Workshop(Path(folder), options.data, verbose=options.verbose)
        bench = Bench(workshop, options.data, Targets(), options.rounds)
        for name in options.only:
            print(f"\n{name}", flush=True)
            if name == "strategies":
                strategies(bench, options)
            else:
                PARTS[name](bench)
    sys.exit(1 if bench.targets.missed else 0)


if __name__ == "__main__":
    main()
