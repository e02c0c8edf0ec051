"""What a comparison says of its figures, and how it looks."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from deitkit.compare import report as plots
from deitkit.compare.plan import plan_from, settings_of_contender, short_name
from deitkit.compare.report import machine_lines, short_teacher, table
from deitkit.compare.results import compared as by_seed
from deitkit.compare.results import figures_of, findings, paired_difference, ranked, ranking

BASE = "none"


def run(seed: int, cls: float, dist: float | None = None, cosine: list[float] | None = None) -> dict[str, Any]:
    """A finished run, right on the test images as often as on the validation images less a tenth."""
    fused = None if dist is None else (cls + dist) / 2
    top1 = {"cls": cls, "dist": dist, "fused": fused, "fused_logits": fused}
    less = {head: None if share is None else share - 0.1 for head, share in top1.items()}
    return {"seed": seed, "run": "x", "val": {"top1": top1}, "test": {"top1": less}, "token_cosine": cosine}


def row(name: str, runs: list[dict[str, Any]], teacher: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    made = {"name": name, "against": BASE, "runs": runs, "teacher": teacher, "tapes": {}, "fitted": None, **more}
    made["clock"] = {"training_minutes": 1.0, "recording_minutes": 0.0, "fitting_minutes": 0.0, "teacher_share": 0.0}
    for split in ("val", "test"):
        made[split] = figures_of(runs, split)
    return made


def compared(*rows: dict[str, Any]) -> dict[str, Any]:
    """What `comparison.json` would say of them."""
    by_name = {one["name"]: one for one in rows}
    for one in rows:
        for split in ("val", "test"):
            base = by_name[one["against"]]
            if one is not base:
                gap = paired_difference(by_seed(one, split), by_seed(base, split))
                one[split]["difference"] = None if gap is None else gap._asdict()
    images = {"val": 100, "test": 100}
    return {"data": "x", "contenders": list(rows), "baseline": BASE, "seeds": [0, 1], "images": images, "ranking": None}


def ranking_plan(*names: str) -> Any:
    contenders = {BASE: {"distillation": "none"}, **{name: {"teacher": name} for name in names}}
    return plan_from({"baseline": BASE, "contenders": contenders, "ranked": True}, "plan")


def test_a_teacher_that_harms_is_not_recommended() -> None:
    rows = [
        row(BASE, [run(0, 0.9), run(1, 0.91)]),
        row("a", [run(0, 0.8, 0.8), run(1, 0.82, 0.82)], {"name": "a", "top1": 0.9}),
        row("b", [run(0, 0.7, 0.7), run(1, 0.72, 0.72)], {"name": "b", "top1": 0.9}),
    ]
    compared(*rows)
    said = findings(rows, ranking_plan("a", "b"), "val")
    assert said[0] == "the student reaches most without a teacher; of the teachers a harms it least"


def test_a_baseline_may_have_a_teacher() -> None:
    rows = [
        row(BASE, [run(0, 0.9, 0.9), run(1, 0.91, 0.91)], {"name": "c", "top1": 0.9}),
        row("a", [run(0, 0.8, 0.8), run(1, 0.82, 0.82)], {"name": "a", "top1": 0.9}),
    ]
    compared(*rows)
    assert findings(rows, ranking_plan("a"), "val")[0] == f"the student reaches most with {BASE}: 90.50 %"
    tested = findings(rows, ranking_plan("a"), "test")  # nobody knows how good the teachers are there
    assert tested[0] == f"the student reaches most with {BASE}: 80.50 %"


def test_the_first_two_teachers_are_told_apart_or_not() -> None:
    rows = [
        row(BASE, [run(0, 0.5), run(1, 0.5)]),
        row("a", [run(0, 0.80, 0.80), run(1, 0.82, 0.82)], {"name": "a", "top1": 0.9, "test_top1": 0.6}),
        row("b", [run(0, 0.81, 0.81), run(1, 0.79, 0.79)], {"name": "b", "top1": 0.8, "test_top1": 0.7}),
    ]
    compared(*rows)
    said = findings(rows, ranking_plan("a", "b"), "val")
    assert said[0] == "the student reaches most with a: 81.00 %"
    assert said[1].startswith("a cannot be told from b: 1.00 points above it (95 % interval")
    # On the test images their own accuracy there counts.
    tested = findings(rows, ranking_plan("a", "b"), "test")
    assert tested[0].startswith(
        "the student reaches most with a: 71.00 %; b is the better network (70.00 against 60.00 %)"
    )


def test_contenders_are_ranked_by_the_seeds_that_all_have() -> None:
    lucky = row("lucky", [run(1, 0.9, 0.9)], {"name": "x", "top1": 0.9})
    steady = row("steady", [run(0, 0.5, 0.5), run(1, 0.91, 0.91)], {"name": "y", "top1": 0.9})
    rows = [row(BASE, [run(0, 0.1), run(1, 0.1)]), lucky, steady]
    assert [one["name"] for one in ranked(rows, "val")] == ["steady", "lucky", BASE]
    assert ranking(rows, "val")[0]["mean"] == pytest.approx(0.91)


def test_both_heads_are_held_against_each_other() -> None:
    taught = row("zscore", [run(0, 0.60, 0.63), run(1, 0.61, 0.65), run(2, 0.60, 0.64)])
    rows = [row(BASE, [run(0, 0.5), run(1, 0.5), run(2, 0.5)]), taught]
    compared(*rows)
    said = findings(rows, plan_from({"baseline": BASE, "contenders": {BASE: {}, "zscore": {"epochs": 2}}}, "p"), "val")
    assert said[1].startswith(
        "zscore: the distillation head is 3.67 points above the class head (95 % interval 2.23 to"
    )


def test_averaged_teachers_are_called_by_all_of_their_names() -> None:
    assert short_name("runs/a+runs/b") == "a+b"
    assert short_name("cifar-resnet20@x/y.safetensors+cifar-resnet56@z") == "cifar-resnet20+cifar-resnet56"
    rows = [
        row(BASE, [run(0, 0.5)]),
        row("both", [run(0, 0.6, 0.6)], {"name": "runs/a+runs/b", "top1": 0.9, "test_top1": 0.8}),
    ]
    _, _, cells = table(compared(*rows), "val")
    assert "a+b, 90.00 %" in cells[1]


def test_a_contender_s_preset_stands_for_how_its_views_look() -> None:
    shared = {"augment": "deit", "mixup_alpha": 0.2, "view_seed": 7, "repeated_aug": 3}
    contenders = {"a": {}, "b": {"augment": "none"}, "c": {"augment": "none", "mixup_alpha": 0.3}}
    plan = plan_from({"baseline": "a", "shared": shared, "contenders": contenders}, "plan")
    assert settings_of_contender(plan, "a") == shared
    assert settings_of_contender(plan, "b") == {"augment": "none", "view_seed": 7, "repeated_aug": 3}
    assert settings_of_contender(plan, "c")["mixup_alpha"] == 0.3


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
        for figure in (plots.differences(result, "val"), plots.tokens(result)):
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
