"""RandAugment as DeiT uses it: a few random operations per image (Cubuk et al. 2019, arXiv 1909.13719).

The set and the strengths are those of `rand-m9-mstd0.5-inc1`, the string in DeiT's recipe (arXiv 2012.12877, table 9):
15 operations, drawn with replacement, each applied with probability 0.5 at a magnitude from N(9, 0.5), clipped to
0..10. With level = magnitude / 10 and a random sign, both drawn per image and operation:

    operation                                    strength
    autocontrast, equalize, invert               none
    rotate                                       ±30° · level
    posterize                                    4 − ⌊4 · level⌋ bits kept, at least 1
    solarize                                     from the value 256 − ⌊256 · level⌋ upwards
    solarize_add                                 ⌊110 · level⌋ added below 128
    colour, contrast, brightness, sharpness      factor 1 ± 0.9 · level, at least 0.1
    shear_x, shear_y                             ±0.3 · level pixels per pixel
    translate_x, translate_y                     ±0.45 · level of the side, in whole pixels

Departures: the published code resamples with bilinear or bicubic interpolation, at random, here it is always bilinear,
and shifts are whole pixels, which are copied; it can ask posterize for 0 bits, which leaves a black image or, in newer
versions of Pillow, none.

A view from an image and its draws: everything that happens to one image, before any two are mixed.

Stage one is where the pixels of the original are: `crop_image` for photos, `padded_crop` for small images held in
memory, `center_view` for evaluation. Stage two, `augment`, takes a batch of equal-sized uint8 images on any device
through flip, RandAugment, 3-Augment, colour jitter and erasing, in this order (as in timm's loader, which DeiT trains
with, and in DeiT III's).
All draws are keyed by (view_seed, view, index), and no image's result depends on another's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray
from PIL import Image

from deitkit import rng
from deitkit.config import Interpolation, Size, ViewConfig
from deitkit.views import image_ops
from deitkit.views.image_ops import Pixels, resample, to_device

FILL = {1: (117,), 3: (124, 116, 104)}
"""Behind a moved image: the mean colour of ImageNet, and its luma for grey images."""

_WORDS_PER_OPERATION = 4


class Operation(Enum):
    """The operations, in the order of their drawn numbers: part of the format of recorded views."""

    AUTOCONTRAST = 0
    EQUALIZE = 1
    INVERT = 2
    ROTATE = 3
    POSTERIZE = 4
    SOLARIZE = 5
    SOLARIZE_ADD = 6
    COLOUR = 7
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    SHEAR_X = 11
    SHEAR_Y = 12
    TRANSLATE_X = 13
    TRANSLATE_Y = 14


class Draws(NamedTuple):
    """What RandAugment does to M images: N operations in turn, arrays of shape (M, N)."""

    operation: NDArray[np.int64]  # an Operation's number, -1 for none
    magnitude: NDArray[np.float64]  # 0..10
    sign: NDArray[np.float64]  # -1 or 1


def draws(recipe: ViewConfig, view_M: NDArray[np.int64], index_M: NDArray[np.int64]) -> Draws:
    """The operations of each view. One more operation in the recipe leaves those before it as they were."""
    count = recipe.randaugment_operations
    uniform = rng.uniform(recipe.view_seed, rng.Purpose.RANDAUGMENT, view_M, index_M, count * _WORDS_PER_OPERATION)
    choice, applied, magnitude, sign = np.moveaxis(uniform.reshape(-1, count, _WORDS_PER_OPERATION), 2, 0)
    spread = recipe.randaugment_magnitude_sd * rng.normal_from_uniform(magnitude)
    return Draws(
        np.where(applied < recipe.randaugment_prob, (choice * len(Operation)).astype(np.int64), -1),
        np.clip(recipe.randaugment_magnitude + spread, 0, 10),
        np.where(sign < 0.5, -1.0, 1.0),
    )


def strength(operation: Operation, magnitude: NDArray[np.float64], sign: NDArray[np.float64]) -> NDArray[np.float64]:
    """Magnitudes 0..10 and signs as what the operation takes: see the table above. 0 where it takes nothing."""
    level = magnitude / 10
    match operation:
        case Operation.ROTATE:
            amount = sign * 30 * level
        case Operation.POSTERIZE:
            amount = np.clip(4 - np.floor(4 * level), 1, 4)
        case Operation.SOLARIZE:
            amount = 256 - np.floor(256 * level)
        case Operation.SOLARIZE_ADD:
            amount = np.floor(110 * level)
        case Operation.COLOUR | Operation.CONTRAST | Operation.BRIGHTNESS | Operation.SHARPNESS:
            amount = np.clip(1 + sign * 0.9 * level, 0.1, None)
        case Operation.SHEAR_X | Operation.SHEAR_Y:
            amount = sign * 0.3 * level
        case Operation.TRANSLATE_X | Operation.TRANSLATE_Y:
            amount = sign * 0.45 * level
        case _:
            amount = np.zeros_like(level)
    return np.asarray(amount, np.float64)


def apply(pixels_MCHW: Pixels, operation_M: NDArray[np.int64], strength_M: NDArray[np.float64]) -> Pixels:
    """One operation per image (an Operation's number, -1 for none), images with a like operation together."""
    kind_M = np.array([_KIND[number] for number in operation_M.tolist()])
    untouched = np.flatnonzero(kind_M == -1)
    parts, places = [pixels_MCHW.index_select(0, to_device(untouched, pixels_MCHW.device))], [untouched]
    together = image_ops.images_at_a_time(pixels_MCHW)
    for kind, function in enumerate((_change_values, _move, _colour, _sharpen, _shift)):
        rows_of_kind = np.flatnonzero(kind_M == kind)
        for start in range(0, len(rows_of_kind), together):
            rows = rows_of_kind[start : start + together]
            chosen = pixels_MCHW.index_select(0, to_device(rows, pixels_MCHW.device))
            parts.append(function(chosen, operation_M[rows], strength_M[rows]))
            places.append(rows)
    return image_ops.in_order(parts, places)


def randaugment(
    pixels_MCHW: Pixels, view_M: NDArray[np.int64], index_M: NDArray[np.int64], recipe: ViewConfig
) -> Pixels:
    """The images after `recipe.randaugment_operations` random operations each."""
    drawn = draws(recipe, view_M, index_M)
    for operation_M, magnitude_M, sign_M in zip(*(part.T for part in drawn), strict=True):
        strength_M = np.zeros(len(operation_M))
        for operation in Operation:
            rows = operation_M == operation.value
            strength_M[rows] = strength(operation, magnitude_M[rows], sign_M[rows])
        pixels_MCHW = apply(pixels_MCHW, operation_M, strength_M)
    return pixels_MCHW


def _change_values(pixels_mCHW: Pixels, operation_m: NDArray[np.int64], strength_m: NDArray[np.float64]) -> Pixels:
    parts, places = [], []
    for number in np.unique(operation_m).tolist():
        rows = np.flatnonzero(operation_m == number)
        chosen = pixels_mCHW.index_select(0, to_device(rows, pixels_mCHW.device))
        table = _TABLES[Operation(number)](chosen, to_device(strength_m[rows], pixels_mCHW.device))
        parts.append(table.expand(len(rows), pixels_mCHW.shape[1], 256))
        places.append(rows)
    return image_ops.look_up(pixels_mCHW, image_ops.in_order(parts, places))


def _move(pixels_mCHW: Pixels, operation_m: NDArray[np.int64], strength_m: NDArray[np.float64]) -> Pixels:
    channels, height, width = pixels_mCHW.shape[1:]
    pairs = zip(operation_m.tolist(), strength_m.tolist(), strict=True)
    matrix_m6 = np.array([_MOVES[Operation(number)](amount, width, height) for number, amount in pairs])
    return image_ops.affine(pixels_mCHW, to_device(matrix_m6, pixels_mCHW.device), FILL[channels])


def _shift(pixels_mCHW: Pixels, operation_m: NDArray[np.int64], strength_m: NDArray[np.float64]) -> Pixels:
    channels, height, width = pixels_mCHW.shape[1:]
    across_m = operation_m == Operation.TRANSLATE_X.value
    down_right_m2 = np.stack(
        [np.where(across_m, 0, strength_m * height), np.where(across_m, strength_m * width, 0)], axis=1
    )
    return image_ops.translate(pixels_mCHW, np.round(down_right_m2).astype(np.int64), FILL[channels])


def _colour(pixels_mCHW: Pixels, _: NDArray[np.int64], strength_m: NDArray[np.float64]) -> Pixels:
    return image_ops.colour(pixels_mCHW, to_device(strength_m.astype(np.float32), pixels_mCHW.device))


def _sharpen(pixels_mCHW: Pixels, _: NDArray[np.int64], strength_m: NDArray[np.float64]) -> Pixels:
    return image_ops.sharpness(pixels_mCHW, to_device(strength_m.astype(np.float32), pixels_mCHW.device))


_TABLES: dict[Operation, Callable[[Pixels, torch.Tensor], image_ops.Table]] = {
    Operation.AUTOCONTRAST: lambda pixels, _: image_ops.autocontrast_table(pixels),
    Operation.EQUALIZE: lambda pixels, _: image_ops.equalize_table(pixels),
    Operation.INVERT: lambda pixels, _: image_ops.invert_table(pixels),
    Operation.POSTERIZE: lambda pixels, bits: image_ops.posterize_table(pixels, bits.long()),
    Operation.SOLARIZE: lambda pixels, threshold: image_ops.solarize_table(pixels, threshold.long()),
    Operation.SOLARIZE_ADD: lambda pixels, add: image_ops.solarize_add_table(pixels, add.long()),
    Operation.CONTRAST: lambda pixels, factor: image_ops.contrast_table(pixels, factor.float()),
    Operation.BRIGHTNESS: lambda pixels, factor: image_ops.brightness_table(pixels, factor.float()),
}

_MOVES: dict[Operation, Callable[[float, int, int], image_ops.Matrix]] = {
    Operation.ROTATE: image_ops.rotation,
    Operation.SHEAR_X: lambda slope, width, height: image_ops.shear(slope, 0.0),
    Operation.SHEAR_Y: lambda slope, width, height: image_ops.shear(0.0, slope),
}

# Which of the five kinds of work each operation is, in the order in which `apply` goes through them.
_KIND = {
    -1: -1,
    **{operation.value: 0 for operation in _TABLES},
    **{operation.value: 1 for operation in _MOVES},
    Operation.COLOUR.value: 2,
    Operation.SHARPNESS.value: 3,
    Operation.TRANSLATE_X.value: 4,
    Operation.TRANSLATE_Y.value: 4,
}


Image_HWC = UInt8[np.ndarray, "H W C"]
Numbers = rng.Integers | torch.Tensor
Box = tuple[int, int, int, int]
"""Left, top, width, height."""

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
LONGEST = 64
"""An evaluation view, or a simple crop, is made of at most so many frames' lengths of an image."""
FloatT = TypeVar("FloatT", float, NDArray[np.float64])
_ATTEMPTS = 10
_ERASE_ASPECT = (0.3, 1 / 0.3)
_SOLARIZE_FROM = 128
_BLUR_RADII = (0.1, 2.0)
# ImageNet's mean and standard deviation; for grey images those of its luma, channels taken as perfectly correlated.
_NOISE_MEAN = {1: (0.459,), 3: (0.485, 0.456, 0.406)}
_NOISE_STD = {1: (0.226,), 3: (0.229, 0.224, 0.225)}


def crop_image(
    image_HWC: Image_HWC, drawn: NDArray[np.generic], recipe: ViewConfig
) -> UInt8[torch.Tensor, "C view_H view_W"]:
    """Stage one for one grey or RGB image of any size: cropped by the recipe, `recipe.view_size` large. `drawn` is the
    image's row of `crop_draws`."""
    if recipe.view_size is None or recipe.crop is None:
        raise ValueError("view_size and crop must be filled in before a view is made")
    if recipe.crop == "simple":
        return simple_crop(image_HWC, np.asarray(drawn, np.float64), recipe)
    if recipe.crop == "resize":
        left, top, width, height = crop_box(np.asarray(drawn, np.float64), image_HWC.shape[:2], recipe)
        image_HWC = image_HWC[top : top + height, left : left + width]
    pixels_1CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]
    if tuple(pixels_1CHW.shape[2:]) != recipe.view_size:
        # torch's kernels for uint8 take a quarter of Pillow's time. Of 320 crops of photos at 224 pixels, values differed by
        # 0.035 of 255 on average and by at most 15.
        pixels_1CHW = resample(pixels_1CHW, recipe.view_size, recipe.interpolation)
    if recipe.crop == "pad":
        pixels_1CHW = shifted(pixels_1CHW, np.asarray(drawn, np.int64)[None])
    return pixels_1CHW[0]


