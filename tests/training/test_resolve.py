"""Settings that the data decide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deitkit.config import DataConfig, FitConfig, RunConfig
from deitkit.data import Dataset, load_data
from deitkit.settings import build, upgraded
from deitkit.terminal import UserError
from deitkit.training import fit as fitting
from deitkit.training import setup
from deitkit.training.fit import ENLARGED, MOST_AUTOMATIC_EPOCHS, automatic_fits, fit_key


@pytest.mark.parametrize("size", [(1, 1), (9, 7), (37, 23), (64, 5)])
def test_small_images_of_any_size_are_learnt_from(size: tuple[int, int]) -> None:
    config = setup.resolve(build(RunConfig, {}), data_of_size(size), "x")
    architecture = setup.student_architecture(config, data_of_size(size))
    assert config.view.view_size == size
    assert all(abs(side - given) <= 2 for side, given in zip(architecture.image_size, size, strict=True))


def test_a_setting_with_a_wrong_name_is_told_the_right_one_in_whichever_section_it_is() -> None:
    for kind in (RunConfig, FitConfig):
        with pytest.raises(UserError, match="unknown setting 'epoch': did you mean epochs"):
            build(kind, {"epoch": 3})


@pytest.mark.parametrize("size", [(100, 75), (640, 480), (65, 65)])
def test_photos_that_share_a_size_are_photos(size: tuple[int, int]) -> None:
    config = setup.resolve(build(RunConfig, {}), data_of_size(size), "x")
    assert (config.view.crop, config.view.view_size, config.student.student) == ("resize", (128, 128), "deit_photo")
    config = setup.resolve(build(RunConfig, {"student": "deit_nano"}), data_of_size(size), "x")
    assert config.view.view_size == (32, 32)


def data_of_size(size: tuple[int, int]) -> Dataset:
    return replace(load_data("digits", DataConfig()), image_size=size)


def test_padding_beyond_the_image_is_refused() -> None:
    with pytest.raises(UserError, match="crop_padding: input should be less than 1"):
        build(RunConfig, {"crop_padding": 8})


def test_a_simple_crop_pads_by_four_pixels_of_224_unless_told_otherwise() -> None:
    for settings, padding in (({}, 4 / 224), ({"crop_padding": 0.1}, 0.1), ({"crop_padding": 0}, 0)):
        config = build(RunConfig, {"crop": "simple", **settings})
        view = setup.resolve(config, data_of_size((640, 480)), "x").view
        assert (view.crop_padding, view.view_size) == (padding, (128, 128))


def test_padding_in_pixels_of_a_stored_run_becomes_a_share() -> None:
    stored = {"view": {"crop": "pad", "crop_padding": 2, "view_size": [28, 28]}}
    assert upgraded(stored, "x")["view"]["crop_padding"] == 2 / 28


def test_more_repeats_than_pairs_of_images_are_refused() -> None:
    few = load_data("digits", DataConfig(train_images=10))
    assert setup.resolve(build(RunConfig, {"repeated_aug": 5}), few, "x").view.repeated_aug == 5
    with pytest.raises(UserError, match=r"--repeated-aug 6: .* there are 5 pairs of training images"):
        setup.resolve(build(RunConfig, {"repeated_aug": 6}), few, "x")


def test_an_automatic_teacher_is_another_one_with_other_settings_of_its_fit() -> None:
    for section in ({"optim": {"warmup": "1ep"}}, {"view": {"three_augment": True}}):
        assert fit_key(FitConfig.model_validate(section)) != fit_key(FitConfig())
    for section in ({"loop": {"workers": 3}}, {"loop": {"precision": "bfloat16"}}):
        assert fit_key(FitConfig.model_validate(section)) == fit_key(FitConfig())


def test_automatic_teachers_are_probed_on_photos_and_trained_from_scratch_on_small_images_too() -> None:
    for size, channels, names in (
        ((300, 200), 3, ["lite0"]),
        ((32, 32), 1, ["lite0", "cifar-resnet20"]),
        ((32, 32), 3, ["lite0"]),
        ((8, 8), 1, ["cifar-resnet8"]),
    ):
        data = replace(data_of_size(size), channels=channels)
        config = setup.resolve(build(RunConfig, {"teacher": "auto", "view_seed": 3, "unlabelled": True}), data, "x")
        fits = automatic_fits(data, config)
        assert [fit.model for fit in fits] == names
        assert [fit.from_scratch for fit in fits] == [name != "lite0" for name in names]
        assert all(fit.view.view_seed == 3 and not fit.data.unlabelled for fit in fits)


def test_many_small_colour_images_are_also_learnt_from_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = replace(data_of_size((32, 32)), channels=3)
    config = setup.resolve(build(RunConfig, {"teacher": "auto"}), data, "x")
    for most, names in ((len(data.open_split("train")), ["lite0", "cifar-resnet20"]), (10**6, ["lite0"])):
        monkeypatch.setattr(fitting, "MANY_SMALL_IMAGES", most)
        assert [fit.model for fit in automatic_fits(data, config)] == names


def test_a_few_small_images_are_shown_often_to_an_automatic_teacher() -> None:
    config = setup.resolve(build(RunConfig, {"train_images": 30}), data_of_size((32, 32)), "x")
    dataset = replace(load_data("digits", config.data), image_size=(32, 32))
    assert automatic_fits(dataset, config)[1].loop.amount("ep") == MOST_AUTOMATIC_EPOCHS


def test_an_automatic_teacher_is_fitted_at_the_size_at_which_it_sees_images() -> None:
    """A probe at that of the network itself, or at which it sees enlarged images; a network from scratch at that of the images."""
    for size, own in (((8, 8), [None]), ((32, 32), [ENLARGED, None]), ((300, 200), [None])):
        data = data_of_size(size)
        for given, wanted in ((None, own), (96, [96] * len(own))):
            config = setup.resolve(build(RunConfig, {"teacher": "auto", "teacher_size": given}), data, "x")
            assert [fit.image_size for fit in automatic_fits(data, config)] == wanted


def test_z_scores_of_two_classes_are_refused() -> None:
    digits = load_data("digits", DataConfig())
    config = build(RunConfig, {"teacher": "x", "distillation": "zscore"})
    assert setup.resolve(config, replace(digits, classes=("a", "b", "c")), "x").loss.distillation == "zscore"
    with pytest.raises(UserError, match="--distillation zscore needs three classes"):
        setup.resolve(config, replace(digits, classes=("a", "b")), "x")


def test_a_temperature_that_no_loss_is_left_for_is_refused() -> None:
    digits = load_data("digits", DataConfig())
    two = replace(digits, classes=("a", "b"))
    asked = build(RunConfig, {"teacher": "x", "temperature": 2.0})
    assert setup.resolve(asked, digits, "x").loss.temperature == 2.0
    with pytest.raises(UserError, match=r"--temperature 2: .* hard labels are learned, which have none"):
        setup.resolve(asked, two, "x")
    assert setup.resolve(build(RunConfig, {"teacher": "x"}), two, "x").loss.temperature is None


def test_what_is_learned_from_a_teacher_where_nobody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """How its logits lie to each other; its decisions where that cannot be learned. What belongs to the loss comes with it."""
    digits = load_data("digits", DataConfig())
    two = replace(digits, classes=("a", "b"))

    def learned(data: Dataset, **settings: Any) -> tuple[Any, ...]:
        loss = setup.resolve(build(RunConfig, settings), data, "x").loss
        return loss.distillation, loss.temperature, loss.teacher_weight

    assert learned(digits, teacher="x") == ("zscore", 2.0, 5.0)
    assert learned(digits, teacher="x", temperature=4.0, teacher_weight=1.0) == ("zscore", 4.0, 1.0)
    assert learned(two, teacher="x") == ("hard", None, 0.5)
    assert learned(digits, teacher="x", record="tape") == ("zscore", 2.0, 5.0)
    for outputs, loss in (("hard", ("hard", None, 0.5)), (5, ("hard", None, 0.5)), ("all", ("zscore", 2.0, 5.0))):
        monkeypatch.setattr(setup, "read_manifest", lambda _, outputs=outputs: SimpleNamespace(outputs=outputs))
        assert learned(digits, tape="tape") == loss
    assert learned(digits, teacher="x", distillation="soft") == ("soft", 3.0, 0.5)
    assert learned(digits) == ("none", None, None)
    assert learned(digits, distil="labels") == ("none", None, 0.5)


def test_another_loss_than_a_recipe_s_has_its_own_temperature_and_weight(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("loss: {distillation: zscore, temperature: 3, teacher_weight: 7}")
    digits = load_data("digits", DataConfig())
    for settings, expected in (
        ({}, ("zscore", 3.0, 7.0)),
        ({"distillation": "zscore"}, ("zscore", 3.0, 7.0)),
        ({"distillation": "hard"}, ("hard", None, 0.5)),
        ({"distillation": "soft", "teacher_weight": 2.0}, ("soft", 3.0, 2.0)),
        ({"distillation": "soft"}, ("soft", 3.0, 0.5)),
    ):
        config = build(RunConfig, {"teacher": "x", **settings}, recipe=recipe)
        loss = setup.resolve(config, digits, "x").loss
        assert (loss.distillation, loss.temperature, loss.teacher_weight) == expected


def test_images_without_labels_need_a_teacher_that_needs_none() -> None:
    data = load_data("digits", DataConfig(train_images=100, unlabelled=True))
    asked = {"train_images": 100, "unlabelled": True}
    assert setup.resolve(build(RunConfig, {**asked, "teacher": "x"}), data, "x").data.unlabelled
    refused = [({}, "give --teacher"), ({"teacher": "x", "teacher_weight": 0}, "--teacher-weight 0 ignores it")]
    for settings, why in refused:
        with pytest.raises(UserError, match=f"--unlabelled: .*{why}"):
            setup.resolve(build(RunConfig, {**asked, **settings}), data, "x")
