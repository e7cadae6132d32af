"""`vitrail quantize` and `vitrail verify`: a smaller checkpoint, and how far two runtimes of one model are apart."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli_options import AsJson, Device, Dtype, console, fail

Progress = Annotated[
    bool | None, typer.Option("--progress/--no-progress", help="A bar; by default on a terminal only.")
]


def quantize(
    source: Annotated[str, typer.Argument(help="The checkpoint: a local folder, a hub id or `nano`.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    llm: Annotated[str | None, typer.Option(help="The language half: int4, int8, int8-weight or fp8.")] = None,
    vision: Annotated[str | None, typer.Option(help="The vision half: int8, int8-weight or fp8.")] = None,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale, of int4.")] = 128,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="int4 with zero points.")] = False,
    keep: Annotated[
        list[str] | None, typer.Option(help="A regular expression: layers that stay as they are; may be repeated.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A folder of images, or a .jsonl with `image`, `prompt`, `answer`.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Prompts of the calibration, at most.")] = 32,
    max_tiles: Annotated[int, typer.Option(min=1, help="The most tiles an image may take.")] = 6,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    answers: Annotated[
        bool, typer.Option("--answers/--no-answers", help="Let both checkpoints answer at the end, and compare.")
    ] = True,
    progress: Progress = None,
    as_json: AsJson = False,
) -> None:
    """Quantise a checkpoint, calibrated on images with questions, and report what it costs.

    Only one block of the model is in memory at a time. A run that was killed goes on where it stood when the same
    command is given again.
    """
    from .quantization.config import QuantizationConfig
    from .quantizer import Options, quantize_checkpoint

    config = QuantizationConfig(
        llm=llm,
        vision=vision,
        group_size=group_size,
        symmetric=not asymmetric,
        overrides=dict.fromkeys(keep or []),
    )
    options = Options(
        calibration=calibration,
        num_samples=num_samples,
        max_tiles=max_tiles,
        dtype=dtype,
        device=device,
        answers=answers,
        progress=progress,
    )
    report = quantize_checkpoint(source, target, config, options)
    if as_json:
        print(json.dumps({"target": str(target), **report}, ensure_ascii=False))
        return
    _report_skipped(report["calibration"]["skipped"])
    size = report["bytes"]
    print(f"{target}: {size['quantised'] / 1e6:.1f} MB of weights, before {size['source'] / 1e6:.1f} MB")
    cosine = report.get("visual_cosine", {"mean": 1.0, "min": 1.0})
    print(f"visual tokens: cosine {cosine['mean']:.5f}, lowest {cosine['min']:.5f}")
    print(f"next token: KL {report['logit_kl']:.5f} nats, the same one at {report['same_next_token']:.2%} of places")
    if report["answers"] is None:
        print(f"answers: not compared ({report['answers_note']})")
    else:
        found = report["answers"]
        print(f"answers: {found['equal_answers']:.2%} equal, {found['equal_tokens']:.2%} of their tokens")
    print(f"layer by layer: {target / 'report.md'}")


def verify(
    a: Annotated[str, typer.Argument(help="A checkpoint: a local folder, a hub id or `nano`.")],
    b: Annotated[str, typer.Argument(help="The checkpoint to compare with it.")],
    images: Annotated[
        Path | None, typer.Option(help="A folder of images, or a .jsonl; the set that ships if not given.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Questions, one a line, asked about the images in turn.")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Prompts, at most.")] = 32,
    max_tiles: Annotated[int, typer.Option(min=1, help="The most tiles an image may take.")] = 6,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 32,
    quantization_a: Annotated[str | None, typer.Option(help="Round A's language half: int8, int4 ...")] = None,
    quantization_b: Annotated[str | None, typer.Option(help="Round B's language half.")] = None,
    vision_quantization_a: Annotated[str | None, typer.Option(help="Round A's vision half: int8 ...")] = None,
    vision_quantization_b: Annotated[str | None, typer.Option(help="Round B's vision half.")] = None,
    dtype: Dtype = "bfloat16",
    dtype_b: Annotated[str | None, typer.Option(help="B's dtype, if it is another.")] = None,
    device: Device = None,
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fail below this share of equal answers.")
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option(min=-1, max=1, help="Fail below this mean cosine of visual tokens.")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(min=0, help="Fail above this KL of the next token, in nats.")] = None,
    progress: Progress = None,
    as_json: AsJson = False,
) -> None:
    """Compare two runtimes of one model: visual tokens, expected next tokens, greedy answers.

    Exits with status 1 where a given limit is not kept.
    """
    from .calibration import read_examples
    from .comparison import compare

    examples = read_examples(images, num_samples)
    if prompts is not None:
        examples = _asked(examples, prompts)
    common: dict[str, Any] = {"device": device, "progress": progress}
    sides = (
        {"model": a, "dtype": dtype, "quantization": quantization_a, "vision_quantization": vision_quantization_a},
        {
            "model": b,
            "dtype": dtype_b or dtype,
            "quantization": quantization_b,
            "vision_quantization": vision_quantization_b,
        },
    )
    found = compare(
        {**sides[0], **common},
        {**sides[1], **common},
        examples,
        max_new_tokens=max_new_tokens,
        max_tiles=max_tiles,
        progress=progress,
    )
    missed = [
        text
        for text, wrong in (
            (f"{found.equal_answers:.4f} of the answers are equal, below {min_agreement}",
             min_agreement is not None and found.equal_answers < min_agreement),
            (f"the mean cosine of visual tokens is {found.visual_cosine_mean:.6f}, below {min_cosine}",
             min_cosine is not None and found.visual_cosine_mean < min_cosine),
            (f"the KL is {found.logit_kl:.6f} nats, above {max_kl}", max_kl is not None and found.logit_kl > max_kl),
        )
        if wrong
    ]  # fmt: skip
    if as_json:
        print(json.dumps({"a": sides[0], "b": sides[1], **found.to_dict(), "missed": missed}, ensure_ascii=False))
    else:
        _report_skipped(found.skipped)
        _print_comparison(found)
        for text in missed:
            print(f"vitrail: {text}", file=sys.stderr)
    if missed:
        sys.exit(1)


def _asked(examples: list[Any], prompts: Path) -> list[Any]:
    """The images of examples with the questions of a file, in turn."""
    from dataclasses import replace

    try:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError):
        fail(f"{prompts}: not readable as text")
    if not lines:
        fail(f"{prompts}: holds no questions")
    return [replace(example, prompt=lines[index % len(lines)], answer="") for index, example in enumerate(examples)]


def _print_comparison(found: Any) -> None:
    table = Table(show_header=False, box=None)
    table.add_row("prompts", str(len(found.answers)))
    table.add_row("cosine of visual tokens", f"{found.visual_cosine_mean:.6f}, lowest {found.visual_cosine_min:.6f}")
    table.add_row("KL of the next token", f"{found.logit_kl:.6f} nats")
    table.add_row("equal greedy answers", f"{found.equal_answers:.2%}")
    table.add_row("equal tokens of answers", f"{found.equal_tokens:.2%}")
    console.print(table)
    for pair in [pair for pair in found.answers if pair.a != pair.b][:5]:
        print(f"{pair.image}: {pair.prompt}\n  A: {pair.a}\n  B: {pair.b}")


def _report_skipped(skipped: dict[str, str]) -> None:
    for name, reason in list(skipped.items())[:5]:
        print(f"vitrail: {name}: {reason}", file=sys.stderr)
    if skipped:
        print(f"vitrail: {len(skipped)} examples could not be used", file=sys.stderr)
