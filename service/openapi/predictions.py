"""What `POST /v1/predict` takes and gives, for `/openapi.json` alone (service.openapi.schemas)."""

from __future__ import annotations

from pydantic import BaseModel

from service.openapi.schemas import ErrorDetail


class Score(BaseModel):
    """A class and its calibrated probability."""

    label: str
    score: float


class Weight(BaseModel):
    """By how much the label's probability falls without a part.

    Of a text, characters `start` to `end`; of an image, a `box` (left, top, right, bottom) in
    fractions of the crop that the model sees.
    """

    weight: float
    text: str | None = None
    start: int | None = None
    end: int | None = None
    box: list[float] | None = None


class ValueInterval(BaseModel):
    """Where the value of a share `coverage` of such inputs is."""

    low: float
    high: float
    coverage: float


class PredictionRow(BaseModel):
    """What is said of an input; or, in its own place, what is wrong with it.

    A class has a `label` and its `score`; several labels are in `labels`; a regression has a
    `value` and its `interval`. `scores` are the likeliest, of `top_k` at most.
    """

    label: str | None = None
    score: float | None = None
    labels: list[str] | None = None
    scores: list[Score] | None = None
    value: float | None = None
    interval: ValueInterval | None = None
    novelty: float | None = None
    explanation: list[Weight] | None = None
    error: ErrorDetail | None = None


class TimingMs(BaseModel):
    """Milliseconds: tokenise or decode, wait for a batch, the trunk, the head, and in all."""

    prepare: float
    queue: float
    trunk: float
    head: float
    total: float


class PredictResponse(BaseModel):
    """The answer to `POST /v1/predict`; `model` is the version that answered."""

    model: str
    predictions: list[PredictionRow]
    timing_ms: TimingMs


class ImageItem(BaseModel):
    """A JPEG, PNG or WEBP as base64."""

    image: str


class PredictBody(BaseModel):
    """Texts or images to classify; `top_k` limits the scores of each."""

    model: str
    inputs: list[str | ImageItem]
    top_k: int = 3
    explain: bool = False
