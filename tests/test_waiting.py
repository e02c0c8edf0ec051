"""A drive that does not answer: said, and not waited for for ever."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from deitkit import cli

SCRIPT = """
import os, sys, time
from deitkit import cli, waiting
from deitkit.data import decode, listing, load_data
from deitkit.config import DataConfig
waiting.POLL_SECONDS, waiting.NOTICE_SECONDS, waiting.PATIENCE_SECONDS = 0.05, 0.2, 0.6
who, where, photos = sys.argv[1:]
seconds = 60 if who == "command" else 1.5
def slow(usual, wanted):
    return lambda path, *more: (os.fsdecode(path).endswith(wanted) and time.sleep(seconds), usual(path, *more))[1]
if where == "folder":
    os.scandir = slow(os.scandir, "cat/")
else:
    decode.regular_file = slow(decode.regular_file, "1.png")
if who == "command":
    sys.argv[1:] = ["data", "show", photos]
    print("begun")
    sys.exit(cli.main())
print(len(load_data(photos, DataConfig()).open_split("train")))
"""


@pytest.mark.parametrize(("who", "where"), [("command", "folder"), ("program", "image")], ids="{}".format)
def test_a_drive_that_does_not_answer_is_told_and_ends_the_command_but_no_program(
    who: str, where: str, tmp_path: Path
) -> None:
    """`deit` ends; a program that uses the library goes on as soon as the drive answers."""
    photos = tmp_path / "photos"
    for kind in ("cat", "dog"):
        (photos / kind).mkdir(parents=True)
        for number in range(6):
            Image.new("L", (4, 4), 30 * number).save(photos / kind / f"{number}.png")
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, who, where, str(photos)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    lines = done.stderr.splitlines()
    path = f"{photos}/cat/{'1.png' if where == 'image' else ''}"
    assert re.fullmatch(rf"deit: waiting for {path} for \d s: does the disk or network drive answer\?", lines[0])
    if who == "command":
        last = rf"deit: error: {path}: no answer for \d s: the disk or network drive does not answer"
        assert (done.returncode, done.stdout) == (2, "begun\n")
        assert re.fullmatch(last, lines[-1])
    else:
        assert (done.returncode, done.stdout) == (0, "8\n")
