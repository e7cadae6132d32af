"""The scheduler by itself: what it lends and runs is right after every step, and the wait between tokens is bounded."""

import random
from dataclasses import dataclass, field
from hashlib import sha256

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from vitrail.runtime.engine.batch import Batch, Image, RequestState, SequenceState, Tiles
from vitrail.runtime.engine.block_manager import BlockManager
from vitrail.runtime.engine.scheduler import Scheduler

CONTEXT = 0  # the token that stands for visual ones
BLOCK = 4


@dataclass(eq=False)
class Job(RequestState):
    """A request that answers `answer` tokens each, and what a model would have of it."""

    answer: int = 1
    encoded: dict[int, set[int]] = field(default_factory=dict)
    done: bool = False


def job(arrival, text, images=(), n=1, answer=3, salt=b""):
    """`images`: (key, tiles) each, two tokens a tile, one after the other behind the first token."""
    prompt, places = [text[0]], []
    for key, tiles in images:
        places.append(Image(len(prompt), 2 * tiles, tiles, key=key.ljust(32)))
        prompt += [CONTEXT] * (2 * tiles) + [1]
    prompt += text[1:]
    return Job(
        arrival,
        prompt,
        len(prompt) + answer,
        places,
        [SequenceState(index) for index in range(n)],
        prefix_key=sha256(salt).digest(),
        answer=answer,
    )


