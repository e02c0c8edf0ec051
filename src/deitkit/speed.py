"""How long a step and an evaluation take on this machine, for a time limit that becomes steps before the first one."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import numpy as np
import torch

from deitkit.evaluation import answer_split_with_network
from deitkit.network import Network
from deitkit.optim import make_optimizer
from deitkit.training import Plan, State, Trainer, train_step


def measure_speed(trainer: Trainer, *, steps: int = 10, most_seconds: float = 30.0) -> tuple[float, float]:
    """Seconds of a step, the mean over the whole run, and of one evaluation, measured on copies: nothing of the run changes.
    With small images at first, both kinds of steps are measured, so many or so long of each."""
    accelerator, plan = trainer.accelerator, replace(trainer.plan, total_steps=10**6)
    network = copy.deepcopy(trainer.network).to(accelerator.device).train()
    average = copy.deepcopy(network) if plan.optim.ema_decay > 0 else None
    state = State(network=network, optimizer=make_optimizer(network, plan.optim), average=average)
    if plan.loop.compile:
        network.compile()
    seconds = 0.0
    for first_step, share in plan.phases():
        state.step = first_step
        seconds += share * mean_step(trainer, state, plan, steps, most_seconds)
    started = time.perf_counter()
    evaluated = Network(network.body, network.preprocessing)  # as a run evaluates it: not compiled
    answer_split_with_network(evaluated, trainer.validation, accelerator.device, trainer.feed.workers)
    return seconds, time.perf_counter() - started


def mean_step(trainer: Trainer, state: State, plan: Plan, steps: int, most_seconds: float) -> float:
    """Seconds of a step, over so many of them, from where `state` is. The first ones do not count: workers have to start, and
    what is compiled is compiled, for up to two sizes of a batch."""
    accelerator, first = trainer.accelerator, 3 if plan.loop.compile else 1
    seconds: list[float] = []
    started = time.perf_counter()
    for crops in trainer.feed.batches(0, min(steps, trainer.feed.steps_per_epoch)):
        with accelerator.autocast():
            train_step(state, crops, trainer.teacher, plan, accelerator, plan.loop.batch_size)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)  # since the last batch was done: waiting for data counts
        started = time.perf_counter()
        if sum(seconds[first:]) > most_seconds:
            break
    return float(np.mean(seconds[first:] or seconds[-1:]))  # the mean, for workers hand over their batches in bursts
