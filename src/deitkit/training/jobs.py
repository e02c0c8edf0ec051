"""What `deit train` and `deit tape` do, each from its settings to its result.

`run_training` reads in the order of a run: settings, data, weights, teacher, schedule, training, saving. Nothing is written to the run's
folder before all that can be refused has been checked.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from deitkit.config import DataConfig, LossConfig, Preprocessing, RunConfig
from deitkit.data import Dataset, refuse_among_images
from deitkit.distill.encoding import CODE_FILE, FeatureCode, OutputKind, load_code
from deitkit.distill.losses import LossFunction
from deitkit.distill.record import data_facts, tape_info, verify
from deitkit.distill.tape import (
    free_bytes,
    is_tape,
    open_tape,
    read_manifest,
    refuse_other_data,
    refuse_other_folder,
)
from deitkit.distill.teacher import ANOTHER_TEACHER, Teacher, TeacherSource, load_teacher
from deitkit.models.network import Network, autocast_dtype, default_device, resolve_precision
from deitkit.models.start import find_start, save_start
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.zoo import ModelCard, forward_seconds
from deitkit.settings import validated
from deitkit.terminal import Progress, SilentProgress, UserError, file_size, plural, quoted
from deitkit.training.evaluate import evaluated_side, warn_of_reduced
from deitkit.training.fit import expected_costs, fit_automatically
from deitkit.training.job import UNPLANNED_STEPS, Job, finish, finished_before, planned_trainer
from deitkit.training.loop import calibrate_heads, measure_speed
from deitkit.training.probe import is_probed
from deitkit.training.processes import make_accelerator, preserved_global_state
from deitkit.training.run import RunFolder
from deitkit.training.setup import (
    FEW_PHOTOS,
    class_weights,
    load,
    preprocessing_of_student,
    resolve,
    say_unlabelled,
    student_architecture,
    student_network,
    student_plan,
    train_loader,
    with_feature_weight,
    with_init,
)
from deitkit.training.teaching import (
    Teaching,
    checked_teacher,
    needed_outputs,
    record_tape,
    recorded_first,
    recording_size,
    repeats_views,
    replayed,
    tape_manifest,
    tape_of,
    time_needed,
    with_few_views,
    with_views_of_tape,
)

FEW_STEPS = 1000
"""With fewer a student with fresh weights stays far behind a good teacher (3,068 photos: 576 steps 77 %, 1,152 81 %, the teacher 90)."""
AFTER_AUTO = "more images of each class help, or give a teacher that knows these classes, or --distillation none"
MOST_RECORDED_CLASSES = 100
"""For so many classes all logits are recorded by default: at 1000 they would take a thousand times the space of a label."""


# -------------------------------------------------------------------------------------------------- students


def run_training(
    location: str,
    config: RunConfig,
    out: Path,
    *,
    resume: bool,
    progress: Progress,
    teacher: Teacher | None = None,
    dataset: Dataset | None = None,
    loss_function: LossFunction | None = None,
) -> dict[str, Any]:
    """Train a student; `teacher` is one that cannot be loaded by its name, `dataset` the images at `location` if they are open
    already, `loss_function` the distillation loss for `distillation: callable`. Returns the content of `summary.json`.

    Raises UserError."""
    with RunFolder(out) as folder, preserved_global_state():
        job = Job(location=location, folder=folder, resume=resume, progress=progress)
        return _train(job, config, teacher, dataset, loss_function)


def _train(
    job: Job, config: RunConfig, given: Teacher | None, dataset: Dataset | None, function: LossFunction | None
) -> dict[str, Any]:
    if config.loss.distillation == "callable" and function is None:
        raise UserError("distillation: callable: give the loss function to dk.train(distillation=...)")
    progress, silent_about_teacher = job.progress, config.loss.distillation or config.loss.distil == "labels"

    # settings and data
    dataset, config, before = job.open(config, dataset)
    tape = None if config.teacher.tape is None else tape_of(config, dataset)
    say_unlabelled(dataset, progress)
    asked, config = (
        config.student.init,
        with_init(config, dataset),
    )  # `find_start` needs the name, `resolve` what it finds
    if asked is not None and config.student.init is None:
        progress.say(
            f"--init {asked}: {config.student.student} has no pretrained weights in this shape: it starts fresh"
        )
    start = find_start(config.student, job.folder.path if job.resume else None)
    config = _resolve_teacher(resolve(config, dataset, job.location, start and start.facts))
    if tape is not None:
        config = with_views_of_tape(config, tape, before.view.views if before else None)
    if job.resume and job.folder.finished and (summary := finished_before(job, config, dataset)) is not None:
        return summary

    # weights
    architecture = student_architecture(config, dataset, start and start.facts)
    preprocessing = preprocessing_of_student(config, architecture, start and start.facts)
    warn_of_reduced(dataset, preprocessing, "the student", progress.warn)

    # teacher
    advice, time_line = ANOTHER_TEACHER, None
    if config.teacher.teacher == "auto":
        advice = AFTER_AUTO
        if not job.resume and (
            time_line := _time_with_teacher(job.location, config, dataset, architecture, preprocessing)
        ):
            progress.say(time_line)
        fitted = _fitted_before(before) or fit_automatically(job.location, dataset, config, progress)
        config = config.changed(teacher={"teacher": str(fitted)})
        if not job.resume:
            few = len(dataset.open_split("train")) <= FEW_PHOTOS and is_probed(fitted)
            better = ", and with so few images it is likely better than the student" if few else ""
            progress.say(f"the teacher can be used from now on{better}: deit predict {quoted(fitted)} IMAGE...")
    accelerator = make_accelerator(config.loop)
    teaching = Teaching(description="no teacher" if silent_about_teacher else "no teacher (--teacher auto fits one)")
    if tape is not None:
        teaching = replayed(config, tape, progress)
    elif config.teacher.teacher is not None:
        code = _known_code(config, job.folder.path if job.resume else None)
        teaching = checked_teacher(config, dataset, progress, given, advice, accelerator, code)
        assert teaching.teacher is not None
        if before is None:  # a resumed run, perhaps a longer one, goes on as it was started
            config = with_few_views(config, dataset, teaching.teacher.preprocessing.image_size)
        elif config.view.views is None:
            config = config.changed(view={"views": before.view.views})
        if evaluated_side(teaching.teacher.preprocessing) > evaluated_side(preprocessing):
            warn_of_reduced(dataset, teaching.teacher.preprocessing, f"teacher {teaching.name}", progress.warn)
    if config.loss.learns_from_teacher:
        config = with_feature_weight(config, teaching.features, teaching.name or "")
    code = None if teaching.teacher is None else teaching.teacher.code

    # student
    features = teaching.features if config.loss.feature_weight else 0
    network = student_network(config, architecture, dataset, start, progress, features)
    computed_in = autocast_dtype(config.loop.precision, accelerator.device)
    student_seconds = forward_seconds(network.to(accelerator.device), computed_in)
    teacher_seconds = (teaching.costs[1] or 0.0) if teaching.teacher else 0.0
    line = time_needed(config, dataset, student_seconds, teacher_seconds, accelerator.num_processes)
    if line and not job.resume and time_line is None:
        progress.say(line)

    # schedule
    if teaching.teacher is not None and repeats_views(config, dataset):
        teaching = recorded_first(teaching, config, dataset, accelerator, progress)
    plan_of = partial(student_plan, network, architecture, function, class_weights(config.loss.class_weights, dataset))
    trainer, teaching, config = planned_trainer(job, config, network, plan_of, dataset, teaching, accelerator)
    if start is not None and accelerator.is_main_process:
        save_start(start.facts, job.folder.path)
    if code is not None and accelerator.is_main_process:
        code.save(job.folder.path)

    if (line := _few_steps(config, teaching)) and not job.resume:
        progress.say(line)

    # training
    trained = trainer.train(resume=job.resume)
    assert isinstance(trained.body, ViT)
    trained.body.drop_feature_head()
    head_scales = calibrate_heads(trainer, trained) if config.student.calibrate and config.loss.trains_heads else ()

    # saving
    card = ModelCard(
        name=config.student.student or (start.facts.name if start else ""),
        architecture=architecture,
        classes=dataset.classes,
        preprocessing=trained.preprocessing,
        weights="ema" if config.optim.ema_decay > 0 else "last",
        dataset=dataset.name,
        head_scales=head_scales,
    )
    return finish(job, trainer, trained, card, config, teaching, dataset, trainer.trained_steps)


def _time_with_teacher(
    location: str, config: RunConfig, dataset: Dataset, architecture: ViTConfig, preprocessing: Preprocessing
) -> str | None:
    """The line of `time_needed` before an automatic teacher is fitted; None where it is fitted already."""
    device = default_device()
    costs = expected_costs(location, dataset, config, device)
    if costs is None:
        return None
    network = Network(ViT(architecture), preprocessing).to(device)
    seconds = forward_seconds(network, autocast_dtype(config.loop.precision, device))
    config = with_few_views(config, dataset, costs.image_size)
    return time_needed(config, dataset, seconds, costs.per_image, config.loop.processes, costs.fitting)


def _resolve_teacher(config: RunConfig) -> RunConfig:
    """`config` with the teacher's precision. Raises UserError."""
    settings = config.teacher
    if settings.record is not None:
        refuse_other_folder(Path(settings.record), needed_outputs(config))
    if settings.teacher is not None:
        config = config.changed(
            teacher={"teacher_precision": resolve_precision(settings.teacher_precision, default_device())}
        )
    return config


