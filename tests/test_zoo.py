"""Named students against the paper's table 1; networks to disk and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deitkit.config import CNNConfig, ModelCard, StudentConfig, ViTConfig
from deitkit.errors import UserError
from deitkit.zoo import (
    STUDENTS,
    build,
    choose_student,
    describe_students,
    load_model,
    multiply_adds,
    parameter_count,
    save_model,
    student_preprocessing,
)

SMALL = ViTConfig(image_size=(8, 8), channels=1, classes=3, patch_size=(4, 4), width=16, depth=2, heads=2)


def card_for(config: ViTConfig) -> ModelCard:
    preprocessing = student_preprocessing(config, photos=False)
    return ModelCard(name="small", architecture=config, classes=("a", "b", "c"), preprocessing=preprocessing)


@pytest.mark.parametrize(
    ("name", "million", "gmac"), [("deit_tiny", 5.9, 1.26), ("deit_small", 22.4, 4.61), ("deit_base", 87.3, 17.58)]
)
def test_parameters_and_multiply_adds_are_the_papers(name: str, million: float, gmac: float) -> None:
    """Table 1: 5 M, 22 M, 86 M without the token and its head; GMAC as measured without the token."""
    row = next(row for row in describe_students() if row["name"] == name)
    assert row["parameters"] / 1e6 == pytest.approx(million, abs=0.06)
    assert row["gmac"] == pytest.approx(gmac, rel=0.02)


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
    with pytest.raises(UserError, match="does not fit"):
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
        ('"width": 16', '"width": 10000000', "less than or equal to 16384"),
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
