"""The student against the paper, and against an implementation that others wrote."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deitkit.models.vit import (
    ResidualBlock,
    ViT,
    ViTConfig,
    attend,
    initialise,
    mimic_trained_attention,
    resized_positions,
    stochastic_depth_rates,
)

SMALL = ViTConfig(image_size=(16, 24), channels=1, classes=5, patch_size=(4, 8), width=32, depth=3, heads=4)


def test_distillation_token_and_head_exist_only_when_asked_for() -> None:
    plain = ViT(SMALL.model_copy(update={"distillation_token": False}))
    deit = ViT(SMALL)
    images = torch.rand(2, 1, 16, 24)
    assert plain(images).dist_BK is None
    assert plain(images).cls_BK.shape == deit(images).dist_BK.shape == (2, 5)
    extra = 32 + 32 + 32 * 5 + 5  # token, its position, its head
    assert sum(p.numel() for p in deit.parameters()) - sum(p.numel() for p in plain.parameters()) == extra


def test_training_and_evaluation_answer_alike() -> None:
    vit = ViT(SMALL)
    images = torch.rand(2, 1, 16, 24)
    for ours, theirs in zip(vit.train()(images), vit.eval()(images), strict=True):
        assert torch.equal(ours, theirs)


def test_residual_stem_begins_as_its_plain_convolutions() -> None:
    config = ViTConfig(image_size=(16, 16), patch_size=(4, 4), width=32, depth=1, heads=2, classes=3, stem="residual")
    residual = ViT(config).stem.eval()
    assert sum(isinstance(layer, ResidualBlock) for layer in residual.layers) == 2  # one after each halving
    plain = torch.nn.Sequential(*(layer for layer in residual.layers if not isinstance(layer, ResidualBlock)))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(residual(images), plain(images))
    assert residual(images).shape == (2, 32, 4, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"stem": "patch"}, {"stem": "conv"}, {"stem": "residual"}, {"layer_scale": 0.5},
        {"position_of_prefix": False}, {"position_of_prefix": False, "distillation_token": False},
    ],
)  # fmt: skip
def test_no_parameter_is_forgotten_by_the_initialisation(change: dict[str, Any]) -> None:
    shape = {"image_size": (16, 16), "patch_size": (4, 4), "width": 32, "depth": 2, "heads": 2, "classes": 3}
    vit = ViT(ViTConfig(**shape, **change))
    assert all(torch.isfinite(parameter).all() for parameter in vit.parameters())


def test_layer_scale_begins_at_its_value_and_multiplies_both_branches() -> None:
    vit = ViT(SMALL.model_copy(update={"layer_scale": 1e-4}))
    block = vit.blocks[1]
    assert (block.scale1 == 1e-4).all()
    assert (block.scale2 == 1e-4).all()
    tokens_BTD, factors_D = torch.randn(2, 3, 32), torch.randn(32)
    with torch.no_grad():
        block.scale1.copy_(factors_D)
        block.scale2.zero_()
        expected = tokens_BTD + factors_D * block.attn(block.norm1(tokens_BTD))
        torch.testing.assert_close(block(tokens_BTD, None), expected)
        block.scale1.zero_()
        block.scale2.copy_(factors_D)
        expected = tokens_BTD + factors_D * block.mlp(block.norm2(tokens_BTD))
        torch.testing.assert_close(block(tokens_BTD, None), expected)
        torch.testing.assert_close(block(tokens_BTD, torch.zeros(2, 2)), tokens_BTD)


def test_positions_of_patches_alone_leave_the_tokens_as_they_are() -> None:
    vit = ViT(SMALL.model_copy(update={"position_of_prefix": False}))
    assert vit.pos_embed.shape == (1, 12, 32)
    images = torch.rand(2, 1, 16, 24)
    embedded = vit.embed(images)
    assert torch.equal(embedded[:, 0], vit.cls_token[0].expand(2, -1))
    assert torch.equal(embedded[:, 1], vit.dist_token[0].expand(2, -1))
    assert torch.equal(embedded[:, 2:], vit.stem(images).flatten(2).transpose(1, 2) + vit.pos_embed)


def test_a_shape_of_millions_of_tokens_is_refused_before_it_is_built() -> None:
    with pytest.raises(ValueError, match=r"262,146 tokens are too many \(65,536 at most\)"):
        ViTConfig(image_size=(1024, 1024), patch_size=(2, 2), width=32, depth=2, heads=2, classes=3)


def test_initialisation_notices_a_parameter_that_it_does_not_know() -> None:
    vit = ViT(SMALL)
    vit.extra = torch.nn.Parameter(torch.ones(3))
    initialise(vit, 0)
    assert torch.isnan(vit.extra).all()


def test_mimetic_attention_is_near_the_identity_and_the_same_for_the_same_seed() -> None:
    """Of query and key, as far as a head has so many dimensions, 0.7 of it; of value and output -0.4."""
    shape = {"image_size": (16, 16), "patch_size": (4, 4), "width": 64, "depth": 2, "classes": 3}
    for heads in (1, 4):
        vit = ViT(ViTConfig(**shape, heads=heads))
        before = {name: weight.clone() for name, weight in vit.state_dict().items()}
        mimic_trained_attention(vit, 3)
        changed = {name for name, weight in vit.state_dict().items() if not torch.equal(weight, before[name])}
        assert changed == {f"blocks.{block}.attn.{part}.weight" for block in (0, 1) for part in ("qkv", "proj")}
        again = ViT(ViTConfig(**shape, heads=heads))
        mimic_trained_attention(again, 3)
        for block, other in zip(vit.blocks, again.blocks, strict=True):
            assert torch.equal(block.attn.qkv.weight, other.attn.qkv.weight)
            query_DD, key_DD, value_DD = block.attn.qkv.weight.detach().chunk(3)
            output_DD = value_DD.T @ block.attn.proj.weight.detach().T
            assert output_DD.diagonal().mean().item() == pytest.approx(-0.4, abs=0.05)
            assert (output_DD - output_DD.diagonal().diag()).std().item() == pytest.approx(0.4 / 64**0.5, rel=0.1)
            for query_KD, key_KD in zip(query_DD.chunk(heads), key_DD.chunk(heads), strict=True):
                diagonal = (query_KD.T @ key_KD).diagonal().mean().item()
                assert diagonal == pytest.approx(0.7, abs=0.05) if heads == 1 else diagonal > 0.2
        assert not torch.equal(vit.blocks[0].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)


def test_students_with_and_without_a_distillation_token_begin_with_the_same_weights() -> None:
    weights = []
    for token in (True, False):
        torch.manual_seed(3)
        vit = ViT(SMALL.model_copy(update={"distillation_token": token, "stem": "patch"}))
        weights.append(dict(vit.named_parameters()))
    deit, plain = weights
    for name, parameter in plain.items():
        theirs = torch.cat([deit[name][:, :1], deit[name][:, 2:]], dim=1) if name == "pos_embed" else deit[name]
        assert torch.equal(theirs, parameter), name


def test_seeds_and_tensors_of_one_shape_begin_with_other_weights() -> None:
    drawn = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        vit = ViT(SMALL)
        drawn += [vit.blocks[0].attn.proj.weight, vit.blocks[1].attn.proj.weight]
    drawn.append(ViT(SMALL).blocks[0].attn.proj.weight)  # the same seed goes on
    assert all(not torch.equal(a, b) for place, a in enumerate(drawn) for b in drawn[:place])


def test_tokens_are_truncated_normal_with_standard_deviation_002() -> None:
    vit = ViT(ViTConfig(image_size=(32, 32), width=768, depth=1, heads=12))
    for token in (vit.cls_token, vit.dist_token, vit.pos_embed):
        assert token.std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(vit.cls_token, vit.dist_token)


@pytest.mark.parametrize("dropping", [False, True])
def test_the_last_block_of_the_tokens_that_are_read_gives_what_the_whole_block_gives(dropping: bool) -> None:
    vit = ViT(SMALL).double()
    images = torch.rand(2, 1, 16, 24, dtype=torch.float64)
    keep_LB = (
        torch.tensor([[1.0, 0], [2, 1], [0, 1], [1, 1], [1, 2], [2, 0]], dtype=torch.float64) if dropping else None
    )
    torch.stack([*vit(images, keep_LB)]).square().sum().backward()
    read = [parameter.grad.clone() for parameter in vit.parameters()]
    vit.zero_grad()
    tokens_BTD = vit.embed(images)
    for layer, block in enumerate(vit.blocks):
        tokens_BTD = block(tokens_BTD, None if keep_LB is None else keep_LB[2 * layer : 2 * layer + 2])
    heads = vit.apply_heads(tokens_BTD)
    torch.testing.assert_close(vit(images, keep_LB), heads)
    torch.stack([*heads]).square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in vit.parameters()], read)


@pytest.mark.parametrize("shape", [(2, 1, 16, 20), (2, 1, 14, 24), (2, 3, 16, 24)])
def test_images_in_no_whole_patches_or_other_channels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected images of shape"):
        ViT(SMALL)(torch.rand(*shape))


@pytest.mark.parametrize("of_prefix", [True, False])
def test_images_of_another_size_are_seen_as_by_a_student_of_that_size(of_prefix: bool) -> None:
    """One whose positions are the larger one's, resampled."""
    vit = ViT(SMALL.model_copy(update={"position_of_prefix": of_prefix}))
    smaller = ViT(vit.config.model_copy(update={"image_size": (12, 16)}))
    prefix = vit.config.prefix_positions
    weights = vit.state_dict()
    patches = resized_positions(weights["pos_embed"][:, prefix:], vit.config.grid, (3, 2), smooth=True)
    smaller.load_state_dict(weights | {"pos_embed": torch.cat([weights["pos_embed"][:, :prefix], patches], 1)})
    images = torch.rand(2, 1, 12, 16)
    torch.testing.assert_close(vit(images), smaller(images))


