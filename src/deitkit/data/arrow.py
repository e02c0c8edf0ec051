"""Images in Arrow files: folders of `deit data cache`, decoded copies.

Arrow files are mapped into memory: an image is one page fault away, and all loader workers share the pages. Their first
column holds images, encoded or as PPM or PGM files (the pixels, uncompressed): decoded once, read many times.

`deit data cache` writes `resized.json` (`ResizedManifest`) and an Arrow file for each split (`train.arrow`, ...) with columns
`bytes` and `label`. An unreadable image is a row without bytes: it is left out, as in the original.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from deitkit.config import MAX_PIXELS, Config, DataConfig, Pixels
from deitkit.data.caching import ahead, file_state
from deitkit.data.dataset import (
    NO_LABEL,
    Dataset,
    Source,
    Split,
    SplitName,
    assemble,
    hash_with_labels,
    is_small,
    scan,
)
from deitkit.data.decode import Shape, UnreadableImage, decode, portable_pixmap, probe, with_channels
from deitkit.settings import explain
from deitkit.terminal import (
    Replaced,
    UserError,
    refuse_filled,
    shortened,
    write_atomically,
    written,
)

SCHEMA = pa.schema([("bytes", pa.large_binary()), ("label", pa.int64())])
"""An image as a PGM (grey) or PPM (colour) file, empty where it could not be read, and its label."""
MANIFEST = "resized.json"
MOST_BYTES = 2**32
"""More than that is not decoded ahead."""
_COPY_BATCH, _COPY_SAMPLE = 64, 32


def read_arrow(path: Path) -> Any:
    """The table in an Arrow file, mapped into memory. Raises UserError."""
    options = pa.ipc.IpcReadOptions(use_threads=False)  # Arrow's threads do not survive the fork of a loader worker
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)), options=options).read_all()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as an Arrow file: {' '.join(str(error).split())}") from error


def write_arrow(batches: Iterator[Any], schema: Any, target: Path) -> None:
    """Write record batches as one Arrow file, whole or not at all. Raises UserError where the disk refuses."""
    with written(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with Replaced(target) as part, pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
            for batch in batches:
                file.write_batch(batch)


def bytes_of(scalar: Any) -> memoryview:
    """The bytes of an Arrow scalar without a copy; none for null."""
    buffer = scalar.as_buffer()
    return memoryview(b"" if buffer is None else buffer)


class ArrowSplit(Split):
    """The images in the first column of an Arrow file, with their labels, decoded one by one. `pixmaps`: they are PPM or PGM
    files, which cost no decoding. The file is mapped when the first image is read: a loader worker maps it itself."""

    def __init__(
        self, path: Path, labels_N: NDArray[np.int64], channels: int = 3, *, pixmaps: bool, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.labels_N, self.channels = labels_N, channels
        self.rows_N, self.title = np.arange(len(labels_N)), ""
        self._path, self._pixmaps, self._max_pixels = path, pixmaps, max_pixels
        self._column: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_column": None}

    @property
    def decoded(self) -> bool:
        return self._pixmaps

    def encoded(self, position: int) -> memoryview:
        """The image file."""
        if self._column is None:
            self._column = read_arrow(self._path).column(0)
        return bytes_of(self._column[int(self.rows_N[position])])

    def stored(self, position: int) -> memoryview:
        return self.encoded(position)

    def read(self, position: int) -> NDArray[np.uint8]:
        return with_channels(decode(self.encoded(position), self.name(position), self._max_pixels), self.channels)

    def content_hash(self) -> str:
        images = (self.encoded(position) for position in range(len(self)))
        return hash_with_labels(self.labels_N, (hashlib.sha256(image).digest() for image in images))

    def mtime_hash(self) -> str:
        return hash_with_labels(self.labels_N, (self.rows_N.tobytes(), file_state(self._path)))

    def scan(self, name: Callable[[int], str]) -> Source:
        """`name(position)` says where the user finds an image."""

        def look(position: int, whole: bool) -> Shape:
            return probe(self.encoded(position), name(position), whole=whole, max_pixels=self._max_pixels)

        return scan(self, look, f"{self.mtime_hash()} {self._max_pixels}")


@final
class DecodedSplit(ArrowSplit):
    """`original`, read from the decoded copy of it that `write_decoded` put at `path`."""

    def __init__(self, original: Split, path: Path) -> None:
        super().__init__(path, original.labels_N, original.channels, pixmaps=True)
        self._original = original

    def name(self, position: int) -> str:
        return self._original.name(position)


def worth_decoding(split: Split, folder: Path, *, reserved: int = 0) -> bool:
    """Whether a decoded copy in `folder`, its size judged by a few images, saves work and fits there beside the `reserved`
    bytes of something else."""
    if split.decoded:
        return False
    sizes = []
    for position in np.linspace(0, len(split) - 1, min(len(split), _COPY_SAMPLE)).astype(int).tolist():
        with contextlib.suppress(UnreadableImage):
            sizes.append(split.read(position).size)
    copy_bytes = len(split) * float(np.mean(sizes)) if sizes else 0.0
    return copy_bytes <= min(MOST_BYTES, (shutil.disk_usage(folder).free - reserved) // 2)


def write_decoded(
    split: Split,
    path: Path,
    on_images: Callable[[int], None],
    change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = lambda image_HWC: image_HWC,
) -> None:
    """Write every image of `split`, after `change`, to the Arrow file `path`, whole or not at all. `on_images` is told how
    many are done. Raises UserError where the disk refuses."""

    def image(position: int) -> bytes:
        try:
            return portable_pixmap(change(split.read(position)))
        except UnreadableImage:
            return b""

    def batch(positions: range) -> Any:
        images = pa.array([image(position) for position in positions], pa.large_binary())
        return pa.record_batch([images, pa.array(split.labels_N[list(positions)])], schema=SCHEMA)

    chunks = [range(start, min(start + _COPY_BATCH, len(split))) for start in range(0, len(split), _COPY_BATCH)]

    def batches() -> Iterator[Any]:
        for positions, rows in zip(chunks, ahead(batch, chunks), strict=True):
            on_images(positions.stop)
            yield rows

    write_arrow(batches(), SCHEMA, path)


def resize(image_HWC: NDArray[np.uint8], shorter_side: int) -> NDArray[np.uint8]:
    """The whole image, its shorter side `shorter_side` pixels; a smaller one as it is."""
    height, width, channels = image_HWC.shape
    scale = shorter_side / min(height, width)
    if scale >= 1:
        return image_HWC
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(image_HWC[..., 0] if channels == 1 else image_HWC)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC)).reshape(size[1], size[0], channels)


class ResizedManifest(Config):
    """What resized.json says."""

    format: Literal[1] = 1
    name: str
    classes: tuple[str, ...]
    mirror_safe: bool
    shorter_side: Pixels
    photos: bool
    """whether they were photos before, which they stay at any size"""
    reduced: bool
    """whether any image was larger before"""
    settings: dict[str, Any]
    """data settings that the split was made with"""


def is_resized_folder(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def write_resized(
    dataset: Dataset, config: DataConfig, shorter_side: int, out: Path, on_images: Callable[[int], None]
) -> dict[str, int]:
    """Write every split of `dataset` to `out`, each image with a shorter side of at most `shorter_side` pixels. `on_images` is
    told how many are done. Returns the number of images by split. Raises UserError."""
    refuse_filled(out, "give another --out")
    target = out.resolve()
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}")  # takes its place when it is whole
    counts: dict[str, int] = {}
    reduced = dataset.reduced_to is not None  # a cache of a cache

    def change(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        nonlocal reduced
        reduced = reduced or min(image_HWC.shape[:2]) > shorter_side
        return resize(image_HWC, shorter_side)

    with written(out), contextlib.ExitStack() as undo:
        part.mkdir(parents=True)
        undo.callback(shutil.rmtree, part, ignore_errors=True)
        for name in dataset.split_names:
            split, before = dataset.open_split(name), sum(counts.values())
            write_decoded(split, part / f"{name}.arrow", lambda done, before=before: on_images(before + done), change)  # type: ignore[misc]
            counts[name] = len(split)
        manifest = ResizedManifest(
            name=dataset.name,
            classes=dataset.classes,
            mirror_safe=dataset.mirror_safe,
            shorter_side=min(shorter_side, dataset.reduced_to or shorter_side),
            photos=not is_small(dataset.image_size),
            reduced=reduced,
            settings=config.split_settings(),
        )
        write_atomically(part / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        part.replace(target)
    return counts


def load_resized(folder: Path, config: DataConfig) -> Dataset:
    """The data set in a folder of `deit data cache`. Raises UserError."""
    try:
        manifest = ResizedManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except ValidationError as error:
        raise UserError(f"{folder / MANIFEST}: {explain(ResizedManifest, error)}") from error
    except OSError as error:
        raise UserError(f"{folder / MANIFEST}: cannot be read: {error.strerror}") from error

    def source(split: SplitName) -> Source:
        path, least, most = folder / f"{split}.arrow", NO_LABEL if split == "train" else 0, len(manifest.classes) - 1
        table = read_arrow(path)
        if not table.schema.equals(SCHEMA):
            found = shortened(str(table.schema))
            raise UserError(f"{path}: is not as deit data cache writes it: its columns are {found}")
        labels_N = table.column("label").to_numpy()
        if len(labels_N) and not least <= labels_N.min() <= labels_N.max() <= most:
            raise UserError(f"{path}: labels outside {least}..{most}: it does not belong to {MANIFEST} beside it")
        return ArrowSplit(path, labels_N, pixmaps=True).scan(lambda row: f"{path} row {row}")

    dataset = assemble(
        name=manifest.name,
        classes=manifest.classes,
        mirror_safe=manifest.mirror_safe,
        config=config,
        train=source("train"),
        validation=source("val"),
        test=(lambda: source("test").images) if (folder / "test.arrow").is_file() else None,
    )
    if manifest.photos and is_small(dataset.image_size):
        dataset = replace(dataset, image_size=None)
    return replace(dataset, reduced_to=manifest.shorter_side) if manifest.reduced else dataset
