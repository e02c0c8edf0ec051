"""Does a student from fresh weights learn better if its attention looks like a trained one from the first step on?

    python benchmarks/mimetic_init.py DATA [--recipe few-images] [--train-images N] [--epochs 15] [--seeds 3] [--out DIR]

Mimetic initialisation (Trockman and Kolter 2023, arXiv 2305.09828): the product of query and key weights of a head is about the identity,
that of value and output weights about its negative, with `ALPHA` times a random matrix added. `positions`: the position embedding begins
with sines and cosines of row and column, too. Students with the same seeds learn from labels alone; their validation accuracies are
compared in pairs. The test split is not opened.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

from deitkit.api import train
from deitkit.models import vit as networks
from deitkit.models.vit import ViT
from deitkit.training.tables import fused_or_only

ALPHA = BETA = {"query, key": 0.7, "value, output": 0.4}
POSITION_STD = 0.02
"""as that of fresh embeddings"""


@torch.no_grad()
def mimic(vit: ViT, seed: int, identity: float = 1.0) -> None:
    """Attention weights as the paper draws them; with `identity` 0 as large, but random: for comparison."""
    width, generator = vit.config.width, torch.Generator().manual_seed(seed)
    identity_DD = torch.eye(width)

    def drawn(kind: str, sign: float) -> tuple[torch.Tensor, torch.Tensor]:
        noise_DD = torch.randn(width, width, generator=generator) / width**0.5
        product_DD = ALPHA[kind] * noise_DD + identity * sign * BETA[kind] * identity_DD
        if not identity:
            product_DD *= (ALPHA[kind] ** 2 + BETA[kind] ** 2) ** 0.5 / ALPHA[kind]
        left_DR, scale_R, right_RD = torch.linalg.svd(product_DD)
        return left_DR * scale_R.sqrt(), scale_R.sqrt()[:, None] * right_RD

    for block in vit.blocks:
        query_DD, key_DD, value_DD = block.attn.qkv.weight.chunk(3)
        size = width // vit.config.heads
        for head in range(vit.config.heads):
            rows = slice(head * size, (head + 1) * size)
            left_DD, right_DD = drawn("query, key", 1.0)
            query_DD[rows], key_DD[rows] = left_DD[:, :size].T, right_DD[:size]
        left_DD, right_DD = drawn("value, output", -1.0)
        value_DD.copy_(left_DD.T)
        block.attn.proj.weight.copy_(right_DD.T)


@torch.no_grad()
def place(vit: ViT) -> None:
    """Sines and cosines of 10 ** -4 to 1 cycles a patch, of rows in one half of the width, of columns in the other."""
    (rows, columns), quarter = vit.config.grid, vit.config.width // 4
    speed_Q = 10.0 ** (-4 * torch.arange(quarter) / quarter)

    def waves(count: int) -> torch.Tensor:
        angle_NQ = torch.arange(count)[:, None] * speed_Q
        return torch.cat([angle_NQ.sin(), angle_NQ.cos()], 1)

    row_RH, column_CH = waves(rows), waves(columns)
    grid_RCD = torch.cat(
        [row_RH[:, None].expand(-1, columns, -1), column_CH[None].expand(rows, -1, -1)], -1
    )  # fmt: skip
    patches_ND = grid_RCD.reshape(rows * columns, -1)
    vit.pos_embed[0, vit.config.prefix_positions :, : patches_ND.shape[1]] = (
        patches_ND * POSITION_STD / patches_ND.std()
    )


def trained(data: str, out: Path, change: Callable[[ViT, int], None] | None, **settings: object) -> float:
    """Validation accuracy of a student whose fresh weights `change` has changed."""
    usual = networks.initialise

    def initialise(vit: ViT, seed: int) -> None:
        usual(vit, seed)
        if change is not None:
            change(vit, seed)

    with patch.object(networks, "initialise", initialise):
        run = train(data, out=out, distillation="none", init="scratch", **settings)  # type: ignore[arg-type]
    return fused_or_only(run.summary["top1"])


def mimic_with_positions(vit: ViT, seed: int) -> None:
    mimic(vit, seed)
    place(vit)


def enlarge(vit: ViT, seed: int) -> None:
    mimic(vit, seed, identity=0.0)


CHANGES = {"as usual": None, "as large, random": enlarge, "mimetic": mimic, "mimetic, positions": mimic_with_positions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--recipe", default="few-images")
    parser.add_argument("--train-images", type=int)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--changes", nargs="+", default=[*CHANGES], choices=[*CHANGES])
    parser.add_argument("--out", type=Path, default=Path("runs/mimetic"))
    given = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in given.changes}
    for seed in range(given.seeds):
        for name in given.changes:
            change = CHANGES[name]
            folder = given.out / f"{name.replace(', ', '-')}-{seed}"
            share = trained(
                given.data, folder, change, recipe=given.recipe, train_images=given.train_images, epochs=given.epochs, seed=seed
            )  # fmt: skip
            found[name].append(100 * share)
            print(f"seed {seed}, {name}: {found[name][-1]:.2f} %", flush=True)
    for name, shares in found.items():
        gains = [share - usual for share, usual in zip(shares, found[given.changes[0]], strict=True)]
        spread = statistics.stdev(shares) if len(shares) > 1 else float("nan")
        print(f"{name}: {statistics.mean(shares):.2f} ± {spread:.2f}; {statistics.mean(gains):+.2f} (each {gains})")


if __name__ == "__main__":
    main()
