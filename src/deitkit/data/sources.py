"""`load_data`: the data set at a path, or one that is known by name and found on this machine or downloaded.

A name is looked for in `$DEITKIT_DATA/NAME`, `~/.cache/deitkit/NAME` and, where a distribution packages it, there: Parquet files,
or the IDX files of MNIST and Fashion-MNIST, compressed or not. Else its Parquet files are downloaded from the Hugging Face hub to
`~/.cache/deitkit/NAME`. All have the test split of their publishers but `digits`, of which a fifth, always the same, stratified,
is the test split.

An IDX file is two zero bytes, a type code (8: unsigned byte), the number of dimensions, each dimension as a big-endian 32-bit
integer, then the bytes (LeCun, Cortes and Burges, "The MNIST database of handwritten digits").
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import math
import os
import socket
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from deitkit.config import DataConfig
from deitkit.data.arrow import is_resized_folder, load_resized
from deitkit.data.caching import cache_folder
from deitkit.data.dataset import (
    NO_LABEL,
    Dataset,
    Source,
    Split,
    SplitName,
    assemble,
    held_out_test,
    memory_source,
    oversampled,
)
from deitkit.data.folder import FolderSplit, load_folder, load_whole, role_of
from deitkit.data.labels import SUFFIXES as CSV_SUFFIXES
from deitkit.data.labels import load_csv, load_whole_csv, tables_in
from deitkit.data.tables import is_parquet_folder, load_parquet, without_tables
from deitkit.terminal import UserError, alone, expanded, shortened, unknown_name, written
from deitkit.waiting import waiting_for

Part = Literal["train", "test"]
Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""pixels of shape (N, H, W, C) and labels"""

_DIGITS = tuple(str(digit) for digit in range(10))
CLASSES: dict[str, tuple[str, ...]] = {  # which IDX files do not hold
    "digits": _DIGITS,
    "mnist": _DIGITS,
    "fashion-mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
}  # fmt: skip
HUB = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}
NAMES = ("digits", *HUB)
_MIRROR_UNSAFE = frozenset({"digits", "mnist"})
_PACKAGED = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}  # Debian's dataset-fashion-mnist


IDX_FILES = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}


def load_data(location: str, config: DataConfig) -> Dataset:
    """The data set at `location`: a path, which wins, or a name (`digits`, `cifar10`, ...). Small classes' images are repeated if that is
    asked for.

    Training and validation images are scanned; the test split is opened when it is asked for.
    Raises UserError: what is wrong, where, what to do."""
    dataset = _printable(_load(location, config))
    return oversampled(dataset) if config.oversample else dataset


def _printable(dataset: Dataset) -> Dataset:
    """`dataset` by a name that can be written down: a folder's may have bytes that are no UTF-8."""
    return replace(dataset, name=os.fsencode(dataset.name).decode("utf-8", "replace"))


def _load(location: str, config: DataConfig) -> Dataset:
    path = _place_of(location)
    if path.is_dir():
        name = path.resolve().name or str(path)
        if is_resized_folder(path):
            return load_resized(path, config)
        if is_parquet_folder(path):
            return load_parquet(path, config, name=name)
        if is_idx_folder(path):
            raise UserError(
                f"{path}: holds IDX files; set DEITKIT_DATA to the folder above and give its name, such as mnist"
            )
        try:
            return without_tables(load_folder(path, config, name=name), path)
        except UserError as error:
            tables = tables_in(path)
            if not tables:
                raise
            raise UserError(f"{error}; {tables[0].name} in it lists images and labels: give {tables[0]}") from error
    if path.exists():
        if path.suffix.lower() in CSV_SUFFIXES:
            return load_csv(path, config)
        if path.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"):
            raise UserError(f"{path}: is an archive: unpack it, and give the folder")
        raise UserError(
            f"{path}: is a file; give the folder that holds the images or Parquet files, or a CSV (file,label)"
        )
    looks_like_path = path.is_absolute() or len(path.parts) > 1 or location.startswith(".") or os.sep in location
    if looks_like_path and location not in NAMES:
        raise UserError(f"{path}: does not exist; give an existing folder or one of {', '.join(NAMES)}")
    return _load_named(location, config)


def load_known(location: str, config: DataConfig, classes: tuple[str, ...]) -> Dataset:
    """The data at `location` for a network that knows `classes`: images of these classes, by name, which may be some of them or others
    besides. Where nobody has split them, every split is all of the images. Raises UserError if there is none of these classes."""
    path = _place_of(location)
    whole = _whole(path, config)
    if whole is None:
        dataset = load_data(location, config)
    else:
        images, own = whole
        source = images.scan()
        every_image = source.images.subset(np.arange(len(images)), source.channels)
        dataset = Dataset(
            name=path.resolve().stem,
            classes=own,
            channels=source.channels,
            image_size=source.image_size,
            mirror_safe=True,
            open_split=lambda _: every_image,
            has_test=True,
            undivided=True,
            left_out=images.left_out,
        )
        dataset = _printable(without_tables(dataset, path))
    return dataset if dataset.classes == classes else _as_known(dataset, classes)


