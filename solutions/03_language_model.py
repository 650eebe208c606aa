# %% [markdown]
# # Exercises 3: a language model
#
# Six pieces of [chapter 3](../chapters/03_language_model.md), in the order in which the
# [lab](../notebooks/03_language_model.ipynb) meets them: two of the tokenizer, the step that trains a model, the number
# that judges it, and two of what turns its output into text. Each has a card, a stub and a `check`. Two hints stand
# below each, closed; open them when you are stuck for five minutes.
#
# Shapes: `B` sequences, `T` tokens, `V` tokens in the vocabulary.

# %%
import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

from minillm.learn import check

# %% [markdown]
# ## Exercise 3.1: learn the merges
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | the training of byte-pair encoding, slow and plain | 2 of 5 | 20 | Sennrich, Haddow and Birch, 2016, section 3.2 |
#
# `word_counts` says how often each word of a text occurs. Spell every word as its UTF-8 bytes, one symbol a byte. Then
# `num_merges` times:
#
# - count every pair of neighboring symbols, over all words, each word as often as it occurs;
# - take the pair with the highest count; among equals the smallest one, as Python compares tuples of bytes;
# - join it wherever it stands, in each word from left to right, so that `a a a` becomes `aa a`.
#
# Return the pairs in the order in which they were joined. When no pair is left, return what you have.


# %%
def learn_merges(word_counts: dict[str, int], num_merges: int) -> list[tuple[bytes, bytes]]:
    """word -> count, number of merges -> [(left, right), ...], most frequent first"""
    ### BEGIN SOLUTION
    words = {word: [bytes([byte]) for byte in word.encode()] for word in word_counts}
    merges = []
    for _ in range(num_merges):
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                pairs[pair] = pairs.get(pair, 0) + word_counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, symbols in words.items():
            joined: list[bytes] = []
            i = 0
            while i < len(symbols):
                if tuple(symbols[i : i + 2]) == best:
                    joined.append(best[0] + best[1])
                    i += 2
                else:
                    joined.append(symbols[i])
                    i += 1
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
# `min` over the pairs with the key `(-count, pair)` finds the highest count and, among equals, the smallest pair. For
# joining, walk with an index `i` and build a new list: two steps forward after a join, one otherwise. A `for` loop that
# deletes from the list it walks over skips symbols.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Each merge adds one token, the one that shortens this text most at this moment. That is greedy: nothing says
# that the first thousand choices together are the best thousand tokens, and they are not always (Bostrom and Durrett,
# 2020, "Byte Pair Encoding is Suboptimal for Language Model Pretraining"). Counting over distinct words instead of over
# the text is what makes it affordable: of the reference text's 104,000 words fewer than 6,000 differ.
# This version still counts everything anew for every merge. `Tokenizer.train` counts only the words that held the last
# pair and keeps the counts in a heap: about fifty times faster for a thousand merges of that text, and equal.

# %% [markdown]
# ## Exercise 3.2: encode a word
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | from a word to tokens, as the merges prescribe | 2 of 5 | 15 | Sennrich, Haddow and Birch, 2016, figure 1 |
#
# `ranks` gives each pair that may be joined its place in the order of learning, 0 first. Spell `word` as single bytes.
# As long as there is a pair of neighbors in `ranks`, join the one with the smallest rank; if it occurs more than once,
# the leftmost. Return the tokens as bytes. Joined, they are the word.


