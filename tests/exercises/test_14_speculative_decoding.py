"""Checks of exercises 14: tokens a step, when guessing pays, greedy verification, the rule of acceptance, prompt lookup
with an index, lengths by goodput, a verifier with four bugs, acceptance rates.
"""

import itertools
import math
import random
from fractions import Fraction

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.learn.testing import exercise, expect, expect_close, expect_equal, expect_parts, expect_raises, is_stub

NAN, INF = math.nan, math.inf


def random_tensor(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def apart(x):
    """x with strides of its own: every second number of a larger tensor, along the last axis; no two axes merge."""
    last = 2 * x.shape[-1]
    wide = torch.full((*x.shape[:-1], last + 1), 1, dtype=x.dtype)
    wide[..., :last:2] = x
    return wide[..., :last:2]


def expect_same_tensor(what, got, expected):
    expect(isinstance(got, torch.Tensor), f"{what}: expected a tensor, got {type(got).__name__}")
    expect_equal(f"{what}: dtype", got.dtype, expected.dtype)
    expect_equal(f"{what}: shape", tuple(got.shape), tuple(expected.shape))
    expect_equal(what, got.tolist(), expected.tolist())


def expect_unchanged(named):
    """named: (name, tensor, its copy)"""
    for name, t, old in named:
        expect(torch.equal(t, old), f"{name}: expected it to stay as it was\n  got it changed")


def shown(values):
    """A list as text; of a long one both ends."""
    if len(values) <= 40:
        return str(list(values))
    first, last = (", ".join(map(str, part)) for part in (values[:4], values[-4:]))
    return f"[{first}, ... {last}] ({len(values)} in all)"


class Operations(TorchDispatchMode):
    """Counts torch operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


# ---- 14.1


@exercise("14.1", "step_tokens")
class TestStepTokens:
    def parts(self, impl, alphas):
        chances, tau = expect_parts(impl(alphas), "chances", "tau")
        expect(isinstance(chances, list | tuple), f"chances: expected a list\n  got {type(chances).__name__}")
        return chances, tau

    def same(self, impl, alphas):
        chances, tau = self.parts(impl, alphas)
        exact = [Fraction(a) for a in alphas]
        expected = [math.prod(exact[:j], start=Fraction(1)) * (1 - (exact[j] if j < len(exact) else 0))
                    for j in range(len(exact) + 1)]  # fmt: skip
        expect_close(f"chances, alphas {alphas}", list(chances), [float(c) for c in expected], 1e-15, 1e-9)
        expect_close(f"tau, alphas {alphas}", tau, float(sum((j + 1) * c for j, c in enumerate(expected))), 0, 1e-9)

    def test_hand(self, impl):
        """two guesses of 0.5: one token in half of the steps, two and three in a quarter each: 1.75 on average"""
        chances, tau = self.parts(impl, [0.5, 0.5])
        expect_close("chances", list(chances), [0.5, 0.25, 0.25])
        expect_close("tau", tau, 1.75)

    def test_places(self, impl):
        """each place has an alpha of its own, given that those before are right"""
        self.same(impl, [0.9, 0.2, 0.6])
        self.same(impl, [0.2, 0.9, 0.6])
        self.same(impl, (0.25,))
        self.same(impl, [0.8] * 8)
        self.same(impl, [0.125, 0.9375, 0.75, 0.5, 0.99])

    def test_no_guess(self, impl):
        """k = 0: one token"""
        chances, tau = self.parts(impl, [])
        expect_close("chances", list(chances), [1.0])
        expect_close("tau", tau, 1.0)

    def test_bounds(self, impl):
        """0: never; 1: always, all k + 1"""
        self.same(impl, [0, 0, 0])
        self.same(impl, [1.0] * 5)
        self.same(impl, [1, 0, 1])
        self.same(impl, [0.5, 0.0, 0.5])
        self.same(impl, [0.0, 1.0])
        self.same(impl, [1 - 1e-12] * 40)
        self.same(impl, [0.999] * 400)

    def test_errors(self, impl):
        """an alpha outside of 0 to 1 is a ValueError, at every place, and NaN too"""
        for bad in (-0.1, 1.1, NAN, INF, -INF, 2, -1e-9, 1 + 1e-9, math.nextafter(0, -1), math.nextafter(1, 2)):
            for alphas in ([bad], [0.5, bad], [bad, 0.5], [0.5, 0.5, bad], [0.0, bad], [1.0, bad, 0.0]):
                expect_raises(ValueError, lambda a=alphas: impl(a), f"alphas {alphas}")

    def test_input(self, impl):
        """alphas stay as they are"""
        alphas = [0.5, 0.25, 0.75]
        impl(alphas)
        expect_equal("alphas", alphas, [0.5, 0.25, 0.75])


# ---- 14.2


@exercise("14.2", "best_length")
class TestBestLength:
    def speedups(self, alpha, c, v):
        return [sum(alpha**j for j in range(k + 1)) / (c * k + v[k]) for k in range(len(v))]

    def same(self, impl, alpha, c, v):
        before = list(v)
        k, speedup = expect_parts(impl(alpha, c, v), "k", "speed-up")
        every = self.speedups(alpha, c, v)
        what = f"alpha {alpha}, c {c}, v {shown(v)}"
        best = max(every)
        expect_equal(f"k, {what}", k, next(i for i, s in enumerate(every) if s >= best * (1 - 1e-12)))
        expect_close(f"speed-up, {what}", speedup, best, 0, 1e-9)
        expect_equal("v, afterwards", list(v), before)

    def test_hand(self, impl):
        """alpha 0.8, c 0.1, checking is free: k = 6, 2.47 times"""
        k, speedup = expect_parts(impl(0.8, 0.1, [1] * 12), "k", "speed-up")
        expect_equal("k", k, 6)
        expect_close("speed-up", speedup, 2.46964, 1e-9)

    def test_checking(self, impl):
        """what a step of k guesses takes counts"""
        self.same(impl, 0.8, 0.0, [1, 1.1, 1.2, 1.3, 1.4, 1.5])
        self.same(impl, 0.6, 0.05, [1, 1.3, 1.4, 1.5, 2.5])
        self.same(impl, 0.9, 0.02, [1, 1.02, 1.05, 1.1, 1.2, 1.4, 1.8, 2.6])

    def test_guessing(self, impl):
        """each guess takes c"""
        for c in (0, 0.01, 0.1, 0.3, 0.7, 1.5):
            self.same(impl, 0.85, c, [1] * 9)
            self.same(impl, 0.85, c, [1 + 0.02 * k for k in range(9)])

    def test_never(self, impl):
        """where nothing pays: k = 0, 1 times"""
        k, speedup = expect_parts(impl(0.9, 0.0, [1, 2, 3, 4, 5]), "k", "speed-up")
        expect_equal("k", k, 0)
        expect_close("speed-up", speedup, 1.0)
        self.same(impl, 0.3, 0.5, [1, 1, 1, 1])
        self.same(impl, 0.0, 0.01, [1, 1.0, 1.0])
        self.same(impl, 0.7, 3, [1])

    def test_steps(self, impl):
        """the speed-up falls and rises again"""
        self.same(impl, 0.95, 0.0, [1, 1, 2.2, 2.2, 2.2, 2.2, 2.2, 2.2, 2.2])
        self.same(impl, 0.9, 0.0, [1, 2.5, 2.5, 2.5, 2.5, 2.5])
        self.same(impl, 1.0, 0.0, [1, 3, 3, 3, 3])
        self.same(impl, 0.99, 0.0, [1, 1, 1, 9, 9, 2, 9])
        self.same(impl, 0.95, 0.0, [1] + [30] * 12 + [1.5, 30, 30])
        draw = random.Random(0)
        for _ in range(20):
            self.same(impl, 0.9, 0.02, [1] + [draw.uniform(0.9, 4) for _ in range(12)])

    def test_measured(self, impl):
        """a step that checks may take less than a plain one: c above alpha, or alpha 0, does not decide"""
        self.same(impl, 0.3, 0.5, [1, 0.5, 0.6])
        self.same(impl, 0.0, 0.0, [1, 0.8, 0.9])
        self.same(impl, 0.5, 0.1, [1, 2.5, 0.9, 0.95])

    def test_close(self, impl):
        """a little larger is larger"""
        for gain in (1e-3, 1e-7, 1e-9):
            self.same(impl, 1.0, 0.0, [1, 2 / (1 + gain), 3 / (1 - gain)])
            self.same(impl, 1.0, 0.0, [1, 2 / (1 - gain), 3 / (1 + gain)])

    def test_ties(self, impl):
        """of equal ones the smallest k"""
        for args in ((1.0, 0.0, [1, 2, 3, 4]), (1.0, 0.5, [1, 1.5, 2.0, 2.5]), (0.0, 0.0, [1, 1, 1]),
                     (0.5, 0.0, [1, 1.5, 1.75]), (0.0, 0.25, [1, 0.75, 0.5])):  # fmt: skip
            k, speedup = expect_parts(impl(*args), "k", "speed-up")
            expect_equal(f"k, {args}", k, 0)
            expect_close(f"speed-up, {args}", speedup, 1.0)
        k, _ = expect_parts(impl(1.0, 0.0, [1, 1, 1.5, 2]), "k", "speed-up")
        expect_equal("k, speed-ups 1, 2, 2, 2", k, 1)

    def test_bounds(self, impl):
        """alpha 0 and 1; one guess at most; many"""
        self.same(impl, 1.0, 0.0, [1] * 6)
        self.same(impl, 1.0, 0.1, [1, 1.1])
        self.same(impl, 0.0, 0.0, [1, 1])
        self.same(impl, 0.999, 0.001, [1 + 0.001 * k for k in range(300)])
        self.same(impl, 0.999, 0.0, [1] * 65)
        self.same(impl, 0.99995, 0.0, [1] * 700)
        self.same(impl, 1 - 1e-9, 0.0, [1] * 30)
        self.same(impl, 0.5, 0.001, (1.0, 1.0, 1.0, 1.0))


# ---- 14.3


def verified(logits, guesses, counts):
    """Sequence by sequence."""
    given, tokens = [], []
    for rows, guess, count in zip(logits.double().tolist(), guesses.tolist(), counts.tolist(), strict=True):
        best = [row.index(max(row)) for row in rows]
        n = 0
        while n < count and best[n] == guess[n]:
            n += 1
        given.append(n + 1)
        tokens.append(best[: n + 1] + [-1] * (len(best) - n - 1))
    return torch.tensor(given, dtype=torch.int64), torch.tensor(tokens, dtype=torch.int64).reshape(logits.shape[:2])


def verify_case(s=9, k=5, vocab=11, seed=0, dtype=torch.float32):
    """Guesses of which about three of four are right."""
    logits, draw = random_tensor(s, 1 + k, vocab, seed=seed, dtype=dtype), random.Random(seed)
    best = logits.argmax(-1)
    wrong = torch.tensor([[draw.random() < 0.25 for _ in range(k)] for _ in range(s)], dtype=torch.bool).reshape(s, k)
    counts = torch.tensor([draw.randint(0, k) for _ in range(s)], dtype=torch.int64)
    return logits, torch.where(wrong, (best[:, :k] + 1) % vocab, best[:, :k]), counts


@exercise("14.3", "verify")
class TestVerify:
    def same(self, impl, case, what=""):
        expected, before = verified(*case), [t.clone() for t in case]
        got = expect_parts(impl(*case), "given", "tokens")
        expect_unchanged(zip(("logits", "guesses", "counts"), case, before, strict=True))
        for name, g, e in zip(("given", "tokens"), got, expected, strict=True):
            expect_same_tensor(f"{name}{what}", g, e)

    def of(self, best, guesses, counts, vocab=9):
        logits = torch.nn.functional.one_hot(torch.tensor(best), vocab).float() * 3 - 1
        return logits, torch.tensor(guesses), torch.tensor(counts)

    def test_prefix(self, impl):
        """given: the guesses up to the first wrong one, and the model's token for it"""
        self.same(impl, self.of([[1, 2, 3, 4]], [[1, 2, 7]], [3]), ", the last guess wrong")
        self.same(impl, self.of([[1, 2, 3, 4]], [[7, 2, 3]], [3]), ", the first guess wrong: nothing behind it counts")
        self.same(impl, self.of([[1, 2, 3, 4]], [[1, 7, 3]], [3]), ", the second guess wrong")

    def test_bonus(self, impl):
        """all right: one token more, of the last row"""
        self.same(impl, self.of([[1, 2, 3, 4]], [[1, 2, 3]], [3]))
        self.same(impl, self.of([[5, 5, 5, 5], [1, 2, 3, 0]], [[5, 5, 5], [1, 2, 3]], [3, 3]), ", token 0 as bonus")

    def test_padding(self, impl):
        """guesses behind counts are never right, also if they are what the model says"""
        best, guesses = [[1, 2, 3, 4]] * 4 + [[0, 0, 0, 0]] * 4, [[1, 2, 3]] * 4 + [[0, 0, 0]] * 4
        self.same(impl, self.of(best, guesses, [0, 1, 2, 3, 0, 1, 2, 3]))
        self.same(impl, self.of([[1, 2, 3, 4]] * 2, [[-1, -1, -1], [1, -1, -1]], [0, 1]), ", padding of -1")

    def test_many(self, impl):
        """sequences differ, and so do their counts"""
        for seed in range(6):
            self.same(impl, verify_case(20, 5, 7, seed), f", case {seed}")
        self.same(impl, verify_case(3, 12, 50, 7))
        self.same(impl, verify_case(1, 1, 2, 8))

    def test_ties(self, impl):
        """of equal logits the smallest id"""
        logits = torch.zeros(2, 3, 6)
        logits[0, 0, 3:5] = 1
        logits[1, 1, [1, 5]] = 2
        self.same(impl, (logits, torch.tensor([[3, 0], [0, 1]]), torch.tensor([2, 2])))
        self.same(impl, (logits, torch.tensor([[4, 0], [0, 5]]), torch.tensor([2, 2])), ", the other one was guessed")

    def test_negative(self, impl):
        """logits may all be negative, and those of tokens that are not allowed -inf"""
        logits, guesses, counts = verify_case(6, 3, 8, 3)
        self.same(impl, (logits - 100, guesses, counts))
        masked = logits.clone()
        masked[:, :, :4] = -INF
        self.same(impl, (masked, guesses, counts), ", half of the tokens at -inf")

    def test_close(self, impl):
        """the largest logit, however close the next one is, and however large both are"""
        for low, high, dtype in ((0, 1e-9, torch.float32), (1e-9, 2e-9, torch.float32), (2e5, 2e5 + 1, torch.float32),
                                 (-3e5, -2e5, torch.float32), (1e30, 2e30, torch.float32), (0, 1e-4, torch.float16),
                                 (1, 1.001, torch.float16), (6e4, 6.1e4, torch.float16), (-6.1e4, -6e4, torch.float16),
                                 (0, 1e-4, torch.bfloat16), (-2e30, -1e30, torch.bfloat16)):  # fmt: skip
            logits = torch.full((2, 3, 6), low, dtype=dtype)
            logits[:, :, 4] = high
            what = f", logits {low} and {high}, {dtype}"
            self.same(impl, (logits, torch.tensor([[4, 4], [0, 4]]), torch.tensor([2, 2])), what)

    def test_long(self, impl):
        """thousands of guesses: all right; all wrong"""
        best = torch.arange(2502) % 3
        logits = torch.nn.functional.one_hot(best, 3).float().expand(3, -1, -1).clone()
        guesses = torch.stack((best[:-1], (best[:-1] + 1) % 3, best[:-1]))
        self.same(impl, (logits, guesses, torch.tensor([2501, 2501, 700])))

    def test_empty(self, impl):
        """no guesses; no sequences"""
        self.same(impl, verify_case(4, 0), ", K = 0")
        self.same(impl, verify_case(0, 3), ", S = 0")
        self.same(impl, verify_case(0, 0), ", S = K = 0")

    def test_dtypes(self, impl):
        """logits fp32, fp16 or bf16; guesses and counts int32 or int64; the results int64"""
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            logits, guesses, counts = verify_case(12, 4, 6, 5, dtype)
            self.same(impl, (logits, guesses, counts), f", logits {dtype}")
            self.same(impl, (logits, guesses.int(), counts.int()), f", logits {dtype}, guesses and counts int32")
            self.same(impl, (logits, guesses.int(), counts), f", logits {dtype}, guesses int32")
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            logits = torch.zeros(1, 2, 70_000, dtype=dtype)
            logits[0, :, 66_000] = 1
            for guess in (66_000, 66_001, 66_000 - 65_536):
                case = logits, torch.tensor([[guess]]), torch.tensor([1])
                self.same(impl, case, f", {dtype}, guess {guess} where the model says 66,000")

    def test_strides(self, impl):
        """any strides, and the inputs stay as they are"""
        logits, guesses, counts = verify_case(7, 4, 9, 6)
        views = apart(logits), guesses.T.contiguous().T, torch.stack((counts, counts + 1), 1)[:, 0]
        self.same(impl, views)
        self.same(impl, (logits.transpose(0, 2).contiguous().transpose(0, 2), *views[1:]))

    def test_no_loop(self, impl):
        """as many torch operations for 40 sequences as for 2, for 300 guesses as for 2"""
        counts = {}
        for s, k in ((2, 2), (40, 9), (3, 300)):
            case = verify_case(s, k)
            with Operations() as seen:
                impl(*case)
            counts[f"{s} x {k}"] = seen.count
        expect(len(set(counts.values())) == 1, f"expected as many operations for any size\n  got {counts}")

    def test_waits_for_nothing(self, impl):
        """no value of a tensor is read back: an answer for tensors whose numbers nobody knows yet"""
        with FakeTensorMode():  # tensors without values
            case = torch.empty(6, 4, 9), torch.empty(6, 3, dtype=torch.int64), torch.empty(6, dtype=torch.int64)
            try:
                given, tokens = expect_parts(impl(*case), "given", "tokens")
            except Exception as e:
                if is_stub(e):
                    raise
                said = str(e).split("\n", maxsplit=1)[0]
                expect(False, f"expected that nothing waits for a tensor's numbers\n  got {type(e).__name__}: {said}")
        expect_equal("shapes", (tuple(given.shape), tuple(tokens.shape)), ((6,), (6, 4)))


# ---- 14.4


def drawn(weights, u):
    sums = list(itertools.accumulate(weights))
    return next(x for x, so_far in enumerate(sums) if so_far > u * sums[-1])


def stepped(p, q, guesses, uniforms):
    """The rule in plain Python."""
    p, q, tokens = p.double().tolist(), q.double().tolist(), []
    for j, x in enumerate(guesses):
        if uniforms[j] * q[j][x] < p[j][x]:
            tokens.append(int(x))
            continue
        left = [max(0.0, a - b) for a, b in zip(p[j], q[j], strict=True)]
        return [*tokens, drawn(left if any(left) else p[j], uniforms[-1])]
    return [*tokens, drawn(p[len(guesses)], uniforms[-1])]


def distributions(*shape, seed=0, dtype=torch.float64, sharp=1.5):
    return torch.softmax(sharp * random_tensor(*shape, seed=seed, dtype=torch.float64), -1).to(dtype)


def close_calls(p, q, x):
    """Uniforms for one guess, of token x, just beside where the outcome changes: 1e-9 is much in fp64, and nothing in
    fp32.
    """

    def beside(weights):
        sums = list(itertools.accumulate(weights))
        shares = sorted({s / sums[-1] for s in sums if 0 < s < 0.999 * sums[-1]})
        return [share * near for share in shares for near in (1 - 1e-9, 1 + 1e-9)]

    p, q = p.double().tolist(), q[0].double().tolist()
    calls = [[0.0, v] for v in beside(p[1])]
    if p[0][x] < 0.999 * q[x]:
        calls += [[p[0][x] / q[x] * near, 0.5] for near in (1 - 1e-9, 1 + 1e-9)]
        calls += [[1 - 1e-9, v] for v in beside([max(0.0, a - b) for a, b in zip(p[0], q, strict=True)])]
    return calls


@exercise("14.4", "speculate")
class TestSpeculate:
    def same(self, impl, p, q, guesses, uniforms, what=""):
        expected, before = stepped(p, q, guesses, uniforms), (p.clone(), q.clone())
        lists = list(guesses), list(uniforms)
        p, q = p.clone() if p.is_contiguous() else p, q.clone() if q.is_contiguous() else q
        got = impl(p, q, guesses, uniforms)
        expect_unchanged((("p", p, before[0]), ("q", q, before[1])))
        expect_equal("guesses and uniforms, afterwards", [guesses, uniforms], list(lists))
        expect(isinstance(got, list), f"expected a list of tokens\n  got {type(got).__name__}")
        expect_equal(f"tokens{what}", [int(x) for x in got], expected)
        expect(all(type(x) is int for x in got), f"tokens: expected ints\n  got {[type(x).__name__ for x in got]}")

    P = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)
    Q = torch.tensor([[0.2, 0.6, 0.2], [0.3, 0.3, 0.4]], dtype=torch.float64)

    def test_accept(self, impl):
        """guess 1 of the first place, p 0.3, q 0.6: accepted for uniforms below 0.5"""
        for u in (0.0, 0.2, 0.49, 0.51, 0.7, 0.99):
            self.same(impl, self.P, self.Q, [1, 1], [u, 0.1, 0.3], f", uniforms[0] = {u}")

    def test_certain(self, impl):
        """p above q: always accepted"""
        for u in (0.0, 0.5, 0.999999):
            self.same(impl, self.P, self.Q, [0, 1], [u, u, 0.6], f", uniforms {u}")

    def test_rest(self, impl):
        """refused: drawn from max(0, p - q) by the last uniform, and the step ends"""
        for u in (0.0, 0.3, 0.6, 0.9, 0.99):
            self.same(impl, self.P, self.Q, [1, 1], [0.8, 0.1, u], f", uniforms[2] = {u}")
            self.same(impl, self.P, self.Q, [0, 2], [0.8, 0.9, u], f", refused at the second, uniforms[2] = {u}")
        p, q = distributions(2, 9, seed=1), distributions(1, 9, seed=2)
        x = int((q[0] - p[0]).argmax())
        for i in range(40):
            self.same(impl, p, q, [x], [0.999, (i + 0.5) / 40], f", uniforms[1] = {(i + 0.5) / 40}")

    def test_bonus(self, impl):
        """all accepted: drawn from the last row of p"""
        for u in (0.0, 0.24, 0.26, 0.49, 0.51, 0.99):
            self.same(impl, self.P, self.Q, [0, 1], [0.1, 0.1, u], f", uniforms[2] = {u}")

    def test_no_guess(self, impl):
        """k = 0: one draw from p"""
        p = distributions(1, 7, seed=3)
        for i in range(20):
            self.same(impl, p, torch.zeros(0, 7, dtype=torch.float64), [], [(i + 0.5) / 20])

    def test_zero(self, impl):
        """a token of p 0 is never given: neither accepted with the uniform 0 nor drawn"""
        p = torch.tensor([[0.0, 0.4, 0.0, 0.6, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
        q = torch.tensor([[0.5, 0.1, 0.2, 0.1, 0.1]], dtype=torch.float64)
        for guess in range(5):
            for u, v in itertools.product((0.0, 0.4, 0.9999), repeat=2):
                self.same(impl, p, q, [guess], [u, v], f", guess {guess}, uniforms {[u, v]}")

    def test_equal(self, impl):
        """p = q: always accepted, for any uniform"""
        p = distributions(4, 6, seed=4)
        for u in (0.0, 0.5, 0.999999):
            self.same(impl, p, p[:3], [2, 0, 5], [u] * 4)

    def test_looked_up(self, impl):
        """q is 1 at the guess: accepted with p, else drawn from p without it"""
        p, q = distributions(2, 5, seed=5, sharp=0.5), torch.eye(5, dtype=torch.float64)[[3]]
        for i, v in itertools.product(range(20), (0.1, 0.5, 0.9)):
            self.same(impl, p, q, [3], [(i + 0.5) / 20, v])

    def test_outside(self, impl):
        """q 0 at the guess, as rounding may have it: accepted if p is above 0"""
        p = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
        self.same(impl, p, torch.tensor([[0.0, 1.0]], dtype=torch.float64), [0], [0.9, 0.2])
        p[0] = torch.tensor([0.0, 1.0], dtype=torch.float64)
        self.same(impl, p, torch.tensor([[0.0, 1.0]], dtype=torch.float64), [0], [0.0, 0.2], ", p 0 as well")

    def test_nothing_left(self, impl):
        """refused, and p nowhere above q, by rounding: drawn from p"""
        p = torch.tensor([[0.5, 0.25, 0.2499], [1.0, 0.0, 0.0]], dtype=torch.float64)
        q = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
        for v in (0.1, 0.6, 0.9):
            self.same(impl, p, q, [2], [0.99999, v], f", uniforms[1] = {v}")
        p[0], q[0] = torch.tensor([0.4, 0.3, 0.2]), torch.tensor([0.4, 0.3, 0.4])
        for i in range(20):
            self.same(impl, p, q, [2], [0.9, (i + 0.5) / 20], f", p {p[0].tolist()}, q {q[0].tolist()}")

    def test_little_left(self, impl):
        """what is left may be tiny: it is drawn from all the same"""
        for little in (1e-8, 1e-13, 1e-20):
            p = torch.tensor([[little, 0.5, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
            q = torch.tensor([[0.0, 0.5, 0.501]], dtype=torch.float64)
            self.same(impl, p, q, [2], [0.9999, 0.9], f", {little} is left")
        p = torch.tensor([[0.5 + 1e-9, 0.5 - 1e-9], [1.0, 0.0]], dtype=torch.float64)
        self.same(impl, p, torch.tensor([[0.5, 0.5]], dtype=torch.float64), [1], [1 - 1e-12, 0.99])

    def test_sums(self, impl):
        """p and q need not add up to 1"""
        for scale, i in itertools.product((0.9, 0.97, 1.05, 1.2), range(40)):
            u = (i + 0.5) / 40
            self.same(impl, scale * self.P, self.Q, [1, 1], [0.1, 0.2, u], f", p times {scale}, uniforms[2] = {u}")
            self.same(impl, scale * self.P, self.Q, [1, 1], [0.9, 0.2, u], f", p times {scale}, uniforms[2] = {u}")

        p = torch.tensor([[1 + 1e-6, 0.0], [0.0, 1 + 1e-6]], dtype=torch.float64)
        self.same(impl, p, p[:1].clone(), [0], [0.9999999, 0.5], ", p and q 1.000001 at the guess")

    def test_distribution(self, impl):
        """over all guesses and a grid of uniforms the first token is distributed as p, the second as p's second row"""
        p, q = distributions(2, 4, seed=6), distributions(1, 4, seed=7)
        first, n = torch.zeros(4, dtype=torch.float64), 40
        second = torch.zeros(4, dtype=torch.float64)
        for guess, i, j in itertools.product(range(4), range(n), range(n)):
            got = impl(p, q, [guess], [(i + 0.5) / n, (j + 0.5) / n])
            first[got[0]] += float(q[0, guess]) / n**2
            if len(got) == 2:
                second[got[1]] += float(q[0, guess]) / n**2
        expect_close("share of each first token, p on the right", first, p[0], 0.02, 0)
        expect_close("share of each second token", second / second.sum(), p[1], 0.02, 0)

    def test_random(self, impl):
        """many cases, fp32 and fp64"""
        draw = random.Random(8)
        for seed in range(60):
            k, vocab = draw.randint(0, 5), draw.randint(2, 12)
            dtype = (torch.float32, torch.float64)[seed % 2]
            p, q = distributions(k + 1, vocab, seed=seed, dtype=dtype), distributions(k, vocab, seed=99 + seed)
            guesses = [draw.randrange(vocab) for _ in range(k)]
            self.same(impl, p, q.to(dtype), guesses, [draw.random() for _ in range(k + 1)], f", case {seed}")

    def test_fp64(self, impl):
        """fp32 goes on in fp64: with 2²⁰ tokens the sums are exact"""
        p = torch.full((1, 2**20), 2.0**-20) * 1.1
        self.same(impl, p, torch.zeros(0, 2**20), [], [0.3])
        self.same(impl, p, torch.zeros(0, 2**20), [], [0.9])

    def test_close(self, impl):
        """fp32 or fp64, each of p and q, and numbers to all their digits: acceptance, rest and draws are in fp64"""
        for seed in range(5):
            p, q = distributions(2, 7, seed=seed), distributions(1, 7, seed=50 + seed)
            x = int((q[0] - p[0]).argmax())
            for p_type, q_type in itertools.product((torch.float32, torch.float64), repeat=2):
                a, b = p.to(p_type), q.to(q_type)
                for uniforms in close_calls(a, b, x):
                    self.same(impl, a, b, [x], uniforms, f", p {p_type}, q {q_type}, uniforms {uniforms}")
        p = torch.tensor([[5e-11, 1 - 5e-11], [0.5, 0.5]], dtype=torch.float64)
        self.same(impl, p, torch.tensor([[1e-10, 1.0]], dtype=torch.float64), [0], [0.4, 0.2], ", q of 1e-10")

    def test_boundary(self, impl):
        """a sum equal to u times the sum of all does not exceed it"""
        p = torch.tensor([[0.25, 0.25, 0.5, 0.0]] * 2, dtype=torch.float64)
        q = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
        for u in (0.0, 0.25, 0.5):
            self.same(impl, p[:1], q[:0], [], [u], f", uniform {u}")
            self.same(impl, p, q, [3], [0.5, u], f", refused, uniform {u}")
        half = torch.tensor([[0.5, 0.0, 0.0, 0.5]], dtype=torch.float64)
        self.same(impl, p, half, [0], [0.5, 0.0], ", uniform and quotient 0.5")

    def test_last_uniform(self, impl):
        """the largest number below 1 draws the last token that has a weight"""
        p = torch.tensor([[0.25, 0.5, 0.0, 0.25, 0.0, 0.0]] * 2, dtype=torch.float64)
        q = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.5, 0.5]], dtype=torch.float64)
        for u in (0.999999, 1 - 2**-53):
            self.same(impl, p[:1], q[:0], [], [u], f", uniform {u}")
            self.same(impl, p, q, [4], [0.5, u], f", refused, uniform {u}")
        p[:, 3] = 1e-5
        self.same(impl, p, q, [4], [0.5, 0.999999], ", refused, a last weight of 1e-5")
        self.same(impl, p[:1], q[:0], [], [0.999999], ", a last weight of 1e-5")

    def test_long(self, impl):
        """many guesses: 20 accepted, or the last one refused"""
        p, last = distributions(21, 6, seed=9), [0.3] * 19
        guesses = [x % 6 for x in range(20)]
        self.same(impl, p, p[:20].clone(), guesses, [*last, 0.3, 0.7])
        q = p[:20].clone()
        q[19] = torch.eye(6, dtype=torch.float64)[guesses[19]]
        self.same(impl, p, q, guesses, [*last, 0.999, 0.7], ", the last one refused")

    def test_inputs(self, impl):
        """p, q, guesses and uniforms stay as they are; any strides; guesses as a tensor"""
        p, q, guesses, uniforms = self.P.clone(), self.Q.clone(), [1, 1], [0.9, 0.2, 0.4]
        impl(p, q, guesses, uniforms)
        impl(p, q, guesses, [0.1, 0.9, 0.4])
        expect_unchanged((("p", p, self.P), ("q", q, self.Q)))
        expect_equal("guesses", guesses, [1, 1])
        expect_equal("uniforms", uniforms, [0.9, 0.2, 0.4])
        self.same(impl, apart(p), q.T.contiguous().T, guesses, uniforms, ", of views")
        got = impl(p, q, torch.tensor(guesses), torch.tensor(uniforms, dtype=torch.float64))
        expect_equal("tokens, guesses as a tensor", [int(x) for x in got], stepped(p, q, guesses, uniforms))


# ---- 14.5


class Token(int):
    """A token that counts how often it is compared or hashed."""

    looked = 0

    def __eq__(self, other):
        Token.looked += 1
        return int(self) == int(other)

    def __ne__(self, other):
        Token.looked += 1
        return int(self) != int(other)

    def __hash__(self):
        Token.looked += 1
        return int.__hash__(self)


def looked_up(text, k, most, least):
    for n in range(most, least - 1, -1):
        for place in range(len(text) - 1, n - 1, -1):
            if text[place - n : place] == text[len(text) - n :]:
                return text[place : place + k]
    return []


@exercise("14.5", "Lookup")
class TestLookup:
    def same(self, impl, text, k, most, least, what=""):
        lookup = impl(most, least)
        lookup.extend(text)
        got = lookup.guess(k)
        expect(isinstance(got, list), f"expected a list of guesses\n  got {type(got).__name__}")
        what = f"guesses, text {shown(text)}, k {k}, most {most}, least {least}{what}"
        expect_equal(what, got, looked_up(list(text), k, most, least))
        return lookup

    def test_found(self, impl):
        """what followed where the text's end occurred before"""
        self.same(impl, [1, 2, 3, 4, 5, 9, 1, 2, 3], 3, 3, 2)
        self.same(impl, [1, 2, 3, 4, 5, 9, 1, 2, 3], 1, 3, 2)

    def test_longest(self, impl):
        """the largest n that fits, also where a smaller one fits later"""
        self.same(impl, [1, 2, 3, 4, 7, 2, 3, 5, 8, 1, 2, 3], 3, 3, 2)
        self.same(impl, [1, 2, 3, 4, 7, 2, 3, 5, 8, 1, 2, 3], 3, 2, 2)
        self.same(impl, [1, 2, 3, 4, 7, 3, 5, 8, 2, 3], 3, 4, 1)
        self.same(impl, [9, 1, 2, 3, 4, 8, 1, 2, 3, 5, 9, 1, 2, 3], 2, 4, 1)

    def test_latest(self, impl):
        """of several places the latest"""
        self.same(impl, [1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 2], 2, 2, 1)
        self.same(impl, [7, 1, 7, 2, 7, 3, 7], 5, 1, 1)

    def test_least(self, impl):
        """fewer than `least` that agree are none"""
        self.same(impl, [1, 2, 3, 4, 9, 3], 3, 3, 2)
        self.same(impl, [1, 2, 3, 4, 9, 3], 3, 3, 1)
        self.same(impl, [1, 2, 3, 4, 2, 3], 3, 3, 3)

    def test_most(self, impl):
        """no more than `most` are compared"""
        self.same(impl, [1, 2, 3, 5, 9, 2, 3, 6, 1, 2, 3], 2, 2, 1)
        self.same(impl, [1, 2, 3, 5, 9, 2, 3, 6, 1, 2, 3], 2, 3, 1)
        self.same(impl, [1, 2, 1, 2], 3, 50, 1)
        for n in (10, 20):
            run = list(range(1, n + 1))
            for most in (n - 1, n, n + 1):
                self.same(impl, [*run, 50, 99, *run[1:], 60, *run], 2, most, 1)

    def test_long(self, impl):
        """a text of thousands of tokens is remembered from its beginning, and gives as many guesses as asked for"""
        for k in (20, 100, 2000, 5000):
            self.same(impl, [*range(3000), 0, 1, 2], k, 3, 2)
        self.same(impl, [*range(40_000), 0, 1, 2], 5, 3, 1)

    def test_all_different(self, impl):
        """tokens that are all different: nothing fits, ever"""
        lookup, tokens = impl(2, 2), random.Random(3).sample(range(200_000), 3000)
        for i in range(0, 3000, 10):
            lookup.extend(tokens[i : i + 10])
            expect_equal(f"guesses behind {i + 10} tokens that are all different", lookup.guess(3), [])

    def test_overlap(self, impl):
        """the earlier occurrence may overlap the end, and what followed may be cut by it"""
        self.same(impl, [5, 5], 3, 2, 1)
        self.same(impl, [5, 5, 5], 3, 2, 1)
        self.same(impl, [5, 5, 5, 5, 5], 4, 3, 2)
        self.same(impl, [1, 2, 1, 2, 1, 2], 9, 2, 2)
        self.same(impl, [1, 2, 3, 9, 1, 2], 9, 2, 2)

    def test_none(self, impl):
        """nothing fits: an empty list; no text, one token; k = 0"""
        self.same(impl, [], 3, 2, 1)
        self.same(impl, [4], 3, 2, 1)
        self.same(impl, [1, 2, 3], 3, 2, 1)
        self.same(impl, [1, 2, 1], 0, 2, 1)
        self.same(impl, [0, 0, 1, 0], 2, 1, 1)
        expect_equal("guesses before any token", impl(3, 1).guess(2), [])

    def test_borders(self, impl):
        """token ids are whole: (1, 12) is not (11, 2)"""
        self.same(impl, [1, 12, 5, 11, 2, 6, 1, 12], 2, 2, 2)
        self.same(impl, [11, 2, 5, 1, 12, 6, 11, 2], 2, 2, 2)
        self.same(impl, [256, 1, 7, 1, 256, 8, 256, 1], 2, 2, 1)
        self.same(impl, [11, 2, 5, 1, 12], 2, 2, 2)
        self.same(impl, [49151, 0, 3, 49151, 0], 2, 2, 2)
        self.same(impl, [65_537, 9, 5, 1], 2, 2, 1)
        self.same(impl, [100_000, 9, 5, 100_000], 2, 2, 1)

    def test_grows(self, impl):
        """a text in pieces of any length gives what it gives at once, whenever guesses are made"""
        draw = random.Random(1)
        for case in range(40):
            most, alphabet = draw.randint(1, 5), draw.choice((2, 3, 5))
            least = draw.randint(1, most)
            lookup, text = impl(most, least), []
            for _ in range(12):
                piece = [draw.randrange(alphabet) for _ in range(draw.choice((0, 1, 1, 2, 5)))]
                lookup.extend(piece)
                text += piece
                k = draw.randint(0, 6)
                for again in range(draw.choice((0, 1, 2))):
                    what = f"case {case}, guess {again} with most {most}, least {least}, k {k}, text {text}"
                    expect_equal(what, lookup.guess(k), looked_up(text, k, most, least))

    def test_own(self, impl):
        """two texts do not mix, the caller's list may change, and so may what was returned"""
        one, two, tokens = impl(2, 1), impl(2, 1), [1, 2, 3, 1]
        one.extend(tokens)
        two.extend([1, 7, 1])
        tokens += [9, 9]
        tokens[1] = 8
        got = one.guess(3)
        expect(isinstance(got, list), f"expected a list of guesses\n  got {type(got).__name__}")
        expect_equal("guesses of the first", got, [2, 3, 1])
        got.clear()
        expect_equal("guesses of the first, again, after the list was emptied", one.guess(3), [2, 3, 1])
        expect_equal("guesses of the second", two.guess(3), [7, 1])
        one.extend((2,))
        expect_equal("guesses after one more, from a tuple", one.guess(2), [3, 1])

    def test_no_scan(self, impl):
        """comparisons and hashes do not grow with the text"""
        most, draw = 3, random.Random(2)
        lookup = impl(most, 1)
        for length, piece in ((0, 60), (60, 20_000)):
            tokens = [Token(draw.randrange(500)) for _ in range(piece)]
            Token.looked = 0
            lookup.extend(tokens)
            expect(
                Token.looked <= 40 * piece,
                f"extend, {piece} tokens behind {length}: expected about {4 * most * piece} comparisons and hashes"
                f"\n  got {Token.looked}",
            )
        for _ in range(20):
            Token.looked = 0
            lookup.guess(4)
            expect(
                Token.looked <= 120, f"guess: expected about {4 * most} comparisons and hashes\n  got {Token.looked}"
            )
            Token.looked = 0
            lookup.extend([Token(draw.randrange(500))])
            expect(Token.looked <= 120, f"extend by one: expected about {4 * most} comparisons and hashes\n"
                   f"  got {Token.looked}")  # fmt: skip


# ---- 14.6


def goodput(lengths, chances, seconds):
    given = len(chances) + sum(sum(row[:k]) for row, k in zip(chances, lengths, strict=True))
    return given / seconds(len(chances) + sum(lengths))


def best_of_all(chances, budget, seconds):
    """By trying every list; of equal ones the fewest guesses, then those of the earlier requests."""
    lists = itertools.product(*(range(len(row) + 1) for row in chances))
    lists = [k for k in lists if len(chances) + sum(k) <= budget]
    top = max(goodput(k, chances, seconds) for k in lists)
    near = [k for k in lists if goodput(k, chances, seconds) >= top * (1 - 1e-12)]
    return list(min(near, key=lambda k: (sum(k), [-n for n in k])))


def falling(draw, count):
    chances, product = [], 1.0
    for _ in range(count):
        product *= draw.choice((1.0, 0.9, 0.75, 0.5, 0.25))
        chances.append(product)
    return chances


@exercise("14.6", "best_lengths")
class TestBestLengths:
    def same(self, impl, chances, budget, seconds, what=""):
        before = [list(row) for row in chances]
        got = impl(chances, budget, seconds)
        expect(isinstance(got, list), f"expected a list of lengths\n  got {type(got).__name__}")
        expect_equal(f"lengths, chances {before}, budget {budget}{what}", [int(n) for n in got],
                     best_of_all(before, budget, seconds))  # fmt: skip
        expect_equal("chances, afterwards", [list(row) for row in chances], before)

    def test_free(self, impl):
        """steps that take the same for all n: all guesses that have a chance"""
        self.same(impl, [[0.9, 0.8], [0.1], []], 99, lambda n: 1.0)
        self.same(impl, [[0.9, 0.0], [0.5, 0.0]], 99, lambda n: 1.0, ", chances of 0 bring nothing")

    def test_price(self, impl):
        """each token has a price: guesses that bring less are left out"""
        for price in (0.05, 0.2, 0.4, 0.8, 2.0):
            self.same(impl, [[0.9, 0.6, 0.3], [0.5, 0.45, 0.1]], 99, lambda n, p=price: 1 + p * n, f", price {price}")

    def test_never(self, impl):
        """time in proportion to the tokens: no guesses"""
        self.same(impl, [[0.9, 0.8], [0.95]], 99, lambda n: 1e-3 * n)

    def test_who(self, impl):
        """the most probable guesses, whoever's they are"""
        self.same(impl, [[0.3, 0.2], [0.9, 0.85]], 4, lambda n: 1.0)
        self.same(impl, [[0.5, 0.1], [0.4, 0.3], [0.6, 0.55]], 6, lambda n: 1.0)

    def test_budget(self, impl):
        """never more than `budget` tokens"""
        for budget in range(3, 10):
            self.same(impl, [[0.9, 0.8], [0.7, 0.6], [0.5, 0.4]], budget, lambda n: 1.0)

    def test_steps(self, impl):
        """tiles: more tokens a second come back after fewer"""
        chances = [[0.9, 0.8, 0.7, 0.6], [0.8, 0.7, 0.6, 0.5]]
        self.same(impl, chances, 99, lambda n: 1.0 if n <= 2 else 1.6)
        self.same(impl, chances, 99, lambda n: 1.0 if n <= 3 else 1.9)
        self.same(impl, chances, 99, lambda n: math.ceil(n / 4))
        self.same(impl, chances, 99, lambda n: {2: 1.0, 3: 5.0, 4: 5.0, 5: 1.01}.get(n, 9.0))

    def test_ties(self, impl):
        """of equally good lists the fewest guesses; of equal chances the earlier request's"""
        self.same(impl, [[1.0, 1.0], [1.0]], 99, lambda n: float(n))
        self.same(impl, [[0.5, 0.5], [0.5, 0.5]], 3, lambda n: 1.0)
        self.same(impl, [[0.5, 0.5], [0.5, 0.5]], 5, lambda n: 1.0)
        self.same(impl, [[0.25], [0.5, 0.5], [0.5]], 5, lambda n: 1.0)
        self.same(impl, [[0.0], [0.0, 0.0]], 9, lambda n: 1.0)

    def test_close(self, impl):
        """a little better is better, in any unit of time; a little more probable is more probable"""
        for unit, gain in itertools.product((1e-3, 1.0, 1e3), (1e-4, 1e-7, 1e-9)):
            for sign in (1, -1):
                table = {1: unit, 2: 2 * unit / (1 + sign * gain), 3: 3 * unit / (1 - sign * gain)}
                self.same(impl, [[1.0, 1.0]], 3, table.__getitem__, f", seconds {table}")
        self.same(impl, [[0.9, 0.5], [0.9, 0.5 + 1e-9]], 5, lambda n: 1.0)
        self.same(impl, [[0.9, 0.5], [0.9, 0.5 + 1e-9]], 4, lambda n: 1.0)

    def test_no_chance(self, impl):
        """a step of more tokens may take less: then guesses of chance 0 are worth making"""
        self.same(impl, [[0.5, 0.0]], 9, lambda n: {1: 1.0, 2: 1.5}.get(n, 0.9))
        self.same(impl, [[0.0], [0.0, 0.0]], 9, lambda n: {2: 1.0, 3: 1.2}.get(n, 0.8))

    def test_length(self, impl):
        """a request may have many guesses, and the best total may stand behind many that are worse"""
        self.same(impl, [[0.99**j for j in range(1, 21)]], 99, lambda n: 1.0)
        self.same(impl, [[0.99**j for j in range(1, 31)]], 99, lambda n: 1.0 if n in (1, 28) else 40.0)

    def test_one(self, impl):
        """one request; none with guesses"""
        self.same(impl, [[0.9, 0.5]], 3, lambda n: 1 + 0.3 * n)
        self.same(impl, [[0.9, 0.5]], 1, lambda n: 1.0)
        self.same(impl, [[], []], 9, lambda n: 1.0)
        self.same(impl, [[]], 1, lambda n: 1.0)

    def test_random(self, impl):
        """the best of all lists, in many small cases"""
        draw = random.Random(3)
        for case in range(60):
            chances = [falling(draw, draw.randint(0, 3)) for _ in range(draw.randint(1, 4))]
            table = [draw.choice((1.0, 1.5, 2.0, 2.25)) for _ in range(40)]
            table = sorted(table) if case % 2 else table
            self.same(impl, chances, draw.randint(len(chances), 14), table.__getitem__, f", case {case}")

    def test_many(self, impl):
        """100 requests of 8 guesses, `seconds` once for each n at most, from S to the budget"""
        draw, asked = random.Random(4), []
        chances = [falling(draw, 8) for _ in range(100)]

        def seconds(n):
            asked.append(n)
            return 1 + 0.004 * n

        before = [list(row) for row in chances]
        got = impl(chances, 700, seconds)
        expect(isinstance(got, list), f"expected a list of lengths\n  got {type(got).__name__}")
        expect_equal("chances, afterwards", chances, before)
        expect(len(asked) > 0, "seconds: expected calls\n  got none")
        expect_equal("how many lengths", len(got), 100)
        expect(all(0 <= n <= 8 for n in got), f"lengths: expected 0 to 8\n  got {min(got)} to {max(got)}")
        expect(100 + sum(got) <= 700, f"tokens: expected 700 at most\n  got {100 + sum(got)}")
        expect(len(asked) == len(set(asked)), f"seconds: expected one call for each n\n  got {len(asked)} calls,"
               f" {len(set(asked))} different n")  # fmt: skip
        expect(max(asked) <= 700 and min(asked) >= 100, f"seconds: expected n of 100 to 700\n  got {min(asked)} to"
               f" {max(asked)}")  # fmt: skip
        flat = sorted((c for row in chances for c in row), reverse=True)
        totals = [sum(flat[:m], 100.0) / (1 + 0.004 * (100 + m)) for m in range(601)]
        best = max(totals)
        expect_close("tokens a second", goodput(got, chances, lambda n: 1 + 0.004 * n), best, 0, 1e-9)


# ---- 14.7


def logits_stepped(target, draft, guesses, uniforms, temperature=1.0, allowed=None):
    """The specification in plain Python."""

    def distribution(logits):
        if temperature == 0:
            return [[float(x == row.index(max(row))) for x in range(len(row))] for row in logits]
        every = []
        for row in logits:
            top = max(row)
            weights = [math.exp((z - top) / temperature) for z in row]
            every.append([w / sum(weights) for w in weights])
        return every

    rows = target.double().tolist()
    if allowed is not None:
        rows = [[z if a else -INF for z, a in zip(row, ok, strict=True)] for row, ok in
                zip(rows, allowed.tolist(), strict=True)]  # fmt: skip
    p, q = distribution(rows), distribution(draft.double().tolist())
    vocab = target.shape[1]
    as_tensors = (torch.tensor(t, dtype=torch.float64).reshape(-1, vocab) for t in (p, q))
    return stepped(*as_tensors, guesses, uniforms)


@exercise("14.7", "speculate_logits")
class TestSpeculateLogits:
    def case(self, k=3, vocab=8, seed=0):
        target, draft = random_tensor(k + 1, vocab, seed=seed), random_tensor(k, vocab, seed=seed + 500)
        draw = random.Random(seed)
        return target, draft, [draw.randrange(vocab) for _ in range(k)], [draw.random() for _ in range(k + 1)]

    def same(self, impl, case, *rest, what=""):
        named = [("target", case[0], case[0].clone()), ("draft", case[1], case[1].clone())]
        if len(rest) > 1 and rest[1] is not None:
            named.append(("allowed", rest[1], rest[1].clone()))
        expected = logits_stepped(*case, *rest)
        got = impl(*case, *rest)
        expect(isinstance(got, list), f"expected a list of tokens\n  got {type(got).__name__}")
        expect_unchanged(named)
        expect_equal(f"tokens{what}", [int(x) for x in got], expected)
        expect(all(type(x) is int for x in got), f"tokens: expected ints\n  got {[type(x).__name__ for x in got]}")

    def test_plain(self, impl):
        """temperature 1, no mask"""
        for seed in range(60):
            self.same(impl, self.case(seed=seed), what=f", case {seed}")
            self.same(impl, self.case(k=1, vocab=3, seed=seed), 1.0, what=f", case {seed}")

    def test_temperature(self, impl):
        """p and q of the same temperature"""
        for seed, temperature in itertools.product(range(25), (0.3, 0.7, 2.0, 5.0)):
            what = f", temperature {temperature}, case {seed}"
            self.same(impl, self.case(seed=seed), temperature, what=what)

    def test_draft(self, impl):
        """a guess is accepted with p / q: one that the draft was unsure of more often"""
        target = torch.log(torch.tensor([[0.3, 0.3, 0.4], [0.2, 0.2, 0.6]]))
        draft = torch.log(torch.tensor([[0.4, 0.5, 0.1]]))
        for u in (0.1, 0.25, 0.35, 0.5, 0.58, 0.62, 0.8, 0.99):
            for guess in range(3):
                self.same(impl, (target, draft, [guess], [u, 0.5]), what=f", guess {guess}, uniform {u}")

    def test_sure(self, impl):
        """the draft was sure, q is 1 in fp64: accepted with p all the same"""
        target, draft = torch.log(torch.tensor([[0.2, 0.7, 0.1], [0.3, 0.3, 0.4]])), torch.tensor([[0.0, 200.0, 0.0]])
        for u, v in itertools.product((0.1, 0.6, 0.75, 0.99), (0.1, 0.9)):
            self.same(impl, (target, draft, [1], [u, v]), what=f", uniforms {u}, {v}")

    def test_bonus(self, impl):
        """all accepted: the last token from the last row"""
        target = torch.log(torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]]))
        for u in (0.01, 0.06, 0.5, 0.99):
            self.same(impl, (target, target[:2].clone(), [0, 1], [0.5, 0.5, u]), what=f", uniform {u}")

    def test_greedy(self, impl):
        """temperature 0: the largest logit, also where two are nearly equal; of equal ones the smallest id"""
        for seed in range(30):
            self.same(impl, self.case(seed=seed), 0.0, what=f", case {seed}")
            target, draft, _, uniforms = self.case(seed=seed)
            self.same(impl, (target, draft, target[:3].argmax(-1).tolist(), uniforms), 0, what=f", right, case {seed}")
        target = torch.tensor([[1.0, 1.0 + 1e-6, 0.0], [2.0, 2.0, 1.0]])
        for u, v in itertools.product((0.0, 0.3, 0.7, 0.99), repeat=2):
            for guess in range(3):
                self.same(impl, (target, target[:1].flip(0), [guess], [u, v]), 0.0, what=f", guess {guess}, {u}, {v}")

    def test_cold(self, impl):
        """temperatures near 0 count as they are"""
        target = torch.tensor([[1.0, 1.0 + 2e-6, 0.0], [1.0, 1.0 + 1e-6, 0.0]])
        draft = torch.tensor([[1.0, 1.0, 1.0]])
        for u, v in itertools.product((0.1, 0.4, 0.7, 0.95), repeat=2):
            self.same(impl, (target, draft, [0], [u, v]), 2e-6, what=f", uniforms {u}, {v}")

    def test_mask(self, impl):
        """tokens that are not allowed: never given, and the others share their probability"""
        draw = torch.Generator().manual_seed(5)
        for seed in range(40):
            case = self.case(seed=seed)
            allowed = torch.rand(4, 8, generator=draw) < 0.5
            allowed[:, seed % 8] = True
            for temperature in (1.0, 0.6, 0.0):
                self.same(impl, case, temperature, allowed, what=f", a mask, temperature {temperature}, case {seed}")

    def test_mask_of_bonus(self, impl):
        """the last row has a mask as well"""
        target = torch.zeros(3, 4)
        allowed = torch.ones(3, 4, dtype=torch.bool)
        allowed[2, 2:] = False
        for u in (0.1, 0.4, 0.6, 0.9):
            self.same(impl, (target, torch.zeros(2, 4), [3, 2], [0.5, 0.5, u]), 1.0, allowed, what=f", uniform {u}")

    def test_low_logits(self, impl):
        """what is not allowed has probability 0, however low the logits of the others are"""
        allowed = torch.tensor([[False, True, False, True]] * 2)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for low in (-200.0, -5e4, torch.finfo(dtype).min):
                target = torch.zeros(2, 4, dtype=dtype).masked_fill(allowed, low)
                for guess, v in itertools.product((0, 1), (0.1, 0.4, 0.6, 0.9)):
                    case = target, torch.zeros(1, 4, dtype=dtype), [guess], [0.5, v]
                    self.same(impl, case, 1.0, allowed, what=f", allowed logits of {low}, {dtype}, guess {guess}")

    def test_close(self, impl):
        """in fp64 from the logits on: their quotients, both softmaxes, what is left"""
        for seed, dtype in itertools.product(range(10), (torch.float32, torch.float64, torch.bfloat16)):
            target, draft = (
                random_tensor(2, 7, seed=seed, dtype=dtype),
                random_tensor(1, 7, seed=70 + seed, dtype=dtype),
            )
            for temperature in (0.7, 1.0):
                p, q = (torch.softmax(z.double() / temperature, -1) for z in (target, draft))
                x = int((q[0] - p[0]).argmax())
                for uniforms in close_calls(p, q, x):
                    what = f", {dtype}, temperature {temperature}, uniforms {uniforms}"
                    self.same(impl, (target, draft, [x], uniforms), temperature, what=what)

    def test_little_left(self, impl):
        """a guess that the draft hardly made and the mask forbids leaves little: it is drawn from all the same"""
        allowed = torch.tensor([[True, True, False], [True, True, True]])
        for low in (-20.0, -25.0, -30.0):
            draft = torch.tensor([[0.0, 0.0, low]], dtype=torch.float64)
            # p is above q at token 0 alone
            target = torch.tensor([[4 * math.exp(low), 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
            self.same(impl, (target, draft, [2], [0.5, 0.9]), 1.0, allowed, what=f", a draft logit of {low}")

    def test_one_allowed(self, impl):
        """one token allowed at a place: it is given, whatever was guessed"""
        allowed = torch.zeros(4, 8, dtype=torch.bool)
        allowed[torch.arange(4), torch.tensor([3, 1, 4, 1])] = True
        for seed in range(10):
            case = self.case(seed=seed)
            self.same(impl, case, 1.0, allowed, what=f", case {seed}")
            self.same(impl, (*case[:2], [3, 1, 4], case[3]), 1.0, allowed, what=f", guessed, case {seed}")

    def test_nothing_left(self, impl):
        """the guess is not allowed, and p is above q nowhere: drawn from p"""
        target, draft = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, -60.0]])
        allowed = torch.tensor([[True, False, False], [True, True, True]])
        for v in (0.1, 0.9):
            self.same(impl, (target, draft, [1], [0.4, v]), 1.0, allowed, what=", one token allowed")
        same = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
        self.same(impl, (same, torch.zeros(1, 3), [2], [0.99999, 0.5]), what=", p = q")
        every, least = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[0.0, 0.0, -800.0], [0.0, 0.0, 0.0]])
        for v in (0.1, 0.9):  # exp(-800) is 0 in fp64: the guess has p = q = 0, and p equals q elsewhere
            self.same(impl, (least, least[:1].clone(), [2], [0.5, v]), 1.0, every, what=f", p = q = 0, uniform {v}")

    def test_none(self, impl):
        """k = 0: one draw from the model"""
        for seed in range(10):
            self.same(impl, self.case(k=0, seed=seed), 0.8, what=f", case {seed}")
            allowed = torch.arange(8)[None] % 4 == seed % 4
            for temperature in (0.8, 0.0):
                case = self.case(k=0, seed=seed)
                self.same(impl, case, temperature, allowed, what=f", a mask, temperature {temperature}, case {seed}")

    def test_forms(self, impl):
        """bf16, fp16 and fp64 logits, any strides, large ones"""
        for seed in range(12):
            target, draft, guesses, uniforms = self.case(seed=seed)
            for dtype in (torch.bfloat16, torch.float16, torch.float64):
                case = target.to(dtype), draft.to(dtype), guesses, uniforms
                self.same(impl, case, 0.7, what=f", {dtype}, case {seed}")
            self.same(impl, (apart(target), draft.T.contiguous().T, guesses, uniforms), 1.3, what=", views")
            self.same(impl, (target + 5e3, draft - 5e3, guesses, uniforms), 1.0, what=", logits of thousands")


