"""Names of tensors against timm's, transformers' and the original's: nothing changes on the way, and the logits are theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.weights import LAYOUTS, from_ours, to_ours
from deitkit.models.zoo import STUDENTS
from deitkit.terminal import UserError

SMALL = ViTConfig(image_size=(16, 16), classes=5, patch_size=(4, 4), width=32, depth=2, heads=4)
PLAIN = SMALL.model_copy(update={"distillation_token": False})
DEIT3 = PLAIN.model_copy(update={"layer_scale": 1e-4, "position_of_prefix": False})
TOLERANCE = 1e-5


@torch.no_grad()
def perturbed(network: nn.Module) -> nn.Module:
    """With every tensor moved away from its initial value, biases, tokens, norms and LayerScale too."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def of_timm(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(4)
    network: nn.Module = timm.create_model(name, **options)
    return perturbed(network)


def of_hugging_face(kind: str, config: ViTConfig) -> nn.Module:
    torch.manual_seed(4)
    networks = {
        "teacher": transformers.DeiTForImageClassificationWithTeacher,
        "deit": transformers.DeiTForImageClassification,
        "vit": transformers.ViTForImageClassification,
    }
    settings = transformers.ViTConfig if kind == "vit" else transformers.DeiTConfig
    network: nn.Module = networks[kind](
        settings(
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=int(config.width * config.mlp_ratio),
            image_size=config.image_size[0],
            patch_size=config.patch_size[0],
            num_labels=config.classes,
        )
    )
    return perturbed(network).eval()


def ours_with(tensors: dict[str, torch.Tensor], config: ViTConfig) -> ViT:
    vit = ViT(config)
    missing, unexpected = vit.load_state_dict(to_ours(tensors, "theirs")[0], strict=False)
    assert not unexpected
    assert set(missing) <= {"head_dist.weight", "head_dist.bias"}
    return vit.eval()


