"""The contracts of the exercises of chapter 7."""

import builtins
import contextlib
import copy
import itertools
import math
import os
import random
import sys
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from minillm.cache.blocks import BlockPool, BlockTable, OutOfBlocks, chain_hash
from minillm.learn.testing import (
    exercise,
    expect,
    expect_close,
    expect_equal,
    expect_launches_compile,
    expect_raises,
    last,
)

# ---- 7.w1


@exercise("7.w1", "slots_of")
class TestSlotsOf:
    def test_by_hand(self, impl):
        """table [5, 1, 0], blocks of 4: positions 3, 6 and 8 lie in slots 23, 6 and 0"""
        got = impl([5, 1, 0], [3, 6, 8], 4)
        expect_equal("slots", got, [23, 6, 0])
        expect(all(type(slot) is int for slot in got), f"expected a list of int\n  got {got}")

    def test_every_position(self, impl):
        """other blocks, other sizes: no two positions share a slot, and a block's stand in a row"""
        for table, size in (([2, 0, 7], 1), ([9, 4], 16), ([3, 8, 1, 0, 6], 3)):
            expected = [block * size + place for block in table for place in range(size)]
            expect_equal(f"slots, table {table}, blocks of {size}",
                         impl(table, list(range(len(table) * size)), size), expected)  # fmt: skip

    def test_in_their_order(self, impl):
        """positions in any order, twice, or none"""
        expect_equal("slots of 8, 0, 0, 11", impl([5, 1, 0], [8, 0, 0, 11], 4), [0, 20, 20, 3])
        expect_equal("slots of none", impl([5, 1, 0], [], 4), [])

    def test_no_block(self, impl):
        """a position that no block holds is an IndexError, negative ones too"""
        for table, positions in (
            ([5, 1, 0], [12]), ([5, 1, 0], [0, 100]), ([5, 1, 0], [-1]), ([5, 1, 0], [3, -5]), ([], [0]), ([], [-1]),
        ):  # fmt: skip
            expect_raises(
                IndexError, lambda t=table, p=positions: impl(t, p, 4), f"table {table}, positions {positions}"
            )

    def test_arguments(self, impl):
        """the lists are as they were"""
        table, positions = [5, 1, 0], [8, 3]
        impl(table, positions, 4)
        expect_equal("table", table, [5, 1, 0])
        expect_equal("positions", positions, [8, 3])


# ---- 7.w2


@exercise("7.w2", "make_private")
class TestMakePrivate:
    def test_by_hand(self, impl):
        """A has blocks 0 and 1, B is a fork of it; B writes into block 1, then A does"""
        a, b, references, free = [0, 1], [0, 1], [2, 2, 0, 0], [3, 2]
        expect_equal("B writes: the copy", impl(b, 1, references, free), (1, 2))
        expect_equal("tables", [a, b], [[0, 1], [0, 2]])
        expect_equal("counts", references, [2, 1, 1, 0])
        expect_equal("free", free, [3])
        expect_equal("A writes, alone by now: the copy", impl(a, 1, references, free), None)
        expect_equal("tables", [a, b], [[0, 1], [0, 2]])
        expect_equal("counts", references, [2, 1, 1, 0])

    def test_alone(self, impl):
        """who is alone changes nothing and takes nothing"""
        table, references, free = [3, 0], [1, 0, 0, 2], [1, 2]
        expect_equal("the copy", impl(table, 1, references, free), None)
        expect_equal("table", table, [3, 0])
        expect_equal("counts", references, [1, 0, 0, 2])
        expect_equal("free", free, [1, 2])

    def test_the_last_free_block(self, impl):
        """the last of the list is taken, and block 0 is a block like others"""
        table, references, free = [2, 4, 3], [0, 0, 1, 5, 2], [1, 0]
        expect_equal("the copy", impl(table, 2, references, free), (3, 0))
        expect_equal("table", table, [2, 4, 0])
        expect_equal("counts", references, [1, 0, 1, 4, 2])
        expect_equal("free", free, [1])
        expect_equal("the copy of block 4", impl(table, 1, references, free), (4, 1))
        expect_equal("counts", references, [1, 1, 1, 4, 1])

    def test_out_of_blocks(self, impl):
        """no block is free: OutOfBlocks, and nothing changes; who is alone needs none"""
        table, references, free = [0, 1], [3, 1], []
        for _ in range(2):
            expect_raises(OutOfBlocks, lambda: impl(table, 0, references, free), "block 0 has a count of 3")
            expect_equal("table after the error", table, [0, 1])
            expect_equal("counts after the error", references, [3, 1])
        expect_equal("block 1, alone: the copy", impl(table, 1, references, free), None)

    def test_many_writers(self, impl):
        """of eight that share a block seven copy, and each ends alone"""
        tables, references, free = [[0] for _ in range(8)], [8, *[0] * 9], list(range(1, 10))
        copies = [impl(table, 0, references, free) for table in tables]
        expect_equal("copies", copies, [(0, 9 - i) for i in range(7)] + [None])
        expect_equal("counts", references, [1, 0, 0, 1, 1, 1, 1, 1, 1, 1])
        expect_equal("tables", tables, [[9], [8], [7], [6], [5], [4], [3], [0]])


# ---- 7.w3


def expect_owners(impl, counts: list[int], size: int) -> None:
    given = torch.tensor(counts)
    got = impl(given, size)
    expected = [i for i, n in enumerate(counts) for _ in range(n)]
    expected += [len(counts)] * (size - len(expected))
    what = f"counts {counts}, size {size}"
    expect(isinstance(got, torch.Tensor), f"{what}: expected a tensor\n  got {type(got).__name__}")
    expect_equal(f"owners, {what}", got.tolist(), expected)
    expect_equal(f"dtype, {what}", got.dtype, torch.int64)
    expect_equal("counts, afterwards", given.tolist(), counts)


@exercise("7.w3", "owners")
class TestOwners:
    def test_by_hand(self, impl):
        """counts [2, 0, 3] and 7 places: 0, 0, 2, 2, 2, and two that nobody owns"""
        expect_owners(impl, [2, 0, 3], 7)

    def test_sequences_without_tokens(self, impl):
        """none at the start, at the end, several in a row, or everywhere"""
        for counts in ([0, 2, 1], [2, 1, 0], [0, 0, 3, 0, 0, 1], [0, 0]):
            expect_owners(impl, counts, 6)

    def test_sizes(self, impl):
        """one sequence; exactly as many places as tokens; many more; no place at all"""
        expect_owners(impl, [4], 4)
        expect_owners(impl, [4], 9)
        expect_owners(impl, [1, 1, 5], 7)
        expect_owners(impl, [3, 2], 50)
        expect_owners(impl, [0, 0], 0)

    def test_no_sequence(self, impl):
        """no sequence at all: nobody owns any place"""
        got = impl(torch.zeros(0, dtype=torch.int64), 3)
        expect_equal("owners, no sequence, size 3", got.tolist(), [0, 0, 0])

    def test_large_counts(self, impl):
        """counts beyond 16 and 32 bits"""
        for n in (2**15, 2**31, 2**40):
            expect_equal(f"owners, counts [1, {n}, 5], size 4", impl(torch.tensor([1, n, 5]), 4).tolist(), [0, 1, 1, 1])

    def test_nothing_is_read(self, impl):
        """no value is read on the way, on a CPU neither"""
        counts = torch.tensor([2, 0, 3])
        with Watch() as watch:
            impl(counts, 7)
        expect(not watch.found, f"expected no operation that needs values\n  got {', '.join(sorted(watch.found))}")

    def test_shapes_alone(self, impl):
        """no value is read: it runs on tensors that have shapes alone (device "meta"), and makes new ones there"""
        counts = torch.empty(3, dtype=torch.int64, device="meta")
        try:
            got = impl(counts, 7)
        except (NotImplementedError, RuntimeError) as error:
            if str(error).startswith("Exercise"):
                raise
            expect(False, f"expected operations that need no values\n  got {error}".split(". ")[0])
        expect_equal("shape", tuple(got.shape), (7,))
        expect_equal("device", str(got.device), "meta")


# ---- 7.0


