"""What an epoch's line of metrics.jsonl is made of."""

from __future__ import annotations

import time
from typing import Any, final

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from deitkit.distill.losses import TeacherOutput
from deitkit.distill.step import Plan, StepResult, gradient_ratio
from deitkit.distill.teacher import TeacherSource
from deitkit.views.mixup import Batch

RATIO_STEPS = 8
"""The ratio of the gradients is computed every so many steps: it takes 133 operations, a step of a small student 450."""


@final
class EpochLog:
    """Sums over the steps of an epoch, kept on the device: reading them is a synchronisation point."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
        self.ratio = torch.zeros(1, dtype=torch.float64, device=accelerator.device)
        self.steps = self.images = 0  # images: of all processes
        self.images_before = 0
        """of these, those of processes before this one"""
        self.waiting = self.teaching = 0.0
        self.has_teacher = self.has_features = False
        self.skipped = 0
        """steps without an update: their loss or gradient was infinite or NaN, in float16 perhaps only times the loss scale"""
        self.unreadable: set[int] = set()
        """positions of the images that this process could not read"""
        self._accelerator = accelerator

    def state(self) -> dict[str, Any]:
        """What a checkpoint within the epoch keeps, of all processes together."""
        sums = self._accelerator.reduce(torch.cat([self.sums, self.ratio]), "sum")
        facts = {"steps": self.steps, "images": self.images, "skipped": self.skipped}
        flags = {"has_teacher": self.has_teacher, "has_features": self.has_features}
        return {
            **facts,
            **flags,
            "sums": sums.tolist(),
            "unreadable": sorted(set(gather_object(list(self.unreadable)))),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises KeyError, TypeError, ValueError where that is not one."""
        if self._accelerator.is_main_process:
            *sums, ratio = state["sums"]
            self.sums += torch.tensor(sums, dtype=torch.float64, device=self.sums.device)
            self.ratio += ratio
            self.unreadable |= set(state["unreadable"])
        self.steps, self.images, self.skipped = state["steps"], state["images"], state["skipped"]
        self.images_before = self.images
        self.has_teacher, self.has_features = state["has_teacher"], state["has_features"]

    def timed(self, teacher: TeacherSource) -> TeacherSource:
        """`teacher`, with its seconds counted. On a GPU that is the launch only: nothing waits for the figure."""

        def output(batch: Batch) -> TeacherOutput | None:
            started = time.perf_counter()
            found = teacher(batch)
            self.teaching += time.perf_counter() - started
            return found

        return output

    def add(self, result: StepResult, plan: Plan, global_size: int) -> None:
        """`global_size`: images of this step over all processes; this process adds its share to every figure. A step that was skipped for
        a loss or gradient that is not finite adds its images alone."""
        self.images += global_size
        self.skipped += not result.finite
        if not (result.finite or result.overflowed):
            return
        agreed = torch.zeros_like(result.loss)
        self.has_features = result.feature_loss is not None
        if result.output is not None and plan.loss.distillation != "features":
            self.has_teacher = True
            agreed = (plan.distilled(result.heads).detach().argmax(-1) == result.output.labels_B).sum() / global_size
        if self.steps % RATIO_STEPS == 0:
            self.ratio += gradient_ratio(result, plan) * len(result.batch.labels_B) / global_size
        features = agreed.new_zeros(()) if result.feature_loss is None else result.feature_loss
        figures = (result.loss, result.label_loss, result.teacher_loss, agreed, features)
        self.sums += torch.stack([figure.detach() for figure in figures])
        self.steps += 1

    def row(self, seconds: float, second: str = "teacher") -> dict[str, Any]:
        """The epoch's line for the metrics; `second` is the name of the second loss term."""
        ratios = -(-self.steps // RATIO_STEPS)
        means = torch.cat([self.sums / max(1, self.steps), self.ratio / max(1, ratios)])
        total, label, other, agreed, features, ratio = self._accelerator.reduce(means, "sum").tolist()
        shares = torch.tensor([self.waiting, self.teaching], device=means.device) / max(seconds, 1e-9)
        waiting, teaching = self._accelerator.reduce(shares, "mean").tolist()
        return {
            "loss": {
                "total": total,
                "label": label,
                second: other,
                **({"features": features} if self.has_features else {}),
                "gradient_ratio": ratio,
            },
            "train_agreement": agreed if self.has_teacher else None,
            **({"skipped_steps": self.skipped} if self.skipped else {}),
            "clock": {
                "images_per_second": (self.images - self.images_before) / max(seconds, 1e-9),
                "waiting_share": waiting,
                "teacher_share": teaching,
            },
        }
