"""What a comparison found, gathered from its run folders: figures, tables, sentences. Nothing is computed on images here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from deitkit.comparison.contenders import Contender
from deitkit.comparison.intervals import Difference, finding, paired_difference, spread
from deitkit.comparison.plan import ComparisonPlan
from deitkit.comparison.tapes import TAPES, complete_views, recording_clock
from deitkit.config import RunConfig
from deitkit.errors import UserError
from deitkit.progress import Progress
from deitkit.run import RunFolder, write_atomically

FIGURES, MARKDOWN, PAGE = "comparison.json", "comparison.md", "compare.html"
SPLITS = {"val": "validation", "test": "test"}
HEADS = {"cls": "class head", "dist": "distillation head", "fused": "both, fused", "fused_logits": "both, fused logits"}
SHOWN_HEADS = ("cls", "dist", "fused")
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
                difference = paired_difference(_compared(row, split), _compared(base, split))
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
            tape = str(_moved_with(out / TAPES, run["tape"]))
            tapes[tape] = max(tapes.get(tape, 0), run["views"])
    fitted = None
    if taught and contender.config.teacher.teacher == "auto":
        fitted = str(_moved_with(out.parent, taught["name"]))
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
        **{split: _figures(runs, split) for split in SPLITS},
        "clock": {**clock, "teacher_share": _teacher_share(clock)},
    }


def _moved_with(home: Path, stored: str) -> Path:
    """A folder where it was, or beside those that it was made with, where all have been moved."""
    return Path(stored) if Path(stored).exists() else home / Path(stored).name


def _run(out: Path, path: Path, seed: int) -> dict[str, Any]:
    """What is known of one finished run."""
    folder = RunFolder(path)
    summary, config = folder.summary(), folder.config(RunConfig)
    teacher = summary["teacher"]
    if teacher is not None:
        teacher = {"name": teacher["name"].removesuffix(" (taped)"), "top1": teacher["top1"]}
    tested = path / "evaluation-test.json"
    test = json.loads(tested.read_text(encoding="utf-8")) if tested.is_file() else None
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
        "clock": {"minutes": summary["seconds"] / 60},
    }


def _figures(runs: Sequence[dict[str, Any]], split: str) -> dict[str, Any] | None:
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


def _compared(row: dict[str, Any], split: str) -> dict[int, float]:
    """Accuracy of the fused, or the only, head by seed."""
    head = row[split]["compared"]
    return {run["seed"]: run[split]["top1"][head] for run in row["runs"] if run[split] is not None}


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


def _environments(out: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The machines and versions that the runs were made with, each once."""
    found: list[dict[str, Any]] = []
    for run in (run for row in rows for run in row["runs"]):
        path = out / run["run"] / "environment.json"
        if path.is_file():
            machine = json.loads(path.read_text(encoding="utf-8"))
            machine.pop("command", None)
            if machine not in found:
                found.append(machine)
    return found


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
    return (_verdict(rows, plan.baseline, split) if plan.ranked else []) + sentences + heads


def _verdict(rows: Sequence[dict[str, Any]], baseline: str, split: str) -> list[str]:
    """Which teacher is the best one for the student, whether any is, and how sure that is."""
    best = ranking(rows, split)
    if len(best) < 2:
        return []
    one, second = best[:2]
    order = ranked(rows, split)
    first = order[0]["name"]
    if first == baseline:
        return [f"the student reaches most without a teacher: of these, {one['name']} is the least harm"]
    verdict = f"the student reaches most with {one['name']}: {percent(one['mean'])} %"
    wiser = max(best, key=lambda other: other["teacher_top1"])
    if wiser["teacher_top1"] > one["teacher_top1"]:
        verdict += (
            f"; {wiser['name']} is the better network ({percent(wiser['teacher_top1'])} against "
            f"{percent(one['teacher_top1'])} %), but not the better teacher here"
        )
    pair = [_compared(row, split) for name in (one["name"], second["name"]) for row in rows if row["name"] == name]
    gap = paired_difference(*pair)
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
    own = _compared(row, split)
    common = set(own).intersection(*(_compared(other, split) for other in rows if other[split] is not None))
    return math.fsum(own[seed] for seed in common or own) / len(common or own)


