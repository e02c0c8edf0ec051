"""Images in Arrow and Parquet files: folders of the Hugging Face hub, folders of `deit data cache`, decoded copies.

Arrow files are mapped into memory: an image is one page fault away, and all loader workers share the pages. Their first
column holds images, encoded or as a PPM or PGM file (the pixels, uncompressed): decoded once, read many times.

A folder of the hub has `train-*.parquet`, `test-*.parquet` and `validation-*.parquet`, in it or in one folder below; an image
column (`img` or `image`: encoded bytes, alone or as struct {bytes, path}) and a label column (`label`, `fine_label` or
`labels`: numbers, whose names stand in the schema's metadata, or strings). Images of one size that fit are decoded once into
memory. Others are unpacked once into an Arrow file in the cache.

`deit data cache` writes `resized.json` (`ResizedManifest`) and for each split that was asked for an Arrow file such as
`train.arrow`: a row an image, `bytes` (a PPM or PGM file) and `label`. An image that could not be read is a row without
bytes: it is left out, or counts as wrong, exactly as in the original.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
from deitkit.data.folder import decode, probe
from deitkit.settings import explain
from deitkit.terminal import Lock, Replaced, UserError, alone, leftovers, refuse_filled, shortened, write_atomically

SCHEMA = pa.schema([("bytes", pa.large_binary()), ("label", pa.int64())])
"""An image as a PGM (grey) or PPM (colour) file, empty where it could not be read, and its label."""
MANIFEST = "resized.json"
MEMORY_LIMIT_BYTES = 1 << 30
"""Decoded images of one size are held in memory up to this."""
MOST_BYTES = 2**32
"""More than that is not decoded ahead."""
_COPY_BATCH, _COPY_SAMPLE, _PARQUET_BATCH = 64, 32, 512
_PREFIXES = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}
_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label", "labels")


def read_arrow(path: Path) -> Any:
    """The table in an Arrow file, mapped into memory. Raises UserError."""
    options = pa.ipc.IpcReadOptions(use_threads=False)  # Arrow's threads do not survive the fork of a loader worker
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)), options=options).read_all()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as an Arrow file: {' '.join(str(error).split())}") from error


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


def _bytes_of(scalar: Any) -> memoryview:
    """The bytes of an Arrow scalar without a copy; none for null."""
    buffer = scalar.as_buffer()
    return memoryview(b"" if buffer is None else buffer)


@final
class Images:
    """The images in the first column of an Arrow file, mapped when the first is read: a loader worker maps the file itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._column: Any = None

    def __reduce__(self) -> tuple[type[Images], tuple[Path]]:
        return Images, (self.path,)

    def __getitem__(self, row: int) -> memoryview:
        if self._column is None:
            self._column = read_arrow(self.path).column(0)
        return _bytes_of(self._column[row])


@final
class ArrowSplit(Split):
    """Rows of an Arrow file with their labels, decoded one by one. `pixmaps`: they are uncompressed, as PPM or PGM files."""

    def __init__(
        self,
        images: Images,
        rows_N: NDArray[np.int64],
        labels_N: NDArray[np.int64],
        channels: int,
        title: str,
        pixmaps: bool,
    ) -> None:
        self.labels_N, self.channels = labels_N, channels
        self._images, self._rows_N, self._title, self._pixmaps = images, rows_N, title, pixmaps

    @property
    def decoded(self) -> bool:
        return self._pixmaps

    def read(self, position: int) -> NDArray[np.uint8]:
        image = self._images[int(self._rows_N[position])]
        return with_channels(decode(image, self.name(position)), self.channels)

    def name(self, position: int) -> str:
        return f"{self._title}[{self._rows_N[position]}]"

    def key(self, position: int) -> str:
        return str(self._rows_N[position])

    def content_hash(self) -> str:
        images = (self._images[row] for row in self._rows_N.tolist())
        return hash_with_labels(self.labels_N, (hashlib.sha256(image).digest() for image in images))

    def mtime_hash(self) -> str:
        rows = np.ascontiguousarray(self._rows_N, "<i8").tobytes()
        return hash_with_labels(self.labels_N, (rows, file_state(self._images.path)))


