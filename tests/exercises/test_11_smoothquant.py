"""Checks of exercises 11: a scale by hand, a migration by hand, what calibration keeps, folding, an int8 product, a
layer with three bugs, an int8 cache, the Hadamard transform.
"""

import math
import os
from contextlib import nullcontext

import torch

from minillm.learn.footprint import footprint
from minillm.learn.testing import (
    exercise,
    expect,
    expect_close,
    expect_equal,
    expect_launches_compile,
    expect_parts,
    expect_raises,
    last,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"  # of exercise 11.5
NAN, INF = math.nan, math.inf


def random_tensor(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def led_by_positive(x):
    """x [..., K] with the signs of its rows turned so that the largest number of each is positive.

    A negative one is half a step beyond an integer, a tie: in floating point it may fall to either side.
    """
    return x * x.gather(-1, x.abs().argmax(-1, keepdim=True)).sign()


def expect_tensor(what, got, dtype, shape):
    expect(isinstance(got, torch.Tensor), f"{what}: expected a tensor, got {type(got).__name__}")
    expect_equal(f"{what}: dtype", got.dtype, dtype)
    expect_equal(f"{what}: shape", tuple(got.shape), shape)


def expect_kept(what, now, before):
    same = torch.equal(now.nan_to_num(nan=7.5), before.nan_to_num(nan=7.5))
    expect(same, f"{what} was changed; leave the inputs as they are")


@exercise("11.1", "which_scale")
class TestWhichScale:
    NAMES = (
        "scale of each token", "scale of the tensor", "token 2 by its own", "token 2 by the tensor's",
        "51 by the static one",
    )  # fmt: skip

    def test_tokens(self, impl):
        """each token's largest size, over 127.5"""
        expect_close("scales of the tokens", expect_parts(impl(), *self.NAMES)[0], [0.4, 0.02])

    def test_tensor(self, impl):
        """the largest size of all sets the tensor's"""
        expect_close("scale of the tensor", expect_parts(impl(), *self.NAMES)[1], 0.4)

    def test_own(self, impl):
        """by its own scale the second token is nearly what it was; 127.5 rounds to 128 and is cut to 127"""
        expect_close("token 2", expect_parts(impl(), *self.NAMES)[2], [2.54, 1.1, 0.3, -0.06])

    def test_shared(self, impl):
        """by the tensor's scale its small numbers are rounded to whole steps of 0.4"""
        expect_close("token 2", expect_parts(impl(), *self.NAMES)[3], [2.4, 1.2, 0.4, 0.0])

    def test_static(self, impl):
        """a number beyond the static range gets the last integer, 127"""
        expect_close("51 is read back as", expect_parts(impl(), *self.NAMES)[4], 25.4)


@exercise("11.2", "migrate")
class TestMigrate:
    NAMES = ("s", "sizes of X", "sizes of W", "y", "the norm's weight", "s with alpha 1")

    def part(self, impl, i, expected):
        expect_close(self.NAMES[i], expect_parts(impl(), *self.NAMES)[i], expected)

    def test_factors(self, impl):
        """s is the root of max|X| over max|W|, sizes without their signs"""
        self.part(impl, 0, [8, 1])

    def test_activations(self, impl):
        """X divided by s"""
        self.part(impl, 1, [2, 1])

    def test_weights(self, impl):
        """W multiplied by s"""
        self.part(impl, 2, [2, 1])

    def test_product(self, impl):
        """y is what it was"""
        self.part(impl, 3, [-5, 2.5])

    def test_norm(self, impl):
        """the norm's weight is divided by s"""
        self.part(impl, 4, [0.25, 0.5])

    def test_alpha(self, impl):
        """with alpha = 1 the weights do not count"""
        self.part(impl, 5, [16, 1])


@exercise("11.3", "smoothing_factors")
class TestSmoothingFactors:
    K = 6
    WEIGHTS = (((7, 6), 11), ((4, 6), 12))  # shapes and seeds

    def weights(self, dtype=torch.float32):
        return [random_tensor(*shape, seed=seed, dtype=dtype) for shape, seed in self.WEIGHTS]

    def batches(self, dtype=torch.float32, padding=0.0):
        """Three batches, each with sizes of its own; padding behind each row's tokens."""
        found = []
        for seed, (lengths, t) in enumerate((([5, 2, 4], 5), ([3, 7], 8), ([1, 0, 2, 2], 2))):
            x = random_tensor(len(lengths), t, self.K, seed=seed) * torch.tensor([1.0, 30, 0.1, 1, 5, 1])
            for row, length in zip(x, lengths, strict=True):
                row[length:] = padding
            found.append((x.to(dtype), torch.tensor(lengths)))
        return found

    def x_max(self, batches):
        """One number after another."""
        largest = [0.0] * self.K
        for x, lengths in batches:
            for row, length in zip(x.tolist(), lengths.tolist(), strict=True):
                for token in row[:length]:
                    largest = [max(a, abs(b)) for a, b in zip(largest, token, strict=True)]
        return largest

    def made(self, impl, batches, weights, alpha):
        k = weights[0].shape[1]
        x_max, s = expect_parts(impl(batches, list(weights), alpha), "x_max", "s")
        expect_tensor("x_max", x_max, torch.float32, (k,))
        expect_tensor("s", s, torch.float32, (k,))
        return x_max, s

    def test_sign(self, impl):
        """a channel whose largest number is negative counts with its size"""
        x = torch.tensor([[[1.0, -9.0], [3.0, 2.0]]])
        x_max, _ = self.made(impl, [(x, torch.tensor([2]))], [torch.ones(3, 2)], 0.5)
        expect_close("x_max", x_max, [3, 9])
        x = -torch.ones(1, 1, 2)
        x_max, s = self.made(impl, [(x, torch.tensor([1]))], [-torch.full((3, 2), 4.0)], 0.5)
        expect_close("x_max of negative numbers", x_max, [1, 1])
        expect_close("s for negative weights", s, [0.5, 0.5])

    def test_by_hand(self, impl):
        """the two channels of exercise 11.2, with four strengths"""
        x = torch.tensor([[[-16.0, 1.0]], [[8.0, 0.5]]])
        w = torch.tensor([[0.25, -1.0], [-0.125, 0.5], [0.0, 0.0]])
        for alpha, expected in ((0.5, [8.0, 1.0]), (1.0, [16.0, 1.0]), (0.0, [4.0, 1.0]), (0.25, [32**0.5, 1.0])):
            _, s = self.made(impl, [(x, torch.tensor([1, 1]))], [w], alpha)
            expect_close(f"s, alpha {alpha}", s, expected)

    def test_batches(self, impl):
        """all batches count, whichever holds a channel's largest number"""
        for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 2, 2, 2, 2, 2, 0, 1]):
            batches = [self.batches()[i] for i in order]
            x_max, _ = self.made(impl, batches, self.weights(), 0.5)
            expect_close(f"x_max, batches {order}", x_max, self.x_max(batches))

    def test_padding(self, impl):
        """padding leaves no trace: large numbers, infinity, NaN"""
        for padding in (1e4, -1e4, INF, -INF, NAN):
            batches = self.batches(padding=padding)
            x_max, s = self.made(impl, batches, self.weights(), 0.5)
            expect_close(f"x_max, padding {padding}", x_max, self.x_max(batches))
            expect(bool(s.isfinite().all()), f"s: expected finite numbers, got {s.tolist()} (padding {padding})")

    def test_weights(self, impl):
        """w_max is over all weights, of any number of rows"""
        for weights in (self.weights(), self.weights()[::-1], self.weights()[:1]):
            batches = self.batches()
            w_max = [max(abs(w[n][j]) for w in (w.tolist() for w in weights) for n in range(len(w))) for j in range(6)]
            _, s = self.made(impl, batches, weights, 0.7)
            expected = [x**0.7 / w**0.3 for x, w in zip(self.x_max(batches), w_max, strict=True)]
            expect_close("s", s, expected)

    def test_dead(self, impl):
        """s is 1 where x_max or w_max is 0"""
        x = torch.tensor([[[0.0, 4.0, 0.0, 9.0]]])
        w = torch.tensor([[4.0, 0.0, 0.0, -1.0], [-1.0, 0.0, 0.0, 0.5]])
        for alpha in (0.0, 0.5, 1.0):
            x_max, s = self.made(impl, [(x, torch.tensor([1]))], [w], alpha)
            expect_close("x_max", x_max, [0, 4, 0, 9])
            expect_close(f"s, alpha {alpha}", s, [1, 1, 1, 9**alpha])
        batches = [(x, torch.tensor([1])), (torch.ones(1, 1, 4), torch.tensor([1])), (0 * x, torch.tensor([1]))]
        x_max, s = self.made(impl, batches, [w], 0.5)
        expect_close("x_max, channels that are zeros in one batch", x_max, [1, 4, 1, 9])
        expect_close("s, channels that are zeros in one batch", s, [0.5, 1, 1, 3])

    def test_small(self, impl):
        """small numbers are not touched, nor are factors that are large or small"""
        x, w = torch.tensor([[[1e-7, 1e-7]]]), torch.tensor([[1e-5, 1.0]])
        _, s = self.made(impl, [(x, torch.tensor([1]))], [w], 0.5)
        expect_close("s", s * 1e4, [1e3, 1e0 * 10**0.5], rtol=1e-4)
        sizes = 1e-24, 1e-20, 1.0, 1e-30, 1.0
        x, w = torch.tensor([[sizes]]), torch.tensor([[1e-20, 1.0, 1e-20, 1e-30, 1e20]])
        x_max, s = self.made(impl, [(x, torch.tensor([1]))], [w], 0.5)
        expect_close("x_max / |x|", x_max / x[0, 0], [1] * 5, rtol=1e-4)
        expect_close("s · |w|^½ / |x|^½", s * w[0].sqrt() / x[0, 0].sqrt(), [1] * 5, rtol=1e-4)
        zeros = torch.zeros(2, 3, 4)
        x_max, s = self.made(impl, [(zeros, torch.tensor([3, 1]))], [torch.ones(2, 4)], 0.5)
        expect_close("x_max of tokens that are zeros", x_max, [0] * 4)
        expect_close("s of tokens that are zeros", s, [1] * 4)

    def test_generator(self, impl):
        """batches that can be walked through once"""
        x_max, s = self.made(impl, (pair for pair in self.batches()), self.weights(), 0.5)
        _, expected = self.made(impl, self.batches(), self.weights(), 0.5)
        expect_close("x_max", x_max, self.x_max(self.batches()))
        expect_close("s", s, expected)

    def test_half(self, impl):
        """fp16 and bf16 are computed with in fp32"""
        for dtype in (torch.float16, torch.bfloat16):
            batches, weights = self.batches(dtype), self.weights(dtype)
            x_max, s = self.made(impl, batches, weights, 0.5)
            w_max = torch.cat(weights).abs().amax(0).double()
            expect_close(f"x_max, {dtype}", x_max, self.x_max(batches))
            expect_close(f"s, {dtype}", s, (torch.tensor(self.x_max(batches)).double() / w_max).sqrt())

    def test_mixed(self, impl):
        """dtypes differ from batch to batch and from weight to weight: none sets that of the others"""
        for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1]):
            dtypes = [(torch.bfloat16, torch.float32, torch.float16)[i] for i in order]
            batches = [(x.to(dtype), n) for (x, n), dtype in zip(self.batches(), dtypes, strict=True)]
            weights = [w.to(dtype) for w, dtype in zip(self.weights(), dtypes, strict=False)]
            w_max = torch.cat([w.double() for w in weights]).abs().amax(0)
            x_max, s = self.made(impl, batches, weights, 0.5)
            expect_close(f"x_max, batches in {dtypes}", x_max, self.x_max(batches))
            expect_close(f"s, weights in {dtypes[:2]}", s, (torch.tensor(self.x_max(batches)).double() / w_max).sqrt())

    def test_all_padding(self, impl):
        """a batch of padding alone leaves no trace, wherever it comes"""
        expected = self.x_max(self.batches())
        for at in range(4):
            batches = self.batches(padding=NAN)
            batches.insert(at, (torch.full((2, 3, self.K), NAN), torch.tensor([0, 0])))
            x_max, _ = self.made(impl, batches, self.weights(), 0.5)
            expect_close(f"x_max, batch {at} being padding", x_max, expected)

    def test_shapes(self, impl):
        """one sequence, one token, one channel, one row; any strides"""
        x_max, s = self.made(impl, [(torch.tensor([[[-4.0]]]), torch.tensor([1]))], [torch.tensor([[-1.0]])], 0.5)
        expect_close("x_max and s of one channel", torch.cat((x_max, s)), [4, 2])
        one = [(torch.cat((x, torch.full_like(x, NAN)), 1)[:1], n[:1]) for x, n in self.batches()]
        expect_close("x_max, batches of one", self.made(impl, one, self.weights(), 0.5)[0], self.x_max(one))
        turned = [(x.permute(2, 1, 0).contiguous().permute(2, 1, 0), n) for x, n in self.batches(padding=INF)]
        weights = [w.T.contiguous().T for w in self.weights()]
        x_max, s = self.made(impl, turned, weights, 0.5)
        expect_close("x_max of views", x_max, self.x_max(turned))
        expect_close("s of views", s, self.made(impl, self.batches(), self.weights(), 0.5)[1])

    def test_errors(self, impl):
        """ValueError for an alpha outside of 0 to 1, NaN included, and without a token"""
        for alpha in (-0.1, 1.5, -0.01, 1.01, NAN, INF):
            expect_raises(ValueError, lambda a=alpha: impl(self.batches(), self.weights(), a), f"alpha {alpha}")
        expect_raises(ValueError, lambda: impl([], self.weights(), 0.5), "no batch")
        empty = [(torch.ones(2, 3, 6), torch.tensor([0, 0]))]
        expect_raises(ValueError, lambda: impl(empty, self.weights(), 0.5), "batches of padding alone")

    def test_inputs(self, impl):
        """x, lengths and weights stay as they are"""
        batches, weights = self.batches(padding=NAN), self.weights()
        before = [(x.clone(), n.clone()) for x, n in batches], [w.clone() for w in weights]
        impl(batches, weights, 0.5)
        expect_equal("batches and weights in their lists", (len(batches), len(weights)), (3, 2))
        for (x, n), (x_before, n_before) in zip(batches, before[0], strict=True):
            expect_kept("x", x, x_before)
            expect_equal("lengths", n.tolist(), n_before.tolist())
        for w, w_before in zip(weights, before[1], strict=True):
            expect_kept("a weight", w, w_before)


