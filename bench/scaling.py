"""Placements of a model on 1 to 64 GPUs in simulation, and how far the simulator is from the real engine.

    python bench/scaling.py sweep [--gpu a100-80gb] [--counts 1 2 ...] [--out DIR] [--plot FILE.svg]
    python bench/scaling.py calibrate [--model M] [--device cpu] [--quantization Q] [--out DIR]
    python bench/scaling.py compare [--model M] [--device cpu] [--out DIR]

*sweep*: InternVL-Chat-V1.5, 7 tiles, 64 + 256 tokens: requests a second by the planner's formula and by the scheduler
in simulated time, to `bench/results/simulated/`. No GPU is timed: costs are the planner's. *calibrate*: what steps of
the engine take on this device, timed from outside: a table of costs for `vitrail plan`, in `bench/results/<device>/`.
*compare*: serves requests, times steps whenever nothing runs, and has the simulator serve the same requests; exits with
status 1 where throughput, mean TTFT or mean ITL differ by more than 15 %. Images are cut beforehand. Wants a quiet
machine.
"""

import argparse
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vitrail.bench.calibration import Bench, Calibration
from vitrail.bench.harness import require_gpu, results_path, write_results
from vitrail.runtime.api import Runtime
from vitrail.runtime.distributed.costs import Measured, measured_of
from vitrail.runtime.distributed.gpus import GPUS, find_gpu
from vitrail.runtime.distributed.plan import make_planner
from vitrail.runtime.distributed.planner import Placement, Planner
from vitrail.runtime.distributed.simulator import Arrival, Deployment, Group, arrivals, reduced, simulated_capacity
from vitrail.runtime.distributed.workload import Kind, Workload, workload_of
from vitrail.runtime.engine.block_manager import BlockManager
from vitrail.runtime.engine.engine import Engine
from vitrail.runtime.engine.scheduler import Scheduler
from vitrail.runtime.engine.sequence import Request
from vitrail.runtime.kernel_pack import GEOMETRIES
from vitrail.runtime.quantization.config import QuantizationConfig

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


# --- the engine and the simulator on the same requests ---


def serve(engine: Engine, coming: Sequence[Arrival], between: Callable[[float], None] = lambda ms: None) -> None:
    """Let the engine answer the requests, in real time, and note when their tokens came in place of simulated ones.

    between: called whenever nothing runs, and at the end, with the milliseconds of work since the last time. The clock
    stands still for it: who comes next comes that much later.
    """
    bench = Bench(engine)
    prompts = [bench.prepare(len(one.prompt_token_ids), sum(image.num_tiles for image in one.images)) for one in coming]
    waiting = deque(zip(prompts, coming, strict=True))
    running: list[tuple[Request, Arrival]] = []
    start, worked = time.perf_counter(), 0.0

    def now() -> float:
        return (time.perf_counter() - start) * 1e3

    while waiting or running:
        if not running and waiting[0][1].came > now():
            stopped = time.perf_counter()
            between(worked)
            start, worked = start + time.perf_counter() - stopped, 0.0
            time.sleep(max(0.0, waiting[0][1].came - now()) / 1e3)
        while waiting and waiting[0][1].came <= now():
            prepared, one = waiting.popleft()
            running.append((bench.submit(prepared, one.answer), one))
        worked += bench.step_ms()
        at = now()
        for request, one in running:
            if request.error is not None:
                raise request.error
            one.times += [at] * (len(request.sequences[0].token_ids) - len(one.times))
        running = [(request, one) for request, one in running if request.finished is None]
    between(worked)


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
LOADS = {"backlog": None, "Poisson, 40 %": 0.4, "Poisson, 70 %": 0.7}  # shares of the backlog's throughput, before
LEAD_MS = 1000.0  # of steps timed before each load: there are no pauses in a backlog


@dataclass(frozen=True)
class Served:
    """A load that the engine served. rate: requests a second, None if all came at once; period: of the calibration."""

    rate: float | None
    requests: list[Arrival]
    period: int


def served_rounds(
    engine: Engine, calibration: Calibration, workload: Workload, number: int, rounds: int
) -> dict[str, list[Served]]:
    """Every load by the engine, once a round and each time other requests.

    The machine's speed changes from second to second, and what is to be simulated is the machine that a load had. So
    other steps are timed before it, in its pauses and after it, for as long as its own took, in a period of their own.
    """
    served: dict[str, list[Served]] = {name: [] for name in LOADS}
    calibration.round()
    for seed in tqdm(range(rounds), desc="rounds", disable=None):
        for name, share in LOADS.items():
            rate = None if share is None else share * summary(served["backlog"][-1].requests)["requests_per_s"]
            requests, period = arrivals(workload, number, rate=rate, seed=seed), calibration.begin()
            calibration.go_on(LEAD_MS)
            serve(engine, requests, calibration.go_on)
            served[name].append(Served(rate, requests, period))
    return served


def compare_rows(
    engine: Engine,
    costs_of: Callable[[int], Measured],
    workload: Workload,
    served: Mapping[str, Sequence[Served]],
) -> Iterator[dict[str, Any]]:
    """What the engine did with each load, and what the simulator does with the same requests: medians of the rounds.

    costs_of: the costs in a period. error: of the simulator in a round, the median too, so that a minute in which the
    machine was busy does not count.
    """
    for name, rounds in served.items():
        found: list[tuple[dict[str, float], dict[str, float]]] = []
        for seed, one in enumerate(rounds):
            simulated = arrivals(workload, len(one.requests), rate=one.rate, seed=seed)
            simulate(engine, costs_of(one.period), simulated)
            found.append((summary(one.requests), summary(simulated)))
        row: dict[str, Any] = {"load": name, "rounds": len(rounds), "requests": len(rounds[0].requests)}
        for key in found[0][0]:
            row[key] = median(ours[key] for ours, _ in found)
            row[f"simulated_{key}"] = median(theirs[key] for _, theirs in found)
            row[f"{key}_error"] = median(theirs[key] / ours[key] - 1 for ours, theirs in found)
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
        "each prompt of a pass, more; wake: what a step with so many tiles takes more after a wait."
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
        command.add_argument("--rounds", type=int, default=6 if name == "compare" else 7)
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
        rows = []
        for row in compare_rows(engine, lambda period: measured_of(calibration.table(period)), workload, served):
            rows.append({"model": arguments.model, **row})
            found = ", ".join(
                f"{key} {row[key]:.2f} simulated {row[f'simulated_{key}']:.2f} ({row[f'{key}_error']:+.1%})"
                for key in (*JUDGED, "ttft_p90_ms", "itl_p99_ms")
            )
            print(f"{row['load']:14} {found}", flush=True)
        notes = (
            "The same requests by the engine and by the simulator, whose costs are of steps timed in the pauses of the "
            "loads; medians of the rounds."
        )
        path = write_results(results_path("simulator", arguments.out), rows, title="The simulator's error", notes=notes)
        print(f"written to {path}")
    return 0 if all(row["within_tolerance"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
