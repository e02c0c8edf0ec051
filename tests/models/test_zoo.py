"""Named students against the paper's table 1; networks to disk and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deitkit.config import StudentConfig
from deitkit.models.cnn import CNNConfig
from deitkit.models.network import Network
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.zoo import (
    STUDENTS,
    ModelCard,
    build,
    choose_student,
    describe_students,
    load_model,
    multiply_adds,
    parameter_count,
    save_model,
    student_preprocessing,
)
from deitkit.terminal import UserError

SMALL = ViTConfig(image_size=(8, 8), channels=1, classes=3, patch_size=(4, 4), width=16, depth=2, heads=2)


def card_for(config: ViTConfig) -> ModelCard:
    preprocessing = student_preprocessing(config, photos=False)
    return ModelCard(name="small", architecture=config, classes=("a", "b", "c"), preprocessing=preprocessing)


@pytest.fixture(scope="module")
def described() -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in describe_students()}


@pytest.mark.parametrize(
    ("name", "million", "gmac"),
    [
        # DeiT paper, table 1, and its fine-tuning at 384: parameters without the token and its head
        ("deit_tiny_plain", 5.7, 1.26), ("deit_small_plain", 22.05, 4.61), ("deit_base_plain", 86.6, 17.58),
        ("deit_base_384_plain", 86.9, 55.5),
        ("vit_base", 86.6, 17.58), ("vit_base_384", 86.9, 55.5),
        # DeiT III paper, results on ImageNet-1k
        ("deit3_small", 22.05, 4.6), ("deit3_base", 86.6, 17.5), ("deit3_large", 304.4, 61.6),
        ("deit3_huge", 632.1, 167.4), ("deit3_small_384", 22.2, 15.5), ("deit3_base_384", 86.9, 55.5),
        ("deit3_large_384", 304.8, 191.2),
    ],
)  # fmt: skip
def test_parameters_and_multiply_adds_are_the_papers(
    described: dict[str, dict[str, Any]], name: str, million: float, gmac: float
) -> None:
    """Within 0.6 %: the papers round, and count (or leave out) norms, biases and softmax differently."""
    assert described[name]["parameters"] / 1e6 == pytest.approx(million, abs=0.06)
    assert described[name]["gmac"] == pytest.approx(gmac, rel=0.006)


@pytest.mark.parametrize(
    ("name", "million", "gmac"),
    [
        # deit3_medium: timm, results/benchmark-infer-amp-nhwc-pt113-cu117-rtx3090.csv
        ("deit_tiny", 5.91, 1.3),
        ("deit3_medium", 38.85, 8.0),
        ("deit_small_plain", 22.1, 4.6),
        ("deit_base", 87.3, 17.7),
        ("deit_base_384_plain", 86.9, 55.5),
    ],
)
def test_figures_are_those_of_timms_model_cards(
    described: dict[str, dict[str, Any]], name: str, million: float, gmac: float
) -> None:
    """Among them figures with the distillation token; DeiT's table 1 has 6 million for the tiny one."""
    row = described[name]
    assert row["parameters"] / 1e6 == pytest.approx(million, abs=0.06)
    assert row["gmac"] == pytest.approx(gmac, abs=0.06)


@pytest.mark.parametrize("name", ["deit_mini", "deit3_small"])
def test_costs_of_two_blocks_give_those_of_all(described: dict[str, dict[str, Any]], name: str) -> None:
    config = STUDENTS[name].model_copy(update={"classes": described[name]["classes"]})
    with torch.device("meta"):
        network = Network(ViT(config), student_preprocessing(config, photos=True))
    assert multiply_adds(network, config.channels) / 1e9 == described[name]["gmac"]


def test_plain_vit_differs_from_plain_deit_in_its_preprocessing_alone() -> None:
    for size in ("tiny", "small", "base", "base_384"):
        assert STUDENTS[f"vit_{size}"] == STUDENTS[f"deit_{size}_plain"]
    config = STUDENTS["vit_tiny"]
    assert student_preprocessing(config, photos=True, name="vit_tiny").mean == (0.5, 0.5, 0.5)
    assert student_preprocessing(config, photos=True, name="deit_tiny_plain").mean == (0.485, 0.456, 0.406)
    grey = config.model_copy(update={"channels": 1})
    assert student_preprocessing(grey, photos=True, name="vit_tiny").std == (0.5,)


