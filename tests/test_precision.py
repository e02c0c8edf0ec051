"""What a training computes in: this machine's best format, and on any other the one that it was begun in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.fakes import killed_after_epoch

import deitkit as dk
from deitkit.errors import UserError
from deitkit.progress import SilentProgress

QUICK: dict[str, Any] = {
    "train_images": 96, "epochs": 3, "batch_size": 48, "depth": 1, "distillation": "none", "progress": SilentProgress(),
}  # fmt: skip


def machine(monkeypatch: pytest.MonkeyPatch, *, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)


def train(out: Path, **settings: Any) -> bytes:
    dk.train("digits", out=out, **{**QUICK, **settings})
    return (out / "model" / "model.safetensors").read_bytes()


def written(out: Path) -> str:
    precision: str = yaml.safe_load((out / "config.yaml").read_text())["loop"]["precision"]
    return precision


def test_a_run_says_what_it_was_computed_in_and_goes_on_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = train(tmp_path / "exact", precision="float32")
    machine(monkeypatch, amx=True)
    whole = train(tmp_path / "whole")
    assert (written(tmp_path / "whole"), whole != exact) == ("bfloat16", True)
    with killed_after_epoch(2):
        train(tmp_path / "moved")
    machine(monkeypatch, amx=False)
    assert train(tmp_path / "moved", resume=True) == whole
    assert train(tmp_path / "plain") == exact
    assert written(tmp_path / "plain") == "float32"


def test_a_run_of_an_earlier_version_goes_on_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, amx=False)
    exact = train(tmp_path / "exact")
    with killed_after_epoch(2):
        train(tmp_path / "old")
    config = tmp_path / "old" / "config.yaml"
    config.write_text(config.read_text().replace("precision: float32", "precision: auto"))
    assert written(tmp_path / "old") == "auto"
    machine(monkeypatch, amx=True)
    with pytest.raises(UserError, match=r"loop\.precision"):
        train(tmp_path / "old", resume=True, precision="bfloat16")
    assert train(tmp_path / "old", resume=True) == exact


def test_a_teacher_goes_on_in_the_format_that_it_began_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dk.fit_teacher(
        "digits", out=tmp_path / "cnn", model="cifar-resnet8", from_scratch=True, steps=40, progress=SilentProgress()
    )
    taught: dict[str, Any] = {"teacher": tmp_path / "cnn", "distillation": "zscore", "precision": "float32"}
    machine(monkeypatch, amx=False)
    exact = train(tmp_path / "exact", **taught)
    with killed_after_epoch(2):
        train(tmp_path / "moved", **taught)
    machine(monkeypatch, amx=True)
    assert train(tmp_path / "moved", resume=True, **taught) == exact
    assert train(tmp_path / "other", **taught) != exact


def test_a_comparison_is_gone_on_with_in_its_own_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"baseline": "none", "contenders": {"none": {}, "half": {"train_images": 48}}}
    settings = {**QUICK, "epochs": 1, "plan": plan, "out": tmp_path / "cmp"}
    machine(monkeypatch, amx=False)
    dk.compare("digits", seeds=[0], **settings)
    machine(monkeypatch, amx=True)
    with pytest.raises(UserError, match=r"was made with loop\.precision = 'float32', .* with 'bfloat16'"):
        dk.compare("digits", seeds=[0, 1], resume=True, **settings)
    dk.compare("digits", seeds=[0, 1], resume=True, precision="float32", **settings)
    assert {written(run) for run in (tmp_path / "cmp" / "runs").iterdir()} == {"float32"}
    machine(monkeypatch, amx=False)
    dk.compare("digits", seeds=[0, 1, 2], resume=True, precision="float32", **settings)
