"""Implementations that the checks of exercises 14 must refuse, and others that they must accept."""

import math

import numpy as np
import torch

from minillm.learn.testing import alternative, wrong

# ---- 14.1


def chances_of(alphas, *, valid=lambda a: 0 <= a <= 1, last=True, carry=True, start=1, miss=True, tau=None):
    """The right one, but for what is switched."""
    chances, so_far = [], 1.0
    for alpha in alphas:
        if not valid(alpha):
            raise ValueError
        chances.append((so_far if carry else 1) * ((1 - alpha) if miss else alpha))
        so_far *= alpha
    chances.append(so_far if last else 0.0)
    average = sum((j + start) * chance for j, chance in enumerate(chances))
    return chances, average if tau is None else tau(alphas, chances)


def chancer(**switches):
    return lambda alphas: chances_of(alphas, **switches)


def series(alphas, a):
    return 1.0 if not alphas else len(alphas) + 1 if a == 1 else (1 - a ** (len(alphas) + 1)) / (1 - a)


for switches, why in (
    ({"carry": False}, "not given that those before are right"),
    ({"last": False}, "all right never happens"),
    ({"start": 0}, "guesses alone, without the model's token"),
    ({"start": 2}, "one too many"),
    ({"miss": False}, "alpha for 1 - alpha"),
    ({"tau": lambda a, c: 1 + sum(a)}, "adds alphas"),
    ({"tau": lambda a, c: series(a, sum(a) / max(1, len(a)))}, "the series of the mean"),
    ({"tau": lambda a, c: series(a, a[0] if a else 0)}, "the series of the first"),
    ({"tau": lambda a, c: sum(c) * (len(a) + 1)}, "the most there can be"),
    ({"tau": lambda a, c: 1 + math.prod(a) * len(a)}, "all or nothing"),
    ({"tau": lambda a, c: round(sum((j + 1) * x for j, x in enumerate(c)), 3)}, "rounded"),
    ({"valid": lambda a: True}, "nothing is looked at"),
    ({"valid": lambda a: a <= 1}, "negative ones pass"),
    ({"valid": lambda a: a >= 0}, "more than 1 passes"),
    ({"valid": lambda a: not (a < 0 or a > 1)}, "NaN passes"),
    ({"valid": lambda a: 0 < a < 1}, "0 and 1 are refused"),
    ({"valid": lambda a: 0 <= a < 1}, "1 is refused"),
    ({"valid": lambda a: 0 < a <= 1}, "0 is refused"),
    ({"valid": lambda a: -1e-6 <= a <= 1 + 1e-6}, "a little outside passes"),
    ({"valid": lambda a: -1e-12 <= a <= 1 + 1e-12}, "a rounding error outside passes"),
):
    wrong("14.1", why)(chancer(**switches))


@wrong("14.1", "divides by 1 - alpha")
def step_tokens(alphas):
    chances, _ = chances_of(alphas)
    return chances, (1 - alphas[0] ** (len(alphas) + 1)) / (1 - alphas[0])


@wrong("14.1", "looks at the first alpha alone")
def step_tokens(alphas):
    if alphas and not 0 <= alphas[0] <= 1:
        raise ValueError
    return chances_of(alphas, valid=lambda a: True)


@wrong("14.1", "stops at the first alpha of 0, and so misses what is behind")
def step_tokens(alphas):
    chances, so_far = [], 1.0
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise ValueError
        chances.append(so_far * (1 - alpha))
        so_far *= alpha
        if so_far == 0:
            break
    chances += [0.0] * (len(alphas) - len(chances)) + [so_far]
    return chances, sum((j + 1) * c for j, c in enumerate(chances))


@wrong("14.1", "k = 0 is an error")
def step_tokens(alphas):
    if not alphas:
        raise ValueError
    return chances_of(alphas)


@wrong("14.1", "tau alone")
def step_tokens(alphas):
    return chances_of(alphas)[1]


@wrong("14.1", "the other order")
def step_tokens(alphas):
    return chances_of(alphas)[::-1]


@wrong("14.1", "sorts the alphas")
def step_tokens(alphas):
    return chances_of(sorted(alphas, reverse=True))


@wrong("14.1", "takes the caller's list apart")
def step_tokens(alphas):
    found = chances_of(alphas)
    if isinstance(alphas, list):
        alphas.clear()
    return found


@alternative("14.1", "sums of products, numpy")
def step_tokens(alphas):
    a = np.asarray(alphas, dtype=np.float64)
    if not ((a >= 0) & (a <= 1)).all():
        raise ValueError
    all_right = np.concatenate(([1.0], a.cumprod()))
    return (all_right - np.append(all_right[1:], 0)).tolist(), float(all_right.sum())


# ---- 14.2


def chosen(alpha, c, v, *, given=None, took=None, better=lambda new, old: new > old, stop=False, first=0, last=None,
           give=lambda k, s: (k, s)):  # fmt: skip
    given = given or (lambda a, k: sum(a**j for j in range(k + 1)))
    took = took or (lambda c, k, v: c * k + v[k])
    best = (0, 0.0)
    for k in range(first, len(v) if last is None else min(last, len(v))):
        speedup = given(alpha, k) / took(c, k, v)
        if better(speedup, best[1]):
            best = k, speedup
        elif stop:
            break
    return give(*best)


def chooser(**switches):
    return lambda alpha, c, v: chosen(alpha, c, v, **switches)


for switches, why in (
    ({"given": lambda a, k: sum(a**j for j in range(1, k + 1)) if k else 1}, "the model's token is forgotten"),
    ({"given": lambda a, k: 1 + a * k}, "guesses do not depend on those before"),
    ({"given": lambda a, k: 1 + k * a**k}, "all or nothing"),
    ({"given": lambda a, k: sum(a**j for j in range(k + 2))}, "one guess too many"),
    ({"given": lambda a, k: k + 1}, "all are right"),
    ({"given": lambda a, k: (1 - a ** (k + 1)) / (1 - a) if a < 1 else 1}, "alpha 1 gives one"),
    ({"given": lambda a, k: min(sum(a**j for j in range(k + 1)), 8)}, "8 tokens at most"),
    ({"took": lambda c, k, v: v[k]}, "guesses cost nothing"),
    ({"took": lambda c, k, v: c + v[k]}, "all guesses for the price of one, and at k = 0 too"),
    ({"took": lambda c, k, v: (c if k else 0) + v[k]}, "all guesses for the price of one"),
    ({"took": lambda c, k, v: c * k + 1}, "checking costs nothing"),
    ({"took": lambda c, k, v: c * (k + 1) + v[k]}, "k + 1 guesses"),
    ({"took": lambda c, k, v: max(c * k, v[k])}, "guessing and checking at once"),
    ({"took": lambda c, k, v: c * k * v[k] + v[k]}, "guesses cost more when checking does"),
    ({"took": lambda c, k, v: c * k + v[-1]}, "always the largest step"),
    ({"took": lambda c, k, v: c * k + 1 + (v[1] - 1) * k if k else 1}, "a straight line through v[1]"),
    ({"better": lambda new, old: new >= old}, "of equal ones the largest k"),
    ({"better": lambda new, old: new > old * (1 + 1e-6)}, "a little better is not better"),
    ({"given": lambda a, k: k + 1 if a > 0.9999 else sum(a**j for j in range(k + 1))}, "almost 1 is 1"),
    ({"stop": True}, "stops where it first falls"),
    ({"first": 1}, "always guesses"),
    ({"last": 9}, "at most 8 guesses"),
    ({"last": 65}, "at most 64 guesses"),
    ({"give": lambda k, s: (k + 1, s)}, "tokens for guesses"),
    ({"give": lambda k, s: (s, k)}, "the other order"),
    ({"give": lambda k, s: k}, "k alone"),
    ({"give": lambda k, s: (k, round(s, 2))}, "rounded"),
    ({"give": lambda k, s: (k, 1 / s)}, "the time for the speed-up"),
):
    wrong("14.2", why)(chooser(**switches))


@wrong("14.2", "sorts v")
def best_length(alpha, c, v):
    return chosen(alpha, c, sorted(v))


@wrong("14.2", "changes v")
def best_length(alpha, c, v):
    found = chosen(alpha, c, v)
    if isinstance(v, list):
        v[:] = [c * k + s for k, s in enumerate(v)]
    return found


