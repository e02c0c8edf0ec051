"""Recording a tape from front to back (`record`), replaying it (`replay`), and checking it (`verify`): every checksum, and a sample
that the teacher computes again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from deitkit import rng
from deitkit.config import ViewConfig
from deitkit.data import Dataset, Split
from deitkit.data.arrow import DecodedSplit, worth_decoding, write_decoded
from deitkit.distill.encoding import OutputKind, Records, describe_outputs, encode, record_type
from deitkit.distill.losses import TeacherOutput
from deitkit.distill.tape import AGAIN, Manifest, Tape, open_tape
from deitkit.distill.teacher import Teacher
from deitkit.models.network import processor_name
from deitkit.terminal import Progress, UserError, file_size, leftovers
from deitkit.views.loader import augment_and_mix, augment_batch, raw_batch
from deitkit.views.mixup import Batch, RawBatch
from deitkit.views.prefetch import prefetch

PIECE_RECORDS = 256
"""Views that are made and shown to the teacher at a time while recording."""
SAMPLE_RECORDS = 32
"""Neighbours that `verify` computes again together."""
LOGIT_TOLERANCE = 1e-2
"""How far logits may lie from the recorded ones where processor, threads or versions differ."""
DECODED_COPY = "decoded.arrow"
MOST_CHUNK_RECORDS, MOST_CHUNK_BYTES = 4096, 2**23
"""Upper limits of a chunk: an interrupted recording loses one at most."""


def replay(tape: Tape) -> Callable[[Batch], TeacherOutput]:
    """A source of teacher outputs that reads them from a tape. Raises UserError where the tape is damaged."""
    return lambda batch: tape.outputs(batch.view_B.numpy(), batch.index_B.numpy(), batch.images_BCHW.device)


class Piece(NamedTuple):
    """Records of one view at positions start..stop-1, all in one chunk."""

    view: int
    start: int
    stop: int


@final
class Pieces:
    """The pieces of some chunks, given as rows (view, chunk). ImageNet's 300 views have 1.5 million: each is made when it is
    asked for."""

    def __init__(self, manifest: Manifest, chunks_M2: NDArray[np.int64]) -> None:
        self._manifest, self._chunks_M2 = manifest, chunks_M2
        start_M = chunks_M2[:, 1] * manifest.records_per_chunk
        size_M = np.minimum(manifest.images, start_M + manifest.records_per_chunk) - start_M
        self.records = int(size_M.sum())
        """of all pieces together"""
        self._ends_M = np.cumsum(-(-size_M // PIECE_RECORDS))

    def __len__(self) -> int:
        return int(self._ends_M[-1]) if len(self._ends_M) else 0

    def __getitem__(self, number: int) -> Piece:
        if not 0 <= number < len(self):
            raise IndexError(number)
        row = int(np.searchsorted(self._ends_M, number, side="right"))
        view, chunk = (int(part) for part in self._chunks_M2[row])
        start, stop = self._manifest.span(chunk)
        first = start + PIECE_RECORDS * (number - (int(self._ends_M[row - 1]) if row else 0))
        return Piece(view, first, min(first + PIECE_RECORDS, stop))

    def __iter__(self) -> Iterator[Piece]:
        return map(self.__getitem__, range(len(self)))


def missing_pieces(tape: Tape, views: int, share: tuple[int, int] = (0, 1)) -> Pieces:
    """What is yet to be recorded of the first `views` views. `share`: for process i of n, (i, n), the chunks whose number, counted through
    the tape, leaves i when divided by n."""
    missing_M2 = np.argwhere(~tape.complete()[:views])
    number_M = missing_M2[:, 0] * tape.manifest.chunks + missing_M2[:, 1]
    return Pieces(tape.manifest, missing_M2[number_M % share[1] == share[0]])


def record(
    tape: Tape,
    split: Split,
    teacher: Teacher,
    progress: Progress,
    *,
    workers: int = 0,
    views: int,
    accelerator: Accelerator | None = None,
) -> None:
    """Record what is missing of the first `views` views; all processes of `accelerator` together, each its `missing_pieces`. Raises
    UserError if the disk is full or an image cannot be read any more."""
    share = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    missing, copy = missing_pieces(tape, views), tape.path / DECODED_COPY
    if share[0] == 0:
        for left in leftovers(copy):  # of recordings that were killed as they decoded: only this one may write here
            left.unlink(missing_ok=True)
        several = missing.records > tape.manifest.images
        if several and not copy.exists() and worth_decoding(split, tape.path, reserved=tape.missing_bytes()):
            _decode_once(split, copy, progress)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    pieces = missing_pieces(tape, views, share)
    if len(pieces):
        source = DecodedSplit(split, copy) if copy.exists() else split
        write_pieces(tape, pieces, _computed(tape, source, teacher, pieces, workers), progress, share[1])
    if accelerator is not None:
        accelerator.wait_for_everyone()
    if share[0] == 0:
        copy.unlink(missing_ok=True)


def write_pieces(
    tape: Tape, pieces: Pieces, encoded: Iterable[Records], progress: Progress, processes: int = 1
) -> None:
    """Write the records of each piece in turn, and commit each chunk as soon as it is whole. `processes`: how many share the recording.
    Raises UserError when the disk is full."""
    title = "recording" if processes == 1 else f"recording (process 1 of {processes})"
    progress.start(pieces.records, title, unit="outputs")
    done = 0
    for piece, records in zip(pieces, encoded, strict=True):
        tape.write(piece.view, piece.start, records)
        done += piece.stop - piece.start
        chunk = piece.start // tape.manifest.records_per_chunk
        if piece.stop == tape.manifest.span(chunk)[1]:
            tape.commit(piece.view, [chunk])
        progress.step(done, done, 0, 0)
    progress.finish()


def _computed(
    tape: Tape, split: Split, teacher: Teacher, pieces: Pieces | list[Piece], workers: int
) -> Iterator[Records]:
    """The records of each piece, computed by the teacher while the workers make the next views; for a teacher on a CPU they augment
    them as well. Raises UserError if an image cannot be read any more."""
    manifest, augmenting = tape.manifest, workers > 0 and teacher.device.type == "cpu"
    make = partial(_raw_piece, manifest, split, pieces, augmenting)
    for raw in prefetch(make, range(len(pieces)), workers):
        if (raw.weight_M == 0).any():
            lost = split.name(int(raw.index_M[raw.weight_M == 0][0]))
            raise UserError(f"{lost}: cannot be read any more, recording stopped here: restore or remove the image")
        batch = augment_and_mix(raw, manifest.view, teacher.device)
        logits_BK, features_BP = teacher.coded_outputs(batch.images_BCHW)
        yield encode(logits_BK, manifest.outputs, features_BP)


def _raw_piece(
    manifest: Manifest, split: Split, pieces: Pieces | list[Piece], augmenting: bool, number: int
) -> RawBatch:
    """The first stage of the views of a piece."""
    piece = pieces[number]
    index_B = manifest.order(piece.view)[piece.start : piece.stop]
    raw = raw_batch(split, manifest.view, index_B, np.full(len(index_B), piece.view))
    return augment_batch(raw, manifest.view) if augmenting else raw


def _decode_once(split: Split, copy: Path, progress: Progress) -> None:
    """Decode photos once for all their views: a copy without compression, which a killed recording leaves behind for the next one."""
    progress.start(len(split), "decoding", unit="images")
    write_decoded(split, copy, lambda done: progress.step(done, done, 0, 0))


def verify(tape: Tape, split: Split, teacher: Teacher, *, samples: int = 256, workers: int = 0) -> dict[str, Any]:
    """Check every checksum, also of the hard labels of the validation images, and let the teacher compute `samples` outputs again.

    On the processor, threads and versions that the tape was recorded with every bit must be the same; elsewhere 1 % of the
    sample may differ. Returns counts: chunks, sampled, different; and exact. Raises UserError where something is wrong.
    """
    manifest = tape.manifest
    damaged, complete = tape.damaged(), tape.complete()
    if damaged:
        view, chunk = damaged[0]
        start, stop = manifest.span(chunk)
        raise UserError(
            f"{tape.path}: damaged: checksum mismatch in records {start} to {stop - 1} of view {view} "
            f"({len(damaged)} of {int(complete.sum())} chunks): {AGAIN}"
        )
    tape.validation_labels()
    if not complete.any():
        raise UserError(f"{tape.path}: nothing is recorded yet")
    exact = made_with() == manifest.made_with and teacher.device.type == "cpu"
    sampled = different = 0
    samples = min(samples, int(complete.sum()) * manifest.records_per_chunk)
    sample = _sample(manifest, complete, samples)
    for piece, computed in zip(sample, _computed(tape, split, teacher, sample, workers), strict=True):
        index_B = manifest.order(piece.view)[piece.start : piece.stop]
        recorded = tape.records(np.full(len(index_B), piece.view), index_B)
        sampled += len(index_B)
        different += _differing(recorded, computed, 0 if exact else LOGIT_TOLERANCE)
    if different > (0 if exact else sampled // 100):
        raise UserError(
            f"{tape.path}: the teacher's outputs differ from the tape's for {different} of {sampled} views: "
            f"another teacher, other images or other views than it was recorded with"
        )
    return {"chunks": int(complete.sum()), "sampled": sampled, "different": different, "exact": exact}


def _sample(manifest: Manifest, complete_VC: NDArray[np.bool_], samples: int) -> list[Piece]:
    """Short pieces of complete chunks, drawn evenly."""
    where = np.argwhere(complete_VC)
    pieces = []
    for number in range(-(-samples // SAMPLE_RECORDS)):
        chosen, place = rng.uniform(0, rng.Purpose.SAMPLE, number, 0, 2)
        view, chunk = (int(part) for part in where[int(chosen * len(where))])
        start, stop = manifest.span(chunk)
        first = start + int(place * (stop - start)) // SAMPLE_RECORDS * SAMPLE_RECORDS
        pieces.append(Piece(view, first, min(first + SAMPLE_RECORDS, stop)))
    return pieces


def _differing(recorded: Records, computed: Records, tolerance: float) -> int:
    """How many records differ; logits by more than `tolerance`."""
    differs_B = np.zeros(len(recorded), bool)
    for name in recorded.dtype.names or ():
        was, now = (one[name].astype(np.float64).reshape(len(recorded), -1) for one in (recorded, computed))
        allowed = tolerance * np.maximum(1, np.abs(was)) if name == "features" else tolerance
        near = np.abs(was - now) <= (0 if name in ("label", "class") else allowed)
        differs_B |= ~near.all(-1)  # NaN is not near
    return int(differs_B.sum())


def make_manifest(
    teacher: Teacher, data: dict[str, Any], classes: tuple[str, ...], view: ViewConfig, outputs: OutputKind,
    views: int, accuracy: dict[str, Any],
) -> Manifest:  # fmt: skip
    """The manifest of a tape that is about to be recorded. Raises UserError."""
    if isinstance(outputs, int) and outputs > len(classes):
        raise UserError(f"--outputs {outputs}: there are {len(classes)} classes: give at most that number, or all")
    features = 0 if teacher.code is None else teacher.code.size
    return Manifest(
        teacher=teacher.describe(),
        classes=classes,
        data=data,
        view=view.model_copy(update={"views": None}),
        outputs=outputs,
        record_format=describe_outputs(outputs, features),
        features=features,
        feature_checksum=None if teacher.code is None else teacher.code.checksum(),
        views=views,
        records_per_chunk=records_per_chunk(record_type(outputs, len(classes), features).itemsize),
        made_with=made_with(),
        accuracy=accuracy,
    )


def records_per_chunk(record_bytes: int) -> int:
    """How many records are committed together: a multiple of 64."""
    return max(64, min(MOST_CHUNK_RECORDS, MOST_CHUNK_BYTES // record_bytes // 64 * 64))


def data_facts(dataset: Dataset, settings: dict[str, Any], *, read: bool = False) -> dict[str, Any]:
    """What a manifest says of its data. `settings`: those of the split and of the subset. `read`: open every image, also
    where its file's size and times are known."""
    train, validation = dataset.open_split("train"), dataset.open_split("val")
    return {
        "name": dataset.name,
        "settings": settings,
        "images": len(train),
        "train": train.content_hash() if read else train.cached_content_hash(),
        "validation": validation.content_hash() if read else validation.cached_content_hash(),
    }


