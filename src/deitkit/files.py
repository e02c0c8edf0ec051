"""Files that appear whole or not at all, and are still there after a power cut; folders that one process works on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import weakref
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from deitkit.errors import UserError

LOCK = ".lock"


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


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into one line that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path}: cannot be written: {why}") from error


def write_atomically(path: Path, text: str) -> None:
    """Raises UserError where the disk refuses: then what stood there still does."""
    with written(path), Replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all, readable by whom other new files are. Raises UserError."""
    with written(path), Replaced(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def is_filled(path: Path, besides: Collection[str] = ()) -> bool:
    """Whether something is at `path` besides these files and what a command leaves that ended before it had written anything:
    hidden files, such as its lock, and empty folders."""
    if not path.is_dir():
        return path.exists()
    return any(
        any(entry.iterdir()) if entry.is_dir() else not entry.name.startswith(".") and entry.name not in besides
        for entry in path.iterdir()
    )


def refuse_filled(out: Path, hint: str, besides: Collection[str] = ()) -> None:
    """Raises UserError, ending with the `hint`, where `is_filled`."""
    if out.is_file():
        raise UserError(f"{out}: is a file: give a folder's name")
    if is_filled(out, besides):
        raise UserError(f"{out}: already exists and is not empty: {hint}")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within this block no other process is in such a block for the same folder, which is made if it is missing: it waits.
    Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


@final
class Lock:
    """Keeps other processes from working in `folder`, until it is released or its process ends. Raises BlockingIOError where
    another one is at it, OSError."""

    def __init__(self, folder: Path) -> None:
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        self.release = weakref.finalize(self, os.close, file)
        try:  # not `flock`: loader workers would hold it for seconds after the death of the process that they serve
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise BlockingIOError(error.errno, error.strerror) from error


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
