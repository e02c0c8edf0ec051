"""What a user did wrong, in one line.

Raise `UserError` for anything the person at the keyboard can mend: the command line prints it as one
line and exits with code 2. A defect of this program is any other exception, and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import reprlib
import sys
from collections.abc import Iterable

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 3, 90, 90


class UserError(ValueError):
    """A mistake in the input: the message says what is wrong, where, and what to do."""


def shortened(text: str, most: int = 80) -> str:
    """`text`, or its beginning where it is too long for a line that is to be read."""
    return text if len(text) <= most else f"{text[:most]}..."


def brief(value: object) -> str:
    """`repr(value)`, cut short before it is made: a few lines of YAML may stand for millions of values."""
    return shortened(_BRIEF.repr(value))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small. On a CPU torch says so by a plain RuntimeError."""
    texts = ("allocate memory", "out of memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def is_lost_worker(error: BaseException) -> bool:
    """Whether one of torch's processes that read images was ended from outside."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (")


LOST_PEER = 3
"""Exit code of a process of a training that ends because another one has, which says why."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether another process of this training has gone, as gloo and NCCL say it."""
    said = str(error)
    return type(error).__name__ in ("DistBackendError", "DistNetworkError") or ("gloo" in said and "peer" in said)


LOST_WORKER = "a process that reads images was ended, perhaps for want of (shared) memory: give --workers 0, or a smaller --batch-size"


def one_line(text: str) -> str:
    """`text` with what would break its line, or not be shown, spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def complain(text: str) -> None:
    """Tell the person at the keyboard, if anybody listens."""
    with contextlib.suppress(OSError):
        print(f"deit: {one_line(text)}", file=sys.stderr, flush=True)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a name that does not exist, listing the close ones, or all when none is close."""
    names = sorted(set(known))
    longer = [one for one in names if one.startswith(f"{name}_")]
    close = longer or difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
    return UserError(f"unknown {kind} {shortened(repr(name))}: {hint}")
