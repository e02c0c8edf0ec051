"""One training from its settings to its summary: what students and fitted teachers share."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from deitkit.config import JobConfig, JobT, RunConfig
from deitkit.data import Dataset, refuse_among_images
from deitkit.distill.step import Plan
from deitkit.distill.tape import refuse_other_folder
from deitkit.models.network import Network, autocast_dtype
from deitkit.models.zoo import ModelCard, forward_seconds, network_costs, save_model
from deitkit.terminal import Progress, UserError, plural
from deitkit.training.loop import (
    Trainer,
    clamp_batch_size,
    describe_low_resolution,
    last_logits,
    measure_speed,
    settle_steps,
)
from deitkit.training.memory import say_memory, with_fitting_batch
from deitkit.training.predictions import predictions_of, write_predictions
from deitkit.training.processes import start_tracking
from deitkit.training.run import RunFolder, inherit_precision, refuse_difference
from deitkit.training.setup import load, train_loader
from deitkit.training.tables import coarseness
from deitkit.training.teaching import Teaching, recorded
from deitkit.views.loader import cut

UNPLANNED_STEPS = 10**6
"""Of a plan whose speed is measured: its steps are not known yet."""


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
            self.folder.refuse_existing(type(config))
        elif os.environ.get("RANK", "0") == "0":
            self.folder.lock()
        refuse_among_images(self.location, self.folder.path)
        if isinstance(config, RunConfig) and config.teacher.record is not None:
            _refuse_record(Path(config.teacher.record), self.location, self.folder)
        dataset = dataset or load(self.location, config.data, self.progress)
        if before is not None:
            self.folder.refuse_other_data(dataset.names_hash())
        return dataset, clamp_batch_size(inherit_precision(config, before), dataset, self.progress), before


def _refuse_record(tape: Path, location: str, folder: RunFolder) -> None:
    """Raises UserError where a tape cannot be recorded in this folder. In its run's folder it would keep the run from being started."""
    if tape.resolve().is_relative_to(folder.path.resolve()):
        raise UserError(f"--record {tape}: lies in the folder of the run, {folder.path}: give it one of its own")
    refuse_among_images(location, tape)
    refuse_other_folder(tape, None)


def planned_trainer(
    job: Job,
    config: JobT,
    network: Network,
    plan_of: Callable[[JobT, int, int], Plan],
    dataset: Dataset,
    teaching: Teaching,
    accelerator: Accelerator,
    first: str = "",
) -> tuple[Trainer, Teaching, JobT]:
    """The trainer of `network`, ready to start, in its folder; the teaching, recorded if that was asked for; the settings with their
    length in steps. `plan_of` makes a plan of settings, steps and steps per epoch. One line tells the plan, with what comes `first`.
    Raises UserError."""
    validation = dataset.open_split("val")
    if config.loop.shrink_batch and not job.resume:
        config = with_fitting_batch(config, network, len(validation), accelerator, job.progress)
    loader = train_loader(config, dataset, accelerator, teaching.teacher)

    def speed() -> tuple[float, float]:
        plan = plan_of(config, UNPLANNED_STEPS, loader.steps_per_epoch)
        return measure_speed(network, plan, loader, validation, teaching.source, accelerator)

    stored = job.folder.config(type(config)) if job.resume else None
    steps, note = settle_steps(config, stored, loader.steps_per_epoch, speed)
    settled = config.changed(loop={"length": f"{steps}st"})
    if stored is not None:
        refuse_difference(_extended(stored, settled), settled, job.folder)
    plan = plan_of(settled, steps, loader.steps_per_epoch)
    resolution = describe_low_resolution(plan)
    # before the run's folder is made, for a tape may be refused
    if isinstance(settled, RunConfig) and settled.teacher.record is not None:
        teaching = recorded(teaching, settled, dataset, accelerator, steps, job.progress)
        loader = train_loader(settled, dataset, accelerator)  # the teacher's views need no rendering any more
    epochs = f"{steps / loader.steps_per_epoch:.1f}".removesuffix(".0")
    job.progress.say(
        f"plan: {first}{plural(steps, 'step')} ({epochs} epoch{'' if epochs == '1' else 's'}{note}), {resolution}{teaching.description}"
    )
    job.progress.say(f"data: {len(loader.split):,} training and {len(validation):,} validation images")
    if line := coarseness(len(validation)):
        job.progress.say(line)
    if not first:  # a fit that may end before its first step says it later
        say_memory(network, settled, loader, validation, accelerator, job.progress)
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
        criterion="balanced" if plan.class_weights or settled.data.oversample else "top1",
    )
    if accelerator.is_main_process:
        job.folder.lock()
        if not job.resume:
            job.folder.create(settled, dataset.names_hash())
        elif stored is not None and settled != stored:
            job.folder.extend(settled, stored.loop.steps)
    accelerator.wait_for_everyone()
    start_tracking(accelerator, settled, job.folder.path)
    return trainer, teaching, settled