@exercise("11.4", "fold")
class TestFold:
    H = 6
    ROWS = {
        "q_proj": 6, "k_proj": 2, "v_proj": 2, "gate_proj": 10, "up_proj": 10, "router": 3,
    }  # fmt: skip
    FIRST, SECOND = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "router")

    def layer(self, dtype=torch.float32, bias=False, router=False):
        layer = {}
        for i, norm in enumerate(("input_layernorm", "post_attention_layernorm")):
            layer[f"{norm}.weight"] = random_tensor(self.H, seed=20 + i, dtype=dtype)
            if bias:
                layer[f"{norm}.bias"] = random_tensor(self.H, seed=30 + i, dtype=dtype)
        for i, (name, rows) in enumerate(self.ROWS.items()):
            if name != "router" or router:
                layer[f"{name}.weight"] = random_tensor(rows, self.H, seed=40 + i, dtype=dtype)
            if bias and name != "router":
                layer[f"{name}.bias"] = random_tensor(rows, seed=50 + i, dtype=dtype)
        layer["o_proj.weight"] = random_tensor(self.H, 6, seed=60, dtype=dtype)  # square: a mix-up would not crash
        layer["down_proj.weight"] = random_tensor(self.H, 10, seed=61, dtype=dtype)
        return layer

    def factors(self, seed=0):
        return random_tensor(self.H, seed=70 + seed).exp()

    def made(self, impl, layer, *s):
        got = impl(layer, *s)
        expect(isinstance(got, dict), f"expected a dictionary, got {type(got).__name__}")
        expect_equal("names", sorted(got), sorted(layer))
        for name, x in layer.items():
            expect_tensor(name, got[name], x.dtype, tuple(x.shape))
        return got

    def norm(self, layer, which, x):
        """What a norm gives.  x [T, H]"""
        n = x / x.square().mean(-1, keepdim=True).sqrt()
        return n * layer[f"{which}.weight"].double() + layer.get(f"{which}.bias", torch.zeros(self.H)).double()

    def read(self, layer, name, h):
        rows = layer[f"{name}.weight"].double()
        return h @ rows.T + layer.get(f"{name}.bias", torch.zeros(len(rows))).double()

    def same(self, impl, **options):
        """The layer before and after: norms divided, readers as they were."""
        layer, x = self.layer(**options), random_tensor(5, self.H, seed=80, dtype=torch.float64)
        s = self.factors(0), self.factors(1)
        got = self.made(impl, layer, *s)
        halves = (("input_layernorm", self.FIRST, s[0]), ("post_attention_layernorm", self.SECOND, s[1]))
        for which, readers, factor in halves:
            before, after = self.norm(layer, which, x), self.norm(got, which, x)
            expect_close(f"what {which} gives", after, before / factor.double(), rtol=1e-4)
            for name in readers:
                if f"{name}.weight" in layer:
                    expected = self.read(layer, name, before)
                    expect_close(f"what {name} gives", self.read(got, name, after), expected, atol=1e-5, rtol=1e-4)

    def test_function(self, impl):
        """every reader gives what it gave, and norms give it divided by s"""
        self.same(impl)

    def test_others(self, impl):
        """o_proj and down_proj read no norm, and stay"""
        layer = self.layer()
        got = self.made(impl, layer, self.factors(), self.factors(1))
        for name in ("o_proj.weight", "down_proj.weight"):
            expect_close(name, got[name], layer[name], atol=0, rtol=0)
        layer = self.layer(bias=True)
        for name in ("gate_proj", "up_proj", "down_proj"):  # all of the second half square
            layer[f"{name}.weight"] = layer[f"{name}.weight"][: self.H, : self.H].clone()
            layer[f"{name}.bias"] = random_tensor(self.H, seed=63)
        got = self.made(impl, layer, self.factors(), self.factors(1))
        for name in ("down_proj.weight", "down_proj.bias", "gate_proj.bias", "up_proj.bias"):
            expect_close(f"{name}, square", got[name], layer[name], atol=0, rtol=0)
        expect_close("up_proj.weight, square", got["up_proj.weight"], layer["up_proj.weight"] * self.factors(1))

    def test_router(self, impl):
        """a router reads the second norm"""
        self.same(impl, router=True)

    def test_biases(self, impl):
        """a norm's bias is divided, too; a projection's stays"""
        self.same(impl, bias=True)
        layer = self.layer(bias=True)
        got = self.made(impl, layer, self.factors(), self.factors(1))
        for name in ("q_proj.bias", "v_proj.bias", "up_proj.bias"):
            expect_close(name, got[name], layer[name], atol=0, rtol=0)
        for norm, s in (("input_layernorm", self.factors()), ("post_attention_layernorm", self.factors(1))):
            layer = self.layer(bias=True, router=True)
            expected = layer[f"{norm}.bias"] / s
            for name in [name for name in layer if name.endswith(".bias") and not name.startswith(norm)]:
                del layer[name]
            layer["router.bias"] = random_tensor(3, seed=62)
            got = self.made(impl, layer, self.factors(), self.factors(1))
            expect_close(f"{norm}.bias, the only norm's", got[f"{norm}.bias"], expected)
            expect_close("router.bias", got["router.bias"], layer["router.bias"], atol=0, rtol=0)

    def test_none(self, impl):
        """None leaves that half alone"""
        layer = self.layer(bias=True, router=True)
        whole = self.made(impl, layer, self.factors(), self.factors(1))
        first = ("input_layernorm", *self.FIRST)
        for which in (0, 1):
            s = [self.factors(), self.factors(1)]
            s[which] = None
            got = self.made(impl, layer, *s)
            for name in layer:
                changed = (name.split(".")[0] in first) == (which == 1)
                expected = whole[name] if changed else layer[name]
                expect_close(f"{name}, s {'None, given' if which == 0 else 'given, None'}", got[name], expected, atol=0)
        for name, x in self.made(impl, layer, None, None).items():
            expect_close(f"{name}, s None, None", x, layer[name], atol=0, rtol=0)

    def test_new(self, impl):
        """a new dictionary, even if nothing changes"""
        layer = self.layer()
        for s in ((None, None), (self.factors(), None), (None, self.factors())):
            expect(impl(layer, *s) is not layer, "expected a new dictionary\n  got the one that was given")

    def same_numbers(self, impl, layer, what):
        """Every tensor that changes, computed in fp32 and rounded once to its own dtype."""
        s = self.factors(), self.factors(1)
        got = self.made(impl, layer, *s)
        for name, x in layer.items():
            module, kind = name.split(".")
            factor = s[0 if module in ("input_layernorm", *self.FIRST) else 1].double()
            expected = x
            if module.endswith("layernorm"):
                expected = (x.double() / factor).float().to(x.dtype)
            elif kind == "weight" and module in (*self.FIRST, *self.SECOND):
                expected = (x.double() * factor).float().to(x.dtype)
            half = x.dtype != torch.float32
            expect_close(f"{name}, {what}", got[name], expected, atol=1e-7 if half else 1e-6, rtol=0 if half else 1e-5)

    def test_half(self, impl):
        """fp16 and bf16: dtypes stay, computed in fp32 and rounded once"""
        for dtype in (torch.float16, torch.bfloat16):
            self.same_numbers(impl, self.layer(dtype, bias=True, router=True), dtype)

    def test_mixed(self, impl):
        """each tensor keeps its own dtype, whatever the others have"""
        layer = self.layer(torch.bfloat16, bias=True, router=True)
        for wide in ("layernorm", "router", "q_proj", "up_proj", ".bias"):
            mixed = {name: x.float() if wide in name else x for name, x in layer.items()}
            self.same_numbers(impl, mixed, f"fp32 where {wide!r} is in the name, others bf16")

    def test_inputs(self, impl):
        """the layer, its tensors and s stay as they are"""
        layer, s = self.layer(bias=True, router=True), [self.factors(), self.factors(1)]
        before, s_before = {name: x.clone() for name, x in layer.items()}, [x.clone() for x in s]
        for given in (s, [s[0], None], [None, s[1]]):
            impl(layer, *given)
            expect_equal("names of the input", list(layer), list(before))
            for name, x in before.items():
                expect_kept(name, layer[name], x)
            for x, x_before in zip(s, s_before, strict=True):
                expect_kept("s", x, x_before)
        layer = self.layer(torch.float16, bias=True, router=True)
        before = {name: x.clone() for name, x in layer.items()}
        impl(layer, *s)
        for name, x in before.items():
            expect_kept(f"{name} in fp16", layer[name], x)


