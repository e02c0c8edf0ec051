"""Splits and subsets are stratified, exact, nested, and functions of the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deitkit.config import DataConfig
from deitkit.data.dataset import held_out, held_out_test, stratified_subset, train_and_validation
from deitkit.terminal import UserError

LABELS = np.repeat([0, 1, 2, 1, 0], [40, 7, 100, 13, 20])
label_lists = st.lists(st.integers(1, 30), min_size=2, max_size=6).map(
    lambda counts: np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
)


def counts(labels: NDArray[np.int64]) -> list[int]:
    return np.bincount(labels, minlength=3).tolist()


def test_each_class_gives_its_share() -> None:
    assert counts(LABELS[held_out(LABELS, 0.1, seed=0)]) == [6, 2, 10]
    assert counts(LABELS[held_out_test(LABELS, seed=0)]) == [12, 4, 20]


@given(labels=label_lists, share=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_each_class_keeps_an_image_on_both_sides_where_it_has_two(
    labels: NDArray[np.int64], share: float, seed: int
) -> None:
    held = held_out(labels, share, seed)
    for label, count in enumerate(np.bincount(labels)):
        out = int(held[labels == label].sum())
        assert (1 <= out <= count - 1) if count >= 2 else out == 0


def test_a_class_of_two_images_gives_none_to_the_test_split() -> None:
    assert counts(np.array([0, 0, 1, 1, 1])[held_out_test(np.array([0, 0, 1, 1, 1]), seed=3)]) == [0, 1, 0]


def test_the_split_is_a_function_of_the_seed() -> None:
    assert np.array_equal(held_out(LABELS, 0.1, seed=1), held_out(LABELS, 0.1, seed=1))
    assert not np.array_equal(held_out(LABELS, 0.1, seed=1), held_out(LABELS, 0.1, seed=2))


def test_test_and_validation_images_are_drawn_apart() -> None:
    assert not np.array_equal(held_out(LABELS, 0.2, seed=0, keep=2), held_out_test(LABELS, seed=0))


@given(labels=label_lists, seed=st.integers(0, 5))
def test_subsets_are_exact_nested_and_stratified(labels: NDArray[np.int64], seed: int) -> None:
    totals = np.bincount(labels)
    smaller: set[int] = set()
    for size in range(len(totals), len(labels) + 1):
        chosen = stratified_subset(labels, size, seed)
        assert len(set(chosen.tolist())) == size
        assert np.all(np.diff(chosen) > 0)
        assert smaller <= set(chosen.tolist())
        assert np.all(np.bincount(labels[chosen], minlength=len(totals)) >= 1)
        smaller = set(chosen.tolist())


@pytest.mark.parametrize("size", [30, 77, 100, 179])
def test_subset_keeps_the_classes_proportions_within_an_image(size: int) -> None:
    got = np.bincount(LABELS[stratified_subset(LABELS, size, 0)])
    assert np.all(np.abs(got - size * np.bincount(LABELS) / len(LABELS)) <= 1)


def test_balanced_subset_is_balanced() -> None:
    labels = np.arange(1000) % 10
    assert np.bincount(labels[stratified_subset(labels, 200, 0)]).tolist() == [20] * 10


def test_subset_is_a_function_of_the_seed() -> None:
    assert not np.array_equal(stratified_subset(LABELS, 50, 0), stratified_subset(LABELS, 50, 1))


@pytest.mark.parametrize(("size", "why"), [(181, "only 180 training images"), (2, "each of the 3 classes")])
def test_impossible_subset_is_refused(size: int, why: str) -> None:
    with pytest.raises(UserError, match=f"train_images is {size}.*{why}"):
        stratified_subset(LABELS, size, 0)


def test_subset_leaves_the_validation_images_alone() -> None:
    everything = train_and_validation(LABELS, DataConfig(), has_validation=False)
    few = train_and_validation(LABELS, DataConfig(train_images=50), has_validation=False)
    assert np.array_equal(everything[1], few[1])
    assert len(few[0]) == 50
    assert set(few[0]) <= set(everything[0])
    assert not set(everything[0]) & set(everything[1])


def test_nothing_is_held_out_where_a_validation_split_exists() -> None:
    train, validation = train_and_validation(LABELS, DataConfig(), has_validation=True)
    assert len(train) == len(LABELS)
    assert len(validation) == 0


def test_single_images_leave_nothing_to_validate_on() -> None:
    with pytest.raises(UserError, match="no image is left to validate on"):
        train_and_validation(np.arange(4), DataConfig(), has_validation=False)


def test_a_million_labels_are_split() -> None:
    labels = np.random.default_rng(0).integers(0, 1000, 1_281_167)
    train, validation = train_and_validation(labels, DataConfig(train_images=100_000), has_validation=False)
    assert len(train) == 100_000
    assert abs(len(validation) - 128_117) < 1000
