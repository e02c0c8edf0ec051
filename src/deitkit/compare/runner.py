"""What is there of a comparison already, and whether it may be gone on with.

Minutes for a whole comparison, turned into steps before its first run: as many for every contender as fit.

Carrying a comparison out: tapes, runs seed by seed, the test split where it is asked for. What is there is not done again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deitkit.compare.plan import PLAN_FILE, ComparisonPlan, Contender, read_plan, refuse_change, resolved, write_plan
from deitkit.compare.report import show, write_figures
from deitkit.compare.results import Failure, collected, run_path
from deitkit.compare.tapes import (
    TAPES,
    TapeNeed,
    check_teachers,
    complete_views,
    record_tape,
    recording_clock,
    tape_needs,
    teacher_of,
)
from deitkit.config import MANY, Precision, RunConfig, ViewConfig
from deitkit.data import refuse_among_images
from deitkit.data.dataset import SplitName
from deitkit.distill.losses import TeacherOutput
from deitkit.distill.teacher import TeacherSource
from deitkit.terminal import (
    LOST_WORKER,
    Progress,
    SilentProgress,
    UserError,
    brief,
    is_filled,
    is_lost_worker,
    is_out_of_memory,
    refuse_filled,
    shortened,
    write_atomically,
)
from deitkit.training.evaluate import Asked, evaluate_run
from deitkit.training.jobs import BUDGET_MARGIN, clamp_batch_size, run_training
from deitkit.training.loop import make_accelerator
from deitkit.training.run import BEFORE_THE_SETTINGS, RunFolder, differences
from deitkit.training.setup import measure_speed, student_architecture, student_trainer
from deitkit.training.teaching import Teaching, needed_answers
from deitkit.views.loader import views_shown
from deitkit.views.mixup import Batch

BUDGET = "budget.json"


def refuse_existing(out: Path) -> None:
    """Raises UserError where the folder already holds something."""
    ours = (out / PLAN_FILE).is_file()
    hint = "give --resume to go on with it, or another --out" if ours else "no comparison: give another --out"
    refuse_filled(out, hint)


def refuse_misplaced(tapes: Path, out: Path) -> None:
    """Raises UserError where tapes cannot be kept: among runs, or in what is no folder."""
    if tapes.exists() and not tapes.is_dir():
        raise UserError(f"--tapes {tapes}: is no folder")
    inside = [folder for folder in (tapes, *tapes.parents) if (folder / "config.yaml").is_file()]
    if inside or tapes.resolve().is_relative_to((out / "runs").resolve()):
        raise UserError(f"--tapes {tapes}: lies among runs: give a folder of its own")


def stored_plan(out: Path) -> ComparisonPlan:
    """The plan that was begun in `out`. Raises UserError where there is none."""
    if not (out / PLAN_FILE).is_file():
        raise UserError(f"{out}: no comparison to resume here: {PLAN_FILE} is missing")
    return read_plan(out / PLAN_FILE)


def begun_runs(out: Path, plan: ComparisonPlan, contenders: Sequence[Contender]) -> list[tuple[Path, int, Contender]]:
    """The run folders that are there, with their seeds."""
    found = [(run_path(out, one.name, seed), seed, one) for seed in plan.seeds for one in contenders]
    return [(run, seed, one) for run, seed, one in found if (run / "config.yaml").is_file()]


def _some_run(out: Path, plan: ComparisonPlan) -> RunConfig | None:
    """The settings of the first run that is there."""
    runs = (run_path(out, name, seed) for name in plan.contenders for seed in plan.seeds)
    return next((RunFolder(run).config(RunConfig) for run in runs if (run / "config.yaml").is_file()), None)


def precision_of_runs(out: Path, plan: ComparisonPlan) -> Precision:
    """The number format of the runs that are there, which `auto` goes on with; `auto` where there is none."""
    begun = _some_run(out, plan)
    return "auto" if begun is None else begun.loop.precision


def frozen_steps(out: Path, plan: ComparisonPlan) -> int | None:
    """The steps that a budget came to, where that is decided: by what is written down, or else by the runs that are there."""
    path = out / BUDGET
    if not path.is_file():
        begun = None if plan.budget_minutes is None else _some_run(out, plan)
        return None if begun is None else begun.loop.steps
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
        if isinstance(steps, bool) or not isinstance(steps, int) or not 0 < steps <= MANY:
            raise ValueError(f"steps {brief(steps)}")
        return steps
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read: remove it, and give --resume again: {shortened(str(error))}"
        ) from error


def refuse_other_runs(out: Path, plan: ComparisonPlan, contenders: Sequence[Contender], frozen: int | None) -> None:
    """Raises UserError where runs that are there were made with other images than are compared now, or, as long as runs are to
    come, with other settings than those would be."""
    begun = begun_runs(out, plan, contenders)
    missing = sum(RunFolder(run).finished for run, _, _ in begun) < len(plan.seeds) * len(contenders)
    for run, seed, contender in begun:
        RunFolder(run).refuse_other_data(contender.names_hash)
        _refuse_other_format(run, contender)
        if missing:
            _refuse_other_settings(run, contender, seed, frozen)


def _refuse_other_format(run: Path, contender: Contender) -> None:
    """Raises UserError where a run that is there was computed in another number format than is asked for now."""
    was = RunFolder(run).config(RunConfig).loop.precision
    if was != contender.config.loop.precision:
        raise UserError(f"{run}: was computed in {was}: leave out --precision, or give {was}")


def _refuse_other_settings(run: Path, contender: Contender, seed: int, frozen: int | None) -> None:
    """Raises UserError where a run that is there was made with other settings than runs to come would be: a version may have
    other defaults. Its teacher is looked at elsewhere."""
    stored = RunFolder(run).config(RunConfig)
    tape = stored.teacher.tape
    now = contender.run_config(seed, contender.steps(frozen), None if tape is None else Path(tape))
    now = clamp_batch_size(now, contender.dataset, SilentProgress())
    now = now.model_copy(update={"teacher": stored.teacher})
    for setting, was, is_now in differences(stored, now):
        raise UserError(
            f"{run}: was made with {setting} = {was!r}, runs to come would be with {is_now!r}: go on with the version that began "
            f"the comparison, or give another --out"
        )


def refuse_other_tapes(out: Path, plan: ComparisonPlan, needs: Sequence[TapeNeed]) -> None:
    """Raises UserError where runs that are there learned from another teacher than those to come would: what `auto` stands for
    may be another network in another version."""
    for need in needs:
        for run, _, _ in begun_runs(out, plan, need.members):
            tape = RunFolder(run).config(RunConfig).teacher.tape
            if tape is not None and teacher_of(Path(tape)) != teacher_of(need.path):
                raise UserError(
                    f"{run}: learned from {tape}, runs to come would from {need.path}, of another teacher (what auto stands for "
                    f"changed with the version): compare anew, with another --out, or go on with the version that began it"
                )


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

    def answers(batch: Batch) -> TeacherOutput:
        rows = torch.zeros(len(batch.labels_B), classes, device=batch.labels_B.device) if logits else None
        return TeacherOutput(torch.zeros_like(batch.labels_B), rows)

    return answers


def run_comparison(
    location: str,
    plan: ComparisonPlan,
    out: Path,
    *,
    resume: bool,
    split: SplitName = "val",
    tapes: Path | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Compare the contenders of `plan`; `tapes`: where their tapes are kept, if not in `out`.

    Returns what `comparison.json` says. A contender that fails is listed under `failed`; the others go on. Raises UserError
    for what is wrong before anything is trained."""
    started = time.perf_counter()
    before = stored_plan(out) if resume else None
    if before is None:
        refuse_existing(out)
    else:
        refuse_change(out, before, plan, frozen=(out / BUDGET).is_file())
    for folder_of_ours in (out, tapes or out):
        refuse_among_images(location, folder_of_ours)
    if tapes is not None:
        refuse_misplaced(tapes, out)
    contenders = resolved(plan, location, progress, precision_of_runs(out, plan))
    if plan.budget_minutes is None:
        _warn_of_lengths(contenders, progress)
    if split == "test" and not contenders[0].dataset.has_test:
        raise UserError(f"--split test: {contenders[0].dataset.name} has no test split")
    frozen = frozen_steps(out, plan)
    refuse_other_runs(out, plan, contenders, frozen)
    needs = [
        need
        for need in tape_needs(contenders, tapes or out / TAPES)
        if any(not RunFolder(run_path(out, one.name, seed)).finished for one in need.members for seed in plan.seeds)
    ]
    refuse_other_tapes(out, plan, needs)
    check_teachers(needs, out, frozen or (None if plan.budget_minutes is None else 1))
    with RunFolder(out) as folder:
        try:
            for folder_of_ours in (out, tapes or out):
                folder_of_ours.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder_of_ours}: cannot be created: {error.strerror}") from error
        folder.lock()
        write_atomically(out / PLAN_FILE, write_plan(plan))
        failures: list[Failure] = []
        if plan.budget_minutes is not None and frozen is None:
            frozen = _freeze(plan, location, out, contenders, needs, failures, started, progress)
        _record(needs, location, out, frozen, failures, progress)
        _train(plan, location, out, contenders, needs, frozen, failures, progress)
        if split == "test":
            _test(plan, location, out, contenders, failures, progress)
        result = collected(out, plan, contenders, failures)
        write_figures(out, result)
        from deitkit.compare.report import write_page

        write_page(out, result, write_plan(plan))
    show(result, progress)
    return result


