"""What stands beside a file of weights: a folder's `config.json`, of Hugging Face or of timm, or the name of a timm network.

Weights to start a student from, wherever they are, under our names, and what they say of themselves.

A name is one of

    PATH              the folder of a run; a file of weights with names that `layouts` knows; or a folder that holds such a
                      file and `config.json`, as Hugging Face's networks are kept
    NAME              a timm vision transformer with published weights, such as `deit_small_distilled_patch16_224.fb_in1k`
    NAME@FILE         the same, with the weights out of a file
    hf:OWNER/NAME     a network of the Hugging Face hub, such as `hf:facebook/deit-base-distilled-patch16-224`

A file shows width, depth, patches and tokens, but not how many heads its attention has: that, and what images it wants, is
assumed as published networks have it, and said, where nothing beside the file tells it: a `config.json` as Hugging Face or timm
write it, or the name.

A student that begins with weights which are there already: what it takes of them, what is resized, what stays fresh.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import nn

from deitkit.config import (
    Config,
    Preprocessing,
    StudentConfig,
)
from deitkit.data import Dataset
from deitkit.models.cnn import IMAGENET_MEAN, IMAGENET_STD, as_preprocessing, timm_config
from deitkit.models.vit import ViT, ViTConfig, resized_positions
from deitkit.models.weights import (
    LAYOUTS,
    Tensors,
    cached_weights,
    downloads,
    expanded,
    hub_reachable,
    read_weights,
    split_name,
    to_ours,
)
from deitkit.models.zoo import DEIT3_LAYER_SCALE, HALF, STUDENTS, load_model
from deitkit.settings import load_yaml, validated
from deitkit.terminal import UserError, shortened, write_atomically


class InitFacts(Config):
    """What weights to start from say of themselves, or what is assumed of them."""

    name: str
    architecture: ViTConfig
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None = None
    """the names of its classes, where they are known"""
    assumed: tuple[str, ...] = ()
    """what the weights do not show and nothing beside them says"""


FAMILY = ("VisionTransformer", "VisionTransformerDistilled")
"""timm's classes that a student can be."""


class Known(NamedTuple):
    """What stands beside a file of weights."""

    heads: int | None = None
    epsilon: float | None = None
    image_size: tuple[int, int] | None = None
    preprocessing: Preprocessing | None = None


# ------------------------------------------------------------------------------------------------------ timm


def beside_timm(folder: Path, source: str) -> Known:
    """What `config.json` says, in the words of timm: `architecture`, `model_args`, and `pretrained_cfg`, which older files have
    without that name around it. Nothing where there is none of timm's. Raises UserError."""
    file = folder / "config.json"
    config = _json(file)
    architecture, arguments = config.get("architecture"), config.get("model_args", {})
    if not isinstance(architecture, str):
        return Known()
    if not isinstance(arguments, dict):
        raise UserError(f"{file}: model_args: is not as expected")
    images = config.get("pretrained_cfg", config)
    try:
        channels, *size = images["input_size"]
        preprocessing = as_preprocessing(
            (size[0], size[1]),
            images["mean"],
            images["std"],
            images["interpolation"],
            images["crop_pct"],
            int(arguments.get("in_chans", channels)),
        )
    except KeyError as error:
        raise UserError(f"{file}: lacks {error}") from error
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{file}: is not as expected: {_why(error)}") from error
    network = timm_network(architecture, {"img_size": tuple(size), **arguments}, source)
    return known_of_timm(network)._replace(preprocessing=preprocessing)


def timm_network(name: str, arguments: dict[str, Any], source: str) -> Any:
    """timm's network of that name and these arguments, without numbers. Raises UserError where it is none, or one that computes
    something that a student does not, though names of tensors may agree."""
    import timm

    try:
        with torch.device("meta"):
            network: Any = timm.create_model(name, **arguments)
    except Exception as error:  # whatever a constructor makes of arguments that somebody wrote
        raise UserError(f"{source}: timm makes no network {shortened(name)}: {_why(error)}") from error
    if type(network).__name__ not in FAMILY or network.global_pool != "token":
        raise UserError(f"{source}: is no ViT, DeiT or DeiT III with a class token: these alone can be a student")
    to_ours(network.state_dict(), source)
    activation = network.blocks[0].mlp.act
    if not isinstance(activation, nn.GELU) or getattr(activation, "approximate", "none") != "none":
        raise UserError(f"{source}: its blocks have {type(activation).__name__}, a student has GELU: take another")
    return network


