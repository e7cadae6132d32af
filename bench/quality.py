"""How often the bundled model is right: exact answers on pictures that its training never drew.

    python bench/quality.py --model nano

Pictures, words, numbers and prices are those of the held-out split (`bench/nano/vocabulary.py`), drawn with other
seeds than training used. Each picture is asked one question of each task, alone, through the public API; an answer
counts when it equals the expected one in every character. The table is that of the model card, `docs/nano.md`.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

from vitrail.bench.harness import results_path, write_results
from vitrail.bench.nano.picture import Question
from vitrail.bench.nano.tasks import TASKS, draw_picture
from vitrail.bench.report import render
from vitrail.runtime import Runtime

FIRST_PICTURE = 1000  # those before it steered the training's choice of what to show
CHUNK = 64  # questions handed to the runtime at once


def draw_questions(task: str, count: int) -> list[tuple[Any, Question]]:
    """`count` held-out pictures, each with one question of the task."""
    drawn: list[tuple[Any, Question]] = []
    number = FIRST_PICTURE
    while len(drawn) < count:
        picture = draw_picture(TASKS[task], "held-out", number)
        questions = [question for question in picture.questions if question.task == task]
        if questions:
            drawn.append((picture.pixels, random.Random(f"ask {number}").choice(questions)))
        number += 1
    return drawn


def measure(runtime: Runtime, task: str, count: int) -> dict[str, Any]:
    """The row of one task."""
    right = 0
    drawn = draw_questions(task, count)
    start = time.perf_counter()
    for first in range(0, count, CHUNK):
        chunk = drawn[first : first + CHUNK]
        outputs = runtime.generate(
            [question.text for _, question in chunk], images=[pixels for pixels, _ in chunk], max_new_tokens=16
        )
        right += sum(output.text == question.answer for output, (_, question) in zip(outputs, chunk, strict=True))
    return {
        "task": task,
        "question": drawn[0][1].text,
        "answer": drawn[0][1].answer,
        "right_percent": round(100 * right / count, 1),
        "pictures": count,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="folder, hub id or nano")
    parser.add_argument("--num-images", type=int, default=300, help="pictures a task")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", help="folder of the JSON; bench/results/<device> by default")
    arguments = parser.parse_args(argv)
    rows = []
    with Runtime.from_pretrained(arguments.model, dtype=arguments.dtype) as runtime:
        for task in arguments.tasks:
            rows.append(measure(runtime, task, arguments.num_images))
            print(f"{task}: {rows[-1]['right_percent']} %", file=sys.stderr, flush=True)
    path = write_results(
        results_path("quality", arguments.out),
        rows,
        title=f"Exact answers of {arguments.model} on held-out pictures, {arguments.dtype}",
        notes="Question and answer are examples.",
    )
    print(render(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
