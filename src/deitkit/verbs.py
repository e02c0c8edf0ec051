"""The verbs of `deit`: what each reads from its command line, calls and prints. Nothing is computed here.

A verb is a function of a `Call` that returns the exit code. What needs torch is imported once a verb has read its flags, so that
`--help` is quick.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from deitkit.config import HEADS, MOST_VIEWS, Count, FitConfig, HeadChoice, Pixels, RunConfig, Seed, Workers
from deitkit.flags import REQUIRED, Argument, Call, parse
from deitkit.settings import Place, card, find_recipe, shipped
from deitkit.terminal import Progress, UserError, complain, file_size, make_progress, one_line, percent

SplitWord = Literal["val", "validation", "test"]
SPLITS: dict[str, Literal["val", "test"]] = {"val": "val", "validation": "val", "test": "test"}
DATA = Argument(
    "data",
    str,
    "digits, mnist, fashion-mnist, cifar10, cifar100, an image folder or a folder of Parquet files",
    positional=True,
    metavar="DATA",
)
RUN = Argument("run", Path, "folder of a finished run", positional=True, metavar="RUN")
TAPE = Argument("tape", Path, "folder of the tape", positional=True, metavar="TAPE")
RECIPE = Argument(
    "recipe", str | None, "a shipped recipe (see deit recipes) or a YAML file; flags override it", None, metavar="R"
)
RESUME = Argument("resume", bool, "continue the run in --out", False)
WORKERS = Argument("workers", Workers, "data-loading workers", 2)
SPLIT = Argument("split", SplitWord, "which images to evaluate on", "val")
RERUN, AGAIN = "rerun with --resume to continue", "run the same command again to continue"
JSON = Argument("json", bool, "print JSON", False)


def folder(help: str, default: Any = REQUIRED, metavar: str = "DIR") -> Argument:
    return Argument("out", Path if default is REQUIRED else Path | None, help, default, metavar=metavar)


@contextlib.contextmanager
def on_terminal() -> Iterator[Progress]:
    progress = make_progress(main_process=os.environ.get("RANK", "0") == "0")
    try:
        yield progress
    finally:
        progress.finish()  # a bar that stays would swallow the line of an error


@contextlib.contextmanager
def resumable(out: Path, file: str, how: str, otherwise: str = "") -> Iterator[None]:
    """Ctrl-C in this block tells the user how to continue, once `file` in `out` is there to continue from; before, `otherwise`."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how if (out / file).is_file() else otherwise) from None


def in_processes(count: int, argv: list[str]) -> int | None:
    """The exit code of `deit argv` in `count` processes; None where this process is to do the work."""
    if count == 1 or "LOCAL_RANK" in os.environ:
        return None
    from deitkit.training.run import launch

    return launch([sys.executable, "-m", "deitkit.cli", *argv], count)


def accuracy_title(split: str, count: int, data: str = "") -> str:
    return f"{data + ': ' if data else ''}{'validation' if split == 'val' else split} accuracy ({count} images)"


def say_report(run: Path, progress: Progress, split: Literal["val", "test"] = "val") -> None:
    """Write the report of a run that has just been measured, and say where it is."""
    if os.environ.get("RANK", "0") != "0":
        return
    from deitkit.inspect.report import try_report

    page = try_report(run, progress.warn, split)
    if page is not None:
        progress.say(f"report: {page}")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with on_terminal() as progress:
        progress.table(title, columns, rows)


def _warn(line: str) -> None:
    complain(f"warning: {line}")


# ------------------------------------------------------------------------------------ demo, models and recipes


def demo(call: Call) -> int:
    arguments = [folder("folder of the runs", Path("runs/demo")), Argument("seed", Seed, "replaces all three seeds", 0)]
    given = call.parse(*arguments)
    from deitkit.comparison.demo import run_demo

    with on_terminal() as progress:
        run_demo(given.out, progress, seed=given.seed)
    return 0


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
        for line in dataset.bad_images:
            progress.warn(f"left out: {line}")
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
        progress.say(f"next: deit train {given.out} --teacher auto{unlabelled}")
    return 0


# ---------------------------------------------------------------------------------------------------- teachers

SHOWN_TO_A_TEACHER = {"teacher", "teacher_precision", "teacher_size", "feature_weight", "student", "image_size"}
"""Settings, besides those of data and views, that affect what a teacher is shown or what is recorded of it."""
OF_A_STUDENT = {"layer_decay", "trainable", "unlabelled"}
"""Settings that `deit teacher fit` has no flags for."""