class Model:
    """Runs batches on blocks that remember what was written to them, and trusts nothing it is told.

    away: tiles that the devices of the vision half hold, where it has any of its own.
    """

    def __init__(self, scheduler: Scheduler[Job]) -> None:
        self.scheduler = scheduler
        self.memory: dict[tuple[int, int], bytes] = {}
        self.away: list[Tiles[Job]] = []

    def run(self, batch: Batch[Job]) -> None:
        for source, target in batch.copies:
            for offset in range(BLOCK):
                self.memory.pop((target, offset), None)
                if (source, offset) in self.memory:
                    self.memory[target, offset] = self.memory[source, offset]
        for request in batch.preempted:
            request.encoded.clear()
        for tiles in batch.tiles:
            if self.scheduler.tiles_in_flight is None:
                assert len(tiles.request.encoded.get(tiles.place, ())) == tiles.first
                self._encode(tiles)
            else:
                self.away.append(tiles)
        assert len(self.away) == self.scheduler.num_in_flight
        for chunk in batch.chunks:
            self._write(chunk)
        for chunk in batch.chunks:
            self._advance(chunk)

    def bring(self, number: int) -> bool:
        """One of the tiles that are away comes back; returns whether it is wanted."""
        tiles = self.away.pop(number)
        wanted = self.scheduler.arrived(tiles)
        if wanted:
            assert not tiles.request.done
            self._encode(tiles)
        return wanted

    def _encode(self, tiles) -> None:
        held = tiles.request.encoded.setdefault(tiles.place, set())
        fresh = set(range(tiles.first, tiles.first + tiles.count))
        assert not held & fresh, "encoded twice"
        held |= fresh

    def _write(self, chunk) -> None:
        request, sequence = chunk.request, chunk.request.sequences[chunk.index]
        table = self.scheduler.blocks.table(sequence)
        assert sequence.num_computed == chunk.start < chunk.end <= request.length(sequence)
        assert chunk.samples == (chunk.end == request.length(sequence))
        for place, image in enumerate(request.images):
            if image.end > chunk.start and image.start < chunk.end:
                there = request.encoded.get(place, set())
                ready = image.start + 2 * next(tile for tile in range(image.num_tiles + 1) if tile not in there)
                assert image.kept or min(chunk.end, image.end) <= ready, "visual tokens that are not there"
        for position, name in enumerate(names(request, sequence, chunk.end)):
            slot = table[position // BLOCK], position % BLOCK
            if position >= chunk.start:
                self.memory[slot] = name
            assert self.memory.get(slot) == name, f"position {position} holds something else"

    def _advance(self, chunk) -> None:
        request = chunk.request
        fresh = not request.started
        self.scheduler.update(chunk)
        if not chunk.samples:
            return
        for sequence in request.sequences if fresh else [request.sequences[chunk.index]]:
            sequence.token_ids.append(2 + (len(sequence.token_ids) + sequence.index) % 3)
            if len(sequence.token_ids) == request.answer:
                sequence.finish_reason = "length"
                self.scheduler.finish(sequence)
        if all(sequence.finish_reason for sequence in request.sequences):
            self.scheduler.remove(request)
            request.done = True


def names(request, sequence, end):
    """What the keys and values at each position depend on: everything before it, images by what they show."""
    name, shown = request.prefix_key, []
    for position, token in enumerate(request.tokens(sequence, 0, end)):
        shown += [image.key for image in request.images if image.start == position]
        name = sha256(name + bytes([token]) + b"".join(shown)).digest()
        yield name


def scheduler_of(num_blocks=12, rows=3, tokens=12, **options) -> Scheduler[Job]:
    return Scheduler(BlockManager(num_blocks, BLOCK), max_num_seqs=rows, max_num_batched_tokens=tokens, **options)


def run_out(scheduler, model, most=2000):
    steps = 0
    while scheduler:
        batch = scheduler.schedule()
        model.run(batch)
        if model.away and (steps % 3 == 0 or not batch.chunks):
            model.bring(steps % len(model.away))
        scheduler.check_integrity()
        steps += 1
        assert steps < most, "somebody starves"
    return steps


# --- any order of events ---

texts = st.lists(st.integers(1, 3), min_size=1, max_size=14)
pictures = st.lists(st.tuples(st.sampled_from([b"cat", b"dog"]), st.integers(1, 3)), max_size=2)


class Schedules(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(12, 24),
        rows=st.integers(1, 4),
        tokens=st.sampled_from([1, 3, 8, 64]),
        caching=st.booleans(),
        exact=st.sampled_from([False, False, True]),
        in_flight=st.sampled_from([None, None, 1, 2, 5]),
    )
    def begin(self, num_blocks, rows, tokens, caching, exact, in_flight):
        limit = num_blocks + 12
        self.scheduler = Scheduler(
            BlockManager(num_blocks, BLOCK, limit=limit),
            max_num_seqs=rows,
            max_num_batched_tokens=tokens,
            enable_prefix_caching=caching,
            exact=exact,
            tiles_in_flight=in_flight,
        )
        self.model = Model(self.scheduler)
        self.jobs: list[Job] = []

    @rule(
        text=texts,
        images=pictures,
        n=st.sampled_from([1, 1, 2, 3]),
        answer=st.integers(1, 9),
        salt=st.sampled_from([b"", b"", b"other"]),
    )
    def add(self, text, images, n, answer, salt):
        new = job(len(self.jobs), text, images, n, answer, salt)
        blocks = self.scheduler.blocks
        if n * blocks.blocks_for(new.planned_length) <= blocks.limit:
            self.jobs.append(new)
            self.scheduler.add(new)

    @precondition(lambda self: self.scheduler)
    @rule(times=st.integers(1, 5))
    def step(self, times):
        for _ in range(times):
            first = next(iter(self.scheduler.running), None)
            batch = self.scheduler.schedule()
            assert bool(batch.tiles or batch.chunks or self.model.away) or not self.scheduler
            if first is not None:
                moved = {id(part.request) for part in (*batch.tiles, *batch.chunks)}
                moved |= {id(tiles.request) for tiles in self.model.away}
                # Behind tiles that nobody wants any more it may have to wait for room.
                assert id(first) in moved or len(self.model.away) == self.scheduler.tiles_in_flight, "it stands still"
                assert first not in batch.preempted or first.arrival > 0
            prompt = sum(chunk.end - chunk.start for chunk in batch.chunks if not chunk.decodes)
            most = max(self.scheduler.max_num_batched_tokens, 2, self.scheduler.exact * self.scheduler.chunk_tokens)
            if self.scheduler.tiles_in_flight is None:
                prompt += 2 * batch.num_tiles
            assert prompt <= most
            ahead = sum(image.num_sent for waiting in self.scheduler.waiting for image in waiting.images)
            assert 2 * ahead <= self.scheduler.max_num_batched_tokens
            self.model.run(batch)
            self.scheduler.check_integrity()

    @precondition(lambda self: self.model.away)
    @rule(numbers=st.lists(st.integers(0, 9), min_size=1, max_size=4))
    def arrive(self, numbers):
        for number in numbers[: len(self.model.away)]:
            self.model.bring(number % len(self.model.away))
            self.scheduler.check_integrity()

    @precondition(lambda self: any(not one.done for one in self.jobs))
    @rule(data=st.data())
    def abort(self, data):
        victim = data.draw(st.sampled_from([one for one in self.jobs if not one.done]))
        self.scheduler.remove(victim)
        victim.done = True

    @precondition(lambda self: self.scheduler.running and not self.scheduler.exact)
    @rule()
    def preempt(self):
        victim = self.scheduler.running[-1]
        self.scheduler.preempt(victim)
        victim.encoded.clear()

    @precondition(lambda self: not self.scheduler.running)
    @rule()
    def lose_memory(self):
        self.scheduler.blocks.give_up(max(12, self.scheduler.blocks.num_blocks - 3))
        for waiting in list(self.scheduler.waiting):
            if (
                waiting.num_rows * self.scheduler.blocks.blocks_for(waiting.planned_length)
                > self.scheduler.blocks.limit
            ):
                self.scheduler.remove(waiting)
                waiting.done = True

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self):
        if hasattr(self, "scheduler"):
            run_out(self.scheduler, self.model)
            assert all(one.done for one in self.jobs)
            assert self.scheduler.blocks.num_used == 0
            assert not any(self.model.bring(0) for _ in range(len(self.model.away)))
            assert self.scheduler.num_in_flight == 0


