"""Who teaches a run: nobody, a live teacher, a tape in its place, or a live teacher whose answers are being taped."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from deitkit.config import RunConfig
from deitkit.data import Dataset
from deitkit.distill.record import RecordingTeacher, data_facts, make_manifest, record, replay
from deitkit.distill.tape import OutputKind, Tape, create, open_tape, refuse_other_data, refuse_other_views
from deitkit.distill.teacher import (
    ANOTHER_TEACHER,
    Teacher,
    TeacherSource,
    accuracy_line,
    doubt_about,
    live_teacher,
    load_teacher,
    match_classes,
    no_teacher,
    refuse_useless,
    teacher_facts,
)
from deitkit.terminal import Progress, UserError, file_size, plural
from deitkit.training.evaluate import check_classes, split_logits_of_teacher
from deitkit.views.loader import Rows, views_shown

TAPED = " (taped)"
LEARNED = 0.995
"""A teacher from elsewhere that is right on so many of the validation images may have been trained on them."""


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """A source of answers, and what is known of the one who gives them."""

    source: TeacherSource = no_teacher
    name: str | None = None
    validation_N: torch.Tensor | None = None
    """decisions on the validation images, -1 where one could not be read"""
    accuracy: dict[str, Any] | None = None
    """n, top1, top5, confidence on the validation images"""
    on_epoch: Callable[[Rows, set[int]], None] = lambda _rows, _unreadable: None
    finish: Callable[[], None] = lambda: None
    """called once the training is over"""

    @property
    def facts(self) -> dict[str, Any] | None:
        """What a summary says of it."""
        return None if self.accuracy is None else {"name": self.name, "top1": self.accuracy["top1"]}


def checked_teacher(
    config: RunConfig,
    dataset: Dataset,
    device: torch.device,
    progress: Progress,
    advice: str = ANOTHER_TEACHER,
    given: Teacher | None = None,
) -> tuple[Teacher, torch.Tensor, dict[str, Any]]:
    """The `given` teacher, or the one that `config` names; its decisions on the validation images, and its accuracy there.

    Shows how good it is. Raises UserError for one that cannot teach; `advice` is what such a message ends with."""
    assert config.teacher.teacher is not None
    teacher = given or load_teacher(
        config.teacher.teacher,
        dataset.classes,
        chunk_size=config.teacher.teacher_chunk_size,
        device=device,
        precision=config.teacher.teacher_precision,
        image_size=config.teacher.size,
    )
    if given is not None:
        given.to(device)
        if match_classes(given.name, given.classes, given.num_classes, dataset.classes) is not None:
            raise UserError(f"teacher {given.name}: knows the data's classes in another order: {dataset.classes}")
    answers = split_logits_of_teacher(teacher, dataset.open_split("val"), device, config.loop.workers)
    facts = teacher_facts(teacher, answers.heads.cls_BK, answers.labels_N)
    refuse_useless(facts, advice)
    doubt = doubt_about(facts)
    if doubt:
        progress.warn(doubt)
    say_accuracy(teacher.name, facts, teacher.dtype, progress)
    accuracy = {name: facts[name] for name in ("n", "top1", "top5", "confidence", "largest_class")}
    return teacher, answers.decisions_A, accuracy


def taught_live(
    config: RunConfig,
    dataset: Dataset,
    device: torch.device,
    progress: Progress,
    advice: str,
    given: Teacher | None = None,
) -> tuple[Teaching, Teacher]:
    """A live teacher that is asked about every batch."""
    teacher, validation_N, accuracy = checked_teacher(config, dataset, device, progress, advice, given)
    source = live_teacher(teacher, logits=config.loss.needs_logits)
    return Teaching(source=source, name=teacher.name, validation_N=validation_N, accuracy=accuracy), teacher


def taught_by_tape(config: RunConfig, tape: Tape, progress: Progress) -> Teaching:
    """A tape in the teacher's place."""
    name = tape.manifest.teacher["name"] + TAPED
    say_accuracy(name, tape.manifest.accuracy, tape.manifest.teacher["dtype"], progress)
    complete = tape.complete_views()
    if complete < tape.manifest.views:
        progress.warn(
            f"{tape.path}: {complete} of {tape.manifest.views} views are recorded: go on with deit tape record"
        )
    progress.say(f"epochs go round {plural(config.view.views or complete, 'view')} of the tape")
    return Teaching(
        source=replay(tape), name=name, validation_N=tape.validation_labels(), accuracy=tape.manifest.accuracy
    )


