"""Placements of a model on 1 to 64 GPUs in simulation, and how far the simulator is from the real engine.

    python bench/scaling.py sweep [--gpu a100-80gb] [--counts 1 2 ...] [--out DIR] [--plot FILE.svg]
    python bench/scaling.py calibrate [--model M] [--device cpu] [--quantization Q] [--out DIR]
    python bench/scaling.py compare [--model M] [--device cpu] [--out DIR]

*sweep*: InternVL-Chat-V1.5, 7 tiles, 64 + 256 tokens: requests a second by the planner's formula and by the scheduler
in simulated time, to `bench/results/simulated/`. No GPU is timed: costs are the planner's. *calibrate*: what steps of
the engine take on this device, timed from outside: a table of costs for `vitrail plan`, in `bench/results/<device>/`.
*compare*: calibrates, then serves the same requests by the engine and by the simulator; exits with status 1 where
throughput, mean TTFT or mean ITL differ by more than 15 %. Images are cut beforehand. Wants a quiet machine.
"""

import argparse
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

import numpy as np
from tqdm import tqdm

from vitrail.bench.harness import require_gpu, results_path, write_results
from vitrail.runtime.api import Runtime
from vitrail.runtime.distributed.costs import Measured, causal_pairs, read_measured
from vitrail.runtime.distributed.gpus import GPUS, find_gpu
from vitrail.runtime.distributed.plan import make_planner
from vitrail.runtime.distributed.planner import Planner
from vitrail.runtime.distributed.simulator import Arrival, Deployment, Group, arrivals, simulated_capacity
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
        # Replicas know nothing of one another: one stands for all of any number.
        for count in counts:
            yield from _rows_of(planner, method, count)


def _rows_of(planner: Planner, method: str, count: int) -> Iterator[dict[str, Any]]:
    seen = set()
    for one in planner.predictions(count):
        kind = "replicas" if one.placement.kind == "colocated" else one.placement.kind
        if kind in seen:
            continue
        seen.add(kind)
        simulated = simulated_capacity(planner, one)
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

    def first_step_ms(self, tokens: int, tiles: int = 0) -> float:
        """The step that takes a whole request, whose answer is one token."""
        times = []
        for _ in range(self.repeats + 1):
            self.submit(self.prepare(tokens, tiles), 1)
            times.append(self.step_ms())
        return median(times[1:])


def calibrate(
    engine: Engine, *, rows: Sequence[int] = (1, 2, 4, 8, 16, 32), repeats: int = 7, context: int = 256
) -> list[dict[str, Any]]:
    """Rows of a table of costs: `Measured` says what they mean. No prompt is longer than the engine allows."""
    bench = Bench(engine, repeats)
    longest = min(engine.max_model_len - 256, 8192)
    per_tile = engine.config.tokens_per_tile
    found: list[dict[str, Any]] = []
    lengths = [n for n in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if n <= longest]
    prefill = {n: bench.first_step_ms(n) for n in lengths}
    found += [{"stage": "prefill", "tokens": n, "ms": ms} for n, ms in prefill.items()]
    lines = np.array(list(prefill.items()))
    for tiles in (count for count in (1, 2, 4, 8, 16) if count * per_tile + 8 <= longest):
        tokens = tiles * per_tile + 8
        ms = bench.first_step_ms(tokens, tiles)
        found.append({"stage": "vision", "tiles": tiles, "ms": ms - float(np.interp(tokens, *lines.T))})
    chunks = (64, CHUNK_TOKENS)  # a pass is made for its longest: beside a short one rows may cost less
    for count in rows:
        requests = bench.decoding(count, context)
        ms = median(bench.step_ms() for _ in range(2 * repeats))
        # While it was timed, contexts have grown by as many tokens as steps were taken.
        found.append({"stage": "decode", "rows": count, "ms": ms, "context": context + repeats})
        for chunk in chunks:
            times = []
            for _ in range(repeats):
                bench.submit(bench.prepare(chunk), 1)
                times.append(bench.step_ms())
            ms = max(0.0, median(times) - prefill[chunk])
            found.append({"stage": "beside", "tokens": chunk, "rows": count, "ms": ms, "context": context + repeats})
        bench.end(requests)
    many, far = max(count for count in rows if count <= 8), longest - 4 * repeats
    requests = bench.decoding(many, far)
    longer = median(bench.step_ms() for _ in range(2 * repeats))
    bench.end(requests)
    near = next(row["ms"] for row in found if row["stage"] == "decode" and row["rows"] == many)
    found.append({"stage": "kv", "ms": max(0.0, longer - near) / many / (far - context)})
    found.append({"stage": "pair", "ms": _pair_ms(bench, longest)})
    return found


