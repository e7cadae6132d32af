"""Work done a little ahead."""

import threading

import pytest

from vitrail.runtime.prefetch import batched, prefetched


def test_results_come_in_the_order_of_the_items_whatever_is_done_first():
    turn = threading.Event()

    def make(item):
        if item == 0:
            turn.wait(5)
        if item == 1:
            turn.set()
        return item

    assert list(prefetched(make, range(5), ahead=3)) == [0, 1, 2, 3, 4]


def test_items_are_drawn_only_so_far_ahead():
    drawn = []
    results = prefetched(lambda item: item, (drawn.append(item) or item for item in range(20)), ahead=3)
    assert next(results) == 0
    assert drawn == [0, 1, 2, 3]
    assert next(results) == 1
    assert drawn == [0, 1, 2, 3, 4]
    assert list(results) == list(range(2, 20))


def test_an_error_comes_where_its_result_would():
    results = prefetched(lambda item: 1 // item, [1, 0, 1], ahead=2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_threads_end_when_nobody_wants_more():
    before = threading.active_count()
    results = prefetched(lambda item: item, range(100), ahead=4)
    next(results)
    results.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (3, [3]), (4, [4]), (9, [4, 4, 1])])
def test_batches_are_full_but_for_the_last(count, sizes):
    found = list(batched(range(count), 4))
    assert [len(batch) for batch in found] == sizes
    assert [item for batch in found for item in batch] == list(range(count))
