"""Parameter groups, optimizers, the learning rate, the EMA."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch

from deitkit.config import OptimConfig
from deitkit.distill import optim
from deitkit.distill.optim import (
    NEWTON_SCHULZ,
    check_optimizer_state,
    ema_update,
    eval_frozen_batchnorm,
    group_by_short_side,
    learning_rate,
    make_optimizer,
    muon_params,
    muon_step,
    newton_schulz,
    parameter_groups,
    set_trainable,
    trained_names,
    warmup_steps,
)
from deitkit.models.vit import ViT, ViTConfig

CONFIG = OptimConfig(base_lr=1e-3, warmup="10%", min_lr="1%")


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
    rates = [learning_rate(step, 100, 10, 256, CONFIG) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3 / 11)
    assert rates[10] == max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-5)
    assert all(earlier >= later for earlier, later in pairwise(rates[10:]))


def test_learning_rate_grows_with_the_batch() -> None:
    assert learning_rate(50, 100, 10, 512, CONFIG) == pytest.approx(2 * learning_rate(50, 100, 10, 256, CONFIG))


def test_one_step_has_a_learning_rate() -> None:
    assert learning_rate(0, 1, 0, 256, CONFIG) > 0


def test_rates_that_are_given_are_met_whatever_the_batch() -> None:
    """From `warmup_lr` in the first step to the peak right after the warm-up, and to `min_lr` in the last step."""
    config = OptimConfig(base_lr=1e-3, warmup_lr=1e-6, min_lr=1e-5)
    for batch_size in (256, 1024):
        rates = [learning_rate(step, 100, 20, batch_size, config) for step in range(100)]
        assert rates[0] == pytest.approx(1e-6, rel=1e-12)
        assert rates[20] == max(rates) == pytest.approx(1e-3 * batch_size / 256)
        assert rates[-1] == pytest.approx(1e-5)
        assert rates[10] == pytest.approx((rates[0] + rates[20]) / 2)
        assert all(earlier >= later for earlier, later in pairwise(rates[20:]))


def test_a_warm_up_is_a_percentage_of_the_steps_or_a_number_of_epochs_or_steps() -> None:
    assert warmup_steps(OptimConfig(warmup="10%"), 990, 7) == 99
    assert warmup_steps(OptimConfig(warmup="5ep"), 990, 7) == 35
    assert warmup_steps(OptimConfig(warmup="0.5ep"), 990, 8) == 4
    assert warmup_steps(OptimConfig(warmup="12st"), 990, 8) == 12
    assert warmup_steps(OptimConfig(warmup="0ep"), 990, 8) == 0


def test_ema_forgets_the_first_weights_and_follows_buffers() -> None:
    network, ema = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        network.weight.fill_(3.0)
    network.running_mean.fill_(5.0)
    network.num_batches_tracked.fill_(7)
    for step in range(200):
        ema_update(tensors(ema), tensors(network), 0.999, step)
    torch.testing.assert_close(ema.weight, network.weight)
    torch.testing.assert_close(ema.running_mean, network.running_mean)
    assert ema.num_batches_tracked == 7


def tensors(network: torch.nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]


def test_ema_is_the_weighted_mean_of_two() -> None:
    network, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    before = ema.weight.item()
    ema_update(tensors(ema), tensors(network), decay=0.75, step=10**6)
    assert ema.weight.item() == pytest.approx(0.75 * before + 0.25 * network.weight.item())


def small_vit(stem: str = "patch") -> ViT:
    torch.manual_seed(0)
    return ViT(
        ViTConfig(image_size=(8, 8), patch_size=(4, 4), width=8, depth=2, heads=2, stem=stem, classes=3, channels=1)
    )


def take_steps(vit: ViT, optimizer: torch.optim.Optimizer, count: int, seed: int = 0, scaler: Any = None) -> None:
    """Steps at lr 0.01 with the gradients of a loss on random images."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        heads = vit(torch.randn(4, 1, 8, 8, generator=generator))
        loss = heads.cls_BK.square().sum() + heads.dist_BK.logsumexp(-1).sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)


