"""What is compared with what: settings that all share, contenders that differ from them, seeds, a baseline.

Plain values in, checked settings out; no image is read here.

The contenders held against the data: every setting filled in and checked before anything is trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from deitkit.config import Config, DataConfig, LossConfig, Precision, RunConfig, Seed, TeacherConfig, length_in_steps
from deitkit.data import Dataset
from deitkit.settings import (
    WrongSetting,
    build,
    flattened,
    load_yaml,
    overlay,
    recipe_settings,
    spelled,
    upgraded,
    validated,
)
from deitkit.terminal import Progress, UserError, brief, shortened, unknown_name
from deitkit.training.run import differences
from deitkit.training.setup import load, resolve, with_teacher
from deitkit.views.loader import views_shown

PLAN_FILE = "plan.yaml"
"""In the folder of a comparison."""
DEFAULT_SEEDS = (0, 1, 2)
DEFAULT_LOSSES = ("hard", "zscore")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,59}")
ELSEWHERE = {
    "seed": "`seeds` of the comparison says which",
    "location": "DATA says where the images are",
    "tape": "a comparison records its own tapes: name the teacher",
    "record": "a comparison records its own tapes: leave it out",
    "processes": "a comparison trains in one process: leave it out",
}
"""Settings of a run that a comparison sees to itself."""
SHARED_ONLY = {"data_seed", "val_fraction"}
"""Settings that decide which images everybody is measured on."""
MINUTES = "minutes are for the whole comparison: write budget_minutes beside `contenders`, or give --budget-minutes"


class ComparisonPlan(Config):
    """Who is compared. Settings are flat: names as on the command line."""

    baseline: str
    """the contender that the others are compared with"""
    contenders: dict[str, dict[str, Any]]
    """name: the settings that differ from `shared`"""
    shared: dict[str, Any] = {}
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = DEFAULT_SEEDS
    """of initial weights, order and stochastic depth; views and splits are the same for all"""
    budget_minutes: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """for the whole comparison"""
    against: dict[str, str] = {}
    """contender: the one that it is compared with, where that is not the baseline"""
    ranked: bool = False
    """whether the question is which is best"""


def read_plan(path: Path) -> ComparisonPlan:
    """The plan in a YAML file. Raises UserError."""
    return plan_from(load_yaml(path), str(path))


def write_plan(plan: ComparisonPlan) -> str:
    """A plan as YAML that `read_plan` reads."""
    values = plan.model_dump(mode="json", exclude_none=True)
    order = ("shared", "seeds", "baseline", "against", "budget_minutes", "ranked", "contenders")
    return yaml.safe_dump({key: values[key] for key in order if values.get(key) not in (None, {})}, sort_keys=False)


def plan_from(values: Mapping[str, Any], source: str) -> ComparisonPlan:
    """The plan that plain values stand for. Raises UserError naming `source` and what is wrong in it."""
    for key in values:
        if key not in ComparisonPlan.model_fields:
            raise UserError(f"{source}: {unknown_name('key', str(key), ComparisonPlan.model_fields)}")
    contenders = _named(values.get("contenders"), source)
    baseline = values.get("baseline")
    if baseline is None:
        raise UserError(f"{source}: baseline: say which contender the others are compared with")
    if not isinstance(baseline, str) or baseline not in contenders:
        raise UserError(f"{source}: baseline: {unknown_name('contender', str(baseline), contenders)}")
    if len(contenders) < 2:
        raise UserError(f"{source}: contenders: {baseline!r} alone: there is nothing to compare it with")
    settings = {
        "shared": plain_settings(values.get("shared") or {}, f"{source}: shared"),
        "contenders": {name: plain_settings(own, f"{source}: contender {name!r}") for name, own in contenders.items()},
    }
    for name, own in settings["contenders"].items():
        for key in sorted(SHARED_ONLY & set(own)):
            raise UserError(
                f"{source}: contender {name!r}: {key}: all are measured on the same images: put it into shared"
            )
    against = values.get("against") or {}
    if not isinstance(against, Mapping) or not all(isinstance(one, str) for pair in against.items() for one in pair):
        raise UserError(
            f"{source}: against: give names of contenders, such as 'zscore: hard' (in quotes where YAML would read them otherwise)"
        )
    plan = validated(ComparisonPlan, {**values, **settings, "against": against}, source)
    for name, other in plan.against.items():
        for one in (name, other):
            if one not in plan.contenders:
                raise UserError(f"{source}: against: {unknown_name('contender', one, plan.contenders)}")
        if name in (other, plan.baseline):
            why = "with itself" if name == other else "with another, but it is the baseline"
            raise UserError(f"{source}: against: {name!r} is compared {why}: leave it out")
    if len(set(plan.seeds)) < len(plan.seeds):
        raise UserError(f"{source}: seeds: one stands there twice: {brief(list(plan.seeds))}")
    if plan.budget_minutes is not None:
        for where, part in (("shared", plan.shared), *plan.contenders.items()):
            if "length" in part:
                raise UserError(
                    f"{source}: {where}: length: with minutes for the whole comparison all make the same steps"
                )
    return plan


def plain_settings(values: Any, source: str) -> dict[str, Any]:
    """Flat settings, from such or from sections as in a run's config.yaml. Raises UserError."""
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: expected settings such as 'epochs: 10', found {brief(values)}")
    found: dict[str, Any] = {}
    for key, value in upgraded(values, source).items():
        sectioned = key in RunConfig.model_fields and isinstance(value, Mapping)
        for name, setting in (flattened(RunConfig, {key: value}, source) if sectioned else {key: value}).items():
            if name in ELSEWHERE and setting is not None:
                raise UserError(f"{source}: {name}: {ELSEWHERE[name]}")
            if name in found:
                raise UserError(f"{source}: {name}: duplicate setting")
            if name not in ELSEWHERE:
                found[name] = setting
    try:
        found = spelled(RunConfig, found)
    except WrongSetting as error:
        raise UserError(f"{source}: {error}") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if str(found.get("length", "")).endswith("min"):
        raise UserError(f"{source}: budget_minutes: {MINUTES}")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    except (TypeError, ValueError, RecursionError) as error:  # keys that are no text, a list that holds itself
        raise UserError(f"{source}: {shortened(str(error))}") from error
    return plain


