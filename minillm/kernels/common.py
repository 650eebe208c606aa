"""What every kernel file shares: Triton where it exists, one registry, the choice of a path, tuned sizes, checks.

An operation has up to three paths that compute the same function:

    reference    plain torch in fp32 or higher, obviously right: what tests compare with
    torch        the fastest that torch alone offers: what a CPU runs, and what carries gradients
    triton       our kernel: what a GPU runs

`MINILLM_KERNELS=torch` (or `triton`, `reference`) in the environment, or `with use("torch"):`, takes the choice out of
the dispatcher's hands, for all operations or for one: `with use("reference", "softmax"):`.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import cache_dir

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:  # macOS and Windows have no Triton: the kernels below are then only text, and torch serves

    class _Absent:
        """Stands for triton in decorators and annotations."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else self

    triton = tl = TensorDescriptor = _Absent()
    HAS_TRITON = False

__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "KERNELS",
    "SINCE",
    "TENSOR_CORES",
    "Operation",
    "TensorDescriptor",
    "arguments",
    "capability",
    "ceil_div",
    "dependent_launch",
    "divided",
    "fits_descriptor",
    "has_copy_engine",
    "next_power_of_2",
    "on_tensor_cores",
    "operation",
    "pdl",
    "previous_done",
    "sm_count",
    "tl",
    "triton",
    "trusted",
    "tuned",
    "use",
]

# Triton reads it when a kernel is decorated, so it must be set before this package is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PATHS = ("auto", "torch", "triton", "reference")
# Compute capabilities of GPUs: from which on a kernel has a dtype, products on tensor cores (Triton leaves those of
# Volta and Turing alone), and all that is here, Hopper's copy engine and dependent launch.
TENSOR_CORES, COPY_ENGINE = (8, 0), (9, 0)
SINCE = {torch.bfloat16: (8, 0), torch.float8_e4m3fn: (8, 9)}
NEWEST = COPY_ENGINE
KERNELS: dict[str, "Operation"] = {}
_forced: dict[str, str] = {}  # operation name, or "" for all -> path
_dependent = False


class _Here(threading.local):
    """What `trusted` says, thread by thread."""

    trusted = False
    quick = False  # on a CPU every operation takes its torch path


_here = _Here()


@dataclass(frozen=True)
class Operation:
    """A function with several paths. Calling it checks the arguments and runs the path of the moment.

    `check(*args)` raises ValueError or TypeError with the argument's name; `fake(*args)` makes the empty outputs that
    torch.compile needs. `opaque` is the torch.library operator under which a compiled graph calls the Triton path.
    `since`: the compute capability from which on the kernel is worth its launch.
    """

    name: str
    triton: Callable
    torch: Callable
    reference: Callable
    check: Callable
    fake: Callable
    in_place: tuple[str, ...]
    since: tuple[int, int] = (0, 0)
    opaque: Callable = field(init=False)

    def __post_init__(self) -> None:
        op = torch.library.custom_op(f"minillm::{self.name}", self.triton, mutates_args=self.in_place)
        op.register_fake(self.fake)
        object.__setattr__(self, "opaque", op)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            path = self.path(*args, **kwargs)
            return (self.opaque if path == "triton" else getattr(self, path))(*args, **kwargs)
        if not _here.trusted:
            self.check(*args, **kwargs)
        elif _here.quick and not _forced and args and not args[0].is_cuda:  # as in `path`, one call less
            return self.torch(*args, **kwargs)
        return getattr(self, self.path(*args, **kwargs))(*args, **kwargs)

    def path(self, *args: Any, **kwargs: Any) -> str:
        """Which path a call with these arguments takes: "triton" on a GPU, "torch" elsewhere, under autograd, and on a
        GPU that is too old for the kernel or a dtype.
        """
        if _here.quick and not _forced and args and not args[0].is_cuda:
            return "torch"
        forced = (_forced.get(self.name) or _forced.get("") if _forced else None) or _environment()
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if forced == "auto" and not (HAS_TRITON and tensors and tensors[0].is_cuda):  # all are where the first is
            return "torch"
        wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if wants_gradient or any(t.dtype == torch.float64 for t in tensors):
            return "torch" if forced in ("auto", "triton") else forced  # kernels: no backward, and sums in fp32
        if forced in ("torch", "reference"):
            return forced
        return "torch" if tensors and _too_old(tensors[0].device, self.since, *args, *kwargs.values()) else "triton"


def _too_old(device: torch.device, since: tuple[int, int], *args: Any) -> bool:
    """Whether a GPU is, for a kernel or a dtype of its arguments; torch.compile, which could not ask, is told no."""
    if torch.compiler.is_compiling() or (has := capability(device)) >= NEWEST:
        return False
    dtypes = [a.dtype if isinstance(a, Tensor) else a for a in args if isinstance(a, Tensor | torch.dtype)]
    return has < max(since, *(SINCE.get(dtype, (0, 0)) for dtype in dtypes))


def _environment() -> str:
    path = os.environ.get("MINILLM_KERNELS", "auto")
    if path not in PATHS:
        raise ValueError(f"MINILLM_KERNELS: expected one of {', '.join(PATHS)}, got {path!r}")
    return path