def _few_steps(config: RunConfig, teaching: Teaching) -> str | None:
    """What to say of a training that is too short for fresh weights to come near the teacher."""
    steps, facts = config.loop.steps or 0, teaching.facts
    if facts is None or not config.student.is_fresh or steps >= FEW_STEPS or config.loss.label_weight == 0:
        return None
    return (
        f"{plural(steps, 'step')} are few for fresh weights: expect less than the teacher's {100 * facts['top1']:.1f} %"
    )


def _known_code(config: RunConfig, resumed: Path | None) -> FeatureCode | None:
    """How features are encoded in the run that is resumed, or on the tape that goes on being recorded; None where nothing is known
    yet."""
    tape = Path(config.teacher.record or "")
    if config.teacher.record is not None and is_tape(tape):
        return open_tape(tape).code()
    return load_code(resumed) if resumed is not None and (resumed / CODE_FILE).is_file() else None


def _fitted_before(before: RunConfig | None) -> Path | None:
    """The teacher that `auto` stood for when a run was started: another version of this program may fit another one."""
    teacher = None if before is None else before.teacher.teacher
    return Path(teacher) if teacher is not None and RunFolder(Path(teacher)).finished else None


@preserved_global_state()
def measure_student(config: RunConfig, dataset: Dataset, teacher: TeacherSource) -> tuple[float, float, float]:
    """Seconds to prepare a run with these settings, of a step, and of evaluation per epoch, measured on a student that is thrown away."""
    started = time.perf_counter()
    accelerator, architecture = make_accelerator(config.loop), student_architecture(config, dataset)
    network = student_network(config, architecture, dataset, find_start(config.student), SilentProgress())
    loader = train_loader(config, dataset, accelerator)
    plan = student_plan(network, architecture, None, (), config, UNPLANNED_STEPS, loader.steps_per_epoch)
    prepared = time.perf_counter() - started
    return prepared, *measure_speed(network, plan, loader, dataset.open_split("val"), teacher, accelerator)


