import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrail.runtime.engine.block_manager import BlockManager, block_key


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


def test_blocks_come_in_the_order_in_which_one_owner_held_them_and_a_table_grows_by_a_neighbour() -> None:
    manager = BlockManager(8, 1)
    assert manager.allocate("a", 3) == [0, 1, 2]
    assert manager.allocate("b", 2) == [3, 4]
    manager.free("a")
    assert manager.reserve("b", 3) == []
    assert manager.table("b") == [3, 4, 5]
    assert manager.allocate("c", 4) == [0, 1, 2, 6]


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


def keys_of(*contents: str) -> list[bytes]:
    keys = [b"root"]
    for text in contents:
        keys.append(block_key(keys[-1], [ord(letter) for letter in text], []))
    return keys[1:]


def test_a_key_is_of_all_that_came_before_and_of_the_images() -> None:
    plain = block_key(b"root", [1, 2], [])
    assert block_key(b"root", [1, 2], []) == plain
    others = {block_key(b"stem", [1, 2], []), block_key(b"root", [2, 1], []), block_key(b"root", [1, 2], [b"i" * 32])}
    assert len(others | {plain}) == 4


def test_published_blocks_are_shared_while_they_are_used_and_after() -> None:
    manager, keys = BlockManager(6, 4), keys_of("abcd", "efgh")
    first = manager.allocate("a", 10)
    manager.publish("a", keys)
    assert manager.cached(keys) == 2
    assert manager.cached([keys[0], b"?", keys[1]]) == 1
    assert manager.cost(10, keys) == 1
    assert manager.allocate("b", 10, keys)[:2] == first[:2]
    manager.free("a")
    manager.free("b")
    assert (manager.num_used, manager.num_idle) == (0, 2)
    assert manager.cost(10, keys) == 3  # idle ones are free for others, too
    assert manager.allocate("c", 12, keys)[:2] == first[:2]
    manager.check_integrity()


def test_idle_blocks_are_taken_when_none_is_free_the_oldest_and_the_last_of_a_prefix_first() -> None:
    manager = BlockManager(4, 4)
    for owner, text in (("a", "aaaa"), ("b", "bbbb")):
        manager.allocate(owner, 8)
        manager.publish(owner, keys_of(text, text))
        manager.free(owner)
    manager.allocate("c", 4)
    assert [manager.cached(keys_of(text, text)) for text in ("aaaa", "bbbb")] == [1, 2]
    manager.allocate("d", 8)
    assert [manager.cached(keys_of(text, text)) for text in ("aaaa", "bbbb")] == [0, 1]
    assert manager.num_evicted == 3
    manager.check_integrity()


def test_who_writes_to_a_shared_block_gets_a_copy_and_the_last_one_does_not() -> None:
    manager = BlockManager(8, 4)
    table = list(manager.allocate("a", 6))
    for other in ("b", "c"):
        manager.fork("a", other)
    assert manager.num_used == 2
    copies = [manager.reserve(owner, 7) for owner in ("b", "a", "c")]
    assert [len(made or ()) for made in copies] == [1, 1, 0]
    assert {source for made in copies[:2] for source, _ in made or ()} == {table[1]}
    assert manager.table("c") == table
    assert len({manager.table(owner)[1] for owner in "abc"}) == 3
    manager.check_integrity()


def test_a_reservation_that_cannot_be_had_changes_nothing() -> None:
    manager = BlockManager(2, 4)
    manager.allocate("a", 6)
    manager.fork("a", "b")
    assert manager.reserve("a", 7) is None
    assert manager.reserve("a", 9) is None
    assert manager.table("a") == manager.table("b")
    manager.free("b")
    assert manager.reserve("a", 7) == []
    manager.check_integrity()


def test_blocks_grow_to_the_limit_before_a_request_is_refused_but_after_idle_ones_are_used() -> None:
    manager = BlockManager(2, 4, limit=5)
    manager.allocate("a", 8)
    manager.publish("a", keys_of("abcd", "efgh"))
    manager.free("a")
    manager.allocate("b", 8)
    assert manager.num_blocks == 2
    manager.allocate("c", 4)
    assert manager.num_blocks == 4
    assert manager.available == 2
    with pytest.raises(ValueError, match="asks for 3 blocks, 2 are free"):
        manager.allocate("d", 12)
    manager.check_integrity()


def test_blocks_there_is_no_memory_for_are_taken_from_their_owners() -> None:
    manager = BlockManager(6, 4)
    tables = {owner: list(manager.allocate(owner, 8)) for owner in "abc"}
    manager.publish("c", keys_of("abcd", "efgh"))
    losers = manager.give_up(4)
    assert set(losers) == {owner for owner, table in tables.items() if max(table) >= 4}
    assert (manager.num_blocks, manager.limit) == (4, 4)
    manager.check_integrity()


def test_what_cannot_be_trusted_is_shared_no_more() -> None:
    manager, keys = BlockManager(4, 4), keys_of("abcd")
    manager.allocate("a", 4)
    manager.publish("a", keys)
    manager.forget("a")
    assert manager.cached(keys) == 0
    manager.free("a")
    assert manager.num_idle == 0
    manager.check_integrity()
