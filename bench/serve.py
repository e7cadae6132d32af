"""Requests to a running server, ours or any that speaks OpenAI's protocol; what ours costs beside the engine alone.

    python bench/serve.py [--clients 1 16] [--requests N] [--new-tokens 16 48] [--threads N] [--out DIR]
    python bench/serve.py --url http://127.0.0.1:23333 --name lmdeploy --workload requests.jsonl [--rate 4]

Without `--url` it starts `vitrail serve nano` and measures every load in turn through HTTP and *in process*, where one
thread takes the engine's steps for the same requests, base64 and PNG included. `overhead percent` is what the server
loses of the engine's output tokens per second. Its clients are a process of their own, this one, on the same machine,
and what they take of it (`bench cpu percent`, of one core) counts as the server's; the model gets `--threads` (half of
the cores by default) in both. With answers of two lengths the loss is parted into what a request and a token costs.

A workload is a file of JSON lines, each the body of a chat request without `model` and `stream`; `--write-workload`
makes one: pictures of noise, each its own, and answers of `--new-tokens` on the average, from half to one and a half of
it. *closed, N*: N clients, each sending its next request when the last one is answered. *Poisson*: requests come at
random, `--rate` a second, by default at 70 % of what the last closed loop managed.

TTFT: from sending a request to its first text. ITL: between texts of one answer; the server joins those that come
within 20 ms.
"""

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from uuid import uuid4

import numpy as np
import torch
from PIL import Image

from vitrail.bench.harness import results_path, write_results
from vitrail.bench.load import POISSON_LOAD, arrivals, drive
from vitrail.runtime.api import Runtime
from vitrail.runtime.engine.sequence import Request
from vitrail.runtime.messages import conversation_of
from vitrail.runtime.request import GenerationConfig

QUESTION = "What is the total?"
_TEXT, _USAGE = re.compile(rb'"content": ?"(?!")'), re.compile(rb'"usage": ?\{')
_START = "from vitrail.runtime.cli import main; main()"

Workload = Sequence[Mapping[str, Any]]


@dataclass
class Answer:
    """When a request was sent, when each piece of its text came, in seconds, and how many tokens there were."""

    sent: float
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None


# Requests


def make_request(seed: int, new_tokens: int, size: tuple[int, int], images: int = 1) -> dict[str, Any]:
    """A question about noise that no other seed sees."""
    generator = np.random.default_rng(seed)
    parts: list[dict[str, Any]] = []
    for _ in range(images):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG", compress_level=1)
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    content = [*parts, {"type": "text", "text": f"{QUESTION} ({seed})"}]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


