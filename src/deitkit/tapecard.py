"""The card of a tape, `tape.json`: what the recorded answers depend on, and in what another recording must not differ."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError, model_validator

from deitkit import mixing
from deitkit.config import Config, PositiveInt, Size, ViewConfig
from deitkit.errors import UserError
from deitkit.records import AnswerKind, record_type
from deitkit.settings import explain

DIGEST_BYTES = 8
AGAIN = "remove the folder and record the tape again"
VIEW_FORMAT = 2
"""Goes up whenever the same draws give other pixels: what was recorded of the old views is then refused."""
NAMES_ONLY = {"augment", "views"}
"""Fields of a view recipe that do not change what a view looks like."""
UNSEALED = {"seal", "views"}
"""Fields that a card's seal says nothing about: views are added to a tape, and decide nothing about what is there."""
NEEDED: dict[str, dict[str, tuple[type, ...]]] = {
    "teacher": {"name": (str,), "state": (str,), "slice_size": (int,), "dtype": (str,)},
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
        for count in (self.data["images"], self.teacher["slice_size"]):
            if count < 1:
                raise ValueError(f"data.images, teacher.slice_size: {count} is less than one")
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
        return _order(self.view.view_seed, view // self.view.repeats, self.images)

    def ranks(self, view: int) -> NDArray[np.int64]:
        """The slot of each image in `view`."""
        return _ranks(self.view.view_seed, view // self.view.repeats, self.images)

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
    return mixing.pair_order(view_seed, group, images).ravel()[:images]


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
