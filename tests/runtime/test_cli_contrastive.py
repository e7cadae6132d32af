"""`vitrail embed` and `vitrail eval`, and a run that is killed in its middle."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.runtime import Runtime

from ..official_configs import INTERNVIT_300M, INTERNVL_14B_224PX
from .command_line import vitrail
from .tiny_contrastive import write_tiny_contrastive
from .tiny_model import clip, picture, write_tiny_model

SCRIPT = Path(sys.executable).parent / "vitrail"


@pytest.fixture(scope="module")
def folder(sentencepiece_folder):
    return write_tiny_contrastive(sentencepiece_folder(tokens=[]))


@pytest.fixture(scope="module")
def model(folder):
    return ("--model", folder, "--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def rt(folder):
    with Runtime.from_pretrained(folder, dtype="float32", device="cpu") as runtime:
        yield runtime


@pytest.fixture
def images(tmp_path):
    images = tmp_path / "images"
    for index, name in enumerate(("cat/1.png", "cat/2.png", "dog/1.png", "dog/3.png", "dog/4.png")):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(60, 40, index)).save(images / name)
        (images / name).with_suffix(".txt").write_text(f"a {name[:3]}\nnumber {index}\n")
    return images


def files_of(images):
    return [images / name for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/3.png", "dog/4.png")]


# --- embed ---


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ((), {}),
        (("--mode", "g", "--stretch", "--image-size", 42), {"mode": "g", "crop": False, "image_size": 42}),
        (("--raw",), {"normalize": False}),
    ],
)
def test_a_folder_is_embedded_into_one_file(rt, model, images, tmp_path, options, keywords):
    out = tmp_path / "e.npz"
    ran = vitrail("embed", images, "--out", out, *model, "--batch-size", 2, *options)
    assert (ran.status, ran.out, ran.err) == (0, f"5 embeddings in {out}\n", "")
    with np.load(out) as found:
        assert found["names"].tolist() == ["cat/1.png", "cat/2.png", "dog/1.png", "dog/3.png", "dog/4.png"]
        expected = rt.embed(images=files_of(images), **keywords).numpy()
        np.testing.assert_allclose(found["embeddings"], expected, atol=2e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.npz", "images"]


def test_images_that_cannot_be_read_are_reported_and_the_rest_completes(rt, model, images, tmp_path):
    (images / "cat/1a.png").write_bytes(b"nothing that decodes")
    (images / "zzz.jpg").touch()
    out = tmp_path / "e.npz"
    ran = vitrail("embed", images, "--out", out, *model)
    assert (ran.status, ran.out) == (0, f"5 embeddings in {out}\n")
    assert ran.err == (
        "vitrail: cat/1a.png: image 2: cannot decode: not a JPEG, PNG, WebP, BMP or GIF image\n"
        f"vitrail: zzz.jpg: image 7: '{images / 'zzz.jpg'}' is empty\n"
        "vitrail: 2 of 7 images could not be read\n"
    )
    with np.load(out) as found:
        assert found["failed"].tolist() == ["cat/1a.png", "zzz.jpg"]
        np.testing.assert_allclose(found["embeddings"], rt.embed(images=files_of(images)).numpy(), atol=2e-6)
    ran = vitrail("embed", images, "--out", out, *model, "--overwrite", "--json")
    assert json.loads(ran.out)["embedded"] == 5
    assert list(json.loads(ran.out)["failed"]) == ["cat/1a.png", "zzz.jpg"]


def test_a_table_names_the_images_too(model, images, tmp_path):
    (tmp_path / "list.csv").write_text("image\nimages/dog/3.png\nimages/cat/2.png\n")
    assert vitrail("embed", tmp_path / "list.csv", "--out", tmp_path / "e.npz", *model).status == 0
    with np.load(tmp_path / "e.npz") as found:
        assert found["names"].tolist() == ["images/dog/3.png", "images/cat/2.png"]


def test_videos_are_embedded_by_their_frames(rt, model, tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v/clip.mp4").write_bytes(data := clip())
    out = tmp_path / "e.npz"
    ran = vitrail("embed", tmp_path / "v", "--videos", "--num-frames", 3, "--out", out, *model)
    assert ran.status == 0, ran.err
    with np.load(out) as found:
        expected = rt.embed(videos=[data], num_frames=3).numpy()
        np.testing.assert_allclose(found["embeddings"], expected, atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("images", "--out", "e.npy"), "must end in .npz"),
        (("images", "--out", "there.npz"), "exists already; --overwrite replaces it"),
        (("images", "--out", "no/where/e.npz"), "its folder does not exist"),
        (("empty", "--out", "e.npz"), "holds no images"),
        (("nowhere", "--out", "e.npz"), "no such file or folder"),
        (("images", "--out", "e.npz", "--mode", "x"), "mode='x': must be 'c'"),
        (("images", "--out", "e.npz", "--image-size", "50"), "image_size=50"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(model, images, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.npz").write_bytes(b"mine")
    before = sorted(tmp_path.iterdir())
    ran = vitrail("embed", *arguments, *model)
    assert ran.status == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.npz").read_bytes() == b"mine"


def test_a_chat_checkpoint_is_refused(sentencepiece_folder, images, tmp_path):
    chat = write_tiny_model(sentencepiece_folder())
    ran = vitrail("embed", images, "--out", tmp_path / "e.npz", "--model", chat, "--dtype", "float32")
    assert ran.status == 2
    assert "is a chat model; only contrastive models (InternVL-C/G) have this" in ran.err
    assert not list(tmp_path.glob("e.npz*"))


def test_a_contrastive_checkpoint_does_not_generate(model):
    ran = vitrail("generate", "what?", *model)
    assert ran.status == 2
    assert "is a contrastive model (InternVL-C/G), which has embed, score, classify" in ran.err


def killed_and_resumed(folder, tmp_path, count, batch_size):
    """Embed `count` images at once, then again with a kill -9 in the middle; returns the two files' bytes."""
    images = tmp_path / "images"
    images.mkdir()
    for index in range(count):
        Image.fromarray(picture(20 + index % 9, 30, index)).save(images / f"{index:05d}.png")
    (images / "00003.png").write_bytes(b"broken")
    (images / f"{count - 2:05d}.png").write_bytes(b"broken")
    common = ("--model", folder, "--dtype", "float32", "--device", "cpu", "--batch-size", str(batch_size))

    def command(out):
        return [SCRIPT, "embed", images, "--out", tmp_path / out, *common]

    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    whole = subprocess.run(command("whole.npz"), env=environment, capture_output=True, text=True, timeout=300)
    assert whole.returncode == 0, whole.stderr
    progress = tmp_path / "cut.npz.partial" / "progress.jsonl"
    lines_before_kill = max(2, count // batch_size // 3)
    run = subprocess.Popen(command("cut.npz"), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (progress.exists() and progress.read_bytes().count(b"\n") >= lines_before_kill):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut.npz").exists()
    done = progress.read_bytes().count(b"\n") * batch_size
    assert done < count
    resumed = subprocess.run(command("cut.npz"), env=environment, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert "2 of" in resumed.stderr
    assert not (tmp_path / "cut.npz.partial").exists()
    return (tmp_path / "whole.npz").read_bytes(), (tmp_path / "cut.npz").read_bytes()


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_to_the_same_file(folder, tmp_path):
    whole, resumed = killed_and_resumed(folder, tmp_path, 120, 4)
    assert whole == resumed


@pytest.mark.slow(smoke=False)
def test_two_thousand_images_survive_a_kill(folder, tmp_path):
    whole, resumed = killed_and_resumed(folder, tmp_path, 2000, 16)
    assert whole == resumed


# --- eval ---


def test_retrieval_is_measured_over_a_folder_with_captions(model, images):
    ran = vitrail("eval", "retrieval", images, *model, "--k", 1, "--k", 3)
    assert ran.status == 0, ran.err
    assert "5 images, 10 captions" in ran.out
    body = json.loads(vitrail("eval", "retrieval", images, *model, "--k", 1, "--k", 3, "--json").out)
    assert set(body["recall"]) == {"text_to_image", "image_to_text"}
    assert set(body["recall"]["text_to_image"]) == {"R@1", "R@3"}
    for value in (value for way in body["recall"].values() for value in way.values()):
        assert f"{value:.2f}" in ran.out
    assert body["dual_softmax"] is None
    ran = vitrail("eval", "retrieval", images, *model, "--dual-softmax")
    assert "text to image, dual softmax" in ran.out


def test_classification_is_measured_with_names_from_a_file(rt, model, images, tmp_path):
    (tmp_path / "names.txt").write_text("cat | kitten\n\ndog\n", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a photo of a {}.\n{}\n", encoding="utf-8")
    options = ("--classes", tmp_path / "names.txt", "--templates", tmp_path / "prompts.txt", "--mode", "g")
    body = json.loads(vitrail("eval", "classification", images, *model, *options, "--json").out)
    answers = rt.classify(files_of(images), [["cat", "kitten"], "dog"], ["a photo of a {}.", "{}"], mode="g").labels
    right = sum(answer == path.parent.name for answer, path in zip(answers, files_of(images), strict=True))
    assert body["top1"] == pytest.approx(20 * right)
    assert body["num_classes"] == 2
    ran = vitrail("eval", "classification", images, *model, *options)
    assert f"{body['top1']:.2f}" in ran.out
    assert vitrail("eval", "classification", images, *model, "--templates", "zh").status == 0


def test_long_captions_are_cut_and_said_so_in_one_line(model, images):
    (images / "cat/1.txt").write_text("panda " * 100)
    ran = vitrail("eval", "retrieval", images, *model, "--json")
    assert ran.status == 0
    assert ran.err == "vitrail: embed: 1 of 9 texts have more than 80 tokens and were cut there, text 1 first\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("retrieval", "nowhere"), "no such file or folder"),
        (("retrieval", "empty"), "holds no images and no videos"),
        (("classification", "images", "--classes", "imagenet7"), "no such set; known: imagenet"),
        (("classification", "images", "--classes", "empty.txt"), "class_names: must be a list that is not empty"),
        (("classification", "images", "--templates", "photo"), "must hold a {} for the class name"),
        (("classification", "images", "--classes", "cifar10-en"), "label 'cat' is none of the 10 classes"),
    ],
)
def test_mistakes_of_an_evaluation_are_one_line(model, images, tmp_path, monkeypatch, arguments, message):
    if message.startswith("label"):
        (images / "dog").rename(images / "hound")
        message = message.replace("cat", "hound")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    ran = vitrail("eval", *arguments, *model)
    assert ran.status == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1


# --- inspect ---


def test_inspect_knows_contrastive_models_and_vision_encoders(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(INTERNVL_14B_224PX))
    ran = vitrail("inspect", tmp_path)
    assert "InternViT 3200 x 48 blocks, QLLaMA 4096 x 32 layers" in ran.out
    assert "224 px, 256 patches" in ran.out
    assert "in 1048 tensors" in ran.out
    facts = json.loads(vitrail("inspect", tmp_path, "--json").out)
    assert facts["parameters"]["vision"] == 5_902_793_600
    assert facts["parameters"]["total"] == sum(facts["parameters"][h] for h in ("vision", "projector", "language"))
    assert facts["config"]["num_query_tokens"] == 96
    (tmp_path / "config.json").write_text(json.dumps(INTERNVIT_300M))
    ran = vitrail("inspect", tmp_path)
    assert "InternViT 1024 x 24 blocks" in ran.out
    assert "vision 304.01 M" in ran.out
    assert "language" not in ran.out
