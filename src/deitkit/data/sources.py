"""`load_data`: the data set at a path, or one that is known by name and found on this machine or downloaded.

A name is looked for in `$DEITKIT_DATA/NAME`, `~/.cache/deitkit/NAME` and, where a distribution packages it, there; a download
goes to `~/.cache/deitkit/NAME`. All have the test split of their publishers but
`digits`, of which a fifth, always the same, stratified, is the test split. A folder of a name holds Parquet files or these:

MNIST and its likes: IDX files, compressed or not. A file is two zero bytes, a type code (8: unsigned byte), the number of
dimensions, each dimension as a big-endian 32-bit integer, then the bytes (LeCun, Cortes and Burges, "The MNIST database of
handwritten digits").

CIFAR-10 and CIFAR-100: their binary version (www.cs.toronto.edu/~kriz/cifar.html). A record is one label byte (CIFAR-100:
coarse, then fine) and 32x32 pixels, first all red, then green, then blue. The python version holds the same in pickles,
which can run code when they are opened: it is not read.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deitkit.config import DataConfig
from deitkit.data.arrow import is_parquet_folder, is_resized_folder, load_parquet, load_resized
from deitkit.data.dataset import Dataset, Source, assemble, cache_folder, held_out_test, memory_source
from deitkit.data.folder import SPLIT_NAMES, load_folder
from deitkit.terminal import Replaced, UserError, alone, shortened, unknown_name

Part = Literal["train", "test"]
Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""pixels of shape (N, H, W, C) and labels"""

TIMEOUT_SECONDS = 30.0
_CIFAR_SIDE = 32

_DIGITS = tuple(str(digit) for digit in range(10))
CLASSES: dict[str, tuple[str, ...]] = {
    "digits": _DIGITS,
    "mnist": _DIGITS,
    "fashion-mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(
        """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
        castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
        elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
        man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
        pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
        skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
        tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()  # noqa: SIM905
    ),
}  # fmt: skip
NAMES = tuple(CLASSES)
_MIRROR_UNSAFE = frozenset({"digits", "mnist"})
_PACKAGED = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}  # Debian's dataset-fashion-mnist


class Layout(NamedTuple):
    """Where the records of a CIFAR lie."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int


LAYOUTS = {
    "cifar10": Layout(
        "cifar-10-batches-bin", tuple(f"data_batch_{number}.bin" for number in range(1, 6)), ("test_batch.bin",), 1
    ),
    "cifar100": Layout("cifar-100-binary", ("train.bin",), ("test.bin",), 2),
}
IDX_FILES = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}


class Remote(NamedTuple):
    """Files that can be downloaded, with the MD5 sums that their publishers state."""

    urls: tuple[str, ...]
    """what goes before the files' names: one address is enough"""
    files: dict[str, str]


