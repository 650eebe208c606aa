# %% [markdown]
# # Exercises 3: a language model
#
# Ten exercises on [chapter 3](../chapters/03_language_model.md) and its [lab](../notebooks/03_language_model.ipynb):
# three **warm-ups** of five minutes (3.w1 to 3.w3), the **core** (3.0, the loop that trains a model), and six steps
# **beyond** (3.1 to 3.6), in the order in which the lab meets their subjects: two of the tokenizer, a training step
# in pieces, the losses that judge a model, and two of what turns its output into text. Two of these are marked
# optional.
#
# Run the next cell, then replace `raise NotImplementedError(...)` by your code and run the `check` cell under it. Two
# hints stand below each, closed; open them when you are stuck for five minutes.
#
# Shapes: `B` sequences, `T` tokens, $|\mathcal V|$ tokens in the vocabulary, written `V` in comments.

# %%
import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

from minillm.learn import check

# %% [markdown]
# ## Exercise 3.w1: halve an interval
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: one step of a search for top-p's border | 1 of 5 | 5 | Holtzman et al., 2020 |
#
# Top-p keeps the likeliest tokens until they have `p` together. Instead of sorting, one may look for a *threshold*:
# keep what has at least this probability. It lies somewhere from `low`, where the tokens that are kept have at least
# `p` together, to `high`, where they have less. Try the middle of the two. Return the half in which the threshold
# lies: (middle, high) if the tokens with **at least** the middle's probability have together **at least** `p`, else
# (low, middle). Leave the list as it is.
#
# First on paper: (.5, .25, .15, .1), p = .7, from (0, 1). Where are you after three steps?


# %%
def halve(probabilities: list[float], p: float, low: float, high: float) -> tuple[float, float]:
    """probabilities of all tokens, in any order; an interval -> one half of it"""
    ### BEGIN SOLUTION
    middle = (low + high) / 2
    enough = sum(x for x in probabilities if x >= middle) >= p
    return (middle, high) if enough else (low, middle)
    ### END SOLUTION


# %%
check("3.w1", halve)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A low threshold keeps much, a high one little. If what the middle keeps is still enough, can you afford to go up?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `sum(x for x in ... if ...)` adds up what is kept. On paper: .5 keeps .5, which is less than .7.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** What is true of the two ends before a step is true after it: `low` keeps enough, `high` does not. So when the
# ends have met, `low` is the threshold. On paper: (0, .5), (.25, .5), (.25, .375): the border is .25. Exercise 3.5 does
# this for many rows at once, and finds out when to stop.

# %% [markdown]
# ## Exercise 3.w2: the characters that are whole
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: what Python says of UTF-8 that breaks off | 1 of 5 | 5 | Yergeau, 2003, RFC 3629 (UTF-8) |
#
# `data` is the beginning of a text in UTF-8, cut off after any byte. Return the characters that are whole, and the
# bytes behind them, of which the next character will be made: none to three. The two together are `data` again.
#
# First in a cell of your own: what does `b"a\xf0\x9f".decode()` raise, and what do `start`, `end` and `reason` say?


# %%
def whole_characters(data: bytes) -> tuple[str, bytes]:
    """UTF-8, cut off anywhere -> (text, bytes left)"""
    ### BEGIN SOLUTION
    try:
        return data.decode(), b""
    except UnicodeDecodeError as error:
        return data[: error.start].decode(), data[error.start :]
    ### END SOLUTION


# %%
check("3.w2", whole_characters)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `try`, and when it raises look at the exception: `except UnicodeDecodeError as error`.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# What stands before `error.start` is sound; from there on the next character is not whole.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A character has one to four bytes, and its first byte says how many: 0xxxxxxx, 110xxxxx, 1110xxxx, 11110xxx.
# So one to three bytes at the end may be waiting, never more. Another way tries to decode all of it, then all but the
# last byte, and so on. Exercise 3.6 makes a class of this, and adds bytes that are no UTF-8.

# %% [markdown]
# ## Exercise 3.w3: the mean over all
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: means of unequal parts, and the perplexity | 1 of 5 | 5 | none |
#
# A model was judged on several texts. `means` has each one's mean loss, in nats a token, `counts` its number of tokens.
# Return the mean loss over **all tokens** together, and the perplexity that belongs to it. A text without tokens has a
# mean of NaN and takes no part; some text has tokens. Leave the lists as they are.
#
# First on paper: 9 tokens with a mean of 1 nat, and 1 token with 11.


