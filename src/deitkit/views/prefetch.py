"""Items made ahead by worker processes, and what can go wrong with those: killed, stuck, unable to hand over what they made.

For a training on a CPU items come through pipes, as bytes: that needs neither shared memory nor sockets nor file descriptors, which
small containers lack. A GPU is too fast for that (a pipe hands over some 3,000 views of 224 pixels a second): it gets them through
shared memory, where there is enough.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Generic, NamedTuple, TypeVar, final

import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from deitkit.terminal import UserError, complain, is_lost_worker
from deitkit.waiting import NOTICE_SECONDS, PATIENCE_SECONDS, POLL_SECONDS

ItemT = TypeVar("ItemT")
KeyT = TypeVar("KeyT")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY, LEAST_FILES, LONGEST_FOLDER = 2 * 10**9, 1024, 60
"""Bytes of shared memory, open files and characters of the folder for temporary files without which items go through pipes. Docker gives
a container 64 MB of shared memory; a socket's path has 108 characters at most."""


def prefetch(
    make: Callable[[KeyT], ItemT],
    keys: Sequence[KeyT],
    workers: int,
    *,
    batches: int = 4,
    pin_memory: bool = False,
) -> Iterator[ItemT]:
    """`make(key)` for each key in turn. Workers start at once, not more than there are keys, and each makes up to `batches` items
    ahead; a single item is made by this process. Items are tensors, numbers and tuples or lists of such. `pin_memory`: for a GPU. After
    the loss of a worker the rest is made by half as many, one item ahead. Raises UserError where nothing comes for minutes, RuntimeError
    (`is_lost_worker`) where a worker is lost again."""
    return _Prefetched(make, keys, min(workers, len(keys)) if len(keys) > 1 else 0, batches, pin_memory)


