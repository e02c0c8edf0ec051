"""Which images a run is measured on: all of those that came later, but only the unseen ones of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deitkit as dk
from deitkit.config import RunConfig
from deitkit.data import load_data
from deitkit.settings import build
from deitkit.training.evaluate import data_of_run, evaluate_run
from deitkit.training.run import RunFolder

CLASSES = ("ant", "bee", "cat")


def photos(root: Path, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(random.integers(0, 256, (5, 6, 3), np.uint8)).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """As much of a run on `own` as says what it was trained on."""
    own = photos(tmp_path / "own")
    config = build(RunConfig, {})
    config = config.model_copy(update={"data": config.data.model_copy(update={"location": str(own)})})
    RunFolder(tmp_path / "run").create(config, load_data(str(own), config.data).names_hash())
    return tmp_path / "run"


def measured(run: Path, location: Path | None, split: str = "test") -> int:
    dataset, _ = data_of_run(run, CLASSES, None if location is None else str(location))
    assert dataset.classes == CLASSES
    return len(dataset.open_split(split))  # type: ignore[arg-type]


def test_all_images_that_came_later_are_measured_even_under_the_same_names(run: Path, tmp_path: Path) -> None:
    assert measured(run, photos(tmp_path / "fresh", seed=1)) == 30
    assert measured(run, photos(tmp_path / "subset", ("ant", "cat"), seed=2), "val") == 20
    assert measured(run, photos(tmp_path / "more", (*CLASSES, "dog"), seed=3)) == 30


def test_of_its_own_images_those_that_were_held_out_are_measured(run: Path, tmp_path: Path) -> None:
    assert measured(run, None) == measured(run, tmp_path / "own") == measured(run, tmp_path / "run" / ".." / "own") == 6
    shutil.copytree(tmp_path / "own", tmp_path / "copy")
    assert measured(run, tmp_path / "copy") == 6
    assert measured(run, tmp_path / "copy", "val") == 3
    shutil.rmtree(tmp_path / "own")
    assert measured(run, tmp_path / "copy") == 6


def test_test_images_that_are_training_images_are_told_where_they_are_measured(tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("val", 1), ("test", 2)):
        photos(tmp_path / "data" / split, seed=seed)
    shutil.copy(tmp_path / "data/train/ant/0.png", tmp_path / "data/test/bee/copy.png")
    (tmp_path / "data/test/cat/notes.txt").write_text("none of them")
    quick = {"teacher": "none", "steps": 1, "student": "deit_pico", "image_size": 8, "workers": 0}
    run = dk.train(tmp_path / "data", out=tmp_path / "run", **quick)
    warned: list[str] = []
    evaluate_run(run.path, split="test", workers=0, warn=warned.append)
    assert warned == [
        "1 of 31 test images are among the training images too: test figures are too good",
        "left out: 1 .txt file",
    ]
    warned.clear()
    evaluate_run(run.path, split="val", workers=0, warn=warned.append)
    assert warned == []
