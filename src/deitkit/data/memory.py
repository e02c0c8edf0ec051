"""Images of one size, held in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from deitkit.data.base import Split
from deitkit.data.images import with_channels
from deitkit.data.scan import Scan
from deitkit.data.source import Source


@final
class MemorySplit(Split):
    """uint8 pixels of shape (N, H, W, C). `rows_N` says where each image stands in the file that it came from:
    image `position` is called `source[row]`."""

    def __init__(
        self, pixels_NHWC: NDArray[np.uint8], labels_N: NDArray[np.int64], rows_N: NDArray[np.int64], source: str
    ) -> None:
        if not len(pixels_NHWC) == len(labels_N) == len(rows_N):
            raise ValueError(f"{len(pixels_NHWC)} images, {len(labels_N)} labels, {len(rows_N)} rows")
        self._pixels_NHWC = pixels_NHWC
        self.labels_N = labels_N.astype(np.int64, copy=False)
        self.channels = int(pixels_NHWC.shape[-1])
        self._rows_N = rows_N
        self._source = source
        self._fingerprint: str | None = None

    @property
    def pixels_NHWC(self) -> NDArray[np.uint8]:
        return self._pixels_NHWC

    def read(self, position: int) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = self._pixels_NHWC[position]
        return image

    def name(self, position: int) -> str:
        return f"{self._source}[{self._rows_N[position]}]"

    def place(self, position: int) -> str:
        return str(self._rows_N[position])

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            digest = hashlib.sha256(repr(self._pixels_NHWC.shape).encode())
            digest.update(np.ascontiguousarray(self.labels_N, "<i8").tobytes())
            digest.update(np.ascontiguousarray(self._pixels_NHWC).data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


@final
class MemorySource(Source):
    """Decoded pixels of shape (N, H, W, C) with labels; `bad` names the rows of `readable_N` that are False."""

    def __init__(
        self,
        pixels_NHWC: NDArray[np.uint8],
        labels_N: NDArray[np.int64],
        readable_N: NDArray[np.bool_] | None = None,
        bad: Sequence[str] = (),
    ) -> None:
        height, width, channels = (int(size) for size in pixels_NHWC.shape[1:])
        readable_N = np.ones(len(labels_N), np.bool_) if readable_N is None else readable_N
        self.labels_N = labels_N
        self.scan = Scan(readable_N, list(bad), channels, (height, width))
        self._pixels_NHWC = pixels_NHWC

    def splits(self, parts: Sequence[NDArray[np.int64]], channels: int, title: str) -> list[Split]:
        """The parts lie one after the other in memory: together they take that of one copy, not of two."""
        rows = np.concatenate(parts)
        pixels_NHWC = self._pixels_NHWC
        if not np.array_equal(rows, np.arange(len(pixels_NHWC))):
            pixels_NHWC = pixels_NHWC[rows]
        if pixels_NHWC.shape[-1] != channels:
            pixels_NHWC = np.stack([with_channels(image_HWC, channels) for image_HWC in pixels_NHWC])
        ends = np.cumsum([len(part) for part in parts])
        starts = ends - [len(part) for part in parts]
        return [
            MemorySplit(pixels_NHWC[start:end], self.labels_N[part], part, title)
            for start, end, part in zip(starts, ends, parts, strict=True)
        ]
