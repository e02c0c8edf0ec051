"""CSV files of labels: read with or without splits; what is wrong in one is a line."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from deitkit import cli
from deitkit.config import DataConfig
from deitkit.data import Dataset, load_data, load_known
from deitkit.data.dataset import NO_LABEL
from deitkit.terminal import UserError

MakeFolder = Callable[[Mapping[str, int]], Path]


@pytest.fixture
def photos(make_folder: MakeFolder) -> Path:
    """Twelve images in folders that say nothing of their classes."""
    return make_folder({"2020/may": 6, "2021": 6})


def files(photos: Path) -> list[str]:
    return sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))


def write(photos: Path, lines: list[str], name: str = "labels.csv") -> str:
    (photos / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(photos / name)


def load(path: str, **config: int | bool) -> Dataset:
    return load_data(path, DataConfig.model_validate(config))


def labels(dataset: Dataset, photos: Path) -> dict[str, str]:
    """The class of each image of all splits."""
    found = {}
    for name in dataset.split_names:
        split = dataset.open_split(name)
        for position, label in enumerate(split.labels_N.tolist()):
            assert split.read(position).shape == (6, 5, 3)
            found[split.key(position)] = dataset.classes[label] if label != NO_LABEL else ""
            assert split.name(position) == str(photos / split.key(position))
    return found


@pytest.mark.parametrize("divider", [",", ";", "\t"])
@pytest.mark.parametrize("begin", ["", "\ufeff"])
def test_labels_of_a_csv_are_those_of_its_lines(photos: Path, divider: str, begin: str) -> None:
    wanted = {file: ("cat", "dog")[number % 2] for number, file in enumerate(files(photos))}
    lines = [
        divider.join((begin + "Label", "extra", "FILE")),
        *(divider.join((label, "x", file)) for file, label in wanted.items()),
    ]
    dataset = load(write(photos, [*lines, "", lines[-1]]))
    assert (dataset.name, dataset.classes, dataset.set_aside) == ("labels", ("cat", "dog"), 2)
    assert labels(dataset, photos) == wanted
    assert [len(dataset.open_split(name)) for name in dataset.split_names] == [8, 2, 2]


def test_splits_of_a_csv_are_taken_as_they_are(photos: Path) -> None:
    splits = ["train"] * 6 + ["Validation"] * 3 + ["testing"] * 3
    rows = [
        f"{file},{split},{'cat' if number % 2 else 'dog'}"
        for number, (file, split) in enumerate(zip(files(photos), splits, strict=True))
    ]
    dataset = load(write(photos, ["file,split,label", *rows]))
    assert [len(dataset.open_split(name)) for name in dataset.split_names] == [6, 3, 3]
    assert dataset.set_aside == 0
    assert Counter(labels(dataset, photos).values()) == {"cat": 6, "dog": 6}


def test_paths_are_relative_to_the_csv_or_absolute_and_hold_any_sign(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = photos / "a@b+~c#[d] é,.png"
    (photos / files(photos)[0]).rename(odd)
    rows = [f'"{file}",{number % 2}' for number, file in enumerate(files(photos)[:-1])]
    rows.append(f'"{photos / files(photos)[-1]}",1')
    monkeypatch.chdir(photos.parent)
    dataset = load(write(photos, ["file,label", *rows]).replace(f"{photos.parent}/", ""))
    assert dataset.bad_images == ()
    assert odd.name in {
        Path(dataset.open_split(s).name(p)).name for s in dataset.split_names for p in range(len(dataset.open_split(s)))
    }


def test_training_images_without_a_label_are_for_unlabelled(photos: Path) -> None:
    path = write(
        photos,
        ["file,label", *(f"{file},{('cat', 'dog', '')[number % 3]}" for number, file in enumerate(files(photos)))],
    )
    plain, both = load(path), load(path, unlabelled=True)
    assert (plain.more_unlabelled, both.more_unlabelled) == (True, False)
    assert sum(len(plain.open_split(name)) for name in plain.split_names) == 8
    assert (both.open_split("train").labels_N == NO_LABEL).sum() == 4


def test_a_missing_file_is_an_unreadable_image(photos: Path) -> None:
    rows = [f"{file},{number % 2}" for number, file in enumerate(files(photos))]
    (line,) = load(write(photos, ["file,label", *rows, "gone.png,1"])).bad_images
    assert line == f"{photos / 'gone.png'}: no such file or directory"


def test_all_images_of_a_csv_are_measured_by_the_names_of_their_classes(photos: Path) -> None:
    rows = [f"{file},{('cat', 'yak')[number % 2]}" for number, file in enumerate(files(photos))]
    dataset = load_known(write(photos, ["file,label", *rows]), DataConfig(), ("ant", "cat"))
    assert dataset.open_split("test").labels_N.tolist() == [1] * 6


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], r"its columns are none: it needs a first line such as file,label or file,split,label"),
        (["a.png,cat"], r"its columns are a\.png, cat: it needs a first line"),
        (["file,label"], "lists no images"),
        (["file,label", "a.png,cat", "a.png,dog"], r"a\.png stands there twice, with different labels or splits"),
        (["file,label", "a.png"], "line 2: has 1 columns where the first line has 2"),
        (["file,label", ",cat"], "line 2: names no file"),
        (["file,label", "a.png,"], "no training image has a label"),
        (["file,split,label", "a.png,tset,cat"], "line 2: split 'tset': write train, val or test"),
        (["file,split,label", "a.png,test,cat"], "has no image of the split train"),
        (["file,split,label", "a.png,test,"], "has no label: only training images may have none"),
        (["file,split,label", "a.png,train,cat", "b.png,train,dog", "c.png,val,owl"], "is of class 'owl', which no training image has"),
        (["file,label", "a.png,c\x07at"], "characters that cannot be printed"),
        (["file,label", "a.png,cat"], "holds a single class, 'cat'"),
        (["file,label,note", 'a.png,cat,"small', "b.png,dog,", 'c.png,cat,"big'], "line 4: a quotation mark in it is not closed"),
        (["file,label,note", 'a.png,cat,"small', "b.png,dog,"], "line 3: a quotation mark in it is not closed"),
        (["file,label,note", 'a.png,cat,"small', 'b.png,dog,"', "c.png,cat,"], r"3: a text in quotation marks holds the line of b\.png"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_csv_is_one_line(photos: Path, lines: list[str], why: str) -> None:
    for name in "abc":
        (photos / files(photos)[0]).rename(photos / f"{name}.png")
    with pytest.raises(UserError, match=why):
        load(write(photos, lines))


def test_columns_as_others_write_them(photos: Path) -> None:
    first, second, *rest = files(photos)
    lines = ["sep=;", "file_name;note;label", f'{first};"a text; of\ntwo lines";cat', f"{second};;dog"]
    dataset = load(
        write(photos, [*lines, *(f"{file};;{('cat', 'dog')[number % 2]}" for number, file in enumerate(rest))])
    )
    assert dataset.classes == ("cat", "dog")
    assert sum(len(dataset.open_split(name)) for name in dataset.split_names) == len(rest) + 2


def test_one_image_under_two_names_is_one_image(photos: Path) -> None:
    all_files = files(photos)
    (photos / "link.png").symlink_to(photos / all_files[0])
    rows = [f"{file},{('cat', 'dog')[number % 2]},train" for number, file in enumerate(all_files)]
    with pytest.raises(UserError, match=r"link\.png is the same file as .*, with different labels or splits"):
        load(write(photos, ["file,label,split", *rows, "link.png,cat,val"]))
    shutil.copy(photos / all_files[0], photos / "copy.png")
    dataset = load(write(photos, ["file,label,split", *rows, "copy.png,cat,val", "copy.png,cat,val"]))
    assert len(dataset.open_split("val")) == 1
    assert any("1 of 1 validation images are among the training images too" in line for line in dataset.notes)


def test_a_file_that_is_no_table_is_one_line(photos: Path) -> None:
    (photos / "latin.csv").write_bytes(b"file,label\ncaf\xe9.png,1\n")
    with pytest.raises(UserError, match=r"latin\.csv: is no text in UTF-8"):
        load(str(photos / "latin.csv"))
    with pytest.raises(
        UserError, match=r"000\.png: is a file; give the folder that holds the images or Parquet files, or a CSV"
    ):
        load(str(photos / files(photos)[0]))


def test_data_show_takes_a_csv(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(photos, ["file,label", *(f"{file},{number % 2}" for number, file in enumerate(files(photos)))])
    assert cli.main(["data", "show", path]) == 0
    assert "test split: 2 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (
            "file,label\na/1.png,cat\n./a/1.png,dog\n",
            r"\./a/1\.png is the same file as a/1\.png, with different labels",
        ),
        ("file,label,split\na/1.png,cat,train\na/../a/1.png,cat,val\n", r"is the same file as a/1\.png"),
        ("file,label\na\0b.png,cat\n", "names no file"),
        ("file,label,label\na.png,cat,dog\n", "its columns are file, label, label"),
    ],
)
def test_one_image_stands_in_a_file_once_however_its_path_is_written(
    tmp_path: Path, lines: str, complaint: str
) -> None:
    (tmp_path / "x.csv").write_text(lines)
    with pytest.raises(UserError, match=complaint):
        load_data(str(tmp_path / "x.csv"), DataConfig())


def test_paths_of_windows_are_found_here(photos: Path) -> None:
    lines = [f"{file.replace('/', chr(92))},{'ab'[number % 2]}" for number, file in enumerate(files(photos))]
    expected = write(photos, ["file,label", *(line.replace(chr(92), "/") for line in lines)])
    found = labels(load(write(photos, ["file,label", *lines], "windows.csv")), photos)
    assert found == labels(load(expected), photos)


def test_a_table_beside_images_that_are_no_classes_is_pointed_at(make_folder: MakeFolder) -> None:
    root = make_folder({"images": 8})
    (root / "notes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"holds a single class, 'images'; a classifier needs two$"):
        load(str(root))
    lines = [
        f"images/{file.name},{'ab'[number % 2]}" for number, file in enumerate(sorted((root / "images").iterdir()))
    ]
    (root / "labels.csv").write_text("\n".join(["file,label", *lines]))
    with pytest.raises(UserError, match=r"; labels.csv in it lists images and labels: give .*/labels.csv$"):
        load(str(root))


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="is an archive: unpack it, and give the folder"):
        load(str(tmp_path / "photos.zip"))


def test_a_pipe_is_no_csv_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.csv")
    with pytest.raises(UserError, match="is no regular file"):
        load_data(str(tmp_path / "x.csv"), DataConfig())
