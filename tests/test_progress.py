from __future__ import annotations

import io
import re
import sys

import pytest

from deitkit.terminal import (
    Meter,
    PlainProgress,
    Progress,
    SilentProgress,
    TerminalProgress,
    duration,
    epoch_line,
    make_progress,
    plain_table,
    plural,
)

ROW = {
    "epoch": 2,
    "epochs": 30,
    "loss": {"total": 1.5, "label": 1.25, "teacher": 1.75, "gradient_ratio": 0.5},
    "top1": {"cls": 0.5, "dist": 0.5125, "fused": 0.52, "fused_logits": None},
    "lr": 0.00025,
}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_epoch_line_names_loss_terms_heads_and_learning_rate() -> None:
    line = epoch_line(ROW)
    assert "\n" not in line
    assert line == ("epoch 3/30  loss 1.500 (labels 1.25, teacher 1.75)  top-1 52.00 %  lr 2.5e-04")


def test_epoch_line_leaves_out_what_does_not_apply() -> None:
    assert epoch_line({"epoch": 0, "loss": {"total": 2.0, "label": 2.0, "teacher": 0.0}, "top1": {"cls": 0.1}}) == (
        "epoch 1  loss 2.000  top-1 10.00 %"
    )


def test_one_is_singular() -> None:
    assert [plural(count, "view") for count in (0, 1, 2, 1000)] == ["0 views", "1 view", "2 views", "1,000 views"]


def test_time_left_counts_from_the_first_report_not_from_step_zero() -> None:
    clock = Clock()
    meter = Meter(1000, clock)
    assert meter.seconds_left(900) is None
    clock.now += 10
    assert meter.seconds_left(910) == pytest.approx(90)


def test_meter_tells_speed_and_where_the_time_goes() -> None:
    clock = Clock()
    meter = Meter(100, clock)
    meter.update(10, 0, 0, 0)
    clock.now += 10
    assert meter.update(20, 4000, 1, 5) == "400 images/s, 1:20 min left, 10% waiting for data, 50% teacher"
    assert meter.update(20, 4000, 1, 5, shares=False) == "400 images/s, 1:20 min left"


def test_speed_leaves_out_the_evaluation_between_epochs() -> None:
    clock = Clock()
    meter = Meter(100, clock)
    clock.now += 1000
    meter.begin_epoch()
    clock.now += 1
    assert meter.update(20, 300, 0, 0).startswith("300 images/s")


def test_plain_progress_says_at_most_one_line_every_half_a_minute_and_one_an_epoch() -> None:
    clock, messages = Clock(), io.StringIO()
    progress = PlainProgress(messages=messages, clock=clock)
    progress.start(1000, "training")
    for step in range(1, 301):
        clock.now += 0.3
        progress.step(step, step * 128, 0.0, 0.0)
    progress.epoch(ROW)
    lines = messages.getvalue().splitlines()
    assert lines[0] == "training: 1000 steps"
    assert len([line for line in lines if "images/s" in line]) in (2, 3)
    assert lines[-1] == epoch_line(ROW)


def test_of_many_short_epochs_not_every_one_has_a_line() -> None:
    clock, messages = Clock(), io.StringIO()
    progress = PlainProgress(messages=messages, clock=clock)
    for epoch in range(300):
        clock.now += 0.5
        progress.epoch({**ROW, "epoch": epoch, "epochs": 300})
    lines = messages.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{20 * number}/300" for number in range(1, 16)]


@pytest.mark.parametrize("kind", [PlainProgress, TerminalProgress])
def test_results_go_to_stdout_and_all_else_to_stderr(kind: type[Progress], capsys: pytest.CaptureFixture[str]) -> None:
    progress = kind()
    progress.say("hello [1, 2]")
    progress.warn("odd\n\x1b[31mname")
    progress.start(10, "training")
    progress.step(5, 640, 0.1, 0.2)
    progress.epoch(ROW)
    progress.finish()
    progress.table("Result", ["head", "top-1"], [["cls", 91.5], ["fused", "-"]])
    out, err = capsys.readouterr()
    assert "hello [1, 2]" in err
    assert r"warning: odd\n\x1b[31mname" in err
    assert epoch_line(ROW)[:40] in err
    assert "hello" not in out
    assert "91.5" in out
    assert "91.5" not in err


