"""Flags, keywords, YAML, recipes and tapes become one configuration, by one order of precedence.

    class defaults < what optimizer, loss, preset or pretrained weights imply < recipe < tape (its views and split) < flags or keywords

A resumed run's config.yaml takes the place of the recipe. In a plan `shared` lies over the recipe, flags over `shared`, and a contender's
own settings over all. What the loss implies is in `LossConfig`; what is open then the data decide (`training.setup.resolve`). A flag
that contradicts a tape's views or split is refused where the tape is opened.

`overlay` lays one flat layer over another, `build` all of them, for the command line, `dk.train`, recipes and plans alike. A setting has
one name as a flag (`--base-lr`), a keyword (`base_lr=`) and a key in YAML (`optim: {base_lr: ...}`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import TypeAdapter, ValidationError

from deitkit.config import (  # fmt: skip
    AUGMENT_PRESETS,
    AUTO,
    MIMETIC,
    REQUIRED,
    SCRATCH,
    SHAPE,
    SHIPPED,
    TEMPERATURES,
    Config,
    ConfigT,
    FitConfig,
    JobConfig,
    RunConfig,
    ViewConfig,
)
from deitkit.lengths import Length
from deitkit.randaugment import RandAugment, parse_randaugment
from deitkit.terminal import UserError, brief, expanded, load_yaml, unknown_name

PLACES = frozenset({"init", "record", "tape", "teacher"})
"""Settings that may be paths."""
LENGTHS = {"epochs": "ep", "steps": "st", "budget_minutes": "min"}
"""Other spellings of `length`, each with its unit."""
LOOKS = frozenset(ViewConfig.model_fields) - {"augment", "view_seed", "view_size", "views", "repeated_aug"}
"""Settings that the preset `augment` stands for: how a view looks; neither which views there are nor how many."""
BELONGS_TO: dict[str, Collection[str]] = {
    "optimizer": ("base_lr", "min_lr", "warmup_lr", "weight_decay"),
    "distillation": ("temperature", "teacher_weight", "feature_weight"),
    "student": (*SHAPE, "init"),
    "augment": LOOKS,
}
"""Settings that make sense for one choice only: a layer that chooses otherwise drops them from the layers below."""
OF_A_TEACHER = ("teacher", "tape", "record", "teacher_size", "unlabelled")
MUON = {"optimizer": "muon", "base_lr": RunConfig().optim.base_lr}
"""For a convolutional network that is trained from scratch."""
FINE_TUNING = {"base_lr": 1e-4, "batch_size": 32}
"""For one that starts from pretrained weights and the classifier that fits them."""

SHIPPED_STUDENTS = ("deit_photo", "deit_micro")
"""Students whose pretrained weights come with the package."""
PUBLISHED_STUDENTS = {
    **{f"deit_{size}": f"deit_{size}_distilled_patch16_224.fb_in1k" for size in ("tiny", "small", "base")},
    **{f"deit_{size}_plain": f"deit_{size}_patch16_224.fb_in1k" for size in ("tiny", "small", "base")},
    **{f"deit3_{size}": f"deit3_{size}_patch16_224.fb_in1k" for size in ("small", "medium", "base", "large")},
    **{f"deit3_{size}_384": f"deit3_{size}_patch16_384.fb_in1k" for size in ("small", "base", "large")},
    **{f"vit_{size}": f"vit_{size}_patch16_224.augreg_in21k_ft_in1k" for size in ("tiny", "small", "base")},
    **{f"vit_{size}_384": f"vit_{size}_patch16_384.augreg_in21k_ft_in1k" for size in ("tiny", "small", "base")},
    "deit_base_384": "deit_base_distilled_patch16_384.fb_in1k",
    "deit_base_384_plain": "deit_base_patch16_384.fb_in1k",
    "deit3_huge": "deit3_huge_patch14_224.fb_in1k",
}
"""timm's names of the weights that the papers' authors published."""

# ------------------------------------------------------------------------------------------------- precedence


class WrongSetting(ValueError):
    """An invalid setting: (name, reason)."""


def own_weights(name: str | None, settings: Mapping[str, Any]) -> str | None:
    """What `--init auto` stands for: weights of the student called `name`, shipped or published; None if it has none, or the `settings`
    change its shape."""
    if any(settings.get(field) is not None for field in SHAPE):
        return None
    return f"{SHIPPED}{name}" if name in SHIPPED_STUDENTS else PUBLISHED_STUDENTS.get(name or "")


def fine_tunes(flat: Mapping[str, Any]) -> bool:
    """Whether a run starts from weights that want small rates. The shipped ones were made with Muon, and take its rates as fresh weights
    do."""
    init = own_weights(flat.get("student"), flat) if flat.get("init") == AUTO else flat.get("init")
    return init not in (None, SCRATCH, MIMETIC) and not str(init).startswith(SHIPPED)


def implied_optimizer(kind: type[Config], flat: Mapping[str, Any]) -> str:
    """The optimizer of these settings: Muon for fresh and shipped weights, AdamW for other pretrained ones, unless they name one."""
    new_weights = bool(flat.get("from_scratch")) if kind is FitConfig else not fine_tunes(flat)
    return flat.get("optimizer") or ("muon" if new_weights else "adamw")


def overlay(lower: Mapping[str, Any], upper: Mapping[str, Any], kind: type[Config] = RunConfig) -> dict[str, Any]:
    """`upper` over `lower`, both flat. What belongs to a choice that `upper` makes otherwise is dropped from `lower`: the rates of
    another optimizer, the temperature of another loss, the teacher of a student that is to learn without one."""
    chosen = {choice: lower.get(choice) or {"augment": "light"}.get(choice) for choice in BELONGS_TO}
    changed = {choice for choice in BELONGS_TO if chosen[choice] and upper.get(choice) not in (None, chosen[choice])}
    changed |= {"optimizer"} if implied_optimizer(kind, lower) != implied_optimizer(kind, {**lower, **upper}) else set()
    dropped = {name for choice in changed for name in BELONGS_TO[choice]}
    if upper.get("distillation") == "none" or upper.get("distil") == "labels":
        dropped |= {*OF_A_TEACHER, "distillation", "distil", "feature_weight"}
        dropped |= (
            set() if lower.get("distillation") in (None, "none") else {"label_weight"}
        )  # beside the teacher's term
    elif upper.get("distillation") is not None and lower.get("distil") == "labels":
        dropped.add("distil")
    if upper.get("teacher") is not None or upper.get("tape") is not None:
        dropped |= {"teacher", "tape"}
        dropped |= {"record", "teacher_size"} if upper.get("tape") is not None else set()
        dropped |= {"distillation"} if lower.get("distillation") == "none" else set()
    return {**{name: value for name, value in lower.items() if name not in dropped}, **upper}


def implied(kind: type[Config], flat: Mapping[str, Any]) -> dict[str, Any]:
    """What settings imply that do not say: rates by optimizer, views by preset."""
    values: dict[str, Any] = {}
    preset = AUGMENT_PRESETS.get(str(flat.get("augment")))
    values.update({} if preset is None else preset.model_dump())
    if kind is RunConfig:
        optimizer = implied_optimizer(kind, flat)
        rates = (RunConfig if optimizer == "muon" and not fine_tunes(flat) else JobConfig)().optim
        values.update(optimizer=optimizer, base_lr=rates.base_lr, weight_decay=rates.weight_decay)
    if kind is FitConfig and flat.get("from_scratch") and implied_optimizer(kind, flat) == "muon":
        values.update(MUON, batch_size=64)
    elif kind is FitConfig and not flat.get("from_scratch") and _published_weights(str(flat.get("model", ""))):
        values.update(FINE_TUNING)
    return values


def _published_weights(model: str) -> bool:
    """Whether a network has pretrained weights, by its name: a CIFAR-style ResNet has those of a file alone."""
    return bool(model) and (not model.startswith("cifar-resnet") or "@" in model)


def build(
    kind: type[ConfigT],
    given: Mapping[str, Any],
    *,
    recipe: Path | None = None,
    lower: Mapping[str, Any] | None = None,
    tape_settings: Callable[[Path], dict[str, Any]] | None = None,
    resume: bool = False,
    name_of: Callable[[str], str] = "settings: {}".format,
    teacher: str | None = None,
) -> ConfigT:
    """The configuration that these settings stand for: `given` (flags or keywords, flat) over the tape's over the recipe's, or over
    other flat settings, `lower`. `tape_settings` reads what a tape fixes. `name_of` spells a setting in messages. `teacher`: whom a
    student learns from where nobody is named, unless it is to learn from labels alone.

    Raises UserError: for unknown names, values out of range, settings that contradict each other, and, unless a run is resumed, for
    those in `given` that have no effect."""
    try:
        given = spelled(kind, given)
        below = dict(lower or {}) if recipe is None else recipe_settings(kind, recipe)
        tape = overlay(below, given, kind).get("tape")
        if tape is not None and tape_settings is not None:
            below = overlay(below, flattened(kind, tape_settings(Path(str(tape))), str(tape)), kind)
        flat = overlay(below, given, kind)
        named = flat.get("teacher") or flat.get("tape")
        if teacher is not None and not named and flat.get("distillation") != "none" and flat.get("distil") != "labels":
            flat["teacher"] = teacher
        if not (flat.get("teacher") or flat.get("tape") or "teacher_size" in given):
            flat.pop("teacher_size", None)
        config = kind.model_validate(nested(kind, {**implied(kind, flat), **flat}))
        if not resume:
            refuse_without_effect(config, given)
    except (ValidationError, WrongSetting) as error:
        name, why = _first_complaint(kind, error) if isinstance(error, ValidationError) else error.args
        raise UserError(f"{name_of(name)}: {why}" if name else why) from error
    return config


def lower_settings(out: Path, resume: bool, recipe: Path | None) -> Path | None:
    """The YAML file that lies under flags and keywords: the recipe that is asked for; else, of a run that is resumed, its own settings."""
    own = out / "config.yaml"
    return own if recipe is None and resume and own.is_file() else recipe


def spelled(kind: type[Config], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with aliases replaced by the setting's name: `epochs=3` by `length="3ep"`, a teacher that is a tape's folder by the tape."""
    found: dict[str, Any] = {}
    lengths = [name for name in ("length", *LENGTHS) if given.get(name) is not None]
    if len(lengths) > 1:
        raise WrongSetting(lengths[0], f"excludes {lengths[1]}: give one length")
    if given.get("lr") is not None and given.get("base_lr") is not None:
        raise WrongSetting("lr", "is base_lr: give one of them")
    known = places(kind)
    for key, value in given.items():
        name = "base_lr" if key == "lr" else key
        if isinstance(value, str) and not value.strip():
            raise WrongSetting(key, "is empty")
        if name in LENGTHS:
            found.update({} if value is None else {"length": _with_unit(name, value)})
        elif name == "batch_size" and value == AUTO:
            found["shrink_batch"] = True
        elif name in FIXED:
            raise WrongSetting(key, f"cannot be chosen any more: it is {next(iter(FIXED[name]))}")
        elif name in RANDAUGMENT:
            raise WrongSetting(
                key, f"is a part of randaugment now: randaugment={str(RandAugment())!r}, with your numbers"
            )
        elif name not in known:
            raise unknown_name("setting", key, [*known, "lr", *LENGTHS])
        else:
            found[name] = at_home(value) if name in PLACES and isinstance(value, str | Path) else value
    teacher = found.get("teacher")
    if teacher == "none" and not Path("none").exists():
        found["teacher"] = None
        if found.setdefault("distillation", "none") != "none":
            raise WrongSetting("distillation", f"{found['distillation']} needs a teacher, and --teacher none has none")
    if isinstance(teacher, str | Path) and (Path(teacher) / "tape.json").is_file():
        if found.get("tape") is not None:
            raise WrongSetting("teacher", "is a tape, and so is --tape: give one of them")
        found["tape"] = str(found.pop("teacher"))
    return found


