"""The comparisons that checks are written with: what they accept, and what a failure says."""

import numpy as np
import pytest
import torch

from minillm.learn.testing import ContractError, expect, expect_close, expect_equal, expect_parts, expect_raises


def test_close_accepts():
    expect_close("x", torch.tensor([1.0, float("nan"), float("inf")]), np.array([1.0 + 1e-7, np.nan, np.inf]))
    expect_close("x", 1, 1.0)
    expect_close("x", [[1, 2]], torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    ("got", "expected", "says"),
    [
        (torch.tensor([[1.0, 2.0], [3.0, 5.0]]), [[1, 2], [3, 4]], r"got +5 +at position \(1, 1\)\n1 of 4"),
        ([1.0, 3.0], [1.0, 2.0], "at position 1"),
        (3.0, 2.0, "single number"),
        (torch.zeros(2, 3), torch.zeros(3, 2), r"expected shape \(3, 2\)"),
        (float("nan"), 0.0, "nan"),
        (None, 0.0, "return"),
        ("text", 0.0, "numbers"),
    ],
)
def test_close_refuses(got, expected, says):
    with pytest.raises(ContractError, match=says):
        expect_close("x", got, expected)


@pytest.mark.parametrize(("got", "expected"), [([1, 2], [1, 2]), ((1,), (1,)), ("a", "a"), ({"a": 1}, {"a": 1})])
def test_equal_accepts(got, expected):
    expect_equal("x", got, expected)


@pytest.mark.parametrize(("got", "expected"), [([1, 2], [1, 3]), ([1], [1, 2]), (None, 1), (np.zeros(2), np.zeros(3))])
def test_equal_refuses(got, expected):
    with pytest.raises(ContractError, match="expected"):
        expect_equal("x", got, expected)


def test_raises():
    def bad():
        raise KeyError("k")

    def stub():
        raise NotImplementedError("Exercise 1.1: add")

    def torchs_own():
        raise NotImplementedError("no kernel for this dtype")

    expect_raises(KeyError, bad, "why")
    with pytest.raises(ContractError, match="got KeyError"):
        expect_raises(ValueError, bad, "why")
    with pytest.raises(ContractError, match="no error"):
        expect_raises(ValueError, lambda: 1, "why")
    with pytest.raises(NotImplementedError):
        expect_raises(NotImplementedError, stub, "a stub is not an answer")
    with pytest.raises(NotImplementedError):
        expect_raises(ValueError, stub, "a stub is not an answer")
    with pytest.raises(ContractError, match="got NotImplementedError: no kernel"):
        expect_raises(ValueError, torchs_own, "why")
    with pytest.raises(ContractError, match="because"):
        expect(False, "because")


def test_close_shows_digits_enough_to_differ():
    with pytest.raises(ContractError, match=r"expected 1.10433123\n.*got      1.10433125"):
        expect_close("x", 1.10433125, 1.10433123, atol=1e-9, rtol=0)


def test_parts():
    assert expect_parts([1, 2], "loss", "gradient") == (1, 2)
    for got, says in [(None, "is a `return` missing"), ((1,), r"got    \(1,\)"), (np.zeros(2), "got    array")]:
        with pytest.raises(ContractError, match=says):
            expect_parts(got, "loss", "gradient")


@pytest.mark.parametrize(
    ("got", "expected", "says"),
    [
        ([*range(500), 7], [*range(501)], r"expected \[…, 497, 498, 499, 500\]\n.*got      \[…, 497, 498, 499, 7\]"),
        (
            "x" * 500 + "a",
            "x" * 500 + "b",
            r"expected …'x{30}b'\n.*got      …'x{30}a'\nfirst difference at position 500",
        ),
        ([1, 2], [1, 2, 3], r"first difference at position 2; expected 3 in all, got 2"),
        ([[1, 2], [3]], [[1, 2], [4]], r"first difference at position 1"),
        (list(range(300)), list(range(299)), r"got      \[…, 296, 297, 298, 299\]\nfirst difference at position 299"),
        (None, 3, r"is a `return` missing"),
        ({"a": 1}, {"a": 2}, r"expected \{'a': 2\}\n.*got      \{'a': 1\}$"),
    ],
)
def test_equal_shows_the_first_difference(got, expected, says):
    with pytest.raises(ContractError, match=says):
        expect_equal("x", got, expected)


def test_equal_compares_nested_values():
    expect_equal("x", [(1, [2])], ((1, [2]),))
    with pytest.raises(ContractError, match="position 0"):
        expect_equal("x", [[1, 2]], [(1, 2)])
    expect_equal("x", [torch.ones(2), "a"], [np.ones(2), "a"])
