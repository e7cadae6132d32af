"""The `vitrail` command: the answer alone on stdout, everything else on stderr, JSON where a program reads."""

import json
import os
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.runtime import Runtime
from vitrail.runtime.request import StreamDelta

from ..official_configs import INTERNVL_CHAT_V1_5
from .command_line import vitrail
from .tiny_model import clip, picture, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(sys.executable).parent / "vitrail"
WIDE, SQUARE = picture(200, 100, 2), picture(90, 90, 1)
TOKENS = ("--max-new-tokens", 6)


@pytest.fixture(scope="module")
def folder(sentencepiece_folder):
    folder = write_tiny_model(sentencepiece_folder())
    Image.fromarray(WIDE).save(folder / "wide.png")
    Image.fromarray(SQUARE).save(folder / "square.png")
    (folder / "broken.png").write_bytes(b"nothing that decodes")
    return folder


@pytest.fixture(scope="module")
def rt(folder):
    with Runtime.from_pretrained(folder, dtype="float32", device="cpu") as runtime:
        yield runtime


@pytest.fixture(scope="module")
def model(folder):
    return ("--model", folder, "--dtype", "float32", "--device", "cpu")


# --- generate ---


def test_the_answer_goes_to_stdout_and_the_timings_to_stderr(rt, model, folder):
    ran = vitrail("generate", "What is the total?", "--image", folder / "wide.png", *model, *TOKENS)
    expected = rt.generate("What is the total?", WIDE, max_new_tokens=6)
    assert ran.status == 0
    assert ran.out == expected.text + "\n"
    prompt_tokens = expected.usage.prompt_tokens
    assert f"3 tiles, {prompt_tokens} prompt tokens (27 of images), 6 tokens of answer\n" in ran.err
    for timing in ("load ", "preprocess ", "vision ", "first token ", "a token, in all "):
        assert timing in ran.err


def test_images_may_be_several_and_settings_reach_the_model(rt, model, folder):
    options = ("--max-tiles", 1, "--temperature", 0.8, "--top-p", 0.9, "--seed", 5, "--system", "Be brief.")
    images = ("-i", folder / "wide.png", "-i", folder / "square.png")
    ran = vitrail("generate", "compare", *images, *model, *TOKENS, *options)
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
    expected = rt.generate("compare", [WIDE, SQUARE], system="Be brief.", max_tiles=1, max_new_tokens=6, **sampling)
    assert ran.out == expected.text + "\n"
    assert ran.err.startswith("2 tiles, ")


def test_a_question_needs_no_image(rt, model):
    ran = vitrail("generate", "hello", *model, "--max-new-tokens", 1)
    assert ran.out == rt.generate("hello", max_new_tokens=1).text + "\n"
    assert ran.err.startswith("0 tiles, ")
    assert "1 token of answer" in ran.err


def test_json_holds_the_whole_output(rt, model, folder):
    ran = vitrail("generate", "total?", "--image", folder / "wide.png", *model, *TOKENS, "--json", "--stream")
    expected = rt.generate("total?", WIDE, max_new_tokens=6)
    assert ran.err == ""
    assert ran.out.count("\n") == 1
    body = json.loads(ran.out)
    assert body["text"] == expected.text
    assert body["token_ids"] == expected.token_ids
    assert body["finish_reason"] == expected.finish_reason
    assert body["usage"]["image_tokens"] == 27
    assert body["num_tiles"] == [3]
    assert body["model"] == str(folder)
    assert body["load_ms"] > 0
    assert set(body["metrics"]) >= {"queue_ms", "preprocess_ms", "vision_ms", "ttft_ms", "tpot_ms", "e2e_ms"}


def test_a_streamed_answer_is_the_same_text(rt, model, folder, monkeypatch):
    ran = vitrail("generate", "total?", "--image", folder / "wide.png", *model, *TOKENS, "--stream")
    assert ran.out == rt.generate("total?", WIDE, max_new_tokens=6).text + "\n"
    assert ran.err == ""
    pieces = [StreamDelta("one ", [1]), StreamDelta("two", [2], "stop")]
    monkeypatch.setattr(Runtime, "stream", lambda *_args, **_keywords: iter(pieces))
    assert vitrail("generate", "x", *model, "--stream").out == "one two\n"


def test_a_video_is_shown_as_frames(rt, model, folder):
    (folder / "clip.mp4").write_bytes(data := clip())
    ran = vitrail("generate", "what happens?", "--video", folder / "clip.mp4", *model, *TOKENS, "--json")
    assert json.loads(ran.out)["num_tiles"] == [1] * 8
    assert json.loads(ran.out)["text"] == rt.generate("what happens?", video=data, max_new_tokens=6).text


