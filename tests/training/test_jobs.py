"""Whole runs on the digits: same bits, no test images, an untouched teacher, honest refusals."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakes import killed_after_epoch

import deitkit as dk
from deitkit.config import DataConfig, FitConfig, Preprocessing, RunConfig
from deitkit.data import Dataset, Split, load_data
from deitkit.distill.teacher import load_teacher
from deitkit.models.zoo import STUDENTS, load_model
from deitkit.settings import build, validated
from deitkit.terminal import PlainProgress, SilentProgress, UserError, load_yaml
from deitkit.training import evaluate, jobs, setup, teaching
from deitkit.training import fit as fitting
from deitkit.training.evaluate import evaluate_run
from deitkit.training.loop import Trainer
from deitkit.training.run import RunFolder

QUICK = {"train_images": 300, "epochs": 3, "batch_size": 64, "base_lr": 4e-3, "drop_path": 0.1}


def settings_of(quick: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """`quick` overridden by `settings`, which may give the length in another unit."""
    other = {"steps", "budget_minutes", "length"} & set(settings)
    return {**{key: value for key, value in quick.items() if key != "epochs" or not other}, **settings}


def train(out: Path, *, resume: bool = False, **settings: Any) -> dict[str, Any]:
    config = build(RunConfig, settings_of({**QUICK, "augment": "deit"}, settings))
    return jobs.run_training("digits", config, out, resume=resume, progress=SilentProgress())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "cnn"
    settings = {
        "model": "cifar-resnet8",
        "from_scratch": True,
        "epochs": 15,
        "batch_size": 64,
        "base_lr": 2e-2,
    }
    fitting.run_fit("digits", build(FitConfig, settings), out, resume=False, progress=SilentProgress())
    return out


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_fitted_teacher_knows_the_digits(teacher: Path) -> None:
    assert json.loads((teacher / "summary.json").read_text())["top1"]["cls"] > 0.9


def test_distilled_student_reports_every_head(tmp_path: Path, teacher: Path) -> None:
    summary = train(tmp_path / "run", teacher=str(teacher))
    assert all(0 <= summary["top1"][head] <= 1 for head in ("cls", "dist", "fused", "fused_logits"))
    assert summary["teacher"]["top1"] > 0.9
    assert len(summary["token_cosine"]) == 5
    assert summary["images_seen"] == 900
    network, card = load_model(tmp_path / "run" / "model")
    assert card.classes == tuple("0123456789")
    assert network(torch.rand(1, 1, 8, 8)).dist_BK is not None


def test_plain_student_has_one_head_and_null_for_the_rest(tmp_path: Path) -> None:
    summary = train(tmp_path / "run")
    assert summary["top1"]["cls"] is not None
    assert summary["top1"]["dist"] is summary["top1"]["fused"] is summary["teacher"] is summary["token_cosine"] is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "loss = 0.5 * CE(labels) + 5 * zscore(teacher) + 2 * cosine(teacher's features)"),
        ({"distillation": "zscore"}, "loss = 0.5 * CE(labels) + 5 * zscore(teacher)"),
        ({"distillation": "soft", "label_weight": 0.0}, "loss = 0.5 * soft(teacher), both heads"),
        ({"distillation": "features", "label_weight": 0.0}, "loss = 2 * cosine(teacher's features)"),
        ({"distil": "labels"}, "loss = 0.5 * CE(labels) + 0.5 * CE(labels, second token)"),
        ({"distillation": "none"}, None),
    ],
)
def test_what_the_loss_is_made_of_is_said(
    tmp_path: Path, teacher: Path, settings: dict[str, Any], said: str | None
) -> None:
    heard = io.StringIO()
    taught = {"teacher": str(teacher)} if said is not None and "teacher" in said else {}
    config = build(RunConfig, {**QUICK, "epochs": 1, **taught, **settings})
    progress = PlainProgress(results=io.StringIO(), messages=heard)
    jobs.run_training("digits", config, tmp_path / "run", resume=False, progress=progress)
    lines = [line for line in heard.getvalue().splitlines() if line.startswith("loss = ")]
    assert lines == ([] if said is None else [said])


def test_a_run_in_the_current_folder_has_the_folder_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(Path(), steps=1)["name"] == tmp_path.name


def test_the_log_of_a_second_class_token_names_no_teacher(tmp_path: Path) -> None:
    train(tmp_path / "run", distil="labels", epochs=1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (loss,) = (line["loss"] for line in lines if "loss" in line)
    assert loss["second_token"] > 0
    assert "teacher" not in loss


BY_EPOCHS = {"warmup": "1.5ep", "warmup_lr": 1e-6, "min_lr": 1e-5}
DEIT3 = {
    "augment": "deit3",
    "label_loss": "bce",
    "label_smoothing": 0.0,
    "max_grad_norm": 1.0,
}


@pytest.mark.parametrize(
    ("distillation", "optimizer"),
    [("none", "adamw"), ("hard", "adamw"), ("soft", "adamw"), ("hard", "muon"), ("none", "lamb"), ("soft", "lamb")],
)
def test_interrupted_and_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, teacher: Path, distillation: str, optimizer: str
) -> None:
    settings: dict[str, Any] = {"distillation": distillation, "optimizer": optimizer}
    settings |= {**DEIT3, **BY_EPOCHS} if optimizer == "lamb" else {}
    settings |= {} if distillation == "none" else {"teacher": str(teacher)}
    train(tmp_path / "whole", **settings)
    with killed_after_epoch(3 if optimizer == "muon" else 2):  # of three: all that is left is the summary
        train(tmp_path / "broken", **settings)
    torch.manual_seed(99)  # whatever state the next process is in
    resumed = train(tmp_path / "broken", resume=True, **settings)
    assert weights(tmp_path / "whole") == weights(tmp_path / "broken")
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("whole", "broken")]
    timed = {"seconds", "seconds_with_preparation", "seconds_per_image", "name"}
    whole, again = ({key: value for key, value in one.items() if key not in timed} for one in summaries)
    assert whole == again
    epochs = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert [event["epoch"] for event in epochs if event["event"] == "epoch"] == [0, 1, 2]
    assert resumed["steps"] == 15


def test_resolved_configuration_fed_back_gives_the_same_bits(tmp_path: Path, teacher: Path) -> None:
    train(tmp_path / "first", teacher=str(teacher))
    stored = validated(RunConfig, load_yaml(tmp_path / "first" / "config.yaml"), "config.yaml")
    jobs.run_training("digits", stored, tmp_path / "again", resume=False, progress=SilentProgress())
    assert weights(tmp_path / "first") == weights(tmp_path / "again")
    assert (tmp_path / "first" / "config.yaml").read_text() == (tmp_path / "again" / "config.yaml").read_text()


def test_workers_change_no_byte_of_a_model_taught_on_photos(tmp_path: Path, shared_data: Path) -> None:
    """Preset deit on real photos of many sizes: RandAugment, erasing, mixup, CutMix, stochastic depth."""
    shape = {"student": "deit_photo", "image_size": 64, "width": 32, "depth": 2, "heads": 2, "drop_path": 0.1}
    settings = {"augment": "deit", "train_images": 60, "epochs": 2, "batch_size": 16, **shape}
    for workers in (0, 1, 4):
        config = build(RunConfig, {**settings, "workers": workers})
        out = tmp_path / f"workers-{workers}"
        jobs.run_training(str(shared_data / "clothing"), config, out, resume=False, progress=SilentProgress())
    assert weights(tmp_path / "workers-0") == weights(tmp_path / "workers-1") == weights(tmp_path / "workers-4")


def test_settings_of_a_call_that_have_no_effect_are_refused(tmp_path: Path) -> None:
    """As on the command line; a Python function says itself what it sees."""
    seen = Preprocessing(image_size=(8, 8), mean=(0.5,), std=(0.5,))
    function = dk.teacher_from_callable(lambda images: images.mean((1, 2, 3))[:, None].expand(-1, 10), name="mean",
                                        num_classes=10, preprocessing=seen)  # fmt: skip
    for settings, complaint in (
        ({"teacher": "x", "distillation": "hard", "temperature": 2.0}, "settings: temperature: hard labels have none"),
        ({"layer_decay": 0.5}, "settings: layer_decay: is for pretrained weights: give --init"),
        ({"epochs": 3, "steps": 5}, "settings: epochs: excludes steps: give one length"),
        ({"min_lr": 1e-5, "lr_end_share": 0.1}, "unknown setting 'lr_end_share'"),
        ({"teacher": "none", "teacher_size": 16}, "settings: teacher_size: there is no teacher: give --teacher"),
        ({"teacher": "none", "feature_weight": 1.0}, "feature_weight: nothing is learned from a teacher"),
        (
            {"teacher": function, "teacher_size": 16},
            "teacher_size: teacher mean declares its input in its preprocessing",
        ),
    ):
        with pytest.raises(UserError, match=complaint):
            dk.train("digits", out=tmp_path / "run", progress=SilentProgress(), **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"seed": 1}, {"view_seed": 1}, {"data_seed": 1}])
def test_each_seed_changes_the_weights(tmp_path: Path, change: dict[str, int]) -> None:
    train(tmp_path / "first", epochs=1)
    train(tmp_path / "other", epochs=1, **change)
    assert weights(tmp_path / "first") != weights(tmp_path / "other")


def test_training_never_opens_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither fitting a teacher, nor teaching a student with one found automatically."""
    opened: list[str] = []

    def guarded(location: str, config: DataConfig) -> Dataset:
        dataset = load_data(location, config)

        def open_split(name: Any) -> Split:
            opened.append(name)
            assert name != "test", "the test split was opened"
            return dataset.open_split(name)

        return replace(dataset, open_split=open_split)

    monkeypatch.setattr(setup, "load_data", guarded)
    monkeypatch.setattr(fitting, "AUTOMATIC_SMALL_VIEWS", {16: 6000, 64: 6000})
    train(tmp_path / "run", teacher="auto", epochs=1)
    assert set(opened) == {"train", "val"}


