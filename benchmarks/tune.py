"""Find each kernel's sizes on this GPU: six to eight candidates a shape class, the fastest is stored.

    python benchmarks/tune.py             into the user's cache folder, where the package finds them
    python benchmarks/tune.py --package   into minillm/kernels/tuned/, to be shipped

A key is a kernel and a shape class, as the kernel's launch names it; a value is what the launch leaves open.
"""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from gpu import copies, seconds
from kernels import EPS, attention_case, randn, w4a16_case

from minillm import kernels
from minillm.kernels import common


def candidates(**choices: list[int]) -> list[dict[str, int]]:
    """All combinations of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def plans() -> dict[str, tuple[Callable[[], tuple], Callable, list[dict[str, int]]]]:
    """Key -> (inputs, run, candidates)."""
    found: dict = {}
    for block, n, rows in (
        (4096, 4096, 65_536),
        (32_768, 32_768, 4096),
        (65_536, 49_152, 2048),
        (131_072, 128_256, 64),
    ):
        whole = [{"BLOCK": block, "num_warps": warps} for warps in (8, 16, 32)] if block <= 32_768 else []
        loops = [
            {"BLOCK": b, "num_warps": w} for b, w in ((4096, 8), (8192, 8), (8192, 16), (16_384, 16), (32_768, 32))
        ]
        found[f"softmax {block}"] = (
            lambda rows=rows, n=n: (randn(rows, n),),
            lambda x: kernels.softmax(x),
            whole + (loops[: 6 - len(whole)] if block > 4096 else []),
        )
    for block, n in ((1024, 576), (4096, 4096)):
        found[f"rms_norm {block}"] = (
            lambda n=n: (randn(16_384, n), randn(n)),
            lambda x, w: kernels.rms_norm(x, w, EPS),
            candidates(ROWS=[1, 2, 4] if block == 1024 else [1, 2], num_warps=[4, 8] if block == 1024 else [4, 8, 16]),
        )
    found["swiglu"] = (
        lambda: (randn(16_384, 28_672),),
        lambda x: kernels.swiglu(x),
        candidates(BLOCK=[1024, 2048, 4096], num_warps=[4, 8]),
    )
    for size in (64, 128):
        found[f"rope {size}"] = (
            lambda size=size: (
                randn(16_384, 32, size),
                randn(16_384, 8, size),
                *torch.rand(2, 16_384, size // 2).cuda(),
            ),
            lambda q, k, cos, sin: kernels.rope(q, k, cos, sin),
            candidates(TOKENS=[1, 2, 4], num_warps=[2, 4]),
        )
        found[f"rope_and_cache {size}"] = (
            lambda size=size: cached_inputs(size),
            kernels.rope_and_cache,
            candidates(TOKENS=[1, 2, 4], num_warps=[2, 4]),
        )
        case = attention_case(2048 // size, 2048 // size, size, 4096, 4, True)
        found[f"flash_attention {size}"] = (
            lambda case=case: case.inputs,
            case.runs["minillm"],
            [
                {"BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": s}
                for m, n, w, s in (
                    (64, 64, 4, 3),
                    (64, 64, 4, 2),
                    (128, 64, 4, 3),
                    (128, 64, 8, 3),
                    (128, 128, 8, 2),
                    (128, 128, 8, 3),
                )
            ],
        )
    tiles = [
        (128, 256, 64, 8, 3),
        (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 3),
        (64, 256, 64, 4, 4),
        (64, 128, 64, 4, 5),
    ]
    tiles = [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": g, "num_warps": w, "num_stages": s}
        for (m, n, k, w, s), g in itertools.product(tiles, (8,))
    ]
    for name, run in (("matmul", kernels.matmul), ("matmul_swiglu", kernels.matmul_swiglu)):
        for shape_class, m, n in (
            ("large", 8192, 8192),
            *((str(m), m, 8192) for m in (64, 128, 256, 1024)),
            *((f"{m} wide", m, 14_336) for m in (64, 128, 256)),
        ):
            found[f"{name} tma {shape_class}"] = (
                lambda m=m, n=n: (randn(m, 4096), randn(n, 4096)),
                lambda x, w, run=run: run(x, w),
                tiles,
            )
    return found | w8a8_plans() | w4a16_plans()


def w8a8_plans() -> dict:
    """Tiles of 8-bit products: for few rows long steps and two programs a multiprocessor, else the largest tile."""
    found: dict = {}
    tiles = {
        64: [(64, 64, 256, 2, 4, 3), (64, 64, 128, 2, 4, 4), (64, 128, 128, 1, 4, 5), (64, 32, 256, 2, 4, 4)],
        256: [(128, 128, 128, 1, 8, 4), (128, 128, 128, 1, 4, 4), (128, 256, 128, 1, 8, 3), (128, 64, 128, 2, 4, 4)],
        8192: [(128, 256, 128, 1, 8, 3), (256, 128, 128, 1, 8, 3), (128, 128, 128, 1, 4, 4), (128, 256, 64, 1, 8, 4)],
    }
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PER_SM", "num_warps", "num_stages")
    sizes = {m: [dict(zip(names, tile, strict=True), GROUP_M=8) for tile in tiles_of] for m, tiles_of in tiles.items()}
    for shape_class, m, n, k in (
        *((str(m), m, 4096, 14_336) for m in (64, 128, 256, 1024)),
        *((f"{m} wide", m, 14_336, 4096) for m in (64, 128, 256)),
        ("large", 8192, 14_336, 4096),
    ):
        found[f"w8a8 {shape_class}"] = (
            lambda m=m, n=n, k=k: (*kernels.quantize_rows(randn(m, k)), *kernels.quantize_rows(randn(n, k))),
            lambda *inputs: kernels.w8a8(*inputs),
            sizes[64 if m <= 64 else 256 if m <= 256 else 8192],
        )
    for block, n in ((4096, 4096), (16_384, 14_336)):
        found[f"quantize_rows {block}"] = (
            lambda n=n: (randn(8192, n),),
            lambda x: kernels.quantize_rows(x),
            candidates(ROWS=[1, 2] if block == 4096 else [1], num_warps=[4, 8, 16]),
        )
    return found


def w4a16_plans() -> dict:
    """For up to 256 tokens and 4,096 or 14,336 columns, of the kernel that has a copy engine."""
    names = ("BLOCK_M", "BLOCK_N", "TILES", "num_warps", "num_stages", "PROGRAMS")
    some = [
        (128, 2, 4, 4, 2),
        (64, 2, 4, 4, 3),
        (64, 2, 4, 5, 3),
        (64, 2, 4, 4, 2),
        (128, 2, 8, 4, 2),
        (128, 1, 4, 5, 3),
    ]
    many = [
        (128, 1, 8, 4, 1),
        (64, 1, 4, 5, 2),
        (128, 2, 8, 3, 1),
        (128, 1, 4, 4, 2),
        (128, 1, 8, 4, 2),
        (256, 1, 8, 4, 1),
    ]
    found: dict = {}
    for tokens, wide in itertools.product((8, 16, 32, 64, 128, 256), (False, True)):
        blocks = (tokens,) if tokens <= 128 else (128, 256)
        choices = itertools.product(blocks, some if tokens <= 64 else many)
        found[f"w4a16 copied {tokens}{' wide' if wide else ''}"] = (
            lambda m=tokens, n=14_336 if wide else 4096: w4a16_case(m, 4096, n).inputs[:3],
            lambda x, tiles, scales: kernels.w4a16(x, tiles, scales),
            [dict(zip(names, (block, *sizes), strict=True)) for block, sizes in choices],
        )
    return found


def cached_inputs(size: int) -> tuple:
    """Queries, keys and values of 16,384 tokens, and slots in a drawn order."""
    q, k, v = randn(16_384, 32, size), randn(16_384, 8, size), randn(16_384, 8, size)
    angles = torch.rand(2, 16_384, size // 2, device="cuda")
    return q, k, v, *angles, randn(16_384, 8, size), randn(16_384, 8, size), torch.randperm(16_384, device="cuda")


def tune(key: str, inputs: tuple, run: Callable, choices: list[dict[str, int]]) -> dict[str, int]:
    """The fastest of the choices for `key`; those that do not fit the chip are passed over."""
    stored, times = common._stored(common._name(0)), {}
    for sizes in choices:
        stored[key] = sizes
        try:
            times[json.dumps(sizes)] = seconds([lambda i=i: run(*i) for i in copies(*inputs)])
        except Exception as error:
            print(f"    {sizes}: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
    best = min(times, key=times.get)
    for sizes, time in sorted(times.items(), key=lambda item: item[1]):
        print(f"    {1e6 * time:9.1f} µs {sizes}", flush=True)
    stored[key] = json.loads(best)
    return stored[key]


@torch.inference_mode()
def main() -> None:
    """Tune everything and store it under this device's name."""
    folder = Path(common.__file__).parent / "tuned" if "--package" in sys.argv else common.tuned_folder()
    found = {}
    for key, (inputs, run, choices) in plans().items():
        print(key, flush=True)
        found[key] = tune(key, inputs(), run, choices)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{common.slug(common._name(0))}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
