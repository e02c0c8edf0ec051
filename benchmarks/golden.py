"""Show that a change of the code changes no result: the same small runs by two checkouts, compared bit by bit: `make golden`.

    python benchmarks/golden.py --base REV
    python benchmarks/golden.py --base REV --only plain taped views --out runs/golden      (a part, and keep what it wrote)

The working tree and the commit REV each train the same small networks on this machine, with the same interpreter and packages, one
thread each, both at once (two and a half minutes on two cores). Compared are the SHA-256 of every network's weights, of every
tape's records and of rendered views (each preset with each crop), and the share of validation images that a run gets right. Exit
code 1 if one of them differs. The text of each config.yaml is compared, too: a difference there is shown, but does not count.

One table of runs is for both sides. Where a newer checkout has another name for a flag, an object or a file, add that name to
`SPELLINGS`, `PLACES` or `FILES`, after the older ones: each side takes the first that its checkout knows.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, final

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
STUDENT = "--student deit_pico --steps 30 --precision float32"
TAUGHT = f"{STUDENT} --teacher ./cnn --teacher-precision float32"
PHOTOS = "--student deit_pico --image-size 32 --steps 12 --batch-size 8 --augment deit3 --precision float32"
RUNS = {
    "cnn": "teacher fit digits --model cifar-resnet8 --from-scratch --steps 30 --precision float32",
    "plain": f"train digits {STUDENT}",
    "hard": f"train digits {TAUGHT} --distillation hard",
    "soft": f"train digits {TAUGHT} --distillation soft",
    "zscore": f"train digits {TAUGHT} --distillation zscore",
    "mixed": f"train digits {TAUGHT} --distillation zscore --augment deit",
    "live": f"train digits {TAUGHT} --distillation zscore --record ./live-tape",
    "tape": "tape record digits --teacher ./cnn --teacher-precision float32 --student deit_pico --augment deit --views 2",
    "taped": f"train digits {STUDENT} --distillation zscore --tape ./tape",
    "photos-0": f"train ../photos {PHOTOS} --workers 0",
    "photos-2": f"train ../photos {PHOTOS} --workers 2",
    "resumed": "train digits --student deit_pico --epochs 3 --train-images 800 --precision float32",
    "adamw": "train digits --init ./plain --steps 30 --optimizer adamw --ema-decay 0.9 --precision float32",
    "recipe-plain": "train digits --recipe few-images --steps 20 --distillation none --precision float32",
    "recipe": "train digits --recipe few-images --steps 20 --teacher ./cnn --teacher-precision float32 --precision float32",
}
"""What `deit` is told, besides `--out ./NAME`. A run needs those whose folders it names (`./cnn`)."""
KILLED = {"resumed"}
"""Runs that are killed at their first checkpoint, and resumed."""
SPELLINGS = {
    "--steps": ("--steps {}",),
    "--epochs": ("--epochs {}",),
    "--augment": ("--augment {}",),
    "--tape": ("--tape {}", "--teacher {}"),
    "--record": ("--record {}",),
    "--recipe": ("--recipe {}",),
    "--precision": ("--precision {}",),
}
"""How a flag (or a verb) of that table is written, oldest first: a checkout that refuses one as unknown is given the next."""
PLACES = {
    "presets": ("deitkit.config:AUGMENT_PRESETS",),
    "data_config": ("deitkit.config:DataConfig",),
    "load_data": ("deitkit.data:load_data",),
    "crops_of": ("deitkit.feed:crops_of", "deitkit.views.loader:raw_batch"),
    "render": ("deitkit.feed:render", "deitkit.views.loader:augment_and_mix"),
}
"""Where the objects are that render views, module:name, oldest first."""
FILES = {
    "weights": ("model/model.safetensors",),
    "records": ("records.bin",),
    "digests": ("digests.bin",),
    "decisions": ("validation.safetensors",),
}
"""What is compared of a run's folder and of a tape's, and in which file it is, oldest first."""
CHECKPOINT = "checkpoints/step-*"
VIEWS = "views.json"
CROPS = ("pad", "resize", "simple")
REFUSED = re.compile(r"error: unknown (?:flag|verb) '?([\w-]+(?: [\w-]+)*)")
FAILED = "failed"

Artefacts = dict[tuple[str, str], str]
"""By run and by what of it is compared: a SHA-256 or a figure."""
Ended = tuple[int, str]
"""A process's exit code and what it has said."""