def test_teachers_weights_and_buffers_stay_whoever_calls_train(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deitkit.distill.teacher import Teacher

    known = load_teacher(str(teacher), tuple("0123456789"), chunk_size=64, device="cpu").state_hash()
    made: list[Teacher] = []

    def meddled(*arguments: Any, **options: Any) -> Teacher:
        made.append(load_teacher(*arguments, **options))
        return made[0]

    computed = Teacher._computed

    def computed_after_train(self: Teacher, *arguments: Any) -> Any:
        self._network.train()
        self._folded.train()
        return computed(self, *arguments)

    monkeypatch.setattr(Teacher, "_computed", computed_after_train)

    monkeypatch.setattr(teaching, "load_teacher", meddled)
    train(tmp_path / "run", teacher=str(teacher), epochs=1)
    assert made[0].state_hash() == known


def test_automatic_teacher_is_kept_for_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "AUTOMATIC_SMALL_VIEWS", {16: 6000, 64: 6000})
    monkeypatch.setattr("deitkit.data.caching.cache_folder", lambda: tmp_path / "cache")
    said: list[str] = []
    monkeypatch.setattr(SilentProgress, "say", lambda _, line: said.append(line))
    train(tmp_path / "first", teacher="auto", epochs=1)
    assert any(
        line.startswith("teacher: fitting cifar-resnet8 for 20 epochs of 300 training images, into") for line in said
    )
    (fitted,) = (tmp_path / "cache" / "teachers").iterdir()
    before = (fitted / "summary.json").stat().st_mtime_ns
    summary = train(tmp_path / "second", teacher="auto", epochs=1)
    assert (fitted / "summary.json").stat().st_mtime_ns == before
    assert (
        summary["teacher"]["name"]
        == load_yaml(tmp_path / "second" / "config.yaml")["teacher"]["teacher"]
        == str(fitted)
    )


