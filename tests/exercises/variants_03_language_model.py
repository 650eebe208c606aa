"""Wrong and alternative implementations of chapter 3's exercises: checks refuse the first, accept the second."""

import codecs
import math
from collections import Counter, defaultdict
from itertools import pairwise

import torch
import torch.nn.functional as F

from minillm.learn.testing import alternative, wrong

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


def _learn(word_counts, num_merges, spell=_spell, join=_join, weigh=True, key=lambda n, pair: (-n, pair)):
    words = {word: spell(word) for word in word_counts}
    merges = []
    for _ in range(num_merges):
        pairs = Counter()
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += word_counts[word] if weigh else 1
        if not pairs:
            break
        merges.append(min(pairs, key=lambda pair: key(pairs[pair], pair)))
        words = {word: join(symbols, merges[-1]) for word, symbols in words.items()}
    return merges


@wrong("3.1", "counts each distinct word once")
def learn_merges(word_counts, num_merges):
    return _learn(word_counts, num_merges, weigh=False)


@wrong("3.1", "takes the first of equally frequent pairs")
def learn_merges(word_counts, num_merges):
    return _learn(word_counts, num_merges, key=lambda n, pair: -n)


@wrong("3.1", "takes the largest of equally frequent pairs")
def learn_merges(word_counts, num_merges):
    return _learn(word_counts, num_merges, key=lambda n, pair: (-n, [-b for b in pair[0]], [-b for b in pair[1]]))


@wrong("3.1", "spells characters instead of bytes")
def learn_merges(word_counts, num_merges):
    return _learn(word_counts, num_merges, spell=lambda word: [c.encode() for c in word])


@wrong("3.1", "counts once and takes the most frequent pairs of single bytes")
def learn_merges(word_counts, num_merges):
    pairs = Counter()
    for word, count in word_counts.items():
        for pair in pairwise(_spell(word)):
            pairs[pair] += count
    return sorted(pairs, key=lambda pair: (-pairs[pair], pair))[:num_merges]


@wrong("3.1", "does not stop when no pair is left")
def learn_merges(word_counts, num_merges):
    merges = _learn(word_counts, num_merges)
    return merges + [(b"", b"")] * (num_merges - len(merges))


@wrong("3.1", "joins only the first place in each word")
def learn_merges(word_counts, num_merges):
    def join(symbols, pair):
        for i, found in enumerate(pairwise(symbols)):
            if found == pair:
                return [*symbols[:i], pair[0] + pair[1], *symbols[i + 2 :]]
        return symbols

    return _learn(word_counts, num_merges, join=join)


@alternative("3.1", "counts anew only the words that hold the joined pair")
def learn_merges(word_counts, num_merges):
    words = {word: _spell(word) for word in word_counts}
    pairs, where = Counter(), defaultdict(set)
    for word, symbols in words.items():
        for pair in pairwise(symbols):
            pairs[pair] += word_counts[word]
            where[pair].add(word)
    merges = []
    while len(merges) < num_merges and (left := [p for p in pairs if pairs[p] > 0]):
        best = min(left, key=lambda pair: (-pairs[pair], pair))
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


@wrong("3.2", "takes the longest token of the vocabulary first")
def encode_word(word, ranks):
    vocab = {a + b for a, b in ranks}
    data, tokens = word.encode(), []
    while data:
        size = next((n for n in range(len(data), 1, -1) if data[:n] in vocab), 1)
        tokens.append(data[:size])
        data = data[size:]
    return tokens


@wrong("3.2", "joins the leftmost known pair, whatever its rank")
def encode_word(word, ranks):
    tokens = _spell(word)
    while known := [i for i, pair in enumerate(pairwise(tokens)) if pair in ranks]:
        tokens[known[0] : known[0] + 2] = [tokens[known[0]] + tokens[known[0] + 1]]
    return tokens


@wrong("3.2", "takes the largest rank first")
def encode_word(word, ranks):
    tokens = _spell(word)
    while known := [(-ranks[pair], i) for i, pair in enumerate(pairwise(tokens)) if pair in ranks]:
        i = min(known)[1]
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
    return tokens


@wrong("3.2", "takes the rightmost of equal ranks")
def encode_word(word, ranks):
    tokens = _spell(word)
    while known := [(ranks[pair], -i) for i, pair in enumerate(pairwise(tokens)) if pair in ranks]:
        i = -min(known)[1]
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
    return tokens


@wrong("3.2", "goes through the word once")
def encode_word(word, ranks):
    tokens = []
    for symbol in _spell(word):
        if tokens and (tokens[-1], symbol) in ranks:
            tokens[-1] += symbol
        else:
            tokens.append(symbol)
    return tokens


