"""What is compared: a plan (shared settings, contenders, seeds, a baseline), its contenders on the data, the tapes they need.

A plan is read and checked without looking at an image; `resolved` fills in what depends on the data, before any training.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from deitkit.config import Config, DataConfig, LossConfig, Precision, RunConfig, Seed, TeacherConfig
from deitkit.data import Dataset
from deitkit.distill.encoding import OutputKind
from deitkit.distill.tape import NAMES_ONLY, is_tape, open_tape
from deitkit.lengths import length_in_steps
from deitkit.settings import LENGTHS, build, overlay, recipe_settings, spelled, upgraded, validated
from deitkit.terminal import Progress, UserError, brief, load_yaml, unknown_name
from deitkit.training.fit import automatic_fits, fit_key
from deitkit.training.run import differences
from deitkit.training.setup import load, resolve
from deitkit.views.loader import views_shown

PLAN_FILE = "plan.yaml"
"""In the folder of a comparison."""
TAPES = "tapes"
"""In the folder of a comparison: its tapes (cached teacher outputs)."""
DEFAULT_SEEDS = (0, 1, 2)
DEFAULT_LOSSES = ("hard", "zscore")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,59}")
ELSEWHERE = {
    "seed": "give `seeds` of the comparison instead",
    "location": "DATA names the images",
    "tape": "a comparison records its own tapes: name the teacher",
    "record": "a comparison records its own tapes: leave it out",
    "processes": "a comparison trains in one process: leave it out",
}
"""Settings of a run that a comparison decides itself."""
SHARED_ONLY = {"data_seed", "val_fraction"}
"""Settings that decide which images all contenders are measured on."""
MINUTES = "minutes are for the whole comparison: write budget_minutes beside `contenders`, or give --budget-minutes"

# -------------------------------------------------------------------------------------------------------- plans


class ComparisonPlan(Config):
    """Who is compared. Settings are flat: names as on the command line."""

    shared: dict[str, Any] = {}
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = DEFAULT_SEEDS
    """of initial weights, order and stochastic depth; views and splits are the same for all"""
    baseline: str
    """the contender that the others are compared with"""
    against: dict[str, str] = {}
    """contender: the one that it is compared with, if not the baseline"""
    budget_minutes: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """for the whole comparison"""
    ranked: bool = False
    """whether the question is which is best"""
    contenders: dict[str, dict[str, Any]]
    """name: the settings that differ from `shared`"""


def read_plan(path: Path) -> ComparisonPlan:
    """The plan in a YAML file. Raises UserError."""
    return plan_from(load_yaml(path), str(path))


def write_plan(plan: ComparisonPlan) -> str:
    """A plan as YAML that `read_plan` reads."""
    values = plan.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump({key: value for key, value in values.items() if value != {}}, sort_keys=False)


def plan_from(values: Mapping[str, Any], source: str) -> ComparisonPlan:
    """The plan that plain values stand for. Raises UserError naming `source` and what is wrong in it."""
    if unknown := [str(key) for key in values if key not in ComparisonPlan.model_fields]:
        raise UserError(f"{source}: {unknown_name('key', unknown[0], ComparisonPlan.model_fields)}")
    named = _named(values.get("contenders"), source)
    baseline = values.get("baseline")
    if baseline is None:
        raise UserError(f"{source}: baseline: name the contender that the others are compared with")
    if not isinstance(baseline, str) or baseline not in named:
        raise UserError(f"{source}: baseline: {unknown_name('contender', str(baseline), named)}")
    if len(named) < 2:
        raise UserError(f"{source}: contenders: {baseline!r} alone: there is nothing to compare it with")
    shared = plain_settings(values.get("shared") or {}, f"{source}: shared")
    contenders = {name: plain_settings(own, f"{source}: contender {name!r}") for name, own in named.items()}
    for name, key in ((name, key) for name, own in contenders.items() for key in own if key in SHARED_ONLY):
        raise UserError(f"{source}: contender {name!r}: {key}: all are measured on the same images: put it into shared")
    against = values.get("against") or {}
    if not isinstance(against, Mapping) or not all(isinstance(one, str) for pair in against.items() for one in pair):
        raise UserError(
            f"{source}: against: give names of contenders, such as 'zscore: hard' (quote yes, no and numbers)"
        )
    checked = {**values, "shared": shared, "contenders": contenders, "against": against}
    plan = validated(ComparisonPlan, checked, source)
    for name, other in plan.against.items():
        for one in (name, other):
            if one not in contenders:
                raise UserError(f"{source}: against: {unknown_name('contender', one, contenders)}")
        if name in (other, baseline):
            why = "is compared with itself" if name == other else "is the baseline"
            raise UserError(f"{source}: against: {name!r} {why}: leave it out")
    if len(set(plan.seeds)) < len(plan.seeds):
        raise UserError(f"{source}: seeds: duplicate seed: {brief(list(plan.seeds))}")
    lengths = [where for where, part in (("shared", shared), *contenders.items()) if "length" in part]
    if plan.budget_minutes is not None and lengths:
        raise UserError(
            f"{source}: {lengths[0]}: length: leave it out: budget_minutes gives all contenders the same steps"
        )
    return plan


def _named(contenders: Any, source: str) -> dict[str, Any]:
    """The contenders by name; one without settings of its own may be empty. Raises UserError."""
    if not isinstance(contenders, Mapping) or not contenders:
        raise UserError(f"{source}: contenders: give names, and below each the settings in which it differs")
    lower: set[str] = set()
    for name in contenders:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(
                f"{source}: contender {brief(name)}: a name has up to 60 letters, digits and . _ + -, and begins with a letter "
                f"or digit (quote yes, no and numbers)"
            )
        if name.lower() in lower:
            raise UserError(f"{source}: contender {name!r}: two names differ only in case: rename one")
        lower.add(name.lower())
    return {name: {} if own is None else own for name, own in contenders.items()}


def plain_settings(values: Any, source: str) -> dict[str, Any]:
    """Settings of runs as flat plain values with today's names, from flat ones or from sections as in a run's config.yaml.
    Raises UserError."""
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: expected settings such as 'epochs: 10', found {brief(values)}")
    if callable(values.get("distillation")) or values.get("distillation") == "callable":
        raise UserError(f"{source}: distillation: a comparison's runs are programs of their own: name a loss")
    flat: dict[Any, Any] = {}
    for key, value in values.items():
        sectioned = key in RunConfig.model_fields and isinstance(value, Mapping)
        for name, setting in value.items() if sectioned else [(key, value)]:
            if name in flat:
                raise UserError(f"{source}: {name}: duplicate setting")
            flat[name] = setting
    lengths = [name for name in ("length", *LENGTHS) if values.get(name) is not None]
    if len(lengths) > 1:
        raise UserError(f"{source}: {lengths[0]} excludes {lengths[1]}: give one length")
    try:
        flat = spelled(RunConfig, upgraded(json.loads(json.dumps(flat, default=str)), source))
    except (TypeError, ValueError, RecursionError) as error:  # also keys that are not text, a list that holds itself
        text = str(error)
        raise UserError(text if text.startswith(source) else f"{source}: {text}") from error
    for name, hint in ELSEWHERE.items():
        if flat.pop(name, None) is not None:
            raise UserError(f"{source}: {name}: {hint}")
    if str(flat.get("length", "")).endswith("min"):
        raise UserError(f"{source}: budget_minutes: {MINUTES}")
    return flat


def with_and_without(losses: Sequence[str] = DEFAULT_LOSSES) -> dict[str, Any]:
    """The default question: the student alone, and taught by the shared teacher with each of these losses."""
    taught = {name: {"distillation": name} for name in losses if name != "none"}
    return {"baseline": "none", "contenders": {"none": {"distillation": "none"}, **taught}}


def among_teachers(teachers: Sequence[str], loss: str | None = None) -> dict[str, Any]:
    """Which of `teachers` teaches the student best, by the default loss or another one? The student alone is the baseline."""
    by = {} if loss is None else {"distillation": loss}
    contenders: dict[str, Any] = {"none": {"distillation": "none"}}
    for teacher in teachers:
        name = short_name(teacher)
        alike = re.compile(rf"{re.escape(name)}(-teacher-\d+)?", re.IGNORECASE)
        count = sum(alike.fullmatch(known) is not None for known in contenders)
        contenders[f"{name}-teacher-{count + 1}" if count else name] = {"teacher": teacher, **by}
    return {"baseline": "none", "contenders": contenders, "ranked": True}


def short_name(teacher: str) -> str:
    """A teacher's name as the name of a folder: the last part of a path, a network without its file; of an ensemble, each."""
    parts = [Path(part.partition("@")[0]).name.rpartition(":")[2] for part in teacher.split("+")]
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", "+".join(parts)).strip("-._+")[:40] or "teacher"


