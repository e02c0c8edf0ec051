from __future__ import annotations

from pathlib import Path

import pytest

from deitkit import cli
from deitkit.compare import demo
from deitkit.terminal import SilentProgress, UserError


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of a few steps."""
    monkeypatch.setattr(demo, "TEACHER", {**demo.TEACHER, "epochs": 2})
    monkeypatch.setattr(demo, "STUDENT", {**demo.STUDENT, "epochs": 1})


def test_the_demo_makes_three_runs_a_table_and_a_digit_to_predict(
    short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    table = demo.run_demo(out, SilentProgress())
    assert set(table) == {"teacher", "plain", "cls", "dist", "fused"}
    assert all((out / name / "summary.json").is_file() for name in ("teacher", "plain", "distilled"))
    assert cli.main(["predict", str(out / "distilled"), str(out / "digit.png")]) == 0
    assert "digit.png" in capsys.readouterr().out
    demo.run_demo(out, SilentProgress())  # replaces what the first one left


def test_the_demo_replaces_nothing_that_it_did_not_make(short: None, tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.yaml").write_text("somebody's run")
    with pytest.raises(UserError, match="no demo made it"):
        demo.run_demo(tmp_path, SilentProgress())
    assert (tmp_path / "teacher" / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("fused", "plain", "teacher", "said"),
    [
        (0.95, 0.90, 0.94, "right on 5 more of 100 test images than without, and keeps up"),
        (0.90, 0.95, 0.97, "right on 5 fewer of 100 test images than without, and stays behind"),
        (0.90, 0.90, 0.97, "with the teacher the student is right as often as without, and stays behind"),
    ],
)
def test_the_verdict_says_what_happened(fused: float, plain: float, teacher: float, said: str) -> None:
    assert said in demo.verdict({"fused": fused, "plain": plain, "teacher": teacher}, 100)
