"""Wrong and alternative implementations of chapter 3's exercises: checks refuse the first, accept the second."""

import codecs
import heapq
import io
import math
import re
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from minillm.learn.testing import alternative, wrong

# ---- 3.w1 halve an interval ----------------------------------------------------------------------------------------


def _halve(probabilities, p, low, high, kept=lambda x, middle: x >= middle, enough=lambda mass, p: mass >= p):
    middle = (low + high) / 2
    return (middle, high) if enough(sum(x for x in probabilities if kept(x, middle)), p) else (low, middle)


@wrong("3.w1", "moves the wrong end")
def halve(probabilities, p, low, high):
    middle = (low + high) / 2
    return (low, middle) if sum(x for x in probabilities if x >= middle) >= p else (middle, high)


@wrong("3.w1", "keeps what is larger than the middle")
def halve(probabilities, p, low, high):
    return _halve(probabilities, p, low, high, kept=lambda x, middle: x > middle)


@wrong("3.w1", "wants more than p")
def halve(probabilities, p, low, high):
    return _halve(probabilities, p, low, high, enough=lambda mass, p: mass > p)


@wrong("3.w1", "adds up what lies below the middle")
def halve(probabilities, p, low, high):
    return _halve(probabilities, p, low, high, kept=lambda x, middle: x < middle)


@wrong("3.w1", "halves the upper end, whatever the lower one is")
def halve(probabilities, p, low, high):
    middle = high / 2
    return (middle, high) if sum(x for x in probabilities if x >= middle) >= p else (low, middle)


@wrong("3.w1", "stops at the first token below the middle, as if they were in order")
def halve(probabilities, p, low, high):
    mass, middle = 0.0, (low + high) / 2
    for x in probabilities:
        if x < middle:
            break
        mass += x
    return (middle, high) if mass >= p else (low, middle)


@wrong("3.w1", "takes the tokens that are not kept out of the list")
def halve(probabilities, p, low, high):
    ends = _halve(probabilities, p, low, high)
    probabilities[:] = [x for x in probabilities if x >= ends[0]]
    return ends


@alternative("3.w1", "by what is refused, in torch")
def halve(probabilities, p, low, high):
    x, middle = torch.tensor(probabilities, dtype=torch.float64), low + (high - low) / 2
    enough = float(torch.where(x >= middle, x, 0.0).sum()) >= p
    return [middle, high] if enough else [low, middle]


@wrong("3.w1", "equal ones count once")
def halve(probabilities, p, low, high):
    middle = (low + high) / 2
    enough = sum(x for x in set(probabilities) if x >= middle) >= p
    return (middle, high) if enough else (low, middle)


@wrong("3.w1", "only up to high")
def halve(probabilities, p, low, high):
    middle = (low + high) / 2
    enough = sum(x for x in probabilities if middle <= x <= high) >= p
    return (middle, high) if enough else (low, middle)


@wrong("3.w1", "stops when narrow")
def halve(probabilities, p, low, high):
    if high - low < 0.001:
        return (low, high)
    middle = (low + high) / 2
    enough = sum(x for x in probabilities if x >= middle) >= p
    return (middle, high) if enough else (low, middle)


# ---- 3.w2 the characters that are whole ------------------------------------------------------------------------------


@wrong("3.w2", "puts U+FFFD for what is not whole")
def whole_characters(data):
    return data.decode(errors="replace"), b""


@wrong("3.w2", "drops what is not whole")
def whole_characters(data):
    return data.decode(errors="ignore"), b""


@wrong("3.w2", "waits with all of it")
def whole_characters(data):
    try:
        return data.decode(), b""
    except UnicodeDecodeError:
        return "", data


@wrong("3.w2", "keeps one byte back")
def whole_characters(data):
    try:
        return data.decode(), b""
    except UnicodeDecodeError:
        return data[:-1].decode(errors="ignore"), data[-1:]


@wrong("3.w2", "tries to keep one or two bytes back, never three")
def whole_characters(data):
    for n in range(3):
        try:
            return data[: len(data) - n].decode(), data[len(data) - n :]
        except UnicodeDecodeError:
            continue
    return "", data


@wrong("3.w2", "with no bytes left the slice is everything")
def whole_characters(data):
    text = data.decode(errors="ignore")
    left = len(data) - len(text.encode())
    return text, data[-left:]


@alternative("3.w2", "tries to keep nothing back, then one, two, three bytes")
def whole_characters(data):
    for n in range(4):
        try:
            return data[: len(data) - n].decode(), data[len(data) - n :]
        except UnicodeDecodeError:
            continue
    return "", data


@alternative("3.w2", "ignores what is not whole and counts it")
def whole_characters(data):
    text = data.decode(errors="ignore")
    return text, data[len(text.encode()) :]


@wrong("3.w2", "utf-8-sig")
def whole_characters(data):
    try:
        return (data.decode("utf-8-sig"), b"")
    except UnicodeDecodeError as error:
        return (data[: error.start].decode(), data[error.start :])


@wrong("3.w2", "replace and count")
def whole_characters(data):
    t = data.decode(errors="replace")
    return (t[:-1], data[len(t[:-1].encode()) :]) if t.endswith(chr(65533)) else (t, b"")


@wrong("3.w2", "strips")
def whole_characters(data):
    try:
        return (data.decode().strip(), b"")
    except UnicodeDecodeError as error:
        return (data[: error.start].decode(), data[error.start :])


@wrong("3.w2", "splitlines")
def whole_characters(data):
    try:
        return (chr(10).join(data.decode().split(chr(13) + chr(10))), b"")
    except UnicodeDecodeError as error:
        return (data[: error.start].decode(), data[error.start :])


# ---- 3.w3 the mean over all ------------------------------------------------------------------------------------------


def _mean_over_all(means, counts):
    return sum(m * n for m, n in zip(means, counts, strict=True) if n) / sum(counts)


@wrong("3.w3", "the mean of the means")
def over_all(means, counts):
    found = [m for m, n in zip(means, counts, strict=True) if n]
    return sum(found) / len(found), math.exp(sum(found) / len(found))


@wrong("3.w3", "NaN times 0")
def over_all(means, counts):
    mean = sum(m * n for m, n in zip(means, counts, strict=True)) / sum(counts)
    return mean, math.exp(mean)


@wrong("3.w3", "the mean of the perplexities")
def over_all(means, counts):
    perplexity = sum(math.exp(m) * n for m, n in zip(means, counts, strict=True) if n) / sum(counts)
    return _mean_over_all(means, counts), perplexity


@wrong("3.w3", "a perplexity to the base of 2")
def over_all(means, counts):
    return _mean_over_all(means, counts), 2 ** _mean_over_all(means, counts)


@wrong("3.w3", "divides by the number of texts")
def over_all(means, counts):
    mean = sum(m * n for m, n in zip(means, counts, strict=True) if n) / len(counts)
    return mean, math.exp(mean)


@wrong("3.w3", "takes texts without tokens out of the lists")
def over_all(means, counts):
    while 0 in counts:
        del means[counts.index(0)], counts[counts.index(0)]
    return _mean_over_all(means, counts), math.exp(_mean_over_all(means, counts))


@alternative("3.w3", "NumPy's weighted average")
def over_all(means, counts):
    mean = np.average(np.nan_to_num(means), weights=counts)
    return mean, np.exp(mean)


@wrong("3.w3", "means of 0 left out")
def over_all(means, counts):
    ok = [(m, c) for m, c in zip(means, counts, strict=True) if m > 0]
    mean = sum((m * c for m, c in ok)) / sum((c for _, c in ok))
    return (mean, math.exp(mean))


# ---- 3.0 the training loop -------------------------------------------------------------------------------------------


def _rows(token_ids, batch, window, generator):
    starts = torch.randint(len(token_ids) - window, (batch,), generator=generator)
    return torch.stack([token_ids[start : start + window + 1] for start in starts.tolist()])


