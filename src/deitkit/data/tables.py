"""Tables of images: Parquet files as the Hugging Face hub keeps them, Arrow files of `save_to_disk`.

A folder of tables has Parquet files as the hub keeps them (`train-*.parquet`, `test_0.parquet`, `CONFIG/train/0000.parquet`), or
the Arrow files of `save_to_disk` (`train/data-*.arrow`): a file's own name or that of its folder says which split it belongs to.
Where class folders of image files lie beside them, these are the data, and the tables are left out. Tables
have an image column (`img` or `image`: encoded bytes, alone or as struct {bytes, path}) and a label column (`label`, `fine_label` or
`labels`: numbers, whose names stand in the schema's metadata, or strings). Images of one size that fit are decoded once into
memory. Others are unpacked once into an Arrow file in the cache.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from deitkit.config import DataConfig
from deitkit.data.arrow import SCHEMA, ArrowSplit, bytes_of, read_arrow, write_arrow
from deitkit.data.caching import ahead, cache_folder
from deitkit.data.dataset import (
    NO_LABEL,
    Dataset,
    Source,
    Split,
    SplitName,
    assemble,
    memory_source,
    with_repeated,
)
from deitkit.data.decode import UnreadableImage, decode
from deitkit.data.folder import FolderSplit, Inside, Role, look, role_of
from deitkit.data.listing import SUFFIXES, follows, is_hidden, is_special, stand_in
from deitkit.terminal import UserError, alone, leftovers, plural, shortened, written
from deitkit.waiting import each_from, waiting_for

MEMORY_LIMIT_BYTES = 1 << 30
"""Decoded images of one size are held in memory up to this."""
_PARQUET_BATCH = 512
_TABLES = (".parquet", ".arrow")
_CACHE, _CACHES = "cache-", "cache-*.arrow"
"""What `datasets.map` and its like leave beside the data: rows of theirs, changed."""
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("img", "image"), ("label", "fine_label", "labels")
_KINDS = "labels are whole numbers, or strings in all files"


class Table(NamedTuple):
    """The Parquet files of one split, the columns that matter, and the labels as they are: numbers or strings."""

    files: tuple[Path, ...]
    image: str
    label: str
    labels_N: NDArray[Any]


def is_parquet_folder(folder: Path) -> bool:
    """Whether the tables in `folder` are its data: there are some, and no class folders of images."""
    return folder.is_dir() and bool(_table_files(folder)) and not _has_class_folders(folder)


def without_tables(dataset: Dataset, folder: Path) -> Dataset:
    """`dataset`, which is the class folders of images in `folder`, with what is to be told of the tables beside them."""
    tables = _table_files(folder)
    named = [str(path.relative_to(folder)) for path in tables if _holds_images(path)]
    hold, are = ("hold", "are") if len(named) > 1 else ("holds", "is")
    notes = (
        [f"{shortened(', '.join(named))} {hold} images beside the class folders and {are} left out"] if named else []
    )
    train = dataset.open_split("train")
    root = train.root if isinstance(train, FolderSplit) else folder
    # what lies in the folders of splits and classes, and beside these, is counted by now
    tops = [(path, path.relative_to(folder).parts) for path in tables if root != folder]
    beside = [path for path, (top, *below) in tops if below and top != root.name and role_of(top) is None]
    left_out = Counter(dataset.left_out) + Counter(path.suffix.lower() for path in beside)
    return replace(dataset, left_out=left_out, notes=(*dataset.notes, *notes))


def load_parquet(
    folder: Path, config: DataConfig, *, name: str, classes: tuple[str, ...] | None = None, mirror_safe: bool = True
) -> Dataset:
    """The data set in `folder`. `classes` are the names if they are known; else the files' metadata has them. Raises
    UserError for missing splits or columns, damaged files, and labels without a class."""
    files, notes, left_out = _find_files(folder)
    train = _table_with_labels(_distinct(files["train"], notes))
    if classes is None:
        found, more = _class_names(train)
        notes += more
    else:
        found = dict(enumerate(classes))

    def source(table: Table, *, drop_bad: bool = True) -> Source:
        labels_N = _numbers(table, found)
        held = _decoded_source(table, labels_N, config.max_pixels)
        if held is None or (held.bad and not drop_bad):
            return _unpacked_source(table, labels_N, config.max_pixels)
        return held

    def test() -> Split:  # nothing else opens its files; none of its images is left out
        return source(_table_with_labels(_distinct(files["test"], [])), drop_bad=False).images

    validation = _table(_distinct(files["val"], notes)) if files["val"] else None
    if validation is not None and (why := _lacks(validation)):
        notes.append(f"{validation.files[0].relative_to(folder)} {why} and is left out")
        validation = None
    dataset = assemble(
        name=name,
        classes=tuple(found.values()),
        notes=notes,
        mirror_safe=mirror_safe,
        config=config,
        validation=None if validation is None else source(validation),
        train=source(train),
        test=test if files["test"] else None,
    )
    return with_repeated(replace(dataset, left_out=left_out))


def _table_files(folder: Path, depth: int = 2) -> list[Path]:
    """The tables in `folder`, or in the folders up to `depth` below it; none of a folder below that also holds images."""
    below, tables = [], []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # whoever needs what is in there says so
        for entry in each_from(folder, entries):
            suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
            if is_hidden(os.fsencode(entry.name)):
                continue
            if suffix in SUFFIXES and depth < 2:
                return []
            if suffix in _TABLES and not is_special(entry):
                tables.append(folder / entry.name)
            elif follows(entry.is_dir):
                below.append(folder / entry.name)
    if not tables and depth:
        tables = [table for one in sorted(below) for table in _table_files(one, depth - 1)]
    return sorted(tables)


def _has_class_folders(folder: Path) -> bool:
    """Whether two folders in `folder`, or in one of those, hold images, at most two folders below."""

    def seen(folder: Path, *, whole: bool = True) -> Inside:
        with contextlib.suppress(UserError):  # whoever needs what is in there says so
            return look(folder, whole=whole)
        return Inside({}, False, Counter())

    def inside(folder: Path) -> list[Path]:
        return [folder / given for names in seen(folder).folders.values() for given in names]

    def holds_images(folder: Path, depth: int = 2) -> bool:
        if seen(folder, whole=False).images:
            return True
        return depth > 0 and any(holds_images(below, depth - 1) for below in inside(folder))

    def holds_two(folders: Sequence[Path]) -> bool:
        return len([*itertools.islice(filter(holds_images, folders), 2)]) == 2

    folders = inside(folder)
    return holds_two(folders) or any(holds_two(inside(below)) for below in folders)


def _holds_images(path: Path) -> bool:
    """Whether a table has a column of images, by its name; no for one that cannot be read."""
    with contextlib.suppress(UserError), _reading(path) as file:
        return not {*_IMAGE_COLUMNS}.isdisjoint(file.schema_arrow.names)
    return False


def _listed(folder: Path) -> set[str]:
    """The files of data in a folder of `save_to_disk`, as its `state.json` has them; none for another folder."""
    try:
        state = folder / "state.json"
        with waiting_for(state):
            return {Path(file["filename"]).name for file in json.loads(state.read_bytes())["_data_files"]}
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return set()


def _data_files(tables: Sequence[Path]) -> list[Path]:
    """Those of `tables` that are data: Arrow files that are listed, where there is a list, or are no caches. Raises UserError where one
    that is listed is missing."""
    arrow = [path for path in tables if path.suffix.lower() == ".arrow"]
    listed = {folder: _listed(folder) for folder in {path.parent for path in arrow}}
    for folder, names in listed.items():
        if missing := sorted(names - {path.name for path in arrow if path.parent == folder}):
            raise UserError(f"{folder / missing[0]}: does not exist, but state.json lists it; copy it anew")

    def is_data(path: Path) -> bool:
        names = listed.get(path.parent)
        return path.name in names if names else not (path in arrow and path.name.startswith(_CACHE))

    return [path for path in tables if is_data(path)]


def _distinct(files: tuple[Path, ...], notes: list[str]) -> tuple[Path, ...]:
    """The files, of those that are the same byte for byte only the one of the shortest name. Adds to `notes` what is left out."""
    by_size: dict[int, list[Path]] = {}
    for path in sorted(files, key=lambda path: (len(path.name), path)):
        with contextlib.suppress(OSError):  # whoever reads it says so
            alike = by_size.setdefault(path.stat().st_size, [])
            same = next((other for other in alike if filecmp.cmp(path, other, shallow=False)), None)
            if same is None:
                alike.append(path)
            else:
                notes.append(f"{path.name} is the same as {same.name}, byte for byte, and is left out")
                files = tuple(other for other in files if other != path)
    return files


def _find_files(folder: Path) -> tuple[dict[SplitName, tuple[Path, ...]], list[str], Counter[str]]:
    """The tables of each split, what to tell of them, and how many others are left out. Raises UserError."""
    found = _table_files(folder)
    tables = _data_files(found)
    left_out = Counter(
        _CACHES if path.name.startswith(_CACHE) else path.suffix.lower() for path in {*found} - {*tables}
    )
    if not tables:
        raise UserError(f"{folder}: holds no tables but {_CACHES}, which are no data; give the folder of the data")
    splits = {path: _split_of(path, folder) for path in tables}
    groups = {_config_of(path, folder) for path in tables}
    if len(groups) > 1:
        if partition := next((part for group in sorted(groups) for part in group.parts if "=" in part), None):
            raise UserError(
                f"{folder}: names of its folders, such as {partition}, stand for a column: write it into the tables"
            )
        names = " and ".join(sorted(str(group) for group in groups)[:5])
        raise UserError(f"{folder}: Parquet files lie in {names}; give one of these folders")
    notes = []
    if not any(splits.values()):
        splits = dict.fromkeys(tables, "train")
        notes.append(f"no name says which split {tables[0].name} belongs to: all images are for training")
    names_of: tuple[SplitName, ...] = ("train", "val", "test")
    files = {split: tuple(path for path in tables if splits[path] == split) for split in names_of}
    if not files["train"]:
        raise UserError(f"{folder}: no train-*.parquet among its tables; name the training files so")
    notes += [
        f"{path.relative_to(folder)} is of no split known by name and is left out"
        for path in tables
        if not splits[path]
    ]
    return files, notes, left_out


def _split_of(table: Path, folder: Path) -> Role | None:
    """`train` of `train-00000-of-00002.parquet`, `my_train_0.parquet`, `default/train/0000.parquet`, `0000.parquet` in a folder train."""
    inside = [*reversed(table.parent.relative_to(folder).parts), folder.resolve().name]
    words = [*re.split(r"[\W\d_]+", table.stem), *(name.removeprefix("partial-") for name in inside)]
    return next(filter(None, map(role_of, words)), None)


def _config_of(table: Path, folder: Path) -> Path:
    """The folder below `folder` that a table and those of the other splits lie in."""
    below = table.parent.relative_to(folder)
    return below.parent if role_of(below.name.removeprefix("partial-")) else below


@final
class _StreamFile:
    """A file of `save_to_disk`, read as a `ParquetFile` is."""

    def __init__(self, path: Path) -> None:
        mapped = pa.memory_map(str(path))
        try:
            self._table = pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            mapped.seek(0)
            self._table = pa.ipc.open_file(mapped).read_all()
        self.schema_arrow = self._table.schema
        self.num_rows = self._table.num_rows

    def read(self, columns: list[str]) -> Any:
        return self._table.select(columns)

    def iter_batches(self, batch_size: int, columns: list[str]) -> Iterator[Any]:
        yield from self._table.select(columns).to_batches(max_chunksize=batch_size)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    parquet = path.suffix.lower() == ".parquet"
    try:
        if parquet:
            with waiting_for(path):
                opened = pq.ParquetFile(path, memory_map=True)
            with opened as file:
                yield file
        else:
            with waiting_for(path):
                stream = _StreamFile(path)
            yield stream
    except (pa.ArrowException, OSError) as error:
        kind = "Parquet" if parquet else "an Arrow file"
        why = stand_in(path, "a table") or f"cannot be read as {kind}: {' '.join(str(error).split())}"
        raise UserError(f"{path}: {why}") from error


def _rows_in(file: Any) -> int:
    count: int = file.num_rows if isinstance(file, _StreamFile) else file.metadata.num_rows
    return count


def _table(files: tuple[Path, ...]) -> Table:
    with _reading(files[0]) as file:
        columns = file.schema_arrow.names
    image = next((column for column in _IMAGE_COLUMNS if column in columns), None)
    label = next((column for column in _LABEL_COLUMNS if column in columns), None)
    if image is None or label is None:
        wanted = " or ".join(_IMAGE_COLUMNS if image is None else _LABEL_COLUMNS)
        raise UserError(f"{files[0]}: no column {wanted}, only {', '.join(columns)}; rename the one that is meant")
    parts: list[NDArray[Any]] = []
    empty: dict[Path, int] = {}
    for path in files:
        with _reading(path) as file:
            if not {image, label} <= {*file.schema_arrow.names}:
                raise UserError(f"{path}: lacks {image} or {label}, which {files[0].name} has")
            with waiting_for(path):
                column = file.read([label]).column(0)
        kind = column.type
        labels_N, gaps = _labels_in(column, f"{path}: column {label}")
        parts.append(labels_N)
        if (parts[0].dtype == object) != (labels_N.dtype == object):
            raise UserError(f"{path}: column {label} holds {kind}; {_KINDS}")
        if gaps:
            empty[path] = gaps
    table = Table(files, image, label, np.concatenate(parts))
    if empty and not _lacks(table):
        path, gaps = next(iter(empty.items()))
        raise UserError(f"{path}: {gaps} rows of column {label} are empty; fill them")
    return table


def _table_with_labels(files: tuple[Path, ...]) -> Table:
    """As `_table`. Raises UserError also where nothing, or nothing with a label, is in it."""
    table = _table(files)
    if why := _lacks(table):
        raise UserError(f"{files[0]}: {why}: fill it, or move it elsewhere")
    return table


def _lacks(table: Table) -> str:
    """What no image of a table has; empty where some have it. The hub hides labels by -1."""
    if not len(table.labels_N):
        return "is empty"
    return "" if np.any(table.labels_N != _no_label(table.labels_N)) else "holds images without labels"


def _no_label(labels_N: NDArray[Any]) -> str | int:
    return "" if labels_N.dtype == object else NO_LABEL


def _labels_in(column: Any, where: str) -> tuple[NDArray[Any], int]:
    """The labels in a column, and how many are missing: numbers (NO_LABEL), or strings (empty) as the names of class folders are
    compared. Raises UserError, beginning with `where`, for others."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        given = column.to_pylist()
        names = {text: _class_name(text or "", where) for text in {*given}}
        labels = [names[text] for text in given]
        return np.array(labels, object), labels.count("")
    if pa.types.is_null(kind):
        column = column.cast(pa.int64())
    elif not pa.types.is_integer(kind):
        raise UserError(f"{where} holds {kind}; {_KINDS}")
    gaps = column.null_count
    return (pc.fill_null(column.cast(pa.int64(), safe=False), NO_LABEL) if gaps else column).to_numpy(), gaps


