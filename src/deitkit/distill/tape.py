"""A tape: cached teacher outputs, recorded once and replayed for any student, loss, seed or sweep.

A folder:

    tape.json               the manifest: what the outputs depend on (teacher, data, views, versions), and its checksum
    records.bin             fixed-size records (`encoding.record_type`), one per view and position: the position of an image is its place
                            in that view's order of pairs, so that a recording writes from front to back
    digests.bin             8 bytes per chunk of a view's records: their BLAKE2b, 0 while the chunk is incomplete
    validation.safetensors  the teacher's hard labels of the validation images
    features.safetensors    how features are encoded, if they are recorded (`encoding.FeatureCode`)
    .lock                   held by the process that records; readers ignore it

A chunk's records are on the disk before its digest is written: a killed recording continues where it stopped, and half a chunk
is never read. A live teacher that is being recorded passes through the same encoding, so that live and replayed training see the
same numbers.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file

from deitkit.config import Config, PositiveInt, Size, ViewConfig
from deitkit.distill.encoding import (
    CODE_FILE,
    FeatureCode,
    OutputKind,
    Records,
    decode,
    describe_outputs,
    load_code,
    record_type,
)
from deitkit.distill.losses import TeacherOutput
from deitkit.settings import explain
from deitkit.terminal import Lock, UserError, file_size, is_filled, save_tensors, write_atomically
from deitkit.views import mixup

DIGEST_BYTES = 8
VIEW_FORMAT = 3
"""Goes up whenever the same draws give other pixels: outputs for the old views are then refused."""
NAMES_ONLY = {"augment", "views", "view_size"}
"""Fields of a view recipe that do not change what is drawn."""
NOT_IN_CHECKSUM = {"checksum", "views"}
"""Views are added to a tape, and decide nothing about the recorded ones."""
AGAIN = "remove the folder and record the tape again"

# --------------------------------------------------------------------------------------------------- manifest

NEEDED: dict[str, dict[str, tuple[type, ...]]] = {
    "teacher": {"name": (str,), "state": (str,), "chunk_size": (int,), "dtype": (str,)},
    "data": {"name": (str,), "settings": (dict,), "images": (int,), "train": (str,), "validation": (str,)},
    "accuracy": {"n": (int,), "top1": (int, float)},
}
_KINDS = {str: "text", int: "whole number", dict: "settings", float: "number"}


class Manifest(Config):
    """tape.json: everything that the recorded outputs depend on, and how they are encoded."""

    format: Literal[1] = 1
    view_format: int = VIEW_FORMAT
    teacher: dict[str, Any]
    """`Teacher.describe()`"""
    classes: tuple[str, ...]
    data: dict[str, Any]
    """name, settings, number of training images, content hashes of training and validation split"""
    view: ViewConfig
    outputs: OutputKind
    record_format: str | None = None
    """`describe_outputs`"""
    features: Annotated[int, Field(ge=0, le=4096)] = 0
    """numbers in the code of the teacher's features; 0: none are recorded"""
    feature_checksum: str | None = None
    """of that code, which lies beside as features.safetensors"""
    views: PositiveInt
    records_per_chunk: PositiveInt
    """records that are committed together"""
    made_with: dict[str, Any]
    """versions, processor and threads: on others the same teacher may differ in the last bits"""
    accuracy: dict[str, Any]
    """of the teacher on the validation split: n, top1, top5, confidence, largest_class"""
    validation_checksum: str | None = None
    """of the teacher's hard labels of the validation images; `create` adds it"""
    checksum: str | None = None
    """of everything above but the number of views; `text` adds it"""

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        for section, needed in NEEDED.items():
            for name, kinds in needed.items():
                if not isinstance(getattr(self, section).get(name), kinds):
                    raise ValueError(f"{section}.{name}: missing, or no {_KINDS[kinds[-1]]}")
        for count in (self.data["images"], self.teacher["chunk_size"]):
            if count < 1:
                raise ValueError(f"data.images, teacher.chunk_size: {count} is less than one")
        if self.teacher["dtype"] not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"teacher.dtype: {self.teacher['dtype']!r} is unknown: float32, bfloat16 or float16")
        if not self.classes:
            raise ValueError("classes: none")
        return self

    @property
    def images(self) -> int:
        return int(self.data["images"])

    @property
    def teacher_size(self) -> Size | None:
        """(height, width) of the teacher's input; None where the manifest does not tell."""
        preprocessing = self.teacher.get("preprocessing")
        size = preprocessing.get("image_size") if isinstance(preprocessing, dict) else None
        if (
            not isinstance(size, list | tuple)
            or len(size) != 2
            or any(type(side) is not int or side < 1 for side in size)
        ):
            return None
        return size[0], size[1]

    @property
    def record_bytes(self) -> int:
        return record_type(self.outputs, len(self.classes), self.features).itemsize

    @property
    def chunks(self) -> int:
        """Chunks of one view."""
        return -(-self.images // self.records_per_chunk)

    @property
    def bytes(self) -> int:
        """Size of the records of all views."""
        return self.record_bytes * self.images * self.views

    def span(self, chunk: int) -> tuple[int, int]:
        """Positions of a chunk's records in their view: start, stop."""
        return chunk * self.records_per_chunk, min(self.images, (chunk + 1) * self.records_per_chunk)

    def order(self, view: int) -> NDArray[np.int64]:
        """The images in the order of their positions in `view`: pair by pair."""
        return _layout(self.view.view_seed, view // self.view.repeated_aug, self.images)[0]

    def positions(self, view: int) -> NDArray[np.int64]:
        """The position of each image in `view`."""
        return _layout(self.view.view_seed, view // self.view.repeated_aug, self.images)[1]

    def text(self) -> str:
        """The content of tape.json, its checksum at the end."""
        checksum = _checksum(json.loads(self.model_dump_json()))
        return self.model_copy(update={"checksum": checksum}).model_dump_json(indent=2) + "\n"


@lru_cache(maxsize=4)
def _layout(view_seed: int, group: int, images: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The images by position, and the position of each image."""
    order = mixup.pair_order(view_seed, group, images).ravel()[:images]
    positions = np.empty(images, np.int64)
    positions[order] = np.arange(images)
    return order, positions


def _checksum(content: dict[str, Any]) -> str:
    """Of `content` as it stands in the file, so that a version with more or other fields finds the same."""
    decisive = {name: value for name, value in content.items() if name not in NOT_IN_CHECKSUM}
    return _digest(json.dumps(decisive, sort_keys=True).encode()).hex()


def _labels_checksum(labels_N: torch.Tensor) -> str:
    return _digest(np.ascontiguousarray(labels_N.cpu().numpy(), "<i8").tobytes()).hex()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def is_tape(path: Path) -> bool:
    return (path / "tape.json").is_file()


def read_manifest(path: Path) -> Manifest:
    """The manifest of the tape at `path`. Raises UserError, also where tape.json was modified, or where this program makes other pixels
    of the same draws."""
    file = path / "tape.json"
    if file.exists() and not file.is_file():
        raise UserError(f"{path}: no tape here: tape.json is no regular file")
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: no tape here: tape.json: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from error
    view_format = content.get("view_format") if isinstance(content, dict) else None
    if isinstance(view_format, int) and view_format != VIEW_FORMAT:  # its other keys may be those of an older version
        raise UserError(f"{path}: its views have format {view_format}, this program makes {VIEW_FORMAT}: {AGAIN}")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{file}: {explain(Manifest, error)}") from error
    if manifest.checksum != _checksum(content):
        raise UserError(f"{file}: checksum mismatch: tape.json was modified after recording: {AGAIN}")
    return manifest


def settings_of(path: Path) -> dict[str, Any]:
    """The settings that a run from this tape inherits: views, at any size, and split. Raises UserError."""
    manifest = read_manifest(path)
    return {"view": manifest.view.model_dump(exclude={"views", "view_size"}), "data": manifest.data["settings"]}


# ------------------------------------------------------------------------------------------------ the files


@final
class Tape:
    """An opened tape: `create` makes one, `open_tape` opens one."""

    def __init__(self, path: Path, manifest: Manifest, *, writable: bool, lock: Lock | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.record_type = record_type(manifest.outputs, len(manifest.classes), manifest.features)
        flags = os.O_RDWR if writable else os.O_RDONLY
        self._files = contextlib.ExitStack()
        weakref.finalize(self, self._files.close)
        self._lock = lock  # is released when nobody refers to it
        if lock is not None:
            self._files.callback(lock.release)
        try:
            self._records_file = os.open(path / "records.bin", flags)
            self._files.callback(os.close, self._records_file)
            self._digests_file = os.open(path / "digests.bin", flags)
            self._files.callback(os.close, self._digests_file)
        except OSError as error:
            raise UserError(f"{path}: the tape cannot be opened: {error.strerror}") from error
        if writable:  # sparse: takes room only where something was recorded
            with _writing(path):
                os.ftruncate(self._records_file, manifest.bytes)
                os.ftruncate(self._digests_file, manifest.views * manifest.chunks * DIGEST_BYTES)
        elif os.fstat(self._records_file).st_size < manifest.bytes:
            raise UserError(f"{path}: damaged: records.bin is shorter than tape.json says: {AGAIN}")
        self._checked = np.zeros((manifest.views, manifest.chunks), bool)
        shape = (manifest.views, manifest.images)
        self._records: Records = np.memmap(path / "records.bin", self.record_type, "r", shape=shape)

    def close(self) -> None:
        """Close the files and release the lock. May be called again."""
        self._files.close()

    def complete(self) -> NDArray[np.bool_]:
        """Which chunks are recorded, shape (views, chunks)."""
        complete_VC: NDArray[np.bool_] = self._digests() != 0
        return complete_VC

    def complete_views(self) -> int:
        """How many views are recorded whole, counted from the first."""
        whole_V: NDArray[np.bool_] = np.all(self.complete(), axis=1)
        return int(np.cumprod(whole_V).sum())

    def positions(self, view_B: NDArray[np.int64], index_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions of these images, each in its view."""
        position_B = np.empty_like(index_B)
        for view in np.unique(view_B):
            chosen = view_B == view
            position_B[chosen] = self.manifest.positions(int(view))[index_B[chosen]]
        return position_B

    def records(self, view_B: NDArray[np.int64], index_B: NDArray[np.int64]) -> Records:
        """The records of these images in these views. Raises UserError for a chunk that is damaged or incomplete; each chunk is
        compared with its checksum once."""
        position_B = self.positions(view_B, index_B)
        chunk_B = position_B // self.manifest.records_per_chunk
        new_B = ~self._checked[view_B, chunk_B]
        for view, chunk in sorted(set(zip(view_B[new_B].tolist(), chunk_B[new_B].tolist(), strict=True))):
            committed = os.pread(self._digests_file, DIGEST_BYTES, self._digest_offset(view, chunk))
            if committed == bytes(DIGEST_BYTES):
                raise UserError(f"{self.path}: view {view} is not recorded whole: continue with deit tape record")
            if committed != self.digest(view, chunk):
                raise UserError(f"{self.path}: damaged: checksum mismatch in view {view}, chunk {chunk}: {AGAIN}")
            self._checked[view, chunk] = True
        return self._records[view_B, position_B]

    def outputs(
        self, view_B: NDArray[np.int64], index_B: NDArray[np.int64], device: torch.device | str = "cpu"
    ) -> TeacherOutput:
        """`records`, decoded."""
        return decode(self.records(view_B, index_B), len(self.manifest.classes), device)

    def write(self, view: int, position: int, records: Records) -> None:
        """Write records at consecutive positions. Nobody reads them before `commit`. Raises UserError when the disk is full."""
        offset = (view * self.manifest.images + position) * self.record_type.itemsize
        with _writing(self.path):
            _write(self._records_file, np.ascontiguousarray(records).tobytes(), offset)

    def commit(self, view: int, chunks: list[int]) -> None:
        """Declare chunks complete: all their records have been written, by this process or others. Raises UserError when the disk
        is full."""
        if not chunks:
            return
        with _writing(self.path):
            os.fsync(self._records_file)
            for chunk in chunks:
                _write(self._digests_file, self.digest(view, chunk), self._digest_offset(view, chunk))
            os.fsync(self._digests_file)

    def digest(self, view: int, chunk: int) -> bytes:
        """The checksum of a chunk as it lies on the disk now."""
        start, stop = self.manifest.span(chunk)
        offset = (view * self.manifest.images + start) * self.record_type.itemsize
        return _digest(os.pread(self._records_file, (stop - start) * self.record_type.itemsize, offset))

    def damaged(self) -> list[tuple[int, int]]:
        """(view, chunk) of every complete chunk whose checksum does not match."""
        digests = self._digests()
        where = np.argwhere(digests != 0)
        return [(int(v), int(c)) for v, c in where if digests[v, c].tobytes() != self.digest(int(v), int(c))]

    def code(self) -> FeatureCode | None:
        """How the recorded features are encoded; None if there are none. Raises UserError."""
        return load_code(self.path, self.manifest.feature_checksum) if self.manifest.features else None

    def validation_labels(self) -> torch.Tensor:
        """The teacher's hard labels of the validation images, in their order. Raises UserError."""
        path = self.path / "validation.safetensors"
        try:
            labels_N = load_file(path)["labels"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if self.manifest.validation_checksum != _labels_checksum(labels_N):
            raise UserError(f"{path}: damaged: checksum mismatch of the hard labels: {AGAIN}")
        return labels_N

    def missing_bytes(self) -> int:
        """Disk space that the records will still take."""
        return max(0, self.manifest.bytes - 512 * os.fstat(self._records_file).st_blocks)

    def _digest_offset(self, view: int, chunk: int) -> int:
        return (view * self.manifest.chunks + chunk) * DIGEST_BYTES

    def _digests(self) -> NDArray[np.uint64]:
        size = self.manifest.views * self.manifest.chunks * DIGEST_BYTES
        content = os.pread(self._digests_file, size, 0).ljust(size, b"\0")
        return np.frombuffer(content, "<u8").reshape(self.manifest.views, self.manifest.chunks)


def open_tape(path: Path, *, writable: bool = False) -> Tape:
    """A tape that exists. Raises UserError."""
    return Tape(path, read_manifest(path), writable=writable)


def create(path: Path, manifest: Manifest, validation_labels: torch.Tensor, code: FeatureCode | None = None) -> Tape:
    """A new tape for writing, or the one at `path` if it was begun with the same manifest, perhaps with fewer views; it is locked
    until it is closed. `code`: of the features that are recorded. Raises UserError, before anything is written, where the tape or the
    folder is another."""
    manifest = manifest.model_copy(update={"validation_checksum": _labels_checksum(validation_labels)})
    _continued(path, manifest)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = Lock(path)
        manifest = _continued(path, manifest)  # another recording may have begun since
        if not is_tape(path):
            if code is not None:
                code.save(path)
            # The first of the others: a folder without a manifest is no tape, and a recording killed here could not continue.
            write_atomically(path / "tape.json", manifest.text())
        for name in ("records.bin", "digests.bin"):
            (path / name).touch()
        tape = Tape(path, manifest, writable=True, lock=lock)
        # After the files, which may be longer than the manifest of a tape that gets more views says, but not shorter.
        write_atomically(path / "tape.json", manifest.text())
        save_tensors({"labels": validation_labels}, path / "validation.safetensors")
    except BlockingIOError as error:
        raise UserError(f"{path}: another process is recording this tape: wait, or give another folder") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    return tape


def _continued(path: Path, manifest: Manifest) -> Manifest:
    """`manifest`, with what a tape at `path` has already. Raises UserError where another tape is there, or no room."""
    if is_tape(path):
        found = read_manifest(path)
        refuse_difference(path, found, manifest)
        elsewhere = {} if found.made_with == manifest.made_with else {"continued_with": manifest.made_with}
        kept = {"records_per_chunk": found.records_per_chunk, "made_with": {**found.made_with, **elsewhere}}
        manifest = manifest.model_copy(update={**kept, "views": max(found.views, manifest.views)})
    elif is_filled(path) and [one.name for one in path.iterdir()] != [CODE_FILE]:
        refuse_other_folder(path, manifest.outputs)
    there = path / "records.bin"
    room = free_bytes(path) + (512 * there.stat().st_blocks if there.is_file() else 0)
    if manifest.bytes > room:
        raise UserError(
            f"{path}: {manifest.views} views take {file_size(manifest.bytes)}, {file_size(room)} are free: "
            f"record fewer views, or free some space"
        )
    return manifest


def free_bytes(path: Path) -> int:
    """On the disk where `path` is, or will be."""
    folder = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns the disk's errors into one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        why = "the disk is full" if full else f"cannot be written: {error.strerror}"
        action = "free some space" if full else "fix the cause"
        raise UserError(
            f"{path}: {why}: recorded chunks are intact; {action} and run the same command again"
        ) from error


def _write(file: int, content: bytes, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(file, content[done:], offset + done)


# ---------------------------------------------------------------------------- refusals: what must be the same


def refuse_difference(path: Path, tape: Manifest, wanted: Manifest) -> None:
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
    _refuse_other_outputs(path, tape, wanted.outputs)
    if (tape.features, tape.feature_checksum) != (wanted.features, wanted.feature_checksum):
        held = f"{tape.features} numbers of the features a view" if tape.features else "no features"
        asked = f"{wanted.features} in another code" if wanted.features else "none"
        raise UserError(f"{path}: holds {held}, not {asked}: give another folder")


def _refuse_other_outputs(path: Path, tape: Manifest, outputs: OutputKind) -> None:
    if tape.outputs != outputs:
        held, asked = describe_outputs(tape.outputs), describe_outputs(outputs)
        raise UserError(f"{path}: holds {held}, not {asked}: give another folder")


def refuse_other_data(path: Path, tape: Manifest, data: dict[str, Any]) -> None:
    """Raises UserError where the tape was recorded from other images, or another split of them."""
    same_images = all(tape.data[name] == data[name] for name in ("train", "validation"))
    if tape.data["name"] != data["name"] and not same_images:
        was, now = tape.data["name"], data["name"]
        raise UserError(f"{path}: is a tape of {was}, not of {now}: give the tape's data, or record another tape")
    for name in ("images", "train", "validation"):
        if tape.data[name] != data[name]:
            detail = f" ({tape.data['images']} training images, here {data['images']})" if name == "images" else ""
            which = "validation" if name == "validation" else "training"
            raise UserError(
                f"{path}: was recorded from other {which} images than {data['name']} has{detail}: "
                f"record a tape of these data, or give the settings of its split"
            )


def refuse_other_views(path: Path, tape: Manifest, view: ViewConfig) -> None:
    """Raises UserError naming the first setting in which the recorded views differ."""
    was, now = tape.view.model_dump(), view.model_dump()
    for name in was:
        if name not in NAMES_ONLY and was[name] != now[name]:
            raise UserError(f"{path}: was recorded with {name} = {was[name]}, not {now[name]}: views must be the same")


def refuse_other_folder(path: Path, outputs: OutputKind | None) -> None:
    """Raises UserError unless `path` is free, or a tape of such outputs (None: any)."""
    if is_tape(path):
        if outputs is not None:
            _refuse_other_outputs(path, read_manifest(path), outputs)
    elif is_filled(path):
        raise UserError(f"{path}: already exists and is no tape: give another folder")
