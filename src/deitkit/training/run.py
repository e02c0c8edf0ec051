"""Where a run takes place: its folder (configuration, environment, metrics, checkpoints, summary) and its processes.

Everything is written to a temporary name, synced and renamed: a kill or a full disk leaves the old state or the new one. A resumed
run is compared with the folder: the same data (`refuse_other_data`), the same settings (`refuse_difference`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from safetensors import SafetensorError
from safetensors.torch import load_file

from deitkit.config import Config, ConfigT, JobT, LoopConfig, RunConfig
from deitkit.models.network import autocast_dtype, default_device, processor_name
from deitkit.settings import recipe_settings, upgraded, validated
from deitkit.terminal import (
    LOST_PEER,
    Lock,
    UserError,
    complain,
    load_yaml,
    refuse_filled,
    save_tensors,
    shortened,
    sync,
    write_atomically,
    written,
)

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143
PATIENCE_SECONDS = 20.0
"""How long the other processes may take to end by themselves once one has failed."""
INTERRUPT_SECONDS = 5.0
"""After which processes that the terminal has not interrupted are interrupted."""
WAIT_SECONDS = 0.5
"""Between two attempts to lock a folder that another program works on."""
_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "scipy", "pillow", "safetensors")

BEFORE_THE_SETTINGS = ("data.json", "environment.json")
"""Files that `RunFolder.create` writes before config.yaml, which makes a folder a run's."""
FREE_TO_CHANGE = {"workers", "processes", "location", "max_bad_images", "max_pixels"}
"""Settings that a resumed run may change: they do not affect the result (that the images are the same is checked). For `processes` this
holds but for rounding and, on a CPU, for batch normalisation, whose statistics are each process's own."""


@final
class RunFolder:
    """`path` with everything about one run in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Lock | None = None

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

    def refuse_existing(self) -> None:
        """Raises UserError where the folder already holds something."""
        ours = (self.path / "config.yaml").is_file()
        hint = "give --resume to continue it, or another --out" if ours else "it is no run: give another --out"
        refuse_filled(self.path, hint, besides=() if ours else BEFORE_THE_SETTINGS)

    def create(self, config: Config, data: dict[str, Any]) -> None:
        """Start a new run here; `data` is what its images are recognised by (`Dataset.names_hash`). Raises UserError where the folder
        already holds something."""
        self.refuse_existing()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be created: {error.strerror}") from error
        write_atomically(self.path / "data.json", json.dumps(data, indent=2) + "\n")
        write_atomically(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
        settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        write_atomically(self.path / "config.yaml", settings)  # last: with it the folder is a run's

    def refuse_other_data(self, data: dict[str, Any]) -> None:
        """Raises UserError where the images are not those that this run was started with: `data` is what `create` was
        given then. A run folder without data.json is not checked."""
        path = self.path / "data.json"
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
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
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict) and isinstance(event.get("step", 0), int):
                    events.append(event)
        return events

    def rewind(self, step: int) -> None:
        """Drop the metrics of steps after `step`: these steps are about to be repeated."""
        kept = [event for event in self.events() if event.get("step", 0) <= step]
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(event) + "\n" for event in kept))

    def save_checkpoint(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """A complete state after `step` steps; earlier ones are removed once it is safe on the disk."""
        target = self.checkpoints / f"step-{step:09d}"
        temporary = self.checkpoints / f".step-{step:09d}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        with written(target):
            temporary.mkdir(parents=True)
            save_tensors(tensors, temporary / "state.safetensors")
            (temporary / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
            sync(temporary / "state.json")
            sync(temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            sync(self.checkpoints)
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
            raise self.damaged_checkpoint(error) from error

    def damaged_checkpoint(self, why: Exception) -> UserError:
        newest = max(self.checkpoints.glob("step-*"))
        return UserError(
            f"{newest}: damaged ({shortened(str(why).strip())}): remove it to start this run from the beginning"
        )

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def summary(self) -> dict[str, Any]:
        """The content of summary.json. Raises UserError if the run is not finished."""
        path = self.path / "summary.json"
        if not path.is_file():
            raise UserError(f"{self.path}: no summary.json: not a finished run")
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if not _is_summary(content):
            raise UserError(f"{path}: damaged: it is no summary of a run: remove it, and give --resume again")
        return content


def _is_summary(content: Any) -> bool:
    """Whether `content` has what everybody who reads a summary looks at."""
    try:
        heads, teacher = content["top1"], content["teacher"]
        shares = [heads["cls"], *heads.values(), *([] if teacher is None else [teacher["top1"]])]
        _ = content["n"], content["model"], teacher is None or teacher["name"]
    except (TypeError, KeyError, AttributeError):
        return False
    return all(share is None or isinstance(share, int | float) for share in shares)


def default_out(data: str) -> Path:
    """The folder of a run that nobody named: `runs/<data>-<n>`, n one more than there are. Raises UserError."""
    if "LOCAL_RANK" in os.environ:
        raise UserError("--out: several processes need one folder: give its name")
    name = re.sub(r"[^\w.+-]+", "-", Path(data).resolve().name or "run").strip("-.") or "run"
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
    """Versions, processor, threads, revision and command line of this process."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git_revision": _git_revision(),
        "versions": {"deitkit": sys.modules["deitkit"].__version__, **{name: _version(name) for name in _PACKAGES}},
    }


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
        raise UserError(f"{folder.path}: was started with {key} = {old!r}, now it is {new!r}: resume it as it was")


