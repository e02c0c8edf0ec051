"""Does a teacher teach better if what it says of a training image comes from a classifier that was fitted without that image?

    python benchmarks/out_of_fold.py DATA --train-images 1000 --recipe few-images [--epochs 40] [--seeds 3] --out DIR

A teacher is probed (its backbone frozen). Two tapes of the same views are recorded: one with the classifier that was fitted to all
training images, one where each image's logits come from the classifier of the cross-validation fold that left the image out (same penalty;
of a mixed image, the fold of the image that the row belongs to). The features are the same on both. Students with the same seeds learn from
each; their validation accuracies are compared in pairs. The test split is not opened.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from deitkit.config import RunConfig
from deitkit.distill import record as recording
from deitkit.distill.teacher import Teacher, load_teacher
from deitkit.settings import build, find_recipe
from deitkit.terminal import Progress
from deitkit.training.fit import fit_automatically
from deitkit.training.jobs import run_record, run_training
from deitkit.training.probe import PROBED, Regression, fold_numbers, principal_axes, split_features
from deitkit.training.setup import load, resolve
from deitkit.views.loader import augment_and_mix

FOLDS = 5


def classifiers_without(folder: Path, teacher: Teacher, dataset: Any, progress: Progress) -> tuple[torch.Tensor, ...]:
    """Weights and biases of the classifier fitted without each fold, and the fold of each training image."""
    penalty = json.loads((folder / PROBED).read_text())["cv"]["penalty"]
    split = dataset.open_split("train")
    features_NF, labels_N = split_features(teacher._network, split, teacher.device, progress)
    assert len(labels_N) == len(split), "all training images must be readable"
    fold_N = fold_numbers(labels_N, 0)
    mean_F, scale_F = features_NF.mean(0), features_NF.std(0, correction=0).clamp_min(1e-6)
    inputs_NF = (features_NF - mean_F) / scale_F
    axes_FR, variance_R = principal_axes(inputs_NF)
    inputs_NR = inputs_NF @ axes_FR
    weights, biases, right = [], [], 0
    for fold in range(FOLDS):
        one = Regression(
            inputs_NR[fold_N != fold], labels_N[fold_N != fold], variance_R, torch.ones(len(dataset.classes))
        )
        one.fit(penalty)
        right += int((1 - one.scores(inputs_NR[fold_N == fold], labels_N[fold_N == fold])[:, 1]).sum())
        weight_KF = one.weight_KR @ axes_FR.T / scale_F
        weights.append(weight_KF)
        biases.append(one.bias_K - weight_KF @ mean_F)
    print(
        f"accuracy on the training images, each by the classifier fitted without it: {100 * right / len(labels_N):.2f} %"
    )
    return torch.stack(weights), torch.stack(biases), fold_N


def record_out_of_fold(
    teacher: Teacher, classifiers: tuple[torch.Tensor, ...], arguments: Any, **settings: Any
) -> None:
    weights_OKF, biases_OK, fold_N = classifiers
    shown: list[torch.Tensor] = []

    def remembered(raw: Any, view: Any, device: torch.device) -> Any:
        batch = augment_and_mix(raw, view, device)
        shown.append(batch.index_B)
        return batch

    def coded_outputs(self: Teacher, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        _, features_BF = self.forward_with_features(images_BCHW)
        fold_B = fold_N[shown.pop()]
        logits_BK = torch.einsum("bkf,bf->bk", weights_OKF[fold_B], features_BF) + biases_OK[fold_B]
        return logits_BK, None if self.code is None else self.code.encode(features_BF)

    with patch.object(recording, "augment_and_mix", remembered), patch.object(Teacher, "coded_outputs", coded_outputs):
        run_record(*arguments, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--train-images", type=int, required=True)
    parser.add_argument("--recipe", default="few-images")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    progress = Progress()
    flags = {
        "train_images": given.train_images,
        "workers": given.workers,
        **({"epochs": given.epochs} if given.epochs else {}),
    }
    config = build(RunConfig, {**flags, "teacher": "auto"}, recipe=find_recipe(given.recipe))
    dataset = load(given.data, config.data, progress)
    fitted = fit_automatically(given.data, dataset, resolve(config, dataset, given.data), progress)
    teacher = load_teacher(str(fitted), dataset.classes)
    tapes = {name: given.out / name for name in ("all", "out-of-fold")}
    config = build(RunConfig, {**flags, "teacher": str(fitted)}, recipe=find_recipe(given.recipe))
    settings: dict[str, Any] = {"views": given.views, "outputs": None, "progress": progress}
    if not tapes["all"].exists():
        run_record(given.data, config, tapes["all"], **settings)
    if not tapes["out-of-fold"].exists():
        classifiers = classifiers_without(fitted, teacher, dataset, progress)
        record_out_of_fold(teacher, classifiers, (given.data, config, tapes["out-of-fold"]), **settings)
    found: dict[str, list[float]] = {name: [] for name in tapes}
    for seed in range(given.seeds):
        for name, tape in tapes.items():
            began = time.perf_counter()
            one = build(RunConfig, {**flags, "tape": str(tape), "seed": seed}, recipe=find_recipe(given.recipe))
            summary = run_training(given.data, one, given.out / f"{name}-{seed}", resume=False, progress=progress)
            top1 = summary["top1"]["fused"]
            found[name].append(100 * top1)
            print(
                f"seed {seed}, {name}: {100 * top1:.2f} % of {summary['n']} ({time.perf_counter() - began:.0f} s)",
                flush=True,
            )
    for name, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        print(f"{name}: {statistics.mean(values):.2f} ± {spread:.2f} (n = {len(values)})")
    differences = np.subtract(found["out-of-fold"], found["all"])
    print(f"out-of-fold - all: {differences.mean():+.2f}, each {np.round(differences, 2).tolist()}")


if __name__ == "__main__":
    main()