@wrong("3.2", "spells characters instead of bytes")
def encode_word(word, ranks):
    tokens = [character.encode() for character in word]
    while known := [(ranks[pair], i) for i, pair in enumerate(pairwise(tokens)) if pair in ranks]:
        i = min(known)[1]
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
    return tokens


@alternative("3.2", "applies every merge of the table in turn")
def encode_word(word, ranks):
    tokens = _spell(word)
    for pair in sorted(ranks, key=ranks.get):
        tokens = _join(tokens, pair)
    return tokens


# ---- 3.3 one step of training --------------------------------------------------------------------------------------


@wrong("3.3", "does not shift: the target is the input")
def training_step(model, optimizer, token_ids, pad_id):
    loss = F.cross_entropy(model(token_ids).flatten(0, 1), token_ids.flatten(), ignore_index=pad_id)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong("3.3", "shifts the wrong way: predicts the token before")
def training_step(model, optimizer, token_ids, pad_id):
    logits = model(token_ids)[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), token_ids[:, :-1].flatten(), ignore_index=pad_id)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong("3.3", "learns to predict padding")
def training_step(model, optimizer, token_ids, pad_id):
    loss = F.cross_entropy(model(token_ids[:, :-1]).flatten(0, 1), token_ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong("3.3", "divides by all positions, padding included")
def training_step(model, optimizer, token_ids, pad_id):
    targets = token_ids[:, 1:].flatten()
    loss = F.cross_entropy(model(token_ids[:, :-1]).flatten(0, 1), targets, ignore_index=pad_id, reduction="sum")
    loss = loss / len(targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong("3.3", "ignores token 0 whatever pad_id is")
def training_step(model, optimizer, token_ids, pad_id):
    loss = F.cross_entropy(model(token_ids[:, :-1]).flatten(0, 1), token_ids[:, 1:].flatten(), ignore_index=0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong("3.3", "adds gradients up over steps")
def training_step(model, optimizer, token_ids, pad_id):
    loss = F.cross_entropy(model(token_ids[:, :-1]).flatten(0, 1), token_ids[:, 1:].flatten(), ignore_index=pad_id)
    loss.backward()
    optimizer.step()
    return loss.item()


@wrong("3.3", "clears the gradients after backward")
def training_step(model, optimizer, token_ids, pad_id):
    loss = F.cross_entropy(model(token_ids[:, :-1]).flatten(0, 1), token_ids[:, 1:].flatten(), ignore_index=pad_id)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    return loss.item()


@wrong("3.3", "returns the tensor with its graph")
def training_step(model, optimizer, token_ids, pad_id):
    loss = F.cross_entropy(model(token_ids[:, :-1]).flatten(0, 1), token_ids[:, 1:].flatten(), ignore_index=pad_id)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


@alternative("3.3", "gathers log probabilities by hand and clears gradients at the end")
def training_step(model, optimizer, token_ids, pad_id):
    targets = token_ids[:, 1:]
    logprobs = model(token_ids)[:, :-1].log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    loss = -logprobs[targets != pad_id].mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


# ---- 3.4 perplexity ------------------------------------------------------------------------------------------------


def _losses(model, ids, targets):
    with torch.no_grad():
        return F.cross_entropy(model(ids[None])[0], targets, reduction="none")


@wrong("3.4", "each window predicts within itself, so its first token is scored by nobody")
def perplexity(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    total, count = 0.0, 0
    for begin in range(0, len(ids), window):
        part = ids[begin : begin + window]
        if len(part) > 1:
            with torch.no_grad():
                logits = model(part[None])[0, :-1]
            total += F.cross_entropy(logits, part[1:], reduction="sum").item()
            count += len(part) - 1
    return math.exp(total / count)


@wrong("3.4", "scores every prediction of every window")
def perplexity(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    losses, last = [], len(ids) - 1
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        losses.append(_losses(model, ids[begin:end], ids[begin + 1 : end + 1]))
        if end == last:
            break
    return torch.cat(losses).mean().exp().item()


@wrong("3.4", "averages the windows' means")
def perplexity(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    means, last, scored = [], len(ids) - 1, 0
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        losses = _losses(model, ids[begin:end], ids[begin + 1 : end + 1])
        means.append(losses[-(end - scored) :].mean().item())
        scored = end
        if end == last:
            break
    return math.exp(sum(means) / len(means))


@wrong("3.4", "averages the windows' perplexities")
def perplexity(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    values, last, scored = [], len(ids) - 1, 0
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        losses = _losses(model, ids[begin:end], ids[begin + 1 : end + 1])
        values.append(losses[-(end - scored) :].mean().exp().item())
        scored = end
        if end == last:
            break
    return sum(values) / len(values)


@wrong("3.4", "drops the tail that fills no window")
def perplexity(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    losses, scored, last = [], 0, len(ids) - 1
    for begin in range(0, max(last - window, 0) + 1, stride):
        end = min(begin + window, last)
        losses.append(_losses(model, ids[begin:end], ids[begin + 1 : end + 1])[-(end - scored) :])
        scored = end
    return torch.cat(losses).mean().exp().item()


@wrong("3.4", "returns the cross-entropy")
def perplexity(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    losses, scored, last = [], 0, len(ids) - 1
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        losses.append(_losses(model, ids[begin:end], ids[begin + 1 : end + 1])[-(end - scored) :])
        scored = end
        if end == last:
            break
    return torch.cat(losses).mean().item()


@wrong("3.4", "goes on when all is scored")
def perplexity(model, token_ids, window, stride):
    ids = torch.tensor(token_ids)
    losses, scored, last = [], 0, len(ids) - 1
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        fresh = _losses(model, ids[begin:end], ids[begin + 1 : end + 1])
        losses.append(fresh[len(fresh) - (end - scored) :])
        scored = end
    return torch.cat(losses).mean().exp().item()


@alternative("3.4", "a list of the losses of all tokens, filled from left to right")
def perplexity(model, token_ids, window, stride):
    losses, begin = [], 0
    while len(losses) < len(token_ids) - 1:
        end = min(begin + window, len(token_ids) - 1)
        with torch.no_grad():
            logprobs = model(torch.tensor([token_ids[begin:end]]))[0].log_softmax(-1)
        losses += [-logprobs[i - 1 - begin, token_ids[i]].item() for i in range(len(losses) + 1, end + 1)]
        begin += stride
    return math.exp(sum(losses) / len(losses))


# ---- 3.5 the nucleus -----------------------------------------------------------------------------------------------


@wrong("3.5", "throws out the token that crosses p")
def keep_top_p(logits, p):
    ordered, order = logits.sort(dim=-1, descending=True)
    refused = ordered.softmax(-1).cumsum(-1) > p
    return logits.masked_fill(torch.zeros_like(refused).scatter(-1, order, refused), float("-inf"))


@wrong("3.5", "throws out the token that crosses p, unless it is the first")
def keep_top_p(logits, p):
    ordered, order = logits.sort(dim=-1, descending=True)
    refused = ordered.softmax(-1).cumsum(-1) > p
    refused[..., 0] = False
    return logits.masked_fill(torch.zeros_like(refused).scatter(-1, order, refused), float("-inf"))


@wrong("3.5", "keeps tokens whose own probability is at least 1 - p")
def keep_top_p(logits, p):
    probabilities = logits.softmax(-1)
    refused = (probabilities < 1 - p) & (probabilities < probabilities.amax(-1, keepdim=True))
    return logits.masked_fill(refused, float("-inf"))


@wrong("3.5", "leaves the marks in sorted order")
def keep_top_p(logits, p):
    ordered, _ = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    return logits.masked_fill(probabilities.cumsum(-1) - probabilities >= p, float("-inf"))


@wrong("3.5", "one set for the whole batch")
def keep_top_p(logits, p):
    ordered, order = logits.sort(dim=-1, descending=True)
    sizes = (ordered.softmax(-1).cumsum(-1) < p).sum(-1) + 1
    refused = (torch.arange(logits.shape[-1]) >= sizes.max()).expand_as(logits)
    return logits.masked_fill(torch.zeros_like(refused).scatter(-1, order, refused), float("-inf"))


@wrong("3.5", "returns probabilities")
def keep_top_p(logits, p):
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    refused = probabilities.cumsum(-1) - probabilities >= p
    kept = logits.masked_fill(torch.zeros_like(refused).scatter(-1, order, refused), float("-inf"))
    return kept.softmax(-1)


@wrong("3.5", "writes into its input")
def keep_top_p(logits, p):
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    refused = probabilities.cumsum(-1) - probabilities >= p
    return logits.masked_fill_(torch.zeros_like(refused).scatter(-1, order, refused), float("-inf"))


@alternative("3.5", "a loop over rows and tokens")
def keep_top_p(logits, p):
    out = torch.full_like(logits, float("-inf"))
    for row, scores in enumerate(logits):
        total = 0.0
        for i in scores.argsort(descending=True).tolist():
            if total >= p:
                break
            out[row, i] = scores[i]
            total += scores.softmax(-1)[i].item()
    return out


@alternative("3.5", "sorts in ascending order and cuts off 1 - p")
def keep_top_p(logits, p):
    ordered, order = logits.sort(dim=-1)
    refused = ordered.softmax(-1).cumsum(-1) <= 1 - p
    refused[..., -1] = False
    return logits.masked_fill(torch.zeros_like(refused).scatter(-1, order, refused), float("-inf"))


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
