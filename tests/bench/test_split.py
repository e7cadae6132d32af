"""What the benchmark of the split makes of token times, and that every contender answers every request."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitrail.bench.split import (
    DOCUMENTS,
    MIXED,
    Answer,
    measure,
    process_contenders,
    requests,
    row_of,
    stream_contenders,
)
from vitrail.runtime.api import Runtime
from vitrail.runtime.engine.runner import Runner

from ..runtime.vision_workers import ThreadWorkers

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "split.py"


def test_a_row_is_made_of_all_rounds() -> None:
    first, second = Answer(0.0, [0.5, 0.6, 0.8]), Answer(10.0, [10.1, 10.3])
    row = row_of("one process", "closed, 2", [[first], [second]])
    assert row["requests_per_s"] == pytest.approx(2 / 1.1)
    assert row["output_tokens_per_s"] == pytest.approx(5 / 1.1)
    assert row["ttft_p50_ms"] == pytest.approx(300)
    assert row["itl_p50_ms"] == pytest.approx(200)


@pytest.fixture(scope="module")
def runtime():
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu") as runtime:
        yield runtime


def check(rows, systems, number, new_tokens) -> None:
    assert [row["system"] for row in rows] == [one.name for one in systems] * 2
    assert {row["requests"] for row in rows} == {number}
    assert all(row["output_tokens_per_s"] / row["requests_per_s"] == pytest.approx(new_tokens) for row in rows)


def test_one_process_and_two_answer_the_same_load(runtime) -> None:
    prompts = requests(runtime, MIXED, 12, 0)
    assert {sum(prompt.num_tiles) for prompt in prompts} == set(MIXED)
    workers = ThreadWorkers(runtime.model, capacity=8)
    systems = process_contenders(runtime, workers)[1:]  # a second thread would share its core with another test
    threads = torch.get_num_threads()
    try:
        check(list(measure(runtime, systems, MIXED, number=3, rounds=1, new_tokens=2)), systems, 3, 2)
    finally:
        torch.set_num_threads(threads)
    assert workers.calls > 0
    systems[-1].engine.close()
    workers.close()


def test_two_streams_and_one_answer_documents_and_each_encodes_on_its_own(runtime, monkeypatch) -> None:
    runner = runtime.engine.runner
    streams = {"two streams": None, "one stream": torch.Stream("cpu")}
    used: list[tuple[object, int]] = []

    def encode(self, tiles):
        used.append((self.vision_stream, len(tiles)))
        with monkeypatch.context() as patch:
            patch.setattr(self, "vision_stream", None)  # a CPU has none
            return encode_beside(self, tiles)

    encode_beside = Runner.encode_beside
    monkeypatch.setattr(Runner, "encode_beside", encode)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: streams["one stream"])
    systems = stream_contenders(runtime)
    assert [one.name for one in systems] == list(streams)
    try:
        check(list(measure(runtime, systems, DOCUMENTS, number=1, rounds=1, new_tokens=2)), systems, 1, 2)
    finally:
        runner.vision_stream = None
    for stream in streams.values():  # to warm up, in the closed loop, and as they come
        assert sum(tiles for one, tiles in used if one is stream) == 3 * 13


@pytest.mark.slow(smoke=False)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_without_a_gpu_its_part_says_so_and_exits_with_status_2() -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (2, "split.py: measures a GPU, and no CUDA device is present\n")
