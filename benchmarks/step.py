"""A training step and an inference pass of our students against timm's model of the same shape.

    python benchmarks/step.py [--case CASE ...] [--rounds N] [--device cuda]

Both networks have the same shape, a distillation token, the same AdamW and the same images; float32, eager, one process, in
turn, round by round. A step is forward, cross-entropy of both heads, backward, AdamW. Rates are medians over rounds, ratios
medians of each round's ratio. The share of sgemm counts the multiply-adds of papers (all tokens in every block, three
forward passes a training step) against a product of two 2048x2048 matrices in the same process. Peak memory is that of a
process that makes three steps and nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.nn import functional as F

from deitkit.cli import keep_freed_memory
from deitkit.config import OptimConfig
from deitkit.distill.optim import make_optimizer
from deitkit.models.network import Network
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.zoo import STUDENTS, multiply_adds, student_preprocessing


class Case(NamedTuple):
    config: ViTConfig
    batch_size: int


def small(width: int, heads: int) -> ViTConfig:
    """32-pixel images in patches of 4, depth 6, no convolutions: what timm has, too."""
    shape = {"classes": 10, "stem": "patch", "width": width, "heads": heads, "depth": 6}
    return ViTConfig(**{**STUDENTS["deit_nano"].model_dump(), **shape})


CASES = {
    "tiny-224": Case(STUDENTS["deit_tiny"], 16),
    "width-64": Case(small(64, 2), 128),
    "width-128": Case(small(128, 4), 128),
    "width-192": Case(small(192, 6), 128),
}


def our_network(config: ViTConfig) -> nn.Module:
    return ViT(config)


def timm_network(config: ViTConfig) -> nn.Module:
    network = VisionTransformerDistilled(
        img_size=config.image_size, patch_size=config.patch_size[0], embed_dim=config.width, depth=config.depth,
        num_heads=config.heads, num_classes=config.classes,
    )  # fmt: skip
    network.set_distilled_training(True)
    return network


NETWORKS = {"deitkit": our_network, "timm": timm_network}


def steps_of(
    build: Callable[[ViTConfig], nn.Module], case: Case, device: str
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step and an inference pass."""
    torch.manual_seed(0)
    network = build(case.config).to(device).train()
    optimizer = make_optimizer(network, OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    images = torch.rand(case.batch_size, 3, *case.config.image_size, device=device)
    labels = torch.randint(case.config.classes, (case.batch_size,), device=device)

    def train() -> None:
        network.train()
        cls, dist = network(images)
        (F.cross_entropy(cls, labels) + F.cross_entropy(dist, labels)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def infer() -> None:
        network.eval()
        with torch.inference_mode():
            network(images)

    return train, infer


def seconds(call: Callable[[], None], device: str) -> float:
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def sgemm(device: str, size: int = 2048) -> float:
    """Multiply-adds a second of a float32 matrix product: the best of ten."""
    left, right = torch.rand(size, size, device=device), torch.rand(size, size, device=device)

    def product() -> None:
        torch.mm(left, right)

    return size**3 / min(seconds(product, device) for _ in range(10))


def peak_bytes(kind: str, name: str, device: str) -> float:
    """Of a process that does nothing but three training steps (on a GPU: of its memory there)."""
    if kind == "deitkit":
        keep_freed_memory()  # as the command does
    train, _ = steps_of(NETWORKS[kind], CASES[name], device)
    for _ in range(3):
        train()
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text().splitlines()  # getrusage would count what the parent held
    return next(1024.0 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def in_a_process(*arguments: str) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_bytes, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    given = parser.parse_args()
    print(f"timm {timm.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, n = {given.rounds}")
    for name in given.case:
        case = CASES[name]
        shape = Network(ViT(case.config), student_preprocessing(case.config, photos=False))
        macs = multiply_adds(shape, case.config.channels)
        memory = {kind: in_a_process(kind, name, given.device) for kind in NETWORKS}
        calls = {kind: steps_of(build, case, given.device) for kind, build in NETWORKS.items()}
        found: dict[str, list[float]] = {f"{kind} {what}": [] for kind in calls for what in ("train", "infer")}
        peak = sgemm(given.device)
        for number in range(-2, given.rounds):  # two rounds to warm up
            for kind in list(calls)[:: 1 if number % 2 else -1]:
                for what, call in zip(("train", "infer"), calls[kind], strict=True):
                    taken = seconds(call, given.device)
                    if number >= 0:
                        found[f"{kind} {what}"].append(taken)
        print(f"{name}, batch {case.batch_size}, {macs / 1e9:.3f} GMAC an image, sgemm {2 * peak / 1e9:.0f} GFLOP/s")
        for what, passes in (("train", 3), ("infer", 1)):
            for kind in calls:
                rate = case.batch_size / statistics.median(found[f"{kind} {what}"])
                share = rate * passes * macs / peak
                held = f"  peak {memory[kind] / 1e6:6.0f} MB" if what == "train" else ""
                print(f"  {kind:8} {what}  {rate:8.1f} images/s  {100 * share:3.0f} % of sgemm{held}")
            pairs = zip(found[f"timm {what}"], found[f"deitkit {what}"], strict=True)
            print(f"  deitkit is {statistics.median(a / b for a, b in pairs):.2f} times as fast ({what})")
        print(json.dumps({"case": name, "seconds": found}), flush=True)


if __name__ == "__main__":
    main()
