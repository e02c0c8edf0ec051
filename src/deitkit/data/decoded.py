"""Images decoded once and read many times: uncompressed, in an Arrow file that is mapped into memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from deitkit.data.base import Split
from deitkit.data.encoded import buffer_of, read_arrow, write_arrow
from deitkit.data.images import UnreadableImage, decode
from deitkit.data.scan import ahead

SCHEMA = pa.schema([("bytes", pa.large_binary()), ("label", pa.int64())])
"""An image as a PGM (grey) or PPM (colour) file, empty where it could not be read, and its label."""
MOST_BYTES = 2**32
"""More than that is not decoded ahead."""
_BATCH, _SAMPLE = 64, 32


@final
class DecodedSplit(Split):
    """`original`, read from its decoded copy."""

    def __init__(self, original: Split, path: Path) -> None:
        self.labels_N, self.channels = original.labels_N, original.channels
        self.original, self._path = original, path
        self._images: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None}  # a loader worker maps the file itself

    @property
    def decoded(self) -> bool:
        return True

    def read(self, position: int) -> NDArray[np.uint8]:
        if self._images is None:
            self._images = read_arrow(self._path).column(0)
        image = buffer_of(self._images[position])
        return decode(image, self.name(position)) if len(image) else self.original.read(position)

    def name(self, position: int) -> str:
        return self.original.name(position)

    def fingerprint(self) -> str:
        return self.original.fingerprint()


def worth_decoding(split: Split, folder: Path, *, reserved: int = 0) -> bool:
    """Whether a decoded copy in `folder` saves work, and fits there beside the `reserved` bytes of something else."""
    if split.decoded:
        return False
    return _copy_bytes(split) <= min(MOST_BYTES, (shutil.disk_usage(folder).free - reserved) // 2)


def write_decoded(
    split: Split,
    path: Path,
    on_images: Callable[[int], None],
    change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = lambda image_HWC: image_HWC,
) -> None:
    """Write every image of `split`, after `change`, to the Arrow file `path`, whole or not at all. `on_images` is told how
    many are done. Raises UserError where the disk refuses."""
    write_arrow(_rows(split, on_images, change), SCHEMA, path)


def portable_pixmap(image_HWC: NDArray[np.uint8]) -> bytes:
    """The image as a PGM (grey) or PPM (colour) file: a line of text, then the pixels."""
    height, width, channels = image_HWC.shape
    return f"P{5 if channels == 1 else 6} {width} {height} 255\n".encode() + image_HWC.tobytes()


def _rows(
    split: Split, on_images: Callable[[int], None], change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
) -> Iterator[Any]:
    def image(position: int) -> bytes:
        try:
            return portable_pixmap(change(split.read(position)))
        except UnreadableImage:
            return b""

    def batch(start: int) -> Any:
        positions = range(start, min(start + _BATCH, len(split)))
        images = pa.array([image(position) for position in positions], pa.large_binary())
        return pa.record_batch([images, pa.array(split.labels_N[list(positions)])], schema=SCHEMA)

    done = 0
    for rows in ahead(batch, iter(range(0, len(split), _BATCH))):
        done += rows.num_rows
        on_images(done)
        yield rows


def _copy_bytes(split: Split) -> float:
    """About how large a decoded copy would be, judged by a few images."""
    sizes = []
    for position in np.linspace(0, len(split) - 1, min(len(split), _SAMPLE)).astype(int).tolist():
        try:
            sizes.append(split.read(position).size)
        except UnreadableImage:
            continue
    return len(split) * float(np.mean(sizes)) if sizes else 0.0