def test_a_moved_teacher_leaves_the_student_s_evaluation(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One named by a relative path is found from another working folder as long as it is where it was."""
    shutil.copytree(teacher, tmp_path / "cnn")
    warnings: list[str] = []
    with monkeypatch.context() as there:
        there.chdir(tmp_path)
        train(tmp_path / "run", teacher="cnn", epochs=1)
    assert evaluate_run(tmp_path / "run", warn=warnings.append)["teacher"] is not None
    assert not warnings
    shutil.rmtree(tmp_path / "cnn")
    result = evaluate_run(tmp_path / "run", warn=warnings.append)
    assert result["top1"]["fused"] is not None
    assert result["teacher"] is result["agreement"] is None
    assert warnings[0].startswith("evaluated without the teacher: ")


def test_the_learning_rate_of_a_run_is_the_one_asked_for(tmp_path: Path) -> None:
    """Three epochs of five steps, one and a half of them (8 steps) warm-up: logged after each epoch."""
    train(tmp_path / "run", **BY_EPOCHS)
    peak = 4e-3 * 64 / 256
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    rates = [line["lr"] for line in lines if line["event"] == "epoch"]
    down = 1e-5 + 0.5 * (peak - 1e-5) * (1 + math.cos(math.pi * 1 / 6))
    assert rates == pytest.approx([1e-6 + (peak - 1e-6) * 4 / 8, down, 1e-5])


@pytest.mark.parametrize("length", [{"steps": 5}, {"budget_minutes": 0.001}])
def test_a_warm_up_longer_than_the_run_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: dict[str, Any]
) -> None:
    monkeypatch.setattr("deitkit.training.job.measure_speed", lambda *_: (1.0, 0.0))
    with pytest.raises(UserError, match=r"--warmup 1ep: its 5 steps are all of the training, \d"):
        train(tmp_path / "run", **length, warmup="1ep")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_few_training_images_are_shown_more_often_than_the_validation_images(tmp_path: Path) -> None:
    """50 to train on and 145 to validate on: evaluated after six epochs and at the end; nothing else changes by it, and a
    checkpoint from before the first evaluation can be gone on from."""
    settings: dict[str, Any] = {"train_images": 50, "epochs": 8}
    train(tmp_path / "whole", **settings)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] + 1 for line in lines if line["event"] == "epoch" and "top1" in line] == [6, 8]
    with killed_after_epoch(1):
        train(tmp_path / "broken", **settings)
    train(tmp_path / "broken", resume=True, **settings)
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")


def test_a_batch_larger_than_the_images_is_as_many_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(SilentProgress, "say", lambda _, line: said.append(line))
    settings = {"train_images": 40, "epochs": 2}
    train(tmp_path / "few", batch_size=128, **settings)
    note = "--batch-size 128: there are 40 training images, so a batch is 40; the learning rate is scaled to that"
    assert said.count(note) == 1
    train(tmp_path / "as many", batch_size=40, **settings)
    assert weights(tmp_path / "few") == weights(tmp_path / "as many")
    assert RunFolder(tmp_path / "few").config(RunConfig).loop.batch_size == 40
    train(tmp_path / "few", batch_size=128, resume=True, **settings)
    fitted = {"model": "cifar-resnet8", "from_scratch": True, "epochs": 1, "train_images": 40, "batch_size": 128}
    fit = build(FitConfig, fitted)
    fitting.run_fit("digits", fit, tmp_path / "cnn", resume=False, progress=SilentProgress())
    assert said.count(note) == 3
    with pytest.raises(
        UserError, match=r"batches of 40: min_lr: 0\.001 is above the peak, 0\.000625 for batches of 40"
    ):
        train(tmp_path / "run", batch_size=128, min_lr=1e-3, **settings)


def test_stochastic_depth_rises_with_the_layers_or_is_the_same_in_all() -> None:
    deit, deit3 = (STUDENTS[name].model_copy(update={"depth": 3}) for name in ("deit_base", "deit3_base"))
    assert setup.drop_rates(0.3, deit) == pytest.approx((0, 0, 0.15, 0.15, 0.3, 0.3))
    assert setup.drop_rates(0.3, deit3) == (0.3,) * 6


@pytest.mark.parametrize(("settings", "share"), [({}, 1.0), ({"crop_pct": 0.75}, 0.75)])
def test_a_network_keeps_how_its_test_images_are_cropped(tmp_path: Path, settings: Any, share: float) -> None:
    train(tmp_path / "run", epochs=1, **settings)
    assert load_model(tmp_path / "run" / "model")[1].preprocessing.crop_pct == share


def test_the_last_look_at_the_validation_images_also_calibrates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    compute = Trainer.validation_logits

    def counted(self: Trainer, network: Any) -> Any:
        asked.append(self.run.path.name)
        return compute(self, network)

    monkeypatch.setattr(Trainer, "validation_logits", counted)
    train(tmp_path / "run")  # 3 epochs
    assert asked == ["run"] * 3


def test_processes_that_nobody_started_are_refused(tmp_path: Path) -> None:
    for function in (dk.train, dk.fit_teacher):
        with pytest.raises(UserError, match="processes: a call from Python trains in this process"):
            function("digits", out=tmp_path / "run", processes=2)


def test_a_python_function_teaches(tmp_path: Path, teacher: Path) -> None:
    network = load_model(teacher / "model")[0]
    function = dk.teacher_from_callable(network.body, name="mine", num_classes=10, preprocessing=network.preprocessing)
    settings = {**QUICK, "augment": "deit", "distillation": "zscore", "progress": SilentProgress()}
    summary = dk.train("digits", out=tmp_path / "function", teacher=function, **settings).summary
    assert summary["teacher"]["name"] == "mine"
    dk.train("digits", out=tmp_path / "run", teacher=teacher, **settings)
    assert weights(tmp_path / "function") == weights(tmp_path / "run")
    two = dk.teacher_from_callable(network.body, name="two", num_classes=2, preprocessing=network.preprocessing)
    with pytest.raises(UserError, match="teacher two knows 2 classes, the data have 10"):
        dk.train("digits", out=tmp_path / "two", teacher=two, **settings)
    turned = dk.teacher_from_callable(
        network.body, name="turned", num_classes=10, preprocessing=network.preprocessing, classes=tuple("9876543210")
    )
    with pytest.raises(UserError, match="knows the data's classes in another order"):
        dk.train("digits", out=tmp_path / "turned", teacher=turned, **settings)


@pytest.fixture(scope="module")
def two_steps(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a student after two steps."""
    out = tmp_path_factory.mktemp("two-steps") / "run"
    train(out, steps=2, teacher=str(teacher))
    return weights(out)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.1},
        {"precision": "bfloat16"},
        {"deterministic": True},
        {"ema_decay": 0.0},
        {"optimizer": "muon", "max_grad_norm": 0.1},
    ],
)
def test_every_way_to_compute_runs(tmp_path: Path, teacher: Path, two_steps: bytes, settings: dict[str, Any]) -> None:
    try:
        summary = train(tmp_path / "other", steps=2, teacher=str(teacher), **settings)
    finally:
        torch.use_deterministic_algorithms(False)
    assert summary["steps"] == 2
    same = two_steps == weights(tmp_path / "other")
    assert same == ("deterministic" in settings)  # on a CPU it is so anyway


