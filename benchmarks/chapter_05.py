"""What chapter 5 quotes: FlashAttention in steps, each a kernel of its own, timed beside torch's; memory; numerics.

    python benchmarks/chapter_05.py          on a GPU: everything, recorded under results/<device>/chapter_05.json
    python benchmarks/chapter_05.py --cpu    every step at a tiny size in Triton's interpreter: checked, not recorded

The kernels here keep one thing at a time: lengths are multiples of the blocks, attention is causal, every head has its
own keys. What they leave out is in minillm/kernels/flash_attention.py, which stands at the end of the ladder.
"""

# ruff: noqa: E402
import math
import os
import sys
from collections.abc import Callable

CPU = "--cpu" in sys.argv
if CPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from common import record
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minillm.kernels import flash_attention

DEVICE, DTYPE = ("cpu", torch.float32) if CPU else ("cuda", torch.bfloat16)  # the interpreter computes bf16 wrongly
LAYOUTS = {"d64 h32": (1, 2, 64, 16), "d128 h16": (1, 2, 64, 32)} if CPU else {
    "d64 h32": (4, 32, 4096, 64), "d128 h16": (4, 16, 4096, 128)}  # fmt: skip
M, N = (16, 16) if CPU else (64, 64)  # queries and keys a block, unless said
LENGTHS = [1 << i for i in range(10, 16)]
LOG2E = math.log2(math.e)


# ---- the ladder: each kernel is the one before with one thing changed ----------------------------------------------


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores and weights written out, in the inputs' dtype.  q, k, v [B, H, T, D] -> [B, H, T, D]"""
    scores = (q @ k.mT).mul_(q.shape[-1] ** -0.5)  # [B, H, T, T]
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
    return scores.masked_fill_(future, -torch.inf).softmax(-1) @ v


