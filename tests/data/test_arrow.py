"""Parquet folders as the hub serves them, folders of `deit data cache`, and decoded copies."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deitkit import cli
from deitkit.config import DataConfig, RunConfig
from deitkit.data import Dataset, UnreadableImage, load_data
from deitkit.data import arrow as parquet
from deitkit.data.arrow import read_arrow, resize, worth_decoding, write_arrow, write_resized
from deitkit.data.dataset import is_small
from deitkit.data.folder import portable_pixmap
from deitkit.terminal import UserError, is_filled
from deitkit.training.setup import resolve

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (40, 6, 5, 3), np.uint8)
LABELS = (np.arange(40) % 2).tolist()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test touches the real cache."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


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
    with pytest.raises(UserError, match="label 'owl' is none of the 2 training classes"):
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
        ([0, 1, 1] * 4, {"names": ["a", "b", "c"]}, "no readable image of class 'c'"),
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
        ([0, 10**12, 1], [0], "label 1000000000000 of 3 images: labels count from 0"),
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
    with pytest.raises(UserError, match="column img holds string, not encoded images"):
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


def write_photos(root: Path, *, mode: str = "RGB", test: bool = True) -> Path:
    """Photos of several sizes in two classes."""
    for split, count in (("train", 6), ("val", 2), ("test", 2))[: 3 if test else 2]:
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = RANDOM.integers(0, 256, (30 + number, 40, 3), np.uint8)
                Image.fromarray(pixels).convert(mode).save(root / split / name / f"{number}.png")
    return root


def cached(tmp_path: Path, size: int = 20, config: DataConfig | None = None, photos: Path | None = None) -> Path:
    config = config or DataConfig()
    done: list[int] = []
    dataset = load_data(str(photos or tmp_path / "photos"), config)
    counts = write_resized(dataset, config, size, tmp_path / "out", done.append)
    assert done[-1] == sum(counts.values())
    return tmp_path / "out"


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_cached_folder_holds_pillow_s_resized_pixels_and_the_same_labels(tmp_path: Path, mode: str) -> None:
    original = load_data(str(write_photos(tmp_path / "photos", mode=mode)), DataConfig())
    resized = load_data(str(cached(tmp_path)), DataConfig())
    assert resized.classes == original.classes
    assert resized.channels == original.channels
    for name in ("train", "val", "test"):
        ours, theirs = resized.open_split(name), original.open_split(name)
        assert ours.labels_N.tolist() == theirs.labels_N.tolist()
        for position in range(len(theirs)):
            image = Image.fromarray(theirs.read(position).squeeze())
            scale = 20 / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            expected = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
            np.testing.assert_array_equal(ours.read(position).squeeze(), expected)


@pytest.mark.parametrize(
    ("original", "size", "photos"), [(80, 64, True), (80, 20, True), (65, 64, True), (64, 32, False)]
)
def test_photos_stay_photos_however_small_they_are_made(tmp_path: Path, original: int, size: int, photos: bool) -> None:
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            pixels = RANDOM.integers(0, 256, (original, original, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    before, after = (resolve(RunConfig(), load_data(str(path), DataConfig()), str(path)) for path in (
        tmp_path / "photos", cached(tmp_path, size)
    ))  # fmt: skip
    assert (before.view.crop, before.student.student) == (("resize", "deit_photo") if photos else ("pad", "deit_micro"))
    assert (after.view.crop, after.student.student) == (before.view.crop, before.student.student)
    resized = load_data(str(tmp_path / "out"), DataConfig())
    assert resized.open_split("train").read(0).shape == (size, size, 3)
    again = DataConfig()
    write_resized(resized, again, 16, tmp_path / "again", lambda _: None)
    assert is_small(load_data(str(tmp_path / "again"), again).image_size) is not photos


@pytest.mark.parametrize(("size", "warned"), [(32, True), (36, False)])
def test_a_cache_smaller_than_evaluation_wants_is_one_line_of_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int, warned: bool
) -> None:
    for number in range(12):
        path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RANDOM.integers(0, 256, (72, 80, 3), np.uint8)).save(path)
    line = "warning: photos: its images were reduced to 32 pixels, to evaluate {} they are enlarged to 36: "
    out, run = str(cached(tmp_path, size)), str(tmp_path / "run")
    settings = ["--student", "deit_nano", "--steps", "1", "--batch-size", "4", "--workers", "0", "--teacher", "none"]
    assert cli.main(["train", out, *settings, "--out", run]) == 0
    said = capsys.readouterr().err
    assert said.count("reduced to") == int(warned)
    assert cli.main(["evaluate", run]) == 0
    said += capsys.readouterr().err
    assert [line.format(who) in said for who in ("the student", run)] == [warned] * 2


def test_images_that_were_small_before_are_not_reduced(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")  # of 30 to 35 pixels
    assert load_data(str(cached(tmp_path, 64)), DataConfig()).reduced_to is None
    resized = load_data(str(cached(tmp_path / "smaller", 32, photos=tmp_path / "photos")), DataConfig())
    assert resized.reduced_to == 32
    write_resized(resized, DataConfig(), 64, tmp_path / "again", lambda _: None)
    assert load_data(str(tmp_path / "again"), DataConfig()).reduced_to == 32


def test_a_cache_holds_its_files_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    out = tmp_path / "out"
    out.mkdir()
    cached(tmp_path)
    files = sorted(["resized.json", "train.arrow", "val.arrow", "test.arrow"])
    assert sorted(path.name for path in out.iterdir()) == files
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_of_two_that_write_a_cache_the_first_stays(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    dataset, out = load_data(str(tmp_path / "photos"), DataConfig()), tmp_path / "out"

    def other(_: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "mine").touch()

    with pytest.raises(UserError, match="out: cannot be written: Directory not empty"):
        write_resized(dataset, DataConfig(), 20, out, other)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_the_cached_content_hash_of_resized_images_is_theirs(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    resized = load_data(str(cached(tmp_path)), DataConfig())
    splits = [resized.open_split("train"), resized.open_split("val")]
    assert [split.cached_content_hash() for split in splits] == [split.content_hash() for split in splits]
    assert len({split.mtime_hash() for split in splits}) == 2


def test_small_images_stay_as_they_are() -> None:
    image = RANDOM.integers(0, 256, (7, 9, 3), np.uint8)
    assert resize(image, 7) is image
    assert resize(image, 3).shape == (3, 4, 3)
    assert resize(image[:, :1], 1).shape == (7, 1, 3)


def test_a_row_is_a_file_that_others_can_read() -> None:
    image = RANDOM.integers(0, 256, (4, 5, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(portable_pixmap(image)))), image)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(portable_pixmap(image[..., :1])))), image[..., 0])


def test_the_split_that_was_asked_for_is_kept(tmp_path: Path) -> None:
    """A folder of class folders only: validation and test images are held out before the images are cached."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            Image.fromarray(RANDOM.integers(0, 256, (9, 9, 3), np.uint8)).save(
                tmp_path / "photos" / name / f"{number}.png"
            )
    original = load_data(str(tmp_path / "photos"), DataConfig(data_seed=3))
    resized = load_data(str(cached(tmp_path, 9, DataConfig(data_seed=3))), DataConfig())
    for name in ("train", "val", "test"):
        ours, theirs = resized.open_split(name), original.open_split(name)
        assert len(ours) == len(theirs)
        assert all((ours.read(k) == theirs.read(k)).all() for k in range(len(ours)))


