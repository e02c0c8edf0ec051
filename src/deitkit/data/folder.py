"""Image files: a folder of them as a data set, and the bytes of one as upright pixels.

A data set is one folder a class, in `train/`, `val/` and `test/`, or on its own; beside them, images without labels in
`unlabelled/`, which is no class. Names of files and folders that start with a dot are ignored, and so are files whose names
do not end like an image's. Below a class folder, images may lie at any depth. Classes are sorted by name, images by the
bytes of theirs.

Every file is decoded by one rule. Grey (C = 1) are the modes that hold no colour: 1-bit, 8-bit and 16-bit grey, with or
without alpha. Everything else is RGB (C = 3), palettes included. Transparency is laid over white. 16-bit grey is divided by
257 and rounded, so that 65535 becomes 255. Of several frames the first counts.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from deitkit.config import DataConfig
from deitkit.data.dataset import (
    NO_LABEL,
    UNLABELLED,
    Dataset,
    Shape,
    Source,
    Split,
    UnreadableImage,
    assemble,
    check_classes,
    file_state,
    hash_with_labels,
    held_out_test,
    in_threads,
    scan,
    with_channels,
)
from deitkit.terminal import UserError

SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_SUFFIXES = tuple(os.fsencode(suffix) for suffix in SUFFIXES)
_VALIDATION_NAMES = ("val", "valid", "validation")
SPLIT_NAMES = ("train", *_VALIDATION_NAMES, "test")

ImageFile = Path | bytes | memoryview
"""An image file, or its content."""
_ORIENTATION = 0x0112  # the tag's number in EXIF 2.3, table 4
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N", "I"})
_MAY_HOLD_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_PIXMAP = re.compile(rb"P([56]) (\d{1,5}) (\d{1,5}) 255\n")


def load_folder(root: Path, config: DataConfig, *, name: str) -> Dataset:
    """The data set in `root`. Raises UserError for an empty folder, a class without images, splits whose classes
    differ, too many unreadable images."""
    folders = class_folders(root)
    if not folders:
        raise UserError(f"{root}: holds no folders; expected train/ and test/, or one folder of images for each class")
    validation = [entry for entry in _VALIDATION_NAMES if entry in folders]
    if len(validation) > 1:
        raise UserError(f"{root}: holds both {' and '.join(validation)}; keep one validation split")
    others = validation + (["test"] if "test" in folders else [])
    if "train" in folders:
        return _load_splits(root, others, config, name)
    if others:
        raise UserError(f"{root}: holds {', '.join(folders[:5])}, but no train/ folder; name the training images so")
    return _load_class_folders(root, folders, config, name)


def _load_splits(root: Path, others: list[str], config: DataConfig, name: str) -> Dataset:
    """`train/` and the `others`: a validation split, `test`, both or none."""
    classes = tuple(class_folders(root / "train"))
    if not classes:
        raise UserError(f"{root / 'train'}: holds no folders; expected one folder of images for each class")
    for other in others:  # of the test split only the class names are looked at
        _check_same_classes(root, classes, tuple(class_folders(root / other)), other)
    unlabelled = unlabelled_folder(root)
    train = FolderSplit(root / "train", classes, unlabelled if config.unlabelled else None)
    validation = next((FolderSplit(root / other, classes) for other in others if other != "test"), None)
    return assemble(
        name=name,
        classes=classes,
        config=config,
        validation=None if validation is None else validation.scan(),
        train=train.scan(),
        test=(lambda: FolderSplit(root / "test", classes)) if "test" in others else None,
        more_unlabelled=unlabelled is not None,
    )


def _load_class_folders(root: Path, folders: list[str], config: DataConfig, name: str) -> Dataset:
    classes, unlabelled = tuple(folder for folder in folders if folder not in UNLABELLED), unlabelled_folder(root)
    if not classes:
        raise UserError(f"{root}: holds no folder beside {', '.join(folders)}; expected one of images for each class")
    images = FolderSplit(root, classes, unlabelled if config.unlabelled else None)
    labelled = np.flatnonzero(images.labels_N != NO_LABEL)
    test_rows = labelled[held_out_test(images.labels_N[labelled], config.data_seed)]
    return assemble(
        name=name,
        classes=classes,
        config=config,
        train=images.subset(np.setdiff1d(np.arange(len(images)), test_rows), 3).scan(),
        test=(lambda: images.subset(test_rows, 3)) if len(test_rows) else None,
        set_aside=len(test_rows),
        more_unlabelled=unlabelled is not None,
    )


@final
class FolderSplit(Split):
    """The image files of `root`, read one by one: by class folder and name below it; at the end those of the folder
    `unlabelled`, if given. The names are one block of bytes: a million of them cost no million objects. Raises UserError for
    a class without images."""

    def __init__(self, root: Path, classes: tuple[str, ...], unlabelled: Path | None = None) -> None:
        self._folders = {number: root / name for number, name in enumerate(classes)}
        if unlabelled is not None:
            self._folders[NO_LABEL] = unlabelled
        found = [sorted(_image_files(os.fsencode(folder))) for folder in self._folders.values()]
        self._names: Any = pa.array([name for names in found for name in names], pa.large_binary())
        if not len(self._names):
            raise UserError(f"{root}: no images in its folders; their names end in {', '.join(SUFFIXES)}")
        self.labels_N = np.repeat(list(self._folders), [len(names) for names in found]).astype(np.int64)
        check_classes(self.labels_N, classes, str(root))
        # Labels may be taken away from a split, folders not.
        self._numbers_N, self.rows_N, self.channels = self.labels_N, np.arange(len(self.labels_N)), 3

    def _place(self, position: int) -> tuple[Path, str]:
        """Folder of the class, and name below it."""
        row = int(self.rows_N[position])
        return self._folders[int(self._numbers_N[row])], os.fsdecode(self._names[row].as_py())

    def path(self, position: int) -> Path:
        folder, name = self._place(position)
        return folder / name

    def read(self, position: int) -> NDArray[np.uint8]:
        path = self.path(position)
        return with_channels(decode(path, str(path)), self.channels)

    def scan(self) -> Source:
        return scan(self, self.probe, self.mtime_hash())

    def probe(self, position: int, whole: bool) -> Shape:
        path = self.path(position)
        return probe(path, str(path), whole=whole)

    def name(self, position: int) -> str:
        return str(self.path(position))

    def key(self, position: int) -> str:
        """Class folder and file name, with slashes, wherever the data lies."""
        folder, name = self._place(position)
        return f"{folder.name}/{name}"

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
            content = self.path(position).read_bytes()
        except OSError as error:  # it cannot be read in training either: counts nothing there, and is named
            content, digest = b"", hashlib.sha256(type(error).__name__.encode())
        digest.update(os.fsencode(self.key(position)) + b"\0" + str(len(content)).encode() + b"\0")
        digest.update(content)
        return digest.digest()

    def _state(self, position: int) -> bytes:
        state = os.fsencode(self.key(position)) + b"\0" + file_state(self.path(position))
        return hashlib.sha256(state).digest()


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


def unlabelled_folder(root: Path) -> Path | None:
    """The folder of images without labels in `root`. Raises UserError if there are two."""
    found = [root / name for name in UNLABELLED if (root / name).is_dir()]
    if len(found) > 1:
        raise UserError(f"{root}: holds both {' and '.join(UNLABELLED)}; keep one folder of images without labels")
    return found[0] if found else None


def image_paths(paths: Iterable[str | Path], listed: Iterable[str] = ()) -> list[Path]:
    """Files as given; folders as the image files in them, at any depth; patterns (`photos/*.jpg`, `photos/**/*.png`) as the files
    that match; both ordered by name. What exists is no pattern. `listed`: lines, each a path, that `-` stands for. Raises UserError
    for a folder without images, one that cannot be listed, and a pattern that nothing matches."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = _images_below(path)
            if not below:
                raise UserError(f"{path}: no images in this folder ({' '.join(SUFFIXES)})")
        elif str(path) == "-" and not path.exists():
            # a name in a list is no pattern, and one that is missing is left out like an unreadable one
            listed_paths = [Path(line) for line in listed if line.strip()]
            if not listed_paths:
                raise UserError("-: standard input lists no image")
            below = [one for path in listed_paths for one in (image_paths([path]) if path.is_dir() else [path])]
        elif not path.exists() and glob.has_magic(str(path)):
            matches = glob.iglob(str(path), recursive=True)  # noqa: PTH207 - the pattern may be absolute
            each = (_images_below(one) if one.is_dir() else [one] for one in sorted(map(Path, matches)))
            matching = list(
                dict.fromkeys(one for some in each for one in some)
            )  # `**` matches a folder and what is in it
            # beside images other files are not meant
            below = [one for one in matching if one.suffix.lower() in SUFFIXES] or matching
            if not below:
                raise UserError(f"{path}: no file matches this pattern")
        else:
            below = [path]
        found += below
    return found


