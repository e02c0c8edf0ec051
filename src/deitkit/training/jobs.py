"""What `deit train`, `deit teacher fit` and `deit tape` do, each from its settings to its result.

`run_training` and `run_fit` read in the order of a run: settings, data, weights, teacher, schedule, training, saving. Nothing is written
to the run's folder before all that can be refused has been checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from deitkit.config import DataConfig, FitConfig, JobConfig, JobT, LossConfig, RunConfig
from deitkit.data import Dataset, load_data, refuse_among_images
from deitkit.data import dataset as data
from deitkit.data.dataset import NO_LABEL, is_small
from deitkit.distill.encoding import CODE_FILE, FeatureCode, OutputKind, load_code
from deitkit.distill.losses import LossFunction
from deitkit.distill.optim import warmup_steps
from deitkit.distill.record import data_facts, make_manifest, record, tape_info, verify
from deitkit.distill.step import Plan
from deitkit.distill.tape import (
    create,
    free_bytes,
    is_tape,
    open_tape,
    read_manifest,
    refuse_other_data,
    refuse_other_folder,
    refuse_other_format,
)
from deitkit.distill.teacher import ANOTHER_TEACHER, Teacher, TeacherSource, doubt_about, load_teacher, why_useless
from deitkit.models.cnn import CNNConfig, build_cnn, card_config, has_pretrained, head_parameters
from deitkit.models.network import Network, default_device, resolve_precision
from deitkit.models.start import find_start, save_start
from deitkit.models.vit import ViT
from deitkit.models.zoo import ModelCard, multiply_adds, parameter_count, save_model
from deitkit.settings import validated
from deitkit.terminal import Progress, SilentProgress, UserError, file_size, plural
from deitkit.training.evaluate import evaluated_side, warn_of_reduced
from deitkit.training.loop import (
    Trainer,
    calibrate_heads,
    clamp_batch_size,
    describe_low_resolution,
    last_logits,
    measure_speed,
    settle_steps,
)
from deitkit.training.run import (
    FREE_TO_CHANGE,
    RunFolder,
    inherit_precision,
    make_accelerator,
    preserved_global_state,
    refuse_difference,
)
from deitkit.training.setup import (
    automatic_fit,
    load,
    preprocessing_of_student,
    render_size,
    resolve,
    resolve_view,
    say_unlabelled,
    student_architecture,
    student_network,
    student_plan,
    train_loader,
    with_feature_weight,
    with_precision,
    with_teacher,
)
from deitkit.training.teaching import (
    Teaching,
    checked_teacher,
    needed_outputs,
    recorded,
    recorded_first,
    recording_size,
    repeats_views,
    replayed,
    tape_of,
    with_few_views,
    with_views_of_tape,
)
from deitkit.views.loader import cut, views_shown

UNPLANNED_STEPS = 10**6
"""Of a plan whose speed is measured: its steps are not known yet."""
MORE_TRAINING = "train it longer, or on more images"
AFTER_AUTO = "more images of each class help, or give a teacher that knows these classes, or --distillation none"
MOST_RECORDED_CLASSES = 100
"""For so many classes all logits are recorded by default: at 1000 they would take a thousand times the space of a label."""


# -------------------------------------------------------------------------------------------------- students


@dataclass(kw_only=True)
class Job:
    """One run on its way from settings to a summary."""

    location: str
    folder: RunFolder
    resume: bool
    progress: Progress
    started: float = field(default_factory=time.perf_counter)

    def open(self, config: JobT, dataset: Dataset | None = None) -> tuple[Dataset, JobT, JobT | None]:
        """The images, the settings that fit them, and those that a resumed run was started with. Raises UserError."""
        before = self.folder.config(type(config)) if self.resume else None
        if before is None:
            self.folder.refuse_existing()
        refuse_among_images(self.location, self.folder.path)
        if isinstance(config, RunConfig) and config.teacher.record is not None:
            _refuse_record(Path(config.teacher.record), self.location, self.folder)
        dataset = dataset or load(self.location, config.data, self.progress)
        if before is not None:
            self.folder.refuse_other_data(dataset.names_hash())
        return dataset, clamp_batch_size(inherit_precision(config, before), dataset, self.progress), before


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
    start = find_start(config.student, job.folder.path if job.resume else None)
    config = _resolve_teacher(resolve(config, dataset, job.location, start and start.facts), before)
    config = with_few_views(config, dataset)
    if tape is not None:
        config = with_views_of_tape(config, tape, before.view.views if before else None)
    if job.resume and job.folder.finished:
        summary = finished_before(job, config, dataset)
        _finish_tape(job.folder.config(RunConfig), dataset, given, progress)
        return summary

    # weights
    architecture = student_architecture(config, dataset, start and start.facts)
    preprocessing = preprocessing_of_student(config, architecture, start and start.facts)
    warn_of_reduced(dataset, preprocessing, "the student", progress.warn)

    # teacher
    advice = ANOTHER_TEACHER
    if config.teacher.teacher == "auto":
        advice = AFTER_AUTO
        fitted = _fitted_before(before) or fit_automatically(job.location, dataset, config, progress)
        config = with_teacher(config, teacher=str(fitted))
    accelerator = make_accelerator(config.loop)
    teaching = Teaching(description="no teacher" if silent_about_teacher else "no teacher (--teacher auto fits one)")
    if tape is not None:
        teaching = replayed(config, tape, progress)
    elif config.teacher.teacher is not None:
        code = _known_code(config, job.folder.path if job.resume else None)
        teaching = checked_teacher(config, dataset, progress, given, advice, accelerator, code)
        assert teaching.teacher is not None
        config = with_teacher(config, teacher_chunk_size=teaching.teacher.chunk_size)
        if evaluated_side(teaching.teacher.preprocessing) > evaluated_side(preprocessing):
            warn_of_reduced(dataset, teaching.teacher.preprocessing, f"teacher {teaching.name}", progress.warn)

    if config.loss.learns_from_teacher:
        config = with_feature_weight(config, teaching.features, teaching.name or "")
    code = None if teaching.teacher is None else teaching.teacher.code
    if teaching.teacher is not None and repeats_views(config, dataset):
        teaching = recorded_first(teaching, config, dataset, accelerator, progress)

    # schedule
    network = student_network(
        config, architecture, dataset, start, progress, teaching.features if config.loss.feature_weight else 0
    )
    plan_of = partial(student_plan, network, architecture, function)
    trainer, teaching, config = planned_trainer(job, config, network, plan_of, dataset, teaching, accelerator)
    if start is not None and accelerator.is_main_process:
        save_start(start.facts, job.folder.path)

    if accelerator.is_main_process and code is not None:
        code.save(job.folder.path)

    # training
    trained = trainer.train(resume=job.resume)
    assert isinstance(trained.body, ViT)
    trained.body.drop_feature_head()
    head_scales = calibrate_heads(trainer, trained) if config.student.calibrate else ()

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
    summary = finish(job, trainer, trained, card, config, teaching, dataset)
    teaching.finish()  # last: nothing that goes wrong with a tape may cost the training
    return summary


def _refuse_record(tape: Path, location: str, folder: RunFolder) -> None:
    """Raises UserError where a tape cannot be recorded in this folder. In its run's folder it would keep the run from being started."""
    if tape.resolve().is_relative_to(folder.path.resolve()):
        raise UserError(f"--record {tape}: lies in the folder of the run, {folder.path}: give it one of its own")
    refuse_among_images(location, tape)
    refuse_other_folder(tape, None)


