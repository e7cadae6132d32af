"""The vision half in processes of its own, one a device, each taking whatever tiles come next.

Pixels lie in memory that a worker shares with the driver, and so do visual tokens; where the language half is on a GPU
the worker writes them to that GPU's memory, from device to device. Only numbers of jobs go through the channel.
"""

import logging
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ..config import InternVLConfig
from ..engine.runner import Runner
from ..engine.vision_stage import Arrived, Result
from ..errors import VitrailError
from ..layers.parallel import Part
from ..quantization.config import QuantizationConfig
from ..weights import load_model
from .worker import Channel, Worker, end, open_shared, shared_bytes

# Jobs that a worker has: one that it runs, and one that it finds there when it is done.
DEPTH = 2
# Tiles of one job: enough for the products of a small vision half to fill a GPU.
TILES_PER_JOB = 8

_log = logging.getLogger("vitrail")


@dataclass(frozen=True)
class _Plan:
    """What a worker has to know. pixels, tokens: how its process comes by the memory for them."""

    folder: Path
    config: InternVLConfig
    dtype: torch.dtype
    quantization: QuantizationConfig | None
    exact: bool
    enforce_eager: bool
    threads: int | None
    tiles_per_job: int
    device: str = "cpu"
    quiet: bool = False
    pixels: int = -1
    tokens: "int | tuple[Callable[..., Tensor], tuple[Any, ...]]" = -1

    @property
    def pixels_shape(self) -> tuple[int, ...]:
        size = self.config.tile_size
        return DEPTH, self.tiles_per_job, size, size, 3

    @property
    def tokens_shape(self) -> tuple[int, ...]:
        return DEPTH, self.tiles_per_job, self.config.tokens_per_tile, self.config.llm.hidden_size


@dataclass(eq=False)
class _Call:
    """Tiles that were asked for together, and what has come of them so far."""

    done: Callable[[Result], None]
    num_tiles: int
    tokens: dict[int, Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, index: int, arrived: Arrived) -> None:
        """Take the tokens of one tile; those of the last one end the call."""
        with self.lock:
            self.tokens[index] = arrived.tokens
            if len(self.tokens) < self.num_tiles:
                return
        parts = [self.tokens[place] for place in range(self.num_tiles)]
        self.end(replace(arrived, tokens=parts[0] if len(parts) == 1 else torch.cat(parts)))

    def end(self, result: Result) -> None:
        """Hand over the result, unless an error was handed over before."""
        with self.lock:
            done, self.done = self.done, _nothing
        try:
            done(result)
        except Exception:  # of whoever asked: the other calls need this thread
            _log.exception("a call of the vision half could not be answered")


def _nothing(_: Result) -> None:
    pass


@dataclass(eq=False)
class _Tile:
    """One tile that waits for its turn. alone: it shares no job; deaths: of workers that had it."""

    pixels: Tensor
    call: _Call
    index: int
    alone: bool = False
    deaths: int = 0


@dataclass(eq=False)
class _Device:
    """A worker, the memory that it shares, and its jobs by the slot of that memory."""

    worker: Worker
    lane: str
    pixels: Tensor
    tokens: Tensor
    jobs: dict[int, list[_Tile]] = field(default_factory=dict)
    free: list[int] = field(default_factory=lambda: list(range(DEPTH)))

    @property
    def num_tiles(self) -> int:
        return sum(len(job) for job in self.jobs.values())


