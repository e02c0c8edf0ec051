"""Mixup (Zhang et al. 2017, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899) of mutual partners.

In each view the images of a split are paired once for all. A pair shares its draws, keyed by its smaller index: image a
becomes mix(a, b), image b becomes mix(b, a) with the same weight and the same box. So neither the batch nor the order
in which it came matters. (The published code draws one weight per batch and mixes the batch with its own reverse.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from numpy.typing import NDArray

from deitkit import rng
from deitkit.config import Size, ViewConfig
from deitkit.views.image_ops import images_at_a_time, to_device


class RawBatch(NamedTuple):
    """The first stage of a view: equal-sized uint8 images, cropped, not yet mixed, and not yet augmented unless it says so.

    Rows 0..B-1 are the batch; any rows after them are mixing partners that the batch itself lacks. All tensors stay on
    the host, where draws are made, until the batch is mixed on the student's device.
    """

    pixels_MCHW: UInt8[torch.Tensor, "M C H W"]
    labels_M: Int64[torch.Tensor, " M"]
    index_M: Int64[torch.Tensor, " M"]  # position of the image in its split
    view_M: Int64[torch.Tensor, " M"]  # number of the view
    weight_M: Float32[torch.Tensor, " M"]  # 0 for an image that could not be read, else 1
    partner_B: Int64[torch.Tensor, " B"]  # row of the mixing partner; the row itself where there is none
    augmented: bool = False  # whether a loader worker has augmented them already


class Batch(NamedTuple):
    """A batch of finished views with their targets."""

    images_BCHW: Float32[torch.Tensor, "B C H W"]  # in [0, 1], not normalised
    labels_B: Int64[torch.Tensor, " B"]
    partner_labels_B: Int64[torch.Tensor, " B"]
    lam_B: Float32[torch.Tensor, " B"]  # the target is share * label + (1 - share) * partner label
    weight_B: Float32[torch.Tensor, " B"]  # 0 for an image that could not be read, else 1
    index_B: Int64[torch.Tensor, " B"]  # on the host, as view_B
    view_B: Int64[torch.Tensor, " B"]


class MixDraws(NamedTuple):
    """How each of B images is mixed with its partner."""

    share: NDArray[np.float64]  # (B,): of the image itself in the result, and of its label in the target
    cut: NDArray[np.bool_]  # (B,): CutMix, the partner shows inside the box; else mixup, or nothing where share is 1
    box: NDArray[np.int64]  # (B, 4): top, bottom, left, right; bottom and right excluded


def pair_order(view_seed: int, view_group: int, length: int) -> NDArray[np.int64]:
    """The pairs of images in random order, shape (P, 2); with odd length the last image is paired with itself."""
    order = rng.permutation(view_seed, rng.Purpose.PAIRING, view_group, length)
    return np.append(order, order[-1:] if length % 2 else order[:0]).reshape(-1, 2)


def pairing(view_seed: int, view_group: int, length: int) -> NDArray[np.int64]:
    """Each image's partner: partner[partner[i]] == i, and with odd length one image is its own."""
    first, second = pair_order(view_seed, view_group, length).T
    partner = np.empty(length, np.int64)
    partner[first], partner[second] = second, first
    return partner


def mix_draws(recipe: ViewConfig, view_B: rng.Integers, index_B: rng.Integers, size: Size) -> MixDraws:
    """How the pairs keyed (view, smaller index) are mixed, for images of `size` (height, width)."""
    drawn = rng.uniform(recipe.view_seed, rng.Purpose.MIXING, view_B, index_B, 5)
    mixed, kind, weight, down, across = drawn.T
    both = recipe.mixup_alpha > 0 and recipe.cutmix_alpha > 0
    cut = kind < recipe.mixup_switch_prob if both else np.full(len(kind), recipe.cutmix_alpha > 0)
    share = np.ones(len(kind))
    for alpha, rows in ((recipe.mixup_alpha, ~cut), (recipe.cutmix_alpha, cut)):
        if alpha > 0:
            share[rows] = rng.beta_from_uniform(weight[rows], alpha)
    share[mixed >= recipe.mixup_prob] = 1.0
    cut &= share < 1

    # The CutMix paper, section 3.1 and appendix: the box has 1 - share of the image's area before it is clipped.
    height, width = size
    ratio = np.sqrt(1 - share)
    top, bottom = _extent(down, ratio, height)
    left, right = _extent(across, ratio, width)
    exact = 1 - (bottom - top) * (right - left) / (height * width)
    return MixDraws(np.where(cut, exact, share), cut, np.stack([top, bottom, left, right], axis=1))


