"""Every kernel against its peers, its floor and its ceiling, in one run.

    python benchmarks/kernels.py                    in full precision, recorded under results/<device>/kernels.json
    python benchmarks/kernels.py bits               in fewer bits, recorded as kernels_bits.json
    python benchmarks/kernels.py memory attention   these suites
    python benchmarks/kernels.py --quick            a minute's worth; on a CPU the torch paths, nothing recorded

A case has inputs, a floor (bytes to move over the measured copy, FLOPs over the measured product; the larger counts)
and runs by name: ours, and every peer that is present. Outputs are compared before anything is timed.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from common import median_seconds, record
from torch import Tensor

from minillm import kernels
from minillm.kernels.rope import quantize_heads

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
EPS = 1e-5
SUITES = ("memory", "matmul", "attention", "paged")
BITS = ("w4a16", "w8a16", "w8a8", "cache")
MORE = ("lora",)  # recorded alone
L2_HOLDS = 40e6  # of an H100's 50 MB


@dataclass
class Case:
    """One operation at one size. `runs`: name -> function of the inputs, "minillm" first."""

    suite: str
    name: str
    inputs: tuple[Tensor, ...]
    runs: dict[str, Callable]
    bytes: float
    flops: float = 0.0
    tolerance: float = 1e-2
    skipped: dict[str, str] = field(default_factory=dict)


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(DTYPE)


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def compiled(function: Callable) -> Callable:
    """torch.compile's version, for fixed shapes."""
    return torch.compile(function, dynamic=False)


def rms(x: Tensor, w: Tensor) -> Tensor:
    x32 = x.float()
    return w * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def add_rms(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms(total, w), total


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    out = []
    for x in (q, k):
        first, second = x.chunk(2, -1)
        c, s = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)
        out.append(torch.cat((first * c - second * s, second * c + first * s), -1))
    return out[0], out[1]


def liger() -> dict[str, Callable]:
    """Liger's kernels, where it is installed."""
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return {}
    return {
        "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, EPS),
        "swiglu": lambda x, gate, up: LigerSiLUMulFunction.apply(gate, up),  # wants them apart and contiguous
    }


def memory_cases(quick: bool) -> list[Case]:
    """Operations that move bytes: tokens x features of an 8B model, SmolLM2's, and a vocabulary."""
    big = (256, 1024) if quick else (16_384, 4_096)
    peers, cases = liger(), []
    for rows, n in (
        [(64, 8192)] if quick else [(65_536, 4_096), (16_384, 4_096), (4_096, 32_768), (256, 49_152), (64, 128_256)]
    ):
        x = randn(rows, n, scale=2)
        runs = {"minillm": lambda x: kernels.softmax(x), "torch": lambda x: x.softmax(-1)}
        runs["torch.compile"] = compiled(lambda x: x.softmax(-1))
        cases.append(Case("memory", f"softmax {rows} x {n}", (x,), runs, 2 * nbytes(x)))
    for rows, n in [big] if quick else [(65_536, 4_096), big, (16_384, 576), (128, 4_096)]:
        x, w, residual = randn(rows, n), randn(n), randn(rows, n)
        runs = {"minillm": lambda x, w: kernels.rms_norm(x, w, EPS), "torch": rms, "torch.compile": compiled(rms)}
        runs |= {"liger": peers["rms_norm"]} if "rms_norm" in peers else {}
        cases.append(Case("memory", f"rms_norm {rows} x {n}", (x, w), runs, 2 * nbytes(x)))
        runs = {"minillm": lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS), "torch": add_rms}
        runs["torch.compile"] = compiled(add_rms)
        cases.append(Case("memory", f"add_rms_norm {rows} x {n}", (x, residual, w), runs, 4 * nbytes(x)))
    for rows, n in [(64, 4096)] if quick else [(16_384, 14_336), (16_384, 1_536), (128, 14_336)]:
        x = randn(rows, 2 * n)
        inputs = (x, *(half.contiguous() for half in x.chunk(2, -1)))
        plain = kernels.KERNELS["swiglu"].torch
        fused = compiled(plain)
        runs = {"minillm": lambda x, *_: kernels.swiglu(x), "torch": lambda x, *_, plain=plain: plain(x)}
        runs["torch.compile"] = lambda x, *_, fused=fused: fused(x)
        runs |= {"liger": peers["swiglu"]} if "swiglu" in peers else {}
        cases.append(Case("memory", f"swiglu {rows} x {n}", inputs, runs, 1.5 * nbytes(x)))
    return cases + rope_cases(quick)


