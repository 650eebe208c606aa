# %% [markdown]
# # Exercises 8: Continuous batching
#
# Five decisions that a scheduler takes, each at most 30 lines. They belong to
# [chapter 8](../chapters/08_continuous_batching.md) and its [lab](../notebooks/08_continuous_batching.ipynb); each asks
# for one step beyond what these two show.
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.
#
# No model is needed: requests are stand-ins, a few numbers each.

# %%
from collections.abc import Sequence

from minillm.cache.blocks import OutOfBlocks
from minillm.learn import check

# %% [markdown]
# ## Exercise 8.1: a step in which short prompts overtake
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | share a step's budget so that no prompt waits for a longer one | 2 of 5 | 20 | Agrawal et al., 2024 |
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
# A running request with a gap of 0 (its last token is on the way) holds a seat and gets nothing. Never more run than
# there are seats. A waiting prompt of one token does not decode: it takes its turn like the others (rule 3).


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
# ## Exercise 8.2: admit nobody whom you would have to preempt
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | the most requests that can start so that the blocks suffice to the end | 3 of 5 | 25 | Gong et al., 2025 |
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
# guarantee leaves most blocks empty. vLLM, SGLang and this package admit by what is needed *now* and preempt when they
# were wrong; between the two lies the bet: admit by a forecast of lengths from past requests (Gong et al., 2025).

# %% [markdown]
# ## Exercise 8.3: victims who share
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | choose whom to preempt when tables share blocks | 3 of 5 | 25 | Kwon et al., 2023, section 4.5 |
#
# The package preempts the request that goes last, again and again, until there are blocks. With shared prefixes this
# can be a bad bargain: a block comes free only when *no* table names it any more, so a request may give up all its work
# and free nothing.
#
# `tables[i]` are the blocks of the i-th running request, in order of precedence (0 goes first). `need` more blocks must
# come free. Choose the victims, and with as little harm to those who go first as possible:
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
# ## Exercise 8.4: a queue that is fair to users
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | take requests so that each user gets a fair share of *tokens* | 3 of 5 | 30 | Sheng et al., 2024 |
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
# ## Exercise 8.5: how much load can it bear?
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | read the highest rate that keeps a promise off measured runs | 2 of 5 | 20 | Zhong et al., 2024, "DistServe" |
#
# The promise: a share of at least `share` of all requests is *good*. A request is good if all of its tokens came, the
# first one at most `ttft` seconds after its arrival, and the others at most `tpot` seconds apart on average.
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
