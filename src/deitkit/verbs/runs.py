"""Verbs that train and measure: one run, or many that are compared."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from deitkit.config import RunConfig, Seed
from deitkit.flags import Argument, Call, parse
from deitkit.settings import find_recipe, lower_settings
from deitkit.terminal import UserError, percent, quoted
from deitkit.verbs.common import (
    AGAIN,
    DATA,
    DATA_ONCE,
    JSON,
    RECIPE,
    RESUME,
    RUN,
    SPLIT,
    SPLITS,
    WORKERS,
    SplitWord,
    accuracy_title,
    folder,
    in_processes,
    location,
    on_terminal,
    print_json,
    resumable,
    say_report,
    to_continue,
    warn,
)


def demo(call: Call) -> int:
    arguments = [folder("folder of the runs", Path("runs/demo")), Argument("seed", Seed, "replaces all three seeds", 0)]
    given = call.parse(*arguments)
    from deitkit.comparison.demo import run_demo

    with on_terminal() as progress:
        run_demo(given.out, progress, seed=given.seed)
    return 0


def train(call: Call) -> int:
    examples = [
        "deit train photos/",
        "deit train cifar10 --recipe cifar10 --teacher cifar-resnet56@w.safetensors",
    ]
    arguments = [DATA_ONCE, folder("folder of the run; runs/<data>-<n> if not given", None), RESUME, RECIPE]
    given, flags, configure = call.configurable(RunConfig, *arguments, examples=examples)
    configure()  # what is wrong with the flags is told before anything heavy is imported
    from deitkit.training.run import default_out, teacher_unasked

    data = location(given.data, given.out, given.resume, call.prog)
    out = given.out or default_out(data)
    recipe = find_recipe(given.recipe) if given.recipe else None
    lower = lower_settings(out, given.resume, recipe)
    configure = partial(configure, recipe=lower, teacher=teacher_unasked(out, given.resume, recipe))
    config = configure()
    relaunched = in_processes(config.loop.processes, ["train", *call.argv, *([] if given.out else ["--out", str(out)])])
    if relaunched is not None:
        return relaunched
    from deitkit.training.jobs import run_training
    from deitkit.training.setup import opened_unasked
    from deitkit.training.tables import disappointment, result_table

    how = to_continue("train", out)
    again = AGAIN if config.teacher.teacher == "auto" else ""  # what was fitted of the teacher is kept
    with resumable(out, "config.yaml", how, again), on_terminal() as progress:
        dataset = None
        if lower is None:
            dataset, chosen = opened_unasked(data, config, out, resume=given.resume, given=flags, progress=progress)
            config = configure(recipe=find_recipe(chosen)) if chosen else config
        summary = run_training(data, config, out, resume=given.resume, progress=progress, dataset=dataset)
        untrained = summary.get("untrained_heads")
        if not untrained:
            progress.table(accuracy_title("val", summary["n"]), *result_table(summary))
        if line := disappointment(summary):
            progress.say(line)
        if untrained:
            progress.say(f"next: deit train DATA --init {quoted(out)}")
            return 0
        if summary.get("has_test"):
            progress.say(f"next: deit evaluate {quoted(out)} --split test")
        progress.say(f"next: deit predict {quoted(out)} IMAGE...")
        say_report(out, progress)
    return 0


def evaluate(call: Call) -> int:
    data = Argument(
        "data", str | None, "other data; the run's own if not given", None, positional=True, metavar="[DATA]"
    )
    given = call.parse(RUN, data, SPLIT, WORKERS, JSON)
    from deitkit.inspect.report import try_report
    from deitkit.training.evaluate import evaluate_run
    from deitkit.training.tables import disappointment, evaluation_table

    split = SPLITS[given.split]
    result = evaluate_run(given.run, given.data, split, given.workers, warn)
    if given.json:
        try_report(given.run, warn, split, given.data)
        print_json(result)
        return 0
    with on_terminal() as progress:
        if not result.get("untrained_heads"):
            progress.table(accuracy_title(result["split"], result["n"], result["data"]), *evaluation_table(result))
            which = "" if result["top1"].get("dist") is None else "both heads fused: "
            progress.say(f"{which}log loss {result['nll']:.3f}, calibration error {percent(result['ece'])} %")
        if line := disappointment(result):
            progress.say(line)
        say_report(given.run, progress, split, given.data)
    return 0


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

    with resumable(given.out, "plan.yaml", "rerun with --resume to continue"), on_terminal() as progress:
        own = {**vars(given), "seeds": given.seeds or None, "split": SPLITS[given.split]}
        result = compare(**own, progress=progress, **settings)
        progress.say(f"{given.out / 'compare.html'}: tables, plots, every run")
    if result["failed"]:
        count = len({failure["contender"] for failure in result["failed"]})
        raise UserError(
            f"{count} of {len(result['contenders'])} contenders failed, the others are complete: --resume tries again"
        )
    return 0
