"""What a time limit is turned into steps by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.test_jobs import train

from deitkit import speed
from deitkit.network import Network


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

    def said(trainer: Any) -> tuple[float, float]:
        with monkeypatch.context() as patched:
            patched.setattr(speed, "train_step", step)
            patched.setattr(speed, "answer_split_with_network", evaluation)
            patched.setattr(speed.time, "perf_counter", lambda: now)
            patched.setattr(Network, "compile", lambda self: compiled.add(id(self)))
            measured.append(speed.measure_speed(trainer))
        return 1.0, 0.0

    monkeypatch.setattr("deitkit.jobs.measure_speed", said)
    monkeypatch.setattr(Network, "compile", lambda self: None)
    train(tmp_path / "run", budget_minutes=0.1, compile=compile)
    assert measured == [(2.0, 7.0)]
    assert len(compiled) == compile
