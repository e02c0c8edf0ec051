"""The loop around the training step: epochs, evaluation, checkpoints, resume. Students and convolutional teachers share it.

A `Trainer` is built once, complete: what depends on the speed of a step is measured before (`measure_speed`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, final

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from deitkit.config import JobT
from deitkit.data import Dataset, Split
from deitkit.distill.optim import (
    eval_frozen_batchnorm,
    learning_rate,
    make_optimizer,
    set_trainable,
    warmup_steps,
)
from deitkit.distill.step import Plan, State, StepResult, train_step
from deitkit.distill.teacher import TeacherSource, no_teacher
from deitkit.lengths import length_in_steps
from deitkit.models.network import Network
from deitkit.settings import dotted, validated
from deitkit.terminal import Progress, UserError, plural
from deitkit.training.checkpoint import CheckpointClock, StopRequest, load_networks, load_state, state_tensors
from deitkit.training.epoch_log import EpochLog
from deitkit.training.evaluate import SplitLogits, calibrate, score, split_logits_of_network
from deitkit.training.run import RunFolder
from deitkit.training.tables import fused_or_only
from deitkit.views.loader import TrainLoader

SEED_STRIDE = 1_000_003
MOST_SKIPPED = 10
"""Steps in a row without an update, because of infinite or NaN losses or gradients, after which a training ends."""
STOPPING = "stopping after this step, with the state saved (again: at once)"
MEASURED_STEPS, MEASURED_SECONDS = 10, 30.0
"""Steps that are measured of each kind, and about how long at most."""
BUDGET_MARGIN = 0.97
"""Share of `--budget-minutes` that is planned: checkpoints and the odd slow step take the rest."""


class Best(NamedTuple):
    """The best evaluation of a training."""

    step: int
    share: float
    """its validation accuracy, balanced where the classes are to be"""
    evaluations: int
    """that followed and were no better"""


@final
@dataclass(kw_only=True)
class Trainer:
    """The loop: steps; an evaluation and a checkpoint after an epoch; resume."""

    network: Network
    plan: Plan
    loader: TrainLoader
    validation: Split
    run: RunFolder
    progress: Progress
    accelerator: Accelerator
    teacher: TeacherSource = no_teacher
    teacher_on_validation: torch.Tensor | None = None
    """the teacher's predictions for the validation images, -1 for one that it could not read"""
    criterion: Literal["top1", "balanced"] = "top1"
    """the score of the validation images by which the best weights are chosen"""
    seconds: float = 0.0
    """time spent in this loop so far, by all processes that ever resumed it"""
    seconds_before: float = 0.0
    """of these, those of processes before this one"""
    last_scores: dict[str, Any] = field(default_factory=dict)
    last_logits: SplitLogits | None = None
    """the trained network's for the validation images, if this process has computed them"""
    best: Best | None = None
    """the best evaluation so far"""
    last_step: int = 0
    """steps of the whole training: fewer than planned after an early stop"""
    skipped_in_a_row: int = 0
    unfinished: dict[str, Any] | None = None
    """what the epoch's log had in the checkpoint that was resumed, if it was within an epoch"""

    def __post_init__(self) -> None:
        self._clock, self._counted = CheckpointClock(self.accelerator), time.perf_counter()

    def train(self, *, resume: bool = False) -> Network:
        """Train to the end of the plan, from the start or the newest checkpoint. Returns the network that was evaluated: the EMA if
        there is one."""
        state = training_state(self.network, self.plan, self.accelerator)
        if resume:
            self._restore(state)
        self.progress.start(self.plan.total_steps, "training")
        if self.plan.loss.has_distill_term:
            self.progress.say(describe_loss(self.plan))
        if state.step:
            self.progress.say(f"resumed at step {state.step} of {self.plan.total_steps}")
        on_gpu = self.accelerator.device.type == "cuda"
        batches = self.loader.batches(
            state.step,
            self.plan.total_steps,
            small=self.plan.low_res_size,
            small_steps=self.plan.low_res_steps,
            pin_memory=on_gpu,
        )
        between = epochs_between_evaluations(self.validation, self.loader)
        epochs = math.ceil(self.plan.total_steps / self.loader.steps_per_epoch)
        self._counted = time.perf_counter()
        with StopRequest(lambda: self.progress.warn(STOPPING)) as stop:
            while state.step < self.plan.total_steps and not self._out_of_patience():
                epoch = state.step // self.loader.steps_per_epoch
                row = self._epoch(state, batches, epoch, stop)
                evaluated = (epoch + 1) % between == 0 or state.step == self.plan.total_steps
                if evaluated:
                    row |= self._evaluate(state, epoch)
                self._count_seconds()
                row["clock"]["seconds"] = self.seconds
                if self.accelerator.is_main_process:
                    self.run.log("epoch", **row)
                if evaluated:
                    self._compare_with_best(state)
                self._save(state)
                self.progress.epoch({**row, "epochs": epochs})
                self._track(row, state.step)
                stop.leave()
        self.progress.finish()
        self._track(None, state.step)
        self.last_step = state.step
        if self._out_of_patience() and self.best is not None:
            self.progress.say(
                f"stopped early: no better validation accuracy in {plural(self.best.evaluations, 'evaluation')}"
            )
        if self.plan.loop.keeps_best:
            self._load_best(state)
        return self._evaluated(state)

    def _track(self, row: dict[str, Any] | None, step: int) -> None:
        """Send an epoch's line to the tracker; None: it was the last one. A tracker that fails is given up: the training is worth more."""
        try:
            if row is not None:
                numbers = {name: value for name, value in dotted(row).items() if isinstance(value, int | float)}
                self.accelerator.log(numbers, step=step)
            for tracker in self.accelerator.trackers if row is None else ():
                tracker.finish()
        except Exception as error:
            self.progress.warn(f"the tracker has failed and gets nothing more: {error}")
            self.accelerator.trackers = []

    @property
    def trained_steps(self) -> int:
        """Steps that made the weights that are kept."""
        return self.best.step if self.best is not None and self.plan.loop.keeps_best else self.last_step

    def _out_of_patience(self) -> bool:
        patience = self.plan.loop.patience
        return patience is not None and self.best is not None and self.best.evaluations >= patience

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds, self._counted = self.seconds + now - self._counted, now

    def validation_logits(self, network: Network) -> SplitLogits:
        """Computed by all processes, each its share. Batch statistics are each process's own: all take those of the first one, which are
        saved."""
        share = (self.accelerator.process_index, self.accelerator.num_processes)
        if share[1] > 1:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)
        return split_logits_of_network(network, self.validation, self.accelerator.device, self.loader.workers, share)

    def _epoch(self, state: State, batches: Iterator[Any], epoch: int, stop: StopRequest) -> dict[str, Any]:
        """The steps of one epoch, or the rest of them. Returns its line for the metrics."""
        plan, log = self.plan, EpochLog(self.accelerator)
        if self.unfinished is not None:
            log.restore(self.unfinished)
            self.unfinished = None
        end = min((epoch + 1) * self.loader.steps_per_epoch, plan.total_steps)
        self._set_trainable(state)
        started = time.perf_counter()
        while state.step < end:
            # for teachers' own dropout; a student draws by key
            torch.manual_seed(SEED_STRIDE * plan.loop.seed + state.step)
            if state.step == plan.head_steps:
                self._set_trainable(state)
            waited = time.perf_counter()
            batch = next(batches)
            log.waiting += time.perf_counter() - waited
            log.unreadable |= set(batch.index_M[batch.weight_M == 0].tolist())
            result = train_step(state, batch, log.timed(self.teacher), plan, self.accelerator)
            log.add(result, plan, batch.global_size)
            self._note_skipped(result, state, log, epoch)
            self.progress.step(state.step, log.images, log.waiting, log.teaching)
            if state.step < end and self._clock.due(state.step, asked=stop.number is not None):
                self._save(state, log)
                stop.leave()
        unreadable = set(gather_object(list(log.unreadable)))
        for position in sorted(unreadable):
            self.progress.warn(f"{self.loader.split.name(position)}: cannot be read any more: left out of this run")
        second = "second_token" if plan.loss.second_token_learns_labels else "teacher"
        row = log.row(time.perf_counter() - started, second)
        if not math.isfinite(row["loss"]["total"]) or log.steps == 0:
            raise self._diverged(epoch, result)
        lr = learning_rate(state.step - 1, plan.total_steps, plan.warmup_steps, plan.loop.batch_size, plan.optim)
        return {"epoch": epoch, "step": state.step, "lr": lr, **row}

    def _evaluate(self, state: State, epoch: int) -> dict[str, Any]:
        """Score the validation images. Returns what the epoch's line for the metrics has of it."""
        logits = self.validation_logits(self._evaluated(state))
        if not logits.finite:
            raise self._diverged(epoch)
        self.last_scores = score(logits, self.teacher_on_validation)
        self.last_logits = logits if state.step == self.plan.total_steps else None
        return {"top1": self.last_scores["top1"], "agreement": self.last_scores["agreement"]}

    def _note_skipped(self, result: StepResult, state: State, log: EpochLog, epoch: int) -> None:
        """Log a step without an update, with its images. Raises UserError, with the state saved, after too many in a row; those in which a
        loss scale of 1 or more was found too large do not count: that is how it is found."""
        if result.finite:
            self.skipped_in_a_row = 0
            return
        why = "its loss or gradient is infinite or NaN: skipped"
        scale = self.accelerator.scaler.get_scale() if result.overflowed and self.accelerator.scaler else 0.0
        if result.overflowed:
            why = f"its gradient overflows in float16: skipped, the loss is now scaled by {scale:g}"
        self.skipped_in_a_row += scale < 1
        index_N = sorted(gather_object(result.batch.index_B.tolist()))
        if self.accelerator.is_main_process:
            self.run.log("skipped", step=state.step, images=index_N)
        self.progress.warn(f"step {state.step}: {why}")
        if self.skipped_in_a_row >= MOST_SKIPPED:
            self._save(state, log)
            raise self._diverged(epoch, result)

    def _diverged(self, epoch: int, result: StepResult | None = None) -> UserError:
        kept = f"; the state after epoch {epoch} is kept in {self.run.checkpoints}" if epoch else ""
        function = self.plan.loss_function
        name = getattr(function, "__name__", "distillation")
        if (
            result is not None
            and function is not None
            and not result.teacher_loss.isfinite()
            and (self.plan.distilled(result.heads).isfinite().all())
        ):
            return UserError(
                f"the loss function {name} returned NaN or infinity for finite logits in epoch {epoch + 1}{kept}"
            )
        gradient = "" if function is None else f", or look at the gradient of the loss function {name}"
        return UserError(
            f"the training diverged in epoch {epoch + 1}: try a smaller --lr, or --max-grad-norm 1{gradient}{kept}"
        )

    def _set_trainable(self, state: State) -> None:
        """Freeze all but the head in the first steps of a fitted teacher, then train everything that is to be trained."""
        network = self.accelerator.unwrap_model(state.network)
        if state.step < self.plan.head_steps:
            set_trainable(network, self.plan.head_names)
            network.eval()  # the running statistics of a frozen network stay as they are
            return
        if self.plan.trained_names is None:
            network.requires_grad_(True)
        else:
            set_trainable(network, self.plan.trained_names)
        state.network.train()
        eval_frozen_batchnorm(network)

    def _evaluated(self, state: State) -> Network:
        if state.ema is not None:
            return state.ema
        network = self.accelerator.unwrap_model(state.network)
        return Network(network.body, network.preprocessing)  # the same weights without the training's autocast

    # -------------------------------------------------------------------------------------------- checkpoints

    def _save(self, state: State, log: EpochLog | None = None) -> None:
        """Save a checkpoint; within an epoch with its `log`. Called by all processes, written by the first."""
        began = time.monotonic()
        self._count_seconds()
        epoch_log = None if log is None else log.state()
        if self.accelerator.is_main_process:
            self.run.save_checkpoint(state.step, state_tensors(state, self.accelerator), self._facts(epoch_log))
        self._clock.saved(time.monotonic() - began)

    def _facts(self, epoch_log: dict[str, Any] | None = None) -> dict[str, Any]:
        scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        best = None if self.best is None else self.best._asdict()
        return {
            "seconds": self.seconds,
            "scaler": scaler,
            "scores": self.last_scores,
            "best": best,
            "planned": self.plan.total_steps,
            "epoch_log": epoch_log,
        }

    def _restore(self, state: State) -> None:
        found = self.run.latest_checkpoint(self.progress.warn)
        if found is not None:
            try:
                self._load(state, *found)
            except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                raise self.run.damaged_checkpoint(error) from error
        if self.accelerator.is_main_process:  # one file for all processes
            self.run.rewind(state.step)

    def _load(self, state: State, tensors: dict[str, torch.Tensor], saved: dict[str, Any]) -> None:
        load_state(state, tensors, self.accelerator, complete=not self.plan.head_steps)
        if self.accelerator.scaler is not None and saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        evaluated = saved["step"] < self.plan.total_steps or "n" in saved["scores"]
        if not 0 < saved["step"] <= self.plan.total_steps or not evaluated:
            raise ValueError(f"its step {saved['step']} of {self.plan.total_steps} or its scores cannot be")
        state.step, self.last_scores = saved["step"], saved["scores"]
        self.seconds = self.seconds_before = float(saved["seconds"])
        self.best = None if saved.get("best") is None else Best(**saved["best"])
        if self.best is not None and saved.get("planned") != self.plan.total_steps:  # longer now: patience begins anew
            self.best = self.best._replace(evaluations=0)
        self.unfinished = saved.get("epoch_log")
        if self.unfinished is not None:
            EpochLog(self.accelerator).restore(self.unfinished)  # tried now, when a damaged one can be told

    # -------------------------------------------------------------------------------------------- best weights

    def _compare_with_best(self, state: State) -> None:
        """Keep the weights, EMA and raw ones, of the best evaluation, if the best or early stopping is asked for."""
        loop, share = self.plan.loop, fused_or_only(self.last_scores[self.criterion])
        if loop.patience is None and not loop.keeps_best:
            return
        if self.best is not None and share <= self.best.share:
            self.best = self.best._replace(evaluations=self.best.evaluations + 1)
            return
        self.best = Best(state.step, share, 0)
        if loop.keeps_best and self.accelerator.is_main_process:
            self.run.save_best(state.step, state_tensors(state, self.accelerator), self._facts())

    def _load_best(self, state: State) -> None:
        """Take the weights of the best evaluation; the last ones stay in the checkpoint."""
        tensors, saved = self.run.best_checkpoint()
        try:
            load_networks(state, tensors, self.accelerator)
            self.last_scores, self.last_logits = saved["scores"], None
            self.best = Best(**{**saved["best"], "step": saved["step"]})
            at = f"step {saved['step']} of {self.plan.total_steps}"
            self.progress.say(f"kept: the weights with the best validation accuracy, of {at}")
        except (KeyError, RuntimeError, TypeError) as error:
            raise UserError(f"{self.run.best}: damaged ({error}): give --keep last") from error


