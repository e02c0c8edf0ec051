"""What memory a training will take is told; it does not grow."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tests.fakes import HeldImages
from tests.views.test_loader import HELD_VIEW

from deitkit.config import Preprocessing, RunConfig
from deitkit.models.network import Network
from deitkit.settings import build
from deitkit.terminal import Progress
from deitkit.training import jobs, memory
from deitkit.training.memory import activation_bytes, memory_needed, say_memory
from deitkit.views.loader import TrainLoader


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def warn(self, line: str) -> None:
        self.lines.append(f"warning: {line}")


def network() -> Network:
    """Of an image of 8 x 8 grey pixels it keeps, as float32, the pixels for the first layer and 100 numbers for each of the other two."""
    body = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10, bias=False)
    )
    return Network(body, Preprocessing(image_size=(8, 8), mean=(0.5,), std=(0.5,)))


def test_activations_of_an_image_are_counted_once_each_and_weights_are_none() -> None:
    """ReLU keeps its output, which the layer after it keeps, too: one tensor."""
    assert activation_bytes(network(), torch.float32) == 4 * (64 + 100)


def test_memory_is_told_and_a_batch_that_does_not_fit_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    said, accelerator = Said(), Accelerator(cpu=True)
    held = memory.held_memory(torch.device("cpu"))
    assert 10**8 < held < 10**11
    free = memory.free_memory(torch.device("cpu"))
    assert free is not None
    assert free > 0
    small, large = (
        build(RunConfig, {"optimizer": "adamw", "batch_size": size, "precision": "float32"}) for size in (10, 1001)
    )
    weights, of_an_image = 4 * (64 * 100 + 100 + 1000), 4 * (64 + 100)
    for workers, batches in ((0, 2), (2, 3)):
        needed = memory_needed(network(), small, workers, 12, accelerator)  # gradients, two moments, EMA; evaluation
        assert needed == 4 * weights + (10 * batches + 4) * of_an_image + workers * memory.WORKER_BYTES
    loader, split = TrainLoader(HeldImages(12), HELD_VIEW, batch_size=10, seed=0), HeldImages(12)
    monkeypatch.setattr(memory, "held_memory", lambda _: 10**9)
    monkeypatch.setattr(memory, "free_memory", lambda _: 10**6)
    for config in (small, large):
        say_memory(network(), config, loader, split, accelerator, said)
    assert said.lines == [
        "memory: about 1.0 GB",
        "memory: about 1.0 GB",
        "warning: 1.0 MB of memory are free, which may not be enough: give a smaller --batch-size, or auto",
    ]


def sizes() -> dict[int, int]:
    """The resident bytes of this process and its workers, by process."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    found = {}
    for pid in (os.getpid(), *map(int, children)):
        resident = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        if resident is not None:
            found[pid] = 1024 * int(resident[1])
    return found


@pytest.mark.slow
def test_memory_of_a_training_and_its_workers_stays_flat_over_50_epochs(tmp_path: Path) -> None:
    """From the tenth epoch to the last no process grows by more than 20 MB: the median of ten epochs against that of the last ten."""
    for brightness, name in ((0, "a"), (130, "b")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        pixels_NHWC = np.random.default_rng(brightness).integers(0, 120, (60, 40, 50, 3)) + brightness
        for number, pixels_HWC in enumerate(pixels_NHWC.astype(np.uint8)):
            Image.fromarray(pixels_HWC[: 30 + number % 10]).save(tmp_path / "photos" / name / f"{number}.png")
    epochs: list[dict[int, int]] = []

    class Watched(Progress):
        def epoch(self, row: dict[str, Any]) -> None:
            epochs.append(sizes())

    settings = {
        "epochs": 50,
        "batch_size": 16,
        "student": "deit_pico",
        "teacher": None,
        "distillation": "none",
        "workers": 2,
    }
    jobs.run_training(
        str(tmp_path / "photos"), build(RunConfig, settings), tmp_path / "run", resume=False, progress=Watched()
    )
    assert len(epochs) == 50
    lasting = set.intersection(*map(set, epochs))
    assert len(lasting) >= 3  # this process and two workers
    for pid in lasting:
        early, late = (float(np.median([epoch[pid] for epoch in some])) for some in (epochs[10:20], epochs[40:]))
        print(f"{'main' if pid == os.getpid() else 'worker'}: {early / 1e6:.1f} MB, {late / 1e6:.1f} MB")
        assert late - early < 20e6