@wrong("14.2", "guesses only if alpha is above c")
def best_length(alpha, c, v):
    return chosen(alpha, c, v, last=None if alpha > c else 1)


@wrong("14.2", "times that never fall")
def best_length(alpha, c, v):
    return chosen(alpha, c, np.maximum.accumulate(np.asarray(v, dtype=float)).tolist())


@wrong("14.2", "alpha 0 never pays")
def best_length(alpha, c, v):
    return chosen(alpha, c, v, last=None if alpha else 1)


@wrong("14.2", "stops after three that are not better")
def best_length(alpha, c, v):
    k = 0
    while k + 1 < len(v) and (better := chosen(alpha, c, v, last=min(k + 4, len(v)))[0]) > k:
        k = better
    return chosen(alpha, c, v, last=k + 1)


@wrong("14.2", "compares speed-ups of six digits")
def best_length(alpha, c, v):
    every = [sum(alpha**j for j in range(k + 1)) / (c * k + s) for k, s in enumerate(v)]
    rounded = [round(s, 6) for s in every]
    k = rounded.index(max(rounded))
    return k, every[k]


@alternative("14.2", "max over all, the series in closed form")
def best_length(alpha, c, v):
    def speedup(k):
        return (k + 1 if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)) / (c * k + v[k])

    k = max(range(len(v)), key=lambda k: (round(speedup(k), 12), -k))
    return [k, speedup(k)]


# ---- 14.3


def checked(logits, guesses, counts, *, prefix=True, padding=True, bonus=True, fill=-1, pick=None, most=None,
            dtype=torch.int64):  # fmt: skip
    best = logits.argmax(-1) if pick is None else pick(logits)
    place = torch.arange(best.shape[1])
    right = best[:, :-1] == guesses
    if padding:
        right = right & (place[:-1] < counts[:, None])
    right = right.long()
    given = (right.cumprod(1) if prefix else right).sum(1) + 1
    if not bonus:
        given = torch.minimum(given, counts.clamp(min=1))
    if most is not None:
        given = given.clamp(max=most)
    tokens = best if fill is None else torch.where(place < given[:, None], best, fill)
    return given.to(dtype), tokens.to(dtype)


def checker(**switches):
    return lambda logits, guesses, counts: checked(logits, guesses, counts, **switches)


def last_of_ties(logits):
    return logits.shape[-1] - 1 - logits.flip(-1).argmax(-1)


for switches, why in (
    ({"prefix": False}, "counts all that agree"),
    ({"padding": False}, "padding may be right"),
    ({"bonus": False}, "no bonus token"),
    ({"fill": None}, "tokens behind are left"),
    ({"fill": 0}, "0 behind"),
    ({"pick": last_of_ties}, "of equal logits the largest id"),
    ({"pick": lambda z: z.abs().argmax(-1)}, "the largest in size"),
    ({"pick": lambda z: z.bfloat16().argmax(-1)}, "in bf16"),
    ({"pick": lambda z: z.softmax(-1).argmax(-1)}, "the largest of the softmax"),
    ({"pick": lambda z: z.float().log_softmax(-1).argmax(-1)}, "the largest of the logarithms"),
    ({"pick": lambda z: z.to(torch.bfloat16 if z.dtype == torch.float16 else z.dtype).argmax(-1)}, "fp16 as bf16"),
    ({"pick": lambda z: z.clamp(min=-1e4).argmax(-1)}, "very negative logits are equal"),
    ({"pick": lambda z: z.clamp(max=100).argmax(-1)}, "large logits are equal"),
    ({"pick": lambda z: torch.where(z > 0, z, 0.0).argmax(-1)}, "negative logits are 0"),
    ({"pick": lambda z: z.argmin(-1)}, "the smallest"),
    ({"most": 4}, "at most 4 tokens"),
    ({"dtype": torch.int32}, "int32"),
    ({"dtype": torch.float32}, "floats"),
):
    wrong("14.3", why)(checker(**switches))


@wrong("14.3", "the rows are one place late")
def verify(logits, guesses, counts):
    return checked(logits.roll(-1, 1), guesses, counts)


@wrong("14.3", "gives the guesses, and 0 behind them")
def verify(logits, guesses, counts):
    given, tokens = checked(logits, guesses, counts)
    return given, torch.where(tokens >= 0, torch.nn.functional.pad(guesses.long(), (0, 1)), -1)


@wrong("14.3", "without the correction of a wrong guess")
def verify(logits, guesses, counts):
    given, tokens = checked(logits, guesses, counts)
    given = torch.where(given <= counts, given - 1, given)
    return given, torch.where(torch.arange(tokens.shape[1]) < given[:, None], tokens, -1)


@wrong("14.3", "how many are right, without the model's token")
def verify(logits, guesses, counts):
    given, tokens = checked(logits, guesses, counts)
    return given - 1, tokens


@wrong("14.3", "the smallest count for all")
def verify(logits, guesses, counts):
    return checked(logits, guesses, counts.clamp(max=int(counts.min())) if len(counts) else counts)


@wrong("14.3", "a sequence after the other")
def verify(logits, guesses, counts):
    parts = [checked(z[None], g[None], n[None]) for z, g, n in zip(logits, guesses, counts, strict=True)]
    if not parts:
        return checked(logits, guesses, counts)
    return torch.cat([g for g, _ in parts]), torch.cat([t for _, t in parts])


@wrong("14.3", "a place after the other")
def verify(logits, guesses, counts):
    best, alive = logits.argmax(-1), torch.ones(len(logits), dtype=torch.bool)
    given = torch.ones(len(logits), dtype=torch.int64)
    for j in range(guesses.shape[1]):
        alive = alive & (best[:, j] == guesses[:, j]) & (j < counts)
        given = given + alive
    return given, torch.where(torch.arange(best.shape[1]) < given[:, None], best, -1)


@wrong("14.3", "lists in between")
def verify(logits, guesses, counts):
    best, given = logits.argmax(-1), []
    for row, guess, count in zip(best.tolist(), guesses.tolist(), counts.tolist(), strict=True):
        n = 0
        while n < count and row[n] == guess[n]:
            n += 1
        given.append(n + 1)
    given = torch.tensor(given, dtype=torch.int64)
    return given, torch.where(torch.arange(best.shape[1]) < given[:, None], best, -1)


@wrong("14.3", "asks whether all are right")
def verify(logits, guesses, counts):
    best = logits.argmax(-1)
    if bool((best[:, :-1] == guesses).all()) and bool((counts == guesses.shape[1]).all()):
        return counts.long() + 1, best
    return checked(logits, guesses, counts)


@wrong("14.3", "writes -1 into the guesses")
def verify(logits, guesses, counts):
    guesses.masked_fill_(torch.arange(guesses.shape[1]) >= counts[:, None], -1)
    return checked(logits, guesses, counts)


@wrong("14.3", "padding of -1 is relied upon")
def verify(logits, guesses, counts):
    return checked(logits, guesses, (guesses >= 0).sum(1))


@wrong("14.3", "argmin of what is right: none if all are")
def verify(logits, guesses, counts):
    best = logits.argmax(-1)
    place = torch.arange(best.shape[1])
    right = (best[:, :-1] == guesses) & (place[:-1] < counts[:, None])
    given = 1 + right.int().argmin(1) if guesses.shape[1] else torch.ones(len(guesses), dtype=torch.int64)
    return given, torch.where(place < given[:, None], best, -1)


@wrong("14.3", "ids of 16 bits")
def verify(logits, guesses, counts):
    given, tokens = checked(logits, guesses, counts)
    return given, torch.where(tokens >= 0, tokens % 65536, -1)


@wrong("14.3", "compares ids in the logits' dtype")
def verify(logits, guesses, counts):
    near = logits.argmax(-1)[:, : guesses.shape[1]].to(logits.dtype) == guesses.to(logits.dtype)
    return checked(logits, torch.where(near, logits.argmax(-1)[:, : guesses.shape[1]], guesses), counts)


@wrong("14.3", "compares ids of 16 bits")
def verify(logits, guesses, counts):
    best = logits.argmax(-1)[:, : guesses.shape[1]]
    return checked(logits, torch.where(best.short() == guesses.short(), best, guesses), counts)


