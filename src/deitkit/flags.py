"""A command line made from a configuration class: every field a flag, its text the help, its section a panel.

tyro reads and prints the flags; what it finds wrong is said here in one line. The flags are flat (`--lr`) although the
configuration has sections (`optim.lr_per_256_images`), so field names are unique across the sections of a class.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import tyro
from pydantic import ValidationError

from deitkit.config import Config, ConfigT
from deitkit.errors import UserError, brief
from deitkit.settings import (
    clashing,
    mapping_or_empty,
    merge,
    plain_message,
    recipe_defaults,
    section_of,
    turned_off,
    under_tape,
    without_effect,
)

T = TypeVar("T")
ALIASES = {"lr_per_256_images": ("--lr",)}
METAVARS = {"tape": "DIR", "record": "DIR"}
HIDDEN = {"location"}
"""Fields that the command line gives otherwise: DATA."""
COMMON = (
    "model", "from_scratch", "teacher", "distillation", "student", "init", "image_size", "epochs", "budget_minutes", "batch_size",
    "lr_per_256_images", "augment", "train_images", "seed", "workers", "processes",
)  # fmt: skip
"""What people change first: these stand in the first panel of `--help`."""
PANELS = ("other", "teacher", "loss", "student", "view", "optim", "loop", "data")
"""The order of the panels below it: a panel a section."""


class Place(NamedTuple):
    """Where a flag's value goes."""

    section: str | None
    name: str


class Field(NamedTuple):
    """One argument of a verb."""

    name: str
    type: Any
    help: str
    default: Any = dataclasses.MISSING
    positional: bool = False
    metavar: str | None = None


def places(kind: type[Config]) -> dict[str, Place]:
    """Every field of `kind` and of its sections by its own name."""
    found = {}
    for name, info in kind.model_fields.items():
        section = section_of(info.annotation)
        inner = [Place(name, key) for key in section.model_fields] if section else [Place(None, name)]
        found.update({place.name: place for place in inner if place.name not in HIDDEN})
    return found


def flag(name: str) -> str:
    """How a field is written on the command line."""
    return ALIASES.get(name, ("--" + name.replace("_", "-"),))[0]


def given_flags(argv: Sequence[str]) -> dict[str, str | None]:
    """The flags in `argv` by field name, with the text after each: a look ahead, before the parser is built."""
    aliases = {alias[2:]: name for name, many in ALIASES.items() for alias in many}
    found: dict[str, str | None] = {}
    for number, token in enumerate(argv):
        if token == "--":
            break
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            after = argv[number + 1] if number + 1 < len(argv) else None
            found[aliases.get(name, name).replace("-", "_")] = value if equals else after
    return found


def parse_config(
    kind: type[ConfigT],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    before: Sequence[Field] = (),
    only: Callable[[Place], bool] = lambda _: True,
    find_recipe: Callable[[str], Any] | None = None,
    taped_settings: Callable[[str], dict[str, Any]] | None = None,
) -> tuple[ConfigT, Any]:
    """`kind` from `argv`, and an object with the values of `before`, the verb's own arguments.

    Two passes: `--recipe`, `--tape` and `--augment` choose the defaults that the other flags change. Raises UserError.
    """
    switches = {name for name, info in kind.model_fields.items() if info.annotation is bool}
    given: dict[str, Any] = {**given_flags(argv)}
    given.update(dict.fromkeys(switches & given.keys(), True))
    recipe = given.get("recipe")
    found = find_recipe(recipe) if find_recipe and recipe is not None else None
    defaults = recipe_defaults(kind, found, given)
    tape = given.get("tape")
    if taped_settings and tape:
        defaults = under_tape(defaults, taped_settings(tape), given)
    table = {name: place for name, place in places(kind).items() if only(place)}
    common, panels = _arranged(kind, defaults, table)
    parsed = parse(argv, prog=prog, description=description, fields=[*before, *common], panels=panels)
    values = defaults
    for name, place in table.items():
        value = getattr(parsed, name)
        values = merge(values, {name: value} if place.section is None else {place.section: {name: value}})
    values = merge(values, _exclusive(defaults, given))
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        raise UserError(_complaint(error)) from error
    useless = None if "resume" in given else without_effect(config, given)  # a run goes on as it was begun
    if useless is not None:
        raise UserError(f"{flag(useless[0])}: {useless[1]}")
    return config, parsed


def parse_given(
    kind: type[Config],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    before: Sequence[Field],
    only: Callable[[Place], bool],
) -> tuple[dict[str, Any], Any]:
    """The settings of `kind` that `argv` names, flat and not yet held against each other, and an object with the values
    of `before`. Raises UserError."""
    table = {name: place for name, place in places(kind).items() if only(place)}
    common, panels = _arranged(kind, kind().model_dump(), table)
    parsed = parse(argv, prog=prog, description=description, fields=[*before, *common], panels=panels)
    given = given_flags(argv)
    _exclusive({}, given)
    return {name: getattr(parsed, name) for name in table if name in given or f"no_{name}" in given}, parsed


