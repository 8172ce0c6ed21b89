from __future__ import annotations

import io
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from cli import demo_data
from cli.demo import Outcome, Timing, accuracy, own_environment
from cli.demo_data import DemoTask, HeldOut, digits, support_intents
from cli.failures import CommandError
from core.datasets import Modality


def test_digits_are_real_split_by_class_and_never_in_both_parts(tmp_path: Path) -> None:
    task = digits(tmp_path / "digits.zip")
    with zipfile.ZipFile(task.training_file) as archive:
        names = archive.namelist()
        image = Image.open(io.BytesIO(archive.read(names[0])))
    assert (image.size, image.mode) == ((8, 8), "L")
    train = Counter(name.partition("/")[0] for name in names)
    held_out = Counter(row.label for row in task.held_out)
    assert sum(train.values()) + sum(held_out.values()) == 1797
    assert set(train) == set(held_out) == set("0123456789")
    assert all(0.25 < held_out[label] / train[label] < 0.6 for label in train)
    assert task.majority_accuracy == pytest.approx(0.1, abs=0.02)


def test_support_intents_come_from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    task = support_intents()
    assert (len(task.held_out), task.majority_accuracy) == (140, 0.1)
    monkeypatch.setattr(demo_data, "EXAMPLES", Path("/nowhere"))
    with pytest.raises(CommandError, match="source checkout"):
        support_intents()


def test_a_row_with_an_error_counts_as_wrong() -> None:
    rows = [HeldOut("x", "a", "x"), HeldOut("y", "a", "y"), HeldOut("z", "b", "z")]
    assert accuracy(rows, [{"label": "a"}, {"error": {}}, {"label": "a"}]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("reached", "convincing"), [(0.7, False), (0.8, True)])
def test_the_majority_label_must_be_beaten_by_far(reached: float, convincing: bool) -> None:
    rows = [HeldOut("x", "a", "x"), HeldOut("y", "b", "y")]
    task = DemoTask("t", Modality.TEXT, Path("t.csv"), rows)
    assert Outcome(task, "t@1", reached, [], Timing()).is_convincing is convincing


def test_the_demo_ignores_settings_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_REDIS_URL", "redis://production")
    monkeypatch.setenv("LANG", "C")
    assert "GRAFT_REDIS_URL" not in own_environment()
    assert own_environment()["LANG"] == "C"
