"""Fitting a teacher: resumed with the same bits, head first, found again; and what is refused as one."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.fakes import forget, holding, killed_after_epoch
from tests.training.test_jobs import settings_of, train, weights

from deitkit import cli
from deitkit.config import DataConfig, FitConfig, RunConfig
from deitkit.data import load_data
from deitkit.distill.optim import muon_params
from deitkit.models.cnn import CifarResNet
from deitkit.models.network import Network
from deitkit.settings import build
from deitkit.terminal import SilentProgress, UserError
from deitkit.training import jobs, setup

QUICK = {"model": "cifar-resnet8", "train_images": 300, "epochs": 2, "batch_size": 64, "base_lr": 2e-2}


def fit(out: Path, *, resume: bool = False, **settings: Any) -> dict[str, Any]:
    config = build(FitConfig, settings_of(QUICK, settings))
    return jobs.run_fit("digits", config, out, resume=resume, progress=SilentProgress())


def pretrained(folder: Path) -> str:
    """A network with weights of its own for seven other classes."""
    torch.manual_seed(3)
    save_file(CifarResNet(8, 7, 1).state_dict(), folder / "seven.safetensors")
    return f"cifar-resnet8@{folder / 'seven.safetensors'}"


@pytest.mark.parametrize(("scratch", "optimizer"), [(True, "adamw"), (True, "muon"), (False, "adamw")])
def test_an_interrupted_fit_ends_with_the_same_bits(tmp_path: Path, scratch: bool, optimizer: str) -> None:
    settings = {"from_scratch": True} if scratch else {"model": pretrained(tmp_path), "head_share": 0.3}
    settings |= {"optimizer": optimizer}
    fit(tmp_path / "whole", **settings)
    with killed_after_epoch(1):
        fit(tmp_path / "broken", **settings)
    fit(tmp_path / "broken", resume=True, **settings)
    assert weights(tmp_path / "whole") == weights(tmp_path / "broken")


def test_muon_moves_every_kernel_of_a_network_from_scratch() -> None:
    network = CifarResNet(8, 10, 1).to(memory_format=torch.channels_last)
    kernels = [weight for weight in network.parameters() if weight.ndim == 4]
    assert {id(weight) for weight in muon_params(network)} == {id(weight) for weight in kernels}


def test_the_new_head_learns_first_then_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and buffers that have moved since the start, by name, after every step."""
    moved: list[set[str]] = []
    from deitkit.training import loop as module

    step, start = module.train_step, {}

    def watched(state: Any, *arguments: Any) -> Any:
        network: Network = state.network
        if not start:
            start.update({name: tensor.clone() for name, tensor in network.body.state_dict().items()})
        result = step(state, *arguments)
        now = network.body.state_dict()
        moved.append({name for name in now if not torch.equal(now[name], start[name])})
        return result

    monkeypatch.setattr(module, "train_step", watched)
    fit(tmp_path / "run", model=pretrained(tmp_path), head_share=0.5)
    half = len(moved) // 2
    assert all(names == {"linear.weight", "linear.bias"} for names in moved[:half])
    assert moved[-1] == set(start)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of fitted teachers, which are fitted quickly."""
    monkeypatch.setattr(setup, "AUTOMATIC_SMALL_VIEWS", {16: 3000, 64: 3000})
    monkeypatch.setattr("deitkit.data.dataset.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "teachers"


def test_an_automatic_teacher_is_found_by_what_decides_its_weights(tmp_path: Path, store: Path) -> None:
    """Not by the student's seed or way to compute, nor by where its run is."""
    train(tmp_path / "first", teacher="auto", epochs=1)
    train(tmp_path / "second", teacher="auto", epochs=1, workers=0, max_bad_images=3)
    train(tmp_path / "elsewhere" / "run", teacher="auto", epochs=1, seed=5, deterministic=True, precision="bfloat16")
    assert len(list(store.iterdir())) == 1
    train(tmp_path / "third", teacher="auto", epochs=1, view_seed=1)
    assert len(list(store.iterdir())) == 2


