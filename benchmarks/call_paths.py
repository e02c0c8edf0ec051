"""How many files and functions of deitkit a command passes through before its first training step, and a batch or a tape's output within one.

    python benchmarks/call_paths.py                 (this checkout; PYTHONPATH=OTHER/src counts another one)

Counted with `sys.setprofile` on the digits: every function of the package that is called in the main process (imports and class
bodies aside), and the files that these stand in.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
from PIL import Image

import deitkit
from deitkit import cli

PACKAGE = str(Path(deitkit.__file__).parent)
ASIDE = ("<module>", "<lambda>", "<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>")


class Called(Exception):
    """The function that ends a count was reached."""


def counted(run: Callable[[], Any], *, until: str | None = None) -> set[CodeType]:
    """The functions that `run` calls, until a function of the package named `until` is called."""
    found: set[CodeType] = set()

    def look(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE) or code.co_name in ASIDE:
            return
        if code.co_qualname.isidentifier() and code.co_qualname[0].isupper():
            return  # a class body
        if code.co_name == until:
            sys.setprofile(None)
            raise Called
        found.add(code)

    sys.setprofile(look)
    threading.setprofile(None)
    try:
        run()
    except Called:
        pass
    finally:
        sys.setprofile(None)
    return found


def report(title: str, found: set[CodeType]) -> None:
    files = {Path(code.co_filename).relative_to(PACKAGE) for code in found}
    print(f"{title}: {len(files)} files, {len(found)} functions")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generator = np.random.default_rng(0)
        for label in ("a", "b", "c"):
            (folder / "photos" / label).mkdir(parents=True)
            for number in range(12):
                pixels = generator.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / label / f"{number}.png")
        teacher, tape = str(folder / "teacher"), str(folder / "tape")
        quiet = [*"--student deit_pico --steps 3 --workers 0 --precision float32".split()]
        run(
            f"teacher fit digits --model cifar-resnet8 --from-scratch --steps 40 --lr 0.02 --workers 0 --out {teacher}".split()
        )
        run(f"tape record digits --teacher {teacher} --student deit_pico --views 1 --workers 0 --out {tape}".split())
        command = ["train", "digits", "--teacher", teacher, "--distillation", "soft", "--temperature", "4", *quiet]
        report(
            "--temperature 4, to the first step",
            counted(lambda: run([*command, "--out", str(folder / "a")]), until="train_step"),
        )
        photos = [
            "train",
            str(folder / "photos"),
            *quiet,
            "--image-size",
            "32",
            "--batch-size",
            "8",
            "--out",
            str(folder / "b"),
        ]
        report("a batch of photos", counted_within(photos, ("batch", "crops"), ("augment_and_mix", "render")))
        flag = "--teacher" if "--teacher TAPE" in str(cli.__doc__) or _takes_tapes() else "--tape"
        taped = ["train", "digits", flag, tape, "--distillation", "soft", *quiet, "--out", str(folder / "c")]
        report("a tape's output", counted_within(taped, ("__call__",), ()))


def _takes_tapes() -> bool:
    return (Path(PACKAGE) / "distill" / "tape.py").is_file()


def run(argv: list[str]) -> None:
    if cli.main(argv):
        raise SystemExit(f"deit {' '.join(argv)} failed")


def counted_within(argv: list[str], *names: tuple[str, ...]) -> set[CodeType]:
    """The functions that are called below any of the functions called `names`, in one command."""
    wanted = {name for some in names for name in some}
    found: set[CodeType] = set()
    depth = 0

    def look(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal depth
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return
        if event == "call":
            if depth or (
                code.co_name in wanted
                and (
                    "loader" in code.co_filename
                    or "feed" in code.co_filename
                    or "record" in code.co_filename
                    or "tape" in code.co_filename
                )
            ):
                depth += 1
                if code.co_name not in ASIDE:
                    found.add(code)
        elif event == "return" and depth:
            depth -= 1

    sys.setprofile(look)
    try:
        run(argv)
    finally:
        sys.setprofile(None)
    return found


if __name__ == "__main__":
    main()
