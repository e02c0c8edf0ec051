"""A split as it lies on the disk, before it is decided which of its images train and which validate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deitkit.data.base import Split
from deitkit.data.scan import Scan


class Source(ABC):
    """Rows 0..N-1 of a file or folder, with their labels and the verdict of a scan."""

    labels_N: NDArray[np.int64]
    scan: Scan

    @abstractmethod
    def splits(self, parts: Sequence[NDArray[np.int64]], channels: int, title: str) -> list[Split]:
        """One split for each array of rows, all images with `channels` channels."""

    def split(self, rows: NDArray[np.int64] | None, channels: int, title: str) -> Split:
        """The split of `rows`, or of all."""
        return self.splits([np.arange(len(self.labels_N)) if rows is None else rows], channels, title)[0]
