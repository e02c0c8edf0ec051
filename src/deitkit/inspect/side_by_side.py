"""One page on several finished runs of the same classes: figures, curves, settings that differ, images on which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from deitkit.data.dataset import SplitName
from deitkit.inspect.plots import accuracy_curve, validation_curve
from deitkit.inspect.report import (
    MISTAKES,
    MOST_CLASSES,
    SPLITS,
    Finished,
    Picture,
    cost_rows,
    open_finished,
    pictures_of,
    readable_run,
)
from deitkit.pages import short_percent, template
from deitkit.settings import dotted, upgraded
from deitkit.terminal import UserError, load_yaml, write_atomically
from deitkit.training.run import RunFolder


def write_side_by_side(runs: Sequence[Path], page: Path, split: SplitName = "val") -> Path:
    """Write one page on several runs of the same classes, and return its file. Raises UserError."""
    places = [run.resolve() for run in runs]
    for run, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{run}: give each run once")
    write_atomically(page, side_by_side([open_finished(run, split) for run in runs]))
    return page


def side_by_side(runs: Sequence[Finished]) -> str:
    """The page. Raises UserError where runs know other classes than the first one, or the files of one are damaged."""
    first = runs[0]
    for run in runs[1:]:
        if run.classes != first.classes:
            raise UserError(f"{run.path}: knows other classes than {first.path}: they cannot stand side by side")
    names = _short_names([run.path for run in runs])
    figures, curves = [], []
    for run in runs:
        with readable_run(run.path):
            figures.append(_figures(run))
            curves.append(validation_curve(RunFolder(run.path).events()))
    rows = [(what, [one[what] or "–" for one in figures]) for what in figures[0] if any(one[what] for one in figures)]
    drawn = accuracy_curve(list(zip(names, curves, strict=True)), {})
    same = same_images(runs)
    return template("deitkit.inspect", "side_by_side.html.jinja").render(
        which=SPLITS[first.split],
        names=names,
        runs=runs,
        rows=rows,
        curves=None if drawn is None else Markup(drawn),
        classes=_spread_classes(runs),
        settings=_differing_settings(runs),
        pairs=[_pair(first, run) for run in runs[1:]] if same else None,
        differing=differing_pictures(runs, names) if same else [],
    )


def _figures(run: Finished) -> dict[str, str]:
    """The table's lines on a run, below its accuracy: the same ones for every run, empty where nothing is known."""
    teacher = run.teacher
    return {
        "mean of the classes (balanced accuracy), %": short_percent(run.balanced_accuracy),
        "images": str(len(run.predictions)),
        "largest class, %": short_percent(run.largest_class),
        "teacher, %": "" if teacher is None else f"{teacher[0]} {short_percent(teacher[1])}",
        "log loss": f"{run.figures['nll']:.3f}",
        "calibration error, %": short_percent(run.figures["ece"]),
        **dict(cost_rows(run)),
    }


def _spread_classes(runs: Sequence[Finished]) -> list[tuple[str, list[float]]]:
    """(class, its accuracy in each run) of all classes; of more than `MOST_CLASSES` those in which the runs differ most."""
    recall_RK = np.stack([run.recall_K for run in runs])
    spread_K = np.nan_to_num(recall_RK.max(0) - recall_RK.min(0), nan=-1.0)
    shown = np.arange(len(spread_K))
    if len(spread_K) > MOST_CLASSES:
        shown = np.sort(np.argsort(-spread_K, kind="stable")[:MOST_CLASSES])
    return [(runs[0].classes[number], recall_RK[:, number].tolist()) for number in shown.tolist()]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            break
    return names


def _differing_settings(runs: Sequence[Finished]) -> list[tuple[str, list[str]]]:
    """Settings of config.yaml that are not the same in all runs: (name, values)."""
    files = [run.path / "config.yaml" for run in runs]
    flat = [dotted(upgraded(load_yaml(file), str(file))) if file.is_file() else {} for file in files]
    rows = [
        (name, [str(one.get(name, "–")) for one in flat])
        for name in dict.fromkeys(name for one in flat for name in one)
    ]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _pair(one: Finished, other: Finished) -> tuple[int, int, float]:
    """How many images only `one`, and only `other`, classifies correctly, and the probability of so uneven counts if both were equally
    good (exact test of McNemar, two-sided)."""
    from scipy.stats import binomtest

    only_one = int((one.predictions.right_N & ~other.predictions.right_N).sum())
    only_other = int((~one.predictions.right_N & other.predictions.right_N).sum())
    both = only_one + only_other
    return only_one, only_other, float(binomtest(only_one, both).pvalue) if both else 1.0


def same_images(runs: Sequence[Finished]) -> bool:
    """Whether all runs were measured on the same images."""
    first = runs[0].predictions
    return all(
        run.predictions.files == first.files and np.array_equal(run.predictions.label_N, first.label_N) for run in runs
    )


def differing_pictures(
    runs: Sequence[Finished], names: Sequence[str]
) -> list[tuple[Picture, list[tuple[str, str, bool]]]]:
    """Images that some runs classify correctly and others do not, with the prediction of each: (picture, (run, prediction, right))."""
    first = runs[0]
    right_RN = np.stack([run.predictions.right_N for run in runs])
    places = np.flatnonzero(right_RN.any(0) & ~right_RN.all(0))[:MISTAKES].tolist()
    return [
        (picture, [(name, run.classes[run.predictions.prediction_N[place]], bool(run.predictions.right_N[place]))
                   for name, run in zip(names, runs, strict=True)])
        for place, picture in zip(places, pictures_of(first, places), strict=True)
    ]  # fmt: skip
