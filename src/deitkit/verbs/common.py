"""What several verbs share: fields, tables, how they start."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from deitkit.config import HEADS, ConfigT
from deitkit.errors import UserError
from deitkit.flags import Field, Place, parse_config
from deitkit.progress import Progress, make_progress
from deitkit.recipes import find_recipe

SplitWord = Literal["val", "validation", "test"]
SPLITS: dict[str, Literal["val", "test"]] = {"val": "val", "validation": "val", "test": "test"}
MOST_WORKERS = 1024
MOST_PIXELS = 4096
DATA_HELP = "digits, mnist, fashion-mnist, cifar10, cifar100, an image folder, or a folder of Parquet files"


def configured(
    kind: type[ConfigT],
    argv: list[str],
    prog: str,
    help: str,
    fields: Sequence[Field],
    only: Callable[[Place], bool] = lambda _: True,
) -> tuple[ConfigT, Any]:
    def taped_settings(path: str) -> dict[str, Any]:
        from deitkit.tapecard import settings_of

        return settings_of(Path(path))

    find = find_recipe if any(field.name == "recipe" for field in fields) else None
    return parse_config(
        kind,
        argv,
        prog=prog,
        description=help,
        before=fields,
        only=only,
        find_recipe=find,
        taped_settings=taped_settings,
    )


def data_field() -> Field:
    return Field("data", str, DATA_HELP, positional=True, metavar="DATA")


def run_field() -> Field:
    return Field("run", Path, "folder of a finished run", positional=True, metavar="RUN")


def run_fields() -> list[Field]:
    return [
        Field("out", Path, "folder of the run", metavar="DIR"),
        Field("resume", bool, "go on with the run in --out where it stopped", False),
    ]


def workers_field() -> Field:
    return Field("workers", int, "processes that read photos", 2)


def check_range(flag: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UserError(f"{flag} {value}: give a number from {least} to {most}")


def split_field() -> Field:
    return Field("split", SplitWord, "which images", "val")


def json_field() -> Field:
    return Field("json", bool, "print JSON", False)


@contextlib.contextmanager
def on_terminal() -> Iterator[Progress]:
    progress = make_progress(main_process=os.environ.get("RANK", "0") == "0")
    try:
        yield progress
    finally:
        progress.finish()  # a bar that stays would swallow the line of an error


def in_processes(count: int, argv: list[str]) -> int | None:
    """The exit code of `deit argv` in `count` processes; None where this is to go on here."""
    if count == 1 or "LOCAL_RANK" in os.environ:
        return None
    from deitkit.launch import launch

    return launch([sys.executable, "-m", "deitkit.cli", *argv], count)


def head_rows(result: dict[str, Any]) -> list[list[str]]:
    """The teacher, then the heads that the network has."""
    teacher = result.get("teacher")
    rows = [[f"teacher {teacher['name']}", percent(teacher["top1"])]] if teacher else []
    one = result["top1"].get("dist") is None
    titles = {"cls": result["model"]} if one else HEADS
    return rows + [[title, percent(result["top1"][head])] for head, title in titles.items()]


def split_title(data: str, split: str, count: int) -> str:
    return f"{data}: right on {count} {'validation' if split == 'val' else split} images"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
