"""Parquet folders as the hub serves them."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deitkit.config import DataConfig
from deitkit.data import Dataset, UnreadableImage, load_data
from deitkit.data import tables as parquet
from deitkit.terminal import UserError

pytestmark = pytest.mark.usefixtures("home")

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (40, 6, 5, 3), np.uint8)
LABELS = (np.arange(40) % 2).tolist()


def encoded(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(
    path: Path,
    images: list[bytes | None],
    labels: list[Any],
    *,
    image: str = "img",
    label: str = "label",
    names: list[str] | None = None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.array(
        [{"bytes": content, "path": None} for content in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({image: struct, label: labels})
    if names:
        features = {label: {"names": names, "_type": "ClassLabel"}, image: {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two training shards, one of test images, all of one size."""
    images = [encoded(image) for image in PIXELS]
    root = tmp_path / "pets"
    write(root / "train-00000-of-00002.parquet", images[:20], LABELS[:20], names=["cat", "dog"])
    write(root / "train-00001-of-00002.parquet", images[20:30], LABELS[20:30], names=["cat", "dog"])
    write(root / "test-00000-of-00001.parquet", images[30:], LABELS[30:], names=["cat", "dog"])
    return root


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Images of many sizes."""
    images = [encoded(PIXELS[row, : 3 + row % 3]) for row in range(30)]
    write(tmp_path / "mixed/train-00000-of-00001.parquet", images, LABELS[:30], names=["cat", "dog"])
    write(tmp_path / "mixed/test-00000-of-00001.parquet", images[:4], LABELS[:4], names=["cat", "dog"])
    return tmp_path / "mixed"


def load(root: Path, **config: int) -> Dataset:
    return load_data(str(root), DataConfig(**config))


def row_of(name: str) -> int:
    return int(name[name.index("[") + 1 : -1])


def test_images_of_one_size_are_decoded_into_memory_pixel_for_pixel(folder: Path) -> None:
    dataset = load(folder)
    assert (dataset.name, dataset.classes, dataset.channels) == ("pets", ("cat", "dog"), 3)
    assert dataset.image_size == (6, 5)
    assert dataset.has_test
    rows = []
    for split, length in (("train", 26), ("val", 4)):
        opened = dataset.open_split(split)  # type: ignore[arg-type]
        assert len(opened) == length
        for position in range(length):
            row = row_of(opened.name(position))
            np.testing.assert_array_equal(opened.read(position), PIXELS[row])
            assert opened.pixels_NHWC is not None
            np.testing.assert_array_equal(opened.pixels_NHWC[position], PIXELS[row])
            assert opened.labels_N[position] == LABELS[row]
            rows.append(row)
    assert sorted(rows) == list(range(30))
    np.testing.assert_array_equal(dataset.open_split("test").pixels_NHWC, PIXELS[30:])
    assert dataset.open_split("test").name(3) == "test[3]"


def test_a_split_is_opened_once(folder: Path) -> None:
    dataset = load(folder)
    assert dataset.open_split("train") is dataset.open_split("train")
    assert dataset.open_split("test") is dataset.open_split("test")


@pytest.mark.parametrize("below", ["data", "plain_text"])
@pytest.mark.parametrize("validation", ["validation", "valid"])
def test_files_may_lie_in_a_folder_below_with_a_validation_split(tmp_path: Path, below: str, validation: str) -> None:
    images = [encoded(image) for image in PIXELS]
    for name, part in (("train", slice(0, 20)), (validation, slice(20, 30)), ("test", slice(30, 40))):
        path = tmp_path / f"pets/{below}/{name}-00000-of-00001.parquet"
        write(path, images[part], LABELS[part], image="image", label="fine_label", names=["cat", "dog"])
    dataset = load(tmp_path / "pets")
    np.testing.assert_array_equal(dataset.open_split("train").pixels_NHWC, PIXELS[:20])
    np.testing.assert_array_equal(dataset.open_split("val").pixels_NHWC, PIXELS[20:30])
    np.testing.assert_array_equal(dataset.open_split("test").pixels_NHWC, PIXELS[30:])


def test_images_of_many_sizes_stay_encoded_and_come_back_pixel_for_pixel(mixed: Path) -> None:
    dataset = load(mixed)
    assert dataset.image_size is None
    for split in (dataset.open_split("train"), dataset.open_split("val"), dataset.open_split("test")):
        assert split.pixels_NHWC is None
        split.read(0)
        pickled = pickle.dumps(split)
        assert len(pickled) < 3000  # a loader worker gets the address, not the images
        copy = pickle.loads(pickled)
        assert copy.content_hash() == split.content_hash()
        for position in range(len(split)):
            row = row_of(split.name(position))
            np.testing.assert_array_equal(copy.read(position), PIXELS[row, : 3 + row % 3])
            assert split.labels_N[position] == LABELS[row]


def test_images_that_do_not_fit_stay_encoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MEMORY_LIMIT_BYTES", PIXELS[:29].nbytes)
    dataset = load(folder)
    assert dataset.image_size == (6, 5)
    train = dataset.open_split("train")
    assert train.pixels_NHWC is None
    for position in range(len(train)):
        np.testing.assert_array_equal(train.read(position), PIXELS[row_of(train.name(position))])


def test_what_a_killed_process_left_of_unpacking_goes(mixed: Path, home: Path) -> None:
    load(mixed)
    (unpacked,) = (home / ".cache/deitkit/parquet").glob("*.arrow")
    part = unpacked.with_name(f".{unpacked.name}.a1b2")
    unpacked.rename(part)
    load(mixed)
    assert unpacked.is_file()
    assert not part.exists()


def test_unpacked_images_are_used_again_until_the_files_change(mixed: Path, home: Path) -> None:
    load(mixed)
    (unpacked,) = (home / ".cache/deitkit/parquet").glob("*.arrow")
    before = unpacked.stat().st_mtime_ns
    load(mixed)
    assert unpacked.stat().st_mtime_ns == before
    images = [encoded(PIXELS[row, : 4 + row % 2]) for row in range(30)]
    write(mixed / "train-00000-of-00001.parquet", images, LABELS[:30])
    train = load(mixed).open_split("train")
    row = row_of(train.name(0))
    np.testing.assert_array_equal(train.read(0), PIXELS[row, : 4 + row % 2])


@pytest.mark.parametrize("kind", ["folder", "mixed"])
def test_the_test_file_is_not_even_opened_until_it_is_asked_for(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root: Path = request.getfixturevalue(kind)
    path = root / "test-00000-of-00001.parquet"
    path.write_bytes(b"garbage")
    opened = []
    original = pq.ParquetFile

    def recorded(source: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(Path(source).name)
        return original(source, *arguments, **options)

    monkeypatch.setattr(pq, "ParquetFile", recorded)
    dataset = load(root)
    for split in (dataset.open_split("train"), dataset.open_split("val")):
        split.content_hash()
        split.read(0)
    assert path.name not in opened
    with pytest.raises(UserError, match=r"test-00000-of-00001\.parquet: cannot be read as Parquet"):
        dataset.open_split("test")


def test_bad_images_are_named_by_file_and_row_and_left_out(tmp_path: Path) -> None:
    images: list[bytes | None] = [encoded(image) for image in PIXELS[:30]]
    images[0], images[23] = None, encoded(PIXELS[23])[:-40]
    write(tmp_path / "pets/train-00000-of-00002.parquet", images[:20], LABELS[:20])
    write(tmp_path / "pets/train-00001-of-00002.parquet", images[20:], LABELS[20:30])
    dataset = load(tmp_path / "pets")
    assert dataset.bad_images[0].endswith("train-00000-of-00002.parquet row 0: the file is empty")
    assert "train-00001-of-00002.parquet row 3: " in dataset.bad_images[1]
    rows = set()
    for split in (dataset.open_split("train"), dataset.open_split("val")):
        rows |= {row_of(split.name(position)) for position in range(len(split))}
        for position in range(len(split)):
            np.testing.assert_array_equal(split.read(position), PIXELS[row_of(split.name(position))])
    assert rows == set(range(30)) - {0, 23}
    with pytest.raises(UserError, match=r"2 of 30 images cannot be read, more than max_bad_images = 1"):
        load(tmp_path / "pets", max_bad_images=1)


def test_bad_image_of_many_sizes_is_named_by_file_and_row(mixed: Path) -> None:
    shutil.move(mixed / "train-00000-of-00001.parquet", mixed / "train-00000-of-00002.parquet")
    write(mixed / "train-00001-of-00002.parquet", [encoded(PIXELS[0]), b"junk"], [0, 1])
    assert load(mixed).bad_images == (
        f"{mixed / 'train-00001-of-00002.parquet'} row 1: not an image of a known format",
    )


def test_bad_test_image_is_not_left_out_but_unreadable(folder: Path) -> None:
    write(folder / "test-00000-of-00001.parquet", [encoded(PIXELS[30]), b"junk"], [0, 1])
    test = load(folder).open_split("test")
    assert len(test) == 2
    np.testing.assert_array_equal(test.read(0), PIXELS[30])
    with pytest.raises(UnreadableImage, match=r"test\[1\]: not an image"):
        test.read(1)


def test_grey_and_coloured_images_together_are_coloured(tmp_path: Path) -> None:
    images = [encoded(image[..., 0] if row else image) for row, image in enumerate(PIXELS[:20])]
    write(tmp_path / "a/train-0.parquet", images[1:], LABELS[1:20])
    write(tmp_path / "b/train-0.parquet", images[1:] + images[:1], LABELS[1:20] + LABELS[:1])
    assert load(tmp_path / "a").channels == 1
    dataset = load(tmp_path / "b")
    assert dataset.channels == 3
    train = dataset.open_split("train")
    grey = next(position for position in range(len(train)) if row_of(train.name(position)) < 19)
    expected = np.repeat(PIXELS[row_of(train.name(grey)) + 1, ..., :1], 3, -1)
    np.testing.assert_array_equal(train.read(grey), expected)


def test_string_labels_are_classes_by_their_sorted_names(tmp_path: Path) -> None:
    images = [encoded(image) for image in PIXELS[:20]]
    write(tmp_path / "train-0.parquet", images, ["dog", "cat"] * 10)
    write(tmp_path / "test-0.parquet", images[:2], ["dog", "owl"])
    dataset = load(tmp_path)
    assert dataset.classes == ("cat", "dog")
    train = dataset.open_split("train")
    assert [train.labels_N[p] for p in range(4)] == [1 - row_of(train.name(p)) % 2 for p in range(4)]
    with pytest.raises(UserError, match=r"label 'owl' \(1 row\) is none of the 2 training classes"):
        dataset.open_split("test")


def test_classes_without_names_are_called_by_their_numbers(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [encoded(image) for image in PIXELS[:20]], LABELS[:20])
    assert load(tmp_path).classes == ("0", "1")


@pytest.mark.parametrize(
    ("labels", "options", "why"),
    [
        ([0, 1, -1] * 4, {"names": ["a", "b"]}, r"label -1 \(4 rows\) is outside 0..1"),
        ([0, 1, 5] * 4, {"names": ["a", "b"]}, r"label 5 \(4 rows\) is outside 0..1"),
        ([0, 1, None] * 4, {}, "4 rows of column label are empty"),
        ([0.5, 1.0, 0.0] * 4, {}, "column label holds double"),
        ([0, 1, 1] * 4, {"label": "kind"}, "no column label or fine_label or labels, only img, kind"),
        ([0, 1, 1] * 4, {"image": "photo"}, "no column img or image, only photo, label"),
        ([1, 2, -1] * 4, {}, r"label -1 \(4 rows\) is outside 0, 1, 2"),
    ],
)
def test_unusable_columns_are_one_clear_line(
    tmp_path: Path, labels: list[Any], options: dict[str, Any], why: str
) -> None:
    write(tmp_path / "train-0.parquet", [encoded(image) for image in PIXELS[:12]], labels, **options)
    with pytest.raises(UserError, match=why):
        load(tmp_path)


@pytest.mark.parametrize(
    ("train", "validation", "complaint"),
    [
        ([0, 10, 1], [2], r"label 2 \(1 row\) is none of the 3 training classes"),
        (["a", "b", "a"], [0], "labels are numbers, those of the training images strings"),
        ([0, 1, 0], ["a"], "labels are strings, those of the training images numbers"),
    ],
)
def test_labels_that_cannot_be_classes_are_one_clear_line(
    tmp_path: Path, train: list[Any], validation: list[Any], complaint: str
) -> None:
    images: list[bytes | None] = [encoded(image) for image in PIXELS]
    write(tmp_path / "train-0.parquet", images[:3], train)
    write(tmp_path / "validation-0.parquet", images[3:4], validation)
    with pytest.raises(UserError, match=complaint):
        load_data(str(tmp_path), DataConfig())


def test_files_of_a_split_that_differ_are_one_clear_line(tmp_path: Path) -> None:
    images: list[bytes | None] = [encoded(image) for image in PIXELS]
    write(tmp_path / "train-0.parquet", images[:2], [0, 1])
    write(tmp_path / "train-1.parquet", images[2:4], ["a", "b"])
    with pytest.raises(
        UserError,
        match=r"train-1\.parquet: column label holds string; labels are whole numbers, or strings in all files",
    ):
        load_data(str(tmp_path), DataConfig())
    write(tmp_path / "train-1.parquet", images[2:4], [0, 1], image="image")
    with pytest.raises(UserError, match=r"train-1\.parquet: lacks img or label, which train-0\.parquet has"):
        load_data(str(tmp_path), DataConfig())


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    images: list[bytes | None] = [encoded(image) for image in PIXELS]
    write(tmp_path / "train-0.parquet", images[:2], [0, 1], names=["cat", "cat"])
    with pytest.raises(UserError, match="two classes are called 'cat'"):
        load_data(str(tmp_path), DataConfig())


def test_column_that_holds_no_encoded_images_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"img": ["a.png", "b.png"], "label": [0, 1]}), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match="column img holds paths, not images: embed the images in the table, or list"):
        load(tmp_path)


def test_damaged_file_is_one_clear_line(folder: Path) -> None:
    path = folder / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet: cannot be read as Parquet"):
        load(folder)


def test_folder_without_training_file_is_refused(folder: Path) -> None:
    for path in folder.glob("train*"):
        path.unlink()
    with pytest.raises(UserError, match=r"no train-\*.parquet"):
        load(folder)


def test_two_configurations_side_by_side_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "both/a")
    shutil.copytree(folder, tmp_path / "both/b")
    with pytest.raises(UserError, match="Parquet files lie in a and b"):
        load(tmp_path / "both")


def test_content_hash_changes_with_one_pixel_one_label_one_image_and_the_order(tmp_path: Path) -> None:
    images = [encoded(image) for image in PIXELS[:20]]
    changed = PIXELS[3].copy()
    changed[0, 0, 0] ^= 1
    seen = set()
    for number, (some, labels) in enumerate(
        (
            (images, LABELS[:20]),
            ([*images[:3], encoded(changed), *images[4:]], LABELS[:20]),
            (images, [1, 1, 0, 0, *LABELS[4:20]]),
            ([*images, encoded(PIXELS[21])], LABELS[:21]),
            (images[::-1], LABELS[:20]),
        )
    ):
        root = tmp_path / str(number)
        write(root / "train-0.parquet", list(some), labels)
        write(root / "validation-0.parquet", list(images), LABELS[:20])
        seen.add(load(root).open_split("train").content_hash())
        assert load(root).open_split("train").content_hash() in seen
    assert len(seen) == 5


@pytest.mark.slow
def test_cifar10_comes_pixel_for_pixel(shared_data: Path) -> None:
    dataset = load(shared_data / "cifar10", max_bad_images=0)
    assert (len(dataset.classes), dataset.image_size, dataset.channels) == (10, (32, 32), 3)
    assert (len(dataset.open_split("train")), len(dataset.open_split("val"))) == (45_000, 5_000)
    table = pq.read_table(shared_data / "cifar10/train-00000-of-00001.parquet")
    train = dataset.open_split("train")
    for position in (0, 17, 44_999):
        row = row_of(train.name(position))
        content = table["img"][row].as_py()["bytes"]
        np.testing.assert_array_equal(train.read(position), np.asarray(Image.open(io.BytesIO(content))))
        assert train.labels_N[position] == table["label"][row].as_py()


def test_a_damaged_unpacked_file_is_made_again(mixed: Path, home: Path) -> None:
    before = [load_data(str(mixed), DataConfig()).open_split("train").read(k) for k in range(3)]
    for unpacked in home.rglob("*.arrow"):
        unpacked.write_bytes(unpacked.read_bytes()[:100])
    after = [load_data(str(mixed), DataConfig()).open_split("train").read(k) for k in range(3)]
    assert all((one == other).all() for one, other in zip(before, after, strict=True))


# ------------------------------------------------------------------------------------- layouts and labels of others


@pytest.mark.parametrize(
    ("train", "test", "given"),
    [
        ("default/train/0000.parquet", "default/test/0000.parquet", ""),
        ("default/train/0000.parquet", "default/test/0000.parquet", "default"),
        ("partial-train/0000.parquet", "partial-test/0000.parquet", ""),
        ("train_00000.parquet", "test_00000.parquet", ""),
        ("train.parquet", "Test.parquet", ""),
        ("data/train0.parquet", "data/test0.parquet", ""),
    ],
)
def test_the_name_of_a_table_or_of_its_folder_says_its_split(tmp_path: Path, train: str, test: str, given: str) -> None:
    images: list[bytes | None] = [encoded(image) for image in PIXELS]
    write(tmp_path / "hub" / train, images[:20], LABELS[:20])
    write(tmp_path / "hub" / test, images[20:26], LABELS[20:26])
    dataset = load(tmp_path / "hub" / given)
    assert [len(dataset.open_split(name)) for name in dataset.split_names] == [18, 2, 6]
    assert dataset.notes == ()


def test_a_folder_of_one_split_is_that_split_and_nameless_tables_are_for_training(tmp_path: Path) -> None:
    images: list[bytes | None] = [encoded(image) for image in PIXELS]
    for folder in ("hub/default/train", "hub/default/test", "pets"):
        write(tmp_path / folder / "0000.parquet", images[:20], LABELS[:20])
    assert load(tmp_path / "hub/default/train").notes == ()
    assert load(tmp_path / "pets").notes == (
        "no name says which split 0000.parquet belongs to: all images are for training",
    )
    with pytest.raises(UserError, match=r"no train-\*\.parquet among its tables"):
        load(tmp_path / "hub/default/test")
    write(tmp_path / "pets/train-0.parquet", images[:20], LABELS[:20])
    assert load(tmp_path / "pets").notes == ("0000.parquet is of no split known by name and is left out",)


def test_a_table_in_a_class_folder_makes_no_table_of_the_data(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.png").write_bytes(encoded(PIXELS[number]))
    pq.write_table(pa.table({"x": [1]}), tmp_path / "cat/facts.parquet")
    assert load(tmp_path).left_out == {".parquet": 1}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("sizes", [1, 3])
def test_what_save_to_disk_writes_is_read(tmp_path: Path, home: Path, stream: bool, sizes: int) -> None:
    images = [encoded(PIXELS[row, : 6 - row % sizes]) for row in range(30)]
    write(tmp_path / "table.parquet", list(images), LABELS[:30], names=["cat", "dog"])
    content = pq.read_table(tmp_path / "table.parquet")
    for split, part in (("train", content[:24]), ("test", content[24:])):
        (tmp_path / "arrow" / split).mkdir(parents=True)
        file = tmp_path / "arrow" / split / "data-00000-of-00001.arrow"
        new = pa.ipc.new_stream if stream else pa.ipc.new_file
        with pa.OSFile(str(file), "wb") as sink, new(sink, content.schema) as writer:
            writer.write_table(part)
        (tmp_path / "arrow" / split / "state.json").write_text("{}")
    dataset = load(tmp_path / "arrow")
    assert dataset.classes == ("cat", "dog")
    assert [len(dataset.open_split(name)) for name in dataset.split_names] == [22, 2, 6]
    train = dataset.open_split("train")
    row = row_of(train.name(5))
    np.testing.assert_array_equal(train.read(5), PIXELS[row, : 6 - row % sizes])
    (tmp_path / "arrow/train/data-00000-of-00001.arrow").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow: cannot be read as an Arrow file"):
        load(tmp_path / "arrow")


@pytest.mark.parametrize(
    ("labels", "names", "classes", "note"),
    [
        ([1, 2, 3], None, ("1", "2", "3"), "labels are 1, 2, 3: each is a class"),
        ([0, 7, 40], None, ("0", "7", "40"), "labels are 0, 7, 40: each is a class"),
        (
            [0, 1, 2],
            ["ant", "bee", "cat", "dodo"],
            ("ant", "bee", "cat"),
            "no training image of class 'dodo': it is no class here",
        ),
        (
            [0, 2, 3],
            ["ant", "bee", "cat", "dodo"],
            ("ant", "cat", "dodo"),
            "no training image of class 'bee': it is no class here",
        ),
    ],
)
def test_classes_are_the_labels_that_training_images_have(
    tmp_path: Path, labels: list[int], names: list[str] | None, classes: tuple[str, ...], note: str
) -> None:
    write(tmp_path / "train-0.parquet", [encoded(image) for image in PIXELS[:18]], labels * 6, names=names)
    dataset = load(tmp_path)
    assert dataset.classes == classes
    assert dataset.notes == (note,)
    train = dataset.open_split("train")
    assert all(train.labels_N[p] == row_of(train.name(p)) % 3 for p in range(len(train)))


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_texts_may_be_of_any_arrow_type(tmp_path: Path, kind: str) -> None:
    labels = pa.array(["b", "a", "c"] * 6).cast(
        getattr(pa, kind)() if kind != "dictionary" else pa.dictionary(pa.int8(), pa.string())
    )
    images = pa.array([encoded(image) for image in PIXELS[:18]], pa.binary()).cast(
        pa.binary_view() if kind == "string_view" else pa.binary()
    )
    pq.write_table(pa.table({"img": images, "label": labels}), tmp_path / "train-0.parquet")
    dataset = load(tmp_path)
    assert dataset.classes == ("a", "b", "c")
    assert np.bincount(dataset.open_split("train").labels_N).tolist() == [5, 5, 5]


def test_a_class_without_validation_images_is_said(tmp_path: Path) -> None:
    images: list[bytes | None] = [encoded(image) for image in PIXELS]
    write(tmp_path / "train-0.parquet", images[:18], ["a", "b", "rare"] * 6)
    write(tmp_path / "validation-0.parquet", images[18:22], ["a", "b"] * 2)
    assert load(tmp_path).notes == ("no validation image of class 'rare': validation figures say nothing of it",)


@pytest.mark.parametrize("rows", [[{"bytes": None, "path": "/data/1.jpg"}] * 4, ["/data/1.jpg"] * 4])
def test_a_table_of_paths_is_told_as_one(tmp_path: Path, rows: list[Any]) -> None:
    pq.write_table(pa.table({"image": rows, "label": [0, 1] * 2}), tmp_path / "train-0.parquet")
    with pytest.raises(
        UserError, match=r"train-0\.parquet: column image holds paths, not images: embed the images in the table"
    ):
        load(tmp_path)