def made_with() -> dict[str, Any]:
    """What the last bits of a teacher's outputs depend on besides the teacher; numpy and scipy compute the draws of the views."""
    return {
        **{name: version(name) for name in ("torch", "timm", "pillow", "numpy", "scipy")},
        "threads": torch.get_num_threads(),
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
        "cores": os.cpu_count(),
    }


INFO = ("teacher_size", "images", "views", "features", "record_bytes", "bytes", "made_with")


def tape_info(path: Path) -> dict[str, Any]:
    """What is on a tape; plain values. Raises UserError."""
    tape = open_tape(path)
    manifest = tape.manifest
    return {
        "tape": str(path),
        "teacher": manifest.teacher["name"],
        "teacher_top1": manifest.accuracy["top1"] if manifest.accuracy["n"] else None,
        "data": manifest.data["name"],
        "classes": len(manifest.classes),
        "complete_views": tape.complete_views(),
        "recorded": float(tape.complete().mean()),
        "outputs": manifest.outputs,
        "view": manifest.view.model_dump(),
        **{name: getattr(manifest, name) for name in INFO},
    }


def info_rows(info: dict[str, Any]) -> list[list[str]]:
    """`tape_info` as rows (what, value)."""
    view, top1 = info["view"], info["teacher_top1"]
    return [
        ["teacher", info["teacher"] + ("" if top1 is None else f", {100 * top1:.2f} % validation accuracy")],
        ["data", f"{info['data']}: {info['images']} training images, {info['classes']} classes"],
        ["views", f"{info['complete_views']} of {info['views']}, {view['augment']}, view seed {view['view_seed']}"],
        ["outputs", describe_outputs(info["outputs"], info["features"])],
        ["size", f"{info['record_bytes']} bytes per output, {file_size(info['bytes'])}"],
    ]
