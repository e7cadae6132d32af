"""The vision half beside the language half against one after the other, under load: of one process, or of one GPU.

    python bench/split.py [--model nano] [--dtype float32] [--requests 48] [--rounds 4] [--out DIR]
    python bench/split.py --device cuda [--model v1.5] [--dtype bfloat16] [--requests 24] [--rounds 2] [--out DIR]

On a CPU: one process with two threads, one process with one, and two processes with one thread each answer the same
requests: texts, and pictures of one tile or of three. Wants a quiet machine with two cores. On a GPU: one engine that
encodes on a stream of its own, while decode graphs run, or on theirs, answers questions about documents of 12 tiles and
a thumbnail; the weights of `v1.5` are random, since time does not depend on their values.

All pictures are new. Every round serves the requests by each in turn, every second round backwards. *closed, 16*:
sixteen clients, each sending its next request when the last one is answered. *Poisson*: requests come at random, at
70 % of what the slowest managed in the closed loop. TTFT: from a request's arrival to its first token. ITL: between
tokens of one answer.
"""

import argparse
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from tqdm import tqdm

from vitrail.bench.harness import require_gpu, results_path, write_results
from vitrail.bench.latency import load
from vitrail.runtime.api import Runtime
from vitrail.runtime.distributed.vision_pool import VisionPool
from vitrail.runtime.engine.engine import Engine
from vitrail.runtime.engine.processor import Conversation, Picture, Prepared
from vitrail.runtime.engine.runner import Runner
from vitrail.runtime.engine.sequence import Request
from vitrail.runtime.engine.vision_stage import VisionWorkers
from vitrail.runtime.prompt import place_images
from vitrail.runtime.request import GenerationConfig
from vitrail.runtime.weights import resolve_checkpoint

QUESTION = "What is the total?"
# Tiles of a request, the thumbnail among them, and how often they come.
MIXED = {0: 0.3, 1: 0.4, 3: 0.3}
DOCUMENTS = {13: 1.0}
CLIENTS = 16
POISSON_LOAD = 0.7


@dataclass
class Answer:
    """When a request arrived and when each of its tokens came, in seconds."""

    arrived: float
    tokens: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Contender:
    """A way to run the model: an engine, and what is to be set in this process while it is measured."""

    name: str
    engine: Engine
    prepare: Callable[[], object]


def process_contenders(runtime: Runtime, workers: VisionWorkers) -> list[Contender]:
    """The engine of a Runtime with two threads and with one, and one that has its vision half on `workers`."""
    whole = _engine(runtime)
    runner = Runner(
        runtime.model, max_num_seqs=whole.max_num_seqs, max_model_len=whole.max_model_len, enforce_eager=True
    )
    split = Engine(
        runner,
        whole.tokenizer,
        whole.processor,
        context_token_id=whole.context_token_id,
        stop_token_ids=whole.stop_token_ids,
        vision=workers,
    )
    return [
        Contender("one process, 2 threads", whole, partial(torch.set_num_threads, 2)),
        Contender("one process, 1 thread", whole, partial(torch.set_num_threads, 1)),
        Contender("two processes, 1 thread each", split, partial(torch.set_num_threads, 1)),
    ]


def stream_contenders(runtime: Runtime) -> list[Contender]:
    """The engine of a Runtime on a GPU, its vision half on a stream of its own and on that of the language half."""
    engine = _engine(runtime)
    runner = engine.runner
    one = torch.cuda.default_stream(runner.device)
    return [
        Contender("two streams", engine, partial(setattr, runner, "vision_stream", runner.vision_stream)),
        Contender("one stream", engine, partial(setattr, runner, "vision_stream", one)),
    ]


def _engine(runtime: Runtime) -> Engine:
    assert isinstance(runtime.engine, Engine)
    return runtime.engine


def requests(runtime: Runtime, mix: Mapping[int, float], number: int, seed: int) -> list[Prepared]:
    """Texts and pictures of noise, each seed's its own, in a random order that is the same for all seeds."""
    side = runtime.model.config.tile_size
    draw, noise = random.Random(0), np.random.default_rng(seed)
    found = []
    for tiles in draw.choices(list(mix), list(mix.values()), k=number):
        question = place_images(QUESTION, num_images=min(tiles, 1), has_history=False)
        pictures = []
        if tiles:
            columns = max(tiles - 1, 1)
            pixels = noise.integers(0, 256, (side, columns * side, 3), dtype=np.uint8)
            pictures.append(Picture(pixels, columns))
        found.append(runtime.processor.prepare(Conversation([(question, None)], pictures), decode=False))
    return found


def answer_all(
    engine: Engine,
    prompts: Sequence[Prepared],
    new_tokens: int,
    *,
    clients: int | None = None,
    rate: float | None = None,
) -> list[Answer]:
    """All requests to their ends, driven by the engine's own thread as a server has it.

    clients: so many at a time, one begins where another ends. rate: they arrive at random, so many a second.
    """
    config = GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True)
    free = threading.Semaphore(clients or len(prompts))
    gaps = random.Random(1)
    answers: list[Answer] = []
    running: list[Request] = []
    due = time.perf_counter()
    for prompt in prompts:
        free.acquire()
        if rate is not None:
            due += gaps.expovariate(rate)
            time.sleep(max(0.0, due - time.perf_counter()))
        answers.append(Answer(time.perf_counter() if rate is None else due))
        running.append(engine.submit(uuid4().hex, prompt, config))
        engine.run_in_background(running[-1], partial(_note, running[-1], answers[-1], free))
    for request, answer in zip(running, answers, strict=True):
        answer.ended.wait()
        if request.error is not None:
            raise request.error
    return answers


