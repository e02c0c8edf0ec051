"""Plots of a comparison, as SVG whose text is text: differences, learning curves, likeness of the tokens.

Contenders differ in marker and line as well as in colour, so that a plot says the same in black and white; the colours are
those of Okabe and Ito, which people with any common kind of colour blindness tell apart.

A comparison's tables and lines, on the terminal and as Markdown.

A comparison as one HTML page that needs nothing but itself.
"""

from __future__ import annotations

import io
import json
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deitkit.compare.results import SPLITS, as_points, percent, ranked, teachers_top1
from deitkit.config import HEADS, HeadChoice
from deitkit.terminal import Progress, shortened, write_atomically, written
from deitkit.training.run import RunFolder

WIDTH_INCHES = 7.5
LABEL_LETTERS = 26
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


class Look(NamedTuple):
    """How a contender is drawn, in every plot."""

    colour: str
    marker: str
    dashes: Any


def looks(result: dict[str, Any]) -> dict[str, Look]:
    """The baseline is black and comes first; the others follow in their order."""
    names = [row["name"] for row in result["contenders"]]
    names.sort(key=lambda name: name != result["baseline"])
    return {
        name: Look(COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)], DASHES[n % len(DASHES)])
        for n, name in enumerate(names)
    }


def plots(out: Path, result: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """(SVG, caption) by name: those for which there is something to show."""
    found: dict[str, tuple[str, str]] = {}
    for split, title in SPLITS.items():
        figure = differences(result, split)
        if figure is not None:
            whom = {row["against"] for row in result["contenders"] if row[split] and row[split]["difference"]}
            above = f"above {next(iter(whom))}" if len(whom) == 1 else "by which one contender is above another"
            caption = (
                f"Points {above} on the {title} images. Filled: mean, with its 95 % interval where "
                f"there is more than one seed; open, below: the single seeds. Where the interval leaves out zero, the "
                f"difference is told from chance."
            )
            found[f"differences-{split}"] = figure, caption
    curves_figure = curves(out, result)
    if curves_figure is not None:
        caption = "Top-1 on the validation images after an epoch, fused or of the only head"
        if any(len(row["runs"]) > 1 for row in result["contenders"]):
            caption += ": mean over seeds, and band from the least to the greatest"
        found["curves"] = curves_figure, f"{caption}."
    tokens_figure = tokens(result)
    if tokens_figure is not None:
        caption = (
            "Mean cosine between class and distillation token: of the learned embeddings (0), then after every block."
        )
        found["tokens"] = tokens_figure, caption
    return found


def differences(result: dict[str, Any], split: str) -> str | None:
    """A row for every contender but the baseline: its distance from it, seed by seed and in the mean."""
    order = ranked(result["contenders"], split) if result["ranking"] else result["contenders"]
    rows = [row for row in order if row[split] is not None and row[split]["difference"] is not None]
    if not rows:
        return None
    by_name = {row["name"]: row for row in result["contenders"]}
    drawn = looks(result)
    several = len({row["against"] for row in rows}) > 1
    labels = [_broken(f"{row['name']} - {row['against']}" if several else row["name"]) for row in rows]
    with mpl.rc_context(STYLE):
        figure, axes = _figure(0.9 + sum(0.42 + 0.16 * label.count("\n") for label in labels))
        for place, row in enumerate(rows):
            gap, look = as_points(row[split]["difference"]), drawn[row["name"]]
            base = by_name[row["against"]]
            by_seed = {run["seed"]: run[split] for run in base["runs"] if run[split] is not None}
            head, base_head = row[split]["compared"], base[split]["compared"]
            for run in row["runs"]:
                if run[split] is not None and run["seed"] in by_seed:
                    point = 100 * (run[split]["top1"][head] - by_seed[run["seed"]]["top1"][base_head])
                    axes.plot(point, place + 0.26, look.marker, color="#777777", mfc="none", ms=4.5, mew=0.8, zorder=2)
            if gap.low is not None and gap.high is not None:
                axes.plot(
                    [gap.low, gap.high], [place, place], color=look.colour, lw=2.2, solid_capstyle="butt", zorder=3
                )
            axes.plot(gap.mean, place, look.marker, color=look.colour, ms=8, mec="white", mew=0.8, zorder=4)
        axes.axvline(0, color="#000000", lw=1)
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.45, -0.5)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
        whom = "" if several else f" above {shortened(rows[0]['against'], 30)}"
        axes.set_xlabel(f"points{whom} ({SPLITS[split]} top-1, %)")
        return _svg(figure, f"differences-{split}")


def curves(out: Path, result: dict[str, Any]) -> str | None:
    """Validation accuracy by epoch, a line for each contender."""
    lines = {row["name"]: _learning_curve(out, row) for row in result["contenders"]}
    if not any(lines.values()):
        return None
    drawn = looks(result)
    with mpl.rc_context(STYLE):
        figure, axes = _figure(3.0 + _legend_inches(lines))
        for name, points in lines.items():
            if not points:
                continue
            look, epochs = drawn[name], sorted(points)
            mean = [math.fsum(points[epoch]) / len(points[epoch]) for epoch in epochs]
            if any(len(points[epoch]) > 1 for epoch in epochs):
                low, high = [min(points[epoch]) for epoch in epochs], [max(points[epoch]) for epoch in epochs]
                axes.fill_between(epochs, low, high, color=look.colour, alpha=0.15, lw=0)
            _line(axes, epochs, mean, look, name)
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation top-1, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)
        return _svg(figure, "curves")


