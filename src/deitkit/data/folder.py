"""A folder of image files as a data set.

What lies in a folder decides what it is. A data set is one folder a class, on its own or in folders of training, validation and test
images (`train`, `Validation`, `testing`, ...: `role_of`). Beside them may be images without labels in `unlabelled`, which is no
class. Below a class folder, images may lie at any depth. Classes are compared by name in Unicode's normal form C and sorted by it,
images by the bytes of theirs. `find_layout` has the rules, docs/data.md says them in words.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from deitkit.config import MAX_PIXELS, DataConfig
from deitkit.data.caching import file_state, in_threads
from deitkit.data.dataset import (
    NO_LABEL,
    UNLABELLED,
    Dataset,
    Source,
    Split,
    assemble,
    check_classes,
    hash_with_labels,
    held_out_test,
    scan,
    with_repeated,
)
from deitkit.data.decode import Shape, decode, probe, regular_file, with_channels
from deitkit.data.listing import (
    HIDDEN,
    OUTSIDE,
    SUFFIXES,
    Walk,
    follows,
    is_hidden,
    kind_of,
    leads_up,
    left_out_line,
    listed,
)
from deitkit.terminal import UserError, plural
from deitkit.waiting import waiting_for

Role = Literal["train", "val", "test"]
_ROLES: dict[str, Role] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_ROLE = re.compile(rf"({'|'.join(_ROLES)})(?:[ _-]?(?:set|split|data|images))?", re.IGNORECASE)
_NAME_THEM = (
    "give --train-folder NAME, or rename them to train, val and test, or, if they are the classes, put all of them "
    "into a folder train"
)


class Inside(NamedTuple):
    """What lies directly in a folder."""

    folders: Mapping[str, Sequence[str]]
    """names in normal form C, without spaces around them, and as they are"""
    images: bool
    others: Counter[str]
    """files, and what hides, by kind"""


class Layout(NamedTuple):
    """The folders of a data set. Without `train` its root holds the class folders."""

    train: Path | None
    validation: Path | None = None
    test: Path | None = None
    classes: Mapping[str, Sequence[str]] = {}
    notes: Sequence[str] = ()


def role_of(name: str) -> Role | None:
    """What a folder, file or word of this name stands for, if its name says so: `Train`, `testing`, `val_set`."""
    found = _ROLE.fullmatch(name)
    return _ROLES[found[1].lower()] if found else None


def load_folder(root: Path, config: DataConfig, *, name: str) -> Dataset:
    """The data set in `root`. Raises UserError for an empty folder, a class without images, splits whose classes
    differ, too many unreadable images, and for folders that may be classes or splits."""
    layout = find_layout(root, config.train_folder)
    if layout.train is None:
        images = class_folders_split(root, layout.classes, config)
        return load_class_images(images, tuple(layout.classes), config, name, layout.notes, more=_more(root, config))
    train = class_folders_split(layout.train, layout.classes, config, beside=root)
    validation = None
    if layout.validation is not None:
        validation = _split_like(layout.validation, layout.classes, config)
    notes = [*layout.notes]
    if validation is not None and not len(validation):
        notes.append(f"{validation.root}: holds no images")
        validation = None
    dataset = assemble(
        name=name,
        classes=tuple(layout.classes),
        config=config,
        validation=None if validation is None else validation.scan(),
        train=train.scan(),
        test=None if layout.test is None else functools.partial(_test_split, layout.test, layout.classes, config),
        more_unlabelled=_more(root, config),
        notes=notes,
    )
    return with_repeated(dataset)


def load_class_images(
    images: FolderSplit, classes: tuple[str, ...], config: DataConfig, name: str, notes: Sequence[str], *, more: bool
) -> Dataset:
    """The data set of images that nobody has split: a fifth of each class is the test split. `more`: whether there are images without
    labels elsewhere."""
    labelled = np.flatnonzero(images.labels_N != NO_LABEL)
    test_rows = labelled[held_out_test(images.labels_N[labelled], config.data_seed)]
    dataset = assemble(
        name=name,
        classes=classes,
        config=config,
        train=images.subset(np.setdiff1d(np.arange(len(images)), test_rows), 3).scan(),
        test=(lambda: images.subset(test_rows, 3)) if len(test_rows) else None,
        set_aside=len(test_rows),
        more_unlabelled=more,
        notes=notes,
    )
    return with_repeated(dataset)


def load_whole(root: Path, config: DataConfig) -> tuple[FolderSplit, tuple[str, ...]] | None:
    """All images of a folder of class folders, and the classes; None where the folder is split. Raises UserError."""
    layout = find_layout(root, config.train_folder)
    if layout.train is not None:
        return None
    return class_folders_split(root, layout.classes, config.model_copy(update={"unlabelled": False})), tuple(
        layout.classes
    )


# ------------------------------------------------------------------------------------------------------ layout


def find_layout(root: Path, train: str | None = None) -> Layout:
    """Which of the folders in `root` are splits, which are classes, and what to tell of the others. `train`: the folder of the training
    images, if it is named. Only folders' names and the kinds of their files are looked at. Raises UserError where nothing decides."""
    inside = look(root)
    names = {name: given for name, given in inside.folders.items() if name.lower() not in UNLABELLED}
    if not names:
        found = f"no folder beside {', '.join(inside.folders)}" if inside.folders else "no folders"
        raise UserError(f"{root}: holds {found}; expected train/ and test/, or one folder of images for each class")
    shown = {name: look(root / given[0], whole=role_of(name) is not None) for name, given in names.items()}
    split = [name for name in shown if role_of(name) and shown[name].folders and not _loose_class(name, shown)]
    if train is not None:
        if (named := _name(train)) not in shown:
            raise UserError(f"--train-folder {train}: {root} has no such folder, only {', '.join([*names][:5])}")
        return _splits(root, [named], split, shown, names)
    trains = [name for name in split if role_of(name) == "train"] or _train_by_content(root, split, shown)
    if trains:
        return _splits(root, trains, split, shown, names)
    if images := [name for name in shown if shown[name].images]:
        if all(map(role_of, images)):
            raise UserError(f"{root / images[0]}: holds no folders; expected one folder of images for each class")
    elif len(names) == 1 and not split and (below := _below_wrappers(root / names[next(iter(names))][0])):
        raise UserError(f"{root}: holds a single folder: give {below}")
    elif split:
        raise UserError(
            f"{root}: holds {', '.join(list(names)[:5])}, but no train/ folder; name the training images so"
        )
    for name in split:
        if {*shown[name].folders} & {*names}:
            raise UserError(
                f"{root}: {name}/ holds folders of the same names as those beside it: put the others into train/"
            )
    notes = [
        f"{name}/ holds images, no class folders: it is a class like those beside it" for name in names if role_of(name)
    ]
    return Layout(None, classes=names, notes=[*notes, *_nested(shown), *_twice(root, names)])