def _class_name(text: str, where: str) -> str:
    """In Unicode's normal form C, without spaces around it. Raises UserError, beginning with `where`, if it cannot be printed."""
    name = unicodedata.normalize("NFC", text.strip())
    if not name.isprintable():
        raise UserError(f"{where}: label {name!r} has characters that cannot be printed")
    return name


def _class_names(table: Table) -> tuple[dict[Any, str], list[str]]:
    """Names of the classes by label, in their order, and what to tell of the others. Classes are the labels that training images have.
    Raises UserError."""
    first, labels_N = table.files[0], table.labels_N
    present = np.unique(labels_N).tolist()
    if labels_N.dtype == object:
        return {label: str(label) for label in present}, []
    with _reading(first) as file:
        metadata = file.schema_arrow.metadata or {}
    try:
        given = [*map(str, json.loads(metadata[b"huggingface"])["info"]["features"][table.label]["names"])]
    except (KeyError, TypeError, ValueError):
        given = []
    names = tuple(_class_name(name, f"{first}") for name in given)
    outside_N = labels_N[(labels_N < 0) | (labels_N >= (len(names) or np.inf))]
    if len(outside_N):
        most = f"0..{len(names) - 1}" if names else "0, 1, 2, ..."
        raise UserError(f"{first}: label {outside_N[0]} ({plural(len(outside_N), 'row')}) is outside {most}")
    if not names:
        gaps = present != [*range(len(present))]
        notes = [f"labels are {shortened(', '.join(map(str, present)), 40)}: each is a class"] if gaps else []
        return {label: str(label) for label in present}, notes
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{first}: two classes are called {twice!r}: give each its own name")
    if "" in names:
        raise UserError(f"{first}: class {names.index('')} has no name: give it one")
    unused = [repr(name) for label, name in enumerate(names) if label not in present]
    notes = [f"no training image of class {shortened(', '.join(unused))}: it is no class here"] if unused else []
    return {label: names[label] for label in present}, notes