# ---- 11.5

ROOM = 4096  # elements of garbage before and behind a tensor: an access without its mask shows, and does no harm


def roomy(x):
    """A copy of x with room around it: 77 for integers, NaN for floats."""
    garbage = NAN if x.is_floating_point() else 77
    whole = torch.full((x.numel() + 2 * ROOM,), garbage, dtype=x.dtype, device=DEVICE)
    return whole[ROOM : ROOM + x.numel()].view(x.shape).copy_(x)


def apart(x, extra=5):
    """The same matrix, rows further apart than they are long, garbage between."""
    garbage = NAN if x.is_floating_point() else 77
    memory = roomy(torch.full((x.shape[0], x.shape[1] + extra), garbage, dtype=x.dtype))
    memory[:, : x.shape[1]] = x
    return memory[:, : x.shape[1]]


def expect_room_untouched(*tensors):
    for t in tensors:
        flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
        around = torch.cat((flat[:ROOM], flat[-ROOM:]))
        kept = around.isnan() if t.is_floating_point() else around == 77
        expect(bool(kept.all()), "memory outside a tensor was written: a store needs its mask")


@exercise("11.5", "int8_matmul_kernel")
class TestInt8Matmul:
    def numbers(self, *shape, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return roomy(torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8))

    def inputs(self, m, n, k):
        """x, w, their scales, a bias"""
        x_scale = roomy(random_tensor(m, seed=3).abs() / 64 + 0.001)
        w_scale = roomy(random_tensor(n, seed=4).abs() / 64 + 0.001)
        return self.numbers(m, k), self.numbers(n, k, seed=1), x_scale, w_scale, roomy(3 * random_tensor(n, seed=5))

    def run(self, impl, x, w, x_scale, w_scale, bias, dtype=torch.float32, blocks=(16, 16, 32)):
        (m, k), n = x.shape, len(w)
        y = roomy(torch.full((m, n), NAN, dtype=dtype))
        sizes = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True))
        grid = (-(-m // blocks[0]), -(-n // blocks[1]))
        try:
            impl[grid](x, w, x_scale, w_scale, bias, y, m, n, k, x.stride(0), w.stride(0), **sizes)
        except Exception as error:
            raise (error.__cause__ or error) from None
        expect_room_untouched(y, x, w)
        return y

    def expected(self, x, w, x_scale, w_scale, bias):
        sums = x.cpu().double() @ w.cpu().double().T
        return sums * x_scale.cpu().double()[:, None] * w_scale.cpu().double() + bias.cpu().double()

    def same(self, impl, x, w, x_scale, w_scale, bias, atol=1e-4, rtol=1e-5, **options):
        expected = self.expected(x, w, x_scale, w_scale, bias)
        expect_close("y", self.run(impl, x, w, x_scale, w_scale, bias, **options), expected, atol=atol, rtol=rtol)

    def test_sums(self, impl):
        """scales of 1, no bias: the sums themselves, one tile of 16 x 16 x 32"""
        x, w, *_ = self.inputs(16, 16, 32)
        one, zero = roomy(torch.ones(16)), roomy(torch.zeros(16))
        self.same(impl, x, w, one, one, zero, atol=0, rtol=0)

    def test_scales(self, impl):
        """a scale for each row of x, and one for each row of w"""
        x, w, x_scale, w_scale, _ = self.inputs(16, 32, 32)
        zero, one = roomy(torch.zeros(32)), roomy(torch.ones(32))
        self.same(impl, x, w, x_scale, one, zero)
        self.same(impl, x, w, one[:16].clone(), w_scale, zero)
        self.same(impl, x, w, x_scale, w_scale, zero)

    def test_bias(self, impl):
        """the bias is added after the scales"""
        self.same(impl, *self.inputs(16, 16, 32))

    def test_grid(self, impl):
        """several tiles and steps: 32 x 64 x 96 in tiles of 16 x 32 x 32, and one row of three tiles"""
        self.same(impl, *self.inputs(32, 64, 96), blocks=(16, 32, 32))
        self.same(impl, *self.inputs(16, 48, 32))

    def test_no_multiples(self, impl):
        """21 x 19 x 45: tiles hang over on all three axes; nothing outside is touched"""
        x, w, x_scale, w_scale, bias = self.inputs(21, 19, 45)
        with footprint(x=x, w=w, x_scale=x_scale, w_scale=w_scale, bias=bias) if INTERPRETED else nullcontext() as seen:
            y = self.run(impl, x, w, x_scale, w_scale, bias)
        expect_close("y", y, self.expected(x, w, x_scale, w_scale, bias), atol=1e-4)
        if INTERPRETED:
            loads = [v for v in seen.loads.values() if v]
            expect(bool(loads), "expected loads of x and w, got none")
            strays = seen.strays - y.numel()  # y is not among the tensors that are watched
            expect(strays <= 0, f"expected no access outside the tensors\n  got {strays} (a mask is missing)")

    def test_strides(self, impl):
        """rows of x and w that lie further apart than they are long"""
        x, w, x_scale, w_scale, bias = self.inputs(18, 20, 40)
        self.same(impl, apart(x), w, x_scale, w_scale, bias)
        self.same(impl, x, apart(w, 9), x_scale, w_scale, bias)
        self.same(impl, apart(x, 9), apart(w, 5), x_scale, w_scale, bias)

    def test_small(self, impl):
        """one row, one column, fewer products than a step has"""
        self.same(impl, *self.inputs(1, 1, 1))
        self.same(impl, *self.inputs(3, 1, 7))

    def test_exact(self, impl):
        """sums beyond 2^24 are exact: two halves that cancel, and what is left is what the small numbers add"""
        block = torch.tensor([127] * 30 + [1, 0], dtype=torch.int8)
        x = roomy(torch.cat((block.repeat(40), block.repeat(40)))[None].repeat(2, 1))
        signs = torch.tensor([127] * 30 + [1, 0], dtype=torch.int8)
        against = torch.tensor([-127] * 30 + [1, 0], dtype=torch.int8)
        w = roomy(torch.cat((signs.repeat(40), against.repeat(40)))[None].repeat(3, 1))
        one, zero = roomy(torch.ones(3)), roomy(torch.zeros(3))
        y = self.run(impl, x, w, one[:2].clone(), one, zero)
        expect_close("80 ones are left of a sum that went to 19,354,840", y, torch.full((2, 3), 80.0), atol=0, rtol=0)

    def test_largest(self, impl):
        """-128 times -128, and a sum that no int16 and no fp16 holds"""
        x = roomy(torch.full((2, 1024), -128, dtype=torch.int8))
        w = roomy(torch.full((3, 1024), -128, dtype=torch.int8))
        scale = roomy(torch.full((3,), 2.0**-8))
        bias = roomy(torch.zeros(3))
        for dtype in (torch.float32, torch.float16):
            y = self.run(impl, x, w, scale[:2].clone(), scale, bias, dtype=dtype)
            expect_close(f"2^24 · 2^-16, y in {dtype}", y, torch.full((2, 3), 256.0), atol=0, rtol=0)

    def test_rounds_once(self, impl):
        """y in fp16: rounded after the bias"""
        x, w = roomy(torch.ones(16, 32, dtype=torch.int8)), roomy(torch.ones(16, 32, dtype=torch.int8))
        x_scale, w_scale = roomy(torch.full((16,), 64.03125)), roomy(torch.ones(16))  # 2,049 in all: fp16 has 2,048
        bias = roomy(torch.full((16,), 0.5))
        y = self.run(impl, x, w, x_scale, w_scale, bias, dtype=torch.float16)
        expect_close("2,049 + 0.5 in fp16", y, torch.full((16, 16), 2050.0), atol=0, rtol=0)
        bias, x_scale = roomy(torch.full((16,), 2049.0)), roomy(torch.full((16,), 2.0**-6))
        y = self.run(impl, x, w, x_scale, w_scale, bias, dtype=torch.float16)
        expect_close("0.5 + 2,049 in fp16", y, torch.full((16, 16), 2050.0), atol=0, rtol=0)
        x, w, x_scale, w_scale, bias = self.inputs(16, 16, 64)
        self.same(impl, x, w, x_scale, w_scale, bias, dtype=torch.float16, atol=1e-3, rtol=6e-4)

    def test_bf16(self, impl):
        """y in bf16: scales and bias come in as fp32, and numbers may be as large as fp16 has none"""
        x, w = roomy(torch.ones(2, 32, dtype=torch.int8)), roomy(torch.ones(3, 32, dtype=torch.int8))
        one, zero = torch.ones(3), torch.zeros(3)
        between = 1 + 2.0**-8  # bf16 has 1 and 1 + 2^-7
        # What is expected is a bf16 number, and y is a little beyond: Triton's interpreter does not round but cuts.
        other = (2 - 2.0**-7) * (1 + 1e-5) / between
        for x_scale, w_scale, bias, expected in (
            (2.0**20 * one, one, zero, 2.0**20),
            (between * one, other * one, zero, 2 - 2.0**-7),
            (other * one, between * one, zero, 2 - 2.0**-7),
            (one, (1e-5 - 2.0**-7) * one, between * one, 1 - 2.0**-8),
        ):
            scales = roomy(x_scale[:2] / 32), roomy(w_scale)
            y = self.run(impl, x, w, *scales, roomy(bias), dtype=torch.bfloat16)
            what = f"32 · {x_scale[0] / 32:g} · {w_scale[0]:g} + {bias[0]:g} in bf16"
            expect_close(what, y, torch.full((2, 3), expected), atol=0, rtol=0)

    def test_inputs(self, impl):
        """x, w, scales and bias stay as they were"""
        inputs = self.inputs(16, 16, 32)
        kept = [t.clone() for t in inputs]
        self.run(impl, *inputs)
        expect(all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True)), "an input was changed")

    def test_traffic(self, impl):
        """reads x once for each column of tiles, w once for each row of tiles (where bytes can be counted)"""
        if not INTERPRETED:
            return
        x, w, x_scale, w_scale, bias = self.inputs(40, 20, 70)
        for x_in, w_in, where in ((x, w, ""), (apart(x), apart(w, 9), ", rows apart")):
            with footprint(x=x_in, w=w_in) as seen:
                self.run(impl, x_in, w_in, x_scale, w_scale, bias)
            expect_equal(f"bytes of x read{where}", seen.bytes_moved("x"), 2 * x.numel())
            expect_equal(f"bytes of w read{where}", seen.bytes_moved("w"), 3 * w.numel())

    @last
    def test_compiles(self, impl):
        """it compiles for a GPU, in tiles of 64 x 64 x 64, with y in fp16"""
        x, w, x_scale, w_scale, bias = self.inputs(64, 64, 128)
        expect_launches_compile(
            lambda: self.same(
                impl, x, w, x_scale, w_scale, bias, dtype=torch.float16, blocks=(64, 64, 64), atol=0.05, rtol=0.01
            )
        )