@final
class Side:
    """One of the two checkouts, and the new folder in which it runs."""

    def __init__(self, name: str, checkout: Path, folder: Path) -> None:
        self.name, self.source, self.folder = name, checkout / "src", folder
        self.spelling: defaultdict[tuple[str, str], int] = defaultdict(int)  # by verb and flag: which is used
        home = folder / "home"
        home.mkdir(parents=True)
        own = {"PYTHONPATH": str(self.source), "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
        same = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.environment = {**os.environ, **own, **same}

    def artefacts(self, names: Sequence[str]) -> Artefacts:
        """Run these, and return what there is to compare."""
        found: Artefacts = {}
        for name in names:
            started = time.perf_counter()
            code, said = self.run(name)
            print(f"{self.name}: {name}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            if code:
                print(f"{self.name}: {name} ended with {code}: {said.strip()[-2000:]}", file=sys.stderr, flush=True)
            parts = {"all": FAILED} if code else self.written(name)
            found |= {(name, what): value for what, value in parts.items()}
        return found

    def run(self, name: str) -> Ended:
        if name == "views":
            return self.python([__file__, "--views-of", str(self.source)])
        command = f"{RUNS[name]} --out ./{name}"
        if name in KILLED:
            code, said = self.deit(command, killed_at=self.folder / name)
            if code >= 0:  # it has ended by itself
                return code or 1, said
            command += " --resume"
        return self.deit(command)

    def deit(self, command: str, killed_at: Path | None = None) -> Ended:
        """`deit command`, written as this checkout knows it."""
        groups = grouped(command)
        verb = groups[0][0]
        while True:
            parts = {key: self.spelled(verb, key, values) for key, values in groups}
            code, said = self.python(["-m", "deitkit.cli", *" ".join(parts.values()).split()], killed_at)
            refused = REFUSED.search(said) if code == 2 else None
            key = next((key for key, words in parts.items() if refused and f"{refused[1]} " in f"{words} "), None)
            if key is None or self.spelling[verb, key] + 1 >= len(SPELLINGS.get(key, ())):
                return code, said
            self.spelling[verb, key] += 1

    def spelled(self, verb: str, key: str, values: Sequence[str]) -> str:
        if key not in SPELLINGS:
            return " ".join([key, *values])
        return SPELLINGS[key][self.spelling[verb, key]].format(*values)

    def python(self, argv: Sequence[str], killed_at: Path | None = None) -> Ended:
        """This interpreter with these arguments; until the run `killed_at` has a checkpoint, if one is named."""
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                [sys.executable, *argv], cwd=self.folder, env=self.environment, stdout=said, stderr=subprocess.STDOUT
            )
            if killed_at is not None:
                while process.poll() is None and not any(killed_at.glob(CHECKPOINT)):
                    time.sleep(0.005)
                process.kill()
            code = process.wait()
            said.seek(0)
            return code, said.read()

    def written(self, name: str) -> dict[str, str]:
        """What of a run is compared: the SHA-256 of its files and its tape's, its share of right validation images."""
        folders = (self.folder / name, self.folder / f"{name}-tape")
        found = {}
        for what, files in FILES.items():
            places = [folder / file for file in files for folder in folders if (folder / file).is_file()]
            if places:
                found[what] = hashlib.sha256(places[0].read_bytes()).hexdigest()
        summary = folders[0] / "summary.json"
        if summary.is_file():
            top1 = json.loads(summary.read_text(encoding="utf-8"))["top1"]
            found["top-1"] = str(top1["cls"] if top1["fused"] is None else top1["fused"])
        if name == "views":
            found = json.loads((self.folder / VIEWS).read_text(encoding="utf-8"))
        return found or {"all": FAILED}

    def settings(self, name: str) -> list[str]:
        """The lines of a run's config.yaml, if it has one; this side's folder is `.`."""
        path = self.folder / name / "config.yaml"
        return path.read_text(encoding="utf-8").replace(str(self.folder), ".").splitlines() if path.is_file() else []


def grouped(command: str) -> list[tuple[str, list[str]]]:
    """A command's verb with its data, then each flag with its values."""
    head, *flags = [part.split() for part in command.split(" --")]
    return [(" ".join(head[:-1]), head[-1:]), *((f"--{flag[0]}", flag[1:]) for flag in flags)]


def wanted(only: Sequence[str]) -> list[str]:
    """These runs and those that they need, or all, in order."""
    chosen = set(only or [*RUNS, "views"])
    for name, command in reversed(RUNS.items()):
        if name in chosen:
            chosen |= {other for other in RUNS if f"./{other}" in command.split()}
    return [name for name in (*RUNS, "views") if name in chosen]


def padding(side: int) -> float:
    """Two pixels: a share of the view, or a number of pixels in checkouts before views had none."""
    from deitkit.config import ViewConfig

    return 2 / side if "share" in (ViewConfig.model_fields["crop_padding"].description or "") else 2


def rendered(source: Path) -> dict[str, str]:
    """By preset and crop, the SHA-256 of 24 views of the digits and, where they are resized, of the photos. Imports `source`."""
    known = {what: first_known(places) for what, places in PLACES.items()}
    if source not in Path(sys.modules["deitkit"].__file__ or "").parents:
        raise ImportError(f"deitkit is not that of {source}")
    data = {place: known["load_data"](place, known["data_config"]()) for place in ("digits", "../photos")}
    digests = {}
    for name, preset in known["presets"].items():
        for crop in CROPS:
            digest = hashlib.sha256()
            for place, side in (("digits", 8), ("../photos", 32))[: 1 if crop == "pad" else 2]:
                changes = {"crop": crop, "view_size": (side, side), "crop_padding": padding(side)}
                recipe = type(preset)(**{**preset.model_dump(), **changes})
                crops = known["crops_of"](data[place].open_split("train"), recipe, np.arange(24), np.arange(24) % 3)
                for part in known["render"](crops, recipe):
                    if hasattr(part, "numpy"):  # a teacher's views are None where no teacher wants a size of its own
                        digest.update(part.numpy().tobytes())
            digests[f"{name}, {crop}"] = digest.hexdigest()
    return digests


def first_known(places: Sequence[str]) -> Any:
    for place in places:
        module, _, name = place.partition(":")
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), name)
    raise ImportError(f"this checkout has none of {', '.join(places)}")