def _extended(stored: JobT, given: JobT) -> JobT:
    """The settings of a run that is resumed; with the length that is `given` where a student is to be trained longer."""
    steps, more = stored.loop.steps, given.loop.steps
    if not isinstance(stored, RunConfig) or steps is None or more is None or more <= steps:
        return stored
    return stored.changed(loop={"length": f"{more}st"})


def finished_before(job: Job, config: JobT, dataset: Dataset) -> dict[str, Any] | None:
    """The summary of a finished run that was to be resumed with these settings; None if it is to be trained longer. Raises UserError where
    they differ otherwise."""
    stored = job.folder.config(type(config))
    steps_per_epoch = -(-len(dataset.open_split("train")) // config.loop.batch_size)
    steps, _ = settle_steps(config, stored, steps_per_epoch, lambda: (math.inf, 0.0))
    given = config.changed(loop={"length": f"{steps}st"})
    if isinstance(given, RunConfig) and isinstance(stored, RunConfig):
        given = given.model_copy(update=_what_its_teacher_decided(given, stored))
    if _extended(stored, given) != stored:
        return None
    refuse_difference(stored, given, job.folder)
    job.progress.say(f"{job.folder.path}: already finished")
    return job.folder.summary()


def _what_its_teacher_decided(given: RunConfig, stored: RunConfig) -> dict[str, Any]:
    """The sections of `given` that leave open what was settled once the teacher of the `stored` run was there, with that filled in."""
    changes: dict[str, Any] = {}
    if given.teacher.teacher == "auto":
        changes["teacher"] = stored.teacher
    if given.loss.feature_weight is None:
        changes["loss"] = given.loss.model_copy(update={"feature_weight": stored.loss.feature_weight})
    if given.view.views is None:
        changes["view"] = given.view.model_copy(update={"views": stored.view.views})
    return changes


def finish(
    job: Job,
    trainer: Trainer,
    trained: Network,
    card: ModelCard,
    config: JobConfig,
    teaching: Teaching,
    dataset: Dataset,
    steps: int,
) -> dict[str, Any]:
    """Save the model, write the summary, and return it. `steps`: those that made the weights."""
    scores, loader = trainer.last_scores, trainer.loader
    whole_epochs, rest = divmod(steps, loader.steps_per_epoch)
    logits = last_logits(trainer, trained)
    teacher_costs, teacher_seconds = teaching.costs
    seconds_per_image, untrained = None, {}
    if isinstance(config, RunConfig):
        untrained = {} if config.loss.trains_heads else {"untrained_heads": True}
        computed_in = autocast_dtype(config.loop.precision, trainer.accelerator.device)
        seconds_per_image = {"student": forward_seconds(trained, computed_in), "teacher": teacher_seconds}
    summary = {
        "name": job.folder.path.resolve().name,
        "model": card.name,
        "data": config.data.location,
        "split": "val",
        "classes": len(card.classes),
        "has_test": dataset.has_test,
        "teacher": teaching.facts and {**teaching.facts, **teacher_costs},
        **scores,
        **untrained,
        "token_cosine": logits.token_cosine,
        **network_costs(trained),
        "steps": steps,
        "epochs": steps / loader.steps_per_epoch,
        "images_seen": whole_epochs * len(loader.split) + cut(len(loader.split), loader.steps_per_epoch, rest)[0],
        "seconds_per_image": seconds_per_image,
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
        # now the run is finished, whatever happens to what can be made again
        predictions = predictions_of(
            logits.heads, logits.labels_N, logits.readable_N, trainer.validation, trainer.teacher_on_validation
        )
        try:
            write_predictions(job.folder.evaluation("val").predictions, predictions, card.classes)
        except UserError as error:
            job.progress.warn(str(error))
    trainer.accelerator.wait_for_everyone()  # whoever comes next reads the model
    return summary
