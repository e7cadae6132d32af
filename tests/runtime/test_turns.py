"""Whose turn it is: one at a time, no message lost, nobody asleep for ever."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vitrail.runtime.engine.turns import Turns


def test_one_thread_drives_at_a_time_and_every_waiting_one_returns() -> None:
    steps, inside, most = [0], [0], [0]

    def step() -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.001)
        steps[0] += 1
        inside[0] -= 1

    turns = Turns(step)
    with ThreadPoolExecutor(6) as pool:
        tasks = [pool.submit(turns.drive_until, lambda most=number: steps[0] >= most) for number in range(10, 70, 10)]
        for task in tasks:
            task.result(30)
    assert most == [1]
    assert 60 <= steps[0] <= 65
    assert turns.idle


def test_who_has_what_it_waited_for_is_not_kept_by_who_drives_on() -> None:
    steps = [0]

    def step() -> None:
        time.sleep(0.001)
        steps[0] += 1

    turns = Turns(step)
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(turns.drive_until, lambda: steps[0] >= 500)
        turns.drive_until(lambda: steps[0] >= 5)
        assert steps[0] < 250
        steps[0] = 500
        long.result(30)


def test_a_message_is_read_at_once_if_nobody_drives_and_in_order() -> None:
    turns, read = Turns(lambda: None), []
    for number in range(3):
        turns.post(lambda number=number: read.append(number))
    assert read == []
    turns.post(lambda: read.append(3), now=True)
    assert read == [0, 1, 2, 3]


def test_a_message_left_in_the_middle_of_a_turn_is_read_at_its_end_even_by_the_same_thread() -> None:
    turns, read = Turns(lambda: None), []
    with turns.turn():
        turns.post(lambda: read.append("own"), now=True)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(turns.post, lambda: read.append("other"), now=True).result(10)
        assert read == []
    assert read == ["own", "other"]
    assert turns.idle


def test_no_message_is_lost_between_threads() -> None:
    read: list[int] = []
    turns = Turns(lambda: turns.read())

    def leave(first: int) -> None:
        for number in range(first, first + 200):
            turns.post(lambda number=number: read.append(number), now=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(leave, range(0, 800, 200)))
    assert sorted(read) == list(range(800))
    assert turns.idle


@pytest.mark.parametrize("_", range(3))
def test_the_background_lives_as_long_as_it_has_members(_: int) -> None:
    done, steps = threading.Event(), [0]

    def step() -> None:
        steps[0] += 1
        if steps[0] == 5:
            turns.leave("member")
            turns.announce(done.set)

    turns = Turns(step)
    turns.join("member")
    assert done.wait(10)
    for thread in threading.enumerate():
        if thread.name == "vitrail-engine":
            thread.join(10)
    assert steps == [5]
    assert turns.idle


def test_an_error_of_a_step_gives_the_turn_back_and_reaches_who_drives() -> None:
    turns = Turns(lambda: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            turns.drive_until(lambda: False)
        assert turns.idle
