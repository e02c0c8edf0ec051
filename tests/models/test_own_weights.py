"""`--init auto`: a student's own weights, shipped with the package or published, and the rates that they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.test_start import NAMES, changed, fresh

from deitkit.config import RunConfig
from deitkit.models.start import SHIPPED_WEIGHTS, find_init, load_into_student
from deitkit.models.zoo import STUDENTS
from deitkit.settings import SHIPPED_STUDENTS
from deitkit.settings import build as build_config
from deitkit.terminal import UserError
from deitkit.training import setup as resolve


class Opened:
    """As much of a data set as decides a student."""

    channels, mirror_safe, has_test, name = 3, True, False, "opened"

    def __init__(self, image_size: tuple[int, int] | None) -> None:
        self.image_size = image_size


@pytest.mark.parametrize(
    ("settings", "image_size", "name", "init"),
    [
        ({}, None, "deit_photo", "shipped:deit_photo"),
        ({}, (32, 32), "deit_micro", "shipped:deit_micro"),
        ({}, (28, 28), "deit_micro", "shipped:deit_micro"),
        ({"student": "deit_photo", "image_size": 64}, (32, 32), "deit_photo", "shipped:deit_photo"),
        ({}, (8, 8), "deit_pico", None),
        ({"width": 96}, None, "deit_photo", None),
        ({"student": "deit_tiny"}, None, "deit_tiny", "deit_tiny_distilled_patch16_224.fb_in1k"),
    ],
)
def test_auto_takes_the_weights_of_the_student(
    settings: dict[str, Any], image_size: tuple[int, int] | None, name: str, init: str | None
) -> None:
    config = resolve.with_init(build_config(RunConfig, {"init": "auto", **settings}), Opened(image_size))  # type: ignore[arg-type]
    assert (config.student.student, config.student.init) == (name, init)


def test_auto_is_refused_where_weights_are_asked_for_and_there_are_none() -> None:
    config = build_config(RunConfig, {"init": "auto", "trainable": "last-1"})
    with pytest.raises(UserError, match="--init auto: there are no pretrained weights of the student deit_pico"):
        resolve.with_init(config, Opened((8, 8)))  # type: ignore[arg-type]


def test_scratch_overrides_a_recipe_and_rates_follow_the_weights() -> None:
    shipped = build_config(RunConfig, {}, lower={"init": "auto"})
    assert build_config(RunConfig, {"init": "scratch"}, lower={"init": "auto"}).student.init is None
    assert (shipped.optim, shipped.student.init) == (RunConfig().optim, "auto")  # Muon's, as for fresh weights
    mimetic = build_config(RunConfig, {"init": "mimetic", "student": "deit_tiny"}, lower={"init": "auto"})
    assert (mimetic.optim, mimetic.student.init) == (RunConfig().optim, "mimetic")
    with pytest.raises(UserError, match="last-1 would keep random weights"):
        build_config(RunConfig, {"init": "mimetic", "trainable": "last-1"})
    published = build_config(RunConfig, {"init": "auto", "student": "deit_tiny"})
    assert (published.optim.optimizer, published.optim.base_lr) == ("adamw", 5e-4)
    for fresh_all_the_same in ({"student": "deit_nano"}, {"student": "deit_tiny", "depth": 6}, {}):
        assert build_config(RunConfig, {"init": "auto", **fresh_all_the_same}).optim == RunConfig().optim


def test_another_student_does_not_take_the_weights_of_a_recipe() -> None:
    recipe = {"init": "auto", "student": "deit_photo"}
    assert build_config(RunConfig, {"student": "deit_tiny"}, lower=recipe).student.init is None
    assert build_config(RunConfig, {"student": "deit_tiny", "init": "auto"}, lower=recipe).student.init == "auto"
    assert build_config(RunConfig, {"image_size": 64}, lower=recipe).student.init == "auto"


@pytest.mark.parametrize("name", SHIPPED_STUDENTS)
@pytest.mark.parametrize("token", [True, False])
def test_shipped_weights_fit_their_student(name: str, token: bool) -> None:
    """All of it but the heads, at another resolution; both tokens begin as the one that was taught."""
    source = find_init(f"shipped:{name}")
    config = changed(STUDENTS[name], image_size=(48, 48), classes=5, distillation_token=token)
    vit, untouched = fresh(config), fresh(config).state_dict()
    lines = load_into_student(vit, source, NAMES)
    assert "pretrained without labels" in lines[0]
    same = {key for key, tensor in vit.state_dict().items() if torch.equal(tensor, untouched[key])}
    assert same == {key for key in untouched if key.startswith("head")}
    assert torch.equal(vit.pos_embed[:, 0], source.tensors["pos_embed"][:, 0].float())
    assert torch.equal(source.tensors["cls_token"], source.tensors["dist_token"])
    assert all(tensor.dtype in (torch.float16, torch.int64) for tensor in source.tensors.values())
    vit.eval()(torch.zeros(1, 3, 48, 48))


def test_shipped_weights_are_small() -> None:
    assert sorted(file.stem for file in SHIPPED_WEIGHTS.iterdir()) == sorted(SHIPPED_STUDENTS)
    assert sum(file.stat().st_size for file in SHIPPED_WEIGHTS.glob("*.safetensors")) <= 8e6


def test_the_name_of_a_student_is_no_place_of_weights() -> None:
    with pytest.raises(UserError, match="--init deit_photo: is a student: give --student deit_photo --init auto"):
        find_init("deit_photo")
    with pytest.raises(UserError, match="--init shipped:deit_tiny: shipped are weights of deit_photo and deit_micro"):
        find_init("shipped:deit_tiny")
