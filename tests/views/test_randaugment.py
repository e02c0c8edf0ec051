"""RandAugment draws and scales its operations as DeiT's recipe says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from deitkit.config import ViewConfig
from deitkit.views import augment as ra
from deitkit.views.augment import Operation

RECIPE = ViewConfig(randaugment_operations=2)
N = 6000


@pytest.fixture(scope="module")
def drawn() -> ra.Draws:
    return ra.draws(RECIPE, np.zeros(N, np.int64), np.arange(N))


def test_half_of_the_operations_are_applied_and_all_are_equally_likely(drawn):
    applied = drawn.operation >= 0
    assert abs(applied.mean() - 0.5) < 4 * 0.5 / np.sqrt(2 * N)
    counts = np.bincount(drawn.operation[applied], minlength=15)
    assert len(counts) == len(Operation) == 15
    assert stats.chisquare(counts).pvalue > 1e-3


def test_magnitudes_are_normal_about_nine_and_clipped_at_ten(drawn):
    assert drawn.magnitude.max() == 10.0
    assert stats.kstest(drawn.magnitude[drawn.magnitude < 10], stats.truncnorm(-18, 2, 9, 0.5).cdf).pvalue > 1e-3
    assert set(np.unique(drawn.sign)) == {-1.0, 1.0}
    assert abs(drawn.sign.mean()) < 4 / np.sqrt(2 * N)


def test_both_operations_of_an_image_are_drawn_apart(drawn):
    table = np.zeros((16, 16))
    np.add.at(table, (drawn.operation[:, 0], drawn.operation[:, 1]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_one_more_operation_leaves_those_before_it():
    more = ra.draws(RECIPE.model_copy(update={"randaugment_operations": 5}), np.zeros(50, np.int64), np.arange(50))
    fewer = ra.draws(RECIPE, np.zeros(50, np.int64), np.arange(50))
    assert all(np.array_equal(long[:, :2], short) for long, short in zip(more, fewer, strict=True))


def test_strengths_are_those_of_timm():
    timm = pytest.importorskip("timm.data.auto_augment")
    names = dict(zip(Operation, timm._RAND_INCREASING_TRANSFORMS, strict=True))
    for operation, name in names.items():
        scale = timm.LEVEL_TO_ARG[name]
        if scale is None:
            continue
        for magnitude in (0.0, 2.6, 5.0, 8.3, 9.0, 9.99):
            allowed = {
                round(
                    float(scale(magnitude, {})[0] if isinstance(scale(magnitude, {}), tuple) else scale(magnitude, {})),
                    9,
                )
                for _ in range(40)
            }
            signs = np.array([-1.0, 1.0])
            ours = {round(float(value), 9) for value in ra.strength(operation, np.full(2, magnitude), signs)}
            assert ours == allowed, (operation, magnitude)


def test_posterize_never_asks_for_no_bits():
    assert ra.strength(Operation.POSTERIZE, np.array([10.0]), np.array([1.0])) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mixed_batch_gets_each_images_own_operation(channels):
    generator = torch.Generator().manual_seed(0)
    pixels_MCHW = torch.randint(20, 200, (32, channels, 20, 24), dtype=torch.uint8, generator=generator)
    numbers = np.arange(32) % 16 - 1
    strength = np.array(
        [0 if n < 0 else ra.strength(Operation(n), np.array([9.0]), np.array([1.0]))[0] for n in numbers.tolist()]
    )
    together = ra.apply(pixels_MCHW, numbers, strength)
    for row, number in enumerate(numbers.tolist()):
        alone = ra.apply(pixels_MCHW[row : row + 1], numbers[row : row + 1], strength[row : row + 1])
        assert torch.equal(together[row], alone[0]), number
        unchanged = number < 0 or (channels == 1 and number == Operation.COLOUR.value)
        assert torch.equal(together[row], pixels_MCHW[row]) == unchanged, number
