"""What `import deitkit as dk` offers: the verbs of the command line as functions, with the same settings by the same names."""

from __future__ import annotations

import html
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, final

import numpy as np
from PIL import Image

from deitkit.comparison.plan import asked_for
from deitkit.comparison.runner import run_comparison
from deitkit.config import MAX_PIXELS, FitConfig, HeadChoice, LoopConfig, RunConfig
from deitkit.data.dataset import SplitName
from deitkit.deploy.export import Format, export_run
from deitkit.deploy.onnx import OnnxPrecision
from deitkit.deploy.parity import MOST_DISAGREEMENT
from deitkit.distill.losses import LossFunction
from deitkit.distill.tape import settings_of
from deitkit.distill.teacher import Teacher, teacher_from_callable
from deitkit.inspect.explain import Explanation, explain_run
from deitkit.inspect.report import try_report, write_report
from deitkit.models.network import Network
from deitkit.models.predict import ImageLike, PredictionList, Predictor
from deitkit.models.predict import load as load_predictor
from deitkit.settings import build, find_recipe, lower_settings
from deitkit.terminal import Progress, UserError, brief, expanded, make_progress
from deitkit.training.evaluate import evaluate_run
from deitkit.training.fit import network_unasked, run_fit
from deitkit.training.jobs import run_training
from deitkit.training.run import RunFolder, default_out, teacher_unasked
from deitkit.training.setup import opened_unasked
from deitkit.training.tables import fused_or_only, result_table

__all__ = ["Predictor", "Run", "compare", "evaluate", "export", "fit_teacher", "load", "teacher_from_callable", "train"]


class Settings(TypedDict, total=False):
    """The settings of `train`: see `deit train --help-all`, and `docs/recipes.md` for those that have no flag."""

    train_folder: str | None
    train_images: int | None
    unlabelled: bool
    oversample: bool
    data_seed: int
    val_fraction: float
    max_bad_images: int
    max_pixels: int
    augment: Literal["none", "light", "deit", "deit3"]
    view_seed: int
    view_size: tuple[int, int] | None
    crop: Literal["none", "pad", "resize", "simple"] | None
    crop_padding: float | None
    crop_area: tuple[float, float]
    flip_prob: float | None
    randaugment: str | None
    three_augment: bool
    colour_jitter: float
    random_erasing_prob: float
    mixup_alpha: float
    cutmix_alpha: float
    mixup_prob: float
    mixup_switch_prob: float
    repeated_aug: int
    views: int | None
    optimizer: Literal["adamw", "muon", "lamb"]
    lr: float
    base_lr: float
    min_lr: float | str
    warmup_lr: float | None
    warmup: str
    weight_decay: float
    layer_decay: float
    trainable: str
    max_grad_norm: float | None
    ema_decay: float
    length: str
    epochs: int
    steps: int
    budget_minutes: float
    batch_size: int | Literal["auto"]
    seed: int
    workers: int
    processes: int
    precision: Literal["auto", "float32", "bfloat16", "float16"]
    compile: bool
    deterministic: bool
    keep: Literal["last", "best"] | None
    patience: int | None
    track: Literal["trackio", "tensorboard", "wandb", "mlflow"] | None
    student: str | None
    image_size: int | None
    stem: Literal["patch", "conv", "residual"] | None
    patch_size: int | None
    width: int | None
    depth: int | None
    heads: int | None
    init: str | Path | None
    drop_path: float
    crop_pct: float | None
    low_res_size: int | None
    calibrate: bool
    tape: str | Path | None
    record: str | Path | None
    teacher_precision: Literal["auto", "float32", "bfloat16", "float16"]
    teacher_size: int | None
    label_loss: Literal["ce", "bce"]
    temperature: float | None
    label_weight: float | None
    teacher_weight: float | None
    feature_weight: float | None
    distil: Literal["token", "cls", "both", "labels"] | None
    label_smoothing: float
    class_weights: Literal["none", "balanced"]


