# %% [markdown]
# # Exercises 8: Continuous batching
#
# Nine exercises on [chapter 8](../chapters/08_continuous_batching.md) and its
# [lab](../notebooks/08_continuous_batching.ipynb): three **warm-ups** of five minutes (8.w1 to 8.w3), the **core**
# (8.0), and five steps **beyond** (8.1 to 8.5, optional), which neither chapter nor lab shows in this form.
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.
#
# No model is needed: requests are stand-ins, a few numbers each. Arguments stay as they are, unless an exercise says
# otherwise.

# %%
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.cache.blocks import OutOfBlocks
from minillm.learn import check

# %% [markdown]
# ## Exercise 8.w1: a prompt in chunks
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: what a budget does to a prompt | 1 of 5 | 5 | Agrawal et al., 2024 |
#
# `decoding` requests decode. A prompt of `prompt` tokens arrives, alone. A step has `budget` tokens; those who decode
# come first, with one token each. How many of the prompt's tokens are in each step, from its first step to the one that
# gives its first token? Return a list.
#
# By hand first: 3 decode, a budget of 8, a prompt of 12.
#
# If those who decode leave nothing for it, the prompt waits for ever: raise ValueError.


# %%
def chunks(prompt: int, decoding: int, budget: int) -> list[int]:
    """The prompt's tokens in each of its steps"""
    ### BEGIN SOLUTION
    most = budget - decoding
    if most < 1:
        raise ValueError(f"budget: expected more than the {decoding} that decode, got {budget}")
    return [min(most, prompt - start) for start in range(0, prompt, most)]
    ### END SOLUTION


# %%
check("8.w1", chunks)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# By hand: 5 tokens are left of each step, so 5, 5 and 2.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `range(0, prompt, budget - decoding)` has the place in the prompt at which each chunk begins.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A prompt of n tokens takes ceil(n / (T - B)) steps with a budget of T and B who decode. The more people
# decode, the longer a newcomer waits for the first token; with T = B nobody new would ever begin. Engines refuse such
# settings: vLLM wants `max_num_batched_tokens` to be no less than `max_num_seqs`.

# %% [markdown]
# ## Exercise 8.w2: who is preempted?
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: whom precedence protects | 1 of 5 | 5 | Kwon et al., 2023, 4.5 |
#
# `running[i]` is `(priority, arrival, blocks)`: the blocks that request i holds, in any order of requests. Who goes
# first is decided by the smaller priority, among equal ones by the smaller arrival. No two are equal in both.
#
# Request `who` needs `need` more blocks, and `free` are free. As long as they do not suffice, the running request that
# goes **last** gives all of its blocks back. If that is `who` itself, it goes too, and it is over.
#
# Return the indices of those who are preempted, in the order in which they go.
#
# By hand: `[(0, 1, 4), (1, 0, 2), (0, 2, 3)]`, request 0 needs 3, one block is free. Which request goes last?


# %%
def preempted(running: Sequence[tuple[int, int, int]], who: int, need: int, free: int) -> list[int]:
    """Indices of the victims, in the order in which they go"""
    ### BEGIN SOLUTION
    order, victims = sorted(range(len(running)), key=lambda i: running[i][:2]), []
    while free < need and who not in victims:
        victims.append(order.pop())
        free += running[victims[-1]][2]
    return victims
    ### END SOLUTION


# %%
check("8.w2", preempted)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# By hand: request 1 came first of all, but its priority is 1: it goes last. Its two blocks and the free one are the
# three that are needed.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `sorted(range(len(running)), key=lambda i: running[i][:2])` has the indices in order of precedence. Take from its end
# while `free < need`, and stop after `who`.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The request that goes first is never a victim for another's sake: something always gets done. Precedence acts
# among those who *run*. A request that waits preempts nobody, however high its priority: it only stands in front of the
# queue (`Scheduler._admit`); once it runs and grows, those behind it give way.
#
# `who` giving up its own blocks sounds odd, and is right: all others go before it.

