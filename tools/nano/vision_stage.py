"""Stage 1: the vision half alone learns to say what every cell of a picture holds.

The drawing knows where everything is, so each visual token is asked for its character, its place in its string, what
the string is for, which item, day or bar it belongs to, and so on (`bench.nano.picture.LABELS`). The small linear head
that answers is dropped afterwards: what stays is a token that holds this knowledge in a form the language half can
look up.

    torchrun --nproc-per-node 2 tools/nano/vision_stage.py --out build/vision.pt --minutes 20
"""

import argparse
import itertools
import random
import time
from pathlib import Path

import numpy as np
import torch
from architecture import make_config, new_model
from labels import Heads, label_loss
from parallel import average_gradients, join_workers
from schedule import Clock, learning_rate
from tiles import cut_labels, cut_tiles
from torch import Tensor, nn

from vitrail.bench.nano.picture import LABELS
from vitrail.bench.nano.tasks import KINDS, draw_picture
from vitrail.bench.nano.vocabulary import Split
from vitrail.runtime.models.internvl import InternVLModel

SHARES = {"receipt": 7, "sign": 4, "table": 5, "chart": 4, "object": 3, "shapes": 4}


def draw_batch(pictures: int, split: Split, start: int, kind: str | None = None) -> tuple[Tensor, Tensor]:
    """Tiles (n, 224, 224, 3) uint8 and labels (n, 64, labels) int64 of numbered pictures."""
    tiles, labels = [], []
    for number in range(start, start + pictures):
        rng = random.Random(f"kind {number}")
        chosen = kind or rng.choices(list(SHARES), list(SHARES.values()))[0]
        picture = draw_picture(chosen, split, number)
        cut, marks = cut_tiles(picture), cut_labels(picture)
        if len(cut) > 1 and rng.random() < 0.6:  # most thumbnails teach nothing new
            cut, marks = cut[:-1], marks[:-1]
        tiles.append(cut)
        labels.append(marks)
    return torch.from_numpy(np.concatenate(tiles)), torch.from_numpy(np.concatenate(labels)).long()


@torch.no_grad()
def measure(model: InternVLModel, heads: Heads, device: torch.device, pictures: int = 20) -> str:
    """Accuracy per label on held-out pictures, over the cells that hold something; `empty` over the others."""
    right = dict.fromkeys((*LABELS, "empty"), 0)
    count = dict.fromkeys((*LABELS, "empty"), 0)
    for kind in KINDS:
        tiles, labels = draw_batch(pictures, "held-out", 0, kind)
        with torch.autocast(device.type, torch.bfloat16):
            scores = heads(model.encode_tiles(tiles.to(device)))
        for place, (name, score) in enumerate(zip(LABELS, scores, strict=True)):
            wanted, found = labels[..., place], score.argmax(-1).cpu()
            filled = labels[..., 0] > 0 if name == "index" else wanted > 0
            right[name] += int((wanted == found)[filled].sum())
            count[name] += int(filled.sum())
            if name == "field":
                right["empty"] += int((wanted == found)[~filled].sum())
                count["empty"] += int((~filled).sum())
    return " ".join(f"{name} {100 * right[name] / count[name]:.1f}" for name in count)


def train(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    rank, workers = join_workers()
    torch.manual_seed(0)
    config = make_config(512, vit_width=args.width, vit_layers=args.layers, llm_layers=args.llm_layers)
    model = new_model(config).to(device)
    heads = Heads(config["llm_config"]["hidden_size"]).to(device)
    if args.resume:
        state = torch.load(args.resume, map_location=device)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
    trained = [*model.vision_model.parameters(), *model.projector.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    encode = torch.compile(model.encode_tiles) if args.compile else model.encode_tiles
    clock = Clock(args.minutes * 60)
    seen, drawing, last = 0, 0.0, time.perf_counter()
    fraction = 0.0
    for step in itertools.count():
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(step, fraction, decay_from=args.decay_from)
        began = time.perf_counter()
        tiles, labels = draw_batch(args.batch, "train", args.first + (step * workers + rank) * args.batch)
        tiles, labels = tiles[: args.batch], labels[: args.batch]  # always as many: one shape to compile for
        drawing += time.perf_counter() - began
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            tokens = encode(tiles.to(device))
        loss = label_loss(heads(tokens), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        fraction = average_gradients(trained, workers, clock.fraction)
        nn.utils.clip_grad_norm_(trained, 2.0)
        optimizer.step()
        seen += len(tiles) * workers
        if rank == 0 and (time.perf_counter() - last > args.report or fraction >= 1):
            took = time.perf_counter() - last
            pace = f"{seen / took:.0f} tiles/s, drawing {drawing / took:.0%}"
            known = measure(model, heads, device)
            print(f"{clock.elapsed:.0f} s step {step} loss {loss.item():.2f} {pace} | {known}", flush=True)
            torch.save({"model": model.state_dict(), "heads": heads.state_dict(), "config": config}, args.out)
            seen, drawing, last = 0, 0.0, time.perf_counter()
        if fraction >= 1:
            break


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=12, help="pictures drawn and tiles used, a step and worker")
    parser.add_argument("--first", type=int, default=0, help="number of the first picture; a resumed run goes on")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay-from", type=float, default=0.4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--llm-layers", type=int, default=4)
    parser.add_argument("--report", type=float, default=60, help="seconds between measurements")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    train(parser.parse_args())