def test_each_page_of_a_pdf_is_an_image(rt, model, folder):
    pdf = pytest.importorskip("vitrail.runtime.pdf")
    pytest.importorskip("pypdfium2")
    pages = [Image.fromarray(array) for array in (WIDE, SQUARE)]
    pages[0].save(folder / "pages.pdf", "PDF", save_all=True, append_images=pages[1:])
    ran = vitrail("generate", "what is it?", "--pdf", folder / "pages.pdf", *model, *TOKENS, "--json")
    expected = rt.generate("what is it?", pdf.render_pages(folder / "pages.pdf"), max_new_tokens=6)
    assert json.loads(ran.out)["num_tiles"] == expected.num_tiles
    assert json.loads(ran.out)["text"] == expected.text


def test_images_a_video_and_a_pdf_exclude_each_other():
    ran = vitrail("generate", "x", "--image", "a.png", "--pdf", "b.pdf")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err == "vitrail: give --image, --video or --pdf, not several of them\n"


# --- chat ---


def talk(model, *lines, options=()):
    return vitrail("chat", *model, *TOKENS, *options, stdin="".join(f"{line}\n" for line in lines).encode())


def test_a_chat_remembers_its_turns(rt, model):
    first = rt.generate("hello", max_new_tokens=6).text
    second = rt.generate("and now?", history=[("hello", first)], max_new_tokens=6).text
    ran = talk(model, "hello", "", "and now?", "/quit", "never asked")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == f"{first}\n{second}\n"


def test_images_join_the_next_question_and_stay(rt, model, folder):
    first = rt.generate("what?", WIDE, max_new_tokens=6).text
    history = [("<image>\nwhat?", first)]
    second = rt.generate("and?", WIDE, history=history, max_new_tokens=6).text
    history.append(("and?", second))
    third = rt.generate("Image-2: <image>\nthis?", [WIDE, SQUARE], history=history, max_new_tokens=6).text
    ran = talk(model, f"/image {folder}/wide.png", "what?", "and?", f"/image  {folder}/square.png ", "this?")
    assert ran.err == ""
    assert ran.out == f"{first}\n{second}\n{third}\n"
    given = talk(model, "what?", options=("--image", folder / "wide.png"))
    assert given.out == f"{first}\n"


def test_several_images_are_numbered_and_marks_are_kept(rt, model, folder):
    images = [f"/image {folder}/wide.png", f"/image {folder}/square.png"]
    numbered = rt.generate("what?", [WIDE, SQUARE], max_new_tokens=6).text
    marked = rt.generate("is <image> like <image>?", [WIDE, SQUARE], max_new_tokens=6).text
    assert talk(model, *images, "what?", "/reset", *images, "is <image> like <image>?").out == f"{numbered}\n{marked}\n"


def test_reset_forgets_turns_and_images(rt, model, folder):
    with_image = rt.generate("what?", WIDE, max_new_tokens=6).text
    without = rt.generate("what?", max_new_tokens=6).text
    ran = talk(
        model, f"/image {folder}/wide.png", "what?", f"/image {folder}/square.png", "/reset", "what?", "/reset", "what?"
    )
    assert ran.out == f"{with_image}\n{without}\n{without}\n"


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (
            ["/image {0}/broken.png", "what?"],
            "vitrail: image 2: cannot decode: not a JPEG, PNG, WebP, BMP or GIF image",
        ),
        (["/image {0}/missing.png", "what?"], "vitrail: image 2: no such file: '{0}/missing.png'"),
        (["is there an <image>?"], "vitrail: prompt: 2 <image> marks in the conversation, but 1 image given"),
        (["word " * 1500], "the context holds 1024"),
        (["/image"], "vitrail: /image needs a file"),
    ],
)
def test_a_question_that_is_refused_leaves_the_conversation_as_it_was(rt, model, folder, refused, message):
    first = rt.generate("what?", WIDE, max_new_tokens=6).text
    second = rt.generate("and?", WIDE, history=[("<image>\nwhat?", first)], max_new_tokens=6).text
    refused = [line.format(folder) for line in refused]
    ran = talk(model, f"/image {folder}/wide.png", "what?", *refused, "and?")
    assert ran.status == 0
    assert ran.out == f"{first}\n{second}\n"
    assert ran.err.count("\n") == 1
    assert message.format(folder) in ran.err


def test_a_line_that_is_not_utf8_is_refused_and_the_next_answered(rt, model):
    ran = vitrail("chat", *model, *TOKENS, stdin=b"caf\xe9?\nhello\n")
    assert ran.status == 0
    assert ran.err == "vitrail: prompt: not valid UTF-8: lone surrogate U+DCE9 at character 3\n"
    assert ran.out == rt.generate("hello", max_new_tokens=6).text + "\n"


# --- inspect, doctor, bench ---


