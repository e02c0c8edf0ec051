"""What the README tells people to type works, in the order in which it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deitkit.cli import main
from deitkit.models.zoo import describe_students
from deitkit.training import setup as resolve
from deitkit.verbs import STUDENT_COLUMNS, student_cells

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(
    params=[
        pytest.param((32, 20), id="small pictures"),
        pytest.param((100, 30), id="photos", marks=pytest.mark.slow),
    ]
)
def photos(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with PHOTOS, two classes of pictures, and photo.jpg."""
    side, count = request.param
    generator = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (tmp_path / "PHOTOS" / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 60, (side, side + number % 2 * (side > 64), 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(tmp_path / "PHOTOS" / name / f"{number}.png")
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    monkeypatch.setattr(resolve, "AUTOMATIC_SMALL_VIEWS", {16: 600, 64: 600})
    monkeypatch.setattr(resolve, "AUTOMATIC_PHOTO_STEPS", 30)
    monkeypatch.chdir(tmp_path)


def test_commands_and_python_of_the_readme_run(photos: None, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in code_blocks("") for line in block.splitlines() if line.startswith("deit ")]
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        assert main(words) == 0, line
    assert "blue" in capsys.readouterr().out
    (python,) = code_blocks("python")
    exec(compile(python, "README.md", "exec"), {})
    assert "blue" in capsys.readouterr().out


def test_commands_of_the_tape_s_document_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = (Path(__file__).parents[1] / "docs" / "tape.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    lines = [line for line in document.splitlines() if line.startswith("deit ")]
    assert len(lines) == 6
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    assert "epochs go round 2 views of the tape" in capsys.readouterr().err


def test_links_within_the_results_lead_somewhere() -> None:
    document = (Path(__file__).parents[1] / "docs" / "results.md").read_text(encoding="utf-8")
    titles = re.findall(r"^##+ (.*)$", document, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}  # as GitHub makes them
    links = re.findall(r"\]\(#(.*?)\)", document)
    assert len(links) >= 10
    assert set(links) <= anchors


def test_the_two_first_commands_are_make_demo_and_make_test() -> None:
    assert code_blocks("")[0].split() == ["make", "demo", "make", "test"]


def test_table_of_students_says_what_deit_models_prints() -> None:
    (table,) = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    head, _, *rows = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert head == STUDENT_COLUMNS
    printed = {row["name"]: student_cells(row) for row in describe_students()}
    assert len(rows) >= 10
    for row in rows:
        assert row == printed[row[0]]
