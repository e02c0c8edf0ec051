"""What this machine computes with: its device, the number format, and how many images a network may take at a time."""

from __future__ import annotations

import copy
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deitkit.config import Precision
from deitkit.errors import UserError
from deitkit.network import Network

MEMORY_SHARE = 1 / 16
"""Of the device's memory, what the activations of one slice of images may take."""
ALIVE = 4
"""So many tensors of the size of the largest activation are thought to be alive at a time."""
MOST_IMAGES = {"cpu": 64, "cuda": 128}
"""More at a time is hardly faster, and a batch smaller than this is filled up to it."""
CACHED_NUMBERS = 2**23
"""On a CPU, the largest activation of one slice: more of them leave its caches. (Images a second by images at a time, two
cores: ResNet-56 at 32 pixels 378 by 16, 453 by 32, 501 by 64; Lite0 at 96 365, 448, 367; ResNet-50 at 224 19.0 by 8, 17.1 by
16.)"""
LEAST_IMAGES = 8


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def number_format(precision: Precision, device: torch.device) -> torch.dtype:
    """The format that matrix products are computed in. auto: bfloat16 on a GPU or a CPU that has instructions for it (on CPUs: AMX),
    else float32.

    Raises UserError where the device lacks it."""
    if precision == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    if precision == "float16" and device.type != "cuda":
        raise UserError("precision float16 needs a GPU: use float32 or bfloat16 here")
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return formats[precision]


def settled(precision: Precision, device: torch.device) -> Precision:
    """`precision`, or what `auto` stands for on this device. Raises UserError where the device lacks it."""
    names: dict[torch.dtype, Precision] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    return names[number_format(precision, device)]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are much faster than in float32 here."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.9
    return bool(capabilities.get("amx_bf16", False))


def fitting_slice(network: Network, device: torch.device) -> int:
    """How many images `network` is given at a time so that its activations fit: a power of two. A function of the network
    and of the machine, not of what happens to be free, so that it is the same tomorrow."""
    largest = max(1, largest_activation(network))
    room = MEMORY_SHARE * _memory_bytes(device) / (ALIVE * 4 * largest)
    if device.type == "cpu":
        room = min(room, CACHED_NUMBERS / largest)
    fitting = LEAST_IMAGES
    while 2 * fitting <= min(room, MOST_IMAGES.get(device.type, MOST_IMAGES["cpu"])):
        fitting *= 2
    return fitting


def largest_activation(network: Network) -> int:
    """Numbers in the largest tensor that a module puts out for one image; 0 where the network cannot tell."""
    sizes = [0]

    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            sizes.append(output.numel())

    try:
        shadow = copy.deepcopy(network.body).to("meta").eval()
        for module in shadow.modules():
            module.register_forward_hook(look)
        with torch.no_grad():
            shadow(torch.empty(1, network.preprocessing.channels, *network.preprocessing.image_size, device="meta"))
    except (RuntimeError, NotImplementedError):  # a module that does more than tensor operations
        return 0
    return max(sizes)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**33