def test_inspect_says_what_a_checkpoint_is(folder):
    ran = vitrail("inspect", folder)
    assert (ran.status, ran.err) == (0, "")
    for line in ("InternViT 48 x 3 blocks, InternLM2ForCausalLM 64 x 3 layers", "internlm2-chat", "1024 tokens"):
        assert line in ran.out
    assert "84 px, 9 tokens each, at most 7 an image" in ran.out
    facts = json.loads(vitrail("inspect", folder, "--json").out)
    assert facts["folder"] == str(folder)
    assert facts["tokens_per_image"] == {"least": 9, "most": 63}
    assert facts["config"]["template"] == "internlm2-chat"
    halves = facts["parameters"]
    assert halves["total"] == halves["vision"] + halves["projector"] + halves["language"]
    assert facts["weight_bytes"]["bfloat16"] == 2 * halves["total"]


def test_inspect_needs_only_the_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(INTERNVL_CHAT_V1_5))
    ran = vitrail("inspect", tmp_path)
    assert "25.514 B in 934 tensors" in ran.out
    assert "448 px, 256 tokens each, at most 13 an image" in ran.out
    facts = json.loads(vitrail("inspect", tmp_path, "--json").out)
    assert facts["parameters"]["total"] == 25_514_186_112
    assert facts["tensors"] == 934
    assert facts["kv_bytes_per_token"] == 2 * 2 * 48 * 8 * 128


def test_inspect_prints_the_folders_name_as_it_is(folder, tmp_path):
    odd = tmp_path / "[bold]a [red]"
    odd.mkdir()
    (odd / "config.json").write_bytes((folder / "config.json").read_bytes())
    ran = vitrail("inspect", odd)
    assert ran.status == 0
    assert "[bold]a [red]" in ran.out


def test_doctor_reports_the_machine_and_every_extra():
    report = json.loads(vitrail("doctor", "--json").out)
    assert report["packages"]["numpy"] == np.__version__
    assert report["kernels"].keys() == {"GPU kernels", "kernel pack", "dispatch table", "CPU extension"}
    assert all(report["kernels"].values())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    declared = {
        extra: {requirement.split(";")[0].split(">")[0].split("[")[0].strip() for requirement in requirements}
        for extra, requirements in extras.items()
        if extra not in ("all", "dev")
    }
    assert {extra: set(packages) for extra, packages in report["extras"].items()} == declared


def test_doctor_tells_how_to_install_what_is_missing():
    ran = vitrail("doctor")
    assert (ran.status, ran.err) == (0, "")
    report = json.loads(vitrail("doctor", "--json").out)
    assert ran.out.split()[:4] == ["vitrail", report["vitrail"], "on", "Python"]
    for extra, packages in report["extras"].items():
        assert (f"pip install 'vitrail[{extra}]'" in ran.out) is (None in packages.values())


def test_a_benchmark_that_does_not_exist_names_those_that_do():
    ran = vitrail("bench", "speed")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("vitrail: bench: no script 'speed'; known: ")
    known = ran.err.partition("known: ")[2].strip().split(", ")
    assert {"latency", "serve", "scaling"} <= set(known)
    assert not {"harness", "calibration", "load", "peer", "report"} & set(known)  # what they share


def test_a_benchmark_gets_the_options_behind_its_name(monkeypatch):
    script = types.ModuleType("vitrail.bench.latency")
    script.main = lambda: print(sys.argv)
    monkeypatch.setitem(sys.modules, "vitrail.bench.latency", script)
    ran = vitrail("bench", "latency", "--out", "there", "--help")
    assert ran.status == 0
    assert ran.out == "['vitrail bench latency', '--out', 'there', '--help']\n"


# --- the installed script ---


def installed(*arguments, **keywords):
    return subprocess.run([SCRIPT, *arguments], capture_output=True, timeout=120, check=False, **keywords)


def test_the_installed_script_answers(rt, model, folder):
    arguments = map(str, ("generate", "What?", "--image", folder / "wide.png", *model, *TOKENS))
    ran = installed(*arguments)
    assert ran.returncode == 0
    assert ran.stdout.decode() == rt.generate("What?", WIDE, max_new_tokens=6).text + os.linesep
    assert b"first token" in ran.stderr


def test_the_installed_script_ends_a_mistake_in_one_line_and_status_2(model):
    ran = installed("generate", b"caf\xe9?", *map(str, model))
    assert ran.returncode == 2
    assert ran.stdout == b""
    assert ran.stderr == b"vitrail: prompt: not valid UTF-8: lone surrogate U+DCE9 at character 3\n"


def test_an_interrupt_ends_quietly(model, monkeypatch):
    def interrupted(*_args, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runtime, "generate", interrupted)
    ran = vitrail("generate", "x", *model)
    assert ran.status == 130
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("arguments", [("generate",), ("generate", "x", "--temperatur", 1), ("paint",), ("chat", "x")])
def test_a_command_line_that_cannot_be_read_exits_with_status_2(arguments):
    ran = vitrail(*arguments)
    assert (ran.status, ran.out) == (2, "")
    assert "Usage: vitrail" in ran.err
