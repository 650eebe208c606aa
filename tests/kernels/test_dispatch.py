"""The registry: which path runs, gradients, bad input, torch.compile, CUDA graphs."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from minillm.kernels import (
    KERNELS,
    LoraPlan,
    add_rms_norm,
    append_tokens,
    apply_rope,
    common,
    dependent_launch,
    flash_attention,
    linear,
    matmul,
    matmul_swiglu,
    norm_linear,
    rms_norm,
    rope,
    rope_and_cache,
    rope_factors,
    softmax,
    step_inputs,
    swiglu,
    trusted,
    use,
)

from .conftest import error


def small(name: str, device="cpu", dtype=torch.float32) -> tuple:
    """Arguments for each operation."""
    torch.manual_seed(0)
    x, w = torch.randn(6, 32, device=device, dtype=dtype), torch.randn(32, device=device, dtype=dtype)
    q, k = torch.randn(6, 4, 16, device=device, dtype=dtype), torch.randn(6, 2, 16, device=device, dtype=dtype)
    angles = torch.randn(6, 8, device=device)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    caches = torch.zeros(2, 9, 2, 16, device=device, dtype=dtype)
    rows = torch.arange(60, dtype=torch.int32, device=device).view(3, 20)  # length, 3 options, 12 tokens, 4 blocks of 2
    rows[:, 0] = 4
    steps = cu.new_tensor([[1, 0, 2, 0], [3, 0, 0, 0], [1, 1, 0, 0], [0, 2, 6, 6]])
    table = (steps, rows, rows.new_zeros(3, 3), rows.new_zeros(3))
    each = torch.arange(6.0, device=device)
    integers = torch.arange(24 * 32, device=device).view(24, 32).mul(37).remainder(251).sub(125).to(torch.int8)
    lora = LoraPlan.of(cu.new_tensor([1, 0, 2, 1, 2, 2]), 2)
    seen = torch.arange(7 * 32, device=device).view(7, 32).remainder(5).sub(2).short()
    return {
        "softmax": (x,),
        "rms_norm": (x, w, 1e-5),
        "add_rms_norm": (x, x + 1, w, 1e-5),
        "rope": (q, k, angles.cos(), angles.sin()),
        "rope_and_cache": (q, k, k + 1, angles.cos(), angles.sin(), *caches, torch.arange(6, device=device)),
        "swiglu": (x,),
        "matmul": (x, torch.randn(24, 32, device=device, dtype=dtype)),
        "matmul_swiglu": (x, torch.randn(24, 32, device=device, dtype=dtype)),
        "flash_attention": (q, k, k + 1, cu, cu, 4),
        "paged_attention": (
            q,
            *torch.randn_like(caches[:, :8]),
            cu.new_tensor([[1, 0, 0], [3, 2, 1]]),
            cu[1:],
            cu,
            4,
            2,
        ),
        "linear": (x, torch.randn(24, 32, device=device, dtype=dtype)),
        "norm_linear": (x, x + 1, w, torch.randn(24, 32, device=device, dtype=dtype)),
        "quantize_rows": (x,),
        "norm_quantize_rows": (x, x + 1, w, 1e-5),
        "swiglu_quantize_rows": (x,),
        "w8a8": (integers[:6], each[:, None] / 100, integers, torch.rand(24, device=device) / 100, None, dtype),
        "w8a16": (x, integers, torch.rand(24, 1, device=device) / 100),
        "draw_tokens": (
            x, each * 0.2, each.long(), each.int(), each.int(), 1 - each / 10, each / 20, 1 + each / 10, each / 5,
            each / 9, each.int(), seen,
        ),
        "count_tokens": (seen, each.int(), each.long() * 5, each > 1),
        "gumbel_argmax": (
            x, torch.tensor([0.0, 0.5, 1.0] * 2, device=device), torch.arange(6, device=device) - 3,
            torch.arange(6, device=device),
        ),
        "w4a16": (x, seen[:, :4].int() * 123_456_789, torch.rand(7, 2, device=device).to(dtype) / 8),
        "multi_lora": (
            torch.randn(6, 24, device=device, dtype=dtype), x, torch.randn(2, 2, 16, 32, device=device, dtype=dtype),
            torch.randn(2, 24, 16, device=device, dtype=dtype), cu.new_tensor([[1, 0], [1, 1]]), (16, 8),
            *(lora.adapters, lora.order, lora.starts),
        ),
        "mask_logits": (
            x,
            torch.tensor([4, 1], device=device),
            torch.tensor([0, 0], device=device),
            cu.new_tensor([[-1431655766]]),
        ),
        "top_logprobs": (x, torch.arange(6, device=device), 3),
        "step_inputs": (*table, 4, 16, 1, 2, 7, 3),
        "append_tokens": (steps, rows, torch.tensor([[7], [8], [9]], device=device), cu.new_tensor([1, 1, 0]), 4),
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_paths_by_device_and_by_hand(name, monkeypatch):
    args = small(name)
    assert KERNELS[name].path(*args) == "torch"  # on a CPU
    with use("triton"):
        assert KERNELS[name].path(*args) == "triton"
        with use("reference", name):
            assert KERNELS[name].path(*args) == "reference"
        assert KERNELS[name].path(*args) == "triton"
    monkeypatch.setenv("MINILLM_KERNELS", "reference")
    assert KERNELS[name].path(*args) == "reference"
    monkeypatch.setenv("MINILLM_KERNELS", "cuda")
    with pytest.raises(ValueError, match="MINILLM_KERNELS: expected one of auto, torch, triton, reference, got 'cuda'"):
        KERNELS[name].path(*args)


@pytest.mark.parametrize(
    ("name", "has", "dtype", "expected"),
    [
        ("rms_norm", (7, 5), torch.float16, "triton"),
        ("rms_norm", (7, 5), torch.bfloat16, "torch"),
        ("rms_norm", (8, 0), torch.bfloat16, "triton"),
        ("paged_attention", (7, 5), torch.float16, "triton"),
        ("matmul", (7, 5), torch.float16, "torch"),
        ("matmul", (8, 0), torch.float16, "triton"),
        ("w8a8", (7, 5), torch.float16, "torch"),
        ("w8a8", (8, 0), torch.float16, "triton"),
    ],
)
def test_old_gpus_run_what_they_are_good_at(monkeypatch, name, has, dtype, expected):
    """Also where the kernel was asked for: it would not compile, or be far slower than torch."""
    monkeypatch.setattr(common, "capability", lambda device: has)
    args = [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in small(name)]
    with use("triton"):
        assert KERNELS[name].path(*args) == expected
    with use("reference"):
        assert KERNELS[name].path(*args) == "reference"


def test_fp8_is_torchs_below_ada(monkeypatch):
    """As a dtype that is asked for, and as that of a tensor."""
    fp8 = torch.float8_e4m3fn
    for has, expected in (((8, 6), "torch"), ((8, 9), "triton"), ((9, 0), "triton")):
        monkeypatch.setattr(common, "capability", lambda device, has=has: has)
        with use("triton"):
            assert KERNELS["quantize_rows"].path(X, fp8) == expected
            assert KERNELS["w8a8"].path(X.to(fp8), X[:, :1], X.to(fp8), X[:, :1]) == expected
            assert KERNELS["quantize_rows"].path(X, torch.int8) == "triton"


def test_float64_takes_torch():
    x, w = torch.randn(3, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    with use("triton"):
        assert KERNELS["rms_norm"].path(x, w, 1e-5) == "torch"


def test_a_trusted_block_checks_nothing(monkeypatch):
    """Only within the block, only in its thread; `use`, the environment and gradients still choose the path."""
    wrong = torch.ones(31)
    with trusted():
        with pytest.raises(RuntimeError):
            rms_norm(X, wrong, 1e-5)  # torch's own error: ours would name the argument
        with trusted():
            pass
        assert torch.equal(rms_norm(X, torch.ones(32), 1e-5), F.rms_norm(X, (32,), torch.ones(32), 1e-5))
        with ThreadPoolExecutor(1) as other, pytest.raises(ValueError, match="weight: expected shape"):
            other.submit(rms_norm, X, wrong, 1e-5).result()
        assert seen_paths(monkeypatch) == ["torch"]
        with use("reference"):
            assert seen_paths(monkeypatch) == ["reference"]
    monkeypatch.setenv("MINILLM_KERNELS", "reference")
    with trusted():
        assert seen_paths(monkeypatch) == ["reference"]
    monkeypatch.setenv("MINILLM_KERNELS", "cuda")
    with pytest.raises(ValueError, match="MINILLM_KERNELS"), trusted():
        pass
    with pytest.raises(ValueError, match="weight: expected shape"):
        rms_norm(X, wrong, 1e-5)


def seen_paths(monkeypatch) -> list[str]:
    """Which paths a call of swiglu takes."""
    paths, seen = ("torch", "triton", "reference"), []
    op = KERNELS["swiglu"]
    with monkeypatch.context() as patch:
        for path in paths:
            real = getattr(op, path)
            replaced = lambda x, path=path, real=real: seen.append(path) or real(x)  # noqa: E731
            patch.setitem(op.__dict__, path, replaced)
        swiglu(X)
    return seen


def test_use_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="path: expected one of auto"), use("fast"):
        pass
    with pytest.raises(ValueError, match="name: expected one of softmax|flash"), use("torch", "softmix"):
        pass


@pytest.mark.parametrize("name", KERNELS)
def test_torch_path_is_right(name):
    results = []
    for path in ("torch", "reference"):
        args = small(name)
        out = getattr(KERNELS[name], path)(*args)
        results.append(args[:2] if out is None else out if isinstance(out, tuple) else (out,))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got == -torch.inf, expected == -torch.inf)
        got, expected = (x.float().nan_to_num(neginf=0, nan=torch.nan) for x in (got, expected))
        assert error(got, expected) < 2e-6


@pytest.mark.parametrize(
    "name", ["softmax", "rms_norm", "add_rms_norm", "swiglu", "matmul", "matmul_swiglu", "linear", "norm_linear"]
)
def test_gradients_pass_through_torch(name):
    """Where a gradient is wanted, the dispatcher leaves the kernels, even when they were asked for."""
    gradients = []
    for path in ("triton", "reference"):
        args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in small(name)]
        with use(path):
            assert KERNELS[name].path(*args) == ("torch" if path == "triton" else path)
            with torch.no_grad():
                assert KERNELS[name].path(*args) == path
            out = KERNELS[name](*args)
        outputs = (out,) if isinstance(out, torch.Tensor) else out
        sum((i + o.pow(2)).sum() for i, o in enumerate(outputs)).backward()
        gradients.append([a.grad for a in args if isinstance(a, torch.Tensor)])
    for got, expected in zip(*gradients, strict=True):
        assert error(got, expected) < 1e-5


def test_gradients_of_attention():
    q, k, v, cu, _, longest = small("flash_attention")
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    flash_attention(q, k, v, cu, cu, longest).pow(2).sum().backward()
    ours = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    KERNELS["flash_attention"].reference(q, k, v, cu, cu, longest).pow(2).sum().backward()
    for got, x in zip(ours, (q, k, v), strict=True):
        assert error(got, x.grad) < 1e-5


X = torch.randn(4, 32)
Q = torch.randn(4, 2, 16)
CU = torch.tensor([0, 4], dtype=torch.int32)
SLOTTED = (Q, Q, Q, Q[:, 0, :8], Q[:, 0, :8], Q.clone(), Q.clone(), torch.arange(4))
ROWS = torch.zeros(4, 20, dtype=torch.int32)
BAD = [
    (softmax, (torch.tensor(1.0),), "x: expected a last axis"),
    (softmax, (X.long(),), "x: expected a floating dtype, got torch.int64"),
    (softmax, ([1.0],), "x: expected a tensor, got list"),
    (softmax, (X, X), "mask: expected bool"),
    (softmax, (X, torch.ones(3, 3, dtype=torch.bool)), r"mask: expected a shape that broadcasts to \[4, 32\]"),
    (rms_norm, (X, torch.ones(31), 1e-5), r"weight: expected shape \[32\]"),
    (rms_norm, (X, torch.ones(32), 0.0), "eps: expected a positive number"),
    (add_rms_norm, (X, X[:2], torch.ones(32), 1e-5), r"residual: expected shape \[4, 32\]"),
    (swiglu, (torch.randn(4, 33),), "gate_up: expected a last axis of 2 I"),
    (matmul, (X, torch.randn(8, 31)), r"x: expected \[..., 31\]"),
    (matmul, (X, torch.randn(32)), r"w: expected \[N, K\]"),
    (matmul, (X, torch.randn(8, 32).half()), "w: expected x's dtype"),
    (matmul_swiglu, (X, torch.randn(7, 32)), "w: expected an even number of rows"),
    (linear, (X, torch.randn(8, 31)), r"w: expected \[N, K\] with x's last axis as K"),
    (norm_linear, (X, None, torch.ones(32), torch.randn(7, 32), 1e-6, True), "w: expected an even number of rows"),
    (norm_linear, (X, None, torch.ones(31), torch.randn(8, 32)), r"weight: expected shape \[32\]"),
    (norm_linear, (X, X[:2], torch.ones(32), torch.randn(8, 32)), "residual: expected x's shape"),
    (norm_linear, (X, None, torch.ones(32), torch.randn(8, 32), 0.0), "eps: expected a positive number"),
    (rope, (torch.randn(4, 2, 15), Q, Q[:, 0, :8], Q[:, 0, :8]), r"q: expected \[tokens, heads, D\] with an even D"),
    (rope, (Q, Q[:3], Q[:, 0, :8], Q[:, 0, :8]), r"k: expected \[4, heads, 16\]"),
    (rope, (Q, Q.clone(), Q[:, 0, :7], Q[:, 0, :8]), r"cos: expected \[4, 8\]"),
    (rope, (Q.transpose(0, 1).contiguous().transpose(0, 1), Q, Q[:, 0, :8], Q[:, 0, :8]), "q: expected heads and"),
    (rope_and_cache, (*SLOTTED, None, None, X[0, :16]), "k_weight: expected weights for both q and k"),
    (rope_and_cache, (*SLOTTED, None, None, X[0, :16], X[0, :15]), r"k_weight: expected \[16\]"),
    (flash_attention, (Q[0], Q, Q, CU, CU, 4), r"q: expected \[tokens, heads, D\]"),
    (flash_attention, (torch.randn(4, 3, 16), Q, Q, CU, CU, 4), "k: expected heads that divide q's 3"),
    (flash_attention, (Q, Q, Q[:3], CU, CU, 4), "v: expected k's shape"),
    (flash_attention, (Q, Q, Q, CU.long(), CU, 4), "cu_seqlens_q: expected the bounds"),
    (flash_attention, (Q, Q, Q, CU, CU, 4, False, 3), "window: expected 0 without causal"),
    (flash_attention, (Q, Q, Q, CU, CU, 4, True, 0, 0.0), "scale: expected a number above 0"),
    (flash_attention, (Q, Q.half(), Q, CU, CU, 4), "k: expected q's dtype"),
    (flash_attention, (torch.randn(4, 2, 257),) * 3 + (CU, CU, 4), "D up to 256"),
    (step_inputs, (ROWS.float(), ROWS, ROWS[:3], ROWS[0], 4, 16, 1, 2, 4, 3), "steps: expected two axes of int32"),
    (step_inputs, (ROWS, ROWS.T, ROWS[:3], ROWS[0], 4, 16, 1, 2, 4, 3), "matrix: expected two axes of int32, contig"),
    (step_inputs, (ROWS, ROWS, ROWS[:3], ROWS[0], 4, 16, 1, 2, 4, 20), r"steps: expected \[4, 20 sequences, and one\]"),
    (step_inputs, (ROWS, ROWS, ROWS[:3], ROWS[0], 4, 20, 1, 2, 4, 3), "first_block: expected 1 <= first_token < first"),
    (step_inputs, (ROWS, ROWS, ROWS[:2], ROWS[0], 4, 16, 1, 2, 4, 3), r"options: expected \[3 columns, of which 1"),
    (step_inputs, (ROWS, ROWS, ROWS[:3], ROWS[0, :2], 4, 16, 1, 2, 4, 3), r"lengths: expected \[3 or more\] of int32"),
    (append_tokens, (ROWS, ROWS, torch.zeros(3, 1), ROWS[0, :3], 4), r"sampled: expected \[S, K\] of int64"),
    (append_tokens, (ROWS, ROWS, torch.ones(21, 1).long(), ROWS[0, :3], 4), "sampled: expected .*, S up to 20"),
    (append_tokens, (ROWS, ROWS, torch.ones(3, 1).long(), ROWS[0, :2], 4), r"given: expected \[3\] of int32"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "args", "says"), BAD, ids=[f"{b[0].name} {i}" for i, b in enumerate(BAD)])
def test_bad_input_is_named(call, args, says):
    with pytest.raises((TypeError, ValueError), match=says):
        call(*args)


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "step_inputs"])  # no step without a sequence
def test_empty_input(name):
    shapes = {"softmax": (0, 8), "swiglu": (0, 8), "matmul": (0, 32), "matmul_swiglu": (0, 32), "rms_norm": (0, 32)}
    shapes |= dict.fromkeys(("linear", "quantize_rows", "swiglu_quantize_rows", "w8a16"), (0, 32))
    args = small(name)
    if name in shapes:
        args = (torch.empty(shapes[name]), *args[1:])
    elif name in ("add_rms_norm", "norm_linear", "norm_quantize_rows"):
        args = (torch.empty(0, 32), torch.empty(0, 32), *args[2:])
    elif name == "flash_attention":
        nothing = torch.zeros(1, dtype=torch.int32)
        args = (*(x[:0] for x in args[:3]), nothing, nothing, 0)
    elif name == "paged_attention":
        args = (args[0][:0], *args[1:3], *(torch.zeros(n, dtype=torch.int32) for n in ((0, 1), 0, 1)), 0, 2)
    elif name == "mask_logits":
        args = (args[0][:0], args[1][:0], args[2][:0], args[3])
    elif name == "append_tokens":
        args = (*args[:2], args[2][:0], args[3][:0], args[4])
    else:
        args = tuple(a[:0] if isinstance(a, torch.Tensor) and a.shape[0] == 6 else a for a in args)
    for path in ("torch", "triton"):
        with use(path):
            out = KERNELS[name](*args)
        assert out is None or (out if isinstance(out, torch.Tensor) else out[0]).shape[0] == 0


@pytest.mark.parametrize("name", KERNELS)
def test_operators_are_known_to_torch(name):
    """Schema, fake implementation and what is changed in place, as torch's own checker sees them."""
    with use("triton"):
        torch.library.opcheck(
            KERNELS[name].opaque, small(name, "cuda" if torch.cuda.is_available() else "cpu"),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


NO_TRITON = """
import sys
class Nowhere:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name=name)
sys.meta_path.insert(0, Nowhere())
"""


def without_triton(code: str, *arguments: str) -> str:
    """What the code prints on a machine like a Mac, for which there is no Triton."""
    done = subprocess.run([sys.executable, "-c", NO_TRITON + code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_needs_no_triton():
    code = """
import torch, minillm.kernels as k
assert not k.HAS_TRITON
print(k.softmax(torch.zeros(1, 4)).tolist(), k.KERNELS["softmax"].path(torch.zeros(1, 4)))
"""
    assert without_triton(code) == "[[0.25, 0.25, 0.25, 0.25]] torch"


def test_engine_and_command_need_no_triton(tiny_path):
    """Plain, in few bits, with a cache of 8 bits: from the import to the text; and every module can be imported."""
    code = """
import importlib, pkgutil
import minillm
for module in pkgutil.walk_packages(minillm.__path__, "minillm."):
    importlib.import_module(module.name)
from minillm import LLM, SamplingParams
from minillm.kernels import HAS_TRITON
counts = []
for options in ({}, {"quantization": "int4"}, {"quantization": "w8a8", "kv_cache_dtype": "int8"}):
    llm = LLM(sys.argv[1], device="cpu", **options)
    [out] = llm.generate([[5, 6, 7]], SamplingParams(temperature=0.8, top_p=0.9, max_tokens=4, ignore_eos=True))
    counts.append(len(out.token_ids))
print(HAS_TRITON, counts)
from minillm.cli import app
app(["generate", "hello", "--model", sys.argv[1], "--max-tokens", "4"])
"""
    first, *answer = without_triton(code, str(tiny_path)).splitlines()
    assert first == "False [4, 4, 4]"
    assert answer


def test_unknown_device_gets_the_default_at_once():
    assert common.tuned(torch.device("cpu"), "softmax 64", num_warps=3) == {"num_warps": 3}


def test_stored_sizes_are_ints_for_known_kernels():
    import json
    from pathlib import Path

    files = sorted((Path(common.__file__).parent / "tuned").glob("*.json"))
    for path in files:
        for key, sizes in json.loads(path.read_text()).items():
            assert key.split()[0] in {*KERNELS, "rms_norm", "rope"}, key
            assert all(type(v) is int and v >= (name != "FIRST") for name, v in sizes.items()), (path, key)


def test_dependent_launch_is_for_gpus_and_ends_with_its_block():
    @dependent_launch()
    def fails():
        assert common._dependent
        assert common.pdl(torch.device("cpu")) == {"PDL": False}
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not common._dependent


@pytest.mark.gpu
def test_dependent_kernels_wait_for_one_another():
    """A chain in which every kernel reads what the one before it wrote, many times over, in a graph."""
    torch.manual_seed(0)
    w = torch.randn(40, 256, 256, device="cuda", dtype=torch.bfloat16) / 16
    norm, x = torch.ones(256, device="cuda", dtype=torch.bfloat16), torch.randn(1, 256, device="cuda").bfloat16()

    def chain(x):
        branch, stream = x, None
        for a in w:
            branch, stream = norm_linear(branch, stream, norm, a, 1e-5, True)
            branch = linear(torch.cat((branch, branch), -1), a)  # one of torch's kernels between ours
        return rms_norm(branch, norm, 1e-5)

    with torch.inference_mode():
        expected = chain(x)
        with dependent_launch():
            chain(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = chain(x)
        for _ in range(200):
            got.zero_()
            graph.replay()
            assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_compile_and_in_a_graph(dtype):
    def block(x, w, gate_up, down):
        h = rms_norm(x, w, 1e-5)
        return x + matmul(swiglu(matmul(h, gate_up)), down)

    torch.manual_seed(0)
    x, w = torch.randn(64, 128, device="cuda", dtype=dtype), torch.ones(128, device="cuda", dtype=dtype)
    gate_up, down = (torch.randn(s, device="cuda", dtype=dtype) / 16 for s in ((512, 128), (128, 256)))
    with torch.inference_mode():
        with use("reference"):
            expected = block(x, w, gate_up, down)
        eager = block(x, w, gate_up, down)
        compiled = torch.compile(block, fullgraph=True)(x, w, gate_up, down)
        graph, static = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph):
            captured = block(static, w, gate_up, down)
        static.copy_(x)
        graph.replay()
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for got in (eager, compiled, captured):
        assert error(got, expected) < limit


@pytest.mark.gpu
def test_poisoned_outputs_are_all_written(monkeypatch):
    """torch.empty hands out NaN: whatever a kernel does not write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
    for name in KERNELS:
        args = small(name, "cuda", torch.bfloat16)
        out = KERNELS[name](*args)
        for result in args[:2] if out is None else out if isinstance(out, tuple) else (out,):
            assert (result.isfinite() | (result == -torch.inf if name == "mask_logits" else False)).all(), name


def test_rope_by_factors_made_once(dtype):
    """As Hugging Face writes it, bit for bit; the same from cos and sin, and from their factors."""
    x, angles = torch.randn(2, 5, 3, 16).to(dtype), torch.randn(5, 8) * 9
    cos, sin = (torch.cat((t, t), -1).to(dtype)[:, None] for t in (angles.cos(), angles.sin()))
    expected = x * cos + torch.cat((-x[..., 8:], x[..., :8]), -1) * sin
    before = x.clone()
    assert torch.equal(apply_rope(x, angles.cos(), angles.sin()), expected)
    factors = rope_factors(angles.cos(), angles.sin(), dtype)
    assert [f.shape for f in factors] == [(5, 1, 16)] * 2
    assert torch.equal(apply_rope(x, *factors), expected)
    assert torch.equal(x, before)
    inputs = [t.double().requires_grad_() for t in (x, angles.cos(), angles.sin())]
    assert torch.autograd.gradcheck(apply_rope, inputs)


@pytest.mark.parametrize("shape", [(1, 576), (5, 64), (3, 2, 17), (1, 2048)])
def test_rms_norm_is_hugging_faces_bit_for_bit(dtype, shape):
    x, weight = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    with use("torch"):
        assert torch.equal(rms_norm(x, weight, 1e-5), weight * scaled.to(dtype))


def test_torch_softmax_and_silu_agree_where_nothing_is_special():
    x = torch.randn(3, 10)
    assert torch.equal(softmax(x), x.softmax(-1))
    assert torch.equal(swiglu(x), F.silu(x[:, :5]) * x[:, 5:])
