from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from deitkit.config import AUGMENT_PRESETS, Config, FitConfig, RunConfig
from deitkit.settings import Field, build, flag, given_flags, parse, parse_config, parse_given, places, unboxed
from deitkit.terminal import UserError

GIVEN_OTHERWISE = {"location"}
DATA = Field("data", str, "which", positional=True, metavar="DATA")


def run_config(*argv: str, recipe: Path | None = None) -> RunConfig:
    find = None if recipe is None else lambda _: recipe
    argv = (*argv, "--recipe", "it") if recipe else argv
    before = [DATA, Field("recipe", str | None, "", None)]
    return parse_config(
        RunConfig, ["digits", *argv], prog="deit train", description="", before=before, find_recipe=find
    )[0]


@pytest.mark.parametrize("kind", [RunConfig, FitConfig])
def test_every_field_of_every_section_is_a_flag_with_a_line_of_help(
    kind: type[Config], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        parse_config(kind, ["--help"], prog="deit", description="")
    page = capsys.readouterr().out
    sections = [name for name, info in kind.model_fields.items() if hasattr(info.annotation, "model_fields")]
    count = len(kind.model_fields) - len(sections)
    for section in sections:
        fields: dict[str, Any] = kind.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        count += len(set(fields) - GIVEN_OTHERWISE)
        for name, info in fields.items():
            if name not in GIVEN_OTHERWISE:
                asked = flag(f"no_{name}" if info.default is True else name)
                assert f"{asked} " in page or f"{asked}," in page, name
                assert info.description, f"{section}.{name} has no line of help"
                assert info.description[:30] in page
    # Flags are flat: a name that two sections had would be lost.
    assert len(places(kind)) == count


def test_the_first_panel_of_help_holds_what_people_change_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(RunConfig, ["--help"], prog="deit train", description="")
    first, _, rest = capsys.readouterr().out.partition("teacher options")
    for name in ("--teacher ", "--student ", "--epochs ", "--lr ", "--augment ", "--seed ", "--distillation "):
        assert name in first
        assert name not in rest
    assert "--betas" in rest
    assert "location" not in first + rest


def test_flags_are_flat_and_reach_their_sections() -> None:
    config = run_config(
        "--lr", "0.003", "--label-weight", "0.25", "--teacher", "lite0", "--distillation", "soft", "--temperature", "2", "--seed", "7",
        "--view-seed", "8", "--data-seed", "9", "--train-images", "500", "--betas", "0.8", "0.99", "--view_size", "24", "32",
        "--stem", "conv", "--deterministic",
    )  # fmt: skip
    assert config.optim.base_lr == 0.003
    assert (config.loss.label_weight, config.loss.temperature) == (0.25, 2.0)
    assert config.teacher.teacher == "lite0"
    assert (config.loop.seed, config.view.view_seed, config.data.data_seed) == (7, 8, 9)
    assert config.data.train_images == 500
    assert config.optim.betas == (0.8, 0.99)
    assert config.view.view_size == (24, 32)
    assert config.student.stem == "conv"
    assert config.loop.deterministic


def test_without_flags_the_config_has_the_defaults_of_its_class() -> None:
    assert run_config() == RunConfig()
    assert parse_config(FitConfig, [], prog="deit", description="")[0] == FitConfig()


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
def test_fresh_weights_learn_by_muon_and_given_ones_by_adamw(
    argv: list[str], learning: tuple[str, float, float]
) -> None:
    config = run_config(*argv)
    assert (config.optim.optimizer, config.optim.base_lr, config.optim.weight_decay) == learning
    assert config.loop.batch_size == 64
    assert build(RunConfig, given_flags(argv)).optim == config.optim


def test_a_recipe_says_what_its_rates_are_for(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optim: {optimizer: adamw}\nloop: {batch_size: 32}\n", encoding="utf-8")
    config = run_config(recipe=recipe)
    assert (config.optim.base_lr, config.optim.weight_decay, config.loop.batch_size) == (5e-4, 0.05, 32)
    assert run_config("--optimizer", "muon", recipe=recipe).optim.base_lr == 2.4e-2
    recipe.write_text("student: {init: runs/before}\n", encoding="utf-8")
    assert run_config(recipe=recipe).optim.optimizer == "adamw"


def test_lr_has_its_long_name_too() -> None:
    assert run_config("--base-lr", "0.25") == run_config("--lr", "0.25") == run_config("--lr=0.25")


def test_a_preset_sets_the_defaults_that_other_flags_change() -> None:
    view = run_config("--mixup-alpha", "0.3", "--augment", "deit").view
    assert view == AUGMENT_PRESETS["deit"].model_copy(update={"mixup_alpha": 0.3})


def test_a_recipe_sets_the_defaults_that_flags_change(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("loss: {label_weight: 0.1, distillation: soft}\nview: {augment: deit, random_erasing_prob: 0}\n")
    config = run_config("--teacher", "lite0", "--label-weight", "0.2", recipe=recipe)
    assert (config.loss.label_weight, config.loss.distillation) == (0.2, "soft")
    assert config.view == AUGMENT_PRESETS["deit"].model_copy(update={"random_erasing_prob": 0.0})
    assert run_config("--teacher", "x", "--augment", "light", recipe=recipe).view == AUGMENT_PRESETS["light"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("los: {}", "unknown section 'los': did you mean loss or loop?"),
        ("loss: {temprature: 2}", "unknown configuration key 'temprature': did you mean temperature?"),
        ("loss: {temperature: -2}", "loss: temperature: input should be greater than 0"),
        ("loss: 3", "loss: expected settings"),
        ("1: {}", "unknown section '1': known: "),
        ("loop: {steps: 3, budget_minutes: 3}", "budget_minutes: excludes steps"),
        ("loop: {steps: 2026-99-99}", "not valid YAML"),
        ("loss: " + "[" * 5000, "not valid YAML"),
        (f"loss: {'x' * 500}", "xxx..."),
    ],
)
def test_a_mistake_in_a_recipe_names_its_file_and_key(tmp_path: Path, text: str, complaint: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError) as caught:
        run_config(recipe=recipe)
    assert str(caught.value).startswith(f"{recipe}: ")
    assert complaint in str(caught.value)


def test_a_length_on_the_command_line_stands_for_the_recipe_s(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("loop: {steps: 100}")
    assert run_config("--epochs", "2", recipe=recipe).loop.steps is None
    assert run_config("--budget-minutes", "2", recipe=recipe).loop.steps is None
    assert run_config(recipe=recipe).loop.steps == 100
    recipe.write_text("loop: {budget_minutes: 3}")
    assert run_config("--epochs", "2", recipe=recipe).loop.budget_minutes is None
    assert run_config("--steps", "2", recipe=recipe).loop.budget_minutes is None


@pytest.mark.parametrize(
    "argv",
    [
        ("--epochs", "3", "--budget-minutes=5"),
        ("--steps", "3", "--epochs", "5"),
        ("--budget_minutes", "1", "--steps=2"),
    ],
)
def test_two_lengths_exclude_each_other(argv: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="exclude each other"):
        run_config(*argv)


def test_distillation_none_drops_the_teacher_of_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("teacher: {teacher: lite0}")
    assert run_config("--distillation", "none", recipe=recipe).teacher.teacher is None
    with pytest.raises(UserError, match="no use for a teacher"):
        run_config("--distillation", "none", "--teacher", "lite0")


def test_the_size_that_a_recipe_gives_a_teacher_s_images_needs_one(tmp_path: Path) -> None:
    """Without a teacher, or with a tape in its place, it is nobody's; one on the command line is held against both."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("teacher: {teacher_size: 384}")
    assert run_config(recipe=recipe).teacher.teacher_size is None
    assert run_config("--distillation", "none", recipe=recipe).teacher.teacher_size is None
    assert run_config("--tape", "x", recipe=recipe).teacher.teacher_size is None
    assert run_config("--teacher", "lite0", recipe=recipe).teacher.size == (384, 384)
    assert run_config("--teacher", "lite0", "--teacher-size", "224", recipe=recipe).teacher.teacher_size == 224
    with pytest.raises(UserError, match="--teacher-size: a tape has the answers already: give it to deit tape record"):
        run_config("--tape", "x", "--teacher-size", "224")
    recipe.write_text("teacher: {teacher: lite0, teacher_size: 384}")
    assert run_config(recipe=recipe).teacher.teacher_size == 384
    teacher = run_config("--distillation", "none", recipe=recipe).teacher
    assert (teacher.teacher, teacher.teacher_size) == (None, None)


def test_a_teacher_on_the_command_line_ends_the_none_of_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("loss: {distillation: none}")
    assert run_config("--teacher", "lite0", recipe=recipe).loss.distillation is None
    recipe.write_text("loss: {distillation: soft}\nteacher: {teacher: a}")
    assert run_config("--teacher", "lite0", recipe=recipe).loss.distillation == "soft"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--epoch", "3"], "unknown flag --epoch: did you mean --epochs"),
        (["--zzz"], "unknown flag --zzz: deit train --help lists them"),
        (["--no-compile"], "unknown flag --no-compile: did you mean --compile or"),
        (["--lr", "fast"], "could not convert string to float: 'fast'"),
        (["--lr", "-1"], "--lr: input should be greater than 0 (got -1.0)"),
        (["--lr", "1e300"], "--lr: input should be less than or equal to 1000000000000000 (got 1e+300)"),
        (
            ["--weight-decay", "1e39"],
            "--weight-decay: input should be less than or equal to 1000000000000000 (got 1e+39)",
        ),
        (["--epochs", "0"], "--epochs: input should be greater than 0 (got 0)"),
        (["--augment", "strong"], "invalid choice 'strong' for argument '--augment'"),
        (["--crop-area", "0.9", "0.1"], "--crop-area: 0.9 is above 0.1"),
        (["--view-size", "8"], "--view-size: expected INT INT, got '8'"),
        (["--view-size", "0", "8"], "--view-size: input should be greater than 0"),
        (["--image-size", "100000"], "--image-size: input should be less than or equal to 4096"),
        (["--stem", "None"], "--stem: expected patch,conv,residual, got 'None'"),
        (["--workers", "99999"], "--workers: input should be less than or equal to 1024"),
        (["--betas", "0.9", "1"], "--betas: input should be less than 1"),
        (["--distil-head", "cls"], "--distil-head: cls is taught nothing without a teacher"),
        (["--teacher", "x", "--distil-target", "labels"], "labels are learned from no teacher"),
        (["--distil-head", "cls", "--distil-target", "labels"], "--distil-target: labels are for a second class token"),
        (["--betas", "0.3"], "missing value for argument '--betas'. Expected 2 values"),
        (["more"], "unrecognized options: more"),
        (["--distillation", "hard"], "distillation 'hard' needs a teacher: give --teacher"),
        (["--distillation", "dkd"], "distillation 'dkd' needs a teacher: give --teacher"),
        (["--distillation", "zsocre"], "invalid choice 'zsocre' for argument '--distillation'"),
        (["--teacher", "x", "--reduction", "deit"], "--reduction: deit is of the soft loss: give --distillation soft"),
        (
            ["--teacher", "x", "--record", "t", "--answers", "hard", "--distillation", "soft"],
            "--answers: decisions alone, --distillation soft needs logits: give --answers all",
        ),
        (
            ["--teacher", "x", "--record", "t", "--answers", "3", "--distillation", "zscore"],
            "--answers: the 3 likeliest classes alone, --distillation zscore needs all logits: give --answers all",
        ),
        (["--optimizer", "sgd"], "invalid choice 'sgd' for argument '--optimizer'"),
        (
            ["--label-loss", "bce"],
            "--label-smoothing: 0.1 would mark every class as right for bce: give --label-smoothing 0",
        ),
        (["--bce-reduction", "mean"], "--bce-reduction: mean is of bce: give --label-loss bce"),
        (["--warmup-epochs", "30"], "--warmup-epochs: 30 leave nothing of 30 epochs: give fewer, or --warmup-share"),
        (["--lr-end", "0.1"], "--lr-end: 0.1 is above the peak, 0.006 for batches of 64: give a lower one"),
        (["--lr-start", "0.1"], "--lr-start: 0.1 is above the peak, 0.006 for batches of 64: give a lower one"),
        (["--lr-end", "1e-6", "--lr-end-share", "0.1"], "--lr-end-share and --lr-end exclude each other"),
        (["--warmup-epochs", "1", "--warmup-share", "0.1"], "--warmup-share and --warmup-epochs exclude each other"),
        (["--teacher-size", "384"], "--teacher-size: there is no teacher to see images of that size: give --teacher"),
        (["--teacher", "x", "--teacher-size", "0"], "--teacher-size: input should be greater than 0 (got 0)"),
        (["--fine-tune"], "--fine-tune: there are no weights to go on from: give --init"),
        (["--crop-pct", "1e-9"], "--crop-pct: input should be greater than or equal to 0.1"),
        (["--warmup-epochs", "1e308", "--steps", "3"], "--warmup-epochs: input should be less than or equal to"),
        (["--teacher", "x", "--label-weight", "0", "--teacher-weight", "0"], "--label-weight: with both weights 0"),
        (
            ["--distil-target", "labels", "--label-weight", "0", "--teacher-weight", "0"],
            "--label-weight: with both weights 0 nothing is learned",
        ),
        (
            ["--distillation", "soft", "--distil-target", "labels"],
            "--distil-target: labels are learned from no teacher, --distillation soft is: leave out one of the two",
        ),
        (
            ["--teacher", "x", "--distillation", "hard", "--temperature", "3"],
            "--temperature: decisions have none: give --distillation soft, zscore, dist or dkd, or leave it out",
        ),
        (["--teacher", ""], "--teacher: is empty (an unset variable of the shell?)"),
        ([""], "an argument: is empty"),
        (["--teacher="], "--teacher: is empty"),
        (["--label-weight", "0.3"], "--label-weight: labels are all there is to learn from: give --teacher or --tape"),
        (["--distillation", "none", "--teacher-weight", "1"], "--teacher-weight: labels are all there is"),
        (["--temperature", "2"], "--temperature: there is no teacher whose answers it would soften"),
        (["--distil-target", "labels", "--temperature", "2"], "--temperature: there is no teacher whose answers"),
        (["--teacher", "x", "--distillation", "soft", "--dkd-beta", "2"], "--dkd-beta: is of that loss alone"),
        (
            ["--layer-decay", "0.65"],
            "--layer-decay: is for weights that are there already, these are fresh: give --init",
        ),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(argv: list[str], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        run_config(*argv)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "│" not in str(caught.value)


def test_settings_without_effect_are_taken_where_nobody_asked_for_them_expressly(tmp_path: Path) -> None:
    """A recipe's; and the command that a run was begun with, where that is resumed. What has an effect always is."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("loss: {temperature: 2, dkd_beta: 4}\noptim: {layer_decay: 0.65}")
    for teacher in ((), ("--teacher", "x"), ("--teacher", "x", "--distillation", "zscore")):
        assert run_config(*teacher, recipe=recipe).loss.temperature == 2.0
    with pytest.raises(UserError, match="--temperature: decisions have none"):
        run_config("--teacher", "x", "--distillation", "hard", "--temperature", "4", recipe=recipe)
    run_fields = [DATA, Field("resume", bool, "", False)]
    argv = ["digits", "--teacher", "x", "--temperature", "2", "--resume"]
    config, _ = parse_config(RunConfig, argv, prog="deit train", description="", before=run_fields)
    assert config.loss.temperature == 2.0
    for loss in ("soft", "zscore", "dist", "dkd"):
        assert run_config("--teacher", "x", "--distillation", loss, "--temperature", "2").loss.temperature == 2.0
    assert run_config("--teacher", "x", "--distillation", "dkd", "--dkd-beta", "2").loss.dkd_beta == 2.0
    assert run_config("--init", "x", "--layer-decay", "0.65").optim.layer_decay == 0.65
    assert run_config("--layer-decay", "1").optim.layer_decay == 1.0
    assert run_config("--distil-target", "labels", "--teacher-weight", "0.3").loss.teacher_weight == 0.3


def test_two_class_tokens_end_the_distillation_of_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("loss: {distillation: zscore}")
    loss = run_config("--distil-target", "labels", recipe=recipe).loss
    assert (loss.distil_target, loss.distillation) == ("labels", None)
    with pytest.raises(UserError, match="--distil-target: labels are learned from no teacher, --distillation soft is"):
        run_config("--distil-target", "labels", "--distillation", "soft", recipe=recipe)


@pytest.mark.parametrize("answers", ["hard", "3", "all"])
@pytest.mark.parametrize("loss", ["hard", "soft", "zscore", "dist", "dkd"])
def test_a_recording_has_what_its_loss_needs(loss: str, answers: str) -> None:
    argv = ["--teacher", "x", "--record", "t", "--answers", answers, "--distillation", loss]
    if answers in {"hard": ("hard", "3", "all"), "soft": ("3", "all"), "dist": ("3", "all")}.get(loss, ("all",)):
        assert run_config(*argv).loss.distillation == loss
    else:
        with pytest.raises(UserError, match=r"needs (all )?logits"):
            run_config(*argv)


@pytest.mark.parametrize(
    ("optimizer", "why"), [("muon", "--optimizer: muon fits .* give --from-scratch"), ("lamb", "invalid choice 'lamb'")]
)
def test_a_convolutional_network_is_fitted_by_adamw_or_from_scratch_by_muon(optimizer: str, why: str) -> None:
    assert run_config("--optimizer", optimizer).optim.optimizer == optimizer
    with pytest.raises(UserError, match=rf"^{why}"):
        parse_config(FitConfig, ["--optimizer", optimizer], prog="deit", description="")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ("adamw", 2e-3, 128)),
        (["--from-scratch"], ("muon", 2.4e-2, 64)),
        (["--from-scratch", "--optimizer", "muon", "--lr", "0.01"], ("muon", 0.01, 64)),
        (["--from-scratch", "--optimizer", "adamw"], ("adamw", 2e-3, 128)),
    ],
)
def test_fresh_convolutions_learn_by_muon(argv: list[str], expected: tuple[str, float, int]) -> None:
    fit = parse_config(FitConfig, argv, prog="deit", description="")[0]
    assert (fit.optim.optimizer, fit.optim.base_lr, fit.loop.batch_size) == expected


