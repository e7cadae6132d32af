"""The language half over several processes: it answers as one process does, and ends as a whole."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.runtime.api import Runtime
from vitrail.runtime.config import load_config
from vitrail.runtime.distributed import ranks as ranks_module
from vitrail.runtime.distributed import tensor_parallel
from vitrail.runtime.distributed.halves import Halves
from vitrail.runtime.distributed.ranks import Ranks
from vitrail.runtime.errors import CapacityError, CheckpointError, ConfigError, VitrailError
from vitrail.runtime.quantization.config import QuantizationConfig
from vitrail.runtime.request import GenerationOutput
from vitrail.runtime.tokenizer import load_tokenizer
from vitrail.runtime.weights import NANO

from ...random_checkpoints import random_tiles
from ..tiny_model import assert_same_answer
from .test_worker import is_gone

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
RECEIPT, SIGN, TABLE = (str(EXAMPLES / f"{name}.png") for name in ("receipt", "sign", "table"))
ASKED: list[tuple[str, Any]] = [
    ("What is the total?", RECEIPT),
    ("What does the sign say?", SIGN),
    ("Which is the largest, and why? Tell me in many words.", None),
    ("What is in the picture?", [TABLE, SIGN]),
]
CPU = torch.device("cpu")
ROUNDING = QuantizationConfig(llm="int4", group_size=64, overrides={r"layers\.[01]\.": "int8"})
pytestmark = pytest.mark.filterwarnings("ignore:[0-9]+ linear layers are rounded to nearest")


class Lent(Halves):
    """Halves of a model whose ranks live longer than the runtime."""

    def close(self) -> None:
        """The ranks are the test's."""


def start(size: int, folder: Path = NANO, **keywords: Any) -> Ranks:
    options = {"dtype": torch.float32, "threads": 1, "progress": False, **keywords}
    return Ranks(folder, load_config(NANO), [CPU] * size, **options)


@contextmanager
def over(ranks: Ranks, **keywords: Any) -> Iterator[Runtime]:
    """A runtime whose language half is split over `ranks`."""
    halves = [Lent(ranks.model, ranks)]
    with Runtime(ranks.model, load_tokenizer(NANO), name="nano", halves=halves, **keywords) as runtime:
        yield runtime


def answers(runtime: Runtime, **keywords: Any) -> list[GenerationOutput]:
    questions, images = zip(*ASKED, strict=True)
    options = {"max_new_tokens": 16, "logprobs": 2, "ignore_eos": True, **keywords}
    return runtime.generate(list(questions), list(images), **options)


def assert_same_answers(expected: list[GenerationOutput], got: list[GenerationOutput]) -> None:
    for wanted, answer in zip(expected, got, strict=True):
        assert answer.finish_reason != "error", answer
        for one, other in zip(wanted.outputs, answer.outputs, strict=True):
            assert_same_answer(one, other)


@pytest.fixture(scope="module")
def one() -> Iterator[Runtime]:
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu") as runtime:
        yield runtime


@pytest.fixture(scope="module")
def expected(one: Runtime) -> list[GenerationOutput]:
    return answers(one)


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    ranks = start(2)
    yield ranks
    ranks.close()
    assert all(is_gone(worker.pid) for worker in ranks.workers)


@pytest.fixture
def two(pair: Ranks) -> Iterator[Runtime]:
    with over(pair) as runtime:
        yield runtime


def test_two_ranks_answer_as_one_does(two: Runtime, expected: list[GenerationOutput]) -> None:
    threads = torch.get_num_threads()
    assert_same_answers(expected, answers(two))
    assert torch.get_num_threads() == threads
    assert_same_answers(expected[:1], [two.generate(*ASKED[0], max_new_tokens=16, logprobs=2, ignore_eos=True)])


def test_two_ranks_reuse_what_a_prompt_begins_with(two: Runtime, expected: list[GenerationOutput]) -> None:
    for _ in range(2):
        got = answers(two)
    assert_same_answers(expected, got)
    assert got[0].usage.cached_tokens > 0


def test_two_ranks_draw_several_answers_to_one_prompt(two: Runtime, one: Runtime) -> None:
    drawn = {"n": 3, "temperature": 1.5, "seed": 7, "max_new_tokens": 8}  # whose blocks part by copies
    assert [out.token_ids for a in answers(two, **drawn) for out in a.outputs] == [
        out.token_ids for a in answers(one, **drawn) for out in a.outputs
    ]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Ranks of which one is killed by the last test that uses them."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        ranks = start(4, deterministic=True)
    yield ranks
    ranks.close()
    assert all(is_gone(worker.pid) for worker in ranks.workers)
    assert not list(folder.iterdir())


