"""How a comparison is shown: plots (SVG whose text is text), tables on the terminal and in Markdown, one HTML page.

Contenders differ in marker and line as well as in colour, so that a plot reads the same in black and white; the colours are
those of Okabe and Ito, distinguishable with any common kind of colour blindness. The page needs nothing but itself.
"""

from __future__ import annotations

import itertools
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from deitkit.comparison.results import SPLITS, as_points, by_seed, ranked, teacher_top1
from deitkit.inspect.charts import COLOURS, STYLE, WIDTH_INCHES, as_svg, chart
from deitkit.inspect.plots import validation_curve
from deitkit.inspect.report import open_finished
from deitkit.inspect.side_by_side import differing_pictures, same_images
from deitkit.pages import template
from deitkit.terminal import Progress, UserError, percent, plain_table, plural, shortened, write_atomically, written
from deitkit.training.run import RunFolder
from deitkit.training.tables import fused_or_only, short_teacher

FIGURES, MARKDOWN, PAGE, PLOTS = "comparison.json", "comparison.md", "compare.html", "plots"
TERMINAL_COLUMNS = 80
NAME_LETTERS = 26
"""A longer name is broken into lines, in tables on the terminal and in plots."""
PRIORITY = (
    "contender",
    "accuracy",
    "diff.",
    "95 % interval",
    "class head",
    "dist. head",
    "n",
    "teacher",
    "min/run",
    "teacher's share",
)
"""Columns of the table, the most important first: a terminal shows as many as fit."""

MOST_PICTURED = 6
"""Contenders whose predictions stand under a picture."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
# ------------------------------------------------------------------------------------------------------- tables


def table(result: dict[str, Any], split: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the figures on a split; columns without content are left out, and the teachers' if they are all the
    same: `notes` has them."""
    rows = ranked(result["contenders"], split) if result["ranking"] else result["contenders"]
    several = len({row["against"] for row in rows}) > 1
    one_teacher = len(_teachers(result, split)) < 2
    lines = [_cells(row, split, several, one_teacher) for row in rows]
    columns = [name for name in lines[0] if any(line[name] != "-" for line in lines)]
    return columns, [[line[name] for name in columns] for line in lines]


def _cells(row: dict[str, Any], split: str, several: bool, one_teacher: bool) -> dict[str, str]:
    """A line of the table by column; `several`: not all are compared with the same one."""
    figures, teacher, clock = row[split], row["teacher"], row["clock"]
    gap = None if figures is None else as_points(figures["difference"])
    heads = {} if figures is None else figures["heads"]
    two = heads.get("dist") is not None
    interval, difference = "-", "-"
    if gap is not None:
        interval = "one pair" if gap.pairs == 1 else "equal pairs"
        if gap.low is not None:
            interval = f"{gap.low:+.1f} to {gap.high:+.1f}"
        difference = f"{row['against']}: {gap.mean:+.2f}" if several else f"{gap.mean:+.2f}"
    return {
        "contender": row["name"],
        "n": str(figures["n"] if figures else 0),
        "accuracy": with_sd(heads[figures["compared"]]) if figures else "-",
        "diff.": difference,
        "95 % interval": interval,
        "class head": with_sd(heads["cls"]) if two else "-",
        "dist. head": with_sd(heads["dist"]) if two else "-",
        "teacher": "-" if teacher is None or one_teacher else _teacher_line(teacher, split),
        "min/run": f"{clock['training_minutes'] / len(row['runs']):.1f}" if row["runs"] else "-",
        "teacher's share": f"{100 * clock['teacher_share']:.0f} %" if clock["teacher_share"] else "-",
    }