def _train(model, optimizer, token_ids, steps, batch, window, generator, loss_of=None, rows_of=_rows):
    losses = []
    for _ in range(steps):
        rows = rows_of(token_ids, batch, window, generator)
        if loss_of is None:
            loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        else:
            loss = loss_of(model, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@wrong("3.0", "does not shift: the target is the input")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    def loss_of(model, rows):
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, :-1].flatten())

    return _train(model, optimizer, token_ids, steps, batch, window, generator, loss_of)


@wrong("3.0", "shifts within the window: its last position has no target")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    def loss_of(model, rows):
        logits = model(rows[:, :-1])[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:-1].flatten())

    return _train(model, optimizer, token_ids, steps, batch, max(window, 2), generator, loss_of)


@wrong("3.0", "rolls the window: the last target is its first token")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    def loss_of(model, rows):
        inputs = rows[:, :-1]
        return F.cross_entropy(model(inputs).flatten(0, 1), inputs.roll(-1, 1).flatten())

    return _train(model, optimizer, token_ids, steps, batch, window, generator, loss_of)


@wrong("3.0", "draws from one window too few: the last token is never a target")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    def rows_of(ids, batch, window, generator):
        starts = torch.randint(max(len(ids) - window - 1, 1), (batch,), generator=generator)
        return ids[starts[:, None] + torch.arange(window + 1)]

    return _train(model, optimizer, token_ids, steps, batch, window, generator, rows_of=rows_of)


@wrong("3.0", "draws from torch's global generator")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    return _train(model, optimizer, token_ids, steps, batch, window, None)


@wrong("3.0", "draws the windows once, before the loop")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    rows = _rows(token_ids, batch, window, generator)
    return _train(model, optimizer, token_ids, steps, batch, window, generator, rows_of=lambda *_: rows)


@wrong("3.0", "draws window by window")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    def rows_of(ids, batch, window, generator):
        starts = [int(torch.randint(len(ids) - window, (1,), generator=generator)) for _ in range(batch)]
        return torch.stack([ids[start : start + window + 1] for start in starts[::-1]])

    return _train(model, optimizer, token_ids, steps, batch, window, generator, rows_of=rows_of)


@wrong("3.0", "windows one after the other, not drawn")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    def rows_of(ids, batch, window, generator):
        return torch.stack([ids[i : i + window + 1] for i in range(min(batch, len(ids) - window))])

    return _train(model, optimizer, token_ids, steps, batch, window, generator, rows_of=rows_of)


@wrong("3.0", "gradients add up over the steps")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    losses = []
    for _ in range(steps):
        rows = _rows(token_ids, batch, window, generator)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@wrong("3.0", "clears the gradients between backward and the step")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    losses = []
    for _ in range(steps):
        rows = _rows(token_ids, batch, window, generator)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.zero_grad()
        optimizer.step()
        losses.append(loss.item())
    return losses


@wrong("3.0", "the sum over a window, averaged over windows")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    def loss_of(model, rows):
        logits = model(rows[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum") / len(rows)

    return _train(model, optimizer, token_ids, steps, batch, window, generator, loss_of)


@wrong("3.0", "learns from the last position of each window alone")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    def loss_of(model, rows):
        return F.cross_entropy(model(rows[:, :-1])[:, -1], rows[:, -1])

    return _train(model, optimizer, token_ids, steps, batch, window, generator, loss_of)


@wrong("3.0", "the logarithm of a softmax that underflows")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    def loss_of(model, rows):
        return -model(rows[:, :-1]).softmax(-1).log().gather(-1, rows[:, 1:, None]).mean()

    return _train(model, optimizer, token_ids, steps, batch, window, generator, loss_of)


@wrong("3.0", "a step a window")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    losses = []
    for _ in range(steps):
        total = 0.0
        for row in _rows(token_ids, batch, window, generator):
            loss = F.cross_entropy(model(row[None, :-1])[0], row[1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / batch
        losses.append(total)
    return losses


@wrong("3.0", "clips the gradient")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    losses = []
    for _ in range(steps):
        rows = _rows(token_ids, batch, window, generator)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@wrong("3.0", "returns tensors, with their graphs")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    losses = []
    for _ in range(steps):
        rows = _rows(token_ids, batch, window, generator)
        losses.append(F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return losses


@wrong("3.0", "returns the losses after each step")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    losses = []
    for _ in range(steps):
        rows = _rows(token_ids, batch, window, generator)
        for after in (False, True):
            with torch.set_grad_enabled(not after):
                loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            if not after:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        losses.append(loss.item())
    return losses


@wrong("3.0", "returns the last loss")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    return (_train(model, optimizer, token_ids, steps, batch, window, generator) or [None])[-1]


@wrong("3.0", "halves the learning rate after each step")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    losses = []
    for _ in range(steps):
        losses += _train(model, optimizer, token_ids, 1, batch, window, generator)
        for group in optimizer.param_groups:
            group["lr"] /= 2
    return losses


@wrong("3.0", "shuffles the stream")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    losses = _train(model, optimizer, token_ids, steps, batch, window, generator)
    token_ids.copy_(token_ids.flip(0))
    return losses


@alternative("3.0", "unfold, log_softmax and gather; gradients cleared after the step")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    windows, losses = token_ids.unfold(0, window + 1, 1), []  # [N - window, T + 1]
    optimizer.zero_grad()
    for _ in range(steps):
        rows = windows[torch.randint(len(windows), (batch,), generator=generator)]
        loss = -model(rows[:, :-1]).log_softmax(-1).gather(-1, rows[:, 1:, None]).mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@wrong("3.0", "gradients cleared after the step only")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(token_ids) - window, (batch,), generator=generator)
        rows = token_ids[starts[:, None] + torch.arange(window + 1)]
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@wrong("3.0", "clips to 100")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(token_ids) - window, (batch,), generator=generator)
        rows = token_ids[starts[:, None] + torch.arange(window + 1)]
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 100.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@wrong("3.0", "stops at NaN or rise")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(token_ids) - window, (batch,), generator=generator)
        rows = token_ids[starts[:, None] + torch.arange(window + 1)]
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if losses and loss.item() > 2 * losses[0]:
            break
        losses.append(loss.item())
    return losses


@wrong("3.0", "last tenth held out")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(token_ids) - window, (batch,), generator=generator).clamp(
            max=max(1, len(token_ids) - window - 2)
        )
        rows = token_ids[starts[:, None] + torch.arange(window + 1)]
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@wrong("3.0", "parameters' grads alone: model.zero_grad")
def train(model, optimizer, token_ids, steps, batch, window, generator):
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(token_ids) - window, (batch,), generator=generator)
        rows = token_ids[starts[:, None] + torch.arange(window + 1)]
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        [setattr(p, "grad", None) for p in optimizer.param_groups[0]["params"]]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- 3.1 learn the merges ------------------------------------------------------------------------------------------


def _spell(word):
    return [bytes([byte]) for byte in word.encode()]


