"""Batches of views, for training, evaluation and showing.

An epoch shows view `epoch` of every image; with V views to go round, view `epoch` mod V. In each view the images are
paired once for all; an epoch shuffles pairs.
With repeated augmentation R ("Augment your batch", Hoffer et al. 2020; paper, section 6), R epochs form a group: they
show the same R views of the same images as R plain epochs would, but each epoch takes 1/R of the pairs and shows all R
views of them. Nothing here depends on the number of workers or processes: a batch is a function of its step.

What is in a data set: figures, and a sheet of images with their views.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import FrameType
from typing import Any, TypeVar, final

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from deitkit import rng
from deitkit.config import Preprocessing, Size, ViewConfig
from deitkit.data import Dataset, Split, UnreadableImage
from deitkit.data.dataset import NO_LABEL
from deitkit.rng import Purpose
from deitkit.terminal import UserError, shortened
from deitkit.views import augment, mixup
from deitkit.views.augment import center_view
from deitkit.views.mixup import Batch, RawBatch

Rows = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Positions of images in their split, and the view that each is shown in."""
ItemT = TypeVar("ItemT")


@final
class TrainLoader:
    """The training split as a sequence of steps. `recipe` is resolved: `views` alone may be None, for another view each time."""

    def __init__(
        self,
        split: Split,
        recipe: ViewConfig,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        augmenting: bool = False,
    ) -> None:
        self.split = split
        self.recipe = recipe
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.steps_per_epoch = -(-len(split) // batch_size)
        # Held in memory and cropped by indexing, images are ready sooner than a worker could send them.
        self.workers = 0 if _crops_by_indexing(split, recipe) else workers
        # For a student on a CPU workers augment, too: one process alone would be slower than they are.
        self.augmenting = augmenting and self.workers > 0

    @property
    def smallest_step(self) -> int:
        """Images of the smallest step, over all processes."""
        bounds = (cut(len(self.split), self.steps_per_epoch, number) for number in range(self.steps_per_epoch))
        return min(stop - start for start, stop in bounds)

    def rows(self, step: int) -> Rows:
        """The images and views of one step, over all processes."""
        epoch, number = divmod(step, self.steps_per_epoch)
        index_N, view_N = self.epoch(epoch)
        start, stop = cut(len(self.split), self.steps_per_epoch, number)
        return index_N[start:stop], view_N[start:stop]

    def epoch(self, epoch: int) -> Rows:
        """The images and views of one epoch in their order."""
        recipe = self.recipe
        return epoch_rows(recipe.view_seed, recipe.repeated_aug, recipe.views, self.seed, epoch, len(self.split))

    def crops(self, step: int) -> RawBatch:
        """This process's share of one step."""
        index_N, view_N = self.rows(step)
        start, stop = cut(len(index_N), self.world, self.rank)
        crops = raw_batch(self.split, self.recipe, index_N[start:stop], view_N[start:stop])
        return augment_batch(crops, self.recipe) if self.augmenting else crops

    def batches(self, start: int, stop: int, *, pin_memory: bool = False) -> Iterator[RawBatch]:
        """This process's share of steps start..stop-1, read ahead by the workers."""
        return prefetch(_Steps(self, start, stop), self.workers, pin_memory=pin_memory)


class _Steps(TorchDataset[RawBatch]):
    """Steps start..stop-1 of a loader, one by one."""

    def __init__(self, loader: TrainLoader, start: int, stop: int) -> None:
        self.loader, self.start, self.stop = loader, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, offset: int) -> RawBatch:
        return self.loader.crops(self.start + offset)


@lru_cache(maxsize=4)
def epoch_rows(view_seed: int, repeats: int, views: int | None, seed: int, epoch: int, length: int) -> Rows:
    """The images of an epoch, pair by pair in shuffled order, and their views: exactly `length` of them. With `views`,
    a multiple of `repeats`, epochs go round those; the order is another one each time."""
    group, part = divmod(epoch, repeats)
    if views is not None:
        group %= views // repeats
    pairs = mixup.pair_order(view_seed, group, length)
    pairs = pairs[part % len(pairs) :: repeats]
    shown = group * repeats + np.arange(repeats)
    shuffled = rng.permutation(seed, Purpose.ORDER, epoch, len(pairs) * repeats)
    pair, view = np.divmod(shuffled, repeats)
    index_N, view_N = pairs[pair].ravel(), np.repeat(shown[view], 2)
    single = np.zeros(len(index_N), bool)
    single[1::2] = index_N[1::2] == index_N[::2]  # the odd one out is paired with itself
    # Parts differ by a few images where `repeats` does not divide the pairs: all epochs are made equally long.
    return np.resize(index_N[~single], length), np.resize(view_N[~single], length)


