"""The contracts of chapter 2's exercises: attention, norm, rotary positions, grouped queries, the layer, accounting."""

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


class Forbidden(TorchFunctionMode):
    """While it is on, calling torch's function of this name breaks the contract, however it was imported."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        expect(getattr(function, "__name__", "") != self.name, f"write it out: `{self.name}` was called")
        return function(*args, **(kwargs or {}))


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
    return torch.tensor(rows)


def causal(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


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
        for size in (1e4, -1e4):
            k = torch.tensor([[0.5, 0.5], [size, size], [0.5, 0.5]])
            expect_close(f"output with a masked score of {2 * size / 2**0.5:,.0f}", impl(q, k, v, mask), [[2.0]])

    def test_far_apart(self, impl):
        """rows with visible scores near 200, -200 and -20,000 side by side: each hides its masked key completely"""
        q = torch.tensor([[200.0], [-200.0], [-20_000.0]])
        k, v = torch.tensor([[1.0], [0.0], [1.0]]), torch.tensor([[1.0], [1e3], [3.0]])
        mask = torch.tensor([[True, False, True]])
        expect_close("output", impl(q, k, v, mask), [[2.0], [2.0], [2.0]])

    def test_empty_rows(self, impl):
        """a row that may see nothing gives 0, and the other rows do not notice"""
        q, k, v = random(2, 4, 8), random(2, 4, 8, seed=1), random(2, 4, 8, seed=2)
        padding = torch.tensor([[False, False, True, True], [True, True, True, True]])
        mask = causal(4) & padding[:, None, :]  # [2, 4, 4]: rows 0 and 1 of sequence 0 see nothing
        got = tensor("output", impl(q, k, v, mask))
        for b in range(2):
            expected = plain_attention(q[b], k[b], v[b], mask[b])
            expect_close(f"sequence {b}, keys 0 and 1 {'hidden' if b == 0 else 'visible'}", got[b], expected)

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
        """[B, H, T, D] works, each head by itself; masks [T, S] and [B, 1, 1, S] serve all heads"""
        q, k, v = random(2, 3, 4, 8), random(2, 3, 4, 8, seed=1), random(2, 3, 4, 8, seed=2)
        padding = torch.tensor([[True, False, True, True], [False, True, True, False]])[:, None, None, :]
        for name, mask in (("[T, S]", causal(4)), ("[B, 1, 1, S]", padding)):
            got = tensor("output", impl(q, k, v, mask))
            expect_equal(f"output shape with a mask {name}", tuple(got.shape), (2, 3, 4, 8))
            expected = plain_attention(q[1, 2], k[1, 2], v[1, 2], mask.expand(2, 3, 4, 4)[1, 2])
            expect_close(f"batch 1, head 2 with a mask {name}", got[1, 2], expected)

    def test_written_out(self, impl):
        """it is written out: F.scaled_dot_product_attention is not called"""
        with Forbidden("scaled_dot_product_attention"):
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

    def test_dtypes(self, impl):
        """both results have the dtype of x: fp32, fp16, bf16"""
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x, residual, weight = (random(*s, seed=i).to(dtype) for i, s in enumerate([(3, 16), (3, 16), (16,)]))
            normed, stream = self._parts(impl, x, residual, weight, 1e-5)
            expect_equal(f"dtype of normed for {dtype}", normed.dtype, dtype)
            expect_equal(f"dtype of new_residual for {dtype}", stream.dtype, dtype)
            expect_close(f"new_residual in {dtype}", stream, (x.double() + residual.double()).to(dtype), rtol=0, atol=0)
            expect_close(f"normed in {dtype}", normed, norm_of(stream, weight, 1e-5), rtol=1e-2, atol=1e-4)

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
            self._parts(impl, random(2, 4), random(2, 4), torch.ones(4), 1e-5)

    def test_inputs_untouched(self, impl):
        """x, residual and weight are as before the call"""
        x, residual, weight = random(2, 4), random(2, 4, seed=1), random(4, seed=2)
        expect_untouched(lambda: self._parts(impl, x, residual, weight, 1e-5)[0], x=x, residual=residual, weight=weight)


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
        """with D = rotary = 2 there is one pair of frequency 1: position p turns (1, 0) to (cos p, sin p)"""
        x = torch.tensor([1.0, 0.0]).expand(1, 4, 1, 2).clone()
        expected = [[[[math.cos(p), math.sin(p)]] for p in range(4)]]
        expect_close("output", impl(x, torch.arange(4), 2, 10_000.0), expected)

    def test_whole_head(self, impl):
        """with rotary = D it equals multiplication by e^(i·angle), every token by its own position, for any theta"""
        x, positions = random(2, 4, 3, 8), [3, 0, 17, 40]
        for theta in (10_000.0, 100.0):
            got, expected = impl(x, torch.tensor(positions), 8, theta), turned(x, positions, 8, theta)
            expect_close(f"output for rotary = D = 8, theta = {theta:g}", got, expected, atol=1e-5)

    def test_rest_passes(self, impl):
        """the features from `rotary` on are those of x"""
        x = random(2, 4, 3, 16)
        got = tensor("output", impl(x, torch.arange(4), 6, 10_000.0))
        expect_equal("output shape", tuple(got.shape), (2, 4, 3, 16))
        expect_close("features 6 to 15 for rotary = 6", got[..., 6:], x[..., 6:], atol=0, rtol=0)

    def test_partial(self, impl):
        """the first `rotary` features turn: pairs are its halves, and the exponents count in `rotary`, not in D"""
        x, positions = random(2, 4, 3, 16), [1, 2, 30, 5]
        for rotary in (2, 6, 8):
            got, expected = impl(x, torch.tensor(positions), rotary, 100.0), turned(x, positions, rotary, 100.0)
            expect_close(f"output for rotary = {rotary}, D = 16, theta = 100", got, expected, atol=1e-5)

    def test_negative_positions(self, impl):
        """negative positions turn the other way"""
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

    def test_dtypes(self, impl):
        """the output has the dtype of x: fp32, bf16, fp16, fp64"""
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            got = tensor("output", impl(random(1, 3, 2, 8).to(dtype), torch.arange(3), 4, 10_000.0))
            expect_equal(f"dtype of the output for {dtype}", got.dtype, dtype)

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
            tensor("output", impl(*grouped_case(4, 2)))

    def test_inputs_untouched(self, impl):
        """q, k and v are as before the call"""
        q, k, v = grouped_case(2, 1)
        expect_untouched(lambda: impl(q, k, v), q=q, k=k, v=v)


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

    def test_inputs_untouched(self, impl):
        """x and the weights are as before the call, in both forms"""
        x, weights = layer_case()
        for parallel in FORMS:
            expect_untouched(lambda p=parallel: impl(x, weights, mean_of_past, p, 1e-5), x=x, **weights)


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
        got = impl(c, tokens, batch, context, *speeds)
        names = ["parameters", "flops", "kv_bytes", "step_seconds"]
        came = "nothing (is a `return` missing?)" if got is None else repr(got)[:200]
        expect(isinstance(got, dict) and name in got, f"expected a dictionary with {names}\n  got      {came}")
        return got[name]

    def _exact(self, impl, name: str, c: SimpleNamespace, tokens: int, expected: int) -> None:
        with saying(c, tokens=tokens):
            got = self._entry(impl, name, c, tokens)
            expect(type(got) is int, f'"{name}": expected an int, {expected:,}\n  got {type(got).__name__} {got!r}')
            expect_equal(f'"{name}"', got, expected)

    def _step(self, impl, numbers: tuple, batch: int, context: int, speeds: tuple, limit: str) -> None:
        c = shape(*numbers)
        kept = torch.empty(c.num_hidden_layers, 2, batch, context, c.num_key_value_heads, c.head_dim, device="meta")
        memory = (2 * module_parameters(c) + 2 * kept.numel()) / speeds[0]
        arithmetic = product_flops(c, [context] * batch, batch) / speeds[1]
        assert (memory > arithmetic) == (limit == "memory")
        with saying(c, batch=batch, context=context, bandwidth=speeds[0], rate=speeds[1]):
            got = self._entry(impl, "step_seconds", c, 1, batch, context, speeds)
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

    def test_kv_bytes(self, impl):
        """SmolLM2 keeps 23,040 bytes a token in 16 bits, Llama 3 8B 131,072"""
        self._exact(impl, "kv_bytes", shape(*SMOLLM2), 1, 23_040)
        self._exact(impl, "kv_bytes", shape(*LLAMA_3_8B), 100, 13_107_200)

    def test_step_of_one(self, impl):
        """a decode step at batch 1 is limited by memory: the weights, and the cache of `context` tokens"""
        self._step(impl, SMOLLM2, 1, 1024, CPU, "memory")
        self._step(impl, LLAMA_3_8B, 1, 8192, GPU, "memory")

    def test_step_of_a_batch(self, impl):
        """a batch reads the weights once, and a cache for each sequence"""
        self._step(impl, LLAMA_3_8B, 32, 4096, GPU, "memory")

    def test_step_by_arithmetic(self, impl):
        """with many sequences and short context arithmetic is the limit: every new token, logits for each"""
        self._step(impl, LLAMA_3_8B, 512, 16, GPU, "arithmetic")
        self._step(impl, TINY, 40, 3, (1e9, 1e9), "arithmetic")
