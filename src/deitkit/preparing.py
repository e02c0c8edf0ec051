"""The loop made ready for a network: a student, fresh or with weights to start from, or a convolutional teacher."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from deitkit.config import InitFacts, Preprocessing, RunConfig, StudentConfig, ViTConfig
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
from deitkit.zoo import parameter_count, size_at_first, student_preprocessing


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
    vit = ViT(architecture)
    if start is not None:
        for line in take(vit, start, dataset):
            progress.say(line)
    network = Network(vit, preprocessing_of_student(config, architecture, start and start.facts))
    trained = _tuned(network, config.optim.tune, architecture.depth, progress)
    plan = Plan(
        view=config.view,
        loss=config.loss,
        optim=config.optim,
        loop=config.loop,
        total_steps=0,
        drop_rates=drop_rates(config.student, architecture.depth),
        small_size=size_at_first(config.student, architecture),
        small_share=config.student.small_share or 0.0,
        trained_names=trained,
    )
    return make_trainer(network, plan, dataset, folder, progress, accelerator, teaching)


def preprocessing_of_student(
    config: RunConfig, architecture: ViTConfig, facts: InitFacts | None = None
) -> Preprocessing:
    """How a student sees test images: as its weights (`facts`) or its training ask, or cropped as the configuration says."""
    photos = config.view.crop in ("resize", "simple")
    if facts is None:
        preprocessing = student_preprocessing(architecture, photos=photos, name=config.student.student)
    else:
        preprocessing = start_preprocessing(architecture, facts, photos=photos)
    if config.student.evaluation_crop is None:
        return preprocessing
    return preprocessing.model_copy(update={"crop_fraction": config.student.evaluation_crop})


def drop_rates(student: StudentConfig, depth: int) -> tuple[float, ...]:
    """Probability of dropping each of the 2 * depth residual branches: rising to `drop_path` (DeiT), or the same for all
    (DeiT III, section 3)."""
    if student.drop_path_rule == "constant":
        return (student.drop_path,) * (2 * depth)
    return tuple(stochastic_depth_rates(depth, student.drop_path))


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
        augmenting=accelerator.device.type == "cpu",
    )
    if feed.smallest_step < feed.world:
        raise UserError(
            f"--processes {feed.world}: a step may have {feed.smallest_step} images, too few for each process to get one: "
            f"give a larger --batch-size or fewer processes"
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
