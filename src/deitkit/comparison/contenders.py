"""The contenders held against the data: every setting filled in and checked before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deitkit.comparison.plan import ComparisonPlan, contender_config, untaught, with_seed
from deitkit.config import DataConfig, Precision, RunConfig, TeacherConfig
from deitkit.data import Dataset
from deitkit.errors import UserError
from deitkit.feed import views_shown
from deitkit.progress import Progress
from deitkit.resolve import load, resolve, with_teacher


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
    def outline(self) -> dict[str, Any]:
        """What to know its images by."""
        return self.dataset.outline()

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.dataset.open_split("train")) // self.config.loop.batch_size)

    def steps(self, frozen: int | None) -> int:
        """Steps of a run; `frozen`: what a budget came to."""
        loop = self.config.loop
        return frozen or loop.steps or loop.epochs * self.steps_per_epoch

    def views(self, frozen: int | None) -> int:
        """Different views of an image that a run shows."""
        return views_shown(self.steps(frozen), self.steps_per_epoch, self.config.view)

    def run_config(self, seed: int, frozen: int | None, tape: Path | None) -> RunConfig:
        """What `deit train` would be given for the run with this seed."""
        config = with_seed(self.config, seed)
        if frozen is not None:
            config = config.model_copy(update={"loop": config.loop.model_copy(update={"steps": frozen})})
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