def counted(logits, guesses, counts, given_of):
    best = logits.argmax(-1)
    place = torch.arange(best.shape[1])
    given = given_of((best[:, :-1] == guesses) & (place[:-1] < counts[:, None]))
    return given, torch.where(place < given[:, None], best, -1)


@wrong("14.3", "misses counted in 8 bits")
def verify(logits, guesses, counts):
    return counted(logits, guesses, counts, lambda right: 1 + ((~right).cumsum(1, dtype=torch.uint8) == 0).sum(1))


@wrong("14.3", "right ones summed in 8 bits")
def verify(logits, guesses, counts):
    return counted(logits, guesses, counts, lambda right: 1 + right.long().cumprod(1).sum(1, dtype=torch.uint8).long())


@wrong("14.3", "right ones summed in fp16")
def verify(logits, guesses, counts):
    return counted(logits, guesses, counts, lambda right: 1 + right.half().cumprod(1).sum(1).long())


@wrong("14.3", "a loop over blocks of 16 places")
def verify(logits, guesses, counts):
    def given_of(right):
        given, alive = torch.ones(len(right), dtype=torch.int64), torch.ones(len(right), 1, dtype=torch.int64)
        for part in right.long().split(16, 1):
            run = alive * part.cumprod(1)
            given, alive = given + run.sum(1), run.amin(1, keepdim=True) if part.shape[1] else alive
        return given

    return counted(logits, guesses, counts, given_of)


@wrong("14.3", "changes logits of half precision")
def verify(logits, guesses, counts):
    found = checked(logits, guesses, counts)
    if logits.dtype != torch.float32:
        logits.mul_(2)
    return found


@wrong("14.3", "changes counts")
def verify(logits, guesses, counts):
    found = checked(logits, guesses, counts)
    counts.add_(1)
    return found


@wrong("14.3", "a view, which only some strides have")
def verify(logits, guesses, counts):
    return checked(logits.view(-1, logits.shape[-1]).view(logits.shape), guesses, counts)


@wrong("14.3", "at least one guess each")
def verify(logits, guesses, counts):
    return checked(logits, guesses, counts.clamp(min=1))


@wrong("14.3", "no sequences are an error")
def verify(logits, guesses, counts):
    if not len(logits):
        raise ValueError
    return checked(logits, guesses, counts)


@alternative("14.3", "argmin with a wrong one behind")
def verify(logits, guesses, counts):
    best = torch.max(logits, -1).indices
    place = torch.arange(best.shape[1])
    right = (best[:, :-1] == guesses) & (place[:-1] < counts.unsqueeze(1))
    right = torch.nn.functional.pad(right, (0, 1)).to(torch.int8)
    given = 1 + right.argmin(1)
    return [given, best.masked_fill(place >= given.unsqueeze(1), -1)]


@alternative("14.3", "logical_and of a cumulative sum of misses")
def verify(logits, guesses, counts):
    best = logits.argmax(-1)
    place = torch.arange(best.shape[1] - 1)
    miss = torch.logical_or(best[:, :-1] != guesses, place >= counts[:, None])
    behind = torch.nn.functional.pad(miss.cumsum(1), (1, 0)) > 0
    return (~behind).sum(1), torch.where(behind, -1, best)


# ---- 14.4


def ruled(p, q, guesses, uniforms, *, accept=lambda u, p, q: u * q < p, rest=lambda p, q: (p - q).clamp(min=0),
          last=lambda p, k: p[k], u_of=lambda uniforms, j: uniforms[-1], empty=lambda left, p: left.any(), go_on=False,
          total=lambda sums: sums[-1], above=lambda sums, level: sums > level, dtype=torch.float64,
          give=lambda tokens: tokens, bonus=True):  # fmt: skip
    """The right one, but for what is switched."""
    p, q, tokens, k = p.to(dtype), q.to(dtype), [], len(guesses)

    def draw(weights, u):
        sums = weights.cumsum(0)
        found = above(sums, u * total(sums)).nonzero()
        return int(found[0]) if len(found) else len(weights) - 1

    for j, x in enumerate(guesses):
        if accept(float(uniforms[j]), float(p[j, x]), float(q[j, x])):
            tokens.append(int(x))
            continue
        left = rest(p[j], q[j])
        tokens.append(draw(left if empty(left, p[j]) else p[j], u_of(uniforms, j)))
        if not go_on:
            return give(tokens)
    return give([*tokens, draw(last(p, k), uniforms[-1])] if bonus or not k else tokens)


def rules(**switches):
    return lambda p, q, guesses, uniforms: ruled(p, q, guesses, uniforms, **switches)


for switches, why in (
    ({"accept": lambda u, p, q: u < p}, "accepts with p"),
    ({"accept": lambda u, p, q: u * q <= p}, "the uniform 0 accepts p = 0"),
    ({"accept": lambda u, p, q: u * p < q}, "q over p"),
    ({"accept": lambda u, p, q: q <= p}, "accepts where p is above q, else never"),
    ({"accept": lambda u, p, q: p > 0}, "accepts whatever is possible"),
    ({"accept": lambda u, p, q: True}, "accepts all"),
    ({"accept": lambda u, p, q: False}, "accepts none"),
    ({"accept": lambda u, p, q: 1 - u < p / q if q else p > 0}, "1 - u"),
    ({"accept": lambda u, p, q: q > 0 and u < p / q}, "q = 0 is refused"),
    ({"accept": lambda u, p, q: u < p / (q + 1e-3)}, "a little added below"),
    ({"accept": lambda u, p, q: u < p / (q + 1e-10)}, "very little added below"),
    ({"accept": lambda u, p, q: u * q < p <= 1}, "p above 1 is refused"),
    ({"u_of": lambda uniforms, j: min(uniforms[-1], 0.999)}, "the rest by a number that is at most 0.999"),
    (
        {"above": lambda sums, level: (sums >= level) & (sums > 0) & (sums.diff(prepend=sums[:1] * 0) > 0)},
        "a sum that is equal is enough",
    ),
    ({"accept": lambda u, p, q: float(np.float32(u)) * q < p}, "uniforms of fp32"),
    ({"accept": lambda u, p, q: u < min(p, q)}, "the overlap for the ratio"),
    ({"accept": lambda u, p, q: u < (p / q) ** 2 if q else p > 0}, "the ratio squared"),
    ({"rest": lambda p, q: p}, "the rest is p"),
    ({"rest": lambda p, q: (p - q).abs()}, "|p - q|"),
    ({"rest": lambda p, q: (q - p).clamp(min=0)}, "q - p"),
    ({"rest": lambda p, q: q}, "the rest is q"),
    ({"rest": lambda p, q: torch.where(p > q, p, 0.0)}, "p where it is above q"),
    ({"rest": lambda p, q: p * (1 - q)}, "p (1 - q)"),
    (
        {"rest": lambda p, q: p / p.sum() - q},
        "negative weights",
    ),
    ({"rest": lambda p, q: torch.relu(p / p.sum() - q / q.sum())}, "p normalized first"),
    ({"rest": lambda p, q: torch.nn.functional.one_hot((p - q).argmax(), len(p)).double()}, "the largest of the rest"),
    ({"rest": lambda p, q: (p - q).clamp(min=1e-3)}, "a little for everybody"),
    ({"last": lambda p, k: p[k - 1] if k else p[k]}, "the bonus token from the row before"),
    ({"last": lambda p, k: p[0]}, "the bonus token from the first row"),
    (
        {"last": lambda p, k: torch.nn.functional.one_hot(p[k].argmax(), p.shape[1]).double()},
        "the bonus token is greedy",
    ),
    ({"u_of": lambda uniforms, j: uniforms[j]}, "the rest by the guess's own number"),
    ({"u_of": lambda uniforms, j: uniforms[j + 1]}, "the rest by the next guess's number"),
    ({"empty": lambda left, p: True}, "nothing left: the last token"),
    ({"empty": lambda left, p: left.sum() > 1e-6}, "little left counts as nothing"),
    ({"empty": lambda left, p: left.sum() > 1e-15}, "very little left counts as nothing"),
    ({"rest": lambda p, q: (p - q).clamp(min=0) if (p > q).any() else q}, "nothing left: drawn from q"),
    (
        {"last": lambda p, k: torch.cat((p[k], (1 - p[k].sum()).clamp(min=0)[None]))},
        "the last row is taken to sum to 1",
    ),
    ({"above": lambda sums, level: sums.float() > float(level)}, "draws in fp32"),
    (
        {"above": lambda sums, level: (sums > level) & (level < 0.999999 * sums[-1])},
        "the largest uniforms: the last id",
    ),
    ({"go_on": True}, "goes on behind a refusal"),
    ({"bonus": False}, "no bonus token"),
    ({"total": lambda sums: 1.0}, "not normalized"),
    ({"above": lambda sums, level: sums >= level}, "a weight of 0 may be drawn"),
    ({"dtype": torch.float32}, "fp32"),
    ({"dtype": torch.bfloat16}, "bf16"),
    ({"give": lambda tokens: tokens[-1:]}, "the last token alone"),
    ({"give": lambda tokens: tokens[:-1] or tokens}, "without the token that is drawn"),
    ({"give": torch.tensor}, "a tensor"),
    ({"give": lambda tokens: [torch.tensor(x) for x in tokens]}, "tensors in a list"),
    ({"give": lambda tokens: tokens[:4]}, "at most 4 tokens"),
):
    wrong("14.4", why)(rules(**switches))


