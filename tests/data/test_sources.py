"""Data sets known by name: found, read, downloaded, or refused in one clear line."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from deitkit.config import DataConfig
from deitkit.data import Dataset, load_data, sources
from deitkit.terminal import UserError

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (60, 4, 3), np.uint8)
COLOUR = RANDOM.integers(0, 256, (500, 32, 32, 3), np.uint8)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test finds a real copy, touches the real cache or calls a real server. Returns $DEITKIT_DATA."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DEITKIT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(sources, "_PACKAGED", {})
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    return tmp_path / "data"


def load(name: str, **config: int) -> Dataset:
    return load_data(name, DataConfig(**config))


def idx_bytes(values: NDArray[np.uint8]) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_idx(folder: Path, *, packed: bool = False, dotted: bool = False) -> None:
    """60 training and 20 test images of 4x3 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = (np.arange(60) % 10).astype(np.uint8)
    contents = (GREY, labels, GREY[::3], labels[:20])
    for name, content in zip(sources.IDX_FILES.values(), contents, strict=True):
        path = folder / (name.replace("-idx", ".idx") if dotted else name)
        if packed:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx_bytes(content)))
        else:
            path.write_bytes(idx_bytes(content))


def write_parquet(folder: Path, image: str = "image", label: str = "label") -> None:
    """60 training and 20 test images, as the hub has them."""
    folder.mkdir(parents=True)
    files = []
    for pixels in GREY:
        files.append(io.BytesIO())
        Image.fromarray(pixels).save(files[-1], "PNG")
    images, labels = [file.getvalue() for file in files], (np.arange(60) % 10).tolist()
    for split, part in (("train", slice(0, 60)), ("test", slice(0, 20))):
        table = pa.table({image: images[part], label: labels[part]})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def rows(dataset: Dataset, split: str) -> list[int]:
    opened = dataset.open_split(split)  # type: ignore[arg-type]
    return [int(opened.name(position).split("[")[1][:-1]) for position in range(len(opened))]


def test_digits_are_grey_full_range_and_not_mirrored() -> None:
    dataset = load("digits")
    assert (dataset.image_size, dataset.channels, len(dataset.classes)) == ((8, 8), 1, 10)
    assert not dataset.mirror_safe
    splits = [dataset.open_split(split) for split in ("train", "val", "test")]
    assert [len(split) for split in splits] == [1293, 145, 359]
    pixels = np.concatenate([split.pixels_NHWC for split in splits if split.pixels_NHWC is not None])
    assert pixels.shape == (1797, 8, 8, 1)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert len(np.unique(pixels)) == 17


def test_test_digits_are_a_stratified_fifth_that_no_seed_moves() -> None:
    test = load("digits").open_split("test")
    assert np.all(np.abs(np.bincount(test.labels_N) - 0.2 * 1797 / 10) <= 2)
    other = load("digits", data_seed=7)
    assert other.open_split("test").content_hash() == test.content_hash()
    assert other.open_split("val").content_hash() != load("digits").open_split("val").content_hash()
    assert other.open_split("train").content_hash() != load("digits").open_split("train").content_hash()


def test_content_hash_of_images_in_memory_changes_with_the_subset() -> None:
    assert load("digits", train_images=100).open_split("train").content_hash() != (
        load("digits", train_images=101).open_split("train").content_hash()
    )