def _note(request: Request, answer: Answer, free: threading.Semaphore) -> None:
    """There is news of a request."""
    now = time.perf_counter()
    while request.deltas:
        answer.tokens += [now] * len(request.deltas.popleft().token_ids)
    if request.finished is not None and not answer.ended.is_set():
        answer.ended.set()
        free.release()


def row_of(system: str, load: str, rounds: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """What all rounds of a load amounted to."""
    seconds = sum(max(one.tokens[-1] for one in answers) - min(one.arrived for one in answers) for answers in rounds)
    answers = [one for round_ in rounds for one in round_]
    first = [(one.tokens[0] - one.arrived) * 1e3 for one in answers]
    between = [(b - a) * 1e3 for one in answers for a, b in pairwise(one.tokens)]
    return {
        "system": system,
        "load": load,
        "requests": len(answers),
        "requests_per_s": len(answers) / seconds,
        "output_tokens_per_s": sum(len(one.tokens) for one in answers) / seconds,
        "ttft_p50_ms": float(np.percentile(first, 50)),
        "ttft_p99_ms": float(np.percentile(first, 99)),
        "itl_p50_ms": float(np.percentile(between, 50)),
        "itl_p99_ms": float(np.percentile(between, 99)),
    }


def measure(
    runtime: Runtime,
    systems: Sequence[Contender],
    mix: Mapping[int, float],
    *,
    number: int,
    rounds: int,
    new_tokens: int,
) -> Iterator[dict[str, Any]]:
    """The rows: a closed loop of each system, then each under the same arrivals."""
    seeds = iter(range(10**6))

    def serve(one: Contender, number: int, **how: Any) -> list[Answer]:
        one.prepare()
        return answer_all(one.engine, requests(runtime, mix, number, next(seeds)), new_tokens, **how)

    def rows(name: str, **how: Any) -> list[dict[str, Any]]:
        answers: dict[str, list[list[Answer]]] = {one.name: [] for one in systems}
        for turn in tqdm(range(rounds), desc=name, unit="round", disable=None):
            for one in systems if turn % 2 == 0 else reversed(systems):
                answers[one.name].append(serve(one, number, **how))
        return [row_of(system, name, found) for system, found in answers.items()]

    for one in systems:  # warms up, and grows the cache
        serve(one, min(number, CLIENTS), clients=CLIENTS)
    closed = rows(f"closed, {CLIENTS}", clients=CLIENTS)
    yield from closed
    rate = POISSON_LOAD * min(row["requests_per_s"] for row in closed)
    yield from rows(f"Poisson, {rate:.2f}/s", rate=rate)


def measure_processes(model: str, dtype_name: str, **sizes: int) -> Iterator[dict[str, Any]]:
    """The rows of a CPU."""
    with Runtime.from_pretrained(model, dtype=dtype_name, device="cpu") as runtime:
        dtype = next(runtime.model.parameters()).dtype
        pool = VisionPool(resolve_checkpoint(model), runtime.model.config, ["cpu"], dtype=dtype, threads=1)
        try:
            systems = process_contenders(runtime, pool)
            yield from measure(runtime, systems, MIXED, **sizes)
            systems[-1].engine.close()
        finally:
            pool.close()


def measure_streams(model: str, dtype_name: str, **sizes: int) -> Iterator[dict[str, Any]]:
    """The rows of a GPU."""
    with load(model, dtype_name, "cuda", max_num_seqs=2 * CLIENTS, max_model_len=8192) as runtime:
        yield from measure(runtime, stream_contenders(runtime), DOCUMENTS, **sizes)


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="nano, a local folder or a hub id; on a GPU a case of bench/latency.py")
    parser.add_argument("--dtype")
    parser.add_argument("--requests", type=int, help="of one round")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    if on_gpu:
        require_gpu()
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    model = arguments.model or ("v1.5" if on_gpu else "nano")
    dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    new_tokens = 128 if on_gpu else 32
    rows = []
    for row in (measure_streams if on_gpu else measure_processes)(
        *(model, dtype),
        number=arguments.requests or (24 if on_gpu else 48),
        rounds=arguments.rounds or (2 if on_gpu else 4),
        new_tokens=new_tokens,
    ):
        rows.append({"model": model, "dtype": dtype, "new_tokens": new_tokens, **row})
        rates = f"{row['requests_per_s']:6.2f} req/s {row['output_tokens_per_s']:7.1f} tok/s"
        first = f"TTFT {row['ttft_p50_ms']:7.1f} / {row['ttft_p99_ms']:7.1f} ms"
        between = f"ITL {row['itl_p50_ms']:6.1f} / {row['itl_p99_ms']:6.1f} ms"
        print(f"{row['system']:28} {row['load']:16} {rates}  {first}  {between}", flush=True)
    kinds = "documents of 13 tiles" if on_gpu else "30 % texts, 40 % pictures of one tile, 30 % of three"
    path = write_results(
        results_path("split", arguments.out),
        rows,
        title="The vision half on a stream of its own, against one stream"
        if on_gpu
        else "The vision half in a process of its own, against one process",
        notes=f"TTFT and ITL: median and 99th percentile; {kinds}.",
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
