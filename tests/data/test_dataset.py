"""Splits and subsets are stratified, exact, nested, and functions of the seed alone; images without labels move no other
split; scans and content hashes are made again when an image changes, and only then."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from deitkit import cli
from deitkit.config import DataConfig
from deitkit.data import Dataset, arrow, caching, dataset, load_data
from deitkit.data import folder as image_files
from deitkit.data.arrow import write_resized
from deitkit.data.caching import cache_folder
from deitkit.data.dataset import (
    NO_LABEL,
    Split,
    held_out,
    held_out_test,
    stratified_subset,
    train_and_validation,
)
from deitkit.data.decode import ImageFile, Shape
from deitkit.data.folder import FolderSplit
from deitkit.terminal import UserError

MakeFolder = Callable[[Mapping[str, int]], Path]
SPLITS = {"train/cat": 6, "train/dog": 4, "val/cat": 2, "val/dog": 1, "test/cat": 3, "test/dog": 3}
LAYOUTS = {
    "splits": {"train/cat": 6, "train/dog": 4, "unlabelled": 5, "test/cat": 3, "test/dog": 3},
    "classes": {"cat": 10, "dog": 8, "unlabelled": 5},
}
LABELS = np.repeat([0, 1, 2, 1, 0], [40, 7, 100, 13, 20])
label_lists = st.lists(st.integers(1, 30), min_size=2, max_size=6).map(
    lambda counts: np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
)


def counts(labels: NDArray[np.int64]) -> list[int]:
    return np.bincount(labels, minlength=3).tolist()


def test_each_class_gives_its_share() -> None:
    assert counts(LABELS[held_out(LABELS, 0.1, seed=0)]) == [6, 2, 10]
    assert counts(LABELS[held_out_test(LABELS, seed=0)]) == [12, 4, 20]


@given(labels=label_lists, share=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_each_class_keeps_an_image_on_both_sides_where_it_has_two(
    labels: NDArray[np.int64], share: float, seed: int
) -> None:
    held = held_out(labels, share, seed)
    for label, count in enumerate(np.bincount(labels)):
        out = int(held[labels == label].sum())
        assert (1 <= out <= count - 1) if count >= 2 else out == 0


def test_a_class_of_two_images_gives_none_to_the_test_split() -> None:
    assert counts(np.array([0, 0, 1, 1, 1])[held_out_test(np.array([0, 0, 1, 1, 1]), seed=3)]) == [0, 1, 0]


def test_the_split_is_a_function_of_the_seed() -> None:
    assert np.array_equal(held_out(LABELS, 0.1, seed=1), held_out(LABELS, 0.1, seed=1))
    assert not np.array_equal(held_out(LABELS, 0.1, seed=1), held_out(LABELS, 0.1, seed=2))


def test_test_and_validation_images_are_drawn_apart() -> None:
    assert not np.array_equal(held_out(LABELS, 0.2, seed=0, keep=2), held_out_test(LABELS, seed=0))


@given(labels=label_lists, seed=st.integers(0, 5))
def test_subsets_are_exact_nested_and_stratified(labels: NDArray[np.int64], seed: int) -> None:
    totals = np.bincount(labels)
    smaller: set[int] = set()
    for size in range(len(totals), len(labels) + 1):
        chosen = stratified_subset(labels, size, seed)
        assert len(set(chosen.tolist())) == size
        assert np.all(np.diff(chosen) > 0)
        assert smaller <= set(chosen.tolist())
        assert np.all(np.bincount(labels[chosen], minlength=len(totals)) >= 1)
        smaller = set(chosen.tolist())


@pytest.mark.parametrize("size", [30, 77, 100, 179])
def test_subset_keeps_the_classes_proportions_within_an_image(size: int) -> None:
    got = np.bincount(LABELS[stratified_subset(LABELS, size, 0)])
    assert np.all(np.abs(got - size * np.bincount(LABELS) / len(LABELS)) <= 1)


def test_balanced_subset_is_balanced() -> None:
    labels = np.arange(1000) % 10
    assert np.bincount(labels[stratified_subset(labels, 200, 0)]).tolist() == [20] * 10


def test_subset_is_a_function_of_the_seed() -> None:
    assert not np.array_equal(stratified_subset(LABELS, 50, 0), stratified_subset(LABELS, 50, 1))


@pytest.mark.parametrize(("size", "why"), [(181, "only 180 training images"), (2, "each of the 3 classes")])
def test_impossible_subset_is_refused(size: int, why: str) -> None:
    with pytest.raises(UserError, match=f"train_images is {size}.*{why}"):
        stratified_subset(LABELS, size, 0)


def test_subset_leaves_the_validation_images_alone() -> None:
    everything = train_and_validation(LABELS, DataConfig(), has_validation=False)
    few = train_and_validation(LABELS, DataConfig(train_images=50), has_validation=False)
    assert np.array_equal(everything[1], few[1])
    assert len(few[0]) == 50
    assert set(few[0]) <= set(everything[0])
    assert not set(everything[0]) & set(everything[1])


def test_nothing_is_held_out_where_a_validation_split_exists() -> None:
    train, validation = train_and_validation(LABELS, DataConfig(), has_validation=True)
    assert len(train) == len(LABELS)
    assert len(validation) == 0


def test_single_images_leave_nothing_to_validate_on() -> None:
    with pytest.raises(UserError, match="no image is left to validate on"):
        train_and_validation(np.arange(4), DataConfig(), has_validation=False)


def test_a_million_labels_are_split() -> None:
    labels = np.random.default_rng(0).integers(0, 1000, 1_281_167)
    train, validation = train_and_validation(labels, DataConfig(train_images=100_000), has_validation=False)
    assert len(train) == 100_000
    assert abs(len(validation) - 128_117) < 1000


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
    assert train.key(len(train) - 1).endswith("unlabelled/004.png")


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
    assert both.names_hash()["names_hash"]["train"] != whole.names_hash()["names_hash"]["train"]


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
    assert ["unlabelled", "5", "0"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert picture.is_file()


def content_hash(root: Path) -> str:
    return load(root).open_split("train").content_hash()


def test_content_hash_changes_with_one_pixel_one_label_one_image_and_the_order(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    seen = [content_hash(root)]
    assert content_hash(root) == seen[0]

    path = root / "train/cat/000.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    seen.append(content_hash(root))

    shutil.move(path, root / "train/dog/900.png")
    seen.append(content_hash(root))

    shutil.copy(root / "train/dog/000.png", root / "train/dog/901.png")
    seen.append(content_hash(root))

    shutil.move(root / "train/dog/900.png", root / "train/dog/902.png")
    seen.append(content_hash(root))
    assert len(set(seen)) == 5


def test_content_hash_does_not_depend_on_where_the_folder_lies(make_folder: MakeFolder, tmp_path: Path) -> None:
    root = make_folder(SPLITS)
    shutil.copytree(root, tmp_path / "elsewhere")
    assert content_hash(root) == content_hash(tmp_path / "elsewhere")


def cached_hash(root: Path) -> str:
    return load(root).open_split("train").cached_content_hash()


def test_images_that_did_not_change_are_not_hashed_again(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(SPLITS)
    read: list[str] = []
    content = FolderSplit._content

    def watched(self: FolderSplit, position: int) -> bytes:
        read.append(self.path(position).name)
        return content(self, position)

    monkeypatch.setattr(FolderSplit, "_content", watched)
    first = cached_hash(root)
    assert read.count("000.png") == 2
    read.clear()
    assert cached_hash(root) == first == content_hash(root)
    assert read.count("000.png") == 2  # by `content_hash` alone
    (root / "train/cat/000.png").touch()
    assert cached_hash(root) == first


def test_a_cached_content_hash_changes_with_the_images(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    path = root / "train/cat/000.bmp"
    Image.open(root / "train/cat/000.png").save(path)
    seen = [cached_hash(root)]
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # a pixel
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as large and as old as it was
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    seen.append(cached_hash(root))
    shutil.copy(root / "train/dog/000.png", root / "train/dog/901.png")
    seen.append(cached_hash(root))
    shutil.move(root / "train/dog/901.png", root / "train/cat/901.png")
    seen.append(cached_hash(root))
    assert len(set(seen)) == 4
    (root / "train/cat/901.png").unlink()
    assert cached_hash(root) == seen[1]
    assert cached_hash(root) == content_hash(root)


def test_content_hashes_are_computed_where_nothing_can_be_cached(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("deitkit.data.caching.cache_folder", lambda: tmp_path / "file")
    root = make_folder(SPLITS)
    assert cached_hash(root) == content_hash(root)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64])
def test_a_damaged_cache_is_made_again(make_folder: MakeFolder, content: bytes) -> None:
    root = make_folder(SPLITS)
    (root / "train/cat/000.png").write_bytes(b"no image")
    expected = cached_hash(root)
    for kind in ("hashes", "scans"):
        for file in (caching.cache_folder() / kind).iterdir():
            file.write_bytes(content)
    assert cached_hash(root) == expected
    assert len(load(root).open_split("train")) == 9


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all images that are probed from now on, without their folders."""
    seen: list[str] = []
    probe = image_files.probe

    def watched(source: ImageFile, name: str, *, whole: bool, max_pixels: int) -> Shape:
        seen.append(name.rpartition("/")[2])
        return probe(source, name, whole=whole, max_pixels=max_pixels)

    monkeypatch.setattr(image_files, "probe", watched)
    monkeypatch.setattr(arrow, "probe", watched)
    return seen


