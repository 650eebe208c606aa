"""The block pool against a simulation that writes tokens where a cache would write keys and values."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minillm.cache.blocks import BlockPool, BlockTable, OutOfBlocks, chain_hash

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)  # few different ones, so that prefixes coincide


class Request:
    def __init__(self, pool, tokens):
        self.table, self.tokens, self.computed = BlockTable(pool), tokens, 0
        self.copy = []  # of the table, as whoever keeps one has it


class Blocks(RuleBasedStateMachine):
    """Requests come, compute chunks, fork, finish and are preempted; `memory` is what the blocks really hold."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(num_blocks=7, block_size=3)
        self.memory = [[None] * 3 for _ in range(7)]
        self.requests = []

    def holds(self, request):
        """The tokens that the computed part of a request's table really holds, each with all before it."""
        return [self.memory[request.table.blocks[i // 3]][i % 3] for i in range(request.computed)]

    @rule(tokens=TOKENS)
    def arrive(self, tokens):
        request = Request(self.pool, tokens)
        request.computed = request.table.match_prefix(tokens)
        assert request.computed < len(tokens)  # a full hit still computes the last token
        self.requests.append(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), count=st.integers(1, 9))
    def compute(self, data, count):
        request = data.draw(st.sampled_from(self.requests))
        stop = min(len(request.tokens), request.computed + count)
        before = (list(request.table.blocks), list(self.pool.references), self.pool.num_free)
        try:
            copies = request.table.extend(request.computed, stop)
        except OutOfBlocks:
            assert before == (request.table.blocks, self.pool.references, self.pool.num_free)
            return
        for old, new in copies:
            self.memory[new] = list(self.memory[old])
        for i in range(request.computed, stop):
            block = request.table.blocks[i // 3]
            assert self.pool.references[block] == 1, "two owners write one block"
            self.memory[block][i % 3] = tuple(request.tokens[: i + 1])
        request.computed = stop
        request.table.publish(request.tokens, request.computed)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def sync(self, data):
        request = data.draw(st.sampled_from(self.requests))
        request.copy[request.table.synced :] = request.table.blocks[request.table.synced :]
        request.table.synced = len(request.table.blocks)
        assert request.copy == request.table.blocks

    @precondition(lambda self: any(r.computed for r in self.requests))
    @rule(data=st.data(), more=TOKENS)
    def fork(self, data, more):
        parent = data.draw(st.sampled_from([r for r in self.requests if r.computed]))
        count = data.draw(st.integers(1, parent.computed))
        child = Request(self.pool, [*parent.tokens[:count], *more])
        child.table = parent.table.fork(count)
        child.computed = count - data.draw(st.integers(0, 1))  # n > 1 computes the last token again
        self.requests.append(child)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), grow=st.integers(0, 1))
    def generate(self, data, grow):
        data.draw(st.sampled_from(self.requests)).tokens.append(grow)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), again=st.booleans())
    def finish_or_preempt(self, data, again):
        request = data.draw(st.sampled_from(self.requests))
        others = {id(r): self.holds(r) for r in self.requests if r is not request}
        request.table.free()
        request.computed = 0
        assert all(self.holds(r) == others[id(r)] for r in self.requests if r is not request)
        if again:
            request.computed = request.table.match_prefix(request.tokens)
        else:
            self.requests.remove(request)

    @invariant()
    def nothing_leaks(self):
        named = Counter(block for r in self.requests for block in r.table.blocks)
        assert self.pool.references == [named[b] for b in range(7)]
        assert self.pool.num_used == len(named)
        assert set(self.pool._free) == set(range(7)) - set(named)

    @invariant()
    def everybody_reads_its_own_tokens(self):
        for request in self.requests:
            assert self.holds(request) == [tuple(request.tokens[: i + 1]) for i in range(request.computed)]

    @invariant()
    def hashes_tell_the_truth(self):
        assert {b: h for h, b in self.pool._block_of.items()} == self.pool._hash_of
        for block, name in self.pool._hash_of.items():
            tokens, parent = self.memory[block][-1], b""
            for start in range(0, len(tokens), 3):
                parent = chain_hash(parent, tokens[start : start + 3])
            assert parent == name, "a stale hash"


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def filled(pool, tokens):
    table = BlockTable(pool)
    table.extend(0, len(tokens))
    table.publish(tokens, len(tokens))
    return table


