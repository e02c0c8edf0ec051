"""The run folder: configuration, environment, metrics, checkpoints, summary; readable without this program.

Whatever is written is written to a temporary name, synced and renamed: a kill leaves the old state or the new one.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deitkit.config import Config, ConfigT, dump_yaml, load_yaml, validated
from deitkit.errors import UserError

_PACKAGES = ("deitkit", "torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "safetensors")


@final
class RunFolder:
    """`path` with everything about one run in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    def create(self, config: Config) -> None:
        """Start a new run here. Raises UserError where the folder already holds something."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            hint = "give --resume to go on with it" if (self.path / "config.yaml").is_file() else "it is not a run's"
            raise UserError(f"{self.path}: already exists and is not empty: {hint}, or another --out")
        try:
            self.checkpoints.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be created: {error.strerror}") from error
        write_atomically(self.path / "config.yaml", dump_yaml(config))
        write_atomically(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")

    def config(self, kind: type[ConfigT]) -> ConfigT:
        path = self.path / "config.yaml"
        if not path.is_file():
            raise UserError(f"{self.path}: no run to resume here: config.yaml is missing")
        return validated(kind, load_yaml(path), str(path))

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **fields}, allow_nan=True) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a line that a kill cut short is left out."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        events = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return events

    def rewind(self, step: int) -> None:
        """Drop the metrics of steps after `step`: they are about to be made again."""
        kept = [event for event in self.events() if event.get("step", 0) <= step]
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(event) + "\n" for event in kept))

    def save_checkpoint(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """A complete state after `step` steps; earlier ones are removed once it is safe on the disk."""
        target = self.checkpoints / f"step-{step:09d}"
        temporary = self.checkpoints / f".step-{step:09d}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
        for file in temporary.iterdir():
            _sync(file)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _sync(self.checkpoints)
        for old in self.checkpoints.iterdir():
            if old != target:
                shutil.rmtree(old, ignore_errors=True)

    def latest_checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors (on the CPU) and state of the newest complete checkpoint, or None. Raises UserError."""
        folders = sorted(self.checkpoints.glob("step-*")) if self.checkpoints.is_dir() else []
        if not folders:
            return None
        try:
            state = json.loads((folders[-1] / "state.json").read_text(encoding="utf-8"))
            return load_file(folders[-1] / "state.safetensors"), state
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{folders[-1]}: damaged ({error}): remove it to start this run from the beginning"
            ) from error

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def summary(self) -> dict[str, Any]:
        """What summary.json says. Raises UserError where the run is not finished."""
        path = self.path / "summary.json"
        if not path.is_file():
            raise UserError(f"{self.path}: no summary.json: not a finished run")
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)


def environment() -> dict[str, Any]:
    """Versions, processor, threads, revision and command line of this process."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git_revision": _git_revision(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _git_revision() -> str | None:
    here = Path(__file__).parent
    result = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
