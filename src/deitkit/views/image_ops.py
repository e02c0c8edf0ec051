"""Image operations on batches of uint8 images, each image with its own strength, equal to Pillow's bit for bit.

Every operation works element by element, on integers or on exactly rounded floats in Pillow's own order, and takes
what it must know of an image (histogram, mean) from integer sums. So the result for an image depends neither on
its neighbours in the batch nor on threads or device. `tests/views/test_image_ops.py` finds no difference from Pillow 13's

    ImageOps      invert, posterize, solarize, autocontrast, equalize; grayscale in all channels (`grey`)
    ImageEnhance  Brightness, Contrast, Color (`colour`), Sharpness
    Image         point (`solarize_add`), transform(AFFINE, BILINEAR) (`affine`, `translate`), rotate (by `rotation`)
    ImageFilter   GaussianBlur (`blur`)

The tables map a pixel's old value to its new one: uint8 of shape (M, C, 256), with C = 1 where all channels share one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int32, Int64, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from deitkit.config import Interpolation, Size

Pixels = UInt8[torch.Tensor, "M C H W"]
Views = UInt8[torch.Tensor, "M C view_H view_W"]
Table = UInt8[torch.Tensor, "M c 256"]
Strengths = Float32[torch.Tensor, " M"]
Group = tuple[NDArray[np.bool_], Callable[[Pixels, NDArray[np.intp]], torch.Tensor]]
"""A mask of shape (M,), and a function of some of its images and their rows."""
Matrix = tuple[float, float, float, float, float, float]

_CACHED_PIXELS = 2**17  # values of the images that a CPU takes through many passes at a time
_LARGE_PLANE = 2**12  # pixels from which numpy's `take` is faster than torch's `gather`


def look_up(pixels_MCHW: Pixels, table_MC256: Table) -> Pixels:
    """Every pixel replaced by its entry in its image's (and channel's) table."""
    images, channels = pixels_MCHW.shape[:2]
    table_MC256 = table_MC256.expand(images, channels, 256)
    if pixels_MCHW.device.type == "cpu" and pixels_MCHW.shape[2:].numel() >= _LARGE_PLANE:
        looked_up = torch.empty_like(pixels_MCHW, memory_format=torch.contiguous_format)
        tables, planes, results = (part.flatten(0, 1).numpy() for part in (table_MC256, pixels_MCHW, looked_up))
        for table, plane, result in zip(tables, planes, results, strict=True):  # a fifth of what `gather` takes
            table.take(plane, out=result, mode="clip")
        return looked_up
    return table_MC256.gather(2, pixels_MCHW.flatten(2).long()).view_as(pixels_MCHW)


def invert_table(pixels_MCHW: Pixels) -> Table:
    return (255 - _values(pixels_MCHW)).to(torch.uint8).expand(len(pixels_MCHW), 1, 256)


def posterize_table(pixels_MCHW: Pixels, bits_M: Strengths) -> Table:
    """Only the `bits_M` (1..8) most significant bits are kept."""
    shift = (8 - bits_M.long())[:, None, None]
    return ((_values(pixels_MCHW) >> shift) << shift).to(torch.uint8)


def solarize_table(pixels_MCHW: Pixels, threshold_M: Strengths) -> Table:
    """Values from the threshold upwards are inverted."""
    values = _values(pixels_MCHW)
    return torch.where(values < threshold_M[:, None, None], values, 255 - values).to(torch.uint8)


def solarize_add_table(pixels_MCHW: Pixels, add_M: Strengths) -> Table:
    """`add_M` is added to values below 128."""
    values = _values(pixels_MCHW)
    return torch.where(values < 128, values + add_M[:, None, None], values).clamp(max=255).to(torch.uint8)


def autocontrast_table(pixels_MCHW: Pixels) -> Table:
    """Each channel's values stretched to 0..255; a channel of one value stays."""
    flat_MCN = pixels_MCHW.flatten(2)
    low = flat_MCN.amin(2, keepdim=True).double()
    span = flat_MCN.amax(2, keepdim=True).double() - low
    scale = torch.full_like(span, 255.0) / span.clamp(min=1)  # `255.0 / span` would round twice, through 1 / span
    values = _values(pixels_MCHW)
    # Product and sum are rounded apart, as in Pillow: the truncation below shows the last bit.
    stretched = (values.double() * scale + -low * scale).clamp(0, 255).long()
    return torch.where(span > 0, stretched, values).to(torch.uint8)


