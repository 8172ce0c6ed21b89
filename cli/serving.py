"""`graft predict` and `graft models`: what is served."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cli.client import Client, Input, Prediction, read_input


def predict(
    client: Client,
    model: str,
    arguments: Sequence[str],
    *,
    top_k: int | None,
    as_json: bool,
    console: Console,
) -> int:
    """Print a prediction for each argument, in order; return how many inputs failed."""
    given: list[tuple[str, Input]] = []
    for argument in arguments:
        if argument == "-":
            lines = (line.rstrip("\r\n") for line in sys.stdin)
            given += [(line, line) for line in lines if line]
        else:
            given.append((argument, read_input(argument)))
    predictions = client.predict(model, [item for _, item in given], top_k)
    for (text, _), prediction in zip(given, predictions, strict=True):
        if as_json:
            print(json.dumps({"input": text, **prediction}, ensure_ascii=False))  # noqa: T201
        else:
            console.print(prediction_line(text, prediction, top_k), highlight=False, soft_wrap=True)
    return sum("error" in prediction for prediction in predictions)


def prediction_line(text: str, prediction: Prediction, top_k: int | None = None) -> str:
    """Return a prediction as a line of rich markup."""
    if "value" in prediction:
        answer = _value(prediction)
    elif "labels" in prediction and top_k is None:
        answer = _labels(prediction)
    elif "error" in prediction:
        answer = f"[red]{escape(prediction['error']['message'])}[/]"
    else:
        if top_k is not None and prediction.get("scores"):
            best = [(score["label"], score["score"]) for score in prediction["scores"]]
        else:
            best = [(prediction["label"], prediction["score"])]
        answer = ", ".join(f"[bold]{escape(label)}[/] {score:.3f}" for label, score in best)
    return f"{answer}  [dim]{escape(text)}[/]"


def _value(prediction: Prediction) -> str:
    interval = prediction.get("interval")
    answer = f"[bold]{prediction['value']:.4g}[/]"
    if interval is None:
        return answer
    low, high, coverage = interval["low"], interval["high"], interval["coverage"]
    return f"{answer} ({100 * coverage:.0f} % of such are from {low:.4g} to {high:.4g})"


def _labels(prediction: Prediction) -> str:
    scores = {score["label"]: score["score"] for score in prediction["scores"]}
    given = [
        f"[bold]{escape(label)}[/]" + (f" {scores[label]:.3f}" if label in scores else "")
        for label in sorted(prediction["labels"], key=lambda label: -scores.get(label, 0.0))
    ]
    return ", ".join(given) or "no label"


def show_models(client: Client, console: Console) -> None:
    """List fine-tuned models and backbones."""
    identifier = Column("model", no_wrap=True)
    table = Table(identifier, "owner", "labels", box=SIMPLE_HEAD)
    for model in client.openai.models.list():
        known = model.model_extra or {}
        labels = known.get("labels") or (["a value"] if known.get("task") == "regression" else [])
        shown = ", ".join(map(str, labels[:6])) + (" …" if len(labels) > 6 else "")
        table.add_row(escape(model.id), escape(model.owned_by), escape(shown))
    console.print(table)
