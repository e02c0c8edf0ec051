"""How a comparison looks: tables that fit a terminal, plots with room for their content, names."""

from __future__ import annotations

import re
import textwrap
import warnings
from pathlib import Path

import pytest
from tests.comparison.test_results import BASE, compared, row, run

from deitkit.comparison import report
from deitkit.comparison.plan import short_name
from deitkit.comparison.report import machine_lines, narrow, notes, show, table
from deitkit.data.caching import cache_folder
from deitkit.terminal import PlainProgress, TerminalProgress
from deitkit.training.tables import short_teacher


@pytest.mark.parametrize(
    "name", ["zscore", "zscore-mixed-photos", "a-contender-whose-name-takes-all-of-its-sixty-letters-no-000"]
)
@pytest.mark.parametrize("teachers", [("cnn", "cnn"), ("resnet18", "cifar-resnet56@/data/first.safetensors")])
@pytest.mark.parametrize("terminal", [PlainProgress, TerminalProgress])
def test_the_table_fits_80_columns_and_no_word_is_cut(
    name: str,
    teachers: tuple[str, str],
    terminal: type[PlainProgress | TerminalProgress],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    two = [
        row(who, [run(seed, 0.9 - 0.11 * seed, 0.93 - 0.21 * seed) for seed in (0, 1)], {"name": of, "top1": 1.0})
        for who, of in zip((name, f"{name[:-1]}1"), teachers, strict=True)
    ]
    result = compared(row(BASE, [run(0, 0.9), run(1, 0.91)]), *two)
    clock = {"training_minutes": 1.0, "recording_minutes": 0.0, "fitting_minutes": 0.0, "teacher_share": 0.1}
    nothing = {"findings": {"val": [], "test": []}, "failed": [], "clock": clock}
    show({**result, **nothing, "largest_class": 0.103}, terminal())
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out + err
    words = re.split(r"\s{2,}|\n", out)
    columns, cells = table(result, "val")
    kept, _ = narrow(columns, cells)
    assert {"contender", "accuracy", "diff.", "95 % interval"} <= set(kept)
    assert {"class head", "dist. head"} <= set(kept) or len(name) > 10
    for line in cells:
        shown = dict(zip(columns, line, strict=True))
        assert set(textwrap.wrap(shown["contender"], 26)) | {shown[column] for column in kept[1:]} <= set(words)
    assert "largest class: 10.30 % of the validation images" in err
    for of in teachers:
        assert f"{short_teacher(of)}, 100.00 %" in err


def test_the_teachers_have_a_column_only_if_they_differ() -> None:
    base = row(BASE, [run(0, 0.5)])
    same = [row(name, [run(0, 0.6, 0.6)], {"name": "runs/cnn", "top1": 0.9}) for name in ("hard", "zscore")]
    assert "teacher" not in table(compared(base, *same), "val")[0]
    other = row("soft", [run(0, 0.6, 0.6)], {"name": "runs/big", "top1": 0.95})
    columns, cells = table(compared(base, *same, other), "val")
    assert [line[columns.index("teacher")] for line in cells] == ["-", "cnn, 90.00 %", "cnn, 90.00 %", "big, 95.00 %"]


def test_averaged_teachers_are_called_by_all_of_their_names() -> None:
    assert short_name("runs/a+runs/b") == "a+b"
    assert short_name("cifar-resnet20@x/y.safetensors+cifar-resnet56@z") == "cifar-resnet20+cifar-resnet56"
    rows = [
        row(BASE, [run(0, 0.5)]),
        row("both", [run(0, 0.6, 0.6)], {"name": "runs/a+runs/b", "top1": 0.9, "test_top1": 0.8}),
    ]
    assert "teacher accuracy: a+b, 90.00 %" in notes(compared(*rows), "val")
    assert "teacher accuracy: a+b, 80.00 %" in notes(compared(*rows), "test")


def test_machines_that_read_alike_are_named_once() -> None:
    machine = {"processor": "p", "cores": 2, "threads": 1, "gpus": [], "versions": {"torch": "2", "deitkit": "0"}}
    two = [{**machine, "revision": revision} for revision in ("a", "b")]
    assert machine_lines({"environments": two}) == ["p, 2 cores, 1 thread, torch 2, deitkit 0"]


@pytest.mark.parametrize("count", [2, 30])
def test_long_names_leave_room_for_what_they_name(count: int, tmp_path: Path) -> None:
    def name(number: int) -> str:
        return f"a-contender-whose-name-takes-all-of-its-sixty-letters-no-{number:03d}"

    rows = [row(BASE, [run(0, 0.5, 0.5, [0.1, 0.2]), run(1, 0.6, 0.6, [0.1, 0.2])])]
    for number in range(count):
        runs = [run(seed, 0.6, 0.6 + 0.01 * seed + 0.001 * number, [0.1, 0.2]) for seed in (0, 1)]
        rows.append(row(name(number), runs))
    result = compared(*rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, of axes for which there is no room
        for figure in (report.differences(result, "val"), report.tokens(result)):
            assert figure is not None
            (tmp_path / "figure.svg").write_text(figure)
            frame = re.search(r'id="[a-z-]*patch_2">\s*<path d="M ([\d.]+) [\d.]+ \s*L ([\d.]+)', figure)
            assert frame is not None
            left, right = map(float, frame.groups())
            assert right - left > 250  # points, of 540
            text = re.sub(r"<[^>]+>", "", figure)
            assert f"no-{count - 1:03d}" in text


@pytest.mark.parametrize(
    ("teacher", "short"),
    [
        ("/data/me@host/runs/cnn", "cnn"),
        ("cifar-resnet56@/a/first.safetensors", "cifar-resnet56@first"),
        ("runs/fitted+cifar-resnet56@second.safetensors", "fitted+cifar-resnet56@second"),
        ("runs/a++/", "a++"),
        ("torchvision:resnet50", "torchvision:resnet50"),
    ],
)
def test_a_teacher_is_shown_by_the_last_part_of_its_name(teacher: str, short: str) -> None:
    assert short_teacher(teacher) == short


def test_a_stored_automatic_teacher_is_shown_by_its_model() -> None:
    assert short_teacher(str(cache_folder() / "teachers" / "lite0-0123456789ab")) == "auto (lite0)"
    assert short_teacher(str(cache_folder() / "teachers" / "cifar-resnet20-0123456789ab")) == "auto (cifar-resnet20)"