def _warn_of_lengths(contenders: Sequence[Contender], progress: Progress) -> None:
    """Say that contenders make different numbers of steps, where images without labels are why."""
    steps = [contender.steps(None) for contender in contenders]
    if any(contender.config.data.unlabelled for contender in contenders) and len(set(steps)) > 1:
        progress.warn(
            f"contenders make {min(steps)} to {max(steps)} steps, as those that learn from images without labels have more images: "
            f"--steps gives all the same number"
        )


def _freeze(
    plan: ComparisonPlan, location: str, out: Path, contenders: Sequence[Contender], needs: Sequence[TapeNeed],
    failures: list[Failure], started: float, progress: Progress,
) -> int:  # fmt: skip
    """Turn the budget into steps, and write them down. What is needed anyway is measured by doing it: a tape's first
    views."""
    assert plan.budget_minutes is not None
    _record(needs, location, out, 1, failures, progress)
    lost = {failure.contender for failure in failures}
    left = [contender for contender in contenders if contender.name not in lost]
    if not left:
        raise UserError("no contender is left: their teachers are of no use (see above)")
    sound = [need for need in needs if any(member in left for member in need.members)]
    steps = steps_within(plan.budget_minutes, started, left, len(plan.seeds), sound, progress)
    write_atomically(out / BUDGET, json.dumps({"minutes": plan.budget_minutes, "steps": steps}, indent=2) + "\n")
    return steps