def test_any_order_of_events_leaves_every_block_right_and_every_request_served() -> None:
    run_state_machine_as_test(Schedules, settings=settings(max_examples=150, stateful_step_count=25))


@pytest.mark.slow
def test_many_orders_of_events_leave_every_block_right_and_every_request_served() -> None:
    run_state_machine_as_test(Schedules, settings=settings(max_examples=1000, stateful_step_count=50))


# --- single rules ---


def test_tiles_of_several_requests_share_a_batch_and_so_do_their_prompts() -> None:
    scheduler = scheduler_of(tokens=64)
    for arrival in range(3):
        scheduler.add(job(arrival, [1, 2], [(b"cat", 1 + arrival)]))
    batch = scheduler.schedule()
    assert [tiles.count for tiles in batch.tiles] == [1, 2, 3]
    assert [(chunk.start, chunk.end, chunk.samples) for chunk in batch.chunks] == [(0, 5, 1), (0, 7, 1), (0, 9, 1)]


def test_a_prompt_is_cut_where_the_budget_ends_even_between_the_tokens_of_a_tile() -> None:
    scheduler, one = scheduler_of(tokens=7), job(0, [1, 2, 2, 2, 2], [(b"cat", 3)])
    model = Model(scheduler)
    scheduler.add(one)
    borders = []
    while not one.started:
        batch = scheduler.schedule()
        borders += [(batch.num_tiles, [(chunk.start, chunk.end) for chunk in batch.chunks])]
        model.run(batch)
    assert borders == [(3, [(0, 1)]), (0, [(1, 8)]), (0, [(8, 12)])]


def test_rows_that_decode_go_on_while_a_prompt_comes_in_and_share_its_pass() -> None:
    scheduler = scheduler_of(num_blocks=40, tokens=6)
    model = Model(scheduler)
    scheduler.add(job(0, [1, 2], answer=9))
    model.run(scheduler.schedule())
    scheduler.add(job(1, [3] * 13, answer=2))
    passes = []
    for _ in range(3):
        batch = scheduler.schedule()
        passes.append([(chunk.request.arrival, chunk.end - chunk.start) for chunk in batch.chunks])
        model.run(batch)
    assert passes == [[(0, 1), (1, 6)], [(0, 1), (1, 6)], [(0, 1), (1, 1)]]


