"""Teaching with images that have no labels, from the command's settings to the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.fakes import killed_after_epoch
from tests.test_fit import fit
from tests.test_jobs import train, weights

import deitkit as dk
from deitkit import cli, resolve
from deitkit.progress import SilentProgress

FEW: dict[str, Any] = {"train_images": 60, "unlabelled": True, "epochs": 2, "batch_size": 256}


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("teacher") / "cnn"
    fit(out, from_scratch=True, train_images=60, epochs=20)
    return str(out)


def test_a_tape_teaches_them_as_the_teacher_itself_does(tmp_path: Path, cnn: str) -> None:
    """Bit for bit; and the labels that are not there are not looked at."""
    train(tmp_path / "live", teacher=cnn, record=str(tmp_path / "tape"), answers="all", **FEW)
    train(tmp_path / "taped", tape=str(tmp_path / "tape"), **FEW)
    assert weights(tmp_path / "taped") == weights(tmp_path / "live")
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
    monkeypatch.setattr(resolve, "AUTOMATIC_SMALL_VIEWS", {16: 1200, 64: 1200})
    shared = {"train_images": 60, "steps": 3, "batch_size": 256, "depth": 1, "teacher": "auto", "unlabelled": True}
    plan = {"none": {"distillation": "none"}, "few": {"unlabelled": False}, "all": {}}
    result = dk.compare(
        "digits", out=tmp_path / "out", seeds=[0], progress=SilentProgress(),
        plan={"baseline": "none", "shared": shared, "contenders": plan},
    )  # fmt: skip
    assert len(list(tmp_path.glob("teacher-*/summary.json"))) == 1
    assert len(list((tmp_path / "out" / "tapes").iterdir())) == 2
    assert [row["name"] for row in result["contenders"]] == ["none", "few", "all"]


def test_a_teacher_is_not_fitted_to_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["teacher", "fit", "digits", "--train-images", "60", "--unlabelled", "--out", str(tmp_path / "cnn")]
    assert cli.main(argv) == 2
    assert "--unlabelled: a convolutional network is fitted to labels alone" in capsys.readouterr().err
    assert cli.main(["train", "digits", "--train-images", "60", "--unlabelled", "--out", str(tmp_path / "run")]) == 2
    assert "give --teacher" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
