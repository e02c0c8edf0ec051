"""Which tables are data, what is left out beside them, and what their labels are."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deitkit.config import DataConfig
from deitkit.data import Dataset, load_data
from deitkit.data.sources import load_known
from deitkit.models.weights import read_weights
from deitkit.terminal import UserError

pytestmark = pytest.mark.usefixtures("home")

AB = ["a", "b"] * 6
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"
PAGE = b"\n<!DOCTYPE html><html><body>Sign in</body></html>"


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def table(labels: Sequence[Any], first: int = 0, kind: Any = None) -> Any:
    images = [picture(first + row) for row in range(len(labels))]
    return pa.table({"img": pa.array(images, pa.binary()), "label": pa.array(labels, kind)})


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(content, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, content.schema) as writer:
            writer.write_table(content)


def load(root: Path) -> Dataset:
    return load_data(str(root), DataConfig())


def sizes(dataset: Dataset) -> list[int]:
    return [len(dataset.open_split(name)) for name in dataset.split_names]


@pytest.mark.parametrize(
    ("inside", "stray", "holds_images"),
    [
        ("", "preview.parquet", True),
        ("train", "export/train-0.parquet", True),
        ("", "features.parquet", False),
        ("train", "train/metadata.parquet", False),
        ("train", "meta/x.arrow", False),
    ],
)
def test_tables_beside_class_folders_are_left_out(tmp_path: Path, inside: str, stray: str, holds_images: bool) -> None:
    for number in range(10):
        file = tmp_path / inside / AB[number] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))
    write(tmp_path / stray, table(AB, 50) if holds_images else pa.table({"file": ["a/0.png"]}))
    dataset = load(tmp_path)
    assert (dataset.classes, sum(sizes(dataset))) == (("a", "b"), 10)
    assert dataset.left_out == {Path(stray).suffix: 1}
    assert dataset.notes == (
        (f"{stray} holds images beside the class folders and is left out",) if holds_images else ()
    )
    assert load_known(str(tmp_path), DataConfig(), ("a", "b")).left_out == {Path(stray).suffix: 1}


def test_pictures_in_a_single_folder_beside_tables_are_no_data(tmp_path: Path) -> None:
    write(tmp_path / "data/train-0.parquet", table(AB))
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/logo.png").write_bytes(picture(99))
    assert sum(sizes(load(tmp_path))) == 12


@pytest.mark.parametrize(
    ("listed", "others", "left_out"),
    [
        (None, ["cache-1f.arrow", "cache-2e.arrow"], {"cache-*.arrow": 2}),
        (["data-0.arrow"], ["cache-1f.arrow", "old.arrow"], {"cache-*.arrow": 1, ".arrow": 1}),
    ],
)
def test_caches_beside_saved_files_are_left_out(
    tmp_path: Path, listed: list[str] | None, others: list[str], left_out: dict[str, int]
) -> None:
    for seed, name in enumerate(["data-0.arrow", *others]):
        write(tmp_path / "train" / name, table(AB, 50 * seed))
    state = tmp_path / "train/state.json"
    if listed is not None:
        state.write_text(json.dumps({"_data_files": [{"filename": name} for name in listed]}))
    dataset = load(tmp_path)
    assert (sum(sizes(dataset)), dataset.left_out) == (12, left_out)
    (tmp_path / "train/data-0.arrow").unlink()
    complaint = r"data-0\.arrow: does not exist, but state\.json lists it" if listed else "holds no tables but cache-"
    with pytest.raises(UserError, match=complaint):
        load(tmp_path)


def test_a_copy_of_a_table_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", table(AB))
    write(tmp_path / "train-1.parquet", table(AB, 50))
    write(tmp_path / "test-0.parquet", table(AB, 100))
    for name in ("train-0", "test-0"):
        shutil.copy(tmp_path / f"{name}.parquet", tmp_path / f"{name} (1).parquet")
    dataset = load(tmp_path)
    assert (sum(sizes(dataset)[:2]), sizes(dataset)[2]) == (24, 12)
    assert dataset.notes == ("train-0 (1).parquet is the same as train-0.parquet, byte for byte, and is left out",)


@pytest.mark.parametrize("names", [None, [" e\u0301 ", "b"]])
def test_labels_are_compared_as_names_of_folders_are(tmp_path: Path, names: list[str] | None) -> None:
    content = table(["\u00e9", "e\u0301", " b", "b"] * 3 if names is None else [0, 1] * 6)
    if names:
        info = {"info": {"features": {"label": {"names": names}}}}
        content = content.replace_schema_metadata({"huggingface": json.dumps(info)})
    write(tmp_path / "train-0.parquet", content)
    assert load(tmp_path).classes == (("b", "\u00e9") if names is None else ("\u00e9", "b"))


@pytest.mark.parametrize(
    ("labels", "names", "why"),
    [
        (["a", "b", " "] * 4, None, "4 rows of column label are empty"),
        (["a\nx", "b"] * 6, None, r"label 'a\\nx' has characters that cannot be printed"),
        ([""] * 12, None, "holds images without labels"),
        ([0, 1] * 6, ["a", "b\n\x01c"], "has characters that cannot be printed"),
        ([0, 1] * 6, ["a", " "], "class 1 has no name"),
        ([0, 1] * 6, ["a", " a"], "two classes are called 'a'"),
    ],
)
def test_labels_that_name_no_class_are_one_clear_line(
    tmp_path: Path, labels: list[Any], names: list[str] | None, why: str
) -> None:
    info = {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}
    write(tmp_path / "train-0.parquet", table(labels).replace_schema_metadata(info))
    with pytest.raises(UserError, match=why):
        load(tmp_path)


@pytest.mark.parametrize("wide", [4, 5])
def test_validation_images_that_are_trained_on_are_told(tmp_path: Path, wide: int) -> None:
    content, file = table(AB), io.BytesIO()
    Image.new("RGB", (wide, 4), "red").save(file, "PNG")  # of another size: then images stay encoded
    odd = pa.table({"img": pa.array([file.getvalue()], pa.binary()), "label": ["a"]})
    write(tmp_path / "train-0.parquet", pa.concat_tables([content, odd]))
    write(tmp_path / "validation-0.parquet", pa.concat_tables([content[:4], odd, table(AB, 50)]))
    assert load(tmp_path).notes == (
        "5 of 17 validation images are among the training images too: validation figures are too good",
    )


@pytest.mark.parametrize(
    ("labels", "kind", "why"),
    [
        ([-1] * 4, None, "holds images without labels"),
        ([None] * 4, pa.int8(), "holds images without labels"),
        ([None] * 4, pa.null(), "holds images without labels"),
        ([], pa.int64(), "is empty"),
    ],
)
def test_tables_without_labels_are_left_out(tmp_path: Path, labels: list[Any], kind: Any, why: str) -> None:
    write(tmp_path / "train-0.parquet", table([0, 1] * 6))
    write(tmp_path / "validation-0.parquet", table(labels, 50, kind))
    write(tmp_path / "test-0.parquet", table(labels, 50, kind))
    dataset = load(tmp_path)
    assert dataset.notes == (f"validation-0.parquet {why} and is left out",)
    assert len(dataset.open_split("train")) == 10
    with pytest.raises(UserError, match=rf"test-0\.parquet: {why}: fill it, or move it elsewhere"):
        dataset.open_split("test")


def test_a_word_inside_its_name_says_the_split_of_a_table(tmp_path: Path) -> None:
    for seed, split in enumerate(("train", "validation", "test")):
        write(tmp_path / f"my_{split}_data.parquet", table(AB, 50 * seed))
    dataset = load(tmp_path)
    assert (sizes(dataset), dataset.notes) == ([12, 12, 12], ())


def test_labels_in_the_names_of_folders_are_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"label={name}/p0.parquet", table(AB))
    with pytest.raises(UserError, match="names of its folders, such as label=a, stand for a column: write it into"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("train.parquet", POINTER, "is a git-lfs pointer, not the file: run git lfs pull"),
        ("train.arrow", POINTER, "is a git-lfs pointer"),
        ("train.parquet", PAGE, "is an HTML page, not a table: download it anew"),
        ("w.safetensors", POINTER, "is a git-lfs pointer, not the file: run git lfs pull"),
        ("w.pth", POINTER, "is a git-lfs pointer"),
        ("w.safetensors", PAGE, "is an HTML page, not weights: download it anew"),
        ("w.pth", PAGE, "is an HTML page, not weights"),
    ],
)
def test_what_stands_in_place_of_a_file_is_named(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=why):
        read_weights(tmp_path / name) if name[0] == "w" else load(tmp_path)
