"""Images that come, go or change their class between two commands on one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.fakes import killed_after_epoch

from deitkit.config import FitConfig, RunConfig
from deitkit.data import UnreadableImage
from deitkit.data.folder import FolderSplit
from deitkit.models.network import Heads
from deitkit.settings import build
from deitkit.terminal import SilentProgress, UserError
from deitkit.training import fit as fitting
from deitkit.training import jobs
from deitkit.training.evaluate import SplitLogits, evaluate_run, score
from deitkit.training.loop import Trainer

RANDOM = np.random.default_rng(0)
SHAPE = {"student": "deit_pico", "image_size": 8, "view_size": (8, 8), "epochs": 2, "batch_size": 8, "workers": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 8), ("val", 4), ("test", 2)):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for image in range(count):
                pixels = RANDOM.integers(0, 99, (9, 8 + image % 2, 3), np.uint8) + np.uint8(150 * number)
                Image.fromarray(pixels).save(tmp_path / "pets" / split / name / f"{image}.png")
    return tmp_path / "pets"


def train(folder: Path, *, resume: bool = False, **settings: Any) -> dict[str, Any]:
    config = build(RunConfig, {**SHAPE, **settings})
    out = folder.parent / "run"
    return jobs.run_training(str(folder), config, out, resume=resume, progress=SilentProgress())


def test_a_run_goes_on_with_the_images_it_began_with_only(folder: Path) -> None:
    with killed_after_epoch(1):
        train(folder)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "train" / "cat" / "00.png")
    with pytest.raises(
        UserError, match=r"the images are not those that this run was started with .now 17 for training.*then 16 for"
    ):
        train(folder, resume=True)
    (folder / "train" / "cat" / "00.png").unlink()
    train(folder, resume=True)
    folder.rename(folder.parent / "moved")  # the same images, somewhere else
    assert train(folder.parent / "moved", resume=True)["n"] == 8


def test_classes_that_change_their_names_are_other_data(folder: Path) -> None:
    with killed_after_epoch(1):
        train(folder)
    for split in ("train", "val", "test"):
        (folder / split / "cat").rename(folder / split / "zebra")
    with pytest.raises(UserError, match="the images are not those"):
        train(folder, resume=True)


def test_a_run_is_not_measured_on_images_that_it_may_have_seen(folder: Path) -> None:
    train(folder)
    assert evaluate_run(folder.parent / "run", workers=0)["n"] == 8
    (folder / "train" / "cat" / "7.png").rename(folder / "val" / "cat" / "7.png")
    with pytest.raises(UserError, match=r"now 15 for .*, 9 for .*then 16 for .*, 8 for .*put the data back"):
        evaluate_run(folder.parent / "run", workers=0)
    assert evaluate_run(folder.parent / "run", str(folder), workers=0)["n"] == 9  # asked for by name: other data


def test_a_validation_image_that_vanishes_is_left_out_of_all_figures(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the teacher has seen it, and before the student does."""
    settings = {"model": "cifar-resnet8", "from_scratch": True, "epochs": 8, "batch_size": 8, "base_lr": 5e-2}
    fit = build(FitConfig, {**settings, "image_size": 8, "view_size": (8, 8), "workers": 0})
    fitting.run_fit(str(folder), fit, folder.parent / "cnn", resume=False, progress=SilentProgress())
    epoch, read = Trainer._epoch, FolderSplit.read

    def vanishes(self: FolderSplit, position: int) -> Any:
        if self.name(position).endswith("val/dog/1.png"):
            raise UnreadableImage("gone")
        return read(self, position)

    def epoch_then_vanish(self: Trainer, *arguments: Any) -> Any:
        monkeypatch.setattr(FolderSplit, "read", vanishes)
        return epoch(self, *arguments)

    monkeypatch.setattr(Trainer, "_epoch", epoch_then_vanish)
    summary = train(folder, teacher=str(folder.parent / "cnn"))
    assert summary["n"] == 7
    assert summary["agreement"]["cls"] is not None
    warned: list[str] = []
    assert evaluate_run(folder.parent / "run", workers=0, warn=warned.append)["n"] == 7
    assert any(line.startswith("1 of 8 images cannot be read") for line in warned), warned


def test_agreement_is_of_the_images_that_both_could_read() -> None:
    logits = torch.eye(3)[[0, 1, 2]]
    answers = SplitLogits(Heads(logits, None), torch.tensor([0, 1, 2]), unreadable=(1,))  # positions 0, 2, 3
    assert answers.readable_N.tolist() == [0, 2, 3]
    assert answers.predictions_A.tolist() == [0, -1, 1, 2]
    assert score(answers, torch.tensor([0, 2, 1, 0]))["agreement"]["cls"] == pytest.approx(2 / 3)
    assert score(answers, torch.tensor([0, 2, -1, 0]))["agreement"]["cls"] == pytest.approx(1 / 2)
