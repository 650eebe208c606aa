"""Kernels are held against `reference` in fp64: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from minillm.kernels import HAS_TRITON, use

GPU = torch.cuda.is_available()
# Rounding the result alone gives 2^-9 (bf16) and 2^-11 (fp16) at worst; what enters a product is rounded once more.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "kernels" in str(item.path) and not HAS_TRITON and "triton" in item.fixturenames:
            item.add_marker(pytest.mark.skip(reason="Triton is not installed here"))


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    if request.param == "interpreter" and GPU:
        pytest.skip("this machine compiles the kernels")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture
def triton():
    """Our kernels, whatever the device."""
    with use("triton"):
        yield


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request) -> torch.dtype:
    if request.param == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter computes bfloat16 wrongly")
    return request.param


def error(got: torch.Tensor, expected: torch.Tensor, typical: float = 0.0) -> float:
    """|got - expected| / |expected|, in fp64; infinite where got has NaN.

    `typical` is the size that an element of `expected` has by the sizes of the inputs: a sum that cancels to nearly
    nothing is not asked to be relatively exact.
    """
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    size = max(float(expected.double().norm()), typical * expected.numel() ** 0.5, 1e-12)
    return float((got.double() - expected.double()).norm()) / size if got.isfinite().all() else float("inf")
