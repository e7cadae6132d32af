"""Answer a question about a picture with onnxruntime alone: no torch, no vitrail, only the files of an export.

vitrail export onnx nano exported
python examples/onnx_only.py exported examples/receipt.png "What is the total?"

Needs onnxruntime, numpy, Pillow and sentencepiece. For fp32 exports of models with a SentencePiece tokenizer.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from PIL import Image
from sentencepiece import SentencePieceProcessor


def choose_grid(width: int, height: int, size: int, least: int, most: int) -> tuple[int, int]:
    """(columns, rows) of the grid whose shape is nearest to the picture's."""
    grids = {(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if least <= c * r <= most}
    best, smallest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        larger = difference == smallest and width * height > 0.5 * size * size * columns * rows
        if difference < smallest or larger:
            best, smallest = (columns, rows), difference
    return best


def cut(picture: Image.Image, rules: dict[str, Any]) -> np.ndarray:
    """(n, size, size, 3) uint8: the tiles row by row, and the whole picture as a last one."""
    size = rules["tile_size"]
    width, height = picture.size
    columns, rows = choose_grid(width, height, size, rules["min_tiles"], rules["max_tiles"])
    whole = np.asarray(picture.resize((columns * size, rows * size), Image.Resampling.BICUBIC))
    tiles = whole.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    if rules["use_thumbnail"] and len(tiles) > 1:
        tiles = np.concatenate((tiles, np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))[None]))
    return np.ascontiguousarray(tiles)


def answer(folder: Path, picture: str, question: str, longest: int = 64) -> str:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    prompt, cache = manifest["prompt"], manifest["cache"]
    vision, decoder = (ort.InferenceSession(folder / manifest["parts"][part]["file"]) for part in ("vision", "decoder"))
    tokenizer = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    tiles = cut(Image.open(picture).convert("RGB"), manifest["preprocessing"])
    visual = vision.run(None, {"tiles": tiles})[0].reshape(-1, manifest["model"]["hidden_size"])
    places = [prompt["image_token_id"]] * len(visual)
    words = tokenizer.encode(prompt["question"].format(question=question))
    ids = [*prompt["before"], *places, *prompt["after"], *words, *prompt["end"]]

    names = [f"past_key_values.{layer}.{kind}" for layer in range(cache["layers"]) for kind in ("key", "value")]
    past = [np.zeros((1, cache["kv_heads"], 0, cache["head_dim"]), np.float32)] * len(names)
    found: list[int] = []
    seen = 0
    while len(found) < longest:
        mask, positions = np.ones((1, seen + len(ids)), np.int64), np.arange(seen, seen + len(ids))[None]
        inputs = {"input_ids": np.array([ids]), "visual_tokens": visual, "position_ids": positions}
        logits, *past = decoder.run(None, {**inputs, "attention_mask": mask, **dict(zip(names, past, strict=True))})
        seen, token = seen + len(ids), int(logits[0].argmax())
        if token in prompt["stop_token_ids"]:
            break
        found, ids, visual = [*found, token], [token], visual[:0]
    return str(tokenizer.decode(found))


if __name__ == "__main__":
    print(answer(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
