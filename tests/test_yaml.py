"""Settings in YAML files: recipes, and the configurations of older versions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.test_settings import run_config, written

from deitkit.config import RunConfig
from deitkit.settings import (
    build,
    upgraded,
    validated,
)
from deitkit.terminal import UserError, load_yaml


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("los: {}", "unknown section 'los': did you mean loss or loop?"),
        (
            "loss: {temprature: 2}",
            "unknown configuration key 'temprature': did you mean temperature or feature_weight?",
        ),
        ("loss: {temperature: -2}", "loss: temperature: input should be greater than 0"),
        ("loss: 3", "loss: expected settings"),
        ("1: {}", "unknown section '1': known: "),
        ("loop: {length: 30}", "loop: length: give a number with its unit"),
        ("loop: {length: 2026-99-99}", "not valid YAML"),
        ("loss: " + "[" * 5000, "not valid YAML"),
        (f"loss: {'x' * 500}", "xxx..."),
        ("loss: {distillation: dkd}", "distillation: 'dkd' is not there any more"),
        ("loss: {reduction: deit}", "reduction: a mean over classes is a weight now"),
        ("loop: {seed: 1, seed: 2}", "duplicate key 'seed'"),
    ],
)
def test_a_mistake_in_a_recipe_names_its_file_and_key(tmp_path: Path, text: str, complaint: str) -> None:
    recipe = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        run_config(recipe=recipe)
    assert str(caught.value).startswith(f"{recipe}: ")
    assert complaint in str(caught.value)


def test_numbers_of_a_recipe_are_numbers_however_yaml_reads_them(tmp_path: Path) -> None:
    """YAML takes 1e-6 for a text."""
    text = "optim: {warmup_lr: 1e-6, min_lr: 1e-7, weight_decay: 1e-8}\nstudent: {drop_path: 1e-1}\nview: {crop_area: [1e-1, 0.9]}"
    config = run_config("--epochs", "3", recipe=written(tmp_path, text))
    optim = config.optim
    assert (optim.warmup_lr, optim.min_lr, optim.weight_decay, config.student.drop_path) == (1e-6, 1e-7, 1e-8, 0.1)
    assert config.view.crop_area == (0.1, 0.9)


def test_a_few_lines_that_stand_for_millions_of_values_are_one_line(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    for use in ("loop: *a8", "loop: {length: *a8}"):
        with pytest.raises(UserError):
            run_config(recipe=written(tmp_path, "\n".join([*lines, use]) + "\n"))


@pytest.mark.parametrize(
    "value", ["!!map [a, b]", "!!set [a]", "!!bool x", "!!int ''", "!!timestamp x", "!!float x", "2026-99-99"]
)
def test_yaml_that_its_reader_stumbles_over_is_one_line(value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"r\.yaml: not valid YAML: [^\n]*$"):
        run_config(recipe=written(tmp_path, f"loop: {{length: {value}}}"))


@pytest.mark.parametrize("setting", ["loop: {seed: yes}", "optim: {base_lr: on}", "data: {train_images: true}"])
def test_a_switch_is_no_number(setting: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"yes and no are for switches: give a number or a name \(got True\)"):
        run_config(recipe=written(tmp_path, setting))


OLD = """
data: {location: digits, train_images: null, unlabelled: false, data_seed: 0, validation_share: 0.2, bad_image_limit: 3}
view: {augment: light, crop_area: [0.5, 1.0], flip_probability: 0.0, mix_probability: 0.5, cutmix_probability: 0.4,
  erase_probability: 0.1, repeats: 2, randaugment_operations: 3, randaugment_probability: 0.3}
optim: {optimizer: muon, lr_per_256_images: 0.024, lr_end_share: 0.02, lr_end: null, lr_start: 1.0e-6, warmup_share: 0.05,
  warmup_epochs: null, tune: all, clip_norm: 1.0}
loop: {epochs: 30, budget_minutes: null, steps: 42, batch_size: 64}
student: {student: deit_pico, evaluation_crop: 0.9, small_size: 4, small_share: 0.5}
teacher: {teacher: lite0, tape: null, answers: null, teacher_slice: 64}
loss: {label_loss: ce, bce_reduction: sum, distillation: zscore, temperature: 2.0, dkd_beta: 8.0, label_weight: 0.5, teacher_weight: 5.0,
  distil_head: dist, distil_target: teacher, reduction: mean}
