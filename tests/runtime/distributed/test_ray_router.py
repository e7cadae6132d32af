"""Which replica a request goes to: the home of its picture, unless others are idler."""

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from vitrail.runtime.distributed.ray_router import PATIENCE, PictureRouter, home_of

NAMES = ["a", "b", "c", "d"]
KEYS = [f"picture {number}" for number in range(400)]


class Router(PictureRouter):
    """The router without Ray around it: what it knows of the replicas is given."""

    def __init__(self, loads: dict[str, int | None]) -> None:
        self._loads = loads

    @property
    def replica_queue_len_cache(self) -> Any:
        return SimpleNamespace(get=lambda replica_id: self._loads[replica_id.unique_id])

    def choose(self, key: str | None) -> list[list[str]]:
        """The ranks for a request about the picture `key`; None: there is no request."""
        replicas: Any = [SimpleNamespace(replica_id=Name(name)) for name in self._loads]
        context = SimpleNamespace(should_backoff=False)
        request: Any = SimpleNamespace(metadata=SimpleNamespace(session_id=key), routing_context=context)
        ranks = asyncio.run(self.choose_replicas(replicas, None if key is None else request))
        assert key is None or not replicas or context.should_backoff
        return [[one.replica_id.unique_id for one in rank] for rank in ranks]


class Name(str):
    """A replica's id."""

    @property
    def unique_id(self) -> str:
        return str(self)


def test_pictures_are_spread_evenly():
    counts = Counter(home_of(key, NAMES) for key in KEYS)
    assert set(counts) == set(NAMES)
    assert max(counts.values()) < 1.4 * len(KEYS) / len(NAMES)


def test_a_replica_that_goes_moves_no_other_picture():
    for key in KEYS:
        before = home_of(key, NAMES)
        assert home_of(key, NAMES[::-1]) == before
        if before != "d":
            assert home_of(key, NAMES[:3]) == before


def test_a_picture_goes_home_while_that_is_hardly_busier():
    home = home_of("x", NAMES)
    others = dict.fromkeys(NAMES, 5)
    assert Router({**others, home: 5 + PATIENCE}).choose("x")[0] == [home]
    [idlest, everyone] = Router({**others, home: 6 + PATIENCE}).choose("x")
    assert home not in idlest
    assert set(everyone) == set(NAMES)


def test_what_is_full_at_home_goes_elsewhere_in_the_end():
    assert set(Router(dict.fromkeys(NAMES, 0)).choose("x")[-1]) == set(NAMES)


def test_without_a_picture_the_idlest_are_chosen():
    assert set(Router({"a": 3, "b": 1, "c": 2, "d": 3}).choose("")[0]) == {"b", "c"}
    assert set(Router({"a": 3, "b": 1, "c": 2, "d": 3}).choose(None)[0]) == {"b", "c"}


def test_equally_idle_replicas_share_what_comes():
    first = Counter(Router(dict.fromkeys(NAMES, 0)).choose("")[0][0] for _ in range(200))
    assert set(first) == set(NAMES)


def test_a_replica_of_which_nothing_is_known_counts_as_idle():
    assert "c" in Router({"a": 1, "b": 1, "c": None, "d": 1}).choose("")[0]


def test_nobody_is_chosen_of_nobody():
    assert Router({}).choose("x") == []
