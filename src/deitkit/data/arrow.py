"""Images in Arrow and Parquet files: folders of the Hugging Face hub, folders of `deit data cache`, decoded copies.

Arrow files are mapped into memory: an image is one page fault away, and all loader workers share the pages. Their first
column holds images, encoded or as PPM or PGM files (the pixels, uncompressed): decoded once, read many times.

A folder of the hub has `train-*.parquet`, `test-*.parquet` and `validation-*.parquet`, in it or in one folder below; an image
column (`img` or `image`: encoded bytes, alone or as struct {bytes, path}) and a label column (`label`, `fine_label` or
`labels`: numbers, whose names stand in the schema's metadata, or strings). Images of one size that fit are decoded once into
memory. Others are unpacked once into an Arrow file in the cache.

`deit data cache` writes `resized.json` (`ResizedManifest`) and an Arrow file for each split (`train.arrow`, ...) with columns
`bytes` and `label`. An unreadable image is a row without bytes: it is left out, or counts as wrong, as in the original.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from deitkit.config import Config, DataConfig, Pixels
from deitkit.data.dataset import (
    NO_LABEL,
    Dataset,
    Source,
    Split,
    SplitName,
    UnreadableImage,
    ahead,
    assemble,
    cache_folder,
    file_state,
    hash_with_labels,
    is_small,
    memory_source,
    scan,
    with_channels,
)
from deitkit.data.folder import decode, portable_pixmap, probe
from deitkit.settings import explain
from deitkit.terminal import Replaced, UserError, alone, leftovers, refuse_filled, shortened, write_atomically, written

SCHEMA = pa.schema([("bytes", pa.large_binary()), ("label", pa.int64())])
"""An image as a PGM (grey) or PPM (colour) file, empty where it could not be read, and its label."""
MANIFEST = "resized.json"
MEMORY_LIMIT_BYTES = 1 << 30
"""Decoded images of one size are held in memory up to this."""
MOST_BYTES = 2**32
"""More than that is not decoded ahead."""
_COPY_BATCH, _COPY_SAMPLE, _PARQUET_BATCH = 64, 32, 512
_PREFIXES = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("img", "image"), ("label", "fine_label", "labels")


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


def _bytes_of(scalar: Any) -> memoryview:
    """The bytes of an Arrow scalar without a copy; none for null."""
    buffer = scalar.as_buffer()
    return memoryview(b"" if buffer is None else buffer)


class ArrowSplit(Split):
    """The images in the first column of an Arrow file, with their labels, decoded one by one. `pixmaps`: they are PPM or PGM
    files, which cost no decoding. The file is mapped when the first image is read: a loader worker maps it itself."""

    def __init__(self, path: Path, labels_N: NDArray[np.int64], channels: int = 3, *, pixmaps: bool) -> None:
        self.labels_N, self.channels = labels_N, channels
        self.rows_N, self.title = np.arange(len(labels_N)), ""
        self._path, self._pixmaps = path, pixmaps
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
        return _bytes_of(self._column[int(self.rows_N[position])])

    def read(self, position: int) -> NDArray[np.uint8]:
        return with_channels(decode(self.encoded(position), self.name(position)), self.channels)

    def content_hash(self) -> str:
        images = (self.encoded(position) for position in range(len(self)))
        return hash_with_labels(self.labels_N, (hashlib.sha256(image).digest() for image in images))

    def mtime_hash(self) -> str:
        return hash_with_labels(self.labels_N, (self.rows_N.tobytes(), file_state(self._path)))

    def scan(self, name: Callable[[int], str]) -> Source:
        """`name(position)` says where the user finds an image."""
        return scan(self, lambda k, whole: probe(self.encoded(k), name(k), whole=whole), self.mtime_hash())


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


class Table(NamedTuple):
    """The Parquet files of one split, the columns that matter, and the labels as they are: numbers or strings."""

    files: tuple[Path, ...]
    image: str
    label: str
    labels_N: NDArray[Any]


def is_parquet_folder(folder: Path) -> bool:
    return folder.is_dir() and bool(_folders_with_parquet(folder))


def load_parquet(
    folder: Path, config: DataConfig, *, name: str, classes: tuple[str, ...] | None = None, mirror_safe: bool = True
) -> Dataset:
    """The data set in `folder`. `classes` are the names if they are known; else the files' metadata has them. Raises
    UserError for missing splits or columns, damaged files, and labels without a class."""
    files = _find_files(folder)
    train = _table(files["train"])
    names = classes or _class_names(train)

    def source(table: Table, *, drop_bad: bool = True) -> Source:
        labels_N = _numbers(table, names, text=train.labels_N.dtype == object)
        held = _decoded_source(table, labels_N)
        return _unpacked_source(table, labels_N) if held is None or (held.bad and not drop_bad) else held

    def test() -> Split:  # nothing else opens its files; none of its images is left out
        return source(_table(files["test"]), drop_bad=False).images

    return assemble(
        name=name,
        classes=names,
        mirror_safe=mirror_safe,
        config=config,
        validation=source(_table(files["val"])) if files["val"] else None,
        train=source(train),
        test=test if files["test"] else None,
    )


def _folders_with_parquet(folder: Path) -> list[Path]:
    if any(folder.glob("*.parquet")):
        return [folder]
    below = (entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith("."))
    return [entry for entry in below if any(entry.glob("*.parquet"))]


def _find_files(folder: Path) -> dict[str, tuple[Path, ...]]:
    found, *more = _folders_with_parquet(folder)
    if more:
        names = " and ".join(entry.name for entry in (found, *more))
        raise UserError(f"{folder}: Parquet files lie in {names}; give one of these folders")
    present = sorted(path for path in found.glob("*.parquet") if not path.name.startswith("."))
    files = {
        split: tuple(path for path in present if path.name.removesuffix(".parquet").split("-")[0] in prefixes)
        for split, prefixes in _PREFIXES.items()
    }
    if not files["train"]:
        raise UserError(f"{found}: no train-*.parquet among its Parquet files; name the training files so")
    return files


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}") from error


def _table(files: tuple[Path, ...]) -> Table:
    with _reading(files[0]) as file:
        columns = file.schema_arrow.names
    image = next((column for column in _IMAGE_COLUMNS if column in columns), None)
    label = next((column for column in _LABEL_COLUMNS if column in columns), None)
    if image is None or label is None:
        wanted = " or ".join(_IMAGE_COLUMNS if image is None else _LABEL_COLUMNS)
        raise UserError(f"{files[0]}: no column {wanted}, only {', '.join(columns)}; rename the one that is meant")
    parts: list[NDArray[Any]] = []
    for path in files:
        with _reading(path) as file:
            if not {image, label} <= {*file.schema_arrow.names}:
                raise UserError(f"{path}: lacks {image} or {label}, which {files[0].name} has")
            column = file.read([label]).column(0)
        if column.null_count:
            raise UserError(f"{path}: {column.null_count} rows of column {label} are empty; fill them")
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        parts.append(column.to_numpy())
        kind = column.type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not (text or pa.types.is_integer(kind)) or (parts[0].dtype == object) != text:
            raise UserError(f"{path}: column {label} holds {kind}; labels are whole numbers, or strings in all files")
    labels_N = np.concatenate(parts)
    if not len(labels_N):
        raise UserError(f"{files[0].parent}: {files[0].name} holds no images")
    return Table(files, image, label, labels_N)


def _class_names(table: Table) -> tuple[str, ...]:
    first, labels_N = table.files[0], table.labels_N
    if labels_N.dtype == object:
        return tuple(map(str, np.unique(labels_N)))
    with _reading(first) as file:
        metadata = file.schema_arrow.metadata or {}
    try:
        names = tuple(map(str, json.loads(metadata[b"huggingface"])["info"]["features"][table.label]["names"]))
    except (KeyError, TypeError, ValueError):
        names = ()
    most = int(labels_N.max())
    if not names and most >= len(labels_N):
        raise UserError(f"{first}: label {most} of {len(labels_N)} images: labels count from 0, without gaps")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{first}: two classes are called {twice!r}: give each its own name")
    return names or tuple(map(str, range(most + 1)))


def _numbers(table: Table, classes: tuple[str, ...], *, text: bool) -> NDArray[np.int64]:
    """Labels as numbers of `classes`. `text`: whether those of the training images are strings."""
    first, labels_N = table.files[0], table.labels_N
    if (labels_N.dtype == object) != text:
        kinds = ("numbers", "strings") if text else ("strings", "numbers")
        raise UserError(f"{first}: labels are {kinds[0]}, those of the training images {kinds[1]}")
    if text:
        number = {name: index for index, name in enumerate(classes)}
        unknown = next((label for label in labels_N if label not in number), None)
        if unknown is not None:
            raise UserError(f"{first}: label {unknown!r} is none of the {len(classes)} training classes")
        return np.array([number[label] for label in labels_N], np.int64)
    numbers_N = labels_N.astype(np.int64)
    outside_N = numbers_N[(numbers_N < 0) | (numbers_N >= len(classes))]
    if len(outside_N):
        raise UserError(
            f"{first}: label {outside_N[0]} ({len(outside_N)} rows) is outside 0..{len(classes) - 1}; "
            "the split has no labels or other classes"
        )
    return numbers_N


def _encoded(table: Table) -> Iterator[tuple[Path, int, pa.Array]]:
    """The encoded images, batch by batch: file, first row in it, binary array."""
    for path in table.files:
        row = 0
        with _reading(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=[table.image]):
                column = batch.column(0)
                if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
                    column = pc.struct_field(column, "bytes")
                if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
                    raise UserError(
                        f"{path}: column {table.image} holds {column.type}, not encoded images (bytes, or struct with bytes)"
                    )
                yield path, row, column
                row += len(column)


def _decoded_source(table: Table, labels_N: NDArray[np.int64]) -> Source | None:
    """All images decoded, or None where they differ in size or are too large together."""
    pixels_NHWC: NDArray[np.uint8] | None = None
    bad = {}
    for row, image in enumerate(image for images in ahead(_decode_batch, _encoded(table)) for image in images):
        if isinstance(image, str):
            bad[row] = image
            continue
        if pixels_NHWC is None:
            if len(labels_N) * image.size > MEMORY_LIMIT_BYTES:
                return None
            pixels_NHWC = np.zeros((len(labels_N), *image.shape), np.uint8)
        if image.shape[:2] != pixels_NHWC.shape[1:3]:
            return None
        if image.shape[-1] > pixels_NHWC.shape[-1]:  # grey so far, now in colour
            pixels_NHWC = np.repeat(pixels_NHWC, 3, axis=-1)
        pixels_NHWC[row] = image
    return None if pixels_NHWC is None else memory_source(pixels_NHWC, labels_N, bad)


def _decode_batch(batch: tuple[Path, int, pa.Array]) -> list[NDArray[np.uint8] | str]:
    """The images of a batch, or why one cannot be decoded."""
    path, first, column = batch
    images: list[NDArray[np.uint8] | str] = []
    for row, scalar in enumerate(column, first):
        try:
            images.append(decode(_bytes_of(scalar), f"{path} row {row}"))
        except UnreadableImage as error:
            images.append(str(error))
    return images


def _unpacked_source(table: Table, labels_N: NDArray[np.int64]) -> Source:
    """The images unpacked into the cache: once, however many processes want them."""
    key = hashlib.sha256(table.image.encode())
    starts = [0]
    for path in table.files:
        status = path.stat()
        key.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        with _reading(path) as file:
            starts.append(starts[-1] + file.metadata.num_rows)
    target = cache_folder() / "parquet" / f"{key.hexdigest()[:32]}.arrow"
    schema = pa.schema([SCHEMA.field("bytes")])

    def is_whole() -> bool:  # one that was damaged since is made again
        with contextlib.suppress(UserError):
            return read_arrow(target) is not None
        return False

    def name(row: int) -> str:
        file = int(np.searchsorted(starts, row, side="right")) - 1
        return f"{table.files[file]} row {row - starts[file]}"

    if not is_whole():
        with written(target.parent), alone(target.parent):
            if not is_whole():  # another process has been here
                for left in leftovers(target):
                    left.unlink()
                columns = (column.cast(pa.large_binary()) for _, _, column in _encoded(table))
                write_arrow((pa.record_batch([column], schema=schema) for column in columns), schema, target)
    return ArrowSplit(target, labels_N, pixmaps=False).scan(name)
