"""The plots of a report, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import MaxNLocator

from deitkit.inspect.charts import COLOURS, STYLE, as_svg, chart
from deitkit.terminal import one_line
from deitkit.training.evaluate import CALIBRATION_BINS
from deitkit.training.predictions import Predictions
from deitkit.training.tables import fused_or_only

DASHES: tuple[Any, ...] = ((0, (5, 1.5)), (0, (1, 1.2)))
FEWEST_DRAWN = 10
"""The accuracy of fewer images than that is not drawn."""


Curve = Sequence[tuple[int, float]]
"""(epoch, from 1; accuracy after it, 0 to 1)."""


def validation_curve(events: Sequence[Mapping[str, Any]], head: str | None = None) -> list[tuple[int, float]]:
    """The `Curve` of a run over the epochs after which it was evaluated: of `head`, or fused or of the only one."""
    epochs = [event for event in events if event.get("event") == "epoch" and event.get("top1")]
    return [(event["epoch"] + 1, event["top1"][head] if head else fused_or_only(event["top1"])) for event in epochs]


def accuracy_curve(runs: Sequence[tuple[str, Curve]], levels: Mapping[str, float]) -> str | None:
    """Validation accuracy by epoch of the runs (name, curve), and a level line for each of `levels`: teacher, largest class."""
    lines = {name: curve for name, curve in runs if curve}
    if not lines:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = chart(2.6 + 0.15 * len(lines), 7.0, across="epoch", up="validation accuracy, %")
        drawn = []
        for curve, colour in zip(lines.values(), cycle(COLOURS[1:]), strict=False):
            epochs, shares = zip(*curve, strict=True)
            drawn += axes.plot(epochs, [100 * share for share in shares], color=colour, lw=1.8, marker="o", ms=3)
        for share, dashes in zip(levels.values(), cycle(DASHES), strict=False):
            drawn.append(axes.axhline(100 * share, color="#777777", lw=1.2, ls=dashes))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        # given one by one, for matplotlib leaves out labels that begin with an underscore
        figure.legend(drawn, [*lines, *levels], loc="outside lower center", ncols=3)
        return as_svg(figure, "curves")


def loss_curves(events: Sequence[Mapping[str, Any]]) -> str | None:
    """The loss and its terms by epoch."""
    epochs = [event for event in events if event.get("event") == "epoch" and isinstance(event.get("loss"), Mapping)]
    titles = {"total": "loss", "label": "labels", "teacher": "teacher's logits", "features": "teacher's features",
              "second_token": "labels, second token"}  # fmt: skip
    lines = {
        key: [(event["epoch"] + 1, event["loss"][key]) for event in epochs if event["loss"].get(key) is not None]
        for key in titles
    }
    if not lines["total"]:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = chart(2.6, 7.0, across="epoch", up="training loss")
        for (key, points), colour in zip(lines.items(), COLOURS, strict=False):
            if points and any(value for _, value in points):
                axes.plot(*zip(*points, strict=True), color=colour, lw=1.5, label=titles[key])
        if min(value for points in lines.values() for _, value in points) >= 0:  # a user's own loss may be negative
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=4)
        return as_svg(figure, "losses")


def confusion_matrix(predictions: Predictions, names: Sequence[str]) -> str:
    """Counts by label (rows) and prediction (columns); the darker, the larger the share of its row."""
    classes = len(names)
    counts_KK = np.zeros((classes, classes), np.int64)
    np.add.at(counts_KK, (predictions.label_N, predictions.prediction_N), 1)
    shares_KK = counts_KK / np.maximum(counts_KK.sum(1, keepdims=True), 1)
    side = 2.2 + 0.36 * classes
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": 8 if classes > 12 else 9}):
        figure, axes = chart(side, side, across="predicted", up="label")
        axes.pcolormesh(shares_KK, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1)
        for row, column in zip(*np.nonzero(counts_KK), strict=True):
            dark = shares_KK[row, column] > 0.55
            axes.text(
                column + 0.5,
                row + 0.5,
                str(counts_KK[row, column]),
                ha="center",
                va="center",
                color="white" if dark else "#111",
            )
        short = [name if len(name) <= 18 else f"{name[:17]}…" for name in map(one_line, names)]
        axes.set_xticks(np.arange(classes) + 0.5, short, rotation=90)
        axes.set_yticks(np.arange(classes) + 0.5, short)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.tick_params(length=0)
        return as_svg(figure, "confusion")


def calibration_plot(predictions: Predictions) -> str:
    """Accuracy against probability, in bins of equal width that have images."""
    bin_N = np.minimum((predictions.probability_N * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    with mpl.rc_context(STYLE):
        figure, axes = chart(3.0, 3.4, across="probability, %", up="accuracy, %")
        axes.plot([0, 100], [0, 100], color="#777777", lw=1, ls=(0, (1, 1.2)))
        for number in np.unique(bin_N):
            those_N = bin_N == number
            right, said = predictions.right_N[those_N].mean(), predictions.probability_N[those_N].mean()
            low, high = wilson(int(predictions.right_N[those_N].sum()), int(those_N.sum()))
            error = [[100 * (right - low)], [100 * (high - right)]]
            axes.errorbar(100 * said, 100 * right, error, color=COLOURS[1], marker="o", ms=5, lw=1)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        return as_svg(figure, "calibration")


def wilson(right: int, images: int) -> tuple[float, float]:
    """The interval of one standard error around a share (Wilson 1927): not empty where all images are right, or there is one."""
    share, spread = right / images, 1 / images
    centre, half = share + spread / 2, math.sqrt(share * (1 - share) * spread + spread**2 / 4)
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return min(low, share), max(high, share)  # but for rounding it holds the share


def rejection_curve(predictions: Predictions) -> str:
    """Accuracy of the images answered against their share, the most probable answers first."""
    _, accuracy_N = predictions.by_confidence()
    share_N = np.arange(1, len(accuracy_N) + 1) / len(accuracy_N)
    shown = np.unique(np.linspace(min(FEWEST_DRAWN, len(share_N)) - 1, len(share_N) - 1, 200).astype(int))
    with mpl.rc_context(STYLE):
        figure, axes = chart(3.0, 3.4, across="images answered, %", up="accuracy of the answers, %")
        axes.plot(100 * share_N[shown], 100 * accuracy_N[shown], color=COLOURS[1], lw=1.8)
        axes.set_xlim(0, 100)
        return as_svg(figure, "rejection")


def token_plot(cosine: Sequence[float] | None) -> str | None:
    """Similarity of class and distillation token by layer."""
    if not cosine:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = chart(2.2, 3.4, across="block (0: learned embeddings)", up="cosine")
        axes.plot(range(len(cosine)), cosine, color=COLOURS[1], marker="o", ms=4, lw=1.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return as_svg(figure, "tokens")
