"""Fitting a teacher: `deit teacher fit` and `--teacher auto`.

A pretrained network is probed: a linear classifier is fitted to its frozen features (`probe.py`). Where time allows it is then
fine-tuned from there, with a small learning rate; whichever is more accurate on the validation images is kept. A network without
pretrained weights is trained from scratch.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import nn

from deitkit.config import ClassWeights, FitConfig, FitLoopConfig, LossConfig, RunConfig, Size
from deitkit.data import Dataset, caching, load_data, refuse_among_images
from deitkit.data.dataset import NO_LABEL, SMALL_IMAGE, is_small
from deitkit.distill.encoding import CODE_FILE, CODE_IMAGES, fit_code
from deitkit.distill.optim import set_trainable, warmup_steps
from deitkit.distill.step import Plan
from deitkit.distill.teacher import doubt_about, why_useless
from deitkit.models.cnn import CNNConfig, build_cnn, card_config, find_classifier, has_pretrained, head_parameters
from deitkit.models.network import Heads, Network
from deitkit.models.zoo import ModelCard
from deitkit.settings import FINE_TUNING, MUON
from deitkit.terminal import Progress, UserError, duration, parse_json, plural, save_tensors, write_atomically
from deitkit.training.evaluate import SplitLogits, score, warn_of_reduced
from deitkit.training.job import Job, finish, finished_before, planned_trainer
from deitkit.training.loop import Trainer
from deitkit.training.memory import say_memory
from deitkit.training.probe import PROBED, fit_head, is_probed, seconds_per_image, split_features
from deitkit.training.processes import make_accelerator, preserved_global_state
from deitkit.training.run import FREE_TO_CHANGE, RunFolder
from deitkit.training.setup import class_weights, resolve_view, with_precision
from deitkit.training.teaching import Teaching

MORE_TRAINING = "train it longer, or on more images"
AUTOMATIC_SMALL_VIEWS = {16: 60_000, SMALL_IMAGE: 500_000}
"""Views that a network from scratch learns from, as an automatic teacher of small images, by their longest side in pixels."""
MOST_AUTOMATIC_EPOCHS = 60
ENLARGED = 160
"""Pixels to which small images are enlarged for the probe of a network that was pretrained on photos (5,000 of CIFAR-10, validation
accuracy: 96 pixels 82.2 %, 128 85.3, 160 88.4, 224 88.3, which takes twice as long)."""
MANY_SMALL_IMAGES = 20_000
"""With fewer small colour images a network from scratch is not tried beside the probe: it takes 20 minutes, and knows less (5,000 of
CIFAR-10: 77 % and 88 % validation accuracy)."""
TRAINING_COST = 3
"""Of a training step's image, in images of which features are computed (two cores: EfficientNet-Lite0 at 128 pixels 3.1,
ResNet-8 at 8 pixels 3.0, ResNet-20 at 32 pixels 4.1)."""
HEAD_SHARE = 0.2
"""Share of the steps in which only the new last layer trains, of a pretrained network without a linear one, which cannot be probed."""
FEW_VALIDATION_IMAGES = 100
"""With fewer, cross-validation over the training images tells the accuracy better."""
PROBE = "probe.safetensors"
"""The classifier that was fitted first, and its figures: in the run's folder."""


def network_unasked(
    location: str, config: FitConfig, given: Mapping[str, Any], out: Path, progress: Progress
) -> dict[str, Any]:
    """The network for these images where the `given` settings name none: of photos the packaged EfficientNet-Lite0, pretrained; of small
    images the one that the settings have by default. It is told. Raises UserError, also for a folder `out` that lies among the images."""
    refuse_among_images(location, out)
    if "model" in given or config.from_scratch or is_small(load_data(location, config.data).image_size):
        return {}
    progress.say("model: lite0, for photos (--model names another)")
    return {"model": "lite0"}


def run_fit(location: str, config: FitConfig, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
    """Fit a convolutional teacher: probe a pretrained network and fine-tune it, or train one from scratch.

    Returns the content of `summary.json`. Raises UserError."""
    try:
        with RunFolder(out) as folder, preserved_global_state():
            return _fit(Job(location=location, folder=folder, resume=resume, progress=progress), config)
    except ValueError as error:  # torch's, of a batch of one image and a last map of one pixel
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"{config.model}: its batch norms need batches of two images or larger ones: give another --batch-size (none may leave a "
            f"single image over) or --image-size"
        ) from error