@exercise("11.6", "Mended")
class TestMended:
    def test_sign(self, impl):
        """factors: a channel whose outlier is negative counts with its size"""
        x = torch.tensor([[[-16.0, 1.0], [4.0, 0.5]], [[1.0, -1.0], [1.0, 0.25]]])
        w = torch.tensor([[-0.25, 1.0], [0.125, -0.5], [0.0, 0.0]])
        for alpha, expected in ((0.5, [8, 1]), (1.0, [16, 1]), (0.0, [4, 1])):
            got = impl.factors(x, w, alpha)
            expect_tensor("s", got, torch.float32, (2,))
            expect_close(f"s, alpha {alpha}", got, expected)

    def test_factors(self, impl):
        """factors: maxima over all tokens of all sequences, and over all rows"""
        x, w = random_tensor(3, 4, 5, seed=1), random_tensor(6, 5, seed=2)
        x_max = [max(abs(v) for sequence in x[..., j].tolist() for v in sequence) for j in range(5)]
        w_max = [max(abs(v) for v in w[:, j].tolist()) for j in range(5)]
        expected = [a**0.7 / b**0.3 for a, b in zip(x_max, w_max, strict=True)]
        expect_close("s, alpha 0.7", impl.factors(x, w, 0.7), expected)
        for b in range(3):
            for i in range(4):
                outlier = x.clone()
                outlier[b, i] = -9
                got = impl.factors(outlier, torch.ones(2, 5), 1.0)
                expect_close(f"s, alpha 1, outliers in token {i} of sequence {b}", got, [9] * 5)
        got = impl.factors(x, w[:5], 0.0)  # w is square
        expect_close("s, alpha 0, w [5, 5]", got, [1 / max(abs(v) for v in w[:5, j].tolist()) for j in range(5)])
        small, other = torch.tensor([[[1e-24, 1e-20, 1.0]]]), torch.tensor([[1e-20, 1.0, 1e-20]])
        got = impl.factors(small, other, 0.5) / small[0, 0].sqrt() * other[0].sqrt()
        expect_close("s · |w|^½ / |x|^½ of small numbers", got, [1, 1, 1], rtol=1e-4)

    def test_scale(self, impl):
        """quantize: a row's largest size over half the number of steps, (2^bits - 1) / 2"""
        rows = torch.tensor([[7.5, -1.0, 0.4], [-1.0, -15.0, 3.0]])
        for bits, scales in ((4, [[1.0], [2.0]]), (8, [[7.5 / 127.5], [15 / 127.5]]), (3, [[7.5 / 3.5], [15 / 3.5]])):
            _, scale = self.quantized(impl, rows, bits)
            expect_close(f"scale, {bits} bits", scale, scales)
        _, scale = self.quantized(impl, torch.tensor([[-15.0, 3.0]]), 4)
        expect_close("scale of a row by itself", scale, [[2.0]])
        q, scale = self.quantized(impl, torch.tensor([[7.5e-20, -1e-20, 0.4e-20]]), 4)
        expect_close("scale of a row of small numbers, times 10^20", scale * 1e20, [[1.0]])
        expect_equal("q of a row of small numbers", q.tolist(), [[7, -1, 0]])

    def quantized(self, impl, rows, bits):
        q, scale = expect_parts(impl.quantize(rows, bits), "q", "scale")
        expect_tensor("q", q, torch.int8, tuple(rows.shape))
        expect_tensor("scale", scale, torch.float32, (len(rows), 1))
        return q, scale

    def test_integers(self, impl):
        """quantize: rounded to the nearest, ties to even, cut to -2^(bits-1) ... 2^(bits-1) - 1"""
        rows = torch.tensor([[7.5, -1.0, 0.4, -6.9, 2.6], [-1.0, 15.0, 3.2, -14.9, 0.0]])
        q, _ = self.quantized(impl, rows, 4)
        expect_equal("q, 4 bits", q.tolist(), [[7, -1, 0, -7, 3], [0, 7, 2, -7, 0]])
        q, _ = self.quantized(impl, torch.tensor([[-7.5, 7.2, 1.0], [-15.0, 14.8, 3.2]]), 4)
        expect_equal("q, 4 bits, -7.5 steps being a tie", q.tolist(), [[-8, 7, 1], [-8, 7, 2]])
        q, _ = self.quantized(impl, torch.tensor([[7.5, 0.5, -0.5, 1.5, -2.5, 4.5]]), 4)
        expect_equal("q, 4 bits, ties", q.tolist(), [[7, 0, 0, 2, -2, 4]])
        for bits in range(2, 9):
            half = (2**bits - 1) / 2
            q, _ = self.quantized(impl, torch.tensor([[half, -1.0], [-2 * half, 2 * half]]), bits)
            last = 2 ** (bits - 1) - 1
            expect_equal(f"q, {bits} bits, the ends", q.tolist(), [[last, -1], [-last - 1, last]])
        for bits in range(2, 9):
            rows = random_tensor(4, 9, seed=bits)
            q, scale = self.quantized(impl, rows, bits)
            expect_close(f"scale, {bits} bits", scale, rows.abs().amax(1, keepdim=True) / ((2**bits - 1) / 2))
            error = float(((q * scale - rows).abs() / scale).max())
            expect(error <= 0.501, f"{bits} bits: expected errors of at most half a scale, got {error:.2f} of one")
        q, _ = self.quantized(impl, torch.tensor([[-1.5, 1.4, 0.1]]), 2)
        expect_equal("q, 2 bits", q.tolist(), [[-2, 1, 0]])

    def test_alone(self, impl):
        """product: what a token gets is the same alone, among others, and whoever comes after it"""
        x, w, s = random_tensor(3, 4, 6, seed=3), random_tensor(5, 6, seed=4), random_tensor(6, seed=5).exp()
        x[0, 3], x[2, 1] = 100 * x[0, 3], 100 * x[2, 1]
        whole = impl.product(x, w, s, 8)
        expect_tensor("y", whole, torch.float32, (3, 4, 5))
        for b, t in ((0, 0), (0, 3), (1, 2), (2, 0)):
            alone = impl.product(x[b : b + 1, t : t + 1].clone(), w, s, 8)
            expect_close(f"y of token {t} of sequence {b}, alone", alone[0, 0], whole[b, t])
        for t in (0, 3):
            column = impl.product(x[:, t : t + 1].clone(), w, s, 8)
            expect_close(f"y of token {t}, one of each sequence", column, whole[:, t : t + 1])

    def expected(self, x, w, s, bits):
        """In fp64, number by number where it matters."""
        half, first, last = (2**bits - 1) / 2, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

        def back(rows):
            scale = rows.abs().amax(-1, keepdim=True) / half
            return (rows / scale).round().clamp(first, last).double() * scale.double()

        return back(x / s) @ back(w * s).T

    def test_product(self, impl):
        """product: x / s by w · s, a scale for each token and each row of w"""
        s = random_tensor(6, seed=8).exp() * 3
        x = led_by_positive(random_tensor(2, 5, 6, seed=6) / s) * s
        w = led_by_positive(random_tensor(7, 6, seed=7) * torch.linspace(0.1, 9, 7)[:, None] * s) / s
        for bits in (4, 8):
            expected = self.expected(x, w, s, bits)
            expect_close(f"y, {bits} bits", impl.product(x, w, s, bits), expected, atol=1e-4)
            got = impl.product(2.0**-60 * x, w, 2.0**-60 * s, bits) * 2.0**60
            expect_close(f"y of small numbers by small factors, times 2^60, {bits} bits", got, expected, atol=1e-4)
            turned = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
            expect_close(f"y of a view, {bits} bits", impl.product(turned, w, s, bits), expected, atol=1e-4)

    def test_near(self, impl):
        """product: with 8 bits it is nearly x times w"""
        x, w, s = random_tensor(2, 3, 64, seed=9), random_tensor(5, 64, seed=10), random_tensor(64, seed=11).exp()
        x, y = x * s, x * s @ w.T  # channels that s makes alike
        error = float((impl.product(x, w, s, 8) - y).norm() / y.norm())
        expect(error < 0.02, f"expected a relative error below 0.02, got {error:.3f}")

    def test_inputs(self, impl):
        """x, w and s stay as they are"""
        inputs = random_tensor(2, 3, 4), random_tensor(5, 4, seed=1), random_tensor(4, seed=2).exp()
        kept = [t.clone() for t in inputs]
        impl.factors(inputs[0], inputs[1], 0.5)
        impl.product(*inputs, 8)
        impl.quantize(inputs[1], 4)
        for name, now, before in zip(("x", "w", "s"), inputs, kept, strict=True):
            expect_kept(name, now, before)


