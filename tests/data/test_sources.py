"""Data sets known by name: found, read, downloaded, or refused in one clear line."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
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
    published = sources.remote
    monkeypatch.setattr(sources, "remote", lambda name: published(name)._replace(urls=("http://127.0.0.1:9/",)))
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


def write_cifar(folder: Path, name: str) -> None:
    """500 training and 100 test images."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = sources.LAYOUTS[name]
    labels = (np.arange(500) % len(sources.CLASSES[name])).astype(np.uint8)
    head = np.stack([np.full(500, 99, np.uint8), labels], 1)[:, 2 - layout.label_bytes :]
    records = np.concatenate([head, COLOUR.transpose(0, 3, 1, 2).reshape(500, -1)], 1)
    for file, part in zip(layout.train, np.split(records, len(layout.train)), strict=True):
        (folder / file).write_bytes(part.tobytes())
    (folder / layout.test[0]).write_bytes(records[:100].tobytes())


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


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("unpacked", ["", "sub"])
def test_binary_cifar_is_read_with_fine_labels(places: Path, name: str, unpacked: str) -> None:
    write_cifar(places / name / (sources.LAYOUTS[name].folder if unpacked else ""), name)
    dataset = load(name)
    assert len(dataset.classes) == len(set(dataset.classes)) == int(name.removeprefix("cifar"))
    assert dataset.mirror_safe
    train = dataset.open_split("train")
    np.testing.assert_array_equal(train.pixels_NHWC, COLOUR[rows(dataset, "train")])
    np.testing.assert_array_equal(train.labels_N, np.array(rows(dataset, "train")) % len(dataset.classes))
    np.testing.assert_array_equal(dataset.open_split("test").pixels_NHWC, COLOUR[:100])
    assert dataset.open_split("test").name(7) == "test[7]"


def test_cache_is_searched_after_deitkit_data(places: Path, tmp_path: Path) -> None:
    write_idx(tmp_path / "home/.cache/deitkit/mnist")
    assert len(load("mnist").open_split("test")) == 20
    write_idx(places / "mnist")
    (places / "mnist" / sources.IDX_FILES["test", "labels"]).write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    with pytest.raises(UserError, match="data/mnist: 20 test images, but 3 labels"):
        load("mnist").open_split("test")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_the_test_files_are_not_read_until_they_are_asked_for(places: Path, name: str) -> None:
    if name == "mnist":
        write_idx(places / name)
        files = [sources.IDX_FILES["test", "images"], sources.IDX_FILES["test", "labels"]]
    else:
        write_cifar(places / name, name)
        files = ["test_batch.bin"]
    for file in files:
        (places / name / file).write_bytes(b"garbage")
    dataset = load(name)
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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{serving.server_port}/"
        serving.shutdown()
        thread.join()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def offer_mnist(server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, address = server
    write_idx(folder, packed=True)
    files = {f"{file}.gz": md5(folder / f"{file}.gz") for file in sources.IDX_FILES.values()}
    monkeypatch.setattr(sources, "remote", lambda _: sources.Remote(("http://127.0.0.1:9/", address), files))


def offer_cifar(server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, *extra: str) -> None:
    folder, address = server
    write_cifar(folder / "unpacked", "cifar10")
    with tarfile.open(folder / "cifar.tar.gz", "w:gz") as tar:
        tar.add(folder / "unpacked", "cifar-10-batches-bin")
        for name in extra:
            entry = tarfile.TarInfo(name)
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"evil"))
    files = {"cifar.tar.gz": md5(folder / "cifar.tar.gz")}
    monkeypatch.setattr(sources, "remote", lambda _: sources.Remote((address,), files))


