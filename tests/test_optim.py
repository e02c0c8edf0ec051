"""Parameter groups, the learning rate, the moving average."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from deitkit.config import OptimConfig, ViTConfig
from deitkit.optim import learning_rate, parameter_groups, update_average
from deitkit.vit import ViT

CONFIG = OptimConfig(lr_per_256_images=1e-3, warmup_share=0.1, lr_end_share=0.01)


@pytest.mark.parametrize("stem", ["patch", "conv", "residual"])
def test_biases_norms_tokens_and_positions_are_not_decayed(stem: str) -> None:
    vit = ViT(ViTConfig(image_size=(8, 8), patch_size=(4, 4), width=8, depth=1, heads=2, stem=stem, classes=3))
    decayed, plain = ({id(p) for p in group["params"]} for group in parameter_groups(vit, 0.05))
    for name, parameter in vit.named_parameters():
        should = name.endswith("weight") and parameter.ndim > 1
        assert (id(parameter) in decayed) == should, name
        assert (id(parameter) in plain) != should, name
    assert id(vit.pos_embed) in plain
    assert id(vit.dist_token) in plain


def test_learning_rate_warms_up_peaks_and_falls_to_its_end() -> None:
    rates = [learning_rate(step, 100, 256, CONFIG) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3 / 11)
    assert rates[10] == max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-5)
    assert all(earlier >= later for earlier, later in pairwise(rates[10:]))


def test_learning_rate_grows_with_the_batch() -> None:
    assert learning_rate(50, 100, 512, CONFIG) == pytest.approx(2 * learning_rate(50, 100, 256, CONFIG))


def test_one_step_has_a_learning_rate() -> None:
    assert learning_rate(0, 1, 256, CONFIG) > 0


def test_average_forgets_the_first_weights_and_follows_buffers() -> None:
    network, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        network.weight.fill_(3.0)
    network.running_mean.fill_(5.0)
    network.num_batches_tracked.fill_(7)
    for step in range(200):
        update_average(average, network, 0.9, step)
    torch.testing.assert_close(average.weight, network.weight)
    torch.testing.assert_close(average.running_mean, network.running_mean)
    assert average.num_batches_tracked == 7


def test_average_is_the_weighted_mean_of_two() -> None:
    network, average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    before = average.weight.item()
    update_average(average, network, decay=0.75, step=10**6)
    assert average.weight.item() == pytest.approx(0.75 * before + 0.25 * network.weight.item())
