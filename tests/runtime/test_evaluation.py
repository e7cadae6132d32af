"""Retrieval and classification over a data set, against the same figures worked out one by one."""

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vitrail.runtime import Runtime
from vitrail.runtime.datasets import Sample
from vitrail.runtime.errors import InvalidRequestError, UnsupportedError
from vitrail.runtime.evaluation import evaluate_classification, evaluate_retrieval
from vitrail.runtime.retrieval import retrieval_recall

from .tiny_contrastive import write_tiny_contrastive
from .tiny_model import picture, write_tiny_model

IMAGES = [picture(90, 90, seed) for seed in range(6)]
CAPTIONS = [
    ("a cat", "one cat"),
    ("a dog",),
    ("a panda", "a red panda", "小熊猫"),
    ("x",),
    ("two cats",),
    ("sofa", "a"),
]


def encoded(image):
    Image.fromarray(image).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


SAMPLES = [
    Sample(f"{index}.png", encoded(image), label="aaaabc"[index], captions=captions)
    for index, (image, captions) in enumerate(zip(IMAGES, CAPTIONS, strict=True))
]
BROKEN = Sample("broken.png", b"nothing", label="a", captions=("never seen",))


@pytest.fixture(scope="module")
def rt(sentencepiece_folder):
    folder = write_tiny_contrastive(sentencepiece_folder(tokens=[]))
    with Runtime.from_pretrained(folder, dtype="float32", device="cpu") as runtime:
        yield runtime


@pytest.mark.parametrize("mode", ["c", "g"])
def test_recall_is_that_of_the_embeddings_of_stretched_images(rt, mode):
    wide = [picture(200, 100, seed) for seed in range(3)]
    samples = [Sample(str(i), encoded(image), captions=CAPTIONS[i]) for i, image in enumerate(wide)]
    found = evaluate_retrieval(rt, samples, mode=mode, ks=(1, 2), batch_size=2)
    images = rt.embed(images=wide, mode=mode, crop=False)
    texts = rt.embed(texts=[caption for captions in CAPTIONS[:3] for caption in captions])
    assert found.recall == retrieval_recall(images, texts, [0, 0, 1, 2, 2, 2], (1, 2))
    assert (found.num_images, found.num_texts, found.failed, found.dual_softmax) == (3, 6, {}, None)
    reranked = evaluate_retrieval(rt, samples, mode=mode, ks=(1, 2), dual_softmax=True).dual_softmax
    assert reranked == retrieval_recall(images, texts, [0, 0, 1, 2, 2, 2], (1, 2), dual_softmax=True)


def test_an_image_that_cannot_be_read_is_left_out_with_its_captions(rt):
    whole = evaluate_retrieval(rt, SAMPLES, ks=(1,))
    found = evaluate_retrieval(rt, [*SAMPLES[:2], BROKEN, *SAMPLES[2:]], ks=(1,))
    assert found.failed == {"broken.png": "image 3: cannot decode: not a JPEG, PNG, WebP, BMP or GIF image"}
    assert (found.recall, found.num_texts) == (whole.recall, whole.num_texts)


def test_videos_are_ranked_with_and_without_dual_softmax(rt):
    videos = [[IMAGES[0], IMAGES[1]], [IMAGES[2], IMAGES[3]]]
    samples = [
        Sample(str(index), frames, is_video=True, captions=CAPTIONS[index]) for index, frames in enumerate(videos)
    ]
    found = evaluate_retrieval(rt, samples, ks=(1,), mode="g")
    images = rt.embed(videos=videos, mode="g", crop=False)
    texts = rt.embed(texts=[*CAPTIONS[0], *CAPTIONS[1]])
    assert found.recall == retrieval_recall(images, texts, [0, 0, 1], (1,))
    assert found.dual_softmax == retrieval_recall(images, texts, [0, 0, 1], (1,), dual_softmax=True)


def test_accuracy_is_that_of_classify(rt):
    names = ["a", "b", "c"]
    found = evaluate_classification(rt, [*SAMPLES, BROKEN], names, "en", batch_size=4)
    answers = rt.classify(IMAGES, names, "en").labels
    right = [answer == sample.label for answer, sample in zip(answers, SAMPLES, strict=True)]
    assert found.top1 == pytest.approx(100 * sum(right) / 6)
    assert found.top5 == 100
    assert found.num_classes == 3
    assert found.num_images == 6
    assert list(found.failed) == ["broken.png"]
    by_class = [[right[index] for index in range(6) if SAMPLES[index].label == name] for name in names]
    assert found.mean_per_class == pytest.approx(100 * sum(sum(c) / len(c) for c in by_class) / 3)


def test_every_class_that_occurs_weighs_alike_in_the_mean_per_class(rt):
    answer = rt.classify(IMAGES, ["a", "b", "c"]).labels
    samples = [Sample(str(i), encoded(image), label=answer[0]) for i, image in enumerate(IMAGES)]
    found = evaluate_classification(rt, samples, ["a", "b", "c"])
    assert found.top1 == found.mean_per_class == pytest.approx(100 * answer.count(answer[0]) / 6)


def test_labels_are_names_or_numbers_or_stand_in_the_order_of_the_classes(rt):
    def top1(labels, names):
        samples = [
            Sample(sample.name, sample.source, label=label) for sample, label in zip(SAMPLES, labels, strict=True)
        ]
        return evaluate_classification(rt, samples, names).top1

    expected = top1("abcabc", ["a", "b", "c"])
    balanced = [replace(sample, label=label) for sample, label in zip(SAMPLES, "abcabc", strict=True)]
    assert expected == evaluate_classification(rt, balanced).top1  # the labels themselves
    assert top1("012012", ["a", "b", "c"]) == expected
    assert top1(["n01", "n02", "n03"] * 2, ["a", "b", "c"]) == expected
    assert top1("abcabc", [["a", "alpha"], "b", "c"]) >= 0
    with pytest.raises(InvalidRequestError, match="label 'x' is none of the 4 classes, and 3 labels are not as many"):
        top1("xbcxbc", ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rt: evaluate_retrieval(rt, []), "holds no images and no videos"),
        (lambda rt: evaluate_retrieval(rt, [Sample("a", SAMPLES[0].source)]), "a: has no caption"),
        (lambda rt: evaluate_classification(rt, [Sample("a", SAMPLES[0].source)]), "a: has no label"),
        (lambda rt: evaluate_retrieval(rt, [BROKEN]), "none of 1 images can be read; the first: image 1: cannot"),
        (
            lambda rt: evaluate_retrieval(rt, [SAMPLES[0], Sample("v", [IMAGES[0]], is_video=True)]),
            "v: images and videos do not go together",
        ),
        (lambda rt: evaluate_classification(rt, SAMPLES, ["a", 3]), "class_names: entry 2"),
    ],
)
def test_what_cannot_be_measured_is_said_so(rt, call, message):
    with pytest.raises(InvalidRequestError) as error:
        call(rt)
    assert message in str(error.value)


def test_the_data_is_read_once_and_not_kept(rt):
    def stream():
        for number in range(40):
            yield Sample(str(number), encoded(IMAGES[number % 6]), label="ab"[number % 2])

    found = evaluate_classification(rt, stream(), ["a", "b"], batch_size=8)
    assert found.num_images == 40
    assert torch.tensor(found.top1).isfinite()


def test_a_chat_model_is_not_evaluated(sentencepiece_folder):
    with (
        Runtime.from_pretrained(write_tiny_model(sentencepiece_folder()), dtype="float32") as chat,
        pytest.raises(UnsupportedError, match="is a chat model"),
    ):
        evaluate_retrieval(chat, SAMPLES)