def with_and_without(shared: Mapping[str, Any], losses: Sequence[str] = DEFAULT_LOSSES) -> dict[str, Any]:
    """The default question: the student alone, and taught by the teacher of `shared`, with each of these losses."""
    taught = {name: {"distillation": name} for name in losses if name != "none"}
    return {"shared": dict(shared), "baseline": "none", "contenders": {"none": {"distillation": "none"}, **taught}}


def among_teachers(shared: Mapping[str, Any], teachers: Sequence[str], loss: str | None = None) -> dict[str, Any]:
    """The student alone, and taught by each of `teachers`, with the default loss or another one: which teaches it best?"""
    by = {} if loss is None else {"distillation": loss}
    contenders: dict[str, Any] = {"none": {"distillation": "none"}}
    for teacher in teachers:
        name = short_name(teacher)
        alike = re.compile(rf"{re.escape(name)}(-teacher-\d+)?", re.IGNORECASE)
        count = sum(alike.fullmatch(known) is not None for known in contenders)
        contenders[f"{name}-teacher-{count + 1}" if count else name] = {"teacher": teacher, **by}
    return {"shared": dict(shared), "baseline": "none", "contenders": contenders, "ranked": True}


def short_name(teacher: str) -> str:
    """A teacher's name as the name of a folder: the last part of a path, a network without its file; of several that are
    averaged, each."""
    parts = [Path(part.partition("@")[0]).name.rpartition(":")[2] for part in teacher.split("+")]
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", "+".join(parts)).strip("-._+")[:40] or "teacher"


def contender_config(plan: ComparisonPlan, name: str) -> RunConfig:
    """The run of a contender, with the first seed: its own settings over those that all share. Raises UserError naming it."""
    own = plan.contenders[name]
    shared = plan.shared
    if overlay(shared, own).get("teacher") is None:
        shared = {key: value for key, value in shared.items() if key not in ("teacher_size", "unlabelled", "distil")}
    config = build(RunConfig, own, lower=shared, resume=True, name_of=(f"contender {name!r}: " + "{}").format)
    return with_seed(config, plan.seeds[0])


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    return config.model_copy(update={"loop": config.loop.model_copy(update={"seed": seed})})


def untaught(shared: Mapping[str, Any]) -> RunConfig:
    """The shared settings without anything about teachers. Raises UserError."""
    about_teachers = {*TeacherConfig.model_fields, *LossConfig.model_fields, "unlabelled"}
    return build(RunConfig, {key: value for key, value in shared.items() if key not in about_teachers}, resume=True)


