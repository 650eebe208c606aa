"""The contracts of the exercises of chapter 2."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.learn.testing import ContractError, exercise, expect, expect_close, expect_equal, expect_parts


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensor(what: str, got: Any) -> torch.Tensor:
    """`got`, which must be a tensor."""
    came = "nothing (is a `return` missing?)" if got is None else f"{type(got).__name__}"
    expect(isinstance(got, torch.Tensor), f"{what}: expected a tensor\n{'':{len(what)}}  got      {came}")
    return got


def expect_untouched(call: Any, **inputs: torch.Tensor) -> None:
    """Hold that `call()` leaves the tensors as they are."""
    copies = {name: x.clone() for name, x in inputs.items()}
    tensor("output", call())
    for name, x in inputs.items():
        expect_close(f"{name} after the call", x, copies[name], atol=0, rtol=0)


def expect_new(what: str, got: torch.Tensor, **others: torch.Tensor) -> None:
    """Hold that `got` has memory of its own."""
    for name, x in others.items():
        shared = x.numel() and got.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        expect(not shared, f"{what}: expected a new tensor\n{'':{len(what)}}  got      the memory of {name}")


class Forbidden(TorchFunctionMode):
    """While it is on, calling torch's functions of these names breaks the contract, however they were imported."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", "")
        expect(name not in self.names, f"write it out: `{name}` was called")
        return function(*args, **(kwargs or {}))


