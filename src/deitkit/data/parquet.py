"""A folder of Parquet files in the layout of the Hugging Face hub.

`train-*.parquet`, `test-*.parquet` and `validation-*.parquet`, in the folder or in one below it; an image column
(`img` or `image`: encoded bytes, alone or as struct {bytes, path}) and a label column (`label`, `fine_label` or `labels`:
numbers, whose names stand in the schema's metadata, or strings). Images of one size that fit are decoded once into
memory. Others are unpacked once into an Arrow file in the cache, which is mapped into memory, so that any
image is one page fault away and all loader workers share it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from deitkit.config import DataConfig
from deitkit.data.assemble import assemble
from deitkit.data.base import Dataset, Split
from deitkit.data.cache import cache_folder
from deitkit.data.encoded import EncodedSource, buffer_of, read_arrow, write_arrow
from deitkit.data.images import UnreadableImage, decode
from deitkit.data.memory import MemorySource
from deitkit.data.scan import ahead
from deitkit.data.source import Source
from deitkit.errors import UserError
from deitkit.files import alone, leftovers

MEMORY_LIMIT_BYTES = 1 << 30
"""Decoded images of one size are held in memory up to this."""
_BATCH = 512
_PREFIXES = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}
_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label", "labels")


class Table(NamedTuple):
    """The files of one split and the columns that matter."""

    files: tuple[Path, ...]
    image: str
    label: str


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
    labels_N = _labels(train)
    text = labels_N.dtype == object
    names = classes or _class_names(train, labels_N)
    # The test file is opened by nothing but a request for the test split.
    test_files = files["test"]

    def test(channels: int) -> Split:
        table = _table(test_files)
        source = _source(table, _numbers(table, _labels(table), names, text))
        if source.scan.bad and isinstance(source, MemorySource):  # no image leaves the test split: reading it must fail
            source = _encoded_source(table, source.labels_N)
        return source.split(None, channels, "test")

    validation = None
    if files["val"]:
        table = _table(files["val"])
        validation = _source(table, _numbers(table, _labels(table), names, text))
    return assemble(
        name=name,
        classes=names,
        mirror_safe=mirror_safe,
        config=config,
        train=_source(train, _numbers(train, labels_N, names, text)),
        validation=validation,
        test=test if test_files else None,
    )


# ---------------------------------------------------------------------------------------------- files and columns


def _folders_with_parquet(folder: Path) -> list[Path]:
    if any(folder.glob("*.parquet")):
        return [folder]
    below = (entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith("."))
    return [entry for entry in below if any(entry.glob("*.parquet"))]


def _find_files(folder: Path) -> dict[str, tuple[Path, ...]]:
    folders = _folders_with_parquet(folder)
    if len(folders) > 1:
        raise UserError(
            f"{folder}: Parquet files lie in {' and '.join(entry.name for entry in folders)}; give one of these folders"
        )
    present = sorted(path for path in folders[0].glob("*.parquet") if not path.name.startswith("."))
    files = {
        split: tuple(path for path in present if path.name.removesuffix(".parquet").split("-")[0] in prefixes)
        for split, prefixes in _PREFIXES.items()
    }
    if not files["train"]:
        raise UserError(f"{folders[0]}: no train-*.parquet among its Parquet files; name the training files so")
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
    return Table(files, image, label)


def _labels(table: Table) -> NDArray[Any]:
    """The label column as it is: numbers or strings."""
    parts = []
    for path in table.files:
        with _reading(path) as file:
            column = file.read([table.label]).column(0)
        if column.null_count:
            raise UserError(f"{path}: {column.null_count} rows of column {table.label} are empty; fill them")
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not (
            pa.types.is_integer(column.type) or pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        ):
            raise UserError(f"{path}: column {table.label} holds {column.type}; labels are whole numbers or strings")
        parts.append(column.to_numpy())
        if (parts[-1].dtype == object) != (parts[0].dtype == object):
            raise UserError(
                f"{path}: column {table.label} holds {column.type}, in {table.files[0].name} something else"
            )
    labels_N = np.concatenate(parts)
    if not len(labels_N):
        raise UserError(f"{table.files[0].parent}: {table.files[0].name} holds no images")
    return labels_N


def _class_names(table: Table, labels_N: NDArray[Any]) -> tuple[str, ...]:
    if labels_N.dtype == object:
        return _distinct(table, tuple(str(name) for name in np.unique(labels_N)))
    with _reading(table.files[0]) as file:
        metadata = file.schema_arrow.metadata or {}
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][table.label]
        names = tuple(str(name) for name in feature["names"])
    except (KeyError, TypeError, ValueError):
        names = ()
    if not names and int(labels_N.max()) >= len(labels_N):
        raise UserError(
            f"{table.files[0]}: label {int(labels_N.max())} of {len(labels_N)} images: labels count from 0, without gaps"
        )
    return _distinct(table, names) or tuple(str(label) for label in range(int(labels_N.max()) + 1))


def _distinct(table: Table, names: tuple[str, ...]) -> tuple[str, ...]:
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise UserError(f"{table.files[0]}: two classes are called {twice!r}: give each its own name")
    return names


def _numbers(table: Table, labels_N: NDArray[Any], classes: tuple[str, ...], text: bool) -> NDArray[np.int64]:
    """Labels as numbers of `classes`. `text`: whether those of the training images are strings."""
    if (labels_N.dtype == object) != text:
        kinds = ("strings", "numbers") if text else ("numbers", "strings")
        raise UserError(f"{table.files[0]}: labels are {kinds[1]}, those of the training images {kinds[0]}")
    if labels_N.dtype == object:
        number = {name: index for index, name in enumerate(classes)}
        unknown = next((label for label in labels_N if label not in number), None)
        if unknown is not None:
            raise UserError(f"{table.files[0]}: label {unknown!r} is none of the {len(classes)} training classes")
        return np.array([number[label] for label in labels_N], np.int64)
    numbers_N = labels_N.astype(np.int64)
    outside_N = numbers_N[(numbers_N < 0) | (numbers_N >= len(classes))]
    if len(outside_N):
        raise UserError(
            f"{table.files[0]}: label {outside_N[0]} ({len(outside_N)} rows) is outside 0..{len(classes) - 1}; "
            "the split has no labels or other classes"
        )
    return numbers_N


def _encoded(table: Table) -> Iterator[tuple[Path, int, pa.Array]]:
    """The encoded images, batch by batch: file, first row in it, binary array."""
    for path in table.files:
        row = 0
        with _reading(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH, columns=[table.image]):
                column = batch.column(0)
                if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
                    column = pc.struct_field(column, "bytes")
                if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
                    raise UserError(
                        f"{path}: column {table.image} holds {column.type}, not encoded images (bytes, or struct with bytes)"
                    )
                yield path, row, column
                row += len(column)


# ---------------------------------------------------------------------------------------------- decoded, in memory


def _source(table: Table, labels_N: NDArray[np.int64]) -> Source:
    return _decoded_source(table, labels_N) or _encoded_source(table, labels_N)


def _decoded_source(table: Table, labels_N: NDArray[np.int64]) -> MemorySource | None:
    """All images decoded, or None where they differ in size or are too large together."""
    pixels_NHWC: NDArray[np.uint8] | None = None
    readable_N = np.ones(len(labels_N), np.bool_)
    bad = []
    start = 0
    for images in ahead(_decode_batch, _encoded(table)):
        for row, image in enumerate(images, start):
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
        start += len(images)
    return None if pixels_NHWC is None else MemorySource(pixels_NHWC, labels_N, readable_N, bad)


def _decode_batch(batch: tuple[Path, int, pa.Array]) -> list[NDArray[np.uint8] | str]:
    path, first, column = batch
    images: list[NDArray[np.uint8] | str] = []
    for offset, scalar in enumerate(column):
        try:
            images.append(decode(buffer_of(scalar), f"{path} row {first + offset}"))
        except UnreadableImage as error:
            images.append(str(error))
    return images


# ---------------------------------------------------------------------------------------------- encoded, in a file


def _is_whole(target: Path) -> bool:
    """Whether an unpacked file is there and readable; one that was damaged since is made again."""
    try:
        return target.exists() and read_arrow(target) is not None
    except UserError:
        return False


def _unpack(table: Table, target: Path) -> None:
    """Once, however many processes want it; what killed ones left of their attempts goes. Raises UserError."""
    schema = pa.schema([("bytes", pa.large_binary())])
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


def _encoded_source(table: Table, labels_N: NDArray[np.int64]) -> EncodedSource:
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

    return EncodedSource(target, labels_N, name)
