"""Fitting a teacher: resumed with the same bits, head first, found again; and what is refused as one."""

from __future__ import annotations

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.fakes import forget, holding, killed_after_epoch
from tests.training.test_jobs import settings_of, train, weights

from deitkit import cli
from deitkit.config import DataConfig, FitConfig, RunConfig
from deitkit.data import load_data
from deitkit.distill.optim import muon_params
from deitkit.models.cnn import CifarResNet, CNNConfig, build_cnn
from deitkit.models.network import Network
from deitkit.settings import build
from deitkit.terminal import SilentProgress, UserError
from deitkit.training import fit as fitting
from deitkit.training.evaluate import evaluate_run
from deitkit.training.probe import Head
from deitkit.training.run import RunFolder
from deitkit.training.setup import resolve

QUICK = {"model": "cifar-resnet8", "train_images": 300, "epochs": 2, "batch_size": 64, "base_lr": 2e-2}


def fit(out: Path, *, resume: bool = False, **settings: Any) -> dict[str, Any]:
    config = build(FitConfig, settings_of(QUICK, settings))
    return fitting.run_fit("digits", config, out, resume=resume, progress=SilentProgress())


def pretrained(folder: Path) -> str:
    """A network with weights of its own for seven other classes."""
    torch.manual_seed(3)
    save_file(CifarResNet(8, 7, 1).state_dict(), folder / "seven.safetensors")
    return f"cifar-resnet8@{folder / 'seven.safetensors'}"


@pytest.mark.parametrize(("scratch", "optimizer"), [(True, "adamw"), (True, "muon"), (False, "adamw")])
def test_an_interrupted_fit_ends_with_the_same_bits(tmp_path: Path, scratch: bool, optimizer: str) -> None:
    settings = {"from_scratch": True} if scratch else {"model": pretrained(tmp_path)}
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


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
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
    return moved


def test_a_head_that_cannot_be_probed_learns_first_then_everything(tmp_path: Path, moved: list[set[str]]) -> None:
    """Alone in a fifth of the steps."""
    name = "torchvision:squeezenet1_1"
    body = build_cnn(CNNConfig(name=name, classes=7), image_size=None, pretrained=False).body
    save_file(body.state_dict(), tmp_path / "seven.safetensors")
    settings = {"model": f"{name}@{tmp_path / 'seven.safetensors'}", "image_size": 32, "train_images": 40}
    fit(tmp_path / "run", **settings, epochs=5, batch_size=20)
    head = {"classifier.1.weight", "classifier.1.bias"}
    assert [names == head for names in moved] == [True] * 2 + [False] * 8
    assert moved[-1] == set(body.state_dict())


def test_fine_tuning_after_a_probe_moves_all_weights_but_those_of_batch_norms(
    tmp_path: Path, moved: list[set[str]]
) -> None:
    fit(tmp_path / "run", model=pretrained(tmp_path), base_lr=1e-4)
    norms = {name for name in CifarResNet(8, 10, 1).state_dict() if "bn" in name}
    assert moved[0] == moved[-1] == set(CifarResNet(8, 10, 1).state_dict()) - norms


def test_the_better_one_of_probe_and_fine_tuned_network_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(SilentProgress, "say", lambda _, line: said.append(line))
    model = pretrained(tmp_path)
    probe = fit(tmp_path / "probe", model=model, fine_tune_minutes=0)
    assert probe["steps"] == 0
    assert (tmp_path / "probe" / "probe.safetensors").is_file()
    spoilt = fit(tmp_path / "spoilt", model=model, base_lr=10.0, ema_decay=0)
    assert (spoilt["steps"], spoilt["top1"], spoilt["nll"]) == (0, probe["top1"], probe["nll"])
    assert "the probe is kept" in said[-1]
    assert weights(tmp_path / "spoilt") == weights(tmp_path / "probe")
    ignorant = Head(torch.zeros(10, 64), torch.zeros(10), penalty=1.0, top1=0.1, nll=2.3)
    monkeypatch.setattr(fitting, "fit_head", lambda *_, **__: ignorant)
    better = fit(tmp_path / "better", model=model, base_lr=1e-3)
    assert better["steps"] == 10
    assert re.fullmatch(
        r"validation accuracy: probe \d+\.\d %, fine-tuned .*: the fine-tuned network is kept", said[-1]
    )
    for name in ("probe", "spoilt", "better"):  # what is kept is what the figures are of
        top1 = evaluate_run(tmp_path / name)["top1"]["cls"]
        assert top1 == json.loads((tmp_path / name / "summary.json").read_text())["top1"]["cls"]


