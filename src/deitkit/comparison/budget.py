"""Minutes for a whole comparison, turned into steps before its first run: as many for every contender as fit."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from deitkit.comparison.contenders import Contender
from deitkit.comparison.tapes import TapeNeed, complete_views, recording_clock
from deitkit.config import MANY, ViewConfig
from deitkit.errors import UserError
from deitkit.feed import views_shown
from deitkit.preparing import student_trainer
from deitkit.progress import Progress, SilentProgress
from deitkit.resolve import student_architecture
from deitkit.run import RunFolder
from deitkit.speed import measure_speed
from deitkit.stages import BUDGET_MARGIN
from deitkit.teaching import Teaching, needed_answers
from deitkit.training import TeacherSource, make_accelerator
from deitkit.types import Answers, Batch


class RunCost(NamedTuple):
    """What the runs of a contender take."""

    runs: int
    steps_per_epoch: int
    step_seconds: float
    epoch_seconds: float
    """of an epoch, its steps aside: its share of an evaluation"""
    start_seconds: float
    """once for a run"""

    def seconds(self, steps: int) -> float:
        epochs = math.ceil(steps / self.steps_per_epoch)
        return self.runs * (steps * self.step_seconds + epochs * self.epoch_seconds + self.start_seconds)


class TapeCost(NamedTuple):
    """What the rest of a recording takes."""

    view_seconds: float
    start_seconds: float
    recorded_views: int
    learners: tuple[tuple[int, ViewConfig], ...]
    """steps of an epoch, views of those who learn from it"""

    def seconds(self, steps: int) -> float:
        missing = max(views_shown(steps, *learner) for learner in self.learners) - self.recorded_views
        return self.start_seconds + missing * self.view_seconds if missing > 0 else 0.0


def most_steps(seconds: float, costs: Sequence[RunCost | TapeCost]) -> int:
    """The largest number of steps that all of `costs` together can afford; 0 where one is too many."""

    def fits(steps: int) -> bool:
        return sum(cost.seconds(steps) for cost in costs) <= seconds

    low, high = 0, 1
    while high < MANY and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def steps_within(
    minutes: float, started: float, contenders: Sequence[Contender], seeds: int, needs: Sequence[TapeNeed], progress: Progress
) -> int:  # fmt: skip
    """Steps of every run such that all of them, and what is missing of the tapes, take what is left of `minutes`.

    `started`: when the minutes began, by `time.perf_counter`. Raises UserError where one step is too many."""
    costs: list[RunCost | TapeCost] = [run_cost(contender, seeds) for contender in contenders]
    for need in needs:
        learners = tuple((one.steps_per_epoch, one.config.view) for one in need.members if one in contenders)
        clock = recording_clock(need.path)
        costs.append(TapeCost(clock["view_seconds"], clock["start_seconds"], complete_views(need.path), learners))
    elapsed_seconds = time.perf_counter() - started
    left = BUDGET_MARGIN * 60 * minutes - elapsed_seconds
    steps = most_steps(left, costs)
    if steps == 0:
        least = (sum(cost.seconds(1) for cost in costs) + elapsed_seconds) / 60 / BUDGET_MARGIN
        raise UserError(
            f"--budget-minutes {minutes:g}: preparing took {elapsed_seconds / 60:.2g} minutes, and with a single step for "
            f"every run it would be {least:.2g}: give more minutes, or fewer contenders or seeds"
        )
    epochs = [steps / contender.steps_per_epoch for contender in contenders]
    span = f"{min(epochs):.1f}" if max(epochs) - min(epochs) < 0.05 else f"{min(epochs):.1f} to {max(epochs):.1f}"
    progress.say(f"{minutes:g} minutes: {steps} steps for each of {seeds * len(contenders)} runs, {span} epochs")
    return steps


def run_cost(contender: Contender, seeds: int) -> RunCost:
    """Measured on a student that learns nothing: no run is begun."""
    began = time.perf_counter()
    config, dataset = contender.config, contender.dataset
    source = ready(len(dataset.classes), logits=needed_answers(config) == "all")
    trainer = student_trainer(
        config,
        student_architecture(config, dataset),
        dataset,
        RunFolder(Path("unused")),
        SilentProgress(),
        make_accelerator(config.loop),
        Teaching(source=source) if config.teacher.present else Teaching(),
    )
    prepared = time.perf_counter() - began
    step, evaluation = measure_speed(trainer)
    share = evaluation / trainer.epochs_to_evaluation
    return RunCost(seeds, contender.steps_per_epoch, step, share, prepared)


def ready(classes: int, *, logits: bool) -> TeacherSource:
    """A source that has its answers ready, as a tape has; they mean nothing."""

    def answers(batch: Batch) -> Answers:
        rows = torch.zeros(len(batch.labels_B), classes, device=batch.labels_B.device) if logits else None
        return Answers(torch.zeros_like(batch.labels_B), rows)

    return answers
