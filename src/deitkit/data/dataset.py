"""What a data set is: classes, and a training, a validation and a test split, each opened only when somebody asks for it.

Wherever images lie, a loader makes a `Split` of all of them and scans it (`Source`: which are unreadable), and `assemble` turns
the sources into a `Dataset`: it leaves bad images out, holds validation images out and takes the subset. Which images those are
is a function of the labels and a seed. Scans and content hashes are kept in `caching.cache_folder()` until files change.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self, TypeGuard, final

import numpy as np
import PIL
from numpy.typing import NDArray

from deitkit.config import DataConfig
from deitkit.data.caching import cached, in_threads
from deitkit.data.decode import Shape, UnreadableImage, with_channels
from deitkit.data.listing import left_out_line
from deitkit.rng import Purpose, permutation
from deitkit.terminal import UserError, unknown_name

SplitName = Literal["train", "val", "test"]
COMPARED, MOST_COMPARED = 1000, 200_000
"""Validation images whose files are compared with those of the training images of the same size, of which there may be so many."""

SMALL_IMAGE = 64
"""Pixels of the longer side up to which images of one size are small."""
NO_LABEL = -1
"""The label of a training image without one."""
UNLABELLED = ("unlabelled", "unlabeled")
"""Names of the folder of images without labels, beside those of the classes or of the splits."""
TEST_SHARE = 0.2
"""Share of each class that is set aside as test images where the data has no test split of its own."""
WHOLE_LIMIT = 50_000
"""Up to this many images are scanned in full; of more, only the headers are read, and deeper damage shows in training."""
DARK, DARK_SAMPLE = 31, 8
"""Images whose values are all so low show next to nothing; of grey data so many training images are looked at."""
_VALIDATION_DRAW, _TEST_DRAW = 0, 1  # the test images of a seed must not be its first validation images


def is_small(image_size: tuple[int, int] | None) -> TypeGuard[tuple[int, int]]:
    """Whether images are padded and shifted at their own size; others are photos, cropped and resized."""
    return image_size is not None and max(image_size) <= SMALL_IMAGE


class Split(ABC):
    """The images of one split with their labels. Positions 0..len-1 name the images everywhere."""

    labels_N: NDArray[np.int64]
    """numbers of classes; of training images also `NO_LABEL`"""
    channels: int
    """1 for grey, 3 for RGB"""
    rows_N: NDArray[np.int64]
    """where each image stands in the file or folder that it comes from"""
    title: str
    """what names of images begin with, unless they are paths"""
    left_out: Mapping[str, int] = MappingProxyType({})
    """how many files beside the images are not used, by kind"""
    _known_hash: str | None = None

    def __len__(self) -> int:
        return len(self.labels_N)

    def subset(self, positions_N: NDArray[np.int64], channels: int, title: str = "") -> Self:
        """Some of the images, in this order, all with `channels` channels."""
        part = copy.copy(self)
        part.labels_N, part.rows_N = self.labels_N[positions_N], self.rows_N[positions_N]
        part.channels, part.title, part._known_hash = channels, title, None
        return part

    @abstractmethod
    def read(self, position: int) -> NDArray[np.uint8]:
        """Image `position` as uint8 of shape (H, W, C): upright, grey (C = 1) or RGB (C = 3), contiguous and writable.

        Raises UnreadableImage."""

    def stored(self, position: int) -> Any:
        """What two copies of an image have in common: the bytes of its file, or its pixels where these are held. Raises OSError."""
        return self.read(position)

    def stored_size(self, position: int) -> int:
        """Bytes of `stored`, found without reading them. Raises OSError."""
        size: int = self.stored(position).nbytes
        return size

    def name(self, position: int) -> str:
        """What the user knows image `position` by: its path, or `train[17]`."""
        return f"{self.title}[{self.rows_N[position]}]"

    def key(self, position: int) -> str:
        """`name`, but the same wherever the data lie."""
        return str(self.rows_N[position])

    @property
    def pixels_NHWC(self) -> NDArray[np.uint8] | None:
        """All images, where they are held in memory at one size; else None."""
        return None

    @property
    def decoded(self) -> bool:
        """Whether reading an image costs no decoding."""
        return self.pixels_NHWC is not None

    def names_hash(self) -> str:
        """A hash of labels and keys: changes when an image comes, goes or is moved, and opens none."""
        return hash_with_labels(self.labels_N, (os.fsencode(self.key(k)) + b"\0" for k in range(len(self))))

    @abstractmethod
    def content_hash(self) -> str:
        """A hash that changes when an image, its label or the order changes. Reads all images."""

    def mtime_hash(self) -> str | None:
        """A hash of the file system's facts (`file_state`) of the images' files; None where reading them costs nothing."""
        return None

    def cached_content_hash(self) -> str:
        """`content_hash`, computed again only when `mtime_hash` changes."""
        state = self.mtime_hash()
        if state is not None:
            return cached("hashes", state, lambda: self.content_hash().encode()).decode()
        if self._known_hash is None:
            self._known_hash = self.content_hash()
        return self._known_hash


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
    undivided: bool = False
    """whether every split is all of the images"""
    set_aside: int = 0
    """images that were set aside as the test split, where the data have none of their own"""
    reduced_to: int | None = None
    """pixels of the shorter side that `deit data cache` brought larger photos down to, where it did"""
    more_unlabelled: bool = False
    """whether there are images without labels that were not asked for"""
    bad_images: Sequence[str] = ()
    """Images left out of the training and validation splits, each as `path: why`."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many files beside those images are not used, by kind."""
    notes: Sequence[str] = ()
    """What else the user should know of how the data were read, a sentence each."""

    @property
    def remarks(self) -> list[str]:
        """What the user should know of how the data were read, beside each bad image: `notes`, and what is left out."""
        return [*self.notes, *([left_out_line(self.left_out, len(self.bad_images))] if self.left_out else [])]

    @property
    def split_names(self) -> tuple[SplitName, ...]:
        return ("train", "val", "test") if self.has_test else ("train", "val")

    def names_hash(self) -> dict[str, Any]:
        """What a run recognises its data by: classes, numbers of images, `Split.names_hash` of the training and validation
        images. Opens no image."""
        train, val = self.open_split("train"), self.open_split("val")
        hashes = {"train": train.names_hash(), "val": val.names_hash()}
        return {"classes": list(self.classes), "train": len(train), "val": len(val), "names_hash": hashes}