def _nested(classes: Mapping[str, Inside]) -> list[str]:
    """A note of the class folders that hold folders alone."""
    found = [f"{name}/" for name, inside in classes.items() if inside.folders and not inside.images]
    which = f"{', '.join(found[:3])}{', ...' if len(found) > 3 else ''}"
    return [f"{which}: no images directly inside; the images of the folders below are of that class"] if found else []


def _below_wrappers(folder: Path) -> Path | None:
    """The first folder from here on down with several folders in it, where all above hold a single folder each and no images."""
    while len((inside := look(folder)).folders) == 1 and not inside.images:
        folder /= next(iter(inside.folders.values()))[0]
    return folder if len(inside.folders) > 1 else None


def _loose_class(name: str, shown: Mapping[str, Inside]) -> bool:
    """Whether a folder that is named like a split is a class: it holds images, as do others that are not named so."""
    return shown[name].images and any(one.images and role_of(other) is None for other, one in shown.items())


def _train_by_content(root: Path, split: Sequence[str], shown: Mapping[str, Inside]) -> list[str]:
    """The training images' folder where no name says so: that of several with the same folders which is not named like another split.
    Raises UserError where there is more than one."""
    alike = [name for name, one in shown.items() if len(one.folders) > 1 and not one.images]
    if (
        len(alike) < 2
        or len(alike) < len(shown)
        or any({*shown[name].folders} != {*shown[alike[0]].folders} for name in alike)
    ):
        return []
    nameless = [name for name in alike if name not in split]
    if len(nameless) > 1:
        kinds = ", ".join([*shown[alike[0]].folders][:3])
        raise UserError(
            f"{root}: {' and '.join(alike[:4])} hold the same folders ({kinds}), as splits do: {_NAME_THEM}"
        )
    return nameless