def test_a_bar_shows_steps_and_speed_and_goes_away_when_finished() -> None:
    messages = Terminal()
    progress = TerminalProgress(results=io.StringIO(), messages=messages)
    progress.start(10, "training [a]")
    progress.step(4, 512, 0.0, 0.0)
    assert "4/10 steps" in messages.getvalue()
    assert "images/s" in messages.getvalue()
    progress.finish()
    progress.finish()
    progress.step(5, 640, 0.0, 0.0)  # after the end: nothing is drawn
    assert "5/10" not in messages.getvalue()


@pytest.mark.parametrize("columns", [80, 100, 119, 120])
def test_a_bar_has_room_in_any_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    messages = Terminal()
    progress = TerminalProgress(results=io.StringIO(), messages=messages)
    progress.start(100_000, "training")
    progress.step(40_000, 4_000_000, 100.0, 200.0)
    drawn = messages.getvalue().splitlines()[-1]
    assert drawn.count("━") > 10
    assert ("teacher" in drawn) == (columns == 120)


@pytest.mark.parametrize("bar", [False, True])
def test_a_long_line_is_cut_between_words_and_a_command_stays_whole(bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    messages = Terminal()
    progress = TerminalProgress(results=io.StringIO(), messages=messages)
    if bar:
        progress.start(10, "training")
        messages.truncate(0)
    plan, command = (
        "plan: 1,260 steps (20 epochs), the first 600 at 16 pixels, no teacher",
        f"next: deit evaluate {'a/' * 20}b",
    )
    progress.say(plan)
    progress.say(command)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r|\x00", "", messages.getvalue())
    assert "plan: 1,260 steps (20 epochs), the first\n  600 at 16 pixels, no teacher\n" in text
    assert command in text


def test_nothing_of_a_table_is_cut_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    results = Terminal()
    path = "/a/long/way/to/a/folder/of/photos/that/were/taken/somewhere.jpg"
    TerminalProgress(results=results, messages=Terminal()).table("", ["image", "likeliest"], [[path, "coat [99] %"]])
    assert f"{path}  coat [99] %\n" in results.getvalue()


def test_silent_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = SilentProgress()
    progress.start(1, "training")
    progress.step(1, 1, 0.0, 0.0)
    progress.epoch(ROW)
    progress.table("t", ["a"], [[1]])
    progress.say("x")
    progress.warn("y")
    progress.finish()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_a_log_file_lines_and_other_processes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_progress(main_process=False), SilentProgress)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(make_progress(), PlainProgress)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(make_progress(), TerminalProgress)


def test_an_epoch_s_line_fits_80_columns() -> None:
    assert len(epoch_line({**ROW, "epoch": 299, "epochs": 300})) <= 80
    loss = {"total": 2.5, "label": 2.25, "second_token": 2.75}
    line = epoch_line({**ROW, "loss": loss, "epoch": 98, "epochs": 100})
    assert "loss 2.500 (labels 2.25, token 2.75)" in line
    assert len(line) <= 80
    assert "(labels 2.25, features 0.43)" in epoch_line({**ROW, "loss": {**loss, "features": 0.43}})


def test_the_last_column_continues_below_where_the_terminal_is_narrow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [["deit", "one two three four five six seven eight nine ten"], ["x", "short"]]
    monkeypatch.setenv("COLUMNS", "32")
    PlainProgress().table("", ["recipe", "title"], rows)
    assert capsys.readouterr().out.splitlines() == [
        "recipe  title",
        "deit    one two three four five",
        "        six seven eight nine ten",
        "x       short",
    ]


def test_plain_table_aligns_names_left_and_figures_right() -> None:
    assert plain_table("T", ["head", "top-1"], [["cls", "9.5"], ["fused", "10.25"]]) == (
        "T\nhead   top-1\ncls      9.5\nfused  10.25"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (185, "3:05 min"), (7800, "2:10 h")]
)
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert duration(seconds) == text
