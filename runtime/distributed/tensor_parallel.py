"""The language half split over several processes: ranks that hold a share of it each, and the runner that leads them.

Rank 0 is in the driver. It tells the others what it is about to run, in one small message to each, and runs its own
part of it; inside, all meet in collectives. What may well fail before that, for want of memory, is tried by all first,
and goes on only if all succeeded. A rank that is gone, or fails where the others cannot know it, is the end of all.
"""

import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ..config import InternVLConfig
from ..engine.runner import Row, Runner
from ..errors import CapacityError, ConfigError, VitrailError
from ..layers.parallel import Part, TensorParallel
from ..models.decoder import config_of
from ..models.internvl import InternVLModel
from ..quantization.config import QuantizationConfig
from ..weights import load_model
from .worker import Channel, Watch, Worker, end

T = TypeVar("T")

_c10d: Any = torch.distributed  # more than its annotations tell
# How far ranks may be apart in one pass: the first ones compile kernels.
_TIMEOUT = timedelta(minutes=5)
# How long to wait for the news of a death after a collective has failed.
_NEWS_S = 1.0


@dataclass(frozen=True)
class _Plan:
    """What each rank is to load. vision: whether it is to hold the vision half too. threads: of each on a CPU."""

    folder: Path
    config: InternVLConfig
    devices: tuple[torch.device, ...]
    dtype: torch.dtype
    quantization: QuantizationConfig | None
    vision: bool
    ordered: bool
    threads: int
    store_fd: int

    @property
    def size(self) -> int:
        return len(self.devices)