def _fit(job: Job, config: FitConfig) -> dict[str, Any]:
    dataset, config, _ = job.open(config)
    config = config.model_copy(update={"loop": with_precision(config.loop)})

    # weights
    pretrained = not config.from_scratch and has_pretrained(config.model)
    accelerator = make_accelerator(config.loop, head_first=pretrained)
    torch.manual_seed(config.loop.seed)
    architecture, network = _built(config, dataset)
    network.to(memory_format=torch.channels_last)  # 1.3 to 1.8 times as fast on a CPU
    view = resolve_view(config.view, dataset, network.preprocessing.image_size)
    location = config.data.model_copy(update={"location": job.location})
    config = config.model_copy(update={"data": location, "view": view})
    if job.resume and job.folder.finished and (summary := finished_before(job, config, dataset)) is not None:
        return summary
    warn_of_reduced(dataset, network.preprocessing, config.model, job.progress.warn)

    # schedule
    probed = pretrained and find_classifier(network) is not None
    weights = class_weights(config.class_weights, dataset)
    head_names = frozenset(head_parameters(network)) if pretrained and not probed else frozenset()
    what, first = Teaching(description="its head first" if head_names else "all weights"), ""
    if probed:
        set_trainable(
            network, without_batchnorm(network)
        )  # its statistics are those of the images it was pretrained on
        images = len(dataset.open_split("train")) + len(dataset.open_split("val"))
        seconds = images * seconds_per_image(network, accelerator.device, config.loop.precision)
        what = Teaching(description=f"fine-tuning, if it takes {config.fine_tune_minutes:g} minutes at most")
        first = f"probe at {network.preprocessing.image_size[0]} pixels, about {duration(seconds)}; "
    plan_of = partial(fit_plan, network, head_names, probed, weights)
    trainer, what, config = planned_trainer(job, config, network, plan_of, dataset, what, accelerator, first)

    # training
    probe = _probe(job, config, trainer) if probed else None
    if probe is None and find_classifier(network) is not None:
        seconds = seconds_per_image(network, accelerator.device, config.loop.precision)
        job.progress.say(f"training: about {duration(TRAINING_COST * _images(trainer) * seconds)}")
    trained, steps, of_probe = network, 0, trainer.last_logits
    if probe is None or _has_time(job, config, trainer, probe):
        if probe is not None:
            say_memory(network, config, trainer.loader, trainer.validation, accelerator, job.progress)
        before = copy.deepcopy(network)
        trained, steps = trainer.train(resume=job.resume), trainer.trained_steps
        if probe is not None and not _better(job, trainer, probe):
            trained, steps, trainer.last_logits = before, 0, of_probe
    if steps and accelerator.is_main_process:
        (job.folder.path / CODE_FILE).unlink(missing_ok=True)  # of the frozen network's features
    if probe is not None:
        trainer.seconds += probe["seconds"]
        trainer.last_scores = trainer.last_scores if steps else probe["scores"]

    # saving
    card = ModelCard(
        name=config.model,
        architecture=card_config(architecture, network),
        classes=dataset.classes,
        preprocessing=network.preprocessing,
        weights="ema" if steps and config.optim.ema_decay > 0 else "last",
        dataset=dataset.name,
    )
    return finish(job, trainer, trained, card, config, what, dataset, steps)


def _built(config: FitConfig, dataset: Dataset) -> tuple[CNNConfig, Network]:
    """The network that is to be fitted, with pretrained weights unless it starts from random ones. Raises UserError."""
    pretrained = not config.from_scratch and has_pretrained(config.model)
    size = (config.image_size, config.image_size) if config.image_size else None
    if size is None and not pretrained and is_small(dataset.image_size):
        size = dataset.image_size
    channels = 3 if pretrained else dataset.channels
    architecture = CNNConfig(name=config.model, classes=len(dataset.classes), channels=channels)
    return architecture, build_cnn(architecture, image_size=size, pretrained=pretrained)


def fit_plan(
    network: Network,
    head_names: frozenset[str],
    probed: bool,
    weights: tuple[float, ...],
    config: FitConfig,
    steps: int,
    steps_per_epoch: int,
) -> Plan:
    """How a teacher is fitted in so many steps. `weights`: of the classes. In the first only the parameters `head_names` train; after a
    probe all but the batch norms do, in all of them."""
    return Plan(
        view=config.view,
        loss=LossConfig(distillation="none", label_smoothing=config.label_smoothing),
        optim=config.optim,
        loop=config.loop,
        class_weights=weights,
        total_steps=steps,
        warmup_steps=warmup_steps(config.optim, steps, steps_per_epoch),
        head_steps=round(HEAD_SHARE * steps) if head_names else 0,
        head_names=head_names,
        trained_names=without_batchnorm(network) if probed else None,
    )


