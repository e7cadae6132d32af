"""Mistakes of callers: one clear line each, exit status 2 in the command, and the same Runtime answers the next."""

import io
import json
import os
import shutil
import struct
import zlib

import pytest
from PIL import Image

from vitrail.runtime import Runtime
from vitrail.runtime.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    InvalidRequestError,
)

from .command_line import vitrail
from .tiny_model import assert_idle, picture, write_tiny_model

WIDE = picture(200, 100, 2)


def png_header(width, height):
    """A PNG that declares a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def folder(sentencepiece_folder):
    return write_tiny_model(sentencepiece_folder())


@pytest.fixture(scope="module")
def rt(folder):
    with Runtime.from_pretrained(folder, dtype="float32", device="cpu") as runtime:
        yield runtime


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = tmp_path_factory.mktemp("files")
    Image.fromarray(WIDE).save(buffer := io.BytesIO(), "PNG")
    contents = {
        "good.png": buffer.getvalue(),
        "cut.png": buffer.getvalue()[:2000],
        "noise.png": bytes(range(256)) * 8,
        "empty.png": b"",
        "notes.txt": b"no picture at all",
        "thin.png": png_header(1, 20_000),
        "long.png": png_header(20_000, 1),
        "bomb.png": png_header(30_000, 30_000),
        "wide-bomb.png": png_header(14_000, 14_000),
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "clip.mp4": b"not a video",
        "pages.pdf": b"%PDF-1.7 and no more",
    }
    for name, data in contents.items():
        (files / name).write_bytes(data)
    (files / "folder.png").mkdir()
    return files


@pytest.fixture(autouse=True)
def _the_next_good_request_is_answered(rt):
    before = rt.generate("What is it?", WIDE, max_new_tokens=3)
    yield
    assert_idle(rt.engine)
    assert rt.generate("What is it?", WIDE, max_new_tokens=3).token_ids == before.token_ids


def assert_one_line(error, message):
    text = str(error)
    assert message in text
    assert "\n" not in text
    assert "Traceback" not in text
    assert len(text) < 400


def assert_refused_by_the_command(ran, message):
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("vitrail: ")
    assert ran.err.count("\n") == 1
    assert message in ran.err


# --- requests ---

IMAGES = {
    "missing.png": "image 1: no such file",
    "cut.png": "image 1: cannot decode",
    "noise.png": "image 1: cannot decode: not a JPEG, PNG, WebP, BMP or GIF image",
    "notes.txt": "image 1: cannot decode: not a JPEG, PNG, WebP, BMP or GIF image",
    "drawing.svg": "image 1: cannot decode: not a JPEG, PNG, WebP, BMP or GIF image",
    "empty.png": "empty.png' is empty",
    "folder.png": "folder.png' is a directory",
    "thin.png": "image 1: 1x20000 exceeds the aspect ratio limit of 200",
    "long.png": "image 1: 20000x1 exceeds the aspect ratio limit of 200",
    "bomb.png": "image 1: exceeds the limit of 178956970 pixels",
    "wide-bomb.png": "image 1: exceeds the limit of 178956970 pixels",
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_cannot_be_shown(rt, folder, files, name):
    for call in (rt.generate, rt.stream):
        with pytest.raises(InvalidRequestError) as caught:
            call("What is it?", files / name)
        assert_one_line(caught.value, IMAGES[name])
    with pytest.raises(InvalidRequestError):
        rt.encode_image(files / name)
    good, bad = rt.generate(["What is it?"] * 2, [WIDE, files / name], max_new_tokens=2)
    assert (good.error, bad.finish_reason) == (None, "error")
    assert IMAGES[name] in bad.error.message
    ran = vitrail("generate", "What is it?", "--image", files / name, "--model", folder)
    assert_refused_by_the_command(ran, IMAGES[name])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_image_that_may_not_be_read(rt, files):
    closed = files / "closed.png"
    closed.write_bytes((files / "good.png").read_bytes())
    closed.chmod(0)
    with pytest.raises(InvalidRequestError, match="image 1: cannot read"):
        rt.generate("What is it?", closed)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "image 1: cannot decode"),
        ("data:image/png;base64,AAAA", "image 1: cannot decode"),
        ("https://example.org/a.png", "image 1: URLs are not fetched here"),
        (5, "image 1: a path, bytes, a PIL image"),
        (picture(20, 20).astype("float32"), "image 1: an array must be uint8"),
        (picture(20, 20)[:0], "image 1: 20x0 has no pixels"),
        (Image.new("RGB", (0, 5)), "image 1: 0x5 has no pixels"),
        ("nul\0.png", "image 1: cannot read"),
        ("x" * 5000, "image 1: cannot read"),
        (["nested"], "image 1: a path, bytes, a PIL image"),
    ],
    # No addresses in names: pytest's workers compare them.
    ids=lambda value: repr(value)[:40] if isinstance(value, str | bytes) else None,
)
def test_a_source_that_is_no_image(rt, source, message):
    with pytest.raises(InvalidRequestError) as caught:
        rt.generate("What is it?", [source])
    assert_one_line(caught.value, message)


@pytest.mark.parametrize(("option", "name"), [("video", "clip.mp4"), ("pdf", "pages.pdf")])
def test_a_video_or_a_pdf_that_cannot_be_read(rt, folder, files, option, name):
    pytest.importorskip({"video": "av", "pdf": "pypdfium2"}[option])
    if option == "video":
        with pytest.raises(InvalidRequestError) as caught:
            rt.generate("What is it?", video=files / name)
        assert_one_line(caught.value, "video: cannot decode")
    ran = vitrail("generate", "What is it?", f"--{option}", files / name, "--model", folder)
    assert_refused_by_the_command(ran, f"{option}: cannot decode")


TOO_LONG = "word " * 1500


@pytest.mark.parametrize(
    ("prompt", "images", "error", "message"),
    [
        (TOO_LONG, [], CapacityError, "tokens, 0 of them from images; the context holds 1024"),
        ("What?", ["good.png"] * 40, CapacityError, "1080 of them from images; the context holds 1024"),
        ("What?", ["good.png"] * 65, InvalidRequestError, "65 images exceed the limit of 64 per prompt"),
        ("an <image>?", [], InvalidRequestError, "prompt: 1 <image> mark in the conversation, but 0 images given"),
        ("<image> <image>?", ["good.png"], InvalidRequestError, "2 <image> marks in the conversation, but 1 image"),
        ("<image>?", ["good.png"] * 2, InvalidRequestError, "1 <image> mark in the conversation, but 2 images"),
        ("lone \udc80", [], InvalidRequestError, "prompt: not valid UTF-8: lone surrogate U+DC80 at character 5"),
        ("lone \ud800?", ["good.png"], InvalidRequestError, "lone surrogate U+D800"),
    ],
    ids=["long", "many-tiles", "many-images", "a-mark", "more-marks", "fewer-marks", "surrogate", "surrogate-image"],
)
def test_a_prompt_that_cannot_be_asked(rt, folder, files, prompt, images, error, message):
    paths = [files / name for name in images]
    # One that is only too long can be counted.
    calls = (rt.generate, rt.stream) if error is CapacityError else (rt.generate, rt.stream, rt.count_tokens)
    for call in calls:
        with pytest.raises(error) as caught:
            call(prompt, paths)
        assert_one_line(caught.value, message)
    options = [part for path in paths for part in ("--image", path)]
    assert_refused_by_the_command(vitrail("generate", prompt, *options, "--model", folder), message)


@pytest.mark.parametrize("prompt", [None, 5, b"bytes", {"text": "x"}])
def test_a_prompt_that_is_no_text(rt, prompt):
    with pytest.raises(InvalidRequestError) as caught:
        rt.generate(prompt)
    assert_one_line(caught.value, "prompt must be a string")


@pytest.mark.parametrize("place", ["system", "history", "stop", "bad_words"])
def test_text_beside_the_prompt_must_be_valid_unicode_too(rt, place):
    keywords = {place: [("\udc80", "x")] if place == "history" else "\udc80"}
    with pytest.raises(InvalidRequestError) as caught:
        rt.generate("x", **keywords)
    assert_one_line(caught.value, "surrogate")


SETTINGS = {
    "temperature": (-1, "temperature=-1.0: must be a number from 0 to 100"),
    "top_p": (2, "top_p=2.0: must be a number above 0 and up to 1"),
    "max_tiles": (0, "max_tiles=0: must be an integer from 1"),
    "seed": (2**70, "seed="),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_out_of_range(rt, name):
    value, message = SETTINGS[name]
    for call in (rt.generate, rt.stream):
        with pytest.raises(InvalidRequestError) as caught:
            call("x", **{name: value})
        assert_one_line(caught.value, message.replace(".0:", ":"))
    option = f"--{name.replace('_', '-')}"
    # Found before the model is looked for.
    assert_refused_by_the_command(vitrail("generate", "x", option, value, "--model", "nowhere"), message)
    if name in ("temperature", "max_tiles"):
        assert_refused_by_the_command(vitrail("chat", option, value, "--model", "nowhere"), message)


@pytest.mark.parametrize(
    "keywords",
    [
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": 0},
        {"n": 0},
        {"n": 10**6},
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"logit_bias": {10**6: 1.0}},
        {"stop_token_ids": [10**6]},
        {"stop": [""]},
        {"logprobs": 10**6},
        {"do_sample": False, "temperature": 1.0},
        {"min_new_tokens": 9, "max_new_tokens": 3},
    ],
    ids=str,
)
def test_settings_that_make_no_sense(rt, keywords):
    for call in (rt.generate, rt.stream):
        with pytest.raises(InvalidRequestError) as caught:
            call("x", **keywords)
        assert_one_line(caught.value, "")


def test_an_unknown_sampling_keyword(rt, folder):
    for call in (rt.generate, rt.stream):
        with pytest.raises(TypeError, match=r"^unknown keyword 'temprature'; the nearest one is 'temperature'$"):
            call("x", temprature=0.5)
    ran = vitrail("generate", "x", "--temprature", 0.5, "--model", folder)
    assert (ran.status, ran.out) == (2, "")
    assert "--temperature" in ran.err


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"type": "regex", "regex": "("}, "response_format: .*regex"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}, "response_format: Invalid type"),
        ({"type": "json_schema", "json_schema": {"schema": False}}, "response_format: Unsatisfiable schema"),
    ],
)
def test_a_form_that_no_answer_can_have_is_refused(rt, wanted, words):
    with pytest.raises(InvalidRequestError, match=words) as caught:
        rt.generate("x", response_format=wanted)
    assert_one_line(caught.value, "response_format")


# --- checkpoints ---


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (config[section] if section else config)[key] = value
    path.write_text(json.dumps(config))


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


CHECKPOINTS = {
    "truncated header": (
        lambda folder: truncate(folder / "model.safetensors", 100),
        CheckpointError,
        "model.safetensors: not a readable safetensors file",
    ),
    "truncated data": (
        lambda folder: truncate(folder / "model.safetensors", 100_000),
        CheckpointError,
        "model.safetensors: not a readable safetensors file",
    ),
    "empty weights": (
        lambda folder: truncate(folder / "model.safetensors", 0),
        CheckpointError,
        "model.safetensors: not a readable safetensors file",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        CheckpointError,
        "no model.safetensors or pytorch_model.bin",
    ),
    "a pickle that is none": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        CheckpointError,
        "pytorch_model.bin: not a readable weights file",
    ),
    "wrong shape": (
        lambda folder: edit_config(folder, llm_config__intermediate_size=96),
        CheckpointError,
        "has shape (112, 64), the config says (96, 64)",
    ),
    "missing tensors": (
        lambda folder: edit_config(folder, llm_config__num_hidden_layers=4),
        CheckpointError,
        "tensors missing: language_model.model.layers.3.",
    ),
    "extra tensors": (
        lambda folder: edit_config(folder, llm_config__num_hidden_layers=2),
        CheckpointError,
        "tensors unexpected: language_model.model.layers.2.",
    ),
    "unknown architecture": (
        lambda folder: edit_config(folder, llm_config__architectures=["MambaForCausalLM"]),
        ConfigError,
        "unknown architecture 'MambaForCausalLM'; known: InternLM2ForCausalLM",
    ),
    "unknown model": (
        lambda folder: edit_config(folder, model_type="llava"),
        ConfigError,
        "unknown model_type 'llava'; known: internvl_chat",
    ),
    "unknown template": (
        lambda folder: edit_config(folder, template="internlm3-chat"),
        ConfigError,
        "template 'internlm3-chat' is not known; did you mean 'internlm2-chat'?",
    ),
    "broken config": (lambda folder: truncate(folder / "config.json", 50), ConfigError, "config.json: not valid JSON"),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        CheckpointError,
        "config.json: No such file or directory",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.model").unlink(),
        CheckpointError,
        "no tokenizer there: looked for tokenizer.model",
    ),
    "broken tokenizer": (
        lambda folder: truncate(folder / "tokenizer.model", 40),
        CheckpointError,
        "tokenizer.model",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_loaded(copy, name):
    damage, error, message = CHECKPOINTS[name]
    damage(copy)
    with pytest.raises(error) as caught:
        Runtime.from_pretrained(copy)
    assert_one_line(str(caught.value).replace(str(copy), ""), message)
    assert_refused_by_the_command(vitrail("generate", "x", "--model", copy), message)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{0}/nowhere", "nowhere: no such folder (a hub id looks like owner/name)"),
        ("{0}/config.json", "config.json: is a file; give the checkpoint's folder"),
        ("nowhere", "nowhere: no such folder"),
        ("someone/no-such-model", "someone/no-such-model: no local folder"),
        ("some one/name?", "some one/name?: no local folder and no such model on the hub"),
    ],
)
def test_a_model_that_is_not_there(folder, model, message):
    model = model.format(folder)
    with pytest.raises(CheckpointError) as caught:
        Runtime.from_pretrained(model)
    assert_one_line(caught.value, message)
    for command in (("generate", "x", "--model", model), ("chat", "--model", model), ("inspect", model)):
        assert_refused_by_the_command(vitrail(*command), message)
