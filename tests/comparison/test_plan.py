"""What is asked of a comparison, and what may be concluded from it: plans, flags, intervals, budgets. Nothing is trained."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

import deitkit as dk
from deitkit import cli
from deitkit.comparison.plan import (
    ComparisonPlan,
    Contender,
    asked_for,
    contender_config,
    plan_from,
    read_plan,
    tape_needs,
    with_and_without,
    without_unasked_features,
    write_plan,
)
from deitkit.comparison.results import Difference, describe_difference, mean_sd, paired_difference
from deitkit.comparison.runner import RunCost, TapeCost, frozen_steps, most_steps
from deitkit.config import DataConfig, RunConfig
from deitkit.data import load_data
from deitkit.settings import build, find_recipe
from deitkit.terminal import UserError
from deitkit.training.setup import resolve
from deitkit.verbs.runs import NOT_IN_A_COMPARISON


def plan(**contenders: Any) -> dict[str, Any]:
    return {"baseline": "none", "contenders": {"none": {"distillation": "none"}, **contenders}}


PLANS = sorted((Path(__file__).parents[2] / "benchmarks" / "plans").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_committed_plan_can_be_asked_for(path: Path) -> None:
    asked = read_plan(path)
    assert len(asked.seeds) >= 3
    digits = load_data("digits", DataConfig())
    sizes = {"photos": None, "tenth-photos": None, "small-first": (32, 32)}
    images = replace(digits, image_size=sizes.get(path.stem, digits.image_size))
    resolved = [resolve(contender_config(asked, name), images, "x") for name in asked.contenders]
    configs = [config.model_dump_json(exclude={"view": {"augment"}}) for config in resolved]
    assert len(set(configs)) == len(configs), "two contenders would be the same run"


def test_the_document_names_every_flag_of_a_training_that_a_comparison_does_not_take() -> None:
    document = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
    sentence = document.partition("Not taken are ")[2].partition("\n`--seeds 0")[0]
    named = {name.replace("-", "_") for name in re.findall(r"`--([a-z-]+)`", sentence)}
    assert named - {"seeds", "losses"} == NOT_IN_A_COMPARISON


def test_interval_of_paired_differences_is_that_of_the_paired_t_test() -> None:
    own, base = [0.861, 0.874, 0.869, 0.858], [0.852, 0.866, 0.871, 0.843]
    found = paired_difference(dict(enumerate(own)), dict(enumerate(base)))
    interval = stats.ttest_rel(own, base).confidence_interval(0.95)
    assert found is not None
    assert found.pairs == 4
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_a_preset_over_a_recipe_stands_for_how_its_views_look() -> None:
    recipe = find_recipe("deit")
    own = asked_for(Path("out"), recipe=recipe, settings={"teacher": "x"}).shared
    light = asked_for(Path("out"), recipe=recipe, settings={"teacher": "x", "augment": "light"}).shared
    assert {"randaugment", "random_erasing_prob", "repeated_aug"} <= set(own)
    assert set(own) - set(light) >= {"randaugment", "random_erasing_prob"}
    assert light["repeated_aug"] == 3  # not how a view looks


def test_a_recipe_s_minutes_are_not_lost(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("loop: {budget_minutes: 10, seed: 4}")
    with pytest.raises(UserError, match="budget_minutes: minutes are for the whole comparison"):
        asked_for(Path("out"), recipe=tmp_path / "mine.yaml", settings={"teacher": "x"})


def test_teachers_to_choose_from_may_be_separated_by_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c,d").mkdir()
    given = ["auto,b", "c,d", "resnet18@c,d", "c,d+e"]
    plan = asked_for(Path("out"), choose_teacher=given, settings={})
    assert [own.get("teacher") for own in plan.contenders.values()] == [None, "auto", "b", *given[1:]]
    with pytest.raises(UserError, match="choose-teacher: an empty name"):
        asked_for(Path("out"), choose_teacher=["auto", ","], settings={})


def test_figures_by_hand() -> None:
    """Differences 1, 2, 6: mean 3, sd √7, t(2) at 97.5 % = 4.302653, half the interval 4.302653 · √(7/3) = 6.572411."""
    assert mean_sd([2.0, 4.0, 9.0]) == (3, 5.0, pytest.approx(13**0.5))
    found = paired_difference({0: 11.0, 1: 22.0, 2: 36.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    assert found is not None
    assert found.mean == pytest.approx(3.0)
    assert found.sd == pytest.approx(7**0.5)
    assert (found.low, found.high) == pytest.approx((-3.572411, 9.572411), abs=1e-5)
    assert not found.significant


def test_only_seeds_that_both_have_are_paired() -> None:
    found = paired_difference({0: 1.0, 1: 5.0, 3: 3.0}, {0: 0.0, 2: 9.0, 3: 1.0})
    assert found is not None
    assert (found.pairs, found.mean) == (2, 1.5)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_pairs_without_a_spread_have_no_interval() -> None:
    """Accuracies go by whole images: two seeds that differ by as many tell nothing of a third."""
    found = paired_difference({0: 101 / 145, 1: 111 / 145}, {0: 100 / 145, 1: 110 / 145})
    assert found is not None
    assert (found.pairs, found.low, found.high, found.significant) == (2, None, None, False)
    assert found.mean == pytest.approx(1 / 145)


def test_a_single_pair_has_neither_sd_nor_interval() -> None:
    assert paired_difference({0: 1.0}, {0: 0.5}) == (1, 0.5, None, None, None)
    assert mean_sd([1.0]) == (1, 1.0, None)
    assert mean_sd([]) is None


@pytest.mark.parametrize(
    ("difference", "sentence"),
    [
        (
            Difference(3, 1.2, 0.3, 0.4, 2.0),
            "significant: hard +1.20 points vs none (95 % interval +0.4 to +2.0, 3 seeds)",
        ),
        (
            Difference(3, -1.2, 0.3, -2.0, -0.4),
            "significant: hard -1.20 points vs none (95 % interval -2.0 to -0.4, 3 seeds)",
        ),
        (
            Difference(3, 0.2, 0.3, -0.4, 0.8),
            "no significant difference: hard +0.20 points vs none (95 % interval -0.4 to +0.8, 3 seeds)",
        ),
        (
            Difference(1, 1.2, None, None, None),
            "not tested: hard +1.20 points vs none (a single pair of runs has no confidence interval)",
        ),
        (
            Difference(2, 0.69, 0.0, None, None),
            "not tested: hard +0.69 points vs none (all 2 pairs of runs differ by the same, so it has no confidence interval)",
        ),
        (None, "hard and none have no finished seed in common"),
    ],
)
def test_the_sentence_says_what_was_found_and_no_more(difference: Difference | None, sentence: str) -> None:
    assert describe_difference("hard", "none", difference) == sentence


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("contenders: {a: {}, b: {epochs: 3}}", "baseline: name the contender"),
        ("baseline: c\ncontenders: {a: {}, b: {epochs: 3}}", "baseline: unknown contender 'c': known: a, b"),
        ("baseline: a\ncontenders: {a: {}}", "'a' alone: there is nothing to compare it with"),
        ("baseline: a", "contenders: give names"),
        ("baseline: a\ncontenders: [a, b]", "contenders: give names"),
        ("baseline: a\nseed: [1]\ncontenders: {a: {}, b: {}}", "unknown key 'seed': did you mean seeds"),
        (
            "baseline: a\ncontenders: {a: {}, b: {epoch: 3}}",
            "contender 'b': unknown setting 'epoch': did you mean epochs",
        ),
        ("baseline: a\ncontenders: {a: {}, b: {loop: {epoch: 3}}}", "contender 'b': unknown setting 'epoch'"),
        ("baseline: a\nshared: 3\ncontenders: {a: {}, b: {}}", "shared: expected settings such as"),
        ("baseline: a\ncontenders: {a: {}, b: 3}", "contender 'b': expected settings such as"),
        ("baseline: a\ncontenders:\n  a: {}\n  a: {epochs: 3}", "duplicate key 'a', line 4"),
        ("baseline: a\ncontenders: {a: {}, ../b: {epochs: 3}}", "contender '../b': a name has up to 60 letters"),
        ("baseline: a\ncontenders: {a: {}, 1: {epochs: 3}}", "contender 1: a name has up to 60 letters"),
        ("baseline: a\ncontenders: {a: {}, A: {epochs: 3}}", "'A': two names differ only in case"),
        ("baseline: a\ncontenders: {a: {}, b: {seed: 3}}", "contender 'b': seed: give `seeds` of the comparison"),
        ("baseline: a\ncontenders: {a: {}, b: {tape: t}}", "contender 'b': tape: a comparison records its own tapes"),
        (
            "baseline: a\nshared: {budget_minutes: 3}\ncontenders: {a: {}, b: {}}",
            "minutes are for the whole comparison",
        ),
        ("baseline: a\ncontenders: {a: {}, b: {data_seed: 3}}", "data_seed: all are measured on the same images"),
        ("baseline: a\nagainst: {yes: b}\ncontenders: {a: {}, b: {epochs: 3}}", "against: give names of contenders"),
        ("baseline: a\nagainst: [b]\ncontenders: {a: {}, b: {epochs: 3}}", "against: give names of contenders"),
        ("baseline: a\nagainst: {b: c}\ncontenders: {a: {}, b: {epochs: 3}}", "against: unknown contender 'c'"),
        ("baseline: a\nagainst: {b: b}\ncontenders: {a: {}, b: {epochs: 3}}", "'b' is compared with itself"),
        ("baseline: a\nagainst: {a: b}\ncontenders: {a: {}, b: {epochs: 3}}", "against: 'a' is the baseline"),
        ("baseline: a\nseeds: [0, 0]\ncontenders: {a: {}, b: {}}", "seeds: duplicate seed"),
        ("baseline: a\nseeds: [1, 1.0]\ncontenders: {a: {}, b: {}}", "seeds: duplicate seed"),
        ("baseline: [a]\ncontenders: {a: {}, b: {}}", "baseline: unknown contender"),
        ("baseline: a\nshared: &s {student: *s}\ncontenders: {a: {}, b: {}}", "shared: Circular reference"),
        ("baseline: a\ncontenders: {a: {}, b: {student: {student: {2026-01-01: x}}}}", "contender 'b': keys must be"),
        ("baseline: a\nseeds: []\ncontenders: {a: {}, b: {}}", "seeds: "),
        ("baseline: a\nseeds: [-1]\ncontenders: {a: {}, b: {}}", "seeds.0: input should be greater than or equal to 0"),
        (
            "baseline: a\nbudget_minutes: 3\ncontenders: {a: {}, b: {epochs: 3}}",
            "b: length: leave it out: budget_minutes gives all contenders the same steps",
        ),
        (
            "baseline: a\nshared: {epochs: 3, steps: 4}\ncontenders: {a: {}, b: {}}",
            "epochs excludes steps: give one length",
        ),
        ("baseline: a\ncontenders: {a: {}, b: {temperature: hot}}", "contender 'b': temperature: input should be"),
        (
            "baseline: a\ncontenders: {a: {}, b: {distillation: hard}}",
            "contender 'b': distillation: 'hard' needs a teacher",
        ),
        (
            "baseline: a\ncontenders: {a: {}, b: {teacher: t, distillation: none}}",
            "contender 'b': distillation: 'none' uses no teacher",
        ),
        ("baseline: a\ncontenders: {a: {}, b: {student: deit_huge}}", "contender 'b': unknown student 'deit_huge'"),
        ("baseline: a\ncontenders: {a: {}, b: {train_images: 9999}}", "contender 'b': train_images is 9999"),
        ("baseline: a\ncontenders: {a: {}, b: {teacher: no/run}}", "contender 'b': teacher no/run: neither"),
        (
            "baseline: a\ncontenders: {a: {}, b: {teacher: resnet18}}",
            "contender 'b': teacher resnet18 knows 1000 classes",
        ),
        ("baseline: a\ncontenders: {a: {}, b: {distillation: none}}", "'a' and 'b' have the same settings"),
        ("baseline: a\ncontenders: {a: {}, b: {}", "not valid YAML"),
    ],
)
def test_what_is_wrong_with_a_plan_is_one_line_before_anything_is_trained(
    text: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    argv = ["compare", "digits", "--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert complaint in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "what is to be compared? give --teacher T"),
        (["--resume"], "what is to be compared?"),
        (["--resume", "--teacher", "x"], "no comparison to resume here: plan.yaml is missing"),
        (["--plan", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--plan", "p.yaml", "--losses", "hard"], "--plan names the contenders"),
        (["--choose-teacher", "a", "b", "--teacher", "c"], "leave out --teacher"),
        (["--choose-teacher", "a", "--losses", "hard", "soft"], "by one loss"),
        (["--teacher", "x", "--losses", "firm"], "contender 'firm': distillation: input should be"),
        (["--teacher", "x", "--losses", "callable"], "a function of your own is for dk.train"),
        (["--teacher", "x", "--epochs", "2", "--steps", "3"], "epochs excludes steps"),
        (
            ["--teacher", "x", "--epochs", "2", "--budget-minutes", "3"],
            "length: leave it out: budget_minutes gives all contenders the same steps",
        ),
        (["--teacher", "x", "--seed", "2"], "--seed: does not apply to deit compare"),
        (["--teacher", "no/run"], "neither a network's name nor a run folder"),
    ],
)
def test_what_is_wrong_with_the_flags_is_one_line(
    argv: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "digits", "--out", "out", *argv]) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_contender_s_settings_replace_what_they_exclude() -> None:
    question = plan_from(
        {
            "shared": {"teacher": {"teacher": "cnn"}, "loss": {"distil_head": "cls"}, "loop": {"steps": 9}},
            **plan(longer={"epochs": 5}, control={"distil_target": "labels"}),
        },
        "plan",
    )
    none, longer, control = (contender_config(question, name) for name in question.contenders)
    assert (none.loop.length, none.loss.distillation, none.teacher.present) == ("9st", "none", False)
    assert (longer.loop.length, longer.loss.distil, longer.teacher.teacher) == ("5ep", "cls", "cnn")
    assert (control.loop.length, control.loss.distil, control.teacher.present) == ("9st", "labels", False)
    softer = plan_from({"shared": {"teacher": "cnn", "temperature": 5}, **with_and_without(["soft"])}, "plan")
    assert contender_config(softer, "soft").loss.temperature == 5


def test_contenders_share_settings_that_some_of_them_do_not_need() -> None:
    shared = {"teacher": "cnn", "distillation": "zscore", "temperature": 2, "layer_decay": 0.65}
    others = {"hard": {"distillation": "hard"}, "zscore": {}, "control": {"distil_target": "labels"}}
    question = plan_from({"shared": shared, **plan(**others)}, "plan")
    losses = {name: contender_config(question, name).loss for name in question.contenders}
    assert {name: loss.temperature for name, loss in losses.items()} == {
        "none": None, "hard": None, "zscore": 2.0, "control": 2.0,
    }  # fmt: skip
    assert {name: loss.distillation for name, loss in losses.items()} == {
        "none": "none", "hard": "hard", "zscore": "zscore", "control": None,
    }  # fmt: skip


def test_labels_alone_may_be_shared() -> None:
    question = plan_from({"shared": {"distil": "labels"}, **plan(longer={"epochs": 5})}, "plan")
    none, longer = (contender_config(question, name).loss for name in question.contenders)
    assert (longer.distil, longer.has_distill_term) == ("labels", True)
    assert none.has_distill_term is False
    with pytest.raises(UserError, match="name a loss"):
        plan_from({"shared": {"distillation": lambda *_: None}, **plan(longer={"epochs": 5})}, "plan")


def test_the_size_of_the_shared_teacher_s_images_is_left_out_where_there_is_no_teacher() -> None:
    question = plan_from(
        {
            "shared": {"teacher_size": 16},
            **plan(taught={"teacher": "cnn"}, control={"distil_target": "labels"}, alone={}),
        },
        "plan",
    )
    sizes = {name: contender_config(question, name).teacher.teacher_size for name in question.contenders}
    assert sizes == {"none": None, "taught": 16, "control": None, "alone": None}


def key_of_tape(automatic: bool = False, **settings: Any) -> str:
    """What the tape of a contender on the digits is found by."""
    digits = load_data("digits", DataConfig())
    config = resolve(build(RunConfig, {"teacher": "x", **settings}), digits, "digits")
    automatic_of = config.changed(teacher={"teacher": "auto"}) if automatic else None
    contender = Contender(name="a", config=config, dataset=digits, automatic=automatic_of)
    (need,) = tape_needs([contender], Path("tapes"))
    return need.path.name


def test_a_tape_is_found_by_the_size_of_the_teacher_s_images_where_it_is_given() -> None:
    keys = {
        key_of_tape(automatic, **size)
        for automatic in (False, True)
        for size in ({}, {"teacher_size": 8}, {"teacher_size": 9})
    }
    assert len(keys) == 6


def test_a_run_of_a_comparison_has_the_size_in_its_tape_alone() -> None:
    digits = load_data("digits", DataConfig())
    config = resolve(build(RunConfig, {"teacher": "x", "teacher_size": 16}), digits, "digits")
    config = without_unasked_features(config)
    run = Contender(name="a", config=config, dataset=digits, automatic=None).run_config(3, Path("tape"))
    assert (run.teacher.tape, run.teacher.teacher, run.teacher.teacher_size) == ("tape", None, None)
    assert RunConfig.model_validate(run.model_dump()) == run


def test_a_plan_written_down_is_the_same_when_it_is_read(tmp_path: Path) -> None:
    question = plan_from({"shared": {"crop_area": (0.3, 1.0), "epochs": 3}, **plan(b={"teacher": "cnn"})}, "plan")
    (tmp_path / "plan.yaml").write_text(write_plan(question))
    assert read_plan(tmp_path / "plan.yaml") == question
    assert isinstance(question, ComparisonPlan)


def test_a_plan_of_an_earlier_version_is_read_with_its_old_names(tmp_path: Path) -> None:
    """As version 0.1 wrote `plan.yaml`, so that its comparison can be resumed; a loss that is gone is refused."""
    (tmp_path / "plan.yaml").write_text(
        "shared: {teacher: cnn, epochs: 3, lr_per_256_images: 0.01, warmup_share: 0.1, distil_head: cls, clip_norm: 2.0}\n"
        "seeds: [0]\nbaseline: none\nranked: false\n"
        "contenders: {none: {distillation: none}, hard: {distillation: hard, steps: 9}}\n"
    )
    none, hard = (contender_config(read_plan(tmp_path / "plan.yaml"), name) for name in ("none", "hard"))
    assert (none.loop.length, hard.loop.length, hard.loss.distil) == ("3ep", "9st", "cls")
    assert (hard.optim.base_lr, hard.optim.warmup, hard.optim.max_grad_norm) == (0.01, "10%", 2.0)
    gone = (tmp_path / "plan.yaml").read_text().replace("distillation: hard", "distillation: dkd")
    (tmp_path / "plan.yaml").write_text(gone)
    with pytest.raises(UserError, match="contender 'hard': distillation: 'dkd' is not there any more"):
        read_plan(tmp_path / "plan.yaml")


def test_a_tape_is_no_teacher_of_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "tape.json").touch()
    with pytest.raises(UserError, match="settings: tape: a comparison records its own tapes: name the teacher"):
        asked_for(Path("out"), settings={"teacher": str(tmp_path)})


def test_steps_are_the_most_that_a_budget_can_pay() -> None:
    """Two runs of 0.1 s a step, 2 s an evaluation after every 10 steps, 5 s to start; a tape of 3 s a view, 4 s to start."""
    learner = build(RunConfig, {"teacher": "t"}).view
    costs = [RunCost(2, 10, 0.1, 2.0, 5.0), TapeCost(3.0, 4.0, 1, ((10, learner),))]
    # 30 steps: 2 · (3 + 6 + 5) = 28, two views more = 10: 38 s. 31 steps: 2 · (3.1 + 8 + 5) = 32.2, three views = 13.
    assert sum(cost.seconds(30) for cost in costs) == pytest.approx(38)
    assert most_steps(38.01, costs) == 30
    assert most_steps(45.19, costs) == 30
    assert most_steps(45.21, costs) == 31
    assert most_steps(10.0, costs) == 0
    round_them = learner.model_copy(update={"views": 2})
    assert TapeCost(3.0, 4.0, 1, ((10, round_them),)).seconds(1000) == 7.0  # goes round two views


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"steps": 0}', '{"steps": -3}', '{"steps": Infinity}', '{"steps": "a"}']
)
def test_a_damaged_budget_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "budget.json").write_text(content)
    with pytest.raises(UserError, match=r"budget\.json: cannot be read: .+"):
        frozen_steps(tmp_path, plan_from({"baseline": "a", "contenders": {"a": {}, "b": {"epochs": 3}}}, "plan"))


def test_interrupted_is_one_line_that_says_how_to_continue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("deitkit.api.compare", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["compare", "digits", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "deit: interrupted\n"
    (tmp_path / "plan.yaml").touch()
    assert cli.main(["compare", "digits", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "deit: interrupted: rerun with --resume to continue\n"


def test_help_needs_neither_torch_nor_what_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_cli import imported_by

    assert not {"torch", "matplotlib", "jinja2", "scipy"} & imported_by("compare", "--help")


DOCUMENT = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    return [text for kind, text in found if kind == language]


def test_commands_and_plan_of_the_document_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deitkit import api

    monkeypatch.chdir(tmp_path)
    (text,) = blocks("yaml")
    Path("plan.yaml").write_text(text)
    asked: dict[str, ComparisonPlan] = {}

    def remember(_data: str, question: ComparisonPlan, out: Path, **options: Any) -> dict[str, Any]:
        for name in question.contenders:
            contender_config(question, name)
        asked[str(out)] = question
        out.mkdir(parents=True, exist_ok=True)
        (out / "plan.yaml").write_text(write_plan(question))
        return {"failed": []}

    monkeypatch.setattr(api, "run_comparison", remember)
    lines = [line for block in blocks("") for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        assert cli.main(shlex.split(line)[1:]) == 0, line
    assert list(asked["runs/compared"].contenders) == ["none", "hard", "zscore"]
    assert asked["runs/an-hour"].budget_minutes == 60
    assert list(asked["runs/teachers"].contenders) == ["none", "resnet18", "auto"]
    assert asked["runs/losses"].seeds == (0, 1, 2)
    assert (asked["runs/try"].shared["length"], asked["runs/try"].seeds) == ("2ep", (0,))
    kept = contender_config(asked["runs/losses"], "tenth-hard")
    assert (kept.data.train_images, kept.teacher.teacher, kept.view.mixup_alpha) == (6000, "auto", 0.8)


def test_no_package_hides_a_function_of_the_same_name() -> None:
    """Importing `deitkit.x` binds `x` in `deitkit`: `dk.x` would be the package from then on."""
    assert dk.compare is dk.compare
    assert [name for name in dk.__all__ if find_spec(f"deitkit.{name}")] == []