def asked_for(
    out: Path,
    *,
    plan: str | Path | Mapping[str, Any] | None = None,
    choose_teacher: Sequence[str] = (),
    losses: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    budget_minutes: float | None = None,
    recipe: Path | None = None,
    resume: bool = False,
    settings: Mapping[str, Any],
) -> ComparisonPlan:
    """The plan that a command line, or a call, stands for: a `plan`, teachers to choose from, a teacher in `settings`, or the
    comparison in `out` that is to be resumed. `settings` go over what the plan shares, and that over the recipe. Raises UserError."""
    settings = plain_settings(settings, "settings")
    teachers = [one for names in choose_teacher for one in _listed(names)]
    if "" in teachers:
        raise UserError("--choose-teacher: an empty name: give names such as A B, or A,B")
    if "callable" in losses:
        raise UserError("--losses: a function of your own is for dk.train: a comparison's runs are programs")
    if plan is not None and (teachers or losses):
        raise UserError("--plan names the contenders: leave out --choose-teacher and --losses")
    if teachers and settings.get("teacher") is not None:
        raise UserError("--choose-teacher names the teachers: leave out --teacher")
    if teachers and len(losses) > 1:
        raise UserError("--choose-teacher compares teachers by one loss: name one --losses")
    source = "settings"
    if isinstance(plan, Mapping):
        values, source = dict(plan), "plan"
    elif teachers:
        values = among_teachers(teachers, *losses)
    elif plan is None and settings.get("teacher") is not None:
        values = with_and_without(losses or DEFAULT_LOSSES)
    elif plan is not None or (resume and (out / PLAN_FILE).is_file()):
        if losses:
            raise UserError("--losses: the comparison has them already: leave it out, or give --teacher as before")
        path = out / PLAN_FILE if plan is None else Path(plan)
        values, source = load_yaml(path), str(path)
    else:
        raise UserError(
            "what is to be compared? give --teacher T (with and without it), --choose-teacher A B, or --plan FILE"
        )
    shared = overlay(plain_settings(values.get("shared") or {}, f"{source}: shared"), settings)
    if recipe is not None:
        below = {name: one for name, one in recipe_settings(RunConfig, recipe).items() if name not in ELSEWHERE}
        shared = overlay(plain_settings(below, str(recipe)), shared)
    if seeds is not None:
        values["seeds"] = list(seeds)
    if budget_minutes is not None:
        values["budget_minutes"] = budget_minutes
        shared = {name: one for name, one in shared.items() if name != "length" or name in settings}
    return plan_from({**values, "shared": shared}, source)


