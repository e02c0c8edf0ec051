"""Flags, keywords, recipes and tapes: one order of precedence, one configuration."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from pathlib import Path
from typing import Annotated, Any, get_args

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from deitkit.config import AUGMENT_PRESETS, Config, FitConfig, JobConfig, RunConfig
from deitkit.flags import Argument, flag, parse
from deitkit.lengths import length_in_steps, parse_length
from deitkit.settings import LENGTHS, build, dotted, find_recipe, overlay, places, recipe_settings, section_of, shipped
from deitkit.terminal import UserError
from deitkit.training.run import RunFolder

DATA = Argument("data", str, "which", positional=True, metavar="DATA")


def run_config(*argv: str, recipe: Path | None = None, kind: type[Config] = RunConfig, resume: bool = False) -> Any:
    """The configuration that `deit train digits ARGV` resolves."""
    _, given = parse(["digits", *argv], prog="deit train", description="", arguments=[DATA], kind=kind)
    return build(kind, given, recipe=recipe, resume=resume, name_of=flag)


def written(tmp_path: Path, text: str) -> Path:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text, encoding="utf-8")
    return recipe


# ----------------------------------------------------------------------------- one order, through every door

OVERRIDES: list[dict[str, Any]] = [
    {},
    {"epochs": 40},
    {"steps": 500},
    {"budget_minutes": 2.5},
    {"length": "70ep"},
    {"optimizer": "adamw"},
    {"optimizer": "muon"},
    {"optimizer": "lamb", "weight_decay": 0.1},
    {"lr": 0.001, "batch_size": 96},
    {"warmup": "100st", "min_lr": "10%"},
    {"augment": "deit"},
    {"augment": "light", "mixup_alpha": 0.3},
    {"mixup_alpha": 0.3, "cutmix_alpha": 0.0},
    {"student": "deit_nano", "image_size": 48},
    {"width": 96, "heads": 3},
    {"seed": 7, "view_seed": 8, "data_seed": 9},
    {"train_images": 300, "val_fraction": 0.2},
    {"ema_decay": 0.9, "max_grad_norm": 1.0, "calibrate": False},
    {"distillation": "soft", "temperature": 4.0, "teacher": "lite0"},
    {"distillation": "hard", "teacher": "lite0", "label_weight": 0.1},
    {"distil": "cls", "teacher": "lite0"},
    {"distil": "labels"},
    {"repeated_aug": 2, "views": 4},
]
"""Each is given as flags and as keywords over every shipped recipe."""


def as_flags(settings: dict[str, Any]) -> list[str]:
    argv: list[str] = []
    for name, value in settings.items():
        argv += [flag(f"no_{name}")] if value is False else [flag(name), str(value)]
    return argv


@pytest.mark.parametrize("recipe", [None, *shipped()])
def test_flags_and_keywords_resolve_to_the_same_configuration(recipe: str | None) -> None:
    file = None if recipe is None else find_recipe(recipe)
    for own in OVERRIDES:
        settings = {**own}
        if recipe is not None and recipe_settings(RunConfig, file or Path()).get("init") == "required":
            settings["init"] = "x"
        if (
            "teacher" not in settings
            and "distil" not in settings
            and recipe
            and not recipe.startswith("deit3")
            and recipe != "photos"
        ):
            settings["teacher"] = "lite0"
        by_flags, by_keywords = (
            run_config(*as_flags(settings), recipe=file),
            build(RunConfig, settings, recipe=file),
        )
        assert by_flags == by_keywords, settings


@pytest.mark.parametrize("recipe", list(shipped()))
def test_a_config_yaml_fed_back_is_the_same_configuration(recipe: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"teacher": "lite0"} if recipe.startswith("deit-") or recipe == "deit" else {}
    if "finetune" in recipe:
        settings["init"] = "x"
    if recipe in ("cifar10", "fashion-mnist", "few-images", "function-matching", "pretrain"):
        settings["teacher"] = "lite0"
    config = build(RunConfig, settings, recipe=find_recipe(recipe))
    assert build(RunConfig, {}, recipe=written(tmp_path, yaml.safe_dump(config.model_dump(mode="json")))) == config


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, 17, 224, 2**32 - 1, 0.0, 1e-12, 1 / 3, 0.1, 0.5, 0.99996, 1.0, 3.0, 1e6, (0.25, 1 / 3), (0.9, 0.95),
    (32, 48), "2%", "0.1%", "1e-5", "3ep", "2.5ep", "100st", "20min", "all", "attention", "last-3", "auto", "lite0", "yes", "null", "007",
    "1e3", "a: b # c", "caf\u00e9 'x' \"y\"", "-", "x@y.pth", "[1, 2]", "runs/2026-11-30",
)  # fmt: skip
"""What a setting may be, among it what YAML takes for something else."""


def candidates(kind: type[Config]) -> list[tuple[str | None, str, Any]]:
    """Every setting of `kind` with each of the values that it takes by itself: section, name, value."""
    found = []
    for name, (section, _) in places(kind).items():
        holder = kind if section is None else section_of(kind.model_fields[section].annotation)
        assert holder is not None
        info = holder.model_fields[name]
        adapter = TypeAdapter(Annotated[info.annotation, info])  # type: ignore[valid-type]
        choices = [choice for part in (info.annotation, *get_args(info.annotation)) for choice in get_args(part)]
        for value in dict.fromkeys([*VALUES, *(choice for choice in choices if isinstance(choice, str))]):
            with contextlib.suppress(ValidationError):
                found.append((section, name, adapter.validate_python(value)))
    return found


CANDIDATES = {kind: candidates(kind) for kind in (RunConfig, FitConfig)}


@pytest.mark.parametrize("kind", [RunConfig, FitConfig])
@hypothesis.settings(max_examples=40)
@hypothesis.given(data=st.data())
def test_any_configuration_comes_back_from_its_config_yaml(kind: type[JobConfig], data: st.DataObject) -> None:
    """As a recipe, and as the settings of a run that is resumed. Settings are drawn one after the other; those that contradict the ones
    before are left."""
    config = kind()
    for section, name, value in data.draw(st.lists(st.sampled_from(CANDIDATES[kind]), max_size=20)):
        values = config.model_dump()
        (values if section is None else values[section])[name] = value
        with contextlib.suppress(ValidationError):
            config = kind.model_validate(values)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "run")
        run.create(config, {})
        assert run.config(kind) == config
        assert build(kind, {}, recipe=run.path / "config.yaml", resume=True) == config


def test_layers_lie_over_each_other_in_one_order(tmp_path: Path) -> None:
    recipe = written(
        tmp_path, "loss: {label_smoothing: 0.2}\nview: {augment: deit}\ndata: {data_seed: 1, val_fraction: 0.3}\n"
    )
    tape = {
        "view": {**AUGMENT_PRESETS["light"].model_dump(exclude={"views"}), "view_seed": 5},
        "data": {"data_seed": 2},
    }
    (tmp_path / "tape").mkdir()
    (tmp_path / "tape" / "tape.json").touch()
    given = {"teacher": str(tmp_path / "tape"), "data_seed": 3}
    config = build(RunConfig, given, recipe=recipe, tape_settings=lambda _: tape)
    assert config.teacher.tape == str(tmp_path / "tape")
    assert config.teacher.teacher is None
    assert config.loss.label_smoothing == 0.2  # recipe
    assert (config.view.augment, config.view.view_seed, config.view.mixup_alpha) == (
        "light",
        5,
        0.0,
    )  # tape over recipe
    assert (config.data.data_seed, config.data.val_fraction) == (3, 0.3)  # keyword over tape over recipe


@pytest.mark.parametrize(
    ("lower", "upper", "expected"),
    [
        # what belongs to a choice goes with it
        ({"optimizer": "muon", "base_lr": 1.0, "weight_decay": 2.0}, {"optimizer": "adamw"}, {"optimizer": "adamw"}),
        ({"optimizer": "muon", "base_lr": 1.0}, {"optimizer": "muon"}, {"optimizer": "muon", "base_lr": 1.0}),
        ({"base_lr": 1.0}, {"optimizer": "muon"}, {"optimizer": "muon", "base_lr": 1.0}),  # it was Muon's already
        ({"base_lr": 1.0}, {"optimizer": "adamw"}, {"optimizer": "adamw"}),
        ({"base_lr": 1.0, "init": "x"}, {"optimizer": "adamw"}, {"optimizer": "adamw", "base_lr": 1.0, "init": "x"}),
        ({"optimizer": "adamw", "min_lr": 1e-5, "warmup_lr": 1e-6}, {"optimizer": "muon"}, {"optimizer": "muon"}),
        ({"temperature": 3.0}, {"distillation": "zscore"}, {"distillation": "zscore", "temperature": 3.0}),
        ({"optimizer": "muon", "base_lr": 1.0}, {"optimizer": "adamw", "base_lr": 3.0}, {"optimizer": "adamw", "base_lr": 3.0}),
        ({"distillation": "soft", "temperature": 3.0, "seed": 1}, {"distillation": "zscore"}, {"distillation": "zscore", "seed": 1}),
        ({"student": "a", "width": 9, "image_size": 8}, {"student": "b"}, {"student": "b", "image_size": 8}),
        ({"augment": "deit", "crop": "pad", "repeated_aug": 3}, {"augment": "light"}, {"augment": "light", "repeated_aug": 3}),
        ({"augment": "deit", "crop": "pad", "view_seed": 4}, {"augment": "none"}, {"augment": "none", "view_seed": 4}),
        # a student that learns alone has no teacher
        ({"teacher": "t", "teacher_size": 9, "unlabelled": True, "seed": 1}, {"distillation": "none"}, {"distillation": "none", "seed": 1}),
        ({"teacher": "t", "distillation": "hard"}, {"distil": "labels"}, {"distil": "labels"}),
        ({"distillation": "none"}, {"teacher": "t"}, {"teacher": "t"}),
        ({"distil": "labels"}, {"distillation": "hard", "teacher": "t"}, {"distillation": "hard", "teacher": "t"}),
        ({"teacher": "t", "teacher_size": 9, "record": "r"}, {"tape": "x"}, {"tape": "x"}),
        ({"tape": "x", "temperature": 2.0}, {"teacher": "t"}, {"teacher": "t", "temperature": 2.0}),
    ],
)  # fmt: skip
def test_what_belongs_to_another_choice_is_dropped(
    lower: dict[str, Any], upper: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert overlay(lower, upper) == expected
    assert overlay({}, upper) == upper
    assert overlay(lower, {}) == lower


def test_a_recipe_for_muon_never_lends_its_rates_to_adamw() -> None:
    for recipe in ("cifar10", "fashion-mnist", "few-images", "photos"):
        config = build(RunConfig, {"optimizer": "adamw", "teacher": "lite0"}, recipe=find_recipe(recipe))
        assert (config.optim.optimizer, config.optim.base_lr, config.optim.weight_decay) == ("adamw", 5e-4, 0.05)


# ------------------------------------------------------------------------------------------ what is implied


@pytest.mark.parametrize(
    ("argv", "learning"),
    [
        ([], ("muon", 2.4e-2, 0.5)),
        (["--lr", "0.01"], ("muon", 1e-2, 0.5)),
        (["--optimizer", "muon"], ("muon", 2.4e-2, 0.5)),
        (["--optimizer", "adamw"], ("adamw", 5e-4, 0.05)),
        (["--optimizer=lamb", "--weight-decay", "0.1"], ("lamb", 5e-4, 0.1)),
        (["--init", "runs/before"], ("adamw", 5e-4, 0.05)),
        (["--init", "runs/before", "--optimizer", "muon"], ("muon", 5e-4, 0.05)),
    ],
)
def test_new_weights_learn_by_muon_and_pretrained_ones_by_adamw(
    argv: list[str], learning: tuple[str, float, float]
) -> None:
    config = run_config(*argv)
    assert (config.optim.optimizer, config.optim.base_lr, config.optim.weight_decay) == learning
    assert config.loop.batch_size == 64


def test_rates_go_with_the_optimizer_that_other_weights_imply(tmp_path: Path) -> None:
    recipe = written(tmp_path, "optim: {base_lr: 0.0123}")
    assert run_config(recipe=recipe).optim.base_lr == 0.0123
    assert run_config("--init", "lite0", recipe=recipe).optim.base_lr == JobConfig().optim.base_lr
    assert run_config("--init", "lite0", "--lr", "0.5", recipe=recipe).optim.base_lr == 0.5
    assert run_config("--from-scratch", recipe=recipe, kind=FitConfig).optim.base_lr == RunConfig().optim.base_lr
    assert run_config("--optimizer", "adamw", recipe=recipe, kind=FitConfig).optim.base_lr == 0.0123


def test_a_recipe_says_what_its_rates_are_for(tmp_path: Path) -> None:
    recipe = written(tmp_path, "optim: {optimizer: adamw}\nloop: {batch_size: 32}\n")
    config = run_config(recipe=recipe)
    assert (config.optim.base_lr, config.optim.weight_decay, config.loop.batch_size) == (5e-4, 0.05, 32)
    assert run_config("--optimizer", "muon", recipe=recipe).optim.base_lr == 2.4e-2
    assert run_config(recipe=written(tmp_path, "student: {init: runs/before}\n")).optim.optimizer == "adamw"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ("adamw", 2e-3, 128)),
        (["--from-scratch"], ("muon", 2.4e-2, 64)),
        (["--from-scratch", "--optimizer", "muon", "--lr", "0.01"], ("muon", 0.01, 64)),
        (["--from-scratch", "--optimizer", "adamw"], ("adamw", 2e-3, 128)),
    ],
)
def test_convolutions_from_scratch_learn_by_muon(argv: list[str], expected: tuple[str, float, int]) -> None:
    fit = run_config(*argv, kind=FitConfig)
    assert (fit.optim.optimizer, fit.optim.base_lr, fit.loop.batch_size) == expected


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [("muon", "--optimizer: muon is for training .* give --from-scratch"), ("lamb", "--optimizer: input should be")],
)
def test_a_convolutional_network_is_fitted_by_adamw_or_from_scratch_by_muon(optimizer: str, why: str) -> None:
    assert run_config("--optimizer", optimizer).optim.optimizer == optimizer
    with pytest.raises(UserError, match=rf"^{why}"):
        run_config("--optimizer", optimizer, kind=FitConfig)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--distillation", "soft"], (3.0, 0.5, 0.5)),
        (["--distillation", "zscore"], (2.0, 0.5, 5.0)),
        (["--distillation", "hard"], (None, 0.5, 0.5)),
        (
            ["--distillation", "zscore", "--temperature", "4", "--teacher-weight", "1", "--label-weight", "0.2"],
            (4.0, 0.2, 1.0),
        ),
    ],
)
def test_a_loss_implies_its_temperature_and_weights(
    argv: list[str], expected: tuple[float | None, float, float]
) -> None:
    loss = run_config("--teacher", "x", *argv).loss
    assert (loss.temperature, loss.label_weight, loss.teacher_weight) == expected


@pytest.mark.parametrize(("recipe", "weight"), [("cifar10", 1.0), ("few-images", 1.0), ("deit3", 0.001)])
def test_a_recipe_s_share_beside_a_teacher_is_no_share_without_one(recipe: str, weight: float) -> None:
    assert run_config("--distillation", "none", recipe=find_recipe(recipe)).loss.label_weight == weight
    given = run_config("--distillation", "none", "--label-weight", "0.3", recipe=find_recipe(recipe))
    assert given.loss.label_weight == 0.3


def test_a_plain_run_weighs_its_only_term_by_one() -> None:
    loss = run_config("--distillation", "none").loss
    assert (loss.label_weight, loss.teacher_weight, loss.temperature) == (1.0, None, None)
    assert run_config("--distillation", "none", "--label-weight", "0.3").loss.label_weight == 0.3


def test_a_preset_sets_the_defaults_that_other_flags_change() -> None:
    view = run_config("--mixup-alpha", "0.3", "--augment", "deit").view
    assert view == AUGMENT_PRESETS["deit"].model_copy(update={"mixup_alpha": 0.3})


def test_a_recipe_sets_the_defaults_that_flags_change(tmp_path: Path) -> None:
    text = "loss: {label_weight: 0.1, distillation: soft}\nview: {augment: deit, random_erasing_prob: 0}\n"
    recipe = written(tmp_path, text)
    config = run_config("--teacher", "lite0", "--label-weight", "0.2", recipe=recipe)
    assert (config.loss.label_weight, config.loss.distillation) == (0.2, "soft")
    assert config.view == AUGMENT_PRESETS["deit"].model_copy(update={"random_erasing_prob": 0.0})
    assert run_config("--teacher", "x", "--augment", "light", recipe=recipe).view == AUGMENT_PRESETS["light"]


def test_without_flags_the_config_has_the_defaults_of_its_class() -> None:
    assert run_config() == RunConfig()
    assert run_config(kind=FitConfig) == FitConfig()


# -------------------------------------------------------------------------------- lengths with their unit


@pytest.mark.parametrize(
    ("text", "steps"),
    [("30ep", 3000), ("0.5ep", 50), ("500st", 500), ("5%", 20), ("2.5 %", 10), ("1e2st", 100), ("3 EP", 300)],
)
def test_one_converter_turns_lengths_into_steps(text: str, steps: int) -> None:
    assert length_in_steps(text, 100, 400) == steps


@pytest.mark.parametrize(
    "text", ["30", "ep", "30 epochs", "-3ep", "5%", "1.5st", "0ep", "nanst", "1e99ep", "20min 3st"]
)
def test_a_length_needs_a_sensible_number_and_its_unit(text: str) -> None:
    with pytest.raises(UserError, match=r"^--length: "):
        run_config("--length", text)


def test_what_no_length_or_rate_can_be_is_one_line() -> None:
    for given, why in (
        ({"length": "1e400st"}, "length: is too much"), ({"warmup": "1e400st"}, "warmup: is too much"),
        ({"min_lr": None}, "min_lr: give a learning rate"), ({"min_lr": "x%"}, "min_lr: give a learning rate"),
        ({"teacher": ""}, "teacher: is empty"), ({"distillation": ["soft"]}, "distillation: "), ({"augment": [1]}, "augment: "),
        ({"lr": 0.1, "base_lr": 0.2}, "lr: is base_lr: give one of them"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            build(RunConfig, given)


def test_lengths_have_other_spellings_which_exclude_each_other(tmp_path: Path) -> None:
    assert run_config("--epochs", "3").loop.length == "3ep" == build(RunConfig, {"epochs": 3}).loop.length
    assert run_config("--steps=3").loop.steps == 3
    assert run_config("--budget_minutes", "2.5").loop.amount("min") == 2.5
    for one, other in itertools.combinations(["--epochs", "--steps", "--budget-minutes"], 2):
        with pytest.raises(UserError, match="give one length"):
            run_config(one, "3", other, "5")
    with pytest.raises(UserError, match="give one length"):
        run_config("--length", "3ep", "--epochs", "3")
    recipe = written(tmp_path, "loop: {length: 100st}")
    assert run_config("--epochs", "2", recipe=recipe).loop.length == "2ep"
    assert run_config(recipe=recipe).loop.steps == 100
    assert set(LENGTHS) == {"epochs", "steps", "budget_minutes"}


def test_a_warm_up_is_shorter_than_the_training() -> None:
    assert run_config("--warmup", "30ep", "--steps", "9").optim.warmup == "30ep"  # how many steps that is, the data say
    for argv in (["--warmup", "30ep"], ["--warmup", "9st", "--steps", "9"]):
        with pytest.raises(UserError, match=r"^--warmup: .* is all of the training"):
            run_config(*argv)
    with pytest.raises(UserError, match="give a number with its unit"):
        run_config("--warmup", "3")


def test_the_lowest_rate_is_a_rate_or_a_percentage_of_the_peak() -> None:
    assert run_config().optim.lowest_lr(0.5) == 0.01
    assert run_config("--min-lr", "100%").optim.lowest_lr(0.5) == 0.5
    assert run_config("--min-lr", "1e-5").optim.lowest_lr(0.5) == 1e-5
    for value in ("101%", "-1", "fast", "x%"):
        with pytest.raises(UserError, match=r"^--min-lr: "):
            run_config("--min-lr", value)
    with pytest.raises(UserError, match=r"--min-lr: 0.1 is above the peak, 0.006 for batches of 64"):
        run_config("--min-lr", "0.1")


def test_parse_length_names_the_units_that_fit() -> None:
    with pytest.raises(ValueError, match="such as 30ep or 500st or 5%"):
        parse_length("x", ("ep", "st", "%"))


# ------------------------------------------------------------------------------------- teachers and recipes


def test_distillation_none_drops_the_teacher_of_a_recipe(tmp_path: Path) -> None:
    recipe = written(tmp_path, "teacher: {teacher: lite0, teacher_size: 384}")
    teacher = run_config("--distillation", "none", recipe=recipe).teacher
    assert (teacher.teacher, teacher.teacher_size) == (None, None)
    assert run_config(recipe=recipe).teacher.teacher_size == 384


def test_the_size_that_a_recipe_gives_a_teacher_s_input_needs_a_teacher(tmp_path: Path) -> None:
    recipe = written(tmp_path, "teacher: {teacher_size: 384}")
    assert run_config(recipe=recipe).teacher.teacher_size is None
    assert build(RunConfig, {"tape": "x"}, recipe=recipe).teacher.teacher_size is None
    assert run_config("--teacher", "lite0", recipe=recipe).teacher.size == (384, 384)
    assert run_config("--teacher", "lite0", "--teacher-size", "224", recipe=recipe).teacher.teacher_size == 224


def test_a_teacher_on_the_command_line_ends_the_none_of_a_recipe(tmp_path: Path) -> None:
    assert (
        run_config("--teacher", "lite0", recipe=written(tmp_path, "loss: {distillation: none}")).loss.distillation
        is None
    )
    recipe = written(tmp_path, "loss: {distillation: soft}\nteacher: {teacher: a}")
    assert run_config("--teacher", "lite0", recipe=recipe).loss.distillation == "soft"


def test_settings_without_effect_are_accepted_where_nobody_asked_for_them_expressly(tmp_path: Path) -> None:
    """A recipe's; and the command that a run was started with, where that is resumed. What has an effect always is."""
    recipe = written(tmp_path, "loss: {temperature: 2}\noptim: {layer_decay: 0.65}")
    for teacher in ((), ("--teacher", "x"), ("--teacher", "x", "--distillation", "zscore")):
        assert run_config(*teacher, recipe=recipe).loss.temperature == 2.0
    with pytest.raises(UserError, match="--temperature: hard labels have none"):
        run_config("--teacher", "x", "--distillation", "hard", "--temperature", "4", recipe=recipe)
    assert run_config("--temperature", "2", resume=True).loss.temperature == 2.0
    for loss in ("soft", "zscore"):
        assert run_config("--teacher", "x", "--distillation", loss, "--temperature", "2").loss.temperature == 2.0
    assert run_config("--init", "x", "--layer-decay", "0.65").optim.layer_decay == 0.65
    assert run_config("--layer-decay", "1").optim.layer_decay == 1.0
    assert run_config("--distil", "labels", "--teacher-weight", "0.3").loss.teacher_weight == 0.3


def test_dotted_names_have_settings_inside_and_outside_of_sections() -> None:
    assert dotted({"model": "x", "loop": {"seed": 1, "inner": {"deep": [2]}}, "view": {}}) == {
        "model": "x", "loop.seed": 1, "loop.inner.deep": [2],
    }  # fmt: skip
    assert {"model", "from_scratch", "loop.seed"} <= dotted(FitConfig().model_dump()).keys()


def test_bce_without_smoothing_is_taken() -> None:
    loss = build(RunConfig, {"label_loss": "bce", "label_smoothing": 0}).loss
    assert (loss.label_loss, loss.label_smoothing) == ("bce", 0.0)
