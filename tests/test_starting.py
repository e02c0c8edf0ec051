"""Students that begin with weights which are there already."""

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
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.fakes import killed_after_epoch

from deitkit import jobs, published, resolve
from deitkit.api import configured
from deitkit.cli import main
from deitkit.config import CNNConfig, DataConfig, FitConfig, ModelCard, RunConfig, ViTConfig
from deitkit.data import load_data
from deitkit.errors import UserError
from deitkit.layouts import from_ours, to_ours
from deitkit.network import Network
from deitkit.preparing import preprocessing_of_student
from deitkit.progress import SilentProgress
from deitkit.published import find_init
from deitkit.settings import load_yaml, validated
from deitkit.starting import resized_positions, start_preprocessing, take_tensors
from deitkit.vit import ViT
from deitkit.zoo import STUDENTS, build, load_model, save_model, student_preprocessing

SHAPE = ViTConfig(image_size=(16, 16), classes=5, patch_size=(4, 4), width=64, depth=2, heads=1)
NAMES = tuple("abcde")


class Heard(SilentProgress):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


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


# ------------------------------------------------------------------------------------------ what is taken


def test_same_shape_takes_every_tensor(tmp_path: Path) -> None:
    source = find_init(str(saved(tmp_path / "run", SHAPE)))
    vit = fresh(SHAPE)
    (line,) = take_tensors(vit, source, NAMES)
    assert line == "start: 35 of 35 tensors from saved (deitkit)"
    assert all(torch.equal(tensor, source.tensors[name]) for name, tensor in vit.state_dict().items())


@pytest.mark.parametrize("classes", [tuple("abcdefg"), tuple("vwxyz")], ids=["another number", "other names"])
def test_heads_of_other_classes_stay_fresh(tmp_path: Path, classes: tuple[str, ...]) -> None:
    source = find_init(str(saved(tmp_path / "run", SHAPE)))
    config = changed(SHAPE, classes=len(classes))
    vit, untouched = fresh(config), fresh(config).state_dict()
    lines = take_tensors(vit, source, classes)
    taken = {name for name, tensor in vit.state_dict().items() if not torch.equal(tensor, untouched[name])}
    assert not taken & {"head.weight", "head_dist.weight"}
    assert {"cls_token", "dist_token", "pos_embed", "stem.proj.weight", "blocks.1.mlp.2.weight"} <= taken
    assert "31 of 35" in lines[0]
    assert lines[1].startswith("start: fresh: head (")
    assert "head_dist (" in lines[1]


def test_distillation_token_its_position_and_its_head_are_fresh_where_there_was_none(tmp_path: Path) -> None:
    source = find_init(str(saved(tmp_path / "run", changed(SHAPE, distillation_token=False))))
    vit, untouched = fresh(SHAPE), fresh(SHAPE)
    lines = take_tensors(vit, source, NAMES)
    assert torch.equal(vit.dist_token, untouched.dist_token)
    assert torch.equal(vit.pos_embed[:, 1], untouched.pos_embed[:, 1])
    assert torch.equal(vit.head_dist.weight, untouched.head_dist.weight)
    positions = source.tensors["pos_embed"]
    assert torch.equal(vit.pos_embed[:, 0], positions[:, 0])
    assert torch.equal(vit.pos_embed[:, 2:], positions[:, 1:])
    assert torch.equal(vit.head.weight, source.tensors["head.weight"])
    assert lines[1] == "start: fresh: dist_token (not there), head_dist (not there)"


def test_plain_student_leaves_the_distillation_token_out(tmp_path: Path) -> None:
    source = find_init(str(saved(tmp_path / "run", SHAPE)))
    config = changed(SHAPE, distillation_token=False)
    vit = fresh(config)
    lines = take_tensors(vit, source, NAMES)
    positions = source.tensors["pos_embed"]
    assert torch.equal(vit.pos_embed, torch.cat([positions[:, :1], positions[:, 2:]], dim=1))
    assert torch.equal(vit.head.weight, source.tensors["head.weight"])
    assert lines[1:] == ["start: left out: dist_token, head_dist.bias, head_dist.weight, position of dist_token"]
    other = changed(config, classes=7)
    assert take_tensors(fresh(other), source, tuple("abcdefg"))[1:] == [
        "start: fresh: head (5 classes there, 7 here)",
        "start: left out: dist_token, head_dist.bias, head_dist.weight, position of dist_token",
    ]