def remote(name: str) -> Remote:
    """Where a data set is published."""
    from torchvision import datasets

    cifar = ("https://www.cs.toronto.edu/~kriz/",)
    if name == "cifar10":
        return Remote(cifar, {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"})
    if name == "cifar100":
        return Remote(cifar, {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"})
    published = datasets.MNIST if name == "mnist" else datasets.FashionMNIST
    return Remote(tuple(published.mirrors), dict(published.resources))


def load_data(location: str, config: DataConfig) -> Dataset:
    """The data set at `location`: a path, which wins, or a name (`digits`, `cifar10`, ...).

    Training and validation images are scanned; the test split is opened when it is asked for.
    Raises UserError: what is wrong, where, what to do."""
    if not location.strip():
        raise UserError(f"no data set given: give an existing folder or one of {', '.join(NAMES)}")
    try:
        path = Path(location).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a home that nobody has, a null character
        raise UserError(f"{shortened(location)}: no such folder: {error}") from error
    if is_folder:
        name = path.resolve().name or str(path)
        if is_resized_folder(path):
            return load_resized(path, config)
        if is_parquet_folder(path):
            return load_parquet(path, config, name=name)
        if is_idx_folder(path):
            raise UserError(
                f"{path}: holds IDX files; set DEITKIT_DATA to the folder above and give its name, such as mnist"
            )
        return load_folder(path, config, name=name)
    if exists:
        raise UserError(f"{path}: is a file; give the folder that holds the images or Parquet files")
    looks_like_path = path.is_absolute() or len(path.parts) > 1 or location.startswith(".") or os.sep in location
    if looks_like_path and location not in NAMES:
        raise UserError(f"{path}: does not exist; give an existing folder or one of {', '.join(NAMES)}")
    return _load_named(location, config)


def refuse_among_images(location: str, out: Path) -> None:
    """Raises UserError where the folder `out`, once it is there, would be taken for a class of the images at `location`."""
    try:
        data = Path(location).expanduser().resolve()
        within = out.resolve().relative_to(data).parts
        if not data.is_dir() or is_resized_folder(data) or is_parquet_folder(data):
            return
    except (OSError, RuntimeError, ValueError):  # it lies elsewhere; or there is no such folder, which others say
        return
    among = within[:1] and (within[0] in SPLIT_NAMES or not (data / "train").is_dir())
    if among and not any(part.startswith(".") for part in within):
        raise UserError(
            f"{out}: lies among the images of {location} and would be taken for a class: give another folder"
        )


def _load_named(name: str, config: DataConfig) -> Dataset:
    """Raises UserError where the name is unknown, the data damaged or impossible to fetch."""
    if name not in CLASSES:
        raise unknown_name("folder or data set", name, NAMES)
    if name == "digits":
        return _from_arrays(name, config, _read_digits)
    if (found := _find_named(name, config)) is not None:
        return found
    fetch(name, cache_folder() / name, lambda: _find_named(name, config) is not None)
    fetched = _find_named(name, config)
    assert fetched is not None, f"{name} was fetched, but is not found"
    return fetched


def _find_named(name: str, config: DataConfig) -> Dataset | None:
    chosen = os.environ.get("DEITKIT_DATA")
    folders = [Path(chosen).expanduser() / name] if chosen else []
    folders.append(cache_folder() / name)
    folders += [_PACKAGED[name]] if name in _PACKAGED else []
    for folder in folders:
        if is_parquet_folder(folder):
            return load_parquet(
                folder, config, name=name, classes=CLASSES[name], mirror_safe=name not in _MIRROR_UNSAFE
            )
        if name in LAYOUTS:
            for inside in (folder, folder / LAYOUTS[name].folder):  # as it is, or as the archive unpacks
                if all((inside / file).is_file() for file in LAYOUTS[name].train + LAYOUTS[name].test):
                    return _from_arrays(name, config, partial(read_cifar, inside, name))
        elif is_idx_folder(folder):
            return _from_arrays(name, config, partial(read_idx, folder))
    return None


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


def read_cifar(folder: Path, name: str, part: Part) -> Arrays:
    """Pixels of shape (N, 32, 32, 3) and (fine) labels. Raises UserError naming a damaged file."""
    layout = LAYOUTS[name]
    record = layout.label_bytes + 3 * _CIFAR_SIDE * _CIFAR_SIDE
    parts = []
    for file in layout.train if part == "train" else layout.test:
        try:
            content = np.fromfile(folder / file, np.uint8)
        except OSError as error:
            raise UserError(f"{folder / file}: cannot be read: {error.strerror}; copy it anew") from error
        if len(content) == 0 or len(content) % record:
            raise UserError(f"{folder / file}: {len(content)} bytes are no whole number of images; copy it anew")
        parts.append(content.reshape(-1, record))
    records = np.concatenate(parts)
    pixels_NCHW = records[:, layout.label_bytes :].reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE)
    return np.ascontiguousarray(pixels_NCHW.transpose(0, 2, 3, 1)), records[:, layout.label_bytes - 1].astype(np.int64)


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


def fetch(name: str, folder: Path, is_there: Callable[[], bool]) -> None:
    """Download the files of a data set into `folder` and unpack them, unless another process has meanwhile. Raises UserError that
    says where to put a file by hand."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(alone(folder))
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be made: {error.strerror}; set DEITKIT_DATA to a folder of yours"
            ) from error
        if is_there():
            return
        urls, files = remote(name)
        for file, md5 in files.items():
            path = folder / file
            if not path.exists():
                _download(name, urls, path, md5)
            if file.endswith(".tar.gz"):
                try:
                    with tempfile.TemporaryDirectory(
                        dir=folder, prefix="."
                    ) as scratch:  # so that all of it is there or nothing
                        shutil.unpack_archive(path, scratch, filter="data")
                        for unpacked in Path(scratch).iterdir():
                            unpacked.replace(folder / unpacked.name)
                except (shutil.ReadError, tarfile.TarError, EOFError, OSError, zlib.error) as error:
                    raise UserError(f"{path}: cannot be unpacked: {error}; remove it and try again") from error
                path.unlink()


def _download(name: str, urls: Sequence[str], path: Path, md5: str) -> None:
    tried, reasons = [url + path.name for url in urls], []
    for url in tried:
        print(f"{name}: downloading {url}", file=sys.stderr)
        try:
            with Replaced(path) as temporary:
                with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, temporary.open("wb") as file:
                    shutil.copyfileobj(response, file)
                with temporary.open("rb") as file:  # MD5 guards against accidents
                    found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
                if found != md5:
                    raise ValueError(f"the file has the MD5 {found}, not {md5}")
            return
        except (OSError, ValueError, HTTPException) as error:
            reasons.append(" ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__)
    raise UserError(
        f"{name} is not on this machine, and downloading {' or '.join(tried)} failed ({'; '.join(reasons)}); "
        f"put {path.name} into {path.parent} by hand, or a copy of the data into $DEITKIT_DATA/{name}"
    )
