"""What the verbs of `deit` share: arguments, and how results and warnings are printed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from deitkit.config import Workers
from deitkit.flags import REQUIRED, Argument
from deitkit.terminal import Progress, UserError, complain, load_yaml, make_progress, quoted

SplitWord = Literal["val", "validation", "test"]
SPLITS: dict[str, Literal["val", "test"]] = {"val": "val", "validation": "val", "test": "test"}
DATA = Argument(
    "data",
    str,
    "digits, mnist, fashion-mnist, cifar10, cifar100, an image folder, a folder of Parquet files or a CSV file (file,label)",
    positional=True,
    metavar="DATA",
)
DATA_ONCE = DATA._replace(
    type=str | None, default=None, metavar="[DATA]", help=f"{DATA.help}; the run's own with --resume"
)
RUN = Argument("run", Path, "folder of a finished run", positional=True, metavar="RUN")
TAPE = Argument("tape", Path, "folder of the tape", positional=True, metavar="TAPE")
RECIPE = Argument(
    "recipe", str | None, "a shipped recipe (see deit recipes) or a YAML file; flags override it", None, metavar="R"
)
RESUME = Argument("resume", bool, "continue the run in --out", False)
WORKERS = Argument("workers", Workers, "data-loading workers", 2)
SPLIT = Argument("split", SplitWord, "which images to evaluate on", "val")
AGAIN = "run the same command again to continue"
JSON = Argument("json", bool, "print JSON", False)


def folder(help: str, default: Any = REQUIRED, metavar: str = "DIR") -> Argument:
    return Argument("out", Path if default is REQUIRED else Path | None, help, default, metavar=metavar)


def location(data: str | None, out: Path | None, resume: bool, prog: str) -> str:
    """DATA, or where the data of the run that is resumed are. Raises UserError."""
    if data is None and resume and out is not None and (out / "config.yaml").is_file():
        section = load_yaml(out / "config.yaml").get("data")
        data = section.get("location") if isinstance(section, dict) else None
    if data is None and resume and out is not None and not (out / "config.yaml").is_file():
        raise UserError(f"{out}: no run to resume here: config.yaml is missing: leave out --resume to start one")
    if data is None:
        raise UserError(f"missing: DATA ({prog} --help)")
    return str(data)


@contextlib.contextmanager
def on_terminal() -> Iterator[Progress]:
    progress = make_progress(main_process=os.environ.get("RANK", "0") == "0")
    try:
        yield progress
    finally:
        progress.finish()  # a bar that stays would swallow the line of an error


@contextlib.contextmanager
def resumable(out: Path, file: str, how: str, otherwise: str = "") -> Iterator[None]:
    """Ctrl-C or SIGTERM in this block tells how to continue, once `file` in `out` is there to continue from; before, `otherwise`."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise type(error)(how if (out / file).is_file() else otherwise) from None


def to_continue(verb: str, run: Path) -> str:
    """The command that continues the run: its settings are in its folder."""
    return f"to continue: deit {verb} --resume --out {quoted(run)}"


def in_processes(count: int, argv: list[str]) -> int | None:
    """The exit code of `deit argv` in `count` processes; None where this process is to do the work."""
    if count == 1 or "LOCAL_RANK" in os.environ:
        return None
    from deitkit.training.processes import launch

    return launch([sys.executable, "-m", "deitkit.cli", *argv], count)


def accuracy_title(split: str, count: int, data: str = "") -> str:
    """`split`: val, test, or all where the data are not divided."""
    which = {"val": "validation ", "all": ""}.get(split, f"{split} ")
    return f"{data + ': ' if data else ''}{which}accuracy ({count} images)"


def say_report(run: Path, progress: Progress, split: Literal["val", "test"] = "val", data: str | None = None) -> None:
    """Write the report of a run that has just been measured, and say where it is."""
    if os.environ.get("RANK", "0") != "0":
        return
    from deitkit.inspect.report import try_report

    page = try_report(run, progress.warn, split, data)
    if page is not None:
        progress.say(f"report: {page}")


def standard_input() -> Iterator[str]:
    """Its lines: names of files, whatever bytes they are made of."""
    if sys.stdin is not None:
        lines: Any = getattr(sys.stdin, "buffer", sys.stdin)
        yield from (os.fsdecode(line).rstrip("\r\n") for line in lines)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with on_terminal() as progress:
        progress.table(title, columns, rows)


def warn(line: str) -> None:
    complain(f"warning: {line}")
