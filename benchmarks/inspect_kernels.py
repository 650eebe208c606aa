"""What a kernel becomes on an H100, asked without one: registers, shared memory, and instructions of its PTX.

python benchmarks/inspect_kernels.py            records benchmarks/results/<device>/compiled.json
python benchmarks/inspect_kernels.py ptx add    prints one kernel's PTX
"""

import re
import sys
from collections import Counter
from typing import Any

import naive
import torch
import triton
from common import record
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minillm.kernels.lessons.softmax import softmax_kernel
from minillm.kernels.matmul import matmul_kernel
from minillm.kernels.rms_norm import rms_norm_kernel
from minillm.learn.compiling import compile_kernel

ROWS, BF16 = 65_536, torch.bfloat16
PRODUCT = (BF16, BF16, BF16, 8192, 8192, 8192, 8192, 8192, 8192)
PLAIN = {"SWIGLU": False, "PRECISION": "ieee", "GROUP_M": 8, "BLOCK_K": 64}
# Name: kernel, arguments of a launch (dtypes stand for tensors), constants, launch options.
KERNELS: dict[str, tuple[Any, tuple, dict, dict]] = {
    "add": (naive.add_kernel, (torch.float32,) * 3 + (2**26,), {"SCATTERED": False, "BLOCK": 1024}, {}),
    "add, scattered": (naive.add_kernel, (torch.float32,) * 3 + (2**26,), {"SCATTERED": True, "BLOCK": 1024}, {}),
    "softmax, 4 warps": (softmax_kernel, (BF16, BF16, BF16, 4096, 4096, 0), {"MASKED": False, "BLOCK": 4096}, {}),
    "softmax, 1 warp": (
        softmax_kernel, (BF16, BF16, BF16, 4096, 4096, 0), {"MASKED": False, "BLOCK": 4096}, {"num_warps": 1},
    ),
    "RMSNorm, 4 warps": (
        rms_norm_kernel, (*[BF16] * 5, ROWS, 4096, 4096, 4096, 1e-5),
        {"ADD": False, "PDL": False, "ROWS": 1, "BLOCK": 4096}, {},
    ),
    "product, no tl.dot": (naive.no_dot_kernel, (BF16, BF16, BF16, 8192, 8192), {"M": 32, "N": 32, "K": 16}, {}),
    "product, 32 x 32": (matmul_kernel, PRODUCT, PLAIN | {"BLOCK_M": 32, "BLOCK_N": 32}, {}),
    "product, 128 x 128": (matmul_kernel, PRODUCT, PLAIN | {"BLOCK_M": 128, "BLOCK_N": 128}, {"num_warps": 8}),
    "product, 256 x 256": (matmul_kernel, PRODUCT, PLAIN | {"BLOCK_M": 256, "BLOCK_N": 256}, {"num_warps": 8}),
}  # fmt: skip
WATCHED = {
    "loads": r"ld\.global|cp\.async\.[cg]", "shared memory": r"ld\.shared|st\.shared|ldmatrix|stmatrix",
    "between lanes": r"shfl", "multiply-adds": r"fma\.", "tensor cores": r"wgmma\.mma|mma\.sync", "waits": r"bar\.sync",
}  # fmt: skip
TYPES = {torch.float32: "*fp32", BF16: "*bf16", int: "i32", float: "fp32"}


def compiled(kernel: Any, args: tuple, sizes: dict, num_warps: int = 4, num_stages: int = 3) -> Any:
    """Triton's own compilation for an H100, as a launch would do it; `.asm["ptx"]` is its assembly."""
    names = kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    signature |= {name: TYPES.get(arg, TYPES.get(type(arg))) for name, arg in zip(names, args, strict=False)}
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(args) if arg in TYPES or arg % 16 == 0}
    source = ASTSource(kernel, signature, sizes, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def programs(registers: int, shared: int, num_warps: int) -> int:
    """How many programs an SM of an H100 holds at once: 64 warps, 32 programs, 65,536 registers, 228 KB."""
    by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * num_warps)
    return min(64 // num_warps, 32, by_registers, 228 * 1024 // (shared + 1024))


def instructions(ptx: str) -> dict[str, int]:
    """How many instructions of each watched kind stand in the text; a loop's body counts once."""
    found = Counter(re.findall(r"^\s+(?:@!?%?\w+ )?([a-z]\w*(?:\.\w+)*)", ptx, re.MULTILINE))
    return {kind: sum(n for name, n in found.items() if re.match(like, name)) for kind, like in WATCHED.items()}


def main(arguments: list[str]) -> None:
    """Record all, or print one kernel's PTX."""
    if arguments:
        kernel, args, sizes, options = KERNELS[arguments[1]]
        print(compiled(kernel, args, sizes, **options).asm["ptx"])
        return
    rows = {}
    for name, (kernel, args, sizes, options) in KERNELS.items():
        whole, taken = compiled(kernel, args, sizes, **options), None
        row: dict[str, Any] = {"num_warps": options.get("num_warps", 4), "shared": whole.metadata.shared}
        if whole.metadata.shared <= 227 * 1024:
            taken = compile_kernel(kernel, *args, **sizes, **options)
            row |= {"registers": taken.registers, "local": taken.local_bytes}
            row["programs an SM"] = programs(taken.registers, row["shared"], row["num_warps"])
        rows[name] = row | {"ptx": instructions(whole.asm["ptx"])}
        print(name, rows[name], flush=True)
    print(record("compiled", rows, packages=("triton",)))


if __name__ == "__main__":
    main(sys.argv[1:])