def _numbers(table: Table, classes: dict[Any, str]) -> NDArray[np.int64]:
    """Labels as numbers of `classes`. Raises UserError."""
    first, labels_N = table.files[0], table.labels_N
    text = isinstance(next(iter(classes)), str)
    if (labels_N.dtype == object) != text:
        kinds = ("numbers", "strings") if text else ("strings", "numbers")
        raise UserError(f"{first}: labels are {kinds[0]}, those of the training images {kinds[1]}")
    number = {label: index for index, label in enumerate(classes)}
    found, inverse_N = np.unique(labels_N, return_inverse=True)
    unknown = [label for label in found.tolist() if label not in number]
    if unknown:
        rows = int(np.isin(labels_N, unknown).sum())
        raise UserError(
            f"{first}: label {unknown[0]!r} ({plural(rows, 'row')}) is none of the {len(classes)} training classes: "
            "the split has no labels or other classes"
        )
    numbers_N: NDArray[np.int64] = np.array([number[label] for label in found.tolist()], np.int64)[inverse_N]
    return numbers_N


def _encoded(table: Table) -> Iterator[tuple[Path, int, pa.Array]]:
    """The encoded images, batch by batch: file, first row in it, binary array."""
    for path in table.files:
        row = 0
        with _reading(path) as file:
            for batch in each_from(path, file.iter_batches(batch_size=_PARQUET_BATCH, columns=[table.image])):
                column = _bytes_in(batch.column(0), f"{path}: column {table.image}")
                yield path, row, column
                row += len(column)


