"""`vitrail build-kernels`: every kernel that a model launches, compiled ahead of time into a kernel pack."""

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from tqdm import tqdm

from .cli_options import AsJson, console, fail

if TYPE_CHECKING:
    import torch

    from ..kernels.build import Compiled
    from ..kernels.dispatch import Arch, Target
    from ..kernels.signature import Launch

DTYPES = ("bfloat16", "float16", "float32")


def build_kernels(
    arch: Annotated[
        list[str] | None, typer.Option("--arch", help="sm_80 (A100) or sm_90 (H100, H200); may be repeated. Both.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="A folder, a hub id or a known shape; may be repeated. All known shapes."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="bfloat16, float16 or float32; may be repeated. bfloat16.")
    ] = None,
    llm: Annotated[str | None, typer.Option(help="The language half quantised: int8, int8-weight, int4, fp8.")] = None,
    vision: Annotated[str | None, typer.Option(help="The vision half quantised: int8, int8-weight, fp8.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, or int8: of keys and values.")] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The pack's folder; the one that is looked in if not given.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilers at a time; one a core if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compile every kernel ahead of time, on any machine, GPU or not: a process that finds the pack compiles nothing.

    A checkpoint that `vitrail quantize` made says itself how it is quantised. What is in the pack already, of the same
    sources and the same Triton, is not compiled again.
    """
    from ..kernels.dispatch import cache_folder
    from ..kernels.pack import write_pack

    archs, dtypes = _archs(arch), _dtypes(dtype or ["bfloat16"])
    triton_version = _triton_version()
    folder = output if output is not None else cache_folder() / "pack"
    _check_writable(folder)
    wanted = _launches(model, archs, dtypes, llm, vision, kv_cache_dtype)
    missing = _missing(wanted, folder, triton_version)
    compiled = _compile(missing, jobs)
    sound = [binary for binary in compiled if not binary.faults]
    try:
        write_pack(folder, sound, triton_version)
    except OSError as error:
        fail(f"--output {folder}: {error.strerror}")
    faulty = [binary for binary in compiled if binary.faults]
    if as_json:
        print(json.dumps(_report(folder, triton_version, len(wanted), compiled)))
    else:
        _print_table(compiled)
        count = len(wanted) - len(faulty)
        noun = "binary" if count == 1 else "binaries"
        print(f"{count} {noun} for {', '.join(archs)} in {folder}, {len(sound)} new")
    for binary in faulty:
        typer.echo(f"vitrail: left out: {binary.launch.key} for {binary.arch}: {'; '.join(binary.faults)}", err=True)
    if faulty:
        raise typer.Exit(1)


def _archs(names: list[str] | None) -> "list[Arch]":
    from ..kernels.dispatch import ARCHS

    for name in names or ():
        if name not in ARCHS:
            fail(f"--arch {name}: unknown; known: {', '.join(ARCHS)}")
    return [arch for arch in ARCHS if names is None or arch in names]


def _dtypes(names: list[str]) -> "list[torch.dtype]":
    import torch

    for name in names:
        if name not in DTYPES:
            fail(f"--dtype {name}: unknown; known: {', '.join(DTYPES)}")
    return [getattr(torch, name) for name in DTYPES if name in names]


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        fail("build-kernels needs Triton: pip install 'vitrail[cuda]'")
    return str(triton.__version__)


def _check_writable(folder: Path) -> None:
    """Refuse before the minutes that compilation takes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        fail(f"--output {folder}: {error.strerror}")


def _launches(
    models: list[str] | None,
    archs: "list[Arch]",
    dtypes: "list[torch.dtype]",
    llm: str | None,
    vision: str | None,
    kv_cache_dtype: str,
) -> "list[tuple[Launch, Arch]]":
    from .kernel_pack import DEFAULT_MODELS, find_config, find_quantization, record_launches
    from .options import read_cache_dtype
    from .quantization.config import QuantizationConfig

    cache_dtype = read_cache_dtype(kv_cache_dtype)
    chosen = QuantizationConfig(llm, vision) if llm or vision else None
    found = {
        (launch.key, target.arch): (launch, target.arch)
        for model in models or DEFAULT_MODELS
        for config, quantization in [(find_config(model), chosen or find_quantization(model))]
        for target, dtype in product(_targets(archs), dtypes)
        for launch in record_launches(
            config, target, dtype, tuned=True, quantization=quantization, cache_dtype=cache_dtype
        )
    }
    return list(found.values())


def _targets(archs: "list[Arch]") -> "list[Target]":
    """The GPUs that stand for the architectures, and those of this machine, which may have been tuned."""
    import torch

    from ..kernels.dispatch import REPRESENTATIVE, cuda_target

    here = [cuda_target(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    targets = [REPRESENTATIVE[arch] for arch in archs]
    return targets + [target for target in dict.fromkeys(here) if target is not None and target.arch in archs]


def _missing(wanted: "list[tuple[Launch, Arch]]", folder: Path, triton_version: str) -> "list[tuple[Launch, Arch]]":
    """Without those that the pack has."""
    from ..kernels.pack import read_pack
    from .errors import UnsupportedError

    try:
        pack = read_pack(folder)
    except UnsupportedError:
        return wanted
    if pack is None or pack.triton_version != triton_version:
        return wanted
    return [(launch, arch) for launch, arch in wanted if launch.key not in pack.binaries.get(arch, {})]


def _compile(wanted: "list[tuple[Launch, Arch]]", jobs: int | None) -> "list[Compiled]":
    from ..kernels.build import compile_launches

    done: dict[int, Compiled] = {}
    with tqdm(total=len(wanted), desc="compiling", unit="kernel", disable=None) as bar:
        for index, binary in compile_launches(wanted, jobs):
            done[index] = binary
            bar.update()
    return [done[index] for index in range(len(wanted))]


def _report(folder: Path, triton_version: str, count: int, compiled: "list[Compiled]") -> dict[str, Any]:
    return {
        "folder": str(folder),
        "triton": triton_version,
        "binaries": count,
        "compiled": [
            {
                "kernel": binary.launch.key,
                "arch": binary.arch,
                "faults": binary.faults,
                **(asdict(binary.resources) if binary.resources is not None else {}),
            }
            for binary in compiled
        ],
    }


def _print_table(compiled: "list[Compiled]") -> None:
    if not compiled:
        return
    table = Table("kernel", "arch", box=None)
    for heading in ("registers", "stack", "shared", "warps", "CTAs/SM", "instructions"):
        table.add_column(heading, justify="right")
    for binary in compiled:
        resources = binary.resources
        if resources is not None:
            numbers = [resources.registers, resources.stack, resources.shared, resources.warps]
            numbers += [resources.ctas_per_sm, resources.instructions]
            table.add_row(binary.launch.name.strip("_"), binary.arch, *map(str, numbers))
    console.print(table)
