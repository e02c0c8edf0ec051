"""A view from an image and its draws: everything that happens to one image before two are mixed.

Stage one needs the original pixels: `crop_image` (training), `evaluation_view`, `padded_crop` (a batch of small
images held in memory). Stage two, `augment`, takes a batch of equal-sized uint8 images on any device through flip,
RandAugment, 3-Augment, colour jitter and erasing, in this order (as in timm's loader, which DeiT trains with, and in
DeiT III's). All draws are keyed by (view_seed, view, index), and no image's result depends on another's.

Draws are shares: of the image (crop), of the view (shifts, erased boxes, radii). So a student and its teacher may see one view,
each rendered at its own size from the original pixels. Only the noise inside an erased box is drawn pixel by pixel.

RandAugment (Cubuk et al. 2019, arXiv 1909.13719) has the set and the strengths of `rand-m9-mstd0.5-inc1`, the string in
DeiT's recipe (arXiv 2012.12877, table 9): 15 operations, drawn with replacement, each applied with probability 0.5 at a
magnitude from N(9, 0.5), clipped to 0..10; `OPERATIONS` has their strengths. Departures: the published code resamples with
bilinear or bicubic interpolation, at random, here it is always bilinear, and shifts are whole pixels, which are copied; it
can ask posterize for 0 bits, which leaves a black image or, in newer versions of Pillow, none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image

from deitkit import rng
from deitkit.config import Interpolation, Preprocessing, Size, ViewConfig
from deitkit.data.dataset import SMALL_IMAGE
from deitkit.randaugment import RandAugment, parse_randaugment
from deitkit.rng import Purpose
from deitkit.views import image_ops
from deitkit.views.image_ops import Pixels, Views, in_groups, look_up, to_device

Image_HWC = UInt8[np.ndarray, "H W C"]
Numbers = rng.Integers | torch.Tensor
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
FloatT = TypeVar("FloatT", float, Floats)
Box = tuple[int, int, int, int]
"""Left, top, width, height."""
LONGEST = 64
"""An image longer than so many times its view is cut to that length first."""

# Images in ImageNet's colours, by their channels; for grey images the figures are those of its luma, the channels taken as
# perfectly correlated: the fill behind a moved image, the mean and the standard deviation of erasing noise.
_FILL = {1: (117,), 3: (124, 116, 104)}
_NOISE_MEAN = {1: (0.459,), 3: (0.485, 0.456, 0.406)}
_NOISE_STD = {1: (0.226,), 3: (0.229, 0.224, 0.225)}

_ATTEMPTS = 10  # to place a box
_CROP_ASPECT = (3 / 4, 4 / 3)  # width / height of a random area
_CROP_INTERPOLATION: Interpolation = "bicubic"
_ERASE_AREA, _ERASE_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # share of the view; height / width
_SOLARIZE_FROM = 128.0
_BLUR_RADII, _BLUR_SIDE = (0.1, 2.0), 224  # pixels, of a view of so many
_ERASE_GRID = 1024  # boxes are placed on a grid with so many steps along the view's longer side
_WORDS_PER_OPERATION = 4


def crop_draws(config: ViewConfig, view_M: rng.Integers, index_M: rng.Integers) -> Floats:
    """What `crop_image` needs for each of M views: four uniform numbers for each attempt at a box (resize), two for a place
    (pad, simple), or nothing. Drawn for many at once, because a single draw costs a tenth of a crop."""
    count = {"resize": 4 * _ATTEMPTS, "pad": 2, "simple": 2}.get(config.crop or "", 0)
    drawn = rng.uniform(config.view_seed, Purpose.CROP, view_M, index_M, count)
    return drawn.reshape(-1, _ATTEMPTS, 4) if config.crop == "resize" else drawn


def crop_image(image_HWC: Image_HWC, drawn: Floats, config: ViewConfig) -> UInt8[torch.Tensor, "C view_H view_W"]:
    """Stage one for one grey or RGB image of any size: cropped as `config.crop` says, `config.view_size` large. `drawn` is
    the image's row of `crop_draws`."""
    if config.view_size is None or config.crop is None:
        raise ValueError("view_size and crop must be filled in before a view is made")
    if config.crop == "resize":
        left, top, width, height = crop_box(drawn, image_HWC.shape[:2], config)
        image_HWC = image_HWC[top : top + height, left : left + width]
    elif config.crop == "simple":  # DeiT III, section 3
        image_HWC = _covering(image_HWC, config.view_size, _CROP_INTERPOLATION)
    pixels_1CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]
    if config.crop != "simple" and tuple(pixels_1CHW.shape[2:]) != config.view_size:
        # torch's kernels for uint8 take a quarter of Pillow's time. Of 320 crops of photos at 224 pixels, values differed by
        # 0.035 of 255 on average and by at most 15.
        pixels_1CHW = image_ops.resample(pixels_1CHW, config.view_size, _CROP_INTERPOLATION)
    if config.crop in ("pad", "simple"):
        pixels_1CHW = _padded_window(pixels_1CHW, drawn[None], config.view_size, config)
    return pixels_1CHW[0]


