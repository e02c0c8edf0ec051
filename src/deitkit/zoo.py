"""Named students, and networks on disk: `model.safetensors` beside `model.json`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from deitkit.backbones import build_cnn
from deitkit.config import ModelCard, Preprocessing, StudentConfig, ViTConfig
from deitkit.data.base import is_small
from deitkit.errors import UserError, shortened, unknown_name
from deitkit.network import Network
from deitkit.run import save_tensors, write_atomically, written
from deitkit.settings import explain
from deitkit.vit import ViT

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_GREY_MEAN, IMAGENET_GREY_STD = (0.449,), (0.226,)

# The first three are table 1 of the DeiT paper; the others are of this project, for images of 28 to 128 pixels.
STUDENTS: dict[str, ViTConfig] = {
    "deit_tiny": ViTConfig(width=192, depth=12, heads=3),
    "deit_small": ViTConfig(width=384, depth=12, heads=6),
    "deit_base": ViTConfig(width=768, depth=12, heads=12),
    "deit_photo": ViTConfig(image_size=(128, 128), patch_size=(16, 16), stem="conv", width=192, depth=9, heads=3),
    "deit_mini": ViTConfig(image_size=(32, 32), patch_size=(4, 4), stem="conv", width=192, depth=6, heads=6),
    "deit_micro": ViTConfig(image_size=(32, 32), patch_size=(4, 4), stem="conv", width=128, depth=5, heads=4),
    "deit_nano": ViTConfig(image_size=(32, 32), patch_size=(4, 4), stem="conv", width=64, depth=6, heads=2),
    "deit_pico": ViTConfig(image_size=(8, 8), channels=1, patch_size=(2, 2), stem="conv", width=48, depth=4, heads=3),
}


def choose_student(choice: StudentConfig, image_size: tuple[int, int] | None, channels: int, classes: int) -> ViTConfig:
    """The student for these data: the named one, or one that fits the image size; single fields replaced.

    `image_size`: (height, width) shared by all images, or None for photos. A student of small images takes their size, or
    the nearest one that patches cover: the network resizes. Raises UserError."""
    name = choice.student or fitting_student(image_size)
    if name not in STUDENTS:
        raise unknown_name("student", name, STUDENTS)
    base = STUDENTS[name]
    changes: dict[str, Any] = {"channels": channels, "classes": classes}
    if choice.image_size is not None:
        changes["image_size"] = (choice.image_size, choice.image_size)
    elif is_small(image_size) and is_small(base.image_size):
        patch = choice.patch_size or base.patch_size[0]
        changes["image_size"] = tuple(max(1, round(side / patch)) * patch for side in image_size)
    if choice.patch_size is not None:
        changes["patch_size"] = (choice.patch_size, choice.patch_size)
    for field in ("stem", "width", "depth", "heads"):
        if getattr(choice, field) is not None:
            changes[field] = getattr(choice, field)
    try:
        return ViTConfig(**{**base.model_dump(), **changes})
    except ValidationError as error:
        raise UserError(f"student {name}: {explain(ViTConfig, error)}") from error


def fitting_student(image_size: tuple[int, int] | None) -> str:
    """The name of the student for images of this size; None for photos of many sizes."""
    if not is_small(image_size):
        return "deit_photo"
    return "deit_pico" if max(image_size) <= 16 else "deit_micro"


def student_preprocessing(config: ViTConfig, *, photos: bool) -> Preprocessing:
    """ImageNet's mean and standard deviation, as the paper's students; photos are cropped centrally at 0.875."""
    grey = config.channels == 1
    return Preprocessing(
        image_size=config.image_size,
        mean=IMAGENET_GREY_MEAN if grey else IMAGENET_MEAN,
        std=IMAGENET_GREY_STD if grey else IMAGENET_STD,
        crop_fraction=0.875 if photos else 1.0,
    )


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


def load_model(folder: Path) -> tuple[Network, ModelCard]:
    """The network saved in `folder`, on the CPU and in eval mode. Raises UserError."""
    card_path, weights_path = folder / "model.json", folder / "model.safetensors"
    for path in (card_path, weights_path):
        if not path.is_file():
            raise UserError(f"{path}: no such file: is {folder.parent} the folder of a finished run?")
    try:
        card = ModelCard.model_validate_json(card_path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{card_path}: {explain(ModelCard, error)}") from error
    except OSError as error:
        raise UserError(f"{card_path}: cannot be read: {error.strerror}") from error
    try:
        network = build(card)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{card_path}: no such network can be built: {shortened(str(error))}") from error
    try:
        tensors = load_file(weights_path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights_path}: not a readable safetensors file: {error}") from error
    try:
        network.body.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{weights_path}: does not fit {card_path.name}: {str(error).splitlines()[-1].strip()}"
        ) from error
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{weights_path}: {broken[0]} holds infinity or NaN: the network is of no use")
    return network.eval(), card


def parameter_count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def multiply_adds(network: Network, channels: int) -> int:
    """Multiply-adds of one image's forward pass, counted by running it on shapes alone; a ViT's as papers count them, with
    all tokens in the last block (`ViT.forward` computes there what the heads read)."""
    size = network.preprocessing.image_size
    shadow = copy.deepcopy(network.body).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        image = torch.empty(1, channels, *size, device="meta")
        if isinstance(shadow, ViT):
            *_, tokens_BTD = shadow.tokens_by_layer(image)
            shadow.answer(tokens_BTD)
        else:
            shadow(image)
    return int(counter.get_total_flops()) // 2


def describe_students() -> list[dict[str, Any]]:
    """One row for each named student: parameters, GMAC, image size, tokens, at 1000 classes (small ones: 10)."""
    rows = []
    for name, base in STUDENTS.items():
        config = base if base.image_size[0] >= 224 else base.model_copy(update={"classes": 10})
        with torch.device("meta"):
            network = Network(ViT(config), student_preprocessing(config, photos=True))
        rows.append(
            {
                "name": name,
                "parameters": parameter_count(network),
                "gmac": multiply_adds(network, config.channels) / 1e9,
                "image_size": config.image_size,
                "patch_size": config.patch_size,
                "tokens": config.prefix_tokens + config.grid[0] * config.grid[1],
                "width": config.width,
                "depth": config.depth,
                "stem": config.stem,
                "classes": config.classes,
            }
        )
    return rows
