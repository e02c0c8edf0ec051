"""Roughly what memory a training will take, told before its first step."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import torch
from accelerate import Accelerator

from deitkit.config import JobConfig, JobT
from deitkit.data import Split
from deitkit.models.network import Network, autocast_dtype
from deitkit.settings import validated
from deitkit.terminal import Progress, file_size
from deitkit.views.loader import EVALUATION_BATCH, TrainLoader

SAMPLE = 2
"""Images of the forward pass whose activations are counted."""
MOMENTS = {"adamw": 2, "lamb": 2, "muon": 1}
"""Numbers that an optimizer keeps for a weight; Muon keeps two for those that it leaves to AdamW, which are few."""
EVALUATION_SHARE = 1 / 3
"""What evaluation takes for an image, in activations of an image: its largest layers, not all of them."""
MEMORY_SHARE = 0.8
"""Of the free memory, what a step may take whose batch size is chosen by memory."""
WORKER_BYTES = 150_000_000
"""Of a data-loading worker's own, beside the pages that it shares with its parent: 20 to 160 MB were measured."""


def say_memory(
    network: Network,
    config: JobConfig,
    loader: TrainLoader,
    validation: Split,
    accelerator: Accelerator,
    progress: Progress,
) -> None:
    """Tell what memory a process of the training will take; warn where that is more than is free."""
    held = held_memory(accelerator.device)
    more = memory_needed(network, config, loader.workers, len(validation), accelerator)
    where = "GPU memory" if accelerator.device.type == "cuda" else "memory"
    each = " for each process" if accelerator.num_processes > 1 else ""
    progress.say(f"{where}: about {file_size(held + more)}{each}")
    free = free_memory(accelerator.device)
    if free is not None and more * local_processes(accelerator) > free:
        progress.warn(
            f"{file_size(free)} of {where} are free, which may not be enough: give a smaller --batch-size, or auto"
        )


def with_fitting_batch(
    config: JobT, network: Network, validation: int, accelerator: Accelerator, progress: Progress
) -> JobT:
    """`config` with its batch size halved until a step takes no more than `MEMORY_SHARE` of the free memory, down to one image for each
    process; said. Raises UserError where other rates do not fit then."""
    free, asked = free_memory(accelerator.device), config.loop.batch_size

    def of(images: int) -> JobT:
        values = config.model_dump()
        values["loop"]["batch_size"] = images
        return validated(type(config), values, f"batches of {images}")

    def fits(images: int) -> bool:
        needed = memory_needed(network, of(images), config.loop.workers, validation, accelerator) * local_processes(
            accelerator
        )
        return free is None or needed <= MEMORY_SHARE * free

    images = asked
    while images // 2 >= accelerator.num_processes and not fits(images):
        images //= 2
    progress.say(f"batch size: {images}" + (f", for {asked} would take too much memory" if images < asked else ""))
    return of(images)


def memory_needed(network: Network, config: JobConfig, workers: int, validation: int, accelerator: Accelerator) -> int:
    """Bytes that training takes beside what the process holds now: gradients, the optimizer's moments, EMA; the activations of a batch and
    their gradients; the evaluation of so many `validation` images; on a CPU also the `workers`, and the activations once more: workers
    that begin later are copies of a process that keeps what it has freed."""
    on_cpu = accelerator.device.type == "cpu"
    weights: int = sum(weight.nbytes for weight in network.parameters())
    copies: int = 1 + MOMENTS[config.optim.optimizer] + (config.optim.ema_decay > 0)
    batch = -(-config.loop.batch_size // accelerator.num_processes)
    images = (3 if on_cpu and workers else 2) * batch + EVALUATION_SHARE * min(EVALUATION_BATCH, validation)
    computed_in = autocast_dtype(config.loop.precision, accelerator.device)
    activations: int = round(images * activation_bytes(network, computed_in))
    return weights * copies + activations + (workers * WORKER_BYTES if on_cpu else 0)


def activation_bytes(network: Network, computed_in: torch.dtype) -> int:
    """What a forward pass keeps of one image for the backward pass, in the format that it is `computed_in`, on the network's device."""
    weight, training = next(network.parameters()), network.training
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images_BCHW = torch.full((SAMPLE, network.preprocessing.channels, *network.preprocessing.image_size), 0.5).to(
        weight
    )
    network.eval()  # the statistics of batch norms stay as they are
    half = computed_in != torch.float32
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        torch.autocast(weight.device.type, dtype=computed_in, enabled=half),
    ):
        output = network(images_BCHW)  # alive while it is counted: what it keeps is not given to another tensor
    network.train(training)
    del output
    return sum(kept.values()) // SAMPLE


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds: data, teacher, network, libraries. 0 where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still get: of the GPU, else of the machine or, if that has less, of its container. None where nobody
    tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii")
        found += [1024 * int(number) for number in re.findall(r"^MemAvailable:\s+(\d+) kB", lines, re.MULTILINE)]
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        cached = re.findall(r"^inactive_file (\d+)", (group / "memory.stat").read_text(encoding="ascii"), re.MULTILINE)
        found.append(limit - used + sum(map(int, cached)))
    return min(found, default=None)


def local_processes(accelerator: Accelerator) -> int:
    """Processes that share this process's memory: those of this machine; a GPU is each one's own."""
    if accelerator.device.type == "cuda":
        return 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
