"""Checkpoints within an epoch, signals, damaged files, early stopping, the best weights, a longer training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tests.training.test_fit import fit
from tests.training.test_jobs import train, weights

import deitkit as dk
from deitkit import cli
from deitkit.config import FitConfig
from deitkit.models.zoo import load_model
from deitkit.settings import build, lower_settings
from deitkit.terminal import UserError, load_yaml
from deitkit.training import checkpoint, jobs, loop
from deitkit.training.evaluate import evaluate_run
from deitkit.training.loop import Trainer
from deitkit.training.processes import make_accelerator, start_tracking
from deitkit.training.run import CHECKSUMS, RunFolder


def metrics(run: Path) -> list[dict[str, Any]]:
    """All lines without what the clock says."""
    return [{name: value for name, value in event.items() if name != "clock"} for event in RunFolder(run).events()]


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is due after every step."""
    monkeypatch.setattr(checkpoint, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "COST_SHARE", float("inf"))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def killed_in(method: str) -> Iterator[None]:
    """A training within this block ends with KeyboardInterrupt where it would call this method of the trainer."""
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patched.setattr(Trainer, method, interrupt)
        yield


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """A training within this block ends with KeyboardInterrupt as soon as its state after `step` is saved."""
    save = Trainer._save

    def save_then_die(self: Trainer, state: Any, log: Any = None) -> None:
        save(self, state, log)
        if state.step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patched.setattr(Trainer, "_save", save_then_die)
        yield


SETTINGS: dict[str, Any] = {"epochs": 2, "workers": 1, "mixup_alpha": 0.8, "repeated_aug": 2}


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("step", [2, 7])
def test_a_run_killed_within_an_epoch_ends_with_the_same_bits(tmp_path: Path, step: int) -> None:
    """Weights, metrics, and the best score."""
    train(tmp_path / "whole", patience=5, **SETTINGS)
    with killed_at(step):
        train(tmp_path / "run", patience=5, **SETTINGS)
    assert not RunFolder(tmp_path / "run").finished
    train(tmp_path / "run", patience=5, resume=True, **SETTINGS)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    (last,), (same,) = (
        [event for event in metrics(tmp_path / run) if event["event"] == "end"] for run in ("run", "whole")
    )
    assert last == same


@pytest.mark.usefixtures("every_step")
def test_two_checkpoints_are_kept_and_a_damaged_one_gives_way_to_the_one_before(tmp_path: Path) -> None:
    train(tmp_path / "whole", **SETTINGS)
    with killed_at(4):
        train(tmp_path / "run", **SETTINGS)
    before, newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert (before.name, newest.name) == ("step-000000003", "step-000000004")
    subprocess.run(["sha256sum", "--check", "--quiet", CHECKSUMS], cwd=newest, check=True)
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[-1] ^= 1  # a weight that is another one: only the checksum knows
    (newest / "state.safetensors").write_bytes(content)
    said: list[str] = []
    found = RunFolder(tmp_path / "run").latest_checkpoint(said.append)
    assert found is not None
    assert found[1]["step"] == 3
    assert (
        "step-000000004: damaged (state.safetensors: wrong checksum): the checkpoint before it, step-000000003, is used"
        in said[0]
    )
    train(tmp_path / "run", resume=True, **SETTINGS)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("damage", [{"sums": [1.0]}, {"steps": "x"}])
def test_a_damaged_log_of_an_epoch_is_one_line(tmp_path: Path, damage: dict[str, Any]) -> None:
    with killed_at(2):
        train(tmp_path / "run", **SETTINGS)
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**state, "epoch_log": damage}))
        (folder / CHECKSUMS).unlink()
    with pytest.raises(UserError, match=r"step-\d+: damaged"):
        train(tmp_path / "run", resume=True, **SETTINGS)


