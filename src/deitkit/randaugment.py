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
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from deitkit import operations, rng
from deitkit.config import ViewConfig
from deitkit.operations import Pixels, to_device

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
        np.where(applied < recipe.randaugment_probability, (choice * len(Operation)).astype(np.int64), -1),
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
    together = operations.images_at_a_time(pixels_MCHW)
    for kind, function in enumerate((_change_values, _move, _colour, _sharpen, _shift)):
        rows_of_kind = np.flatnonzero(kind_M == kind)
        for start in range(0, len(rows_of_kind), together):
            rows = rows_of_kind[start : start + together]
            chosen = pixels_MCHW.index_select(0, to_device(rows, pixels_MCHW.device))
            parts.append(function(chosen, operation_M[rows], strength_M[rows]))
            places.append(rows)
    return operations.in_order(parts, places)


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
    return operations.look_up(pixels_mCHW, operations.in_order(parts, places))


def _move(pixels_mCHW: Pixels, operation_m: NDArray[np.int64], strength_m: NDArray[np.float64]) -> Pixels:
    channels, height, width = pixels_mCHW.shape[1:]
    pairs = zip(operation_m.tolist(), strength_m.tolist(), strict=True)
    matrix_m6 = np.array([_MOVES[Operation(number)](amount, width, height) for number, amount in pairs])
    return operations.affine(pixels_mCHW, to_device(matrix_m6, pixels_mCHW.device), FILL[channels])


def _shift(pixels_mCHW: Pixels, operation_m: NDArray[np.int64], strength_m: NDArray[np.float64]) -> Pixels:
    channels, height, width = pixels_mCHW.shape[1:]
    across_m = operation_m == Operation.TRANSLATE_X.value
    down_right_m2 = np.stack(
        [np.where(across_m, 0, strength_m * height), np.where(across_m, strength_m * width, 0)], axis=1
    )
    return operations.translate(pixels_mCHW, np.round(down_right_m2).astype(np.int64), FILL[channels])


def _colour(pixels_mCHW: Pixels, _: NDArray[np.int64], strength_m: NDArray[np.float64]) -> Pixels:
    return operations.colour(pixels_mCHW, to_device(strength_m.astype(np.float32), pixels_mCHW.device))


def _sharpen(pixels_mCHW: Pixels, _: NDArray[np.int64], strength_m: NDArray[np.float64]) -> Pixels:
    return operations.sharpness(pixels_mCHW, to_device(strength_m.astype(np.float32), pixels_mCHW.device))


_TABLES: dict[Operation, Callable[[Pixels, torch.Tensor], operations.Table]] = {
    Operation.AUTOCONTRAST: lambda pixels, _: operations.autocontrast_table(pixels),
    Operation.EQUALIZE: lambda pixels, _: operations.equalize_table(pixels),
    Operation.INVERT: lambda pixels, _: operations.invert_table(pixels),
    Operation.POSTERIZE: lambda pixels, bits: operations.posterize_table(pixels, bits.long()),
    Operation.SOLARIZE: lambda pixels, threshold: operations.solarize_table(pixels, threshold.long()),
    Operation.SOLARIZE_ADD: lambda pixels, add: operations.solarize_add_table(pixels, add.long()),
    Operation.CONTRAST: lambda pixels, factor: operations.contrast_table(pixels, factor.float()),
    Operation.BRIGHTNESS: lambda pixels, factor: operations.brightness_table(pixels, factor.float()),
}

_MOVES: dict[Operation, Callable[[float, int, int], operations.Matrix]] = {
    Operation.ROTATE: operations.rotation,
    Operation.SHEAR_X: lambda slope, width, height: operations.shear(slope, 0.0),
    Operation.SHEAR_Y: lambda slope, width, height: operations.shear(0.0, slope),
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