def _listed(names: str) -> list[str]:
    """`A,B` as two names, unless there is a file or folder of that name: `NAME@a,b`, `a,b+c`."""
    parts = [part.partition("@")[2] or part for part in names.split("+")]
    whole = any("," in part and Path(part).exists() for part in parts)
    return [names] if whole else [name for name in names.split(",") if name] or [""]


def refuse_change(out: Path, before: ComparisonPlan, now: ComparisonPlan, *, frozen: bool) -> None:
    """Raises UserError naming the first thing in which a plan differs from the one that was started in `out`. Seeds and
    contenders may have been added; minutes may be others until they are `frozen` into steps."""
    hint = "resume it as it was, or give another --out"
    for what, old, new in (("seed", before.seeds, now.seeds), ("contender", before.contenders, now.contenders)):
        if gone := [one for one in old if one not in new]:
            raise UserError(f"{out}: was started with {what} {gone[0]!r}, now it is left out: {hint}")
    for key in ("baseline", "budget_minutes"):
        was, is_now = getattr(before, key), getattr(now, key)
        if was != is_now and (key == "baseline" or frozen or None in (was, is_now)):
            raise UserError(f"{out}: was started with {key} = {was!r}, now it is {is_now!r}: {hint}")
    for name in before.contenders:
        pairs = differences(
            contender_config(before, name), contender_config(now, name).changed(loop={"seed": before.seeds[0]})
        )
        for setting, was, is_now in pairs:
            if setting != "loop.precision":  # that is compared with the runs themselves
                raise UserError(
                    f"{out}: contender {name!r} was started with {setting} = {was!r}, now it is {is_now!r}: {hint}"
                )


