"""The contracts of the exercises of chapter 8."""

import copy
import itertools
import random

from minillm.cache.blocks import OutOfBlocks
from minillm.learn.testing import exercise, expect, expect_close, expect_equal, expect_parts, expect_raises

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
        compare_admit(impl, [], [(5, 50), (7, 2), (1, 1)], 4, 1000)

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
        for need in (0, -3):
            expect_equal(f"victims, need {need}", list(impl([[0], [1], [2]], need)), [])

    def test_drawn(self, impl):
        """many drawn tables, against trying all sets"""
        draw = random.Random(2)
        for _ in range(150):
            tables = [
                list(dict.fromkeys(draw.randint(0, 9) for _ in range(draw.randint(1, 5))))
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
        expect_close("no runs", impl({}, 0.5, 0.05, 0.9), 0.0)
