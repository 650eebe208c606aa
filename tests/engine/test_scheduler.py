"""The scheduler alone, without a model: what must hold in every step, for drawn requests, pools, budgets and seats."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.cache.blocks import BlockPool, BlockTable
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduler
from minillm.sampling import SamplingParams

LONGEST = 40
PARAMS = SamplingParams()
# prompt, output, priority, arrives at step, completions
REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 30), st.integers(1, 10), st.integers(0, 2), st.integers(0, 10), st.sampled_from([1, 1, 2])
    ),
    min_size=1, max_size=8,
)  # fmt: skip


def request_of(pool: BlockPool, name: str, prompt: int, output: int, priority: int = 0, order: int = 0) -> Request:
    # Tokens count from 0 in all prompts, so that prefixes are shared.
    return Request(name, list(range(prompt)), PARAMS, BlockTable(pool), output, order=order, priority=priority)


def check_step(scheduler: Scheduler, scheduled: list, copies: list) -> None:
    pool, size = scheduler.pool, scheduler.pool.block_size
    assert sum(count for _, count in scheduled) <= scheduler.max_num_batched_tokens
    assert len({request for request, _ in scheduled}) == len(scheduled)
    rows = [request.row for request in scheduler.running]
    assert len(set(rows)) == len(rows) <= scheduler.max_num_seqs
    assert all(0 <= row < scheduler.max_num_seqs for row in rows)
    assert scheduler.running == sorted(scheduler.running, key=lambda r: r.precedence)
    assert scheduler.waiting == sorted(scheduler.waiting, key=lambda r: r.precedence)
    assert all(not r.table.blocks and r.row < 0 for r in scheduler.waiting)  # who waits holds nothing
    written: dict[int, Request] = {}
    for request, count in scheduled:
        assert request in scheduler.running
        assert count >= 1
        first, last = request.num_computed // size, (request.num_computed + count - 1) // size
        assert request.num_computed + count <= request.num_tokens
        assert len(request.table.blocks) > last
        for index in range(first, last + 1):
            block = request.table.blocks[index]
            assert written.setdefault(block, request) is request, "two write one block"
            if pool.references[block] > 1:  # who reads it came in this very step, and takes it as full
                readers = [r for r in scheduler.running if r is not request and block in r.table.blocks]
                assert len(readers) == pool.references[block] - 1
                assert all(r.num_computed >= (index + 1) * size for r in readers)
                assert request.num_computed + count >= (index + 1) * size
    assert len({new for _, new in copies}) == len(copies)
    # Who ranks first among those that run is never left out.
    first = next((r for r in scheduler.running if not r.is_full), None)
    assert first is None or any(r is first for r, _ in scheduled)


def deliver(scheduler: Scheduler, pending: list[Request]) -> int:
    """The tokens of a step arrive -> how many requests are finished by them."""
    finished = 0
    for request in pending:
        request.num_pending -= 1
        request.output_token_ids.append(request.num_tokens - 1)
        if len(request.output_token_ids) == request.max_tokens:
            request.finish_reason = "length"
            scheduler.remove(request)
            finished += 1
    return finished


@settings(max_examples=300, deadline=None)
@given(REQUESTS, st.integers(0, 20), st.sampled_from([1, 2, 4, 8]), st.integers(1, 5), st.integers(1, 40),
       st.booleans(), st.booleans())  # fmt: skip
def test_every_step(drawn, more_blocks, block_size, seats, budget, prefix_caching, overlap):
    pool = BlockPool(-(-LONGEST // block_size) + more_blocks, block_size, prefix_caching)
    scheduler, todo, on_its_way, left = Scheduler(pool, seats, budget), [], [], 0
    for order, (prompt, output, priority, at, completions) in enumerate(drawn):
        first = None
        for i in range(completions):
            request = request_of(pool, f"{order}/{i}", prompt, output, priority, order)
            request.parent, first = first, first or request
            todo.append((at, request))
    left = len(todo)
    for step in range(4000):
        for entry in [entry for entry in todo if entry[0] <= step]:
            todo.remove(entry)
            scheduler.add(entry[1])
        preempted, running = scheduler.metrics.num_preemptions, set(scheduler.running)
        scheduled, copies = scheduler.schedule()
        check_step(scheduler, scheduled, copies)
        if scheduler.metrics.num_preemptions > preempted:  # a step that preempts admits nobody
            assert running.issuperset(request for request, _ in scheduled)
        pending = [r for r, count in scheduled if r.num_computed + count == r.num_tokens]  # who gets a token
        scheduler.advance(scheduled)
        if overlap:
            pending, on_its_way = on_its_way, pending
        left -= deliver(scheduler, pending)
        if not left:
            break
    assert not left, "somebody never finishes"
    assert pool.num_used == 0


def test_decoding_is_not_stopped_by_a_long_prompt():
    """Budget 8: three requests decode in every step, the prompt gets the other five tokens."""
    pool = BlockPool(40, 4)
    scheduler = Scheduler(pool, max_num_seqs=4, max_num_batched_tokens=8)
    short = [request_of(pool, str(i), 1, 20, order=i) for i in range(3)]
    for request in short:
        scheduler.add(request)
    scheduled, _ = scheduler.schedule()
    scheduler.advance(scheduled)
    deliver(scheduler, short)
    long = request_of(pool, "long", 22, 1, order=3)
    scheduler.add(long)
    counts = []
    for _ in range(5):
        scheduled, _ = scheduler.schedule()
        assert [request for request, _ in scheduled[:3]] == short
        counts.append(dict(scheduled).get(long))
        scheduler.advance(scheduled)
        deliver(scheduler, short)
    assert counts == [5, 5, 5, 5, 2]


def test_the_last_in_rank_is_preempted_and_comes_back_with_what_it_said():
    """Blocks of 2, four in all: the second request gives way, waits, and is computed anew, its output included."""
    pool = BlockPool(4, 2, enable_prefix_caching=False)
    scheduler = Scheduler(pool, max_num_seqs=2, max_num_batched_tokens=100)
    first, second = request_of(pool, "first", 3, 4, order=0), request_of(pool, "second", 3, 4, order=1)
    seen = []
    for request in (first, second):
        scheduler.add(request)
    for _ in range(12):
        scheduled, _ = scheduler.schedule()
        seen.append({request.request_id: count for request, count in scheduled})
        scheduler.advance(scheduled)
        deliver(scheduler, [request for request, _ in scheduled])
        if not (scheduler.running or scheduler.waiting):
            break
    # 3 + 3 tokens fill four blocks to 3 of 4 slots each, the fourth tokens the rest; the fifth has no room.
    assert seen[:3] == [{"first": 3, "second": 3}, {"first": 1, "second": 1}, {"first": 1}]
    back = next(step["second"] for step in seen[3:] if "second" in step)
    assert back == 3 + 2  # its prompt and the two tokens that it had
    assert scheduler.metrics.num_preemptions == second.num_preemptions == 1
    assert len(second.output_token_ids) == 4


def test_nobody_overtakes_a_request_that_does_not_fit():
    """Three of four blocks are taken. The next request needs two, the one behind it one, which is there: both wait."""
    pool = BlockPool(4, 4)
    scheduler = Scheduler(pool, max_num_seqs=4, max_num_batched_tokens=100)
    first, large, small = (
        Request(str(i), [i] * length, PARAMS, BlockTable(pool), 2, order=i) for i, length in enumerate((9, 8, 2))
    )
    scheduler.add(first)
    scheduler.advance(scheduler.schedule()[0])
    scheduler.add(large)
    scheduler.add(small)
    for _ in range(2):  # the first request's tokens
        deliver(scheduler, [first])
        scheduled, _ = scheduler.schedule()
        scheduler.advance(scheduled)
        if first.finished:
            break
        assert [request for request, _ in scheduled] == [first]
        assert scheduler.waiting == [large, small]
    assert [request for request, _ in scheduled] == [large, small]


def test_a_beginning_is_shared_while_it_is_computed():
    """Ten tokens in blocks of 4: the second request, of the same step, takes two of them; so does the third, which
    comes while the first still runs; and so does one that goes on where the first one has got to.
    """
    pool = BlockPool(40, 4)
    scheduler = Scheduler(pool, max_num_seqs=8, max_num_batched_tokens=100)
    first, second, third = (request_of(pool, str(i), 10, 6, order=i) for i in range(3))
    scheduler.add(first)
    scheduler.add(second)
    scheduled, copies = scheduler.schedule()
    assert (dict(scheduled), copies) == ({first: 10, second: 2}, [])
    assert second.table.blocks[:2] == first.table.blocks[:2]
    scheduler.advance(scheduled)
    deliver(scheduler, [first, second])
    scheduler.add(third)
    scheduled, _ = scheduler.schedule()
    assert dict(scheduled) == {first: 1, second: 1, third: 2}
    assert [request.num_cached for request in (first, second, third)] == [0, 8, 8]
    scheduler.advance(scheduled)
    deliver(scheduler, [first, second, third])
    for _ in range(2):
        scheduled, _ = scheduler.schedule()
        scheduler.advance(scheduled)
        deliver(scheduler, [first, second, third])
    assert first.num_computed == 13
    assert not first.finished
    longer = Request("longer", first.tokens(), PARAMS, BlockTable(pool), 1, order=9)
    scheduler.add(longer)
    scheduler.schedule()
    assert longer.num_cached == 12  # of the first one's output, too


@pytest.mark.parametrize(("name", "value"), [("max_num_seqs", 0), ("max_num_batched_tokens", 1.5)])
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected an integer, 1 or more, got {value}"):
        Scheduler(BlockPool(4, 2), **{"max_num_seqs": 1, "max_num_batched_tokens": 1, name: value})
