"""Weights to start from: where they are found, what is known of them, what a student loads of them."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from deitkit import settings
from deitkit.config import DataConfig, RunConfig
from deitkit.data import load_data
from deitkit.models.cnn import CNNConfig
from deitkit.models.network import Network
from deitkit.models.start import find_init, load_into_student, start_preprocessing
from deitkit.models.vit import ViT, ViTConfig, resized_positions
from deitkit.models.weights import Tensors, from_ours, to_ours
from deitkit.models.zoo import STUDENTS, ModelCard, build, save_model, student_preprocessing
from deitkit.terminal import UserError
from deitkit.training import setup as resolve

SHAPE = ViTConfig(image_size=(16, 16), classes=5, patch_size=(4, 4), width=64, depth=2, heads=1)
NAMES = tuple("abcde")


def saved(folder: Path, config: ViTConfig, classes: tuple[str, ...] = NAMES, **preprocessing: Any) -> Path:
    """The folder of a finished run that holds nothing but its model."""
    torch.manual_seed(7)
    own = student_preprocessing(config, photos=True).model_copy(update=preprocessing)
    card = ModelCard(name="saved", architecture=config, classes=classes, preprocessing=own)
    save_model(folder / "model", Network(ViT(config), own), card)
    return folder


def fresh(config: ViTConfig) -> ViT:
    torch.manual_seed(8)
    return ViT(config)


def changed(config: ViTConfig, **changes: Any) -> ViTConfig:
    return config.model_copy(update=changes)


def test_same_shape_takes_every_tensor(tmp_path: Path) -> None:
    source = find_init(str(saved(tmp_path / "run", SHAPE)))
    vit = fresh(SHAPE)
    (line,) = load_into_student(vit, source, NAMES)
    assert line == "init: loaded 35 of 35 tensors from saved (deitkit)"
    assert all(torch.equal(tensor, source.tensors[name]) for name, tensor in vit.state_dict().items())


@pytest.mark.parametrize("classes", [tuple("abcdefg"), tuple("vwxyz")], ids=["another number", "other names"])
def test_heads_of_other_classes_stay_fresh(tmp_path: Path, classes: tuple[str, ...]) -> None:
    source = find_init(str(saved(tmp_path / "run", SHAPE)))
    config = changed(SHAPE, classes=len(classes))
    vit, untouched = fresh(config), fresh(config).state_dict()
    lines = load_into_student(vit, source, classes)
    taken = {name for name, tensor in vit.state_dict().items() if not torch.equal(tensor, untouched[name])}
    assert not taken & {"head.weight", "head_dist.weight"}
    assert {"cls_token", "dist_token", "pos_embed", "stem.proj.weight", "blocks.1.mlp.2.weight"} <= taken
    assert "31 of 35" in lines[0]
    assert lines[1].startswith("init: newly initialised: head (")
    assert "head_dist (" in lines[1]


def test_distillation_token_its_position_and_its_head_are_fresh_where_there_was_none(tmp_path: Path) -> None:
    source = find_init(str(saved(tmp_path / "run", changed(SHAPE, distillation_token=False))))
    vit, untouched = fresh(SHAPE), fresh(SHAPE)
    lines = load_into_student(vit, source, NAMES)
    assert torch.equal(vit.dist_token, untouched.dist_token)
    assert torch.equal(vit.pos_embed[:, 1], untouched.pos_embed[:, 1])
    assert torch.equal(vit.head_dist.weight, untouched.head_dist.weight)
    positions = source.tensors["pos_embed"]
    assert torch.equal(vit.pos_embed[:, 0], positions[:, 0])
    assert torch.equal(vit.pos_embed[:, 2:], positions[:, 1:])
    assert torch.equal(vit.head.weight, source.tensors["head.weight"])
    assert lines[1] == "init: newly initialised: dist_token (not in these weights), head_dist (not in these weights)"


def test_plain_student_leaves_the_distillation_token_out(tmp_path: Path) -> None:
    source = find_init(str(saved(tmp_path / "run", SHAPE)))
    config = changed(SHAPE, distillation_token=False)
    vit = fresh(config)
    lines = load_into_student(vit, source, NAMES)
    positions = source.tensors["pos_embed"]
    assert torch.equal(vit.pos_embed, torch.cat([positions[:, :1], positions[:, 2:]], dim=1))
    assert torch.equal(vit.head.weight, source.tensors["head.weight"])
    assert lines[1:] == ["init: not loaded: dist_token, head_dist.bias, head_dist.weight, position of dist_token"]
    other = changed(config, classes=7)
    assert load_into_student(fresh(other), source, tuple("abcdefg"))[1:] == [
        "init: newly initialised: head (5 classes there, 7 here)",
        "init: not loaded: dist_token, head_dist.bias, head_dist.weight, position of dist_token",
    ]


def test_without_a_position_of_the_class_token_only_patches_positions_are_there(tmp_path: Path) -> None:
    plain = changed(SHAPE, distillation_token=False, position_of_prefix=False, layer_scale=1e-4)
    source = find_init(str(saved(tmp_path / "run", plain)))
    vit = fresh(changed(plain, distillation_token=True, image_size=(24, 16)))
    lines = load_into_student(vit, source, NAMES)
    assert vit.pos_embed.shape == (1, 24, 64)
    torch.testing.assert_close(vit.pos_embed, resized_positions(source.tensors["pos_embed"], (4, 4), (6, 4)))
    assert "resized from 4x4 to 6x4 patches" in lines[0]


@pytest.mark.parametrize("token", [True, False])
def test_positions_of_a_grid_that_is_not_square_are_resized_row_by_row(tmp_path: Path, token: bool) -> None:
    """Each channel of the embedding is a linear ramp down and across: so it stays, away from the border."""
    config = changed(SHAPE, image_size=(32, 24), distillation_token=token)
    source = find_init(str(saved(tmp_path / "run", config)))
    down, across = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    prefix = config.prefix_tokens
    source.tensors["pos_embed"][0, prefix:] = (10 * down + across).flatten()[:, None]
    vit = fresh(changed(config, image_size=(64, 48)))
    load_into_student(vit, source, NAMES)
    assert torch.equal(vit.pos_embed[:, :prefix], source.tensors["pos_embed"][:, :prefix])
    grid = vit.pos_embed[0, prefix:, 0].view(16, 12)[4:-4, 4:-4]
    expected = 10 * ((torch.arange(4, 12) + 0.5) / 2 - 0.5)[:, None] + ((torch.arange(4, 8) + 0.5) / 2 - 0.5)
    torch.testing.assert_close(grid, expected, atol=0.6, rtol=0)  # this kernel bends a ramp a little


def test_positions_are_resized_as_transformers_does_it() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    theirs = transformers.DeiTModel(transformers.DeiTConfig(**shape, image_size=16, patch_size=4)).embeddings
    with torch.no_grad():
        theirs.position_embeddings.copy_(torch.randn(1, 18, 32))
        expected = theirs.interpolate_pos_encoding(torch.zeros(1, 8 * 6 + 2, 32), 32, 24)
    found = resized_positions(theirs.position_embeddings.detach()[:, 2:], (4, 4), (8, 6))
    torch.testing.assert_close(found, expected[:, 2:])


def test_student_of_the_same_weights_at_another_size_answers_nearly_the_same(tmp_path: Path) -> None:
    """A position embedding that was transposed or cut wrongly would not."""
    smooth = torch.linspace(-1, 1, 16)
    source = find_init(str(saved(tmp_path / "run", changed(SHAPE, image_size=(64, 64)))))
    ramp = (smooth[:, None] + 3 * smooth[None, :]).flatten()
    source.tensors["pos_embed"][0, 2:] = ramp[:, None] * torch.randn(64)
    small, large = fresh(changed(SHAPE, image_size=(64, 64))), fresh(changed(SHAPE, image_size=(96, 96)))
    for vit in (small, large):
        load_into_student(vit, source, NAMES)
    images = torch.ones(1, 3, 96, 96) * torch.tensor([0.5, -1, 2]).view(3, 1, 1)
    with torch.no_grad():
        answers = small(images[..., :64, :64]).cls_BK, large(images).cls_BK
    torch.testing.assert_close(*answers, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"width": 128, "heads": 2}, "the weights file has width 64, the student 128"),
        ({"depth": 3}, "the weights file has depth 2, the student 3"),
        ({"heads": 2}, "the weights file has heads 1, the student 2"),
        ({"patch_size": (8, 8)}, "the weights file has patch size 4x4, the student 8x8"),
        ({"stem": "conv"}, "the weights file has stem patch, the student conv"),
        ({"mlp_ratio": 2.0}, "the weights file has mlp width 256, the student 128"),
        ({"layer_scale": 0.1}, "the weights file has no layer scale, the student has one"),
        ({"position_of_prefix": False}, "the weights file has a position of the class token, the student has none"),
    ],
)
def test_student_of_another_shape_is_refused_and_both_are_named(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    source = find_init(str(saved(tmp_path / "run", SHAPE)))
    with pytest.raises(UserError) as caught:
        load_into_student(fresh(changed(SHAPE, **change)), source, NAMES)
    assert complaint in str(caught.value)


def test_weights_that_lack_a_tensor_or_hold_nan_are_refused(tmp_path: Path) -> None:
    source = find_init(str(saved(tmp_path / "run", SHAPE)))
    lacking = {name: tensor for name, tensor in source.tensors.items() if name != "blocks.1.norm2.bias"}
    with pytest.raises(UserError, match=r"lack blocks\.1\.norm2\.bias"):
        load_into_student(fresh(SHAPE), source._replace(tensors=lacking), NAMES)
    source.tensors["blocks.1.norm2.bias"][3] = torch.nan
    with pytest.raises(UserError, match=r"blocks\.1\.norm2\.bias holds infinity or NaN"):
        load_into_student(fresh(SHAPE), source, NAMES)


@pytest.mark.parametrize("layout", ["deitkit", "timm", "original", "hf-teacher", "hf5-teacher"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_file_of_any_layout_is_recognised_by_its_names(tmp_path: Path, layout: str, suffix: str) -> None:
    ours = ViT(SHAPE).state_dict()
    theirs = from_ours(ours, layout)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": theirs}, file)  # as the original repository publishes them
    else:
        save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, file)
    source = find_init(str(file))
    assert source.layout == ("timm" if layout == "original" else layout)  # without LayerScale the two are one
    expected = changed(SHAPE, norm_epsilon=1e-12) if layout.startswith("hf") else SHAPE
    assert source.facts.architecture == expected
    assert all(torch.equal(source.tensors[name], ours[name]) for name in ours)
    assert source.facts.assumed[0] == "1 attention heads"


def test_deit3_file_of_the_original_is_recognised(tmp_path: Path) -> None:
    config = changed(SHAPE, distillation_token=False, position_of_prefix=False, layer_scale=1e-4)
    torch.save({"model": from_ours(ViT(config).state_dict(), "original")}, tmp_path / "deit_3.pth")
    source = find_init(str(tmp_path / "deit_3.pth"))
    assert (source.layout, source.facts.architecture) == ("original", config)


def test_nothing_is_unpickled_from_a_file_of_weights(tmp_path: Path) -> None:
    torch.save({"model": SHAPE}, tmp_path / "program.pth")
    said = (
        r"program\.pth: cannot be read as plain weights: it also holds deitkit\.models\.vit\.ViTConfig, a Python object"
    )
    with pytest.raises(UserError, match=said):
        find_init(str(tmp_path / "program.pth"))


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ""])
@pytest.mark.parametrize(
    ("wrap", "taken_off"),
    [
        (lambda tensors: tensors, ()),
        (lambda tensors: {"model_state_dict": tensors, "epoch": 3, "optimizer": {"state": {}}}, ("model_state_dict",)),
        (lambda tensors: {"state_dict": tensors, "state_dict_ema": tensors}, ("state_dict (not state_dict_ema)",)),
        (lambda tensors: {"model": {"name": "vit"}, "state_dict_ema": tensors}, ("state_dict_ema",)),
        (lambda tensors: {"student": under("other.", tensors), "teacher": under("module.", tensors)}, ("teacher (not student)", "module.")),
        (lambda tensors: {"state_dict": under("model._orig_mod.", tensors)}, ("state_dict", "model.", "_orig_mod.")),
        (lambda tensors: under("net.", tensors), ("net.",)),
        (lambda tensors: {"model": tensors, "args": argparse.Namespace(lr=0.1, out=Path("runs")), "best": np.float64(0.7)}, ("model",)),
    ],
)  # fmt: skip
def test_weights_are_read_whatever_wraps_them_and_the_wrappers_are_said(
    tmp_path: Path, suffix: str, wrap: Callable[[Tensors], Any], taken_off: tuple[str, ...]
) -> None:
    ours = ViT(SHAPE).state_dict()
    wrapped, file = wrap(from_ours(ours, "timm")), tmp_path / f"weights{suffix}"
    torch.save(wrapped, file)
    source = find_init(str(file))
    assert source.taken_off == taken_off
    assert all(torch.equal(source.tensors[name], ours[name]) for name in ours)
    lines = load_into_student(ViT(SHAPE), source, NAMES)
    assert [line for line in lines if "taken off" in line] == (
        ["init: taken off: " + ", ".join(taken_off)] if taken_off else []
    )


def test_safetensors_are_known_by_their_content(tmp_path: Path) -> None:
    ours = ViT(SHAPE).state_dict()
    save_file(under("module.", from_ours(ours, "timm")), tmp_path / "pytorch_model.bin")
    source = find_init(str(tmp_path / "pytorch_model.bin"))
    assert source.taken_off == ("module.",)
    assert all(torch.equal(source.tensors[name], ours[name]) for name in ours)


def under(beginning: str, tensors: Tensors) -> Tensors:
    return {beginning + name: tensor for name, tensor in tensors.items()}


def test_a_file_without_weights_is_told_by_what_it_has(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "config": {"lr": 0.1}, "model": {}}, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"holds no tensors by name \(found: epoch, config, model\): give the network's state dict"
    ):
        find_init(str(tmp_path / "a.pth"))


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("pos_embed", lambda tensor: tensor[0], r"pos_embed of shape \(18, 64\) does not fit a network of width 64"),
        ("pos_embed", lambda tensor: tensor.repeat(2, 1, 1), "pos_embed of shape"),
        ("pos_embed", lambda tensor: tensor[..., :5], "pos_embed of shape"),
        ("head.weight", lambda tensor: tensor[0, 0], "head.weight of shape"),
        ("head_dist.weight", lambda tensor: tensor[0, 0], "head_dist.weight of shape"),
        ("patch_embed.proj.weight", lambda tensor: tensor[:0], "does not fit a network of width 0"),
        ("norm.bias", lambda tensor: tensor.to(torch.int8), "norm.bias holds int8: give weights in floating point"),
        ("norm.bias", lambda tensor: tensor.to(torch.complex64), "norm.bias holds complex64"),
        ("norm.bias", lambda tensor: tensor.to("meta"), "norm.bias has no plain numbers"),
    ],
)
def test_tensors_that_no_student_can_have_are_refused(
    tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], complaint: str
) -> None:
    theirs = from_ours(ViT(SHAPE).state_dict(), "timm")
    torch.save({**theirs, name: change(theirs[name])}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=complaint):
        find_init(str(tmp_path / "odd.pth"))


@pytest.mark.parametrize("change", [lambda tensor: tensor[:3], lambda tensor: tensor[0, 0]])
def test_query_key_and_value_that_cannot_be_joined_are_refused(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    theirs = from_ours(ViT(SHAPE).state_dict(), "hf-teacher")
    key = "deit.encoder.layer.0.attention.attention.key.weight"
    torch.save({**theirs, key: change(theirs[key])}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.key\.weight.* have different shapes"):
        find_init(str(tmp_path / "odd.pth"))


def test_folder_of_hugging_face_says_heads_size_and_preprocessing(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.ViTConfig(**shape, image_size=[8, 16], patch_size=4, num_labels=3)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    images = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"height": 10, "width": 10}}
    images |= {"crop_size": 8, "do_center_crop": True, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    facts = find_init(str(tmp_path)).facts
    assert facts.assumed == ()
    assert (facts.architecture.heads, facts.architecture.norm_epsilon) == (4, 1e-12)
    assert (facts.architecture.image_size, facts.architecture.classes) == ((8, 16), 3)
    assert facts.architecture.mlp_ratio == 1.5
    assert facts.preprocessing.mean == (0.1, 0.2, 0.3)
    assert (facts.preprocessing.crop_pct, facts.preprocessing.interpolation) == (0.8, "bilinear")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "relu"}))
    with pytest.raises(UserError, match="hidden_act 'relu', a student has gelu"):
        find_init(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"image_size": 8}))
    with pytest.raises(UserError, match="lacks 'num_attention_heads'"):
        find_init(str(tmp_path))
    (tmp_path / "config.json").write_text('{"image_size": 8, "num_attention_heads": 1e400}')
    with pytest.raises(UserError, match="unexpected content: cannot convert float infinity to integer"):
        find_init(str(tmp_path))


def test_folder_of_timm_says_heads_epsilon_size_and_preprocessing(tmp_path: Path) -> None:
    """As timm itself writes it."""
    shape = {"img_size": (8, 32), "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 5}
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", **shape)
    images = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.9, "interpolation": "bilinear"}
    timm.models.save_for_hf(theirs, tmp_path, {"pretrained_cfg": images}, safe_serialization=True)
    source = find_init(str(tmp_path))
    facts = source.facts
    assert (source.layout, facts.assumed) == ("timm", ())
    assert facts.architecture == changed(SHAPE, image_size=(8, 32), heads=4)
    seen = facts.preprocessing
    assert (seen.image_size, seen.mean, seen.std) == ((8, 32), (0.5,) * 3, (0.25,) * 3)
    assert (seen.crop_pct, seen.interpolation) == (0.9, "bilinear")


def test_folder_of_timm_as_timm_wrote_it_once_is_read(tmp_path: Path) -> None:
    """Without `pretrained_cfg` around what it holds now."""
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    images = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.9}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "interpolation": "bilinear", **images}
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = find_init(str(tmp_path)).facts
    assert facts.assumed == ()
    assert facts.architecture == ViTConfig(distillation_token=False, classes=5)
    assert (facts.preprocessing.std, facts.preprocessing.crop_pct) == ((0.25,) * 3, 0.9)
    assert facts.preprocessing.interpolation == "bilinear"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"pretrained_cfg": {"input_size": [3, 16]}}, "timm makes no network of local-dir:"),
        ({"pretrained_cfg": {"input_size": [3, 16, 16], "mean": ["grey"]}}, "config.json: unexpected content: "),
        ({"pretrained_cfg": {"input_size": 3}}, "timm makes no network of local-dir:"),
        ({"model_args": [1]}, "timm makes no network of local-dir:"),
        ({"model_args": {"embed_dim": "wide"}}, "timm makes no network of local-dir:"),
        ({"architecture": "vit_teeny"}, "Unknown model (vit_teeny)"),
        ({"architecture": "resnet18", "model_args": {}}, "not a ViT, DeiT or DeiT III"),
        ({"model_args": {"act_layer": "relu"}}, "its blocks have ReLU, a student has GELU"),
        ({"model_args": {"act_layer": "gelu_tanh"}}, "its blocks have GELUTanh, a student has GELU"),
        ({"model_args": {"qk_norm": True}}, "another kind of vision transformer: it has blocks.0.attn.q_norm"),
    ],
)
def test_folder_of_timm_that_makes_no_sense_or_no_student_is_one_clear_line(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    images = {
        "input_size": [3, 16, 16],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
    }
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"patch_size": 4}, "pretrained_cfg": images}
    plain = changed(SHAPE, distillation_token=False, width=192, heads=3)
    save_file(from_ours(ViT(plain).state_dict(), "timm"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_init(str(tmp_path)).facts.architecture == plain
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError) as caught:
        find_init(str(tmp_path))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_square_image_that_a_file_does_not_show_is_said_to_be_assumed(tmp_path: Path) -> None:
    save_file(ViT(changed(SHAPE, image_size=(32, 8))).state_dict(), tmp_path / "wide.safetensors")
    source = find_init(str(tmp_path / "wide.safetensors"))
    assert source.facts.architecture.grid == (4, 4)
    assert "a square of 4x4 patches" in source.facts.assumed
    assert "a square of 4x4 patches" in load_into_student(fresh(SHAPE), source, NAMES)[-1]


def test_timm_name_with_a_file_has_the_names_preprocessing(tmp_path: Path) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224")
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    source = find_init(f"vit_tiny_patch16_224@{tmp_path / 'vit.safetensors'}")
    assert source.facts.preprocessing.mean == (0.5, 0.5, 0.5)
    assert source.facts.architecture == ViTConfig(distillation_token=False)
    assert source.facts.assumed == ()
    for other, complaint in (
        ("deit_small_patch16_224", "deit_small_patch16_224 has width 384, the file .* 192"),
        ("deit_tiny_distilled_patch16_224", "has a distillation token, the file .* has none"),
    ):
        with pytest.raises(UserError, match=complaint):
            find_init(f"{other}@{tmp_path / 'vit.safetensors'}")
    larger = find_init(f"vit_tiny_patch16_384@{tmp_path / 'vit.safetensors'}")
    assert larger.facts.assumed == ("a square of 14x14 patches",)
    save_file(timm.create_model("vit_small_patch32_224").state_dict(), tmp_path / "coarse.safetensors")
    with pytest.raises(UserError, match=r"vit_small_patch16_224 has patch size 16x16, the file .* 32x32"):
        find_init(f"vit_small_patch16_224@{tmp_path / 'coarse.safetensors'}")


def test_named_student_keeps_the_epsilon_of_its_weights(tmp_path: Path) -> None:
    weights = from_ours(ViT(STUDENTS["deit_tiny"]).state_dict(), "hf-teacher")
    save_file(weights, tmp_path / "deit.safetensors")
    config = settings.build(RunConfig, {"init": str(tmp_path / "deit.safetensors"), "student": "deit_tiny"})
    assert resolve.student_architecture(config, load_data("digits", DataConfig())).norm_epsilon == 1e-12


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "deit_tiny_patch16_224",
            "the published weights of deit_tiny_patch16_224 cannot be downloaded: check the connection",
        ),
        (
            "hf:facebook/deit-tiny-patch16-224",
            "hf:facebook/deit-tiny-patch16-224 cannot be downloaded: check the connection",
        ),
        ("hf:facebook", "write hf:OWNER/NAME"),
        ("hf:../..", "write hf:OWNER/NAME"),
        ("~nobody-of-this-name/run", "nobody has such a home folder"),
        ("runs/missing", "no such run folder or file of weights"),
        ("missing.safetensors", "no such run folder or file of weights"),
        ("resnet50", "not a ViT, DeiT or DeiT III"),
        ("deit_tiney_patch16_224", "did you mean"),
        ("vit_base_patch16_clip_224", "another kind of vision transformer: it has norm_pre"),
        ("vit_base_patch16_reg4_gap_256", "not a ViT, DeiT or DeiT III"),
        ("vit_base_patch16_224@", "missing after the @"),
    ],
)
def test_what_cannot_be_had_is_one_clear_line(name: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deitkit.data.sources.hub_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    with pytest.raises(UserError) as caught:
        find_init(name)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_timm_network_downloaded_before_comes_out_of_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = timm.create_model("deit_tiny_distilled_patch16_224").state_dict()
    kept = tmp_path / "models--timm--deit_tiny_distilled_patch16_224.fb_in1k"
    (kept / "snapshots" / "0123").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0123")
    save_file(theirs, kept / "snapshots" / "0123" / "model.safetensors")
    monkeypatch.setattr("deitkit.data.sources.hub_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    random_state = torch.get_rng_state()
    source = find_init("deit_tiny_distilled_patch16_224")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert source.facts.architecture == STUDENTS["deit_tiny"]
    assert (source.facts.preprocessing.crop_pct, source.facts.preprocessing.mean[0]) == (0.9, 0.485)
    assert source.tensors.keys() == to_ours(theirs, "theirs")[0].keys()
    assert torch.equal(source.tensors["blocks.3.mlp.0.weight"], theirs["blocks.3.mlp.fc1.weight"])


def test_hub_network_is_downloaded_best_as_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hub that is a folder: one network has no preprocessor_config.json, another no safetensors."""
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    network = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**shape, image_size=32))
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    network.save_pretrained(hub)
    cache.mkdir()
    asked = []

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        assert repository == "facebook/deit"
        for file in allow_patterns:
            asked.append(file)
            if (hub / file).is_file():
                shutil.copy(hub / file, cache)
        return str(cache)

    monkeypatch.setattr("deitkit.data.sources.hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = find_init("hf:facebook/deit")
    assert (source.layout, source.facts.architecture.heads) == ("hf-teacher", 4)
    assert "pytorch_model.bin" not in asked
    tensors = load_file(hub / "model.safetensors")
    for folder in (hub, cache):
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"hf:facebook/deit: there is no model\.safetensors or pytorch_model\.bin"):
        find_init("hf:facebook/deit")
    torch.save(tensors, hub / "pytorch_model.bin")
    assert find_init("hf:facebook/deit").layout == "hf-teacher"


def test_cnn_is_no_start_for_a_student(tmp_path: Path) -> None:
    architecture = CNNConfig(name="cifar-resnet8", classes=5)
    preprocessing = student_preprocessing(SHAPE, photos=False)
    card = ModelCard(name="cnn", architecture=architecture, classes=NAMES, preprocessing=preprocessing)
    save_model(tmp_path / "model", build(card), card)
    with pytest.raises(UserError, match="cnn is a convolutional network: give a vision transformer's weights"):
        find_init(str(tmp_path))


def test_preprocessing_is_that_of_the_weights_at_the_students_size(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", SHAPE, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), crop_pct=0.9)
    facts = find_init(str(run)).facts
    config = changed(SHAPE, image_size=(32, 32))
    found = start_preprocessing(config, facts, photos=True)
    assert (found.image_size, found.mean, found.std, found.crop_pct) == (
        (32, 32),
        (0.1, 0.2, 0.3),
        (1.0, 2.0, 3.0),
        0.9,
    )
    assert start_preprocessing(config, facts, photos=False).crop_pct == 1.0
