"""The pictures of the bundled model: reproducible, labelled where they are drawn, and split into two worlds."""

import random
import re

import numpy as np
import pytest

from vitrail.bench.nano.canvas import TILE_CELLS
from vitrail.bench.nano.picture import FIELDS, LABELS, token_index
from vitrail.bench.nano.tasks import KINDS, TASKS, draw_picture
from vitrail.bench.nano.vocabulary import CHARACTERS, belongs, draw_number, draw_word
from vitrail.runtime.image import choose_grid


@pytest.mark.parametrize("kind", KINDS)
def test_a_numbered_picture_is_always_the_same_and_another_one_in_the_other_split(kind: str) -> None:
    first, again = draw_picture(kind, "train", 7), draw_picture(kind, "train", 7)
    assert np.array_equal(first.pixels, again.pixels)
    assert first.questions == again.questions
    other = draw_picture(kind, "held-out", 7)
    assert other.pixels.shape != first.pixels.shape or not np.array_equal(other.pixels, first.pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_fill_one_tile_or_two_and_labels_cover_their_cells(kind: str) -> None:
    for number in range(12):
        picture = draw_picture(kind, "train", number)
        height, width, _ = picture.pixels.shape
        columns, rows = choose_grid(width, height, 224, 1, 2)
        assert columns == 1
        assert set(picture.labels) == set(LABELS)
        for name, classes in LABELS.items():
            labels = picture.labels[name]
            assert labels.shape == (rows * TILE_CELLS, TILE_CELLS)
            assert labels.min() >= 0 and labels.max() < classes, name


@pytest.mark.parametrize("kind", KINDS)
def test_every_question_belongs_to_a_task_of_its_kind(kind: str) -> None:
    asked = {question.task for number in range(30) for question in draw_picture(kind, "train", number).questions}
    assert asked == {task for task, owner in TASKS.items() if owner == kind}


@pytest.mark.parametrize("kind", ["receipt", "sign", "table"])
def test_answers_stand_where_their_sources_say(kind: str) -> None:
    for number in range(20):
        picture = draw_picture(kind, "train", number)
        for question in picture.questions:
            assert len(question.sources) == len(question.answer)
            for character, (row, column) in zip(question.answer, question.sources, strict=True):
                if row >= 0:  # the dollar sign of an item's price is not printed
                    assert picture.labels["character"][row, column] == 1 + CHARACTERS.index(character)


def test_a_receipts_total_is_the_sum_of_its_prices() -> None:
    for number in range(50):
        questions = draw_picture("receipt", "held-out", number).questions
        cents = [int(re.sub(r"\D", "", q.answer)) for q in questions if q.task == "receipt price"]
        (total,) = (q.answer for q in questions if q.task == "receipt total")
        assert total == f"${sum(cents) / 100:.2f}"


@pytest.mark.parametrize("kind", ["receipt", "sign"])
def test_held_out_strings_are_never_trained_on(kind: str) -> None:
    answers = {
        split: {
            question.answer
            for number in range(150)
            for question in draw_picture(kind, split, number).questions
            if question.task != "receipt price"  # a price is kept back together with its item
        }
        for split in ("train", "held-out")
    }
    assert not answers["train"] & answers["held-out"]


def test_every_string_belongs_to_exactly_one_split() -> None:
    rng = random.Random(0)
    for _ in range(100):
        word, number = draw_word(rng, "train", 3, 8), draw_number(rng, "held-out", 8)
        assert belongs("train", word) and not belongs("held-out", word)
        assert belongs("held-out", number) and not belongs("train", number)


def test_visual_tokens_are_counted_tile_by_tile() -> None:
    assert token_index(0, 0) == 0
    assert token_index(7, 7) == 63
    assert token_index(8, 0) == 64
    assert FIELDS[0] == "none"
