"""The process of `vitrail serve`: socket, signals, exit status."""

import logging
import os
import socket
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from ..config import load_any_config
from ..errors import ConfigError, VitrailError
from ..weights import resolve_checkpoint
from .app import create_app
from .engine_process import open_runtime
from .logs import configure, log
from .service import Service
from .settings import Settings

KEEP_ALIVE_S = 30
FLUSH_S = 5  # for answers that are being written when everything else is over


class Drained(Protocol):
    """What ends in its own time: a `Service`, or a `Front`."""

    on_end: Callable[[], None]

    @property
    def started(self) -> bool: ...
    def drain_soon(self) -> None: ...


class _Server(uvicorn.Server):
    """Uvicorn, except that the first signal asks the service to drain, which then ends the server."""

    def __init__(self, config: uvicorn.Config, service: Drained) -> None:
        super().__init__(config)
        self._service = service
        self._asked = False
        service.on_end = self._end

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._asked or not self._service.started:
            self.should_exit = self.force_exit = True
        else:
            self._asked = True
            self._service.drain_soon()

    def _end(self) -> None:
        self.should_exit = True


def run(settings: Settings) -> int:
    """Serve until a signal or the engine's death; returns the exit status."""
    configure(settings.log_level)
    # Before the socket is there: what is wrong with the checkpoint should not look like a server that starts.
    load_any_config(resolve_checkpoint(settings.model, settings.revision))
    listener = listen(settings)
    app = create_app(lambda: open_runtime(settings), settings)
    if settings.otlp_endpoint is not None:
        from .tracing import instrument

        instrument(app, settings)
    service: Service = app.state.service
    serve(app, service, settings, listener)
    if isinstance(service.failure, VitrailError) and not service.loaded:
        raise service.failure  # a checkpoint that cannot be loaded
    if service.dead or service.loading:
        logging.shutdown()
        os._exit(int(service.dead))  # the engine's thread, or the one that loads, may not come to its end
    return 0


def serve(app: ASGIApp, service: Drained, settings: Settings, listener: socket.socket) -> None:
    """Answer what comes to `listener` until `service`, asked by a signal, has ended."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=FLUSH_S,
    )
    host, port = listener.getsockname()[:2]
    log("listening", url=f"http://{f'[{host}]' if ':' in host else host}:{port}", model=settings.name)
    _Server(config, service).run(sockets=[listener])


def listen(settings: Settings) -> socket.socket:
    """A socket at the address that settings name. Raises `ConfigError`."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or "not an address of this machine"
        raise ConfigError(f"cannot listen at {settings.host} port {settings.port}: {reason}") from None
    listener.set_inheritable(True)
    return listener
