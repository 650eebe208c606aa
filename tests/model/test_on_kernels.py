"""The model with every kernel on: small ones in Triton's interpreter, SmolLM2 on a GPU against transformers."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from minillm.kernels import HAS_TRITON, KERNELS, linear, norm_linear, use
from minillm.model.layers import attention

from .test_transformer import random_pair

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")
GPU = torch.cuda.is_available()
KINDS = [(LlamaConfig, {}), (Qwen3Config, {}), (Qwen2Config, {}), (LlamaConfig, {"mlp_bias": True})]


@pytest.mark.skipif(GPU, reason="this machine compiles the kernels")
@pytest.mark.parametrize(("kind", "more"), KINDS)
@pytest.mark.parametrize("tokens", [(2, 9), (1, 1)])  # one token goes through kernels of its own
def test_small_model_in_the_interpreter(tmp_path, kind, more, tokens):
    theirs, model = random_pair(tmp_path, kind, 2, True, None, layers=2, **more)
    token_ids = torch.randint(0, 131, tokens, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), use("triton"):
        logits = model.logits(model(token_ids))
    with torch.inference_mode():
        assert (logits - theirs(token_ids).logits).abs().max() < 1e-4


@pytest.mark.skipif(GPU, reason="this machine compiles the kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@given(
    st.sampled_from([1, 1, 3]), st.integers(1, 40), st.integers(1, 700), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=20)
def test_biases(dtype, rows, n, k, added, use_swiglu, seed):
    """With a bias against fp64, for one token and for several; none is as a bias of zeros."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    x, residual, norm = draw(rows, k), draw(rows, k) if added else None, draw(k)
    w, bias = draw((1 + use_swiglu) * n, k) / k**0.5, draw((1 + use_swiglu) * n)
    for op, args, at in (
        (KERNELS["linear"], (x, w), ()),
        (KERNELS["norm_linear"], (x, residual, norm, w), (1e-5, use_swiglu)),
    ):
        with use("triton"):
            got, none, zeros = (op(*args, *at, b) for b in (bias, None, torch.zeros_like(bias)))
        expected = op.reference(*args, *at, bias)
        for ours, theirs in zip(*((y if isinstance(y, tuple) else (y,)) for y in (got, expected)), strict=True):
            error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1.0)
            assert error < (1e-5 if dtype == torch.float32 else 2e-3)
        first = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731
        assert torch.equal(first(none), first(zeros))


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="only MKL is slow with few rows")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (2,), (1, 3), (2, 2)])
def test_few_rows_on_a_cpu(leading, bias):
    """Multiplied as w xᵀ: the same numbers, shapes and gradients, contiguous; one row exactly as two."""
    g = torch.Generator().manual_seed(len(leading))
    x, w = torch.randn(*leading, 576, generator=g), torch.randn(40, 576, generator=g) / 24
    b = torch.randn(40, generator=g) if bias else None
    op = KERNELS["linear"]
    y = op.torch(x, w, b)
    assert y.is_contiguous()
    torch.testing.assert_close(y, op.reference(x, w, b), atol=1e-5, rtol=0)
    torch.testing.assert_close(op.torch(x, w.T.contiguous().T, b), y, atol=1e-5, rtol=0)
    if x.numel() == 576:
        assert torch.equal(y.view(40), op.torch(torch.stack((x.view(576), x.view(576))), w, b)[1])
    gradients = []
    for product in (op.torch, op.reference):
        inputs = [t.clone().requires_grad_() for t in (x, w)]
        gradients.append(torch.autograd.grad(product(*inputs, b).square().sum(), inputs))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_wrong_biases():
    x, w = torch.zeros(2, 8), torch.zeros(6, 8)
    for bias in (torch.zeros(5), torch.zeros(6, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"bias: expected \[6\] \(w's rows\) of torch.float32"):
            linear(x, w, bias)
        with pytest.raises(ValueError, match="bias: expected"):
            norm_linear(x, None, torch.ones(8), w, 1e-5, False, bias)


class Slots:
    """A cache of one sequence, whose tokens lie in slots in some order; and its only layer of many."""

    def __init__(self, config, count):
        self.k, self.v = (torch.zeros(count, config.num_key_value_heads, config.head_dim) for _ in range(2))
        self.order = torch.randperm(count, generator=torch.Generator().manual_seed(2))
        self.written = 0

    def slots(self, batch):
        return self.k, self.v, self.order[batch.positions]

    def write(self, k, v, batch):
        self.written += 1
        self.k[self.order[batch.positions]], self.v[self.order[batch.positions]] = k, v

    def attend(self, q, k, v, batch):
        seen = self.order[: int(batch.positions[-1]) + 1]
        mask = batch.positions[:, None] >= torch.arange(len(seen))
        return attention(q[None], self.k[seen][None], self.v[seen][None], mask)[0]


@pytest.mark.skipif(GPU, reason="this machine compiles the kernels")
@pytest.mark.parametrize(("kind", "more"), KINDS[:3])  # a bias of the MLP is far from any cache
def test_a_cache_with_slots(tmp_path, kind, more):
    """Keys that a kernel turns and writes, or that are turned and handed to `write`: the same slots and results."""
    _, model = random_pair(tmp_path, kind, 2, True, None, layers=2, **more)
    ids = torch.randint(0, 131, (9,), generator=torch.Generator().manual_seed(1))
    found = {}
    for path in ("torch", "triton"):
        layers = [Slots(model.config, 9) for _ in model.layers]
        hidden_states = []
        with torch.inference_mode(), use(path), use("torch", "flash_attention"):
            for first, last in ((0, 5), (5, 6), (6, 9)):
                batch = SimpleNamespace(positions=torch.arange(first, last))
                hidden_states.append(model(ids[first:last], batch, SimpleNamespace(layers=layers)))
        assert {layer.written for layer in layers} == {3 if path == "torch" else 0}
        found[path] = [torch.cat(hidden_states), *(x for layer in layers for x in (layer.k, layer.v))]
    for ours, expected in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(found["torch"][0], model(ids[None])[0], atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "more"), KINDS)
