"""Mixup (Zhang et al. 2017, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899) of mutual partners.

In each view the images of a split are paired once for all. A pair shares its draws, keyed by its smaller index: image a
becomes mix(a, b), image b becomes mix(b, a) with the same weight and the same box. So neither the batch nor the order
in which it came matters. (The published code draws one weight per batch and mixes the batch with its own reverse.) Boxes are
shares of the view: rendered at any size, a view is mixed alike.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from numpy.typing import NDArray

from deitkit import rng
from deitkit.config import Size, ViewConfig
from deitkit.views.image_ops import images_at_a_time, to_device


class RawBatch(NamedTuple):
    """The first stage of views: equal-sized uint8 images, cropped, not yet mixed, and augmented only if `augmented`.

    Rows 0..B-1 are the batch; any rows after them are mixing partners that the batch itself lacks. All tensors stay on
    the host, where draws are made, until the batch is mixed on the student's device.
    """

    pixels_MCHW: UInt8[torch.Tensor, "M C H W"]
    labels_M: Int64[torch.Tensor, " M"]
    index_M: Int64[torch.Tensor, " M"]  # position of the image in its split
    view_M: Int64[torch.Tensor, " M"]  # number of the view
    weight_M: Float32[torch.Tensor, " M"]  # 0 for an image that could not be read, else 1
    partner_B: Int64[torch.Tensor, " B"]  # row of the mixing partner; the row itself if it has none
    global_size: int  # images of this step over all processes, this one's B among them
    augmented: bool = False  # whether a data-loading worker has augmented them
    teacher_MCHW: UInt8[torch.Tensor, "M C h w"] | None = None  # the views at the teacher's size, if it is another


class Batch(NamedTuple):
    """A batch of finished views with their targets."""

    images_BCHW: Float32[torch.Tensor, "B C H W"]  # in [0, 1], not normalised
    labels_B: Int64[torch.Tensor, " B"]
    partner_labels_B: Int64[torch.Tensor, " B"]
    lam_B: Float32[torch.Tensor, " B"]  # mixup's lambda: the target is lam * label + (1 - lam) * partner label
    weight_B: Float32[torch.Tensor, " B"]  # 0 for an image that could not be read, else 1
    index_B: Int64[torch.Tensor, " B"]  # on the host, as view_B
    view_B: Int64[torch.Tensor, " B"]
    teacher_BCHW: Float32[torch.Tensor, "B C h w"] | None = None  # the views at the teacher's size, if it is another

    @property
    def seen_by_teacher(self) -> torch.Tensor:
        """The views as the teacher gets them, in [0, 1]."""
        return self.images_BCHW if self.teacher_BCHW is None else self.teacher_BCHW


class MixDraws(NamedTuple):
    """How each of B images is mixed with its partner."""

    lam: NDArray[np.float64]  # (B,): weight of the image itself in the result; 1 where it is not mixed
    cut: NDArray[np.bool_]  # (B,): CutMix, the partner shows inside the box; else mixup, or nothing where lam is 1
    box: NDArray[np.float64]  # (B, 4): top, bottom, left, right, as shares of the view


def pair_order(view_seed: int, view_group: int, length: int) -> NDArray[np.int64]:
    """The pairs of images in random order, shape (P, 2); with odd length the last image is paired with itself."""
    order = rng.permutation(view_seed, rng.Purpose.PAIRING, view_group, length)
    return np.append(order, order[-1:] if length % 2 else order[:0]).reshape(-1, 2)


@lru_cache(maxsize=8)
def pairing(view_seed: int, view_group: int, length: int) -> NDArray[np.int64]:
    """Each image's partner: partner[partner[i]] == i, and with odd length one image is its own."""
    first, second = pair_order(view_seed, view_group, length).T
    partner = np.empty(length, np.int64)
    partner[first], partner[second] = second, first
    return partner


def mix_draws(config: ViewConfig, view_B: rng.Integers, index_B: rng.Integers) -> MixDraws:
    """How the pairs keyed (view, smaller index) are mixed."""
    mixed, kind, weight, *centre = rng.uniform(config.view_seed, rng.Purpose.MIXING, view_B, index_B, 5).T
    both = config.mixup_alpha > 0 and config.cutmix_alpha > 0
    cut = kind < config.mixup_switch_prob if both else np.full(len(kind), config.cutmix_alpha > 0)
    lam = np.ones(len(kind))
    for alpha, rows in ((config.mixup_alpha, ~cut), (config.cutmix_alpha, cut)):
        if alpha > 0:
            lam[rows] = rng.beta_from_uniform(weight[rows], alpha)
    lam[mixed >= config.mixup_prob] = 1.0
    cut &= lam < 1

    # The CutMix paper, section 3.1 and appendix: the box has 1 - lam of the image's area before it is clipped.
    edges: list[NDArray[np.float64]] = []
    half = np.sqrt(1 - lam) / 2
    for middle in centre:
        edges += [np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)]
    return MixDraws(lam, cut, np.stack(edges, axis=1))


