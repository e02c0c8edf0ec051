"""A look at every image before training, so that bad ones are known by name before an hour is spent."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from deitkit.data.images import Shape, UnreadableImage
from deitkit.errors import UserError

WHOLE_LIMIT = 50_000
"""Up to this many images are run through in full; of more, only the headers are read, and what lies deeper shows
itself in training."""
_CHUNK = 256

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Scan(NamedTuple):
    """What the images of a split have in common, and which of them cannot be read."""

    readable_N: NDArray[np.bool_]
    bad: list[str]
    channels: int
    image_size: tuple[int, int] | None


def in_threads(function: Callable[[int], ResultT], count: int) -> list[ResultT]:
    """`function` of 0..count-1, in that order, on all processors that this process may use."""

    def some(start: int) -> list[ResultT]:
        return [function(position) for position in range(start, min(start + _CHUNK, count))]

    with ThreadPoolExecutor(processors()) as pool:
        return [result for part in pool.map(some, range(0, count, _CHUNK)) for result in part]


def ahead(function: Callable[[ItemT], ResultT], items: Iterator[ItemT]) -> Iterator[ResultT]:
    """`map` on threads that runs a few items ahead, not all of them: an ImageNet does not fit."""
    running: deque[Future[ResultT]] = deque()
    with ThreadPoolExecutor(processors()) as pool:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > 2 * processors():
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def scan(probe: Callable[[int, bool], Shape], count: int) -> Scan:
    """Probe images 0..count-1 with `probe(position, whole)`, which raises UnreadableImage for a bad one."""
    shapes_N3 = np.zeros((count, 3), np.int64)
    bad: list[tuple[int, str]] = []

    def look(position: int) -> None:
        try:
            shapes_N3[position] = probe(position, count <= WHOLE_LIMIT)
        except UnreadableImage as error:
            bad.append((position, str(error)))

    in_threads(look, count)
    readable_N = shapes_N3[:, 2] > 0
    sizes = np.unique(shapes_N3[readable_N, :2], axis=0)
    return Scan(
        readable_N,
        [message for _, message in sorted(bad)],
        channels=int(shapes_N3[:, 2].max(initial=1)),
        image_size=(int(sizes[0, 0]), int(sizes[0, 1])) if len(sizes) == 1 else None,
    )


def tolerate(bad: list[str], total: int, limit: int, where: str) -> None:
    """Raises UserError when more images are bad than the user puts up with."""
    if len(bad) > limit:
        first = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
        raise UserError(
            f"{where}: {len(bad)} of {total} images cannot be read, more than bad_image_limit = {limit}; "
            f"mend or remove them, or raise the limit: {first}"
        )


def check_classes(labels_N: NDArray[np.int64], classes: tuple[str, ...], where: str) -> None:
    """Raises UserError naming the classes that have no image."""
    empty = [classes[label] for label in np.flatnonzero(np.bincount(labels_N, minlength=len(classes)) == 0)]
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise UserError(
            f"{where}: no readable image of class {', '.join(map(repr, empty[:5]))}{more}; add images or remove the class"
        )
