"""What `import deitkit as dk` offers: the verbs of the command line as functions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deitkit.compare.plan import asked_for
from deitkit.compare.runner import run_comparison
from deitkit.config import FitConfig, LoopConfig, RunConfig
from deitkit.data.dataset import SplitName
from deitkit.distill.teacher import Teacher, teacher_from_callable
from deitkit.models.export import Format, export_run
from deitkit.models.predict import Predictor, load
from deitkit.settings import clashing, find_recipe, without_effect
from deitkit.terminal import Progress, UserError, make_progress
from deitkit.training.evaluate import evaluate_run
from deitkit.training.jobs import run_fit, run_training
from deitkit.training.setup import configured

__all__ = ["Predictor", "compare", "evaluate", "export", "fit_teacher", "load", "teacher_from_callable", "train"]


def train(
    data: str | Path,
    *,
    out: str | Path,
    teacher: str | Path | Teacher | None = None,
    recipe: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Teach a student on `data` (a name, an image folder or a Parquet folder) and keep the run in `out`.

    `settings` are the fields of `RunConfig`'s sections by their own names, as on the command line:
    `dk.train("digits", out="runs/first", teacher="runs/cnn", epochs=20, augment="deit")`.
    `teacher` is what `--teacher` takes, or what `teacher_from_callable` made of a Python function. `recipe`, a YAML file or the
    name of a shipped one, has the defaults that the settings change.
    Returns what `summary.json` says. Raises UserError.
    """
    _refuse_clashing(settings)
    given = teacher if isinstance(teacher, Teacher) else None
    if teacher is not None:
        settings["teacher"] = given.name if given else str(teacher)
    if given is not None:
        if settings.get("teacher_size") is not None:
            raise UserError(f"teacher_size: teacher {given.name} says in its preprocessing what it sees: leave it out")
        settings["teacher_size"] = None  # whatever a recipe says
    config = configured(RunConfig, settings, None if recipe is None else find_recipe(str(recipe)))
    _refuse_processes(config.loop)
    useless = None if resume else without_effect(config, settings)  # a run goes on as it was begun
    if useless is not None:
        raise UserError(f"settings: {useless[0]}: {useless[1]}")
    progress = progress or make_progress()
    return run_training(str(data), config, Path(out), resume=resume, progress=progress, teacher=given)


def _refuse_processes(loop: LoopConfig) -> None:
    """Raises UserError where several processes are asked for, which nobody has started: a call is one of them."""
    if loop.processes > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"settings: processes: a call from Python trains in this process: `deit train --processes {loop.processes}` starts others, "
            f"and so does torchrun"
        )


def fit_teacher(
    data: str | Path, *, out: str | Path, resume: bool = False, progress: Progress | None = None, **settings: Any
) -> dict[str, Any]:
    """Fit a convolutional teacher on `data`: `dk.fit_teacher("cifar10", out="runs/cnn", model="cifar-resnet20",
    from_scratch=True)`. Settings and result as for `train`. Raises UserError."""
    _refuse_clashing(settings)
    config = configured(FitConfig, settings)
    _refuse_processes(config.loop)
    return run_fit(str(data), config, Path(out), resume=resume, progress=progress or make_progress())


def evaluate(run: str | Path, data: str | Path | None = None, *, split: SplitName = "val") -> dict[str, Any]:
    """Accuracy of every head, the teacher beside it, agreement, calibration and the tokens' likeness on a split."""
    return evaluate_run(Path(run), None if data is None else str(data), split)


def export(run: str | Path, *, out: str | Path, format: Format) -> list[str]:
    """Write a finished run's student into the new folder `out` for timm (`timm`), transformers (`hf`) or the original DeiT
    (`deit`). Returns the names of the files. Raises UserError, also where the format cannot hold the student."""
    return export_run(Path(run), Path(out), format)


def compare(
    data: str | Path,
    *,
    out: str | Path,
    plan: str | Path | Mapping[str, Any] | None = None,
    choose_teacher: Sequence[str | Path] = (),
    losses: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    budget_minutes: float | None = None,
    split: SplitName = "val",
    tapes: str | Path | None = None,
    recipe: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The same student with and without a teacher, or any list of contenders, paired by seed; kept in `out`.

    `dk.compare("fashion-mnist", out="runs/cmp", teacher="auto", student="deit_nano", epochs=10)` compares no teacher, hard
    labels and z-scored logits, or the `losses` that are named. `choose_teacher` compares teachers by what the student reaches; `plan`, a
    YAML file or the same as a mapping, has any contenders: `shared`, `seeds`, `baseline`, `contenders`. `settings` are those
    of `train`, and lie over what the plan shares. `split="test"` also evaluates the finished runs on the test split.
    Returns what `comparison.json` says; contenders that failed stand under `failed`. Raises UserError.
    """
    _refuse_clashing(settings)
    out = Path(out)
    teachers = [str(teacher) for teacher in choose_teacher]
    if settings.get("teacher") is not None:
        settings["teacher"] = str(settings["teacher"])
    question = asked_for(
        out, plan=plan, choose_teacher=teachers, losses=losses, seeds=seeds, budget_minutes=budget_minutes,
        recipe=None if recipe is None else find_recipe(str(recipe)), resume=resume, settings=settings,
    )  # fmt: skip
    return run_comparison(
        str(data),
        question,
        out,
        resume=resume,
        split=split,
        tapes=None if tapes is None else Path(tapes),
        progress=progress or make_progress(),
    )


def _refuse_clashing(settings: dict[str, Any]) -> None:
    both = clashing(settings)
    if both is not None:
        raise UserError(f"settings: {both[0]} and {both[1]} exclude each other: give one of them")
