"""A student taught, from its configuration to `summary.json`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from deitkit.config import ModelCard, RunConfig
from deitkit.data import Dataset, refuse_among_images
from deitkit.device import default_device, settled
from deitkit.errors import UserError
from deitkit.evaluation import evaluated_side, warn_of_reduced
from deitkit.feed import views_shown
from deitkit.fitting import fit_automatically
from deitkit.preparing import preprocessing_of_student, student_trainer
from deitkit.progress import Progress
from deitkit.resolve import load, refuse_lost_temperature, resolve, say_unlabelled, student_architecture, with_teacher
from deitkit.resuming import as_begun
from deitkit.run import RunFolder
from deitkit.stages import begin, calibrated, finish, finished_before, planned, with_fitting_batch
from deitkit.starting import find_start, keep
from deitkit.tape import open_tape, refuse_other_folder
from deitkit.tapecard import is_tape
from deitkit.teacher import ANOTHER_TEACHER, Teacher
from deitkit.teaching import Teaching, recorded_answers, tape_of, taped, taught_by_tape, taught_live, with_views_of_tape
from deitkit.training import make_accelerator

AFTER_AUTO = "more images of each class help, or give a teacher that knows these classes, or --distillation none"


def run_training(
    location: str, config: RunConfig, out: Path, *, resume: bool, progress: Progress, teacher: Teacher | None = None,
    dataset: Dataset | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Teach a student; `teacher` is one that cannot be loaded by its name, `dataset` the images at `location` where they are
    open already. Returns what `summary.json` says.

    Raises UserError."""
    with RunFolder(out) as folder:
        return _train(location, config, folder, resume=resume, progress=progress, given=teacher, dataset=dataset)


def _train(
    location: str,
    config: RunConfig,
    folder: RunFolder,
    *,
    resume: bool,
    progress: Progress,
    given: Teacher | None = None,
    dataset: Dataset | None = None,
) -> dict[str, Any]:
    started = time.perf_counter()
    before = folder.config(RunConfig) if resume else None
    if before is None:
        folder.refuse_existing()
    refuse_among_images(location, folder.path)
    if config.teacher.record is not None:
        _refuse_within(Path(config.teacher.record), folder)
        refuse_among_images(location, Path(config.teacher.record))
        refuse_other_folder(Path(config.teacher.record), config.teacher.answers)
    if dataset is None:
        dataset = load(location, config.data, progress)
    if resume:
        folder.refuse_other_data(dataset.outline())
    config = with_fitting_batch(as_begun(config, before), dataset, progress)
    # before the tape's views are held against the data
    tape = None if config.teacher.tape is None else tape_of(config, dataset)
    say_unlabelled(dataset, progress)
    asked = config.loss
    start = find_start(config.student, folder.path if resume else None)
    config = resolve(config, dataset, location, start and start.facts)
    refuse_lost_temperature(asked, config.loss)
    if config.teacher.teacher is not None:
        config = with_teacher(config, teacher_precision=settled(config.teacher.teacher_precision, default_device()))
    if config.teacher.record is not None:
        refuse_other_folder(Path(config.teacher.record), recorded_answers(config))
    if before is not None and config.teacher.teacher_slice is None:
        config = with_teacher(config, teacher_slice=before.teacher.teacher_slice)
    if tape is not None:
        config = with_views_of_tape(config, tape, before.view.views if before else None)
    if resume and folder.finished:
        summary = finished_before(folder, config, progress)
        _finish_tape(folder.config(RunConfig), dataset, given, progress)
        return summary
    architecture = student_architecture(config, dataset, start and start.facts)
    preprocessing = preprocessing_of_student(config, architecture, start and start.facts)
    warn_of_reduced(dataset, preprocessing, "the student", progress.warn)
    advice = ANOTHER_TEACHER
    if config.teacher.teacher == "auto":
        advice = AFTER_AUTO
        fitted = _fitted_before(before) or fit_automatically(location, dataset, config, folder.path, progress)
        config = with_teacher(config, teacher=str(fitted))
    accelerator = make_accelerator(config.loop)
    teaching, teacher = Teaching(), None
    if tape is not None:
        teaching = taught_by_tape(config, tape, progress)
    elif config.teacher.teacher is not None:
        teaching, teacher = taught_live(config, dataset, accelerator.device, progress, advice, given)
        config = with_teacher(config, teacher_slice=teacher.slice_size)
        if evaluated_side(teacher.preprocessing) > evaluated_side(preprocessing):
            warn_of_reduced(dataset, teacher.preprocessing, f"teacher {teacher.name}", progress.warn)
    elif asked.distillation is None:
        progress.say("no teacher: learning from the labels alone (--teacher auto fits one first)")
    trainer = student_trainer(config, architecture, dataset, folder, progress, accelerator, teaching, start)
    config = planned(trainer, config, folder, resume=resume)
    if config.teacher.record is not None and teacher is not None:  # before the run's folder: a tape may be refused
        steps = trainer.plan.total_steps
        teaching = taped(teaching, teacher, config, dataset, accelerator, steps, progress)
        trainer.teacher, trainer.on_epoch = teaching.source, teaching.on_epoch
    begin(trainer, config, folder, dataset, resume=resume)
    if start is not None and accelerator.is_main_process:
        keep(start, folder.path)
    trained = trainer.train(resume=resume)
    head_scales = calibrated(trainer, trained) if config.student.calibrate else ()
    card = ModelCard(
        name=config.student.student or (start.facts.name if start else ""),
        architecture=architecture,
        classes=dataset.classes,
        preprocessing=trained.preprocessing,
        weights="ema" if config.optim.ema_decay > 0 else "last",
        dataset=dataset.name,
        head_scales=head_scales,
    )
    summary = finish(
        trainer,
        trained,
        card,
        teaching.facts,
        config.data,
        time.perf_counter() - started,
        dataset.has_test,
    )
    teaching.finish()  # last: nothing that goes wrong with a tape may cost the training
    return summary


def _refuse_within(tape: Path, folder: RunFolder) -> None:
    """Raises UserError where a tape would lie in the folder of its run: it is begun before the run, and whatever lies there
    keeps a run from being begun."""
    if tape.resolve().is_relative_to(folder.path.resolve()):
        raise UserError(f"--record {tape}: lies in the folder of the run, {folder.path}: give it one of its own")


def _finish_tape(config: RunConfig, dataset: Dataset, given: Teacher | None, progress: Progress) -> None:
    """Record what the training with these settings, which is over, left open of its tape; a warning where that cannot be."""
    path, steps = Path(config.teacher.record or ""), config.loop.steps
    if config.teacher.record is None or steps is None or not is_tape(path):
        return
    try:
        views = views_shown(steps, -(-len(dataset.open_split("train")) // config.loop.batch_size), config.view)
        if open_tape(path).complete_views() >= views:
            return
        accelerator = make_accelerator(config.loop)
        teaching, teacher = taught_live(config, dataset, accelerator.device, progress, ANOTHER_TEACHER, given)
        taped(teaching, teacher, config, dataset, accelerator, steps, progress).finish()
    except UserError as error:
        progress.warn(f"the training is done, its tape is not complete: {error}")


def _fitted_before(before: RunConfig | None) -> Path | None:
    """The teacher that `auto` stood for when a run was begun: that of another version may be another one."""
    teacher = None if before is None else before.teacher.teacher
    return Path(teacher) if teacher is not None and RunFolder(Path(teacher)).finished else None