def test_checkpoints_within_an_epoch_take_two_percent_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])

    class OneProcess:
        num_processes = 1

    clock = checkpoint.CheckpointClock(OneProcess())  # type: ignore[arg-type]
    due = lambda seconds: (now.__setitem__(0, now[0] + seconds), clock.due(1, asked=False))[1]  # noqa: E731
    assert (due(100), due(21)) == (False, True)
    clock.saved(10.0)
    assert (due(121), due(378), due(2)) == (False, False, True)  # 10 s are 2 % of 500
    assert clock.due(1, asked=True)


COMMAND = "train digits --teacher none --train-images 300 --epochs 400 --batch-size 32 --student deit_pico --workers 2 --precision float32"


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_saves_the_state_and_says_how_to_continue(tmp_path: Path, number: int, code: int, word: str) -> None:
    """Sent to the whole process group, workers too, as SLURM, `kill -- -PGID` and a terminal do."""
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a shell's background jobs ignore it
    process = subprocess.Popen(
        [sys.executable, "-m", "deitkit.cli", *COMMAND.split(), "--out", str(out)],
        env=environment, preexec_fn=heeds, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "worker" not in errors
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, 0)
    assert errors.rstrip().endswith(f"deit: {word}: to continue: deit train --resume --out {out}")
    assert "stopping after this step, with the state saved" in errors
    saved = RunFolder(out).latest_checkpoint()
    assert saved is not None
    assert saved[1]["step"] > max(event["step"] for event in RunFolder(out).events() if event["event"] == "epoch") - 10


