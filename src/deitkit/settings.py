"""Configurations from plain values and YAML files, and back; what is wrong with them in one line."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from deitkit.config import AUGMENT_PRESETS, FINE_TUNING, FROM_SCRATCH, Config, ConfigT, FitConfig, RunConfig
from deitkit.errors import UserError, brief, shortened, unknown_name

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
    if kind is RunConfig and _fine_tuned({**flat(changes), **flat(given)}):
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


def _fine_tuned(settings: Mapping[str, Any]) -> bool:
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
    if "small_share" in given and config.student.small_size is None:
        return "small_share", "of the steps at which size? give --small-size, or leave it out"
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
