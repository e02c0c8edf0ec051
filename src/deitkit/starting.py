"""A student that begins with weights which are there already: what it takes of them, what is resized, what stays fresh."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float

from deitkit.config import InitFacts, Preprocessing, StudentConfig, ViTConfig
from deitkit.data import Dataset
from deitkit.errors import UserError, shortened
from deitkit.files import write_atomically
from deitkit.layouts import LAYOUTS
from deitkit.published import Source, differing, find_init
from deitkit.settings import load_yaml, validated
from deitkit.vit import ViT, resized_positions
from deitkit.zoo import STUDENTS

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
    changes = {"image_size": config.image_size} | ({} if photos else {"crop_fraction": 1.0})
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