def test_evaluation_asks_the_teacher_about_the_same_images(tmp_path: Path, teacher: Path) -> None:
    summary = train(tmp_path / "run", teacher=str(teacher))
    own = evaluate_run(tmp_path / "run", workers=0)
    assert (own["top1"], own["agreement"]) == (summary["top1"], summary["agreement"])
    assert own["agreement"]["fused"] > 0
    assert own["nll"] == pytest.approx(summary["nll"], rel=1e-5)
    result = evaluate_run(tmp_path / "run", split="test", workers=0)
    assert result["n"] == 359
    assert result["teacher"]["top1"] > 0.9
    assert json.loads((tmp_path / "run" / "evaluation-test.json").read_text()) == result


def test_diverging_run_ends_with_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"diverged in epoch 1: try a smaller --lr, or --max-grad-norm 1$"):
        train(tmp_path / "run", base_lr=1e15, ema_decay=0.0)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda loss_B: loss_B + float("nan"), r"^the loss function mine returned NaN or infinity for finite logits in epoch 1$"),
        (lambda loss_B: (loss_B - loss_B.detach()).sqrt(), r"diverged in epoch 1: .*, or look at the gradient of the loss function mine$"),
    ],
)  # fmt: skip
def test_a_loss_function_of_the_user_that_gives_nan_is_named(
    tmp_path: Path, teacher: Path, spoil: Any, complaint: str
) -> None:
    def mine(student_BK: torch.Tensor, teacher_BK: torch.Tensor, _batch: Any) -> torch.Tensor:
        loss_B: torch.Tensor = spoil(((student_BK - teacher_BK) ** 2).mean(-1))
        return loss_B

    with (
        pytest.warns(UserWarning, match="loss or gradient is infinite or NaN"),
        pytest.raises(UserError, match=complaint),
    ):
        dk.train("digits", out=tmp_path / "run", teacher=teacher, distillation=mine, **QUICK)


