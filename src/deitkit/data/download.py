"""Fetching a public data set once: to a temporary name, checked, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tarfile
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from deitkit.errors import UserError
from deitkit.files import Replaced, alone

TIMEOUT_SECONDS = 30.0
_BLOCK = 1 << 20


class Remote(NamedTuple):
    """A file that can be fetched from any of `urls`."""

    file: str
    urls: tuple[str, ...]
    md5: str


def fetch(remotes: Sequence[Remote], folder: Path, name: str) -> None:
    """Put every file into `folder`, unless it is there. Raises UserError that says where to put it by hand."""
    with _alone(folder):
        _fetch_missing(remotes, folder, name)


def fetch_archive(remote: Remote, members: Sequence[str], folder: Path, name: str) -> None:
    """Fetch a .tar.gz and put those files whose names are `members` into `folder`, unless they are there; nothing else is
    unpacked. Raises UserError."""
    with _alone(folder):
        if all((folder / member).is_file() for member in members):  # another process has been here
            return
        _fetch_missing([remote], folder, name)
        _unpack(folder / remote.file, members, folder)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(alone(folder))
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be made: {error.strerror}; set DEITKIT_DATA to a folder of yours"
            ) from error
        yield


def _fetch_missing(remotes: Sequence[Remote], folder: Path, name: str) -> None:
    for remote in remotes:
        if not (folder / remote.file).exists():
            _fetch_one(remote, folder, name)


def _unpack(archive: Path, members: Sequence[str], folder: Path) -> None:
    try:
        with tarfile.open(archive, "r:gz") as tar:
            found = {Path(entry.name).name: entry for entry in tar if entry.isfile()}
            for member in members:
                content = tar.extractfile(found[member])
                assert content is not None  # it is a regular file
                with Replaced(folder / member) as target, target.open("wb") as file:
                    shutil.copyfileobj(content, file, _BLOCK)
    except KeyError as error:
        raise UserError(f"{archive}: holds no file {error.args[0]}; remove it and try again") from error
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive}: cannot be unpacked: {error}; remove it and try again") from error
    archive.unlink()


def _fetch_one(remote: Remote, folder: Path, name: str) -> None:
    reasons = []
    for url in remote.urls:
        print(f"{name}: downloading {url}", file=sys.stderr)
        try:
            with Replaced(folder / remote.file) as temporary:
                _download(url, temporary, remote.md5)
        except (OSError, ValueError, HTTPException) as error:
            reasons.append(" ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__)
        else:
            return
    raise UserError(
        f"{name} is not on this machine, and downloading {' or '.join(remote.urls)} failed ({'; '.join(reasons)}); "
        f"put {remote.file} into {folder} by hand, or a copy of the data into $DEITKIT_DATA/{name}"
    )


def _download(url: str, target: Path, md5: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)  # what the publishers state; it guards against accidents
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, target.open("wb") as file:
        while block := answer.read(_BLOCK):
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != md5:
        raise ValueError(f"what came has the MD5 {digest.hexdigest()}, not {md5}")
