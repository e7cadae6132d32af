"""`vitrail export`: the parts of a model as ONNX graphs, the check of them, and TensorRT engines."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli_export_tensorrt import tensorrt
from .cli_options import AsJson, console
from .cli_quantize import Progress

export_app = typer.Typer(help="Write a model's parts as ONNX graphs or TensorRT engines.", no_args_is_help=True)


@export_app.command("onnx")
def export_onnx(
    source: Annotated[str, typer.Argument(help="The checkpoint: a local folder, a hub id or `nano`.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    part: Annotated[str | None, typer.Option(help="vision, decoder, contrastive or text; all if not given.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    quantization: Annotated[str | None, typer.Option(help="int8 (both halves) or int4 (the language half).")] = None,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale, of int4.")] = 128,
    calibration: Annotated[
        Path | None, typer.Option(help="For int8: a folder of images, or a .jsonl; the set that ships if not given.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Prompts of the calibration, at most.")] = 16,
    max_tiles: Annotated[int, typer.Option(min=1, help="The most tiles a calibration image may take.")] = 6,
    progress: Progress = None,
    as_json: AsJson = False,
) -> None:
    """Write parts of a checkpoint as ONNX graphs with a manifest.

    Weights go from file to file one by one: the machine's memory need not hold the model.
    """
    from ..export.onnx import Options
    from ..export.onnx import export_onnx as export

    options = Options(part=part, dtype=dtype, quantization=quantization, group_size=group_size, progress=progress)
    manifest = export(source, target, options, lambda: _prompts(source, calibration, num_samples, max_tiles))
    if as_json:
        print(json.dumps({"target": str(target), **manifest.to_json()}, ensure_ascii=False))
        return
    table = Table(box=None)
    for title in ("part", "type", "tensors", "MB"):
        table.add_column(title)
    for name, entry in manifest.parts.items():
        kind = entry.dtype if entry.quantization is None else f"{entry.quantization}, {entry.dtype}"
        size = (manifest.folder / entry.data).stat().st_size
        table.add_row(name, kind, str(entry.parameters.count), f"{size / 1e6:.1f}")
    console.print(table)
    print(f"{target}: written; `vitrail export verify {target}` compares it with the checkpoint")


@export_app.command("verify")
def export_verify(
    folder: Annotated[Path, typer.Argument(help="A folder that `vitrail export onnx` wrote.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="The checkpoint it was made from, if that is elsewhere now.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Prompts to compare on, at most.")] = 4,
    max_tiles: Annotated[int, typer.Option(min=1, help="The most tiles an image may take.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 24,
    min_cosine: Annotated[float, typer.Option(min=-1, max=1, help="Fail below this cosine of any output.")] = 0.999,
    as_json: AsJson = False,
) -> None:
    """Compare exported parts with the checkpoint: every tensor consumed, graphs valid, outputs and answers the same.

    Writes verification.json beside them. Exits with status 1 where a gate fails.
    """
    from .export_check import check_export

    report = check_export(
        folder,
        checkpoint,
        num_samples=num_samples,
        max_tiles=max_tiles,
        max_new_tokens=max_new_tokens,
        min_cosine=min_cosine,
    )
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _print_report(report)
    if report["failed"]:
        sys.exit(1)


export_app.command("tensorrt")(tensorrt)


def _prompts(source: str, calibration: Path | None, num_samples: int, max_tiles: int) -> Any:
    """What int8 activations are calibrated with; reading images is left to those who need it."""
    from .export_check import calibration_prompts

    return calibration_prompts(source, calibration, num_samples, max_tiles)


def _print_report(report: dict[str, Any]) -> None:
    table = Table(box=None)
    for title in ("part", "output", "cosine", "largest error", "largest value"):
        table.add_column(title)
    for name, part in report["parts"].items():
        for output, found in part["outputs"].items():
            numbers = (f"{found['cosine']:.7f}", f"{found['max_error']:.2e}", f"{found['max_value']:.2e}")
            table.add_row(name, output, *numbers)
    console.print(table)
    answers = report.get("answers")
    if answers:
        print(f"greedy answers: {answers['equal']} of {answers['asked']} equal, token by token")
    for note in report["notes"]:
        print(f"vitrail: {note}", file=sys.stderr)
    for reason in report["failed"]:
        print(f"vitrail: {reason}", file=sys.stderr)
    print("passed" if not report["failed"] else "failed")
