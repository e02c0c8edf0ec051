"""Where a run's teacher outputs come from, and what `deit train` does unasked."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fakes import killed_after_epoch

import deitkit as dk
from deitkit import cli
from deitkit.config import DataConfig, RunConfig
from deitkit.data import load_data
from deitkit.distill.encoding import CODE_FILE
from deitkit.distill.teacher import Teacher
from deitkit.models.cnn import CifarResNet, CNNConfig, build_cnn
from deitkit.settings import build, find_recipe
from deitkit.terminal import Progress, SilentProgress, load_yaml
from deitkit.training import jobs
from deitkit.training.fit import TRAINING_COST, _stored, automatic_fits, expected_costs
from deitkit.training.jobs import run_training
from deitkit.training.run import RunFolder, teacher_unasked
from deitkit.training.setup import recipe_unasked
from deitkit.training.teaching import Teaching, time_needed, with_few_views

QUICK: dict[str, Any] = {"train_images": 200, "batch_size": 50, "workers": 0, "augment": "light", "view_seed": 3}


class Heard(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def train(out: Path, *, resume: bool = False, **settings: Any) -> Heard:
    heard, config = Heard(), build(RunConfig, {**QUICK, **settings})
    run_training("digits", config, out, resume=resume, progress=heard)
    return heard


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------------------------------------ what is unasked


def test_a_student_has_a_teacher_unless_it_is_to_learn_from_labels(tmp_path: Path) -> None:
    def teacher_of(**given: Any) -> str | None:
        return build(RunConfig, given, teacher="auto").teacher.teacher

    assert teacher_of() == teacher_of(distillation="hard") == "auto"
    assert teacher_of(teacher="lite0") == "lite0"
    for given in ({"distillation": "none"}, {"distil": "labels"}, {"teacher": "none"}):
        assert teacher_of(**given) is None
    assert build(RunConfig, {"teacher": "none"}).loss.distillation == "none"
    with pytest.raises(dk.UserError, match="hard needs a teacher, and --teacher none has none"):
        build(RunConfig, {"teacher": "none", "distillation": "hard"})
    unasked = {name: teacher_unasked(tmp_path, False, find_recipe(name)) for name in ("photos", "deit3", "few-images")}
    assert unasked == {"photos": None, "deit3": None, "few-images": "auto"}


def test_a_run_without_a_teacher_is_resumed_without_one(tmp_path: Path) -> None:
    train(tmp_path / "plain", distillation="none", steps=1)
    assert teacher_unasked(tmp_path / "plain", True, None) is None
    assert teacher_unasked(tmp_path / "plain", False, None) == teacher_unasked(tmp_path / "new", True, None) == "auto"


def test_the_recipe_follows_the_data_where_the_choice_is_open() -> None:
    digits = load_data("digits", DataConfig())
    photos, small = replace(digits, image_size=(640, 480)), replace(digits, image_size=(32, 32))
    many = replace(photos, open_split=lambda _: range(1501))  # type: ignore[arg-type]
    quiet = SilentProgress()
    assert recipe_unasked(many, {"length": "3ep", "teacher": "auto"}, quiet) == "photos"
    assert recipe_unasked(photos, {}, quiet) == "few-photos"
    assert recipe_unasked(small, {}, quiet) == "few-images"
    assert recipe_unasked(digits, {}, quiet) is recipe_unasked(replace(small, classes=("a", "b")), {}, quiet) is None
    for choice in ("student", "init", "tape", "optimizer", "augment", "stem"):
        assert recipe_unasked(photos, {choice: "x"}, quiet) is None
    for init in ("auto", "scratch"):
        assert recipe_unasked(photos, {"init": init}, quiet) == "few-photos"


def test_a_costly_teacher_looks_at_eight_views() -> None:
    """One with four times the student's pixels, or more."""
    digits, small = load_data("digits", DataConfig()), other_classes()
    network = build_cnn(CNNConfig(name="cifar-resnet8", classes=10), image_size=(16, 16), pretrained=False)
    large = Teacher(network, name="large", num_classes=10)

    def views(teacher: Teacher = large, **given: Any) -> int | None:
        config = build(RunConfig, {"teacher": "x", "epochs": 9, "view_size": (8, 8), **given})
        return with_few_views(config, digits, teacher.preprocessing.image_size).view.views

    assert (views(), views(repeated_aug=3), views(views=9), views(epochs=8)) == (8, 6, 9, None)
    assert views(small) is views(record="tape") is views(view_size=(9, 9)) is None
    assert views(epochs=None, budget_minutes=3.0) == 8


