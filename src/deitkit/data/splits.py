"""Which images train, which validate: pure functions of the labels and a seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deitkit.config import DataConfig
from deitkit.errors import UserError
from deitkit.rng import Purpose, permutation

TEST_SHARE = 0.2
"""Share of each class that is set aside as test images where the data has no test split of its own."""
_VALIDATION_DRAW, _TEST_DRAW = 0, 1  # the test images of a seed must not be its first validation images


def held_out(
    labels_N: NDArray[np.int64], share: float, seed: int, *, draw: int = _VALIDATION_DRAW, keep: int = 1
) -> NDArray[np.bool_]:
    """True for the images held out: `share` of each class, rounded, but at least one, and at least `keep` remain.

    A class of at most `keep` images gives none. The draw is a function of (seed, draw, position)."""
    rank_N, counts_K = _ranks(labels_N, permutation(seed, Purpose.SPLIT, draw, len(labels_N)))
    wanted_K = np.maximum(np.floor(counts_K * share + 0.5).astype(np.int64), 1)
    out_K = np.clip(np.minimum(wanted_K, counts_K - keep), 0, None)
    held_N: NDArray[np.bool_] = rank_N < out_K[labels_N]
    return held_N


def held_out_test(labels_N: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """True for the test images of data that has one folder a class and nothing else."""
    return held_out(labels_N, TEST_SHARE, seed, draw=_TEST_DRAW, keep=2)


def stratified_subset(labels_N: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Positions, ascending, of `size` images in which every class has its share, and each at least one image.

    Seats go to classes by the method of Sainte-Laguë: image r (from 0) of a class of n is the (r + 1/2)/n-th to
    come. That is proportional to within an image like the method of largest remainders, but never takes an
    image away when the total grows: a smaller subset is part of every larger one of the same seed.
    Raises UserError when there are fewer images than `size`, or more classes."""
    classes = len(np.unique(labels_N))
    if size > len(labels_N):
        raise UserError(f"train_images is {size}, but only {len(labels_N)} training images exist")
    if size < classes:
        raise UserError(f"train_images is {size}, but each of the {classes} classes needs at least one image")
    order_N = permutation(seed, Purpose.SUBSET, 0, len(labels_N))
    rank_N, counts_K = _ranks(labels_N, order_N)
    turn_N = np.where(rank_N == 0, -1.0, (rank_N + 0.5) / counts_K[labels_N])
    tie_N = np.empty_like(order_N)
    tie_N[order_N] = np.arange(len(order_N))
    return np.sort(np.lexsort((tie_N, turn_N))[:size])


def train_and_validation(
    labels_N: NDArray[np.int64], config: DataConfig, *, has_validation: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the training images and, where the data has no validation split, of those held out for it
    (else none). The subset that `train_images` asks for is taken from the training images alone."""
    if has_validation:
        held_N = np.zeros(len(labels_N), np.bool_)
    else:
        held_N = held_out(labels_N, config.validation_share, config.data_seed)
        if not held_N.any():
            raise UserError(
                "no image is left to validate on: every class has a single image; add images or a validation split"
            )
    train, validation = np.flatnonzero(~held_N), np.flatnonzero(held_N)
    if config.train_images is not None:
        train = train[stratified_subset(labels_N[train], config.train_images, config.data_seed)]
    return train, validation


def _ranks(labels_N: NDArray[np.int64], order_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each image's place among those of its class when all are laid out in `order_N`, and the classes' sizes."""
    counts_K = np.bincount(labels_N)
    by_class_N = order_N[np.argsort(labels_N[order_N], kind="stable")]
    rank_N = np.empty(len(labels_N), np.int64)
    rank_N[by_class_N] = np.arange(len(labels_N)) - np.repeat(np.cumsum(counts_K) - counts_K, counts_K)
    return rank_N, counts_K
