"""A picture of what a soft label says: a teacher's probabilities of one test image at several temperatures.

    python benchmarks/soft_labels.py CIFAR10 --teacher cifar-resnet56@resnet56.safetensors --image 3 --out docs/plots/soft-labels.svg

Softmax of logits / temperature (Hinton et al. 2015, arXiv 1503.02531, section 2). At 1 the likeliest class hides all others; at 3
their order shows; at 10 they are nearly alike.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from deitkit.comparison.report import COLOURS, STYLE
from deitkit.config import DataConfig
from deitkit.data import load_data
from deitkit.distill.teacher import load_teacher

TEMPERATURES = (1, 3, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--image", type=int, default=0, help="its number in the test split, from 0")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    dataset = load_data(given.data, DataConfig())
    split = dataset.open_split("test")
    pixels_HWC = split.read(given.image)
    teacher = load_teacher(given.teacher, dataset.classes)
    image_BCHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].float() / 255
    logits_K = teacher.forward(image_BCHW)[0]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, 1 + len(TEMPERATURES), width_ratios=[1.1, *[1] * len(TEMPERATURES)])
        axes[0].imshow(pixels_HWC.squeeze(), cmap="gray")
        axes[0].set_title(f"label: {dataset.classes[split.labels_N[given.image]]}", fontsize=10)
        axes[0].axis("off")
        places = range(len(dataset.classes))
        for part, temperature in zip(axes[1:], TEMPERATURES, strict=True):
            chances_K = (logits_K / temperature).softmax(0).tolist()
            part.barh(places, chances_K, color=COLOURS[1])
            part.set_yticks(places, dataset.classes if part is axes[1] else [""] * len(places), fontsize=8)
            part.invert_yaxis()
            part.set_xlim(0, 1.18)
            part.grid(axis="y", visible=False)
            for place, chance in zip(places, chances_K, strict=True):
                part.text(chance + 0.02, place, f"{100 * chance:.1f}", va="center", fontsize=7)
            part.set_title(f"temperature {temperature}, %", fontsize=10)
            part.set_xticks([0, 0.5, 1], ["0", "50", "100"], fontsize=8)
        figure.savefig(given.out, dpi=110)
    print(f"{given.out}: {split.name(given.image)}, {dict(zip(dataset.classes, logits_K.tolist(), strict=True))}")


if __name__ == "__main__":
    main()