def _record(
    needs: Sequence[TapeNeed], location: str, out: Path, frozen: int | None, failures: list[Failure], progress: Progress
) -> None:
    """Record every tape; contenders whose teacher turns out to be of no use are out."""
    for need in needs:
        names = [member.name for member in need.members]
        if {failure.contender for failure in failures} >= set(names):
            continue
        try:
            record_tape(need, location, out, need.views(frozen), progress)
        except (UserError, MemoryError, RuntimeError) as error:
            why = _why(error)
            progress.finish()
            progress.warn(f"{', '.join(names)}: {why}")
            failures += [Failure(name, None, why) for name in names]


def _train(
    plan: ComparisonPlan, location: str, out: Path, contenders: Sequence[Contender], needs: Sequence[TapeNeed],
    frozen: int | None, failures: list[Failure], progress: Progress,
) -> None:  # fmt: skip
    """The runs that are missing, seed by seed: whatever interrupts them, the finished ones are nearly paired."""
    lost = {failure.contender for failure in failures}
    tape_of = {member.name: need.path for need in needs for member in need.members}
    total = len(plan.seeds) * len(contenders)
    for number, (seed, contender) in enumerate((s, c) for s in plan.seeds for c in contenders):
        run = run_path(out, contender.name, seed)
        if contender.name in lost or RunFolder(run).finished:
            continue
        progress.say(f"run {number + 1} of {total}: {contender.name}, seed {seed}")
        config = contender.run_config(seed, frozen, tape_of.get(contender.name))
        begun = (run / "config.yaml").is_file()
        if begun:  # it keeps the tape that it was begun with
            stored = RunFolder(run).config(RunConfig)
            config = config.model_copy(update={"teacher": stored.teacher})
        try:
            if not begun and is_filled(run, besides=BEFORE_THE_SETTINGS):
                raise UserError(f"{run}: holds files, but not the settings of a run: remove that folder")
            run_training(location, config, run, resume=begun, progress=progress, dataset=contender.dataset)
        except (UserError, MemoryError, RuntimeError) as error:
            why = _why(error)
            progress.finish()
            progress.warn(f"{contender.name}, seed {seed}: {why}")
            failures.append(Failure(contender.name, seed, why))
        write_figures(out, collected(out, plan, contenders, failures))


def _why(error: Exception) -> str:
    """Why a contender came to nothing, which is no reason to stop the others. Raises `error` where it is a defect."""
    if isinstance(error, UserError):
        return str(error)
    if is_lost_worker(error):
        return LOST_WORKER
    if not is_out_of_memory(error):
        raise error
    return "not enough memory"


def _test(
    plan: ComparisonPlan, location: str, out: Path, contenders: Sequence[Contender], failures: list[Failure], progress: Progress
) -> None:  # fmt: skip
    """Open the test split for every finished run, once: what was found is kept in the run's folder."""
    asked: Asked = {}
    for run, _, contender in begun_runs(out, plan, contenders):
        if RunFolder(run).finished and not (run / "evaluation-test.json").is_file():
            progress.say(f"test split: {run.name}")
            try:
                workers = contender.config.loop.workers
                evaluate_run(run, home=location, split="test", workers=workers, warn=progress.warn, asked=asked)
            except UserError as error:
                progress.warn(str(error))
                failures.append(Failure(contender.name, None, str(error)))
