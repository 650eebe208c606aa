"""Whether a Triton kernel compiles for a GPU, asked without one: the interpreter runs much that no GPU does.

A process of its own compiles, for Triton is either interpreter or compiler, whichever its import found set. It gets
the kernel's source, so it works for kernels of notebook cells, too.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .paths import root

__all__ = ["Compiled", "DoesNotCompile", "compile_kernel"]

SHARED_LIMIT = 227 * 1024  # bytes a program may have on an H100
SECONDS = 60  # a compilation may take
KEPT = 300  # results in the cache
DTYPES = {"float": "fp", "int": "i", "uint": "u", "bfloat": "bf"}


class DoesNotCompile(Exception):
    """What the compiler said; `line` is the kernel's line counted from its `def`, from 1 (0: none), `text` that line,
    `name` the function that it stands in.
    """

    def __init__(self, said: str, line: int = 0, text: str = "", name: str = "") -> None:
        super().__init__(said)
        self.said, self.line, self.text, self.name = said, line, text, name


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes: registers a thread, bytes of local memory a thread (spilled registers), bytes of
    shared memory a program.
    """

    registers: int
    local_bytes: int
    shared_bytes: int


def compile_kernel(kernel: Any, *args: Any, num_warps: int = 4, num_stages: int = 3, **sizes: Any) -> Compiled:
    """Compile `kernel` as the launch `kernel[grid](*args, **sizes)` would on an H100: a second, less from the cache.

    Tensors may be given as torch dtypes, descriptors as they are. Raises DoesNotCompile, TypeError for what is no
    kernel or no launch of it.
    """
    fn = getattr(kernel, "fn", None)
    if not callable(fn):
        raise TypeError(f"kernel: expected a function under `@triton.jit`, got {type(kernel).__name__}")
    kept = getattr(kernel, "do_not_specialize", None) or ()
    signature, constants, aligned = _signature(fn, args, sizes, kept)
    request = {
        "module": _module(fn),
        "name": fn.__name__,
        "signature": signature,
        "constants": constants,
        "aligned": aligned,
        "options": {"num_warps": num_warps, "num_stages": num_stages},
    }
    answer = _cached(request)
    if "said" in answer:
        raise DoesNotCompile(**answer)
    return Compiled(**answer)


def _signature(
    fn: Callable, args: tuple, sizes: dict, kept: Collection[str | int]
) -> tuple[dict[str, str], dict[str, Any], list[int]]:
    """Triton's names of the arguments' types, the values of those that are constants, and which are multiples of 16.

    A launch tells the compiler which addresses and integers are such multiples, unless a kernel asks it not to look.
    """
    parameters = inspect.signature(fn).parameters
    bound = inspect.signature(fn).bind(*args, **sizes)
    bound.apply_defaults()
    signature, constants, aligned = {}, {}, []
    for i, (name, value) in enumerate(bound.arguments.items()):
        if value is None or "constexpr" in str(parameters[name].annotation):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = _type(name, value)
            is_multiple = type(value) is int and value % 16 == 0 and not {name, i} & set(kept)
            if is_multiple or signature[name].startswith("*"):
                aligned.append(i)
    return signature, constants, aligned


def _type(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    if hasattr(value, "block_shape"):  # a descriptor
        return f"tensordesc<{_type(name, value.base)[1:]}{list(value.block_shape)}>"
    text = str(getattr(value, "dtype", value)).removeprefix("torch.")
    if text == "bool":
        return "*i1"
    kind = re.fullmatch(r"(float|bfloat|uint|int)(\d+)", text)
    if kind is None:
        raise TypeError(f"{name}: expected a tensor, a torch dtype, a number or None, got {value!r}")
    return f"*{DTYPES[kind[1]]}{kind[2]}"


# ---- the source of a kernel, with what it uses -----------------------------------------------------------------------


def _module(fn: Callable) -> str:
    """A module's source that defines `fn` as a kernel, and before it what it refers to."""
    parts: dict[str, str] = {}
    _define(fn.__name__, fn, parts, kernel=True)
    return "import triton\nimport triton.language\n\n" + "\n\n".join(parts.values()) + "\n"


def _define(name: str, value: Any, parts: dict[str, str], kernel: bool = False) -> None:
    """Add to `parts` the lines that make `name` what it is in the notebook; nothing for what has no such lines."""
    if name in parts:
        return
    fn = getattr(value, "fn", value)  # a kernel, of the interpreter or not, is an object around its function
    if inspect.ismodule(value):
        parts[name] = f"import {value.__name__} as {name}"
    elif type(value).__name__ == "constexpr":
        parts[name] = f"{name} = triton.language.constexpr({_literal(value.value)})"
    elif isinstance(value, bool | int | float | str) or hasattr(value, "primitive_bitwidth"):
        parts[name] = f"{name} = {_literal(value)}"
    elif (getattr(fn, "__module__", None) or "").startswith("triton."):
        parts[name] = f"from {fn.__module__} import {fn.__name__} as {name}"
    elif inspect.isfunction(fn):
        parts[name] = ""  # stops a recursion
        source, _ = _source(fn)
        scope = {**fn.__globals__, **inspect.getclosurevars(fn).nonlocals}
        for used in sorted({n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)} & set(scope)):
            _define(used, scope[used], parts)
        del parts[name]
        parts[name] = f"@triton.jit\n{source}" if kernel or fn is not value else source


