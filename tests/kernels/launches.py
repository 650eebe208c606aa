"""What operations launch on a GPU that is not there, compiled for it: `python launches.py 80 86 89` prints a line a
launch, as JSON; with --all for many more arguments.

A process of its own, for in tests Triton interprets. Arguments are torch's fake tensors: shapes, strides and addresses'
remainders on a device "cuda" that need not exist, and no numbers. A launch is Triton's own, except that what it has
compiled is not run.
"""

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from minillm.kernels import KERNELS, common, dependent_launch
from minillm.learn.compiling import _resources

GPUS = {  # by compute capability: a name, for which no sizes are stored, and how many multiprocessors
    75: ("Tesla T4", 40),
    80: ("NVIDIA A100-SXM4-40GB", 108),
    86: ("NVIDIA GeForce RTX 3090", 82),
    89: ("NVIDIA GeForce RTX 4090", 128),
    90: ("NVIDIA GH200 480GB", 132),
}
TUNED = ("NVIDIA H100 80GB HBM3", 132)
#          hidden, query heads, key heads, head size, intermediate, vocabulary
SHAPES = {
    "SmolLM2-135M": (576, 9, 3, 64, 1536, 49152),
    "Llama-3.1-8B": (4096, 32, 8, 128, 14336, 128256),
    "Gemma-3-1B": (1152, 4, 1, 256, 6912, 262144),
}
ATTENTION = ("paged_attention", "flash_attention")
# Beside one step of all operations (None): (model, tokens, operations) where other tiles or other kernels come.
CHOSEN = (
    ("Llama-3.1-8B", 32, None),
    ("Llama-3.1-8B", 1, ("linear", "norm_linear", "paged_attention", "w4a16", "w8a16", "w8a8")),
    ("Llama-3.1-8B", 2048, (*ATTENTION, "matmul", "matmul_swiglu", "w4a16", "w8a8", "multi_lora")),
    ("Llama-3.1-8B", 256, ("w4a16", "w8a16")),
    ("SmolLM2-135M", 32, ("paged_attention", "w4a16")),
    ("SmolLM2-135M", 2048, ATTENTION),
    ("Gemma-3-1B", 32, ATTENTION),
    ("Gemma-3-1B", 2048, ATTENTION),
)
CHOSEN_FP32 = (("SmolLM2-135M", 2048, (*ATTENTION, "matmul", "rms_norm", "multi_lora")),)
# Of these a launch that 80 has, too, is compiled for 86 and 89 all the same, and must come out the same.
SAMPLES = ("rms_norm", "w4a16", "paged_attention")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def calls(shape: tuple[int, ...], tokens: int, dtype: torch.dtype, fp8: bool) -> Iterator[tuple[str, tuple]]:
    """(operation, arguments) as an engine would give them for a step of so many tokens."""
    hidden, heads, kv_heads, size, inner, vocab = shape
    prompt = tokens > 256
    sequences = 2 if prompt else tokens

    def some(*shape: int) -> Tensor:
        return empty(*shape, dtype=dtype)

    def integers(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.int32)

    x, norm = some(tokens, hidden), some(hidden)
    qkv = some(tokens, (heads + 2 * kv_heads) * size)
    q, k, v = (part.unflatten(1, (-1, size)) for part in qkv.split([heads * size, kv_heads * size, kv_heads * size], 1))
    cos, sin = empty(tokens, size // 2), empty(tokens, size // 2)
    cu = integers(sequences + 1)
    yield "softmax", (some(tokens, vocab),)
    yield "rms_norm", (x, norm, 1e-5)
    yield "add_rms_norm", (x, x, norm, 1e-5)
    yield "swiglu", (some(tokens, 2 * inner),)
    yield "rope", (q, k, cos, sin)
    yield "matmul", (x, some(hidden, hidden))
    yield "matmul_swiglu", (x, some(2 * inner, hidden))
    yield "linear", (x, some(vocab, hidden))
    yield "linear", (x, some((heads + 2 * kv_heads) * size, hidden), some((heads + 2 * kv_heads) * size))
    yield "norm_linear", (x, x, norm, some(2 * inner, hidden), 1e-5, True)
    if prompt:
        yield "flash_attention", (q, k, v, cu, cu, tokens)
        if size == 256:  # Gemma has windows
            yield "flash_attention", (q, k, v, cu, cu, tokens, True, 512)
    for cache_dtype in (dtype, torch.int8, *([torch.float8_e4m3fn] if fp8 else [])):
        caches = [empty(4096, kv_heads, size, dtype=cache_dtype) for _ in range(2)]
        scales = [] if cache_dtype == dtype else [empty(4096, kv_heads) for _ in range(2)]
        slots = empty(tokens, dtype=torch.int64)
        yield "rope_and_cache", (q, k, v, cos, sin, *caches, slots, *scales)
        scales = scales or [None, None]
        if size == 128:  # Qwen3 norms each head
            yield "rope_and_cache", (q, k, v, cos, sin, *caches, slots, *scales, some(size), some(size))
        table, lens, most = integers(sequences, 64), integers(sequences), tokens if prompt else 1
        for longest in (None,) if prompt else (None, 512):
            yield "paged_attention", (q, *caches, table, lens, cu, most, 16, None, 0, longest, *scales)
    for eight in (torch.int8, *([torch.float8_e4m3fn] if fp8 else [])):
        yield "quantize_rows", (x, eight)
        yield "norm_quantize_rows", (x, x, norm, 1e-5, eight)
        yield "swiglu_quantize_rows", (some(tokens, 2 * inner), eight)
        w, w_scale = empty(2 * inner, hidden, dtype=eight), empty(2 * inner, 1)
        yield "w8a8", (empty(tokens, hidden, dtype=eight), empty(tokens, 1), w, w_scale, None, dtype)
    yield "w8a16", (x, empty(2 * inner, hidden, dtype=torch.int8), empty(2 * inner, 1))
    tiles, n, groups = integers(common.ceil_div(hidden, 64), 2 * inner, 8), 2 * inner, hidden // 64
    scale_dtype = torch.float16 if dtype == torch.float32 else dtype
    scales = empty(groups, n, dtype=scale_dtype).t()
    yield "w4a16", (x, tiles, scales)
    yield "w4a16", (x, tiles, scales, empty(groups, n, dtype=scale_dtype).t(), some(n))
    lora_rows = (heads * size, kv_heads * size, kv_heads * size)
    a, b = some(4, 3, 16, hidden), some(4, sum(lora_rows), 16)
    yield "multi_lora", (qkv, x, a, b, integers(4, 3), lora_rows, integers(tokens), integers(tokens), integers(6))
    if not prompt:
        yield from draws(tokens, vocab, dtype)


def draws(rows: int, vocab: int, dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """What comes behind the model."""

    def integers(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.int32)

    logits, each, long = empty(rows, vocab, dtype=dtype), empty(rows), empty(rows, dtype=torch.int64)
    counts, number = empty(rows + 1, vocab, dtype=torch.int16), integers(rows)
    yield "draw_tokens", (logits, each, long, number, number, each, each, each, each, each, number, counts)
    yield "count_tokens", (counts, number, long, empty(rows, dtype=torch.bool))
    yield "gumbel_argmax", (logits, each, long, number)
    yield "mask_logits", (logits, long, long, integers(rows, common.ceil_div(vocab, 32)))
    yield "top_logprobs", (logits, long, 20)
    steps, matrix = integers(4, rows + 1), integers(rows + 1, 4096)
    yield "step_inputs", (steps, matrix, integers(12, rows), integers(rows), 13, 3000, 2, 16, rows, rows)
    yield "append_tokens", (steps, matrix, empty(rows, 1, dtype=torch.int64), integers(rows), 13)


class Driver:
    """As Triton's own, of a GPU of this compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def _item(x: Tensor, index: Any) -> Tensor:
    """x[index] that looks for no device."""
    return x.select(0, index) if isinstance(index, int) else Tensor.__getitem__(x, index)


@contextmanager
def pretended(capability: int, gpu: tuple[str, int], launch: Callable) -> Iterator[None]:
    """Within the block the machine has such a GPU, and `launch(compile, kernel, args, options)` takes a launch's place;
    `compile()` gives Triton's compiled kernel.
    """
    name, multiprocessors = gpu
    run = JITFunction.run

    def launched(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch(lambda: run(self, *args, grid=grid, warmup=True, **options), self, args, options)

    for known in (common._name, common._capability, common.sm_count):
        known.cache_clear()
    driver.set_active(Driver(capability))
    with ExitStack() as stack:
        for where, what, value in (
            (FakeTensor, "data_ptr", lambda x: x.storage_offset() * x.element_size()),
            (FakeTensor, "__getitem__", _item),
            (JITFunction, "run", launched),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "get_device_name", lambda device=None: name),
            (torch.cuda, "get_device_capability", lambda device=None: divmod(capability, 10)),
            (torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=multiprocessors)),
            (torch.version, "cuda", "13.0"),
        ):
            stack.enter_context(patch.object(where, what, value, create=True))
        for context in (FakeTensorMode(), torch.inference_mode(), dependent_launch()):
            stack.enter_context(context)
        yield


def steps(capability: int, all_of_them: bool) -> Iterator[tuple[str, str, tuple]]:
    """(what, operation, arguments) of the calls to look at."""
    usual = torch.bfloat16 if capability >= 80 else torch.float16
    if all_of_them:
        dtypes = {torch.float16, usual, torch.float32}
        asked = [(s, n, None, dtype) for dtype in dtypes for s in SHAPES for n in (1, 32, 128, 256, 2048)]
    else:
        asked = [(*c, usual) for c in CHOSEN] + [(*c, torch.float32) for c in CHOSEN_FP32]
    for shape, tokens, operations, dtype in asked:
        for operation, args in calls(SHAPES[shape], tokens, dtype, capability >= 89):
            if operations is None or operation in operations:
                kinds = " ".join(dict.fromkeys(str(a.dtype)[6:] for a in args if isinstance(a, Tensor)))
                yield f"{operation}, {shape}, {tokens} tokens, {kinds}", operation, args


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), value.data_ptr() % 16
    if hasattr(value, "block_shape"):
        return str(value.base.dtype), value.shape, value.strides, value.block_shape
    return [_described(v) for v in value] if isinstance(value, tuple) else repr(value)


def _compiled(compile_it: Callable) -> dict[str, Any]:
    try:
        kernel = compile_it()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
    ptx = re.sub(r"(?m)^\.target .*$", "", kernel.asm["ptx"])
    return {"shared": kernel.metadata.shared, **_resources(kernel.asm["cubin"]), "code": hash(ptx)}


class Log:
    """Prints each launch once for a capability, with what its kernel takes; "as": the capability for which the very
    same launch was compiled before, if it was not again; "same": whether compiling it again gave the same code.
    """

    def __init__(self, again: bool) -> None:
        self.again = again
        self.known: dict[str, dict[str, Any]] = {}
        self.done: set[Any] = set()
        self.call: dict[str, Any] = {}  # capability, operation, what

    def __call__(self, compile_it: Callable, kernel: JITFunction, args: tuple, options: dict) -> None:
        key = f"{kernel.__name__} {[_described(a) for a in args]} {sorted(options.items(), key=str)}"
        capability, operation, before = self.call["capability"], self.call["operation"], self.known.get(key)
        if (capability, key) in self.done:
            return
        self.done.add((capability, key))
        if before is None:
            found = self.known[key] = {"first": capability, **_compiled(compile_it)}
        elif self.again or (operation in SAMPLES and (capability, operation) not in self.done):
            self.done.add((capability, operation))
            found = _compiled(compile_it)
            found["same"] = found.get("code") == before.get("code")
        else:
            found = {"as": before["first"], **before}
        sizes = {n: str(v) for n, v in options.items() if n.isupper() or n.startswith("num_")}
        how = {"kernel": kernel.__name__, "sizes": sizes, "descriptors": any(hasattr(a, "block_shape") for a in args)}
        print(json.dumps(self.call | how | found), flush=True)


def main(capabilities: list[int], all_of_them: bool) -> None:
    """A line for each launch, and for each call that is left to torch."""
    log = Log(again=all_of_them)
    for capability, gpu in [(c, GPUS[c]) for c in capabilities] + [(90, TUNED)] * (all_of_them and 90 in capabilities):
        with pretended(capability, gpu, log):
            for what, operation, args in steps(capability, all_of_them):
                log.call = {"capability": capability, "operation": operation, "what": what}
                if KERNELS[operation].path(*args) == "triton":
                    KERNELS[operation](*args)
                else:
                    print(json.dumps(log.call | {"path": "torch"}))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, patch.object(triton.knobs.cache, "dir", folder):
        main([int(word) for word in sys.argv[1:] if word != "--all"], "--all" in sys.argv)