@final
class Run:
    """A finished run: what it says of itself, its network, its predictions."""

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path)

    def __repr__(self) -> str:
        if not RunFolder(self.path).finished:
            return f"Run({str(self.path)!r})"
        top1, n = self.summary["top1"], self.summary["n"]
        accuracy = fused_or_only(top1)
        return f"Run({str(self.path)!r}: {self.summary['model']}, {accuracy:.1%} validation accuracy, {n} images)"

    def _repr_html_(self) -> str:
        """In a notebook: the figures, and where the page is."""
        lines = [f"<b>{html.escape(repr(self))}</b>"]
        if RunFolder(self.path).finished:
            page = RunFolder(self.path).evaluation("val").page
            rows = "".join(
                f"<tr><td>{html.escape(name)}</td><td>{share} %</td></tr>"
                for name, share, *_ in result_table(self.summary)[1]
            )
            lines.append(f"<table><tbody>{rows}</tbody></table>")
            lines.append(f'<a href="{html.escape(str(page))}">report</a>' if page.is_file() else "")
        return "".join(lines)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What `summary.json` says. Raises UserError where the run is not finished."""
        return RunFolder(self.path).summary()

    @cached_property
    def predictor(self) -> Predictor:
        """The trained network, ready to predict: on the GPU if there is one. Raises UserError."""
        return load_predictor(self.path)

    @property
    def model(self) -> Network:
        """The trained network: images in [0, 1] of shape (B, C, H, W) -> Heads. Raises UserError."""
        return self.predictor.network

    @property
    def classes(self) -> tuple[str, ...]:
        return self.predictor.classes

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        head: HeadChoice = "fused",
        top: int = 5,
        *,
        batch_size: int = 64,
        min_confidence: float = 0.0,
        max_pixels: int = MAX_PIXELS,
        on_unreadable: Callable[[str], None] | None = None,
    ) -> PredictionList:
        """See `Predictor.predict`."""
        return self.predictor.predict(
            images,
            head,
            top,
            batch_size=batch_size,
            min_confidence=min_confidence,
            max_pixels=max_pixels,
            on_unreadable=on_unreadable,
        )

    def evaluate(self, data: str | Path | None = None, *, split: SplitName = "val") -> dict[str, Any]:
        """See `evaluate`."""
        return evaluate(self.path, data, split=split)

    def explain(self, images: ImageLike | Iterable[ImageLike]) -> list[Explanation]:
        """Where both tokens look, and which patches the heads and the teacher need, for each image. Raises UserError."""
        one = isinstance(images, str | Path | Image.Image | np.ndarray)
        return list(explain_run(self.path, [images] if one else images))  # type: ignore[list-item, arg-type]

    def report(self, *, split: SplitName = "val") -> Path:
        """Write the run's page on a split that was evaluated, and return its file: `report.html`. Raises UserError."""
        return write_report(self.path, split)


def train(
    data: str | Path,
    *,
    out: str | Path | None = None,
    teacher: str | Path | Teacher | None = None,
    distillation: Literal["none", "hard", "soft", "zscore", "features"] | LossFunction | None = None,
    recipe: str | Path | None = None,
    resume: bool = False,
    progress: Progress | bool = False,
    **settings: Unpack[Settings],
) -> Run:
    """Train a student on `data` (a name, an image folder or a Parquet folder) and keep the run in `out` (`runs/<data>-<n>` if not given).

    `dk.train("digits", out="runs/first", teacher="runs/cnn", epochs=20, augment="deit")`; the settings are the flags of `deit
    train` and the keys of recipes, by the same names.
    `teacher`: what `--teacher` takes, or what `teacher_from_callable` made of a Python function. `distillation`: a loss by name, or a
    function (student_logits_BK, teacher_logits_BK, batch) -> loss_B. `recipe`: a YAML file or the name of a shipped recipe.
    `progress=True` prints to stderr. Raises UserError.
    """
    given: dict[str, Any] = {**settings}
    for name in ("init", "tape", "record"):
        if given.get(name) is not None:
            given[name] = str(given[name])
    given_teacher = teacher if isinstance(teacher, Teacher) else None
    if teacher is not None:
        given["teacher"] = given_teacher.name if given_teacher else str(teacher)
    if given_teacher is not None:
        if given.get("teacher_size") is not None:
            raise UserError(
                f"settings: teacher_size: teacher {given_teacher.name} declares its input in its preprocessing: leave it out"
            )
        given["teacher_size"] = None  # whatever a recipe says
    function = distillation if callable(distillation) else None
    if distillation is not None:
        given["distillation"] = "callable" if function else distillation
    shown = _shown(progress)
    out = default_out(str(data)) if out is None else _folder("out", out)
    asked = None if recipe is None else find_recipe(str(recipe))
    unasked = teacher_unasked(out, resume, asked)
    lower = lower_settings(out, resume, asked)
    configure = partial(build, RunConfig, given, tape_settings=settings_of, resume=resume, teacher=unasked)
    config = configure(recipe=lower)
    _refuse_processes(config.loop)
    dataset = None
    if lower is None:
        dataset, chosen = opened_unasked(str(data), config, out, resume=resume, given=given, progress=shown)
        config = configure(recipe=find_recipe(chosen)) if chosen else config
    run_training(
        str(data),
        config,
        out,
        resume=resume,
        progress=shown,
        teacher=given_teacher,
        dataset=dataset,
        loss_function=function,
    )
    _report(out, shown)
    return Run(out)