def _literal(value: Any) -> str:
    if hasattr(value, "primitive_bitwidth"):  # tl.float32 and the like
        return f"triton.language.dtype({value.name!r})"
    return f"float({str(value)!r})" if isinstance(value, float) else repr(value)  # infinity has no literal


def _source(fn: Callable) -> tuple[str, int]:
    """A function's source without its decorators, and the number of its first line in its file or cell."""
    lines, first = inspect.getsourcelines(fn)
    skipped = next(i for i, line in enumerate(lines) if re.match(r"\s*def\s", line))
    return textwrap.dedent("".join(lines[skipped:])), first + skipped


# ---- in this process -------------------------------------------------------------------------------------------------


def _cached(request: dict) -> dict:
    versions = [importlib.metadata.version("triton"), sys.version]
    key = hashlib.sha256(json.dumps([request, versions], default=str, sort_keys=True).encode()).hexdigest()[:32]
    path = root() / ".minillm" / "compiled.json"
    known: dict[str, dict] = {}
    with suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    if key not in known:
        known[key] = _asked(request)
        with suppress(OSError):  # only a cache
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(dict(list(known.items())[-KEPT:])), encoding="utf-8")
            temporary.replace(path)
    return known[key]


def _asked(request: dict) -> dict:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    with tempfile.TemporaryDirectory() as folder, suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(request, default=_plain),
            env=environment | {"TRITON_CACHE_DIR": folder},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        return _answer(done)
    return {"said": f"the compiler had not finished after {SECONDS} s: are the blocks too large?"}


def _answer(done: subprocess.CompletedProcess) -> dict:
    if done.returncode != 0 or not done.stdout.strip():
        raise RuntimeError(f"the compiler's process ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _plain(value: Any) -> Any:
    if hasattr(value, "primitive_bitwidth"):  # tl.float32 and the like
        return {"dtype": value.name}
    raise TypeError(f"sizes: expected numbers, texts, None, booleans or Triton's dtypes as constants, got {value!r}")


# ---- in the compiler's process ---------------------------------------------------------------------------------------


def _work(request: dict) -> dict:
    """Compile what was asked for in the current folder; the fields of a Compiled or of a DoesNotCompile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from .checker import load_module

    path = Path("kernel.py")
    path.write_text(request["module"], encoding="utf-8")
    module = load_module(path)
    constants = {
        name: triton.language.dtype(value["dtype"]) if isinstance(value, dict) else value
        for name, value in request["constants"].items()
    }
    attributes = {(i,): [["tt.divisibility", 16]] for i in request["aligned"]}
    source = ASTSource(getattr(module, request["name"]), request["signature"], constants, attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=request["options"])
    except Exception as e:
        return _refusal(e)
    shared = compiled.metadata.shared
    if shared > SHARED_LIMIT:
        said = f"it needs {shared // 1024} KiB of shared memory a program; an H100 has {SHARED_LIMIT // 1024} KiB"
        return {"said": said}
    return {**_resources(compiled.asm["cubin"]), "shared_bytes": shared}


def _refusal(error: Exception) -> dict:
    """The innermost error that knows its line, with Python's wrapping taken off."""
    from triton.compiler.errors import CompilationError

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    known: Any = next((e for e in reversed(chain) if isinstance(e, CompilationError)), None)
    said = (getattr(known, "error_message", None) or str(chain[-1])).strip()
    wrapped = re.fullmatch(r"""\w+\((["'])(.*)\1,?\)""", said, re.DOTALL)
    said = wrapped[2] if wrapped else said
    if known is None or known.node is None or known.src is None:
        return {"said": said}
    line = known.node.lineno
    text = known.src.splitlines()[line - 1].strip()
    return {"said": said, "line": line, "text": text, "name": re.findall(r"def\s+(\w+)", known.src)[0]}


def _resources(cubin: bytes) -> dict:
    """Registers and local memory a thread, out of the section .nv.info of an ELF file: records of format, attribute,
    and, for format 4, a length, the function's symbol and a value.
    """
    start = struct.unpack_from("<Q", cubin, 0x28)[0]
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, start + i * size) for i in range(number)]
    found = {0x2F: 0, 0x11: 0}  # EIATTR_REGCOUNT, EIATTR_FRAME_SIZE
    for name, _, _, _, offset, length, *_ in sections:
        at = sections[names][4] + name
        if cubin[at : cubin.index(b"\0", at)] != b".nv.info":
            continue
        while length >= 12:
            form, attribute, taken = struct.unpack_from("<BBH", cubin, offset)
            if form == 4 and attribute in found:
                found[attribute] = struct.unpack_from("<I", cubin, offset + 8)[0]
            step = 4 + (taken if form == 4 else 0)
            offset, length = offset + step, length - step
    return {"registers": found[0x2F], "local_bytes": found[0x11]}


if __name__ == "__main__":
    print(json.dumps(_work(json.load(sys.stdin))))
