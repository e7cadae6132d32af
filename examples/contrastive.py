"""Embed, score, classify, match and caption with a contrastive model (InternVL-C/G), and look at its hidden states.

python examples/contrastive.py [FOLDER or hub id]

Without an argument the model is a tiny one with random weights: it shows the calls, and knows nothing.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from vitrail import runtime

HERE = Path(__file__).parent
PICTURES = [HERE / name for name in ("sign.png", "object.png", "receipt.png")]
TEXTS = ["a street sign", "a yellow ring", "a receipt", "一张收据"]

VISION = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "image_size": 84,
    "patch_size": 14,
}
QLLAMA = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
}


def write_random_model(folder: Path) -> None:
    """A checkpoint in the official format: configuration, weights, and the tokenizer of the bundled chat model."""
    config = {"model_type": "internvl", "clip_embed_dim": 32, "num_query_token": 8}
    config |= {"vision_config": VISION, "qllama_config": QLLAMA}
    torch.manual_seed(0)
    shapes = runtime.expected_tensors(config)
    weights = {name: torch.randn(shape) * (shape[-1] ** -0.5 if shape else 1) for name, shape in shapes.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        shutil.copy(Path(runtime.__file__).parent / "assets" / "nano" / name, folder)


def show(model: str | Path) -> None:
    with runtime.Runtime.from_pretrained(model, dtype="float32") as rt:
        print("embeddings", tuple(rt.embed(images=PICTURES, mode="g").shape), tuple(rt.embed(texts=TEXTS).shape))
        for picture, row in zip(PICTURES, rt.score(PICTURES, TEXTS).softmax(-1).tolist(), strict=True):
            print("score", picture.name, dict(zip(TEXTS, (round(value, 3) for value in row), strict=True)))
        found = rt.classify(PICTURES, ["sign", ["ring", "circle"], "receipt"], ["a photo of a {}.", "a {}."])
        print("classes", found.labels)
        print("first of CIFAR-10 in Chinese", rt.classify(PICTURES[0], "cifar10-zh").top(2))
        print("match", [round(value, 3) for value in rt.match(PICTURES[0], TEXTS).tolist()])
        print("caption", repr(rt.caption(PICTURES[0], max_new_tokens=8).text))
        features = rt.features(PICTURES, layers=[-1, -2], image_size=112, crop=True)
        print("features", {layer: tuple(state.patches.shape) for layer, state in features.items()})


def main() -> None:
    if len(sys.argv) > 1:
        show(sys.argv[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder))
        show(folder)


if __name__ == "__main__":
    main()
