"""What every data set offers, wherever it lies."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray

from deitkit.data.cache import remembered

SplitName = Literal["train", "val", "test"]
SMALL_IMAGE = 64
"""Pixels of the longer side up to which images of one size are small."""
NO_LABEL = -1
"""Stands in the place of a label where a training image has none."""
UNLABELLED = ("unlabelled", "unlabeled")
"""What the folder of images without labels is called, beside those of the classes or of the splits."""


class Split(ABC):
    """The images of one split with their labels. Positions 0..len-1 name the images everywhere."""

    labels_N: NDArray[np.int64]
    """numbers of classes; of training images also `NO_LABEL`"""
    channels: int
    """1 for grey, 3 for RGB"""

    def __len__(self) -> int:
        return len(self.labels_N)

    @abstractmethod
    def read(self, position: int) -> NDArray[np.uint8]:
        """Image `position` as uint8 of shape (H, W, C): upright, grey (C = 1) or RGB (C = 3), contiguous and writable.

        Raises UnreadableImage."""

    @abstractmethod
    def name(self, position: int) -> str:
        """What to call image `position` when talking to the user: its path, or `train[17]`."""

    @property
    def pixels_NHWC(self) -> NDArray[np.uint8] | None:
        """All images, where they are held in memory at one size; else None."""
        return None

    @property
    def decoded(self) -> bool:
        """Whether reading an image costs no decoding."""
        return self.pixels_NHWC is not None

    def outline(self) -> str:
        """A hash of labels and of what images are called: changes when an image comes, goes or is moved, and opens none."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels_N, "<i8").tobytes())
        for position in range(len(self)):
            digest.update(os.fsencode(self.place(position)) + b"\0")
        return digest.hexdigest()

    def place(self, position: int) -> str:
        """`name`, but the same wherever the data lie."""
        return self.name(position)

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when an image, its label or the order changes. Reads all images."""

    def stamp(self) -> str | None:
        """A hash of what the file system says of the files that the images lie in; None where reading them costs nothing."""
        return None

    def known_fingerprint(self) -> str:
        """`fingerprint`, read no more often than the `stamp` changes."""
        stamp = self.stamp()
        return self.fingerprint() if stamp is None else remembered(stamp, self.fingerprint)


def is_small(image_size: tuple[int, int] | None) -> TypeGuard[tuple[int, int]]:
    """Whether images are padded and shifted at their own size; others are photos, cropped and resized."""
    return image_size is not None and max(image_size) <= SMALL_IMAGE


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set whose splits are opened one by one: nothing reads a split that nobody asked for."""

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: tuple[int, int] | None
    """(height, width) where all images share it; None for photos of many sizes, and for photos that were made so small that
    they would pass for small images."""
    mirror_safe: bool
    """False where the mirror image means something else, as for digits."""
    open_split: Callable[[SplitName], Split]
    """Raises UserError where the data has no such split."""
    has_test: bool
    set_aside: int = 0
    """images that were set aside as the test split, where the data have none of their own"""
    reduced_to: int | None = None
    """pixels of the shorter side that `deit data cache` brought larger photos down to, where it did"""
    more_unlabelled: bool = False
    """whether there are images without labels that were not asked for"""
    bad_images: Sequence[str] = ()
    """Images left out of the training and validation splits, each as `path: why`."""

    def outline(self) -> dict[str, Any]:
        """What to know the data by later: classes, numbers of images, `Split.outline` of the training and validation
        images. Opens no image."""
        train, val = self.open_split("train"), self.open_split("val")
        hashes = {"train": train.outline(), "val": val.outline()}
        return {"classes": list(self.classes), "train": len(train), "val": len(val), "outline": hashes}
