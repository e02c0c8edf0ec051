"""A single step of the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tests.fakes import HeldImages
from tests.views.test_loader import HELD_VIEW

from deitkit.config import LoopConfig, LossConfig, OptimConfig
from deitkit.distill.losses import TeacherOutput, batch_mean
from deitkit.distill.optim import learning_rate, make_optimizer
from deitkit.distill.step import Plan, State, StepResult, gradient_ratio, stochastic_depth, train_step
from deitkit.distill.teacher import no_teacher
from deitkit.models.network import Heads, Network
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.zoo import student_preprocessing
from deitkit.training.loop import EpochLog
from deitkit.views.loader import TrainLoader, augment_and_mix
from deitkit.views.mixup import Batch, mix


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_moves_every_layer_at_its_share_of_the_rate(optimizer: str) -> None:
    """The rate of the step, a thousandth of it for the last block, and so on down to positions and patches."""
    layer_decay, total, warmup, images = 1e-3, 4, 2, 16
    config = ViTConfig(image_size=(8, 8), channels=1, classes=10, patch_size=(4, 4), width=16, depth=2, heads=2)
    torch.manual_seed(0)
    network = Network(ViT(config), student_preprocessing(config, photos=False))
    optim = OptimConfig.model_validate(
        {"optimizer": optimizer, "base_lr": 1.6, "layer_decay": layer_decay, "weight_decay": 0}
    )
    plan = Plan(
        view=HELD_VIEW,
        loss=LossConfig(distil="labels"),
        optim=optim,
        loop=LoopConfig(batch_size=images),
        total_steps=total,
        warmup_steps=warmup,
    )
    crops = TrainLoader(HeldImages(images), HELD_VIEW, batch_size=images, seed=1).batch(1)
    before = {name: parameter.detach().clone() for name, parameter in network.body.named_parameters()}
    state = State(network=network, optimizer=make_optimizer(network, optim), ema=None, step=1)
    train_step(state, crops, no_teacher, plan, Accelerator(cpu=True))
    rate = learning_rate(1, total, warmup, images, optim)
    shares = sorted({group["lr"] / rate for group in state.optimizer.param_groups})
    expected = [layer_decay**3, layer_decay**2, layer_decay, 1.0]
    assert sorted({float(f"{share:.6g}") for share in shares}) == pytest.approx(expected, rel=1e-5)
    moved = {name: (p.detach() - before[name]).norm().item() for name, p in network.body.named_parameters()}
    upper, lower = (moved[f"blocks.{number}.mlp.0.weight"] for number in (1, 0))
    assert lower / upper == pytest.approx(layer_decay, rel=0.3)


def plan_of(**changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "view": HELD_VIEW, "loss": LossConfig(), "optim": OptimConfig(), "loop": LoopConfig(), "total_steps": 5,
    }  # fmt: skip
    return Plan(**{**settings, **changes})


def result_of(plan: Plan, heads: Heads, batch: Batch, output: TeacherOutput) -> StepResult:
    """What a step with these logits returns."""
    label = batch_mean(plan.label_loss(heads.cls_BK, batch), batch, len(batch.labels_B))
    teacher = batch_mean(plan.teacher_loss(plan.distilled(heads), output, batch), batch, len(batch.labels_B))
    return StepResult(plan.label_weight * label + plan.teacher_weight * teacher, label, teacher, heads, batch, output)


def test_stochastic_depth_drops_images_at_its_rate_and_keeps_the_mean() -> None:
    """By image, not by row; another step or seed drops others."""
    plan, index_B = plan_of(drop_rates=(0.0, 0.25)), torch.arange(8000)
    keep_LB = stochastic_depth(plan, 3, index_B)
    assert keep_LB is not None
    assert (keep_LB[0] == 1).all()
    assert set(keep_LB[1].tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert keep_LB[1].mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(stochastic_depth(plan, 3, index_B.flip(0)), keep_LB.flip(1))
    other_seed = plan_of(drop_rates=(0.0, 0.25), loop=LoopConfig(seed=1))
    for other in (stochastic_depth(plan, 4, index_B), stochastic_depth(other_seed, 3, index_B)):
        assert not torch.equal(other, keep_LB)
    assert stochastic_depth(plan_of(drop_rates=(0.0, 0.0)), 3, index_B) is None


def test_gradients_of_all_weights_together_are_clipped_to_the_norm() -> None:
    config = ViTConfig(image_size=(8, 8), channels=1, classes=10, patch_size=(4, 4), width=16, depth=1, heads=2)
    network = Network(ViT(config), student_preprocessing(config, photos=False))
    plan = plan_of(optim=OptimConfig(max_grad_norm=1e-3), loop=LoopConfig(batch_size=16))
    optimizer, norms = make_optimizer(network, plan.optim), []

    def noted() -> None:
        gradients = [weight.grad.norm() for weight in network.parameters() if weight.grad is not None]
        norms.append(torch.stack(gradients).norm().item())

    optimizer.step = noted  # type: ignore[method-assign]
    crops = TrainLoader(HeldImages(16), HELD_VIEW, batch_size=16, seed=1).batch(0)
    train_step(State(network=network, optimizer=optimizer, ema=None), crops, no_teacher, plan, Accelerator(cpu=True))
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_the_last_step_sees_no_small_images() -> None:
    for steps in range(1, 9):
        assert steps // 2 <= plan_of(low_res_size=(4, 4), total_steps=steps).low_res_steps < steps
    assert plan_of().low_res_steps == 0


def test_an_epoch_s_line_has_the_agreement_of_the_head_that_is_taught() -> None:
    """Of four images, with the distillation head on three and the class head on none."""
    crops = TrainLoader(HeldImages(4), HELD_VIEW, batch_size=4, seed=1).batch(0)
    batch = mix(crops, HELD_VIEW)
    teacher_K = torch.eye(10)[torch.tensor([1, 2, 3, 4])]
    heads = Heads(teacher_K.roll(1, dims=1), torch.cat([teacher_K[:3], teacher_K[:1]]))
    answers = TeacherOutput(torch.tensor([1, 2, 3, 4]), None)
    plan = plan_of(loss=LossConfig(distillation="hard"))
    log = EpochLog(Accelerator(cpu=True))
    log.add(result_of(plan, heads, batch, answers), plan, 4)
    row = log.row(1.0)
    assert row["train_agreement"] == 0.75
    assert row["clock"]["images_per_second"] == 4
    assert row["loss"]["total"] == pytest.approx(0.5 * row["loss"]["label"] + 0.5 * row["loss"]["teacher"])


def test_the_ratio_of_the_gradients_is_the_mean_of_every_eighth_step() -> None:
    log, plan = EpochLog(Accelerator(cpu=True)), plan_of(loss=LossConfig(distillation="soft", temperature=3.0))
    loader = TrainLoader(HeldImages(160), HELD_VIEW, batch_size=16, seed=1)
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for step in range(10):
        batch = augment_and_mix(loader.batch(step), HELD_VIEW)
        cls_BK, dist_BK, said_BK = ((step + 1) * torch.randn(16, 10, generator=generator) for _ in range(3))
        heads, answers = Heads(cls_BK, dist_BK), TeacherOutput(said_BK.argmax(-1), said_BK)
        result = result_of(plan, heads, batch, answers)
        log.add(result, plan, 16)
        ratios.append(gradient_ratio(result, plan).item())
    assert len(set(ratios)) == 10
    assert log.row(1.0)["loss"]["gradient_ratio"] == pytest.approx((ratios[0] + ratios[8]) / 2, rel=1e-5)
