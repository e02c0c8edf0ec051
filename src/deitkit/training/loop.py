"""The loop around the training step: epochs, evaluation, checkpoints, resume. Students and convolutional teachers share it.

A `Trainer` is built once, complete: what depends on the speed of a step is measured before (`measure_speed`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from deitkit.config import JobT
from deitkit.data import Dataset, Split
from deitkit.distill.losses import TeacherOutput
from deitkit.distill.optim import (
    check_optimizer_state,
    eval_frozen_batchnorm,
    learning_rate,
    make_optimizer,
    set_trainable,
    warmup_steps,
)
from deitkit.distill.step import Plan, State, StepResult, gradient_ratio, train_step
from deitkit.distill.teacher import TeacherSource, no_teacher
from deitkit.lengths import length_in_steps
from deitkit.models.network import Network
from deitkit.settings import validated
from deitkit.terminal import Progress, UserError
from deitkit.training.evaluate import SplitLogits, calibrate, score, split_logits_of_network
from deitkit.training.run import RunFolder
from deitkit.views.loader import Rows, TrainLoader
from deitkit.views.mixup import Batch

RATIO_STEPS = 8
"""The ratio of the gradients is computed every so many steps: it takes 133 operations, a step of a small student 450."""
BUDGET_MARGIN = 0.97
"""Share of `--budget-minutes` that is planned: checkpoints and the odd slow step take the rest."""


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
    on_epoch: Callable[[Rows, set[int]], None] = lambda _rows, _unreadable: None
    """called before the checkpoint with the images and views that were shown, and the images that could not be read"""
    seconds: float = 0.0
    """time spent in this loop so far, by all processes that ever resumed it"""
    seconds_before: float = 0.0
    """of these, those of processes before this one"""
    last_scores: dict[str, Any] = field(default_factory=dict)
    last_logits: SplitLogits | None = None
    """the trained network's for the validation images, if this process has computed them"""

    def train(self, *, resume: bool = False) -> Network:
        """Train to the end of the plan, from the start or the newest checkpoint. Returns the network that was evaluated: the EMA if
        there is one."""
        state = training_state(self.network, self.plan, self.accelerator)
        if resume:
            self._restore(state)
        self.progress.start(self.plan.total_steps, "training")
        loss = self.plan.loss
        if loss.has_distill_term:
            label_loss = loss.label_loss.upper()
            second = (
                f"{label_loss}(labels, second token)"
                if loss.second_token_learns_labels
                else f"{loss.distillation}(teacher)"
            )
            terms = [(self.plan.label_weight, f"{label_loss}(labels)"), (self.plan.teacher_weight, second)]
            terms += [(self.plan.feature_weight, "cosine(teacher's features)")] if self.plan.feature_weight else []
            self.progress.say("loss = " + " + ".join(f"{weight:g} * {term}" for weight, term in terms))
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
        started = time.perf_counter()
        while state.step < self.plan.total_steps:
            epoch = state.step // self.loader.steps_per_epoch
            torch.manual_seed(self.plan.loop.seed + epoch)  # for teachers' own dropout; a student draws by key
            row = self._epoch(state, batches, epoch)
            if (epoch + 1) % between == 0 or state.step == self.plan.total_steps:
                row |= self._evaluate(state, epoch)
            self.seconds, started = self.seconds + time.perf_counter() - started, time.perf_counter()
            row["clock"]["seconds"] = self.seconds
            if self.accelerator.is_main_process:
                self.run.log("epoch", **row)
                self._save(state)
            self.progress.epoch({**row, "epochs": epochs})
        self.progress.finish()
        return self._evaluated(state)

    def validation_logits(self, network: Network) -> SplitLogits:
        """Computed by all processes, each its share."""
        share = (self.accelerator.process_index, self.accelerator.num_processes)
        return split_logits_of_network(network, self.validation, self.accelerator.device, self.loader.workers, share)

    def _epoch(self, state: State, batches: Iterator[Any], epoch: int) -> dict[str, Any]:
        """The steps of one epoch, or the rest of them. Returns its line for the metrics."""
        plan, log = self.plan, EpochLog(self.accelerator)
        stop = min((epoch + 1) * self.loader.steps_per_epoch, plan.total_steps)
        self._set_trainable(state)
        started = time.perf_counter()
        while state.step < stop:
            if state.step == plan.head_steps:
                self._set_trainable(state)
            waited = time.perf_counter()
            batch = next(batches)
            log.waiting += time.perf_counter() - waited
            log.unreadable |= set(batch.index_M[batch.weight_M == 0].tolist())
            result = train_step(state, batch, log.timed(self.teacher), plan, self.accelerator)
            log.add(result, plan, batch.global_size)
            self.progress.step(state.step, log.images, log.waiting, log.teaching)
        unreadable = set(gather_object(list(log.unreadable)))
        for position in sorted(unreadable):
            self.progress.warn(f"{self.loader.split.name(position)}: cannot be read any more: left out of this run")
        second = "second_token" if plan.loss.second_token_learns_labels else "teacher"
        row = log.row(time.perf_counter() - started, second)
        if not math.isfinite(row["loss"]["total"]):
            raise self._diverged(epoch, from_function=log.from_function)
        index_N, view_N = self.loader.epoch(epoch)
        self.on_epoch((index_N[: log.images], view_N[: log.images]), unreadable)
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

    def _diverged(self, epoch: int, *, from_function: bool = False) -> UserError:
        kept = f"; the state after epoch {epoch} is kept in {self.run.checkpoints}" if epoch else ""
        function = self.plan.loss_function
        name = getattr(function, "__name__", "distillation")
        if from_function:
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

    def _save(self, state: State) -> None:
        network = self.accelerator.unwrap_model(state.network)
        tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        if state.ema is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in state.ema.state_dict().items()}
        for number, moments in state.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in moments.items()}
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        self.run.save_checkpoint(
            state.step, tensors, {"seconds": self.seconds, "scaler": scaler, "scores": self.last_scores}
        )

    def _restore(self, state: State) -> None:
        found = self.run.latest_checkpoint()
        if found is not None:
            try:
                self._load(state, *found)
            except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                raise self.run.damaged_checkpoint(error) from error
        if self.accelerator.is_main_process:  # one file for all processes
            self.run.rewind(state.step)

    def _load(self, state: State, tensors: dict[str, torch.Tensor], saved: dict[str, Any]) -> None:
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault({"average": "ema"}.get(part, part), {})[rest] = tensor  # `average`: version 0.1
        self.accelerator.unwrap_model(state.network).load_state_dict(parts["network"])
        if state.ema is not None:
            state.ema.load_state_dict(parts["ema"])
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in parts.get("optimizer", {}).items():
            key, slot = name.split(".")
            slots.setdefault(int(key), {})[slot] = tensor
        weights = [weight for group in state.optimizer.param_groups for weight in group["params"]]
        missing = set() if self.plan.head_steps else set(range(len(weights))) - set(slots)
        if missing or not all(check_optimizer_state(weights[number], moments) for number, moments in slots.items()):
            raise ValueError("the optimizer's state does not fit the network")
        for number, moments in slots.items():
            slots[number] = {slot: match_memory_format(weights[number], tensor) for slot, tensor in moments.items()}
        groups = state.optimizer.state_dict()["param_groups"]
        state.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        if self.accelerator.scaler is not None and saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        evaluated = saved["step"] < self.plan.total_steps or "n" in saved["scores"]
        if not 0 < saved["step"] <= self.plan.total_steps or not evaluated:
            raise ValueError(f"its step {saved['step']} of {self.plan.total_steps} or its scores cannot be")
        state.step, self.last_scores = saved["step"], saved["scores"]
        self.seconds = self.seconds_before = float(saved["seconds"])


