"""A whole tiny model in a folder, pictures to show it, and what must hold of its engine at all times."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vitrail.runtime.engine.engine import Engine
from vitrail.runtime.request import Completion
from vitrail.runtime.tokenizer import load_tokenizer

from ..random_checkpoints import chat_config, random_weights, write_checkpoint

# Runs whose best two logits are nearer than this may part: rows of a batch are summed in another order.
NEAR_TIE = 1e-4


def write_tiny_model(folder: Path, architecture: str = "InternLM2ForCausalLM", **changes: Any) -> Path:
    """Put `config.json` and random weights beside the tokenizer that `folder` holds; `changes` are for the config."""
    llm = {"vocab_size": load_tokenizer(folder).vocab_size, "max_position_embeddings": 1024, **changes.pop("llm", {})}
    tiling = {"dynamic_image_size": True, "use_thumbnail": True, "max_dynamic_patch": 6}
    config = chat_config(architecture, llm=llm, **{"system_message": "Answer.", **tiling, **changes})
    write_checkpoint(folder, config, random_weights(config))
    return folder


def picture(width: int, height: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """(height, width, 3) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(num_frames: int = 12) -> bytes:
    """A short video, 96 x 64. Skips the test where PyAV is not installed."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(num_frames):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(96, 64, number), format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def assert_same_answer(expected: Completion, got: Completion) -> None:
    """The tokens are equal, or differ first where it was all but a tie. `expected` was made with `logprobs=2`."""
    assert expected.logprobs is not None
    for index, (wanted, token) in enumerate(zip(expected.token_ids, got.token_ids, strict=False)):
        if wanted != token:
            _, (_, best), (_, second) = expected.logprobs[index]
            assert best - second < NEAR_TIE, f"token {index} is {token}, not {wanted}, by {best - second}"
            return
    assert (got.token_ids, got.text, got.finish_reason) == (
        expected.token_ids,
        expected.text,
        expected.finish_reason,
    )


def check_integrity(engine: Engine) -> None:
    """Every live request is in exactly one place, and what runs, and nothing else, has blocks of the cache."""
    engine.scheduler.check_integrity()
    engine.vision_cache.check_integrity()
    for request, sequence in engine.running:
        assert sequence.finish_reason is None
        assert request.finished is None
        assert engine._requests[request.request_id] is request
    if engine.running and not engine.closed and engine.runner.cache is not None:
        assert engine.runner.cache.num_blocks >= engine.blocks.num_blocks
    placed = [*engine.scheduler.running, *engine.scheduler.waiting, *engine.preparation.waiting]
    placed += [request for request in engine.preparation.loading if request.finished is None]
    assert len({request.request_id for request in placed}) == len(placed)
    assert {request.request_id for request in placed} <= set(engine._requests)  # others are still in the inbox


def assert_idle(engine: Engine) -> None:
    """No request, row or turn is held."""
    check_integrity(engine)
    assert not engine._requests
    assert not engine.running
    assert not engine.scheduler
    assert not engine.preparation.waiting
    assert engine.blocks.num_used == 0
    with ThreadPoolExecutor(1) as other:
        other.submit(lambda: engine.closed or engine.step()).result(timeout=10)
    assert engine.turns.idle
