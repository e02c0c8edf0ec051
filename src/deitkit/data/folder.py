"""An image folder: one folder a class, in `train/`, `val/` and `test/`, or on its own; beside them, images without labels in
`unlabelled/`, which is no class.

Names of files and folders that start with a dot are ignored, and so are files whose names do not end like an
image's. Below a class folder, images may lie at any depth. Classes are sorted by name, images by the bytes of theirs.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from deitkit.config import DataConfig
from deitkit.data.dataset import (
    NO_LABEL,
    UNLABELLED,
    Dataset,
    Source,
    Split,
    assemble,
    check_classes,
    held_out_test,
    in_threads,
    scan,
    state_of,
)
from deitkit.data.images import Shape, decode, probe, with_channels
from deitkit.terminal import UserError

SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_SUFFIXES = tuple(os.fsencode(suffix) for suffix in SUFFIXES)
_VALIDATION_NAMES = ("val", "valid", "validation")
SPLIT_NAMES = ("train", *_VALIDATION_NAMES, "test")


@final
class Names:
    """Many file names in one block of bytes, so that a million of them cost no million objects."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self._block = np.frombuffer(b"".join(names), np.uint8)
        self._ends_N = np.cumsum([len(name) for name in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends_N)

    def __getitem__(self, position: int) -> bytes:
        start = self._ends_N[position - 1] if position else 0
        return self._block[start : self._ends_N[position]].tobytes()


@final
class FileTable:
    """The image files of `root`, by row: class folder and name below it; at the end those of the folder `unlabelled`, where
    there is one. Opens none of them."""

    def __init__(self, root: Path, classes: tuple[str, ...], unlabelled: Path | None = None) -> None:
        folders = {number: root / name for number, name in enumerate(classes)}
        if unlabelled is not None:
            folders[NO_LABEL] = unlabelled
        self._folders = folders
        found = [sorted(_image_files(os.fsencode(folder))) for folder in folders.values()]
        self.labels_N = np.repeat(list(folders), [len(names) for names in found]).astype(np.int64)
        self._names = Names([name for names in found for name in names])

    def __len__(self) -> int:
        return len(self.labels_N)

    def relative(self, row: int) -> str:
        """Class folder and file name, with slashes, wherever the data lies."""
        return f"{self._folders[int(self.labels_N[row])].name}/{os.fsdecode(self._names[row])}"

    def path(self, row: int) -> Path:
        return self._folders[int(self.labels_N[row])] / os.fsdecode(self._names[row])


@final
class FolderSplit(Split):
    """Some rows of a file table, read one by one."""

    def __init__(self, files: FileTable, rows_N: NDArray[np.int64], channels: int) -> None:
        self.labels_N = files.labels_N[rows_N]
        self.channels = channels
        self._files = files
        self._rows_N = rows_N
        self._fingerprint: str | None = None

    def read(self, position: int) -> NDArray[np.uint8]:
        path = self._files.path(int(self._rows_N[position]))
        return with_channels(decode(path, str(path)), self.channels)

    def name(self, position: int) -> str:
        return str(self._files.path(int(self._rows_N[position])))

    def place(self, position: int) -> str:
        return self._files.relative(int(self._rows_N[position]))

    def content_hash(self) -> str:
        """Reads every file once, on all processors: its name below the split's folder, its size and its content
        count, where the folder lies does not."""
        if self._fingerprint is None:
            digest = hashlib.sha256(np.ascontiguousarray(self.labels_N, "<i8").tobytes())
            for part in in_threads(self._hash, len(self)):
                digest.update(part)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def stamp(self) -> str:
        """Opens no file: names, sizes and times of all files."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels_N, "<i8").tobytes())
        for part in in_threads(self._state, len(self)):
            digest.update(part)
        return digest.hexdigest()

    def _state(self, position: int) -> bytes:
        row = int(self._rows_N[position])
        try:
            state = state_of(self._files.path(row))
        except OSError as error:
            state = type(error).__name__.encode()
        return hashlib.sha256(os.fsencode(self._files.relative(row)) + b"\0" + state).digest()

    def _hash(self, position: int) -> bytes:
        row = int(self._rows_N[position])
        digest = hashlib.sha256()
        try:
            content = self._files.path(row).read_bytes()
        except OSError as error:  # it cannot be read in training either: counts nothing there, and is named
            content, digest = b"", hashlib.sha256(type(error).__name__.encode())
        digest.update(os.fsencode(self._files.relative(row)) + b"\0" + str(len(content)).encode() + b"\0")
        digest.update(content)
        return digest.digest()


@final
class FolderSource(Source):
    """The rows of a file table that may be looked at (those of the test split may not), scanned."""

    def __init__(self, files: FileTable, rows_N: NDArray[np.int64]) -> None:
        self.labels_N = files.labels_N[rows_N]
        self._files = files
        self._rows_N = rows_N
        self.scan = scan(self._probe, len(rows_N))

    def splits(self, parts: Sequence[NDArray[np.int64]], channels: int, title: str) -> list[Split]:
        return [FolderSplit(self._files, self._rows_N[part], channels) for part in parts]

    def _probe(self, position: int, whole: bool) -> Shape:
        path = self._files.path(int(self._rows_N[position]))
        return probe(path, str(path), whole=whole)


def load_folder(root: Path, config: DataConfig, *, name: str) -> Dataset:
    """The data set in `root`. Raises UserError for an empty folder, a class without images, splits whose classes
    differ, too many unreadable images."""
    folders = class_folders(root)
    if not folders:
        raise UserError(f"{root}: holds no folders; expected train/ and test/, or one folder of images for each class")
    validation_names = [entry for entry in _VALIDATION_NAMES if entry in folders]
    if len(validation_names) > 1:
        raise UserError(f"{root}: holds both {' and '.join(validation_names)}; keep one validation split")
    if "train" not in folders:
        if "test" in folders or validation_names:
            raise UserError(
                f"{root}: holds {', '.join(folders[:5])}, but no train/ folder; name the training images so"
            )
        return _load_class_folders(root, folders, config, name)
    return _load_splits(root, validation_names[0] if validation_names else None, "test" in folders, config, name)


def _load_splits(root: Path, validation_name: str | None, has_test: bool, config: DataConfig, name: str) -> Dataset:
    classes = tuple(class_folders(root / "train"))
    if not classes:
        raise UserError(f"{root / 'train'}: holds no folders; expected one folder of images for each class")
    # Of the test split only the class names are looked at.
    for other in ([validation_name] if validation_name else []) + (["test"] if has_test else []):
        _check_same_classes(root, classes, tuple(class_folders(root / other)), other)

    def source(split: str) -> FolderSource:
        files = _table(root / split, classes)
        return FolderSource(files, np.arange(len(files)))

    def test(channels: int) -> Split:
        files = _table(root / "test", classes)
        return FolderSplit(files, np.arange(len(files)), channels)

    unlabelled = unlabelled_folder(root)
    train = _table(root / "train", classes, unlabelled if config.unlabelled else None)
    validation = source(validation_name) if validation_name else None
    return assemble(
        name=name,
        classes=classes,
        mirror_safe=True,
        config=config,
        train=FolderSource(train, np.arange(len(train))),
        validation=validation,
        test=test if has_test else None,
        more_unlabelled=unlabelled is not None,
    )


def _load_class_folders(root: Path, folders: list[str], config: DataConfig, name: str) -> Dataset:
    classes, unlabelled = tuple(folder for folder in folders if folder not in UNLABELLED), unlabelled_folder(root)
    if not classes:
        raise UserError(f"{root}: holds no folder beside {', '.join(folders)}; expected one of images for each class")
    files = _table(root, classes, unlabelled if config.unlabelled else None)
    labelled = np.flatnonzero(files.labels_N != NO_LABEL)
    test_rows = labelled[held_out_test(files.labels_N[labelled], config.data_seed)]

    def test(channels: int) -> Split:
        return FolderSplit(files, test_rows, channels)

    return assemble(
        name=name,
        classes=classes,
        mirror_safe=True,
        config=config,
        train=FolderSource(files, np.setdiff1d(np.arange(len(files)), test_rows)),
        validation=None,
        test=test if len(test_rows) else None,
        set_aside=len(test_rows),
        more_unlabelled=unlabelled is not None,
    )


def images_below(folder: Path) -> list[Path]:
    """All image files of a folder, at any depth, in order of their names. Raises UserError where it cannot be listed."""
    return sorted(folder / os.fsdecode(name) for name in _image_files(os.fsencode(folder)))


def _table(root: Path, classes: tuple[str, ...], unlabelled: Path | None = None) -> FileTable:
    files = FileTable(root, classes, unlabelled)
    if not len(files):
        raise UserError(f"{root}: no images in its folders; their names end in {', '.join(SUFFIXES)}")
    check_classes(files.labels_N[files.labels_N != NO_LABEL], classes, str(root))
    return files


def _check_same_classes(root: Path, train: tuple[str, ...], other: tuple[str, ...], split: str) -> None:
    def listed(names: set[str]) -> str:
        return ", ".join(repr(name) for name in sorted(names)[:5]) + (", ..." if len(names) > 5 else "")

    missing, extra = set(train) - set(other), set(other) - set(train)
    said = ([f"{split}/ lacks {listed(missing)}"] if missing else []) + (
        [f"{split}/ has {listed(extra)}, which train/ lacks"] if extra else []
    )
    if said:
        raise UserError(
            f"{root}: the classes of the splits differ: {'; '.join(said)}; give all splits the same folders"
        )


def unlabelled_folder(root: Path) -> Path | None:
    """The folder of images without labels in `root`. Raises UserError where there are two."""
    found = [root / name for name in UNLABELLED if (root / name).is_dir()]
    if len(found) > 1:
        raise UserError(f"{root}: holds both {' and '.join(UNLABELLED)}; keep one folder of images without labels")
    return found[0] if found else None


def class_folders(root: Path) -> list[str]:
    """The names of the folders in `root`, in order: its classes. Raises UserError."""
    try:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError as error:
        raise UserError(f"{root}: cannot be listed: {error.strerror}") from error
    for name in names:
        if not name.isprintable():  # a class has to have a name that can be shown and written down
            raise UserError(f"{root}: folder {name!r} has a name with characters that cannot be printed: rename it")
    return names


def _may_be_a_file(entry: os.DirEntry[bytes]) -> bool:
    """Whether to treat a folder's entry as an image: a link that leads nowhere is one that cannot be read."""
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return True


def _image_files(folder: bytes, below: bytes = b"") -> Iterator[bytes]:
    """Names relative to `folder`. Links to folders are not followed: they may lead in circles. Pipes, sockets and devices
    are no images, whatever their names: opening one may wait for ever."""
    deeper = []
    try:
        with os.scandir(folder + b"/" + below) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    deeper.append(below + entry.name + b"/")
                elif entry.name.lower().endswith(_SUFFIXES) and _may_be_a_file(entry):
                    yield below + entry.name
    except OSError as error:
        raise UserError(f"{os.fsdecode(folder + b'/' + below)}: cannot be listed: {error.strerror}") from error
    for name in deeper:
        yield from _image_files(folder, name)
