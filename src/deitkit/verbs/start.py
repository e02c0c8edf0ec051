"""`deit demo`, `deit models` and `deit recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deitkit.errors import UserError
from deitkit.flags import Field, parse
from deitkit.recipes import card, find_recipe, shipped
from deitkit.verbs.common import check_range, json_field, on_terminal, print_json

STUDENT_COLUMNS = ["student", "parameters", "GMAC", "activations", "image size", "tokens"]


def demo(argv: list[str], prog: str, help: str) -> int:
    fields = [
        Field("out", Path, "folder of the runs", Path("runs/demo"), metavar="DIR"),
        Field("seed", int, "replaces all three seeds", 0),
    ]
    given = parse(argv, prog=prog, description=help, fields=fields)
    check_range("--seed", given.seed, 0, 2**32 - 1)
    from deitkit.demo import run_demo

    with on_terminal() as progress:
        run_demo(given.out, progress, seed=given.seed)
    return 0


def models(argv: list[str], prog: str, help: str) -> int:
    given = parse(argv, prog=prog, description=help, fields=[json_field()])
    from deitkit.zoo import describe_students

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
