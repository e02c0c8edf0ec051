"""The folder for what was downloaded, unpacked or computed once.

What every data set offers, wherever it lies.

Opening a split when it is asked for, and only then.

Which images train, which validate: pure functions of the labels and a seed.

A split as it lies on the disk, before it is decided which of its images train and which validate.

Images of one size, held in memory.

A look at every image before training, so that bad ones are known by name before an hour is spent.

From scanned sources to a data set with its splits.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from deitkit.config import DataConfig
from deitkit.data.images import Shape, UnreadableImage, with_channels
from deitkit.rng import Purpose, permutation
from deitkit.terminal import Replaced, UserError, unknown_name


def cache_folder() -> Path:
    """`~/.cache/deitkit`."""
    return Path.home() / ".cache" / "deitkit"


def remembered(key: str, compute: Callable[[], str]) -> str:
    """`compute()`, which is 64 hexadecimal digits, or what it was when it was asked for with this `key` before, by any
    process. Where the folder cannot be written, nothing is remembered."""
    file = cache_folder() / "fingerprints" / key
    with contextlib.suppress(OSError, ValueError):
        known = file.read_text(encoding="ascii")
        if len(known) == 64:
            return known
    found = compute()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with Replaced(file) as temporary:
            temporary.write_text(found, encoding="ascii")
    return found


def state_of(path: Path) -> bytes:
    """What the file system says of a file, but for its name: it changes when the content does. Times of the last change of
    content and of the file's entry, in nanoseconds: the latter cannot be set by anybody. Raises OSError."""
    status = path.stat()
    facts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return " ".join(map(str, facts)).encode()


SplitName = Literal["train", "val", "test"]
SMALL_IMAGE = 64
"""Pixels of the longer side up to which images of one size are small."""
NO_LABEL = -1
"""Stands in the place of a label where a training image has none."""
UNLABELLED = ("unlabelled", "unlabeled")
"""What the folder of images without labels is called, beside those of the classes or of the splits."""


class Split(ABC):
    """The images of one split with their labels. Positions 0..len-1 name the images everywhere."""

    labels_N: NDArray[np.int64]
    """numbers of classes; of training images also `NO_LABEL`"""
    channels: int
    """1 for grey, 3 for RGB"""

    def __len__(self) -> int:
        return len(self.labels_N)

    @abstractmethod
    def read(self, position: int) -> NDArray[np.uint8]:
        """Image `position` as uint8 of shape (H, W, C): upright, grey (C = 1) or RGB (C = 3), contiguous and writable.

        Raises UnreadableImage."""

    @abstractmethod
    def name(self, position: int) -> str:
        """What to call image `position` when talking to the user: its path, or `train[17]`."""

    @property
    def pixels_NHWC(self) -> NDArray[np.uint8] | None:
        """All images, where they are held in memory at one size; else None."""
        return None

    @property
    def decoded(self) -> bool:
        """Whether reading an image costs no decoding."""
        return self.pixels_NHWC is not None

    def names_hash(self) -> str:
        """A hash of labels and of what images are called: changes when an image comes, goes or is moved, and opens none."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels_N, "<i8").tobytes())
        for position in range(len(self)):
            digest.update(os.fsencode(self.place(position)) + b"\0")
        return digest.hexdigest()

    def place(self, position: int) -> str:
        """`name`, but the same wherever the data lie."""
        return self.name(position)

    @abstractmethod
    def content_hash(self) -> str:
        """A hash that changes when an image, its label or the order changes. Reads all images."""

    def stamp(self) -> str | None:
        """A hash of what the file system says of the files that the images lie in; None where reading them costs nothing."""
        return None

    def cached_content_hash(self) -> str:
        """`content_hash`, read no more often than the `stamp` changes."""
        stamp = self.stamp()
        return self.content_hash() if stamp is None else remembered(stamp, self.content_hash)


def is_small(image_size: tuple[int, int] | None) -> TypeGuard[tuple[int, int]]:
    """Whether images are padded and shifted at their own size; others are photos, cropped and resized."""
    return image_size is not None and max(image_size) <= SMALL_IMAGE


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set whose splits are opened one by one: nothing reads a split that nobody asked for."""

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: tuple[int, int] | None
    """(height, width) where all images share it; None for photos of many sizes, and for photos that were made so small that
    they would pass for small images."""
    mirror_safe: bool
    """False where the mirror image means something else, as for digits."""
    open_split: Callable[[SplitName], Split]
    """Raises UserError where the data has no such split."""
    has_test: bool
    set_aside: int = 0
    """images that were set aside as the test split, where the data have none of their own"""
    reduced_to: int | None = None
    """pixels of the shorter side that `deit data cache` brought larger photos down to, where it did"""
    more_unlabelled: bool = False
    """whether there are images without labels that were not asked for"""
    bad_images: Sequence[str] = ()
    """Images left out of the training and validation splits, each as `path: why`."""

    def names_hash(self) -> dict[str, Any]:
        """What to know the data by later: classes, numbers of images, `Split.outline` of the training and validation
        images. Opens no image."""
        train, val = self.open_split("train"), self.open_split("val")
        hashes = {"train": train.names_hash(), "val": val.names_hash()}
        return {"classes": list(self.classes), "train": len(train), "val": len(val), "outline": hashes}


