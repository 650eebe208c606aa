"""Checks of exercises 12: what LoRA trains and takes, scales, the layer, merging, gathered products, a plan of blocks,
a reader with four bugs, names of blocks.
"""

import builtins
import copy
import math
import random
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from minillm.learn.testing import exercise, expect, expect_close, expect_equal, expect_parts, expect_raises, is_stub

NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random_tensor(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def apart(x):
    """x with strides of its own: every second number of a larger tensor, along the last axis."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 1e3, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def expect_tensor(what, got, dtype, shape):
    expect(isinstance(got, torch.Tensor), f"{what}: expected a tensor, got {type(got).__name__}")
    expect_equal(f"{what}: dtype", got.dtype, dtype)
    expect_equal(f"{what}: shape", tuple(got.shape), shape)


def expect_bits(what, got, expected):
    """Hold that two tensors are equal, where NaN equals NaN."""
    at = ((got != expected) & ~(got.isnan() & expected.isnan())).nonzero()
    if len(at):
        first = tuple(at[0].tolist())
        expect(False, f"{what}: expected {expected[first].item()!r} at {first}\n  got {got[first].item()!r}")


def expect_same_bits(what, got, expected):
    """Hold that two tensors are equal to the bit: 0 and -0 are not."""
    expect_bits(what, got, expected)
    expect_equal(f"{what}: signs", torch.signbit(got).int().tolist(), torch.signbit(expected).int().tolist())


def expect_rounded(what, got, exact):
    """Hold that `got` is `exact` (fp64), computed in fp32 and rounded once to got's dtype."""
    unit = torch.finfo(got.dtype).eps / 2
    expect_close(what, got.double(), exact, atol=1e-5, rtol=1.02 * unit + 1e-5)


# ---- 12.1


@exercise("12.1", "budget")
class TestBudget:
    SHAPES = {"q_proj": (6, 6), "k_proj": (2, 6), "down_proj": (6, 16), "up_proj": (16, 6)}  # 36 + 12 + 96 + 96 = 240
    NAMES = "numbers trained", "bytes of full fine-tuning", "bytes of LoRA"

    def parts(self, impl, *args):
        return expect_parts(impl(*args), *self.NAMES)

    def same(self, i, got, expected):
        expect_close(self.NAMES[i], got[i], expected, atol=0, rtol=1e-12)

    def test_trained(self, impl):
        """A has r · K numbers and B N · r, in every layer"""
        got = self.parts(impl, self.SHAPES, 1, 0, {"k_proj"}, 3, 32)
        expect_equal(self.NAMES[0], got[0], 3 * (2 + 6))
        got = self.parts(impl, self.SHAPES, 5, 100, {"k_proj", "down_proj", "q_proj"}, 4, 32)
        expect_equal(self.NAMES[0], got[0], 5 * 4 * (8 + 22 + 12))

    def test_full(self, impl):
        """full fine-tuning: 16 bytes for each parameter, `rest` once"""
        self.same(1, self.parts(impl, self.SHAPES, 5, 77, {"q_proj"}, 4, 16), 16 * (5 * 240 + 77))

    def test_lora(self, impl):
        """LoRA: the whole model in base_bits, all matrices and the rest, and 16 bytes for each number of A and B"""
        for bits in (32, 16, 8, 4):
            got = self.parts(impl, self.SHAPES, 5, 77, {"q_proj", "up_proj"}, 2, bits)
            self.same(2, got, (5 * 240 + 77) * bits / 8 + 16 * 5 * 2 * (12 + 22))

    def test_odd(self, impl):
        """4 bits of an odd number of parameters: half a byte is not lost"""
        self.same(2, self.parts(impl, {"w": (3, 1)}, 1, 0, {"w"}, 1, 4), 1.5 + 64)

    def test_smollm2(self, impl):
        """SmolLM2-135M, r = 8 at all seven matrices"""
        shapes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576), "gate": (1536, 576),
                  "up": (1536, 576), "down": (576, 1536)}  # fmt: skip
        rest = 49152 * 576 + 61 * 576
        got = self.parts(impl, shapes, 30, rest, set(shapes), 8, 16)
        expect_equal(self.NAMES[0], got[0], 2_442_240)
        self.same(1, got, 16 * 134_515_008)
        self.same(2, got, 2 * 134_515_008 + 16 * 2_442_240)

    def test_bounds(self, impl):
        """no target trains nothing, one parameter more or less counts, and r may be larger than a side"""
        got = self.parts(impl, self.SHAPES, 2, 1, set(), 4, 32)
        expect_equal(self.NAMES[0], got[0], 0)
        self.same(2, got, 4 * 481)
        expect_equal(self.NAMES[0], self.parts(impl, self.SHAPES, 2, 1, {"k_proj"}, 64, 32)[0], 2 * 64 * 8)

    def test_unknown(self, impl):
        """a target that no matrix has is a ValueError, beside others too"""
        known = {"q_proj", "k_proj", "up_proj"}
        for targets in ({"qkv_proj"}, {"q_proj", "v_proj"}, {"q"}, {"proj"}, {*known, "o_proj"}, {*known, "Q_PROJ"}):
            expect_raises(ValueError, lambda t=targets: impl(self.SHAPES, 2, 1, t, 4, 32), f"targets {targets}")

    def test_exact_names(self, impl):
        """a target is that matrix alone, not all whose names begin with it, end in it, or have it inside"""
        shapes = {"proj": (1, 2), "q_proj": (4, 8), "proj_q": (16, 32), "q_proj_q": (64, 128)}
        for name, (n, k) in shapes.items():
            got = self.parts(impl, dict(shapes), 1, 0, {name}, 1, 16)
            expect_equal(f"{self.NAMES[0]}, target {name}", got[0], n + k)

    def test_large(self, impl):
        """a model whose parameters no int32 counts"""
        shapes = {"up": (28672, 8192), "down": (8192, 28672)}
        got = self.parts(impl, shapes, 80, 12345, {"up"}, 8, 4)
        expect_equal(self.NAMES[0], got[0], 80 * 8 * (28672 + 8192))
        whole = 80 * 2 * 28672 * 8192 + 12345
        self.same(1, got, 16 * whole)
        self.same(2, got, whole / 2 + 16 * got[0])

    def test_inputs(self, impl):
        """shapes and targets stay as they are"""
        shapes, targets = dict(self.SHAPES), {"q_proj", "k_proj"}
        impl(shapes, 2, 1, targets, 4, 32)
        expect_equal("shapes", shapes, self.SHAPES)
        expect_equal("targets", sorted(targets), ["k_proj", "q_proj"])


# ---- 12.2


Q = "model.layers.3.self_attn.q_proj"


@exercise("12.2", "scale_of")
class TestScaleOf:
    def same(self, impl, config, expected, name=Q):
        before = copy.deepcopy(config)
        r, scale = expect_parts(impl(name, config), "rank", "scale")
        what = f"{name}, {config}"
        expect_equal(f"rank, {what}", r, expected[0])
        expect_close(f"scale, {what}", scale, expected[1])
        expect_equal("the config, afterwards", config, before)

    def test_plain(self, impl):
        """alpha / r"""
        self.same(impl, {"r": 16, "lora_alpha": 8}, (16, 0.5))
        self.same(impl, {"r": 4, "lora_alpha": 6.5, "lora_dropout": 0.1, "peft_type": "LORA"}, (4, 1.625))
        self.same(impl, {"r": 64, "lora_alpha": 0.1}, (64, 0.0015625))

    def test_others(self, impl):
        """other keys do not matter, whatever they say"""
        others = {"target_modules": ["k_proj"], "layers_to_transform": [0], "fan_in_fan_out": True, "use_dora": True,
                  "peft_type": "IA3", "bias": "all", "modules_to_save": ["lm_head"], "merge_weights": True,
                  "inference_mode": True, "exclude_modules": ["q_proj"], "lora_dropout": 0.5, "rank": 2}  # fmt: skip
        self.same(impl, {"r": 16, "lora_alpha": 8, **others}, (16, 0.5))
        self.same(impl, {"lora_alpha": 8, "rank_pattern": {"q_proj": 2}, **others}, (2, 4.0))

    def test_rslora(self, impl):
        """alpha over the root of r"""
        self.same(impl, {"r": 16, "lora_alpha": 8, "use_rslora": True}, (16, 2.0))
        self.same(impl, {"r": 16, "lora_alpha": 8, "use_rslora": False}, (16, 0.5))

    def test_own(self, impl):
        """the module's own r is in the scale, with the config's alpha; its own alpha over the config's r"""
        self.same(impl, {"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 32}}, (32, 0.5))
        self.same(impl, {"r": 8, "lora_alpha": 16, "alpha_pattern": {"q_proj": 4}}, (8, 0.5))
        both = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 2}}
        self.same(impl, {"r": 8, "lora_alpha": 16, **both}, (4, 0.5))
        self.same(impl, {"r": 8, "lora_alpha": 16, "use_rslora": True, **both}, (4, 1.0))

    def test_apart(self, impl):
        """ranks and alphas are looked up apart: other keys match, in another order"""
        config = {"r": 8, "lora_alpha": 16, "rank_pattern": {"k_proj": 2, "q_proj": 4},
                  "alpha_pattern": {r"layers\.3\..*": 12, "q_proj": 1}}  # fmt: skip
        self.same(impl, config, (4, 3.0))
        self.same(impl, config, (2, 6.0), Q.replace("q_proj", "k_proj"))
        self.same(impl, config, (8, 2.0), "model.layers.4.mlp.up_proj")

    def test_first(self, impl):
        """of several keys that match the first counts, not the longest, largest or last"""
        for keys in (("q_proj", Q), (Q, "q_proj"), (".*", "q_proj"), ("self_attn.q_proj", "q_proj"), ("q_proj", ".*")):
            for ranks in ((4, 32), (32, 4)):
                config = {"rank_pattern": dict(zip(keys, ranks, strict=True)), "lora_alpha": 8}
                self.same(impl, config, (ranks[0], 8 / ranks[0]))
                self.same(impl, {"alpha_pattern": config["rank_pattern"], "r": 8}, (8, ranks[0] / 8))

    def test_ends(self, impl):
        """a key matches the whole name, or an end of it that begins after a dot"""
        for key in (Q, "q_proj", "self_attn.q_proj", "layers.3.self_attn.q_proj", "3.self_attn.q_proj"):
            self.same(impl, {"rank_pattern": {key: 2}}, (2, 4.0))
        for key in ("proj", "_proj", "attn.q_proj", "self_attn", "model", "layers.3", "q_pro", "model.layers.3",
                    "yers.3.self_attn.q_proj", "self_attn.q", "", ".q_proj"):  # fmt: skip
            self.same(impl, {"rank_pattern": {key: 2}}, (8, 1.0))
        self.same(impl, {"rank_pattern": {"3.self_attn.q_proj": 2}}, (8, 1.0), "model.layers.13.self_attn.q_proj")
        self.same(impl, {"rank_pattern": {"q_proj": 2}}, (8, 1.0), "model.layers.3.self_attn.q_proj.base")
        self.same(impl, {"rank_pattern": {"lm_head": 2}}, (2, 4.0), "lm_head")
        self.same(impl, {"rank_pattern": {"head": 2}}, (8, 1.0), "lm_head")

    def test_regular(self, impl):
        """a key is a regular expression: alternatives, classes, wildcards"""
        for key in ("q_proj|k_proj", "k_proj|q_proj", "[qkv]_proj", r"layers\.[0-3]\..*", ".*", r"\w+", ".*attn.*proj",
                    r"(q|k)_proj", r"model\.layers\.(1|3)\.self_attn\.q_proj", "q_proj|", "q_proj$",
                    "q|q_proj", "|q_proj", r"^model\..*", "^" + Q, r"layers\.\d+\.self_attn\.(q|q_proj)"):  # fmt: skip
            self.same(impl, {"alpha_pattern": {key: 2}}, (8, 0.25))
        for key in ("k_proj|v_proj", "[kv]_proj", r"layers\.[4-9]\..*", "v_proj|proj", "proj|v_proj", "Q_PROJ",
                    "self_attn|k_proj", r"model\.q_proj"):  # fmt: skip
            self.same(impl, {"alpha_pattern": {key: 2}}, (8, 1.0))
        self.same(impl, {"rank_pattern": {"q.proj": 2}}, (2, 4.0))
        self.same(impl, {"rank_pattern": {"wqkv": 2}}, (8, 1.0), "transformer.blocks.0.attn.Wqkv")
        self.same(impl, {"rank_pattern": {"Wqkv": 512}}, (512, 8 / 512), "transformer.blocks.0.attn.Wqkv")

    def test_missing(self, impl):
        """what is missing or null is PEFT's default"""
        self.same(impl, {}, (8, 1.0))
        self.same(impl, {"r": 16}, (16, 0.5))
        self.same(impl, {"lora_alpha": 32}, (8, 4.0))
        self.same(impl, {"use_rslora": True}, (8, 8 / math.sqrt(8)))
        nulls = dict.fromkeys(("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"))
        self.same(impl, nulls, (8, 1.0))
        self.same(impl, {**nulls, "r": 4, "rank_pattern": {}}, (4, 2.0))

    def test_zero(self, impl):
        """an alpha of 0 is a scale of 0, not the default"""
        self.same(impl, {"r": 16, "lora_alpha": 0}, (16, 0.0))
        self.same(impl, {"r": 16, "lora_alpha": 4, "alpha_pattern": {"q_proj": 0, ".*": 3}}, (16, 0.0))


