"""How large should the random weights of a narrow student be, and does it matter what attention looks like at the start?

    python benchmarks/initial_weights.py DATA [--recipe FILE] [--train-images N] [--epochs 40] [--seeds 3] [--teacher T]
                                         [--starts NAME...]

Students with the same seeds begin with fresh weights of these kinds; the means of their validation accuracies are printed. The test split
is not opened. Without a recipe the student is that of `deit demo`.

paper           truncated normals of std 0.02, as `--init scratch`
mimetic         the same, with attention as `--init mimetic` has it
large           the same, with attention weights as large as mimetic ones, but random
inputs          all linear maps of the blocks of std 1 / sqrt(inputs)
attention only  those of attention alone
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from deitkit.api import train
from deitkit.comparison.demo import SHARED, STUDENT
from deitkit.models import vit as networks
from deitkit.models.vit import ViT
from deitkit.training.tables import fused_or_only


@torch.no_grad()
def by_inputs(vit: ViT, seed: int, *, attention_only: bool = False) -> None:
    """Truncated normals of std 1 / sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    for block in vit.blocks:
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear) and (name.startswith("attn") or not attention_only):
                std = layer.in_features**-0.5
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator)


@torch.no_grad()
def large(vit: ViT, seed: int) -> None:
    """Attention whose products are as large as mimetic ones, without an identity."""
    near_identity = networks._near_identity

    def random(share: float, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with patch.object(torch, "eye", lambda size: torch.zeros(size, size)):
            return near_identity(share * 2**0.5, *given)

    with patch.object(networks, "_near_identity", random):
        networks.mimic_trained_attention(vit, seed)


STARTS: dict[str, Callable[[ViT, int], None] | None] = {
    "paper": None,
    "mimetic": networks.mimic_trained_attention,
    "large": large,
    "inputs": by_inputs,
    "attention only": partial(by_inputs, attention_only=True),
}


def accuracy(data: str, out: Path, start: Callable[[ViT, int], None] | None, **settings: Any) -> float:
    """Validation accuracy of a student whose fresh weights `start` changes, in percent."""
    usual = networks.initialise

    def initialise(vit: ViT, seed: int) -> None:
        usual(vit, seed)
        if start is not None:
            start(vit, seed)

    with patch.object(networks, "initialise", initialise):
        run = train(data, out=out, init="scratch", **settings)
    return 100 * fused_or_only(run.summary["top1"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--recipe")
    parser.add_argument("--train-images", type=int)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher")
    parser.add_argument("--starts", nargs="+", default=[*STARTS], choices=[*STARTS])
    parser.add_argument("--out", type=Path, default=Path("runs/initial-weights"))
    given = parser.parse_args()
    taught = {"distillation": "none"} if given.teacher is None else {"teacher": given.teacher}
    student = {**SHARED, **STUDENT} if given.recipe is None else {"recipe": given.recipe}
    settings = {**student, "train_images": given.train_images, "epochs": given.epochs, **taught}
    found: dict[str, list[float]] = {name: [] for name in given.starts}
    for seed in range(given.seeds):
        for name in given.starts:
            out = given.out / f"{name.replace(' ', '-')}-{seed}"
            found[name].append(accuracy(given.data, out, STARTS[name], seed=seed, **settings))
            print(f"seed {seed}, {name}: {found[name][-1]:.2f} %", flush=True)
    for name, each in found.items():
        spread = statistics.stdev(each) if len(each) > 1 else float("nan")
        print(f"{name}: {statistics.mean(each):.2f} ± {spread:.2f}")


if __name__ == "__main__":
    main()
