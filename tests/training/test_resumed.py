"""Runs that are killed, gone on with, or begun twice."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tests.fakes import holding, killed_after_epoch
from tests.training.test_jobs import train, weights

from deitkit.config import FitConfig, RunConfig
from deitkit.settings import build
from deitkit.terminal import SilentProgress, UserError, load_yaml
from deitkit.training import fit as fitting
from deitkit.training import job
from deitkit.training.evaluate import evaluate_run
from deitkit.training.jobs import run_training
from deitkit.training.loop import Trainer


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", epochs=1)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"view\.mixup_alpha = 0\.8, now it is 0\.1"):
        train(tmp_path / "run", epochs=1, mixup_alpha=0.1, resume=True)


def test_resuming_nothing_fits_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run to resume here: config\.yaml is missing"):
        train(tmp_path / "run", teacher="auto", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_resumed_with_its_own_settings_only(tmp_path: Path) -> None:
    first = train(tmp_path / "run", epochs=1)
    assert train(tmp_path / "run", epochs=1, resume=True) == first
    with pytest.raises(
        UserError,
        match="is planned with 5 steps, this would be 4 steps: --resume can make a training longer, not shorter",
    ):
        train(tmp_path / "run", steps=4, resume=True)
    with pytest.raises(UserError, match=r"was started with view\.mixup_alpha = 0\.8, now it is 0\.1"):
        train(tmp_path / "run", epochs=2, mixup_alpha=0.1, resume=True)  # longer, but otherwise as it was
    fit = build(FitConfig, {"model": "cifar-resnet8", "from_scratch": True, "epochs": 1})
    with pytest.raises(UserError, match="is of another kind of run"):
        fitting.run_fit("digits", fit, tmp_path / "run", resume=True, progress=SilentProgress())


def test_only_one_process_works_on_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def let_another_try(self: Trainer, *, resume: bool = False) -> None:
        with pytest.raises(AssertionError, match="BlockingIOError"), holding(self.run.path):
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", let_another_try)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    with (
        holding(tmp_path / "run"),  # the first one has let go
        pytest.raises(UserError, match="run: another process is working on this run"),
    ):
        run_training(
            "nowhere", RunConfig(), tmp_path / "run", resume=True, progress=SilentProgress()
        )  # before data are looked for


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", "{}"),
        ("state.json", "[]"),
        ("state.json", '{"step": "five", "seconds": 1, "scores": {}, "scaler": null}'),
        ("state.safetensors", None),
    ],
)
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, name: str, content: str | None) -> None:
    with killed_after_epoch(1):
        train(tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    if content is None:
        tensors = load_file(checkpoint / name)
        save_file(
            {key: value for key, value in tensors.items() if not key.startswith("optimizer.3")}, checkpoint / name
        )
    else:
        (checkpoint / name).write_text(content)
    with pytest.raises(UserError, match=r"step-\d+: damaged .*remove it to start this run from the beginning"):
        train(tmp_path / "run", resume=True)


def test_a_checkpoint_of_another_optimizer_is_one_line(tmp_path: Path) -> None:
    with killed_after_epoch(1):
        train(tmp_path / "run", optimizer="muon")
    with pytest.raises(UserError, match=r"was started with optim\.optimizer = 'muon', now it is 'adamw'"):
        train(tmp_path / "run", optimizer="adamw", resume=True)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    tensors = load_file(checkpoint / "state.safetensors")
    (first, *_) = (key for key in tensors if key.endswith("momentum_buffer"))
    save_file({**tensors, first: tensors[first].transpose(0, 1).contiguous()[:1]}, checkpoint / "state.safetensors")
    with pytest.raises(UserError, match=r"step-\d+: damaged .*remove it"):
        train(tmp_path / "run", optimizer="muon", resume=True)


def test_a_run_that_two_begin_at_once_is_the_first_one_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = job.settle_steps

    def meanwhile(*given: Any, **named: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(job, "settle_steps", settle)
            train(tmp_path / "run", epochs=1)
        return settle(*given, **named)

    monkeypatch.setattr(job, "settle_steps", meanwhile)
    with pytest.raises(UserError, match="already exists and is not empty"):
        train(tmp_path / "run", epochs=2)
    assert load_yaml(tmp_path / "run" / "config.yaml")["loop"]["length"] == "5st"


def test_time_of_a_process_before_a_kill_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Trainer._save

    def an_hour_later(self: Trainer, state: Any) -> None:
        self.seconds += 3600
        save(self, state)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save", an_hour_later)
        with killed_after_epoch(1):
            train(tmp_path / "run")
    summary = train(tmp_path / "run", resume=True)
    assert summary["seconds_with_preparation"] >= summary["seconds"] >= 3600


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []

    def save_once(tensors: Any, path: Path, _: Any = None) -> None:
        saved.append(path)
        if len(saved) > 1:
            raise SafetensorError("No space left on device (os error 28)")
        save_file(tensors, path)

    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", save_once)
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            train(tmp_path / "run")
    train(tmp_path / "run", resume=True)
    train(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_checkpoint_of_version_0_1_is_resumed(tmp_path: Path) -> None:
    """It called the EMA `average`."""
    train(tmp_path / "whole")
    with killed_after_epoch(1):
        train(tmp_path / "run")
    (file,) = (tmp_path / "run" / "checkpoints").glob("step-*/state.safetensors")
    tensors = load_file(file)
    assert any(name.startswith("ema.") for name in tensors)
    save_file(
        {
            name.replace("ema.", "average.", 1) if name.startswith("ema.") else name: tensor
            for name, tensor in tensors.items()
        },
        file,
    )
    (file.parent / "SHA256SUMS").unlink()
    train(tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_run_leaves_its_caller_s_global_state_alone(tmp_path: Path) -> None:
    """And is not affected by it; what is on for deterministic runs is off after them."""
    drawn = []
    for number in range(2):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        if number:
            train(tmp_path / "run", epochs=1, deterministic=True)
            assert not torch.are_deterministic_algorithms_enabled()
        drawn.append((torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()))
    assert drawn[0] == drawn[1]
    torch.use_deterministic_algorithms(True)
    try:
        train(tmp_path / "other", epochs=1)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert weights(tmp_path / "run") == weights(tmp_path / "other")


def test_a_run_without_a_teacher_says_that_its_labels_have_weight_1(tmp_path: Path) -> None:
    train(tmp_path / "run", epochs=1)
    assert load_yaml(tmp_path / "run" / "config.yaml")["loss"]["label_weight"] == 1.0


def test_a_run_with_a_loss_that_is_gone_is_evaluated_all_the_same(tmp_path: Path) -> None:
    """A length below half a step is one step; evaluation does not ask what the loss was."""
    summary = train(tmp_path / "run", epochs=0.001)
    assert summary["images_seen"] > 0
    config = tmp_path / "run" / "config.yaml"
    old = config.read_text(encoding="utf-8").replace("distillation: none", "distillation: dkd")
    config.write_text(old, encoding="utf-8")
    assert "dkd" in old
    assert evaluate_run(tmp_path / "run", workers=0)["top1"] == pytest.approx(summary["top1"])