# ---- 12.3


class Made(TorchDispatchMode):
    """Notes the most numbers that any new tensor has, and those of all of them: views are none."""

    def __init__(self):
        super().__init__()
        self.most = self.all = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor) and not any(x is arg for arg in args):
                    self.most = max(self.most, x.numel())
                    self.all += x.numel()
        return out


@exercise("12.3", "LoraLinear")
class TestLoraLinear:
    N_IN, N_OUT, R = 12, 7, 3

    def frozen(self, dtype=torch.float32, bias=True):
        w = random_tensor(self.N_OUT, self.N_IN, seed=1, dtype=dtype)
        return w, random_tensor(self.N_OUT, seed=2, dtype=dtype) if bias else None

    def made(self, impl, w, bias, r=R, alpha=5.0, **options):
        """A layer whose b is not 0."""
        layer = impl(w, bias, r, alpha, **options)
        for name, shape in (("a", (r, w.shape[1])), ("b", (w.shape[0], r))):
            expect_tensor(f"layer.{name}", getattr(layer, name, None), torch.float32, shape)
            expect(isinstance(getattr(layer, name), nn.Parameter), f"layer.{name}: expected an nn.Parameter")
        with torch.no_grad():
            layer.b.copy_(random_tensor(w.shape[0], r, seed=3))
        return layer

    def exact(self, layer, w, bias, x, scale):
        y = x.double() @ w.detach().double().T + scale * (x.double() @ layer.a.double().T) @ layer.b.double().T
        return (y if bias is None else y + bias.double()).detach()

    def backward(self, loss):
        expect(loss.requires_grad, "layer(x): expected a result with a gradient, got one without")
        try:
            loss.backward()
        except RuntimeError as e:
            said = str(e).split(":", maxsplit=1)[0]
            expect(False, f"layer(x).sum().backward(): expected gradients\n  got {said}")

    def test_begins(self, impl):
        """a new layer computes what the frozen one does: b is 0"""
        w, bias = self.frozen()
        x = random_tensor(5, self.N_IN, seed=4)
        layer = impl(w, bias, self.R, 5.0)
        expect_close("layer(x)", layer(x), x @ w.T + bias)
        expect_bits("layer.b", layer.b.detach(), torch.zeros(self.N_OUT, self.R))

    def test_drawn(self, impl):
        """a is uniform from -1/√K to 1/√K, drawn by torch's global generator"""
        w = torch.zeros(5, 400)
        torch.manual_seed(11)
        one, two = impl(w, None, 30, 4).a.detach(), impl(w, None, 30, 4).a.detach()
        torch.manual_seed(11)
        again = impl(w, None, 30, 4).a.detach()
        expect(not torch.equal(one, two), "a: expected other numbers in another layer, got the same")
        expect(torch.equal(one, again), "a: expected the same numbers after the same torch.manual_seed, got others")
        for a, bound in ((one, 1 / 20), (impl(torch.zeros(400, 25), None, 300, 4).a.detach(), 1 / 5)):
            expect(float(a.abs().max()) <= bound, f"a: expected sizes up to {bound}, got {float(a.abs().max()):.4f}")
            expect_close("a: share below half of the bound", (a.abs() < bound / 2).float().mean(), 0.5, atol=0.03)
            expect_close("a: share above 0", (a > 0).float().mean(), 0.5, atol=0.03)
            expect_close("a: the largest, over the bound", a.max() / bound, 1, atol=0.01)
        for dtype in DTYPES[1:]:
            a = impl(w.to(dtype), None, 30, 4).a.detach()
            coarse = float((a == a.to(dtype)).float().mean())
            expect(coarse < 0.5, f"a, weight {dtype}: expected numbers drawn in fp32\n  got numbers of {dtype}")

    def test_forward(self, impl):
        """x Wᵀ + bias + alpha / r · (x Aᵀ) Bᵀ, with and without a bias"""
        x = random_tensor(5, self.N_IN, seed=4)
        for r, alpha in ((3, 5.0), (1, 2.0), (9, 3), (32, 2.5), (128, 64), (4, 0)):
            for bias in (True, False):
                w, bias = self.frozen(bias=bias)
                layer = self.made(impl, w, bias, r, alpha)
                expect_close(f"layer(x), r {r}, alpha {alpha}", layer(x), self.exact(layer, w, bias, x, alpha / r))

    def test_rslora(self, impl):
        """with rslora the scale is alpha over √r"""
        (w, bias), x = self.frozen(), random_tensor(5, self.N_IN, seed=4)
        layer = self.made(impl, w, bias, 4, 5.0, rslora=True)
        expect_close("layer(x)", layer(x), self.exact(layer, w, bias, x, 2.5))
        layer = self.made(impl, w, bias, 4, 5.0, rslora=False)
        expect_close("layer(x), rslora=False", layer(x), self.exact(layer, w, bias, x, 1.25))

    def test_shapes(self, impl):
        """x of any leading dimensions: none, several, no token; any strides"""
        w, bias = self.frozen()
        layer = self.made(impl, w, bias)
        for shape in ((), (1,), (2, 3), (2, 1, 4), (0,), (2, 0)):
            x = random_tensor(*shape, self.N_IN, seed=4)
            got = layer(x)
            expect_tensor(f"layer(x), x {list(x.shape)}", got, torch.float32, (*shape, self.N_OUT))
            expect_close(f"layer(x), x {list(x.shape)}", got, self.exact(layer, w, bias, x, 5 / 3))
            narrow = self.made(impl, w[:1], bias[:1])(x)
            expect_tensor(f"layer(x), N = 1, x {list(x.shape)}", narrow, torch.float32, (*shape, 1))
        x = random_tensor(4, self.N_IN, seed=4)
        expect_close("layer of a view", layer(apart(x)), layer(x))
        turned = self.made(impl, w.T.contiguous().T, bias)
        expect_close("with a weight that is a view", turned(x), self.exact(turned, w, bias, x, 5 / 3))

    def test_half(self, impl):
        """fp16 and bf16: the result is x's, a and b stay fp32, and the adapter's part is computed in fp32"""
        for dtype in DTYPES[1:]:
            w, bias = self.frozen(dtype)
            x = random_tensor(6, self.N_IN, seed=4, dtype=dtype)
            layer = self.made(impl, w, bias)
            got = layer(x)
            expect_tensor(f"layer(x), {dtype}", got, dtype, (6, self.N_OUT))
            limit = 4 * torch.finfo(dtype).eps
            expect_close(f"layer(x), {dtype}", got, self.exact(layer, w, bias, x, 5 / 3), atol=8 * limit, rtol=limit)
            for shape in ((), (0,), (2, 3)):
                got = layer(random_tensor(*shape, self.N_IN, seed=4, dtype=dtype))
                expect_tensor(f"layer(x), x {[*shape, self.N_IN]} {dtype}", got, dtype, (*shape, self.N_OUT))
            zeros = self.made(impl, torch.zeros(40, 64, dtype=dtype), None)
            x = random_tensor(50, 64, seed=5, dtype=dtype)
            exact = self.exact(zeros, torch.zeros(40, 64), None, x, 5 / 3)
            expect_rounded(f"the adapter's part alone, {dtype}", zeros(x).detach(), exact)

    def test_first_step(self, impl):
        """in the first step b has a gradient, a has none yet"""
        w, bias = self.frozen()
        layer = impl(w, bias, self.R, 5.0)
        self.backward(layer(random_tensor(5, self.N_IN, seed=4)).square().sum())
        for name in ("a", "b"):
            expect(getattr(layer, name).grad is not None, f"layer.{name}: expected a gradient, got none")
        expect_close("gradient of a", layer.a.grad, torch.zeros(self.R, self.N_IN))
        expect(float(layer.b.grad.abs().min()) > 0, "gradient of b: expected numbers other than 0")

    def test_gradients(self, impl):
        """gradients of a, b and x are those of the whole formula"""
        w, bias = self.frozen()
        layer, x = self.made(impl, w, bias), random_tensor(5, self.N_IN, seed=4).requires_grad_()
        self.backward((layer(x) * random_tensor(5, self.N_OUT, seed=6)).sum())
        found = [layer.a.grad, layer.b.grad, x.grad]
        a, b, z = (t.detach().clone().requires_grad_() for t in (layer.a, layer.b, x))
        y = z @ (w + 5 / 3 * b @ a).T + bias
        (y * random_tensor(5, self.N_OUT, seed=6)).sum().backward()
        for name, got, expected in zip("abx", found, (a.grad, b.grad, z.grad), strict=True):
            expect(got is not None, f"gradient of {name}: expected one, got none")
            expect_close(f"gradient of {name}", got, expected, atol=1e-4)

    def test_half_gradients(self, impl):
        """in fp16 and bf16 x has the gradient of both parts, in its dtype; a and b have theirs in fp32"""
        for dtype in DTYPES[1:]:
            (w, bias), z = self.frozen(dtype), random_tensor(5, self.N_IN, seed=4, dtype=dtype)
            for part, weight in (("both parts", w), ("the adapter alone", 0 * w)):
                layer, x = self.made(impl, weight, bias), z.clone().requires_grad_()
                self.backward(layer(x).sum())
                for name, t, kind in (("a", layer.a, torch.float32), ("b", layer.b, torch.float32), ("x", x, dtype)):
                    expect(t.grad is not None, f"gradient of {name}, {dtype}: expected one, got none")
                    expect_equal(f"dtype of {name}'s gradient, {dtype}", t.grad.dtype, kind)
                whole = weight.double() + 5 / 3 * layer.b.detach().double() @ layer.a.detach().double()
                limit = 16 * torch.finfo(dtype).eps
                what = f"gradient of x, {dtype}, {part}"
                expect_close(what, x.grad, whole.sum(0).expand(5, -1), atol=4 * limit, rtol=limit)

    def test_frozen(self, impl):
        """no gradient reaches weight and bias, even if they ask for one; a and b alone are trained"""
        for wanted in (False, True):
            w, bias = (nn.Parameter(t, requires_grad=wanted) for t in self.frozen())
            layer = self.made(impl, w, bias)
            self.backward(layer(random_tensor(5, self.N_IN, seed=4)).sum())
            for name, t in (("weight", w), ("bias", bias)):
                expect(t.grad is None, f"{name}: expected no gradient, got one")
            trained = sorted(name for name, p in layer.named_parameters() if p.requires_grad)
            expect_equal("parameters that are trained", trained, ["a", "b"])

    def test_shared(self, impl):
        """weight and bias are not copied, and not changed; nor is x"""
        w, bias = self.frozen()
        before = w.clone(), bias.clone()
        x = random_tensor(5, self.N_IN, seed=4)
        layer = self.made(impl, w, bias)
        layer(x)
        expect_bits("weight", w, before[0])
        expect_bits("bias", bias, before[1])
        expect_bits("x", x, random_tensor(5, self.N_IN, seed=4))
        turned, apart_bias = w.T.contiguous().T, apart(bias)
        views = self.made(impl, turned, apart_bias)
        for t in (w, turned):
            t.mul_(3)
        for t in (bias, apart_bias):
            t.add_(1)
        expect_close("with views that were changed", views(x), self.exact(views, turned, apart_bias, x, 5 / 3))
        expect_close("layer(x) after weight and bias were changed", layer(x), self.exact(layer, w, bias, x, 5 / 3))
        with torch.no_grad():
            layer.b.mul_(-2)
            layer.a.add_(1)
        expect_close("layer(x) after a and b were changed", layer(x), self.exact(layer, w, bias, x, 5 / 3))

    def test_modes(self, impl):
        """the same in eval() and where no gradients are wanted"""
        w, bias = self.frozen()
        layer, x = self.made(impl, w, bias), random_tensor(5, self.N_IN, seed=4)
        with torch.no_grad():
            expect_close("layer(x) under torch.no_grad()", layer(x), self.exact(layer, w, bias, x, 5 / 3))
        layer.eval()
        expect_close("layer(x) after layer.eval()", layer(x), self.exact(layer, w, bias, x, 5 / 3))

    def test_moves(self, impl):
        """a and b are found in state_dict, and a second layer that loads them computes the same"""
        w, bias = self.frozen()
        one, two = self.made(impl, w, bias), impl(w, bias, self.R, 5.0)
        expect({"a", "b"} <= one.state_dict().keys(), f"state_dict: expected a and b, got {list(one.state_dict())}")
        two.load_state_dict(one.state_dict())
        x = random_tensor(5, self.N_IN, seed=4)
        expect_close("the second layer", two(x), one(x))

    def test_no_large(self, impl):
        """no [N, K] tensor is made, forward or backward, in any dtype, and not in pieces either"""
        for dtype in DTYPES:
            wide = random_tensor(96, 128, seed=1, dtype=dtype)
            for w in (wide, wide.T.contiguous().T, apart(wide)):
                layer = self.made(impl, w, None, 2)
                x = random_tensor(3, 128, seed=4, dtype=dtype).requires_grad_()
                with Made() as seen:
                    self.backward(layer(x).sum())
                    with torch.no_grad():
                        layer(x)
                expect(seen.most < 96 * 128 / 4,
                       f"{dtype}: expected no tensor larger than x, y, A or B ({96 * 3} numbers)\n"
                       f"  got one of {seen.most}")  # fmt: skip
                expect(seen.all < 96 * 128,
                       f"{dtype}: expected tensors of x's, y's, A's and B's size\n"
                       f"  got {seen.all} numbers in all: is B A made in pieces?")  # fmt: skip


