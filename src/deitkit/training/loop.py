"""The training step on one screen, then the loop around it. A CNN teacher is fitted by the same loop."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, final

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from numpy.typing import NDArray
from torch import nn

from deitkit import rng
from deitkit.config import LoopConfig, LossConfig, OptimConfig, Size, ViewConfig
from deitkit.data import Split
from deitkit.distill.losses import LossTerms, TeacherOutput, distillation_loss, gradient_ratio
from deitkit.distill.optim import (
    check_optimizer_state,
    ema_update,
    eval_frozen_batchnorm,
    learning_rate,
    make_optimizer,
    set_trainable,
)
from deitkit.distill.teacher import Teacher, teacher_output
from deitkit.models.network import Heads, Network, autocast_dtype, default_device
from deitkit.rng import Purpose
from deitkit.terminal import Progress, UserError
from deitkit.training.evaluate import SplitLogits, score, split_logits_of_network
from deitkit.training.run import RunFolder
from deitkit.views.loader import Rows, TrainLoader, augment_and_mix
from deitkit.views.mixup import Batch, RawBatch

TeacherSource = Callable[[Batch], TeacherOutput | None]
"""Where the answers to a batch of views come from: a live teacher, a tape, or none."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides the weights that come out, resolved: no `None` means "find out"."""

    view: ViewConfig
    loss: LossConfig
    optim: OptimConfig
    loop: LoopConfig
    total_steps: int
    warmup_steps: int = 0
    """steps at the start in which the learning rate rises"""
    drop_rates: tuple[float, ...] = ()
    """stochastic depth: probability of dropping each residual branch; empty for none"""
    low_res_size: Size | None = None
    """height and width at which the network sees its images in the first `low_res_steps`; None: its own throughout"""
    low_res_fraction: float = 0.0
    """share of all steps that are those first ones"""
    head_steps: int = 0
    """steps at the start in which only `head_names` learn"""
    head_names: frozenset[str] = frozenset()
    trained_names: frozenset[str] | None = None
    """what learns at all; None: everything"""

    @property
    def low_res_steps(self) -> int:
        if self.low_res_size is None:
            return 0
        # The last step is of the network's own size, at which it is evaluated.
        return max(0, min(self.total_steps - 1, round(self.low_res_fraction * self.total_steps)))

    def phases(self) -> list[tuple[int, float]]:
        """First step and share of all steps, for those with small images and those with the network's own size."""
        if not self.low_res_steps:
            return [(0, 1.0)]
        return [(0, self.low_res_fraction), (self.low_res_steps, 1 - self.low_res_fraction)]


@dataclass(kw_only=True)
class State:
    """All that changes from step to step."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Network | None
    step: int = 0

    @cached_property
    def ema_tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Weights and statistics of the average and of the network. Found once: a walk through all modules takes a
        millisecond, and on a GPU a whole step of a small student twenty."""
        assert self.ema is not None
        means, values = ([*network.parameters(), *network.buffers()] for network in (self.ema, self.network))
        return means, values


class StepResult(NamedTuple):
    terms: LossTerms
    heads: Heads
    batch: Batch
    answers: TeacherOutput | None


