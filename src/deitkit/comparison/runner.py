"""A comparison carried out: tapes are recorded, runs trained seed by seed, the test split evaluated if asked for.

What is done already is not done again: an interrupted comparison is resumed, seeds and contenders may be added. Minutes for
the whole comparison are turned into steps before its first run, the same for every contender.
"""

from __future__ import annotations

import bisect
import json
import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deitkit.comparison.plan import (
    PLAN_FILE,
    TAPES,
    ComparisonPlan,
    Contender,
    TapeNeed,
    complete_views,
    read_plan,
    refuse_change,
    resolved,
    tape_needs,
    write_plan,
)
from deitkit.comparison.report import show, write_figures, write_page
from deitkit.comparison.results import CLOCK, Failure, collected, recording_clock, run_path
from deitkit.config import RunConfig, ViewConfig
from deitkit.data import refuse_among_images
from deitkit.data.dataset import SplitName
from deitkit.distill.losses import TeacherOutput
from deitkit.distill.tape import is_tape, open_tape, read_manifest
from deitkit.distill.teacher import load_teacher, members_of, no_teacher
from deitkit.inspect.report import try_report
from deitkit.lengths import MANY
from deitkit.models.network import default_device
from deitkit.terminal import (
    LOST_WORKER,
    Progress,
    SilentProgress,
    UserError,
    brief,
    is_filled,
    is_lost_worker,
    is_out_of_memory,
    parse_json,
    refuse_filled,
    shortened,
    write_atomically,
)
from deitkit.training.evaluate import TeacherCache, evaluate_run
from deitkit.training.fit import fit_automatically
from deitkit.training.jobs import measure_student, run_record, run_training
from deitkit.training.loop import BUDGET_MARGIN, clamp_batch_size
from deitkit.training.run import BEFORE_THE_SETTINGS, RunFolder, differences
from deitkit.views.loader import views_shown
from deitkit.views.mixup import Batch

