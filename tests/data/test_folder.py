"""Image folders: layout, order, bad input, and a test split that stays shut."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deitkit.config import DataConfig
from deitkit.data import Dataset, UnreadableImage, load_data, refuse_among_images
from deitkit.data import dataset as scan
from deitkit.data.decode import regular_file
from deitkit.data.folder import FolderSplit, class_folders, class_folders_split
from deitkit.terminal import UserError

MakeFolder = Callable[[Mapping[str, int]], Path]
SPLITS = {"train/cat": 6, "train/dog": 4, "val/cat": 2, "val/dog": 1, "test/cat": 3, "test/dog": 3}
RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (6, 9, 3), np.uint8)
GREY = RANDOM.integers(0, 256, (6, 9), np.uint8)


def load(root: Path, **config: int) -> Dataset:
    return load_data(str(root), DataConfig(**config))


def names(dataset: Dataset, split: str) -> list[str]:
    opened = dataset.open_split(split)  # type: ignore[arg-type]
    return [opened.name(position) for position in range(len(opened))]


def test_three_splits_are_taken_as_they_are(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    dataset = load(root)
    assert dataset.classes == ("cat", "dog")
    assert dataset.name == "photos"
    assert dataset.mirror_safe
    assert dataset.image_size == (6, 5)
    assert dataset.channels == 3
    assert [len(dataset.open_split(split)) for split in ("train", "val", "test")] == [10, 3, 6]
    train = dataset.open_split("train")
    assert train.labels_N.tolist() == [0] * 6 + [1] * 4
    assert train.name(7) == str(root / "train/dog/001.png")
    np.testing.assert_array_equal(train.read(7), np.asarray(Image.open(train.name(7))))
    assert train.pixels_NHWC is None


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_folder_may_have_three_names(make_folder: MakeFolder, name: str) -> None:
    root = make_folder({key.replace("val/", f"{name}/"): count for key, count in SPLITS.items()})
    assert len(load(root).open_split("val")) == 3


def test_validation_images_are_held_out_of_train_where_there_is_no_folder(make_folder: MakeFolder) -> None:
    dataset = load(make_folder({"train/a": 20, "train/b": 10}))
    train, validation = names(dataset, "train"), names(dataset, "val")
    assert (len(train), len(validation)) == (27, 3)
    assert not set(train) & set(validation)
    assert not dataset.has_test
    with pytest.raises(UserError, match="photos has no test split, only train, val"):
        dataset.open_split("test")


def test_class_folders_alone_are_split_in_three(make_folder: MakeFolder) -> None:
    dataset = load(make_folder({"a": 20, "b": 10}))
    parts = [names(dataset, split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [21, 3, 6]
    assert len({name for part in parts for name in part}) == 30
    assert names(load(make_folder({}), data_seed=1), "test") != parts[2]


def test_subset_has_exactly_the_size_asked_for(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 20, "train/b": 10})
    dataset = load(root, train_images=9)
    assert np.bincount(dataset.open_split("train").labels_N).tolist() == [6, 3]
    assert set(names(dataset, "train")) < set(names(load(root, train_images=15), "train"))
    with pytest.raises(UserError, match="train_images is 28, but only 27"):
        load(root, train_images=28)


def test_hidden_and_other_files_are_ignored_and_deeper_images_found(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS | {".hidden/x": 1, "train/.cache": 1, "train/cat/more": 2})
    (root / "train/cat/.secret.png").write_bytes(b"")
    (root / "train/cat/notes.txt").write_text("hello")
    (root / "LICENSE").write_text("free")
    shutil.move(root / "train/cat/000.png", root / "train/cat/UPPER.PNG")
    found = [name.removeprefix(str(root / "train/cat") + os.sep) for name in names(load(root), "train")[:8]]
    assert found == ["001.png", "002.png", "003.png", "004.png", "005.png", "UPPER.PNG", "more/000.png", "more/001.png"]


def test_the_test_split_stays_shut_until_it_is_asked_for(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"garbage")
    (root / "test/cat").chmod(0)  # not even its file names can be listed, unless one is root
    try:
        dataset = load(root, max_bad_images=0)
        assert dataset.bad_images == ()
        dataset.open_split("train").read(0)
        dataset.open_split("val").read(0)
    finally:
        (root / "test/cat").chmod(0o755)
    assert dataset.has_test
    with pytest.raises(UnreadableImage, match=r"000\.png: not an image"):
        dataset.open_split("test").read(0)


def test_no_file_of_the_test_split_is_opened_in_class_folders(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder({"a": 20, "b": 10})
    test_names = names(load(root), "test")
    opened: list[str] = []

    def recorded(path: str, flags: int) -> int:
        opened.append(os.fspath(path))
        return regular_file(path, flags)

    for module in ("decode", "folder", "listing"):
        monkeypatch.setattr(f"deitkit.data.{module}.regular_file", recorded)
    dataset = load(root)
    for split in (dataset.open_split("train"), dataset.open_split("val")):
        split.content_hash()
        split.read(0)
    assert set(opened) == {str(path) for path in root.rglob("*.png")} - set(test_names)


def test_missing_path_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: does not exist"):
        load(tmp_path / "nowhere")


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no folders; expected train/"):
        load(tmp_path)


def test_folder_of_loose_images_is_refused(make_folder: MakeFolder) -> None:
    root = make_folder({"train": 3})
    with pytest.raises(UserError, match=r"train: holds no folders; expected one folder of images for each class"):
        load(root)


def test_folders_without_any_image_are_refused(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 0, "train/b": 0})
    with pytest.raises(UserError, match=r"no images in its folders; their names end in \.bmp"):
        load(root)


def test_class_without_training_images_is_named(make_folder: MakeFolder) -> None:
    with pytest.raises(UserError, match="train: no readable image of class 'owl'"):
        load(make_folder(SPLITS | {"train/owl": 0, "val/owl": 3, "test/owl": 1}))


@pytest.mark.parametrize("owls", [{}, {"val/owl": 0, "test/owl": 0}])
def test_a_class_that_validation_and_test_lack_is_allowed_and_said(
    make_folder: MakeFolder, owls: Mapping[str, int]
) -> None:
    dataset = load(make_folder(SPLITS | {"train/owl": 3} | owls))
    assert "no validation image of class 'owl': validation figures say nothing of it" in dataset.notes
    assert ("test/ has no folder 'owl'" in dataset.notes) is not bool(owls)
    assert np.bincount(dataset.open_split("val").labels_N, minlength=3).tolist() == [2, 1, 0]
    assert len(dataset.open_split("test")) == 6


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_only_another_split_has_is_refused(make_folder: MakeFolder, split: str) -> None:
    root = make_folder(SPLITS | {f"{split}/crow": 1})
    with pytest.raises(UserError, match=f"{split}/ has 'crow', which train/ lacks"):
        load(root)


def test_a_pipe_is_no_image_whatever_its_name(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 5, "b": 5})
    os.mkfifo(root / "a" / "pipe.png")
    dataset = load(root)
    assert not dataset.bad_images
    assert not any("pipe.png" in name for split in ("train", "val") for name in names(dataset, split))


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines"])
def test_a_class_that_cannot_be_written_down_is_refused(make_folder: MakeFolder, name: bytes) -> None:
    root = make_folder({"a": 5, "b": 5})
    os.mkdir(os.fsencode(root) + b"/" + name)  # noqa: PTH102
    with pytest.raises(UserError, match="characters that cannot be printed: rename it"):
        load(root)


def test_a_single_class_is_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(UserError, match="holds a single class, 'cat'"):
        load(make_folder({"train/cat": 5}))


def test_test_folder_without_train_folder_is_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(UserError, match="no train/ folder"):
        load(make_folder({"test/a": 2, "test/b": 2}))


def test_two_validation_folders_are_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(UserError, match="holds both val and validation"):
        load(make_folder(SPLITS | {"validation/cat": 1}))


def test_bad_images_are_named_counted_and_left_out(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    first = root / "train/cat/002.png"
    first.write_bytes(first.read_bytes()[:-30])
    second = root / "val/cat/000.png"
    second.write_bytes(b"")
    dataset = load(root)
    assert len(dataset.bad_images) == 2
    assert dataset.bad_images[0].startswith(f"{first}: ")
    assert dataset.bad_images[1] == f"{second}: the file is empty"
    assert str(first) not in names(dataset, "train")
    assert (len(dataset.open_split("train")), len(dataset.open_split("val"))) == (9, 2)
    with pytest.raises(UserError, match=r"2 of 13 images cannot be read, more than max_bad_images = 1.*002\.png"):
        load(root, max_bad_images=1)


def test_of_very_many_images_only_the_headers_are_read(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(SPLITS)
    path = root / "train/cat/000.png"
    path.write_bytes(path.read_bytes()[:-30])
    (root / "train/cat/001.png").write_bytes(b"")
    monkeypatch.setattr(scan, "WHOLE_LIMIT", 9)
    dataset = load(root)
    assert dataset.bad_images == (f"{root / 'train/cat/001.png'}: the file is empty",)
    with pytest.raises(UnreadableImage, match=r"000\.png: "):
        dataset.open_split("train").read(0)


def test_class_whose_images_are_all_bad_is_named(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    for path in (root / "train/dog").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(
        UserError,
        match=r"photos, training images: no readable image of class 'dog'.*000\.png: not an image.* and 3 more\)",
    ):
        load(root)


def test_an_image_that_vanishes_after_the_scan_is_unreadable_and_named(make_folder: MakeFolder) -> None:
    train = load(make_folder(SPLITS)).open_split("train")
    Path(train.name(3)).unlink()
    with pytest.raises(UnreadableImage, match=r"003\.png: no such file"):
        train.read(3)


def test_grey_only_if_every_scanned_image_is_grey(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    for path in root.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert load(root).channels == 1
    assert load(root).open_split("train").read(0).shape == (6, 5, 1)
    Image.new("RGB", (7, 6)).save(root / "train/dog/000.png")
    dataset = load(root)
    assert dataset.channels == 3
    assert dataset.image_size is None
    assert dataset.open_split("train").read(0).shape == (6, 5, 3)
    assert dataset.open_split("train").channels == 3


def test_coloured_test_image_becomes_grey_for_grey_data(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    for path in (*(root / "train").rglob("*.png"), *(root / "val").rglob("*.png")):
        Image.open(path).convert("L").save(path)
    test = load(root).open_split("test")
    expected = np.asarray(Image.open(test.name(0)).convert("L"))[..., None]
    np.testing.assert_array_equal(test.read(0), expected)


def test_split_survives_pickling(make_folder: MakeFolder) -> None:
    train = load(make_folder(SPLITS)).open_split("train")
    copy = pickle.loads(pickle.dumps(train))
    assert copy.name(4) == train.name(4)
    np.testing.assert_array_equal(copy.read(4), train.read(4))
    assert copy.content_hash() == train.content_hash()


def test_names_take_little_more_than_their_letters() -> None:
    names = [f"n{number:08}.JPEG".encode() for number in range(10_000)]
    places = [(Path("/photos/a"), "a/"), (Path("/photos/b"), "b/")]
    table = FolderSplit(Path("/photos"), places, [names, [b"0.png"]], np.repeat([0, 1], [10_000, 1]))
    assert table.key(0) == "a/n00000000.JPEG"
    assert table.path(9_999) == Path("/photos/a/n00009999.JPEG")
    assert len(table) == 10_001
    numbers = [pickle.dumps(array) for array in (table.labels_N, table.rows_N)]
    assert len(pickle.dumps(table)) - sum(map(len, numbers)) < 10_000 * (14 + 8 + 4) + 1000


def test_images_are_in_the_order_of_their_names_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("b.png", "B.png", "a10.png", "a9.png", "ä.png"):
        (tmp_path / "a" / name).touch()
    table = class_folders_split(tmp_path, class_folders(tmp_path), DataConfig())
    assert [table.key(row) for row in range(5)] == ["a/B.png", "a/a10.png", "a/a9.png", "a/b.png", "a/ä.png"]


def test_clothing_photos_are_all_readable(shared_data: Path) -> None:
    dataset = load(shared_data / "clothing", max_bad_images=0)
    assert len(dataset.classes) == 10
    assert dataset.channels == 3
    assert [len(dataset.open_split(split)) for split in ("train", "val", "test")] == [3068, 341, 372]
    assert min(dataset.open_split("train").read(0).shape[:2]) == 256


def test_a_link_to_a_pipe_is_no_image_and_one_in_circles_is_unreadable(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    os.mkfifo(root / "pipe")
    (root / "train/cat/pipe.png").symlink_to(root / "pipe")
    (root / "train/cat/self.png").symlink_to("self.png")
    dataset = load(root)
    assert len(dataset.open_split("train")) == 10
    assert len(dataset.bad_images) == 1
    assert "train/cat/self.png: too many levels of symbolic links" in dataset.bad_images[0]


@pytest.mark.parametrize("location", ["~nobodyhere/x", "/" + "x" * 5000])
def test_a_path_that_cannot_be_is_one_line(location: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_data(location, DataConfig())


def test_how_many_images_are_set_aside_is_known(make_folder: MakeFolder) -> None:
    assert load(make_folder({"cat": 10, "dog": 10})).set_aside == 4


def test_a_folder_that_would_be_taken_for_a_class_is_refused(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder({"cat": 3, "dog": 3})
    for out in ("run", "runs/first", "cat/run"):
        with pytest.raises(
            UserError, match=rf"{out}: lies among the images of .*photos and would be taken for a class"
        ):
            refuse_among_images(str(root), root / out)
    for out in (".runs/first", "../run", "../photos-run", "."):
        refuse_among_images(str(root), root / out)
    for elsewhere in ("digits", "~nobody-has-this-name", "x" * 9999, str(root / "none")):
        refuse_among_images(elsewhere, root / "run")
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match=r"runs/first: lies among the images of \. and"):
        refuse_among_images(".", Path("runs/first"))


def test_beside_a_train_folder_there_is_room_for_other_folders(make_folder: MakeFolder) -> None:
    root = make_folder({"train/cat": 3, "train/dog": 3})
    refuse_among_images(str(root), root / "runs" / "first")
    for out in ("train/run", "test", "val"):
        with pytest.raises(UserError, match="lies among the images"):
            refuse_among_images(str(root), root / out)