def _images_below(folder: Path) -> list[Path]:
    """The image files in a folder, at any depth, ordered by name."""
    return sorted(folder / os.fsdecode(name) for name in _image_files(os.fsencode(folder)))


def _check_same_classes(root: Path, train: tuple[str, ...], other: tuple[str, ...], split: str) -> None:
    def listed(names: set[str]) -> str:
        return ", ".join(repr(name) for name in sorted(names)[:5]) + (", ..." if len(names) > 5 else "")

    missing, extra = set(train) - set(other), set(other) - set(train)
    differences = [f"{split}/ lacks {listed(missing)}"] if missing else []
    differences += [f"{split}/ has {listed(extra)}, which train/ lacks"] if extra else []
    if differences:
        raise UserError(
            f"{root}: the classes of the splits differ: {'; '.join(differences)}; give all splits the same folders"
        )


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


def decode(source: ImageFile, name: str) -> NDArray[np.uint8]:
    """The upright pixels: uint8 of shape (H, W, C), C = 1 where the file holds no colour, else 3.

    Raises UnreadableImage, whose message is `name: why`."""
    if not isinstance(source, Path) and (pixmap := _plain_pixmap(source)) is not None:
        return pixmap
    try:
        with _open(source) as image:
            return upright_pixels(image)
    except Exception as error:  # Pillow's plugins raise anything from OSError to SyntaxError and struct.error
        raise _unreadable(error, name) from error