# ---- 12.4


@exercise("12.4", "Merger")
class TestMerger:
    N_IN, N_OUT, R = 11, 6, 3

    def weight(self, dtype=torch.float32):
        return random_tensor(self.N_OUT, self.N_IN, seed=1, dtype=dtype)

    def pair(self, seed=2, dtype=torch.float32):
        return (random_tensor(self.R, self.N_IN, seed=seed, dtype=dtype),
                random_tensor(self.N_OUT, self.R, seed=seed + 50, dtype=dtype))  # fmt: skip

    def exact(self, w, a, b, scale):
        return w.double() + scale * b.double() @ a.double()

    def test_merge(self, impl):
        """the weight becomes W + s B A, in place"""
        for scale in (1.0, 0.25, 3, -0.5, 0, 0.0):
            w, (a, b) = self.weight(), self.pair()
            expected = self.exact(w, a, b, scale)
            impl(w).merge(a, b, scale)
            expect_close(f"the weight, scale {scale}", w, expected)

    def test_ranks(self, impl):
        """any rank: 1, and one above both sides of the weight"""
        for rank in (1, 20):
            w = self.weight()
            a, b = random_tensor(rank, self.N_IN, seed=2), random_tensor(self.N_OUT, rank, seed=3)
            impl(w).merge(a, b, 0.5)
            expect_close(f"the weight, rank {rank}", w, self.exact(self.weight(), a, b, 0.5))

    def test_made(self, impl):
        """a new Merger leaves the weight alone"""
        w = self.weight()
        impl(w)
        expect_bits("the weight", w, self.weight())

    def test_rounded_once(self, impl):
        """fp16 and bf16: the sum is made in fp32 and rounded once"""
        for dtype in DTYPES[1:]:
            for of in DTYPES:
                w = random_tensor(60, 50, seed=1, dtype=dtype)
                a, b = random_tensor(4, 50, seed=2, dtype=of), random_tensor(60, 4, seed=3, dtype=of)
                expected = self.exact(w, a, b, 0.37)
                impl(w).merge(a, b, 0.37)
                expect_rounded(f"the weight, {dtype}, a and b {of}", w, expected)
                for one, two in ((a, random_tensor(60, 4, seed=3)), (random_tensor(4, 50, seed=2), b)):
                    w = torch.zeros(60, 50, dtype=dtype)
                    impl(w).merge(one, two, 0.37)
                    what = f"the weight, {dtype}, a {one.dtype}, b {two.dtype}"
                    expect_rounded(what, w, 0.37 * two.double() @ one.double())
        w = self.weight()
        a, b = self.pair(dtype=torch.bfloat16)
        expected = self.exact(w, a, b, 0.37)
        impl(w).merge(a, b, 0.37)
        expect_close("the weight, fp32, a and b bf16", w, expected)

    def test_fp64(self, impl):
        """a and b in fp64 are as good as others"""
        a, b = self.pair(dtype=torch.float64)
        w, expected = self.weight(), self.exact(self.weight(), a, b, 0.5)
        impl(w).merge(a, b, 0.5)
        expect_close("the weight", w, expected)

    def test_unmerge(self, impl):
        """bit for bit what it was, in every dtype, for changes that are large beside the weight, too"""
        for dtype in DTYPES:
            for scale in (1.0, 0.003, 900.0):
                w, (a, b) = self.weight(dtype), self.pair()
                merger = impl(w)
                merger.merge(a, b, scale)
                merger.unmerge()
                expect_bits(f"the weight, {dtype}, scale {scale}", w, self.weight(dtype))
            w = torch.zeros(self.N_OUT, self.N_IN, dtype=dtype)
            w[::2] = -0.0
            before, merger = w.clone(), impl(w)
            merger.merge(a, b, 1.0)
            merger.unmerge()
            expect_same_bits(f"the weight, {dtype}, with -0 in it", w, before)

    def test_again(self, impl):
        """merged and unmerged again and again, with other adapters: each time from the first weight"""
        for dtype in DTYPES:
            w = self.weight(dtype)
            merger = impl(w)
            for seed in range(5):
                a, b = self.pair(seed)
                merger.merge(a, b, 7.0)
                expect_rounded(f"the weight, adapter {seed}", w, self.exact(self.weight(dtype), a, b, 7.0))
                merger.unmerge()
                expect_bits(f"the weight, after adapter {seed}", w, self.weight(dtype))

    def test_between(self, impl):
        """the weight may be changed in between by its owner, while nothing is merged: that counts"""
        w, (a, b) = self.weight(), self.pair()
        merger = impl(w)
        w.mul_(2)
        merger.merge(a, b, 1.0)
        expect_close("the weight, doubled before merge", w, self.exact(2 * self.weight(), a, b, 1.0))
        merger.unmerge()
        expect_bits("the weight, doubled before merge, unmerged", w, 2 * self.weight())
        w.mul_(2)
        merger.merge(*self.pair(3), 1.0)
        merger.unmerge()
        expect_bits("the weight, doubled after unmerge, merged and unmerged again", w, 4 * self.weight())

    def test_overwritten(self, impl):
        """what happens to the caller's a and b after merge does not matter"""
        w, (a, b) = self.weight(), self.pair()
        merger = impl(w)
        merger.merge(a, b, 2.0)
        a.zero_()
        b.fill_(NAN)
        merger.unmerge()
        expect_bits("the weight", w, self.weight())

    def test_inputs(self, impl):
        """a and b stay as they are, of any strides, nn.Parameters too"""
        w, (a, b) = self.weight(), self.pair()
        impl(w).merge(nn.Parameter(apart(a)), nn.Parameter(b.T.contiguous().T), 2.0)
        expect_close("the weight, a and b views", w, self.exact(self.weight(), a, b, 2.0))
        w, (a, b) = self.weight(), self.pair()
        merger = impl(w)
        merger.merge(a, b, 2.0)
        merger.unmerge()
        for name, now, before in zip("ab", (a, b), self.pair(), strict=True):
            expect_bits(name, now, before)

    def test_part(self, impl):
        """rows of a larger tensor, or columns: the rest of it stays"""
        for rows, columns in ((slice(4, 10), slice(0, 11)), (slice(0, 6), slice(3, 14))):
            whole = random_tensor(14, 14, seed=9)
            before = whole.clone()
            merger, (a, b) = impl(whole[rows, columns]), self.pair()
            merger.merge(a, b, 2.0)
            expected = before.double()
            expected[rows, columns] += 2 * b.double() @ a.double()
            expect_close("the larger tensor", whole, expected)
            merger.unmerge()
            expect_bits("the larger tensor, unmerged", whole, before)
        whole = random_tensor(12, 11, seed=9)
        before = whole.clone()
        first, second = impl(whole[:6]), impl(whole[6:])
        first.merge(a, b, 2.0)
        second.merge(a, b, 3.0)
        first.unmerge()
        expected = before.double()
        expected[6:] += 3 * b.double() @ a.double()
        expect_close("two parts merged, the first unmerged", whole, expected)
        second.unmerge()
        expect_bits("two parts merged, both unmerged", whole, before)

    def test_parameter(self, impl):
        """an nn.Parameter that wants gradients stays one, and the same tensor"""
        w, (a, b) = nn.Parameter(self.weight()), self.pair()
        at = w.data_ptr()
        merger = impl(w)
        merger.merge(a, b, 2.0)
        expect_equal("where its memory is", w.data_ptr(), at)
        expect_close("the weight", w, self.exact(self.weight(), a, b, 2.0))
        expect(w.requires_grad and w.is_leaf, "expected a parameter that wants gradients still")
        merger.unmerge()
        expect_bits("the weight, unmerged", w.detach(), self.weight())
        expect_equal("where its memory is after unmerge", w.data_ptr(), at)

    def test_one_at_a_time(self, impl):
        """RuntimeError: merge on a merged weight, unmerge on one that is not; nothing is changed by it"""
        w, (a, b) = self.weight(), self.pair()
        merger = impl(w)
        expect_raises(RuntimeError, merger.unmerge, "unmerge, nothing merged")
        expect_bits("the weight", w, self.weight())
        merger.merge(a, b, 2.0)
        merged = w.clone()
        expect_raises(RuntimeError, lambda: merger.merge(*self.pair(7), 1.0), "merge on a merged weight")
        expect_bits("the weight after the error", w, merged)
        merger.unmerge()
        expect_bits("the weight, unmerged", w, self.weight())
        expect_raises(RuntimeError, merger.unmerge, "unmerge twice")
        expect_bits("the weight, unmerged", w, self.weight())
        zeros = torch.zeros(self.R, self.N_IN)
        merger.merge(zeros, b, 2.0)
        expect_raises(RuntimeError, lambda: merger.merge(a, b, 1.0), "merge after an adapter that changes nothing")
        for what, nothing in (("scale 0", (a, b, 0.0)), ("b = 0", (a, 0 * b, 1.0)), ("a = 0", (zeros, b, 1.0))):
            merger = impl(w)
            merger.merge(*nothing)
            expect_raises(RuntimeError, lambda m=merger: m.merge(a, b, 1.0), f"merge after one with {what}")
            merger.unmerge()
            expect_bits(f"the weight, unmerged after {what}", w, self.weight())

    def test_any_error(self, impl):
        """after any error, a and b that do not fit each other for instance, nothing is merged"""
        w, (a, b) = self.weight(), self.pair()
        merger = impl(w)
        try:
            merger.merge(a, b[:, :2], 1.0)
        except Exception as e:
            if is_stub(e):
                raise
            expect_bits("the weight after the error", w, self.weight())
            expect_raises(RuntimeError, merger.unmerge, "unmerge after a merge that raised")
            merger.merge(a, b, 1.0)
            expect_close("the weight, merged after the error", w, self.exact(self.weight(), a, b, 1.0))

    def test_finite(self, impl):
        """ValueError where the merged weight would have infinity or NaN; the weight stays, and is not merged"""
        for dtype, value, why in (
            (torch.float32, NAN, "NaN in a"), (torch.float32, INF, "infinity in a"), (torch.float32, 3e38, "too large"),
            (torch.float16, 3e5, "beyond what fp16 has"), (torch.bfloat16, NAN, "NaN in a"),
        ):  # fmt: skip
            w, (a, b) = self.weight(dtype), self.pair()
            a[1, 4], b[:, 1] = value, 2.0
            merger = impl(w)
            expect_raises(ValueError, lambda m=merger, a=a, b=b: m.merge(a, b, 1.0), f"{why}, {dtype}")
            expect_bits(f"the weight after {why}, {dtype}", w, self.weight(dtype))
            expect_raises(RuntimeError, merger.unmerge, "unmerge after that error")
            merger.merge(*self.pair(), 1.0)
            expect_rounded("the weight, merged after that error", w, self.exact(self.weight(dtype), *self.pair(), 1.0))
        for row in range(self.N_OUT):
            w, (a, b) = self.weight(), self.pair()
            b[row, 2] = INF
            expect_raises(ValueError, lambda w=w, a=a, b=b: impl(w).merge(a, b, 1.0), f"infinity in row {row} of b")
            expect_bits(f"the weight after infinity in row {row} of b", w, self.weight())
        w, (a, b) = self.weight(), self.pair()
        w[3, 5] = NAN
        expect_raises(ValueError, lambda: impl(w).merge(a, b, 1.0), "NaN in the weight that was there before")

    def test_near_the_end(self, impl):
        """whether the merged weight is finite decides: not the change alone, nor a sum of all numbers"""
        for dtype, large in ((torch.float16, 60000.0), (torch.float32, 3e38), (torch.bfloat16, 3e38)):
            for sign in (1, -1):
                w = torch.full((self.N_OUT, self.N_IN), sign * large, dtype=dtype)
                before = w.clone()
                one = torch.ones(1, self.N_IN), sign * torch.ones(self.N_OUT, 1)
                merger = impl(w)
                merger.merge(*one, large / 64)
                expect(bool(w.isfinite().all()), f"the weight, {dtype}: expected finite numbers")
                expect(not torch.equal(w, before), f"the weight, {dtype}: expected a change of {sign * large / 64}")
                merger.unmerge()
                what = f"{sign * large:g} + {sign * large / 2:g} in {dtype}"
                expect_raises(ValueError, lambda m=merger, one=one, s=large / 2: m.merge(*one, s), what)
                expect_bits(f"the weight after {what}", w, before)
                expect_raises(RuntimeError, merger.unmerge, f"unmerge after {what}")
                w = torch.zeros(self.N_OUT, self.N_IN, dtype=dtype)
                w[4, 7] = sign * large
                what = f"{sign * large:g} + {sign * large / 2:g} at (4, 7) alone, {dtype}"
                expect_raises(ValueError, lambda w=w, one=one, s=large / 2: impl(w).merge(*one, s), what)
                expect_equal(f"numbers other than 0 after {what}", int((w != 0).sum()), 1)

    def test_two(self, impl):
        """two weights have their own state"""
        one, two, (a, b) = self.weight(), self.weight(torch.bfloat16), self.pair()
        first, second = impl(one), impl(two)
        first.merge(a, b, 2.0)
        expect_raises(RuntimeError, second.unmerge, "unmerge of the other one")
        second.merge(*self.pair(8), 1.0)
        first.unmerge()
        expect_bits("the first", one, self.weight())
        expect_rounded("the second", two, self.exact(self.weight(torch.bfloat16), *self.pair(8), 1.0))


