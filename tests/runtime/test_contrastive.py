"""Contrastive models as users call them: embeddings, scores, classes, matches."""

import asyncio
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitrail.runtime import Runtime
from vitrail.runtime.errors import InvalidRequestError, UnsupportedError, VitrailError
from vitrail.runtime.resize import fit_image
from vitrail.runtime.texts import MAX_TOKENS, TEXTS_PER_BATCH
from vitrail.runtime.zero_shot import TEMPLATES

from ..random_checkpoints import INTERNVIT_300M, chat_config, random_weights, write_checkpoint
from .tiny_contrastive import write_tiny_contrastive
from .tiny_model import clip, picture

SQUARE, WIDE, TALL = picture(90, 90, 1), picture(200, 100, 2), picture(100, 300, 3)
TEXTS = ["a red panda", "cat", "一张熊猫的照片", "two cats on a red sofa, and a third one under it", "二匹の猫"]
# Another order of sums: some fp32 roundings, passed through four layers. A wrong index or mask shows at 1e-2.
CLOSE = {"atol": 2e-6, "rtol": 1e-5}


@pytest.fixture(scope="module")
def folder(sentencepiece_folder):
    return write_tiny_contrastive(sentencepiece_folder(tokens=[]))


@pytest.fixture(scope="module")
def rt(folder):
    with Runtime.from_pretrained(folder, dtype="float32", device="cpu") as runtime:
        yield runtime


def tiles(*images, side=84, crop=True):
    from PIL import Image

    return torch.from_numpy(np.stack([fit_image(Image.fromarray(image), (side, side), crop=crop) for image in images]))


# --- images ---


@pytest.mark.parametrize("mode", ["c", "g"])
def test_image_embeddings_are_the_models_of_the_cropped_image(rt, mode):
    raw = rt.embed(images=[SQUARE, WIDE, TALL], mode=mode, normalize=False)
    assert raw.dtype == torch.float32
    assert torch.equal(raw, rt.model.embed_images(tiles(SQUARE, WIDE, TALL), mode))
    assert torch.equal(rt.embed(images=[SQUARE, WIDE, TALL], mode=mode), F.normalize(raw, dim=-1))
    stretched = rt.embed(images=WIDE, mode=mode, normalize=False, crop=False)
    assert torch.equal(stretched, rt.model.embed_images(tiles(WIDE, crop=False), mode))
    assert stretched.shape == (1, 20)
    assert not torch.allclose(stretched[0], raw[1], atol=1e-3)


def test_c_and_g_are_different_embeddings(rt):
    c, g = (rt.embed(images=[SQUARE, WIDE], mode=mode, normalize=False) for mode in "cg")
    assert not torch.allclose(F.normalize(c, dim=-1), F.normalize(g, dim=-1), atol=1e-2)
    assert (g.norm(dim=-1) <= 2).all()


def test_any_number_of_images_is_embedded_batch_by_batch(rt):
    images = [SQUARE, WIDE, TALL, WIDE, SQUARE, TALL, TALL]
    together = rt.embed(images=images)
    seen = []
    embed_images = rt.model.embed_images

    def recorded(batch, mode):
        seen.append(len(batch))
        return embed_images(batch, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(rt.model), "embed_images", lambda _, batch, mode: recorded(batch, mode))
        few = rt.embed(images=images, batch_size=3)
    assert seen == [3, 3, 1]
    torch.testing.assert_close(few, together, **CLOSE)