def train_step(
    state: State, crops: RawBatch, teacher: TeacherSource, plan: Plan, accelerator: Accelerator, batch_size: int
) -> StepResult:
    """One step of DeiT. `batch_size` counts the images of this step over all processes."""
    lr = learning_rate(state.step, plan.total_steps, plan.warmup_steps, plan.loop.batch_size, plan.optim)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)

    # single training step
    batch = augment_and_mix(crops, plan.view, accelerator.device)
    answers = teacher(batch)
    keep_LB = stochastic_depth(plan, state.step, batch.index_B)
    size = plan.low_res_size if state.step < plan.low_res_steps else None
    heads = Heads(*state.network(batch.images_BCHW, keep_LB, size))
    terms = distillation_loss(heads, batch, answers, plan.loss, batch_size)
    accelerator.backward(terms.total * accelerator.num_processes)  # gradients are averaged over processes
    if plan.optim.max_grad_norm is not None:
        accelerator.clip_grad_norm_(state.network.parameters(), plan.optim.max_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        ema_update(*state.ema_tensors, plan.optim.ema_decay, state.step)
    state.step += 1
    return StepResult(terms, heads, batch, answers)


def stochastic_depth(plan: Plan, step: int, index_B: torch.Tensor) -> torch.Tensor | None:
    """What each residual branch is multiplied by, image by image: 0, or 1 / (1 - rate). Keyed by (seed, step, image,
    branch), so neither batch nor process count matters."""
    if not any(plan.drop_rates):
        return None
    rates_L = np.asarray(plan.drop_rates)
    drawn_BL = rng.uniform(plan.loop.seed, Purpose.STOCHASTIC_DEPTH, step, index_B.numpy(), len(rates_L))
    kept_LB: NDArray[np.float64] = ((drawn_BL >= rates_L) / (1 - rates_L)).T
    return torch.from_numpy(np.ascontiguousarray(kept_LB, np.float32))


def live_teacher(teacher: Teacher, loss: LossConfig) -> TeacherSource:
    """Ask `teacher` about every batch."""

    def answers(batch: Batch) -> TeacherOutput:
        said = teacher_output(teacher.forward(batch.images_BCHW))
        return said if loss.needs_logits else TeacherOutput(said.labels_B, None)

    return answers


def no_teacher(_batch: Batch) -> None:
    """A source that has no answers: training on labels alone."""


@final
@dataclass(kw_only=True)
class Trainer:
    """The loop: steps, an evaluation and a checkpoint after an epoch, resume."""

    network: Network
    plan: Plan
    loader: TrainLoader
    validation: Split
    run: RunFolder
    progress: Progress
    accelerator: Accelerator
    teacher: TeacherSource = no_teacher
    teacher_on_validation: torch.Tensor | None = None
    """its decisions on the validation images, -1 where one could not be read"""
    on_epoch: Callable[[Rows, set[int]], None] = lambda _rows, _unreadable: None
    """told, before the checkpoint, which images were shown in which views, and which of them could not be read"""
    seconds: float = 0.0
    """time spent in this loop so far, by all processes that ever resumed it"""
    seconds_before: float = 0.0
    """of these, those of processes before this one"""
    last_scores: dict[str, Any] = field(default_factory=dict)
    last_answers: SplitLogits | None = None
    """of the network that is kept to the validation images, where this process has asked it"""

    def train(self, *, resume: bool = False) -> Network:
        """Train to the end of the plan, from the start or the newest checkpoint. Returns the network that was evaluated:
        the moving average where there is one."""
        state = self.start()
        if resume:
            self._restore(state)
        self.progress.start(self.plan.total_steps, "training")
        if self.plan.loss.two_terms:
            other = (
                f"teacher's ({self.plan.loss.distillation})"
                if self.plan.loss.distil_target == "teacher"
                else "second token's"
            )
            self.progress.say(
                f"loss: {self.plan.loss.label_weight:g} x the labels' + {self.plan.loss.pull:g} x the {other}"
            )
        if state.step:
            self.progress.say(f"resumed at step {state.step} of {self.plan.total_steps}")
        crops = self.loader.batches(
            state.step, self.plan.total_steps, pin_memory=self.accelerator.device.type == "cuda"
        )
        started = time.perf_counter()
        while state.step < self.plan.total_steps:
            epoch = state.step // self.loader.steps_per_epoch
            torch.manual_seed(self.plan.loop.seed + epoch)  # for teachers' own dropout; a student draws by key
            row = self._epoch(state, crops, epoch)
            if (epoch + 1) % self.epochs_to_evaluation == 0 or state.step == self.plan.total_steps:
                row |= self._evaluate(state, epoch)
            self.seconds, started = self.seconds + time.perf_counter() - started, time.perf_counter()
            row["clock"]["seconds"] = self.seconds
            if self.accelerator.is_main_process:
                self.run.log("epoch", **row)
                self._save(state)
            self.progress.epoch({**row, "epochs": math.ceil(self.plan.total_steps / self.loader.steps_per_epoch)})
        self.progress.finish()
        return self._evaluated(state)

    @property
    def epochs_to_evaluation(self) -> int:
        """From one evaluation to the next: one epoch, or as many as show twice as many images as there are to validate on. An image
        costs a third of what it costs in training, so that evaluation takes a seventh of the time at most."""
        return math.ceil(2 * len(self.validation) / len(self.loader.split))

    def _evaluate(self, state: State, epoch: int) -> dict[str, Any]:
        """Look at the validation images. Returns what the epoch's line for the metrics has of it."""
        network, device = self._evaluated(state), self.accelerator.device
        answers = split_logits_of_network(network, self.validation, device, self.loader.workers)
        if not answers.finite:
            raise self._diverged(epoch)
        self.last_scores = score(answers, self.teacher_on_validation)
        self.last_answers = answers if state.step == self.plan.total_steps else None
        return {"top1": self.last_scores["top1"], "agreement": self.last_scores["agreement"]}

    def start(self) -> State:
        """The state before the first step: network, optimizer and average, on their device."""
        ema = copy.deepcopy(self.network) if self.plan.optim.ema_decay > 0 else None
        if ema is not None:
            ema.requires_grad_(False).to(self.accelerator.device)
        network: nn.Module = self.network.to(self.accelerator.device)
        if self.accelerator.num_processes > 1 and self.accelerator.device.type == "cuda":
            # Batch statistics over all processes, as one would have; torch offers this on GPUs only.
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        optimizer = make_optimizer(network, self.plan.optim)
        if self.plan.loop.compile:
            network.compile()
        network, prepared = self.accelerator.prepare(network, optimizer)
        return State(network=network, optimizer=prepared, ema=ema)

    def _epoch(self, state: State, crops: Any, epoch: int) -> dict[str, Any]:
        """The steps of one epoch, or what is left of them. Returns its line for the metrics."""
        log = EpochLog(self.accelerator)
        stop = min((epoch + 1) * self.loader.steps_per_epoch, self.plan.total_steps)
        self._thaw(state)
        started = time.perf_counter()
        while state.step < stop:
            if state.step == self.plan.head_steps:
                self._thaw(state)
            waited = time.perf_counter()
            batch = next(crops)
            log.waiting += time.perf_counter() - waited
            log.unreadable |= set(batch.index_M[batch.weight_M == 0].tolist())
            batch_size = len(self.loader.rows(state.step)[0])
            source = log.timed(self.teacher)
            result = train_step(state, batch, source, self.plan, self.accelerator, batch_size)
            log.add(result, self.plan.loss, batch_size)
            self.progress.step(state.step, log.images, log.waiting, log.teaching)
        unreadable = set(gather_object(list(log.unreadable)))
        for position in sorted(unreadable):
            self.progress.warn(
                f"{self.loader.split.name(position)}: cannot be read any more: counts nothing in this run"
            )
        row = log.row(time.perf_counter() - started, self.plan.loss.distil_target)
        if not math.isfinite(row["loss"]["total"]):
            raise self._diverged(epoch)
        index_N, view_N = self.loader.epoch(epoch)
        self.on_epoch((index_N[: log.images], view_N[: log.images]), unreadable)
        plan = self.plan
        lr = learning_rate(state.step - 1, plan.total_steps, plan.warmup_steps, plan.loop.batch_size, plan.optim)
        return {"epoch": epoch, "step": state.step, "lr": lr, **row}

    def _diverged(self, epoch: int) -> UserError:
        kept = f"; the state after epoch {epoch} is kept in {self.run.checkpoints}" if epoch else ""
        return UserError(f"the training diverged in epoch {epoch + 1}: try a smaller --lr, or --max-grad-norm 1{kept}")

    def _thaw(self, state: State) -> None:
        """Freeze all but the head for the first steps of a fitted teacher, then let everything learn."""
        network = self.accelerator.unwrap_model(state.network)
        if state.step < self.plan.head_steps:
            set_trainable(network, self.plan.head_names)
            network.eval()  # the running statistics of a frozen network stay as they are
        else:
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
        return Network(network.body, network.preprocessing)  # the same weights without the training's number format

    def _save(self, state: State) -> None:
        network = self.accelerator.unwrap_model(state.network)
        tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        if state.ema is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in state.ema.state_dict().items()}
        for number, slots in state.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{slot}": tensor for slot, tensor in slots.items()}
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
        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        self.accelerator.unwrap_model(state.network).load_state_dict(part("network."))
        if state.ema is not None:
            state.ema.load_state_dict(part("average."))
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in part("optimizer.").items():
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


