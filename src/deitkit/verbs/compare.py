"""`deit compare`."""

from __future__ import annotations

from pathlib import Path

from deitkit.config import RunConfig
from deitkit.errors import UserError
from deitkit.flags import Field, Place, parse_given
from deitkit.recipes import find_recipe
from deitkit.verbs.common import SPLITS, SplitWord, data_field, on_terminal

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
