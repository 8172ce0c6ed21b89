"""The serving engine against its limits, its peers and itself: ratios with their spread.

    python bench/serving.py [--only text overload …] [--rounds 5] [--seconds 5] [--smoke]
                            [--fastapi-python P] [--mlserver-python P]

Every figure is of a fresh `bentoml serve`, measured from another process; in each round everything
that is compared runs once, one after the other, so that a drift of the machine meets all alike.
Ratios are taken within a round; shown are their median and range. Figures of a machine that does
something else beside are worth nothing. `bench/peers` has what the peers run. FastAPI and LitServe
want an environment with `fastapi uvicorn uvloop httptools litserve onnxruntime tokenizers`,
MLServer one with `mlserver onnxruntime tokenizers`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from peer_servers import Peers
from serving_figures import Bench
from serving_rig import Models
from serving_scenarios import SCENARIOS


def main() -> None:
    """Run the chosen scenarios and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--smoke", action="store_true", help="small and short: does it run?")
    parser.add_argument("--peers", nargs="*", help="names of peers; all that can run by default")
    parser.add_argument("--fastapi-python", help="python with FastAPI and LitServe")
    parser.add_argument("--mlserver-python", help="python with MLServer")
    options = parser.parse_args()
    peers = Peers(options.peers, options.fastapi_python, options.mlserver_python)
    with tempfile.TemporaryDirectory(prefix="graft-serving-") as folder:
        bench = Bench(
            Models(Path(folder)),
            rounds=1 if options.smoke else options.rounds,
            seconds=1 if options.smoke else options.seconds,
            many=50 if options.smoke else 1000,
            adapted=8 if options.smoke else 200,
            swaps=10 if options.smoke else 200,
            peers=peers,
        )
        for name in options.only:
            print(f"{name}: {(SCENARIOS[name].__doc__ or '').strip()}", flush=True)
            SCENARIOS[name](bench)
            bench.show()


if __name__ == "__main__":
    main()
