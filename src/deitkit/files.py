"""Files that appear whole or not at all, and are still there after a power cut."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import final


def put_in_place(temporary: Path, target: Path) -> None:
    """Give a finished file its name, for good: readable by whom other new files are, its content on the disk before it is
    renamed, and the renaming on the disk too. Raises OSError."""
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)  # some libraries make files for their owner alone
    sync(temporary)
    temporary.replace(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@final
class Replaced:
    """`with Replaced(path) as temporary`: a new file beside `path` that takes its place when the block ends well,
    and vanishes otherwise. A kill leaves a file behind that `leftovers` finds."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        os.close(handle)
        self._temporary = Path(name)
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                put_in_place(self._temporary, self._path)
        finally:
            self._temporary.unlink(missing_ok=True)


def leftovers(path: Path) -> list[Path]:
    """What killed processes left of their attempts to replace `path`: nobody may be at it now."""
    return sorted(path.parent.glob(f".{path.name}.*"))