def upright_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """`decode` for an image that Pillow has opened or made. Raises whatever Pillow does, ValueError for unknown ranges."""
    image.load()
    if not image.width * image.height:
        raise ValueError("it has no pixels")
    # Pillow's memory is read-only, which torch.from_numpy warns about.
    return np.require(_upright(_pixels(image), _orientation(image)), requirements=["C", "W"])


def probe(source: ImageFile, name: str, *, whole: bool) -> Shape:
    """What `decode` would return the shape of. Raises UnreadableImage.

    `whole=False` reads the header alone; `whole=True` also runs through all of the file's data, and so finds
    truncated ones. JPEGs are run through at an eighth of their size, which reads every byte all the same."""
    try:
        with _open(source) as image:
            if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
                whole = True  # only decoding tells whether the range is known
            (width, height), mode = image.size, image.mode
            if whole:
                if image.format in ("JPEG", "MPO"):
                    image.draft(image.mode, (max(width // 8, 1), max(height // 8, 1)))
                image.load()
                if image.format == "TIFF":  # Pillow turns these itself while it loads them
                    width, height = image.size
                if mode in ("I", "F"):
                    _pixels(image)
            if _orientation(image) >= 5:
                width, height = height, width
            return Shape(height, width, 1 if mode in _GREY_MODES else 3)
    except Exception as error:
        raise _unreadable(error, name) from error


@contextmanager
def _open(source: ImageFile) -> Iterator[Image.Image]:
    with open(source, "rb", opener=_regular_file) if isinstance(source, Path) else io.BytesIO(source) as stream:
        if not stream.read(1):
            raise OSError("the file is empty")
        stream.seek(0)
        with Image.open(stream) as image:
            yield image


def portable_pixmap(image_HWC: NDArray[np.uint8]) -> bytes:
    """The image as a PGM (grey) or PPM (colour) file: a line of text, then the pixels."""
    height, width, channels = image_HWC.shape
    return f"P{5 if channels == 1 else 6} {width} {height} 255\n".encode() + image_HWC.tobytes()


def _plain_pixmap(content: bytes | memoryview) -> NDArray[np.uint8] | None:
    """The pixels of what `portable_pixmap` wrote, six times as fast as through Pillow; None for any other content."""
    header = _PIXMAP.match(content)
    if header is None:
        return None
    channels, width, height = 1 if header[1] == b"5" else 3, int(header[2]), int(header[3])
    if not width * height or len(content) - header.end() != width * height * channels:
        return None
    return np.frombuffer(content, np.uint8, offset=header.end()).reshape(height, width, channels).copy()


def _regular_file(path: str, flags: int) -> int:
    """An opener that does not wait for what a pipe may bring."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is no file but a folder, a pipe or a device")
    return descriptor


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16"):
        return _eight_bits(np.asarray(image))
    if image.mode == "I":
        # 32-bit integers: PNG and PGM store 16-bit grey in them, in other formats the range is anyone's guess.
        values = np.asarray(image)
        if image.format not in ("PNG", "PPM") or values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no known range: convert the image to 8 bits")
        return _eight_bits(values)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: convert the image to 8 bits")
    grey = image.mode in _GREY_MODES
    if image.has_transparency_data:
        image = image.convert("LA" if grey else "RGBA")
        return _over_white(np.asarray(image))
    mode = "L" if grey else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if grey else pixels


def _eight_bits(values_HW: NDArray[np.generic]) -> NDArray[np.uint8]:
    return ((values_HW.astype(np.uint32) + 128) // 257).astype(np.uint8)[..., None]


def _over_white(pixels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    colour, alpha = pixels_HWC[..., :-1].astype(np.uint32), pixels_HWC[..., -1:].astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where it is missing or damaged."""
    if image.format == "TIFF" or not any(key in image.info for key in _MAY_HOLD_ORIENTATION):
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error, Warning):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    if orientation >= 5:
        pixels_HWC = pixels_HWC.swapaxes(0, 1)
    # What is left to mirror after the transposition, as (top-bottom, left-right).
    down, across = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(orientation, (1, 1))
    return pixels_HWC[::down, ::across]


def _unreadable(error: Exception, name: str) -> UnreadableImage:
    if isinstance(error, UnidentifiedImageError):
        why = "not an image of a known format"
    elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        found = re.search(r"\d+", str(error))
        why = f"too large to be opened safely ({found.group() if found else 'too many'} pixels)"
    elif isinstance(error, OSError) and error.strerror:
        why = error.strerror.lower()
    else:
        why = " ".join(str(error).split()) or type(error).__name__
    return UnreadableImage(f"{name}: {why}")
