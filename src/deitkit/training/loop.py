"""The loop around the training step: epochs, evaluation, checkpoints, resume. A CNN teacher is fitted by the same loop."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import nn

from deitkit.config import LoopConfig
from deitkit.data import Split
from deitkit.distill.losses import TeacherOutput
from deitkit.distill.optim import (
    check_optimizer_state,
    eval_frozen_batchnorm,
    learning_rate,
    make_optimizer,
    set_trainable,
)
from deitkit.distill.step import Plan, State, StepResult, gradient_ratio, train_step
from deitkit.distill.teacher import TeacherSource, no_teacher
from deitkit.models.network import Network, autocast_dtype, default_device
from deitkit.terminal import Progress, UserError
from deitkit.training.evaluate import SplitLogits, score, split_logits_of_network
from deitkit.training.run import RunFolder
from deitkit.views.loader import Rows, TrainLoader
from deitkit.views.mixup import Batch


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
        loss = self.plan.loss
        if loss.has_distill_term:
            other = "CE(labels, second token)" if loss.distil == "labels" else f"{loss.distillation}(teacher)"
            self.progress.say(
                f"loss = {self.plan.label_weight:g} * CE(labels) + {self.plan.teacher_weight:g} * {other}"
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
            batch_size = batch.global_size
            source = log.timed(self.teacher)
            result = train_step(state, batch, source, self.plan, self.accelerator, batch_size)
            log.add(result, self.plan, batch_size)
            self.progress.step(state.step, log.images, log.waiting, log.teaching)
        unreadable = set(gather_object(list(log.unreadable)))
        for position in sorted(unreadable):
            self.progress.warn(
                f"{self.loader.split.name(position)}: cannot be read any more: counts nothing in this run"
            )
        row = log.row(time.perf_counter() - started)
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
        self.has_teacher = False
        self.unreadable: set[int] = set()
        """positions of the images that this process could not read"""
        self._accelerator = accelerator

    def timed(self, teacher: TeacherSource) -> TeacherSource:
        """`teacher`, with its seconds counted. On a GPU only the launch is seen: nothing waits for the figure."""

        def output(batch: Batch) -> TeacherOutput | None:
            started = time.perf_counter()
            found = teacher(batch)
            self.teaching += time.perf_counter() - started
            return found

        return output

    def add(self, result: StepResult, plan: Plan, batch_size: int) -> None:
        """`batch_size`: images of this step over all processes; this process adds its share to every figure."""
        agreed = torch.zeros_like(result.loss)
        if result.output is not None:
            self.has_teacher = True
            agreed = (plan.distilled(result.heads).detach().argmax(-1) == result.output.labels_B).sum() / batch_size
        if self.steps % RATIO_STEPS == 0:
            self.ratio += gradient_ratio(result, plan) * len(result.batch.labels_B) / batch_size
        figures = (result.loss, result.label_loss, result.teacher_loss, agreed)
        self.sums += torch.stack([figure.detach() for figure in figures])
        self.steps += 1
        self.images += batch_size

    def row(self, seconds: float) -> dict[str, Any]:
        """The epoch's line for the metrics; `teacher` is the second loss term, whoever it is to."""
        ratios = -(-self.steps // RATIO_STEPS)
        means = torch.cat([self.sums / max(1, self.steps), self.ratio / max(1, ratios)])
        total, label, second, agreed, ratio = self._accelerator.reduce(means, "sum").tolist()
        shares = torch.tensor([self.waiting, self.teaching], device=means.device) / max(seconds, 1e-9)
        waiting, teaching = self._accelerator.reduce(shares, "mean").tolist()
        return {
            "loss": {"total": total, "label": label, "teacher": second, "gradient_ratio": ratio},
            "train_agreement": agreed if self.has_teacher else None,
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