def match_memory_format(weight: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the memory layout of `weight`: fused AdamW goes through both as they lie, and a file knows no layout."""
    return torch.empty_like(weight).copy_(tensor) if tensor.shape == weight.shape else tensor


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


class EpochLog:
    """Sums over the steps of an epoch, kept on the device: reading them is a synchronisation point."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
        self.ratio = torch.zeros(1, dtype=torch.float64, device=accelerator.device)
        self.steps = self.images = 0  # images: of all processes
        self.waiting = self.teaching = 0.0
        self.has_teacher = self.has_features = False
        self.unreadable: set[int] = set()
        """positions of the images that this process could not read"""
        self.from_function = False
        """whether the user's loss function gave NaN or infinity for finite logits"""
        self._accelerator = accelerator

    def timed(self, teacher: TeacherSource) -> TeacherSource:
        """`teacher`, with its seconds counted. On a GPU that is the launch only: nothing waits for the figure."""

        def output(batch: Batch) -> TeacherOutput | None:
            started = time.perf_counter()
            found = teacher(batch)
            self.teaching += time.perf_counter() - started
            return found

        return output

    def add(self, result: StepResult, plan: Plan, global_size: int) -> None:
        """`global_size`: images of this step over all processes; this process adds its share to every figure."""
        agreed = torch.zeros_like(result.loss)
        self.has_features = result.feature_loss is not None
        if result.output is not None and plan.loss.distillation != "features":
            self.has_teacher = True
            agreed = (plan.distilled(result.heads).detach().argmax(-1) == result.output.labels_B).sum() / global_size
        if self.steps % RATIO_STEPS == 0:
            self.ratio += gradient_ratio(result, plan) * len(result.batch.labels_B) / global_size
        if (
            plan.loss_function is not None and not self.from_function and not result.teacher_loss.isfinite()
        ):  # waits for a GPU
            self.from_function = bool(plan.distilled(result.heads).isfinite().all())
        features = agreed.new_zeros(()) if result.feature_loss is None else result.feature_loss
        figures = (result.loss, result.label_loss, result.teacher_loss, agreed, features)
        self.sums += torch.stack([figure.detach() for figure in figures])
        self.steps += 1
        self.images += global_size

    def row(self, seconds: float, second: str = "teacher") -> dict[str, Any]:
        """The epoch's line for the metrics; `second` is the name of the second loss term."""
        ratios = -(-self.steps // RATIO_STEPS)
        means = torch.cat([self.sums / max(1, self.steps), self.ratio / max(1, ratios)])
        total, label, other, agreed, features, ratio = self._accelerator.reduce(means, "sum").tolist()
        shares = torch.tensor([self.waiting, self.teaching], device=means.device) / max(seconds, 1e-9)
        waiting, teaching = self._accelerator.reduce(shares, "mean").tolist()
        return {
            "loss": {
                "total": total,
                "label": label,
                second: other,
                **({"features": features} if self.has_features else {}),
                "gradient_ratio": ratio,
            },
            "train_agreement": agreed if self.has_teacher else None,
            "clock": {
                "images_per_second": self.images / max(seconds, 1e-9),
                "waiting_share": waiting,
                "teacher_share": teaching,
            },
        }


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
    *,
    steps: int = 10,
    most_seconds: float = 30.0,
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
        step_seconds += fraction * _mean_step(state, plan, loader, teacher, accelerator, steps, most_seconds)
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
    steps: int,
    most_seconds: float,
) -> float:
    """Seconds of a step, over so many from where `state` is. The first do not count: workers start, and what is compiled is compiled,
    for up to two sizes of a batch."""
    first = 3 if plan.loop.compile else 1
    seconds: list[float] = []
    started = time.perf_counter()
    small_steps = steps if state.step < plan.low_res_steps else 0
    for batch in loader.batches(
        0, min(steps, loader.steps_per_epoch), small=plan.low_res_size, small_steps=small_steps
    ):
        train_step(state, batch, teacher, plan, accelerator)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)  # since the last batch was done: waiting for data counts
        if max(gather_object([sum(seconds[first:])])) > most_seconds:  # all processes stop at the same step
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
        note = f"; {minutes:g} minutes at {step_seconds:.3f} s a step"
    warmup = warmup_steps(config.optim, steps, steps_per_epoch)
    if warmup >= steps and warmup > 0:
        raise UserError(
            f"--warmup {config.optim.warmup}: its {warmup} steps are all of the training, {steps}: give less, such as 5%"
        )
    return steps, note


