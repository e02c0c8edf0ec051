"""What long work tells the person at the terminal: progress to stderr, results to stdout.

On a terminal a bar; in a log file a plain line now and then, and one line an epoch either way.
"""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO, final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichBar
from rich.table import Table

from deitkit.errors import one_line

REDRAW_SECONDS = 0.2
PLAIN_SECONDS = 30.0
"""Between two lines on the way through an epoch: who reads a log file later wants a line an epoch."""
WIDE = 120
"""Columns of a terminal that has room for a bar and all that is said of the speed."""


class Progress(ABC):
    """Where a loop reports to. Every method is cheap enough to be called at every step."""

    every = 1
    """one epoch in so many gets a line; the last one always"""

    @abstractmethod
    def say(self, line: str) -> None:
        """Tell the user something."""

    @abstractmethod
    def warn(self, line: str) -> None:
        """Tell the user something that may need a hand."""

    @abstractmethod
    def start(self, total_steps: int, title: str, unit: str = "steps") -> None:
        """`total_steps` steps, or other units, of something named `title` begin; what ran before is finished."""

    @abstractmethod
    def step(self, done: int, images: int, waiting_seconds: float, teacher_seconds: float) -> None:
        """`done` of the steps are done, counted over resumed parts too. The others are sums since the epoch began: images
        seen, seconds spent waiting for data, seconds spent in the teacher."""

    @abstractmethod
    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is over; `row` is its line of metrics.jsonl, with `epochs` if their number is known."""

    @abstractmethod
    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Show a result."""

    @abstractmethod
    def finish(self) -> None:
        """The steps are over, or were given up. May be called again."""


