"""One call of a verb: its flags, by argparse, which follow from the classes in config, and the configuration that they stand for."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

from pydantic import ByteSize, TypeAdapter, ValidationError

from deitkit.config import (  # fmt: skip
    Config,
    ConfigT,
)
from deitkit.settings import LENGTHS, Place, _message, build, find_recipe, places, section_of
from deitkit.terminal import UserError, brief, expanded

COMMON = (
    "model", "from_scratch", "teacher", "distillation", "temperature", "teacher_weight", "distil", "student", "init", "image_size",
    "length", "batch_size", "base_lr", "optimizer", "augment", "train_images", "unlabelled", "class_weights", "val_fraction", "seed",
    "patience", "workers", "processes", "precision", "deterministic",
)  # fmt: skip
"""What people change first: the flags of `--help`, in this order; `--help-all` shows the others too."""
YAML_ONLY = frozenset({
    "location", "tape", "label_loss", "warmup_lr", "view_size", "crop_padding", "crop_area", "three_augment", "colour_jitter",
    "mixup_switch_prob", "shrink_batch",
})  # fmt: skip
"""Settings without a flag: keys of recipes and keywords of `dk.train`."""
METAVARS = {
    "teacher": "T", "distillation": "LOSS", "distil": "HEAD", "length": "L", "record": "DIR", "init": "W", "student": "S",
    "optimizer": "NAME", "batch_size": "N", "class_weights": "W", "keep": "W", "track": "NAME", "augment": "PRESET", "precision": "P",
    "teacher_precision": "P", "randaugment": "RAND",
}  # fmt: skip
ELSEWHERE = {
    "--learning-rate": "--lr", "--lr0": "--lr", "--imgsz": "--image-size", "--input-size": "--image-size", "--model": "--student",
    "--output-dir": "--out", "--batch": "--batch-size", "--num-workers": "--workers", "--wd": "--weight-decay", "--gpus": "--processes",
    "--pretrained": "--init", "--name": "--out",
}  # fmt: skip
"""What other programs call these flags, where the letters do not tell."""
REQUIRED: Any = object()


class Argument(NamedTuple):
    """One argument of a verb; its default may be `REQUIRED`."""

    name: str
    type: Any
    help: str
    default: Any = REQUIRED
    positional: bool = False
    metavar: str | None = None


def flag(name: str) -> str:
    """How a setting is written on the command line."""
    return "--lr" if name == "base_lr" else "--" + name.replace("_", "-")


def parse(
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    arguments: Sequence[Argument],
    kind: type[Config] | None = None,
    only: Callable[[Place], bool] = lambda _: True,
    examples: Sequence[str] = (),
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The values of `arguments`, and those settings of `kind` that `argv` names: flat, as text where pydantic is to read them.

    Raises UserError; `--help` and `--help-all` print and exit."""
    argv = [_dashed(token) for token in argv]
    whole = "--help-all" in argv
    table = [place for place in places(kind).values() if only(place) and place.name not in YAML_ONLY] if kind else []
    usage = " ".join(["%(prog)s", *(_shown(argument) for argument in arguments if argument.positional), "[flags]"])
    below = ["examples:"] * bool(examples) + [f"  {example}" for example in examples]
    below += ["--help-all shows every flag."] if kind and not whole else []
    columns = os.environ.get("COLUMNS", "")
    width = max(60, min(120, int(columns))) if columns.isdecimal() else 80
    layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=25, width=width)
    parser = _Parser(prog=prog, usage=usage, description=description, formatter_class=layout, add_help=False, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS, epilog="\n".join(below))  # fmt: skip
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-3 and -5% are values, too
    group = parser.add_argument_group(prog.rpartition(" ")[2])
    for argument in arguments:
        _add(group, argument)
    settings = [_setting(kind, place) for place in table] if kind else []
    common = sorted((one for one in settings if one.name in COMMON), key=lambda one: COMMON.index(one.name))
    for one in common:
        _add(group, one, short=not whole)
    rest = parser.add_argument_group("more")
    for one in settings:
        if one.name not in COMMON:
            _add(rest, one, hidden=not whole)
    for name in set(LENGTHS) - {argument.name for argument in arguments}:
        if any(place.name == "length" for place in table):
            rest.add_argument(flag(name), dest=name, help=argparse.SUPPRESS)
    group.add_argument("--help", "-h", "--help-all", action="store_true", help=argparse.SUPPRESS)
    if "--help" in argv or "-h" in argv or whole:
        parser.print_help()
        sys.exit(0)
    _refuse_unknown(argv, parser, kind, prog)
    found = vars(parser.parse_intermixed_args(argv))
    missing = [argument for argument in arguments if argument.default is REQUIRED and argument.name not in found]
    if missing:
        takers = [flag(one.name) for one in arguments if one.name in found and Ellipsis in get_args(one.type)]
        swallowed = takers and missing[0].positional
        hint = f": {takers[0]} takes all words after it: write {missing[0].metavar} before it" if swallowed else ""
        raise UserError(f"missing: {', '.join(_shown(argument) for argument in missing)}{hint} ({prog} --help)")
    typed = {one.name: _read(one, found.pop(one.name)) for one in [*arguments, *settings] if one.name in found}
    own = {argument.name: typed.pop(argument.name, argument.default) for argument in arguments}
    return argparse.Namespace(**own), {**typed, **found}  # what is left of `found` are other spellings of the length


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} ({self.prog} --help)")


