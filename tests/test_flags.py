"""Flags, keywords and `--help`: what can be given, what a page shows, one line for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pytest
from pydantic import Field
from tests.test_settings import DATA, run_config, written

from deitkit.api import Settings
from deitkit.config import Config, FitConfig, RunConfig
from deitkit.flags import COMMON, YAML_ONLY, Argument, flag, parse
from deitkit.settings import LENGTHS, build, places
from deitkit.terminal import UserError


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
    for name in ("--mixup-alpha", "--three-augment", "--ema-decay", "--tape", "location"):
        assert name not in page
    assert cli.main(["train", "--help-all"]) == 0
    page = capsys.readouterr().out
    assert "--mixup-alpha" in page
    assert "--no-calibrate" in page
    assert max(map(len, page.splitlines())) <= 80


def test_python_has_every_setting_as_a_typed_keyword() -> None:
    own = {
        "teacher",
        "distillation",
        "location",
        "shrink_batch",
    }  # parameters of `train`, given as `data` or by batch_size="auto"
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
        (["--learning-rate", "1"], "unknown flag --learning-rate: did you mean --lr?"),
        (["--no-compil"], "unknown flag --no-compil: did you mean --no-compile or"),
        (["--tape", "x"], "unknown flag --tape: give the tape's folder to --teacher"),
        (["--warmup-lr", "1e-6"], "--warmup-lr: has no flag: write 'optim: {warmup_lr: ...}' into a YAML file and give it by --recipe"),
        (["--lr", "fast"], "--lr: input should be a valid number, unable to parse string as a number (got 'fast')"),
        (["--lr", "-1"], "--lr: input should be greater than 0 (got '-1')"),
        (["--lr", "1e300"], "--lr: input should be less than or equal to 1000000000000000"),
        (["--weight-decay", "1e39"], "--weight-decay: input should be less than or equal to 1000000000000000"),
        (["--lr"], "--lr/--base-lr: expected one argument"),
        (["--epochs", "0"], "--epochs: must be more than 0 (got '0')"),
        (["--steps", "0"], "--steps: must be more than 0 (got '0')"),
        (["--budget-minutes", "0"], "--budget-minutes: must be more than 0 (got '0')"),
        (["--steps", "1.5"], "--steps: give a whole number of steps (got '1.5')"),
        (["--epochs", "many"], "--epochs: give a number (got 'many')"),
        (["--length", "0ep"], "--length: must be more than 0 (got '0ep')"),
        (["--augment", "strong"], "--augment: input should be 'none', 'light', 'deit' or 'deit3' (got 'strong')"),
        (["--image-size", "100000"], "--image-size: input should be less than or equal to 4096"),
        (["--stem", "None"], "--stem: input should be 'patch', 'conv' or 'residual' (got 'None')"),
        (["--workers", "99999"], "--workers: input should be less than or equal to 1024"),
        (["--distil", "cls"], "--distil: cls needs a teacher: give --teacher"),
        (["--teacher", "x", "--distil", "labels"], "--distil: labels needs no teacher"),
        (["--distillation", "soft", "--distil", "labels"], "--distil: labels needs no teacher and no --distillation"),
        (["--distil", "both", "--distillation", "features", "--teacher", "x"], "--distil: both: features are learned from"),
        (["--distil", "both", "--teacher", "none"], "--distil: both needs a teacher: give --teacher"),
        (["--distil", "both"], "--distil: both needs a teacher: give --teacher"),
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
        (["--randaugment", "rand-m9-w1"], "--randaugment: the part 'w1' is none of m9, n2, mstd0.5, p0.5 and inc1"),
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
        ({"randaugment": "rand-m11"}, "settings: randaugment: the part 'm11' is above 10"),
        ({"randaugment": "rand-n0"}, "settings: randaugment: the part 'n0' is no whole number"),
        ({"randaugment": "rand-p1-p0.5"}, "settings: randaugment: the part 'p0.5' is there twice"),
        ({"randaugment": "9"}, "settings: randaugment: give timm's string, such as rand-m9-n2-mstd0.5-p0.5"),
        ({"randaugment": 0}, "settings: randaugment: input should be a valid string"),
        (
            {"teacher": "x", "distillation": "callable", "temperature": 4.0},
            "settings: temperature: your function has none",
        ),
        ({"teacher": "a" * 300, "steps": 0}, "settings: steps: must be more than 0"),
        ({"label_loss": "bce"}, "settings: label_smoothing: with bce 0.1 would mark every class as right"),
        ({"init": "required"}, "settings: init: this recipe goes on from pretrained weights: give --init"),
        ({"epochs": 3, "steps": 2}, "settings: epochs: excludes steps: give one length"),
        ({"steps": 0}, "settings: steps: must be more than 0 (got 0)"),
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


def test_a_flag_that_took_the_positional_argument_is_named() -> None:
    losses = Argument("losses", tuple[str, ...], "losses", (), metavar="L")
    with pytest.raises(UserError) as caught:
        parse(["--losses", "hard", "digits"], prog="deit x", description="", arguments=[DATA, losses])
    assert str(caught.value) == "missing: DATA: --losses takes all words after it: write DATA before it (deit x --help)"
    own, _ = parse(["digits", "--losses", "hard", "soft"], prog="deit x", description="", arguments=[DATA, losses])
    assert (own.data, own.losses) == ("digits", ("hard", "soft"))


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
