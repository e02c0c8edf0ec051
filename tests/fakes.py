"""Small data sets for tests, a kill that comes when it is wanted, and other processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file

from deitkit.data import Split, UnreadableImage
from deitkit.terminal import save_tensors
from deitkit.training.loop import Trainer


class HeldImages(Split):
    """Random images held in memory at one size."""

    def __init__(self, count: int, size: tuple[int, int] = (8, 8), channels: int = 1, classes: int = 10) -> None:
        generator = np.random.default_rng(0)
        self.channels = channels
        self.labels_N = np.arange(count, dtype=np.int64) % classes
        self._pixels = generator.integers(0, 256, (count, *size, channels), dtype=np.uint8)

    @property
    def pixels_NHWC(self) -> NDArray[np.uint8]:
        return self._pixels

    def read(self, position: int) -> NDArray[np.uint8]:
        return self._pixels[position]

    def name(self, position: int) -> str:
        return f"train[{position}]"

    def key(self, position: int) -> str:
        return str(position)

    def content_hash(self) -> str:
        return "held"


class Photos(Split):
    """Images of many sizes, made when they are read; those in `broken` cannot be."""

    def __init__(self, count: int, broken: frozenset[int] = frozenset()) -> None:
        self.channels = 3
        self.labels_N = np.arange(count, dtype=np.int64) % 3
        self.broken = broken

    def read(self, position: int) -> NDArray[np.uint8]:
        if position in self.broken:
            raise UnreadableImage(f"{self.name(position)}: broken")
        size = (20 + position % 7, 30 - position % 5, 3)
        return np.random.default_rng(position).integers(0, 256, size, dtype=np.uint8)

    def name(self, position: int) -> str:
        return f"photo-{position}.jpg"

    def key(self, position: int) -> str:
        return str(position)

    def content_hash(self) -> str:
        return "photos"


@contextmanager
def killed_after_epoch(number: int) -> Iterator[None]:
    """A training within this block ends with KeyboardInterrupt as soon as its epoch `number` (from 1) is saved."""
    save = Trainer._save

    def save_then_die(self: Trainer, state: Any) -> None:
        save(self, state)
        if state.step >= number * self.loader.steps_per_epoch:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "_save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            yield


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Within this block another process is at `folder`. Raises AssertionError, with what it said, where it cannot be."""
    command = [sys.executable, "-S", "-c", HOLDER, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"held\n", process.stderr.read().decode()
        yield
        process.communicate()


def forget(run: Path) -> None:
    """Set the last layer of a fitted CIFAR-style network to 0: it predicts one class, whatever it sees."""
    file = run / "model" / "model.safetensors"
    weights = load_file(file)
    assert {"linear.weight", "linear.bias"} <= weights.keys()
    save_tensors({name: 0 * weight if name.startswith("linear.") else weight for name, weight in weights.items()}, file)


def is_running(pid: int) -> bool:
    """Whether there is such a process, one that is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