def exact(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers of fp64 that fp32 does not have."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HALF_STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20, torch.float64: 2.0**-20}


def softmax_average(scores: list[float], values: list[list[float]], size: int) -> list[float]:
    """The weighted average of attention, in plain Python; zeros where nothing is seen."""
    weights = [math.exp(s - max(scores)) for s in scores]
    return [
        sum(w * value[i] for w, value in zip(weights, values, strict=True)) / sum(weights or [1]) for i in range(size)
    ]


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention query by query.  q [T, D], k [S, D], v [S, D_v], mask [T, S]"""
    rows = []
    for t in range(q.shape[0]):
        seen = [s for s in range(k.shape[0]) if mask[t, s]]
        scores = [float(q[t].double() @ k[s].double()) * q.shape[1] ** -0.5 for s in seen]
        rows.append(softmax_average(scores, [v[s].tolist() for s in seen], v.shape[1]))
    return torch.tensor(rows, dtype=torch.float64)


def causal(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


@exercise("2.w1", "is_exact")
class TestIsExact:
    def _is(self, impl, a: int, b: int, dtype: torch.dtype, expected: bool) -> None:
        got = impl(a, b, dtype)
        what = f"{a:,} · {b:,} in {str(dtype).removeprefix('torch.')}"
        said = (
            f"{what}: expected True or False\n  got      a {type(got).__name__}: `.item()` makes a number of a tensor"
        )
        expect(isinstance(got, bool), said)
        expect_equal(what, got, expected)

    def test_range(self, impl):
        """300 · 300 is beyond fp16's 65,504 and becomes infinite; 255 · 256 is within; bf16 rounds 300 · 300"""
        self._is(impl, 300, 300, torch.float16, False)
        self._is(impl, 255, 256, torch.float16, True)
        self._is(impl, 256, 256, torch.float16, False)
        self._is(impl, 300, 300, torch.bfloat16, False)

    def test_precision(self, impl):
        """257 is 256 in bf16, 2,049 is 2,048 in fp16; 256 and 2,048 are themselves, and 258 is"""
        for number, dtype, expected in [
            (257, torch.bfloat16, False),
            (256, torch.bfloat16, True),
            (258, torch.bfloat16, True),
            (2049, torch.float16, False),
            (2048, torch.float16, True),
            (257, torch.float16, True),
            (2**24 + 1, torch.float32, False),
            (2**24, torch.float32, True),
        ]:
            self._is(impl, number, 1, dtype, expected)
            self._is(impl, 1, number, dtype, expected)

    def test_product(self, impl):
        """the product counts, not only the factors: 17 · 17 = 289 in bf16, and 16 · 512 in it; signs do not matter"""
        self._is(impl, 17, 17, torch.bfloat16, False)
        self._is(impl, 16, 512, torch.bfloat16, True)
        self._is(impl, -17, 17, torch.bfloat16, False)
        self._is(impl, -3, 5, torch.bfloat16, True)
        self._is(impl, 257, 0, torch.bfloat16, True)

    def test_wide(self, impl):
        """fp64 has 53 bits, and Python's float no more: compare with Python's integer"""
        self._is(impl, 2**27 + 1, 2**27 + 1, torch.float64, False)
        self._is(impl, 2**26 + 1, 2**26 - 1, torch.float64, True)
        self._is(impl, 2**30 + 1, 2**30 - 1, torch.float64, False)
        self._is(impl, 70_000, 0, torch.float32, True)


@exercise("2.w2", "visible")
class TestVisible:
    REAL = ((True, True, True, True), (False, True, True, False), (True, False, True, True))

    def _mask(self, impl, real: torch.Tensor) -> torch.Tensor:
        got, (batch, size) = tensor("mask", impl(real)), real.shape
        expect_equal(f"shape for [{batch}, {size}]", tuple(got.shape), (batch, 1, size, size))
        expect_equal("dtype", got.dtype, torch.bool)
        return got

    def test_shape(self, impl):
        """[B, S] becomes a boolean [B, 1, S, S], also for one sequence, one token"""
        for batch, size in ((3, 4), (1, 4), (3, 1), (1, 1)):
            self._mask(impl, torch.ones(batch, size, dtype=torch.bool))

    def test_one_sequence(self, impl):
        """without padding: query t sees keys 0 to t"""
        got = self._mask(impl, torch.ones(1, 4, dtype=torch.bool))
        expect_equal("mask", got[0, 0].int().tolist(), causal(4).int().tolist())

    def test_padding(self, impl):
        """padding hides keys, each sequence its own: a key that is padding is seen by nobody, a query may be padding"""
        got = self._mask(impl, torch.tensor(self.REAL))
        for b, real in enumerate(self.REAL):
            expected = [[int(s <= t and real[s]) for s in range(4)] for t in range(4)]
            expect_equal(
                f"mask of a sequence with text at {[int(r) for r in real]}", got[b, 0].int().tolist(), expected
            )

    def test_views(self, impl):
        """real transposed, or every second token of a longer one: not contiguous"""
        real = torch.tensor(self.REAL)
        expected = self._mask(impl, real)
        expect(bool(torch.equal(self._mask(impl, real.T.contiguous().T), expected)), "transposed: another mask came")
        spread = real.repeat_interleave(2, 1)[:, ::2]
        expect(bool(torch.equal(self._mask(impl, spread), expected)), "every second token: another mask came")

    def test_large(self, impl):
        """70 tokens, nine sequences, one of them all padding, one all text"""
        real = random(9, 70) > 0
        real[3], real[5] = False, True
        got, t = self._mask(impl, real), torch.arange(70)
        expected = (t <= t[:, None]) & real[:, None, None]
        expect(bool(torch.equal(got, expected)), "the mask of 70 tokens is another one: are all sequences in it?")

    def test_scores(self, impl):
        """it broadcasts against scores [B, H, T, S]"""
        got = self._mask(impl, torch.tensor(self.REAL))
        out = torch.zeros(3, 5, 4, 4).masked_fill(~got, 1.0)
        expect_equal("shape of the masked scores", tuple(out.shape), (3, 5, 4, 4))
        expect_close("head 4 against head 0", out[:, 4], out[:, 0])

    def test_inputs_untouched(self, impl):
        """real is as before the call"""
        real = torch.tensor(self.REAL)
        expect_untouched(lambda: impl(real), real=real)


@exercise("2.w3", "group_heads")
class TestGroupHeads:
    def test_numbers(self, impl):
        """six query heads and two key/value heads: heads 0, 1, 2 are group 0, and 3, 4, 5 are group 1"""
        q = torch.arange(6.0)[None, :, None, None]  # a head holds its number
        got = tensor("result", impl(q, 2))
        expect_equal("shape", tuple(got.shape), (1, 2, 3, 1, 1))
        expect_equal("heads of the groups", got.flatten().reshape(2, 3).tolist(), [[0, 1, 2], [3, 4, 5]])

    def test_three_groups(self, impl):
        """and with three: 0, 1 | 2, 3 | 4, 5"""
        got = tensor("result", impl(torch.arange(6.0)[None, :, None, None], 3))
        expect_equal("shape", tuple(got.shape), (1, 3, 2, 1, 1))
        expect_equal("heads of the groups", got.flatten().reshape(3, 2).tolist(), [[0, 1], [2, 3], [4, 5]])

    def test_rest(self, impl):
        """batch, tokens and features stay where they are; one group, and as many as heads"""
        q = random(2, 6, 5, 4)
        for kv_heads in (2, 1, 6):
            got = tensor("result", impl(q, kv_heads))
            expected = [[q[:, i * (6 // kv_heads) + j] for j in range(6 // kv_heads)] for i in range(kv_heads)]
            expected = torch.stack([torch.stack(group, 1) for group in expected], 1)
            expect_close(f"result for q {list(q.shape)}, {kv_heads} key/value heads", got, expected)

    def test_transposed(self, impl):
        """q as projections leave it, [B, T, H, D] transposed: it is not contiguous"""
        q = random(2, 5, 6, 4).transpose(1, 2)
        got = tensor("result", impl(q, 2))
        expect_equal("shape", tuple(got.shape), (2, 2, 3, 5, 4))
        expect_close("query head 4", got[:, 1, 1], q[:, 4])

    def test_sizes(self, impl):
        """other numbers of heads, groups as many as their members, one token"""
        for heads, kv_heads, batch, count in ((4, 2, 3, 5), (9, 3, 1, 9), (32, 8, 2, 3), (12, 2, 5, 1)):
            q = random(batch, heads, count, 4)
            got = tensor("result", impl(q, kv_heads))
            expect_equal("shape", tuple(got.shape), (batch, kv_heads, heads // kv_heads, count, 4))
            expect_close(f"all of {heads} heads in {kv_heads} groups, one after the other", got.flatten(1, 2), q)

    def test_views_and_dtypes(self, impl):
        """other strides, where heads are a part of more, and other dtypes, which stay"""
        for dtype in (torch.float64, torch.bfloat16):
            for q in (random(5, 4, 6, 2).permute(3, 2, 0, 1).to(dtype), random(2, 12, 5, 4).to(dtype)[:, ::2]):
                for kv_heads in (1, 3, 6):
                    got = tensor("result", impl(q, kv_heads))
                    expect_equal("shape", tuple(got.shape), (2, kv_heads, 6 // kv_heads, 5, 4))
                    expect_equal("dtype", got.dtype, dtype)
                    expect_close("all heads, one after the other", got.flatten(1, 2), q, atol=0, rtol=0)

    def test_inputs_untouched(self, impl):
        """q is as before the call"""
        q = random(1, 6, 2, 3)
        expect_untouched(lambda: impl(q, 3), q=q)


def attention_case(batch=2, tokens=5, d_model=6, heads=3, size=4, seed=0) -> tuple:
    """x and the four matrices; heads · size is not d_model."""
    x = 2 * random(batch, tokens, d_model, seed=seed)
    w_q, w_k, w_v = (random(heads * size, d_model, seed=seed + i) for i in (1, 2, 3))
    return x, w_q, w_k, w_v, random(d_model, heads * size, seed=seed + 4)


def self_attention_reference(x, w_q, w_k, w_v, w_o, heads) -> torch.Tensor:
    """Sequence by sequence, head by head, query by query."""
    size, out = w_q.shape[0] // heads, []
    for sequence in x.double():
        parts = []
        for h in range(heads):
            q, k, v = (sequence @ w[h * size : (h + 1) * size].double().T for w in (w_q, w_k, w_v))
            parts.append(plain_attention(q, k, v, causal(len(sequence))))
        out.append(torch.cat(parts, -1) @ w_o.double().T)
    return torch.stack(out)


@exercise("2.0", "self_attention")
class TestSelfAttention:
    def _output(self, impl, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        got = tensor("output", impl(x, *rest))
        expect_equal("output shape", tuple(got.shape), tuple(x.shape))
        return got

    def test_one_token(self, impl):
        """one token attends to itself alone: the output is x W_v^T W_o^T"""
        x, w_q, w_k, w_v, w_o = attention_case(tokens=1)
        expect_close("output", self._output(impl, x, w_q, w_k, w_v, w_o, 3), x @ w_v.T @ w_o.T, atol=1e-4)

    def test_one_head(self, impl):
        """one head: softmax(q k^T / sqrt(D)) v for every token and those before it"""
        case = attention_case(heads=1)
        expect_close("output", self._output(impl, *case, 1), self_attention_reference(*case, 1), atol=1e-4)

    def test_heads(self, impl):
        """three heads of four features: each attends by itself, and they stand side by side in their order"""
        case = attention_case()
        expect_close("output", self._output(impl, *case, 3), self_attention_reference(*case, 3), atol=1e-4)
        case = attention_case(heads=2, size=6, d_model=12)
        expect_close(
            "output for H · D = d_model", self._output(impl, *case, 2), self_attention_reference(*case, 2), atol=1e-4
        )

    def test_causal(self, impl):
        """another last token changes no output but the last"""
        case = attention_case()
        before = self._output(impl, *case, 3)
        x = case[0].clone()
        x[:, -1] = 5
        after = self._output(impl, x, *case[1:], 3)
        expect_close("outputs before the last token", after[:, :-1], before[:, :-1])
        expect(not torch.allclose(after[:, -1], before[:, -1]), "the last token changed, and its output did not")

    def test_extreme(self, impl):
        """visible scores near -1e30, and a later token with a score of 1e30: it has the weight 0 all the same"""
        one = torch.ones(1, 1)
        x = torch.tensor([[[1.0, 1.0], [1.0, 2.0], [0.0, 100.0]]])  # feature 0 makes scores, feature 1 is the value
        w_q, w_k = torch.tensor([[1e20, 0.0]]), torch.tensor([[-1e10, 0.0]])
        w_v, w_o = torch.tensor([[0.0, 1.0]]), torch.cat((0 * one, one))
        got = self._output(impl, x, w_q, w_k, w_v, w_o, 1)
        expect_close("outputs of tokens 0 and 1, visible scores -1e30", got[0, :2, 1], [1.0, 1.5], atol=1e-4)
        got = self._output(impl, torch.tensor([[[1.0, 1.0], [-1.0, 2.0]]]), w_q, w_k, w_v, w_o, 1)
        expect_close("output of token 0, score of the next one 1e30", got[0, 0, 1], 1.0)

    def test_batch(self, impl):
        """each sequence by itself, and a batch of one"""
        case = attention_case(batch=3)
        whole = self._output(impl, *case, 3)
        expect_equal("shape", tuple(whole.shape), (3, 5, 6))
        expect_close("sequence 1 alone", self._output(impl, case[0][1:2], *case[1:], 3), whole[1:2], atol=1e-5)

    def test_dtypes(self, impl):
        """the output has the dtype of x and the matrices: fp64 to its digits, and bf16"""
        case = [t.double() for t in attention_case()]
        got = self._output(impl, *case, 3)
        expect_equal("dtype for fp64", got.dtype, torch.float64)
        expect_close("output in fp64", got, self_attention_reference(*case, 3), atol=1e-10, rtol=1e-10)
        got = self._output(impl, *(t.bfloat16() for t in case), 3)
        expect_equal("dtype for bf16", got.dtype, torch.bfloat16)

    def test_sizes(self, impl):
        """70 tokens, six sequences, d_model = H · D and not, features of 1e4, fp64 to its digits"""
        for d_model, heads, size, scale in ((6, 2, 3, 1.0), (5, 3, 2, 1.0), (4, 1, 4, 1e4), (8, 8, 2, 1.0)):
            x, w_q, w_k, w_v = scale * exact(6, 70, d_model), *(exact(heads * size, d_model, seed=i) for i in (1, 2, 3))
            w_o = exact(d_model, heads * size, seed=4)
            q, k, v = ((x @ w.T).reshape(6, 70, heads, size).transpose(1, 2) for w in (w_q, w_k, w_v))
            weights = (q @ k.mT * size**-0.5).masked_fill(~causal(70), -math.inf).softmax(-1)
            expected = (weights @ v).transpose(1, 2).reshape(6, 70, heads * size) @ w_o.T
            got = self._output(impl, x, w_q, w_k, w_v, w_o, heads)
            expect_close(f"output of 70 tokens, {heads} heads of {size}", got, expected, atol=1e-9 * scale, rtol=1e-9)

    def test_views(self, impl):
        """x transposed and matrices that are parts of a larger one, not contiguous"""
        x, w_q, w_k, w_v, w_o = attention_case()
        views = [x.transpose(0, 1).contiguous().transpose(0, 1), *(w.T.contiguous().T for w in (w_q, w_k, w_v, w_o))]
        expect_close(
            "output", self._output(impl, *views, 3), self_attention_reference(x, w_q, w_k, w_v, w_o, 3), atol=1e-4
        )

    def test_written_out(self, impl):
        """it is written out: neither F.scaled_dot_product_attention nor nn.MultiheadAttention is called"""
        with Forbidden("scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention"):
            self._output(impl, *attention_case(d_model=12, heads=3, size=4), 3)
            self._output(impl, *attention_case(tokens=1), 3)
            self._output(impl, *(t.double() for t in attention_case(batch=1, heads=1)), 1)

    def test_inputs_untouched(self, impl):
        """x and the matrices are as before the call"""
        case = attention_case()
        names = ("x", "w_q", "w_k", "w_v", "w_o")
        expect_untouched(lambda: impl(*case, 3), **dict(zip(names, case, strict=True)))
        case = [t.double() for t in attention_case(batch=1, tokens=1, d_model=12)]
        expect_untouched(lambda: impl(*case, 3), **dict(zip(names, case, strict=True)))


@exercise("2.1", "attention")
class TestAttention:
    def test_by_hand(self, impl):
        """two keys with scores 0 and ln 3 (D = 4, so dot products 0 and 2 ln 3) get the weights 1/4 and 3/4"""
        q = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
        k = torch.tensor([[0.0, 1.0, 0.0, 0.0], [math.log(3), 0.0, 0.0, 0.0]])
        v = torch.tensor([[4.0, 0.0], [0.0, 8.0]])
        expect_close("output", impl(q, k, v), [[1.0, 6.0]])

    def test_random(self, impl):
        """it equals a loop over queries and keys, also where T, S, D and D_v all differ"""
        q, k, v = random(3, 8), random(5, 8, seed=1), random(5, 6, seed=2)
        expect_close("output", impl(q, k, v), plain_attention(q, k, v, torch.ones(3, 5, dtype=torch.bool)))

    def test_mask(self, impl):
        """a False in the mask takes the key out: the rest shares the whole weight"""
        q, k, v = random(4, 8), random(4, 8, seed=1), random(4, 8, seed=2)
        expect_close("output under a causal mask", impl(q, k, v, causal(4)), plain_attention(q, k, v, causal(4)))

    def test_masked_is_gone(self, impl):
        """masked weights are exactly 0: a huge score there, positive or negative, changes nothing"""
        q, v = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [1e6], [3.0]])
        mask = torch.tensor([[True, False, True]])
        for size in (1e4, -1e4, 1e10, -1e10):
            k = torch.tensor([[0.5, 0.5], [size, size], [0.5, 0.5]])
            expect_close(f"output with a masked score of {2 * size / 2**0.5:,.0f}", impl(q, k, v, mask), [[2.0]])

    def test_far_apart(self, impl):
        """visible scores near 200, -200, -20,000, -1e10 in rows side by side: each hides its masked key completely"""
        q = torch.tensor([[200.0], [-200.0], [-20_000.0], [-1e10], [-1e30]])
        k, v = torch.tensor([[1.0], [0.0], [1.0]]), torch.tensor([[1.0], [1e3], [3.0]])
        mask = torch.tensor([[True, False, True]])
        expect_close("output", impl(q, k, v, mask), [[2.0]] * 5)

    def test_empty_rows(self, impl):
        """a row that may see nothing gives 0, and the other rows do not notice"""
        q, k, v = random(2, 4, 8), random(2, 4, 8, seed=1), random(2, 4, 8, seed=2)
        padding = torch.tensor([[False, False, True, True], [True, True, True, True]])
        mask = causal(4) & padding[:, None, :]  # [2, 4, 4]: rows 0 and 1 of sequence 0 see nothing
        got = tensor("output", impl(q, k, v, mask))
        for b in range(2):
            expected = plain_attention(q[b], k[b], v[b], mask[b])
            expect_close(f"sequence {b}, keys 0 and 1 {'hidden' if b == 0 else 'visible'}", got[b], expected)
        nothing = torch.zeros(4, dtype=torch.bool)
        expect_close("output where every key is hidden", impl(q, k, v, nothing), torch.zeros(2, 4, 8))

    def test_window(self, impl):
        """with window = 3, query t sees keys t - 2, t - 1 and t; with 1 only its own; with 9 of 6 all up to its own"""
        q, k, v = random(6, 8), random(6, 8, seed=1), random(6, 8, seed=2)
        for window in (3, 1, 9):
            seen = torch.tensor([[t - window < s <= t for s in range(6)] for t in range(6)])
            expect_close(f"output with window = {window}", impl(q, k, v, None, window), plain_attention(q, k, v, seen))

    def test_window_and_mask(self, impl):
        """mask and window together: a pair must be allowed by both, and where none is left the row is 0"""
        q, k, v = random(6, 8), random(6, 8, seed=1), random(6, 8, seed=2)
        visible = torch.tensor([True, False, False, False, True, True])  # key 0, then 4 and 5
        seen = torch.tensor([[t - 2 < s <= t and bool(visible[s]) for s in range(6)] for t in range(6)])
        got = impl(q, k, v, visible, 2)
        expect_close("output with window = 2, keys 1, 2, 3 masked", got, plain_attention(q, k, v, seen))

    def test_leading_dimensions(self, impl):
        """[B, H, T, D] works, each head by itself; masks [T, S], [B, 1, 1, S], [S], [T, 1] and [] serve all heads"""
        q, k, v = random(2, 3, 4, 8), random(2, 3, 4, 8, seed=1), random(2, 3, 4, 8, seed=2)
        padding = torch.tensor([[True, False, True, True], [False, True, True, False]])[:, None, None, :]
        some = torch.tensor([True, False, True, True])
        for name, mask in (
            ("[T, S]", causal(4)),
            ("[B, 1, 1, S]", padding),
            ("[S]", some),
            ("[T, 1]", some[:, None]),
            ("[]", some[0]),
        ):
            got = tensor("output", impl(q, k, v, mask))
            expect_equal(f"output shape with a mask {name}", tuple(got.shape), (2, 3, 4, 8))
            expected = plain_attention(q[1, 2], k[1, 2], v[1, 2], mask.expand(2, 3, 4, 4)[1, 2])
            expect_close(f"batch 1, head 2 with a mask {name}", got[1, 2], expected)

    def test_window_of_heads(self, impl):
        """a window and a padding mask [B, 1, 1, S] for heads of a batch, where D_v is not D"""
        q, k, v = random(2, 3, 5, 8), random(2, 3, 5, 8, seed=1), random(2, 3, 5, 6, seed=2)
        real = torch.tensor([[True] * 5, [False, False, True, True, True]])
        seen = torch.tensor([[t - 2 < s <= t for s in range(5)] for t in range(5)])
        got = tensor("output", impl(q, k, v, real[:, None, None, :], 2))
        expect_equal("output shape", tuple(got.shape), (2, 3, 5, 6))
        for b in range(2):
            expect_close(f"sequence {b}, head 1", got[b, 1], plain_attention(q[b, 1], k[b, 1], v[b, 1], seen & real[b]))

    def test_sizes(self, impl):
        """30 tokens of five sequences in fp64, windows, T and S that differ, masks with and without heads"""
        for t, s, window, shape in (
            (30, 30, 0, (5, 1, 30, 30)),
            (30, 30, 7, (2, 30, 30)),
            (30, 30, 1, (5, 2, 1, 30)),
            (12, 40, 0, (2, 12, 40)),
            (1, 40, 0, (5, 1, 1, 40)),
            (30, 30, 12, ()),
        ):
            q, k, v = exact(5, 2, t, 4), exact(5, 2, s, 4, seed=1), exact(5, 2, s, 3, seed=2)
            mask = exact(*shape, seed=3) > -0.5
            back = torch.arange(t)[:, None] - torch.arange(s)
            seen = mask & ((back >= 0) & (back < window)) if window else mask.expand(5, 2, t, s)
            weights = (q @ k.mT / 2).masked_fill(~seen, -math.inf).softmax(-1).nan_to_num()
            got = tensor("output", impl(q, k, v, mask, window))
            what = f"output for T = {t}, S = {s}, window = {window}, mask {list(shape)}"
            expect_close(what, got, weights @ v, atol=1e-10, rtol=1e-10)

    def test_views_and_dtypes(self, impl):
        """q, k, v as a projection leaves them, not contiguous; fp64 for fp64, to its digits, and bf16 for bf16"""
        q, k, v = (random(2, 4, 3, 8, seed=i).double().transpose(1, 2) for i in range(3))
        got = tensor("output", impl(q, k, v, causal(4)))
        expect_equal("dtype for fp64", got.dtype, torch.float64)
        weights = (q @ k.mT / 8**0.5).masked_fill(~causal(4), -math.inf).softmax(-1)
        expect_close("output in fp64", got, weights @ v, atol=1e-12, rtol=1e-12)
        got = tensor("output", impl(*(x.bfloat16() for x in (q, k, v)), causal(4), 2))
        expect_equal("dtype for bf16", got.dtype, torch.bfloat16)

    def test_written_out(self, impl):
        """it is written out: F.scaled_dot_product_attention is not called"""
        with Forbidden("scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention"):
            tensor("output", impl(random(3, 4), random(3, 4), random(3, 4), causal(3)))
            tensor("output", impl(random(3, 4), random(3, 4), random(3, 4)))

    def test_inputs_untouched(self, impl):
        """q, k, v and mask are as before the call"""
        q, k, v, mask = random(3, 4), random(3, 4, seed=1), random(3, 4, seed=2), torch.ones(3, 3, dtype=torch.bool)
        expect_untouched(lambda: impl(q, k, v, mask, 2), q=q, k=k, v=v, mask=mask)


def norm_of(stream: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm in fp64."""
    stream = stream.double()
    return stream / (stream.square().sum(-1, keepdim=True) / stream.shape[-1] + eps).sqrt() * weight.double()


@exercise("2.2", "add_rms_norm")
class TestAddRMSNorm:
    def _parts(self, impl, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        normed, stream = expect_parts(impl(*arguments), "normed", "new_residual")
        return tensor("normed", normed), tensor("new_residual", stream)

    def test_by_hand(self, impl):
        """[1, 3] + [0, 4] = [1, 7] has root mean square 5: normed is [0.2, 1.4], times the weight"""
        x, residual, weight = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 4.0]), torch.tensor([1.0, 10.0])
        normed, stream = self._parts(impl, x, residual, weight, 0.0)
        expect_close("new_residual", stream, [1.0, 7.0])
        expect_close("normed", normed, [0.2, 14.0])

    def test_random(self, impl):
        """each vector of the last dimension is normalized by itself; no mean is subtracted"""
        x, residual, weight = random(2, 3, 8), 3 * random(2, 3, 8, seed=1) + 1, random(8, seed=2)
        normed, stream = self._parts(impl, x, residual, weight, 1e-5)
        expect_close("new_residual", stream, x + residual)
        expect_close("normed", normed, norm_of(x + residual, weight, 1e-5))

    def test_eps(self, impl):
        """eps is added to the mean of squares, under the root"""
        x, residual, weight = torch.full((4,), 0.1), torch.full((4,), 0.2), torch.ones(4)
        expect_close("normed for a sum of 0.3, eps = 0.16", self._parts(impl, x, residual, weight, 0.16)[0], [0.6] * 4)
        normed = self._parts(impl, x, -x, weight, 1e-5)[0]
        expect_close("normed for a sum of 0, eps = 1e-05", normed, torch.zeros(4))

    def test_default_eps(self, impl):
        """eps is 1e-5 if it is not given"""
        x = torch.full((4,), 0.001)
        normed, _ = expect_parts(impl(x, torch.zeros(4), torch.ones(4)), "normed", "new_residual")
        expect_close("normed for a sum of 0.001", normed, norm_of(x, torch.ones(4), 1e-5))

    def test_dtypes(self, impl):
        """both results have the dtype of x: fp32, fp16, bf16"""
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x, residual, weight = (random(*s, seed=i).to(dtype) for i, s in enumerate([(3, 16), (3, 16), (16,)]))
            normed, stream = self._parts(impl, x, residual, weight, 1e-5)
            expect_equal(f"dtype of normed for {dtype}", normed.dtype, dtype)
            expect_equal(f"dtype of new_residual for {dtype}", stream.dtype, dtype)
            expect_close(f"new_residual in {dtype}", stream, (x.double() + residual.double()).to(dtype), rtol=0, atol=0)
            expect_close(f"normed in {dtype}", normed, norm_of(stream, weight, 1e-5), rtol=1e-2, atol=1e-4)
        x, residual, weight = (random(*s, seed=i).double() for i, s in enumerate([(3, 16), (3, 16), (16,)]))
        normed, stream = self._parts(impl, x + 1e-12, residual, weight, 1e-5)
        expect_equal("dtypes for fp64", [normed.dtype, stream.dtype], [torch.float64] * 2)
        expect_close("new_residual in fp64", stream, x + 1e-12 + residual, rtol=0, atol=0)

    def test_fp16_range(self, impl):
        """squares beyond fp16's 65,504 do not overflow: entries of 300, and one of 22,544 as in SmolLM2's stream"""
        half = {"dtype": torch.float16}
        x, residual = torch.tensor([100.0, -100.0, 100.0, -100.0], **half), torch.tensor([200.0, -200.0] * 2, **half)
        normed = self._parts(impl, x, residual, torch.ones(4, **half), 1e-5)[0]
        expect_close("normed for entries of 300 and -300", normed, [1.0, -1.0, 1.0, -1.0], atol=1e-3)
        x, residual = torch.zeros(576, **half), torch.ones(576, **half)
        x[0], residual[0] = 16, 22_528
        normed = self._parts(impl, x, residual, torch.ones(576, **half), 1e-5)[0]
        expect_close("normed for 22,544 among ones", normed, norm_of(x + residual, torch.ones(576), 1e-5), rtol=2e-3)

    def test_bf16_statistics(self, impl):
        """bf16, 128 vectors of 4,096 equal entries between 1 and 2: all become ones, since fp32 squares do not round"""
        entries = (1 + torch.arange(128) / 128).to(torch.bfloat16)  # every bf16 number from 1 up to 2
        x = entries[:, None].expand(128, 4096).contiguous()
        normed = self._parts(impl, x, torch.zeros_like(x), torch.ones(4096, dtype=torch.bfloat16), 0.0)[0]
        expect_close("normed", normed, torch.ones(128, 4096), atol=1e-3)

    def test_bf16_rounding(self, impl):
        """weight 1: normed is off by one rounding, half a step of bf16 or fp16, and no more: the quotient is fp32's"""
        for dtype in (torch.bfloat16, torch.float16):
            x, residual = random(64, 48).to(dtype), (3 * random(64, 48, seed=1)).to(dtype)
            ones = torch.ones(48, dtype=dtype)
            normed, stream = self._parts(impl, x, residual, ones, 1e-5)
            exact = norm_of(stream, ones, 1e-5)
            off = float(((normed.double() - exact).abs() / exact.abs().clamp(min=1e-3)).max())
            most = 1.01 * HALF_STEP[dtype]
            expect(
                off <= most,
                f"normed in {dtype}: expected values off by at most {most:.5f} of themselves, one rounding"
                f"\n  got      {off:.5f}: is the root, or the quotient, rounded on the way?",
            )

    def test_new_tensors(self, impl):
        """two new tensors: neither has the memory of an input or of the other, also where one is 0"""
        for x_scale, scale, shape in ((1, 1, (2, 4)), (1, 0, (2, 4)), (0, 1, (2, 4)), (0, 0, (4,)), (1, 1, (4,))):
            x, residual, weight = x_scale * random(*shape), scale * random(*shape, seed=1), torch.ones(4)
            normed, stream = self._parts(impl, x, residual, weight, 1e-5)
            expect_new("normed", normed, x=x, residual=residual, weight=weight, new_residual=stream)
            expect_new("new_residual", stream, x=x, residual=residual, weight=weight)

    def test_shapes(self, impl):
        """one feature, an empty batch, one vector, and tensors that are not contiguous"""
        for shape in ((3, 1), (0, 4), (4,), (1, 1, 4)):
            x, residual, weight = random(*shape), random(*shape, seed=1), random(shape[-1], seed=2)
            normed, stream = self._parts(impl, x, residual, weight, 1e-5)
            expect_close(f"new_residual {list(shape)}", stream, x + residual)
            expect_close(f"normed {list(shape)}", normed, norm_of(x + residual, weight, 1e-5))
        x, residual = random(8, 3).T, random(3, 16, seed=1)[:, ::2]
        normed, _ = self._parts(impl, x, residual, random(8, seed=2), 1e-5)
        expect_close("normed of views", normed, norm_of(x + residual, random(8, seed=2), 1e-5))

    def test_sizes(self, impl):
        """from 1 to 5,000 features, entries from 1e-4 to the largest that the dtype holds, weights of 0"""
        for dtype, large in ((torch.float32, 1e15), (torch.bfloat16, 1e15), (torch.float16, 25_000.0)):
            for size in (7, 19, 5000):
                for scale in (1e-3, 1.0, large / 8):
                    x, residual = (scale * random(3, size, seed=i).clamp(-4, 4) for i in (0, 1))
                    x, residual, weight = x.to(dtype), residual.to(dtype), random(size, seed=2).to(dtype)
                    weight[size // 2] = 0
                    normed, stream = self._parts(impl, x, residual, weight, 1e-5)
                    what = f"{size} features near {scale:g} in {dtype}"
                    expect_close(f"new_residual, {what}", stream, x + residual, atol=0, rtol=0)
                    step = 2.1 * HALF_STEP[dtype]
                    expect_close(f"normed, {what}", normed, norm_of(stream, weight, 1e-5), atol=1e-6, rtol=step)
            normed, _ = self._parts(impl, x, residual, torch.zeros(5000, dtype=dtype), 1e-5)
            expect_close("normed for a weight of 0", normed, torch.zeros(3, 5000), atol=0)

    def test_rounded_sum(self, impl):
        """norm and stream agree: the norm of new_residual + 0, in bf16, is the same to the bit"""
        x, residual = random(64, 32).bfloat16(), (20 * random(64, 32, seed=1)).bfloat16()
        weight = torch.ones(32, dtype=torch.bfloat16)
        normed, stream = self._parts(impl, x, residual, weight, 1e-5)
        again = self._parts(impl, torch.zeros_like(x), stream.clone(), weight, 1e-5)[0]
        expect_close("normed, against that of new_residual + 0", normed, again, atol=0, rtol=0)

    def test_written_out(self, impl):
        """it is written out: F.rms_norm is not called"""
        with Forbidden("rms_norm"):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                for shape in ((2, 4), (4,)):
                    self._parts(impl, random(*shape).to(dtype), random(*shape).to(dtype), torch.ones(4, dtype=dtype))

    def test_inputs_untouched(self, impl):
        """x, residual and weight are as before the call"""
        x, residual, weight = random(2, 4), random(2, 4, seed=1), random(4, seed=2)
        expect_untouched(lambda: self._parts(impl, x, residual, weight, 1e-5)[0], x=x, residual=residual, weight=weight)
        for x, residual in ((random(4), random(4, seed=1)), (random(4, 2).T, random(4, 2, seed=1).T)):
            weight = random(x.shape[-1], seed=2)
            call = lambda x=x, residual=residual, weight=weight: self._parts(impl, x, residual, weight)[0]  # noqa: E731
            expect_untouched(call, x=x, residual=residual, weight=weight)


def turned(x: torch.Tensor, positions: Any, rotary: int, theta: float) -> torch.Tensor:
    """Partial RoPE through complex numbers: pair i is one number, multiplied by e^(i·angle).  x [..., T, H, D]"""
    half = rotary // 2
    numbers = torch.complex(x[..., :half].double(), x[..., half:rotary].double())  # [..., T, H, rotary/2]
    angles = torch.tensor([theta ** (-2 * i / rotary) for i in range(half)], dtype=torch.float64)
    angles = torch.as_tensor(positions).double().unsqueeze(-1) * angles  # [..., T, rotary/2]
    numbers = numbers * torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
    return torch.cat((numbers.real, numbers.imag, x[..., rotary:].double()), dim=-1)


@exercise("2.3", "rope")
class TestRope:
    def test_quarter_turn(self, impl):
        """with D = rotary = 2 there is one pair of frequency 1: position p rotates (1, 0) to (cos p, sin p)"""
        x = torch.tensor([1.0, 0.0]).expand(1, 4, 1, 2).clone()
        expected = [[[[math.cos(p), math.sin(p)]] for p in range(4)]]
        expect_close("output", impl(x, torch.arange(4), 2, 10_000.0), expected)

    def test_whole_head(self, impl):
        """with rotary = D it equals multiplication by e^(i·angle), every token by its own position, for any theta"""
        x, positions = random(2, 4, 3, 8), [3, 0, 17, 40]
        many = random(1, 4, 40, 8, seed=1)
        got, expected = impl(many, torch.tensor(positions), 8), turned(many, positions, 8, 10_000.0)
        expect_close("output for 40 heads, rotary = D = 8", got, expected, atol=1e-5)
        for shape, theta in (((3, 1, 2, 8), 5e5), ((1, 70, 2, 8), 1e6), ((5, 9, 1, 8), 500_000.0), ((70, 2, 8), 1.5)):
            some, at = random(*shape), torch.arange(shape[-3]) * 7 - 50
            got, expected = impl(some, at, 4, theta), turned(some, at, 4, theta)
            expect_close(f"output for x {list(shape)}, theta = {theta:g}", got, expected, atol=1e-4)
        for theta in (10_000.0, 100.0):
            got, expected = impl(x, torch.tensor(positions), 8, theta), turned(x, positions, 8, theta)
            expect_close(f"output for rotary = D = 8, theta = {theta:g}", got, expected, atol=1e-5)

    def test_default_theta(self, impl):
        """theta is 10,000 if it is not given"""
        x = random(1, 4, 2, 8)
        expect_close("output", impl(x, torch.arange(4), 8), turned(x, torch.arange(4), 8, 10_000.0), atol=1e-5)

    def test_rest_passes(self, impl):
        """the features from `rotary` on are those of x"""
        x = random(2, 4, 3, 16)
        got = tensor("output", impl(x, torch.arange(4), 6, 10_000.0))
        expect_equal("output shape", tuple(got.shape), (2, 4, 3, 16))
        expect_close("features 6 to 15 for rotary = 6", got[..., 6:], x[..., 6:], atol=0, rtol=0)

    def test_partial(self, impl):
        """the first `rotary` features rotate: pairs are its halves, and the exponents count in `rotary`, not in D"""
        x, positions = random(2, 4, 3, 16), [1, 2, 30, 5]
        for rotary in (2, 6, 8):
            got, expected = impl(x, torch.tensor(positions), rotary, 100.0), turned(x, positions, rotary, 100.0)
            expect_close(f"output for rotary = {rotary}, D = 16, theta = 100", got, expected, atol=1e-5)

    def test_negative_positions(self, impl):
        """negative positions rotate the other way"""
        x, positions = random(1, 4, 2, 8), [-1, 1, -7, -100]
        got, expected = impl(x, torch.tensor(positions), 4, 10_000.0), turned(x, positions, 4, 10_000.0)
        expect_close(f"output at positions {positions}", got, expected, atol=1e-5)

    def test_distance_only(self, impl):
        """q·k is the same for positions (5, 2), (105, 102), (1, -2) and (-40, -43)"""
        q, k = random(1, 1, 1, 16), random(1, 1, 1, 16, seed=1)

        def score(m: int, n: int) -> torch.Tensor:
            q_m, k_n = (tensor("output", impl(x, torch.tensor([p]), 12, 10_000.0)) for x, p in ((q, m), (k, n)))
            return (q_m * k_n).sum()

        for m, n in ((105, 102), (1, -2), (-40, -43)):
            expect_close(f"q·k at positions ({m}, {n}), against (5, 2)", score(m, n), score(5, 2), atol=1e-3)
        different = abs(float(score(5, 2) - score(9, 2))) > 1e-2
        expect(different, "q·k must differ between distance 3 and distance 7; it does not")

    def test_shapes_of_positions(self, impl):
        """x [T, H, D]; [B, T] and [1, T] for x [B, T, H, D]; [A, B, T] for five dimensions; int32"""
        cases = [((4, 3, 8), (4,)), ((2, 4, 3, 8), (2, 4)), ((2, 4, 3, 8), (1, 4)), ((3, 2, 4, 1, 8), (3, 2, 4))]
        for shape, positions_shape in cases:
            x, positions = random(*shape), torch.arange(math.prod(positions_shape), dtype=torch.int32) * 3 - 8
            positions = positions.reshape(positions_shape)
            got, expected = impl(x, positions, 4, 100.0), turned(x, positions, 4, 100.0)
            expect_close(f"output for x {list(shape)}, positions {list(positions_shape)}", got, expected, atol=1e-5)
        x, positions = random(2, 4, 3, 8), torch.arange(4).expand(2, 4)  # not contiguous
        expect_close("output, positions expanded", impl(x, positions, 4, 100.0), turned(x, positions, 4, 100.0), 1e-5)

    def test_dtypes(self, impl):
        """the output has the dtype of x and its digits: fp32, bf16, fp16, fp64; what passes is x to the bit"""
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x = random(1, 3, 2, 8).to(dtype)
            got = tensor("output", impl(x, torch.arange(3), 4, 10_000.0))
            expect_equal(f"dtype of the output for {dtype}", got.dtype, dtype)
            step = max(2 * HALF_STEP[dtype], 1e-6)
            expect_close(f"output in {dtype}", got, turned(x, torch.arange(3), 4, 10_000.0), atol=step, rtol=step)
            expect_close(f"features 4 to 7 in {dtype}", got[..., 4:], x[..., 4:], atol=0, rtol=0)

    def test_far_positions(self, impl):
        """positions of 100,000 and more: angles as fp32 has them at least"""
        x, positions = random(1, 3, 2, 8), [100_003, 1_000_001, -131_072]
        got = impl(x, torch.tensor(positions), 8, 500_000.0)
        expect_close(f"output at {positions}", got, turned(x, positions, 8, 500_000.0), atol=0.2)

    def test_views_and_new(self, impl):
        """x [B, H, T, D] transposed to [B, T, H, D] is not contiguous; the output is new, at position 0, too"""
        x = random(2, 3, 4, 8).transpose(1, 2)
        for positions in (torch.arange(4), torch.zeros(4, dtype=torch.long)):
            got = tensor("output", impl(x, positions, 6, 100.0))
            expect_close(f"output at positions {positions.tolist()}", got, turned(x, positions, 6, 100.0), atol=1e-5)
            expect_new("output", got, x=x)

    def test_angles_are_exact(self, impl):
        """x in bf16 at position 1,001, which bf16 does not have: the angle is right all the same"""
        x, positions = random(1, 2, 2, 8).bfloat16(), [1001, 4099]
        got, expected = impl(x, torch.tensor(positions), 4, 100.0), turned(x, positions, 4, 100.0)
        expect_close("output in bf16 at positions 1,001 and 4,099", got, expected, atol=3e-2, rtol=1e-2)

    def test_inputs_untouched(self, impl):
        """x and positions are as before the call"""
        x, positions = random(1, 3, 2, 8), torch.arange(3)
        expect_untouched(lambda: impl(x, positions, 4, 10_000.0), x=x, positions=positions)


def grouped_case(heads: int, kv_heads: int, tokens: int = 5, keys: int = 5, size: int = 4, batch: int = 2) -> tuple:
    """q, k, v, larger than usual, so that weights of attention differ clearly."""
    q = 2 * random(batch, heads, tokens, size, seed=7)
    return q, *(random(batch, kv_heads, keys, size, seed=i) for i in (8, 9))


def grouped_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Head by head."""
    tokens, keys, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    mask = torch.tensor([[s <= keys - tokens + t for s in range(keys)] for t in range(tokens)])
    heads = [
        plain_attention(q[b, h], k[b, h // group], v[b, h // group], mask)
        for b in range(len(q))
        for h in range(q.shape[1])
    ]
    return torch.stack(heads).reshape(q.shape)


class Largest(TorchDispatchMode):
    """While it is on, a tensor that owns more than `limit` bytes breaks the contract."""

    def __init__(self, limit: int, said: str) -> None:
        super().__init__()
        self.limit, self.said = limit, said

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first call imports torch's compiler, which takes a second

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, torch.Tensor) and (owned := part.untyped_storage().nbytes()) > self.limit:
                name = str(function).split(".")[1]
                raise ContractError(
                    f"{self.said}\n  got      a tensor {list(part.shape)}, {owned:,} bytes of memory, made by torch's"
                    f" `{name}`{' (which `@`, `reshape`, `repeat` and others call)' if name == 'clone' else ''}"
                )
        return out


class Marked(TorchDispatchMode):
    """While it is on, a tensor whose memory holds the number `mark` more than once breaks the contract; or what is left
    of it when keys are scaled by D^-1/2 or D^-1/4, for D = 4."""

    def __init__(self, mark: float, said: str) -> None:
        super().__init__()
        self.mark, self.said = mark, said

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as below

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, torch.Tensor) and part.is_floating_point():
                memory = torch.empty(0, dtype=part.dtype).set_(part.untyped_storage())
                held = max(int((memory.float() / self.mark - by).abs().lt(1e-3).sum()) for by in (1, 0.5, 0.5**0.5))
                expect(
                    held <= 1,
                    f"{self.said} once in a tensor\n  got      one {held} times, in a tensor"
                    f" {list(part.shape)} made by torch's `{str(function).split('.')[1]}`",
                )
        return out


@exercise("2.4", "grouped_query_attention")
class TestGroupedQueryAttention:
    def _same(self, impl, heads: int, kv_heads: int, tokens: int = 5, keys: int = 5) -> None:
        case = grouped_case(heads, kv_heads, tokens, keys)
        what = f"output for H = {heads}, H_kv = {kv_heads}, T = {tokens}, S = {keys}"
        expect_close(what, impl(*case), grouped_reference(*case), atol=1e-5)

    def test_one_head(self, impl):
        """with one head it is plain causal attention"""
        self._same(impl, 1, 1)

    def test_multi_head(self, impl):
        """with as many key/value heads as query heads it is multi-head attention"""
        self._same(impl, 3, 3)

    def test_grouped(self, impl):
        """with 6 query and 2 key/value heads, heads 0 to 2 read key/value head 0 and heads 3 to 5 head 1"""
        self._same(impl, 6, 2)
        self._same(impl, 6, 3)

    def test_multi_query(self, impl):
        """with 1 key/value head all query heads share it"""
        self._same(impl, 4, 1)

    def test_decode(self, impl):
        """one query against many keys: it is the last token and sees them all"""
        self._same(impl, 6, 2, tokens=1, keys=7)

    def test_last_tokens(self, impl):
        """T queries against S keys belong to the last T tokens: query t sees keys 0 to S - T + t"""
        self._same(impl, 4, 2, tokens=3, keys=7)

    def test_causal(self, impl):
        """a change of the last key and value changes no output but the last"""
        q, k, v = grouped_case(4, 2)
        before = tensor("output", impl(q, k.clone(), v.clone()))
        k[:, :, -1] += 1
        v[:, :, -1] += 1
        after = tensor("output", impl(q, k, v))
        expect_close("outputs before the last token", after[:, :, :-1], before[:, :, :-1])
        changed = not torch.allclose(after[:, :, -1], before[:, :, -1])
        expect(changed, "the last key and value changed, yet the last output is the same")

    def test_extreme(self, impl):
        """visible scores near -40,000 and -1e10: later keys keep the weight 0"""
        for score in (-4e4, -1e10, -1e30):
            q, k = torch.full((1, 2, 3, 1), score), torch.ones(1, 1, 3, 1)
            k[0, 0, 2] = 0  # the last key has the score 0, and only the last query may see it
            v = torch.tensor([1.0, 3.0, 1e3])[None, None, :, None]
            got = tensor("output", impl(q, k, v))
            expect_close(f"outputs for visible scores of {score:g}", got[0, 1, :, 0], [1.0, 2.0, 1e3])
            got = tensor("output", impl(q[:, :, :2], k, v))
            expect_close("the same for the last two queries of three", got[0, 1, :, 0], [2.0, 1e3])

    def test_sizes(self, impl):
        """five sequences, up to 130 keys and 20 queries, heads of 3 and of 24 features, in fp64 to its digits"""
        for heads, kv_heads, t, s, size in (
            (4, 2, 12, 130, 3),
            (12, 3, 20, 20, 24),
            (8, 2, 1, 130, 24),
            (9, 9, 9, 9, 1),
        ):
            q, k, v = exact(5, heads, t, size), *(exact(5, kv_heads, s, size, seed=i) for i in (1, 2))
            wide = [x.repeat_interleave(heads // kv_heads, 1) for x in (k, v)]
            hidden = torch.arange(s) > torch.arange(t)[:, None] + s - t
            weights = (q @ wide[0].mT * size**-0.5).masked_fill(hidden, -math.inf).softmax(-1)
            what = f"output for H = {heads}, H_kv = {kv_heads}, T = {t}, S = {s}, D = {size}"
            expect_close(what, tensor("output", impl(q, k, v)), weights @ wide[1], atol=1e-10, rtol=1e-10)

    def test_dtypes_and_views(self, impl):
        """the output is fp64 for fp64, to its digits, bf16 for bf16; k and v are parts of a cache, q transposed"""
        q, k, v = (x.double() for x in grouped_case(6, 2, tokens=3, keys=5))
        room = torch.full((2, 2, 2, 9, 4), math.nan, dtype=torch.float64)
        room[0, :, :, :5], room[1, :, :, :5] = k, v
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        got = tensor("output", impl(q, room[0, :, :, :5], room[1, :, :, :5]))
        expect_equal("dtype for fp64", got.dtype, torch.float64)
        own = torch.arange(5) > torch.arange(3)[:, None] + 2
        wide = [x.repeat_interleave(3, 1) for x in (k, v)]
        weights = (q @ wide[0].mT / 2).masked_fill(own, -math.inf).softmax(-1)
        expect_close("output in fp64", got, weights @ wide[1], atol=1e-12, rtol=1e-12)
        got = tensor("output", impl(*(x.bfloat16() for x in (q, k, v))))
        expect_equal("dtype for bf16", got.dtype, torch.bfloat16)

    def test_held_once(self, impl):
        """no tensor on the way holds a key or a value twice: one has a mark, and it is looked for in all of them"""
        for heads, kv_heads, tokens in ((16, 8, 1), (4, 2, 3), (4, 2, 6), (3, 1, 6)):
            said = f"for {heads} query heads and {kv_heads} key/value heads"
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                q, k, v = (x.to(dtype) for x in grouped_case(heads, kv_heads, tokens=tokens, keys=6, batch=1))
                q[..., 1] = 0  # so that the marked number is in no score
                k[0, 0, 2, 1] = 2.0**20
                with Marked(2.0**20, f"{said}: expected every key"):
                    tensor("output", impl(q, k, v))
                k[0, 0, 2, 1], v[0, 0, 2, 1] = 0, 2.0**20
                with Marked(2.0**20, f"{said}: expected every value"):
                    tensor("output", impl(q, k, v))

    def test_nothing_copied(self, impl):
        """with 16 query heads on 2 key/value heads, no tensor on the way is as large as a key for every query head"""
        for tokens in (1, 2):
            q, k, v = grouped_case(16, 2, tokens=tokens, keys=64, size=16, batch=1)
            size = k.untyped_storage().nbytes()
            said = (
                f"for q {list(q.shape)}, k and v {list(k.shape)}: expected no tensor above 3 times the"
                f" {size:,} bytes of k"
            )
            with Largest(3 * size, said):
                tensor("output", impl(q, k, v))

    def test_written_out(self, impl):
        """it is written out: F.scaled_dot_product_attention is not called"""
        with Forbidden("scaled_dot_product_attention"):
            for tokens in (1, 3, 5):
                tensor("output", impl(*grouped_case(4, 2, tokens=tokens)))
            tensor("output", impl(*grouped_case(2, 2)))

    def test_inputs_untouched(self, impl):
        """q, k and v are as before the call"""
        for heads, tokens in ((2, 5), (4, 1), (1, 3)):
            for dtype in (torch.float32, torch.float64):
                q, k, v = (x.to(dtype) for x in grouped_case(heads, 1, tokens=tokens))
                expect_untouched(lambda q=q, k=k, v=v: impl(q, k, v), q=q, k=k, v=v)


def layer_case(hidden: int = 6, intermediate: int = 10) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    shapes = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    weights = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    weights["input_layernorm"] = 1 + random(hidden, seed=5) / 2
    weights["post_attention_layernorm"] = 1 + random(hidden, seed=6) / 2
    return random(2, 4, hidden, seed=7) * 3, weights


def mean_of_past(h: torch.Tensor) -> torch.Tensor:
    """A stand-in for attention: each token gets the mean of itself and what came before."""
    return h.cumsum(1) / torch.arange(1, h.shape[1] + 1)[None, :, None]


def swiglu_of(stream: torch.Tensor, weights: dict[str, torch.Tensor], eps: float) -> torch.Tensor:
    """The MLP branch: norm, then SwiGLU."""
    h = norm_of(stream, weights["post_attention_layernorm"], eps).float()
    gate, up = h @ weights["gate_proj"].T, h @ weights["up_proj"].T
    return (gate / (1 + torch.exp(-gate)) * up) @ weights["down_proj"].T


FORMS = {False: "parallel = False", True: "parallel = True"}


@exercise("2.5", "decoder_layer")
class TestDecoderLayer:
    def test_identity(self, impl):
        """when attention gives 0 and down_proj is 0, the stream passes unchanged, in both forms"""
        x, weights = layer_case()
        weights["down_proj"].zero_()
        for parallel, form in FORMS.items():
            got = impl(x.clone(), weights, torch.zeros_like, parallel, 1e-5)
            expect_close(f"output with attention = 0 and down_proj = 0, {form}", got, x)

    def test_attention_input(self, impl):
        """attention is called once, with the stream normalized by input_layernorm, in both forms"""
        for parallel, form in FORMS.items():
            x, weights = layer_case()
            seen = []

            def attend(h: torch.Tensor, seen: list = seen) -> torch.Tensor:
                seen.append(h.clone())
                return torch.zeros_like(h)

            tensor("output", impl(x.clone(), weights, attend, parallel, 0.1))
            expect_equal(f"calls of attend, {form}", len(seen), 1)
            expected = norm_of(x, weights["input_layernorm"], 0.1)
            expect_close(f"input of attend, {form}, eps = 0.1", seen[0], expected, atol=1e-5)

    def test_attention_is_added(self, impl):
        """what attention gives is added to the stream, in both forms"""
        x, weights = layer_case()
        weights["down_proj"].zero_()
        expected = x + mean_of_past(norm_of(x, weights["input_layernorm"], 1e-5).float())
        for parallel, form in FORMS.items():
            got = impl(x.clone(), weights, mean_of_past, parallel, 1e-5)
            expect_close(f"output with down_proj = 0, {form}, eps = 1e-05", got, expected, atol=1e-5)

    def test_mlp(self, impl):
        """without attention, SwiGLU of the stream normalized by post_attention_layernorm is added, in both forms"""
        x, weights = layer_case()
        for parallel, form in FORMS.items():
            got = impl(x.clone(), weights, torch.zeros_like, parallel, 0.1)
            expected = x + swiglu_of(x, weights, 0.1)
            expect_close(f"output with attention = 0, {form}, eps = 0.1", got, expected, atol=1e-4)

    def test_sequential(self, impl):
        """sequential: the MLP reads the stream after attention was added"""
        x, weights = layer_case()
        middle = x + mean_of_past(norm_of(x, weights["input_layernorm"], 1e-5).float())
        expected = middle + swiglu_of(middle, weights, 1e-5)
        got = impl(x.clone(), weights, mean_of_past, False, 1e-5)
        expect_close("output, parallel = False, eps = 1e-05", got, expected, atol=1e-4)

    def test_parallel(self, impl):
        """parallel: the MLP reads the stream before attention was added, through its own norm"""
        x, weights = layer_case()
        middle = x + mean_of_past(norm_of(x, weights["input_layernorm"], 1e-5).float())
        expected = middle + swiglu_of(x, weights, 1e-5)
        got = impl(x.clone(), weights, mean_of_past, True, 1e-5)
        expect_close("output, parallel = True, eps = 1e-05", got, expected, atol=1e-4)

    def test_default_eps(self, impl):
        """eps is 1e-5 if it is not given"""
        x, weights = layer_case()
        x = x / 1000
        for parallel, form in FORMS.items():
            expected = impl(x.clone(), weights, mean_of_past, parallel, 1e-5)
            expect_close(f"output, {form}", impl(x.clone(), weights, mean_of_past, parallel), expected)

    def test_sizes(self, impl):
        """five sequences of 20 tokens, gates of 100, in fp64 to its digits, in both forms"""
        for shape, scale in (((5, 20, 6), 1.0), ((1, 20, 6), 40.0)):
            x, weights = exact(*shape), {name: w.double() / 3 for name, w in layer_case()[1].items()}
            weights["gate_proj"] = scale * weights["gate_proj"]
            n1, n2 = weights["input_layernorm"], weights["post_attention_layernorm"]
            before = {name: w.clone() for name, w in weights.items()}
            for parallel, form in FORMS.items():
                middle = x + mean_of_past(norm_of(x, n1, 0.1))
                h = norm_of(x if parallel else middle, n2, 0.1)
                gate = h @ weights["gate_proj"].T
                expected = middle + (gate * gate.sigmoid() * (h @ weights["up_proj"].T)) @ weights["down_proj"].T
                got = tensor("output", impl(x.clone(), weights, mean_of_past, parallel, 0.1))
                expect_close(f"output of {list(shape)}, {form}", got, expected, atol=1e-10, rtol=1e-10)
            same = weights.keys() == before.keys() and all(torch.equal(w, before[name]) for name, w in weights.items())
            expect(same, "the weights were changed; leave the dictionary as it is")

    def test_views_and_dtypes(self, impl):
        """x that is not contiguous, one sequence of one token, and fp64 to its digits, bf16 as bf16"""
        _, weights = layer_case()
        wide = {name: w.double() for name, w in weights.items()}
        for x in (random(4, 6, 2, seed=8).permute(2, 0, 1), random(1, 1, 6, seed=9)):
            for parallel, form in FORMS.items():
                got = tensor("output", impl(x.double(), wide, mean_of_past, parallel, 1e-5))
                expect_equal("dtype for fp64", got.dtype, torch.float64)
                middle = x.double() + mean_of_past(norm_of(x, wide["input_layernorm"], 1e-5))
                h = norm_of(x if parallel else middle, wide["post_attention_layernorm"], 1e-5)
                gate = h @ wide["gate_proj"].T
                mlp = (gate / (1 + torch.exp(-gate)) * (h @ wide["up_proj"].T)) @ wide["down_proj"].T
                expect_close(f"output in fp64, {form}, x {list(x.shape)}", got, middle + mlp, atol=1e-11, rtol=1e-11)
                half = {name: w.bfloat16() for name, w in weights.items()}
                got = tensor("output", impl(x.bfloat16(), half, lambda h: h * 2, parallel, 1e-5))
                expect_equal("dtype for bf16", got.dtype, torch.bfloat16)

    def test_inputs_untouched(self, impl):
        """x, the weights and what `attend` returned are as before, and the output is a new tensor, in both forms"""
        x, weights = layer_case()
        kept = random(2, 4, 6, seed=10)
        for parallel in FORMS:
            expect_untouched(
                lambda p=parallel: impl(x, weights, lambda h: kept, p, 1e-5), x=x, attended=kept, **weights
            )
            expect_equal("names of the weights after the call", list(weights), list(layer_case()[1]))
            expect_new("output", impl(x, weights, torch.zeros_like, parallel, 1e-5), x=x, **weights)


def shape(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int, tied: bool
) -> SimpleNamespace:
    return SimpleNamespace(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
    )


SMOLLM2 = (49_152, 576, 1536, 30, 9, 3, 64, True)
LLAMA_3_8B = (128_256, 4096, 14_336, 32, 32, 8, 128, False)
TINY = (11, 6, 10, 2, 3, 1, 4, False)  # 3 heads of 4 are 12 features, twice hidden
CPU = (37e9, 190e9)  # bytes and FLOPs a second of chapter 2's machine
GPU = (4.8e12, 989e12)  # and of an H200, by its data sheet


def product_flops(c: SimpleNamespace, seen: list[int], logits: int) -> int:
    """Every matrix product of a forward, (rows, inner, columns) one by one; token i attends to seen[i] tokens."""
    tokens, products = len(seen), []
    for _ in range(c.num_hidden_layers):
        products += [
            (tokens, c.hidden_size, c.num_attention_heads * c.head_dim),
            (tokens, c.num_attention_heads * c.head_dim, c.hidden_size),
        ]
        products += [(tokens, c.hidden_size, c.num_key_value_heads * c.head_dim)] * 2
        products += [(tokens, c.hidden_size, c.intermediate_size)] * 2 + [(tokens, c.intermediate_size, c.hidden_size)]
        for keys in seen:  # one query against the keys it may see, then its weights against the values
            products += [(1, c.head_dim, keys), (1, keys, c.head_dim)] * c.num_attention_heads
    products.append((logits, c.hidden_size, c.vocab_size))
    return sum(2 * rows * inner * columns for rows, inner, columns in products)


def module_parameters(c: SimpleNamespace) -> int:
    """Count the elements of real tensors (on torch's meta device: shapes without memory)."""
    q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = [(q_size, c.hidden_size), (kv_size, c.hidden_size), (kv_size, c.hidden_size), (c.hidden_size, q_size)]
    shapes += [(c.intermediate_size, c.hidden_size)] * 2 + [(c.hidden_size, c.intermediate_size)]
    shapes += [(c.hidden_size,)] * 2
    shapes = shapes * c.num_hidden_layers + [(c.vocab_size, c.hidden_size), (c.hidden_size,)]
    shapes += [] if c.tie_word_embeddings else [(c.vocab_size, c.hidden_size)]
    return sum(torch.empty(s, device="meta").numel() for s in shapes)


@contextmanager
def saying(c: SimpleNamespace, **arguments: float) -> Iterator[None]:
    """Add config and arguments to the message of a contract that does not hold."""
    try:
        yield
    except ContractError as e:
        config = ", ".join(f"{name} = {value}" for name, value in vars(c).items())
        given = ", ".join(f"{name} = {value:g}" for name, value in arguments.items())
        raise ContractError(f"{e}\nconfig: {config}\nwith {given}") from None


@exercise("2.6", "account")
class TestAccount:
    def _entry(self, impl, name: str, c: SimpleNamespace, tokens=1, batch=1, context=1, speeds=CPU) -> Any:
        before = dict(vars(c))
        got = impl(c, tokens, batch, context, *speeds)
        expect(vars(c) == before, "the config was changed; leave it as it is")
        names = ["parameters", "flops", "kv_bytes", "step_seconds"]
        came = "nothing (is a `return` missing?)" if got is None else repr(got)[:200]
        four = isinstance(got, dict) and sorted(got) == sorted(names)
        expect(four, f"expected a dictionary with {names}\n  got      {came}")
        return got[name]

    def _exact(self, impl, name: str, c: SimpleNamespace, tokens: int, expected: int) -> None:
        for batch, context in ((1, 1), (8, 33)):  # one forward over a prompt: neither matters
            with saying(c, tokens=tokens, batch=batch, context=context):
                got = self._entry(impl, name, c, tokens, batch, context)
                expect(type(got) is int, f'"{name}": expected an int, {expected:,}\n  got {type(got).__name__} {got!r}')
                expect_equal(f'"{name}"', got, expected)

    def _step(self, impl, numbers: tuple, batch: int, context: int, speeds: tuple, limit: str) -> None:
        c = shape(*numbers)
        kept = torch.empty(c.num_hidden_layers, 2, batch, context, c.num_key_value_heads, c.head_dim, device="meta")
        memory = (2 * module_parameters(c) + 2 * kept.numel()) / speeds[0]
        arithmetic = product_flops(c, [context] * batch, batch) / speeds[1]
        assert (memory > arithmetic) == (limit == "memory")
        for tokens in (1, 100):  # the prompt's tokens do not matter for the step
            with saying(c, tokens=tokens, batch=batch, context=context, bandwidth=speeds[0], rate=speeds[1]):
                got = self._entry(impl, "step_seconds", c, tokens, batch, context, speeds)
                expect_close(f'"step_seconds", limited by {limit}', got, max(memory, arithmetic), atol=0, rtol=1e-9)

    def test_smollm2(self, impl):
        """SmolLM2-135M has 134,515,008 parameters"""
        self._exact(impl, "parameters", shape(*SMOLLM2), 1, 134_515_008)

    def test_llama(self, impl):
        """Llama 3 8B has 8,030,261,248 parameters: its head is not tied"""
        self._exact(impl, "parameters", shape(*LLAMA_3_8B), 1, 8_030_261_248)

    def test_parameters(self, impl):
        """the count is that of the tensors, tied or not, also where H · D is not hidden"""
        for tied in (True, False):
            c = shape(*TINY[:-1], tied)
            self._exact(impl, "parameters", c, 3, module_parameters(c))

    def test_flops(self, impl):
        """FLOPs are those of the matrix products listed one by one: causal attention, logits of the last token only"""
        for tokens in (1, 2, 7):
            c = shape(*TINY)
            self._exact(impl, "flops", c, tokens, product_flops(c, list(range(1, tokens + 1)), 1))

    def test_flops_tied(self, impl):
        """a tied head costs the same FLOPs as one of its own"""
        self._exact(impl, "flops", shape(*TINY[:-1], True), 5, product_flops(shape(*TINY), [1, 2, 3, 4, 5], 1))

    def test_flops_beyond_floats(self, impl):
        """FLOPs of wide heads are exact: no float on the way"""
        c, tokens = shape(11, 6, 10, 1, 3, 1, 1_000_000_007, False), 4097
        one, two, three = (product_flops(c, list(range(1, n + 1)), 1) for n in (1, 2, 3))
        # A polynomial of degree two in the tokens: three values tell it.
        second = three - 2 * two + one
        expected = one + (tokens - 1) * (two - one) + (tokens - 1) * (tokens - 2) // 2 * second
        self._exact(impl, "flops", c, tokens, expected)

    def test_exact(self, impl):
        """numbers beyond 2^53, here of a huge config, are exact: no float on the way"""
        c = shape(10**9 + 7, 10**6 + 1, 10**7 + 1, 3, 5, 3, 10**9 + 1, False)
        q_size, kv_size = 5 * c.head_dim, 3 * c.head_dim
        layer = c.hidden_size * (2 * q_size + 2 * kv_size + 3 * c.intermediate_size + 2)
        self._exact(impl, "parameters", c, 1, 3 * layer + c.hidden_size + 2 * c.vocab_size * c.hidden_size)
        self._exact(impl, "kv_bytes", c, 10**6 + 3, (10**6 + 3) * 3 * 2 * kv_size * 2)
        self._exact(impl, "flops", c, 7, product_flops(c, list(range(1, 8)), 1))

    def test_kv_bytes(self, impl):
        """SmolLM2 keeps 23,040 bytes a token in 16 bits, Llama 3 8B 131,072"""
        self._exact(impl, "kv_bytes", shape(*SMOLLM2), 1, 23_040)
        self._exact(impl, "kv_bytes", shape(*LLAMA_3_8B), 100, 13_107_200)
        c = shape(*TINY)  # H · D is not hidden
        self._exact(impl, "kv_bytes", c, 7, 7 * c.num_hidden_layers * 2 * c.num_key_value_heads * c.head_dim * 2)

    def test_step_of_one(self, impl):
        """a decode step at batch 1 is limited by memory: the weights, and the cache of `context` tokens"""
        self._step(impl, SMOLLM2, 1, 1024, CPU, "memory")
        self._step(impl, LLAMA_3_8B, 1, 8192, GPU, "memory")

    def test_step_of_a_batch(self, impl):
        """a batch reads the weights once, and a cache for each sequence"""
        self._step(impl, LLAMA_3_8B, 32, 4096, GPU, "memory")
        self._step(impl, LLAMA_3_8B, 2000, 20_000, GPU, "memory")
        self._step(impl, TINY, 3, 7, (1.0, 1e9), "memory")

    def test_step_by_arithmetic(self, impl):
        """with many sequences and short context arithmetic is the limit: every new token, logits for each"""
        self._step(impl, LLAMA_3_8B, 512, 16, GPU, "arithmetic")
        self._step(impl, TINY, 40, 3, (1e9, 1e9), "arithmetic")
        self._step(impl, SMOLLM2, 1024, 5, GPU, "arithmetic")
        self._step(impl, (*TINY[:-1], True), 40, 3, (1e9, 1e9), "arithmetic")
