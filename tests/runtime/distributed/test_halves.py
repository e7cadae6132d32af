"""`Runtime.from_pretrained` over several devices: the same answers, and nothing left when it is closed."""

import pytest
import torch

from vitrail.runtime import Runtime
from vitrail.runtime.engine.replicas import Replicas
from vitrail.runtime.errors import ConfigError, UnsupportedError

from ..tiny_model import assert_same_answer, picture
from .processes import children

QUESTIONS = ["What is the total?", "What is on the sign?", "Which bar is the highest?", "How many shapes are there?"]
IMAGES = [[picture(300, 200, number)] for number in range(3)] + [[]]


@pytest.fixture(scope="module")
def expected():
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu") as runtime:
        yield runtime, runtime.generate(QUESTIONS, IMAGES, max_new_tokens=8, logprobs=2)


@pytest.mark.parametrize(
    ("options", "num_processes"),
    [
        ({"llm_devices": ["cpu", "cpu"], "vision_devices": ["cpu"]}, 1),
        pytest.param({"tensor_parallel_size": 2, "placement": "split"}, 2, marks=pytest.mark.slow),  # README runs it
        ({"llm_devices": ["cpu"], "placement": "replicas"}, 0),
    ],
    ids=["two replicas and a vision half", "tensor parallel and a vision half", "a single replica"],
)
def test_every_placement_gives_the_same_answers(expected, options, num_processes):
    one, outputs = expected
    before = children()
    with Runtime.from_pretrained("nano", dtype="float32", **options) as runtime:
        started = children() - before
        assert len(started) == num_processes
        for wanted, got in zip(outputs, runtime.generate(QUESTIONS, IMAGES, max_new_tokens=8), strict=True):
            assert_same_answer(wanted.outputs[0], got.outputs[0])
        tokens = runtime.encode_image(IMAGES[0][0]).tokens
        torch.testing.assert_close(tokens, one.encode_image(IMAGES[0][0]).tokens, rtol=1e-4, atol=1e-4)
        if num_processes:
            with pytest.raises(UnsupportedError, match="the vision half is in other processes"):
                runtime.features(IMAGES[0][0])
        assert isinstance(runtime.engine, Replicas) == (len(options.get("llm_devices", [1])) > 1)
    assert not children() & started


def test_a_mistake_found_after_loading_leaves_no_process():
    before = children()
    with pytest.raises(ConfigError, match="max_model_len 9999 exceeds"):
        Runtime.from_pretrained("nano", vision_devices=["cpu"], max_model_len=9999)
    assert children() <= before


def test_what_does_not_go_together_is_refused_before_loading(monkeypatch):
    monkeypatch.setattr("vitrail.runtime.api.open_halves", pytest.fail)
    with pytest.raises(ConfigError, match=r"vision_backend='onnxruntime' runs in one process"):
        Runtime.from_pretrained("nano", vision_backend="onnxruntime", vision_devices=["cpu"])
    with pytest.raises(ConfigError, match="vision_devices"):
        Runtime.from_pretrained("nano", placement="colocated", vision_devices=["cpu"])
