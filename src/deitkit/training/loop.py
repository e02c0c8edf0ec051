"""The loop around the training step: epochs, evaluation, checkpoints, resume. Students and convolutional teachers share it.

A `Trainer` is built once, complete: what depends on the speed of a step is measured before (`measure_speed`). Several processes are
started by `launch` and joined by `make_accelerator`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
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
from deitkit.terminal import LOST_PEER, Progress, UserError, complain
from deitkit.training.evaluate import SplitLogits, score, split_logits_of_network
from deitkit.training.run import RunFolder
from deitkit.views.loader import Rows, TrainLoader
from deitkit.views.mixup import Batch

RATIO_STEPS = 8
"""The ratio of the gradients is computed every so many steps: it takes 133 operations, a step of a small student 450."""
USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143
PATIENCE_SECONDS = 20.0
"""How long the other processes may take to end by themselves once one has failed."""
INTERRUPT_SECONDS = 5.0
"""After which processes that the terminal has not interrupted are interrupted."""


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
            other = "CE(labels, second token)" if loss.distil == "labels" else f"{loss.distillation}(teacher)"
            self.progress.say(
                f"loss = {self.plan.label_weight:g} * CE(labels) + {self.plan.teacher_weight:g} * {other}"
            )
        if state.step:
            self.progress.say(f"resumed at step {state.step} of {self.plan.total_steps}")
        on_gpu = self.accelerator.device.type == "cuda"
        batches = self.loader.batches(state.step, self.plan.total_steps, pin_memory=on_gpu)
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
            result = train_step(state, batch, log.timed(self.teacher), plan, self.accelerator, batch.global_size)
            log.add(result, plan, batch.global_size)
            self.progress.step(state.step, log.images, log.waiting, log.teaching)
        unreadable = set(gather_object(list(log.unreadable)))
        for position in sorted(unreadable):
            self.progress.warn(f"{self.loader.split.name(position)}: cannot be read any more: left out of this run")
        second = "second_token" if plan.loss.distil == "labels" else "teacher"
        row = log.row(time.perf_counter() - started, second)
        if not math.isfinite(row["loss"]["total"]):
            raise self._diverged(epoch)
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

    def _diverged(self, epoch: int) -> UserError:
        kept = f"; the state after epoch {epoch} is kept in {self.run.checkpoints}" if epoch else ""
        return UserError(f"the training diverged in epoch {epoch + 1}: try a smaller --lr, or --max-grad-norm 1{kept}")

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
        self.sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
        self.ratio = torch.zeros(1, dtype=torch.float64, device=accelerator.device)
        self.steps = self.images = 0  # images: of all processes
        self.waiting = self.teaching = 0.0
        self.has_teacher = False
        self.unreadable: set[int] = set()
        """positions of the images that this process could not read"""
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
        if result.output is not None:
            self.has_teacher = True
            agreed = (plan.distilled(result.heads).detach().argmax(-1) == result.output.labels_B).sum() / global_size
        if self.steps % RATIO_STEPS == 0:
            self.ratio += gradient_ratio(result, plan) * len(result.batch.labels_B) / global_size
        figures = (result.loss, result.label_loss, result.teacher_loss, agreed)
        self.sums += torch.stack([figure.detach() for figure in figures])
        self.steps += 1
        self.images += global_size

    def row(self, seconds: float, second: str = "teacher") -> dict[str, Any]:
        """The epoch's line for the metrics; `second` is the name of the second loss term."""
        ratios = -(-self.steps // RATIO_STEPS)
        means = torch.cat([self.sums / max(1, self.steps), self.ratio / max(1, ratios)])
        total, label, other, agreed, ratio = self._accelerator.reduce(means, "sum").tolist()
        shares = torch.tensor([self.waiting, self.teaching], device=means.device) / max(seconds, 1e-9)
        waiting, teaching = self._accelerator.reduce(shares, "mean").tolist()
        return {
            "loss": {"total": total, "label": label, second: other, "gradient_ratio": ratio},
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
    for batch in loader.batches(0, min(steps, loader.steps_per_epoch)):
        train_step(state, batch, teacher, plan, accelerator, batch.global_size)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)  # since the last batch was done: waiting for data counts
        if max(gather_object([sum(seconds[first:])])) > most_seconds:  # all processes stop at the same step
            break
        started = time.perf_counter()
    return float(np.mean(seconds[first:] or seconds[-1:]))  # the mean, for workers hand over their batches in bursts


# ------------------------------------------------------------------------------------------------- processes


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


@contextlib.contextmanager
def preserved_global_state() -> Iterator[None]:
    """Whatever is done within this block, global random generators and `torch.use_deterministic_algorithms` are afterwards as before."""
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed, used = torch.initial_seed(), torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    of_gpus = torch.cuda.get_rng_state_all() if used else []
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if used:
            torch.cuda.set_rng_state_all(of_gpus)
        elif torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)  # what the first use of a GPU would have done