@wrong("14.4", "writes the rest into p")
def speculate(p, q, guesses, uniforms):
    found = ruled(p, q, guesses, uniforms)
    if len(guesses):
        p[0] = (p[0] - q[0]).clamp(min=0)
    return found


@wrong("14.4", "takes the guesses off the list")
def speculate(p, q, guesses, uniforms):
    found = ruled(p, q, guesses, uniforms)
    if isinstance(guesses, list):
        guesses.clear()
    return found


@wrong("14.4", "draws with torch's generator")
def speculate(p, q, guesses, uniforms):
    return [*ruled(p, q, guesses, uniforms)[:-1], int(torch.multinomial(p[len(guesses)].double(), 1))]


@wrong("14.4", "keeps a guess if a draw of p equals it")
def speculate(p, q, guesses, uniforms):
    tokens = []
    for j in range(len(guesses) + 1):
        tokens += ruled(p[j : j + 1], q[:0], [], [uniforms[j]])
        if j == len(guesses) or tokens[-1] != guesses[j]:
            break
    return tokens


@wrong("14.4", "k = 0 is an error")
def speculate(p, q, guesses, uniforms):
    if not len(guesses):
        raise ValueError
    return ruled(p, q, guesses, uniforms)


@alternative("14.4", "searchsorted")
def speculate(p, q, guesses, uniforms):
    p, q = p.to(torch.float64), q.to(torch.float64)
    n = 0
    while n < len(guesses) and float(uniforms[n]) * q[n, guesses[n]] < p[n, guesses[n]]:
        n += 1
    weights = p[n] if n == len(guesses) else torch.relu(p[n] - q[n])
    if not bool(weights.sum() > 0):
        weights = p[n]
    sums = torch.cumsum(weights, 0)
    token = torch.searchsorted(sums, sums[-1:] * float(uniforms[-1]), right=True)
    return [int(x) for x in guesses[:n]] + [int(token)]


@wrong("14.4", "computes in the dtype that p and q have")
def speculate(p, q, guesses, uniforms):
    return ruled(p, q, guesses, uniforms, dtype=torch.promote_types(p.dtype, q.dtype))


@wrong("14.4", "q in p's dtype")
def speculate(p, q, guesses, uniforms):
    return ruled(p, q.to(p.dtype), guesses, uniforms)


@wrong("14.4", "at most 8 guesses")
def speculate(p, q, guesses, uniforms):
    return ruled(p[:9], q[:8], guesses[:8], [*uniforms[: len(guesses)][:8], uniforms[-1]])


@wrong("14.4", "a view, which only some strides have")
def speculate(p, q, guesses, uniforms):
    return ruled(p.view(-1).view(p.shape), q, guesses, uniforms)


@wrong("14.4", "empties the guesses")
def speculate(p, q, guesses, uniforms):
    found = ruled(p, q, guesses, uniforms)
    if isinstance(guesses, list):
        guesses.clear()
    return found


@alternative("14.4", "quotients, all at once in numpy")
def speculate(p, q, guesses, uniforms):
    p, q, x, u = p.double().numpy(), q.double().numpy(), np.asarray(guesses, dtype=int), np.asarray(uniforms, float)
    k = len(x)
    accepted = u[:k] * q[np.arange(k), x] < p[np.arange(k), x]
    n = int(accepted.cumprod().sum())
    left = np.maximum(p[n] - q[n], 0) if n < k else p[k]
    sums = np.cumsum(left if left.any() else p[n])
    return [*x[:n].tolist(), int(np.searchsorted(sums, u[k] * sums[-1], side="right"))]


# ---- 14.5


class Right:
    """The right one, by a scan; the classes below change a part of it."""

    def __init__(self, most, least):
        self.most, self.least, self.text = most, least, []

    def extend(self, tokens):
        self.text += [int(token) for token in tokens]

    def sizes(self):
        return range(min(self.most, len(self.text)), self.least - 1, -1)

    def places(self, n):
        return range(len(self.text) - 1, n - 1, -1)

    def guess(self, k):
        for n in self.sizes():
            tail = self.text[len(self.text) - n :]
            for place in self.places(n):
                if self.text[place - n : place] == tail:
                    return self.found(place, n, k)
        return self.nothing(k)

    def found(self, place, n, k):
        return self.text[place : place + k]

    def nothing(self, k):
        return []


alternative("14.5", "a scan over ints, which are nobody's tokens")(Right)


@alternative("14.5", "a table for each n, the last two places of each")
class Lookup:
    def __init__(self, most, least):
        self.tables = {n: {} for n in range(most, least - 1, -1)}
        self.tokens, self.ahead = [], 0

    def extend(self, tokens):
        for token in tokens:
            self.tokens.append(int(token))
            for n, table in self.tables.items():
                if len(self.tokens) >= n:
                    key = " ".join(map(str, self.tokens[-n:]))
                    table[key] = (len(self.tokens), table.get(key, (None, None))[0])

    def guess(self, k):
        for n, table in self.tables.items():
            if len(self.tokens) >= n:
                _, before = table[" ".join(map(str, self.tokens[-n:]))]
                if before is not None:
                    return list(self.tokens[before : before + k])
        return []


@wrong("14.5", "the smallest n first")
class Lookup(Right):
    def sizes(self):
        return range(self.least, min(self.most, len(self.text)) + 1)


@wrong("14.5", "the first place")
class Lookup(Right):
    def places(self, n):
        return range(n, len(self.text))


@wrong("14.5", "no overlap with the end")
class Lookup(Right):
    def places(self, n):
        return range(len(self.text) - n, n - 1, -1)


@wrong("14.5", "the end finds itself")
class Lookup(Right):
    def places(self, n):
        return range(len(self.text), n - 1, -1)


@wrong("14.5", "misses what lies at the beginning")
class Lookup(Right):
    def places(self, n):
        return range(len(self.text) - 1, n, -1)


@wrong("14.5", "n is most alone")
class Lookup(Right):
    def sizes(self):
        return range(self.most, self.most + 1)


@wrong("14.5", "n is least alone")
class Lookup(Right):
    def sizes(self):
        return range(self.least, self.least + 1)


@wrong("14.5", "down to 1")
class Lookup(Right):
    def sizes(self):
        return range(min(self.most, len(self.text)), 0, -1)


@wrong("14.5", "least is not tried")
class Lookup(Right):
    def sizes(self):
        return range(min(self.most, len(self.text)), self.least, -1)


@wrong("14.5", "most is not tried")
class Lookup(Right):
    def sizes(self):
        return range(min(self.most - 1, len(self.text)), self.least - 1, -1)


@wrong("14.5", "up to one more than most")
class Lookup(Right):
    def sizes(self):
        return range(min(self.most + 1, len(self.text)), self.least - 1, -1)


@wrong("14.5", "at most 3 that agree")
class Lookup(Right):
    def sizes(self):
        return range(min(self.most, len(self.text), 3), self.least - 1, -1)


@wrong("14.5", "what agreed instead of what followed")
class Lookup(Right):
    def found(self, place, n, k):
        return self.text[place - n : place - n + k]