def _splits(
    root: Path, trains: list[str], split: list[str], shown: Mapping[str, Inside], names: Mapping[str, Sequence[str]]
) -> Layout:
    """The layout of a folder with a folder of training images."""
    others = {role: [name for name in names if role_of(name) == role] for role in ("val", "test")}
    for found in (trains, *others.values()):
        if len(found) > 1:
            raise UserError(f"{root}: holds both {' and '.join(found)}; keep one {role_of(found[0]) or 'train'} split")
    train = trains[0]
    classes = shown[train].folders
    beside = [name for name in names if name != train and role_of(name) in (None, "train") and shown[name].images]
    if len(split) == 1 and len(beside) > 1 and role_of(train):
        raise UserError(
            f"{root}: {train}/ holds folders, as a split does, but {', '.join(beside[:3])} beside it hold images, as classes do: "
            f"put all class folders into {train}/, or move them elsewhere"
        )
    notes, used = [], dict[str, Path]()
    if role_of(train) is None:
        notes.append(f"{train}/ is taken for the training images")
    for role, found in others.items():
        for name in found:
            why = _check_classes_of(root, train, classes, name, shown[name])
            if why:
                notes.append(why)
            else:
                used[role] = root / names[name][0]
                missing = [repr(one) for one in classes if one not in shown[name].folders]
                notes += [f"{name}/ has no folder {', '.join(missing[:5])}"] if missing and role == "test" else []
    same = [name for name in names if name != train and role_of(name) is None and {*shown[name].folders} == {*classes}]
    notes += [
        f"{name}/ has the same folders as {train}/ and is left out: name it val or test to use it" for name in same
    ]
    notes += [f"{name}/ holds images beside the splits and is left out" for name in beside if name not in same]
    for name in names:
        if name not in (train, *others["val"], *others["test"], *same, *beside) and (
            count := _images_in(root, names[name])
        ):
            notes.append(f"{name}/ beside the splits is left out: {plural(count, 'image')}")
    within = root / names[train][0]
    notes += _nested({name: look(within / given[0], whole=False) for name, given in classes.items()})
    notes += _twice(root / train, classes)
    return Layout(root / names[train][0], used.get("val"), used.get("test"), classes, notes)


def _images_in(root: Path, folders: Sequence[str]) -> int:
    """How many images there are in these folders of `root`, at any depth."""
    return sum(map(len, Walk().images([os.fsencode(root / folder) for folder in folders])))


def _check_classes_of(root: Path, train: str, classes: Mapping[str, Any], split: str, inside: Inside) -> str:
    """Why a split cannot be used; empty if it can. Raises UserError where it has classes that the training images lack."""
    extra = [repr(name) for name in inside.folders if name not in classes]
    common = [name for name in inside.folders if name in classes]
    if not inside.folders:
        return f"{split}/ {'holds images without labels' if inside.images else 'is empty'} and is left out"
    if not common and len(extra) == 1:
        return f"{split}/ has no class of {train}/, only {extra[0]}, and is left out"
    if extra:
        more = ", ..." if len(extra) > 5 else ""
        raise UserError(
            f"{root}: {split}/ has {', '.join(extra[:5])}{more}, which {train}/ lacks: give all splits folders of the same names"
        )
    return ""