def training_state(network: Network, plan: Plan, accelerator: Accelerator) -> State:
    """The state before the first step: network, optimizer and EMA, on their device."""
    ema = copy.deepcopy(network) if plan.optim.ema_decay > 0 else None
    if ema is not None:
        ema.requires_grad_(False).to(accelerator.device)
    trained: nn.Module = network.to(accelerator.device)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # Batch statistics over all processes, as one would have; torch offers this on GPUs only.
        trained = nn.SyncBatchNorm.convert_sync_batchnorm(trained)  # type: ignore[no-untyped-call]
    optimizer = make_optimizer(trained, plan.optim)
    if plan.loop.compile:
        trained.compile()
    trained, prepared = accelerator.prepare(trained, optimizer)
    return State(network=trained, optimizer=prepared, ema=ema)


# ----------------------------------------------------------------------------------------------------- speed


def epochs_between_evaluations(validation: Split, loader: TrainLoader) -> int:
    """As many as show twice as many images as there are to validate on: an image costs a third of what it costs in training, so that
    evaluation takes a seventh of the time at most."""
    return math.ceil(2 * len(validation) / len(loader.split))


def measure_speed(
    network: Network,
    plan: Plan,
    loader: TrainLoader,
    validation: Split,
    teacher: TeacherSource,
    accelerator: Accelerator,
) -> tuple[float, float]:
    """Seconds of a step, the mean over the whole plan, and of evaluation per epoch, measured on copies in all processes: nothing of the
    run changes. Steps at a low resolution are measured apart, so many or so long of each kind."""
    network, scaler = copy.deepcopy(network), accelerator.scaler
    before = None if scaler is None else scaler.state_dict()
    state = training_state(network, plan, accelerator)
    state.network.train()
    step_seconds = 0.0
    for first_step, fraction in plan.phases():
        state.step = first_step
        step_seconds += fraction * _mean_step(state, plan, loader, teacher, accelerator)
    started = time.perf_counter()
    evaluated = Network(network.body, network.preprocessing)  # as a run evaluates it: not compiled
    share = (accelerator.process_index, accelerator.num_processes)
    split_logits_of_network(evaluated, validation, accelerator.device, loader.workers, share)
    evaluation_seconds = time.perf_counter() - started
    accelerator.free_memory()
    if scaler is not None:
        scaler.load_state_dict(before)
    return step_seconds, evaluation_seconds / epochs_between_evaluations(validation, loader)