@pytest.mark.parametrize(("packed", "dotted"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_are_read_packed_or_not(places: Path, name: str, packed: bool, dotted: bool) -> None:
    write_idx(places / name, packed=packed, dotted=dotted)
    dataset = load(name)
    assert dataset.mirror_safe == (name == "fashion-mnist")
    assert dataset.has_test
    for split in ("train", "val"):
        opened = dataset.open_split(split)
        np.testing.assert_array_equal(opened.pixels_NHWC, GREY[rows(dataset, split), ..., None])
        np.testing.assert_array_equal(opened.labels_N, np.array(rows(dataset, split)) % 10)
    np.testing.assert_array_equal(dataset.open_split("test").pixels_NHWC, GREY[::3, ..., None])
    assert dataset.open_split("test").read(0).flags.writeable  # torch.from_numpy warns otherwise


def test_parquet_files_of_cifar100_are_read_with_fine_labels(places: Path) -> None:
    write_parquet(places / "cifar100" / "cifar100", "img", "fine_label")
    dataset = load("cifar100")
    assert (dataset.name, len(dataset.classes), dataset.mirror_safe) == ("cifar100", 10, True)
    np.testing.assert_array_equal(dataset.open_split("train").pixels_NHWC, GREY[rows(dataset, "train"), ..., None])
    assert dataset.open_split("test").name(7) == "test[7]"


def test_cache_is_searched_after_deitkit_data(places: Path, tmp_path: Path) -> None:
    write_idx(tmp_path / "home/.cache/deitkit/mnist")
    assert len(load("mnist").open_split("test")) == 20
    write_idx(places / "mnist")
    (places / "mnist" / sources.IDX_FILES["test", "labels"]).write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    with pytest.raises(UserError, match="data/mnist: 20 test images, but 3 labels"):
        load("mnist").open_split("test")


def test_the_test_files_are_not_read_until_they_are_asked_for(places: Path) -> None:
    write_idx(places / "mnist")
    files = [sources.IDX_FILES["test", "images"], sources.IDX_FILES["test", "labels"]]
    for file in files:
        (places / "mnist" / file).write_bytes(b"garbage")
    dataset = load("mnist")
    for split in (dataset.open_split("train"), dataset.open_split("val")):
        split.content_hash()
    with pytest.raises(UserError, match=f"{files[0]}: .*copy it anew"):
        dataset.open_split("test")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (idx_bytes(GREY)[:-1], "holds 719 bytes where 720 are announced"),
        (b"\0\0\x08\x01" + idx_bytes(GREY)[4:], "not an IDX file of bytes in 3 dimensions"),
        (b"", "not an IDX file"),
    ],
)
def test_damaged_idx_file_is_one_clear_line(places: Path, content: bytes, why: str) -> None:
    write_idx(places / "mnist")
    (places / "mnist" / sources.IDX_FILES["train", "images"]).write_bytes(content)
    with pytest.raises(UserError, match=f"train-images-idx3-ubyte: {why}"):
        load("mnist")


def test_damaged_gzip_is_one_clear_line(places: Path) -> None:
    write_idx(places / "mnist", packed=True)
    path = places / "mnist" / (sources.IDX_FILES["train", "images"] + ".gz")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        load("mnist")


def test_labels_outside_the_classes_are_refused(places: Path) -> None:
    write_idx(places / "mnist")
    (places / "mnist" / sources.IDX_FILES["train", "labels"]).write_bytes(idx_bytes(np.full(60, 10, np.uint8)))
    with pytest.raises(UserError, match="train labels are not all between 0 and 9"):
        load("mnist")


# ------------------------------------------------------------------------------------------------ download


HUB_OF_A_FOLDER = """
import huggingface_hub, pathlib, shutil, sys
from deitkit.config import DataConfig
from deitkit.data import sources
hub = pathlib.Path(sys.argv[1])

def download(repository, file, *, repo_type, local_dir):
    assert (repository, repo_type) == (sources.HUB["mnist"], "dataset")
    print("downloading", file, flush=True)
    (local_dir / file).parent.mkdir(exist_ok=True)
    shutil.copy(hub / file, local_dir / file)

huggingface_hub.list_repo_files = lambda *_, **__: sorted(str(path.relative_to(hub)) for path in hub.rglob("*.*"))
huggingface_hub.hf_hub_download = download
sources.hub_reachable = lambda: True
assert len(sources.load_data("mnist", DataConfig()).open_split("test")) == 20
"""


