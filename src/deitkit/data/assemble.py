"""From scanned sources to a data set with its splits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deitkit.config import DataConfig
from deitkit.data.base import NO_LABEL, UNLABELLED, Dataset, Split, SplitName
from deitkit.data.opener import Opener
from deitkit.data.scan import check_classes, tolerate
from deitkit.data.source import Source
from deitkit.data.splits import train_and_validation
from deitkit.errors import UserError


def assemble(
    *,
    name: str,
    classes: tuple[str, ...],
    mirror_safe: bool,
    config: DataConfig,
    train: Source,
    validation: Source | None,
    test: Callable[[int], Split] | None,
    set_aside: int = 0,
    more_unlabelled: bool = False,
) -> Dataset:
    """Leaves out what the scans found unreadable, holds validation images out of `train` where there are none, and
    takes the subset. Images of `train` without labels, and those outside the subset, are training images without labels where
    `config` wants them. `test(channels)` is called when the test split is asked for.

    `more_unlabelled`: whether there are images without labels elsewhere.

    Raises UserError for too many bad images, for a class without a readable one, for a subset that cannot be had."""
    if len(classes) < 2:
        raise UserError(f"{name}: holds a single class, {classes[0]!r}; a classifier needs two")
    sources = [source for source in (train, validation) if source is not None]
    bad = [message for source in sources for message in source.scan.bad]
    tolerate(bad, sum(len(source.labels_N) for source in sources), config.bad_image_limit, name)
    for title, source in zip(("training", "validation"), sources, strict=False):
        labels_N = source.labels_N[source.scan.readable_N]
        check_classes(labels_N[labels_N != NO_LABEL], classes, f"{name}, {title} images")

    channels = max(source.scan.channels for source in sources)
    sizes = {source.scan.image_size for source in sources}
    good = np.flatnonzero(train.scan.readable_N)
    labelled = good[train.labels_N[good] != NO_LABEL]
    chosen, held_out = train_and_validation(train.labels_N[labelled], config, has_validation=validation is not None)
    taught, held_out = labelled[chosen], labelled[held_out]
    shown = np.setdiff1d(good, held_out) if config.unlabelled else taught
    if config.unlabelled and len(shown) == len(taught):
        raise UserError(
            f"{name}: --unlabelled: no training image is without a label: put some into a folder {UNLABELLED[0]!r} beside the "
            f"class folders (or beside train), or give fewer --train-images"
        )
    opened = train.splits([shown] + ([] if validation is not None else [held_out]), channels, "train")
    if config.unlabelled:
        opened[0].labels_N = np.where(np.isin(shown, taught), opened[0].labels_N, NO_LABEL)
    if validation is not None:
        opened.append(validation.split(np.flatnonzero(validation.scan.readable_N), channels, "val"))

    makers: dict[SplitName, Callable[[], Split]] = {"train": lambda: opened[0], "val": lambda: opened[1]}
    if test is not None:
        makers["test"] = lambda: test(channels)
    return Dataset(
        name=name,
        classes=classes,
        channels=channels,
        image_size=sizes.pop() if len(sizes) == 1 else None,
        mirror_safe=mirror_safe,
        open_split=Opener(name, makers),
        has_test=test is not None,
        set_aside=set_aside,
        more_unlabelled=not config.unlabelled and (more_unlabelled or len(labelled) < len(good)),
        bad_images=tuple(bad),
    )