# %%
def over_all(means: list[float], counts: list[int]) -> tuple[float, float]:
    """mean loss and number of tokens of each text -> (mean loss, perplexity) of all"""
    ### BEGIN SOLUTION
    total = sum(mean * count for mean, count in zip(means, counts, strict=True) if count)
    mean = total / sum(counts)
    return mean, math.exp(mean)
    ### END SOLUTION


# %%
check("3.w3", over_all)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A mean times its count is a sum again, and sums can be added.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# NaN times 0 is NaN: leave such a text out before you multiply. The perplexity is e to the power of the mean.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The mean of the means lets one token of the short text weigh as much as nine of the long one: 6 nats in place
# of 2, a perplexity of 403 in place of 7.4. Perplexities themselves cannot be averaged at all, in any weighting: they
# are no sums. Training makes the same mistake when a batch is cut into parts (exercise 3.3).

# %% [markdown]
# ## Exercise 3.0: the training loop
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: ten lines that turn text into a language model | 2 of 5 | 20 | Radford et al., 2019 |
#
# `token_ids` [n] is a whole text as one stream of tokens. Train `model` on it, `steps` times:
#
# - Draw `batch` windows: each begins at one of `torch.randint(n - window, (batch,), generator=generator)`, drawn once a
#   step. Its inputs are the `window` tokens from there on; all windows go through the model at once, [batch, window].
# - A position's target is the token **one place further** in the stream, also for the last position of a window.
# - The loss is the mean cross-entropy of all batch · window predictions.
# - The optimizer takes one step along the gradient of this batch alone. No clipping, no change of the learning rate.
#
# Return each step's loss, before the step, as a Python float. `steps` may be 0. Leave `token_ids` as it is.


# %%
def train(
    model: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    token_ids: torch.Tensor,
    steps: int,
    batch: int,
    window: int,
    generator: torch.Generator,
) -> list[float]:
    """model: [B, T] int64 -> [B, T, V]; token_ids [n] int64, n > window -> `steps` losses"""
    ### BEGIN SOLUTION
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(token_ids) - window, (batch,), generator=generator)
        rows = token_ids[starts[:, None] + torch.arange(window + 1)]  # [B, T + 1]
        logits = model(rows[:, :-1])  # [B, T, V]
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
    ### END SOLUTION


# %%
check("3.0", train)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A window needs `window + 1` tokens of the stream: inputs are all but the last, targets all but the first.
# `starts[:, None] + torch.arange(...)` are the places of all of them at once.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `F.cross_entropy` wants logits [rows, V] and targets [rows]: `flatten(0, 1)` makes them of [B, T, V]. Then three
# calls: clear the gradients, backward, step. `loss.item()` is a float.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** This is all that pretraining is; what large models add is around it: a schedule of the learning rate,
# clipping, 16-bit numbers, many GPUs, and trillions of tokens. The causal mask lets each window train `window`
# predictions at once, each from all that stands before it *in the window*.
#
# The mistake that hides best is a missing shift: the model learns to copy its input, the loss falls to nearly zero
# within a hundred steps, and what it writes is nonsense. The next best is a gradient that is never cleared: it
# trains, as if with a momentum that never fades, and worse. `torch.randint(n - window)` begins at n - window - 1 at
# most, whose last target is token n - 1: no token of the stream is left out.

# %% [markdown]
# ## Exercise 3.1: learn the merges
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: the training of byte-pair encoding | 2 of 5 | 20 | Sennrich, Haddow and Birch, 2016, section 3.2 |
#
# `word_counts` says how often each word of a text occurs. Spell every word as its UTF-8 bytes, one symbol a byte. Then,
# `num_merges` times:
#
# - count every pair of neighboring symbols, over all words, each word as often as it occurs. Overlapping pairs count:
#   `a a a` holds two pairs `a a`, of which joining takes one;
# - take the pair with the highest count; among equals the smallest one, as Python compares tuples of bytes;
# - if even this pair occurs fewer than `min_count` times, stop: its token would rarely be used, and rarely be trained;
# - join it wherever it stands, in each word from left to right, so that `a a a` becomes `aa a`.
#
# Return the pairs in the order joined. When no pair is left, return what you have. Leave `word_counts` as it is.


