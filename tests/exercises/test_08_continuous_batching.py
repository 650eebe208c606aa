"""The contracts of the exercises of chapter 8."""

import copy
import itertools
import random

from minillm.cache.blocks import BlockPool, BlockTable, OutOfBlocks
from minillm.engine.request import Request as PackageRequest
from minillm.engine.scheduler import Scheduler
from minillm.learn.testing import exercise, expect, expect_close, expect_equal, expect_parts, expect_raises
from minillm.sampling import SamplingParams

# ---- 8.w1


@exercise("8.w1", "chunks")
class TestChunks:
    def test_by_hand(self, impl):
        """3 decode, a budget of 8, a prompt of 12: 5, 5 and 2"""
        expect_equal("chunks", impl(12, 3, 8), [5, 5, 2])

    def test_sizes(self, impl):
        """what divides, what does not, a prompt that fits, a prompt of one token, nobody who decodes"""
        for prompt, decoding, budget, expected in (
            (10, 3, 8, [5, 5]), (11, 3, 8, [5, 5, 1]), (5, 3, 8, [5]), (4, 3, 8, [4]), (1, 7, 8, [1]),
            (20, 0, 8, [8, 8, 4]), (3, 7, 8, [1, 1, 1]),
        ):  # fmt: skip
            expect_equal(f"a prompt of {prompt}, {decoding} decode, budget {budget}", impl(prompt, decoding, budget),
                         expected)  # fmt: skip

    def test_all_of_it(self, impl):
        """every chunk is full but the last, and together they are the prompt"""
        for prompt in range(1, 60):
            got = impl(prompt, 5, 12)
            expect(isinstance(got, list), f"a prompt of {prompt}: expected a list of chunks\n  got {got!r}")
            expect_equal(f"tokens in all, a prompt of {prompt}", sum(got), prompt)
            expect(
                all(n == 7 for n in got[:-1]) and 1 <= got[-1] <= 7,
                f"a prompt of {prompt}, 5 decode, budget 12: expected chunks of 7, a last one of 1 to 7\n  got {got}",
            )

    def test_nothing_left(self, impl):
        """as many or more decode than the budget has tokens: ValueError"""
        for decoding in (8, 9, 100):
            expect_raises(ValueError, lambda d=decoding: impl(12, d, 8), f"{decoding} decode, budget 8")


# ---- 8.w2


@exercise("8.w2", "preempted")
class TestPreempted:
    def test_by_hand(self, impl):
        """[(0, 1, 4), (1, 0, 2), (0, 2, 3)], request 0 needs 3, 1 is free: request 1, by its priority"""
        expect_equal("preempted", impl([(0, 1, 4), (1, 0, 2), (0, 2, 3)], 0, 3, 1), [1])

    def test_enough(self, impl):
        """if the free blocks suffice, nobody goes"""
        for need, free in ((0, 0), (2, 2), (1, 5)):
            expect_equal(f"need {need}, free {free}", impl([(0, 0, 4), (0, 1, 4)], 1, need, free), [])

    def test_one_after_another(self, impl):
        """by arrival, the youngest first, as few as suffice"""
        running = [(0, i, 2) for i in range(5)]
        for need, expected in ((1, [4]), (2, [4]), (3, [4, 3]), (5, [4, 3, 2]), (8, [4, 3, 2, 1])):
            expect_equal(f"need {need}", impl(running, 0, need, 0), expected)
        expect_equal("need 4, 1 free", impl(running, 0, 4, 1), [4, 3])
        expect_equal("need 15 of nine", impl([(0, i, 2) for i in range(9)], 0, 15, 0), [8, 7, 6, 5, 4, 3, 2, 1])

    def test_itself(self, impl):
        """if the request itself goes last it goes, and nobody that goes before it"""
        running = [(0, 0, 2), (0, 1, 2), (0, 2, 1)]
        expect_equal("request 2 needs 9", impl(running, 2, 9, 0), [2])
        expect_equal("request 1 needs 9", impl(running, 1, 9, 0), [2, 1])
        expect_equal("request 1 needs 1", impl(running, 1, 1, 0), [2])
        expect_equal("a request alone", impl([(3, 7, 2)], 0, 9, 0), [0])

    def test_priority_before_arrival(self, impl):
        """a small priority goes first however late it came; in any order of the list"""
        running = [(2, 0, 1), (0, 9, 1), (1, 3, 1), (1, 1, 1), (-1, 20, 1)]
        expect_equal("request 4 needs 4", impl(running, 4, 4, 0), [0, 2, 3, 1])
        expect_equal("request 3 needs 4", impl(running, 3, 4, 0), [0, 2, 3])

    def test_no_blocks(self, impl):
        """the request that goes last goes, also when it holds no block"""
        expect_equal("preempted", impl([(0, 0, 2), (0, 1, 3), (0, 2, 0)], 0, 2, 0), [2, 1])

    def test_numbers(self, impl):
        """priorities and arrivals are numbers: 10 comes after 9"""
        expect_equal("arrivals 3, 2", impl([(0, 3, 1), (0, 2, 1), (0, 1, 1)], 2, 1, 0), [0])
        expect_equal("arrivals 2, 3", impl([(0, 2, 1), (0, 3, 1), (0, 1, 1)], 2, 1, 0), [1])
        expect_equal("priorities 9, 10, 1", impl([(9, 0, 1), (10, 0, 1), (1, 0, 1)], 2, 1, 0), [1])
        expect_equal("arrivals 10, 9, 1", impl([(0, 10, 1), (0, 9, 1), (0, 1, 1)], 2, 2, 0), [0, 1])
        expect_equal("priorities -2, -1, 0", impl([(-2, 5, 1), (-1, 4, 1), (0, 3, 1)], 0, 2, 0), [2, 1])

    def test_the_list_stays(self, impl):
        """the running requests are as they were"""
        running = [(1, 0, 1), (0, 1, 1), (0, 0, 1)]
        impl(running, 2, 2, 0)
        expect_equal("running", running, [(1, 0, 1), (0, 1, 1), (0, 0, 1)])