@final
class _Prefetched(Generic[KeyT, ItemT], Iterator[ItemT]):
    def __init__(
        self, make: Callable[[KeyT], ItemT], keys: Sequence[KeyT], workers: int, batches: int, pin_memory: bool
    ) -> None:
        self._make, self._keys, self._workers, self._batches, self._pin_memory = (
            make,
            keys,
            workers,
            batches,
            pin_memory,
        )
        self._done, self._has_lost = 0, False
        self._start()

    def _start(self) -> None:
        piped = self._workers > 0 and not (self._pin_memory and has_shared_memory())
        make: Any = _Packed(self._make) if piped else self._make
        with warnings.catch_warnings(), interrupted_later(), _sigterm_blocked():
            # On a machine with fewer cores than workers they take turns; two are the default.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            self._items = iter(
                DataLoader(
                    self._keys[self._done :],  # type: ignore[arg-type]  # a sequence is data set enough
                    batch_size=None,
                    collate_fn=make,
                    num_workers=self._workers,
                    prefetch_factor=self._batches if self._workers else None,
                    worker_init_fn=_begin_worker,
                    timeout=POLL_SECONDS if self._workers else 0,
                    pin_memory=self._pin_memory,
                    generator=torch.Generator(),  # for the workers' seeds; torch's global generator would move otherwise
                )
            )
        if self._workers:
            _Deaths.listen()

    def __next__(self) -> ItemT:
        began, told = time.monotonic(), False
        while True:
            try:
                with _Deaths.told():
                    item = next(self._items)
            except RuntimeError as error:
                if is_lost_worker(error) and not self._has_lost:
                    self._restart()
                elif not str(error).startswith("DataLoader timed out"):
                    raise
                waited = time.monotonic() - began
                if waited > PATIENCE_SECONDS:
                    self._kill_workers()
                    raise UserError(
                        f"no images for {waited:.0f} s: a disk or network drive does not answer, or --workers are too many for it"
                    ) from error
                if waited > NOTICE_SECONDS and not told:
                    told = True
                    complain(f"waiting for images for {waited:.0f} s: does the disk or network drive answer?")
            else:
                self._done += 1
                return _unpacked(item)  # type: ignore[no-any-return]

    def _restart(self) -> None:
        """Go on where a worker was lost, with less in memory."""
        self._kill_workers()
        self._has_lost, self._workers, self._batches = True, max(1, self._workers // 2), 1
        complain(
            f"warning: a data-loading worker was killed (out of memory?): continuing with {self._workers}, one batch ahead"
        )
        self._start()

    def _kill_workers(self) -> None:
        """A stopped worker, or one that waits for a disk, hears nothing else."""
        for worker in getattr(self._items, "_workers", []):
            with contextlib.suppress(ValueError, AttributeError):  # it has been closed
                worker.kill()


# ---------------------------------------------------------------------------------------------------- through pipes


class _Array(NamedTuple):
    """A tensor on its way through a pipe."""

    values: NDArray[Any]


@final
class _Packed(Generic[KeyT, ItemT]):
    """`make` whose tensors are arrays, which pickle as they are: torch would put tensors into shared memory."""

    def __init__(self, make: Callable[[KeyT], ItemT]) -> None:
        self._make = make

    def __call__(self, key: KeyT) -> Any:
        return _changed(self._make(key), torch.Tensor, lambda tensor: _Array(tensor.numpy()))


def _unpacked(item: Any) -> Any:
    return _changed(item, _Array, lambda array: torch.from_numpy(array.values))


def _changed(item: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """`item` with everything of this kind in it changed."""
    if isinstance(item, kind):
        return change(item)
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(_changed(part, kind, change) for part in item))
    if isinstance(item, list | tuple):
        return type(item)(_changed(part, kind, change) for part in item)
    return item


def has_shared_memory() -> bool:
    """Whether worker processes can hand tensors over through shared memory: there is enough of it, and sockets and descriptors for it."""
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else LEAST_SHARED_MEMORY  # not Linux
        folder = tempfile.gettempdir()
    except OSError:
        return False
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    enough = files == resource.RLIM_INFINITY or files >= LEAST_FILES
    return enough and free >= LEAST_SHARED_MEMORY and len(os.fsencode(folder)) <= LONGEST_FOLDER


# ------------------------------------------------------------------------------------------------------- signals


class _Deaths:
    """Torch raises an error wherever the main thread is when a worker is killed, also in the middle of a training step. Here it is raised
    only where an item is waited for, and can be made again."""

    _of_torch: Any = None
    _waiting = _heard = False

    @classmethod
    def listen(cls) -> None:
        """Called after a loader has started its workers: torch has its handler by then."""
        current = signal.getsignal(signal.SIGCHLD)
        if current == cls._hear or threading.current_thread() is not threading.main_thread() or not callable(current):
            return
        cls._of_torch = current
        signal.signal(signal.SIGCHLD, cls._hear)

    @classmethod
    def _hear(cls, number: int, frame: FrameType | None) -> None:
        if cls._waiting:
            cls._of_torch(number, frame)
        else:
            cls._heard = True

    @classmethod
    @contextlib.contextmanager
    def told(cls) -> Iterator[None]:
        """Within the block the death of a worker is an error, also one that was heard before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        cls._waiting = True
        try:
            if cls._heard:
                cls._heard = False
                cls._of_torch(signal.SIGCHLD, None)
            yield
        finally:
            cls._waiting = False


def _begin_worker(_number: int) -> None:
    torch.set_num_threads(1)
    end_with_parent(signal.SIGKILL)
    _heed_parent_alone()


def end_with_parent(how: signal.Signals) -> None:
    """Have the kernel send this signal to this process when its parent ends, also by SIGKILL; where that is offered: on Linux. (Torch's
    workers look whether their parent is there, but not while they wait for a lock that it held when it was killed.)"""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how)


def _heed_parent_alone() -> None:
    """SIGTERM ends this process only where its parent has sent it. SLURM and `kill -- -PGID` send it to all processes: the parent
    then saves its state, for which it may need one more batch. The signal is blocked since this process began (`_sigterm_blocked`)."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """So that workers which are started within the block never take SIGTERM, in none of the threads that libraries begin there."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def interrupted_later() -> Iterator[None]:
    """Ctrl-C within the block takes effect at its end: a loader that is interrupted while it starts its workers prints a
    traceback. The workers ignore Ctrl-C, because this process ends them."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard:
            before(*heard[0])
