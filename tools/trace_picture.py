"""Draws a trace of the engine as a picture: docs/engine-trace.svg is one of a real run of nano.

    python tools/trace_picture.py OUT.svg [--trace FILE]

Without a trace it makes one: three answers are under way when a request with four images (twelve tiles) and then one
with a single image arrive.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from vitrail.runtime import Runtime

WIDTH, LEFT, ROW, GAP = 1000, 130, 22, 8
EDGE = 'stroke="white" stroke-width="0.4"'
LANES = ("preprocessing", "vision half", "language half")
COLOURS = {
    "image decode": "#c9a227",
    "tile": "#e0c060",
    "vision": "#2a6f97",
    "prefill": "#b5446e",
    "decode": "#6a994e",
    "request": "#d9dde3",
}


def make_trace(file: Path) -> None:
    """A run in which documents arrive while answers are written."""
    image = np.random.default_rng(0).integers(0, 256, (448, 224, 3), dtype=np.uint8)
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu", max_num_seqs=8) as rt:

        def stream(prompt: str, images: list[Any], tokens: int) -> Any:
            return rt.stream(prompt, images, max_new_tokens=tokens, ignore_eos=True)

        list(stream("warm up", [image], 4))
        rt.engine.vision_cache.clear()
        with rt.trace(file):
            streams = [stream(f"Question {number}?", [], 40) for number in range(3)]
            for step in range(60):
                for one in streams:
                    next(one, None)
                if step == 4:
                    shown = [np.roll(image, number, axis=1) for number in range(1, 5)]
                    streams.append(stream("What do these four say?", shown, 12))
                if step == 9:
                    streams.append(stream("What does the sign say?", [np.roll(image, 9, axis=1)], 12))
            for one in streams:
                list(one)


def picture_of(events: list[dict[str, Any]]) -> str:
    """The trace as SVG: a bar a request on top, then a lane for each stage."""
    begins = {event["id"]: event for event in events if event["ph"] == "b" and event["name"] == "request"}
    ends = {event["id"]: event for event in events if event["ph"] == "e" and event["name"] == "request"}
    slices = [event for event in events if event["ph"] == "X" and event["name"] in COLOURS]
    first = min(event["ts"] for event in [*slices, *begins.values()])
    last = max([*(event["ts"] + event["dur"] for event in slices), *(event["ts"] for event in ends.values())])
    scale = (WIDTH - LEFT - 10) / (last - first)

    def bar(y: int, start: float, end: float, colour: str, words: str) -> str:
        x, width = LEFT + (start - first) * scale, max((end - start) * scale, 0.8)
        title = f"<title>{escape(words)}</title>"
        return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW}" fill="{colour}" {EDGE}>{title}</rect>'

    body, y = [], 10
    for number, (name, begin) in enumerate(sorted(begins.items(), key=lambda item: item[1]["ts"]), start=1):
        body.append(bar(y, begin["ts"], ends[name]["ts"], COLOURS["request"], f"request {number}"))
        body.append(f'<text x="8" y="{y + 15}">request {number}</text>')
        y += ROW + 3
    y += GAP
    for lane in LANES:
        body.append(f'<text x="8" y="{y + 15}">{lane}</text>')
        for event in slices:
            if event["cat"] == lane:
                details = ", ".join(f"{value} {key}" for key, value in event["args"].items())
                words = f"{event['name']}: {event['dur'] / 1e3:.2f} ms {details}"
                body.append(bar(y, event["ts"], event["ts"] + event["dur"], COLOURS[event["name"]], words))
        y += ROW + GAP
    x = LEFT
    for name, colour in COLOURS.items():
        body.append(f'<rect x="{x}" y="{y + 6}" width="12" height="12" fill="{colour}"/>')
        body.append(f'<text x="{x + 17}" y="{y + 16}">{name}</text>')
        x += 120
    body.append(f'<text x="{WIDTH - 90}" y="{y + 16}">{(last - first) / 1e3:.0f} ms in all</text>')
    size = f'width="{WIDTH}" height="{y + 28}" viewBox="0 0 {WIDTH} {y + 28}"'
    style = 'font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>\n"])


def main() -> None:
    """Read the command line and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trace", type=Path, help="what `vitrail generate --trace` or `Runtime.trace` wrote")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = arguments.trace or Path(folder) / "trace.json"
        if arguments.trace is None:
            make_trace(trace)
        arguments.out.write_text(picture_of(json.loads(trace.read_text())["traceEvents"]), encoding="utf-8")


if __name__ == "__main__":
    main()
