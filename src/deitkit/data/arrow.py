"""Images that stay encoded in the first column of an Arrow file that is mapped into memory.

Any image is one page fault away, and all loader workers share the pages.

Images decoded once and read many times: uncompressed, in an Arrow file that is mapped into memory.

A folder of resized images, as `deit data cache` writes it: decoded and resized once, read many times.

    resized.json    what is in it (`ResizedCard`)
    train.arrow     a row for each image: `bytes`, a PPM or PGM file (its pixels, uncompressed), and `label`
    val.arrow       the same
    test.arrow      the same, where the data have a test split

The files are mapped into memory, so loader workers share them. An image that could not be read is a row without bytes: it
is left out, or counts as wrong, exactly as in the original. The split is the one that was asked for when the folder was
written.

A folder of Parquet files in the layout of the Hugging Face hub.

`train-*.parquet`, `test-*.parquet` and `validation-*.parquet`, in the folder or in one below it; an image column
(`img` or `image`: encoded bytes, alone or as struct {bytes, path}) and a label column (`label`, `fine_label` or `labels`:
numbers, whose names stand in the schema's metadata, or strings). Images of one size that fit are decoded once into
memory. Others are unpacked once into an Arrow file in the cache, which is mapped into memory, so that any
image is one page fault away and all loader workers share it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    MemorySource,
    Source,
    Split,
    SplitName,
    ahead,
    assemble,
    cache_folder,
    is_small,
    scan,
    state_of,
)
from deitkit.data.images import UnreadableImage, decode, probe, with_channels
from deitkit.settings import explain
from deitkit.terminal import Lock, Replaced, UserError, alone, leftovers, refuse_filled, shortened


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

    def content_hash(self) -> str:
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

    def content_hash(self) -> str:
        return self.original.content_hash()


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


CARD = "resized.json"


class ResizedCard(Config):
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
    return (folder / CARD).is_file()


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
        for name in splits_of(dataset):
            for part in leftovers(out / f"{name}.arrow"):
                part.unlink()
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
        if min(image_HWC.shape[:2]) > shorter_side:
            reduced = True
        return resize(image_HWC, shorter_side)

    try:
        for name in splits_of(dataset):
            split, before = dataset.open_split(name), sum(counts.values())
            write_decoded(
                split,
                out / f"{name}.arrow",
                lambda done, before=before: on_images(before + done),  # type: ignore[misc]
                change,
            )
            counts[name] = len(split)
    except BaseException:  # interrupted, or the disk is full: the same command is to find the folder as it was
        for whole in counts:
            (out / f"{whole}.arrow").unlink(missing_ok=True)
        raise
    card = ResizedCard(
        name=dataset.name,
        classes=dataset.classes,
        mirror_safe=dataset.mirror_safe,
        shorter_side=min(shorter_side, dataset.reduced_to or shorter_side),
        photos=not is_small(dataset.image_size),
        reduced=reduced,
        settings=config.split_settings(),
    )
    try:
        (out / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")  # last: now it is whole
    except OSError as error:
        raise UserError(f"{out / CARD}: cannot be written: {error.strerror}") from error
    return counts


def splits_of(dataset: Dataset) -> tuple[SplitName, ...]:
    return ("train", "val", "test") if dataset.has_test else ("train", "val")


def load_resized(folder: Path, config: DataConfig) -> Dataset:
    """The data set in a folder of `deit data cache`. Raises UserError."""
    try:
        card = ResizedCard.model_validate_json((folder / CARD).read_bytes())
    except ValidationError as error:
        raise UserError(f"{folder / CARD}: {explain(ResizedCard, error)}") from error
    except OSError as error:
        raise UserError(f"{folder / CARD}: cannot be read: {error.strerror}") from error

    def source(split: SplitName) -> EncodedSource:
        path = folder / f"{split}.arrow"
        return EncodedSource(
            path,
            _cached_labels(path, card, least=NO_LABEL if split == "train" else 0),
            lambda row: f"{path} row {row}",
            decoded=True,
        )

    def test(channels: int) -> Split:
        return source("test").split(None, channels, "test")

    dataset = assemble(
        name=card.name,
        classes=card.classes,
        mirror_safe=card.mirror_safe,
        config=config,
        train=source("train"),
        validation=source("val"),
        test=test if (folder / "test.arrow").is_file() else None,
    )
    if card.photos and is_small(dataset.image_size):
        dataset = replace(dataset, image_size=None)
    return replace(dataset, reduced_to=card.shorter_side) if card.reduced else dataset


def resize(image_HWC: NDArray[np.uint8], shorter_side: int) -> NDArray[np.uint8]:
    """The whole image, its shorter side `shorter_side` pixels; a smaller one as it is."""
    height, width, channels = image_HWC.shape
    scale = shorter_side / min(height, width)
    if scale >= 1:
        return image_HWC
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(image_HWC[..., 0] if channels == 1 else image_HWC)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC)).reshape(size[1], size[0], channels)


def _cached_labels(path: Path, card: ResizedCard, *, least: int) -> NDArray[np.int64]:
    table = read_arrow(path)
    if not table.schema.equals(SCHEMA):
        raise UserError(f"{path}: is not as deit data cache writes it: its columns are {shortened(str(table.schema))}")
    labels_N: NDArray[np.int64] = table.column("label").to_numpy()
    if len(labels_N) and not least <= labels_N.min() <= labels_N.max() < len(card.classes):
        raise UserError(
            f"{path}: labels outside {least}..{len(card.classes) - 1}: it does not belong to {CARD} beside it"
        )
    return labels_N


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
