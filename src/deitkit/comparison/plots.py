"""Plots of a comparison, as SVG whose text is text: differences, learning curves, likeness of the tokens.

Contenders differ in marker and line as well as in colour, so that a plot says the same in black and white; the colours are
those of Okabe and Ito, which people with any common kind of colour blindness tell apart.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deitkit.comparison.results import SPLITS
from deitkit.comparison.verdicts import as_points, ranked
from deitkit.errors import shortened
from deitkit.run import RunFolder

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
