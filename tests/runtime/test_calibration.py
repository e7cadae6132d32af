"""Calibration sets, and what is noted of the inputs of linear layers."""

import json

import pytest
import torch
from PIL import Image

from vitrail.runtime import Runtime
from vitrail.runtime.calibration import QUESTIONS, InputStatistics, prepare_examples, read_examples, watch
from vitrail.runtime.errors import CheckpointError, InvalidRequestError
from vitrail.runtime.layers.linear import Linear

from .tiny_model import picture


@pytest.fixture(scope="module")
def nano():
    with Runtime.from_pretrained("nano", device="cpu") as runtime:
        yield runtime


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for index, name in enumerate(("a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(60, 40, index)).save(folder / name)
    return folder


def test_the_set_that_ships_is_read_whole_with_its_answers_behind_the_prompts(nano) -> None:
    examples = read_examples(None, 1000)
    found = prepare_examples(nano.processor, examples)
    assert len(found.prompts) == len(examples) >= 16
    assert not found.skipped
    for prompt, example in zip(found.prompts, examples, strict=True):
        assert example.answer
        assert nano.tokenizer.decode(prompt.token_ids).endswith(example.answer)
        assert len(prompt.tiles) == 1


def test_prompts_are_those_that_the_engine_runs(nano, images) -> None:
    example = read_examples(images, 1)[0]
    (prompt,) = prepare_examples(nano.processor, [example], max_tiles=1).prompts
    answer = nano.generate(example.prompt, list(example.images), max_tiles=1, max_new_tokens=1)
    assert prompt.token_ids == answer.prompt_token_ids


def test_a_folder_has_a_stock_question_for_every_image(images) -> None:
    examples = read_examples(images, 10)
    assert [example.images[0].name for example in examples] == ["1.png", "2.png", "3.png", "4.png", "5.png"]
    assert [example.prompt for example in examples] == [*QUESTIONS, QUESTIONS[0]]


def test_a_limit_takes_examples_from_the_whole_set(images) -> None:
    assert [example.images[0].name for example in read_examples(images, 2)] == ["1.png", "3.png"]


def test_lines_name_images_from_the_files_own_folder(images) -> None:
    lines = [{"image": "a/1.png", "prompt": "One?", "answer": "yes"}, {"image": ["a/1.png", "b/3.png"]}]
    file = images / "set.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = read_examples(file, 10)
    assert (first.images, first.prompt, first.answer) == ((images / "a/1.png",), "One?", "yes")
    assert (second.images, second.prompt) == ((images / "a/1.png", images / "b/3.png"), QUESTIONS[0])


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 has no `image`"),
        ('{"image": []}', "line 2 has no `image`"),
        ('{"image": [1]}', "line 2 has no `image`"),
        ('{"image": "1.png", "prompt": 3}', "line 2: `prompt` must be a string"),
    ],
)
def test_a_line_that_cannot_be_followed_is_named(tmp_path, line, complaint) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text('{"image": "1.png"}\n' + line)
    with pytest.raises(InvalidRequestError, match=complaint):
        read_examples(file, 10)


@pytest.mark.parametrize("name", ["missing", "notes.txt", "missing.jsonl", "empty"])
def test_what_is_no_set_is_refused(tmp_path, name) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InvalidRequestError, match=name):
        read_examples(tmp_path / name, 10)


def test_an_image_that_cannot_be_read_is_skipped_and_a_set_of_such_refused(nano, images) -> None:
    (images / "a/1.png").write_bytes(b"no image")
    examples = read_examples(images, 10)
    found = prepare_examples(nano.processor, examples)
    assert list(found.skipped) == ["1.png"]
    assert [example.images[0].name for example in found.examples] == ["2.png", "3.png", "4.png", "5.png"]
    with pytest.raises(InvalidRequestError, match=r"no usable image among 1 examples; 1.png"):
        prepare_examples(nano.processor, examples[:1])


def test_statistics_are_of_all_tokens_and_the_sample_is_of_them() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 700, 5)
    statistics = InputStatistics(3 * 700)
    for part in x:
        statistics.update(part)
    torch.testing.assert_close(statistics.largest, x.abs().amax((0, 1)))
    torch.testing.assert_close(statistics.mean, x.abs().mean((0, 1)))
    rows = {tuple(row) for row in x.flatten(0, 1).tolist()}
    sample = [tuple(row) for row in statistics.sample.tolist()]
    assert 500 < len(sample) < 524
    assert len(set(sample)) == len(sample)
    assert set(sample) <= rows


@pytest.mark.parametrize(("value", "complaint"), [(0.0, "zero on all"), (float("nan"), "not finite")])
def test_inputs_that_say_nothing_are_refused_by_the_layers_name(value, complaint) -> None:
    statistics = InputStatistics(4)
    statistics.update(torch.full((4, 3), value))
    with pytest.raises(CheckpointError, match=f"layers.3.mlp.down: .*{complaint}"):
        statistics.check("layers.3.mlp.down")


def test_every_linear_layer_is_watched_while_the_context_is_open() -> None:
    block = torch.nn.ModuleDict({"first": Linear(4, 3, bias=False), "second": Linear(3, 2, bias=False)})
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 6, 4)
    with watch(block, 12) as seen:
        block["second"](block["first"](x))
    block["first"](10 * x)
    assert list(seen) == ["first", "second"]
    torch.testing.assert_close(seen["first"].largest, x.abs().amax((0, 1)))
    torch.testing.assert_close(seen["second"].largest, block["first"](x).abs().amax((0, 1)).detach())
