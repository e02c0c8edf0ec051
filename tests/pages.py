"""The pages of the documentation, as tests read them: their code blocks, commands and tables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
SHELL = ("", "sh")
"""Languages of the blocks whose lines are commands; `bash` is a script, which is not run."""
PROGRAMS = ("deit", "python", "torchrun", "accelerate")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    why_not_run: str | None
    """what the comment `<!-- not run: WHY -->` above it says"""


class Command(NamedTuple):
    """A line to type, without its comment."""

    line: str
    why_not_run: str | None

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)


def page(name: str) -> str:
    """The text of README.md, or of a page in docs/, by its path from the root."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    pattern = r"(?:^<!-- not run: ([^\n]*?) -->\n)?^```(\w*)\n(.*?)^```"
    return [Block(lang, body, why or None) for why, lang, body in re.findall(pattern, text, re.MULTILINE | re.DOTALL)]


def commands(text: str) -> list[Command]:
    """The commands of a page, in order."""
    lines = [
        Command(" ".join(line.split("  #")[0].split()), block.why_not_run)
        for block in blocks(text)
        if block.language in SHELL
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    return [command for command in lines if command.line.split(" ")[0] in PROGRAMS]


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a page: rows of cells, the head first."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    cells = [
        [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()] for table in found
    ]
    return [[head, *rows] for head, _, *rows in cells]


def figures(cells: Sequence[str]) -> list[str]:
    """Accuracies such as `87.37 ± 0.71` in cells of a table."""
    return [figure for cell in cells for figure in re.findall(r"\d\d\.\d\d(?: ± \d\.\d\d)?", cell)]


def make_photos(folder: Path, side: int, count: int, *, unlabelled: int = 0) -> None:
    """`PHOTOS`, two classes of so many pictures (and some without a label), and `photo.jpg`, a blue one."""
    generator = np.random.default_rng(0)
    for name, channel, number_of_images in (("unlabelled", 1, unlabelled), ("red", 0, count), ("blue", 2, count)):
        for number in range(number_of_images):
            (folder / "PHOTOS" / name).mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 60, (side, side + number % 2 * (side > 64), 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(folder / "PHOTOS" / name / f"{number}.jpg")
    Image.fromarray(pixels).save(folder / "photo.jpg")