def test_four_ranks_answer_as_one_does_to_the_bit_whatever_runs_beside(
    four: Ranks, expected: list[GenerationOutput]
) -> None:
    with over(four, deterministic=True) as runtime:
        together = answers(runtime)
        assert_same_answers(expected, together)
        for index in (2, 0):
            alone = runtime.generate(*ASKED[index], max_new_tokens=16, logprobs=2, ignore_eos=True)
            assert alone.logprobs == together[index].logprobs


@pytest.mark.parametrize(
    "keywords",
    [
        {"max_num_batched_tokens": 48, "enable_prefix_caching": False},  # prompts in many chunks
        {"kv_cache_dtype": "int8"},
        {"deterministic": True, "max_num_seqs": 3},
    ],
    ids=lambda keywords: next(iter(keywords)),
)
def test_two_ranks_take_the_options_of_a_runtime(
    pair: Ranks, one: Runtime, expected: list[GenerationOutput], keywords: dict[str, Any]
) -> None:
    with over(pair, **keywords) as runtime:
        got = answers(runtime)
        if "deterministic" in keywords:
            alone = [runtime.generate(*ask, max_new_tokens=16, logprobs=2, ignore_eos=True) for ask in ASKED]
            assert [answer.logprobs for answer in alone] == [answer.logprobs for answer in got]
    if "kv_cache_dtype" in keywords:
        with Runtime(one.model, load_tokenizer(NANO), name="nano", **keywords) as alike:
            expected = answers(alike)
    assert_same_answers(expected, got)


@pytest.fixture(scope="module")
def rounded() -> Iterator[Ranks]:
    """Ranks with weights of 4 and 8 bits, which the last test that uses them ends."""
    ranks = start(2, quantization=ROUNDING, dtype=torch.bfloat16)
    yield ranks
    ranks.close()


def test_quantised_ranks_answer_as_one_does(rounded: Ranks) -> None:
    with over(rounded) as runtime:
        got = answers(runtime, ignore_eos=False)
    with Runtime.from_pretrained("nano", device="cpu", quantization=ROUNDING) as alike:
        expected = answers(alike, ignore_eos=False)
    # Sums are rounded to bfloat16 by rank, and so are inputs to int8: answers about which there is no doubt stay.
    assert [answer.text for answer in got[:2]] == [answer.text for answer in expected[:2]]
    assert got[0].text == "$25.90"
    for answer, reference in zip(got, expected, strict=True):
        assert answer.logprobs[0][0] == pytest.approx(reference.logprobs[0][0], abs=0.1)


def test_the_ranks_share_the_tiles_of_a_batch(
    two: Runtime, one: Runtime, pair: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    channel = pair.workers[0].channel

    def send(message: Any, send: Callable[[Any], None] = channel.send) -> None:
        sent.append(message)
        send(message)

    monkeypatch.setattr(channel, "send", send)
    tiles = random_tiles(5, 224)
    found, alone = two.engine.runner.encode(tiles), one.engine.runner.encode(tiles)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    assert [(call[0], len(call[1]), call[2]) for call in sent if isinstance(call, tuple)] == [("encode", 2, 3)]
    sent.clear()
    two.engine.runner.encode(tiles[:1])
    assert not sent


def test_ranks_that_share_a_host_share_its_memory(two: Runtime, one: Runtime) -> None:
    ours, theirs = two.engine.runner, one.engine.runner
    assert 2 * ours.block_bytes == theirs.block_bytes
    assert 0.4 < ours.spare_bytes(0.9) / theirs.spare_bytes(0.9) < 0.6


def test_memory_that_one_rank_lacks_is_given_to_none(
    two: Runtime, pair: Ranks, expected: list[GenerationOutput]
) -> None:
    runner, pid = two.engine.runner, pair.workers[0].pid
    answers(two)
    cache = runner.cache
    with pytest.raises(RuntimeError, match="memory"):  # what nobody has
        runner.allocate(10**12, keep=True)
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26, before[1]))
    try:
        with pytest.raises(CapacityError, match=r"rank 1 of the language half: .*memory"):
            runner.allocate(2**30 // runner.block_bytes, keep=True)
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, before)
    assert runner.cache is cache
    assert_same_answers(expected, answers(two))
    runner.allocate(cache.num_blocks + 1, keep=True)
    assert_same_answers(expected, answers(two))


def test_a_runner_whose_ranks_have_another_one_says_so(two: Runtime, pair: Ranks) -> None:
    with over(pair) as later:
        with pytest.raises(VitrailError, match="have another runner by now"):
            two.generate("Is there anybody?")
        assert later.generate(*ASKED[0]).text == "$25.90"


def test_a_model_that_is_split_cannot_be_run_past_its_runner(two: Runtime) -> None:
    with pytest.raises(VitrailError, match="is run by its runner alone"):
        two.model.language_model.embed(torch.tensor([1]))
    assert two.generate(*ASKED[0]).text == "$25.90"


