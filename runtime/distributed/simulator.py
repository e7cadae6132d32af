"""The scheduler itself in simulated time: what a placement does with requests that come at random.

Every group of GPUs has a `Scheduler` and a `BlockManager`, the ones that the engine runs; the costs say how long each
step takes. Nothing waits and nothing is computed, so that an hour of 64 GPUs takes seconds, and the same seed gives the
same result. Not simulated: decoding and cutting of images, caches, the network to the user and between GPUs.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, pairwise
from math import gcd

from ..engine.batch import Batch, Image, RequestState, SequenceState, Tiles
from ..engine.block_manager import BlockManager
from ..engine.scheduler import CHUNK_TOKENS, Scheduler
from ..layers.kv_cache import BLOCK_SIZE
from .costs import Costs, causal_pairs
from .planner import ENCODER_BATCH, ENCODER_DEPTH, Placement, Planner, Prediction
from .workload import Kind, Workload


@dataclass(eq=False)
class Arrival(RequestState):
    """A request: when it came, how long its answer becomes, and when each of its tokens was there."""

    came: float = 0.0
    answer: int = 1
    times: list[float] = field(default_factory=list)


@dataclass
class Group:
    """One language half, and its vision half unless encoders work for it."""

    scheduler: Scheduler[Arrival]
    costs: Costs
    unfinished: int = 0
    busy_ms: float = 0.0
    preempted: int = 0
    steps: bool = False  # whether one is under way

    def step_ms(self, batch: Batch[Arrival], *, rested: bool = False) -> float:
        """How long a step takes, after a wait or not."""
        prompt = pairs = prompts = rows = context = 0.0
        for chunk in batch.chunks:
            if chunk.decodes:
                rows += 1
                context += chunk.end
            else:
                prompts += 1
                prompt += chunk.end - chunk.start
                pairs += causal_pairs(chunk.end - chunk.start, chunk.end)
        tiles = batch.num_tiles if self.scheduler.tiles_in_flight is None else 0
        ms = self.costs.wake_ms(tiles) if rested else 0.0
        if tiles:
            ms += self.costs.vision_ms(tiles)
        if prompt:
            return ms + self.costs.prefill_ms(prompt, pairs, prompts) + self.costs.beside_ms(rows, context, prompt)
        return ms + (self.costs.decode_ms(rows, context) if rows else 0.0)

    def finish_step(self, batch: Batch[Arrival], now: float) -> None:
        """Take what a step has made."""
        for chunk in batch.chunks:
            request, sequence = chunk.request, chunk.request.sequences[0]
            self.scheduler.update(chunk)
            if not chunk.samples:
                continue
            request.times.append(now)
            sequence.token_ids.append(0)
            if len(sequence.token_ids) == request.answer:
                sequence.finish_reason = "length"
                self.scheduler.remove(request)
                self.unfinished -= 1


@dataclass(frozen=True)
class Simulated:
    """What came of it. requests: in the order of their arrival, each with the times of its tokens; busy: of groups."""

    requests: Sequence[Arrival]
    seconds: float
    busy: float
    preempted: int

    @property
    def requests_per_s(self) -> float:
        return len(self.requests) / self.seconds

    @property
    def steady_requests_per_s(self) -> float:
        """Of a backlog: by the tokens between the first three tenths and the last fifth, where nobody lacks work."""
        times = sorted(time for request in self.requests for time in request.times)
        first, last = (int(share * (len(times) - 1)) for share in (0.3, 0.8))
        tokens = len(times) / len(self.requests)
        return (last - first) / tokens / (times[last] - times[first]) * 1e3

    def ttft_ms(self, percent: float | None = None) -> float:
        """Time to the first token: the mean, or a percentile."""
        return _statistic([request.times[0] - request.came for request in self._settled], percent)

    def itl_ms(self, percent: float | None = None) -> float:
        """Time between tokens of one answer; 0 if no answer has two."""
        gaps = [b - a for request in self._settled for a, b in pairwise(request.times)]
        return _statistic(gaps, percent) if gaps else 0.0

    @property
    def _settled(self) -> Sequence[Arrival]:
        """Without the first fifth, who found empty queues."""
        return self.requests[len(self.requests) // 5 :]


def _statistic(values: Sequence[float], percent: float | None) -> float:
    if percent is None:
        return sum(values) / len(values)
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


def arrivals(workload: Workload, number: int, *, rate: float | None, seed: int = 0) -> list[Arrival]:
    """So many requests, their kinds drawn by weight; at random times at `rate` a second, or all at once."""
    draw = random.Random(seed)
    weights = [kind.weight for kind in workload.kinds]
    now, found = 0.0, []
    for index in range(number):
        now += draw.expovariate(rate / 1e3) if rate else 0.0
        found.append(arrival(index, draw.choices(workload.kinds, weights)[0], workload.tokens_per_tile, now))
    return found


def arrival(number: int, kind: Kind, tokens_per_tile: int, came: float) -> Arrival:
    """A request as the scheduler sees it; its text follows its tiles."""
    visual = kind.tiles * tokens_per_tile
    prompt = [0] * (visual + kind.prompt)
    images = [Image(0, visual, kind.tiles)] if kind.tiles else []
    return Arrival(
        number,
        prompt,
        len(prompt) + kind.output,
        images,
        [SequenceState(0)],
        came=came,
        answer=kind.output,
    )


class Deployment:
    """Groups, each request going to the one that has the fewest, and encoders, if there are any, that all share.

    Tiles that schedulers send wait in one queue for whichever encoder is idle, and go back as each batch is encoded.
    """

    def __init__(self, groups: Sequence[Group], *, encoders: int = 0, encoder_costs: Costs | None = None) -> None:
        if encoders and encoder_costs is None:
            raise ValueError(f"{encoders} encoders need costs")
        if any((one.scheduler.tiles_in_flight is not None) != bool(encoders) for one in groups):
            raise ValueError(f"schedulers that send tiles need encoders, and the others have none: {encoders} encoders")
        self.groups = groups
        self.idle_encoders = encoders
        self._encoder_costs = encoder_costs if encoders else None
        self._tiles: deque[tuple[Group, Tiles[Arrival]]] = deque()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()  # of events at one time

    def run(self, requests: Sequence[Arrival]) -> Simulated:
        """Serve all requests to their ends."""
        for request in requests:
            self._at(request.came, partial(self._serve, request))
        now = 0.0
        while self._events:
            now, _, happen = heapq.heappop(self._events)
            happen(now)
        busy = sum(group.busy_ms for group in self.groups) / len(self.groups) / now
        return Simulated(list(requests), now / 1e3, busy, sum(group.preempted for group in self.groups))

    def _at(self, time: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), happen))

    def _serve(self, request: Arrival, now: float) -> None:
        group = min(self.groups, key=lambda one: one.unfinished)
        group.unfinished += 1
        group.scheduler.add(request)
        self._wake(group, now)

    def _wake(self, group: Group, now: float) -> None:
        """Have a group that waits take a step, once whatever happens at the same moment has happened."""
        if not group.steps:
            group.steps = True
            self._at(now, partial(self._step, group, rested=True))

    def _step(self, group: Group, now: float, *, rested: bool) -> None:
        batch = group.scheduler.schedule()
        group.preempted += len(batch.preempted)
        if self._encoder_costs is not None:
            self._tiles.extend((group, tiles) for tiles in batch.tiles)
            self._encode(self._encoder_costs, now)
        group.steps = bool(batch.chunks or (batch.tiles and self._encoder_costs is None))
        if group.steps:
            length = group.step_ms(batch, rested=rested)
            group.busy_ms += length
            self._at(now + length, partial(self._stepped, group, batch))

    def _encode(self, costs: Costs, now: float) -> None:
        """Give tiles to every idle encoder, as many as it can take or as leave the others their share."""
        while self.idle_encoders and self._tiles:
            share = min(ENCODER_BATCH, -(-len(self._tiles) // self.idle_encoders))
            taken = [self._tiles.popleft() for _ in range(share)]
            self.idle_encoders -= 1
            self._at(now + costs.vision_ms(share), partial(self._encoded, costs, taken))

    def _encoded(self, costs: Costs, taken: list[tuple[Group, Tiles[Arrival]]], now: float) -> None:
        self.idle_encoders += 1
        for group, tiles in taken:
            group.scheduler.arrived(tiles)
            self._wake(group, now)
        self._encode(costs, now)

    def _stepped(self, group: Group, batch: Batch[Arrival], now: float) -> None:
        group.finish_step(batch, now)
        self._step(group, now, rested=False)


def groups_of(planner: Planner, prediction: Prediction) -> list[Group]:
    """The groups of a placement, idle."""
    placement = prediction.placement
    num_blocks = planner.kv_tokens(placement, prediction.memory) // BLOCK_SIZE
    # No more blocks than rows can use: they would only be listed.
    num_blocks = min(num_blocks, (prediction.rows + 1) * -(-planner.workload.longest // BLOCK_SIZE))
    # All encoders take, for whichever group sends them.
    tiles_in_flight = ENCODER_BATCH * ENCODER_DEPTH * placement.encoders or None
    costs = planner.group_costs(placement)

    def scheduler() -> Scheduler[Arrival]:
        return Scheduler(
            BlockManager(num_blocks, BLOCK_SIZE),
            max_num_seqs=prediction.rows,
            enable_prefix_caching=False,
            chunk_tokens=CHUNK_TOKENS * placement.tensor_parallel,
            tiles_in_flight=tiles_in_flight,
        )

    return [Group(scheduler(), costs) for _ in range(placement.groups)]


def deployment_of(planner: Planner, prediction: Prediction) -> Deployment:
    """A placement, idle."""
    encoders = prediction.placement.encoders
    return Deployment(groups_of(planner, prediction), encoders=encoders, encoder_costs=planner.costs)


def reduced(prediction: Prediction, least: int) -> tuple[Prediction, int]:
    """A smaller deployment of the same proportions with `least` groups if it can be, and how many make the whole."""
    whole = prediction.placement
    together = gcd(whole.groups, whole.encoders) if whole.encoders else whole.groups
    parts = max((n for n in range(1, together + 1) if together % n == 0 and whole.groups // n >= least), default=1)
    part = Placement(whole.gpus // parts, whole.tensor_parallel, whole.encoders // parts)
    return replace(prediction, placement=part), parts


def simulated_capacity(planner: Planner, prediction: Prediction, seed: int = 0) -> float:
    """Requests a second of a placement that never lacks any."""
    part, parts = reduced(prediction, 1)
    number = part.placement.groups * max(40, 4 * part.rows)
    done = deployment_of(planner, part).run(arrivals(planner.workload, number, rate=None, seed=seed))
    return parts * done.steady_requests_per_s


def simulated_load(planner: Planner, prediction: Prediction, rate: float, seed: int = 0) -> Simulated:
    """A placement, or a part of one with many groups, under requests that come at random at a rate."""
    part, parts = reduced(prediction, 4)
    number = part.placement.groups * max(60, 5 * part.rows)
    return deployment_of(planner, part).run(arrivals(planner.workload, number, rate=rate / parts, seed=seed))
