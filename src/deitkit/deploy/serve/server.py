"""From a run to a server: its socket, its signals, clients that connect and say nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from deitkit.deploy.serve import Limits
from deitkit.deploy.serve.app import Explain, create_app
from deitkit.deploy.serve.nearest import Nearest
from deitkit.models.predict import Predictor
from deitkit.terminal import UserError

GRACE_SECONDS = 5
"""For requests that are being answered while the server stops."""


def serve_run(
    run: Path,
    predictor: Predictor,
    limits: Limits,
    *,
    host: str,
    port: int,
    looker: Predictor,
    explain: Explain,
    teacher: str | None,
    say: Callable[[str], None],
) -> None:
    """Answer requests until Ctrl-C or SIGTERM. `looker`: another copy of the network, for `explain` and the nearest images; `teacher`: the
    name of the one that `explain` can ask. `say` is given the address. Raises UserError where it cannot be had."""
    listener = listening_socket(host, port)
    app = create_app(predictor, limits, explain=explain, nearest=Nearest(looker, run), teacher=teacher)
    before = signal.signal(
        signal.SIGTERM, lambda *_: None
    )  # uvicorn, which ends at it, sends it again when it has ended
    try:
        say(address(listener))
        with contextlib.suppress(KeyboardInterrupt):
            make_server(app, limits).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()


def make_server(app: ASGIApp, limits: Limits) -> uvicorn.Server:
    # what is wrong with a request is told to the client alone
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        app, http=patient_protocol(limits.timeout_s), log_level="error", access_log=False, server_header=False, ws="none", lifespan="on",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )  # fmt: skip
    return uvicorn.Server(config)


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where the host is unknown or the port is taken."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(place[:2], family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(
            f"--host {host} --port {port}: {why.lower()}: give another --host or --port (0: any)"
        ) from error


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def patient_protocol(timeout_s: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP, which ends connections whose request does not begin to be answered: a client may send its headers byte by byte."""

    class PatientProtocol(H11Protocol):
        _ending: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._forget()

        def _watch(self) -> None:
            cycle: Any = self.cycle  # None before the first request
            if cycle is not None and not cycle.response_complete:
                self._forget()
            elif self._ending is None:
                self._ending = self.loop.call_later(timeout_s, self.transport.close)

        def _forget(self) -> None:
            if self._ending is not None:
                self._ending.cancel()
                self._ending = None

    return PatientProtocol