def same(one: ViT, other: ViT) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("stem", "kernels"), [("patch", 0), ("conv", 3), ("residual", 7)])
def test_muon_has_the_matrices_of_the_blocks_and_the_kernels_of_the_stem(stem: str, kernels: int) -> None:
    """... and AdamW has all else."""
    vit = small_vit(stem)
    optimizer = make_optimizer(vit, OptimConfig(optimizer="muon", weight_decay=0.07))
    take_steps(vit, optimizer, 1)
    own, decayed, plain = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    for name, parameter in vit.named_parameters():
        matrix = name.startswith("blocks.") and name.endswith(
            ("qkv.weight", "proj.weight", "mlp.0.weight", "mlp.2.weight")
        )
        matrix = matrix or (stem != "patch" and parameter.shape[2:] == (3, 3))
        assert [id(parameter) in group for group in (own, decayed, plain)].count(True) == 1
        assert (id(parameter) in own) == matrix, name
        assert set(optimizer.state[parameter]) == ({"momentum_buffer"} if matrix else {"step", "exp_avg", "exp_avg_sq"})
    assert len(own) == 8 + kernels
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.07, 0.07, 0.0]


def test_without_muons_part_it_is_adamw() -> None:
    """What Muon does not move moves as AdamW moves it, to the bit, as long as it gets the same gradients."""
    ours, plain = small_vit(), small_vit()
    take_steps(ours, make_optimizer(ours, OptimConfig(optimizer="muon")), 1)
    take_steps(plain, make_optimizer(plain, OptimConfig()), 1)
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        matrix = any(one is matrix for matrix in muon_params(ours))
        assert torch.equal(one, other) != matrix, name


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 40)])
def test_muon_moves_a_matrix_as_torchs_own_does(shape: tuple[int, int]) -> None:
    """Which computes in bfloat16, so that single entries differ; over ten steps the paths stay together."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, momentum, theirs = start.clone(), torch.zeros(shape), torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        gradient = torch.randn(shape, generator=generator)
        muon_step([ours], [gradient], [momentum], 1e-2, 0.1)
        theirs.grad = gradient
        optimizer.step()
    way = (theirs.detach() - start).norm()
    assert (ours - theirs.detach()).norm() < 0.01 * way


def test_newton_schulz_keeps_directions_and_levels_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 20, generator=generator)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    for scale in (1e-4, 1.0, 1e4):
        levelled = u.T @ newton_schulz([scale * matrix])[0] @ vh.T
        assert ((levelled.diagonal() > 0.65) & (levelled.diagonal() < 1.25)).all()
        torch.testing.assert_close(levelled, torch.diag(levelled.diagonal()), atol=1e-4, rtol=0)
    torch.testing.assert_close(newton_schulz([matrix.T])[0], newton_schulz([matrix])[0].mT)
    assert not newton_schulz([torch.zeros(3, 4)])[0].any()
    assert s.max() / s.min() > 2  # there was something to level


@pytest.mark.parametrize("shape", [(32, 32), (32, 288), (128, 384)])
@pytest.mark.parametrize("kind", ["full", "nearly of rank one", "over six decades", "all equal"])
@pytest.mark.parametrize("autocast", [False, True])
def test_steps_on_the_gram_matrix_are_those_on_the_matrix_itself(
    shape: tuple[int, int], kind: str, autocast: bool
) -> None:
    """Newton-Schulz as it is written down (Jordan et al. 2024), in float64; in float32 here, whatever stands around it."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    if kind == "nearly of rank one":
        matrix = torch.outer(matrix[:, 0], matrix[0]) + 1e-4 * matrix
    elif kind == "over six decades":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        matrix = u @ torch.diag(torch.logspace(0, -6, len(s))) @ vh
    elif kind == "all equal":
        matrix = torch.ones(shape)
    x = matrix.double() / matrix.double().norm()
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = newton_schulz([torch.zeros(shape), matrix])
    assert not found[0].any()
    assert (found[1] - x).norm() < (5e-3 if kind == "all equal" else 1e-3) * x.norm()