def _folder(name: str, value: object) -> Path:
    """The folder that the keyword `name` gives. Raises UserError."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise UserError(f"{name}: expected the path of a folder (got {brief(value)})")
    return expanded(os.fspath(value))


def _shown(progress: Progress | bool) -> Progress:
    """Where a call reports to: nowhere unless it is asked to."""
    if isinstance(progress, Progress):
        return progress
    return make_progress(main_process=os.environ.get("RANK", "0") == "0") if progress else _Warnings()


def _report(run: Path, progress: Progress) -> None:
    if os.environ.get("RANK", "0") == "0":
        try_report(run, progress.warn)


class _Warnings(Progress):
    """Prints nothing; what calls for action is a Python warning."""

    def warn(self, line: str) -> None:
        warnings.warn(line, stacklevel=3)


def _refuse_processes(loop: LoopConfig) -> None:
    """Raises UserError where several processes are asked for and none was started: a call is one of them."""
    if loop.processes > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"settings: processes: a call from Python trains in this process: use `deit train --processes {loop.processes}`, or torchrun"
        )


def load(run: str | Path) -> Run:
    """A finished run, ready to predict. Raises UserError."""
    loaded = Run(_folder("run", run))
    _ = loaded.predictor
    return loaded


def fit_teacher(
    data: str | Path,
    *,
    out: str | Path,
    recipe: str | Path | None = None,
    resume: bool = False,
    progress: Progress | bool = False,
    **settings: Any,
) -> Run:
    """Fit a convolutional teacher to `data`: `dk.fit_teacher("cifar10", out="runs/cnn", model="cifar-resnet20",
    from_scratch=True)`. The settings are the flags of `deit teacher fit`. Raises UserError."""
    out = _folder("out", out)
    lower = lower_settings(out, resume, None if recipe is None else find_recipe(str(recipe)))
    config = build(FitConfig, settings, recipe=lower, resume=resume)
    _refuse_processes(config.loop)
    shown = _shown(progress)
    if lower is None:
        config = build(
            FitConfig, settings, lower=network_unasked(str(data), config, settings, out, shown), resume=resume
        )
    run_fit(str(data), config, out, resume=resume, progress=shown)
    _report(out, shown)
    return Run(out)


def evaluate(run: str | Path, data: str | Path | None = None, *, split: SplitName = "val") -> dict[str, Any]:
    """Accuracy of every head and of the teacher, agreement, calibration, similarity of the tokens, on a split of the run's own data or of
    other `data`; kept in the run's folder, with a page. Raises UserError."""
    folder = _folder("run", run)
    location = None if data is None else str(data)
    result = evaluate_run(folder, location, split)
    try_report(folder, warnings.warn, split, location)
    return result


def export(
    run: str | Path,
    *,
    out: str | Path,
    format: Format,
    precision: OnnxPrecision = "float32",
    head: HeadChoice = "fused",
    max_disagreement: float = MOST_DISAGREEMENT,
    runtime: str | Path | None = None,
) -> list[str]:
    """Write a finished run's network into the new folder `out`: as ONNX (`onnx`; any network), with a page that runs it in the browser
    (`web`), for telephones (`executorch`), or a student's weights for timm (`timm`), transformers (`hf`) or the original DeiT (`deit`).
    `precision`, `head`, `max_disagreement`, `runtime`: each of some formats, see `deit export --help`.
    Returns the names of the files; one called `rejected` does not predict what the network predicts. Raises UserError, also where the
    format cannot hold the student."""
    settings: dict[str, Any] = {"precision": precision, "head": head, "max_disagreement": max_disagreement}
    settings["runtime"] = None if runtime is None else _folder("runtime", runtime)
    return export_run(_folder("run", run), _folder("out", out), format, progress=_Warnings(), **settings)[0]


def compare(
    data: str | Path,
    *,
    out: str | Path,
    plan: str | Path | Mapping[str, Any] | None = None,
    teacher: str | Path | None = None,
    choose_teacher: Sequence[str | Path] = (),
    losses: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    budget_minutes: float | None = None,
    split: SplitName = "val",
    tapes: str | Path | None = None,
    recipe: str | Path | None = None,
    resume: bool = False,
    progress: Progress | bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """The same student with and without a teacher, or any list of contenders, paired by seed; kept in `out`.

    `dk.compare("fashion-mnist", out="runs/cmp", teacher="auto", student="deit_nano", epochs=10)` compares no teacher, hard
    labels and z-scored logits, or the `losses` that are named. `choose_teacher` compares teachers by the student's accuracy; `plan`, a
    YAML file or the same as a mapping, has any contenders: `shared`, `seeds`, `baseline`, `contenders`. `settings` are those
    of `train`, and override what the plan shares. `split="test"` also evaluates the finished runs on the test split.
    Returns what `comparison.json` says; contenders that failed are listed under `failed`. Raises UserError.
    """
    out = _folder("out", out)
    if teacher is not None:
        settings["teacher"] = str(teacher)
    question = asked_for(
        out, plan=plan, choose_teacher=[str(one) for one in choose_teacher], losses=losses, seeds=seeds,
        budget_minutes=budget_minutes, recipe=None if recipe is None else find_recipe(str(recipe)), resume=resume, settings=settings,
    )  # fmt: skip
    return run_comparison(
        str(data),
        question,
        out,
        resume=resume,
        split=split,
        tapes=None if tapes is None else expanded(tapes),
        progress=_shown(progress),
    )
