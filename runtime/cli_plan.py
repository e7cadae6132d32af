"""`vitrail plan`: which placement of a model on so many GPUs answers most requests, and what to expect of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from tqdm import tqdm

from .cli_options import AsJson, console, fail

if TYPE_CHECKING:
    from .distributed.plan import Candidate, Plan
    from .distributed.planner import Memory, Prediction
    from .distributed.workload import Kind

DEFAULTS = {"tiles": 7, "prompt": 64, "output": 256}


def plan(
    model: Annotated[str, typer.Argument(help="A folder, a hub id (only its config is read), or a known shape.")],
    gpu: Annotated[str, typer.Option(help="a100-40gb, a100-80gb, h100, h200 or l40s.")],
    num_gpus: Annotated[int, typer.Option(min=1, max=1024, help="How many of them.")] = 1,
    quantization: Annotated[str | None, typer.Option(help="The language half: int8, int8-weight, int4, fp8.")] = None,
    vision_quantization: Annotated[str | None, typer.Option(help="The vision half: int8, int8-weight, fp8.")] = None,
    workload: Annotated[
        Path | None, typer.Option(help="A .jsonl of kinds of requests: tiles, prompt, output, weight or rate.")
    ] = None,
    tiles: Annotated[int | None, typer.Option(min=0, help="Tiles of a request's images. [default: 7]")] = None,
    prompt: Annotated[int | None, typer.Option(min=0, help="Tokens of its text. [default: 64]")] = None,
    output: Annotated[int | None, typer.Option(min=1, help="Tokens of its answer. [default: 256]")] = None,
    rate: Annotated[float | None, typer.Option(min=1e-9, help="Requests a second. [default: 70 % of the best]")] = None,
    ttft: Annotated[float | None, typer.Option(min=0, help="Milliseconds for 99 % of first tokens.")] = None,
    itl: Annotated[float | None, typer.Option(min=0, help="Milliseconds for 99 % of waits between tokens.")] = None,
    costs: Annotated[
        Path | None, typer.Option(help="What `vitrail bench scaling calibrate` measured, in place of bench/results.")
    ] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(min=0.1, max=1, help="As of the runtime.")] = 0.9,
    simulate: Annotated[
        bool, typer.Option("--simulate/--no-simulate", help="Run the scheduler in simulated time too.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Compare placements of a model on GPUs: throughput, latency, memory of each, the best first.

    Costs are those measured on this kind of GPU, or a roofline, which the output says. Exits with status 1 where no
    placement keeps --ttft and --itl.
    """
    from .distributed.gpus import find_gpu
    from .distributed.plan import make_plan, make_planner
    from .distributed.workload import workload_of
    from .kernel_pack import find_config, find_quantization
    from .loaded import require_chat
    from .quantization.config import QuantizationConfig

    kinds, rate = _kinds(workload, {"tiles": tiles, "prompt": prompt, "output": output}, rate)
    row = find_gpu(gpu)
    config = find_config(model)
    require_chat(config, model)
    stored = find_quantization(model)
    if stored is not None and (quantization or vision_quantization):
        fail(f"{model} is quantised already: --quantization and --vision-quantization do not apply")
    chosen = stored or QuantizationConfig(quantization, vision_quantization)
    planner, costs_from = make_planner(
        model,
        config,  # type: ignore[arg-type]  # a chat model's, since it was required
        row,
        chosen,
        workload_of(config, kinds, rate),  # type: ignore[arg-type]
        table=costs,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    found = make_plan(
        planner,
        num_gpus,
        costs_from=costs_from,
        ttft_ms=ttft,
        itl_ms=itl,
        simulate=simulate,
        progress=_bar,
    )
    if as_json:
        print(json.dumps(_report(model, found, ttft, itl)))
    else:
        _print(model, found, ttft, itl)
    if not found.candidates[0].meets:
        raise typer.Exit(1)


def _kinds(file: Path | None, options: dict[str, int | None], rate: float | None) -> "tuple[list[Kind], float | None]":
    """The workload's kinds and its rate, from a file or from options."""
    from .distributed.workload import Kind, read_workload

    given = {name: value for name, value in options.items() if value is not None}
    if file is None:
        kind = Kind(**{**DEFAULTS, **given})
        if not kind.tiles + kind.prompt:
            fail("--tiles 0 and --prompt 0: the request would be empty")
        return [kind], rate
    if given:
        fail(f"--workload says what requests are like: {', '.join(f'--{name}' for name in given)} does not go with it")
    kinds, file_rate = read_workload(file)
    if rate is not None and file_rate is not None:
        fail(f"--rate {rate:g}: the lines of {file} have rates of their own, {file_rate:g} in all")
    return kinds, rate if file_rate is None else file_rate


def _bar(predictions: "Sequence[Prediction]") -> "Sequence[Prediction]":
    return tqdm(predictions, desc="simulating", unit="placement", disable=None, leave=False)


def _report(model: str, found: "Plan", ttft: float | None, itl: float | None) -> dict[str, Any]:
    planner = found.planner
    work = planner.workload
    return {
        "model": model,
        "gpu": planner.gpu.name,
        "num_gpus": found.gpus,
        "quantization": planner.quantization.llm,
        "vision_quantization": planner.quantization.vision,
        "costs": found.costs_from,
        "workload": {
            "tiles": work.tiles,
            "prompt_tokens": work.prompt,
            "output_tokens": work.output,
            "rate": found.rate,
            "ttft_ms": ttft,
            "itl_ms": itl,
        },
        "placements": [one.to_dict() for one in found.candidates],
    }


def _print(model: str, found: "Plan", ttft: float | None, itl: float | None) -> None:
    planner, work = found.planner, found.planner.workload
    methods = f"LLM {planner.quantization.llm or 'bf16'}, vision {planner.quantization.vision or 'bf16'}"
    print(f"{model} on {found.gpus} x {planner.gpu.name}, {methods}")
    print(f"requests: {work.tiles:g} tiles, {work.prompt:g} tokens with them, {work.output:g} of answer")
    print(f"costs: {found.costs_from}\n")
    best = found.candidates[0]
    one = best.prediction
    print(f"best: {one.placement}, max_num_seqs {one.rows}")
    print(f"  {one.requests_per_s:.2f} req/s, {one.output_tokens_per_s:.0f} output tok/s{_simulated(best)}")
    if one.ttft_ms is not None and one.itl_ms is not None:
        first = f", simulated {best.ttft.mean:.0f}, 99 % within {best.ttft.p99:.0f}" if best.ttft else ""
        between = f", simulated {best.itl.mean:.1f}, 99 % within {best.itl.p99:.1f}" if best.itl else ""
        print(f"  at {found.rate:.2f} req/s: first token after {one.ttft_ms:.0f} ms{first}")
        print(f"  then a token every {one.itl_ms:.1f} ms{between}; the longest step {one.itl_bound_ms:.0f} ms")
    if one.encoder is not None:
        print(f"  a GPU for vision: {_memory(one.encoder)}")
    print(f"  {'a GPU for the LLM' if one.encoder else 'each GPU'}: {_memory(one.memory)}")
    if ttft is not None or itl is not None:
        limits = [f"{name} {ms:g} ms" for name, ms in (("TTFT", ttft), ("ITL", itl)) if ms is not None]
        print(f"  targets ({', '.join(limits)} for 99 %): {'kept' if best.meets else 'NOT kept by any placement'}")
    print()
    table = Table("placement", box=None)
    for heading in ("req/s", "simulated", "max_num_seqs", "TTFT ms", "p99", "ITL ms", "p99"):
        table.add_column(heading, justify="right")
    for candidate in found.candidates:
        table.add_row(*_row(candidate))
    console.print(table)


def _simulated(candidate: "Candidate") -> str:
    if candidate.simulated_requests_per_s is None or candidate.difference is None:
        return ""
    return f"; simulated {candidate.simulated_requests_per_s:.2f} req/s ({candidate.difference:+.1%})"


def _row(candidate: "Candidate") -> list[str]:
    one = candidate.prediction
    simulated = candidate.simulated_requests_per_s
    return [
        str(one.placement) + ("" if candidate.meets else " (misses the targets)"),
        f"{one.requests_per_s:.2f}",
        "" if simulated is None else f"{simulated:.2f}",
        str(one.rows),
        "" if one.ttft_ms is None else f"{one.ttft_ms:.0f}",
        "" if candidate.ttft is None else f"{candidate.ttft.p99:.0f}",
        "" if one.itl_ms is None else f"{one.itl_ms:.1f}",
        "" if candidate.itl is None else f"{candidate.itl.p99:.1f}",
    ]


def _memory(memory: "Memory") -> str:
    parts = {
        "vision weights": memory.vision_weights,
        "LLM weights": memory.language_weights,
        "activations of the vision half": memory.vision_peak,
        "context and graphs": memory.overhead,
        "keys and values": memory.kv if memory.language_weights else 0.0,
    }
    return f"{', '.join(f'{name} {gb:.1f}' for name, gb in parts.items() if gb)} of {memory.usable:.1f} GB"