# --------------------------------------------------------------------------------------------------- contenders


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One of those that are compared, on the data."""

    name: str
    config: RunConfig
    """complete, with the first seed and its teacher's name"""
    dataset: Dataset
    automatic: RunConfig | None
    """the settings that `auto` fits a teacher by, if that is its teacher: the same for all contenders on the same images"""

    @cached_property
    def names_hash(self) -> dict[str, Any]:
        """What its images are known by."""
        return self.dataset.names_hash()

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.dataset.open_split("train")) // self.config.loop.batch_size)

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return max(1, length_in_steps(self.config.loop.length, self.steps_per_epoch))

    @property
    def views(self) -> int:
        """Different views of an image that a run shows."""
        return views_shown(self.steps, self.steps_per_epoch, self.config.view)

    def with_steps(self, steps: int) -> Contender:
        return replace(self, config=self.config.changed(loop={"length": f"{steps}st"}))

    def run_config(self, seed: int, tape: Path | None) -> RunConfig:
        """What `deit train` would be given for the run with this seed."""
        config = self.config.changed(loop={"seed": seed})
        if tape is None:
            return config
        teacher = {"teacher": None, "teacher_size": None, "tape": str(tape)}
        return config.changed(view={"views": self.views}, teacher=teacher)


def contender_config(plan: ComparisonPlan, name: str) -> RunConfig:
    """The run of a contender, with the first seed: its own settings over the shared ones. Raises UserError naming it."""
    own, shared = plan.contenders[name], plan.shared
    if overlay(shared, own).get("teacher") is None:
        shared = {key: value for key, value in shared.items() if key not in ("teacher_size", "unlabelled")}
    config = build(RunConfig, own, lower=shared, name_of=(f"contender {name!r}: " + "{}").format)
    if config.loop.shrink_batch:
        raise UserError(
            "batch_size: auto is for single trainings, for the runs of a comparison need the same one: give a number"
        )
    return config.changed(loop={"seed": plan.seeds[0]})


