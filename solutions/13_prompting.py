# %% [markdown]
# # Exercises 13: Prompting and constrained decoding
#
# Eight exercises on [chapter 13](../chapters/13_prompting.md) and its [lab](../notebooks/13_prompting.ipynb): two
# **warm-ups** of five minutes (13.1 and 13.2), the **core** (13.3 and 13.4), and four steps **beyond** (13.5 to 13.8,
# optional), which neither chapter nor lab shows in this form.
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.
#
# Conventions, in all of them: **ln p** is a natural logarithm of a probability. Tensors need not be contiguous.
# Arguments stay as they are.

# %%
import re
from collections.abc import Hashable, Sequence

import torch

from minillm.learn import check

# %% [markdown]
# ## Exercise 13.1: a chat template by hand
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: what a model sees of a conversation | 1 of 5 | 5 | |
#
# Write the text that SmolLM2 and Qwen's models see (ChatML). A conversation is a list of messages
# `{"role": ..., "content": ...}`.
#
# - A message becomes `<|im_start|>`, its role, a line break, its content, `<|im_end|>`, a line break. The content is
#   taken as it is: nothing is stripped. All messages appear, in their order.
# - `system`, if not None, becomes a first message of the role `system`, unless the conversation begins with one. Of no
#   messages at all it is the only one. An empty `system` is a message with an empty content.
# - `generate=True`: the text ends where the answer begins, with `<|im_start|>assistant` and a line break. If the last
#   message is the assistant's, it is the **beginning** of the answer instead: the text ends with its content.
# - No other token is put anywhere: one at the beginning of a text is the tokenizer's business.
# - The list and its messages stay as they are.


# %%
def chat(messages: list[dict[str, str]], system: str | None = None, generate: bool = True) -> str:
    """A conversation as the text that the model sees."""
    ### BEGIN SOLUTION
    if system is not None and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    text = "".join([f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages])
    if not generate:
        return text
    if messages and messages[-1]["role"] == "assistant":
        return text.removesuffix("<|im_end|>\n")
    return text + "<|im_start|>assistant\n"
    ### END SOLUTION


# %%
check("13.1", chat)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Three steps: decide on the first message, join all of them, decide on the end. Make a new list for the first step.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Write every message in full, then take the last `<|im_end|>` and its line break off where an answer goes on. `""` is
# not None.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Without the opening of the assistant's message the model may go on with the user's, and it does. With a line
# break or a space too many the text is one that the model has not seen in training: it still answers, a little worse.
# An answer whose beginning is given (`{` for JSON, `Answer:` for a label) is the cheapest way to steer one, and the
# likeliest to be lost when a template closes it.
#
# The second token for the beginning of a text is the best known bug of templates: the template writes `<s>`, then the
# tokenizer puts one in front, as it always does. Encode a template's text with `add_special_tokens=False`.
# What a user writes should never become `<|im_end|>`, the token. A tokenizer that reads special tokens in all text lets
# users write messages of any role.

# %% [markdown]
# ## Exercise 13.2: the score of a label
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: ln p of a label, read off logits | 1 of 5 | 5 | Brown et al., 2020, 2.4 |
#
# A prompt and a label behind it are the tokens `ids`; the label begins at position `begin`. The model ran over all of
# them at once: row i of `logits` [T, V] is what it says about token i + 1.
#
# - Return ln p(label | prompt), the **sum** over the label's tokens; with `mean=True` their mean.
# - Only the label's tokens count, from `begin` to the end, one or more; the prompt's do not.
# - Logits may be fp16 or bf16, and of any size: compute in fp32 or more. A logit of -inf has p = 0; the label may have
#   such a token, and then the score is -inf.
# - Raise ValueError where there is no prompt (`begin` below 1) or no label (`begin` at the end or beyond).


# %%
def label_score(logits: torch.Tensor, ids: Sequence[int], begin: int, mean: bool = False) -> float:
    """ln p of ids[begin:] behind ids[:begin].  logits [T, V] for T tokens"""
    ### BEGIN SOLUTION
    if not 1 <= begin < len(ids):
        raise ValueError(f"begin: expected 1 to {len(ids) - 1}, got {begin}")
    label = torch.tensor(ids[begin:])[:, None]  # [L, 1]
    each = logits[begin - 1 : -1].double().log_softmax(-1).gather(1, label)
    return float(each.mean() if mean else each.sum())
    ### END SOLUTION


