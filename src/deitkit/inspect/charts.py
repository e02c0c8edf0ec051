"""Plots as SVG whose text is text, in one style.

Colours are those of Okabe and Ito, distinguishable with any common kind of colour blindness.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH_INCHES = 7.5
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be called "$5"
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


def chart(
    height_inches: float, width_inches: float = WIDTH_INCHES, *, across: str = "", up: str = ""
) -> tuple[Figure, Axes]:
    """An empty plot, its axes labelled; `STYLE` is to be in force (`mpl.rc_context`) while it is drawn."""
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot(xlabel=across, ylabel=up)


def as_svg(figure: Figure, name: str) -> str:
    """The picture alone: no reference to anything outside, names that no other plot on the page has, the same bytes for
    the same figures."""
    with mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # text stays text: the browser has the letters
        content = io.StringIO()
        figure.savefig(content, format="svg")
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # in tags alone: a text may be called anything, and its quotes are not escaped
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", tag[0]), text)