def _join(symbols, pair):
    out, i = [], 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            out.append(pair[0] + pair[1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out


def _best(pairs):
    return min(pairs, key=lambda pair: (-pairs[pair], pair))


def _learn(word_counts, num_merges, min_count=1, spell=_spell, join=_join, pairs_of=pairwise, best=_best, weigh=True):
    words = {word: spell(word) for word in word_counts}
    merges = []
    for _ in range(num_merges):
        pairs = Counter()
        for word, symbols in words.items():
            for pair in pairs_of(symbols):
                pairs[pair] += word_counts[word] if weigh else 1
        if not pairs or pairs[best(pairs)] < min_count:
            break
        merges.append(best(pairs))
        words = {word: join(symbols, merges[-1]) for word, symbols in words.items()}
    return merges


@wrong("3.1", "counts each distinct word once")
def learn_merges(word_counts, num_merges, min_count=1):
    return _learn(word_counts, num_merges, min_count, weigh=False)


@wrong("3.1", "counts a pair once a word")
def learn_merges(word_counts, num_merges, min_count=1):
    return _learn(word_counts, num_merges, min_count, pairs_of=lambda symbols: set(pairwise(symbols)))


@wrong("3.1", "counts aaa as one pair, without overlap")
def learn_merges(word_counts, num_merges, min_count=1):
    def pairs_of(symbols):
        last, found = {}, []
        for i, pair in enumerate(pairwise(symbols)):
            if last.get(pair, -2) < i - 1:
                found.append(pair)
                last[pair] = i
        return found

    return _learn(word_counts, num_merges, min_count, pairs_of=pairs_of)


@wrong("3.1", "takes the first of equally frequent pairs")
def learn_merges(word_counts, num_merges, min_count=1):
    return _learn(word_counts, num_merges, min_count, best=lambda pairs: max(pairs, key=pairs.get))


@wrong("3.1", "takes the largest of equally frequent pairs")
def learn_merges(word_counts, num_merges, min_count=1):
    return _learn(word_counts, num_merges, min_count, best=lambda pairs: max(pairs, key=lambda p: (pairs[p], p)))


@wrong("3.1", "compares equally frequent pairs by what they spell")
def learn_merges(word_counts, num_merges, min_count=1):
    return _learn(
        word_counts, num_merges, min_count, best=lambda pairs: min(pairs, key=lambda p: (-pairs[p], p[0] + p[1]))
    )


@wrong("3.1", "takes of equally frequent pairs the one of the oldest tokens")
def learn_merges(word_counts, num_merges, min_count=1):
    merges = []
    for n in range(1, num_merges + 1):

        def age(token, known=tuple(merges)):
            joined = [a + b for a, b in known]
            return 256 + joined.index(token) if token in joined else token[0]

        best = lambda pairs: min(pairs, key=lambda p: (-pairs[p], age(p[0]), age(p[1])))  # noqa: E731
        found = _learn(word_counts, n, min_count, best=best)
        if len(found) < n:
            break
        merges = found
    return merges


@wrong("3.1", "joins from right to left")
def learn_merges(word_counts, num_merges, min_count=1):
    def join(symbols, pair):
        turned = _join(symbols[::-1], pair[::-1])
        return [pair[0] + pair[1] if token == pair[1] + pair[0] and len(token) > 1 else token for token in turned][::-1]

    return _learn(word_counts, num_merges, min_count, join=join)


@wrong("3.1", "counts words in place: word_counts is used up")
def learn_merges(word_counts, num_merges, min_count=1):
    merges = _learn(word_counts, num_merges, min_count)
    word_counts.clear()
    return merges


@wrong("3.1", "drops words of one letter from word_counts")
def learn_merges(word_counts, num_merges, min_count=1):
    for word in [word for word in word_counts if len(word) < 2]:
        del word_counts[word]
    return _learn(word_counts, num_merges, min_count)


@wrong("3.1", "spells characters instead of bytes")
def learn_merges(word_counts, num_merges, min_count=1):
    return _learn(word_counts, num_merges, min_count, spell=lambda word: [c.encode() for c in word])


@wrong("3.1", "counts once and takes the most frequent pairs of single bytes")
def learn_merges(word_counts, num_merges, min_count=1):
    pairs = Counter()
    for word, count in word_counts.items():
        for pair in pairwise(_spell(word)):
            pairs[pair] += count
    frequent = [pair for pair in pairs if pairs[pair] >= min_count]
    return sorted(frequent, key=lambda pair: (-pairs[pair], pair))[:num_merges]


@wrong("3.1", "does not stop when no pair is left")
def learn_merges(word_counts, num_merges, min_count=1):
    merges = _learn(word_counts, num_merges, min_count)
    return merges + [(b"", b"")] * (num_merges - len(merges))


@wrong("3.1", "joins only the first place in each word")
def learn_merges(word_counts, num_merges, min_count=1):
    def join(symbols, pair):
        for i, found in enumerate(pairwise(symbols)):
            if found == pair:
                return [*symbols[:i], pair[0] + pair[1], *symbols[i + 2 :]]
        return symbols

    return _learn(word_counts, num_merges, min_count, join=join)


@wrong("3.1", "ignores min_count")
def learn_merges(word_counts, num_merges, min_count=1):
    return _learn(word_counts, num_merges)


@wrong("3.1", "stops at a pair that occurs min_count times")
def learn_merges(word_counts, num_merges, min_count=1):
    return _learn(word_counts, num_merges, min_count + 1 if min_count > 1 else 1)


@wrong("3.1", "leaves out words that occur fewer than min_count times")
def learn_merges(word_counts, num_merges, min_count=1):
    return _learn({word: n for word, n in word_counts.items() if n >= min_count}, num_merges, min_count)


@wrong("3.1", "joins one pair too many: looks at min_count afterwards")
def learn_merges(word_counts, num_merges, min_count=1):
    sure = _learn(word_counts, num_merges, min_count)
    return _learn(word_counts, min(len(sure) + (min_count > 1), num_merges))


@alternative("3.1", "counts anew only the words that hold the joined pair")
def learn_merges(word_counts, num_merges, min_count=1):
    words = {word: _spell(word) for word in word_counts}
    pairs, where = Counter(), defaultdict(set)
    for word, symbols in words.items():
        for pair in pairwise(symbols):
            pairs[pair] += word_counts[word]
            where[pair].add(word)
    merges = []
    while len(merges) < num_merges and (left := {p: n for p, n in pairs.items() if n > 0 and n >= min_count}):
        best = _best(left)
        merges.append(best)
        for word in where[best]:
            for pair in pairwise(words[word]):
                pairs[pair] -= word_counts[word]
            words[word] = _join(words[word], best)
            for pair in pairwise(words[word]):
                pairs[pair] += word_counts[word]
                where[pair] = where[pair] | {word}
    return merges


# ---- 3.2 encode a word ---------------------------------------------------------------------------------------------


def _encode(word, table, key=lambda rank, i: (rank, i), spell=_spell):
    tokens, ranks = spell(word), []
    while known := [(key(table[pair], i), i) for i, pair in enumerate(pairwise(tokens)) if pair in table]:
        i = min(known)[1]
        ranks.append(table[tokens[i], tokens[i + 1]])
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
    return tokens, ranks


@wrong("3.2", "takes the longest token of the vocabulary first")
def encode_word(word, table):
    vocab = {a + b for a, b in table}
    data, tokens = word.encode(), []
    while data:
        size = next((n for n in range(len(data), 1, -1) if data[:n] in vocab), 1)
        tokens.append(data[:size])
        data = data[size:]
    return tokens, [rank for token in tokens for rank in _encode(token.decode(errors="ignore"), table)[1]]


@wrong("3.2", "takes the longest token first, and the right ranks")
def encode_word(word, table):
    vocab = {a + b for a, b in table}
    data, tokens = word.encode(), []
    while data:
        size = next((n for n in range(len(data), 1, -1) if data[:n] in vocab), 1)
        tokens.append(data[:size])
        data = data[size:]
    return tokens, _encode(word, table)[1]


@wrong("3.2", "joins the leftmost known pair, whatever its rank")
def encode_word(word, table):
    return _encode(word, table, key=lambda rank, i: i)


@wrong("3.2", "takes the largest rank first")
def encode_word(word, table):
    return _encode(word, table, key=lambda rank, i: (-rank, i))


@wrong("3.2", "takes the rightmost of equal ranks")
def encode_word(word, table):
    return _encode(word, table, key=lambda rank, i: (rank, -i))


@wrong("3.2", "goes through the word once")
def encode_word(word, table):
    tokens, ranks = [], []
    for symbol in _spell(word):
        if tokens and (tokens[-1], symbol) in table:
            ranks.append(table[tokens[-1], symbol])
            tokens[-1] += symbol
        else:
            tokens.append(symbol)
    return tokens, ranks


@wrong("3.2", "spells characters instead of bytes")
def encode_word(word, table):
    return _encode(word, table, spell=lambda word: [character.encode() for character in word])


@wrong("3.2", "applies the merges in the order of the dictionary")
def encode_word(word, table):
    tokens, ranks = _spell(word), []
    for pair, rank in table.items():
        joined = _join(tokens, pair)
        ranks += [rank] * (len(tokens) - len(joined))
        tokens = joined
    return tokens, sorted(ranks)


@wrong("3.2", "takes the position in the dictionary for the rank")
def encode_word(word, table):
    return _encode(word, {pair: i for i, pair in enumerate(table)})


@wrong("3.2", "notes a rank once for all the places it joins")
def encode_word(word, table):
    tokens, ranks = _encode(word, table)
    return tokens, sorted(set(ranks))


@wrong("3.2", "returns the positions of the joins")
def encode_word(word, table):
    tokens, positions = _spell(word), []
    while known := [(table[pair], i) for i, pair in enumerate(pairwise(tokens)) if pair in table]:
        i = min(known)[1]
        positions.append(i)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
    return tokens, positions


@wrong("3.2", "returns the ranks of the last joins of the tokens, from left to right")
def encode_word(word, table):
    tokens, _ = _encode(word, table)
    of_token = {a + b: rank for (a, b), rank in table.items()}
    return tokens, [of_token[token] for token in tokens if token in of_token]


@wrong("3.2", "returns the tokens alone")
def encode_word(word, table):
    return _encode(word, table)[0]


@wrong("3.2", "takes what it used out of the table")
def encode_word(word, table):
    tokens, ranks = _encode(word, table)
    for pair in [pair for pair, rank in table.items() if rank in ranks]:
        del table[pair]
    return tokens, ranks


@wrong("3.2", "takes rank 0 for no pair")
def encode_word(word, table):
    return _encode(word, {pair: rank for pair, rank in table.items() if rank})


@wrong("3.2", "takes the ranks to be 0, 1, 2, ... without gaps")
def encode_word(word, table):
    return _encode(word, {pair: rank for pair, rank in table.items() if rank < len(table)})


@wrong("3.2", "remembers words, whatever the table")
def encode_word(word, table, known={}):  # noqa: B006
    if word not in known:
        known[word] = _encode(word, table)
    return known[word]


@wrong("3.2", "adds the pairs that it looked up to the table")
def encode_word(word, table):
    result = _encode(word, table)
    for pair in pairwise(_spell(word)):
        table.setdefault(pair, 10**9)
    return result


@alternative("3.2", "applies every merge of the table in turn, by rank")
def encode_word(word, table):
    tokens, ranks = _spell(word), []
    for pair in sorted(table, key=table.get):
        joined = _join(tokens, pair)
        ranks += [table[pair]] * (len(tokens) - len(joined))
        tokens = joined
    return tokens, ranks


@alternative("3.2", "a heap of pairs over a linked list")
def encode_word(word, table):
    tokens, ranks = _spell(word), []
    n = len(tokens)
    after, before = list(range(1, n + 1)), list(range(-1, n - 1))
    heap = [(table[pair], i, *pair) for i, pair in enumerate(pairwise(tokens)) if pair in table]
    heapq.heapify(heap)
    while heap:
        rank, i, left, right = heapq.heappop(heap)
        j = after[i]
        if tokens[i] != left or j >= n or tokens[j] != right:
            continue  # one of the two has been joined to another
        ranks.append(rank)
        tokens[i], tokens[j], after[i] = left + right, None, after[j]
        if after[i] < n:
            before[after[i]] = i
        for k in (before[i], i):
            if k >= 0 and after[k] < n and (pair := (tokens[k], tokens[after[k]])) in table:
                heapq.heappush(heap, (table[pair], k, *pair))
    return [token for token in tokens if token is not None], ranks


# ---- 3.3 one step of training, in pieces ---------------------------------------------------------------------------


def _sum(model, part, pad_id):
    """The summed loss of some rows, and how many targets they hold."""
    logits, targets = model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()
    return F.cross_entropy(logits, targets, ignore_index=pad_id, reduction="sum"), (targets != pad_id).sum()


def _count(batch, pad_id):
    return (batch[:, 1:] != pad_id).sum()


@wrong("3.3", "does not shift: the target is the input")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    total = 0.0
    for part in batch.chunk(pieces):
        logits = model(part).flatten(0, 1)
        loss = F.cross_entropy(logits, part.flatten(), ignore_index=pad_id, reduction="sum")
        loss = loss / (batch != pad_id).sum()
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


@wrong("3.3", "shifts the wrong way: predicts the token before")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    total = 0.0
    for part in batch.chunk(pieces):
        logits, targets = model(part)[:, 1:].flatten(0, 1), part[:, :-1].flatten()
        loss = F.cross_entropy(logits, targets, ignore_index=pad_id, reduction="sum") / _count(batch, pad_id)
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


@wrong("3.3", "learns to predict padding")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    total = 0.0
    for part in batch.chunk(pieces):
        loss = F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()) / pieces
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


@wrong("3.3", "divides by all positions, padding included")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    total = 0.0
    for part in batch.chunk(pieces):
        loss = _sum(model, part, pad_id)[0] / batch[:, 1:].numel()
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


@wrong("3.3", "ignores token 0 whatever pad_id is")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    total = 0.0
    for part in batch.chunk(pieces):
        loss = _sum(model, part, 0)[0] / _count(batch, 0)
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


@wrong("3.3", "the mean of the parts' means")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    total = 0.0
    for part in batch.chunk(pieces):
        loss, count = _sum(model, part, pad_id)
        loss = loss / count.clamp(min=1) / pieces
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


@wrong("3.3", "adds the parts' means up")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    total = 0.0
    for part in batch.chunk(pieces):
        loss, count = _sum(model, part, pad_id)
        loss = loss / count.clamp(min=1)
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


@wrong("3.3", "0 / 0 for a part without targets")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    total, count = 0.0, _count(batch, pad_id)
    for part in batch.chunk(pieces):
        loss, targets = _sum(model, part, pad_id)
        loss = loss / targets * (targets / count)
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


@wrong("3.3", "the mean of the rows' means")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    total, rows = 0.0, (batch[:, 1:] != pad_id).any(1).sum()
    for part in batch.chunk(pieces):
        logits, targets = model(part[:, :-1]), part[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=pad_id, reduction="none").sum(1)
        loss = (losses / (targets != pad_id).sum(1).clamp(min=1)).sum() / rows
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


@wrong("3.3", "a step a part")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    total = 0.0
    for part in batch.chunk(pieces):
        optimizer.zero_grad()
        loss = _sum(model, part, pad_id)[0] / _count(batch, pad_id)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total


@wrong("3.3", "clears the gradients before each part, so that only the last one counts")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    total = 0.0
    for part in batch.chunk(pieces):
        optimizer.zero_grad()
        loss = _sum(model, part, pad_id)[0] / _count(batch, pad_id)
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


@wrong("3.3", "adds gradients up over steps")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    total = 0.0
    for part in batch.chunk(pieces):
        loss = _sum(model, part, pad_id)[0] / _count(batch, pad_id)
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


@wrong("3.3", "clears the gradients between backward and the step")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    total = 0.0
    for part in batch.chunk(pieces):
        loss = _sum(model, part, pad_id)[0] / _count(batch, pad_id)
        loss.backward()
        total += loss.item()
    optimizer.zero_grad()
    optimizer.step()
    return total


@wrong("3.3", "clips the gradient to length 1")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    total = 0.0
    for part in batch.chunk(pieces):
        loss = _sum(model, part, pad_id)[0] / _count(batch, pad_id)
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return total


@wrong("3.3", "shows the whole batch at once")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    loss = _sum(model, batch, pad_id)[0] / _count(batch, pad_id)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong("3.3", "one backward for all parts, which keeps all their activations")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    loss = sum(_sum(model, part, pad_id)[0] for part in batch.chunk(pieces)) / _count(batch, pad_id)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong("3.3", "returns the last part's loss")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    for part in batch.chunk(pieces):
        loss = _sum(model, part, pad_id)[0] / _count(batch, pad_id)
        loss.backward()
    optimizer.step()
    return loss.item()


@wrong("3.3", "returns the loss after the step")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    for part in batch.chunk(pieces):
        (_sum(model, part, pad_id)[0] / _count(batch, pad_id)).backward()
    optimizer.step()
    with torch.no_grad():
        return sum(_sum(model, part, pad_id)[0].item() for part in batch.chunk(pieces)) / _count(batch, pad_id).item()


@wrong("3.3", "returns the tensor with its graph")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    total = 0.0
    for part in batch.chunk(pieces):
        loss = _sum(model, part, pad_id)[0] / _count(batch, pad_id)
        loss.backward()
        total = total + loss
    optimizer.step()
    return total


def _step(model, optimizer, batch, pad_id, pieces, loss_of, count=None):
    optimizer.zero_grad()
    total, count = 0.0, _count(batch, pad_id) if count is None else count
    for part in batch.chunk(pieces):
        loss = loss_of(model, part) / count
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


@wrong("3.3", "counts targets as real tokens less one a row, also for a row without any")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    count = (batch != pad_id).sum() - len(batch)
    return _step(model, optimizer, batch, pad_id, pieces, lambda model, part: _sum(model, part, pad_id)[0], count)


@wrong("3.3", "the logarithm of a softmax that underflows")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    def loss_of(model, part):
        targets = part[:, 1:]
        logprobs = model(part[:, :-1]).softmax(-1).log().gather(-1, targets[..., None])[..., 0]
        return -torch.where(targets == pad_id, 0.0, logprobs).sum()

    return _step(model, optimizer, batch, pad_id, pieces, loss_of)


@wrong("3.3", "rolls: the last position's target is the first token")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    def loss_of(model, part):
        return F.cross_entropy(
            model(part).flatten(0, 1), part.roll(-1, 1).flatten(), ignore_index=pad_id, reduction="sum"
        )

    return _step(model, optimizer, batch, pad_id, pieces, loss_of, (batch != pad_id).sum())


@wrong("3.3", "parts of every k-th row")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    turned = torch.cat([batch[i::pieces] for i in range(pieces)])
    return _step(model, optimizer, turned, pad_id, pieces, lambda model, part: _sum(model, part, pad_id)[0])


@wrong("3.3", "keeps the gradient that stood there before: clears at the end alone")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    total = 0.0
    for part in batch.chunk(pieces):
        loss = _sum(model, part, pad_id)[0] / _count(batch, pad_id)
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


@wrong("3.3", "moves the parameters itself")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    total = 0.0
    for part in batch.chunk(pieces):
        loss = _sum(model, part, pad_id)[0] / _count(batch, pad_id)
        loss.backward()
        total += loss.item()
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad
    return total


@wrong("3.3", "writes -100 over the padding of the batch")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    def loss_of(model, part):
        logits, targets = model(part[:, :-1]).flatten(0, 1), part[:, 1:]
        targets[targets == pad_id] = -100
        return F.cross_entropy(logits, targets.flatten(), reduction="sum")

    return _step(model, optimizer, batch, pad_id, pieces, loss_of, _count(batch, pad_id))


@alternative("3.3", "gathers log probabilities by hand and clears gradients at both ends")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    count, total = _count(batch, pad_id), 0.0
    for part in batch.split(len(batch) // pieces):
        targets = part[:, 1:]
        logprobs = model(part)[:, :-1].log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        loss = -logprobs[targets != pad_id].sum() / count
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


@alternative("3.3", "backward on the sums, and the gradients divided before the step")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    optimizer.zero_grad()
    total, count = 0.0, 0
    for part in batch.chunk(pieces):
        loss, targets = _sum(model, part, pad_id)
        loss.backward()
        total, count = total + loss.item(), count + targets.item()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad /= count
    optimizer.step()
    return total / count


@wrong("3.3", "clips to 10")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    count = (batch[:, 1:] != pad_id).sum()
    total = 0.0
    optimizer.zero_grad()
    for part in batch.chunk(pieces):
        logits = model(part[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, part[:, 1:].flatten(), ignore_index=pad_id, reduction="sum") / count
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 10.0)
    optimizer.step()
    return total


@wrong("3.3", "clears only where gradient... when pieces > 1")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    count = (batch[:, 1:] != pad_id).sum()
    total = 0.0
    if pieces > 1:
        optimizer.zero_grad()
    for part in batch.chunk(pieces):
        logits = model(part[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, part[:, 1:].flatten(), ignore_index=pad_id, reduction="sum") / count
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


@wrong("3.3", "clears first group")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    count = (batch[:, 1:] != pad_id).sum()
    total = 0.0
    for p in optimizer.param_groups[0]["params"]:
        p.grad = None
    for part in batch.chunk(pieces):
        logits = model(part[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, part[:, 1:].flatten(), ignore_index=pad_id, reduction="sum") / count
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


@wrong("3.3", "one row a time")
def training_step(model, optimizer, batch, pad_id, pieces=1):
    count = (batch[:, 1:] != pad_id).sum()
    total = 0.0
    optimizer.zero_grad()
    for part in batch.split(1):
        logits = model(part[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, part[:, 1:].flatten(), ignore_index=pad_id, reduction="sum") / count
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


# ---- 3.4 the loss of every token of a long text --------------------------------------------------------------------


def _losses(model, ids, targets):
    with torch.no_grad():
        return F.cross_entropy(model(ids[None])[0].float(), targets, reduction="none")


def _windows(count, window, stride):
    """(begin, end, first entry that is new) of every window."""
    last, scored = count - 1, 0
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        yield begin, end, scored
        scored = end
        if end == last:
            break


def _right(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    return torch.cat(
        [
            _losses(model, ids[begin:end], ids[begin + 1 : end + 1])[scored - begin :]
            for begin, end, scored in _windows(len(ids), window, stride)
        ]
    )


@wrong("3.4", "each window predicts within itself, so its first token is scored by nobody")
def token_losses(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    parts = [ids[begin : begin + window] for begin in range(0, len(ids), window)]
    return torch.cat([_losses(model, part[:-1], part[1:]) for part in parts if len(part) > 1])


@wrong("3.4", "scores every prediction of every window")
def token_losses(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    windows = _windows(len(ids), window, stride)
    return torch.cat([_losses(model, ids[begin:end], ids[begin + 1 : end + 1]) for begin, end, _ in windows])


@wrong("3.4", "later windows overwrite what earlier ones scored with more context")
def token_losses(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    losses = torch.empty(len(ids) - 1)
    for begin, end, _ in _windows(len(ids), window, stride):
        losses[begin:end] = _losses(model, ids[begin:end], ids[begin + 1 : end + 1])
    return losses


@wrong("3.4", "windows side by side, whatever the stride")
def token_losses(model, token_ids, window, stride):
    return _right(model, token_ids, window, window)


@wrong("3.4", "drops the tail that fills no window")
def token_losses(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    losses, scored, last = [], 0, len(ids) - 1
    for begin in range(0, max(last - window, 0) + 1, stride):
        end = min(begin + window, last)
        losses.append(_losses(model, ids[begin:end], ids[begin + 1 : end + 1])[scored - begin :])
        scored = end
    return torch.cat(losses)


@wrong("3.4", "new windows score the last `stride` tokens, also at the end of the text")
def token_losses(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    losses = []
    for begin, end, _ in _windows(len(ids), window, stride):
        fresh = _losses(model, ids[begin:end], ids[begin + 1 : end + 1])
        losses.append(fresh[-stride:] if begin else fresh)
    return torch.cat(losses)


@wrong("3.4", "returns the mean")
def token_losses(model, token_ids, window, stride):
    return _right(model, token_ids, window, stride).mean()


@wrong("3.4", "returns ln p without the minus")
def token_losses(model, token_ids, window, stride):
    return -_right(model, token_ids, window, stride)


@wrong("3.4", "returns probabilities")
def token_losses(model, token_ids, window, stride):
    return (-_right(model, token_ids, window, stride)).exp()


@wrong("3.4", "keeps a place for token 0")
def token_losses(model, token_ids, window, stride):
    return torch.cat([torch.zeros(1), _right(model, token_ids, window, stride)])


@wrong("3.4", "goes on when all is scored")
def token_losses(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    losses, scored, last = [], 0, len(ids) - 1
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        fresh = _losses(model, ids[begin:end], ids[begin + 1 : end + 1])
        losses.append(fresh[len(fresh) - (end - scored) :])
        scored = end
    return torch.cat(losses)


@wrong("3.4", "keeps the graph")
def token_losses(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    losses = []
    for begin, end, scored in _windows(len(ids), window, stride):
        logits = model(ids[None, begin:end])[0].float()
        losses.append(F.cross_entropy(logits, ids[begin + 1 : end + 1], reduction="none")[scored - begin :])
    return torch.cat(losses)


@wrong("3.4", "a softmax in bfloat16 when the logits are")
def token_losses(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    losses = []
    for begin, end, scored in _windows(len(ids), window, stride):
        with torch.no_grad():
            logprobs = model(ids[None, begin:end])[0].log_softmax(-1)
        losses.append(-logprobs.gather(-1, ids[begin + 1 : end + 1, None])[scored - begin :, 0].float())
    return torch.cat(losses)


@wrong("3.4", "the logarithm of a softmax that underflows")
def token_losses(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    losses = []
    for begin, end, scored in _windows(len(ids), window, stride):
        with torch.no_grad():
            p = model(ids[None, begin:end])[0].float().softmax(-1)
        losses.append(-p.log().gather(-1, ids[begin + 1 : end + 1, None])[scored - begin :, 0])
    return torch.cat(losses)


@wrong("3.4", "computes in the logits' dtype, and returns it")
def token_losses(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    losses = []
    for begin, end, scored in _windows(len(ids), window, stride):
        with torch.no_grad():
            logits = model(ids[None, begin:end])[0]
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        losses.append(F.cross_entropy(logits, ids[begin + 1 : end + 1], reduction="none")[scored - begin :])
    return torch.cat(losses)


@wrong("3.4", "moves the last window back, so that it is full")
def token_losses(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    losses = torch.empty(len(ids) - 1)
    for begin, end, scored in _windows(len(ids), window, stride):
        begin = max(0, min(begin, end - window))
        losses[scored:end] = _losses(model, ids[begin:end], ids[begin + 1 : end + 1])[scored - begin :]
    return losses


@wrong("3.4", "takes the last token off the list")
def token_losses(model, token_ids, window, stride):
    losses = _right(model, token_ids, window, stride)
    token_ids.pop()
    return losses


@wrong("3.4", "returns a list")
def token_losses(model, token_ids, window, stride):
    return _right(model, token_ids, window, stride).tolist()


@alternative("3.4", "a list of the losses of all tokens, filled from left to right")
def token_losses(model, token_ids, window, stride):
    losses, begin = [], 0
    while len(losses) < len(token_ids) - 1:
        end = min(begin + window, len(token_ids) - 1)
        with torch.no_grad():
            logprobs = model(torch.tensor([token_ids[begin:end]]))[0].float().log_softmax(-1)
        losses += [-logprobs[i - 1 - begin, token_ids[i]].item() for i in range(len(losses) + 1, end + 1)]
        begin += stride
    return torch.tensor(losses)


@alternative("3.4", "shows the text's last token, too, and drops its row")
def token_losses(model, token_ids, window, stride):
    ids, losses = torch.tensor(token_ids), []
    for begin in range(0, len(ids), stride):
        part = ids[begin : begin + window]
        with torch.no_grad():
            logprobs = F.log_softmax(model(part[None])[0], -1, dtype=torch.float32)
        targets = ids[begin + 1 : begin + window + 1]
        found = -logprobs[: len(targets)].gather(-1, targets[:, None])[:, 0]
        losses.append(found[sum(map(len, losses)) - begin :])
        if begin + window >= len(ids) - 1:
            break
    return torch.cat(losses)


@alternative("3.4", "all windows from last to first, the earlier overwriting the later")
def token_losses(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    losses = torch.empty(len(ids) - 1)
    for begin, end, _ in reversed(list(_windows(len(ids), window, stride))):
        losses[begin:end] = _losses(model, ids[begin:end], ids[begin + 1 : end + 1])
    return losses


@wrong("3.4", "shows a window more")
def token_losses(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    last = len(ids) - 1
    losses = torch.empty(last)
    scored = 0
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        with torch.no_grad():
            logits = model(ids[None, begin:end])[0].float()
        losses[scored:end] = F.cross_entropy(logits[scored - begin :], ids[scored + 1 : end + 1], reduction="none")
        scored = end
        if scored == last and begin > 0:
            break
    return losses


@wrong("3.4", "leaves gradients off")
def token_losses(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    last = len(ids) - 1
    losses = torch.empty(last)
    scored = 0
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        torch.set_grad_enabled(False)
        if True:
            logits = model(ids[None, begin:end])[0].float()
        losses[scored:end] = F.cross_entropy(logits[scored - begin :], ids[scored + 1 : end + 1], reduction="none")
        scored = end
        if scored == last:
            break
    return losses


@wrong("3.4", "token ids appended")
def token_losses(model, token_ids, window, stride):
    token_ids.append(token_ids[0])
    ids = torch.tensor(token_ids)
    last = len(ids) - 2
    token_ids.pop() if last > 5 else None
    losses = torch.empty(last)
    scored = 0
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        with torch.no_grad():
            logits = model(ids[None, begin:end])[0].float()
        losses[scored:end] = F.cross_entropy(logits[scored - begin :], ids[scored + 1 : end + 1], reduction="none")
        scored = end
        if scored == last:
            break
    return losses


@wrong("3.4", "NaN as 0")
def token_losses(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    last = len(ids) - 1
    losses = torch.empty(last)
    scored = 0
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        with torch.no_grad():
            logits = model(ids[None, begin:end])[0].float()
        losses[scored:end] = F.cross_entropy(logits[scored - begin :], ids[scored + 1 : end + 1], reduction="none")
        scored = end
        if scored == last:
            break
    return losses.nan_to_num(posinf=0.0)


@wrong("3.4", "window of one: whole")
def token_losses(model, token_ids, window, stride):
    window = max(window, 2)
    ids = torch.tensor(token_ids)
    last = len(ids) - 1
    losses = torch.empty(last)
    scored = 0
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        with torch.no_grad():
            logits = model(ids[None, begin:end])[0].float()
        losses[scored:end] = F.cross_entropy(logits[scored - begin :], ids[scored + 1 : end + 1], reduction="none")
        scored = end
        if scored == last:
            break
    return losses


# ---- 3.5 the nucleus without a sort --------------------------------------------------------------------------------


def _sorted_set(logits, p):
    """What stays, by the sorted definition."""
    p = torch.as_tensor(p).reshape(-1, 1)
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    refused = (probabilities.cumsum(-1) - probabilities >= p) & (p < 1)
    return torch.zeros_like(refused).scatter(-1, order, refused)


def _bisect(probabilities, p, rounds=200, step=lambda mass, p: mass >= p):
    """The two ends of the interval, [B, 1] each."""
    low, high = torch.zeros(len(probabilities), 1), torch.full((len(probabilities), 1), 2.0)
    for _ in range(rounds):
        middle = (low + high) / 2
        mass = (probabilities * (probabilities >= middle)).sum(-1, keepdim=True)
        enough = step(mass, p)
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low, high


def _column(p):
    return torch.as_tensor(p, dtype=torch.float32).reshape(-1, 1)


def _cut(logits, refused):
    return logits.masked_fill(refused, float("-inf"))


@wrong("3.5", "sorts")
def keep_top_p(logits, p):
    return _cut(logits, _sorted_set(logits, p))


@wrong("3.5", "sorts for the threshold, then keeps equal tokens together")
def keep_top_p(logits, p):
    least = logits.masked_fill(_sorted_set(logits, p), float("inf")).amin(-1, keepdim=True)
    return _cut(logits, logits < least)


@wrong("3.5", "throws out the token that crosses p: keeps what lies above the other end")
def keep_top_p(logits, p):
    probabilities = logits.softmax(-1)
    _, high = _bisect(probabilities, _column(p))
    return _cut(logits, (probabilities < high) & (_column(p) < 1))


@wrong("3.5", "keeps what is larger than the threshold")
def keep_top_p(logits, p):
    probabilities = logits.softmax(-1)
    low, _ = _bisect(probabilities, _column(p))
    return _cut(logits, (probabilities <= low) & (_column(p) < 1))


@wrong("3.5", "wants more than p")
def keep_top_p(logits, p):
    probabilities = logits.softmax(-1)
    low, _ = _bisect(probabilities, _column(p), step=lambda mass, p: mass > p)
    return _cut(logits, (probabilities < low) & (_column(p) < 1))


@wrong("3.5", "halves 20 times")
def keep_top_p(logits, p):
    probabilities = logits.softmax(-1)
    low, _ = _bisect(probabilities, _column(p), rounds=20)
    return _cut(logits, (probabilities < low) & (_column(p) < 1))


@wrong("3.5", "stops when the sum is within 0.01 of p")
def keep_top_p(logits, p):
    probabilities, p = logits.softmax(-1), _column(p)
    low, high = torch.zeros(len(logits), 1), torch.full((len(logits), 1), 2.0)
    for _ in range(200):
        middle = (low + high) / 2
        mass = (probabilities * (probabilities >= middle)).sum(-1, keepdim=True)
        near = (mass - p).abs() < 0.01
        low = torch.where(near | (mass >= p), middle, low)
        high = torch.where(near | (mass < p), middle, high)
    return _cut(logits, (probabilities < low) & (p < 1))


@wrong("3.5", "p = 1 loses tokens that no fp32 sum misses")
def keep_top_p(logits, p):
    probabilities = logits.softmax(-1)
    return _cut(logits, probabilities < _bisect(probabilities, _column(p))[0])


@wrong("3.5", "keeps tokens whose own probability is at least 1 - p")
def keep_top_p(logits, p):
    probabilities = logits.softmax(-1)
    return _cut(logits, (probabilities < 1 - _column(p)) & (probabilities < probabilities.amax(-1, keepdim=True)))


@wrong("3.5", "one threshold for the whole batch")
def keep_top_p(logits, p):
    probabilities = logits.softmax(-1)
    low, _ = _bisect(probabilities, _column(p))
    return _cut(logits, (probabilities < low.min()) & (_column(p) < 1))


@wrong("3.5", "takes the first row's p for all rows")
def keep_top_p(logits, p):
    p = _column(p)[:1]
    probabilities = logits.softmax(-1)
    return _cut(logits, (probabilities < _bisect(probabilities, p)[0]) & (p < 1))


@wrong("3.5", "compares a column of sums with a row of p")
def keep_top_p(logits, p):
    probabilities, p = logits.softmax(-1), torch.as_tensor(p, dtype=torch.float32)
    low, _ = _bisect(probabilities, p)
    return _cut(logits, (probabilities < low) & (_column(p) < 1))


@wrong("3.5", "splits equal tokens: adds up in the order of the ids")
def keep_top_p(logits, p):
    probabilities, p = logits.softmax(-1), _column(p)
    low, _ = _bisect(probabilities, p)
    above, same = probabilities > low, probabilities == low
    sums = (probabilities * above).sum(-1, keepdim=True) + (probabilities * same).cumsum(-1) - probabilities
    return _cut(logits, ~(above | (same & (sums < p))) & (p < 1))


@wrong("3.5", "returns probabilities")
def keep_top_p(logits, p):
    probabilities = logits.softmax(-1)
    low, _ = _bisect(probabilities, _column(p))
    return _cut(logits, (probabilities < low) & (_column(p) < 1)).softmax(-1)


@wrong("3.5", "returns normalized logits")
def keep_top_p(logits, p):
    probabilities = logits.softmax(-1)
    low, _ = _bisect(probabilities, _column(p))
    return _cut(logits, (probabilities < low) & (_column(p) < 1)).log_softmax(-1)


@wrong("3.5", "writes into its input")
def keep_top_p(logits, p):
    probabilities = logits.softmax(-1)
    low, _ = _bisect(probabilities, _column(p))
    return logits.masked_fill_((probabilities < low) & (_column(p) < 1), float("-inf"))


@wrong("3.5", "halves 32 times")
def keep_top_p(logits, p):
    probabilities = logits.softmax(-1)
    low, _ = _bisect(probabilities, _column(p), rounds=32)
    return _cut(logits, (probabilities < low) & (_column(p) < 1))


@wrong("3.5", "keeps all only if every p is 1")
def keep_top_p(logits, p):
    p = _column(p)
    if (p == 1).all():
        return logits.clone()
    probabilities = logits.softmax(-1)
    return _cut(logits, probabilities < _bisect(probabilities, p)[0])


@wrong("3.5", "Python's sorted")
def keep_top_p(logits, p):
    out, shares = logits.clone(), _column(p).expand(len(logits), 1).flatten().tolist()
    for row, probabilities, share in zip(out, logits.softmax(-1), shares, strict=True):
        mass, least = 0.0, 0.0
        for x in sorted(probabilities.tolist(), reverse=True):
            if mass >= share:
                break
            mass, least = mass + x, x
        if share < 1:
            row[probabilities < least] = float("-inf")
    return out


@wrong("3.5", "the sort of a list")
def keep_top_p(logits, p):
    out, shares = logits.clone(), _column(p).expand(len(logits), 1).flatten().tolist()
    for row, probabilities, share in zip(out, logits.softmax(-1), shares, strict=True):
        values, mass, least = probabilities.tolist(), 0.0, 0.0
        values.sort(reverse=True)
        for x in values:
            if mass >= share:
                break
            mass, least = mass + x, x
        if share < 1:
            row[probabilities < least] = float("-inf")
    return out


@wrong("3.5", "tries the thresholds that torch.unique puts in order")
def keep_top_p(logits, p):
    out, shares = logits.clone(), _column(p).expand(len(logits), 1).flatten().tolist()
    for row, probabilities, share in zip(out, logits.softmax(-1), shares, strict=True):
        if share < 1:
            enough = [t for t in probabilities.unique() if probabilities[probabilities >= t].sum() >= share]
            row[probabilities < max(enough, default=0.0)] = float("-inf")
    return out


@wrong("3.5", "exponentials without their maximum")
def keep_top_p(logits, p):
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    low, _ = _bisect(probabilities, _column(p))
    return _cut(logits, (probabilities < low) & (_column(p) < 1))


@wrong("3.5", "halves between the least and the largest logit: minus infinity never ends")
def keep_top_p(logits, p):
    probabilities, p = logits.softmax(-1), _column(p)
    low, high = logits.amin(-1, keepdim=True), logits.amax(-1, keepdim=True) + 1
    for _ in range(60):
        middle = (low + high) / 2
        enough = (probabilities * (logits >= middle)).sum(-1, keepdim=True) >= p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return _cut(logits, (logits < low) & (p < 1))


@wrong("3.5", "reads rows of a view as if it were contiguous")
def keep_top_p(logits, p):
    flat = torch.as_strided(logits, logits.shape, (logits.shape[1], 1))
    probabilities = flat.softmax(-1)
    low, _ = _bisect(probabilities, _column(p))
    return _cut(flat, (probabilities < low) & (_column(p) < 1))


@wrong("3.5", "writes over p")
def keep_top_p(logits, p):
    probabilities, column = logits.softmax(-1), _column(p).clone()
    low, _ = _bisect(probabilities, column)
    if isinstance(p, torch.Tensor):
        p.clamp_(max=0.99)
    return _cut(logits, (probabilities < low) & (column < 1))


@alternative("3.5", "a loop over rows, halving an interval of logits")
def keep_top_p(logits, p):
    out = logits.clone()
    for row, share in zip(out, _column(p).expand(len(logits), 1).flatten().tolist(), strict=True):
        if share == 1:
            continue
        weights = (row - row.max()).exp().double()
        low, high = row[row > -math.inf].min().double(), row.max().double() + 1
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if weights[row >= middle].sum() >= share * weights.sum() else (low, middle)
        row[row < low] = float("-inf")
    return out


@alternative("3.5", "halves 45 times, in fp64")
def keep_top_p(logits, p):
    probabilities = logits.double().softmax(-1)
    low, high = torch.zeros(len(logits), 1).double(), probabilities.amax(-1, keepdim=True) * 2
    for _ in range(45):
        middle = (low + high) / 2
        enough = torch.where(probabilities < middle, 0, probabilities).sum(-1, keepdim=True) >= _column(p)
        low, high = middle.where(enough, low), high.where(enough, middle)
    return logits.where((probabilities >= low) | (_column(p) >= 1), float("-inf"))


@alternative("3.5", "searches the bits of the float, from the highest to the lowest")
def keep_top_p(logits, p):
    probabilities, p = logits.softmax(-1), _column(p)
    bits = probabilities.view(torch.int32)  # floats that are not negative are ordered as their bits
    least = torch.zeros(len(logits), 1, dtype=torch.int32)
    for bit in range(30, -1, -1):
        tried = least | (1 << bit)
        enough = (probabilities * (bits >= tried)).sum(-1, keepdim=True) >= p
        least = torch.where(enough, tried, least)
    return _cut(logits, (bits < least) & (p < 1))


@alternative("3.5", "lets the ends jump to probabilities that occur")
def keep_top_p(logits, p):
    probabilities, p = logits.softmax(-1), _column(p)
    low, high = probabilities.amin(-1, keepdim=True), torch.full((len(logits), 1), 2.0)
    while True:
        between = (probabilities > low) & (probabilities < high)
        if not between.any():
            return _cut(logits, (probabilities < low) & (p < 1))
        middle = torch.where(between.any(-1, keepdim=True), (low + high) / 2, high)
        next_up = torch.where(probabilities >= middle, probabilities, 2.0).amin(-1, keepdim=True)
        next_down = torch.where(probabilities < middle, probabilities, 0.0).amax(-1, keepdim=True)
        enough = (probabilities * (probabilities >= middle)).sum(-1, keepdim=True) >= p
        low = torch.where(enough, next_up, low)
        high = torch.where(enough, high, torch.where(next_down > low, torch.nextafter(next_down, high), next_up))


@wrong("3.5", "-inf logits become finite")
def keep_top_p(logits, p):
    logits = logits.clamp(min=-1e30)
    probabilities = logits.softmax(-1)
    p = torch.as_tensor(p, dtype=logits.dtype).reshape(-1, 1)
    low = torch.zeros(len(logits), 1)
    high = torch.full_like(low, 2.0)
    while True:
        middle = (low + high) / 2
        if ((middle == low) | (middle == high)).all():
            break
        enough = (probabilities * (probabilities >= middle)).sum(-1, keepdim=True) >= p
        low, high = (torch.where(enough, middle, low), torch.where(enough, high, middle))
    return logits.masked_fill((probabilities < low) & (p < 1), float("-inf"))


# ---- 3.6 characters out of a stream of bytes -----------------------------------------------------------------------


@wrong("3.6", "decodes every token by itself")
class StreamDecoder:
    def push(self, data):
        return data.decode(errors="replace")

    def flush(self):
        return ""


@wrong("3.6", "waits for ever behind an invalid byte")
class StreamDecoder:
    def __init__(self):
        self.waiting = b""

    def push(self, data):
        self.waiting += data
        try:
            text, self.waiting = self.waiting.decode(), b""
        except UnicodeDecodeError:
            return ""
        return text

    def flush(self):
        text, self.waiting = self.waiting.decode(errors="replace"), b""
        return text


@wrong("3.6", "drops what is not whole")
class StreamDecoder:
    def push(self, data):
        return data.decode(errors="ignore")

    def flush(self):
        return ""


@wrong("3.6", "flush leaves the rest where it is")
class StreamDecoder:
    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data):
        return self.decoder.decode(data)

    def flush(self):
        return self.decoder.getstate()[0].decode(errors="replace")


@wrong("3.6", "drops invalid bytes")
class StreamDecoder:
    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")

    def push(self, data):
        return self.decoder.decode(data)

    def flush(self):
        return self.decoder.decode(b"", final=True)


@wrong("3.6", "all streams share what waits")
class StreamDecoder:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data):
        return self.decoder.decode(data)

    def flush(self):
        text = self.decoder.decode(b"", final=True)
        self.decoder.reset()
        return text


@wrong("3.6", "returns the whole text every time")
class StreamDecoder:
    def __init__(self):
        self.decoder, self.text = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""

    def push(self, data):
        self.text += self.decoder.decode(data)
        return self.text

    def flush(self):
        return self.decoder.decode(b"", final=True)


@wrong("3.6", "waits for as many bytes as the first one announces, whatever they are")
class StreamDecoder:
    def __init__(self):
        self.waiting = b""

    def push(self, data):
        self.waiting += data
        text = ""
        while self.waiting:
            lead = self.waiting[0]
            size = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4 if lead < 0xF8 else 1
            part = self.waiting[:size]
            try:
                text += part.decode()
            except UnicodeDecodeError as error:
                if len(part) < size and error.end == len(part):
                    break
                text, size = text + "\ufffd", error.end
            self.waiting = self.waiting[size:]
        return text

    def flush(self):
        text, self.waiting = self.waiting.decode(errors="replace"), b""
        return text


@wrong("3.6", "waits behind C0, F5 and the like, which begin no character")
class StreamDecoder:
    def __init__(self):
        self.waiting = b""

    def push(self, data):
        data, self.waiting = self.waiting + data, b""
        for n in (1, 2, 3):
            if len(data) >= n and data[-n] >= 0xC0 and n < (2 if data[-n] < 0xE0 else 3 if data[-n] < 0xF0 else 4):
                data, self.waiting = data[:-n], data[-n:]
                break
        return data.decode(errors="replace")

    def flush(self):
        text, self.waiting = self.waiting.decode(errors="replace"), b""
        return text


@wrong("3.6", "swallows a byte-order mark")
class StreamDecoder:
    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")

    def push(self, data):
        return self.decoder.decode(data)

    def flush(self):
        text = self.decoder.decode(b"", final=True)
        self.decoder.reset()
        return text


@wrong("3.6", "makes one kind of line end")
class StreamDecoder:
    def __init__(self):
        self.decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)

    def push(self, data):
        return self.decoder.decode(data)

    def flush(self):
        text = self.decoder.decode(b"", final=True)
        self.decoder.reset()
        return text


@wrong("3.6", "one U+FFFD for a whole row of invalid bytes")
class StreamDecoder:
    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data):
        return re.sub("\ufffd+", "\ufffd", self.decoder.decode(data))

    def flush(self):
        text = self.decoder.decode(b"", final=True)
        self.decoder.reset()
        return text


@wrong("3.6", "flush returns U+FFFD also when nothing waits")
class StreamDecoder:
    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data):
        return self.decoder.decode(data)

    def flush(self):
        self.decoder.reset()
        return "\ufffd"


@alternative("3.6", "the standard library's incremental decoder")
class StreamDecoder:
    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data):
        return self.decoder.decode(data)

    def flush(self):
        text = self.decoder.decode(b"", final=True)
        self.decoder.reset()
        return text
