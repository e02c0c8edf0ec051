"""Batches of views for training, evaluation and showing; and what is in a data set, in figures and pictures.

An epoch shows view `epoch` of every image; with V recorded views, view `epoch` mod V. In each view the images are paired
once for all; an epoch shuffles pairs. With repeated augmentation R ("Augment your batch", Hoffer et al. 2020; DeiT,
section 6), R epochs form a group: they show the same R views of the same images as R plain epochs would, but each epoch
takes 1/R of the pairs and shows all R views of them. A batch is a function of its step: the number of workers or processes
changes no pixel, and no global random generator is read or seeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from deitkit import rng
from deitkit.config import Preprocessing, Size, ViewConfig
from deitkit.data import Dataset, Split, UnreadableImage
from deitkit.data.dataset import NO_LABEL, ranks
from deitkit.terminal import UserError, one_line, shortened
from deitkit.views import augment, mixup
from deitkit.views.mixup import Batch, RawBatch
from deitkit.views.prefetch import prefetch

Ints = NDArray[np.int64]
Rows = tuple[Ints, Ints]
"""Positions of images in their split, and the view that each is shown in."""
ImageBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""images_BCHW, labels_B, and weight_B: 0 for an image that could not be read, else 1."""

EVALUATION_BATCH = 256
"""Images of a network's forward pass in an evaluation."""
SIZES_READ = 64
"""Photos that `describe` opens to see their sizes."""
CELL = 64
"""Images smaller than this many pixels are magnified in a sheet."""
GAP = 2
DPI = 100
MOST_PIXELS = 10**8