# %%
check("13.2", label_score)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The label's first token is foretold by the row of the prompt's last one. What does the last row of all foretell?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Rows `begin - 1` to the last but one; `log_softmax` over V; then of each row the number of the token that comes.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Off by one is the usual mistake, and it does not show: the scores look like scores. The softmax matters as
# well. Logits of different rows are not comparable, so labels of several tokens cannot be ranked by adding raw logits.
#
# A sum prefers short labels, a mean prefers long ones whose later tokens are certain ("Switzer" makes "land" certain).
# Neither is right in general. Choose label words of one token each, and the question does not come up.

# %% [markdown]
# ## Exercise 13.3: examples, balanced and in order
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: a few-shot prompt whose examples are chosen for the text | 2 of 5 | 20 | Liu et al., 2022; Zhao et al., 2021 |
#
# `pool` has (text, label) pairs, the most similar to `text` **first**. Build the prompt.
#
# - An example whose text is `text` itself is never taken: it would give the answer away. The labels are those of the
#   examples that are left.
# - `count` examples are taken, of each label equally many. Where that does not come out even, the labels whose first
#   example stands earliest in the pool have one more. Of a label, the most similar ones are taken.
# - In the prompt the most similar example comes **last**, the least similar first, whatever their labels.
# - `template` has `{text}` once, and `{label}` once, at its end, behind white space or none. An example is the template
#   with both filled in. At the end comes the template with `text`, as far as its label would begin, **without** the
#   white space in front of it: with labels, that becomes part of the first token. Parts are joined by `separator`.
# - Texts and labels are put in as they are, empty ones too. They may have braces, `{text}` and `{label}` included (a
#   text may be about templates); the template may have other braces, such as JSON's.
# - `count=0` makes a prompt without examples, of an empty pool too. Raise ValueError where a label has fewer than are
#   to be taken of it, or where examples are wanted and none is left.


# %%
def few_shot(
    pool: Sequence[tuple[str, str]], text: str, count: int,
    template: str = "Input: {text}\nLabel: {label}", separator: str = "\n\n",
) -> str:  # fmt: skip
    """A prompt of `count` examples and a text, up to where its label begins."""
    ### BEGIN SOLUTION
    left = [shot for shot in pool if shot[0] != text]
    labels = list(dict.fromkeys([label for _, label in left]))  # by their first example
    chosen = set()
    for i, label in enumerate(labels):
        wanted = count // len(labels) + (i < count % len(labels))
        of_label = [at for at, shot in enumerate(left) if shot[1] == label]
        if len(of_label) < wanted:
            raise ValueError(f"pool: expected {wanted} examples with the label {label!r}, got {len(of_label)}")
        chosen.update(of_label[:wanted])
    if count and not labels:
        raise ValueError(f"pool: expected {count} examples, got none")
    head, tail = template.removesuffix("{label}").split("{text}")
    parts = [head + left[at][0] + tail + left[at][1] for at in sorted(chosen, reverse=True)]
    return separator.join([*parts, head + text + tail.rstrip()])
    ### END SOLUTION


# %%
check("13.3", few_shot)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Remember positions in the pool, not examples: sorted the other way around, they are the order of the prompt.
# `dict.fromkeys` keeps the order in which labels come first.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `str.format` stumbles over braces, and `replace` twice fills in what the first text brought along. Cut the template
# into the part in front of `{text}` and the part behind it, once, and add up pieces. Only the second part may lose
# white space.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** What stands near the end weighs more, and a label that is said more often is said again. So the labels are
# balanced and the most similar example is put next to the question. The example that *is* the question makes every
# result look wonderful; it slips in where test texts and the pool come from one file.
#
# `Label: ` with a space at its end is a different question to the model. The tokens that it learned begin **with** the
# space, so behind a space it expects something else, such as a second space or a lone letter. Label scoring then
# compares words that the model would never write.

# %% [markdown]
# ## Exercise 13.4: the mask
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: from an automaton over bytes to the tokens that may come | 3 of 5 | 30 | Willard and Louf, 2023 |
#
# An automaton has S states. `table` [S, 256] int64 has the next state for each byte, -1 where the byte is not allowed;
# `accepting` [S] bool says where the text may end. Which tokens may come in `state`?
#
# - `tokens` has each token's bytes, None for special ones. A token may come if all of its bytes are allowed, one after
#   the other, **and** the text can still be finished from where they lead: by some bytes, or by none. States from which
#   nothing is ever accepted do exist.
# - A token may hold a part of a character, or several things at once, such as the end of a string and a comma. What
#   counts are its bytes.
# - Tokens of no bytes never come, special ones neither.
# - The end token, number `end`, may come where the state is accepting, and nowhere else; its bytes, if it has any, do
#   not count.
# - Returns bool [number of tokens].


