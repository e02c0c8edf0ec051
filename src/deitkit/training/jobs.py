"""What a training and the fit of a teacher have in common: steps planned, a run begun or found finished, its end written down.

A convolutional network fitted to the data, to be a teacher.

A student taught, from its configuration to `summary.json`.

What `deit tape record`, `verify` and `info` do.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from deitkit.config import DataConfig, FitConfig, JobT, LoopConfig, LossConfig, OptimConfig, RunConfig, length_in_steps
from deitkit.data import Dataset, load_data, refuse_among_images
from deitkit.data.dataset import NO_LABEL, is_small
from deitkit.distill.losses import LossFunction
from deitkit.distill.optim import warmup_steps
from deitkit.distill.record import data_facts, make_manifest, record, verify
from deitkit.distill.step import Plan
from deitkit.distill.tape import (
    OutputKind,
    create,
    free_bytes,
    is_tape,
    open_tape,
    read_manifest,
    refuse_other_data,
    refuse_other_folder,
    refuse_other_format,
)
from deitkit.distill.teacher import ANOTHER_TEACHER, Teacher, doubt_about, load_teacher, why_useless
from deitkit.models.cnn import CNNConfig, build_cnn, card_config, has_pretrained, head_parameters
from deitkit.models.network import Network, default_device, resolve_precision
from deitkit.models.start import find_start, save_start
from deitkit.models.vit import ViT
from deitkit.models.zoo import ModelCard, multiply_adds, parameter_count, save_model
from deitkit.settings import validated
from deitkit.terminal import Progress, UserError, file_size, plural
from deitkit.training.evaluate import (
    SplitLogits,
    calibrate,
    evaluated_side,
    score,
    split_logits_of_network,
    warn_of_reduced,
)
from deitkit.training.loop import Trainer, make_accelerator
from deitkit.training.run import FREE_TO_CHANGE, RunFolder, inherit_precision, refuse_difference
from deitkit.training.setup import (
    automatic_fit,
    load,
    make_trainer,
    measure_speed,
    preprocessing_of_student,
    refuse_lost_temperature,
    resolve,
    resolve_view,
    say_unlabelled,
    student_architecture,
    student_trainer,
    with_precision,
    with_teacher,
)
from deitkit.training.teaching import (
    Teaching,
    checked_teacher,
    needed_answers,
    recording_size,
    tape_of,
    taped,
    taught_by_tape,
    taught_live,
    with_views_of_tape,
)
from deitkit.views.loader import cut, views_shown

BUDGET_MARGIN = 0.97
"""Share of `--budget-minutes` that is planned: checkpoints and the odd slow step take the rest."""


def clamp_batch_size(config: JobT, dataset: Dataset, progress: Progress) -> JobT:
    """`config` with no larger a batch than there are images: its learning rate is that of the steps that are made. Raises
    UserError where other rates do not fit then."""
    asked, images = config.loop.batch_size, len(dataset.open_split("train"))
    if asked <= images:
        return config
    progress.say(
        f"--batch-size {asked}: there are {images} training images, so a batch is {images}; the learning rate is scaled to that"
    )
    values = config.model_dump()
    values["loop"]["batch_size"] = images
    return validated(type(config), values, f"batches of {images}")


def set_schedule(trainer: Trainer, config: JobT, folder: RunFolder, *, resume: bool, head_share: float = 0.0) -> JobT:
    """Fix the number of steps, and hold the resolved configuration against that of the run that is resumed. Writes nothing."""
    stored = folder.config(type(config)) if resume else None
    steps = _steps(trainer, config.loop) if stored is None or stored.loop.steps is None else stored.loop.steps
    warmup = _warmup(trainer, config.optim, steps)
    given, config = config, _with_steps(config, steps)
    if stored is not None:
        refuse_difference(stored, given if given.loop.steps is not None else config, folder)
    trainer.plan = replace(
        trainer.plan,
        loop=config.loop,
        total_steps=steps,
        warmup_steps=warmup,
        head_steps=round(head_share * steps),
    )
    _say_small_steps(trainer)
    return config


def _steps(trainer: Trainer, loop: LoopConfig) -> int:
    minutes = loop.amount("min")
    if minutes is None:
        return length_in_steps(loop.length, trainer.loader.steps_per_epoch)
    step_seconds, evaluation_seconds = measure_speed(trainer)
    epoch_seconds = step_seconds * trainer.loader.steps_per_epoch + evaluation_seconds / trainer.epochs_to_evaluation
    measured = [BUDGET_MARGIN * 60 * minutes / epoch_seconds * trainer.loader.steps_per_epoch]
    steps: int = max(1, math.floor(min(gather_object(measured))))  # as many as the slowest process makes
    trainer.progress.say(
        f"{minutes:g} minutes: {steps} steps of {step_seconds:.3f} s, {steps / trainer.loader.steps_per_epoch:.1f} epochs"
    )
    return steps


def _with_steps(config: JobT, steps: int | None) -> JobT:
    return (
        config
        if steps is None
        else config.model_copy(update={"loop": config.loop.model_copy(update={"length": f"{steps}st"})})
    )


def _warmup(trainer: Trainer, optim: OptimConfig, steps: int) -> int:
    """Steps of the warm-up. Raises UserError where epochs of it leave nothing of the training."""
    warmup = warmup_steps(optim, steps, trainer.loader.steps_per_epoch)
    if warmup >= steps and warmup > 0:
        raise UserError(
            f"--warmup {optim.warmup}: its {warmup} steps are all of the training, {steps}: give less, such as 5%"
        )
    return warmup


def _say_small_steps(trainer: Trainer) -> None:
    """Until which step the student sees small images. Raises UserError where that is none."""
    plan = trainer.plan
    if plan.low_res_size is None:
        return
    pixels = min(plan.low_res_size)
    if plan.low_res_steps == 0:
        raise UserError(
            f"--low-res-size {pixels}: a share of {plan.low_res_fraction:g} of {plan.total_steps} steps is none of them: "
            f"give more steps, a larger --low-res-fraction, or leave it out"
        )
    trainer.progress.say(f"the first {plan.low_res_steps} of {plan.total_steps} steps see images of {pixels} pixels")


def begin(trainer: Trainer, config: JobT, folder: RunFolder, dataset: Dataset, *, resume: bool) -> None:
    """Keep other processes away, and write down the resolved configuration and what the data are, unless they are there."""
    if trainer.accelerator.is_main_process:
        folder.lock()
        if not resume:
            folder.create(config, dataset.names_hash())
    trainer.accelerator.wait_for_everyone()


def finished_before(folder: RunFolder, config: JobT, progress: Progress) -> dict[str, Any]:
    """The summary of a finished run that was to be resumed with these settings. Raises UserError where they differ."""
    stored = folder.config(type(config))
    given = config if config.loop.steps is not None else _with_steps(config, stored.loop.steps)
    if isinstance(given, RunConfig) and isinstance(stored, RunConfig) and given.teacher.teacher == "auto":
        given = given.model_copy(update={"teacher": stored.teacher})
    refuse_difference(stored, given, folder)
    progress.say(f"{folder.path}: already finished")
    return folder.summary()


def finish(
    trainer: Trainer,
    trained: Network,
    card: ModelCard,
    teacher: dict[str, Any] | None,
    data: DataConfig,
    seconds: float,
    has_test: bool,
) -> dict[str, Any]:
    """Save the model, write the summary."""
    scores = trainer.last_scores
    summary = {
        "name": trainer.run.path.name,
        "model": card.name,
        "data": data.location,
        "split": "val",
        "n": scores["n"],
        "classes": len(card.classes),
        "has_test": has_test,
        "top1": scores["top1"],
        "top5": scores["top5"],
        "teacher": teacher,
        "agreement": scores["agreement"],
        "heads_agree": scores["heads_agree"],
        "nll": scores["nll"],
        "ece": scores["ece"],
        "token_cosine": _token_cosine(trainer, trained),
        "params": parameter_count(trained),
        "macs": multiply_adds(trained, card.preprocessing.channels),
        "steps": trainer.plan.total_steps,
        "epochs": trainer.plan.total_steps / trainer.loader.steps_per_epoch,
        "images_seen": _images_seen(trainer),
        "seconds": trainer.seconds,
        "seconds_with_preparation": trainer.seconds_before + seconds,
        "seed": trainer.plan.loop.seed,
        "view_seed": trainer.plan.view.view_seed,
        "data_seed": data.data_seed,
    }
    if trainer.accelerator.is_main_process:
        save_model(trainer.run.model, trained, card)
        trainer.run.log("end", step=trainer.plan.total_steps, top1=scores["top1"])
        trainer.run.write_summary(summary)
    trainer.accelerator.wait_for_everyone()  # whoever comes next reads the model
    return summary


def calibrated(trainer: Trainer, trained: Network) -> tuple[float, ...]:
    """Scale the heads to the validation images, and the scores with them; what that changes of their fused decisions is said.
    Returns the factors."""
    before, off = trainer.last_scores["top1"]["fused"], trainer.last_scores["ece"]
    trainer.last_answers, scales = calibrate(trained, _last_answers(trainer, trained))
    trainer.last_scores = score(trainer.last_answers, trainer.teacher_on_validation)
    after = trainer.last_scores["top1"]["fused"]
    if before != after:
        closer = f"{100 * off:.1f} -> {100 * trainer.last_scores['ece']:.1f} points off"
        trainer.progress.say(
            f"heads scaled so that probabilities fit the validation images ({closer}): "
            f"fused {100 * before:.2f} -> {100 * after:.2f} % right (--no-calibrate leaves them)"
        )
    return scales


def _last_answers(trainer: Trainer, trained: Network) -> SplitLogits:
    """What the trained network says of the validation images: it is asked where a process before this one did that."""
    if trainer.last_answers is None:
        device, workers = trainer.accelerator.device, trainer.loader.workers
        trainer.last_answers = split_logits_of_network(trained, trainer.validation, device, workers)
    return trainer.last_answers


def _token_cosine(trainer: Trainer, trained: Network) -> list[float] | None:
    body = trained.body
    if not isinstance(body, ViT) or body.dist_token is None:
        return None
    return _last_answers(trainer, trained).token_cosine


def _images_seen(trainer: Trainer) -> int:
    loader = trainer.loader
    whole, rest = divmod(trainer.plan.total_steps, loader.steps_per_epoch)
    return whole * len(loader.split) + cut(len(loader.split), loader.steps_per_epoch, rest)[0]


MORE_TRAINING = "train it longer, or on more images"


def run_fit(location: str, config: FitConfig, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
    """Fit a convolutional teacher: replace its last layer and train, head first, then all; or from scratch.

    Returns what `summary.json` says. Raises UserError."""
    with RunFolder(out) as folder:
        return _fit(location, config, folder, resume=resume, progress=progress)


def _fit(location: str, config: FitConfig, folder: RunFolder, *, resume: bool, progress: Progress) -> dict[str, Any]:
    started = time.perf_counter()
    before = folder.config(FitConfig) if resume else None
    if before is None:
        folder.refuse_existing()
    refuse_among_images(location, folder.path)
    dataset = load(location, config.data, progress)
    if resume:
        folder.refuse_other_data(dataset.names_hash())
    config = clamp_batch_size(inherit_precision(config, before), dataset, progress)
    config = config.model_copy(update={"loop": with_precision(config.loop)})
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
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"location": location}),
            "view": resolve_view(config.view, dataset, network.preprocessing.image_size),
        }
    )
    if resume and folder.finished:
        return finished_before(folder, config, progress)
    warn_of_reduced(dataset, network.preprocessing, config.model, progress.warn)
    plan = Plan(
        view=config.view,
        loss=LossConfig(distillation="none", label_smoothing=config.label_smoothing),
        optim=config.optim,
        loop=config.loop,
        total_steps=0,
        head_names=frozenset(head_parameters(network)),
    )
    trainer = make_trainer(network, plan, dataset, folder, progress, accelerator, Teaching())
    head_share = config.head_share if pretrained else 0.0
    config = set_schedule(trainer, config, folder, resume=resume, head_share=head_share)
    begin(trainer, config, folder, dataset, resume=resume)
    trained = trainer.train(resume=resume)
    card = ModelCard(
        name=config.model,
        architecture=card_config(architecture, network),
        classes=dataset.classes,
        preprocessing=network.preprocessing,
        weights="ema" if config.optim.ema_decay > 0 else "last",
        dataset=dataset.name,
    )
    return finish(trainer, trained, card, None, config.data, time.perf_counter() - started, dataset.has_test)


def fit_automatically(location: str, dataset: Dataset, config: RunConfig, out: Path, progress: Progress) -> Path:
    """The folder of a fitted teacher beside `out`: from an earlier run with the same data and settings, or fitted now."""
    fit = automatic_fit(dataset, config)
    if (dataset.open_split("train").labels_N == NO_LABEL).any():
        dataset = load_data(location, fit.data)
    key = hashlib.sha256((dataset.open_split("train").cached_content_hash() + fit_key(fit)).encode()).hexdigest()[:8]
    folder = out.parent / f"teacher-{fit.model}-{key}"
    if RunFolder(folder).finished:
        progress.say(f"teacher: {folder}, fitted before")
        return folder
    images = plural(len(dataset.open_split("train")), "training image")
    progress.say(
        f"teacher: fitting {fit.model} for {plural(int(fit.loop.amount('ep') or 0), 'epoch')} of {images}, into {folder}"
    )
    run_fit(location, fit, folder, resume=(folder / "config.yaml").is_file(), progress=progress)
    return folder


def fit_key(fit: FitConfig) -> str:
    """The settings of a fit that change its result, the images themselves aside; not the number format of this machine."""
    fit = fit.model_copy(update={"loop": fit.loop.model_copy(update={"precision": "auto"})})
    return fit.model_dump_json(exclude={"data": True, "loop": FREE_TO_CHANGE})


def doubt_about_fitted(summary: dict[str, Any]) -> str | None:
    """Why a fitted network will hardly do as a teacher, if it will not, from its run's summary."""
    facts = {"name": summary["name"], "n": summary["n"], "classes": summary["classes"], "top1": summary["top1"]["cls"]}
    why = why_useless(facts)
    return doubt_about(facts) if why is None else f"{why}: {MORE_TRAINING}"


