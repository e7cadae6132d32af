"""Several engines behind the calls of one: the same answers, work shared, images back to where they were."""

import asyncio
import time

import pytest

from vitrail.runtime import Runtime
from vitrail.runtime.distributed.halves import Halves
from vitrail.runtime.errors import InvalidRequestError, VitrailError

from .tiny_model import assert_idle, assert_same_answer, picture, write_tiny_model


@pytest.fixture(scope="module")
def loaded(sentencepiece_folder):
    return Runtime.from_pretrained(write_tiny_model(sentencepiece_folder()), dtype="float32", device="cpu")


@pytest.fixture
def replicas(loaded):
    """A Runtime of two engines on one model in memory."""
    halves = [Halves(loaded.model), Halves(loaded.model)]
    with Runtime(loaded.model, loaded.tokenizer, max_num_seqs=4, halves=halves) as runtime:
        yield runtime
        for engine in runtime.engine.engines:
            while not engine.turns.idle:  # what was dropped ends with the step that runs
                time.sleep(0.001)
            assert_idle(engine)


def test_a_list_is_answered_as_by_one_engine_and_both_take_part(loaded, replicas):
    prompts = [f"question {number}" for number in range(12)]
    images = [[picture(90, 90, number)] for number in range(12)]
    expected = loaded.generate(prompts, images, max_new_tokens=6, logprobs=2)
    got = replicas.generate(prompts, images, max_new_tokens=6)
    for one, other in zip(expected, got, strict=True):
        assert_same_answer(one.outputs[0], other.outputs[0])
    assert all(next(engine._arrivals) > 0 for engine in replicas.engine.engines)
    stats = replicas.stats()
    assert stats["requests"]["finished"] == 12
    assert stats["kv_cache"]["blocks"] == sum(engine.blocks.num_blocks for engine in replicas.engine.engines)


def test_an_image_goes_back_to_the_engine_that_had_it(replicas):
    image = picture(90, 90, 1)
    for number in range(4):
        assert replicas.generate(f"again {number}", [image], max_new_tokens=2).text is not None
        replicas.generate(f"a text {number}", max_new_tokens=2)
    counts = [next(engine._arrivals) for engine in replicas.engine.engines]
    assert sorted(counts) == [0, 8], "one at a time, nobody was ever busier"
    long = "again " * 60  # more than a block of keys and values
    cached = [replicas.generate(long, [image], max_new_tokens=2).usage.cached_tokens for _ in range(3)]
    assert cached[0] == 0 < cached[1] == cached[2]


def test_streams_and_tasks_run_beside_each_other(loaded, replicas):
    expected = [loaded.generate(f"q {number}", max_new_tokens=5, logprobs=2) for number in range(4)]
    streams = [replicas.stream(f"q {number}", max_new_tokens=5) for number in range(4)]
    for one, stream in zip(expected, streams, strict=True):
        token_ids = [token for delta in stream for token in delta.token_ids]
        assert token_ids == one.token_ids

    async def ask():
        return await asyncio.gather(*(replicas.agenerate(f"q {number}", max_new_tokens=5) for number in range(4)))

    for one, other in zip(expected, asyncio.run(ask()), strict=True):
        assert_same_answer(one.outputs[0], other.outputs[0])


def test_a_request_is_aborted_wherever_it_is(replicas):
    streams = {
        f"r{n}": replicas.stream("long", max_new_tokens=400, ignore_eos=True, request_id=f"r{n}") for n in range(4)
    }
    for name, stream in streams.items():
        next(stream)
        assert replicas.abort(name)
        assert [delta.finish_reason for delta in stream][-1] == "abort"
    assert not replicas.abort("r0")


def test_what_one_engine_can_no_longer_do_the_other_does(replicas):
    dead, alive = replicas.engine.engines
    image = picture(90, 90, 1)
    replicas.generate("here", [image], max_new_tokens=2)
    dead.fail_all(VitrailError("rank 1 ended"))
    assert replicas.engine.failure is None
    assert replicas.generate("there", [image], max_new_tokens=2).finish_reason == "length"
    alive.fail_all(VitrailError("rank 1 ended"))
    assert "rank 1 ended" in str(replicas.engine.failure)
    with pytest.raises(VitrailError, match="rank 1 ended"):
        replicas.generate("nowhere", max_new_tokens=2)


def test_a_request_id_can_be_in_use_once(replicas):
    stream = replicas.stream("long", max_new_tokens=400, ignore_eos=True, request_id="same")
    with pytest.raises(InvalidRequestError, match="'same' is in use"):
        replicas.stream("another", request_id="same")
    stream.close()
