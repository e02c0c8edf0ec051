"""Means, spreads and paired differences over seeds: pure functions of plain numbers.

What the figures of a comparison say in words: who is above whom, how sure that is, which teacher is the best one.

What a comparison found, gathered from its run folders. Nothing is computed on images here.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t as student_t

from deitkit.compare.plan import ComparisonPlan, Contender
from deitkit.compare.tapes import TAPES, complete_views, recording_clock
from deitkit.config import HEADS, RunConfig
from deitkit.terminal import UserError
from deitkit.training.run import RunFolder

CONFIDENCE = 0.95
NO_SPREAD = 1e-9
"""Shares of images that are this close are the same."""


class Spread(NamedTuple):
    """n figures of one contender."""

    n: int
    mean: float
    sd: float | None
    """with n - 1 below; None for a single figure"""


class Difference(NamedTuple):
    """How far a contender is above the baseline, seed by seed."""

    pairs: int
    mean: float
    sd: float | None
    low: float | None
    """the interval's ends; None for a single pair, and where no pair differs from another (accuracies go by whole images):
    that says nothing about another seed"""
    high: float | None

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard deviation; None where there is nothing."""
    if not values:
        return None
    return Spread(len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def paired_difference(own: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Mean of own - baseline over the seeds that both have, with its two-sided t interval (`CONFIDENCE`): mean ± t(n - 1)
    · sd / √n. None where they share no seed.

    The interval is about what a seed changes - initial weights, order, stochastic depth - for these images and views."""
    gaps = [own[seed] - baseline[seed] for seed in own if seed in baseline]
    found = spread(gaps)
    if found is None:
        return None
    n, mean, sd = found
    if sd is None or sd < NO_SPREAD:
        return Difference(n, mean, sd, None, None)
    reach = float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return Difference(n, mean, sd, mean - reach, mean + reach)


def finding(name: str, baseline: str, difference: Difference | None, unit: str = "points") -> str:
    """In words what a difference says, and what it does not. The figures are percentages already."""
    if difference is None:
        return f"{name} and {baseline} have no finished seed in common"
    pairs, mean, _, low, high = difference
    where = f"{abs(mean):.2f} {unit} {'above' if mean >= 0 else 'below'}"
    if low is None or high is None:
        seeds = (
            "the one seed that both have: one pair has"
            if pairs == 1
            else f"each of {pairs} seeds: pairs without a spread have"
        )
        return f"{name} is {where} {baseline} in {seeds} no interval, and say{'s' if pairs == 1 else ''} little"
    interval = f"95 % interval {low:.2f} to {high:.2f}, {pairs} seeds"
    if difference.sure:
        return f"{name} is {where} {baseline} ({interval})"
    return f"{name} cannot be told from {baseline}: {where} it ({interval})"


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


SPLITS = {"val": "validation", "test": "test"}
KEPT = ("n", "top1", "top5", "agreement", "heads_agree", "nll", "ece")
"""What is kept of a run's figures on a split."""


class Failure(NamedTuple):
    """A contender, or one of its runs, that came to nothing."""

    contender: str
    seed: int | None
    why: str


def run_path(out: Path, name: str, seed: int) -> Path:
    return out / "runs" / f"{name}-seed-{seed}"


def collected(
    out: Path, plan: ComparisonPlan, contenders: Sequence[Contender], failures: Sequence[Failure]
) -> dict[str, Any]:
    """What `comparison.json` says: plain values, shares between 0 and 1; all that is time stands under `clock`."""
    rows = [_contender(out, plan, contender) for contender in contenders]
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        base = by_name[row["against"]]
        for split in SPLITS:
            if row[split] is not None and base[split] is not None and row is not base:
                difference = paired_difference(compared(row, split), compared(base, split))
                row[split]["difference"] = None if difference is None else difference._asdict()
    dataset = contenders[0].dataset
    return {
        "format": 1,
        "data": dataset.name,
        "images": dataset_images(rows),
        "baseline": plan.baseline,
        "seeds": list(plan.seeds),
        "shared": plan.shared,
        "contenders": rows,
        "findings": {split: findings(rows, plan, split) for split in SPLITS},
        "ranking": {split: ranking(rows, split) for split in SPLITS} if plan.ranked else None,
        "failed": [failure._asdict() for failure in failures],
        "environments": _environments(out, rows),
        "clock": {**_total(rows), "budget_minutes": plan.budget_minutes, "date": date.today().isoformat()},
    }


def _contender(out: Path, plan: ComparisonPlan, contender: Contender) -> dict[str, Any]:
    """Everything about one contender but its difference from the baseline."""
    name = contender.name
    paths = {seed: run_path(out, name, seed) for seed in plan.seeds}
    runs = [_run(out, path, seed) for seed, path in paths.items() if RunFolder(path).finished]
    taught = next((run["teacher"] for run in runs if run["teacher"]), None)
    training = sum(run["clock"]["minutes"] for run in runs)
    tapes: dict[str, int] = {}
    for run in runs:
        if run["tape"] is not None:
            tape = str(_moved_with(out / TAPES, run["tape"]).resolve())
            tapes[tape] = max(tapes.get(tape, 0), run["views"])
    fitted = None
    if taught and contender.config.teacher.teacher == "auto":
        fitted = str(_moved_with(out.parent, taught["name"]).resolve())
    clock = {
        "training_minutes": training,
        "recording_minutes": sum(_recording_minutes(tape, views) for tape, views in tapes.items()),
        "fitting_minutes": _fitting_minutes(fitted),
    }
    return {
        "name": name,
        "against": plan.against.get(name, plan.baseline),
        "settings": plan.contenders[name],
        "teacher": taught,
        "fitted": fitted,
        "tapes": tapes,
        "runs": runs,
        **{split: figures_of(runs, split) for split in SPLITS},
        "clock": {**clock, "teacher_share": _teacher_share(clock)},
    }


def _moved_with(home: Path, stored: str) -> Path:
    """A folder where it was, or beside those that it was made with, where all have been moved."""
    return Path(stored) if Path(stored).exists() else home / Path(stored).name


def _run(out: Path, path: Path, seed: int) -> dict[str, Any]:
    """What is known of one finished run. Raises UserError where its files say something else than figures."""
    try:
        return _read(out, path, seed)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: its files are damaged: remove that folder, and give --resume again: {error}"
        ) from error


def _read(out: Path, path: Path, seed: int) -> dict[str, Any]:
    folder = RunFolder(path)
    summary, config = folder.summary(), folder.config(RunConfig)
    teacher = summary["teacher"]
    if teacher is not None:
        teacher = {"name": teacher["name"].removesuffix(" (taped)"), "top1": teacher["top1"]}
    _refuse_no_share(summary)
    test = _tested(path / "evaluation-test.json")
    if test is not None and teacher is not None and test["teacher"] is not None:
        teacher["test_top1"] = test["teacher"]["top1"]
    return {
        "seed": seed,
        "run": path.relative_to(out).as_posix(),
        "teacher": teacher,
        "tape": config.teacher.tape,
        "views": config.view.views,
        **{key: summary[key] for key in ("model", "params", "macs", "steps", "epochs", "images_seen", "token_cosine")},
        "val": {key: summary[key] for key in KEPT},
        "test": None if test is None else {key: test[key] for key in KEPT},
        "clock": {"minutes": float(summary["seconds"]) / 60},
    }


def _tested(path: Path) -> dict[str, Any] | None:
    """What was found on the test images, where they have been looked at. Raises UserError."""
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _refuse_no_share(found)
        _ = [found[key] for key in KEPT], found["teacher"] and found["teacher"]["top1"]
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged: remove it, and --split test evaluates again") from error


def _refuse_no_share(figures: dict[str, Any]) -> None:
    """Raises ValueError, or another error, where accuracies are no shares."""
    shares = [figures["top1"][head] for head in HEADS]
    if not all(share is None or 0 <= share <= 1 for share in shares[1:]) or not 0 <= shares[0] <= 1:
        raise ValueError(f"top1: {shares}")


def figures_of(runs: Sequence[dict[str, Any]], split: str) -> dict[str, Any] | None:
    """Mean and standard deviation of every head over the runs that were measured on `split`."""
    measured = [run for run in runs if run[split] is not None]
    if not measured:
        return None
    heads = {}
    for head in HEADS:
        found = spread([run[split]["top1"][head] for run in measured if run[split]["top1"][head] is not None])
        heads[head] = None if found is None else found._asdict()
    between = None
    if heads["dist"] is not None:
        dist, cls = ({run["seed"]: run[split]["top1"][head] for run in measured} for head in ("dist", "cls"))
        between = paired_difference(dist, cls)
    return {
        "n": len(measured),
        "heads": heads,
        "between_heads": None if between is None else between._asdict(),
        "compared": "fused" if heads["fused"] else "cls",
        "difference": None,
    }


def dataset_images(rows: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    """How many images the figures of each split are of."""
    counts = {}
    for split in SPLITS:
        found = [run[split]["n"] for row in rows for run in row["runs"] if run[split] is not None]
        counts[split] = found[0] if found else None
    return counts


def _recording_minutes(tape: str, views: int) -> float:
    """What recording that many views of a tape took."""
    there = complete_views(Path(tape))
    return recording_clock(Path(tape))["seconds"] / 60 * min(1.0, views / max(1, there))


def _fitting_minutes(fitted: str | None) -> float:
    """What fitting a teacher took; 0 where none was fitted, or its folder is gone."""
    try:
        return 0.0 if fitted is None else float(RunFolder(Path(fitted)).summary()["seconds_with_preparation"]) / 60
    except (UserError, KeyError, TypeError):
        return 0.0


def _teacher_share(clock: dict[str, float]) -> float | None:
    """Share of the minutes that went into the teacher: fitting it, and writing down its answers."""
    teacher = clock["recording_minutes"] + clock["fitting_minutes"]
    total = teacher + clock["training_minutes"]
    return teacher / total if total else None


def _total(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The minutes of all; a tape, or a fit, that several learn from counts once."""
    tapes: dict[str, int] = {}
    for row in rows:
        for tape, views in row["tapes"].items():
            tapes[tape] = max(views, tapes.get(tape, 0))
    clock = {
        "training_minutes": sum(row["clock"]["training_minutes"] for row in rows),
        "recording_minutes": sum(_recording_minutes(tape, views) for tape, views in tapes.items()),
        "fitting_minutes": sum(_fitting_minutes(name) for name in {row["fitted"] for row in rows}),
    }
    return {**clock, "teacher_share": _teacher_share(clock)}


def _machine(path: Path) -> dict[str, Any] | None:
    """What a run was made on; None where that is not known any more."""
    try:
        machine = json.loads(path.read_text(encoding="utf-8"))
        needed = {"processor", "cores", "threads", "gpus", "versions"}
        if not needed <= set(machine) or not {"torch", "deitkit"} <= set(machine["versions"]):
            return None
        return {key: value for key, value in machine.items() if key != "command"}
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _environments(out: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The machines and versions that the runs were made with, each once."""
    found: list[dict[str, Any]] = []
    for run in (run for row in rows for run in row["runs"]):
        machine = _machine(out / run["run"] / "environment.json")
        if machine is not None and machine not in found:
            found.append(machine)
    return found
