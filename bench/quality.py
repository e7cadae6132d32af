"""What quantisation costs: exact answers of the bundled model by method, and a slice of V1.5 with planted outliers.

    python bench/quality.py --model nano          exact answers, task by task: the table of the model card
    python bench/quality.py --methods [NAME ...]  the same questions by method of quantisation, against bf16
    python bench/quality.py --outliers            int8 to nearest against calibrated int8 on a random slice of V1.5

Pictures, words, numbers and prices are those of the held-out split (`bench/nano/vocabulary.py`), drawn with other
seeds than training used. Each picture is asked one question of each task, alone, through the public API; an answer
counts when it equals the expected one in every character. Quantised checkpoints are those that `vitrail quantize`
makes with the calibration set that ships; nf4, which is not calibrated, is rounded while it is loaded. On a CPU int8
is computed as on a GPU, where a ViT's fc2 reads codes of scales that were known beforehand: slower, and judged.

The slice has four blocks of InternViT-6B and two layers of InternLM2-20B at full width, and 4096 tokens. In every
block a few channels of what norms, values and `up` make are 300 times as large as the others, their readers'
columns as much smaller, so that the model computes what it did: what large models are like, and what breaks plain int8.

Exit status 1 where a method costs more than it may, or the slice shows less than it should.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from vitrail.bench.harness import results_path, write_results
from vitrail.bench.models import INTERNVL_CHAT_V1_5, random_model
from vitrail.bench.nano.picture import Question
from vitrail.bench.nano.tasks import TASKS, draw_picture
from vitrail.bench.report import render
from vitrail.runtime import Runtime
from vitrail.runtime.calibration import read_examples
from vitrail.runtime.comparison import Comparison, compare
from vitrail.runtime.config import InternVLConfig
from vitrail.runtime.models.decoder import Layer
from vitrail.runtime.models.intern_vit import Block
from vitrail.runtime.quantization.config import QuantizationConfig
from vitrail.runtime.quantization.int8 import Int8Weight
from vitrail.runtime.quantizer import Options, quantize_checkpoint
from vitrail.runtime.smoothing import folds_of
from vitrail.runtime.weights import NANO, checkpoint_tensors, resolve_checkpoint

FIRST_PICTURE = 1000  # those before it steered the training's choice of what to show
CHUNK = 64  # questions handed to the runtime at once

Drawn = list[tuple[Any, Question]]


@dataclass(frozen=True)
class Method:
    """How both halves are quantised, and how many points of accuracy that may cost; None where it is only reported.

    cache: the type of keys and values.
    """

    vision: str | None = None
    language: str | None = None
    may_cost: float | None = None
    cache: str = "auto"


METHODS = {
    "bf16": Method(),
    "int8": Method("int8", "int8", may_cost=1),
    "int8 vision": Method("int8", None, may_cost=1),
    "int8 language": Method(None, "int8", may_cost=1),
    "int4": Method(None, "int4", may_cost=3),
    "int8 + int4": Method("int8", "int4", may_cost=3),
    "fp8": Method("fp8", "fp8"),
    "nf4": Method(None, "nf4"),
    "int8 KV": Method(may_cost=1, cache="int8"),
}

SLICE = replace(
    INTERNVL_CHAT_V1_5,
    vision=replace(INTERNVL_CHAT_V1_5.vision, num_hidden_layers=4),
    llm=replace(INTERNVL_CHAT_V1_5.llm, num_hidden_layers=2, vocab_size=4096),
)
OUTLIERS = 8  # channels of each of the inputs
OUTLIER = 300.0  # times the others' magnitude
# What the slice has to show: cosines of visual tokens, to nearest below, calibrated above.
BROKEN, WHOLE = 0.95, 0.995


def draw_questions(task: str, count: int) -> Drawn:
    """`count` held-out pictures, each with one question of the task."""
    drawn: Drawn = []
    number = FIRST_PICTURE
    while len(drawn) < count:
        picture = draw_picture(TASKS[task], "held-out", number)
        questions = [question for question in picture.questions if question.task == task]
        if questions:
            drawn.append((picture.pixels, random.Random(f"ask {number}").choice(questions)))
        number += 1
    return drawn


def answers_of(runtime: Runtime, drawn: Drawn) -> list[str]:
    """The answers to all questions."""
    answers: list[str] = []
    for first in range(0, len(drawn), CHUNK):
        chunk = drawn[first : first + CHUNK]
        outputs = runtime.generate(
            [question.text for _, question in chunk], images=[pixels for pixels, _ in chunk], max_new_tokens=16
        )
        answers += [output.text for output in outputs]
    return answers


def right_percent(answers: Sequence[str], drawn: Drawn) -> float:
    """The share of answers that are exactly those expected."""
    right = sum(answer == question.answer for answer, (_, question) in zip(answers, drawn, strict=True))
    return 100 * right / len(drawn)


def measure(runtime: Runtime, task: str, count: int) -> dict[str, Any]:
    """The row of one task."""
    drawn = draw_questions(task, count)
    start = time.perf_counter()
    answers = answers_of(runtime, drawn)
    return {
        "task": task,
        "question": drawn[0][1].text,
        "answer": drawn[0][1].answer,
        "right_percent": round(right_percent(answers, drawn), 1),
        "pictures": count,
        "seconds": round(time.perf_counter() - start, 1),
    }


def measure_tasks(model: str, tasks: Sequence[str], count: int, dtype: str) -> list[dict[str, Any]]:
    """The rows of the model card."""
    rows = []
    with Runtime.from_pretrained(model, dtype=dtype) as runtime:
        for task in tasks:
            rows.append(measure(runtime, task, count))
            print(f"{task}: {rows[-1]['right_percent']} %", file=sys.stderr, flush=True)
    return rows


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """int8 weights of a CPU take rows of codes, as those of a GPU do; they would round each token themselves."""
    with patch.object(Int8Weight, "rows_dtype", torch.int8):
        yield


@contextmanager
def quantised(model: str | Path, method: Method, **options: Any) -> Iterator[dict[str, Any]]:
    """Keywords of `Runtime.from_pretrained` for a model quantised by a method."""
    if method.vision is None and method.language is None:
        yield {"model": model, "kv_cache_dtype": method.cache}
    elif method.language == "nf4":
        yield {"model": model, "quantization": "nf4", "vision_quantization": method.vision}
    else:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "quantised"
            config = QuantizationConfig(llm=method.language, vision=method.vision)
            quantize_checkpoint(model, target, config, Options(answers=False, **options))
            yield {"model": target}


def measure_methods(model: str, names: Sequence[str], tasks: Sequence[str], count: int) -> list[dict[str, Any]]:
    """A row for each method, that of bf16 first: everything is measured against it."""
    drawn = [entry for task in tasks for entry in draw_questions(task, count)]
    examples = read_examples(None, 32)
    rows: list[dict[str, Any]] = []
    plain: list[str] = []
    for name in ["bf16", *(name for name in names if name != "bf16")]:
        method = METHODS[name]
        if method.language == "nf4" and find_spec("bitsandbytes") is None:
            print("nf4: left out, bitsandbytes is not installed", file=sys.stderr)
            continue
        start = time.perf_counter()
        with as_on_a_gpu(), quantised(model, method) as keywords:
            found = compare({"model": model}, keywords, examples)
            with Runtime.from_pretrained(**keywords) as runtime:
                answers = answers_of(runtime, drawn)
        plain = plain or answers
        right = right_percent(answers, drawn)
        rows.append(
            {
                "method": name,
                "vision": method.vision or "bf16",
                "language": method.language or "bf16",
                "cache": "bf16" if method.cache == "auto" else method.cache,
                "right_percent": right,
                "points": right - rows[0]["right_percent"] if rows else 0.0,
                "may_cost": method.may_cost,
                "same_answer_percent": 100 * sum(map(str.__eq__, plain, answers)) / len(answers),
                "visual_cosine": f"{found.visual_cosine_mean:.5f}",
                # Read in one piece, without a cache: of that, only answers tell.
                "logit_kl": None if method.cache != "auto" else found.logit_kl,
                "questions": len(drawn),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
        print(f"{name}: {right:.2f} %, {rows[-1]['same_answer_percent']:.2f} % as bf16", file=sys.stderr, flush=True)
    return rows


def too_costly(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The methods that cost more points than they may, in words."""
    return [
        f"{row['method']} costs {-row['points']:.2f} points, more than {row['may_cost']}"
        for row in rows
        if row["may_cost"] is not None and -row["points"] > row["may_cost"]
    ]


