"""What a job decides by itself: an event when it is made, and a line of the report, of one data.

`Decisions.tell` is where both come from, so the report says nothing that the job's history has not
told, in the same words and with the same data. Not here: the decisions; each has its module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import BaseModel

from core.jobs import FineTuneRequest, Json
from core.manifests import Interval
from training.imbalance import IMBALANCED

if TYPE_CHECKING:
    from training.backbone_choice import BackboneCandidate, BackboneChoice
    from training.calibration import Calibration
    from training.fit import Fit
    from training.plan import Plan
    from training.precision import Choice
    from training.preparation import Reporter
    from training.prospect import Prospect
    from training.search_state import Ending, Ladder, Step


class Decision(BaseModel, frozen=True):
    """Something the job decided by itself, and why; `data` are the numbers of its `event`."""

    what: str
    chosen: str
    why: str
    event: str
    data: Json


class Decisions:
    """The decisions of one attempt so far, in the order in which they were `made`."""

    def __init__(self, reporter: Reporter) -> None:
        self.made: list[Decision] = []
        self._reporter = reporter

    def tell(self, decision: Decision) -> None:
        """Add a line to the report and, by an event, to the job's history."""
        self.made.append(decision)
        message = f"{decision.what} {decision.chosen}: {decision.why}."
        self._reporter.event(decision.event, message, level="info", **decision.data)

    def note(self, decision: Decision) -> None:
        """Add a line for what has been told already, as it came to pass."""
        self.made.append(decision)


def backbone(choice: BackboneChoice) -> Decision:
    """Return which backbone `auto` came to, and what decided among them."""
    tried = "; ".join(_backbone(candidate) for candidate in choice.candidates)
    return Decision(
        what="Backbone",
        chosen=choice.model,
        why=f"{choice.reason} (log-likelihood below the best, in nats a row: {tried})",
        event="backbone_chosen",
        data=choice.model_dump(mode="json"),
    )


def _backbone(candidate: BackboneCandidate) -> str:
    if candidate.loss is None or candidate.loss_error is None:
        return f"{candidate.model} not tried, {candidate.problem}"
    right = "" if candidate.accuracy is None else f", accuracy {candidate.accuracy:.3f}"
    return f"{candidate.model} {candidate.loss:.4f} ± {candidate.loss_error:.4f}{right}"


def precision(choice: Choice) -> Decision:
    """Return which precision `auto` came to."""
    measured = ""
    if choice.fp32_accuracy is not None and choice.int8_accuracy is not None:
        measured = (
            f" (accuracy {choice.fp32_accuracy:.4f} in fp32, {choice.int8_accuracy:.4f} in int8, "
            f"on {choice.rows:,} rows)"
        )
    return Decision(
        what="Precision",
        chosen=choice.precision,
        why=choice.reason + measured,
        event="precision_chosen",
        data=choice.model_dump(mode="json"),
    )


def strategy(prospect: Prospect) -> Decision:
    """Return which strategy `auto` came to."""
    return Decision(
        what="Strategy",
        chosen=prospect.strategy,
        why=prospect.reason,
        event="strategy_chosen",
        data={"strategy": prospect.strategy, **prospect.model_dump(mode="json")},
    )


def strength(fitted: Fit) -> Decision:
    """Return how strongly the head on frozen features is regularised."""
    chosen = next(c for c in fitted.candidates if c.strength == fitted.strength)
    return Decision(
        what="L2 strength of the frozen head",
        chosen=f"{fitted.strength:.2g}",
        why=f"the strongest whose held-out loss ({chosen.nll:.4f}) is within one standard "
        f"error of the lowest of {len(fitted.candidates)}",
        event="strength_chosen",
        data={
            "folds": fitted.folds, "candidates": len(fitted.candidates),
            **chosen.model_dump(mode="json", exclude_none=True),
        },
    )  # fmt: skip


