from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from deitkit import cli
from deitkit.config import DataConfig, ViewConfig
from deitkit.data import Split, UnreadableImage, load_data
from deitkit.views.loader import TITLE_HEIGHT, describe, one_of_each_class, sheet, titled, view_sheet


class Broken(Split):
    """Six images of three classes; the first of class 0 cannot be read."""

    def __init__(self) -> None:
        self.labels_N = np.array([2, 0, 0, 1, 0, 2])

    def read(self, position: int) -> NDArray[np.uint8]:
        if position == 1:
            raise UnreadableImage("train[1]: broken")
        return np.full((4, 6, 3), position, np.uint8)

    def name(self, position: int) -> str:
        return f"train[{position}]"

    def content_hash(self) -> str:
        return ""


def test_the_first_readable_image_of_every_class_comes_first() -> None:
    assert one_of_each_class(Broken(), 3) == [3, 0, 2]
    assert sorted(one_of_each_class(Broken(), 10)) == [0, 2, 3, 4, 5]


def test_a_description_counts_images_by_class_and_leaves_the_test_split_closed() -> None:
    dataset = load_data("digits", DataConfig())
    opened: list[str] = []
    watched = type(dataset)(
        **{**dataset.__dict__, "open_split": lambda name: (opened.append(name), dataset.open_split(name))[1]}
    )
    facts = describe(watched)
    assert set(opened) == {"train", "val"}
    assert sum(counts["train"] for counts in facts["classes"].values()) == facts["images"]["train"]
    assert list(facts["classes"]) == list(dataset.classes)
    assert facts["sizes"] == {"height": [8, 8], "width": [8, 8]}


def test_a_sheet_shows_each_image_at_its_place_magnified() -> None:
    rows = [[np.full((40, 20, 3), 10 * (2 * down + across), np.uint8) for across in range(2)] for down in range(3)]
    picture = np.asarray(sheet(rows))
    assert picture.shape == (3 * 82 + 2, 2 * 42 + 2, 3)
    assert (picture[2 + 82 : 82 + 82, 2 + 42 : 42 + 42] == 30).all()
    assert (picture[:2] == 255).all()


def test_without_augmentation_every_view_is_the_image_itself() -> None:
    split = load_data("digits", DataConfig()).open_split("train")
    recipe = ViewConfig(augment="none", crop="none", flip_prob=0.0, view_size=(8, 8), crop_padding=0)
    picture = np.asarray(view_sheet(split, recipe, [3, 5], 2))
    left, middle, right = (picture[2:, 2 + at * 66 : at * 66 + 66] for at in range(3))
    assert (left == middle).all()
    assert (left == right).all()
    assert left.std() > 0


def test_deit_data_show_prints_what_is_there_and_writes_a_sheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    assert cli.main(["data", "show", "digits", "--views", "2", "--train-images", "200", "--out", str(out)]) == 0
    page = capsys.readouterr().out
    assert "all      200" in page
    assert "test split: there is one, not opened" in page
    assert "8 x 8 pixels" in page
    with Image.open(out) as picture:
        assert picture.size[0] > 3 * 66 + 2  # names on the left, a title on top
        assert picture.size[1] == 10 * 66 + 2 + TITLE_HEIGHT
    assert cli.main(["data", "show", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "digits"


def test_an_unreadable_image_takes_one_line_whatever_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    bad = tmp_path / "a" / "odd\n\x1b[31m.png"
    bad.write_bytes(b"no image")
    assert cli.main(["data", "show", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["unreadable: 1", rf"  {tmp_path}/a/odd\n\x1b[31m.png: not an image of a known format"]


def test_a_sheet_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "no" / "sheet.png"
    assert cli.main(["data", "show", "digits", "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"deit: error: --out {out}: cannot be written: No such file or directory\n"


def test_a_titled_sheet_keeps_its_pictures(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    named = titled(picture, ["cat", "a name that is much too long for a sheet of pictures"])
    corner = (named.width - 90, named.height - 60)
    assert np.array_equal(np.asarray(named)[corner[1] :, corner[0] :], np.asarray(picture))
    assert np.asarray(named)[:, : corner[0]].min() < 100  # there is something written