def test_a_prefix_is_shared_by_tokens_images_and_salt_and_by_nothing_else() -> None:
    scheduler = scheduler_of(num_blocks=60, tokens=64)
    model = Model(scheduler)
    hits = []
    for arrival, (text, images, salt) in enumerate(
        [
            ([1] * 10, [(b"cat", 3)], b""),
            ([1] * 10, [(b"cat", 3)], b""),
            ([1] * 9 + [2], [(b"cat", 3)], b""),
            ([1] * 10, [(b"dog", 3)], b""),
            ([1] * 10, [(b"cat", 3)], b"other"),
            ([1] * 10, [], b""),
        ]
    ):
        scheduler.add(one := job(arrival, text, images, salt=salt))
        run_out(scheduler, model)
        hits.append(one.num_cached_tokens)
    assert hits == [0, 16, 16, 0, 0, 0]


def test_an_image_that_the_shared_prefix_covers_is_not_encoded_again() -> None:
    scheduler = scheduler_of(num_blocks=60, tokens=64)
    model = Model(scheduler)
    scheduler.add(job(0, [1] * 10, [(b"cat", 3)]))
    run_out(scheduler, model)
    scheduler.add(job(1, [1] * 10, [(b"cat", 3), (b"dog", 2)]))
    batch = scheduler.schedule()
    assert [(tiles.place, tiles.count) for tiles in batch.tiles] == [(1, 2)]


def test_completions_share_the_blocks_of_their_prompt_and_copy_the_last_when_they_write() -> None:
    scheduler, one = scheduler_of(num_blocks=40, rows=4), job(0, [1] * 6, n=3, answer=2)
    model = Model(scheduler)
    scheduler.add(one)
    model.run(scheduler.schedule())
    assert scheduler.blocks.num_used == 2
    batch = scheduler.schedule()
    assert len(batch.copies) == 2
    assert scheduler.blocks.num_used == 4
    model.run(batch)


def test_the_request_that_came_last_makes_room_and_runs_again_in_its_turn() -> None:
    scheduler = scheduler_of(num_blocks=6, rows=3, enable_prefix_caching=False)
    model = Model(scheduler)
    jobs = [job(arrival, [1] * 6, answer=12) for arrival in range(2)]
    for one in jobs:
        scheduler.add(one)
    preempted, finished = [], []
    while scheduler:
        batch = scheduler.schedule()
        preempted += [one.arrival for one in batch.preempted]
        model.run(batch)
        finished += [one.arrival for one in jobs if one.done and one.arrival not in finished]
    assert preempted == [1]
    assert finished == [0, 1]


def test_nobody_is_served_before_one_that_came_earlier_and_waits_for_room() -> None:
    scheduler = scheduler_of(num_blocks=8)
    model = Model(scheduler)
    jobs = [job(0, [1] * 14, answer=10), job(1, [2] * 16, answer=2), job(2, [3], answer=1)]
    for one in jobs:
        scheduler.add(one)
    while not jobs[1].started:
        model.run(scheduler.schedule())
        assert not jobs[2].started or jobs[1].started


def test_tiles_are_encoded_ahead_while_all_rows_are_taken() -> None:
    scheduler = scheduler_of(num_blocks=60, rows=1, tokens=6)
    model = Model(scheduler)
    scheduler.add(job(0, [1], answer=20))
    model.run(scheduler.schedule())
    for arrival in (1, 2, 3):
        scheduler.add(job(arrival, [1], [(b"cat", 2)]))
    ahead = []
    for _ in range(4):
        batch = scheduler.schedule()
        ahead += [(tiles.request.arrival, tiles.count) for tiles in batch.tiles]
        model.run(batch)
    assert ahead == [(1, 2), (2, 1)]  # of three tokens' room for tiles, as many as the budget of one step holds