def padded_crop(pixels_MCHW: Pixels, index_M: Ints, view_M: Ints, config: ViewConfig) -> Pixels:
    """Each image padded by reflection and cut at a random place: for images that already have the view's size."""
    height, width = pixels_MCHW.shape[2:]
    return _padded_window(pixels_MCHW, crop_draws(config, view_M, index_M), (height, width), config)


def crop_box(attempts: Floats, size: tuple[int, ...], config: ViewConfig) -> Box:
    """A random area of an image of `size` (height, width), as torchvision's and timm's random resized crop (Szegedy et al.
    2014): the first of ten `attempts` that fits inside the image, else the largest centred box of an allowed aspect ratio."""
    height, width = size
    box = _first_fit(attempts, width, height, config.crop_area, _CROP_ASPECT)
    if box is None:
        box_width = min(max(1, round(height * _CROP_ASPECT[1])), width)
        box_height = min(max(1, round(width / _CROP_ASPECT[0])), height)
        box = (width - box_width) // 2, (height - box_height) // 2, box_width, box_height
    return box


def center_view(
    image_HWC: Image_HWC, size: Size, crop_pct: float = 1.0, interpolation: Interpolation = "bicubic"
) -> NDArray[np.uint8]:
    """An evaluation view: the image resized until size / crop_pct just fits inside it, its centre cut out.

    For square sizes the same pixels as torchvision's Resize and CenterCrop."""
    frame_height, frame_width = (math.floor(side / crop_pct) for side in size)
    resized = _covering(image_HWC, (frame_height, frame_width), interpolation)
    top, left = (round((whole - part) / 2) for whole, part in zip(resized.shape[:2], size, strict=True))
    return resized[top : top + size[0], left : left + size[1]]