# ---- 8.w3


@exercise("8.w3", "causes")
class TestCauses:
    def answer(self, impl, engine):
        got = impl()
        expect(isinstance(got, dict), f"expected a dictionary\n  got {got!r}")
        expect(engine in got, f"expected an answer for engine {engine}\n  got {sorted(got)}")
        known = ("blocks", "budget", "prefix", "seats")
        expect(got[engine] in known, f"engine {engine}: expected one of {', '.join(known)}\n  got {got[engine]!r}")
        return got[engine]

    def test_a(self, impl):
        """engine A: nobody waits, nobody is preempted, and now and then a token takes half a second"""
        expect(self.answer(impl, "A") == "budget", "what was in the steps that took so long? Look at tokens_per_step")

    def test_b(self, impl):
        """engine B: 210 wait, and the cache is half empty"""
        expect(self.answer(impl, "B") == "seats", "what do they wait for? Compare running with its bound")

    def test_c(self, impl):
        """engine C: 55 wait though seats are free, and the slow tokens are not those of large steps"""
        expect(self.answer(impl, "C") == "blocks", "which of the four has requests thrown out, and for want of what?")

    def test_d(self, impl):
        """engine D: the first token takes a second, and it is not the queue"""
        expect(self.answer(impl, "D") == "prefix", "why is there so much to compute? Compare the four hit rates")


# ---- 8.0


class One:
    """A request of the exercise."""

    def __init__(self, order, prompt, outputs):
        self.order, self.prompt, self.outputs = order, prompt, outputs
        self.computed = self.generated = self.blocks = 0

    @property
    def gap(self):
        return self.prompt + self.generated - self.computed

    def __repr__(self):
        return f"request {self.order}"


class State:
    def __init__(self, running, waiting, free, budget, seats, block_size):
        self.running, self.waiting, self.free = running, waiting, free
        self.budget, self.seats, self.block_size = budget, seats, block_size


def done(state, plan):
    """The step was computed: count, give tokens, let go who is finished."""
    for request in list(state.running):
        request.computed += plan.get(request.order, 0)
        if request.order in plan and request.gap == 0:
            request.generated += 1
            if request.generated == request.outputs:
                state.running.remove(request)
                state.free += request.blocks


class Theirs:
    """The package's scheduler, with the same requests and no model."""

    def __init__(self, sizes, blocks, budget, seats, block_size):
        self.pool = BlockPool(blocks, block_size, enable_prefix_caching=False)
        self.scheduler = Scheduler(self.pool, seats, budget)
        for i, (prompt, outputs) in enumerate(sizes):
            table = BlockTable(self.pool)
            self.scheduler.add(PackageRequest(str(i), [0] * prompt, SamplingParams(), table, outputs, order=i))

    def plan(self):
        self.scheduled, _ = self.scheduler.schedule()
        return {request.order: count for request, count in self.scheduled}

    def state(self):
        s = self.scheduler
        return [r.order for r in s.running], [r.order for r in s.waiting], self.pool.num_free

    def done(self):
        self.scheduler.advance(self.scheduled)
        for request, _ in self.scheduled:
            if request.num_pending:
                request.num_pending = 0
                request.output_token_ids.append(0)
                if request.is_full:
                    self.scheduler.remove(request)


def run_both(impl, sizes, blocks, budget, seats, block_size, what=""):
    """All steps until nobody is left, plan by plan."""
    state = State([], [One(i, *size) for i, size in enumerate(sizes)], blocks, budget, seats, block_size)
    theirs, step = Theirs(sizes, blocks, budget, seats, block_size), 0
    requests = f"requests (prompt, outputs) {sizes}" if len(sizes) < 6 else f"{len(sizes)} requests"
    about = f"{requests}, {blocks} blocks of {block_size}, budget {budget}, {seats} seats{what}"
    while theirs.scheduler.running or theirs.scheduler.waiting:
        step += 1
        expected, got = theirs.plan(), impl(state)
        expect(isinstance(got, dict), f"expected a plan, {{order: tokens}}\n  got {got!r}")
        at = f"step {step}; {about}"
        expect_equal(f"plan of {at}", sorted(got.items()), sorted(expected.items()))
        running, waiting, free = theirs.state()
        expect_equal(f"who runs, {at}", [r.order for r in state.running], running)
        expect_equal(f"who waits, {at}", [r.order for r in state.waiting], waiting)
        expect_equal(f"free blocks, {at}", state.free, free)
        expect_equal(f"blocks of those who run, {at}", sum(r.blocks for r in state.running), blocks - free)
        for request in state.waiting:
            expect(request.computed == 0 and request.blocks == 0,
                   f"{request} waits, {at}: expected nothing computed and no blocks\n"
                   f"  got {request.computed} computed, {request.blocks} blocks")  # fmt: skip
        done(state, got)
        theirs.done()


