"""When the state of a training is saved, and what it consists of: network, EMA, optimizer."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self, final

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from deitkit.distill.optim import check_optimizer_state
from deitkit.distill.step import State
from deitkit.terminal import Terminated

Tensors = dict[str, torch.Tensor]
LEAST_SECONDS = 120.0
"""Between two checkpoints within an epoch."""
COST_SHARE = 0.02
"""Share of the time that checkpoints within an epoch may take."""
SAME_SIGNAL_SECONDS = 1.0
"""Within which a second signal is the first one once more: programs that start others forward what the whole group has got."""
STEPS_OF_PROCESSES = 16
"""Several processes agree on a checkpoint every so many steps."""


def state_tensors(state: State, accelerator: Accelerator) -> Tensors:
    """The tensors of network, EMA and optimizer, on the CPU, by name."""
    network = accelerator.unwrap_model(state.network)
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    if state.ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in state.ema.state_dict().items()}
    for number, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in moments.items()}
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def load_networks(state: State, tensors: Tensors, accelerator: Accelerator) -> dict[str, Tensors]:
    """Put a checkpoint's network and EMA into `state`. Returns the parts of the checkpoint. Raises KeyError, RuntimeError."""
    parts: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault({"average": "ema"}.get(part, part), {})[rest] = tensor  # `average`: version 0.1
    accelerator.unwrap_model(state.network).load_state_dict(parts["network"])
    if state.ema is not None:
        state.ema.load_state_dict(parts["ema"])
    return parts


def load_state(state: State, tensors: Tensors, accelerator: Accelerator, *, complete: bool) -> None:
    """Put a checkpoint into `state`. `complete`: whether the optimizer knows every weight by then. Raises KeyError, RuntimeError,
    ValueError where it does not fit."""
    parts = load_networks(state, tensors, accelerator)
    slots: dict[int, Tensors] = {}
    for name, tensor in parts.get("optimizer", {}).items():
        key, slot = name.split(".")
        slots.setdefault(int(key), {})[slot] = tensor
    weights = [weight for group in state.optimizer.param_groups for weight in group["params"]]
    missing = set(range(len(weights))) - set(slots) if complete else set()
    if missing or not all(check_optimizer_state(weights[number], moments) for number, moments in slots.items()):
        raise ValueError("the optimizer's state does not fit the network")
    for number, moments in slots.items():
        slots[number] = {slot: match_memory_format(weights[number], tensor) for slot, tensor in moments.items()}
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": slots, "param_groups": groups})


def match_memory_format(weight: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the memory layout of `weight`: fused AdamW goes through both as they lie, and a file knows no layout."""
    return torch.empty_like(weight).copy_(tensor) if tensor.shape == weight.shape else tensor


@final
class CheckpointClock:
    """Says after a step whether a checkpoint within the epoch is due: every few minutes, or so rarely that saving takes 2 % of the time."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._last, self._interval = time.monotonic(), LEAST_SECONDS

    def saved(self, seconds: float) -> None:
        """A checkpoint has been saved, which took so long."""
        self._last, self._interval = time.monotonic(), max(LEAST_SECONDS, seconds / COST_SHARE)

    def due(self, step: int, *, asked: bool) -> bool:
        """`asked`: whether this process is to be left. All processes get the same answer: they save together."""
        if self._accelerator.num_processes > 1 and step % STEPS_OF_PROCESSES:
            return False
        due = asked or time.monotonic() - self._last >= self._interval
        return due if self._accelerator.num_processes == 1 else any(gather_object([due]))


@final
class StopRequest:
    """Within the block Ctrl-C and SIGTERM are kept until the state is saved (`leave` raises then what they would have raised); a second
    one takes effect at once. Threads other than the main one get no signals."""

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.number: int | None = None
        self._on_first = on_first
        self._before: dict[int, Any] = {}
        self._heard_at = 0.0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        # the launcher of several processes ends those that do not end by themselves
        if self.number is None:
            self.number, self._heard_at = number, time.monotonic()
            self._on_first()
        elif "LOCAL_RANK" not in os.environ and time.monotonic() - self._heard_at >= SAME_SIGNAL_SECONDS:
            self.number = number
            self.leave()

    def leave(self) -> None:
        """Raises KeyboardInterrupt, or Terminated, if a signal has come."""
        if self.number == signal.SIGTERM:
            raise Terminated
        if self.number is not None:
            raise KeyboardInterrupt
