"""What a time limit is turned into steps by."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from tests.fakes import killed_after_epoch
from tests.training.test_jobs import train, weights

from deitkit.data import Split
from deitkit.models.network import Network
from deitkit.terminal import load_yaml
from deitkit.training import job, loop
from deitkit.views import loader


@pytest.mark.parametrize("compile", [False, True])
def test_steps_that_start_workers_or_compile_do_not_count_and_no_compiled_network_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compile: bool
) -> None:
    """The first step, or three, is said to take 100 s, any other 2 s, an evaluation 7 s, as long as it is not compiled."""
    now, steps = 0.0, 0
    compiled: set[int] = set()

    def step(*_: Any) -> None:
        nonlocal now, steps
        steps += 1
        now += 100.0 if steps <= (3 if compile else 1) else 2.0

    def evaluation(network: Network, *_: Any) -> None:
        nonlocal now
        now += 1000.0 if id(network) in compiled else 7.0

    measured: list[tuple[float, float]] = []

    def said(*given: Any) -> tuple[float, float]:
        with monkeypatch.context() as patched:
            patched.setattr(loop, "train_step", step)
            patched.setattr(loop, "split_logits_of_network", evaluation)
            patched.setattr(loop.time, "perf_counter", lambda: now)
            patched.setattr(Network, "compile", lambda self: compiled.add(id(self)))
            measured.append(loop.measure_speed(*given))
        return 1.0, 0.0

    monkeypatch.setattr(job, "measure_speed", said)
    monkeypatch.setattr(Network, "compile", lambda self: None)
    train(tmp_path / "run", budget_minutes=0.1, compile=compile)
    assert measured == [(2.0, 7.0)]
    assert len(compiled) == compile


def test_budget_is_frozen_into_steps_before_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is said to take a second, an evaluation, after every fifth, five: 0.97 of 30 s are 14 steps. Measuring itself
    changes nothing of the run."""
    measured: list[tuple[float, float]] = []

    def said(*given: Any) -> tuple[float, float]:
        measured.append(loop.measure_speed(*given))
        return 1.0, 5.0

    monkeypatch.setattr(job, "measure_speed", said)
    with killed_after_epoch(1):
        train(tmp_path / "run", budget_minutes=0.5)
    summary = train(tmp_path / "run", budget_minutes=0.5, resume=True)
    stored = load_yaml(tmp_path / "run" / "config.yaml")["loop"]
    assert (stored["length"], summary["steps"]) == ("14st", 14)
    assert len(measured) == 1
    assert min(measured[0]) > 0
    train(tmp_path / "same", steps=14)
    assert weights(tmp_path / "run") == weights(tmp_path / "same")


def test_a_budget_counts_the_time_that_data_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two milliseconds an image are five times what a step of this student takes."""
    crop = loader._crop

    def slow_crop(split: Split, *arguments: Any) -> Any:
        time.sleep(0.002 * len(arguments[1]))
        return crop(split, *arguments)

    monkeypatch.setattr(loader, "_crop", slow_crop)
    summary = train(tmp_path / "run", budget_minutes=0.1, workers=0)
    assert summary["steps"] * 64 * 0.002 < 6.0


def test_what_is_measured_is_prepared_as_it_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Accelerate, which exchanges gradients between processes; and nothing of that is left for the run."""
    prepare, left = Accelerator.prepare, []

    def noted(self: Accelerator, *given: Any) -> Any:
        left.append(len(self._models))
        return prepare(self, *given)

    monkeypatch.setattr(Accelerator, "prepare", noted)
    train(tmp_path / "run", budget_minutes=0.01)
    assert left == [0, 0]
