"""What a training computes with: Accelerate's engine, trackers, the caller's global state, several processes of one machine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from deitkit.config import JobConfig, LoopConfig
from deitkit.models.network import autocast_dtype, default_device
from deitkit.settings import dotted
from deitkit.terminal import LOST_PEER, UserError, complain, shortened
from deitkit.views.prefetch import end_with_parent

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143
PATIENCE_SECONDS = 20.0
"""How long the other processes may take to end by themselves once one has failed."""
PATIENCE_WITH_PEERS = timedelta(hours=6)
"""While the first process decodes photos or waits for another program, the others wait; one that dies is noticed without this."""
GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""
INTERRUPT_SECONDS = 5.0
"""After which processes that the terminal has not interrupted are interrupted."""


def make_accelerator(loop: LoopConfig, *, head_first: bool = False) -> Accelerator:
    """Accelerate's engine for these settings. Raises UserError where the processor lacks the precision."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun or `accelerate launch`, which one killed would leave behind
        end_with_parent(signal.SIGTERM)
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
    found = importlib.util.find_spec(loop.track) if loop.track else None
    if loop.track is not None and (
        found is None or found.origin is None
    ):  # without an origin it is a folder of that name
        raise UserError(f"--track {loop.track}: the package is not installed: pip install {loop.track}")
    return Accelerator(
        mixed_precision=names[computed_in],
        cpu=device.type == "cpu",
        log_with=loop.track,
        project_dir="." if loop.track else None,  # the run's folder, once it is there
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE_WITH_PEERS), *([frozen] if head_first else [])],
    )


def start_tracking(accelerator: Accelerator, config: JobConfig, run: Path) -> None:
    """Open the tracker that the settings name, if they do; TensorBoard writes into the run's folder."""
    if config.loop.track is None:
        return
    accelerator.project_configuration.logging_dir = str(run)
    settings = {
        name: value if isinstance(value, int | float | str) else str(value)
        for name, value in dotted(config.model_dump(mode="json")).items()
    }
    own = {"wandb": {"name": run.name}, "trackio": {"name": run.name}, "mlflow": {"run_name": run.name}}
    try:
        project = "tensorboard" if config.loop.track == "tensorboard" else "deitkit"  # there it is the name of a folder
        accelerator.init_trackers(project, settings, {config.loop.track: own.get(config.loop.track, {})})
    except Exception as error:  # of whatever kind: a tracker must not keep a training from starting without a word
        raise UserError(
            f"--track {config.loop.track}: {shortened(str(error).strip() or type(error).__name__)}"
        ) from error


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
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=output,
                stderr=output,
                preexec_fn=partial(end_with_parent, signal.SIGTERM),
            )
            processes.append(process)
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
        _end(processes, 0, grace=PATIENCE_SECONDS)  # they save their state
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
    processes: Sequence[subprocess.Popen[bytes]],
    patience: float,
    number: signal.Signals = signal.SIGTERM,
    grace: float = GRACE_SECONDS,
) -> set[int]:
    """Let the processes end by themselves for so many seconds, then send the signal. Returns the ranks of those that had to be told;
    after SIGTERM and `grace` seconds all have ended."""
    deadline = time.monotonic() + patience
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    running = {rank for rank, process in enumerate(processes) if process.poll() is None}
    for rank in running:
        processes[rank].send_signal(number)
    for process in processes if number == signal.SIGTERM else ():
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return running