def names_of_prompt(tokens: list[int], size: int) -> list[bytes]:
    names, parent = [], b""
    for start in range(0, len(tokens) // size * size, size):
        parent = chain_hash(parent, tokens[start : start + size])
        names.append(parent)
    return names


def fill(pool, tokens: list[int], size: int) -> list[int]:
    """A prompt comes, is computed and published: its table."""
    table = pool.match_prefix(tokens)
    expect(isinstance(table, list), f"match_prefix: expected a list of blocks\n  got {table!r}")
    while len(table) * size < len(tokens):
        table.append(pool.allocate())
    for block, name in zip(table, names_of_prompt(tokens, size), strict=False):
        pool.publish(block, name)
    return table


class Package:
    """The package's pool behind the names of the exercise."""

    def __init__(self, num_blocks: int, size: int) -> None:
        self.pool = BlockPool(num_blocks, size)
        self.allocate, self.publish, self.release = self.pool.allocate, self.pool.publish, self.pool.release

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    def match_prefix(self, tokens: list[int]) -> list[int]:
        table = BlockTable(self.pool)
        table.match_prefix(tokens)
        return list(table.blocks)


@exercise("7.0", "PrefixPool")
class TestPrefixPool:
    def test_a_prefix_is_found(self, impl):
        """blocks of 4, two prompts that share 8 tokens: the second begins with the first two blocks"""
        pool = impl(8, 4)
        first = fill(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9], 4)
        expect_equal("the first one's table", first, [0, 1, 2])
        expect_equal("found by the second", pool.match_prefix([1, 2, 3, 4, 5, 6, 7, 8, 30, 31]), [0, 1])
        expect_equal("num_free", pool.num_free, 5)

    def test_a_long_prefix(self, impl):
        """a prefix of 20 blocks is found to its end"""
        pool, tokens, name = impl(24, 2), list(range(41)), b""
        blocks = [pool.allocate() for _ in range(20)]
        for i, block in enumerate(blocks):
            name = chain_hash(name, tokens[2 * i : 2 * i + 2])
            pool.publish(block, name)
        expect_equal("found", list(pool.match_prefix(tokens)), blocks)

    def test_the_past_counts(self, impl):
        """a block with the same tokens after others is not found, nor one behind a gap"""
        pool = impl(8, 2)
        fill(pool, [1, 2, 9, 9, 5, 5, 7], 2)
        expect_equal("found of [3, 4, 9, 9, ...]", pool.match_prefix([3, 4, 9, 9, 5, 5, 7]), [])
        expect_equal("found of [1, 2, 8, 8, 5, 5, ...]", pool.match_prefix([1, 2, 8, 8, 5, 5, 7]), [0])

    def test_a_block_is_lost(self, impl):
        """the second of three blocks has been handed out: the third is not found, though its name is there"""
        pool, tokens = impl(8, 2), [1, 1, 2, 2, 3, 3, 4]
        names = names_of_prompt(tokens, 2)
        for name in (names[0], names[2]):
            pool.publish(pool.allocate(), name)
        expect_equal("found", pool.match_prefix(tokens), [0])

    def test_one_token_is_left(self, impl):
        """of 8 tokens that are all cached, in blocks of 4, one block is found: something must be computed"""
        pool = impl(8, 4)
        fill(pool, [1, 2, 3, 4, 5, 6, 7, 8], 4)
        expect_equal("found of 8 tokens", pool.match_prefix([1, 2, 3, 4, 5, 6, 7, 8]), [0])
        expect_equal("found of 9 tokens", pool.match_prefix([1, 2, 3, 4, 5, 6, 7, 8, 1]), [0, 1])
        expect_equal("found of 4 tokens", pool.match_prefix([1, 2, 3, 4]), [])
        expect_equal("found of none", pool.match_prefix([]), [])

    def test_counts(self, impl):
        """a block is free when the last table that names it is gone"""
        pool = impl(4, 2)
        table = fill(pool, [1, 2, 3], 2)
        again = pool.match_prefix([1, 2, 3])
        expect_equal("num_free, two tables", pool.num_free, 2)
        pool.release(table[0])
        expect_equal("num_free, the first one is done", pool.num_free, 2)
        pool.release(again[0])
        expect_equal("num_free, both are done", pool.num_free, 3)

    def test_free_and_found(self, impl):
        """a free block is found, and is in use again: nobody else gets it"""
        pool = impl(2, 2)
        for block in reversed(fill(pool, [1, 2, 3, 4], 2)):
            pool.release(block)
        expect_equal("num_free", pool.num_free, 2)
        expect_equal("found", pool.match_prefix([1, 2, 3]), [0])
        expect_equal("num_free, one is found", pool.num_free, 1)
        expect_equal("allocated next", pool.allocate(), 1)
        expect_raises(OutOfBlocks, pool.allocate, "both blocks are in use")

    def test_a_stale_name(self, impl):
        """who gets a block anew writes into it: its old name is gone, and it may get a new one"""
        pool = impl(1, 2)
        (block, *_) = fill(pool, [1, 2], 2)
        pool.release(block)
        expect_equal("allocated", pool.allocate(), 0)
        expect_equal("found of the old prompt", pool.match_prefix([1, 2, 3]), [])
        pool.publish(0, chain_hash(b"", [5, 6]))
        expect_equal("found of the new prompt", pool.match_prefix([5, 6, 7]), [0])
        pool.release(0)
        pool.release(0)
        expect_equal("found of the new one, free", pool.match_prefix([5, 6, 7]), [0])

    def test_the_first_name_stays(self, impl):
        """two blocks with one content: the first keeps the name; and a block has one name"""
        pool = impl(4, 2)
        name, other = chain_hash(b"", [1, 2]), chain_hash(b"", [3, 4])
        a, b = pool.allocate(), pool.allocate()
        pool.publish(a, name)
        pool.publish(b, name)
        expect_equal("found of [1, 2, 0]", pool.match_prefix([1, 2, 0]), [a])
        pool.publish(a, other)
        expect_equal("found of [3, 4, 0], published second", pool.match_prefix([3, 4, 0]), [])
        pool.publish(b, other)
        expect_equal("found of [3, 4, 0], by the other block", pool.match_prefix([3, 4, 0]), [b])

    def test_who_goes_first(self, impl):
        """the least recently released goes first; what has no name goes before everything"""
        pool = impl(4, 2)
        blocks = [pool.allocate() for _ in range(4)]
        expect_equal("all blocks", blocks, [0, 1, 2, 3])
        for block in (0, 1, 3):
            pool.publish(block, chain_hash(b"", [block, block]))
        for block in (3, 0, 2, 1):
            pool.release(block)
        expect_equal("allocated, one after another", [pool.allocate() for _ in range(4)], [2, 3, 0, 1])

    def test_release(self, impl):
        """a block that is free already is a ValueError, and nothing changes"""
        pool = impl(3, 2)
        expect_raises(ValueError, lambda: pool.release(1), "never taken")
        block = pool.allocate()
        pool.release(block)
        for _ in range(2):
            expect_raises(ValueError, lambda: pool.release(block), "released twice")
        expect_equal("num_free", pool.num_free, 3)
        expect_equal("all blocks", sorted(pool.allocate() for _ in range(3)), [0, 1, 2])
        pool = impl(3, 2)
        block = pool.allocate()
        pool.publish(block, chain_hash(b"", [5, 6]))
        pool.release(block)
        expect_raises(ValueError, lambda: pool.release(block), "a named block, released twice")
        expect_equal("found after the error", pool.match_prefix([5, 6, 7]), [block])
        expect_equal("num_free, one table names it", pool.num_free, 2)
        pool.release(block)
        expect_equal("num_free, released by that table", pool.num_free, 3)

    def test_prompts_stay(self, impl):
        """a prompt may be a tuple, and is not changed"""
        pool, tokens = impl(4, 2), [1, 2, 3, 4, 5]
        fill(pool, tokens, 2)
        expect_equal("found of a tuple", pool.match_prefix(tuple(tokens)), [0, 1])
        pool.match_prefix(tokens)
        expect_equal("the prompt", tokens, [1, 2, 3, 4, 5])

    def test_random_operations(self, impl):
        """1,500 operations on 12 blocks, the same ones with the package's pool: the same blocks and counts"""
        for seed, size in ((0, 2), (1, 4), (2, 1)):
            draw, mine, theirs = random.Random(seed), impl(12, size), Package(12, size)
            talks = [[draw.randrange(3) for _ in range(4 * size + 1)] for _ in range(4)]
            tables: list[list[int]] = []
            for step in range(500):
                what = f"operation {step}, seed {seed}"
                if tables and (draw.random() < 0.45 or theirs.num_free < 3):
                    for block in reversed(tables.pop(draw.randrange(len(tables)))):
                        mine.release(block)
                        theirs.release(block)
                else:
                    tokens = draw.choice(talks)[: draw.randrange(1, 4 * size + 2)]
                    found = mine.match_prefix(list(tokens))
                    table = theirs.match_prefix(tokens)
                    expect_equal(f"found, {what}", found, table)
                    while len(table) * size < len(tokens) and theirs.num_free:
                        table.append(theirs.allocate())
                        expect_equal(f"allocated, {what}", mine.allocate(), table[-1])
                    for block, name in zip(table, names_of_prompt(tokens, size), strict=False):
                        mine.publish(block, name)
                        theirs.publish(block, name)
                    tables.append(table)
                expect_equal(f"num_free, {what}", mine.num_free, theirs.num_free)


# ---- 7.1


