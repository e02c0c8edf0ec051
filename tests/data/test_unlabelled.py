"""Training images without labels: which they are, and that no other split changes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from deitkit import cli
from deitkit.config import DataConfig
from deitkit.data import Dataset, load_data
from deitkit.data.arrow import write_resized
from deitkit.data.dataset import NO_LABEL, Split
from deitkit.terminal import UserError

MakeFolder = Callable[[Mapping[str, int]], Path]
LAYOUTS = {
    "splits": {"train/cat": 6, "train/dog": 4, "unlabelled": 5, "test/cat": 3, "test/dog": 3},
    "classes": {"cat": 10, "dog": 8, "unlabelled": 5},
}


def load(root: Path | str, **config: int | bool) -> Dataset:
    return load_data(str(root), DataConfig.model_validate(config))


def contents(split: Split) -> dict[str, int]:
    """The label of each image, by name."""
    return {split.name(position): int(label) for position, label in enumerate(split.labels_N)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_folder_among_the_classes_adds_training_images_and_moves_no_other(
    make_folder: MakeFolder, layout: str
) -> None:
    root = make_folder({place: count for place, count in LAYOUTS[layout].items() if "unlabelled" not in place})
    before = load(root)
    make_folder(LAYOUTS[layout])
    after = load(root, unlabelled=True)
    assert after.classes == before.classes == ("cat", "dog")
    for name in ("val", "test"):
        assert contents(after.open_split(name)) == contents(before.open_split(name))
    labelled, shown = contents(before.open_split("train")), contents(after.open_split("train"))
    extra = {name: label for name, label in shown.items() if name not in labelled}
    assert {name: shown[name] for name in labelled} == labelled
    assert {Path(name).parent.name for name in extra} == {"unlabelled"}
    assert set(extra.values()) == {NO_LABEL}
    assert len(extra) == 5
    train = after.open_split("train")
    assert train.read(len(train) - 1).shape == (6, 5, 3)
    assert train.place(len(train) - 1).endswith("unlabelled/004.png")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_no_class_where_nobody_asks_for_it_either(make_folder: MakeFolder, layout: str) -> None:
    root = make_folder({place: count for place, count in LAYOUTS[layout].items() if place != "unlabelled"})
    before = load(root)
    make_folder(LAYOUTS[layout])
    after = load(root)
    assert (before.more_unlabelled, after.more_unlabelled) == (False, True)
    assert after.names_hash() == before.names_hash()
    assert contents(after.open_split("test")) == contents(before.open_split("test"))


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_images_outside_the_subset_lose_their_labels(make_folder: MakeFolder, name: str) -> None:
    root = "digits" if name == "digits" else make_folder({"train/cat": 30, "train/dog": 20})
    whole, subset = load(root), load(root, train_images=20)
    both = load(root, train_images=20, unlabelled=True)
    shown, few = contents(both.open_split("train")), contents(subset.open_split("train"))
    assert list(shown) == list(contents(whole.open_split("train")))
    assert {place: label for place, label in shown.items() if label != NO_LABEL} == few
    assert contents(both.open_split("val")) == contents(subset.open_split("val"))
    prints = {data.open_split("train").content_hash() for data in (whole, subset, both)}
    assert len(prints) == 3
    assert both.names_hash()["outline"]["train"] != whole.names_hash()["outline"]["train"]


def test_asking_for_images_without_labels_where_there_are_none_is_an_error(make_folder: MakeFolder) -> None:
    for root in ("digits", make_folder({"train/cat": 6, "train/dog": 6})):
        with pytest.raises(UserError, match="--unlabelled: no training image is without a label"):
            load(root, unlabelled=True)


def test_a_folder_of_nothing_else_is_no_data_set(make_folder: MakeFolder) -> None:
    with pytest.raises(UserError, match="no folder beside unlabelled"):
        load(make_folder({"unlabelled": 3}), unlabelled=True)


def test_the_folder_may_be_spelled_the_american_way(make_folder: MakeFolder) -> None:
    root = make_folder({"cat": 5, "dog": 5, "unlabeled": 3})
    labels_N = load(root, unlabelled=True).open_split("train").labels_N
    assert (labels_N == NO_LABEL).sum() == 3
    make_folder({"unlabelled": 1})
    with pytest.raises(UserError, match="holds both unlabelled and unlabeled"):
        load(root)


def test_a_folder_of_resized_images_keeps_them(make_folder: MakeFolder, tmp_path: Path) -> None:
    root, config = make_folder(LAYOUTS["splits"]), DataConfig(unlabelled=True)
    write_resized(load_data(str(root), config), config, 4, tmp_path / "small", lambda _: None)
    labels_N = load(tmp_path / "small", unlabelled=True).open_split("train").labels_N
    np.testing.assert_array_equal(labels_N, load(root, unlabelled=True).open_split("train").labels_N)
    assert (load(tmp_path / "small").open_split("train").labels_N >= 0).all()
    assert load(tmp_path / "small").more_unlabelled
    assert len(load(tmp_path / "small").open_split("train")) == (labels_N >= 0).sum()


def test_data_show_counts_them(make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "views.png"
    assert cli.main(["data", "show", str(make_folder(LAYOUTS["splits"])), "--unlabelled", "--out", str(picture)]) == 0
    assert "without a label" in capsys.readouterr().out
    assert picture.is_file()
