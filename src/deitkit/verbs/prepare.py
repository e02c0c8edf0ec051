"""Verbs for what a run needs: networks and recipes to choose from, data, teachers, tapes."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from pydantic import Field

from deitkit.config import MOST_VIEWS, Count, FitConfig, Pixels, RunConfig
from deitkit.flags import Argument, Call
from deitkit.settings import Place, card, find_recipe, lower_settings, shipped
from deitkit.terminal import UserError, file_size, percent, quoted
from deitkit.verbs.common import (
    AGAIN,
    DATA,
    DATA_ONCE,
    JSON,
    RECIPE,
    RESUME,
    SPLIT,
    SPLITS,
    TAPE,
    WORKERS,
    accuracy_title,
    folder,
    in_processes,
    location,
    on_terminal,
    print_json,
    print_table,
    resumable,
    say_report,
    to_continue,
    warn,
)


def models(call: Call) -> int:
    given = call.parse(JSON)
    from deitkit.models.zoo import describe_students

    rows = describe_students()
    if given.json:
        print_json(rows)
    else:
        print_table("", STUDENT_COLUMNS, [student_cells(row) for row in rows])
    return 0


STUDENT_COLUMNS = ["student", "parameters", "GMAC", "image size", "tokens", "weights"]


def student_cells(row: dict[str, Any]) -> list[str]:
    """A row of `describe_students` as `deit models` prints it."""
    return [
        row["name"],
        f"{row['parameters'] / 1e6:.2f} M",
        f"{row['gmac']:.3f}",
        "{}x{}".format(*row["image_size"]),
        str(row["tokens"]),
        row["weights"] or "",
    ]


def recipes(call: Call) -> int:
    name = Argument("name", str | None, "print this recipe", None, positional=True, metavar="[NAME]")
    given = call.parse(name)
    if given.name is not None:
        path = find_recipe(given.name)
        try:
            print(path.read_text(encoding="utf-8"), end="")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not a recipe: not a text file") from error
        return 0
    with on_terminal() as progress:
        progress.table("", ["recipe", "title"], [[name, card(path)[0]] for name, path in shipped().items()])
        progress.say("deit train DATA --recipe NAME uses one; deit recipes NAME prints it")
    return 0


# -------------------------------------------------------------------------------------------------------- data


def _of_views(place: Place) -> bool:
    return place.section in ("data", "view") and place.name != "views"


def show(call: Call) -> int:
    arguments = [
        DATA,
        Argument("views", Annotated[int, Field(ge=0, le=100)], "views to show of each image", 6),
        folder("write a sheet of images and their views to this PNG file", None, "PNG"),
        RECIPE,
        JSON,
    ]
    config, given = call.configured(RunConfig, *arguments, only=_of_views)
    from deitkit.data import load_data
    from deitkit.training.setup import resolve_view, say_unlabelled, student_architecture
    from deitkit.views.loader import describe, facts_lines, facts_rows, save_view_sheet

    dataset = load_data(given.data, config.data)
    facts = describe(dataset)
    if given.json:
        print_json(facts)
    else:
        with on_terminal() as progress:
            progress.table(facts["name"], ["class", "train", "validation"], facts_rows(facts))
            print("\n".join(facts_lines(facts)))
            say_unlabelled(dataset, progress)
    if given.out is not None:
        view = resolve_view(config.view, dataset, student_architecture(config, dataset).image_size)
        save_view_sheet(dataset, view, given.views, given.out)
        print(f"{given.out}: each row is an image and {given.views} views of it", file=sys.stderr)
    return 0


def cache(call: Call) -> int:
    arguments = [
        DATA,
        Argument(
            "size",
            Pixels,
            "pixels of the shorter side; at least image size / 0.875 of every network that will see the photos, student and teacher "
            "(256 for 224, 146 for 128); smaller images are not enlarged",
            metavar="N",
        ),
        folder("folder of the resized images: the DATA of later commands"),
    ]
    config, given = call.configured(RunConfig, *arguments, only=lambda place: place.section == "data")
    from deitkit.data import load_data, refuse_among_images
    from deitkit.data.arrow import write_resized
    from deitkit.training.setup import say_unlabelled

    refuse_among_images(given.data, given.out)
    dataset = load_data(given.data, config.data)
    with on_terminal() as progress:
        for line in (*(f"left out: {bad}" for bad in dataset.bad_images), *dataset.remarks):
            progress.warn(line)
        say_unlabelled(dataset, progress)
        progress.start(sum(len(dataset.open_split(name)) for name in dataset.split_names), "resizing", unit="images")
        counts = write_resized(
            dataset, config.data, given.size, given.out, lambda done: progress.step(done, done, 0, 0)
        )
        progress.finish()
        size = sum(path.stat().st_size for path in given.out.iterdir())
        images = ", ".join(f"{count} {name}" for name, count in counts.items())
        progress.say(f"{given.out}: {images} images, {file_size(size)}")
        unlabelled = " --unlabelled" if config.data.unlabelled else ""
        progress.say(f"next: deit train {quoted(given.out)} --teacher auto{unlabelled}")
    return 0


# ---------------------------------------------------------------------------------------------------- teachers

SHOWN_TO_A_TEACHER = {"teacher", "teacher_precision", "teacher_size", "feature_weight", "student", "image_size"}
"""Settings, besides those of data and views, that affect what a teacher is shown or what is recorded of it."""
OF_A_STUDENT = {"layer_decay", "trainable", "unlabelled", "oversample"}
"""Settings that `deit teacher fit` has no flags for."""


def fit(call: Call) -> int:
    arguments = [DATA_ONCE, folder("folder of the run"), RESUME, RECIPE]
    given, flags, configure = call.configurable(
        FitConfig, *arguments, only=lambda place: place.name not in OF_A_STUDENT
    )
    configure()
    data = location(given.data, given.out, given.resume, call.prog)
    recipe = find_recipe(given.recipe) if given.recipe else None
    lower = lower_settings(given.out, given.resume, recipe)
    config = configure(recipe=lower)
    relaunched = in_processes(config.loop.processes, ["teacher", "fit", *call.argv])
    if relaunched is not None:
        return relaunched
    from deitkit.training.fit import doubt_about_fitted, network_unasked, run_fit

    with resumable(given.out, "config.yaml", to_continue("teacher fit", given.out)), on_terminal() as progress:
        if lower is None:
            config = configure(lower=network_unasked(data, config, flags, given.out, progress))
        summary = run_fit(data, config, given.out, resume=given.resume, progress=progress)
        rows = [[config.model, percent(summary["top1"]["cls"])]]
        progress.table(accuracy_title("val", summary["n"]), ["teacher", "top-1 %"], rows)
        doubt = doubt_about_fitted(summary, given.out)
        if doubt:
            progress.warn(doubt)
        else:
            progress.say(f"next: deit predict {quoted(given.out)} IMAGE...")
            progress.say(f"next: deit train {quoted(data)} --teacher {quoted(given.out)}")
        say_report(given.out, progress)
    return 0


def check(call: Call) -> int:
    arguments = [
        Argument("teacher", str, "a timm name, torchvision:NAME, lite0, a run folder, cifar-resnet56@FILE, or several as A+B",
                 positional=True, metavar="TEACHER"),
        DATA,
        Argument("teacher_size", Pixels | None, "pixels of the teacher's (square) input; its own if not given", None, metavar="N"),
        SPLIT,
        WORKERS,
        JSON,
    ]  # fmt: skip
    config, given = call.configured(
        RunConfig,
        *arguments,
        only=lambda place: place.section == "data" and place.name not in OF_A_STUDENT,
    )
    from deitkit.distill.teacher import doubt_about, refuse_useless
    from deitkit.training.evaluate import check_teacher_on

    split = SPLITS[given.split]
    facts = check_teacher_on(given.data, config.data, given.teacher, given.teacher_size, split, given.workers, warn)
    if given.json:
        print_json({**facts, "data": given.data, "split": split})
    else:
        rows = [
            ["top-1", f"{percent(facts['top1'])} %"],
            *([["top-5", f"{percent(facts['top5'])} %"]] if facts["classes"] > 5 else []),
            ["mean confidence", f"{percent(facts['confidence'])} %"],
            ["classes", facts["classes"]],
            ["input", "{} x {} pixels, {interpolation}".format(*facts["image_size"], **facts)],
            ["mean, std", f"{facts['mean']}, {facts['std']}"],
            ["parameters", f"{facts['parameters'] / 1e6:.2f} M"],
            ["images per second", f"{facts['images_per_second']:.0f}"],
            *([["taken off its weights", ", ".join(facts["taken_off"])]] if facts["taken_off"] else []),
        ]
        print_table(accuracy_title(split, facts["n"], given.data), ["teacher", given.teacher], rows)
    refuse_useless(facts)
    doubt = doubt_about(facts)
    if doubt:
        warn(doubt)
    return 0


# ------------------------------------------------------------------------------------------------------- tapes


def record(call: Call) -> int:
    arguments = [
        DATA,
        folder("folder of the tape; a partial tape is completed", metavar="TAPE"),
        Argument(
            "views", Annotated[int, Field(ge=1, le=MOST_VIEWS)], "views to record of each image; fewer than epochs are repeated",
            metavar="V",
        ),
        Argument(
            "outputs",
            Literal["hard", "all", "features"] | Annotated[int, Field(gt=0)] | None,
            "hard (labels), all (logits), K (top-K logits) or features (alone); all for up to 100 classes if not given, else hard",
            None,
            metavar="KIND",
        ),
        RECIPE,
        WORKERS,
    ]  # fmt: skip
    only = lambda place: _of_views(place) or place.name in {*SHOWN_TO_A_TEACHER, "processes"}  # noqa: E731
    config, given = call.configured(RunConfig, *arguments, only=only)
    if config.teacher.teacher is None:
        raise UserError("--teacher: give the teacher to record")
    relaunched = in_processes(config.loop.processes, ["tape", "record", *call.argv])
    if relaunched is not None:
        return relaunched
    config = config.changed(loop={"workers": given.workers})
    from deitkit.distill.record import info_rows
    from deitkit.training.jobs import run_record

    with resumable(given.out, "tape.json", AGAIN), on_terminal() as progress:
        info = run_record(given.data, config, given.out, views=given.views, outputs=given.outputs, progress=progress)
        progress.table("", ["tape", info["tape"]], info_rows(info))
        progress.say(f"next: deit train {quoted(given.data)} --teacher {quoted(given.out)}")
    return 0


def verify(call: Call) -> int:
    arguments = [
        TAPE,
        DATA,
        Argument("teacher", str, "the teacher that was recorded", metavar="T"),
        Argument("samples", Count, "views to compute again with the teacher", 512),
        WORKERS,
        JSON,
    ]
    given = call.parse(*arguments)
    from deitkit.training.jobs import run_verify

    with on_terminal() as progress:
        tape, samples = given.tape, given.samples
        found = run_verify(tape, given.data, given.teacher, samples=samples, workers=given.workers, progress=progress)
        same = f"{found['sampled'] - found['different']} of {found['sampled']} sampled outputs match the teacher's"
        if given.json:
            print_json(found)
        else:
            progress.say(f"{tape}: all {found['chunks']} checksums match; {same}")
    return 0


def info(call: Call) -> int:
    given = call.parse(TAPE, JSON)
    from deitkit.distill.record import info_rows, tape_info

    facts = tape_info(given.tape)
    if given.json:
        print_json(facts)
    else:
        print_table("", ["tape", facts["tape"]], info_rows(facts))
    return 0
