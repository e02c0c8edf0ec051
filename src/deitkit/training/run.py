"""The folder of a run: configuration, environment, metrics, checkpoints, summary.

Everything is written to a temporary name, synced and renamed: a kill or a full disk leaves the old state or the new one. A resumed
run is compared with the folder: the same data (`refuse_other_data`), the same settings (`refuse_difference`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from deitkit.config import Config, ConfigT, JobT, RunConfig
from deitkit.data.dataset import SplitName
from deitkit.lengths import in_words
from deitkit.models.network import processor_name
from deitkit.settings import dotted, recipe_settings, upgraded, validated
from deitkit.terminal import (
    Lock,
    UserError,
    expanded,
    load_yaml,
    parse_json,
    refuse_filled,
    save_tensors,
    shortened,
    sync,
    write_atomically,
    written,
)

WAIT_SECONDS = 0.5
"""Between two attempts to lock a folder that another program works on."""
_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "scipy", "pillow", "safetensors")

STATE, CHECKSUMS = ("state.safetensors", "state.json"), "SHA256SUMS"
"""Files of a checkpoint; the last one is for `sha256sum -c`."""
KEPT_CHECKPOINTS = 2
BEFORE_THE_SETTINGS = ("data.json", "environment.json")
"""Files that `RunFolder.create` writes before config.yaml, which makes a folder a run's."""
FREE_TO_CHANGE = {"workers", "processes", "location", "max_bad_images", "max_pixels", "track", "keep"}
"""Settings that a resumed run may change: they do not affect the result (that the images are the same is checked). For `processes` this
holds but for rounding and, on a CPU, for batch normalisation, whose statistics are each process's own."""


class EvaluationFiles(NamedTuple):
    """What a run folder holds of some images on which its network was measured."""

    figures: Path
    predictions: Path
    page: Path