def asked_for(
    out: Path,
    *,
    plan: str | Path | Mapping[str, Any] | None,
    choose_teacher: Sequence[str],
    losses: Sequence[str],
    seeds: Sequence[int] | None,
    budget_minutes: float | None,
    recipe: Path | None,
    resume: bool,
    settings: Mapping[str, Any],
) -> ComparisonPlan:
    """The plan that a command line, or a call, stands for: a `plan`, teachers to choose from, a teacher of `settings`, or
    the comparison in `out` that is to be resumed; over what it shares lie `settings`. Raises UserError."""
    settings = plain_settings(settings, "settings")
    choose_teacher = [one for names in choose_teacher for one in _listed(names)]
    if "" in choose_teacher:
        raise UserError("--choose-teacher: an empty name: give names such as A B, or A,B")
    if plan is not None and (choose_teacher or losses):
        raise UserError("--plan says who is compared: leave out --choose-teacher and --losses")
    if choose_teacher and settings.get("teacher") is not None:
        raise UserError("--choose-teacher names the teachers: leave out --teacher")
    if len(losses) > 1 and choose_teacher:
        raise UserError("--choose-teacher compares teachers by one loss: name one --losses")
    source = "settings"
    if isinstance(plan, Mapping):
        values, source = dict(plan), "plan"
    elif plan is not None:
        values, source = load_yaml(Path(plan)), str(plan)
    elif choose_teacher:
        values = among_teachers({}, choose_teacher, *losses)
    elif settings.get("teacher") is not None:
        values = with_and_without({}, losses or DEFAULT_LOSSES)
    elif resume and (out / PLAN_FILE).is_file():
        if losses:
            raise UserError(
                "--losses: the comparison that is resumed says which: leave it out, or give --teacher as it was"
            )
        values, source = load_yaml(out / PLAN_FILE), str(out / PLAN_FILE)
    else:
        raise UserError(
            "what is to be compared? give --teacher T (with and without it), --choose-teacher A B, or --plan FILE"
        )
    shared = overlay(plain_settings(values.get("shared") or {}, f"{source}: shared"), settings)
    values = {**values, "shared": shared if recipe is None else overlay(_shared_of(recipe), shared)}
    if seeds is not None:
        values["seeds"] = list(seeds)
    if budget_minutes is not None:
        values["budget_minutes"] = budget_minutes
        values["shared"] = {key: value for key, value in values["shared"].items() if key != "length" or key in settings}
    return plan_from(values, source)


def _listed(names: str) -> list[str]:
    """`A,B` as two names, unless there is a file or folder of that name: `NAME@a,b`, `a,b+c`."""
    parts = [part.partition("@")[2] or part for part in names.split("+")]
    whole = any("," in part and Path(part).exists() for part in parts)
    return [names] if whole else [name for name in names.split(",") if name] or [""]


def _shared_of(recipe: Path) -> dict[str, Any]:
    """What a recipe, or a run's config.yaml, says of every run: neither its seed nor its images nor its tape. Raises UserError."""
    flat = recipe_settings(RunConfig, recipe)
    return plain_settings({name: value for name, value in flat.items() if name not in ELSEWHERE}, str(recipe))


def refuse_change(out: Path, before: ComparisonPlan, now: ComparisonPlan, *, frozen: bool) -> None:
    """Raises UserError naming the first thing in which a plan differs from the one that was begun in `out`. Seeds and
    contenders may have been added; minutes may be others until they are `frozen` into steps."""
    as_it_was = "go on with it as it was, or give another --out"
    for what, old, new in (("seed", before.seeds, now.seeds), ("contender", before.contenders, now.contenders)):
        if gone := [one for one in old if one not in new]:
            raise UserError(f"{out}: was started with {what} {gone[0]!r}, now it is left out: {as_it_was}")
    for key in ("baseline", "budget_minutes"):
        was, is_now = getattr(before, key), getattr(now, key)
        if was != is_now and (key == "baseline" or frozen or None in (was, is_now)):
            raise UserError(f"{out}: was started with {key} = {was!r}, now it is {is_now!r}: {as_it_was}")
    for name in before.contenders:
        pairs = differences(contender_config(before, name), with_seed(contender_config(now, name), before.seeds[0]))
        for setting, was, is_now in pairs:
            if setting == "loop.precision":  # held against the runs themselves
                continue
            raise UserError(
                f"{out}: contender {name!r} was started with {setting} = {was!r}, now it is {is_now!r}: {as_it_was}"
            )