def facts(data: Dataset) -> tuple[object, ...]:
    splits = [contents(data.open_split(name)) for name in ("train", "val")]
    return data.bad_images, data.channels, data.image_size, splits


@pytest.mark.parametrize("layout", ["splits", "classes", "resized", "parquet"])
def test_photos_that_did_not_change_are_not_scanned_again(
    make_folder: MakeFolder, tmp_path: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = make_folder(SPLITS if layout != "classes" else LAYOUTS["classes"])
    if layout == "resized":
        write_resized(load(root), DataConfig(), 4, tmp_path / "small", lambda _: None)
        root = tmp_path / "small"
    elif layout == "parquet":
        images = [path.read_bytes() for path in sorted(root.rglob("train/*/*.png"))]
        Image.new("RGB", (9, 9)).save(root / "larger.png")
        table = pa.table({"image": [*images, (root / "larger.png").read_bytes()], "label": [0] * 6 + [1] * 5})
        root = tmp_path / "hub"
        root.mkdir()
        pq.write_table(table, root / "train-0.parquet")
    scanned.clear()
    first = facts(load(root))
    assert len(scanned) >= 11
    scanned.clear()
    assert facts(load(root)) == first
    assert scanned == []


def test_a_photo_that_changed_is_scanned_again(make_folder: MakeFolder, scanned: list[str]) -> None:
    root = make_folder(SPLITS)
    path = root / "train/dog/002.png"
    before = path.stat()
    load(root)
    content = path.read_bytes()
    path.write_bytes(content[:-30] + bytes(30))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as large and as old as it was
    scanned.clear()
    (message,) = load(root).bad_images
    assert message.startswith(f"{path}: ")
    assert scanned.count("000.png") == 2  # the training images, no others
    Image.new("L", (50, 60)).save(path)
    data = load(root)
    assert data.bad_images == ()
    assert data.image_size is None
    (root / "val/cat/900.png").write_bytes(content)
    assert len(load(root).open_split("val")) == 4


def test_an_unreadable_photo_is_tried_again_and_named_each_time(make_folder: MakeFolder, scanned: list[str]) -> None:
    """The fault may have been the disk's, and the folder may be called otherwise."""
    root = make_folder(SPLITS)
    (root / "train/dog/002.png").write_bytes(b"no image")
    load(root)
    scanned.clear()
    assert load(root).bad_images == (f"{root / 'train/dog/002.png'}: not an image of a known format",)
    assert scanned == ["002.png"]
    root = root.rename(root.with_name("pictures"))
    assert load(root).bad_images == (f"{root / 'train/dog/002.png'}: not an image of a known format",)
    assert scanned == ["002.png"] * 2


def test_a_scan_of_headers_does_not_stand_for_a_whole_one(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(SPLITS)
    path = root / "train/cat/000.png"
    path.write_bytes(path.read_bytes()[:-30])
    with monkeypatch.context() as patched:
        patched.setattr(dataset, "WHOLE_LIMIT", 9)
        assert load(root).bad_images == ()
    assert len(load(root).bad_images) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"HOME": "/somewhere"}, "/somewhere/.cache/deitkit"),
        ({"HOME": "/somewhere", "XDG_CACHE_HOME": "/caches"}, "/caches/deitkit"),
        ({"HOME": "/somewhere", "XDG_CACHE_HOME": "caches"}, "/somewhere/.cache/deitkit"),
        ({"HOME": "/somewhere", "XDG_CACHE_HOME": ""}, "/somewhere/.cache/deitkit"),
    ],
)
def test_the_cache_is_where_the_user_wants_it(
    changes: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == expected


def test_a_user_without_a_home_has_a_cache_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_cls: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(none))
    assert cache_folder().name.startswith("deitkit-")
