"""HTML pages: templates with one style (`page.css`). A page needs nothing outside itself."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL = 160
"""Pixels of the longer side of a small picture on a page."""


def template(package: str, name: str) -> Template:
    """The template of a page, from the files of a package; it may include `page.css`. Names from data are escaped."""
    loaders = [PackageLoader(one, ".") for one in (package, "deitkit")]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = short_percent
    return environment.get_template(name)


def short_percent(share: float | None) -> str:
    """A share between 0 and 1 in percent, one decimal; a dash for None and NaN."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def data_address(pixels_HWC: NDArray[np.uint8], *, lossless: bool = False) -> str:
    """Pixels as a `data:` address: JPEG of at most `THUMBNAIL` pixels, or PNG if they are few; whole and PNG if `lossless`."""
    image = Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)
    png = lossless or max(image.size) <= THUMBNAIL // 2
    if not lossless:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "PNG" if png else "JPEG", **({} if png else {"quality": 80}))
    return f"data:image/{'png' if png else 'jpeg'};base64,{base64.b64encode(content.getvalue()).decode()}"