class Pool:
    """Hands out blocks, the last returned first, and notes what is done with them."""

    def __init__(self, size: int) -> None:
        self.free = list(range(size))
        self.held: set[int] = set()

    def allocate(self) -> int:
        if not self.free:
            self.error = OutOfBlocks("no block is free")
            raise self.error
        block = self.free.pop()
        self.held.add(block)
        return block

    def release(self, block: int) -> None:
        expect(block in self.held, f"expected the release of a block that is held, {sorted(self.held)}\n  got {block}")
        self.held.remove(block)
        self.free.append(block)


def needed(length: int, new: int, window: int, size: int) -> tuple[int, int]:
    """(first block, one past the last) of a step that brings `new` tokens after `length`, by looking at every pair."""
    positions = [j for p in range(length, length + new) for j in range(max(0, p - window + 1), p + 1)]
    return min(positions) // size, max(positions) // size + 1


def drive(impl, steps: list[int], window: int, size: int, blocks: int):
    """Run the steps, and hold after each that exactly the blocks which it needs are there."""
    pool = Pool(blocks)
    table = impl(size, window, pool.allocate, pool.release)
    length = 0
    for new in steps:
        table.extend(new)
        first, end = needed(length, new, window, size)
        what = f"step of {new} tokens after {length}, window {window}, blocks of {size}"
        length += new
        expect_equal(f"num_tokens, {what}", table.num_tokens, length)
        expect_equal(f"entries of the table, {what}", len(table.blocks), end)
        expect_equal(
            f"which entries are there, {what}", [b >= 0 for b in table.blocks], [i >= first for i in range(end)]
        )
        live = table.blocks[first:]
        expect(len(set(live)) == len(live), f"{what}: expected different blocks\n  got {live}")
        expect_equal(f"blocks held in the pool, {what}", sorted(pool.held), sorted(live))
    return table, pool