def _whole(path: Path, config: DataConfig) -> tuple[FolderSplit, tuple[str, ...]] | None:
    """All images of class folders, or of a CSV, that nobody has split, and their classes; None for other data. Raises UserError."""
    if path.is_dir() and not (is_resized_folder(path) or is_parquet_folder(path) or is_idx_folder(path)):
        return load_whole(path, config)
    return load_whole_csv(path, config) if path.is_file() and path.suffix.lower() in CSV_SUFFIXES else None


def _as_known(dataset: Dataset, classes: tuple[str, ...]) -> Dataset:
    """The images of `classes`, with the numbers that these have there. Raises UserError if there are none."""
    if not {*dataset.classes} & {*classes}:
        known, there = (shortened(", ".join(names), 60) for names in (classes, dataset.classes))
        raise UserError(f"{dataset.name}: has other classes ({there}) than those that are known ({known})")
    numbers_K = np.array([classes.index(name) if name in classes else NO_LABEL for name in dataset.classes], np.int64)
    notes = [*dataset.notes]
    if other := [repr(name) for name in dataset.classes if name not in classes]:
        notes.append(
            f"{dataset.name}: images of class {shortened(', '.join(other))} are left out: the class is not known"
        )
    if missing := [repr(name) for name in classes if name not in dataset.classes]:
        notes.append(f"{dataset.name}: has no image of class {shortened(', '.join(missing))}")

    @functools.cache
    def open_split(name: SplitName) -> Split:
        split = dataset.open_split(name)
        known_N = np.where(split.labels_N == NO_LABEL, NO_LABEL, numbers_K[split.labels_N])
        part = split.subset(np.flatnonzero(known_N != NO_LABEL), split.channels, split.title)
        part.labels_N = known_N[known_N != NO_LABEL]
        return part

    return replace(dataset, classes=classes, open_split=open_split, notes=notes)


def _place_of(location: str) -> Path:
    """The path that `location` may be: what exists is no home folder, whatever its name. Raises UserError."""
    refuse_unnamed(location)
    try:
        path = expanded(location)
        with waiting_for(path):
            path.exists()
    except (OSError, ValueError) as error:  # a name too long, a null character
        raise UserError(f"{shortened(location)}: no such folder: {error}") from error
    return path


def refuse_unnamed(location: str) -> None:
    """Raises UserError where no data set is named: an empty path is the current folder."""
    if not location.strip():
        raise UserError(f"no data set given: give an existing folder or one of {', '.join(NAMES)}")


def refuse_among_images(location: str, out: Path) -> None:
    """Raises UserError where no data set is named, or where the folder `out`, once it is there, would be taken for a class of the
    images at `location`."""
    refuse_unnamed(location)
    try:
        with waiting_for(location):
            data = expanded(location).resolve()
        within = out.resolve().relative_to(data).parts
        if not data.is_dir() or is_resized_folder(data) or is_parquet_folder(data):
            return
    except (OSError, RuntimeError, ValueError):  # it lies elsewhere; or there is no such folder, which others say
        return
    split = any(role_of(path.name) == "train" and path.is_dir() for path in data.iterdir())
    among = within[:1] and (role_of(within[0]) is not None or not split)
    if among and not any(part.startswith(".") for part in within):
        raise UserError(
            f"{out}: lies among the images of {location} and would be taken for a class: give another folder"
        )


def _load_named(name: str, config: DataConfig) -> Dataset:
    """Raises UserError where the name is unknown, the data damaged or impossible to fetch."""
    if name not in NAMES:
        with contextlib.suppress(OSError):  # a mistyped folder lies beside the one that was meant
            raise unknown_name("folder or data set", name, NAMES, [one.name for one in os.scandir() if one.is_dir()])
        raise unknown_name("folder or data set", name, NAMES)
    if name == "digits":
        return _from_arrays(name, config, _read_digits)
    chosen = os.environ.get("DEITKIT_DATA")
    folders = [expanded(chosen) / name] if chosen else []
    folders += [cache_folder() / name, *([_PACKAGED[name]] if name in _PACKAGED else [])]
    for folder in folders:
        if is_idx_folder(folder) and name in CLASSES:
            return _from_arrays(name, config, partial(read_idx, folder))
        if is_parquet_folder(folder):
            break
    else:
        folder = fetch(name)
    return load_parquet(folder, config, name=name, classes=CLASSES.get(name), mirror_safe=name not in _MIRROR_UNSAFE)