# ----------------------------------------------------------------------------------------------------- tapes


@preserved_global_state()
def run_record(
    location: str, config: RunConfig, out: Path, *, views: int, outputs: OutputKind | None, progress: Progress
) -> dict[str, Any]:
    """Record the teacher's outputs for the first `views` views of the training images, or what is missing of them. `outputs`: what of
    them, if not given what the tape has, or what is usual for so many classes. Its features come along, but for a feature_weight of 0,
    or if `outputs` is given (not "features") and no feature_weight. Returns `tape_info`, and the `seconds` of the recording. Raises
    UserError."""
    refuse_among_images(location, out)
    code = open_tape(out).code() if is_tape(out) else None
    logits_alone = outputs is not None or (is_tape(out) and code is None)
    if outputs is None and is_tape(out):
        outputs = read_manifest(out).outputs
    loss = config.loss
    if outputs == "features":
        loss = LossConfig(distillation="features")
    elif logits_alone:
        loss = loss.model_copy(update={"feature_weight": loss.feature_weight or 0.0})
    refuse_other_folder(out, outputs)
    dataset = load(location, config.data, progress)
    say_unlabelled(dataset, progress)
    outputs = outputs or ("all" if len(dataset.classes) <= MOST_RECORDED_CLASSES else "hard")
    config = resolve(config.model_copy(update={"loss": loss}), dataset, location)
    if config.teacher.teacher == "auto":
        config = config.changed(teacher={"teacher": str(fit_automatically(location, dataset, config, progress))})
    if views % config.view.repeated_aug:
        raise UserError(f"--views {views}: not a multiple of --repeated-aug {config.view.repeated_aug}")
    accelerator = make_accelerator(config.loop)
    teaching = checked_teacher(
        config.changed(teacher={"record": str(out)}), dataset, progress, accelerator=accelerator, code=code
    )
    assert teaching.teacher is not None
    warn_of_reduced(dataset, teaching.teacher.preprocessing, f"teacher {teaching.name}", progress.warn)
    manifest = tape_manifest(teaching, config, dataset, outputs, views)
    size = recording_size(manifest.views, manifest.images, manifest.bytes)
    progress.say(f"recording the teacher's outputs for {size}, to {out}; {file_size(free_bytes(out))} are free there")
    began = time.perf_counter()
    record_tape(out, manifest, teaching, config, dataset, accelerator, progress)
    return {**tape_info(out), "seconds": time.perf_counter() - began}


def run_verify(
    path: Path, location: str, teacher_name: str, *, samples: int, workers: int, progress: Progress
) -> dict[str, Any]:
    """Verify a tape: its checksums, data and teacher, and `samples` outputs computed again. Returns the counts. Raises UserError."""
    tape = open_tape(path)
    settings = validated(DataConfig, tape.manifest.data["settings"], str(path / "tape.json"))
    dataset = load(location, settings, progress)
    refuse_other_data(path, tape.manifest, data_facts(dataset, settings.split_settings(), read=True))
    described = tape.manifest.teacher
    teacher = load_teacher(
        teacher_name,
        dataset.classes,
        chunk_size=int(described["chunk_size"]),
        device=default_device(),
        precision=described["dtype"],
        image_size=tape.manifest.teacher_size,
        features_only=tape.manifest.outputs == "features",
    )
    if teacher.state_hash() != described["state"]:
        raise UserError(f"{path}: was recorded with another teacher ({described['name']}) than {teacher.name}")
    if teacher.describe()["layout"] != described["layout"]:
        raise UserError(
            f"{path}: its teacher computed with batch norms of their own, now they are folded: record it again"
        )
    code = tape.code()
    teacher.code = None if code is None else code.to(teacher.device)
    return verify(tape, dataset.open_split("train"), teacher, samples=samples, workers=workers)
