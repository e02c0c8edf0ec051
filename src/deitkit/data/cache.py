"""The folder for what was downloaded or unpacked once, and files that appear there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import final


def cache_folder() -> Path:
    """`~/.cache/deitkit`."""
    return Path.home() / ".cache" / "deitkit"


@final
class Replaced:
    """`with Replaced(path) as temporary`: a new file beside `path` that takes its place when the block ends well,
    and vanishes otherwise."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        os.close(handle)
        self._temporary = Path(name)
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink(missing_ok=True)
