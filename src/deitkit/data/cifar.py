"""CIFAR-10 and CIFAR-100 in their binary version (www.cs.toronto.edu/~kriz/cifar.html).

A record is one label byte (CIFAR-100: coarse, then fine) and 32x32 pixels, first all red, then green, then blue.
The python version holds the same in pickles, which can run code when they are opened: it is not read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deitkit.errors import UserError

_SIDE = 32


class Layout(NamedTuple):
    """Where the records lie."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int


LAYOUTS = {
    "cifar10": Layout(
        "cifar-10-batches-bin", tuple(f"data_batch_{number}.bin" for number in range(1, 6)), ("test_batch.bin",), 1
    ),
    "cifar100": Layout("cifar-100-binary", ("train.bin",), ("test.bin",), 2),
}


def find_folder(folder: Path, name: str) -> Path | None:
    """The folder that holds all binary files of `name`: `folder` itself or the one that the archive unpacks to."""
    layout = LAYOUTS[name]
    for candidate in (folder, folder / layout.folder):
        if all((candidate / file).is_file() for file in layout.train + layout.test):
            return candidate
    return None


def read_cifar(folder: Path, name: str, split: Literal["train", "test"]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels of shape (N, 32, 32, 3) and (fine) labels. Raises UserError naming a damaged file."""
    layout = LAYOUTS[name]
    record = layout.label_bytes + 3 * _SIDE * _SIDE
    parts = []
    for file in layout.train if split == "train" else layout.test:
        try:
            content = np.fromfile(folder / file, np.uint8)
        except OSError as error:
            raise UserError(f"{folder / file}: cannot be read: {error.strerror}; copy it anew") from error
        if len(content) == 0 or len(content) % record:
            raise UserError(f"{folder / file}: {len(content)} bytes are no whole number of images; copy it anew")
        parts.append(content.reshape(-1, record))
    records = np.concatenate(parts)
    pixels_NCHW = records[:, layout.label_bytes :].reshape(-1, 3, _SIDE, _SIDE)
    return np.ascontiguousarray(pixels_NCHW.transpose(0, 2, 3, 1)), records[:, layout.label_bytes - 1].astype(np.int64)
