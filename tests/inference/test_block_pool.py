"""No block is lost, none is given away twice, and a known prefix is found as long as its blocks are not needed."""

import random

import pytest

from errors import KestrelError
from inference.block_pool import ROOT, BlockPool


def fill(pool: BlockPool, ids: list[int], blocks: list[int]) -> None:
    """Note a prompt's full pages."""
    parent = ROOT
    for i in range(len(ids) // pool.page):
        parent = pool.know(parent, ids[i * pool.page : (i + 1) * pool.page], blocks[i], {})


def found(pool: BlockPool, ids: list[int]) -> list[int]:
    return [prefix.block for prefix in pool.find(ids)]


def test_blocks_come_and_go():
    pool = BlockPool(3, page=4)
    a, b = pool.allocate(2), pool.allocate(1)
    assert sorted(a + b) == [1, 2, 3]  # block 0 is nobody's
    with pytest.raises(KestrelError, match="full: 1 blocks are needed and 0"):
        pool.allocate(1)
    pool.share(a)
    pool.release(a)
    assert pool.n_available == 0
    pool.release(a)
    assert (pool.n_available, pool.n_held) == (2, 1)
    with pytest.raises(AssertionError, match="once too often"):
        pool.release(a)


def test_a_prefix_is_found_page_by_page_and_never_the_whole_prompt():
    pool = BlockPool(9, page=2)
    blocks = pool.allocate(3)
    fill(pool, [1, 2, 3, 4, 5, 6], blocks)
    assert found(pool, [1, 2, 3, 4, 5, 6, 7]) == blocks
    assert found(pool, [1, 2, 3, 4, 5, 6]) == blocks[:2]  # the last token must be read again
    assert found(pool, [1, 2, 3, 4, 9, 9, 9]) == blocks[:2]
    assert found(pool, [1, 2]) == found(pool, [9, 2, 3, 4, 5]) == found(pool, [3, 4, 5, 6, 7]) == []


def test_two_prompts_with_the_same_pages_keep_one_set():
    pool = BlockPool(9, page=2)
    first, second = pool.allocate(2), pool.allocate(2)
    fill(pool, [1, 2, 3, 4], first)
    fill(pool, [1, 2, 3, 4], second)
    assert found(pool, [1, 2, 3, 4, 5]) == first
    pool.release(second)
    assert pool.n_available == 9 - 2
    assert not pool.idle


def test_idle_blocks_are_given_away_the_longest_unused_and_the_end_of_a_prefix_first():
    pool = BlockPool(4, page=1)
    old, new = pool.allocate(2), pool.allocate(2)
    fill(pool, [1, 2], old)
    fill(pool, [7, 8], new)
    pool.release(old)
    pool.release(new)
    assert pool.n_available == 4
    assert pool.allocate(1) == [old[1]]
    assert found(pool, [1, 2, 3]) == [old[0]]
    assert found(pool, [7, 8, 9]) == new
    pool.share(new)  # found again, so no longer idle
    assert pool.allocate(1) == [old[0]]
    with pytest.raises(KestrelError):
        pool.allocate(1)


def test_what_follows_a_forgotten_page_is_not_found_even_if_the_page_comes_back():
    pool = BlockPool(3, page=1)
    blocks = pool.allocate(2)
    fill(pool, [1, 2], blocks)
    pool.release(blocks[:1])
    pool.allocate(2)  # takes the free one and the first page
    again = pool.key_of.copy()
    assert blocks[0] not in again
    assert found(pool, [1, 2, 3]) == []


def test_any_order_of_taking_sharing_and_giving_back_loses_nothing():
    dice, pool = random.Random(0), BlockPool(20, page=2)
    held: list[list[int]] = []
    for _ in range(3000):
        ids = [dice.randrange(3) for _ in range(dice.randrange(1, 12))]
        known = found(pool, ids)
        pool.share(known)
        n = len(ids) // 2 + 1 - len(known)
        if n <= pool.n_available and dice.random() < 0.6:
            blocks = known + pool.allocate(n)
            fill(pool, ids, blocks)
            held.append(blocks)
        else:
            pool.release(known)
            if held:
                pool.release(held.pop(dice.randrange(len(held))))
        users = [sum(block in blocks for blocks in held) for block in range(21)]
        assert pool.refs == users
        assert pool.n_held == sum(n > 0 for n in users)
        assert not set(pool.free) & set(pool.idle)
    for blocks in held:
        pool.release(blocks)
    assert pool.n_available == 20
    assert set(pool.idle) == set(pool.key_of)
