"""Two runtimes of one model: what is compared, and how."""

import pytest
import torch
from PIL import Image

from vitrail.runtime import Runtime, comparison
from vitrail.runtime.calibration import read_examples
from vitrail.runtime.comparison import compare, distance
from vitrail.runtime.errors import InvalidRequestError

from .tiny_model import picture, write_tiny_model


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index, size in enumerate(((90, 60), (200, 90))):
        Image.fromarray(picture(*size, index)).save(folder / f"{index}.png")
    return read_examples(folder, 2)


@pytest.fixture(scope="module")
def tiny(sentencepiece_folder):
    return {"model": write_tiny_model(sentencepiece_folder()), "dtype": "float32", "device": "cpu"}


def test_a_model_is_no_distance_from_itself(tiny, examples) -> None:
    found = compare(tiny, tiny, examples, max_new_tokens=6)
    assert found.visual_cosine_min == pytest.approx(1, abs=1e-5)
    assert found.logit_kl == pytest.approx(0, abs=1e-6)
    assert (found.equal_answers, found.equal_tokens) == (1, 1)
    assert [pair.image for pair in found.answers] == ["0.png", "1.png"]
    assert all(pair.a == pair.b for pair in found.answers)
    assert found.to_dict()["answers"][0]["prompt"] == examples[0].prompt


def test_distances_are_those_of_the_two_models(tiny, examples) -> None:
    other = {**tiny, "quantization": "int8-weight", "vision_quantization": "int8-weight", "dtype": "bfloat16"}
    found = compare(tiny, other, examples, max_new_tokens=6, max_tiles=1)
    assert 1e-6 < found.logit_kl < 0.01
    assert 0.999 < found.visual_cosine_min < found.visual_cosine_mean < 0.999999


def test_the_second_is_judged_along_the_firsts_answers(tiny, examples, monkeypatch) -> None:
    """The expectations of both, made again by hand from whole sequences."""
    read = []

    def noted(runtime, prompt, visual, answer, max_new_tokens):
        log_probs = compute(runtime, prompt, visual, answer, max_new_tokens)
        read.append((answer, log_probs))
        return log_probs

    compute = comparison._log_probs
    monkeypatch.setattr(comparison, "_log_probs", noted)
    other = {**tiny, "dtype": "bfloat16"}
    found = compare(tiny, other, examples, max_new_tokens=5, max_tiles=1)
    assert [answer for answer, _ in read[:2]] == [answer for answer, _ in read[2:]]
    with Runtime.from_pretrained(**tiny) as runtime:
        for example, (answer, log_probs) in zip(examples, read[:2], strict=True):
            output = runtime.generate(
                example.prompt, list(example.images), max_tiles=1, max_new_tokens=5, temperature=0, logprobs=1
            )
            assert output.token_ids == answer
            chosen = [entry[0] for entry in output.logprobs]
            assert log_probs[:-1].gather(1, torch.tensor(answer)[:, None]).flatten().tolist() == pytest.approx(
                chosen, abs=1e-4
            )
    expected = torch.cat([distance(a[1], b[1]) for a, b in zip(read[:2], read[2:], strict=True)]).mean()
    assert found.logit_kl == pytest.approx(float(expected))


def test_the_distance_is_the_kullback_leibler_divergence() -> None:
    a = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]).log()
    b = torch.tensor([[0.25, 0.5, 0.25], [1 / 3, 1 / 3, 1 / 3]]).log()
    expected = 0.5 * torch.tensor(2.0).log() - 0.25 * torch.tensor(2.0).log()
    torch.testing.assert_close(distance(a, b), torch.stack((expected, torch.tensor(0.0))), atol=1e-7, rtol=1e-6)


def test_only_one_of_the_two_is_loaded_at_a_time(tiny, examples, monkeypatch) -> None:
    alive = []
    load, close = Runtime.from_pretrained.__func__, Runtime.close

    def loaded(cls, *arguments, **keywords):
        assert not alive
        alive.append(load(cls, *arguments, **keywords))
        return alive[-1]

    def closed(self):
        alive.remove(self)
        close(self)

    monkeypatch.setattr(Runtime, "from_pretrained", classmethod(loaded))
    monkeypatch.setattr(Runtime, "close", closed)
    compare(tiny, tiny, examples[:1], max_new_tokens=2)
    assert not alive


def test_answers_are_counted_by_prompt_and_by_token(tiny, examples, monkeypatch) -> None:
    answers = iter([[5, 6, 7], [8, 9], [5, 6, 8, 9], [8, 9]])

    class Said:
        def __init__(self, token_ids):
            self.token_ids, self.text = token_ids, str(token_ids)

    monkeypatch.setattr(Runtime, "generate", lambda *_, **__: Said(next(answers)))
    found = compare(tiny, tiny, examples, max_new_tokens=6, max_tiles=1)
    assert found.equal_answers == 0.5
    assert found.equal_tokens == (2 + 2) / (4 + 2)


def test_models_that_read_prompts_differently_are_not_compared(tiny, examples, sentencepiece_folder) -> None:
    other = {**tiny, "model": write_tiny_model(sentencepiece_folder(), system_message="Otherwise.")}
    with pytest.raises(InvalidRequestError, match="reads the prompts as other tokens"):
        compare(tiny, other, examples, max_new_tokens=2)


def test_images_that_cannot_be_read_are_left_out_and_named(tiny, examples, tmp_path) -> None:
    (tmp_path / "1.png").write_bytes(b"no image")
    found = compare(tiny, tiny, [*examples, *read_examples(tmp_path, 1)], max_new_tokens=2)
    assert len(found.answers) == 2
    assert list(found.skipped) == ["1.png"]