@pytest.mark.parametrize("side", [42, 112])
def test_another_image_size_interpolates_the_positions(rt, side):
    found = rt.embed(images=[WIDE], image_size=side, normalize=False)
    assert torch.equal(found, rt.model.embed_images(tiles(WIDE, side=side), "c"))
    assert rt.model.vision_model(tiles(WIDE, side=side)).shape[1] == 1 + (side // 14) ** 2


def test_a_checkpoint_tuned_at_another_size_has_that_size(sentencepiece_folder):
    folder = write_tiny_contrastive(sentencepiece_folder(tokens=[]), force_image_size=112)
    with Runtime.from_pretrained(folder, dtype="float32") as tuned:
        assert tuned.model.vision_model.embeddings.position_embedding.shape == (1, 65, 48)
        assert torch.equal(
            tuned.embed(images=WIDE, normalize=False), tuned.model.embed_images(tiles(WIDE, side=112), "c")
        )


def test_an_unreadable_image_is_reported_in_its_place_and_the_rest_completes(rt):
    sources = [SQUARE, b"no image", WIDE, "/nowhere.png", TALL]
    found = list(rt.embed_each(sources, batch_size=2))
    assert [str(item) for item in found if isinstance(item, VitrailError)] == [
        "image 2: cannot decode: not a JPEG, PNG, WebP, BMP or GIF image",
        "image 4: no such file: '/nowhere.png'",
    ]
    rows = torch.stack([found[0], found[2], found[4]])
    torch.testing.assert_close(rows, rt.embed(images=[SQUARE, WIDE, TALL]), **CLOSE)
    with pytest.raises(InvalidRequestError, match=r"^image 2: cannot decode"):
        rt.embed(images=sources)
    assert [str(item)[:7] for item in rt.embed_each([b"no image"], start=41)] == ["image 4"]


def test_no_more_than_two_batches_of_images_are_in_memory(rt):
    drawn, most = 0, 0

    def sources():
        nonlocal drawn
        for _ in range(60):
            drawn += 1
            yield SQUARE

    for taken, row in enumerate(rt.embed_each(sources(), batch_size=4)):
        assert isinstance(row, torch.Tensor)
        most = max(most, drawn - taken)
    assert taken == 59
    assert most <= 9


# --- videos ---


def test_a_video_is_the_mean_of_its_frames_raw_embeddings(rt):
    raw = rt.embed(images=[SQUARE, WIDE, TALL], mode="g", normalize=False)
    videos = [[WIDE], [SQUARE, WIDE, TALL]]
    found = rt.embed(videos=videos, mode="g", normalize=False, num_frames=3)
    torch.testing.assert_close(found, torch.stack([raw[1], raw.mean(0)]), **CLOSE)
    torch.testing.assert_close(rt.embed(videos=videos, mode="g"), F.normalize(found, dim=-1), **CLOSE)


def test_frames_of_a_video_file_are_spread_evenly(rt, tmp_path):
    from vitrail.runtime.video import interval_indices, sample_frames

    (tmp_path / "clip.mp4").write_bytes(data := clip())
    frames = sample_frames(data, 4, choose=interval_indices)
    expected = rt.embed(images=frames, normalize=False).mean(0, keepdim=True)
    found = rt.embed(videos=[tmp_path / "clip.mp4"], num_frames=4, normalize=False)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(rt.embed(videos=data, num_frames=4, normalize=False), expected, **CLOSE)


# --- texts ---


def test_texts_are_embedded_as_each_is_alone_and_as_padded_to_80_tokens(rt):
    together = rt.embed(texts=TEXTS, normalize=False)
    for text, row in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(rt.embed(texts=text, normalize=False)[0], row, **CLOSE)
        ids = [*rt.tokenizer.encode("summarize:" + text), rt.tokenizer.eos_token_id]
        padded = torch.tensor([ids + [0] * (MAX_TOKENS - len(ids))])
        positions = torch.arange(MAX_TOKENS)[None]
        expected = rt.model.embed_texts(padded, positions, torch.tensor([len(ids) - 1]))[0]
        torch.testing.assert_close(row, expected, **CLOSE)
    torch.testing.assert_close(rt.embed(texts=TEXTS), F.normalize(together, dim=-1), **CLOSE)


def test_texts_are_padded_no_further_than_the_longest_of_their_batch(rt, monkeypatch):
    seen = []
    embed_texts = type(rt.model).embed_texts

    def recorded(model, token_ids, positions, last):
        seen.append((tuple(token_ids.shape), int(last.max()) + 1))
        return embed_texts(model, token_ids, positions, last)

    monkeypatch.setattr(type(rt.model), "embed_texts", recorded)
    lengths = {text: len(rt.tokenizer.encode("summarize:" + text)) + 1 for text in ("a", "a cat and a dog")}
    rt.embed(texts=["a"] * TEXTS_PER_BATCH + ["a cat and a dog"])
    longest, shortest = lengths["a cat and a dog"], lengths["a"]
    assert seen == [((TEXTS_PER_BATCH, longest), longest), ((1, shortest), shortest)]


def test_a_text_of_more_than_80_tokens_is_cut_with_a_warning(rt):
    long = "panda " * 60
    ids = rt.tokenizer.encode("summarize:" + long)
    assert len(ids) > MAX_TOKENS
    with pytest.warns(UserWarning, match=r"embed: 1 of 2 texts have more than 80 tokens and were cut there, text 2"):
        _, row = rt.embed(texts=["cat", long], normalize=False)
    cut = torch.tensor([[*ids[:79], rt.tokenizer.eos_token_id]])
    expected = rt.model.embed_texts(cut, torch.arange(80)[None], torch.tensor([79]))[0]
    torch.testing.assert_close(row, expected, **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rt.embed(texts=["cat"])


# --- scores ---


@pytest.mark.parametrize("mode", ["c", "g"])
def test_scores_are_scaled_cosines(rt, mode):
    images = rt.embed(images=[SQUARE, WIDE], mode=mode, normalize=False).double()
    texts = rt.embed(texts=TEXTS, normalize=False).double()
    cosines = (images / images.norm(dim=1, keepdim=True)) @ (texts / texts.norm(dim=1, keepdim=True)).T
    scores = rt.score([SQUARE, WIDE], TEXTS, mode=mode)
    assert scores.shape == (2, 5)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), cosines * math.exp(rt.model.logit_scale), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("at_once", [2, 32])
def test_matching_pairs_images_with_texts(rt, at_once, monkeypatch):
    monkeypatch.setattr("vitrail.runtime.contrastive.IMAGES_PER_BATCH", at_once)
    states = rt.model.vision_model(tiles(SQUARE, WIDE, TALL, SQUARE, WIDE))

    def alone(index, text):
        ids = [*rt.tokenizer.encode(text), rt.tokenizer.eos_token_id]
        return rt.model.match(states[index][None], torch.tensor([ids])).softmax(-1)[0, 1]

    found = rt.match([SQUARE, WIDE, TALL, SQUARE, WIDE], TEXTS)
    torch.testing.assert_close(found, torch.stack([alone(i, text) for i, text in enumerate(TEXTS)]), **CLOSE)
    one_image = rt.match(WIDE, TEXTS)
    torch.testing.assert_close(one_image, torch.stack([alone(1, text) for text in TEXTS]), **CLOSE)
    one_text = rt.match([SQUARE, WIDE, TALL], TEXTS[0])
    torch.testing.assert_close(one_text, torch.stack([alone(i, TEXTS[0]) for i in range(3)]), **CLOSE)


# --- classes ---


def test_classes_are_scored_by_the_mean_of_their_prompts(rt):
    names = ["cat", ["dog", "hound"], "panda"]
    templates = ["a photo of a {}.", "{} in the snow"]
    prompts = [["cat"], ["dog", "hound"], ["panda"]]
    columns = []
    for words in prompts:
        texts = [template.replace("{}", word) for word in words for template in templates]
        rows = F.normalize(rt.embed(texts=texts, normalize=False).double(), dim=-1)
        columns.append(F.normalize(rows.mean(0), dim=0))
    images = rt.embed(images=[SQUARE, WIDE], mode="g").double()
    expected = (100 * images @ torch.stack(columns).T).softmax(-1)
    found = rt.classify([SQUARE, WIDE], names, templates, mode="g")
    assert found.class_names == ["cat", "dog", "panda"]
    torch.testing.assert_close(found.probabilities.double(), expected, atol=1e-4, rtol=0)
    assert found.labels == [["cat", "dog", "panda"][row.argmax()] for row in expected]
    assert [[name for name, _ in row] for row in found.top(2)] == [
        [["cat", "dog", "panda"][index] for index in row.topk(2).indices] for row in expected
    ]


@pytest.mark.parametrize("language", TEMPLATES)
def test_ready_made_classes_bring_the_prompts_of_their_language(rt, language):
    found = rt.classifier(f"cifar10-{language}")
    assert found.shape == (10, 20)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(10))
    assert torch.equal(rt.classifier(f"cifar10-{language}", language), found)
    assert not torch.allclose(rt.classifier(f"cifar10-{language}", ["{}"]), found, atol=1e-3)