def test_without_a_position_of_the_class_token_only_patches_positions_are_there(tmp_path: Path) -> None:
    plain = changed(SHAPE, distillation_token=False, position_of_prefix=False, layer_scale=1e-4)
    source = find_init(str(saved(tmp_path / "run", plain)))
    vit = fresh(changed(plain, distillation_token=True, image_size=(24, 16)))
    lines = take_tensors(vit, source, NAMES)
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
    take_tensors(vit, source, NAMES)
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
        take_tensors(vit, source, NAMES)
    images = torch.ones(1, 3, 96, 96) * torch.tensor([0.5, -1, 2]).view(3, 1, 1)
    with torch.no_grad():
        answers = small(images[..., :64, :64]).cls_BK, large(images).cls_BK
    torch.testing.assert_close(*answers, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"width": 128, "heads": 2}, "is of width 64, the student of width 128"),
        ({"depth": 3}, "is of depth 2, the student of depth 3"),
        ({"heads": 2}, "is of heads 1, the student of heads 2"),
        ({"patch_size": (8, 8)}, "is of patch size 4x4, the student of patch size 8x8"),
        ({"stem": "conv"}, "is of stem patch, the student of stem conv"),
        ({"mlp_ratio": 2.0}, "is of mlp width 256, the student of mlp width 128"),
        ({"layer_scale": 0.1}, "is without layer scale, the student with layer scale"),
        ({"position_of_prefix": False}, "is with position of the class token, the student without"),
    ],
)
def test_student_of_another_shape_is_refused_and_both_are_named(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    source = find_init(str(saved(tmp_path / "run", SHAPE)))
    with pytest.raises(UserError) as caught:
        take_tensors(fresh(changed(SHAPE, **change)), source, NAMES)
    assert complaint in str(caught.value)


def test_weights_that_lack_a_tensor_or_hold_nan_are_refused(tmp_path: Path) -> None:
    source = find_init(str(saved(tmp_path / "run", SHAPE)))
    lacking = {name: tensor for name, tensor in source.tensors.items() if name != "blocks.1.norm2.bias"}
    with pytest.raises(UserError, match=r"lack blocks\.1\.norm2\.bias"):
        take_tensors(fresh(SHAPE), source._replace(tensors=lacking), NAMES)
    source.tensors["blocks.1.norm2.bias"][3] = torch.nan
    with pytest.raises(UserError, match=r"blocks\.1\.norm2\.bias holds infinity or NaN"):
        take_tensors(fresh(SHAPE), source, NAMES)


# ------------------------------------------------------------------------------------------ where weights are


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
    said = r"program\.pth: cannot be read as plain weights, for it also holds deitkit\.config_network\.ViTConfig, "
    with pytest.raises(UserError, match=said):
        find_init(str(tmp_path / "program.pth"))
    torch.save({"model": ViT(SHAPE).state_dict(), "args": argparse.Namespace()}, tmp_path / "program.pth")
    with pytest.raises(
        UserError, match=r"also holds argparse\.Namespace, which is a program's: give the network's state dict"
    ):
        find_init(str(tmp_path / "program.pth"))


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("pos_embed", lambda tensor: tensor[0], r"pos_embed of shape \(18, 64\) is of no network of width 64"),
        ("pos_embed", lambda tensor: tensor.repeat(2, 1, 1), "pos_embed of shape"),
        ("pos_embed", lambda tensor: tensor[..., :5], "pos_embed of shape"),
        ("head.weight", lambda tensor: tensor[0, 0], "head.weight of shape"),
        ("head_dist.weight", lambda tensor: tensor[0, 0], "head_dist.weight of shape"),
        ("patch_embed.proj.weight", lambda tensor: tensor[:0], "is of no network of width 0"),
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
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.key\.weight.* are of different shapes"):
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
    assert (facts.preprocessing.crop_fraction, facts.preprocessing.interpolation) == (0.8, "bilinear")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "relu"}))
    with pytest.raises(UserError, match="hidden_act 'relu', a student has gelu"):
        find_init(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"image_size": 8}))
    with pytest.raises(UserError, match="lacks 'num_attention_heads'"):
        find_init(str(tmp_path))
    (tmp_path / "config.json").write_text('{"image_size": 8, "num_attention_heads": 1e400}')
    with pytest.raises(UserError, match="is not as expected: cannot convert float infinity to integer"):
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
    assert (seen.crop_fraction, seen.interpolation) == (0.9, "bilinear")
    config = json.loads((tmp_path / "config.json").read_text())
    flat = {**config.pop("pretrained_cfg"), **config}  # as timm wrote it once
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert find_init(str(tmp_path)).facts == facts


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"pretrained_cfg": {"input_size": [3, 16, 16]}}, "config.json: lacks 'mean'"),
        ({"pretrained_cfg": {"input_size": 3}}, "config.json: is not as expected: "),
        ({"model_args": [1]}, "config.json: model_args: is not as expected"),
        ({"model_args": {"embed_dim": "wide"}}, "timm makes no network vit_tiny_patch16_224: "),
        ({"architecture": "vit_teeny"}, "timm makes no network vit_teeny: "),
        ({"architecture": "resnet18", "model_args": {}}, "timm makes no network resnet18: "),
        ({"model_args": {"act_layer": "relu"}}, "its blocks have ReLU, a student has GELU"),
        ({"model_args": {"act_layer": "gelu_tanh"}}, "its blocks have GELUTanh, a student has GELU"),
        ({"model_args": {"qk_norm": True}}, "is of another kind of vision transformer: it has blocks.0.attn.q_norm"),
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
    assert "a square of 4x4 patches" in take_tensors(fresh(SHAPE), source, NAMES)[-1]


