"""The service as BentoML assembles it."""

from __future__ import annotations

import subprocess
import sys

LAYERS = """
from _bentoml_impl.server.app import ServiceAppFactory
from service.app import Graft
Graft.inject_config()
print(*(each.cls.__name__ for each in ServiceAppFactory(Graft, is_main=True).middlewares))
"""


def test_nothing_of_bentomls_answers_in_place_of_the_guard() -> None:
    done = subprocess.run([sys.executable, "-c", LAYERS], check=True, capture_output=True)
    assert done.stdout.decode().split() == [
        "OpenTelemetryMiddleware", "untimed", "Guard", "ContextMiddleware",
    ]  # fmt: skip
