"""The tape: a teacher's answers to views, recorded once and replayed for any student, loss, seed or sweep.

A folder:

    tape.json               fingerprints of teacher, data and view recipe; classes, kind of answers, number of views
    records.bin             fixed-size records (`records.record_type`), one slot for each (view, rank): an image's rank is
                            its place in that view's order of pairs, so that a recording writes from front to back
    digests.bin             8 bytes for each chunk of a view's slots: BLAKE2b of its records, 0 while it is not complete
    validation.safetensors  the teacher's decisions on the validation images

A chunk's records are on the disk before its digest is written. So a killed recording goes on where it stopped, and a chunk
that is half there is never read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file

from deitkit import mixing
from deitkit.config import Config, PositiveInt, ViewConfig
from deitkit.errors import UserError
from deitkit.records import AnswerKind, Records, decode, record_type
from deitkit.run import save_tensors, write_atomically
from deitkit.settings import explain
from deitkit.types import Answers

CHUNK_SLOTS, CHUNK_BYTES = 4096, 2**23
"""A chunk holds at most so many slots, and about so many bytes: it is what a kill can cost."""
DIGEST_BYTES = 8
VIEW_FORMAT = 2
"""Goes up whenever the same draws give other pixels: what was recorded of the old views is then refused."""
NAMES_ONLY = {"augment", "views"}
"""Fields of a view recipe that do not change what a view looks like."""


class TapeCard(Config):
    """What tape.json says: all that the recorded answers depend on, and how they are written down."""

    format: Literal[1] = 1
    view_format: int = VIEW_FORMAT
    teacher: dict[str, Any]
    """`Teacher.describe()`"""
    classes: tuple[str, ...]
    data: dict[str, Any]
    """name, settings, number of training images, fingerprints of training and validation split"""
    view: ViewConfig
    answers: AnswerKind
    views: PositiveInt
    chunk_slots: PositiveInt
    """slots that are committed together"""
    made_with: dict[str, Any]
    """versions, processor and threads: on others the same teacher may differ in the last bits"""
    accuracy: dict[str, Any]
    """n, top1, top5, confidence of the teacher on the validation split"""

    @model_validator(mode="after")
    def _check(self) -> TapeCard:
        if not isinstance(self.teacher.get("name"), str):
            raise ValueError("teacher: no name")
        if not (isinstance(self.data.get("images"), int) and self.data["images"] > 0):
            raise ValueError("data.images: no number of images")
        if not isinstance(self.data.get("settings", {}), dict):
            raise ValueError("data.settings: no settings")
        if not isinstance(self.accuracy.get("top1"), int | float):
            raise ValueError("accuracy.top1: no number")
        if not self.classes:
            raise ValueError("classes: none")
        return self

    @property
    def images(self) -> int:
        return int(self.data["images"])

    @property
    def record_bytes(self) -> int:
        return record_type(self.answers, len(self.classes)).itemsize

    @property
    def chunks(self) -> int:
        """Chunks of one view."""
        return -(-self.images // self.chunk_slots)

    @property
    def bytes(self) -> int:
        """Size of the records of all views."""
        return self.record_bytes * self.images * self.views

    def order(self, view: int) -> NDArray[np.int64]:
        """The images in the order of their slots in `view`: pair by pair."""
        return _order(self.view.view_seed, view // self.view.repeats, self.images)


@final
class Tape:
    """An opened tape. `create` makes one, `open_tape` finds one."""

    def __init__(self, path: Path, card: TapeCard, *, writable: bool) -> None:
        self.path = path
        self.card = card
        self.record_type = record_type(card.answers, len(card.classes))
        flags = os.O_RDWR if writable else os.O_RDONLY
        try:
            self._records_file = os.open(path / "records.bin", flags)
            self._digests_file = os.open(path / "digests.bin", flags)
        except OSError as error:
            raise UserError(f"{path}: the tape cannot be opened: {error.strerror}") from error
        if writable:  # sparse: takes room only where something was recorded
            os.ftruncate(self._records_file, card.bytes)
            os.ftruncate(self._digests_file, card.views * card.chunks * DIGEST_BYTES)
        elif os.fstat(self._records_file).st_size < card.bytes:
            raise UserError(f"{path}: damaged: records.bin is shorter than tape.json says")
        self._checked = np.zeros((card.views, card.chunks), bool)
        self._records: Records = np.memmap(path / "records.bin", self.record_type, "r", shape=(card.views, card.images))

    def close(self) -> None:
        os.close(self._records_file)
        os.close(self._digests_file)

    def ranks(self, view: int) -> NDArray[np.int64]:
        """The slot of each image in `view`."""
        return _ranks(self.card.view.view_seed, view // self.card.view.repeats, self.card.images)

    def slots(self, chunk: int) -> tuple[int, int]:
        """First and one after the last rank of a chunk."""
        return chunk * self.card.chunk_slots, min(self.card.images, (chunk + 1) * self.card.chunk_slots)

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
        """What is recorded of these views of these images; anything where a chunk is not complete."""
        return self._records[view_B, self.rank_of(view_B, index_B)]

    def answers(
        self, view_B: NDArray[np.int64], index_B: NDArray[np.int64], device: torch.device | str = "cpu"
    ) -> Answers:
        """The recorded answers to these views of these images. Raises UserError where a chunk is not as it was written."""
        rank_B = self.rank_of(view_B, index_B)
        self._check(view_B, rank_B)
        return decode(self._records[view_B, rank_B], len(self.card.classes), device)

    def _check(self, view_B: NDArray[np.int64], rank_B: NDArray[np.int64]) -> None:
        """Hold the chunks of these slots against their checksums, each chunk once."""
        chunk_B = rank_B // self.card.chunk_slots
        new_B = ~self._checked[view_B, chunk_B]
        for view, chunk in sorted(set(zip(view_B[new_B].tolist(), chunk_B[new_B].tolist(), strict=True))):
            place = (view * self.card.chunks + chunk) * DIGEST_BYTES
            if os.pread(self._digests_file, DIGEST_BYTES, place) != self.digest(view, chunk):
                raise UserError(
                    f"{self.path}: damaged: view {view}, chunk {chunk} is not as it was written: record the tape again"
                )
            self._checked[view, chunk] = True

    def write(self, view: int, rank: int, records: Records) -> None:
        """Put records into consecutive slots. Nobody reads them before `commit`. Raises UserError when the disk is full."""
        slot = view * self.card.images + rank
        _write(self._records_file, np.ascontiguousarray(records).tobytes(), slot * self.record_type.itemsize, self.path)

    def commit(self, view: int, chunks: list[int]) -> None:
        """Declare chunks complete: all their slots have been written, by this process or others."""
        if not chunks:
            return
        os.fsync(self._records_file)
        for chunk in chunks:
            place = (view * self.card.chunks + chunk) * DIGEST_BYTES
            _write(self._digests_file, self.digest(view, chunk), place, self.path)
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
            return load_file(path)["labels"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error

    def _digests(self) -> NDArray[np.uint64]:
        size = self.card.views * self.card.chunks * DIGEST_BYTES
        content = os.pread(self._digests_file, size, 0).ljust(size, b"\0")
        return np.frombuffer(content, "<u8").reshape(self.card.views, self.card.chunks)


def slots_of_a_chunk(record_bytes: int) -> int:
    """A multiple of 64."""
    return max(64, min(CHUNK_SLOTS, CHUNK_BYTES // record_bytes // 64 * 64))


def is_tape(path: Path) -> bool:
    return (path / "tape.json").is_file()


def read_card(path: Path) -> TapeCard:
    """What tape.json says. Raises UserError."""
    try:
        return TapeCard.model_validate_json((path / "tape.json").read_bytes())
    except OSError as error:
        raise UserError(f"{path}: no tape here: tape.json: {error.strerror}") from error
    except ValidationError as error:
        raise UserError(f"{path / 'tape.json'}: {explain(TapeCard, error)}") from error


def settings_of(path: Path) -> dict[str, Any]:
    """The settings of a run that a tape was recorded with: views and split. Raises UserError."""
    card = read_card(path)
    return {"view": card.view.model_dump(exclude={"views"}), "data": card.data["settings"]}


def open_tape(path: Path, *, writable: bool = False) -> Tape:
    """A tape that exists. Raises UserError."""
    return Tape(path, read_card(path), writable=writable)


def refuse_other_folder(path: Path) -> None:
    """Raises UserError where something else than a tape, or nothing, is at `path`."""
    if not is_tape(path) and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: already exists and is no tape: give another folder")


def create(path: Path, card: TapeCard, validation_labels: torch.Tensor) -> Tape:
    """A new tape for writing, or one that was begun with the same card, perhaps with fewer views. Raises UserError."""
    if is_tape(path):
        found = read_card(path)
        refuse_difference(path, found, card)
        card = card.model_copy(
            update={
                "views": max(found.views, card.views),
                "chunk_slots": found.chunk_slots,
                "made_with": found.made_with,
            }
        )
    refuse_other_folder(path)
    refuse_more_than_fits(path, card)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # The card first: a folder without one is nobody's, and a recording killed here could not go on.
        write_atomically(path / "tape.json", card.model_dump_json(indent=2) + "\n")
        for name in ("records.bin", "digests.bin"):
            (path / name).touch()
        save_tensors({"labels": validation_labels}, path / "validation.safetensors")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    return Tape(path, card, writable=True)


def refuse_difference(path: Path, tape: TapeCard, wanted: TapeCard) -> None:
    """Raises UserError naming the first thing in which another recording would differ from the tape."""
    refuse_other_data(path, tape, wanted.data)
    refuse_other_views(path, tape, wanted.view)
    for name in sorted({*tape.teacher, *wanted.teacher} - {"name"}):
        was, now = tape.teacher.get(name), wanted.teacher.get(name)
        if was != now:
            what = (
                f"another teacher ({tape.teacher['name']})" if name == "state" else f"teacher {name} {was}, not {now}"
            )
            raise UserError(f"{path}: was recorded with {what}: give another folder")
    if tape.answers != wanted.answers:
        raise UserError(f"{path}: holds answers {tape.answers!r}, not {wanted.answers!r}: give another folder")


def refuse_other_data(path: Path, tape: TapeCard, data: dict[str, Any]) -> None:
    """Raises UserError where the tape was recorded from other images, or another split of them."""
    for name in ("images", "train", "validation"):
        if tape.data[name] != data[name]:
            detail = f" ({tape.data['images']} training images, here {data['images']})" if name == "images" else ""
            which = "validation" if name == "validation" else "training"
            raise UserError(
                f"{path}: was recorded from other {which} images than {data['name']} has{detail}: "
                f"record a tape of these data, or give the settings of the split that it was made with"
            )


def refuse_other_views(path: Path, tape: TapeCard, view: ViewConfig) -> None:
    """Raises UserError naming the first setting in which the recorded views differ."""
    if tape.view_format != VIEW_FORMAT:
        raise UserError(
            f"{path}: its views are of format {tape.view_format}, this program makes those of format {VIEW_FORMAT}: "
            f"record the tape again"
        )
    was, now = tape.view.model_dump(), view.model_dump()
    for name in was:
        if name not in NAMES_ONLY and was[name] != now[name]:
            raise UserError(
                f"{path}: was recorded with {name} = {was[name]}, now it is {now[name]}: views must be the same"
            )


def refuse_more_than_fits(path: Path, card: TapeCard) -> None:
    """Raises UserError where the disk has no room for all records, what is there already counted in."""
    there = path / "records.bin"
    room = free_bytes(path) + (512 * there.stat().st_blocks if there.is_file() else 0)
    if card.bytes > room:
        raise UserError(
            f"{path}: {card.views} views take {card.bytes / 1e9:,.2f} GB, {room / 1e9:,.2f} GB are free: "
            f"record fewer views, or make room"
        )


def free_bytes(path: Path) -> int:
    """On the disk where `path` is, or will be."""
    folder = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(folder).free


@lru_cache(maxsize=4)
def _order(view_seed: int, group: int, images: int) -> NDArray[np.int64]:
    return mixing.pair_order(view_seed, group, images).ravel()[:images]


@lru_cache(maxsize=4)
def _ranks(view_seed: int, group: int, images: int) -> NDArray[np.int64]:
    order = _order(view_seed, group, images)
    ranks = np.empty(images, np.int64)
    ranks[order] = np.arange(images)
    return ranks


def _write(file: int, content: bytes, offset: int, path: Path) -> None:
    try:
        done = 0
        while done < len(content):
            done += os.pwrite(file, content[done:], offset + done)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"{path}: the disk is full: what was recorded is intact; make room and give the same command again"
            ) from error
        raise
