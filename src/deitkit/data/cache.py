"""The folder for what was downloaded or unpacked once."""

from __future__ import annotations

from pathlib import Path


def cache_folder() -> Path:
    """`~/.cache/deitkit`."""
    return Path.home() / ".cache" / "deitkit"
