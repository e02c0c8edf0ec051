"""Images that stay encoded in the first column of an Arrow file that is mapped into memory.

Any image is one page fault away, and all loader workers share the pages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from deitkit.data.base import Split
from deitkit.data.cache import state_of
from deitkit.data.images import decode, probe, with_channels
from deitkit.data.scan import scan
from deitkit.data.source import Source
from deitkit.errors import UserError
from deitkit.files import Replaced


@final
class EncodedSplit(Split):
    """Images that stay encoded in a memory-mapped Arrow file, decoded one by one."""

    def __init__(
        self,
        path: Path,
        rows_N: NDArray[np.int64],
        labels_N: NDArray[np.int64],
        channels: int,
        title: str,
        decoded: bool = False,
    ) -> None:
        self.labels_N = labels_N
        self._decoded = decoded
        self.channels = channels
        self._path = path
        self._rows_N = rows_N
        self._title = title
        self._images: Any = None
        self._fingerprint: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None}  # a loader worker maps the file itself

    @property
    def decoded(self) -> bool:
        return self._decoded

    def encoded(self, position: int) -> memoryview:
        if self._images is None:
            self._images = read_arrow(self._path).column(0)
        return buffer_of(self._images[int(self._rows_N[position])])

    def read(self, position: int) -> NDArray[np.uint8]:
        return with_channels(decode(self.encoded(position), self.name(position)), self.channels)

    def name(self, position: int) -> str:
        return f"{self._title}[{self._rows_N[position]}]"

    def place(self, position: int) -> str:
        return str(self._rows_N[position])

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            digest = hashlib.sha256(np.ascontiguousarray(self.labels_N, "<i8").tobytes())
            for position in range(len(self)):
                digest.update(hashlib.sha256(self.encoded(position)).digest())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def stamp(self) -> str | None:
        digest = hashlib.sha256(np.ascontiguousarray(self.labels_N, "<i8").tobytes())
        digest.update(np.ascontiguousarray(self._rows_N, "<i8").tobytes())
        try:
            digest.update(state_of(self._path))
        except OSError:
            return None
        return digest.hexdigest()


@final
class EncodedSource(Source):
    """All images of the Arrow file `path`; `names` says where the user finds a row. `decoded`: they are uncompressed."""

    def __init__(
        self, path: Path, labels_N: NDArray[np.int64], names: Callable[[int], str], *, decoded: bool = False
    ) -> None:
        images = read_arrow(path).column(0)
        self.labels_N = labels_N
        self._path = path
        self._decoded = decoded
        self.scan = scan(lambda row, whole: probe(buffer_of(images[row]), names(row), whole=whole), len(labels_N))

    def splits(self, parts: Sequence[NDArray[np.int64]], channels: int, title: str) -> list[Split]:
        return [
            EncodedSplit(self._path, rows_N, self.labels_N[rows_N], channels, title, self._decoded) for rows_N in parts
        ]


def write_arrow(batches: Iterator[Any], schema: Any, target: Path) -> None:
    """Write record batches as one Arrow file, whole or not at all. Raises UserError where the disk refuses."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            Replaced(target) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, schema) as file,
        ):
            for batch in batches:
                file.write_batch(batch)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error}; make room there for the unpacked images") from error


def read_arrow(path: Path) -> Any:
    """The table in an Arrow file, mapped into memory. Raises UserError."""
    options = pa.ipc.IpcReadOptions(use_threads=False)  # Arrow's threads do not survive the fork of a loader worker
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)), options=options).read_all()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as an Arrow file: {' '.join(str(error).split())}") from error


def buffer_of(scalar: Any) -> memoryview:
    """The bytes of an Arrow scalar without a copy; none for null."""
    buffer = scalar.as_buffer()
    return memoryview(b"" if buffer is None else buffer)
