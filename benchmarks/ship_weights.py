"""Make the initial weights that the package ships from a run of the recipe `pretrain`.

    deit tape record TINY-IMAGENET --recipe pretrain --teacher lite0 --outputs features --teacher-size 128 --views 6 --out TAPE
    deit train TINY-IMAGENET --recipe pretrain --teacher TAPE --low-res-size 48 --out RUN
    python benchmarks/ship_weights.py RUN

The run teaches the distillation token alone. The class token starts as its copy: both have to find the object. The classifiers are left
out, numbers are rounded to float16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from deitkit.models.start import SHIPPED_WEIGHTS
from deitkit.models.vit import ViT
from deitkit.models.zoo import STUDENTS, load_model
from deitkit.settings import SHIPPED_STUDENTS
from deitkit.terminal import file_size, save_tensors


def shipped_tensors(vit: ViT) -> dict[str, torch.Tensor]:
    """What is shipped of a pretrained student."""
    tensors = {name: tensor for name, tensor in vit.state_dict().items() if not name.startswith("head")}
    tensors["cls_token"] = tensors["dist_token"].clone()
    tensors["pos_embed"] = tensors["pos_embed"].clone()
    tensors["pos_embed"][:, 0] = tensors["pos_embed"][:, 1]
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the finished pretraining")
    parser.add_argument("--out", type=Path, default=SHIPPED_WEIGHTS, help="folder of the weights")
    given = parser.parse_args()
    network, card = load_model(given.run / "model")
    theirs = {"image_size", "classes"}
    own = STUDENTS[card.name].model_dump(exclude=theirs) if card.name in SHIPPED_STUDENTS else None
    if not isinstance(network.body, ViT) or card.architecture.model_dump(exclude=theirs) != own:
        parser.error(f"{given.run}: a run of {' or '.join(SHIPPED_STUDENTS)} in its own shape is needed")
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / f"{card.name}.safetensors"
    save_tensors(shipped_tensors(network.body), file)
    print(f"{file}: {file_size(file.stat().st_size)}")


if __name__ == "__main__":
    main()