# %% [markdown]
# ## Exercise 8.w3: four engines, four causes
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: read metrics as `/metrics` shows them, and name the cause | 1 of 5 | 5 | – |
#
# Users of four engines complain. Each has 64 seats (`max_num_seqs`) and serves the same model; the numbers are made up,
# their names are the package's.
#
# | a minute of | A | B | C | D |
# |---|---|---|---|---|
# | running / waiting | 41 / 0 | 64 / 210 | 38 / 55 | 44 / 2 |
# | cache_usage | 62 % | 45 % | 99 % | 64 % |
# | preemptions | 0 | 0 | 412 | 0 |
# | prefix_cache_hit_rate | 61 % | 60 % | 58 % | 2 % |
# | queue_time, p50, s | 0.01 | 6.1 | 2.2 | 0.1 |
# | prefill_time, p50, s | 0.3 | 0.1 | 0.2 | 1.1 |
# | inter_token_latency, p50 / p99, ms | 21 / 480 | 21 / 33 | 24 / 390 | 25 / 45 |
# | tokens_per_step, p50 / p99 | 41 / 8,192 | 64 / 700 | 40 / 900 | 300 / 512 |
#
# For each engine name the one thing to change first:
#
# - `"blocks"`: too little memory for the cache; more of it, or fewer at once.
# - `"budget"`: too many tokens a step; a smaller `max_num_batched_tokens`.
# - `"prefix"`: prompts do not begin alike any more; mend what stands at their beginning.
# - `"seats"`: too few may run at once; a larger `max_num_seqs`.


# %%
def causes() -> dict[str, str]:
    """{"A": ..., "B": ..., "C": ..., "D": ...}"""
    ### BEGIN SOLUTION
    return {"A": "budget", "B": "seats", "C": "blocks", "D": "prefix"}
    ### END SOLUTION


# %%
check("8.w3", causes)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Begin with where the first token's time goes: in the queue, or in the prompt? Then: who waits though memory is free,
# and who though seats are free?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Preemptions have one cause only. A p99 of inter-token latency far above its median, without preemptions, is a step
# with a large chunk in it. A long prefill at a small budget: how many tokens were there to compute, and were there as
# many last week?
# </details>

# %% [markdown] tags=["solution"]
# **Why.** B: all 64 seats are taken, less than half of the memory is: the queue waits for seats alone. C: the cache is
# full and requests are thrown out; those who wait do so for blocks, and the tail of the latency is recomputing. A:
# nothing waits and nothing is thrown out, but one step in a hundred has 8,192 tokens in it, and everybody who decodes
# waits for it. D: steps are full of prompts at a modest budget, since 98 % of all prompt tokens are computed: a time
# stamp or a user's name was put in front of the system prompt.
#
# Two settings make C worse: a larger `max_num_seqs` (more who need blocks) and a larger budget.

# %% [markdown]
# ## Exercise 8.0: the scheduler's step
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: who gets how many tokens of a step, and who gives up blocks for it | 3 of 5 | 30 | Yu et al., 2022 |
#
# Write the step of a scheduler without phases. `state` has the requests that run and those that wait, both in order of
# `order`, and how many blocks are free. A request's *gap* is what is not computed of its tokens yet. `schedule` changes
# `state` and its requests, and returns `{order: tokens}` of the step; `computed` and `generated` of who gets tokens are
# counted up by the caller, once the step is done.
#
# 1. **Running requests first**, in order: each gets its gap, or what is left of the budget. It needs blocks for all
#    that is computed then, `computed` + tokens, rounded up to blocks. What it lacks comes from the free ones.
# 2. **If these do not suffice**, the running request that goes last is preempted: it gives all of its blocks back,
#    nothing of it is computed any more (what it generated stays), and it waits again, at its place in the order. So on
#    until they suffice. If it was the request itself, it gets nothing.
# 3. **Then those who wait**, in order, while there are budget and seats. Each moves to the running ones and gets tokens
#    and blocks by rule 1. But nobody is preempted for one who waits: if the free blocks do not suffice, it stays, and
#    so do all behind it. In a step that preempted somebody, nobody is let in.
#
# Nobody gets 0 tokens: who gets none is not in the plan. The check runs the same requests through the package's
# scheduler, plan by plan. Each request alone would fit.


