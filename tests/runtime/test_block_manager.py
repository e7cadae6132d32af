import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrail.runtime.engine.block_manager import BlockManager


def test_blocks_are_lent_for_all_tokens_and_come_back() -> None:
    manager = BlockManager(5, 4)
    assert manager.blocks_for(0) == 0
    assert manager.allocate("a", 9) == [0, 1, 2]
    assert manager.allocate("b", 4) == [3]
    assert (manager.num_used, manager.num_free) == (4, 1)
    assert manager.table("a") == [0, 1, 2]
    manager.free("a")
    manager.free("a")  # nothing is held: nothing happens
    assert (manager.num_used, manager.num_free) == (1, 4)


def test_neighbouring_blocks_are_preferred_and_scattered_ones_taken_where_there_are_none() -> None:
    manager = BlockManager(8, 1)
    for owner in range(8):
        manager.allocate(owner, 1)
    for owner in (0, 2, 5, 6):
        manager.free(owner)
    assert manager.allocate("pair", 2) == [5, 6]
    assert manager.allocate("apart", 2) == [0, 2]


def test_more_than_is_free_and_a_second_table_are_refused() -> None:
    manager = BlockManager(2, 4)
    with pytest.raises(ValueError, match="'a' asks for 3 blocks, 2 are free"):
        manager.allocate("a", 9)
    manager.allocate("a", 4)
    with pytest.raises(ValueError, match="'a' asks for 1 blocks"):
        manager.allocate("a", 1)
    with pytest.raises(ValueError, match="cannot shrink from 2 to 1"):
        manager.grow(1)


@given(st.lists(st.tuples(st.sampled_from("afg"), st.integers(0, 6), st.integers(0, 40)), max_size=30))
def test_no_block_is_lost_or_lent_twice(actions: list[tuple[str, int, int]]) -> None:
    manager = BlockManager(4, 3)
    for action, owner, amount in actions:
        if action == "f":
            manager.free(owner)
        elif action == "g":
            manager.grow(manager.num_blocks + amount % 4)
        else:
            try:
                table = manager.allocate(owner, amount)
            except ValueError:
                continue
            assert len(table) == manager.blocks_for(amount)
        manager.check_integrity()
