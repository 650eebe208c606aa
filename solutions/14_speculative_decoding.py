# %% [markdown]
# # Exercises 14: speculative decoding
#
# Eight exercises on [chapter 14](../chapters/14_speculative_decoding.md) and its
# [lab](../notebooks/14_speculative_decoding.ipynb): two **warm-ups** of five to ten minutes (14.1 and 14.2), the
# **core** (14.3 and 14.4), and four steps **beyond** (14.5 to 14.8, optional), which neither chapter nor lab shows in
# this form.
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.
#
# Conventions, in all of them: a step checks **k guesses** of a sequence, computes k + 1 tokens for that, and gives the
# guesses up to the first wrong one, plus one token of the model itself. **p** is the model's distribution at a place,
# **q** the one that the guess was drawn from. Tensors need not be contiguous, and inputs stay as they are.

# %%
from collections.abc import Callable, Sequence

import torch

from minillm.learn import check

# %% [markdown]
# ## Exercise 14.1: tokens a step
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: what acceptance is worth | 1 of 5 | 10 | Leviathan et al., 2023, 3.1 |
#
# A step checks k guesses. Guess j is right with probability `alphas[j]`, given that all guesses before it are (j = 0 to
# k - 1; the chance may differ from place to place). Return
#
# - `chances`, a list of k + 1 numbers: the probability that the step gives exactly 1, 2, ... k + 1 tokens,
# - `tau`, the tokens that it gives on average.
#
# k may be 0. An alpha outside of 0 to 1 is a ValueError.


# %%
def step_tokens(alphas: Sequence[float]) -> tuple[list[float], float]:
    """(chances of 1 ... k + 1 tokens, tokens on average)"""
    ### BEGIN SOLUTION
    chances, so_far = [], 1.0
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alphas: expected probabilities, 0 to 1, got {alpha}")
        chances.append(so_far * (1 - alpha))
        so_far *= alpha
    chances.append(so_far)
    return chances, sum((j + 1) * chance for j, chance in enumerate(chances))
    ### END SOLUTION


# %%
check("14.1", step_tokens)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The step gives exactly j + 1 tokens if the first j guesses are right and the next one is not. After the last guess
# there is no next one.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Carry the product of the alphas so far. Each place contributes that product times 1 - alpha; what is left at the end
# is the chance of k + 1 tokens. The average is the sum of j + 1 times its chance.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The average is also 1 + α₁ + α₁α₂ + ...: a sum of the chances that the first j guesses are *all* right. With
# one alpha for all places that is the geometric series (1 - α^(k+1)) / (1 - α), which divides by 0 at α = 1; the sum
# does not. With α = 0.8, k = 4 gives 3.36 tokens and k = ∞ only 5: what a step can give is bounded by 1 / (1 - α),
# however many guesses it checks.

# %% [markdown]
# ## Exercise 14.2: when does it pay?
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: the best number of guesses, from costs | 1 of 5 | 10 | Leviathan et al., 2023, 3.3 |
#
# Times are in units of one plain step. Each guess is right with probability `alpha`, given that those before it are. To
# make a guess takes `c`, one guess after the other. A step that checks k guesses takes `v[k]`; `v[0]` is 1, a plain
# step.
#
# The speed-up of k guesses is what the step gives on average over what it takes, guesses included. Return the k, 0 to
# `len(v) - 1`, with the largest speed-up, and that speed-up. **Of equal ones the smallest k.** Times may be anything
# that was measured: the speed-up can fall and rise again.


# %%
def best_length(alpha: float, c: float, v: Sequence[float]) -> tuple[int, float]:
    """(k, speed-up)"""
    ### BEGIN SOLUTION
    best, given = (0, 0.0), 0.0
    for k, seconds in enumerate(v):
        given += alpha**k
        if (speedup := given / (c * k + seconds)) > best[1]:
            best = k, speedup
    return best
    ### END SOLUTION


# %%
check("14.2", best_length)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Tokens on average: 1 + α + α² + ... + α^k. Time: k guesses, and one step that checks them.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Try every k, and replace the best one only by one that is larger.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** With v = 1 for all k (a GPU that waits for weights) and c = 0 (prompt lookup) more guesses are always better.
# With c = 0.1 and α = 0.8 the best k is 6, at 2.47 times. If checking costs as much as decoding (v[k] = k + 1, a large
# batch or a slow CPU), nothing below α = 1 pays, and k = 0 is the answer: a system that always guesses is slower then.
# Speed-up that falls and rises again comes from tiles: 16 rows take a GPU as long as 9.