def test_exact_chunks_end_at_multiples_and_depend_on_nothing_else() -> None:
    def borders(beside, warm):
        scheduler = scheduler_of(num_blocks=200, rows=8, tokens=8, exact=True)
        model = Model(scheduler)
        assert scheduler.chunk_tokens == 8
        if warm:
            scheduler.add(job(0, [1] * 17, [(b"cat", 2)]))
            run_out(scheduler, model)
        for arrival in range(beside):
            scheduler.add(job(1 + arrival, [2 + arrival % 2] * (3 + arrival), [(b"dog", 1)], answer=9))
        scheduler.add(one := job(50, [1] * 20, [(b"cat", 2)]))
        found = []
        while not one.started:
            batch = scheduler.schedule()
            found += [(chunk.start, chunk.end) for chunk in batch.chunks if chunk.request is one]
            model.run(batch)
        run_out(scheduler, model)
        return found

    alone = borders(0, False)
    assert alone == [(0, 8), (8, 16), (16, 24), (24, 25)]
    assert borders(5, False) == alone
    assert borders(5, True) == alone[2:]


# --- the vision half on devices of its own ---


def test_tiles_are_sent_as_far_as_there_is_room_those_of_running_requests_first() -> None:
    scheduler = scheduler_of(num_blocks=60, rows=1, tokens=8, tiles_in_flight=5)
    model = Model(scheduler)
    scheduler.add(job(1, [1], [(b"cat", 1)]))
    model.run(scheduler.schedule())  # what came later and had been admitted already
    for arrival, tiles in ((2, 2), (3, 2), (4, 3)):
        scheduler.add(job(arrival, [1], [(b"cat", tiles)]))
    model.run(scheduler.schedule())
    sent = [(tiles.request.arrival, tiles.first, tiles.count) for tiles in model.away]
    assert sent == [(1, 0, 1), (2, 0, 1), (2, 1, 1), (3, 0, 1), (3, 1, 1)]
    assert not scheduler.schedule().tiles  # until something comes back
    assert model.bring(1)
    assert not scheduler.schedule().tiles  # eight tokens' worth wait for the language half, or will
    assert model.bring(0)
    model.run(scheduler.schedule())
    run_out(scheduler, model)


def test_tokens_behind_a_tile_that_is_not_back_are_not_counted() -> None:
    scheduler, one = scheduler_of(tokens=64, tiles_in_flight=8), job(0, [1, 2], [(b"cat", 3)])
    model = Model(scheduler)
    scheduler.add(one)
    model.run(scheduler.schedule())
    counted = []
    for number in (2, 0, 0):
        assert model.bring(number)
        counted.append(one.images[0].num_encoded)
    assert counted == [0, 1, 3]
    assert [(chunk.start, chunk.end) for chunk in scheduler.schedule().chunks] == [(1, 9)]


@pytest.mark.parametrize("gone", [False, True])
def test_tiles_of_a_request_that_is_gone_or_began_anew_are_ignored_and_take_room_until_then(gone) -> None:
    scheduler, one = scheduler_of(tokens=64, tiles_in_flight=3), job(0, [1, 2], [(b"cat", 3)])
    model = Model(scheduler)
    scheduler.add(one)
    model.run(scheduler.schedule())
    assert model.bring(1)
    if gone:
        scheduler.remove(one)
        one.done = True
        scheduler.add(one := job(1, [1, 2], [(b"cat", 3)]))
    else:
        scheduler.preempt(one)
        one.encoded.clear()
    model.run(scheduler.schedule())
    assert [tiles.first for tiles in model.away] == [0, 2, 0]
    assert model.bring(2)
    assert one.images[0].num_encoded == 1  # whatever else is on its way
    assert [model.bring(0), model.bring(0)] == [False, False]
    assert one.images[0].num_encoded == 1
    model.run(scheduler.schedule())
    assert [model.bring(0) for _ in range(2)] == [True] * 2
    assert one.images[0].num_encoded == 3
    run_out(scheduler, model)


def test_a_prompt_takes_the_tiles_that_are_there_but_holds_up_nobody_for_scraps() -> None:
    def ends(decoding):
        scheduler = scheduler_of(num_blocks=60, tokens=64, chunk_tokens=5, tiles_in_flight=8)
        model = Model(scheduler)
        if decoding:
            scheduler.add(job(0, [1], answer=50))
            model.run(scheduler.schedule())
        scheduler.add(one := job(1, [1, 2], [(b"cat", 4)]))
        found = []
        while not one.started:
            batch = scheduler.schedule()
            found += [chunk.end for chunk in batch.chunks if chunk.request is one]
            model.run(batch)
            if model.away:
                model.bring(0)
        return found

    assert ends(decoding=False) == [1, 3, 5, 7, 11]
    assert ends(decoding=True) == [5, 10, 11]  # five tokens at a time beside a row that decodes, or what is left