@final
class Meter:
    """Speed and time left, from what `Progress.step` is told.

    The speed is that of the epoch so far, so it is steady; time left counts from the first report, evaluations between
    epochs included, so that a resumed run does not look infinitely fast.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.total_steps = total_steps
        self._clock = clock
        self._epoch_started = clock()
        self._first: tuple[int, float] | None = None

    def begin_epoch(self) -> None:
        """The sums that `update` is told begin anew."""
        self._epoch_started = self._clock()

    def update(
        self, done: int, images: int, waiting_seconds: float, teacher_seconds: float, *, shares: bool = True
    ) -> str:
        """A short text: speed, time left, and the `shares` of the time that went into waiting and into the teacher."""
        seconds = max(self._clock() - self._epoch_started, 1e-9)
        parts = [f"{images / seconds:,.0f} images/s"]
        left = self.seconds_left(done)
        if left is not None:
            parts.append(f"{duration(left)} left")
        for share, name in ((waiting_seconds / seconds, "waiting for data"), (teacher_seconds / seconds, "teacher")):
            if shares and share >= 0.01:
                parts.append(f"{min(share, 1):.0%} {name}")
        return ", ".join(parts)

    def seconds_left(self, done: int) -> float | None:
        """None until there are two reports to tell a speed from."""
        now = self._clock()
        if self._first is None or done < self._first[0]:
            self._first = done, now
            return None
        first_done, first_time = self._first
        steps = done - first_done
        return (self.total_steps - done) * (now - first_time) / steps if steps > 0 else None


@final
class TerminalProgress(Progress):
    """A bar that stays at the bottom of a terminal, lines above it."""

    def __init__(self, results: TextIO | None = None, messages: TextIO | None = None) -> None:
        self._results = Console(file=results or sys.stdout)
        self._messages = Console(file=messages or sys.stderr, highlight=False)
        self._bar: RichBar | None = None
        self._task = TaskID(0)
        self._meter = Meter(1)
        self._drawn = 0.0

    def say(self, line: str) -> None:
        self._messages.print(escape(line), soft_wrap=True)

    def warn(self, line: str) -> None:
        self._messages.print(f"[yellow]warning:[/yellow] {escape(one_line(line))}", soft_wrap=True)

    def start(self, total_steps: int, title: str, unit: str = "steps") -> None:
        self.finish()
        self._meter, self._drawn = Meter(total_steps), 0.0
        self._bar = RichBar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            TextColumn("{task.fields[speed]}"),
            console=self._messages,
            auto_refresh=False,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task(escape(title), total=total_steps, speed="", unit=unit)
        self._bar.start()

    def step(self, done: int, images: int, waiting_seconds: float, teacher_seconds: float) -> None:
        if self._bar is None or time.perf_counter() - self._drawn < REDRAW_SECONDS:
            return
        wide = self._messages.width >= WIDE
        speed = self._meter.update(done, images, waiting_seconds, teacher_seconds, shares=wide)
        self._bar.update(self._task, completed=done, speed=speed, refresh=True)
        self._drawn = time.perf_counter()

    def epoch(self, row: dict[str, Any]) -> None:
        if (row["epoch"] + 1) % self.every == 0 or row["epoch"] + 1 == row.get("epochs"):
            self.say(epoch_line(row))
        self._meter.begin_epoch()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.finish()
        text = plain_table(title, columns, rows)
        if max(map(len, text.splitlines())) > self._results.width:  # it would be broken inside words and figures
            self._results.print(text, soft_wrap=True, markup=False, highlight=False)
            return
        table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number and _numeric(rows, number) else "left")
        for row in rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        self._results.print(table)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@final
class PlainProgress(Progress):
    """Plain lines for a log file: one an epoch, and in a long epoch one now and then."""

    def __init__(
        self,
        results: TextIO | None = None,
        messages: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._results = results or sys.stdout
        self._messages = messages or sys.stderr
        self._clock = clock
        self._meter = Meter(1, clock)
        self._title, self._unit = "", "steps"
        self._said = clock()

    def say(self, line: str) -> None:
        try:
            print(line, file=self._messages, flush=True)
        except OSError:  # nobody listens any more, or the log's disk is full: no reason to end a training
            self._messages = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        self._said = self._clock()

    def warn(self, line: str) -> None:
        self.say(f"warning: {one_line(line)}")

    def start(self, total_steps: int, title: str, unit: str = "steps") -> None:
        self._meter, self._title = Meter(total_steps, self._clock), title
        self._unit = unit
        self.say(f"{title}: {total_steps} {unit}")

    def step(self, done: int, images: int, waiting_seconds: float, teacher_seconds: float) -> None:
        text = self._meter.update(done, images, waiting_seconds, teacher_seconds)
        if self._clock() - self._said >= PLAIN_SECONDS:
            self.say(f"{self._title}: {done} of {self._meter.total_steps} {self._unit}, {text}")

    def epoch(self, row: dict[str, Any]) -> None:
        if (row["epoch"] + 1) % self.every == 0 or row["epoch"] + 1 == row.get("epochs"):
            self.say(epoch_line(row))
        self._meter.begin_epoch()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        print(plain_table(title, columns, rows), file=self._results, flush=True)

    def finish(self) -> None:
        pass


@final
class SilentProgress(Progress):
    """Says nothing: for the Python API, for tests, and for all processes of a run but the first."""

    def say(self, line: str) -> None:
        pass

    def warn(self, line: str) -> None:
        pass

    def start(self, total_steps: int, title: str, unit: str = "steps") -> None:
        pass

    def step(self, done: int, images: int, waiting_seconds: float, teacher_seconds: float) -> None:
        pass

    def epoch(self, row: dict[str, Any]) -> None:
        pass

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        pass

    def finish(self) -> None:
        pass


def make_progress(*, main_process: bool = True) -> Progress:
    """A bar where stderr is a terminal, plain lines elsewhere, nothing in the other processes of a run."""
    if not main_process:
        return SilentProgress()
    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()


def epoch_line(row: dict[str, Any]) -> str:
    """An epoch's metrics as one line: `epoch 3/30  loss 1.234 (labels 1.3, teacher 1.1)  top-1 % ...  lr 2.5e-04`."""
    of = f"/{row['epochs']}" if row.get("epochs") else ""
    parts = [f"epoch {row['epoch'] + 1}{of}"]
    loss = dict(row.get("loss") or {})
    if "total" in loss:
        text = f"loss {_number(loss['total'])}"
        for name, title in (("teacher", "teacher"), ("second_token", "second token")):
            if loss.get(name):
                text += f" (labels {_number(loss['label'])}, {title} {_number(loss[name])})"
        parts.append(text)
    shown = {head: share for head, share in (row.get("top1") or {}).items() if head != "fused_logits"}
    top1 = {head: share for head, share in shown.items() if share is not None}
    if top1:
        parts.append("top-1 % " + " ".join(f"{head} {100 * share:.2f}" for head, share in top1.items()))
    if "lr" in row:
        parts.append(f"lr {row['lr']:.1e}")
    return "  ".join(parts)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of plain text, its columns aligned: names to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[number]) for row in cells) for number in range(len(columns))]
    right = [number > 0 and _numeric(rows, number) for number in range(len(columns))]
    lines = [title] if title else []
    for row in cells:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """`42 s`, `3:05 min`, `2:10 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def counted(count: int, noun: str) -> str:
    """`1 view`, `1,000 views`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def file_size(count: int) -> str:
    """`100 bytes`, `3.9 kB`, `1.2 GB`: powers of 1000."""
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def _numeric(rows: Sequence[Sequence[object]], number: int) -> bool:
    """Whether a column holds figures; a missing one is written `-`."""
    texts = [str(row[number]) for row in rows]
    return all(text == "-" or text.lstrip("-")[:1].isdigit() for text in texts)


def _number(value: float) -> str:
    return f"{value:.3f}"
