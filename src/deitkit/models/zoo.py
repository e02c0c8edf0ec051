"""Networks on disk, `model.safetensors` with `model.json`; named students, chosen for the data; what they cost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError, model_validator
from torch.utils.flop_counter import FlopCounterMode

from deitkit.config import (
    SHAPE,
    Config,
    Positive,
    Preprocessing,
    Size,
    StudentConfig,
)
from deitkit.data.dataset import is_small
from deitkit.models.cnn import IMAGENET_MEAN, IMAGENET_STD, CNNConfig, build_cnn
from deitkit.models.network import Network, on_meta
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.weights import check_finite, check_fit, read_weights
from deitkit.settings import PUBLISHED_STUDENTS, SHIPPED_STUDENTS, explain, validated
from deitkit.terminal import UserError, quoted, save_tensors, shortened, unknown_name, write_atomically, written


class ModelCard(Config):
    """`model/model.json`: the network that the weights in `model.safetensors` belong to."""

    name: str
    architecture: ViTConfig | CNNConfig
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    weights: Literal["ema", "last"] = "last"
    """the moving average of the weights, or the last ones"""
    dataset: str = ""
    """what it was trained on"""
    head_scales: tuple[Positive, ...] = ()
    """the factor that each head was multiplied by after training, to calibrate its probabilities on the validation images"""

    @model_validator(mode="after")
    def _check(self) -> ModelCard:
        network, images = self.architecture, self.preprocessing
        if len(self.classes) != network.classes:
            raise ValueError(f"classes: {len(self.classes)} names for a head of {network.classes} classes")
        heads = network.prefix_tokens if isinstance(network, ViTConfig) else 1
        if len(self.head_scales) not in (0, heads):
            raise ValueError(f"head_scales: {len(self.head_scales)} for a network with {heads}")
        if isinstance(network, ViTConfig) and network.channels != images.channels:
            raise ValueError(f"preprocessing: {images.channels} channels, the network has {network.channels}")
        if isinstance(network, ViTConfig) and network.image_size != images.image_size:
            raise ValueError(f"preprocessing: images of {images.image_size}, the network wants {network.image_size}")
        return self


def build(card: ModelCard) -> Network:
    """The network that `card` describes, with fresh weights."""
    if isinstance(card.architecture, ViTConfig):
        return Network(ViT(card.architecture), card.preprocessing)
    network = build_cnn(card.architecture, image_size=card.preprocessing.image_size, pretrained=False)
    return Network(network.body, card.preprocessing)


def save_model(folder: Path, network: Network, card: ModelCard) -> None:
    """Write `model.safetensors` (names as in `network.body`) and `model.json` into `folder`."""
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
    save_tensors(network.body.state_dict(), folder / "model.safetensors")
    write_atomically(folder / "model.json", card.model_dump_json(indent=2) + "\n")


def read_card(folder: Path) -> ModelCard:
    """What `folder` says of its network. Raises UserError."""
    path = folder / "model.json"
    if not path.is_file():
        if (folder.parent / "config.yaml").is_file():
            raise UserError(
                f"{folder.parent}: this run is not finished: deit train --resume --out {quoted(folder.parent)} continues it"
            )
        raise UserError(f"{path}: no such file: is {folder.parent} the folder of a finished run?")
    try:
        return ModelCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path}: {explain(ModelCard, error)}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def load_model(folder: Path) -> tuple[Network, ModelCard]:
    """The network saved in `folder`, on the CPU and in eval mode. Raises UserError."""
    card, weights_path = read_card(folder), folder / "model.safetensors"
    if not weights_path.is_file():
        raise UserError(f"{weights_path}: no such file: is {folder.parent} the folder of a finished run?")
    tensors = read_weights(weights_path)
    # Our own networks get no initial weights: all that they hold is in the file. Constructors of others may compute more.
    ours = isinstance(card.architecture, ViTConfig) or card.architecture.name.startswith("cifar-resnet")
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta" if ours else "cpu"):
            network = build(card)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{folder / 'model.json'}: no such network can be built: {shortened(str(error))}") from error
    check_fit(network.body.state_dict(), tensors, str(weights_path))
    check_finite(tensors, str(weights_path))
    if ours:
        network.to_empty(device="cpu")
    network.body.load_state_dict(tensors)
    return network.eval(), card


# ------------------------------------------------------------------------------------------------------ students

IMAGENET_GREY_MEAN, IMAGENET_GREY_STD = (0.449,), (0.226,)
HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation of the plain ViT's images."""
DEIT3_LAYER_SCALE = 1e-4
DESCRIBED = {"image_size", "patch_size", "distillation_token", "layer_scale", "width", "depth", "stem", "classes"}
"""What `deit models --json` says of a student's shape, with its number of tokens and where its pretrained weights are."""
PLAIN_SUFFIX, PLAIN_VIT, DEIT3 = "_plain", "vit_", "deit3_"
SHAPES = {  # width, depth, heads, patch size
    "tiny": (192, 12, 3, 16),
    "small": (384, 12, 6, 16),
    "medium": (512, 12, 8, 16),
    "base": (768, 12, 12, 16),
    "large": (1024, 24, 16, 16),
    "huge": (1280, 32, 16, 14),
}


