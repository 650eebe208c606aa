"""The contiguous cache: whatever the steps, hidden states are those of the whole sequence computed at once."""

import dataclasses
import functools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.cache.contiguous import ContiguousCache
from minillm.config import ModelConfig
from minillm.model import Transformer
from minillm.model.layers import NoCache

VOCAB = 40
LLAMA = ModelConfig(VOCAB, 16, 24, 2, 4, 4, 8, max_position_embeddings=64)
CONFIGS = {
    "llama": LLAMA,
    "grouped": dataclasses.replace(LLAMA, num_key_value_heads=2),
    "one key head": dataclasses.replace(LLAMA, num_key_value_heads=1),
    "qwen3": dataclasses.replace(LLAMA, num_key_value_heads=2, qk_norm=True),
}


@functools.cache
def tiny(name: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIGS[name]).eval().requires_grad_(False)
    model.reset_parameters(std=0.4)
    return model


def step(model, cache, new):
    """One step with `new` tokens (lists) of each sequence -> hidden states of each sequence's new tokens."""
    batch = cache.extend([len(ids) for ids in new])
    longest = max(map(len, new))
    rectangle = torch.tensor([list(ids) + [0] * (longest - len(ids)) for ids in new])
    assert batch.positions.shape == rectangle.shape
    hidden_states = model(rectangle, batch, cache)
    return [row[: len(ids)] for row, ids in zip(hidden_states, new, strict=True)]


# Some steps of some sequences; the first brings every sequence something.
STEPS = st.integers(1, 4).flatmap(
    lambda rows: st.tuples(
        st.lists(st.integers(1, 12), min_size=rows, max_size=rows),
        st.lists(st.lists(st.integers(0, 5), min_size=rows, max_size=rows).filter(any), max_size=6),
    )
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.sampled_from(sorted(CONFIGS)), st.integers(0, 9), st.integers(1, 40), st.data())  # window 0: none
def test_any_steps_equal_all_at_once(steps, name, window, capacity, data):
    model, (first, others) = tiny(name), steps
    cache = ContiguousCache(model.config, len(first), capacity, window)
    sequences, got = [[] for _ in first], [[] for _ in first]
    rows = list(range(len(first)))  # which sequence stands in which row
    for counts in [first, *others]:
        counts = counts[: len(rows)]
        if not any(counts):
            continue
        new = [data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=n, max_size=n)) for n in counts]
        for row, ids, out in zip(rows, new, step(model, cache, new), strict=True):
            sequences[row] += ids
            got[row].append(out)
        assert cache.lengths == [len(sequences[row]) for row in rows]
        assert not window or cache.capacity <= window
        if len(rows) > 1 and data.draw(st.booleans()):
            kept = data.draw(st.permutations(range(len(rows))))[: data.draw(st.integers(1, len(rows)))]
            cache.keep(kept)
            rows = [rows[i] for i in kept]
    for ids, parts in zip(sequences, got, strict=True):
        expected = model(torch.tensor([ids]), cache=NoCache(window))[0]
        torch.testing.assert_close(torch.cat(parts), expected, atol=2e-5, rtol=1e-5)