def tape_of(config: RunConfig, dataset: Dataset) -> Tape:
    """The tape that `config` names. Raises UserError where it is of other data, or holds too little for the loss."""
    assert config.teacher.tape is not None
    tape = open_tape(Path(config.teacher.tape))
    refuse_other_data(tape.path, tape.manifest, data_facts(dataset, config.data.split_settings()))
    check_classes(dataset, tape.manifest.classes, str(tape.path))
    missing = config.loss.unsupported(tape.manifest.outputs)
    if missing is not None:
        raise UserError(f"{tape.path}: holds {missing}: record with --outputs all")
    return tape


def with_views_of_tape(config: RunConfig, tape: Tape, views_before: int | None) -> RunConfig:
    """`config` going round the views that are on the tape. `views_before`: how many a resumed run began with.

    Raises UserError where the views are not those that were recorded, or fewer are there than are asked for."""
    refuse_other_views(tape.path, tape.manifest, config.view)
    there = tape.complete_views() // config.view.repeated_aug * config.view.repeated_aug
    views = views_before or config.view.views or there
    if not 0 < views <= there:
        raise UserError(
            f"{tape.path}: {there} of {tape.manifest.views} views are recorded, {max(1, views)} are needed: "
            f"go on with deit tape record"
        )
    return config.model_copy(update={"view": config.view.model_copy(update={"views": views})})


def taped(
    teaching: Teaching, teacher: Teacher, config: RunConfig, dataset: Dataset, accelerator: Accelerator,
    total_steps: int, progress: Progress,
) -> Teaching:  # fmt: skip
    """`teaching` with every answer written to `config.teacher.record`. Raises UserError."""
    assert config.teacher.record is not None
    assert teaching.validation_N is not None
    assert teaching.accuracy is not None
    split = dataset.open_split("train")
    views = views_shown(total_steps, math.ceil(len(split) / config.loop.batch_size), config.view)
    data = data_facts(dataset, config.data.split_settings())
    manifest = make_manifest(
        teacher, data, dataset.classes, config.view, needed_answers(config), views, teaching.accuracy
    )
    path = Path(config.teacher.record)
    tape = None
    if accelerator.is_main_process:  # it keeps other recordings away, for all processes of this one
        tape = create(path, manifest, teaching.validation_N)
        progress.say(f"recording {recording_size(manifest.views, manifest.images, manifest.bytes)} to {path}")
    accelerator.wait_for_everyone()
    tape = tape or open_tape(path, writable=True)
    recording = RecordingTeacher(tape, teacher)

    def on_epoch(rows: Rows, unreadable: set[int]) -> None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            recording.end_epoch(rows, unreadable)
        accelerator.wait_for_everyone()
        recording.refresh()  # what is committed now may be shown again, to any process

    def finish() -> None:
        if not accelerator.is_main_process:
            return
        try:  # what a kill or a part of an epoch left open
            record(tape, split, teacher, progress, workers=config.loop.workers, views=views)
        except UserError as error:
            progress.warn(f"the training is done, its tape is not complete: {error}")
        else:
            progress.say(f"the tape is complete: the next training is free of the teacher with --tape {path}")
        finally:
            tape.close()

    return replace(teaching, source=recording, on_epoch=on_epoch, finish=finish)


def needed_answers(config: RunConfig) -> OutputKind:
    """The least that this loss can be taught with."""
    return "all" if config.loss.needs_logits else "hard"


def recording_size(views: int, images: int, size: int) -> str:
    return f"answers to {plural(views, 'view')} of {plural(images, 'image')}: {file_size(size)}"


def say_accuracy(name: str, facts: dict[str, Any], precision: str, progress: Progress) -> None:
    progress.say(accuracy_line(name, {**facts, "dtype": precision}))
    whole = name.removesuffix(TAPED)  # as it was called: of a tape's teacher nothing else may be left
    fitted = (Path(whole) / "model").is_dir() or all((Path(one) / "model").is_dir() for one in whole.split("+"))
    if facts["top1"] >= LEARNED and not fitted:
        progress.say("if it was trained on these images, it knows less of others than that")
