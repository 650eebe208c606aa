"""The cache in blocks: bytes, copies, and what a layer stores by slot and gives back, in every dtype."""

from types import SimpleNamespace

import pytest
import torch

from minillm.cache.paged import PagedCache
from minillm.config import ModelConfig
from minillm.kernels import AttentionPlan

CONFIG = ModelConfig(50, 16, 24, 3, 4, 2, 8, max_position_embeddings=64)
DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
CPU = torch.device("cpu")


def tensors(cache: PagedCache) -> list[torch.Tensor]:
    return [x for x in (cache.k, cache.v, cache.k_scale, cache.v_scale) if x is not None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_those_of_the_tensors(dtype):
    cache = PagedCache(CONFIG, 5, 4, CPU, dtype)
    a_head = 8 * dtype.itemsize + (4 if dtype.itemsize == 1 else 0)  # a scale of 4 bytes
    assert cache.bytes_per_token == 3 * 2 * 2 * a_head
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(cache)}
    assert cache.nbytes == 5 * 4 * cache.bytes_per_token == sum(storages.values())
    assert (cache.k_scale is None) == (cache.v_scale is None) == (dtype.itemsize > 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_blocks_are_copied_scales_too(dtype):
    cache = PagedCache(CONFIG, 5, 4, CPU, dtype)
    for x in tensors(cache):
        x.copy_(torch.arange(x.numel()).remainder(101).view(x.shape).to(dtype if x.dim() == 4 else torch.float32))
    before = [x.float() for x in tensors(cache)]
    cache.copy([(1, 4), (0, 2)])
    for x, was in zip(tensors(cache), before, strict=True):
        blocks, old = x.float().unflatten(1, (5, 4)), was.unflatten(1, (5, 4))
        assert torch.equal(blocks, old[:, [0, 1, 0, 3, 1]])


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_attended_to(dtype, planned):
    """Both ways of the layer, against attention to what the cache's dtype makes of keys and values."""
    torch.manual_seed(0)
    cache = PagedCache(CONFIG, 5, 4, CPU, dtype)
    for x in tensors(cache):
        x.view(torch.uint8).fill_(127) if x.dtype.itemsize == 1 else x.fill_(torch.nan)
    layer, tables = cache.layers[1], torch.tensor([[3, 1]], dtype=torch.int32)
    lengths, bounds = torch.tensor([6], dtype=torch.int32), torch.tensor([0, 6], dtype=torch.int32)
    slots = torch.tensor([12, 13, 14, 15, 4, 5])
    q, k, v = torch.randn(6, 4, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    plan = AttentionPlan(tables, lengths, bounds, 4) if planned else None
    batch = SimpleNamespace(positions=torch.arange(6), slots=slots, cu_seqlens_q=bounds, context_lens=lengths,
                            block_tables=tables, max_seqlen_q=6, max_seqlen_k=None, plan=plan)  # fmt: skip
    layer.write(k, v, batch)
    half = {torch.int8: 127.5, torch.float8_e4m3fn: 448}.get(dtype)
    for x, got, scale in ((k, layer.k, layer.k_scale), (v, layer.v, layer.v_scale)):
        factor = x.abs().amax(-1) / half if half else torch.ones(6, 2)
        numbers = x / factor[..., None]
        numbers = numbers.round().clamp(max=127) if dtype == torch.int8 else numbers
        torch.testing.assert_close(got[slots].float(), numbers.to(dtype).float())
        x.copy_(numbers.to(dtype).float() * factor[..., None])
        assert scale is None or torch.allclose(scale[slots], factor)
    weights = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1)) / 8**0.5
    weights = weights.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
    expected = torch.einsum("hts,shd->thd", weights, v.repeat_interleave(2, 1))
    torch.testing.assert_close(layer.attend(q, k, v, batch), expected, atol=1e-5, rtol=1e-5)
    others = [i for i in range(20) if i not in slots.tolist()]
    if layer.k_scale is not None:
        assert layer.k_scale[others].isnan().all()
    assert cache.layers[0].slots(batch)[:2] == (cache.layers[0].k, cache.layers[0].v)