def test_timm_name_with_a_file_has_the_names_preprocessing(tmp_path: Path) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224")
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    source = find_init(f"vit_tiny_patch16_224@{tmp_path / 'vit.safetensors'}")
    assert source.facts.preprocessing.mean == (0.5, 0.5, 0.5)
    assert source.facts.architecture == ViTConfig(distillation_token=False)
    assert source.facts.assumed == ()
    for other, complaint in (
        ("deit_small_patch16_224", "is of width 384, the weights in .* are of width 192"),
        ("deit_tiny_distilled_patch16_224", "is with distillation token, the weights in .* are without"),
    ):
        with pytest.raises(UserError, match=complaint):
            find_init(f"{other}@{tmp_path / 'vit.safetensors'}")
    larger = find_init(f"vit_tiny_patch16_384@{tmp_path / 'vit.safetensors'}")
    assert larger.facts.assumed == ("a square of 14x14 patches",)
    save_file(timm.create_model("vit_small_patch32_224").state_dict(), tmp_path / "coarse.safetensors")
    with pytest.raises(UserError, match=r"is of patch size 16x16, the weights in .* are of patch size 32x32"):
        find_init(f"vit_small_patch16_224@{tmp_path / 'coarse.safetensors'}")


def test_named_student_keeps_the_epsilon_of_its_weights(tmp_path: Path) -> None:
    weights = from_ours(ViT(STUDENTS["deit_tiny"]).state_dict(), "hf-teacher")
    save_file(weights, tmp_path / "deit.safetensors")
    config = configured(RunConfig, {"init": str(tmp_path / "deit.safetensors"), "student": "deit_tiny"})
    assert resolve.student_architecture(config, load_data("digits", DataConfig())).norm_epsilon == 1e-12