def with_repeated(dataset: Dataset) -> Dataset:
    """`dataset` with a note of the validation images that are also training images."""
    note = repeated(dataset.open_split("train"), dataset.open_split("val"), "validation")
    return replace(dataset, notes=(*dataset.notes, note)) if note else dataset


def repeated(train: Split, held: Split, which: str) -> str:
    """What to say where images of `held`, of up to `COMPARED`, are also among the training images, byte for byte; else nothing."""
    if len(train) > MOST_COMPARED or type(train) is not type(held):
        return ""

    def sized(split: Split, positions: Iterable[int]) -> Iterator[tuple[int, int]]:
        for position in positions:
            with contextlib.suppress(OSError):  # whoever reads it says so
                yield position, split.stored_size(position)

    def digests(split: Split, positions: Iterable[int]) -> Iterator[bytes]:
        for position in positions:
            with contextlib.suppress(OSError):
                yield hashlib.sha256(split.stored(position)).digest()

    looked_at = np.unique(np.linspace(0, len(held) - 1, min(COMPARED, len(held))).astype(int)).tolist()
    sizes = {size for _, size in sized(held, looked_at)}
    known = {*digests(train, (position for position, size in sized(train, range(len(train))) if size in sizes))}
    count = sum(digest in known for digest in digests(held, looked_at))
    if not count:
        return ""
    return (
        f"{count} of {len(looked_at):,} {which} images are among the training images too: {which} figures are too good"
    )