@final
class Opener:
    """`Dataset.open_split`: makes a split on first demand and keeps it, so that it is read and hashed once."""

    def __init__(self, where: str, makers: Mapping[SplitName, Callable[[], Split]]) -> None:
        self._where = where
        self._makers = makers
        self._opened: dict[SplitName, Split] = {}

    def __call__(self, split: SplitName) -> Split:
        if split not in ("train", "val", "test"):
            raise unknown_name("split", split, ("train", "val", "test"))
        if split not in self._makers:
            has = ", ".join(self._makers)
            raise UserError(f"{self._where} has no {split} split, only {has}: choose one of them")
        if split not in self._opened:
            self._opened[split] = self._makers[split]()
        return self._opened[split]


TEST_SHARE = 0.2
"""Share of each class that is set aside as test images where the data has no test split of its own."""
_VALIDATION_DRAW, _TEST_DRAW = 0, 1  # the test images of a seed must not be its first validation images


def held_out(
    labels_N: NDArray[np.int64], share: float, seed: int, *, draw: int = _VALIDATION_DRAW, keep: int = 1
) -> NDArray[np.bool_]:
    """True for the images held out: `share` of each class, rounded, but at least one, and at least `keep` remain.

    A class of at most `keep` images gives none. The draw is a function of (seed, draw, position)."""
    rank_N, counts_K = _ranks(labels_N, permutation(seed, Purpose.SPLIT, draw, len(labels_N)))
    wanted_K = np.maximum(np.floor(counts_K * share + 0.5).astype(np.int64), 1)
    out_K = np.clip(np.minimum(wanted_K, counts_K - keep), 0, None)
    held_N: NDArray[np.bool_] = rank_N < out_K[labels_N]
    return held_N