def _arranged(
    kind: type[Config], defaults: Mapping[str, Any], table: Mapping[str, Place]
) -> tuple[list[Field], dict[str, list[Field]]]:
    """The flags of these fields: those that people change first, and the others by panel."""
    fields = {name: _config_field(kind, defaults, place) for name, place in table.items()}
    panels: dict[str, list[Field]] = {}
    for name, place in sorted(table.items(), key=lambda item: PANELS.index(item[1].section or "other")):
        if name not in COMMON:
            panels.setdefault(place.section or "other", []).append(fields[name])
    return [fields[name] for name in COMMON if name in fields], panels


def parse(
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    fields: Sequence[Field],
    panels: Mapping[str, Sequence[Field]] | None = None,
) -> Any:
    """An object with one attribute a field, those of `panels` among them. Raises UserError; `--help` prints and exits."""
    panels = panels or {}
    every = [*fields, *(field for panel in panels.values() for field in panel)]
    on = {"--" + field.name.replace("_", "-") for field in every if field.default is True}
    argv = [token for token in argv if token not in on]  # what is on already may be asked for
    _refuse_unknown_flags(argv, every, prog)
    _refuse_empty(argv)
    members = [(field.name, *_member(field)) for field in fields]
    for title, panel in panels.items():
        inner = dataclasses.make_dataclass(title, [(field.name, *_member(field)) for field in panel], kw_only=True)
        inner.__doc__ = ""
        panel_type: Any = Annotated[inner, tyro.conf.arg(name=title)]
        members.append((f"{title}_panel", panel_type, dataclasses.field(default_factory=inner)))
    shape = dataclasses.make_dataclass("Arguments", members, kw_only=True)
    parsed: Any = _one_line_errors(prog, lambda: _tyro(shape, argv, prog, description))
    flat = {field.name: getattr(parsed, field.name) for field in fields}
    for title, panel in panels.items():
        flat |= {field.name: getattr(getattr(parsed, f"{title}_panel"), field.name) for field in panel}
    return types.SimpleNamespace(**flat)


def _tyro(shape: type[T], argv: Sequence[str], prog: str, description: str) -> T:
    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    return tyro.cli(shape, prog=prog, description=description, args=list(argv), config=markers)


def _one_line_errors(prog: str, call: Callable[[], T]) -> T:
    """What `call` answers. tyro prints a box and exits with 2 where the input is wrong: that becomes one UserError."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return call()
    except SystemExit as stop:
        if not stop.code:
            raise
        text = unboxed(complaint.getvalue())
    raise UserError(f"{text} ({prog} --help)")


def unboxed(box: str) -> str:
    """The message of one of tyro's error boxes as one line: what stands between its title and its last rule.

    Where the terminal has no box characters the title is a line of its own, with a rule below."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    drawn = "╭" in plain
    lines: list[str] = []
    rules = 0 if drawn else -1
    for line in plain.splitlines():
        text = line.strip("│").rstrip()
        if line.startswith(("╭", "╰")) or not text.strip():
            continue
        if set(text.strip()) <= set("─-"):
            rules += 1
        elif rules == 0:
            lines.append(text)
    joined = re.sub(r"\[/?bold\]", "", " ".join(line.strip() for line in lines)) or "wrong arguments"
    unfit = re.match(
        r"Error parsing (--[\w-]+): no type matching \{(.*)\} could be instantiated from \[(.*?)\]", joined
    )
    if unfit:
        return "{}: expected {}, got {}".format(*unfit.groups())
    if joined.startswith("Missing from ") and len(lines) > 1:
        indents = [len(line) - len(line.lstrip()) for line in lines]  # names stand left of their help
        return "missing: " + ", ".join(
            line.strip() for line, indent in zip(lines, indents, strict=True) if indent == min(indents[1:])
        )
    return joined[0].lower() + joined[1:].rstrip(".")


def _refuse_unknown_flags(argv: Sequence[str], fields: Sequence[Field], prog: str) -> None:
    known = {alias for field in fields for alias in ALIASES.get(field.name, ())} | {"--help", "--help-verbose"}
    for field in fields:
        if not field.positional:
            word = field.name.replace("_", "-")
            known.add(f"--no-{word}" if field.default is True else f"--{word}")
    for token in argv:
        if token == "--":
            return
        name = token.partition("=")[0]
        if name.startswith("--") and "--" + name[2:].replace("_", "-") not in known:
            close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(close)}?" if close else f"{prog} --help lists them"
            raise UserError(f"unknown flag {name}: {hint}")