# %%
@dataclass(eq=False)
class Request:
    """A request: so many tokens of prompt, so many to generate; what is computed and generated of it; its blocks."""

    order: int
    prompt: int
    outputs: int
    computed: int = 0
    generated: int = 0
    blocks: int = 0

    @property
    def gap(self) -> int:
        """Tokens that are known and not computed yet."""
        return self.prompt + self.generated - self.computed


@dataclass
class State:
    """What the scheduler knows; a step has `budget` tokens, `seats` requests may run at once."""

    running: list[Request]
    waiting: list[Request]
    free: int
    budget: int
    seats: int
    block_size: int


def schedule(state: State) -> dict[int, int]:
    """Changes the state -> {order: tokens} of the next step"""
    ### BEGIN SOLUTION
    plan, left, guarded = {}, state.budget, False

    def missing(request: Request) -> int:
        return -(-(request.computed + min(request.gap, left)) // state.block_size) - request.blocks

    def give(request: Request) -> int:
        new, count = missing(request), min(request.gap, left)
        state.free, request.blocks = state.free - new, request.blocks + new
        plan[request.order] = count
        return left - count

    while left and len(plan) < len(state.running):
        request = state.running[len(plan)]
        while request in state.running and missing(request) > state.free:
            victim, guarded = state.running.pop(), True
            state.free += victim.blocks
            victim.blocks = victim.computed = 0
            state.waiting.insert(0, victim)
        if request in state.running:
            left = give(request)
    while left and state.waiting and len(state.running) < state.seats and not guarded:
        if missing(state.waiting[0]) > state.free:
            break
        state.running.append(state.waiting.pop(0))
        left = give(state.running[-1])
    return plan
    ### END SOLUTION


# %%
check("8.0", schedule)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Without memory it is two loops: one over those who run, one over those who wait, with one budget. Add the blocks to
# the second loop (stop), then to the first one (preempt from the end, and look again).
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `-(-tokens // block_size)` rounds up. Whoever is preempted stands at the end of `running`, and all who run go before
# all who wait: its place is the front of `waiting`. Two things end the inner loop: the blocks suffice, or the request
# is gone. Remember that somebody was preempted.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Nothing here says prefill or decode. A preempted request is one with a large gap, and the budget cuts it into
# chunks like any other. The first of the running requests can always go on, since all others can be thrown out for it,
# and it fits alone: so every queue ends.
#
# Without the last sentence of rule 3 a victim would come straight back: its first chunk fits into the blocks that it
# has just given up. The package's scheduler has besides: a prefix cache (the gap of a newcomer is less), copies of
# shared blocks, priorities (`bisect.insort` instead of the front), tokens that are still on the device, adapters, and
# requests that fail.

# %% [markdown]
# ## Exercise 8.1: a step in which short prompts overtake (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: share a step's budget so that no prompt waits for a longer one | 2 of 5 | 20 | Agrawal et al., 2024 |
#
# The package gives the budget to prompts in order of arrival: a prompt of 8,000 tokens takes all of it for many steps,
# and one of 20 tokens behind it waits. Here prompts share.
#
# A request is its *gap*: how many of its tokens are not computed yet. Given the gaps of the running requests, those of
# the waiting ones, the budget in tokens, and `seats`, the number of requests that may run at once, say how many tokens
# each gets in the next step:
#
# 1. Running requests with a gap of 1 (they decode) come first, in order, one token each, while the budget lasts.
# 2. The first waiting requests take the free seats. The others get 0.
# 3. Running requests with a longer gap, then the seated ones, share the rest of the budget *in turns*: as if one token
#    at a time went round in this order, passing over whoever has all that its gap asks for.
#
# By hand: running 1, 900, 1; waiting 3, 5, 2; budget 12, five seats. Two tokens decode. The ten others go round among
# 900, 3 and 5: 4, 3 and 3. The last one finds no seat. The answer is `[1, 4, 1], [3, 3, 0]`.
#
# A running request with a gap of 0 (its last token is on the way) holds a seat and gets nothing. If more run than there
# are seats (somebody lowered the number), none is free. A waiting prompt of one token does not decode: it takes its
# turn like the others (rule 3). A budget of 0 gives nobody anything.


# %%
def step(running: Sequence[int], waiting: Sequence[int], budget: int, seats: int) -> tuple[list[int], list[int]]:
    """Tokens of each running and of each waiting request in the next step; the arguments are gaps."""
    ### BEGIN SOLUTION
    gaps = [*running, *waiting[: max(0, seats - len(running))]]
    given = [0] * (len(running) + len(waiting))
    for i, gap in enumerate(running):
        if gap == 1 and budget:
            given[i], budget = 1, budget - 1
    hungry = [i for i, gap in enumerate(gaps) if gap > 1 or (gap == 1 and i >= len(running))]
    while hungry and budget:
        level, extra = divmod(budget, len(hungry))
        full = [i for i in hungry if gaps[i] <= level]
        if not full:  # nobody can be satisfied: all get the same, the first ones one more
            for place, i in enumerate(hungry):
                given[i] = level + (place < extra)
            break
        for i in full:
            given[i], budget = gaps[i], budget - gaps[i]
        hungry = [i for i in hungry if gaps[i] > level]
    return given[: len(running)], given[len(running) :]
    ### END SOLUTION


# %%
check("8.1", step)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The simplest right answer does what rule 3 says: a loop that hands out one token at a time. Write this first.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Put the indices of all who share into one list, running ones first. While there is budget and somebody on the list
# wants more, go along the list and give one token to each. To be faster: with k on the list and b tokens, everybody
# whose gap is at most b // k gets all of it; take these off and look again.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** This is max-min fairness: nobody gets more at the expense of somebody who has less. A prompt of 20 tokens is
# done in the step in which it arrives, whatever else is there, and the long prompt loses 20 tokens once.
#
# It is not free. Prompts that progress together finish together: two prompts of 4,000 tokens with a budget of 1,000
# both have their first token after 8 steps, where first come, first served gives 4 and 8. The mean is worse for equal
# lengths and better for unequal ones. It also holds blocks of all of them for longer. vLLM offers a cap instead, on
# what one prompt may take of a step (`long_prefill_token_threshold`): simpler, and not fair among long ones.
#
# Decoding requests are not asked to share: one token is their whole gap, and a user watches it come.

# %% [markdown]
# ## Exercise 8.2: admit nobody whom you would have to preempt (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: the most requests that can start so that the blocks suffice to the end | 3 of 5 | 25 | Gong et al., 2025 |
#
# Preemption wastes work. If every request says how many tokens it will generate at most, one can admit only as many as
# are sure to fit. How sure is a question of arithmetic: requests are not at their largest at the same time.
#
# A running request is `(cached, left)`: `cached` tokens are in its blocks, `left` steps are to come. Each step adds one
# token to its blocks and generates one; after the last its blocks are free for the step that follows. So in the j-th
# step from now, j = 1 ... left, it needs blocks for `cached + j` tokens. A waiting request is `(prompt, outputs)`: its
# first step stores its whole prompt and generates the first output, each further step stores one token more.
#
# Return how many waiting requests can start in the next step: in order, without passing over anybody, and so that in no
# step to come all requests together need more than `num_blocks` blocks of `block_size` tokens. Suppose that all
# requests run to their end, that prompts are not cut, and that nobody else ever comes. Running requests alone fit.
#
# By hand, blocks of 4, running (7, 1), waiting (4, 5): the first needs 2 blocks in step 1 and is gone; the second needs
# 1 block in step 1 and 2 in steps 2 to 5. Three blocks suffice, though both at their largest would be four.


# %%
def admit(
    running: Sequence[tuple[int, int]], waiting: Sequence[tuple[int, int]], block_size: int, num_blocks: int
) -> int:
    """How many of the waiting requests (prompt, outputs) can start beside the running ones (cached, left)."""
    ### BEGIN SOLUTION
    inside = list(running)
    for count, (prompt, outputs) in enumerate(waiting):
        inside.append((prompt - 1, outputs))  # as if all but the prompt's last token were there
        for step in {left for _, left in inside}:  # needs only grow until somebody ends: look at these steps
            need = sum(-(-(cached + step) // block_size) for cached, left in inside if left >= step)
            if need > num_blocks:
                return count
    return len(waiting)
    ### END SOLUTION


# %%
check("8.2", admit)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Write a loop over the steps to come that adds up the blocks of all requests that are still there in that step.
# A request's blocks are rounded up for each request by itself.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# A waiting request (prompt, outputs) behaves like a running one with `prompt - 1` tokens cached and `outputs` steps
# left. Add the waiting requests one by one to a list, compute the peak over all steps each time, and stop at the first
# that lifts it over the limit.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The sum only grows while nobody ends, so its peaks lie in the steps in which somebody has the last token:
# at most as many places to look as there are requests.
#
# Adding up everybody's largest size is the simple safe rule (TensorRT-LLM's default, `GUARANTEED_NO_EVICT`). The
# difference is large when lengths differ: short ones give back what long ones take later.
#
# The price of certainty is `outputs`: users set it to the model's limit, and most answers end long before. Then a
# guarantee leaves most blocks empty. This package admits by what the next step needs and preempts when it was wrong.
# vLLM admits by the whole prompt (`scheduler_reserve_full_isl`, the default; PR #37307 of March 2026) and can keep a
# share of the blocks free while it admits (`watermark`, 0 by default; PR #44594 of June 2026), outputs uncounted;
# SGLang by a share of `outputs` that adapts. Between that and certainty lies the bet: a forecast of lengths from past
# requests (Gong et al., 2025).

# %% [markdown]
# ## Exercise 8.3: victims who share (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: choose whom to preempt when tables share blocks | 3 of 5 | 25 | Kwon et al., 2023, section 4.5 |
#
# The package preempts the request that goes last, again and again, until there are blocks. With shared prefixes this
# can be a bad bargain: a block comes free only when *no* table names it any more, so a request may give up all its work
# and free nothing.
#
# `tables[i]` are the blocks of the i-th running request, in order of precedence (0 goes first). `need` more blocks must
# come free. Choose the victims, and with as little harm to those who go first as possible (there is at least one
# request):
#
# - Request 0 is never a victim.
# - Begin with all the others as victims. Go from request 1 to the last, and spare each one without whom the victims
#   that are left still free enough.
#
# Return the victims' indices, ascending. With `need` 0 or less, nobody is one. Raise `OutOfBlocks` when not even all of
# them suffice. Leave the tables alone.
#
# By hand: tables `[1, 2], [1, 3, 4], [1, 5], [1]`, need 1. All three would free 3, 4 and 5. Without request 1, block 5
# is left: spare it. Without request 2, nothing is: it must go. Without request 3, block 5 still comes free: spare it.
# The answer is `[2]`. The package would have taken 3 as well, for nothing.


# %%
def victims(tables: Sequence[Sequence[int]], need: int) -> list[int]:
    """Whom to preempt so that at least `need` blocks come free. Raises OutOfBlocks."""
    ### BEGIN SOLUTION
    chosen = set(range(1, len(tables)))

    def freed(chosen: set[int]) -> int:
        kept = {block for i, table in enumerate(tables) if i not in chosen for block in table}
        return len({block for i in chosen for block in tables[i]} - kept)

    if freed(chosen) < need:
        raise OutOfBlocks(f"{need} blocks wanted, {freed(chosen)} could come free")
    for i in range(1, len(tables)):
        if freed(chosen - {i}) >= need:
            chosen.remove(i)
    return sorted(chosen)
    ### END SOLUTION


# %%
check("8.3", victims)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Write a helper first: how many blocks come free if a given set of requests goes. A block that two victims share comes
# free, and counts once.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The helper is a difference of two sets: blocks that some victim names, less blocks that somebody who stays names.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** With n completions of one prompt the last request owns little more than its own output; preempting it frees
# a block or two. That is the moment at which naive preemption takes one request after another and gets nothing.
# Kwon et al. preempt such a group together ("gang-scheduled"): all or none, for their shared blocks come free only so.
#
# This version is quadratic in the number of requests. An engine keeps reference counts and takes off one for each
# victim: linear in the blocks touched. The package does neither: its pool counts references, so `_make_room` asks the
# pool after each victim and goes on until the blocks suffice; right, but not sparing.

# %% [markdown]
# ## Exercise 8.4: a queue that is fair to users (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: take requests so that each user gets a fair share of *tokens* | 3 of 5 | 30 | Sheng et al., 2024 |
#
# First come, first served gives the machine to whoever sends most. A priority starves the others. Virtual counters
# do neither. Each user has a counter of what they were given: 1 for each token of a prompt, 2 for each generated token,
# divided by the user's weight (1 unless given). Whoever waits with the smallest counter is next.
#
# - `add(user, request, prompt_tokens)` queues a request.
# - `take()` returns the next request, or None when none waits. Of the users with waiting requests, the one with the
#   smallest counter (of equal ones, the one whose oldest waiting request was added first) gets their oldest. The
#   prompt's tokens are charged now.
# - `generated(user, tokens)` charges output tokens when they come: nobody knows their number before.
#
# Two requests may have the same name; a user may be charged before the first request.
#
# One rule keeps people from saving up: a user for whom nothing waits at the moment of `add` is lifted *before* the
# request joins: their counter becomes at least the smallest counter of the users that have requests waiting; if nobody
# has, at least the `floor`: the counter which the user of the last `take` had before it was charged (0 at the start).
# Counters are never lowered.


# %%
class FairQueue:
    """Requests of several users, taken by virtual counters of tokens."""

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self.weights = dict(weights or {})
        self.counters: dict[str, float] = {}
        ### BEGIN SOLUTION
        self.queue: list[tuple[str, str, int]] = []  # (user, request, prompt tokens), oldest first
        self.floor = 0.0
        ### END SOLUTION

    def add(self, user: str, request: str, prompt_tokens: int) -> None:
        """Queue a request."""
        ### BEGIN SOLUTION
        waiting = {name for name, *_ in self.queue}
        if user not in waiting:
            least = min((self.counters[name] for name in waiting), default=self.floor)
            self.counters[user] = max(self.counters.get(user, 0.0), least)
        self.queue.append((user, request, prompt_tokens))
        ### END SOLUTION

    def take(self) -> str | None:
        """The next request; None when none waits."""
        ### BEGIN SOLUTION
        if not self.queue:
            return None
        item = min(self.queue, key=lambda item: self.counters[item[0]])  # the first of equal ones
        self.queue.remove(item)
        user, request, tokens = item
        self.floor = self.counters[user]
        self._charge(user, tokens)
        return request
        ### END SOLUTION

    def generated(self, user: str, tokens: int) -> None:
        """The user's requests got so many output tokens."""
        ### BEGIN SOLUTION
        self._charge(user, 2 * tokens)

    def _charge(self, user: str, cost: float) -> None:
        self.counters[user] = self.counters.get(user, 0.0) + cost / self.weights.get(user, 1.0)
        ### END SOLUTION


# %%
check("8.4", FairQueue)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# One list of waiting requests, oldest first, is enough. Python's `min` returns the first of equal ones.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# In `add`, collect the users that stand in the list. If the new one is not among them, their counter becomes the
# largest of itself and of the smallest counter in that set (the floor when the set is empty). Only then append.
# In `take`, note the floor before you charge.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Of two users who always have requests waiting, neither gets ahead by more than a constant, whatever the
# lengths: the one ahead is not taken. (Sheng et al. bound it by the longest prompt and the tokens of a full batch.)
# Counting *requests* would let the one with long answers win; charging outputs in advance needs their lengths.
#
# Without the lift, a user who slept for an hour would come back with an old, small counter and have the machine alone
# for as long. With it, one who was idle starts level with the others: a right to a share, not to savings.
#
# The price of a generated token is higher, since a decoding token costs a row for a whole step. A scheduler uses the
# queue by asking `take` whenever there is a seat; who runs already is not preempted for fairness.

# %% [markdown]
# ## Exercise 8.5: how much load can it bear? (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: read the highest rate that keeps a promise off measured runs | 2 of 5 | 20 | Zhong et al., 2024 |
#
# The promise: a share of at least `share` of all requests is *good*. A request is good if all of its tokens came, the
# first one at most `ttft` seconds after its arrival (time to first token), and the others at most `tpot` seconds apart
# on average (time per output token: the mean of the request's inter-token latencies).
#
# `runs` maps a rate (requests a second) to what was seen at that rate: a list of `(arrival, times, wanted)`, one for
# every request that arrived: when, at which times its tokens came (none, some or all by the end of the run), and how
# many it wanted. Rates come in any order.
#
# Return the rate that can be promised. From the lowest rate up, find the first that breaks the promise: what lies
# beyond it does not count, even if a later run was lucky. Between it and the rate before, take the share of good
# requests for a straight line, and return where it meets `share`. If the lowest rate breaks the promise already, return
# 0; if none does, the highest; without runs, 0. A run without requests keeps any promise.


# %%
def capacity(
    runs: dict[float, Sequence[tuple[float, Sequence[float], int]]], ttft: float, tpot: float, share: float
) -> float:
    """The highest rate at which at least `share` of the requests are good."""

    ### BEGIN SOLUTION
    def good(arrival: float, times: Sequence[float], wanted: int) -> bool:
        if len(times) < wanted:
            return False
        return times[0] - arrival <= ttft and times[-1] - times[0] <= tpot * (wanted - 1)

    before = None
    for rate in sorted(runs):
        reached = sum(good(*request) for request in runs[rate]) / len(runs[rate]) if runs[rate] else 1.0
        if reached < share:
            if before is None:
                return 0.0
            low, high = before
            return low + (rate - low) * (high - share) / (high - reached)
        before = rate, reached
    return before[0] if before else 0.0
    ### END SOLUTION


# %%
check("8.5", capacity)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two parts: is a request good, and where does a line through two points meet a height. A request with one token has no
# gap after it. One that never got all of its tokens is not good, however quick the ones were that came.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Sort the rates. Keep the last rate that held, with its share. At the first that does not hold, the line from
# (low, high share) to (rate, low share) meets `share` after (high share - share) / (high share - low share) of the way.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Three habits make an overloaded system look well. Counting only requests that *finished* forgets those that
# were still waiting when the run ended: the longer the queue, the more are forgotten. Measuring from the moment a
# request is *admitted* leaves the queue out, which is most of what load does. And percentiles of all gaps in one pot
# hide a request whose every gap is slow behind thousands of quick ones of others.
#
# Throughput says none of this: beyond saturation it stays at its maximum while the queue grows without end. That is why
# the promise, goodput, is what capacity is planned by.
#
# The straight line is a habit too. Near saturation the curve is steep, so measure more rates there.