@pytest.mark.parametrize("function", [dk.train, dk.fit_teacher, dk.compare])
def test_a_call_without_data_or_with_an_out_that_is_no_folder_says_so(tmp_path: Path, function: Any) -> None:
    for data in ("", " "):
        with pytest.raises(UserError, match=r"^no data set given"):
            function(data, out=tmp_path / "run", **({"teacher": "x"} if function is dk.compare else {}))
    for out in (3, ""):
        with pytest.raises(UserError, match=rf"^out: expected the path of a folder \(got {out!r}\)$"):
            function("digits", out=out)


def test_image_that_fails_during_training_is_named_and_counts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deitkit.data import UnreadableImage

    class Failing(Split):
        def __init__(self, whole: Split) -> None:
            self.whole, self.labels_N, self.channels = whole, whole.labels_N, whole.channels
            self.rows_N = whole.rows_N

        def read(self, position: int) -> Any:
            if position == 17:
                raise UnreadableImage("gone")
            return self.whole.read(position)

        def name(self, position: int) -> str:
            return f"digit-{position}"

        def content_hash(self) -> str:
            return self.whole.content_hash()

    def failing(location: str, config: DataConfig) -> Dataset:
        dataset = load_data(location, config)
        return replace(dataset, open_split=lambda name: Failing(dataset.open_split(name)))

    warnings: list[str] = []
    monkeypatch.setattr(SilentProgress, "warn", lambda _self, line: warnings.append(line))
    monkeypatch.setattr(setup, "load_data", failing)
    train(tmp_path / "run", epochs=1, workers=0)
    assert any("digit-17" in line for line in warnings)


