"""What pages are made of: templates with one style, and plots as SVG whose text is text. A page needs nothing outside itself.

Colours are those of Okabe and Ito, distinguishable with any common kind of colour blindness.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from typing import Any

import matplotlib as mpl
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
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


def chart(height_inches: float, width_inches: float = WIDTH_INCHES) -> tuple[Figure, Axes]:
    """An empty plot; `STYLE` is to be in force (`mpl.rc_context`) while it is drawn."""
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


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
    text = re.sub(r'\bid="', f'id="{name}-', text)
    return re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)


def template(package: str, name: str) -> Template:
    """The template of a page, from the files of a package; it may include `page.css`. Names from data are escaped."""
    loaders = [PackageLoader(one, ".") for one in (package, "deitkit.inspect")]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = short_percent
    return environment.get_template(name)


def short_percent(share: float | None) -> str:
    """A share between 0 and 1 in percent, one decimal; a dash for None and NaN."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"
