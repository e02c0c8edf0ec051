"""Teaching with images that have no labels, from the command's settings to the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.fakes import HeldImages, killed_after_epoch
from tests.training.test_fit import fit
from tests.training.test_jobs import train, weights
from tests.training.test_loop import plan_of, result_of
from tests.views.test_loader import HELD_VIEW

import deitkit as dk
from deitkit import cli
from deitkit.comparison import runner as budget
from deitkit.comparison.runner import RunCost
from deitkit.config import LossConfig, RunConfig
from deitkit.distill.losses import TeacherOutput
from deitkit.distill.step import gradient_ratio
from deitkit.models.network import Heads
from deitkit.settings import build
from deitkit.terminal import SilentProgress
from deitkit.training import fit as fitting
from deitkit.views.loader import TrainLoader
from deitkit.views.mixup import mix

FEW: dict[str, Any] = {"train_images": 60, "unlabelled": True, "epochs": 2, "batch_size": 256}


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("teacher") / "cnn"
    fit(out, from_scratch=True, train_images=60, epochs=20)
    return str(out)


def test_a_tape_teaches_them_as_the_teacher_itself_does(tmp_path: Path, cnn: str) -> None:
    """Bit for bit; and the labels that are not there are not looked at."""
    train(tmp_path / "live", teacher=cnn, **FEW)
    train(tmp_path / "recorded", teacher=cnn, record=str(tmp_path / "tape"), **FEW)
    train(tmp_path / "taped", tape=str(tmp_path / "tape"), **FEW)
    assert weights(tmp_path / "taped") == weights(tmp_path / "recorded") == weights(tmp_path / "live")
    train(tmp_path / "labels", teacher=cnn, label_weight=0, **FEW)
    train(tmp_path / "none", teacher=cnn, label_weight=0, **{**FEW, "train_images": None, "unlabelled": False})
    assert weights(tmp_path / "labels") == weights(tmp_path / "none")


def test_an_interrupted_training_ends_with_the_same_bits(tmp_path: Path, cnn: str) -> None:
    train(tmp_path / "whole", teacher=cnn, **FEW)
    with killed_after_epoch(1):
        train(tmp_path / "broken", teacher=cnn, **FEW)
    train(tmp_path / "broken", teacher=cnn, resume=True, **FEW)
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")


def test_the_teacher_of_the_labelled_images_serves_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deitkit.data.caching.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(fitting, "AUTOMATIC_SMALL_VIEWS", {16: 1200, 64: 1200})
    shared = {"train_images": 60, "steps": 3, "batch_size": 256, "depth": 1, "teacher": "auto", "unlabelled": True}
    plan = {"none": {"distillation": "none"}, "few": {"unlabelled": False}, "all": {}}
    result = dk.compare(
        "digits", out=tmp_path / "out", seeds=[0], progress=SilentProgress(),
        plan={"baseline": "none", "shared": shared, "contenders": plan},
    )  # fmt: skip
    assert len(list(tmp_path.glob("cache/teachers/*/summary.json"))) == 1
    assert len(list((tmp_path / "out" / "tapes").iterdir())) == 2
    assert [row["name"] for row in result["contenders"]] == ["none", "few", "all"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three colours of 8 x 8 pixels, twelve with labels each and twenty without."""
    root, random = tmp_path_factory.mktemp("photos") / "photos", np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        for number in range(32):
            pixels = random.integers(0, 60, (8, 8, 3), np.uint8)
            pixels[..., channel] += 150
            file = root / (name if number < 12 else "unlabelled") / f"{name}-{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    return root


def test_a_folder_with_labelled_and_unlabelled_images_is_taken_by_every_verb(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fitting, "AUTOMATIC_SMALL_VIEWS", {16: 600, 64: 600})
    monkeypatch.setattr("deitkit.data.caching.cache_folder", lambda: tmp_path / "store")
    monkeypatch.chdir(tmp_path)

    def deit(*argv: str) -> str:
        assert cli.main(list(argv)) == 0, capsys.readouterr().err
        said = capsys.readouterr()
        return said.out + said.err

    data = str(photos)
    quick = ["--steps", "2", "--depth", "1", "--batch-size", "32"]
    assert "60 training images of " in deit("train", data, "--unlabelled", "--teacher", "auto", *quick, "--out", "run")
    (teacher,) = (str(path) for path in tmp_path.glob("store/teachers/*"))
    assert "are left out" in deit("train", data, "--distillation", "none", *quick, "--out", "plain")
    deit("evaluate", "run", "--split", "test")
    deit("evaluate", "run", data, "--split", "test")
    deit("teacher", "check", teacher, data)
    deit("teacher", "fit", data, "--model", "cifar-resnet8", "--from-scratch", "--epochs", "2", "--out", "cnn")
    deit("tape", "record", data, "--teacher", teacher, "--unlabelled", "--views", "1", "--out", "tape")
    assert "--teacher auto --unlabelled" in deit("data", "cache", data, "--size", "8", "--unlabelled", "--out", "cache")
    deit("train", "cache", "--teacher", teacher, "--unlabelled", *quick, "--out", "cached")
    monkeypatch.setattr(budget, "run_cost", lambda *_: RunCost(1, 2, 10.0, 0.0, 0.0))
    with_minutes = ["--budget-minutes", "3", "--seeds", "0", "--depth", "1", "--out", "minutes"]
    deit("compare", data, "--teacher", teacher, "--unlabelled", *with_minutes)
    by_epochs = ["--epochs", "1", "--seeds", "0", "--depth", "1", "--losses", "hard", "--out", "epochs"]
    assert "contenders make " in deit("compare", data, "--teacher", teacher, "--unlabelled", *by_epochs)


def test_how_hard_the_teacher_pulls_is_a_number_where_no_image_has_a_label() -> None:
    head = torch.randn(2, 3)
    answers = TeacherOutput(torch.tensor([0, 1]), None)
    crops = TrainLoader(HeldImages(2), HELD_VIEW, batch_size=2, seed=1).batch(0)
    batch = mix(crops, HELD_VIEW)._replace(labels_B=torch.tensor([-1, -1]))
    batch = batch._replace(partner_labels_B=batch.labels_B)
    plan = plan_of(loss=LossConfig(distillation="hard"))
    found = gradient_ratio(result_of(plan, Heads(head, head), batch, answers), plan)
    assert found.item() == 0


def test_a_recipe_with_them_can_be_had_without_a_teacher(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("data: {train_images: 60, unlabelled: true}\nloss: {distillation: soft}\n")
    config = build(RunConfig, {"distillation": "none"}, recipe=tmp_path / "r.yaml")
    assert not config.data.unlabelled


def test_a_teacher_is_not_fitted_to_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["teacher", "fit", "digits", "--train-images", "60", "--unlabelled", "--out", str(tmp_path / "cnn")]
    assert cli.main(argv) == 2
    assert "--unlabelled: does not apply to deit teacher fit" in capsys.readouterr().err
    argv = [
        "train",
        "digits",
        "--train-images",
        "60",
        "--unlabelled",
        "--teacher",
        "none",
        "--out",
        str(tmp_path / "run"),
    ]
    assert cli.main(argv) == 2
    assert "give --teacher (or --no-unlabelled)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