def _published_students(pattern: str, names: str, **changes: Any) -> dict[str, ViTConfig]:
    """The students of one paper: `names` are sizes, with the resolution after a `_` if it is not 224."""
    found = {}
    for name in names.split():
        size, _, pixels = name.partition("_")
        width, depth, heads, patch = SHAPES[size]
        shape = {"width": width, "depth": depth, "heads": heads, "patch_size": (patch, patch)}
        found[pattern.format(name)] = ViTConfig(image_size=(int(pixels or 224),) * 2, **shape, **changes)
    return found


_DEIT_SIZES = "tiny small base tiny_384 small_384 base_384"
_DEIT3_SIZES = "small small_384 medium base base_384 large large_384 huge"
STUDENTS: dict[str, ViTConfig] = {
    # Of this project, for images of 8 to 128 pixels
    "deit_pico": ViTConfig(image_size=(8, 8), channels=1, patch_size=(2, 2), stem="conv", width=48, depth=4, heads=3),
    "deit_nano": ViTConfig(image_size=(32, 32), patch_size=(4, 4), stem="conv", width=64, depth=6, heads=2),
    "deit_micro": ViTConfig(image_size=(32, 32), patch_size=(4, 4), stem="residual", width=96, depth=2, heads=3),
    "deit_mini": ViTConfig(image_size=(32, 32), patch_size=(4, 4), stem="conv", width=192, depth=6, heads=6),
    "deit_photo": ViTConfig(image_size=(128, 128), patch_size=(16, 16), stem="residual", width=192, depth=4, heads=3),
    # DeiT (arXiv 2012.12877, table 1) with its distillation token and plain
    **_published_students("deit_{}", _DEIT_SIZES),
    **_published_students("deit_{}" + PLAIN_SUFFIX, _DEIT_SIZES, distillation_token=False),
    # the ViT of the same shape (arXiv 2010.11929): only the mean and standard deviation of its images differ from a plain DeiT
    **_published_students(PLAIN_VIT + "{}", _DEIT_SIZES, distillation_token=False),
    # DeiT III (arXiv 2204.07118)
    **_published_students(
        DEIT3 + "{}", _DEIT3_SIZES, distillation_token=False, layer_scale=DEIT3_LAYER_SCALE, position_of_prefix=False
    ),
}


def choose_student(
    choice: StudentConfig,
    image_size: tuple[int, int] | None,
    channels: int,
    classes: int,
    start: ViTConfig | None = None,
) -> ViTConfig:
    """The student for these data: the named one, else the shape of the weights to `start` from, else one that fits the image
    size; single fields replaced.

    `image_size`: (height, width) shared by all images, or None for photos. A student of small images takes their size, or
    the nearest one that patches cover: the network resizes. A student with the shape of its weights keeps their size. Raises
    UserError."""
    if start is not None and choice.student is None:
        name, base = "of --init", start
    else:
        name = choice.student or fitting_student(image_size)
        if name not in STUDENTS:
            raise unknown_name("student", name, STUDENTS)
        base = STUDENTS[name]
    changes: dict[str, Any] = {"channels": channels, "classes": classes}
    if start is not None:
        changes["norm_epsilon"] = start.norm_epsilon
    if choice.image_size is not None:
        changes["image_size"] = (choice.image_size, choice.image_size)
    elif is_small(image_size) and is_small(base.image_size) and base is not start:
        patch = choice.patch_size or base.patch_size[0]
        changes["image_size"] = tuple(max(1, round(side / patch)) * patch for side in image_size)
    if choice.patch_size is not None:
        changes["patch_size"] = (choice.patch_size, choice.patch_size)
    for field in set(SHAPE) - {"patch_size"}:
        if getattr(choice, field) is not None:
            changes[field] = getattr(choice, field)
    return validated(ViTConfig, {**base.model_dump(), **changes}, f"student {name}")


