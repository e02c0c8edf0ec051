"""What the program tells a user, and how it keeps files: one-line errors, progress, tables, atomic writes, locks.

Raise `UserError` for anything the user can correct: the command line prints it as one line and exits with code 2. Any other
exception is a defect of this program, and keeps its traceback. Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import json
import os
import reprlib
import secrets
import shlex
import shutil
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO, final

from safetensors import SafetensorError

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress as RichBar

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 3, 90, 90


class UserError(ValueError):
    """A mistake in the input: the message says what is wrong, where, and what to do."""


def shortened(text: str, most: int = 80) -> str:
    """`text`, or its beginning where it is too long for a line that is to be read."""
    return text if len(text) <= most else f"{text[:most]}..."


def brief(value: object) -> str:
    """`repr(value)`, cut short before it is made: a few lines of YAML may stand for millions of values."""
    return shortened(_BRIEF.repr(value))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small. On a CPU torch says so by a plain RuntimeError."""
    texts = ("allocate memory", "out of memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def is_lost_worker(error: BaseException) -> bool:
    """Whether one of torch's processes that read images was ended from outside."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (")


LOST_PEER = 3
"""Exit code of a process of a training that ends because another one has, which says why."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether another process of this training has gone, as gloo and NCCL say it."""
    said = str(error)
    return type(error).__name__ in ("DistBackendError", "DistNetworkError") or ("gloo" in said and "peer" in said)


LOST_WORKER = (
    "a data-loading worker was killed (out of memory or /dev/shm?): give --workers 0, or a smaller --batch-size"
)


def one_line(text: str) -> str:
    """`text` with what would break its line, or not be shown, spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(path: object) -> str:
    """A path, or another word, as it is typed into a shell."""
    return shlex.quote(str(path))


def complain(text: str) -> None:
    """Tell the person at the keyboard, if anybody listens."""
    with contextlib.suppress(OSError):
        print(f"deit: {one_line(text)}", file=sys.stderr, flush=True)


def unknown_name(kind: str, name: str, known: Iterable[str], unlisted: Iterable[str] = ()) -> UserError:
    """An error for a name that does not exist: the close ones, also of the `unlisted`, or all that are known when none is close."""
    names = sorted(set(known))
    longer = [one for one in names if one.startswith(f"{name}_")]
    close = longer or difflib.get_close_matches(name, unlisted, n=1, cutoff=0.7)
    close = close or difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
    return UserError(f"unknown {kind} {shortened(repr(name))}: {hint}")


def expanded(path: str | Path) -> Path:
    """`path` with a `~` at its beginning replaced by the home folder, unless there is a file or folder of that name. Raises
    UserError."""
    given = Path(path)
    if not str(path).startswith("~") or given.exists():
        return given
    try:
        return given.expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: no such folder: nobody has such a home folder") from error


LOCK = ".lock"


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into one line that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if "No space left" in why:
            why += f" (disk: {next((folder for folder in path.absolute().parents if folder.is_mount()), path)})"
        raise UserError(f"{path}: cannot be written: {why}") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file as a whole. Raises UserError if writing fails; the old file then stays unchanged."""
    with written(path), Replaced(path) as temporary:
        # a name in the text may have bytes that are no UTF-8
        temporary.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all, readable by whom other new files are. Raises UserError."""
    from safetensors.torch import save_file  # with torch: not needed for `--help`

    with written(path), Replaced(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def parse_json(text: str) -> Any:
    """`json.loads`. Raises ValueError, also for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, in which no key may stand twice. Raises UserError when it cannot be read or is no mapping."""
    import yaml  # here: the command line's first page does without it

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise yaml.YAMLError(f"duplicate key {key.value!r}, line {key.start_mark.line + 1}")
                    seen.add(key.value)
            return dict(super().construct_mapping(node, deep))

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, LookupError) as error:
        # PyYAML lets through what its constructors raise: `2026-99-99` is a ValueError, `!!bool x` a KeyError
        raise UserError(f"{path}: not valid YAML: {shortened(' '.join(str(error).split()))}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise UserError(f"{path}: expected 'name: value' lines, found {found}")
    return content


def is_filled(path: Path, besides: Collection[str] = ()) -> bool:
    """Whether something is at `path` besides these files and what a command leaves that ended before it had written anything:
    hidden files, such as its lock, and empty folders."""
    if not path.is_dir():
        return path.exists()
    return any(
        any(entry.iterdir()) if entry.is_dir() else not entry.name.startswith(".") and entry.name not in besides
        for entry in path.iterdir()
    )


def refuse_filled(out: Path, hint: str, besides: Collection[str] = ()) -> None:
    """Raises UserError, ending with the `hint`, where `is_filled`."""
    if out.is_file():
        raise UserError(f"{out}: is a file: give a folder's name")
    if is_filled(out, besides):
        raise UserError(f"{out}: already exists and is not empty: {hint}")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within this block no other process is in such a block for the same folder, which is made if it is missing: it waits.
    Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


@final
class Lock:
    """Keeps everybody else, other threads of this process too, from working in `folder`, until it is released or its process ends.
    Raises BlockingIOError if somebody works there, OSError."""

    _held: ClassVar[set[Path]] = set()
    """folders locked by this process: the system's locks are between processes, and are lost when any file of the name is closed"""
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, folder: Path) -> None:
        folder = folder.resolve()
        with self._guard:
            if folder in self._held:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:  # not `flock`: loader workers would hold it for seconds after the death of the process that they serve
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(file)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                raise BlockingIOError(error.errno, error.strerror) from error
            self._held.add(folder)
        self.release = weakref.finalize(self, self._let_go, folder, file)

    @classmethod
    def _let_go(cls, folder: Path, file: int) -> None:
        os.close(file)
        cls._held.discard(folder)