# %%
def learn_merges(word_counts: dict[str, int], num_merges: int, min_count: int = 1) -> list[tuple[bytes, bytes]]:
    """word -> count, number of merges, least count of a merge -> [(left, right), ...] in the order joined"""
    ### BEGIN SOLUTION
    words = {word: [bytes([byte]) for byte in word.encode()] for word in word_counts}
    merges = []
    for _ in range(num_merges):
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                pairs[pair] = pairs.get(pair, 0) + word_counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < min_count:
            break
        merges.append(best)
        for word, symbols in words.items():
            joined: list[bytes] = []
            i = 0
            while i < len(symbols):
                found = tuple(symbols[i : i + 2]) == best
                joined.append(best[0] + best[1] if found else symbols[i])
                i += 2 if found else 1
            words[word] = joined
    return merges
    ### END SOLUTION


# %%
check("3.1", learn_merges)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Keep one list of symbols a word: `{"low": [b"l", b"o", b"w"]}`. `bytes([byte])` makes a symbol of one number out of
# `word.encode()`. Two loops follow each other inside the loop over merges: one that counts, one that joins.
# </details>
#
# <details><summary>Hint 2</summary>
#
# Highest count and smallest pair are one comparison, if the key is a tuple: what has to stand in front, and with which
# sign? For joining, try your loop on a word that holds the pair three times in a row. A `for` loop that deletes from
# the list it walks over skips symbols.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Each merge adds one token, the one that shortens this text most at this moment. (Nearly: overlapping pairs
# are counted, and joining takes only some of them.) That is greedy: nothing says that the first thousand choices
# together are the best thousand tokens, and they are not always (Bostrom and Durrett, 2020, "Byte Pair Encoding is
# Suboptimal for Language Model Pretraining"). Counting over distinct words instead of over the text is what makes it
# affordable: of the reference text's 104,000 words fewer than 6,000 differ. `min_count` is `min_frequency` in Hugging
# Face's trainer: a token that the text holds twice costs a row of the embedding, and two examples teach it little.
# This version still counts everything anew for every merge. The other way is `Tokenizer.train`: it counts only the
# words that held the last pair and keeps the counts in a heap. About fifty times faster for a thousand merges of that
# text, and equal.

# %% [markdown]
# ## Exercise 3.2: encode a word
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: from a word to tokens, and an account of how | 2 of 5 | 15 | Sennrich, Haddow and Birch, 2016, figure 1 |
#
# `table` gives each pair that may be joined its rank, its place in the order of learning, 0 first. (The dictionary
# itself may be in any order.) Spell `word` as single bytes. As long as there is a pair of neighbors in `table`, join
# the one with the smallest rank; if it occurs more than once, the leftmost.
#
# Return two lists: the tokens as bytes, which joined are the word, and the rank of each join in the order in which the
# joins were made. A pair that is joined at two places is two joins. Leave `table` as it is.


# %%
def encode_word(word: str, table: dict[tuple[bytes, bytes], int]) -> tuple[list[bytes], list[int]]:
    """word, {(left, right): rank} -> (tokens, ranks), for example "lowest" -> [b"low", b"e", b"s", b"t"], [0, 1]"""
    ### BEGIN SOLUTION
    tokens, ranks = [bytes([byte]) for byte in word.encode()], []
    while candidates := [(table[pair], i) for i, pair in enumerate(pairwise(tokens)) if pair in table]:
        rank, i = min(candidates)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
        ranks.append(rank)
    return tokens, ranks
    ### END SOLUTION


# %%
check("3.2", encode_word)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The order of the merges decides, not the order of the letters and not the length of the token. After each join, look
# again: the new token may stand in a pair that the table knows.
# </details>
#
# <details><summary>Hint 2</summary>
#
# One round needs two things of the pair it joins, what it is worth and where it stands, and both rules of choice want
# the smaller of two. Do not walk over the table: it has 50,000 pairs, and the word has a dozen.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The model saw its training text as these merges cut it. Another cut of the same word, say the longest token
# first, is made of the same vocabulary and decodes to the same text, and the model has hardly ever seen it: it answers
# worse and nothing warns you. The ranks say why a word was cut so. In a learned table they never fall from join to join
# (unless two merges make the same token), so a tokenizer that had stopped after k merges would make the joins of rank
# below k, and no others.
# This loop looks at all pairs for every join, O(n²) for a word of n bytes; words are short, so it seldom matters, until
# somebody sends 100,000 letters without a space. The other way is `Tokenizer._join`, with a heap and a linked list.