@pytest.mark.parametrize("order", range(4))
def test_exact_chunks_do_not_depend_on_when_tiles_come_back(order) -> None:
    draw = random.Random(order)
    scheduler = scheduler_of(num_blocks=200, rows=8, tokens=8, exact=True, tiles_in_flight=6)
    model = Model(scheduler)
    scheduler.add(job(0, [2] * 9, [(b"dog", 2)], answer=40))
    scheduler.add(one := job(1, [1] * 20, [(b"cat", 2), (b"dog", 3)]))
    borders = []
    while not one.started:
        batch = scheduler.schedule()
        borders += [chunk.end for chunk in batch.chunks if chunk.request is one]
        model.run(batch)
        for _ in range(draw.randrange(3)):
            if model.away:
                model.bring(draw.randrange(len(model.away)))
    assert borders == [8, 16, 24, 32]


# --- the bound, in simulated time ---

# Milliseconds on an A100 by the placement model: a decode step, a tile of InternViT-6B, a prompt token of the 20B.
DECODE, TILE, TOKEN = 35.0, 49.0, 0.148


def longest_wait(chunk_tokens):
    """The longest wait between two tokens of an answer while documents arrive, in simulated milliseconds."""
    size, tile_tokens, draw = 64, 256, random.Random(0)
    scheduler: Scheduler[Job] = Scheduler(BlockManager(5000, size), max_num_seqs=32, chunk_tokens=chunk_tokens)
    arrivals, clock = [], 0.0
    for number in range(60):
        clock += draw.expovariate(1 / 900)
        tiles = draw.choice([0, 1, 13])
        prompt = [CONTEXT] * (tiles * tile_tokens) + [1 + number % 200] * draw.randint(8, 400)
        images = [Image(0, tiles * tile_tokens, tiles, key=bytes([number]) * 32)] if tiles else []
        answer = draw.randint(4, 200)
        key = number.to_bytes(32, "big")
        one = Job(number, prompt, len(prompt) + answer, images, [SequenceState(0)], key, answer=answer)
        arrivals.append((clock, one))
    now, waits, last, first_waits = 0.0, [0.0], {}, []
    came = {id(one): when for when, one in arrivals}
    while arrivals or scheduler:
        if not scheduler:
            now = max(now, arrivals[0][0])
        while arrivals and arrivals[0][0] <= now:
            scheduler.add(arrivals.pop(0)[1])
        batch = scheduler.schedule()
        decodes = any(chunk.decodes for chunk in batch.chunks)
        prompt = sum(chunk.end - chunk.start for chunk in batch.chunks if not chunk.decodes)
        now += DECODE * decodes + TILE * batch.num_tiles + TOKEN * prompt
        for chunk in batch.chunks:
            scheduler.update(chunk)
            if not chunk.samples:
                continue
            request, sequence = chunk.request, chunk.request.sequences[0]
            if id(request) in last:
                waits.append(now - last[id(request)])
            else:
                first_waits.append(now - came[id(request)])
            last[id(request)] = now
            sequence.token_ids.append(1)
            if len(sequence.token_ids) == request.answer:
                sequence.finish_reason = "length"
                scheduler.remove(request)
    assert len(first_waits) == 60
    assert not any(request_id not in last for request_id in came)
    return max(waits)


def test_the_wait_between_two_tokens_is_bounded_while_documents_arrive() -> None:
    # A step holds 512 tokens' worth at most: two tiles of 256 visual tokens, which take longer than 512 tokens do.
    bound = DECODE + max(2 * TILE, 512 * TOKEN)
    assert DECODE < longest_wait(512) <= bound
    assert longest_wait(8192) > 4 * bound  # what the bound saves
