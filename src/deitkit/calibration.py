"""Probabilities that can be believed: each head of a trained network scaled to what it gets right (temperature scaling).

A head's decisions do not depend on the size of its logits; its probabilities, and the mean of two heads' probabilities,
do. What a network learned by (smoothed or mixed labels, a loss of z-scores, which fixes no size at all) leaves them too modest or
too sure. One factor per head, fitted to images that the network has not learned from, sets that right (Guo et al. 2017, arXiv
1706.04599, section 4.2). It is multiplied into the head's weights, so that every export has it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64

from deitkit.evaluation import SplitAnswers
from deitkit.network import Network
from deitkit.types import Heads
from deitkit.vit import ViT

GREATEST_SCALE = 100.0
"""Beyond it a head knows nothing, or its logits differ by rounding alone."""
HALVINGS = 50


def calibrate(network: Network, answers: SplitAnswers) -> tuple[SplitAnswers, tuple[float, ...]]:
    """Multiply each head of a `ViT` by the factor that suits its `answers`. Returns what it answers now, and the factors."""
    body = network.body
    if not isinstance(body, ViT):
        raise TypeError(f"only a student's heads are known here, not those of {type(body).__name__}")
    said = [head_BK for head_BK in answers.heads if head_BK is not None]
    scales = tuple(fitting_scale(head_BK, answers.labels_N) for head_BK in said)
    body.scale_heads(scales)
    scaled = [head_BK * scale for head_BK, scale in zip(said, scales, strict=True)]
    return answers._replace(heads=Heads(scaled[0], scaled[1] if len(scaled) > 1 else None)), scales


def fitting_scale(logits_NK: Float[torch.Tensor, "N K"], labels_N: Int64[torch.Tensor, " N"]) -> float:
    """The factor s, 1/100 to 100, for which softmax(s * logits) makes the labels likeliest: 1 / temperature.

    Labels count as if two images more had been seen, one of them wrong (after Platt 1999, for two classes), so that a few images,
    all of them right, do not make the network certain. The mean loss is convex in s: its slope, the mean of
    sum over k of (softmax(s * z)[k] - target[k]) * z[k], is halved in. 1 where the logits of every image are all equal,
    or not finite.
    """
    z_NK = logits_NK.double()
    z_NK = z_NK - z_NK.mean(-1, keepdim=True)
    if not z_NK.any() or not z_NK.isfinite().all():
        return 1.0
    count, classes = z_NK.shape
    wrong = 1 / (count + 2)
    right_N = z_NK.gather(1, labels_N[:, None])[:, 0]
    others_N = -right_N / (classes - 1)  # the mean of the other classes' logits, of which all together have the sum 0
    wanted = ((1 - wrong) * right_N + wrong * others_N).mean()
    low, high = -math.log(GREATEST_SCALE), math.log(GREATEST_SCALE)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        expected = ((math.exp(middle) * z_NK).softmax(-1) * z_NK).sum(-1).mean()
        low, high = (low, middle) if expected > wanted else (middle, high)
    return math.exp((low + high) / 2)