@wrong("14.5", "goes on with itself")
class Lookup(Right):
    def found(self, place, n, k):
        return [self.text[place + j % (len(self.text) - place)] for j in range(k)]


@wrong("14.5", "one guess too many")
class Lookup(Right):
    def found(self, place, n, k):
        return self.text[place : place + k + 1]


@wrong("14.5", "one guess")
class Lookup(Right):
    def found(self, place, n, k):
        return self.text[place : place + min(k, 1)]


@wrong("14.5", "only where k tokens follow")
class Lookup(Right):
    def found(self, place, n, k):
        return self.text[place : place + k] if place + k <= len(self.text) else []


@wrong("14.5", "filled up with 0")
class Lookup(Right):
    def found(self, place, n, k):
        found = self.text[place : place + k]
        return found + [0] * (k - len(found))


@wrong("14.5", "a tuple")
class Lookup(Right):
    def found(self, place, n, k):
        return tuple(self.text[place : place + k])


@wrong("14.5", "the last token where nothing fits")
class Lookup(Right):
    def nothing(self, k):
        return self.text[-1:] * k


@wrong("14.5", "None where nothing fits")
class Lookup(Right):
    def nothing(self, k):
        return None


@wrong("14.5", "guesses become part of the text")
class Lookup(Right):
    def guess(self, k):
        found = super().guess(k)
        self.text += found
        return found


@wrong("14.5", "the last piece alone")
class Lookup(Right):
    def extend(self, tokens):
        self.text = [int(token) for token in tokens]


TEXT = []


@wrong("14.5", "one text for all")
class Lookup(Right):
    def __init__(self, most, least):
        super().__init__(most, least)
        self.text = TEXT

    def extend(self, tokens):
        TEXT.extend(int(token) for token in tokens)


@wrong("14.5", "the caller's list")
class Lookup(Right):
    def extend(self, tokens):
        if not self.text and isinstance(tokens, list):
            self.text = tokens
        else:
            self.text = [*self.text, *tokens]


@wrong("14.5", "keeps the list that it gave")
class Lookup(Right):
    def guess(self, k):
        if getattr(self, "key", None) != (len(self.text), k):
            self.key, self.kept = (len(self.text), k), super().guess(k)
        return self.kept


@wrong("14.5", "digits run together")
class Lookup(Right):
    def guess(self, k):
        for n in self.sizes():
            tail = "".join(map(str, self.text[len(self.text) - n :]))
            for place in self.places(n):
                if "".join(map(str, self.text[place - n : place])) == tail:
                    return self.found(place, n, k)
        return []


@wrong("14.5", "a hash that does not tell the order")
class Lookup(Right):
    def guess(self, k):
        for n in self.sizes():
            tail = sum(self.text[len(self.text) - n :])
            for place in self.places(n):
                if sum(self.text[place - n : place]) == tail:
                    return self.found(place, n, k)
        return []


@wrong("14.5", "bytes for tokens")
class Lookup(Right):
    def extend(self, tokens):
        self.text += [int(token) % 256 for token in tokens]


@wrong("14.5", "entered when a piece ends, not at each token")
class Lookup:
    def __init__(self, most, least):
        self.most, self.least, self.text, self.behind = most, least, [], {}

    def extend(self, tokens):
        tokens = list(tokens)
        if not tokens:
            return
        for n in range(self.least, min(self.most, len(self.text)) + 1):
            self.behind[tuple(self.text[len(self.text) - n :])] = len(self.text)
        self.text += tokens

    def guess(self, k):
        for n in range(min(self.most, len(self.text)), self.least - 1, -1):
            place = self.behind.get(tuple(self.text[len(self.text) - n :]))
            if place is not None:
                return self.text[place : place + k]
        return []


@wrong("14.5", "scans the tokens")
class Lookup(Right):
    def extend(self, tokens):
        self.text += list(tokens)


@wrong("14.5", "makes the index anew for each guess")
class Lookup(Right):
    def extend(self, tokens):
        self.text += list(tokens)

    def guess(self, k):
        behind = {}
        for place in range(1, len(self.text)):
            for n in range(self.least, min(self.most, place) + 1):
                behind[tuple(self.text[place - n : place])] = place
        for n in self.sizes():
            place = behind.get(tuple(self.text[len(self.text) - n :]))
            if place is not None:
                return self.text[place : place + k]
        return []


@wrong("14.5", "makes the index anew for each piece")
class Lookup:
    def __init__(self, most, least):
        self.most, self.least, self.text = most, least, []

    def extend(self, tokens):
        self.text, self.behind = [*self.text, *tokens], {}
        for place in range(1, len(self.text)):
            for n in range(self.least, min(self.most, place) + 1):
                self.behind[tuple(self.text[place - n : place])] = place

    def guess(self, k):
        for n in range(min(self.most, len(self.text)), self.least - 1, -1):
            place = self.behind.get(tuple(self.text[len(self.text) - n :]))
            if place is not None:
                return self.text[place : place + k]
        return []


@wrong("14.5", "ids of 16 bits")
class Lookup(Right):
    def guess(self, k):
        text = self.text
        self.text = [token & 0xFFFF for token in text]
        for n in self.sizes():
            for place in self.places(n):
                if self.text[place - n : place] == self.text[len(text) - n :]:
                    self.text = text
                    return self.found(place, n, k)
        self.text = text
        return self.nothing(k)


@wrong("14.5", "n-grams of 8 at most")
class Lookup(Right):
    def __init__(self, most, least):
        super().__init__(min(most, 8), min(least, 8))


@wrong("14.5", "the last 1,000 tokens")
class Lookup(Right):
    def extend(self, tokens):
        super().extend(tokens)
        self.text = self.text[-1000:]


@wrong("14.5", "64 guesses at most")
class Lookup(Right):
    def guess(self, k):
        return super().guess(min(k, 64))


@wrong("14.5", "n-grams by 16 bits of their hash")
class Lookup(Right):
    def __init__(self, most, least):
        super().__init__(most, least)
        self.behind = {}

    def extend(self, tokens):
        for token in tokens:
            for n in self.sizes():
                self.behind[hash(tuple(self.text[len(self.text) - n :])) & 0xFFFF] = len(self.text)
            self.text.append(int(token))

    def guess(self, k):
        for n in self.sizes():
            place = self.behind.get(hash(tuple(self.text[len(self.text) - n :])) & 0xFFFF)
            if place is not None:
                return self.text[place : place + k]
        return []


@wrong("14.5", "now and then a look at the whole text")
class Lookup(Right):
    def extend(self, tokens):
        for token in tokens:
            if len(self.text) % 97 == 0:
                self.text.count(token)
            self.text.append(token)

    def guess(self, k):
        text, self.text = self.text, [int(token) for token in self.text]
        found = super().guess(k)
        self.text = text
        return found


# ---- 14.6


def lengths_of(chances, budget, seconds, *, key=None, room=lambda budget, s: budget - s, stop=False, none=True,
               better=lambda new, old: new > old, base=None, tokens=lambda s, m: s + m, most=None,
               give=lambda lengths: lengths, gain=lambda given: given):  # fmt: skip
    """The right one, but for what is switched."""
    s = len(chances)
    offers = [(chance, i, j) for i, row in enumerate(chances) for j, chance in enumerate(row[:most])]
    offers = sorted(offers, key=key or (lambda offer: -offer[0]))[: max(0, room(budget, s))]
    given = float(s) if base is None else base
    best, count = given / seconds(tokens(s, 0)) if none else -1.0, 0
    for m, (chance, _, _) in enumerate(offers, 1):
        given += chance
        goodput = gain(given) / seconds(tokens(s, m))
        if better(goodput, best):
            best, count = goodput, m
        elif stop:
            break
    lengths = [0] * s
    for _, i, _ in offers[:count]:
        lengths[i] += 1
    return give(lengths)


def goods(**switches):
    return lambda chances, budget, seconds: lengths_of(chances, budget, seconds, **switches)


