"""What is computed once of files and kept between programs, and work on many files at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from deitkit.terminal import Replaced
from deitkit.waiting import waiting_for

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_CHUNK = 256  # images that a thread takes at a time
_CHECKSUM_BYTES = 32


def cache_folder() -> Path:
    """`~/.cache/deitkit`, or in `$XDG_CACHE_HOME`: what was downloaded, unpacked or computed once. A user without a home folder has it in
    the folder for temporary files."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # as the XDG base directory specification wants it
        return given / "deitkit"
    try:
        return Path.home() / ".cache" / "deitkit"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"deitkit-{os.getuid()}"


def cached(kind: str, key: str, compute: Callable[[], bytes]) -> bytes:
    """`compute()`, or its result when any process asked for the same `kind` and `key` before. A damaged file is computed
    again; where the folder cannot be written, nothing is kept."""
    file = cache_folder() / kind / key
    with contextlib.suppress(OSError):
        content = file.read_bytes()
        known, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        if hashlib.sha256(known).digest() == checksum:
            return known
    found = compute()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with Replaced(file) as temporary:
            temporary.write_bytes(found + hashlib.sha256(found).digest())
    return found


def file_state(path: Path) -> bytes:
    """The file system's facts of a file, but for its name: they change when the content does. Times of the last change of
    content and of the file's entry, in nanoseconds: nobody can set the latter. The error's name if there is no file."""
    try:
        with waiting_for(path):
            status = path.stat()
    except OSError as error:
        return type(error).__name__.encode()
    facts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return " ".join(map(str, facts)).encode()


def ahead(function: Callable[[ItemT], ResultT], items: Iterable[ItemT]) -> Iterator[ResultT]:
    """`map` on all processors of this process, a few items ahead, not all of them: an ImageNet does not fit."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    running: deque[Future[ResultT]] = deque()
    with ThreadPoolExecutor(processors) as pool:
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > 2 * processors:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def in_threads(function: Callable[[int], ResultT], positions: Sequence[int]) -> list[ResultT]:
    """`function` of every position, in order, on all processors of this process."""
    chunks = (positions[start : start + _CHUNK] for start in range(0, len(positions), _CHUNK))
    return [result for part in ahead(lambda chunk: [function(each) for each in chunk], chunks) for result in part]