def at_home(value: str | Path) -> str:
    """`~/runs/t`, `cifar-resnet56@~/w.pth` or `lite0+~/runs/t` with the home folder in the place of `~`. Raises UserError."""
    there = os.path.exists(value)  # noqa: PTH110 - Path raises where a name is too long
    parts = [str(value)] if there else re.split(r"(?<=[+@])(?=~)", str(value))
    return "".join(str(expanded(part)) if part.startswith("~") else part for part in parts)


def _with_unit(name: str, value: Any) -> str:
    """`epochs=3` as the length `3ep`. Raises WrongSetting by the name that was given."""
    try:
        return TypeAdapter(Length).validate_python(f"{value}{LENGTHS[name]}")
    except ValidationError as error:
        raise WrongSetting(name, f"{_message(error.errors()[0]).partition(' with')[0]} (got {brief(value)})") from error


def refuse_without_effect(config: Config, given: Collection[str]) -> None:
    """Raises WrongSetting for the first of the `given` settings that another one leaves without effect. Recipes, and what a
    comparison shares, may have settings that some of their runs do not need."""
    if not isinstance(config, RunConfig):
        return
    loss = config.loss
    learned = loss.distillation or ("zscore" if config.teacher.present else "none")
    second_term = learned != "none" or loss.distil == "labels"
    if "feature_weight" in given and (learned == "none" or loss.distil == "labels"):
        raise WrongSetting("feature_weight", "there is no teacher: give --teacher, or leave it out")
    if "teacher_weight" in given and not second_term:
        raise WrongSetting("teacher_weight", "there is no teacher: give --teacher, or leave it out")
    if "temperature" in given and learned not in TEMPERATURES:
        why = {
            "hard": "hard labels have none",
            "features": "features have none",
            "callable": "your function has none",
        }.get(learned, "there is no teacher")
        raise WrongSetting("temperature", f"{why}: give --teacher and --distillation soft or zscore, or leave it out")
    if "layer_decay" in given and config.optim.layer_decay != 1 and config.student.is_fresh:
        raise WrongSetting("layer_decay", "is for pretrained weights: give --init, or leave it out")