def test_a_second_signal_takes_effect_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with checkpoint.StopRequest(lambda: said.append("first")) as stop:
        for _ in range(2):  # as programs forward what the whole group has got
            signal.raise_signal(signal.SIGTERM)
        assert (stop.number, said) == (signal.SIGTERM, ["first"])
        monkeypatch.setattr(checkpoint, "SAME_SIGNAL_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt) as found:
            signal.raise_signal(signal.SIGINT)
    assert (type(found.value), said) == (KeyboardInterrupt, ["first"])


def test_resume_takes_its_settings_from_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And its data."""
    out = str(tmp_path / "run")
    settings = (
        "--teacher none --train-images 60 --epochs 1 --batch-size 32 --student deit_pico --lr 0.001 --optimizer adamw"
    )
    assert cli.main(["train", "digits", *settings.split(), "--workers", "0", "--out", out]) == 0
    (tmp_path / "run" / "summary.json").unlink()
    assert cli.main(["train", "--out", out, "--resume"]) == 0
    assert load_yaml(tmp_path / "run" / "config.yaml")["optim"]["base_lr"] == 0.001
    (tmp_path / "run" / "summary.json").unlink()
    assert dk.train("digits", out=out, resume=True).summary["n"] > 0
    capsys.readouterr()
    assert cli.main(["train", "--out", out, "--resume", "--lr", "0.002"]) == 2
    assert "was started with optim.base_lr = 0.001, now it is 0.002" in capsys.readouterr().err
    assert cli.main(["train", "--out", out]) == 2
    assert capsys.readouterr().err == "deit: error: missing: DATA (deit train --help)\n"
    mine = tmp_path / "mine.yaml"
    assert lower_settings(tmp_path / "run", True, mine) == mine
    assert lower_settings(tmp_path / "none", True, None) is None


def test_a_finished_run_is_trained_longer(tmp_path: Path) -> None:
    """From its last state, on the schedule of the longer training; a kill in between changes nothing."""
    train(tmp_path / "run", epochs=1, workers=0)
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    short = RunFolder(tmp_path / "run").summary()
    summary = train(tmp_path / "run", epochs=2, workers=0, resume=True)
    assert (short["steps"], summary["steps"]) == (5, 10)
    assert json.loads((tmp_path / "run" / "summary-5-steps.json").read_text()) == short
    rates = [event["lr"] for event in metrics(tmp_path / "run") if event["event"] == "epoch"]
    train(tmp_path / "whole", epochs=2, workers=0)
    assert rates[1] == [event["lr"] for event in metrics(tmp_path / "whole") if event["event"] == "epoch"][1]
    assert load_yaml(tmp_path / "run" / "config.yaml")["loop"]["length"] == "10st"
    with killed_in("_epoch"):
        train(tmp_path / "killed", epochs=2, workers=0, resume=True)
    train(tmp_path / "killed", epochs=2, workers=0, resume=True)
    assert weights(tmp_path / "killed") == weights(tmp_path / "run")


def with_scores(monkeypatch: pytest.MonkeyPatch, shares: list[float]) -> None:
    """Evaluations find these accuracies, in turn."""
    score, found = loop.score, iter(shares)

    def scored(*given: Any, **named: Any) -> dict[str, Any]:
        figures = score(*given, **named)
        share = next(found, None)
        return figures if share is None else {**figures, "top1": {**figures["top1"], "cls": share}}

    monkeypatch.setattr(loop, "score", scored)


def test_early_stopping_keeps_the_best_weights_and_the_last_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        with_scores(patched, [0.3, 0.5, 0.4, 0.5, 0.9])
        summary = train(tmp_path / "run", epochs=5, patience=2, workers=0, calibrate=False)
    epochs = [event for event in metrics(tmp_path / "run") if event["event"] == "epoch"]
    assert (len(epochs), summary["steps"]) == (4, 10)  # two evaluations were no better than the second
    best, last = (RunFolder(tmp_path / "run").best_checkpoint(), RunFolder(tmp_path / "run").latest_checkpoint())
    assert last is not None
    assert (best[1]["step"], last[1]["step"]) == (10, 20)
    kept = load_model(tmp_path / "run" / "model")[0].state_dict()
    assert all(torch.equal(best[0][f"ema.{name}"], tensor) for name, tensor in kept.items())
    assert any(
        not torch.equal(best[0][f"network.{name}"], tensor) for name, tensor in kept.items()
    )  # the raw ones are there
    assert evaluate_run(tmp_path / "run", workers=0)["nll"] == pytest.approx(summary["nll"])


def test_patience_begins_anew_where_a_run_that_stopped_early_is_trained_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_scores(monkeypatch, [0.5, 0.4, 0.9])
    assert train(tmp_path / "run", epochs=3, patience=1, workers=0, calibrate=False)["steps"] == 5
    assert train(tmp_path / "run", epochs=4, patience=1, workers=0, calibrate=False, resume=True)["steps"] == 15
    assert (tmp_path / "run" / "summary-15-steps.json").is_file()  # of the shorter plan


def test_a_run_killed_after_its_early_stop_stops_there_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_scores(monkeypatch, [0.5, 0.4, 0.4])
    with killed_in("_load_best"):
        train(tmp_path / "run", epochs=5, patience=2, workers=0)
    assert train(tmp_path / "run", epochs=5, patience=2, workers=0, resume=True)["steps"] == 5


def test_a_damaged_best_checkpoint_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_best = Trainer._load_best

    def damaged(self: Trainer, state: Any) -> None:
        (self.run.best / "state.json").write_text("{}")
        load_best(self, state)

    monkeypatch.setattr(Trainer, "_load_best", damaged)
    with pytest.raises(UserError, match="best: missing or damaged: give --resume with --keep last"):
        train(tmp_path / "run", epochs=1, keep="best", workers=0)
    monkeypatch.undo()
    assert train(tmp_path / "run", epochs=1, keep="last", workers=0, resume=True)["steps"] == 5


def test_a_best_checkpoint_that_a_kill_left_without_its_name_is_found(tmp_path: Path) -> None:
    with killed_in("_load_best"):
        train(tmp_path / "run", epochs=1, keep="best", workers=0)
    best = RunFolder(tmp_path / "run").best
    best.rename(best.with_name(".best.tmp"))
    assert train(tmp_path / "run", epochs=1, keep="best", workers=0, resume=True)["steps"] == 5


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_step_with_a_nan_gradient_is_skipped_logged_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_grad_norm: float | None
) -> None:
    step = loop.train_step

    def sometimes_nan(state: Any, raw: Any, *given: Any) -> Any:
        if state.step == 2:
            handle = next(state.network.parameters()).register_hook(lambda gradient: gradient * float("nan"))
            try:
                return step(state, raw, *given)
            finally:
                handle.remove()
        return step(state, raw, *given)

    monkeypatch.setattr(loop, "train_step", sometimes_nan)
    summary = train(tmp_path / "run", epochs=1, workers=0, max_grad_norm=max_grad_norm)
    events = metrics(tmp_path / "run")
    (skipped,) = [event for event in events if event["event"] == "skipped"]
    assert skipped["step"] == 3
    assert len(skipped["images"]) == 60
    (epoch,) = [event for event in events if event["event"] == "epoch"]
    assert epoch["skipped_steps"] == 1
    assert summary["images_seen"] == 300
    assert all(
        bool(tensor.isfinite().all()) for tensor in load_model(tmp_path / "run" / "model")[0].state_dict().values()
    )


def test_after_many_skipped_steps_in_a_row_the_state_is_saved_and_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MOST_SKIPPED", 3)
    step = loop.train_step

    def nan_from_the_second_on(state: Any, raw: Any, teacher: Any, plan: Any, accelerator: Any) -> Any:
        if state.step:
            with torch.no_grad():
                next(state.network.parameters()).fill_(float("nan"))
        return step(state, raw, teacher, plan, accelerator)

    monkeypatch.setattr(loop, "train_step", nan_from_the_second_on)
    with pytest.raises(UserError, match="the training diverged in epoch 1: try a smaller --lr"):
        train(tmp_path / "run", epochs=1, workers=0)
    saved = RunFolder(tmp_path / "run").latest_checkpoint()
    assert saved is not None
    assert saved[1]["step"] == 4


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Trainings in float16 with torch's gradient scaler, which Accelerate has on GPUs alone: here on a CPU. Called with the scale that they
    begin with."""

    def begin_with(scale: float) -> None:
        def make(*given: Any, **settings: Any) -> Any:
            accelerator = make_accelerator(*given, **settings)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            monkeypatch.setattr(accelerator, "native_amp", True)
            monkeypatch.setattr(AcceleratorState(), "_mixed_precision", "fp16")
            return accelerator

        monkeypatch.setattr(jobs, "make_accelerator", make)

    yield begin_with
    AcceleratorState._reset_state()


def test_steps_in_which_a_loss_scale_is_found_are_logged_and_move_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaled: Callable[[float], None]
) -> None:
    """Neither weights nor EMA. They are not taken for a divergence, and the loss of such a step counts: it is finite."""
    monkeypatch.setattr(loop, "MOST_SKIPPED", 1)
    step, moved = loop.train_step, []

    def watched(state: Any, raw: Any, teacher: Any, plan: Any, accelerator: Any) -> Any:
        if state.step == 2:
            accelerator.scaler.update(2.0**20)
        before = [tensor.clone() for tensor in (*state.network.parameters(), *state.ema.parameters())]
        result = step(state, raw, teacher, plan, accelerator)
        after = [*state.network.parameters(), *state.ema.parameters()]
        moved.append((result.finite, not all(map(torch.equal, before, after))))
        return result

    monkeypatch.setattr(loop, "train_step", watched)
    scaled(2.0**8)
    train(tmp_path / "run", epochs=2, workers=0, max_grad_norm=1.0)
    events = metrics(tmp_path / "run")
    skipped = [event["step"] for event in events if event["event"] == "skipped"]
    assert skipped[0] == 3
    assert moved == [(number not in skipped,) * 2 for number in range(1, 11)]
    epochs = [event for event in events if event["event"] == "epoch"]
    assert sum(epoch.get("skipped_steps", 0) for epoch in epochs) == len(skipped) < 8
    assert all(1 < epoch["loss"]["total"] < 10 for epoch in epochs)