def test_a_tape_is_a_folder_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_config("--help")
    page = capsys.readouterr().out
    assert "--tape DIR" in page
    assert "--record DIR" in page


def test_bce_without_smoothing_is_taken() -> None:
    loss = run_config("--label-loss", "bce", "--label-smoothing", "0", "--bce-reduction", "mean").loss
    assert (loss.label_loss, loss.bce_reduction, loss.label_smoothing) == ("bce", "mean", 0.0)


def test_a_share_on_the_command_line_stands_for_what_the_recipe_has_in_epochs_or_rates(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("optim: {warmup_epochs: 5, lr_end: 1e-5}")
    assert run_config(recipe=recipe).optim.warmup_epochs == 5
    assert run_config(recipe=recipe).optim.lr_end == 1e-5
    changed = run_config("--warmup-share", "0.2", "--lr-end-share", "0.3", recipe=recipe).optim
    assert (changed.warmup_share, changed.warmup_epochs) == (0.2, None)
    assert (changed.lr_end_share, changed.lr_end) == (0.3, None)
    assert run_config("--warmup-epochs", "2", recipe=recipe).optim.warmup_epochs == 2


def test_a_warm_up_is_held_against_epochs_only_where_they_are_the_length() -> None:
    assert run_config("--warmup-epochs", "30", "--steps", "9").loop.steps == 9
    assert run_config("--warmup-epochs", "30", "--budget-minutes", "9").loop.budget_minutes == 9


def test_numbers_of_a_recipe_are_numbers_however_yaml_reads_them(tmp_path: Path) -> None:
    """YAML takes 1e-6 for a text."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("optim: {lr_start: 1e-6, weight_decay: 1e-8}\nstudent: {drop_path: 1e-1}")
    config = run_config("--epochs", "3", recipe=recipe)
    assert (config.optim.lr_start, config.optim.weight_decay, config.student.drop_path) == (1e-6, 1e-8, 0.1)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"^missing: DATA, --out DIR \(deit x --help\)$"):
        parse([], prog="deit x", description="", fields=[DATA, Field("out", Path, "where", metavar="DIR")])


def test_a_flag_that_is_on_is_turned_off_by_its_no_form() -> None:
    on = Field("ema", bool, "average", True)
    assert parse([], prog="deit", description="", fields=[on]).ema
    assert not parse(["--no-ema"], prog="deit", description="", fields=[on]).ema


def test_given_flags_reads_ahead() -> None:
    argv = ["x", "--lr", "3", "--view_seed=4", "--compile", "--", "--seed"]
    assert given_flags(argv) == {"base_lr": "3", "view_seed": "4", "compile": "--"}


def test_unboxed_keeps_the_message_alone() -> None:
    assert unboxed("╭─ Oops ──╮\n│ Very    │\n│ wrong.  │\n│ ─────── │\n│ help: x │\n╰─────────╯\n") == "very wrong"
    assert unboxed(" Oops   \n ------ \n Very  \n wrong.  \n ------- \n  help: x  \n  \n") == "very wrong"
    assert unboxed("") == "wrong arguments"


def test_a_few_lines_that_stand_for_millions_of_values_are_one_line(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    for use in ("loop: *a8", "loop: {steps: *a8}"):
        recipe = tmp_path / "bomb.yaml"
        recipe.write_text("\n".join([*lines, use]) + "\n")
        with pytest.raises(UserError):
            run_config(recipe=recipe)


@pytest.mark.parametrize(
    "value", ["!!map [a, b]", "!!set [a]", "!!bool x", "!!int ''", "!!timestamp x", "!!float x", "2026-99-99"]
)
def test_yaml_that_its_reader_stumbles_over_is_one_line(value: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"loop: {{epochs: {value}}}")
    with pytest.raises(UserError, match=r"r\.yaml: not valid YAML: [^\n]*$"):
        run_config(recipe=recipe)


def test_help_of_a_switch_that_is_on_says_what_it_turns_off(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_config("--help")
    assert re.search(r"--no-calibrate\s+turn off: scale", capsys.readouterr().out)


@pytest.mark.parametrize(("argv", "given"), [([], {}), (["--no-calibrate"], {"calibrate": False})])
def test_a_setting_that_is_switched_off_is_given(argv: list[str], given: dict[str, Any]) -> None:
    settings, _ = parse_given(RunConfig, argv, prog="x", description="", before=[], only=lambda _: True)
    assert settings == given
