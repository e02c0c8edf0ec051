"""What is in a data set: figures, and a sheet of images with their views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from deitkit.augment import center_view
from deitkit.config import ViewConfig
from deitkit.data import Dataset, Split, UnreadableImage
from deitkit.data.base import NO_LABEL
from deitkit.errors import UserError, shortened
from deitkit.feed import show_views

SIZES_READ = 64
"""Photos that are opened to say how large they are."""
CELL = 64
"""Images smaller than this many pixels are magnified in a sheet."""
GAP = 2
TITLE_HEIGHT = 16
MOST_PIXELS = 10**8


def describe(dataset: Dataset) -> dict[str, Any]:
    """Counts by split and class, sizes, unreadable images. The test split is left closed."""
    splits = {name: dataset.open_split(name) for name in ("train", "val")}
    return {
        "name": dataset.name,
        "classes": {
            label: {name: int((split.labels_N == number).sum()) for name, split in splits.items()}
            for number, label in enumerate(dataset.classes)
        },
        "unlabelled": int((splits["train"].labels_N == NO_LABEL).sum()),
        "images": {name: len(split) for name, split in splits.items()},
        "has_test": dataset.has_test,
        "set_aside": dataset.set_aside,
        "channels": dataset.channels,
        "sizes": _sizes(dataset, splits["train"]),
        "mirror_safe": dataset.mirror_safe,
        "bad_images": list(dataset.bad_images),
    }


def one_of_each_class(split: Split, most: int) -> list[int]:
    """Positions of up to `most` readable images: the first of every class, then the second, ..."""
    order = np.argsort(split.labels_N, kind="stable")
    _, starts = np.unique(split.labels_N[order], return_index=True)
    rank_N = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
    chosen: list[int] = []
    for position in order[np.argsort(rank_N, kind="stable")].tolist():
        if len(chosen) == most:
            break
        if _readable(split, position):
            chosen.append(position)
    return chosen


def view_sheet(split: Split, recipe: ViewConfig, positions: Sequence[int], views: int) -> Image.Image:
    """One row an image: the image itself, then its views 0..views-1. `recipe` is resolved."""
    assert recipe.view_size is not None
    pixels = len(positions) * (views + 1) * recipe.view_size[0] * recipe.view_size[1]
    if pixels > MOST_PIXELS:
        raise UserError(f"a sheet of {pixels / 1e6:,.0f} million pixels is too large: show fewer or smaller views")
    originals = [center_view(split.read(position), recipe.view_size) for position in positions]
    shown: Any = show_views(split, recipe, positions, views) if views else [[] for _ in positions]
    return sheet([[original, *row] for original, row in zip(originals, shown, strict=True)])


def titled(picture: Image.Image, names: Sequence[str]) -> Image.Image:
    """A sheet with the name of each row on its left, and a line on top that says what stands in the columns."""
    names = [shortened(name, 24) for name in names]
    left = GAP * 4 + max(int(ImageDraw.Draw(picture).textlength(name)) for name in names)
    row = (picture.height - GAP) / len(names)
    canvas = Image.new("RGB", (left + picture.width, TITLE_HEIGHT + picture.height), "white")
    canvas.paste(picture, (left, TITLE_HEIGHT))
    pen = ImageDraw.Draw(canvas)
    pen.text((left + GAP, GAP), "the image, then views of it", "black")
    for number, name in enumerate(names):
        pen.text((GAP, TITLE_HEIGHT + (number + 0.5) * row), name, "black", anchor="lm")
    return canvas


def sheet(rows: Sequence[Sequence[UInt8[np.ndarray, "H W C"]]]) -> Image.Image:
    """Equal-sized images in rows and columns, small ones magnified by whole numbers."""
    height, width, _ = rows[0][0].shape
    times = max(1, -(-CELL // max(height, width)))
    columns = max(len(row) for row in rows)
    cell_height, cell_width = height * times + GAP, width * times + GAP
    canvas = np.full((len(rows) * cell_height + GAP, columns * cell_width + GAP, 3), 255, np.uint8)
    for down, row in enumerate(rows):
        for across, image_HWC in enumerate(row):
            large: NDArray[np.uint8] = image_HWC.repeat(times, 0).repeat(times, 1)
            top, left = down * cell_height + GAP, across * cell_width + GAP
            canvas[top : top + height * times, left : left + width * times] = large
    return Image.fromarray(canvas)


def _sizes(dataset: Dataset, split: Split) -> dict[str, list[int]]:
    """Smallest and largest height and width, of all images or of a sample spread over the split."""
    if dataset.image_size is not None:
        height, width = dataset.image_size
        return {"height": [height, height], "width": [width, width]}
    spread = np.unique(np.linspace(0, len(split) - 1, SIZES_READ).astype(int)).tolist()
    shapes = [split.read(position).shape for position in spread if _readable(split, position)]
    heights, widths = [shape[0] for shape in shapes], [shape[1] for shape in shapes]
    return {"height": [min(heights), max(heights)], "width": [min(widths), max(widths)]} if shapes else {}


def _readable(split: Split, position: int) -> bool:
    try:
        split.read(position)
    except UnreadableImage:
        return False
    return True