# %% [markdown]
# ## Exercise 14.3: the longest agreeing prefix
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: greedy verification of a batch, without a loop | 2 of 5 | 20 | Stern et al., 2018 |
#
# One forward computed `logits` [S, 1 + K, V] for S sequences: row 0 behind the last token of each, row j behind its
# first j guesses. `guesses` [S, K] holds their token ids (int32 or int64), of which only the first `counts[s]` (0 to K)
# are meant: what stands behind them is padding, and **never right**.
#
# Greedy decoding takes the token with the largest logit; of equal ones that with the smallest id. Return
#
# - `given` [S] int64: how many tokens each sequence gets, 1 to counts[s] + 1,
# - `tokens` [S, 1 + K] int64: these tokens, as plain greedy decoding gives them, and **-1 behind them**.
#
# - Logits may be fp32, fp16 or bf16. S and K may be 0.
# - **No loop** over sequences or places, and nothing is read back to the host: the number of torch operations is the
#   same for all sizes.


# %%
def verify(logits: torch.Tensor, guesses: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [S, 1 + K, V], guesses [S, K], counts [S] -> (given [S], tokens [S, 1 + K])"""
    ### BEGIN SOLUTION
    best = logits.argmax(-1)  # [S, 1 + K]
    place = torch.arange(best.shape[1], device=best.device)
    right = (best[:, :-1] == guesses) & (place[:-1] < counts[:, None])
    given = 1 + right.long().cumprod(1).sum(1)
    return given, torch.where(place < given[:, None], best, -1)
    ### END SOLUTION


# %%
check("14.3", verify)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The first draw is right whatever was guessed. Which tokens are given if guess 0 is wrong? `argmax` of the same row
# that refuses a guess is the token that comes in its place.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `cumprod` of ones and zeros stays 1 up to the first zero, so its sum counts the leading ones. Compare `arange` with
# `counts[:, None]` for the padding, and with `given[:, None]` for what is behind.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A row of logits means something only if all guesses before it are right. So the *prefix* that agrees counts,
# not how many agree: a guess that fits behind a wrong one was computed behind another text. The last token given is
# never a guess: it is the correction of the first wrong one, or, if all were right, the **bonus token** of the last
# row.
#
# Without `counts` a padding of 0 is right whenever the model says token 0. That is a token nobody guessed, checked
# against a row whose input was padding; the tokens look plausible and are wrong.

# %% [markdown]
# ## Exercise 14.4: the rule of acceptance
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: tokens distributed as the model's, from guesses | 3 of 5 | 25 | Leviathan et al., 2023; Chen et al., 2023 |
#
# `p` [k + 1, V] are the model's distributions, `q` [k, V] those that the `guesses` (k token ids) were drawn from.
# `uniforms` holds k + 1 numbers from 0 to below 1: number j belongs to guess j, the last one draws. Return the tokens
# of the step, a list of 1 to k + 1 ints:
#
# - Guess j, of token x, is accepted with probability min(1, p_j(x) / q_j(x)): if **uniforms[j] · q_j(x) < p_j(x)**.
#   Then it is given, and the next one is looked at.
# - At the first guess that is not accepted a token is drawn from max(0, p_j - q_j), normalized, and the step ends.
#   If rounding has left nothing of that, 0 at every token, it is drawn from p_j.
# - If all are accepted, one more token is drawn from p_k.
# - To draw from weights w with the number u: the smallest token x with w(0) + ... + w(x) > u · (the sum of all w).
#   u is `uniforms[k]`, whoever draws. A token of weight 0 is never drawn.
#
# p and q may be fp32 or fp64, and need not add up to 1 exactly; compute in fp64. k may be 0.


# %%
def speculate(p: torch.Tensor, q: torch.Tensor, guesses: Sequence[int], uniforms: Sequence[float]) -> list[int]:
    """p [k + 1, V], q [k, V], k guesses, k + 1 uniforms -> 1 to k + 1 tokens"""
    ### BEGIN SOLUTION
    p, q, tokens = p.double(), q.double(), []
    weights = p[len(guesses)]
    for j, x in enumerate(guesses):
        if uniforms[j] * q[j, x] < p[j, x]:
            tokens.append(int(x))
            continue
        left = (p[j] - q[j]).clamp(min=0)
        weights = left if left.any() else p[j]
        break
    sums = weights.cumsum(0)
    return [*tokens, int((sums > uniforms[len(guesses)] * sums[-1]).nonzero()[0])]
    ### END SOLUTION


# %%
check("14.4", speculate)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Only one draw is made in a step, at its end. What differs is the weights: what is left of p_j at the first refusal,
# p_k if there is none.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `(p[j] - q[j]).clamp(min=0)` is what is left. `cumsum` gives the sums; the first place where they exceed u times the
# last of them is the token, without dividing by anything.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Token x comes in two ways: guessed and accepted, q(x) · min(1, p(x)/q(x)) = min(p(x), q(x)); or drawn from
# the rest, with the probability that a guess is refused, 1 - Σ min(p, q), which is just what the rest must be divided
# by to add up to 1: max(0, p(x) - q(x)). Together min(p, q) + max(0, p - q) = p(x).
#
# To draw from p after a refusal, which looks right, gives too much to tokens that q liked: they have had their chance.
# To compare `u < p / q` is the same rule but for q(x) = 0, which a guess that was drawn from q never has, but rounding
# can. `<` and not `<=`: the uniform 0 exists, and would accept a token of probability 0.

# %% [markdown]
# ## Exercise 14.5: prompt lookup with an index (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: n-grams of a growing text, without a scan | 3 of 5 | 25 | Saxena, 2023; Oliaro et al., 2024 |
#
# `Lookup(most, least)` follows one text:
#
# - `extend(tokens)` appends tokens; it is called many times, also with none.
# - `guess(k)`: what may follow, as a new list of ints. Take the largest n, from `most` down to `least` (1 or more),
#   such that the text's last n tokens **occur before in the text and are followed by a token there**; overlapping the
#   end is fine. Of several such places the **latest** counts. The guesses are the tokens that followed there, up to k,
#   fewer where the text ends first. If no n fits: an empty list.
# - `guess` changes nothing: it may be called twice, or not at all.
#
# **No scan**: comparisons and hashes of tokens are counted. `extend` may take a few (about 4 · most) for each token
# that it appends, `guess` as many in all, however long the text is.


# %%
class Lookup:
    """Guesses by n-grams of `least` to `most` tokens."""

    def __init__(self, most: int, least: int) -> None:
        ### BEGIN SOLUTION
        self.most, self.least = most, least
        self.text: list[int] = []
        self.behind: dict[tuple[int, ...], int] = {}  # n-gram -> the place behind its latest occurrence
        ### END SOLUTION

    def extend(self, tokens: Sequence[int]) -> None:
        """The text grows by these tokens."""
        ### BEGIN SOLUTION
        for token in tokens:
            place = len(self.text)
            for n in range(self.least, min(self.most, place) + 1):
                self.behind[tuple(self.text[place - n :])] = place
            self.text.append(token)
        ### END SOLUTION

    def guess(self, k: int) -> list[int]:
        """Up to k tokens that may follow."""
        ### BEGIN SOLUTION
        for n in range(min(self.most, len(self.text)), self.least - 1, -1):
            place = self.behind.get(tuple(self.text[len(self.text) - n :]))
            if place is not None:
                return self.text[place : place + k]
        return []
        ### END SOLUTION


# %%
check("14.5", Lookup)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A dictionary from n-gram (a tuple) to a place. When is an n-gram entered? If at once, the text's end finds itself, and
# nothing follows there.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# When a token arrives at place i, the n-grams that end just before it become useful: they are followed by something
# now. Enter them with i, over whatever was there: the latest counts.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A scan of the text is as long as the text, for each token: with 100,000 tokens in Python longer than the
# model's step. (The package scans all the same: on the device, where 100,000 comparisons are nothing, because the host
# does not know the newest tokens yet; on the host by `rfind` over bytes, now and then.) The dictionary holds most -
# least + 1 entries a token. A suffix tree holds n-grams of all lengths at once in linear memory: suffix decoding uses
# one, and takes as many guesses as the length of the agreement promises.

# %% [markdown]
# ## Exercise 14.6: lengths by goodput (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: how many guesses of which request | 3 of 5 | 25 | Liu et al., 2024 (SmartSpec) |
#
# S requests decode in one step. `chances[i][j]` is the probability that guesses 0 to j of request i are **all** right:
# a list that never rises, perhaps empty. A step with k_i guesses of request i has n = S + Σ k_i tokens, takes
# `seconds(n)`, and gives S + Σ_i Σ_{j < k_i} chances[i][j] tokens on average.
#
# Return the k_i, a list, with the most tokens a second, of all with n ≤ `budget` (S ≤ budget):
#
# - k_i is at most len(chances[i]): guesses of a request are checked from the first on, none is skipped.
# - Of equally good lists the one with the fewest guesses in all. Of equal chances the earlier request's go first.
# - `seconds` was measured: it may have steps, and more tokens a second may come back after fewer. It is called **at
#   most once for each n**, as it is slow, and for no n below S or above `budget`. S is 1 or more; there may be 100
#   requests of 8 guesses.


# %%
def best_lengths(chances: Sequence[Sequence[float]], budget: int, seconds: Callable[[int], float]) -> list[int]:
    """How many guesses of each request."""
    ### BEGIN SOLUTION
    s = len(chances)
    offers = [(-chance, i) for i, row in enumerate(chances) for chance in row]
    offers = sorted(offers, key=lambda offer: offer[0])[: budget - s]  # stable: equal ones as they stand
    given, best, most = float(s), s / seconds(s), 0
    for count, (chance, _) in enumerate(offers, 1):
        given -= chance
        if (goodput := given / seconds(s + count)) > best:
            best, most = goodput, count
    lengths = [0] * s
    for _, i in offers[:most]:
        lengths[i] += 1
    return lengths
    ### END SOLUTION


# %%
check("14.6", best_lengths)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The time depends on the total alone. For a given total, which guesses give the most? Does taking the most probable
# ones ever skip a guess of a request?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Sort all chances, falling, and try every total: the first ones of the sorted list. Python's `sorted` leaves equal ones
# in their order. Keep the best total, and count whose guesses they were.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A request's chances never rise, so among the m largest of all are always the first ones of each request: the
# greedy choice is the best for its total, and one pass over the totals finds the best of all. 0 guesses is one of the
# totals, so by this model guessing never loses. What can go wrong is the model: chances estimated from few steps, and
# times measured on other lengths of text.
#
# To stop at the first total that is worse misses steps: 17 tokens may take a tile of 32 rows, and the next 15 are free.

# %% [markdown]
# ## Exercise 14.7: four bugs in a verifier (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: mend a step that runs and draws wrongly | 3 of 5 | 25 | vllm #9834, #40149, #9730 |
#
# `target` [k + 1, V] and `draft` [k, V] are **logits**: of the model, and of the draft model that `guesses` were drawn
# from, at the same temperature. The function below should keep to this:
#
# - p = softmax(target / temperature), q = softmax(draft / temperature), in fp64. At temperature 0 each is 1 at the
#   largest logit (of equal ones the smallest id), 0 elsewhere.
# - `allowed` [k + 1, V] bool, or None: which tokens are allowed at each place. Others get probability 0 in p, and the
#   rest is normalized (their logit is -inf). The draft knew nothing of it.
# - Then the rule of exercise 14.4, with the same `uniforms`: accept if uniforms[j] · q_j(x) < p_j(x); else draw from
#   max(0, p_j - q_j), from p_j if nothing is left; the last token from p_k. The token is the smallest x with
#   w(0) + ... + w(x) > uniforms[k] · Σ w.
# - `target`, `draft` and `allowed` are left as they are.
#
# Mistakes of four kinds were planted; with each, text comes out that looks well. Write the mended function.


# %%
def draw(weights: torch.Tensor, uniform: float) -> int:
    """The smallest token whose sum of weights up to it exceeds uniform times the sum of all. (This one is right.)"""
    sums = weights.cumsum(0)
    return int((sums > uniform * sums[-1]).nonzero()[0])


def broken(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    """A step with mistakes of four kinds."""
    k, tokens = len(guesses), []
    if allowed is not None:
        target[:k].masked_fill_(~allowed[:k], -torch.inf)
    p = torch.softmax(target.double() / max(temperature, 1e-5), -1)
    q = torch.softmax(draft.double(), -1)
    for i, token in enumerate(guesses):
        if uniforms[i] >= p[i, token]:
            return [*tokens, draw((p[i] - q[i]).clamp(min=0), uniforms[k])]
        tokens.append(token)
    return [*tokens, draw(p[k - 1], uniforms[k])]


# %% [markdown]
# The function that keeps to it:


# %%
def speculate_logits(
    target: torch.Tensor,
    draft: torch.Tensor,
    guesses: Sequence[int],
    uniforms: Sequence[float],
    temperature: float = 1.0,
    allowed: torch.Tensor | None = None,
) -> list[int]:
    """target [k + 1, V], draft [k, V], k guesses, k + 1 uniforms -> 1 to k + 1 tokens"""

    ### BEGIN SOLUTION
    def distribution(logits: torch.Tensor) -> torch.Tensor:
        if temperature == 0:
            one = torch.zeros(logits.shape, dtype=torch.float64)
            return one.scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return torch.softmax(logits.double() / temperature, -1)

    k, tokens = len(guesses), []
    p = distribution(target if allowed is None else target.masked_fill(~allowed, -torch.inf))
    q = distribution(draft)
    for x, u, p_j, q_j in zip(guesses, uniforms, p, q, strict=False):
        if u * q_j[x] >= p_j[x]:
            left = (p_j - q_j).clamp(min=0)
            return [*tokens, draw(left if left.any() else p_j, uniforms[k])]
        tokens.append(int(x))
    return [*tokens, draw(p[k], uniforms[k])]
    ### END SOLUTION


# %%
check("14.7", speculate_logits)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Go through the list above, sentence by sentence, and look for the line that keeps it. Which lines mention q, and which
# should? What happens to q when the temperature is 0.5?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The four: temperature on one side; a guess is accepted as if q were 1 at it; the last token's row; the mask (which
# row is left out, and whose tensor is written to?). And near temperature 0: two logits that are nearly equal, and 0
# itself.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** (1) Temperature on one side (vllm #9834, #10198): q is not what the guess was drawn from, and the tokens are
# distributed as neither. (2) q left out of the test (vllm #40149: draft probabilities never passed): accepting with
# p(x) is right only if the guess was certain, q(x) = 1; with the rest drawn from p - q the result is not p. (3) The
# bonus token from row k - 1: the distribution one place too early, behind another text. (4) The mask missing in the
# bonus row, and written into the caller's logits.
#
# None of them crashes, and greedy decoding hides (1) and (2). What finds them is a chi-square test of 100,000 draws on
# a few tokens, as in the lab.

# %% [markdown]
# ## Exercise 14.8: an acceptance rate that means something (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: four numbers that are all called acceptance rate | 3 of 5 | 20 | vllm #9565; Leviathan et al., 2023, 3.1 |
#
# A log has one entry (drafted, accepted, given) for each step of a request: how many guesses were checked, how many of
# them were accepted, how many tokens the request got. (At its end it may get fewer than accepted + 1.) A guess is
# **judged** if all before it in its step were accepted; those behind the first wrong one never are. Return a
# dictionary:
#
# - `"by_place"`: a list as long as the largest `drafted`: of the guesses judged at place j the share accepted.
# - `"alpha"`: of all guesses judged the share accepted.
# - `"drafted"`: of all guesses drafted the share accepted.
# - `"tau"`: tokens given a step.
#
# Steps without guesses count for tau alone. A share of nothing is None. An entry with accepted outside of 0 to drafted,
# or given outside of 1 to accepted + 1, is a ValueError. The log may be empty.


# %%
def acceptance(log: Sequence[tuple[int, int, int]]) -> dict:
    """{"by_place": [share or None, ...], "alpha": ..., "drafted": ..., "tau": ...}"""

    ### BEGIN SOLUTION
    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    places = max((drafted for drafted, _, _ in log), default=0)
    judged, right, tokens = [0] * places, [0] * places, 0
    for drafted, accepted, given in log:
        if not 0 <= accepted <= drafted or not 1 <= given <= accepted + 1:
            raise ValueError(f"log: expected 0 <= accepted <= drafted, 1 <= given <= accepted + 1, got {log}")
        tokens += given
        for j in range(min(accepted + 1, drafted)):
            judged[j] += 1
            right[j] += j < accepted
    return {
        "by_place": [share(r, n) for r, n in zip(right, judged, strict=True)],
        "alpha": share(sum(right), sum(judged)),
        "drafted": share(sum(right), sum(drafted for drafted, _, _ in log)),
        "tau": share(tokens, len(log)),
    }
    ### END SOLUTION


# %%
check("14.8", acceptance)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A step that drafts 4 and accepts 2 judges three guesses: two right, one wrong. One that accepts all 4 judges four.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `min(accepted + 1, drafted)` guesses are judged. Count judged and right for each place; all shares come from these
# sums. Where nothing was judged at a place, the share is None, not 0.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Let every guess be right with 0.8, k = 8. `alpha` says 0.8. `drafted` says 0.42: it divides by guesses that
# nobody judged, falls when k grows, and says nothing about the draft. tau is 4.33, and (tau - 1) / k is again 0.42, so
# "acceptance rate 42 %" and "80 %" may be the same run. The formula (1 - α^(k+1)) / (1 - α) wants alpha.
#
# alpha is one number for all places, which the formula takes for granted. `by_place` shows whether it is so: with
# prompt lookup guesses get *better* behind the first (whoever copies goes on copying). With a draft head two things
# work against each other: it feeds on its own guesses, and a place where it was right is an easy one.
