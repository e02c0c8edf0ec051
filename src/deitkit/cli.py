"""The verbs of `deit`: nothing but wiring. What a verb needs is imported when it runs, so that `--help` is quick."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from deitkit import __version__
from deitkit.errors import UserError, unknown_name

if TYPE_CHECKING:
    from deitkit.config import ConfigT
    from deitkit.flags import Field, Place
    from deitkit.progress import Progress

SplitWord = Literal["val", "validation", "test"]
SPLITS: dict[str, Literal["val", "test"]] = {"val": "val", "validation": "val", "test": "test"}
USER_ERROR, INTERRUPTED = 2, 130
MOST_WORKERS = 1024
DATA_HELP = "digits, mnist, fashion-mnist, cifar10, cifar100, an image folder, or a folder of Parquet files"
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


class Verb(NamedTuple):
    """A line of `deit --help` and what it does."""

    group: str
    usage: str
    help: str
    run: Callable[[list[str], str], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `deit` with these arguments. Returns the exit code: 0, 2 for a mistake of the user, 130 when interrupted."""
    _ready_streams()
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UserError as error:
        _complain(f"error: {' '.join(str(error).split())}")
        return USER_ERROR
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except OSError as error:
        if error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries once more when it ends
        if isinstance(error, BrokenPipeError):  # `deit models | head`; a training has ended by the time it prints
            return 0
        _complain(f"error: the results cannot be printed: {error.strerror}")
        return USER_ERROR