def kept_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def test_idx_files_are_downloaded_once_from_the_mirror_that_answers(
    server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offer_mnist(server, monkeypatch)
    assert len(load("mnist").open_split("test")) == 20
    assert "mnist: downloading http://127.0.0.1" in capsys.readouterr().err
    assert kept_in(tmp_path / "home/.cache/deitkit/mnist") == sorted(
        f"{file}.gz" for file in sources.IDX_FILES.values()
    )
    shutil.rmtree(server[0])
    assert len(load("mnist").open_split("train")) == 50
    assert capsys.readouterr().err == ""


def test_cifar_archive_is_downloaded_and_unpacked(
    server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer_cifar(server, monkeypatch, "cifar-10-batches-bin/readme.html")
    assert len(load("cifar10").open_split("test")) == 100
    layout = sources.LAYOUTS["cifar10"]
    assert kept_in(tmp_path / "home/.cache/deitkit") == sorted([*layout.train, *layout.test, "readme.html"])


def test_nothing_is_unpacked_outside_the_folder(
    server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer_cifar(server, monkeypatch, "../../evil.txt")
    with pytest.raises(UserError, match=r"cifar\.tar\.gz: cannot be unpacked: .*remove it and try again"):
        load("cifar10")
    assert not list(tmp_path.rglob("evil.txt"))


def test_download_with_the_wrong_checksum_is_refused_and_leaves_nothing(
    server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer_cifar(server, monkeypatch)
    with (server[0] / "cifar.tar.gz").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="the file has the MD5"):
        load("cifar10")
    assert kept_in(tmp_path / "home/.cache/deitkit/cifar10") == []


def test_an_archive_is_fetched_once_by_all_processes_of_a_training(
    server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer_cifar(server, monkeypatch)
    (url,), files = sources.remote("cifar10")
    code = (
        "import sys; from deitkit.config import DataConfig; from deitkit.data import sources; _, url, file, md5 = sys.argv\n"
        "sources.remote = lambda name: sources.Remote((url,), {file: md5})\n"
        "assert len(sources.load_data('cifar10', DataConfig()).open_split('test')) == 100"
    )
    command = [sys.executable, "-c", code, url, *next(iter(files.items()))]
    environment = {**os.environ, "PYTHONPATH": str(Path(sources.__file__).parents[2])}
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(3)]
    said = b"".join(process.communicate(timeout=120)[1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert said.count(b"downloading") == 1
    layout = sources.LAYOUTS["cifar10"]
    assert kept_in(tmp_path / "home/.cache/deitkit/cifar10") == sorted([*layout.train, *layout.test])


def test_failed_download_says_where_to_put_the_files(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load("cifar100")
    message = str(caught.value)
    assert message.startswith(
        "cifar100 is not on this machine, and downloading http://127.0.0.1:9/cifar-100-binary.tar.gz failed ("
    )
    assert "refused" in message
    assert f"put cifar-100-binary.tar.gz into {tmp_path / 'home/.cache/deitkit/cifar100'} by hand" in message
    assert "\n" not in message


def test_archive_put_there_by_hand_is_unpacked(
    server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer_cifar(server, monkeypatch)
    target = tmp_path / "home/.cache/deitkit/cifar10/cifar.tar.gz"
    target.parent.mkdir(parents=True)
    shutil.move(server[0] / "cifar.tar.gz", target)
    assert len(load("cifar10").open_split("test")) == 100


def test_archive_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    target = tmp_path / "home/.cache/deitkit/cifar10/cifar-10-binary.tar.gz"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"cifar-10-binary\.tar\.gz: cannot be unpacked: .*remove it and try again"):
        load("cifar10")


# ------------------------------------------------------------------------------------------------ names


def test_unknown_name_lists_the_close_ones() -> None:
    with pytest.raises(UserError, match="unknown folder or data set 'cifar-10': did you mean cifar10"):
        load("cifar-10")


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
    (tmp_path / "x.zip").touch()
    with pytest.raises(UserError, match=r"x\.zip: is a file; give the folder"):
        load(str(tmp_path / "x.zip"))


def test_no_location_is_refused() -> None:
    with pytest.raises(UserError, match="no data set given"):
        load("")


def test_folder_of_idx_files_says_how_to_name_it(places: Path) -> None:
    write_idx(places / "mnist")
    with pytest.raises(UserError, match="holds IDX files; set DEITKIT_DATA"):
        load(str(places / "mnist"))


def test_named_parquet_copy_has_the_names_classes(places: Path) -> None:
    (places / "fashion-mnist").mkdir(parents=True)
    files = []
    for image in GREY:
        files.append(io.BytesIO())
        Image.fromarray(image).save(files[-1], "PNG")
    table = pa.table({"image": [file.getvalue() for file in files], "label": np.arange(60) % 10})
    pq.write_table(table, places / "fashion-mnist/train-00000-of-00001.parquet")
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
