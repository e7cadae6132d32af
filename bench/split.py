"""The vision half in a process of its own against both halves in one, side by side under a mixed load.

    python bench/split.py [--model nano] [--dtype float32] [--requests 48] [--rounds 4] [--out DIR]

One process with two threads, one process with one, and two processes with one thread each answer the same requests:
texts, and pictures of one tile or of three, all new. Every round serves them by each in turn, every second round
backwards. *closed, 16*: sixteen clients, each sending its next request when the last one is answered. *Poisson*:
requests come at random, at 70 % of what the slowest of the three managed in the closed loop. Wants a quiet machine with
two cores.

TTFT: from a request's arrival to its first token. ITL: between tokens of one answer.
"""

import argparse
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from tqdm import tqdm

from vitrail.bench.harness import results_path, write_results
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
TILES = {0: 0.3, 1: 0.4, 3: 0.3}
CLIENTS = 16
NEW_TOKENS = 32
POISSON_LOAD = 0.7


@dataclass
class Answer:
    """When a request arrived and when each of its tokens came, in seconds."""

    arrived: float
    tokens: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Contender:
    """A way to run the model: an engine, and the threads of this process while it is measured."""

    name: str
    engine: Engine
    threads: int


def contenders(runtime: Runtime, workers: VisionWorkers) -> list[Contender]:
    """The engine of a Runtime with two threads and with one, and one that has its vision half on `workers`."""
    whole = runtime.engine
    assert isinstance(whole, Engine)
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
        Contender("one process, 2 threads", whole, 2),
        Contender("one process, 1 thread", whole, 1),
        Contender("two processes, 1 thread each", split, 1),
    ]


def requests(runtime: Runtime, number: int, seed: int) -> list[Prepared]:
    """Texts and pictures of noise, each seed's its own, in a random order that is the same for all seeds."""
    side = runtime.model.config.tile_size
    draw, noise = random.Random(0), np.random.default_rng(seed)
    found = []
    for tiles in draw.choices(list(TILES), list(TILES.values()), k=number):
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
    runtime: Runtime, systems: Sequence[Contender], *, number: int, rounds: int, new_tokens: int = NEW_TOKENS
) -> Iterator[dict[str, Any]]:
    """The rows: a closed loop of each system, then each under the same arrivals."""
    seeds = iter(range(10**6))
    threads = torch.get_num_threads()

    def rows(load: str, **how: Any) -> list[dict[str, Any]]:
        answers: dict[str, list[list[Answer]]] = {one.name: [] for one in systems}
        for turn in tqdm(range(rounds), desc=load, unit="round", disable=None):
            for one in systems if turn % 2 == 0 else reversed(systems):
                torch.set_num_threads(one.threads)
                answers[one.name].append(
                    answer_all(one.engine, requests(runtime, number, next(seeds)), new_tokens, **how)
                )
        return [row_of(name, load, found) for name, found in answers.items()]

    try:
        for one in systems:  # warms up, and grows the cache
            answer_all(one.engine, requests(runtime, min(number, CLIENTS), next(seeds)), new_tokens, clients=CLIENTS)
        closed = rows(f"closed, {CLIENTS}", clients=CLIENTS)
        yield from closed
        rate = POISSON_LOAD * min(row["requests_per_s"] for row in closed)
        yield from rows(f"Poisson, {rate:.2f}/s", rate=rate)
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="a local folder, a hub id or nano")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=48, help="of one round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", help="folder of the JSON; bench/results/cpu by default")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with Runtime.from_pretrained(arguments.model, dtype=arguments.dtype, device="cpu") as runtime:
        dtype = next(runtime.model.parameters()).dtype
        pool = VisionPool(resolve_checkpoint(arguments.model), runtime.model.config, ["cpu"], dtype=dtype, threads=1)
        try:
            systems = contenders(runtime, pool)
            rows = []
            for row in measure(runtime, systems, number=arguments.requests, rounds=arguments.rounds):
                rows.append({"model": arguments.model, "dtype": arguments.dtype, "new_tokens": NEW_TOKENS, **row})
                rates = f"{row['requests_per_s']:6.2f} req/s {row['output_tokens_per_s']:7.1f} tok/s"
                first = f"TTFT {row['ttft_p50_ms']:7.1f} / {row['ttft_p99_ms']:7.1f} ms"
                between = f"ITL {row['itl_p50_ms']:6.1f} / {row['itl_p99_ms']:6.1f} ms"
                print(f"{row['system']:28} {row['load']:16} {rates}  {first}  {between}", flush=True)
            systems[-1].engine.close()
        finally:
            pool.close()
    path = write_results(
        results_path("split", arguments.out),
        rows,
        title="The vision half in a process of its own, against one process",
        notes="TTFT and ITL: median and 99th percentile; 30 % texts, 40 % pictures of one tile, 30 % of three.",
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