def launch(command: Sequence[str], count: int) -> int:
    """Run `command` in `count` processes of this machine, as `torchrun --standalone` would. Process 0 alone writes to the terminal. When
    one fails, the others are ended, and its last words and its exit code are the command's. Ctrl-C and SIGTERM reach all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outputs = [None, *(tempfile.TemporaryFile() for _ in range(count - 1))]  # noqa: SIM115
    processes: list[subprocess.Popen[bytes]] = []
    before = signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(TERMINATED)
    )  # else the others would outlive this process
    try:
        for rank, output in enumerate(outputs):
            environment = process_environment(rank, count, port)
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.05)
        hung = _end(processes, PATIENCE_SECONDS)
        failed = _culprit([0 if rank in hung else process.returncode for rank, process in enumerate(processes)])
        last_words, code = outputs[failed], processes[failed].returncode
        if code and last_words is not None:
            last_words.seek(0)
            sys.stderr.write(last_words.read().decode(errors="replace"))
        if code < 0:  # it could not say so itself
            why = ": perhaps there was not enough memory" if -code == signal.SIGKILL else ""
            complain(f"error: process {failed} of {count} was ended by signal {-code}{why}")
        return code if code >= 0 else 128 - code
    except KeyboardInterrupt:  # a terminal has sent it to all of them: let them end, and process 0 say so
        _end(processes, INTERRUPT_SECONDS, signal.SIGINT)
        _end(processes, PATIENCE_SECONDS)
        return INTERRUPTED
    except SystemExit:
        return TERMINATED
    finally:
        signal.signal(signal.SIGTERM, before)
        _end(processes, 0)
        for file in filter(None, outputs):
            file.close()


def process_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """The environment of process `rank` of `count` on this machine."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    threads = max(1, (os.cpu_count() or 1) // count)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        **{name: str(value) for name, value in own.items()},
    }


def _culprit(codes: Sequence[int]) -> int:
    """The rank of the process whose failure the others followed, from their own exit codes (0: none): a mistake in one line, else a
    signal, else a traceback; else one that only missed another one, or that NCCL aborted for that."""
    last = [LOST_PEER, -signal.SIGABRT, 0]

    def suspicion(rank: int) -> int:
        code = codes[rank]
        return 3 + last.index(code) if code in last else 0 if code == USER_ERROR else 1 if code < 0 else 2

    return min(range(len(codes)), key=suspicion)


def _end(
    processes: Sequence[subprocess.Popen[bytes]], patience: float, number: signal.Signals = signal.SIGTERM
) -> set[int]:
    """Let the processes end by themselves for so many seconds, then send the signal. Returns the ranks of those that had to be told;
    after SIGTERM all have ended."""
    deadline = time.monotonic() + patience
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    running = {rank for rank, process in enumerate(processes) if process.poll() is None}
    for rank in running:
        processes[rank].send_signal(number)
    for process in processes if number == signal.SIGTERM else ():
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return running
