"""Stage 2: the language half learns to answer from the visual tokens of a frozen vision half.

Each sequence is one picture with several of its questions as a conversation; the loss is on the answers. Kinds of
pictures that are answered worse are shown more often, and receipts on two tiles come after those on one.

    torchrun --nproc-per-node 2 tools/nano/language_stage.py --vision vision.pt --tokenizer DIR --out nano.pt
"""

import argparse
import itertools
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from architecture import SYSTEM_MESSAGE, make_config, new_model
from conversation import Conversation, ConversationWriter
from guidance import Guidance
from labels import Heads, label_loss
from parallel import average_gradients, join_workers
from pool import Pool, Seen, look
from schedule import Clock, learning_rate
from torch import Tensor, nn

from vitrail.bench.nano.picture import LABELS
from vitrail.bench.nano.tasks import KINDS, TASKS
from vitrail.runtime.layers.rotary import inverse_frequencies
from vitrail.runtime.models.internvl import InternVLModel
from vitrail.runtime.tokenizer import load_tokenizer

ONE_TILE, TWO_TILES = 64, 192
MAX_QUESTIONS = 6
KIND_WEIGHTS = {"receipt": 1.6, "sign": 1.4, "table": 1.0, "chart": 0.7, "object": 0.7, "shapes": 0.6}
NOT_CAUSAL = ("highest", "kin", "count", "next")  # what a token cannot know from those before it
NOT_SOUGHT = tuple(name for name in LABELS if name not in ("field", "index", "key", "heading"))


@dataclass(frozen=True)
class Batch:
    """embeddings: (n, tokens, hidden). places: (answer tokens, 2), where each is predicted; targets: what it is.

    queries, sources: where guided attention starts and should go. image: where visual tokens begin in every sequence;
    labels: (n, visual tokens, labels) int64, what they show.
    """

    embeddings: Tensor
    places: Tensor
    targets: Tensor
    queries: Tensor
    sources: Tensor
    owners: list[tuple[int, str]]  # per answer token: number of its question in the batch, and its task
    image: int
    labels: Tensor


class Trainer:
    """The model, how conversations become batches, and how far each task is."""

    def __init__(self, model: InternVLModel, writer: ConversationWriter, device: torch.device, layer: int) -> None:
        self.model, self.writer, self.device = model, writer, device
        self.inv_freq = inverse_frequencies(model.config.llm).to(device)
        self.guidance = Guidance(model.language_model, layer, self.inv_freq)

    def batch(self, pictures: list[Seen], rng: random.Random, questions: int) -> Batch:
        """Conversations of up to `questions` random questions each, padded at the end."""
        written: list[tuple[Seen, Conversation, list[str]]] = []
        for seen in pictures:
            chosen = rng.sample(seen.questions, min(questions, len(seen.questions)))
            conversation = self.writer.write(chosen, len(seen.tokens))
            written.append((seen, conversation, [question.task for question in chosen]))
        longest = max(len(conversation.ids) for _, conversation, _ in written)
        ids = torch.zeros(len(written), longest, dtype=torch.long)
        places, targets, queries, sources, owners = [], [], [], [], []
        number = 0
        for row, (_, conversation, tasks) in enumerate(written):
            ids[row, : len(conversation.ids)] = torch.tensor(conversation.ids)
            for answer, task in zip(conversation.answers, tasks, strict=True):
                for place in answer:
                    places.append((row, place - 1))
                    targets.append(conversation.ids[place])
                    owners.append((number, task))
                number += 1
            queries += [(row, place - 1) for place in conversation.sources]
            sources += list(conversation.sources.values())
        embeddings = self.model.language_model.embed(ids.to(self.device))
        rows = []
        for row, (seen, conversation, _) in enumerate(written):
            start = conversation.image
            end = start + len(seen.tokens)
            visual = seen.tokens.to(self.device, embeddings.dtype)
            rows.append(torch.cat((embeddings[row, :start], visual, embeddings[row, end:])))
        return Batch(
            torch.stack(rows),
            torch.tensor(places, device=self.device),
            torch.tensor(targets, device=self.device),
            torch.tensor(queries, device=self.device, dtype=torch.long).view(-1, 2),
            torch.tensor(sources, device=self.device, dtype=torch.long),
            owners,
            written[0][1].image,
            torch.stack([seen.labels for seen in pictures]).long().to(self.device),
        )

    def logits(self, batch: Batch) -> Tensor:
        """(answer tokens, vocabulary)."""
        count, tokens, _ = batch.embeddings.shape
        positions = torch.arange(tokens, device=self.device).expand(count, tokens)
        hidden = self.model.language_model(batch.embeddings, positions, self.inv_freq)
        return self.model.language_model.logits(hidden[batch.places[:, 0], batch.places[:, 1]])

    @torch.no_grad()
    def measure(self, held_out: list[list[Seen]]) -> dict[str, float]:
        """Share of answers per task that would be written exactly right, each token after the right ones before it."""
        right: dict[str, list[bool]] = {task: [] for task in TASKS}
        for pictures in held_out:
            batch = self.batch(pictures, random.Random(0), MAX_QUESTIONS)
            with torch.autocast(self.device.type, torch.bfloat16):
                found = self.logits(batch).argmax(-1)
            correct = (found == batch.targets).tolist()
            for (_, task), group in itertools.groupby(
                zip(batch.owners, correct, strict=True), key=lambda pair: pair[0]
            ):
                right[task].append(all(token for _, token in group))
        return {task: sum(values) / max(1, len(values)) for task, values in right.items()}


