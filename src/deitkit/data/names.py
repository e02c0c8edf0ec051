"""Data sets that are known by name, found on this machine or downloaded.

Each is looked for in `$DEITKIT_DATA/NAME`, `~/.cache/deitkit/NAME` and, where a distribution packages it, there;
a download goes to `~/.cache/deitkit/NAME`. All have the test split of their publishers but `digits`, of which a
fifth, always the same, stratified, is the test split.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deitkit.config import DataConfig
from deitkit.data.assemble import assemble
from deitkit.data.base import Dataset, SplitName
from deitkit.data.cache import cache_folder
from deitkit.data.cifar import LAYOUTS, find_folder, read_cifar
from deitkit.data.download import Remote, fetch, fetch_archive
from deitkit.data.idx import FILES, is_idx_folder, read_idx
from deitkit.data.memory import MemorySource
from deitkit.data.parquet import is_parquet_folder, load_parquet
from deitkit.data.splits import held_out_test
from deitkit.errors import UserError, unknown_name

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]

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


def _idx_remotes(mirrors: tuple[str, ...], *md5: str) -> tuple[Remote, ...]:
    files = [f"{file}.gz" for file in FILES.values()]
    return tuple(
        Remote(file, tuple(mirror + file for mirror in mirrors), sum_) for file, sum_ in zip(files, md5, strict=True)
    )


# The sums are those that the publishers state; train images, train labels, test images, test labels.
REMOTES: dict[str, tuple[Remote, ...]] = {
    "mnist": _idx_remotes(
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion-mnist": _idx_remotes(
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "cifar10": (
        Remote(
            "cifar-10-binary.tar.gz",
            ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
            "c32a1d4ab5d03f1284b67883e8d87530",
        ),
    ),
    "cifar100": (
        Remote(
            "cifar-100-binary.tar.gz",
            ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
            "03b5dce01913d631647c71ecec9e9cb8",
        ),
    ),
}


def load_named(name: str, config: DataConfig) -> Dataset:
    """The data set called `name`. Raises UserError where it is unknown, damaged, or cannot be fetched."""
    if name not in CLASSES:
        raise unknown_name("folder or data set", name, NAMES)
    if name == "digits":
        return _load_digits(config)
    return _load_local(name, config) or _load_fetched(name, config)


def _load_local(name: str, config: DataConfig) -> Dataset | None:
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
            if (found := find_folder(folder, name)) is not None:
                return _from_arrays(name, config, partial(read_cifar, found, name))
        elif is_idx_folder(folder):
            return _from_arrays(name, config, partial(read_idx, folder))
    return None


def _load_fetched(name: str, config: DataConfig) -> Dataset:
    if name in LAYOUTS:
        layout = LAYOUTS[name]
        fetch_archive(REMOTES[name][0], layout.train + layout.test, cache_folder() / name, name)
    else:
        fetch(REMOTES[name], cache_folder() / name, name)
    dataset = _load_local(name, config)
    assert dataset is not None, f"{name} was fetched, but is not found"
    return dataset


def _load_digits(config: DataConfig) -> Dataset:
    from sklearn.datasets import load_digits  # a second of import time that only this data set costs

    images_NHW, labels_N = load_digits(return_X_y=True)
    pixels_NHWC = np.rint(images_NHW.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    test_N = held_out_test(labels_N.astype(np.int64), seed=0)

    def read(split: str) -> Arrays:
        chosen = np.flatnonzero(test_N == (split == "test"))
        return pixels_NHWC[chosen], labels_N[chosen].astype(np.int64)

    return _from_arrays("digits", config, read)


def _from_arrays(name: str, config: DataConfig, read: Callable[[str], Arrays]) -> Dataset:
    classes = CLASSES[name]

    def source(split: SplitName) -> MemorySource:
        pixels_NHWC, labels_N = read(split)
        if len(labels_N) == 0 or labels_N.min() < 0 or labels_N.max() >= len(classes):
            raise UserError(f"{name}: the {split} labels are not all between 0 and {len(classes) - 1}; copy it anew")
        return MemorySource(pixels_NHWC, labels_N)

    return assemble(
        name=name,
        classes=classes,
        mirror_safe=name not in _MIRROR_UNSAFE,
        config=config,
        train=source("train"),
        validation=None,
        test=lambda channels: source("test").split(None, channels, "test"),
    )