class VisionPool:
    """`VisionWorkers` over processes: each device of `devices` has a vision half of its own.

    dtype: of the weights and of the tokens; out_device: where those go. exact: tiles are encoded one by one. threads:
    of torch in each process. Returns when all are ready; raises what a worker failed with.
    """

    def __init__(
        self,
        folder: Path,
        config: InternVLConfig,
        devices: Sequence[torch.device | str],
        *,
        dtype: torch.dtype,
        out_device: torch.device | str = "cpu",
        quantization: QuantizationConfig | None = None,
        exact: bool = False,
        enforce_eager: bool = False,
        threads: int | None = None,
        tiles_per_job: int = TILES_PER_JOB,
    ) -> None:
        self.capacity = DEPTH * tiles_per_job * len(devices)
        self._out = torch.device(out_device)
        self._lock = threading.Lock()
        self._queue: deque[_Tile] = deque()
        self._closed = False
        self._why = ""  # the end of the last worker
        self._num_jobs = self._num_tiles = self._num_dead = 0
        plan = _Plan(folder, config, dtype, quantization, exact, enforce_eager, threads, tiles_per_job)
        self._devices: list[_Device] = []
        try:
            for number, device in enumerate(devices):
                self._devices.append(self._start(replace(plan, device=str(device), quiet=number > 0), number))
            for one in self._devices:
                one.worker.ready()
        except BaseException:
            end(one.worker for one in self._devices)
            raise
        self._workers = [one.worker for one in self._devices]
        self._readers = [
            threading.Thread(target=self._read, args=(one,), name=f"vitrail-{one.lane}", daemon=True)
            for one in self._devices
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pids(self) -> list[int]:
        """Of the processes that are alive."""
        return [one.worker.pid for one in self._devices]

    def encode(self, tiles: Tensor, done: Callable[[Result], None]) -> None:
        """As `VisionWorkers` has it; never blocks, however many are in flight."""
        call = _Call(done, len(tiles))
        with self._lock:
            error = self._error()
            if error is None:
                self._queue.extend(_Tile(pixels, call, index) for index, pixels in enumerate(tiles))
                self._dispatch()
        if error is not None:
            call.end(error)

    def stats(self) -> dict[str, object]:
        """Counts since the start."""
        with self._lock:
            return {
                "workers": len(self._readers),
                "alive": len(self._devices),
                "waiting": len(self._queue),
                "jobs": self._num_jobs,
                "tiles": self._num_tiles,
            }

    def close(self) -> None:
        """End the processes; whoever waits for tiles is told so."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        end(self._workers)
        for reader in self._readers:
            if reader is not threading.current_thread():
                reader.join()
        with self._lock:
            tiles, self._queue = [*self._queue], deque()
        self._fail(tiles)

    # --- who does what; for who has the lock ---

    def _dispatch(self) -> None:
        """Give every free slot a job, that of the least busy worker first, as long as there are tiles."""
        while self._queue:
            free = [one for one in self._devices if one.free]
            if not free:
                return
            device = min(free, key=lambda one: one.num_tiles)
            job, slot = self._next_job(device.pixels.shape[1]), device.free.pop()
            for place, tile in enumerate(job):
                device.pixels[slot, place].copy_(tile.pixels)
            device.jobs[slot] = job
            self._num_jobs += 1
            with suppress(OSError):  # it has ended, as its reader will find out
                device.worker.channel.send((slot, len(job)))

    def _next_job(self, most: int) -> list[_Tile]:
        """The first tiles that wait, as many as leave every worker its share."""
        share = min(most, -(-len(self._queue) // len(self._devices)))
        job = [self._queue.popleft()]
        while len(job) < share and not job[0].alone and not self._queue[0].alone:
            job.append(self._queue.popleft())
        return job

    def _error(self) -> VitrailError | None:
        if self._closed:
            return VitrailError("the vision half is closed")
        return None if self._devices else VitrailError(f"the vision half is gone: {self._why}")

    # --- what comes back; on the reader of a device ---

    def _read(self, device: _Device) -> None:
        stream = torch.cuda.Stream(self._out) if self._out.type == "cuda" else None
        while True:
            try:
                slot, answer = device.worker.channel.recv()
            except EOFError:
                break
            job = device.jobs[slot]
            failed = isinstance(answer, VitrailError)
            tokens = [] if failed else _copied(device.tokens[slot, : len(job)], stream)
            with self._lock:
                del device.jobs[slot]
                device.free.append(slot)
                if failed and len(job) > 1:  # whose fault it is will be seen
                    for tile in reversed(job):
                        tile.alone = True
                        self._queue.appendleft(tile)
                elif not failed:
                    self._num_tiles += len(job)
                self._dispatch()
            if not failed:
                began, ended, projector_ms = answer
                for tile, part in zip(job, tokens, strict=True):
                    tile.call.put(tile.index, Arrived(part, began, ended, projector_ms, device.lane, len(job)))
            elif len(job) == 1:
                job[0].call.end(answer)
        self._lose(device)

    def _lose(self, device: _Device) -> None:
        """A worker is gone: others take its tiles, but none that has ended two of them."""
        with self._lock:
            self._devices.remove(device)
        why = f"{device.worker.name} {device.worker.describe_end()}"
        with self._lock:
            jobs = list(device.jobs.values())
            for tile in jobs[0] if jobs else ():  # what it was at; the next job only lay there
                tile.alone, tile.deaths = True, tile.deaths + 1
            lost = [tile for job in jobs for tile in job]
            ended = [tile for tile in lost if tile.deaths > 1]
            self._queue.extendleft(tile for tile in reversed(lost) if tile.deaths < 2)
            if not self._closed:
                self._why = why
                _log.warning("%s; %d of %d are left", why, len(self._devices), len(self._readers))
            if self._error() is not None:
                ended += self._queue
                self._queue.clear()
            else:
                self._dispatch()
        self._fail(ended, why)

    def _fail(self, tiles: Sequence[_Tile], why: str = "") -> None:
        error = self._error() or VitrailError(f"the vision half failed: {why}")
        for tile in tiles:
            tile.call.end(error)

    # --- the processes ---

    def _start(self, plan: _Plan, number: int) -> _Device:
        pixels_fd, pixels = _shared(plan.pixels_shape, torch.uint8)
        fds = [pixels_fd]
        if self._out.type == "cuda":
            tokens = torch.empty(plan.tokens_shape, dtype=plan.dtype, device=self._out)
            plan = replace(plan, pixels=pixels_fd, tokens=reduce_tensor(tokens))
        else:
            tokens_fd, tokens = _shared(plan.tokens_shape, plan.dtype)
            fds.append(tokens_fd)
            plan = replace(plan, pixels=pixels_fd, tokens=tokens_fd)
        env = {} if plan.threads is None else {"OMP_NUM_THREADS": str(plan.threads)}
        name = f"vision worker {number} on {plan.device}"
        try:
            worker = Worker(name, run_worker, plan, fds=fds, env=env)
        finally:
            for fd in fds:
                os.close(fd)
        return _Device(worker, f"vision half {number + 1}", pixels, tokens)


def _copied(tokens: Tensor, stream: torch.cuda.Stream | None) -> list[Tensor]:
    """The tokens of each tile in memory of their own, so that the slot is free for the next job."""
    if stream is None:
        return [part.clone() for part in tokens]
    with torch.cuda.stream(stream):
        parts = [part.clone() for part in tokens]
    stream.synchronize()
    for part in parts:
        part.record_stream(torch.cuda.default_stream(tokens.device))  # where passes read it
    return parts


def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, Tensor]:
    """A tensor in memory that another process can open, and its descriptor."""
    meta = torch.empty(shape, dtype=dtype, device="meta")
    fd, memory = shared_bytes(meta.nbytes)
    return fd, torch.frombuffer(memory, dtype=dtype, count=meta.numel()).view(shape)


def _opened(fd: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    meta = torch.empty(shape, dtype=dtype, device="meta")
    memory = open_shared(fd, meta.nbytes)
    os.close(fd)
    return torch.frombuffer(memory, dtype=dtype, count=meta.numel()).view(shape)


# --- in the worker ---


def run_worker(channel: Channel, plan: _Plan) -> None:
    """Load the vision half and encode jobs until the driver ends."""
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    with warnings.catch_warnings():
        if plan.quiet:  # another worker says the same
            warnings.simplefilter("ignore")
        model = load_model(
            plan.folder,
            plan.config,
            dtype=plan.dtype,
            device=torch.device(plan.device),
            progress=False,
            quantization=plan.quantization,
            part=Part(language=False),
        )
    runner = Runner(model, max_num_seqs=1, max_model_len=1, enforce_eager=plan.enforce_eager, exact=plan.exact)
    runner.warm_up_vision()
    pixels = _opened(plan.pixels, plan.pixels_shape, torch.uint8)
    if runner.device.type == "cuda":  # pinned, or the copy to the device would be made twice
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(pixels.data_ptr(), pixels.nbytes, 0)))
    if isinstance(plan.tokens, int):
        tokens = _opened(plan.tokens, plan.tokens_shape, plan.dtype)
    else:
        rebuild, arguments = plan.tokens
        tokens = rebuild(*arguments)
    channel.send("ready")
    while True:
        slot, count = channel.recv()
        try:
            answer: object = _encode(runner, pixels[slot, :count], tokens[slot, :count])
        except Exception as error:
            reason = " ".join(str(error).split())
            answer = VitrailError(f"the vision half failed: {type(error).__name__}: {reason}")
        channel.send((slot, answer))


@torch.inference_mode()
def _encode(runner: Runner, pixels: Tensor, tokens: Tensor) -> tuple[float, float, float]:
    """Write the visual tokens of tiles. Returns when that began and ended, and milliseconds of the projector."""
    began = perf_counter()
    encoded = runner.encode_beside(pixels)
    if isinstance(encoded.ended, torch.cuda.Event):
        torch.cuda.current_stream(runner.device).wait_event(encoded.ended)
    tokens.copy_(encoded.tokens.view_as(tokens))
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)  # the driver reads what is written when it has the answer
    return began, perf_counter(), encoded.projector_ms
