"""A network as the rest of the program sees it: images in [0, 1] in, `Heads` out, preprocessing inside."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import nn

from deitkit.config import Interpolation, Preprocessing, Size
from deitkit.operations import per_channel, resample
from deitkit.types import Heads


def prepare(
    images_BCHW: Float[torch.Tensor, "B c h w"], preprocessing: Preprocessing, size: Size | None = None
) -> Float[torch.Tensor, "B C H W"]:
    """Images in [0, 1], grey or RGB and of any size, as `preprocessing` wants them: channels matched (grey is
    repeated, RGB becomes ITU-R 601-2 luma), resized (to `size` instead, if given), normalised."""
    size = size or preprocessing.image_size
    channels = images_BCHW.shape[1]
    if channels == 1 and preprocessing.channels == 3:
        images_BCHW = images_BCHW.expand(-1, 3, -1, -1)
    elif channels == 3 and preprocessing.channels == 1:
        luma_311 = per_channel((0.299, 0.587, 0.114), images_BCHW)
        images_BCHW = (images_BCHW * luma_311).sum(1, keepdim=True)
    elif channels != preprocessing.channels:
        raise ValueError(f"images have {channels} channels, the network wants {preprocessing.channels}")
    if tuple(images_BCHW.shape[2:]) != size:
        images_BCHW = resize(images_BCHW, size, preprocessing.interpolation)
    return (images_BCHW - per_channel(preprocessing.mean, images_BCHW)) / per_channel(preprocessing.std, images_BCHW)


def resize(
    images_BCHW: Float[torch.Tensor, "B C h w"], size: Size, interpolation: Interpolation
) -> Float[torch.Tensor, "B C H W"]:
    """Images of another size, antialiased, still in [0, 1]."""
    return resample(images_BCHW, size, interpolation).clamp(0, 1)


@final
class Network(nn.Module):
    """`body` behind its preprocessing. A body answers `Heads`, or plain logits if it has one head.

    Only `body` has parameters and buffers; its names are the names in saved files.
    """

    def __init__(self, body: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.body = body
        self.preprocessing = preprocessing

    def forward(
        self, images_BCHW: torch.Tensor, keep_LB: torch.Tensor | None = None, size: Size | None = None
    ) -> Heads:
        """Images in [0, 1], of any size, to logits. A ViT's only: `keep_LB`, stochastic depth, see `vit.ViT`; `size`, that the
        body is to see instead of its own."""
        prepared = prepare(images_BCHW, self.preprocessing, size)
        answer = self.body(prepared) if keep_LB is None else self.body(prepared, keep_LB)
        return answer if isinstance(answer, Heads) else Heads(answer, None)
