"""The tape: a teacher's answers to views, recorded once and replayed for any student, loss, seed or sweep.

A folder:

    tape.json               the card (`tapecard`): fingerprints of teacher, data and view recipe; classes, kind of answers,
                            number of views; digests of itself and of the teacher's decisions on the validation images
    records.bin             fixed-size records (`records.record_type`), one slot for each (view, rank): an image's rank is
                            its place in that view's order of pairs, so that a recording writes from front to back
    digests.bin             8 bytes for each chunk of a view's slots: BLAKE2b of its records, 0 while it is not complete
    validation.safetensors  the teacher's decisions on the validation images
    .lock                   locked by the process that records; readers do not mind

A chunk's records are on the disk before its digest is written. So a killed recording goes on where it stopped, and a chunk
that is half there is never read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from deitkit.errors import UserError
from deitkit.files import Lock, is_filled, save_tensors, write_atomically
from deitkit.progress import file_size
from deitkit.records import AnswerKind, Records, decode, record_type
from deitkit.tapecard import AGAIN, DIGEST_BYTES, TapeCard, is_tape, read_card, refuse_difference, refuse_other_answers
from deitkit.types import Answers

CHUNK_SLOTS, CHUNK_BYTES = 4096, 2**23
"""A chunk holds at most so many slots, and about so many bytes: it is what a kill can cost."""


@final
class Tape:
    """An opened tape. `create` makes one, `open_tape` finds one."""

    def __init__(self, path: Path, card: TapeCard, *, writable: bool, lock: Lock | None = None) -> None:
        self.path = path
        self.card = card
        self.record_type = record_type(card.answers, len(card.classes))
        flags = os.O_RDWR if writable else os.O_RDONLY
        self._lock = lock
        opened: list[int] = []
        self._close = weakref.finalize(self, _close, opened)
        try:
            opened += [os.open(path / "records.bin", flags)]
            opened += [os.open(path / "digests.bin", flags)]
        except OSError as error:
            raise UserError(f"{path}: the tape cannot be opened: {error.strerror}") from error
        self._records_file, self._digests_file = opened[-2:]
        if writable:  # sparse: takes room only where something was recorded
            with _writing(path):
                os.ftruncate(self._records_file, card.bytes)
                os.ftruncate(self._digests_file, card.views * card.chunks * DIGEST_BYTES)
        elif os.fstat(self._records_file).st_size < card.bytes:
            raise UserError(f"{path}: damaged: records.bin is shorter than tape.json says: {AGAIN}")
        self._checked = np.zeros((card.views, card.chunks), bool)
        self._records: Records = np.memmap(path / "records.bin", self.record_type, "r", shape=(card.views, card.images))

    def close(self) -> None:
        """Let go of the files, and of the lock. May be called again."""
        self._close()
        if self._lock is not None:
            self._lock.release()

    def ranks(self, view: int) -> NDArray[np.int64]:
        """The slot of each image in `view`."""
        return self.card.ranks(view)

    def slots(self, chunk: int) -> tuple[int, int]:
        """First and one after the last rank of a chunk."""
        return self.card.slots(chunk)

    def complete(self) -> NDArray[np.bool_]:
        """Which chunks are recorded, shape (views, chunks)."""
        complete_VC: NDArray[np.bool_] = self._digests() != 0
        return complete_VC

    def complete_views(self) -> int:
        """How many views are recorded whole, counted from the first."""
        whole_V: NDArray[np.bool_] = np.all(self.complete(), axis=1)
        return int(np.cumprod(whole_V).sum())

    def rank_of(self, view_B: NDArray[np.int64], index_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slots of these views of these images."""
        rank_B = np.empty_like(index_B)
        for view in np.unique(view_B):
            chosen = view_B == view
            rank_B[chosen] = self.ranks(int(view))[index_B[chosen]]
        return rank_B

    def records(self, view_B: NDArray[np.int64], index_B: NDArray[np.int64]) -> Records:
        """What is recorded of these views of these images. Raises UserError where a chunk is not as it was written, or not
        complete."""
        rank_B = self.rank_of(view_B, index_B)
        self._check(view_B, rank_B)
        return self._records[view_B, rank_B]

    def answers(
        self, view_B: NDArray[np.int64], index_B: NDArray[np.int64], device: torch.device | str = "cpu"
    ) -> Answers:
        """`records`, as a teacher would have answered."""
        return decode(self.records(view_B, index_B), len(self.card.classes), device)

    def _check(self, view_B: NDArray[np.int64], rank_B: NDArray[np.int64]) -> None:
        """Hold the chunks of these slots against their checksums, each chunk once."""
        chunk_B = rank_B // self.card.chunk_slots
        new_B = ~self._checked[view_B, chunk_B]
        for view, chunk in sorted(set(zip(view_B[new_B].tolist(), chunk_B[new_B].tolist(), strict=True))):
            place = (view * self.card.chunks + chunk) * DIGEST_BYTES
            if os.pread(self._digests_file, DIGEST_BYTES, place) != self.digest(view, chunk):
                raise UserError(f"{self.path}: damaged: view {view}, chunk {chunk} is not as it was written: {AGAIN}")
            self._checked[view, chunk] = True

    def write(self, view: int, rank: int, records: Records) -> None:
        """Put records into consecutive slots. Nobody reads them before `commit`. Raises UserError when the disk is full."""
        slot = view * self.card.images + rank
        with _writing(self.path):
            _write(self._records_file, np.ascontiguousarray(records).tobytes(), slot * self.record_type.itemsize)

    def commit(self, view: int, chunks: list[int]) -> None:
        """Declare chunks complete: all their slots have been written, by this process or others. Raises UserError when the
        disk is full."""
        if not chunks:
            return
        with _writing(self.path):
            os.fsync(self._records_file)
            for chunk in chunks:
                place = (view * self.card.chunks + chunk) * DIGEST_BYTES
                _write(self._digests_file, self.digest(view, chunk), place)
            os.fsync(self._digests_file)

    def digest(self, view: int, chunk: int) -> bytes:
        """The checksum of a chunk as it lies on the disk now."""
        start, stop = self.slots(chunk)
        offset = (view * self.card.images + start) * self.record_type.itemsize
        content = os.pread(self._records_file, (stop - start) * self.record_type.itemsize, offset)
        return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()

    def damaged(self) -> list[tuple[int, int]]:
        """(view, chunk) of every chunk that is complete but not as it was written."""
        digests = self._digests()
        where = np.argwhere(digests != 0)
        return [(int(v), int(c)) for v, c in where if digests[v, c].tobytes() != self.digest(int(v), int(c))]

    def validation_labels(self) -> torch.Tensor:
        """The teacher's decisions on the validation images, in their order. Raises UserError."""
        path = self.path / "validation.safetensors"
        try:
            labels_N = load_file(path)["labels"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if self.card.decisions != _digest_of(labels_N):
            raise UserError(f"{path}: damaged: the decisions are not as they were written: {AGAIN}")
        return labels_N

    def missing_bytes(self) -> int:
        """How much room on the disk the records will still take."""
        return max(0, self.card.bytes - 512 * os.fstat(self._records_file).st_blocks)

    def _digests(self) -> NDArray[np.uint64]:
        size = self.card.views * self.card.chunks * DIGEST_BYTES
        content = os.pread(self._digests_file, size, 0).ljust(size, b"\0")
        return np.frombuffer(content, "<u8").reshape(self.card.views, self.card.chunks)


def slots_of_a_chunk(record_bytes: int) -> int:
    """A multiple of 64."""
    return max(64, min(CHUNK_SLOTS, CHUNK_BYTES // record_bytes // 64 * 64))


def open_tape(path: Path, *, writable: bool = False) -> Tape:
    """A tape that exists. Raises UserError."""
    return Tape(path, read_card(path), writable=writable)


def refuse_other_folder(path: Path, answers: AnswerKind | None) -> None:
    """Raises UserError where something else than nothing, or a tape of such answers (None: any), is at `path`."""
    if is_tape(path):
        if answers is not None:
            refuse_other_answers(path, read_card(path), answers)
        return
    if is_filled(path):
        raise UserError(f"{path}: already exists and is no tape: give another folder")


def create(path: Path, card: TapeCard, validation_labels: torch.Tensor) -> Tape:
    """A new tape for writing, or one that was begun with the same card, perhaps with fewer views; other processes cannot
    write to it until it is closed. Raises UserError, before anything is written where the tape or the folder is another."""
    card = card.model_copy(update={"decisions": _digest_of(validation_labels)})
    _gone_on_with(path, card)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = Lock(path)
        card = _gone_on_with(path, card)  # another recording may have begun since
        if not is_tape(path):
            # First of all: a folder without a card is nobody's, and a recording killed here could not go on.
            write_atomically(path / "tape.json", card.sealed())
        for name in ("records.bin", "digests.bin"):
            (path / name).touch()
        tape = Tape(path, card, writable=True, lock=lock)
        # Of a tape that gets more views, after its files: they may be longer than the card says, but not shorter.
        write_atomically(path / "tape.json", card.sealed())
        save_tensors({"labels": validation_labels}, path / "validation.safetensors")
    except BlockingIOError as error:
        raise UserError(
            f"{path}: another process is recording this tape: wait for it, or give another folder"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    return tape


def _gone_on_with(path: Path, card: TapeCard) -> TapeCard:
    """`card`, or that of the tape at `path` with as many views. Raises UserError where there is another, or no room."""
    if is_tape(path):
        found = read_card(path)
        refuse_difference(path, found, card)
        elsewhere = {} if found.made_with == card.made_with else {"continued_with": card.made_with}
        card = card.model_copy(
            update={
                "views": max(found.views, card.views),
                "chunk_slots": found.chunk_slots,
                "made_with": {**found.made_with, **elsewhere},
            }
        )
    refuse_other_folder(path, card.answers)
    refuse_more_than_fits(path, card)
    return card


def refuse_more_than_fits(path: Path, card: TapeCard) -> None:
    """Raises UserError where the disk has no room for all records, what is there already counted in."""
    there = path / "records.bin"
    room = free_bytes(path) + (512 * there.stat().st_blocks if there.is_file() else 0)
    if card.bytes > room:
        raise UserError(
            f"{path}: {card.views} views take {file_size(card.bytes)}, {file_size(room)} are free: "
            f"record fewer views, or make room"
        )


def free_bytes(path: Path) -> int:
    """On the disk where `path` is, or will be."""
    folder = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(folder).free


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise UserError(
            f"{path}: {'the disk is full' if full else f'cannot be written: {error.strerror}'}: what was recorded is intact; "
            f"{'make room' if full else 'mend that'} and give the same command again"
        ) from error


def _write(file: int, content: bytes, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(file, content[done:], offset + done)


def _digest_of(labels_N: torch.Tensor) -> str:
    content = np.ascontiguousarray(labels_N.cpu().numpy(), "<i8").tobytes()
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()
