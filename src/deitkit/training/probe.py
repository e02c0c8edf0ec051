"""A probe: the pooled features of a frozen pretrained network, and the linear classifier that fits them to the labels best.

The features of every labelled image are computed once, of its centre view at the network's own resolution. The classifier is
multinomial logistic regression on standardised features; cross-validation over the training images chooses how strongly its weights
are penalised. Scale and shift are folded into the layer, so that the result is an ordinary network.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Float, Int64
from torch.nn import functional as F

from deitkit import rng
from deitkit.config import Precision
from deitkit.data import Split
from deitkit.data.dataset import ranks
from deitkit.models.cnn import fold_batchnorm, forward_with_features
from deitkit.models.network import Network, auto_chunk_size, autocast_dtype, label_ranks
from deitkit.rng import Purpose
from deitkit.terminal import Progress, UserError
from deitkit.views.loader import evaluation_batches

PENALTIES = tuple(10 ** (-half / 2) for half in range(7))
"""Of the logistic regression, from 1 to 0.001, tried in this order until the cross-validated log loss rises."""
FOLDS = 5
LEAST_CHUNK = 32
"""Images at a time (EfficientNet-Lite0 at 224 pixels on two cores with other jobs, images/s: by 8 8.4, by 16 11.3, by 32 12.5, by 64 12.0;
by 16 without folded batch norms 7.8, without channels-last 7.4)."""
MANY_IMAGES = 10_000
"""With more images one fold is enough to tell the strengths apart."""
PROBED = "probe.json"
"""In the folder of a fitted network: the figures of its probe."""
MOST_ITERATIONS, GRADIENT_TOLERANCE, LOSS_TOLERANCE = 200, 1e-4, 1e-7
SMALLEST_SQUARE = 1e-6
"""Of the largest: directions in which the features vary less are left out."""

Features = tuple[Float[torch.Tensor, "N F"], Int64[torch.Tensor, " N"]]
"""Pooled features of the readable images, and their labels."""


# --------------------------------------------------------------------------------------------------- features


@torch.no_grad()
def split_features(
    network: Network,
    split: Split,
    device: torch.device,
    progress: Progress,
    *,
    precision: Precision = "float32",
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Features:
    """Pooled features (float32, on the CPU) of the centre views of all readable images. `share` (r, n): this process, r of n, computes
    part of them and gets the others' from the other processes. Raises UserError where there are none."""
    network = fold_batchnorm(copy.deepcopy(network).to(device).eval())
    network.to(memory_format=torch.channels_last)  # 1.3 to 1.8 times as fast on a CPU
    dtype = autocast_dtype(precision, device)
    features, labels, done, waiting = [], [], 0, 0.0
    progress.start(len(split), "features", unit="images")
    batches = evaluation_batches(
        split,
        network.preprocessing,
        batch_size=min(chunk_size(network, device), -(-len(split) // share[1])),
        workers=workers,
        share=share,
    )
    waited = time.perf_counter()
    for images_BCHW, labels_B, weight_B in batches:
        waiting += time.perf_counter() - waited
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            features_BF = forward_with_features(network, images_BCHW.to(device, non_blocking=True))[1]
        features.append(features_BF[weight_B > 0].float().cpu())
        labels.append(labels_B[weight_B > 0])
        done += len(labels_B) * share[1]
        progress.step(min(done, len(split)), done, waiting, 0.0)
        waited = time.perf_counter()
    progress.finish()
    if share[1] > 1:
        features, labels = (
            gather_object(features),
            gather_object(labels),
        )  # in the order of the processes, as the images
    features_NF = torch.cat(features)
    if len(features_NF) == 0:
        raise UserError(f"none of {len(split)} images can be read, such as {split.name(0)}")
    if not features_NF.isfinite().all():
        raise UserError("the pretrained network's features are infinite or NaN: take another network")
    return features_NF, torch.cat(labels)


def chunk_size(network: Network, device: torch.device) -> int:
    """Images whose features are computed at a time."""
    return max(LEAST_CHUNK, auto_chunk_size(network, device))


@torch.no_grad()
def seconds_per_image(network: Network, device: torch.device, precision: Precision) -> float:
    """Time of an image's features, measured on a second batch of noise: without reading images."""
    network = fold_batchnorm(copy.deepcopy(network).to(device).eval()).to(memory_format=torch.channels_last)
    dtype, count = autocast_dtype(precision, device), chunk_size(network, device)
    images_BCHW = torch.zeros(count, network.preprocessing.channels, *network.preprocessing.image_size, device=device)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            forward_with_features(network, images_BCHW)[1].cpu()  # .cpu() waits for the device
        seconds = time.perf_counter() - began
    return seconds / count


# -------------------------------------------------------------------------------------------------- classifier


class Head(NamedTuple):
    """A classifier of pooled features, and how good it is on images that it was not fitted to."""

    weight_KF: torch.Tensor
    bias_K: torch.Tensor
    penalty: float
    """by cross-validation"""
    top1: float
    """cross-validated accuracy with that penalty"""
    nll: float
    """cross-validated log loss, nats per image"""

    def logits(self, features_NF: Float[torch.Tensor, "N F"]) -> Float[torch.Tensor, "N K"]:
        return F.linear(features_NF.to(self.weight_KF), self.weight_KF, self.bias_K).cpu()


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Within the block PyTorch computes with one thread: products of a tall and a thin matrix wait for memory, and threads only for each
    other (3,068 images, on a busy machine of two cores: 17 s of processor time instead of 69)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@single_thread()
def fit_head(
    features_NF: Float[torch.Tensor, "N F"],
    labels_N: Int64[torch.Tensor, " N"],
    classes: int,
    progress: Progress,
    *,
    seed: int = 0,
    class_weights: Sequence[float] = (),
) -> Head:
    """Logistic regression whose penalty has the least cross-validated log loss. `seed` decides the folds; `class_weights` weigh the log
    loss of each class, also in cross-validation. Computed on the device of `features_NF`, where both tensors are."""
    weights_K = torch.tensor(class_weights or [1.0] * classes).to(features_NF)
    fold_N = fold_numbers(labels_N, seed)
    mean_F, scale_F = features_NF.mean(0), features_NF.std(0, correction=0).clamp_min(1e-6)
    inputs_NF = (features_NF - mean_F) / scale_F
    axes_FR, variance_R = principal_axes(inputs_NF)
    inputs_NR = inputs_NF @ axes_FR
    folds = range(1 if len(labels_N) > MANY_IMAGES else FOLDS)
    fits = [Regression(inputs_NR[fold_N != k], labels_N[fold_N != k], variance_R, weights_K) for k in folds]
    progress.start(len(PENALTIES) * len(fits), "classifier", unit="fits")
    scores: list[tuple[float, float]] = []
    for number, penalty in enumerate(PENALTIES):
        held_out = []
        for fold, regression in enumerate(fits):
            regression.fit(penalty)
            held_out.append(regression.scores(inputs_NR[fold_N == fold], labels_N[fold_N == fold]))
            done = number * len(fits) + fold + 1
            progress.step(done, done * len(labels_N), 0.0, 0.0)
        nll, wrong = torch.cat(held_out).mean(0).tolist()
        scores.append((nll, wrong))
        if nll > min(scores)[0]:
            break
    progress.finish()
    best = scores.index(min(scores))
    whole = Regression(inputs_NR, labels_N, variance_R, weights_K)
    for penalty in PENALTIES[: best + 1]:
        whole.fit(penalty)
    weight_KF = whole.weight_KR @ axes_FR.T / scale_F
    bias_K = whole.bias_K - weight_KF @ mean_F
    return Head(weight_KF, bias_K, PENALTIES[best], top1=1 - scores[best][1], nll=scores[best][0])


def is_probed(folder: Path) -> bool:
    """Whether a network was probed in this folder, so that its accuracy is known from cross-validation too."""
    return (folder / PROBED).is_file()


def fold_numbers(labels_N: Int64[torch.Tensor, " N"], seed: int) -> Int64[torch.Tensor, " N"]:
    """A number from 0 to `FOLDS` - 1 for each image, so that every fold has its share of every class."""
    labels = labels_N.cpu().numpy()
    rank_N, counts_K = ranks(labels, rng.permutation(seed, Purpose.FOLDS, 0, len(labels)))
    before_K = np.cumsum(counts_K) - counts_K  # folds are equally large where classes are small
    return torch.from_numpy((rank_N + before_K[labels]) % FOLDS).to(labels_N.device)


def principal_axes(
    inputs_NF: Float[torch.Tensor, "N F"],
) -> tuple[Float[torch.Tensor, "F R"], Float[torch.Tensor, " R"]]:
    """Directions (orthonormal columns) in which the inputs vary, all of them, and the mean square along each. With fewer images than
    features there are no more than images."""
    images, features = inputs_NF.shape
    few = images < features
    squares, vectors = torch.linalg.eigh(inputs_NF @ inputs_NF.T if few else inputs_NF.T @ inputs_NF)
    kept = squares > SMALLEST_SQUARE * squares[-1]
    squares_R, vectors = squares[kept], vectors[:, kept]
    return (inputs_NF.T @ vectors / squares_R.sqrt() if few else vectors), squares_R / images


@final
class Regression:
    """Multinomial logistic regression by L-BFGS, each fit from where the last one ended: mean log loss + penalty / 2 * squared weights
    (penalty = 1 / (C * images) of scikit-learn). Biases are free. `variance_R`: mean square of each input, by which the problem is
    scaled, so that a few dozen iterations are enough for any penalty. `weights_K`: the weight of each class in the log loss."""

    def __init__(
        self,
        inputs_NR: Float[torch.Tensor, "N R"],
        labels_N: Int64[torch.Tensor, " N"],
        variance_R: Float[torch.Tensor, " R"],
        weights_K: Float[torch.Tensor, " K"],
    ) -> None:
        self._inputs_NR, self._labels_N, self._variance_R = inputs_NR, labels_N, variance_R
        self._weights_K = weights_K
        self.weight_KR = inputs_NR.new_zeros(len(weights_K), inputs_NR.shape[1])
        self.bias_K = inputs_NR.new_zeros(len(weights_K))

    def fit(self, penalty: float) -> None:
        # The Hessian of the mean log loss is at most half the inputs' second moments (Boehning 1992); a quarter is closer.
        scale_R = (self._variance_R / 4 + penalty).rsqrt()
        scaled_KR, bias_K = (self.weight_KR / scale_R).requires_grad_(), self.bias_K.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [scaled_KR, bias_K],
            max_iter=MOST_ITERATIONS,
            tolerance_grad=GRADIENT_TOLERANCE,
            tolerance_change=LOSS_TOLERANCE,
            line_search_fn="strong_wolfe",
        )

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            weight_KR = scaled_KR * scale_R
            logits_NK = F.linear(self._inputs_NR, weight_KR, bias_K)
            value = F.cross_entropy(logits_NK, self._labels_N, self._weights_K) + penalty / 2 * weight_KR.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        self.weight_KR, self.bias_K = (scaled_KR * scale_R).detach(), bias_K.detach()

    def scores(self, inputs_MR: Float[torch.Tensor, "M R"], labels_M: Int64[torch.Tensor, " M"]) -> torch.Tensor:
        """Weighted log loss of each image, and 1 where it is predicted wrong: (M, 2)."""
        logits_MK = F.linear(inputs_MR, self.weight_KR, self.bias_K)
        wrong_M = (label_ranks(logits_MK, labels_M) > 0).to(logits_MK)
        nll_M = F.cross_entropy(logits_MK, labels_M, self._weights_K, reduction="none")
        return torch.stack([nll_M, wrong_M], 1)
