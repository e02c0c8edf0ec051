"""`deit teacher ...`."""

from __future__ import annotations

from deitkit.config import FitConfig, RunConfig
from deitkit.errors import complain
from deitkit.flags import Field, given_flags
from deitkit.verbs.common import (
    MOST_PIXELS,
    MOST_WORKERS,
    SPLITS,
    check_range,
    configured,
    data_field,
    in_processes,
    json_field,
    on_terminal,
    percent,
    print_json,
    run_fields,
    split_field,
    split_title,
    workers_field,
)

OF_A_STUDENT = {"layer_decay", "tune", "unlabelled"}
"""Flags that `deit teacher fit` does not show; who gives one is told by `FitConfig` why not."""


def fit(argv: list[str], prog: str, help: str) -> int:
    left_out = OF_A_STUDENT - given_flags(argv).keys()
    config, given = configured(
        FitConfig, argv, prog, help, [data_field(), *run_fields()], only=lambda place: place.name not in left_out
    )
    relaunched = in_processes(config.loop.processes, ["teacher", "fit", *argv])
    if relaunched is not None:
        return relaunched
    from deitkit.fitting import doubt_about_fitted, run_fit

    with on_terminal() as progress:
        summary = run_fit(given.data, config, given.out, resume=given.resume, progress=progress)
        rows = [[config.model, percent(summary["top1"]["cls"])]]
        progress.table(f"right on {summary['n']} validation images", ["teacher", "top-1 %"], rows)
        doubt = doubt_about_fitted(summary)
        if doubt:
            progress.warn(doubt)
        else:
            progress.say(f"next: deit train {given.data} --teacher {given.out} --out runs/distilled")
    return 0


def check(argv: list[str], prog: str, help: str) -> int:
    fields = [
        Field("teacher", str, "timm name, torchvision:NAME, lite0, a run folder, cifar-resnet56@FILE, or several as A+B",
              positional=True, metavar="TEACHER"),
        data_field(),
        Field("teacher_size", int | None, "pixels of the (square) image that the teacher sees; its own if not given", None,
              metavar="N"),
        split_field(),
        workers_field(),
        json_field(),
    ]  # fmt: skip
    config, given = configured(
        RunConfig,
        argv,
        prog,
        help,
        fields,
        only=lambda place: place.section == "data" and place.name not in OF_A_STUDENT,
    )
    check_range("--workers", given.workers, 0, MOST_WORKERS)
    if given.teacher_size is not None:
        check_range("--teacher-size", given.teacher_size, 1, MOST_PIXELS)
    from deitkit.data import load_data
    from deitkit.device import default_device
    from deitkit.evaluation import warn_of_reduced
    from deitkit.feed import evaluation_batches
    from deitkit.teacher import check_teacher, doubt_about, load_teacher, refuse_useless

    dataset = load_data(given.data, config.data)
    size = None if given.teacher_size is None else (given.teacher_size, given.teacher_size)
    teacher = load_teacher(given.teacher, dataset.classes, device=default_device(), image_size=size)
    split = SPLITS[given.split]
    images = dataset.open_split(split)
    facts = check_teacher(teacher, evaluation_batches(images, teacher.preprocessing, workers=given.workers))
    if given.json:
        print_json({**facts, "data": given.data, "split": split})
    else:
        rows = [
            ["right", f"{percent(facts['top1'])} %"],
            ["right among the first five", f"{percent(facts['top5'])} %"],
            ["mean confidence", f"{percent(facts['confidence'])} %"],
            ["classes", facts["classes"]],
            ["input", "{} x {} pixels, {interpolation}".format(*facts["image_size"], **facts)],
            ["mean, std", f"{facts['mean']}, {facts['std']}"],
            ["parameters", f"{facts['parameters'] / 1e6:.2f} M"],
            ["images per second", f"{facts['images_per_second']:.0f}"],
        ]
        with on_terminal() as progress:
            progress.table(split_title(given.data, split, facts["n"]), ["teacher", given.teacher], rows)
    warn_of_reduced(dataset, teacher.preprocessing, given.teacher, _warn)
    refuse_useless(facts)
    doubt = doubt_about(facts)
    if doubt:
        _warn(doubt)
    return 0


def _warn(doubt: str) -> None:
    complain(f"warning: {doubt}")