def _add(group: Any, argument: Argument, *, short: bool = False, hidden: bool = False) -> None:
    inner, text = _without_none(argument.type), " ".join(argument.help.split())
    text = (text.partition(";")[0] if short else text).replace("%", "%%")
    options: dict[str, Any] = {"help": argparse.SUPPRESS if hidden else text}
    if inner is bool:
        on = argument.default is True
        for value in (not on, on):  # the second one, which no page lists, for what a recipe sets otherwise
            name = flag(argument.name if value else f"no-{argument.name}")
            shown = argparse.SUPPRESS if hidden or value is on else f"do not {text}" if on else text
            group.add_argument(name, dest=argument.name, action=f"store_{str(value).lower()}", help=shown)
        return
    items = get_args(inner) if get_origin(inner) is tuple else ()
    if items:
        options["nargs"] = len(items) if Ellipsis not in items else "*" if argument.positional else "+"
    elif argument.positional:
        options["nargs"] = "?"  # what is missing is named together
    options["metavar"] = argument.metavar or _metavar(inner)
    aliases = ["--base-lr"] if argument.name == "base_lr" else []
    options |= {} if argument.positional else {"dest": argument.name}
    group.add_argument(argument.name if argument.positional else flag(argument.name), *aliases, **options)


def _setting(kind: type[Config], place: Place) -> Argument:
    model: Any = kind if place.section is None else section_of(kind.model_fields[place.section].annotation)
    info = model.model_fields[place.name]
    metavar = METAVARS.get(place.name)
    annotation: Any = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
    if place.name == "batch_size":
        annotation = annotation | Literal["auto"]
    return Argument(place.name, annotation, info.description or "", info.default, metavar=metavar)


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, get_args(annotation))) + "}"
    other = "X" if get_origin(annotation) else "NAME"
    return {int: "N", ByteSize: "SIZE", float: "X", Path: "PATH"}.get(_without_none(annotation), other)


def _without_none(annotation: Any) -> Any:
    """The type that a text is read as: without limits, and without None."""
    if get_origin(annotation) is Annotated:
        return _without_none(get_args(annotation)[0])
    parts = [part for part in get_args(annotation) if part is not type(None)]
    union = get_origin(annotation) in (Union, type(int | str))
    return _without_none(parts[0]) if union and len(parts) == 1 else annotation