def _ready_streams() -> None:
    """Streams that take every line: what they cannot spell is escaped, and closed ones swallow it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"deit: {text}", file=sys.stderr, flush=True)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(f"deit {__version__}")
        return 0
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in VERBS:
            try:
                return VERBS[name].run(argv[words:], f"deit {name}")
            except SystemExit as stop:  # `deit VERB --help` has printed its page
                return int(stop.code or 0)
    if argv[0].startswith("-"):
        raise UserError(f"unknown flag {argv[0]}: a verb comes first; deit --help lists them")
    partners = [name for name in VERBS if name.split()[0] == argv[0]]
    if partners and len(argv) == 1:
        raise UserError(f"{argv[0]}: which one? {' or '.join(partners)}")
    if partners and argv[1] in ("-h", "--help"):
        print(overview(partners))
        return 0
    given = argv[:2] if partners else argv[:1]
    raise unknown_name("verb", " ".join(given), partners or VERBS)


def overview(names: Sequence[str] | None = None) -> str:
    """What `deit --help` prints: the verbs by group."""
    chosen = {name: verb for name, verb in VERBS.items() if names is None or name in names}
    width = max(len(f"{name} {verb.usage}") for name, verb in chosen.items())
    lines = ["usage: deit VERB ...", "", "Teach a small vision transformer what a convolutional network knows.", ""]
    group = ""
    for name, verb in chosen.items():
        if verb.group != group:
            group = verb.group
            lines += [f"{group}:"]
        lines.append(f"  {f'{name} {verb.usage}'.ljust(width)}  {verb.help}")
    return "\n".join([*lines, "", "deit VERB --help shows all of a verb's flags."])


def demo(argv: list[str], prog: str) -> int:
    from deitkit.flags import Field, parse

    fields = [
        Field("out", Path, "folder of the runs", Path("runs/demo"), metavar="DIR"),
        Field("seed", int, "replaces all three seeds", 0),
    ]
    given = parse(argv, prog=prog, description=VERBS["demo"].help, fields=fields)
    _check_range("--seed", given.seed, 0, 2**32 - 1)
    from deitkit.demo import run_demo

    with _progress() as progress:
        run_demo(given.out, progress, seed=given.seed)
    return 0


def data_show(argv: list[str], prog: str) -> int:
    from deitkit.config import RunConfig
    from deitkit.flags import Field

    fields = [
        _data_field(),
        Field("views", int, "views to show of each image", 6),
        Field("out", Path | None, "write a sheet of images and their views to this PNG file", None, metavar="PNG"),
        _json_field(),
    ]
    config, given = _configured(
        RunConfig,
        argv,
        prog,
        "data show",
        fields,
        only=lambda place: place.section == "data" or (place.section == "view" and place.name != "views"),
    )
    _check_range("--views", given.views, 0, 100)
    from deitkit.data import load_data
    from deitkit.jobs import resolve_view, student_architecture
    from deitkit.show import describe, one_of_each_class, view_sheet

    dataset = load_data(given.data, config.data)
    facts = describe(dataset)
    if given.json:
        _print_json(facts)
    else:
        with _progress() as progress:
            _show_facts(facts, progress)
    if given.out is not None:
        view = resolve_view(config.view, dataset, student_architecture(config, dataset).image_size)
        split = dataset.open_split("train")
        picture = view_sheet(split, view, one_of_each_class(split, 10), given.views)
        try:
            picture.save(given.out, format="PNG")
        except OSError as error:
            raise UserError(f"--out {given.out}: cannot be written: {error.strerror or error}") from error
        print(f"{given.out}: each row is an image and {given.views} views of it", file=sys.stderr)
    return 0


def models(argv: list[str], prog: str) -> int:
    from deitkit.flags import parse

    given = parse(argv, prog=prog, description=VERBS["models"].help, fields=[_json_field()])
    from deitkit.zoo import describe_students

    rows = describe_students()
    if given.json:
        _print_json(rows)
        return 0
    table = [
        [
            row["name"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['gmac']:.3f}",
            "{}x{}".format(*row["image_size"]),
            row["tokens"],
        ]
        for row in rows
    ]
    with _progress() as progress:
        progress.table("", ["student", "parameters", "GMAC", "image size", "tokens"], table)
    return 0


def teacher_fit(argv: list[str], prog: str) -> int:
    from deitkit.config import FitConfig

    config, given = _configured(FitConfig, argv, prog, "teacher fit", [_data_field(), *_run_fields()])
    relaunched = _in_processes(config.loop.processes, ["teacher", "fit", *argv])
    if relaunched is not None:
        return relaunched
    from deitkit.jobs import doubt_about_fitted, run_fit

    with _progress() as progress:
        summary = run_fit(given.data, config, given.out, resume=given.resume, progress=progress)
        rows = [[config.model, _percent(summary["top1"]["cls"])]]
        progress.table(f"right on {summary['n']} validation images", ["teacher", "top-1 %"], rows)
        doubt = doubt_about_fitted(summary)
        if doubt:
            progress.warn(doubt)
        else:
            progress.say(f"next: deit train {given.data} --teacher {given.out} --out runs/distilled")
    return 0


def teacher_check(argv: list[str], prog: str) -> int:
    from deitkit.config import RunConfig
    from deitkit.flags import Field

    fields = [
        Field("teacher", str, "timm name, torchvision:NAME, lite0, a run folder, or cifar-resnet56@FILE",
              positional=True, metavar="TEACHER"),
        _data_field(),
        _split_field(),
        _workers_field(),
        _json_field(),
    ]  # fmt: skip
    config, given = _configured(
        RunConfig, argv, prog, "teacher check", fields, only=lambda place: place.section == "data"
    )
    _check_range("--workers", given.workers, 0, MOST_WORKERS)
    import torch

    from deitkit.data import load_data
    from deitkit.feed import evaluation_batches
    from deitkit.teacher import check_teacher, load_teacher, refuse_useless

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = load_data(given.data, config.data)
    teacher = load_teacher(given.teacher, dataset.classes, slice_size=config.teacher.teacher_slice, device=device)
    split = SPLITS[given.split]
    images = dataset.open_split(split)
    facts = check_teacher(teacher, evaluation_batches(images, teacher.preprocessing, workers=given.workers))
    if given.json:
        _print_json({**facts, "data": given.data, "split": split})
    else:
        rows = [
            ["right", f"{_percent(facts['top1'])} %"],
            ["right among the first five", f"{_percent(facts['top5'])} %"],
            ["mean confidence", f"{_percent(facts['confidence'])} %"],
            ["classes", facts["classes"]],
            ["input", "{} x {} pixels, {interpolation}".format(*facts["image_size"], **facts)],
            ["mean, std", f"{facts['mean']}, {facts['std']}"],
            ["parameters", f"{facts['parameters'] / 1e6:.2f} M"],
            ["images per second", f"{facts['images_per_second']:.0f}"],
        ]
        with _progress() as progress:
            progress.table(_split_title(given.data, split, facts["n"]), ["teacher", given.teacher], rows)
    doubt = refuse_useless(facts)
    if doubt:
        _complain(f"warning: {doubt}")
    return 0


def tape_record(argv: list[str], prog: str) -> int:
    from deitkit.config import RunConfig
    from deitkit.flags import Field

    fields = [
        _data_field(),
        Field("out", Path, "folder of the tape; one that was begun is gone on with", metavar="TAPE"),
        Field(
            "views",
            int,
            "views to record of each image: as many as epochs, or fewer, which are gone round",
            metavar="V",
        ),
        Field(
            "answers", str, "hard (decisions), all (logits), or a number: the likeliest classes", "hard", metavar="KIND"
        ),
        _workers_field(),
    ]
    config, given = _configured(RunConfig, argv, prog, "tape record", fields, only=_shapes_a_taped_view)
    if config.teacher.teacher is None:
        raise UserError("--teacher: whose answers are to be recorded?")
    _check_range("--views", given.views, 1, 10**9)
    _check_range("--workers", given.workers, 0, MOST_WORKERS)
    answers = int(given.answers) if given.answers.isascii() and given.answers.isdigit() else given.answers
    if answers not in ("hard", "all") and (isinstance(answers, str) or answers < 1):
        raise UserError(f"--answers {answers}: give hard, all, or a number of classes")
    loop = config.loop.model_copy(update={"workers": given.workers})
    config = config.model_copy(update={"loop": loop})
    from deitkit.taping import run_record

    with _progress() as progress:
        info = run_record(given.data, config, given.out, views=given.views, answers=answers, progress=progress)
        _show_tape(info, progress)
        progress.say(f"next: deit train {given.data} --tape {given.out} --out runs/distilled")
    return 0


def tape_verify(argv: list[str], prog: str) -> int:
    from deitkit.flags import Field, parse

    fields = [
        Field("tape", Path, "folder of the tape", positional=True, metavar="TAPE"),
        _data_field(),
        Field("teacher", str, "whose answers are on the tape", metavar="T"),
        Field("samples", int, "views to ask the teacher about again", 512),
        _workers_field(),
        _json_field(),
    ]
    given = parse(argv, prog=prog, description=VERBS["tape verify"].help, fields=fields)
    _check_range("--samples", given.samples, 1, 10**9)
    _check_range("--workers", given.workers, 0, MOST_WORKERS)
    from deitkit.taping import run_verify

    with _progress() as progress:
        found = run_verify(
            given.tape, given.data, given.teacher, samples=given.samples, workers=given.workers, progress=progress
        )
        if given.json:
            _print_json(found)
        else:
            progress.say(
                f"{given.tape}: all {found['chunks']} recorded chunks are as they were written; the teacher answers "
                f"{found['sampled'] - found['different']} of {found['sampled']} views as recorded"
            )
    return 0


def tape_info(argv: list[str], prog: str) -> int:
    from deitkit.flags import Field, parse

    fields = [Field("tape", Path, "folder of the tape", positional=True, metavar="TAPE"), _json_field()]
    given = parse(argv, prog=prog, description=VERBS["tape info"].help, fields=fields)
    from deitkit import taping

    info = taping.tape_info(given.tape)
    if given.json:
        _print_json(info)
    else:
        with _progress() as progress:
            _show_tape(info, progress)
    return 0


def train(argv: list[str], prog: str) -> int:
    from deitkit.config import RunConfig
    from deitkit.flags import Field

    recipe = Field("recipe", str | None, "a YAML file, or the name of a shipped one: other defaults", None)
    config, given = _configured(RunConfig, argv, prog, "train", [_data_field(), *_run_fields(), recipe])
    relaunched = _in_processes(config.loop.processes, ["train", *argv])
    if relaunched is not None:
        return relaunched
    from deitkit.jobs import run_training

    with _progress() as progress:
        summary = run_training(given.data, config, given.out, resume=given.resume, progress=progress)
        progress.table(f"right on {summary['n']} validation images", ["network", "top-1 %"], _head_rows(summary))
        test = f"deit evaluate {given.out} --split test, or " if summary["has_test"] else ""
        progress.say(f"next: {test}deit predict {given.out} IMAGE...")
    return 0


def evaluate(argv: list[str], prog: str) -> int:
    from deitkit.flags import Field, parse

    fields = [
        _run_field(),
        Field("data", str | None, "other data; the run's own if not given", None, positional=True, metavar="[DATA]"),
        _split_field(),
        _workers_field(),
        _json_field(),
    ]
    given = parse(argv, prog=prog, description=VERBS["evaluate"].help, fields=fields)
    _check_range("--workers", given.workers, 0, MOST_WORKERS)
    from deitkit.evaluate import evaluate_run

    split = SPLITS[given.split]
    warn = lambda line: _complain(f"warning: {line}")  # noqa: E731
    result = evaluate_run(given.run, given.data, split, given.workers, warn)
    if given.json:
        _print_json(result)
        return 0
    with _progress() as progress:
        agreement, columns = result.get("agreement"), ["network", "top-1 %"]
        rows = _head_rows(result)
        if agreement:
            columns.append("as the teacher %")
            heads = [head for head in HEAD_TITLES if result["top1"].get(head) is not None]
            rows = [
                [*row, chosen]
                for row, chosen in zip(rows, ["-", *(_percent(agreement[h]) for h in heads)], strict=True)
            ]
        progress.table(_split_title(result["data"], split, result["n"]), columns, rows)
        which = "" if result["top1"].get("dist") is None else " of both, fused"
        progress.say(
            f"probabilities{which}: the right class costs {result['nll']:.3f} nats an image, "
            f"confidence is {_percent(result['ece'])} % off (expected calibration error)"
        )
    return 0


def predict(argv: list[str], prog: str) -> int:
    from deitkit.config import HeadChoice
    from deitkit.flags import Field, parse

    fields = [
        _run_field(),
        Field("paths", tuple[Path, ...], "images, or folders of them", positional=True, metavar="PATH..."),
        Field("head", HeadChoice, "which head answers; fused: the mean of both heads' probabilities", "fused"),
        Field("top", int, "classes to show of each image", 5),
        Field("format", Literal["table", "json", "csv"], "how to print", "table"),
    ]
    given = parse(argv, prog=prog, description=VERBS["predict"].help, fields=fields)
    _check_range("--top", given.top, 1, 10**9)
    if not given.paths:
        raise UserError("PATH: give images, or folders of them")
    images = _image_files(given.paths)
    from deitkit.predict import load

    unreadable: list[str] = []
    predictions = load(given.run).predict(images, given.head, given.top, on_unreadable=unreadable.append)
    if given.format == "json":
        _print_json([prediction.as_dict() for prediction in predictions])
    elif given.format == "csv":
        import csv

        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["image", "rank", "class", "probability"])
        for p in predictions:
            chances = zip(p.classes, p.probabilities, strict=True)
            writer.writerows([p.name, rank, label, f"{chance:.6f}"] for rank, (label, chance) in enumerate(chances, 1))
    elif predictions:
        with _progress() as progress:
            rows = [
                [p.name, ", ".join(f"{c} {100 * x:.1f} %" for c, x in zip(p.classes, p.probabilities, strict=True))]
                for p in predictions
            ]
            progress.table("", ["image", "likeliest"], rows)
    if unreadable:
        for line in unreadable[:-1]:
            _complain(line)
        noun = "image" if len(unreadable) == 1 else "images"
        raise UserError(f"{unreadable[-1]} ({len(unreadable)} {noun} left out)")
    return 0


VERBS: dict[str, Verb] = {
    "demo": Verb("start here", "[--out DIR]", "a teacher, a plain and a taught student on digits, in minutes", demo),
    "data show": Verb("data", "DATA", "what is in it, and a sheet of images and their views", data_show),
    "models": Verb("networks", "", "the students: parameters, GMAC, image size", models),
    "teacher fit": Verb("networks", "DATA --model NAME --out DIR", "fit a convolutional network to be a teacher", teacher_fit),
    "teacher check": Verb("networks", "TEACHER DATA", "how often a teacher is right", teacher_check),
    "tape record": Verb("tapes", "DATA --teacher T --views V --out TAPE", "write down a teacher's answers for many runs", tape_record),
    "tape verify": Verb("tapes", "TAPE DATA --teacher T", "hold a tape against itself, its data and its teacher", tape_verify),
    "tape info": Verb("tapes", "TAPE", "what is on a tape", tape_info),
    "train": Verb("runs", "DATA --teacher T --out DIR", "teach a student, or train one without a teacher", train),
    "evaluate": Verb("runs", "RUN [DATA]", "how good a run is, head by head", evaluate),
    "predict": Verb("runs", "RUN PATH...", "what a run sees in images", predict),
}  # fmt: skip
HEAD_TITLES = {
    "cls": "class head",
    "dist": "distillation head",
    "fused": "both, fused",
    "fused_logits": "both, fused logits",
}


def _configured(
    kind: type[ConfigT],
    argv: list[str],
    prog: str,
    verb: str,
    fields: Sequence[Field],
    only: Callable[[Place], bool] = lambda _: True,
) -> tuple[ConfigT, Any]:
    from deitkit.flags import parse_config

    def taped_settings(path: str) -> dict[str, Any]:
        from deitkit.tape import settings_of

        return settings_of(Path(path))

    find = find_recipe if any(field.name == "recipe" for field in fields) else None
    return parse_config(
        kind,
        argv,
        prog=prog,
        description=VERBS[verb].help,
        before=fields,
        only=only,
        find_recipe=find,
        taped_settings=taped_settings,
    )


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that is shipped. Raises UserError."""
    if Path(name).suffix in (".yaml", ".yml") or "/" in name:
        return Path(name)
    here = Path(__file__).parent
    shipped = {
        path.stem: path for folder in (here.parents[1] / "recipes", here / "recipes") for path in folder.glob("*.yaml")
    }
    if name not in shipped:
        if not shipped:
            raise UserError(f"--recipe {name}: none is shipped: give the path of a YAML file")
        raise unknown_name("recipe", name, shipped)
    return shipped[name]