BUDGET = "budget.json"
"""In the folder of a comparison: the steps that its minutes were turned into."""
LEARNED = "teachers.json"
"""In the folder of a comparison: which networks its runs learned from."""


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

    Returns what `comparison.json` has. A contender that fails is listed under `failed`; the others go on. Raises UserError
    for what is wrong before anything is trained."""
    started = time.perf_counter()
    if resume:
        if not (out / PLAN_FILE).is_file():
            raise UserError(f"{out}: no comparison to resume here: {PLAN_FILE} is missing")
        refuse_change(out, read_plan(out / PLAN_FILE), plan, frozen=(out / BUDGET).is_file())
    else:
        ours = (out / PLAN_FILE).is_file()
        refuse_filled(
            out, "give --resume to continue it, or another --out" if ours else "no comparison: give another --out"
        )
    folders = (out, tapes or out / TAPES)
    for folder in folders:
        refuse_among_images(location, folder)
    if tapes is not None:
        _refuse_misplaced(tapes, out)
    before = _first_run(out, plan)
    contenders = resolved(plan, location, progress, "auto" if before is None else before.loop.precision)
    steps = {contender.steps for contender in contenders}
    if plan.budget_minutes is None and len(steps) > 1 and any(one.config.data.unlabelled for one in contenders):
        progress.warn(
            f"contenders make {min(steps)} to {max(steps)} steps, because those that learn from images without labels have more "
            f"images: --steps gives all the same number"
        )
    if split == "test" and not contenders[0].dataset.has_test:
        raise UserError(f"--split test: {contenders[0].dataset.name} has no test split")
    frozen = frozen_steps(out, plan)
    if plan.budget_minutes is not None:
        contenders = [contender.with_steps(frozen or 1) for contender in contenders]
    comparison = _Comparison(location, plan, out, folders[1], contenders, progress)
    comparison.refuse_other_runs()
    comparison.check_teachers()
    with RunFolder(out) as run:
        try:
            for folder in (out, tapes or out):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be created: {error.strerror}") from error
        run.lock()
        write_atomically(out / PLAN_FILE, write_plan(plan))
        if plan.budget_minutes is not None and frozen is None:
            comparison.freeze(plan.budget_minutes, started)
        comparison.record()
        comparison.train()
        if split == "test":
            comparison.test()
        result = comparison.collected()
        write_page(out, result, write_plan(plan))
    show(result, progress)
    return result


def _refuse_misplaced(tapes: Path, out: Path) -> None:
    """Raises UserError if tapes cannot be kept there: among runs, or in what is not a folder."""
    if tapes.exists() and not tapes.is_dir():
        raise UserError(f"--tapes {tapes}: not a folder")
    inside = any((folder / "config.yaml").is_file() for folder in (tapes, *tapes.parents))
    if inside or tapes.resolve().is_relative_to((out / "runs").resolve()):
        raise UserError(f"--tapes {tapes}: lies among runs: give a folder of its own")


def _first_run(out: Path, plan: ComparisonPlan) -> RunConfig | None:
    """The settings of the first run that has been started: its precision and, with a budget, its steps are those of all."""
    runs = (run_path(out, name, seed) for name in plan.contenders for seed in plan.seeds)
    return next((RunFolder(run).config(RunConfig) for run in runs if (run / "config.yaml").is_file()), None)


def frozen_steps(out: Path, plan: ComparisonPlan) -> int | None:
    """The steps that a budget allows, if that is known: as written down, or else as the runs have them. Raises UserError."""
    path = out / BUDGET
    if not path.is_file():
        before = None if plan.budget_minutes is None else _first_run(out, plan)
        return None if before is None else before.loop.steps
    try:
        steps = parse_json(path.read_text(encoding="utf-8"))["steps"]
        if isinstance(steps, bool) or not isinstance(steps, int) or not 0 < steps <= MANY:
            raise ValueError(f"steps {brief(steps)}")
        return steps
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = shortened(str(error))
        raise UserError(f"{path}: cannot be read: remove it, and give --resume again: {why}") from error


@dataclass
class _Comparison:
    """The state of a running comparison."""

    location: str
    plan: ComparisonPlan
    out: Path
    tapes: Path
    """the folder of its tapes"""
    contenders: Sequence[Contender]
    progress: Progress
    failures: list[Failure] = field(default_factory=list)

    @property
    def needs(self) -> list[TapeNeed]:
        """The tapes that runs to come learn from."""
        seeds = self.plan.seeds
        return [
            need
            for need in tape_needs(self.contenders, self.tapes)
            if not all(RunFolder(run_path(self.out, one.name, seed)).finished for one in need.members for seed in seeds)
        ]

    def started_runs(self, contenders: Sequence[Contender]) -> list[tuple[Path, int, Contender, RunConfig]]:
        """The run folders that exist, with their seeds and settings."""
        runs = [(run_path(self.out, one.name, seed), seed, one) for seed in self.plan.seeds for one in contenders]
        found = [(run, seed, one) for run, seed, one in runs if (run / "config.yaml").is_file()]
        return [(run, seed, one, RunFolder(run).config(RunConfig)) for run, seed, one in found]

    def refuse_other_runs(self) -> None:
        """Raises UserError if existing runs were made with other images than are compared now, or, as long as runs are to
        come, with other settings or from other teachers: another version may have other defaults."""
        started = self.started_runs(self.contenders)
        finished = sum(RunFolder(run).finished for run, *_ in started)
        missing = finished < len(self.plan.seeds) * len(self.contenders)
        for run, seed, contender, stored in started:
            RunFolder(run).refuse_other_data(contender.names_hash)
            was = stored.loop.precision
            if was != contender.config.loop.precision:
                raise UserError(f"{run}: was computed in {was}: leave out --precision, or give {was}")
            if missing:
                tape = None if stored.teacher.tape is None else Path(stored.teacher.tape)
                now = contender.with_steps(contender.steps).run_config(seed, tape)
                now = clamp_batch_size(now, contender.dataset, SilentProgress())
                now = now.model_copy(update={"teacher": stored.teacher})
                for setting, old, new in differences(stored, now):
                    raise UserError(
                        f"{run}: was made with {setting} = {old!r}, new runs would have {new!r}: use the version that started the "
                        f"comparison, or give another --out"
                    )
        for need in self.needs:
            for run, _, _, stored in self.started_runs(need.members):
                learned = stored.teacher.tape
                if learned is not None and Path(learned).name.rpartition("-")[0] != need.source:
                    raise UserError(
                        f"{run}: learned from {learned}, new runs would learn from {need.path}, of another teacher (in another version "
                        f"auto may fit another one): give another --out, or use the version that started the comparison"
                    )

    def check_teachers(self) -> None:
        """Raises UserError naming a contender whose teacher cannot be loaded, knows other classes, or is not the network any
        more that was recorded on its tape, or from which runs have learned. A complete tape replaces a teacher that is gone or
        remote; teachers that are yet to be fitted are not looked at."""
        learned = self._learned_from()
        for need in self.needs:
            contender, config = need.members[0], need.members[0].config.teacher
            teacher = str(config.teacher)
            here = all(Path(one.partition("@")[2] or one).exists() for one in members_of(teacher))
            if contender.automatic is not None or (need.complete and not here):
                continue
            classes, size = contender.dataset.classes, config.size
            try:
                state = load_teacher(teacher, classes, device=default_device(), image_size=size).state_hash()
            except UserError as error:
                raise UserError(f"contender {contender.name!r}: {error}") from error
            other = f"contender {contender.name!r}: {teacher} is now another network than the one"
            if learned.get(need.path.name, state) != state:
                raise UserError(f"{other} that runs in {self.out} have learned from: give that one, or another --out")
            if is_tape(need.path) and read_manifest(need.path).teacher["state"] != state:
                raise UserError(
                    f"{other} that was recorded to {need.path}: give that one, or remove that folder to record it again"
                )

    def _learned_from(self) -> dict[str, str]:
        """Hash of the teacher's weights by name of the tape, of all tapes that were recorded for this comparison."""
        try:
            found = parse_json((self.out / LEARNED).read_text(encoding="utf-8"))
            return {str(name): str(state) for name, state in found.items()}
        except (OSError, ValueError, AttributeError):
            return {}

    def freeze(self, minutes: float, started: float) -> None:
        """Turn the budget into steps, and write them down. `started`: when the minutes began, by `time.perf_counter`. Each
        tape's first views, which are needed anyway, are recorded to measure their time. Raises UserError."""
        self.record()
        lost = {failure.contender for failure in self.failures}
        left = [contender for contender in self.contenders if contender.name not in lost]
        if not left:
            raise UserError("no contender is left: their teachers are of no use (see above)")
        needs = [need for need in self.needs if any(member in left for member in need.members)]
        steps = steps_within(minutes, started, left, len(self.plan.seeds), needs, self.progress)
        write_atomically(self.out / BUDGET, json.dumps({"minutes": minutes, "steps": steps}, indent=2) + "\n")
        self.contenders = [contender.with_steps(steps) for contender in self.contenders]

    def record(self) -> None:
        """Record what is missing of every tape, fitting its teacher first for `auto`; contenders whose teacher turns out to be of
        no use are out."""
        for need in self.needs:
            names = [member.name for member in need.members]
            if {failure.contender for failure in self.failures} >= set(names):
                continue
            try:
                if is_filled(need.path) and not is_tape(need.path):
                    raise UserError(f"{need.path}: tape.json is missing: remove that folder to record it again")
                if not need.complete:
                    self._record_missing(need)
                learned = {**self._learned_from(), need.path.name: read_manifest(need.path).teacher["state"]}
                write_atomically(self.out / LEARNED, json.dumps(learned, indent=2) + "\n")
            except (UserError, MemoryError, RuntimeError) as error:
                self._fail(error, *((name, None) for name in names))

    def _record_missing(self, need: TapeNeed) -> None:
        """How long it took, also if it is interrupted, is kept in the tape's folder. Raises UserError."""
        contender, config = need.members[0], need.members[0].config
        if contender.automatic is not None:
            fitted = fit_automatically(self.location, contender.dataset, contender.automatic, self.progress)
            config = config.changed(teacher={"teacher": str(fitted)})
        if is_tape(need.path) and config.teacher.teacher_precision == "auto":  # as it began, perhaps on another machine
            config = config.changed(teacher={"teacher_precision": read_manifest(need.path).teacher["dtype"]})
        weight = max(member.config.loss.feature_weight or 0.0 for member in need.members)
        config = config.changed(loss={"feature_weight": weight})
        clock, before = recording_clock(need.path), recorded_views(need.path)
        began = time.perf_counter()
        try:
            info = run_record(
                self.location, config, need.path, views=need.views, outputs=need.outputs, progress=self.progress
            )
            clock["view_seconds"] = info["seconds"] / (recorded_views(need.path) - before)
            clock["start_seconds"] = time.perf_counter() - began - info["seconds"]
        finally:
            clock["seconds"] += time.perf_counter() - began
            if is_tape(need.path):
                write_atomically(need.path / CLOCK, json.dumps(clock, indent=2) + "\n")

    def train(self) -> None:
        """The missing runs, seed by seed: whatever interrupts them, most of the finished ones are paired."""
        lost = {failure.contender for failure in self.failures}
        tape_of = {member.name: need.path for need in self.needs for member in need.members}
        runs = [(contender, seed) for seed in self.plan.seeds for contender in self.contenders]
        for number, (contender, seed) in enumerate(runs, 1):
            run = run_path(self.out, contender.name, seed)
            if contender.name in lost or RunFolder(run).finished:
                continue
            self.progress.say(f"run {number} of {len(runs)}: {contender.name}, seed {seed}")
            config = contender.run_config(seed, tape_of.get(contender.name))
            started = (run / "config.yaml").is_file()
            if started:  # it keeps the tape that it started with
                config = config.model_copy(update={"teacher": RunFolder(run).config(RunConfig).teacher})
            try:
                if not started and is_filled(run, besides=BEFORE_THE_SETTINGS):
                    raise UserError(f"{run}: config.yaml is missing: remove that folder")
                dataset, progress = contender.dataset, self.progress
                run_training(self.location, config, run, resume=started, progress=progress, dataset=dataset)
            except (UserError, MemoryError, RuntimeError) as error:
                self._fail(error, (contender.name, seed))
            else:
                try_report(run, self.progress.warn)
            self.collected()

    def test(self) -> None:
        """Evaluate every finished run on the test split, once: the result is kept in the run's folder."""
        cache: TeacherCache = {}
        for run, seed, contender, _ in self.started_runs(self.contenders):
            if RunFolder(run).finished and not (run / "evaluation-test.json").is_file():
                self.progress.say(f"test split: {run.name}")
                workers, warn = contender.config.loop.workers, self.progress.warn
                try:
                    evaluate_run(run, home=self.location, split="test", workers=workers, warn=warn, teacher_cache=cache)
                except UserError as error:
                    self._fail(error, (contender.name, seed))

    def collected(self) -> dict[str, Any]:
        """The figures so far, written to `comparison.json` and `comparison.md`."""
        result = collected(self.out, self.plan, self.contenders, self.failures)
        write_figures(self.out, result)
        return result

    def _fail(self, error: Exception, *runs: tuple[str, int | None]) -> None:
        """Note why these runs failed, which is no reason to stop the others. Raises `error` if it is a defect."""
        if isinstance(error, UserError):
            why = str(error)
        elif is_lost_worker(error):
            why = LOST_WORKER
        elif is_out_of_memory(error):
            why = "not enough memory"
        else:
            raise error
        names = [name if seed is None else f"{name}, seed {seed}" for name, seed in runs]
        self.progress.finish()
        self.progress.warn(f"{', '.join(names)}: {why}")
        self.failures += [Failure(name, seed, why) for name, seed in runs]