@exercise("8.0", "schedule")
class TestSchedule:
    def test_by_hand(self, impl):
        """the chapter's example: A decodes, B comes with 9 tokens, C with 3, a step has 6"""
        a, b, c = One(0, 4, 10), One(1, 9, 10), One(2, 3, 10)
        a.computed, a.generated, a.blocks = 4, 1, 1
        state = State([a], [b, c], 100, 6, 8, 16)
        plans = []
        for _ in range(4):
            plans.append(impl(state))
            expect(isinstance(plans[-1], dict), f"expected a plan, {{order: tokens}}\n  got {plans[-1]!r}")
            done(state, plans[-1])
        expect_equal(
            "plans",
            [sorted(p.items()) for p in plans],
            [[(0, 1), (1, 5)], [(0, 1), (1, 4), (2, 1)], [(0, 1), (1, 1), (2, 2)], [(0, 1), (1, 1), (2, 1)]],
        )

    def test_plenty(self, impl):
        """blocks for everybody: budget and seats decide, plan by plan as the package does"""
        sizes = [(30, 4), (3, 9), (12, 1), (25, 5), (1, 6), (8, 3)]
        for budget, seats in ((8, 8), (100, 3), (1, 2), (5, 5), (64, 1)):
            run_both(impl, sizes, 200, budget, seats, 4)

    def test_running_first(self, impl):
        """a budget that those who decode use up lets nobody in"""
        run_both(impl, [(1, 12), (1, 12), (1, 12), (20, 3)], 100, 3, 8, 4)

    def test_nobody_gets_zero(self, impl):
        """a running request for which no budget is left is not in the plan, and stays where it is"""
        a, b, c = One(0, 9, 4), One(1, 3, 4), One(2, 2, 2)
        b.computed, b.generated, b.blocks = 3, 1, 1
        state = State([a, b], [c], 20, 5, 8, 4)
        expect_equal("plan of 5 tokens; 9 and 1 are asked for", impl(state), {0: 5})
        expect_equal("who runs", [r.order for r in state.running], [0, 1])
        expect_equal("who waits", [r.order for r in state.waiting], [2])
        expect_equal("free blocks", state.free, 18)
        expect_equal("computed and generated, counted up by the caller",
                     [(r.computed, r.generated) for r in (a, b, c)], [(0, 0), (3, 1), (0, 0)])  # fmt: skip
        expect_equal("budget, seats, block_size", (state.budget, state.seats, state.block_size), (5, 8, 4))

    def test_last_goes(self, impl):
        """when a running request needs a block and none is free, the last one gives all of its own back"""
        run_both(impl, [(4, 9), (4, 9), (4, 9)], 4, 64, 8, 4)

    def test_itself(self, impl):
        """if the one in need goes last it waits again, and gets nothing"""
        run_both(impl, [(7, 6), (8, 8)], 4, 64, 8, 4)

    def test_several_go(self, impl):
        """one victim may not suffice"""
        run_both(impl, [(2, 30), (2, 30), (2, 30), (2, 30)], 8, 6, 8, 4)
        first = One(0, 40, 5)
        first.computed, first.blocks = 12, 3
        state = State([first, *(One(i, 3, 9) for i in (1, 2, 3))], [One(4, 2, 2)], 1, 64, 8, 4)
        for request in state.running[1:]:
            request.computed, request.generated, request.blocks = 3, 1, 2
        plan = impl(state)
        expect_equal("a chunk of 28 tokens needs 7 blocks, 1 is free, the others hold 2 each: plan", plan, {0: 28})
        expect_equal("who waits", [r.order for r in state.waiting], [1, 2, 3, 4])
        expect_equal("free blocks", state.free, 0)

    def test_what_was_generated_stays(self, impl):
        """a victim's gap is its prompt and all that it generated"""
        a, b = One(0, 4, 9), One(1, 4, 9)
        for request in (a, b):
            request.computed, request.generated, request.blocks = 8, 5, 2
        state = State([a, b], [], 0, 64, 8, 4)
        expect_equal("plan", impl(state), {0: 1})
        expect_equal("generated by the victim", b.generated, 5)
        expect_equal("its gap", b.gap, 9)
        expect_equal("computed of it", b.computed, 0)

    def test_nobody_is_passed_over(self, impl):
        """the first of those who wait does not fit: the small one behind it stays, and nobody is preempted for it"""
        run_both(impl, [(8, 8), (30, 3), (1, 1), (2, 2)], 9, 64, 8, 4)

    def test_the_guard(self, impl):
        """in a step that preempts, nobody is let in, though a first chunk would fit"""
        run_both(impl, [(8, 20), (8, 20), (8, 20), (2, 2)], 9, 6, 8, 4)

    def test_seats_of_a_victim(self, impl):
        """seats, budget and blocks all short"""
        run_both(impl, [(9, 12)] * 5, 7, 5, 3, 4)

    def test_drawn(self, impl):
        """60 drawn queues, plan by plan as the package does, until everybody is done"""
        draw = random.Random(8)
        for _ in range(60):
            size = draw.choice((1, 2, 4, 16))
            sizes = [(draw.randint(1, 24), draw.randint(1, 12)) for _ in range(draw.randint(1, 7))]
            least = max(-(-(p + n - 1) // size) for p, n in sizes)
            run_both(impl, sizes, least + draw.randint(0, 24 // size), draw.randint(1, 30), draw.randint(1, 6), size)


# ---- 8.1


def in_turns(running, waiting, budget, seats):
    """The rules word by word: one token at a time."""
    first, second = [0] * len(running), [0] * len(waiting)
    for i, gap in enumerate(running):
        if gap == 1 and budget > 0:
            first[i] = 1
            budget -= 1
    seated = max(0, min(len(waiting), seats - len(running)))
    line = [(first, i, gap) for i, gap in enumerate(running) if gap > 1]
    line += [(second, i, waiting[i]) for i in range(seated)]
    while budget > 0 and any(given[i] < gap for given, i, gap in line):
        for given, i, gap in line:
            if given[i] < gap and budget > 0:
                given[i] += 1
                budget -= 1
    return first, second


def drawn_step(draw, prompts=40):
    running = [draw.choice((0, 1, 1, 1, draw.randint(2, prompts))) for _ in range(draw.randint(0, 8))]
    waiting = [draw.randint(1, prompts) for _ in range(draw.randint(0, 6))]
    return running, waiting, draw.randint(1, 60), len(running) + draw.randint(0, 5)


def compare_step(impl, running, waiting, budget, seats):
    got = expect_parts(impl(list(running), list(waiting), budget, seats), "running", "waiting")
    what = f"running {running}, waiting {waiting}, budget {budget}, {seats} seats"
    for name, given, expected in zip(
        ("running", "waiting"), got, in_turns(running, waiting, budget, seats), strict=True
    ):
        expect_equal(f"tokens of the {name} ones; {what}", list(given), expected)


@exercise("8.1", "step")
class TestStep:
    def test_by_hand(self, impl):
        """running 1, 900, 1 and waiting 3, 5, 2 with 12 tokens and 5 seats: [1, 4, 1] and [3, 3, 0]"""
        got = expect_parts(impl([1, 900, 1], [3, 5, 2], 12, 5), "running", "waiting")
        expect_equal("running", list(got[0]), [1, 4, 1])
        expect_equal("waiting", list(got[1]), [3, 3, 0])

    def test_decoding_comes_first(self, impl):
        """a budget smaller than the number that decode goes to the first of them, and to no prompt before them"""
        compare_step(impl, [50, 1, 1, 1], [4], 2, 8)
        compare_step(impl, [50, 1, 1], [4], 2, 8)

    def test_a_prompt_of_one_token(self, impl):
        """a waiting prompt of one token does not decode: it comes after the running ones, in its turn"""
        compare_step(impl, [1, 50, 60], [1], 3, 8)
        compare_step(impl, [40], [7, 1], 2, 8)

    def test_a_short_prompt_overtakes(self, impl):
        """a prompt of 20 tokens behind one of 8,000 is done in this step"""
        compare_step(impl, [8000], [20], 512, 8)
        compare_step(impl, [1, 1, 8000, 700], [20, 6000], 2048, 8)

    def test_what_one_leaves_the_others_get(self, impl):
        """nothing of the budget is lost as long as somebody wants it"""
        compare_step(impl, [], [1, 2, 100, 3], 50, 4)
        compare_step(impl, [7, 100], [2, 9, 30], 60, 5)

    def test_seats(self, impl):
        """who finds no seat gets nothing; running requests hold a seat each, those with a gap of 0 too"""
        compare_step(impl, [0, 1, 0], [5, 5, 5], 100, 4)
        compare_step(impl, [1, 1], [5], 100, 2)

    def test_nothing_to_do(self, impl):
        """no requests, no gaps, or nobody waits"""
        for running, waiting in (([], []), ([0, 0], []), ([], [9]), ([1], [])):
            compare_step(impl, running, waiting, 10, 4)
            compare_step(impl, running, waiting, 0, 4)
        compare_step(impl, [1, 30, 1], [4, 5], 0, 9)

    def test_fewer_seats_than_run(self, impl):
        """the number of seats was lowered: those who run go on, and none of the waiting is let in"""
        compare_step(impl, [1, 9, 1, 1], [4, 5, 6], 40, 3)
        compare_step(impl, [1, 1, 1], [4, 5, 6], 40, 1)
        for budget in (1, 2, 3, 4):
            compare_step(impl, [1, 1, 1], [4], budget, 1)
            compare_step(impl, [1, 7, 1], [4], budget, 2)

    def test_drawn_steps(self, impl):
        """many drawn steps, against one token at a time"""
        draw = random.Random(0)
        for _ in range(400):
            compare_step(impl, *drawn_step(draw))

    def test_arguments_stay(self, impl):
        """the lists are as they were"""
        running, waiting = [1, 9, 1], [4, 4]
        impl(running, waiting, 8, 5)
        expect_equal("running after the call", running, [1, 9, 1])
        expect_equal("waiting after the call", waiting, [4, 4])


# ---- 8.2


def most_blocks(running, started, size):
    """The most blocks in any step, by running all steps one after another."""
    state = [[cached, left] for cached, left in running] + [[prompt - 1, outputs] for prompt, outputs in started]
    peak = 0
    while state:
        for request in state:
            request[0] += 1
            request[1] -= 1
        peak = max(peak, sum((cached + size - 1) // size for cached, _ in state))
        state = [request for request in state if request[1] > 0]
    return peak


def compare_admit(impl, running, waiting, size, blocks):
    expected = next(
        (n - 1 for n in range(1, len(waiting) + 1) if most_blocks(running, waiting[:n], size) > blocks), len(waiting)
    )
    got = impl(list(running), list(waiting), size, blocks)
    what = f"running {running}, waiting {waiting}, {blocks} blocks of {size}"
    expect_equal(f"how many can start; {what}", got, expected)


@exercise("8.2", "admit")
class TestAdmit:
    def test_by_hand(self, impl):
        """blocks of 4, running (7, 1), waiting (4, 5): three blocks suffice, two do not"""
        expect_equal("with 3 blocks", impl([(7, 1)], [(4, 5)], 4, 3), 1)
        expect_equal("with 2 blocks", impl([(7, 1)], [(4, 5)], 4, 2), 0)

    def test_not_all_are_large_at_once(self, impl):
        """one that ends soon makes room for the growth of another"""
        compare_admit(impl, [(60, 4), (4, 60)], [(4, 30), (4, 60)], 4, 24)
        compare_admit(impl, [(100, 1)], [(1, 100)], 10, 11)

    def test_they_must_fit_later_too(self, impl):
        """small prompts with long outputs fit now and not in fifty steps"""
        compare_admit(impl, [], [(1, 100)] * 8, 10, 40)
        compare_admit(impl, [(10, 90)] * 3, [(10, 90)] * 5, 10, 45)

    def test_blocks_are_rounded_up_one_by_one(self, impl):
        """four requests of one token each need four blocks"""
        compare_admit(impl, [], [(1, 1)] * 6, 16, 4)
        compare_admit(impl, [(16, 1)], [(16, 1), (17, 1)], 16, 4)

    def test_nobody_is_passed_over(self, impl):
        """a large request at the head of the queue stops the small ones behind it"""
        compare_admit(impl, [(8, 8)], [(100, 10), (1, 1), (1, 1)], 4, 8)

    def test_the_last_token(self, impl):
        """a prompt with n outputs stores prompt + n - 1 tokens; its blocks serve until its last step, not after"""
        compare_admit(impl, [], [(4, 1)], 4, 1)
        compare_admit(impl, [], [(4, 2)], 4, 1)
        compare_admit(impl, [], [(3, 2)], 4, 1)
        compare_admit(impl, [(3, 1), (3, 2)], [(7, 2)], 4, 4)

    def test_nobody_waits(self, impl):
        """0 of none; all of them when there is plenty"""
        compare_admit(impl, [(5, 5)], [], 4, 8)
        compare_admit(impl, [], [], 4, 8)
        compare_admit(impl, [], [(5, 50), (7, 2), (1, 1)], 4, 1000)
        compare_admit(impl, [(3, 2)], [(2, 3)] * 40, 4, 1000)

    def test_arguments_stay(self, impl):
        """the lists are as they were"""
        running, waiting = [(7, 1), (2, 9)], [(4, 5), (1, 1), (90, 1)]
        impl(running, waiting, 4, 12)
        expect_equal("running after the call", running, [(7, 1), (2, 9)])
        expect_equal("waiting after the call", waiting, [(4, 5), (1, 1), (90, 1)])

    def test_drawn(self, impl):
        """many drawn queues, against running all steps"""
        draw = random.Random(1)
        for _ in range(150):
            size = draw.choice((1, 2, 4, 8))
            running = [(draw.randint(1, 30), draw.randint(1, 20)) for _ in range(draw.randint(0, 4))]
            waiting = [(draw.randint(1, 30), draw.randint(1, 20)) for _ in range(draw.randint(0, 5))]
            blocks = most_blocks(running, [], size) + draw.randint(0, 80 // size)
            compare_admit(impl, running, waiting, size, max(1, blocks))


# ---- 8.3


def come_free(tables, chosen):
    return {
        block
        for i in chosen
        for block in tables[i]
        if not any(block in t for j, t in enumerate(tables) if j not in chosen)
    }


def best_victims(tables, need):
    """By trying all sets: the one that spares request 1 if any does, then 2, and so on; None if no set frees enough."""
    others = range(1, len(tables))
    enough = [
        set(chosen)
        for n in range(len(tables))
        for chosen in itertools.combinations(others, n)
        if len(come_free(tables, set(chosen))) >= need
    ]
    return sorted(max(enough, key=lambda chosen: [i not in chosen for i in others])) if enough else None


@exercise("8.3", "victims")
class TestVictims:
    def test_by_hand(self, impl):
        """tables [1, 2], [1, 3, 4], [1, 5], [1] and a need of 1: request 2 alone"""
        expect_equal("victims", impl([[1, 2], [1, 3, 4], [1, 5], [1]], 1), [2])

    def test_nothing_shared(self, impl):
        """without sharing: the last ones, as few as suffice"""
        tables = [[0, 1], [2, 3], [4], [5, 6]]
        for need, expected in ((1, [3]), (2, [3]), (3, [2, 3]), (4, [1, 3]), (5, [1, 2, 3])):
            expect_equal(f"victims of {tables}, need {need}", impl(tables, need), expected)

    def test_shared_with_one_who_stays(self, impl):
        """a block that request 0 names never comes free"""
        tables = [[0, 1, 2, 3], [0, 1, 2, 3, 9], [0, 1, 2, 3, 8], [0, 1, 2, 3, 7]]
        expect_equal("victims, need 2", impl(tables, 2), [2, 3])
        expect_equal("victims, need 3", impl(tables, 3), [1, 2, 3])

    def test_shared_among_victims(self, impl):
        """a block that only victims share comes free, and counts once"""
        tables = [[0], [1, 2], [5, 6, 7], [5, 6, 7]]
        expect_equal("victims, need 3", impl(tables, 3), [2, 3])
        expect_equal("victims, need 4", impl(tables, 4), [1, 2, 3])

    def test_the_last_may_be_spared(self, impl):
        """who frees nothing that is needed goes on running, even the last"""
        expect_equal("victims", impl([[0], [1, 2, 3], [0]], 2), [1])

    def test_request_0_is_safe(self, impl):
        """if all the others do not suffice: OutOfBlocks"""
        expect_raises(OutOfBlocks, lambda: impl([[0, 1, 2, 3], [4]], 2), "one block can come free, 2 are wanted")
        expect_raises(OutOfBlocks, lambda: impl([[0, 1, 2, 3]], 1), "request 0 is alone")
        expect_raises(OutOfBlocks, lambda: impl([[0, 1], [0, 1], [1, 0]], 1), "all share with request 0")

    def test_no_need(self, impl):
        """a need of 0 or less: nobody"""
        for tables in ([[0], [1], [2]], [[0, 1]], [[0, 1], [0, 1]]):
            for need in (0, -3):
                expect_equal(f"victims of {tables}, need {need}", list(impl(tables, need)), [])

    def test_ascending(self, impl):
        """twelve victims, in ascending order"""
        tables = [[100 + i] for i in range(13)]
        expect_equal("victims, need 12", impl(tables, 12), list(range(1, 13)))

    def test_drawn(self, impl):
        """many drawn tables, against trying all sets"""
        draw = random.Random(2)
        for _ in range(150):
            tables = [
                list(dict.fromkeys(draw.randint(0, 9) for _ in range(draw.randint(0, 5))))
                for _ in range(draw.randint(2, 6))
            ]
            need, before = draw.randint(1, 5), copy.deepcopy(tables)
            expected = best_victims(tables, need)
            if expected is None:
                expect_raises(OutOfBlocks, lambda t=tables, n=need: impl(t, n), f"tables {tables}, need {need}")
            else:
                expect_equal(f"victims of {tables}, need {need}", list(impl(tables, need)), expected)
            expect(tables == before, f"expected the tables as they were, {before}\n  got {tables}")


# ---- 8.4


def taken(queue, count):
    return [queue.take() for _ in range(count)]


@exercise("8.4", "FairQueue")
class TestFairQueue:
    def test_in_order_within_a_user(self, impl):
        """one user alone: first come, first served; then None"""
        queue = impl()
        for i in range(3):
            queue.add("ann", f"a{i}", 10)
        expect_equal("taken", taken(queue, 4), ["a0", "a1", "a2", None])

    def test_by_hand(self, impl):
        """prompts of 100 against prompts of 30: three or four of the small ones for each large one"""
        queue = impl()
        for i in range(3):
            queue.add("ann", f"a{i}", 100)
        for i in range(5):
            queue.add("bob", f"b{i}", 30)
        # counters before each take: (0, 0) (100, 0) (100, 30) (100, 60) (100, 90) (100, 120) (200, 120) (200, 150)
        expect_equal("taken", taken(queue, 8), ["a0", "b0", "b1", "b2", "b3", "a1", "b4", "a2"])

    def test_outputs_count_twice(self, impl):
        """30 generated tokens weigh as much as a prompt of 60"""
        queue = impl()
        for name in ("a0", "a1"):
            queue.add("ann", name, 10)
        for name in ("b0", "b1", "b2"):
            queue.add("bob", name, 25)
        expect_equal("first", queue.take(), "a0")
        queue.generated("ann", 30)  # 10 + 60 = 70
        expect_equal("then", taken(queue, 4), ["b0", "b1", "b2", "a1"])

    def test_outputs_are_charged_when_they_come(self, impl):
        """a request that has generated nothing yet has cost its prompt alone"""
        queue = impl()
        for name in ("a0", "a1"):
            queue.add("ann", name, 10)
        for name in ("b0", "b1"):
            queue.add("bob", name, 15)
        expect_equal("taken", taken(queue, 3), ["a0", "b0", "a1"])

    def test_ties_go_to_the_oldest_request(self, impl):
        """equal counters: whose oldest waiting request came first"""
        queue = impl()
        queue.add("zoe", "z0", 10)
        queue.add("ann", "a0", 10)
        queue.add("zoe", "z1", 10)
        expect_equal("taken", taken(queue, 3), ["z0", "a0", "z1"])
        queue = impl()
        for user, name in (("zoe", "z0"), ("ann", "a0"), ("ann", "a1"), ("zoe", "z1")):
            queue.add(user, name, 10)  # zoe came first of all, but a1 before z1
        expect_equal("z1 was added last; taken", taken(queue, 4), ["z0", "a0", "a1", "z1"])

    def test_weights(self, impl):
        """a user of weight 3 is served three times the tokens"""
        queue = impl({"gold": 3.0})
        for i in range(40):
            queue.add("gold", f"g{i}", 10)
            queue.add("free", f"f{i}", 10)
        served = taken(queue, 40)
        count = sum(name.startswith("g") for name in served)
        expect(29 <= count <= 31, f"of 40 requests: expected about 30 of the user with weight 3\n  got {count}")

    def test_weights_of_outputs(self, impl):
        """generated tokens are divided by the weight too, and fractions count"""
        weights = {"gold": 4.0}
        queue = impl(weights)
        for user, name, tokens in (("gold", "g0", 15), ("gold", "g1", 3), ("free", "f0", 3), ("free", "f1", 3)):
            queue.add(user, name, tokens)
        queue.add("free", "f2", 3)
        expect_equal("first", taken(queue, 3), ["g0", "f0", "f1"])  # gold 15 / 4 = 3.75; free 3, then 6
        queue.generated("gold", 4)  # 3.75 + 8 / 4 = 5.75
        expect_equal("then", taken(queue, 2), ["g1", "f2"])
        expect_equal("the weights that were passed", weights, {"gold": 4.0})

    def test_a_weight_below_one(self, impl):
        """a user of weight 0.5 is served half the tokens; counters are told apart by fractions"""
        queue = impl({"slow": 0.5})
        for user, name in (("slow", "s0"), ("ann", "a0"), ("slow", "s1"), ("ann", "a1"), ("ann", "a2")):
            queue.add(user, name, 10)
        expect_equal("taken", taken(queue, 5), ["s0", "a0", "a1", "s1", "a2"])
        queue = impl({"ann": 100.0, "bob": 100.0})
        for user, name, tokens in (("ann", "a0", 20), ("bob", "b0", 10), ("ann", "a1", 1), ("bob", "b1", 1)):
            queue.add(user, name, tokens)
        expect_equal("of fractions, taken", taken(queue, 4), ["a0", "b0", "b1", "a1"])

    def test_no_savings(self, impl):
        """who comes after a long absence starts level with those who wait, and has no right to what was missed"""
        queue = impl()
        for i in range(20):
            queue.add("ann", f"a{i}", 50)
        taken(queue, 10)  # ann stands at 500
        for i in range(10):
            queue.add("bob", f"b{i}", 50)
        expect_equal("taken", taken(queue, 6), ["a10", "b0", "a11", "b1", "a12", "b2"])

    def test_the_lift_lowers_nobody(self, impl):
        """who had much already keeps the counter"""
        queue = impl()
        queue.add("ann", "a0", 1000)
        queue.take()
        queue.add("bob", "b0", 10)
        queue.add("ann", "a1", 10)  # ann stays at 1,000
        queue.add("bob", "b1", 10)
        expect_equal("taken", taken(queue, 3), ["b0", "b1", "a1"])

    def test_level_with_those_who_wait(self, impl):
        """the lift is to the smallest counter among those who wait: not the largest, and not that of somebody idle"""
        queue = impl()
        for user, cost in (("bob", 10), ("ann", 100), ("cid", 300), ("eve", 1)):
            queue.add(user, f"{user[0]}0", cost)
        queue.add("ann", "a1", 10)
        queue.add("cid", "c1", 10)
        expect_equal("first", taken(queue, 4), ["b0", "a0", "c0", "e0"])  # ann stands at 100 and waits, cid at 300
        queue.add("bob", "b1", 5)  # lifted from 10 to 100
        queue.add("bob", "b2", 5)
        queue.generated("ann", 1)  # 102
        expect_equal("then", taken(queue, 4), ["b1", "a1", "b2", "c1"])

    def test_floor(self, impl):
        """nobody waits: the newcomer starts from what the last one taken had before, so that no one is favored"""
        for asked in (0, 2):
            queue = impl()
            for i in range(3):
                queue.add("ann", f"a{i}", 100)
            taken(queue, 3)  # ann: 300, the floor 200
            expect_equal("nobody waits, taken", taken(queue, asked), [None] * asked)  # and nothing is forgotten
            queue.add("bob", "b0", 60)
            queue.add("bob", "b1", 60)
            queue.add("ann", "a3", 10)
            queue.add("bob", "b2", 60)
            # bob 200, 260, then 320; ann 300
            expect_equal("taken", taken(queue, 4), ["b0", "b1", "a3", "b2"])

    def test_the_floor_of_a_weight(self, impl):
        """the floor is the counter before the charge, as it stood, weights and outputs in it"""
        queue = impl({"ann": 2.0})
        for i in range(2):
            queue.add("ann", f"a{i}", 100)
        taken(queue, 2)  # ann: 50, then 100; the floor 50
        for name in ("b0", "b1", "b2"):
            queue.add("bob", name, 40)  # bob: 50
        queue.add("ann", "a2", 10)
        expect_equal("taken", taken(queue, 4), ["b0", "b1", "a2", "b2"])  # bob 50, 90, then 130; ann 100
        queue = impl()
        queue.add("ann", "a0", 10)
        queue.take()
        queue.generated("ann", 45)  # ann: 100
        queue.add("ann", "a1", 10)
        queue.take()  # the floor 100
        for name in ("b0", "b1"):
            queue.add("bob", name, 40)
        queue.add("ann", "a2", 10)
        expect_equal("with outputs, taken", taken(queue, 3), ["b0", "a2", "b1"])  # bob 100, then 140; ann 110

    def test_whose_floor(self, impl):
        """the floor is the counter of the user taken last, not that of whoever was given most"""
        queue = impl()
        queue.add("ann", "a0", 1000)
        queue.take()  # ann: 1,000, the floor 0
        queue.add("bob", "b0", 10)
        queue.take()  # bob: 10, the floor 0
        for name in ("c0", "c1"):
            queue.add("cid", name, 5)
        queue.add("bob", "b1", 5)
        expect_equal("taken", taken(queue, 3), ["c0", "c1", "b1"])  # cid 0, then 5; bob 10

    def test_outputs_move_no_floor(self, impl):
        """tokens of somebody idle are charged to them alone: the floor stays"""
        queue = impl()
        queue.add("bob", "b0", 10)
        queue.take()  # bob: 10
        for name in ("a0", "a1"):
            queue.add("ann", name, 100)
        taken(queue, 2)  # ann: 100, then 200; the floor 100
        queue.generated("bob", 1)  # bob: 12
        for name in ("c0", "c1"):
            queue.add("cid", name, 150)  # cid: 100, then 250
        queue.add("ann", "a2", 10)
        expect_equal("taken", taken(queue, 3), ["c0", "a2", "c1"])

    def test_counters_outlive_the_queue(self, impl):
        """an empty queue forgets nobody's counter"""
        queue = impl()
        queue.add("ann", "a0", 1000)
        queue.add("bob", "b0", 10)
        expect_equal("first", taken(queue, 3), ["a0", "b0", None])  # ann: 1,000, bob: 10, the floor 0
        for user, name in (("bob", "b1"), ("ann", "a1"), ("bob", "b2")):
            queue.add(user, name, 10)
        expect_equal("then", taken(queue, 3), ["b1", "b2", "a1"])

    def test_empty_names(self, impl):
        """a request may have the empty name, and a prompt of no tokens: it is a request"""
        queue = impl()
        queue.add("", "", 0)
        queue.add("", "r", 1)
        expect_equal("taken", taken(queue, 3), ["", "r", None])

    def test_equal_names(self, impl):
        """requests of one name, of two users and twice of one, are requests of their own"""
        queue = impl()
        for user, tokens in (("ann", 100), ("bob", 30), ("bob", 30), ("ann", 1)):
            queue.add(user, "r", tokens)
        expect_equal("taken", taken(queue, 5), ["r", "r", "r", "r", None])
        queue.add("cid", "c", 1)  # ann 101, bob 60, the floor 100: the last one taken was ann's second
        queue.add("bob", "b", 1)
        expect_equal("then", taken(queue, 3), ["c", "b", None])

    def test_outputs_of_who_never_asked(self, impl):
        """tokens may be charged before a user's first request, and after the last one"""
        queue = impl()
        queue.generated("ann", 50)
        for user, name in (("bob", "b0"), ("bob", "b1"), ("ann", "a0"), ("bob", "b2")):
            queue.add(user, name, 10)  # bob 0; ann 100
        expect_equal("taken", taken(queue, 4), ["b0", "b1", "b2", "a0"])

    def test_two_who_always_wait(self, impl):
        """short against long answers: tokens served differ by little"""
        queue, draw, served, number = impl(), random.Random(4), {"ann": 0, "bob": 0}, 0
        for _ in range(300):
            for user in served:
                queue.add(user, f"{user} {number}", 10)
                number += 1
        for _ in range(300):
            user = queue.take().split()[0]
            tokens = draw.randint(90, 110) if user == "ann" else draw.randint(5, 15)
            queue.generated(user, tokens)
            served[user] += 10 + 2 * tokens
        expect(
            abs(served["ann"] - served["bob"]) <= 2 * (10 + 2 * 110),
            f"expected nearly equal services\n  got {served}",
        )


# ---- 8.5


def request(arrival=0.0, first=0.1, gap=0.01, came=5, wanted=5):
    return arrival, [arrival + first + gap * i for i in range(came)], wanted


def run(good, bad):
    return [request(arrival=i) for i in range(good)] + [request(arrival=i, first=9.0) for i in range(bad)]


@exercise("8.5", "capacity")
class TestCapacity:
    def test_by_hand(self, impl):
        """all good at 10, 8 of 10 at 20: a share of 0.9 is met half way, at 15"""
        runs = {10.0: run(10, 0), 20.0: run(8, 2)}
        expect_close("capacity", impl(runs, 0.5, 0.05, 0.9), 15.0)

    def test_edges(self, impl):
        """the lowest rate fails: 0; none fails: the highest; a share that is just met holds"""
        expect_close("the lowest rate fails", impl({5.0: run(1, 9), 10.0: run(10, 0)}, 0.5, 0.05, 0.9), 0.0)
        expect_close("none fails", impl({5.0: run(10, 0), 10.0: run(9, 1)}, 0.5, 0.05, 0.9), 10.0)
        expect_close("99 of 100, all promised", impl({5.0: run(99, 1)}, 0.5, 0.05, 1.0), 0.0)
        expect_close("close rates", impl({1.75: run(0, 4), 1.5: run(4, 0), 1.25: run(4, 0)}, 0.5, 0.05, 0.5), 1.625)
        expect_close("0.86 of 0.9", impl({5.0: run(50, 0), 10.0: run(43, 7)}, 0.5, 0.05, 0.9), 5 + 5 * 0.1 / 0.14)
        expect_close("just met, then lost", impl({5.0: run(9, 1), 9.0: run(5, 5)}, 0.5, 0.05, 0.9), 5.0)

    def test_rates_in_any_order(self, impl):
        """the dictionary's order does not matter"""
        runs = {20.0: run(8, 2), 40.0: run(0, 10), 10.0: run(10, 0)}
        expect_close("capacity", impl(runs, 0.5, 0.05, 0.9), 15.0)

    def test_the_first_failure_counts(self, impl):
        """a lucky run at a higher rate does not"""
        runs = {10.0: run(10, 0), 20.0: run(8, 2), 30.0: run(10, 0)}
        expect_close("capacity", impl(runs, 0.5, 0.05, 0.9), 15.0)

    def test_unfinished_requests_are_not_good(self, impl):
        """no token yet, or not all of them: the run ended first"""
        runs = {1.0: run(10, 0), 2.0: [*run(6, 0), (0.0, [], 5), (1.0, [], 5), request(came=4), request(came=1)]}
        expect_close("capacity", impl(runs, 0.5, 0.05, 0.8), 1.5)

    def test_first_token_from_arrival(self, impl):
        """the limit itself still holds, more does not; late arrivals are not late answers"""
        late = [request(arrival=100.0, first=0.25) for _ in range(4)]
        expect_close("at the limit", impl({3.0: late}, 0.25, 0.05, 1.0), 3.0)
        expect_close("beyond it", impl({3.0: late}, 0.2, 0.05, 1.0), 0.0)
        expect_close("a little beyond it", impl({3.0: late}, 0.2499, 0.05, 1.0), 0.0)

    def test_gaps_on_average(self, impl):
        """one long gap among short ones is forgiven, a slow request is not, and one token has no gap"""
        uneven = (0.0, [0.125, 0.1875, 0.25, 0.625], 4)  # (0.625 - 0.125) / 3
        expect_close("mean gap 1/6", impl({3.0: [uneven]}, 0.5, 0.17, 1.0), 3.0)
        expect_close("mean gap 1/6, limit 0.16", impl({3.0: [uneven]}, 0.5, 0.16, 1.0), 0.0)
        even = (0.0, [0.125, 0.25, 0.375], 3)
        expect_close("gaps of 1/8, the limit itself", impl({3.0: [even]}, 0.5, 0.125, 1.0), 3.0)
        expect_close("one token", impl({3.0: [request(came=1, wanted=1)]}, 0.5, 0.0, 1.0), 3.0)

    def test_each_request_by_itself(self, impl):
        """two short slow requests among quick long ones: 2 of 4 are bad, however many quick gaps there are"""
        quick = [request(gap=0.001, came=500, wanted=500) for _ in range(2)]
        slow = [request(gap=0.2, came=3, wanted=3) for _ in range(2)]
        expect_close("capacity", impl({1.0: run(4, 0), 2.0: quick + slow}, 0.5, 0.05, 0.75), 1.5)

    def test_empty(self, impl):
        """a run without requests keeps the promise; no runs, no capacity"""
        expect_close("an empty run", impl({1.0: [], 2.0: run(0, 4)}, 0.5, 0.05, 0.5), 1.5)
        expect_close("empty runs alone", impl({1.0: [], 3.0: []}, 0.5, 0.05, 1.0), 3.0)
        expect_close("no runs", impl({}, 0.5, 0.05, 0.9), 0.0)

    def test_the_ends_of_the_scale(self, impl):
        """a share of 0 always holds; a first token at time 0 is a token; limits of 0"""
        expect_close("a share of 0", impl({1.0: run(0, 4), 2.0: run(0, 2)}, 0.5, 0.05, 0.0), 2.0)
        at_once = {4.0: [(0.0, [0.0, 0.0], 2), (3.0, [3.0], 1)]}
        expect_close("tokens at once, limits of 0", impl(at_once, 0.0, 0.0, 1.0), 4.0)

    def test_runs_stay(self, impl):
        """what was seen is as it was"""
        runs = {20.0: run(8, 2), 10.0: run(3, 0)}
        before = copy.deepcopy(runs)
        impl(runs, 0.5, 0.05, 0.9)
        expect(list(runs.items()) == list(before.items()), "expected the runs as they were\n  got changed ones")
