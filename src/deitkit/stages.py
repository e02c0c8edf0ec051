"""What a training and the fit of a teacher have in common: steps planned, a run begun or found finished, its end written down."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from accelerate.utils import gather_object

from deitkit.calibration import calibrate
from deitkit.config import DataConfig, JobT, LoopConfig, ModelCard, OptimConfig, RunConfig
from deitkit.data import Dataset
from deitkit.errors import UserError
from deitkit.evaluation import SplitAnswers, answer_split_with_network, score
from deitkit.feed import cut
from deitkit.network import Network
from deitkit.optim import warmup_steps
from deitkit.progress import Progress
from deitkit.resuming import refuse_difference
from deitkit.run import RunFolder
from deitkit.settings import merge, validated
from deitkit.speed import measure_speed
from deitkit.training import Trainer
from deitkit.vit import ViT
from deitkit.zoo import multiply_adds, parameter_count, save_model

BUDGET_MARGIN = 0.97
"""Share of `--budget-minutes` that is planned: checkpoints and the odd slow step take the rest."""


def with_fitting_batch(config: JobT, dataset: Dataset, progress: Progress) -> JobT:
    """`config` with no larger a batch than there are images: its learning rate is that of the steps that are made. Raises
    UserError where other rates do not fit then."""
    asked, images = config.loop.batch_size, len(dataset.open_split("train"))
    if asked <= images:
        return config
    progress.say(
        f"--batch-size {asked}: there are {images} training images, so a batch is {images}; the learning rate is scaled to that"
    )
    values = merge(config.model_dump(), {"loop": {"batch_size": images}})
    return validated(type(config), values, f"batches of {images}")


def planned(trainer: Trainer, config: JobT, folder: RunFolder, *, resume: bool, head_share: float = 0.0) -> JobT:
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
    if loop.steps is not None:
        return loop.steps
    if loop.budget_minutes is None:
        return loop.epochs * trainer.feed.steps_per_epoch
    step_seconds, evaluation_seconds = measure_speed(trainer)
    epoch_seconds = step_seconds * trainer.feed.steps_per_epoch + evaluation_seconds / trainer.epochs_to_evaluation
    measured = [BUDGET_MARGIN * 60 * loop.budget_minutes / epoch_seconds * trainer.feed.steps_per_epoch]
    steps: int = max(1, math.floor(min(gather_object(measured))))  # as many as the slowest process makes
    trainer.progress.say(
        f"{loop.budget_minutes:g} minutes: {steps} steps of {step_seconds:.3f} s, "
        f"{steps / trainer.feed.steps_per_epoch:.1f} epochs"
    )
    return steps


def _with_steps(config: JobT, steps: int | None) -> JobT:
    return config.model_copy(update={"loop": config.loop.model_copy(update={"steps": steps, "budget_minutes": None})})


def _warmup(trainer: Trainer, optim: OptimConfig, steps: int) -> int:
    """Steps of the warm-up. Raises UserError where epochs of it leave nothing of the training."""
    warmup = warmup_steps(optim, steps, trainer.feed.steps_per_epoch)
    if optim.warmup_epochs is not None and warmup >= steps:
        raise UserError(
            f"--warmup-epochs {optim.warmup_epochs:g}: its {warmup} steps leave nothing of {steps}: "
            f"give fewer, or --warmup-share instead"
        )
    return warmup


def _say_small_steps(trainer: Trainer) -> None:
    """Until which step the student sees small images. Raises UserError where that is none."""
    plan = trainer.plan
    if plan.small_size is None:
        return
    pixels = min(plan.small_size)
    if plan.small_steps == 0:
        raise UserError(
            f"--small-size {pixels}: a share of {plan.small_share:g} of {plan.total_steps} steps is none of them: "
            f"give more steps, a larger --small-share, or leave it out"
        )
    trainer.progress.say(f"the first {plan.small_steps} of {plan.total_steps} steps see images of {pixels} pixels")


def begin(trainer: Trainer, config: JobT, folder: RunFolder, dataset: Dataset, *, resume: bool) -> None:
    """Keep other processes away, and write down the resolved configuration and what the data are, unless they are there."""
    if trainer.accelerator.is_main_process:
        folder.lock()
        if not resume:
            folder.create(config, dataset.outline())
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
        "epochs": trainer.plan.total_steps / trainer.feed.steps_per_epoch,
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


def _last_answers(trainer: Trainer, trained: Network) -> SplitAnswers:
    """What the trained network says of the validation images: it is asked where a process before this one did that."""
    if trainer.last_answers is None:
        device, workers = trainer.accelerator.device, trainer.feed.workers
        trainer.last_answers = answer_split_with_network(trained, trainer.validation, device, workers)
    return trainer.last_answers


def _token_cosine(trainer: Trainer, trained: Network) -> list[float] | None:
    body = trained.body
    if not isinstance(body, ViT) or body.dist_token is None:
        return None
    return _last_answers(trainer, trained).token_cosine


def _images_seen(trainer: Trainer) -> int:
    feed = trainer.feed
    whole, rest = divmod(trainer.plan.total_steps, feed.steps_per_epoch)
    return whole * len(feed.split) + cut(len(feed.split), feed.steps_per_epoch, rest)[0]
