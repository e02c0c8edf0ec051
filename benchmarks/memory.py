"""What a training says that it will take of memory, against what it takes.

    python benchmarks/memory.py PHOTOS CIFAR10 [--steps 4]

A training of a few steps and its evaluation on a CPU, without a teacher; of it and its workers the largest sum of proportional set sizes
(a page that several processes share counts once), looked at five times a second. One line a training.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

CASES = (
    ("PHOTOS", "deit_photo", 64),
    ("PHOTOS", "deit_photo", 16),
    ("CIFAR10", "deit_micro", 64),
    ("CIFAR10", "deit_micro", 512),
)
UNITS = {"MB": 1e-3, "GB": 1.0}


def taken(command: list[str], log: Path) -> float:
    """The largest memory of the command and its children in GB; what it says goes to `log`."""
    most = 0.0
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as process:
        whole = psutil.Process(process.pid)
        while process.poll() is None:
            now = 0.0
            with contextlib.suppress(psutil.Error):
                for one in (whole, *whole.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        now += one.memory_full_info().pss / 1e9
            most = max(most, now)
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(log.read_text())
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("cifar10")
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    print("| student | data | batch | told, GB | taken, GB | told / taken |\n| --- | --- | --- | --- | --- | --- |")
    for data, student, batch in CASES:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "deitkit.cli",
                "train",
                given.photos if data == "PHOTOS" else given.cifar10,
            ]
            command += [
                "--teacher",
                "none",
                "--student",
                student,
                "--steps",
                str(given.steps),
                "--batch-size",
                str(batch),
            ]
            most = taken([*command, "--out", f"{folder}/run"], log := Path(folder, "log"))
            found = re.search(r"memory: about ([\d.]+) (MB|GB)", log.read_text())
            assert found is not None
            told = float(found[1]) * UNITS[found[2]]
        print(f"| {student} | {data} | {batch} | {told:.2f} | {most:.2f} | {told / most:.2f} |", flush=True)


if __name__ == "__main__":
    main()