def _read(argument: Argument, value: Any) -> Any:
    """The value of a verb's own argument, of its type. Raises UserError."""
    try:
        read = TypeAdapter(argument.type).validate_python(value)
        if isinstance(read, tuple):
            return tuple(expanded(one) if isinstance(one, Path) else one for one in read)
        return expanded(read) if isinstance(read, Path) else read
    except ValidationError as error:
        named = _shown(argument) if argument.positional else flag(argument.name)
        raise UserError(f"{named}: {_message(error.errors()[0])} (got {brief(value)})") from error


def _shown(argument: Argument) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.positional else f"{flag(argument.name)} {name}"


def _dashed(token: str) -> str:
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value if token.startswith("--") else token


def _refuse_unknown(argv: Sequence[str], parser: argparse.ArgumentParser, kind: type[Config] | None, prog: str) -> None:
    """Raises UserError for a flag that does not exist, naming close ones, and for empty values: a shell makes them of an unset
    variable, and an empty path is the current folder."""
    known = sorted(parser._option_string_actions)
    before = ""
    for token in argv:
        if token == "--":
            return
        name = token.partition("=")[0]
        if name.startswith("--") and name not in known:
            setting = name.removeprefix("--").replace("-", "_")
            of_kind = kind is not None and setting in places(kind)
            if of_kind and setting not in YAML_ONLY:
                raise UserError(f"{name}: does not apply to {prog}")
            if setting == "tape":
                raise UserError("unknown flag --tape: give the tape's folder to --teacher")
            if kind is not None and of_kind and setting != "location":
                line = f"{places(kind)[setting].section}: {{{setting}: ...}}"
                raise UserError(f"{name}: has no flag: write '{line}' into a YAML file and give it by --recipe")
            own = ELSEWHERE.get(name)
            close = [own] if own in known else difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(close)}?" if close else f"{prog} --help-all lists them"
            raise UserError(f"unknown flag {name}: {hint}")
        if not token or (token.startswith("--") and token.endswith("=")):
            named = token.rstrip("=") or before
            named = named if named.startswith("--") else "an argument"
            raise UserError(f"{named}: is empty (an unset variable of the shell?)")
        before = token


class Call(NamedTuple):
    """One call of a verb: its words after the verb, its name and its line of help."""

    argv: list[str]
    prog: str
    help: str

    def parse(self, *arguments: Argument) -> Any:
        """The values of the verb's own `arguments`. Raises UserError."""
        return parse(self.argv, prog=self.prog, description=self.help, arguments=arguments)[0]

    def configured(
        self,
        kind: type[ConfigT],
        *arguments: Argument,
        only: Callable[[Place], bool] = lambda _: True,
        examples: Sequence[str] = (),
    ) -> tuple[ConfigT, Any]:
        """The configuration that the flags stand for, and the values of the verb's own `arguments`. Raises UserError."""
        own, _, configure = self.configurable(kind, *arguments, only=only, examples=examples)
        return configure(), own

    def configurable(
        self,
        kind: type[ConfigT],
        *arguments: Argument,
        only: Callable[[Place], bool] = lambda _: True,
        examples: Sequence[str] = (),
    ) -> tuple[Any, dict[str, Any], Callable[..., ConfigT]]:
        """The values of the verb's own `arguments`, the settings that the flags give, and what makes a configuration of these: as it is,
        or with other keywords of `settings.build`. Raises UserError."""

        def tape_settings(path: Path) -> dict[str, Any]:
            from deitkit.distill.tape import settings_of

            return settings_of(path)

        own, given = parse(
            self.argv,
            prog=self.prog,
            description=self.help,
            arguments=arguments,
            kind=kind,
            only=only,
            examples=examples,
        )
        recipe = find_recipe(own.recipe) if getattr(own, "recipe", None) else None
        resume = getattr(own, "resume", False)
        usual = {"recipe": recipe, "tape_settings": tape_settings, "resume": resume, "name_of": flag}
        return own, given, lambda **changes: build(kind, given, **{**usual, **changes})
