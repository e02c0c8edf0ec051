"""`deit demo`: three runs, an honest sentence, a picture, and nothing of anybody else's replaced."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deitkit import cli
from deitkit.comparison import demo
from deitkit.comparison.demo import Answers, draw, run_demo, verdict
from deitkit.config import RunConfig
from deitkit.terminal import PlainProgress, SilentProgress, UserError
from deitkit.training.run import RunFolder, differences


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A demo of a few steps, in an empty folder."""
    monkeypatch.setattr(demo, "SHARED", {**demo.SHARED, "train_images": 128})
    monkeypatch.setattr(demo, "TEACHER", {**demo.TEACHER, "epochs": 8})
    monkeypatch.setattr(demo, "STUDENT", {**demo.STUDENT, "epochs": 2})
    monkeypatch.chdir(tmp_path)


def test_the_demo_makes_three_runs_a_table_and_a_picture(short: None, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path("runs/demo")
    (out / "plain").mkdir(parents=True)
    (out / demo.MARKER).touch()
    (out / "plain" / "config.yaml").write_text("of the demo before")
    accuracies = run_demo(out, PlainProgress())
    shown, messages = capsys.readouterr()
    assert list(accuracies) == list(demo.TITLES)
    for key, name in demo.TITLES.items():
        (line,) = [line for line in shown.splitlines() if line.startswith(f"{name}  ")]
        assert line.split("  ")[-1].strip().startswith(f"{100 * accuracies[key]:.1f} ± ")
    last = messages[messages.index("The teacher ") :]
    assert not [line for line in (shown + last).splitlines() if len(line) > 80]
    for path in (demo.PICTURE, demo.DIGIT):
        assert str(out / path) in last
        with Image.open(out / path) as picture:
            picture.verify()
    assert all((out / name / "report.html").is_file() for name in demo.RUNS)
    plain, distilled = (RunFolder(out / name).config(RunConfig) for name in ("plain", "distilled"))
    other = {name.split(".")[0] for name, *_ in differences(plain, distilled)}
    assert other == {"teacher", "loss"}
    assert plain.student.stem == "patch"
    (command,) = [line.split()[-3:] for line in last.splitlines() if f" predict {out}" in line]
    assert cli.main(command) == 0
    assert demo.DIGIT in capsys.readouterr().out


def test_the_demo_replaces_nothing_that_it_did_not_make(short: None, tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.yaml").write_text("somebody's run")
    with pytest.raises(UserError, match="was not made by deit demo"):
        run_demo(tmp_path, SilentProgress())
    assert (tmp_path / "teacher" / "config.yaml").is_file()


def answers(both: int = 0, distilled: int = 0, plain: int = 0, neither: int = 0) -> Answers:
    """So many digits that both students, only one or none classify correctly."""
    counts = [both, distilled, plain, neither]
    plain_right_N, distilled_right_N = np.repeat([1, 0, 1, 0], counts), np.repeat([1, 1, 0, 0], counts)
    labels_N = np.arange(sum(counts)) % 9
    digits_NHW = np.zeros((sum(counts), 8, 8), np.uint8)
    return Answers(digits_NHW, labels_N, labels_N + 1 - plain_right_N, labels_N + 1 - distilled_right_N)


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        # standard error of the difference: sqrt(won + lost - (won - lost)^2 / n) / n
        ({"both": 85, "distilled": 10, "plain": 1, "neither": 4}, "The teacher helps: +9.0 ± 3.2 points: "),
        ({"both": 85, "distilled": 1, "plain": 10, "neither": 4}, "The teacher harms: -9.0 ± 3.2 points: "),
        (
            {"both": 85, "distilled": 6, "plain": 2, "neither": 7},
            "makes no significant difference: +4.0 ± 2.8 points: ",
        ),
        ({"both": 100}, "makes no significant difference: +0.0 ± 0.0 points: "),
    ],
)
def test_the_verdict_says_what_happened(counts: dict[str, int], sentence: str) -> None:
    said = verdict(answers(**counts))
    assert sentence in said
    assert f"is right on {counts.get('distilled', 0)} of 100 digits where the plain one is wrong" in said
    assert f"wrong on {counts.get('plain', 0)} where" in said


@pytest.mark.parametrize("counts", [{"both": 9}, {"both": 1, "distilled": 9, "plain": 2, "neither": 5}])
def test_the_picture_is_drawn_whatever_was_right(counts: dict[str, int], tmp_path: Path) -> None:
    curves = {"plain": [(1, 0.5)], "distilled": [(1, 0.25), (2, 1.0)]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as a layout that has no room gives
        draw(tmp_path / "demo.png", curves, teacher=1.0, largest_class=0.1, answers=answers(**counts))
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.size == (1800, 980)