def test_weights_of_one_side_are_moved_together_but_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(4, 8), (8, 4), (4, 8), (4, 2, 2, 2), (4, 16), (5, 8), (4, 8)]
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    places = {id(weight): place for place, weight in enumerate(weights)}
    found = [[places[id(weight)] for weight in alike] for alike in group_by_short_side(weights)]
    assert found == [[0, 1, 2, 3, 6, 4], [5]]
    monkeypatch.setattr(optim, "MOST_AT_ONCE", {"cpu": 2 * 32 + 31})
    found = [[places[id(weight)] for weight in alike] for alike in group_by_short_side(weights)]
    assert found == [[0, 1], [2, 3], [6], [4], [5]]


def test_matrices_that_are_moved_together_move_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 6), (6, 9), (9, 6), (6, 2, 3, 3), (6, 18)]
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [10.0**place * torch.randn(shape, generator=generator) for place, shape in enumerate(shapes)]
    together = [start.clone() for start in starts]
    muon_step(together, gradients, [torch.zeros_like(start) for start in starts], 1e-2, 0.1)
    for start, gradient, moved in zip(starts, gradients, together, strict=True):
        alone = start.clone()
        muon_step([alone], [gradient], [torch.zeros_like(start)], 1e-2, 0.1)
        torch.testing.assert_close(moved, alone, atol=1e-6, rtol=1e-5)
        assert not torch.equal(moved, start)


def test_muons_steps_are_as_large_as_adamws() -> None:
    """Root mean square of the first step over lr: about 0.2, Liu et al.'s figure for AdamW, whatever the shape."""
    for shape in ((64, 64), (192, 64), (64, 256)):
        weight = torch.zeros(shape)
        muon_step([weight], [torch.randn(shape)], [torch.zeros(shape)], 1e-3, 0.0)
        assert weight.square().mean().sqrt().item() / 1e-3 == pytest.approx(0.2, rel=0.25)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_takes_a_kernel_for_the_matrix_of_all_its_inputs(layout: torch.memory_format) -> None:
    kernel = torch.randn(8, 4, 3, 3)
    gradient = torch.randn(kernel.shape)
    matrix = kernel.flatten(1).clone()
    muon_step([matrix], [gradient.flatten(1)], [torch.zeros_like(matrix)], 1e-2, 0.05)
    kernel = kernel.to(memory_format=layout)
    muon_step([kernel], [gradient.to(memory_format=layout)], [torch.zeros_like(kernel)], 1e-2, 0.05)
    assert torch.equal(kernel.flatten(1), matrix)


def test_muons_state_restored_goes_on_with_the_same_bits() -> None:
    config = OptimConfig(optimizer="muon")
    whole, broken, forgetful = small_vit(), small_vit(), small_vit()
    optimizer, first = make_optimizer(whole, config), make_optimizer(broken, config)
    take_steps(whole, optimizer, 2)
    take_steps(whole, optimizer, 3, seed=1)
    take_steps(broken, first, 2)
    resumed = make_optimizer(broken, config)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(broken, resumed, 3, seed=1)
    assert same(whole, broken)
    take_steps(forgetful, make_optimizer(forgetful, config), 2)
    take_steps(forgetful, make_optimizer(forgetful, config), 3, seed=1)
    assert not same(whole, forgetful)