def equalize_table(pixels_MCHW: Pixels) -> Table:
    """Each channel's histogram made as flat as a table of values can make it."""
    flat_MCN = pixels_MCHW.flatten(2).long()
    histogram = flat_MCN.new_zeros(*flat_MCN.shape[:2], 256)
    histogram.scatter_add_(2, flat_MCN, torch.ones_like(flat_MCN))
    brightest = histogram.gather(2, flat_MCN.amax(2, keepdim=True))
    step = (flat_MCN.shape[2] - brightest) // 255
    below = histogram.cumsum(2) - histogram
    flattened = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, flattened, _values(pixels_MCHW)).to(torch.uint8)


def brightness_table(pixels_MCHW: Pixels, factor_M: Strengths) -> Table:
    """0 is black, 1 the image itself, above 1 brighter."""
    values = _values(pixels_MCHW).float()
    return _blend(torch.zeros_like(values), values, factor_M[:, None, None])


def contrast_table(pixels_MCHW: Pixels, factor_M: Strengths) -> Table:
    """0 is the image's mean luma everywhere, 1 the image itself, above 1 more contrast."""
    luma = _luma(pixels_MCHW).flatten(1)
    pixels = luma.shape[1]
    # The mean rounded half up, in integers: a floating-point mean would depend on the order of summation.
    mean_M = (2 * luma.sum(1, dtype=torch.int64) + pixels) // (2 * pixels)
    return _blend(mean_M.float()[:, None, None], _values(pixels_MCHW).float(), factor_M[:, None, None])


def colour(pixels_MCHW: Pixels, factor_M: Strengths) -> Pixels:
    """0 is grey, 1 the image itself, above 1 more colourful. A grey image stays as it is."""
    if pixels_MCHW.shape[1] == 1:
        return pixels_MCHW.clone()
    grey = _luma(pixels_MCHW).float().unsqueeze(1)
    return _blend(grey, pixels_MCHW.float(), factor_M[:, None, None, None])


def sharpness(pixels_MCHW: Pixels, factor_M: Strengths) -> Pixels:
    """0 is the image smoothed by a 3x3 kernel (centre 5, neighbours 1), 1 the image itself, above 1 sharper.
    The outermost pixels stay."""
    result = pixels_MCHW.clone()
    if min(pixels_MCHW.shape[2:]) < 3:
        return result
    image = pixels_MCHW.float()
    rows = image[:, :, :-2] + image[:, :, 1:-1] + image[:, :, 2:]
    centre = image[:, :, 1:-1, 1:-1]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * centre  # integers below 2**24: exact in any order
    # total / 13 is never half an integer, so one rounding of the quotient cannot cross the boundary.
    smooth = ((total + 6.5) / 13).floor()
    result[:, :, 1:-1, 1:-1] = _blend(smooth, centre, factor_M[:, None, None, None])
    return result


def grey(pixels_MCHW: Pixels) -> Pixels:
    """The luma in all channels."""
    return _luma(pixels_MCHW).to(torch.uint8).unsqueeze(1).expand_as(pixels_MCHW).contiguous()


def blur(pixels_MCHW: Pixels, radius_M: NDArray[np.float64]) -> Pixels:
    """Gaussian blur of standard deviation `radius_M` (pixels, at most 100), by three box blurs of a fractional width in each
    direction (Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering"), every one
    of them rounded to uint8, as Pillow has it. What lies outside the image is as its nearest pixel."""
    reach_M, *weights = _box_weights(radius_M)
    result = torch.empty_like(pixels_MCHW)
    for reach in np.unique(reach_M).tolist():
        rows = np.flatnonzero(reach_M == reach)
        place = to_device(rows, pixels_MCHW.device)
        inner, outer = (to_device(part[rows], pixels_MCHW.device)[:, None, None, None] for part in weights)
        blurred = pixels_MCHW.index_select(0, place)
        for direction in (3, 3, 3, 2, 2, 2):
            blurred = _box_blur(blurred, direction, reach, inner, outer)
        result.index_copy_(0, place, blurred)
    return result


