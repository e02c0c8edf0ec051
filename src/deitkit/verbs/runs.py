"""`deit train`, `deit evaluate`, `deit predict`, `deit export`."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from deitkit.config import HEADS, HeadChoice, RunConfig
from deitkit.errors import UserError, complain, one_line
from deitkit.flags import Field, parse
from deitkit.verbs.common import (
    MOST_WORKERS,
    SPLITS,
    check_range,
    configured,
    data_field,
    head_rows,
    in_processes,
    json_field,
    on_terminal,
    percent,
    print_json,
    run_field,
    run_fields,
    split_field,
    split_title,
    workers_field,
)


def train(argv: list[str], prog: str, help: str) -> int:
    recipe = Field(
        "recipe", str | None, "a YAML file, or the name of a shipped one (deit recipes): other defaults", None
    )
    config, given = configured(RunConfig, argv, prog, help, [data_field(), *run_fields(), recipe])
    relaunched = in_processes(config.loop.processes, ["train", *argv])
    if relaunched is not None:
        return relaunched
    from deitkit.jobs import run_training

    with on_terminal() as progress:
        summary = run_training(given.data, config, given.out, resume=given.resume, progress=progress)
        progress.table(f"right on {summary['n']} validation images", ["network", "top-1 %"], head_rows(summary))
        test = f"deit evaluate {given.out} --split test, or " if summary["has_test"] else ""
        progress.say(f"next: {test}deit predict {given.out} IMAGE...")
    return 0


def evaluate(argv: list[str], prog: str, help: str) -> int:
    fields = [
        run_field(),
        Field("data", str | None, "other data; the run's own if not given", None, positional=True, metavar="[DATA]"),
        split_field(),
        workers_field(),
        json_field(),
    ]
    given = parse(argv, prog=prog, description=help, fields=fields)
    check_range("--workers", given.workers, 0, MOST_WORKERS)
    from deitkit.evaluation import evaluate_run

    split = SPLITS[given.split]
    warn = lambda line: complain(f"warning: {line}")  # noqa: E731
    result = evaluate_run(given.run, given.data, split, given.workers, warn)
    if given.json:
        print_json(result)
        return 0
    with on_terminal() as progress:
        agreement, columns = result.get("agreement"), ["network", "top-1 %"]
        rows = head_rows(result)
        if agreement:
            columns.append("as the teacher %")
            heads = [head for head in HEADS if result["top1"].get(head) is not None]
            rows = [
                [*row, chosen] for row, chosen in zip(rows, ["-", *(percent(agreement[h]) for h in heads)], strict=True)
            ]
        progress.table(split_title(result["data"], split, result["n"]), columns, rows)
        which = "" if result["top1"].get("dist") is None else " of both, fused"
        progress.say(
            f"probabilities{which}: the right class costs {result['nll']:.3f} nats an image, "
            f"confidence is {percent(result['ece'])} % off (expected calibration error)"
        )
    return 0


def predict(argv: list[str], prog: str, help: str) -> int:
    fields = [
        run_field(),
        Field("paths", tuple[Path, ...], "images, or folders of them", positional=True, metavar="PATH..."),
        Field("head", HeadChoice, "which head answers; fused: the mean of both heads' probabilities", "fused"),
        Field("top", int, "classes to show of each image", 5),
        Field("format", Literal["table", "json", "csv"], "how to print", "table"),
    ]
    given = parse(argv, prog=prog, description=help, fields=fields)
    check_range("--top", given.top, 1, 10**9)
    if not given.paths:
        raise UserError("PATH: give images, or folders of them")
    images = _image_files(given.paths)
    from deitkit.predict import load

    unreadable: list[str] = []
    predictions = load(given.run).predict(images, given.head, given.top, on_unreadable=unreadable.append)
    if given.format == "json":
        print_json([prediction.as_dict() for prediction in predictions])
    elif given.format == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["image", "rank", "class", "probability"])
        for p in predictions:
            chances = zip(p.classes, p.probabilities, strict=True)
            writer.writerows([p.name, rank, label, f"{chance:.6f}"] for rank, (label, chance) in enumerate(chances, 1))
    elif predictions:
        with on_terminal() as progress:
            rows = [
                [
                    one_line(p.name),
                    ", ".join(f"{c} {100 * x:.1f} %" for c, x in zip(p.classes, p.probabilities, strict=True)),
                ]
                for p in predictions
            ]
            progress.table("", ["image", "likeliest"], rows)
    if unreadable:
        for line in unreadable[:-1]:
            complain(line)
        noun = "image" if len(unreadable) == 1 else "images"
        raise UserError(f"{unreadable[-1]} ({len(unreadable)} {noun} left out)")
    return 0


def export(argv: list[str], prog: str, help: str) -> int:
    fields = [
        run_field(),
        Field(
            "format",
            Literal["timm", "hf", "deit"],
            "whose names: timm, hf (Hugging Face's transformers), deit (the original repository)",
            metavar="F",
        ),
        Field("out", Path, "folder to write", metavar="DIR"),
    ]
    given = parse(argv, prog=prog, description=help, fields=fields)
    from deitkit.exporting import export_run

    files = export_run(given.run, given.out, given.format)
    print(f"{given.out}: {', '.join(files)}")
    return 0


def _image_files(paths: Sequence[Path]) -> list[Path]:
    """Files as they are given, folders as the images in them, in order of their names."""
    from deitkit.data.folder import SUFFIXES, images_below

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = images_below(path)
            if not inside:
                raise UserError(f"{path}: no images in this folder ({' '.join(SUFFIXES)})")
            files += inside
        else:
            files.append(path)
    return files
