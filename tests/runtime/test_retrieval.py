"""Recall at k against rankings written out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vitrail.runtime import retrieval
from vitrail.runtime.retrieval import ranks, recall, retrieval_recall


def unit(rows, seed, dim=5):
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def plain_recall(similarity, right, k):
    """similarity: (queries, candidates); right: the set of right candidates of each query."""
    hits = 0
    for row, wanted in zip(similarity.tolist(), right, strict=True):
        order = sorted(range(len(row)), key=lambda index: -row[index])
        hits += bool(wanted & set(order[:k]))
    return 100 * hits / len(right)


@given(st.integers(1, 12), st.integers(0, 10**6), st.booleans())
def test_recall_is_that_of_the_sorted_candidates(count, seed, dual):
    generator = torch.Generator().manual_seed(seed)
    owners = torch.cat((torch.arange(count), torch.randint(count, (2 * count,), generator=generator))).tolist()
    images, texts = unit(count, seed), unit(len(owners), seed + 1)
    to_image = texts.double() @ images.double().T
    to_text = to_image.T
    if dual:
        to_image, to_text = (part * part.softmax(0) for part in (to_image, to_text))
    found = retrieval_recall(images.double(), texts.double(), owners, (1, 3), dual_softmax=dual)
    for k in (1, 3):
        assert found["text_to_image"][f"R@{k}"] == pytest.approx(plain_recall(to_image, [{o} for o in owners], k))
        own = [{index for index, owner in enumerate(owners) if owner == image} for image in range(count)]
        assert found["image_to_text"][f"R@{k}"] == pytest.approx(plain_recall(to_text, own, k))


@pytest.mark.parametrize("dual", [False, True])
def test_large_sets_are_ranked_in_pieces(monkeypatch, dual):
    queries, candidates = unit(23, 0), unit(17, 1)
    ids = torch.arange(23) % 17
    whole = ranks(queries, candidates, ids, torch.arange(17), dual_softmax=dual)
    monkeypatch.setattr(retrieval, "_CHUNK", 40)
    assert torch.equal(ranks(queries, candidates, ids, torch.arange(17), dual_softmax=dual), whole)


def test_a_tie_counts_as_a_miss():
    same = torch.ones(4, 3)
    assert ranks(same, same, torch.arange(4), torch.arange(4)).tolist() == [3] * 4
    assert recall(torch.tensor([0, 3, 4, 9]), (1, 5, 10)) == {"R@1": 25.0, "R@5": 75.0, "R@10": 100.0}