def affine(pixels_MCHW: Pixels, matrix_M6: Float64[torch.Tensor, "M 6"], fill: Sequence[int]) -> Pixels:
    """Output pixel centre (x, y) shows the input at (a·x + b·y + c, d·x + e·y + f), bilinear and truncated;
    what lies outside gets the channel's `fill`. On a CPU Pillow does it itself, in half the time."""
    if pixels_MCHW.device.type != "cpu":
        return affine_of_tensors(pixels_MCHW, matrix_M6, fill)
    height, width = pixels_MCHW.shape[2:]
    moved = torch.empty_like(pixels_MCHW)
    for image_CHW, matrix, target_CHW in zip(pixels_MCHW, matrix_M6.tolist(), moved.numpy(), strict=True):
        image = to_pillow(image_CHW.permute(1, 2, 0).numpy()).transform(
            (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=tuple(fill)
        )
        target_CHW[:] = np.asarray(image).reshape(height, width, -1).transpose(2, 0, 1)
    return moved


def affine_of_tensors(pixels_MCHW: Pixels, matrix_M6: Float64[torch.Tensor, "M 6"], fill: Sequence[int]) -> Pixels:
    """What `affine` does on a GPU."""
    images, channels, height, width = pixels_MCHW.shape
    a, b, c, d, e, f = matrix_M6[:, :, None, None].unbind(1)
    x = torch.arange(width, dtype=torch.float64, device=pixels_MCHW.device) + 0.5
    y = (torch.arange(height, dtype=torch.float64, device=pixels_MCHW.device) + 0.5)[:, None]
    source_x = a * x + b * y + c
    source_y = d * x + e * y + f
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    left, right, right_share = _neighbours(source_x - 0.5, width)
    upper, lower, lower_share = _neighbours(source_y - 0.5, height)
    flat_MCN = pixels_MCHW.flatten(2)

    def at(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        index = (row * width + column).view(images, 1, -1).expand(-1, channels, -1)
        return flat_MCN.gather(2, index).view_as(pixels_MCHW).double()

    def between(first: torch.Tensor, second: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        return (second.sub_(first)).mul_(share).add_(first)  # three roundings, as in Pillow; lerp could fuse them

    top = between(at(upper, left), at(upper, right), right_share)
    bottom = between(at(lower, left), at(lower, right), right_share)
    blended = between(top, bottom, lower_share).to(torch.uint8)
    return torch.where(inside[:, None], blended, per_channel(fill, pixels_MCHW))


def rotation(degrees: float, width: int, height: int) -> Matrix:
    """The matrix for `affine` that turns an image counter-clockwise about its centre."""
    radians = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(radians), 15), round(math.sin(radians), 15)
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + 0.0 + x, -sin, cos, -sin * -x + cos * -y + 0.0 + y


def shear(along_x: float, along_y: float) -> Matrix:
    return 1.0, along_x, 0.0, along_y, 1.0, 0.0


def translate(pixels_MCHW: Pixels, offsets_M2: NDArray[np.int64], fill: Sequence[int]) -> Pixels:
    """Output pixel (y, x) shows the input at (y + down, x + right), for offsets (down, right); what lies outside gets the
    channel's `fill`."""
    images, _, height, width = pixels_MCHW.shape
    moved = per_channel(fill, pixels_MCHW).expand(images, -1, height, width).clone()
    for target_CHW, image_CHW, (down, right) in zip(moved, pixels_MCHW, offsets_M2.tolist(), strict=True):
        # Negative numbers count from the far end, so these are clipped; where nothing is left, the slices are empty.
        rows, columns = slice(max(0, down), max(0, height + down)), slice(max(0, right), max(0, width + right))
        shown_CHW = image_CHW[:, rows, columns]
        top, left = min(height, max(0, -down)), min(width, max(0, -right))
        target_CHW[:, top : top + shown_CHW.shape[1], left : left + shown_CHW.shape[2]] = shown_CHW
    return moved


def window(pixels_MCHW: Pixels, offsets_M2: NDArray[np.int64], size: Size) -> Views:
    """A window of `size` (height, width) into each image, its corner at (down, right) from the image's own.

    Repeated reflection padding: the image is mirrored at its edges, which are not repeated, as often as needed."""
    images, channels, height, width = pixels_MCHW.shape
    down, right = to_device(offsets_M2.T, pixels_MCHW.device)[:, :, None]
    rows = _reflected(torch.arange(size[0], device=pixels_MCHW.device) + down, height)
    columns = _reflected(torch.arange(size[1], device=pixels_MCHW.device) + right, width)
    index = (rows[:, :, None] * width + columns[:, None]).view(images, 1, -1).expand(-1, channels, -1)
    return pixels_MCHW.flatten(2).gather(2, index).view(images, channels, *size)


def resample(images: torch.Tensor, size: Size, interpolation: Interpolation) -> torch.Tensor:
    """Images (B, C, h, w) of another size, antialiased: float ones may leave their range a little, uint8 ones do not."""
    if interpolation == "nearest":
        return F.interpolate(images, size, mode="nearest-exact")
    return F.interpolate(images, size, mode=interpolation, antialias=True, align_corners=False)


def in_groups(pixels_MCHW: Pixels, groups: Sequence[Group]) -> torch.Tensor:
    """What each image becomes by the function of its group, in the images' order. Every image is in one group."""
    together = images_at_a_time(pixels_MCHW)
    parts, places = [], []
    for mask_M, function in groups:
        members = np.flatnonzero(mask_M)
        for start in range(0, len(members), together):
            rows = members[start : start + together]
            parts.append(function(pixels_MCHW.index_select(0, to_device(rows, pixels_MCHW.device)), rows))
            places.append(rows)
    if pixels_MCHW.device.type != "cpu":
        return torch.cat(parts).index_select(0, to_device(np.argsort(np.concatenate(places)), pixels_MCHW.device))
    whole = parts[0].new_empty(len(pixels_MCHW), *parts[0].shape[1:])
    for part, rows in zip(parts, places, strict=True):
        whole.numpy()[rows] = (
            part.numpy()
        )  # numpy copies whole rows: 3 times as fast as the above, 12 times as index_copy_
    return whole


def images_at_a_time(pixels_MCHW: Pixels) -> int:
    """How many images an operation of many passes takes together: on a CPU so few that they stay in its cache."""
    return max(1, len(pixels_MCHW) if pixels_MCHW.is_cuda else _CACHED_PIXELS // pixels_MCHW[0].numel())


def per_channel(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """A number for each channel, shape (C, 1, 1), of `like`'s type and on its device: filled there, for a copy from the host
    would wait until the device has done all that it was told before."""
    return torch.cat([like.new_full((1, 1, 1), value) for value in values])


def to_device(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A small array of parameters on the images' device, without waiting for that device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_pillow(image_HWC: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC))


def _values(pixels_MCHW: Pixels) -> Int64[torch.Tensor, "1 1 256"]:
    return torch.arange(256, device=pixels_MCHW.device)[None, None]


def _luma(pixels_MCHW: Pixels) -> Int32[torch.Tensor, "M H W"]:
    """ITU-R 601-2 luma in Pillow's 16-bit fixed point."""
    if pixels_MCHW.shape[1] == 1:
        return pixels_MCHW[:, 0].int()
    red, green, blue = pixels_MCHW.int().unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _box_weights(radius_M: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The boxes whose threefold use blurs by `radius_M`: pixels to each side, their weight and that of the next one beyond
    them, in 2**-24. Single precision where Pillow has it."""
    variance = radius_M.astype(np.float32) ** 2 / 3
    whole = np.floor((np.sqrt(12 * variance.astype(np.float64) + 1).astype(np.float32) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) * (whole + 1)))
    half_width = whole + part
    reach = half_width.astype(np.int64)
    inner = (2**24 / (2 * half_width + 1)).astype(np.int64)
    return reach, inner, (2**24 - (2 * reach + 1) * inner) // 2


def _box_blur(pixels_MCHW: Pixels, direction: int, reach: int, inner: torch.Tensor, outer: torch.Tensor) -> Pixels:
    """One box blur along a dimension, in 24-bit fixed point."""
    side = pixels_MCHW.shape[direction]
    position = torch.arange(-reach - 1, side + reach + 1, device=pixels_MCHW.device).clamp_(0, side - 1)
    padded = pixels_MCHW.index_select(direction, position).int()

    def moved(by: int) -> torch.Tensor:
        return padded.narrow(direction, reach + 1 + by, side)

    box = moved(0).clone()
    for by in range(1, reach + 1):
        box += moved(by)
        box += moved(-by)
    edges = moved(reach + 1) + moved(-reach - 1)
    return ((box * inner + edges * outer + (1 << 23)) >> 24).to(torch.uint8)


def _blend(base: torch.Tensor, image: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """base + factor · (image − base) in float32, clipped and truncated, as Pillow blends."""
    return ((image - base) * factor).add_(base).clamp_(0, 255).to(torch.uint8)


def _neighbours(position: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two pixels around a position, kept inside the image, and the second one's share, the same for all channels."""
    first = position.floor()
    index = first.long()
    return index.clamp(0, side - 1), (index + 1).clamp(0, side - 1), (position - first)[:, None]


def _reflected(position: Int64[torch.Tensor, "M side"], side: int) -> Int64[torch.Tensor, "M side"]:
    if side == 1:
        return torch.zeros_like(position)
    period = 2 * (side - 1)
    folded = position.remainder(period)
    return torch.minimum(folded, period - folded)
