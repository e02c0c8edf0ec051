"""Configurations from plain values and YAML files, and back; what is wrong with them in one line.

The recipes that are shipped: YAML files, each beginning with a card of what it is for and what it reaches.

In a checkout they stand in `recipes/`, in an installed package in a folder of the package.

A command line made from a configuration class: every field a flag, its text the help, its section a panel.

tyro reads and prints the flags; what it finds wrong is said here in one line. The flags are flat (`--lr`) although the
configuration has sections (`optim.base_lr`), so field names are unique across the sections of a class.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

import tyro
import yaml
from pydantic import ValidationError

from deitkit.config import AUGMENT_PRESETS, FINE_TUNING, FROM_SCRATCH, Config, ConfigT, FitConfig, RunConfig
from deitkit.terminal import UserError, brief, shortened, unknown_name

LENGTHS = ("epochs", "budget_minutes", "steps")
"""How long to train: one of them is given."""
YIELDING = {"warmup_share": "warmup_epochs", "lr_end_share": "lr_end"}
"""Where the first is given, the second, which would stand for it, is none of a recipe's or of other settings' any more."""
OF_THE_LOSS = ("temperature", "teacher_weight")
"""Each loss to a teacher has its own."""


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def under_tape(defaults: dict[str, Any], tape: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """`defaults` with the settings that a tape brings, its views unless a preset (`augment`) is among those that are `given`."""
    return merge(defaults, {key: value for key, value in tape.items() if key != "view" or "augment" not in given})


class _UniqueKeys(yaml.SafeLoader):
    """YAML without keys that stand there twice: of those, the last one would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.YAMLError(f"{key.value!r} stands there twice, line {key.start_mark.line + 1}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError when it cannot be read or is no mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, LookupError) as error:
        # PyYAML lets through what its constructors stumble over: `2026-99-99` is a ValueError, `!!bool x` a KeyError
        raise UserError(f"{path}: not valid YAML: {shortened(' '.join(str(error).split()))}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: expected 'name: value' lines, found {'nothing' if content is None else type(content).__name__}"
        )
    return content


def dump_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def validated(kind: type[ConfigT], values: dict[str, Any], source: str) -> ConfigT:
    """`kind` made from plain values. Raises UserError with one line that names key and value."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(kind, error)}") from error


def section_of(annotation: Any) -> type[Config] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Config) else None


def mapping_or_empty(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def recipe_defaults(kind: type[Config], recipe: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the `given` settings change: the class's own, those that suit the optimizer, then the preset of the
    views, then the recipe's. Raises UserError.

    An `augment` beside the recipe stands for the whole view section, the recipe's included."""
    values: dict[str, Any] = kind().model_dump()
    changes: dict[str, Any] = {} if recipe is None else load_yaml(recipe)
    if kind is RunConfig and _fine_set_trainable({**flat(changes), **flat(given)}):
        values["optim"].update(FINE_TUNING)
    if kind is FitConfig and _fresh({**flat(changes), **flat(given)}):
        values = merge(values, FROM_SCRATCH)
    augment = given.get("augment")
    sections: dict[str, type[Config]] = {}
    for key, value in changes.items():
        if key not in kind.model_fields:
            raise UserError(f"{recipe}: {unknown_name('section', str(key), kind.model_fields)}")
        section = section_of(kind.model_fields[key].annotation)
        if section and not isinstance(value, dict):
            raise UserError(f"{recipe}: {key}: expected settings such as 'name: value', found {brief(value)}")
        if section:
            sections[key] = section
            validated(section, merge(values[key], value), f"{recipe}: {key}")
    preset = augment if augment is not None else mapping_or_empty(changes.get("view")).get("augment")
    if isinstance(preset, str) and preset in AUGMENT_PRESETS:
        values["view"] = AUGMENT_PRESETS[preset].model_dump()
    if augment is not None:
        changes.pop("view", None)
    values = merge(values, changes)
    # As the fields' own types: YAML reads 1e-6 as text.
    checked = {key: validated(section, values[key], f"{recipe}: {key}") for key, section in sections.items()}
    return {**values, **{key: section.model_dump() for key, section in checked.items()}}


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without their sections."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        values.update(value if isinstance(value, dict) else {key: value})
    return values


def _fine_set_trainable(settings: Mapping[str, Any]) -> bool:
    """Whether a student of these (flat) settings learns by `FINE_TUNING` where they say nothing else."""
    return settings.get("init") is not None or settings.get("optimizer") in ("adamw", "lamb")


def _fresh(settings: Mapping[str, Any]) -> bool:
    """Whether a convolutional network of these (flat) settings learns by `FROM_SCRATCH` where they say nothing else."""
    return bool(settings.get("from_scratch")) and settings.get("optimizer") in (None, "muon")


def turned_off(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the `given` settings turn off that a recipe turned on in `values`: another length, what would stand for them, what
    needs a teacher where there is none, the loss to a teacher where both heads learn from labels, temperature and weight of
    another loss than the one asked for."""
    changes: dict[str, Any] = {}
    if "loop" in values and any(name in given for name in LENGTHS):
        changes["loop"] = {name: None for name in LENGTHS[1:] if name not in given}
    if "optim" in values:
        changes["optim"] = {second: None for first, second in YIELDING.items() if first in given}
    if "teacher" in values and "teacher_size" not in given:
        teacher = given.get("teacher", mapping_or_empty(values["teacher"]).get("teacher"))
        if teacher is None or given.get("tape") is not None or given.get("distillation") == "none":
            changes["teacher"] = {"teacher_size": None}
    if "data" in values and "unlabelled" not in given and given.get("distillation") == "none":
        changes["data"] = {"unlabelled": False}
    if "loss" in values and given.get("distil_target") == "labels" and "distillation" not in given:
        changes["loss"] = {"distillation": None}
    if "loss" in values and other_loss(mapping_or_empty(values["loss"]), given):
        changes["loss"] = {name: None for name in OF_THE_LOSS if name not in given}
    return changes


def other_loss(before: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether the `given` settings name another loss to the teacher than the one whose settings those of `before` are."""
    named = [settings.get("distillation") for settings in (before, given)]
    return None not in named and named[0] != named[1]


def clashing(given: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first two of the `given` settings of which only one can hold; None if there are no such two."""
    for names in (LENGTHS, *YIELDING.items()):
        both = [name for name in names if given.get(name) is not None]
        if len(both) > 1:
            return both[0], both[1]
    return None


def without_effect(config: Config, given: Collection[str]) -> tuple[str, str] | None:
    """(setting, why) for the first of the `given` settings that another one leaves without effect; None if there is none.

    Only what is asked for expressly is looked at: a recipe, and what a comparison shares, has settings that some of its runs
    do not need."""
    if not isinstance(config, RunConfig):
        return None
    loss = config.loss
    learned = loss.distillation or ("zscore" if config.teacher.present else "none")
    if {"distillation", "distil_target"} & set(given) and learned != "none" and loss.distil_target == "labels":
        return (
            "distil_target",
            f"labels are learned from no teacher, --distillation {learned} is: leave out one of the two",
        )
    weights = [name for name in ("label_weight", "teacher_weight") if name in given]
    if weights and learned == "none" and loss.distil_target == "teacher":
        return weights[0], "labels are all there is to learn from: give --teacher or --tape, or leave it out"
    softened = learned not in ("none", "hard") and loss.distil_target == "teacher"
    if "temperature" in given and not softened:
        why = "decisions have none" if learned == "hard" else "there is no teacher whose answers it would soften"
        return "temperature", f"{why}: give --distillation soft, zscore, dist or dkd, or leave it out"
    if "dkd_beta" in given and learned != "dkd":
        return "dkd_beta", "is of that loss alone: give --distillation dkd, or leave it out"
    if "layer_decay" in given and config.optim.layer_decay != 1 and config.student.init is None:
        return "layer_decay", "is for weights that are there already, these are fresh: give --init, or leave it out"
    if "low_res_fraction" in given and config.student.low_res_size is None:
        return "low_res_fraction", "of the steps at which size? give --low-res-size, or leave it out"
    return None


def plain_message(complaint: Mapping[str, Any]) -> str:
    """What is wrong, of one of pydantic's complaints, as the middle of a sentence."""
    message = str(complaint["msg"]).removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def explain(kind: type[Config], error: ValidationError) -> str:
    """The first complaint of a pydantic error, as one line."""
    first = error.errors()[0]
    # Where there is a choice of classes, pydantic names the one that it means, in words of its own.
    path = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
    if first["type"] == "extra_forbidden":
        model: Any = kind
        for part in first["loc"][:-1]:  # the name of a class stands there where there is a choice of classes
            field = getattr(model, "model_fields", {}).get(str(part))
            model = field.annotation if field else next((c for c in get_args(model) if c.__name__ in str(part)), model)
        return str(unknown_name("configuration key", str(first["loc"][-1]), model.model_fields))
    message = plain_message(first)
    if first["type"] == "value_error":  # said by a whole section: it names its fields itself
        return f"{path}: {message}" if path else message
    return f"{path}: {message} (got {brief(first['input'])})" if path else message


PACKAGED = Path(__file__).parent / "shipped_recipes"
IN_CHECKOUT = Path(__file__).parents[2] / "recipes"


def shipped() -> dict[str, Path]:
    """The files of the shipped recipes by name."""
    folder = PACKAGED if PACKAGED.is_dir() else IN_CHECKOUT
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that is shipped. Raises UserError."""
    if Path(name).suffix in (".yaml", ".yml") or "/" in name:
        return Path(name)
    known = shipped()
    if name in known:
        return known[name]
    if not known:
        raise UserError(f"--recipe {name}: none is shipped: give the path of a YAML file")
    raise unknown_name("recipe", name, known)


def card(path: Path) -> list[str]:
    """The lines of the comment that a recipe begins with, without their signs; the first one is its title."""
    lines = path.read_text(encoding="utf-8").splitlines()
    last = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.removeprefix("#").removeprefix(" ") for line in lines[:last]]


T = TypeVar("T")
ALIASES = {"base_lr": ("--lr",)}
METAVARS = {"tape": "DIR", "record": "DIR"}
HIDDEN = {"location"}
"""Fields that the command line gives otherwise: DATA."""
COMMON = (
    "model", "from_scratch", "teacher", "distillation", "student", "init", "image_size", "epochs", "budget_minutes", "batch_size",
    "base_lr", "augment", "train_images", "seed", "workers", "processes",
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
