"""Rotation: turn the residual stream by an orthogonal matrix, so that no channel stands out; the function is the same.

A model's stream has a few channels far larger than the rest, and its weights have the columns that go with them. A
Hadamard matrix, whose numbers are all ±1/√n, mixes every channel into all others alike, and outliers go under in the
sum. Nothing has to be computed for it later, since all that reads or writes the stream is linear, and a norm without
weights only looks at a vector's length:

    x' = x R:    embedding E R;    readers W R;    writers Rᵀ W

For that the norms' weights move into their readers first, the last one's into the head. A head that shares the
embedding cannot take it: it gets a matrix of its own, and a checkpoint grows by that.

Sources: Ashkboos et al., 2024, "SliceGPT" (moving the weights of norms) and "QuaRot"; Paley, 1933, for Hadamard
matrices whose size is no power of two: 576 = 16 · 36.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..model.layers import RMSNorm
from ..model.linear import Dense, Linear
from ..model.transformer import Transformer
from .calibrate import replace_weight, sites

__all__ = ["hadamard", "random_hadamard", "rotate_model"]


def hadamard(n: int) -> Tensor:
    """An n by n matrix of ±1 whose rows are orthogonal: H Hᵀ = n · I.  fp64 [n, n]

    Doubled from a smaller one (Sylvester), or from the squares modulo a prime (Paley). Raises ValueError where neither
    way leads to n.
    """
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n % 4 == 0 and _is_prime(n - 1) and (n - 1) % 4 == 3:
        s = _paley(n - 1)
        return s + torch.eye(n, dtype=torch.float64)
    if n % 4 == 0 and _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        s, one = _paley(n // 2 - 1), torch.eye(n // 2, dtype=torch.float64)
        return torch.cat((torch.cat((s + one, s - one), 1), torch.cat((s - one, -s - one), 1)))
    if n < 1 or n % 2:
        raise ValueError(f"n: expected a size with a known Hadamard matrix, such as 2^k, 12 · 2^k, 36 · 2^k; got {n}")
    h = hadamard(n // 2)
    return torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))


def random_hadamard(n: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix: a Hadamard matrix, divided by √n, with random signs of its rows.  fp64 [n, n]

    The signs keep a vector that happens to look like one of the rows from ending in a single channel.
    """
    signs = torch.randint(2, (n, 1), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    return signs * hadamard(n) / n**0.5


@torch.no_grad()
def rotate_model(model: Transformer, seed: int = 0, heads: bool = True) -> Transformer:
    """A copy of the model with its stream turned, whose function is the same; its head is its own (`tied` is False).

    heads: also turn the values of every attention head, between v_proj and o_proj. Computes in fp64, then rounds to the
    model's dtype. Raises ValueError for a size without a known Hadamard matrix, and for layers without plain weights.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    _untie(model)
    linears = sites(model)
    _move_norms(model)
    r = random_hadamard(model.config.hidden_size, seed).to(model.device)
    model.embed_tokens.weight = _parameter(model.embed_tokens.weight.double() @ r, model)
    _read(model, _head(model), r)
    for name, linear in linears.items():
        if name.endswith(("qkv_proj", "gate_up_proj")):
            _read(model, linear, r)
        else:
            _write(model, linear, r, [linear.out_features])
    if heads:
        _turn_heads(model, linears, seed)
    return model


def _turn_heads(model: Transformer, linears: dict[str, Dense], seed: int) -> None:
    """The values of every head by one matrix [D, D]: heads mix tokens, never channels."""
    config = model.config
    r = random_hadamard(config.head_dim, seed + 1).to(model.device)
    every_query_head = torch.block_diag(*[r] * config.num_attention_heads)  # [H D, H D]
    every_value_head = torch.block_diag(*[r] * config.num_key_value_heads)
    for name, linear in linears.items():
        if name.endswith("qkv_proj"):
            _write(model, linear, every_value_head, list(linear.parts.values()))
        elif name.endswith("o_proj"):
            _read(model, linear, every_query_head)


def _read(model: Transformer, linear: Dense, r: Tensor) -> None:
    """For inputs x R instead of x."""
    replace_weight(model, linear, linear.weight.double() @ r)


def _write(model: Transformer, linear: Dense, r: Tensor, parts: list[int]) -> None:
    """Give y R instead of y, in the last of the parts that its rows fall into."""
    weight = linear.weight.double().split(parts)
    replace_weight(model, linear, torch.cat((*weight[:-1], r.T @ weight[-1])))
    if linear.bias is not None:
        bias = linear.bias.double().split(parts)
        linear.bias = _parameter(torch.cat((*bias[:-1], bias[-1] @ r)), model)


def _untie(model: Transformer) -> None:
    head = _head(model)
    replace_weight(model, head, head.weight.clone())
    model.tied = False
    model.config = replace(model.config, tie_word_embeddings=False)


def _move_norms(model: Transformer) -> None:
    """The weight of each norm into all that reads it."""
    pairs: list[tuple[RMSNorm, Linear]] = [(model.norm, model.lm_head)]
    for layer in model.layers:
        pairs += [(layer.input_layernorm, layer.self_attn.qkv_proj)]
        pairs += [(layer.post_attention_layernorm, layer.mlp.gate_up_proj)]
    for norm, linear in pairs:
        assert isinstance(linear, Dense)
        replace_weight(model, linear, linear.weight.double() * norm.weight.double())
        norm.weight = _parameter(torch.ones_like(norm.weight), model)


def _head(model: Transformer) -> Dense:
    if not isinstance(model.lm_head, Dense):
        raise ValueError(f"lm_head: expected a plain weight, got {type(model.lm_head).__name__}")
    return model.lm_head


def _parameter(x: Tensor, model: Transformer) -> nn.Parameter:
    return nn.Parameter(x.to(model.device, model.dtype), requires_grad=False)


def _paley(p: int) -> Tensor:
    """[[0, 1], [±1, Q]] of size p + 1, for a prime p: Q_ij tells whether i - j is a square modulo p (1), is none (-1),
    or 0; symmetric if p = 1 modulo 4, else skew.
    """
    squares = torch.full((p,), -1, dtype=torch.float64)
    squares[torch.arange(1, p) ** 2 % p] = 1
    squares[0] = 0
    place = torch.arange(p)
    s = torch.zeros(p + 1, p + 1, dtype=torch.float64)
    s[0, 1:], s[1:, 0] = 1, 1 if p % 4 == 1 else -1
    s[1:, 1:] = squares[(place[:, None] - place) % p]
    return s


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
