"""`deit demo`: on scikit-learn's handwritten digits, a CNN teacher, a plain ViT and a distilled DeiT in a few minutes."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image

from deitkit.config import DataConfig, FitConfig, RunConfig
from deitkit.data import load_data
from deitkit.settings import build
from deitkit.terminal import Progress, UserError
from deitkit.training.evaluate import evaluate_run
from deitkit.training.jobs import run_fit, run_training

# Fixed beforehand, and the same for both students: the only difference is the teacher. float32, so that machines agree.
RUNS = ("teacher", "plain", "distilled")
MARKER = "made-by-deit-demo.txt"
SEEDS = {"seed": 0, "view_seed": 0, "data_seed": 0}
VIEWS = {"augment": "light"}
TEACHER = {
    "model": "cifar-resnet8",
    "from_scratch": True,
    "epochs": 20,
    "optimizer": "adamw",
    "precision": "float32",
    "batch_size": 64,
    "base_lr": 2e-2,
}
STUDENT = {
    "student": "deit_pico",
    "epochs": 40,
    "optimizer": "adamw",
    "precision": "float32",
    "batch_size": 64,
    "base_lr": 4e-3,
    "mixup_alpha": 0.8,
}


def run_demo(out: Path, progress: Progress, *, seed: int = 0) -> dict[str, Any]:
    """Run the demo into `out` (teacher/, plain/, distilled/) and show its table. Returns test-split top-1 by name.

    `seed` replaces all three seeds. Raises UserError where `out` is in use by something else."""
    seeds = dict.fromkeys(SEEDS, seed)
    _begin(out)
    progress.every = 10
    fit = build(FitConfig, {**TEACHER, **VIEWS, **seeds})
    progress.say("1 of 3: fitting a small convolutional teacher")
    run_fit("digits", fit, out / "teacher", resume=False, progress=progress)
    progress.say("2 of 3: a plain vision transformer, without the teacher")
    plain = build(RunConfig, {**STUDENT, **VIEWS, **seeds, "distillation": "none"})
    run_training("digits", plain, out / "plain", resume=False, progress=progress)
    progress.say("3 of 3: the same transformer with a distillation token, taught by the teacher")
    taught = {"teacher": str(out / "teacher"), "distillation": "hard"}
    distilled = build(RunConfig, {**STUDENT, **VIEWS, **seeds, **taught})
    run_training("digits", distilled, out / "distilled", resume=False, progress=progress)
    scores = {name: evaluate_run(out / name, split="test", workers=0) for name in RUNS}
    table = {
        "teacher": scores["teacher"]["top1"]["cls"],
        "plain": scores["plain"]["top1"]["cls"],
        **{head: scores["distilled"]["top1"][head] for head in ("cls", "dist", "fused")},
    }
    rows = [
        ["teacher (CNN)", percent(table["teacher"])],
        ["plain ViT", percent(table["plain"])],
        ["distilled DeiT: class head", percent(table["cls"])],
        ["distilled DeiT: distillation head", percent(table["dist"])],
        ["distilled DeiT: both fused", percent(table["fused"])],
    ]
    n = scores["plain"]["n"]
    progress.table(f"digits: right on {n} test images", ["network", "top-1"], rows)
    for line in textwrap.wrap(verdict(table, n), 100):
        progress.say(line)
    digit = out / "digit.png"
    _write_digit(digit)
    program = program_path()
    progress.say("next, a digit that none of them has seen, and your own photos:")
    progress.say(f"  {program} predict {out / 'distilled'} {digit}")
    progress.say(f"  {program} train FOLDER --teacher auto --out runs/first")
    return table


def program_path() -> str:
    """What to type for this program: `deit`, or its path where the shell would not find it."""
    if shutil.which("deit"):
        return "deit"
    beside = Path(sys.executable).with_name("deit")
    if not beside.is_file():
        return "python -m deitkit.cli"
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


def verdict(table: dict[str, float], n: int) -> str:
    """One sentence on what happened, whatever happened."""
    images = round((table["fused"] - table["plain"]) * n)
    if images == 0:
        gain = "with the teacher the student is right as often as without"
    else:
        word = "more" if images > 0 else "fewer"
        gain = f"with the teacher the student is right on {abs(images)} {word} of {n} test images than without"
    beside = "keeps up with its teacher" if table["fused"] >= table["teacher"] else "stays behind its teacher"
    return (
        f"{gain}, and {beside} (one run: a difference of a few images is chance; docs/results.md has the mean of five)"
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _begin(out: Path) -> None:
    """An empty folder for the demo: what an earlier demo left is removed, anything else is refused."""
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise UserError(f"{out}: already exists and no demo made it: give another --out")
        for name in RUNS:
            shutil.rmtree(out / name, ignore_errors=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text("deit demo may replace the runs beside this file\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be created: {error.strerror}") from error


def _write_digit(path: Path) -> None:
    """One test image as a file, so that there is something to predict. Seen by nobody during the training."""
    split = load_data("digits", DataConfig()).open_split("test")
    Image.fromarray(split.read(0)[..., 0]).resize((64, 64), Image.Resampling.NEAREST).save(path)
