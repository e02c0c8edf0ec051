"""Weights to start a student from, wherever they are, under our names, and what they say of themselves.

A name is one of

    PATH              the folder of a run; a file of weights with names that `layouts` knows; or a folder that holds such a
                      file and `config.json`, as Hugging Face's networks are kept
    NAME              a timm vision transformer with published weights, such as `deit_small_distilled_patch16_224.fb_in1k`
    NAME@FILE         the same, with the weights out of a file
    hf:OWNER/NAME     a network of the Hugging Face hub, such as `hf:facebook/deit-base-distilled-patch16-224`

A file shows width, depth, patches and tokens, but not how many heads its attention has: that, and what images it wants, is
assumed as published networks have it, and said, where nothing beside the file tells it: a `config.json` as Hugging Face or timm
write it, or the name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from deitkit.backbones import IMAGENET_MEAN, IMAGENET_STD, as_preprocessing, timm_config
from deitkit.beside import Known, beside_hugging_face, beside_timm, known_of_timm, timm_network
from deitkit.config import InitFacts, ViTConfig
from deitkit.errors import UserError
from deitkit.layouts import Tensors, to_ours
from deitkit.pretrained import cached_weights, downloads, expanded, hub_reachable, read_weights, split_name
from deitkit.settings import validated
from deitkit.vit import ViT
from deitkit.zoo import DEIT3_LAYER_SCALE, HALF, load_model

HUB = "hf:"
INSTEAD = "give the file of the weights"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
HEAD_WIDTH = 64
"""Channels of one attention head in every published ViT, DeiT and DeiT III."""
TIMM_EPSILON, HUGGING_FACE_EPSILON = 1e-6, 1e-12


class Source(NamedTuple):
    """Weights under our names."""

    facts: InitFacts
    tensors: Tensors
    layout: str
    left_out: list[str]
    place: str = ""
    """where the user said they are"""


def find_init(name: str, heads: int | None = None) -> Source:
    """The weights that `name` names, on the CPU. `heads`: how many there are where nothing says so. Raises UserError."""
    if name.startswith(HUB):
        return _of_folder(_downloaded(name), name, heads)
    path = expanded(name)
    if path.is_dir():
        return _of_folder(path, name, heads)
    if path.is_file():
        return _of_file(path, name, heads)
    base, file = split_name(name)
    if "/" in base or base.endswith(SUFFIXES):
        raise UserError(
            f"--init {name}: no such run folder or file of weights (the hub's networks are {HUB}OWNER/NAME)"
        )
    return _of_timm(name, base, file)


def _of_run(model: Path, name: str) -> Source:
    network, card = load_model(model)
    if not isinstance(card.architecture, ViTConfig):
        raise UserError(f"--init {name}: {card.name} is a convolutional network: give a vision transformer's weights")
    facts = InitFacts(
        name=card.name, architecture=card.architecture, preprocessing=card.preprocessing, classes=card.classes
    )
    if card.head_scales:
        assert isinstance(network.body, ViT)
        network.body.scale_heads([1 / scale for scale in card.head_scales])  # it goes on as it was trained
    return Source(facts, network.body.state_dict(), "deitkit", [])


def _of_folder(folder: Path, name: str, heads: int | None) -> Source:
    for model in (folder / "model", folder):
        if (model / "model.json").is_file():
            return _of_run(model, name)
    weights = [path for end in SUFFIXES for path in sorted(folder.glob(f"*{end}"))]
    if (folder / "config.json").is_file() and weights:
        return _of_file(weights[0], name, heads)
    raise UserError(f"--init {name}: is no folder of a finished run: model/model.json is missing")


def _of_file(path: Path, name: str, heads: int | None) -> Source:
    tensors, layout, left_out = to_ours(read_weights(path), f"--init {name}")
    if layout == "deitkit" and (path.parent / "model.json").is_file():
        return _of_run(path.parent, name)
    known = _known(path.parent, layout, f"--init {name}")
    architecture, assumed = _architecture(tensors, layout, known, heads, f"--init {name}")
    preprocessing = known.preprocessing
    if preprocessing is None:
        if layout.endswith("vit"):
            mean, std, whose = HALF, HALF, "mean and deviation 0.5"
        else:
            mean, std, whose = IMAGENET_MEAN, IMAGENET_STD, "ImageNet's mean and deviation"
        assumed.append(whose)
        preprocessing = as_preprocessing(architecture.image_size, mean, std, "bicubic", 0.875, architecture.channels)
    preprocessing = preprocessing.model_copy(update={"image_size": architecture.image_size})
    facts = InitFacts(name=path.stem, architecture=architecture, preprocessing=preprocessing, assumed=tuple(assumed))
    return Source(facts, tensors, layout, left_out)


def _known(folder: Path, layout: str, source: str) -> Known:
    """What `config.json` in `folder` says, in the words of those whose names the tensors have."""
    if layout.startswith("hf"):
        return beside_hugging_face(folder)
    return beside_timm(folder, source) if layout in ("timm", "original") else Known()


def _architecture(
    tensors: Tensors, layout: str, known: Known, heads: int | None, source: str
) -> tuple[ViTConfig, list[str]]:
    """The shape of the network that has these tensors, and what of it had to be assumed."""
    try:
        kernel, positions = tensors["stem.proj.weight"], tensors["pos_embed"].shape[1]
        width, channels, *patch = kernel.shape
        depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
        hidden = tensors["blocks.0.mlp.0.weight"].shape[0]
        height, across = patch
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{source}: lacks parts of a vision transformer with a patch embedding: give the run folder"
        ) from error
    _refuse_strange(tensors, width, source)
    token = "dist_token" in tensors
    prefix = 2 if token else 1
    grid, of_prefix = _grid(positions, prefix, known.image_size, (height, across), source)
    assumed = []
    if known.heads is None:
        heads = heads or max(1, width // HEAD_WIDTH)
        assumed.append(f"{heads} attention heads")
    epsilon = known.epsilon
    if epsilon is None:
        epsilon = HUGGING_FACE_EPSILON if layout.startswith("hf") else TIMM_EPSILON
        assumed.append(f"epsilon {epsilon:g} in norms")
    sized = known.image_size
    if sized is None or grid != (sized[0] // height, sized[1] // across):
        assumed.append(f"a square of {grid[0]}x{grid[1]} patches")
    values = {
        "image_size": (grid[0] * height, grid[1] * across),
        "channels": channels,
        "classes": tensors["head.weight"].shape[0] if "head.weight" in tensors else 1,
        "patch_size": (height, across),
        "width": width,
        "depth": depth,
        "heads": known.heads or heads,
        "mlp_ratio": hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width,
        "distillation_token": token,
        "norm_epsilon": epsilon,
        "layer_scale": DEIT3_LAYER_SCALE if "blocks.0.scale1" in tensors else None,
        "position_of_prefix": of_prefix,
    }
    return validated(ViTConfig, values, source), assumed


def _refuse_strange(tensors: Tensors, width: int, source: str) -> None:
    """Raises UserError where tensors are no floating-point numbers, or the position embedding or a head of no network of this
    width."""
    whole = next((name for name, tensor in tensors.items() if not tensor.is_floating_point()), None)
    if whole is not None:
        kind = str(tensors[whole].dtype).removeprefix("torch.")
        raise UserError(f"{source}: {whole} holds {kind}: give weights in floating point")
    for name, before in (("pos_embed", 2), ("head.weight", 1), ("head_dist.weight", 1)):
        shape = tuple(tensors[name].shape) if name in tensors else (1,) * before + (width,)
        ones = (1,) * (before - 1)
        if width < 1 or len(shape) != before + 1 or shape[:-2] != ones or shape[-1] != width:
            raise UserError(f"{source}: {name} of shape {shape} is of no network of width {width}")


def differing(compared: Mapping[str, tuple[object, object]]) -> tuple[str, str] | None:
    """What the first two values are that are not the same, such as (`of width 64`, `of width 128`); None where all are."""
    for what, both in compared.items():
        if both[0] != both[1]:
            first, second = (_described(what, value) for value in both)
            return first, second
    return None


def _described(what: str, value: object) -> str:
    if isinstance(value, bool):
        return f"{'with' if value else 'without'} {what}"
    return f"of {what} {'x'.join(map(str, value)) if isinstance(value, tuple) else value}"


def _grid(
    positions: int, prefix: int, image_size: tuple[int, int] | None, patch: tuple[int, int], source: str
) -> tuple[tuple[int, int], bool]:
    """(patches down and across, whether the first positions are those of class and distillation token)."""
    if image_size is not None:
        grid = image_size[0] // patch[0], image_size[1] // patch[1]
        if positions - grid[0] * grid[1] in (0, prefix):
            return grid, positions != grid[0] * grid[1]
    for before in (prefix, 0):
        side = math.isqrt(max(0, positions - before))
        if side and side * side == positions - before:
            return (side, side), bool(before)
    raise UserError(f"{source}: its {positions} positions are of no square image: give the folder of the run")


# ------------------------------------------------------------------------------------------------------ timm


def _of_timm(name: str, base: str, file: Path | None) -> Source:
    import timm

    published = timm_config(base)
    network = timm_network(base, {}, f"--init {name}")
    if file is not None:
        weights = read_weights(file)
    else:
        if not (published.hf_hub_id or published.url):
            raise UserError(f"--init {name}: has no published weights: give {name}@FILE")
        overlay = None if hub_reachable() else {"file": cached_weights(base, published, f"{INSTEAD} as {{name}}@FILE")}
        with downloads(base, f"{INSTEAD} as {{name}}@FILE"):
            weights = timm.create_model(base, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    tensors, layout, left_out = to_ours(weights, f"--init {name}")
    known = known_of_timm(network)
    architecture, assumed = _architecture(tensors, layout, known, None, f"--init {name}")
    named_and_found = {
        "width": (network.embed_dim, architecture.width),
        "depth": (len(network.blocks), architecture.depth),
        "patch size": (tuple(network.patch_embed.patch_size), architecture.patch_size),
        "distillation token": (hasattr(network, "dist_token"), architecture.distillation_token),
    }
    if (texts := differing(named_and_found)) is not None:
        raise UserError(f"--init {name}: {base} is {texts[0]}, the weights in {file} are {texts[1]}")
    preprocessing = as_preprocessing(
        architecture.image_size,
        published.mean,
        published.std,
        published.interpolation,
        published.crop_pct,
        architecture.channels,
    )
    facts = InitFacts(name=base, architecture=architecture, preprocessing=preprocessing, assumed=tuple(assumed))
    return Source(facts, tensors, layout, left_out)


# ----------------------------------------------------------------------------------------------- Hugging Face


def _downloaded(name: str) -> Path:
    """The folder of a network of the hub, downloaded or out of the hub's cache. Raises UserError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # found there by its __getattr__

    repository = name.removeprefix(HUB)
    try:
        validate_repo_id(repository)
        owned = repository.count("/") == 1
    except HFValidationError:
        owned = False
    if not owned:
        raise UserError(f"--init {name}: write {HUB}OWNER/NAME, such as {HUB}facebook/deit-tiny-patch16-224")
    offline = not hub_reachable()
    found: list[str] = []
    with downloads(name, INSTEAD):
        for file in ("config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin"):
            if file == "pytorch_model.bin" and found[-1].endswith(".safetensors"):
                break
            try:
                found.append(hf_hub_download(repository, file, local_files_only=offline))
            except LocalEntryNotFoundError:
                if file != "preprocessor_config.json" and file != "model.safetensors":
                    raise
            except EntryNotFoundError as error:
                if file != "preprocessor_config.json" and file != "model.safetensors":
                    raise UserError(f"--init {name}: there is no {file}") from error
    return Path(found[0]).parent