# %%
def encode_word(word: str, ranks: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """word, {(left, right): rank} -> tokens, for example "lowest" -> [b"low", b"e", b"s", b"t"]"""
    ### BEGIN SOLUTION
    tokens = [bytes([byte]) for byte in word.encode()]
    while True:
        candidates = [(ranks[pair], i) for i, pair in enumerate(pairwise(tokens)) if pair in ranks]
        if not candidates:
            return tokens
        _, i = min(candidates)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
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
# Collect `(rank, position)` of every pair in the table; `min` of that list is the best rank, leftmost first. A slice
# assignment, `tokens[i : i + 2] = [...]`, replaces two by one.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The model saw its training text as these merges cut it. Another cut of the same word, say the longest token
# first, is made of the same vocabulary and decodes to the same text, and the model has hardly ever seen it: it answers
# worse and nothing warns you. This loop looks at all pairs for every join, O(n²) for a word of n bytes; words are
# short, so it seldom matters, until somebody sends 100,000 letters without a space. `Tokenizer._join` does it with a
# heap.

# %% [markdown]
# ## Exercise 3.3: one step of training
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | the step that every language model is made of | 2 of 5 | 15 | Bengio et al., 2003; Radford et al., 2018 |
#
# `model(token_ids)` gives logits: at every position scores for the token that comes *next*. Take one step:
#
# - each position's target is the token after it; the last position has none;
# - the loss is the mean cross-entropy over the targets, those that are padding (`pad_id`) left out;
# - gradients are those of this batch alone; the optimizer takes one step.
#
# Return the loss as a Python float.


# %%
def training_step(
    model: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    token_ids: torch.Tensor,
    pad_id: int,
) -> float:
    """model: [B, T] int64 -> [B, T, V]; token_ids [B, T], shorter rows filled up with pad_id on the right -> loss"""
    ### BEGIN SOLUTION
    logits = model(token_ids[:, :-1])  # [B, T-1, V]
    targets = token_ids[:, 1:]  # [B, T-1]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=pad_id)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
    ### END SOLUTION


# %%
check("3.3", training_step)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Inputs are all tokens but the last, targets all but the first. `F.cross_entropy` wants logits `[N, V]` and targets
# `[N]`, and it has an argument for targets that do not count.
# </details>
#
# <details><summary>Hint 2</summary>
#
# `.flatten(0, 1)` makes `[B, T-1, V]` into `[B·(T-1), V]`. `ignore_index=pad_id` leaves padding out of the sum and of
# the number it is divided by. PyTorch adds gradients up until somebody calls `optimizer.zero_grad()`.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** One forward pass trains T-1 predictions at once: the causal mask keeps position t from seeing what it is to
# predict. Padding on the right needs no attention mask here, because no real token attends to what comes after it; it
# only must not be *learned*, hence `ignore_index`. Real training packs documents back to back instead and pads nothing;
# the lab does so. The mistake that hides best is a missing shift: the model then learns to copy its input, the loss
# falls to nearly zero within minutes, and the samples are nonsense. A language model's loss that looks too good is a
# bug.

# %% [markdown]
# ## Exercise 3.4: perplexity of a long text
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | every token judged once, with as much context as fits | 3 of 5 | 20 | Baevski and Auli, 2019, section 5.3 |
#
# The text is longer than the window that the model can see. Show it windows of `window` tokens that begin at 0,
# `stride`, `2·stride`, ...; the last one may be shorter. A window of tokens b, ..., e-1 has logits for tokens b+1, ...,
# e. Score each token of the text exactly once, by the *first* window that predicts it. Token 0 has nothing before it
# and is not scored. Stop when the last token is scored.
#
# Return the perplexity: exp of the mean of -ln p(token) over all scored tokens.


# %%
def perplexity(model: Callable[[torch.Tensor], torch.Tensor], token_ids: list[int], window: int, stride: int) -> float:
    """model: [1, T] int64 -> [1, T, V], T at most `window`; 1 <= stride <= window -> perplexity"""
    ### BEGIN SOLUTION
    ids = torch.tensor(token_ids)  # [N]
    last = len(ids) - 1
    total, scored = 0.0, 0  # tokens 1 .. scored have been scored
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        with torch.no_grad():
            logits = model(ids[None, begin:end])[0]  # [T, V]: predicts tokens begin+1 .. end
        fresh = end - scored
        total += F.cross_entropy(logits[-fresh:], ids[scored + 1 : end + 1], reduction="sum").item()
        scored = end
        if scored == last:
            break
    return math.exp(total / scored)
    ### END SOLUTION


# %%
check("3.4", perplexity)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Keep two numbers: the sum of -ln p, and the last token that is scored. A window ends at `end = min(begin + window, N -
# 1)` (exclusive), because the last token is only ever a target. Of its predictions only those after the last scored
# token are new.
# </details>
#
# <details><summary>Hint 2</summary>
#
# The new ones are the last `end - scored` rows of the logits, for the targets `ids[scored + 1 : end + 1]`.
# `F.cross_entropy(..., reduction="sum")` adds them up. Divide once, at the end: windows bring different numbers of new
# tokens, so a mean of means is another number.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A token at the start of a window is judged almost without context, which makes the model look worse than it
# is. With a stride s every token (but the first few) has at least window - s + 1 tokens before it, for window / s times
# the work. So a perplexity is only a number together with its window and stride. The other classic trap is to let each
# window predict within itself: its first token is then scored by nobody, and with stride = window a part of the text is
# silently left out.

# %% [markdown]
# ## Exercise 3.5: the nucleus
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | cut the unreliable tail off a distribution, however long it is | 3 of 5 | 20 | Holtzman et al., 2020, section 3.1 |
#
# Keep the smallest set of tokens whose probabilities add up to at least `p`; set the logits of all others to minus
# infinity. The likeliest token always stays. Every row has its own set. Do not change `logits` itself.


# %%
def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """logits [B, V], 0 < p < 1 -> [B, V]: the logits of the nucleus, -inf elsewhere"""
    ### BEGIN SOLUTION
    ordered, order = logits.sort(dim=-1, descending=True)  # [B, V] each
    probabilities = ordered.softmax(-1)
    likelier = probabilities.cumsum(-1) - probabilities  # [B, V]: what stands before each token
    refused = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, likelier >= p)  # [B, V]: back in place
    return logits.masked_fill(refused, float("-inf"))
    ### END SOLUTION


