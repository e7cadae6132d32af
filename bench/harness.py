"""What every benchmark script shares: timing, the facts of the machine, and the raw results file.

A script measures with `measure` or `compare`, turns each `Timing` into a row and hands the rows to `write_results`;
`report.py` makes the tables of the documents from those files. Nothing here knows what is being measured.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

HIDING_CYCLES = 2_000_000  # about a millisecond: longer than the host takes to launch an operation
HERE = Path(__file__).resolve().parent
PACKAGES = ("vitrail", "torch", "triton", "numpy", "transformers", "onnxruntime", "bitsandbytes")


@dataclass(frozen=True)
class Timing:
    """The milliseconds of `n` timed calls: median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """The timing of samples in milliseconds."""
        p10, median, p90 = (float(value) for value in np.percentile(np.asarray(samples), (10, 50, 90)))
        return cls(median=median, p10=p10, p90=p90, n=len(samples))

    def row(self, prefix: str = "") -> dict[str, float | int]:
        """The columns of a result row, e.g. `vitrail_ms`, `vitrail_p10_ms`, `vitrail_p90_ms`, `vitrail_n`."""
        name = f"{prefix}_" if prefix else ""
        return {f"{name}ms": self.median, f"{name}p10_ms": self.p10, f"{name}p90_ms": self.p90, f"{name}n": self.n}


def measure(
    fn: Callable[[], object],
    *,
    warmup: int = 3,
    repeats: int = 20,
    device: torch.device | str | None = None,
    cold_cache: bool = False,
    hide_launch: bool = False,
) -> Timing:
    """Time `fn` alone; the arguments are those of `compare`."""
    return compare(
        {"": fn}, warmup=warmup, repeats=repeats, device=device, cold_cache=cold_cache, hide_launch=hide_launch
    )[""]


def compare(
    contenders: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 3,
    repeats: int = 20,
    device: torch.device | str | None = None,
    cold_cache: bool = False,
    hide_launch: bool = False,
) -> dict[str, Timing]:
    """Time several functions side by side, so that a machine that slows down slows all of them.

    Every round calls each contender once; every second round goes backwards, so that none always follows the same
    neighbour. On a CUDA device the time lies between two events on the current stream and the host is not waited for,
    so `fn` itself must wait where its host work is part of what is measured. On a CPU it is wall-clock time.

    `device`: where `fn` computes; None is CUDA if present. `cold_cache` (CUDA only) overwrites the L2 cache before
    every call: what a memory-bound kernel meets inside a model. `hide_launch` (CUDA only) keeps the GPU waiting while
    the host launches, so that a kernel shorter than its launch is timed alone, as in a graph; without it the GPU is
    idle when a call begins, and the host's part of it counts.
    """
    if repeats < 1 or warmup < 0 or not contenders:
        raise ValueError(f"nothing to time: {len(contenders)} contenders, {warmup} warm-up and {repeats} timed rounds")
    where = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (cold_cache or hide_launch) and where.type != "cuda":
        raise ValueError(f"cold_cache and hide_launch are of a GPU, and the device is {where}")
    for fn in contenders.values():
        for _ in range(warmup):
            fn()
    if where.type == "cuda":
        samples = _time_on_cuda(contenders, repeats, where, cold_cache, hide_launch)
    else:
        samples = _time_on_cpu(contenders, repeats)
    return {name: Timing.of(times) for name, times in samples.items()}


def _rounds(names: Sequence[str], repeats: int) -> list[str]:
    """The order of calls: forwards in even rounds, backwards in odd ones."""
    return [name for turn in range(repeats) for name in (names if turn % 2 == 0 else names[::-1])]


def _time_on_cpu(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for name in _rounds(list(contenders), repeats):
        start = time.perf_counter_ns()
        contenders[name]()
        samples[name].append((time.perf_counter_ns() - start) / 1e6)
    return samples


def _time_on_cuda(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    cold_cache: bool,
    hide_launch: bool,
) -> dict[str, list[float]]:
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in contenders}
    # Twice the cache, so that no line of the operands survives a replacement policy that is not strictly LRU.
    flush_bytes = 2 * torch.cuda.get_device_properties(device).L2_cache_size if cold_cache else 0
    with torch.cuda.device(device):
        flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)
        for name in _rounds(list(contenders), repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            if hide_launch:
                torch.cuda._sleep(HIDING_CYCLES)
            else:
                torch.cuda.synchronize(device)
            start.record()
            contenders[name]()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize(device)
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reached in this run: bytes a second of a large copy, read and written; FLOP a second of cuBLAS."""

    copy_bytes: float
    matmul_flops: float

    def __str__(self) -> str:
        return (
            f"In the same run: copy {self.copy_bytes / 1e12:.2f} TB/s, "
            f"cuBLAS bf16 8192^3 {self.matmul_flops / 1e12:.0f} TFLOP/s."
        )


def ceilings() -> Ceilings:
    """Copy 4 GiB, and multiply bf16 matrices of 8192 x 8192: on random data, since zeros run faster."""
    source = torch.empty(2**31, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source))
    a, b = source[: 2**27].view(2, 8192, 8192)
    matmul = measure(lambda: a @ b)
    return Ceilings(2 * source.nbytes / (copy.median / 1e3), 2 * 8192**3 / (matmul.median / 1e3))


def require_gpu() -> None:
    """Exit with status 2 where there is no CUDA device."""
    if not torch.cuda.is_available():
        print(f"{Path(sys.argv[0]).name}: measures a GPU, and no CUDA device is present", file=sys.stderr)
        sys.exit(2)


def environment() -> dict[str, Any]:
    """What a result depends on: commit, command, machine and versions, ready for JSON."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    commit = _git("rev-parse", "--short=12", "HEAD")
    # Results are left out: the first script of a run writes its file, and must not make the tree dirty for the second.
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
    script = Path(sys.argv[0]).resolve()
    program = f"bench/{script.name}" if script.parent == HERE else script.name
    return {
        "commit": commit,
        "dirty": bool(changed) if commit else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([program, *map(shlex.quote, sys.argv[1:])]),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "driver": _driver() if gpu else None,
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def device_name() -> str:
    """The folder of `bench/results` for this machine: the GPU's name, e.g. `h200`, or `cpu`."""
    if not torch.cuda.is_available():
        return "cpu"
    words = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def results_path(name: str, out: str | Path | None = None) -> Path:
    """Where the results called `name` go: `out/name.json`, by default `bench/results/<device>/name.json` from here."""
    folder = Path(out) if out is not None else Path("bench", "results", device_name())
    return folder / f"{name}.json"


def write_results(path: str | Path, rows: Sequence[Mapping[str, Any]], *, title: str = "", notes: str = "") -> Path:
    """Write the rows with their environment as JSON and return the path.

    A row maps column to number, string or None (an empty cell). `title` is the table's caption and `notes` the
    sentence below it; both end up in the documents.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"title": title, "notes": notes, "environment": environment(), "rows": [dict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _git(*arguments: str) -> str | None:
    """What git says about vitrail's own checkout; None for an installed copy, which may lie inside another one."""
    if not (HERE.parent / ".git").exists():
        return None
    try:
        command = ("git", "-C", str(HERE.parent), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _driver() -> str | None:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0] if lines else None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
