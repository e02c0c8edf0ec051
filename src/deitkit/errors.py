"""What a user did wrong, in one line.

Raise `UserError` for anything the person at the keyboard can mend: the command line prints it as one
line and exits with code 2. A defect of this program is any other exception, and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input: the message says what is wrong, where, and what to do."""


def shortened(text: str, most: int = 80) -> str:
    """`text`, or its beginning where it is too long for a line that is to be read."""
    return text if len(text) <= most else f"{text[:most]}..."


def complain(text: str) -> None:
    """Tell the person at the keyboard, if anybody listens."""
    with contextlib.suppress(OSError):
        print(f"deit: {text}", file=sys.stderr, flush=True)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a name that does not exist, listing the close ones, or all when none is close."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
    return UserError(f"unknown {kind} {shortened(repr(name))}: {hint}")
