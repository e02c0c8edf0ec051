"""What a student has from a convolutional teacher: does its decision survive a shift, and how far do its tokens look?

    python benchmarks/inherited_bias.py runs/compared --contenders none zscore --out bias.json

For the finished runs of a comparison, on its validation images (a published teacher may have been trained on those: then
`--split test`):

- consistency: share of images whose (fused) decision is the same after a shift of 1 to 4 pixels, mean over left, right, up and
  down (Zhang 2019, arXiv 1904.11486, section 4); what a shift uncovers is mirrored, as in the crops of training
- attention distance: pixels between a patch and the patches it attends to, weighted by attention, mean over heads, patches and
  images, layer by layer (Dosovitskiy et al. 2021, arXiv 2010.11929, figure 7). Attention to class and distillation token is
  left out, the rest scaled to 1. Random attention to all patches would have the distance in the last row.

Prints two tables (mean ± standard deviation over seeds) and, with `--plot`, draws them; teachers stand beside the students in the
first.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch.nn import functional as F

from deitkit.comparison.report import COLOURS, DASHES, MARKERS, STYLE
from deitkit.comparison.results import describe_difference, paired_difference
from deitkit.config import DataConfig
from deitkit.data import Split, load_data
from deitkit.distill.teacher import load_teacher
from deitkit.models.network import Heads, Network, prepare
from deitkit.models.predict import fuse
from deitkit.models.vit import ViT
from deitkit.models.zoo import load_model
from deitkit.settings import validated
from deitkit.terminal import load_yaml
from deitkit.views.loader import evaluation_batches

SHIFTS = (1, 2, 3, 4)
WAYS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def shifted(images_BCHW: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Moved by whole pixels; what comes in is the image's own mirror image."""
    reach = max(abs(down), abs(right))
    padded = F.pad(images_BCHW, (reach, reach, reach, reach), mode="reflect")
    height, width = images_BCHW.shape[2:]
    return padded[:, :, reach - down : reach - down + height, reach - right : reach - right + width]


@torch.no_grad()
def consistency(decide: Callable[[torch.Tensor], torch.Tensor], batches: list[torch.Tensor]) -> list[float]:
    """Share of equal decisions by shift, in `SHIFTS`."""
    same = torch.zeros(len(SHIFTS))
    count = sum(map(len, batches))
    for images_BCHW in batches:
        whole_B = decide(images_BCHW)
        for place, pixels in enumerate(SHIFTS):
            for down, right in WAYS:
                moved_B = decide(shifted(images_BCHW, pixels * down, pixels * right))
                same[place] += (moved_B == whole_B).sum()
    return (same / (count * len(WAYS))).tolist()


@torch.no_grad()
def attention_distances(network: Network, batches: list[torch.Tensor]) -> list[float]:
    """Mean distance in pixels, layer by layer."""
    vit = network.body
    assert isinstance(vit, ViT)
    distance_PP = patch_distances(vit)
    sums = torch.zeros(vit.config.depth)
    for images_BCHW in batches:
        for layer, attention_BHPP in enumerate(patch_attention(vit, prepare(images_BCHW, network.preprocessing))):
            sums[layer] += (attention_BHPP * distance_PP).sum(-1).mean((1, 2)).sum()
    return (sums / sum(map(len, batches))).tolist()