# %%
def mask(
    table: torch.Tensor, accepting: torch.Tensor, state: int, tokens: Sequence[bytes | None], end: int
) -> torch.Tensor:  # fmt: skip
    """The tokens that may come in a state.  -> bool [len(tokens)]"""
    ### BEGIN SOLUTION
    moves = table.tolist()
    after = [set(row) for row in moves]
    alive, before = {i for i, ends in enumerate(accepting.tolist()) if ends}, -1
    while len(alive) != before:  # one byte further from the end each round
        before = len(alive)
        alive |= {i for i, states in enumerate(after) if not alive.isdisjoint(states)}
    may_come = torch.zeros(len(tokens), dtype=torch.bool)
    for number, token in enumerate(tokens):
        at = state
        for byte in token or b"":
            at = moves[at][byte] if at >= 0 else -1
        may_come[number] = bool(token) and at in alive
    may_come[end] = bool(accepting[state])
    return may_come
    ### END SOLUTION


# %%
check("13.4", mask)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# First find the states from which the text can be finished: those that accept, then those with a byte that leads to
# one of them, until no more come. Then walk each token.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# -1 is a fine index in Python: `table[-1]` is the last row. Stop a walk once it is at -1. Set the end token last.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A walk that passes through a dead end costs nothing now and everything later: two tokens on no token is left.
# The engine can then only stop, and the text is not what was asked for.
#
# This walks every token by itself: 332,000 bytes for SmolLM2's vocabulary. Tokens share beginnings, so the package
# walks their trie (100,000 nodes) level by level, all nodes of one level at once, and what was not alive higher up is
# not visited. It keeps the mask of each state, too: a mask depends on the state alone, and most requests visit the same
# ones.

# %% [markdown]
# ## Exercise 13.5: calibration with several words a class (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: take out what the prompt alone says, then add up synonyms | 3 of 5 | 20 | Zhao et al., 2021 |
#
# A class may have several words: "good" and "great" are both positive. `scores` [P, W] are ln p of W words behind P
# prompts, each word one row of a softmax over the whole vocabulary, so that a row's p add up to less than 1. `empty`
# [E, W] are those behind E prompts whose text says nothing ("N/A", "", "[MASK]"). `classes` gives each word's class, 0
# to C - 1, in any order; each class has a word. Compute the classes' probabilities [P, C]:
#
# 1. In each row, of both, the words' probabilities are divided by their sum.
# 2. Those of the E empty prompts are averaged (the probabilities, not their logarithms).
# 3. Each word's probability is divided by that mean, and again each row by its sum.
# 4. The words of each class are added up.
#
# - Scores may be -2000 throughout, as sums over long words are, or -inf for a word that cannot come. In `empty` each
#   word is possible behind some prompt: its mean in step 2 is 1e-30 or more.
# - Returns fp32; rows add up to 1. Scores may be fp16 or bf16; compute in fp32 or more.


# %%
def calibrated(scores: torch.Tensor, empty: torch.Tensor, classes: Sequence[int]) -> torch.Tensor:
    """Probabilities of classes.  scores [P, W], empty [E, W], classes: W numbers -> fp32 [P, C]"""
    ### BEGIN SOLUTION
    nothing = empty.double().softmax(1).mean(0)  # [W]
    p = (scores.double().log_softmax(1) - nothing.log()).softmax(1)
    of = torch.tensor(list(classes))
    return torch.stack([p[:, of == c].sum(1) for c in range(int(of.max()) + 1)], 1).float()
    ### END SOLUTION


# %%
check("13.5", calibrated)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Dividing by the sum of exponentials is a softmax, of logarithms that need not be small. Stay in logarithms until the
# last step, but average probabilities.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `softmax` of (ln p - ln of the mean) is step 3 as a whole. Then `p[:, of == c].sum(1)` for each class.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** If the model says "great" twice as often as "awful" behind a text without content, that factor says nothing
# about any text, and dividing takes it out. Words are calibrated **before** they are added up, as each has its own
# factor. Added up first, a frequent word drowns its rarer synonyms, and calibration repairs the sum only.
#
# Averaging logarithms instead would let one strange empty text, in which a word is as good as impossible, decide the
# mean. A calibrated score is not a better probability in general. It removes one bias, that of the prompt, and may add
# another: "N/A" is a text, too.