def fetch(name: str) -> Path:
    """The folder with a data set's Parquet files, downloaded once by however many processes. Raises UserError."""
    from huggingface_hub import hf_hub_download, list_repo_files

    folder = cache_folder() / name
    part = folder.with_name(f".{name}")  # takes its place when it is whole; a download that was interrupted continues
    with written(part), alone(part):
        if not is_parquet_folder(folder):
            instead = f"put its Parquet files (of {HUB[name]}) into {folder} or $DEITKIT_DATA/{name}"
            with downloads(f"{name} is not on this machine and", instead):
                for file in list_repo_files(HUB[name], repo_type="dataset"):
                    if file.endswith(".parquet"):
                        hf_hub_download(HUB[name], file, repo_type="dataset", local_dir=part)
            part.replace(folder)
    return folder


@contextlib.contextmanager
def downloads(what: str, instead: str) -> Iterator[None]:
    """A block that downloads from the hub: a failure becomes one line, `instead` says what else to do. Where the hub cannot be
    reached, its client looks into its cache alone. Raises UserError."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not hub_reachable()
    try:
        yield
    except Exception as error:
        # The hub's client lets errors of its HTTP library through, and has changed that library before.
        library = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError) or library in ("httpx", "httpx2", "requests"):
            raise UserError(f"{what} cannot be downloaded: check the connection, or {instead}") from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = offline


def hub_reachable() -> bool:
    """False if the hub's host name cannot be resolved: the hub's client would retry for most of a minute."""
    from huggingface_hub import constants

    if urllib.request.getproxies():
        return True  # a proxy may reach it
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _from_arrays(name: str, config: DataConfig, read: Callable[[Part], Arrays]) -> Dataset:
    classes = CLASSES[name]

    def source(part: Part) -> Source:
        pixels_NHWC, labels_N = read(part)
        if len(labels_N) == 0 or labels_N.min() < 0 or labels_N.max() >= len(classes):
            raise UserError(f"{name}: the {part} labels are not all between 0 and {len(classes) - 1}; copy it anew")
        return memory_source(pixels_NHWC, labels_N)

    return assemble(
        name=name,
        classes=classes,
        mirror_safe=name not in _MIRROR_UNSAFE,
        config=config,
        train=source("train"),
        test=lambda: source("test").images,
    )


def _read_digits(part: Part) -> Arrays:
    from sklearn.datasets import load_digits  # a second of import time that only this data set costs

    images_NHW, labels_N = load_digits(return_X_y=True)
    pixels_NHWC = np.rint(images_NHW.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels_N = labels_N.astype(np.int64)
    chosen_N = held_out_test(labels_N, seed=0) == (part == "test")
    return pixels_NHWC[chosen_N], labels_N[chosen_N]


def is_idx_folder(folder: Path) -> bool:
    """Whether all four files are there."""
    return all(_find_idx(folder, file) for file in IDX_FILES.values())


def read_idx(folder: Path, part: Part) -> Arrays:
    """Grey pixels of shape (N, H, W, 1) and labels. Raises UserError naming the file that is missing or damaged."""
    images_NHW, labels_N = (_read_idx(folder, IDX_FILES[part, kind]) for kind in ("images", "labels"))
    if len(images_NHW) != len(labels_N):
        raise UserError(f"{folder}: {len(images_NHW)} {part} images, but {len(labels_N)} labels; copy the files anew")
    return images_NHW[..., None], labels_N.astype(np.int64)


def _find_idx(folder: Path, file: str) -> Path | None:
    """The file in `folder`, as it is or with `.gz`; `-idx` may be written `.idx`, as some copies have it."""
    dotted = file.replace("-idx", ".idx")
    found = (folder / name for name in (file, f"{file}.gz", dotted, f"{dotted}.gz"))
    return next((path for path in found if path.is_file()), None)


def _read_idx(folder: Path, file: str) -> NDArray[np.uint8]:
    path, dimensions = _find_idx(folder, file), 3 if "idx3" in file else 1
    if path is None:
        raise UserError(f"{folder / file} does not exist (nor with .gz); copy it there")
    try:
        with waiting_for(path):
            content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}; copy it anew") from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{path}: not an IDX file of bytes in {dimensions} dimensions; copy it anew")
    shape = [int(size) for size in np.frombuffer(content, ">u4", dimensions, 4)]
    if len(content) - start != math.prod(shape):
        raise UserError(
            f"{path}: holds {len(content) - start} bytes where {math.prod(shape)} are announced; copy it anew"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()  # writable, as torch wants it