def tokens(result: dict[str, Any]) -> str | None:
    """Likeness of the two tokens by layer, for contenders that have two."""
    rows = [(row, [run["token_cosine"] for run in row["runs"] if run["token_cosine"]]) for row in result["contenders"]]
    if not any(layers for _, layers in rows):
        return None
    drawn = looks(result)
    with mpl.rc_context(STYLE):
        figure, axes = _figure(2.6 + _legend_inches(row["name"] for row, layers in rows if layers))
        for row, layers in rows:
            if layers:
                mean = [math.fsum(column) / len(column) for column in zip(*layers, strict=True)]
                _line(axes, range(len(mean)), mean, drawn[row["name"]], row["name"])
        axes.axhline(0, color="#000000", lw=0.8)
        axes.set_xlabel("layer")
        axes.set_ylabel("cosine of the two tokens")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)
        return _svg(figure, "tokens")


def _learning_curve(out: Path, row: dict[str, Any]) -> dict[int, list[float]]:
    """Percentages by epoch, from 1, of all finished runs of a contender."""
    points: dict[int, list[float]] = {}
    for run in row["runs"]:
        for event in RunFolder(out / run["run"]).events():
            if event.get("event") == "epoch" and event.get("top1"):  # not every epoch is evaluated
                top1 = event["top1"]
                share = top1["cls"] if top1["fused"] is None else top1["fused"]
                points.setdefault(event["epoch"] + 1, []).append(100 * share)
    return points


def _figure(height_inches: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _line(axes: Axes, x: Sequence[int], y: Sequence[float], look: Look, name: str) -> None:
    every = max(1, len(x) // 8)
    axes.plot(
        x, y, color=look.colour, ls=look.dashes, marker=look.marker, markevery=every, ms=5, lw=1.6, label=name,
        mec="white", mew=0.6,
    )  # fmt: skip


def _broken(name: str) -> str:
    """A name in lines that leave room for what it names."""
    return textwrap.fill(name, LABEL_LETTERS)


def _legend_columns(names: Sequence[str]) -> int:
    """As many as the longest name leaves room for."""
    letters = max(len(name) for name in names)
    return max(1, min(len(names), round(WIDTH_INCHES / (0.75 + 0.085 * letters))))


def _legend_inches(names: Iterable[str]) -> float:
    listed = list(names)
    return 0.6 + 0.2 * math.ceil(len(listed) / _legend_columns(listed))


def _legend(axes: Axes) -> None:
    """Below the lines, where it hides none."""
    handles, names = axes.get_legend_handles_labels()
    axes.figure.legend(handles, names, loc="outside lower center", handlelength=3.2, ncols=_legend_columns(names))


def _svg(figure: Figure, name: str) -> str:
    """The picture alone: no reference to anything outside, names that no other plot on the page has, the same bytes for
    the same figures."""
    with mpl.rc_context({"svg.hashsalt": name}):
        content = io.StringIO()
        figure.savefig(content, format="svg")
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    return re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)


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


PAGE, PLOTS = "compare.html", "plots"


def write_page(out: Path, result: dict[str, Any], plan: str) -> None:
    """`compare.html`, with the text of the `plan`, and its plots as files of their own. Raises UserError."""
    drawn = plots(out, result)
    with written(out / PLOTS):
        (out / PLOTS).mkdir(exist_ok=True)
    for name, (svg, _) in drawn.items():
        write_atomically(out / PLOTS / f"{name}.svg", svg)
    write_atomically(out / PAGE, page(result, drawn, plan))


def page(result: dict[str, Any], drawn: dict[str, tuple[str, str]], plan: str) -> str:
    """The page; `drawn`: SVG and caption of each plot by name; `plan`: what was compared, as `--plan` reads it."""
    templates = Environment(
        loader=PackageLoader("deitkit.compare", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    tables = []
    for split in measured_splits(result):
        title, columns, rows = table(result, split)
        tables.append(
            {
                "split": SPLITS[split],
                "title": title,
                "columns": columns,
                "rows": rows,
                "findings": result["findings"][split],
            }
        )
    return templates.get_template("page.html.jinja").render(
        result=result,
        tables=tables,
        figures=[(Markup(svg), caption) for svg, caption in drawn.values()],
        plan=plan,
        runs=[_run_cells(row["name"], run) for row in result["contenders"] for run in row["runs"]],
        failed=[failure_line(failure) for failure in result["failed"]],
        cost=cost_line(result),
        machines=machine_lines(result),
    )


def _run_cells(name: str, run: dict[str, Any]) -> list[str]:
    """A line of the table of single runs."""

    def top1(split: str) -> str:
        if run[split] is None:
            return "-"
        heads = run[split]["top1"]
        return percent(heads["cls"] if heads["fused"] is None else heads["fused"])

    return [
        name,
        str(run["seed"]),
        top1("val"),
        top1("test"),
        str(run["steps"]),
        f"{run['images_seen']:,}",
        f"{run['params'] / 1e6:.2f} M",
        f"{run['clock']['minutes']:.1f}",
        run["run"],
    ]