def _named(contenders: Any, source: str) -> dict[str, Any]:
    """The contenders by name; one without settings of its own may stand there empty. Raises UserError."""
    if not isinstance(contenders, Mapping) or not contenders:
        raise UserError(f"{source}: contenders: give names, and under each the settings in which it differs")
    lower: set[str] = set()
    for name in contenders:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(
                f"{source}: contender {brief(name)}: a name is made of letters, digits and . _ + -, begins with a letter or "
                f"digit, and has at most 60 of them (in quotes where YAML would read it otherwise)"
            )
        if name.lower() in lower:
            raise UserError(
                f"{source}: contender {name!r}: two names that differ in capitals alone: call one otherwise"
            )
        lower.add(name.lower())
    return {name: {} if own is None else own for name, own in contenders.items()}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One of those that are compared."""

    name: str
    config: RunConfig
    """filled in, with the first seed and its teacher's name"""
    dataset: Dataset
    automatic: RunConfig | None
    """the settings that `auto` fits a teacher by, where that is its teacher: the same for all contenders on the same images"""

    @cached_property
    def names_hash(self) -> dict[str, Any]:
        """What to know its images by."""
        return self.dataset.names_hash()

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.dataset.open_split("train")) // self.config.loop.batch_size)

    def steps(self, frozen: int | None) -> int:
        """Steps of a run; `frozen`: what a budget came to."""
        loop = self.config.loop
        return frozen or length_in_steps(loop.length, self.steps_per_epoch)

    def views(self, frozen: int | None) -> int:
        """Different views of an image that a run shows."""
        return views_shown(self.steps(frozen), self.steps_per_epoch, self.config.view)

    def run_config(self, seed: int, frozen: int | None, tape: Path | None) -> RunConfig:
        """What `deit train` would be given for the run with this seed."""
        config = with_seed(self.config, seed)
        if frozen is not None:
            config = config.model_copy(update={"loop": config.loop.model_copy(update={"length": f"{frozen}st"})})
        if tape is None:
            return config
        views = config.view.model_copy(update={"views": self.views(frozen)})
        config = config.model_copy(update={"view": views})
        return with_teacher(config, teacher=None, teacher_size=None, tape=str(tape))


def resolved(plan: ComparisonPlan, location: str, progress: Progress, precision: Precision = "auto") -> list[Contender]:
    """Every contender of `plan` on the images at `location`; `precision` is what `auto` stands for. Raises UserError naming a
    contender that cannot be."""
    configs = {name: _in_format(contender_config(plan, name), precision) for name in plan.contenders}
    datasets: dict[str, Dataset] = {}

    def opened(data: DataConfig) -> Dataset:
        key = data.model_dump_json()
        if key not in datasets:
            datasets[key] = load(location, data, progress)
        return datasets[key]

    contenders = []
    for name, config in configs.items():
        try:
            dataset = opened(config.data)
            automatic = None
            if config.teacher.teacher == "auto":
                labelled = config.data.model_copy(update={"unlabelled": False})
                base = untaught(plan.shared).model_copy(update={"data": labelled})
                teacher = TeacherConfig(teacher="auto", teacher_size=config.teacher.teacher_size)
                automatic = resolve(base, dataset, location).model_copy(update={"teacher": teacher})
            contenders.append(
                Contender(name=name, config=resolve(config, dataset, location), dataset=dataset, automatic=automatic)
            )
        except UserError as error:
            raise UserError(f"contender {name!r}: {error}") from error
    _refuse_twins(contenders)
    return contenders


def _in_format(config: RunConfig, precision: Precision) -> RunConfig:
    """`config` with a number format in the place of `auto`."""
    if config.loop.precision != "auto":
        return config
    return config.model_copy(update={"loop": config.loop.model_copy(update={"precision": precision})})


def _refuse_twins(contenders: list[Contender]) -> None:
    """Raises UserError where two contenders would be the same run, bit for bit."""
    known: dict[str, str] = {}
    for contender in contenders:
        settings = contender.config.model_dump_json(exclude={"view": {"augment"}})
        if settings in known:
            raise UserError(
                f"contenders {known[settings]!r} and {contender.name!r} have the same settings: leave out one of them, or "
                f"say in what they differ"
            )
        known[settings] = contender.name
