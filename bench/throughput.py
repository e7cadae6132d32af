"""Throughput and latency under load: continuous batching against one request at a time, and against transformers.

    python bench/throughput.py [--device cpu] [--models nano 1b] [--out DIR]

Each request brings a picture of its own, so that no cache helps, and asks for a fixed number of tokens. *closed, N*: N
clients, each sending its next request when the last one is answered. *Poisson*: requests come at random, at 70 % of
what the closed loop of the same tiles managed with most clients. *one by one*: the same runtime, one client.
*transformers*: the port's `generate` on the same requests, N of one size in a batch, weights shared, SDPA attention: it
waits for nobody and lets nobody in. *again*: pictures that were asked about before, against *new pictures*.

TTFT: from a request's arrival to its first token. ITL: between tokens of one answer; where a step brings several
answers forward each of them counts.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vitrail.bench.harness import require_gpu, results_path, write_results
from vitrail.bench.latency import load
from vitrail.bench.load import POISSON_LOAD, drive
from vitrail.bench.peer import pixel_values, transformers_model
from vitrail.runtime.api import Runtime
from vitrail.runtime.engine.processor import Conversation, Picture
from vitrail.runtime.engine.sequence import Request
from vitrail.runtime.prompt import place_images
from vitrail.runtime.request import GenerationConfig

QUESTION = "What is the total?"
# Columns and rows of the picture whose tiles, with the thumbnail, are so many.
GRIDS = {1: (1, 1), 4: (3, 1), 13: (4, 3)}


@dataclass(frozen=True)
class Case:
    """A model and the loads that keep its measurement within minutes."""

    dtype: str
    tiles: tuple[int, ...]
    clients: tuple[int, ...]
    new_tokens: int
    requests_per_client: int
    max_model_len: int | None = None


CASES = {
    "nano": Case("float32", (1, 4, 13), (1, 8, 16, 32), new_tokens=48, requests_per_client=2),
    "1b": Case("bfloat16", (1,), (1, 8), new_tokens=24, requests_per_client=1),
    "v1.5": Case("bfloat16", (1, 4, 13), (1, 8, 32), new_tokens=128, requests_per_client=2, max_model_len=8192),
}


@dataclass
class Answer:
    """When a request arrived and when each of its tokens came, in seconds."""

    arrived: float
    tokens: list[float] = field(default_factory=list)


def picture(config: Any, tiles: int, seed: int) -> Image.Image:
    """Noise that is cut into so many tiles, each seed's its own."""
    columns, rows = GRIDS[tiles]
    side = config.tile_size
    pixels = np.random.default_rng(seed).integers(0, 256, (rows * side, columns * side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def answer_all(
    runtime: Runtime,
    images: Sequence[Image.Image],
    tiles: int,
    new_tokens: int,
    *,
    clients: int | None = None,
    rate: float | None = None,
) -> list[Answer]:
    """A question about each image, as `drive` has them answered."""
    config = GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True)
    question = place_images(QUESTION, num_images=1, has_history=False)

    def submit(image: Image.Image) -> Request:
        prepared = runtime.processor.prepare(Conversation([(question, None)], [_cut(image, tiles)]), decode=False)
        return runtime.engine.submit(uuid4().hex, prepared, config)

    streams = drive(runtime.engine, [partial(submit, image) for image in images], clients=clients, rate=rate)
    return [Answer(one.arrived, [now for now, delta in one.deltas for _ in delta.token_ids]) for one in streams]


def _cut(image: Image.Image, tiles: int) -> Picture:
    """The thumbnail of several tiles comes on top of the most that they may be."""
    return Picture(image, max(tiles - 1, 1))


def row_of(system: str, load_name: str, tiles: int, answers: Sequence[Answer]) -> dict[str, Any]:
    """What a load amounted to."""
    seconds = max(answer.tokens[-1] for answer in answers) - min(answer.arrived for answer in answers)
    first = [(answer.tokens[0] - answer.arrived) * 1e3 for answer in answers]
    between = [gap * 1e3 for answer in answers for gap in np.diff(answer.tokens)]
    return {
        "system": system,
        "load": load_name,
        "tiles": tiles,
        "requests": len(answers),
        "requests_per_s": len(answers) / seconds,
        "tiles_per_s": tiles * len(answers) / seconds,
        "output_tokens_per_s": sum(len(answer.tokens) for answer in answers) / seconds,
        "ttft_p50_ms": float(np.percentile(first, 50)),
        "ttft_p99_ms": float(np.percentile(first, 99)),
        "itl_p50_ms": float(np.percentile(between, 50)),
        "itl_p99_ms": float(np.percentile(between, 99)),
    }


class Peer:
    """transformers' port with the weights of a runtime, answering batches of one size."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.model = transformers_model(runtime.model, runtime.engine.context_token_id)
        self.parameter = next(runtime.model.parameters())

    @torch.inference_mode()
    def answer(self, images: Sequence[Image.Image], tiles: int, new_tokens: int) -> None:
        """One batch, from decoded pictures to the last token."""
        question = place_images(QUESTION, num_images=1, has_history=False)
        prepared = [
            self.runtime.processor.prepare(Conversation([(question, None)], [_cut(image, tiles)])) for image in images
        ]
        device = self.parameter.device
        ids = torch.tensor([one.token_ids for one in prepared], device=device)
        cut = torch.cat([torch.from_numpy(part) for one in prepared for part in one.tiles]).to(device)
        pixels = pixel_values(cut, self.parameter.dtype)
        mask = torch.ones_like(ids)
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        self.model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **options)


def peer_row(peer: Peer, images: Sequence[Image.Image], tiles: int, at_once: int, new: int) -> dict[str, Any]:
    """The same requests in batches. Its tokens come all at once, so that it has no latencies."""
    start = time.perf_counter()
    for begin in range(0, len(images), at_once):
        peer.answer(images[begin : begin + at_once], tiles, new)
    seconds = time.perf_counter() - start
    rate = len(images) / seconds
    latencies = dict.fromkeys(("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"))
    return {
        "system": "transformers",
        "load": f"batches of {at_once}",
        "tiles": tiles,
        "requests": len(images),
        "requests_per_s": rate,
        "tiles_per_s": tiles * rate,
        "output_tokens_per_s": new * rate,
        **latencies,
    }


def again_rows(runtime: Runtime, tiles: int, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Time to the first token of new pictures and of the same ones again, one request at a time."""
    new, seen = (answer_all(runtime, images, tiles, 4, clients=1) for _ in range(2))
    return [row_of("vitrail", name, tiles, answers) for name, answers in (("new pictures", new), ("again", seen))]


def measure_model(name: str, device: str) -> Iterator[dict[str, Any]]:
    """The rows of one model, as they are measured."""
    case = CASES[name]
    runtime = load(name, case.dtype, device)
    config = runtime.model.config
    peer = Peer(runtime)
    seeds = iter(range(10**6))

    def pictures(tiles: int, count: int) -> list[Image.Image]:
        return [picture(config, tiles, next(seeds)) for _ in range(count)]

    for tiles in case.tiles:
        most = max(case.clients)
        answer_all(runtime, pictures(tiles, most), tiles, 4, clients=most)  # warms up, and grows the cache
        rate = 0.0
        for clients in case.clients:
            images = pictures(tiles, max(clients * case.requests_per_client, 4))
            answers = answer_all(runtime, images, tiles, case.new_tokens, clients=clients)
            row = row_of("vitrail", "one by one" if clients == 1 else f"closed, {clients}", tiles, answers)
            rate = row["requests_per_s"]
            yield row
            yield peer_row(peer, pictures(tiles, len(images)), tiles, clients, case.new_tokens)
        images = pictures(tiles, most * case.requests_per_client)
        answers = answer_all(runtime, images, tiles, case.new_tokens, rate=POISSON_LOAD * rate)
        yield row_of("vitrail", f"Poisson, {POISSON_LOAD * rate:.2f}/s", tiles, answers)
        yield from again_rows(runtime, tiles, pictures(tiles, 8))


def main() -> None:
    """Measure, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--models", nargs="+", choices=sorted(CASES), default=["nano", "1b"])
    parser.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        require_gpu()
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        case = CASES[name]
        for row in tqdm(measure_model(name, arguments.device), desc=name, unit="load", disable=None):
            rows.append({"model": name, "dtype": case.dtype, "new_tokens": case.new_tokens, **row})
            latencies = (
                ""
                if row["ttft_p50_ms"] is None
                else (
                    f"  TTFT {row['ttft_p50_ms']:8.1f} / {row['ttft_p99_ms']:8.1f} ms"
                    f"  ITL {row['itl_p50_ms']:6.1f} / {row['itl_p99_ms']:6.1f} ms"
                )
            )
            rate = f"{row['requests_per_s']:7.2f} req/s {row['output_tokens_per_s']:8.1f} tok/s"
            print(f"{name:5} {row['tiles']:2} tiles  {row['system']:12} {row['load']:16} {rate}{latencies}", flush=True)
            path = write_results(
                results_path("throughput", arguments.out),
                rows,
                title="Requests under load, pictures all new",
                notes="TTFT and ITL: median and 99th percentile.",
            )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
