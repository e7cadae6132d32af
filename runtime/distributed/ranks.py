"""The ranks that share a language half: their processes, from the driver's side, and what each of them runs.

Rank 0 is in the driver. It tells the others what it is about to run, in one small message to each, and runs its own
part of it; inside, all meet in collectives. What may well fail before that, for want of memory, is tried by all first,
and goes on only if all succeeded. A rank that is gone, or fails where the others cannot know it, is the end of all.
"""

import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ..config import InternVLConfig
from ..engine.runner import Row, Runner
from ..errors import ConfigError, VitrailError
from ..layers.parallel import Part, TensorParallel
from ..models.decoder import config_of
from ..models.internvl import InternVLModel
from ..quantization.config import QuantizationConfig
from ..weights import load_model
from .rank_group import RankPlan, connect
from .worker import Channel, Watch, Worker, end

T = TypeVar("T")

# How long to wait for the news of a death after a collective has failed.
_NEWS_S = 1.0
# How long a step may take on GPUs, whose collectives do not give up by themselves; the first ones compile kernels.
_STEP_S = 300.0


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
        self.step_began: float | None = None  # while all are in one
        self.max_step_s = _STEP_S if gpus else inf
        self.failure: VitrailError | None = None
        self.on_failure: Callable[[VitrailError], None] | None = None
        self._news = threading.Event()
        self._receiving = threading.Lock()
        # Where the ranks find each other: memory without a name, so that nothing of it can be left. It stays open, for
        # the process groups write to it, by this number, when they are dropped at last.
        store_fd = os.memfd_create("vitrail-ranks")
        plan = RankPlan(
            folder, config, tuple(devices), dtype, quantization, vision, deterministic, self.threads, store_fd
        )
        self.workers: list[Worker] = []
        self._end = weakref.finalize(self, end, self.workers)
        try:
            for rank in range(1, size):
                name = f"rank {rank} of the language half"
                self.workers.append(Worker(name, serve_rank, plan, rank, fds=(store_fd,)))
            for worker in self.workers:
                worker.ready()
            self.groups = connect(plan, 0)
            self.model = _load(plan, 0, self.groups, progress)
            for worker in self.workers:
                worker.ready()
            self.groups[0].met = False
        except BaseException:
            self._end()
            raise
        # The thread must not keep the model alive.
        self._watch = Watch(self.workers, _weakly(self._died), _weakly(self._look))

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

    def _look(self) -> None:
        began = self.step_began
        if began is not None and monotonic() - began > self.max_step_s:
            names = ", ".join(worker.name for worker in self.workers)
            self._give_up(VitrailError(f"a step took more than {self.max_step_s:g} s: {names} may hang"))

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


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Calls a method of an object as long as there is one, and does not keep it alive."""
    found = weakref.WeakMethod(method)

    def call(*arguments: object) -> None:
        if (bound := found()) is not None:
            bound(*arguments)

    return call


def _names(devices: Sequence[torch.device]) -> str:
    return ", ".join(map(str, devices))


def outcome(attempt: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return attempt(), None
    except Exception as error:
        return None, error


def _load(plan: RankPlan, rank: int, groups: Sequence[TensorParallel], progress: bool | None) -> InternVLModel:
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


# --- in the other processes ---


def serve_rank(channel: Channel, plan: RankPlan, rank: int) -> None:
    """Load a rank's share, then make the calls that rank 0 tells of, until it ends."""
    warnings.simplefilter("ignore")  # the driver gives them
    if plan.devices[rank].type == "cuda":
        torch.cuda.set_device(plan.devices[rank])
    else:
        torch.set_num_threads(plan.threads)
    channel.send("started")
    groups = connect(plan, rank)
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
        result, error = outcome(attempt)
        self.channel.send(None if error is None else f"{type(error).__name__}: {error}")
        return result if self.channel.recv() else None
