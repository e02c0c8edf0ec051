"""Flags, keywords, recipes and tapes: one order of precedence, one configuration, one line for every mistake."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pytest
import yaml
from pydantic import Field

from deitkit.api import Settings
from deitkit.config import AUGMENT_PRESETS, Config, FitConfig, JobConfig, RunConfig, length_in_steps, parse_length
from deitkit.settings import (
    COMMON,
    LENGTHS,
    YAML_ONLY,
    Argument,
    build,
    find_recipe,
    flag,
    overlay,
    parse,
    places,
    recipe_settings,
    shipped,
    upgraded,
    validated,
)
from deitkit.terminal import UserError, load_yaml

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
        if recipe is not None and "fine_tune" in recipe_settings(RunConfig, file or Path()):
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
    if recipe in ("cifar10", "fashion-mnist", "few-images"):
        settings["teacher"] = "lite0"
    config = build(RunConfig, settings, recipe=find_recipe(recipe))
    assert build(RunConfig, {}, recipe=written(tmp_path, yaml.safe_dump(config.model_dump(mode="json")))) == config


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


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("optim: {warmup_share: abc}", "warmup_share: expected a number"),
        ("optim: {lr_end_share: {}}", "lr_end_share: expected a number"),
        ("optim: {lr_per_256_images: 0.001, base_lr: 0.01}", "base_lr: stands there twice"),
        ("optim: &a {base_lr: *a}", "optim"),
    ],
)
def test_old_names_with_wrong_values_are_one_line(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        run_config(recipe=written(tmp_path, text))


def test_a_new_name_is_not_replaced_by_an_old_one(tmp_path: Path) -> None:
    assert run_config(recipe=written(tmp_path, "optim: {warmup: 3ep, warmup_share: 0.5}")).optim.warmup == "3ep"


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


# ---------------------------------------------------------------------------------------- flags and help


@pytest.mark.parametrize("kind", [RunConfig, FitConfig])
def test_every_setting_has_a_line_of_help_and_a_flag_or_a_place_in_yaml(
    kind: type[Config], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        parse(["--help-all"], prog="deit", description="", arguments=[], kind=kind)
    page = " ".join(capsys.readouterr().out.split())
    for name, place in places(kind).items():
        section: Any = kind if place.section is None else kind.model_fields[place.section].annotation
        info = section.model_fields[name]
        assert info.description, f"{name} has no line of help"
        asked = flag(f"no_{name}" if info.default is True else name)
        assert (f"{asked} " in page) == (name not in YAML_ONLY), name
        if name not in YAML_ONLY:
            assert " ".join(info.description.split())[:25] in page
    # Flags are flat: a name that two sections had would be lost.
    sections = [info.annotation for info in kind.model_fields.values() if hasattr(info.annotation, "model_fields")]
    count = len(kind.model_fields) - len(sections) + sum(len(section.model_fields) for section in sections)  # type: ignore[union-attr]
    assert len(places(kind)) == count


def test_help_is_one_screen_of_what_people_change_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    from deitkit import cli

    assert cli.main(["train", "--help"]) == 0
    page = capsys.readouterr().out
    assert len(page.splitlines()) <= 60
    assert max(map(len, page.splitlines())) <= 80
    flags = {word.rstrip(",") for word in page.split() if word.startswith("--")}
    assert {flag(name) for name in COMMON if name in places(RunConfig)} <= flags
    assert 20 <= len(flags) <= 35
    assert page.count("  deit train ") == 2
    for name in ("--mixup-alpha", "--betas", "--ema-decay", "--tape", "location"):
        assert name not in page
    assert cli.main(["train", "--help-all"]) == 0
    page = capsys.readouterr().out
    assert "--mixup-alpha" in page
    assert "--no-calibrate" in page
    assert max(map(len, page.splitlines())) <= 80


def test_python_has_every_setting_as_a_typed_keyword() -> None:
    own = {"teacher", "distillation", "location"}  # parameters of `train`, or given as `data`
    assert set(get_type_hints(Settings)) == (set(places(RunConfig)) - own) | set(LENGTHS) | {"lr"}


def test_flags_are_flat_and_reach_their_sections() -> None:
    config = run_config(
        "--lr", "0.003", "--label-weight", "0.25", "--teacher", "lite0", "--distillation", "soft", "--temperature", "2", "--seed", "7",
        "--view-seed", "8", "--data-seed", "9", "--train-images", "500", "--image_size", "24", "--stem", "conv", "--deterministic",
    )  # fmt: skip
    assert config.optim.base_lr == 0.003
    assert (config.loss.label_weight, config.loss.temperature) == (0.25, 2.0)
    assert config.teacher.teacher == "lite0"
    assert (config.loop.seed, config.view.view_seed, config.data.data_seed) == (7, 8, 9)
    assert config.data.train_images == 500
    assert config.student.image_size == 24
    assert config.student.stem == "conv"
    assert config.loop.deterministic


def test_lr_has_its_long_name_too() -> None:
    assert run_config("--base-lr", "0.25") == run_config("--lr", "0.25") == run_config("--lr=0.25")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--epoch", "3"], "unknown flag --epoch: did you mean --epochs"),
        (["--zzz"], "unknown flag --zzz: deit train --help-all lists them"),
        (["--lr", "-1e-3"], "--lr: input should be greater than 0 (got '-1e-3')"),
        (["--min-lr", "-5%"], "--min-lr: give a learning rate"),
        (["--no-compil"], "unknown flag --no-compil: did you mean --no-compile or"),
        (["--tape", "x"], "unknown flag --tape: give the tape's folder to --teacher"),
        (["--betas", "0.9", "1"], "--betas: has no flag: write 'optim: {betas: ...}' into a YAML file and give it by --recipe"),
        (["--lr", "fast"], "--lr: input should be a valid number, unable to parse string as a number (got 'fast')"),
        (["--lr", "-1"], "--lr: input should be greater than 0 (got '-1')"),
        (["--lr", "1e300"], "--lr: input should be less than or equal to 1000000000000000"),
        (["--weight-decay", "1e39"], "--weight-decay: input should be less than or equal to 1000000000000000"),
        (["--lr"], "--lr/--base-lr: expected one argument"),
        (["--epochs", "0"], "--length: must be more than 0 (got '0ep')"),
        (["--epochs", "many"], "--length: give a number with its unit"),
        (["--augment", "strong"], "--augment: input should be 'none', 'light', 'deit' or 'deit3' (got 'strong')"),
        (["--image-size", "100000"], "--image-size: input should be less than or equal to 4096"),
        (["--stem", "None"], "--stem: input should be 'patch', 'conv' or 'residual' (got 'None')"),
        (["--workers", "99999"], "--workers: input should be less than or equal to 1024"),
        (["--distil", "cls"], "--distil: cls needs a teacher: give --teacher"),
        (["--teacher", "x", "--distil", "labels"], "--distil: labels needs no teacher"),
        (["--distillation", "soft", "--distil", "labels"], "--distil: labels needs no teacher and no --distillation"),
        (["more"], "unrecognized arguments: more"),
        (["--distillation", "hard"], "--distillation: 'hard' needs a teacher: give --teacher"),
        (["--distillation", "zsocre"], "--distillation: input should be 'none', 'hard', 'soft'"),
        (["--distillation", "dkd", "--teacher", "x"], "--distillation: input should be"),
        (["--distillation", "none", "--teacher", "x"], "--distillation: 'none' uses no teacher: leave out one of the two"),
        (["--optimizer", "sgd"], "--optimizer: input should be 'adamw', 'muon' or 'lamb' (got 'sgd')"),
        (["--teacher-size", "384"], "--teacher-size: there is no teacher: give --teacher"),
        (["--teacher", "x", "--teacher-size", "0"], "--teacher-size: input should be greater than 0 (got '0')"),
        (["--record", "t"], "--record: there is no teacher to record: give --teacher"),
        (["--crop-pct", "1e-9"], "--crop-pct: input should be greater than or equal to 0.1"),
        (["--teacher", "x", "--label-weight", "0", "--teacher-weight", "0"], "--label-weight: nothing is learned"),
        (["--distil", "labels", "--label-weight", "0", "--teacher-weight", "0"], "--label-weight: nothing is learned"),
        (["--distillation", "none", "--label-weight", "0"], "--label-weight: nothing is learned with weight 0"),
        (["--label-weight", "0"], "--label-weight: nothing is learned with weight 0"),
        (["--trainable", "last-2"], "--trainable: last-2 would keep random weights: give --init"),
        (["--teacher", "x", "--distillation", "hard", "--temperature", "3"], "--temperature: hard labels have none: give --teacher and"),
        (["--teacher", ""], "--teacher: is empty (an unset variable of the shell?)"),
        ([""], "an argument: is empty"),
        (["--teacher="], "--teacher: is empty"),
        (["--teacher-weight", "1"], "--teacher-weight: there is no teacher: give --teacher"),
        (["--distillation", "none", "--teacher-weight", "1"], "--teacher-weight: there is no teacher"),
        (["--temperature", "2"], "--temperature: there is no teacher: give --teacher"),
        (["--distil", "labels", "--temperature", "2"], "--temperature: there is no teacher"),
        (["--layer-decay", "0.65"], "--layer-decay: is for pretrained weights: give --init"),
        (["--low-res-fraction", "0.5"], "--low-res-fraction: needs a resolution: give --low-res-size"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_one_line_that_names_it(argv: list[str], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        run_config(*argv)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"epoch": 3}, "unknown setting 'epoch': did you mean epochs"),
        ({"warmup_lr": 0.1}, "settings: warmup_lr: 0.1 is above the peak, 0.006 for batches of 64"),
        ({"crop_area": (0.9, 0.1)}, "settings: crop_area: 0.9 is above 0.1"),
        ({"view_size": (0, 8)}, "settings: view_size: input should be greater than 0"),
        ({"betas": (0.9, 1)}, "settings: betas: input should be less than 1"),
        ({"betas": (0.3,)}, "settings: betas: "),
        ({"label_loss": "bce"}, "settings: label_smoothing: with bce 0.1 would mark every class as right"),
        ({"fine_tune": True}, "settings: fine_tune: there are no pretrained weights: give --init"),
        ({"epochs": 3, "steps": 2}, "settings: epochs: excludes steps: give one length"),
        ({"tape": "x", "teacher_size": 224}, "settings: teacher_size: a tape holds the outputs already"),
        ({"tape": "x", "teacher": "y"}, "settings: tape: a tape replaces the teacher: give one of them"),
    ],
)
def test_a_wrong_keyword_is_one_line_that_names_it(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        build(RunConfig, settings)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_positionals_may_stand_after_flags() -> None:
    arguments = [Argument("run", str, "which", positional=True), Argument("count", int, "how many", 3),
                 Argument("images", tuple[str, ...], "images", (), positional=True)]  # fmt: skip
    own, _ = parse(["r", "--count", "5", "a.png", "b.png"], prog="deit predict", description="", arguments=arguments)
    assert (own.run, own.count, tuple(own.images)) == ("r", 5, ("a.png", "b.png"))


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"^missing: DATA, --out DIR \(deit x --help\)$"):
        parse([], prog="deit x", description="", arguments=[DATA, Argument("out", Path, "where", metavar="DIR")])


def test_a_verb_s_own_argument_is_read_by_its_type() -> None:
    count = Argument("count", Annotated[int, Field(ge=1)], "how many", 5, metavar="N")
    found, given = parse(["x", "--count", "7"], prog="deit x", description="", arguments=[DATA, count])
    assert (found.data, found.count, given) == ("x", 7, {})
    for value, why in (("0", "greater than or equal to 1"), ("many", "valid integer")):
        with pytest.raises(UserError, match=rf"^--count: input should be .*{why}"):
            parse(["x", "--count", value], prog="deit x", description="", arguments=[DATA, count])


def test_a_switch_that_is_on_is_turned_off_by_its_no_form() -> None:
    on = Argument("ema", bool, "average", True)
    assert parse([], prog="deit", description="", arguments=[on])[0].ema
    assert not parse(["--no-ema"], prog="deit", description="", arguments=[on])[0].ema
    assert run_config("--no-calibrate").student.calibrate is False
    _, given = parse(["--no-calibrate"], prog="x", description="", arguments=[], kind=RunConfig)
    assert given == {"calibrate": False}


def test_a_switch_that_a_recipe_turns_on_is_turned_off_by_a_flag(tmp_path: Path) -> None:
    recipe = written(tmp_path, "student: {calibrate: false}\nloop: {compile: true}")
    config = run_config("--calibrate", "--no-compile", recipe=recipe)
    assert (config.student.calibrate, config.loop.compile) == (True, False)


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


def test_bce_without_smoothing_is_taken() -> None:
    loss = build(RunConfig, {"label_loss": "bce", "label_smoothing": 0}).loss
    assert (loss.label_loss, loss.label_smoothing) == ("bce", 0.0)


# ----------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("los: {}", "unknown section 'los': did you mean loss or loop?"),
        ("loss: {temprature: 2}", "unknown configuration key 'temprature': did you mean temperature?"),
        ("loss: {temperature: -2}", "loss: temperature: input should be greater than 0"),
        ("loss: 3", "loss: expected settings"),
        ("1: {}", "unknown section '1': known: "),
        ("loop: {length: 30}", "loop: length: input should be a valid string"),
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
    text = "optim: {warmup_lr: 1e-6, min_lr: 1e-7, weight_decay: 1e-8, betas: [0.8, 0.99]}\nstudent: {drop_path: 1e-1}"
    config = run_config("--epochs", "3", recipe=written(tmp_path, text))
    optim = config.optim
    assert (optim.warmup_lr, optim.min_lr, optim.weight_decay, config.student.drop_path) == (1e-6, 1e-7, 1e-8, 0.1)
    assert optim.betas == (0.8, 0.99)


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


OLD = """
data: {location: digits, train_images: null, unlabelled: false, data_seed: 0, validation_share: 0.2, bad_image_limit: 3}
view: {augment: light, crop_area: [0.5, 1.0], flip_probability: 0.0, mix_probability: 0.5, cutmix_probability: 0.4,
  erase_probability: 0.1, repeats: 2, randaugment_probability: 0.3}
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
    assert (config.view.flip_prob, config.view.random_erasing_prob, config.view.randaugment_prob) == (0.0, 0.1, 0.3)
    assert (config.optim.base_lr, config.optim.min_lr, config.optim.warmup, config.optim.warmup_lr) == (
        0.024,
        "2%",
        "5%",
        1e-6,
    )
    assert (config.optim.max_grad_norm, config.optim.trainable, config.loop.length) == (1.0, "all", "42st")
    assert (config.student.crop_pct, config.student.low_res_size, config.student.low_res_fraction) == (0.9, 4, 0.5)
    assert (config.loss.distil, config.loss.distillation, config.teacher.teacher_chunk_size) == ("token", "zscore", 64)
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
    ],
)
def test_old_settings_become_todays(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert upgraded(old, "x") == new