def test_plain_vits_see_images_with_mean_and_deviation_0_5() -> None:
    for name, mean in (("vit_tiny", (0.5, 0.5, 0.5)), ("deit_tiny", (0.485, 0.456, 0.406))):
        config = configured(RunConfig, {"student": name, "crop": "resize"})
        assert preprocessing_of_student(config, STUDENTS[name]).mean == mean


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
        ("resnet50", "is no ViT, DeiT or DeiT III"),
        ("deit_tiney_patch16_224", "did you mean"),
        ("vit_base_patch16_clip_224", "is of another kind of vision transformer: it has norm_pre"),
        ("vit_base_patch16_reg4_gap_256", "is no ViT, DeiT or DeiT III"),
        ("vit_base_patch16_224@", "missing after the @"),
    ],
)
def test_what_cannot_be_had_is_one_clear_line(name: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "hub_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_args, **_options: None)
    with pytest.raises(UserError) as caught:
        find_init(name)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_timm_network_downloaded_before_comes_out_of_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = timm.create_model("deit_tiny_distilled_patch16_224").state_dict()
    save_file(theirs, tmp_path / "model.safetensors")
    monkeypatch.setattr(published, "hub_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "model.safetensors"))
    source = find_init("deit_tiny_distilled_patch16_224")
    assert source.facts.architecture == STUDENTS["deit_tiny"]
    assert (source.facts.preprocessing.crop_fraction, source.facts.preprocessing.mean[0]) == (0.9, 0.485)
    assert source.tensors.keys() == to_ours(theirs, "theirs")[0].keys()
    assert torch.equal(source.tensors["blocks.3.mlp.0.weight"], theirs["blocks.3.mlp.fc1.weight"])


def test_hub_network_is_downloaded_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hub that is a folder: one network has no preprocessor_config.json, another no safetensors."""
    from huggingface_hub.errors import EntryNotFoundError

    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    network = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**shape, image_size=32))
    network.save_pretrained(tmp_path)

    def download(repository: str, file: str, *, local_files_only: bool) -> str:
        assert (repository, local_files_only) == ("facebook/deit", False)
        if not (tmp_path / file).is_file():
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(published, "hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    source = find_init("hf:facebook/deit")
    assert (source.layout, source.facts.architecture.heads) == ("hf-teacher", 4)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"hf:facebook/deit: there is no pytorch_model\.bin"):
        find_init("hf:facebook/deit")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert find_init("hf:facebook/deit").layout == "hf-teacher"


def test_cnn_is_no_start_for_a_student(tmp_path: Path) -> None:
    architecture = CNNConfig(name="cifar-resnet8", classes=5)
    preprocessing = student_preprocessing(SHAPE, photos=False)
    card = ModelCard(name="cnn", architecture=architecture, classes=NAMES, preprocessing=preprocessing)
    save_model(tmp_path / "model", build(card), card)
    with pytest.raises(UserError, match="cnn is a convolutional network: give a vision transformer's weights"):
        find_init(str(tmp_path))


def test_preprocessing_is_that_of_the_weights_at_the_students_size(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", SHAPE, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), crop_fraction=0.9)
    facts = find_init(str(run)).facts
    config = changed(SHAPE, image_size=(32, 32))
    found = start_preprocessing(config, facts, photos=True)
    assert (found.image_size, found.mean, found.std, found.crop_fraction) == (
        (32, 32),
        (0.1, 0.2, 0.3),
        (1.0, 2.0, 3.0),
        0.9,
    )
    assert start_preprocessing(config, facts, photos=False).crop_fraction == 1.0


# ------------------------------------------------------------------------------------------ whole runs

QUICK = {"train_images": 200, "epochs": 2, "batch_size": 50, "lr_per_256_images": 4e-3, "drop_path": 0.1}
TINY = {"stem": "patch", "width": 32, "depth": 2, "heads": 2}


def train(data: str, out: Path, *, resume: bool = False, **settings: Any) -> tuple[dict[str, Any], list[str]]:
    config, heard = configured(RunConfig, {**QUICK, **settings}), Heard()
    return jobs.run_training(data, config, out, resume=resume, progress=heard), heard.lines


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On the digits, 8 pixels, from the labels alone."""
    out = tmp_path_factory.mktemp("plain") / "run"
    train("digits", out, **TINY)
    return out


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "cnn"
    settings = {
        "model": "cifar-resnet8",
        "from_scratch": True,
        "epochs": 2,
        "batch_size": 32,
        "lr_per_256_images": 4e-2,
    }
    jobs.run_fit("digits", configured(FitConfig, settings), out, resume=False, progress=SilentProgress())
    return out


@pytest.mark.parametrize("teacher_size", [None, 16])
def test_run_goes_on_from_another_at_a_larger_size_with_a_teacher(
    tmp_path: Path, plain_run: Path, cnn: Path, teacher_size: int | None
) -> None:
    """The student has twice the pixels, a new token and a teacher, which goes on seeing images at its own 8 pixels, or sees
    as many as the student."""
    shapes = []
    forward = Network.forward

    def watched(self: Network, images_BCHW: torch.Tensor, keep_LB: Any = None) -> Any:
        if len(images_BCHW) > 1:  # one image is that of a network that is tried out as it is loaded
            shapes.append((type(self.body).__name__, tuple(images_BCHW.shape[2:]), self.preprocessing.image_size))
        return forward(self, images_BCHW, keep_LB)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Network, "forward", watched)
        settings = {"init": str(plain_run), "image_size": 16, "teacher": str(cnn), "teacher_size": teacher_size}
        summary, lines = train("digits", tmp_path / "second", **settings)
    assert {size for name, _, size in shapes if name == "ViT"} == {(16, 16)}
    assert {size for name, _, size in shapes if name == "CifarResNet"} == {(teacher_size or 8,) * 2}
    assert (
        f"start: 32 of 35 tensors from {plain_run}: deit_pico (deitkit); "
        "position embedding resized from 4x4 to 8x8 patches" in lines
    )
    assert "start: fresh: dist_token (not there), head_dist (not there)" in lines
    assert summary["top1"]["dist"] is not None
    _, card = load_model(tmp_path / "second" / "model")
    assert (card.name, card.architecture.grid, card.architecture.width) == ("deit_pico", (8, 8), 32)


def test_photos_fine_tuned_at_a_higher_resolution_have_views_of_that_size(tmp_path: Path) -> None:
    """By the command line; the teacher has its own resolution still."""
    generator = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(24):
            pixels = generator.integers(0, 60, (70, 90, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    photos, first, second, cnn = (str(tmp_path / name) for name in ("photos", "first", "second", "cnn"))
    loop = ["--batch-size", "8", "--workers", "0"]
    fit = ["--model", "cifar-resnet8", "--from-scratch", "--image-size", "24", "--epochs", "3", "--lr", "0.04"]
    assert main(["teacher", "fit", photos, *fit, *loop, "--out", cnn]) == 0
    shape = [
        "--image-size",
        "32",
        "--stem",
        "patch",
        "--patch-size",
        "8",
        "--width",
        "32",
        "--depth",
        "2",
        "--heads",
        "2",
    ]
    assert main(["train", photos, *shape, *loop, "--epochs", "2", "--out", first]) == 0
    higher = ["--init", first, "--image-size", "48", "--teacher", cnn]
    assert main(["train", photos, *higher, *loop, "--epochs", "2", "--out", second]) == 0
    config = load_yaml(tmp_path / "second" / "config.yaml")
    assert config["view"]["view_size"] == [48, 48]
    network, card = load_model(tmp_path / "second" / "model")
    assert (card.architecture.grid, card.preprocessing.image_size) == ((6, 6), (48, 48))
    assert network(torch.rand(1, 3, 70, 90)).dist_BK is not None
    assert load_model(Path(cnn) / "model")[1].preprocessing.image_size == (24, 24)


def test_student_begins_where_the_run_ended(tmp_path: Path, plain_run: Path) -> None:
    """One step at a learning rate of nearly nothing: what is kept is what it began with."""
    train("digits", tmp_path / "run", init=str(plain_run), steps=1, lr_per_256_images=1e-12, ema_decay=0.0)
    began, ended = (load_file(run / "model" / "model.safetensors") for run in (plain_run, tmp_path / "run"))
    assert began.keys() == ended.keys()
    for name, tensor in ended.items():
        torch.testing.assert_close(tensor, began[name], atol=1e-7, rtol=1e-6)


def test_resumed_run_does_not_need_the_weights_it_began_with(tmp_path: Path, plain_run: Path) -> None:
    """And ends with the same bits. Before its first checkpoint it needs them."""
    weights = tmp_path / "first"
    shutil.copytree(plain_run, weights)
    settings = {"init": str(weights), "distil_target": "labels", "epochs": 3}
    train("digits", tmp_path / "whole", **settings)
    with killed_after_epoch(1):
        train("digits", tmp_path / "broken", **settings)
    shutil.rmtree(weights)
    _, lines = train("digits", tmp_path / "broken", resume=True, **settings)
    assert not [line for line in lines if line.startswith("start:")]
    model = Path("model") / "model.safetensors"
    assert (tmp_path / "whole" / model).read_bytes() == (tmp_path / "broken" / model).read_bytes()
    assert train("digits", tmp_path / "broken", resume=True, **settings)[0]["steps"] == 12  # finished: nothing to do
    shutil.rmtree(tmp_path / "broken" / "checkpoints")
    (tmp_path / "broken" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"first: no such run folder or file of weights"):
        train("digits", tmp_path / "broken", resume=True, **settings)


def test_resuming_with_other_weights_is_refused(tmp_path: Path, plain_run: Path) -> None:
    with killed_after_epoch(1):
        train("digits", tmp_path / "run", init=str(plain_run))
    with pytest.raises(UserError, match=r"student\.init = "):
        train("digits", tmp_path / "run", init=str(plain_run / "model"), resume=True)


def test_configuration_with_weights_fed_back_gives_the_same_bits(tmp_path: Path, plain_run: Path) -> None:
    train("digits", tmp_path / "first", init=str(plain_run), epochs=1)
    stored = validated(RunConfig, load_yaml(tmp_path / "first" / "config.yaml"), "config.yaml")
    assert stored.student.init == str(plain_run)
    jobs.run_training("digits", stored, tmp_path / "again", resume=False, progress=SilentProgress())
    model = Path("model") / "model.safetensors"
    assert (tmp_path / "first" / model).read_bytes() == (tmp_path / "again" / model).read_bytes()


def test_named_student_has_to_have_the_shape_of_the_weights(tmp_path: Path, plain_run: Path) -> None:
    with pytest.raises(UserError, match=r"--init deit_pico: is of stem patch, the student of stem conv"):
        train("digits", tmp_path / "run", init=str(plain_run), student="deit_pico")
    assert not (tmp_path / "run").exists()


def test_weights_for_colour_see_grey_images_in_all_three(tmp_path: Path) -> None:
    """As a pretrained teacher does: the answers are those to the same image in grey RGB."""
    config = changed(SHAPE, image_size=(8, 8), classes=10, distillation_token=False)
    run = saved(tmp_path / "rgb", config, tuple("0123456789"))
    still = {"steps": 1, "lr_per_256_images": 1e-12, "ema_decay": 0.0, "calibrate": False}
    _, lines = train("digits", tmp_path / "run", init=str(run), **still)
    assert any(line.endswith("the data are grey: they are shown to them that way") for line in lines)
    began, card = load_model(run / "model")
    ended, _ = load_model(tmp_path / "run" / "model")
    assert card.architecture.channels == ended.body.config.channels == 3
    grey = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(ended(grey).cls_BK, began(grey.expand(-1, 3, -1, -1)).cls_BK, atol=1e-4, rtol=1e-4)


def test_shape_of_the_student_follows_from_the_weights_wherever_it_is_asked_for(plain_run: Path) -> None:
    """`deit compare` asks before any run is begun."""
    digits = load_data("digits", DataConfig())
    config = resolve.resolve(configured(RunConfig, {"init": str(plain_run)}), digits, "digits")
    assert config.student.student is None
    expected = load_model(plain_run / "model")[1].architecture
    assert resolve.student_architecture(config, digits) == expected
    larger = configured(RunConfig, {"init": str(plain_run), "image_size": 24, "distillation": "none"})
    assert resolve.student_architecture(larger, digits).grid == (12, 12)


def test_student_that_starts_from_weights_keeps_their_resolution(plain_run: Path, tmp_path: Path) -> None:
    """Of small images, whose size a fresh student takes; a student by name takes it, too."""
    larger = changed(load_model(plain_run / "model")[1].architecture, image_size=(16, 16), channels=1)
    start = str(saved(tmp_path / "larger", larger, tuple("0123456789")))
    digits = load_data("digits", DataConfig())

    def size(**settings: Any) -> tuple[int, int]:
        config = configured(RunConfig, {"init": start, "distillation": "none", **settings})
        return resolve.student_architecture(config, digits).image_size

    assert size() == (16, 16)
    assert size(image_size=24) == (24, 24)
    assert size(student="deit_pico", stem="patch", **{k: v for k, v in TINY.items() if k != "stem"}) == (8, 8)


def test_plain_students_by_name_refuse_a_teacher_for_their_token(tmp_path: Path, cnn: Path) -> None:
    with pytest.raises(UserError, match=r"--student vit_tiny: has no distillation token .*--distil-head cls"):
        train("digits", tmp_path / "run", student="vit_tiny", teacher=str(cnn))


# ------------------------------------------------------------------------------------------ fine-tuning


@pytest.mark.parametrize(
    "options",
    [
        {"tune": "attention"}, {"tune": "last-1", "optimizer": "muon"}, {"layer_decay": 0.6},
        {"layer_decay": 0.6, "optimizer": "muon"},
    ],
)  # fmt: skip
def test_interrupted_fine_tuning_ends_with_the_same_bits(
    tmp_path: Path, plain_run: Path, options: dict[str, Any]
) -> None:
    settings = {"init": str(plain_run), "distil_target": "labels", "epochs": 3, **options}
    train("digits", tmp_path / "whole", **settings)
    with killed_after_epoch(1):
        train("digits", tmp_path / "broken", **settings)
    train("digits", tmp_path / "broken", resume=True, **settings)
    model = Path("model") / "model.safetensors"
    assert (tmp_path / "whole" / model).read_bytes() == (tmp_path / "broken" / model).read_bytes()


@pytest.mark.parametrize("ema_decay", [0.0, 0.99])
def test_frozen_weights_stay_as_they_were_bit_for_bit(tmp_path: Path, plain_run: Path, ema_decay: float) -> None:
    settings = {"init": str(plain_run), "tune": "last-1", "distil_target": "labels", "ema_decay": ema_decay}
    _, lines = train("digits", tmp_path / "run", **settings)
    began, ended = (load_file(run / "model" / "model.safetensors") for run in (plain_run, tmp_path / "run"))
    moved = {name for name in began if name != "pos_embed" and not torch.equal(began[name], ended[name])}
    assert moved == {name for name in began if name.startswith(("blocks.1.", "norm.", "head."))}
    assert torch.equal(ended["pos_embed"][:, 2:], began["pos_embed"][:, 1:])
    (line,) = (line for line in lines if line.startswith("--tune last-1: "))
    learning = sum(t.numel() for n, t in ended.items() if n in moved or n.startswith(("dist_token", "head_dist")))
    assert line == f"--tune last-1: {learning:,} of {sum(t.numel() for t in ended.values()):,} parameters learn"


def test_frozen_convolutional_stem_keeps_its_statistics(tmp_path: Path) -> None:
    config = changed(SHAPE, image_size=(8, 8), channels=1, classes=10, stem="conv", distillation_token=False)
    run = saved(tmp_path / "conv", config, tuple("0123456789"))
    train("digits", tmp_path / "run", init=str(run), tune="attention", ema_decay=0.0)
    began, ended = (load_file(folder / "model" / "model.safetensors") for folder in (run, tmp_path / "run"))
    assert all(torch.equal(began[name], ended[name]) for name in began if name.startswith("stem."))
    assert not torch.equal(began["blocks.0.attn.qkv.weight"], ended["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"tune": "attention"}, "tune: attention leaves weights as they are that nobody has trained: give --init"),
        ({"tune": "last-3", "init": True}, "--tune last-3: the student has 2 blocks"),
        ({"tune": "first-1", "init": True}, "tune: string should match pattern"),
        ({"layer_decay": 0.0}, "layer_decay: input should be greater than 0"),
    ],
)
def test_fine_tuning_that_makes_no_sense_is_refused(
    tmp_path: Path, plain_run: Path, settings: dict[str, Any], complaint: str
) -> None:
    if settings.pop("init", False):
        settings = {**settings, "init": str(plain_run)}
    with pytest.raises(UserError) as caught:
        train("digits", tmp_path / "run", **settings)
    assert complaint in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{"tune": "attention"}, {"layer_decay": 0.5}])
def test_convolutional_teachers_are_not_tuned_by_layers(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is for a transformer's blocks: a convolutional network has --head-share"):
        configured(FitConfig, settings)
