"""Writes a trained model as an official checkpoint folder: config.json, model.safetensors in bf16, tokenizer files.

python tools/nano/export.py --model nano.pt --tokenizer DIR --out runtime/assets/nano
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from vitrail.runtime.config import parse_config
from vitrail.runtime.models.internvl import InternVLModel
from vitrail.runtime.weights import checkpoint_tensors

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def export(source: Path, tokenizer: Path, folder: Path) -> None:
    state = torch.load(source, map_location="cpu")
    model = InternVLModel(parse_config(state["config"]))
    model.load_state_dict(state["model"])
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in checkpoint_tensors(model)}
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes it readable by its owner alone
    (folder / "config.json").write_text(json.dumps(state["config"], indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {sum(t.numel() for t in tensors.values()):,} parameters, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="what the last stage wrote")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    export(args.model, args.tokenizer, args.out)
