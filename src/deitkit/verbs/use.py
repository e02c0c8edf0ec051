"""Verbs that use a finished run: look at it, classify with it, export it."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from functools import cache
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from deitkit.config import MAX_PIXELS, Count, HeadChoice
from deitkit.flags import Argument, Call
from deitkit.terminal import UserError, complain, one_line, percent, plural
from deitkit.verbs.common import (
    JSON,
    RUN,
    SPLIT,
    SPLITS,
    folder,
    on_terminal,
    print_json,
    print_table,
    standard_input,
    warn,
)
from deitkit.waiting import waiting_for

if TYPE_CHECKING:
    from deitkit.distill.teacher import Teacher

PATHS = Argument(
    "paths", tuple[Path, ...], "images, folders, quoted patterns such as 'photos/*.jpg', or - for a list on standard input",
    positional=True, metavar="PATH...",
)  # fmt: skip


def refuse_missing(run: Path, paths: Sequence[Path]) -> None:
    """Raises UserError where the run or a path is not there; called before torch is imported, which takes seconds."""
    for path in (run, *paths):
        with waiting_for(path):
            is_there = path.exists()
        if not is_there and (path == run or not (str(path) == "-" or has_magic(str(path)))):
            raise UserError(f"{path}: no such file or folder")


def refuse_unreadable(lines: Sequence[str]) -> None:
    """Raises UserError, after a line for each, if images were left out."""
    if lines:
        for line in lines[:-1]:
            complain(line)
        raise UserError(f"{lines[-1]} ({plural(len(lines), 'image')} left out)")


def report(call: Call) -> int:
    arguments = [
        Argument("runs", tuple[Path, ...], "folders of finished runs", positional=True, metavar="RUN..."),
        SPLIT,
        folder(
            "write the page to this file; report.html in the run's folder if not given, of several runs.html",
            None,
            "FILE",
        ),
    ]
    given = call.parse(*arguments)
    for run in given.runs:
        refuse_missing(run, ())
    from deitkit.inspect.report import write_report
    from deitkit.inspect.side_by_side import write_side_by_side

    split = SPLITS[given.split]
    if len(given.runs) == 1:
        print(write_report(given.runs[0], split, page=given.out))
    else:
        print(write_side_by_side(given.runs, given.out or given.runs[0].resolve().parent / "runs.html", split))
    return 0


def explain(call: Call) -> int:
    given = call.parse(RUN, PATHS, folder("folder of the pictures and of explanations.json"), JSON)
    refuse_missing(given.run, given.paths)
    from deitkit.data.listing import image_paths
    from deitkit.inspect.explain import explain_run, write_explanations

    unreadable: list[str] = []
    explained = explain_run(given.run, image_paths(given.paths, standard_input()), warn, unreadable.append)
    found = []
    for one, file in write_explanations(explained, given.out):
        found.append(one.as_dict())
        if not given.json:
            rows = [[who, name, percent(share)] for who, (name, share) in one.answers.items()]
            print_table(one_line(f"{one.name}: {file}"), ["answer of", "class", "probability %"], rows)
            print_table("", ["map", "is"], [[shown.title, shown.verdict] for shown in one.attributions])
    if given.json:
        print_json(found)
    refuse_unreadable(unreadable)
    return 0


def predict(call: Call) -> int:
    arguments = [
        RUN,
        PATHS,
        Argument("head", HeadChoice, "head to predict with; fused: mean of both heads' probabilities", "fused"),
        Argument("top", Count, "classes to print for each image", 5),
        Argument(
            "min_confidence", Annotated[float, Field(ge=0, le=1)], "answer `none of these` (JSON: null) where no class is so probable", 0.0,
            metavar="P",
        ),
        Argument("max_pixels", Count, "larger images are taken for unreadable", MAX_PIXELS),
        Argument("format", Literal["table", "json", "csv"], "output format", "table"),
    ]  # fmt: skip
    given = call.parse(*arguments)
    refuse_missing(given.run, given.paths)
    from deitkit.data.listing import image_paths
    from deitkit.models.predict import NONE_OF_THESE, load

    images = image_paths(given.paths, standard_input())
    unreadable: list[str] = []
    predictions = load(given.run).predict(
        images,
        given.head,
        given.top,
        min_confidence=given.min_confidence,
        max_pixels=given.max_pixels,
        on_unreadable=unreadable.append,
    )
    if given.format == "json":
        print_json([prediction.as_dict() for prediction in predictions])
    elif given.format == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["image", "rank", "class", "probability", "answer"])
        writer.writerows([*row, p.answer or NONE_OF_THESE] for p in predictions for row in p.as_rows())
    elif predictions:
        print_table("", ["image", "likeliest"], [[one_line(p.name), p.as_text()] for p in predictions])
    refuse_unreadable(unreadable)
    return 0


def serve(call: Call) -> int:
    from deitkit.deploy.serve import Limits, NoTeacher, require_packages

    arguments = [
        RUN,
        Argument("host", str, "address to listen at; 0.0.0.0 lets other machines in", "127.0.0.1", metavar="H"),
        Argument(
            "port", Annotated[int, Field(ge=0, le=65535)], "port to listen at; 0: any that is free", 8000, metavar="N"
        ),
    ]
    limited = [
        Argument(name, Annotated[(info.annotation, *info.metadata)], info.description or "", info.default)
        for name, info in Limits.model_fields.items()
    ]
    given = call.parse(*arguments, *limited)
    limits = Limits(**{name: getattr(given, name) for name in Limits.model_fields})
    refuse_missing(given.run, ())
    require_packages()
    from deitkit.deploy.serve.server import serve_run
    from deitkit.inspect.explain import explain
    from deitkit.models.predict import load
    from deitkit.training.evaluate import name_of_teacher, teacher_of_run

    predictor, looker = load(given.run), load(given.run)

    @cache
    def teacher() -> Teacher | None:
        """Loaded when it is first asked."""
        try:
            return teacher_of_run(given.run, looker.classes)
        except UserError as error:
            raise NoTeacher(str(error)) from error

    serve_run(
        given.run, predictor, limits, host=given.host, port=given.port, looker=looker, teacher=name_of_teacher(given.run),
        explain=lambda pixels_HWC, ask: explain(looker, pixels_HWC, teacher() if ask else None).with_overlays(),
        say=lambda address: print(f"{predictor.card.name}: {address} (Ctrl-C to stop)", flush=True),
    )  # fmt: skip
    return 0


def export(call: Call) -> int:
    formats = (
        "onnx, web (a page that classifies in the browser), executorch (for telephones), or a student's weights for timm, hf "
        "(Hugging Face transformers) or deit (the original repository)"
    )
    arguments = [
        RUN,
        Argument("format", Literal["onnx", "web", "executorch", "timm", "hf", "deit"], formats, metavar="F"),
        folder("folder to write"),
        Argument("precision", Literal["float32", "float16", "int8"], "onnx, web: number format of the weights", "float32", metavar="P"),
        Argument("head", HeadChoice, "onnx, web, executorch: whose probabilities the file gives; fused: mean of both heads'", "fused"),
        Argument("max_disagreement", Annotated[float, Field(ge=0, le=1)],
                 "all but deit: share of the validation images that may be classified differently", 0.01, metavar="X"),
        Argument("runtime", Path | None, "web: the npm package onnxruntime-web (folder or archive); fetched by npm if not given", None,
                 metavar="PATH"),
    ]  # fmt: skip
    given = call.parse(*arguments)
    from deitkit.deploy.export import export_run

    with on_terminal() as progress:
        files, kept = export_run(
            given.run, given.out, given.format, precision=given.precision, head=given.head, max_disagreement=given.max_disagreement,
            runtime=given.runtime, progress=progress,
        )  # fmt: skip
    print(f"{given.out}: {', '.join(files)}")
    return 0 if kept else 1