def evaluation_view(image_HWC: Image_HWC, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """What a network is given of an image in evaluation and prediction: `center_view`; but an image of at most `SMALL_IMAGE`
    pixels a side that is not to be cropped keeps its size: the network resizes it, as it does in training."""
    if keeps_size(image_HWC.shape[:2], preprocessing):
        return image_HWC
    return center_view(image_HWC, preprocessing.image_size, preprocessing.crop_pct, preprocessing.interpolation)


def keeps_size(size: tuple[int, ...], preprocessing: Preprocessing) -> bool:
    """Whether an image of this (height, width) is small and all of it is seen: no central crop, the network's aspect ratio."""
    height, width = preprocessing.image_size
    return max(size) <= SMALL_IMAGE and preprocessing.crop_pct == 1 and size[0] * width == size[1] * height


def augment(pixels_MCHW: Pixels, index_M: Numbers, view_M: Numbers, config: ViewConfig) -> Pixels:
    """Stage two of the views (index, view): flip, RandAugment, 3-Augment, colour jitter, erasing. The input is left as it is.

    Draws are made on the host: `index_M` and `view_M` are arrays or CPU tensors."""
    if pixels_MCHW.shape[1] not in (1, 3):
        raise ValueError(f"images must be grey or RGB, these have {pixels_MCHW.shape[1]} channels")
    view, index = np.asarray(view_M, np.int64), np.asarray(index_M, np.int64)
    pixels_MCHW = _flip(pixels_MCHW, view, index, config)
    if config.randaugment is not None:
        drawn = draws(parse_randaugment(config.randaugment), config.view_seed, view, index)
        pixels_MCHW = randaugment(pixels_MCHW, drawn)
    if config.three_augment:
        pixels_MCHW = _three_augment(pixels_MCHW, view, index, config)
    if config.colour_jitter:
        pixels_MCHW = _jitter(pixels_MCHW, view, index, config)
    if config.random_erasing_prob:
        pixels_MCHW = _erase(pixels_MCHW, view, index, config)
    return pixels_MCHW


# Stage one.


def _padded_window(pixels_MCHW: Pixels, drawn_M2: Floats, size: Size, config: ViewConfig) -> Views:
    """A window of `size` at a random place (`drawn_M2`: down, right) of each image padded by reflection."""
    if config.crop_padding is None:
        raise ValueError("crop_padding must be filled in before a view is made")
    padding = round(config.crop_padding * min(size))
    room = np.array(pixels_MCHW.shape[2:]) - size + 2 * padding
    return image_ops.window(pixels_MCHW, (drawn_M2 * (room + 1)).astype(np.int64) - padding, size)


def _first_fit(
    attempts: Floats, width: int, height: int, areas: tuple[float, float], aspects: tuple[float, float], margin: int = 0
) -> Box | None:
    """The first box that fits, smaller than the image by at least `margin`: each attempt draws the share of the image's area,
    log-uniform width / height, and the place (left, top). One by one: an array's functions may round otherwise."""
    lowest, highest = math.log(aspects[0]), math.log(aspects[1])
    for share, aspect, across, down in attempts.tolist():
        area = height * width * _between(share, areas)
        ratio = math.exp(_between(aspect, (lowest, highest)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width - margin and 0 < box_height <= height - margin:
            left, top = math.floor(across * (width - box_width + 1)), math.floor(down * (height - box_height + 1))
            return left, top, box_width, box_height
    return None


def _covering(image_HWC: Image_HWC, frame: Size, interpolation: Interpolation) -> NDArray[np.uint8]:
    """The image resized until `frame` (height, width) just fits inside it. One that is many times as long as the frame loses
    its far ends first: scaled up with its centre they would take any amount of memory."""
    frame_height, frame_width = frame
    height, width, channels = image_HWC.shape
    kept_height = min(height, max(1, LONGEST * width * frame_height // frame_width))
    kept_width = min(width, max(1, LONGEST * height * frame_width // frame_height))
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    kept_HWC = image_HWC[top : top + kept_height, left : left + kept_width]
    if frame_height * kept_width >= frame_width * kept_height:
        scaled = max(frame_width, kept_width * frame_height // kept_height), frame_height
    else:
        scaled = frame_width, max(frame_height, kept_height * frame_width // kept_width)
    resized = image_ops.to_pillow(kept_HWC).resize(scaled, Image.Resampling[interpolation.upper()])
    return np.array(resized).reshape(scaled[1], scaled[0], channels)  # a copy, for torch wants to be able to write


# RandAugment.


Work = Callable[[Pixels, "list[Operation]", Floats], Pixels]


class Operation(NamedTuple):
    """One of RandAugment's operations."""

    strength: Callable[[Floats, Floats], Floats]
    """from level = magnitude / 10 and a random sign"""
    work: Work
    """images after their operations of this kind, at their strengths"""
    detail: Any = None
    """what `work` takes of this one operation"""


class Draws(NamedTuple):
    """What RandAugment does to M images, several operations in turn: arrays of shape (M, operations)."""

    operation: Ints  # place in OPERATIONS, -1 for none
    magnitude: Floats  # 0..10
    sign: Floats  # -1 or 1


def draws(strength: RandAugment, view_seed: int, view_M: Ints, index_M: Ints) -> Draws:
    """The operations of each view. One more operation leaves those before it as they were."""
    uniform = rng.uniform(view_seed, Purpose.RANDAUGMENT, view_M, index_M, strength.n * _WORDS_PER_OPERATION)
    choice, applied, magnitude, sign = np.moveaxis(uniform.reshape(-1, strength.n, _WORDS_PER_OPERATION), 2, 0)
    return Draws(
        np.where(applied < strength.p, (choice * len(OPERATIONS)).astype(np.int64), -1),
        np.clip(strength.m + strength.mstd * rng.normal_from_uniform(magnitude), 0, 10),
        np.where(sign < 0.5, -1.0, 1.0),
    )


def randaugment(pixels_MCHW: Pixels, drawn: Draws) -> Pixels:
    """The images after their operations, one after another."""
    for operation_M, magnitude_M, sign_M in zip(*(part.T for part in drawn), strict=True):
        strength_M = np.zeros(len(operation_M))
        for number, operation in enumerate(OPERATIONS.values()):
            rows = operation_M == number
            strength_M[rows] = operation.strength(magnitude_M[rows] / 10, sign_M[rows])
        pixels_MCHW = apply(pixels_MCHW, operation_M, strength_M)
    return pixels_MCHW


def apply(pixels_MCHW: Pixels, operation_M: Ints, strength_M: Floats) -> Pixels:
    """One operation per image (its place in OPERATIONS, -1 for none), images whose operations work alike together."""
    operations = list(OPERATIONS.values())
    groups: list[image_ops.Group] = [(operation_M < 0, lambda chosen, _: chosen)]
    for work in dict.fromkeys(operation.work for operation in operations):
        alike = [number for number, operation in enumerate(operations) if operation.work is work]

        def together(chosen: Pixels, rows: NDArray[np.intp], work: Work = work) -> Pixels:
            return work(chosen, [operations[number] for number in operation_M[rows]], strength_M[rows])

        groups.append((np.isin(operation_M, alike), together))
    return in_groups(pixels_MCHW, groups)


def _change_values(pixels_mCHW: Pixels, operations: list[Operation], strength_m: Floats) -> Pixels:
    def tables(chosen: Pixels, rows: NDArray[np.intp]) -> torch.Tensor:
        table: torch.Tensor = operations[rows[0]].detail(
            chosen, to_device(strength_m[rows].astype(np.float32), chosen.device)
        )
        return table.expand(len(rows), chosen.shape[1], 256)

    masks = [np.array([other is operation for other in operations]) for operation in dict.fromkeys(operations)]
    return look_up(pixels_mCHW, in_groups(pixels_mCHW, [(mask_m, tables) for mask_m in masks]))


def _move(pixels_mCHW: Pixels, operations: list[Operation], strength_m: Floats) -> Pixels:
    channels, height, width = pixels_mCHW.shape[1:]
    pairs = zip(operations, strength_m.tolist(), strict=True)
    matrix_m6 = np.array([operation.detail(amount, width, height) for operation, amount in pairs])
    return image_ops.affine(pixels_mCHW, to_device(matrix_m6, pixels_mCHW.device), _FILL[channels])


def _shift(pixels_mCHW: Pixels, operations: list[Operation], strength_m: Floats) -> Pixels:
    channels, *size = pixels_mCHW.shape[1:]
    direction_m2 = np.array([operation.detail for operation in operations])
    offsets_m2 = np.round(direction_m2 * (strength_m[:, None] * size)).astype(np.int64)
    return image_ops.translate(pixels_mCHW, offsets_m2, _FILL[channels])


def _enhance(
    change: Callable[[Pixels, torch.Tensor], Pixels], pixels_mCHW: Pixels, _: list[Operation], strength_m: Floats
) -> Pixels:
    return change(pixels_mCHW, to_device(strength_m.astype(np.float32), pixels_mCHW.device))


def _none(level: Floats, sign: Floats) -> Floats:
    return np.zeros_like(level)


def _factor(level: Floats, sign: Floats) -> Floats:
    return np.clip(1 + sign * 0.9 * level, 0.1, None)


def _signed(most: float) -> Callable[[Floats, Floats], Floats]:
    return lambda level, sign: sign * most * level


OPERATIONS = {
    "autocontrast": Operation(_none, _change_values, lambda pixels, _: image_ops.autocontrast_table(pixels)),
    "equalize": Operation(_none, _change_values, lambda pixels, _: image_ops.equalize_table(pixels)),
    "invert": Operation(_none, _change_values, lambda pixels, _: image_ops.invert_table(pixels)),
    "rotate": Operation(_signed(30), _move, image_ops.rotation),  # degrees
    "posterize": Operation(  # bits kept
        lambda level, _: np.clip(4 - np.floor(4 * level), 1, 4), _change_values, image_ops.posterize_table
    ),
    # The value from which upwards all are inverted; what is added to values below 128.
    "solarize": Operation(lambda level, _: 256 - np.floor(256 * level), _change_values, image_ops.solarize_table),
    "solarize_add": Operation(lambda level, _: np.floor(110 * level), _change_values, image_ops.solarize_add_table),
    "colour": Operation(_factor, functools.partial(_enhance, image_ops.colour)),
    "contrast": Operation(_factor, _change_values, image_ops.contrast_table),
    "brightness": Operation(_factor, _change_values, image_ops.brightness_table),
    "sharpness": Operation(_factor, functools.partial(_enhance, image_ops.sharpness)),
    # Pixels per pixel.
    "shear_x": Operation(_signed(0.3), _move, lambda slope, width, height: image_ops.shear(slope, 0.0)),
    "shear_y": Operation(_signed(0.3), _move, lambda slope, width, height: image_ops.shear(0.0, slope)),
    # Share of the side, in whole pixels; the direction is (down, right).
    "translate_x": Operation(_signed(0.45), _shift, (0, 1)),
    "translate_y": Operation(_signed(0.45), _shift, (1, 0)),
}
"""By name, in the order of their drawn numbers: part of the format of recorded views."""


# The rest of stage two.


def erase_boxes(config: ViewConfig, view_M: Ints, index_M: Ints, size: Size) -> Ints:
    """The rectangles that erasing fills (Zhong et al. 2017): (left, top, width, height), shape (M, 4), all 0 where nothing is
    erased. Ten attempts to fit strictly inside the image, as timm has it; on a grid, so that every size erases the same part."""
    step = max(size) / _ERASE_GRID
    height, width = (round(side / step) for side in size)
    drawn = rng.uniform(config.view_seed, Purpose.ERASE, view_M, index_M, 4 + 4 * _ATTEMPTS)
    boxes_M4 = np.zeros((len(drawn), 4), np.int64)
    for row in np.flatnonzero(drawn[:, 0] < config.random_erasing_prob):
        # Transposed, because the aspect is height / width here.
        attempts = drawn[row, 4:].reshape(_ATTEMPTS, 4)[:, [0, 1, 3, 2]]
        box = _first_fit(attempts, height, width, _ERASE_AREA, _ERASE_ASPECT, margin=1)
        if box is not None:
            left, top, box_width, box_height = np.array(box)[[1, 0, 3, 2]].tolist()
            edges = [round(edge * step) for edge in (left, top, left + box_width, top + box_height)]
            boxes_M4[row] = edges[0], edges[1], edges[2] - edges[0], edges[3] - edges[1]
    boxes_M4[(boxes_M4[:, 2:] == 0).any(1)] = 0
    return boxes_M4


def _flip(pixels_MCHW: Pixels, view_M: Ints, index_M: Ints, config: ViewConfig) -> Pixels:
    probability = 0.5 if config.flip_prob is None else config.flip_prob
    flipped_M = rng.uniform(config.view_seed, Purpose.FLIP, view_M, index_M, 1)[:, 0] < probability
    return in_groups(
        pixels_MCHW, [(~flipped_M, lambda chosen, _: chosen), (flipped_M, lambda chosen, _: chosen.flip(-1))]
    )


def _three_augment(pixels_MCHW: Pixels, view_M: Ints, index_M: Ints, config: ViewConfig) -> Pixels:
    """3-Augment (DeiT III, section 3): each image is made grey, solarised or blurred, with equal chances. The radius of the
    blur is uniform from 0.1 to 2 pixels of an image of 224, as in the published code, and in proportion at other sizes."""
    choice, radius = rng.uniform(config.view_seed, Purpose.THREE_AUGMENT, view_M, index_M, 2).T
    kind_M = (choice * 3).astype(np.int64)
    scale = min(pixels_MCHW.shape[2:]) / _BLUR_SIDE

    def solarise(chosen: Pixels, _: NDArray[np.intp]) -> Pixels:
        threshold_m = torch.full((len(chosen),), _SOLARIZE_FROM, device=chosen.device)
        return look_up(chosen, image_ops.solarize_table(chosen, threshold_m))

    groups: list[image_ops.Group] = [
        (kind_M == 0, lambda chosen, _: image_ops.grey(chosen)),
        (kind_M == 1, solarise),
        (kind_M == 2, lambda chosen, rows: image_ops.blur(chosen, scale * _between(radius[rows], _BLUR_RADII))),
    ]
    return in_groups(pixels_MCHW, groups)


def _jitter(pixels_MCHW: Pixels, view_M: Ints, index_M: Ints, config: ViewConfig) -> Pixels:
    """Brightness, contrast, saturation, always in this order (torchvision shuffles them)."""
    drawn = rng.uniform(config.view_seed, Purpose.COLOUR_JITTER, view_M, index_M, 3)
    factors = 1 + config.colour_jitter * (2 * drawn - 1)
    brightness, contrast, saturation = to_device(factors.T.astype(np.float32), pixels_MCHW.device)
    pixels_MCHW = look_up(pixels_MCHW, image_ops.brightness_table(pixels_MCHW, brightness))
    pixels_MCHW = look_up(pixels_MCHW, image_ops.contrast_table(pixels_MCHW, contrast))
    return image_ops.colour(pixels_MCHW, saturation)


def _erase(pixels_MCHW: Pixels, view_M: Ints, index_M: Ints, config: ViewConfig) -> Pixels:
    """Rectangles of noise. The published code adds its noise after normalisation, where it can leave the range of
    an image; here views are images, so the same noise is clipped and rounded to uint8."""
    channels, height, width = pixels_MCHW.shape[1:]
    boxes_M4 = erase_boxes(config, view_M, index_M, (height, width))
    rows = np.flatnonzero(boxes_M4[:, 2])
    if not rows.size:
        return pixels_MCHW
    # Every erased pixel once, as P pairs (image, position), made where the images are.
    device = pixels_MCHW.device
    area_R = boxes_M4[rows, 2] * boxes_M4[rows, 3]
    parameters = np.stack([rows, index_M[rows], view_M[rows], np.cumsum(area_R) - area_R, *boxes_M4[rows].T[:3]])
    total = int(area_R.sum())
    per_pixel = to_device(parameters, device).repeat_interleave(to_device(area_R, device), dim=1, output_size=total)
    row_P, index_P, view_P, start_P, left_P, top_P, width_P = per_pixel
    within_P = torch.arange(total, device=device) - start_P
    position_P = (top_P + within_P // width_P) * width + left_P + within_P % width_P
    words_P4 = rng.noise_words(config.view_seed, Purpose.ERASE_NOISE, view_P, index_P, position_P)
    flat = pixels_MCHW.clone().flatten()
    for channel, table in enumerate(_noise_tables(channels, device)):
        place_P = (row_P * channels + channel) * (height * width) + position_P
        flat.index_copy_(0, place_P, table[words_P4[:, channel] >> 16])
    return flat.view(pixels_MCHW.shape)


@functools.cache
def _noise_tables(channels: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Per channel, 65,536 quantiles of the erasing noise as uint8: a gather gives the same bits on every device."""
    normal = rng.normal_from_uniform((np.arange(65536) + 0.5) / 65536)
    levels = [
        np.clip(np.round(255 * (mean + std * normal)), 0, 255).astype(np.uint8)
        for mean, std in zip(_NOISE_MEAN[channels], _NOISE_STD[channels], strict=True)
    ]
    return tuple(torch.from_numpy(level).to(device) for level in levels)


def _between(uniform: FloatT, limits: tuple[float, float]) -> FloatT:
    return limits[0] + (limits[1] - limits[0]) * uniform
