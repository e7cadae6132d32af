"""Requests that are queued and not waited for, and many of them at random against each by itself."""

import random
from collections.abc import Sequence
from itertools import count
from typing import Any

from vitrail.runtime import GenerationConfig, Runtime
from vitrail.runtime.engine.sequence import Request

from .tiny_model import assert_idle, assert_same_answer, picture

_names = (f"request-{number}" for number in count())


def ask(rt: Runtime, prompt: str, images: Sequence[Any] = (), *, ahead: bool = False, **keywords: Any) -> Request:
    """A request that is queued and not waited for."""
    conversation = rt._conversation(prompt, list(images), None, None, None)
    return rt._submit(conversation, GenerationConfig(**{"max_new_tokens": 8, **keywords}), next(_names), ahead=ahead)


def finish(rt: Runtime, *requests: Request) -> None:
    for request in requests:
        list(rt.engine.stream(request))


def check_random_requests(rt: Runtime, alone: Runtime, number: int) -> int:
    """Random requests to `rt`, a tenth of them to be aborted, against each by itself in `alone`, which may be the same.

    Returns how many parted at a near tie.
    """
    draw = random.Random(number)
    kinds = [
        (prompt, images, new)
        for prompt in ("What is the total?", "What does the sign say?", "How many circles are there? " * 4)
        for images in ([], [picture(224, 224, 1)], [picture(448, 224, 2)], [picture(448, 448, 3), picture(90, 90, 4)])
        for new in (1, 5, 12)
    ]
    answers = [
        alone.generate(prompt, images, max_new_tokens=new, logprobs=2, ignore_eos=True).outputs[0]
        for prompt, images, new in kinds
    ]
    failed, near, asked = rt.stats()["requests"]["failed"], 0, []
    for _ in range(number):
        which = draw.randrange(len(kinds))
        prompt, images, new = kinds[which]
        ahead, salt = draw.random() < 0.5, str(draw.randrange(4))
        request = ask(rt, prompt, images, max_new_tokens=new, ignore_eos=True, ahead=ahead, cache_salt=salt)
        asked.append((which, request, draw.random() < 0.1))
        for _ in range(draw.randrange(3)):
            rt.engine.step()
        if draw.random() < 0.3:
            for _, old, aborts in draw.sample(asked, min(4, len(asked))):
                if aborts and old.finished is None:
                    rt.abort(old.request_id)
    for which, request, _ in asked:
        finish(rt, request)
        expected, got = answers[which], request.completions[0]
        if got.finish_reason == "abort":
            assert got.token_ids == expected.token_ids[: len(got.token_ids)]
        elif got.token_ids != expected.token_ids:
            assert_same_answer(expected, got)
            near += 1
    assert rt.stats()["requests"]["failed"] == failed
    assert_idle(rt.engine)
    return near