def fit(call: Call) -> int:
    arguments = [DATA, folder("folder of the run"), RESUME, RECIPE]
    config, given = call.configured(FitConfig, *arguments, only=lambda place: place.name not in OF_A_STUDENT)
    relaunched = in_processes(config.loop.processes, ["teacher", "fit", *call.argv])
    if relaunched is not None:
        return relaunched
    from deitkit.training.fit import doubt_about_fitted, run_fit

    with resumable(given.out, "config.yaml", RERUN), on_terminal() as progress:
        summary = run_fit(given.data, config, given.out, resume=given.resume, progress=progress)
        rows = [[config.model, percent(summary["top1"]["cls"])]]
        progress.table(accuracy_title("val", summary["n"]), ["teacher", "top-1 %"], rows)
        doubt = doubt_about_fitted(summary)
        if doubt:
            progress.warn(doubt)
        else:
            progress.say(f"next: deit train {given.data} --teacher {given.out}")
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
    facts = check_teacher_on(given.data, config.data, given.teacher, given.teacher_size, split, given.workers, _warn)
    if given.json:
        print_json({**facts, "data": given.data, "split": split})
    else:
        rows = [
            ["top-1", f"{percent(facts['top1'])} %"],
            ["top-5", f"{percent(facts['top5'])} %"],
            ["mean confidence", f"{percent(facts['confidence'])} %"],
            ["classes", facts["classes"]],
            ["input", "{} x {} pixels, {interpolation}".format(*facts["image_size"], **facts)],
            ["mean, std", f"{facts['mean']}, {facts['std']}"],
            ["parameters", f"{facts['parameters'] / 1e6:.2f} M"],
            ["images per second", f"{facts['images_per_second']:.0f}"],
        ]
        print_table(accuracy_title(split, facts["n"], given.data), ["teacher", given.teacher], rows)
    refuse_useless(facts)
    doubt = doubt_about(facts)
    if doubt:
        _warn(doubt)
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
    only = lambda place: _of_views(place) or place.name in SHOWN_TO_A_TEACHER  # noqa: E731
    config, given = call.configured(RunConfig, *arguments, only=only)
    if config.teacher.teacher is None:
        raise UserError("--teacher: give the teacher to record")
    config = config.model_copy(update={"loop": config.loop.model_copy(update={"workers": given.workers})})
    from deitkit.distill.record import info_rows
    from deitkit.training.jobs import run_record

    with resumable(given.out, "tape.json", AGAIN), on_terminal() as progress:
        info = run_record(given.data, config, given.out, views=given.views, outputs=given.outputs, progress=progress)
        progress.table("", ["tape", info["tape"]], info_rows(info))
        progress.say(f"next: deit train {given.data} --teacher {given.out}")
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


# -------------------------------------------------------------------------------------------------------- runs


def train(call: Call) -> int:
    examples = [
        "deit train photos/",
        "deit train cifar10 --recipe cifar10 --teacher cifar-resnet56@w.safetensors",
    ]
    arguments = [DATA, folder("folder of the run; runs/<data>-<n> if not given", None), RESUME, RECIPE]
    given, flags, configure = call.configurable(RunConfig, *arguments, examples=examples)
    configure()  # what is wrong with the flags is told before anything heavy is imported
    from deitkit.training.run import default_out, teacher_unasked

    out = given.out or default_out(given.data)
    configure = partial(
        configure, teacher=teacher_unasked(out, given.resume, find_recipe(given.recipe) if given.recipe else None)
    )
    config = configure()
    relaunched = in_processes(config.loop.processes, ["train", *call.argv, *([] if given.out else ["--out", str(out)])])
    if relaunched is not None:
        return relaunched
    from deitkit.training.evaluate import RESULT_COLUMNS, disappointment, result_rows
    from deitkit.training.jobs import run_training
    from deitkit.training.setup import opened_unasked

    how = RERUN if given.out else f"rerun with --out {out} --resume to continue"
    again = AGAIN if config.teacher.teacher == "auto" else ""  # what was fitted of the teacher is kept
    with resumable(out, "config.yaml", how, again), on_terminal() as progress:
        dataset = None
        if given.recipe is None:
            dataset, chosen = opened_unasked(
                given.data, config, out, resume=given.resume, given=flags, progress=progress
            )
            config = configure(recipe=find_recipe(chosen)) if chosen else config
        summary = run_training(given.data, config, out, resume=given.resume, progress=progress, dataset=dataset)
        progress.table(accuracy_title("val", summary["n"]), RESULT_COLUMNS, result_rows(summary))
        if config.loss.label_weight != 0 and (line := disappointment(summary)):
            progress.say(line)
        if summary.get("has_test"):
            progress.say(f"next: deit evaluate {out} --split test")
        progress.say(f"next: deit predict {out} IMAGE...")
        say_report(out, progress)
    return 0