def recorded_views(path: Path) -> float:
    """Views of a tape, parts of views included: the share of their records that is there; 0 if there is no tape."""
    if not is_tape(path):
        return 0
    with closing(open_tape(path)) as tape:
        records_C = [stop - start for start, stop in map(tape.manifest.span, range(tape.manifest.chunks))]
        return float((tape.complete() @ records_C).sum()) / tape.manifest.images


# ------------------------------------------------------------------------------------------------------- budget


class RunCost(NamedTuple):
    """What the runs of a contender take."""

    runs: int
    steps_per_epoch: int
    step_seconds: float
    epoch_seconds: float
    """of an epoch besides its steps: its share of an evaluation"""
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
    """The largest number of steps that all of `costs` together can afford; 0 if one is too many."""
    return bisect.bisect_right(range(1, MANY), seconds, key=lambda steps: sum(cost.seconds(steps) for cost in costs))


def steps_within(
    minutes: float, started: float, contenders: Sequence[Contender], seeds: int, needs: Sequence[TapeNeed], progress: Progress
) -> int:  # fmt: skip
    """Steps of every run such that all of them, and what is missing of the tapes, take what is left of `minutes`. Raises UserError
    if one step is too many."""
    costs: list[RunCost | TapeCost] = [run_cost(contender, seeds) for contender in contenders]
    for need in needs:
        learners = tuple((one.steps_per_epoch, one.config.view) for one in need.members if one in contenders)
        clock = recording_clock(need.path)
        costs.append(TapeCost(clock["view_seconds"], clock["start_seconds"], complete_views(need.path), learners))
    elapsed_seconds = time.perf_counter() - started
    steps = most_steps(BUDGET_MARGIN * 60 * minutes - elapsed_seconds, costs)
    if steps == 0:
        least = (sum(cost.seconds(1) for cost in costs) + elapsed_seconds) / 60 / BUDGET_MARGIN
        raise UserError(
            f"--budget-minutes {minutes:g}: preparing took {elapsed_seconds / 60:.2g} minutes, and a single step of every run needs "
            f"{least:.2g} in all: give more minutes, or fewer contenders or seeds"
        )
    epochs = [steps / contender.steps_per_epoch for contender in contenders]
    span = f"{min(epochs):.1f}" if max(epochs) - min(epochs) < 0.05 else f"{min(epochs):.1f} to {max(epochs):.1f}"
    progress.say(f"{minutes:g} minutes: {steps} steps for each of {seeds * len(contenders)} runs, {span} epochs")
    return steps


def run_cost(contender: Contender, seeds: int) -> RunCost:
    """Measured on a student that learns nothing, from a source that has its outputs ready, as a tape has: no run is started."""
    config, dataset = contender.config, contender.dataset
    classes = len(dataset.classes)

    def ready(batch: Batch) -> TeacherOutput:
        device = batch.labels_B.device
        rows = torch.zeros(len(batch.labels_B), classes, device=device) if config.loss.needs_logits else None
        return TeacherOutput(torch.zeros_like(batch.labels_B), rows)

    prepared, step, evaluation = measure_student(config, dataset, ready if config.teacher.present else no_teacher)
    return RunCost(seeds, contender.steps_per_epoch, step, evaluation, prepared)
