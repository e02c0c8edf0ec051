"""Filling a tape: from front to back (`record`), or with what a live teacher says during a training (`Recording`).

And trusting it: `verify` reads every checksum and asks the teacher again about a sample.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, final, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset

from deitkit import rng
from deitkit.config import ViewConfig
from deitkit.data import Dataset, Split
from deitkit.data.arrow import DecodedSplit, worth_decoding, write_decoded
from deitkit.distill.losses import TeacherOutput
from deitkit.distill.tape import (
    AGAIN,
    AnswerKind,
    Records,
    Tape,
    TapeCard,
    decode,
    encode,
    record_type,
    slots_of_a_chunk,
)
from deitkit.distill.teacher import Teacher
from deitkit.models.network import processor_name
from deitkit.terminal import Progress, UserError, leftovers
from deitkit.views.loader import augment_and_mix, augment_batch, prefetch, raw_batch
from deitkit.views.mixup import Batch, RawBatch

PIECE_SLOTS = 256
"""Views that are made and answered at a time while recording."""
DECODED_COPY = "decoded.arrow"
SAMPLE_SLOTS = 32
"""Neighbours that are asked again together."""
LOGIT_TOLERANCE = 1e-2
"""How far logits may lie from the recorded ones where processor, threads or versions differ."""


@final
class Replay:
    """A source of answers that reads them from a tape. Raises UserError where the tape is damaged."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def __call__(self, batch: Batch) -> TeacherOutput:
        view_B, index_B = batch.view_B.numpy(), batch.index_B.numpy()
        return self.tape.answers(view_B, index_B, batch.images_BCHW.device)