def views_shown(steps: int, steps_per_epoch: int, recipe: ViewConfig) -> int:
    """How many views so many steps show: one an epoch, in whole groups of repeated ones, or as many as are gone round."""
    epochs = math.ceil(steps / steps_per_epoch)
    return recipe.views or -(-epochs // recipe.repeated_aug) * recipe.repeated_aug


def cut(length: int, parts: int, number: int) -> tuple[int, int]:
    """Where part `number` of `length` rows starts and stops: parts of nearly equal size that, if they can, start at even
    rows, so that no pair is cut."""
    bounds = [(number + end) * length // parts for end in (0, 1)]
    if length >= 2 * parts:
        bounds = [bound if bound == length else bound // 2 * 2 for bound in bounds]
    return bounds[0], bounds[1]


def raw_batch(split: Split, recipe: ViewConfig, index_B: NDArray[np.int64], view_B: NDArray[np.int64]) -> RawBatch:
    """First stage of the given views of the given images, with the mixing partners that are not among them."""
    partner_index_B = index_B.copy()
    if recipe.mixup_alpha > 0 or recipe.cutmix_alpha > 0:
        for view in np.unique(view_B):
            chosen = view_B == view
            partners = _pairing(recipe.view_seed, int(view) // recipe.repeated_aug, len(split))
            partner_index_B[chosen] = partners[index_B[chosen]]
    row_of = {key: row for row, key in reversed(list(enumerate(zip(index_B.tolist(), view_B.tolist(), strict=True))))}
    partner_B = np.empty(len(index_B), np.int64)
    extra: list[tuple[int, int]] = []
    for row, key in enumerate(zip(partner_index_B.tolist(), view_B.tolist(), strict=True)):
        if key not in row_of:
            row_of[key] = len(index_B) + len(extra)
            extra.append(key)
        partner_B[row] = row_of[key]
    index_M = np.concatenate([index_B, np.array([index for index, _ in extra], np.int64)])
    view_M = np.concatenate([view_B, np.array([view for _, view in extra], np.int64)])
    pixels_MCHW, weight_M = _crop(split, recipe, index_M, view_M)
    return RawBatch(
        pixels_MCHW=pixels_MCHW,
        labels_M=torch.from_numpy(split.labels_N[index_M]),
        index_M=torch.from_numpy(index_M),
        view_M=torch.from_numpy(view_M),
        weight_M=torch.from_numpy(weight_M),
        partner_B=torch.from_numpy(partner_B),
    )


def augment_batch(crops: RawBatch, recipe: ViewConfig) -> RawBatch:
    """The crops after the second stage of their views, but for mixing."""
    pixels_MCHW = augment.augment(crops.pixels_MCHW, crops.index_M, crops.view_M, recipe)
    return crops._replace(pixels_MCHW=pixels_MCHW, augmented=True)


def augment_and_mix(crops: RawBatch, recipe: ViewConfig, device: torch.device | str = "cpu") -> Batch:
    """Second stage of a view on `device`: augmentation, unless loader workers have done it, then mixing."""
    crops = crops._replace(pixels_MCHW=crops.pixels_MCHW.to(device, non_blocking=True))
    crops = crops if crops.augmented else augment_batch(crops, recipe)
    return mixup.mix(crops.pixels_MCHW, crops, recipe)


def show_views(split: Split, recipe: ViewConfig, positions: Sequence[int], views: int) -> NDArray[np.uint8]:
    """Views 0..views-1 of some images: uint8 of shape (positions, views, H, W, C)."""
    index_B = np.repeat(np.asarray(positions, np.int64), views)
    batch = augment_and_mix(raw_batch(split, recipe, index_B, np.tile(np.arange(views), len(positions))), recipe)
    pixels = (batch.images_BCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels.reshape(len(positions), views, *pixels.shape[1:])


def evaluation_batches(
    split: Split, preprocessing: Preprocessing, *, batch_size: int = 256, workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """All images in order as a network wants to see them, not yet normalised: (images_BCHW in [0, 1], labels_B, weight_B).

    Images held in memory at one size stay at it where nothing is to be cut off: the network resizes."""
    if _stays_whole(split, preprocessing):
        workers = 0
    batches = prefetch(_Evaluation(split, preprocessing, batch_size), workers, batches=2)
    for pixels_BCHW, labels_B, weight_B in batches:
        yield pixels_BCHW.float() / 255, labels_B, weight_B


class _Evaluation(TorchDataset[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
    """A split in batches of uint8 images."""

    def __init__(self, split: Split, preprocessing: Preprocessing, batch_size: int) -> None:
        self.split, self.preprocessing, self.batch_size = split, preprocessing, batch_size

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        positions = np.arange(number * self.batch_size, min((number + 1) * self.batch_size, len(self.split)))
        labels_B = torch.from_numpy(self.split.labels_N[positions])
        pixels_NHWC = self.split.pixels_NHWC
        if pixels_NHWC is not None and _stays_whole(self.split, self.preprocessing):
            held = torch.from_numpy(np.ascontiguousarray(pixels_NHWC[positions])).permute(0, 3, 1, 2)
            return held, labels_B, torch.ones(len(positions))
        size = self.preprocessing.image_size
        images, weight_B = [], np.ones(len(positions), np.float32)
        for row, position in enumerate(positions):
            try:
                image_HWC = self.split.read(int(position))
                image_HWC = augment.center_view(
                    image_HWC, size, self.preprocessing.crop_pct, self.preprocessing.interpolation
                )
            except UnreadableImage:
                image_HWC, weight_B[row] = _blank(self.split, size), 0
            images.append(image_HWC)
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), labels_B, torch.from_numpy(weight_B)


def _stays_whole(split: Split, preprocessing: Preprocessing) -> bool:
    """Whether images are held in memory and a network sees all of them, only at another size."""
    if split.pixels_NHWC is None or preprocessing.crop_pct < 1:
        return False
    height, width = split.pixels_NHWC.shape[1:3]
    return bool(height * preprocessing.image_size[1] == width * preprocessing.image_size[0])


def _crops_by_indexing(split: Split, recipe: ViewConfig) -> bool:
    pixels_NHWC = split.pixels_NHWC
    return pixels_NHWC is not None and recipe.crop in ("none", "pad") and pixels_NHWC.shape[1:3] == recipe.view_size


def _crop(
    split: Split, recipe: ViewConfig, index_M: NDArray[np.int64], view_M: NDArray[np.int64]
) -> tuple[torch.Tensor, NDArray[np.float32]]:
    """Cropped uint8 images (M, C, H, W), and weight 0 for those that cannot be read."""
    weight_M = np.ones(len(index_M), np.float32)
    pixels_NHWC = split.pixels_NHWC
    if pixels_NHWC is not None and _crops_by_indexing(split, recipe):
        pixels_MCHW = torch.from_numpy(pixels_NHWC[index_M]).permute(0, 3, 1, 2)
        if recipe.crop == "pad":
            pixels_MCHW = augment.padded_crop(pixels_MCHW, index_M, view_M, recipe)
        return pixels_MCHW.contiguous(), weight_M
    assert recipe.view_size is not None
    images = []
    drawn = augment.crop_draws(recipe, view_M, index_M)
    for row, index in enumerate(index_M.tolist()):
        try:
            images.append(augment.crop_image(split.read(index), drawn[row], recipe))
        except UnreadableImage:
            images.append(torch.from_numpy(_blank(split, recipe.view_size)).permute(2, 0, 1))
            weight_M[row] = 0
    return torch.stack(images), weight_M


@lru_cache(maxsize=8)
def _pairing(view_seed: int, group: int, length: int) -> NDArray[np.int64]:
    return mixup.pairing(view_seed, group, length)


def _blank(split: Split, size: Size) -> NDArray[np.uint8]:
    return np.zeros((*size, split.channels), np.uint8)


def prefetch(
    items: TorchDataset[ItemT], workers: int, *, batches: int = 4, pin_memory: bool = False
) -> Iterator[ItemT]:
    """The items in order; so many of them are made ahead by each of the workers, which run already. On a machine with fewer cores
    than workers they take turns: torch's warning of that is not passed on, since two are the default."""
    with warnings.catch_warnings(), interrupted_later():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        return iter(
            DataLoader(
                items,
                batch_size=None,
                num_workers=workers,
                prefetch_factor=batches if workers else None,
                worker_init_fn=one_thread,
                pin_memory=pin_memory,
            )
        )


@contextlib.contextmanager
def interrupted_later() -> Iterator[None]:
    """Ctrl-C within the block is heard at its end: a loader that is interrupted while it starts its workers ends in a
    traceback. The workers never hear it, for they are ended by this process."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard:
            before(*heard[0])


def one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


SIZES_READ = 64
"""Photos that are opened to say how large they are."""
CELL = 64
"""Images smaller than this many pixels are magnified in a sheet."""
GAP = 2
TITLE_HEIGHT = 16
MOST_PIXELS = 10**8


def describe(dataset: Dataset) -> dict[str, Any]:
    """Counts by split and class, sizes, unreadable images. The test split is left closed."""
    splits = {name: dataset.open_split(name) for name in ("train", "val")}
    return {
        "name": dataset.name,
        "classes": {
            label: {name: int((split.labels_N == number).sum()) for name, split in splits.items()}
            for number, label in enumerate(dataset.classes)
        },
        "unlabelled": int((splits["train"].labels_N == NO_LABEL).sum()),
        "images": {name: len(split) for name, split in splits.items()},
        "has_test": dataset.has_test,
        "set_aside": dataset.set_aside,
        "channels": dataset.channels,
        "sizes": _sizes(dataset, splits["train"]),
        "mirror_safe": dataset.mirror_safe,
        "bad_images": list(dataset.bad_images),
    }


def one_of_each_class(split: Split, most: int) -> list[int]:
    """Positions of up to `most` readable images: the first of every class, then the second, ..."""
    order = np.argsort(split.labels_N, kind="stable")
    _, starts = np.unique(split.labels_N[order], return_index=True)
    rank_N = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
    chosen: list[int] = []
    for position in order[np.argsort(rank_N, kind="stable")].tolist():
        if len(chosen) == most:
            break
        if _readable(split, position):
            chosen.append(position)
    return chosen


def view_sheet(split: Split, recipe: ViewConfig, positions: Sequence[int], views: int) -> Image.Image:
    """One row an image: the image itself, then its views 0..views-1. `recipe` is resolved."""
    assert recipe.view_size is not None
    pixels = len(positions) * (views + 1) * recipe.view_size[0] * recipe.view_size[1]
    if pixels > MOST_PIXELS:
        raise UserError(f"a sheet of {pixels / 1e6:,.0f} million pixels is too large: show fewer or smaller views")
    originals = [center_view(split.read(position), recipe.view_size) for position in positions]
    shown: Any = show_views(split, recipe, positions, views) if views else [[] for _ in positions]
    return sheet([[original, *row] for original, row in zip(originals, shown, strict=True)])


def titled(picture: Image.Image, names: Sequence[str]) -> Image.Image:
    """A sheet with the name of each row on its left, and a line on top that says what stands in the columns."""
    names = [shortened(name, 24) for name in names]
    left = GAP * 4 + max(int(ImageDraw.Draw(picture).textlength(name)) for name in names)
    row = (picture.height - GAP) / len(names)
    canvas = Image.new("RGB", (left + picture.width, TITLE_HEIGHT + picture.height), "white")
    canvas.paste(picture, (left, TITLE_HEIGHT))
    pen = ImageDraw.Draw(canvas)
    pen.text((left + GAP, GAP), "the image, then views of it", "black")
    for number, name in enumerate(names):
        pen.text((GAP, TITLE_HEIGHT + (number + 0.5) * row), name, "black", anchor="lm")
    return canvas


def sheet(rows: Sequence[Sequence[UInt8[np.ndarray, "H W C"]]]) -> Image.Image:
    """Equal-sized images in rows and columns, small ones magnified by whole numbers."""
    height, width, _ = rows[0][0].shape
    times = max(1, -(-CELL // max(height, width)))
    columns = max(len(row) for row in rows)
    cell_height, cell_width = height * times + GAP, width * times + GAP
    canvas = np.full((len(rows) * cell_height + GAP, columns * cell_width + GAP, 3), 255, np.uint8)
    for down, row in enumerate(rows):
        for across, image_HWC in enumerate(row):
            large: NDArray[np.uint8] = image_HWC.repeat(times, 0).repeat(times, 1)
            top, left = down * cell_height + GAP, across * cell_width + GAP
            canvas[top : top + height * times, left : left + width * times] = large
    return Image.fromarray(canvas)


def _sizes(dataset: Dataset, split: Split) -> dict[str, list[int]]:
    """Smallest and largest height and width, of all images or of a sample spread over the split."""
    if dataset.image_size is not None:
        height, width = dataset.image_size
        return {"height": [height, height], "width": [width, width]}
    spread = np.unique(np.linspace(0, len(split) - 1, SIZES_READ).astype(int)).tolist()
    shapes = [split.read(position).shape for position in spread if _readable(split, position)]
    heights, widths = [shape[0] for shape in shapes], [shape[1] for shape in shapes]
    return {"height": [min(heights), max(heights)], "width": [min(widths), max(widths)]} if shapes else {}


def _readable(split: Split, position: int) -> bool:
    try:
        split.read(position)
    except UnreadableImage:
        return False
    return True
