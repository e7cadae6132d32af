"""`vitrail export tensorrt`: engines of an exported folder, or of a checkpoint that is exported first."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import AsJson
from .cli_quantize import Progress

if TYPE_CHECKING:
    from .backends.engine_file import Engine

CALIBRATION_TILES = 6  # the most that a calibration image may take


def tensorrt(
    source: Annotated[
        str, typer.Argument(help="A folder that `vitrail export onnx` wrote, a file of it, or a checkpoint.")
    ],
    target: Annotated[Path, typer.Argument(help="The folder of the engines, or one file that ends in .engine.")],
    compute_capability: Annotated[
        list[str], typer.Option(help="Of the GPUs to build for: 8.0 (A100); may be repeated. Or `portable`.")
    ],
    part: Annotated[str | None, typer.Option(help="vision, decoder, contrastive or text; all if not given.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="bf16, fp16, fp32, int8, int4 or fp8; of an ONNX file: what it has.")
    ] = None,
    max_tiles: Annotated[int | None, typer.Option(help="Tiles in one run, at most; 40.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Sequences of the decoder, or texts, at most.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a sequence, at most.")] = None,
    product: Annotated[
        str | None, typer.Option(help="tensorrt or tensorrt-rtx; the first that is installed if not given.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A checkpoint to int8: a folder of images, or a .jsonl; the set that ships.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Prompts of the calibration, at most.")] = 16,
    progress: Progress = None,
    as_json: AsJson = False,
) -> None:
    """Build strongly typed TensorRT engines for GPUs of a compute capability.

    Beside each engine: a JSON file that says where it can run, and the log of the build. Classic TensorRT builds on
    the GPU that it builds for; TensorRT-RTX builds on any machine.
    """
    from ..export.tensorrt import EngineOptions
    from ..export.tensorrt_export import export_tensorrt
    from ..export.tensorrt_profiles import Sizes

    options = EngineOptions(
        compute_capabilities=tuple(compute_capability),
        precision=precision,
        sizes=Sizes(max_tiles, max_batch, max_length),
        product=product,
        progress=progress,
    )

    def prompts() -> Any:  # reading images is left to int8, which needs them
        from .export_check import calibration_prompts

        return calibration_prompts(source, calibration, num_samples, CALIBRATION_TILES)

    engines = export_tensorrt(source, target, part, options, prompts)
    if as_json:
        print(json.dumps({"engines": [engine.to_json() for engine in engines]}))
        return
    for engine in engines:
        _report(engine)


def _report(engine: "Engine") -> None:
    capabilities = ", ".join(engine.compute_capabilities)
    print(
        f"{engine.path}: {engine.precision} for compute capability {capabilities}, {engine.bytes / 1e6:.1f} MB, "
        f"by {engine.product} {engine.version} in {engine.seconds:.0f} s"
    )
    for fallback in engine.fallbacks:
        typer.echo(f"vitrail: {engine.path.name}: wider than the ONNX file has it: {fallback}", err=True)
