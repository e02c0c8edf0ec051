"""Where weights to start from are found, and what is known of them there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models.test_start import NAMES, SHAPE, changed, fresh, saved

from deitkit.config import DataConfig, RunConfig
from deitkit.data import load_data
from deitkit.models.cnn import CNNConfig
from deitkit.models.start import find_init, load_into_student, start_preprocessing
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.weights import from_ours, to_ours
from deitkit.models.zoo import STUDENTS, ModelCard, build, save_model, student_preprocessing
from deitkit.terminal import UserError
from deitkit.training import setup as resolve


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
    torch.save({"model": ViT(SHAPE).state_dict(), "args": argparse.Namespace()}, tmp_path / "program.pth")
    with pytest.raises(
        UserError, match=r"also holds argparse\.Namespace, a Python object: give the network's state dict"
    ):
        find_init(str(tmp_path / "program.pth"))


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
    config = json.loads((tmp_path / "config.json").read_text())
    flat = {**config.pop("pretrained_cfg"), **config}  # as timm wrote it once
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert find_init(str(tmp_path)).facts == facts


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"pretrained_cfg": {"input_size": [3, 16, 16]}}, "config.json: lacks 'mean'"),
        ({"pretrained_cfg": {"input_size": 3}}, "config.json: unexpected content: "),
        ({"model_args": [1]}, "config.json: model_args: expected a mapping"),
        ({"model_args": {"embed_dim": "wide"}}, "timm makes no network vit_tiny_patch16_224: "),
        ({"architecture": "vit_teeny"}, "timm makes no network vit_teeny: "),
        ({"architecture": "resnet18", "model_args": {}}, "timm makes no network resnet18: "),
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
        ("deit_small_patch16_224", "has width 384, the weights in .* have width 192"),
        ("deit_tiny_distilled_patch16_224", "has a distillation token, the weights in .* have no distillation token"),
    ):
        with pytest.raises(UserError, match=complaint):
            find_init(f"{other}@{tmp_path / 'vit.safetensors'}")
    larger = find_init(f"vit_tiny_patch16_384@{tmp_path / 'vit.safetensors'}")
    assert larger.facts.assumed == ("a square of 14x14 patches",)
    save_file(timm.create_model("vit_small_patch32_224").state_dict(), tmp_path / "coarse.safetensors")
    with pytest.raises(UserError, match=r"has patch size 16x16, the weights in .* have patch size 32x32"):
        find_init(f"vit_small_patch16_224@{tmp_path / 'coarse.safetensors'}")


def test_named_student_keeps_the_epsilon_of_its_weights(tmp_path: Path) -> None:
    weights = from_ours(ViT(STUDENTS["deit_tiny"]).state_dict(), "hf-teacher")
    save_file(weights, tmp_path / "deit.safetensors")
    config = build(RunConfig, {"init": str(tmp_path / "deit.safetensors"), "student": "deit_tiny"})
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
    monkeypatch.setattr("deitkit.models.weights.hub_reachable", lambda: False)
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
    monkeypatch.setattr("deitkit.models.weights.hub_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "model.safetensors"))
    random_state = torch.get_rng_state()
    source = find_init("deit_tiny_distilled_patch16_224")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert source.facts.architecture == STUDENTS["deit_tiny"]
    assert (source.facts.preprocessing.crop_pct, source.facts.preprocessing.mean[0]) == (0.9, 0.485)
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

    monkeypatch.setattr("deitkit.models.weights.hub_reachable", lambda: True)
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
