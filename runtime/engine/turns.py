"""Whose turn it is to drive: one thread takes a step, for all; what the others want stands in an inbox.

Whoever waits for a result drives if nobody does, and sleeps otherwise. Who must not block joins the background, which
is one thread that lives as long as it has members.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue


class Turns:
    """Lets one thread at a time call `step`. Messages are functions; they are called in order by whoever has the turn.

    All of it may be called anywhere, also by the garbage collector in the middle of a turn.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._free = threading.Condition()
        self._taken = False
        self._news: dict[Callable[[], None], None] = {}  # a set that keeps its order
        self._members: set[Hashable] = set()
        self._members_lock = threading.Lock()
        self._driver: threading.Thread | None = None

    @property
    def idle(self) -> bool:
        """Whether nobody has the turn, no message waits and nobody is in the background."""
        return not self._taken and self._inbox.empty() and not self._members

    @property
    def broken(self) -> bool:
        """Whether the background ended before its members had left: nobody drives for them any more."""
        with self._members_lock:
            return self._driver is not None and not self._driver.is_alive()

    def post(self, message: Callable[[], None], *, now: bool = False) -> None:
        """Leave a message for the next step; `now`: have it read at once if nobody drives, who would read it anyway."""
        self._inbox.put(message)
        if now:
            self._read_if_free()

    def read(self, *, wait: bool = False) -> None:
        """Do what the messages say, after waiting for one if need be. For who has the turn."""
        try:
            while True:
                self._inbox.get(block=wait)()
                wait = False
        except Empty:
            pass

    def announce(self, notify: Callable[[], None]) -> None:
        """Call `notify`, once, when this turn is over. For who has the turn."""
        self._news[notify] = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the turn and have it for the block."""
        with self._free:
            while self._taken:
                self._free.wait()
            self._taken = True
        try:
            yield
        finally:
            self._end()

    def drive_until(self, done: Callable[[], bool]) -> None:
        """Return when `done`, taking steps whenever nobody else does."""
        while not done():
            with self._free:
                if self._taken:
                    self._free.wait()
                    continue
                self._taken = True
            try:
                self._step()
            finally:
                self._end()

    def join(self, member: Hashable) -> None:
        """Have the background drive as long as `member` does not leave."""
        with self._members_lock:
            self._members.add(member)
            if self._driver is None:
                self._driver = threading.Thread(target=self._drive, name="vitrail-engine")
                self._driver.start()

    def leave(self, member: Hashable) -> None:
        """The background need not drive for `member`, if it did."""
        self._members.discard(member)

    def _drive(self) -> None:
        while True:
            with self._members_lock:
                if not self._members:
                    self._driver = None
                    return
            with self.turn():
                self._step()

    def _end(self) -> None:
        news, self._news = self._news, {}
        with self._free:
            self._taken = False
            self._free.notify_all()
        for notify in news:
            notify()
        if not self._inbox.empty():  # it came after the last look, from someone who thought it would be read
            self._read_if_free()

    def _read_if_free(self) -> None:
        with self._free:
            if self._taken:
                return
            self._taken = True
        try:
            self.read()
        finally:
            self._end()