def _resolve_teacher(config: RunConfig, before: RunConfig | None) -> RunConfig:
    """`config` with the teacher's precision, and with the chunk size of a resumed run. Raises UserError."""
    settings = config.teacher
    if settings.record is not None:
        refuse_other_folder(Path(settings.record), needed_outputs(config))
    if settings.teacher is not None:
        config = with_teacher(config, teacher_precision=resolve_precision(settings.teacher_precision, default_device()))
    if before is not None and settings.teacher_chunk_size is None:
        config = with_teacher(config, teacher_chunk_size=before.teacher.teacher_chunk_size)
    return config


def _known_code(config: RunConfig, resumed: Path | None) -> FeatureCode | None:
    """How features are encoded in the run that is resumed, or on the tape that goes on being recorded; None where nothing is known
    yet."""
    tape = Path(config.teacher.record or "")
    if config.teacher.record is not None and is_tape(tape):
        return open_tape(tape).code()
    return load_code(resumed) if resumed is not None and (resumed / CODE_FILE).is_file() else None


def _finish_tape(config: RunConfig, dataset: Dataset, given: Teacher | None, progress: Progress) -> None:
    """Record what a finished training with these settings left out of its tape; a warning if that cannot be done."""
    path, steps = Path(config.teacher.record or ""), config.loop.steps
    if config.teacher.record is None or steps is None or not is_tape(path):
        return
    try:
        views = views_shown(steps, -(-len(dataset.open_split("train")) // config.loop.batch_size), config.view)
        if open_tape(path).complete_views() < views:
            accelerator = make_accelerator(config.loop)
            code = open_tape(path).code()
            teaching = checked_teacher(config, dataset, progress, given, accelerator=accelerator, code=code)
            recorded(teaching, config, dataset, accelerator, steps, progress).finish()
    except UserError as error:
        progress.warn(f"the training is done, its tape is not complete: {error}")


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
    plan = student_plan(network, architecture, None, config, UNPLANNED_STEPS, loader.steps_per_epoch)
    prepared = time.perf_counter() - started
    return prepared, *measure_speed(network, plan, loader, dataset.open_split("val"), teacher, accelerator)


# ------------------------------------------------------------------------------------------ fitted teachers


def run_fit(location: str, config: FitConfig, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
    """Fit a convolutional teacher: replace its last layer and train, head first, then all; or from scratch.

    Returns the content of `summary.json`. Raises UserError."""
    with RunFolder(out) as folder, preserved_global_state():
        return _fit(Job(location=location, folder=folder, resume=resume, progress=progress), config)


def _fit(job: Job, config: FitConfig) -> dict[str, Any]:
    dataset, config, _ = job.open(config)
    config = config.model_copy(update={"loop": with_precision(config.loop)})

    # weights
    pretrained = not config.from_scratch and has_pretrained(config.model)
    accelerator = make_accelerator(config.loop, head_first=pretrained)
    torch.manual_seed(config.loop.seed)
    size = (config.image_size, config.image_size) if config.image_size else None
    if size is None and not pretrained and is_small(dataset.image_size):
        size = dataset.image_size
    channels = 3 if pretrained else dataset.channels
    architecture = CNNConfig(name=config.model, classes=len(dataset.classes), channels=channels)
    network = build_cnn(architecture, image_size=size, pretrained=pretrained)
    network.to(memory_format=torch.channels_last)  # 1.3 to 1.8 times as fast on a CPU
    view = resolve_view(config.view, dataset, network.preprocessing.image_size)
    location = config.data.model_copy(update={"location": job.location})
    config = config.model_copy(update={"data": location, "view": view})
    if job.resume and job.folder.finished:
        return finished_before(job, config, dataset)
    warn_of_reduced(dataset, network.preprocessing, config.model, job.progress.warn)

    # schedule, training, saving
    head_names = frozenset(head_parameters(network)) if pretrained else frozenset()
    what = Teaching(description="its head first" if head_names and config.head_share else "all weights")
    plan_of = partial(fit_plan, head_names)
    trainer, what, config = planned_trainer(job, config, network, plan_of, dataset, what, accelerator)
    trained = trainer.train(resume=job.resume)
    card = ModelCard(
        name=config.model,
        architecture=card_config(architecture, network),
        classes=dataset.classes,
        preprocessing=network.preprocessing,
        weights="ema" if config.optim.ema_decay > 0 else "last",
        dataset=dataset.name,
    )
    return finish(job, trainer, trained, card, config, what, dataset)


def fit_plan(head_names: frozenset[str], config: FitConfig, steps: int, steps_per_epoch: int) -> Plan:
    """How a teacher is fitted in so many steps: in the first only the parameters `head_names` train."""
    return Plan(
        view=config.view,
        loss=LossConfig(distillation="none", label_smoothing=config.label_smoothing),
        optim=config.optim,
        loop=config.loop,
        total_steps=steps,
        warmup_steps=warmup_steps(config.optim, steps, steps_per_epoch),
        head_steps=round(config.head_share * steps) if head_names else 0,
        head_names=head_names,
    )


def fit_automatically(location: str, dataset: Dataset, config: RunConfig, progress: Progress) -> Path:
    """The folder of the teacher that `auto` stands for, in the user's one store of fitted teachers: fitted before with the same images
    and settings, or now. Programs that need the same teacher wait for each other; a killed fit is resumed. Raises UserError."""
    fit = automatic_fit(dataset, config)
    if (dataset.open_split("train").labels_N == NO_LABEL).any():
        dataset = load_data(location, fit.data)
    train = dataset.open_split("train")
    known_by = json.dumps([train.cached_content_hash(), dataset.classes, fit_key(fit)])
    name = f"{fit.model}-{hashlib.sha256(known_by.encode()).hexdigest()[:12]}"
    accelerator = make_accelerator(fit.loop)
    with RunFolder(data.cache_folder() / "teachers" / name) as folder, preserved_global_state():
        if accelerator.is_main_process:
            folder.lock(
                on_wait=lambda: progress.say(f"waiting for another program that fits this teacher, {folder.path}")
            )
            _drop_fit_to_other_images(folder, fit, dataset)
        accelerator.wait_for_everyone()
        if folder.finished:
            progress.say(f"teacher: {folder.path}, fitted before")
            return folder.path
        length = plural(int(fit.loop.amount("ep") or 0), "epoch")
        images = plural(len(train), "training image")
        progress.say(f"teacher: fitting {fit.model} for {length} of {images}, into {folder.path}")
        begun = (folder.path / "config.yaml").is_file()
        _fit(Job(location=location, folder=folder, resume=begun, progress=progress), fit)
    return folder.path


def _drop_fit_to_other_images(folder: RunFolder, fit: FitConfig, dataset: Dataset) -> None:
    """Remove a killed fit that cannot be resumed: its validation images, or the names of its images, were others."""
    if folder.finished or not (folder.path / "config.yaml").is_file():
        return
    try:
        folder.refuse_other_data(dataset.names_hash())
        if folder.config(FitConfig).data.split_settings() == fit.data.split_settings():
            return
    except UserError:
        pass
    (folder.path / "config.yaml").unlink()
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    (folder.path / "metrics.jsonl").unlink(missing_ok=True)


def fit_key(fit: FitConfig) -> str:
    """The settings of a fit that affect its result, apart from the images; without the precision of this machine."""
    fit = fit.model_copy(update={"loop": fit.loop.model_copy(update={"precision": "auto"})})
    return fit.model_dump_json(exclude={"data": True, "loop": FREE_TO_CHANGE})


def doubt_about_fitted(summary: dict[str, Any]) -> str | None:
    """Why a fitted network will hardly do as a teacher, from its run's summary; None if it will."""
    facts = {"name": summary["name"], "n": summary["n"], "classes": summary["classes"], "top1": summary["top1"]["cls"]}
    why = why_useless(facts)
    return doubt_about(facts) if why is None else f"{why}: {MORE_TRAINING}"


# --------------------------------------------------------------------------------- what all trainings share


def planned_trainer(
    job: Job,
    config: JobT,
    network: Network,
    plan_of: Callable[[JobT, int, int], Plan],
    dataset: Dataset,
    teaching: Teaching,
    accelerator: Accelerator,
) -> tuple[Trainer, Teaching, JobT]:
    """The trainer of `network`, ready to start, in its folder; the teaching, recorded if that was asked for; the settings with their
    length in steps. `plan_of` makes a plan of settings, steps and steps per epoch. One line tells the plan. Raises UserError."""
    loader, validation = train_loader(config, dataset, accelerator, teaching.teacher), dataset.open_split("val")

    def speed() -> tuple[float, float]:
        plan = plan_of(config, UNPLANNED_STEPS, loader.steps_per_epoch)
        return measure_speed(network, plan, loader, validation, teaching.source, accelerator)

    stored = job.folder.config(type(config)) if job.resume else None
    steps, note = settle_steps(config, stored, loader.steps_per_epoch, speed)
    settled = _with_steps(config, steps)
    if stored is not None:
        refuse_difference(stored, settled, job.folder)
    plan = plan_of(settled, steps, loader.steps_per_epoch)
    resolution = describe_low_resolution(plan)
    if (
        isinstance(settled, RunConfig) and settled.teacher.record is not None
    ):  # before the run's folder: a tape may be refused
        teaching = recorded(teaching, settled, dataset, accelerator, steps, job.progress)
    epochs = f"{steps / loader.steps_per_epoch:.1f}".removesuffix(".0")
    job.progress.say(
        f"plan: {plural(steps, 'step')} ({epochs} epoch{'' if epochs == '1' else 's'}{note}), {resolution}{teaching.description}"
    )
    job.progress.say(f"data: {len(loader.split):,} training and {len(validation):,} validation images")
    trainer = Trainer(
        network=network,
        plan=plan,
        loader=loader,
        validation=validation,
        run=job.folder,
        progress=job.progress,
        accelerator=accelerator,
        teacher=teaching.source,
        teacher_on_validation=teaching.validation_N if teaching.facts else None,
        on_epoch=teaching.on_epoch,
    )
    if accelerator.is_main_process:
        job.folder.lock()
        if not job.resume:
            job.folder.create(settled, dataset.names_hash())
    accelerator.wait_for_everyone()
    return trainer, teaching, settled


def _with_steps(config: JobT, steps: int) -> JobT:
    return config.model_copy(update={"loop": config.loop.model_copy(update={"length": f"{steps}st"})})


def finished_before(job: Job, config: JobT, dataset: Dataset) -> dict[str, Any]:
    """The summary of a finished run that was to be resumed with these settings. Raises UserError where they differ."""
    stored = job.folder.config(type(config))
    steps_per_epoch = -(-len(dataset.open_split("train")) // config.loop.batch_size)
    given = _with_steps(config, settle_steps(config, stored, steps_per_epoch, lambda: (math.inf, 0.0))[0])
    if isinstance(given, RunConfig) and isinstance(stored, RunConfig) and given.teacher.teacher == "auto":
        given = given.model_copy(update={"teacher": stored.teacher})
    if isinstance(given, RunConfig) and isinstance(stored, RunConfig) and given.loss.feature_weight is None:
        weight = {"feature_weight": stored.loss.feature_weight}  # as the teacher allowed
        given = given.model_copy(update={"loss": given.loss.model_copy(update=weight)})
    refuse_difference(stored, given, job.folder)
    job.progress.say(f"{job.folder.path}: already finished")
    return job.folder.summary()


def finish(
    job: Job,
    trainer: Trainer,
    trained: Network,
    card: ModelCard,
    config: JobConfig,
    teaching: Teaching,
    dataset: Dataset,
) -> dict[str, Any]:
    """Save the model, write the summary, and return it."""
    scores, loader, steps = trainer.last_scores, trainer.loader, trainer.plan.total_steps
    whole_epochs, rest = divmod(steps, loader.steps_per_epoch)
    two_tokens = isinstance(trained.body, ViT) and trained.body.dist_token is not None
    summary = {
        "name": job.folder.path.name,
        "model": card.name,
        "data": config.data.location,
        "split": "val",
        "classes": len(card.classes),
        "has_test": dataset.has_test,
        "teacher": teaching.facts,
        **scores,
        "token_cosine": last_logits(trainer, trained).token_cosine if two_tokens else None,
        "params": parameter_count(trained),
        "macs": multiply_adds(trained, card.preprocessing.channels),
        "steps": steps,
        "epochs": steps / loader.steps_per_epoch,
        "images_seen": whole_epochs * len(loader.split) + cut(len(loader.split), loader.steps_per_epoch, rest)[0],
        "seconds": trainer.seconds,
        "seconds_with_preparation": trainer.seconds_before + time.perf_counter() - job.started,
        "seed": config.loop.seed,
        "view_seed": config.view.view_seed,
        "data_seed": config.data.data_seed,
    }
    if trainer.accelerator.is_main_process:
        save_model(job.folder.model, trained, card)
        job.folder.log("end", step=steps, top1=scores["top1"])
        job.folder.write_summary(summary)
    trainer.accelerator.wait_for_everyone()  # whoever comes next reads the model
    return summary


# ----------------------------------------------------------------------------------------------------- tapes


def run_record(
    location: str, config: RunConfig, out: Path, *, views: int, outputs: OutputKind | None, progress: Progress
) -> dict[str, Any]:
    """Record the teacher's outputs for the first `views` views of the training images, or what is missing of them. `outputs`: what of
    them, if not given what the tape has, or what is usual for so many classes. Its features come along, but for a feature_weight of 0,
    or if `outputs` is given and no feature_weight. Returns `tape_info`, and the `seconds` of the recording itself. Raises UserError."""
    refuse_among_images(location, out)
    loss, code = config.loss, open_tape(out).code() if is_tape(out) else None
    if outputs is None and is_tape(out):
        outputs = read_manifest(out).outputs
        loss = loss if code else loss.model_copy(update={"feature_weight": loss.feature_weight or 0.0})
    elif outputs is not None:
        loss = loss.model_copy(update={"feature_weight": loss.feature_weight or 0.0})
    refuse_other_folder(out, outputs)
    dataset = load(location, config.data, progress)
    say_unlabelled(dataset, progress)
    outputs = outputs or ("all" if len(dataset.classes) <= MOST_RECORDED_CLASSES else "hard")
    config = resolve(config.model_copy(update={"loss": loss}), dataset, location)
    if config.teacher.teacher == "auto":
        config = with_teacher(config, teacher=str(fit_automatically(location, dataset, config, progress)))
    if views % config.view.repeated_aug:
        raise UserError(f"--views {views}: not a multiple of --repeated-aug {config.view.repeated_aug}")
    teaching = checked_teacher(config, dataset, progress, code=code)
    teacher, validation_N, accuracy = teaching.known()
    warn_of_reduced(dataset, teacher.preprocessing, f"teacher {teacher.name}", progress.warn)
    facts = data_facts(dataset, config.data.split_settings())
    view = config.view.at(render_size(dataset, teacher.preprocessing.image_size))
    manifest = make_manifest(teacher, facts, dataset.classes, view, outputs, views, accuracy)
    size = recording_size(manifest.views, manifest.images, manifest.bytes)
    progress.say(f"recording the teacher's outputs for {size}, to {out}; {file_size(free_bytes(out))} are free there")
    tape = create(out, manifest, validation_N, teacher.code)
    began = time.perf_counter()
    try:
        record(tape, dataset.open_split("train"), teacher, progress, workers=config.loop.workers, views=views)
    finally:
        tape.close()
    return {**tape_info(out), "seconds": time.perf_counter() - began}


def run_verify(
    path: Path, location: str, teacher_name: str, *, samples: int, workers: int, progress: Progress
) -> dict[str, Any]:
    """Verify a tape: its checksums, data and teacher, and `samples` outputs computed again. Returns the counts. Raises UserError."""
    tape = open_tape(path)
    refuse_other_format(path, tape.manifest)
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
    teacher.code = tape.code()
    return verify(tape, dataset.open_split("train"), teacher, samples=samples, workers=workers)