def plant_outliers(block: Block | Layer, generator: torch.Generator) -> None:
    """Make channels of all foldable inputs of a block stick out, and the block compute what it did."""
    dtype = next(block.parameters()).dtype
    block.float()
    for fold in folds_of(block):
        groups, _, size = fold.heads
        scales = torch.ones(groups * size)
        scales[torch.randperm(groups * size, generator=generator)[:OUTLIERS]] = 1 / OUTLIER
        fold.apply(block, scales, dtype)
    block.to(dtype)


def write_slice(config: InternVLConfig, folder: Path) -> None:
    """A checkpoint of random weights with planted outliers; tokenizer and template are the bundled model's."""
    model = random_model(config, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # biases that all tokens share would hide what happens to the tokens
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for block in [*model.vision_model.encoder.layers, *model.language_model.layers]:
        plant_outliers(cast(Block | Layer, block), generator)
    for file in NANO.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    values = json.loads((NANO / "config.json").read_text(encoding="utf-8"))
    for half, sizes in (("vision_config", asdict(config.vision)), ("llm_config", asdict(config.llm))):
        values[half] |= {key: value for key, value in sizes.items() if key in values[half]}
    values["force_image_size"] = config.tile_size
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file(dict(checkpoint_tensors(model)), folder / "model.safetensors", metadata={"format": "pt"})


def measure_outliers(config: InternVLConfig, samples: int, dtype: str) -> list[dict[str, Any]]:
    """int8 of both halves to nearest, and calibrated, each against the slice as it is."""
    with tempfile.TemporaryDirectory() as temporary, as_on_a_gpu():
        source = Path(temporary)
        write_slice(config, source)
        examples = read_examples(None, samples)
        plain = {"model": source, "dtype": dtype}
        limits: dict[str, Any] = {"max_new_tokens": 8, "max_tiles": 1}
        nearest = compare(plain, {**plain, "quantization": "int8", "vision_quantization": "int8"}, examples, **limits)
        rows = [_outlier_row("int8, to nearest", nearest)]
        with quantised(source, METHODS["int8"], num_samples=samples, max_tiles=1, dtype=dtype) as keywords:
            found = compare(plain, {**keywords, "dtype": dtype}, examples, **limits)
        rows.append(_outlier_row("int8, calibrated", found))
    return rows


def _outlier_row(name: str, found: Comparison) -> dict[str, Any]:
    return {
        "method": name,
        "visual_cosine": f"{found.visual_cosine_mean:.5f}",
        "lowest": f"{found.visual_cosine_min:.5f}",
        "logit_kl": found.logit_kl,
        "same_tokens_percent": 100 * found.equal_tokens,
    }


def unconvincing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the slice should show and does not, in words."""
    nearest, ours = (float(row["visual_cosine"]) for row in rows)
    return [
        text
        for text, wrong in (
            (f"int8 to nearest keeps a cosine of {nearest:.4f}: the outliers break nothing", nearest > BROKEN),
            (f"calibrated int8 has a cosine of {ours:.4f}, below {WHOLE}", ours < WHOLE),
        )
        if wrong
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the rows; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="folder, hub id or nano")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), metavar="METHOD", help="by method; all if bare")
    parser.add_argument("--outliers", action="store_true", help="the slice of V1.5")
    parser.add_argument("--num-images", type=int, default=300, help="pictures a task; prompts of the slice: at most 4")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--dtype", default="bfloat16", help="of the table by task")
    parser.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    arguments = parser.parse_args(argv)
    if arguments.outliers:
        name, title = "quality_outliers", "A slice of V1.5 with planted outliers, int8 against fp32"
        notes = "Four blocks of InternViT-6B, two layers of InternLM2-20B, random weights."
        rows = measure_outliers(SLICE, min(arguments.num_images, 4), "float32")
        wrong = unconvincing(rows)
    elif arguments.methods is not None:
        resolve_checkpoint(arguments.model)
        name, title = "quality_methods", f"Exact answers of {arguments.model} by method of quantisation"
        notes = "Calibrated with the set that ships; nf4 is not. fp8 is computed in fp32 where there is no hardware."
        rows = measure_methods(
            arguments.model, arguments.methods or list(METHODS), arguments.tasks, arguments.num_images
        )
        wrong = too_costly(rows)
    else:
        name, title = "quality", f"Exact answers of {arguments.model} on held-out pictures, {arguments.dtype}"
        notes = "Question and answer are examples."
        rows = measure_tasks(arguments.model, arguments.tasks, arguments.num_images, arguments.dtype)
        wrong = []
    path = write_results(results_path(name, arguments.out), rows, title=title, notes=notes)
    print(render(json.loads(path.read_text(encoding="utf-8"))))
    for text in wrong:
        print(f"quality: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