def kind_shares(accuracy: dict[str, float]) -> dict[str, float]:
    """How often to show each kind: a fixed part, and more the worse its worst task is answered."""
    return {
        kind: KIND_WEIGHTS[kind] * (0.2 + 1 - min(accuracy[task] for task, owner in TASKS.items() if owner == kind))
        for kind in KINDS
    }


def load_vision(model: InternVLModel, path: Path) -> None:
    """Takes over the vision half and the projector of a stage-1 checkpoint."""
    state = torch.load(path, map_location="cpu")["model"]
    kept = {name: value for name, value in state.items() if not name.startswith("language_model.")}
    missing, _ = model.load_state_dict(kept, strict=False)
    if any(not name.startswith("language_model.") for name in missing):
        raise ValueError(f"{path}: its vision half has another shape")


@torch.no_grad()
def centre_visual_tokens(model: InternVLModel, device: torch.device) -> None:
    """Moves and scales the projector's output to mean 0 and size 1, like the embeddings that it stands among."""
    tokens = [seen.tokens.float() for kind in KINDS for seen in look(model, kind, "train", range(16), device)]
    every = torch.cat(tokens)
    weight = model.get_parameter("projector.linear_2.weight")
    bias = model.get_parameter("projector.linear_2.bias")
    scale = (every - every.mean(0)).square().mean().sqrt()
    weight.copy_(weight / scale)
    bias.copy_((bias - every.mean(0)) / scale)


