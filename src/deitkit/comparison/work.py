"""Carrying a comparison out: tapes, runs seed by seed, the test split where it is asked for. What is there is not done again."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deitkit.comparison.begun import (
    BUDGET,
    begun_runs,
    frozen_steps,
    precision_of_runs,
    refuse_existing,
    refuse_misplaced,
    refuse_other_runs,
    refuse_other_tapes,
    stored_plan,
)
from deitkit.comparison.budget import steps_within
from deitkit.comparison.contenders import Contender, resolved
from deitkit.comparison.plan import PLAN_FILE, ComparisonPlan, refuse_change, write_plan
from deitkit.comparison.report import show, write_figures
from deitkit.comparison.results import Failure, collected, run_path
from deitkit.comparison.tapes import TAPES, TapeNeed, check_teachers, record_tape, tape_needs
from deitkit.config import RunConfig
from deitkit.data import refuse_among_images
from deitkit.data.base import SplitName
from deitkit.errors import LOST_WORKER, UserError, is_lost_worker, is_out_of_memory
from deitkit.evaluation import Asked, evaluate_run
from deitkit.files import is_filled, write_atomically
from deitkit.jobs import run_training
from deitkit.progress import Progress
from deitkit.run import BEFORE_THE_SETTINGS, RunFolder


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
        from deitkit.comparison.page import write_page  # here, for matplotlib and jinja2 cost a second

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
