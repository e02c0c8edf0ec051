"""The settings of a run that is gone on with, held against those that it was begun with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deitkit.config import Config, JobT, RunConfig
from deitkit.errors import UserError
from deitkit.run import RunFolder

FREE_TO_CHANGE = {"workers", "processes", "location", "bad_image_limit"}
"""Settings that a resumed run may have otherwise: they do not change the result (that the images are the same is seen); of
`processes` that holds but for rounding, and, on a CPU, for batch normalisation, whose statistics are each process's own."""


def refuse_difference(stored: Config, given: Config, folder: RunFolder) -> None:
    """Raises UserError naming the first setting that differs from the run that is to be resumed."""
    for key, old, new in differences(stored, given):
        raise UserError(f"{folder.path}: was started with {key} = {old!r}, now it is {new!r}: resume it as it was")


def differences(stored: Config, given: Config) -> Iterator[tuple[str, Any, Any]]:
    """(setting, old, new) for every setting in which two configurations of a kind differ and that changes a result."""
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
    update: dict[str, Any] = {}
    if config.loop.precision == "auto":
        update["loop"] = config.loop.model_copy(update={"precision": before.loop.precision})
    if isinstance(config, RunConfig) and isinstance(before, RunConfig) and config.teacher.teacher_precision == "auto":
        formats = {"teacher_precision": before.teacher.teacher_precision}
        update["teacher"] = config.teacher.model_copy(update=formats)
    return config.model_copy(update=update)
