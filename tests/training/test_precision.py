"""What a training computes in: this machine's best format, and on any other the one that it was begun in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.fakes import killed_after_epoch

import deitkit as dk
from deitkit.config import DataConfig, RunConfig
from deitkit.data import load_data
from deitkit.distill.tape import open_tape
from deitkit.models.network import resolve_precision
from deitkit.settings import build
from deitkit.terminal import SilentProgress, UserError
from deitkit.training.evaluate import evaluate_run
from deitkit.training.fit import automatic_fits, fit_key
from deitkit.training.setup import resolve

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


@pytest.mark.parametrize("instructions", ["amx_bf16", "avx512_bf16"])
def test_a_processor_with_products_in_bfloat16_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, instructions: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True}, raising=False)
    assert resolve_precision("auto", torch.device("cpu")) == "bfloat16"
    assert resolve_precision("float32", torch.device("cpu")) == "float32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, instructions: False})
    assert resolve_precision("auto", torch.device("cpu")) == "float32"


def test_a_teacher_goes_on_in_the_format_that_it_began_in(
    cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: dict[str, Any] = {"teacher": cnn, "distillation": "zscore", "precision": "float32"}
    machine(monkeypatch, amx=False)
    exact = train(tmp_path / "exact", **taught)
    with killed_after_epoch(2):
        train(tmp_path / "moved", **taught)
    machine(monkeypatch, amx=True)
    assert train(tmp_path / "moved", resume=True, **taught) == exact
    assert train(tmp_path / "other", **taught) != exact


@pytest.mark.parametrize("amx", [False, True])
def test_a_comparison_goes_on_in_its_own_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    plan = {"baseline": "none", "contenders": {"none": {}, "half": {"train_images": 48}}}
    settings = {**QUICK, "epochs": 1, "plan": plan, "out": tmp_path / "cmp"}
    machine(monkeypatch, amx=amx)
    dk.compare("digits", seeds=[0], **settings)
    machine(monkeypatch, amx=not amx)
    own, other = ("bfloat16", "float32") if amx else ("float32", "bfloat16")
    with pytest.raises(UserError, match=f"was computed in {own}: leave out --precision"):
        dk.compare("digits", seeds=[0, 1], resume=True, precision=other, **settings)
    dk.compare("digits", seeds=[0, 1], resume=True, **settings)
    dk.compare("digits", seeds=[0, 1, 2], resume=True, precision=own, **settings)
    assert {written(run) for run in (tmp_path / "cmp" / "runs").iterdir()} == {own}


def test_a_tape_goes_on_in_the_format_that_it_began_in(
    cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {key: value for key, value in QUICK.items() if key != "distillation"} | {
        "losses": ["hard"],
        "seeds": [0],
    }
    settings |= {"teacher": cnn, "tapes": tmp_path / "tapes"}
    machine(monkeypatch, amx=False)
    dk.compare("digits", out=tmp_path / "short", **{**settings, "epochs": 1})
    machine(monkeypatch, amx=True)
    result = dk.compare("digits", out=tmp_path / "long", **settings)
    assert result["failed"] == []
    (tape,) = (tmp_path / "tapes").iterdir()
    assert open_tape(tape).manifest.teacher["dtype"] == "float32"
    assert open_tape(tape).complete_views() == 3


def test_what_is_evaluated_is_float32_without_an_average_of_the_weights_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dk.train("digits", out=tmp_path / "run", precision="bfloat16", ema_decay=0.0, calibrate=False, **QUICK)
    summary = yaml.safe_load((tmp_path / "run" / "summary.json").read_text())
    assert evaluate_run(tmp_path / "run")["nll"] == summary["nll"]


def test_an_automatic_teacher_has_one_name_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    data, names = load_data("digits", DataConfig()), set()
    for amx in (True, False):
        machine(monkeypatch, amx=amx)
        config = resolve(build(RunConfig, {"teacher": "auto"}), data, "digits")
        names |= {fit_key(fit) for fit in automatic_fits(data, config)}
    assert len(names) == 1
