"""Wrong and alternative implementations for the exercises of chapter 8: they keep the checks honest."""

import heapq
from collections import Counter, deque

from minillm.cache.blocks import OutOfBlocks
from minillm.learn.testing import alternative, wrong

# ---- 8.w1


@wrong("8.w1", "the whole budget for the prompt")
def chunks(prompt, decoding, budget):
    if budget <= decoding:
        raise ValueError
    return [min(budget, prompt - start) for start in range(0, prompt, budget)]


@wrong("8.w1", "one more step for the first token")
def chunks(prompt, decoding, budget):
    if budget <= decoding:
        raise ValueError
    most = budget - decoding
    return [*(min(most, prompt - start) for start in range(0, prompt, most)), 1]


@wrong("8.w1", "an empty last chunk where the prompt divides")
def chunks(prompt, decoding, budget):
    if budget <= decoding:
        raise ValueError
    whole, rest = divmod(prompt, budget - decoding)
    return [budget - decoding] * whole + [rest]


@wrong("8.w1", "equal parts")
def chunks(prompt, decoding, budget):
    if budget <= decoding:
        raise ValueError
    steps = -(-prompt // (budget - decoding))
    return [prompt // steps + (i < prompt % steps) for i in range(steps)]


@wrong("8.w1", "the remainder first")
def chunks(prompt, decoding, budget):
    if budget <= decoding:
        raise ValueError
    most = budget - decoding
    return [min(most, prompt - start) for start in range(0, prompt, most)][::-1]


@wrong("8.w1", "no chunk, and no error, where nothing is left")
def chunks(prompt, decoding, budget):
    if budget <= decoding:
        return []
    return [min(budget - decoding, prompt - start) for start in range(0, prompt, budget - decoding)]


@wrong("8.w1", "an error only where more decode than there are tokens")
def chunks(prompt, decoding, budget):
    if budget < decoding:
        raise ValueError
    most = max(1, budget - decoding)
    return [min(most, prompt - start) for start in range(0, prompt, most)]


@wrong("8.w1", "how many steps, not what is in them")
def chunks(prompt, decoding, budget):
    if budget <= decoding:
        raise ValueError
    return -(-prompt // (budget - decoding))


@alternative("8.w1", "step by step")
def chunks(prompt, decoding, budget):
    if budget - decoding < 1:
        raise ValueError
    found = []
    while prompt > 0:
        found.append(min(prompt, budget - decoding))
        prompt -= found[-1]
    return found


# ---- 8.w2


def gone(running, who, need, free, mistake=""):
    key = {
        "arrival": lambda i: running[i][1], "priority alone": lambda i: running[i][0], "as listed": lambda i: i,
        "turned": lambda i: (-running[i][0], running[i][1]),
        "youngest stays": lambda i: (running[i][0], -running[i][1]),
    }.get(mistake, lambda i: running[i][:2])  # fmt: skip
    order, found = sorted(range(len(running)), key=key), []
    if mistake == "never itself":
        order.remove(who)
    if mistake == "changes":
        running.sort()
    while order and (free < need or mistake == "everybody"):
        if mistake == "itself not listed" and order[-1] == who:
            break
        found.append(order.pop(0 if mistake == "first" else -1))
        free += 1 if mistake == "one block each" else running[found[-1]][2]
        if (found[-1] == who and mistake != "past itself") or mistake == "one":
            break
    return found[::-1] if mistake == "ascending" else found


def gone_with(what):
    return lambda running, who, need, free: gone(running, who, need, free, what)


for what, why in (
    ("arrival", "by arrival alone"),
    ("priority alone", "by priority, and as listed among equal ones"),
    ("as listed", "the last of the list"),
    ("turned", "a large priority goes first"),
    ("youngest stays", "of equal priorities the one that came first goes"),
    ("never itself", "spares the request in need, and throws out those that go before it"),
    ("itself not listed", "stops before the request in need, and does not name it"),
    ("past itself", "goes on behind the request in need"),
    ("first", "begins with the one that goes first"),
    ("one", "one victim, whether it suffices or not"),
    ("one block each", "counts victims instead of blocks"),
    ("everybody", "preempts though there are enough"),
    ("ascending", "turns the order around"),
    ("changes", "sorts the caller's list"),
):
    wrong("8.w2", why)(gone_with(what))


@wrong("8.w2", "passes over those who hold no block")
def preempted(running, who, need, free):
    order, victims = (sorted(range(len(running)), key=lambda i: running[i][:2]), [])
    while free < need and who not in victims:
        if running[order[-1]][2] == 0 and order[-1] != who:
            order.pop()
            continue
        victims.append(order.pop())
        free += running[victims[-1]][2]
    return victims


@wrong("8.w2", "priorities as text: 10 before 9")
def preempted(running, who, need, free):
    order, victims = (sorted(range(len(running)), key=lambda i: (str(running[i][0]), running[i][1])), [])
    while free < need and who not in victims:
        victims.append(order.pop())
        free += running[victims[-1]][2]
    return victims


@alternative("8.w2", "the largest of those that are left, again and again")
def preempted(running, who, need, free):
    left, found = dict(enumerate(running)), []
    while free < need:
        i = max(left, key=lambda j: left[j])
        free += left.pop(i)[2]
        found.append(i)
        if i == who:
            break
    return found


# ---- 8.w3


@wrong("8.w3", "takes the queue of B for a want of blocks")
def causes():
    return {"A": "budget", "B": "blocks", "C": "blocks", "D": "prefix"}


@wrong("8.w3", "gives seats to C, which makes it worse")
def causes():
    return {"A": "budget", "B": "seats", "C": "seats", "D": "prefix"}


@wrong("8.w3", "takes D's long prompts for too large a budget")
def causes():
    return {"A": "budget", "B": "seats", "C": "blocks", "D": "budget"}


@wrong("8.w3", "takes A's long gaps for preemptions")
def causes():
    return {"A": "blocks", "B": "seats", "C": "blocks", "D": "prefix"}


@wrong("8.w3", "leaves D out")
def causes():
    return {"A": "budget", "B": "seats", "C": "blocks"}


@wrong("8.w3", "answers in words of its own")
def causes():
    return {"A": "budget", "B": "more seats", "C": "blocks", "D": "prefix"}


@wrong("8.w3", "a list")
def causes():
    return ["budget", "seats", "blocks", "prefix"]


@alternative("8.w3", "from pairs")
def causes():
    return dict(zip("DCBA", ("prefix", "blocks", "seats", "budget"), strict=True))


# ---- 8.0


def plan_of(state, mistake=""):
    """The right step, but for what `mistake` names."""
    plan, left, size = {}, state.budget, state.block_size

    def count_of(request):
        return request.gap if mistake == "no budget" else min(request.gap, left)

    def missing(request):
        tokens = request.computed + count_of(request)
        if mistake == "rounds down":
            return max(0, tokens // size - request.blocks)
        if mistake == "forgets what it has":
            return -(-count_of(request) // size)
        if mistake == "one too many":
            return tokens // size + 1 - request.blocks
        return -(-tokens // size) - request.blocks

    def give(request):
        nonlocal left
        new, count = missing(request), count_of(request)
        state.free -= new
        request.blocks += new
        plan[request.order] = count
        left = max(0, left - count)

    def preempt(victim):
        state.running.remove(victim)
        if mistake != "keeps its blocks":
            state.free += victim.blocks
            victim.blocks = 0
        if mistake != "keeps computed":
            victim.computed = 0
        if mistake == "loses its text":
            victim.generated = 0
        if mistake == "to the end":
            state.waiting.append(victim)
        else:
            state.waiting.insert(0, victim)

    def admit():
        nonlocal left
        seats = 10**9 if mistake == "no seats" else state.seats
        for request in list(state.waiting):
            if not left or len(state.running) >= seats:
                break
            if preempted and mistake != "no guard":
                break
            while mistake == "preempts for newcomers" and missing(request) > state.free and len(state.running) > 1:
                preempt(state.running[-1])
            if missing(request) > state.free:
                if mistake == "passes over":
                    continue
                break
            state.waiting.remove(request)
            state.running.append(request)
            give(request)

    preempted = False
    if mistake == "waiting first":
        admit()
    for request in list(state.running):
        if not left or request not in state.running or request.order in plan:
            continue
        if mistake == "decode whole" and left < request.gap:
            break
        while missing(request) > state.free and request in state.running:
            if mistake == "skips":
                break
            preempted = True
            victim = state.running[0 if mistake == "first goes" else -1]
            if mistake == "spares itself" and victim is request:
                break
            preempt(victim)
            if victim is not request and mistake == "one victim":
                break
        if request in state.running and missing(request) <= state.free:
            give(request)
        elif mistake == "in the plan":
            plan[request.order] = 0
    if mistake != "waiting first":
        admit()
    return plan


def plan_with(what):
    return lambda state: plan_of(state, what)


for what, why in (
    ("no budget", "gives everybody all of the gap"),
    ("rounds down", "rounds blocks down"),
    ("forgets what it has", "takes blocks for the new tokens alone"),
    ("one too many", "takes a block too many where tokens fill theirs"),
    ("keeps its blocks", "a victim keeps its blocks"),
    ("keeps computed", "a victim goes on where it was, without its keys"),
    ("loses its text", "a victim loses what it generated"),
    ("to the end", "a victim goes to the end of the queue"),
    ("no seats", "lets in more than there are seats"),
    ("no guard", "lets a victim straight back in"),
    ("preempts for newcomers", "preempts for one who waits"),
    ("passes over", "passes over the first one who does not fit"),
    ("waiting first", "serves those who wait before those who run"),
    ("decode whole", "does not cut a running request's gap"),
    ("skips", "skips a running request that lacks a block, and preempts nobody"),
    ("first goes", "preempts the one that goes first"),
    ("spares itself", "leaves the request itself its blocks if it goes last"),
    ("one victim", "one victim, whether it suffices or not"),
    ("in the plan", "has who gets nothing in the plan, with 0"),
):
    wrong("8.0", why)(plan_with(what))
alternative("8.0", "with sets of helpers")(plan_with(""))


@wrong("8.0", "returns pairs of tokens and requests")
def schedule(state):
    return list(plan_of(state).items())


@wrong("8.0", "counts the tokens as computed already")
def schedule(state):
    plan = plan_of(state)
    for request in state.running:
        request.computed += plan.get(request.order, 0)
    return plan


# ---- 8.1


def shared(running, waiting, budget, seats, mistake=""):
    """The right step, one token at a time, but for what `mistake` names."""
    given, left = [0] * (len(running) + len(waiting)), budget
    if mistake == "all seats free":
        seats += len(running)
    if mistake == "idle hold no seat":
        seats += sum(gap == 0 for gap in running)
    seated = len(waiting) if mistake == "no seats" else max(0, seats - len(running))
    if mistake == "negative seats" and seats < len(running):
        seated = len(waiting) + seats - len(running)
    line = [*enumerate(running), *enumerate(waiting[:seated], len(running))]
    if mistake != "prompts first":
        for i, gap in line if mistake == "prompts of one" else enumerate(running):
            if gap == 1 and (left or mistake == "over budget"):
                given[i], left = 1, max(0, left - 1)
    if mistake == "equal parts":
        for i, gap in line:
            if given[i] < gap:
                given[i] = min(gap, left // max(1, sum(given[j] < g for j, g in line)))
        return given
    if mistake == "in order":
        for i, gap in line:
            more = min(gap - given[i], left)
            given[i], left = given[i] + more, left - more
        return given
    if mistake == "waiting first":
        line = [*line[len(running) :], *line[: len(running)]]
    while left and any(given[i] < gap for i, gap in line):
        for i, gap in line:
            if given[i] < gap and left:
                given[i], left = given[i] + 1, left - 1
    return given


def step_with(mistake):
    def step(running, waiting, budget, seats):
        given = shared(running, waiting, budget, seats, mistake)
        return given[: len(running)], given[len(running) :]

    return step


wrong("8.1", "gives the rest of the budget in order of arrival, as the package does")(step_with("in order"))
wrong("8.1", "cuts the budget into equal parts once; what short prompts leave is lost")(step_with("equal parts"))
wrong("8.1", "lets everybody in, whatever the seats")(step_with("no seats"))
wrong("8.1", "counts the seats as if nobody ran")(step_with("all seats free"))
wrong("8.1", "frees the seat of a request whose last token is on the way")(step_with("idle hold no seat"))
wrong("8.1", "decodes more than the budget allows")(step_with("over budget"))
wrong("8.1", "serves decoding and prompts alike, in turns")(step_with("prompts first"))
wrong("8.1", "shares among the waiting before the running")(step_with("waiting first"))
wrong("8.1", "takes a waiting prompt of one token for one that decodes")(step_with("prompts of one"))
wrong("8.1", "cuts the waiting ones from the end where more run than there are seats")(step_with("negative seats"))
alternative("8.1", "one token at a time")(step_with(""))


@wrong("8.1", "gives a token though the budget is 0")
def step(running, waiting, budget, seats):
    return step_with("")(running, waiting, max(1, budget), seats)


@wrong("8.1", "takes the seated ones off the caller's queue")
def step(running, waiting, budget, seats):
    found = step_with("")(running, waiting, budget, seats)
    del waiting[: max(0, seats - len(running))]
    return found


@wrong("8.1", "keeps a token back where more run than there are seats")
def step(running, waiting, budget, seats):
    gaps = [*running, *waiting[: max(0, seats - len(running))]]
    given = [0] * (len(running) + len(waiting))
    for i, gap in enumerate(running):
        if gap == 1 and budget > len(waiting) - len(waiting) + (1 if len(running) > seats else 0):
            given[i], budget = (1, budget - 1)
    hungry = [i for i, gap in enumerate(gaps) if gap > 1 or (gap == 1 and i >= len(running))]
    while hungry and budget:
        level, extra = divmod(budget, len(hungry))
        full = [i for i in hungry if gaps[i] <= level]
        if not full:
            for place, i in enumerate(hungry):
                given[i] = level + (place < extra)
            break
        for i in full:
            given[i], budget = (gaps[i], budget - gaps[i])
        hungry = [i for i in hungry if gaps[i] > level]
    return (given[: len(running)], given[len(running) :])


@alternative("8.1", "always to whoever has least")
def step(running, waiting, budget, seats):
    first, second = [0] * len(running), [0] * len(waiting)
    heap = []
    for i, gap in enumerate(running):
        if gap == 1 and budget:
            first[i], budget = 1, budget - 1
        elif gap > 1:
            heap.append((0, i))
    heap += [(0, len(running) + i) for i in range(min(len(waiting), max(0, seats - len(running))))]
    heapq.heapify(heap)
    while heap and budget:
        has, i = heapq.heappop(heap)
        budget -= 1
        place, gaps, j = (first, running, i) if i < len(running) else (second, waiting, i - len(running))
        place[j] = has + 1
        if place[j] < gaps[j]:
            heapq.heappush(heap, (has + 1, i))
    return first, second


# ---- 8.2


def ceil(tokens, size):
    return -(-tokens // size)


def peak(running, started, size):
    inside = [*running, *((prompt - 1, outputs) for prompt, outputs in started)]
    steps = max((left for _, left in inside), default=0)
    return max(
        (sum(ceil(cached + j, size) for cached, left in inside if left >= j) for j in range(1, steps + 1)), default=0
    )


def count_while(fits, waiting):
    n = 0
    while n < len(waiting) and fits(waiting[: n + 1]):
        n += 1
    return n


@wrong("8.2", "adds up everybody's largest size: safe, and turns away who would fit")
def admit(running, waiting, block_size, num_blocks):
    inside = [ceil(cached + left, block_size) for cached, left in running]
    return count_while(
        lambda new: sum(inside) + sum(ceil(p + n - 1, block_size) for p, n in new) <= num_blocks, waiting
    )


@wrong("8.2", "looks at the next step alone")
def admit(running, waiting, block_size, num_blocks):
    inside = [ceil(cached + 1, block_size) for cached, _ in running]
    return count_while(lambda new: sum(inside) + sum(ceil(p, block_size) for p, _ in new) <= num_blocks, waiting)


@wrong("8.2", "adds up tokens and rounds the sum")
def admit(running, waiting, block_size, num_blocks):
    return count_while(lambda new: peak(running, new, 1) <= num_blocks * block_size, waiting)


@wrong("8.2", "passes over the one that does not fit")
def admit(running, waiting, block_size, num_blocks):
    started = []
    for request in waiting:
        if peak(running, [*started, request], block_size) <= num_blocks:
            started.append(request)
    return len(started)


@wrong("8.2", "counts a last output's token as stored")
def admit(running, waiting, block_size, num_blocks):
    return count_while(lambda new: peak([*running, *((p, n) for p, n in new)], [], block_size) <= num_blocks, waiting)


@wrong("8.2", "frees a request's blocks one step too early")
def admit(running, waiting, block_size, num_blocks):
    def early(new):
        inside = [*running, *((p - 1, n) for p, n in new)]
        steps = max((left for _, left in inside), default=0)
        return max(
            (sum(ceil(c + j, block_size) for c, left in inside if left > j) for j in range(steps + 1)), default=0
        )

    return count_while(lambda new: early(new) <= num_blocks, waiting)


@wrong("8.2", "stops at the first step of the future at which a request ends")
def admit(running, waiting, block_size, num_blocks):
    def first_end(new):
        inside = [*running, *((p - 1, n) for p, n in new)]
        j = min(left for _, left in inside)
        return sum(ceil(cached + j, block_size) for cached, _ in inside)

    return count_while(lambda new: first_end(new) <= num_blocks, waiting)


@wrong("8.2", "takes who starts off the caller's queue")
def admit(running, waiting, block_size, num_blocks):
    count = count_while(lambda new: peak(running, new, block_size) <= num_blocks, waiting)
    del waiting[:count]
    return count


@wrong("8.2", "the requests that start, not how many")
def admit(running, waiting, block_size, num_blocks):
    return waiting[: count_while(lambda new: peak(running, new, block_size) <= num_blocks, waiting)]


@wrong("8.2", "at most eight at once")
def admit(running, waiting, block_size, num_blocks):
    inside = list(running)
    for count, (prompt, outputs) in enumerate(waiting):
        inside.append((prompt - 1, outputs))
        for step in {left for _, left in inside}:
            need = sum((-(-(cached + step) // block_size) for cached, left in inside if left >= step))
            if need > num_blocks:
                return count
    return min(len(waiting), 8)


@alternative("8.2", "runs all steps")
def admit(running, waiting, block_size, num_blocks):
    return count_while(lambda new: peak(running, new, block_size) <= num_blocks, waiting)


# ---- 8.3


def freed(tables, chosen):
    stays = {b for i, table in enumerate(tables) if i not in chosen for b in table}
    return {b for i in chosen for b in tables[i]} - stays


def from_the_last(tables, need, gain, lowest=1):
    chosen, have = [], 0
    for i in range(len(tables) - 1, lowest - 1, -1):
        if have >= need:
            break
        chosen.append(i)
        have = gain(tables, chosen)
    if have < need:
        raise OutOfBlocks
    return sorted(chosen)


def all_blocks(tables, chosen):
    return sum(len(tables[i]) for i in chosen)


def owned_alone(tables, chosen):
    names = Counter(b for table in tables for b in table)
    return sum(names[b] == 1 for i in chosen for b in tables[i])


def counted_twice(tables, chosen):
    free = freed(tables, set(chosen))
    return sum(b in free for i in chosen for b in tables[i])


@wrong("8.3", "counts all blocks of a table, shared ones too")
def victims(tables, need):
    return from_the_last(tables, need, all_blocks)


@wrong("8.3", "preempts from the end until it suffices, and spares nobody")
def victims(tables, need):
    return from_the_last(tables, need, lambda t, c: len(freed(t, set(c))))


def sparing(tables, need, gain, order=None, lowest=1):
    chosen = set(range(lowest, len(tables)))
    if gain(tables, chosen) < need:
        raise OutOfBlocks
    for i in order(chosen) if order else sorted(chosen):
        if gain(tables, chosen - {i}) >= need:
            chosen.remove(i)
    return sorted(chosen)


@wrong("8.3", "counts only blocks with a single owner: what victims share among themselves is overlooked")
def victims(tables, need):
    return sparing(tables, need, owned_alone)


@wrong("8.3", "counts a block that two victims share twice")
def victims(tables, need):
    return sparing(tables, need, counted_twice)


@wrong("8.3", "spares the last ones first")
def victims(tables, need):
    return sparing(tables, need, lambda t, c: len(freed(t, c)), lambda chosen: sorted(chosen, reverse=True))


@wrong("8.3", "may preempt request 0")
def victims(tables, need):
    return sparing(tables, need, lambda t, c: len(freed(t, c)), lowest=0)


@wrong("8.3", "returns what there is when it does not suffice")
def victims(tables, need):
    try:
        return sparing(tables, need, lambda t, c: len(freed(t, c)))
    except OutOfBlocks:
        return list(range(1, len(tables)))


@wrong("8.3", "takes a victim even if nothing is needed")
def victims(tables, need):
    return sparing(tables, max(1, need), lambda t, c: len(freed(t, c)))


@wrong("8.3", "raises when request 0 is alone, needed or not")
def victims(tables, need):
    if len(tables) == 1:
        raise OutOfBlocks
    return sparing(tables, need, lambda t, c: len(freed(t, c)))


@wrong("8.3", "raises when nothing could come free, needed or not")
def victims(tables, need):
    if not freed(tables, set(range(1, len(tables)))):
        raise OutOfBlocks
    return sparing(tables, need, lambda t, c: len(freed(t, c)))


@wrong("8.3", "in descending order")
def victims(tables, need):
    return sparing(tables, need, lambda t, c: len(freed(t, c)))[::-1]


@wrong("8.3", "takes the victims' blocks out of the caller's tables")
def victims(tables, need):
    found = sparing(tables, need, lambda t, c: len(freed(t, c)))
    for i in found:
        tables[i].clear()
    return found


@alternative("8.3", "with reference counts")
def victims(tables, need):
    references, chosen = Counter(b for table in tables for b in table), list(range(1, len(tables)))
    for i in chosen:
        references.subtract(tables[i])
    free = sum(n == 0 for n in references.values())
    if free < need:
        raise OutOfBlocks
    kept = []
    for i in chosen:
        loses = sum(references[b] == 0 for b in tables[i])
        if free - loses >= need:
            references.update(tables[i])
            free -= loses
        else:
            kept.append(i)
    return kept


# ---- 8.4


class Fair:
    """The right queue, but for what `mistake` names."""

    mistake = ""

    def __init__(self, weights=None):
        self.weights, self.counters, self.waiting, self.floor, self.added = dict(weights or {}), {}, {}, 0.0, 0
        self.prompts = {}

    def charge(self, user, cost):
        weight = 1.0 if self.mistake == "no weights" else self.weights.get(user, 1.0)
        if self.mistake == "whole numbers":
            cost -= cost % weight
        if self.mistake == "weights upside down":
            weight = 1 / weight
        self.counters[user] = self.counters.get(user, 0.0) + cost / weight

    def add(self, user, request, prompt_tokens):
        if not self.waiting.get(user):
            others = [self.counters[name] for name, queue in self.waiting.items() if queue]
            known = self.counters.get(user, 0.0)
            least = min(others, default=0.0 if self.mistake == "no floor" else self.floor)
            if self.mistake == "all users":
                least = min(self.counters.values(), default=0.0)
            if self.mistake == "lowers":
                self.counters[user] = least
            elif self.mistake == "saves":
                self.counters[user] = known
            elif self.mistake == "resets":
                self.counters[user] = max(known, max(others, default=self.floor))
            else:
                self.counters[user] = max(known, least)
        self.waiting.setdefault(user, deque()).append((self.added, request, prompt_tokens))
        self.added += 1

    def take(self):
        users = [user for user, queue in self.waiting.items() if queue]
        if not users:
            if self.mistake == "forgets":
                self.floor, self.counters = 0.0, {}
            return None
        if self.mistake == "by arrival":
            user = min(users, key=lambda u: self.waiting[u][0][0])
        elif self.mistake == "ties by name":
            user = min(users, key=lambda u: (self.counters[u], u))
        elif self.mistake == "ties by first sight":
            user = min(users, key=lambda u: self.counters[u])
        else:
            user = min(users, key=lambda u: (self.counters[u], self.waiting[u][0][0]))
        queue = self.waiting[user]
        _, request, tokens = queue.pop() if self.mistake == "newest" else queue.popleft()
        before = max(self.counters.values()) if self.mistake == "floor of all" else self.counters[user]
        self.charge(user, 1 if self.mistake == "counts requests" else tokens)
        self.floor = self.counters[user] if self.mistake == "floor after" else before
        if self.mistake == "floor less tokens":
            self.floor = self.counters[user] - tokens
        if self.mistake == "floor of prompts":
            self.prompts[user] = self.prompts.get(user, 0.0) + tokens / self.weights.get(user, 1.0)
            self.floor = self.prompts[user] - tokens / self.weights.get(user, 1.0)
        return request

    def generated(self, user, tokens):
        price = {"outputs free": 0, "outputs once": 1, "counts requests": 0}.get(self.mistake, 2)
        if self.mistake == "outputs without weight":
            self.counters[user] += price * tokens
        else:
            self.charge(user, price * tokens)


for name, what in {
    "by arrival": "first come, first served",
    "counts requests": "counts requests instead of tokens",
    "outputs free": "charges prompts alone",
    "outputs once": "a generated token costs as much as one of the prompt",
    "no weights": "forgets the weights",
    "weights upside down": "multiplies by the weight",
    "saves": "lets who was idle keep a small counter",
    "lowers": "sets the counter to the others' even if it was larger",
    "resets": "lifts to the largest counter of those who wait",
    "all users": "lifts to the smallest counter of everybody, idle ones too",
    "no floor": "starts a newcomer at 0 when nobody waits",
    "floor after": "takes the floor after the charge",
    "floor of all": "takes the largest counter of all for the floor",
    "floor less tokens": "takes the prompt off the counter after the charge, and forgets the weight",
    "floor of prompts": "leaves outputs out of the floor",
    "forgets": "forgets counters and floor when nobody waits",
    "outputs without weight": "divides prompts by the weight, outputs not",
    "whole numbers": "divides by the weight and drops the rest",
    "ties by first sight": "breaks ties by which user came first of all",
    "ties by name": "breaks ties by the user's name",
    "newest": "takes a user's newest request",
}.items():
    wrong("8.4", what)(type("FairQueue", (Fair,), {"mistake": name}))


@wrong("8.4", "keeps users and tokens by the request's name")
class FairQueue(Fair):
    def add(self, user, request, prompt_tokens):
        self.sizes = getattr(self, "sizes", {}) | {request: (user, prompt_tokens)}
        super().add(user, request, prompt_tokens)

    def take(self):
        request = super().take()
        if request is not None and self.sizes.pop(request, None) is None:
            return None
        return request


@wrong("8.4", "knows users by their first request alone")
class FairQueue(Fair):
    def generated(self, user, tokens):
        if user in self.waiting:
            super().generated(user, tokens)


alternative("8.4", "a queue for each user")(type("FairQueue", (Fair,), {}))


# ---- 8.5


def shares(runs, ttft, tpot, good):
    return {
        rate: sum(good(r, ttft, tpot) for r in runs[rate]) / len(runs[rate]) if runs[rate] else 1.0 for rate in runs
    }


def is_good(r, ttft, tpot):
    arrival, times, wanted = r
    if not times or len(times) < wanted:
        return False
    gap = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    return times[0] - arrival <= ttft and gap <= tpot


def crossing(found, share, order=sorted, straight=True):
    rates = order(found)
    for i, rate in enumerate(rates):
        if found[rate] < share:
            if i == 0:
                return 0.0
            low, high = rates[i - 1], found[rates[i - 1]]
            return low + (rate - low) * (high - share) / (high - found[rate]) if straight else low
    return rates[-1] if rates else 0.0


@wrong("8.5", "leaves out the requests that did not finish")
def capacity(runs, ttft, tpot, share):
    done = {rate: [r for r in found if len(r[1]) >= r[2]] for rate, found in runs.items()}
    return crossing(shares(done, ttft, tpot, is_good), share)


@wrong("8.5", "counts a request as good though tokens are missing")
def capacity(runs, ttft, tpot, share):
    def good(r, ttft, tpot):
        return bool(r[1]) and is_good((r[0], r[1], len(r[1])), ttft, tpot)

    return crossing(shares(runs, ttft, tpot, good), share)


@wrong("8.5", "wants every gap within the limit")
def capacity(runs, ttft, tpot, share):
    def good(r, ttft, tpot):
        gaps = [b - a for a, b in zip(r[1], r[1][1:], strict=False)]
        return is_good(r, ttft, 1e9) and all(gap <= tpot for gap in gaps)

    return crossing(shares(runs, ttft, tpot, good), share)


@wrong("8.5", "divides by the tokens instead of by the gaps")
def capacity(runs, ttft, tpot, share):
    def good(r, ttft, tpot):
        return is_good(r, ttft, 1e9) and (r[1][-1] - r[1][0]) / len(r[1]) <= tpot

    return crossing(shares(runs, ttft, tpot, good), share)


@wrong("8.5", "gaps must stay below the limit")
def capacity(runs, ttft, tpot, share):
    def good(r, ttft, tpot):
        return is_good(r, ttft, 1e9) and (len(r[1]) < 2 or (r[1][-1] - r[1][0]) / (len(r[1]) - 1) < tpot)

    return crossing(shares(runs, ttft, tpot, good), share)


@wrong("8.5", "measures the first token from the start of the run")
def capacity(runs, ttft, tpot, share):
    return crossing(shares(runs, ttft, tpot, lambda r, a, b: is_good((0.0, *r[1:]), a, b)), share)


@wrong("8.5", "takes the last rate that holds, past failures")
def capacity(runs, ttft, tpot, share):
    found = shares(runs, ttft, tpot, is_good)
    return max((rate for rate in found if found[rate] >= share), default=0.0)


@wrong("8.5", "takes the rates in the order in which they stand")
def capacity(runs, ttft, tpot, share):
    return crossing(shares(runs, ttft, tpot, is_good), share, order=list)


@wrong("8.5", "no line: the last rate that was measured and holds")
def capacity(runs, ttft, tpot, share):
    return crossing(shares(runs, ttft, tpot, is_good), share, straight=False)


@wrong("8.5", "takes a first token at time 0 for none")
def capacity(runs, ttft, tpot, share):
    def good(r, ttft, tpot):
        return is_good(r, ttft, tpot) and bool(r[1][0])

    return crossing(shares(runs, ttft, tpot, good), share)


@wrong("8.5", "empties the runs")
def capacity(runs, ttft, tpot, share):
    found = crossing(shares(runs, ttft, tpot, is_good), share)
    for seen in runs.values():
        seen.clear()
    return found


@wrong("8.5", "a run without requests breaks the promise")
def capacity(runs, ttft, tpot, share):
    found = shares(runs, ttft, tpot, is_good)
    return crossing({rate: found[rate] if runs[rate] else 0.0 for rate in found}, share)


@wrong("8.5", "leaves runs without requests out")
def capacity(runs, ttft, tpot, share):
    found = shares(runs, ttft, tpot, is_good)
    return crossing({rate: found[rate] for rate in found if runs[rate]}, share)


@wrong("8.5", "a share that is just met breaks the promise")
def capacity(runs, ttft, tpot, share):
    return crossing(shares(runs, ttft, tpot, is_good), share + 1e-9)


@alternative("8.5", "shares first, then the crossing")
def capacity(runs, ttft, tpot, share):
    return crossing(shares(runs, ttft, tpot, is_good), share)


@wrong("8.0", "0 tokens for those whom the budget does not reach")
def schedule(state):
    plan, left, guarded = ({}, state.budget, False)

    def missing(request):
        return -(-(request.computed + min(request.gap, left)) // state.block_size) - request.blocks

    def give(request):
        new, count = (missing(request), min(request.gap, left))
        state.free, request.blocks = (state.free - new, request.blocks + new)
        plan[request.order] = count
        return left - count

    while left and len(plan) < len(state.running):
        request = state.running[len(plan)]
        while request in state.running and missing(request) > state.free:
            victim, guarded = (state.running.pop(), True)
            state.free += victim.blocks
            victim.blocks = victim.computed = 0
            state.waiting.insert(0, victim)
        if request in state.running:
            left = give(request)
    while left and state.waiting and (len(state.running) < state.seats) and (not guarded):
        if missing(state.waiting[0]) > state.free:
            break
        state.running.append(state.waiting.pop(0))
        left = give(state.running[-1])
    for r in state.running:
        plan.setdefault(r.order, 0)
    return plan


@wrong("8.4", "output tokens move the floor")
class FairQueue:
    def __init__(self, weights=None):
        self.weights = dict(weights or {})
        self.counters = {}
        self.queue = []
        self.floor = 0.0

    def add(self, user, request, prompt_tokens):
        waiting = {name for name, *_ in self.queue}
        if user not in waiting:
            least = min((self.counters[name] for name in waiting), default=self.floor)
            self.counters[user] = max(self.counters.get(user, 0.0), least)
        self.queue.append((user, request, prompt_tokens))

    def take(self):
        if not self.queue:
            return None
        item = min(self.queue, key=lambda item: self.counters[item[0]])
        self.queue.remove(item)
        user, request, tokens = item
        self.floor = self.counters[user]
        self._charge(user, tokens)
        return request

    def generated(self, user, tokens):
        self._charge(user, 2 * tokens)
        self.floor = min(self.floor, self.counters[user])

    def _charge(self, user, cost):
        self.counters[user] = self.counters.get(user, 0.0) + cost / self.weights.get(user, 1.0)


@wrong("8.4", "forgets counters when the queue is empty")
class FairQueue:
    def __init__(self, weights=None):
        self.weights = dict(weights or {})
        self.counters = {}
        self.queue = []
        self.floor = 0.0

    def add(self, user, request, prompt_tokens):
        waiting = {name for name, *_ in self.queue}
        if user not in waiting:
            least = min((self.counters[name] for name in waiting), default=self.floor)
            self.counters[user] = max(self.counters.get(user, 0.0), least)
        self.queue.append((user, request, prompt_tokens))

    def take(self):
        if not self.queue:
            return None
        item = min(self.queue, key=lambda item: self.counters[item[0]])
        self.queue.remove(item)
        user, request, tokens = item
        self.floor = self.counters[user]
        self._charge(user, tokens)
        if not self.queue:
            self.counters = {user: self.counters[user]}
        return request

    def generated(self, user, tokens):
        self._charge(user, 2 * tokens)

    def _charge(self, user, cost):
        self.counters[user] = self.counters.get(user, 0.0) + cost / self.weights.get(user, 1.0)


@wrong("8.4", "the empty name is nobody")
class FairQueue:
    def __init__(self, weights=None):
        self.weights = dict(weights or {})
        self.counters = {}
        self.queue = []
        self.floor = 0.0

    def add(self, user, request, prompt_tokens):
        waiting = {name for name, *_ in self.queue}
        if user not in waiting:
            least = min((self.counters[name] for name in waiting), default=self.floor)
            self.counters[user] = max(self.counters.get(user, 0.0), least)
        self.queue.append((user, request, prompt_tokens))

    def take(self):
        if not self.queue:
            return None
        item = min(self.queue, key=lambda item: self.counters[item[0]])
        self.queue.remove(item)
        user, request, tokens = item
        self.floor = self.counters[user]
        self._charge(user, tokens)
        return request or None

    def generated(self, user, tokens):
        self._charge(user, 2 * tokens)

    def _charge(self, user, cost):
        self.counters[user] = self.counters.get(user, 0.0) + cost / self.weights.get(user, 1.0)
