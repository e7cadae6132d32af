"""Placements of a model on 1 to 64 GPUs in simulation, and how far the simulator is from the real engine.

    python bench/scaling.py sweep [--gpu a100-80gb] [--counts 1 2 ...] [--out DIR] [--plot FILE.svg]
    python bench/scaling.py calibrate [--model M] [--device cpu] [--quantization Q] [--out DIR]
    python bench/scaling.py compare [--model M] [--device cpu] [--out DIR]

*sweep*: InternVL-Chat-V1.5, 7 tiles, 64 + 256 tokens: requests a second by the planner's formula and by the scheduler
in simulated time, to `bench/results/simulated/`. No GPU is timed: costs are the planner's. *calibrate*: what steps of
the engine take on this device, timed from outside: a table of costs for `vitrail plan`, in `bench/results/<device>/`.
*compare*: calibrates and serves requests in turn, then has the simulator serve the same requests; exits with status 1
where throughput, mean TTFT or mean ITL differ by more than 15 %. Images are cut beforehand. Wants a quiet machine.
"""

import argparse
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from tqdm import tqdm

from vitrail.bench.harness import require_gpu, results_path, write_results
from vitrail.runtime.api import Runtime
from vitrail.runtime.distributed.costs import Measured, causal_pairs, read_measured
from vitrail.runtime.distributed.gpus import GPUS, find_gpu
from vitrail.runtime.distributed.plan import make_planner
from vitrail.runtime.distributed.planner import Placement, Planner
from vitrail.runtime.distributed.simulator import Arrival, Deployment, Group, arrivals, reduced, simulated_capacity
from vitrail.runtime.distributed.workload import Kind, Workload, workload_of
from vitrail.runtime.engine.block_manager import BlockManager
from vitrail.runtime.engine.engine import Engine
from vitrail.runtime.engine.processor import Prepared
from vitrail.runtime.engine.scheduler import CHUNK_TOKENS, Scheduler
from vitrail.runtime.engine.sequence import Request
from vitrail.runtime.kernel_pack import GEOMETRIES
from vitrail.runtime.quantization.config import QuantizationConfig
from vitrail.runtime.request import GenerationConfig

COUNTS = (1, 2, 4, 8, 16, 32, 64)
METHODS = {
    "bf16": QuantizationConfig(),
    "int8": QuantizationConfig("int8", "int8"),
    "int4, vision int8": QuantizationConfig("int4", "int8"),
}
KINDS = ("replicas", "tensor parallel", "split")
SIMULATED = Path("bench", "results", "simulated")
TOLERANCE = 0.15

# --- the sweep ---


