"""What lies in a folder decides what it is: splits, classes, neither; and whatever is not used is counted and named."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from deitkit.config import DataConfig
from deitkit.data import Dataset, load_data, load_known
from deitkit.data.folder import role_of
from deitkit.data.listing import HIDDEN, LINK, OUTSIDE, SUFFIXES, Walk, left_out_line
from deitkit.terminal import UserError

MakeFolder = Callable[[Mapping[str, int]], Path]
COMPOSED, APART = (unicodedata.normalize(form, "Crème brûlée") for form in ("NFC", "NFD"))
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)


def load(root: Path, **config: int | bool) -> Dataset:
    return load_data(str(root), DataConfig.model_validate(config))


def sizes(dataset: Dataset) -> list[int]:
    return [len(dataset.open_split(name)) for name in dataset.split_names]


def names(dataset: Dataset) -> list[str]:
    splits = [dataset.open_split(name) for name in dataset.split_names]
    return [split.name(position) for split in splits for position in range(len(split))]


# ------------------------------------------------------------------------------------------- splits and classes


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Validation", "Testing"),
        ("TRAINING", "dev", "test_set"),
        ("train-data", "Valid", "TEST"),
    ],
)
def test_splits_are_known_by_their_names_however_written(
    make_folder: MakeFolder, train: str, val: str, test: str
) -> None:
    root = make_folder({f"{split}/{kind}": 3 for split in (train, val, test) for kind in ("cat", "dog")})
    dataset = load(root)
    assert dataset.classes == ("cat", "dog")
    assert sizes(dataset) == [6, 6, 6]
    assert dataset.remarks == []


@pytest.mark.parametrize("name", ["trainer", "tests", "contest", "valley", "1train", "latest", ""])
def test_other_words_name_no_split(name: str) -> None:
    assert role_of(name) is None


def test_the_nameless_one_of_several_folders_with_the_same_classes_is_for_training(make_folder: MakeFolder) -> None:
    dataset = load(make_folder({"images/cat": 3, "images/dog": 3, "Test/cat": 2, "Test/dog": 2}))
    assert sizes(dataset) == [4, 2, 4]
    assert dataset.remarks == ["images/ is taken for the training images"]


@pytest.mark.parametrize("one", ["fold1", "A"])
def test_folders_with_the_same_classes_and_no_telling_names_are_asked_about(make_folder: MakeFolder, one: str) -> None:
    root = make_folder({f"{split}/{kind}": 2 for split in (one, "other") for kind in ("cat", "dog")})
    with pytest.raises(
        UserError,
        match=r"hold the same folders \(cat, dog\), as splits do: give --train-folder NAME, or rename them to train, val and test, or",
    ):
        load(root)
    named = load_data(str(root), DataConfig(train_folder=one))
    assert (named.classes, len(named.open_split("train")) + len(named.open_split("val"))) == (("cat", "dog"), 4)
    assert any("other/ has the same folders" in line for line in named.remarks)
    with pytest.raises(UserError, match=r"--train-folder x: .* has no such folder, only"):
        load_data(str(root), DataConfig(train_folder="x"))
    (root / "train").mkdir()
    for name in (one, "other"):
        (root / name).rename(root / "train" / name)
    assert load(root).classes == (*sorted([one, "other"]),)


@pytest.mark.parametrize("inner", [["2020"], ["left", "right"]])
def test_folders_within_classes_that_differ_are_no_splits(make_folder: MakeFolder, inner: list[str]) -> None:
    root = make_folder({f"cat/{name}": 3 for name in inner} | {"dog/2020": 4, "dog/x": 1})
    assert load(root).classes == ("cat", "dog")


@pytest.mark.parametrize("name", ["train", "test", "Validation"])
def test_images_in_a_folder_beside_other_classes_make_it_a_class(make_folder: MakeFolder, name: str) -> None:
    dataset = load(make_folder({"bus": 5, "car": 5, name: 5}))
    assert dataset.classes == (*sorted(["bus", "car", name]),)
    assert dataset.remarks == [f"{name}/ holds images, no class folders: it is a class like those beside it"]


def test_a_split_in_form_beside_classes_in_form_is_asked_about(make_folder: MakeFolder) -> None:
    with pytest.raises(
        UserError, match="train/ holds folders, as a split does, but bus, car beside it hold images, as classes do"
    ):
        load(make_folder({"train/diesel": 3, "train/steam": 3, "bus": 3, "car": 3}))
    with pytest.raises(
        UserError, match="test/ holds folders of the same names as those beside it: put the others into train/"
    ):
        load(_classes_beside_a_test_split(make_folder))


def _classes_beside_a_test_split(make_folder: MakeFolder) -> Path:
    root = make_folder({}).parent / "beside"
    for place in ("bus", "car", "test/bus", "test/car"):
        (root / place).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(root / place / "1.png")
    return root


@pytest.mark.parametrize("split", ["test", "val", "Testing"])
@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ({"": 4}, "holds images without labels and is left out"),
        ({"/unknown": 4}, "has no class of train/, only 'unknown', and is left out"),
        ({}, "is empty and is left out"),
    ],
)
def test_a_split_without_labels_is_left_out_and_said(
    make_folder: MakeFolder, split: str, inside: Mapping[str, int], said: str
) -> None:
    root = make_folder({"train/cat": 6, "train/dog": 6} | {f"{split}{place}": count for place, count in inside.items()})
    (root / split).mkdir(exist_ok=True)
    dataset = load(root)
    assert sizes(dataset) == [10, 2]
    assert dataset.remarks == [f"{split}/ {said}"]


def test_folders_beside_the_splits_are_named_if_they_look_like_images_to_use(make_folder: MakeFolder) -> None:
    splits = {"train/cat": 5, "train/dog": 5, "val/cat": 2, "val/dog": 2}
    dataset = load(make_folder(splits | {"holdout/cat": 2, "holdout/dog": 2, "samples": 3, "runs/first": 2}))
    assert sizes(dataset) == [10, 4]
    assert dataset.remarks == [
        "holdout/ has the same folders as train/ and is left out: name it val or test to use it",
        "samples/ holds images beside the splits and is left out",
        "runs/ beside the splits is left out: 2 images",
    ]


@pytest.mark.parametrize(
    ("beside", "note"),
    [
        ({"val2/cat": 2}, "val2/ beside the splits is left out: 2 images"),
        ({"more/deep/cat": 3, "docs": 0}, "more/ beside the splits is left out: 3 images"),
        ({"augmented/cat_aug": 1, "augmented/dog_aug": 1}, "augmented/ beside the splits is left out: 2 images"),
    ],
)
def test_folders_beside_the_splits_with_images_at_any_depth_are_named(
    make_folder: MakeFolder, beside: dict[str, int], note: str
) -> None:
    assert load(make_folder({"train/cat": 5, "train/dog": 5} | beside)).remarks == [note]


def test_class_folders_of_a_split_that_hold_only_folders_are_named(make_folder: MakeFolder) -> None:
    (note,) = load(make_folder({"train/x/a": 5, "train/x/b": 3, "train/y": 4})).remarks
    assert note == "x/: no images directly inside; the images of the folders below are of that class"


def test_a_single_folder_is_pointed_at(make_folder: MakeFolder) -> None:
    root = make_folder({"archive/cat": 3, "archive/dog": 3, "__MACOSX/archive": 1})
    with pytest.raises(UserError, match=r"photos: holds a single folder: give .*photos/archive$"):
        load(root)
    root = make_folder(
        {"zip/archive/data/train/cat": 3, "zip/archive/data/train/dog": 3, "zip/archive/data/test/cat": 1}
    )
    with pytest.raises(UserError, match=r"zip: holds a single folder: give .*zip/archive/data$"):
        load(root / "zip")


@pytest.mark.parametrize("forms", [(COMPOSED, APART), (APART, COMPOSED)])
def test_names_are_the_same_however_their_accents_are_encoded(make_folder: MakeFolder, forms: tuple[str, str]) -> None:
    dataset = load(make_folder({"train/a": 4, f"train/{forms[0]}": 4, "val/a": 2, f"val/{forms[1]}": 3}))
    assert dataset.classes == (COMPOSED, "a")
    assert sizes(dataset) == [8, 5]


def test_two_folders_of_one_name_are_one_class_and_said(make_folder: MakeFolder) -> None:
    dataset = load(make_folder({"a": 5, COMPOSED: 5, APART: 5}))
    assert np.bincount(dataset.open_split("train").labels_N).tolist() == [7, 3]
    assert [line.partition("photos: ")[2] for line in dataset.remarks] == [
        f"2 folders are called {COMPOSED!r}, but for spaces or how letters are coded: they are one class"
    ]


def test_spaces_around_a_folder_s_name_make_no_class_of_its_own(make_folder: MakeFolder) -> None:
    dataset = load(make_folder({"train/a ": 5, "train/b": 5, "val/a": 3, "val/b ": 3, " test/b": 2}))
    assert (dataset.classes, sizes(dataset), dataset.has_test) == (("a", "b"), [10, 6, 2], True)


def test_folders_that_differ_in_spaces_are_one_class_and_said(make_folder: MakeFolder) -> None:
    dataset = load(make_folder({"a": 5, "a ": 5, "b": 5}))
    assert dataset.classes == ("a", "b")
    assert any("2 folders are called 'a'" in line for line in dataset.remarks)


def test_folders_below_a_class_without_images_of_its_own_are_said(make_folder: MakeFolder) -> None:
    dataset = load(make_folder({"animals/cat": 5, "animals/dog": 5, "plants/oak": 5, "stones": 5, "stones/deep": 2}))
    assert dataset.classes == ("animals", "plants", "stones")
    (line,) = [line for line in dataset.remarks if "directly inside" in line]
    assert "animals/, plants/: no images directly inside; the images of the folders below are of that class" in line


def test_validation_images_that_are_training_images_are_said(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 4, "train/b": 4, "val/a": 1, "val/b": 1})
    shutil.copy(root / "train/a/000.png", root / "val/b/copy.png")
    (line,) = [line for line in load(root).remarks if "too good" in line]
    assert "1 of 3 validation images are among the training images too: validation figures are too good" in line


# ------------------------------------------------------------------------------------------------ what is left out


def test_system_folders_and_hidden_files_are_passed_over_and_counted(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 5, "b": 5, "a/@eaDir/000.png": 1, "b/.thumbnails": 3, "__MACOSX/a": 2, "a/deep/@eaDir": 2})
    for name in ("Thumbs.db", ".DS_Store", "._000.png", "desktop.ini"):
        (root / "b" / name).write_bytes(b"x")
    dataset = load(root)
    assert len(names(dataset)) == 10
    assert dataset.left_out == {HIDDEN: 8}
    assert dataset.remarks == ["left out: 8 hidden or system entries"]


@pytest.mark.parametrize("suffix", [".heic", ".HEIC", ".heif"])
def test_files_that_need_another_package_are_counted_with_its_name(make_folder: MakeFolder, suffix: str) -> None:
    root = make_folder({"a": 5, "b": 5})
    for number in range(20):
        (root / "a" / f"IMG_{number}{suffix}").write_bytes(HEIC)
    (root / "b" / "note.txt").write_text("hello")
    (root / "b" / "LICENSE").write_text("free")
    (root / "b" / "photo.nef").write_bytes(b"II*\0" + bytes(100))
    (root / "b" / "000.png").write_bytes(b"")
    kind = f"20 {suffix.lower()} files (pip install pillow-heif)"
    rest = "1 file without a suffix, 1 .nef file (save them as JPEG or PNG), 1 .txt file, 1 unreadable"
    assert load(root).remarks == [f"left out: {kind}, {rest}"]


def test_a_class_of_which_no_file_can_be_used_is_told_with_the_reason(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 5, "b": 5, "mug": 0})
    (root / "mug" / "1.heic").write_bytes(HEIC)
    with pytest.raises(
        UserError, match=r"1 \.heic file \(pip install pillow-heif\)\): no readable image of class 'mug'"
    ):
        load(root)


@pytest.mark.parametrize("name", ["000", "000.img", "photo.txt", "x.avif", "scan.tga"])
def test_whatever_pillow_reads_is_an_image_whatever_its_suffix(make_folder: MakeFolder, name: str) -> None:
    root = make_folder({"a": 5, "b": 5})
    kind = {"x.avif": "AVIF", "scan.tga": "TGA"}.get(name, "JPEG")
    Image.new("RGB", (20, 20), "red").save(root / "a" / name, kind)
    dataset = load(root)
    assert str(root / "a" / name) in names(dataset)
    assert dataset.remarks == []


@pytest.mark.parametrize(
    "content", [b"P6 is a format", b"BMP", b"\0\0\2\0", b"#define x_width 3\n", b"%!PS-Adobe EPSF", b"GIF89a", b""]
)
def test_what_only_begins_like_an_image_is_none(make_folder: MakeFolder, content: bytes) -> None:
    root = make_folder({"a": 5, "b": 5})
    (root / "a" / "notes.txt").write_bytes(content)
    assert load(root).left_out == {".txt": 1}


def test_files_with_a_known_suffix_are_not_opened_to_be_listed(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder({"a": 3})
    for suffix in SUFFIXES:
        (root / "a" / f"x{suffix.upper()}").write_bytes(b"")
    monkeypatch.setattr("deitkit.data.listing._is_image", lambda *_: pytest.fail("opened"))
    ((*found,),) = Walk().images([os.fsencode(root / "a")])
    assert len(found) == 3 + len(SUFFIXES)


def test_images_outside_the_class_folders_are_counted(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 5, "train/b": 5, "train": 2, "val/a": 1, "val/b": 1})
    Image.new("RGB", (4, 4)).save(root / "cover.png")
    (root / "README.md").write_text("hello")
    (root / "train" / "x.heic").write_bytes(HEIC)
    assert load(root).left_out == {OUTSIDE: 3, ".heic": 1, ".md": 1}


def test_left_out_is_one_line_the_commonest_first() -> None:
    assert left_out_line({}) == ""
    assert left_out_line({}, 3) == "left out: 3 unreadable"
    assert left_out_line({".txt": 1, "": 1200, LINK: 1}) == (
        "left out: 1,200 files without a suffix, 1 .txt file, 1 link to folders that are read elsewhere"
    )


# ----------------------------------------------------------------------------------------------------------- links


def test_links_to_folders_are_followed_once(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder({"a": 3, "b": 3, "b/inner": 2})
    pool = tmp_path / "pool"
    pool.mkdir()
    for number in range(4):
        Image.new("RGB", (5, 5), (number, 0, 0)).save(pool / f"p{number}.png")
    (root / "a" / "more").symlink_to(pool)
    (root / "b" / "again").symlink_to(pool)
    (root / "a" / "borrowed").symlink_to(root / "b" / "inner")
    (root / "b" / "circle").symlink_to(root / "b")
    (root / "b" / "up").symlink_to("/")
    dataset = load(root)
    assert len(names(dataset)) == 12
    assert sum("/a/more/p" in name for name in names(dataset)) == 4
    assert sum("/b/inner/" in name for name in names(dataset)) == 2
    assert dataset.left_out == {LINK: 4}


def test_class_folders_may_be_links_and_one_in_a_circle_is_no_class(make_folder: MakeFolder, tmp_path: Path) -> None:
    pool = make_folder({"cats": 5, "dogs": 5})
    root = tmp_path / "linked"
    root.mkdir()
    (root / "a").symlink_to(pool / "cats")
    (root / "b").symlink_to(pool / "dogs")
    (root / "self").symlink_to(root)
    (root / "loop").symlink_to("loop")
    dataset = load(root)
    assert dataset.classes == ("a", "b")
    assert len(names(dataset)) == 10


# ------------------------------------------------------------------------------------------- every file is accounted for

FILES = st.sampled_from(
    ["1.png", "2.JPG", "img", "3.heic", "note.txt", ".hidden.png", "Thumbs.db", "4.gif", "data.bin", "5.cr2"]
)
FOLDERS = st.lists(st.sampled_from(["x", "y", "@eaDir", ".git", "z z", "ü"]), max_size=3).map("/".join)
TREES = st.dictionaries(FOLDERS, st.sets(FILES, max_size=4), max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=TREES, second=TREES, link=st.sampled_from(["", "b", ".", "a/x"]))
def test_every_image_is_used_once_or_named_as_left_out(
    tmp_path_factory: pytest.TempPathFactory, first: dict[str, set[str]], second: dict[str, set[str]], link: str
) -> None:
    root = tmp_path_factory.mktemp("tree")
    sound = {".png", ".jpg", ".gif", ""}
    for kind, tree in (("a", first), ("b", second)):
        (root / kind).mkdir()
        Image.new("L", (3, 3)).save(root / kind / "0.png")
        for folder, files in tree.items():
            (root / kind / folder).mkdir(parents=True, exist_ok=True)
            for name in files:
                path = root / kind / folder / name
                content = {"3.heic": HEIC, "note.txt": b"hello", "data.bin": b"\1\2\3"}.get(name)
                Image.new("L", (3, 3)).save(path, "PNG") if content is None else path.write_bytes(content)
    if link and (root / link).is_dir():
        (root / "a" / "link").symlink_to(root / link)
    walk = Walk()
    found = walk.images([os.fsencode(root / kind) for kind in "ab"])
    used = [
        os.path.realpath(root / kind / os.fsdecode(name))
        for kind, some in zip("ab", found, strict=True)
        for name in some
    ]
    assert len(used) == len(set(used))
    hidden = re.compile(r"/(\.|@eaDir|Thumbs\.db)")
    below = [str(path) for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    visible = [path for path in below if not hidden.search(path.removeprefix(str(root)))]
    assert {path for path in visible if Path(path).suffix.lower() in sound} == set(used)
    others = [path for path in visible if Path(path).suffix.lower() not in sound]
    assert sum(count for kind, count in walk.left_out.items() if kind not in (HIDDEN, LINK)) == len(others)
    assert (walk.left_out[HIDDEN] > 0) is (
        len(below) > len(visible) or any(hidden.search(f"/{path.name}") for path in root.rglob("*"))
    )


# --------------------------------------------------------------------------------------- images for a known network


def test_all_images_of_class_folders_are_measured_by_the_names_of_their_classes(make_folder: MakeFolder) -> None:
    root = make_folder({"cat": 4, "ant": 3, "yak": 2})
    dataset = load_known(str(root), DataConfig(), ("ant", "bee", "cat"))
    split = dataset.open_split("test")
    assert dataset.classes == ("ant", "bee", "cat")
    assert np.bincount(split.labels_N, minlength=3).tolist() == [3, 0, 4]
    assert {Path(split.name(position)).parent.name: int(label) for position, label in enumerate(split.labels_N)} == {
        "ant": 0,
        "cat": 2,
    }
    assert dataset.notes == [
        "photos: images of class 'yak' are left out: the class is not known",
        "photos: has no image of class 'bee'",
    ]
    with pytest.raises(
        UserError, match=r"photos: has other classes \(ant, cat, yak\) than those that are known \(one, two\)"
    ):
        load_known(str(root), DataConfig(), ("one", "two"))


def test_of_images_that_are_split_the_split_is_measured(make_folder: MakeFolder) -> None:
    root = make_folder({"train/cat": 4, "train/dog": 4, "test/cat": 2, "test/dog": 3})
    dataset = load_known(str(root), DataConfig(), ("ant", "cat", "dog"))
    assert dataset.open_split("test").labels_N.tolist() == [1, 1, 2, 2, 2]
    assert set(dataset.open_split("train").labels_N.tolist()) == {1, 2}


@pytest.mark.parametrize("counts", [{"cat": 1}, {"cat": 1, "dog": 1}])
def test_a_single_image_is_enough_to_be_measured(make_folder: MakeFolder, counts: Mapping[str, int]) -> None:
    split = load_known(str(make_folder(counts)), DataConfig(), ("cat", "dog")).open_split("val")
    assert len(split) == len(counts)


# ------------------------------------------------------------------------------------------- whole data folders

CLASSES = st.sampled_from(["cat", "dog", "Owl", "test", "ü"])
PLACES = st.sampled_from(
    ["", "train", "Validation", "Test_set", "extra", "unlabelled", "cat/inner", "Train/dog", "dog", "train/ü", ".git"]
)
CONTENTS = st.sets(
    st.sampled_from(["1.png", "2.JPG", "img", "notes.txt", ".hidden.png", "Thumbs.db"]), min_size=1, max_size=5
)
SPLITS = st.tuples(
    st.sampled_from(["train", "Train", "TRAINING", "training_data"]), st.sampled_from([None, "val", "Valid", "dev"]),
    st.sampled_from([None, "test", "Testing", "TEST-set"]),
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    splits=st.just(("",)) | SPLITS,
    classes=st.sets(CLASSES, min_size=2, max_size=3),
    more=st.dictionaries(PLACES, CONTENTS, max_size=2),
    unlabelled=st.booleans(),
)
def test_every_image_of_a_data_folder_is_used_once_or_said_to_be_left_out(
    tmp_path_factory: pytest.TempPathFactory,
    splits: tuple[str | None, ...],
    classes: set[str],
    more: dict[str, set[str]],
    unlabelled: bool,
) -> None:
    """Class folders, or splits of such however they are called, and whatever else lies among them. What is refused is a UserError."""
    root = tmp_path_factory.mktemp("data")
    sound = {
        f"{split}/{kind}": {"a.png", "b.png", "c.png"} for split in splits if split is not None for kind in classes
    }
    for place, contents in [*sound.items(), *more.items()]:
        folder = root / place.strip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name in contents:
            path = folder / name
            path.write_text("x") if name in ("notes.txt", "Thumbs.db") else Image.new("L", (3, 3), 99).save(path, "PNG")
    try:
        dataset = load(root, unlabelled=unlabelled)
        used = [os.path.realpath(name) for name in names(dataset)]
    except UserError:
        event("refused")
        return
    event("taken")
    assert len(used) == len(set(used))
    below = {
        str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file() and path.name != "notes.txt"
    }
    images = {os.path.realpath(path) for name, path in below.items() if not re.search(r"(^|/)(\.|Thumbs\.db)", name)}
    assert set(used) <= images
    said = [remark.partition("/ ")[0] for remark in [*dataset.remarks, *dataset.notes] if "left out" in remark]
    said += ["unlabelled"] if dataset.more_unlabelled else []  # a line says so
    missing = [path for path in images - set(used) if os.path.relpath(path, root).split("/")[0] not in said]
    assert len(missing) <= dataset.left_out.get(OUTSIDE, 0), (missing, dataset.remarks)