def known_of_timm(network: Any) -> Known:
    height, across = network.patch_embed.img_size
    return Known(
        heads=int(network.blocks[0].attn.num_heads),
        epsilon=float(network.norm.eps),
        image_size=(int(height), int(across)),
    )


# ----------------------------------------------------------------------------------------------- Hugging Face


def beside_hugging_face(folder: Path) -> Known:
    """What `config.json` and `preprocessor_config.json` say, in the words of transformers. Raises UserError."""
    known = Known()
    config, images = _json(folder / "config.json"), _json(folder / "preprocessor_config.json")
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{folder / 'config.json'}: hidden_act {config['hidden_act']!r}, a student has gelu")
    try:
        if config:
            size = config["image_size"]
            known = known._replace(
                heads=int(config["num_attention_heads"]),
                epsilon=float(config["layer_norm_eps"]),
                image_size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
            )
        if images:
            mean, std = images["image_mean"], images["image_std"]
            resized, cropped = _side(images["size"]), _side(images.get("crop_size"))
            fraction = _fraction(cropped, resized) if cropped and resized and images.get("do_center_crop") else 1.0
            way = {0: "nearest", 2: "bilinear", 3: "bicubic"}.get(
                images.get("resample", 3), "bicubic"
            )  # Pillow's numbers
            side = cropped or resized or 224
            known = known._replace(preprocessing=as_preprocessing((side, side), mean, std, way, fraction, len(mean)))
    except KeyError as error:
        raise UserError(f"{folder}: config.json or preprocessor_config.json lacks {error}") from error
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise UserError(
            f"{folder}: config.json or preprocessor_config.json: is not as expected: {_why(error)}"
        ) from error
    return known


def _fraction(cropped: int, resized: int) -> float:
    """The share of `resized` pixels that the crop has, such that dividing by it and rounding down gives `resized` again."""
    fraction = min(1.0, cropped / resized)
    return math.nextafter(fraction, 0) if math.floor(cropped / fraction) < resized else fraction


def _side(size: Any) -> int | None:
    """Pixels of the shorter side, in any of the ways in which transformers has written it."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return None if size is None else int(size)


def _why(error: Exception) -> str:
    return shortened(" ".join(str(error).split()))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


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


FACTS = "start.json"
"""In a run's folder: what the weights said of themselves that it began with."""
HEADS = ("head", "head_dist")


class Start(NamedTuple):
    """What a student starts from; `source` is None where a checkpoint takes its place."""

    facts: InitFacts
    source: Source | None


def find_start(student: StudentConfig, resumed: Path | None = None) -> Start | None:
    """The weights that `student.init` names. `resumed`: folder of a run that is resumed. Where it has a checkpoint the weights are
    not needed any more, only the facts that the run kept of them. Raises UserError."""
    if student.init is None:
        return None
    if resumed is not None and ((resumed / "summary.json").is_file() or any((resumed / "checkpoints").glob("step-*"))):
        kept = resumed / FACTS
        if kept.is_file():
            return Start(_read(kept), None)
    named = STUDENTS.get(student.student or "")
    source = find_init(student.init, student.heads or (named.heads if named else None))
    return Start(source.facts, source._replace(place=student.init))


def keep(start: Start, run: Path) -> None:
    write_atomically(run / FACTS, start.facts.model_dump_json(indent=2) + "\n")


def _read(path: Path) -> InitFacts:
    return validated(InitFacts, load_yaml(path), str(path))  # JSON is YAML


def refuse_misfit(config: ViTConfig, facts: InitFacts) -> None:
    """Raises UserError, naming both, where a student of this shape cannot take these weights."""
    theirs = facts.architecture
    compared = {
        "stem": (config.stem, theirs.stem),
        "patch size": (config.patch_size, theirs.patch_size),
        "width": (config.width, theirs.width),
        "depth": (config.depth, theirs.depth),
        "heads": (config.heads, theirs.heads),
        "mlp width": (int(config.width * config.mlp_ratio), int(theirs.width * theirs.mlp_ratio)),
        "layer scale": (config.layer_scale is not None, theirs.layer_scale is not None),
        "position of the class token": (config.position_of_prefix, theirs.position_of_prefix),
        "channels": (config.channels, theirs.channels),
    }
    if (texts := differing(compared)) is not None:
        raise UserError(
            f"--init {facts.name}: is {texts[1]}, the student {texts[0]}: leave out what shapes the student, "
            f"or give other weights"
        )


