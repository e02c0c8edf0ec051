"""What passes between the parts, and the letters that name tensor dimensions.

B images of a batch    M images that a batch needs (its own, then partners from outside it)
C channels             H, W height and width in pixels
K classes              T tokens (class, distillation, patches)
D width of a token     L layers
A all images of a split    N those of them that can be read
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int64, UInt8


class Heads(NamedTuple):
    """What a network answers: logits of the class head and, where there is one, the distillation head."""

    cls_BK: Float[torch.Tensor, "B K"]
    dist_BK: Float[torch.Tensor, "B K"] | None


class Crops(NamedTuple):
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
    label_share_B: Float32[torch.Tensor, " B"]  # the target is share * label + (1 - share) * partner label
    weight_B: Float32[torch.Tensor, " B"]  # 0 for an image that could not be read, else 1
    index_B: Int64[torch.Tensor, " B"]  # on the host, as view_B
    view_B: Int64[torch.Tensor, " B"]


class Answers(NamedTuple):
    """What a teacher said about a batch of views: its decision and, unless only that was kept, its logits."""

    labels_B: Int64[torch.Tensor, " B"]
    logits_BK: Float[torch.Tensor, "B K"] | None