def resolved(plan: ComparisonPlan, location: str, progress: Progress, precision: Precision = "auto") -> list[Contender]:
    """Every contender of `plan` on the images at `location`; `precision` replaces `auto`. Raises UserError naming a contender
    that cannot be trained."""
    configs = {name: contender_config(plan, name) for name in plan.contenders}
    about_teachers = {*TeacherConfig.model_fields, *LossConfig.model_fields, "unlabelled"}
    alone = {name: value for name, value in plan.shared.items() if name not in about_teachers}
    datasets: dict[str, Dataset] = {}

    def opened(data: DataConfig) -> Dataset:
        key = data.model_dump_json()
        if key not in datasets:
            datasets[key] = load(location, data, progress)
        return datasets[key]

    contenders = []
    for name, config in configs.items():
        if config.loop.precision == "auto":
            config = config.changed(loop={"precision": precision})
        try:
            dataset, automatic = opened(config.data), None
            if config.teacher.teacher == "auto":
                labelled = config.data.model_copy(update={"unlabelled": False})
                base = build(RunConfig, alone, resume=True).model_copy(update={"data": labelled})
                teacher = TeacherConfig(teacher="auto", teacher_size=config.teacher.teacher_size)
                automatic = resolve(base, dataset, location).model_copy(update={"teacher": teacher})
            config = without_unasked_features(resolve(config, dataset, location))
        except UserError as error:
            raise UserError(f"contender {name!r}: {error}") from error
        contenders.append(Contender(name=name, config=config, dataset=dataset, automatic=automatic))
    known: dict[str, str] = {}
    for contender in contenders:
        other = known.setdefault(contender.config.model_dump_json(exclude={"view": {"augment"}}), contender.name)
        if other != contender.name:
            raise UserError(
                f"contenders {other!r} and {contender.name!r} have the same settings: leave one of them out"
            )
    return contenders


# -------------------------------------------------------------------------------------------------------- tapes


@dataclass(frozen=True, kw_only=True)
class TapeNeed:
    """A tape that contenders learn from: one for all that show the same views to the same teacher, whatever their loss or seed."""

    path: Path
    members: tuple[Contender, ...]
    outputs: OutputKind

    @property
    def source(self) -> str:
        """What its name tells of teacher, views and images, not of the kind of outputs."""
        return self.path.name.removesuffix("-features").rpartition("-")[0]

    @property
    def views(self) -> int:
        """As many as the longest run shows."""
        return max(member.views for member in self.members)

    @property
    def complete(self) -> bool:
        return complete_views(self.path) >= self.views


def tape_needs(contenders: Sequence[Contender], folder: Path) -> list[TapeNeed]:
    """The tapes in `folder` that `contenders` learn from, each with all logits if one of them needs those."""
    groups: dict[str, list[Contender]] = {}
    for contender in contenders:
        if contender.config.teacher.present:
            groups.setdefault(_key(contender), []).append(contender)
    needs = []
    for key, members in groups.items():
        outputs: OutputKind = "all" if any(one.config.loss.needs_logits for one in members) else "hard"
        features = "-features" if any(one.config.loss.feature_weight for one in members) else ""
        name = f"{short_name(str(members[0].config.teacher.teacher))}-{key}-{outputs}{features}"
        needs.append(TapeNeed(path=folder / name, members=tuple(members), outputs=outputs))
    return needs


def without_unasked_features(config: RunConfig) -> RunConfig:
    """Contenders differ in what is named alone: a teacher's features are learned where `feature_weight` says so."""
    return config.changed(loss={"feature_weight": config.loss.feature_weight or 0.0})


def _key(contender: Contender) -> str:
    """A hash of all that a tape depends on except its length and the kind of its outputs."""
    config, dataset = contender.config, contender.dataset
    what = {
        "teacher": config.teacher.model_dump(),
        "fit": None if contender.automatic is None else [*map(fit_key, automatic_fits(dataset, contender.automatic))],
        "view": config.view.model_dump(exclude=NAMES_ONLY),
        "data": config.data.split_settings(),
        "names_hash": contender.names_hash,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


def complete_views(path: Path) -> int:
    """Complete views of a tape; 0 if there is no tape."""
    if not is_tape(path):
        return 0
    with closing(open_tape(path)) as tape:
        return tape.complete_views()
