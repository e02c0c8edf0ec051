"""`deit demo` with five seeds: mean and standard deviation of every figure that it shows.

    .venv/bin/python benchmarks/demo_seeds.py --out runs/demo-seeds

Seed 0 is the one of `make demo`. The output is the table in docs/evidence/demo.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from deitkit.comparison.runner import run_demo
from deitkit.terminal import PlainProgress
from deitkit.training.run import environment

NAMES = {
    "teacher": "teacher (CNN)",
    "plain": "plain ViT",
    "cls": "distilled: class head",
    "dist": "distilled: distillation head",
    "fused": "distilled: both fused",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    given = parser.parse_args()
    tables, seconds = [], []
    for seed in given.seeds:
        started = time.perf_counter()
        tables.append(run_demo(given.out / f"seed-{seed}", PlainProgress(), seed=seed))
        seconds.append(time.perf_counter() - started)
        with (given.out / "tables.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"seed": seed, "seconds": seconds[-1], **tables[-1]}) + "\n")
    facts = environment()
    print(f"\n{facts['processor']}, {facts['cores']} cores, torch {facts['versions']['torch']}, seeds {given.seeds}")
    print(f"seconds a demo: median {statistics.median(seconds):.0f}\n")
    print("| network | top-1 on the test split, % |\n| --- | --- |")
    for key, name in NAMES.items():
        shares = [100 * table[key] for table in tables]
        print(f"| {name} | {statistics.mean(shares):.2f} ± {statistics.stdev(shares):.2f} |")
    gains = [100 * (table["fused"] - table["plain"]) for table in tables]
    print(f"\nfused minus plain, paired: {statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f}")


if __name__ == "__main__":
    main()
