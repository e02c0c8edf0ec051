"""A comparison's tables and lines, on the terminal and as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deitkit.comparison.results import SPLITS
from deitkit.comparison.verdicts import as_points, percent, ranked, teachers_top1
from deitkit.config import HEADS, HeadChoice
from deitkit.files import write_atomically
from deitkit.progress import Progress

FIGURES, MARKDOWN = "comparison.json", "comparison.md"
SHOWN_HEADS: tuple[HeadChoice, ...] = ("cls", "dist", "fused")


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
    right = None if teacher is None else teachers_top1(teacher, split)
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
        "-"
        if teacher is None
        else f"{short_teacher(teacher['name'])}{'' if right is None else f', {percent(right)} %'}",
        f"{row['clock']['training_minutes'] / len(row['runs']):.1f}" if row["runs"] else "-",
        f"{100 * row['clock']['teacher_share']:.0f} %" if row["clock"]["teacher_share"] else "-",
    ]


def short_teacher(teacher: str) -> str:
    """A teacher's name without folders and the ending of its file; of several that are averaged, each."""

    def last(part: str) -> str:
        model, _, file = part.partition("@")
        return f"{model}@{Path(file).stem}" if file and "/" not in model else Path(part).name

    parts = teacher.split("+")
    return "+".join(map(last, parts)) if all(parts) else Path(teacher).name


def with_spread(head: dict[str, Any]) -> str:
    """`85.90 ± 0.31`, or `85.90` of a single run."""
    return percent(head["mean"]) + ("" if head["sd"] is None else f" ± {percent(head['sd'])}")


def cost_line(result: dict[str, Any]) -> str:
    """What it took, and whose share of it the teachers' was."""
    clock = result["clock"]
    parts = [f"training {clock['training_minutes']:.1f} min"]
    if clock["recording_minutes"]:
        parts.append(f"recording teachers' answers {clock['recording_minutes']:.1f} min")
    if clock["fitting_minutes"]:
        parts.append(f"fitting teachers {clock['fitting_minutes']:.1f} min")
    share = clock["teacher_share"]
    shared = (
        f": the teachers' share is {100 * share:.0f} % (in its line: as if a contender had its teacher alone)"
        if share
        else ""
    )
    return ", ".join(parts) + shared


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
