"""A single step of the loop."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from tests.fakes import HeldImages
from tests.test_feed import HELD_VIEW

from deitkit.config import LoopConfig, LossConfig, OptimConfig, ViTConfig
from deitkit.feed import TrainFeed
from deitkit.network import Network
from deitkit.optim import learning_rate, make_optimizer
from deitkit.training import Plan, State, no_teacher, train_step
from deitkit.vit import ViT
from deitkit.zoo import student_preprocessing


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_moves_every_layer_at_its_share_of_the_rate(optimizer: str) -> None:
    """The rate of the step, a thousandth of it for the last block, and so on down to positions and patches."""
    layer_decay, total, warmup, images = 1e-3, 4, 2, 16
    config = ViTConfig(image_size=(8, 8), channels=1, classes=10, patch_size=(4, 4), width=16, depth=2, heads=2)
    torch.manual_seed(0)
    network = Network(ViT(config), student_preprocessing(config, photos=False))
    optim = OptimConfig.model_validate(
        {"optimizer": optimizer, "lr_per_256_images": 1.6, "layer_decay": layer_decay, "weight_decay": 0}
    )
    plan = Plan(
        view=HELD_VIEW,
        loss=LossConfig(distil_target="labels"),
        optim=optim,
        loop=LoopConfig(batch_size=images),
        total_steps=total,
        warmup_steps=warmup,
    )
    crops = TrainFeed(HeldImages(images), HELD_VIEW, batch_size=images, seed=1).crops(1)
    before = {name: parameter.detach().clone() for name, parameter in network.body.named_parameters()}
    state = State(network=network, optimizer=make_optimizer(network, optim), average=None, step=1)
    train_step(state, crops, no_teacher, plan, Accelerator(cpu=True), images)
    rate = learning_rate(1, total, warmup, images, optim)
    shares = sorted({group["lr"] / rate for group in state.optimizer.param_groups})
    expected = [layer_decay**3, layer_decay**2, layer_decay, 1.0]
    assert sorted({float(f"{share:.6g}") for share in shares}) == pytest.approx(expected, rel=1e-5)
    moved = {name: (p.detach() - before[name]).norm().item() for name, p in network.body.named_parameters()}
    upper, lower = (moved[f"blocks.{number}.mlp.0.weight"] for number in (1, 0))
    assert lower / upper == pytest.approx(layer_decay, rel=0.3)
