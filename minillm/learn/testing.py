"""What the checks of exercises are written with: contracts, comparisons that show where two values differ, and
variants.

A check is a class of ordinary pytest methods, each of which gets the learner's object as `impl` and holds one contract:

    @exercise("2.3", "repeat_kv")
    class TestRepeatKV:
        def test_shape(self, impl):
            '''the output has groups times as many heads'''
"""

import inspect
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np

__all__ = [
    "ContractError",
    "alternative",
    "exercise",
    "expect",
    "expect_close",
    "expect_compiles",
    "expect_equal",
    "expect_launches_compile",
    "expect_parts",
    "expect_raises",
    "last",
    "wrong",
]


SHOWN = 120  # characters of a value in a message; of a longer one the part that differs
NOTES: list[str] = []  # what a contract that holds has to tell besides; the checker empties it before each


def is_stub(error: BaseException) -> bool:
    """Whether an error is the stub's own; torch raises NotImplementedError, too."""
    return isinstance(error, NotImplementedError) and str(error).startswith("Exercise")


def last(contract: Any) -> Callable:
    """Mark a contract that is tried only when the others hold, and after them: one that takes a second."""
    contract.last = True
    return contract


class ContractError(AssertionError):
    """A contract that does not hold; the message says expected and got."""


def exercise(number: str, name: str) -> Callable[[type], type]:
    """Mark a class of checks as those of exercise `number`, whose object is called `name` in the notebook."""

    def mark(cls: Any) -> type:
        cls.number, cls.object_name = number, name
        return cls

    return mark


def _variant(kind: str, number: str, what: str) -> Callable:
    def mark(impl: Any) -> Any:
        impl.variant = (kind, number, what)
        # A file holds several variants under one name: keep them all, not only the last that the name is bound to.
        module = getattr(impl, "fn", impl).__module__  # a Triton kernel is an object around its function
        vars(sys.modules[module]).setdefault("VARIANTS", []).append(impl)
        return impl

    return mark


def wrong(number: str, what: str) -> Callable:
    """Mark an implementation that the checks of exercise `number` must refuse; `what` names the mistake."""
    return _variant("wrong", number, what)


def alternative(number: str, what: str) -> Callable:
    """Mark an implementation that the checks of exercise `number` must accept."""
    return _variant("alternative", number, what)


def expect(condition: bool, message: str) -> None:
    """Hold `condition`; `message` says what was expected and what came instead."""
    if not condition:
        raise ContractError(message)


def expect_equal(what: str, got: Any, expected: Any) -> None:
    """Hold that `got` equals `expected` exactly; sequences are compared position by position, and a failure shows the
    first one that differs, however long they are.
    """
    both = isinstance(got, list | tuple) and isinstance(expected, list | tuple)  # either will do, but not within
    if _same(list(got), list(expected)) if both else _same(got, expected):
        return
    if got is None and expected is not None:
        raise ContractError(f"{_differ(what, expected, got)} (is a `return` missing?)")
    at = _first_difference(got, expected)
    if at is None:
        raise ContractError(_differ(what, expected, got))
    where = f"\nfirst difference at position {at}"
    if len(got) != len(expected):
        where += f"; expected {len(expected)} in all, got {len(got)}"
    raise ContractError(_differ(what, _around(expected, at), _around(got, at)) + where)


def _first_difference(got: Any, expected: Any) -> int | None:
    """The first position at which two sequences of one kind differ, or where one ends; None for what is no sequence."""
    kinds = (list, tuple), str, bytes
    if not any(isinstance(got, kind) and isinstance(expected, kind) for kind in kinds):
        return None
    pairs = enumerate(zip(got, expected, strict=False))
    return next((i for i, (g, e) in pairs if not _same(g, e)), min(len(got), len(expected)))


class _Cut(str):
    """A text that is shown without quotes."""

    __repr__ = str.__str__


def _around(values: Any, at: int) -> Any:
    """Of a long sequence the part around position `at`."""
    if len(repr(values)) <= SHOWN:
        return values
    first, last = max(0, at - 3), at + 4
    if isinstance(values, str | bytes):
        first, last = max(0, at - 30), at + 31
        return _Cut(f"{'…' * (first > 0)}{values[first:last]!r}{'…' * (last < len(values))}")
    shown = ["…"] * (first > 0) + [_short(v, 60) for v in values[first:last]] + ["…"] * (last < len(values))
    return _Cut(f"[{', '.join(shown)}]")


def expect_close(what: str, got: Any, expected: Any, atol: float = 1e-6, rtol: float = 1e-5) -> None:
    """Hold |got - expected| <= atol + rtol |expected| everywhere, and the same shape. NaN equals only NaN, infinity
    only itself.
    """
    got, expected = _array(what, got), _array(what, expected)
    if got.shape != expected.shape:
        raise ContractError(f"{what}: expected shape {expected.shape}\n{'':{len(what)}}  got shape      {got.shape}")
    same = np.isclose(got, expected, atol=atol, rtol=rtol, equal_nan=True)
    if same.all():
        return
    at = tuple(int(i) for i in np.argwhere(~same)[0])
    where = f"at position {at if len(at) != 1 else at[0]}" if at else "(a single number)"
    digits = next((n for n in (6, 9, 12) if f"{got[at]:.{n}g}" != f"{expected[at]:.{n}g}"), 17)
    raise ContractError(
        f"{what}: expected {expected[at]:.{digits}g}\n{'':{len(what)}}  got      {got[at]:.{digits}g}  {where}\n"
        f"{int((~same).sum())} of {same.size} values differ by more than {atol:g} + {rtol:g}·|expected|"
    )


