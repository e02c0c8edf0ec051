"""`deit demo`: on scikit-learn's handwritten digits, a CNN teacher, a plain ViT and a distilled DeiT in a few minutes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from deitkit.api import configured
from deitkit.config import FitConfig, RunConfig
from deitkit.errors import UserError
from deitkit.evaluate import evaluate_run
from deitkit.jobs import run_fit, run_training
from deitkit.progress import Progress

# Fixed beforehand, and the same for both students: the only difference is the teacher.
SEEDS = {"seed": 0, "view_seed": 0, "data_seed": 0}
VIEWS = {"augment": "light"}
TEACHER = {"model": "cifar-resnet8", "from_scratch": True, "epochs": 20, "batch_size": 64, "lr_per_256_images": 2e-2}
STUDENT = {
    "student": "deit_pico",
    "epochs": 40,
    "batch_size": 64,
    "lr_per_256_images": 4e-3,
    "mixup_alpha": 0.8,
}


def run_demo(out: Path, progress: Progress, *, seed: int = 0) -> dict[str, Any]:
    """Run the demo into `out` (teacher/, plain/, distilled/) and show its table. Returns test-split top-1 by name.

    `seed` replaces all three seeds. Raises UserError where `out` is in use by something else."""
    seeds = dict.fromkeys(SEEDS, seed)
    for name in ("teacher", "plain", "distilled"):
        _clear(out / name)
    fit = configured(FitConfig, {**TEACHER, **VIEWS, **seeds})
    progress.say("1 of 3: fitting a small convolutional teacher")
    run_fit("digits", fit, out / "teacher", resume=False, progress=progress)
    progress.say("2 of 3: a plain vision transformer, without the teacher")
    plain = configured(RunConfig, {**STUDENT, **VIEWS, **seeds, "distillation": "none"})
    run_training("digits", plain, out / "plain", resume=False, progress=progress)
    progress.say("3 of 3: the same transformer with a distillation token, taught by the teacher")
    taught = {"teacher": str(out / "teacher"), "distillation": "hard"}
    distilled = configured(RunConfig, {**STUDENT, **VIEWS, **seeds, **taught})
    run_training("digits", distilled, out / "distilled", resume=False, progress=progress)
    scores = {name: evaluate_run(out / name, split="test", workers=0) for name in ("teacher", "plain", "distilled")}
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
    progress.say(verdict(table, n))
    progress.say(
        f"next: deit predict {out / 'distilled'} IMAGE..., or your own photos: deit train FOLDER --teacher auto --out runs/first"
    )
    return table


def verdict(table: dict[str, float], n: int) -> str:
    """One sentence on what happened, whatever happened."""
    images = round((table["fused"] - table["plain"]) * n)
    if images == 0:
        gain = "the teacher changed nothing here: both students are right equally often"
    else:
        word = "more" if images > 0 else "fewer"
        gain = f"with the teacher the student is right on {abs(images)} {word} of {n} test images than without"
    beside = "keeps up with its teacher" if table["fused"] >= table["teacher"] else "stays behind its teacher"
    return (
        f"{gain}, and {beside} (one run: a difference of a few images is chance; docs/results.md has the mean of five)"
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _clear(folder: Path) -> None:
    """Remove an earlier demo's run; refuse to remove anything else."""
    if not folder.exists():
        return
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: already exists and is not a run: give another --out")
    shutil.rmtree(folder)