def test_every_position_learns_from_images_a_third_as_large() -> None:
    """Without antialiasing eight of nine would have no gradient."""
    vit = ViT(SMALL.model_copy(update={"image_size": (24, 48)}))
    torch.stack([*vit(torch.rand(2, 1, 8, 16))]).square().sum().backward()
    assert vit.pos_embed.grad.abs().sum(-1).min() > 0


def test_dropped_branch_leaves_the_image_as_it_was() -> None:
    """An image whose branches are all dropped passes the blocks unchanged; its neighbour does not notice."""
    vit = ViT(SMALL)
    images = torch.rand(2, 1, 16, 24)
    keep_LB = torch.ones(6, 2)
    keep_LB[:, 0] = 0
    heads = vit(images, keep_LB)
    unchanged = vit.head(vit.norm(vit.embed(images)[:, 0]))
    torch.testing.assert_close(heads.cls_BK[0], unchanged[0])
    torch.testing.assert_close(heads.cls_BK[1], vit(images).cls_BK[1])


def test_stochastic_depth_rises_linearly_to_its_rate() -> None:
    assert stochastic_depth_rates(3, 0.2) == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2])


def test_both_tokens_attend_to_every_patch() -> None:
    vit = ViT(SMALL)
    images = torch.rand(1, 1, 16, 24, requires_grad=True)
    for logits in vit(images):
        (gradient,) = torch.autograd.grad(logits.sum(), images, retain_graph=True)
        assert (gradient != 0).float().mean() > 0.99


def test_attention_in_bfloat16_on_a_cpu_is_that_of_float32_but_for_rounding() -> None:
    drawn = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = torch.rand(2, 4, 7, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for kind in (torch.float32, torch.bfloat16):
        parts = drawn.to(kind).requires_grad_()
        mixed = attend(*parts)
        assert mixed.dtype == kind
        (gradient,) = torch.autograd.grad((mixed.float() * weights).sum(), parts)
        found.append((mixed.detach().float(), gradient.float()))
    for exact, rounded in zip(*found, strict=True):
        torch.testing.assert_close(rounded, exact, atol=0.03, rtol=0.02)
        assert (rounded - exact).abs().mean() < 0.005