def expect_parts(got: Any, *names: str) -> tuple:
    """Hold that `got` is a tuple or list of as many values as there are names, and return it as a tuple."""
    if not isinstance(got, tuple | list) or len(got) != len(names):
        what = "nothing (is a `return` missing?)" if got is None else _short(got, 80)
        raise ContractError(f"expected ({', '.join(names)})\n  got    {what}")
    return tuple(got)


def expect_raises(error: type[Exception], call: Callable[[], Any], why: str) -> None:
    """Hold that `call()` raises `error`. The stub's own error passes through: it is told from a wrong answer."""
    try:
        got = call()
    except error as e:
        if is_stub(e):
            raise
        return
    except Exception as e:
        if is_stub(e):
            raise
        raise ContractError(f"{why}: expected {error.__name__}\n  got {type(e).__name__}: {e}") from e
    raise ContractError(f"{why}: expected {error.__name__}\n  got no error, but {_short(got)}")


def expect_compiles(kernel: Any, *args: Any, num_warps: int = 4, num_stages: int = 3, **sizes: Any) -> None:
    """Hold that a Triton kernel compiles for an H100 as `kernel[grid](*args, **sizes)` would; no GPU is needed.

    Tensors may be given as torch dtypes. It takes a second, so its contract is marked `@last`; what the kernel takes
    of registers and shared memory is shown beside the contract. The interpreter accepts what no GPU runs: `total = 0`
    before a loop that adds floats, Python lists, a `tl.dot` of 4 x 4.
    """
    from .compiling import DoesNotCompile, compile_kernel

    if not hasattr(kernel, "fn"):
        raise ContractError(
            "expected a Triton kernel\n  got a plain function: is `@triton.jit` missing above its `def`?"
        )
    try:
        got = compile_kernel(kernel, *args, num_warps=num_warps, num_stages=num_stages, **sizes)
    except DoesNotCompile as e:
        where = f"\nin {e.name}: {e.text}"
        if e.name == kernel.fn.__name__:
            where = f"\nline {e.line + _first_line(kernel.fn) - 1} in {e.name}: {e.text}"
        raise ContractError(
            f"the interpreter runs it, but it does not compile for a GPU:\n{e.said}{where if e.line else ''}"
        ) from None
    spilled = f", {got.local_bytes} B a thread spilled" if got.local_bytes else ""
    NOTES.append(f"{got.registers} registers a thread, {got.shared_bytes:,} B of shared memory a program{spilled}")


def expect_launches_compile(call: Callable[[], Any]) -> None:
    """Hold that the Triton kernels which `call()` launches in the interpreter compile for an H100, too; that it
    launches one. On a GPU, where kernels are compiled anyway, it just calls. For a contract marked `@last`.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        call()
        return
    from triton.runtime.interpreter import InterpretedFunction

    run, launched = InterpretedFunction.run, {}

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **sizes: Any) -> Any:
        kinds = [getattr(value, "dtype", type(value)) for value in args]
        launched[f"{self.fn.__name__} {kinds} {sizes}"] = (self, args, sizes)
        return run(self, *args, grid=grid, warmup=warmup, **sizes)

    with patch.object(InterpretedFunction, "run", noted):
        call()
    expect(bool(launched), "expected a launch of a Triton kernel, `kernel[grid](...)`\n  got none")
    for kernel, args, sizes in launched.values():
        expect_compiles(kernel, *args, **sizes)


def _first_line(fn: Callable) -> int:
    lines, first = inspect.getsourcelines(fn)
    return first + next(i for i, line in enumerate(lines) if line.lstrip().startswith("def "))


def _differ(what: str, expected: Any, got: Any) -> str:
    return f"{what}: expected {_short(expected)}\n{'':{len(what)}}  got      {_short(got)}"


def _same(got: Any, expected: Any) -> bool:
    if isinstance(got, list | tuple) and type(got) is type(expected):
        return len(got) == len(expected) and all(_same(g, e) for g, e in zip(got, expected, strict=True))
    return np.shape(got) == np.shape(expected) and bool(np.asarray(got == expected).all())


def _short(value: Any, limit: int = 2 * SHOWN) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def _array(what: str, value: Any) -> np.ndarray:
    """`value` as a float64 array: torch tensors, our autograd's tensors (`.data`), NumPy, numbers, lists."""
    if value is None:
        raise ContractError(f"{what}: expected numbers\n{'':{len(what)}}  got      None (is a `return` missing?)")
    if hasattr(value, "detach"):
        value = value.detach()
        value = value.cpu().double().numpy() if hasattr(value, "cpu") else value.data
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as e:
        raise ContractError(f"{what}: expected numbers\n{'':{len(what)}}  got      {_short(value)}") from e
