"""FastAPI with one session per model; `def`, so that requests run in its thread pool."""

from __future__ import annotations

from typing import Annotated

from fastapi import Body, FastAPI
from plain import PlainModel

app = FastAPI()
model = PlainModel()


@app.post("/predict")
def predict(texts: Annotated[list[str], Body(embed=True)]) -> list[int]:
    """Class numbers."""
    return model.predict(texts)