def test_a_loss_scale_that_nothing_helps_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaled: Callable[[float], None]
) -> None:
    monkeypatch.setattr(loop, "MOST_SKIPPED", 3)
    step = loop.train_step

    def nan_gradient(state: Any, *given: Any) -> Any:
        handle = next(state.network.parameters()).register_hook(lambda gradient: gradient * float("nan"))
        try:
            return step(state, *given)
        finally:
            handle.remove()

    monkeypatch.setattr(loop, "train_step", nan_gradient)
    scaled(2.0)  # 1, then 0.5, 0.25 and 0.125, which count
    with pytest.raises(UserError, match="the training diverged in epoch 1"):
        train(tmp_path / "run", epochs=1, workers=0)
    saved = RunFolder(tmp_path / "run").latest_checkpoint()
    assert saved is not None
    assert saved[1]["step"] == 4


def test_a_tracker_that_fails_is_given_up_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr("accelerate.Accelerator.log", broken)
    assert train(tmp_path / "run", epochs=2, workers=0)["steps"] == 10


def test_metrics_go_to_a_tracker(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(tmp_path / "run", epochs=1, workers=0, track="tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*")
    found = EventAccumulator(str(file.parent))
    found.Reload()
    (event,) = [event for event in metrics(tmp_path / "run") if event["event"] == "epoch"]
    assert found.Scalars("loss.total")[0].value == pytest.approx(event["loss"]["total"])
    assert found.Scalars("top1.cls")[0].step == 5


def test_a_tracker_is_told_every_setting(tmp_path: Path) -> None:
    told: list[Any] = []
    accelerator: Any = SimpleNamespace(
        project_configuration=SimpleNamespace(), init_trackers=lambda *given: told.append(given)
    )
    start_tracking(accelerator, build(FitConfig, {"model": "cifar-resnet8", "track": "tensorboard"}), tmp_path)
    ((_, settings, _),) = told
    assert (settings["model"], settings["from_scratch"], settings["image_size"]) == ("cifar-resnet8", False, "None")
    assert settings["loop.track"] == "tensorboard"


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deitkit.training.processes.importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="--track mlflow: the package is not installed: pip install mlflow"):
        train(tmp_path / "run", epochs=1, track="mlflow")