@final
class Replaced:
    """`with Replaced(path) as temporary`: a new file beside `path` that takes its place when the block ends well, and vanishes
    otherwise: readable by the same users as other new files, its content and its name on the disk. A kill leaves a file behind that
    `leftovers` finds. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")

    def __enter__(self) -> Path:
        handle = os.open(self._temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        self._mode = os.fstat(handle).st_mode
        os.close(handle)
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._temporary.chmod(self._mode)  # some libraries make files for their owner alone
                sync(self._temporary)
                self._temporary.replace(self._path)
                sync(self._path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)


def leftovers(path: Path) -> list[Path]:
    """Temporary files of killed processes that were writing `path`; no other process may be writing it now."""
    return sorted(path.parent.glob(f".{path.name}.*"))


REDRAW_SECONDS = 0.2
PLAIN_SECONDS = 30.0
"""Between two lines within an epoch, in a log file."""
MANY_EPOCHS, EPOCH_SECONDS = 50, 10.0
"""Of a training of more epochs than that, some get no line: so many seconds lie between two."""
WIDE = 120
"""Columns of a terminal that has room for a bar and all details of the speed."""


class Terminated(KeyboardInterrupt):
    """SIGTERM has come: like Ctrl-C, with an exit code of its own."""


class Progress:
    """Where a loop reports to. This one prints nothing: for Python, for tests, and for all processes of a run but the first. Every
    method is cheap enough to be called at every step."""

    every = 1
    """one epoch in so many gets a line; the last one always"""

    def say(self, line: str) -> None:
        """Print a line."""

    def warn(self, line: str) -> None:
        """Print a line that may call for action."""

    def start(self, total_steps: int, title: str, unit: str = "steps") -> None:
        """`total_steps` steps, or other units, of something named `title` begin; what ran before is finished."""

    def step(self, done: int, images: int, waiting_seconds: float, teacher_seconds: float) -> None:
        """`done` of the steps are done, counted over resumed parts too. The others are sums since the epoch began: images
        seen, seconds spent waiting for data, seconds spent in the teacher."""

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is over; `row` is its line of metrics.jsonl, with `epochs` if their number is known."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a result."""

    def finish(self) -> None:
        """The steps are over, or were given up. May be called again."""


SilentProgress = Progress


class PlainProgress(Progress):
    """Lines for a log file: one per epoch, and in a long epoch one now and then."""

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
        self._last_line = self._last_epoch = clock()

    def say(self, line: str) -> None:
        try:
            print(line, file=self._messages, flush=True)
        except OSError:  # the log's reader is gone, or its disk is full: no reason to end a training
            self._messages = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        self._last_line = self._clock()

    def warn(self, line: str) -> None:
        self.say(f"warning: {one_line(line)}")

    def start(self, total_steps: int, title: str, unit: str = "steps") -> None:
        self._meter, self._title, self._unit = Meter(total_steps, self._clock), title, unit
        self.say(f"{title}: {total_steps} {unit.removesuffix('s') if total_steps == 1 else unit}")

    def step(self, done: int, images: int, waiting_seconds: float, teacher_seconds: float) -> None:
        text = self._meter.update(done, images, waiting_seconds, teacher_seconds)
        if self._clock() - self._last_line >= PLAIN_SECONDS:
            self.say(f"{self._title}: {done} of {self._meter.total_steps} {self._unit}, {text}")

    def epoch(self, row: dict[str, Any]) -> None:
        epochs = row.get("epochs") or 0
        due = epochs <= MANY_EPOCHS or self._clock() - self._last_epoch >= EPOCH_SECONDS
        if (due and (row["epoch"] + 1) % self.every == 0) or row["epoch"] + 1 == epochs:
            self.say(epoch_line(row))
            self._last_epoch = self._clock()
        self._meter.begin_epoch()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.finish()
        width = shutil.get_terminal_size((0, 0)).columns  # 0: neither a terminal nor COLUMNS
        print(plain_table(title, columns, rows, width), file=self._results, flush=True)