# ---- 12.5


class Counted(TorchDispatchMode):
    """Counts torch operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@exercise("12.5", "gathered")
class TestGathered:
    def case(self, n=7, slots=4, r=3, n_in=10, n_out=6, adapters=None, dtypes=(torch.float32,) * 4, scale=1.0):
        y, x = random_tensor(n, n_out, seed=1), random_tensor(n, n_in, seed=2)
        a, b = random_tensor(slots, r, n_in, seed=3), scale * random_tensor(slots, n_out, r, seed=4)
        if adapters is None:
            draw = random.Random(n)
            adapters = [draw.randint(0, slots) for _ in range(n)]
        tensors = [t.to(dtype) for t, dtype in zip((y, x, a, b), dtypes, strict=True)]
        return (*tensors, torch.tensor(adapters, dtype=torch.int64))

    def exact(self, y, x, a, b, adapters):
        """Token by token."""
        y = y.double().clone()
        for i, adapter in enumerate(adapters.tolist()):
            if adapter:
                y[i] += b[adapter - 1].double() @ (a[adapter - 1].double() @ x[i].double())
        return y

    def same(self, impl, case, what):
        got = impl(*case)
        expect_tensor(what, got, case[0].dtype, tuple(case[0].shape))
        expect_rounded(what, got, self.exact(*case))
        return got

    def test_each(self, impl):
        """each token gets its own adapter's change; 1 is slot 0"""
        self.same(impl, self.case(adapters=[1, 2, 3, 4, 1, 4, 2]), "y")
        self.same(impl, self.case(adapters=[4, 4, 4, 4, 4, 4, 4]), "y, one adapter for all")
        self.same(impl, self.case(n=1, adapters=[3]), "y, one token")
        self.same(impl, self.case(n=40, slots=9, r=1, n_in=5, n_out=13), "y, r = 1")
        self.same(impl, self.case(n=5, slots=1, adapters=[1, 0, 1, 1, 0]), "y, one slot")
        self.same(impl, self.case(adapters=[1, 2, 3, 4, 1, 4, 2], scale=1e6), "y, changes of a million")
        self.same(impl, self.case(n=6, slots=2, r=6, n_in=6, n_out=6), "y, all sizes equal")
        self.same(impl, self.case(n=5, slots=300, adapters=[300, 257, 1, 44, 256]), "y, 300 slots")
        for sizes in ((1, 1, 4, 1), (3, 1, 1, 1), (1, 1, 1, 1), (2, 1, 5, 1), (1, 4, 1, 6)):  # what squeeze would take
            n, r, n_in, n_out = sizes
            what = f"y, {n} tokens, r {r}, {n_in} to {n_out}"
            self.same(impl, self.case(n, 2, r, n_in, n_out, adapters=[2, 1, 2][:n]), what)

    def test_none(self, impl):
        """0: the row of y as it is"""
        case = self.case(adapters=[0, 2, 0, 1, 0, 0, 4])
        got = self.same(impl, case, "y")
        for i in (0, 2, 4, 5):
            expect_bits(f"row {i}", got[i], case[0][i])
        case = self.case(adapters=[0] * 7)
        expect_bits("y without adapters", impl(*case), case[0])

    def test_unused(self, impl):
        """slots that no token uses hold NaN or infinity: nothing of that is seen"""
        for bad in (NAN, INF, -INF):
            y, x, a, b, adapters = self.case(adapters=[0, 2, 0, 3, 2, 0, 0])
            expected = self.exact(y, x, a, b, adapters)
            a[0], b[0], a[3], b[3] = bad, bad, bad, bad
            got = impl(y, x, a, b, adapters)
            expect_close(f"y, slots 0 and 3 are {bad}", got, expected)
            a.fill_(bad)
            b.fill_(bad)
            got = impl(y, x, a, b, torch.zeros(7, dtype=torch.int64))
            expect_bits(f"y, no token has an adapter, all slots are {bad}", got, y)

    def test_seen(self, impl):
        """NaN and infinity in a token's own row or adapter show, in its row alone; without an adapter x is not used"""
        for bad in (NAN, INF):
            case = self.case(adapters=[0, 2, 0, 3, 2, 1, 0])
            expected = self.exact(*case)
            _, x, a, *_ = case
            x[0], x[3], a[0] = bad, bad, bad
            got = impl(*case)
            for i in range(7):
                if i in (3, 5):
                    expect(not bool(got[i].isfinite().any()), f"row {i}: expected no finite number, with {bad} in it")
                else:
                    expect_close(f"row {i}, {bad} in others", got[i], expected[i])

    def test_new(self, impl):
        """a new tensor; y, x, a, b and adapters stay as they are"""
        for adapters in ([1, 0, 2, 0, 3, 4, 4], [0] * 7, [2] * 7):
            case = self.case(adapters=adapters)
            before = [t.clone() for t in case]
            got = impl(*case)
            expect(got.data_ptr() != case[0].data_ptr(), "expected a new tensor, got the memory of y")
            for name, t, old in zip(("y", "x", "a", "b", "adapters"), case, before, strict=True):
                expect_bits(name, t, old)

    def test_dtypes(self, impl):
        """the result has y's dtype, whatever the others have; computed in fp32, rounded once"""
        for y in DTYPES:
            for others in ((y, y, y), (y, torch.float32, torch.float32), (torch.bfloat16,) * 3,
                           (torch.float32, torch.bfloat16, torch.float16), (torch.float16,) * 3):  # fmt: skip
                case = self.case(40, 5, 8, 64, 30, dtypes=(y, *others))
                self.same(impl, (0 * case[0], *case[1:]), f"changes alone, y {y}, x, a, b {others}")
                self.same(impl, case, f"y {y}, x, a, b {others}")

    def test_large(self, impl):
        """a x in fp16 would be infinite, and what is added is not"""
        y, x, a, b, adapters = self.case(dtypes=(torch.float16,) * 4, adapters=[1, 2, 3, 4, 0, 1, 2])
        case = y, 300 * x, 300 * a, b / 2**12, adapters
        self.same(impl, case, "y")

    def test_int32(self, impl):
        """adapters may be int32"""
        *case, adapters = self.case()
        self.same(impl, (*case, adapters.int()), "y, adapters int32")
        self.same(impl, (*case, torch.zeros(7, dtype=torch.int32)), "y, adapters int32, all 0")

    def test_strides(self, impl):
        """any strides"""
        y, x, a, b, adapters = self.case()
        wide = torch.stack((adapters, adapters + 99), 1)[:, 0]
        self.same(impl, (apart(y), apart(x), apart(a), b.mT.contiguous().mT, wide), "y of views")
        turned = [t.mT.contiguous().mT for t in (y, x, a)]
        self.same(impl, (*turned, apart(b), adapters), "y of views whose rows are columns")

    def test_empty(self, impl):
        """no token"""
        for dtype in DTYPES[1:]:
            self.same(impl, self.case(n=0, adapters=[], dtypes=(dtype,) * 4), f"y, no token, {dtype}")
        case = self.case(n=0, adapters=[])
        expect(self.same(impl, case, "y, no token") is not case[0], "no token: expected a new tensor, got y itself")

    def test_no_loop(self, impl):
        """the number of operations is the same for all T and S"""
        counts = []
        for n, slots in ((5, 3), (200, 3), (5, 60), (200, 60)):
            case = self.case(n, slots)
            with Counted() as seen:
                impl(*case)
            counts.append(seen.count)
        expect(max(counts) <= min(counts) + 4, "expected as many operations for 5 and 200 tokens, 3 and 60 slots\n"
                                               f"  got {counts}")  # fmt: skip

    def test_work(self, impl):
        """products of T tokens with one adapter each, not with all slots"""
        n, slots, r, n_in, n_out = 20, 50, 4, 30, 24
        case = self.case(n, slots, r, n_in, n_out)
        with FlopCounterMode(display=False) as seen:
            impl(*case)
        limit = 2 * n * r * (n_in + n_out)
        expect(seen.get_total_flops() <= 1.01 * limit,
               f"expected {limit:,} operations in products at most\n  got {seen.get_total_flops():,}")  # fmt: skip
        with Made() as made:
            impl(*case)
        largest = max(n, slots + 1) * r * n_in
        expect(made.most <= largest,
               f"expected tensors no larger than all adapters, or the adapters of all tokens ({largest:,} numbers)\n"
               f"  got one of {made.most:,}: is all of B A made, or all slots for all tokens?")  # fmt: skip