def test_parquet_files_are_downloaded_once_by_all_processes_of_a_training(tmp_path: Path) -> None:
    write_parquet(tmp_path / "hub" / "mnist")
    (tmp_path / "hub" / "README.md").touch()
    command = [sys.executable, "-c", HUB_OF_A_FOLDER, str(tmp_path / "hub")]
    environment = {**os.environ, "PYTHONPATH": str(Path(sources.__file__).parents[2])}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(3)]
    said = b"".join(process.communicate(timeout=120)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert said.count(b"downloading") == said.count(b".parquet") == 2
    assert len(load("mnist").open_split("train")) == 50


def test_a_download_that_stops_leaves_no_half_of_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: Path
) -> None:
    write_parquet(tmp_path / "hub")
    files = sorted(path.name for path in (tmp_path / "hub").iterdir())

    def stops(_repository: str, file: str, *, repo_type: str, local_dir: Path) -> None:
        if file != files[0]:
            raise ConnectionError("reset by peer")
        shutil.copy(tmp_path / "hub" / file, local_dir / file)

    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", stops)
    with pytest.raises(UserError, match="mnist is not on this machine and cannot be downloaded"):
        load("mnist")
    assert not (tmp_path / "home/.cache/deitkit/mnist").exists()


def test_failed_download_says_where_to_put_the_files(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load("cifar100")
    message = str(caught.value)
    assert message.startswith("cifar100 is not on this machine and cannot be downloaded: check the connection, or put")
    folder = tmp_path / "home/.cache/deitkit/cifar100"
    assert f"its Parquet files (of uoft-cs/cifar100) into {folder} or $DEITKIT_DATA/cifar100" in message
    assert "\n" not in message
    assert not folder.exists()


# ------------------------------------------------------------------------------------------------ names


def test_unknown_name_lists_the_close_ones() -> None:
    with pytest.raises(UserError, match="unknown folder or data set 'cifar-10': did you mean cifar10"):
        load("cifar-10")


def test_a_mistyped_folder_is_told_the_one_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_photos").mkdir()
    with pytest.raises(UserError, match="unknown folder or data set 'my_photo': did you mean my_photos"):
        load("my_photo")


def test_a_path_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    with pytest.raises(UserError, match="digits: holds no folders"):
        load("digits")


@pytest.mark.parametrize("location", ["photos/", "./photos", "~/photos", "../photos", "a/b"])
def test_missing_path_is_said_to_be_missing(location: str) -> None:
    with pytest.raises(UserError, match="does not exist; give an existing folder or one of digits, mnist"):
        load(location)


def test_file_instead_of_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.dat").touch()
    with pytest.raises(UserError, match=r"x\.dat: is a file; give the folder"):
        load(str(tmp_path / "x.dat"))


def test_no_location_is_refused() -> None:
    with pytest.raises(UserError, match="no data set given"):
        load("")


def test_folder_of_idx_files_says_how_to_name_it(places: Path) -> None:
    write_idx(places / "mnist")
    with pytest.raises(UserError, match="holds IDX files; set DEITKIT_DATA"):
        load(str(places / "mnist"))


def test_named_parquet_copy_has_the_names_classes(places: Path) -> None:
    write_parquet(places / "fashion-mnist")
    dataset = load("fashion-mnist", train_images=20)
    assert dataset.name == "fashion-mnist"
    assert dataset.classes == sources.CLASSES["fashion-mnist"]
    np.testing.assert_array_equal(dataset.open_split("train").pixels_NHWC, GREY[rows(dataset, "train"), ..., None])


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_found_where_debian_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PACKAGED", {"fashion-mnist": DEBIAN})
    dataset = load("fashion-mnist")
    assert dataset.image_size == (28, 28)
    assert [len(dataset.open_split(split)) for split in ("train", "val", "test")] == [54_000, 6_000, 10_000]
    assert np.bincount(dataset.open_split("train").labels_N).tolist() == [5_400] * 10
