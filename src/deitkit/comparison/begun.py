"""What is there of a comparison already, and whether it may be gone on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from deitkit.comparison.contenders import Contender
from deitkit.comparison.plan import PLAN_FILE, ComparisonPlan, read_plan
from deitkit.comparison.results import run_path
from deitkit.comparison.tapes import TapeNeed, teacher_of
from deitkit.config import MANY, Precision, RunConfig
from deitkit.errors import UserError, brief, shortened
from deitkit.files import refuse_filled
from deitkit.progress import SilentProgress
from deitkit.resuming import differences
from deitkit.run import RunFolder
from deitkit.stages import with_fitting_batch

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
        RunFolder(run).refuse_other_data(contender.outline)
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
    now = with_fitting_batch(now, contender.dataset, SilentProgress())
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
