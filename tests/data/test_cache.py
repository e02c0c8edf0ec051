"""Folders of `deit data cache`, and decoded copies."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tests.data.test_arrow import RANDOM

from deitkit import cli
from deitkit.config import DataConfig, RunConfig
from deitkit.data import UnreadableImage, load_data
from deitkit.data.arrow import read_arrow, resize, worth_decoding, write_arrow, write_resized
from deitkit.data.dataset import is_small
from deitkit.data.decode import portable_pixmap
from deitkit.terminal import UserError, is_filled
from deitkit.training.setup import resolve

pytestmark = pytest.mark.usefixtures("home")


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
