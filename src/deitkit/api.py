"""What `import deitkit as dk` offers: the verbs of the command line as functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deitkit.config import AUGMENT_PRESETS, Config, ConfigT, FitConfig, RunConfig
from deitkit.data.base import SplitName
from deitkit.evaluation import evaluate_run
from deitkit.jobs import run_fit, run_training
from deitkit.predict import Predictor, load
from deitkit.progress import Progress, make_progress
from deitkit.settings import merge, validated
from deitkit.tape import settings_of
from deitkit.teacher import Teacher, teacher_from_callable

__all__ = ["Predictor", "evaluate", "fit_teacher", "load", "teacher_from_callable", "train"]


def train(
    data: str | Path,
    *,
    out: str | Path,
    teacher: str | Path | Teacher | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Teach a student on `data` (a name, an image folder or a Parquet folder) and keep the run in `out`.

    `settings` are the fields of `RunConfig`'s sections by their own names, as on the command line:
    `dk.train("digits", out="runs/first", teacher="runs/cnn", epochs=20, augment="deit")`.
    `teacher` is what `--teacher` takes, or what `teacher_from_callable` made of a Python function.
    Returns what `summary.json` says. Raises UserError.
    """
    given = teacher if isinstance(teacher, Teacher) else None
    if teacher is not None:
        settings["teacher"] = given.name if given else str(teacher)
    config = configured(RunConfig, settings)
    progress = progress or make_progress()
    return run_training(str(data), config, Path(out), resume=resume, progress=progress, teacher=given)


def fit_teacher(
    data: str | Path, *, out: str | Path, resume: bool = False, progress: Progress | None = None, **settings: Any
) -> dict[str, Any]:
    """Fit a convolutional teacher on `data`: `dk.fit_teacher("cifar10", out="runs/cnn", model="cifar-resnet20",
    from_scratch=True)`. Settings and result as for `train`. Raises UserError."""
    config = configured(FitConfig, settings)
    return run_fit(str(data), config, Path(out), resume=resume, progress=progress or make_progress())


def evaluate(run: str | Path, data: str | Path | None = None, *, split: SplitName = "val") -> dict[str, Any]:
    """Accuracy of every head, the teacher beside it, agreement, calibration and the tokens' likeness on a split."""
    return evaluate_run(Path(run), None if data is None else str(data), split)


def configured(kind: type[ConfigT], settings: dict[str, Any]) -> ConfigT:
    """`kind` from flat settings: each goes to the section that has a field of that name; `augment` chooses the preset
    that the other settings change, `tape` the views and the split. Raises UserError, naming close settings where one is
    unknown."""
    values: dict[str, Any] = {}
    if isinstance(settings.get("augment"), str) and settings["augment"] in AUGMENT_PRESETS:
        values["view"] = AUGMENT_PRESETS[settings["augment"]].model_dump()
    sections = {name: section for name, section in kind() if isinstance(section, Config)}
    for key, value in settings.items():
        home = next((name for name, section in sections.items() if key in type(section).model_fields), None)
        values = merge(values, {key: value} if home is None else {home: {key: value}})
    defaults = kind().model_dump()
    if settings.get("tape") is not None:
        taped = settings_of(Path(str(settings["tape"])))
        defaults = merge(defaults, {key: taped[key] for key in taped if key != "view" or "augment" not in settings})
    return validated(kind, merge(defaults, values), "settings")
