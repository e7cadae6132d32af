"""Processes that run a part of a model: their start, the channel to them, their end.

A worker is a fresh interpreter, not a fork, and not what `multiprocessing` spawns, which would run the user's script
again. It lives no longer than its driver: when that is gone, however it went, the kernel closes the socket between
them, and a thread of the worker ends the process, also one that hangs in a collective.
"""

import json
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

from ..errors import VitrailError

# How long a worker may take to end by itself once it is asked to.
_END_S = 5.0
_LOOK_MS = 1000
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; main(int(sys.argv[2]))"
_GONE = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


class Channel:
    """One end of a socket that has no name and no port: nobody but the two processes can reach it."""

    def __init__(self, fd: int) -> None:
        self._connection = Connection(fd)
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        """Send an object. Raises `OSError` when the other end is gone."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with self._sending:
            self._connection.send_bytes(data)

    def recv(self) -> Any:
        """The next object. Raises `EOFError` when the other end is gone."""
        try:
            return pickle.loads(self._connection.recv_bytes())  # noqa: S301 - from a process of our own
        except OSError as error:
            raise EOFError from error

    def poll(self, seconds: float | None = 0.0) -> bool:
        """Whether an object, or the end, comes within some seconds; None waits for ever."""
        try:
            return self._connection.poll(seconds)
        except OSError:  # it was closed here
            return True

    def fileno(self) -> int:
        return self._connection.fileno()

    def close(self) -> None:
        with self._sending:  # another thread may close it too
            self._connection.close()


class Worker:
    """A process that runs `target(channel, *args)`, a function that can be imported by its name.

    name: what messages call it. fds: open file descriptors that it inherits under the same numbers. env: variables on
    top of this process's own.
    """

    def __init__(
        self,
        name: str,
        target: Callable[..., None],
        *args: object,
        fds: Sequence[int] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours.detach())
        self._closing = False
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT.format(module=__name__), json.dumps(sys.path), str(theirs.fileno())],
                pass_fds=(theirs.fileno(), *fds),
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})},
            )
        finally:
            theirs.close()
        self.channel.send((target, args))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def closing(self) -> bool:
        """Whether it was asked to end."""
        return self._closing

    def ready(self, timeout_s: float | None = None) -> Any:
        """The first object that the target sends. Raises its own `VitrailError` if it fails before that."""
        try:
            if not self.channel.poll(timeout_s):
                raise VitrailError(f"{self.name} was not ready within {timeout_s} s")
            message = self.channel.recv()
        except EOFError:
            raise VitrailError(f"{self.name} {self.describe_end()}") from None
        if isinstance(message, VitrailError):
            raise message
        return message

    def describe_end(self) -> str:
        """How it ended, as the end of a sentence."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "does not answer"
        if code >= 0:
            return f"ended: exit status {code}"
        with suppress(ValueError):
            return f"ended: signal {-code} ({signal.Signals(-code).name})"
        return f"ended: signal {-code}"

    def close(self) -> None:
        """End the process, and wait until it is gone."""
        end([self])


def end(workers: Iterable[Worker]) -> None:
    """End processes together: ask, wait, then kill."""
    workers = list(workers)
    for worker in workers:
        worker._closing = True
        # The other end reads what was sent, then an end. The descriptor lives on for whoever still looks at it.
        with suppress(OSError), socket.socket(fileno=os.dup(worker.channel.fileno())) as ours:
            ours.shutdown(socket.SHUT_RDWR)
    deadline = monotonic() + _END_S
    for worker in workers:
        try:
            worker._process.wait(max(0.0, deadline - monotonic()))
        except subprocess.TimeoutExpired:
            worker._process.kill()
            worker._process.wait()
        worker.channel.close()


class Watch:
    """Calls `on_death(worker)` on a thread of its own, once for each worker that ends without having been asked to.

    look: is called there too, about once a second.
    """

    def __init__(
        self, workers: Sequence[Worker], on_death: Callable[[Worker], None], look: Callable[[], None] | None = None
    ) -> None:
        self._poll = select.poll()
        self._workers = {worker.channel.fileno(): worker for worker in workers}
        for fd in self._workers:
            self._poll.register(fd, _GONE)
        self._on_death, self._look = on_death, look
        self._ours, self._theirs = socket.socketpair()
        self._poll.register(self._theirs.fileno(), select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="vitrail-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching; to be called before the workers are closed."""
        with suppress(OSError):
            self._ours.send(b"x")
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        with self._ours, self._theirs:
            while True:
                for fd, _ in self._poll.poll(None if self._look is None else _LOOK_MS):
                    if fd == self._theirs.fileno():
                        return
                    self._poll.unregister(fd)
                    worker = self._workers.pop(fd)
                    if not worker.closing:
                        self._on_death(worker)
                if self._look is not None:
                    self._look()


def shared_bytes(num_bytes: int) -> tuple[int, mmap.mmap]:
    """Memory for this process and those that inherit its descriptor; it has no name, so that nothing can be left."""
    fd = os.memfd_create("vitrail", os.MFD_CLOEXEC)
    os.ftruncate(fd, max(1, num_bytes))
    return fd, open_shared(fd, num_bytes)


def open_shared(fd: int, num_bytes: int) -> mmap.mmap:
    """The memory behind a descriptor of `shared_bytes`."""
    return mmap.mmap(fd, max(1, num_bytes))


# --- in the worker ---


def main(fd: int) -> None:
    """Run what the driver asks for until it ends, or the driver does."""
    # A terminal, or a manager of services, sends them to the driver as well, which decides when it is over.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(fd)
    threading.Thread(target=_end_with_driver, args=(fd,), daemon=True).start()
    try:
        target, args = channel.recv()
        target(channel, *args)
    except EOFError:
        pass
    except VitrailError as error:
        _tell(channel, error)
    except BaseException as error:
        reason = " ".join(str(error).split())
        _tell(channel, VitrailError(f"{type(error).__name__}: {reason}"))
        raise


def _tell(channel: Channel, error: VitrailError) -> None:
    with suppress(OSError):
        channel.send(error)


def _end_with_driver(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, _GONE)  # not readable data, which the other thread is there for
    poll.poll()
    os._exit(1)
