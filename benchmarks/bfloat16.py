"""A training step in bfloat16 against one in float32 on this processor, ours and timm's.

    python benchmarks/bfloat16.py [--rounds N]

One thread, one process, in turn, round by round; a step is forward, cross-entropy of both heads, backward and the optimizer's. What is
counted is processor time, which other jobs lengthen less than time on the wall; ratios are medians of each round's ratio. timm has no
student with a stem of convolutions: there ours stand alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from step import NETWORKS
from torch.nn import functional as F

from deitkit.cli import keep_freed_memory
from deitkit.config import OptimConfig
from deitkit.distill.optim import make_optimizer
from deitkit.models.vit import ViTConfig
from deitkit.models.zoo import STUDENTS

CASES: dict[str, tuple[ViTConfig, int]] = {
    "deit_pico": (STUDENTS["deit_pico"], 64),
    "deit_nano": (STUDENTS["deit_nano"], 64),
    "deit_micro": (STUDENTS["deit_micro"], 64),
    "deit_mini": (STUDENTS["deit_mini"], 64),
    "deit_photo, 96 px": (STUDENTS["deit_photo"].model_copy(update={"image_size": (96, 96)}), 32),
    "deit_tiny": (STUDENTS["deit_tiny"], 16),
}
"""Student and batch size."""


def step_of(kind: str, config: ViTConfig, batch_size: int, precision: str) -> Callable[[], None]:
    torch.manual_seed(0)
    network = NETWORKS[kind](config).train()
    optimizer = make_optimizer(network, OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    images = torch.rand(batch_size, config.channels, *config.image_size)
    labels = torch.randint(config.classes, (batch_size,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            cls, dist = network(images)
        (F.cross_entropy(cls.float(), labels) + F.cross_entropy(dist.float(), labels)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None]) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"timm {timm.__version__}, torch {torch.__version__}, one thread, n = {given.rounds}")
    print("| student, batch | whose | float32, ms | bfloat16, ms | ratio |\n| --- | --- | --- | --- | --- |")
    for name, (config, batch_size) in CASES.items():
        for kind in NETWORKS if config.stem == "patch" else ["deitkit"]:
            steps = {precision: step_of(kind, config, batch_size, precision) for precision in ("float32", "bfloat16")}
            found: dict[str, list[float]] = {precision: [] for precision in steps}
            for number in range(-2, given.rounds):  # two rounds to warm up
                for precision, step in steps.items():
                    taken = seconds(step)
                    if number >= 0:
                        found[precision].append(taken)
            ratio = statistics.median(b / a for a, b in zip(found["float32"], found["bfloat16"], strict=True))
            times = " | ".join(f"{1000 * statistics.median(taken):.0f}" for taken in found.values())
            print(f"| {name}, {batch_size} | {kind} | {times} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