def test_an_unreadable_test_image_stays_one(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    (tmp_path / "photos" / "test" / "dog" / "0.png").write_bytes(b"no image")
    (tmp_path / "photos" / "train" / "dog" / "0.png").write_bytes(b"no image")
    resized = load_data(str(cached(tmp_path)), DataConfig())
    assert (len(resized.open_split("train")), len(resized.open_split("test"))) == (11, 4)
    with pytest.raises(UnreadableImage, match="the file is empty"):
        resized.open_split("test").read(2)


def test_a_cached_split_can_be_sent_to_a_worker(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    split = load_data(str(cached(tmp_path)), DataConfig()).open_split("train")
    split.read(0)
    assert (pickle.loads(pickle.dumps(split)).read(3) == split.read(3)).all()


def test_a_damaged_or_missing_part_is_named(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    out = cached(tmp_path)
    (out / "train.arrow").write_bytes((out / "train.arrow").read_bytes()[:100])
    with pytest.raises(UserError, match=r"train\.arrow: cannot be read as an Arrow file"):
        load_data(str(out), DataConfig())
    (out / "train.arrow").unlink()
    with pytest.raises(UserError, match=r"train\.arrow: cannot be read"):
        load_data(str(out), DataConfig())
    (out / "resized.json").write_text("{}")
    with pytest.raises(UserError, match=r"resized\.json: name: field required"):
        load_data(str(out), DataConfig())


@pytest.mark.parametrize("columns", [["bytes"], ["label"], ["label", "bytes"]])
def test_other_columns_are_one_line(tmp_path: Path, columns: list[str]) -> None:
    write_photos(tmp_path / "photos")
    path = cached(tmp_path) / "train.arrow"
    write_arrow(iter(read_arrow(path).select(columns).to_batches()), read_arrow(path).select(columns).schema, path)
    with pytest.raises(UserError, match=r"train\.arrow: is not as deit data cache writes it: its columns are"):
        load_data(str(tmp_path / "out"), DataConfig())


def test_what_was_interrupted_is_written_by_the_same_command(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    config = DataConfig()
    dataset = load_data(str(tmp_path / "photos"), config)

    def interrupted(done: int) -> None:
        if done > 12:  # the training images are written
            assert [path.name for path in tmp_path.glob(".out.*/*.arrow")] == ["train.arrow"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_resized(dataset, config, 20, tmp_path / "out", interrupted)
    assert not is_filled(tmp_path / "out")
    assert cached(tmp_path).is_dir()


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, out = str(write_photos(tmp_path / "photos")), str(tmp_path / "out")
    assert cli.main(["data", "cache", photos, "--size", "20", "--out", out]) == 0
    assert "12 train, 4 val, 4 test images" in capsys.readouterr().err
    assert cli.main(["data", "cache", photos, "--size", "20", "--out", out]) == 2
    assert "already exists and is not empty" in capsys.readouterr().err
    assert cli.main(["data", "cache", photos, "--size", "0", "--out", out]) == 2
    assert "--size: input should be greater than 0 (got '0')" in capsys.readouterr().err
    assert cli.main(["data", "show", out]) == 0


def test_a_decoded_copy_leaves_room_for_what_is_written_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = load_data(str(write_photos(tmp_path / "photos")), DataConfig()).open_split("train")
    size = sum(split.read(position).size for position in range(len(split)))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10 * size))
    assert worth_decoding(split, tmp_path)
    assert worth_decoding(split, tmp_path, reserved=7 * size)
    assert not worth_decoding(split, tmp_path, reserved=9 * size)
    assert not worth_decoding(split, tmp_path, reserved=99 * size)
