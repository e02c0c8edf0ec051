"""What the README tells people to type works, in the order in which it stands there; what the pages list is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deitkit.cli import main
from deitkit.config import RunConfig
from deitkit.flags import YAML_ONLY
from deitkit.models.zoo import describe_students
from deitkit.settings import RENAMED, Place, build, places
from deitkit.training import fit as fitting
from deitkit.verbs.prepare import STUDENT_COLUMNS, student_cells

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
EVIDENCE = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "evidence").glob("*.md")}
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def tables(page: str = README) -> list[list[list[str]]]:
    """The tables of a page: rows of cells, the head first."""
    found = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    cells = [
        [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()] for table in found
    ]
    return [[head, *rows] for head, _, *rows in cells]


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
    monkeypatch.setattr(fitting, "ENLARGED", 64)
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
    document = (ROOT / "docs" / "tape.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    lines = [line for line in document.splitlines() if line.startswith("deit ")]
    assert len(lines) == 6
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    assert re.search(r"a tape, cycling through 2 views", capsys.readouterr().err)


def anchors(page: Path) -> set[str]:
    """Its headings' names in links, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_pages_lead_to_files_and_headings(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)(.+?)\)", (ROOT / page).read_text(encoding="utf-8")):
        file, _, heading = link.partition("#")
        target = (ROOT / page).parent.joinpath(file) if file else ROOT / page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_the_index_of_the_evidence_names_every_page() -> None:
    (table,) = tables(EVIDENCE["README.md"])
    assert sorted(re.findall(r"\((.*?)\)", row[0])[0] for row in table[1:]) == sorted(EVIDENCE.keys() - {"README.md"})


def test_accuracies_of_the_results_stand_in_the_evidence_that_they_link_to() -> None:
    (table,) = [table for table in tables(RESULTS) if table[0][0] == "data, training images"]
    assert len(RESULTS.splitlines()) <= 100
    count = 0
    for *cells, link in table[1:]:
        page = EVIDENCE[link.partition("(evidence/")[2].partition("#")[0].rstrip(")")]
        figures = [figure for cell in cells[4:6] for figure in re.findall(r"\d\d\.\d\d(?: ± \d\.\d\d)?", cell)]
        assert not [figure for figure in figures if figure not in page], link
        count += len(figures)
    assert count >= 15


def test_the_two_first_commands_are_make_demo_and_make_test() -> None:
    assert code_blocks("")[0].split() == ["make", "demo", "make", "test"]


def test_table_of_students_says_what_deit_models_prints() -> None:
    (table,) = [table for table in tables() if table[0] == STUDENT_COLUMNS]
    printed = {row["name"]: student_cells(row) for row in describe_students()}
    assert len(table) > 10
    assert [row[0] for row in table[1:6]] == list(printed)[:5]  # "The first five ... belong to this project"
    for row in table[1:]:
        assert row == printed[row[0]]


def test_accuracies_of_the_readme_stand_in_the_evidence() -> None:
    (table,) = [table for table in tables() if table[0][0] == "data, training images"]
    figures = [
        figure for row in table[1:] for cell in row[2:-1] for figure in re.findall(r"\d\d\.\d\d(?: ± \d\.\d\d)?", cell)
    ]
    assert len(figures) >= 15
    assert not [figure for figure in figures if not any(figure in page for page in EVIDENCE.values())]


def test_the_tree_of_the_readme_names_files_that_are_there() -> None:
    (tree,) = code_blocks("text")
    folder, named = Path(), []
    for line in tree.splitlines()[1:]:
        if package := re.match(r"  (\w+)/ ", line):
            folder = Path(package[1])
            continue
        if not line.startswith("    "):
            folder = Path()
        named += [folder / name for name in re.findall(r"(\w+\.py)\b", line)]
    source = ROOT / "src" / "deitkit"
    assert len(named) >= 30
    assert not [str(path) for path in named if not (source / path).is_file()]


def test_the_recipes_page_lists_every_setting_without_a_flag() -> None:
    section = RECIPES.partition("## Settings without a flag")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (\w+) \|", section, re.MULTILINE)
    listed = {name: Place(where, name) for names, where in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(listed) == YAML_ONLY - {"location", "tape"}
    assert all(places(RunConfig)[name] == place for name, place in listed.items())


def test_the_recipe_of_the_recipes_page_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", RECIPES, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    config = build(RunConfig, {}, recipe=tmp_path / "mine.yaml")
    assert (config.loss.label_loss, config.optim.base_lr, config.optim.min_lr) == ("bce", 1e-3, "1%")
    assert (config.optim.warmup, config.loop.length) == ("5ep", "100ep")


def test_the_changelog_names_every_setting_that_was_renamed() -> None:
    section = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("| 0.1.0 | now |")[2].partition("\n\n")[0]
    rows = dict(re.findall(r"^\| (.*?) \| (.*?) \|$", section, re.MULTILINE))
    renamed = {old: now for names, now in rows.items() for old in re.findall(r"`(\w+)`", names)}
    for old, new in RENAMED.items():
        assert f"`{new}`" in renamed[old]
        assert new in places(RunConfig)
