"""Weights that a student starts from (`--init`): found wherever they are, under our names, and loaded into the student.

A name is one of

    shipped:STUDENT   the pretrained weights of a student that come with this package: `deit_photo`
    PATH              a run folder; a file of weights in a layout that `weights` knows; or a folder with such a file and
                      `config.json`, as Hugging Face and timm write it
    NAME              a timm vision transformer with published weights, such as `deit_small_distilled_patch16_224.fb_in1k`
    NAME@FILE         the same, with the weights of a file
    hf:OWNER/NAME     a network of the Hugging Face hub, such as `hf:facebook/deit-base-distilled-patch16-224`

The tensors of a file show width, depth, patches and tokens, but neither the number of attention heads nor what images the
network wants. That comes from `config.json` or the timm name; else it is assumed to be as in published networks, and reported.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from deitkit.config import SHIPPED, Config, Preprocessing, StudentConfig
from deitkit.models.cnn import IMAGENET_MEAN, IMAGENET_STD, as_preprocessing, timm_config
from deitkit.models.vit import ViT, ViTConfig, resized_positions
from deitkit.models.weights import (
    HUB,
    INSTEAD,
    LAYOUTS,
    Tensors,
    check_finite,
    check_fit,
    hub_folder,
    last_line,
    open_weights,
    read_weights,
    split_name,
    to_ours,
    weights_of,
)
from deitkit.models.zoo import DEIT3_LAYER_SCALE, HALF, STUDENTS, load_model, student_preprocessing
from deitkit.settings import SHIPPED_STUDENTS, validated
from deitkit.terminal import UserError, expanded, load_yaml, parse_json, shortened, write_atomically

FACTS_FILE = "start.json"
"""In a run folder: the `InitFacts` of the weights that it started from."""
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
HEADS = ("head", "head_dist")
HEAD_WIDTH = 64
"""Channels of one attention head in every published ViT, DeiT and DeiT III."""
TIMM_EPSILON, HUGGING_FACE_EPSILON = 1e-6, 1e-12
TIMM_CLASSES = ("VisionTransformer", "VisionTransformerDistilled")
"""timm's classes that a student can be."""
PILLOW_FILTERS = {"nearest": 0, "bilinear": 2, "bicubic": 3}
"""Pillow's numbers, which transformers writes."""
SHIPPED_WEIGHTS = Path(__file__).parent / "pretrained"
TITLES = {"deitkit": "deitkit", "shipped": "pretrained without labels; --init scratch does without"}
COLOURS = {1: "grey", 3: "RGB"}


class InitFacts(Config):
    """What is known of weights to start from."""

    name: str
    architecture: ViTConfig
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None = None
    """the names of its classes, if known"""
    assumed: tuple[str, ...] = ()
    """what neither the weights nor a file with them say"""


class InitWeights(NamedTuple):
    """Weights to start from, under our names; no tensors if a checkpoint replaces them."""

    facts: InitFacts
    tensors: Tensors
    layout: str = "deitkit"
    left_out: Sequence[str] = ()
    taken_off: Sequence[str] = ()
    """wrappers that were around the tensors"""
    place: str = ""
    """what the user gave as `--init`"""


class FileFacts(NamedTuple):
    """What the files with a file of weights say of it."""

    heads: int | None = None
    epsilon: float | None = None
    image_size: tuple[int, int] | None = None
    preprocessing: Preprocessing | None = None


def find_start(student: StudentConfig, resumed: Path | None = None) -> InitWeights | None:
    """The weights that `student.init` names. `resumed`: the folder of a run that is resumed. If it has a checkpoint, the weights
    are not needed any more, only the facts that the run saved of them. Raises UserError."""
    if student.init is None or student.is_fresh:
        return None
    if resumed is not None and ((resumed / "summary.json").is_file() or any((resumed / "checkpoints").glob("step-*"))):
        saved = resumed / FACTS_FILE
        if saved.is_file():
            return InitWeights(validated(InitFacts, load_yaml(saved), str(saved)), {})  # JSON is YAML
    named = STUDENTS.get(student.student or "")
    return find_init(student.init, student.heads or (named.heads if named else None))._replace(place=student.init)


def save_start(facts: InitFacts, run: Path) -> None:
    write_atomically(run / FACTS_FILE, facts.model_dump_json(indent=2) + "\n")