def mix(images_MCHW: UInt8[torch.Tensor, "M C H W"], crops: RawBatch, recipe: ViewConfig) -> Batch:
    """The finished batch: rows 0..B-1 of the augmented uint8 images as float32 in [0, 1], mixed with their partners.

    An image stays unmixed if it is its own partner, or if one of the two could not be read. Give `crops` on the CPU:
    draws are made on the host, and only what the batch needs goes to the images' device."""
    device = images_MCHW.device
    partner_B = crops.partner_B.cpu().numpy()
    index_M, view_M, weight_M = (part.cpu().numpy() for part in (crops.index_M, crops.view_M, crops.weight_M))
    batch = len(partner_B)
    rows = np.arange(batch)
    # One key for both partners: the lesser of their (index, view).
    ahead = np.stack([index_M[partner_B], view_M[partner_B], index_M[:batch], view_M[:batch]])
    partner_first = (ahead[0] < ahead[2]) | ((ahead[0] == ahead[2]) & (ahead[1] < ahead[3]))
    keyed = np.where(partner_first, partner_B, rows)
    drawn = mix_draws(recipe, view_M[keyed], index_M[keyed], (images_MCHW.shape[2], images_MCHW.shape[3]))
    alone = (partner_B == rows) | (weight_M[:batch] == 0) | (weight_M[partner_B] == 0)
    share_B = np.where(alone, 1.0, drawn.share).astype(np.float32)

    partner = to_device(partner_B, device)
    # CutMix takes whole pixels: those images are themselves outside their box and their partner inside, unweighted.
    cut_B = drawn.cut & (share_B < 1)
    box_B4 = to_device(np.where(cut_B[:, None], drawn.box, 0), device)
    weight_host_B = np.where(cut_B, np.float32(1), share_B)
    weight_B = to_device(weight_host_B, device)
    mixed_BCHW = torch.empty(batch, *images_MCHW.shape[1:], device=device)
    together = images_at_a_time(images_MCHW)
    for start in range(0, batch, together):
        own = images_MCHW[start : min(start + together, batch)]
        part = slice(start, start + len(own))
        target_BCHW = mixed_BCHW[part]
        if (share_B[part] == 1).all():
            target_BCHW.copy_(own).div_(255)
            continue
        other = images_MCHW.index_select(0, partner[part])
        own = torch.where(_inside(box_B4[part], *own.shape[2:]), other, own)
        if (weight_host_B[part] == 1).all():
            target_BCHW.copy_(own).div_(255)
        else:
            _blend(own, other, weight_B[part], target_BCHW)

    labels_M = crops.labels_M.to(device, non_blocking=True)
    return Batch(
        images_BCHW=mixed_BCHW,
        labels_B=labels_M[:batch],
        partner_labels_B=labels_M.index_select(0, partner),
        lam_B=to_device(share_B, device),
        weight_B=crops.weight_M[:batch].to(device, non_blocking=True),
        index_B=crops.index_M[:batch],
        view_B=crops.view_M[:batch],
    )


def _blend(own_MCHW: torch.Tensor, other_MCHW: torch.Tensor, weight_M: torch.Tensor, target_MCHW: torch.Tensor) -> None:
    """uint8 images as float32 in [0, 1]: weight * own + (1 - weight) * other. Product by product, and no fused addition: a
    pixel's bits must not depend on its place in the batch."""
    weight_M111 = weight_M[:, None, None, None]
    other = other_MCHW.to(torch.float32).div_(255).mul_(1 - weight_M111)
    target_MCHW.copy_(own_MCHW).div_(255).mul_(weight_M111).add_(other)


def _extent(
    centre: NDArray[np.float64], ratio: NDArray[np.float64], side: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Start and end of a box of `ratio` of a side about a centre in (0, 1), clipped to the image."""
    middle, half = (centre * side).astype(np.int64), (ratio * side).astype(np.int64) // 2
    return np.clip(middle - half, 0, side), np.clip(middle + half, 0, side)


def _inside(box_B4: torch.Tensor, height: int, width: int) -> torch.Tensor:
    top, bottom, left, right = box_B4[:, :, None, None, None].unbind(1)
    y = torch.arange(height, device=box_B4.device)[:, None]
    x = torch.arange(width, device=box_B4.device)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)