def held_out_test(labels_N: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """True for the test images of data that has one folder a class and nothing else."""
    return held_out(labels_N, TEST_SHARE, seed, draw=_TEST_DRAW, keep=2)


def stratified_subset(labels_N: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Positions, ascending, of `size` images in which every class has its share, and each at least one image.

    Seats go to classes by the method of Sainte-Laguë: image r (from 0) of a class of n is the (r + 1/2)/n-th to
    come. That is proportional to within an image like the method of largest remainders, but never takes an
    image away when the total grows: a smaller subset is part of every larger one of the same seed.
    Raises UserError when there are fewer images than `size`, or more classes."""
    classes = len(np.unique(labels_N))
    if size > len(labels_N):
        raise UserError(f"train_images is {size}, but only {len(labels_N)} training images exist")
    if size < classes:
        raise UserError(f"train_images is {size}, but each of the {classes} classes needs at least one image")
    order_N = permutation(seed, Purpose.SUBSET, 0, len(labels_N))
    rank_N, counts_K = _ranks(labels_N, order_N)
    turn_N = np.where(rank_N == 0, -1.0, (rank_N + 0.5) / counts_K[labels_N])
    tie_N = np.empty_like(order_N)
    tie_N[order_N] = np.arange(len(order_N))
    return np.sort(np.lexsort((tie_N, turn_N))[:size])


def train_and_validation(
    labels_N: NDArray[np.int64], config: DataConfig, *, has_validation: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the training images and, where the data has no validation split, of those held out for it
    (else none). The subset that `train_images` asks for is taken from the training images alone."""
    if has_validation:
        held_N = np.zeros(len(labels_N), np.bool_)
    else:
        held_N = held_out(labels_N, config.val_fraction, config.data_seed)
        if not held_N.any():
            raise UserError(
                "no image is left to validate on: every class has a single image; add images or a validation split"
            )
    train, validation = np.flatnonzero(~held_N), np.flatnonzero(held_N)
    if config.train_images is not None:
        train = train[stratified_subset(labels_N[train], config.train_images, config.data_seed)]
    return train, validation


def _ranks(labels_N: NDArray[np.int64], order_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each image's place among those of its class when all are laid out in `order_N`, and the classes' sizes."""
    counts_K = np.bincount(labels_N)
    by_class_N = order_N[np.argsort(labels_N[order_N], kind="stable")]
    rank_N = np.empty(len(labels_N), np.int64)
    rank_N[by_class_N] = np.arange(len(labels_N)) - np.repeat(np.cumsum(counts_K) - counts_K, counts_K)
    return rank_N, counts_K


class Source(ABC):
    """Rows 0..N-1 of a file or folder, with their labels and the verdict of a scan."""

    labels_N: NDArray[np.int64]
    scan: Scan

    @abstractmethod
    def splits(self, parts: Sequence[NDArray[np.int64]], channels: int, title: str) -> list[Split]:
        """One split for each array of rows, all images with `channels` channels."""

    def split(self, rows: NDArray[np.int64] | None, channels: int, title: str) -> Split:
        """The split of `rows`, or of all."""
        return self.splits([np.arange(len(self.labels_N)) if rows is None else rows], channels, title)[0]


@final
class MemorySplit(Split):
    """uint8 pixels of shape (N, H, W, C). `rows_N` says where each image stands in the file that it came from:
    image `position` is called `source[row]`."""

    def __init__(
        self, pixels_NHWC: NDArray[np.uint8], labels_N: NDArray[np.int64], rows_N: NDArray[np.int64], source: str
    ) -> None:
        if not len(pixels_NHWC) == len(labels_N) == len(rows_N):
            raise ValueError(f"{len(pixels_NHWC)} images, {len(labels_N)} labels, {len(rows_N)} rows")
        self._pixels_NHWC = pixels_NHWC
        self.labels_N = labels_N.astype(np.int64, copy=False)
        self.channels = int(pixels_NHWC.shape[-1])
        self._rows_N = rows_N
        self._source = source
        self._fingerprint: str | None = None

    @property
    def pixels_NHWC(self) -> NDArray[np.uint8]:
        return self._pixels_NHWC

    def read(self, position: int) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = self._pixels_NHWC[position]
        return image

    def name(self, position: int) -> str:
        return f"{self._source}[{self._rows_N[position]}]"

    def place(self, position: int) -> str:
        return str(self._rows_N[position])

    def content_hash(self) -> str:
        if self._fingerprint is None:
            digest = hashlib.sha256(repr(self._pixels_NHWC.shape).encode())
            digest.update(np.ascontiguousarray(self.labels_N, "<i8").tobytes())
            digest.update(np.ascontiguousarray(self._pixels_NHWC).data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


@final
class MemorySource(Source):
    """Decoded pixels of shape (N, H, W, C) with labels; `bad` names the rows of `readable_N` that are False."""

    def __init__(
        self,
        pixels_NHWC: NDArray[np.uint8],
        labels_N: NDArray[np.int64],
        readable_N: NDArray[np.bool_] | None = None,
        bad: Sequence[str] = (),
    ) -> None:
        height, width, channels = (int(size) for size in pixels_NHWC.shape[1:])
        readable_N = np.ones(len(labels_N), np.bool_) if readable_N is None else readable_N
        self.labels_N = labels_N
        self.scan = Scan(readable_N, list(bad), channels, (height, width))
        self._pixels_NHWC = pixels_NHWC

    def splits(self, parts: Sequence[NDArray[np.int64]], channels: int, title: str) -> list[Split]:
        """The parts lie one after the other in memory: together they take that of one copy, not of two."""
        rows = np.concatenate(parts)
        pixels_NHWC = self._pixels_NHWC
        if not np.array_equal(rows, np.arange(len(pixels_NHWC))):
            pixels_NHWC = pixels_NHWC[rows]
        if pixels_NHWC.shape[-1] != channels:
            pixels_NHWC = np.stack([with_channels(image_HWC, channels) for image_HWC in pixels_NHWC])
        ends = np.cumsum([len(part) for part in parts])
        starts = ends - [len(part) for part in parts]
        return [
            MemorySplit(pixels_NHWC[start:end], self.labels_N[part], part, title)
            for start, end, part in zip(starts, ends, parts, strict=True)
        ]


WHOLE_LIMIT = 50_000
"""Up to this many images are run through in full; of more, only the headers are read, and what lies deeper shows
itself in training."""
_CHUNK = 256

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Scan(NamedTuple):
    """What the images of a split have in common, and which of them cannot be read."""

    readable_N: NDArray[np.bool_]
    bad: list[str]
    channels: int
    image_size: tuple[int, int] | None


def in_threads(function: Callable[[int], ResultT], count: int) -> list[ResultT]:
    """`function` of 0..count-1, in that order, on all processors that this process may use."""

    def some(start: int) -> list[ResultT]:
        return [function(position) for position in range(start, min(start + _CHUNK, count))]

    with ThreadPoolExecutor(processors()) as pool:
        return [result for part in pool.map(some, range(0, count, _CHUNK)) for result in part]


def ahead(function: Callable[[ItemT], ResultT], items: Iterator[ItemT]) -> Iterator[ResultT]:
    """`map` on threads that runs a few items ahead, not all of them: an ImageNet does not fit."""
    running: deque[Future[ResultT]] = deque()
    with ThreadPoolExecutor(processors()) as pool:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > 2 * processors():
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def scan(probe: Callable[[int, bool], Shape], count: int) -> Scan:
    """Probe images 0..count-1 with `probe(position, whole)`, which raises UnreadableImage for a bad one."""
    shapes_N3 = np.zeros((count, 3), np.int64)
    bad: list[tuple[int, str]] = []

    def look(position: int) -> None:
        try:
            shapes_N3[position] = probe(position, count <= WHOLE_LIMIT)
        except UnreadableImage as error:
            bad.append((position, str(error)))

    in_threads(look, count)
    readable_N = shapes_N3[:, 2] > 0
    sizes = np.unique(shapes_N3[readable_N, :2], axis=0)
    return Scan(
        readable_N,
        [message for _, message in sorted(bad)],
        channels=int(shapes_N3[:, 2].max(initial=1)),
        image_size=(int(sizes[0, 0]), int(sizes[0, 1])) if len(sizes) == 1 else None,
    )


def tolerate(bad: list[str], total: int, limit: int, where: str) -> None:
    """Raises UserError when more images are bad than the user puts up with."""
    if len(bad) > limit:
        first = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
        raise UserError(
            f"{where}: {len(bad)} of {total} images cannot be read, more than max_bad_images = {limit}; "
            f"mend or remove them, or raise the limit: {first}"
        )


def check_classes(labels_N: NDArray[np.int64], classes: tuple[str, ...], where: str) -> None:
    """Raises UserError naming the classes that have no image."""
    empty = [classes[label] for label in np.flatnonzero(np.bincount(labels_N, minlength=len(classes)) == 0)]
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise UserError(
            f"{where}: no readable image of class {', '.join(map(repr, empty[:5]))}{more}; add images or remove the class"
        )


def assemble(
    *,
    name: str,
    classes: tuple[str, ...],
    mirror_safe: bool,
    config: DataConfig,
    train: Source,
    validation: Source | None,
    test: Callable[[int], Split] | None,
    set_aside: int = 0,
    more_unlabelled: bool = False,
) -> Dataset:
    """Leaves out what the scans found unreadable, holds validation images out of `train` where there are none, and
    takes the subset. Images of `train` without labels, and those outside the subset, are training images without labels where
    `config` wants them. `test(channels)` is called when the test split is asked for.

    `more_unlabelled`: whether there are images without labels elsewhere.

    Raises UserError for too many bad images, for a class without a readable one, for a subset that cannot be had."""
    if len(classes) < 2:
        raise UserError(f"{name}: holds a single class, {classes[0]!r}; a classifier needs two")
    sources = [source for source in (train, validation) if source is not None]
    bad = [message for source in sources for message in source.scan.bad]
    tolerate(bad, sum(len(source.labels_N) for source in sources), config.max_bad_images, name)
    for title, source in zip(("training", "validation"), sources, strict=False):
        labels_N = source.labels_N[source.scan.readable_N]
        check_classes(labels_N[labels_N != NO_LABEL], classes, f"{name}, {title} images")

    channels = max(source.scan.channels for source in sources)
    sizes = {source.scan.image_size for source in sources}
    good = np.flatnonzero(train.scan.readable_N)
    labelled = good[train.labels_N[good] != NO_LABEL]
    chosen, held_out = train_and_validation(train.labels_N[labelled], config, has_validation=validation is not None)
    taught, held_out = labelled[chosen], labelled[held_out]
    shown = np.setdiff1d(good, held_out) if config.unlabelled else taught
    if config.unlabelled and len(shown) == len(taught):
        raise UserError(
            f"{name}: --unlabelled: no training image is without a label: put some into a folder {UNLABELLED[0]!r} beside the "
            f"class folders (or beside train), or give fewer --train-images"
        )
    opened = train.splits([shown] + ([] if validation is not None else [held_out]), channels, "train")
    if config.unlabelled:
        opened[0].labels_N = np.where(np.isin(shown, taught), opened[0].labels_N, NO_LABEL)
    if validation is not None:
        opened.append(validation.split(np.flatnonzero(validation.scan.readable_N), channels, "val"))

    makers: dict[SplitName, Callable[[], Split]] = {"train": lambda: opened[0], "val": lambda: opened[1]}
    if test is not None:
        makers["test"] = lambda: test(channels)
    return Dataset(
        name=name,
        classes=classes,
        channels=channels,
        image_size=sizes.pop() if len(sizes) == 1 else None,
        mirror_safe=mirror_safe,
        open_split=Opener(name, makers),
        has_test=test is not None,
        set_aside=set_aside,
        more_unlabelled=not config.unlabelled and (more_unlabelled or len(labelled) < len(good)),
        bad_images=tuple(bad),
    )