# %% [markdown]
# ## Exercise 3.3: one step of training, in pieces
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: a step on a batch that does not fit into memory | 3 of 5 | 20 | Radford et al., 2019 |
#
# `model(token_ids)` gives logits: at every position scores for the token that comes *next*. Take one step on `batch`:
#
# - each position's target is the token after it; the last position has none;
# - the loss is the mean cross-entropy over all targets of the batch, those that are padding (`pad_id`) left out;
# - to save memory, cut the batch into `pieces` equal parts of rows, in order. Each part goes through the model and
#   backward before the next one enters; gradients add up over the parts (**gradient accumulation**);
# - then the optimizer takes one step, along the gradient of this batch alone, whatever stood in `.grad` before the
#   call. No clipping.
#
# `pieces` divides `B` and changes memory and nothing else: not the loss, not the gradient. Parts hold unequal numbers
# of targets, and a part may hold none at all; the batch has at least one. Return the loss before the step as a Python
# float. Leave `batch` as it is.


# %%
def training_step(
    model: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    batch: torch.Tensor,
    pad_id: int,
    pieces: int = 1,
) -> float:
    """model: [b, T] int64 -> [b, T, V]; batch [B, T], shorter rows filled up with pad_id on the right -> loss"""
    ### BEGIN SOLUTION
    count = (batch[:, 1:] != pad_id).sum()
    total = 0.0
    optimizer.zero_grad()
    for part in batch.chunk(pieces):  # [B / pieces, T]
        logits = model(part[:, :-1]).flatten(0, 1)  # [B / pieces · (T-1), V]
        loss = F.cross_entropy(logits, part[:, 1:].flatten(), ignore_index=pad_id, reduction="sum") / count
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total
    ### END SOLUTION


# %%
check("3.3", training_step)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Inputs are all tokens but the last, targets all but the first. `F.cross_entropy` wants logits `[rows, V]` and targets
# `[rows]`; it has an argument for targets that do not count, and one that says whether it returns a mean.
# </details>
#
# <details><summary>Hint 2</summary>
#
# Take two parts, one with 9 targets and one with 1. How much does one target weigh in the mean over the whole batch,
# and how much in the mean of the two means? The weight that you want can be known before the model has seen anything.
# `backward()` adds to `.grad`, and so does the backward of the step before, unless somebody clears it.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A mean over N targets is a sum of N terms, each divided by N; sums can be cut anywhere, means cannot. The
# mean of the parts' means weighs a token in a short row more than one in a long row. Widely used trainers did that, or
# `backward(loss / pieces)`, which is the same, until October 2024 (transformers' pull request 34191 repaired one of
# them); the curves looked plausible, only a little worse. The other way is to multiply each part's mean by its share
# of the targets, and then a part without targets is 0 / 0 and needs care.
# Padding on the right needs no attention mask here, because no real token attends to what comes after it; it only must
# not be *learned*. `ignore_index=pad_id` has a catch: where padding and end-of-text share an id, it also drops the real
# end-of-text tokens, and the model never learns to stop. Then count by lengths. Real training packs documents back to
# back and pads nothing; the lab does so. The mistake that hides best is a missing shift: the model learns to copy its
# input, the loss falls to nearly zero within a hundred steps, and the samples are nonsense.

# %% [markdown]
# ## Exercise 3.4: the loss of every token of a long text (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: every token judged once, with as much context as fits | 3 of 5 | 20 | Baevski and Auli, 2019, section 5.3 |
#
# A perplexity is one number. Which tokens surprise the model shows only token by token, so return the vector behind it.
#
# The text is longer than the window that the model can see. Show it windows of `window` tokens that begin at 0,
# `stride`, `2·stride`, ...; the last one may be shorter. A window of tokens b, ..., e-1 has logits for tokens b+1, ...,
# e. Score each token of the text exactly once, by the *first* window that predicts it: of all windows this one gives it
# the most context. Token 0 has nothing before it and is not scored. Show no window that has nothing new to score.
#
# Return -ln p of tokens 1, 2, ..., in order, as a float32 tensor `[n - 1]` that keeps no graph, whatever the logits'
# dtype. Compute in float32, also when they come in bfloat16. exp of its mean is the perplexity. Leave `token_ids` as it
# is.