def find_init(name: str, heads: int | None = None) -> InitWeights:
    """The weights that `name` names, on the CPU. `heads`: the number of attention heads if nothing else says it. Raises
    UserError."""
    path = expanded(name)
    if name.startswith(SHIPPED) and not path.exists():
        return _shipped(name.removeprefix(SHIPPED))
    if name.startswith(HUB) and not path.exists():
        path = hub_folder(name)
    if path.is_dir():
        return _of_folder(path, name, heads)
    if path.is_file():
        return _of_file(path, name, heads)
    base, file = split_name(name)
    if "/" in base or base.endswith(SUFFIXES):
        raise UserError(f"--init {name}: no such run folder or file of weights (networks of the hub: {HUB}OWNER/NAME)")
    if name in STUDENTS:
        raise UserError(f"--init {name}: is a student: give --student {name} --init auto, or where its weights are")
    return _of_timm(name, base, file)


# ---------------------------------------------------------------------------------------------- into a student


@torch.no_grad()
def load_into_student(vit: ViT, weights: InitWeights, classes: Sequence[str], channels: int | None = None) -> list[str]:
    """Load into a fresh student what fits it. Returns lines for the log: what was loaded, resized, left fresh and left out.

    The heads stay fresh if the classes are others; a distillation token, its position and its head if `weights` have none.
    The position embedding is resized to the student's patches. `channels`: of the data. Raises UserError if anything else
    does not fit."""
    config, theirs, name = vit.config, weights.facts.architecture, weights.facts.name
    if not weights.tensors:
        return []
    check_same_shape(config, weights.facts)
    own, tensors, fresh = vit.state_dict(), dict(weights.tensors), dict[str, str]()
    known = weights.facts.classes
    for head in HEADS:
        rows = len(tensors.get(f"{head}.weight", ()))
        if rows and rows != config.classes:
            fresh[head] = f"{rows} classes there, {config.classes} here"
        elif rows and known is not None and known != tuple(classes):
            fresh[head] = "other classes there"
    for part in (*HEADS, "dist_token"):
        if not any(key.partition(".")[0] == part for key in tensors):
            fresh[part] = "not in these weights"
    positions_1TD = tensors["pos_embed"].float()
    wanted = {key: tensor for key, tensor in own.items() if key != "pos_embed" and key.partition(".")[0] not in fresh}
    tensors = {key: tensor for key, tensor in tensors.items() if key in wanted}
    check_fit(wanted, tensors, f"--init {name}")
    for key, tensor in tensors.items():
        own[key].copy_(tensor)
    ours, prefix = config.prefix_positions, theirs.prefix_positions
    own["pos_embed"][:, : min(ours, prefix)] = positions_1TD[:, : min(ours, prefix)]
    own["pos_embed"][:, ours:] = resized_positions(positions_1TD[:, prefix:], theirs.grid, config.grid)
    check_finite(own, f"--init {name}")

    title = TITLES.get(weights.layout) or LAYOUTS[weights.layout].title
    place = name if weights.place in ("", name) else f"{weights.place}: {name}"
    line = f"init: loaded {len(tensors) + 1} of {len(own)} tensors from {place} ({title})"
    if theirs.grid != config.grid:
        line += "; position embedding resized from {}x{} to {}x{} patches".format(*theirs.grid, *config.grid)
    lines = [line]
    present = {key.partition(".")[0] for key in own}
    if new := [f"{part} ({why})" for part, why in sorted(fresh.items()) if part in present]:
        lines.append(f"init: newly initialised: {', '.join(new)}")
    left = sorted([*weights.left_out, *(key for key in weights.tensors if key not in own)])
    if prefix > ours:
        left.append("position of dist_token")
    if weights.taken_off:
        lines.append(f"init: taken off: {', '.join(weights.taken_off)}")
    if left:
        lines.append(f"init: not loaded: {shortened(', '.join(left), 160)}")
    if weights.facts.assumed:
        lines.append(f"init: assumed, for no file says it: {', '.join(weights.facts.assumed)}")
    if channels not in (None, config.channels):
        seen, given = COLOURS.get(config.channels), COLOURS.get(channels or 0)
        lines.append(f"init: these weights expect {seen} images, the data are {given}: images are converted")
    return lines