# %% [markdown]
# ## Exercise 13.6: a paired difference (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: is prompt A better, if each text was asked several times? | 3 of 5 | 20 | Miller, 2024 |
#
# Both prompts were asked the same N questions: `a` and `b` are what they scored, N truth values or numbers each, in a
# list, a tuple or a tensor, and question i is about text `texts[i]`. Several questions may be about one text (other
# seeds, other wordings); their errors are alike, so they are no independent cases. Return `(mean, low, high)`:
#
# - Each text's difference is the mean of a - b over its questions. `mean` is the mean over the **texts**, each counted
#   alike, however many questions it has.
# - The interval is mean ± 1.96 · s / √n for n texts, where s is the standard deviation of the texts' differences with
#   n - 1 in the divisor. Of one text there is none: -∞ to ∞.
# - Texts are named by anything that can be a key of a dictionary, and two names are one text where they would be one
#   key (1 and 1.0 are). A text's questions come in any order.
# - Scores may be large and their differences small: subtract in fp64, which Python's own floats are.
# - Raise ValueError for a, b and texts of different lengths, or without questions.


# %%
def paired(a: Sequence[float], b: Sequence[float], texts: Sequence[Hashable]) -> tuple[float, float, float]:
    """The mean of a - b over texts, and its interval of 95 %."""
    ### BEGIN SOLUTION
    if not len(a) == len(b) == len(texts) or not len(a):
        raise ValueError(f"texts: expected as many as answers, at least one, got {len(a)}, {len(b)} and {len(texts)}")
    of: dict[Hashable, list[float]] = {}
    for x, y, text in zip(a, b, texts, strict=True):
        of.setdefault(text, []).append(float(x) - float(y))
    each = torch.tensor([sum(found) / len(found) for found in of.values()], dtype=torch.float64)
    mean, n = float(each.mean()), len(each)
    half = 1.96 * float(each.std()) / n**0.5 if n > 1 else float("inf")
    return mean, mean - half, mean + half
    ### END SOLUTION


# %%
check("13.6", paired)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Gather differences by text in a dictionary. From there on there are n numbers, and nothing else counts.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `float(True) - float(False)` is 1.0, `True - False` on tensors is an error. `Tensor.std()` has n - 1 in its divisor
# and is NaN for one number.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Two numbers of 70 % and 74 % right, of 100 texts each, have intervals that overlap widely, and still the
# second may be clearly better: paired, the texts that both get right, or both wrong, drop out. What is left are the
# texts on which they differ.
#
# Asking each text ten times makes ten times as many answers and hardly more knowledge. Taken for independent cases,
# they make the interval three times too narrow. That is the commonest way in which prompts get better on paper.

# %% [markdown]
# ## Exercise 13.7: the score of an induction head (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: how much a head looks at what came after the same token, in any text | 3 of 5 | 25 | Olsson et al., 2022 |
#
# The lab finds induction heads by random tokens that come twice. Score them on **any** tokens, in which a token may
# come never again, or five times. `attention` [B, H, T, T] are the weights of a layer (row i: where position i looks),
# `ids` [B, T] the tokens.
#
# - For position i, what came after the same token are the positions j from 1 to i with `ids[j - 1] == ids[i]`. (j = i
#   is one of them where the token before is the same.)
# - A position counts if it has at least one such j. Its value, for each head, is the **sum** of its weights at all of
#   them.
# - A head's score is the mean over all positions that count, of all texts, each position alike. If none counts, it
#   is 0.
# - Text b has `lengths[b]` tokens; what stands behind them, in ids and attention (be it NaN), is padding, and no
#   position there counts. `lengths=None`: all T.
# - Returns fp32 [H]; weights may be fp16 or bf16, sums are made in fp32.


# %%
def induction(attention: torch.Tensor, ids: torch.Tensor, lengths: Sequence[int] | None = None) -> torch.Tensor:
    """The prefix-matching score of each head.  [B, H, T, T], [B, T] -> fp32 [H]"""
    ### BEGIN SOLUTION
    count = ids.shape[1]
    at = torch.arange(count)
    after = torch.zeros(len(ids), count, count, dtype=torch.bool)  # [B, i, j]
    after[:, :, 1:] = ids[:, :, None] == ids[:, None, :-1]
    after &= at <= at[:, None]
    ends = torch.tensor([count] * len(ids) if lengths is None else list(lengths), dtype=torch.int64)
    after &= (at < ends[:, None])[:, :, None]
    values = attention.float().masked_fill(~after[:, None], 0.0).sum(-1)  # [B, H, T]
    return values.sum((0, 2)) / after.any(-1).sum().clamp(min=1)
    ### END SOLUTION


