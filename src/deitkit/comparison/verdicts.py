"""What the figures of a comparison say in words: who is above whom, how sure that is, which teacher is the best one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from deitkit.comparison.intervals import Difference, finding, paired_difference
from deitkit.comparison.plan import ComparisonPlan


def findings(rows: Sequence[dict[str, Any]], plan: ComparisonPlan, split: str) -> list[str]:
    """A sentence for every contender but the baseline, then what its heads say; in a ranking the best comes first."""
    sentences, heads = [], []
    for row in ranked(rows, split) if plan.ranked else rows:
        if row[split] is None:
            continue
        between = row[split]["between_heads"]
        if between is not None and between["low"] is not None:
            heads.append(finding(f"{row['name']}: the distillation head", "the class head", as_points(between)))
        if row["name"] != plan.baseline:
            gap = row[split]["difference"]
            sentences.append(finding(row["name"], row["against"], None if gap is None else as_points(gap)))
    return (_verdict(rows, split) if plan.ranked else []) + sentences + heads


def _verdict(rows: Sequence[dict[str, Any]], split: str) -> list[str]:
    """Which teacher is the best one for the student, whether any is, and how sure that is."""
    best = ranking(rows, split)
    if len(best) < 2:
        return []
    one, second = best[:2]
    if ranked(rows, split)[0]["teacher"] is None:
        return [f"the student reaches most without a teacher; of the teachers {one['name']} harms it least"]
    verdict = f"the student reaches most with {one['name']}: {percent(one['mean'])} %"
    wiser = max(best, key=lambda other: other["teacher_top1"] or 0.0)
    if one["teacher_top1"] is not None and wiser["teacher_top1"] > one["teacher_top1"]:
        verdict += (
            f"; {wiser['name']} is the better network ({percent(wiser['teacher_top1'])} against "
            f"{percent(one['teacher_top1'])} %), but not the better teacher here"
        )
    by_name = {row["name"]: compared(row, split) for row in rows if row[split] is not None}
    gap = paired_difference(by_name[one["name"]], by_name[second["name"]])
    return [verdict, finding(one["name"], second["name"], None if gap is None else as_points(gap._asdict()))]


def as_points(gap: dict[str, Any]) -> Difference:
    """A difference of shares as one of percentages."""
    mean, sd, low, high = (None if gap[key] is None else 100 * gap[key] for key in ("mean", "sd", "low", "high"))
    assert mean is not None
    return Difference(gap["pairs"], mean, sd, low, high)


def ranked(rows: Sequence[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """Best first, by their mean over the seeds that all of them have; those without a figure last."""
    return sorted(rows, key=lambda row: _mean_of_common(rows, row, split), reverse=True)


def _mean_of_common(rows: Sequence[dict[str, Any]], row: dict[str, Any], split: str) -> float:
    """Mean of a contender over the seeds that all have, or over its own where none is; -1 without a figure."""
    if row[split] is None:
        return -1.0
    own = compared(row, split)
    common = set(own).intersection(*(compared(other, split) for other in rows if other[split] is not None))
    return math.fsum(own[seed] for seed in common or own) / len(common or own)


def ranking(rows: Sequence[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """The teachers by what the student reaches."""
    found = []
    for row in ranked(rows, split):
        if row["teacher"] is not None and row[split] is not None:
            right = teachers_top1(row["teacher"], split)
            mean = _mean_of_common(rows, row, split)
            found.append({"name": row["name"], "mean": mean, "teacher": row["teacher"]["name"], "teacher_top1": right})
    return found


def teachers_top1(teacher: dict[str, Any], split: str) -> float | None:
    """A teacher's accuracy on a split, where it is known."""
    right: float | None = teacher["top1"] if split == "val" else teacher.get("test_top1")
    return right


def compared(row: dict[str, Any], split: str) -> dict[int, float]:
    """Accuracy of the fused, or the only, head by seed."""
    head = row[split]["compared"]
    return {run["seed"]: run[split]["top1"][head] for run in row["runs"] if run[split] is not None}


def percent(share: float) -> str:
    return f"{100 * share:.2f}"