def test_small_model_in_fp32(tmp_path, kind, more):
    theirs, model = random_pair(tmp_path, kind, 2, True, None, **more)
    token_ids = torch.randint(0, 131, (3, 100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(token_ids).logits
        logits = model.cuda().logits(model(token_ids.cuda())).cpu()
    assert (logits - expected).abs().max() < 1e-3


@pytest.mark.gpu
def test_smollm2_in_bf16(smollm_path):
    """No further from transformers' fp32 logits than transformers' own bf16 ones, give or take a quarter."""
    from transformers import AutoModelForCausalLM

    from minillm.data import reference_text
    from minillm.model.tokenizer import Tokenizer
    from minillm.model.weights import load

    tokenizer = Tokenizer.from_pretrained(smollm_path)
    texts = ["The capital of France is", *(text[:2000] for text in list(reference_text().values())[:6])]
    prompts = [torch.tensor([tokenizer.encode(text)[:512]], device="cuda") for text in texts]
    ours = load(smollm_path, device="cuda", dtype="bfloat16")
    exact = AutoModelForCausalLM.from_pretrained(smollm_path, dtype=torch.float32).cuda().eval()
    rounded = AutoModelForCausalLM.from_pretrained(smollm_path, dtype=torch.bfloat16).cuda().eval()
    errors = {"ours": 0.0, "transformers": 0.0}
    with torch.inference_mode():
        for token_ids in prompts:
            expected = exact(token_ids).logits
            for name, logits in (("ours", ours.logits(ours(token_ids))), ("transformers", rounded(token_ids).logits)):
                errors[name] += float((logits.float() - expected).pow(2).mean())
    assert errors["ours"] < 1.25 * errors["transformers"], errors
    print(errors)