def sweep_rows(gpu: str, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The best placement of each kind for each count and method."""
    model = "InternVL-Chat-V1-5"
    config = GEOMETRIES[model]
    for method, quantization in METHODS.items():
        planner, _ = make_planner(model, config, find_gpu(gpu), quantization, workload_of(config, [Kind(7, 64, 256)]))
        known: dict[tuple[Placement, int], float] = {}
        for count in counts:
            yield from _rows_of(planner, method, count, known)


def _rows_of(
    planner: Planner, method: str, count: int, known: dict[tuple[Placement, int], float]
) -> Iterator[dict[str, Any]]:
    """known: what was simulated; parts of a deployment that are in proportion know nothing of one another."""
    seen = set()
    for one in planner.predictions(count):
        kind = "replicas" if one.placement.kind == "colocated" else one.placement.kind
        if kind in seen:
            continue
        seen.add(kind)
        part, parts = reduced(one, 1)
        if (part.placement, part.rows) not in known:
            known[part.placement, part.rows] = simulated_capacity(planner, part)
        simulated = parts * known[part.placement, part.rows]
        yield {
            "method": method,
            "gpus": count,
            "kind": kind,
            "placement": str(one.placement),
            "max_num_seqs": one.rows,
            "requests_per_s": one.requests_per_s,
            "simulated_requests_per_s": simulated,
            "difference_percent": 100 * (simulated / one.requests_per_s - 1),
            "longest_step_ms": one.itl_bound_ms,
        }


COLOURS = {"bf16": "#2a6f97", "int8": "#b5446e", "int4, vision int8": "#6a994e"}
DASHES = {"replicas": "", "tensor parallel": "7 4", "split": "2 3"}


def picture_of(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Requests a second for each GPU as SVG: lines by the formula, dots by the simulator."""
    width, height, left, top, bottom = 900, 420, 56, 40, 70
    counts = sorted({row["gpus"] for row in rows})
    most = 1.15 * max(max(row["requests_per_s"], row["simulated_requests_per_s"]) / row["gpus"] for row in rows)
    span = max(1e-9, float(np.log2(counts[-1] / counts[0])))

    def x(count: int) -> float:
        return left + (width - left - 30) * float(np.log2(count / counts[0])) / span

    def y(each: float) -> float:
        return height - bottom - (height - top - bottom) * each / most

    body = [f'<text x="{left}" y="22" font-size="14">{title}</text>']
    for tick in np.arange(0, most, 0.5):
        body.append(f'<path d="M{left} {y(tick):.1f}H{width - 30}" stroke="#e3e6ea"/>')
        body.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    foot = f'y="{height - bottom + 18}" text-anchor="middle"'
    body += [f'<text x="{x(count):.1f}" {foot}>{count}</text>' for count in counts]
    for method, colour in COLOURS.items():
        for kind, dash in DASHES.items():
            line = [row for row in rows if (row["method"], row["kind"]) == (method, kind)]
            points = [(x(row["gpus"]), y(row["requests_per_s"] / row["gpus"])) for row in line]
            path = " ".join(f"{'L' if number else 'M'}{px:.1f} {py:.1f}" for number, (px, py) in enumerate(points))
            body.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>')
            for row in line:
                cy = y(row["simulated_requests_per_s"] / row["gpus"])
                words = f"{method}, {row['gpus']} GPUs: {row['placement']}, {row['simulated_requests_per_s']:.2f} req/s"
                dot = f'cx="{x(row["gpus"]):.1f}" cy="{cy:.1f}" r="3.5" fill="{colour}"'
                body.append(f"<circle {dot}><title>{words}</title></circle>")
    place = left
    for name, colour, dash in (
        *((method, colour, "") for method, colour in COLOURS.items()),
        *((kind, "#555", dash) for kind, dash in DASHES.items()),
    ):
        stroke = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
        body.append(f'<path d="M{place} {height - 22}h28" {stroke}/>')
        body.append(f'<text x="{place + 34}" y="{height - 18}">{name}</text>')
        place += 56 + 6 * len(name)
    body.append(f'<text x="{width - 30}" y="{height - 18}" text-anchor="end">dots: simulated</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>\n"])


# --- what steps of the engine take ---


@dataclass
class Bench:
    """An engine without caches, and prompts for it that nobody has seen."""

    engine: Engine
    repeats: int = 7

    def __post_init__(self) -> None:
        self.draw = np.random.default_rng(0)

    def prepare(self, tokens: int, tiles: int = 0) -> Prepared:
        """A prompt of so many tokens, those of its tiles first."""
        config = self.engine.config
        visual = tiles * config.tokens_per_tile
        text = self.draw.integers(100, 200, tokens - visual).tolist()
        side = config.tile_size
        cut = [self.draw.integers(0, 256, (tiles, side, side, 3), dtype=np.uint8)] if tiles else []
        ids = [self.engine.context_token_id] * visual + text
        return Prepared(ids, [tiles] if tiles else [], visual, cut)

    def submit(self, prepared: Prepared, answer: int) -> Request:
        """Queue a prompt whose answer has so many tokens."""
        config = GenerationConfig(max_new_tokens=answer, ignore_eos=True, temperature=0)
        return self.engine.submit(uuid4().hex, prepared, config)

    def step_ms(self) -> float:
        """Milliseconds of the next step."""
        start = time.perf_counter()
        self.engine.step()
        return (time.perf_counter() - start) * 1e3

    def end(self, requests: Sequence[Request]) -> None:
        """Abort them all."""
        for request in requests:
            self.engine.abort(request.request_id)
        self.engine.step()

    def decoding(self, rows: int, context: int) -> list[Request]:
        """So many requests that write their answers."""
        requests = [self.submit(self.prepare(context), 200) for _ in range(rows)]
        while not all(request.started for request in requests):
            self.engine.step()
        return requests

    def fresh_ms(self, prompts: int, tokens: int, tiles: int, *, wait: float = 0.0) -> float:
        """The step that takes so many whole requests, whose answers are one token, after so many seconds of rest."""
        prepared = [self.prepare(tokens, tiles) for _ in range(prompts)]
        time.sleep(wait)
        for one in prepared:
            self.submit(one, 1)
        return self.step_ms()


ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # small products differ from one number of rows to the next
WAIT_S = 0.05  # after which caches and clock speed are those of a machine at rest
CHUNKS = (64, CHUNK_TOKENS)  # a pass is made for its longest: beside a short one rows may cost less
BESIDE = (*[0] * 6, CHUNKS[0], *[0] * 6, CHUNKS[1])  # steps with so many rows, one after the other
MANY = 8  # prompts in a pass, to learn what each adds


class Calibration:
    """What steps of an engine take by their shape, timed from outside, in rounds over all shapes in random order.

    Rounds, so that a machine that slows down for a while slows every shape. `rows` makes a table of costs of them;
    `Measured` says what its columns mean.
    """

    def __init__(self, engine: Engine, *, rows: Sequence[int] = ROWS, context: int = 192) -> None:
        self.bench = Bench(engine)
        self.counts, self.context = sorted(rows, reverse=True), context
        self.longest = min(engine.max_model_len - 256, 8192)
        self.far = (max(count for count in rows if count <= 4), self.longest - 32)
        self.lengths = [n for n in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if n <= self.longest]
        # Tiles of one or several prompts: (prompts, tokens of each, tiles of each). Each also without its tiles.
        per_tile = engine.config.tokens_per_tile
        images = [(max(1, n // 8), min(n, 8) * per_tile + 8, min(n, 8)) for n in (1, 2, 4, 8, 16, 32)]
        room = engine.scheduler.max_num_batched_tokens
        fits = (tokens <= self.longest and many * (tokens + tiles * per_tile) <= room for many, tokens, tiles in images)
        self.images = [image for image, fit in zip(images, fits, strict=True) if fit]
        self.fresh = list(
            {(1, n, 0) for n in self.lengths}
            | {(MANY, 64, 0)}
            | {(*one[:2], k) for one in self.images for k in (0, one[2])}
        )
        self.fresh_after_wait = [(1, 64, 0), self.images[0], self.images[min(2, len(self.images) - 1)]]
        self.rounds: list[dict[tuple[str | int, ...], list[float]]] = []

    def round(self) -> None:
        """Time every shape, once or a few times."""
        self.rounds.append({})
        draw = self.bench.draw
        for place in draw.permutation(len(self.fresh)):
            self._note(self.fresh[place], self.bench.fresh_ms(*self.fresh[place]))
        for shape in self.fresh_after_wait:
            self._note(("wait", *shape), self.bench.fresh_ms(*shape, wait=WAIT_S))
        rows = self.bench.decoding(self.counts[0], self.context)
        for count in self.counts:
            self.bench.end(rows[count:])
            del rows[count:]
            for chunk in BESIDE:
                if chunk:
                    self.bench.submit(self.bench.prepare(chunk), 1)
                self._note(("beside", count, chunk), self.bench.step_ms())
        self.bench.end(rows)
        requests = self.bench.decoding(*self.far)
        for _ in range(4):
            self._note(("far",), self.bench.step_ms())
        self.bench.end(requests)
        row = self.bench.decoding(1, 16)
        self.bench.submit(self.bench.prepare(self._chunks * CHUNK_TOKENS), 1)
        for number in range(self._chunks):
            self._note(("chunk", number), self.bench.step_ms())
        self.bench.end(row)

    def _context_of(self, rows: int) -> float:
        """Tokens of a row, on average, when the steps of so many were timed."""
        return self.context + (len(BESIDE) + 1) * (self.counts.index(rows) + 0.5)

    @property
    def _chunks(self) -> int:
        """Of a prompt that comes beside one row."""
        return max(1, self.longest // CHUNK_TOKENS)

    def _note(self, shape: tuple[str | int, ...], ms: float) -> None:
        self.rounds[-1].setdefault(shape, []).append(ms)

    def table(self) -> list[dict[str, Any]]:
        """Rows of a table of costs, by the rounds so far."""
        medians = {shape: median(chain.from_iterable(one[shape] for one in self.rounds)) for shape in self.rounds[0]}
        # What single steps lose to the rest of the machine is spread over all: it is too rare for a mean of each.
        lost = median(
            sum(map(sum, one.values())) / sum(medians[shape] * len(times) for shape, times in one.items())
            for one in self.rounds
        )
        ms = {shape: lost * value for shape, value in medians.items()}
        first, last = ms["chunk", 0], ms["chunk", self._chunks - 1]
        end = self._chunks * CHUNK_TOKENS
        pairs = causal_pairs(CHUNK_TOKENS, end) - causal_pairs(CHUNK_TOKENS, CHUNK_TOKENS)
        pair = max(0.0, last - first) / pairs if pairs else 0.0
        # Beyond the longest prompt there are passes of several.
        prompts = [(1, n) for n in self.lengths] + [(many, tokens) for many, tokens, _ in self.images if many > 1]
        found: list[dict[str, Any]] = [
            {"stage": "prefill", "tokens": many * tokens, "prompts": many, "ms": ms[many, tokens, 0]}
            for many, tokens in prompts
            if many == 1 or many * tokens > self.lengths[-1]
        ]
        whole = 64 * MANY  # as one prompt, whose pairs are more
        apart = ms[1, whole, 0] - pair * (causal_pairs(whole, whole) - MANY * causal_pairs(64, 64))
        found.append({"stage": "prompt", "ms": max(0.0, ms[MANY, 64, 0] - apart) / (MANY - 1)})
        for many, tokens, tiles in self.images:
            alone = ms[many, tokens, tiles] - ms[many, tokens, 0]
            found.append({"stage": "vision", "tiles": many * tiles, "ms": alone})
        rows, far = self.far
        kv = max(0.0, ms["far",] - ms["beside", rows, 0]) / rows / (far - self._context_of(rows))
        found.append({"stage": "kv", "ms": kv})
        for rows in self.counts:
            longer = kv * rows * (self._context_of(rows) - self.context)
            found.append(
                {"stage": "decode", "rows": rows, "ms": ms["beside", rows, 0] - longer, "context": self.context}
            )
            for chunk in CHUNKS:
                more = max(0.0, ms["beside", rows, chunk] - ms[1, chunk, 0] - longer)
                found.append({"stage": "beside", "tokens": chunk, "rows": rows, "ms": more, "context": self.context})
        found.append({"stage": "pair", "ms": pair})
        waits = [ms["wait", *shape] - ms[shape] for shape in self.fresh_after_wait]
        found.append({"stage": "wake", "ms": max(0.0, sum(waits) / len(waits))})
        return found


# --- the engine and the simulator on the same requests ---


def serve(engine: Engine, coming: Sequence[Arrival]) -> None:
    """Let the engine answer the requests, in real time, and note when their tokens came in place of simulated ones."""
    bench = Bench(engine)
    prompts = [bench.prepare(len(one.prompt_token_ids), sum(image.num_tiles for image in one.images)) for one in coming]
    waiting = deque(zip(prompts, coming, strict=True))
    running: list[tuple[Request, Arrival]] = []
    start = time.perf_counter()

    def now() -> float:
        return (time.perf_counter() - start) * 1e3

    while waiting or running:
        if not running and waiting[0][1].came > now():
            time.sleep((waiting[0][1].came - now()) / 1e3)
        while waiting and waiting[0][1].came <= now():
            prepared, one = waiting.popleft()
            running.append((bench.submit(prepared, one.answer), one))
        engine.step()
        at = now()
        for request, one in running:
            if request.error is not None:
                raise request.error
            one.times += [at] * (len(request.sequences[0].token_ids) - len(one.times))
        running = [(request, one) for request, one in running if request.finished is None]


def simulate(engine: Engine, costs: Measured, coming: Sequence[Arrival]) -> None:
    """The same by the simulator, with the engine's limits."""
    blocks = BlockManager(engine.blocks.limit, engine.blocks.block_size)
    scheduler: Scheduler[Arrival] = Scheduler(
        blocks,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.scheduler.max_num_batched_tokens,
        enable_prefix_caching=False,
    )
    Deployment([Group(scheduler, costs)]).run(coming)


def summary(requests: Sequence[Arrival]) -> dict[str, float]:
    """Requests a second; mean and high percentile of TTFT and ITL, in milliseconds."""
    first = [request.times[0] - request.came for request in requests]
    between = [b - a for request in requests for a, b in pairwise(request.times)]
    seconds = (max(request.times[-1] for request in requests) - min(request.came for request in requests)) / 1e3
    return {
        "requests_per_s": len(requests) / seconds,
        "ttft_ms": float(np.mean(first)),
        "itl_ms": float(np.mean(between)),
        "ttft_p90_ms": float(np.percentile(first, 90)),
        "itl_p99_ms": float(np.percentile(between, 99)),
    }


JUDGED = ("requests_per_s", "ttft_ms", "itl_ms")
LOADS = {"backlog": None, "Poisson, 40 %": 0.4, "Poisson, 70 %": 0.7}  # shares of what the backlog's throughput was


def served_rounds(
    engine: Engine, calibration: Calibration, workload: Workload, number: int, rounds: int
) -> dict[str, tuple[float | None, list[list[Arrival]]]]:
    """Every load by the engine, once a round and each time other requests; steps are timed before each of them."""
    rates: dict[str, float | None] = {}
    served: dict[str, list[list[Arrival]]] = {name: [] for name in LOADS}
    for seed in tqdm(range(rounds), desc="rounds", disable=None):
        for name, share in LOADS.items():
            calibration.round()
            if name not in rates:
                rates[name] = None if share is None else share * summary(served["backlog"][0])["requests_per_s"]
            served[name].append(arrivals(workload, number, rate=rates[name], seed=seed))
            serve(engine, served[name][-1])
    return {name: (rates[name], lists) for name, lists in served.items()}


def compare_rows(
    engine: Engine,
    costs: Measured,
    workload: Workload,
    served: Mapping[str, tuple[float | None, Sequence[Sequence[Arrival]]]],
) -> Iterator[dict[str, Any]]:
    """What the engine did with each load, and what the simulator does with the same requests: medians of the rounds.

    error: of the simulator in a round, the median too, so that a minute in which the machine was busy does not count.
    """
    for name, (rate, real) in served.items():
        simulated = [arrivals(workload, len(one), rate=rate, seed=seed) for seed, one in enumerate(real)]
        for one in simulated:
            simulate(engine, costs, one)
        rounds = [(summary(ours), summary(theirs)) for ours, theirs in zip(real, simulated, strict=True)]
        row: dict[str, Any] = {"load": name, "rounds": len(rounds), "requests": len(real[0])}
        for key in rounds[0][0]:
            row[key] = median(ours[key] for ours, _ in rounds)
            row[f"simulated_{key}"] = median(theirs[key] for _, theirs in rounds)
            row[f"{key}_error"] = median(theirs[key] / ours[key] - 1 for ours, theirs in rounds)
        yield row | {"within_tolerance": all(abs(row[f"{key}_error"]) <= TOLERANCE for key in JUDGED)}


def load_engine(arguments: argparse.Namespace) -> Runtime:
    """The model without caches, in the type that its device is best at."""
    if arguments.device != "cpu":
        require_gpu()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return Runtime.from_pretrained(
        arguments.model,
        device=arguments.device,
        dtype="float32" if arguments.device == "cpu" else "bfloat16",
        quantization=arguments.quantization,
        vision_quantization=arguments.vision_quantization,
        enable_prefix_caching=False,
        vision_cache_gb=0,
        max_num_seqs=64,
    )


def write_costs(arguments: argparse.Namespace, calibration: Calibration) -> Path:
    """Write the table of what was timed."""
    label = {
        "model": arguments.model.rstrip("/").rpartition("/")[2],
        "quantization": arguments.quantization,
        "vision_quantization": arguments.vision_quantization,
    }
    rows = [{**label, **row} for row in calibration.table()]
    notes = (
        "Milliseconds of whole steps of the engine; kv, pair and prompt: for each token, each pair of positions and "
        "each prompt of a pass, more; wake: what a step after a wait takes more."
    )
    path = results_path("costs", arguments.out)
    return write_results(path, rows, title="What the stages cost", notes=notes)


def main() -> int:
    """Sweep, calibrate or compare; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sweep = commands.add_parser("sweep")
    sweep.add_argument("--gpu", choices=sorted(GPUS), default="a100-80gb")
    sweep.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    sweep.add_argument("--out", default=str(SIMULATED), help="folder of the JSON")
    sweep.add_argument("--plot", type=Path, help="an SVG to draw")
    for name in ("calibrate", "compare"):
        command = commands.add_parser(name)
        command.add_argument("--model", default="nano")
        command.add_argument("--device", default="cpu", help="cpu, or cuda")
        command.add_argument("--quantization")
        command.add_argument("--vision-quantization")
        # With one thread the other cores are there for whatever else the machine does, and times are steadier.
        command.add_argument("--threads", type=int, default=1 if name == "compare" else None, help="of the engine")
        command.add_argument("--rounds", type=int, default=5 if name == "compare" else 7)
        if name == "compare":
            command.add_argument("--requests", type=int, default=24, help="of each load and round")
        command.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    arguments = parser.parse_args()
    return _sweep(arguments) if arguments.command == "sweep" else _measure(arguments)


def _sweep(arguments: argparse.Namespace) -> int:
    rows = []
    for row in tqdm(sweep_rows(arguments.gpu, arguments.counts), desc="simulating", disable=None):
        rows.append(row)
        print(
            f"{row['method']:18} {row['gpus']:3} {row['placement']:52} {row['requests_per_s']:7.2f} req/s, "
            f"simulated {row['simulated_requests_per_s']:7.2f} ({row['difference_percent']:+.1f} %)",
            flush=True,
        )
    title = f"InternVL-Chat-V1.5 on {arguments.gpu}: simulated, not measured"
    notes = "7 tiles and 64 tokens of text in, 256 tokens out; costs by the roofline of `vitrail plan`."
    path = write_results(results_path("scaling", arguments.out), rows, title=title, notes=notes)
    print(f"written to {path}")
    if arguments.plot:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        caption = f"{title}: requests a second for each GPU, by number of GPUs"
        arguments.plot.write_text(picture_of(rows, caption), encoding="utf-8")
        print(f"drawn to {arguments.plot}")
    return 0


def _measure(arguments: argparse.Namespace) -> int:
    with load_engine(arguments) as runtime:
        engine = runtime.engine
        Calibration(engine).round()  # warms up, and grows the cache
        calibration = Calibration(engine)
        if arguments.command == "calibrate":
            for _ in tqdm(range(arguments.rounds), desc="rounds", disable=None):
                calibration.round()
            print(f"written to {write_costs(arguments, calibration)}")
            return 0
        kinds = [Kind(0, 40, 32), Kind(1, 24, 48), Kind(4, 24, 48), Kind(13, 24, 24)]
        workload = workload_of(engine.config, kinds)
        served = served_rounds(engine, calibration, workload, arguments.requests, arguments.rounds)
        path = write_costs(arguments, calibration)
        chosen = QuantizationConfig(arguments.quantization, arguments.vision_quantization)
        costs = read_measured(path, arguments.model, chosen)
        assert costs is not None
        rows = []
        for row in compare_rows(engine, costs, workload, served):
            rows.append({"model": arguments.model, **row})
            found = ", ".join(
                f"{key} {row[key]:.2f} simulated {row[f'simulated_{key}']:.2f} ({row[f'{key}_error']:+.1%})"
                for key in (*JUDGED, "ttft_p90_ms", "itl_p99_ms")
            )
            print(f"{row['load']:14} {found}", flush=True)
        notes = (
            "The same requests by the engine and by the simulator, whose costs are of steps timed between the loads; "
            "medians of the rounds."
        )
        path = write_results(results_path("simulator", arguments.out), rows, title="The simulator's error", notes=notes)
        print(f"written to {path}")
    return 0 if all(row["within_tolerance"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