def _twice(root: Path, classes: Mapping[str, Sequence[str]]) -> list[str]:
    """Of folders whose names differ in their bytes alone."""
    return [
        f"{root}: {len(given)} folders are called {name!r}, but for spaces or how letters are coded: they are one class"
        for name, given in classes.items()
        if len(given) > 1
    ]


def _name(name: str) -> str:
    """In normal form C, without spaces around it."""
    name = unicodedata.normalize("NFC", name)
    return name.strip() or name


def look(folder: Path, *, whole: bool = True) -> Inside:
    """What lies directly in `folder`. `whole=False`: up to the first image, of which a class folder may have very many. Raises
    UserError."""
    folders: dict[str, list[str]] = {}
    others = Counter[str]()
    with listed(os.fsencode(folder)) as (_, entries):
        for entry in entries:
            if is_hidden(entry.name):
                others[HIDDEN] += 1
            elif follows(entry.is_dir):
                if not (entry.is_symlink() and leads_up(entry.path)):
                    name = os.fsdecode(entry.name)
                    folders.setdefault(_name(name), []).append(name)
            elif (kind := kind_of(entry)) is None:
                others[OUTSIDE] += 1
                if not whole:
                    break
            else:
                others[kind] += 1
    return Inside({name: sorted(folders[name]) for name in sorted(folders)}, OUTSIDE in others, others)


def class_folders(root: Path) -> Mapping[str, Sequence[str]]:
    """The folders in `root` by the names of their classes, in order. Raises UserError."""
    return look(root).folders


def unlabelled_folder(root: Path) -> Path | None:
    """The folder of images without labels in `root`. Raises UserError if there are two."""
    folders = class_folders(root)
    found = [root / given for kind in UNLABELLED for name in folders if name.lower() == kind for given in folders[name]]
    if len(found) > 1:
        raise UserError(
            f"{root}: holds both {' and '.join(path.name for path in found)}; keep one folder of images without labels"
        )
    return found[0] if found else None


def _more(root: Path, config: DataConfig) -> bool:
    return not config.unlabelled and unlabelled_folder(root) is not None


# ------------------------------------------------------------------------------------------------------ images