def _data_field() -> Field:
    from deitkit.flags import Field

    return Field("data", str, DATA_HELP, positional=True, metavar="DATA")


def _run_field() -> Field:
    from deitkit.flags import Field

    return Field("run", Path, "folder of a finished run", positional=True, metavar="RUN")


def _run_fields() -> list[Field]:
    from deitkit.flags import Field

    return [
        Field("out", Path, "folder of the run", metavar="DIR"),
        Field("resume", bool, "go on with the run in --out where it stopped", False),
    ]


def _workers_field() -> Field:
    from deitkit.flags import Field

    return Field("workers", int, "processes that read photos", 2)


def _check_range(flag: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UserError(f"{flag} {value}: give a number from {least} to {most}")


def _split_field() -> Field:
    from deitkit.flags import Field

    return Field("split", SplitWord, "which images", "val")


def _json_field() -> Field:
    from deitkit.flags import Field

    return Field("json", bool, "print JSON", False)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    from deitkit.progress import make_progress

    progress = make_progress(main_process=os.environ.get("RANK", "0") == "0")
    try:
        yield progress
    finally:
        progress.finish()  # a bar that stays would swallow the line of an error


def _in_processes(count: int, argv: list[str]) -> int | None:
    """The exit code of `deit argv` in `count` processes; None where this is to go on here."""
    if count == 1 or "LOCAL_RANK" in os.environ:
        return None
    from deitkit.launch import launch

    return launch([sys.executable, "-m", "deitkit.cli", *argv], count)


def _image_files(paths: Sequence[Path]) -> list[Path]:
    """Files as they are given, folders as the images in them, in order of their names."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"{path}: no images in this folder ({' '.join(sorted(IMAGE_SUFFIXES))})")
            files += inside
        else:
            files.append(path)
    return files


def _head_rows(result: dict[str, Any]) -> list[list[str]]:
    """The teacher, then the heads that the network has."""
    teacher = result.get("teacher")
    rows = [[f"teacher {teacher['name']}", _percent(teacher["top1"])]] if teacher else []
    one = result["top1"].get("dist") is None
    titles = {"cls": result["model"]} if one else HEAD_TITLES
    return rows + [[title, _percent(result["top1"][head])] for head, title in titles.items()]


def _shapes_a_taped_view(place: Place) -> bool:
    """Whether a setting has a say in what a teacher is asked: the views, the split, the size of the student."""
    if place.section == "view":
        return place.name != "views"
    return place.section == "data" or place.name in ("teacher", "teacher_slice", "student", "image_size")


def _show_tape(info: dict[str, Any], progress: Progress) -> None:
    from deitkit.progress import file_size

    view, name = info["view"], {"hard": "decisions", "all": "all logits"}
    rows = [
        ["teacher", f"{info['teacher']}, {_percent(info['teacher_top1'])} % right on validation images"],
        ["data", f"{info['data']}: {info['images']} training images, {info['classes']} classes"],
        ["views", f"{info['complete_views']} of {info['views']}, {view['augment']}, view seed {view['view_seed']}"],
        ["answers", name.get(info["answers"], f"the {info['answers']} likeliest classes")],
        ["size", f"{info['record_bytes']} bytes a view, {file_size(info['bytes'])}"],
    ]
    progress.table("", ["tape", info["tape"]], rows)


def _show_facts(facts: dict[str, Any], progress: Progress) -> None:
    images, sizes = facts["images"], facts["sizes"]
    spans = [f"{low}" if low == high else f"{low} to {high}" for low, high in sizes.values()]
    test = "there is one, not opened" if facts["has_test"] else "none"
    rows = [[name, counts["train"], counts["val"]] for name, counts in facts["classes"].items()]
    rows.append(["all", images["train"], images["val"]])
    progress.table(facts["name"], ["class", "train", "validation"], rows)
    print(f"test split: {test}")
    if spans:
        print(f"images: {' x '.join(spans)} pixels (height x width), {'grey' if facts['channels'] == 1 else 'colour'}")
    if not facts["mirror_safe"]:
        print("never mirrored: the mirror image means something else")
    print(f"unreadable: {len(facts['bad_images'])}")
    for line in facts["bad_images"]:
        print(f"  {line}")


def _split_title(data: str, split: str, count: int) -> str:
    return f"{data}: right on {count} {'validation' if split == 'val' else split} images"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    sys.exit(main())