def describe_low_resolution(plan: Plan) -> str:
    """How long a plan has small images, if it has. Raises UserError where that is no step at all."""
    if plan.low_res_size is None:
        return ""
    pixels = min(plan.low_res_size)
    if plan.low_res_steps == 0:
        raise UserError(
            f"--low-res-size {pixels}: a share of {plan.low_res_fraction:g} of {plan.total_steps} steps is none of them: "
            f"give more steps, a larger --low-res-fraction, or leave it out"
        )
    return f"the first {plan.low_res_steps} at {pixels} pixels, "


def calibrate_heads(trainer: Trainer, trained: Network) -> tuple[float, ...]:
    """Scale the heads to the validation images, and the scores with them. Tells if that changes a prediction of the fused heads. Returns
    the factors."""
    before = trainer.last_scores
    trainer.last_logits, scales = calibrate(trained, last_logits(trainer, trained))
    after = trainer.last_scores = score(trainer.last_logits, trainer.teacher_on_validation)
    if before["top1"]["fused"] != after["top1"]["fused"]:
        ece, fused = (
            f"{100 * x:.1f} -> {100 * y:.1f} %"
            for x, y in ((before["ece"], after["ece"]), (before["top1"]["fused"], after["top1"]["fused"]))
        )
        trainer.progress.say(f"calibrated: error {ece}, fused accuracy {fused}")
    return scales


def last_logits(trainer: Trainer, trained: Network) -> SplitLogits:
    """The trained network's logits for the validation images; computed again if an earlier process did it."""
    if trainer.last_logits is None:
        trainer.last_logits = trainer.validation_logits(trained)
    return trainer.last_logits