def hash_with_labels(labels_N: NDArray[np.int64], parts: Iterable[bytes]) -> str:
    """SHA-256 of the labels and then the `parts`, in hexadecimal digits."""
    digest = hashlib.sha256(np.ascontiguousarray(labels_N, "<i8").tobytes())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


class Source(NamedTuple):
    """All images of a file or folder, before it is decided which of them train and which validate."""

    images: Split
    readable_N: NDArray[np.bool_]
    bad: Sequence[str]
    """names the images that are not readable, and says why"""
    channels: int
    image_size: tuple[int, int] | None
    """(height, width) where all images share it"""


def scan(images: Split, probe: Callable[[int, bool], Shape], state: str) -> Source:
    """Probe every image with `probe(position, whole)`, which raises UnreadableImage for a bad one.

    The shapes are cached under `state`, a hash that changes with the images. Bad ones are probed each time: the fault may
    have been the disk's."""
    count = len(images)
    whole = count <= WHOLE_LIMIT
    shapes_N3 = np.zeros((count, 3), "<i4")
    bad: dict[int, str] = {}

    def look(position: int) -> None:
        try:
            shapes_N3[position] = probe(position, whole)
        except UnreadableImage as error:
            bad[position] = str(error)

    def look_at_all() -> bytes:
        in_threads(look, range(count))
        return shapes_N3.tobytes()

    key = hashlib.sha256(f"{state} {whole} {PIL.__version__}".encode()).hexdigest()
    shapes_N3[:] = np.frombuffer(cached("scans", key, look_at_all), "<i4").reshape(count, 3)
    in_threads(look, [row for row in np.flatnonzero(shapes_N3[:, 2] == 0).tolist() if row not in bad])
    readable_N = shapes_N3[:, 2] > 0
    sizes = np.unique(shapes_N3[readable_N, :2], axis=0)
    size = (int(sizes[0, 0]), int(sizes[0, 1])) if len(sizes) == 1 else None
    messages = [message for _, message in sorted(bad.items())]
    return Source(images, readable_N, messages, int(shapes_N3[:, 2].max(initial=1)), size)


@final
class MemorySplit(Split):
    """Images decoded in memory: uint8 pixels of shape (N, H, W, C)."""

    def __init__(self, pixels_NHWC: NDArray[np.uint8], labels_N: NDArray[np.int64]) -> None:
        self.labels_N, self.channels, self._pixels_NHWC = labels_N, int(pixels_NHWC.shape[-1]), pixels_NHWC
        self.rows_N, self.title = np.arange(len(labels_N)), ""

    def subset(self, positions_N: NDArray[np.int64], channels: int, title: str = "") -> Self:
        part = super().subset(positions_N, channels, title)
        if not np.array_equal(positions_N, np.arange(len(self))):  # else a copy would cost memory for nothing
            part._pixels_NHWC = self._pixels_NHWC[positions_N]
        if self.channels != channels:
            part._pixels_NHWC = np.stack([with_channels(image_HWC, channels) for image_HWC in part._pixels_NHWC])
        return part

    @property
    def pixels_NHWC(self) -> NDArray[np.uint8]:
        return self._pixels_NHWC

    def read(self, position: int) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = self._pixels_NHWC[position]
        return image

    def content_hash(self) -> str:
        digest = hashlib.sha256(repr(self._pixels_NHWC.shape).encode())
        digest.update(np.ascontiguousarray(self.labels_N, "<i8").tobytes())
        digest.update(np.ascontiguousarray(self._pixels_NHWC).data)
        return digest.hexdigest()


