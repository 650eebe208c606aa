"""Implementations that the checks of exercises 6 must refuse, and others that they must accept."""

import math

import torch
import torch.nn.functional as F

from minillm.learn.testing import alternative, wrong

INF = float("inf")


# ---- 6.w1 -----------------------------------------------------------------------------------------------------------


@wrong("6.w1", "the last token passes through the model too")
def tokens_computed(prompt, n):
    return n * prompt + n * (n + 1) // 2, prompt + n


@wrong("6.w1", "the cached way computes the prompt and each new token, the last one included")
def tokens_computed(prompt, n):
    return n * prompt + n * (n - 1) // 2, prompt + n if n else 0


@wrong("6.w1", "forgets that the text grows")
def tokens_computed(prompt, n):
    return n * prompt, prompt + n - 1 if n else 0


@wrong("6.w1", "the prompt passes although nothing is asked")
def tokens_computed(prompt, n):
    return n * prompt + n * (n - 1) // 2, prompt + n - 1


@wrong("6.w1", "a float, inexact for long texts")
def tokens_computed(prompt, n):
    return n * prompt + n * (n - 1) / 2, prompt + n - 1 if n else 0


@wrong("6.w1", "a loop over the steps")
def tokens_computed(prompt, n):
    total = 0
    for i in range(n):
        total += prompt + i
    return total, prompt + n - 1 if n else 0


@wrong("6.w1", "halves a float")
def tokens_computed(prompt, n):
    if n == 0:
        return (0, 0)
    return (n * prompt + int(n * (n - 1) / 2), prompt + n - 1)


@alternative("6.w1", "the mean step, n times")
def tokens_computed(prompt, n):
    return n * (2 * prompt + n - 1) // 2, n and prompt + n - 1


# ---- 6.w2 -----------------------------------------------------------------------------------------------------------


@wrong("6.w2", "in order, as if nothing went round")
def ring(length, window):
    return [p if p < length else -1 for p in range(max(0, length - window), max(0, length - window) + window)]


@wrong("6.w2", "what was there first stays")
def ring(length, window):
    return [p if p < length else -1 for p in range(window)]


@wrong("6.w2", "one token too many")
def ring(length, window):
    return [max(-1, length - (length - slot) % window) for slot in range(window)]


@wrong("6.w2", "slots that were never written hold negative positions")
def ring(length, window):
    return [length - 1 - (length - 1 - slot) % window for slot in range(window)]


@wrong("6.w2", "a loop over all tokens")
def ring(length, window):
    slots = [-1] * window
    for p in range(length):
        slots[p % window] = p
    return slots


@alternative("6.w2", "the last tokens, each to its slot")
def ring(length, window):
    slots = [-1] * window
    for p in range(max(0, length - window), length):
        slots[p % window] = p
    return slots


# ---- 6.w3 -----------------------------------------------------------------------------------------------------------


@wrong("6.w3", "hides the scores and not the values")
def blend(scores, values, seen):
    return scores.masked_fill(~seen, -INF).softmax(0) @ values


@wrong("6.w3", "multiplies by the mask")
def blend(scores, values, seen):
    return (scores.masked_fill(~seen, -INF).softmax(0) * seen) @ (values * seen[:, None])


@wrong("6.w3", "adds -inf to the scores")
def blend(scores, values, seen):
    return (scores + torch.where(seen, 0.0, -INF)).softmax(0) @ values.masked_fill(~seen[:, None], 0.0)


@wrong("6.w3", "a softmax over all slots, then the mask")
def blend(scores, values, seen):
    return scores.nan_to_num(0, 0, 0).softmax(0).masked_fill(~seen, 0.0) @ values.masked_fill(~seen[:, None], 0.0)


@wrong("6.w3", "replaces every NaN, real ones too")
def blend(scores, values, seen):
    return scores.masked_fill(~seen, -INF).softmax(0) @ values.nan_to_num(0.0, 0.0, 0.0)


@wrong("6.w3", "hides with -1e9")
def blend(scores, values, seen):
    return scores.masked_fill(~seen, -1e9).softmax(0) @ values.masked_fill(~seen[:, None], 0.0)


@wrong("6.w3", "cleans the caller's values")
def blend(scores, values, seen):
    values[~seen] = 0.0
    return scores.masked_fill(~seen, -INF).softmax(0) @ values


@wrong("6.w3", "the first tokens, as many as are seen")
def blend(scores, values, seen):
    count = int(seen.sum())
    return scores[:count].softmax(0) @ values[:count]


@wrong("6.w3", "hides scores of NaN, too")
def blend(scores, values, seen):
    seen = seen & ~scores.isnan()
    weights = scores.masked_fill(~seen, float("-inf")).softmax(0)
    return weights @ values.masked_fill(~seen[:, None], 0.0)


@alternative("6.w3", "selects")
def blend(scores, values, seen):
    return scores[seen].softmax(0) @ values[seen]


# ---- 6.0 ------------------------------------------------------------------------------------------------------------


def stepped(q, k, v, k_cache, v_cache, length, what=""):
    """The right one, but for what is named."""
    end = length + len(k)
    if end > len(k_cache) and what != "no check":
        raise ValueError("k: too many tokens")
    if what == "full is too much" and end == len(k_cache):
        raise ValueError("k: too many tokens")
    if what == "a copy":
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
    if what == "reshaped":
        k_cache, v_cache = (x.reshape(len(x), -1).unflatten(1, x.shape[1:]) for x in (k_cache, v_cache))
    if what == "at the front":
        k_cache[: len(k)], v_cache[: len(v)] = k, v
    else:
        k_cache[length:end], v_cache[length:end] = k, v
    if what == "clears the rest":
        k_cache[end:], v_cache[end:] = 0, 0
    seen = len(k_cache) if what == "all slots" else end
    keys, values = k_cache[:seen], v_cache[:seen]
    if what == "cached alone":
        keys, values = (keys[:length], values[:length]) if length else (keys, values)
    if what == "new alone":
        keys, values = k, v
    heads = torch.arange(q.shape[1])
    heads = heads % k.shape[1] if what == "heads in turns" else heads // (q.shape[1] // k.shape[1])
    scores = torch.einsum("thd,shd->hts", q, keys[:, heads])
    if what != "no scale":
        scores = scores / q.shape[-1] ** 0.5
    at = torch.arange(len(q))[:, None] + (0 if what in ("square", "new alone") else length)
    future = torch.arange(keys.shape[0]) > at
    if what == "no mask":
        future = torch.zeros_like(future)
    scores = scores.masked_fill(future, -1e9 if what == "-1e9" else -INF)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True) if what == "no maximum" else scores.softmax(-1)
    return torch.einsum("hts,shd->thd", weights, values[:, heads])


