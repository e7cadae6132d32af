"""Recall at k, from embeddings alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 2**25  # similarities in memory at once: 128 MiB


def ranks(
    queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor, *, dual_softmax: bool = False
) -> Tensor:
    """(queries,) int64: how many wrong candidates stand before, or level with, the best right one of each query.

    queries: (n, d), candidates: (m, d), of unit length. A candidate is right for the queries that share its id.
    dual_softmax: similarities are weighed with their softmax over all queries, as in the video retrieval of the
    paper: a candidate that is near to everything counts for less.
    """
    rows = max(1, _CHUNK // len(candidates))
    norm = None
    if dual_softmax:
        parts = [(part @ candidates.T).logsumexp(0) for part in queries.split(rows)]
        norm = torch.stack(parts).logsumexp(0)  # [m]
    found = []
    for part, ids in zip(queries.split(rows), query_ids.split(rows), strict=True):
        similarity = part @ candidates.T
        if norm is not None:
            similarity = similarity * (similarity - norm).exp()
        right = ids[:, None] == candidate_ids
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        found.append(((similarity >= best) & ~right).sum(1))
    return torch.cat(found)


def recall(ranked: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """`R@k` in percent: for how many queries a right candidate is among the first k."""
    return {f"R@{k}": 100 * (ranked < k).double().mean().item() for k in ks}


def retrieval_recall(
    images: Tensor,
    texts: Tensor,
    image_of_text: Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
    *,
    dual_softmax: bool = False,
) -> dict[str, dict[str, float]]:
    """Recall both ways. images: (n, d), texts: (m, d), of unit length; image_of_text: which image each text is of."""
    owners, own = torch.as_tensor(image_of_text), torch.arange(len(images))
    to_image = ranks(texts, images, owners, own, dual_softmax=dual_softmax)
    to_text = ranks(images, texts, own, owners, dual_softmax=dual_softmax)
    return {"text_to_image": recall(to_image, ks), "image_to_text": recall(to_text, ks)}