# ---- 12.6


def planned(adapters, slots, size):
    """(order, blocks), by lists."""
    order = sorted(range(len(adapters)), key=lambda i: adapters[i])
    blocks = []
    for adapter in range(1, slots + 1):
        places = [place for place, i in enumerate(order) if adapters[i] == adapter]
        for begin in range(0, len(places), size):
            part = places[begin : begin + size]
            blocks.append([adapter, part[0], part[-1] + 1])
    return order, blocks + [[0, 0, 0]] * (len(adapters) // size + slots - len(blocks))


@exercise("12.6", "plan")
class TestPlan:
    def same(self, impl, adapters, slots, size, dtype=torch.int64):
        what = f"adapters {adapters if len(adapters) < 15 else len(adapters)}, {slots} slots, size {size}"
        order, blocks = expect_parts(impl(torch.tensor(adapters, dtype=dtype), slots, size), "order", "blocks")
        wanted_order, wanted_blocks = planned(adapters, slots, size)
        expect_tensor(f"order, {what}", order, torch.int32, (len(adapters),))
        expect_equal(f"order, {what}", order.tolist(), wanted_order)
        expect_tensor(f"blocks, {what}", blocks, torch.int32, (len(adapters) // size + slots, 3))
        expect_equal(f"blocks, {what}", blocks.tolist(), wanted_blocks)

    def test_by_hand(self, impl):
        """five tokens, two adapters, blocks of 2"""
        order, blocks = expect_parts(impl(torch.tensor([2, 0, 1, 2, 2]), 2, 2), "order", "blocks")
        expect_tensor("order", order, torch.int32, (5,))
        expect_tensor("blocks", blocks, torch.int32, (4, 3))
        expect_equal("order", order.tolist(), [1, 2, 0, 3, 4])
        expect_equal("blocks", blocks.tolist(), [[1, 1, 2], [2, 2, 4], [2, 4, 5], [0, 0, 0]])

    def test_order(self, impl):
        """tokens of one adapter keep their order, in large batches too"""
        draw = random.Random(3)
        for n in (20, 100, 2000):
            self.same(impl, [draw.randint(0, 5) for _ in range(n)], 5, 16)
        for n in (257, 2049, 4097):
            self.same(impl, [1] * n + [2, 0, 3] * 7, 3, 16)
        self.same(impl, [i % 3 for i in range(5000)], 2, 1)
        self.same(impl, [1] * 700 + [2] * 50, 2, 300)

    def test_none(self, impl):
        """tokens without an adapter come first, and are in no block"""
        self.same(impl, [0, 0, 0, 0], 3, 2)
        self.same(impl, [0, 3, 0, 3, 0, 1], 3, 2)
        self.same(impl, [3, 3, 1, 1, 3], 3, 2)

    def test_full(self, impl):
        """blocks that are just full, one token more, one less"""
        for n in (3, 4, 5, 7, 8, 9):
            self.same(impl, [1] * n, 1, 4)
            self.same(impl, [0] * 2 + [2] * n + [4] * 4, 4, 4)

    def test_absent(self, impl):
        """slots without a token have no block: the first, the last, several in a row"""
        self.same(impl, [2, 2, 2, 6, 6], 7, 2)
        self.same(impl, [7], 7, 2)
        self.same(impl, [1], 7, 2)

    def test_most(self, impl):
        """every row of blocks is used"""
        self.same(impl, [1, 2, 3, 4], 4, 16)
        self.same(impl, [1] * 5 + [2], 2, 4)
        self.same(impl, [4, 3, 2, 1, 4], 4, 2)

    def test_sizes(self, impl):
        """blocks of one token, or larger than the batch; one slot; random ones of all kinds"""
        self.same(impl, [2, 0, 1, 2], 2, 1)
        self.same(impl, [2, 0, 1, 2], 2, 64)
        self.same(impl, [1, 0, 1], 1, 2)
        for size in (9, 10, 17, 32, 33):
            self.same(impl, [i % 4 for i in range(150)], 3, size)
        self.same(impl, [300, 1, 257, 0, 300, 44, 129], 300, 2)
        draw = random.Random(5)
        for _ in range(60):
            slots, size, n = draw.randint(1, 9), draw.choice([1, 2, 3, 4, 7, 16]), draw.randint(1, 40)
            self.same(impl, [draw.choice([0, 0, *range(1, slots + 1)]) for _ in range(n)], slots, size)

    def test_empty(self, impl):
        """no token"""
        self.same(impl, [], 3, 2)

    def test_inputs(self, impl):
        """int32 and strides are allowed, and adapters stay as they are"""
        self.same(impl, [2, 0, 1, 2, 2], 2, 2, torch.int32)
        adapters = torch.tensor([[2, 9], [0, 9], [1, 9], [2, 9], [2, 9]])
        order, blocks = expect_parts(impl(adapters[:, 0], 2, 2), "order", "blocks")
        expect_equal("order of a view", order.tolist(), [1, 2, 0, 3, 4])
        expect_equal("blocks of a view", blocks.tolist(), [[1, 1, 2], [2, 2, 4], [2, 4, 5], [0, 0, 0]])
        expect_equal("adapters, afterwards", adapters.tolist(), [[2, 9], [0, 9], [1, 9], [2, 9], [2, 9]])

    def test_waits_for_nothing(self, impl):
        """no value of a tensor is read: shapes depend on T, slots and size alone"""
        for dtype in (torch.int32, torch.int64):
            with FakeTensorMode():  # tensors without values
                adapters = torch.empty(10, dtype=dtype)
                try:
                    order, blocks = expect_parts(impl(adapters, 3, 4), "order", "blocks")
                except Exception as e:
                    if is_stub(e):
                        raise
                    said = str(e).split("\n", maxsplit=1)[0]
                    expect(False, "expected an answer for tensors whose numbers nobody knows yet\n"
                                  f"  got {type(e).__name__}: {said}")  # fmt: skip
            expect_equal("shapes", (tuple(order.shape), tuple(blocks.shape)), ((10,), (5, 3)))


# ---- 12.7


BEFORE = "base_model.model."
UP = "model.layers.0.mlp.up_proj"


@exercise("12.7", "read_adapter")
class TestReadAdapter:
    def tensors(self, ranks, dtype=torch.float32):
        """{module: rank} -> what the file holds"""
        found = {}
        for seed, (module, r) in enumerate(ranks.items()):
            found[f"{BEFORE}{module}.lora_A.weight"] = random_tensor(r, 6, seed=seed, dtype=dtype)
            found[f"{BEFORE}{module}.lora_B.weight"] = random_tensor(5, r, seed=40 + seed, dtype=dtype)
        return found

    def config(self, **keys):
        return {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "bias": "none", "task_type": "CAUSAL_LM", **keys}

    def same(self, impl, config, ranks, scales, dtype=torch.float32, backward=False):
        tensors = self.tensors(ranks, dtype)
        if backward:
            tensors = dict(reversed(tensors.items()))
        got = impl(config, dict(tensors))
        expect(isinstance(got, dict), f"expected a dictionary, got {type(got).__name__}")
        expect_equal("modules", sorted(got), sorted(ranks))
        for (module, r), scale in zip(ranks.items(), scales, strict=True):
            a, b, s = expect_parts(got[module], "A", "B", "scale")
            expect_tensor(f"A of {module}", a, dtype, (r, 6))
            expect_tensor(f"B of {module}", b, dtype, (5, r))
            expect_bits(f"A of {module}", a, tensors[f"{BEFORE}{module}.lora_A.weight"])
            expect_bits(f"B of {module}", b, tensors[f"{BEFORE}{module}.lora_B.weight"])
            expect_close(f"scale of {module}, {config}", s, scale)

    def refused(self, impl, why, config=None, change=lambda tensors: None, ranks=None):
        tensors = self.tensors(ranks or {Q: 4, UP: 4})
        change(tensors)
        expect_raises(ValueError, lambda: impl(config or self.config(), tensors), why)

    def test_scale(self, impl):
        """alpha over r"""
        self.same(impl, self.config(), {Q: 4, UP: 4}, (0.5, 0.5))
        self.same(impl, self.config(r=1, lora_alpha=32), {Q: 1}, (32,))
        self.same(impl, self.config(r=3, lora_alpha=0.1), {Q: 3}, (0.1 / 3,))

    def test_rslora(self, impl):
        """alpha over √r"""
        self.same(impl, self.config(use_rslora=True), {Q: 4, UP: 4}, (1, 1))
        self.same(impl, self.config(use_rslora=True, rank_pattern={"q_proj": 1}), {Q: 1, UP: 4}, (2, 1))

    def test_patterns(self, impl):
        """ranks and alphas of single modules"""
        self.same(impl, self.config(rank_pattern={"q_proj": 8}), {Q: 8, UP: 4}, (0.25, 0.5))
        self.same(impl, self.config(alpha_pattern={"up_proj": 16}), {Q: 4, UP: 4}, (0.5, 4))
        both = self.config(rank_pattern={"k_proj|up_proj": 2, ".*": 1}, alpha_pattern={r".*\.mlp\..*": 3, UP: 9})
        self.same(impl, both, {Q: 1, UP: 2}, (2, 1.5))
        self.same(impl, self.config(rank_pattern={"proj": 8, "up": 8, "attn.q_proj": 8}), {Q: 4, UP: 4}, (0.5, 0.5))

    def test_defaults(self, impl):
        """r and lora_alpha are 8 where they are missing or null; an alpha of 0 is 0"""
        self.same(impl, {"peft_type": "LORA"}, {Q: 8}, (1,))
        nulls = dict.fromkeys(("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
                               "modules_to_save"))  # fmt: skip
        self.same(impl, {"peft_type": "LORA", **nulls}, {Q: 8}, (1,))
        self.same(impl, self.config(lora_alpha=0), {Q: 4}, (0,))
        self.same(impl, self.config(alpha_pattern={"q_proj": 0}), {Q: 4, UP: 4}, (0, 0.5))
        plain = {"use_dora": False, "modules_to_save": [], "bias": "none", "use_rslora": False}
        self.same(impl, self.config(**plain), {Q: 4}, (0.5,))

    def test_names(self, impl):
        """a module is called what stands between base_model.model. and .lora_A.weight, whatever is in it"""
        ranks = {Q: 4, "lm_head": 4, "model.base_model.model.x": 4, "base_model.model.y": 4, "a.lora_A.weight": 4,
                 "x.lora_B.z": 4, "lora_A": 4, "gate-proj": 4, "a/b c": 4}  # fmt: skip
        self.same(impl, self.config(), ranks, (0.5,) * 9)
        self.same(impl, self.config(), ranks, (0.5,) * 9, backward=True)

    def test_whole_name(self, impl):
        """patterns are held against the module's name: no more than that, and all of it"""
        for key in (r"model\.lm_head", r"model\.model\.layers\.0\.mlp\.up_proj", r"base_model\..*"):
            config = self.config(rank_pattern={key: 8}, alpha_pattern={key: 32})
            self.same(impl, config, {"lm_head": 4, UP: 4}, (0.5, 0.5))
        config = self.config(rank_pattern={r"model\.layers\.0\.mlp\.up_proj": 8}, alpha_pattern={r"^model\..*": 32})
        self.same(impl, config, {"lm_head": 4, UP: 8}, (0.5, 4))
        self.same(impl, self.config(rank_pattern={"up|up_proj": 8}), {Q: 4, UP: 8}, (0.5, 0.25))

    def test_same_tensors(self, impl):
        """A and B with the memory, strides, dtypes and numbers that they have: no copies"""
        tensors = {f"{BEFORE}q.lora_A.weight": apart(random_tensor(4, 6, seed=1)),
                   f"{BEFORE}q.lora_B.weight": torch.zeros(4, 5, dtype=torch.bfloat16).T}  # fmt: skip
        tensors[f"{BEFORE}q.lora_A.weight"][1, 2] = NAN
        others = {"target_modules": [], "layers_to_transform": [3], "lora_dropout": 0.5, "inference_mode": True}
        got = impl(self.config(**others), dict(tensors))
        expect_equal("modules", list(got), ["q"])
        got = expect_parts(got["q"], "A", "B", "scale")
        for name, now, given in zip("AB", got[:2], tensors.values(), strict=True):
            expect(now.data_ptr() == given.data_ptr() and now.stride() == given.stride(),
                   f"{name}: expected the tensor that was given\n  got a copy")  # fmt: skip

    def test_tensors(self, impl):
        """tensors as they are, in their dtype, in any order of the file; none at all"""
        for dtype in DTYPES:
            self.same(impl, self.config(), {Q: 4, UP: 4}, (0.5, 0.5), dtype, backward=True)
        self.same(impl, self.config(), {}, ())

    def test_ranks(self, impl):
        """A and B that have not the rank of the config"""
        self.refused(impl, "rank 8 instead of 4", ranks={Q: 8})
        self.refused(impl, "rank_pattern says 8", self.config(rank_pattern={"up_proj": 8}))
        self.refused(impl, "the config says r 8, the pattern 4 for another module",
                     self.config(r=8, rank_pattern={"up_proj": 4}))  # fmt: skip

        def other(half, shape):
            return lambda tensors: tensors.update({f"{BEFORE}{UP}.lora_{half}.weight": torch.ones(shape)})

        def halved(tensors):
            tensors.update({f"{BEFORE}{UP}.lora_A.weight": torch.ones(2, 6),
                            f"{BEFORE}{UP}.lora_B.weight": torch.ones(5, 8)})  # fmt: skip

        self.refused(impl, "A of rank 2 and B of rank 8", change=halved)
        self.refused(impl, "A of rank 3", change=other("A", (3, 6)))
        self.refused(impl, "B of rank 3", change=other("B", (5, 3)))
        self.refused(impl, "A the other way around", change=other("A", (6, 4)))
        self.refused(impl, "B the other way around", change=other("B", (4, 5)))

    def test_halves(self, impl):
        """an A without its B, a B without its A"""
        for half in "AB":
            for module in (Q, UP):
                key = f"{BEFORE}{module}.lora_{half}.weight"
                self.refused(impl, f"{key} is missing", change=lambda tensors, key=key: tensors.pop(key))
        self.refused(impl, "A alone", change=lambda tensors: tensors.pop(f"{BEFORE}{Q}.lora_B.weight"), ranks={Q: 4})

    def test_used(self, impl):
        """a key of any other form: it would be left out"""
        for key in (
            "base_model.model.lm_head.weight", f"{BEFORE}{Q}.lora_magnitude_vector", f"{Q}.lora_A.weight",
            f"{BEFORE}{Q}.lora_A.bias", f"{BEFORE}{Q}.lora_B.bias", f"{BEFORE}{Q}.base_layer.weight",
            f"{BEFORE}model.embed_tokens.lora_embedding_A", f"{BEFORE}{Q}.lora_C.weight", "", "x",
            f"{BEFORE}{Q}.lora_A.default.weight", f"model.{Q}.lora_B.weight", f"base_model.{Q}.lora_A.weight",
            f"{BEFORE}{Q}.lora_A.weight.x", f"x{BEFORE}v.lora_A.weight", f"{BEFORE}{Q}_lora_A.weight",
        ):  # fmt: skip
            self.refused(
                impl, f"a key {key!r}", change=lambda tensors, key=key: tensors.update({key: torch.ones(4, 4)})
            )
        for before, after in (("x", ""), ("", "x"), ("a.", ""), ("", ".x"), ("", "\n"), (" ", "")):
            keys = [f"{before}{BEFORE}v.lora_{half}.weight{after}" for half in "AB"]
            extra = {keys[0]: torch.ones(4, 6), keys[1]: torch.ones(5, 4)}
            self.refused(impl, f"keys {keys}", change=lambda tensors, extra=extra: tensors.update(extra))
        for form in ("base_modelxmodel.v.lora_{}.weight", "base_model.model.lora_{}.weight", "lora_{}.weight",
                     "Base_Model.Model.v.lora_{}.weight", "base_model.model.v.lora_{}.Weight",
                     "base_model.model.v.LORA_{}.weight", "base_model.model.v.lora_{}.weights"):  # fmt: skip
            extra = {form.format("A"): torch.ones(4, 6), form.format("B"): torch.ones(5, 4)}
            self.refused(impl, f"keys {list(extra)}", change=lambda tensors, extra=extra: tensors.update(extra))

    def test_unsupported(self, impl):
        """what is not supported"""
        for keys in ({"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]},
                     {"peft_type": "IA3"}, {"peft_type": "ADALORA"}, {"peft_type": None}, {"peft_type": "XLORA"},
                     {"peft_type": "lora"}, {"peft_type": "LORA_GA"}, {"peft_type": ""},
                     {"bias": "None"}, {"bias": "mlp"}, {"bias": True}):  # fmt: skip
            self.refused(impl, f"{keys}", self.config(**keys))
        self.refused(impl, "no peft_type", {"r": 4})

    def test_inputs(self, impl):
        """config and tensors stay as they are"""
        for little in ({"peft_type": "LORA"}, {"peft_type": "LORA", "r": None, "rank_pattern": None}):
            config = dict(little)
            impl(config, self.tensors({Q: 8}))
            expect_equal("a config with little in it", config, little)
        config, tensors = self.config(rank_pattern={"up_proj": 2}), self.tensors({Q: 4, UP: 2})
        before = copy.deepcopy(config), {key: t.clone() for key, t in tensors.items()}
        impl(config, tensors)
        expect_equal("config", config, before[0])
        expect_equal("keys of the tensors", list(tensors), list(before[1]))
        for key, t in tensors.items():
            expect_bits(key, t, before[1][key])


# ---- 12.8


TOKENS = [(7 * i * i + 3) % 101 for i in range(20)]


@exercise("12.8", "block_names")
class TestBlockNames:
    def adapter(self, modules=("q", "v"), scale=0.5, seed=0, dtype=torch.float32):
        found = {}
        for i, module in enumerate(modules, seed):
            a, b = random_tensor(2, 6, seed=i, dtype=dtype), random_tensor(5, 2, seed=9 + i, dtype=dtype)
            found[module] = a, b, scale
        return found

    def names(self, impl, tokens=TOKENS, size=4, adapter=None):
        got = impl(list(tokens), size, adapter)
        expect(isinstance(got, list), f"expected a list, got {type(got).__name__}")
        for name in got:
            expect(isinstance(name, bytes), f"a name: expected bytes, got {type(name).__name__}")
            expect(len(name) >= 16, f"a name: expected 16 bytes or more, got {len(name)}")
        return got

    def told_apart(self, impl, what, one, two):
        expect(not set(self.names(impl, adapter=one)) & set(self.names(impl, adapter=two)),
               f"{what}: expected other names for all blocks\n  got some that are the same")  # fmt: skip

    def alike(self, impl, what, one, two):
        expect(self.names(impl, adapter=one) == self.names(impl, adapter=two),
               f"{what}: expected the same names\n  got others")  # fmt: skip

    def test_full_blocks(self, impl):
        """a name for each full block; tokens behind the last one change none"""
        for adapter in (None, self.adapter()):
            for n in (0, 3, 4, 7, 8, 20):
                expect_equal(f"names of {n} tokens", len(self.names(impl, TOKENS[:n], 4, adapter)), n // 4)
            whole = self.names(impl, TOKENS, 4, adapter)
            expect(self.names(impl, TOKENS[:11], 4, adapter) == whole[:2], "11 tokens: expected the names of 8")
            expect_equal("names in blocks of 1", len(set(self.names(impl, TOKENS, 1, adapter))), 20)
            expect_equal("names of 1,000 tokens in blocks of 2", len(self.names(impl, TOKENS * 50, 2, adapter)), 500)

    def test_default(self, impl):
        """without an adapter"""
        expect(impl(list(TOKENS), 4) == self.names(impl), "expected None to be the default")

    def test_prefix(self, impl):
        """equal names up to the block in which two prompts part, other names from there on"""
        for adapter in (None, self.adapter()):
            one = self.names(impl, TOKENS, 4, adapter)
            for at in (0, 5, 11, 19):
                other = [*TOKENS[:at], TOKENS[at] + 1, *TOKENS[at + 1 :]]
                same = [a == b for a, b in zip(one, self.names(impl, other, 4, adapter), strict=True)]
                expect_equal(f"which are equal, token {at} differs", same, [i < at // 4 for i in range(5)])

    def test_past(self, impl):
        """the same tokens after others; digits that run together; large token ids"""
        for adapter in (None, self.adapter()):
            names = self.names(impl, [5] * 40, 4, adapter)
            expect_equal("different names of ten equal blocks", len(set(names)), 10)
            for one, two in (([1, 23], [12, 3]), ([258, 0], [2, 0]), ([2**32, 1], [0, 1]), ([1, 2], [2, 1]),
                             ([2**24, 1], [2**24 + 1, 1]), ([1, 2, 3, 4], [1, 3, 2, 4])):  # fmt: skip
                found = self.names(impl, one, len(one), adapter), self.names(impl, two, len(two), adapter)
                expect(found[0] != found[1], f"blocks {one} and {two}: expected different names, got the same")

    def test_adapters(self, impl):
        """another adapter, or none: no name in common"""
        one = self.adapter()
        self.told_apart(impl, "an adapter and none", one, None)
        self.told_apart(impl, "two adapters of the same shapes", one, self.adapter(seed=5))
        self.told_apart(impl, "an adapter that changes nothing and none",
                        {"q": (torch.zeros(2, 6), torch.zeros(5, 2), 1.0)}, None)  # fmt: skip
        self.told_apart(impl, "an adapter whose scale is 0 and none", self.adapter(scale=0.0), None)
        self.told_apart(impl, "an adapter without modules ({}) and none", {}, None)
        self.told_apart(impl, "an adapter without modules ({}) and one with two", {}, one)

    def test_content(self, impl):
        """loaded twice, the same adapter: other objects, other memory"""
        one = self.adapter()
        self.alike(impl, "an adapter and its copy", one, copy.deepcopy(one))
        self.alike(impl, "an adapter twice", one, one)
        views = {module: (apart(a), b.T.contiguous().T, s) for module, (a, b, s) in one.items()}
        self.alike(impl, "an adapter, and one of views with the same numbers", one, views)

    def test_order(self, impl):
        """the order of modules does not count, their names do"""
        one = self.adapter(("q", "v", "k.x"))
        self.alike(impl, "another order", one, dict(reversed(one.items())))
        self.told_apart(impl, "the same matrices at another module", {"q": one["q"]}, {"v": one["q"]})
        self.told_apart(impl, "matrices exchanged", {"q": one["q"], "v": one["v"]}, {"q": one["v"], "v": one["q"]})
        for names in (("layers.0.q", "layers.1.q"), ("layers.0.q", "layers.0.k"), ("q", "Q"), ("q", "q ")):
            self.told_apart(impl, f"at {names[0]} and at {names[1]}", *({name: one["q"]} for name in names))
        self.told_apart(impl, "a module less", {"q": one["q"], "v": one["v"]}, {"q": one["q"]})

    def test_every_number(self, impl):
        """one number of a large matrix, by one bit, at any place"""
        a, b = random_tensor(8, 300, seed=1), random_tensor(400, 8, seed=2)
        one = {"q": (a, b, 0.5)}
        for which, at in ((0, (0, 0)), (0, (4, 150)), (0, (7, 299)), (1, (200, 3)), (1, (399, 7)), (1, (0, 1))):
            two = {"q": (a.clone(), b.clone(), 0.5)}
            two["q"][which][at] = torch.nextafter(two["q"][which][at], torch.tensor(INF))
            self.told_apart(impl, f"{'AB'[which]} differs at {at} by one bit", one, two)
        two = {"q": (a[:, torch.randperm(300, generator=torch.Generator().manual_seed(0))], b, 0.5)}
        self.told_apart(impl, "columns of A in another order", one, two)
        for signs in ((-1, 1), (1, -1), (-1, -1)):
            two = {"q": (signs[0] * a, signs[1] * b, 0.5)}
            self.told_apart(impl, f"A times {signs[0]}, B times {signs[1]}", one, two)

    def test_in_place(self, impl):
        """one that is overwritten in place is another one"""
        one = self.adapter()
        names = self.names(impl, adapter=one)
        one["v"][1][2, 1] += 1
        expect(not set(names) & set(self.names(impl, adapter=one)),
               "B was changed in place: expected other names\n  got the same")  # fmt: skip
        names = self.names(impl, adapter=one)
        one["q"][0].copy_(one["q"][0].flip(1))
        expect(not set(names) & set(self.names(impl, adapter=one)),
               "A was turned around in place: expected other names\n  got the same")  # fmt: skip
        for i, half in enumerate("AB"):  # by ways that autograd's counter of versions does not see
            for way, change in (("data", lambda x: x.data.add_(1)), ("NumPy", lambda x: x.numpy().__iadd__(1))):
                names = self.names(impl, adapter=one)
                change(one["q"][i])
                now = self.names(impl, adapter=one)
                expect(not set(names) & set(now), f"{half} was changed in place, by {way}: expected other names")

    def test_scale(self, impl):
        """the scale of each module counts, however little it differs"""
        one = self.adapter()
        self.told_apart(impl, "another scale", one, self.adapter(scale=2.0))
        self.told_apart(impl, "a scale and its negative", one, self.adapter(scale=-0.5))
        self.told_apart(impl, "a scale that differs in the 12th digit", one, self.adapter(scale=0.5 + 1e-12))
        closest = self.adapter(scale=math.nextafter(0.3, 1))
        self.told_apart(impl, "a scale that differs in the last bit", self.adapter(scale=0.3), closest)
        self.told_apart(impl, "another scale at one module", one, {**one, "v": (*one["v"][:2], 2.0)})
        exchanged = {"q": (*one["q"][:2], 2.0), "v": one["v"]}, {"q": one["q"], "v": (*one["v"][:2], 2.0)}
        self.told_apart(impl, "scales exchanged", *exchanged)
        self.alike(impl, "a scale of 2 and of 2.0", self.adapter(scale=2), self.adapter(scale=2.0))

    def test_shapes(self, impl):
        """the same numbers in another shape, or cut elsewhere between A and B, or between modules"""
        x = random_tensor(48, seed=3)
        shapes = (((2, 6), (6, 2)), ((3, 4), (4, 3)), ((1, 12), (12, 1)), ((1, 8), (16, 1)), ((2, 4), (8, 2)))
        found = {}
        for a, b in shapes:
            first = math.prod(a)
            adapter = {"q": (x[:first].view(a), x[first : first + math.prod(b)].view(b), 1.0)}
            for name in self.names(impl, TOKENS[:4], 4, adapter):
                expect(name not in found, f"A {a}, B {b}: expected another name than for {found.get(name)}")
                found[name] = a, b
        pair, empty = (x[:12].view(2, 6), x[12:24].view(6, 2), 1.0), (x[:0].view(0, 6), x[:0].view(6, 0), 1.0)
        self.told_apart(impl, "a module more, of rank 0", {"q": pair, "r": empty}, {"q": pair})
        for names, scales in ((("q1", "q"), (2.0, 12.0)), (("q", "q-"), (-1.0, 1.0)), (("q0.", "q"), (5.0, 0.5))):
            one, two = ({name: (*pair[:2], scale)} for name, scale in zip(names, scales, strict=True))
            self.told_apart(impl, f"a name and a scale that run together, {names}, {scales}", one, two)
        one = {"q": (x[:11].view(1, 11), x[11:22].view(11, 1), 1.0)}
        two = {"q": (x[:11].view(11, 1), x[11:22].view(1, 11), 1.0)}
        self.told_apart(impl, "shapes whose digits run together", one, two)
        self.told_apart(impl, "names that run together", {"ab": (x[:6].view(1, 6), x[:6].view(6, 1), 1.0)},
                        {"a": (x[:6].view(1, 6), x[:6].view(6, 1), 1.0)})  # fmt: skip

    def test_dtypes(self, impl):
        """dtypes count; fp16 and bf16 have names, too, and so have nn.Parameters"""
        half = self.adapter(dtype=torch.bfloat16)
        whole = {module: (a.float(), b.float(), s) for module, (a, b, s) in half.items()}
        self.told_apart(impl, "the same numbers in bf16 and fp32", half, whole)
        bits = {module: (a.view(torch.float16), b.view(torch.float16), s) for module, (a, b, s) in half.items()}
        self.told_apart(impl, "the same bits in bf16 and fp16", half, bits)
        for which in (0, 1):
            mixed = {
                module: tuple(x.view(torch.float16) if i == which else x for i, x in enumerate(pair[:2])) + pair[2:]
                for module, pair in half.items()
            }
            self.told_apart(impl, f"the same bits, {'AB'[which]} in fp16 instead of bf16", half, mixed)
        for dtype in DTYPES[1:]:
            one, two = self.adapter(dtype=dtype), self.adapter(seed=5, dtype=dtype)
            self.told_apart(impl, f"other numbers in {dtype}", one, two)
            self.alike(impl, f"the same numbers in {dtype}", one, copy.deepcopy(one))
        only_a = {module: (a.float(), b, s) for module, (a, b, s) in half.items()}
        self.told_apart(impl, "A alone in fp32", half, only_a)
        parameters = {module: (nn.Parameter(a), nn.Parameter(b), s) for module, (a, b, s) in whole.items()}
        self.alike(impl, "nn.Parameters and tensors", whole, parameters)

    def test_process(self, impl):
        """the same in every process: nothing rests on `hash`, which differs"""
        one, original = self.adapter(), builtins.hash
        names = self.names(impl, adapter=one)
        with patch.object(builtins, "hash", lambda x: original(("another process", x))):
            expect(self.names(impl, adapter=one) == names, "expected names that do not depend on Python's `hash`")

    def test_inputs(self, impl):
        """tokens and the adapter stay as they are"""
        for n in (20, 18, 3, 0):
            one, tokens = self.adapter(), TOKENS[:n]
            impl(tokens, 4, one)
            expect_equal("token_ids", tokens, TOKENS[:n])
        expect_equal("modules", list(one), ["q", "v"])
        for module, (a, b, _) in self.adapter().items():
            expect_bits(f"A of {module}", one[module][0], a)
            expect_bits(f"B of {module}", one[module][1], b)

    def test_hash(self, impl):
        """over 400 names each of the first 16 bytes takes many values, and no name comes twice"""
        names = [name for seed in range(50) for name in self.names(impl, [seed] * 8, 1, self.adapter())]
        expect_equal("different names", len(set(names)), 400)
        fewest = min(len({name[i] for name in names}) for i in range(16))
        expect(fewest > 120, f"expected bytes that take most of 256 values\n  got one that takes {fewest}")
        columns = list(zip(*names, strict=False))[:16]
        twice = [(i, j) for i in range(16) for j in range(i) if columns[i] == columns[j]]
        expect(not twice, "expected 16 bytes that each tell more\n  got some that always repeat others")

    def test_long(self, impl):
        """of 1,500 adapters, or of 1,500 blocks, no two meet: nothing in the chain is short"""
        numbers = torch.arange(1500.0)
        adapters = [{"q": (x.view(1, 1), torch.ones(1, 1), 1.0)} for x in numbers]
        names = [name for adapter in adapters for name in impl([1, 2], 2, adapter)]
        expect_equal("different names, 1,500 adapters", len(set(names)), 1500)
        for adapter in (None, adapters[0]):
            names = [impl([token, 7], 1, adapter)[-1] for token in range(1500)]
            expect_equal("different names of a block after 1,500 others", len(set(names)), 1500)