@pytest.mark.usefixtures("every_step")
def test_a_tape_recorded_by_a_run_that_was_killed_within_an_epoch_and_trained_longer_is_that_of_one_that_was_not(
    tmp_path: Path,
) -> None:
    fit(tmp_path / "cnn", from_scratch=True, train_images=60, epochs=20)
    common: dict[str, Any] = {
        "train_images": 60,
        "batch_size": 16,
        "teacher": str(tmp_path / "cnn"),
        "workers": 0,
        "augment": "light",
    }
    tapes = {name: tmp_path / f"tape-{name}" for name in ("whole", "killed", "longer")}
    train(tmp_path / "whole", steps=7, record=str(tapes["whole"]), **common)
    with killed_at(2):
        train(tmp_path / "killed", steps=7, record=str(tapes["killed"]), **common)
    train(tmp_path / "killed", steps=7, record=str(tapes["killed"]), resume=True, **common)
    train(tmp_path / "longer", steps=6, record=str(tapes["longer"]), **common)
    train(tmp_path / "longer", steps=7, record=str(tapes["longer"]), resume=True, **common)
    for name in ("killed", "longer"):
        assert (tapes[name] / "records.bin").read_bytes() == (tapes["whole"] / "records.bin").read_bytes()
        assert (tapes[name] / "digests.bin").read_bytes() == (tapes["whole"] / "digests.bin").read_bytes()
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