def test_prompts_are_embedded_once_for_many_images(rt, monkeypatch):
    first = rt.classify(SQUARE, ["cat", "dog"], "en")
    monkeypatch.setattr(type(rt.model), "embed_texts", lambda *_: pytest.fail("prompts were embedded again"))
    assert torch.equal(rt.classify(SQUARE, ["cat", "dog"]).probabilities, first.probabilities)


# --- mistakes ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rt: rt.embed(), "exactly one of texts, images and videos, not 0"),
        (lambda rt: rt.embed(texts="a", images=SQUARE), "exactly one of texts, images and videos, not 2"),
        (lambda rt: rt.embed(texts=[]), "embed: no texts were given"),
        (lambda rt: rt.embed(texts=["a", ""]), "embed: text 2 is empty"),
        (lambda rt: rt.embed(texts=" \n"), "embed: text 1 is empty"),
        (lambda rt: rt.embed(texts=["a", 3]), "embed: text 2 must be a string, not int"),
        (lambda rt: rt.embed(texts={"a": 1}), "texts must be a string or a list of them, not dict"),
        (lambda rt: rt.embed(texts=["a", "\ud800"]), "lone surrogate"),
        (lambda rt: rt.embed(images=[]), "embed: no images were given"),
        (lambda rt: rt.embed(videos=[]), "embed: no videos were given"),
        (lambda rt: rt.embed(videos=[[]]), "video 1: has no frames"),
        (lambda rt: rt.embed(images=[SQUARE, 7]), "image 2: a path, bytes"),
        (lambda rt: rt.embed(images=SQUARE, mode="x"), "mode='x': must be 'c' (InternVL-C) or 'g'"),
        (lambda rt: rt.embed(texts="a", mode="C"), "mode='C'"),
        (lambda rt: rt.embed(images=SQUARE, image_size=100), "image_size=100: must be a positive multiple of 14"),
        (lambda rt: rt.embed(images=SQUARE, image_size=0), "image_size=0"),
        (lambda rt: rt.embed(images=SQUARE, batch_size=0), "batch_size=0: must be a positive integer"),
        (lambda rt: rt.embed(videos=[[SQUARE]], num_frames=True), "num_frames=True"),
        (lambda rt: rt.embed_each([], kind="sound"), "kind='sound'"),
        (lambda rt: rt.score([], ["a"]), "score: no images were given"),
        (lambda rt: rt.score([SQUARE], []), "score: no texts were given"),
        (lambda rt: rt.score([SQUARE], ["a"], mode="z"), "mode='z'"),
        (lambda rt: rt.classify([], ["a"]), "classify: no images were given"),
        (lambda rt: rt.classify(SQUARE, []), "class_names: must be a list that is not empty"),
        (lambda rt: rt.classify(SQUARE, ["a", ""]), "class_names: entry 2 must be a name"),
        (lambda rt: rt.classify(SQUARE, "imagenet22k"), "no such set; known: imagenet, cifar10-en"),
        (lambda rt: rt.classify(SQUARE, ["a"], ["no place"]), "templates: entry 1, 'no place', has no {}"),
        (lambda rt: rt.classify(SQUARE, ["a"], "fr"), "must hold a {} for the class name, or be one of en, zh"),
        (lambda rt: rt.match([SQUARE, WIDE], ["a", "b", "c"]), "match: 2 images and 3 texts do not pair up"),
        (lambda rt: rt.match([], ["a"]), "match: no images were given"),
        (lambda rt: rt.match([SQUARE], [""]), "match: text 1 is empty"),
    ],
)
def test_what_cannot_be_answered_is_said_so(rt, call, message):
    with pytest.raises(InvalidRequestError) as error:
        call(rt)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda rt: rt.generate("x"),
        lambda rt: rt.generate("x", SQUARE),
        lambda rt: rt.generate(["x", "y"]),
        lambda rt: rt.stream("x"),
        lambda rt: rt.chat([{"role": "user", "content": "x"}]),
        lambda rt: asyncio.run(rt.agenerate("x")),
        lambda rt: rt.encode_image(SQUARE),
        lambda rt: rt.count_tokens("x"),
    ],
)
def test_a_contrastive_model_that_is_asked_to_chat_says_what_it_has(rt, call):
    with pytest.raises(UnsupportedError, match=r"is a contrastive model \(InternVL-C/G\), which has embed"):
        call(rt)