def pixel_boxes(drawn: MixDraws, size: Size) -> NDArray[np.int64]:
    """The boxes of a view of (height, width) `size`: top, bottom, left, right, shape (B, 4), bottom and right excluded; all 0 without
    CutMix."""
    box_B4 = np.round(drawn.box * np.repeat(size, 2)).astype(np.int64)
    return np.where(drawn.cut[:, None], box_B4, 0)


def mix(raw: RawBatch, config: ViewConfig) -> Batch:
    """The finished batch: rows 0..B-1 of the augmented uint8 images as float32 in [0, 1], mixed with their partners.

    An image stays unmixed if it is its own partner, or if one of the two could not be read. All of `raw` but its pixels
    is on the CPU: draws are made on the host, and only what the batch needs goes to the images' device."""
    device = raw.pixels_MCHW.device
    partner_B, index_M, view_M = raw.partner_B.numpy(), raw.index_M.numpy(), raw.view_M.numpy()
    read_M = raw.weight_M.numpy() > 0
    batch = len(partner_B)
    rows = np.arange(batch)
    # One key for both partners: the lesser of their (index, view).
    ahead = np.stack([index_M[partner_B], view_M[partner_B], index_M[:batch], view_M[:batch]])
    partner_first = (ahead[0] < ahead[2]) | ((ahead[0] == ahead[2]) & (ahead[1] < ahead[3]))
    keyed = np.where(partner_first, partner_B, rows)
    drawn = mix_draws(config, view_M[keyed], index_M[keyed])
    alone = (partner_B == rows) | ~read_M[:batch] | ~read_M[partner_B]
    drawn = drawn._replace(lam=np.where(alone, 1.0, drawn.lam), cut=drawn.cut & ~alone)
    # A label counts as much as its image shows in the student's pixels.
    height, width = raw.pixels_MCHW.shape[2:]
    top, bottom, left, right = pixel_boxes(drawn, (height, width)).T
    shown = 1 - (bottom - top) * (right - left) / (height * width)
    lam_B = np.where(drawn.cut, shown, drawn.lam).astype(np.float32)

    partner = to_device(partner_B, device)
    labels_M = raw.labels_M.to(device, non_blocking=True)
    return Batch(
        images_BCHW=_mixed(raw.pixels_MCHW, partner, drawn),
        labels_B=labels_M[:batch],
        partner_labels_B=labels_M.index_select(0, partner),
        lam_B=to_device(lam_B, device),
        weight_B=raw.weight_M[:batch].to(device, non_blocking=True),
        index_B=raw.index_M[:batch],
        view_B=raw.view_M[:batch],
        teacher_BCHW=None if raw.teacher_MCHW is None else _mixed(raw.teacher_MCHW, partner, drawn),
    )


def _mixed(images_MCHW: torch.Tensor, partner: torch.Tensor, drawn: MixDraws) -> torch.Tensor:
    """The first B images, each mixed with its partner."""
    device, batch, (height, width) = images_MCHW.device, len(partner), images_MCHW.shape[2:]
    # CutMix takes whole pixels: those images are themselves outside their box and their partner inside, unweighted.
    box_B4 = to_device(pixel_boxes(drawn, (height, width)), device)
    weight_host_B = np.where(drawn.cut, 1, drawn.lam).astype(np.float32)
    weight_B = to_device(weight_host_B, device)
    mixed_BCHW = torch.empty(batch, *images_MCHW.shape[1:], device=device)
    together = images_at_a_time(images_MCHW)
    for start in range(0, batch, together):
        part = slice(start, min(start + together, batch))
        own = images_MCHW[part]
        if (drawn.lam[part] < 1).any():
            other = images_MCHW.index_select(0, partner[part])
            own = torch.where(_inside(box_B4[part], height, width), other, own)
        if (weight_host_B[part] < 1).any():  # and so is lam: `other` is there
            _blend(own, other, weight_B[part], mixed_BCHW[part])
        else:
            mixed_BCHW[part].copy_(own).div_(255)
    return mixed_BCHW


def _blend(own_MCHW: torch.Tensor, other_MCHW: torch.Tensor, weight_M: torch.Tensor, target_MCHW: torch.Tensor) -> None:
    """uint8 images as float32 in [0, 1]: weight * own + (1 - weight) * other. Product by product, and no fused addition: a
    pixel's bits must not depend on its place in the batch."""
    weight_M111 = weight_M[:, None, None, None]
    other = other_MCHW.to(torch.float32).div_(255).mul_(1 - weight_M111)
    target_MCHW.copy_(own_MCHW).div_(255).mul_(weight_M111).add_(other)


def _inside(box_B4: torch.Tensor, height: int, width: int) -> torch.Tensor:
    top, bottom, left, right = box_B4[:, :, None, None, None].unbind(1)
    y = torch.arange(height, device=box_B4.device)[:, None]
    x = torch.arange(width, device=box_B4.device)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)