def differences(stored: Config, given: Config) -> Iterator[tuple[str, Any, Any]]:
    """(setting, old, new) for every setting that affects the result and differs between two configurations of a kind."""
    now = given.model_dump()
    for section, was in stored.model_dump().items():
        pairs = {f"{section}.{key}": (was[key], now[section][key]) for key in was} if isinstance(was, dict) else {}
        for key, (old, new) in (pairs or {section: (was, now[section])}).items():
            if old != new and key.rsplit(".", 1)[-1] not in FREE_TO_CHANGE:
                yield key, old, new


def inherit_precision(config: JobT, before: JobT | None) -> JobT:
    """`config` with the precisions that its run was started with, where it says `auto`."""
    if before is None:
        return config
    if config.loop.precision == "auto":
        config = config.model_copy(update={"loop": config.loop.model_copy(update={"precision": before.loop.precision})})
    if isinstance(config, RunConfig) and isinstance(before, RunConfig) and config.teacher.teacher_precision == "auto":
        precision = {"teacher_precision": before.teacher.teacher_precision}
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update=precision)})
    return config


# ------------------------------------------------------------------------------------------------- processes


def make_accelerator(loop: LoopConfig, *, head_first: bool = False) -> Accelerator:
    """Accelerate's engine for these settings. Raises UserError where the processor lacks the precision."""
    device = default_device()
    computed_in = autocast_dtype(loop.precision, device)
    if loop.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
        torch.use_deterministic_algorithms(True)
    AcceleratorState._reset_state()  # another run in this process may have had another precision
    names = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
    # Without cpu=True Accelerate lets processes without a GPU train side by side, each alone.
    # A network whose head learns first leaves the other weights without gradients.
    frozen = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(
        mixed_precision=names[computed_in], cpu=device.type == "cpu", kwargs_handlers=[frozen] if head_first else []
    )


@contextlib.contextmanager
def preserved_global_state() -> Iterator[None]:
    """Whatever is done within this block, global random generators and `torch.use_deterministic_algorithms` are afterwards as before."""
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed, used = torch.initial_seed(), torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    of_gpus = torch.cuda.get_rng_state_all() if used else []
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if used:
            torch.cuda.set_rng_state_all(of_gpus)
        elif torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)  # what the first use of a GPU would have done


def launch(command: Sequence[str], count: int) -> int:
    """Run `command` in `count` processes of this machine, as `torchrun --standalone` would. Process 0 alone writes to the terminal. When
    one fails, the others are ended, and its last words and its exit code are the command's. Ctrl-C and SIGTERM reach all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outputs = [None, *(tempfile.TemporaryFile() for _ in range(count - 1))]  # noqa: SIM115
    processes: list[subprocess.Popen[bytes]] = []
    before = signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(TERMINATED)
    )  # else the others would outlive this process
    try:
        for rank, output in enumerate(outputs):
            environment = process_environment(rank, count, port)
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.05)
        hung = _end(processes, PATIENCE_SECONDS)
        failed = _culprit([0 if rank in hung else process.returncode for rank, process in enumerate(processes)])
        last_words, code = outputs[failed], processes[failed].returncode
        if code and last_words is not None:
            last_words.seek(0)
            sys.stderr.write(last_words.read().decode(errors="replace"))
        if code < 0:  # it could not say so itself
            why = ": perhaps there was not enough memory" if -code == signal.SIGKILL else ""
            complain(f"error: process {failed} of {count} was ended by signal {-code}{why}")
        return code if code >= 0 else 128 - code
    except KeyboardInterrupt:  # a terminal has sent it to all of them: let them end, and process 0 say so
        _end(processes, INTERRUPT_SECONDS, signal.SIGINT)
        _end(processes, PATIENCE_SECONDS)
        return INTERRUPTED
    except SystemExit:
        return TERMINATED
    finally:
        signal.signal(signal.SIGTERM, before)
        _end(processes, 0)
        for file in filter(None, outputs):
            file.close()


def process_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """The environment of process `rank` of `count` on this machine."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    threads = max(1, (os.cpu_count() or 1) // count)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        **{name: str(value) for name, value in own.items()},
    }


def _culprit(codes: Sequence[int]) -> int:
    """The rank of the process whose failure the others followed, from their own exit codes (0: none): a mistake in one line, else a
    signal, else a traceback; else one that only missed another one, or that NCCL aborted for that."""
    last = [LOST_PEER, -signal.SIGABRT, 0]

    def suspicion(rank: int) -> int:
        code = codes[rank]
        return 3 + last.index(code) if code in last else 0 if code == USER_ERROR else 1 if code < 0 else 2

    return min(range(len(codes)), key=suspicion)


def _end(
    processes: Sequence[subprocess.Popen[bytes]], patience: float, number: signal.Signals = signal.SIGTERM
) -> set[int]:
    """Let the processes end by themselves for so many seconds, then send the signal. Returns the ranks of those that had to be told;
    after SIGTERM all have ended."""
    deadline = time.monotonic() + patience
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    running = {rank for rank, process in enumerate(processes) if process.poll() is None}
    for rank in running:
        processes[rank].send_signal(number)
    for process in processes if number == signal.SIGTERM else ():
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return running