# %%
def token_losses(
    model: Callable[[torch.Tensor], torch.Tensor], token_ids: list[int], window: int, stride: int
) -> torch.Tensor:
    """model: [1, T] int64 -> [1, T, V], T at most `window`; 1 <= stride <= window; n >= 2 token ids -> [n - 1]"""
    ### BEGIN SOLUTION
    ids = torch.tensor(token_ids)  # [n]
    last = len(ids) - 1
    losses = torch.empty(last)  # [n - 1]: entry i belongs to token i + 1
    scored = 0  # entries 0 .. scored-1 are written
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        with torch.no_grad():
            logits = model(ids[None, begin:end])[0].float()  # [T, V]: predicts tokens begin+1 .. end
        losses[scored:end] = F.cross_entropy(logits[scored - begin :], ids[scored + 1 : end + 1], reduction="none")
        scored = end
        if scored == last:
            break
    return losses
    ### END SOLUTION


# %%
check("3.4", token_losses)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Entry i of the result belongs to token i + 1. Draw two overlapping windows over a text of ten tokens, write under each
# which entries it predicts, and strike out what the second one must not touch. The text's last token is never an input.
# </details>
#
# <details><summary>Hint 2</summary>
#
# One number is enough to remember between windows: how many entries are filled. From it and from where the window
# begins follow the row of the logits that is the first new one, and that row's target. Two traps: a slice `x[-n:]` with
# n = 0 is everything, and `range` may hold more starts after the window that reached the end.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A token at the start of a window is judged almost without context, which makes the model look worse than it
# is. With a stride s every token (but the first few) has at least window - s + 1 tokens before it, for window / s times
# the work. So a perplexity is only a number together with its window and stride. Two classic traps: each window
# predicts within itself, so its first token is scored by nobody; or later windows overwrite the entries of earlier
# ones, and each token keeps the *least* context that it ever had. Nothing crashes in either.
# The other way cuts the text into overlapping rows `[n, window]` and scores them in one batch, which fills a GPU; the
# last row is then padded, and the overlap is masked instead of left out. Production evaluators (lm-evaluation-harness)
# build such windows first and batch them.

# %% [markdown]
# ## Exercise 3.5: the nucleus without a sort (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: top-p for a GPU, where a sort is dear | 4 of 5 | 30 | Holtzman et al., 2020; FlashInfer, 2025 |
#
# Chapter and lab sort each row to find the nucleus. Engines on GPUs search for a threshold instead. For each row, find
# by bisection the largest t such that the tokens with probability at least t have together at least `p`. Keep these,
# set the logits of all others to minus infinity.
#
# - Every row has its own threshold; `p` is one number for all rows or a tensor `[B]`, 0 < p <= 1. `logits` is fp32.
# - Tokens of equal probability stay or go together: a threshold cannot tell them apart.
# - Tokens of different probability are told apart, even small ones that differ by one part in 100,000.
# - p = 1 keeps every token, however small.
# - A logit may be minus infinity, refused before. Each row has another.
# - Do not sort, neither with torch (`sort`, `argsort`, `msort`, `topk`, `kthvalue`, `unique`) nor with Python or NumPy.
# - Do not change `logits` or `p`.


# %%
def keep_top_p(logits: torch.Tensor, p: float | torch.Tensor) -> torch.Tensor:
    """logits [B, V], p a number or [B] -> [B, V]: the logits of the nucleus, -inf elsewhere"""
    ### BEGIN SOLUTION
    probabilities = logits.softmax(-1)  # [B, V]
    p = torch.as_tensor(p, dtype=logits.dtype).reshape(-1, 1)  # [B, 1] or [1, 1]
    low = torch.zeros(len(logits), 1)  # [B, 1]: what is kept at low is enough,
    high = torch.full_like(low, 2.0)  # [B, 1]: what is kept at high is not
    while True:
        middle = (low + high) / 2
        if ((middle == low) | (middle == high)).all():  # no float lies between
            break
        enough = (probabilities * (probabilities >= middle)).sum(-1, keepdim=True) >= p  # [B, 1]
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return logits.masked_fill((probabilities < low) & (p < 1), float("-inf"))
    ### END SOLUTION