def rope_cases(quick: bool) -> list[Case]:
    """RoPE in place, and with the cache written."""
    cases = []
    for tokens, heads, kv, size in (
        [(64, 9, 3, 64)] if quick else [(65_536, 32, 8, 128), (16_384, 32, 8, 128), (16_384, 9, 3, 64)]
    ):
        q, k, v = randn(tokens, heads, size), randn(tokens, kv, size), randn(tokens, kv, size)
        angles = torch.rand(tokens, size // 2, device=DEVICE) * 6
        cos, sin = angles.cos(), angles.sin()

        def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            kernels.rope(q, k, cos, sin)
            return q, k

        runs = {"minillm": ours, "torch": rotate, "torch.compile": compiled(rotate)}
        moved = 2 * nbytes(q, k) + nbytes(cos, sin)
        name = f"{tokens} x {heads}+{kv} x {size}"
        cases.append(Case("memory", f"rope {name}", (q, k, cos, sin), runs, moved))
        slots = torch.randperm(tokens, device=DEVICE)
        caches = torch.zeros(2, tokens, kv, size, device=DEVICE, dtype=DTYPE)

        def cached(q, k, v, cos, sin, k_cache, v_cache, slots) -> tuple[Tensor, ...]:
            kernels.rope_and_cache(q, k, v, cos, sin, k_cache, v_cache, slots)
            return q, k_cache, v_cache

        def plain(q, k, v, cos, sin, k_cache, v_cache, slots) -> tuple[Tensor, ...]:
            q, k = rotate(q, k, cos, sin)
            k_cache[slots], v_cache[slots] = k, v
            return q, k_cache, v_cache

        runs = {"minillm": cached, "torch": plain, "torch.compile": compiled(plain)}
        moved += 2 * nbytes(v) + nbytes(slots)
        inputs = (q, k, v, cos, sin, *caches, slots)
        cases.append(Case("memory", f"rope_and_cache {name}", inputs, runs, moved))
    return cases


def matmul_cases(quick: bool) -> list[Case]:
    """Products, square and as an 8B model has them; and with SwiGLU behind."""
    cases = []
    shapes = (
        [(256, 256, 256)]
        if quick
        else [(8192,) * 3, (4096,) * 3, (2048,) * 3, (4096, 4096, 14_336), (128, 14_336, 4096)]
    )
    for m, n, k in shapes:
        x, w = randn(m, k), randn(n, k, scale=k**-0.5)
        runs = {"minillm": lambda x, w: kernels.matmul(x, w), "torch": F.linear}
        moved = nbytes(x, w) + m * n * x.element_size()
        cases.append(Case("matmul", f"matmul {m} x {n} x {k}", (x, w), runs, moved, 2.0 * m * n * k))
    for m, i, k in [] if quick else [(8192, 14_336, 4096), (16_384, 1536, 576)]:
        x, w = randn(m, k), randn(2 * i, k, scale=k**-0.5)
        plain = kernels.KERNELS["swiglu"].torch
        runs = {
            "minillm": lambda x, w: kernels.matmul_swiglu(x, w),
            "torch": lambda x, w: kernels.KERNELS["swiglu"].torch(F.linear(x, w)),
            "torch.compile": compiled(lambda x, w, plain=plain: plain(F.linear(x, w))),
            "cuBLAS, our swiglu": lambda x, w: kernels.swiglu(F.linear(x, w)),
        }
        moved = nbytes(x, w) + m * i * x.element_size()
        name = f"matmul_swiglu {m} x {i} x {k}"
        cases.append(Case("matmul", name, (x, w), runs, moved, 4.0 * m * i * k))
    return cases


def w8a8_cases(quick: bool) -> list[Case]:
    """Products of 8-bit numbers at an 8B model's sizes, and quantising the rows. FLOPs are counted half: 8 bits have
    twice the rate of bf16, in which the ceiling is measured. cuBLAS in bf16 has the same numbers, before rounding.
    """
    cases = []
    shapes = [(m, *nk) for nk in ((14_336, 4096), (4096, 14_336)) for m in (1, 16, 64, 256, 2048, 8192)]
    for m, n, k in [(8, 256, 512)] if quick else shapes:
        for dtype in (torch.int8, torch.float8_e4m3fn):
            x, w = (kernels.quantize_rows(randn(rows, k), dtype) for rows in (m, n))
            plain = [(q.float() * scale).to(DTYPE) for q, scale in (x, w)]
            inputs = (*x, *w, *plain)
            name = f"w8a8 {str(dtype).removeprefix('torch.')} {m} x {n} x {k}"
            moved = nbytes(*inputs[:4]) + m * n * DTYPE.itemsize
            cases.append(Case("w8a8", name, inputs, eight_bit_products(dtype, m), moved, 1.0 * m * n * k))
    for rows, n in [(64, 512)] if quick else [(1, 4096), (64, 4096), (2048, 4096), (8192, 4096), (8192, 14_336)]:
        x, residual, weight = randn(rows, n), randn(rows, n), randn(n)
        for dtype in (torch.int8, torch.float8_e4m3fn):
            op, of = kernels.KERNELS["quantize_rows"], str(dtype).removeprefix("torch.")
            runs = {
                "minillm": lambda x, dtype=dtype: kernels.quantize_rows(x, dtype),
                "torch": lambda x, op=op, dtype=dtype: op.torch(x, dtype),
                "torch.compile": compiled(lambda x, op=op, dtype=dtype: op.torch(x, dtype)),
            }
            cases.append(Case("w8a8", f"quantize_rows {of} {rows} x {n}", (x,), runs, 1.5 * nbytes(x)))
        runs = {
            "minillm": lambda x, r, w: kernels.norm_quantize_rows(x, r, w, EPS),
            "our norm, then quantize_rows": norm_then_quantize,
        }
        cases.append(Case("w8a8", f"norm_quantize_rows {rows} x {n}", (x, residual, weight), runs, 3.5 * nbytes(x)))
    return cases


def norm_then_quantize(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    normed, total = kernels.add_rms_norm(x, residual, weight, EPS)
    return *kernels.quantize_rows(normed), total


def eight_bit_products(dtype: torch.dtype, m: int) -> dict[str, Callable]:
    """Ours, cuBLAS' in bf16, and torch's 8-bit product, for int8 with the scales by a compiled epilogue."""
    runs: dict[str, Callable] = {
        "minillm": lambda x, sx, w, sw, *_: kernels.w8a8(x, sx, w, sw, None, DTYPE),
        "bf16" if GPU else "fp32": lambda *inputs: F.linear(*inputs[-2:]),
    }
    if not GPU:
        return runs
    if dtype == torch.int8 and m > 16:
        epilogue = compiled(lambda y, sx, sw: (y.float() * sx * sw.T).to(DTYPE))
        runs["torch._int_mm"] = lambda x, sx, w, sw, *_: epilogue(torch._int_mm(x, w.T), sx, sw)
    if dtype == torch.float8_e4m3fn:
        runs["torch._scaled_mm"] = lambda x, sx, w, sw, *_: torch._scaled_mm(
            x, w.T, sx, sw.T, out_dtype=DTYPE, use_fast_accum=True
        )
    return runs


def attention_cases(quick: bool) -> list[Case]:
    """Prompts of 16k tokens in all, in sequences of 1k, 4k and 16k."""
    cases = []
    lengths = (256,) if quick else (1024, 4096, 16_384)
    layouts = [(4, 4, 64)] if quick else [(32, 32, 64), (16, 16, 128), (9, 3, 64), (32, 8, 128)]
    for heads, kv, size in layouts:
        for causal in (True, False) if heads == kv else (True,):
            for length in lengths:
                cases.append(attention_case(heads, kv, size, length, max(lengths) // length, causal))
    return cases


def attention_case(heads: int, kv: int, size: int, length: int, batch: int, causal: bool) -> Case:
    q = randn(batch * length, heads, size)
    k, v = randn(batch * length, kv, size), randn(batch * length, kv, size)
    bounds = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=DEVICE)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(batch, length, -1, size).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != kv)
        return out.transpose(1, 2).reshape(-1, heads, size)

    runs = {"minillm": lambda q, k, v: kernels.flash_attention(q, k, v, bounds, bounds, length, causal)}
    runs |= sdpa_backends(dense) if GPU else {"torch": dense}
    if GPU:
        runs["flex_attention"] = flex(batch, length, size, causal, heads != kv)
    flops = 4.0 * batch * heads * length * length * size * (0.5 if causal else 1)
    name = f"attention d{size} h{heads}/{kv} {'causal' if causal else 'full'} {length}"
    return Case("attention", name, (q, k, v), runs, nbytes(q, q, k, v), flops)


def sdpa_backends(dense: Callable) -> dict[str, Callable]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def by(backend) -> Callable:
        def run(*inputs: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return dense(*inputs)

        return run

    return {"SDPA flash": by(SDPBackend.FLASH_ATTENTION), "SDPA cuDNN": by(SDPBackend.CUDNN_ATTENTION)}


def flex(batch: int, length: int, size: int, causal: bool, grouped: bool) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, DEVICE) if causal else None
    fast = compiled(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(batch, length, -1, size).transpose(1, 2) for x in (q, k, v))
        out = fast(q, k, v, block_mask=mask, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(-1, q.shape[1], size)

    return run


def paged_cases(quick: bool) -> list[Case]:
    """Decoding, one query a sequence: keys and values in blocks of 16, and for SDPA in a row."""
    shapes = [(4, 256)] if quick else [(1, 8192), (1, 32_768), (16, 2048), (64, 2048), (128, 4096)]
    layouts = [(9, 3, 64)] if quick else [(32, 8, 128), (9, 3, 64)]
    return [paged_case(*layout, *shape) for layout in layouts for shape in shapes]


def paged_case(heads: int, kv: int, size: int, sequences: int, context: int, block_size: int = 16) -> Case:
    q, k, v = (randn(sequences, n, length, size) for n, length in ((heads, 1), (kv, context), (kv, context)))
    width = context // block_size
    order = torch.randperm(sequences * width, device=DEVICE)
    blocks = (x.transpose(1, 2).reshape(-1, block_size, kv, size).contiguous() for x in (k, v))
    k_blocks, v_blocks = (torch.empty_like(x).index_copy_(0, order, x).flatten(0, 1) for x in blocks)
    tables = order.view(sequences, width).int()
    lengths = torch.full((sequences,), context, dtype=torch.int32, device=DEVICE)
    bounds = torch.arange(sequences + 1, dtype=torch.int32, device=DEVICE)

    plan = None if GPU else kernels.AttentionPlan(tables, lengths, bounds, block_size)  # once a step, for all layers

    def ours(q: Tensor, k: Tensor, v: Tensor, k_blocks: Tensor, v_blocks: Tensor) -> Tensor:
        if plan is not None:
            return plan.attend(q[:, :, 0], k_blocks, v_blocks)
        return kernels.paged_attention(q[:, :, 0], k_blocks, v_blocks, tables, lengths, bounds, 1, block_size)

    def dense(q: Tensor, k: Tensor, v: Tensor, k_blocks: Tensor, v_blocks: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]

    name = f"paged decode d{size} h{heads}/{kv} {sequences} x {context}"
    runs = {"minillm": ours, "SDPA, contiguous": dense}
    flops = 4.0 * sequences * context * heads * size
    return Case("paged", name, (q, k, v, k_blocks, v_blocks), runs, nbytes(k, v), flops)


def cache_cases(quick: bool) -> list[Case]:
    """Decoding with keys and values of 8 bits, against the same kernel with bf16 ones."""
    shapes = [(4, 256)] if quick else [(1, 8192), (1, 32_768), (64, 2048), (128, 4096)]
    layouts = [(9, 3, 64)] if quick else [(32, 8, 128), (9, 3, 64)]
    return [
        cache_case(dtype, *layout, *shape)
        for layout in layouts
        for shape in shapes
        for dtype in (torch.int8, torch.float8_e4m3fn)
    ]


def cache_case(dtype: torch.dtype, heads: int, kv: int, size: int, sequences: int, context: int) -> Case:
    block_size, slots = 16, sequences * context
    q, k, v = randn(sequences, heads, size), randn(slots, kv, size), randn(slots, kv, size)
    (k_q, k_scale), (v_q, v_scale) = (quantize_heads(x, dtype, torch.float32) for x in (k, v))
    k_scale, v_scale = (x.T.contiguous().T for x in (k_scale, v_scale))  # as the engine's cache has them
    k, v = ((x.float() * s.float()[..., None]).to(DTYPE) for x, s in ((k_q, k_scale), (v_q, v_scale)))
    tables = torch.randperm(slots // block_size, device=DEVICE).view(sequences, -1).int()
    lengths = torch.full((sequences,), context, dtype=torch.int32, device=DEVICE)
    bounds = torch.arange(sequences + 1, dtype=torch.int32, device=DEVICE)
    rest = (tables, lengths, bounds, 1, block_size)

    def ours(q: Tensor, k_q: Tensor, v_q: Tensor, k_scale: Tensor, v_scale: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.paged_attention(q, k_q, v_q, *rest, k_scale=k_scale, v_scale=v_scale)

    runs = {"minillm": ours, "our bf16": lambda q, *x: kernels.paged_attention(q, *x[-2:], *rest)}
    kind = str(dtype).removeprefix("torch.").split("_")[0]
    name = f"paged decode {kind} d{size} h{heads}/{kv} {sequences} x {context}"
    inputs = (q, k_q, v_q, k_scale, v_scale, k, v)
    return Case("cache", name, inputs, runs, nbytes(*inputs[1:5]), 4.0 * slots * heads * size, 2e-2)


def lora_cases(quick: bool) -> list[Case]:
    """What adapters of rank 16 add to a product, which is already there; of so many different ones in a batch."""
    if quick:
        return [lora_case(*case) for case in ((64, 128, (64, 32, 32), 4), (8, 128, (128,), 1))]
    found = [(m, 4096, (4096,), n) for m, n in ((64, 1), (64, 8), (64, 64), (256, 1), (256, 64), (1, 1), (2048, 8))]
    found += [(64, 4096, (14_336,), n) for n in (1, 8, 64)] + [(64, 4096, (4096, 1024, 1024), 64)]
    return [lora_case(*case) for case in found]


def lora_case(m: int, k: int, rows: tuple[int, ...], distinct: int, rank: int = 16) -> Case:
    """Against vectors gathered for each token, and two batched products."""
    x, y = randn(m, k), randn(m, sum(rows))
    a, b = randn(distinct, len(rows), rank, k, scale=k**-0.5), randn(distinct, sum(rows), rank)
    adapters = torch.arange(m, device=DEVICE, dtype=torch.int32) % distinct + 1
    there = torch.ones(distinct, len(rows), dtype=torch.int32, device=DEVICE)
    plan = kernels.LoraPlan.of(adapters, distinct)

    def ours(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        kernels.multi_lora(y, x, a, b, there, rows, plan.adapters, plan.order, plan.starts)
        return y

    def gathered(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        mine, first = adapters.long() - 1, 0
        for part, size in enumerate(rows):
            low = torch.bmm(a[mine, part], x[:, :, None])  # [m, r, 1]
            y[:, first : first + size] += torch.bmm(b[mine, first : first + size], low)[:, :, 0]
            first += size
        return y

    name = f"lora r{rank} {m} tokens, {distinct} adapters, {k} to {' + '.join(map(str, rows))}"
    moved, flops = nbytes(a, b, x, y, y), 2.0 * m * rank * (len(rows) * k + sum(rows))
    return Case("lora", name, (y, x, a, b), {"minillm": ours, "gathered": gathered}, moved, flops, 2e-2)


def w8a16_cases(quick: bool) -> list[Case]:
    """Products with 8-bit weights, a scale a row, from one token to 256."""
    shapes = [(256, 512)] if quick else [(4096, 4096), (4096, 14_336), (14_336, 4096)]
    return [w8a16_case(m, k, n) for k, n in shapes for m in ((1, 8) if quick else (1, 8, 16, 64, 256))]


def w8a16_case(m: int, k: int, n: int) -> Case:
    """Against the bf16 product with the same weight."""
    q = torch.randint(-128, 128, (n, k), device=DEVICE, dtype=torch.int8)
    x, scale = randn(m, k), torch.rand(n, 1, device=DEVICE) / 128
    runs = {
        "minillm": lambda x, q, scale, w: kernels.w8a16(x, q, scale),
        "cuBLAS bf16" if GPU else "torch": lambda x, q, scale, w: F.linear(x, w),
    }
    inputs = (x, q, scale, (q.float() * scale).to(DTYPE))
    moved = nbytes(x, q, scale) + m * n * x.element_size()
    return Case("w8a16", f"w8a16 {k} x {n}, {m} tokens", inputs, runs, moved, 2.0 * m * n * k)


def w4a16_cases(quick: bool) -> list[Case]:
    """Products with 4-bit weights in groups of 128, from one token to 256."""
    shapes = [(256, 512)] if quick else [(4096, 4096), (4096, 14_336), (14_336, 4096), (4096, 28_672)]
    tokens = (1, 8) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256)
    return [w4a16_case(m, k, n) for k, n in shapes for m in tokens]


def w4a16_case(m: int, k: int, n: int, group: int = 128) -> Case:
    """Against the bf16 product with the same weight, which has the more bytes to read."""
    packed = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), device=DEVICE, dtype=torch.int32)
    tiles, scales, _ = kernels.repack(packed, (torch.rand(n, k // group, device=DEVICE) / 8).to(DTYPE))
    x, q = randn(m, k), kernels.unpack(packed, k).view(n, -1, group)
    w = (q.float() * scales[..., None].float()).view(n, k).to(DTYPE)
    runs = {
        "minillm": lambda x, tiles, scales, w: kernels.w4a16(x, tiles, scales),
        "cuBLAS bf16" if GPU else "torch": lambda x, tiles, scales, w: F.linear(x, w),
    }
    moved = nbytes(x, tiles, scales) + m * n * x.element_size()
    return Case("w4a16", f"w4a16 {k} x {n}, {m} tokens", (x, tiles, scales, w), runs, moved, 2.0 * m * n * k)


def difference(got, expected) -> float:
    """The largest relative difference, in the 2-norm, of several results."""
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    return max(float((g.float() - e.float()).norm() / e.float().norm()) for g, e in pairs)


def measure(case: Case, ceiling: dict[str, float]) -> dict:
    """Compare all runs' outputs, then time them: one row of the table."""
    outputs = {}
    for name, run in case.runs.items():
        try:
            outputs[name] = run(*(t.clone() for t in case.inputs))
        except Exception as error:
            case.skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    if "minillm" not in outputs:
        raise AssertionError(f"{case.name}: {case.skipped['minillm']}")
    peers = [name for name in outputs if name != "minillm"]
    found = max((difference(outputs["minillm"], outputs[name]) for name in peers), default=0.0)
    if not found < case.tolerance:
        raise AssertionError(f"{case.name}: results differ by {found}")
    del outputs
    floor = max(case.bytes / ceiling["copy bytes/s"], case.flops / ceiling["matmul FLOP/s"])
    times = {name: timed(case, case.runs[name]) for name in ("minillm", *peers)}
    best = min((times[name] for name in peers), default=times["minillm"])
    row = {
        "suite": case.suite, "case": case.name, "bytes": case.bytes, "flops": case.flops, "seconds": times,
        "of the ceiling": floor / times["minillm"], "against the best peer": best / times["minillm"],
        "difference": found, "skipped": case.skipped,
    }  # fmt: skip
    if case.suite in ("paged", *BITS, *MORE) and GPU:
        row |= extras_of(case, peers)
    show(row)
    return row


def extras_of(case: Case, peers: list[str]) -> dict:
    """With launches that overlap, as in an engine; attention also with inputs left in the L2 cache, where they fit."""
    from gpu import seconds

    extras: dict = {}
    if case.suite == "paged" and case.bytes < L2_HOLDS:
        calls = {name: lambda run=case.runs[name]: run(*case.inputs) for name in ("minillm", *peers)}
        extras["seconds, inputs in L2"] = {name: seconds([call] * 2) for name, call in calls.items()}
    with kernels.dependent_launch():
        seconds_ = timed(case, case.runs["minillm"])
    if seconds_ < 500e-6:  # what is longer is timed call by call (gpu.seconds): nothing there to overlap
        extras["seconds, dependent launch"] = seconds_
    return extras


def timed(case: Case, run: Callable) -> float:
    if not GPU:
        return median_seconds(lambda: run(*case.inputs))
    from gpu import copies, seconds

    return seconds([lambda inputs=inputs: run(*inputs) for inputs in copies(*case.inputs)])


def show(row: dict) -> None:
    times = row["seconds"]
    by_flops = row["flops"] > 100 * row["bytes"]
    rate = row["flops"] / times["minillm"] / 1e12 if by_flops else row["bytes"] / times["minillm"] / 1e9
    peers = ", ".join(f"{name} {times[name] / times['minillm']:.2f}" for name in times if name != "minillm")
    print(
        f"{row['case']:40} {1e6 * times['minillm']:9.1f} µs {rate:8.0f} {'TFLOP/s' if by_flops else 'GB/s':7}"
        f" {row['of the ceiling']:6.1%} of ceiling; peers take {peers}",
        flush=True,
    )
    for name, seconds in row.get("seconds, inputs in L2", {}).items():
        print(f"    inputs in L2: {name} {1e6 * seconds:.1f} µs, {row['bytes'] / seconds / 1e9:.0f} GB/s")
    if "seconds, dependent launch" in row:
        seconds = row["seconds, dependent launch"]
        print(f"    with dependent launch: {1e6 * seconds:.1f} µs, {row['bytes'] / seconds / 1e9:.0f} GB/s")
    for name, why in row["skipped"].items():
        print(f"    skipped {name}: {why}")


def cpu_ceilings() -> dict[str, float]:
    source = torch.randn(1 << 24)
    target, a = torch.empty_like(source), torch.randn(1024, 1024)
    return {
        "copy bytes/s": 2 * nbytes(source) / median_seconds(lambda: target.copy_(source)),
        "matmul FLOP/s": 2 * 1024**3 / median_seconds(lambda: a @ a),
    }


@torch.inference_mode()
def main(arguments: list[str]) -> None:
    """Measure the suites named, show a table, record it."""
    quick = "--quick" in arguments
    wanted = [a for a in arguments if not a.startswith("--")] or list(SUITES)
    wanted = list(BITS) if wanted == ["bits"] else wanted
    if unknown := set(wanted) - {*SUITES, *BITS, *MORE}:
        raise SystemExit(f"suite: expected bits or some of {', '.join(SUITES + BITS + MORE)}, got {', '.join(unknown)}")
    if GPU:
        from gpu import ceilings
    ceiling = ceilings() if GPU else cpu_ceilings()
    print({name: f"{value:.3e}" for name, value in ceiling.items()}, flush=True)
    makers = {
        "memory": memory_cases, "matmul": matmul_cases, "attention": attention_cases, "paged": paged_cases,
        "w4a16": w4a16_cases, "w8a16": w8a16_cases, "w8a8": w8a8_cases, "cache": cache_cases,
        "lora": lora_cases,
    }  # fmt: skip
    torch.manual_seed(0)
    rows = []
    for suite in wanted:
        for case in makers[suite](quick or not GPU):
            rows.append(measure(case, ceiling))
            torch.compiler.reset()
    if GPU and not quick:
        joined = {SUITES: "kernels", BITS: "kernels_bits"}
        name = joined.get(tuple(wanted), "kernels_" + "_".join(wanted))
        print(record(name, {"ceilings": ceiling, "rows": rows}, packages=("torch", "triton", "liger-kernel")))


if __name__ == "__main__":
    main(sys.argv[1:])