@final
class TrainLoader:
    """The training split as a sequence of steps. `config` is resolved; only its `views` may be None: another view each epoch.

    Views have `config.view_size`; for a teacher that wants another (height, width), `teacher_size`, they are rendered twice."""

    def __init__(
        self,
        split: Split,
        config: ViewConfig,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        augmenting: bool = False,
        teacher_size: Size | None = None,
    ) -> None:
        self.split = split
        self.config = config
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.steps_per_epoch = -(-len(split) // batch_size)
        # Held in memory and cropped by indexing, images are ready sooner than a worker could send them.
        self.workers = 0 if _crops_by_indexing(split, config) else workers
        # For a student on a CPU workers augment, too: one process alone would be slower than they are.
        self.augmenting = augmenting and self.workers > 0
        self.teacher_size = teacher_size

    @property
    def smallest_step(self) -> int:
        """Images of the smallest step, over all processes."""
        bounds = (cut(len(self.split), self.steps_per_epoch, number) for number in range(self.steps_per_epoch))
        return min(stop - start for start, stop in bounds)

    def epoch(self, epoch: int) -> Rows:
        """The images and views of one epoch in their order."""
        return epoch_rows(self.config, self.seed, epoch, len(self.split))

    def batch(self, step: int, small: Size | None = None, small_steps: int = 0) -> RawBatch:
        """This process's share of one step. In the first `small_steps` a student of photos sees its views at (height, width) `small`;
        small images keep their size: the student resizes them. A teacher sees them at its own size in every step."""
        resized = small is not None and step < small_steps and self.config.crop in ("resize", "simple")
        config = self.config.at(small) if resized and small is not None else self.config
        epoch, number = divmod(step, self.steps_per_epoch)
        first, last = cut(len(self.split), self.steps_per_epoch, number)
        start, stop = (first + bound for bound in cut(last - first, self.world, self.rank))
        index_N, view_N = self.epoch(epoch)
        teacher_size = None if self.teacher_size == config.view_size else self.teacher_size
        raw = raw_batch(self.split, config, index_N[start:stop], view_N[start:stop], last - first, teacher_size)
        return augment_batch(raw, config) if self.augmenting else raw

    def batches(
        self, start: int, stop: int, *, small: Size | None = None, small_steps: int = 0, pin_memory: bool = False
    ) -> Iterator[RawBatch]:
        """This process's share of steps start..stop-1, made ahead by the workers, each as in `batch`."""
        make = partial(self.batch, small=small, small_steps=small_steps)
        return prefetch(make, range(start, stop), self.workers, pin_memory=pin_memory)


@lru_cache(maxsize=4)
def epoch_rows(config: ViewConfig, seed: int, epoch: int, length: int) -> Rows:
    """The images of an epoch, pair by pair in shuffled order, and their views: exactly `length` of them. With `config.views`
    epochs repeat those views; the order differs each time."""
    repeats = config.repeated_aug
    group, part = divmod(epoch, repeats)
    if config.views is not None:
        group %= config.views // repeats
    pairs = mixup.pair_order(config.view_seed, group, length)
    pairs = pairs[part % len(pairs) :: repeats]
    shuffled = rng.permutation(seed, rng.Purpose.ORDER, epoch, len(pairs) * repeats)
    pair, view = np.divmod(shuffled, repeats)
    index_N, view_N = pairs[pair].ravel(), np.repeat(group * repeats + view, 2)
    single = np.zeros(len(index_N), bool)
    single[1::2] = index_N[1::2] == index_N[::2]  # the odd one out is paired with itself
    # Parts differ by a few images where `repeats` does not divide the pairs: all epochs are made equally long.
    return np.resize(index_N[~single], length), np.resize(view_N[~single], length)


def views_shown(steps: int, steps_per_epoch: int, config: ViewConfig) -> int:
    """How many views so many steps show: those of `config.views`, or one an epoch, in whole groups of repeated ones."""
    epochs = math.ceil(steps / steps_per_epoch)
    return config.views or math.ceil(epochs / config.repeated_aug) * config.repeated_aug


def cut(length: int, parts: int, number: int) -> tuple[int, int]:
    """Where part `number` of `length` rows starts and stops. Parts have nearly equal sizes and, if each can have two rows,
    start at even rows, so that no pair of an even number of images is cut."""
    bounds = [(number + end) * length // parts for end in (0, 1)]
    if length >= 2 * parts:
        bounds = [bound if bound == length else bound // 2 * 2 for bound in bounds]
    return bounds[0], bounds[1]


def raw_batch(
    split: Split,
    config: ViewConfig,
    index_B: Ints,
    view_B: Ints,
    global_size: int | None = None,
    teacher_size: Size | None = None,
) -> RawBatch:
    """First stage of the given views of the given images, with the mixing partners that are not among them. `global_size`:
    images of the step over all processes, if there are more. `teacher_size`: a second (height, width) to render them at."""
    partner_index_B = index_B.copy()
    if config.mixup_alpha > 0 or config.cutmix_alpha > 0:
        for view in np.unique(view_B).tolist():
            chosen = view_B == view
            partners = mixup.pairing(config.view_seed, view // config.repeated_aug, len(split))
            partner_index_B[chosen] = partners[index_B[chosen]]
    keys = list(zip(index_B.tolist(), view_B.tolist(), strict=True))
    row_of = {key: row for row, key in reversed(list(enumerate(keys)))}
    partner_B = np.empty(len(keys), np.int64)
    for row, key in enumerate(zip(partner_index_B.tolist(), view_B.tolist(), strict=True)):
        if key not in row_of:
            row_of[key] = len(keys)
            keys.append(key)
        partner_B[row] = row_of[key]
    index_M, view_M = np.array(keys, np.int64).reshape(-1, 2).T.copy()
    (pixels_MCHW, *others), weight_M = _crop(split, config, index_M, view_M, teacher_size)
    return RawBatch(
        pixels_MCHW=pixels_MCHW,
        teacher_MCHW=others[0] if others else None,
        labels_M=torch.from_numpy(split.labels_N[index_M]),
        index_M=torch.from_numpy(index_M),
        view_M=torch.from_numpy(view_M),
        weight_M=weight_M,
        partner_B=torch.from_numpy(partner_B),
        global_size=len(index_B) if global_size is None else global_size,
    )


def augment_batch(raw: RawBatch, config: ViewConfig) -> RawBatch:
    """The batch after the second stage of its views, but for mixing."""
    return _each_size(raw, lambda pixels: augment.augment(pixels, raw.index_M, raw.view_M, config))._replace(
        augmented=True
    )


def augment_and_mix(raw: RawBatch, config: ViewConfig, device: torch.device | str = "cpu") -> Batch:
    """Second stage of views on `device`: augmentation, unless a data-loading worker has done it, then mixing."""
    raw = _each_size(raw, lambda pixels: pixels.to(device, non_blocking=True))
    return mixup.mix(raw if raw.augmented else augment_batch(raw, config), config)


def _each_size(raw: RawBatch, change: Callable[[torch.Tensor], torch.Tensor]) -> RawBatch:
    """`raw` with the student's views changed, and the teacher's if it has its own."""
    teacher_MCHW = None if raw.teacher_MCHW is None else change(raw.teacher_MCHW)
    return raw._replace(pixels_MCHW=change(raw.pixels_MCHW), teacher_MCHW=teacher_MCHW)


def evaluation_batches(
    split: Split,
    preprocessing: Preprocessing,
    *,
    batch_size: int = EVALUATION_BATCH,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Iterator[ImageBatch]:
    """All images in order, each its `augment.evaluation_view` in [0, 1], not yet normalised; those of a batch have one size. `share`
    (r, n): part r of n of the batches alone."""
    make = partial(_evaluation_batch, split, preprocessing, batch_size)
    numbers = range(*cut(-(-len(split) // batch_size), share[1], share[0]))
    held = split.pixels_NHWC
    if held is not None and augment.keeps_size(held.shape[1:3], preprocessing):
        workers = 0  # they would only send the images
    for parts in prefetch(make, numbers, workers, batches=2):
        for pixels_BCHW, labels_B, weight_B in parts:
            yield to_unit_range(pixels_BCHW), labels_B, weight_B


def to_unit_range(pixels_BCHW: UInt8[torch.Tensor, "B C H W"]) -> Float[torch.Tensor, "B C H W"]:
    """Pixels in [0, 1]; on the CPU, because a GPU divides with other last bits."""
    return pixels_BCHW.float() / 255


def _evaluation_batch(split: Split, preprocessing: Preprocessing, batch_size: int, number: int) -> list[ImageBatch]:
    """Batch `number` of a split, its images in uint8: in parts where the size of images changes."""
    positions = range(number * batch_size, min((number + 1) * batch_size, len(split)))
    images, weights = zip(*(_read(split, position, preprocessing.image_size) for position in positions), strict=True)
    views = [augment.evaluation_view(image_HWC, preprocessing) for image_HWC in images]
    parts = [torch.from_numpy(part_BHWC).permute(0, 3, 1, 2) for part_BHWC in stack_by_shape(views)]
    sizes = [len(part) for part in parts]
    labels_B = torch.from_numpy(split.labels_N[positions.start : positions.stop])
    return list(zip(parts, torch.split(labels_B, sizes), torch.split(torch.tensor(weights), sizes), strict=True))


def stack_by_shape(images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Images in order, neighbours of one shape stacked."""
    return [np.stack(list(part)) for _, part in groupby(images, key=np.shape)]


def _crops_by_indexing(split: Split, config: ViewConfig) -> bool:
    pixels_NHWC = split.pixels_NHWC
    return pixels_NHWC is not None and config.crop in ("none", "pad") and pixels_NHWC.shape[1:3] == config.view_size


def _crop(
    split: Split, config: ViewConfig, index_M: Ints, view_M: Ints, teacher_size: Size | None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Cropped uint8 images (M, C, H, W) at one or two sizes, and their weights: 0 for those that cannot be read."""
    if split.pixels_NHWC is not None and teacher_size is None and _crops_by_indexing(split, config):
        pixels_MCHW = torch.from_numpy(split.pixels_NHWC[index_M]).permute(0, 3, 1, 2)
        if config.crop == "pad":
            pixels_MCHW = augment.padded_crop(pixels_MCHW, index_M, view_M, config)
        return [pixels_MCHW.contiguous()], torch.ones(len(index_M))
    assert config.view_size is not None
    each = [config] if teacher_size is None else [config, config.at(teacher_size)]
    images: list[list[torch.Tensor]] = [[] for _ in each]
    weights = []
    for index, drawn in zip(index_M.tolist(), augment.crop_draws(config, view_M, index_M), strict=True):
        image_HWC, weight = _read(split, index, config.view_size)  # decoded once for both
        weights.append(weight)
        for rendered, one in zip(images, each, strict=True):
            rendered.append(augment.crop_image(image_HWC, drawn, one))
    return [torch.stack(rendered) for rendered in images], torch.tensor(weights)


def _read(split: Split, position: int, blank: Size) -> tuple[NDArray[np.uint8], float]:
    """An image and its weight 1, or for one that cannot be read a black image of the size `blank` and 0."""
    try:
        return split.read(position), 1.0
    except UnreadableImage:
        return np.zeros((*blank, split.channels), np.uint8), 0.0


# What is in a data set: figures, and a sheet of images with their views.


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
        "left_out": dict(dataset.left_out),
        "remarks": dataset.remarks,
    }


def facts_rows(facts: dict[str, Any]) -> list[list[object]]:
    """`describe` as rows (class, training images, validation images)."""
    rows = [[name, counts["train"], counts["val"]] for name, counts in facts["classes"].items()]
    unlabelled = [["unlabelled", facts["unlabelled"], 0]] if facts["unlabelled"] else []
    return [*rows, *unlabelled, ["all", facts["images"]["train"], facts["images"]["val"]]]


def facts_lines(facts: dict[str, Any]) -> list[str]:
    """The rest of `describe` as lines of text."""
    test = "yes (not opened)" if facts["has_test"] else "none"
    if facts["set_aside"]:
        test = (
            f"{facts['set_aside']} images, a fifth of each class, held out because there is no test folder (not opened)"
        )
    lines = [f"test split: {test}"]
    spans = [f"{low}" if low == high else f"{low} to {high}" for low, high in facts["sizes"].values()]
    if spans:
        colour = "grey" if facts["channels"] == 1 else "colour"
        lines.append(f"images: {' x '.join(spans)} pixels (height x width), {colour}")
    if not facts["mirror_safe"]:
        lines.append("no horizontal flips: a mirror image means something else here")
    lines.append(f"unreadable: {len(facts['bad_images'])}")
    return [*lines, *(f"  {one_line(line)}" for line in facts["bad_images"]), *map(one_line, facts["remarks"])]


def _sizes(dataset: Dataset, split: Split) -> dict[str, list[int]]:
    """Smallest and largest height and width, of all images or of a sample spread over the split."""
    if dataset.image_size is not None:
        shapes = [dataset.image_size]
    else:
        sample = np.unique(np.linspace(0, len(split) - 1, SIZES_READ).astype(int)).tolist()
        shapes = [split.read(position).shape[:2] for position in sample if _readable(split, position)]
    if not shapes:
        return {}
    heights, widths = zip(*shapes, strict=True)
    return {"height": [min(heights), max(heights)], "width": [min(widths), max(widths)]}


def one_of_each_class(split: Split, most: int) -> list[int]:
    """Positions of up to `most` readable images: the first of every class, then the second, ..."""
    rank_N, _ = ranks(split.labels_N - NO_LABEL, np.arange(len(split)))
    in_turn = np.lexsort((split.labels_N, rank_N)).tolist()
    return list(islice((position for position in in_turn if _readable(split, position)), most))


def _readable(split: Split, position: int) -> bool:
    return _read(split, position, (1, 1))[1] > 0


def show_views(split: Split, config: ViewConfig, positions: Sequence[int], views: int) -> NDArray[np.uint8]:
    """Views 0..views-1 of some images: uint8 of shape (positions, views, H, W, C)."""
    index_B = np.repeat(np.asarray(positions, np.int64), views)
    batch = augment_and_mix(raw_batch(split, config, index_B, np.tile(np.arange(views), len(positions))), config)
    pixels = (batch.images_BCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels.reshape(len(positions), views, *pixels.shape[1:])


def save_view_sheet(dataset: Dataset, config: ViewConfig, views: int, path: Path) -> None:
    """A PNG with up to ten training images, a row each, and their views. `config` is resolved. Raises UserError."""
    from matplotlib.figure import Figure

    split = dataset.open_split("train")
    positions = one_of_each_class(split, 10)
    names = ["no label" if label < 0 else dataset.classes[label] for label in split.labels_N[positions].tolist()]
    sheet_HWC = view_sheet(split, config, positions, views)
    height, width = (max(1.0, side / DPI) for side in sheet_HWC.shape[:2])
    figure = Figure(figsize=(width + 2, height + 0.5), dpi=DPI)
    axes = figure.add_axes((2 / (width + 2), 0, width / (width + 2), height / (height + 0.5)))
    axes.imshow(sheet_HWC, interpolation="nearest", aspect="auto")
    axes.set_title("the image, then views of it", loc="left", fontsize=9)
    row = len(sheet_HWC) / len(names)
    axes.set_yticks(
        [(number + 0.5) * row for number in range(len(names))],
        [shortened(name, 24) for name in names],
        parse_math=False,
    )
    axes.set_xticks([])
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror or error}") from error


def view_sheet(split: Split, config: ViewConfig, positions: Sequence[int], views: int) -> UInt8[np.ndarray, "H W 3"]:
    """One row an image: the image itself, then its views 0..views-1; small ones magnified by a whole number. `config` is
    resolved."""
    from torchvision.utils import make_grid

    assert config.view_size is not None
    pixels = len(positions) * (views + 1) * config.view_size[0] * config.view_size[1]
    if pixels > MOST_PIXELS:
        raise UserError(f"a sheet of {pixels / 1e6:,.0f} million pixels is too large: show fewer or smaller views")
    cells = np.stack([augment.center_view(split.read(position), config.view_size) for position in positions])[:, None]
    if views:
        cells = np.concatenate([cells, show_views(split, config, positions, views)], axis=1)
    times = max(1, -(-CELL // max(config.view_size)))
    magnified = cells.reshape(-1, *cells.shape[2:]).repeat(times, 1).repeat(times, 2)
    pixels_NCHW = torch.from_numpy(magnified).permute(0, 3, 1, 2)
    sheet_HWC: NDArray[np.uint8] = make_grid(pixels_NCHW, views + 1, GAP, pad_value=255).permute(1, 2, 0).numpy()
    return sheet_HWC
