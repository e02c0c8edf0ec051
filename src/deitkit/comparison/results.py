"""What a comparison found: means, paired differences with intervals, verdicts, and `comparison.json` from the run folders.

Nothing is computed on images here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student_t

from deitkit.comparison.plan import TAPES, ComparisonPlan, Contender, complete_views
from deitkit.config import HEADS, RunConfig
from deitkit.terminal import UserError, parse_json, percent
from deitkit.training.run import RunFolder

CONFIDENCE = 0.95
NO_SPREAD = 1e-9
"""Accuracies that are this close are the same."""
SPLITS = {"val": "validation", "test": "test"}
KEPT = ("n", "top1", "top5", "agreement", "heads_agree", "nll", "ece")
"""What is kept of a run's figures on a split."""
CLOCK = "recording.json"
"""In a tape's folder: how long its recording took."""

# -------------------------------------------------------------------------------------- means and differences


class MeanSd(NamedTuple):
    """n figures of one contender."""

    n: int
    mean: float
    sd: float | None
    """with n - 1 in the denominator; None for a single figure"""


class Difference(NamedTuple):
    """How far a contender is above the baseline, seed by seed."""

    pairs: int
    mean: float
    sd: float | None
    low: float | None
    """the interval's ends; None for a single pair, and if all pairs differ by the same (accuracies are multiples of 1/n): that
    tells nothing about another seed"""
    high: float | None

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_sd(values: Sequence[float]) -> MeanSd | None:
    """Mean and standard deviation; None without values."""
    if not values:
        return None
    return MeanSd(len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def paired_difference(own: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Mean of own - baseline over the seeds that both have, with its two-sided t interval (`CONFIDENCE`): mean ± t(n - 1)
    · sd / √n. None if they share no seed.

    The interval is about what a seed changes - initial weights, order, stochastic depth - for these images and views."""
    found = mean_sd([own[seed] - baseline[seed] for seed in own if seed in baseline])
    if found is None:
        return None
    n, mean, sd = found
    if sd is None or sd < NO_SPREAD:
        return Difference(n, mean, sd, None, None)
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return Difference(n, mean, sd, mean - half, mean + half)


def as_points(gap: Mapping[str, Any] | None) -> Difference | None:
    """A difference of accuracies between 0 and 1, as `comparison.json` has it, in percentage points."""
    if gap is None:
        return None
    scaled: dict[str, Any] = {key: gap[key] and 100 * gap[key] for key in ("mean", "sd", "low", "high")}
    return Difference(gap["pairs"], **scaled)


def describe_difference(name: str, baseline: str, difference: Difference | None, unit: str = "points") -> str:
    """A difference and whether it is significant, in a sentence. The figures are in the `unit` already."""
    if difference is None:
        return f"{name} and {baseline} have no finished seed in common"
    pairs, mean, _, low, high = difference
    effect = f"{name} {mean:+.2f} {unit} vs {baseline}"
    if low is None or high is None:
        why = "a single pair of runs has" if pairs == 1 else f"all {pairs} pairs of runs differ by the same, so it has"
        return f"not tested: {effect} ({why} no confidence interval)"
    verdict = "significant" if difference.significant else "no significant difference"
    return f"{verdict}: {effect} (95 % interval {low:+.1f} to {high:+.1f}, {pairs} seeds)"


def verdicts(rows: Sequence[dict[str, Any]], plan: ComparisonPlan, split: str) -> list[str]:
    """A sentence for every contender except the baseline, then one for its heads; a ranking begins with the best teacher."""
    sentences = _best_teacher(rows, split) if plan.ranked else []
    heads = []
    for row in ranked(rows, split) if plan.ranked else rows:
        if row[split] is None:
            continue
        between = as_points(row[split]["between_heads"])
        if between is not None and between.low is not None:
            heads.append(describe_difference(f"{row['name']}, distillation head", "its class head", between))
        if row["name"] != plan.baseline:
            sentences.append(describe_difference(row["name"], row["against"], as_points(row[split]["difference"])))
    return sentences + heads


def _best_teacher(rows: Sequence[dict[str, Any]], split: str) -> list[str]:
    """Which teacher is the best for the student, if any is, and whether significantly so."""
    best = ranking(rows, split)
    if len(best) < 2:
        return []
    one, second = best[:2]
    if ranked(rows, split)[0]["teacher"] is None:
        return [f"the student is most accurate without a teacher; the least harmful teacher is {one['name']}"]
    sentence = f"best teacher: {one['name']}, student accuracy {percent(one['mean'])} %"
    most = max(best, key=lambda other: other["teacher_top1"] or 0.0)
    if one["teacher_top1"] is not None and most["teacher_top1"] > one["teacher_top1"]:
        own = f"{percent(most['teacher_top1'])} vs {percent(one['teacher_top1'])} %"
        sentence += f"; {most['name']} is more accurate itself ({own}) but not the better teacher here"
    by_name = {row["name"]: by_seed(row, split) for row in rows if row[split] is not None}
    gap = paired_difference(by_name[one["name"]], by_name[second["name"]])
    return [sentence, describe_difference(one["name"], second["name"], as_points(gap and gap._asdict()))]


def ranked(rows: Sequence[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """Best first, by their mean over the seeds that all of them have; those without a figure last."""
    return sorted(rows, key=lambda row: _mean_of_common(rows, row, split), reverse=True)


def ranking(rows: Sequence[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """The contenders with a teacher by the student's accuracy."""
    return [
        {
            "name": row["name"],
            "mean": _mean_of_common(rows, row, split),
            "teacher": row["teacher"]["name"],
            "teacher_top1": teacher_top1(row["teacher"], split),
        }
        for row in ranked(rows, split)
        if row["teacher"] is not None and row[split] is not None
    ]


def _mean_of_common(rows: Sequence[dict[str, Any]], row: dict[str, Any], split: str) -> float:
    """Mean of a contender over the seeds that all have, or over its own if there is none; -1 without a figure."""
    if row[split] is None:
        return -1.0
    own = by_seed(row, split)
    common = set(own).intersection(*(by_seed(other, split) for other in rows if other[split] is not None))
    return math.fsum(own[seed] for seed in common or own) / len(common or own)


def teacher_top1(teacher: dict[str, Any], split: str) -> float | None:
    """A teacher's accuracy on a split; None if it is not known."""
    top1: float | None = teacher["top1"] if split == "val" else teacher.get("test_top1")
    return top1


def by_seed(row: dict[str, Any], split: str) -> dict[int, float]:
    """Accuracy of the fused, or the only, head by seed."""
    head = row[split]["compared"]
    return {run["seed"]: run[split]["top1"][head] for run in row["runs"] if run[split] is not None}


# -------------------------------------------------------------------------------------------- comparison.json


class Failure(NamedTuple):
    """A contender, or one of its runs, that failed."""

    contender: str
    seed: int | None
    why: str


def run_path(out: Path, name: str, seed: int) -> Path:
    return out / "runs" / f"{name}-seed-{seed}"


def collected(
    out: Path, plan: ComparisonPlan, contenders: Sequence[Contender], failures: Sequence[Failure]
) -> dict[str, Any]:
    """What `comparison.json` has: plain values, accuracies between 0 and 1; all times are under `clock`. Raises UserError for
    damaged run folders."""
    rows = [_contender(out, plan, contender) for contender in contenders]
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        base = by_name[row["against"]]
        for split in SPLITS:
            if row[split] is not None and base[split] is not None and row is not base:
                difference = paired_difference(by_seed(row, split), by_seed(base, split))
                row[split]["difference"] = difference and difference._asdict()
    counts = {split: [run[split]["n"] for row in rows for run in row["runs"] if run[split]] for split in SPLITS}
    clock = _clock(
        sum(row["clock"]["training_minutes"] for row in rows),
        _most_views(item for row in rows for item in row["tapes"].items()),
        {row["fitted"] for row in rows},
    )
    dataset = contenders[0].dataset
    labels_N = np.asarray(dataset.open_split("val").labels_N)
    return {
        "format": 1,
        "data": dataset.name,
        "images": {split: found[0] if found else None for split, found in counts.items()},
        "largest_class": float(np.bincount(labels_N[labels_N >= 0]).max(initial=0) / max(1, len(labels_N))),
        "baseline": plan.baseline,
        "seeds": list(plan.seeds),
        "shared": plan.shared,
        "contenders": rows,
        "findings": {split: verdicts(rows, plan, split) for split in SPLITS},
        "ranking": {split: ranking(rows, split) for split in SPLITS} if plan.ranked else None,
        "failed": [failure._asdict() for failure in failures],
        "environments": _environments(out, rows),
        "clock": {**clock, "budget_minutes": plan.budget_minutes, "date": date.today().isoformat()},
    }


def _contender(out: Path, plan: ComparisonPlan, contender: Contender) -> dict[str, Any]:
    """Everything about one contender except its difference from the baseline."""
    name = contender.name
    paths = {seed: run_path(out, name, seed) for seed in plan.seeds}
    runs = [_run(out, path, seed) for seed, path in paths.items() if RunFolder(path).finished]
    teacher = next((run["teacher"] for run in runs if run["teacher"]), None)
    tapes = _most_views(
        (str(_moved_with(out / TAPES, run["tape"]).resolve()), run["views"]) for run in runs if run["tape"] is not None
    )
    fitted = None
    if teacher and contender.config.teacher.teacher == "auto":
        fitted = str(_moved_with(out.parent, teacher["name"]).resolve())
    return {
        "name": name,
        "against": plan.against.get(name, plan.baseline),
        "settings": plan.contenders[name],
        "teacher": teacher,
        "fitted": fitted,
        "tapes": tapes,
        "runs": runs,
        **{split: figures_of(runs, split) for split in SPLITS},
        "clock": _clock(sum(run["clock"]["minutes"] for run in runs), tapes, {fitted}),
    }


def _moved_with(home: Path, stored: str) -> Path:
    """A folder where it was, or in `home` if everything has been moved."""
    return Path(stored) if Path(stored).exists() else home / Path(stored).name


def _most_views(tapes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """By tape the most views that any of its learners shows."""
    found: dict[str, int] = {}
    for tape, views in tapes:
        found[tape] = max(views, found.get(tape, 0))
    return found


def _run(out: Path, path: Path, seed: int) -> dict[str, Any]:
    """What is known of one finished run. Raises UserError for damaged files."""
    folder, tested = RunFolder(path), path / "evaluation-test.json"
    test = None
    try:
        if tested.is_file():
            test = parse_json(tested.read_text(encoding="utf-8"))
            _check_top1(test["top1"])
            test_teacher = test["teacher"] and test["teacher"]["top1"]
            test = {key: test[key] for key in KEPT}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{tested}: damaged: remove it, and --split test evaluates again") from error
    try:
        summary, config = folder.summary(), folder.config(RunConfig)
        teacher = summary["teacher"]
        if teacher is not None:
            teacher = {"name": teacher["name"].removesuffix(" (taped)"), "top1": teacher["top1"]}
            if test is not None and test_teacher is not None:
                teacher["test_top1"] = test_teacher
        _check_top1(summary["top1"])
        facts = ("model", "params", "macs", "steps", "epochs", "images_seen", "token_cosine")
        return {
            "seed": seed,
            "run": path.relative_to(out).as_posix(),
            "teacher": teacher,
            "tape": config.teacher.tape,
            "views": config.view.views,
            **{key: summary[key] for key in facts},
            "val": {key: summary[key] for key in KEPT},
            "test": test,
            "clock": {"minutes": float(summary["seconds"]) / 60},
        }
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged files: remove that folder, and give --resume again: {error}") from error


def _check_top1(top1: Mapping[str, Any]) -> None:
    """Raises ValueError, or another error, for an accuracy that is not between 0 and 1; only heads may be missing."""
    shares = [top1[head] for head in HEADS]
    if not all(share is None or 0 <= share <= 1 for share in shares[1:]) or not 0 <= shares[0] <= 1:
        raise ValueError(f"top1: {shares}")


def figures_of(runs: Sequence[dict[str, Any]], split: str) -> dict[str, Any] | None:
    """Mean and standard deviation of every head over the runs that were measured on `split`; None if none was."""
    measured = {run["seed"]: run[split]["top1"] for run in runs if run[split] is not None}
    if not measured:
        return None
    heads = {}
    for head in HEADS:
        found = mean_sd([top1[head] for top1 in measured.values() if top1[head] is not None])
        heads[head] = found and found._asdict()
    between = None
    if heads["dist"]:
        between = paired_difference(
            *({seed: top1[head] for seed, top1 in measured.items()} for head in ("dist", "cls"))
        )
    return {
        "n": len(measured),
        "heads": heads,
        "between_heads": between and between._asdict(),
        "compared": "fused" if heads["fused"] else "cls",
        "difference": None,
    }


def _clock(training_minutes: float, tapes: Mapping[str, int], fitted: Collection[str | None]) -> dict[str, Any]:
    """Minutes of training, of recording these views of these tapes, and of fitting these teachers, each once."""
    recording = sum(_recording_minutes(Path(tape), views) for tape, views in tapes.items())
    fitting = sum(_fitting_minutes(Path(folder)) for folder in fitted if folder is not None)
    total = training_minutes + recording + fitting
    return {
        "training_minutes": training_minutes,
        "recording_minutes": recording,
        "fitting_minutes": fitting,
        "teacher_share": (recording + fitting) / total if total else None,
    }


def recording_clock(tape: Path) -> dict[str, float]:
    """seconds: what the recording has taken so far; view_seconds: what another view takes; start_seconds: what resuming it
    takes besides. Zeros if they are not known."""
    unknown = {"seconds": 0.0, "view_seconds": 0.0, "start_seconds": 0.0}
    try:
        found = parse_json((tape / CLOCK).read_text(encoding="utf-8"))
        clock = {key: float(found.get(key) or 0.0) for key in unknown}
        return clock if all(map(math.isfinite, clock.values())) else unknown
    except (OSError, ValueError, AttributeError, TypeError, OverflowError):
        return unknown


def _recording_minutes(tape: Path, views: int) -> float:
    return recording_clock(tape)["seconds"] / 60 * min(1.0, views / max(1, complete_views(tape)))


def _fitting_minutes(folder: Path) -> float:
    """0 if the fitted teacher is gone."""
    try:
        return float(RunFolder(folder).summary()["seconds_with_preparation"]) / 60
    except (UserError, KeyError, TypeError):
        return 0.0


def _environments(out: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The machines and versions that the runs were made with, each once; those that are not known are left out."""
    found: list[dict[str, Any]] = []
    for run in (run for row in rows for run in row["runs"]):
        try:
            machine = parse_json((out / run["run"] / "environment.json").read_text(encoding="utf-8"))
            machine.pop("command", None)
            machine.pop("folder", None)
            known = {"processor", "cores", "threads", "gpus", "versions"} <= set(machine)
            if known and {"torch", "deitkit"} <= set(machine["versions"]) and machine not in found:
                found.append(machine)
        except (OSError, ValueError, AttributeError, TypeError):
            continue
    return found
