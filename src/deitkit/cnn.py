"""The residual network for small images of He et al. 2015 (arXiv 1512.03385, section 4.2): a teacher that fits a laptop.

One convolution, three stages of n blocks with 16, 32 and 64 channels, a mean over all positions, one linear
layer: 6n + 2 layers. Shortcuts have no parameters (the paper's option A).
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional as F

WIDTHS = (16, 32, 64)


def blocks_per_stage(depth: int) -> int:
    """n of a network with `depth` = 6n + 2 layers. Raises ValueError for a depth that is not of that form."""
    n, rest = divmod(depth - 2, 2 * len(WIDTHS))
    if rest or n < 1:
        below = max(n, 1) * 6 + 2
        raise ValueError(f"depth {depth} is not 6n + 2: take {below} or {below + 6}")
    return n


def shortcut(
    features_BCHW: Float[torch.Tensor, "B C H W"], channels: int, stride: int
) -> Float[torch.Tensor, "B D h w"]:
    """Every `stride`-th row and column; the channels that are missing are zeros.

    The paper does not say where the zeros go. Half of them go before and half after, as in the published
    CIFAR-10 weights that this network reads: with all zeros at the end those of 56 layers fall from 93 % to chance.
    """
    features_BCHW = features_BCHW[:, :, ::stride, ::stride]
    missing = channels - features_BCHW.shape[1]
    return F.pad(features_BCHW, (0, 0, 0, 0, missing // 2, missing - missing // 2)) if missing else features_BCHW


@final
class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)

    def forward(self, features_BCHW: torch.Tensor) -> torch.Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(features_BCHW)))))
        return F.relu(residual + shortcut(features_BCHW, residual.shape[1], self.stride))


@final
class CifarResNet(nn.Module):
    """Normalised images of any size to logits.

    Parameters
    ----------
    depth : 8, 14, 20, ..., 56, 110: 6n + 2
    classes : number of logits
    channels : of the image, 1 or 3
    """

    def __init__(self, depth: int, classes: int, channels: int = 3) -> None:
        super().__init__()
        n = blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], n, stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], n, stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], n, stride=2)
        self.linear = nn.Linear(WIDTHS[2], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # He et al. 2015, arXiv 1502.01852, section 2.2: the variance of a gradient is kept
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images_BCHW: Float[torch.Tensor, "B C H W"]) -> Float[torch.Tensor, "B K"]:
        features = F.relu(self.bn1(self.conv1(images_BCHW)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits_BK: torch.Tensor = self.linear(features.mean((2, 3)))
        return logits_BK


def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(channels_in, channels_out, stride)
    return nn.Sequential(first, *(ResidualBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)))
