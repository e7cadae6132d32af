"""The engine with its vision half elsewhere: the same answers whenever tiles come back, and no end of it loses one."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.runtime import GenerationConfig, Runtime
from vitrail.runtime.engine.engine import Engine
from vitrail.runtime.engine.runner import Runner
from vitrail.runtime.errors import VitrailError
from vitrail.runtime.models.internvl import InternVLModel

from .random_requests import finish
from .tiny_model import assert_idle, assert_same_answer, check_integrity, picture, write_tiny_model
from .vision_workers import ThreadWorkers, split_runtime

ROWS = 4
SQUARE, WIDE, TALL, LARGE = picture(90, 90, 1), picture(200, 100, 2), picture(100, 300, 3), picture(400, 330, 4)
ASKED = (
    ("hello", ()),
    ("What is the total on the receipt? " * 4, ()),
    ("How many red circles are there?", (SQUARE,)),
    ("What is the total?", (WIDE,)),
    ("<image> and then <image>", (TALL, SQUARE)),
    ("<image> and then <image>, or <image>?", (LARGE, SQUARE, WIDE)),
)
names = (f"split-{number}" for number in count())


@pytest.fixture(scope="module")
def parts(sentencepiece_folder):
    runtime = Runtime.from_pretrained(write_tiny_model(sentencepiece_folder()), dtype="float32", device="cpu")
    return runtime.model, runtime.tokenizer


@pytest.fixture(scope="module")
def alone(parts):
    """`alone(which, **keywords)`: what a Runtime answers whose halves share a device, with nothing beside it."""
    answers = {}
    with Runtime(*parts, max_num_seqs=ROWS) as whole:

        def answer(which, **keywords):
            key = which, tuple(sorted(keywords.items()))
            if key not in answers:
                question, images = ASKED[which]
                answers[key] = whole.generate(question, list(images), logprobs=2, **keywords).outputs
            return answers[key]

        yield answer


@pytest.fixture(scope="module", autouse=True)
def _checked_after_every_step():
    def checked(self, step=Engine._step):
        step(self)
        check_integrity(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_step", checked)
        yield


@pytest.fixture
def make(parts):
    """`make(capacity, **options)`: a split Runtime and its workers, found idle at the end."""
    made = []

    def build(capacity=4, **options):
        workers = ThreadWorkers(parts[0], capacity)
        made.append((split_runtime(parts, workers, **{"max_num_seqs": ROWS, **options}), workers))
        return made[-1]

    yield build
    for runtime, workers in made:
        workers.gate.set()
        workers.settle()
        assert workers.most <= workers.capacity
        assert runtime.engine.scheduler.num_in_flight == 0
        assert_idle(runtime.engine)
        runtime.close()
        workers.close()


def ask(rt, which, **keywords):
    """A request that is queued and not waited for."""
    question, images = ASKED[which]
    conversation = rt._conversation(question, list(images), None, None, None)
    return rt._submit(conversation, GenerationConfig(**{"max_new_tokens": 8, **keywords}), next(names), ahead=False)


def assert_as_alone(alone, which, request, **keywords):
    for expected, got in zip(alone(which, **{"max_new_tokens": 8, **keywords}), request.completions, strict=True):
        assert_same_answer(expected, got)


# --- answers ---


@pytest.mark.parametrize("capacity", [1, 2, 16])
def test_answers_are_those_of_one_device_whatever_fits_the_workers(make, alone, capacity):
    rt, _ = make(capacity)
    requests = [ask(rt, which) for which in range(len(ASKED))]
    finish(rt, *requests)
    for which, request in enumerate(requests):
        assert_as_alone(alone, which, request)
        assert (request.metrics.vision_ms > 0) == bool(ASKED[which][1])


@pytest.fixture(scope="module")
def busy(parts):
    """A split Runtime of few blocks and no cache that hides what is encoded again, for many batches."""
    workers = ThreadWorkers(parts[0], 3)
    with split_runtime(parts, workers, max_num_seqs=ROWS, max_num_batched_tokens=64, vision_cache_gb=0) as rt:
        yield rt, workers
    workers.close()


actions = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, len(ASKED) - 1), st.sampled_from([1, 3, 8])),
        st.tuples(st.just("step"), st.integers(1, 6), st.none()),
        st.tuples(st.just("abort"), st.integers(0, 7), st.none()),
        st.tuples(st.just("preempt"), st.none(), st.none()),
    ),
    max_size=30,
)


def check_actions(busy, alone, actions):
    rt, workers = busy
    asked, aborted = [], set()
    for kind, number, new in actions:
        if kind == "ask":
            asked.append((number, new, ask(rt, number, max_new_tokens=new, ignore_eos=True, cache_salt=next(names))))
        elif kind == "step":
            for _ in range(number):
                rt.engine.step()
        elif kind == "abort" and number < len(asked):
            request = asked[number][2]
            if rt.engine.abort(request.request_id):
                aborted.add(request)
        elif kind == "preempt" and rt.engine.scheduler.running:
            with rt.engine.turns.turn():
                if rt.engine.scheduler.running:
                    victim = rt.engine.scheduler.running[-1]
                    rt.engine.scheduler.preempt(victim)
                    victim.visual.clear()
    finish(rt, *(request for _, _, request in asked))
    for which, new, request in asked:
        [got], [expected] = request.completions, alone(which, max_new_tokens=new, ignore_eos=True)
        if request not in aborted or got.token_ids != expected.token_ids[: len(got.token_ids)]:
            assert_same_answer(expected, got)
    workers.settle()
    assert_idle(rt.engine)


@settings(max_examples=30)
@given(actions=actions)
def test_requests_that_come_go_and_start_again_get_their_own_tiles(busy, alone, actions):
    check_actions(busy, alone, actions)


@pytest.mark.slow
@settings(max_examples=500)
@given(actions=actions)
def test_many_requests_that_come_go_and_start_again_get_their_own_tiles(busy, alone, actions):
    check_actions(busy, alone, actions)


def test_who_came_last_makes_room_while_tiles_are_away_and_is_answered_as_alone(make, alone):
    rt, _ = make(2, enable_prefix_caching=False, vision_cache_gb=0.0)
    rt.engine.blocks.give_up(1)
    keywords = {"max_new_tokens": 100, "ignore_eos": True}
    requests = [ask(rt, which, **keywords) for which in (3, 0, 2, 4)]
    rt.engine.blocks.limit += 3
    finish(rt, *requests)
    assert rt.stats()["requests"]["preempted"] > 0
    for which, request in zip((3, 0, 2, 4), requests, strict=True):
        assert_as_alone(alone, which, request, **keywords)


def test_deterministic_answers_are_the_same_to_the_bit_whenever_tiles_come_back(make, parts):
    options = {"deterministic": True, "max_num_batched_tokens": 64, "max_num_seqs": 20}
    rt, _ = make(5, **options)
    keywords = {"max_new_tokens": 5, "logprobs": 3, "ignore_eos": True}
    with Runtime(*parts, **options) as whole:
        expected = [whole.generate(prompt, list(images), **keywords).outputs for prompt, images in ASKED]
    for _ in range(2):
        requests = [ask(rt, which, **keywords, cache_salt=next(names)) for which in range(len(ASKED))]
        finish(rt, *requests)
        assert [request.completions for request in requests] == expected


def test_streams_threads_and_lists_share_the_workers(make, alone):
    rt, _ = make(3)

    def stream(which):
        prompt, images = ASKED[which]
        return [token for d in rt.stream(prompt, list(images), max_new_tokens=8) for token in d.token_ids]

    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(stream, which) for which in range(len(ASKED))]
        prompts, images = zip(*ASKED, strict=True)
        listed = pool.submit(rt.generate, list(prompts), [list(own) for own in images], max_new_tokens=8)
        for which, (task, output) in enumerate(zip(streams, listed.result(60), strict=True)):
            assert_same_answer(alone(which, max_new_tokens=8)[0], output.outputs[0])
            assert task.result(60) == output.token_ids


def test_pictures_seen_before_are_not_sent_again(make, alone):
    rt, workers = make()
    finish(rt, ask(rt, 5))
    calls = workers.calls
    assert calls == sum(ask_tiles(rt, 5))
    finish(rt, again := ask(rt, 5), salted := ask(rt, 3, cache_salt="tenant"))
    assert workers.calls == calls + sum(ask_tiles(rt, 3))
    assert_as_alone(alone, 5, again)
    assert_as_alone(alone, 3, salted)
    assert rt.stats()["vision_cache"]["hits"] > 0
    assert again.num_cached_tokens > 0


def ask_tiles(rt, which):
    prompt, images = ASKED[which]
    return rt.processor.prepare(rt._conversation(prompt, list(images), None, None, None)).num_tiles


def test_an_image_of_which_only_some_tiles_came_is_not_kept_as_if_it_were_whole(make):
    # As when its prompt is found in the prefix cache before the rest has come.
    rt, _ = make(1)
    request = ask(rt, 5)
    step_until(rt, lambda: 0 < request.images[0].num_encoded < request.images[0].num_tiles)
    with rt.engine.turns.turn():
        assert request.visual
        rt.engine.vision_stage.keep(request)
    assert not request.images[0].kept
    assert rt.engine.vision_cache.num_bytes == 0
    rt.abort(request.request_id)


# --- waiting ---


def test_who_waits_for_tiles_sleeps_and_texts_are_answered_meanwhile(make, alone, monkeypatch):
    rt, workers = make()
    workers.gate.clear()
    steps = count()
    step = Engine._step
    monkeypatch.setattr(Engine, "_step", lambda self: (next(steps), step(self)))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(rt.generate, *ASKED[3], max_new_tokens=8)
        while not workers.calls:
            assert not waiting.done()
        before = next(steps)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        assert next(steps) - before <= 3, "it does not sleep"
        text = rt.generate(ASKED[0][0], max_new_tokens=8)
        assert_same_answer(alone(0, max_new_tokens=8)[0], text.outputs[0])
        assert not waiting.done()
        workers.gate.set()
        assert_same_answer(alone(3, max_new_tokens=8)[0], waiting.result(30).outputs[0])


def test_a_prompt_begins_with_the_tiles_that_are_there(make, alone, monkeypatch):
    rt, _ = make(1)
    ends = []
    forward = Runner.forward
    monkeypatch.setattr(Runner, "forward", lambda self, rows: (ends.append(rows[0].context), forward(self, rows))[1])
    finish(rt, request := ask(rt, 5))
    assert len(ends) > request.prepared.num_tiles[0]
    assert_as_alone(alone, 5, request)


# --- endings ---


def step_until(rt, condition):
    for _ in range(300):
        if condition():
            return
        rt.engine.step()
    pytest.fail("never came to that")


@pytest.mark.parametrize("stage", ["queued", "sent", "partly back", "decode"])
def test_a_request_can_be_aborted_at_every_stage_and_late_tiles_are_dropped(make, alone, stage):
    rt, workers = make(2)
    other = ask(rt, 2, max_new_tokens=30, ignore_eos=True)
    victim = ask(rt, 5, ignore_eos=True)
    encoded = [image.num_tiles for image in victim.images]
    if stage == "sent":
        step_until(rt, lambda: other.started)
        workers.gate.clear()
    conditions = {
        "queued": lambda: True,
        "sent": lambda: rt.engine.scheduler.num_in_flight and any(image.num_sent for image in victim.images),
        "partly back": lambda: 0 < sum(image.num_encoded for image in victim.images) < sum(encoded),
        "decode": lambda: len(victim.sequences[0].token_ids) == 3,
    }
    step_until(rt, conditions[stage])
    assert rt.abort(victim.request_id)
    workers.gate.set()
    workers.settle()
    assert victim.completions[0].finish_reason == "abort"
    assert not victim.visual
    assert not victim.loaded
    finish(rt, other)
    assert_as_alone(alone, 2, other, max_new_tokens=30, ignore_eos=True)


def test_closing_while_tiles_are_away_ends_everything_and_late_tiles_hurt_nobody(parts):
    workers = ThreadWorkers(parts[0])
    rt = split_runtime(parts, workers, max_num_seqs=ROWS)
    workers.gate.clear()
    requests = [ask(rt, which) for which in (3, 5)]
    with ThreadPoolExecutor(1) as pool:
        driving = pool.submit(finish, rt, requests[0])  # which sleeps until tiles come, or the end
        while not workers.calls:
            assert not driving.done()
        rt.close()
        driving.result(30)
    assert {request.completions[0].finish_reason for request in requests} == {"abort"}
    workers.gate.set()
    workers.settle()
    assert_idle(rt.engine)
    workers.close()


# --- failures ---


def test_a_tile_that_breaks_a_worker_fails_its_request_alone(make, alone, parts, monkeypatch):
    rt, _ = make()
    broken = torch.from_numpy(rt.processor.tile(WIDE)[0][1])
    encode_tiles = InternVLModel.encode_tiles

    def encode(self, tiles):
        if any(torch.equal(tile, broken) for tile in tiles):
            raise RuntimeError("a tile that breaks")
        return encode_tiles(self, tiles)

    expected = [alone(which, max_new_tokens=8) for which in (0, 2, 4)]
    with monkeypatch.context() as patch:
        patch.setattr(InternVLModel, "encode_tiles", encode)
        requests = [ask(rt, which) for which in (0, 2, 3, 4)]
        with pytest.raises(VitrailError, match="a tile that breaks"):
            finish(rt, requests[2])
        finish(rt, requests[0], requests[1], requests[3])
    for wanted, request in zip(expected, (requests[0], requests[1], requests[3]), strict=True):
        assert_same_answer(wanted[0], request.completions[0])
    finish(rt, again := ask(rt, 3))
    assert_as_alone(alone, 3, again)


@pytest.mark.parametrize("mistake", ["raises", "too few tokens"])
def test_workers_that_misbehave_fail_the_requests_with_images_and_no_text(make, alone, mistake):
    rt, workers = make()

    def encode(tiles, done):
        if mistake == "raises":
            raise RuntimeError("too few tokens, or none")
        done(torch.zeros(1, 1))

    workers.encode = encode
    text, image = ask(rt, 0), ask(rt, 3)
    with pytest.raises(VitrailError, match=r"vision workers: .*tokens"):
        finish(rt, image)
    finish(rt, text)
    assert_as_alone(alone, 0, text)


@pytest.mark.parametrize("told", [True, False])
def test_the_end_of_the_language_half_ends_every_request_and_refuses_new_ones(parts, told):
    workers = ThreadWorkers(parts[0])
    rt = split_runtime(parts, workers, max_num_seqs=ROWS)
    finish(rt, ask(rt, 0))
    workers.gate.clear()
    waiting, running = ask(rt, 3), ask(rt, 0, max_new_tokens=500, ignore_eos=True)
    with ThreadPoolExecutor(1) as pool:
        driving = pool.submit(finish, rt, waiting)
        while len(running.sequences[0].token_ids) < 3:
            assert not driving.done()
        error = VitrailError("rank 1 of the language half ended: signal 9 (SIGKILL)")
        if told:
            rt.engine.fail_all(error)
        else:
            rt.engine.runner.failure = error
        with pytest.raises(VitrailError, match="rank 1"):
            driving.result(30)
    with pytest.raises(VitrailError, match="rank 1"):
        finish(rt, running)
    with pytest.raises(VitrailError, match="rank 1"):
        ask(rt, 0)
    workers.gate.set()
    workers.settle()
    assert_idle(rt.engine)
    rt.close()
    workers.close()


def test_a_pass_that_the_end_of_the_language_half_breaks_reports_that_end(parts, monkeypatch):
    workers = ThreadWorkers(parts[0])
    with split_runtime(parts, workers, max_num_seqs=ROWS) as rt:

        def broken(self, rows):
            self.failure = VitrailError("rank 1 ended")
            raise RuntimeError("connection closed by peer")

        monkeypatch.setattr(Runner, "forward", broken)
        requests = [ask(rt, 0), ask(rt, 3)]
        for request in requests:
            with pytest.raises(VitrailError, match="rank 1 ended"):
                finish(rt, request)
        workers.settle()
    workers.close()


# --- what is known of it ---


def test_stats_and_a_timeline_tell_of_both_halves(make, tmp_path):
    rt, workers = make()
    with rt.trace(tmp_path / "trace.json"):
        output = rt.generate(*ASKED[5], max_new_tokens=4, ignore_eos=True)
    assert output.metrics.vision_ms > 0
    assert output.metrics.ttft_ms <= output.metrics.e2e_ms
    stats = rt.stats()
    assert json.loads(json.dumps(stats)) == stats
    assert stats["tiles"] == {"encoded": sum(output.num_tiles), "loaded": sum(output.num_tiles)}
    assert stats["vision_workers"] == {"workers": 1, "alive": 1, "tiles_in_flight": 0, "capacity": 4}
    assert {"transfer", "vision", "prefill", "decode"} <= stats["stages"].keys()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["name"] == "vision" for event in events) == workers.calls


def test_visual_tokens_of_tiles_outside_a_request_come_from_the_workers(make, parts):
    rt, workers = make(2)
    tiles = torch.from_numpy(rt.processor.tile(LARGE)[0])
    tokens = rt.engine.vision_stage.encode(tiles)
    assert workers.calls == -(-len(tiles) // 2)
    torch.testing.assert_close(tokens, parts[0].encode_tiles(tiles).flatten(0, 1), atol=1e-5, rtol=1e-5)