# ------------------------------------------------------------------------------------ sections and flat names


class Place(NamedTuple):
    """Where a setting stands."""

    section: str | None
    name: str


def section_of(annotation: Any) -> type[Config] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Config) else None


def places(kind: type[Config]) -> dict[str, Place]:
    """Every setting of `kind` by its name; names are unique across sections."""
    found: dict[str, Place] = {}
    for name, info in kind.model_fields.items():
        section = section_of(info.annotation)
        inner = [Place(name, key) for key in section.model_fields] if section else [Place(None, name)]
        found.update({place.name: place for place in inner})
    return found


def nested(kind: type[Config], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings in their sections, as `kind` has them; the others with the defaults of their section in `kind`."""
    values: dict[str, Any] = kind().model_dump()
    for name, place in places(kind).items():
        if name in flat:
            (values if place.section is None else values[place.section])[name] = flat[name]
    if "loss" in values:  # what the distillation loss implies is filled in by its class
        implied = ("temperature", "label_weight", "teacher_weight", "distil")
        values["loss"].update({name: flat.get(name) for name in implied})
    return values


def dotted(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Settings in sections, or figures in groups, by dotted names: `{"loop": {"seed": 1}}` as `{"loop.seed": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = dotted(value) if isinstance(value, Mapping) else None
        flat |= {str(name): value} if inner is None else {f"{name}.{key}": one for key, one in inner.items()}
    return flat


def flattened(kind: type[Config], values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings in sections, as in a recipe or a run's config.yaml, flat. Raises UserError naming `source` and an unknown key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in kind.model_fields:
            raise UserError(f"{source}: {unknown_name('section', str(key), kind.model_fields)}")
        section = section_of(kind.model_fields[key].annotation)
        if section is None:
            found[key] = value
            continue
        if not isinstance(value, Mapping):
            raise UserError(f"{source}: {key}: expected settings such as 'name: value', found {brief(value)}")
        for name in value:
            if name not in section.model_fields:
                raise UserError(f"{source}: {unknown_name('configuration key', str(name), section.model_fields)}")
        found.update(value)
    return found


RENAMED = {
    "lr_per_256_images": "base_lr", "lr_start": "warmup_lr", "clip_norm": "max_grad_norm", "repeats": "repeated_aug", "tune": "trainable",
    "evaluation_crop": "crop_pct", "erase_probability": "random_erasing_prob", "mix_probability": "mixup_prob",
    "cutmix_probability": "mixup_switch_prob", "flip_probability": "flip_prob", "small_size": "low_res_size",
    "bad_image_limit": "max_bad_images", "validation_share": "val_fraction",
}  # fmt: skip
FIXED: dict[str, Collection[Any]] = {
    "betas": ([0.9, 0.999],), "crop_aspect": ([3 / 4, 4 / 3],), "erase_area": ([0.02, 1 / 3],), "interpolation": ("bicubic",),
    "low_res_fraction": (0.5, None), "small_share": (0.5, None), "head_share": (0.2,),
}  # fmt: skip
"""Settings of earlier versions, each with the value that it always has now."""
RANDAUGMENT = {
    "randaugment_magnitude": "m", "randaugment_operations": "n", "randaugment_magnitude_sd": "mstd", "randaugment_prob": "p",
    "randaugment_probability": "p",
}  # fmt: skip
"""Settings of earlier versions that are parts of `randaugment` now."""


def upgraded(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings as a run of an earlier version wrote them (in sections, one section, or flat), under today's names. Raises UserError where
    a loss is not there any more, or a setting had a value that it cannot have now."""
    new: dict[str, Any] = {}
    for key, value in values.items():
        name = RENAMED.get(str(key), key)
        if name in new:
            raise UserError(f"{source}: {name}: stands there twice, once under its old name")
        new[name] = upgraded(value, source) if isinstance(value, Mapping) and value is not values else value
    lengths = {name: new.pop(name) for name in LENGTHS if name in new}
    for name in ("budget_minutes", "steps", "epochs"):  # `epochs` stood there whatever the length was
        if lengths.get(name) is not None and "length" not in new:
            new["length"] = f"{lengths[name]}{LENGTHS[name]}"
    for name, share, amount, unit in (
        ("warmup", "warmup_share", "warmup_epochs", "ep"),
        ("min_lr", "lr_end_share", "lr_end", ""),
    ):
        percent, value = new.pop(share, None), new.pop(amount, None)
        if value is not None:
            new[name] = f"{value}{unit}" if unit else value
        elif percent is not None and name not in new:
            if isinstance(percent, bool) or not isinstance(percent, int | float):
                raise UserError(f"{source}: {share}: expected a number (got {brief(percent)})")
            new[name] = f"{100 * percent:.15g}%"
    if new.get("distillation") in ("dist", "dkd"):
        raise UserError(f"{source}: distillation: {new['distillation']!r} is not there any more: zscore was as good")
    if new.pop("reduction", "mean") == "deit" or new.pop("bce_reduction", "sum") == "mean":
        raise UserError(f"{source}: reduction: a mean over classes is a weight now: divide the weight by the classes")
    target, head = new.pop("distil_target", None), new.pop("distil_head", None)
    if target is not None or head is not None:
        new["distil"] = "labels" if target == "labels" else "cls" if head == "cls" else "token"
        if new.get("distillation") == "none" and new["distil"] != "labels":
            new["label_weight"] = None  # it stood there and was not used
    padding, size = new.get("crop_padding"), new.get("view_size")
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else ()
    sides = [side for side in sides if isinstance(side, int) and side > 0]
    if isinstance(padding, int) and padding > 0 and len(sides) == 2:  # pixels, up to version 0.1
        new["crop_padding"] = padding / min(sides)
    for name, values_now in FIXED.items():
        was = new.pop(name, next(iter(values_now)))
        if (list(was) if isinstance(was, tuple) else was) not in values_now:
            raise UserError(f"{source}: {name}: {brief(was)} cannot be chosen any more: it is {next(iter(values_now))}")
    _fold_randaugment(new, source)
    name, rule = str(new.get("student") or ""), new.pop("drop_path_rule", None)
    own = "constant" if name.startswith("deit3_") else "linear"
    if rule not in (None, own) and (new.get("drop_path") or not name):
        of = name or "all students but DeiT III's"
        raise UserError(f"{source}: drop_path_rule: {brief(rule)} cannot be chosen any more: it is {own} for {of}")
    if new.pop("fine_tune", False) and new.get("init") is None:
        new["init"] = REQUIRED
    for gone in ("dkd_beta", "answers", "teacher_slice", "teacher_chunk_size"):
        new.pop(gone, None)
    return new


def _fold_randaugment(settings: dict[str, Any], source: str) -> None:
    """`randaugment` in the place of the four settings that it was. Raises UserError."""
    old = {name: settings.pop(name) for name in RANDAUGMENT if name in settings}
    if not old:
        return
    preset = AUGMENT_PRESETS.get(str(settings.get("augment")))
    of_preset = None if preset is None else RandAugment().n if preset.randaugment else 0
    count = old.setdefault("randaugment_operations", of_preset)
    if count is None or "randaugment" in settings:
        raise UserError(
            f"{source}: {next(iter(old))}: is a part of randaugment now: write {RandAugment()}, with your numbers"
        )
    try:
        text = "-".join(["rand", *(f"{RANDAUGMENT[name]}{value}" for name, value in old.items())])
        settings["randaugment"] = str(parse_randaugment(text)) if count != 0 else None
    except ValueError as error:
        raise UserError(f"{source}: randaugment: {error}") from error


# ------------------------------------------------------------------------------------------- YAML and recipes

PACKAGED = Path(__file__).parent / "shipped_recipes"
IN_CHECKOUT = Path(__file__).parents[2] / "recipes"


def validated(kind: type[ConfigT], values: Mapping[str, Any], source: str) -> ConfigT:
    """`kind` made from plain values. Raises UserError that names `source`, key and value."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(kind, error)}") from error


def recipe_settings(kind: type[Config], path: Path) -> dict[str, Any]:
    """What a recipe, or a run's config.yaml, sets: flat, each value of its field's own type. Raises UserError naming the file."""
    flat = flattened(kind, upgraded(load_yaml(path), str(path)), str(path))
    defaults = kind().model_dump()
    for section_name, info in kind.model_fields.items():
        section = section_of(info.annotation)
        own = {name: flat[name] for name in section.model_fields if name in flat} if section else {}
        if section and own:  # YAML reads 1e-6 as text
            config = validated(section, {**defaults[section_name], **own}, f"{path}: {section_name}")
            flat.update({name: getattr(config, name) for name in own if own[name] is not None})
    return flat


def shipped() -> dict[str, Path]:
    """The files of the shipped recipes by name: of an installed package, or of a checkout."""
    folder = PACKAGED if PACKAGED.is_dir() else IN_CHECKOUT
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped one. Raises UserError."""
    if Path(name).suffix in (".yaml", ".yml") or "/" in name:
        return expanded(name)
    known = shipped()
    if name in known:
        return known[name]
    if not known:
        raise UserError(f"--recipe {name}: none is shipped: give the path of a YAML file")
    raise unknown_name("recipe", name, known)


def card(path: Path) -> list[str]:
    """The lines of the comment at the top of a recipe, without their `#`; the first one is its title."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return [line.removeprefix("#").removeprefix(" ") for line in lines]


def explain(kind: type[Config], error: ValidationError) -> str:
    """The first complaint of a pydantic error, as one line."""
    name, why = _first_complaint(kind, error, dotted=True)
    return f"{name}: {why}" if name else why


def _message(complaint: Any) -> str:
    message = str(complaint["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _first_complaint(kind: type[Config], error: ValidationError, *, dotted: bool = False) -> tuple[str, str]:
    """(setting, why) of the first thing that pydantic finds wrong. `dotted`: the setting with its section, `loop.seed`."""
    first = error.errors()[0]
    # Where a choice of types is allowed pydantic adds the one that it means, in brackets or by its name.
    parts = [str(part) for part in first["loc"] if "[" not in str(part) and str(part) not in ("float", "str", "int")]
    if first["type"] == "extra_forbidden":
        model: Any = kind
        for part in first["loc"][:-1]:
            field = getattr(model, "model_fields", {}).get(str(part))
            model = field.annotation if field else next((c for c in get_args(model) if c.__name__ in str(part)), model)
        return "", str(unknown_name("configuration key", str(first["loc"][-1]), model.model_fields))
    message = _message(first)
    why = f"{message} (got {brief(first['input'])})"
    of_a_section = not parts or section_of(getattr(kind.model_fields.get(parts[-1]), "annotation", None))
    if first["type"] == "value_error" and of_a_section:  # of several settings: the message begins with the name of one
        head, colon, rest = message.partition(": ")
        named = bool(colon) and head.isidentifier()
        parts, why = ([*parts, head], rest) if named else (parts if dotted else [], message)
    return ".".join(parts) if dotted else "".join(parts[:2][-1:]), why