RATIO_STEPS = 8
"""From one look at the ratio of the gradients to the next: a look is 133 operations, a step of a small student 450."""


class EpochLog:
    """Sums over the steps of an epoch, kept on the device: reading them out is a synchronisation point."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
        self.ratio = torch.zeros(1, dtype=torch.float64, device=accelerator.device)
        self.steps = self.images = 0  # images: of all processes
        self.waiting = self.teaching = 0.0
        self.taught = False
        self.unreadable: set[int] = set()
        """positions of the images that this process could not read"""
        self._accelerator = accelerator

    def timed(self, teacher: TeacherSource) -> TeacherSource:
        """`teacher`, with its seconds counted. On a GPU only the launch is seen: nothing waits for the figure."""

        def answers(batch: Batch) -> TeacherOutput | None:
            started = time.perf_counter()
            said = teacher(batch)
            self.teaching += time.perf_counter() - started
            return said

        return answers

    def add(self, result: StepResult, loss: LossConfig, batch_size: int) -> None:
        """`batch_size`: images of this step over all processes; this process adds its share to every figure."""
        terms, heads, batch, answers = result
        agreed = torch.zeros_like(terms.total)
        if answers is not None:
            self.taught = True
            distilled = heads.cls_BK if heads.dist_BK is None or loss.distil_head == "cls" else heads.dist_BK
            agreed = (distilled.detach().argmax(-1) == answers.labels_B).sum() / batch_size
        if self.steps % RATIO_STEPS == 0:
            self.ratio += gradient_ratio(heads, batch, answers, loss) * len(batch.labels_B) / batch_size
        self.sums += torch.stack([figure.detach() for figure in (*terms, agreed)])
        self.steps += 1
        self.images += batch_size

    def row(self, seconds: float, distil_target: str) -> dict[str, Any]:
        looks = -(-self.steps // RATIO_STEPS)
        means = torch.cat([self.sums / max(1, self.steps), self.ratio / max(1, looks)])
        total, label, second, agreed, ratio = self._accelerator.reduce(means, "sum").tolist()
        shares = torch.tensor([self.waiting, self.teaching], device=means.device) / max(seconds, 1e-9)
        waiting, teaching = self._accelerator.reduce(shares, "mean").tolist()
        term = "teacher" if distil_target == "teacher" else "second_token"
        return {
            "loss": {"total": total, "label": label, term: second, "gradient_ratio": ratio},
            "train_agreement": agreed if self.taught else None,
            "clock": {
                "images_per_second": self.images / max(seconds, 1e-9),
                "waiting_share": waiting,
                "teacher_share": teaching,
            },
        }


def make_accelerator(loop: LoopConfig, *, head_first: bool = False) -> Accelerator:
    """Accelerate's engine for these settings. Raises UserError where the processor lacks the precision."""
    device = default_device()
    computed_in = autocast_dtype(loop.precision, device)
    if loop.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
        torch.use_deterministic_algorithms(True)
    AcceleratorState._reset_state()  # another run in this process may have had another precision
    names = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
    # Without cpu=True Accelerate lets processes without a GPU train side by side, each alone.
    # A network whose head learns first leaves the other weights without gradients.
    frozen = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(
        mixed_precision=names[computed_in], cpu=device.type == "cpu", kwargs_handlers=[frozen] if head_first else []
    )
