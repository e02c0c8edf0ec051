"""What fewer views than epochs cost: V = 1, 5, 20 and one for each epoch, three seeds, validation accuracy.

    python benchmarks/views.py fashion-mnist --teacher RUN --out runs/views

Epochs go round the V views of one tape, recorded once. Everything else is the same for the same seed; the table is of the
fused head on the validation split, with paired differences from one view an epoch.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import yaml

from deitkit.config import RunConfig
from deitkit.settings import build
from deitkit.terminal import PlainProgress
from deitkit.training.jobs import run_record, run_training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--views", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--train-images", type=int, default=3000)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="more settings of `deit train`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    shared = {"student": "deit_nano", "augment": "deit", "train_images": given.train_images, "epochs": given.epochs}
    shared |= {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in given.set)}
    tape = given.out / "tape"
    recipe = build(RunConfig, {**shared, "teacher": given.teacher})
    run_record(given.data, recipe, tape, views=given.epochs, outputs="hard", progress=PlainProgress())
    scores: dict[int, list[float]] = {}
    for seed in given.seeds:
        for views in dict.fromkeys((*given.views, given.epochs)):
            out = given.out / f"views-{views}-seed-{seed}"
            if (out / "summary.json").is_file():  # from an earlier call
                summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
            else:
                config = build(RunConfig, {**shared, "tape": str(tape), "views": views, "seed": seed})
                resume = (out / "config.yaml").is_file()
                summary = run_training(given.data, config, out, resume=resume, progress=PlainProgress())
            scores.setdefault(views, []).append(100 * summary["top1"]["fused"])
    print("| views | fused, validation, % (mean ± sd) | minus one an epoch, paired |\n| --- | --- | --- |")
    for views, found in scores.items():
        gaps = [a - b for a, b in zip(found, scores[given.epochs], strict=True)]
        name = "one an epoch" if views == given.epochs else views
        spread, gap_spread = (statistics.stdev(part) if len(part) > 1 else 0.0 for part in (found, gaps))
        print(
            f"| {name} | {statistics.mean(found):.2f} ± {spread:.2f} | {statistics.mean(gaps):+.2f} ± {gap_spread:.2f} |"
        )


if __name__ == "__main__":
    main()