@exercise("11.7", "Int8Cache")
class TestInt8Cache:
    SLOTS, H, D = 9, 3, 8

    def made(self, impl):
        cache = impl(self.SLOTS, self.H, self.D)
        self.stored(cache)
        return cache

    def stored(self, cache):
        for name in ("k", "v"):
            expect_tensor(name, getattr(cache, name, None), torch.int8, (self.SLOTS, self.H, self.D))
            scale = getattr(cache, f"{name}_scale", None)
            expect_tensor(f"{name}_scale", scale, torch.float32, (self.SLOTS, self.H))

    def rows(self, n, seed=0, dtype=torch.float32):
        """Keys and values whose sizes differ from token to token and from head to head."""
        sizes = torch.linspace(0.1, 20, n)[:, None, None] * torch.tensor([1.0, 30.0, 0.01])[:, None]
        shape = (n, self.H, self.D)
        return [led_by_positive(random_tensor(*shape, seed=seed + i) * sizes).to(dtype) for i in (0, 1)]

    def expect_rows(self, cache, slots, k, v):
        """What the slots hold, head by head."""
        self.stored(cache)
        for name, x in (("k", k), ("v", v)):
            x = x.float()
            scale = x.abs().amax(-1) / 127.5
            scale = torch.where(scale == 0, 1.0, scale)
            expected = (x / scale[..., None]).round().clamp(-128, 127)
            expect_close(f"{name}_scale of slots {slots}", getattr(cache, f"{name}_scale")[slots], scale)
            expect_close(f"{name} of slots {slots}", getattr(cache, name)[slots], expected)

    def test_scales(self, impl):
        """each head of each token has a scale of its own: its largest size over 127.5"""
        cache, (k, v) = self.made(impl), self.rows(4)
        k[1, 0], v[2, 2] = -k[1, 0], -v[2, 2]  # a largest number that is negative
        cache.write(k, v, torch.tensor([0, 1, 2, 3]))
        for name, x in (("k", k), ("v", v)):
            expected = x.abs().amax(-1) / 127.5
            expect_close(f"{name}_scale", getattr(cache, f"{name}_scale")[:4], expected)

    def test_numbers(self, impl):
        """numbers are rounded to the nearest, ties to even; the largest is cut to 127"""
        cache = impl(2, 1, 4)
        k = torch.tensor([[[127.5, 2.6, -1.4, 0.2]], [[255.0, 2.6, -127.0, 0.0]]])
        cache.write(k, 2 * k, torch.tensor([1, 0]))
        expect_equal("k", cache.k[:, 0].tolist(), [[127, 1, -64, 0], [127, 3, -1, 0]])
        expect_equal("v", cache.v[:, 0].tolist(), [[127, 1, -64, 0], [127, 3, -1, 0]])
        expect_close("v_scale", cache.v_scale, [[4.0], [2.0]])
        ties = torch.tensor([[[127.5, 2.5, -0.5, 1.5]], [[-255.0, 5.0, 1.0, 255.0]]])
        cache.write(ties, ties, torch.tensor([0, 1]))
        expect_equal("k, ties", cache.k[:, 0].tolist(), [[127, 2, 0, 2], [-128, 2, 0, 127]])

    def test_slots(self, impl):
        """rows go to their slots, in any order; later ones replace what was there; others stay"""
        cache, (k, v) = self.made(impl), self.rows(5)
        cache.write(k, v, torch.tensor([7, 0, 3, 8, 2]))
        self.expect_rows(cache, [7, 0, 3, 8, 2], k, v)
        more = [100 * x for x in self.rows(2, seed=5)]
        cache.write(*more, torch.tensor([3, 1]))
        self.expect_rows(cache, [3, 1], *more)
        others = [0, 1, 3, 4]
        self.expect_rows(cache, [7, 0, 8, 2], k[others], v[others])

    def test_not_kept(self, impl):
        """a token of slot -1 is not kept, and the last slot stays"""
        cache, (k, v) = self.made(impl), self.rows(3)
        cache.write(k[:2], v[:2], torch.tensor([8, 0]))
        cache.write(k, v, torch.tensor([-1, -1, 4]))
        self.expect_rows(cache, [8, 0, 4], k, v)
        cache.write(2 * k, 2 * v, torch.tensor([-1, -1, -1]))
        self.expect_rows(cache, [8, 0, 4], k, v)
        cache.write(k[:0], v[:0], torch.empty(0, dtype=torch.int64))
        self.expect_rows(cache, [8, 0, 4], k, v)
        cache = self.made(impl)
        names = "k", "v", "k_scale", "v_scale"
        before = [getattr(cache, name).clone() for name in names]
        cache.write(k, v, torch.tensor([-1, -1, -1]))
        for name, x in zip(names, before, strict=True):
            same = torch.equal(getattr(cache, name).nan_to_num(), x.nan_to_num())
            expect(same, f"{name} of a new cache was changed by tokens of slot -1, which are not kept")

    def test_zeros(self, impl):
        """a head of zeros has scale 1, and is zeros; a head of small numbers has a small scale"""
        cache, (k, v) = self.made(impl), self.rows(2)
        for _ in range(2):  # into new slots, and in place of other rows
            cache.write(5 + k, 5 + v, torch.tensor([6, 5]))
            k[0, 1], v[1, 2] = 0, 0
            cache.write(k, v, torch.tensor([5, 6]))
            self.expect_rows(cache, [5, 6], k, v)
        cache.write(1e-20 * k, 1e-20 * v, torch.tensor([5, 6]))
        for name, x in (("k", k), ("v", v)):
            got, size = getattr(cache, f"{name}_scale")[[5, 6]], x.abs().amax(-1)
            expected = torch.where(size == 0, 1.0, size / 127.5)
            got = torch.where(size == 0, got, got * 1e20)
            expect_close(f"{name}_scale of small numbers, times 10^20", got, expected)

    def attention(self, q, k, v):
        """Head by head, in fp64.  k, v [S, H, D]"""
        groups, out = len(q) // k.shape[1], []
        for h, row in enumerate(q.double()):
            keys, values = k[:, h // groups].double(), v[:, h // groups].double()
            out.append((keys @ row / row.numel() ** 0.5).softmax(0) @ values)
        return torch.stack(out)

    def back(self, cache, slots):
        return [
            getattr(cache, name)[slots].double() * getattr(cache, f"{name}_scale")[slots].double()[..., None]
            for name in ("k", "v")
        ]

    def test_attends(self, impl):
        """attention over the slots that are named, and no others; keys and values with their own scales"""
        cache, (k, v) = self.made(impl), self.rows(7, seed=2)
        cache.write(k / 30, v, torch.tensor([0, 1, 2, 3, 4, 5, 8]))
        q = random_tensor(self.H, self.D, seed=9)
        for slots in ([0, 1, 2, 3, 4, 5, 8], [5, 0, 3], [8], [2, 1]):
            got = cache.attend(q, torch.tensor(slots))
            expect_tensor("what attend gives", got, torch.float32, (self.H, self.D))
            expected = self.attention(q, *self.back(cache, slots))
            expect_close(f"attention over slots {slots}", got, expected, atol=1e-4, rtol=1e-4)

    def test_groups(self, impl):
        """query head h reads key/value head h // G"""
        cache, (k, v) = self.made(impl), self.rows(4, seed=4)
        cache.write(k / 30, v, torch.tensor([1, 2, 3, 4]))
        for groups in (2, 5):
            q = random_tensor(self.H * groups, self.D, seed=groups)
            got = cache.attend(q, torch.tensor([4, 2, 1]))
            expect_tensor("what attend gives", got, torch.float32, (self.H * groups, self.D))
            expected = self.attention(q, *self.back(cache, [4, 2, 1]))
            expect_close(f"attention, {groups} query heads a key head", got, expected, atol=1e-4, rtol=1e-4)

    def test_sizes(self, impl):
        """any number of slots, heads and features, and any strides"""
        for slots, heads, dim, groups in ((1, 1, 1, 3), (21, 1, 6, 4), (12, 4, 3, 1), (2, 2, 16, 2)):
            cache = impl(slots, heads, dim)
            k, v = (random_tensor(heads, slots, dim, seed=i).transpose(0, 1) for i in (20, 21))
            cache.write(k, v, torch.arange(slots).flip(0))
            q = random_tensor(dim, heads * groups, seed=22).T
            got = cache.attend(q, torch.arange(slots))
            what = f"{slots} slots, {heads} heads of {dim} features, {groups} query heads each"
            expect_tensor(what, got, torch.float32, (heads * groups, dim))
            expected = self.attention(q, *self.back(cache, list(range(slots))))
            expect_close(f"attention, {what}", got, expected, atol=1e-4, rtol=1e-4)
            expect_close(f"what was written, {what}", self.back(cache, list(range(slots)))[0], k.flip(0), atol=0.02)

    def test_again(self, impl):
        """what is written between two reads is seen by the second"""
        cache, q, slots = self.made(impl), random_tensor(6, self.D, seed=9), torch.tensor([2, 5, 1])
        for seed in (30, 40):
            k, v = self.rows(3, seed=seed)
            cache.write(k / 30, v, slots)
            got, expected = cache.attend(q, slots), self.attention(q, *self.back(cache, [2, 5, 1]))
            expect_close("attention after a write", got, expected, atol=1e-4, rtol=1e-4)

    def test_near(self, impl):
        """what it attends to is nearly what was written"""
        cache, (k, v) = self.made(impl), [random_tensor(6, self.H, self.D, seed=i) for i in (6, 7)]
        cache.write(k, v, torch.arange(6))
        q = random_tensor(6, self.D, seed=8)
        expect_close("attention", cache.attend(q, torch.arange(6)), self.attention(q, k, v), atol=0.03, rtol=0.03)

    def test_half(self, impl):
        """fp16 and bf16 rows and queries are computed with in fp32"""
        for dtype in (torch.float16, torch.bfloat16):
            cache, (k, v) = self.made(impl), self.rows(4, seed=10, dtype=dtype)
            k[0, 0] *= 3000  # q · k is beyond fp16
            cache.write(k, v, torch.arange(4))
            self.expect_rows(cache, [0, 1, 2, 3], k, v)
            q = (30 * random_tensor(self.H, self.D, seed=11)).to(dtype)
            got = cache.attend(q, torch.arange(4))
            expect_tensor("what attend gives", got, torch.float32, (self.H, self.D))
            expected = self.attention(q, *self.back(cache, [0, 1, 2, 3]))
            expect_close(f"attention, {dtype}", got, expected, atol=1e-4, rtol=1e-3)

    def test_dtypes(self, impl):
        """fp64 rows and queries, and keys in another dtype than values"""
        cache = self.made(impl)
        for k_dtype, v_dtype in (
            (torch.float64, torch.float64), (torch.float16, torch.float32), (torch.float32, torch.bfloat16),
        ):  # fmt: skip
            k, v = self.rows(4, seed=12)
            k, v = k.to(k_dtype), v.to(v_dtype)
            cache.write(k, v, torch.tensor([3, 0, 5, 6]))
            self.expect_rows(cache, [3, 0, 5, 6], k, v)
            q = random_tensor(self.H, self.D, seed=11, dtype=k_dtype) / 30
            got = cache.attend(q, torch.tensor([0, 5, 6]))
            expect_tensor("what attend gives", got, torch.float32, (self.H, self.D))
            expected = self.attention(q, *self.back(cache, [0, 5, 6]))
            expect_close(f"attention, q in {k_dtype}", got, expected, atol=1e-4, rtol=1e-3)

    def test_inputs(self, impl):
        """k, v, q and slots stay as they are"""
        for dtype in (torch.float32, torch.float64, torch.float16):
            cache, (k, v), q = self.made(impl), self.rows(3, dtype=dtype), random_tensor(6, self.D, dtype=dtype)
            slots = torch.tensor([2, -1, 0])
            kept = [t.clone() for t in (k, v, q)]
            cache.write(k, v, slots)
            cache.attend(q, slots[::2])
            for name, now, before in zip(("k", "v", "q"), (k, v, q), kept, strict=True):
                expect_kept(name, now, before)
            expect_equal("slots", slots.tolist(), [2, -1, 0])

    def test_apart(self, impl):
        """two caches share nothing"""
        one, other = self.made(impl), self.made(impl)
        k, v = self.rows(2)
        one.write(k, v, torch.tensor([0, 1]))
        other.write(5 * k, 5 * v, torch.tensor([0, 1]))
        self.expect_rows(one, [0, 1], k, v)


@exercise("11.8", "rotate")
class TestRotate:
    def matrix(self, size):
        """H / √size, number by number: the sign is that of the bits which i and j share."""
        signs = [[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
        return torch.tensor(signs, dtype=torch.float64) / size**0.5

    def expected(self, x, size):
        return (x.double().unflatten(-1, (-1, size)) @ self.matrix(size)).flatten(-2)

    def test_by_hand(self, impl):
        """size 2: (a + b, a - b) / √2; size 4: the rows of H₄ over 2"""
        expect_close("(3, 1)", impl(torch.tensor([3.0, 1.0]), 2), [4 / 2**0.5, 2 / 2**0.5])
        expect_close("rows of the identity, size 4", 2 * impl(torch.eye(4), 4), self.matrix(4) * 2)

    def test_sizes(self, impl):
        """sizes 1 to 512"""
        for size in (1, 2, 8, 16, 64, 128, 512):
            x = random_tensor(5, size, seed=size)
            got = impl(x, size)
            expect_tensor(f"size {size}", got, torch.float32, (5, size))
            expect_close(f"size {size}", got, self.expected(x, size), atol=1e-5)
        x = random_tensor(3, 7, seed=8)
        expect_close("size 1, seven neighbors", impl(x, 1), x)

    def test_groups(self, impl):
        """every `size` neighbors by themselves"""
        x = random_tensor(3, 48, seed=1)
        for size in (2, 4, 16):
            expect_close(f"48 in groups of {size}", impl(x, size), self.expected(x, size), atol=1e-5)

    def test_keeps(self, impl):
        """lengths stay, turning twice gives x back, and x Wᵀ stays when both are turned"""
        x, w = random_tensor(4, 32, seed=2), random_tensor(7, 32, seed=3)
        turned = impl(x, 32)
        expect_close("lengths", turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
        expect_close("twice", impl(turned, 32), x, atol=1e-5)
        expect_close("x Wᵀ", turned @ impl(w, 32).T, x @ w.T, atol=1e-4)

    def test_dimensions(self, impl):
        """any number of dimensions, any strides"""
        x = random_tensor(2, 3, 4, 8, seed=4)
        expect_close("four dimensions", impl(x, 8), self.expected(x, 8), atol=1e-5)
        expect_close("one", impl(x[0, 0, 0], 4), self.expected(x[0, 0, 0], 4), atol=1e-5)
        turned = random_tensor(8, 5, seed=5).T
        expect_close("a transposed view", impl(turned, 4), self.expected(turned, 4), atol=1e-5)
        for dtype in (torch.float32, torch.float16, torch.float64):
            for view in (x.permute(0, 3, 1, 2), x[..., ::2], x[:, 1:, :, :4], x[:1, :1].expand(3, 2, 4, 8)):
                got = impl(view.to(dtype), 4)
                expected = self.expected(view.to(dtype), 4)
                expect_close(f"a view in {dtype}", got, expected, atol=1e-5, rtol=2**-11)
        expect_tensor("no rows", impl(torch.zeros(0, 8), 8), torch.float32, (0, 8))

    def test_dtypes(self, impl):
        """fp16 and bf16 in fp32, rounded once; fp64 in fp64"""
        for dtype in (torch.float16, torch.bfloat16):
            x = (300 * random_tensor(3, 64, seed=6)).to(dtype)
            x[0] = 30000  # sums beyond fp16
            got = impl(x[1:], 64)
            expect_tensor(f"{dtype}", got, dtype, (2, 64))
            expected = self.expected(x[1:], 64)
            expect_close(f"{dtype}", got, expected, atol=0.01, rtol=2**-8 if dtype == torch.bfloat16 else 2**-11)
            got, expected = impl(x[1:], 32), self.expected(x[1:], 32)  # the root is no power of 2
            rtol = 2**-8 if dtype == torch.bfloat16 else 2**-11
            expect_close(f"{dtype}, size 32", got, expected, atol=0.01, rtol=rtol)
            x[0, 1::2] = -30000
            expect_close(f"sums beyond {dtype}", impl(x[:1, :4], 4)[0, 1], 2 * x[0, 0].double(), atol=0, rtol=1e-3)
        x = random_tensor(3, 64, seed=7, dtype=torch.float64)
        got = impl(x, 64)
        expect_tensor("fp64", got, torch.float64, (3, 64))
        for size in (64, 32):  # one whose root is no whole number
            expect_close(f"fp64, size {size}", impl(x, size), self.expected(x, size), atol=1e-12, rtol=1e-12)

    def test_errors(self, impl):
        """ValueError for a size that is no power of 2, and for one that does not divide K"""
        for k, size in ((12, 12), (12, 3), (12, 6), (12, 8), (8, 16), (8, 0), (8, -2)):
            expect_raises(ValueError, lambda k=k, size=size: impl(torch.ones(24, k), size), f"K = {k}, size {size}")

    def test_input(self, impl):
        """x stays as it is"""
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            x = random_tensor(3, 64, dtype=dtype)
            before = x.clone()
            for view in (x, x[0], x.T[:32], x.view(3, 8, 8)):
                for size in (1, 2, view.shape[-1] if view.shape[-1] != 3 else 1):
                    if view.shape[-1] % size == 0:
                        impl(view, size)
                        expect_kept(f"x in {dtype}", x, before)