def _mean_step(
    state: State,
    plan: Plan,
    loader: TrainLoader,
    teacher: TeacherSource,
    accelerator: Accelerator,
) -> float:
    """Seconds of a step, over some from where `state` is. The first do not count: workers start, and what is compiled is compiled,
    for up to two sizes of a batch."""
    first = 3 if plan.loop.compile else 1
    seconds: list[float] = []
    started = time.perf_counter()
    small_steps = MEASURED_STEPS if state.step < plan.low_res_steps else 0
    for batch in loader.batches(
        0, min(MEASURED_STEPS, loader.steps_per_epoch), small=plan.low_res_size, small_steps=small_steps
    ):
        train_step(state, batch, teacher, plan, accelerator)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)  # since the last batch was done: waiting for data counts
        if max(gather_object([sum(seconds[first:])])) > MEASURED_SECONDS:  # all processes stop at the same step
            break
        started = time.perf_counter()
    return float(np.mean(seconds[first:] or seconds[-1:]))  # the mean, for workers hand over their batches in bursts


# -------------------------------------------------------------------------------------------------- schedule


def clamp_batch_size(config: JobT, dataset: Dataset, progress: Progress) -> JobT:
    """`config` with no larger a batch than there are images, so that its learning rate is that of its steps. Raises UserError where
    other rates do not fit then."""
    asked, images = config.loop.batch_size, len(dataset.open_split("train"))
    if asked <= images:
        return config
    progress.say(
        f"--batch-size {asked}: there are {images} training images, so a batch is {images}; the learning rate is scaled to that"
    )
    values = config.model_dump()
    values["loop"]["batch_size"] = images
    return validated(type(config), values, f"batches of {images}")