@final
class TerminalProgress(PlainProgress):
    """A bar at the bottom of a terminal, lines above it."""

    _bar: RichBar | None = None
    _drawn = 0.0

    def say(self, line: str) -> None:
        """Cut between words where the terminal is narrower; a command, which people copy, stays whole."""
        columns = shutil.get_terminal_size().columns
        if len(line) > columns and not line.startswith((" ", "next: ")):
            line = textwrap.fill(line, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        if self._bar is None:
            super().say(line)
        else:
            self._bar.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def start(self, total_steps: int, title: str, unit: str = "steps") -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, Progress, TextColumn

        self.finish()
        self._meter, self._drawn = Meter(total_steps, self._clock), 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            TextColumn("{task.fields[speed]}"),
            console=Console(file=self._messages, highlight=False),
            auto_refresh=False,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task(escape(title), total=total_steps, speed="", unit=unit)
        self._bar.start()

    def step(self, done: int, images: int, waiting_seconds: float, teacher_seconds: float) -> None:
        if self._bar is None or time.perf_counter() - self._drawn < REDRAW_SECONDS:
            return
        wide = self._bar.console.width >= WIDE
        speed = self._meter.update(done, images, waiting_seconds, teacher_seconds, shares=wide)
        self._bar.update(self._task, completed=done, speed=speed, refresh=True)
        self._drawn = time.perf_counter()

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


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
        """A short text: speed, time left, and the `shares` of the time spent waiting for data and in the teacher."""
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


def make_progress(*, main_process: bool = True) -> Progress:
    """A bar where stderr is a terminal, lines elsewhere, nothing in the other processes of a run."""
    if not main_process:
        return Progress()
    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()


def epoch_line(row: dict[str, Any]) -> str:
    """An epoch's metrics as one line, 80 columns: `epoch 3/30  loss 1.234 (labels 1.30, teacher 1.10)  top-1 52.00 %  lr 2.5e-04`.
    The accuracy is that of both heads, fused; metrics.jsonl has each head's."""
    of = f"/{row['epochs']}" if row.get("epochs") else ""
    parts = [f"epoch {row['epoch'] + 1}{of}"]
    loss, top1 = row.get("loss") or {}, row.get("top1") or {}
    if "total" in loss:
        second = next(((name, loss[key]) for key, name in SECOND_TERMS.items() if loss.get(key)), None)
        terms = f" (labels {loss['label']:.2f}, {second[0]} {second[1]:.2f})" if second else ""
        parts.append(f"loss {loss['total']:.3f}{terms}")
    if top1:
        parts.append(f"top-1 {100 * (top1['cls'] if top1.get('fused') is None else top1['fused']):.2f} %")
    if "lr" in row:
        parts.append(f"lr {row['lr']:.1e}")
    return "  ".join(parts)


SECOND_TERMS = {"teacher": "teacher", "features": "features", "second_token": "token"}


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> str:
    """A table of plain text, its columns aligned: names to the left, numbers to the right. `width`: where lines longer than so many
    letters continue, indented, below their last column."""
    cells = [[str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[number]) for row in cells) for number in range(len(columns))]
    right = [number > 0 and _numeric(rows, number) for number in range(len(columns))]
    indent = sum(widths[:-1]) + 2 * len(widths[:-1])
    room = max(20, width - indent) if width else 10**6
    lines = [title] if title else []
    for row in cells:
        *first, last = row
        pairs = zip(first, widths, right, strict=False)
        padded = [cell.rjust(size) if to_right else cell.ljust(size) for cell, size, to_right in pairs]
        wrapped = (
            textwrap.wrap(last, room, break_long_words=False, break_on_hyphens=False) if len(last) > room else [last]
        )
        aligned = wrapped[0].rjust(widths[-1]) if right[-1] else wrapped[0]
        lines.append("  ".join([*padded, aligned]).rstrip())
        lines += [" " * indent + more for more in wrapped[1:]]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """`42 s`, `3:05 min`, `2:10 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def plural(count: int, noun: str) -> str:
    """`1 view`, `1,000 views`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(share: float | None) -> str:
    """A share between 0 and 1 in percent, two decimals; a dash for None."""
    return "-" if share is None else f"{100 * share:.2f}"


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