# ------------------------------------------------------------------------------------------------ recorded first


def test_outputs_recorded_first_teach_what_the_live_teacher_does_and_are_kept(
    tmp_path: Path, cnn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two views in four epochs, with logits and features."""
    settings: dict[str, Any] = {"epochs": 4, "views": 2}
    with monkeypatch.context() as patched:
        patched.setattr(jobs, "repeats_views", lambda *_: False)
        live = train(tmp_path / "live", teacher=str(cnn), **settings)
    first = train(tmp_path / "first", teacher=str(cnn), **settings)
    assert same(tmp_path / "live", tmp_path / "first")
    recorded = [line for line in first.lines if line.startswith("teacher: recording its outputs for 2 views of 200")]
    assert len(recorded) == 1
    assert not any("recording its outputs" in line for line in live.lines)
    other = train(tmp_path / "other", teacher=str(cnn), seed=1, **settings)
    assert not any("recording its outputs" in line for line in other.lines)
    assert not same(tmp_path / "first", tmp_path / "other")
    assert load_yaml(tmp_path / "first" / "config.yaml")["loss"]["feature_weight"] == 2.0


# ------------------------------------------------------------------------------------------------------ features


def test_features_teach_and_leave_no_trace_in_the_model(tmp_path: Path, cnn: Path) -> None:
    shared: dict[str, Any] = {"teacher": str(cnn), "epochs": 2}
    train(tmp_path / "both", **shared)
    train(tmp_path / "named", **shared, distillation="zscore")
    train(tmp_path / "given", **shared, distillation="zscore", feature_weight=2.0)
    assert same(tmp_path / "both", tmp_path / "given")
    assert weights(tmp_path / "both").keys() == weights(tmp_path / "named").keys()
    assert not same(tmp_path / "both", tmp_path / "named")
    rows = {name: RunFolder(tmp_path / name).events() for name in ("both", "named")}
    losses = {name: next(row for row in events if row["event"] == "epoch")["loss"] for name, events in rows.items()}
    assert 0 < losses["both"]["features"] < 2
    assert "features" not in losses["named"]
    assert losses["both"]["total"] == pytest.approx(
        0.5 * losses["both"]["label"] + 5 * losses["both"]["teacher"] + 2 * losses["both"]["features"], rel=1e-5
    )


def test_a_killed_run_with_features_ends_with_the_same_weights(tmp_path: Path, cnn: Path) -> None:
    shared: dict[str, Any] = {"teacher": str(cnn), "epochs": 3}
    train(tmp_path / "whole", **shared)
    with killed_after_epoch(1):
        train(tmp_path / "killed", **shared)
    code = (tmp_path / "killed" / CODE_FILE).read_bytes()
    train(tmp_path / "killed", **shared, resume=True)
    assert same(tmp_path / "whole", tmp_path / "killed")
    assert (tmp_path / "killed" / CODE_FILE).read_bytes() == code
    assert "already finished" in " ".join(train(tmp_path / "killed", **shared, resume=True).lines)


def other_classes() -> Teacher:
    torch.manual_seed(0)
    network = build_cnn(CNNConfig(name="cifar-resnet8", classes=7, channels=1), image_size=(8, 8), pretrained=False)
    return Teacher(network, name="seven", num_classes=7)


def test_features_of_a_teacher_of_other_classes_are_learned_without_labels(tmp_path: Path) -> None:
    alone = {"teacher": "seven", "epochs": 2, "distillation": "features", "label_weight": 0.0}
    heard, config = Heard(), build(RunConfig, {**QUICK, **alone})
    summary = run_training("digits", config, tmp_path / "run", resume=False, progress=heard, teacher=other_classes())
    assert "loss = 2 * cosine(teacher's features)" in heard.lines
    assert any("seven: 7 classes of its own" in line for line in heard.lines)
    assert (summary["teacher"], summary["agreement"]) == (None, None)
    events = [row for row in RunFolder(tmp_path / "run").events() if row["event"] == "epoch"]
    assert events[-1]["loss"]["features"] < events[0]["loss"]["features"]
    config = build(RunConfig, {**QUICK, "teacher": "seven", "steps": 1})
    arguments: dict[str, Any] = {"resume": False, "progress": SilentProgress(), "teacher": other_classes()}
    with pytest.raises(dk.UserError, match="7 classes"):
        run_training("digits", config, tmp_path / "no", **arguments)


def test_a_tape_of_features_alone_is_recorded_verified_and_learned_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line, of a network with weights for seven other classes."""
    torch.manual_seed(3)
    save_file(CifarResNet(8, 7, 1).state_dict(), tmp_path / "seven.safetensors")
    teacher, tape, run = (
        f"cifar-resnet8@{tmp_path / 'seven.safetensors'}",
        str(tmp_path / "tape"),
        str(tmp_path / "run"),
    )
    record = [
        "tape",
        "record",
        "digits",
        "--teacher",
        teacher,
        "--train-images",
        "100",
        "--workers",
        "0",
        "--out",
        tape,
    ]
    assert cli.main([*record, "--outputs", "features", "--views", "1"]) == 0
    assert re.search(r"no logits; 6\d principal components of the features, float16", capsys.readouterr().out)
    assert cli.main([*record, "--views", "2"]) == 0  # what the tape has is known from it
    assert "validation accuracy" not in capsys.readouterr().out
    assert cli.main(["tape", "verify", tape, "digits", "--teacher", teacher, "--samples", "32"]) == 0
    learn = ["train", "digits", "--teacher", tape, "--steps", "2", "--workers", "0", "--out", run]
    assert cli.main(learn) == 2
    assert "features only, --distillation" in capsys.readouterr().err
    assert cli.main([*learn, "--distillation", "features"]) == 0
    assert load_yaml(Path(run) / "config.yaml")["loss"]["feature_weight"] == 2.0
    assert "largest class" in "".join(capsys.readouterr())
    assert cli.main([*learn[:-1], run + "-alone", "--distillation", "features", "--label-weight", "0"]) == 0
    said = "".join(capsys.readouterr())
    assert f"classifiers are untrained\nnext: deit train DATA --init {run}-alone" in said
    assert "largest class" not in said
    assert cli.main(["evaluate", run + "-alone"]) == 0
    said = "".join(capsys.readouterr())
    assert "classifiers are untrained" in said
    assert "it has learned nothing" not in said
    without = [*record[:-1], str(tmp_path / "other"), "--views", "1"]
    assert cli.main(without) == 2  # its logits are of other classes
    assert "7 classes" in capsys.readouterr().err


def test_features_that_a_teacher_lacks_are_refused_only_where_they_are_asked_for(tmp_path: Path) -> None:
    function = dk.teacher_from_callable(
        lambda images: images[:, 0, 2:7, 2:4].flatten(1),
        name="pixels",
        num_classes=10,
        preprocessing=other_classes().preprocessing,
    )
    config = build(RunConfig, {**QUICK, "teacher": "pixels", "steps": 1, "feature_weight": 1.0})
    with pytest.raises(dk.UserError, match="pixels: has no features to learn"):
        run_training("digits", config, tmp_path / "run", resume=False, progress=SilentProgress(), teacher=function)


# ---------------------------------------------------------------------------------------- what a run says before it begins


def test_the_stages_of_a_run_are_told_with_their_minutes() -> None:
    digits = load_data("digits", DataConfig())  # 1,293 training images

    def line(
        seconds: float, processes: int = 1, teacher_seconds: float = 0.1, fitting: float = 0.0, **given: Any
    ) -> str | None:
        config = build(RunConfig, {"teacher": "x", "epochs": 10, "view_size": (8, 8), **given})
        return time_needed(config, digits, seconds, teacher_seconds, processes, fitting)

    recorded = (
        "time: recording the teacher's outputs (unless they are kept) about 4 min, training the student about 6 min"
    )
    assert line(0.01, views=2) == recorded  # 2 * 1293 * 0.1 s; 3 * 10 * 1293 * 0.01 s
    assert line(0.01, views=2, fitting=130.0) == recorded.replace(
        "recording", "fitting a teacher about 2 min, recording"
    )
    assert line(0.01) == "time: training the student about 28 min"  # the live teacher looks at every view
    assert line(0.01, processes=2) == "time: training the student about 14 min"
    assert line(0.01, record="tape") == recorded.replace("4 min", "22 min")  # all ten views
    assert line(0.0001, teacher_seconds=0.0001) is None
    minutes: dict[str, Any] = {"epochs": None, "budget_minutes": 3.0}  # of the student
    assert line(0.01, **minutes) == "time: training the student about 3 min"
    assert line(0.01, **minutes, views=2) == recorded.replace("6 min", "3 min")
    assert line(0.01, **minutes, record="tape") is None


def test_an_automatic_teacher_s_time_is_told_before_it_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deitkit.training.fit.seconds_per_image", lambda *_: 0.1)
    digits = load_data("digits", DataConfig(train_images=100))
    config = build(RunConfig, {"teacher": "auto", "train_images": 100})
    costs = expected_costs("digits", digits, config, torch.device("cpu"))
    (fit,) = automatic_fits(digits, config)
    assert costs == (
        TRAINING_COST * 100 * fit.loop.amount("ep") * 0.1,
        0.1,
        (8, 8),
    )  # from scratch, for images are tiny
    summary = _stored(digits, fit) / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.touch()
    assert expected_costs("digits", digits, config, torch.device("cpu")) is None


def test_few_steps_from_fresh_weights_are_told() -> None:
    teaching = Teaching(name="T", accuracy={"n": 100, "top1": 0.9})
    config = build(RunConfig, {"teacher": "x", "steps": 300})
    assert (
        jobs._few_steps(config, teaching)
        == "300 steps are few for fresh weights: expect less than the teacher's 90.0 %"
    )
    assert jobs._few_steps(config, Teaching()) is None
    assert jobs._few_steps(build(RunConfig, {"teacher": "x", "steps": 1000}), teaching) is None
    assert jobs._few_steps(build(RunConfig, {"teacher": "x", "steps": 300, "init": "x"}), teaching) is None


def test_a_run_from_shipped_weights_keeps_their_name_and_is_resumed(tmp_path: Path, cnn: Path) -> None:
    """Of grey images, which a network of colour images sees in all three channels."""
    given: dict[str, Any] = {"student": "deit_photo", "init": "auto", "image_size": 32, "epochs": 2, "train_images": 96}
    given |= {"distillation": "none"}
    dk.train("digits", out=tmp_path / "whole", **given)
    assert load_yaml(tmp_path / "whole" / "config.yaml")["student"]["init"] == "shipped:deit_photo"
    with killed_after_epoch(1):
        dk.train("digits", out=tmp_path / "broken", **given)
    dk.train("digits", out=tmp_path / "broken", resume=True, **given)
    dk.train("digits", out=tmp_path / "scratch", **{**given, "init": "scratch"})
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "broken", "scratch")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    # fresh weights with the look of trained ones: another start, the shape of fresh ones
    mimetic = dk.train("digits", out=tmp_path / "mimetic", **{**given, "init": "mimetic", "epochs": 1})
    assert load_yaml(mimetic.path / "config.yaml")["student"]["init"] == "mimetic"
    proj = "blocks.0.attn.proj.weight"
    assert mimetic.model.body.state_dict()[proj].std() > 1.5 * weights[2][proj].std()
    assert weights[0]["stem.layers.0.weight"].shape[1] == 3
    assert weights[2]["stem.layers.0.weight"].shape[1] == 1
