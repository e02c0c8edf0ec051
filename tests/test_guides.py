"""What the guides tell people to type works, as they say it; what they say of files, messages and flags is so."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deitkit import flags
from deitkit.cli import VERBS, main
from deitkit.config import ConfigT, FitConfig
from deitkit.settings import LENGTHS, build
from deitkit.training import fit as fitting
from pages import ROOT, blocks, commands, make_photos, page, tables

HOW_TO = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "howto").glob("*.md"))
GUIDES = ["docs/tutorial.md", "docs/python.md", *HOW_TO]
BY_HAND = page("docs/evidence/commands.md")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with PHOTOS, photo.jpg and a finished run in runs/first, as the guides assume it."""
    make_photos(tmp_path, 32, 12, unlabelled=3)
    monkeypatch.setattr(fitting, "ENLARGED", 64)
    monkeypatch.setattr(fitting, "TRAINING_COST", 1e9)  # there is never time to fine-tune a probe
    monkeypatch.setattr(flags, "build", shortened)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(kind: type[ConfigT], given: dict[str, Any], **others: Any) -> ConfigT:
    """`settings.build`, but a training whose command names no length takes two epochs, and no workers; not so for one that is resumed."""
    if others.get("resume"):
        return build(kind, given, **others)
    named = LENGTHS & given.keys() or issubclass(kind, FitConfig)
    return build(kind, {"workers": 0, **given} if named else {"length": "2ep", "workers": 0, **given}, **others)


def run_before() -> None:
    """What the README's quick start leaves, in less time."""
    assert (
        main(["train", "PHOTOS", "--teacher", "none", "--student", "deit_nano", "--epochs", "1", "--out", "runs/first"])
        == 0
    )


@pytest.mark.parametrize("name", GUIDES)
def test_commands_and_python_of_the_guides_run(name: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page(name)
    lines = list(commands(text))
    if not any("--out runs/first" in command.line and "--resume" not in command.line for command in lines):
        run_before()
    for command in lines:
        if command.why_not_run is None:
            assert main(command.words[1:]) == 0, command.line
    capsys.readouterr()
    for block in blocks(text):
        if block.language == "python":
            exec(compile(block.text, name, "exec"), {})
            assert "blue" in capsys.readouterr().out
    if name == "docs/tutorial.md":
        found = {path.name for path in Path("runs/first").rglob("*") if path.is_file()}
        assert {"config.yaml", "model.safetensors", "report-test.html"} <= found
        assert not [file for file in found if f"{file}`" not in page("docs/run-folder.md")]


def test_the_first_page_has_a_command_of_the_readme() -> None:
    readme = [command.line for command in commands(page("README.md"))]
    assert [command.line for command in commands(page("docs/index.md")) if command.line in readme] == [
        "deit train PHOTOS"
    ]


def test_commands_that_are_not_run_were_run_by_hand() -> None:
    """Each has a section of its own, word for word, in the page of evidence that has its output."""
    skipped = [
        command.line for name in ["README.md", *GUIDES] for command in commands(page(name)) if command.why_not_run
    ]
    assert 3 <= len(skipped) <= 12
    assert not [line for line in skipped if f"\n### `{line}`\n" not in BY_HAND]


def test_commands_of_the_readme_s_cases_stand_in_the_pages_that_they_link_to() -> None:
    (table,) = [table for table in tables(page("README.md")) if table[0][0] == "case"]
    assert len(table) > 6
    for _, command, link in table[1:]:
        target = re.findall(r"\((.*?)\)", link)[0]
        lines = [one.line for one in commands(page(target))]
        assert any(line.startswith(command) for line in lines), command


def flags_of(verb: str) -> str:
    """What its page of all flags says."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        main([*verb.split(), "--help-all"])
    return shown.getvalue() + " --no-unlabelled --steps --epochs --budget-minutes --length --help --help-all"


def test_commands_in_the_text_of_the_pages_have_flags_that_exist() -> None:
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "evidence"]
    found = [
        words
        for path in [ROOT / "README.md", *pages]
        for words in re.findall(r"`(deit [^`\n]+)`", path.read_text(encoding="utf-8"))
        if path.name != "decisions.md"
    ]
    assert len(found) > 60
    for line in found:
        words = line.split()[1:]
        named = [verb for verb in (" ".join(words[:2]), words[0]) if verb in VERBS]
        if words[0] in ("VERB", "--help") or (
            any(verb.startswith(words[0] + " ") for verb in VERBS) and len(words) == 1
        ):
            continue
        assert named, line
        known = flags_of(named[0])
        assert not [word for word in words if word.startswith("--") and not re.search(rf"{word}\b", known)], line


def messages() -> list[str]:
    """Every text of the program, with an ellipsis where it puts something in; texts that stand beside each other are one already."""
    found = []
    for path in (ROOT / "src" / "deitkit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_of_the_troubleshooting_page_are_those_of_the_program() -> None:
    known = "\n".join(messages())
    rows = [row for table in tables(page("docs/troubleshooting.md")) for row in table[1:]]
    assert len(rows) > 30
    for message, _ in rows:
        for part in re.split(r"…|: |`| \(exit code 2\)", message):
            assert part.strip(" :;,()'?") in known, message


def test_the_site_has_every_page_and_is_built_without_a_broken_link(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    html = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html"))
    assert "deitkit.api.Run" in html
    fetched = re.findall(r"<(?:script|img|link)\b[^>]*(?:src|href)=\"?(https?://[^\" >]+)", html)
    assert fetched == []


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = (ROOT / "examples" / name).read_text(encoding="utf-8")
    assert source.count("\n# %%") >= 3
    exec(compile(source, name, "exec"), {"__name__": "__main__"})
    assert "%" in capsys.readouterr().out


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 4
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile(cell, "first_steps.ipynb", "exec"), names)
    assert "validation accuracy" in capsys.readouterr().out
    assert (notebook["nbformat"], [cell for cell in notebook["cells"] if cell.get("outputs")]) == (4, [])