def check_same_shape(config: ViTConfig, facts: InitFacts) -> None:
    """Raises UserError, naming both, if a student of this shape cannot load these weights."""
    theirs = facts.architecture
    compared = {
        "stem": (theirs.stem, config.stem),
        "patch size": (theirs.patch_size, config.patch_size),
        "width": (theirs.width, config.width),
        "depth": (theirs.depth, config.depth),
        "heads": (theirs.heads, config.heads),
        "mlp width": (int(theirs.width * theirs.mlp_ratio), int(config.width * config.mlp_ratio)),
        "layer scale": (theirs.layer_scale is not None, config.layer_scale is not None),
        "position of the class token": (theirs.position_of_prefix, config.position_of_prefix),
        "channels": (theirs.channels, config.channels),
    }
    if differing := first_difference("the weights file", "the student", compared):
        raise UserError(f"--init {facts.name}: {differing}: leave out what shapes the student, or give other weights")


def first_difference(one: str, other: str, compared: Mapping[str, tuple[object, object]]) -> str | None:
    """Such as `ONE has width 64, OTHER 128`; None if no two values differ."""
    for what, (first, second) in compared.items():
        if isinstance(first, bool) and first != second:
            return f"{one} has {'a' if first else 'no'} {what}, {other} has {'one' if second else 'none'}"
        if first != second:
            first, second = ("x".join(map(str, v)) if isinstance(v, tuple) else v for v in (first, second))
            return f"{one} has {what} {first}, {other} {second}"
    return None


def start_preprocessing(config: ViTConfig, facts: InitFacts, *, photos: bool) -> Preprocessing:
    """That of the weights, at the student's size; only photos are cropped."""
    changes = {"image_size": config.image_size} | ({} if photos else {"crop_pct": 1.0})
    return facts.preprocessing.model_copy(update=changes)


# ----------------------------------------------------------------------------------------- where weights are


def _shipped(name: str) -> InitWeights:
    if name not in SHIPPED_STUDENTS:
        raise UserError(f"--init {SHIPPED}{name}: shipped are weights of {' and '.join(SHIPPED_STUDENTS)}")
    file = SHIPPED_WEIGHTS / f"{name}.safetensors"
    tensors = read_weights(file)
    student = STUDENTS[name]
    side = math.isqrt(tensors["pos_embed"].shape[1] - student.prefix_positions) * student.patch_size[0]
    shape = student.model_copy(update={"image_size": (side, side)})
    facts = InitFacts(
        name=f"{SHIPPED}{name}", architecture=shape, preprocessing=student_preprocessing(shape, photos=True)
    )
    return InitWeights(facts, tensors, "shipped")


def _of_run(model: Path, name: str) -> InitWeights:
    network, card = load_model(model)
    if not isinstance(card.architecture, ViTConfig):
        raise UserError(f"--init {name}: {card.name} is a convolutional network: give a vision transformer's weights")
    assert isinstance(network.body, ViT)
    if card.head_scales:  # training continues with the heads as they were trained
        network.body.scale_heads([1 / scale for scale in card.head_scales])
    facts = InitFacts(
        name=card.name, architecture=card.architecture, preprocessing=card.preprocessing, classes=card.classes
    )
    return InitWeights(facts, network.body.state_dict())


def _of_folder(folder: Path, name: str, heads: int | None) -> InitWeights:
    for model in (folder / "model", folder):
        if (model / "model.json").is_file():
            return _of_run(model, name)
    weights = [path for end in SUFFIXES for path in sorted(folder.glob(f"*{end}"))]
    if (folder / "config.json").is_file() and weights:
        return _of_file(weights[0], name, heads)
    raise UserError(f"--init {name}: not the folder of a finished run: model/model.json is missing")


def _of_file(path: Path, name: str, heads: int | None) -> InitWeights:
    where, folder = f"--init {name}", path.parent
    weights, taken_off = open_weights(path)
    tensors, layout, left_out = to_ours(weights, where)
    facts = FileFacts()
    if layout.startswith("hf"):
        facts = read_hugging_face_config(folder)
    elif layout != "deitkit":
        facts = read_timm_config(folder, where)
    elif (folder / "model.json").is_file():
        return _of_run(folder, name)
    return InitWeights(
        _init_facts(path.stem, tensors, layout, facts, heads, where), tensors, layout, left_out, taken_off
    )


