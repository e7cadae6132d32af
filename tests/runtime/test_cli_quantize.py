"""`vitrail quantize` and `vitrail verify`."""

import json

import pytest
from PIL import Image

from .command_line import vitrail
from .tiny_model import picture, write_tiny_model


@pytest.fixture(scope="module")
def source(sentencepiece_folder):
    return write_tiny_model(sentencepiece_folder())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index, size in enumerate(((90, 60), (200, 90))):
        Image.fromarray(picture(*size, index)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def quantised(source, images, tmp_path_factory):
    """The folder, and what the command printed."""
    target = tmp_path_factory.mktemp("made") / "int4"
    ran = vitrail(
        *("quantize", source, target, "--llm", "int4", "--vision", "int8", "--group-size", 16, "--asymmetric"),
        *("--calibration", images, "--dtype", "float32", "--device", "cpu", "--keep", r"layers\.2\.", "--max-tiles", 2),
    )
    assert (ran.status, ran.err) == (0, "")
    return target, ran.out


def test_quantize_writes_a_checkpoint_that_generates(quantised, images) -> None:
    target, said = quantised
    settings = json.loads((target / "config.json").read_text())["quantization_config"]
    assert (settings["llm"], settings["vision"], settings["group_size"]) == ("int4", "int8", 16)
    assert settings["symmetric"] is False
    assert settings["overrides"] == {r"layers\.2\.": None}
    assert len(said.splitlines()) == 5
    assert str(target / "report.md") in said
    ran = vitrail(
        *("generate", "What?", "--image", images / "0.png", "--model", target, "--dtype", "float32"),
        *("--device", "cpu", "--max-new-tokens", 3, "--json"),
    )
    assert ran.status == 0
    assert ran.err == ""
    assert json.loads(ran.out)["usage"]["completion_tokens"] == 3


def test_quantize_prints_its_report_as_json(source, images, tmp_path) -> None:
    (images / "broken.png").write_bytes(b"no image")
    ran = vitrail(
        *("quantize", source, tmp_path / "q", "--vision", "int8", "--calibration", images, "--device", "cpu"),
        *("--max-tiles", 1, "--no-answers", "--json"),
    )
    (images / "broken.png").unlink()
    report = json.loads(ran.out)
    assert (ran.status, ran.err) == (0, "")
    assert {**report, "target": None} == {**json.loads((tmp_path / "q/report.json").read_text()), "target": None}
    assert list(report["calibration"]["skipped"]) == ["broken.png"]
    assert report["answers"] is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((), "nothing to quantise"),
        (("--llm", "int3"), "method 'int3' is not known"),
        (("--llm", "nf4"), "'nf4' is not calibrated"),
        (("--vision", "int4"), "the vision half cannot be int4"),
        (("--llm", "int4"), "groups of 128 do not divide its 64 inputs; group_size=64 would"),
        (("--llm", "int8", "--keep", "("), "is not a regular expression"),
        (("--llm", "int8", "--dtype", "int7"), "dtype 'int7' is not known"),
        (("--llm", "int8", "--calibration", "absent"), "absent: a folder of images"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(source, tmp_path, options, complaint) -> None:
    ran = vitrail("quantize", source, tmp_path / "q", "--device", "cpu", *options)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("vitrail: ")
    assert ran.err.count("\n") == 1
    assert complaint in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_exists_is_left_alone(source, quantised) -> None:
    ran = vitrail("quantize", source, quantised[0], "--llm", "int8")
    assert (ran.status, ran.err) == (2, f"vitrail: {quantised[0]}: exists already\n")
    ran = vitrail("quantize", quantised[0], "elsewhere", "--llm", "int8")
    assert (ran.status, ran.err.count("is quantised already (vitrail)")) == (2, 1)


def test_verify_compares_a_checkpoint_with_what_was_made_of_it(source, quantised, images) -> None:
    common = ("--images", images, "--dtype", "float32", "--device", "cpu", "--max-new-tokens", 4, "--max-tiles", 2)
    ran = vitrail("verify", source, quantised[0], *common, "--json")
    assert ran.status == 0
    found = json.loads(ran.out)
    assert 0 < found["logit_kl"] < 0.1
    assert 0.99 < found["visual_cosine_min"] < found["visual_cosine_mean"] < 1
    assert len(found["answers"]) == 2
    plain = vitrail("verify", source, quantised[0], *common)
    assert (plain.status, plain.err) == (0, "")
    assert "KL of the next token" in plain.out


def test_verify_rounds_either_side_and_fails_below_the_limits_that_are_given(source, images, tmp_path) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("What?\n\nWhere?\n")
    common = ("--images", images, "--prompts", questions, "--dtype", "float32", "--device", "cpu", "--max-tiles", 1)
    options = (*common, "--quantization-b", "int8", "--vision-quantization-b", "int8-weight", "--max-new-tokens", 3)
    ran = vitrail("verify", source, source, *options, "--min-cosine", 0.9999999, "--max-kl", 0, "--json")
    found = json.loads(ran.out)
    assert ran.status == 1
    assert [pair["prompt"] for pair in found["answers"]] == ["What?", "Where?"]
    assert [text.split(",")[0].split(" is ")[0] for text in found["missed"]] == [
        "the mean cosine of visual tokens",
        "the KL",
    ]
    lenient = vitrail("verify", source, source, *options, "--min-cosine", 0.9, "--max-kl", 1, "--min-agreement", 0)
    assert (lenient.status, lenient.err) == (0, "")
    strict = vitrail("verify", source, source, *options, "--min-cosine", 0.9999999)
    assert strict.status == 1
    assert strict.err.startswith("vitrail: the mean cosine of visual tokens is 0.99")
    (tmp_path / "empty.txt").write_text("\n")
    assert vitrail("verify", source, source, "--images", images, "--prompts", tmp_path / "empty.txt").status == 2