def heads_of_timm(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """timm's distilled networks average their heads, but for one mode of training; nothing in them is random."""
    if hasattr(network, "set_distilled_training"):
        network.train().set_distilled_training(True)
        return list(network(images))
    return [network.eval()(images)]


def heads_of_hugging_face(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    answer = network(images)
    return [answer.cls_logits, answer.distillation_logits] if hasattr(answer, "cls_logits") else [answer.logits]


def worst_difference(
    vit: ViT, theirs: nn.Module, heads_of: Callable[[nn.Module, torch.Tensor], list[torch.Tensor]], images: torch.Tensor
) -> float:
    with torch.no_grad():
        expected = heads_of(theirs, images)
        got = [head for head in vit(images) if head is not None][: len(expected)]
        assert len(got) == len(expected)
        assert all(head.std() > 0.1 for head in expected)  # else closeness would say nothing
        return max((mine - other).abs().max().item() for mine, other in zip(got, expected, strict=True))


FAST = ["deit_tiny", "deit_tiny_plain"]
SLOW = [
    "deit_small", "deit_base", "deit_base_384", "deit_small_plain", "deit_base_plain", "deit_base_384_plain", "vit_tiny",
    "vit_small", "vit_base", "vit_base_384", "deit3_small", "deit3_small_384", "deit3_medium", "deit3_base", "deit3_base_384",
    "deit3_large", "deit3_large_384", "deit3_huge",
]  # fmt: skip


def timms_name(student: str) -> str:
    """What timm calls a student of ours."""
    family, size, *rest = student.replace("_plain", "").split("_")
    resolution = rest[0] if rest else "224"
    distilled = "_distilled" if STUDENTS[student].distillation_token else ""
    patch = STUDENTS[student].patch_size[0]
    return f"{family}_{size}{distilled}_patch{patch}_{resolution}"


@pytest.mark.parametrize("student", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_named_students_give_timms_logits(student: str, record_property: Callable[[str, object], None]) -> None:
    theirs = of_timm(timms_name(student))
    config = STUDENTS[student]
    images = torch.randn(1, 3, *config.image_size, generator=torch.Generator().manual_seed(1))
    worst = worst_difference(ours_with(theirs.state_dict(), config), theirs, heads_of_timm, images)
    record_property("worst", worst)
    assert worst < TOLERANCE


def test_deit3_gives_timms_logits() -> None:
    """The tiny one, which is not published; LayerScale is perturbed, too."""
    theirs = of_timm("deit3_small_patch16_224", img_size=64, embed_dim=96, depth=3, num_heads=3, num_classes=7)
    shape = {"image_size": (64, 64), "width": 96, "depth": 3, "heads": 3, "classes": 7}
    config = STUDENTS["deit3_small"].model_copy(update=shape)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert worst_difference(ours_with(theirs.state_dict(), config), theirs, heads_of_timm, images) < TOLERANCE


KNOWN_TO_TRANSFORMERS = [name for name in FAST[1:] + SLOW if not name.startswith("deit3")]


@pytest.mark.parametrize(
    "student", ["deit_tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in KNOWN_TO_TRANSFORMERS)]
)
def test_named_students_give_transformers_logits(student: str, record_property: Callable[[str, object], None]) -> None:
    """It has no DeiT III."""
    config = STUDENTS[student].model_copy(update={"norm_epsilon": 1e-12})
    theirs = of_hugging_face("teacher" if config.distillation_token else "vit", config)
    images = torch.randn(1, 3, *config.image_size, generator=torch.Generator().manual_seed(1))
    worst = worst_difference(ours_with(theirs.state_dict(), config), theirs, heads_of_hugging_face, images)
    record_property("worst", worst)
    assert worst < TOLERANCE


@pytest.mark.parametrize("kind", ["teacher", "deit", "vit"])
def test_networks_of_transformers_give_their_logits_from_memory_and_from_their_files(kind: str, tmp_path: Path) -> None:
    """In memory and in files their names differ."""
    config = (PLAIN if kind == "vit" else SMALL).model_copy(update={"norm_epsilon": 1e-12})
    theirs = of_hugging_face(kind, config)
    theirs.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    layouts = []
    for tensors in (theirs.state_dict(), load_file(tmp_path / "model.safetensors")):
        layouts.append(to_ours(tensors, "theirs")[1])
        assert worst_difference(ours_with(tensors, config), theirs, heads_of_hugging_face, images) < TOLERANCE
    assert layouts == [f"hf5-{kind}", f"hf-{kind}"]


@pytest.mark.parametrize("weight", ["blocks.1.mlp.fc1.weight", "blocks.0.attn.qkv.bias", "pos_embed", "dist_token"])
def test_comparison_of_logits_notices_one_number_that_moved(weight: str) -> None:
    """On one machine both often give the same bits, a difference of exactly 0: this is what says that two networks are
    compared, not one with itself."""
    theirs = of_timm(
        "deit_tiny_distilled_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5
    )
    vit = ours_with(theirs.state_dict(), SMALL)
    assert not {p.data_ptr() for p in vit.parameters()} & {p.data_ptr() for p in theirs.parameters()}
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert worst_difference(vit, theirs, heads_of_timm, images) < TOLERANCE
    with torch.no_grad():
        dict(theirs.named_parameters())[weight].view(-1)[-1] += 0.1
    assert worst_difference(vit, theirs, heads_of_timm, images) > TOLERANCE


@pytest.mark.parametrize(
    ("framework", "student"),
    [("timm", "deit_tiny"), ("timm", "deit_tiny_plain"), ("timm", "deit3_small"), ("transformers", "deit_tiny")],
)
def test_gradients_of_every_tensor_are_theirs(framework: str, student: str) -> None:
    """At 224 pixels, of all heads; DeiT III's LayerScale too."""
    config = STUDENTS[student].model_copy(update={"classes": 7})
    if framework == "timm":
        theirs, heads_of = of_timm(timms_name(student), num_classes=7), heads_of_timm
    else:
        config = config.model_copy(update={"norm_epsilon": 1e-12})
        theirs, heads_of = of_hugging_face("teacher", config), heads_of_hugging_face
    vit = ours_with(theirs.state_dict(), config)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    for heads in (heads_of(theirs, images), [head for head in vit(images) if head is not None]):
        torch.stack(heads).square().mean().backward()
    expected = to_ours({name: weight.grad for name, weight in theirs.named_parameters()}, "theirs")[0]
    assert expected.keys() == dict(vit.named_parameters()).keys()
    assert ("blocks.0.scale1" in expected, "dist_token" in expected) == (
        student == "deit3_small",
        student == "deit_tiny",
    )
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for name, parameter in vit.named_parameters():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5 * max(scale, 1), rtol=1e-3, msg=name)


@pytest.mark.parametrize("layout", ["deitkit", *LAYOUTS])
def test_round_trip_through_every_layout_keeps_every_bit(layout: str) -> None:
    config = DEIT3 if layout == "original" else PLAIN if layout.endswith("vit") else SMALL
    ours = perturbed(ViT(config)).state_dict()
    if layout.endswith("-deit"):  # one head
        ours = {name: tensor for name, tensor in ours.items() if not name.startswith("head_dist")}
    theirs = from_ours(ours, layout)
    again, found, rest = to_ours(theirs, "theirs")
    assert (found, rest) == (layout, [])
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    back = from_ours(again, found)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("config", [SMALL, PLAIN, DEIT3], ids=["deit", "plain", "deit3"])
def test_names_of_our_tensors_in_timm_are_timms(config: ViTConfig) -> None:
    name = {
        "deit": "deit_tiny_distilled_patch16_224",
        "plain": "deit_tiny_patch16_224",
        "deit3": "deit3_small_patch16_224",
    }
    kind = "deit3" if config.layer_scale else "deit" if config.distillation_token else "plain"
    theirs = timm.create_model(name[kind], img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5)
    converted = from_ours(ViT(config).state_dict(), "timm")
    assert {key: value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


def test_names_of_the_original_are_those_of_its_published_deit3() -> None:
    found = from_ours(ViT(DEIT3).state_dict(), "original")
    block = {name.removeprefix("blocks.1.") for name in found if name.startswith("blocks.1.")}
    norms = {f"norm{number}.{end}" for number in (1, 2) for end in ("weight", "bias")}
    maps = {f"{part}.{end}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for end in ("weight", "bias")}
    assert block == norms | maps | {"gamma_1", "gamma_2"}
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight", "head.weight"} <= set(found)
    assert found["pos_embed"].shape == (1, 16, 32)


def test_what_takes_no_part_in_classification_is_left_out_by_name() -> None:
    theirs = from_ours(ViT(PLAIN).state_dict(), "hf-vit") | {"vit.pooler.dense.weight": torch.zeros(32, 32)}
    assert to_ours(theirs, "theirs")[2] == ["vit.pooler.dense.weight"]


def test_base_network_of_transformers_without_its_classifier_is_known() -> None:
    theirs = from_ours(ViT(PLAIN).state_dict(), "hf-vit")
    base = {name.removeprefix("vit."): tensor for name, tensor in theirs.items() if name.startswith("vit.")}
    ours, layout, _ = to_ours(base, "theirs")
    assert layout == "hf-vit"
    assert "head.weight" not in ours
    assert torch.equal(ours["blocks.1.attn.qkv.weight"], to_ours(theirs, "theirs")[0]["blocks.1.attn.qkv.weight"])


def test_another_kind_of_transformer_is_refused_by_what_it_has() -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, qk_norm=True).state_dict()
    with pytest.raises(UserError, match=r"theirs: another kind of vision transformer: it has blocks\.0\.attn\.q_norm"):
        to_ours(theirs, "theirs")
    with pytest.raises(UserError, match="theirs: holds no vision transformer"):
        to_ours({"conv1.weight": torch.zeros(1)}, "theirs")
    with pytest.raises(UserError, match="theirs: holds no vision transformer"):
        to_ours({}, "theirs")


def test_layer_scale_has_no_place_in_hugging_face() -> None:
    with pytest.raises(UserError, match=r"has no place for blocks\.0\.scale1"):
        from_ours(ViT(DEIT3).state_dict(), "hf-vit")
    with pytest.raises(UserError, match="unknown layout 'hf-vot'"):
        from_ours({}, "hf-vot")