class Ranks:
    """The processes that share a language half, without the driver, and `model`, what the driver holds itself.

    devices: one for each rank, the driver's first; on a CPU they may be the same. vision: every rank holds the vision
    half too, and they share the tiles of a batch. deterministic: as of the runner. threads: of each rank on a CPU, by
    default its share of the driver's. `on_failure` is called once, on any thread, when they cannot go on.
    Raises what a rank raises while it loads, and `ConfigError` where the model cannot be split over so many.
    """

    def __init__(
        self,
        folder: Path,
        config: InternVLConfig,
        devices: Sequence[torch.device],
        *,
        dtype: torch.dtype,
        quantization: QuantizationConfig | None = None,
        vision: bool = True,
        deterministic: bool = False,
        threads: int | None = None,
        progress: bool | None = None,
    ) -> None:
        size = len(devices)
        config_of(config.llm, Part(size=size))
        gpus = [device for device in devices if device.type == "cuda"]
        if len({device.type for device in devices}) > 1 or len(set(gpus)) < len(gpus):
            raise ConfigError(f"the language half needs {size} different GPUs, or CPUs only, not {_names(devices)}")
        self.size, self.vision = size, vision
        self.threads = threads or max(1, torch.get_num_threads() // size)
        self.num_runners = 0
        self.failure: VitrailError | None = None
        self.on_failure: Callable[[VitrailError], None] | None = None
        self._news = threading.Event()
        self._receiving = threading.Lock()
        # Where the ranks find each other: memory without a name, so that nothing of it can be left. It stays open, for
        # the process groups write to it, by this number, when they are dropped at last.
        store_fd = os.memfd_create("vitrail-ranks")
        plan = _Plan(folder, config, tuple(devices), dtype, quantization, vision, deterministic, self.threads, store_fd)
        self.workers: list[Worker] = []
        self._end = weakref.finalize(self, end, self.workers)
        try:
            for rank in range(1, size):
                name = f"rank {rank} of the language half"
                self.workers.append(Worker(name, serve_rank, plan, rank, fds=(store_fd,)))
            for worker in self.workers:
                worker.ready()
            self.groups = _connect(plan, 0)
            self.model = _load(plan, 0, self.groups, progress)
            for worker in self.workers:
                worker.ready()
            self.groups[0].met = False
        except BaseException:
            self._end()
            raise
        died = weakref.WeakMethod(self._died)  # the thread must not keep the model alive

        def on_death(worker: Worker) -> None:
            if (call := died()) is not None:
                call(worker)

        self._watch = Watch(self.workers, on_death)

    def tell(self, *call: object) -> None:
        """Have the others make a call: a method of `_Rank` and what it is given."""
        for worker in self.workers:
            worker.channel.send(call)

    def answers(self) -> list[Any]:
        """What each of the others sends back."""
        with self._receiving:
            found = [worker.channel.recv() for worker in self.workers]
        for worker, answer in zip(self.workers, found, strict=True):
            if isinstance(answer, VitrailError):  # its last words
                self._give_up(VitrailError(f"{worker.name} failed: {answer}"))
                self.check()
        return found

    def check(self) -> None:
        """Raises if the ranks cannot go on."""
        if self.failure is not None:
            raise self.failure

    def fail(self, error: BaseException) -> VitrailError:
        """End all after an error among them; returns what callers are told: if one of them died, that."""
        self._news.wait(_NEWS_S)
        reason = " ".join(str(error).split())
        self._give_up(VitrailError(f"the language half failed: {type(error).__name__}: {reason}"))
        return cast(VitrailError, self.failure)

    def close(self) -> None:
        """End the processes."""
        self.failure = self.failure or VitrailError("the language half is closed")
        self._watch.close()
        self._end()

    def _died(self, worker: Worker) -> None:
        words = ""
        with self._receiving, suppress(EOFError, OSError):
            while worker.channel.poll():
                answer = worker.channel.recv()
                words = f" ({answer})" if isinstance(answer, VitrailError) else ""
        self._give_up(VitrailError(f"{worker.name} {worker.describe_end()}{words}"))

    def _give_up(self, error: VitrailError) -> None:
        if self.failure is not None:
            return
        self.failure = error
        for worker in self.workers:
            if worker.alive:
                with suppress(OSError):
                    os.kill(worker.pid, signal.SIGKILL)
        for group in self.groups:
            group.abort()
        self._news.set()
        if self.on_failure is not None:
            self.on_failure(error)


def _names(devices: Sequence[torch.device]) -> str:
    return ", ".join(map(str, devices))


class _Group(TensorParallel):
    """Ranks on one device each: gloo over the loopback interface on CPUs, NCCL on GPUs."""

    met = True  # whether the others are about to make the same calls

    def __init__(self, plan: _Plan, rank: int, name: str) -> None:
        # The store's file is found by the number under which this process has it open.
        store = _c10d.PrefixStore(name, _c10d.FileStore(f"/proc/self/fd/{plan.store_fd}", plan.size))
        device = plan.devices[rank]
        if device.type == "cuda":
            self._backend = _nccl(store, rank, plan.size)
        else:
            options = _c10d.ProcessGroupGloo._Options()
            options._devices = [_c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            options._timeout = _TIMEOUT
            self._backend = _c10d.ProcessGroupGloo(store, rank, plan.size, options)
        super().__init__(self._backend, ordered=plan.ordered)
        self.all_reduce(torch.zeros(1, device=device))  # NCCL takes its memory in the first call

    def all_reduce(self, x: Tensor) -> Tensor:
        if not self.met:  # it would wait for ever
            raise VitrailError("a language half that is split over several devices is run by its runner alone")
        return super().all_reduce(x)

    def abort(self) -> None:
        """Have collectives that wait for a rank that is gone return, or raise."""
        with suppress(RuntimeError):
            self._backend.abort()


def _nccl(store: Any, rank: int, size: int) -> Any:
    # Its own ways to handle errors end the process, which is the user's; here it is the watch over the ranks that does.
    switches = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
    before = {name: os.environ.get(name) for name in switches}
    os.environ.update(switches)
    try:
        options = _c10d.ProcessGroupNCCL.Options()
        options._timeout = _TIMEOUT
        return _c10d.ProcessGroupNCCL(store, rank, size, options)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _connect(plan: _Plan, rank: int) -> tuple[_Group, ...]:
    """A group for the language half, and where there are tiles to share another one, for it runs at the same time."""
    return tuple(_Group(plan, rank, name) for name in ("language", "vision")[: 1 + plan.vision])


def _load(plan: _Plan, rank: int, groups: Sequence[TensorParallel], progress: bool | None) -> InternVLModel:
    return load_model(
        plan.folder,
        plan.config,
        dtype=plan.dtype,
        device=plan.devices[rank],
        progress=progress,
        quantization=plan.quantization,
        part=Part(vision=plan.vision, rank=rank, size=plan.size),
        parallel=groups[0],
    )


# --- what rank 0 runs ---


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
            try:
                if call:
                    self.ranks.tell(*call)
                yield
            except BaseException as error:
                raise self.ranks.fail(error) from error
            finally:
                self.ranks.groups[0].met = False

    def _tried(self, attempt: Callable[[], T]) -> tuple[T | None, Exception | None]:
        """What `attempt` gives if it succeeds at every rank; else nobody keeps what it gave, and why."""
        result, error = _outcome(attempt)
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


def _outcome(attempt: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return attempt(), None
    except Exception as error:
        return None, error


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


# --- what the other ranks run ---


def serve_rank(channel: Channel, plan: _Plan, rank: int) -> None:
    """Load a rank's share, then make the calls that rank 0 tells of, until it ends."""
    warnings.simplefilter("ignore")  # the driver gives them
    if plan.devices[rank].type == "cuda":
        torch.cuda.set_device(plan.devices[rank])
    else:
        torch.set_num_threads(plan.threads)
    channel.send("started")
    groups = _connect(plan, rank)
    model = _load(plan, rank, groups, progress=False)
    channel.send("loaded")
    calls = _Rank(channel, model, groups)
    with torch.inference_mode():
        while True:
            name, *args = channel.recv()
            getattr(calls, name)(*args)


class _Rank:
    """What rank 0 can have another one do: its own calls of the same names."""

    runner: Runner

    def __init__(self, channel: Channel, model: InternVLModel, groups: Sequence[TensorParallel]) -> None:
        self.channel, self.model, self.groups = channel, model, groups

    def begin(self, limits: dict[str, Any]) -> None:
        self.runner = Runner(self.model, **limits)

    def warm_up_vision(self) -> None:
        self.runner.warm_up_vision()

    def encode(self, tiles: "np.ndarray[Any, np.dtype[np.uint8]]", most: int) -> None:
        runner, config = self.runner, self.runner.config

        def run() -> Tensor:
            tokens = torch.zeros(
                (most, config.tokens_per_tile, config.llm.hidden_size), dtype=runner.dtype, device=runner.device
            )
            if len(tiles):
                tokens[: len(tiles)] = runner.encode(torch.from_numpy(tiles))
            return tokens

        with torch.cuda.stream(runner.vision_stream):  # on a CPU None, which does nothing
            tokens = self._tried(run)
            if tokens is not None:
                self.groups[1].gather(tokens)

    def spare_bytes(self, gpu_memory_utilization: float) -> None:
        self.channel.send(self.runner.spare_bytes(gpu_memory_utilization))

    def allocate(self, num_blocks: int, keep: bool) -> None:
        grown = self._tried(lambda: self.runner._reserve(num_blocks, keep=keep))
        if grown is not None:
            self.runner._install(grown)

    def forward(self, calls: list[Any], frequencies: "np.ndarray[Any, np.dtype[np.float32]]") -> None:
        device = self.runner.device
        self.runner.forward(
            [
                Row(
                    *(token_ids, context, table, inv_freq),
                    visual=[(place, torch.zeros((count, 1), device=device)) for place, count in places],
                )
                for (token_ids, context, table, places), inv_freq in zip(
                    calls, torch.from_numpy(frequencies).to(device), strict=True
                )
            ]
        )

    def decode(
        self,
        token_ids: Sequence[int],
        context_lens: Sequence[int],
        frequencies: "np.ndarray[Any, np.dtype[np.float32]]",
        tables: Sequence[Sequence[int]],
    ) -> None:
        inv_freq = torch.from_numpy(frequencies).to(self.runner.device)
        self.runner.decode(token_ids, context_lens, inv_freq, tables)

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.runner.copy_blocks(sources, targets)

    def _tried(self, attempt: Callable[[], T]) -> T | None:
        result, error = _outcome(attempt)
        self.channel.send(None if error is None else f"{type(error).__name__}: {error}")
        return result if self.channel.recv() else None