def evaluate(call: Call) -> int:
    data = Argument(
        "data", str | None, "other data; the run's own if not given", None, positional=True, metavar="[DATA]"
    )
    given = call.parse(RUN, data, SPLIT, WORKERS, JSON)
    from deitkit.inspect.report import try_report
    from deitkit.training.evaluate import evaluate_run, head_rows

    split = SPLITS[given.split]
    result = evaluate_run(given.run, given.data, split, given.workers, _warn)
    if given.json:
        if given.data is None:
            try_report(given.run, _warn, split)
        print_json(result)
        return 0
    with on_terminal() as progress:
        agreement, columns = result.get("agreement"), ["network", "top-1 %"]
        rows = [[name, percent(share)] for name, share in head_rows(result)]
        if agreement:
            columns.append("agrees with teacher %")
            heads = [head for head in HEADS if result["top1"].get(head) is not None]
            rows = [
                [*row, same] for row, same in zip(rows, ["-", *(percent(agreement[h]) for h in heads)], strict=True)
            ]
        progress.table(accuracy_title(split, result["n"], result["data"]), columns, rows)
        which = "" if result["top1"].get("dist") is None else "both heads fused: "
        progress.say(f"{which}log loss {result['nll']:.3f}, calibration error {percent(result['ece'])} %")
        if given.data is None:
            say_report(given.run, progress, split)
    return 0


def report(call: Call) -> int:
    arguments = [
        Argument("runs", tuple[Path, ...], "folders of finished runs", positional=True, metavar="RUN..."),
        SPLIT,
        folder(
            "write the page of several runs to this file; report.html beside the first run if not given", None, "FILE"
        ),
    ]
    given = call.parse(*arguments)
    from deitkit.inspect.report import write_report, write_side_by_side

    split = SPLITS[given.split]
    if len(given.runs) == 1 and given.out is None:
        print(write_report(given.runs[0], split))
    else:
        print(write_side_by_side(given.runs, given.out or given.runs[0].resolve().parent / "report.html", split))
    return 0


def explain(call: Call) -> int:
    images = Argument("images", tuple[Path, ...], "images to explain", positional=True, metavar="IMAGE...")
    given = call.parse(RUN, images, folder("folder of the pictures and of explanations.json"), JSON)
    for path in (given.run, *given.images):  # before torch is imported, which takes seconds
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    from deitkit.inspect.explain import explain_run, write_explanations

    explanations = explain_run(given.run, given.images, _warn)
    files = write_explanations(explanations, given.out)
    if given.json:
        print_json([one.as_dict() for one in explanations])
        return 0
    for one, file in zip(explanations, files, strict=False):
        print_table(f"{one.name}: {file}", ["answer of", "class", "probability %"],
                    [[who, name, percent(share)] for who, (name, share) in one.answers.items()])  # fmt: skip
    return 0


