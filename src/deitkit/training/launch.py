"""One command in several processes of this machine, as `torchrun --standalone` would start it.

torchrun itself would answer a user's mistake with one report a process and a traceback; here the first process speaks,
and its exit code is the command's.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from deitkit.terminal import LOST_PEER, complain

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143
PATIENCE_SECONDS = 20.0
"""How long the others may take to end by themselves once one has failed."""
INTERRUPT_SECONDS = 5.0
"""After which processes that were not told of an interruption, as a terminal does, are told."""


def launch(command: Sequence[str], count: int) -> int:
    """Run `command` in `count` processes with the environment that torch.distributed reads. Returns the exit code: 0, or
    that of the process whose failure the others followed. Only process 0 writes to the terminal; what another one said of its
    failure comes after."""
    processes: list[subprocess.Popen[bytes]] = []
    before = signal.signal(signal.SIGTERM, _terminated)  # else they would outlive this process
    said: list[IO[bytes]] = []
    port = _free_port()
    try:
        for rank in range(count):
            output: IO[bytes] | None = None if rank == 0 else tempfile.TemporaryFile()  # noqa: SIM115
            if output is not None:
                said.append(output)
            environment = process_environment(rank, count, port)
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        return _wait(processes, said)
    except KeyboardInterrupt:  # a terminal has sent it to all of them: let them end, and process 0 say so
        _wait_until_all_end(processes, INTERRUPT_SECONDS)
        for process in processes:
            process.send_signal(signal.SIGINT)
        _end(processes)
        return INTERRUPTED
    except _Terminated:
        for process in processes:
            process.terminate()
        return TERMINATED
    finally:
        signal.signal(signal.SIGTERM, before)
        _end(processes, patience=0)
        for file in said:
            file.close()


class _Terminated(Exception):
    """This process was told to end."""


def _terminated(_signal: int, _frame: object) -> None:
    raise _Terminated


def process_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """The environment of process `rank` of `count` on this machine."""
    threads = max(1, (os.cpu_count() or 1) // count)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }


def _wait(processes: list[subprocess.Popen[bytes]], said: list[IO[bytes]]) -> int:
    while any(process.poll() is None for process in processes) and not any(p.poll() for p in processes):
        time.sleep(0.05)
    if not any(process.returncode for process in processes):
        return 0
    ended = _end(processes)
    failed = _culprit([0 if rank in ended else process.returncode for rank, process in enumerate(processes)])
    if failed > 0:
        said[failed - 1].seek(0)
        sys.stderr.write(said[failed - 1].read().decode(errors="replace"))
    code = processes[failed].returncode
    if code < 0:  # it could not say so itself
        why = ": perhaps there was not enough memory" if -code == signal.SIGKILL else ""
        complain(f"error: process {failed} of {len(processes)} was ended by signal {-code}{why}")
    return code if code > 0 else 128 - code


def _culprit(codes: Sequence[int]) -> int:
    """The rank of the process whose failure the others followed, from what they ended with by themselves (0: they did not
    fail): a mistake in one line, else a signal, else a traceback; else those that only missed another one, which NCCL aborts."""

    def suspicion(rank: int) -> int:
        code = codes[rank]
        if code in (0, -signal.SIGABRT, LOST_PEER):
            return (LOST_PEER, -signal.SIGABRT, 0).index(code) + 3
        return 0 if code == USER_ERROR else 1 if code < 0 else 2

    return min(range(len(codes)), key=suspicion)


def _wait_until_all_end(processes: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """For `patience` seconds at most."""
    deadline = time.monotonic() + patience
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen[bytes]], patience: float | None = None) -> set[int]:
    """Wait `patience` seconds, PATIENCE_SECONDS if None, for the processes to end by themselves, then end them. Returns the
    ranks of those that had to be ended."""
    _wait_until_all_end(processes, PATIENCE_SECONDS if patience is None else patience)
    hanging = {rank for rank, process in enumerate(processes) if process.poll() is None}
    for rank in hanging:
        processes[rank].terminate()
    for process in processes:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return hanging


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