def ranking(rows: Sequence[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """The teachers by what the student reaches."""
    found = []
    for row in ranked(rows, split):
        if row["teacher"] is not None and row[split] is not None:
            right = _right(row["teacher"], split)
            mean = _mean_of_common(rows, row, split)
            found.append(
                {"name": row["name"], "mean": mean, "teacher": row["teacher"]["name"], "teacher_top1": right or 0.0}
            )
    return found


def _right(teacher: dict[str, Any], split: str) -> float | None:
    """A teacher's accuracy on a split, where it is known."""
    right: float | None = teacher["top1"] if split == "val" else teacher.get("test_top1")
    return right


def table(result: dict[str, Any], split: str) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of the figures on a split; columns that say nothing are left out."""
    rows = ranked(result["contenders"], split) if result["ranking"] else result["contenders"]
    several = {row["against"] for row in rows} > {result["baseline"]}
    minus = "minus" if several else f"minus {result['baseline']}"
    columns = ["contender", "runs", *(HEADS[head] for head in SHOWN_HEADS), minus, "95 % interval"]
    columns += ["teacher", "min a run", "teacher's share"]
    cells = [_cells(row, split, several) for row in rows]
    kept = [number for number in range(len(columns)) if any(row[number] != "-" for row in cells)]
    count = result["images"][split]
    title = f"{result['data']}: right on {count} {SPLITS[split]} images, %, mean ± sd over seeds" if count else ""
    return title, [columns[number] for number in kept], [[row[number] for number in kept] for row in cells]


def _cells(row: dict[str, Any], split: str, several: bool) -> list[str]:
    """A line of the table; `several`: not all are compared with the same one."""
    figures, teacher = row[split], row["teacher"]
    gap = None if figures is None or figures["difference"] is None else as_points(figures["difference"])
    heads = [None if figures is None else figures["heads"][head] for head in SHOWN_HEADS]
    right = None if teacher is None else _right(teacher, split)
    interval, minus = "-", "-"
    if gap is not None:
        interval = "one pair" if gap.pairs == 1 else "no spread"
        if gap.low is not None:
            interval = f"{gap.low:.2f} to {gap.high:.2f}"
        minus = f"{row['against']}: {gap.mean:+.2f}" if several else f"{gap.mean:+.2f}"
    return [
        row["name"],
        str(0 if figures is None else figures["n"]),
        *("-" if head is None else with_spread(head) for head in heads),
        minus,
        interval,
        "-" if teacher is None else f"{_last_parts(teacher['name'])}{'' if right is None else f', {percent(right)} %'}",
        f"{row['clock']['training_minutes'] / len(row['runs']):.1f}" if row["runs"] else "-",
        f"{100 * row['clock']['teacher_share']:.0f} %" if row["clock"]["teacher_share"] else "-",
    ]


def _last_parts(teacher: str) -> str:
    """A teacher's name without its folders; of several that are averaged, each."""
    return "+".join(Path(part).name for part in teacher.split("+"))


def with_spread(head: dict[str, Any]) -> str:
    """`85.90 ± 0.31`, or `85.90` of a single run."""
    return percent(head["mean"]) + ("" if head["sd"] is None else f" ± {percent(head['sd'])}")


def percent(share: float) -> str:
    return f"{100 * share:.2f}"


def cost_line(result: dict[str, Any]) -> str:
    """What it took, and whose share of it the teachers' was."""
    clock = result["clock"]
    parts = [f"training {clock['training_minutes']:.1f} min"]
    if clock["recording_minutes"]:
        parts.append(f"recording teachers' answers {clock['recording_minutes']:.1f} min")
    if clock["fitting_minutes"]:
        parts.append(f"fitting teachers {clock['fitting_minutes']:.1f} min")
    share = clock["teacher_share"]
    return ", ".join(parts) + (f": the teachers' share is {100 * share:.0f} %" if share else "")


def measured_splits(result: dict[str, Any]) -> list[str]:
    """The splits that there are figures of, validation first."""
    return [split for split in SPLITS if result["images"][split] is not None]


def markdown(result: dict[str, Any]) -> str:
    """Tables and sentences to paste into a document."""
    blocks = []
    for split in measured_splits(result):
        title, columns, rows = table(result, split)
        lines = [
            " | ".join(cell.replace("|", "\\|") for cell in row) for row in (columns, ["---"] * len(columns), *rows)
        ]
        blocks += [f"{title}; seeds {' '.join(map(str, result['seeds']))}", "\n".join(f"| {line} |" for line in lines)]
        blocks.append("\n".join(f"- {sentence}" for sentence in result["findings"][split]))
    blocks += [failure_line(failure) for failure in result["failed"]]
    machines = "; ".join(machine_lines(result))
    blocks.append(f"{cost_line(result)}. {machines}. {result['clock']['date']}")
    return "\n\n".join(block for block in blocks if block) + "\n"


def failure_line(failure: dict[str, Any]) -> str:
    seed = "" if failure["seed"] is None else f", seed {failure['seed']}"
    return f"failed: {failure['contender']}{seed}: {failure['why']}"


def machine_lines(result: dict[str, Any]) -> list[str]:
    """A line for each kind of machine that runs were made on."""
    return list(dict.fromkeys(machine_line(machine) for machine in result["environments"]))


def machine_line(machine: dict[str, Any]) -> str:
    """Processor, threads and versions in a line."""
    versions = machine["versions"]
    gpus = f", {' + '.join(machine['gpus'])}" if machine["gpus"] else ""
    threads = f"{machine['cores']} cores, {machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    return f"{machine['processor']}{gpus}, {threads}, torch {versions['torch']}, deitkit {versions['deitkit']}"


def write_figures(out: Path, result: dict[str, Any]) -> None:
    """`comparison.json` and `comparison.md`. Raises UserError."""
    write_atomically(out / FIGURES, json.dumps(result, indent=2) + "\n")
    write_atomically(out / MARKDOWN, markdown(result))


def show(result: dict[str, Any], progress: Progress) -> None:
    """Tables, sentences, what failed, what it took."""
    for split in measured_splits(result):
        title, columns, rows = table(result, split)
        progress.table(title, columns, rows)
        for sentence in result["findings"][split]:
            progress.say(sentence)
    for failure in result["failed"]:
        progress.warn(failure_line(failure))
    progress.say(cost_line(result))
