"""The IDX files of MNIST and its likes, compressed or not.

A file is: two zero bytes, a type code (8: unsigned byte), the number of dimensions, each dimension as a big-endian
32-bit integer, then the bytes (LeCun, Cortes and Burges, "The MNIST database of handwritten digits")."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deitkit.errors import UserError

FILES = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}


def find(folder: Path, split: Literal["train", "test"], kind: Literal["images", "labels"]) -> Path | None:
    """The file in `folder`, as it is or with `.gz`; `-idx` may be written `.idx`, as some copies have it."""
    plain = FILES[split, kind]
    for name in (plain, plain + ".gz", plain.replace("-idx", ".idx"), plain.replace("-idx", ".idx") + ".gz"):
        if (folder / name).is_file():
            return folder / name
    return None


def is_idx_folder(folder: Path) -> bool:
    """Whether all four files are there."""
    return all(find(folder, split, kind) for split in ("train", "test") for kind in ("images", "labels"))


def read_idx(folder: Path, split: Literal["train", "test"]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Grey pixels of shape (N, H, W, 1) and labels. Raises UserError naming the file that is missing or damaged."""
    images_NHW, labels_N = (_read(folder, split, "images", 3), _read(folder, split, "labels", 1))
    if len(images_NHW) != len(labels_N):
        raise UserError(f"{folder}: {len(images_NHW)} {split} images, but {len(labels_N)} labels; copy the files anew")
    return images_NHW[..., None], labels_N.astype(np.int64)


def _read(
    folder: Path, split: Literal["train", "test"], kind: Literal["images", "labels"], dimensions: int
) -> NDArray[np.uint8]:
    path = find(folder, split, kind)
    if path is None:
        raise UserError(f"{folder / FILES[split, kind]} does not exist (nor with .gz); copy it there")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}; copy it anew") from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{path}: not an IDX file of bytes in {dimensions} dimensions; copy it anew")
    shape = [int(size) for size in np.frombuffer(content, ">u4", dimensions, 4)]
    if len(content) - start != math.prod(shape):
        raise UserError(
            f"{path}: holds {len(content) - start} bytes where {math.prod(shape)} are announced; copy it anew"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()  # writable, as torch wants it