def crop_draws(recipe: ViewConfig, view_M: Numbers, index_M: Numbers) -> NDArray[np.generic]:
    """What `crop_image` wants to know of each of M views: four uniform numbers for each attempt at a box (resize), how far
    to shift (pad), a place (simple), or nothing. Drawn for many at once, for a draw alone costs a tenth of a crop."""
    match recipe.crop:
        case "resize":
            return np.moveaxis(_attempts(recipe, rng.Purpose.CROP, view_M, index_M, first_word=0), 0, 2)
        case "pad":
            return crop_offsets(recipe, view_M, index_M)
        case "simple":
            return rng.uniform(recipe.view_seed, rng.Purpose.CROP, _host(view_M), _host(index_M), 2)
        case _:
            return np.empty((len(_host(index_M)), 0))


def crop_box(attempts_A4: NDArray[np.float64], size: tuple[int, ...], recipe: ViewConfig) -> Box:
    """A random area of an image of `size` (height, width): (left, top, width, height).

    As torchvision's and timm's random resized crop (Szegedy et al. 2014): a share of the area and a log-uniform aspect
    ratio, ten attempts to fit inside the image, else the largest centred box of an allowed aspect ratio."""
    height, width = size
    low, high = recipe.crop_aspect
    for share, aspect, across, down in attempts_A4.tolist():
        area = height * width * _between(share, recipe.crop_area)
        ratio = math.exp(_between(aspect, (math.log(low), math.log(high))))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = math.floor(across * (width - box_width + 1))
            top = math.floor(down * (height - box_height + 1))
            return left, top, box_width, box_height
    box_width = min(max(1, round(height * high)), width)
    box_height = min(max(1, round(width / low)), height)
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def center_view(
    image_HWC: Image_HWC, size: Size, crop_pct: float = 1.0, interpolation: Interpolation = "bicubic"
) -> NDArray[np.uint8]:
    """An evaluation view: the image resized until size / crop_pct just fits inside it, its centre cut out.

    For square sizes the same pixels as torchvision's Resize and CenterCrop."""
    frame_height, frame_width = (math.floor(side / crop_pct) for side in size)
    resized = _covering(image_HWC, (frame_height, frame_width), interpolation)
    top, left = (round((whole - part) / 2) for whole, part in zip(resized.shape[:2], size, strict=True))
    return resized[top : top + size[0], left : left + size[1]]


def simple_crop(
    image_HWC: Image_HWC, drawn: NDArray[np.float64], recipe: ViewConfig
) -> UInt8[torch.Tensor, "C view_H view_W"]:
    """DeiT III's simple random crop (section 3): the image resized until the view just fits inside it, padded by reflection,
    the view cut out at a random place (`drawn`: two uniform numbers)."""
    if recipe.view_size is None or recipe.crop_padding is None:
        raise ValueError("view_size and crop_padding must be filled in before a view is made")
    covering = _covering(image_HWC, recipe.view_size, recipe.interpolation)
    down, right = (
        torch.arange(part) + int(place * (whole + 2 * recipe.crop_padding - part + 1)) - recipe.crop_padding
        for place, whole, part in zip(drawn, covering.shape[:2], recipe.view_size, strict=True)
    )
    rows, columns = _reflected(down[None], covering.shape[0])[0], _reflected(right[None], covering.shape[1])[0]
    return torch.from_numpy(covering[rows[:, None].numpy(), columns.numpy()]).permute(2, 0, 1)


def _covering(image_HWC: Image_HWC, frame: Size, interpolation: Interpolation) -> NDArray[np.uint8]:
    """The image resized until `frame` (height, width) just fits inside it."""
    frame_height, frame_width = frame
    image_HWC = _without_ends(image_HWC, frame_height, frame_width)
    height, width, _ = image_HWC.shape
    if frame_height * width >= frame_width * height:
        scaled = frame_height, max(frame_width, width * frame_height // height)
    else:
        scaled = max(frame_height, height * frame_width // width), frame_width
    return _from_pillow(_to_pillow(image_HWC).resize(scaled[::-1], _RESAMPLING[interpolation]))


def _without_ends(image_HWC: Image_HWC, frame_height: int, frame_width: int) -> NDArray[np.uint8]:
    """An image whose shape is many times as long as the frame's, without its far ends: scaled up with its centre they would
    take any amount of memory."""
    height, width, _ = image_HWC.shape
    most_width = max(1, LONGEST * height * frame_width // frame_height)
    most_height = max(1, LONGEST * width * frame_height // frame_width)
    left, top = max(0, (width - most_width) // 2), max(0, (height - most_height) // 2)
    return image_HWC[top : top + min(height, most_height), left : left + min(width, most_width)]


def crop_offsets(recipe: ViewConfig, view_M: Numbers, index_M: Numbers) -> NDArray[np.int64]:
    """How far images are shifted (down, right): -padding..padding pixels each, shape (M, 2)."""
    if recipe.crop_padding is None:
        raise ValueError("crop_padding must be filled in before a view is made")
    drawn = rng.uniform(recipe.view_seed, rng.Purpose.CROP, _host(view_M), _host(index_M), 2)
    return (drawn * (2 * recipe.crop_padding + 1)).astype(np.int64) - recipe.crop_padding


def padded_crop(pixels_MCHW: Pixels, index_M: Numbers, view_M: Numbers, recipe: ViewConfig) -> Pixels:
    """Each image padded by reflection and cut at a random place: for images that already have the view's size."""
    return shifted(pixels_MCHW, crop_offsets(recipe, view_M, index_M))


def shifted(pixels_MCHW: Pixels, offsets_M2: NDArray[np.int64]) -> Pixels:
    """Each image as seen through a window (down, right) from its own, reflected at its edges without repeating them.

    A shift may exceed the image: the reflection goes on and on, as in a room of mirrors."""
    images, channels, height, width = pixels_MCHW.shape
    down, right = to_device(offsets_M2.T, pixels_MCHW.device)[:, :, None]
    rows = _reflected(torch.arange(height, device=pixels_MCHW.device) + down, height)
    columns = _reflected(torch.arange(width, device=pixels_MCHW.device) + right, width)
    index = (rows[:, :, None] * width + columns[:, None]).view(images, 1, -1).expand(-1, channels, -1)
    return pixels_MCHW.flatten(2).gather(2, index).view(images, channels, height, width)


def augment(pixels_MCHW: Pixels, index_M: Numbers, view_M: Numbers, recipe: ViewConfig) -> Pixels:
    """Stage two of the views (index, view): flip, RandAugment, 3-Augment, colour jitter, erasing. The input is left as it is.

    Draws are made on the host: give `index_M` and `view_M` as arrays or CPU tensors, for a GPU would be waited for."""
    if pixels_MCHW.shape[1] not in (1, 3):
        raise ValueError(f"images must be grey or RGB, these have {pixels_MCHW.shape[1]} channels")
    index, view = _host(index_M), _host(view_M)
    pixels_MCHW = _flip(pixels_MCHW, index, view, recipe)
    if recipe.randaugment_operations:
        pixels_MCHW = randaugment(pixels_MCHW, view, index, recipe)
    if recipe.three_augment:
        pixels_MCHW = _three_augment(pixels_MCHW, index, view, recipe)
    if recipe.colour_jitter:
        pixels_MCHW = _jitter(pixels_MCHW, index, view, recipe)
    if recipe.random_erasing_prob:
        pixels_MCHW = _erase(pixels_MCHW, index, view, recipe)
    return pixels_MCHW


def erase_boxes(
    recipe: ViewConfig, view_M: NDArray[np.int64], index_M: NDArray[np.int64], size: Size
) -> NDArray[np.int64]:
    """The rectangles that erasing fills (Zhong et al. 2017): (left, top, width, height), shape (M, 4); width and
    height are 0 where nothing is erased. Ten attempts to fit strictly inside the image, as timm has it."""
    height, width = size
    erased = rng.uniform(recipe.view_seed, rng.Purpose.ERASE, view_M, index_M, 1)[:, 0] < recipe.random_erasing_prob
    share, aspect, across, down = _attempts(recipe, rng.Purpose.ERASE, view_M, index_M, first_word=4)
    area = height * width * _between(share, recipe.erase_area)
    ratio = _log_between(aspect, _ERASE_ASPECT)
    box_width, box_height = _rounded_root(area / ratio), _rounded_root(area * ratio)
    fits = (box_width > 0) & (box_width < width) & (box_height > 0) & (box_height < height) & erased[:, None]
    left, top = _place(across, width - box_width), _place(down, height - box_height)
    chosen = [_first(fits, part, np.zeros(len(fits))) for part in (left, top, box_width, box_height)]
    return np.stack(chosen, axis=1).astype(np.int64)


def _flip(pixels_MCHW: Pixels, index: NDArray[np.int64], view: NDArray[np.int64], recipe: ViewConfig) -> Pixels:
    probability = 0.5 if recipe.flip_prob is None else recipe.flip_prob
    drawn = rng.uniform(recipe.view_seed, rng.Purpose.FLIP, view, index, 1)[:, 0]
    rows = [np.flatnonzero(drawn >= probability), np.flatnonzero(drawn < probability)]
    kept, flipped = (pixels_MCHW.index_select(0, to_device(part, pixels_MCHW.device)) for part in rows)
    return image_ops.in_order([kept, flipped.flip(-1)], rows)


def _three_augment(
    pixels_MCHW: Pixels, index: NDArray[np.int64], view: NDArray[np.int64], recipe: ViewConfig
) -> Pixels:
    """3-Augment (DeiT III, section 3): each image is made grey, solarised or blurred, with equal chances. The radius of the
    blur is uniform from 0.1 to 2 pixels, whatever the size of the image, as in the published code."""
    choice, radius = rng.uniform(recipe.view_seed, rng.Purpose.THREE_AUGMENT, view, index, 2).T
    rows = [np.flatnonzero((choice * 3).astype(np.int64) == number) for number in range(3)]
    greyed, solarised, blurred = (pixels_MCHW.index_select(0, to_device(part, pixels_MCHW.device)) for part in rows)
    threshold_M = torch.full((len(solarised),), _SOLARIZE_FROM, device=pixels_MCHW.device)
    table = image_ops.solarize_table(solarised, threshold_M)
    radius_M = _between(radius[rows[2]], _BLUR_RADII)
    together = image_ops.images_at_a_time(pixels_MCHW)
    pieces = [slice(start, start + together) for start in range(0, len(blurred), together)]
    softened = [image_ops.blur(blurred[piece], radius_M[piece]) for piece in pieces]
    places = [*rows[:2], *(rows[2][piece] for piece in pieces)]
    return image_ops.in_order([image_ops.grey(greyed), image_ops.look_up(solarised, table), *softened], places)


def _jitter(pixels_MCHW: Pixels, index: NDArray[np.int64], view: NDArray[np.int64], recipe: ViewConfig) -> Pixels:
    """Brightness, contrast, saturation, always in this order (torchvision shuffles them)."""
    drawn = rng.uniform(recipe.view_seed, rng.Purpose.COLOUR_JITTER, view, index, 3)
    factors = 1 + recipe.colour_jitter * (2 * drawn - 1)
    brightness, contrast, saturation = to_device(factors.T.astype(np.float32), pixels_MCHW.device)
    pixels_MCHW = image_ops.look_up(pixels_MCHW, image_ops.brightness_table(pixels_MCHW, brightness))
    pixels_MCHW = image_ops.look_up(pixels_MCHW, image_ops.contrast_table(pixels_MCHW, contrast))
    return image_ops.colour(pixels_MCHW, saturation)


def _erase(pixels_MCHW: Pixels, index: NDArray[np.int64], view: NDArray[np.int64], recipe: ViewConfig) -> Pixels:
    """Rectangles of noise. The published code adds its noise after normalisation, where it can leave the range of
    an image; here views are images, so the same noise is clipped and rounded to uint8."""
    channels, height, width = pixels_MCHW.shape[1:]
    boxes_M4 = erase_boxes(recipe, view, index, (height, width))
    rows = np.flatnonzero(boxes_M4[:, 2])
    if not rows.size:
        return pixels_MCHW
    # Every erased pixel once, as N (image, position) pairs, made where the images are.
    device = pixels_MCHW.device
    area_E = boxes_M4[rows, 2] * boxes_M4[rows, 3]
    parameters = np.stack([rows, index[rows], view[rows], np.cumsum(area_E) - area_E, *boxes_M4[rows].T[:3]])
    total = int(area_E.sum())
    per_pixel = to_device(parameters, device).repeat_interleave(to_device(area_E, device), dim=1, output_size=total)
    row_N, index_N, view_N, start_N, left_N, top_N, width_N = per_pixel
    within_N = torch.arange(total, device=device) - start_N
    position_N = (top_N + within_N // width_N) * width + left_N + within_N % width_N
    words_N4 = rng.noise_words(recipe.view_seed, rng.Purpose.ERASE_NOISE, view_N, index_N, position_N)
    flat = pixels_MCHW.clone().flatten()
    for channel, table in enumerate(_noise_tables(channels, device)):
        place_N = (row_N * channels + channel) * (height * width) + position_N
        flat.index_copy_(0, place_N, table[words_N4[:, channel] >> 16])
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


def _attempts(
    recipe: ViewConfig, purpose: rng.Purpose, view_M: Numbers, index_M: Numbers, first_word: int
) -> NDArray[np.float64]:
    """Four draws for each of ten attempts: shape (4, M, 10)."""
    words = first_word + 4 * _ATTEMPTS
    drawn = rng.uniform(recipe.view_seed, purpose, _host(view_M), _host(index_M), words)[:, first_word:]
    return np.moveaxis(drawn.reshape(-1, _ATTEMPTS, 4), 2, 0)


def _between(uniform: FloatT, limits: tuple[float, float]) -> FloatT:
    return limits[0] + (limits[1] - limits[0]) * uniform


def _log_between(uniform: NDArray[np.float64], limits: tuple[float, float]) -> NDArray[np.float64]:
    # math.exp, element by element: numpy's own may give an element other bits at another place in the array.
    exponent = _between(uniform, (math.log(limits[0]), math.log(limits[1])))
    return np.array([math.exp(value) for value in exponent.ravel().tolist()]).reshape(exponent.shape)


def _rounded_root(area: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.round(np.sqrt(area)), np.float64)


def _place(uniform: NDArray[np.float64], room: NDArray[np.float64]) -> NDArray[np.float64]:
    """A whole number from 0 to `room`."""
    return np.asarray(np.floor(uniform * (room + 1)), np.float64)


def _first(
    fits_MA: NDArray[np.bool_], values_MA: NDArray[np.float64], otherwise_M: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Per row, the value of the first attempt that fits."""
    first = fits_MA.argmax(1)[:, None]
    return np.where(fits_MA.any(1), np.take_along_axis(values_MA, first, 1)[:, 0], otherwise_M)


def _reflected(position: Int64[torch.Tensor, "M side"], side: int) -> Int64[torch.Tensor, "M side"]:
    if side == 1:
        return torch.zeros_like(position)
    period = 2 * (side - 1)
    folded = position.remainder(period)
    return torch.minimum(folded, period - folded)


def _host(values: Numbers) -> NDArray[np.int64]:
    if isinstance(values, torch.Tensor):
        values = values.cpu()  # waits for a GPU, if that is where it is
    return np.atleast_1d(np.asarray(values, np.int64))


def _to_pillow(image_HWC: Image_HWC) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC))


def _from_pillow(image: Image.Image) -> NDArray[np.uint8]:
    pixels = np.array(image)  # a copy, for torch wants to be able to write
    return pixels[..., None] if pixels.ndim == 2 else pixels
