"""`deit tape ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deitkit.config import MOST_VIEWS, RunConfig
from deitkit.errors import UserError
from deitkit.flags import Field, Place, parse
from deitkit.progress import Progress, file_size
from deitkit.verbs.common import (
    MOST_WORKERS,
    check_range,
    configured,
    data_field,
    json_field,
    on_terminal,
    percent,
    print_json,
    workers_field,
)


def record(argv: list[str], prog: str, help: str) -> int:
    fields = [
        data_field(),
        Field("out", Path, "folder of the tape; one that was begun is gone on with", metavar="TAPE"),
        Field(
            "views",
            int,
            "views to record of each image: as many as epochs, or fewer, which are gone round",
            metavar="V",
        ),
        Field(
            "answers",
            str | None,
            "hard (decisions, for --distillation hard alone), all (logits, for every loss), or a number: the likeliest classes; "
            "all for up to 100 classes if not given, else hard",
            None,
            metavar="KIND",
        ),
        workers_field(),
    ]
    config, given = configured(RunConfig, argv, prog, help, fields, only=_shapes_a_taped_view)
    if config.teacher.teacher is None:
        raise UserError("--teacher: whose answers are to be recorded?")
    check_range("--views", given.views, 1, MOST_VIEWS)
    check_range("--workers", given.workers, 0, MOST_WORKERS)
    answers: Any = given.answers
    if answers is not None and answers.isascii() and answers.isdigit():
        answers = int(answers)
    if answers not in (None, "hard", "all") and (isinstance(answers, str) or answers < 1):
        raise UserError(f"--answers {answers}: give hard, all, or a number of classes")
    loop = config.loop.model_copy(update={"workers": given.workers})
    config = config.model_copy(update={"loop": loop})
    from deitkit.taping import run_record

    with on_terminal() as progress:
        info = run_record(given.data, config, given.out, views=given.views, answers=answers, progress=progress)
        _show_tape(info, progress)
        progress.say(f"next: deit train {given.data} --tape {given.out} --out runs/distilled")
    return 0


def verify(argv: list[str], prog: str, help: str) -> int:
    fields = [
        Field("tape", Path, "folder of the tape", positional=True, metavar="TAPE"),
        data_field(),
        Field("teacher", str, "whose answers are on the tape", metavar="T"),
        Field("samples", int, "views to ask the teacher about again", 512),
        workers_field(),
        json_field(),
    ]
    given = parse(argv, prog=prog, description=help, fields=fields)
    check_range("--samples", given.samples, 1, 10**9)
    check_range("--workers", given.workers, 0, MOST_WORKERS)
    from deitkit.taping import run_verify

    with on_terminal() as progress:
        found = run_verify(
            given.tape, given.data, given.teacher, samples=given.samples, workers=given.workers, progress=progress
        )
        if given.json:
            print_json(found)
        else:
            progress.say(
                f"{given.tape}: all {found['chunks']} recorded chunks are as they were written; the teacher answers "
                f"{found['sampled'] - found['different']} of {found['sampled']} views as recorded"
            )
    return 0


def info(argv: list[str], prog: str, help: str) -> int:
    fields = [Field("tape", Path, "folder of the tape", positional=True, metavar="TAPE"), json_field()]
    given = parse(argv, prog=prog, description=help, fields=fields)
    from deitkit import taping

    info = taping.tape_info(given.tape)
    if given.json:
        print_json(info)
    else:
        with on_terminal() as progress:
            _show_tape(info, progress)
    return 0


def _shapes_a_taped_view(place: Place) -> bool:
    """Whether a setting has a say in what a teacher is asked: the views, the split, the size of the student."""
    if place.section == "view":
        return place.name != "views"
    return place.section == "data" or place.name in (
        "teacher",
        "teacher_slice",
        "teacher_precision",
        "teacher_size",
        "student",
        "image_size",
    )


def _show_tape(info: dict[str, Any], progress: Progress) -> None:
    view, name = info["view"], {"hard": "decisions", "all": "all logits"}
    rows = [
        ["teacher", f"{info['teacher']}, {percent(info['teacher_top1'])} % right on validation images"],
        ["data", f"{info['data']}: {info['images']} training images, {info['classes']} classes"],
        ["views", f"{info['complete_views']} of {info['views']}, {view['augment']}, view seed {view['view_seed']}"],
        ["answers", name.get(info["answers"], f"the {info['answers']} likeliest classes")],
        ["size", f"{info['record_bytes']} bytes an answer, {file_size(info['bytes'])}"],
    ]
    progress.table("", ["tape", info["tape"]], rows)
