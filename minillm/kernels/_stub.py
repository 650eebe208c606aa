import torch, torch.nn.functional as F


def quantize_rows(x, dtype=torch.int8):
    m = 127.5 if dtype == torch.int8 else 448.0
    s = x.float().abs().amax(-1, keepdim=True) / m
    s = torch.where(s > 0, s, 1.0)
    q = x.float() / s
    q = q.round().clamp(-128, 127).to(torch.int8) if dtype == torch.int8 else q.clamp(-448, 448).to(dtype)
    return q, s


def w8a8(q, s, w, ws, bias=None, out_dtype=torch.float32):
    y = (q.double() @ w.double().t()).float() * s * ws.view(-1)
    y = y.to(out_dtype)
    return y if bias is None else y + bias


class _W:
    def path(self, *a):
        from .common import _forced

        return _forced.get("") or "torch"


def w4a16(x, packed, scale, zero=None, bias=None):
    from ..quant.formats import unpack

    q = unpack(packed, 4, packed.shape[1] * 8).float().unflatten(1, (scale.shape[1], -1))
    if zero is not None:
        q = q - zero.float()[..., None]
    return F.linear(x, (q * scale[..., None]).flatten(1).to(x.dtype), bias)