def _refuse_empty(argv: Sequence[str]) -> None:
    """What a shell makes of an unset variable would be taken for the folder where one is: for all images in it, for instance."""
    for before, token in zip(["", *argv], argv, strict=False):
        if not token or (token.startswith("--") and token.endswith("=")):
            flag_before = token.rstrip("=") or before
            named = flag_before if flag_before.startswith("--") else "an argument"
            raise UserError(f"{named}: is empty (an unset variable of the shell?)")


def _exclusive(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a flag turns off that a recipe turned on. Raises UserError where two flags exclude each other."""
    both = clashing(given)
    if both is not None:
        raise UserError(f"{flag(both[0])} and {flag(both[1])} exclude each other: give one of them")
    changes = turned_off(values, given)
    if given.get("distillation") == "none" and "teacher" not in given:
        changes["teacher"] = {**changes.get("teacher", {}), "teacher": None}
    if (
        "teacher" in given
        and "distillation" not in given
        and mapping_or_empty(values.get("loss")).get("distillation") == "none"
    ):
        changes["loss"] = {"distillation": None}
    return changes


def _config_field(kind: type[Config], defaults: Mapping[str, Any], place: Place) -> Field:
    model: Any = kind if place.section is None else section_of(kind.model_fields[place.section].annotation)
    info = model.model_fields[place.name]
    value = defaults[place.name] if place.section is None else defaults[place.section][place.name]
    annotation = _plain(info.annotation)
    if typing.get_origin(annotation) is tuple or typing.get_origin(_without_none(annotation)) is tuple:
        value = None if value is None else tuple(value)
    return Field(place.name, annotation, " ".join((info.description or "").split()), value)


def _member(field: Field) -> tuple[Any, Any]:
    """A dataclass member that tyro shows as `field`."""
    options: dict[str, Any] = {
        "help": f"turn off: {field.help}" if field.default is True else field.help,
        "metavar": field.metavar or METAVARS.get(field.name) or _metavar(field.type),
    }
    if field.default is not dataclasses.MISSING:
        options["help_behavior_hint"] = _default_hint(field.default)
    elif typing.get_origin(field.type) is tuple:
        options["help_behavior_hint"] = "(one or more)"
    if field.name in ALIASES:
        options["aliases"] = ALIASES[field.name]
    markers: list[Any] = [tyro.conf.arg(**options)]
    if field.positional:
        markers.append(tyro.conf.Positional)
    annotation: Any = Annotated[(field.type, *markers)]
    return annotation, dataclasses.field(default=field.default)


def _default_hint(value: Any) -> str:
    """What `--help` says of a default: nothing where the help says what happens without the flag."""
    if value is None or value == () or isinstance(value, bool):
        return ""
    parts = value if isinstance(value, tuple) else (value,)
    return f"(default: {' '.join(f'{part:.4g}' if isinstance(part, float) else str(part) for part in parts)})"


def _metavar(annotation: Any) -> str | None:
    """What stands for the value in `--help`; None where tyro's own word is right."""
    inner = _without_none(annotation)
    words = {int: "N", float: "X", str: "NAME"}
    if typing.get_origin(inner) is tuple:
        parts = typing.get_args(inner)
        return None if Ellipsis in parts else " ".join(words.get(part, "X") for part in parts)
    if typing.get_origin(inner) is Literal:
        return "{" + ",".join(typing.get_args(inner)) + "}"
    return words.get(inner)


def _without_none(annotation: Any) -> Any:
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return parts[0] if union and len(parts) == 1 else annotation


def _plain(annotation: Any) -> Any:
    """`annotation` without pydantic's limits, which pydantic checks itself."""
    if typing.get_origin(annotation) is Annotated:
        return _plain(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.Union[tuple(_plain(part) for part in typing.get_args(annotation))]  # noqa: UP007
    if typing.get_origin(annotation) is tuple:
        return tuple[tuple(_plain(part) for part in typing.get_args(annotation))]  # type: ignore[misc]
    return annotation


def _complaint(error: ValidationError) -> str:
    """The first thing that pydantic finds wrong, with the flag that it is about."""
    first = error.errors()[0]
    names = [str(part) for part in first["loc"]]
    message = plain_message(first)
    if first["type"] == "value_error" and len(names) < 2:  # said by a whole section: it names its fields itself
        head, colon, rest = message.partition(": ")
        return f"{flag(head)}: {rest}" if colon and head.isidentifier() else message
    field = names[1] if len(names) > 1 else names[0]
    return f"{flag(field)}: {message} (got {brief(first['input'])})"
