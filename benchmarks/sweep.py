"""A sweep of four losses: four live trainings against one recording and four trainings from the tape.

    python benchmarks/sweep.py CIFAR10 --teacher cifar-resnet56@resnet56.safetensors --out runs/sweep

Both sides train the same students with the same seeds on the same views; the weights must come out the same, bit for bit.
Minutes are wall time of whole runs, the recording counted; `--train-images` and `--epochs` make it shorter.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from deitkit.config import RunConfig
from deitkit.settings import build
from deitkit.terminal import PlainProgress
from deitkit.training.jobs import run_record, run_training

LOSSES: dict[str, dict[str, Any]] = {
    "hard": {"distillation": "hard"},
    "soft, temperature 3": {"distillation": "soft", "temperature": 3.0},
    "zscore, temperature 2": {"distillation": "zscore", "temperature": 2.0, "teacher_weight": 0.5},
    "zscore, temperature 4": {"distillation": "zscore", "temperature": 4.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--student", default="deit_nano")
    parser.add_argument("--train-images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()
    shared = {
        "student": given.student, "augment": "deit", "optimizer": "adamw", "batch_size": 128,
        "train_images": given.train_images, "epochs": given.epochs,
    }  # fmt: skip

    def train(name: str, **settings: Any) -> float:
        started = time.perf_counter()
        out = given.out / name.replace(", ", "-").replace(" ", "-")
        run_training(given.data, build(RunConfig, {**shared, **settings}), out, resume=False, progress=PlainProgress())
        return time.perf_counter() - started

    def weights(name: str) -> bytes:
        out = given.out / name.replace(", ", "-").replace(" ", "-")
        return (out / "model" / "model.safetensors").read_bytes()

    started = time.perf_counter()
    recipe = build(RunConfig, {**shared, "teacher": given.teacher})
    tape = given.out / "tape"
    run_record(given.data, recipe, tape, views=given.epochs, outputs="all", progress=PlainProgress())
    recording = time.perf_counter() - started
    live, taped = {}, {}
    for name, loss in LOSSES.items():  # in turn: other work on the machine meets both sides
        live[name] = train(f"live {name}", teacher=given.teacher, **loss)
        taped[name] = train(f"taped {name}", tape=str(tape), **loss)
    print("| loss | live, s | from the tape, s | same bits |\n| --- | --- | --- | --- |")
    same = {name: weights(f"live {name}") == weights(f"taped {name}") for name in LOSSES}
    for name in LOSSES:
        print(f"| {name} | {live[name]:.0f} | {taped[name]:.0f} | {'yes' if same[name] else 'NO'} |")
    total = recording + sum(taped.values())
    print(f"| all four (recording: {recording:.0f} s) | {sum(live.values()):.0f} | {total:.0f} | |")
    print(f"\nlive / taped, recording counted: {sum(live.values()) / total:.2f}")
    if not all(same.values()):
        raise SystemExit("the weights differ")


if __name__ == "__main__":
    main()
