"""What a step sends to a GPU: one copy from one buffer, the same numbers, none overwritten while it is on its way."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitrail.runtime.engine.runner import Row, Runner
from vitrail.runtime.engine.upload import ALIGNMENT, Upload, carve, packed_size
from vitrail.runtime.layers.kv_cache import KVCache
from vitrail.runtime.layers.rotary import inverse_frequencies

from ..random_checkpoints import build, chat_config, random_weights

CPU = torch.device("cpu")
DTYPES = st.sampled_from([torch.int64, torch.int32, torch.float32])


class Device:
    """Stands for a GPU: copies to it are under way until somebody waits for them, and read the host only then."""

    def __init__(self) -> None:
        self.under_way: list[tuple[Tensor, Tensor]] = []
        self.num_copies = 0

    def copy_(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        assert non_blocking
        self.num_copies += 1
        self.under_way.append((target, source))
        return target

    def synchronize(self) -> None:
        for target, source in self.under_way:
            target.numpy()[:] = source.numpy()
        self.under_way.clear()

    def record(self, stream: object) -> None:
        assert self.under_way


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    fake = Device()
    monkeypatch.setattr(Tensor, "copy_", lambda *args, **options: fake.copy_(*args, **options))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    return fake


@pytest.fixture
def upload(device: Device) -> Upload:
    one = Upload(CPU)
    one._copied = device
    return one


@given(st.lists(st.tuples(DTYPES, st.lists(st.integers(0, 5), min_size=1, max_size=2)), min_size=1, max_size=6))
def test_what_is_carved_is_what_was_sent_and_begins_where_kernels_want_it(drawn) -> None:
    tensors = [torch.randint(-9, 9, shape).to(dtype) for dtype, shape in drawn]
    memory = Upload(CPU)(tensors)
    assert len(memory) == packed_size(tensors)
    for sent, got in zip(tensors, carve(memory, tensors), strict=True):
        assert torch.equal(sent, got)
        assert sent.dtype == got.dtype
        assert (got.data_ptr() - memory.data_ptr()) % ALIGNMENT == 0


def test_what_is_sent_into_given_memory_stays_where_a_graph_reads_it() -> None:
    upload, memory = Upload(CPU), torch.zeros(256, dtype=torch.uint8)
    first = [torch.arange(3), torch.arange(5, dtype=torch.int32)]
    views = carve(upload(first, into=memory), first)
    upload([tensor + 7 for tensor in first], into=memory)
    assert [view.tolist() for view in views] == [[7, 8, 9], [7, 8, 9, 10, 11]]
    assert views[0].data_ptr() == memory.data_ptr()


def test_tensors_of_any_strides_can_be_sent() -> None:
    tensors = [torch.arange(12).view(3, 4).T, torch.arange(8)[::2]]
    for sent, got in zip(tensors, carve(Upload(CPU)(tensors), tensors), strict=True):
        assert torch.equal(sent, got)


def test_the_buffer_is_not_written_while_it_is_being_read(device: Device, upload: Upload) -> None:
    steps = [[torch.full((size,), size), torch.full((3,), -size, dtype=torch.int32)] for size in (4, 4, 90, 2, 4)]
    memories = [upload(step) for step in steps]
    assert device.num_copies == len(steps)  # one each
    assert len(device.under_way) == 1  # the host is ahead by one
    device.synchronize()
    for step, memory in zip(steps, memories, strict=True):
        assert all(torch.equal(sent, got) for sent, got in zip(step, carve(memory, step), strict=True))


@pytest.fixture(scope="module")
def parts() -> Callable[[], Runner]:
    config = chat_config()
    model = build(config, random_weights(config), torch.float32)

    def make() -> Runner:
        runner = Runner(model, max_num_seqs=4, max_model_len=256, enforce_eager=True)
        runner.allocate(12, keep=False)
        return runner

    return make


class Counted(Upload):
    """Counts what is sent."""

    copies = 0

    def __call__(self, tensors, into=None) -> Tensor:
        self.copies += 1
        return super().__call__(tensors, into)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_runner_that_sends_its_steps_gives_what_one_gives_that_has_them_at_hand(parts, graphs) -> None:
    plain, sending = parts(), parts()
    llm = plain.config.llm
    # As on a GPU: laid out elsewhere than in the cache itself.
    sending._upload = Counted(CPU)
    sending._install(sending.cache)
    assert sending._layout is not None
    assert sending._layout.num_blocks == 0
    if graphs:
        sending.capture = lambda run: run
        sending._install(sending.cache)
        assert sending._decode is not None
        sending._decode._upload = sending._upload
    inv_freq = [inverse_frequencies(llm) * factor for factor in (1.0, 0.5, 0.25)]
    prompts, tables = [range(5, 75), range(9, 20), [7]], [[3, 1], [0], [5]]

    def run(runner: Runner) -> list[Tensor]:
        rows = [Row(ids, len(ids), table, *more) for ids, table, *more in zip(prompts, tables, inv_freq, strict=True)]
        rows[0].visual.append((4, torch.ones(2, llm.hidden_size)))
        results = [runner.forward(rows[:1]), runner.forward(rows[1:])]
        alone = torch.cat([runner.forward([row]) for row in rows[1:]])
        torch.testing.assert_close(results[1], alone, rtol=0, atol=2e-6 * alone.abs().max().item())
        for step, chosen in enumerate(([0, 1, 2], [2], [1, 0])):
            ids, contexts = [step + 3] * len(chosen), [len(prompts[row]) + 1 + step for row in chosen]
            frequencies = torch.stack([inv_freq[row] for row in chosen])
            results.append(runner.decode(ids, contexts, frequencies, [tables[row] for row in chosen]).clone())
        return results

    for expected, got in zip(run(plain), run(sending), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6 if graphs else 0)  # 3 rows are padded to 4
    assert sending._upload.copies == 7  # one a pass
    assert isinstance(plain.cache, KVCache)
    torch.testing.assert_close(sending.cache.keys, plain.cache.keys, rtol=0, atol=2e-6 if graphs else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True])
@torch.inference_mode()
def test_on_a_gpu_steps_that_follow_at_once_give_what_those_give_that_wait(enforce_eager) -> None:
    config = chat_config()
    model = build(config, random_weights(config), torch.float32).to("cuda", torch.bfloat16)
    inv_freq = inverse_frequencies(config.llm).cuda()
    results = []
    for wait in (True, False):
        runner = Runner(model, max_num_seqs=4, max_model_len=256, enforce_eager=enforce_eager)
        runner.allocate(12, keep=False)
        logits = []
        for step in range(24):
            table = [step % 3, 3 + step % 3]
            for size in (40, 1 + step % 7):  # chunks of a prompt, whose results nobody waits for
                logits.append(runner.forward([Row(range(step, step + size), 40 + step % 9, table, inv_freq)]))
            rows = 1 + step % 3
            tables = [[row, 3 + row] for row in range(rows)]
            logits.append(runner.decode([step] * rows, [50] * rows, inv_freq.expand(rows, -1), tables).clone())
            if wait:
                torch.cuda.synchronize()
        results.append(torch.cat(logits))
    assert torch.equal(*results)
