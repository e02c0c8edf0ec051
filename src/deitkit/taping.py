"""What `deit tape record`, `verify` and `info` do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from deitkit.config import DataConfig, RunConfig
from deitkit.data import refuse_among_images
from deitkit.device import default_device
from deitkit.errors import UserError
from deitkit.evaluation import warn_of_reduced
from deitkit.fitting import fit_automatically
from deitkit.progress import Progress, file_size
from deitkit.recording import data_facts, make_card, record, verify
from deitkit.records import AnswerKind
from deitkit.resolve import load, resolve, say_unlabelled, with_teacher
from deitkit.settings import validated
from deitkit.tape import create, free_bytes, open_tape, refuse_other_folder
from deitkit.tapecard import is_tape, read_card, refuse_other_data, refuse_other_format
from deitkit.teacher import load_teacher
from deitkit.teaching import checked_teacher, recording_size

MOST_RECORDED_CLASSES = 100
"""Of so many classes all logits are recorded where nobody says what is to be: at 1000 they would take a thousand times the space
of a decision."""


def run_record(
    location: str, config: RunConfig, out: Path, *, views: int, answers: AnswerKind | None, progress: Progress
) -> dict[str, Any]:
    """Record `views` views of the training images, or what is missing of them; `answers` as many as are usual for so many
    classes, or as the tape has them, if not given. Returns `tape_info`, with the `seconds` that
    the recording itself took, the teacher's check aside. Raises UserError."""
    refuse_among_images(location, out)
    if answers is None and is_tape(out):
        answers = read_card(out).answers
    refuse_other_folder(out, answers)
    dataset = load(location, config.data, progress)
    say_unlabelled(dataset, progress)
    if answers is None:
        answers = "all" if len(dataset.classes) <= MOST_RECORDED_CLASSES else "hard"
    config = resolve(config, dataset, location)
    if config.teacher.teacher == "auto":
        fitted = fit_automatically(location, dataset, config, out, progress)
        config = with_teacher(config, teacher=str(fitted))
    if views % config.view.repeats:
        raise UserError(f"--views {views}: not a multiple of --repeats {config.view.repeats}")
    teacher, validation_N, accuracy = checked_teacher(config, dataset, default_device(), progress)
    warn_of_reduced(dataset, teacher.preprocessing, f"teacher {teacher.name}", progress.warn)
    data = data_facts(dataset, config.data.split_settings())
    card = make_card(teacher, data, dataset.classes, config.view, answers, views, accuracy)
    free = free_bytes(out)
    progress.say(
        f"recording {recording_size(card.views, card.images, card.bytes)}, to {out}; {file_size(free)} are free there"
    )
    tape = create(out, card, validation_N)
    began = time.perf_counter()
    try:
        record(tape, dataset.open_split("train"), teacher, progress, workers=config.loop.workers, views=views)
    finally:
        tape.close()
    return {**tape_info(out), "seconds": time.perf_counter() - began}


def run_verify(
    path: Path, location: str, teacher_name: str, *, samples: int, workers: int, progress: Progress
) -> dict[str, Any]:
    """Hold a tape against itself, its data and its teacher. Returns what was found. Raises UserError."""
    tape = open_tape(path)
    refuse_other_format(path, tape.card)
    settings = validated(DataConfig, tape.card.data["settings"], str(path / "tape.json"))
    dataset = load(location, settings, progress)
    refuse_other_data(path, tape.card, data_facts(dataset, settings.split_settings(), read=True))
    described = tape.card.teacher
    teacher = load_teacher(
        teacher_name,
        dataset.classes,
        slice_size=int(described["slice_size"]),
        device=default_device(),
        precision=described["dtype"],
        image_size=tape.card.teacher_size,
    )
    if teacher.state_hash() != tape.card.teacher["state"]:
        raise UserError(f"{path}: was recorded with another teacher ({tape.card.teacher['name']}) than {teacher.name}")
    return verify(tape, dataset.open_split("train"), teacher, samples=samples, workers=workers)


def tape_info(path: Path) -> dict[str, Any]:
    """What is on a tape; plain values. Raises UserError."""
    tape = open_tape(path)
    card = tape.card
    return {
        "tape": str(path),
        "teacher": card.teacher["name"],
        "teacher_size": card.teacher_size,
        "teacher_top1": card.accuracy["top1"],
        "data": card.data["name"],
        "images": card.images,
        "classes": len(card.classes),
        "answers": card.answers,
        "views": card.views,
        "complete_views": tape.complete_views(),
        "recorded": float(tape.complete().mean()),
        "record_bytes": card.record_bytes,
        "bytes": card.bytes,
        "view": card.view.model_dump(),
        "made_with": card.made_with,
    }