def settle_steps(
    config: JobT, stored: JobT | None, steps_per_epoch: int, speed: Callable[[], tuple[float, float]]
) -> tuple[int, str]:
    """How many steps are made, and how minutes became steps: those that a resumed run (`stored`) began with; else `speed` measures the
    seconds of a step and of evaluation per epoch. Raises UserError where the warm-up is all of the steps."""
    minutes, note = config.loop.amount("min"), ""
    if minutes is None:
        steps = max(1, length_in_steps(config.loop.length, steps_per_epoch))
    elif stored is not None and stored.loop.steps is not None:
        steps = stored.loop.steps
    else:
        step_seconds, evaluation_seconds = speed()
        epoch_seconds = step_seconds * steps_per_epoch + evaluation_seconds
        measured = [BUDGET_MARGIN * 60 * minutes / epoch_seconds * steps_per_epoch]
        steps = max(1, math.floor(min(gather_object(measured))))  # as many as the slowest process makes
        note = f"; {minutes:g} min at {step_seconds:.3f} s a step"
    warmup = warmup_steps(config.optim, steps, steps_per_epoch)
    if warmup >= steps and warmup > 0:
        raise UserError(
            f"--warmup {config.optim.warmup}: its {warmup} steps are all of the training, {steps}: give less, such as 5%"
        )
    return steps, note