def make_photos(folder: Path, count: int = 48) -> None:
    """Small JPEG photos of many sizes: coarse noise, brighter in a colour that is the class."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / ("red", "green", "blue")[number % 3] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        pixels[..., number % 3] |= 128
        width, height = generator.integers(40, 120, 2).tolist()
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)


def check_out(revision: str, folder: Path) -> Path:
    archive = subprocess.run(["git", "-C", ROOT, "archive", revision], stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def print_artefacts(base: Artefacts, tree: Artefacts) -> int:
    """A line for each of them. Returns how many differ."""
    print("\n| run | what | base | working tree | |\n| --- | --- | --- | --- | --- |")
    different = 0
    for name, what in dict.fromkeys([*base, *tree]):
        before, now = base.get((name, what), "missing"), tree.get((name, what), "missing")
        same = before == now != FAILED
        different += not same
        print(f"| {name} | {what} | {before[:12]} | {now[:12]} | {'identical' if same else 'DIFFERENT'} |")
    print(f"\nin bits: {different} of {len(base | tree)} differ")
    return different


def print_settings(base: Side, tree: Side, names: Sequence[str]) -> None:
    """How the runs' config.yaml differ; those that differ alike together."""
    alike = defaultdict(list)
    for name in names:
        before, now = base.settings(name), tree.settings(name)
        if before or now:
            alike["\n".join(list(difflib.unified_diff(before, now, lineterm="", n=0))[2:])].append(name)
    for difference, runs in alike.items():
        print(f"\nconfig.yaml of {', '.join(runs)}: {'DIFFERENT' if difference else 'identical'}")
        print(difference, end="\n" if difference else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="REV", default="HEAD", help="commit to hold the working tree against")
    parser.add_argument("--only", nargs="+", choices=[*RUNS, "views"], help="these, and what they need")
    parser.add_argument("--out", type=Path, help="new folder that keeps what the runs wrote")
    parser.add_argument("--views-of", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.views_of:
        Path(VIEWS).write_text(json.dumps(rendered(given.views_of)), encoding="utf-8")
        return 0
    if given.out and given.out.exists():
        parser.error(f"--out {given.out}: is there already")
    names, started = wanted(given.only), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        out = (given.out or Path(temporary)).resolve()
        make_photos(out / "photos")
        base = Side("base", check_out(given.base, out / "base-checkout"), out / "base")
        tree = Side("working tree", ROOT, out / "tree")
        with ThreadPoolExecutor(2) as both:
            found = list(both.map(lambda side: side.artefacts(names), (base, tree)))
        different = print_artefacts(*found)
        print_settings(base, tree, names)
    print(f"\n{time.perf_counter() - started:.0f} s")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
