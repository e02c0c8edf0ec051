"""What two processes learn, against one: the same steps of the same student, compared step by step.

    python benchmarks/processes.py [--steps 30]

The digits, preset `deit`, a batch of 117 or 118 images that two processes cut into 58 and 59 or 60. Printed are the largest
differences relative to one process: of the loss over the global batch (before the step is taken), of the gradient of the first
step and of all weights after the last one (both as lengths of vectors), and the largest of a single weight, absolutely. SGD moves
each weight in proportion to its gradient; AdamW divides by the gradient's own size, so that a weight whose gradient is nothing
but rounding moves as far as any other, and may move the other way.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from deitkit.config import RunConfig
from deitkit.distill.step import train_step
from deitkit.distill.teacher import no_teacher
from deitkit.settings import build
from deitkit.terminal import SilentProgress
from deitkit.training.loop import training_state
from deitkit.training.processes import launch, make_accelerator
from deitkit.training.setup import (
    load,
    resolve,
    student_architecture,
    student_network,
    student_plan,
    train_loader,
)

SGD_LR, MOMENTUM = 0.05, 0.9


def steps_of_this_process(stem: str, optimizer: str, batch_size: int, steps: int, out: Path) -> None:
    """Train in the process that this is, of as many as there are; process 0 writes down what came of it."""
    settings = {
        "stem": stem, "optimizer": "adamw" if optimizer == "sgd" else optimizer, "batch_size": batch_size, "steps": steps,
        "augment": "deit", "distillation": "none", "workers": 0, "precision": "float32",
    }  # fmt: skip
    config = build(RunConfig, settings)
    dataset = load("digits", config.data, SilentProgress())
    config = resolve(config, dataset, "digits")
    accelerator = make_accelerator(config.loop)
    architecture = student_architecture(config, dataset)
    network = student_network(config, architecture, dataset, None, SilentProgress())
    loader = train_loader(config, dataset, accelerator)
    plan = replace(student_plan(network, architecture, None, (), config, steps, loader.steps_per_epoch), warmup_steps=5)
    state = training_state(network, plan, accelerator)
    state.network.train()
    weights = dict(accelerator.unwrap_model(state.network).named_parameters())
    if optimizer == "sgd":
        state.optimizer = accelerator.prepare(torch.optim.SGD(weights.values(), SGD_LR, MOMENTUM))
        for group in state.optimizer.param_groups:  # the schedule's rates are AdamW's
            group["lr_scale"] = SGD_LR / (plan.optim.base_lr * plan.loop.batch_size / 256)
    gradients: dict[str, torch.Tensor] = {}

    def keep_first(*_: object) -> None:
        if not gradients:
            gradients.update({name: weight.grad.clone() for name, weight in weights.items()})

    handle = state.optimizer.optimizer.register_step_pre_hook(keep_first)
    losses, first = [], {}
    for raw in loader.batches(0, steps):
        loss = train_step(state, raw, no_teacher, plan, accelerator).loss
        losses.append(accelerator.reduce(loss.detach().double(), "sum"))
        first = first or {name: weight.detach().clone() for name, weight in weights.items()}
    handle.remove()
    if accelerator.is_main_process:
        last = {name: weight.detach() for name, weight in weights.items()}
        torch.save({"losses": torch.stack(losses), "gradients": gradients, "first": first, "last": last}, out)


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, float, str]:
    """(length of the difference by the length, largest difference, where)."""
    squares = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
    length = sum(float(tensor.double().square().sum()) for tensor in ours.values())
    largest, name = max((float((ours[name] - theirs[name]).abs().max()), name) for name in ours)
    return (squares / length) ** 0.5, largest, name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--stems", nargs="+", default=["patch", "conv"])
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"])
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the same number of threads for one process and for two
    for stem in given.stems:
        for optimizer in given.optimizers:
            with tempfile.TemporaryDirectory() as folder:
                found = []
                for count in (1, 2):
                    out = Path(folder) / f"{count}.pt"
                    arguments = [stem, optimizer, str(given.batch_size), str(given.steps), str(out)]
                    if launch([sys.executable, __file__, "--child", *arguments], count):
                        sys.exit(f"{count} processes failed")
                    found.append(torch.load(out, weights_only=True))
            one, two = found
            off = (two["losses"] / one["losses"] - 1).abs()
            at = [step for step in (1, 2, 3, 5, 10, 20, 30) if step <= len(off)]
            print(f"{stem} stem, {optimizer}: losses {one['losses'][0]:.4f} to {one['losses'][-1]:.4f}")
            print(
                "  loss, relative:",
                ", ".join(f"step {step} {off[step - 1]:.1e}" for step in at),
                f"most {off.max():.1e}",
            )
            for what in ("gradients", "first", "last"):
                relative, largest, name = distance(one[what], two[what])
                print(f"  {what}: relative {relative:.1e}, largest {largest:.1e} ({name})", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        stem, optimizer, batch_size, steps, out = sys.argv[2:]
        steps_of_this_process(stem, optimizer, int(batch_size), int(steps), Path(out))
    else:
        main()