def predict(call: Call) -> int:
    arguments = [
        RUN,
        Argument(
            "paths", tuple[Path, ...], "images, folders, quoted patterns such as 'photos/*.jpg', or - for a list on standard input",
            positional=True, metavar="PATH...",
        ),
        Argument("head", HeadChoice, "head to predict with; fused: mean of both heads' probabilities", "fused"),
        Argument("top", Count, "classes to print for each image", 5),
        Argument(
            "min_confidence", Annotated[float, Field(ge=0, le=1)], "answer `none of these` where no class is so probable", 0.0, metavar="P"
        ),
        Argument("format", Literal["table", "json", "csv"], "output format", "table"),
    ]  # fmt: skip
    given = call.parse(*arguments)
    for path in (given.run, *given.paths):  # before torch is imported, which takes seconds
        if not path.exists() and (path == given.run or not (str(path) == "-" or has_magic(str(path)))):
            raise UserError(f"{path}: no such file or folder")
    from deitkit.data.folder import image_paths
    from deitkit.models.predict import NONE_OF_THESE, load

    images = image_paths(given.paths, sys.stdin)
    unreadable: list[str] = []
    predictions = load(given.run).predict(
        images, given.head, given.top, min_confidence=given.min_confidence, on_unreadable=unreadable.append
    )
    if given.format == "json":
        print_json([prediction.as_dict() for prediction in predictions])
    elif given.format == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["image", "rank", "class", "probability", "answer"])
        writer.writerows([*row, p.answer or NONE_OF_THESE] for p in predictions for row in p.as_rows())
    elif predictions:
        print_table("", ["image", "likeliest"], [[one_line(p.name), p.as_text()] for p in predictions])
    if unreadable:
        for line in unreadable[:-1]:
            complain(line)
        raise UserError(
            f"{unreadable[-1]} ({len(unreadable)} {'image' if len(unreadable) == 1 else 'images'} left out)"
        )
    return 0


def export(call: Call) -> int:
    formats = "onnx, or a student's weights for timm, hf (Hugging Face transformers) or deit (the original repository)"
    arguments = [
        RUN,
        Argument("format", Literal["onnx", "timm", "hf", "deit"], formats, metavar="F"),
        folder("folder to write"),
        Argument("precision", Literal["float32", "float16", "int8"], "onnx: number format of the weights", "float32", metavar="P"),
        Argument("head", HeadChoice, "onnx: whose probabilities the file gives; fused: mean of both heads'", "fused"),
        Argument("max_disagreement", Annotated[float, Field(ge=0, le=1)],
                 "onnx: share of the validation images that may be classified differently", 0.01, metavar="X"),
    ]  # fmt: skip
    given = call.parse(*arguments)
    from deitkit.deploy import export_run

    with on_terminal() as progress:
        files, kept = export_run(
            given.run, given.out, given.format, precision=given.precision, head=given.head, max_disagreement=given.max_disagreement,
            progress=progress,
        )  # fmt: skip
    print(f"{given.out}: {', '.join(files)}")
    return 0 if kept else 1


# ------------------------------------------------------------------------------------------------- comparisons

NOT_IN_A_COMPARISON = {"seed", "distillation", "record", "processes"}
"""Flags of `deit train` that a comparison decides itself, or takes several values for."""


def compare(call: Call) -> int:
    arguments = [
        DATA,
        folder("folder of the comparison"),
        Argument("resume", bool, "continue the comparison in --out; seeds and contenders may be added", False),
        Argument("plan", Path | None, "a YAML file with the contenders and what they share", None, metavar="FILE"),
        Argument("choose_teacher", tuple[str, ...], "compare these teachers by the student's accuracy: A B, or A,B", (), metavar="T"),
        Argument("losses", tuple[str, ...], "losses to compare with none; hard and zscore if not given", (), metavar="L"),
        Argument("seeds", tuple[int, ...], "seeds of every contender; 0 1 2 if not given", (), metavar="N"),
        Argument("budget_minutes", Annotated[float, Field(gt=0)] | None, "minutes of the whole comparison; equal steps", None, metavar="M"),
        Argument("split", SplitWord, "test: also evaluate the finished runs on the test split", "val"),
        Argument("tapes", Path | None, "folder of tapes that several comparisons share; in --out if not given", None, metavar="DIR"),
        RECIPE,
    ]  # fmt: skip
    given, settings = parse(
        call.argv,
        prog=call.prog,
        description=call.help,
        arguments=arguments,
        kind=RunConfig,
        only=lambda place: place.name not in NOT_IN_A_COMPARISON,
    )
    from deitkit.api import compare

    with resumable(given.out, "plan.yaml", RERUN), on_terminal() as progress:
        own = {**vars(given), "seeds": given.seeds or None, "split": SPLITS[given.split]}
        result = compare(**own, progress=progress, **settings)
        progress.say(f"{given.out / 'compare.html'}: tables, plots, every run")
    if result["failed"]:
        count = len({failure["contender"] for failure in result["failed"]})
        raise UserError(
            f"{count} of {len(result['contenders'])} contenders failed, the others are complete: --resume tries again"
        )
    return 0
