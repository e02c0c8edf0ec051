"""Means, intervals, rankings and verdicts of a comparison."""

from __future__ import annotations

from typing import Any

import pytest

from deitkit.comparison.plan import contender_config, plan_from
from deitkit.comparison.results import by_seed, figures_of, paired_difference, ranked, ranking, verdicts
from deitkit.config import AUGMENT_PRESETS

BASE = "none"


def run(seed: int, cls: float, dist: float | None = None, cosine: list[float] | None = None) -> dict[str, Any]:
    """A finished run; its test accuracy is its validation accuracy less 0.1."""
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
    """What `comparison.json` would have of them."""
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
    found = verdicts(rows, ranking_plan("a", "b"), "val")
    assert found[0] == "the student is most accurate without a teacher; the least harmful teacher is a"


def test_a_baseline_may_have_a_teacher() -> None:
    rows = [
        row(BASE, [run(0, 0.9, 0.9), run(1, 0.91, 0.91)], {"name": "c", "top1": 0.9}),
        row("a", [run(0, 0.8, 0.8), run(1, 0.82, 0.82)], {"name": "a", "top1": 0.9}),
    ]
    compared(*rows)
    assert verdicts(rows, ranking_plan("a"), "val")[0] == f"best teacher: {BASE}, student accuracy 90.50 %"
    tested = verdicts(rows, ranking_plan("a"), "test")  # nobody knows how good the teachers are there
    assert tested[0] == f"best teacher: {BASE}, student accuracy 80.50 %"


def test_the_first_two_teachers_are_told_apart_or_not() -> None:
    rows = [
        row(BASE, [run(0, 0.5), run(1, 0.5)]),
        row("a", [run(0, 0.80, 0.80), run(1, 0.82, 0.82)], {"name": "a", "top1": 0.9, "test_top1": 0.6}),
        row("b", [run(0, 0.81, 0.81), run(1, 0.79, 0.79)], {"name": "b", "top1": 0.8, "test_top1": 0.7}),
    ]
    compared(*rows)
    found = verdicts(rows, ranking_plan("a", "b"), "val")
    assert found[0] == "best teacher: a, student accuracy 81.00 %"
    assert found[1].startswith("no significant difference: a +1.00 points vs b (95 % interval")
    # On the test images their own accuracy there counts.
    tested = verdicts(rows, ranking_plan("a", "b"), "test")
    assert tested[0].startswith(
        "best teacher: a, student accuracy 71.00 %; b is more accurate itself (70.00 vs 60.00 %)"
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
    found = verdicts(rows, plan_from({"baseline": BASE, "contenders": {BASE: {}, "zscore": {"epochs": 2}}}, "p"), "val")
    assert found[1].startswith(
        "significant: zscore, distillation head +3.67 points vs its class head (95 % interval +2.2 to"
    )


def test_a_contender_s_preset_stands_for_how_its_views_look() -> None:
    shared = {"augment": "deit", "mixup_alpha": 0.2, "view_seed": 7, "repeated_aug": 3}
    contenders = {"a": {}, "b": {"augment": "none"}, "c": {"augment": "none", "mixup_alpha": 0.3}}
    plan = plan_from({"baseline": "a", "shared": shared, "contenders": contenders}, "plan")
    a, b, c = (contender_config(plan, name).view for name in plan.contenders)
    assert (a.augment, a.mixup_alpha, a.view_seed, a.repeated_aug) == ("deit", 0.2, 7, 3)
    assert (b.augment, b.mixup_alpha, b.view_seed, b.repeated_aug) == ("none", 0, 7, 3)
    assert b == AUGMENT_PRESETS["none"].model_copy(update={"view_seed": 7, "repeated_aug": 3})
    assert c.mixup_alpha == 0.3
