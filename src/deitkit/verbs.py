"""What several verbs share: fields, tables, how they start.

`deit demo`, `deit models` and `deit recipes`.

`deit data ...`.

`deit teacher ...`.

`deit tape ...`.

`deit train`, `deit evaluate`, `deit predict`, `deit export`.

`deit compare`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from deitkit.config import HEADS, MOST_VIEWS, ConfigT, FitConfig, HeadChoice, RunConfig
from deitkit.settings import Field, Place, card, find_recipe, given_flags, parse, parse_config, parse_given, shipped
from deitkit.terminal import Progress, UserError, complain, file_size, make_progress, one_line

SplitWord = Literal["val", "validation", "test"]
SPLITS: dict[str, Literal["val", "test"]] = {"val": "val", "validation": "val", "test": "test"}
MOST_WORKERS = 1024
MOST_PIXELS = 4096
DATA_HELP = "digits, mnist, fashion-mnist, cifar10, cifar100, an image folder, or a folder of Parquet files"


def configured(
    kind: type[ConfigT],
    argv: list[str],
    prog: str,
    help: str,
    fields: Sequence[Field],
    only: Callable[[Place], bool] = lambda _: True,
) -> tuple[ConfigT, Any]:
    def taped_settings(path: str) -> dict[str, Any]:
        from deitkit.distill.tape import settings_of

        return settings_of(Path(path))

    find = find_recipe if any(field.name == "recipe" for field in fields) else None
    return parse_config(
        kind,
        argv,
        prog=prog,
        description=help,
        before=fields,
        only=only,
        find_recipe=find,
        taped_settings=taped_settings,
    )


def data_field() -> Field:
    return Field("data", str, DATA_HELP, positional=True, metavar="DATA")


def run_field() -> Field:
    return Field("run", Path, "folder of a finished run", positional=True, metavar="RUN")


def run_fields() -> list[Field]:
    return [
        Field("out", Path, "folder of the run", metavar="DIR"),
        Field("resume", bool, "go on with the run in --out where it stopped", False),
    ]


def workers_field() -> Field:
    return Field("workers", int, "processes that read photos", 2)


def check_range(flag: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UserError(f"{flag} {value}: give a number from {least} to {most}")


def split_field() -> Field:
    return Field("split", SplitWord, "which images", "val")


def json_field() -> Field:
    return Field("json", bool, "print JSON", False)


@contextlib.contextmanager
def on_terminal() -> Iterator[Progress]:
    progress = make_progress(main_process=os.environ.get("RANK", "0") == "0")
    try:
        yield progress
    finally:
        progress.finish()  # a bar that stays would swallow the line of an error


def in_processes(count: int, argv: list[str]) -> int | None:
    """The exit code of `deit argv` in `count` processes; None where this is to go on here."""
    if count == 1 or "LOCAL_RANK" in os.environ:
        return None
    from deitkit.training.launch import launch

    return launch([sys.executable, "-m", "deitkit.cli", *argv], count)


def head_rows(result: dict[str, Any]) -> list[list[str]]:
    """The teacher, then the heads that the network has."""
    teacher = result.get("teacher")
    rows = [[f"teacher {teacher['name']}", percent(teacher["top1"])]] if teacher else []
    one = result["top1"].get("dist") is None
    titles = {"cls": result["model"]} if one else HEADS
    return rows + [[title, percent(result["top1"][head])] for head, title in titles.items()]


def split_title(data: str, split: str, count: int) -> str:
    return f"{data}: right on {count} {'validation' if split == 'val' else split} images"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


STUDENT_COLUMNS = ["student", "parameters", "GMAC", "activations", "image size", "tokens"]


def demo(argv: list[str], prog: str, help: str) -> int:
    fields = [
        Field("out", Path, "folder of the runs", Path("runs/demo"), metavar="DIR"),
        Field("seed", int, "replaces all three seeds", 0),
    ]
    given = parse(argv, prog=prog, description=help, fields=fields)
    check_range("--seed", given.seed, 0, 2**32 - 1)
    from deitkit.compare.demo import run_demo

    with on_terminal() as progress:
        run_demo(given.out, progress, seed=given.seed)
    return 0


def models(argv: list[str], prog: str, help: str) -> int:
    given = parse(argv, prog=prog, description=help, fields=[json_field()])
    from deitkit.models.zoo import describe_students

    rows = describe_students()
    if given.json:
        print_json(rows)
        return 0
    with on_terminal() as progress:
        progress.table("", STUDENT_COLUMNS, [student_cells(row) for row in rows])
    return 0


def recipes(argv: list[str], prog: str, help: str) -> int:
    name = Field("name", str | None, "show this one whole", None, positional=True, metavar="[NAME]")
    given = parse(argv, prog=prog, description=help, fields=[name])
    if given.name is not None:
        path = find_recipe(given.name)
        try:
            print(path.read_text(encoding="utf-8"), end="")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is no recipe: it is no text") from error
        return 0
    with on_terminal() as progress:
        progress.table("", ["recipe", "what it is"], [[name, card(path)[0]] for name, path in shipped().items()])
        progress.say("deit train DATA --recipe NAME starts from one, deit recipes NAME shows it")
    return 0


def student_cells(row: dict[str, Any]) -> list[str]:
    """A row of `describe_students` as `deit models` prints it."""
    return [
        row["name"],
        f"{row['parameters'] / 1e6:.2f} M",
        f"{row['gmac']:.3f}",
        f"{row['activations'] / 1e6:.2f} M",
        "{}x{}".format(*row["image_size"]),
        str(row["tokens"]),
    ]


def show(argv: list[str], prog: str, help: str) -> int:
    fields = [
        data_field(),
        Field("views", int, "views to show of each image", 6),
        Field("out", Path | None, "write a sheet of images and their views to this PNG file", None, metavar="PNG"),
        json_field(),
    ]
    config, given = configured(
        RunConfig,
        argv,
        prog,
        help,
        fields,
        only=lambda place: place.section == "data" or (place.section == "view" and place.name != "views"),
    )
    check_range("--views", given.views, 0, 100)
    from deitkit.data import load_data
    from deitkit.training.setup import resolve_view, say_unlabelled, student_architecture
    from deitkit.views.loader import describe, one_of_each_class, titled, view_sheet

    dataset = load_data(given.data, config.data)
    facts = describe(dataset)
    if given.json:
        print_json(facts)
    else:
        with on_terminal() as progress:
            _show_facts(facts, progress)
            say_unlabelled(dataset, progress)
    if given.out is not None:
        view = resolve_view(config.view, dataset, student_architecture(config, dataset).image_size)
        split = dataset.open_split("train")
        positions = one_of_each_class(split, 10)
        names = ["no label" if label < 0 else dataset.classes[label] for label in split.labels_N[positions].tolist()]
        picture = titled(view_sheet(split, view, positions, given.views), names)
        try:
            picture.save(given.out, format="PNG")
        except OSError as error:
            raise UserError(f"--out {given.out}: cannot be written: {error.strerror or error}") from error
        print(f"{given.out}: each row is an image and {given.views} views of it", file=sys.stderr)
    return 0


def cache(argv: list[str], prog: str, help: str) -> int:
    fields = [
        data_field(),
        Field(
            "size",
            int,
            "pixels of the shorter side: photos need the image size / 0.875 of every network that will see them, student and "
            "teacher (256 for 224, 146 for 128), with fewer all figures change; smaller images stay as they are",
            metavar="N",
        ),
        Field("out", Path, "folder of the resized images: DATA for all verbs from now on", metavar="DIR"),
    ]
    config, given = configured(RunConfig, argv, prog, help, fields, only=lambda place: place.section == "data")
    check_range("--size", given.size, 1, MOST_PIXELS)
    from deitkit.data import load_data, refuse_among_images
    from deitkit.data.arrow import splits_of, write_resized
    from deitkit.training.setup import say_unlabelled

    refuse_among_images(given.data, given.out)
    dataset = load_data(given.data, config.data)
    with on_terminal() as progress:
        for line in dataset.bad_images:
            progress.warn(f"left out: {line}")
        say_unlabelled(dataset, progress)
        progress.start(sum(len(dataset.open_split(name)) for name in splits_of(dataset)), "resizing", unit="images")
        counts = write_resized(
            dataset, config.data, given.size, given.out, lambda done: progress.step(done, done, 0, 0)
        )
        progress.finish()
        size = sum(path.stat().st_size for path in given.out.iterdir())
        images = ", ".join(f"{count} {name}" for name, count in counts.items())
        progress.say(f"{given.out}: {images} images, {file_size(size)}")
        unlabelled = " --unlabelled" if config.data.unlabelled else ""
        progress.say(f"next: deit train {given.out} --teacher auto{unlabelled} --out runs/first")
    return 0


def _show_facts(facts: dict[str, Any], progress: Progress) -> None:
    images, sizes = facts["images"], facts["sizes"]
    spans = [f"{low}" if low == high else f"{low} to {high}" for low, high in sizes.values()]
    test = "there is one, not opened" if facts["has_test"] else "none"
    if facts["set_aside"]:
        test = f"{facts['set_aside']} images set aside, a fifth of each class, as there is no test folder; not opened"
    rows = [[name, counts["train"], counts["val"]] for name, counts in facts["classes"].items()]
    if facts["unlabelled"]:
        rows.append(["without a label", facts["unlabelled"], 0])
    rows.append(["all", images["train"], images["val"]])
    progress.table(facts["name"], ["class", "train", "validation"], rows)
    print(f"test split: {test}")
    if spans:
        print(f"images: {' x '.join(spans)} pixels (height x width), {'grey' if facts['channels'] == 1 else 'colour'}")
    if not facts["mirror_safe"]:
        print("never mirrored: the mirror image means something else")
    print(f"unreadable: {len(facts['bad_images'])}")
    for line in facts["bad_images"]:
        print(f"  {one_line(line)}")


OF_A_STUDENT = {"layer_decay", "trainable", "unlabelled"}
"""Flags that `deit teacher fit` does not show; who gives one is told by `FitConfig` why not."""


def fit(argv: list[str], prog: str, help: str) -> int:
    left_out = OF_A_STUDENT - given_flags(argv).keys()
    config, given = configured(
        FitConfig, argv, prog, help, [data_field(), *run_fields()], only=lambda place: place.name not in left_out
    )
    relaunched = in_processes(config.loop.processes, ["teacher", "fit", *argv])
    if relaunched is not None:
        return relaunched
    from deitkit.training.jobs import doubt_about_fitted, run_fit

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
    from deitkit.distill.teacher import check_teacher, doubt_about, load_teacher, refuse_useless
    from deitkit.models.network import default_device
    from deitkit.training.evaluate import warn_of_reduced
    from deitkit.views.loader import evaluation_batches

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
    from deitkit.training.jobs import run_record

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
    from deitkit.training.jobs import run_verify

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
    from deitkit.training import jobs as taping

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
        "teacher_chunk_size",
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


def train(argv: list[str], prog: str, help: str) -> int:
    recipe = Field(
        "recipe", str | None, "a YAML file, or the name of a shipped one (deit recipes): other defaults", None
    )
    config, given = configured(RunConfig, argv, prog, help, [data_field(), *run_fields(), recipe])
    relaunched = in_processes(config.loop.processes, ["train", *argv])
    if relaunched is not None:
        return relaunched
    from deitkit.training.jobs import run_training

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
    from deitkit.training.evaluate import evaluate_run

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
    from deitkit.models.predict import load

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
    from deitkit.models.export import export_run

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


NOT_HERE = {"seed", "budget_minutes", "distillation", "tape", "record", "answers", "processes"}
"""Flags of `deit train` that a comparison sees to itself, or knows in the plural."""


def compare(argv: list[str], prog: str, help: str) -> int:
    fields = [
        data_field(),
        Field("out", Path, "folder of the comparison", metavar="DIR"),
        Field("resume", bool, "go on with the comparison in --out, perhaps with more seeds or contenders", False),
        Field("plan", Path | None, "a YAML file: contenders, and what they share", None, metavar="FILE"),
        Field(
            "choose_teacher", tuple[str, ...], "teachers to choose from by what the student reaches: A B, or A,B", (), metavar="T..."
        ),
        Field("losses", tuple[str, ...], "losses to compare with none; hard and zscore if not given", (), metavar="L..."),
        Field("seeds", tuple[int, ...], "seeds of every contender; 0 1 2 if not given", (), metavar="N..."),
        Field(
            "budget_minutes",
            float | None,
            "minutes for the whole comparison, recording included, instead of epochs: the same steps for all",
            None,
        ),
        Field("split", SplitWord, "test: also evaluate the finished runs on the test split", "val"),
        Field("tapes", Path | None, "folder of the tapes, for several comparisons to share; in --out if not given", None),
        Field("recipe", str | None, "a YAML file, or the name of a shipped one (deit recipes): other defaults", None),
    ]  # fmt: skip
    settings, given = parse_given(RunConfig, argv, prog=prog, description=help, before=fields, only=_of_a_contender)
    recipe = None if given.recipe is None else find_recipe(given.recipe)
    from deitkit.api import compare

    with on_terminal() as progress:
        result = compare(
            given.data,
            out=given.out,
            plan=given.plan,
            choose_teacher=given.choose_teacher,
            losses=given.losses,
            seeds=given.seeds or None,
            budget_minutes=given.budget_minutes,
            split=SPLITS[given.split],
            tapes=given.tapes,
            recipe=recipe,
            resume=given.resume,
            progress=progress,
            **settings,
        )
        progress.say(f"{given.out / 'compare.html'}: tables, plots, every run")
    if result["failed"]:
        count = len({failure["contender"] for failure in result["failed"]})
        raise UserError(
            f"{count} of {len(result['contenders'])} contenders failed, the others are complete: --resume tries again"
        )
    return 0


def _of_a_contender(place: Place) -> bool:
    return place.name not in NOT_HERE
