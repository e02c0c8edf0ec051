"""How a teacher's answers to views are written down: fixed-size records, a decision, the likeliest classes, or all logits.

A live teacher that is being recorded passes through the same encoding, so live and replayed training see the same numbers.

The card of a tape, `tape.json`: what the recorded answers depend on, and in what another recording must not differ.

The tape: a teacher's answers to views, recorded once and replayed for any student, loss, seed or sweep.

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
import json
import math
import os
import shutil
import weakref
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file

from deitkit.config import Config, PositiveInt, Size, ViewConfig
from deitkit.distill.losses import TeacherOutput
from deitkit.settings import explain
from deitkit.terminal import Lock, UserError, file_size, is_filled, save_tensors, write_atomically
from deitkit.views import mixup
from deitkit.views.image_ops import to_device

AnswerKind = Literal["hard", "all"] | Annotated[int, Field(gt=0)]
"""`hard`: the decision alone. A number k: the k largest logits. `all`: every logit."""
Records = NDArray[Any]
"""A structured array, one record a view."""


def record_type(answers: AnswerKind, classes: int) -> np.dtype[Any]:
    """What one record holds, for a teacher of so many classes. Little-endian and packed.

    hard: the label, in 1 byte up to 256 classes, 2 up to 65,536, else 4. k: for each of the k likeliest classes its
    number (sized like a label) and its log-probability (2 bytes), then the log-sum-exp of all logits (4 bytes).
    all: 4 bytes a class.
    """
    label = "<u1" if classes <= 2**8 else "<u2" if classes <= 2**16 else "<u4"
    if answers == "hard":
        return np.dtype([("label", label)])
    if answers == "all":
        return np.dtype([("logits", "<f4", (classes,))])
    return np.dtype([("class", label, (int(answers),)), ("log_p", "<f2", (int(answers),)), ("log_sum_exp", "<f4")])


def encode(logits_BK: Float[torch.Tensor, "B K"], answers: AnswerKind) -> Records:
    """The records of B answers. Of equal logits the lower class comes first. Raises UserError where they are not finite: of
    those, a decision would be as good as any other, and nobody would see it."""
    if not logits_BK.isfinite().all():
        raise UserError(
            "the teacher answers views with infinity or NaN: record with --teacher-precision float32, or another one"
        )
    records = np.empty(len(logits_BK), record_type(answers, logits_BK.shape[1]))
    if answers == "hard":
        records["label"] = logits_BK.argmax(-1).cpu().numpy()
    elif answers == "all":
        records["logits"] = logits_BK.float().cpu().numpy()
    else:
        sum_B1 = logits_BK.float().logsumexp(-1, keepdim=True)
        ordered_BK, class_BK = torch.sort(logits_BK.float() - sum_B1, dim=-1, descending=True, stable=True)
        records["class"] = class_BK[:, : int(answers)].cpu().numpy()
        records["log_p"] = np.maximum(ordered_BK[:, : int(answers)].cpu().numpy(), np.finfo(np.float16).min)
        records["log_sum_exp"] = sum_B1[:, 0].cpu().numpy()
    return records


def decode(records: Records, classes: int, device: torch.device | str = "cpu") -> TeacherOutput:
    """The answers that were written down. Of the k likeliest classes alone, the probability that is left is shared evenly
    by all other classes, so that logits of all K classes come back: exact for those k, a guess for the rest."""

    def tensor(field: str, kind: type[np.generic]) -> torch.Tensor:
        return to_device(records[field].astype(kind), torch.device(device))

    names = records.dtype.names or ()
    if "label" in names:
        return TeacherOutput(tensor("label", np.int64), None)
    if "logits" in names:
        logits_BK = tensor("logits", np.float32)
        return TeacherOutput(logits_BK.argmax(-1), logits_BK)
    class_Bk, log_p_Bk, sum_B = (
        tensor("class", np.int64),
        tensor("log_p", np.float32),
        tensor("log_sum_exp", np.float32),
    )
    others = classes - class_Bk.shape[1]
    left_B1 = (1 - log_p_Bk.exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    rest_B1 = left_B1.log() - math.log(max(1, others))
    # No other class is likelier than the least likely one that was written down.
    logits_BK = torch.minimum(rest_B1, log_p_Bk[:, -1:]).expand(-1, classes).scatter(1, class_Bk, log_p_Bk)
    return TeacherOutput(class_Bk[:, 0], logits_BK + sum_B[:, None])


DIGEST_BYTES = 8
AGAIN = "remove the folder and record the tape again"
VIEW_FORMAT = 2
"""Goes up whenever the same draws give other pixels: what was recorded of the old views is then refused."""
NAMES_ONLY = {"augment", "views"}
"""Fields of a view recipe that do not change what a view looks like."""
UNSEALED = {"seal", "views"}
"""Fields that a card's seal says nothing about: views are added to a tape, and decide nothing about what is there."""
NEEDED: dict[str, dict[str, tuple[type, ...]]] = {
    "teacher": {"name": (str,), "state": (str,), "chunk_size": (int,), "dtype": (str,)},
    "data": {"name": (str,), "settings": (dict,), "images": (int,), "train": (str,), "validation": (str,)},
    "accuracy": {"n": (int,), "top1": (int, float)},
}
_KINDS = {str: "text", int: "whole number", dict: "settings", float: "number"}


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
    decisions: str | None = None
    """digest of the teacher's decisions on the validation images; `create` adds it"""
    seal: str | None = None
    """digest of everything above but the number of views; `sealed` adds it"""

    @model_validator(mode="after")
    def _check(self) -> TapeCard:
        for section, needed in NEEDED.items():
            facts = getattr(self, section)
            for name, kinds in needed.items():
                if not isinstance(facts.get(name), kinds):
                    raise ValueError(f"{section}.{name}: missing, or no {_KINDS[kinds[-1]]}")
        for count in (self.data["images"], self.teacher["chunk_size"]):
            if count < 1:
                raise ValueError(f"data.images, teacher.chunk_size: {count} is less than one")
        if self.teacher["dtype"] not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"teacher.dtype: {self.teacher['dtype']!r} is no format of numbers")
        if not self.classes:
            raise ValueError("classes: none")
        return self

    @property
    def images(self) -> int:
        return int(self.data["images"])

    @property
    def teacher_size(self) -> Size | None:
        """(height, width) of the image that the teacher saw; None where the card does not say."""
        return _size_in(self.teacher.get("preprocessing"))

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

    def slots(self, chunk: int) -> tuple[int, int]:
        """First and one after the last rank of a chunk."""
        return chunk * self.chunk_slots, min(self.images, (chunk + 1) * self.chunk_slots)

    def order(self, view: int) -> NDArray[np.int64]:
        """The images in the order of their slots in `view`: pair by pair."""
        return _order(self.view.view_seed, view // self.view.repeated_aug, self.images)

    def ranks(self, view: int) -> NDArray[np.int64]:
        """The slot of each image in `view`."""
        return _ranks(self.view.view_seed, view // self.view.repeated_aug, self.images)

    def sealed(self) -> str:
        """The card as it is written down, its seal at the end."""
        seal = _seal(json.loads(self.model_dump_json()))
        return self.model_copy(update={"seal": seal}).model_dump_json(indent=2) + "\n"


def is_tape(path: Path) -> bool:
    return (path / "tape.json").is_file()


def read_card(path: Path) -> TapeCard:
    """What tape.json says. Raises UserError, also where it is not as it was written."""
    file = path / "tape.json"
    try:
        content = file.read_bytes()
        card = TapeCard.model_validate_json(content)
    except OSError as error:
        raise UserError(f"{path}: no tape here: tape.json: {error.strerror}") from error
    except ValidationError as error:
        raise UserError(f"{file}: {explain(TapeCard, error)}") from error
    if card.seal != _seal(json.loads(content)):
        raise UserError(f"{file}: is not as it was written: its answers may be to other views, or of another teacher")
    return card


def settings_of(path: Path) -> dict[str, Any]:
    """The settings of a run that a tape was recorded with: views and split. Raises UserError."""
    card = read_card(path)
    return {"view": card.view.model_dump(exclude={"views"}), "data": card.data["settings"]}


def refuse_difference(path: Path, tape: TapeCard, wanted: TapeCard) -> None:
    """Raises UserError naming the first thing in which another recording would differ from the tape."""
    refuse_other_data(path, tape, wanted.data)
    refuse_other_views(path, tape, wanted.view)
    for name in sorted({*tape.teacher, *wanted.teacher} - {"name"}):
        was, now = tape.teacher.get(name), wanted.teacher.get(name)
        if was != now:
            saw, sees = tape.teacher_size, wanted.teacher_size
            what = f"teacher {name} {was}, not {now}"
            if name == "state":
                what = f"another teacher ({tape.teacher['name']})"
            elif name == "preprocessing" and saw and sees and saw != sees:
                what = "a teacher that sees {}x{} pixels, not {}x{}".format(*saw, *sees)
            raise UserError(f"{path}: was recorded with {what}: give another folder")
    refuse_other_answers(path, tape, wanted.answers)


def refuse_other_answers(path: Path, tape: TapeCard, answers: AnswerKind) -> None:
    """Raises UserError where another kind of answers is to be added to a tape."""
    if tape.answers != answers:
        raise UserError(f"{path}: holds answers {tape.answers!r}, not {answers!r}: give another folder")


def refuse_other_data(path: Path, tape: TapeCard, data: dict[str, Any]) -> None:
    """Raises UserError where the tape was recorded from other images, or another split of them."""
    if tape.data["name"] != data["name"] and (tape.data["train"], tape.data["validation"]) != (
        data["train"],
        data["validation"],
    ):
        raise UserError(
            f"{path}: is a tape of {tape.data['name']}, not of {data['name']}: record one of these data, or give those"
        )
    for name in ("images", "train", "validation"):
        if tape.data[name] != data[name]:
            detail = f" ({tape.data['images']} training images, here {data['images']})" if name == "images" else ""
            which = "validation" if name == "validation" else "training"
            raise UserError(
                f"{path}: was recorded from other {which} images than {data['name']} has{detail}: "
                f"record a tape of these data, or give the settings of the split that it was made with"
            )


def refuse_other_format(path: Path, tape: TapeCard) -> None:
    """Raises UserError where this program makes other pixels of the same draws."""
    if tape.view_format != VIEW_FORMAT:
        raise UserError(
            f"{path}: its views are of format {tape.view_format}, this program makes those of format {VIEW_FORMAT}: "
            f"{AGAIN}"
        )


def refuse_other_views(path: Path, tape: TapeCard, view: ViewConfig) -> None:
    """Raises UserError naming the first setting in which the recorded views differ."""
    refuse_other_format(path, tape)
    was, now = tape.view.model_dump(), view.model_dump()
    for name in was:
        if name not in NAMES_ONLY and was[name] != now[name]:
            raise UserError(
                f"{path}: was recorded with {name} = {was[name]}, now it is {now[name]}: views must be the same"
            )


def _size_in(preprocessing: Any) -> Size | None:
    """The image size of a `Preprocessing` as plain values, where it has one."""
    size = preprocessing.get("image_size") if isinstance(preprocessing, dict) else None
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        return None
    return size[0], size[1]


@lru_cache(maxsize=4)
def _order(view_seed: int, group: int, images: int) -> NDArray[np.int64]:
    return mixup.pair_order(view_seed, group, images).ravel()[:images]


@lru_cache(maxsize=4)
def _ranks(view_seed: int, group: int, images: int) -> NDArray[np.int64]:
    order = _order(view_seed, group, images)
    ranks = np.empty(images, np.int64)
    ranks[order] = np.arange(images)
    return ranks


def _seal(content: dict[str, Any]) -> str:
    """`content` as it stands in the file, so that a version that knows more fields finds the same seal."""
    decisive = {name: value for name, value in content.items() if name not in UNSEALED}
    return hashlib.blake2b(json.dumps(decisive, sort_keys=True).encode(), digest_size=DIGEST_BYTES).hexdigest()


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
    ) -> TeacherOutput:
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
