"""`deit demo`: what a convolutional teacher is worth to a vision transformer, in two minutes on scikit-learn's digits.

Three runs: a small CNN, a ViT without a teacher, and the same ViT with a distillation token that learns from the CNN. The students have
the paper's patch embedding, one linear map per patch, so that nothing convolutional but the teacher is in them; images, views,
optimizer and steps are the same. Then a table, a verdict, and a picture.
"""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Bool, Int64, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from deitkit.comparison.report import MARKERS
from deitkit.config import FitConfig, RunConfig
from deitkit.data import load_data
from deitkit.inspect.charts import COLOURS, STYLE
from deitkit.inspect.plots import validation_curve
from deitkit.inspect.report import try_report
from deitkit.settings import build
from deitkit.terminal import Progress, UserError, is_filled, quoted, written
from deitkit.training.evaluate import evaluate_run
from deitkit.training.fit import run_fit
from deitkit.training.jobs import run_training
from deitkit.training.predictions import read_predictions
from deitkit.training.run import RunFolder
from deitkit.training.tables import standard_error

RUNS = ("teacher", "plain", "distilled")
MARKER, PICTURE, DIGIT = "made-by-deit-demo.txt", "demo.png", "digit.png"
COLUMNS = 80
# The same for both students but for the teacher: the paper's patch embedding, AdamW and mixup 0.8. docs/evidence/demo.md has what
# else was tried, on validation images of other seeds. float32, so that machines agree.
SHARED = {"augment": "light", "optimizer": "adamw", "precision": "float32", "batch_size": 64}
TEACHER = {"model": "cifar-resnet8", "from_scratch": True, "epochs": 20, "base_lr": 2e-2}
STUDENT = {"student": "deit_pico", "stem": "patch", "epochs": 40, "base_lr": 4e-3, "mixup_alpha": 0.8}
DISTILLATION = "zscore"


def run_demo(out: Path, progress: Progress, *, seed: int = 0) -> dict[str, float]:
    """Train a CNN teacher, a plain and a distilled student on the digits into `out` (teacher/, plain/, distilled/), show how they
    compare, and draw `demo.png`. Returns test accuracies, 0 to 1: teacher, plain, the distilled student's cls, dist and fused,
    and the share of the largest class. `seed` replaces all three seeds. Raises UserError if `out` is in use by something else."""
    _prepare(out)
    progress.every = 10
    shared = {**SHARED, **dict.fromkeys(("seed", "view_seed", "data_seed"), seed)}
    progress.say("1 of 3: fitting a small convolutional teacher")
    fit = build(FitConfig, {**shared, **TEACHER})
    run_fit("digits", fit, out / "teacher", resume=False, progress=progress)
    students = {
        "plain": ("a vision transformer without a teacher", {"distillation": "none"}),
        "distilled": (
            "the same with a distillation token",
            {"teacher": str(out / "teacher"), "distillation": DISTILLATION},
        ),
    }
    for number, (name, (what, settings)) in enumerate(students.items(), 2):
        progress.say(f"{number} of 3: {what}")
        config = build(RunConfig, {**shared, **STUDENT, **settings})
        run_training("digits", config, out / name, resume=False, progress=progress)
    for name in RUNS:
        try_report(out / name, progress.warn)
    dataset = load_data("digits", fit.data)
    test = dataset.open_split("test")
    measured = {name: evaluate_run(out / name, split="test", workers=0) for name in RUNS}
    top1 = {name: result["top1"] for name, result in measured.items()}
    accuracies = {
        "largest_class": measured["plain"]["largest_class"],
        "teacher": top1["teacher"]["cls"],
        "plain": top1["plain"]["cls"],
        **{head: top1["distilled"][head] for head in ("cls", "dist", "fused")},
    }
    digits_NHW = np.stack([test.read(position)[..., 0] for position in range(len(test))])
    folders = {name: RunFolder(out / name) for name in RUNS}
    plain_N, distilled_N = (
        read_predictions(folders[name].evaluation("test").predictions, test, dataset.classes).prediction_N
        for name in ("plain", "distilled")
    )
    answers = Answers(digits_NHW, test.labels_N, plain_N, distilled_N)
    draw(
        out / PICTURE,
        # the heads are weighed against each other after the last epoch: until then the fused prediction is the class head's, mostly
        {
            "plain": validation_curve(folders["plain"].events()),
            "distilled": validation_curve(folders["distilled"].events(), "dist"),
        },
        teacher=folders["teacher"].summary()["top1"]["cls"],
        largest_class=folders["plain"].summary()["largest_class"],
        answers=answers,
    )
    Image.fromarray(digits_NHW[0]).resize((64, 64), Image.Resampling.NEAREST).save(out / DIGIT)
    _show(out, accuracies, answers, progress)
    return accuracies


