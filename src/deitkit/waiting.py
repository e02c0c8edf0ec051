"""Files on a drive that does not answer: after half a minute the user is told which one is waited for, after five minutes the command line
ends. Python itself would wait for ever.

A thread looks at what is being read. Data-loading workers have none: `views.prefetch` waits for them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar, final

from deitkit.terminal import complain

ItemT = TypeVar("ItemT")

PATIENCE_SECONDS = 300.0
"""For a file or an item; then a disk is thought not to answer any more."""
NOTICE_SECONDS = 30.0
"""After which the user is told what is waited for."""
POLL_SECONDS = 5.0


@final
class waiting_for:
    """The block opens or reads `path`, by calls that let other threads run. It must be short on a drive that answers."""

    __slots__ = ("_path", "_since", "_told")

    def __init__(self, path: str | bytes | Path) -> None:
        self._path, self._told = path, False

    def __enter__(self) -> None:
        self._since = time.monotonic()
        _Watch.reads[id(self)] = self
        if not _Watch.started:
            _Watch.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _Watch.reads.pop(id(self), None)

    def look(self, *, ends: bool) -> None:
        """Tell, or end the program, if this has taken too long."""
        waited = time.monotonic() - self._since
        path = os.fsdecode(self._path)
        if waited > PATIENCE_SECONDS and ends:
            complain(f"error: {path}: no answer for {waited:.0f} s: the disk or network drive does not answer")
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(2)  # the thread that waits hears nothing, not even Ctrl-C
        if waited > NOTICE_SECONDS and not self._told:
            self._told = True
            complain(f"waiting for {path} for {waited:.0f} s: does the disk or network drive answer?")


def each_from(path: str | bytes | Path, items: Iterable[ItemT]) -> Iterator[ItemT]:
    """The items, each of which is read from `path` as it is asked for."""
    iterator = iter(items)
    while True:
        with waiting_for(path):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def end_when_nothing_answers() -> None:
    """From now on a drive that does not answer ends this process, with exit code 2. For the command line: a library only tells."""
    _Watch.ends = True


@final
class _Watch:
    """Of this process."""

    reads: dict[int, waiting_for] = {}
    started = ends = False

    @classmethod
    def start(cls) -> None:
        cls.started = True
        threading.Thread(target=cls._look, name="waiting", daemon=True).start()

    @classmethod
    def _look(cls) -> None:
        while True:
            time.sleep(POLL_SECONDS)
            for read in list(cls.reads.values()):
                read.look(ends=cls.ends)

    @classmethod
    def after_fork(cls) -> None:
        """In a child, which has none of the parent's other threads: it does not watch."""
        cls.reads, cls.started = {}, True


os.register_at_fork(after_in_child=_Watch.after_fork)
