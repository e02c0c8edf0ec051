"""Draws are the published generator's, the same in numpy and torch, and functions of their key alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from deitkit import rng
from deitkit.rng import Purpose

# Known answers of Philox4x32-10 that come with the authors' Random123 library: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
word = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, answer):
    with_numpy = rng.philox(tuple(np.array([part], np.uint64) for part in counter), key)
    with_torch = rng.philox(tuple(torch.tensor([part]) for part in counter), key)
    assert tuple(int(part[0]) for part in with_numpy) == answer
    assert tuple(int(part[0]) for part in with_torch) == answer


@given(counter=st.tuples(word, word, word, word), key=st.tuples(word, word))
@settings(max_examples=100, deadline=None)
def test_numpy_and_torch_draw_the_same_words(counter, key):
    with_numpy = rng.philox(tuple(np.array([part], np.uint64) for part in counter), key)
    with_torch = rng.philox(tuple(torch.tensor([part]) for part in counter), key)
    assert [int(part[0]) for part in with_numpy] == [int(part[0]) for part in with_torch]


def test_noise_words_are_the_words_of_the_same_counter():
    index, view, position = torch.tensor([3, 70_000]), torch.tensor([1, 2]), torch.tensor([0, 5])
    noise = rng.noise_words(9, Purpose.ERASE_NOISE, view, index, position).numpy()
    first = rng.words(9, Purpose.ERASE_NOISE, [1, 2], [3, 70_000], 24).reshape(2, 6, 4)
    assert noise[0].tolist() == first[0, 0].tolist()
    assert noise[1].tolist() == first[1, 5].tolist()


@given(st.permutations(range(12)), st.integers(1, 12), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_a_draw_depends_neither_on_the_batch_nor_on_how_many_are_drawn(order, batch, count):
    index = np.array(order) * 1000
    whole = rng.words(5, Purpose.CROP, 7, np.arange(12) * 1000, 9)
    parts = [rng.words(5, Purpose.CROP, 7, index[start : start + batch], count) for start in range(0, 12, batch)]
    assert np.array_equal(np.concatenate(parts), whole[order][:, :count])


def test_every_part_of_the_key_changes_the_draws():
    drawn = [
        rng.words(seed, purpose, view, index, 4).tolist()
        for seed in (0, 1)
        for purpose in (Purpose.CROP, Purpose.FLIP)
        for view in (0, 1)
        for index in ([0], [1])
    ]
    assert len({str(words) for words in drawn}) == 16


def test_uniform_draws_are_uniform_and_uncorrelated():
    drawn = rng.uniform(0, Purpose.CROP, 0, np.arange(20_000), 4)
    assert 0 < drawn.min() < drawn.max() < 1
    for column in drawn.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    off_diagonal = np.corrcoef(drawn.T) - np.eye(4)
    assert np.abs(off_diagonal).max() < 4 / np.sqrt(20_000)


def test_normal_and_beta_draws_have_their_distributions():
    drawn = rng.uniform(0, Purpose.MIXING, 0, np.arange(20_000), 2)
    assert stats.kstest(rng.normal_from_uniform(drawn[:, 0]), "norm").pvalue > 1e-3
    for alpha in (0.2, 0.8, 1.0):
        assert stats.kstest(rng.beta_from_uniform(drawn[:, 1], alpha), "beta", args=(alpha, alpha)).pvalue > 1e-3


@given(st.integers(0, 300), st.integers(0, 2**32 - 1), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_a_permutation_holds_every_number_once(length, seed, view):
    assert sorted(rng.permutation(seed, Purpose.ORDER, view, length).tolist()) == list(range(length))


def test_every_order_of_four_is_equally_likely():
    orders = [tuple(rng.permutation(0, Purpose.ORDER, view, 4).tolist()) for view in range(4800)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_seed_beyond_32_bits_is_refused():
    with pytest.raises(ValueError, match="must be between 0 and 4294967295"):
        rng.words(2**32, Purpose.CROP, 0, [0], 1)


def test_numbers_of_purposes_never_change():
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "CROP": 1,
        "FLIP": 2,
        "RANDAUGMENT": 3,
        "COLOUR_JITTER": 4,
        "ERASE": 5,
        "ERASE_NOISE": 6,
        "PAIRING": 7,
        "MIXING": 8,
        "ORDER": 9,
        "STOCHASTIC_DEPTH": 10,
        "SPLIT": 11,
        "SUBSET": 12,
        "SAMPLE": 13,
        "REPEAT": 14,
        "INITIAL_WEIGHTS": 15,
        "THREE_AUGMENT": 16,
        "FOLDS": 17,
    }
