"""Which placement of a model on N GPUs answers most requests, in closed form.

A *group* is the GPUs of one language half: one, or several with tensor parallelism. Its GPUs encode whole tiles too,
unless encoders of their own do (*split*). A request costs its group the vision half and the prompt, and a share of
every decode step in between; steps are what the scheduler makes them: while anything decodes a step has at most
`CHUNK_TOKENS` of prompts and tiles for each GPU of the group, so that a long prompt needs many steps, whoever decodes.
`simulator.py` runs the scheduler itself and says how far this is off.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, inf, sqrt

from ..engine.scheduler import CHUNK_TOKENS
from ..errors import CapacityError
from ..layers.kv_cache import BLOCK_SIZE
from ..quantization.config import QuantizationConfig
from .costs import Costs, TensorParallel, causal_pairs
from .gpus import Gpu
from .sizes import ModelSizes
from .workload import Workload

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
TENSOR_PARALLEL = (1, 2, 4, 8)  # within one machine
# Tiles that an encoder takes at a time when more wait, and how many times that it holds: as `vision_pool.py` has it.
ENCODER_BATCH = 8
ENCODER_DEPTH = 2
BATCH = 16  # tiles of a pass that no step bounds
# CUDA's context, the libraries' workspaces, what the graphs of a decode step hold. Judged, not measured.
OVERHEAD_GB = 1.5
MOST_GPUS = 1024  # that an answer to "how many would do?" is looked for


@dataclass(frozen=True)
class Placement:
    """GPUs in all, those of them that only encode, and how many each language half takes."""

    gpus: int
    tensor_parallel: int = 1
    encoders: int = 0

    @property
    def groups(self) -> int:
        return (self.gpus - self.encoders) // self.tensor_parallel

    @property
    def kind(self) -> str:
        """`colocated`, `replicas`, `tensor parallel` or `split`."""
        if self.encoders:
            return "split"
        if self.tensor_parallel > 1:
            return "tensor parallel"
        return "colocated" if self.gpus == 1 else "replicas"

    def __str__(self) -> str:
        halves = f"{self.groups} x TP{self.tensor_parallel}" if self.tensor_parallel > 1 else f"{self.groups}"
        if self.encoders:
            return f"split, {self.encoders} for vision, {self.gpus - self.encoders} for the LLM ({halves})"
        if self.tensor_parallel > 1:
            return f"tensor parallel, {halves}, vision data-parallel"
        return self.kind if self.gpus == 1 else f"{self.groups} replicas"


@dataclass(frozen=True)
class Memory:
    """GB of one GPU of a kind: what it holds, and what is left for keys and values. rows: requests that find room."""

    gpu_gb: float
    usable: float
    vision_weights: float
    language_weights: float
    vision_peak: float
    overhead: float
    one_request: float

    @property
    def kv(self) -> float:
        """What keys and values may take; negative where something is short."""
        fixed = self.vision_weights + self.language_weights + self.vision_peak + self.overhead
        return self.usable - fixed

    @property
    def short(self) -> float:
        """What is missing for the longest request; at most 0 where it fits."""
        return self.one_request - self.kv


@dataclass(frozen=True)
class Prediction:
    """What a placement does. Milliseconds; latencies at the workload's rate, None where that is beyond it.

    rows: `max_num_seqs` of a group. batch: rows that decode at capacity. itl_bound_ms: the longest step. encoder:
    memory of a GPU that only encodes; memory: of any other. limit: what it is that more of would help.
    """

    placement: Placement
    memory: Memory
    encoder: Memory | None
    rows: int
    batch: float
    requests_per_s: float
    output_tokens_per_s: float
    limit: str
    itl_bound_ms: float
    ttft_ms: float | None = None
    itl_ms: float | None = None

    @property
    def fits(self) -> bool:
        return self.memory.short <= 0 and (self.encoder is None or self.encoder.kv >= 0)


@dataclass(frozen=True)
class Planner:
    """A model on GPUs of one kind, for one workload.

    chunk_tokens: of prompts and tiles in a step in which others decode, for each GPU of a group; None for steps without
    that bound, in which prompts run whole between decode steps of full batches.
    """

    sizes: ModelSizes
    gpu: Gpu
    quantization: QuantizationConfig
    costs: Costs
    workload: Workload
    gpu_memory_utilization: float = 0.9
    chunk_tokens: int | None = CHUNK_TOKENS

    # --- what there is to choose from ---

    def placements(self, gpus: int) -> Iterator[Placement]:
        """All placements of so many GPUs; of many splits, those in which neither half waits much for the other."""
        heads = self.sizes.config.llm.num_key_value_heads
        for size in TENSOR_PARALLEL:
            if heads % size or size > gpus:
                continue
            if gpus % size == 0:
                yield Placement(gpus, size)
            if not self.workload.tiles:
                continue
            balanced = self._balanced_encoders(gpus, size) if gpus > 8 else gpus / 2
            for encoders in range(1, gpus - size + 1):
                if (gpus - encoders) % size == 0 and abs(encoders - balanced) <= max(4, size):
                    yield Placement(gpus, size, encoders)

    def _balanced_encoders(self, gpus: int, size: int) -> float:
        """Encoders, not in whole ones, that give their groups as much as those can take."""
        split = Placement(1 + size, size, 1)
        rows = self._most_rows(split, self.memory(split))
        language, _ = self._group_ms(split, self.group_costs(split), rows)
        vision = self._encoder_ms()
        return gpus * vision / (vision + language * size)

    def predictions(self, gpus: int) -> list[Prediction]:
        """The placements that fit, the best first; of splits the best of each size of the language half."""
        found = [self.predict(placement) for placement in self.placements(gpus)]
        best: dict[tuple[int, bool], Prediction] = {}
        for one in found:
            key = (one.placement.tensor_parallel, bool(one.placement.encoders))
            if one.fits and (key not in best or one.requests_per_s > best[key].requests_per_s):
                best[key] = one
        # Of equals the one with fewer parts.
        return sorted(best.values(), key=lambda one: (-round(one.requests_per_s, 3), one.placement.tensor_parallel))

    def check_fits(self, gpus: int) -> None:
        """Raises `CapacityError` where no placement fits: what is short, and what would do."""
        found = [self.predict(placement) for placement in self.placements(gpus)]
        if any(one.fits for one in found):
            return
        nearest = min(found, key=lambda one: max(one.memory.short, -one.encoder.kv if one.encoder else -inf))
        memory = nearest.memory
        if nearest.encoder is not None and -nearest.encoder.kv > memory.short:
            memory = nearest.encoder
        raise CapacityError(
            f"no placement fits {gpus} x {self.gpu.name}: with {nearest.placement}, a GPU would hold "
            f"{memory.vision_weights + memory.language_weights:.1f} GB of weights, {memory.vision_peak:.1f} of "
            f"activations, {memory.overhead:.1f} of context and graphs and {memory.one_request:.2f} of one request's "
            f"keys and values, and {memory.usable:.1f} of its {memory.gpu_gb:g} GB are usable: "
            f"{memory.short:.1f} GB are short. {self._remedies(gpus)}"
        )

    def _remedies(self, gpus: int) -> str:
        """What would fit, in a sentence."""

        def fits(planner: Planner, count: int) -> bool:
            return any(planner.predict(placement).fits for placement in planner.placements(count))

        words = []
        enough = next((count for count in range(gpus + 1, 17) if fits(self, count)), None)
        if enough is not None:
            words.append(f"{enough} GPUs would do")
        for llm, vision in (("int8", None), ("int8", "int8"), ("int4", None), ("int4", "int8")):
            smaller = QuantizationConfig(llm, vision)
            if fits(replace(self, quantization=smaller), gpus):
                option = f"--quantization {llm}" + (f" --vision-quantization {vision}" if vision else "")
                words.append(f"{option} would fit")
                break
        return f"{' and '.join(words) or 'No number of them up to 16 would do, nor would quantising it'}."

    # --- one placement ---

    def predict(self, placement: Placement) -> Prediction:
        """Memory, capacity and, if the workload has a rate that it can serve, latency."""
        memory = self.memory(placement)
        encoder = self.memory(placement, encodes_only=True) if placement.encoders else None
        most = self._most_rows(placement, memory)
        options = [rows for rows in (*ROWS, most) if rows <= most] or [1]
        costs = self.group_costs(placement)
        by_rows = {rows: self._group_ms(placement, costs, rows) for rows in options}
        fastest = min(ms for ms, _ in by_rows.values())
        # The fewest rows of those that are as good: the others would only make steps longer.
        rows = min(rows for rows, (ms, _) in by_rows.items() if ms <= 1.002 * fastest)
        group_ms, batch = by_rows[rows]
        of_groups = 1e3 * placement.groups / group_ms
        of_encoders = 1e3 * placement.encoders / self._encoder_ms() if placement.encoders else inf
        requests = min(of_groups, of_encoders)
        limit = "vision" if of_encoders < of_groups else "memory" if rows == most < ROWS[-1] else "compute"
        bound = costs.decode_ms(batch, batch * self.workload.context) + self._chunk_ms(placement, costs)
        found = Prediction(
            placement,
            memory,
            encoder,
            rows,
            batch,
            requests,
            requests * self.workload.output,
            limit,
            bound,
        )
        if self.workload.rate is None or self.workload.rate >= requests:
            return found
        ttft, itl = self._latency(placement, costs, self.workload.rate, rows)
        return replace(found, ttft_ms=ttft, itl_ms=itl)

    def memory(self, placement: Placement, *, encodes_only: bool = False) -> Memory:
        """What one GPU of a placement holds."""
        sizes, size = self.sizes, placement.tensor_parallel
        encodes = encodes_only or not placement.encoders
        longest = ceil(self.workload.longest / BLOCK_SIZE) * BLOCK_SIZE
        return Memory(
            gpu_gb=self.gpu.memory_gb,
            usable=self.gpu.memory_gb * self.gpu_memory_utilization,
            vision_weights=sizes.vision_gb(self.quantization) if encodes else 0.0,
            language_weights=0.0 if encodes_only else sizes.language_gb(self.quantization) / size,
            vision_peak=sizes.vision_peak_gb if encodes else 0.0,
            overhead=OVERHEAD_GB,
            one_request=0.0 if encodes_only else self._kv_gb(longest) / size,
        )

    def _kv_gb(self, tokens: float) -> float:
        return tokens * self.sizes.config.llm.kv_bytes_per_token * 1e-9

    def kv_tokens(self, placement: Placement, memory: Memory) -> int:
        """Tokens of keys and values that a group holds."""
        return int(max(0.0, memory.kv) * placement.tensor_parallel / self._kv_gb(1))

    def _most_rows(self, placement: Placement, memory: Memory) -> int:
        return max(1, min(ROWS[-1], int(self.kv_tokens(placement, memory) / self.workload.held)))

    def group_costs(self, placement: Placement) -> Costs:
        """What stages cost a group."""
        if placement.tensor_parallel == 1:
            return self.costs
        return TensorParallel(self.costs, self.sizes, self.gpu, placement.tensor_parallel)

    # --- capacity ---

    def budget(self, placement: Placement) -> int | None:
        """Tokens of prompts and tiles in a step of a group in which others decode."""
        return self.chunk_tokens and self.chunk_tokens * placement.tensor_parallel

    def _tiles_at_once(self, placement: Placement) -> int:
        """Tiles that a group encodes in one pass."""
        budget = self.budget(placement)
        if budget is None:
            return BATCH * placement.tensor_parallel
        return max(1, budget // self.workload.tokens_per_tile)

    def _vision_ms(self, placement: Placement, costs: Costs) -> float:
        """What the vision half takes of a group for one request."""
        if placement.encoders:
            return 0.0
        batch = self._tiles_at_once(placement)
        if not self.chunk_tokens:
            return self.workload.tiles / batch * costs.vision_ms(batch)

        def passes_ms(tiles: int) -> float:  # the last of an image is seldom filled up: its prompt goes first
            whole, rest = divmod(tiles, batch)
            return whole * costs.vision_ms(batch) + (costs.vision_ms(rest) if rest else 0.0)

        return self.workload.mean([passes_ms(kind.tiles) for kind in self.workload.kinds])

    def _encoder_ms(self) -> float:
        """What the vision half takes of an encoder for one request."""
        batch = ENCODER_BATCH if self.chunk_tokens else BATCH
        return self.workload.tiles / batch * self.costs.vision_ms(batch)

    def _prompt_steps(self, placement: Placement) -> float:
        """Steps that a request's prompt is spread over."""
        budget = self.budget(placement)
        return self.workload.prompt / budget if budget else 0.0

    def _vision_steps(self, placement: Placement) -> float:
        if placement.encoders or not self.chunk_tokens:
            return 0.0
        return self.workload.tiles / self._tiles_at_once(placement)

    def _prefill_ms(self, placement: Placement, costs: Costs) -> float:
        """A request's prompt, in the passes that it has."""
        tokens, pairs = self.workload.prompt, self.workload.causal_pairs
        steps = max(1.0, self._prompt_steps(placement))
        return steps * costs.prefill_ms(tokens / steps, pairs / steps)

    def _chunk_ms(self, placement: Placement, costs: Costs) -> float:
        """The most that a step takes beside its decode rows."""
        longest = max(self.workload.prompt_tokens(kind) for kind in self.workload.kinds)
        tokens = min(self.budget(placement) or longest, longest)
        prompt = costs.prefill_ms(tokens, causal_pairs(tokens, longest))
        most = max(kind.tiles for kind in self.workload.kinds)
        tiles = min(most, self._tiles_at_once(placement)) if not placement.encoders else 0
        return max(prompt, costs.vision_ms(tiles) if tiles else 0.0)

    def _group_ms(self, placement: Placement, costs: Costs, rows: int) -> tuple[float, float]:
        """Milliseconds of a group for a request when others wait, and the rows that decode on average."""
        output, context = self.workload.output, self.workload.context
        prompts, visions = self._prompt_steps(placement), self._vision_steps(placement)
        # One row at a time is in its prompt and does not decode, if there are steps between its chunks.
        decoding = max(1.0, rows - 1) if self.chunk_tokens else rows
        steps = max(prompts + visions, output / decoding)
        batch = output / steps
        mixed = prompts * costs.beside_ms(batch, batch * context, self.budget(placement) or 0)
        decode = (steps - prompts) * costs.decode_ms(batch, batch * context)
        return self._vision_ms(placement, costs) + self._prefill_ms(placement, costs) + mixed + decode, batch

    # --- latency ---

    def _latency(self, placement: Placement, costs: Costs, rate: float, rows: int) -> tuple[float, float]:
        """Mean time to the first token, and between tokens, at a rate below capacity."""
        output, context = self.workload.output, self.workload.context
        each = rate / placement.groups / 1e3  # requests a millisecond and group
        vision, prefill = self._vision_ms(placement, costs), self._prefill_ms(placement, costs)
        budget = self.budget(placement) or 0
        prompts, visions = self._prompt_steps(placement), self._vision_steps(placement)
        # Rows by Little's law: tokens a millisecond times the step. A share of all time goes to prompts and tiles;
        # a step that holds a prompt reads the weights for its rows too.
        own = each * (vision + prefill)

        def step_ms(batch: float) -> float:
            full = costs.decode_ms(batch, batch * context)
            saved = each * prompts * (full - costs.beside_ms(batch, batch * context, budget))
            return full / max(1e-3, 1 - own + saved)

        low, high = 0.0, float(rows)
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if each * output * step_ms(max(1.0, middle)) > middle else (low, middle)
        batch = max(1.0, high)
        itl = step_ms(batch)
        # The prompt goes in order of arrival, between the rows of whoever decodes: a queue with service of one length.
        decoding = min(1.0, high)
        between = prompts * costs.beside_ms(batch, batch * context, budget)
        between += visions * costs.decode_ms(batch, batch * context)
        service = vision + prefill + decoding * between
        ttft = service + _queue_ms(service, rate / 1e3, placement.groups)
        if placement.encoders:
            # Idle encoders share the tiles of an image; behind it, the next waits as for one fast encoder.
            encode = self.costs.vision_ms(ceil(self.workload.tiles / placement.encoders))
            ttft += encode + _queue_ms(self._encoder_ms() / placement.encoders, rate / 1e3, 1)
        return ttft, itl


def _queue_ms(service: float, rate: float, servers: int) -> float:
    """The mean wait for one of several servers with a fixed time of service (Sakasegawa); exact for one."""
    load = min(0.999, rate * service / servers)
    return service / 2 * load ** (sqrt(2 * (servers + 1)) - 1) / (servers * (1 - load))


def gpus_needed(planner: Planner, rate: float) -> int | None:
    """The fewest GPUs of any placement that serve a rate; None if `MOST_GPUS` do not."""

    def serves(count: int) -> bool:
        found = planner.predictions(count)
        return bool(found) and found[0].requests_per_s > rate

    low, high = 0, 1
    while not serves(high):
        if high >= MOST_GPUS:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if serves(middle) else (middle, high)
    return high