"""


def test_the_config_of_an_old_run_is_read_under_todays_names(tmp_path: Path) -> None:
    file = written(tmp_path, OLD)
    config = validated(RunConfig, upgraded(load_yaml(file), str(file)), str(file))
    assert (config.data.val_fraction, config.data.max_bad_images) == (0.2, 3)
    assert (config.view.repeated_aug, config.view.mixup_prob, config.view.mixup_switch_prob) == (2, 0.5, 0.4)
    assert (config.view.flip_prob, config.view.random_erasing_prob) == (0.0, 0.1)
    assert config.view.randaugment == "rand-m9-n3-mstd0.5-p0.3"
    assert (config.optim.base_lr, config.optim.min_lr, config.optim.warmup, config.optim.warmup_lr) == (
        0.024,
        "2%",
        "5%",
        1e-6,
    )
    assert (config.optim.max_grad_norm, config.optim.trainable, config.loop.length) == (1.0, "all", "42st")
    assert (config.student.crop_pct, config.student.low_res_size) == (0.9, 4)
    assert (config.loss.distil, config.loss.distillation) == ("token", "zscore")
    assert build(RunConfig, {}, recipe=file) == config


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"loop": {"epochs": 5, "steps": None, "budget_minutes": None}}, {"loop": {"length": "5ep"}}),
        ({"loop": {"epochs": 5, "steps": None, "budget_minutes": 3.5}}, {"loop": {"length": "3.5min"}}),
        ({"optim": {"warmup_share": 0.05, "warmup_epochs": 5}}, {"optim": {"warmup": "5ep"}}),
        ({"optim": {"lr_end": 1e-5, "lr_end_share": 0.02}}, {"optim": {"min_lr": 1e-5}}),
        ({"optim": {"lr_end": None, "lr_end_share": 1.0}}, {"optim": {"min_lr": "100%"}}),
        ({"loss": {"distil_head": "dist", "distil_target": "labels"}}, {"loss": {"distil": "labels"}}),
        ({"loss": {"distil_head": "cls", "distil_target": "teacher"}}, {"loss": {"distil": "cls"}}),
        (
            {"loss": {"distil_head": "dist", "distil_target": "teacher", "distillation": "none", "label_weight": 0.5}},
            {"loss": {"distil": "token", "distillation": "none", "label_weight": None}},
        ),
        ({"loop": {"length": "5ep"}, "seed": 1}, {"loop": {"length": "5ep"}, "seed": 1}),
        (
            {
                "view": {"crop_aspect": [0.75, 4 / 3], "erase_area": [0.02, 1 / 3], "interpolation": "bicubic"},
                "head_share": 0.2,
            },
            {"view": {}},
        ),
        ({"optim": {"betas": [0.9, 0.999]}, "student": {"low_res_fraction": None}}, {"optim": {}, "student": {}}),
        (
            {
                "randaugment_operations": 2,
                "randaugment_magnitude": 9.0,
                "randaugment_magnitude_sd": 1 / 3,
                "randaugment_prob": 1,
            },
            {"randaugment": f"rand-m9-n2-mstd{1 / 3}-p1"},
        ),
        ({"randaugment_operations": 0, "randaugment_magnitude": 9.0}, {"randaugment": None}),
        (
            {"augment": "deit", "randaugment_magnitude": 5},
            {"augment": "deit", "randaugment": "rand-m5-n2-mstd0.5-p0.5"},
        ),
        (
            {"student": "deit3_base", "drop_path": 0.2, "drop_path_rule": "constant"},
            {"student": "deit3_base", "drop_path": 0.2},
        ),
        ({"student": None, "init": None, "fine_tune": True}, {"student": None, "init": "required"}),
        ({"init": "runs/deit", "fine_tune": True}, {"init": "runs/deit"}),
    ],
)
def test_old_settings_become_todays(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert upgraded(old, "x") == new


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("optim: {warmup_share: abc}", "warmup_share: expected a number"),
        ("optim: {lr_end_share: {}}", "lr_end_share: expected a number"),
        ("optim: {lr_per_256_images: 0.001, base_lr: 0.01}", "base_lr: stands there twice"),
        ("optim: &a {base_lr: *a}", "optim"),
        ("optim: {betas: [0.8, 0.99]}", r"betas: \[0\.8, 0\.99\] cannot be chosen any more: it is \[0\.9, 0\.999\]"),
        (
            "student: {low_res_size: 4, low_res_fraction: 0.4}",
            "low_res_fraction: 0.4 cannot be chosen any more: it is 0.5",
        ),
        ("student: {student: deit_pico, drop_path: 0.1, drop_path_rule: constant}", "it is linear for deit_pico"),
        ("view: {randaugment_magnitude: 5}", "randaugment_magnitude: is a part of randaugment now: write rand-m9-n2-"),
        ("view: {randaugment_operations: two}", "randaugment: the part 'ntwo' is none of"),
    ],
)
def test_old_names_with_wrong_values_are_one_line(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        run_config(recipe=written(tmp_path, text))


def test_a_new_name_is_not_replaced_by_an_old_one(tmp_path: Path) -> None:
    assert run_config(recipe=written(tmp_path, "optim: {warmup: 3ep, warmup_share: 0.5}")).optim.warmup == "3ep"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("view: {crop_padding: 4, view_size: []}", "view_size"),
        ("view: {crop_padding: 4, view_size: [0, 0]}", "view_size"),
        ("view: {crop_padding: 4, view_size: [a, 3]}", "view_size"),
        ("student: {drop_path_rule: constant, drop_path: 0.1}", "drop_path_rule: 'constant' cannot be chosen any more"),
        ("student: {drop_path_rule: [1]}", "drop_path_rule"),
        ("loop: {length: 5}", "length: give a number with its unit, such as 30ep or 500st or 20min"),
    ],
)
def test_what_cannot_stand_in_a_recipe_is_one_line_that_names_it(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(why)):
        build(RunConfig, {}, recipe=tmp_path / "r.yaml")


def test_keywords_that_are_gone_say_what_became_of_them() -> None:
    with pytest.raises(UserError, match=r"betas: cannot be chosen any more: it is \[0.9, 0.999\]"):
        build(RunConfig, {"betas": (0.8, 0.9)})
    with pytest.raises(UserError, match="randaugment_magnitude: is a part of randaugment now"):
        build(RunConfig, {"randaugment_magnitude": 5})


def test_randaugment_is_turned_off_by_a_word() -> None:
    assert build(RunConfig, {"augment": "deit"}).view.randaugment == "rand-m9-n2-mstd0.5-p0.5"
    assert build(RunConfig, {"augment": "deit", "randaugment": "none"}).view.randaugment is None