def remedy(fitted: Fit) -> Decision:
    """Return what is done about rare classes."""
    if fitted.is_ordered:
        why = "remedies are for classes without an order"
    elif fitted.remedies:
        tried = ", ".join(
            f"{each.remedy.replace('_', ' ')} {each.gain:+.4f} ± {each.gain_error:.4f}"
            for each in fitted.remedies[1:]
        )
        why = (
            "the best macro F1 on held-out rows by more than one standard error, or nothing "
            f"({tried})"
        )
    else:
        why = f"no class has {IMBALANCED:g} times the rows of another"
    return Decision(
        what="Class imbalance",
        chosen=fitted.remedy.replace("_", " "),
        why=why,
        event="remedy_chosen",
        data={
            "remedy": fitted.remedy,
            "candidates": [each.model_dump(mode="json") for each in fitted.remedies],
        },
    )


def training(plan: Plan, request: FineTuneRequest, rows: int) -> Decision:
    """Return how every step of a search is trained."""
    asked = request.chosen_hyperparameters.model_dump(mode="json")
    given = sorted(name for name, value in asked.items() if value != "auto")
    what = f"deltas of rank {plan.rank}" if plan.rank else "every parameter"
    return Decision(
        what="Training",
        chosen=f"{what}, batches of {plan.batch_size}, at most {plan.epochs} epochs, "
        f"rate {plan.learning_rate:.2g}",
        why=f"the defaults for {rows:,} rows" + (f" but for {', '.join(given)}" if given else ""),
        event="training_planned",
        data={
            "rank": plan.rank, "batch_size": plan.batch_size, "epochs": plan.epochs,
            "learning_rate": plan.learning_rate, "patience": plan.patience, "asked": [*given],
        },
    )  # fmt: skip


def ladder(tried: Ladder) -> Iterator[Decision]:
    """Return what became of a search: each step, and why there were no more."""
    yield from steps(tried.steps)
    if tried.ending is not None:
        yield ending(tried.ending)


def ending(found: Ending) -> Decision:
    """Return why no further step was tried."""
    return Decision(
        what="Unfreezing",
        chosen="ended",
        why=found.why,
        event="ladder_ended",
        data=found.model_dump(mode="json"),
    )


def steps(tried: Sequence[Step]) -> Iterator[Decision]:
    """Return what became of each step of a search; the first one is the frozen head."""
    for before, step in pairwise(tried):
        if step.learning_rate < before.learning_rate:
            yield Decision(
                what="Learning rate",
                chosen=f"{step.learning_rate:.2g}",
                why=f"training diverged at {before.learning_rate:.2g}",
                event="learning_rate_lowered",
                data={"blocks": step.blocks, "learning_rate": step.learning_rate},
            )
        head = f"refitted at L2 strength {step.strength:.2g}" if step.strength else "trained along"
        yield Decision(
            what=step.name,
            chosen="kept" if step.kept else "not kept",
            why=f"log-likelihood {step.gain:+.4f} ± {step.gain_error:.4f} a held-out row against "
            f"the best before; {step.score}, after {step.epochs} epochs, by a "
            f"classifier that was {head}",
            event="unfrozen",
            data=step.model_dump(mode="json"),
        )


def temperature(found: Calibration) -> Decision:
    """Return what the logits are divided by."""
    return Decision(
        what="Temperature",
        chosen=f"{found.temperature:.3f}",
        why="the likeliest on held-out rows; it divides the weights and the bias of head.onnx "
        f"(calibration error {found.before.ece:.4f} before, {found.after.ece:.4f} after)",
        event="temperature_chosen",
        data={**found.summary(), "nll": found.after.nll},
    )


def threshold(value: float) -> Decision:
    """Return from which probability on a label is given."""
    return Decision(
        what="Threshold",
        chosen=f"{value:g}",
        why="of calibrated probabilities: a label is given where it is likelier than not",
        event="threshold_chosen",
        data={"threshold": value},
    )


def interval(found: Interval) -> Decision:
    """Return how wide the interval about a value is."""
    return Decision(
        what="Interval",
        chosen=f"± {found.half_width:.4g}",
        why=f"the error that {100 * found.coverage:.0f} % of held-out rows do not exceed "
        "(conformal prediction)",
        event="interval_chosen",
        data=found.model_dump(mode="json"),
    )