def test_muon_under_a_gradient_scaler() -> None:
    """Scaled gradients are scaled back before either part steps, and a step with an infinite one is left out."""
    config = OptimConfig(optimizer="muon")
    plain, scaled = small_vit(), small_vit()
    take_steps(plain, make_optimizer(plain, config), 3)
    optimizer = make_optimizer(scaled, config)
    take_steps(scaled, optimizer, 3, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert same(plain, scaled)
    take_steps(scaled, optimizer, 1, scaler=torch.amp.GradScaler("cpu", init_scale=3e38))
    assert same(plain, scaled)


LAMB = OptimConfig(optimizer="lamb", weight_decay=0.07)


def test_lamb_is_timms_without_its_clipping() -> None:
    """Bit for bit over five steps; with timm's own clipping it would be another path, for these gradients are large."""
    from timm.optim import Lamb

    ours, theirs, clipped = small_vit(), small_vit(), small_vit()
    take_steps(ours, make_optimizer(ours, LAMB), 5)
    settings = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
    take_steps(theirs, Lamb(parameter_groups(theirs, 0.07), **settings, max_grad_norm=None), 5)
    take_steps(clipped, Lamb(parameter_groups(clipped, 0.07), **settings, max_grad_norm=1.0), 5)
    assert same(ours, theirs)
    assert not same(ours, clipped)


def test_lamb_moves_decayed_weights_by_a_share_of_their_length_and_others_as_adamw() -> None:
    """With lr 0.01 every matrix and kernel moves by 1 % of its own norm."""
    ours, adamw, start = small_vit(), small_vit(), small_vit()
    take_steps(ours, make_optimizer(ours, LAMB), 1)
    take_steps(adamw, make_optimizer(adamw, LAMB.model_copy(update={"optimizer": "adamw"})), 1)
    for name, now in ours.named_parameters():
        before, adams = start.get_parameter(name), adamw.get_parameter(name)
        if name.endswith("weight") and now.ndim > 1:
            assert ((now - before).norm() / before.norm()).item() == pytest.approx(0.01, rel=1e-3), name
        else:
            torch.testing.assert_close(now, adams, rtol=1e-5, atol=1e-6)
            assert not torch.equal(now, before), name


def test_lambs_state_restored_weight_by_weight_goes_on_with_the_same_bits() -> None:
    """As from a checkpoint, which keeps what belongs to the weights and nothing that belongs to a group."""
    whole, broken, forgetful = small_vit(), small_vit(), small_vit()
    optimizer, first = make_optimizer(whole, LAMB), make_optimizer(broken, LAMB)
    take_steps(whole, optimizer, 2)
    take_steps(whole, optimizer, 3, seed=1)
    take_steps(broken, first, 2)
    saved = copy.deepcopy(first.state_dict()["state"])
    assert all(check_optimizer_state(weight, saved[number]) for number, weight in enumerate(weights_of(first)))
    resumed = make_optimizer(broken, LAMB)
    resumed.load_state_dict({"state": saved, "param_groups": resumed.state_dict()["param_groups"]})
    take_steps(broken, resumed, 3, seed=1)
    assert same(whole, broken)
    saved = {number: {**slots, "step": torch.tensor(0.0)} for number, slots in first.state_dict()["state"].items()}
    take_steps(forgetful, make_optimizer(forgetful, LAMB), 2)
    unaware = make_optimizer(forgetful, LAMB)
    unaware.load_state_dict({"state": saved, "param_groups": unaware.state_dict()["param_groups"]})
    take_steps(forgetful, unaware, 3, seed=1)
    assert not same(whole, forgetful)


def weights_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def test_lamb_under_a_gradient_scaler() -> None:
    plain, scaled = small_vit(), small_vit()
    take_steps(plain, make_optimizer(plain, LAMB), 3)
    optimizer = make_optimizer(scaled, LAMB)
    take_steps(scaled, optimizer, 3, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert same(plain, scaled)
    take_steps(scaled, optimizer, 1, scaler=torch.amp.GradScaler("cpu", init_scale=3e38))
    assert same(plain, scaled)


def test_a_state_that_cannot_be_is_seen() -> None:
    weight, moments = torch.zeros(2, 3), {"exp_avg": torch.zeros(2, 3), "exp_avg_sq": torch.zeros(2, 3)}
    assert check_optimizer_state(weight, {**moments, "step": torch.tensor(1.0)})
    assert check_optimizer_state(weight, {"momentum_buffer": torch.zeros(2, 3)})
    assert not check_optimizer_state(weight, {"momentum_buffer": torch.zeros(3, 2)})
    assert not check_optimizer_state(weight, moments)
    assert not check_optimizer_state(weight, {})


def test_layer_decay_gives_each_layer_its_share_of_the_rate() -> None:
    vit = small_vit()
    groups = parameter_groups(vit, 0.05, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    scales = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert scales.keys() == set(names.values())  # each once: a dictionary would hide a second
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert scales["head.weight"] == scales["head_dist.weight"] == (1.0, 0.05)
    assert scales["norm.weight"] == (1.0, 0.0)
    assert scales["blocks.1.attn.qkv.weight"] == (0.5, 0.05)
    assert scales["blocks.0.mlp.2.bias"] == (0.25, 0.0)
    assert scales["stem.proj.weight"] == (0.125, 0.05)
    assert scales["pos_embed"] == scales["cls_token"] == (0.125, 0.0)
    assert scales["dist_token"] == (1.0, 0.0)  # as fresh as its head, where weights have none


def test_without_layer_decay_there_are_the_two_groups_that_checkpoints_number() -> None:
    groups = parameter_groups(small_vit(), 0.05)
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [(0.05, 1.0), (0.0, 1.0)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_layer_decay_moves_lower_blocks_less(optimizer: str) -> None:
    """At a decay of a thousandth, by about a thousandth of the next block's step."""
    vit = small_vit()
    config = OptimConfig(optimizer=optimizer, layer_decay=1e-3, weight_decay=0.0)
    chosen = make_optimizer(vit, config)
    before = {name: parameter.detach().clone() for name, parameter in vit.named_parameters()}
    for group in chosen.param_groups:
        group["lr"] = 1e-2 * group["lr_scale"]
    sum(head.square().mean() for head in vit(torch.randn(4, 1, 8, 8))).backward()
    chosen.step()
    moved = {name: (p - before[name]).detach().norm().item() for name, p in vit.named_parameters()}
    upper, lower = (moved[f"blocks.{number}.mlp.0.weight"] for number in (1, 0))
    assert lower / upper == pytest.approx(1e-3, rel=0.3)
    assert moved["head.weight"] > 100 * upper


@pytest.mark.parametrize(
    ("trainable", "learns"),
    [
        ("attention", {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.attn.qkv", "blocks.1.attn.proj"}),
        ("last-0", set()),
        ("last-1", {"norm", "blocks.1.norm1", "blocks.1.norm2", "blocks.1.attn.qkv", "blocks.1.attn.proj",
                    "blocks.1.mlp.0", "blocks.1.mlp.2"}),
    ],
)  # fmt: skip
def test_tuning_trains_the_named_layers_the_heads_and_the_distillation_token(trainable: str, learns: set[str]) -> None:
    vit = small_vit()
    modules = learns | {"head", "head_dist"}
    expected = {f"{module}.{end}" for module in modules for end in ("weight", "bias")} | {"dist_token"}
    assert trained_names(vit, trainable, depth=2) == expected
    assert trained_names(vit, "all", depth=2) == {name for name, _ in vit.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_weights_are_in_no_group(optimizer: str) -> None:
    vit = small_vit()
    set_trainable(vit, trained_names(vit, "attention", depth=2))
    chosen = make_optimizer(vit, OptimConfig(optimizer=optimizer))
    held = {id(p) for group in chosen.param_groups for p in group["params"]}
    assert held == {id(p) for p in vit.parameters() if p.requires_grad}
    assert len(held) == 2 * 4 + 2 * 2 + 1


def test_frozen_batch_norms_rest_and_others_do_not() -> None:
    vit = small_vit("conv").train()
    set_trainable(vit, {"stem.layers.1.weight"})
    eval_frozen_batchnorm(vit)
    norms = [module for module in vit.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert [norm.training for norm in norms] == [True, *[False] * (len(norms) - 1)]
    assert len(norms) > 1
