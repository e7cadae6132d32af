"""The runner of a language half that is split over several processes: rank 0, which leads the others (`ranks.py`)."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..engine.runner import Row, Runner
from ..errors import CapacityError, VitrailError
from ..models.internvl import InternVLModel
from .ranks import Ranks, outcome

T = TypeVar("T")


class TensorParallelRunner(Runner):
    """Runs the driver's part of a model, and has the ranks run theirs. limits: the keywords of `Runner`.

    model: that of `ranks`, or one made of it. Of several runners for the same ranks only the last one runs.
    """

    def __init__(self, model: InternVLModel, ranks: Ranks, **limits: Any) -> None:
        super().__init__(model, **limits)
        self.ranks = ranks
        self._number = ranks.num_runners = ranks.num_runners + 1
        ranks.tell("begin", limits)

    @property
    def failure(self) -> VitrailError | None:  # type: ignore[override]
        """Why it can do nothing any more."""
        return self.ranks.failure

    def warm_up_vision(self) -> None:
        if self.ranks.vision:
            with self._together("warm_up_vision"):
                super().warm_up_vision()
        else:
            super().warm_up_vision()

    def encode(self, tiles: Tensor) -> Tensor:
        if not self.ranks.vision or len(tiles) == 1:
            return super().encode(tiles)
        ours, *others = tiles.tensor_split(self.ranks.size)  # the first ones are the largest
        with self._together():
            for worker, share in zip(self.ranks.workers, others, strict=True):
                worker.channel.send(("encode", share.numpy(), len(ours)))
            encoded, error = self._tried(lambda: super(TensorParallelRunner, self).encode(ours))
            parts = None if encoded is None else self.ranks.groups[1].gather(encoded)
        if parts is None:
            raise error or CapacityError("the vision half failed")
        return torch.cat([part[: len(share)] for part, share in zip(parts, (ours, *others), strict=True)])

    def spare_bytes(self, gpu_memory_utilization: float) -> int:
        if self.device.type != "cuda":
            return super().spare_bytes(gpu_memory_utilization) // self.ranks.size  # of one host
        with self._together("spare_bytes", gpu_memory_utilization):
            return min(super().spare_bytes(gpu_memory_utilization), *self.ranks.answers())

    def allocate(self, num_blocks: int, *, keep: bool) -> None:
        with self._together("allocate", num_blocks, keep):
            grown, error = self._tried(lambda: self._reserve(num_blocks, keep=keep))
            if grown is not None:
                self._install(grown)
        if error is not None:
            raise error

    def forward(self, rows: Sequence[Row]) -> Tensor:
        frequencies = torch.stack([row.inv_freq for row in rows]).cpu().numpy()
        calls = [
            (row.token_ids, row.context, row.table, [(place, len(tokens)) for place, tokens in row.visual])
            for row in rows
        ]
        with self._together("forward", calls, frequencies):
            return self._finished(super().forward(rows))

    def decode(
        self,
        token_ids: Sequence[int],
        context_lens: Sequence[int],
        inv_freq: Tensor,
        tables: Sequence[Sequence[int]],
    ) -> Tensor:
        with self._together("decode", token_ids, context_lens, inv_freq.cpu().numpy(), tables):
            return self._finished(super().decode(token_ids, context_lens, inv_freq, tables))

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        with self._together("copy_blocks", sources, targets):
            super().copy_blocks(sources, targets)

    @contextmanager
    def _together(self, *call: object) -> Iterator[None]:
        """Have the ranks make a call that this one makes in the block.

        An error in it leaves them at different places, where they never meet again, and is the end of all.
        """
        self.ranks.check()
        if self._number != self.ranks.num_runners:
            raise VitrailError("the ranks of this language half have another runner by now")
        with _uninterrupted(), _threads(self.ranks.threads if self.device.type == "cpu" else None):
            self.ranks.groups[0].met = True
            self.ranks.step_began = monotonic()
            try:
                if call:
                    self.ranks.tell(*call)
                yield
            except BaseException as error:
                raise self.ranks.fail(error) from error
            finally:
                self.ranks.step_began = None
                self.ranks.groups[0].met = False

    def _tried(self, attempt: Callable[[], T]) -> tuple[T | None, Exception | None]:
        """What `attempt` gives if it succeeds at every rank; else nobody keeps what it gave, and why."""
        result, error = outcome(attempt)
        for worker, reason in zip(self.ranks.workers, self.ranks.answers(), strict=True):
            if reason is not None and error is None:
                error = CapacityError(f"{worker.name}: {reason}")
        for worker in self.ranks.workers:
            worker.channel.send(error is None)
        return (result if error is None else None), error

    def _finished(self, logits: Tensor) -> Tensor:
        """Logits that no death has spoilt: on a GPU a collective that was given up leaves whatever there was."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
            self.ranks.check()
        return logits


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back the interrupts of a keyboard, which would leave the ranks at different places."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    held: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *args: held.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held and callable(before):
            before(*held[0])


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Have torch use so many threads; the driver is the user's process, and uses its own number outside."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