@triton.jit
def block(ptr, row, D: tl.constexpr, ROWS: tl.constexpr):
    """Pointers to ROWS rows of D numbers, from `row` on."""
    return ptr + (row + tl.arange(0, ROWS))[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def update(acc, row_max, row_sum, scores, v):
    """Take a block of scores and its values into the running softmax."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    weights, shrink = tl.exp(scores - new_max[:, None]), tl.exp(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def tiled(q_ptr, k_ptr, v_ptr, o_ptr, T, scale, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """No score leaves the chip: M queries against all keys, N at a time."""
    first, base = tl.program_id(0) * M, tl.program_id(1) * T
    q = tl.load(block(q_ptr, base + first, D, M))
    acc, row_sum = tl.zeros((M, D), tl.float32), tl.zeros((M,), tl.float32)
    row_max = tl.full((M,), -1e30, tl.float32)
    for start in range(0, T, N):
        k, v = tl.load(block(k_ptr, base + start, D, N)), tl.load(block(v_ptr, base + start, D, N))
        scores = tl.dot(q, k.T, input_precision="ieee") * scale
        seen = (first + tl.arange(0, M))[:, None] >= (start + tl.arange(0, N))[None, :]
        acc, row_max, row_sum = update(acc, row_max, row_sum, tl.where(seen, scores, -float("inf")), v)
    tl.store(block(o_ptr, base + first, D, M), (acc / row_sum[:, None]).to(o_ptr.dtype.element_ty))


@triton.jit
def skipping(q_ptr, k_ptr, v_ptr, o_ptr, T, scale, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Ends at the diagonal: half the blocks."""
    first, base = tl.program_id(0) * M, tl.program_id(1) * T
    q = tl.load(block(q_ptr, base + first, D, M))
    acc, row_sum = tl.zeros((M, D), tl.float32), tl.zeros((M,), tl.float32)
    row_max = tl.full((M,), -1e30, tl.float32)
    for start in range(0, first + M, N):
        k, v = tl.load(block(k_ptr, base + start, D, N)), tl.load(block(v_ptr, base + start, D, N))
        scores = tl.dot(q, k.T, input_precision="ieee") * scale
        seen = (first + tl.arange(0, M))[:, None] >= (start + tl.arange(0, N))[None, :]
        acc, row_max, row_sum = update(acc, row_max, row_sum, tl.where(seen, scores, -float("inf")), v)
    tl.store(block(o_ptr, base + first, D, M), (acc / row_sum[:, None]).to(o_ptr.dtype.element_ty))


@triton.jit
def two_loops(q_ptr, k_ptr, v_ptr, o_ptr, T, scale, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """A mask only on the diagonal: blocks before it are seen whole."""
    first, base = tl.program_id(0) * M, tl.program_id(1) * T
    q = tl.load(block(q_ptr, base + first, D, M))
    acc, row_sum = tl.zeros((M, D), tl.float32), tl.zeros((M,), tl.float32)
    row_max = tl.full((M,), -1e30, tl.float32)
    whole = first // N * N
    for start in range(0, whole, N):
        k, v = tl.load(block(k_ptr, base + start, D, N)), tl.load(block(v_ptr, base + start, D, N))
        scores = tl.dot(q, k.T, input_precision="ieee") * scale
        acc, row_max, row_sum = update(acc, row_max, row_sum, scores, v)
    for start in range(whole, first + M, N):
        k, v = tl.load(block(k_ptr, base + start, D, N)), tl.load(block(v_ptr, base + start, D, N))
        scores = tl.dot(q, k.T, input_precision="ieee") * scale
        seen = (first + tl.arange(0, M))[:, None] >= (start + tl.arange(0, N))[None, :]
        acc, row_max, row_sum = update(acc, row_max, row_sum, tl.where(seen, scores, -float("inf")), v)
    tl.store(block(o_ptr, base + first, D, M), (acc / row_sum[:, None]).to(o_ptr.dtype.element_ty))


@triton.jit
def update2(acc, row_max, row_sum, scores, v, scale):
    """The same to base 2: `scale` has log2(e) in it, and one multiply-add a score makes the exponent."""
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    weights, shrink = tl.exp2(scores * scale - new_max[:, None]), tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def base_two(q_ptr, k_ptr, v_ptr, o_ptr, T, scale, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Scores stay unscaled; 2^x takes the place of e^x."""
    first, base = tl.program_id(0) * M, tl.program_id(1) * T
    q = tl.load(block(q_ptr, base + first, D, M))
    acc, row_sum = tl.zeros((M, D), tl.float32), tl.zeros((M,), tl.float32)
    row_max = tl.full((M,), -1e30, tl.float32)
    whole = first // N * N
    for start in range(0, whole, N):
        k, v = tl.load(block(k_ptr, base + start, D, N)), tl.load(block(v_ptr, base + start, D, N))
        scores = tl.dot(q, k.T, input_precision="ieee")
        acc, row_max, row_sum = update2(acc, row_max, row_sum, scores, v, scale)
    for start in range(whole, first + M, N):
        k, v = tl.load(block(k_ptr, base + start, D, N)), tl.load(block(v_ptr, base + start, D, N))
        scores = tl.dot(q, k.T, input_precision="ieee")
        seen = (first + tl.arange(0, M))[:, None] >= (start + tl.arange(0, N))[None, :]
        acc, row_max, row_sum = update2(acc, row_max, row_sum, tl.where(seen, scores, -float("inf")), v, scale)
    tl.store(block(o_ptr, base + first, D, M), (acc / row_sum[:, None]).to(o_ptr.dtype.element_ty))


@triton.jit
def described(
    q_desc, k_desc, v_desc, o_ptr, T, scale, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, LONG_FIRST: tl.constexpr
):
    """Blocks come by descriptor: one instruction for the copy engine, no addresses in registers."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if LONG_FIRST else tl.program_id(0)
    first, base = tile * M, tl.program_id(1) * T
    q = q_desc.load([base + first, 0])
    acc, row_sum = tl.zeros((M, D), tl.float32), tl.zeros((M,), tl.float32)
    row_max = tl.full((M,), -1e30, tl.float32)
    whole = first // N * N
    for start in tl.range(0, whole, N):
        scores = tl.dot(q, k_desc.load([base + start, 0]).T, input_precision="ieee")
        acc, row_max, row_sum = update2(acc, row_max, row_sum, scores, v_desc.load([base + start, 0]), scale)
    for start in tl.range(whole, first + M, N):
        scores = tl.dot(q, k_desc.load([base + start, 0]).T, input_precision="ieee")
        seen = (first + tl.arange(0, M))[:, None] >= (start + tl.arange(0, N))[None, :]
        scores = tl.where(seen, scores, -float("inf"))
        acc, row_max, row_sum = update2(acc, row_max, row_sum, scores, v_desc.load([base + start, 0]), scale)
    tl.store(block(o_ptr, base + first, D, M), (acc / row_sum[:, None]).to(o_ptr.dtype.element_ty))


def launch(kernel: Callable, m: int = M, n: int = N, warps: int = 4, stages: int = 1, **more: bool) -> Callable:
    """q, k, v [B, H, T, D] contiguous -> [B, H, T, D]; what the compiler used goes to the function's `.used`."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (length, size), out = q.shape[2:], torch.empty_like(q)
        assert length % m == length % n == 0, (q.shape, m, n)
        scale = size**-0.5 * (LOG2E if kernel in (base_two, described) else 1.0)
        inputs = (q, k, v)
        if kernel is described:
            shapes = ([m, size], [n, size], [n, size])
            inputs = [TensorDescriptor.from_tensor(x.view(-1, size), s) for x, s in zip(inputs, shapes, strict=True)]
        grid = (length // m, q.shape[0] * q.shape[1])
        done = kernel[grid](*inputs, out, length, scale, D=size, M=m, N=n, num_warps=warps, num_stages=stages, **more)
        if done is not None and hasattr(done, "n_regs"):
            run.used = {"registers": done.n_regs, "spills": done.n_spills, "shared bytes": done.metadata.shared}
        return out

    run.used = {}
    return run


def package(batch: int, length: int) -> Callable:
    """minillm's kernel, which takes packed tokens: q, k, v [B · T, H, D] -> [B · T, H, D]"""
    edges = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=DEVICE)
    return lambda q, k, v: flash_attention.triton(q, k, v, edges, edges, length)


def packed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, H, T, D] -> [B · T, H, D], copied outside of what is timed"""
    return tuple(x.transpose(1, 2).flatten(0, 1).contiguous() for x in tensors)


def sdpa(backend: str) -> Callable:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, "MATH" if CPU else backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def steps() -> dict[str, Callable]:
    """The ladder, in order, then the peers."""
    pointers = {"tiled": tiled, "hidden blocks skipped": skipping, "two loops": two_loops, "2^x": base_two}
    ladder = {"naive": naive, **{name: launch(kernel) for name, kernel in pointers.items()}}
    ladder["pointers, 3 stages"] = launch(base_two, stages=3)
    for stages in (1, 2, 3):
        name = f"descriptors, {stages} stage{'s' if stages > 1 else ''}"
        ladder[name] = launch(described, stages=stages, LONG_FIRST=False)
    ladder["long tiles first"] = launch(described, stages=3, LONG_FIRST=True)
    return ladder | {"SDPA flash": sdpa("FLASH_ATTENTION"), "SDPA cuDNN": sdpa("CUDNN_ATTENTION")}


def sizes() -> dict[str, Callable]:
    """The last step with other blocks, warps and stages."""
    tried = [(64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 128, 4, 3),
             (64, 64, 8, 3), (128, 32, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 4, 2),
             (128, 128, 8, 2), (128, 128, 8, 3)]  # fmt: skip
    tried = [(16, 32, 4, 1), (32, 16, 4, 1)] if CPU else tried
    return {f"{m} x {n}, {w} warps, {s} stages": launch(described, m, n, w, s, LONG_FIRST=True)
            for m, n, w, s in tried}  # fmt: skip


# ---- measuring -----------------------------------------------------------------------------------------------------


def difference(got: Tensor, expected: Tensor) -> float:
    """The relative difference in the 2-norm; infinite where got is not finite."""
    if not got.isfinite().all():
        return math.inf
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def measure(name: str, run: Callable, inputs: tuple[Tensor, ...], expected: Tensor, flops: float) -> dict:
    """Compare with `expected`, then time: one row. What does not fit on the chip is a row with its reason."""
    try:
        found = difference(run(*inputs), expected)
    except Exception as error:
        if "OutOfResources" not in type(error).__name__ and "SDPA" not in name and "warps" not in name:
            raise  # a size that the compiler refuses is a row too; a step of the ladder must run
        print(f"  {name:32} skipped: {error}", flush=True)
        return {"step": name, "skipped": str(error).splitlines()[0][:120]}
    if not found < (1e-5 if CPU else 2e-2):
        raise AssertionError(f"{name}: differs by {found}")
    row = {"step": name, "difference": found, **getattr(run, "used", {})}
    if not CPU:
        from gpu import seconds

        row["seconds"] = seconds([lambda: run(*inputs)])
        row["FLOP/s"] = flops / row["seconds"]
    rate = f"{row['seconds'] * 1e3:8.3f} ms {row['FLOP/s'] / 1e12:6.0f} TFLOP/s" if not CPU else "agrees"
    print(f"  {name:32} {rate}  difference {found:.1e} {getattr(run, 'used', '')}", flush=True)
    return row


def ladder() -> dict:
    """Both layouts: every step, then every size; causal counts half the operations."""
    result = {}
    for layout, (batch, heads, length, size) in LAYOUTS.items():
        print(layout, flush=True)
        inputs = tuple(torch.randn(batch, heads, length, size, device=DEVICE, dtype=DTYPE) for _ in range(3))
        expected = sdpa("FLASH_ATTENTION")(*inputs)
        flops = 2.0 * batch * heads * length * length * size
        rows = [measure(name, run, inputs, expected, flops) for name, run in steps().items()]
        ours = measure("minillm", package(batch, length), packed(*inputs), packed(expected)[0], flops)
        result[layout] = {
            "batch": batch, "heads": heads, "tokens": length, "head size": size, "flops": flops, "steps": [*rows, ours],
            "sizes": [measure(name, run, inputs, expected, flops) for name, run in sizes().items()],
        }  # fmt: skip
    return result


def memory(heads: int = 32, size: int = 128) -> list[dict]:
    """Peak bytes above the inputs, of one sequence with 32 heads of 128 that share no keys, by length."""
    rows = []
    for length in LENGTHS:
        q, k, v = (torch.randn(1, heads, length, size, device=DEVICE, dtype=DTYPE) for _ in range(3))
        cases = {"naive": (naive, (q, k, v)), "minillm": (package(1, length), packed(q, k, v))}
        row = {"tokens": length, "inputs": 3 * q.numel() * q.element_size()}
        for name, (run, inputs) in cases.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            try:
                run(*inputs)
                torch.cuda.synchronize()
                row[name] = torch.cuda.max_memory_allocated() - before
            except torch.OutOfMemoryError:
                row[name] = None
        rows.append(row)
        print(row, flush=True)
        del q, k, v, cases, inputs
    return rows


def numerics(heads: int = 8, size: int = 64) -> dict:
    """Relative errors against fp64 on the same bf16 inputs, for small and for large scores; and no maximum."""
    length = 64 if CPU else 4096
    result: dict = {"tokens": length, "errors": [], "without the maximum": []}
    for spread in (1.0, 4.0, 16.0):  # the standard deviation of a score
        q, k, v = (torch.randn(1, heads, length, size, device=DEVICE).bfloat16() for _ in range(3))
        q = (q * spread).bfloat16()
        exact = naive(q.double(), k.double(), v.double())
        got = {
            "rounding the exact result": exact.bfloat16(),
            "naive, all in bf16": naive(q, k, v),
            "naive, all in fp32": naive(q.float(), k.float(), v.float()).bfloat16(),
        }
        errors = {name: difference(x, exact) for name, x in got.items()}
        if not CPU:
            errors["minillm"] = difference(package(1, length)(*packed(q, k, v)), packed(exact)[0])
            for name, backend in (("SDPA flash", "FLASH_ATTENTION"), ("SDPA cuDNN", "CUDNN_ATTENTION")):
                errors[name] = difference(sdpa(backend)(q, k, v), exact)
        result["errors"].append({"spread": spread, **errors})
        scores = (q[0].double() @ k[0].double().mT) * size**-0.5
        seen = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
        lost = {"spread": spread, "largest score": float(scores.masked_fill(~seen, -torch.inf).max())}
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            weights = torch.exp(scores.to(dtype)).masked_fill(~seen, 0)
            lost[str(dtype).removeprefix("torch.")] = float((~weights.sum(-1).isfinite()).float().mean())
        result["without the maximum"].append(lost)
        print(result["errors"][-1], lost, flush=True)
    return result


@torch.inference_mode()
def main() -> None:
    """Check, measure, record."""
    torch.manual_seed(0)
    if CPU:
        ladder()
        numerics()
        return
    from gpu import ceilings

    result = {"ceilings": ceilings(), "ladder": ladder(), "memory": memory(), "numerics": numerics()}
    print(record("chapter_05", result, packages=("torch", "triton")))


if __name__ == "__main__":
    main()