def test_the_same_images_under_other_class_names_have_their_own_teacher(tmp_path: Path, store: Path) -> None:
    digits, config = load_data("digits", DataConfig()), build(RunConfig, {"teacher": "auto"})
    config = setup.resolve(config, digits, "digits")
    other = replace(digits, classes=tuple("abcdefghij"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jobs, "_fit", lambda *_: None)
        assert len({jobs.fit_automatically("digits", data, config, SilentProgress()) for data in (digits, other)}) == 2


def test_a_killed_automatic_fit_is_resumed(tmp_path: Path, store: Path) -> None:
    train(tmp_path / "whole", teacher="auto", epochs=1)
    (fitted,) = store.iterdir()
    whole = weights(fitted)
    shutil.rmtree(fitted)
    with killed_after_epoch(2):
        train(tmp_path / "run", teacher="auto", epochs=1)
    assert not (tmp_path / "run").exists()
    first = (fitted / "metrics.jsonl").read_text().splitlines()[0]
    train(tmp_path / "run", teacher="auto", epochs=1)
    assert (fitted / "metrics.jsonl").read_text().splitlines()[0] == first
    assert weights(fitted) == whole


def test_a_killed_fit_with_other_validation_images_is_begun_again(tmp_path: Path, store: Path) -> None:
    with killed_after_epoch(2):
        train(tmp_path / "run", teacher="auto", epochs=1)
    (fitted,) = store.iterdir()
    (fitted / "data.json").write_text('{"train": 300, "val": 7}')
    assert train(tmp_path / "run", teacher="auto", epochs=1)["teacher"]["name"] == str(fitted)


def test_a_program_waits_for_another_one_that_fits_its_teacher(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "first", teacher="auto", epochs=1)
    (fitted,) = store.iterdir()
    said: list[str] = []
    monkeypatch.setattr(SilentProgress, "say", lambda _, line: said.append(line))
    monkeypatch.setattr("deitkit.training.run.WAIT_SECONDS", 0.01)
    with ThreadPoolExecutor(1) as pool, holding(fitted):
        waiting = pool.submit(train, tmp_path / "second", teacher="auto", epochs=1)
        deadline = time.monotonic() + 60
        while f"waiting for another program that fits this teacher, {fitted}" not in said:
            assert not waiting.done()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not waiting.done()
    assert waiting.result()["teacher"]["name"] == str(fitted)
    assert len([line for line in said if line.startswith("waiting")]) == 1


def test_a_run_goes_on_with_the_teacher_that_auto_was_when_it_began(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of this program may fit another one."""
    train(tmp_path / "first", teacher="auto", epochs=1)
    with killed_after_epoch(1):
        train(tmp_path / "run", teacher="auto")
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.setattr(setup, "AUTOMATIC_SMALL_VIEWS", {16: 6000, 64: 6000})
    train(tmp_path / "run", teacher="auto", resume=True)
    assert len(list(store.iterdir())) == 1


def test_a_network_that_knows_nothing_is_refused_as_a_teacher(tmp_path: Path) -> None:
    fit(tmp_path / "cnn", from_scratch=True, steps=1, base_lr=1e-9)
    forget(tmp_path / "cnn")
    with pytest.raises(UserError, match="cnn predicts the same class for every image"):
        train(tmp_path / "run", teacher=str(tmp_path / "cnn"), epochs=1)
    assert not (tmp_path / "run").exists()


def test_an_unfinished_fit_is_called_one(tmp_path: Path) -> None:
    fit(tmp_path / "cnn", from_scratch=True, steps=1)
    (tmp_path / "cnn" / "model" / "model.json").unlink()
    with pytest.raises(UserError, match="this run is not finished: rerun its command with --resume"):
        train(tmp_path / "run", teacher=str(tmp_path / "cnn"), epochs=1)


def test_the_verbs_fit_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "cnn")
    argv = ["digits", "--model", "cifar-resnet8", "--from-scratch", "--epochs", "2", "--lr", "2e-2", "--out", out]
    assert cli.main(["teacher", "fit", *argv]) == 0
    shown = capsys.readouterr()
    fitted = json.loads((tmp_path / "cnn" / "summary.json").read_text())
    assert f"{100 * fitted['top1']['cls']:.2f}" in shown.out
    assert "next: deit train digits --teacher" in shown.err
    assert cli.main(["teacher", "check", out, "digits", "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["top1"] == fitted["top1"]["cls"]
    assert (checked["classes"], checked["n"], checked["split"]) == (10, 145, "val")
    assert cli.main(["teacher", "check", out, "digits"]) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("mean confidence", "8 x 8 pixels", "images per second"))
    assert cli.main(["teacher", "check", out, "digits", "--teacher-size", "10", "--json"]) == 0
    enlarged = json.loads(capsys.readouterr().out)
    assert enlarged["image_size"] == [10, 10]
    assert enlarged["confidence"] != checked["confidence"]
    assert cli.main(["teacher", "check", out, "digits", "--teacher-size", "0"]) == 2
    assert capsys.readouterr().err == "deit: error: --teacher-size: input should be greater than 0 (got '0')\n"