def patch_attention(vit: ViT, images_BCHW: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of every block: how much each patch attends to each (B, heads, P, P), rows adding up to 1."""
    layers = vit.intermediates(images_BCHW)
    for block, tokens_BTD in zip(vit.blocks, layers, strict=False):
        query, key, _ = block.attn.qkv(block.norm1(tokens_BTD)).chunk(3, dim=-1)
        query, key = (each.unflatten(-1, (block.attn.heads, -1)).transpose(1, 2) for each in (query, key))
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        first = vit.config.prefix_tokens
        yield logits[:, :, first:, first:].softmax(-1)


def patch_distances(vit: ViT) -> torch.Tensor:
    """Pixels between the centres of any two patches, (P, P)."""
    (down, across), (height, width) = vit.config.grid, vit.config.patch_size
    rows, columns = torch.meshgrid(torch.arange(down) * height, torch.arange(across) * width, indexing="ij")
    places_P2 = torch.stack([rows.flatten(), columns.flatten()], dim=-1).float()
    return torch.cdist(places_P2, places_P2)


def measured(run: Path, batches: list[torch.Tensor]) -> dict[str, Any]:
    network, _ = load_model(run / "model")
    network.eval()
    return {
        "run": run.name,
        "consistency": consistency(lambda images: fuse(network(images)).argmax(-1), batches),
        "attention_distance": attention_distances(network, batches),
        "uniform_distance": patch_distances(network.body).mean().item(),
    }


def batches_of(split: Split, network: Network, images: int) -> list[torch.Tensor]:
    found = [images_BCHW for images_BCHW, _, _ in evaluation_batches(split, network.preprocessing)]
    return list(torch.cat(found)[:images].split(250))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--contenders", nargs="+", required=True)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="an SVG file")
    given = parser.parse_args()
    comparison = json.loads((given.comparison / "comparison.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in comparison["contenders"]}
    first = given.comparison / rows[given.contenders[0]]["runs"][0]["run"]
    config = load_yaml(first / "config.yaml")
    data_config = validated(DataConfig, config["data"], str(first))
    dataset = load_data(data_config.location, data_config)
    network, _ = load_model(first / "model")
    batches = batches_of(dataset.open_split(given.split), network, given.images)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in given.contenders:
        found[name] = [measured(given.comparison / run["run"], batches) for run in rows[name]["runs"]]
    for name in dict.fromkeys(rows[each]["teacher"]["name"] for each in given.contenders if rows[each]["teacher"]):
        teacher = load_teacher(name, dataset.classes)
        answer = lambda images, teacher=teacher: Heads(teacher.forward(images), None).cls_BK.argmax(-1)  # noqa: E731
        found[f"teacher {Path(name.partition('@')[0]).name}"] = [
            {"run": name, "consistency": consistency(answer, batches)}
        ]
    given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{sum(map(len, batches))} images, split {given.split}")
    show("same decision after a shift, %", found, "consistency", [f"{pixels} px" for pixels in SHIFTS], 100)
    students = {name: runs for name, runs in found.items() if "attention_distance" in runs[0]}
    layers = [f"layer {n + 1}" for n in range(len(students[given.contenders[0]][0]["attention_distance"]))]
    show("attention distance, pixels", students, "attention_distance", layers, 1)
    print(f"\nattention to all patches alike: {students[given.contenders[0]][0]['uniform_distance']:.2f} pixels")
    if given.plot is not None:
        draw(found, given.plot)


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Mean over seeds, and band of one standard deviation: decisions by shift, attention by layer."""
    panels = (
        ("consistency", "shift, pixels", "same decision after a shift, %", 100),
        ("attention_distance", "layer", "attention distance, pixels", 1),
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.0), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, (key, across, up, scale) in zip(figure.subplots(1, 2), panels, strict=True):
            for number, (name, runs) in enumerate(found.items()):
                if key not in runs[0]:
                    continue
                columns = list(zip(*(run[key] for run in runs), strict=True))
                mean = [scale * statistics.fmean(column) for column in columns]
                sd = [scale * statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
                x, colour = range(1, len(mean) + 1), COLOURS[number % len(COLOURS)]
                axes.plot(
                    x,
                    mean,
                    color=colour,
                    ls=DASHES[number % len(DASHES)],
                    marker=MARKERS[number % len(MARKERS)],
                    label=name,
                )
                ends = [m - s for m, s in zip(mean, sd, strict=True)], [m + s for m, s in zip(mean, sd, strict=True)]
                axes.fill_between(x, *ends, color=colour, alpha=0.15, lw=0)
            axes.set_xticks(range(1, len(columns) + 1))
            axes.set_xlabel(across)
            axes.set_ylabel(up)
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3)
        figure.savefig(path, format="svg", metadata={"Date": None})


def show(title: str, found: dict[str, list[dict[str, Any]]], key: str, columns: list[str], scale: float) -> None:
    print(f"\n| {title} | {' | '.join(columns)} |\n| {' | '.join(['---'] * (len(columns) + 1))} |")
    for name, runs in found.items():
        cells = []
        for values in zip(*(run[key] for run in runs), strict=True):
            spread = f" ± {scale * statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{scale * statistics.fmean(values):.2f}{spread}")
        print(f"| {name} | {' | '.join(cells)} |")
    first = next(iter(found.values()))
    for name, runs in list(found.items())[1:]:
        if len(runs) == len(first) > 1:
            own, base = (
                {number: scale * statistics.fmean(run[key]) for number, run in enumerate(each)}
                for each in (runs, first)
            )
            print(
                describe_difference(
                    f"{name}, mean over columns,",
                    next(iter(found)),
                    paired_difference(own, base),
                    "points" if scale == 100 else "pixels",
                )
            )


if __name__ == "__main__":
    main()