@final
class FolderSplit(Split):
    """Image files, read one by one: `names` below `places`, which are folders with what the images' keys begin with. The names are one
    block of bytes: a million of them cost no million objects."""

    def __init__(
        self,
        root: Path,
        places: Sequence[tuple[Path, str]],
        names: Sequence[Sequence[bytes]],
        labels_N: NDArray[np.int64],
        left_out: Mapping[str, int] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """`names`: of each place."""
        self.root, self._places, self._max_pixels, self.left_out = root, places, max_pixels, dict(left_out or {})
        self._names: Any = pa.array([name for some in names for name in some], pa.large_binary())
        self._place_N = np.repeat(np.arange(len(places), dtype=np.int32), [len(some) for some in names])
        self.labels_N, self.rows_N, self.channels = labels_N, np.arange(len(labels_N)), 3

    def _place(self, position: int) -> tuple[Path, str, str]:
        """Folder, beginning of the key, and name below it."""
        row = int(self.rows_N[position])
        return *self._places[int(self._place_N[row])], os.fsdecode(self._names[row].as_py())

    def path(self, position: int) -> Path:
        folder, _, name = self._place(position)
        return folder / name

    def stored(self, position: int) -> bytes:
        path = self.path(position)
        with waiting_for(path), open(path, "rb", opener=regular_file) as file:
            return file.read()

    def stored_size(self, position: int) -> int:
        path = self.path(position)
        with waiting_for(path):
            return path.stat().st_size

    def read(self, position: int) -> NDArray[np.uint8]:
        path = self.path(position)
        return with_channels(decode(path, str(path), self._max_pixels), self.channels)

    def scan(self) -> Source:
        return scan(self, self.probe, f"{self.mtime_hash()} {self._max_pixels}")

    def probe(self, position: int, whole: bool) -> Shape:
        path = self.path(position)
        return probe(path, str(path), whole=whole, max_pixels=self._max_pixels)

    def name(self, position: int) -> str:
        return str(self.path(position))

    def key(self, position: int) -> str:
        """Class and file name, with slashes, wherever the data lies."""
        _, beginning, name = self._place(position)
        return f"{beginning}{name}"

    def content_hash(self) -> str:
        """Reads every file once, on all processors: its name below the split's folder, its size and its content
        count, where the folder lies does not."""
        return hash_with_labels(self.labels_N, in_threads(self._content, range(len(self))))

    def mtime_hash(self) -> str:
        """Opens no file: names, sizes and times of all files."""
        return hash_with_labels(self.labels_N, in_threads(self._state, range(len(self))))

    def _content(self, position: int) -> bytes:
        digest = hashlib.sha256()
        try:
            content = self.stored(position)
        except OSError as error:  # it cannot be read in training either: counts nothing there, and is named
            content, digest = b"", hashlib.sha256(type(error).__name__.encode())
        digest.update(os.fsencode(self.key(position)) + b"\0" + str(len(content)).encode() + b"\0")
        digest.update(content)
        return digest.digest()

    def _state(self, position: int) -> bytes:
        state = os.fsencode(self.key(position)) + b"\0" + file_state(self.path(position))
        return hashlib.sha256(state).digest()


def class_folders_split(
    root: Path, classes: Mapping[str, Sequence[str]], config: DataConfig, beside: Path | None = None
) -> FolderSplit:
    """The images of the class folders of `root`, all of which hold some; at the end those without labels, where `config` wants them,
    which lie in `beside`, or in `root`. Raises UserError."""
    unlabelled = unlabelled_folder(beside or root) if config.unlabelled else None
    images = _split_like(root, classes, config, unlabelled)
    if beside is not None:
        images.left_out = dict(Counter(images.left_out) + look(beside).others)
    why = left_out_line(images.left_out)
    if not len(images):
        raise UserError(
            f"{root}: no images in its folders; their names end in {', '.join(SUFFIXES)}{f' ({why})' if why else ''}"
        )
    check_classes(images.labels_N, tuple(classes), f"{root}{f' ({why})' if why else ''}")
    return images


def _split_like(
    root: Path, classes: Mapping[str, Sequence[str]], config: DataConfig, unlabelled: Path | None = None
) -> FolderSplit:
    """The images in `root` of these classes, whose folders it need not have."""
    inside = look(root)
    for name in classes:
        if not name.isprintable():  # a class has to have a name that can be shown and written down
            raise UserError(f"{root}: folder {name!r} has a name with characters that cannot be printed: rename it")
    places = [
        (root / given, f"{name}/", label)
        for label, name in enumerate(classes)
        for given in inside.folders.get(name, ())
    ]
    places += [(unlabelled, f"{unlabelled.name}/", NO_LABEL)] if unlabelled is not None else []
    walk = Walk()
    names = walk.images([os.fsencode(folder) for folder, _, _ in places])
    labels_N = np.repeat([label for _, _, label in places], [len(some) for some in names]).astype(np.int64)
    left_out = walk.left_out + inside.others
    return FolderSplit(root, [place[:2] for place in places], names, labels_N, left_out, config.max_pixels)


def _test_split(root: Path, classes: Mapping[str, Sequence[str]], config: DataConfig) -> FolderSplit:
    images = _split_like(root, classes, config)
    if not len(images):
        raise UserError(f"{root}: no images in its folders; their names end in {', '.join(SUFFIXES)}")
    return images
