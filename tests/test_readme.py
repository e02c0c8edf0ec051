"""What the README tells people to type works, in the order in which it stands there; what the pages list is there."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from deitkit.cli import main
from deitkit.config import RunConfig
from deitkit.flags import YAML_ONLY
from deitkit.models.zoo import describe_students
from deitkit.settings import RENAMED, Place, build, places
from deitkit.training import fit as fitting
from deitkit.verbs.prepare import STUDENT_COLUMNS, student_cells
from pages import ROOT, blocks, commands, figures, make_photos, page, tables

README, RECIPES, RESULTS = page("README.md"), page("docs/recipes.md"), page("docs/results.md")
EVIDENCE = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "evidence").glob("*.md")}
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]


@pytest.fixture(
    params=[
        pytest.param((32, 20), id="small pictures"),
        pytest.param((100, 30), id="photos", marks=pytest.mark.slow),
    ]
)
def photos(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with PHOTOS, two classes of pictures, and photo.jpg."""
    side, count = request.param
    make_photos(tmp_path, side, count)
    monkeypatch.setattr(fitting, "ENLARGED", 64)
    monkeypatch.chdir(tmp_path)


def test_commands_and_python_of_the_readme_run(photos: None, capsys: pytest.CaptureFixture[str]) -> None:
    lines = commands(README)
    assert len(lines) >= 4
    for command in lines:
        assert main(command.words[1:]) == 0, command.line
    assert "blue" in capsys.readouterr().out
    (python,) = [block.text for block in blocks(README) if block.language == "python"]
    assert len([line for line in python.splitlines() if line]) <= 5
    exec(compile(python, "README.md", "exec"), {})
    assert "blue" in capsys.readouterr().out


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_commands_of_the_tape_s_document_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = page("docs/tape.md")
    monkeypatch.chdir(tmp_path)
    lines = [line for line in document.splitlines() if line.startswith("deit ")]
    assert len(lines) == 6
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    assert re.search(r"a tape, cycling through 2 views", capsys.readouterr().err)


def anchors(path: Path) -> set[str]:
    """Its headings' names in links, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_of_the_pages_lead_to_files_and_headings(name: str) -> None:
    for link in re.findall(r"\]\((?!https?:)(.+?)\)", page(name)):
        file, _, heading = link.partition("#")
        target = (ROOT / name).parent.joinpath(file) if file else ROOT / name
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
        evidence = EVIDENCE[link.partition("(evidence/")[2].partition("#")[0].rstrip(")")]
        found = figures(cells[4:6])
        assert not [figure for figure in found if figure not in evidence], link
        count += len(found)
    assert count >= 15


def test_the_first_commands_are_a_demo_the_installation_and_a_training() -> None:
    lines = [line.partition("#")[0].strip() for line in blocks(README)[0].text.splitlines()]
    assert lines == ["make demo", "pip install .", "deit train PHOTOS"]
    assert re.search(r"^demo:", page("Makefile"), re.MULTILINE)


def test_table_of_students_says_what_deit_models_prints() -> None:
    (table,) = [table for table in tables(page("docs/students.md")) if table[0] == STUDENT_COLUMNS]
    printed = {row["name"]: student_cells(row) for row in describe_students()}
    assert len(table) > 10
    assert [row[0] for row in table[1:6]] == list(printed)[:5]  # "The first five ... belong to this project"
    for row in table[1:]:
        assert row == printed[row[0]]


def test_accuracies_of_the_readme_stand_in_the_results_and_their_evidence() -> None:
    (table,) = [table for table in tables(README) if table[0][0] == "network"]
    rows = [[*figures(row[1:2]), *row[2:]] for row in table[1:]]
    assert [len(row) for row in rows] == [3] * 4
    clothing = [row for row in tables(RESULTS)[0] if row[0].startswith("clothing photos, 3,068")]
    probe, *students = rows
    for accuracy, minutes, n in students:
        assert any(accuracy in cell for row in clothing for cell in row)
        assert f"| {accuracy} | {minutes} | {n} |" in EVIDENCE["photos.md"]
    assert {row[3] for row in clothing} == {probe[0]}
    assert f"the teacher's probe ({probe[1]} min)" in EVIDENCE["photos.md"]
    largest = {row[2] for row in clothing}
    assert len(largest) == 1
    assert f"the largest class has {largest.pop()} %" in README


def test_accuracies_of_what_to_expect_stand_in_the_evidence() -> None:
    (table,) = [table for table in tables(page("docs/does-it-help.md")) if table[0][0] == "data, training images"]
    found = [figure for row in table[1:] for figure in figures(row[2:-1])]
    assert len(found) >= 15
    assert not [figure for figure in found if not any(figure in text for text in EVIDENCE.values())]


def test_the_tree_of_the_source_names_files_that_are_there() -> None:
    (tree,) = [block.text for block in blocks(page("docs/source.md")) if block.language == "text"]
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


def test_every_package_says_what_each_of_its_modules_is_for() -> None:
    for folder in sorted(path for path in (ROOT / "src" / "deitkit").rglob("*") if (path / "__init__.py").is_file()):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        modules = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
        assert not [name for name in modules if not re.search(rf"^\s*{name}(\.py)?\b", text, re.MULTILINE)], folder.name
