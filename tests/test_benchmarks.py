"""The benchmarks can be started; what multiplies without measuring comes out as the documents have it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_imports_and_says_how_it_is_called(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(path.parent)  # as where it is called
    module = loaded(path)
    assert callable(module.main)
    assert f"python benchmarks/{path.name}" in (module.__doc__ or "")


def test_a_benchmark_uses_no_private_name_of_the_package() -> None:
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        imported = re.findall(r"^from deitkit[\w.]* import (?:\([^)]*\)|.*)$", text, re.MULTILINE)
        assert not [line for line in imported if re.search(r"[ (]_\w", line)], path.name
        assert not re.search(r"\btrainer\._", text), path.name


def test_the_plan_for_imagenet_is_that_of_the_evidence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["imagenet_plan.py", "plan"])
    loaded(ROOT / "benchmarks" / "imagenet_plan.py").main()
    said = capsys.readouterr().out
    planned = (ROOT / "docs/evidence/imagenet.md").read_text(encoding="utf-8").partition("## ImageNet, planned")[2]
    rows = re.findall(r"^\| `(deit_\w+)` \| (.*\d \|)$", planned, re.MULTILINE)
    assert len(rows) >= 7
    for student, figures in rows:
        gpu, _, rest = figures.replace(" (published rates)", "").partition(" | ")
        assert re.search(rf"^\| {student} \| [\d.]+ \| {gpu} \| {re.escape(rest)}$", said, re.MULTILINE), (student, gpu)
    records = re.search(r"hard labels 2 bytes, ([\d,]+) in all", planned)
    assert records is not None
    assert f"| hard | 2 B | {records[1]} B |" in said


def test_the_index_for_imagenet_is_made_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["index", "--images", "2000", "--headers", "10", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["imagenet_plan.py", *arguments])
    loaded(ROOT / "benchmarks" / "imagenet_plan.py").main()
    assert re.search(r"^2,000 images, 1,\d+ of them for training$", capsys.readouterr().out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []
