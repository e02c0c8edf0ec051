"""A view from an image and its draws: everything that happens to one image, before any two are mixed.

Stage one is where the pixels of the original are: `crop_image` for photos, `padded_crop` for small images held in
memory, `center_view` for evaluation. Stage two, `augment`, takes a batch of equal-sized uint8 images on any device
through flip, RandAugment, 3-Augment, colour jitter and erasing, in this order (as in timm's loader, which DeiT trains
with, and in DeiT III's).
All draws are keyed by (view_seed, view, index), and no image's result depends on another's.
"""

from __future__ import annotations

import functools
import math
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray
from PIL import Image

from deitkit import operations, rng
from deitkit.config import Interpolation, Size, ViewConfig
from deitkit.operations import Pixels, resample, to_device
from deitkit.randaugment import randaugment

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
    image_HWC: Image_HWC, size: Size, crop_fraction: float = 1.0, interpolation: Interpolation = "bicubic"
) -> NDArray[np.uint8]:
    """An evaluation view: the image resized until size / crop_fraction just fits inside it, its centre cut out.

    For square sizes the same pixels as torchvision's Resize and CenterCrop."""
    frame_height, frame_width = (math.floor(side / crop_fraction) for side in size)
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
    if recipe.erase_probability:
        pixels_MCHW = _erase(pixels_MCHW, index, view, recipe)
    return pixels_MCHW


def erase_boxes(
    recipe: ViewConfig, view_M: NDArray[np.int64], index_M: NDArray[np.int64], size: Size
) -> NDArray[np.int64]:
    """The rectangles that erasing fills (Zhong et al. 2017): (left, top, width, height), shape (M, 4); width and
    height are 0 where nothing is erased. Ten attempts to fit strictly inside the image, as timm has it."""
    height, width = size
    erased = rng.uniform(recipe.view_seed, rng.Purpose.ERASE, view_M, index_M, 1)[:, 0] < recipe.erase_probability
    share, aspect, across, down = _attempts(recipe, rng.Purpose.ERASE, view_M, index_M, first_word=4)
    area = height * width * _between(share, recipe.erase_area)
    ratio = _log_between(aspect, _ERASE_ASPECT)
    box_width, box_height = _rounded_root(area / ratio), _rounded_root(area * ratio)
    fits = (box_width > 0) & (box_width < width) & (box_height > 0) & (box_height < height) & erased[:, None]
    left, top = _place(across, width - box_width), _place(down, height - box_height)
    chosen = [_first(fits, part, np.zeros(len(fits))) for part in (left, top, box_width, box_height)]
    return np.stack(chosen, axis=1).astype(np.int64)


def _flip(pixels_MCHW: Pixels, index: NDArray[np.int64], view: NDArray[np.int64], recipe: ViewConfig) -> Pixels:
    probability = 0.5 if recipe.flip_probability is None else recipe.flip_probability
    drawn = rng.uniform(recipe.view_seed, rng.Purpose.FLIP, view, index, 1)[:, 0]
    rows = [np.flatnonzero(drawn >= probability), np.flatnonzero(drawn < probability)]
    kept, flipped = (pixels_MCHW.index_select(0, to_device(part, pixels_MCHW.device)) for part in rows)
    return operations.in_order([kept, flipped.flip(-1)], rows)


def _three_augment(
    pixels_MCHW: Pixels, index: NDArray[np.int64], view: NDArray[np.int64], recipe: ViewConfig
) -> Pixels:
    """3-Augment (DeiT III, section 3): each image is made grey, solarised or blurred, with equal chances. The radius of the
    blur is uniform from 0.1 to 2 pixels, whatever the size of the image, as in the published code."""
    choice, radius = rng.uniform(recipe.view_seed, rng.Purpose.THREE_AUGMENT, view, index, 2).T
    rows = [np.flatnonzero((choice * 3).astype(np.int64) == number) for number in range(3)]
    greyed, solarised, blurred = (pixels_MCHW.index_select(0, to_device(part, pixels_MCHW.device)) for part in rows)
    threshold_M = torch.full((len(solarised),), _SOLARIZE_FROM, device=pixels_MCHW.device)
    table = operations.solarize_table(solarised, threshold_M)
    radius_M = _between(radius[rows[2]], _BLUR_RADII)
    together = operations.images_at_a_time(pixels_MCHW)
    pieces = [slice(start, start + together) for start in range(0, len(blurred), together)]
    softened = [operations.blur(blurred[piece], radius_M[piece]) for piece in pieces]
    places = [*rows[:2], *(rows[2][piece] for piece in pieces)]
    return operations.in_order([operations.grey(greyed), operations.look_up(solarised, table), *softened], places)


def _jitter(pixels_MCHW: Pixels, index: NDArray[np.int64], view: NDArray[np.int64], recipe: ViewConfig) -> Pixels:
    """Brightness, contrast, saturation, always in this order (torchvision shuffles them)."""
    drawn = rng.uniform(recipe.view_seed, rng.Purpose.COLOUR_JITTER, view, index, 3)
    factors = 1 + recipe.colour_jitter * (2 * drawn - 1)
    brightness, contrast, saturation = to_device(factors.T.astype(np.float32), pixels_MCHW.device)
    pixels_MCHW = operations.look_up(pixels_MCHW, operations.brightness_table(pixels_MCHW, brightness))
    pixels_MCHW = operations.look_up(pixels_MCHW, operations.contrast_table(pixels_MCHW, contrast))
    return operations.colour(pixels_MCHW, saturation)


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
