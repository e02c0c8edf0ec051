"""A CSV file that lists images and their labels, as a data set.

Its first line names the columns: `file` (a path, relative to the CSV file), `label` and, if images are split, `split`. They may stand
in any order among others, divided by commas, semicolons or tabs. A training image without a label is one for `--unlabelled`. Images
are sorted by path, classes by name.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deitkit.config import DataConfig
from deitkit.data.dataset import NO_LABEL, Dataset, assemble, with_repeated
from deitkit.data.folder import FolderSplit, Role, load_class_images, role_of
from deitkit.terminal import UserError, shortened
from deitkit.waiting import waiting_for

SUFFIXES = (".csv", ".tsv")
FILE_NAMES = ("file_name", "filename", "path")
"""Other names that the column of the files may have."""
COLUMNS = "a first line such as file,label or file,split,label"


class Row(NamedTuple):
    """An image: its path, its label (empty: none) and its split, if the file has splits."""

    file: str
    label: str
    split: Role | None


def load_csv(path: Path, config: DataConfig) -> Dataset:
    """The data set that `path` lists. Raises UserError."""
    rows = read_rows(path)
    if all(row.split is None for row in rows):
        classes = _classes_of(rows, path)
        images = _images(path, rows, classes, config)
        unlabelled = any(not row.label for row in rows)
        return load_class_images(images, classes, config, path.stem, (), more=unlabelled and not config.unlabelled)
    by_split = {split: [row for row in rows if row.split == split] for split in ("train", "val", "test")}
    if not by_split["train"]:
        raise UserError(f"{path}: has no image of the split train: name the training images so")
    classes = _classes_of(by_split["train"], path)
    train = _images(path, by_split["train"], classes, config)
    dataset = assemble(
        name=path.stem,
        classes=classes,
        config=config,
        train=train.scan(),
        validation=_images(path, by_split["val"], classes, config).scan() if by_split["val"] else None,
        test=(lambda: _images(path, by_split["test"], classes, config)) if by_split["test"] else None,
        more_unlabelled=not config.unlabelled and any(not row.label for row in by_split["train"]),
    )
    return with_repeated(dataset)


def load_whole_csv(path: Path, config: DataConfig) -> tuple[FolderSplit, tuple[str, ...]] | None:
    """All images of a file without splits, and their classes; None for one with splits. Raises UserError."""
    rows = [row for row in read_rows(path) if row.label]
    if any(row.split for row in rows):
        return None
    classes = _classes_of(rows, path)
    return _images(path, rows, classes, config), classes


def read_rows(path: Path) -> list[Row]:
    """The images that `path` lists, in the order of their paths. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: is no regular file")
    try:
        with waiting_for(path):
            text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text in UTF-8: save it as CSV in UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    first, _, rest = text.partition("\n")
    named = re.fullmatch(r"sep=([,;\t])\s*", first, re.IGNORECASE)  # Excel's own line
    text = rest if named else text
    divider = named[1] if named else max(",;\t", key=first.count)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=divider, strict=True)
    try:
        header = [name.strip().lower() for name in next(table, [])]
        header = header if "file" in header else ["file" if name in FILE_NAMES else name for name in header]
        if not {"file", "label"} <= {*header} or any(header.count(name) > 1 for name in ("file", "label", "split")):
            raise UserError(f"{path}: its columns are {shortened(', '.join(header) or 'none')}: it needs {COLUMNS}")
        rows = [
            _row(path, table.line_num, header, cells, divider) for cells in table if any(cell.strip() for cell in cells)
        ]
    except csv.Error as error:
        why = "a quotation mark in it is not closed, or opens in the middle of a text; two in a row stand for one"
        raise UserError(f"{path}, line {table.line_num}: {why} ({error})") from error
    if not rows:
        raise UserError(f"{path}: lists no images")
    found: dict[str, Row] = {}
    real_folder = functools.cache(os.path.realpath)
    for row in rows:
        folder, name = os.path.split(path.parent / row.file)
        with waiting_for(path.parent / row.file):
            place = os.path.join(real_folder(folder), name)  # noqa: PTH118
            place = os.path.realpath(place) if os.path.islink(place) else place  # noqa: PTH114
        same = found.setdefault(place, row)
        if (same.label, same.split) != (row.label, row.split):
            twice = "stands there twice" if same.file == row.file else f"is the same file as {same.file}"
            raise UserError(f"{path}: {row.file} {twice}, with different labels or splits: keep one line")
    return sorted(found.values(), key=lambda row: os.fsencode(row.file))


def _row(path: Path, line: int, header: list[str], cells: list[str], divider: str) -> Row:
    if len(cells) != len(header):
        raise UserError(f"{path}, line {line}: has {len(cells)} columns where the first line has {len(header)}")
    for inner in (inner for cell in cells for inner in cell.splitlines()[1:]):
        swallowed = dict(zip(header, inner.split(divider), strict=False)).get("file", "").strip()
        if swallowed and "\0" not in swallowed and (path.parent / _here(path.parent, swallowed)).is_file():
            raise UserError(
                f"{path}, line {line}: a text in quotation marks holds the line of {swallowed}: close the quotation marks"
            )
    values = dict(zip(header, map(str.strip, cells), strict=True))
    file, label, split = (
        _here(path.parent, values["file"]),
        unicodedata.normalize("NFC", values["label"]),
        values.get("split"),
    )
    if not file or "\0" in file:
        raise UserError(f"{path}, line {line}: names no file")
    role = None if split is None else role_of(split)
    if split is not None and role is None:
        raise UserError(f"{path}, line {line}: split {split!r}: write train, val or test")
    if not label and role in ("val", "test"):
        raise UserError(f"{path}, line {line}: {file} has no label: only training images may have none")
    if not label.isprintable():
        raise UserError(f"{path}, line {line}: label {label!r} has characters that cannot be printed")
    return Row(file, label, role)


def _here(folder: Path, file: str) -> str:
    """The name of a file as it is written here: a list from Windows divides it by backslashes."""
    slashed = file.replace("\\", "/")
    return (
        slashed
        if slashed != file and "\0" not in file and not (folder / file).exists() and (folder / slashed).exists()
        else file
    )


def tables_in(folder: Path) -> list[Path]:
    """The CSV files directly in `folder`, or in a folder of training images in it, that list images with their labels."""
    found = []
    places = [folder, *(path for path in folder.iterdir() if role_of(path.name) == "train" and path.is_dir())]
    for path in sorted(path for place in places for path in place.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            with contextlib.suppress(UserError):
                read_rows(path)
                found.append(path)
    return found


def _classes_of(rows: list[Row], path: Path) -> tuple[str, ...]:
    classes = tuple(sorted({row.label for row in rows if row.label}))
    if not classes:
        raise UserError(f"{path}: no training image has a label")
    return classes


def _images(path: Path, rows: list[Row], classes: tuple[str, ...], config: DataConfig) -> FolderSplit:
    number = {name: label for label, name in enumerate(classes)} | {"": NO_LABEL}
    for row in rows:
        if row.label not in number:
            raise UserError(f"{path}: {row.file} is of class {row.label!r}, which no training image has")
    labels_N = np.array([number[row.label] for row in rows], np.int64)
    return FolderSplit(
        path.parent,
        [(path.parent, "")],
        [[os.fsencode(row.file) for row in rows]],
        labels_N,
        max_pixels=config.max_pixels,
    )