def test_a_window_is_what_a_mask_says():
    """NoCache with a window against attention written out: the oracle's own oracle."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 4, 8) for _ in range(3))
    got = NoCache(3).layers[0].attend(q, k, v, None)
    for t in range(9):
        seen = slice(max(0, t - 2), t + 1)
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, seen]) / 8**0.5
        expected = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, seen])
        torch.testing.assert_close(got[:, t], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_is_what_is_held(dtype):
    config = CONFIGS["grouped"]
    cache = ContiguousCache(config, 3, 10, dtype=dtype)
    size = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    held = cache.k.untyped_storage().nbytes() + cache.v.untyped_storage().nbytes()
    assert cache.nbytes == held == 2 * 2 * 3 * 10 * 2 * 8 * dtype.itemsize == 3 * 10 * config.kv_bytes_per_token(size)


def test_growth_doubles_and_keeps_the_content():
    model = tiny("grouped")
    cache = ContiguousCache(model.config, 2, capacity=3)
    step(model, cache, [[1, 2, 3], [4, 5]])
    k, v = cache.k.clone(), cache.v.clone()
    assert k[:, 0].abs().amax((0, 2, 3)).min() > 0  # three tokens are there
    assert k[:, 1, 2].abs().max() == 0  # padding is not stored
    step(model, cache, [[6], []])
    assert cache.capacity == 6
    torch.testing.assert_close(cache.k[:, :, :3], k, atol=0, rtol=0)
    torch.testing.assert_close(cache.v[:, :, :3], v, atol=0, rtol=0)
    step(model, cache, [[7] * 20, [8]])
    assert cache.capacity == 24
    assert cache.lengths == [24, 3]


def test_growth_has_one_old_tensor_at_a_time(monkeypatch):
    """When room for the values is made, the old keys are gone: a quarter more than the cache afterwards, not a half."""
    cache = ContiguousCache(tiny("grouped").config, batch_size=1, capacity=2)
    old, alive, new_zeros = weakref.ref(cache.k), [], torch.Tensor.new_zeros

    def watched(self, *shape):
        alive.append(old() is not None)
        return new_zeros(self, *shape)

    monkeypatch.setattr(torch.Tensor, "new_zeros", watched)
    cache.extend([3])
    assert alive == [True, False]


def test_a_ring_grows_to_the_window_and_no_further():
    model = tiny("llama")
    cache = ContiguousCache(model.config, 1, capacity=2, window=5)
    sizes = []
    for new in ([1], [2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12]):
        step(model, cache, [new])
        sizes.append(cache.capacity)
    assert sizes == [2, 4, 4, 5, 5]
    assert ContiguousCache(model.config, 1, capacity=64, window=5).capacity == 5
    held = cache.k.untyped_storage().nbytes() + cache.v.untyped_storage().nbytes()
    assert cache.nbytes == held == 5 * model.config.kv_bytes_per_token("float32")


def test_no_slot_is_written_twice_in_a_step():
    """Which of two writes to one slot wins is undefined on a GPU."""
    batch = ContiguousCache(LLAMA, 2, window=4).extend([11, 3])
    written = list(zip(batch.rows.tolist(), batch.slots.tolist(), batch.columns.tolist(), strict=True))
    assert sorted(written) == [(0, 0, 8), (0, 1, 9), (0, 2, 10), (0, 3, 7), (1, 0, 0), (1, 1, 1), (1, 2, 2)]


def test_keep_frees_the_others():
    model = tiny("grouped")
    cache = ContiguousCache(model.config, 3, capacity=4)
    step(model, cache, [[1, 2], [3], [4, 5, 6]])
    k, before = cache.k.clone(), cache.nbytes
    cache.keep([2, 0])
    assert cache.lengths == [3, 2]
    assert 3 * cache.nbytes == 2 * before
    torch.testing.assert_close(cache.k, k[:, [2, 0]], atol=0, rtol=0)


def test_a_batch_is_frozen():
    batch = ContiguousCache(LLAMA, 1).extend([3])
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.mask = None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer, 1 or more, got 0"),
        ({"batch_size": 1, "capacity": 0}, "capacity: expected an integer, 1 or more, got 0"),
        ({"batch_size": 1, "window": -1}, "window: expected an integer, 0 or more, got -1"),
        ({"batch_size": True}, "batch_size: expected an integer, 1 or more, got True"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        ContiguousCache(LLAMA, **arguments)


def test_bad_steps():
    model = tiny("llama")
    cache = ContiguousCache(model.config, 2)
    for new in ([1], [1, 2, 3], [0, 0], [2, -1], []):
        with pytest.raises(ValueError, match="new: expected 2 counts"):
            cache.extend(new)
    with pytest.raises(ValueError, match="new: expected 1 or more for a sequence that has nothing"):
        cache.extend([2, 0])
    for rows in ([], [2], [-1], [0, 0]):
        with pytest.raises(ValueError, match=r"rows: expected different rows in 0\.\.1"):
            cache.keep(rows)
    assert cache.lengths == [0, 0]
    batch = cache.extend([2, 2])
    with pytest.raises(ValueError, match=r"batch: expected positions of token_ids' shape \[1, 2\], got \[2, 2\]"):
        model(torch.zeros(1, 2, dtype=torch.long), batch, cache)
    k = torch.zeros(1, 2, model.config.num_key_value_heads, model.config.head_dim)
    with pytest.raises(ValueError, match=r"k: expected torch.float32 of shape \[2, 2\]"):
        cache.layers[0].write(k, k, batch)
    half = ContiguousCache(model.config, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"k: expected torch.bfloat16 .* got torch.float32"):
        model(torch.zeros(2, 2, dtype=torch.long), half.extend([2, 2]), half)
    with pytest.raises(ValueError, match="window: expected an integer"):
        NoCache(-1)