def _pair_ms(bench: Bench, longest: int) -> float:
    """What a pair of positions costs, by the first and the last whole chunk of a prompt that comes beside one row."""
    times: list[tuple[float, float]] = []
    chunks = longest // CHUNK_TOKENS
    for _ in range(bench.repeats):
        row = bench.decoding(1, 16)
        bench.submit(bench.prepare(chunks * CHUNK_TOKENS), 1)
        steps = [bench.step_ms() for _ in range(chunks)]
        times.append((steps[0], steps[-1]))
        bench.end(row)
    first, last = (median(column) for column in zip(*times, strict=True))
    pairs = causal_pairs(CHUNK_TOKENS, chunks * CHUNK_TOKENS) - causal_pairs(CHUNK_TOKENS, CHUNK_TOKENS)
    return max(0.0, last - first) / pairs if pairs else 0.0


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


def compare_rows(engine: Engine, costs: Measured, workload: Workload, number: int) -> Iterator[dict[str, Any]]:
    """A backlog, then requests at random at shares of what it managed: each by the engine and by the simulator."""
    rate: float | None = None
    capacity = 0.0
    for name, share in (("backlog", None), ("Poisson, 40 %", 0.4), ("Poisson, 70 %", 0.7)):
        rate = None if share is None else share * capacity
        real, simulated = (arrivals(workload, number, rate=rate) for _ in range(2))
        serve(engine, real)
        simulate(engine, costs, simulated)
        ours, theirs = summary(real), summary(simulated)
        capacity = capacity or ours["requests_per_s"]
        row: dict[str, Any] = {"load": name, "requests": number}
        for key, value in ours.items():
            row |= {key: value, f"simulated_{key}": theirs[key], f"{key}_error": theirs[key] / value - 1}
        yield row | {"within_tolerance": all(abs(row[f"{key}_error"]) <= TOLERANCE for key in JUDGED)}


def load_engine(arguments: argparse.Namespace) -> Runtime:
    """The model without caches, in the type that its device is best at."""
    if arguments.device != "cpu":
        require_gpu()
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


def write_costs(arguments: argparse.Namespace, engine: Engine) -> Path:
    """Calibrate, and write the table."""
    calibrate(engine, rows=(8, 32), repeats=1)  # warms up, and grows the cache
    label = {
        "model": arguments.model.rstrip("/").rpartition("/")[2],
        "quantization": arguments.quantization,
        "vision_quantization": arguments.vision_quantization,
    }
    rows = [{**label, **row} for row in calibrate(engine)]
    notes = "Milliseconds of whole steps of the engine; kv and pair: for each token, and each pair of positions, more."
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
        command.add_argument("--requests", type=int, default=60)
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
        path = write_costs(arguments, engine)
        print(f"written to {path}")
        if arguments.command == "calibrate":
            return 0
        chosen = QuantizationConfig(arguments.quantization, arguments.vision_quantization)
        costs = read_measured(path, arguments.model, chosen)
        assert costs is not None
        kinds = [Kind(0, 40, 32), Kind(1, 24, 48), Kind(4, 24, 48), Kind(13, 24, 24)]
        workload = workload_of(engine.config, kinds)
        rows = []
        for row in tqdm(compare_rows(engine, costs, workload, arguments.requests), desc="comparing", disable=None):
            rows.append({"model": arguments.model, **row})
            found = ", ".join(
                f"{key} {row[key]:.2f} simulated {row[f'simulated_{key}']:.2f} ({row[f'{key}_error']:+.1%})"
                for key in (*JUDGED, "ttft_p90_ms", "itl_p99_ms")
            )
            print(f"{row['load']:14} {found}", flush=True)
        notes = (
            "The same requests by the engine and by the simulator, with costs calibrated before; error: of the latter."
        )
        path = write_results(results_path("simulator", arguments.out), rows, title="The simulator's error", notes=notes)
        print(f"written to {path}")
    return 0 if all(row["within_tolerance"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