@final
class RunFolder:
    """`path` with everything about one run in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Lock | None = None
        self._sound: Path | None = None
        """the checkpoint that `latest_checkpoint` has read"""

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The checkpoint with the best validation accuracy."""
        return self.checkpoints / "best"

    def evaluation(self, split: SplitName, data: str | None = None) -> EvaluationFiles:
        """Where the figures of a split of the run's own data are, or those of the other `data`: in a folder of their own, of the data's
        name, with a number where another place's data of this name were measured before."""
        if data is None:
            end = "" if split == "val" else f"-{split}"
            return EvaluationFiles(
                *(
                    self.path / name
                    for name in (f"evaluation-{split}.json", f"predictions{end}.csv", f"report{end}.html")
                )
            )
        name = f"{name_for_folder(data)}-{split}"
        for number in itertools.count(1):
            folder = self.path / "evaluations" / (name if number == 1 else f"{name}-{number}")
            if not folder.exists() or _measured_place(folder / "evaluation.json") == place_of(data):
                break
        return EvaluationFiles(folder / "evaluation.json", folder / "predictions.csv", folder / "report.html")

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    def lock(self, on_wait: Callable[[], None] | None = None) -> None:
        """Keep other programs from working here, until `unlock` or the end of this process. The folder is made if it is missing.
        With `on_wait` another program is waited for, after a call of it. Raises UserError."""
        while self._lock is None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = Lock(self.path)
            except BlockingIOError as error:
                if on_wait is None:
                    raise UserError(f"{self.path}: another process is working on this run") from error
                on_wait()
                on_wait = lambda: time.sleep(WAIT_SECONDS)  # noqa: E731
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def refuse_existing(self, kind: type[Config]) -> None:
        """Raises UserError where the folder already holds something. `kind`: of the settings of the run that was to be started."""
        try:
            str(self.path.absolute()).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{self.path}: is no UTF-8, so weights cannot be kept there: give another --out") from error
        ours, hint = (self.path / "config.yaml").is_file(), "it is no run: give another --out"
        if ours and not self.finished:
            hint = "give --resume to continue it, or another --out"
        elif ours:
            student = issubclass(kind, RunConfig) and "student" in load_yaml(self.path / "config.yaml")
            hint = f"give {'--resume to train it longer with a larger --epochs, or ' if student else ''}another --out"
        refuse_filled(self.path, hint, besides=() if ours else BEFORE_THE_SETTINGS)

    def create(self, config: Config, data: dict[str, Any]) -> None:
        """Start a new run here; `data` is what its images are recognised by (`Dataset.names_hash`). Raises UserError where the folder
        already holds something."""
        self.refuse_existing(type(config))
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be created: {error.strerror}") from error
        write_atomically(self.path / "data.json", json.dumps(data, indent=2) + "\n")
        write_atomically(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
        settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        write_atomically(self.path / "config.yaml", settings)  # last: with it the folder is a run's

    def extend(self, config: Config, steps: int | None) -> None:
        """Go on with other settings, `config`, perhaps longer than the `steps` before; a finished run is unfinished again, its summary kept
        under another name."""
        if self.finished:
            (self.path / "summary.json").replace(self.path / f"summary-{steps}-steps.json")
        write_atomically(self.path / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))

    def refuse_other_data(self, data: dict[str, Any]) -> None:
        """Raises UserError where the images are not those that this run was started with: `data` is what `create` was
        given then. A run folder without data.json is not checked."""
        path = self.path / "data.json"
        try:
            before = parse_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if isinstance(before, dict) and "outline" in before:
            before["names_hash"] = before.pop("outline")  # its name in version 0.1
        if before == data:
            return
        if not isinstance(before, dict):
            raise UserError(f"{path}: damaged: remove it if you know that the images are those of before")
        now, then = (f"{one.get('train')} for training, {one.get('val')} for validation" for one in (data, before))
        raise UserError(
            f"{self.path}: the images are not those that this run was started with (now {now}; then {then}): validation images may "
            f"have been trained on: put the data back as they were, and give the same --train-images, --val-fraction and --data-seed"
        )

    def from_here(self, name: str) -> str:
        """A path, a teacher's name or several joined (A+B, NAME@FILE) as the settings have it; what is not there and was there in the
        folder in which the run was started is replaced by its path in that folder."""
        try:
            folder = Path(parse_json((self.path / "environment.json").read_text(encoding="utf-8"))["folder"])
        except (OSError, ValueError, LookupError, TypeError):  # a run of an earlier version, or an edited file
            return name

        def found(path: str) -> str:
            try:
                there = folder / path
                here = not path or expanded(path).exists() or not there.exists() or there.samefile(self.path)
            except (OSError, ValueError):
                return path
            return path if here else str(there)

        def member(one: str) -> str:
            model, at, file = one.partition("@")
            return f"{model}@{found(file)}" if at else found(one)

        return whole if (whole := found(name)) != name else "+".join(map(member, name.split("+")))

    def config(self, kind: type[ConfigT]) -> ConfigT:
        """The settings in config.yaml, in today's names. Raises UserError, also if they are those of another kind of run."""
        path = self.path / "config.yaml"
        if not path.is_file():
            raise UserError(
                f"{self.path}: no run to resume here: config.yaml is missing: leave out --resume to start one"
            )
        values = upgraded(load_yaml(path), str(path))
        if unknown := set(values) - set(kind.model_fields):
            raise UserError(f"{path}: is of another kind of run (it has {', '.join(sorted(map(str, unknown)))})")
        return validated(kind, values, str(path))

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        with written(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **fields}, allow_nan=True) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without damaged ones, as a kill leaves them."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        events = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                event = parse_json(line)
                if isinstance(event, dict) and isinstance(event.get("step", 0), int):
                    events.append(event)
        return events

    def rewind(self, step: int) -> None:
        """Drop the metrics of steps after `step`: these steps are about to be repeated."""
        kept = [event for event in self.events() if event.get("step", 0) <= step]
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(event) + "\n" for event in kept))

    def save_checkpoint(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """A complete state after `step` steps. The one before it is kept, too; older ones are removed once this is safe on the disk."""
        self._save_state(self.checkpoints / f"step-{step:09d}", step, tensors, state)
        kept = {*self._checkpoints()[-KEPT_CHECKPOINTS:], self.best}
        for old in self.checkpoints.iterdir():
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)

    def save_best(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """The state with the best validation accuracy so far."""
        self._save_state(self.best, step, tensors, state)

    def _save_state(self, target: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        temporary = _unfinished(target)
        shutil.rmtree(temporary, ignore_errors=True)
        with written(target):
            temporary.mkdir(parents=True)
            save_tensors(tensors, temporary / STATE[0])
            (temporary / STATE[1]).write_text(json.dumps({"step": step, **state}), encoding="utf-8")
            sums = "".join(f"{_sha256(temporary / name)}  {name}\n" for name in STATE)
            (temporary / CHECKSUMS).write_text(sums, encoding="utf-8")
            for name in (STATE[1], CHECKSUMS, ""):
                sync(temporary / name)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            sync(self.checkpoints)

    def _checkpoints(self) -> list[Path]:
        """The complete checkpoints, the newest last."""
        return sorted(self.checkpoints.glob("step-*")) if self.checkpoints.is_dir() else []

    def latest_checkpoint(
        self, warn: Callable[[str], None] = lambda _: None
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors (on the CPU) and state of the newest sound checkpoint; None if there is none at all. `warn` is told of a damaged one.
        Raises UserError where all are damaged."""
        damage: list[tuple[Path, Exception]] = []
        for folder in reversed(self._checkpoints()):
            try:
                found = _read_state(folder)
            except (OSError, ValueError, SafetensorError) as error:
                damage.append((folder, error))
            else:
                for other, why in damage:
                    warn(
                        f"{other}: damaged ({shortened(str(why).strip())}): the checkpoint before it, {folder.name}, is used"
                    )
                self._sound = folder
                return found
        if damage:
            raise self.damaged_checkpoint(damage[0][1]) from damage[0][1]
        return None

    def best_checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and state of `save_best`. Raises UserError."""
        # a kill may have come between removing the old one and renaming the new one
        with contextlib.suppress(OSError, ValueError, SafetensorError):
            return _read_state(self.best if self.best.is_dir() else _unfinished(self.best))
        raise UserError(f"{self.best}: missing or damaged: give --resume with --keep last")

    def damaged_checkpoint(self, why: Exception) -> UserError:
        """What to say where the newest sound checkpoint holds no state of this training, or none is sound."""
        found = self._checkpoints()
        place = found.index(self._sound) if self._sound in found else None
        one, before = found[-1 if place is None else place], found[: place or 0]
        if before:
            advice = f"remove it to continue from {before[-1].name}"
        else:
            others = "".join(f" and {other.name}" for other in reversed(found) if other != one)
            advice = f"remove it{others} to start this run from the beginning"
        return UserError(f"{one}: damaged ({shortened(str(why).strip())}): {advice}")

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def summary(self) -> dict[str, Any]:
        """The content of summary.json. Raises UserError if the run is not finished."""
        path = self.path / "summary.json"
        if not path.is_file():
            raise UserError(f"{self.path}: no summary.json: not a finished run")
        try:
            content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if not _is_summary(content):
            raise UserError(f"{path}: damaged: it is no summary of a run: remove it, and give --resume again")
        return content


def _unfinished(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return checkpoint.with_name(f".{checkpoint.name}.tmp")


def _read_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint. Raises OSError, ValueError, SafetensorError where it is damaged."""
    if (folder / CHECKSUMS).exists():  # not in version 0.1
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: known for known, _, name in (line.partition("  ") for line in lines)}
        for name in STATE:
            if _sha256(folder / name) != sums.get(name):
                raise ValueError(f"{name}: wrong checksum")
    state: dict[str, Any] = parse_json((folder / STATE[1]).read_text(encoding="utf-8"))
    return load_file(folder / STATE[0]), state


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_summary(content: Any) -> bool:
    """Whether `content` has what everybody who reads a summary looks at."""
    try:
        heads, teacher = content["top1"], content["teacher"]
        shares = [heads["cls"], *heads.values(), *([] if teacher is None else [teacher["top1"]])]
        _ = content["n"], content["model"], teacher is None or teacher["name"]
    except (TypeError, KeyError, AttributeError):
        return False
    return all(share is None or isinstance(share, int | float) for share in shares)


def place_of(data: str) -> str:
    """Where data are, wherever the program is started; a data set's name stays as it is."""
    path = expanded(data)
    return str(path.resolve()) if path.exists() else data


def _measured_place(figures: Path) -> object:
    """The `place_of` the data of which a file has the figures; None if it does not say."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return parse_json(figures.read_text(encoding="utf-8"))["place"]
    return None


def name_for_folder(data: str) -> str:
    """The last part of a path or the name of data, without signs that a folder's name should not have."""
    return re.sub(r"[^\w.+-]+", "-", Path(data).resolve().name or "run").strip("-.") or "run"


def default_out(data: str) -> Path:
    """The folder of a run that nobody named: `runs/<data>-<n>`, n one more than there are. Raises UserError."""
    if "LOCAL_RANK" in os.environ:
        raise UserError("--out: several processes need one folder: give its name")
    name = name_for_folder(data)
    return next(path for n in itertools.count(1) if not (path := Path("runs") / f"{name}-{n}").exists())


def teacher_unasked(out: Path, resume: bool, recipe: Path | None) -> str | None:
    """Whom a student learns from where nobody is named: a teacher fitted to its images; nobody, if the `recipe` that was asked for has no
    distillation, or the run in `out` that is resumed had no teacher. Raises UserError."""
    if recipe is not None and recipe_settings(RunConfig, recipe).get("distillation") in (None, "none"):
        return None
    if resume and (out / "config.yaml").is_file() and not RunFolder(out).config(RunConfig).teacher.present:
        return None
    return "auto"


def environment() -> dict[str, Any]:
    """Command line, working folder, versions, processor, threads and revision of this process."""
    return {
        "command": sys.argv,
        "folder": _working_folder(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git_revision": _git_revision(),
        "versions": {"deitkit": sys.modules["deitkit"].__version__, **{name: _version(name) for name in _PACKAGES}},
    }


def _working_folder() -> str | None:
    try:
        return str(Path.cwd())
    except OSError:  # it has been removed
        return None


def _git_revision() -> str | None:
    """The commit of this program's source, if it runs from its own checkout; with `-dirty` if the source differs from it."""
    here = Path(__file__).parents[3]
    if not (here / "src" / "deitkit").is_dir():  # installed: git would speak of somebody else's project
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", here, *command], capture_output=True, text=True, check=False).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "src"])
        )
    except OSError:  # git is not installed
        return None
    return f"{commit}{'-dirty' if changes else ''}" if commit else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def refuse_difference(stored: Config, given: Config, folder: RunFolder) -> None:
    """Raises UserError naming the first setting that differs from those of the run to be resumed."""
    for key, old, new in differences(stored, given):
        if key == "loop.length":
            longer = "--resume can make a training longer, not shorter: give more, leave out the length"
            how = longer if isinstance(stored, RunConfig) else "resume it as it was"
            raise UserError(
                f"{folder.path}: is planned with {in_words(old)}, this would be {in_words(new)}: {how}, or start another --out"
            )
        raise UserError(f"{folder.path}: was started with {key} = {old!r}, now it is {new!r}: resume it as it was")


def differences(stored: Config, given: Config) -> Iterator[tuple[str, Any, Any]]:
    """(setting, old, new) for every setting that affects the result and differs between two configurations of a kind."""
    now = dotted(given.model_dump())
    for key, old in dotted(stored.model_dump()).items():
        if old != now[key] and key.rsplit(".", 1)[-1] not in FREE_TO_CHANGE:
            yield key, old, now[key]


def inherit_precision(config: JobT, before: JobT | None) -> JobT:
    """`config` with the precisions that its run was started with, where it says `auto`."""
    if before is None:
        return config
    if config.loop.precision == "auto":
        config = config.changed(loop={"precision": before.loop.precision})
    if isinstance(config, RunConfig) and isinstance(before, RunConfig) and config.teacher.teacher_precision == "auto":
        precision = {"teacher_precision": before.teacher.teacher_precision}
        config = config.changed(teacher=precision)
    return config