@final
class Recording:
    """A source of answers that asks a teacher, and writes down what it says; what is on the tape already is replayed.

    Every process of a training writes the records of its own share of a batch; after an epoch the first process commits
    the chunks that were shown whole since this recording began."""

    def __init__(self, tape: Tape, teacher: Teacher) -> None:
        self.tape = tape
        self.teacher = teacher
        self._complete = tape.complete()
        self._shown: dict[int, NDArray[np.bool_]] = {}

    def __call__(self, batch: Batch) -> TeacherOutput:
        view_B, index_B = batch.view_B.numpy(), batch.index_B.numpy()
        rank_B = self.tape.rank_of(view_B, index_B)
        there_B = self._complete[view_B, rank_B // self.tape.card.chunk_slots]
        if there_B.all():
            return self.tape.answers(view_B, index_B, batch.images_BCHW.device)
        records = encode(self.teacher.forward(batch.images_BCHW), self.tape.card.answers)
        # What was committed is never written again: here the same teacher may differ in the last bits.
        records[there_B] = self.tape.records(view_B[there_B], index_B[there_B])
        for row in np.flatnonzero((batch.weight_B.cpu().numpy() > 0) & ~there_B):
            self.tape.write(int(view_B[row]), int(rank_B[row]), records[row : row + 1])
        return decode(records, self.teacher.num_classes, batch.images_BCHW.device)

    def refresh(self) -> None:
        """Look at what the first process has committed."""
        self._complete = self.tape.complete()

    def end_epoch(self, rows: tuple[NDArray[np.int64], NDArray[np.int64]], unreadable: set[int]) -> None:
        """Commit what is complete now that these images were shown in these views, but for the unreadable ones and their
        partners, which were not mixed."""
        index_N, view_N = rows
        for view in np.unique(view_N):
            shown = self._shown.setdefault(int(view), np.zeros(self.tape.card.images, bool))
            rank_N = self.tape.ranks(int(view))[index_N[view_N == view]]
            lost = self.tape.ranks(int(view))[list(unreadable)] // 2
            # A lost image's partner is written over, unmixed, also where it was shown well in an earlier epoch.
            shown[rank_N] = ~np.isin(rank_N // 2, lost)
            ready = [chunk for chunk in range(self.tape.card.chunks) if shown[slice(*self.tape.slots(chunk))].all()]
            self.tape.commit(int(view), [chunk for chunk in ready if not self._complete[view, chunk]])
            self._complete[view, ready] = True
            if len(ready) == self.tape.card.chunks:
                del self._shown[int(view)]


class Piece(NamedTuple):
    """Some slots of one view: ranks start..stop-1, all in one chunk."""

    view: int
    start: int
    stop: int


@final
class Pieces(Sequence[Piece]):
    """The pieces of some chunks, given as rows (view, chunk). Of an ImageNet's 300 views there are 1.5 million: each is made
    when it is asked for."""

    def __init__(self, card: TapeCard, chunks_M2: NDArray[np.int64]) -> None:
        self._card, self._chunks_M2 = card, chunks_M2
        start_M = chunks_M2[:, 1] * card.chunk_slots
        slots_M = np.minimum(card.images, start_M + card.chunk_slots) - start_M
        self.slots = int(slots_M.sum())
        """of all pieces together"""
        self._ends_M = np.cumsum(-(-slots_M // PIECE_SLOTS))

    def __len__(self) -> int:
        return int(self._ends_M[-1]) if len(self._ends_M) else 0

    @overload
    def __getitem__(self, number: int) -> Piece: ...
    @overload
    def __getitem__(self, number: slice) -> list[Piece]: ...
    def __getitem__(self, number: int | slice) -> Piece | list[Piece]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        row = int(np.searchsorted(self._ends_M, number, side="right"))
        view, chunk = (int(part) for part in self._chunks_M2[row])
        start, stop = self._card.slots(chunk)
        first = start + PIECE_SLOTS * (number - (int(self._ends_M[row - 1]) if row else 0))
        return Piece(view, first, min(first + PIECE_SLOTS, stop))


def missing_pieces(tape: Tape, views: int) -> Pieces:
    """What is yet to be recorded of the first `views` views."""
    return Pieces(tape.card, np.argwhere(~tape.complete()[:views]))


def record(tape: Tape, split: Split, teacher: Teacher, progress: Progress, *, workers: int = 0, views: int) -> None:
    """Record what is missing of the first `views` views. Raises UserError when the disk is full or an image is lost."""
    pieces = missing_pieces(tape, views)
    copy = tape.path / DECODED_COPY
    for left in leftovers(copy):  # of recordings that were killed as they decoded: this one alone may write here
        left.unlink(missing_ok=True)
    if pieces:
        several = pieces.slots > tape.card.images
        if copy.exists() or (several and worth_decoding(split, tape.path, reserved=tape.missing_bytes())):
            split = _decoded_once(split, copy, progress)
        write_pieces(tape, pieces, _asked(tape, split, teacher, pieces, workers), progress)
    copy.unlink(missing_ok=True)


def write_pieces(tape: Tape, pieces: Pieces, answers: Iterable[Records], progress: Progress) -> None:
    """Write the records of each piece in turn, and commit each chunk as soon as it is whole. Raises UserError when the disk is
    full."""
    progress.start(pieces.slots, "recording", unit="answers")
    done = 0
    for piece, records in zip(pieces, answers, strict=True):
        tape.write(piece.view, piece.start, records)
        done += piece.stop - piece.start
        chunk = piece.start // tape.card.chunk_slots
        if piece.stop == tape.slots(chunk)[1]:
            tape.commit(piece.view, [chunk])
        progress.step(done, done, 0, 0)
    progress.finish()


def _asked(tape: Tape, split: Split, teacher: Teacher, pieces: Pieces, workers: int) -> Iterator[Records]:
    """What the teacher answers to the views of each piece. Raises UserError where an image is lost."""
    for _, crops in _crops(tape, split, pieces, workers, teacher.device):
        if (crops.weight_M == 0).any():
            lost = int(crops.index_M[crops.weight_M == 0][0])
            raise UserError(f"{split.name(lost)}: cannot be read any more: the tape ends before it; mend or remove it")
        logits_BK = teacher.forward(augment_and_mix(crops, tape.card.view, teacher.device).images_BCHW)
        yield encode(logits_BK, tape.card.answers)


def _decoded_once(split: Split, copy: Path, progress: Progress) -> Split:
    """Photos decoded once for all their views: `split`, read from a copy without compression, which a killed recording
    leaves behind for the next one."""
    if not copy.exists():
        progress.start(len(split), "decoding", unit="images")
        write_decoded(split, copy, lambda done: progress.step(done, done, 0, 0))
    return DecodedSplit(split, copy)


def verify(tape: Tape, split: Split, teacher: Teacher, *, samples: int = 256, workers: int = 0) -> dict[str, Any]:
    """Hold a tape against itself and against the teacher: every checksum, also of the decisions on the validation images, and
    `samples` views asked again.

    On the processor, threads and versions that it was recorded with every bit must be the same; elsewhere 1 % of the
    sample may differ. Returns what was found: chunks, sampled, different, exact. Raises UserError where something is wrong.
    """
    damaged = tape.damaged()
    if damaged:
        view, chunk = damaged[0]
        start, stop = tape.slots(chunk)
        raise UserError(
            f"{tape.path}: damaged: slots {start} to {stop - 1} of view {view} are not as they were written "
            f"({len(damaged)} of {int(tape.complete().sum())} chunks): {AGAIN}"
        )
    tape.validation_labels()
    complete = tape.complete()
    if not complete.any():
        raise UserError(f"{tape.path}: nothing is recorded yet")
    exact = made_with() == tape.card.made_with and teacher.device.type == "cpu"
    sampled = different = 0
    samples = min(samples, int(complete.sum()) * tape.card.chunk_slots)
    for piece, crops in _crops(tape, split, _sample(tape, complete, samples), workers, teacher.device):
        logits_BK = teacher.forward(augment_and_mix(crops, tape.card.view, teacher.device).images_BCHW)
        index_B = crops.index_M[: len(crops.partner_B)].numpy()
        recorded = tape.records(np.full(len(index_B), piece.view), index_B)
        sampled += len(index_B)
        different += _differing(recorded, encode(logits_BK, tape.card.answers), 0 if exact else LOGIT_TOLERANCE)
    if different > (0 if exact else sampled // 100):
        raise UserError(
            f"{tape.path}: the teacher answers {different} of {sampled} views otherwise than the tape: "
            f"another teacher, other images or other views than it was recorded with"
        )
    return {"chunks": int(complete.sum()), "sampled": sampled, "different": different, "exact": exact}


def data_facts(dataset: Dataset, settings: dict[str, Any], *, read: bool = False) -> dict[str, Any]:
    """What a tape has to know of its data. `settings`: those of the split and of the subset. `read`: open every image, also
    where it is known by its file's size and times."""
    train, validation = dataset.open_split("train"), dataset.open_split("val")
    return {
        "name": dataset.name,
        "settings": settings,
        "images": len(train),
        "train": train.content_hash() if read else train.cached_content_hash(),
        "validation": validation.content_hash() if read else validation.cached_content_hash(),
    }


def make_card(
    teacher: Teacher, data: dict[str, Any], classes: tuple[str, ...], view: ViewConfig, answers: AnswerKind,
    views: int, accuracy: dict[str, Any],
) -> TapeCard:  # fmt: skip
    """The card of a tape that is about to be recorded. Raises UserError."""
    if isinstance(answers, int) and answers > len(classes):
        raise UserError(f"--answers {answers}: there are {len(classes)} classes: give at most so many, or all")
    return TapeCard(
        teacher=teacher.describe(),
        classes=classes,
        data=data,
        view=view.model_copy(update={"views": None}),
        answers=answers,
        views=views,
        chunk_slots=slots_of_a_chunk(record_type(answers, len(classes)).itemsize),
        made_with=made_with(),
        accuracy=accuracy,
    )


def made_with() -> dict[str, Any]:
    """What the last bits of a teacher's answers depend on besides the teacher."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    return {
        **{name: version(name) for name in ("torch", "timm", "pillow")},
        "threads": torch.get_num_threads(),
        "processor": device,
        "cores": os.cpu_count(),
    }


def _sample(tape: Tape, complete: NDArray[np.bool_], samples: int) -> list[Piece]:
    """Short runs of slots out of complete chunks, drawn evenly."""
    where = np.argwhere(complete)
    pieces = []
    for number in range(-(-samples // SAMPLE_SLOTS)):
        chosen, place = rng.uniform(0, rng.Purpose.SAMPLE, number, 0, 2)
        view, chunk = (int(part) for part in where[int(chosen * len(where))])
        start, stop = tape.slots(chunk)
        first = start + int(place * (stop - start)) // SAMPLE_SLOTS * SAMPLE_SLOTS
        pieces.append(Piece(view, first, min(first + SAMPLE_SLOTS, stop)))
    return pieces


def _differing(recorded: Records, answered: Records, tolerance: float) -> int:
    """How many records differ; numbers by more than `tolerance`."""
    differs_B = np.zeros(len(recorded), bool)
    for name in recorded.dtype.names or ():
        distance = np.abs(recorded[name].astype(np.float64) - answered[name].astype(np.float64))
        near = distance.reshape(len(recorded), -1) <= (0 if name in ("label", "class") else tolerance)
        differs_B |= ~near.all(-1)  # what is not a number is not near
    return int(differs_B.sum())


def _crops(
    tape: Tape, split: Split, pieces: Sequence[Piece], workers: int, device: torch.device
) -> Iterator[tuple[Piece, RawBatch]]:
    """The first stage of each piece's views, made ahead by the workers while the teacher answers; for a teacher on a CPU,
    augmented by them as well."""
    crops = _PieceCrops(tape.card, split, pieces, augmenting=workers > 0 and device.type == "cpu")
    yield from zip(pieces, prefetch(crops.__getitem__, range(len(crops)), workers), strict=True)


class _PieceCrops(TorchDataset[RawBatch]):
    """The first stage of the views of each piece."""

    def __init__(self, card: TapeCard, split: Split, pieces: Sequence[Piece], *, augmenting: bool) -> None:
        self.card, self.split, self.pieces, self.augmenting = card, split, pieces, augmenting

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, number: int) -> RawBatch:
        piece = self.pieces[number]
        index_B = self.card.order(piece.view)[piece.start : piece.stop]
        crops = raw_batch(self.split, self.card.view, index_B, np.full(len(index_B), piece.view))
        return augment_batch(crops, self.card.view) if self.augmenting else crops