def make_workload(
    seeds: Iterable[int], count: int, new_tokens: int, size: tuple[int, int], *, draw: int = 0
) -> list[dict[str, Any]]:
    """Requests for `new_tokens` on the average, by `draw` from half as many to half as many more.

    Answers of one length would all end in one step, and the requests after them begin in one, if nothing came between:
    no load of users does, and the engine alone would profit.
    """
    generator = random.Random(draw)
    lengths = [generator.randint(new_tokens - new_tokens // 2, new_tokens + new_tokens // 2) for _ in range(count)]
    return [make_request(seed, length, size) for seed, length in zip(seeds, lengths, strict=False)]


def read_workload(path: Path) -> list[dict[str, Any]]:
    """The requests of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


# A client, with as little between it and the socket as will do: it shares the machine with the server


@dataclass(frozen=True)
class Server:
    """Where requests go."""

    url: str
    model: str
    api_key: str | None = None

    def head(self, path: str, length: int) -> bytes:
        parts = urlsplit(self.url)
        lines = [f"POST {parts.path.rstrip('/')}{path} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {length}"]
        lines += ["Content-Type: application/json", "Accept: text/event-stream", "Connection: close"]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


async def send(server: Server, request: Mapping[str, Any], answer: Answer, *, leave_after: float | None = None) -> None:
    """Stream one answer to its end, or leave in the middle. What goes wrong becomes the answer's error."""
    body = {**request, "model": server.model, "stream": True, "stream_options": {"include_usage": True}}
    payload = json.dumps(body).encode()
    parts = urlsplit(server.url)
    secure = parts.scheme == "https"
    try:
        reader, writer = await asyncio.open_connection(
            parts.hostname, parts.port or (443 if secure else 80), ssl=secure or None, limit=2**20
        )
    except OSError as error:
        answer.error = type(error).__name__
        return
    try:
        writer.write(server.head("/v1/chat/completions", len(payload)) + payload)
        async with asyncio.timeout(leave_after):
            await _read_answer(reader, answer)
    except TimeoutError:
        answer.error = "left"
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        answer.error = type(error).__name__
    finally:
        writer.close()


async def _read_answer(reader: asyncio.StreamReader, answer: Answer) -> None:
    status = int((await reader.readline()).split()[1])
    chunked = False
    while line := (await reader.readline()).strip().lower():
        chunked |= line.startswith(b"transfer-encoding:") and b"chunked" in line
    if status != 200:
        answer.error = str(status)
        return
    rest = b""
    async for data in _chunks(reader) if chunked else _pieces(reader):
        now = time.perf_counter()
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            # The texts of thousands of events a second are not worth parsing; where usage is told is.
            if _TEXT.search(event):
                answer.pieces.append(now)
            if _USAGE.search(event):
                answer.tokens = json.loads(event.partition(b"data:")[2])["usage"]["completion_tokens"]
            if event.lstrip().startswith(b'data: {"error"'):
                answer.error = "error"
    if answer.error is None and not answer.tokens:
        answer.error = "cut off"


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The body of a chunked answer."""
    while size := int((await reader.readline()).partition(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(2**16):
        yield data


async def answer_by_http(
    server: Server, workload: Workload, *, clients: int | None = None, rate: float | None = None
) -> list[Answer]:
    """All requests. clients: so many at a time. rate: they arrive at random, so many a second."""
    answers: list[Answer] = []
    if clients is not None:
        coming = deque(workload)

        async def client() -> None:
            while coming:
                request = coming.popleft()
                answers.append(Answer(time.perf_counter()))
                await send(server, request, answers[-1])

        await asyncio.gather(*(client() for _ in range(clients)))
        return answers
    start = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for request, arrival in zip(workload, arrivals(len(workload), rate), strict=True):
            await asyncio.sleep(max(0.0, start + arrival - time.perf_counter()))
            answers.append(Answer(start + arrival))
            tasks.create_task(send(server, request, answers[-1]))
    return answers


# The same without a server


def answer_in_process(runtime: Runtime, workload: Workload, **load: Any) -> list[Answer]:
    """All requests, as `drive` has them answered."""

    def submit(request: Mapping[str, Any]) -> Request:
        conversation = conversation_of(request["messages"], limits=runtime.limits, urls_only=True)
        prepared = runtime.processor.prepare(conversation, decode=False)
        config = GenerationConfig(max_new_tokens=request["max_tokens"], ignore_eos=request.get("ignore_eos"))
        return runtime.engine.submit(uuid4().hex, prepared, config)

    streams = drive(runtime.engine, [partial(submit, request) for request in workload], **load)
    return [
        Answer(
            one.arrived,
            [now for now, delta in one.deltas if delta.text],
            sum(len(delta.token_ids) for _, delta in one.deltas),
        )
        for one in streams
    ]


# What it amounts to


def row_of(system: str, load: str, answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """What a load amounted to; requests that failed count in `failed` alone."""
    good = [answer for answer in answers if answer.error is None]
    first = [(answer.pieces[0] - answer.sent) * 1e3 for answer in good if answer.pieces]
    between = [gap * 1e3 for answer in good for gap in np.diff(answer.pieces)]
    return {
        "system": system,
        "load": load,
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "requests_per_s": len(good) / seconds,
        "output_tokens_per_s": sum(answer.tokens for answer in good) / seconds,
        **{f"ttft_p{rank}_ms": _percentile(first, rank) for rank in (50, 99)},
        **{f"itl_p{rank}_ms": _percentile(between, rank) for rank in (50, 99)},
    }


def _percentile(values: Sequence[float], rank: int) -> float | None:
    return float(np.percentile(values, rank)) if values else None


def parted(losses: Mapping[int, float]) -> tuple[float, float]:
    """(seconds a request, seconds a token) of {tokens of an answer: seconds lost a request}, for two lengths."""
    (short, lost_short), (long, lost_long) = sorted(losses.items())
    per_token = (lost_long - lost_short) / (long - short)
    return lost_short - per_token * short, per_token


class Run(NamedTuple):
    """The answers of a load, the seconds they took, and those of a core that this process worked meanwhile."""

    answers: list[Answer]
    seconds: float
    own_cpu_s: float

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.tokens for answer in self.answers if answer.error is None) / self.seconds


def by_http(server: Server, workload: Workload, **load: Any) -> Run:
    """A load through HTTP."""
    start, worked = time.perf_counter(), time.process_time()
    answers = asyncio.run(answer_by_http(server, workload, **load))
    return Run(answers, time.perf_counter() - start, time.process_time() - worked)


def in_process(runtime: Runtime, workload: Workload, **load: Any) -> Run:
    """The same without a server."""
    start, worked = time.perf_counter(), time.process_time()
    answers = answer_in_process(runtime, workload, **load)
    return Run(answers, time.perf_counter() - start, time.process_time() - worked)


def measure_overhead(
    server: Server, runtime: Runtime, arguments: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], dict[int, float]]]:
    """Rows of both systems for every load, with what a request lost by the number of its tokens.

    A row is the median turn of its system. What the server costs is compared within a turn, one load after the other,
    of which the median counts: a machine that slows down slows both.
    """
    seeds = itertools.count()
    sides = partial(in_process, runtime), partial(by_http, server)
    rate = 0.0

    def take_turns(load: dict[str, Any], count: int, new_tokens: int) -> tuple[list[Run], list[Run]]:
        runs: tuple[list[Run], list[Run]] = [], []
        for turn in range(arguments.turns):
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                workload = make_workload(seeds, count, new_tokens, arguments.size, draw=turn)
                runs[side].append(sides[side](workload, **load))
        return runs

    def rows_of(name: str, runs: tuple[list[Run], list[Run]], new_tokens: int) -> list[dict[str, Any]]:
        typical = [sorted(side, key=lambda run: run.tokens_per_s)[len(side) // 2] for side in runs]
        return [
            {
                "new_tokens": new_tokens,
                **row_of(system, name, run.answers, run.seconds),
                "bench_cpu_percent": 100 * run.own_cpu_s / run.seconds,
            }
            for system, run in zip(("in process", "vitrail serve"), typical, strict=True)
        ]

    for clients in arguments.clients:
        losses: dict[int, float] = {}
        for new_tokens in arguments.new_tokens:
            count = arguments.requests or max(4, 4 * clients)
            runs = take_turns({"clients": clients}, count, new_tokens)
            pairs = list(zip(*runs, strict=True))
            losses[new_tokens] = median((own.seconds - engine.seconds) / count for engine, own in pairs)
            overhead = median(100 * (1 - own.tokens_per_s / engine.tokens_per_s) for engine, own in pairs)
            alone, served = rows_of(f"closed, {clients}", runs, new_tokens)
            rate = served["requests_per_s"]
            yield alone, {}
            yield {**served, "overhead_percent": overhead}, losses
    load = {"rate": arguments.rate or POISSON_LOAD * rate}
    runs = take_turns(load, arguments.requests or 4 * max(arguments.clients), arguments.new_tokens[-1])
    for row in rows_of(f"Poisson, {load['rate']:.2f}/s", runs, arguments.new_tokens[-1]):
        yield row, {}


# Servers


@contextmanager
def own_server(threads: int, *options: str) -> Iterator[tuple[Server, int]]:
    """`vitrail serve nano` on a free port, once it is ready, and the id of its process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-c", _START, "serve", "nano", "--dtype", "float32", "--device", "cpu"]
    # The path of this script's own folder, or of the repository, is no place to import from.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        [*command, "--port", str(port), "--log-level", "warning", *options], env=environment, stdout=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with status {process.returncode}")
            try:
                with urllib.request.urlopen(f"{url}/ready", timeout=5):
                    break
            except OSError:
                time.sleep(0.1)
        yield Server(url, "nano"), process.pid
    finally:
        process.terminate()
        process.wait(60)


def model_of(url: str, api_key: str | None) -> str:
    """The first model that a server names."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/models", headers=headers), timeout=30) as response:
        return str(json.load(response)["data"][0]["id"])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs already; by default one is started")
    parser.add_argument("--name", default="peer", help="what to call the server of --url")
    parser.add_argument("--model", help="the model to ask --url for; the first it names by default")
    parser.add_argument("--api-key", help="of --url")
    parser.add_argument("--workload", type=Path, help="requests as JSON lines, for --url")
    parser.add_argument("--write-workload", type=Path, help="write such a file and end")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--requests", type=int, help="of one load; four a client by default")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[16, 48], help="of one answer")
    parser.add_argument("--rate", type=float, help="requests a second of the open loop")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 224), help="width and height of the pictures")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="for the model")
    parser.add_argument("--turns", type=int, default=5, help="how often either system is measured")
    parser.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    return parser.parse_args()


def _show(row: Mapping[str, Any]) -> None:
    def number(key: str) -> str:
        return "-" if row.get(key) is None else f"{row[key]:.1f}"

    latencies = "  ".join(f"{key} {number(f'{key}_p50_ms')} / {number(f'{key}_p99_ms')} ms" for key in ("ttft", "itl"))
    overhead = f"  overhead {row['overhead_percent']:.1f} %" if "overhead_percent" in row else ""
    rate = f"{row['requests_per_s']:8.2f} req/s {row['output_tokens_per_s']:9.1f} tok/s  {row['failed']} failed"
    print(f"{row['system']:14} {row['load']:16} {row['new_tokens']:4} tokens {rate}  {latencies}{overhead}", flush=True)


def main() -> None:
    """Measure, print, and write the rows."""
    arguments = _parse()
    if arguments.write_workload is not None:
        count = arguments.requests or 64
        workload = make_workload(itertools.count(), count, arguments.new_tokens[-1], arguments.size)
        lines = [json.dumps(request) for request in workload]
        arguments.write_workload.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"written to {arguments.write_workload}")
        return
    path = _measure_own(arguments) if arguments.url is None else _measure_url(arguments)
    print(f"written to {path}")


def _measure_url(arguments: argparse.Namespace) -> Path:
    url = arguments.url.rstrip("/").removesuffix("/v1")
    server = Server(url, arguments.model or model_of(url, arguments.api_key), arguments.api_key)
    given = None if arguments.workload is None else read_workload(arguments.workload)
    rows: list[dict[str, Any]] = []
    loads: list[tuple[str, dict[str, Any]]] = [(f"closed, {count}", {"clients": count}) for count in arguments.clients]
    loads.append(("Poisson", {"rate": arguments.rate}))
    for place, (name, load) in enumerate(loads):
        if "rate" in load:
            load["rate"] = load["rate"] or POISSON_LOAD * rows[-1]["requests_per_s"]
            name = f"Poisson, {load['rate']:.2f}/s"
        count = arguments.requests or 4 * max(arguments.clients)
        first = place * count  # pictures that no load before has seen
        workload = given or make_workload(itertools.count(first), count, arguments.new_tokens[-1], arguments.size)
        new_tokens = max(request.get("max_tokens", 0) for request in workload)
        run = by_http(server, workload, **load)
        rows.append({"new_tokens": new_tokens, **row_of(arguments.name, name, run.answers, run.seconds)})
        _show(rows[-1])
    title = f"Requests to {arguments.name} ({server.model}) over HTTP"
    return write_results(results_path(f"serve-{arguments.name}", arguments.out), rows, title=title)


def _measure_own(arguments: argparse.Namespace) -> Path:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    notes = "TTFT and ITL: median and 99th percentile."
    with (
        Runtime.from_pretrained("nano", dtype="float32", device="cpu") as runtime,
        own_server(arguments.threads) as (server, _),
    ):
        warm = [make_request(10**9 + seed, 8, arguments.size) for seed in range(2 * max(arguments.clients))]
        answer_in_process(runtime, warm, clients=max(arguments.clients))
        by_http(server, warm, clients=max(arguments.clients))
        for row, losses in measure_overhead(server, runtime, arguments):
            rows.append({"model": "nano", **row})
            _show(row)
            if len(losses) == 2:
                request, token = parted(losses)
                told = f" {row['load']}: {request * 1e3:.2f} ms a request and {token * 1e6:.0f} us a token over HTTP."
                notes += told
                print(told.strip())
    title = "`vitrail serve` against its engine in process, pictures all new"
    return write_results(results_path("serve", arguments.out), rows, title=title, notes=notes)


if __name__ == "__main__":
    main()
