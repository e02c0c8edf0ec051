"""`deit data ...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from deitkit.config import RunConfig
from deitkit.errors import UserError, one_line
from deitkit.flags import Field
from deitkit.progress import Progress, file_size
from deitkit.verbs.common import MOST_PIXELS, check_range, configured, data_field, json_field, on_terminal, print_json


def show(argv: list[str], prog: str, help: str) -> int:
    fields = [
        data_field(),
        Field("views", int, "views to show of each image", 6),
        Field("out", Path | None, "write a sheet of images and their views to this PNG file", None, metavar="PNG"),
        json_field(),
    ]
    config, given = configured(
        RunConfig,
        argv,
        prog,
        help,
        fields,
        only=lambda place: place.section == "data" or (place.section == "view" and place.name != "views"),
    )
    check_range("--views", given.views, 0, 100)
    from deitkit.data import load_data
    from deitkit.resolve import resolve_view, say_unlabelled, student_architecture
    from deitkit.show import describe, one_of_each_class, titled, view_sheet

    dataset = load_data(given.data, config.data)
    facts = describe(dataset)
    if given.json:
        print_json(facts)
    else:
        with on_terminal() as progress:
            _show_facts(facts, progress)
            say_unlabelled(dataset, progress)
    if given.out is not None:
        view = resolve_view(config.view, dataset, student_architecture(config, dataset).image_size)
        split = dataset.open_split("train")
        positions = one_of_each_class(split, 10)
        names = ["no label" if label < 0 else dataset.classes[label] for label in split.labels_N[positions].tolist()]
        picture = titled(view_sheet(split, view, positions, given.views), names)
        try:
            picture.save(given.out, format="PNG")
        except OSError as error:
            raise UserError(f"--out {given.out}: cannot be written: {error.strerror or error}") from error
        print(f"{given.out}: each row is an image and {given.views} views of it", file=sys.stderr)
    return 0


def cache(argv: list[str], prog: str, help: str) -> int:
    fields = [
        data_field(),
        Field(
            "size",
            int,
            "pixels of the shorter side: photos need the image size / 0.875 of every network that will see them, student and "
            "teacher (256 for 224, 146 for 128), with fewer all figures change; smaller images stay as they are",
            metavar="N",
        ),
        Field("out", Path, "folder of the resized images: DATA for all verbs from now on", metavar="DIR"),
    ]
    config, given = configured(RunConfig, argv, prog, help, fields, only=lambda place: place.section == "data")
    check_range("--size", given.size, 1, MOST_PIXELS)
    from deitkit.data import load_data, refuse_among_images
    from deitkit.data.resized import splits_of, write_resized
    from deitkit.resolve import say_unlabelled

    refuse_among_images(given.data, given.out)
    dataset = load_data(given.data, config.data)
    with on_terminal() as progress:
        for line in dataset.bad_images:
            progress.warn(f"left out: {line}")
        say_unlabelled(dataset, progress)
        progress.start(sum(len(dataset.open_split(name)) for name in splits_of(dataset)), "resizing", unit="images")
        counts = write_resized(
            dataset, config.data, given.size, given.out, lambda done: progress.step(done, done, 0, 0)
        )
        progress.finish()
        size = sum(path.stat().st_size for path in given.out.iterdir())
        images = ", ".join(f"{count} {name}" for name, count in counts.items())
        progress.say(f"{given.out}: {images} images, {file_size(size)}")
        unlabelled = " --unlabelled" if config.data.unlabelled else ""
        progress.say(f"next: deit train {given.out} --teacher auto{unlabelled} --out runs/first")
    return 0


def _show_facts(facts: dict[str, Any], progress: Progress) -> None:
    images, sizes = facts["images"], facts["sizes"]
    spans = [f"{low}" if low == high else f"{low} to {high}" for low, high in sizes.values()]
    test = "there is one, not opened" if facts["has_test"] else "none"
    if facts["set_aside"]:
        test = f"{facts['set_aside']} images set aside, a fifth of each class, as there is no test folder; not opened"
    rows = [[name, counts["train"], counts["val"]] for name, counts in facts["classes"].items()]
    if facts["unlabelled"]:
        rows.append(["without a label", facts["unlabelled"], 0])
    rows.append(["all", images["train"], images["val"]])
    progress.table(facts["name"], ["class", "train", "validation"], rows)
    print(f"test split: {test}")
    if spans:
        print(f"images: {' x '.join(spans)} pixels (height x width), {'grey' if facts['channels'] == 1 else 'colour'}")
    if not facts["mirror_safe"]:
        print("never mirrored: the mirror image means something else")
    print(f"unreadable: {len(facts['bad_images'])}")
    for line in facts["bad_images"]:
        print(f"  {one_line(line)}")