def operation(
    name: str, *, reference: Callable, torch: Callable, check: Callable, fake: Callable,
    in_place: tuple[str, ...] = (), since: tuple[int, int] = (0, 0),
) -> Callable[[Callable], Operation]:  # fmt: skip
    """Register the decorated function, the launch of a Triton kernel, as operation `name` beside its other paths."""

    def register(launch: Callable) -> Operation:
        op = Operation(name, launch, torch, reference, check, fake, in_place, since)
        object.__setattr__(op, "__doc__", launch.__doc__)
        KERNELS[name] = op
        return op

    return register


@contextmanager
def use(path: str, name: str = "") -> Iterator[None]:
    """Run the operation `name`, or all of them, by `path` ("auto", "torch", "triton", "reference") within the block."""
    if path not in PATHS:
        raise ValueError(f"path: expected one of {', '.join(PATHS)}, got {path!r}")
    if name and name not in KERNELS:
        raise ValueError(f"name: expected one of {', '.join(KERNELS)}, got {name!r}")
    before = dict(_forced)
    _forced[name] = path
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def trusted() -> Iterator[None]:
    """Within the block, in this thread, arguments are not checked: for an engine, which makes them itself.

    On a CPU the check of a small operation, and the choice of its path, take longer than the operation. The environment
    is read once, when the block begins; `use` still works.
    """
    before = _here.trusted, _here.quick
    _here.trusted, _here.quick = True, _environment() in ("auto", "torch")
    try:
        yield
    finally:
        _here.trusted, _here.quick = before


@contextmanager
def dependent_launch() -> Iterator[None]:
    """Within the block a kernel starts while the one before still runs, and waits where it needs what that one wrote.

    Its launch, and the first reads of what does not change (weights; lengths of sequences), are then hidden behind the
    kernel before: "programmatic dependent launch" of Hopper and later GPUs; elsewhere nothing changes. So no kernel may
    read a weight or a length that the one right before it wrote. Source: CUDA C++ Programming Guide.
    """
    global _dependent
    before, _dependent = _dependent, True
    try:
        yield
    finally:
        _dependent = before


def pdl(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that begins with `previous_done(PDL)`."""
    on = _dependent and device.type == "cuda" and torch.version.cuda is not None and capability(device) >= NEWEST
    return {"PDL": True, "launch_pdl": True} if on else {"PDL": False}


@triton.jit
def previous_done(PDL: tl.constexpr):
    """From here on, all that earlier kernels wrote is there; and the next kernel may start.

    Every program comes through here, also one that has nothing to do: "earlier" reaches back beyond the kernel right
    before only because that one has waited too.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def arguments(**tensors: Tensor) -> None:
    """Hold that all are tensors of one device and of a floating dtype."""
    first = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        first = first or (name, tensor)
        if tensor.device != first[1].device:
            raise ValueError(f"{name}: expected the device of {first[0]}, {first[1].device}, got {tensor.device}")


@cache
def _stored(device_name: str) -> dict[str, dict[str, Any]]:
    """Tuned sizes of a device: those that ship with the package, then those that `minillm bench tune` found here."""
    found: dict[str, dict[str, Any]] = {}
    for folder in (Path(__file__).parent / "tuned", tuned_folder()):
        path = folder / f"{slug(device_name)}.json"
        if path.is_file():
            found.update(json.loads(path.read_text(encoding="utf-8")))
    return found


def slug(device_name: str) -> str:
    """A device's name as a file's: "NVIDIA H100 80GB HBM3" becomes "h100-80gb-hbm3"."""
    return device_name.lower().removeprefix("nvidia ").replace(" ", "-")


def tuned_folder() -> Path:
    """Where `minillm bench tune` keeps what it found on this machine."""
    return cache_dir() / "tuned"


def tuned(device: torch.device, key: str, **default: Any) -> dict[str, Any]:
    """Sizes for the kernel and shape class `key`: the stored ones of this device, else `default`, at once."""
    if device.type != "cuda":
        return default
    return {**default, **_stored(_name(device.index or 0)).get(key, {})}


@cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def capability(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability; the newest in the interpreter, which can do everything."""
    return NEWEST if INTERPRETED or device.type != "cuda" else _capability(device.index or 0)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def sm_count(index: int | None) -> int:
    """Streaming multiprocessors of a GPU; a small number in the interpreter, where each program takes time."""
    return torch.cuda.get_device_properties(index or 0).multi_processor_count if torch.cuda.is_available() else 4


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def divided(x: Tensor, number: float) -> Tensor:
    """x / number with a CPU's bits: on a GPU torch multiplies by 1 / number, and the last bit may differ."""
    return x / x.new_full((), number)


def has_copy_engine(x: Tensor) -> bool:
    """Whether kernels on x's device may read by descriptors: from Hopper on, and in the interpreter."""
    return capability(x.device) >= COPY_ENGINE


def on_tensor_cores(x: Tensor) -> bool:
    """Whether tensor cores multiply numbers of x's dtype, on x's device, in a kernel of ours; else registers run out of
    place for tiles as large.
    """
    return x.dtype != torch.float32 and capability(x.device) >= TENSOR_CORES


def fits_descriptor(*tensors: Tensor) -> bool:
    """Whether the copy engine can read these: last axis contiguous, other strides and the address multiples of 16 B."""
    return all(
        t.stride(-1) == 1
        and t.data_ptr() % 16 == 0
        and all(stride * t.element_size() % 16 == 0 for stride in t.stride()[:-1])
        for t in tensors
    )