# %%
check("3.5", keep_top_p)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# How much do the tokens above a given threshold have together? That takes a comparison and a sum, in any order, and
# all rows at once. When the threshold rises, this can only fall. On which side of the answer does a test put you?
# </details>
#
# <details><summary>Hint 2</summary>
#
# Say in words what is true of each end of your interval, before and after every step; then it is clear which end the
# answer is. An interval of length 1 has length 2^-n after n steps, while tokens in the tail lie 10^-9 apart: how many
# steps are enough, or how do you notice that nothing is left between the ends? And what is the fp32 sum of a row
# without its smallest token?
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The tail of a language model's distribution is thousands of tokens, each nearly impossible: drawn without a
# filter, one token in some 70 comes from behind the best thousand (chapter 3), and one absurd token leads the text
# astray. Top-k cuts at a fixed number, which is too many where the model is sure and too few where it is not; the
# nucleus is as wide as the model is unsure.
# What is kept at `low` always has at least `p`, what is kept at `high` has less, and at the end the two are neighbors
# among the floats: `low` is t itself, the probability of the last token that stays. Moving the wrong end throws out the
# token that crosses p. p = 1 must be treated apart: in fp32 the sum reaches 1 before the last tokens, or never.
# Each test reads the row once, without moving anything; a sort of 128,000 logits moves them many times. Engines need
# fewer tests: they try several thresholds in one pass and let the ends jump to probabilities that occur (FlashInfer's
# kernels, and Qrita in vLLM). Two other ways: sort and add up, as `minillm.sampling` does, which also decides between
# equal tokens; or no threshold at all: draw a token, accept it if the likelier ones together have less than p, else
# draw again among those, which is how FlashInfer samples. minillm's engine does some of each
# (`minillm/kernels/draw_tokens.py`): a few tests narrow the threshold down, then what was drawn is tested.

# %% [markdown]
# ## Exercise 3.6: characters out of a stream of bytes
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: stream text while tokens end inside characters | 3 of 5 | 20 | Yergeau, 2003, RFC 3629 (UTF-8) |
#
# A token is a piece of bytes and may end inside a character: an emoji of four bytes comes as two or three tokens.
# Write a class that a server would use to send text while it is generated:
#
# - `push(data)` takes the bytes of the next token and returns all characters that are complete by now, "" if none is;
# - bytes that can never become a character (0xFF, say, or 0xC0) become U+FFFD at once and do not hold up the rest.
#   (With ED A0, where a surrogate would begin, you may wait for one byte more, as Python's own decoder does.)
# - `flush()` returns what is left at the end, U+FFFD for an incomplete character, and leaves nothing behind.
#
# All returned pieces joined are `all_bytes.decode(errors="replace")`.


# %%
class StreamDecoder:
    """push(bytes) -> str, ..., flush() -> str"""

    def __init__(self) -> None:
        ### BEGIN SOLUTION
        self.waiting = b""
        ### END SOLUTION

    def push(self, data: bytes) -> str:
        """The characters that `data` completes."""
        ### BEGIN SOLUTION
        self.waiting += data
        text = ""
        while self.waiting:
            try:
                text, self.waiting = text + self.waiting.decode(), b""
            except UnicodeDecodeError as error:
                text += self.waiting[: error.start].decode()
                if error.reason == "unexpected end of data":  # the beginning of a character: wait for the rest
                    self.waiting = self.waiting[error.start :]
                    break
                text += "\ufffd"
                self.waiting = self.waiting[error.end :]
        return text
        ### END SOLUTION

    def flush(self) -> str:
        """What is left at the end."""
        ### BEGIN SOLUTION
        text, self.waiting = self.waiting.decode(errors="replace"), b""
        return text
        ### END SOLUTION


# %%
check("3.6", StreamDecoder)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Keep the bytes that are not out yet. Python's own decoder tells you what is wrong with them: `bytes.decode()` raises a
# `UnicodeDecodeError` with `start`, `end` and `reason`. What stands before `start` is sound.
# </details>
#
# <details><summary>Hint 2</summary>
#
# There are two kinds of trouble: bytes that may still become a character, and bytes that never will. Decode
# `b"\xf0\x9f"` and `b"\xff"` in a cell of your own and compare what the two exceptions say. After the second kind the
# rest is not done yet: it may hold characters, and either kind of trouble again.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** An emoji of two or three tokens, decoded token by token, shows replacement characters in its place; decoding
# the whole text again after every token is quadratic, and still shows them until the character is whole.
# Keeping at most three bytes back is enough, since no character has more than four. The other way is in the standard
# library: `codecs.getincrementaldecoder("utf-8")("replace")` does the same in C; minillm's `StreamDecoder` is a thin
# coat over it that also knows special tokens.
