"""`deit demo` with five seeds: mean and standard deviation of every figure that it shows, and what the teacher is worth.

    .venv/bin/python benchmarks/demo_seeds.py --out runs/demo-seeds

Seed 0 is the one of `make demo`. The output is the table in docs/evidence/demo.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from deitkit.comparison.demo import TITLES, run_demo
from deitkit.comparison.results import as_points, describe_difference, mean_sd, paired_difference
from deitkit.terminal import PlainProgress
from deitkit.training.run import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    given = parser.parse_args()
    tables, wall, processor = {}, [], []
    for seed in given.seeds:
        started, used = time.perf_counter(), processor_seconds()
        tables[seed] = run_demo(given.out / f"seed-{seed}", PlainProgress(), seed=seed)
        wall.append(time.perf_counter() - started)
        processor.append(processor_seconds() - used)
        with (given.out / "tables.jsonl").open("a", encoding="utf-8") as file:
            line = {"seed": seed, "seconds": wall[-1], "processor_seconds": processor[-1], **tables[seed]}
            file.write(json.dumps(line) + "\n")
    facts = environment()
    print(f"\n{facts['processor']}, {facts['cores']} cores, torch {facts['versions']['torch']}, seeds {given.seeds}")
    print(
        f"seconds a demo, median: {statistics.median(wall):.0f}, of processor time {statistics.median(processor):.0f}\n"
    )
    print("| network | top-1 on the test split, % | seed by seed |\n| --- | --- | --- |")
    for key, name in TITLES.items():
        shares = [100 * table[key] for table in tables.values()]
        one = mean_sd(shares)
        assert one is not None
        sd = "" if one.sd is None else f" ± {one.sd:.2f}"
        print(f"| {name} | {one.mean:.2f}{sd} | {', '.join(f'{share:.1f}' for share in shares)} |")
    plain, fused = ({seed: table[key] for seed, table in tables.items()} for key in ("plain", "fused"))
    gap = paired_difference(fused, plain)
    assert gap is not None
    print(f"\n{describe_difference('distilled, fused', 'plain', as_points(gap._asdict()))}")
    print("seed by seed: " + ", ".join(f"{100 * (fused[seed] - plain[seed]):+.1f}" for seed in tables))


def processor_seconds() -> float:
    """User and system time of this process and of those it waited for, on all cores together."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