def describe_loss(plan: Plan) -> str:
    """`loss = 0.5 * CE(labels) + 0.5 * hard(teacher)`."""
    loss, label_loss = plan.loss, plan.loss.label_loss.upper()
    second = (
        f"{label_loss}(labels, second token)" if loss.second_token_learns_labels else f"{loss.distillation}(teacher)"
    )
    second += ", both heads" if loss.distil == "both" else ""
    terms = [(plan.label_weight, f"{label_loss}(labels)"), (plan.teacher_weight, second)]
    terms += [(plan.feature_weight, "cosine(teacher's features)")]
    return "loss = " + " + ".join(f"{weight:g} * {term}" for weight, term in terms if weight)


def describe_low_resolution(plan: Plan) -> str:
    """How long a plan has small images, if it has. Raises UserError where that is no step at all."""
    if plan.low_res_size is None:
        return ""
    pixels = min(plan.low_res_size)
    if plan.low_res_steps == 0:
        raise UserError(f"--low-res-size {pixels}: half of one step is none: give more steps, or leave it out")
    return f"the first {plan.low_res_steps} at {pixels} pixels, "


def calibrate_heads(trainer: Trainer, trained: Network) -> tuple[float, ...]:
    """Scale the heads to the validation images, and the scores with them. Tells if that changes a prediction of the fused heads. Returns
    the factors."""
    before = trainer.last_scores
    trainer.last_logits, scales = calibrate(trained, last_logits(trainer, trained))
    after = trainer.last_scores = score(trainer.last_logits, trainer.teacher_on_validation)
    if before["top1"]["fused"] != after["top1"]["fused"]:
        log_loss = f"{before['nll']:.3f} -> {after['nll']:.3f}"
        fused = f"{100 * before['top1']['fused']:.1f} -> {100 * after['top1']['fused']:.1f} %"
        trainer.progress.say(f"calibrated: log loss {log_loss}, fused accuracy {fused}")
    return scales


def last_logits(trainer: Trainer, trained: Network) -> SplitLogits:
    """The trained network's logits for the validation images; computed again if an earlier process did it."""
    if trainer.last_logits is None:
        trainer.last_logits = trainer.validation_logits(trained)
    return trainer.last_logits
