"""The settings of a run that is gone on with, held against those that it was begun with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deitkit.config import Config, ConfigT, FitConfig, JobT, Precision, RunConfig
from deitkit.device import default_device, settled
from deitkit.errors import UserError
from deitkit.resolve import completed
from deitkit.run import RunFolder

FREE_TO_CHANGE = {"workers", "processes", "location", "bad_image_limit"}
"""Settings that a resumed run may have otherwise: they do not change the result (that the images are the same is seen)."""


def refuse_difference(stored: Config, given: Config, folder: RunFolder) -> None:
    """Raises UserError naming the first setting that differs from the run that is to be resumed."""
    for key, old, new in differences(stored, given):
        raise UserError(f"{folder.path}: was started with {key} = {old!r}, now it is {new!r}: resume it as it was")


def differences(stored: Config, given: Config) -> Iterator[tuple[str, Any, Any]]:
    """(setting, old, new) for every setting in which two configurations of a kind differ and that changes a result."""
    stored, given = (with_old_precision(_with_whole_loss(config)) for config in (stored, given))
    for section, was in stored.model_dump().items():
        now = given.model_dump()[section]
        pairs = (
            [(f"{section}.{key}", was[key], now[key]) for key in was]
            if isinstance(was, dict)
            else [(section, was, now)]
        )
        for key, old, new in pairs:
            if old != new and key.rsplit(".", 1)[-1] not in FREE_TO_CHANGE:
                yield key, old, new


def as_begun(config: JobT, before: JobT | None) -> JobT:
    """`config` in the number formats that its run was begun in, where it says `auto`."""
    if before is None:
        return config
    before = with_old_precision(before)
    teachers = before.teacher.teacher_precision if isinstance(before, RunConfig) else "auto"
    return _with_formats(config, before.loop.precision, teachers)


def _with_formats(config: ConfigT, students: Precision, teachers: Precision) -> ConfigT:
    """`config` with these number formats in the place of `auto`."""
    update: dict[str, Any] = {}
    if isinstance(config, RunConfig | FitConfig) and config.loop.precision == "auto":
        update["loop"] = config.loop.model_copy(update={"precision": students})
    if isinstance(config, RunConfig) and config.teacher.teacher_precision == "auto":
        update["teacher"] = config.teacher.model_copy(update={"teacher_precision": teachers})
    return config.model_copy(update=update)


def with_old_precision(config: ConfigT) -> ConfigT:
    """A run of an earlier version wrote down `auto`: bfloat16 on a GPU that has it, else float32."""
    device = default_device()
    old = settled("auto", device) if device.type == "cuda" else "float32"
    return _with_formats(config, old, old)


def _with_whole_loss(config: Config) -> Config:
    """A run of an earlier version wrote down a temperature also where nothing is softened, and a weight of no loss."""
    if not isinstance(config, RunConfig) or config.loss.distillation is None:
        return config
    return config.model_copy(update={"loss": completed(config.loss, config.loss.distillation)})
