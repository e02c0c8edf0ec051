"""deitkit: train small vision transformers from few images, by knowledge distillation (DeiT).

`import deitkit as dk`, then `dk.train(...)`, `dk.load(run).predict(images)`. Nothing heavy is imported until it is used.

The layers, the highest first; a module imports from lower ones only. A reader starts at `distill.step`.

    cli, verbs, api    the command, its verbs, the functions of `dk`
    flags              settings as flags
    comparison         many runs, paired by seed
    deploy, inspect    a finished run for other programs; what it has learned
    training           one run
    distill            the method: step, losses, teacher, tape
    models             networks and their weights
    views              what networks see
    data               images and labels
    settings, config, lengths, pages, randaugment, rng, terminal, waiting
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"
__all__ = ["Run", "UserError", "compare", "evaluate", "export", "fit_teacher", "load", "teacher_from_callable", "train"]

if TYPE_CHECKING:
    from deitkit.api import Run, compare, evaluate, export, fit_teacher, load, teacher_from_callable, train
    from deitkit.terminal import UserError


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'deitkit' has no attribute {name!r}")
    if name == "UserError":
        from deitkit.terminal import UserError

        return UserError
    from deitkit import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