def test_a_probe_tells_its_accuracy_and_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(SilentProgress, "say", lambda _, line: said.append(line))
    monkeypatch.setattr(fitting, "TRAINING_COST", 10**9)
    model = pretrained(tmp_path)
    summary = fit(tmp_path / "run", model=model)
    assert summary["steps"] == 0
    plan, _, probed, left_out = said
    assert re.match(
        r"plan: probe at 32 pixels, about .*; 10 steps \(2 epochs\), fine-tuning, if it takes 3 minutes", plan
    )
    facts = json.loads((tmp_path / "run" / "probe.json").read_text())
    held, crossed = (f"{100 * top1:.1f} %" for top1 in (summary["top1"]["cls"], facts["cv"]["top1"]))
    assert probed.startswith(
        f"probe of {model}: {held} validation accuracy (145 images), {crossed} cross-validated (300"
    )
    assert probed.endswith("; chance 10.0 %, largest class 10.3 %")
    assert re.fullmatch(r"fine-tuning left out: 2 epochs .* \(--fine-tune-minutes \d+ allows them\)", left_out)
    monkeypatch.setattr(fitting, "FEW_VALIDATION_IMAGES", 146)
    fit(tmp_path / "few", model=model, fine_tune_minutes=0)
    with pytest.raises(
        UserError, match="few: already exists and is not empty: give another --out"
    ):  # not: train it longer
        RunFolder(tmp_path / "few").refuse_existing(RunConfig)
    assert (
        f"{crossed} cross-validated (300 images), the better estimate with so few validation images; {held}" in said[-1]
    )


def test_a_probe_is_kept_over_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pretrained(tmp_path)
    fit(tmp_path / "whole", model=model, fine_tune_minutes=0)
    for step, resume in (("fit_head", False), ("_has_time", True)):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(fitting, step, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                fit(tmp_path / "broken", model=model, fine_tune_minutes=0, resume=resume)
    monkeypatch.setattr(fitting, "split_features", None)  # not needed any more
    summary = fit(tmp_path / "broken", model=model, fine_tune_minutes=0, resume=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "broken")
    assert summary["top1"] == json.loads((tmp_path / "whole" / "summary.json").read_text())["top1"]
    assert fit(tmp_path / "broken", model=model, fine_tune_minutes=0, resume=True) == summary


def test_the_best_of_the_automatic_teachers_teaches(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = settings_of(QUICK, {"model": pretrained(tmp_path), "fine_tune_minutes": 0})
    scratch = settings_of(QUICK, {"from_scratch": True, "epochs": 12})
    for order in ([probe, scratch], [scratch, probe]):
        monkeypatch.setattr(fitting, "automatic_fits", lambda *_, order=order: [build(FitConfig, one) for one in order])
        summary = train(tmp_path / str(order is probe), teacher="auto", epochs=1, train_images=300)
        fitted = {
            one: json.loads((one / "summary.json").read_text()) for one in store.rglob("*") if (one / "model").is_dir()
        }
        best = max(fitted, key=lambda one: fitted[one]["top1"]["cls"])
        assert (len(fitted), fitted[best]["model"]) == (2, "cifar-resnet8")
        assert summary["teacher"]["name"] == str(best)
        shutil.rmtree(tmp_path / str(order is probe))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of fitted teachers, which are fitted quickly."""
    monkeypatch.setattr(fitting, "AUTOMATIC_SMALL_VIEWS", {16: 3000, 64: 3000})
    monkeypatch.setattr("deitkit.data.caching.cache_folder", lambda: tmp_path / "cache")
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
    config = resolve(config, digits, "digits")
    other = replace(digits, classes=tuple("abcdefghij"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fitting, "_fit", lambda *_: {"top1": {"cls": 1.0}})
        assert (
            len({fitting.fit_automatically("digits", data, config, SilentProgress()) for data in (digits, other)}) == 2
        )


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
    monkeypatch.setattr(fitting, "AUTOMATIC_SMALL_VIEWS", {16: 6000, 64: 6000})
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
    assert cli.main(["teacher", "fit", *argv]) == 2
    assert capsys.readouterr().err.endswith("already exists and is not empty: give another --out\n")
    assert cli.main(["teacher", "fit", *argv, "--epochs", "3", "--resume"]) == 2
    assert "steps, this would be " in (said := capsys.readouterr().err)
    assert said.endswith("steps: resume it as it was, or start another --out\n")


def test_a_batch_of_one_image_is_one_line_where_batch_norms_need_two(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="test_resnet: its batch norms need batches of two images or larger ones"):
        fit(
            tmp_path / "run",
            model="test_resnet",
            from_scratch=True,
            image_size=16,
            batch_size=1,
            epochs=1,
            train_images=10,
        )


def test_photos_are_probed_with_lite0_where_no_network_is_named(tmp_path: Path) -> None:
    """Its own rates come along; small images, and a network that is named, are left alone."""
    for number, name in enumerate(("cats", "dogs")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for photo in range(4):
            Image.new("RGB", (80 + photo, 70), (90 * number, 40, 9)).save(tmp_path / "photos" / name / f"{photo}.png")
    photos, config = str(tmp_path / "photos"), FitConfig()
    found = fitting.network_unasked(photos, config, {}, tmp_path / "x", SilentProgress())
    assert found == {"model": "lite0"}
    assert build(FitConfig, {}, lower=found).optim.base_lr == 1e-4
    assert fitting.network_unasked("digits", config, {}, tmp_path / "x", SilentProgress()) == {}
    assert fitting.network_unasked(photos, config, {"model": "resnet18"}, tmp_path / "x", SilentProgress()) == {}
    scratch = build(FitConfig, {"from_scratch": True})
    assert fitting.network_unasked(photos, scratch, {"from_scratch": True}, tmp_path / "x", SilentProgress()) == {}