def train(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    rank, workers = join_workers()
    torch.manual_seed(1)
    tokenizer = load_tokenizer(args.tokenizer)
    vision = torch.load(args.vision, map_location="cpu")["config"]["vision_config"]
    config = make_config(
        tokenizer.vocab_size,
        vit_width=vision["hidden_size"],
        vit_layers=vision["num_hidden_layers"],
        llm_layers=args.layers,
    )
    model = new_model(config)
    load_vision(model, args.vision)
    if args.resume:
        model.load_state_dict(torch.load(args.resume, map_location="cpu")["model"])
    model.to(device)
    if not args.resume:
        centre_visual_tokens(model, device)
    trainer = Trainer(model, ConversationWriter(tokenizer, SYSTEM_MESSAGE), device, args.layers - 2)
    heads = Heads(config["llm_config"]["hidden_size"]).to(device)
    query_heads = Heads(config["llm_config"]["hidden_size"]).to(device)
    trained = [*model.language_model.parameters(), *heads.parameters(), *query_heads.parameters()]
    if args.compile:
        for place, layer in enumerate(model.language_model.layers):
            if place != args.layers - 2:  # the guided layer is listened to
                layer.compile(dynamic=True)
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)

    clock = Clock(args.minutes * 60)
    pool = Pool(model, list(KINDS), args.pool, device, args.first + rank * 50_000_000)
    for kind in KINDS:
        for _ in range(args.fill * (3 if kind == "receipt" else 1)):
            pool.add(kind)
    seen_apart = [look(model, kind, "held-out", range(24), device) for kind in KINDS]
    held_out = [
        [seen for seen in group if len(seen.tokens) == tokens]
        for group in seen_apart
        for tokens in (ONE_TILE, TWO_TILES)
    ]
    held_out = [group for group in held_out if group]
    trainer.writer.check(held_out[0][0].questions, len(held_out[0][0].tokens))
    print(f"worker {rank}: pool filled after {clock.elapsed:.0f} s", flush=True)

    rng = random.Random(f"steps {args.first}")  # the same in all workers, so that they work on equally long sequences
    own = random.Random(f"pictures {args.first} {rank}")
    accuracy = dict.fromkeys(TASKS, 0.0)
    fraction, seen, last = 0.0, 0, time.perf_counter()
    for step in itertools.count():
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(step, fraction, decay_from=args.decay_from)
        questions = rng.randint(1, MAX_QUESTIONS)
        tokens = TWO_TILES if fraction >= args.two_tiles_from and rng.random() < args.two_tiles else ONE_TILE
        count = max(2, args.tokens // (tokens + 24 + 20 * min(questions, 6 if tokens == TWO_TILES else 4)))
        if tokens == TWO_TILES:
            pictures = pool.draw(own, "receipt", tokens, count)
        else:
            shares = kind_shares(accuracy)
            kinds = own.choices(list(shares), list(shares.values()), k=count)
            pictures = [pool.draw(own, kind, tokens, 1)[0] for kind in kinds]
        batch = trainer.batch(pictures, own, questions)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            logits = trainer.logits(batch)
        loss = F.cross_entropy(logits, batch.targets)
        guidance = trainer.guidance.loss(batch.queries, batch.sources) if len(batch.sources) else loss.new_zeros(())
        optimizer.zero_grad()
        first, count_visual = batch.image, batch.labels.shape[1]
        scores = heads(trainer.guidance.entering[:, first : first + count_visual])
        knowledge = label_loss(scores, batch.labels, without=NOT_CAUSAL)
        askers = trainer.guidance.entering[batch.queries[:, 0], batch.queries[:, 1]]
        sought = batch.labels[batch.queries[:, 0], batch.sources - first]
        question = label_loss(query_heads(askers), sought, without=NOT_SOUGHT)
        hints = args.guidance * guidance + args.knowledge * knowledge + args.question * question
        (loss + max(0.0, 1 - fraction / args.hints_until) * hints).backward()
        fraction = average_gradients(trained, workers, clock.fraction)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        seen += count * workers
        if step % args.refresh == 0:
            pool.add(own.choices(list(KINDS), [3, 1, 1, 1, 1, 1])[0])
        if time.perf_counter() - last > args.report or fraction >= 1:
            accuracy = trainer.measure(held_out)
            if rank == 0:
                took = time.perf_counter() - last
                losses = {"loss": loss, "guidance": guidance, "knowledge": knowledge, "question": question}
                shown = [f"{name} {value.item():.2f}" for name, value in losses.items()]
                tasks = ", ".join(f"{task} {100 * share:.0f}" for task, share in accuracy.items())
                pace = f"{seen / took:.1f} pictures/s"
                print(f"{clock.elapsed:.0f} s step {step}", *shown, pace, "|", tasks, flush=True)
                torch.save({"model": model.state_dict(), "config": config}, args.out)
            seen, last = 0, time.perf_counter()
        if fraction >= 1:
            break


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", type=Path, required=True, help="what stage 1 wrote")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="continue from this checkpoint of this stage")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--tokens", type=int, default=2000, help="tokens a step and worker")
    parser.add_argument("--first", type=int, default=1_000_000, help="number of the first picture")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--decay-from", type=float, default=0.5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=0.5)
    parser.add_argument("--knowledge", type=float, default=0.15, help="weight of what inner visual tokens should know")
    parser.add_argument("--question", type=float, default=0.2, help="weight of what an answer's next token seeks")
    parser.add_argument("--hints-until", type=float, default=0.6, help="when the two hints have faded out")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--two-tiles", type=float, default=0.25, help="share of steps with receipts on two tiles")
    parser.add_argument("--two-tiles-from", type=float, default=0.15)
    parser.add_argument("--pool", type=int, default=1500, help="pictures kept of each kind")
    parser.add_argument("--fill", type=int, default=12, help="times eight pictures of each kind before the first step")
    parser.add_argument("--refresh", type=int, default=2, help="steps between two additions of eight pictures")
    parser.add_argument("--report", type=float, default=90, help="seconds between measurements")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())