def arrow_source(path: Path, labels_N: NDArray[np.int64], name: Callable[[int], str], *, pixmaps: bool) -> Source:
    """All images of the Arrow file `path`, as pixmaps or encoded; `name(row)` says where the user finds one."""
    images = Images(path)

    def split(rows_N: NDArray[np.int64], channels: int, title: str) -> ArrowSplit:
        return ArrowSplit(images, rows_N, labels_N[rows_N], channels, title, pixmaps)

    state = split(np.arange(len(labels_N)), 3, "").mtime_hash()
    shapes = scan(lambda row, whole: probe(images[row], name(row), whole=whole), len(labels_N), state)
    return Source(labels_N, shapes, split)


@final
class DecodedSplit(Split):
    """`original`, read from the decoded copy of it that `write_decoded` put at `path`."""

    def __init__(self, original: Split, path: Path) -> None:
        self.labels_N, self.channels = original.labels_N, original.channels
        self._original, self._images = original, Images(path)

    @property
    def decoded(self) -> bool:
        return True

    def read(self, position: int) -> NDArray[np.uint8]:
        image = self._images[position]
        return decode(image, self.name(position)) if len(image) else self._original.read(position)

    def name(self, position: int) -> str:
        return self._original.name(position)

    def content_hash(self) -> str:
        return self._original.content_hash()


def worth_decoding(split: Split, folder: Path, *, reserved: int = 0) -> bool:
    """Whether a decoded copy in `folder`, its size judged by a few images, saves work and fits there beside the `reserved`
    bytes of something else."""
    if split.decoded:
        return False
    sizes = []
    for position in np.linspace(0, len(split) - 1, min(len(split), _COPY_SAMPLE)).astype(int).tolist():
        with suppress(UnreadableImage):
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

    def batches() -> Iterator[Any]:
        everything, done = range(len(split)), 0
        for rows in ahead(batch, (everything[start : start + _COPY_BATCH] for start in everything[::_COPY_BATCH])):
            done += rows.num_rows
            on_images(done)
            yield rows

    write_arrow(batches(), SCHEMA, path)


def portable_pixmap(image_HWC: NDArray[np.uint8]) -> bytes:
    """The image as a PGM (grey) or PPM (colour) file: a line of text, then the pixels."""
    height, width, channels = image_HWC.shape
    return f"P{5 if channels == 1 else 6} {width} {height} 255\n".encode() + image_HWC.tobytes()


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


def splits_of(dataset: Dataset) -> tuple[SplitName, ...]:
    return ("train", "val", "test") if dataset.has_test else ("train", "val")


