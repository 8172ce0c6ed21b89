"""SetFit (Tunstall et al. 2022) on a few-shot set: what it reaches, and its seconds.

    python setfit_text.py '{"folder": …, "model": …, "iterations": 20, "max_steps": -1, "seed": 0}'

The folder has `train.csv` and `test.csv`, each `text,label`; the model is a local one in Hugging
Face's layout. All settings are SetFit's own but the two that bound its pairs. Prints one line of
JSON. Seconds are those of the training alone, of a process that has imported and loaded everything.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from datasets import Dataset
from setfit import SetFitModel, Trainer, TrainingArguments


def read(path: Path) -> tuple[list[str], list[str]]:
    """Return the texts and labels of a file."""
    with path.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def main() -> None:
    """Train, predict the test file, and print."""
    plan = json.loads(sys.argv[1])
    folder = Path(plan["folder"])
    (texts, labels), (tests, truth) = (read(folder / f"{part}.csv") for part in ("train", "test"))
    model = SetFitModel.from_pretrained(plan["model"], labels=sorted(set(labels)))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "setfit"),
            num_iterations=plan["iterations"],
            max_steps=plan["max_steps"],
            seed=plan["seed"],
            report_to="none",
            show_progress_bar=False,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"text": texts, "label": labels}),
    )
    began, began_cpu = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    answers = list(model.predict(tests))
    answer = {
        "accuracy": sum(a == b for a, b in zip(answers, truth, strict=True)) / len(truth),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