@wrong("6.0", "stores at the front of the cache")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    return stepped(q, k, v, k_cache, v_cache, length, "at the front")


@wrong("6.0", "stores into a copy")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    return stepped(q, k, v, k_cache, v_cache, length, "a copy")


@wrong("6.0", "stores through reshape, which copies a view")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    return stepped(q, k, v, k_cache, v_cache, length, "reshaped")


@wrong("6.0", "clears the slots behind")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    return stepped(q, k, v, k_cache, v_cache, length, "clears the rest")


@wrong("6.0", "reads all slots and hides by the mask: a weight of 0 against NaN")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    return stepped(q, k, v, k_cache, v_cache, length, "all slots")


@wrong("6.0", "new tokens do not see themselves")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    return stepped(q, k, v, k_cache, v_cache, length, "cached alone")


@wrong("6.0", "new tokens see only those of their step")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    return stepped(q, k, v, k_cache, v_cache, length, "new alone")


@wrong("6.0", "query heads take key/value heads in turns")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    return stepped(q, k, v, k_cache, v_cache, length, "heads in turns")


@wrong("6.0", "scores are not scaled")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    return stepped(q, k, v, k_cache, v_cache, length, "no scale")


@wrong("6.0", "the mask of a step at position 0")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    return stepped(q, k, v, k_cache, v_cache, length, "square")


@wrong("6.0", "no mask: a chunk's tokens see the future")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    return stepped(q, k, v, k_cache, v_cache, length, "no mask")


@wrong("6.0", "hides with -1e9")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    return stepped(q, k, v, k_cache, v_cache, length, "-1e9")


@wrong("6.0", "a softmax without the maximum")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    return stepped(q, k, v, k_cache, v_cache, length, "no maximum")


@wrong("6.0", "no error when the tokens do not fit")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    return stepped(q, k, v, k_cache, v_cache, length, "no check")


@wrong("6.0", "the last slot is not used")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    return stepped(q, k, v, k_cache, v_cache, length, "full is too much")


@wrong("6.0", "stores what fits, then raises")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    room = len(k_cache) - length
    k_cache[length : length + len(k)] = k[:room]
    v_cache[length : length + len(v)] = v[:room]
    return stepped(q, k, v, k_cache, v_cache, length)


@wrong("6.0", "is_causal, which counts from the top left corner")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    end = length + len(k)
    if end > len(k_cache):
        raise ValueError("k: too many tokens")
    k_cache[length:end], v_cache[length:end] = k, v
    parts = (x.transpose(0, 1) for x in (q, k_cache[:end], v_cache[:end]))
    return F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).transpose(0, 1)


@wrong("6.0", "scales the caller's q in place")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    q *= q.shape[-1] ** -0.5
    return stepped(q, k, v, k_cache, v_cache, length, "no scale")


@wrong("6.0", "a view of the cache for the first token")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    end = length + len(k)
    if end > len(k_cache):
        raise ValueError(f"k: expected at most {len(k_cache) - length} tokens, got {len(k)}")
    k_cache[length:end], v_cache[length:end] = (k, v)
    if end == 1:
        return (
            v_cache[:1].expand(1, q.shape[1], q.shape[2])
            if v.shape[1] == 1
            else v_cache[:1].repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        )
    groups = q.shape[1] // k.shape[1]
    keys, values = (x[:end].repeat_interleave(groups, dim=1) for x in (k_cache, v_cache))
    scores = torch.einsum("thd,shd->hts", q, keys) / q.shape[-1] ** 0.5
    future = torch.arange(end) > length + torch.arange(len(q))[:, None]
    return torch.einsum("hts,shd->thd", scores.masked_fill(future, float("-inf")).softmax(-1), values)


@alternative("6.0", "torch's fused attention with a mask")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    end = length + len(k)
    if end > len(k_cache):
        raise ValueError("k: too many tokens")
    k_cache[length:end].copy_(k), v_cache[length:end].copy_(v)
    mask = torch.ones(len(q), end, dtype=torch.bool).tril(length)
    parts = (x.transpose(0, 1)[None] for x in (q, k_cache[:end], v_cache[:end]))
    return F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


@alternative("6.0", "token by token")
def append_and_attend(q, k, v, k_cache, v_cache, length):
    if length + len(k) > len(k_cache):
        raise ValueError("k: too many tokens")
    groups = q.shape[1] // k.shape[1]
    rows = []
    for i in range(len(q)):
        k_cache[length + i], v_cache[length + i] = k[i], v[i]
        keys, values = (x[: length + i + 1].repeat_interleave(groups, 1) for x in (k_cache, v_cache))
        weights = (torch.einsum("hd,shd->hs", q[i], keys) / q.shape[2] ** 0.5).softmax(-1)
        rows.append(torch.einsum("hs,shd->hd", weights, values))
    return torch.stack(rows)


# ---- 6.1 ------------------------------------------------------------------------------------------------------------