def _bytes_in(column: Any, where: str) -> Any:
    """The encoded images of an image column. Raises UserError, beginning with `where`, if there are none."""
    kind = column.type
    paths = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        named = pc.struct_field(column, "path").drop_null() if kind.get_field_index("path") >= 0 else ()
        column = pc.struct_field(column, "bytes")
        paths = len(named) > 0 and column.null_count == len(column)
    if paths:
        raise UserError(
            f"{where} holds paths, not images: embed the images in the table, or list their files in a CSV (file,label)"
        )
    if pa.types.is_binary_view(column.type):
        column = column.cast(pa.large_binary())
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise UserError(f"{where} holds {column.type}, not encoded images (bytes, or struct with bytes)")
    return column


def _decoded_source(table: Table, labels_N: NDArray[np.int64], max_pixels: int) -> Source | None:
    """All images decoded, or None where they differ in size or are too large together."""
    pixels_NHWC: NDArray[np.uint8] | None = None
    bad = {}
    decode_batch = partial(_decode_batch, max_pixels=max_pixels)
    for row, image in enumerate(image for images in ahead(decode_batch, _encoded(table)) for image in images):
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


def _decode_batch(batch: tuple[Path, int, pa.Array], max_pixels: int) -> list[NDArray[np.uint8] | str]:
    """The images of a batch, or why one cannot be decoded."""
    path, first, column = batch
    images: list[NDArray[np.uint8] | str] = []
    for row, scalar in enumerate(column, first):
        try:
            images.append(decode(bytes_of(scalar), f"{path} row {row}", max_pixels))
        except UnreadableImage as error:
            images.append(str(error))
    return images


def _unpacked_source(table: Table, labels_N: NDArray[np.int64], max_pixels: int) -> Source:
    """The images unpacked into the cache: once, however many processes want them."""
    key = hashlib.sha256(table.image.encode())
    starts = [0]
    for path in table.files:
        status = path.stat()
        key.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        with _reading(path) as file:
            starts.append(starts[-1] + _rows_in(file))
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
    return ArrowSplit(target, labels_N, pixmaps=False, max_pixels=max_pixels).scan(name)