# %%
check("3.5", keep_top_p)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Sort each row by probability, largest first, and add up along the row. The token that brings the sum to p or beyond
# belongs to the set; the one after it does not. In other words: a token stays while those *before* it have less than p.
# </details>
#
# <details><summary>Hint 2</summary>
#
# `ordered, order = logits.sort(dim=-1, descending=True)`. The sum before a token is `cumsum(-1)` minus the token's own
# probability. `torch.zeros_like(..., dtype=torch.bool).scatter(-1, order, refused)` brings the marks back to where the
# tokens stand; then `masked_fill`.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The tail of a language model's distribution is thousands of tokens, each nearly impossible and together
# likely enough to be hit every few words; one absurd token and the text goes astray. Top-k cuts at a fixed number,
# which is too many where the model is sure and too few where it is not; the nucleus is as wide as the model is unsure.
# `cumsum > p` without the shift is the usual mistake: it throws out the token that crosses p, and everything when that
# is the first. minillm's version shifts the sums instead of subtracting, which is exact in fp32, and treats p = 1
# apart.

# %% [markdown]
# ## Exercise 3.6: characters out of a stream of bytes
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | stream text while tokens end inside characters | 3 of 5 | 20 | Yergeau, 2003, RFC 3629 (UTF-8) |
#
# A token is a piece of bytes and may end inside a character: an emoji of four bytes often comes as two tokens. Write a
# class that a server would use to send text while it is generated:
#
# - `push(data)` takes the bytes of the next token and returns all characters that are complete by now, "" if none is;
# - bytes that can never become a character (0xFF, say) become U+FFFD at once and do not hold up the rest;
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
# The reason "unexpected end of data" means the beginning of a character: keep it and wait. Any other reason means bytes
# `start` to `end` are lost: write one U+FFFD and go on behind them. The standard library has the whole thing ready in
# the module `codecs`; look it up once yours passes.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Decoding each token by itself shows two replacement characters where an emoji belongs; decoding the whole
# text again after every token is quadratic, and still shows them until the character is whole. Keeping at most three
# bytes back is enough, since no character has more than four. `codecs.getincrementaldecoder("utf-8")("replace")` does
# the same in C; minillm's `StreamDecoder` is a thin coat over it that also knows special tokens.