def test_a_budget_is_that_of_the_slowest_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deitkit.training.job.measure_speed", lambda *_: (1.0, 0.0))
    monkeypatch.setattr("deitkit.training.loop.gather_object", lambda steps: [*steps, *(one / 2 for one in steps)])
    assert train(tmp_path / "run", budget_minutes=0.2)["steps"] == 5  # 0.97 · 12 s, half as many


def test_evaluation_that_cannot_be_kept_is_still_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "run", epochs=1)

    def refuse(path: Path, _text: str) -> None:
        raise UserError(f"{path}: cannot be written: Read-only file system")

    monkeypatch.setattr(evaluate, "write_atomically", refuse)
    warnings: list[str] = []
    assert evaluate_run(tmp_path / "run", warn=warnings.append)["n"] == 145
    assert "Read-only file system" in warnings[0]


def test_a_run_s_subset_is_not_taken_of_other_data(tmp_path: Path) -> None:
    train(tmp_path / "run", epochs=1)
    own = evaluate_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("data: {location: digits, train_images: 7}\nteacher: null\n")
    assert evaluate_run(tmp_path / "run", "digits")["n"] == own["n"]
    with pytest.raises(UserError, match="train_images is 7"):
        evaluate_run(tmp_path / "run")


def test_a_folder_in_the_wrong_place_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    out, silent = tmp_path / "photos" / "run", SilentProgress()
    with pytest.raises(UserError, match="run: lies among the images"):
        dk.train(tmp_path / "photos", out=out, progress=silent)
    with pytest.raises(UserError, match="run: lies among the images"):
        dk.fit_teacher(tmp_path / "photos", out=out, progress=silent)
    with pytest.raises(UserError, match="run: lies among the images"):
        dk.compare(tmp_path / "photos", out=out, teacher="auto", progress=silent)
    with pytest.raises(UserError, match="run: lies among the images"):
        jobs.run_record(str(tmp_path / "photos"), RunConfig(), out, views=1, outputs="all", progress=silent)
    assert not out.exists()
    run = tmp_path / "run"
    for tape in (run, run / "tape"):
        with pytest.raises(UserError, match=rf"--record {tape}: lies in the folder of the run"):
            train(run, teacher="lite0", record=str(tape))
    assert not run.exists()