def _of_timm(name: str, base: str, file: Path | None) -> InitWeights:
    import timm

    where, published = f"--init {name}", timm_config(base)
    network = timm_network(base, where)
    taken_off: tuple[str, ...] = ()
    if file is not None:
        weights, taken_off = open_weights(file)
    elif not (published.hf_hub_id or published.url):
        raise UserError(f"{where}: has no published weights: give {name}@FILE")
    else:
        with weights_of(base, f"{INSTEAD} as {{name}}@FILE, or --init scratch"), torch.random.fork_rng(devices=[]):
            weights = timm.create_model(base, pretrained=True).state_dict()
    tensors, layout, left_out = to_ours(weights, where)
    facts = _init_facts(base, tensors, layout, _timm_facts(network, None, where), None, where)
    shape = facts.architecture
    compared = {
        "width": (network.embed_dim, shape.width),
        "depth": (len(network.blocks), shape.depth),
        "patch size": (tuple(network.patch_embed.patch_size), shape.patch_size),
        "distillation token": (hasattr(network, "dist_token"), shape.distillation_token),
    }
    if differing := first_difference(base, f"the file {file}", compared):
        raise UserError(f"{where}: {differing}")
    return InitWeights(facts, tensors, layout, left_out, taken_off)


# --------------------------------------------------------------------------------------- what the files say


def read_timm_config(folder: Path, source: str) -> FileFacts:
    """What timm's `config.json` says: nothing if there is none of timm's. Raises UserError."""
    config = _json(folder / "config.json")
    if "architecture" not in config:
        return FileFacts()
    network = timm_network(f"local-dir:{folder}", source)
    sized = "img_size" in config.get("model_args", {})
    return _timm_facts(
        network, None if sized else network.pretrained_cfg["input_size"][1:], str(folder / "config.json")
    )


def timm_network(name: str, source: str) -> Any:
    """timm's network of that name, or of the `config.json` in `local-dir:FOLDER`, on the meta device. Raises UserError if there
    is none, or it computes something that a student does not, though names of tensors may agree."""
    import timm

    try:
        with torch.device("meta"):
            network: Any = timm.create_model(name)
    except Exception as error:  # a constructor raises anything on arguments from a file
        raise UserError(f"{source}: timm makes no network of {name}: {shortened(last_line(error))}") from error
    if type(network).__name__ not in TIMM_CLASSES or network.global_pool != "token":
        raise UserError(f"{source}: not a ViT, DeiT or DeiT III with a class token: only these can be a student")
    to_ours(network.state_dict(), source)
    activation = network.blocks[0].mlp.act
    if not isinstance(activation, nn.GELU) or getattr(activation, "approximate", "none") != "none":
        raise UserError(f"{source}: its blocks have {type(activation).__name__}, a student has GELU: take another")
    return network


def _timm_facts(network: Any, size: Sequence[int] | None, source: str) -> FileFacts:
    """`size`: height and width of images, if `network` was not built for them."""
    images, channels = network.pretrained_cfg, network.patch_embed.proj.in_channels
    with _sensible(source):
        height, width = network.patch_embed.img_size if size is None else size
        mean, std, interpolation, crop_pct = (images[key] for key in ("mean", "std", "interpolation", "crop_pct"))
        preprocessing = as_preprocessing((height, width), mean, std, interpolation, crop_pct, channels)
    return FileFacts(network.blocks[0].attn.num_heads, network.norm.eps, (height, width), preprocessing)


def read_hugging_face_config(folder: Path) -> FileFacts:
    """What `config.json` and `preprocessor_config.json` of transformers say. Raises UserError."""
    facts = FileFacts()
    config, images = _json(folder / "config.json"), _json(folder / "preprocessor_config.json")
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{folder / 'config.json'}: hidden_act {config['hidden_act']!r}, a student has gelu")
    with _sensible(f"{folder}: config.json or preprocessor_config.json"):
        if config:
            size = config["image_size"]
            facts = facts._replace(
                heads=int(config["num_attention_heads"]),
                epsilon=float(config["layer_norm_eps"]),
                image_size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
            )
        if images:
            mean, std = images["image_mean"], images["image_std"]
            resized, cropped = _side(images["size"]), _side(images.get("crop_size"))
            crop_pct = _crop_pct(cropped, resized) if cropped and resized and images.get("do_center_crop") else 1.0
            numbers = {number: name for name, number in PILLOW_FILTERS.items()}
            interpolation = numbers.get(images.get("resample", 3), "bicubic")
            side = cropped or resized or 224
            preprocessing = as_preprocessing((side, side), mean, std, interpolation, crop_pct, len(mean))
            facts = facts._replace(preprocessing=preprocessing)
    return facts


