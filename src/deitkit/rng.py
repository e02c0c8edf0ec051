"""Random numbers that are pure functions of their key.

Every draw that shapes what a network sees comes from Philox4x32-10 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), a counter-based generator: the key is (seed, purpose), the counter is
(index, view, draw number). No state exists, so neither workers nor batches nor restarts can change a draw.

The round function is written once for numpy (uint64) and torch (int64) arrays: pixel noise is drawn on the
device of the images, everything else on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, unique
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special

Integers = int | Sequence[int] | NDArray[np.integer[Any]]
"""Numbers of images or views: one, or one for each."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_CACHED_WORDS = 2**14


@unique
class Purpose(IntEnum):
    """What a draw is for. Numbers are part of the format of recorded views: never change or reuse one."""

    CROP = 1
    FLIP = 2
    RANDAUGMENT = 3
    COLOUR_JITTER = 4
    ERASE = 5
    ERASE_NOISE = 6
    PAIRING = 7
    MIXING = 8
    ORDER = 9
    STOCHASTIC_DEPTH = 10
    SPLIT = 11
    SUBSET = 12
    SAMPLE = 13
    REPEAT = 14
    INITIAL_WEIGHTS = 15
    THREE_AUGMENT = 16
    FOLDS = 17


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 of four counter words: broadcastable uint64 numpy arrays or int64 torch tensors of 32-bit
    values. Returns four such words."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def words(seed: int, purpose: Purpose, view_B: Integers, index_B: Integers, count: int) -> NDArray[np.uint64]:
    """`count` random 32-bit words for every (view, index): shape (B, count). Raises ValueError for a seed beyond 32 bits."""
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    index, view, block = np.broadcast_arrays(
        np.asarray(index_B, np.uint64)[..., None], np.asarray(view_B, np.uint64)[..., None], blocks
    )
    drawn = philox((index, view, block, np.zeros_like(block)), _key(seed, purpose))
    return np.stack(drawn, axis=-1).reshape(*index.shape[:-1], 4 * len(blocks))[..., :count]


def uniform(seed: int, purpose: Purpose, view_B: Integers, index_B: Integers, count: int) -> NDArray[np.float64]:
    """`count` draws, uniform on the open interval (0, 1), for every (view, index): shape (B, count)."""
    return (words(seed, purpose, view_B, index_B, count).astype(np.float64) + 0.5) / 2.0**32


def normal_from_uniform(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard normal draws by the inverse of the distribution function."""
    return np.asarray(special.ndtri(drawn), np.float64)


def beta_from_uniform(drawn: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Draws from Beta(alpha, alpha) by the inverse of the distribution function."""
    return np.asarray(special.betaincinv(alpha, alpha, drawn), np.float64)


def permutation(seed: int, purpose: Purpose, view: int, length: int) -> NDArray[np.int64]:
    """A random order of 0..length-1, a function of (seed, purpose, view, length) alone."""
    drawn = words(seed, purpose, view, np.arange(length), 2)
    return np.argsort(drawn[:, 0] << np.uint64(32) | drawn[:, 1], kind="stable").astype(np.int64)


def noise_words(
    seed: int, purpose: Purpose, view_N: torch.Tensor, index_N: torch.Tensor, position_N: torch.Tensor
) -> torch.Tensor:
    """One block of four 32-bit words for every (view, index, position), drawn on the tensors' own device:
    an int64 tensor of shape (N, 4)."""
    key = _key(seed, purpose)
    if position_N.device.type != "cpu":
        return torch.stack(philox((index_N, view_N, position_N, torch.zeros_like(position_N)), key), dim=-1)
    drawn_N4 = np.empty((len(position_N), 4), np.int64)
    for start in range(0, len(position_N), _CACHED_WORDS):
        # numpy's loops over what fits into the cache take half the time.
        part = slice(start, start + _CACHED_WORDS)
        index, view, position = (part_N[part].numpy().astype(np.uint64) for part_N in (index_N, view_N, position_N))
        drawn_N4[part] = np.stack(philox((index, view, position, np.zeros_like(position)), key), axis=-1)
    return torch.from_numpy(drawn_N4)


def _key(seed: int, purpose: Purpose) -> tuple[int, int]:
    if not 0 <= seed <= _MASK:
        raise ValueError(f"seed {seed} must be between 0 and {_MASK}")
    return seed, int(purpose)