def test_free_blocks_keep_their_prefix_until_they_are_the_least_recently_used():
    pool = BlockPool(4, 2)
    first, second = filled(pool, [1, 2]), filled(pool, [3, 4])
    first.free()
    second.free()
    unnamed = BlockTable(pool)
    unnamed.extend(0, 4)  # takes the two that never held anything
    assert BlockTable(pool).match_prefix([1, 2, 0]) == 2
    pool.release(pool.find(chain_hash(b"", [1, 2])))  # used a moment ago: now [3, 4] is the oldest
    unnamed.extend(4, 6)
    assert pool.find(chain_hash(b"", [3, 4])) is None
    assert pool.find(chain_hash(b"", [1, 2])) is not None


def test_the_end_of_a_prompt_is_reused_before_its_beginning():
    pool = BlockPool(3, 2)
    filled(pool, [1, 2, 3, 4, 5, 6]).free()
    taken = BlockTable(pool)
    for start, left in ((0, 4), (2, 2), (4, 0)):
        taken.extend(start, start + 2)
        assert [chain in pool._block_of for chain in chains([1, 2, 3, 4, 5, 6])] == [n < left for n in (0, 2, 4)]


def chains(tokens):
    """The names of the full blocks of two tokens."""
    names, parent = [], b""
    for start in range(0, len(tokens), 2):
        names.append(parent := chain_hash(parent, tokens[start : start + 2]))
    return names


def test_a_block_without_a_name_is_reused_first():
    """Even if it was in use until a moment ago, and the named one for long no more."""
    pool = BlockPool(2, 2)
    named, unnamed = filled(pool, [1, 2]), BlockTable(pool)
    unnamed.extend(0, 1)
    [block] = unnamed.blocks
    named.free()
    unnamed.free()
    assert pool.allocate() == block
    assert BlockTable(pool).match_prefix([1, 2, 0]) == 2


@pytest.mark.parametrize(("length", "hit"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (20, 8)])
def test_a_full_hit_leaves_a_token_to_compute(length, hit):
    pool = BlockPool(8, 4)
    filled(pool, [7] * 9)
    assert BlockTable(pool).match_prefix([7] * length) == hit


def test_a_prefix_is_its_whole_past():
    """The same tokens after other ones are another block."""
    pool = BlockPool(8, 2)
    filled(pool, [1, 1, 5, 5])
    assert BlockTable(pool).match_prefix([2, 2, 5, 5, 0]) == 0


def test_without_prefix_caching():
    pool = BlockPool(8, 2, enable_prefix_caching=False)
    filled(pool, [1, 1, 5, 5])
    assert BlockTable(pool).match_prefix([1, 1, 5, 5]) == 0


def test_copy_on_write():
    pool = BlockPool(8, 4)
    parent = filled(pool, [1] * 6)
    child = parent.fork(6)
    assert child.blocks == parent.blocks
    assert child.missing(6, 7) == 1
    [(old, new)] = child.extend(6, 7)
    assert (old, new) == (parent.blocks[1], child.blocks[1])
    assert parent.extend(6, 7) == []  # alone again
    assert parent.blocks[0] == child.blocks[0]


def test_a_refused_name_goes_too_when_its_block_is_written_anew():
    """Two tables compute the same tokens; the second one's name is refused. It then writes other tokens there."""
    pool = BlockPool(num_blocks=6, block_size=4)
    first, second = BlockTable(pool), BlockTable(pool)
    for table in (first, second):
        table.extend(0, 4)
        table.publish([1, 2, 3, 4], 4)
    second.extend(2, 4)
    second.extend(4, 8)
    second.publish([1, 2, 7, 7, 5, 6, 7, 8], 8)
    assert BlockTable(pool).match_prefix([1, 2, 3, 4, 5, 6, 7, 8, 9]) == 4  # not the block that followed other tokens
    assert BlockTable(pool).match_prefix([1, 2, 7, 7, 5, 6, 7, 8, 9]) == 8
    second.extend(5, 6)
    assert len(second.hashes) == 1


def test_misuse():
    pool = BlockPool(2, 4)
    table = BlockTable(pool)
    with pytest.raises(OutOfBlocks, match="3 blocks wanted, 2 free"):
        table.extend(0, 9)
    assert (table.blocks, pool.num_free) == ([], 2)
    with pytest.raises(ValueError, match="free already"):
        pool.release(0)
    with pytest.raises(ValueError, match="empty table"):
        filled(pool, [1]).match_prefix([1])
    with pytest.raises(ValueError, match="num_blocks"):
        BlockPool(0, 4)