def test_ranks_are_reached_from_this_host_alone(pair: Ranks) -> None:
    for pid in (os.getpid(), pair.workers[0].pid):
        links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
        for table in ("tcp", "tcp6"):
            rows = [line.split() for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
            ours = [row for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links]
            assert all(row[1].startswith("0100007F:") for row in ours)


def test_an_interrupt_waits_for_the_end_of_a_pass() -> None:
    done = []

    def interrupted() -> None:
        with tensor_parallel._uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append(True)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start jobs in the background without
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done


def test_the_death_of_a_rank_is_the_end_of_all(four: Ranks) -> None:
    heard: list[VitrailError] = []
    message = r"^rank 2 of the language half ended: signal 9 \(SIGKILL\)$"
    with over(four) as runtime:
        four.on_failure = heard.append
        stream = runtime.stream(ASKED[2][0], max_new_tokens=500, ignore_eos=True)
        for _ in range(3):
            next(stream)
        os.kill(four.workers[1].pid, signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(VitrailError, match=message):
            list(stream)
        with pytest.raises(VitrailError, match=message):
            runtime.generate("Is there anybody?")
        assert time.monotonic() - killed < 5
    assert [str(error) for error in heard] == [str(four.failure)]
    assert all(is_gone(worker.pid) for worker in four.workers[::2])  # the others, without having been asked


def test_an_error_that_the_others_cannot_know_of_is_the_end_of_all(
    rounded: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    with over(rounded) as runtime:
        runtime.generate("Is there anybody?", max_new_tokens=2)
        decoder = rounded.model.language_model
        monkeypatch.setattr(decoder.layers[1], "forward", lambda *_: 1 / 0)
        with pytest.raises(VitrailError, match=r"^the language half failed: ZeroDivisionError: division by zero$"):
            runtime.generate("Is there anybody?", max_new_tokens=2)
        monkeypatch.undo()
        with pytest.raises(VitrailError, match="ZeroDivisionError"):
            runtime.generate("Is there anybody?")
    assert is_gone(rounded.workers[0].pid)


def test_a_rank_that_hangs_in_a_step_is_the_end_of_all() -> None:
    ranks = start(2)
    with over(ranks) as runtime:
        runtime.generate("Is there anybody?", max_new_tokens=2)
        time.sleep(2.5)
        assert ranks.failure is None, "between steps nothing is due"
        ranks.max_step_s = 1.0
        os.kill(ranks.workers[0].pid, signal.SIGSTOP)
        with pytest.raises(VitrailError, match="a step took more than 1 s: rank 1 of the language half may hang"):
            runtime.generate("Is there anybody?", max_new_tokens=2)
    assert is_gone(ranks.workers[0].pid)
    ranks.close()


@pytest.mark.slow(smoke=False)
def test_ranks_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import time, torch\n"
        "from vitrail.runtime.config import load_config\n"
        "from vitrail.runtime.distributed.ranks import Ranks\n"
        "from vitrail.runtime.weights import NANO\n"
        "devices = [torch.device('cpu')] * 2\n"
        "ranks = Ranks(NANO, load_config(NANO), devices, dtype=torch.float32, threads=1, progress=False)\n"
        "print(*(worker.pid for worker in ranks.workers), flush=True)\n"
        "time.sleep(600)\n"
    )
    folder = tmp_path / "temporary"
    folder.mkdir()
    driver = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(folder)}
    )
    assert driver.stdout is not None
    try:
        pids = driver.stdout.readline().split()
    finally:
        driver.kill()
        driver.communicate()
    assert len(pids) == 1
    assert all(is_gone(int(pid)) for pid in pids)
    assert not list(folder.iterdir())


def test_a_rank_that_cannot_load_says_why_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[Any] = []

    def load(plan: Any, rank: int, groups: Any, progress: bool | None) -> None:
        """The driver loads nothing; the other rank looks into an empty folder."""

    def worker(*arguments: Any, worker: Any = ranks_module.Worker, **keywords: Any) -> Any:
        workers.append(worker(*arguments, **keywords))
        return workers[-1]

    monkeypatch.setattr(ranks_module, "_load", load)
    monkeypatch.setattr(ranks_module, "Worker", worker)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}: no model.safetensors"):
        start(2, tmp_path)
    assert len(workers) == 1
    assert is_gone(workers[0].pid)


def test_devices_that_cannot_work_together_are_refused_before_anything_starts() -> None:
    config = load_config(NANO)
    for devices, message in (
        (["cuda:0", "cuda:0"], "2 different GPUs, or CPUs only, not cuda:0, cuda:0"),
        (["cuda:0", "cpu"], "2 different GPUs, or CPUs only, not cuda:0, cpu"),
        (["cpu"] * 3, "tensor_parallel_size=3 does not divide the language half's num_key_value_heads 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            Ranks(NANO, config, [torch.device(name) for name in devices], dtype=torch.float32)
