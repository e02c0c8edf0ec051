"""How many files and functions of deitkit a command passes through: to its first step, for a batch, for a tape's output.

    python benchmarks/call_paths.py             (this checkout; with PYTHONPATH=OTHER/src another one)

Counted with `sys.setprofile` in the main process, on the digits and on a few photos: every function of the package that is called,
imports and comprehensions aside, and the files that these stand in.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
from PIL import Image

import deitkit
from deitkit import cli

PACKAGE = Path(deitkit.__file__).parent
QUIET = "--student deit_pico --steps 3 --workers 0 --precision float32"


class Reached(Exception):
    """The function that ends a count was called."""


def called(command: str, *, until: str = "", within: frozenset[tuple[str, str]] = frozenset()) -> set[CodeType]:
    """The functions that `deit command` calls: before a function named `until`, or below any of `within` (file, function)."""
    found: set[CodeType] = set()
    depth = 0

    def look(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth
        code = frame.f_code
        if (
            event not in ("call", "return")
            or not code.co_filename.startswith(str(PACKAGE))
            or code.co_name.startswith("<")
        ):
            return
        if until and code.co_name == until and event == "call":
            raise Reached
        inside = not within or depth or (Path(code.co_filename).stem, code.co_name) in within
        if inside and event == "call":
            found.add(code)
        depth = max(0, depth + (1 if event == "call" else -1)) if inside else depth

    sys.setprofile(look)
    try:
        with contextlib.suppress(Reached):
            deit(command)
    finally:
        sys.setprofile(None)
    return found


def deit(command: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.main(command.split())
    if code:
        raise SystemExit(f"deit {command}: {said.getvalue()}")


def report(title: str, found: set[CodeType]) -> None:
    files = {code.co_filename for code in found}
    print(f"{title}: {len(files)} files, {len(found)} functions")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generator = np.random.default_rng(0)
        for number in range(36):
            path = folder / "photos" / "abc"[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)).save(path)
        deit(
            f"teacher fit digits --model cifar-resnet8 --from-scratch --steps 40 --lr 0.02 --workers 0 --out {name}/cnn"
        )
        deit(f"tape record digits --teacher {name}/cnn --student deit_pico --views 1 --workers 0 --out {name}/tape")
        soft = f"train digits {QUIET} --distillation soft"
        report(
            "--temperature 4, to the first step",
            called(f"{soft} --temperature 4 --teacher {name}/cnn --out {name}/a", until="train_step"),
        )
        views = frozenset({("loader", "batch"), ("feed", "crops"), ("loader", "augment_and_mix"), ("feed", "render")})
        report(
            "a batch of photos",
            called(f"train {name}/photos {QUIET} --image-size 32 --batch-size 8 --out {name}/b", within=views),
        )
        taped = "--teacher" if (PACKAGE / "distill").is_dir() else "--tape"
        replay = frozenset(
            {("record", "__call__"), ("tape", "outputs"), ("tape", "__call__"), ("recording", "__call__")}
        )
        report("a tape's output", called(f"{soft} {taped} {name}/tape --out {name}/c", within=replay))


if __name__ == "__main__":
    main()