# %%
check("13.7", induction)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Make one mask [B, T, T] of "j came after the same token as i" and do the rest by it: the values, and which positions
# count.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Compare `ids[:, :, None]` with `ids[:, None, :-1]`: that is the mask for j from 1 on. Then j <= i, then i below the
# length. `masked_fill` instead of a product: 0 · NaN is NaN.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A row of attention weights adds up to 1, so the score is a share: near 1 the head does nothing else. To
# judge one, compare with a head that looks everywhere alike. In tokens that come twice it has about 1 / T, and in
# English text with its many "the" far more. So a score on text says less than one on random tokens: "after the same
# token" is there also what is plausible anyway.
#
# The score says where a head looks, not what it does. Whether the model uses it only an intervention tells: put the
# head's mean in the place of its output, and see what is lost (the lab does).

# %% [markdown]
# ## Exercise 13.8: three bugs in a constraint (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: mend what keeps an output to one JSON string | 4 of 5 | 30 | Koo et al., 2024 |
#
# The output shall be one JSON string of at most `most` characters, in UTF-8, and nothing else:
#
# - A quote, then characters, then a quote. A character is one of Unicode's (not a quote, a backslash, or a control
#   character below U+0020), or a backslash and one of `"\/bfnrt`. Either counts as **one**; the two quotes around do
#   not count.
# - `text` are the bytes so far, the beginning of such an output; it may end within a character. Token i has the bytes
#   `tokens[i]`, None for a special one. It may come if text and token together are again the beginning of such an
#   output (or a whole one). So a token that ends within a character may come if it can be finished, and if it still
#   fits into `most`; bytes that are no UTF-8 may not.
# - Tokens of no bytes never come. The end token, number `end`, may come when the output is whole, and not before.
# - Returns bool [number of tokens].
#
# Three mistakes were planted. Each was, or is, in some library. Write the mended function.

# %%
STRING = re.compile(r'(?:"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*(?:\\|")?)?')  # a string's beginning, or all of it


def broken(text: bytes, tokens: Sequence[bytes | None], end: int, most: int) -> torch.Tensor:
    """The tokens that may come. Three mistakes."""
    so_far = text.decode(errors="ignore")
    found = torch.zeros(len(tokens), dtype=torch.bool)
    for i, token in enumerate(tokens):
        if token:
            after = so_far + token.decode(errors="ignore")
            inside = after.removeprefix('"').removesuffix('"')
            found[i] = bool(STRING.fullmatch(after)) and len(inside) <= most
    found[end] = len(so_far) > 1 and so_far.endswith('"')
    return found


# %% [markdown]
# The function that keeps to it. (Where bytes are no UTF-8, `bytes.decode` raises a UnicodeDecodeError: its `start` says
# where, and its `reason` is `"unexpected end of data"` if more bytes could help.)


# %%
def string_mask(text: bytes, tokens: Sequence[bytes | None], end: int, most: int) -> torch.Tensor:
    """The tokens that may come behind `text`.  -> bool [len(tokens)]"""
    ### BEGIN SOLUTION
    begins = re.compile(r'"((?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*)(\\|"|)')

    def fits(data: bytes, whole: bool = False) -> bool:
        known, part = data, False
        try:
            data.decode()
        except UnicodeDecodeError as e:
            if e.reason != "unexpected end of data":
                return False
            known, part = data[: e.start], True
        match = begins.fullmatch(known.decode())
        if not match or (part and match[2]):
            return False
        used = len(re.findall(r"\\.|[^\\]", match[1], re.DOTALL)) + (match[2] == "\\") + part
        return used <= most and (match[2] == '"' or not whole)

    found = torch.tensor([bool(token) and fits(text + token) for token in tokens], dtype=torch.bool)
    found[end] = fits(text, whole=True)
    return found
    ### END SOLUTION


# %%
check("13.8", string_mask)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Try the broken one with `text = b'"a\\"'` (a quote that belongs to the text), with the two bytes of é as two tokens,
# and with escapes at the limit.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Join the *bytes* of text and token, then decode what is whole. Bytes that are left over begin a character: it counts,
# and may stand neither behind a backslash nor behind the closing quote. Count escapes as one each: `re.findall` with
# "a backslash and one more, or one that is no backslash".
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The three: bytes that are no whole character were dropped, so a token with half an é counted as nothing (it
# was allowed anywhere, even behind the end, and the limit did not see it); a quote behind a backslash was taken for
# the end; an escape counted as two.
#
# All three disappear in an automaton over **bytes**: a state knows whether it is within a character or behind a
# backslash and how many characters came, the text itself is never looked at again, and a token costs a few steps
# instead of all that came before it. (Python's *incremental* decoder would not do: it takes ED A0, which no character
# begins with, for the beginning of one.) SmolLM2's vocabulary has hundreds of tokens that are no whole characters.
# Emoji are mostly written by such tokens.