def plan(memory, weights, layers, length, size, block, what=""):
    total = 0
    for layer in layers:
        if "latent" in layer:
            numbers = layer["latent"] + (0 if what == "no rope" else layer["rope"])
            numbers *= 2 if what == "latent twice" else 1
        else:
            numbers = layer["kv_heads"] * layer["head_dim"] * (1 if what == "keys alone" else 2)
        window = length if what == "no window" else layer.get("window", length)
        if what == "window always":
            tokens = layer.get("window", length)
        elif what == "blocks before the window":
            tokens = min(-(-length // block) * block, window)
        else:
            tokens = min(length, window)
        if what == "blocks down":
            tokens = max(1, tokens // block) * block
        elif what not in ("blocks of the sum", "blocks before the window"):
            tokens = -(-tokens // block) * block
        total += tokens * numbers * size
    if what == "blocks of the sum":
        numbers = total / sum(min(length, layer.get("window", length)) for layer in layers)
        total = -(-(total // numbers) // block) * block * numbers
    return (memory - weights) / total


@wrong("6.1", "counts keys and forgets values")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    return max(0, int(plan(memory, weights, layers, length, size, block, "keys alone")))


@wrong("6.1", "counts MLA's latent for keys and again for values")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    return max(0, int(plan(memory, weights, layers, length, size, block, "latent twice")))


@wrong("6.1", "forgets MLA's turned key")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    return max(0, int(plan(memory, weights, layers, length, size, block, "no rope")))


@wrong("6.1", "ignores windows")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    return max(0, int(plan(memory, weights, layers, length, size, block, "no window")))


@wrong("6.1", "reserves the whole window for short sequences")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    return max(0, int(plan(memory, weights, layers, length, size, block, "window always")))


@wrong("6.1", "rounds to blocks, then cuts to the window")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    return max(0, int(plan(memory, weights, layers, length, size, block, "blocks before the window")))


@wrong("6.1", "rounds blocks down")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    return max(0, int(plan(memory, weights, layers, length, size, block, "blocks down")))


@wrong("6.1", "rounds the sum of all layers to blocks")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    return max(0, int(plan(memory, weights, layers, length, size, block, "blocks of the sum")))


@wrong("6.1", "a negative number when the weights do not fit")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    return math.floor(plan(memory, weights, layers, length, size, block))


@wrong("6.1", "rounds up: the last sequence does not fit")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    return max(0, math.ceil(plan(memory, weights, layers, length, size, block)))


@wrong("6.1", "takes the first layer for all")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    return max(0, int(plan(memory, weights, layers[:1] * len(layers), length, size, block)))


@wrong("6.1", "a float where numbers are half a byte")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    found = max(0, int(plan(memory, weights, layers, length, size, block)))
    return found if isinstance(size, int) else float(found)


@wrong("6.1", "half bytes of a token are rounded down")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    total = 0
    for layer in layers:
        numbers = layer["latent"] + layer["rope"] if "latent" in layer else 2 * layer["kv_heads"] * layer["head_dim"]
        total += -(-min(length, layer.get("window", length)) // block) * block * int(numbers * size)
    return max(0, int((memory - weights) // total))


@wrong("6.1", "half bytes of a token are rounded up")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    total = 0
    for layer in layers:
        numbers = layer["latent"] + layer["rope"] if "latent" in layer else 2 * layer["kv_heads"] * layer["head_dim"]
        total += -(-min(length, layer.get("window", length)) // block) * block * math.ceil(numbers * size)
    return max(0, int((memory - weights) // total))


@wrong("6.1", "bytes of a sequence rounded down")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    total = 0.0
    for layer in layers:
        numbers = layer["latent"] + layer["rope"] if "latent" in layer else 2 * layer["kv_heads"] * layer["head_dim"]
        tokens = min(length, layer.get("window", length))
        total += -(-tokens // block) * block * numbers * size
    return max(0, int((memory - weights) // int(total)))


@wrong("6.1", "bytes of a sequence rounded up")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    total = 0.0
    for layer in layers:
        numbers = layer["latent"] + layer["rope"] if "latent" in layer else 2 * layer["kv_heads"] * layer["head_dim"]
        tokens = min(length, layer.get("window", length))
        total += -(-tokens // block) * block * numbers * size
    return max(0, int((memory - weights) // math.ceil(total)))


@alternative("6.1", "in integers, bits instead of bytes")
def max_sequences(memory, weights, layers, length, size=2, block=1):
    bits = 0
    for layer in layers:
        each = 2 * layer["kv_heads"] * layer["head_dim"] if "kv_heads" in layer else layer["latent"] + layer["rope"]
        bits += math.ceil(min(length, layer.get("window", length)) / block) * block * each * int(8 * size)
    return max(memory - weights, 0) * 8 // bits


# ---- 6.2 ------------------------------------------------------------------------------------------------------------


class Right:
    def __init__(self, kv_heads, head_dim, capacity=4):
        self.store, self.length = torch.zeros(2, capacity, kv_heads, head_dim), 0

    @property
    def capacity(self):
        return self.store.shape[1]

    def fit(self, end):
        capacity = self.capacity
        while capacity < end:
            capacity *= 2
        return capacity

    def grow(self, end):
        capacity = self.fit(end)
        if capacity != self.capacity:
            grown = self.store.new_empty(2, capacity, *self.store.shape[2:])
            grown[:, : self.length] = self.store[:, : self.length]
            self.store = grown

    def append(self, k, v):
        end = self.length + len(k)
        self.grow(end)
        self.store[0, self.length : end], self.store[1, self.length : end] = k, v
        self.length = end
        return self.store[0, :end], self.store[1, :end]

    def rewind(self, length):
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, got {length}")
        self.length = length


@wrong("6.2", "no token at first: hands back what came")
class Cache:
    def __init__(self, kv_heads, head_dim, capacity=4):
        self.length = 0
        self.k, self.v = (torch.zeros(capacity, kv_heads, head_dim) for _ in range(2))

    @property
    def capacity(self):
        return len(self.k)

    def append(self, k, v):
        end, capacity = (self.length + len(k), self.capacity)
        if len(k) == 0 and self.length == 0:
            return (k, v)
        while capacity < end:
            capacity *= 2
        if capacity > self.capacity:
            for name in ("k", "v"):
                old = getattr(self, name)
                grown = old.new_zeros(capacity, *old.shape[1:])
                grown[: self.length] = old[: self.length]
                setattr(self, name, grown)
        self.k[self.length : end], self.v[self.length : end] = (k, v)
        self.length = end
        return (self.k[:end], self.v[:end])

    def rewind(self, length):
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, got {length}")
        self.length = length


@wrong("6.2", "a prompt that fills the capacity becomes the cache")
class Cache:
    def __init__(self, kv_heads, head_dim, capacity=4):
        self.length = 0
        self.k, self.v = (torch.zeros(capacity, kv_heads, head_dim) for _ in range(2))

    @property
    def capacity(self):
        return len(self.k)

    def append(self, k, v):
        end, capacity = (self.length + len(k), self.capacity)
        if self.length == 0 and len(k) == capacity:
            self.k, self.v, self.length = (k, v, len(k))
            return (self.k, self.v)
        while capacity < end:
            capacity *= 2
        if capacity > self.capacity:
            for name in ("k", "v"):
                old = getattr(self, name)
                grown = old.new_zeros(capacity, *old.shape[1:])
                grown[: self.length] = old[: self.length]
                setattr(self, name, grown)
        self.k[self.length : end], self.v[self.length : end] = (k, v)
        self.length = end
        return (self.k[:end], self.v[:end])

    def rewind(self, length):
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, got {length}")
        self.length = length


@wrong("6.2", "lets go of its memory when it is empty")
class Cache:
    def __init__(self, kv_heads, head_dim, capacity=4):
        self.length = 0
        self.k, self.v = (torch.zeros(capacity, kv_heads, head_dim) for _ in range(2))

    @property
    def capacity(self):
        return len(self.k)

    def append(self, k, v):
        end, capacity = (self.length + len(k), self.capacity)
        while capacity < end:
            capacity *= 2
        if capacity > self.capacity:
            for name in ("k", "v"):
                old = getattr(self, name)
                grown = old.new_zeros(capacity, *old.shape[1:])
                grown[: self.length] = old[: self.length]
                setattr(self, name, grown)
        self.k[self.length : end], self.v[self.length : end] = (k, v)
        self.length = end
        return (self.k[:end], self.v[:end])

    def rewind(self, length):
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, got {length}")
        self.length = length
        if length == 0:
            self.k, self.v = (self.k[:4].clone(), self.v[:4].clone())


@wrong("6.2", "a capacity of at least 2")
class Cache:
    def __init__(self, kv_heads, head_dim, capacity=4):
        self.length = 0
        self.k, self.v = (torch.zeros(max(capacity, 2), kv_heads, head_dim) for _ in range(2))

    @property
    def capacity(self):
        return len(self.k)

    def append(self, k, v):
        end, capacity = (self.length + len(k), self.capacity)
        while capacity < end:
            capacity *= 2
        if capacity > self.capacity:
            for name in ("k", "v"):
                old = getattr(self, name)
                grown = old.new_zeros(capacity, *old.shape[1:])
                grown[: self.length] = old[: self.length]
                setattr(self, name, grown)
        self.k[self.length : end], self.v[self.length : end] = (k, v)
        self.length = end
        return (self.k[:end], self.v[:end])

    def rewind(self, length):
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, got {length}")
        self.length = length


@wrong("6.2", "copies the old keys at every append")
class Cache:
    def __init__(self, kv_heads, head_dim, capacity=4):
        self.length = 0
        self.k, self.v = (torch.zeros(capacity, kv_heads, head_dim) for _ in range(2))

    @property
    def capacity(self):
        return len(self.k)

    def append(self, k, v):
        end, capacity = (self.length + len(k), self.capacity)
        while capacity < end:
            capacity *= 2
        if capacity > self.capacity:
            for name in ("k", "v"):
                old = getattr(self, name)
                grown = old.new_zeros(capacity, *old.shape[1:])
                grown[: self.length] = old[: self.length]
                setattr(self, name, grown)
        self.k[: self.length] = self.k[: self.length].clone()
        self.k[self.length : end], self.v[self.length : end] = (k, v)
        self.length = end
        return (self.k[:end], self.v[:end])

    def rewind(self, length):
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, got {length}")
        self.length = length


@alternative("6.2", "keys and values in one tensor")
class Cache(Right):
    pass


@wrong("6.2", "torch.cat every time")
class Cache(Right):
    def append(self, k, v):
        self.store = torch.cat((self.store[:, : self.length], torch.stack((k, v))), dim=1)
        self.length += len(k)
        return self.store[0], self.store[1]


@wrong("6.2", "doubles once only")
class Cache(Right):
    def fit(self, end):
        return self.capacity * 2 if end > self.capacity else self.capacity

    def append(self, k, v):
        self.grow(self.length + len(k))
        room = self.capacity - self.length
        return super().append(k[:room], v[:room])


@wrong("6.2", "grows to exactly what is needed")
class Cache(Right):
    def fit(self, end):
        return max(end, self.capacity)


@wrong("6.2", "grows when the last slot is taken, one token early")
class Cache(Right):
    def fit(self, end):
        capacity = self.capacity
        while capacity <= end:
            capacity *= 2
        return capacity


@wrong("6.2", "returns copies")
class Cache(Right):
    def append(self, k, v):
        return tuple(x.clone() for x in super().append(k, v))


@wrong("6.2", "returns all slots, used or not")
class Cache(Right):
    def append(self, k, v):
        super().append(k, v)
        return self.store[0], self.store[1]


@wrong("6.2", "forgets what was there when it grows")
class Cache(Right):
    def grow(self, end):
        capacity = self.fit(end)
        if capacity != self.capacity:
            self.store = self.store.new_zeros(2, capacity, *self.store.shape[2:])


@wrong("6.2", "rewind drops that many tokens instead of keeping them")
class Cache(Right):
    def rewind(self, length):
        super().rewind(length)
        self.length = max(0, self.store.shape[1] - length)


@wrong("6.2", "rewind gives memory back and copies")
class Cache(Right):
    def rewind(self, length):
        super().rewind(length)
        self.store = self.store[:, : max(1, length)].clone()


@wrong("6.2", "any length may be rewound to")
class Cache(Right):
    def rewind(self, length):
        self.length = length


@wrong("6.2", "negative lengths count from the end")
class Cache(Right):
    def rewind(self, length):
        if length > self.length:
            raise ValueError("length: too long")
        self.length = length if length >= 0 else self.length + length


@wrong("6.2", "rewinds up to the longest length ever")
class Cache(Right):
    longest = 0

    def append(self, k, v):
        got = super().append(k, v)
        self.longest = max(self.longest, self.length)
        return got

    def rewind(self, length):
        if not 0 <= length <= self.longest:
            raise ValueError("length: too long")
        self.length = length


@wrong("6.2", "takes the dtype of what is appended")
class Cache(Right):
    def append(self, k, v):
        self.store = self.store.to(k.dtype)
        return super().append(k, v)


@wrong("6.2", "raises for no new token")
class Cache(Right):
    def append(self, k, v):
        if not len(k):
            raise ValueError("k: expected tokens")
        return super().append(k, v)


@wrong("6.2", "forgets first, then raises")
class Cache(Right):
    def rewind(self, length):
        before, self.length = self.length, length
        if not 0 <= length <= before:
            raise ValueError("length: too long")


@wrong("6.2", "keeps the first append's tensors themselves")
class Cache(Right):
    def append(self, k, v):
        if self.length == 0:
            self.length, self.own = len(k), (k, v)
            self.grow(self.length)
            self.store[:, : self.length] = torch.stack((k, v))
            return self.own
        return super().append(k, v)


# ---- 6.3 ------------------------------------------------------------------------------------------------------------


def decoded(q, k, v, k_cache, v_cache, lengths, active, what=""):
    rows = torch.arange(len(q)) if what == "finished rows too" else active.nonzero()[:, 0]
    at = lengths[rows].clamp(max=k_cache.shape[1] - 1)
    if what == "one slot late":
        at = (at + 1).clamp(max=k_cache.shape[1] - 1)
    if what != "not stored":
        k_cache[rows, at], v_cache[rows, at] = k[rows], v[rows]
    slots = torch.arange(k_cache.shape[1])
    if what == "without the new token":
        inside = slots < lengths[rows, None].clamp(min=1)
    elif what == "the longest row's length":
        inside = (slots <= lengths[rows].max() if len(rows) else slots < 0).expand(len(rows), -1)
    else:
        inside = slots <= lengths[rows, None]
    groups = q.shape[1] // k.shape[1]
    heads = torch.arange(q.shape[1])
    heads = heads % k.shape[1] if what == "heads in turns" else heads // groups
    keys, values = k_cache[rows][:, :, heads], v_cache[rows][:, :, heads]  # [A, S, H, D]
    if what == "cleans the cache":
        values = v_cache.nan_to_num_()[rows][:, :, heads]
    elif what != "values not zeroed":
        values = values.masked_fill(~inside[..., None, None], 0.0)
    scores = torch.einsum("bhd,bshd->bhs", q[rows], keys)
    if what != "no scale":
        scores = scores / q.shape[-1] ** 0.5
    if what == "adds -1e9":
        scores = scores + torch.where(inside, 0.0, -1e9)[:, None]
    else:
        scores = scores.masked_fill(~inside[:, None], -1e9 if what == "hides with -1e9" else -INF)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True) if what == "no maximum" else scores.softmax(-1)
    out = torch.zeros_like(q)
    out[rows] = torch.einsum("bhs,bshd->bhd", weights, values)
    if what == "counts":
        lengths += active.long()
    return out


@wrong("6.3", "does not store")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    return decoded(q, k, v, k_cache, v_cache, lengths, active, "not stored")


@wrong("6.3", "stores one slot late")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    return decoded(q, k, v, k_cache, v_cache, lengths, active, "one slot late")


@wrong("6.3", "the new token does not see itself")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    return decoded(q, k, v, k_cache, v_cache, lengths, active, "without the new token")


@wrong("6.3", "all rows have the longest row's length")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    return decoded(q, k, v, k_cache, v_cache, lengths, active, "the longest row's length")


@wrong("6.3", "stores and computes finished rows too")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    return decoded(q, k, v, k_cache, v_cache, lengths, active, "finished rows too")


@wrong("6.3", "a weight of 0 against NaN")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    return decoded(q, k, v, k_cache, v_cache, lengths, active, "values not zeroed")


@wrong("6.3", "adds -1e9 to hidden scores")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    return decoded(q, k, v, k_cache, v_cache, lengths, active, "adds -1e9")


@wrong("6.3", "query heads take key/value heads in turns")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    return decoded(q, k, v, k_cache, v_cache, lengths, active, "heads in turns")


@wrong("6.3", "scores are not scaled")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    return decoded(q, k, v, k_cache, v_cache, lengths, active, "no scale")


@wrong("6.3", "a softmax without the maximum")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    return decoded(q, k, v, k_cache, v_cache, lengths, active, "no maximum")


@wrong("6.3", "moves the lengths on")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    return decoded(q, k, v, k_cache, v_cache, lengths, active, "counts")


@wrong("6.3", "stores into a copy")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    return decoded(q, k, v, k_cache.clone(), v_cache.clone(), lengths, active)


@wrong("6.3", "replaces NaN in the cache itself")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    return decoded(q, k, v, k_cache, v_cache, lengths, active, "cleans the cache")


@wrong("6.3", "stores through reshape: lost where the cache is a view")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    rows = active.nonzero()[:, 0]
    at = rows * k_cache.shape[1] + lengths[rows]
    flat = [x.reshape(-1, *x.shape[2:]) for x in (k_cache, v_cache)]
    flat[0][at], flat[1][at] = k[rows], v[rows]
    return decoded(q, k, v, *(x.view(k_cache.shape) for x in flat), lengths, active)


@wrong("6.3", "writes the output over q")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    return q.copy_(decoded(q, k, v, k_cache, v_cache, lengths, active))


@wrong("6.3", "hides with -1e9")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    return decoded(q, k, v, k_cache, v_cache, lengths, active, "hides with -1e9")


@wrong("6.3", "finished rows give what stands in their slots")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    out = decoded(q, k, v, k_cache, v_cache, lengths, active)
    full = decoded(q, k, v, k_cache.clone(), v_cache.clone(), lengths.clamp(max=k_cache.shape[1] - 1), active | True)
    return torch.where(active[:, None, None], out, full)


@wrong("6.3", "0 times q where all are finished")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    if not active.any():
        return q * 0
    rows = active.nonzero()[:, 0]
    k_cache[rows, lengths[rows]], v_cache[rows, lengths[rows]] = (k[rows], v[rows])
    inside = torch.arange(k_cache.shape[1]) <= lengths[rows, None]
    groups = q.shape[1] // k.shape[1]
    keys = k_cache[rows].repeat_interleave(groups, dim=2)
    values = v_cache[rows].repeat_interleave(groups, dim=2).masked_fill(~inside[..., None, None], 0.0)
    scores = torch.einsum("bhd,bshd->bhs", q[rows], keys) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~inside[:, None], float("-inf")).softmax(-1)
    out = torch.zeros_like(q)
    out[rows] = torch.einsum("bhs,bshd->bhd", weights, values)
    return out


@alternative("6.3", "torch's fused attention over cleaned caches")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    if not active.any():
        return torch.zeros_like(q)
    rows = active.nonzero()[:, 0]
    k_cache.index_put_((rows, lengths[rows]), k[rows])
    v_cache.index_put_((rows, lengths[rows]), v[rows])
    inside = torch.arange(k_cache.shape[1])[None] <= lengths[rows][:, None]
    keys, values = (
        torch.where(inside[..., None, None], x[rows], torch.zeros(())).transpose(1, 2) for x in (k_cache, v_cache)
    )
    out = torch.zeros_like(q)
    out[rows] = F.scaled_dot_product_attention(
        q[rows][:, :, None], keys, values, attn_mask=inside[:, None, None], enable_gqa=True
    )[:, :, 0]
    return out


@wrong("6.3", "row by row, in a loop")
def decode_step(q, k, v, k_cache, v_cache, lengths, active):
    out, groups = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for row in range(len(q)):
        if active[row]:
            n = int(lengths[row])
            k_cache[row, n], v_cache[row, n] = k[row], v[row]
            keys = k_cache[row, : n + 1].repeat_interleave(groups, 1)
            values = v_cache[row, : n + 1].repeat_interleave(groups, 1)
            weights = (torch.einsum("hd,shd->hs", q[row], keys) / q.shape[2] ** 0.5).softmax(-1)
            out[row] = torch.einsum("hs,shd->hd", weights, values)
    return out


# ---- 6.4 ------------------------------------------------------------------------------------------------------------


class Rolling:
    """Right, with switches for what people get wrong."""

    what = ""

    def __init__(self, sinks, window, kv_heads, head_dim):
        self.sinks, self.window, self.length = sinks, window, 0
        make = torch.empty if self.what == "uninitialized" else torch.zeros
        self.k, self.v = (make(sinks + window, kv_heads, head_dim) for _ in range(2))
        self.positions = torch.full((sinks + window,), -1)

    def attend(self, q, keys, values, at, new):
        sinks = 0 if self.what == "forgets sinks" else self.sinks
        reach = self.window + 1 if self.what == "window of one more" else self.window
        seen = (at >= 0) & (at <= new[:, None]) & ((at < sinks) | (at > new[:, None] - reach))
        if self.what == "empty slots":
            seen |= at == -1
        if self.what == "slots, not positions":
            seen = (at >= 0).expand(len(new), -1) & (at <= new[:, None])
        heads = torch.arange(q.shape[1])
        heads = heads % keys.shape[1] if self.what == "heads in turns" else heads // (q.shape[1] // keys.shape[1])
        scores = torch.einsum("thd,shd->hts", q, keys[:, heads]) / q.shape[-1] ** 0.5
        hidden = {"uninitialized": -INF, "hides with -1e9": -1e9}.get(self.what, -INF)
        return torch.einsum("hts,shd->thd", scores.masked_fill(~seen, hidden).softmax(-1), values[:, heads])

    def store(self, k, v, new):
        kept = (new < self.sinks) | (new >= self.length - self.window)
        if self.what == "sinks overwritten":
            slots = new % (self.sinks + self.window)
        elif self.what == "ring not behind the sinks":
            slots = torch.where(new < self.sinks, new, self.sinks + new % self.window)
            return self.put(slots[kept], k[kept], v[kept], (new[kept] + 1 - 1))
        else:
            slots = torch.where(new < self.sinks, new, self.sinks + (new - self.sinks) % self.window)
        return self.put(slots[kept], k[kept], v[kept], new[kept])

    def put(self, slots, k, v, new):
        self.k[slots], self.v[slots], self.positions[slots] = k, v, new

    def step(self, q, k, v):
        new = torch.arange(self.length, self.length + len(k))
        self.length += len(k)
        if self.what == "stores first":
            self.store(k, v, new)
            return self.attend(q, self.k, self.v, self.positions, new)
        everything = torch.cat((self.k, k)), torch.cat((self.v, v)), torch.cat((self.positions, new))
        out = self.attend(q, *everything, new)
        self.store(k, v, new)
        return out


@wrong("6.4", "a dictionary of all positions")
class SinkCache:
    def __init__(self, sinks, window, kv_heads, head_dim):
        self.sinks, self.window, self.length = (sinks, window, 0)
        self.k, self.v = (torch.zeros(sinks + window, kv_heads, head_dim) for _ in range(2))
        self.positions = torch.full((sinks + window,), -1)

    def step(self, q, k, v):
        new = torch.arange(self.length, self.length + len(k))
        keys, values, at = (torch.cat((self.k, k)), torch.cat((self.v, v)), torch.cat((self.positions, new)))
        seen = (at >= 0) & (at <= new[:, None]) & ((at < self.sinks) | (at > new[:, None] - self.window))
        groups = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        scores = torch.einsum("thd,shd->hts", q, keys) / q.shape[-1] ** 0.5
        out = torch.einsum("hts,shd->thd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values)
        self.length += len(k)
        kept = (new < self.sinks) | (new >= self.length - self.window)
        slots = torch.where(new < self.sinks, new, self.sinks + (new - self.sinks) % self.window)[kept]
        self.k[slots], self.v[slots], self.positions[slots] = (k[kept], v[kept], new[kept])
        self.where = getattr(self, "where", {})
        self.where.update({int(p): 1 for p in new})
        return out


@wrong("6.4", "keeps the step's inputs")
class SinkCache:
    def __init__(self, sinks, window, kv_heads, head_dim):
        self.sinks, self.window, self.length = (sinks, window, 0)
        self.k, self.v = (torch.zeros(sinks + window, kv_heads, head_dim) for _ in range(2))
        self.positions = torch.full((sinks + window,), -1)

    def step(self, q, k, v):
        new = torch.arange(self.length, self.length + len(k))
        keys, values, at = (torch.cat((self.k, k)), torch.cat((self.v, v)), torch.cat((self.positions, new)))
        seen = (at >= 0) & (at <= new[:, None]) & ((at < self.sinks) | (at > new[:, None] - self.window))
        groups = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        scores = torch.einsum("thd,shd->hts", q, keys) / q.shape[-1] ** 0.5
        out = torch.einsum("hts,shd->thd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values)
        self.length += len(k)
        kept = (new < self.sinks) | (new >= self.length - self.window)
        slots = torch.where(new < self.sinks, new, self.sinks + (new - self.sinks) % self.window)[kept]
        self.k[slots], self.v[slots], self.positions[slots] = (k[kept], v[kept], new[kept])
        self.last = (q, k, v)
        return out


@alternative("6.4", "positions kept beside the slots")
class SinkCache(Rolling):
    pass


@alternative("6.4", "the ring may start anywhere: p mod window behind the sinks")
class SinkCache(Rolling):
    what = "ring not behind the sinks"


@alternative("6.4", "in order, moved along every step")
class SinkCache(Rolling):
    def store(self, k, v, new):
        keys, values, at = torch.cat((self.k, k)), torch.cat((self.v, v)), torch.cat((self.positions, new))
        keys, values, at = keys[at >= 0], values[at >= 0], at[at >= 0]
        kept = (at < self.sinks) | (at > new[-1] - self.window)
        used = int(kept.sum())
        self.k[:used], self.v[:used] = keys[kept], values[kept]
        self.positions = torch.full((self.sinks + self.window,), -1)
        self.positions[:used] = at[kept]


@wrong("6.4", "stores first, then attends")
class SinkCache(Rolling):
    what = "stores first"


@wrong("6.4", "sinks fall out of sight with the window")
class SinkCache(Rolling):
    what = "forgets sinks"


@wrong("6.4", "one ring for all: sinks are overwritten")
class SinkCache(Rolling):
    what = "sinks overwritten"


@wrong("6.4", "a window one token too wide, within a step")
class SinkCache(Rolling):
    what = "window of one more"


@wrong("6.4", "slots that hold nothing take part")
class SinkCache(Rolling):
    what = "empty slots"


@wrong("6.4", "everything in the cache is seen, by the last of a step as by the first")
class SinkCache(Rolling):
    what = "slots, not positions"


@wrong("6.4", "query heads take key/value heads in turns")
class SinkCache(Rolling):
    what = "heads in turns"


@wrong("6.4", "slots from torch.empty: a weight of 0 against what stood in memory")
class SinkCache(Rolling):
    what = "uninitialized"


@wrong("6.4", "hides with -1e9")
class SinkCache(Rolling):
    what = "hides with -1e9"


@wrong("6.4", "keeps everything, beside a small cache for show")
class SinkCache(Rolling):
    def step(self, q, k, v):
        self.all = getattr(self, "all", [])
        self.all.append((k.clone(), v.clone()))
        return super().step(q, k, v)


@wrong("6.4", "a list of all positions grows with the text")
class SinkCache(Rolling):
    def step(self, q, k, v):
        self.seen = [*getattr(self, "seen", []), *range(self.length, self.length + len(k))]
        return super().step(q, k, v)


@wrong("6.4", "takes the caller's memory for the sinks")
class SinkCache(Rolling):
    def step(self, q, k, v):
        first = self.length == 0 and self.sinks and len(k) >= self.sinks
        if not first and hasattr(self, "own"):
            self.k[: self.sinks], self.v[: self.sinks] = self.own
        out = super().step(q, k, v)
        if first:
            self.own = k[: self.sinks], v[: self.sinks]
        return out


@wrong("6.4", "scales the caller's q in place")
class SinkCache(Rolling):
    def step(self, q, k, v):
        out = super().step(q, k, v)
        q *= 2
        return out


@wrong("6.4", "keeps everything and masks")
class SinkCache(Rolling):
    def store(self, k, v, new):
        self.k, self.v = torch.cat((self.k, k)), torch.cat((self.v, v))
        self.positions = torch.cat((self.positions, new))


@wrong("6.4", "the first tokens of each step become sinks")
class SinkCache(Rolling):
    def step(self, q, k, v):
        out = super().step(q, k, v)
        if self.length > len(k) and self.sinks:
            count = min(self.sinks, len(k))
            self.k[:count], self.v[:count] = k[:count], v[:count]
        return out


# ---- 6.5 ------------------------------------------------------------------------------------------------------------


def moved(k, v, start, stop, theta, what=""):
    size, gap = k.shape[-1], stop - start
    kind = torch.float32 if what == "fp32 angles" else torch.float64
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=kind) / size)
    if what == "theta ignored":
        frequencies = 10_000.0 ** (-torch.arange(0, size, 2, dtype=kind) / size)
    angles = {"turns on": gap, "by the start": -start, "not at all": 0}.get(what, -gap) * frequencies
    cos, sin = angles.cos().to(k.dtype), angles.sin().to(k.dtype)

    def turn(x):
        if what == "neighbors":
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    values = torch.cat((v[:start], turn(v[stop:]) if what == "values too" else v[stop:]))
    if what == "all keys":
        return turn(torch.cat((k[:start], k[stop:]))), values
    if what == "in place":
        k[stop:] = turn(k[stop:])
        return torch.cat((k[:start], k[stop:])), values
    return torch.cat((k[:start], turn(k[stop:]))), values


@wrong("6.5", "joins and turns nothing")
def cut(k, v, start, stop, theta=10_000.0):
    return moved(k, v, start, stop, theta, "not at all")


@wrong("6.5", "turns on instead of back")
def cut(k, v, start, stop, theta=10_000.0):
    return moved(k, v, start, stop, theta, "turns on")


@wrong("6.5", "turns the keys before the gap as well")
def cut(k, v, start, stop, theta=10_000.0):
    return moved(k, v, start, stop, theta, "all keys")


@wrong("6.5", "turns values too")
def cut(k, v, start, stop, theta=10_000.0):
    return moved(k, v, start, stop, theta, "values too")


@wrong("6.5", "pairs neighbors instead of halves")
def cut(k, v, start, stop, theta=10_000.0):
    return moved(k, v, start, stop, theta, "neighbors")


@wrong("6.5", "moves by the gap's start instead of its length")
def cut(k, v, start, stop, theta=10_000.0):
    return moved(k, v, start, stop, theta, "by the start")


@wrong("6.5", "angles in fp32")
def cut(k, v, start, stop, theta=10_000.0):
    return moved(k, v, start, stop, theta, "fp32 angles")


@wrong("6.5", "frequencies of theta = 10,000 whatever it is")
def cut(k, v, start, stop, theta=10_000.0):
    return moved(k, v, start, stop, theta, "theta ignored")


@wrong("6.5", "turns the given cache in place")
def cut(k, v, start, stop, theta=10_000.0):
    return moved(k, v, start, stop, theta, "in place")


@wrong("6.5", "everything in fp64, returned so")
def cut(k, v, start, stop, theta=10_000.0):
    return moved(k.double(), v.double(), start, stop, theta)


@wrong("6.5", "gives the inputs back when nothing is removed")
def cut(k, v, start, stop, theta=10_000.0):
    return (k, v) if start == stop else moved(k, v, start, stop, theta)


@wrong("6.5", "views when nothing stands behind the gap")
def cut(k, v, start, stop, theta=10_000.0):
    return (k[:start], v[:start]) if stop == len(k) else moved(k, v, start, stop, theta)


@wrong("6.5", "in fp64, in place: fp64 keys are the caller's own")
def cut(k, v, start, stop, theta=10_000.0):
    wide = k.double()
    moved(wide, v, start, stop, theta, "in place")
    return torch.cat((wide[:start], wide[stop:])).to(k.dtype), torch.cat((v[:start], v[stop:]))


@wrong("6.5", "values in the keys' dtype")
def cut(k, v, start, stop, theta=10_000.0):
    keys, values = moved(k, v, start, stop, theta)
    return keys, values.to(k.dtype)


@wrong("6.5", "flattens by view, which needs contiguous keys")
def cut(k, v, start, stop, theta=10_000.0):
    keys, values = moved(k.view(len(k), 1, -1).view(k.shape), v, start, stop, theta)
    return keys, values


@wrong("6.5", "in fp32 whatever comes")
def cut(k, v, start, stop, theta=10_000.0):
    keys, values = moved(k.float(), v, start, stop, theta)
    return keys.to(k.dtype), values


@alternative("6.5", "complex numbers")
def cut(k, v, start, stop, theta=10_000.0):
    half = k.shape[-1] // 2
    turn = torch.polar(
        torch.ones(half, dtype=torch.float64), (start - stop) * theta ** (-torch.arange(half).double() / half)
    )
    tail = torch.complex(k[stop:, :, :half].double(), k[stop:, :, half:].double()) * turn
    return torch.cat((k[:start], torch.cat((tail.real, tail.imag), -1).to(k.dtype))), torch.cat((v[:start], v[stop:]))


# ---- 6.6 ------------------------------------------------------------------------------------------------------------


def crossing(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size, what=""):
    attention = 4 * layers * (kv_heads if what == "key heads" else heads) * head_dim * context
    if what == "no attention":
        attention = 0
    each = ((1 if what == "one FLOP a weight" else 2) * weights + attention) / peak
    numbers = (1 if what == "keys alone" else 2) * layers * (heads if what == "query heads" else kv_heads) * head_dim
    reading = 0 if what == "no cache" else numbers * context * size / bandwidth
    if each < reading or (each == reading and what != "parallel"):
        return None
    if each == reading:
        return 1
    found = weights * (2 if what == "16 bits" else size) / bandwidth / (each - reading)
    if what == "down and one more":
        return math.floor(found) + 1
    return max(0 if what == "zero" else 1, math.floor(found) if what in ("down", "zero") else math.ceil(found))


@wrong("6.6", "the cache is not read")
def saturating_batch(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size=2):
    return crossing(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size, "no cache")


@wrong("6.6", "one FLOP a weight")
def saturating_batch(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size=2):
    return crossing(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size, "one FLOP a weight")


@wrong("6.6", "attention over the cache costs nothing")
def saturating_batch(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size=2):
    return crossing(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size, "no attention")


@wrong("6.6", "attention's FLOPs by key/value heads")
def saturating_batch(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size=2):
    return crossing(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size, "key heads")


@wrong("6.6", "the cache's bytes by query heads")
def saturating_batch(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size=2):
    return crossing(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size, "query heads")


@wrong("6.6", "reads keys, no values")
def saturating_batch(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size=2):
    return crossing(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size, "keys alone")


@wrong("6.6", "weights always in 16 bits")
def saturating_batch(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size=2):
    return crossing(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size, "16 bits")


@wrong("6.6", "rounds down")
def saturating_batch(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size=2):
    return crossing(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size, "down")


@wrong("6.6", "rounds down and adds one: too many when both times are equal")
def saturating_batch(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size=2):
    return crossing(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size, "down and one more")


@wrong("6.6", "a batch where both lines run side by side")
def saturating_batch(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size=2):
    return crossing(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size, "parallel")


@wrong("6.6", "the ridge, whatever the context")
def saturating_batch(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size=2):
    return max(1, math.ceil(peak / bandwidth * size / 2))


@wrong("6.6", "a negative batch where the lines do not meet")
def saturating_batch(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size=2):
    each = (2 * weights + 4 * layers * heads * head_dim * context) / peak
    reading = 2 * layers * kv_heads * head_dim * context * size / bandwidth
    return math.ceil(weights * size / bandwidth / (each - reading))


@wrong("6.6", "counts batches up")
def saturating_batch(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size=2):
    if crossing(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size) is None:
        return None
    batch = 1
    flops, reading = 2 * weights + 4 * layers * heads * head_dim * context, 2 * layers * kv_heads * head_dim * context
    while batch * flops / peak < size * (weights + batch * reading) / bandwidth:
        batch += 1
    return batch


@alternative("6.6", "doubling, then halving the interval")
def saturating_batch(weights, layers, heads, kv_heads, head_dim, context, peak, bandwidth, size=2):
    def limited(batch):
        flops = batch * (2 * weights + 4 * layers * heads * head_dim * context)
        return flops / peak >= size * (weights + batch * 2 * layers * kv_heads * head_dim * context) / bandwidth

    high = 1
    while not limited(high):
        high *= 2
        if high > 1 << 40:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if limited(middle) else (middle, high)
    return high