def narrow(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """As much of a table as fits into `TERMINAL_COLUMNS`: the most important columns, long names broken into lines. What a
    difference is from is left to the sentences below the table."""
    short = [[cell.rpartition(": ")[2] if name == "diff." else cell for name, cell in zip(columns, row, strict=True)]
             for row in rows]  # fmt: skip
    lines: list[list[str]] = []
    for name, *cells in short:
        first, *more = textwrap.wrap(name, NAME_LETTERS)
        lines += [[first, *cells], *([part, *["" for _ in cells]] for part in more)]
    kept: list[str] = []

    def chosen(names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
        numbers = [number for number, name in enumerate(columns) if name in names]
        return [columns[number] for number in numbers], [[line[number] for number in numbers] for line in lines]

    for name in PRIORITY:
        text = plain_table("", *chosen([*kept, name]))
        if name in columns and max(map(len, text.splitlines())) <= TERMINAL_COLUMNS:
            kept.append(name)
    return chosen(kept)


def title(result: dict[str, Any], split: str) -> str:
    return f"{result['data']}: {SPLITS[split]} accuracy, % ({result['images'][split]} images), mean ± sd over n seeds"


def notes(result: dict[str, Any], split: str) -> list[str]:
    """What an accuracy is to be compared with: the baseline's, the largest class', the teachers'."""
    whom = {row["against"] for row in result["contenders"]}
    paired = f"diff.: points vs {result['baseline'] if len(whom) == 1 else 'another contender'}, paired by seed"
    lines = [f"accuracy: both heads fused, or the only head; {paired}"]
    if result.get("largest_class"):
        lines.append(f"largest class: {percent(result['largest_class'])} % of the validation images")
    if teachers := _teachers(result, split):
        lines.append(f"teacher accuracy: {'; '.join(teachers)}")
    return lines


def _teachers(result: dict[str, Any], split: str) -> list[str]:
    """The teachers with their accuracy on a split, each once."""
    teachers = (row["teacher"] for row in result["contenders"] if row["teacher"] is not None)
    return list(dict.fromkeys(_teacher_line(teacher, split) for teacher in teachers))


def _teacher_line(teacher: dict[str, Any], split: str) -> str:
    top1 = teacher_top1(teacher, split)
    return short_teacher(teacher["name"]) + ("" if top1 is None else f", {percent(top1)} %")


def with_sd(head: dict[str, Any]) -> str:
    """`85.90 ± 0.31`, or `85.90` of a single run."""
    return percent(head["mean"]) + ("" if head["sd"] is None else f" ± {percent(head['sd'])}")


def cost_line(result: dict[str, Any]) -> str:
    """What the comparison took: its trainings, and the work for the teachers."""
    clock = result["clock"]
    parts = [f"training {clock['training_minutes']:.1f} min"]
    if clock["recording_minutes"]:
        parts.append(f"recording teacher outputs {clock['recording_minutes']:.1f} min")
    if clock["fitting_minutes"]:
        parts.append(f"fitting teachers {clock['fitting_minutes']:.1f} min")
    share = f" ({100 * clock['teacher_share']:.0f} % for the teachers)" if clock["teacher_share"] else ""
    return ", ".join(parts) + share


def failure_line(failure: dict[str, Any]) -> str:
    seed = "" if failure["seed"] is None else f", seed {failure['seed']}"
    return f"failed: {failure['contender']}{seed}: {failure['why']}"


def machine_lines(result: dict[str, Any]) -> list[str]:
    """Processor, threads and versions: a line for each kind of machine that runs were made on."""
    lines = []
    for machine in result["environments"]:
        versions, gpus = machine["versions"], "".join(f", {gpu}" for gpu in machine["gpus"])
        cores = f"{machine['cores']} cores, {plural(machine['threads'], 'thread')}"
        lines.append(f"{machine['processor']}{gpus}, {cores}, torch {versions['torch']}, deitkit {versions['deitkit']}")
    return list(dict.fromkeys(lines))


def measured_splits(result: dict[str, Any]) -> list[str]:
    """The splits that have figures, validation first."""
    return [split for split in SPLITS if result["images"][split] is not None]


def show(result: dict[str, Any], progress: Progress) -> None:
    """Tables, what they are to be compared with, verdicts, what failed, what it took."""
    for split in measured_splits(result):
        progress.table(title(result, split), *narrow(*table(result, split)))
        for line in (*notes(result, split), *result["findings"][split]):
            progress.say(line)
    for failure in result["failed"]:
        progress.warn(failure_line(failure))
    progress.say(cost_line(result))


def markdown(result: dict[str, Any]) -> str:
    """Tables and sentences to paste into a document."""
    blocks = []
    for split in measured_splits(result):
        columns, rows = table(result, split)
        lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
        blocks += [
            f"{title(result, split)}; seeds {' '.join(map(str, result['seeds']))}",
            "\n".join(f"| {' | '.join(line)} |" for line in lines),
            ". ".join(notes(result, split)),
            "\n".join(f"- {sentence}" for sentence in result["findings"][split]),
        ]
    blocks += [failure_line(failure) for failure in result["failed"]]
    blocks.append(f"{cost_line(result)}. {'; '.join(machine_lines(result))}. {result['clock']['date']}")
    return "\n\n".join(block for block in blocks if block) + "\n"


def write_figures(out: Path, result: dict[str, Any]) -> None:
    """`comparison.json` and `comparison.md`. Raises UserError."""
    write_atomically(out / FIGURES, json.dumps(result, indent=2) + "\n")
    write_atomically(out / MARKDOWN, markdown(result))


# --------------------------------------------------------------------------------------------------- HTML page


def write_page(out: Path, result: dict[str, Any], plan: str) -> None:
    """`compare.html`, with the text of the `plan`, and its plots as files of their own. Raises UserError."""
    drawn = plots(out, result)
    with written(out / PLOTS):
        (out / PLOTS).mkdir(exist_ok=True)
    for name, (svg, _) in drawn.items():
        write_atomically(out / PLOTS / f"{name}.svg", svg)
    write_atomically(out / PAGE, page(out, result, drawn, plan))


def page(out: Path, result: dict[str, Any], drawn: dict[str, tuple[str, str]], plan: str) -> str:
    """The page of the comparison in `out`. `drawn`: SVG and caption of each plot by name; `plan`: what was compared, as `--plan` reads
    it."""
    tables = []
    for split in measured_splits(result):
        columns, rows = table(result, split)
        part = {"split": SPLITS[split], "title": title(result, split), "columns": columns, "rows": rows}
        tables.append({**part, "notes": notes(result, split), "findings": result["findings"][split]})
    return template("deitkit.comparison", "page.html.jinja").render(
        result=result,
        tables=tables,
        figures=[(Markup(svg), caption) for svg, caption in drawn.values()],
        plan=plan,
        runs=[_run_cells(row["name"], run) for row in result["contenders"] for run in row["runs"]],
        failed=[failure_line(failure) for failure in result["failed"]],
        cost=cost_line(result),
        machines=machine_lines(result),
        differing=_differing(out, result),
    )


def _differing(out: Path, result: dict[str, Any]) -> list[Any]:
    """Validation images that only some of the contenders classify correctly, by their first runs (see `differing_pictures`); none where
    the images are gone, or are not the same for all."""
    first = [(row["name"], out / row["runs"][0]["run"]) for row in result["contenders"] if row["runs"]][:MOST_PICTURED]
    try:
        runs = [open_finished(path, "val") for _, path in first]
        return differing_pictures(runs, [name for name, _ in first]) if len(runs) > 1 and same_images(runs) else []
    except (UserError, KeyError, TypeError, ValueError):  # a page without pictures is better than none
        return []


def _run_cells(name: str, run: dict[str, Any]) -> list[str]:
    """A line of the table of single runs."""
    shares = [run[split] and fused_or_only(run[split]["top1"]) for split in SPLITS]
    return [
        name,
        str(run["seed"]),
        *("-" if share is None else percent(share) for share in shares),
        str(run["steps"]),
        f"{run['images_seen']:,}",
        f"{run['params'] / 1e6:.2f} M",
        f"{run['clock']['minutes']:.1f}",
        run["run"],
    ]


# -------------------------------------------------------------------------------------------------------- plots


def looks(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """How contenders are drawn, in every plot: the baseline is black and comes first; the others follow in their order."""
    names = sorted((row["name"] for row in result["contenders"]), key=lambda name: name != result["baseline"])
    cycles = zip(names, itertools.cycle(COLOURS), itertools.cycle(MARKERS), itertools.cycle(DASHES), strict=False)
    return {name: {"color": colour, "marker": marker, "ls": dashes} for name, colour, marker, dashes in cycles}


def plots(out: Path, result: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """(SVG, caption) by name: those that have something to show."""
    found: dict[str, tuple[str | None, str]] = {}
    for split, images in SPLITS.items():
        whom = {row["against"] for row in result["contenders"] if row[split] and row[split]["difference"]}
        above = f"vs {next(iter(whom))}" if len(whom) == 1 else "of one contender vs another"
        found[f"differences-{split}"] = (
            differences(result, split),
            f"Points {above} on the {images} images. Filled: mean, with its 95 % interval if there are several seeds; open, "
            f"below: the single seeds. A difference is significant if its interval excludes zero.",
        )
    several = any(len(row["runs"]) > 1 for row in result["contenders"])
    band = ": mean over seeds, and band from the lowest to the highest" if several else ""
    found["curves"] = curves(out, result), f"Validation accuracy after an epoch, fused or of the only head{band}."
    cosine = "Mean cosine between class and distillation token: of the learned embeddings (0), then after every block."
    found["tokens"] = tokens(result), cosine
    return {name: (svg, caption) for name, (svg, caption) in found.items() if svg is not None}


def differences(result: dict[str, Any], split: str) -> str | None:
    """A row for every contender except the baseline: its difference, seed by seed and in the mean."""
    order = ranked(result["contenders"], split) if result["ranking"] else result["contenders"]
    rows = [row for row in order if row[split] is not None and row[split]["difference"] is not None]
    if not rows:
        return None
    by_name, drawn = {row["name"]: row for row in result["contenders"]}, looks(result)
    several = len({row["against"] for row in rows}) > 1
    names = [f"{row['name']} - {row['against']}" if several else row["name"] for row in rows]
    labels = [textwrap.fill(name, NAME_LETTERS) for name in names]
    whom = "" if several else f" vs {shortened(rows[0]['against'], 30)}"
    height = 0.9 + sum(0.42 + 0.16 * label.count("\n") for label in labels)
    with mpl.rc_context(STYLE):
        figure, axes = chart(height, across=f"points{whom} ({SPLITS[split]} accuracy, %)")
        for place, row in enumerate(rows):
            gap, look = as_points(row[split]["difference"]), drawn[row["name"]]
            assert gap is not None
            own, base = by_seed(row, split), by_seed(by_name[row["against"]], split)
            points = [100 * (own[seed] - base[seed]) for seed in own if seed in base]
            places = [place + 0.26] * len(points)
            axes.plot(points, places, look["marker"], color="#777777", mfc="none", ms=4.5, mew=0.8, zorder=2)
            if gap.low is not None and gap.high is not None:
                ends = [gap.low, gap.high]
                axes.plot(ends, [place, place], color=look["color"], lw=2.2, solid_capstyle="butt", zorder=3)
            axes.plot(gap.mean, place, look["marker"], color=look["color"], ms=8, mec="white", mew=0.8, zorder=4)
        axes.axvline(0, color="#000000", lw=1)
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.45, -0.5)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
        return as_svg(figure, f"differences-{split}")


def curves(out: Path, result: dict[str, Any]) -> str | None:
    """Validation accuracy by epoch, from 1, over all finished runs of a contender."""
    lines = {}
    for row in result["contenders"]:
        points: dict[int, list[float]] = {}
        for run in row["runs"]:
            for epoch, share in validation_curve(RunFolder(out / run["run"]).events()):
                points.setdefault(epoch, []).append(100 * share)
        lines[row["name"]] = points
    levels = {"largest class": result.get("largest_class")}
    teachers = {row["teacher"]["name"]: row["teacher"] for row in result["contenders"] if row["teacher"] is not None}
    if len(teachers) == 1:  # of several it would not be clear whose students they taught
        levels |= {f"teacher {short_teacher(name)}": teacher_top1(one, "val") for name, one in teachers.items()}
    known = {name: 100 * share for name, share in levels.items() if share is not None}
    return _line_plot(result, "curves", lines, "epoch", "validation accuracy, %", 3.0, band=True, levels=known)


def tokens(result: dict[str, Any]) -> str | None:
    """Similarity of the two tokens by layer, for contenders that have two."""
    lines = {}
    for row in result["contenders"]:
        layers = [run["token_cosine"] for run in row["runs"] if run["token_cosine"]]
        lines[row["name"]] = dict(enumerate(map(list, zip(*layers, strict=True))))
    return _line_plot(result, "tokens", lines, "layer", "cosine of the two tokens", 2.6, band=False)


def _line_plot(
    result: dict[str, Any], name: str, lines: Mapping[str, Mapping[Any, list[float]]], across: str, up: str, inches: float, *, band: bool,
    levels: Mapping[str, float] | None = None,
) -> str | None:  # fmt: skip
    """A line for each contender through the means of what it has at each place, optionally with a band from lowest to highest, and a
    level line for each of `levels`; the legend is below the lines, where it hides none. None without any points."""
    lines = {contender: points for contender, points in lines.items() if points}
    if not lines:
        return None
    legend_columns = max(1, min(len(lines), round(WIDTH_INCHES / (0.75 + 0.085 * max(map(len, lines))))))
    drawn = looks(result)
    with mpl.rc_context(STYLE):
        figure, axes = chart(inches + 0.6 + 0.2 * math.ceil(len(lines) / legend_columns), across=across, up=up)
        for contender, points in lines.items():
            look, places = drawn[contender], sorted(points)
            mean = [math.fsum(points[place]) / len(points[place]) for place in places]
            if band and any(len(values) > 1 for values in points.values()):
                low, high = [min(points[place]) for place in places], [max(points[place]) for place in places]
                axes.fill_between(places, low, high, color=look["color"], alpha=0.15, lw=0)
            axes.plot(
                places, mean, **look, markevery=max(1, len(places) // 8), ms=5, lw=1.6, label=contender, mec="white", mew=0.6,
            )  # fmt: skip
        for (title, level), dashes in zip((levels or {}).items(), ((0, (1, 1.2)), (0, (5, 1.5))), strict=False):
            axes.axhline(level, color="#777777", lw=1.2, ls=dashes, label=title)
        if not band:
            axes.axhline(0, color="#000000", lw=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", handlelength=3.2, ncols=legend_columns)
        return as_svg(figure, name)