def _prepare(out: Path) -> None:
    """Make room for the runs. Raises UserError rather than remove what another program wrote."""
    if is_filled(out) and not (out / MARKER).is_file():
        raise UserError(f"{out}: already exists and was not made by deit demo: give another --out")
    for name in RUNS:
        shutil.rmtree(out / name, ignore_errors=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text("deit demo may replace the runs beside this file\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be created: {error.strerror}") from error


# ------------------------------------------------------------------------------------------------ table and verdict


class Answers(NamedTuple):
    """What both students predict for the test digits; the distilled one with both heads, fused."""

    digits_NHW: UInt8[np.ndarray, "N H W"]
    labels_N: Int64[np.ndarray, " N"]
    plain_N: Int64[np.ndarray, " N"]
    distilled_N: Int64[np.ndarray, " N"]

    @property
    def groups(self) -> dict[str, Bool[np.ndarray, " N"]]:
        """Which digits only one student classifies correctly, both, or neither."""
        plain_N, distilled_N = self.plain_N == self.labels_N, self.distilled_N == self.labels_N
        return {
            "only distilled": distilled_N & ~plain_N,
            "only plain": plain_N & ~distilled_N,
            "both": plain_N & distilled_N,
            "neither": ~plain_N & ~distilled_N,
        }


TITLES = {
    "largest_class": "largest class",
    "teacher": "teacher (CNN)",
    "plain": "plain ViT",
    "cls": "distilled DeiT: class head",
    "dist": "distilled DeiT: distillation head",
    "fused": "distilled DeiT: both, fused",
}


def _show(out: Path, accuracies: Mapping[str, float], answers: Answers, progress: Progress) -> None:
    n = len(answers.labels_N)
    rows = [[TITLES[key], _with_error(share, n)] for key, share in accuracies.items()]
    progress.table(f"digits: test accuracy ± its standard error, % ({n} images)", ["network", "top-1"], rows)
    for line in textwrap.wrap(verdict(answers), COLUMNS):
        progress.say(line)
    program = (
        "deit" if shutil.which("deit") else "python -m deitkit" if sys.argv[0].endswith(".py") else quoted(sys.argv[0])
    )
    progress.say(f"picture: {out / PICTURE}")
    progress.say("next, predict a digit that none of them has seen, and train on your own photos:")
    progress.say(f"  {program} predict {quoted(out / 'distilled')} {quoted(out / DIGIT)}")
    progress.say(f"  {program} train FOLDER --teacher auto")


def _with_error(share: float, n: int) -> str:
    return f"{100 * share:.1f} ± {100 * standard_error(share, n):.1f}"


def verdict(answers: Answers) -> str:
    """One sentence on what happened, whatever happened. The test is McNemar's: only digits on which one student is right and the other
    one wrong tell the two apart."""
    n, counts = len(answers.labels_N), {name: int(chosen_N.sum()) for name, chosen_N in answers.groups.items()}
    won, lost = counts["only distilled"], counts["only plain"]
    error = math.sqrt(won + lost - (won - lost) ** 2 / n)
    effect = "makes no significant difference"
    if abs(won - lost) > 1.96 * error:
        effect = "helps" if won > lost else "harms"
    return (
        f"The teacher {effect}: {100 * (won - lost) / n:+.1f} ± {100 * error / n:.1f} points: the distilled student is right on {won} of "
        f"{n} digits where the plain one is wrong, and wrong on {lost} where that is right (one run each; docs/results.md has five seeds)."
    )


# ---------------------------------------------------------------------------------------------------------- picture

SHOWN = {"only distilled": "only the distilled student is right", "only plain": "only the plain student is right",
         "neither": "both are wrong"}  # fmt: skip
PER_GROUP = 4
WRONG = COLOURS[2]
LOOKS: dict[str, Any] = {
    "distilled": {"color": COLOURS[1], "marker": MARKERS[1]},
    "plain": {"color": COLOURS[0], "marker": MARKERS[0]},
}
"""Of the students' curves; they differ in black and white, too."""
CURVES = {"distilled": "distillation head", "plain": "plain"}
CURVES_TITLE = "One student, with and without a teacher"
INCHES, DOTS_PER_INCH = (9.0, 4.9), 200


def draw(
    path: Path,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    teacher: float,
    largest_class: float,
    answers: Answers,
) -> None:
    """Write the picture: validation accuracies by epoch on the left (the distilled student's of its distillation head), with the
    `teacher`'s and the share of the `largest_class`; on the right the first test digits of each group, with what the students predict.
    Raises UserError."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=INCHES, layout="constrained", dpi=DOTS_PER_INCH)
        FigureCanvasAgg(figure)
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.0, 1.05)).flat
        _draw_curves(left, curves, teacher, largest_class)
        _draw_digits(right, answers)
        with written(path):
            figure.savefig(path)


def _draw_curves(
    part: SubFigure, curves: Mapping[str, Sequence[tuple[int, float]]], teacher: float, largest_class: float
) -> None:
    axes = part.add_subplot()
    axes.axhline(100 * teacher, color=COLOURS[3], ls="--", lw=1.4, label=f"teacher (CNN), {100 * teacher:.1f}")
    for name, look in LOOKS.items():
        epochs, shares = zip(*curves[name], strict=True)
        label, every = f"{CURVES[name]}, {100 * shares[-1]:.1f}", max(1, len(epochs) // 8)
        axes.plot(epochs, [100 * share for share in shares], **look, label=label, markevery=every, ms=5, lw=1.6)
    largest = f"largest class, {100 * largest_class:.1f}"
    axes.axhline(100 * largest_class, color="#777777", ls=":", lw=1.4, label=largest)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(0, 103), title=CURVES_TITLE)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    part.legend(loc="outside lower center", ncols=2, handlelength=3)


def _draw_digits(part: SubFigure, answers: Answers) -> None:
    n, groups = len(answers.labels_N), answers.groups
    part.suptitle(f"Test digits: both are right on {int(groups['both'].sum())} of {n}", fontsize=12)
    for row, name in zip(part.subfigures(len(SHOWN), 1, squeeze=False).flat, SHOWN, strict=True):
        positions = np.flatnonzero(groups[name])
        row.suptitle(f"{SHOWN[name]}: {len(positions)} of {n}", fontsize=10)
        for place, axes in enumerate(row.subplots(1, PER_GROUP).flat):
            axes.set_axis_off()
            if place < len(positions):
                _draw_digit(axes, answers, int(positions[place]))


def _draw_digit(axes: Axes, answers: Answers, position: int) -> None:
    label = answers.labels_N[position]
    axes.imshow(answers.digits_NHW[position], cmap="gray_r", interpolation="nearest")
    lines = {"label": label, "plain": answers.plain_N[position], "distilled": answers.distilled_N[position]}
    for number, (who, digit) in enumerate(lines.items()):
        look: Any = {"color": WRONG, "fontweight": "bold"} if digit != label else {}
        axes.annotate(f"{who} {digit}", (0.5, 0), (0, -2 - 11 * number), "axes fraction", "offset points",
                      ha="center", va="top", fontsize=8.5, **look)  # fmt: skip