def start_preprocessing(config: ViTConfig, facts: InitFacts, *, photos: bool) -> Preprocessing:
    """That of the weights, at the student's size; what is no photo is not cropped."""
    changes = {"image_size": config.image_size} | ({} if photos else {"crop_pct": 1.0})
    return facts.preprocessing.model_copy(update=changes)


def take(vit: ViT, start: Start, dataset: Dataset) -> list[str]:
    """`take_tensors` of what `start` has at hand. Returns what there is to say."""
    if start.source is None:
        return []
    lines = take_tensors(vit, start.source, dataset.classes)
    if dataset.channels != vit.config.channels:
        colours = {1: "grey", 3: "in three colours"}
        lines.append(
            f"start: these weights see images {colours.get(vit.config.channels)}, the data are "
            f"{colours.get(dataset.channels)}: they are shown to them that way"
        )
    return lines


@torch.no_grad()
def take_tensors(vit: ViT, source: Source, classes: Sequence[str]) -> list[str]:
    """Put into a fresh student what it can take of `source`. Returns lines that say what became of what.

    The heads stay fresh where the classes are others; a distillation token, its position and its head where `source` has none.
    The position embedding is resized to the student's patches. Raises UserError where something else does not fit."""
    config, theirs = vit.config, source.facts.architecture
    refuse_misfit(config, source.facts)
    tensors, fresh = dict(source.tensors), dict[str, str]()
    known = source.facts.classes
    for head in HEADS:
        weight = tensors.get(f"{head}.weight")
        if weight is not None and len(weight) != config.classes:
            fresh[head] = f"{len(weight)} classes there, {config.classes} here"
        elif weight is not None and known is not None and known != tuple(classes):
            fresh[head] = "other classes there"
    tensors = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] not in fresh}
    positions_1TD = tensors.pop("pos_embed").float()
    own = vit.state_dict()
    _take_positions(own["pos_embed"], positions_1TD, config, theirs)
    taken = 1
    for name, tensor in own.items():
        if name in tensors:
            if tensors[name].shape != tensor.shape:
                shapes = f"{tuple(tensors[name].shape)} there, {tuple(tensor.shape)} here"
                raise UserError(f"--init {source.facts.name}: {name} does not fit: {shapes}")
            tensor.copy_(tensors[name])
            taken += 1
        elif name.partition(".")[0] in (*HEADS, "dist_token"):
            fresh.setdefault(name.partition(".")[0], "not there")
        elif name != "pos_embed":
            raise UserError(f"--init {source.facts.name}: these weights lack {name}")
    broken = next((name for name, tensor in own.items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise UserError(f"--init {source.facts.name}: {broken} holds infinity or NaN")
    if theirs.grid != config.grid:
        resized = "; position embedding resized from {}x{} to {}x{} patches".format(*theirs.grid, *config.grid)
    else:
        resized = ""
    fresh = {
        name: why
        for name, why in fresh.items()
        if name in ("head", *(("dist_token", "head_dist") if vit.head_dist else ()))
    }
    name = source.facts.name
    named = name if source.place in ("", name) else f"{source.place}: {name}"
    lines = [f"start: {taken} of {len(own)} tensors from {named} ({_title(source.layout)}){resized}"]
    if fresh:
        lines.append("start: fresh: " + ", ".join(f"{name} ({why})" for name, why in sorted(fresh.items())))
    left = sorted([*source.left_out, *(name for name in source.tensors if name not in own)])
    if theirs.prefix_positions > config.prefix_positions:
        left.append("position of dist_token")
    if left:
        lines.append(f"start: left out: {shortened(', '.join(left), 160)}")
    if source.facts.assumed:
        lines.append(f"start: nothing beside the weights says it, so assumed: {', '.join(source.facts.assumed)}")
    return lines


def _take_positions(
    own_1TD: Float[torch.Tensor, "1 T D"],
    theirs_1TD: Float[torch.Tensor, "1 t D"],
    config: ViTConfig,
    theirs: ViTConfig,
) -> None:
    """In place: class token's, distillation token's if both have one, patches' resized."""
    both = min(config.prefix_positions, theirs.prefix_positions)
    own_1TD[:, :both] = theirs_1TD[:, :both]
    own_1TD[:, config.prefix_positions :] = resized_positions(
        theirs_1TD[:, theirs.prefix_positions :], theirs.grid, config.grid
    )


def _title(layout: str) -> str:
    return "deitkit" if layout == "deitkit" else LAYOUTS[layout].title
