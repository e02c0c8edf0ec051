"""What a result looks like in a table on the terminal: largest class, teacher and heads, each with its accuracy and its cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deitkit.config import HEADS
from deitkit.data.caching import cache_folder
from deitkit.terminal import percent, plural, quoted

UNEVEN = 1.5
"""Classes are uneven if the largest has more than so many times the images of the smallest."""


FEW = 50
"""With fewer validation images the user is told what one of them makes."""


def short_teacher(teacher: str) -> str:
    """A teacher's name without folders and the suffix of its file; of an ensemble, each; of the store of fitted ones, `auto (lite0)`."""
    path = Path(teacher)
    if path.parent == cache_folder() / "teachers":
        return f"auto ({path.name.rpartition('-')[0]})"

    def last(part: str) -> str:
        model, _, file = part.partition("@")
        return f"{model}@{Path(file).stem}" if file and "/" not in model else Path(part).name

    parts = teacher.split("+")
    return "+".join(map(last, parts)) if all(parts) else Path(teacher).name


def is_uneven(result: Mapping[str, Any]) -> bool:
    """Whether balanced accuracy stands beside accuracy in the tables of this result."""
    return bool(result.get("largest_class", 0) > UNEVEN * result.get("smallest_class", 1) and result.get("balanced"))


class HeadRow(NamedTuple):
    """A row of a table: the teacher, or a head."""

    title: str
    top1: float | None
    balanced: float | None


def head_rows(result: Mapping[str, Any]) -> list[HeadRow]:
    """The teacher, then the heads that the network has."""
    teacher, top1, balanced = result.get("teacher"), result["top1"], result.get("balanced") or {}
    rows = []
    if teacher:
        rows = [HeadRow(f"teacher {short_teacher(teacher['name'])}", teacher["top1"], balanced.get("teacher"))]
    titles = {"cls": result["model"]} if top1.get("dist") is None else HEADS
    return [*rows, *(HeadRow(title, top1[head], balanced.get(head)) for head, title in titles.items())]


def accuracy_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the largest class, the teacher and the heads, each accuracy with its standard error, and balanced accuracy where
    the classes are uneven. Not the fused logits, which hardly ever differ from the fused probabilities."""
    heads = [row for row in head_rows(result) if row.title != HEADS["fused_logits"]]
    rows = [HeadRow("largest class", result.get("largest_class"), None), *heads]
    uneven = is_uneven(result)
    columns = ["network", "top-1 %", "± s.e.", *(["balanced %"] if uneven else [])]
    return columns, [
        [
            row.title,
            percent(row.top1),
            percent(standard_error(row.top1, result["n"])),
            *([percent(row.balanced)] if uneven else []),
        ]
        for row in rows
        if row.top1 is not None
    ]


def result_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """`accuracy_table` of a finished training, with what teacher and student cost, in the rows of the teacher and of the prediction that
    both heads, or the only one, make, which is the last."""
    teacher, seconds = result.get("teacher"), result.get("seconds_per_image") or {}
    columns, rows = accuracy_table(result)
    costs = {rows[-1][0]: _costs(result, seconds.get("student"))}
    if teacher:
        costs[head_rows(result)[0].title] = _costs(teacher, seconds.get("teacher"))
    return [*columns, "params", "GMAC", "images/s"], [[*row, *costs.get(row[0], ("", "", ""))] for row in rows]


def evaluation_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """`accuracy_table` of an evaluation, with each head's agreement with the teacher."""
    columns, rows = accuracy_table(result)
    agreement = result.get("agreement")
    if not agreement:
        return columns, rows
    shares = {HEADS[head]: percent(share) for head, share in agreement.items() if share is not None}
    shares[rows[-1][0]] = shares.get(rows[-1][0], shares[HEADS["cls"]])  # the only head has the network's name
    return [*columns, "agrees with teacher %"], [[*row, shares.get(row[0], "-")] for row in rows]


def standard_error(share: float, images: int) -> float:
    """Of an accuracy; of 0 or 100 % that of two more right and two more wrong images (Agresti, Coull 1998)."""
    if share in (0, 1):
        share, images = (share * images + 2) / (images + 4), images + 4
    return math.sqrt(share * (1 - share) / images)


def _costs(facts: Mapping[str, Any], seconds: float | None) -> tuple[str, str, str]:
    counted = "params" in facts and seconds is not None  # not so of a tape's teacher, or of a run of an earlier version
    size = (f"{facts['params'] / 1e6:.2f} M", f"{facts['macs'] / 1e9:.3f}") if counted else ("", "")
    return *size, f"{1 / seconds:,.0f}" if seconds else ""


def fused_or_only(top1: Mapping[str, Any]) -> float:
    """The accuracy that is shown first."""
    share: float = top1["cls"] if top1.get("fused") is None else top1["fused"]
    return share


def coarseness(images: int) -> str | None:
    """What to say of accuracies that are measured on fewer than `FEW` images."""
    if images >= FEW:
        return None
    return f"{plural(images, 'validation image')}: one is {100 / images:.1f} points; add some, or hold out more (--val-fraction 0.3)"


def disappointment(result: Mapping[str, Any]) -> str | None:
    """What to say of a student that gives all images one class, or is no better than what costs less: the largest class, or its teacher
    (by more than two standard errors of the difference; by more than one it is a hint)."""
    top1, n, teacher = result["top1"], result["n"], result.get("teacher")
    if result.get("untrained_heads"):
        return "features alone were learned: the classifiers are untrained"
    if result.get("predicted_classes") == 1:
        return "the student gives all images one class: it has learned nothing: give it more epochs, or a smaller --lr"
    best = fused_or_only(top1)
    if best <= result.get("largest_class", 0):
        return "the student is no better than predicting the largest class: give it more epochs or images"
    its = teacher["top1"] if teacher else 0.0
    lower, error = its - best, math.sqrt((best * (1 - best) + its * (1 - its)) / n)
    if lower <= error:
        return None
    how = f" (deit predict {quoted(teacher['name'])} IMAGE...)" if teacher and Path(teacher["name"]).is_dir() else ""
    if lower <= 2 * error:
        return f"the teacher is {100 * lower:.1f} points more accurate, which {n:,} images do not prove: perhaps predict with it{how}"
    return f"the teacher is {100 * lower:.1f} points more accurate than the student: predict with it{how}, or try more epochs"
