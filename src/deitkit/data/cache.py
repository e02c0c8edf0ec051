"""The folder for what was downloaded, unpacked or computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from deitkit.files import Replaced


def cache_folder() -> Path:
    """`~/.cache/deitkit`."""
    return Path.home() / ".cache" / "deitkit"


def remembered(key: str, compute: Callable[[], str]) -> str:
    """`compute()`, which is 64 hexadecimal digits, or what it was when it was asked for with this `key` before, by any
    process. Where the folder cannot be written, nothing is remembered."""
    file = cache_folder() / "fingerprints" / key
    with contextlib.suppress(OSError, ValueError):
        known = file.read_text(encoding="ascii")
        if len(known) == 64:
            return known
    found = compute()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with Replaced(file) as temporary:
            temporary.write_text(found, encoding="ascii")
    return found


def state_of(path: Path) -> bytes:
    """What the file system says of a file, but for its name: it changes when the content does. Times of the last change of
    content and of the file's entry, in nanoseconds: the latter cannot be set by anybody. Raises OSError."""
    status = path.stat()
    facts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return " ".join(map(str, facts)).encode()
