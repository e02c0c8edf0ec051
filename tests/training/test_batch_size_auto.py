"""`--batch-size auto`: what the recipe has, halved until a step fits into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import deitkit as dk
from deitkit.cli import main
from deitkit.terminal import load_yaml
from deitkit.training import memory


def test_a_batch_is_halved_until_a_step_fits_and_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = [2_000]
    monkeypatch.setattr(memory, "memory_needed", lambda _network, config, *_: 100 * config.loop.batch_size)
    monkeypatch.setattr(memory, "free_memory", lambda _device: free[0])
    run = ["--train-images", "100", "--student", "deit_pico", "--teacher", "none", "--out", str(tmp_path / "run")]
    assert main(["train", "digits", "--steps", "2", "--batch-size", "auto", *run]) == 0
    assert "batch size: 16, for 64 would take too much memory" in capsys.readouterr().err
    loop = load_yaml(tmp_path / "run" / "config.yaml")["loop"]
    assert (loop["batch_size"], loop["shrink_batch"]) == (16, True)
    free[0] = 10**9  # a run that is resumed keeps its own
    assert main(["train", "--steps", "3", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert load_yaml(tmp_path / "run" / "config.yaml")["loop"]["batch_size"] == 16
    assert "batch size:" not in capsys.readouterr().err
    given: dict[str, Any] = {"batch_size": "auto", "steps": 1, "train_images": 100, "distillation": "none"}
    dk.train("digits", out=tmp_path / "all", **given)
    assert load_yaml(tmp_path / "all" / "config.yaml")["loop"]["batch_size"] == 64
    free[0] = 200  # one image fits
    dk.train("digits", out=tmp_path / "one", **given)
    assert load_yaml(tmp_path / "one" / "config.yaml")["loop"]["batch_size"] == 1


def test_a_comparison_does_not_choose_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "compare",
                "digits",
                "--losses",
                "hard",
                "--teacher",
                "x",
                "--batch-size",
                "auto",
                "--out",
                str(tmp_path / "c"),
            ]
        )
        == 2
    )
    assert "batch_size: auto is for single trainings" in capsys.readouterr().err
    assert main(["train", "digits", "--batch-size", "x", "--out", str(tmp_path / "c")]) == 2
    assert "--batch-size: input should be a valid integer" in capsys.readouterr().err
