"""The files below a folder: which are images, and of what kinds the others are.

A file is an image by its name's suffix (`SUFFIXES`, without being opened), or else by its first bytes. What hides, and what systems
and NAS boxes leave behind (`@eaDir`, `__MACOSX`, `Thumbs.db`, ...), is passed over. Links are followed, but a folder is read once,
however many links lead to it. Whatever is not an image is counted by kind.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from PIL import Image

from deitkit.data.decode import NOT_PIXELS, regular_file
from deitkit.terminal import UserError, expanded, plural
from deitkit.waiting import each_from, waiting_for

SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_SUFFIXES = tuple(os.fsencode(suffix) for suffix in SUFFIXES)
_BY_CONTENT = (
    "AVIF", "BMP", "DDS", "GIF", "HEIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "PSD", "QOI", "SGI", "TIFF", "WEBP",
)  # fmt: skip
"""Formats with a beginning that no other file has by chance."""
_RAW = frozenset({".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"})
"""Of cameras: Pillow sees a small preview in some of them."""
HINTS = dict.fromkeys((".heic", ".heif", ".hif"), "pip install pillow-heif") | dict.fromkeys(
    _RAW, "save them as JPEG or PNG"
)
_HIDDEN = frozenset({
    b"@eadir", b"__macosx", b"thumbs.db", b"ehthumbs.db", b"desktop.ini", b"$recycle.bin", b"#recycle", b"@recycle", b"#snapshot",
    b"system volume information", b"lost+found",
})  # fmt: skip
HIDDEN, LINK, SPECIAL = "hidden or system entry", "link to a folder that is read elsewhere", "pipe or device"
OUTSIDE = "image outside the class folders"

LeftOut = Mapping[str, int]
"""How many files of a kind are not used: the suffix of their names, or one of the kinds above."""


def left_out_line(counts: LeftOut, unreadable: int = 0) -> str:
    """`left out: 20 .heic files (pip install pillow-heif), 3 unreadable`; empty where nothing is left out."""
    parts = [_counted(kind, count) for kind, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    parts += [f"{unreadable} unreadable"] if unreadable else []
    return f"left out: {', '.join(parts)}" if parts else ""


def _counted(kind: str, count: int) -> str:
    if kind == HIDDEN:
        return f"{count:,} hidden or system {'entry' if count == 1 else 'entries'}"
    if kind == LINK:
        return f"{plural(count, 'link')} to folders that are read elsewhere"
    if kind == OUTSIDE:
        return f"{plural(count, 'image')} outside the class folders"
    if kind == SPECIAL:
        return f"{plural(count, 'pipe')} or {'device' if count == 1 else 'devices'}"
    hint = f" ({HINTS[kind]})" if kind in HINTS else ""
    return f"{plural(count, f'{kind} file')}{hint}" if kind else f"{plural(count, 'file')} without a suffix"


def is_hidden(name: bytes) -> bool:
    """Whether nobody means a file or folder of this name."""
    return name.startswith(b".") or name.lower() in _HIDDEN


@final
class Walk:
    """Finds the images in folders, each of which is read once. Raises UserError where one cannot be listed."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self._seen: set[tuple[int, int]] = set()

    def images(self, folders: Sequence[bytes]) -> list[list[bytes]]:
        """For each folder the names below it of its images, in the order of their bytes. What a link leads to belongs to the folder that
        holds it, unless it belongs to one by its place."""
        found: list[list[bytes]] = [[] for _ in folders]
        links: list[tuple[int, bytes]] = []
        for number in sorted(range(len(folders)), key=lambda number: os.path.islink(folders[number])):  # noqa: PTH114
            links += [(number, link) for link in self._read(folders[number], b"", found[number])]
        while links:
            number, link = links.pop(0)
            if leads_up(folders[number] + b"/" + link):
                self.left_out[LINK] += 1
            else:
                links += [(number, below) for below in self._read(folders[number], link + b"/", found[number])]
        return [sorted(names) for names in found]

    def _read(self, folder: bytes, below: bytes, images: list[bytes]) -> list[bytes]:
        """Adds to `images` what lies in `folder/below`, at any depth. Returns the links to folders in it."""
        links, todo = [], [below]
        while todo:
            below = todo.pop()
            with listed(folder + b"/" + below) as (status, entries):
                if (status.st_dev, status.st_ino) in self._seen:
                    self.left_out[LINK] += 1
                    continue
                self._seen.add((status.st_dev, status.st_ino))
                for entry in entries:
                    if is_hidden(entry.name):
                        self.left_out[HIDDEN] += 1
                    elif entry.is_dir(follow_symlinks=False):
                        todo.append(below + entry.name + b"/")
                    elif entry.is_symlink() and follows(entry.is_dir):
                        links.append(below + entry.name)
                    elif (kind := kind_of(entry)) is None:
                        images.append(below + entry.name)
                    else:
                        self.left_out[kind] += 1
        return sorted(links)