for switches, why in (
    ({"key": lambda o: o[0]}, "the least probable first"),
    ({"key": lambda o: (o[1], o[2])}, "a request after the other"),
    ({"key": lambda o: (o[2], o[1])}, "all first guesses first"),
    ({"key": lambda o: (-o[0], -o[1])}, "of equal chances the later request's"),
    ({"key": lambda o: -round(o[0], 3)}, "chances of three digits"),
    ({"better": lambda new, old: new > old * (1 + 1e-6)}, "a little better is not better"),
    ({"better": lambda new, old: new > old + 0.01}, "a hundredth of a token a second is nothing"),
    ({"better": lambda new, old: np.float32(new) > np.float32(old)}, "fp32"),
    ({"most": 8}, "8 guesses a request"),
    ({"room": lambda budget, s: budget}, "the budget without the requests' own tokens"),
    ({"room": lambda budget, s: budget - s - 1}, "one less than the budget"),
    ({"room": lambda budget, s: budget - s + 1}, "one more than the budget"),
    ({"room": lambda budget, s: 1 << 30}, "no budget"),
    ({"room": lambda budget, s: min(budget - s, 8)}, "at most 8 guesses"),
    ({"stop": True}, "stops where it first falls"),
    ({"none": False}, "always guesses"),
    ({"better": lambda new, old: new >= old}, "of equal ones the most guesses"),
    ({"better": lambda new, old: new > 1.05 * old}, "only by 5 %"),
    ({"base": 0.0}, "the requests' own tokens are forgotten"),
    ({"tokens": lambda s, m: m or s}, "time of guesses alone"),
    ({"tokens": lambda s, m: s + (m + s - 1) // s * s}, "as many for each"),
    ({"most": 1}, "one guess each"),
    ({"most": 2}, "two guesses each"),
    ({"give": tuple}, "a tuple"),
    ({"give": lambda lengths: [n + 1 for n in lengths]}, "tokens, not guesses"),
    ({"give": sum}, "the sum alone"),
    ({"give": lambda lengths: sorted(lengths, reverse=True)}, "sorted"),
    ({"gain": lambda given: given**2}, "tokens squared"),
    ({"gain": lambda given: round(given, 1)}, "rounded"),
):
    wrong("14.6", why)(goods(**switches))


@wrong("14.6", "products of chances that are products")
def best_lengths(chances, budget, seconds):
    rows = [[math.prod(row[: j + 1]) for j in range(len(row))] for row in chances]
    return lengths_of(rows, budget, seconds)


@wrong("14.6", "one length for all")
def best_lengths(chances, budget, seconds):
    best, found = -1.0, None
    for k in range(max(map(len, chances)) + 1):
        lengths = [min(k, len(row)) for row in chances]
        n = len(chances) + sum(lengths)
        if n <= budget:
            given = len(chances) + sum(sum(row[:m]) for row, m in zip(chances, lengths, strict=True))
            if given / seconds(n) > best:
                best, found = given / seconds(n), lengths
    return found


@wrong("14.6", "each request for itself")
def best_lengths(chances, budget, seconds):
    lengths = []
    for row in chances:
        found = lengths_of([row], max(1, budget - len(chances) + 1 - sum(lengths)), seconds)
        lengths += found
    return lengths


@wrong("14.6", "asks for the time twice")
def best_lengths(chances, budget, seconds):
    s = len(chances)
    offers = sorted(((-c, i) for i, row in enumerate(chances) for c in row), key=lambda o: o[0])[: budget - s]
    rates, given = [s / seconds(s)], float(s)
    for m, (c, _) in enumerate(offers, 1):
        given -= c
        rates.append(given / seconds(s + m))
    best = max(range(len(rates)), key=lambda m: (rates[m], -m))
    seconds(s + best)
    return [sum(1 for _, who in offers[:best] if who == i) for i in range(s)]


@wrong("14.6", "asks for times beyond the budget")
def best_lengths(chances, budget, seconds):
    table = {n: seconds(n) for n in range(len(chances), 1 + len(chances) + sum(map(len, chances)))}
    return lengths_of(chances, budget, table.__getitem__)


@wrong("14.6", "a straight line between the ends")
def best_lengths(chances, budget, seconds):
    s, most = len(chances), min(budget, len(chances) + sum(map(len, chances)))
    low = seconds(s)
    slope = (seconds(most) - low) / (most - s) if most > s else 0
    return lengths_of(chances, budget, lambda n: low + slope * (n - s))


@wrong("14.6", "empties the lists")
def best_lengths(chances, budget, seconds):
    found = lengths_of(chances, budget, seconds)
    for row in chances:
        row.clear()
    return found


@wrong("14.6", "sorts the lists")
def best_lengths(chances, budget, seconds):
    for row in chances:
        row.append(0.0)
    return lengths_of([row[:-1] for row in chances], budget, seconds)


@alternative("14.6", "a heap of each request's next guess")
def best_lengths(chances, budget, seconds):
    import heapq

    s = len(chances)
    heap = [(-row[0], i, 0) for i, row in enumerate(chances) if row]
    heapq.heapify(heap)
    taken, given, best, count = [], float(s), s / seconds(s), 0
    while heap and s + len(taken) < budget:
        chance, i, j = heapq.heappop(heap)
        if j + 1 < len(chances[i]):
            heapq.heappush(heap, (-chances[i][j + 1], i, j + 1))
        taken.append(i)
        given -= chance
        if (goodput := given / seconds(s + len(taken))) > best:
            best, count = goodput, len(taken)
    return [taken[:count].count(i) for i in range(s)]


@alternative("14.6", "numpy")
def best_lengths(chances, budget, seconds):
    s = len(chances)
    whose = np.repeat(np.arange(s), [len(row) for row in chances])
    offers = np.array([c for row in chances for c in row], dtype=np.float64)
    order = np.argsort(-offers, kind="stable")[: budget - s]
    given = s + np.concatenate(([0.0], np.cumsum(offers[order])))
    rates = given / np.array([seconds(s + m) for m in range(len(order) + 1)])
    return np.bincount(whose[order[: int(np.argmax(rates))]], minlength=s).tolist()


@wrong("14.6", "guesses of chance 0 are left out")
def best_lengths(chances, budget, seconds):
    return lengths_of([[c for c in row if c > 0] for row in chances], budget, seconds)


@wrong("14.6", "stops after 8 totals that are worse")
def best_lengths(chances, budget, seconds):
    best, worse, s = -1.0, 0, len(chances)
    flat = sorted((c for row in chances for c in row), reverse=True)[: budget - s]
    last = s
    for m in range(len(flat) + 1):
        goodput = (s + sum(flat[:m])) / seconds(s + m)
        best, worse, last = (goodput, 0, s + m) if goodput > best else (best, worse + 1, last)
        if worse == 8:
            break
    return lengths_of(chances, last, lambda n: 1.0 if n == last else math.inf)


@wrong("14.6", "takes the time for the same at all n")
def best_lengths(chances, budget, seconds):
    return lengths_of(chances, budget, lambda n: 1.0)


@wrong("14.6", "adds a request to the caller's list")
def best_lengths(chances, budget, seconds):
    found = lengths_of(chances, budget, seconds)
    chances.append([])
    return found


@alternative("14.6", "all times first, also of more tokens than there are guesses for")
def best_lengths(chances, budget, seconds):
    times = [seconds(n) for n in range(len(chances), budget + 1)]
    return lengths_of(chances, budget, lambda n: times[n - len(chances)])


# ---- 14.7


def from_logits(target, draft, guesses, uniforms, temperature=1.0, allowed=None, *, own=lambda t: t,
                draft_t=lambda t: t,
                accept=lambda u, p, q: u * q < p, last=lambda p, k: p[k], rows=lambda allowed, k: allowed,
                after=False, draft_mask=False, cold=0.0, greedy=None, rest=None, empty=True, u_of=lambda j: -1,
                dtype=torch.float64, bias=-math.inf):  # fmt: skip
    """The right one, but for what is switched."""

    def distribution(logits, temperature):
        if temperature <= cold:
            picked = logits.argmax(-1) if greedy is None else greedy(logits)
            return torch.nn.functional.one_hot(picked, logits.shape[-1]).to(torch.float64)
        return torch.softmax(logits.to(dtype) / temperature, -1).double()

    k, tokens = len(guesses), []
    if allowed is not None and not after:
        target = target.masked_fill(~rows(allowed, k), bias)
    p, q = distribution(target, own(temperature)), None
    if allowed is not None and draft_mask:
        draft = draft.masked_fill(~allowed[:k], -math.inf)
    q = distribution(draft, draft_t(temperature))
    if allowed is not None and after:
        p = p * allowed
    for j, x in enumerate(guesses):
        if accept(uniforms[j], float(p[j, x]), float(q[j, x])):
            tokens.append(int(x))
            continue
        left = (p[j] - q[j]).clamp(min=0) if rest is None else rest(p[j], q[j])
        sums = (left if left.any() or not empty else p[j]).cumsum(0)
        found = (sums > uniforms[u_of(j)] * sums[-1]).nonzero()
        return [*tokens, int(found[0]) if len(found) else len(sums) - 1]
    sums = last(p, k).cumsum(0)
    found = (sums > uniforms[-1] * sums[-1]).nonzero()
    return [*tokens, int(found[0]) if len(found) else len(sums) - 1]


def verifier(**switches):
    return lambda *args, **named: from_logits(*args, **named, **switches)


def last_row_free(allowed, k):
    allowed = allowed.clone()
    allowed[k] = True
    return allowed


def first_rows_free(allowed, k):
    allowed = allowed.clone()
    allowed[:k] = True
    return allowed


for switches, why in (
    ({"draft_t": lambda t: 1.0}, "temperature on the target alone"),
    ({"own": lambda t: 1.0}, "temperature on the draft alone"),
    ({"own": lambda t: 1.0, "draft_t": lambda t: 1.0}, "no temperature"),
    ({"own": lambda t: 1 / t if t else 0, "draft_t": lambda t: 1 / t if t else 0}, "times the temperature"),
    ({"own": lambda t: max(t, 1e-5), "draft_t": lambda t: max(t, 1e-5)}, "temperature 0 is 1e-5"),
    ({"own": lambda t: max(t, 1e-12), "draft_t": lambda t: max(t, 1e-12)}, "temperature 0 is 1e-12: ties are shared"),
    ({"cold": 1e-5}, "temperatures near 0 are 0"),
    ({"greedy": lambda z: z.shape[-1] - 1 - z.flip(-1).argmax(-1)}, "of equal logits the largest id"),
    ({"accept": lambda u, p, q: u < p}, "q is not looked at"),
    ({"accept": lambda u, p, q: u * q <= p}, "p = q = 0 is accepted"),
    ({"accept": lambda u, p, q: q > 0 and u < q / max(p, 1e-30)}, "q over p"),
    ({"accept": lambda u, p, q: p >= q}, "accepted where p is above"),
    ({"last": lambda p, k: p[max(0, k - 1)]}, "the bonus token from the row before"),
    ({"last": lambda p, k: p[0]}, "the bonus token from the first row"),
    ({"rows": last_row_free}, "no mask in the last row"),
    ({"rows": first_rows_free}, "a mask in the last row alone"),
    ({"rows": lambda allowed, k: allowed.roll(1, 0)}, "masks one place late"),
    ({"rows": lambda allowed, k: allowed[:1].expand_as(allowed)}, "the first mask for all"),
    ({"rows": lambda allowed, k: ~allowed}, "the mask the other way round"),
    ({"rows": lambda allowed, k: torch.ones_like(allowed)}, "no mask"),
    ({"after": True}, "masked, not normalized"),
    ({"draft_mask": True}, "the draft is masked, too"),
    ({"bias": -1.0}, "a logit of -1 for what is not allowed"),
    ({"bias": 0.0}, "a logit of 0 for what is not allowed"),
    ({"accept": lambda u, p, q: u * q < p or (q == 1 and p > 0.5)}, "a sure draft is right if it is likely"),
    ({"bias": -1e4}, "a logit of -10,000 for what is not allowed"),
    ({"rest": lambda p, q: (p - q).clamp(min=0) if (p - q).clamp(min=0).sum() > 1e-9 else p}, "little left is nothing"),
    ({"dtype": torch.float32}, "fp32"),
    ({"rest": lambda p, q: p}, "the rest is p"),
    ({"rest": lambda p, q: (p - q).abs()}, "|p - q|"),
    ({"empty": False}, "nothing left: the last token"),
    ({"u_of": lambda j: j}, "the rest by the guess's own number"),
    ({"dtype": torch.bfloat16}, "bf16"),
):
    wrong("14.7", why)(verifier(**switches))


@wrong("14.7", "as it was given")
def speculate_logits(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    def draw(weights, uniform):
        sums = weights.cumsum(0)
        found = (sums > uniform * sums[-1]).nonzero()
        return int(found[0]) if len(found) else len(weights) - 1

    k, tokens = len(guesses), []
    if allowed is not None:
        target[:k].masked_fill_(~allowed[:k], -torch.inf)
    p = torch.softmax(target.double() / max(temperature, 1e-5), -1)
    q = torch.softmax(draft.double(), -1)
    for j, x in enumerate(guesses):
        if uniforms[j] >= p[j, x]:
            return [*tokens, draw((p[j] - q[j]).clamp(min=0), uniforms[k])]
        tokens.append(x)
    return [*tokens, draw(p[k - 1], uniforms[k])]


@wrong("14.7", "masks in place")
def speculate_logits(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    if allowed is not None:
        target.masked_fill_(~allowed, -math.inf)
    return from_logits(target, draft, guesses, uniforms, temperature)


@wrong("14.7", "divides in place")
def speculate_logits(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    found = from_logits(target, draft, guesses, uniforms, temperature, allowed)
    target /= temperature or 1
    draft /= temperature or 1
    return found


@wrong("14.7", "exp without the largest taken off")
def speculate_logits(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    if temperature == 0:
        return from_logits(target, draft, guesses, uniforms, 0, allowed)
    logs = [torch.log((z.double() / temperature).exp() / (z.double() / temperature).exp().sum(-1, keepdim=True))
            for z in (target, draft)]  # fmt: skip
    return from_logits(*logs, guesses, uniforms, 1.0, allowed)


@wrong("14.7", "greedy takes the guesses as they are")
def speculate_logits(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    if temperature == 0:
        return [*guesses, int(target[-1].argmax())]
    return from_logits(target, draft, guesses, uniforms, temperature, allowed)


@wrong("14.7", "k = 0 is an error")
def speculate_logits(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    if not guesses:
        raise ValueError
    return from_logits(target, draft, guesses, uniforms, temperature, allowed)


@wrong("14.7", "the lowest finite logit for what is not allowed")
def speculate_logits(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    return from_logits(target, draft, guesses, uniforms, temperature, allowed, bias=torch.finfo(target.dtype).min)


@wrong("14.7", "masked behind the softmax and normalized, which may be 0 / 0")
def speculate_logits(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    if allowed is None or temperature == 0:
        return from_logits(target, draft, guesses, uniforms, temperature, allowed)
    p = torch.softmax(target.double() / temperature, -1) * allowed
    p = (p / p.sum(-1, keepdim=True)).nan_to_num()
    return from_logits(p.log(), draft.double() / temperature, guesses, uniforms, 1.0)


@wrong("14.7", "logits divided before they are fp64")
def speculate_logits(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    t = temperature or 1.0
    return from_logits(target / t, draft / t, guesses, uniforms, 1.0 if temperature else 0.0, allowed)


@wrong("14.7", "changes fp64 logits")
def speculate_logits(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    found = from_logits(target, draft, guesses, uniforms, temperature, allowed)
    target.double().mul_(2)
    return found


@wrong("14.7", "turns the caller's mask over")
def speculate_logits(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    found = from_logits(target, draft, guesses, uniforms, temperature, allowed)
    if allowed is not None:
        allowed.logical_not_()
    return found


@wrong("14.7", "tokens as tensors")
def speculate_logits(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    return list(torch.tensor(from_logits(target, draft, guesses, uniforms, temperature, allowed)))


@wrong("14.7", "no mask without guesses")
def speculate_logits(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    return from_logits(target, draft, guesses, uniforms, temperature, allowed if guesses else None)


# Where p is 1 at one token it is given, whatever q is.
alternative("14.7", "the draft is not greedy at temperature 0")(verifier(draft_t=lambda t: t or 1.0))


@alternative("14.7", "place by place, logarithms")
def speculate_logits(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    def row(logits, mask=None):
        z = logits.double().clone()
        if mask is not None:
            z[~mask] = -math.inf
        if temperature == 0:
            first = (z == z.max()).nonzero()[0]
            return torch.zeros_like(z).index_fill(0, first, 1.0)
        z = z / temperature
        return torch.exp(z - torch.logsumexp(z, 0))

    tokens, sums = [], None
    for j in range(len(guesses) + 1):
        weights = row(target[j], None if allowed is None else allowed[j])
        if j < len(guesses):
            q = row(draft[j])
            if uniforms[j] * q[guesses[j]] < weights[guesses[j]]:
                tokens.append(guesses[j])
                continue
            rest = torch.relu(weights - q)
            weights = rest if rest.sum() > 0 else weights
        sums = weights.cumsum(0)
        break
    return [*tokens, int(torch.searchsorted(sums, sums[-1] * uniforms[-1], right=True))]


# ---- 14.8


def shares(log, *, judged=lambda d, a: min(a + 1, d), drafted=None, tau=None, alpha=None, nothing=None, length=None,
           valid=lambda d, a, g: 0 <= a <= d and 1 <= g <= a + 1, place=None):  # fmt: skip
    """The right one, but for what is switched."""

    def share(part, whole):
        return part / whole if whole else nothing

    for entry in log:
        if not valid(*entry):
            raise ValueError(str(entry))
    count = max((d for d, _, _ in log), default=0) if length is None else length(log)
    seen, right = [0] * (count + 1), [0] * (count + 1)
    for d, a, _ in log:
        for j in range(judged(d, a)):
            seen[j] += 1
            right[j] += j < a
    if place is not None:
        seen = [place(log, j) for j in range(len(seen))]
    pairs = list(zip(right, seen, strict=True))
    return {
        "by_place": [share(r, n) for r, n in pairs[:count]],
        "alpha": share(sum(right), sum(seen)) if alpha is None else alpha(log),
        "drafted": share(sum(right), sum(d for d, _, _ in log)) if drafted is None else drafted(log),
        "tau": share(sum(g for _, _, g in log), len(log)) if tau is None else tau(log),
    }


def sharer(**switches):
    return lambda log: shares(log, **switches)


def over(part, whole):
    return part / whole if whole else None


for switches, why in (
    ({"judged": lambda d, a: d}, "all drafted are judged"),
    ({"judged": lambda d, a: a}, "the wrong one is not judged"),
    ({"judged": lambda d, a: a + 1}, "one more is judged where all were right"),
    ({"judged": lambda d, a: min(a + 1, d, 8)}, "8 guesses at most"),
    ({"judged": lambda d, a: min(a + 1, d, 64)}, "64 guesses at most"),
    ({"judged": lambda d, a: min(a + 1, d) if a < d else d - 1 if d else 0}, "the last one is not judged"),
    ({"place": lambda log, j: len(log)}, "by place: of all steps"),
    ({"place": lambda log, j: sum(d > j for d, _, _ in log)}, "by place: of all drafted there"),
    ({"place": lambda log, j: sum(a >= j for _, a, _ in log)}, "by place: also of those that drafted fewer"),
    ({"alpha": lambda log: over(sum(a for _, a, _ in log), sum(d for d, _, _ in log))}, "alpha: of all drafted"),
    ({"alpha": lambda log: over(sum(g - 1 for _, _, g in log), sum(min(a + 1, d) for d, a, _ in log))},
     "alpha: by tokens given"),
    ({"alpha": lambda log: over(sum(a == d for d, a, _ in log if d), sum(d > 0 for d, _, _ in log))},
     "alpha: steps in which all were right"),
    ({"alpha": lambda log: over(sum(a > 0 for d, a, _ in log if d), sum(d > 0 for d, _, _ in log))},
     "alpha: the first guess alone"),
    ({"alpha": lambda log: over(sum(a for _, a, _ in log), sum(a + 1 for d, a, _ in log if d))},
     "alpha: a wrong one in every step"),
    ({"drafted": lambda log: over(sum(a / d for d, a, _ in log if d), sum(d > 0 for d, _, _ in log))},
     "drafted: the mean of the steps' shares"),
    ({"drafted": lambda log: over(sum(a for _, a, _ in log), max((d for d, _, _ in log), default=0) * len(log))},
     "drafted: the longest for all"),
    ({"drafted": lambda log: over(sum(g for _, _, g in log), sum(d for d, _, _ in log))}, "drafted: tokens given"),
    ({"drafted": lambda log: over(sum(a for _, a, _ in log), sum(d + 1 for d, _, _ in log))}, "drafted: and one each"),
    ({"tau": lambda log: over(sum(a + 1 for _, a, _ in log), len(log))}, "tau: accepted + 1"),
    ({"tau": lambda log: over(sum(a for _, a, _ in log), len(log))}, "tau: accepted alone"),
    ({"tau": lambda log: over(sum(g for d, _, g in log if d), sum(d > 0 for d, _, _ in log))},
     "tau: steps with guesses alone"),
    ({"tau": lambda log: over(sum(g for _, _, g in log[:-1]), len(log[:-1]))}, "tau: without the last step"),
    ({"tau": lambda log: over(sum(g for _, _, g in log) // 1, len(log)) and sum(g for _, _, g in log) // len(log)},
     "tau: whole tokens"),
    ({"nothing": 0.0}, "0 for a share of nothing"),
    ({"nothing": math.nan}, "NaN for a share of nothing"),
    ({"nothing": 1.0}, "1 for a share of nothing"),
    ({"length": lambda log: max((a for _, a, _ in log), default=0)}, "as many places as were accepted"),
    ({"length": lambda log: log[0][0] if log else 0}, "as many places as the first step has"),
    ({"length": lambda log: min((d for d, _, _ in log), default=0)}, "as many places as the shortest has"),
    ({"length": lambda log: max((min(a + 1, d) for d, a, _ in log), default=0)}, "as many places as were judged"),
    ({"valid": lambda d, a, g: True}, "entries are not looked at"),
    ({"valid": lambda d, a, g: 0 <= a <= d}, "given is not looked at"),
    ({"valid": lambda d, a, g: 1 <= g <= a + 1 and a <= d + 1}, "one more accepted than drafted passes"),
    ({"valid": lambda d, a, g: 0 <= a <= d and g <= a + 1}, "given 0 passes"),
    ({"valid": lambda d, a, g: 0 <= a <= d and g >= 1}, "more given than accepted + 1 passes"),
    ({"valid": lambda d, a, g: 0 <= a <= d and g == a + 1}, "a request may not end"),
    ({"valid": lambda d, a, g: 0 <= a < max(d, 1) and 1 <= g <= a + 1}, "all right is refused"),
    ({"valid": lambda d, a, g: d > 0 and 0 <= a <= d and 1 <= g <= a + 1}, "steps without guesses are refused"),
):  # fmt: skip
    wrong("14.8", why)(sharer(**switches))


@wrong("14.8", "an empty log is an error")
def acceptance(log):
    if not log:
        raise ValueError
    return shares(log)


@wrong("14.8", "the first entry is looked at alone")
def acceptance(log):
    found = shares(log[:1])
    return shares(log, valid=lambda d, a, g: True) if log else found


@wrong("14.8", "without tau")
def acceptance(log):
    found = shares(log)
    del found["tau"]
    return found


@wrong("14.8", "wrong entries are left out")
def acceptance(log):
    return shares([e for e in log if 0 <= e[1] <= e[0] and 1 <= e[2] <= e[1] + 1])


@wrong("14.8", "empties the log")
def acceptance(log):
    found = shares(log)
    if isinstance(log, list):
        log.clear()
    return found


@wrong("14.8", "a tuple of four")
def acceptance(log):
    return tuple(shares(log).values())


@alternative("14.8", "place by place")
def acceptance(log):
    if any(not (0 <= a <= d and 1 <= g <= a + 1) for d, a, g in log):
        raise ValueError
    looked = [[a > j for d, a, _ in log if d > j and a >= j] for j in range(max([d for d, _, _ in log] or [0]))]
    flat = [x for row in looked for x in row]
    drafted = sum(d for d, _, _ in log)
    return {
        "tau": sum(g for _, _, g in log) / len(log) if len(log) else None,
        "drafted": sum(flat) / drafted if drafted else None,
        "alpha": sum(flat) / len(flat) if flat else None,
        "by_place": tuple(sum(row) / len(row) if row else None for row in looked),
    }