def write_resized(
    dataset: Dataset, config: DataConfig, shorter_side: int, out: Path, on_images: Callable[[int], None]
) -> dict[str, int]:
    """Write every split of `dataset` to `out`, each image with a shorter side of at most `shorter_side` pixels.

    `on_images` is told how many are done. Returns the number of images by split. Raises UserError."""
    refuse_filled(out, "give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = Lock(out)
    except BlockingIOError as error:
        raise UserError(f"{out}: another process is writing there: give another --out") from error
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error
    try:
        refuse_filled(out, "give another --out")  # it may have been another process's until now
        return _write_resized(dataset, config, shorter_side, out, on_images)
    finally:
        lock.release()


def _write_resized(
    dataset: Dataset, config: DataConfig, shorter_side: int, out: Path, on_images: Callable[[int], None]
) -> dict[str, int]:
    counts: dict[str, int] = {}
    reduced = dataset.reduced_to is not None  # a cache of a cache

    def change(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        nonlocal reduced
        reduced = reduced or min(image_HWC.shape[:2]) > shorter_side
        return resize(image_HWC, shorter_side)

    try:
        for name in splits_of(dataset):
            path, split, before = out / f"{name}.arrow", dataset.open_split(name), sum(counts.values())
            for left in leftovers(path):
                left.unlink()
            write_decoded(split, path, lambda done, before=before: on_images(before + done), change)  # type: ignore[misc]
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
        write_atomically(out / MANIFEST, manifest.model_dump_json(indent=2) + "\n")  # last: now the folder is whole
    except BaseException:  # interrupted, or the disk is full: the same command is to find the folder as it was
        for file in (MANIFEST, *(f"{name}.arrow" for name in counts)):
            (out / file).unlink(missing_ok=True)
        raise
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
        path = folder / f"{split}.arrow"
        labels_N = _resized_labels(path, NO_LABEL if split == "train" else 0, len(manifest.classes))
        return arrow_source(path, labels_N, lambda row: f"{path} row {row}", pixmaps=True)

    dataset = assemble(
        name=manifest.name,
        classes=manifest.classes,
        mirror_safe=manifest.mirror_safe,
        config=config,
        train=source("train"),
        validation=source("val"),
        test=(lambda channels: source("test").whole(channels, "test")) if (folder / "test.arrow").is_file() else None,
    )
    if manifest.photos and is_small(dataset.image_size):
        dataset = replace(dataset, image_size=None)
    return replace(dataset, reduced_to=manifest.shorter_side) if manifest.reduced else dataset


def _resized_labels(path: Path, least: int, classes: int) -> NDArray[np.int64]:
    table = read_arrow(path)
    if not table.schema.equals(SCHEMA):
        raise UserError(f"{path}: is not as deit data cache writes it: its columns are {shortened(str(table.schema))}")
    labels_N: NDArray[np.int64] = table.column("label").to_numpy()
    if len(labels_N) and not least <= labels_N.min() <= labels_N.max() < classes:
        raise UserError(f"{path}: labels outside {least}..{classes - 1}: it does not belong to {MANIFEST} beside it")
    return labels_N


class Table(NamedTuple):
    """The Parquet files of one split, the columns that matter, and the labels as they are: numbers or strings."""

    files: tuple[Path, ...]
    image: str
    label: str
    labels_N: NDArray[Any]


def is_parquet_folder(folder: Path) -> bool:
    return folder.is_dir() and bool(_folders_with_parquet(folder))


def load_parquet(
    folder: Path,
    config: DataConfig,
    *,
    name: str,
    classes: tuple[str, ...] | None = None,
    mirror_safe: bool = True,
) -> Dataset:
    """The data set in `folder`. `classes` are the names where they are known; else the files' metadata has them.

    Raises UserError for missing splits or columns, damaged files, and labels without a class."""
    files = _find_files(folder)
    train = _table(files["train"])
    names = classes or _class_names(train)

    def source(table: Table, *, drop_bad: bool = True) -> Source:
        labels_N = _numbers(table, names, text=train.labels_N.dtype == object)
        held = _decoded_source(table, labels_N)
        return _unpacked_source(table, labels_N) if held is None or (held.scan.bad and not drop_bad) else held

    def test(channels: int) -> Split:  # nothing else opens its files; none of its images is left out
        return source(_table(files["test"]), drop_bad=False).whole(channels, "test")

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


@contextmanager
def _reading(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())}") from error


def _table(files: tuple[Path, ...]) -> Table:
    columns: list[str] = []
    for path in files:
        with _reading(path) as file:
            found = file.schema_arrow.names
        if columns and set(columns) != set(found):
            raise UserError(f"{path}: has columns {', '.join(found)}, {files[0].name} has {', '.join(columns)}")
        columns = columns or found
    image = next((column for column in _IMAGE_COLUMNS if column in columns), None)
    label = next((column for column in _LABEL_COLUMNS if column in columns), None)
    if image is None or label is None:
        wanted = " or ".join(_IMAGE_COLUMNS if image is None else _LABEL_COLUMNS)
        raise UserError(f"{files[0]}: no column {wanted}, only {', '.join(columns)}; rename the one that is meant")
    parts = [_labels(path, label) for path in files]
    for path, part in zip(files, parts, strict=True):
        if (part.dtype == object) != (parts[0].dtype == object):
            raise UserError(f"{path}: column {label} holds {_kind(part)}, in {files[0].name} something else")
    labels_N = np.concatenate(parts)
    if not len(labels_N):
        raise UserError(f"{files[0].parent}: {files[0].name} holds no images")
    return Table(files, image, label, labels_N)


def _labels(path: Path, label: str) -> NDArray[Any]:
    with _reading(path) as file:
        column = file.read([label]).column(0)
    if column.null_count:
        raise UserError(f"{path}: {column.null_count} rows of column {label} are empty; fill them")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: column {label} holds {kind}; labels are whole numbers or strings")
    labels_N: NDArray[Any] = column.to_numpy()
    return labels_N


def _kind(labels_N: NDArray[Any]) -> str:
    return "strings" if labels_N.dtype == object else "numbers"


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
    if not names and int(labels_N.max()) >= len(labels_N):
        raise UserError(
            f"{first}: label {int(labels_N.max())} of {len(labels_N)} images: labels count from 0, without gaps"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{first}: two classes are called {twice!r}: give each its own name")
    return names or tuple(str(label) for label in range(int(labels_N.max()) + 1))


def _numbers(table: Table, classes: tuple[str, ...], *, text: bool) -> NDArray[np.int64]:
    """Labels as numbers of `classes`. `text`: whether those of the training images are strings."""
    first, labels_N = table.files[0], table.labels_N
    if (labels_N.dtype == object) != text:
        wanted = "strings" if text else "numbers"
        raise UserError(f"{first}: labels are {_kind(labels_N)}, those of the training images {wanted}")
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
    readable_N = np.ones(len(labels_N), np.bool_)
    bad = []
    for row, image in enumerate(image for images in ahead(_decode_batch, _encoded(table)) for image in images):
        if isinstance(image, str):
            readable_N[row] = False
            bad.append(image)
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
    return None if pixels_NHWC is None else memory_source(pixels_NHWC, labels_N, readable_N, bad)


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
    """The images unpacked into the cache, unless they are there from an earlier time."""
    key = hashlib.sha256(table.image.encode())
    ends = []
    for path in table.files:
        status = path.stat()
        key.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        with _reading(path) as file:
            ends.append(file.metadata.num_rows)
    target = cache_folder() / "parquet" / f"{key.hexdigest()[:32]}.arrow"
    if not _is_whole(target):
        _unpack(table, target)
    ends_F = np.cumsum(ends)

    def name(row: int) -> str:
        file = int(np.searchsorted(ends_F, row, side="right"))
        return f"{table.files[file]} row {row - (int(ends_F[file - 1]) if file else 0)}"

    return arrow_source(target, labels_N, name, pixmaps=False)


def _is_whole(target: Path) -> bool:
    """Whether an unpacked file is there and readable; one that was damaged since is made again."""
    try:
        return target.exists() and read_arrow(target) is not None
    except UserError:
        return False


def _unpack(table: Table, target: Path) -> None:
    """Once, however many processes want it; what killed ones left of their attempts goes. Raises UserError."""
    schema = pa.schema([SCHEMA.field("bytes")])
    try:
        with alone(target.parent):
            if _is_whole(target):
                return
            for part in leftovers(target):
                part.unlink()
            columns = (column.cast(pa.large_binary()) for _, _, column in _encoded(table))
            write_arrow((pa.record_batch([column], schema=schema) for column in columns), schema, target)
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be written: {error.strerror}") from error
