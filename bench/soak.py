"""Hours in minutes: whether the memory of `vitrail serve` stays flat while it is kept busy.

    python bench/soak.py --minutes 10 [--threads N] [--out DIR]

It starts `vitrail serve nano`, whose cache of visual tokens is full within seconds, so that what grows after that is no
cache, and keeps 8 clients busy: up to three new pictures a request, answers of 1 to 64 tokens, one request in twenty
with a broken picture (which must be refused), one in twenty by a client that leaves in the middle.

Every ten seconds there is a row in `bench/results/<device>/soak.json`: the memory of the server and its engine, how
many requests were answered, refused, left and failed until then, and the median and 99th percentile of the seconds that
answers took since the last row. What the memory grew by from the second quarter to the last stands in the notes, and
the exit status is 1 if a request failed. Run it on a machine that does nothing else.
"""

import argparse
import asyncio
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from vitrail.bench.harness import results_path, write_results
from vitrail.bench.serve import Answer, Server, make_request, own_server, send

CLIENTS = 8
SAMPLE_S = 10.0


def resident_mib(pid: int) -> float:
    """Memory of a process and of those that it started, as Linux tells it."""
    process = Path(f"/proc/{pid}")
    status = (process / "status").read_text(encoding="ascii")
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024
    started = (child for task in process.glob("task/*/children") for child in task.read_text("ascii").split())
    return own + sum(resident_mib(int(child)) for child in started)


async def soak(server: Server, pid: int, minutes: float, size: tuple[int, int]) -> list[dict[str, Any]]:
    """A row every `SAMPLE_S` seconds."""
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    end = start + minutes * 60
    counts = dict.fromkeys(("answered", "refused", "left", "failed"), 0)
    seconds: list[float] = []  # of the answers since the last row
    seeds = iter(range(10**9))

    async def client(generator: random.Random) -> None:
        while time.perf_counter() < end:
            request = make_request(next(seeds), generator.randint(1, 64), size, generator.randint(0, 3))
            if broken := generator.random() < 0.05:
                url = "data:image/png;base64,iVBORw0KGgo="
                request["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": url}})
            leaves = generator.random() * 0.3 if generator.random() < 0.05 else None
            answer = Answer(time.perf_counter())
            await send(server, request, answer, leave_after=leaves)
            if answer.error is None and not broken:
                counts["answered"] += 1
                seconds.append(time.perf_counter() - answer.sent)
            elif answer.error == "left":
                counts["left"] += 1
            else:
                counts["refused" if broken and answer.error == "400" else "failed"] += 1

    def sample() -> None:
        row: dict[str, Any] = {"minute": (time.perf_counter() - start) / 60, "rss_mib": resident_mib(pid), **counts}
        for rank in (50, 99):
            row[f"answer_p{rank}_ms"] = float(np.percentile(seconds, rank)) * 1e3 if seconds else None
        seconds.clear()
        rows.append(row)
        print(" ".join(f"{name}={value:.1f}" for name, value in row.items() if value is not None), flush=True)

    async with asyncio.TaskGroup() as tasks:
        for number in range(CLIENTS):
            tasks.create_task(client(random.Random(number)))
        while time.perf_counter() < end - SAMPLE_S:
            await asyncio.sleep(SAMPLE_S)
            sample()
    sample()  # once the last answers have come
    return rows


def growth_mib(rows: Sequence[Mapping[str, Any]]) -> float:
    """What memory grew from the median of the second quarter of a soak, caches filled, to that of the last."""
    samples = [row["rss_mib"] for row in rows]
    quarter = max(1, len(samples) // 4)
    return float(median(samples[-quarter:]) - median(samples[quarter : 2 * quarter] or samples[:1]))


def main() -> None:
    """Soak, print, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--size", type=int, nargs=2, default=(224, 224), help="width and height of the pictures")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="for the model")
    parser.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    arguments = parser.parse_args()
    with own_server(arguments.threads, "--vision-cache-gb", "0.02") as (server, pid):
        rows = asyncio.run(soak(server, pid, arguments.minutes, arguments.size))
    notes = f"Memory grew by {growth_mib(rows):.1f} MiB from the second quarter to the last."
    path = write_results(results_path("soak", arguments.out), rows, title="A soak of `vitrail serve`", notes=notes)
    print(f"{notes} {rows[-1]['failed']} requests failed. Written to {path}")
    raise SystemExit(rows[-1]["failed"] > 0)


if __name__ == "__main__":
    main()