def memory_source(
    pixels_NHWC: NDArray[np.uint8], labels_N: NDArray[np.int64], bad: Mapping[int, str] | None = None
) -> Source:
    """Decoded pixels of shape (N, H, W, C). `bad`: rows that could not be read, and why."""
    readable_N = ~np.isin(np.arange(len(labels_N)), list(bad or {}))
    _, height, width, channels = pixels_NHWC.shape
    images = MemorySplit(pixels_NHWC, labels_N)
    return Source(images, readable_N, list((bad or {}).values()), channels, (height, width))


def held_out(
    labels_N: NDArray[np.int64], share: float, seed: int, *, draw: int = _VALIDATION_DRAW, keep: int = 1
) -> NDArray[np.bool_]:
    """True for the images held out: `share` of each class, rounded, but at least one, and at least `keep` remain.

    A class of at most `keep` images gives none. The draw is a function of (seed, draw, position)."""
    rank_N, counts_K = ranks(labels_N, permutation(seed, Purpose.SPLIT, draw, len(labels_N)))
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
    rank_N, counts_K = ranks(labels_N, order_N)
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


def ranks(labels_N: NDArray[np.int64], order_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each image's place among those of its class when all are laid out in `order_N`, and the classes' sizes."""
    counts_K = np.bincount(labels_N)
    by_class_N = order_N[np.argsort(labels_N[order_N], kind="stable")]
    rank_N = np.empty(len(labels_N), np.int64)
    rank_N[by_class_N] = np.arange(len(labels_N)) - np.repeat(np.cumsum(counts_K) - counts_K, counts_K)
    return rank_N, counts_K


def assemble(
    *,
    name: str,
    classes: tuple[str, ...],
    config: DataConfig,
    train: Source,
    validation: Source | None = None,
    test: Callable[[], Split] | None = None,
    mirror_safe: bool = True,
    set_aside: int = 0,
    more_unlabelled: bool = False,
    notes: Sequence[str] = (),
) -> Dataset:
    """Leaves out what the scans found unreadable, holds validation images out of `train` where there are none, and
    takes the subset. Images of `train` without labels, and those outside the subset, are training images without labels
    where `config` wants them. `test()` is called when the test split is asked for.

    `more_unlabelled`: whether there are images without labels elsewhere. `notes`: what else the user should know.

    Raises UserError for too many bad images, for a class without a readable training image, for a subset that cannot be had."""
    if len(classes) < 2:
        raise UserError(f"{name}: holds a single class, {classes[0]!r}; a classifier needs two")
    sources = {"training": train} if validation is None else {"training": train, "validation": validation}
    bad = [message for source in sources.values() for message in source.bad]
    if len(bad) > config.max_bad_images:
        total = sum(len(source.images) for source in sources.values())
        raise UserError(
            f"{name}: {len(bad)} of {total} images cannot be read, more than max_bad_images = {config.max_bad_images}; "
            f"repair or remove them, or raise the limit: {'; '.join(bad[:3])}{'; ...' if len(bad) > 3 else ''}"
        )
    check_classes(train.images.labels_N[train.readable_N], classes, f"{name}, training images", train.bad)
    channels = max(source.channels for source in sources.values())
    sizes = {source.image_size for source in sources.values()}
    labels_N, good = train.images.labels_N, np.flatnonzero(train.readable_N)
    labelled = good[labels_N[good] != NO_LABEL]
    chosen, held = train_and_validation(labels_N[labelled], config, has_validation=validation is not None)
    taught, held = labelled[chosen], labelled[held]
    shown = np.setdiff1d(good, held) if config.unlabelled else taught
    if config.unlabelled and len(shown) == len(taught):
        raise UserError(
            f"{name}: --unlabelled: no training image is without a label: put some into a folder {UNLABELLED[0]!r} beside the "
            f"class folders (or beside train), or give fewer --train-images"
        )
    splits: dict[SplitName, Split] = {"train": train.images.subset(shown, channels, "train")}
    if config.unlabelled:
        splits["train"].labels_N = np.where(np.isin(shown, taught), labels_N[shown], NO_LABEL)
    if validation is None:
        splits["val"] = train.images.subset(held, channels, "train")
    else:
        splits["val"] = validation.images.subset(np.flatnonzero(validation.readable_N), channels, "val")

    left_out = sum((Counter(source.images.left_out) for source in sources.values()), Counter[str]())
    notes = [*notes, *_doubts(splits["train"], splits["val"], classes)]

    @functools.cache  # so that each image is read once
    def open_split(split: SplitName) -> Split:
        if split == "test" and test is not None:
            images = test()  # all of them: whoever evaluates leaves out the unreadable ones, and names them
            return images.subset(np.arange(len(images)), channels, "test")
        if split not in ("train", "val", "test"):
            raise unknown_name("split", split, ("train", "val", "test"))
        if split not in splits:
            raise UserError(f"{name} has no {split} split, only {', '.join(splits)}: choose one of them")
        return splits[split]

    return Dataset(
        name=name,
        classes=classes,
        channels=channels,
        image_size=sizes.pop() if len(sizes) == 1 else None,
        mirror_safe=mirror_safe,
        open_split=open_split,
        has_test=test is not None,
        set_aside=set_aside,
        more_unlabelled=not config.unlabelled and (more_unlabelled or len(labelled) < len(good)),
        bad_images=tuple(bad),
        left_out=left_out,
        notes=tuple(notes),
    )


def oversampled(dataset: Dataset) -> Dataset:
    """`dataset` with the training images of every class repeated in turn until it has as many as the largest class. A copy has a position
    of its own, so views and mixing partners of its own, too. Images without labels stay as they are."""

    @functools.cache
    def train() -> Split:
        split = dataset.open_split("train")
        positions_N, counts_K = np.arange(len(split)), np.bincount(split.labels_N[split.labels_N != NO_LABEL])
        own = [positions_N[split.labels_N == label] for label in np.flatnonzero(counts_K)]
        repeated = [np.resize(positions, counts_K.max()) for positions in own]
        unlabelled = positions_N[split.labels_N == NO_LABEL]
        return split.subset(np.sort(np.concatenate([*repeated, unlabelled])), split.channels, split.title)

    return replace(dataset, open_split=lambda name: train() if name == "train" else dataset.open_split(name))


def _doubts(train: Split, val: Split, classes: tuple[str, ...]) -> Iterator[str]:
    """Sentences on what the figures of these splits will not show, and on images that show nothing."""
    counts_K = np.bincount(val.labels_N, minlength=len(classes))
    missing = [repr(classes[label]) for label in np.flatnonzero(counts_K == 0)]
    if missing:
        yield f"no validation image of class {_first(missing)}: validation figures say nothing of it"
    brightest, sample = [], np.linspace(0, len(train) - 1, DARK_SAMPLE if train.channels == 1 else 0)
    for position in np.unique(sample.astype(int)).tolist():
        with contextlib.suppress(UnreadableImage):
            brightest.append(int(train.read(position).max()))
    dark = sum(value <= DARK for value in brightest)
    if 2 * dark > len(brightest):
        yield (
            f"images are nearly black: {dark} of {len(brightest)} have no value above {DARK} of 255, such as {train.name(0)}: "
            f"if their range is another one, convert them to 8 bits"
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_classes(
    labels_N: NDArray[np.int64], classes: tuple[str, ...], where: str, unreadable: Sequence[str] = ()
) -> None:
    """Raises UserError naming the classes that have no image, and the first of the images that cannot be read."""
    counts_K = np.bincount(labels_N[labels_N != NO_LABEL], minlength=len(classes))
    empty = [repr(classes[label]) for label in np.flatnonzero(counts_K == 0)]
    if empty:
        more = f" and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        why = f" (unreadable: {unreadable[0]}{more})" if unreadable else ""
        raise UserError(f"{where}: no readable image of class {_first(empty)}; add images or remove the class{why}")