AFTER_AUTO = "more images of each class help, or give a teacher that knows these classes, or --distillation none"


def run_training(
    location: str, config: RunConfig, out: Path, *, resume: bool, progress: Progress, teacher: Teacher | None = None,
    dataset: Dataset | None = None, loss_function: LossFunction | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a student; `teacher` is one that cannot be loaded by its name, `dataset` the images at `location` if they are open
    already, `loss_function` the distillation loss for `distillation: callable`. Returns what `summary.json` says.

    Raises UserError."""
    with RunFolder(out) as folder:
        return _train(
            location,
            config,
            folder,
            resume=resume,
            progress=progress,
            given=teacher,
            dataset=dataset,
            function=loss_function,
        )


def _train(
    location: str,
    config: RunConfig,
    folder: RunFolder,
    *,
    resume: bool,
    progress: Progress,
    given: Teacher | None = None,
    dataset: Dataset | None = None,
    function: LossFunction | None = None,
) -> dict[str, Any]:
    started = time.perf_counter()
    if config.loss.distillation == "callable" and function is None:
        raise UserError("distillation: callable: give the loss function to dk.train(distillation=...)")
    before = folder.config(RunConfig) if resume else None
    if before is None:
        folder.refuse_existing()
    refuse_among_images(location, folder.path)
    if config.teacher.record is not None:
        _refuse_within(Path(config.teacher.record), folder)
        refuse_among_images(location, Path(config.teacher.record))
        refuse_other_folder(Path(config.teacher.record), None)
    if dataset is None:
        dataset = load(location, config.data, progress)
    if resume:
        folder.refuse_other_data(dataset.names_hash())
    config = clamp_batch_size(inherit_precision(config, before), dataset, progress)
    # before the tape's views are held against the data
    tape = None if config.teacher.tape is None else tape_of(config, dataset)
    say_unlabelled(dataset, progress)
    asked = config.loss
    start = find_start(config.student, folder.path if resume else None)
    config = resolve(config, dataset, location, start and start.facts)
    refuse_lost_temperature(asked, config.loss)
    if config.teacher.teacher is not None:
        config = with_teacher(
            config, teacher_precision=resolve_precision(config.teacher.teacher_precision, default_device())
        )
    if config.teacher.record is not None:
        refuse_other_folder(Path(config.teacher.record), needed_answers(config))
    if before is not None and config.teacher.teacher_chunk_size is None:
        config = with_teacher(config, teacher_chunk_size=before.teacher.teacher_chunk_size)
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
        config = with_teacher(config, teacher_chunk_size=teacher.chunk_size)
        if evaluated_side(teacher.preprocessing) > evaluated_side(preprocessing):
            warn_of_reduced(dataset, teacher.preprocessing, f"teacher {teacher.name}", progress.warn)
    elif asked.distillation is None:
        progress.say("no teacher: learning from the labels alone (--teacher auto fits one first)")
    trainer = student_trainer(config, architecture, dataset, folder, progress, accelerator, teaching, start, function)
    config = set_schedule(trainer, config, folder, resume=resume)
    if config.teacher.record is not None and teacher is not None:  # before the run's folder: a tape may be refused
        steps = trainer.plan.total_steps
        teaching = taped(teaching, teacher, config, dataset, accelerator, steps, progress)
        trainer.teacher, trainer.on_epoch = teaching.source, teaching.on_epoch
    begin(trainer, config, folder, dataset, resume=resume)
    if start is not None and accelerator.is_main_process:
        save_start(start.facts, folder.path)
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


MOST_RECORDED_CLASSES = 100
"""Of so many classes all logits are recorded where nobody says what is to be: at 1000 they would take a thousand times the space
of a decision."""


def run_record(
    location: str, config: RunConfig, out: Path, *, views: int, answers: OutputKind | None, progress: Progress
) -> dict[str, Any]:
    """Record `views` views of the training images, or what is missing of them; `answers` as many as are usual for so many
    classes, or as the tape has them, if not given. Returns `tape_info`, with the `seconds` that
    the recording itself took, the teacher's check aside. Raises UserError."""
    refuse_among_images(location, out)
    if answers is None and is_tape(out):
        answers = read_manifest(out).outputs
    refuse_other_folder(out, answers)
    dataset = load(location, config.data, progress)
    say_unlabelled(dataset, progress)
    if answers is None:
        answers = "all" if len(dataset.classes) <= MOST_RECORDED_CLASSES else "hard"
    config = resolve(config, dataset, location)
    if config.teacher.teacher == "auto":
        fitted = fit_automatically(location, dataset, config, out, progress)
        config = with_teacher(config, teacher=str(fitted))
    if views % config.view.repeated_aug:
        raise UserError(f"--views {views}: not a multiple of --repeated-aug {config.view.repeated_aug}")
    teacher, validation_N, accuracy = checked_teacher(config, dataset, default_device(), progress)
    warn_of_reduced(dataset, teacher.preprocessing, f"teacher {teacher.name}", progress.warn)
    data = data_facts(dataset, config.data.split_settings())
    manifest = make_manifest(teacher, data, dataset.classes, config.view, answers, views, accuracy)
    free = free_bytes(out)
    progress.say(
        f"recording {recording_size(manifest.views, manifest.images, manifest.bytes)}, to {out}; {file_size(free)} are free there"
    )
    tape = create(out, manifest, validation_N)
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
    )
    if teacher.state_hash() != tape.manifest.teacher["state"]:
        raise UserError(
            f"{path}: was recorded with another teacher ({tape.manifest.teacher['name']}) than {teacher.name}"
        )
    return verify(tape, dataset.open_split("train"), teacher, samples=samples, workers=workers)


def tape_info(path: Path) -> dict[str, Any]:
    """What is on a tape; plain values. Raises UserError."""
    tape = open_tape(path)
    manifest = tape.manifest
    return {
        "tape": str(path),
        "teacher": manifest.teacher["name"],
        "teacher_size": manifest.teacher_size,
        "teacher_top1": manifest.accuracy["top1"],
        "data": manifest.data["name"],
        "images": manifest.images,
        "classes": len(manifest.classes),
        "answers": manifest.outputs,
        "views": manifest.views,
        "complete_views": tape.complete_views(),
        "recorded": float(tape.complete().mean()),
        "record_bytes": manifest.record_bytes,
        "bytes": manifest.bytes,
        "view": manifest.view.model_dump(),
        "made_with": manifest.made_with,
    }