@contextlib.contextmanager
def _sensible(where: str) -> Iterator[None]:
    """Turns what a configuration file lacks, or has in another form, into one line."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{where}: lacks {error}") from error
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{where}: unexpected content: {shortened(last_line(error))}") from error


def _crop_pct(cropped: int, resized: int) -> float:
    """The crop's share of `resized` pixels, such that dividing by it and rounding down gives `resized` again."""
    share = min(1.0, cropped / resized)
    return math.nextafter(share, 0) if math.floor(cropped / share) < resized else share


def _side(size: Any) -> int | None:
    """Pixels of the shorter side, in any of the ways in which transformers has written it."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return None if size is None else int(size)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


# ------------------------------------------------------------------------------------ what the tensors show


def _init_facts(
    name: str, tensors: Tensors, layout: str, facts: FileFacts, heads: int | None, source: str
) -> InitFacts:
    """The network that has these tensors. `facts` go before `heads`, and that before what is assumed."""
    try:
        positions = tensors["pos_embed"].shape[1]
        width, channels, height, across = tensors["stem.proj.weight"].shape
        depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
        hidden = tensors["blocks.0.mlp.0.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{source}: lacks parts of a vision transformer with a patch embedding: give the run folder"
        ) from error
    _check_tensors(tensors, width, source)
    token = "dist_token" in tensors
    grid, of_prefix = _grid(positions, 2 if token else 1, facts.image_size, (height, across), source)
    assumed = []
    if facts.heads is None:
        heads = heads or max(1, width // HEAD_WIDTH)
        assumed.append(f"{heads} attention heads")
    epsilon = facts.epsilon
    if epsilon is None:
        epsilon = HUGGING_FACE_EPSILON if layout.startswith("hf") else TIMM_EPSILON
        assumed.append(f"epsilon {epsilon:g} in norms")
    size = facts.image_size
    if size is None or grid != (size[0] // height, size[1] // across):
        assumed.append(f"a square of {grid[0]}x{grid[1]} patches")
    values = {
        "image_size": (grid[0] * height, grid[1] * across),
        "channels": channels,
        "classes": tensors["head.weight"].shape[0] if "head.weight" in tensors else 1,
        "patch_size": (height, across),
        "width": width,
        "depth": depth,
        "heads": facts.heads or heads,
        "mlp_ratio": hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width,
        "distillation_token": token,
        "norm_epsilon": epsilon,
        "layer_scale": DEIT3_LAYER_SCALE if "blocks.0.scale1" in tensors else None,
        "position_of_prefix": of_prefix,
    }
    architecture = validated(ViTConfig, values, source)
    preprocessing = facts.preprocessing
    if preprocessing is None:
        plain = layout.endswith("vit")
        mean, std = (HALF, HALF) if plain else (IMAGENET_MEAN, IMAGENET_STD)
        assumed.append("mean and deviation 0.5" if plain else "ImageNet's mean and deviation")
        preprocessing = as_preprocessing(architecture.image_size, mean, std, "bicubic", 0.875, channels)
    preprocessing = preprocessing.model_copy(update={"image_size": architecture.image_size})
    return InitFacts(name=name, architecture=architecture, preprocessing=preprocessing, assumed=tuple(assumed))


def _check_tensors(tensors: Tensors, width: int, source: str) -> None:
    """Raises UserError for tensors of integers or complex numbers, and for a position embedding or head of another width."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{source}: {name} holds {kind}: give weights in floating point")
    for name, ones in (("pos_embed", (1,)), ("head.weight", ()), ("head_dist.weight", ())):
        shape = tuple(tensors[name].shape) if name in tensors else (*ones, 1, width)
        if width < 1 or len(shape) < 2 or shape[:-2] != ones or shape[-1] != width:
            raise UserError(f"{source}: {name} of shape {shape} does not fit a network of width {width}")


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
    raise UserError(f"{source}: its {positions} positions are no square of patches: give the run folder")