def leads_up(link: bytes) -> bool:
    """Whether a link leads to a folder that it lies in."""
    target, here = os.path.realpath(link), os.path.realpath(os.path.dirname(link))  # noqa: PTH120
    return f"{os.fsdecode(here)}/".startswith(f"{os.fsdecode(target).rstrip('/')}/")


@contextlib.contextmanager
def listed(folder: bytes) -> Iterator[tuple[os.stat_result, Iterator[os.DirEntry[bytes]]]]:
    """A folder's state and entries. Raises UserError."""
    try:
        with waiting_for(folder):
            status, entries = os.stat(folder), os.scandir(folder)  # noqa: PTH116
        with entries:
            yield status, each_from(folder, entries)
    except OSError as error:
        raise UserError(f"{os.fsdecode(folder)}: cannot be listed: {error.strerror}") from error


def kind_of(entry: os.DirEntry[bytes]) -> str | None:
    """None for an image, else the kind of a file that is none. A link that leads nowhere is an image that cannot be read, if its name is
    an image's."""
    suffix = os.path.splitext(os.fsdecode(entry.name))[1].lower()  # noqa: PTH122
    with waiting_for(entry.path):
        if is_special(entry):
            return SPECIAL
        known = entry.name.lower().endswith(_SUFFIXES)
        return None if known or (suffix not in _RAW and _is_image(os.fsdecode(entry.path), suffix)) else suffix


def is_special(entry: os.DirEntry[Any]) -> bool:
    """Whether it is, or leads to, a pipe, a socket or a device: opening one may wait for ever."""
    return not (follows(entry.is_file) or follows(entry.is_dir)) and follows(lambda: entry.stat() is not None)


def follows(question: Callable[[], bool]) -> bool:
    """The answer to a question that follows a link; no where that leads nowhere, or in circles."""
    try:
        return question()
    except OSError:
        return False


@functools.cache
def _formats() -> dict[str, str]:
    """Formats that Pillow decodes, by suffix."""
    Image.init()
    return {
        suffix: name
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in NOT_PIXELS
    }


def _is_image(path: str, suffix: str) -> bool:
    """Whether Pillow knows the file by its first bytes; formats that have no sure sign of their own also need their suffix."""
    by_suffix = _formats()
    try:
        with open(path, "rb", opener=regular_file) as stream:
            start = stream.read(16)
            likely = [name for name in _BY_CONTENT if name in Image.OPEN and _begins(name, start)]
            likely += [by_suffix[suffix]] if suffix in by_suffix and by_suffix[suffix] not in likely else []
            if not start or not likely:
                return False
            stream.seek(0)
            with Image.open(stream, formats=likely):
                return True
    except Exception:  # Pillow's plugins raise anything
        return False


def _begins(name: str, start: bytes) -> bool:
    accepts = Image.OPEN[name][1]
    return accepts is not None and accepts(start) is True


def image_paths(paths: Iterable[str | Path], listed: Iterable[str] = ()) -> list[Path]:
    """Files as given; folders as the image files in them, at any depth; patterns (`photos/*.jpg`, `photos/**/*.png`) as the files
    that match; both ordered by name. What exists is no pattern. `listed`: lines, each a path, that `-` stands for. Raises UserError
    for a folder without images, one that cannot be listed, and a pattern that nothing matches."""
    found: list[Path] = []
    for path in map(expanded, paths):
        with waiting_for(path):
            is_folder = path.is_dir()
        if is_folder:
            below = _images_below(path)
            if not below:
                raise UserError(f"{path}: no images in this folder ({' '.join(SUFFIXES)})")
        elif str(path) == "-" and not path.exists():
            # a name in a list is no pattern, and one that is missing is left out like an unreadable one
            listed_paths = [Path(line) for line in listed if line.strip()]
            if not listed_paths:
                raise UserError("-: standard input lists no image")
            below = [one for path in listed_paths for one in (image_paths([path]) if follows(path.is_dir) else [path])]
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
    (names,) = Walk().images([os.fsencode(folder)])
    return sorted(folder / os.fsdecode(name) for name in names)


def stand_in(path: Path, wanted: str) -> str:
    """What a small text in the place of a file that is to be `wanted` is, and what to do; empty for any other file."""
    start = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a git-lfs pointer, not the file: run git lfs pull"
    if start.startswith((b"<!doctype html", b"<html")):
        return f"is an HTML page, not {wanted}: download it anew"
    return ""
