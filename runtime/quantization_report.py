"""`report.md`: what was quantised and how far the result is from what it was, for people."""

from collections.abc import Mapping
from typing import Any


def render(report: Mapping[str, Any]) -> str:
    """The report of a quantised checkpoint as markdown."""
    settings, calibration, size = report["quantization"], report["calibration"], report["bytes"]
    halves = ", ".join(f"{half}: {settings[key] or 'as it was'}" for half, key in HALVES)
    lines = [
        "# Quantisation report",
        "",
        f"Source `{report['source']}`. {halves}; the rest in {report['dtype']}.",
        "Calibrated with {prompts} prompts, {tiles} tiles, {tokens} tokens".format_map(calibration)
        + (f"; {len(calibration['skipped'])} examples could not be used." if calibration["skipped"] else "."),
        f"Weights: {size['quantised'] / 1e6:.1f} MB, before {size['source'] / 1e6:.1f} MB.",
        "",
        "## The whole model, on the calibration prompts",
        "",
        "| measure | value |",
        "|---|---:|",
    ]
    rows: list[tuple[str, str]] = []
    if "visual_cosine" in report:
        cosine = report["visual_cosine"]
        rows += [
            ("cosine of visual tokens, mean", f"{cosine['mean']:.5f}"),
            ("the same, lowest", f"{cosine['min']:.5f}"),
        ]
    rows += [
        ("KL of the next token, nats", f"{report['logit_kl']:.5f}"),
        ("same most likely next token", f"{report['same_next_token']:.2%}"),
    ]
    answers = report["answers"]
    if answers is not None:
        rows += [
            ("equal greedy answers", f"{answers['equal_answers']:.2%}"),
            ("equal tokens of greedy answers", f"{answers['equal_tokens']:.2%}"),
            ("KL along the source's answers, nats", f"{answers['logit_kl']:.5f}"),
        ]
    lines += [f"| {name} | {value} |" for name, value in rows]
    if answers is None:
        lines += ["", f"Answers were not compared: {report['answers_note']}."]
    lines += [
        "",
        "## Layer by layer",
        "",
        "Error of a layer's output on calibration inputs, RMS over RMS: of weights rounded to nearest, and as written.",
        "alpha: share of the inputs' magnitude moved into the weight; static: inputs have scales known beforehand.",
        "Block: its output, errors before included.",
        "",
        "| layer | method | alpha | to nearest | as written | block |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for block in report["blocks"]:
        for index, layer in enumerate(block["layers"]):
            alpha = "" if layer["alpha"] is None else f"{layer['alpha']:g}{' static' if layer['static'] else ''}"
            whole = f"{block['output_error']:.4f}" if index == len(block["layers"]) - 1 else ""
            lines.append(
                f"| {block['part']}.{layer['layer']} | {layer['method']} | {alpha} | {layer['plain_error']:.4f} "
                f"| {layer['error']:.4f} | {whole} |"
            )
    return "\n".join(lines) + "\n"


HALVES = (("vision half", "vision"), ("language half", "llm"))