def low_res_shape(choice: StudentConfig, student: ViTConfig) -> Size | None:
    """Height and width of images under `--low-res-size`, in whole patches; None if it is not given. Raises UserError."""
    pixels = choice.low_res_size
    if pixels is None:
        return None
    shorter, patch = min(student.image_size), max(student.patch_size)
    if pixels >= shorter or pixels % patch:
        sizes = ", ".join(map(str, range(patch, shorter, patch)))
        raise UserError(
            f"--low-res-size {pixels}: the student sees {shorter} pixels in patches of {patch}: "
            + (f"smaller sizes are {shortened(sizes)}" if sizes else "there is no smaller size")
        )
    height, width = (
        max(1, round(side * pixels / shorter / part)) * part
        for side, part in zip(student.image_size, student.patch_size, strict=True)
    )
    return height, width


def fitting_student(image_size: tuple[int, int] | None) -> str:
    """The name of the student for images of this size; None for photos of many sizes."""
    if not is_small(image_size):
        return "deit_photo"
    return "deit_pico" if max(image_size) <= 16 else "deit_micro"


def never_distils(name: str | None) -> bool:
    """Whether a student of this name has no distillation token, whatever its teacher."""
    return name is not None and (name.startswith(PLAIN_VIT) or PLAIN_SUFFIX in name)


def is_deit3(student: ViTConfig) -> bool:
    """Whether a student is one of DeiT III's, also where its shape is that of weights without a name: LayerScale, and no position on
    the class token."""
    return student.layer_scale is not None and not student.position_of_prefix


def student_preprocessing(config: ViTConfig, *, photos: bool, name: str | None = None) -> Preprocessing:
    """ImageNet's mean and standard deviation, as the paper's students, or 0.5 for a plain ViT (by its `name`); photos are
    cropped centrally at 0.875."""
    grey = config.channels == 1
    mean: tuple[float, ...] = IMAGENET_GREY_MEAN if grey else IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_GREY_STD if grey else IMAGENET_STD
    if name is not None and name.startswith(PLAIN_VIT):
        mean = std = HALF[: config.channels]
    return Preprocessing(image_size=config.image_size, mean=mean, std=std, crop_pct=0.875 if photos else 1.0)


# --------------------------------------------------------------------------------------------------------- costs


def parameter_count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def multiply_adds(network: Network, channels: int) -> int:
    """Multiply-adds of one image's forward pass: those of convolutions, linear maps and the two products of every attention.

    All tokens count in every block, as in papers (`ViT.forward` computes in the last one only what the heads read)."""
    body = on_meta(network)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        image = torch.empty(1, channels, *network.preprocessing.image_size, device="meta")
        if isinstance(body, ViT):
            *_, tokens_BTD = body.intermediates(image)
            body.apply_heads(tokens_BTD)
        else:
            body(image)
    return int(counter.get_total_flops()) // 2


def forward_seconds(network: Network, computed_in: torch.dtype | None = None) -> float:
    """Of one image's forward pass on the network's device, in float32 or in the format that it is `computed_in`: of a second batch of grey
    images, 8 on a CPU, else 64."""
    weights, training = next(network.parameters()), network.training
    count = 8 if weights.device.type == "cpu" else 64
    images_BCHW = torch.full((count, network.preprocessing.channels, *network.preprocessing.image_size), 0.5).to(
        weights
    )
    half, seconds = computed_in not in (None, torch.float32), 0.0
    network.eval()
    with torch.inference_mode(), torch.autocast(weights.device.type, dtype=computed_in, enabled=half):
        for _ in range(2):
            began = time.perf_counter()
            network(images_BCHW).cls_BK.cpu()  # .cpu() waits for the device
            seconds = time.perf_counter() - began
    network.train(training)
    return seconds / count


def network_costs(network: Network) -> dict[str, int]:
    """params; macs, the multiply-adds of an image."""
    return {"params": parameter_count(network), "macs": multiply_adds(network, network.preprocessing.channels)}


def describe_students() -> list[dict[str, Any]]:
    """One row for each named student: parameters, GMAC, its shape, at 1000 classes (small ones: 10)."""
    rows = []
    for name, base in STUDENTS.items():
        config = base if base.image_size[0] >= 224 else base.model_copy(update={"classes": 10})
        with torch.device("meta"):
            parameters = parameter_count(ViT(config))
            shallow = [ViT(config.model_copy(update={"depth": depth})) for depth in (1, 2)]
        # Every block costs the same, so two are enough to look at.
        one, two = (
            multiply_adds(Network(vit, student_preprocessing(config, photos=True)), config.channels) for vit in shallow
        )
        macs = one + (config.depth - 1) * (two - one)
        weights = "shipped" if name in SHIPPED_STUDENTS else "published" if name in PUBLISHED_STUDENTS else None
        row = {"name": name, "parameters": parameters, "gmac": macs / 1e9}
        rows.append(row | config.model_dump(include=DESCRIBED) | {"tokens": config.tokens, "weights": weights})
    return rows
