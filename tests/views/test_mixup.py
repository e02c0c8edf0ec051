"""Mixing is mutual, keyed by the pair, and equal for any batch; labels get exactly the share of the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from deitkit.config import AUGMENT_PRESETS, ViewConfig
from deitkit.views import mixup as mixing
from deitkit.views.mixup import Batch, RawBatch

BOTH = ViewConfig(view_seed=5, mixup_alpha=0.8, cutmix_alpha=1.0, mixup_prob=0.9)
N = 40


def raw_batch(rows: list[int] | None = None, unreadable: tuple[int, ...] = ()) -> RawBatch:
    """The images `rows` (by number, of N in view 2) of a batch, and after them the partners that it lacks."""
    rows = list(range(N)) if rows is None else rows
    partner = mixing.pairing(BOTH.view_seed, 2, N)
    wanted = rows + [int(partner[row]) for row in rows if partner[row] not in rows]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (N, 3, 12, 16), dtype=torch.uint8, generator=generator)
    weights = torch.ones(N)
    weights[list(unreadable)] = 0
    return RawBatch(
        pixels_MCHW=pixels[wanted],
        labels_M=torch.arange(N)[wanted] * 10,
        index_M=torch.tensor(wanted),
        view_M=torch.full((len(wanted),), 2),
        weight_M=weights[wanted],
        partner_B=torch.tensor([wanted.index(int(partner[row])) for row in rows]),
        global_size=len(rows),
    )


def mixed(raw: RawBatch, config: ViewConfig = BOTH) -> Batch:
    return mixing.mix(raw, config)


@given(st.integers(0, 200), st.integers(0, 2**32 - 1), st.integers(0, 500))
@settings(max_examples=80, deadline=None)
def test_partners_are_mutual_and_only_an_odd_one_is_alone(length, seed, view):
    partner = mixing.pairing(seed, view, length)
    assert np.array_equal(partner[partner], np.arange(length))
    assert (partner == np.arange(length)).sum() == length % 2
    order = mixing.pair_order(seed, view, length)
    assert order.shape == ((length + 1) // 2, 2)
    assert np.array_equal(partner[order[:, 0]], order[:, 1])
    assert sorted(set(order.ravel().tolist())) == list(range(length))


def test_every_partner_is_equally_likely():
    partners = np.stack([mixing.pairing(0, view, 6) for view in range(3000)])
    for image in range(6):
        counts = np.bincount(partners[:, image], minlength=6)
        assert counts[image] == 0
        assert stats.chisquare(np.delete(counts, image)).pvalue > 1e-4


def test_a_mixed_image_is_the_same_in_any_batch():
    whole = mixed(raw_batch())
    for rows in ([0], [7, 3], [39, 0, 12, 5, 6], list(range(39, -1, -1))):
        part = mixed(raw_batch(rows))
        assert torch.equal(part.images_BCHW, whole.images_BCHW[rows])
        assert torch.equal(part.lam_B, whole.lam_B[rows])
        assert torch.equal(part.partner_labels_B, whole.partner_labels_B[rows])
        assert torch.equal(part.index_B, torch.tensor(rows))


def test_partners_share_their_weight_and_their_box():
    raw = raw_batch()
    batch = mixed(raw)
    partner = raw.partner_B
    assert torch.equal(batch.lam_B, batch.lam_B[partner])
    # Added up, two partners hold every pixel of both images once, whichever way they were mixed.
    originals = raw.pixels_MCHW.double() / 255
    both = batch.images_BCHW.double() + batch.images_BCHW[partner].double()
    assert torch.allclose(both, originals + originals[partner], atol=1e-6)


def test_mixup_is_the_weighted_sum_and_the_label_has_its_weight():
    raw = raw_batch()
    batch = mixed(raw, ViewConfig(view_seed=5, mixup_alpha=0.8))
    originals = raw.pixels_MCHW.double() / 255
    share = batch.lam_B.double()[:, None, None, None]
    expected = share * originals + (1 - share) * originals[raw.partner_B]
    assert torch.allclose(batch.images_BCHW.double(), expected, atol=1e-6)
    assert ((batch.lam_B > 0) & (batch.lam_B < 1)).all()


def test_a_cutmix_label_has_exactly_its_share_of_the_pixels():
    raw = raw_batch()
    batch = mixed(raw, ViewConfig(view_seed=5, cutmix_alpha=1.0))
    originals = raw.pixels_MCHW.float() / 255
    own = (batch.images_BCHW == originals).all(1)
    theirs = (batch.images_BCHW == originals[raw.partner_B]).all(1)
    assert (own | theirs).all()
    assert torch.equal(own.double().mean((1, 2)).float(), batch.lam_B)
    assert len(batch.lam_B.unique()) > 10
    for row in ~own:
        lines, columns = row.any(1), row.any(0)
        assert torch.equal(row, lines[:, None] & columns[None])  # one rectangle


def test_draws_have_the_settings_frequencies_and_distribution():
    drawn = mixing.mix_draws(BOTH, np.zeros(8000, int), np.arange(8000))
    unmixed = drawn.lam == 1
    assert abs(unmixed.mean() - 0.1) < 0.02
    assert abs(drawn.cut[~unmixed].mean() - 0.5) < 0.03
    blended = drawn.lam[~unmixed & ~drawn.cut]
    assert stats.kstest(blended, "beta", args=(0.8, 0.8)).pvalue > 1e-3


@pytest.mark.parametrize("config", [AUGMENT_PRESETS["light"], BOTH.model_copy(update={"mixup_prob": 0.0})])
def test_nothing_is_mixed_where_mixing_is_off(config):
    raw = raw_batch()
    batch = mixed(raw, config)
    assert torch.equal(batch.images_BCHW, raw.pixels_MCHW.float() / 255)
    assert (batch.lam_B == 1).all()


def test_only_one_of_the_two_is_used_where_the_other_is_off():
    assert mixing.mix_draws(ViewConfig(cutmix_alpha=1.0), np.zeros(99, int), np.arange(99)).cut.mean() > 0.8
    assert not mixing.mix_draws(ViewConfig(mixup_alpha=1.0), np.zeros(99, int), np.arange(99)).cut.any()


def test_an_unreadable_image_counts_nothing_and_leaves_its_partner_whole():
    bad = 4
    partner = int(mixing.pairing(BOTH.view_seed, 2, N)[bad])
    always = BOTH.model_copy(update={"mixup_prob": 1.0})
    batch, before = mixed(raw_batch(unreadable=(bad,)), always), mixed(raw_batch(), always)
    assert before.lam_B[partner] < 1
    assert batch.lam_B[[bad, partner]].tolist() == [1, 1]
    assert batch.weight_B[[bad, partner]].tolist() == [0, 1]
    assert torch.equal(batch.images_BCHW[partner], raw_batch().pixels_MCHW[partner].float() / 255)
    others = [row for row in range(N) if row not in (bad, partner)]
    assert torch.equal(batch.images_BCHW[others], before.images_BCHW[others])


def test_an_image_that_is_its_own_partner_stays_whole():
    alone = raw_batch()._replace(partner_B=torch.arange(N))
    batch = mixed(alone)
    assert torch.equal(batch.images_BCHW, alone.pixels_MCHW.float() / 255)
    assert (batch.lam_B == 1).all()


@given(st.floats(1e-3, 50), st.floats(1e-3, 50), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_shares_and_boxes_stay_in_range(mixup_alpha, cutmix_alpha, height, width):
    config = ViewConfig(mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)
    drawn = mixing.mix_draws(config, np.zeros(50, int), np.arange(50))
    assert ((drawn.lam >= 0) & (drawn.lam <= 1)).all()
    top, bottom, left, right = mixing.pixel_boxes(drawn, (height, width)).T
    assert ((top >= 0) & (top <= bottom) & (bottom <= height)).all()
    assert ((left >= 0) & (left <= right) & (right <= width)).all()


def test_mixed_images_stay_between_black_and_white():
    white = raw_batch()._replace(pixels_MCHW=torch.full((N, 3, 12, 16), 255, dtype=torch.uint8))
    assert (mixed(white).images_BCHW == 1).all()