def test_a_closed_runtime_says_so(folder):
    with Runtime.from_pretrained(folder, dtype="float32") as closed:
        pass
    for call in (
        lambda: closed.embed(texts="a"),
        lambda: closed.embed_each([]),
        lambda: closed.score(SQUARE, "a"),
        lambda: closed.classify(SQUARE, ["a"]),
        lambda: closed.match(SQUARE, "a"),
        lambda: closed.caption(SQUARE),
        lambda: closed.features(SQUARE),
    ):
        with pytest.raises(InvalidRequestError, match="this Runtime is closed"):
            call()
    closed.close()


def test_a_vision_encoder_on_its_own_has_features_and_nothing_else(tmp_path):
    config = {"model_type": "intern_vit_6b", **chat_config(vision=INTERNVIT_300M)["vision_config"]}
    weights = random_weights(config)
    assert "encoder.layers.0.attn.qkv.bias" in weights
    write_checkpoint(tmp_path, config, weights)
    with Runtime.from_pretrained(tmp_path, dtype="float32") as vision:
        found = vision.features([SQUARE, WIDE], [2], crop=True)
        expected = vision.model.vision_model.hidden_states(tiles(SQUARE, WIDE), [2])[2]
        assert torch.equal(found[2].class_token, expected[:, 0])
        with pytest.raises(UnsupportedError, match="vision encoder on its own, which has features"):
            vision.generate("x")
        with pytest.raises(UnsupportedError, match=r"embed: .* is a vision encoder on its own; only contrastive"):
            vision.embed(images=SQUARE)


def test_half_precision_embeds_close_to_single(folder, rt):
    with Runtime.from_pretrained(folder, dtype="bfloat16", device="cpu") as half:
        for keywords in ({"texts": TEXTS}, {"images": [SQUARE, WIDE]}, {"images": [SQUARE, WIDE], "mode": "g"}):
            cosines = (half.embed(**keywords) * rt.embed(**keywords)).sum(-1)
            assert cosines.min() > 0.999, keywords
