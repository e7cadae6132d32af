"""The engine: every request gets the answer it would get alone, and leaves nothing behind however it ends."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.runtime.api import Runtime
from vitrail.runtime.engine import runner as runner_module
from vitrail.runtime.engine.engine import Engine
from vitrail.runtime.engine.processor import Conversation, Picture
from vitrail.runtime.errors import InvalidRequestError, VitrailError
from vitrail.runtime.layers.rotary import inverse_frequencies
from vitrail.runtime.models import decoder as decoder_module
from vitrail.runtime.models.decoder import Decoder
from vitrail.runtime.models.internvl import InternVLModel
from vitrail.runtime.request import GenerationConfig

from .random_requests import finish
from .tiny_model import NEAR_TIE, assert_idle, assert_same_answer, check_integrity, picture, write_tiny_model

ROWS = 4
PICTURES = (picture(90, 90, 1), picture(200, 100, 2), picture(100, 300, 3), picture(400, 330, 4))
# (question, pictures): short and long, without, with one and with several pictures of different tile counts.
QUESTIONS = (
    ("hello", ()),
    ("What is the total on the receipt? " * 4, ()),
    ("How many red circles are there?", (0,)),
    ("What is the total?", (1,)),
    ("compare", (2, 0)),
    ("<image> and then <image>, or <image>?", (3, 0, 1)),
)
names = (f"request-{number}" for number in count())


@pytest.fixture(scope="module")
def parts(sentencepiece_folder):
    runtime = Runtime.from_pretrained(write_tiny_model(sentencepiece_folder()), dtype="float32")
    return runtime.model, runtime.tokenizer


@pytest.fixture(scope="module")
def rt(parts):
    with Runtime(*parts, max_num_seqs=ROWS) as runtime:
        yield runtime


@pytest.fixture(scope="module", autouse=True)
def _checked_after_every_step():
    def checked(self, step=Engine._step):
        step(self)
        check_integrity(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_step", checked)
        yield


@pytest.fixture(autouse=True)
def _idle_afterwards(rt):
    yield
    assert_idle(rt.engine)


@pytest.fixture(scope="module")
def alone(rt):
    """`alone(which, config)`: the completions of `QUESTIONS[which]`, run with nothing beside it."""
    answers = {}

    def answer(which, config):
        if (which, config) not in answers:
            request = submit(rt, which, config.replace(logprobs=2))
            finish(rt, request)
            answers[which, config] = request.completions
        return answers[which, config]

    return answer


def submit(rt, which, config=None, request_id=None, **keywords):
    question, pictures = QUESTIONS[which]
    if pictures and "<image>" not in question:
        question = "<image>\n" * len(pictures) + question
    conversation = Conversation([(question, None)], [Picture(PICTURES[index]) for index in pictures])
    config = config or GenerationConfig(**{"max_new_tokens": 8, **keywords})
    return rt.engine.submit(request_id or next(names), rt.processor.prepare(conversation), config)


def prompt_of(rt, which):
    request = submit(rt, which)
    rt.engine.abort(request.request_id)
    return request.prepared.token_ids


def forget(rt):
    """As if nothing had been asked before."""
    rt.engine.vision_cache.clear()
    for block in list(rt.engine.blocks._idle):
        rt.engine.blocks._evict(block)


def assert_as_alone(alone, which, request):
    assert [sequence.finish_reason is not None for sequence in request.sequences] == [True] * len(request.sequences)
    for expected, got in zip(alone(which, request.config), request.completions, strict=True):
        assert_same_answer(expected, got)


# --- answers ---


def naive_greedy(rt, prepared, tiles, new_tokens):
    """The whole sequence again for every token: (tokens, how far each led the next best)."""
    model, tokens, leads = rt.model, [], []
    visual = model.encode_tiles(torch.cat([torch.from_numpy(part) for part in tiles])).flatten(0, 1) if tiles else None
    prompt = torch.tensor(prepared.token_ids)
    decoder = model.language_model
    spliced = decoder.embed(prompt) if visual is None else model.splice(prompt, visual, rt.engine.context_token_id)
    for _ in range(new_tokens):
        x = torch.cat((spliced, decoder.embed(torch.tensor(tokens, dtype=torch.long))))[None]
        hidden = decoder(x, torch.arange(x.shape[1])[None], inverse_frequencies(decoder.config, x.shape[1]))
        best, second = decoder.logits(hidden[0, -1]).topk(2).values.tolist()
        tokens.append(int(decoder.logits(hidden[0, -1]).argmax()))
        leads.append(best - second)
    return tokens, leads


@pytest.mark.parametrize("which", range(len(QUESTIONS)))
def test_tokens_are_those_of_the_whole_sequence_run_again_for_each(rt, which):
    request = submit(rt, which, ignore_eos=True)
    tiles = list(request.prepared.tiles)
    finish(rt, request)
    expected, leads = naive_greedy(rt, request.prepared, tiles, 8)
    near = next((index for index, lead in enumerate(leads) if lead < NEAR_TIE), None)
    assert request.completions[0].token_ids[:near] == expected[:near]


def test_a_repetition_penalty_counts_the_prompt_but_not_its_image(rt):
    word, context = prompt_of(rt, 3)[-1], rt.engine.context_token_id
    for penalty, token, expected in ((1.0, word, True), (100.0, word, False), (100.0, context, True)):
        request = submit(rt, 3, max_new_tokens=1, repetition_penalty=penalty, logit_bias={token: 30.0})
        finish(rt, request)
        assert (request.completions[0].token_ids == [token]) is expected


requests_drawn = st.lists(
    st.tuples(
        st.integers(0, len(QUESTIONS) - 1),
        st.builds(
            GenerationConfig,
            max_new_tokens=st.sampled_from([1, 2, 5, 12]),
            n=st.sampled_from([1, 1, 1, 2, 3]),
            seed=st.just(7),
            temperature=st.sampled_from([0.0, 0.0, 1.0]),
        ),
    ),
    min_size=1,
    max_size=6,
)


def check_batch(rt, alone, drawn):
    requests = [submit(rt, which, config) for which, config in drawn]
    finish(rt, *requests)
    for (which, _), request in zip(drawn, requests, strict=True):
        assert_as_alone(alone, which, request)
    assert_idle(rt.engine)


@settings(max_examples=25)
@given(drawn=requests_drawn)
def test_a_batch_gives_what_its_requests_give_alone(rt, alone, drawn):
    check_batch(rt, alone, drawn)


@pytest.mark.slow
@settings(max_examples=500)
@given(drawn=requests_drawn)
def test_many_batches_give_what_their_requests_give_alone(rt, alone, drawn):
    check_batch(rt, alone, drawn)


actions_drawn = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, len(QUESTIONS) - 1), st.sampled_from([1, 3, 8])),
        st.tuples(st.just("step"), st.integers(1, 4), st.none()),
        st.tuples(st.just("abort"), st.integers(0, 7), st.none()),
    ),
    max_size=24,
)


def check_actions(rt, alone, actions):
    submitted, aborted = [], set()
    for kind, number, max_new_tokens in actions:
        if kind == "submit":
            config = GenerationConfig(max_new_tokens=max_new_tokens, n=1 + number % 2, ignore_eos=True)
            submitted.append((number, submit(rt, number, config)))
        elif kind == "step":
            for _ in range(number):
                rt.engine.step()
        elif number < len(submitted):
            request = submitted[number][1]
            live = request.finished is None
            assert rt.engine.abort(request.request_id) is live
            if live:
                aborted.add(request.request_id)
        check_integrity(rt.engine)
    finish(rt, *(request for _, request in submitted))
    for which, request in submitted:
        if request.request_id not in aborted:
            assert_as_alone(alone, which, request)
            continue
        for expected, got in zip(alone(which, request.config), request.completions, strict=True):
            begun = len(got.token_ids)
            if got.token_ids == expected.token_ids[:begun]:
                assert expected.text.startswith(got.text.removesuffix("\ufffd"))
            else:
                assert_same_answer(expected, got)
    assert_idle(rt.engine)


@settings(max_examples=25)
@given(actions=actions_drawn)
def test_requests_that_come_and_go_disturb_no_other(rt, alone, actions):
    check_actions(rt, alone, actions)


@pytest.mark.slow
@settings(max_examples=500)
@given(actions=actions_drawn)
def test_many_requests_that_come_and_go_disturb_no_other(rt, alone, actions):
    check_actions(rt, alone, actions)


@settings(max_examples=10)
@given(order=st.lists(st.integers(0, 5), max_size=40))
def test_interleaved_streams_give_what_they_give_alone(rt, alone, order):
    requests = [submit(rt, which) for which in range(6)]
    streams = [rt.engine.stream(request) for request in requests]
    deltas = [[] for _ in streams]
    for index in order:
        deltas[index] += [delta] if (delta := next(streams[index], None)) else []
    for own, stream in zip(deltas, streams, strict=True):
        own += stream
    for which, (own, request) in enumerate(zip(deltas, requests, strict=True)):
        assert_as_alone(alone, which, request)
        assert "".join(delta.text for delta in own) == request.completions[0].text
        assert [token for delta in own for token in delta.token_ids] == request.completions[0].token_ids
        assert [delta.finish_reason for delta in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == request.completions[0].finish_reason


def test_threads_that_ask_at_once_get_what_they_get_alone(rt, alone):
    start = threading.Barrier(6)

    def ask(which):
        start.wait()
        requests = [submit(rt, (which + step) % 6) for step in range(3)]
        finish(rt, *requests)
        return requests

    with ThreadPoolExecutor(6) as pool:
        for which, requests in enumerate(pool.map(ask, range(6))):
            for step, request in enumerate(requests):
                assert_as_alone(alone, (which + step) % 6, request)


def test_several_completions_stream_with_their_index(rt, alone):
    request = submit(rt, 2, n=3, temperature=1.0, seed=7)
    deltas = list(rt.engine.stream(request))
    for index, completion in enumerate(request.completions):
        own = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in own) == completion.text
        assert [token for delta in own for token in delta.token_ids] == completion.token_ids
    assert_as_alone(alone, 2, request)


# --- rows and memory ---


def test_no_more_sequences_run_than_allowed(rt):
    requests = [submit(rt, index % 6, n=1 + index % 3) for index in range(8)]
    most = 0
    while rt.engine._requests:
        rt.engine.step()
        most = max(most, len(rt.engine.running))
    assert most == ROWS
    assert all(request.finished for request in requests)


def test_a_request_of_more_completions_than_rows_runs_by_itself(rt, alone):
    before, wide, after = submit(rt, 0), submit(rt, 2, n=ROWS + 2, temperature=1.0, seed=7), submit(rt, 3)
    together = set()
    while rt.engine._requests:
        rt.engine.step()
        together.add(frozenset(request.request_id for request, _ in rt.engine.running))
    assert {wide.request_id} in together
    assert not any(wide.request_id in ids and len(ids) > 1 for ids in together)
    for which, request in ((0, before), (2, wide), (3, after)):
        assert_as_alone(alone, which, request)


def test_cached_visual_tokens_hold_no_more_memory_than_is_counted(rt):
    rt.engine.vision_cache.clear()
    rt.generate(["a", "b", "c"], [[picture(90, 90, 100 + number)] for number in range(3)], max_new_tokens=1)
    entries = rt.engine.vision_cache._entries.values()
    assert len(entries) == 3
    for tokens, num_bytes in entries:  # they were encoded together
        assert tokens.untyped_storage().nbytes() == num_bytes


def test_the_cache_keeps_within_its_memory_and_requests_take_turns(parts, alone):
    with Runtime(*parts, max_num_seqs=ROWS) as rt:
        blocks = rt.engine.blocks
        blocks.give_up(1)
        requests = [submit(rt, which) for which in range(6)]
        assert blocks.limit == max(blocks.blocks_for(request.planned_length) for request in requests)
        blocks.limit *= 2
        rows = set()
        while rt.engine._requests:
            rt.engine.step()
            rows.add(len(rt.engine.running))
            assert rt.engine.runner.cache.num_blocks <= blocks.limit
        assert max(rows) >= 2
        for which, request in enumerate(requests):
            assert_as_alone(alone, which, request)
        # One that is larger than all memory set aside still runs, by itself.
        blocks.give_up(1)
        requests = [submit(rt, which) for which in range(3)]
        finish(rt, *requests)
        for which, request in enumerate(requests):
            assert_as_alone(alone, which, request)


def test_memory_that_cannot_be_had_fails_the_request_and_not_the_engine(parts, alone, monkeypatch):
    with Runtime(*parts, max_num_seqs=ROWS) as rt:
        rt.engine.blocks.give_up(1)
        first = submit(rt, 0, ignore_eos=True)
        rt.engine.step()

        def no_memory(*_args, **_keywords):
            raise torch.OutOfMemoryError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(runner_module, "KVCache", no_memory)
            second = submit(rt, 5)
            with pytest.raises(VitrailError, match="no memory"):
                finish(rt, second)
        third = submit(rt, 5)
        finish(rt, first, third)
        assert_as_alone(alone, 0, first)
        assert_as_alone(alone, 5, third)
        assert_idle(rt.engine)


# --- endings ---


def test_a_stream_closed_early_frees_its_rows(rt, alone):
    closed, other = submit(rt, 3, n=2, ignore_eos=True), submit(rt, 2)
    stream = rt.engine.stream(closed)
    next(stream)
    assert len(rt.engine.running) == 3
    stream.close()
    assert [request for request, _ in rt.engine.running] == [other]
    assert [completion.finish_reason for completion in closed.completions] == ["abort", "abort"]
    finish(rt, other)
    assert_as_alone(alone, 2, other)


@pytest.mark.parametrize("read", [0, 1])
def test_a_stream_that_is_dropped_frees_its_request(rt, read):
    stream = rt.engine.stream(submit(rt, 2))
    for _ in range(read):
        next(stream)
    del stream
    gc.collect()
    assert_idle(rt.engine)


def test_abort_ends_a_waiting_request_before_it_has_run(rt, alone):
    running = [submit(rt, 2) for _ in range(ROWS)]
    waiting = submit(rt, 3)
    rt.engine.step()
    assert rt.engine.abort(waiting.request_id)
    assert waiting.completions[0].token_ids == []
    assert waiting.completions[0].finish_reason == "abort"
    assert not rt.engine.abort(waiting.request_id)
    finish(rt, waiting, *running)
    for request in running:
        assert_as_alone(alone, 2, request)


def test_abort_ends_a_running_request_with_the_text_it_has(rt, alone):
    others = [submit(rt, which, max_new_tokens=12) for which in (2, 4)]
    aborted = submit(rt, 3, max_new_tokens=12, ignore_eos=True)
    others.append(submit(rt, 5, max_new_tokens=12))
    stream = rt.engine.stream(aborted)
    for _ in range(4):
        next(stream)
    assert rt.engine.abort(aborted.request_id)
    rest = list(stream)
    assert rest[-1].finish_reason == "abort"
    completion = aborted.completions[0]
    assert completion.finish_reason == "abort"
    config = aborted.config
    expected = alone(3, config)[0]
    assert completion.token_ids == expected.token_ids[: len(completion.token_ids)]
    assert 4 <= len(completion.token_ids) < 12
    finish(rt, *others)
    for which, request in zip((2, 4, 5), others, strict=True):
        assert_as_alone(alone, which, request)


def test_an_aborted_answer_has_the_text_that_a_stop_string_held_back(rt):
    finish(rt, whole := submit(rt, 3, ignore_eos=True))
    request = submit(rt, 3, ignore_eos=True, stop=whole.completions[0].text + " and more")
    stream = rt.engine.stream(request)
    assert "".join(next(stream).text for _ in range(4)) == ""
    rt.engine.abort(request.request_id)
    held = "".join(delta.text for delta in stream)
    assert held == request.completions[0].text == rt.tokenizer.decode(request.completions[0].token_ids)
    assert held


def test_abort_from_within_a_step_waits_for_its_end(rt, alone, monkeypatch):
    # As when the garbage collector closes a stream that was dropped, in the middle of this thread's step.
    dropped, kept = submit(rt, 3, ignore_eos=True), [submit(rt, which) for which in (2, 4)]
    rt.engine.step()
    embed = Decoder.embed

    def embed_and_abort(self, token_ids):
        assert rt.engine.abort(dropped.request_id) is (dropped.finished is None)
        return embed(self, token_ids)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "embed", embed_and_abort)
        rt.engine.step()
    assert dropped.completions[0].finish_reason == "abort"
    finish(rt, *kept)
    for which, request in zip((2, 4), kept, strict=True):
        assert_as_alone(alone, which, request)


def test_a_request_id_is_free_again_when_its_request_is_done(rt):
    first = submit(rt, 0, request_id="mine")
    with pytest.raises(InvalidRequestError, match="request id 'mine' is in use"):
        submit(rt, 0, request_id="mine")
    finish(rt, first)
    finish(rt, submit(rt, 0, request_id="mine"))


def test_a_stream_that_is_dropped_late_leaves_the_next_request_of_its_id_alone(rt, alone):
    stream = rt.engine.stream(submit(rt, 0, request_id="mine", n=2))
    while rt.engine._requests:
        next(stream)
    second = submit(rt, 2, request_id="mine")
    stream.close()
    finish(rt, second)
    assert_as_alone(alone, 2, second)


def test_closing_aborts_what_runs_and_what_waits(parts):
    rt = Runtime(*parts, max_num_seqs=2)
    requests = [submit(rt, which, ignore_eos=True) for which in range(4)]
    streams = [rt.engine.stream(request) for request in requests]
    next(streams[0])
    rt.close()
    assert_idle(rt.engine)
    assert [request.completions[0].finish_reason for request in requests] == ["abort"] * 4
    assert [list(stream)[-1].finish_reason for stream in streams] == ["abort"] * 4
    with pytest.raises(InvalidRequestError, match="closed"):
        rt.engine.submit("late", requests[0].prepared, requests[0].config)
    rt.close()


# --- failures ---


def assert_fails_alone(rt, alone, which, **keywords):
    """Of all questions asked at once, number `which` ends in an error and the others are answered."""
    requests = [submit(rt, index, **keywords) for index in range(ROWS)]
    for index, request in enumerate(requests):
        if index != which:
            finish(rt, request)
            assert_as_alone(alone, index, request)
            continue
        with pytest.raises(VitrailError) as caught:
            finish(rt, request)
        assert {completion.finish_reason for completion in request.completions} == {"error"}
    assert_idle(rt.engine)
    return caught.value


def test_a_request_whose_tiles_cannot_be_encoded_fails_alone(rt, alone, monkeypatch):
    forget(rt)
    broken = torch.from_numpy(rt.processor.tile(PICTURES[1])[0][0])
    encode_tiles = InternVLModel.encode_tiles

    def encode(self, tiles):
        if any(torch.equal(tile, broken) for tile in tiles):
            raise RuntimeError("a tile that breaks")
        return encode_tiles(self, tiles)

    with monkeypatch.context() as patch:
        patch.setattr(InternVLModel, "encode_tiles", encode)
        error = assert_fails_alone(rt, alone, 3)
    assert "a tile that breaks" in str(error)
    finish(rt, again := submit(rt, 3))
    assert_as_alone(alone, 3, again)


def test_a_request_that_breaks_the_prefill_fails_alone(rt, alone, monkeypatch):
    forget(rt)
    length = len(prompt_of(rt, 2))
    forward = Decoder.forward

    def forward_or_break(self, x, positions, inv_freq, kv):
        if length in kv.context_lens and kv.max_seqlen_q > 1:
            raise ValueError("a prompt that breaks")
        return forward(self, x, positions, inv_freq, kv)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", forward_or_break)
        error = assert_fails_alone(rt, alone, 2)
    assert isinstance(error.__cause__, ValueError)
    finish(rt, again := submit(rt, 2))
    assert_as_alone(alone, 2, again)


@pytest.mark.parametrize("at_token", [0, 3])
@pytest.mark.parametrize("which", range(ROWS))
def test_a_request_whose_logits_are_not_numbers_fails_alone(rt, alone, monkeypatch, which, at_token):
    accept, broken = Engine._accept, prompt_of(rt, which)

    def accept_with_nan(self, logits, rows):
        logits = logits.clone()
        for row, (request, sequence) in enumerate(rows):
            if request.prepared.token_ids == broken and len(sequence.token_ids) == at_token:
                logits[row, 5] = torch.nan
        accept(self, logits, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_accept", accept_with_nan)
        error = assert_fails_alone(rt, alone, which, ignore_eos=True)
    assert "not finite" in str(error)
    finish(rt, again := submit(rt, which))
    assert_as_alone(alone, which, again)


def test_one_completion_that_fails_ends_its_siblings(rt, monkeypatch):
    accept = Engine._accept

    def accept_with_nan(self, logits, rows):
        logits = logits.clone()
        for row, (_, sequence) in enumerate(rows):
            if sequence.index == 1 and len(sequence.token_ids) == 2:
                logits[row] = torch.nan
        accept(self, logits, rows)

    request = submit(rt, 2, n=3, ignore_eos=True)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_accept", accept_with_nan)
        with pytest.raises(VitrailError, match="not finite"):
            finish(rt, request)
    assert [completion.finish_reason for completion in request.completions] == ["error"] * 3


@pytest.mark.parametrize("at_token", [0, 2])
def test_nan_in_the_cache_of_one_request_never_reaches_another(rt, alone, monkeypatch, at_token):
    # A long request leaves NaN in its blocks; shorter ones that get them next fill them only in part.
    forget(rt)
    broken = submit(rt, 5, request_id="broken", ignore_eos=True, n=2)
    context = len(broken.prepared.token_ids) + at_token
    write = decoder_module.rope_and_cache

    def write_nan(qkv, cos, sin, k_cache, v_cache, slot_mapping, *args, **kwargs):
        q = write(qkv, cos, sin, k_cache, v_cache, slot_mapping, *args, **kwargs)
        table = rt.engine.blocks.table(broken.sequences[0])
        last = context - 1
        if last // 64 < len(table) and table[last // 64] * 64 + last % 64 in slot_mapping.tolist():
            k_cache[:], v_cache[:] = torch.nan, torch.nan
        return q

    with monkeypatch.context() as patch:
        patch.setattr(decoder_module, "rope_and_cache", write_nan)
        with pytest.raises(VitrailError, match="not finite"):
            finish(rt, broken)
    later = [submit(rt, which) for which in (0, 2, 5, 0)]
    finish(rt, *later)
    for which, request in zip((0, 2, 5, 0), later, strict=True):
        assert_as_alone(alone, which, request)


def test_a_step_that_raises_ends_only_the_request_that_came_last(rt, alone, monkeypatch):
    first, last = submit(rt, 3), submit(rt, 2, ignore_eos=True)
    rt.engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", lambda *_args: 1 / 0)
        rt.engine.step()
    assert last.completions[0].finish_reason == "error"
    with pytest.raises(VitrailError, match="ZeroDivisionError"):
        finish(rt, last)
    finish(rt, first)
    assert_as_alone(alone, 3, first)


def test_an_interrupt_ends_the_request_of_the_caller_it_meets_and_no_other(rt, alone, monkeypatch):
    forward = Decoder.forward

    def interrupted(self, x, *args):
        raise KeyboardInterrupt

    before = submit(rt, 0, ignore_eos=True)
    rt.engine.step()
    requests = [submit(rt, which) for which in (1, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish(rt, requests[0])
    assert Decoder.forward is forward
    assert requests[0].completions[0].finish_reason == "abort"
    finish(rt, requests[1], before)
    assert_as_alone(alone, 2, requests[1])
    assert_as_alone(alone, 0, before)


def test_a_token_id_beyond_the_vocabulary_is_refused_before_it_is_queued(rt):
    with pytest.raises(InvalidRequestError, match="vocabulary size"):
        submit(rt, 0, logit_bias={10**6: 1.0})
    with pytest.raises(InvalidRequestError, match="vocabulary size"):
        submit(rt, 0, stop_token_ids=[10**6])


def test_times_are_in_order(rt):
    request = submit(rt, 3, ignore_eos=True)
    finish(rt, request)
    metrics = request.metrics
    assert min(metrics.queue_ms, metrics.vision_ms, metrics.tpot_ms) >= 0
    assert metrics.vision_ms <= metrics.ttft_ms <= metrics.e2e_ms
    assert metrics.ttft_ms + 7 * metrics.tpot_ms == pytest.approx(metrics.e2e_ms)
    aborted = submit(rt, 3)
    rt.engine.abort(aborted.request_id)
    assert aborted.metrics.vision_ms == 0
    assert aborted.metrics.e2e_ms >= 0
