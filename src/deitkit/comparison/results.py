"""What a comparison found, gathered from its run folders. Nothing is computed on images here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from deitkit.comparison.contenders import Contender
from deitkit.comparison.intervals import paired_difference, spread
from deitkit.comparison.plan import ComparisonPlan
from deitkit.comparison.tapes import TAPES, complete_views, recording_clock
from deitkit.comparison.verdicts import compared, findings, ranking
from deitkit.config import HEADS, RunConfig
from deitkit.errors import UserError
from deitkit.run import RunFolder

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