@exercise("7.1", "WindowTable")
class TestWindowTable:
    def test_by_hand(self, impl):
        """window 4, blocks of 2, one token a step: at position 5 the tokens 2 to 5 are seen, and block 0 is gone"""
        pool = Pool(8)
        table = impl(2, 4, pool.allocate, pool.release)
        alive = []
        for _ in range(8):
            table.extend(1)
            alive.append([i for i, block in enumerate(table.blocks) if block >= 0])
        expected = [[0], [0], [0, 1], [0, 1], [0, 1, 2], [1, 2], [1, 2, 3], [2, 3]]
        expect_equal("entries that are held after each token", alive, expected)

    def test_token_by_token(self, impl):
        """windows and block sizes of all kinds: exactly what the next token sees is held"""
        for window, size in ((1, 1), (1, 4), (3, 1), (4, 4), (5, 4), (8, 4), (7, 3), (16, 4)):
            drive(impl, [1] * 40, window, size, blocks=64)

    def test_chunks(self, impl):
        """chunks of a prompt: the first token of a chunk still sees a whole window back"""
        for steps in ([10, 10, 10, 1, 1, 1], [3, 17, 1, 8], [64, 1, 64], [1, 30, 2, 2, 2, 2]):
            for window, size in ((4, 4), (6, 4), (20, 8), (3, 2)):
                drive(impl, steps, window, size, blocks=128)

    def test_a_window_longer_than_the_text(self, impl):
        """nothing is given back"""
        table, _ = drive(impl, [7, 1, 1, 9], window=1000, size=4, blocks=8)
        expect(all(block >= 0 for block in table.blocks), f"expected no -1\n  got {table.blocks}")

    def test_entries_keep_their_places(self, impl):
        """a block that stays is the same one, at the same index"""
        pool = Pool(32)
        table = impl(4, 9, pool.allocate, pool.release)
        seen: dict[int, int] = {}
        for _ in range(60):
            table.extend(1)
            for index, block in enumerate(table.blocks):
                if block >= 0:
                    expect_equal(f"block at index {index}", block, seen.setdefault(index, block))

    def test_a_tight_pool(self, impl):
        """window 4, blocks of 4, two blocks in all: a step that needs a new block first gives the old one back"""
        drive(impl, [1] * 50, window=4, size=4, blocks=2)
        drive(impl, [1] * 50, window=1, size=4, blocks=1)

    def test_out_of_blocks(self, impl):
        """when the pool is empty, the error comes out, nothing taken in the call is kept, and it works again later"""
        pool = Pool(3)
        table = impl(4, 100, pool.allocate, pool.release)
        table.extend(5)
        before = list(table.blocks)
        for _ in range(2):
            expect_raises(OutOfBlocks, lambda: table.extend(12), "12 tokens more after 5, in 3 blocks of 4")
            expect_equal("the table after the error", list(table.blocks), before)
            expect_equal("num_tokens after the error", table.num_tokens, 5)
            expect_equal("blocks held after the error", sorted(pool.held), sorted(before))
        try:
            table.extend(12)
        except OutOfBlocks as error:
            expect(error is pool.error, "expected the error that allocate() raised\n  got another OutOfBlocks")
        table.extend(7)
        expect_equal("num_tokens after a smaller step", table.num_tokens, 12)
        expect_equal("blocks held after a smaller step", len(pool.held), 3)

    def test_out_of_blocks_after_giving_back(self, impl):
        """when it runs dry after dead blocks went back, they stay given back: others may have them by now"""
        pool = Pool(3)
        table = impl(4, 4, pool.allocate, pool.release)
        table.extend(12)
        expect_equal("entries of the table after 12 tokens", len(table.blocks), 3)
        last = table.blocks[2]
        for _ in range(2):
            expect_raises(OutOfBlocks, lambda: table.extend(12), "12 tokens more after 12, window 4, in 3 blocks of 4")
            expect_equal("the table after the error", list(table.blocks), [-1, -1, last])
            expect_equal("num_tokens after the error", table.num_tokens, 12)
            expect_equal("blocks held after the error", sorted(pool.held), [last])
        table.extend(4)
        expect_equal("blocks held after a smaller step", sorted(pool.held), sorted(table.blocks[2:]))
        table.free()
        expect_equal("blocks held after free", sorted(pool.held), [])
        whole, other = drive(impl, [5, 1], window=50, size=2, blocks=8)
        whole.free()
        expect_equal("blocks held after free, when none was dead", sorted(other.held), [])

    def test_free(self, impl):
        """free gives back each held block once; the table is empty and can begin again"""
        table, pool = drive(impl, [9, 1, 1, 1, 7], window=5, size=2, blocks=32)
        table.free()
        expect_equal("blocks held after free", sorted(pool.held), [])
        expect_equal("the table after free", list(table.blocks), [])
        table.free()
        table.extend(3)
        expect_equal("num_tokens of a new beginning", table.num_tokens, 3)
        expect_equal("blocks held by a new beginning", len(pool.held), 2)

    def test_another_sequence(self, impl):
        """after free, another sequence forgets as the first one did: nothing of its past is left in the table"""
        pool = Pool(32)
        table = impl(2, 5, pool.allocate, pool.release)
        for length in (23, 9, 14):
            for position in range(length):
                table.extend(1)
                first = max(0, position - 4) // 2
                what = f"token {position} of a sequence of {length}"
                expect_equal(f"entries that are held, {what}", [i for i, b in enumerate(table.blocks) if b >= 0],
                             list(range(first, position // 2 + 1)))  # fmt: skip
                expect_equal(f"blocks held in the pool, {what}", len(pool.held), position // 2 + 1 - first)
            expect_equal("num_tokens", table.num_tokens, length)
            table.free()
            expect_equal("num_tokens after free", table.num_tokens, 0)


# ---- 7.2


def slots_by_hand(tables, starts, counts, size, block_size, rank=0, ranks=1) -> list[int]:
    found = []
    for row, start, count in zip(tables, starts, counts, strict=True):
        for p in range(start, start + count):
            number = p // block_size
            mine = number % ranks == rank
            found.append(row[number // ranks] * block_size + p % block_size if mine else -1)
    return found + [-1] * (size - len(found))


READS_VALUES = {
    "item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "repeat_interleave", "unique", "__int__", "__index__",
    "__bool__", "__float__", "__contains__", "argwhere", "equal", "allclose", "is_nonzero",
}  # fmt: skip


class Watch(TorchFunctionMode):
    """Notes every call that would make the CPU wait for values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS_VALUES:
            self.found.add(name)
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index):
                self.found.add("boolean indexing")
        if name == "where" and len(args) == 1:
            self.found.add("where with one argument")
        return func(*args, **(kwargs or {}))


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.cuda() if torch.cuda.is_available() else t for t in tensors]


def call_slots_quietly(impl, tables, starts, counts, size, block_size):
    """One call, with nothing of the check's own between."""
    args = on_device(torch.tensor(tables, dtype=torch.int32), torch.tensor(starts), torch.tensor(counts))
    return impl(*args, size, block_size)


def call_slots(impl, tables, starts, counts, size, block_size, **more):
    args = on_device(torch.tensor(tables, dtype=torch.int32), torch.tensor(starts), torch.tensor(counts))
    before = [a.clone() for a in args]
    got = impl(*args, size, block_size, **more)
    expect(isinstance(got, torch.Tensor), f"expected a tensor\n  got {type(got).__name__}")
    expect(all(torch.equal(a, b) for a, b in zip(args, before, strict=True)), "expected inputs as before, got changed")
    return got


def expect_slots(impl, tables, starts, counts, size, block_size, **more) -> None:
    got = call_slots(impl, tables, starts, counts, size, block_size, **more)
    what = f"starts {starts}, counts {counts}, size {size}, blocks of {block_size}" + (f", {more}" if more else "")
    expected = slots_by_hand(tables, starts, counts, size, block_size, **more)
    expect_equal(f"shape, {what}", tuple(got.shape), (size,))
    expect_equal(f"slots, {what}", got.tolist(), expected)
    expect_equal(f"dtype, {what}", got.dtype, torch.int64)


@exercise("7.2", "slot_mapping")
class TestSlotMapping:
    def test_by_hand(self, impl):
        """tables [5, 1] and [3, 7], blocks of 4: positions 2, 3, 4 of the first and 6 of the second"""
        got = call_slots(impl, [[5, 1], [3, 7]], [2, 6], [3, 1], 4, 4)
        expect_equal("slots", got.tolist(), [22, 23, 4, 30])
        expect_equal("dtype", got.dtype, torch.int64)

    def test_one_gpu(self, impl):
        """prompts, chunks and decoding in one batch"""
        tables = [[9, 4, 0, 7], [2, 3, 8, 1], [6, 5, 11, 10]]
        expect_slots(impl, tables, [0, 5, 12], [11, 4, 1], 16, 4)
        expect_slots(impl, tables, [3, 0, 7], [1, 1, 1], 3, 4)
        expect_slots(impl, tables, [0, 0, 0], [4, 4, 4], 12, 1)
        expect_slots(impl, tables, [0, 16, 31], [17, 2, 1], 20, 16)
        for size in (3, 6, 7):  # blocks whose size is no power of two
            expect_slots(impl, tables, [0, 5, 11], [11, 4, 1], 16, size)

    def test_padding(self, impl):
        """entries after the last token are -1, however many there are"""
        tables = [[9, 4, 0, 7], [2, 3, 8, 1]]
        for size in (5, 6, 64):
            expect_slots(impl, tables, [1, 6], [3, 2], size, 4)

    def test_sequences_without_tokens(self, impl):
        """a count of 0, at the start, in the middle, at the end, or everywhere"""
        tables = [[3, 1], [0, 2], [5, 4]]
        for counts in ([0, 2, 1], [2, 0, 1], [2, 1, 0], [0, 0, 3], [0, 0, 0]):
            expect_slots(impl, tables, [2, 1, 0], counts, 6, 4)

    def test_ranks(self, impl):
        """block b of a sequence lies on GPU b % ranks, in entry b // ranks of that GPU's table"""
        tables = [[9, 4, 0], [2, 3, 8]]
        for ranks in (2, 3):
            for rank in range(ranks):
                expect_slots(impl, tables, [0, 5], [14, 3], 20, 4, rank=rank, ranks=ranks)
                expect_slots(impl, tables, [11, 8], [1, 9], 10, 4, rank=rank, ranks=ranks)

    def test_ranks_far(self, impl):
        """positions beyond what this GPU's own table holds in a row: with two GPUs it covers twice as many"""
        tables = [[9, 4, 0], [2, 3, 8]]
        for rank in range(2):
            expect_slots(impl, tables, [13, 18], [9, 6], 16, 4, rank=rank, ranks=2)

    def test_no_place(self, impl):
        """no token and no place"""
        expect_slots(impl, [[3, 1], [0, 2]], [2, 1], [0, 0], 0, 4)

    def test_every_token_once(self, impl):
        """over all GPUs each token has exactly one slot"""
        tables = [[1, 0, 3, 2, 5], [4, 9, 8, 7, 6]]
        got = torch.stack([call_slots(impl, tables, [3, 0], [25, 31], 60, 4, rank=r, ranks=3) for r in range(3)])
        expect_equal("GPUs that hold each entry", (got >= 0).sum(0).tolist(), [1] * 56 + [0] * 4)

    def test_unused_entries(self, impl):
        """what is not used of the tables may hold anything"""
        expect_slots(impl, [[5, -1, -1], [2**31 - 1, 3, -7]], [0, 4], [4, 3], 9, 4)
        expect_slots(impl, [[6], [2]], [3, 0], [0, 4], 8, 4)

    def test_large_pools(self, impl):
        """slots beyond 2**31"""
        expect_slots(impl, [[200_000_000, 2**31 - 1]], [14], [4], 4, 16)

    def test_large_positions(self, impl):
        """positions beyond 2**31, in blocks of 2**20"""
        table = [(7 * i) % 2051 for i in range(2051)]
        expect_slots(impl, [table, table[::-1]], [2**31 - 2, 2**31 + 2**20 - 1], [4, 3], 9, 2**20)

    def test_one_sequence(self, impl):
        """a batch of one, decoding, with and without padding"""
        expect_slots(impl, [[3, 1, 2]], [9], [1], 1, 4)
        expect_slots(impl, [[3, 1, 2]], [9], [1], 5, 4, rank=1, ranks=2)

    def test_not_contiguous(self, impl):
        """tables, starts and counts that are parts of larger tensors"""
        wide = torch.full((6, 8), -9, dtype=torch.int32)
        wide[::2, 1::2] = torch.tensor([[9, 4, 0, 7], [2, 3, 8, 1], [6, 5, 11, 10]], dtype=torch.int32)
        both = torch.tensor([[0, 11], [5, 4], [12, 1]])
        tables, starts, counts = on_device(wide, both, both)
        got = impl(tables[::2, 1::2], starts[:, 0], counts[:, 1], 18, 4)
        expected = slots_by_hand(wide[::2, 1::2].tolist(), [0, 5, 12], [11, 4, 1], 18, 4)
        expect_equal("slots", got.tolist(), expected)

    def test_nothing_waits_for_the_gpu(self, impl):
        """no value is read on the way, and no operation has an output whose shape depends on values"""
        with Watch() as watch:
            call_slots_quietly(impl, [[9, 4], [2, 3], [8, 1]], [0, 3, 5], [4, 0, 2], 32, 4)
        expect(not watch.found, f"expected no operation that needs values\n  got {', '.join(sorted(watch.found))}")

    def test_shapes_alone(self, impl):
        """runs on tensors that have shapes and no values (device "meta"), and makes new ones where `tables` is"""
        tables = torch.empty(3, 2, dtype=torch.int32, device="meta")
        starts, counts = torch.empty(2, 3, dtype=torch.int64, device="meta")
        try:
            got = impl(tables, starts, counts, 32, 4, 1, 2)
        except (NotImplementedError, RuntimeError) as error:
            if str(error).startswith("Exercise"):
                raise
            expect(False, f"expected operations whose output shape follows from shapes\n  got {error}".split(". ")[0])
        expect_equal("shape", tuple(got.shape), (32,))
        expect_equal("device", str(got.device), "meta")


# ---- 7.3

TOKENS = [random.Random(7).randrange(49_152) for _ in range(64)]
PICTURE = [9] * 64  # placeholders alone


def names_of(impl, *args, **more) -> list[bytes]:
    got = impl(*args, **more)
    expect(isinstance(got, list), f"expected a list of names\n  got {type(got).__name__}")
    for name in got:
        expect(isinstance(name, bytes), f"expected names of type bytes\n  got {type(name).__name__}")
        expect(len(name) >= 16, f"expected at least 16 bytes\n  got {len(name)}")
    return got


def agree(a: list[bytes], b: list[bytes]) -> list[bool]:
    expect_equal("number of names", len(a), len(b))
    return [x == y for x, y in zip(a, b, strict=True)]


def expect_agree(impl, what: str, first: tuple, second: tuple, expected: list[bool]) -> None:
    """`first` and `second`: (tokens, salt, images); blocks of 4."""
    a, b = (names_of(impl, list(t), 4, salt=s, images=list(i)) for t, s, i in (first, second))
    expect_equal(f"which names are equal, {what}", agree(a, b), expected)


@exercise("7.3", "block_names")
class TestBlockNames:
    def test_full_blocks_only(self, impl):
        """as many names as full blocks: 0 for 3 tokens, 1 for 4 to 7"""
        for length, count in ((0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (64, 16)):
            expect_equal(f"names of {length} tokens", len(names_of(impl, TOKENS[:length], 4)), count)
        expect_equal("names of 64 tokens in blocks of 64", len(names_of(impl, TOKENS, 64)), 1)

    def test_a_prefix_is_found(self, impl):
        """two prompts have equal names up to where they part"""
        other = [*TOKENS[:22], 1, *TOKENS[23:]]
        a, b = names_of(impl, TOKENS, 4), names_of(impl, other, 4)
        expect_equal("which names are equal, the 23rd token differs", agree(a, b), [True] * 5 + [False] * 11)
        expect_equal("names of the first 8 tokens alone", names_of(impl, TOKENS[:8], 4), a[:2])
        expect_equal("names of a tuple", names_of(impl, tuple(TOKENS), 4), a)

    def test_the_past_counts(self, impl):
        """the same four tokens after others, or in another order, have another name"""
        a, b = names_of(impl, [1, 2, 3, 4, 5, 6, 7, 8], 4), names_of(impl, [4, 3, 2, 1, 5, 6, 7, 8], 4)
        expect_equal("which names are equal", agree(a, b), [False, False])
        repeated = names_of(impl, [5] * 400, 4)
        expect_equal("different names of 100 equal blocks", len(set(repeated)), 100)

    def test_tokens_are_told_apart(self, impl):
        """1, 23 is not 12, 3; token ids may be large, and 258 is not 2"""
        for a, b in (
            ([1, 23, 4, 5], [12, 3, 4, 5]),
            ([258, 0, 0, 0], [2, 0, 0, 0]),
            ([2**31, 1, 1, 1], [0, 1, 1, 1]),
            ([2**62 + 1, 1, 1, 1], [1, 1, 1, 1]),
            ([0, 1, 0, 0], [1, 0, 0, 0]),
            ([2**61 - 1, 0, 0, 0], [0, 0, 0, 0]),
        ):
            expect_agree(impl, f"{a} and {b}", (a, "", ()), (b, "", ()), [False])

    def test_tenants(self, impl):
        """another salt: no name in common; the same salt: all"""
        for a, b in (("", "x"), ("a", "b"), ("tenant 1", "tenant 11"), ("é", "e"), ("a" * 40, "a" * 41)):
            expect_agree(impl, f"salts {a!r} and {b!r}", (TOKENS[:12], a, ()), (TOKENS[:12], b, ()), [False] * 3)
            expect_agree(impl, f"salt {a!r} twice", (TOKENS[:12], a, ()), (TOKENS[:12], a, ()), [True] * 3)

    def test_pictures(self, impl):
        """another picture in the second block: equal before, different from there on"""
        for start, length in ((4, 4), (5, 2), (6, 8), (7, 1)):
            a, b = [(start, length, b"cat" * 5)], [(start, length, b"dog" * 5)]
            what = f"pictures at {start}, {length} tokens"
            expect_agree(impl, what, (PICTURE[:20], "", a), (PICTURE[:20], "", b), [True] + [False] * 4)
            expect_agree(impl, f"{what}, one prompt has none", (PICTURE[:20], "", a), (PICTURE[:20], "", ()),
                         [True] + [False] * 4)  # fmt: skip

    def test_later_pictures_do_not_count(self, impl):
        """a picture that begins where the block ends has no influence on it"""
        a, b = [(1, 2, b"cat"), (8, 3, b"dog")], [(1, 2, b"cat"), (8, 3, b"owl")]
        expect_agree(
            impl, "pictures from 8 on", (PICTURE[:16], "", a), (PICTURE[:16], "", b), [True, True, False, False]
        )
        expect_agree(impl, "a picture in the tail", (PICTURE[:11], "", a), (PICTURE[:11], "", a[:1]), [True, True])

    def test_a_picture_that_ended_still_counts(self, impl):
        """blocks after a picture depend on it"""
        a, b = [(0, 3, b"cat")], [(0, 3, b"dog")]
        expect_agree(impl, "pictures in block 0", (TOKENS[:16], "", a), (TOKENS[:16], "", b), [False] * 4)

    def test_where_a_picture_stands(self, impl):
        """the same picture one token later, or two pictures exchanged, is another prompt"""
        expect_agree(impl, "at 1 and at 2", (PICTURE[:8], "", [(1, 2, b"cat")]), (PICTURE[:8], "", [(2, 2, b"cat")]),
                     [False, False])  # fmt: skip
        a, b = [(0, 2, b"cat"), (2, 2, b"dog")], [(0, 2, b"dog"), (2, 2, b"cat")]
        expect_agree(impl, "exchanged", (PICTURE[:8], "", a), (PICTURE[:8], "", b), [False, False])
        expect_agree(impl, "listed in another order", (PICTURE[:8], "", a), (PICTURE[:8], "", a[::-1]), [True, True])

    def test_how_long_a_picture_is(self, impl):
        """a picture of 2 or of 3 tokens, all in one block: the same names"""
        for images in ([(1, 2, b"cat")], [(0, 1, b"owl"), (1, 2, b"cat")]):
            longer = [*images[:-1], (1, 3, b"cat")]
            expect_agree(impl, f"{images} and {longer}", (PICTURE[:8], "", images), (PICTURE[:8], "", longer),
                         [True, True])  # fmt: skip

    def test_the_same_in_every_process(self, impl):
        """the names do not depend on what differs from process to process: `hash` of a text, `id`, its number"""
        args = (TOKENS[:12], 4, "tenant", [(1, 2, b"cat"), (3, 2, b"dog"), (2, 1, b"cow"), (0, 1, b"hen")])
        first = names_of(impl, *args)
        expect_equal("names, the second time", names_of(impl, *args), first)
        keyed, place = builtins.hash, builtins.id
        with contextlib.ExitStack() as other:
            other.enter_context(patch.object(builtins, "hash", lambda x: keyed(x) ^ 0x5DEECE66D))
            other.enter_context(patch.object(builtins, "id", lambda x: place(x) + 64))
            other.enter_context(patch.object(os, "getpid", lambda: 4242))
            got = impl(*args)
        expect(
            got == first, "in another process, where `hash` gives other numbers: expected the same names\n  got others"
        )

    def test_arguments_stay(self, impl):
        """tokens and pictures are as they were; pictures may be a tuple"""
        tokens, images = TOKENS[:8], [(6, 2, b"dog"), (1, 3, b"cat")]
        first = names_of(impl, tokens, 4, images=images)
        expect_equal("tokens", tokens, TOKENS[:8])
        expect_equal("images", images, [(6, 2, b"dog"), (1, 3, b"cat")])
        expect_equal("names, images as a tuple", names_of(impl, tokens, 4, images=tuple(images)), first)

    def test_fields_do_not_run_together(self, impl):
        """moving bytes from one field to the next gives another name"""
        expect_agree(impl, "salt and digest", (PICTURE[:4], "a", [(0, 2, b"bc")]), (PICTURE[:4], "ab", [(0, 2, b"c")]),
                     [False])  # fmt: skip
        a, b = [(0, 2, b"ab"), (2, 2, b"c")], [(0, 2, b"a"), (2, 2, b"bc")]
        expect_agree(impl, "two digests", (PICTURE[:4], "", a), (PICTURE[:4], "", b), [False])
        expect_agree(impl, "an empty digest", (PICTURE[:4], "", [(0, 1, b"")]), (PICTURE[:4], "", ()), [False])

    def test_two_pictures_are_not_one(self, impl):
        """a digest that holds what may stand between two others, text or bytes, is not mistaken for them"""
        pair = names_of(impl, PICTURE[:4], 4, images=[(0, 2, b"a"), (2, 2, b"b")])
        marks = (b"", b"|", b":", b",", b";", b" ", b"-", b"/", b"\0", b"\n")
        seconds = (b"", b"2", *((2).to_bytes(n, order) for n in (1, 2, 4, 8) for order in ("little", "big")))
        for between in (before + start + after for before in marks for start in seconds for after in marks):
            one = names_of(impl, PICTURE[:4], 4, images=[(0, 4, b"a" + between + b"b")])
            expect(one != pair, f'digests b"a" at 0 and b"b" at 2, and {b"a" + between + b"b"} at 0: expected different'
                                f" names\n  got the same")  # fmt: skip

    def test_zeros(self, impl):
        """salts of NUL characters, tokens of 0, a digest of NUL bytes at 0: the same bytes, other fields"""
        found: dict[bytes, str] = {}
        for length in range(41):
            for digest in (None, b"", b"\0", b"\0" * 8):
                images = [] if digest is None else [(0, 1, digest)]
                what = f"{length} NULs as salt and " + ("no picture" if digest is None else f"the digest {digest}")
                name = names_of(impl, [0] * 4, 4, salt="\0" * length, images=images)[0]
                expect(name not in found, f"{what}: expected a name of its own\n  got that of {found.get(name)}")
                found[name] = what

    def test_any_text_any_bytes(self, impl):
        """salts that differ in case, spaces or accents; digests that are no text, or end in zeros"""
        salts = ("", "None", "default", "0", "a", "A", " a", "a ", "a\n", "\u00e9", "\u00ea", "e\u0301", "?", "\u4e2d")
        found = [names_of(impl, PICTURE[:4], 4, salt=s)[0] for s in salts]
        for i, j in itertools.combinations(range(len(salts)), 2):
            expect(
                found[i] != found[j], f"salts {salts[j]!r} and {salts[i]!r}: expected different names\n  got the same"
            )
        digests = (
            b"\xff",
            b"\xfe",
            b"\x80",
            b"a",
            b"A",
            b"a\0",
            b"a ",
            b"\xc3\xa9",
            b"\xe9",
            b"\xff" * 32,
            b"\xfe" * 32,
        )
        found = [names_of(impl, PICTURE[:4], 4, images=[(1, 2, d)])[0] for d in digests]
        for i, j in itertools.combinations(range(len(digests)), 2):
            what = f"digests {digests[j]!r} and {digests[i]!r}"
            expect(found[i] != found[j], f"{what}: expected different names\n  got the same")

    def test_one_picture_twice(self, impl):
        """the same picture in two places of a block, given in either order"""
        pair = [(0, 1, b"cat"), (2, 1, b"cat")]
        expect_agree(impl, "one picture twice", (PICTURE[:4], "", pair), (PICTURE[:4], "", pair[::-1]), [True])
        expect_agree(
            impl, "another place", (PICTURE[:4], "", pair), (PICTURE[:4], "", [pair[0], (3, 1, b"cat")]), [False]
        )

    def test_every_place(self, impl):
        """a picture at each of the four places of a block, and a fifth picture: names of their own"""
        found = [names_of(impl, PICTURE[:4], 4, images=[(i, 1, b"cat")])[0] for i in range(4)]
        expect_equal("different names, of one picture in four places", len(set(found)), 4)
        five = [(2 * i, 2, b"%d" % i) for i in range(5)]
        expect_agree(impl, "a fifth picture in place of another", (PICTURE[:12], "", five),
                     (PICTURE[:12], "", [*five[:4], (8, 2, b"other")]), [True, True, False])  # fmt: skip

    def test_long_digests(self, impl):
        """digests of 300 and of 70,000 bytes"""
        for length in (300, 70_000):
            a, b = b"x" * length, b"x" * (length - 1) + b"y"
            expect_agree(
                impl, f"{length} bytes", (PICTURE[:4], "", [(0, 2, a)]), (PICTURE[:4], "", [(0, 2, b)]), [False]
            )

    def test_no_broken_hash(self, impl):
        """neither MD5 nor SHA-1: for these, two texts with one name are known"""
        used: set[str] = set()
        before = sys.getprofile()
        sys.setprofile(lambda frame, event, of: used.add(getattr(of, "__name__", "")) if event == "c_call" else None)
        try:
            impl(TOKENS[:8], 4, "tenant", [(1, 2, b"cat")])
        finally:
            sys.setprofile(before)
        broken = {"openssl_md5": "MD5", "md5": "MD5", "openssl_sha1": "SHA-1", "sha1": "SHA-1"}
        found = sorted({broken[name] for name in used & broken.keys()})
        expect(not found, f"expected a cryptographic hash, such as hashlib.sha256 or blake2b\n  got {', '.join(found)}")

    def test_looks_like_a_cryptographic_hash(self, impl):
        """of 1,600 names none comes twice, and their bits, however written, are at least 120 independent ones"""
        found = [name for seed in range(400) for name in names_of(impl, [seed] * 16, 4)]
        expect_equal("different names", len(set(found)), len(found))
        basis: dict[int, int] = {}  # over the field of two numbers: highest bit -> a combination of names
        for name in found[1:400]:
            value = int.from_bytes(found[0], "big") ^ int.from_bytes(name, "big")
            while value and value.bit_length() in basis:
                value ^= basis[value.bit_length()]
            if value:
                basis[value.bit_length()] = value
        expect(len(basis) >= 120, f"expected at least 120 independent bits: 16 bytes\n  got {len(basis)}")


# ---- 7.4


class Node:
    def __init__(self, parent, tokens, last_used, references=0):
        self.parent, self.tokens, self.last_used, self.references = parent, tokens, last_used, references

    def __eq__(self, other):
        return vars(self) == vars(other)


def tree(*rows) -> dict[int, Node]:
    """rows: (id, parent, tokens, last_used, references = 0); the root is 0"""
    return {0: Node(None, 0, 0.0)} | {row[0]: Node(*row[1:]) for row in rows}


def slow_evict(nodes: dict[int, Node], wanted: int) -> list[int]:
    """The rule, by looking at all nodes again for every choice."""
    left, chosen, freed = dict(nodes), [], 0
    while freed < wanted:
        inner = {node.parent for node in left.values()}
        leaves = [i for i, n in left.items() if i not in inner and n.parent is not None and not n.references]
        if not leaves:
            break
        chosen.append(min(leaves, key=lambda i: left[i].last_used))
        freed += left.pop(chosen[-1]).tokens
    return chosen


def expect_evicted(impl, what: str, nodes: dict[int, Node], wanted: int, expected: list[int]) -> None:
    before = copy.deepcopy(nodes)
    got = impl(nodes, wanted)
    expect(nodes == before, f"{what}: expected the tree as it was\n  got a changed one")
    expect(isinstance(got, list), f"{what}: expected a list of ids\n  got {type(got).__name__}")
    expect_equal(f"evicted, {what}, {wanted} tokens wanted", got, expected)


@exercise("7.4", "evict")
class TestEvict:
    def test_by_hand(self, impl):
        """a chain 1 - 2 and a leaf 3: 2 is the oldest leaf, then 3, then 1, though 1 is the oldest node"""
        nodes = tree((1, 0, 10, 1.0), (2, 1, 10, 3.0), (3, 0, 10, 4.0))
        for wanted, expected in ((1, [2]), (10, [2]), (11, [2, 1]), (20, [2, 1]), (21, [2, 1, 3])):
            expect_evicted(impl, "by hand", nodes, wanted, expected)

    def test_only_leaves(self, impl):
        """a parent stays as long as it has a child, however old it is"""
        nodes = tree((1, 0, 5, 1.0), (2, 1, 5, 9.0), (3, 1, 5, 8.0), (4, 3, 5, 7.0))
        expect_evicted(impl, "two children", nodes, 100, [4, 3, 2, 1])

    def test_a_new_leaf_competes_at_once(self, impl):
        """a parent that has become a leaf goes before younger leaves"""
        nodes = tree((1, 0, 1, 2.0), (2, 1, 1, 1.0), (3, 0, 1, 5.0), (4, 0, 1, 6.0))
        expect_evicted(impl, "an old parent", nodes, 2, [2, 1])
        nodes = tree((1, 0, 1, 5.5), (2, 1, 1, 1.0), (3, 0, 1, 5.0), (4, 0, 1, 6.0))
        expect_evicted(impl, "a parent in between", nodes, 4, [2, 3, 1, 4])

    def test_nodes_in_use(self, impl):
        """what a request reads stays, and everything above it"""
        nodes = tree((1, 0, 4, 1.0), (2, 1, 4, 2.0), (3, 2, 4, 3.0, 1), (4, 1, 4, 5.0), (5, 0, 4, 6.0, 2))
        expect_evicted(impl, "3 and 5 in use", nodes, 100, [4])

    def test_in_use_in_the_middle(self, impl):
        """a request may read an inner node: its children may go, it may not"""
        nodes = tree((1, 0, 4, 1.0, 1), (2, 1, 4, 2.0), (3, 2, 4, 3.0))
        expect_evicted(impl, "1 in use", nodes, 100, [3, 2])

    def test_as_few_as_needed(self, impl):
        """it stops when enough tokens are free, by tokens and not by nodes"""
        nodes = tree((1, 0, 100, 3.0), (2, 0, 3, 1.0), (3, 0, 3, 2.0), (4, 0, 50, 4.0))
        for wanted, expected in ((0, []), (3, [2]), (4, [2, 3]), (7, [2, 3, 1]), (106, [2, 3, 1]), (107, [2, 3, 1, 4])):
            expect_evicted(impl, "nodes of 3, 3, 100 and 50", nodes, wanted, expected)

    def test_the_root_stays(self, impl):
        """not enough: everything but the root; an empty tree gives nothing"""
        expect_evicted(impl, "one node", tree((1, 0, 4, 1.0)), 1000, [1])
        expect_evicted(impl, "the root alone", tree(), 1, [])
        nodes = {7: Node(None, 3, 0.5), 1: Node(7, 4, 1.0)}
        expect_evicted(impl, "a root with tokens and another id", nodes, 1000, [1])

    def test_close_times(self, impl):
        """times are not whole numbers: 1.7 goes before 1.8, 0.2 before 0.9, -1.5 before -1.25"""
        nodes = tree((1, 0, 1, 1.8), (2, 0, 1, 1.7), (3, 0, 1, 0.9), (4, 0, 1, 0.2), (5, 0, 1, -1.25), (6, 0, 1, -1.5))
        expect_evicted(impl, "close times", nodes, 6, [6, 5, 4, 3, 2, 1])

    def test_empty_nodes(self, impl):
        """a leaf without tokens goes in its turn, and frees nothing"""
        nodes = tree((1, 0, 4, 3.0), (2, 1, 0, 1.0), (3, 0, 4, 2.0))
        for wanted, expected in ((0, []), (1, [2, 3]), (5, [2, 3, 1])):
            expect_evicted(impl, "node 2 without tokens", nodes, wanted, expected)

    def test_drawn_trees(self, impl):
        """40 trees of 30 nodes with random times, sizes and readers: as the rule says, step by step"""
        draw = random.Random(0)
        for _ in range(40):
            times = draw.sample(range(1000), 30)
            rows = [
                (i, draw.randrange(i), draw.randint(1, 9), times[i - 1], draw.random() < 0.15) for i in range(1, 31)
            ]
            names = dict(zip(range(31), [0, *draw.sample(range(1, 1000), 30)], strict=True))
            rows = [(names[i], names[parent], *rest) for i, parent, *rest in rows]
            draw.shuffle(rows)  # children may stand before their parents
            nodes = tree(*rows)
            wanted = draw.randint(0, 200)
            expect_evicted(impl, "drawn", nodes, wanted, slow_evict(nodes, wanted))


# ---- 7.5


ARITHMETIC = ("mm", "bmm", "matmul", "mul", "exp", "sum", "softmax", "index", "gather", "scaled_dot_product", "einsum")


class Arithmetic(TorchFunctionMode):
    """Notes the torch operations that compute or look something up."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "").strip("_")
        looks_up = name == "getitem" and isinstance(args[1], torch.Tensor | list | tuple)
        if name.startswith(ARITHMETIC) or looks_up:
            self.found.add("indexing" if looks_up else name)
        return func(*args, **(kwargs or {}))


MARGIN = 4096  # elements around a tensor, so that a kernel that leaves it is reported and does not end the process


def within(x: torch.Tensor, around: float) -> torch.Tensor:
    """x in the middle of a buffer filled with `around`."""
    buffer = torch.full((x.numel() + 2 * MARGIN,), around, dtype=x.dtype, device=x.device)
    buffer[MARGIN : MARGIN + x.numel()] = x.flatten()
    return buffer[MARGIN : MARGIN + x.numel()].view(x.shape)


class Margins(TorchFunctionMode):
    """Gives what torch.empty_like allocates a margin, and tells whether something was written there."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        got = func(*args, **(kwargs or {}))
        if func is torch.empty_like and got.is_contiguous():
            got = within(got, 77.0)
            self.given.append(got)
        return got

    def touched(self) -> bool:
        for x in self.given:
            buffer = x.as_strided((x.numel() + 2 * MARGIN,), (1,), 0)
            if not ((buffer[:MARGIN] == 77).all() and (buffer[-MARGIN:] == 77).all()):
                return True
        return False


def run_window(impl, args: tuple, what: str) -> torch.Tensor:
    with Margins() as margins:
        got = impl(*args)
    expect(not margins.touched(), f"{what}: expected nothing written outside of the output\n  got values beside it")
    return got


def window_case(contexts, heads, kv_heads, size, window, block_size, dtype=torch.float32, scale=1.0, seed=0):
    """Arguments of window_decode, and the exact result. All that no query sees is NaN; dead entries are -1."""
    generator = torch.Generator().manual_seed(seed + sum(contexts))
    widths = [-(-c // block_size) for c in contexts]
    total = sum(widths) + 2
    caches = torch.full((2, total * block_size, kv_heads, size), math.nan)
    order = torch.randperm(total, generator=generator).tolist()
    tables = torch.full((len(contexts), max([*widths, 1])), -1, dtype=torch.int32)
    q = (torch.randn(len(contexts), heads, size, generator=generator) * scale).to(dtype)
    out = torch.zeros(len(contexts), heads, size, dtype=torch.float64)
    for i, context in enumerate(contexts):
        first = max(0, context - window)
        for index in range(first // block_size, widths[i]):
            tables[i, index] = order.pop()
        for p in range(first, context):
            slot = int(tables[i, p // block_size]) * block_size + p % block_size
            caches[:, slot] = torch.randn(2, kv_heads, size, generator=generator).to(dtype).float()
        if context:
            positions = torch.arange(first, context)
            slots = tables[i][positions // block_size].long() * block_size + positions % block_size
            k, v = (c[slots].double().repeat_interleave(heads // kv_heads, 1) for c in caches)  # [n, H, D]
            weights = (torch.einsum("hd,nhd->hn", q[i].double(), k) / size**0.5).softmax(-1)
            out[i] = torch.einsum("hn,nhd->hd", weights, v)
    q, k_cache, v_cache, tables, lengths = on_device(
        q, *caches.to(dtype), tables, torch.tensor(contexts, dtype=torch.int32)
    )
    # What an entry of -1 would read, and all else around the caches, is NaN.
    inputs = (*(within(x, math.nan) for x in (q, k_cache, v_cache)), within(tables, 0), within(lengths, 1))
    return (*inputs, window, block_size), out


def expect_window(impl, contexts, heads=4, kv_heads=2, size=16, window=20, block_size=16, dtype=torch.float32, **more):
    args, expected = window_case(contexts, heads, kv_heads, size, window, block_size, dtype, **more)
    what = f"contexts {contexts}, {heads}/{kv_heads} heads of {size}, window {window}, blocks of {block_size}, {dtype}"
    got = run_window(impl, args, what)
    expect_equal(f"shape, {what}", tuple(got.shape), tuple(expected.shape))
    expect_equal(f"dtype, {what}", got.dtype, dtype)
    atol = 1e-5 if dtype == torch.float32 else 4e-3
    expect_close(f"output, {what}", got, expected, atol=atol, rtol=atol)


@exercise("7.5", "window_decode")
class TestWindowDecode:
    def test_one_block(self, impl):
        """one sequence, one full block, a window that sees all of it"""
        expect_window(impl, [16], heads=2, kv_heads=2, window=100)

    def test_a_block_that_is_not_full(self, impl):
        """slots past the context hold NaN: they do not count"""
        for context in (1, 5, 15):
            expect_window(impl, [context], heads=2, kv_heads=1, window=100)

    def test_several_blocks(self, impl):
        """40 tokens in three blocks that stand anywhere in the pool"""
        expect_window(impl, [40], heads=2, kv_heads=2, window=100)

    def test_the_window(self, impl):
        """the last `window` tokens count, wherever they begin in a block; entries behind them are -1"""
        for window in (1, 16, 17, 31):
            expect_window(impl, [50], heads=2, kv_heads=1, window=window)
        expect_window(impl, [48], heads=2, kv_heads=1, window=16)

    def test_grouped_heads(self, impl):
        """2, 3 or 6 query heads share a key/value head"""
        for heads, kv_heads in ((4, 2), (9, 3), (6, 1)):
            expect_window(impl, [21], heads=heads, kv_heads=kv_heads)

    def test_large_groups(self, impl):
        """17 or 20 query heads share a key/value head: more than 16 rows"""
        expect_window(impl, [21], heads=20, kv_heads=1)
        expect_window(impl, [18, 3], heads=34, kv_heads=2)

    def test_several_sequences(self, impl):
        """each reads its own table, its own length"""
        expect_window(impl, [3, 37, 20], heads=2, kv_heads=1)

    def test_wide_tables(self, impl):
        """rows of the tables that lie further apart than they are long"""
        args, expected = window_case([20, 37], 2, 1, 16, 25, 16)
        wide = torch.full((2, 7), 10**6, dtype=torch.int32, device=args[3].device)
        wide[:, : args[3].shape[1]] = args[3]
        got = run_window(impl, (*args[:3], wide[:, : args[3].shape[1]], *args[4:]), "wide tables")
        expect_close("output", got, expected, atol=1e-5)

    def test_the_grid(self, impl):
        """a program for each sequence and key/value head, no more: each key is read once for its whole group"""
        if os.environ.get("TRITON_INTERPRET") != "1":
            return
        from triton.runtime.interpreter import InterpretedFunction

        run, grids = InterpretedFunction.run, []

        def noted(self, *args, grid, warmup, **sizes):
            grids.append(tuple(grid) if not callable(grid) else tuple(grid(sizes)))
            return run(self, *args, grid=grid, warmup=warmup, **sizes)

        args, _ = window_case([9, 3, 5], 6, 2, 16, 20, 16)
        with patch.object(InterpretedFunction, "run", noted):
            run_window(impl, args, "3 sequences, 2 key/value heads")
        found = [(*grid, 1, 1)[:3] for grid in grids]
        expect_equal("grids of 3 sequences, 6 query heads, 2 key/value heads", found, [(3, 2, 1)])

    def test_no_context(self, impl):
        """a context of 0 gives 0: a padded batch"""
        expect_window(impl, [0, 9], heads=2, kv_heads=1)

    def test_more_features_larger_blocks(self, impl):
        """heads of 16 and 32, blocks of 16 and 32"""
        for size, block_size in ((32, 32), (32, 16), (16, 32)):
            expect_window(impl, [70], heads=2, kv_heads=1, size=size, window=40, block_size=block_size)

    def test_dead_blocks_are_not_read(self, impl):
        """not one key or value is read through an entry of -1, or past the table's last block in use"""
        if os.environ.get("TRITON_INTERPRET") != "1":
            return
        from triton.runtime.interpreter import InterpreterBuilder

        load, addresses = InterpreterBuilder.create_masked_load, []

        def noted(self, ptrs, mask, *rest):
            addresses.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].ravel())
            return load(self, ptrs, mask, *rest)

        args, _ = window_case([70, 33], 2, 1, 16, 20, 16)
        with patch.object(InterpreterBuilder, "create_masked_load", noted):
            run_window(impl, args, "contexts 70 and 33, window 20")
        read = np.concatenate([a.astype(np.int64) for a in addresses]) if addresses else np.zeros(0, np.int64)
        live = sorted(int(b) for b in args[3].flatten() if b >= 0)
        for name, cache in (("keys", args[1]), ("values", args[2])):
            first, size = cache.data_ptr(), cache.element_size()
            here = read[(read >= first - MARGIN * size) & (read < first + (cache.numel() + MARGIN) * size)]
            blocks = np.unique((here - first) // (16 * 16 * size)).tolist()
            bad = [b for b in blocks if b not in live]
            expect(not bad, f"expected {name} to be read from blocks {live} alone\n  got reads from {bad}"
                            " (-1 is the memory in front of the cache)")  # fmt: skip

    def test_rounds(self, impl):
        """as many rounds as the window touches blocks: none for those behind it, none past the context"""
        if os.environ.get("TRITON_INTERPRET") != "1":
            return
        from triton.runtime.interpreter import InterpreterBuilder

        load, loads = InterpreterBuilder.create_masked_load, []

        def noted(self, *args):
            loads.append(1)
            return load(self, *args)

        for first, second, window in (((160,), (16,), 16), ((200,), (40,), 20), ((31,), (32,), 9)):
            counts = []
            for contexts in (first, second):
                args, _ = window_case(contexts, 2, 1, 16, window, 16)
                loads.clear()
                with patch.object(InterpreterBuilder, "create_masked_load", noted):
                    run_window(impl, args, f"context {contexts[0]}, window {window}")
                counts.append(len(loads))
            what = f"window {window}, which touches as many blocks of 16 with {first[0]} tokens as with {second[0]}"
            expect_equal(f"loads with {first[0]} tokens, {what}", counts[0], counts[1])

    def test_inside_and_exact(self, impl):
        """nothing is read outside of the tensors, rows of q past the last group neither; tl.dot is exact in fp32"""
        if os.environ.get("TRITON_INTERPRET") != "1":
            return
        from triton.runtime.interpreter import InterpreterBuilder

        load, dot, outside, precisions = (
            InterpreterBuilder.create_masked_load, InterpreterBuilder.create_dot, [], set(),
        )  # fmt: skip
        args, _ = window_case([20, 33], 3, 1, 16, 20, 16)
        ranges = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in args[:5]]

        def noted(self, ptrs, mask, *rest):
            read = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].ravel().astype(np.int64)
            outside.append(int(sum(not any(a <= r < b for a, b in ranges) for r in read.tolist())))
            return load(self, ptrs, mask, *rest)

        def multiplied(self, a, b, d, precision, *rest):
            precisions.add(str(precision).rpartition(".")[2].lower())
            return dot(self, a, b, d, precision, *rest)

        with (
            patch.object(InterpreterBuilder, "create_masked_load", noted),
            patch.object(InterpreterBuilder, "create_dot", multiplied),
        ):
            run_window(impl, args, "3 query heads on one, window 20")
        found = sum(outside)
        expect(
            not found, f"expected nothing read outside of the tensors\n  got {found:,} numbers: rows of q past GROUP?"
        )
        loose = precisions - {"ieee"}
        expect(not loose, f'expected every tl.dot with input_precision="ieee"\n  got {", ".join(loose)}')

    def test_long_window(self, impl):
        """a window over twelve blocks, and block numbers beyond 8 and 16 bits"""
        expect_window(impl, [200], heads=2, kv_heads=1, window=190)
        args, expected = window_case([20], 2, 1, 16, 20, 16, torch.float16)
        q, k_cache, v_cache, tables, lengths, *rest = args
        for number in (300, 33_000):
            wide = [torch.empty((number + 2) * 16, 1, 16, dtype=torch.float16, device=q.device) for _ in range(2)]
            moved = tables.clone()
            for i in range(2):
                block = int(tables[0, i])
                for small, large in zip((k_cache, v_cache), wide, strict=True):
                    large[(number + i) * 16 : (number + i + 1) * 16] = small[block * 16 : (block + 1) * 16]
                    large[((number + i) % 256) * 16 : ((number + i) % 256 + 1) * 16] = math.nan if number > 256 else 0
                    large[(number + i) * 16 : (number + i + 1) * 16] = small[block * 16 : (block + 1) * 16]
                moved[0, i] = number + i
            got = run_window(impl, (q, *wide, moved, lengths, *rest), f"blocks {number} and {number + 1}")
            expect_close(f"output, blocks {number} and {number + 1}", got, expected, atol=4e-3, rtol=4e-3)

    def test_low_scores(self, impl):
        """all scores of -20,000: hidden slots weigh nothing beside them"""
        args, _ = window_case([37], 2, 1, 16, 20, 16)
        args[0].fill_(200.0)
        args[1].masked_fill_(args[1].isfinite(), -25.0)
        rows = [int(args[3][0, p // 16]) * 16 + p % 16 for p in range(17, 37)]
        expected = args[2][rows].double().mean(0).expand(1, 2, 16)
        expect_close("output", run_window(impl, args, "scores of -20,000"), expected, atol=1e-4)

    def test_small_weights_add_up(self, impl):
        """fp16, 255 keys that weigh 2⁻¹⁵ of the first each, scores of about 300: running maximum and sum are fp32"""
        args, _ = window_case([256], 2, 1, 16, 256, 16, torch.float16)
        rows = [int(args[3][0, p // 16]) * 16 + p % 16 for p in range(256)]
        args[0].zero_(), args[1].zero_(), args[2].masked_fill_(args[2].isfinite(), 1.0)
        args[0][..., 0] = 4.0
        args[1][rows[0], :, 0] = 15 * math.log(2)
        got = run_window(impl, args, "small weights")
        expect_close("output, all values 1", got, torch.ones(1, 2, 16), atol=3e-3)
        args[0].fill_(8.0078125), args[1].fill_(9.375)  # scores of 300.29, which fp16 rounds down
        args[2][rows] = torch.linspace(-1, 1, 256, device=args[2].device).half()[:, None, None]
        got = run_window(impl, args, "equal scores of about 300")
        expect_close("output, equal scores of about 300", got, torch.zeros(1, 2, 16), atol=3e-3)
        expect_window(impl, [45], heads=2, kv_heads=1, window=100, dtype=torch.float16, scale=80.0)

    def test_large_scores(self, impl):
        """scores of ±100, whose exponentials overflow without the maximum, and grow from block to block"""
        for seed in range(2):
            expect_window(impl, [45], heads=2, kv_heads=1, window=100, scale=100.0, seed=seed)

    def test_fp16(self, impl):
        """fp16 in and out"""
        expect_window(impl, [37], heads=4, kv_heads=2, dtype=torch.float16)

    def test_sums_in_fp32(self, impl):
        """fp16, 40 equal scores, values of 4,000: their sum passes fp16's largest number, their mean does not"""
        args, _ = window_case([40], 2, 1, 16, 100, 16, torch.float16)
        args[0].zero_()
        args[2].masked_fill_(args[2].isfinite(), 4000.0)
        got = run_window(impl, args, "values of 4,000")
        expect_close("output", got, torch.full((1, 2, 16), 4000.0), atol=4.0, rtol=0.0)

    def test_the_kernel_does_the_work(self, impl):
        """torch neither gathers keys and values nor computes with them: the kernel reads them where they lie"""
        args, _ = window_case([64], 2, 2, 16, 64, 16)
        with Arithmetic() as seen:
            run_window(impl, args, "64 tokens")
        expect(not seen.found, f"expected no arithmetic in torch\n  got {', '.join(sorted(seen.found))}")

    @last
    def test_compiles(self, impl):
        """it compiles for a GPU, in fp16"""
        args, _ = window_case([40], 9, 3, 64, 30, 16, torch.float16)
        expect_launches_compile(lambda: impl(*args))
