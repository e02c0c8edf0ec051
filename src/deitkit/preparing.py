"""The loop made ready for a network: a student, fresh or with weights to start from, or a convolutional teacher."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from deitkit.config import RunConfig, ViTConfig
from deitkit.data import Dataset
from deitkit.errors import UserError
from deitkit.feed import TrainFeed
from deitkit.network import Network
from deitkit.optim import freeze, trained_names
from deitkit.progress import Progress
from deitkit.run import RunFolder
from deitkit.starting import Start, start_preprocessing, take
from deitkit.teaching import Teaching
from deitkit.training import Plan, Trainer
from deitkit.vit import ViT, stochastic_depth_rates
from deitkit.zoo import parameter_count, student_preprocessing


def student_trainer(
    config: RunConfig,
    architecture: ViTConfig,
    dataset: Dataset,
    folder: RunFolder,
    progress: Progress,
    accelerator: Accelerator,
    teaching: Teaching,
    start: Start | None = None,
) -> Trainer:
    """The loop for a student of this shape, fresh or with the weights of `start`; how many steps it makes is not yet said."""
    torch.manual_seed(config.loop.seed)
    vit, photos = ViT(architecture), config.view.crop == "resize"
    if start is None:
        preprocessing = student_preprocessing(architecture, photos=photos, name=config.student.student)
    else:
        preprocessing = start_preprocessing(architecture, start.facts, photos=photos)
        for line in take(vit, start, dataset):
            progress.say(line)
    network = Network(vit, preprocessing)
    trained = _tuned(network, config.optim.tune, architecture.depth, progress)
    plan = Plan(
        view=config.view,
        loss=config.loss,
        optim=config.optim,
        loop=config.loop,
        total_steps=0,
        drop_rates=tuple(stochastic_depth_rates(architecture.depth, config.student.drop_path)),
        trained_names=trained,
    )
    return make_trainer(network, plan, dataset, folder, progress, accelerator, teaching)


def _tuned(network: Network, tune: str, depth: int, progress: Progress) -> frozenset[str] | None:
    """The names of the parameters that learn, the others frozen; None where all learn. Raises UserError."""
    if tune == "all":
        return None
    if tune.startswith("last-") and int(tune.removeprefix("last-")) > depth:
        raise UserError(f"--tune {tune}: the student has {depth} blocks")
    trained = trained_names(network, tune, depth)
    freeze(network, trained)
    learning = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    progress.say(f"--tune {tune}: {learning:,} of {parameter_count(network):,} parameters learn")
    return trained


def make_trainer(
    network: Network,
    plan: Plan,
    dataset: Dataset,
    folder: RunFolder,
    progress: Progress,
    accelerator: Accelerator,
    teaching: Teaching,
) -> Trainer:
    feed = TrainFeed(
        dataset.open_split("train"),
        plan.view,
        batch_size=plan.loop.batch_size,
        seed=plan.loop.seed,
        workers=plan.loop.workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    return Trainer(
        network=network,
        plan=plan,
        feed=feed,
        validation=dataset.open_split("val"),
        run=folder,
        progress=progress,
        accelerator=accelerator,
        teacher=teaching.source,
        teacher_on_validation=teaching.validation_N,
    )