def test_deit3_is_as_published() -> None:
    for name, config in STUDENTS.items():
        deit3 = name.startswith("deit3")
        assert (config.layer_scale, config.position_of_prefix) == ((1e-4, False) if deit3 else (None, True)), name
        assert not (deit3 and config.distillation_token)
    assert STUDENTS["deit3_huge"].grid == (16, 16)


def test_multiply_adds_of_a_linear_map_by_hand() -> None:
    config = ViTConfig(image_size=(4, 4), channels=1, classes=3, patch_size=(4, 4), width=8, depth=1, heads=1)
    network = build(card_for(config))
    patches = 16 * 8
    block = 3 * (8 * 24 + 8 * 8 + 2 * 8 * 32) + 2 * 3 * 3 * 8
    assert multiply_adds(network, 1) == patches + block + 2 * 8 * 3
    assert parameter_count(network) == sum(p.numel() for p in network.body.parameters())


def test_saved_network_comes_back_bit_for_bit(tmp_path: Path) -> None:
    card = card_for(SMALL)
    network = build(card).eval()
    save_model(tmp_path / "model", network, card)
    again, again_card = load_model(tmp_path / "model")
    assert again_card == card
    images = torch.rand(2, 1, 8, 8)
    for ours, theirs in zip(network(images), again(images), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stem", ["patch", "conv", "residual"])
@pytest.mark.parametrize("deit3", [False, True])
def test_loading_a_model_draws_no_initial_weights_and_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stem: str, deit3: bool
) -> None:
    """Buffers, memory layouts and types as those of a network that was built with initial weights."""
    changes = {"distillation_token": False, "layer_scale": 0.1, "position_of_prefix": False} if deit3 else {}
    card = card_for(SMALL.model_copy(update={"stem": stem, **changes}))
    network = build(card)
    network(torch.rand(4, 1, 8, 8))  # moves the statistics of batch normalisation
    save_model(tmp_path, network, card)
    random_state = torch.get_rng_state()

    def without_numbers(tensor: torch.Tensor, *_args: object, **_options: object) -> torch.Tensor:
        assert tensor.is_meta, "initial weights were drawn"
        return tensor

    for name in ("trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "uniform_", "ones_", "zeros_", "constant_"):
        monkeypatch.setattr(torch.nn.init, name, without_numbers)
    monkeypatch.setattr("deitkit.models.vit.initialise", lambda *_: pytest.fail("initial weights were drawn"))
    loaded, _ = load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    ours, theirs = loaded.body.state_dict(), network.body.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
        assert (ours[name].stride(), ours[name].dtype, ours[name].device) == (
            tensor.stride(),
            tensor.dtype,
            tensor.device,
        )
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert {name for name, _ in loaded.named_buffers()} == {name for name, _ in network.named_buffers()}


def test_weights_in_half_precision_are_read_in_single_precision(tmp_path: Path) -> None:
    card = card_for(SMALL)
    save_model(tmp_path, build(card), card)
    half = {name: tensor.half() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(half, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path)[0].body.state_dict()
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, half[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("name", ["cifar-resnet8", "resnet18"])
def test_loading_a_convolutional_network_leaves_the_global_generator_alone(tmp_path: Path, name: str) -> None:
    images = student_preprocessing(SMALL, photos=False).model_copy(update={"image_size": (32, 32)})
    config = CNNConfig(name=name, classes=3, channels=1)
    card = ModelCard(name=name, architecture=config, classes=("a", "b", "c"), preprocessing=images)
    network = build(card)
    network(torch.rand(4, 1, 32, 32))
    save_model(tmp_path, network, card)
    random_state = torch.get_rng_state()
    loaded, _ = load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    theirs = network.body.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in loaded.body.state_dict().items())


def test_a_model_saved_with_the_former_name_of_crop_pct_is_read(tmp_path: Path) -> None:
    card = card_for(SMALL)
    card = card.model_copy(update={"preprocessing": card.preprocessing.model_copy(update={"crop_pct": 0.9})})
    save_model(tmp_path, build(card), card)
    text = (tmp_path / "model.json").read_text()
    (tmp_path / "model.json").write_text(text.replace('"crop_pct"', '"crop_fraction"'))
    assert load_model(tmp_path)[1] == card
    both = text.replace('"crop_pct"', '"crop_fraction": 0.8, "crop_pct"')
    (tmp_path / "model.json").write_text(both)
    with pytest.raises(UserError, match="crop_fraction"):
        load_model(tmp_path)


def test_saved_cnn_comes_back(tmp_path: Path) -> None:
    card = card_for(SMALL).model_copy(update={"architecture": CNNConfig(name="cifar-resnet8", classes=3, channels=1)})
    network = build(card).eval()
    save_model(tmp_path / "model", network, card)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(load_model(tmp_path / "model")[0](images).cls_BK, network(images).cls_BK)


@pytest.mark.parametrize("file", ["model.safetensors", "model.json"])
def test_damaged_model_is_one_clear_line(tmp_path: Path, file: str) -> None:
    card = card_for(SMALL)
    save_model(tmp_path / "model", build(card), card)
    (tmp_path / "model" / file).write_bytes(b"{not what it was")
    with pytest.raises(UserError, match=file):
        load_model(tmp_path / "model")
    (tmp_path / "model" / file).unlink()
    with pytest.raises(UserError, match="no such file"):
        load_model(tmp_path / "model")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", build(card_for(SMALL)), card_for(SMALL.model_copy(update={"depth": 3})))
    with pytest.raises(UserError, match=r"model\.safetensors: weights of another network: they lack blocks\.2"):
        load_model(tmp_path / "model")


def test_student_takes_size_channels_and_classes_from_the_data() -> None:
    student = choose_student(StudentConfig(), (28, 28), channels=1, classes=7)
    assert (student.image_size, student.channels, student.classes) == ((28, 28), 1, 7)
    assert choose_student(StudentConfig(), (8, 8), 1, 10).patch_size == (2, 2)
    assert choose_student(StudentConfig(), None, 3, 10).image_size[0] >= 128
    assert choose_student(StudentConfig(student="deit_tiny"), (32, 32), 3, 10).image_size == (224, 224)
    assert choose_student(StudentConfig(image_size=48), (32, 32), 3, 10).image_size == (48, 48)


def test_non_square_images_make_a_non_square_student() -> None:
    student = choose_student(StudentConfig(), (28, 36), channels=3, classes=2)
    assert student.grid == (7, 9)


def test_unknown_student_lists_the_close_ones() -> None:
    with pytest.raises(UserError, match=r"did you mean .*deit_tiny"):
        choose_student(StudentConfig(student="deit_tiney"), None, 3, 10)


def test_shape_that_does_not_fit_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="not a multiple of the patch"):
        choose_student(StudentConfig(image_size=30), (32, 32), 3, 10)
    with pytest.raises(UserError, match="not a multiple of heads"):
        choose_student(StudentConfig(heads=5), (32, 32), 3, 10)


def test_every_named_student_can_be_built() -> None:
    assert {row["name"] for row in describe_students()} == set(STUDENTS)


@pytest.mark.parametrize(
    ("was", "now", "complaint"),
    [
        ('"width": 16', '"wdith": 16', "unknown configuration key 'wdith': did you mean width or depth?"),
        ('"classes": 3', '"classes": 4', "classes: 3 names for a head of 4 classes"),
        ('"classes": 3', '"classes": 0', "greater than 0"),
        ('"std": [\n      0.226\n    ]', '"std": [0]', "preprocessing.std.0: input should be greater than 0"),
        ('"std": [\n      0.226\n    ]', '"std": [1, 1]', "1 means and 2 standard deviations"),
        ('"mean": [\n      0.449\n    ]', '"mean": []', "preprocessing.mean: tuple should have at least 1 item"),
        ('"width": 16', '"width": 10000000', "architecture.width: input should be less than or equal to 16384"),
        (
            '"mlp_ratio": 4.0',
            '"mlp_ratio": 1e300',
            "architecture.mlp_ratio: input should be less than or equal to 1000",
        ),
        ('"crop_pct": 1.0', '"crop_pct": 1e-9', "preprocessing.crop_pct: input should be greater than"),
        ('"name": "small",', "", "name: field required"),
    ],
)
def test_a_wrong_card_is_one_line(tmp_path: Path, was: str, now: str, complaint: str) -> None:
    card = card_for(SMALL)
    save_model(tmp_path, build(card), card)
    text = (tmp_path / "model.json").read_text()
    assert was in text
    (tmp_path / "model.json").write_text(text.replace(was, now, 1))
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    card = card_for(SMALL)
    network = build(card)
    with torch.no_grad():
        network.body.pos_embed[0, 1, 2] = torch.nan
    save_model(tmp_path, network, card)
    with pytest.raises(UserError, match="pos_embed holds infinity or NaN"):
        load_model(tmp_path)


def test_weights_are_readable_by_whom_other_new_files_are(tmp_path: Path) -> None:
    card = card_for(SMALL)
    save_model(tmp_path, build(card), card)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["model.json"]