# ---- 14.8


def acceptance_of(log):
    places = max([d for d, _, _ in log], default=0)
    by_place, judged, right = [], 0, 0
    for j in range(places):
        looked = [a > j for d, a, _ in log if d > j and a >= j]
        by_place.append(sum(looked) / len(looked) if looked else None)
        judged, right = judged + len(looked), right + sum(looked)
    drafted = sum(d for d, _, _ in log)
    return {
        "by_place": by_place,
        "alpha": right / judged if judged else None,
        "drafted": right / drafted if drafted else None,
        "tau": sum(g for _, _, g in log) / len(log) if log else None,
    }


@exercise("14.8", "acceptance")
class TestAcceptance:
    KEYS = "by_place", "alpha", "drafted", "tau"

    def same(self, impl, log, only=KEYS):
        before = list(log)
        got = impl(log)
        expect(isinstance(got, dict), f"expected a dictionary\n  got {type(got).__name__}")
        expect_equal("keys", sorted(got), sorted(self.KEYS))
        for key, expected in acceptance_of(before).items():
            if key in only:
                self.close(f"{key}, log {before}", got[key], expected)
        expect_equal("log, afterwards", list(log), before)

    def close(self, what, got, expected):
        if isinstance(expected, list):
            expect(isinstance(got, list | tuple), f"{what}: expected a list\n  got {got!r}")
            expect_equal(f"{what}: length", len(got), len(expected))
            for j, (g, e) in enumerate(zip(got, expected, strict=True)):
                self.close(f"{what}, place {j}", g, e)
        elif expected is None:
            expect(got is None, f"{what}: expected None\n  got {got!r}")
        else:
            expect(got is not None, f"{what}: expected {expected}\n  got None")
            expect_close(what, got, expected, 0, 1e-9)

    def test_place(self, impl):
        """by place: of those judged; what stands behind a wrong one is not"""
        self.same(impl, [(4, 2, 3), (4, 0, 1), (4, 4, 5), (4, 1, 2)], ("by_place",))
        self.same(impl, [(3, 3, 4), (3, 3, 4)], ("by_place",))

    def test_alpha(self, impl):
        """alpha: of all guesses judged"""
        self.same(impl, [(4, 2, 3), (4, 0, 1), (4, 4, 5)], ("alpha",))
        self.same(impl, [(8, 8, 9)], ("alpha",))
        self.same(impl, [(8, 0, 1)], ("alpha",))

    def test_drafted(self, impl):
        """drafted: of all guesses, judged or not"""
        self.same(impl, [(4, 2, 3), (8, 0, 1), (2, 2, 3)], ("drafted",))

    def test_tau(self, impl):
        """tau: tokens given a step, steps without guesses too, and the last step's may be fewer"""
        self.same(impl, [(4, 2, 3), (0, 0, 1), (4, 4, 2)], ("tau",))
        self.same(impl, [(0, 0, 1), (0, 0, 1), (0, 0, 1), (2, 2, 3)], ("tau",))

    def test_lengths(self, impl):
        """steps check different numbers of guesses"""
        self.same(impl, [(1, 1, 2), (4, 1, 2), (2, 2, 3), (0, 0, 1), (3, 0, 1)])
        self.same(impl, [(1, 1, 2), (5, 5, 6)])
        self.same(impl, [(5, 5, 6), (1, 0, 1)])
        self.same(impl, [(2, 2, 3), (2, 2, 3), (7, 2, 3)])

    def test_nothing(self, impl):
        """a share of nothing is None: no steps, no guesses, a place that nobody reached"""
        self.same(impl, [])
        self.same(impl, [(0, 0, 1), (0, 0, 1)])
        self.same(impl, [(5, 1, 2), (5, 0, 1)])
        self.same(impl, [(5, 0, 1)])

    def test_cut(self, impl):
        """a request that ends: its guesses were judged, though it got fewer tokens"""
        self.same(impl, [(4, 4, 2), (4, 3, 1), (4, 0, 1)])

    def test_random(self, impl):
        """many logs"""
        draw = random.Random(6)
        for _ in range(40):
            log = []
            for _ in range(draw.randint(1, 30)):
                drafted = draw.randint(0, 6)
                accepted = draw.randint(0, drafted)
                log.append((drafted, accepted, accepted + 1 if draw.random() < 0.9 else draw.randint(1, accepted + 1)))
            self.same(impl, log)
        self.same(impl, [(20, 17, 18), (12, 12, 13), (20, 20, 21), (20, 9, 10)])
        self.same(impl, [(300, 299, 300), (7, 1, 2)])
        self.same(impl, tuple((8, 8 if i % 3 else 2, 9 if i % 3 else 3) for i in range(500)))

    def test_errors(self, impl):
        """entries that cannot be are a ValueError, wherever they stand"""
        for bad in ((3, 4, 5), (3, 4, 4), (0, 1, 1), (3, -1, 1), (3, 2, 4), (3, 2, 0), (0, 0, 0), (0, 0, 2), (-1, 0, 1),
                    (2, 1, -1)):  # fmt: skip
            for log in ([bad], [(2, 1, 2), bad], [bad, (2, 1, 2)]):
                expect_raises(ValueError, lambda x=log: impl(x), f"log {log}")