def without_batchnorm(network: nn.Module) -> frozenset[str]:
    """Names of all parameters but those of batch norms."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    frozen = {id(parameter) for norm in norms for parameter in norm.parameters()}
    return frozenset(name for name, parameter in network.named_parameters() if id(parameter) not in frozen)


# ------------------------------------------------------------------------------------------------- the probe


def _probe(job: Job, config: FitConfig, trainer: Trainer) -> dict[str, Any]:
    """Give the trainer's network the classifier that fits its frozen features best, or the one that was fitted before an interruption.
    Returns its figures: scores (of the validation images), cv (top1, nll, penalty), images_per_second, seconds."""
    network, accelerator, began = trainer.network, trainer.accelerator, time.perf_counter()
    classifier = find_classifier(network)
    assert classifier is not None
    if (job.folder.path / PROBED).is_file():
        try:
            facts: dict[str, Any] = parse_json((job.folder.path / PROBED).read_text(encoding="utf-8"))
            classifier.load_state_dict(load_file(job.folder.path / PROBE))
            return facts
        except (OSError, ValueError, RuntimeError) as error:
            job.progress.warn(f"{job.folder.path / PROBED}: damaged ({error}): the network is probed again")
    features = partial(
        split_features,
        network,
        device=accelerator.device,
        progress=job.progress,
        precision=config.loop.precision,
        workers=config.loop.workers,
        share=(accelerator.process_index, accelerator.num_processes),
    )
    features_NF, labels_N = features(trainer.loader.split)
    rate = min(gather_object([len(labels_N) / (time.perf_counter() - began)]))  # all processes decide alike
    held_MF, held_M = features(trainer.validation)
    device, classes = accelerator.device, classifier.out_features
    weights = trainer.plan.class_weights
    head = fit_head(
        features_NF.to(device), labels_N.to(device), classes, job.progress, seed=config.loop.seed, class_weights=weights
    )
    classifier.load_state_dict({"weight": head.weight_KF, "bias": head.bias_K})
    with torch.no_grad():
        logits = SplitLogits(heads=Heads(head.logits(held_MF), None), labels_N=held_M)
    trainer.last_logits = (
        logits if len(held_M) == len(trainer.validation) else None
    )  # positions of unreadable ones are not known
    facts = {
        "scores": score(logits),
        "cv": {"top1": head.top1, "nll": head.nll, "penalty": head.penalty},
        "largest_class": held_M.bincount().max().item() / len(held_M),
        "images_per_second": rate,
        "seconds": time.perf_counter() - began,
    }
    job.progress.say(probe_line(config.model, len(labels_N), classes, facts))
    if accelerator.is_main_process:
        fit_code(features_NF[:: -(-len(features_NF) // CODE_IMAGES)]).save(
            job.folder.path
        )  # for students that learn them
        save_tensors(dict(classifier.state_dict()), job.folder.path / PROBE)
        write_atomically(job.folder.path / PROBED, json.dumps(facts, indent=2) + "\n")
        job.folder.log("probe", step=0, top1=facts["scores"]["top1"], cv=facts["cv"])
    accelerator.wait_for_everyone()
    return facts


def probe_line(model: str, images: int, classes: int, facts: dict[str, Any]) -> str:
    """`probe of lite0: 87.1 % validation accuracy (341 images), 88.0 % cross-validated (3,068 images); chance 10.0 %, largest ...`."""
    count = facts["scores"]["n"]
    held = f"{100 * facts['scores']['top1']['cls']:.1f} % validation accuracy ({plural(count, 'image')})"
    crossed = f"{100 * facts['cv']['top1']:.1f} % cross-validated ({plural(images, 'image')})"
    both = f"{held}, {crossed}"
    if count < FEW_VALIDATION_IMAGES:
        both = f"{crossed}, the better estimate with so few validation images; {held}"
    return f"probe of {model}: {both}; chance {100 / classes:.1f} %, largest class {100 * facts['largest_class']:.1f} %"


def _has_time(job: Job, config: FitConfig, trainer: Trainer, probe: dict[str, Any]) -> bool:
    """Whether fine-tuning fits into its time limit, or has begun before; says so where it does not."""
    images = _images(trainer)
    if probe["scores"]["top1"]["cls"] == 1 and config.fine_tune_minutes > 0:
        job.progress.say(
            "fine-tuning left out: the probe is right on all validation images, so that no gain could be seen"
        )
        return False
    minutes = TRAINING_COST * images / probe["images_per_second"] / 60
    if minutes <= config.fine_tune_minutes or job.folder.latest_checkpoint() is not None:
        job.progress.say(f"fine-tuning: about {duration(60 * minutes)}")
        return True
    if config.fine_tune_minutes > 0:
        epochs = images / len(trainer.loader.split)
        job.progress.say(
            f"fine-tuning left out: {epochs:.3g} epochs would take about {duration(60 * minutes)} "
            f"(--fine-tune-minutes {math.ceil(minutes)} allows them)"
        )
    return False


def _images(trainer: Trainer) -> float:
    """How many images all steps of the plan show."""
    return trainer.plan.total_steps * len(trainer.loader.split) / trainer.loader.steps_per_epoch


def _better(job: Job, trainer: Trainer, probe: dict[str, Any]) -> bool:
    """Whether the fine-tuned network is more accurate on the validation images than the probe; says which is kept."""
    before, after = probe["scores"]["top1"]["cls"], trainer.last_scores["top1"]["cls"]
    kept = "the fine-tuned network" if after > before else "the probe"
    job.progress.say(f"validation accuracy: probe {100 * before:.1f} %, fine-tuned {100 * after:.1f} %: {kept} is kept")
    return bool(after > before)


# ------------------------------------------------------------------------------------------ automatic teachers


def automatic_fits(dataset: Dataset, config: RunConfig) -> list[FitConfig]:
    """The fits of which `--teacher auto` takes the most accurate. Photos: a probe of the packaged EfficientNet-Lite0. Small images: the
    same, enlarged, and where they are grey or many a CIFAR-style ResNet from scratch; tiny ones: that ResNet alone. They see the student's
    training images, no others, at the size that `--teacher-size` gives. The student's seed, precision and other ways to compute do not
    count: one teacher serves all."""
    images = int((dataset.open_split("train").labels_N != NO_LABEL).sum())
    size, defaults = dataset.image_size, FitConfig()
    view = {"view_seed": config.view.view_seed, "flip_prob": config.view.flip_prob}
    asked: ClassWeights = "balanced" if config.data.oversample else config.loss.class_weights
    even = len(set(class_weights("balanced", dataset))) == 1
    balanced = "none" if even else asked  # one teacher for both where it makes no difference
    shared = {
        "data": config.data.model_copy(update={"unlabelled": False, "oversample": False}),
        "view": defaults.view.model_copy(update=view),
        "class_weights": balanced,
    }
    computing = {"workers": config.loop.workers, "processes": config.loop.processes}
    given = config.teacher.teacher_size
    probe = defaults.model_copy(
        update={
            **shared,
            "model": "lite0",
            "image_size": given or (ENLARGED if is_small(size) else None),
            "optim": defaults.optim.model_copy(update={"base_lr": FINE_TUNING["base_lr"]}),
            "loop": FitLoopConfig(batch_size=FINE_TUNING["batch_size"], **computing),
        }
    )
    if not is_small(size):
        return [probe]
    tiny = max(size) <= 16
    epochs = math.ceil(AUTOMATIC_SMALL_VIEWS[16 if tiny else SMALL_IMAGE] / images)
    scratch = defaults.model_copy(
        update={
            **shared,
            "model": "cifar-resnet8" if tiny else "cifar-resnet20",
            "from_scratch": True,
            "image_size": given,
            "optim": defaults.optim.model_copy(update=MUON),
            "loop": FitLoopConfig(length=f"{min(MOST_AUTOMATIC_EPOCHS, epochs)}ep", batch_size=64, **computing),
        }
    )
    if tiny:
        return [scratch]
    return [probe] if dataset.channels == 3 and images < MANY_SMALL_IMAGES else [probe, scratch]


def fit_automatically(location: str, dataset: Dataset, config: RunConfig, progress: Progress) -> Path:
    """The folder of the teacher that `auto` stands for, in the user's one store of fitted teachers: fitted before with the same images
    and settings, or now. Programs that need the same teacher wait for each other; a killed fit is resumed. Raises UserError."""
    dataset = _labelled(location, dataset, config)
    fitted = [_fitted(location, dataset, fit, progress) for fit in automatic_fits(dataset, config)]
    if len(fitted) > 1:
        figures = ", ".join(f"{one['model']} {100 * one['top1']['cls']:.1f} %" for _, one in fitted)
        progress.say(f"validation accuracy of the automatic teachers: {figures}; the best one teaches")
    return max(fitted, key=lambda one: float(one[1]["top1"]["cls"]))[0]  # of equal ones the first


def _labelled(location: str, dataset: Dataset, config: RunConfig) -> Dataset:
    """The data that automatic teachers are fitted to: without unlabelled and repeated images."""
    if not config.data.oversample and not (dataset.open_split("train").labels_N == NO_LABEL).any():
        return dataset
    return load_data(location, config.data.model_copy(update={"unlabelled": False, "oversample": False}))


class TeacherCosts(NamedTuple):
    """What an automatic teacher that is not fitted yet will cost; rough."""

    fitting: float
    """seconds"""
    per_image: float
    """seconds of a forward pass of one image"""
    image_size: Size


def expected_costs(location: str, dataset: Dataset, config: RunConfig, device: torch.device) -> TeacherCosts | None:
    """What the teacher that `auto` stands for will cost, from two batches of a forward pass; None if it is fitted. Raises UserError."""
    dataset = _labelled(location, dataset, config)
    images, fitting, first = len(dataset.open_split("train")), 0.0, None
    for fit in automatic_fits(dataset, config):
        if (_stored(dataset, fit) / "summary.json").is_file():
            continue
        network = _built(fit, dataset)[1]
        per_image = seconds_per_image(network, device, fit.loop.precision)
        training = TRAINING_COST * images * (fit.loop.amount("ep") or 0) * per_image
        if not fit.from_scratch:
            training = training if training <= 60 * fit.fine_tune_minutes else 0.0
            training += (images + len(dataset.open_split("val"))) * per_image
        fitting += training
        first = first or (per_image, network.preprocessing.image_size)
    return None if first is None else TeacherCosts(fitting, *first)


def _stored(dataset: Dataset, fit: FitConfig) -> Path:
    """The folder of this fit in the store of fitted teachers."""
    known_by = json.dumps([dataset.open_split("train").cached_content_hash(), dataset.classes, fit_key(fit)])
    return caching.cache_folder() / "teachers" / f"{fit.model}-{hashlib.sha256(known_by.encode()).hexdigest()[:12]}"


def _fitted(location: str, dataset: Dataset, fit: FitConfig, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """The folder and the summary of this fit, from the store or done now. Raises UserError."""
    train = dataset.open_split("train")
    accelerator = make_accelerator(fit.loop)
    with RunFolder(_stored(dataset, fit)) as folder, preserved_global_state():
        if accelerator.is_main_process:
            folder.lock(
                on_wait=lambda: progress.say(f"waiting for another program that fits this teacher, {folder.path}")
            )
            _drop_fit_to_other_images(folder, fit, dataset)
        accelerator.wait_for_everyone()
        if folder.finished:
            progress.say(f"teacher: {folder.path}, fitted before")
            return folder.path, folder.summary()
        images = plural(len(train), "training image")
        length = f"for {plural(int(fit.loop.amount('ep') or 0), 'epoch')} of" if fit.from_scratch else "to"
        progress.say(f"teacher: fitting {fit.model} {length} {images}, into {folder.path}")
        begun = (folder.path / "config.yaml").is_file()
        return folder.path, _fit(Job(location=location, folder=folder, resume=begun, progress=progress), fit)


def _drop_fit_to_other_images(folder: RunFolder, fit: FitConfig, dataset: Dataset) -> None:
    """Remove a killed fit that cannot be resumed: its validation images, or the names of its images, were others."""
    if folder.finished or not (folder.path / "config.yaml").is_file():
        return
    try:
        folder.refuse_other_data(dataset.names_hash())
        if folder.config(FitConfig).data.split_settings() == fit.data.split_settings():
            return
    except UserError:
        pass
    (folder.path / "config.yaml").unlink()
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    for name in (PROBED, PROBE, "metrics.jsonl"):
        (folder.path / name).unlink(missing_ok=True)


def fit_key(fit: FitConfig) -> str:
    """The settings of a fit that affect its result, apart from the images; without the precision of this machine."""
    fit = fit.changed(loop={"precision": "auto"})
    return fit.model_dump_json(exclude={"data": True, "loop": FREE_TO_CHANGE})


def doubt_about_fitted(summary: dict[str, Any], folder: Path) -> str | None:
    """Why the network fitted into this folder will hardly do as a teacher, from its run's summary; None if it will."""
    facts = {
        "name": summary["name"],
        "n": summary["n"],
        "classes": summary["classes"],
        "top1": summary["top1"]["cls"],
        "cross_validated": is_probed(folder),
    }
    why = why_useless(facts)
    return doubt_about(facts) if why is None else f"{why}: {MORE_TRAINING}"
