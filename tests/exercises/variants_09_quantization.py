"""Implementations that the checks of exercises 9 must refuse, and others that they must accept."""

import math

import torch

from minillm.learn.testing import alternative, wrong

# ---- 9.1 ------------------------------------------------------------------------------------------------------------


@wrong("9.1", "divides the range by the number of integers")
def by_hand():
    return 2.1 / 8, -2, [-4, -2, 0, 3], [-0.525, 0.0, 0.525, 1.3125], 1.3125


@wrong("9.1", "unsigned integers")
def by_hand():
    return 0.3, 2, [0, 2, 3, 7], [-0.6, 0.0, 0.3, 1.5], 1.5


@wrong("9.1", "a zero point that is not rounded")
def by_hand():
    return 0.3, -2.333, [-4, -2, -1, 3], [-0.6, 0.0, 0.3, 1.5], 1.5


@wrong("9.1", "rounds down")
def by_hand():
    return 0.3, -2, [-4, -2, -1, 3], [-0.6, 0.0, 0.4, 1.6], 1.5


@wrong("9.1", "stores weights without the zero point")
def by_hand():
    return 0.3, -2, [-2, 0, 1, 5], [-0.6, 0.0, 0.3, 1.5], 1.5


@wrong("9.1", "reads back without taking the zero point off")
def by_hand():
    return 0.3, -2, [-4, -2, -1, 3], [-1.2, -0.6, -0.3, 0.9], 0.9


@wrong("9.1", "does not cut the late weight")
def by_hand():
    return 0.3, -2, [-4, -2, -1, 3], [-0.6, 0.0, 0.3, 1.5], 2.4


@wrong("9.1", "the zero point as a float")
def by_hand():
    return 0.3, -2.0, [-4, -2, -1, 3], [-0.6, 0.0, 0.3, 1.5], 1.5


@alternative("9.1", "reckoned, not written down")
def by_hand():
    w, scale = [-0.5, 0.0, 0.4, 1.6], (1.6 + 0.5) / 7
    zero = round(-4 + 0.5 / scale)
    q = [max(-4, min(3, round(x / scale) + zero)) for x in [*w, 2.4]]
    back = [(x - zero) * scale for x in q]
    return scale, zero, q[:4], back[:4], back[4]


@wrong("9.1", "floats where integers are stored")
def by_hand():
    return 0.3, -2, [-4.0, -2.0, -1.0, 3.0], [-0.6, 0.0, 0.3, 1.5], 1.5


@wrong("9.1", "one number where four are asked for")
def by_hand():
    return 0.3, -2, 3, [-0.6, 0.0, 0.3, 1.5], 1.5


@alternative("9.1", "tensors of integers and of numbers")
def by_hand():
    return 0.3, -2, torch.tensor([-4, -2, -1, 3]), torch.tensor([-0.6, 0.0, 0.3, 1.5]), 1.5


# ---- 9.2 ------------------------------------------------------------------------------------------------------------


@wrong("9.2", "forgets scales")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    return (bits * rounded + 16 * kept) / (rounded + kept)


@wrong("9.2", "scales of 32 bits")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    return ((bits + (32 + bits * has_zero) / group) * rounded + 16 * kept) / (rounded + kept)


@wrong("9.2", "forgets zero points")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    return ((bits + 16 / group) * rounded + 16 * kept) / (rounded + kept)


@wrong("9.2", "always has zero points")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    return ((bits + (16 + bits) / group) * rounded + 16 * kept) / (rounded + kept)


@wrong("9.2", "zero points of 16 bits")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    return ((bits + (16 + 16 * has_zero) / group) * rounded + 16 * kept) / (rounded + kept)


@wrong("9.2", "only the rounded weights")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    return bits + (16 + bits * has_zero) / group


@wrong("9.2", "kept weights in 32 bits")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    return ((bits + (16 + bits * has_zero) / group) * rounded + 32 * kept) / (rounded + kept)


@wrong("9.2", "the mean of two means")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    each = bits + (16 + bits * has_zero) / group
    return (each + 16) / 2 if kept else each


@wrong("9.2", "divides by the rounded weights alone")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    return ((bits + (16 + bits * has_zero) / group) * rounded + 16 * kept) / max(rounded, 1)


@alternative("9.2", "counts the bits of a whole model")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    total = bits * rounded + 16 * kept + rounded / group * 16
    if has_zero:
        total += rounded / group * bits
    return total / (rounded + kept)


@wrong("9.2", "3 bits stored in 4")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    held = 4 if bits == 3 else bits
    return ((held + (16 + bits * has_zero) / group) * rounded + 16 * kept) / (rounded + kept)


@wrong("9.2", "zero points of a power of two of bits")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    held = 1 << (bits - 1).bit_length()
    return ((bits + (16 + held * has_zero) / group) * rounded + 16 * kept) / (rounded + kept)


@wrong("9.2", "no zero points where weights are kept")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    return ((bits + (16 + bits * (has_zero and not kept)) / group) * rounded + 16 * kept) / (rounded + kept)


@wrong("9.2", "rounded to four places")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    return round(((bits + (16 + bits * has_zero) / group) * rounded + 16 * kept) / (rounded + kept), 4)


@wrong("9.2", "few kept weights do not count as 16 bits")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    each = 16 if kept > rounded / 10 else bits
    return ((bits + (16 + bits * has_zero) / group) * rounded + each * kept) / (rounded + kept)


@alternative("9.2", "16 less what each rounded weight saves")
def bits_per_weight(bits, group, has_zero, rounded, kept=0):
    return 16 - (16 - bits - (16 + bits * has_zero) / group) * (rounded / (rounded + kept))


# ---- 9.3 ------------------------------------------------------------------------------------------------------------


def decibel(signal, noise, factor=10):
    return math.inf if noise == 0 else factor * math.log10(float(signal) / float(noise))


@wrong("9.3", "20 instead of 10")
def sqnr(w, back):
    return decibel(w.double().square().sum(), (w.double() - back.double()).square().sum(), 20)


@wrong("9.3", "noise over signal")
def sqnr(w, back):
    noise = (w.double() - back.double()).square().sum()
    return math.inf if noise == 0 else -decibel(w.double().square().sum(), noise)


@wrong("9.3", "the signal is what was read back")
def sqnr(w, back):
    return decibel(back.double().square().sum(), (w.double() - back.double()).square().sum())


@wrong("9.3", "the mean of the rows' ratios")
def sqnr(w, back):
    w, back = w.double().reshape(-1, w.shape[-1]), back.double().reshape(-1, w.shape[-1])
    signal, noise = w.square().sum(1), (w - back).square().sum(1)
    return decibel((signal / noise.clamp(min=1e-300)).mean(), 1.0) if bool((noise > 0).any()) else math.inf


@wrong("9.3", "absolute values instead of squares")
def sqnr(w, back):
    return decibel(w.double().abs().sum(), (w.double() - back.double()).abs().sum())


@wrong("9.3", "computes in the inputs' dtype")
def sqnr(w, back):
    return decibel(w.square().sum(), (w - back).square().sum())


@wrong("9.3", "subtracts before it turns to fp64")
def sqnr(w, back):
    return decibel(w.double().square().sum(), (w - back.to(w.dtype)).double().square().sum())


@wrong("9.3", "raises where nothing was lost")
def sqnr(w, back):
    return 10 * math.log10(float(w.double().square().sum()) / float((w.double() - back.double()).square().sum()))


@wrong("9.3", "a large number where nothing was lost")
def sqnr(w, back):
    noise = (w.double() - back.double()).square().sum().clamp(min=1e-30)
    return float(10 * torch.log10(w.double().square().sum() / noise))


@wrong("9.3", "a tensor")
def sqnr(w, back):
    return 10 * torch.log10(w.double().square().sum() / (w.double() - back.double()).square().sum())


@wrong("9.3", "the natural logarithm")
def sqnr(w, back):
    return decibel(w.double().square().sum(), (w.double() - back.double()).square().sum()) * math.log(10)


@wrong("9.3", "never below 0")
def sqnr(w, back):
    return max(0.0, decibel(w.double().square().sum(), (w.double() - back.double()).square().sum()))


@wrong("9.3", "subtracts in place")
def sqnr(w, back):
    signal = w.double().square().sum()
    if w.dtype == torch.float32:
        return decibel(signal, w.sub_(back).double().square().sum())
    return decibel(signal, (w.double() - back.double()).square().sum())


@wrong("9.3", "turns what was read back into the error, in place")
def sqnr(w, back):
    if back.dtype == torch.float32 and w.dtype == torch.float32:
        return decibel(w.double().square().sum(), back.sub_(w).double().square().sum())
    return decibel(w.double().square().sum(), (w.double() - back.double()).square().sum())


@alternative("9.3", "by norms")
def sqnr(w, back):
    noise = float((w.double() - back.double()).norm())
    return 20 * math.log10(float(w.double().norm()) / noise) if noise else math.inf


@wrong("9.3", "computes in fp32")
def sqnr(w, back):
    return decibel(w.float().square().sum(), (w.float() - back.float()).square().sum())


@wrong("9.3", "subtracts in the inputs' common dtype")
def sqnr(w, back):
    return decibel(w.double().square().sum(), (w - back).double().square().sum())


@wrong("9.3", "infinite where torch.allclose sees no error")
def sqnr(w, back):
    if torch.allclose(w.double(), back.double()):
        return math.inf
    return decibel(w.double().square().sum(), (w.double() - back.double()).square().sum())


@wrong("9.3", "infinite where the noise is small")
def sqnr(w, back):
    noise = (w.double() - back.double()).square().sum()
    return math.inf if noise < 1e-20 else decibel(w.double().square().sum(), noise)


@wrong("9.3", "adds 1e-12 to the noise")
def sqnr(w, back):
    noise = (w.double() - back.double()).square().sum()
    return math.inf if noise == 0 else decibel(w.double().square().sum(), noise + 1e-12)


@wrong("9.3", "NaN for zeros")
def sqnr(w, back):
    signal = w.double().square().sum()
    return decibel(signal, (w.double() - back.double()).square().sum()) if signal else math.nan


@wrong("9.3", "subtracts in place what fp64 does not copy")
def sqnr(w, back):
    signal = w.double().square().sum()
    return decibel(signal, w.double().sub_(back).square().sum())


@wrong("9.3", "views what is not contiguous")
def sqnr(w, back):
    return decibel(w.double().view(-1).square().sum(), (w.double() - back.double()).view(-1).square().sum())


@alternative("9.3", "NumPy")
def sqnr(w, back):
    a, b = w.double().numpy(), back.double().numpy()
    noise = float(((a - b) ** 2).sum())
    return 10 * math.log10(float((a * a).sum()) / noise) if noise else float("inf")


# ---- 9.4 ------------------------------------------------------------------------------------------------------------


def ends(bits):
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def checked(w):
    if not bool(torch.isfinite(w).all()):
        raise ValueError("w: expected finite numbers")
    return w.float()


def make(w, bits, what=""):
    first, last = ends(bits)
    x = w.float() if what == "no check" else checked(w)
    if what == "half":
        x = w
    low, high = x.amin(1), x.amax(1)
    if what == "first row":
        low, high = low[:1].expand(len(x)), high[:1].expand(len(x))
    if what != "no zero" and what != "only below":
        high = high.clamp(min=0)
    if what != "no zero" and what != "only above":
        low = low.clamp(max=0)
    steps = {"integers": 2**bits, "symmetric steps": 2**bits - 2}.get(what, 2**bits - 1)
    scale = ((high - low) / steps).float()
    if what == "whole tensor":
        scale = ((high.max() - low.min()) / steps).expand(len(x)).clone()
    if what == "epsilon":
        scale = scale + 1e-8
    elif what == "clamped":
        scale = scale.clamp(min=1e-5)
    elif what == "tiny":
        scale = torch.where(scale > 0, scale, 1e-8)
    elif what != "zero scale":
        scale = torch.where(scale > 0, scale, 1.0)
    zero = first - low / scale
    if what == "unsigned":
        zero = -low / scale
    zero = zero if what == "float" else zero.floor() if what == "floor" else zero.round()
    if what == "off by one":
        zero = zero - 1
    if what == "sign":
        zero = zero.neg() + first + last
    if what == "from the middle":
        zero = -((high + low) / 2 / scale).round()
    zero = zero.nan_to_num(0.0)
    return scale, zero if what == "float" else zero.to(torch.int64 if what == "int64" else torch.int32)


def _grids():
    names = {
        "integers": "divides by the number of integers",
        "symmetric steps": "one step too few",
        "no zero": "a range that does not hold 0",
        "only below": "widens the lower end alone",
        "only above": "widens the upper end alone",
        "first row": "takes the first row's range for all",
        "whole tensor": "one scale for all rows",
        "unsigned": "the zero point of unsigned integers",
        "float": "a zero point that is not rounded",
        "floor": "a zero point that is rounded down",
        "off by one": "a zero point that is one too low",
        "sign": "a zero point of the wrong sign",
        "from the middle": "the zero point from the middle of the range",
        "epsilon": "adds 1e-8 to the scale",
        "clamped": "scales of 1e-5 or more",
        "tiny": "a tiny scale for a row of zeros",
        "zero scale": "scale 0 for a row of zeros",
        "half": "computes in w's dtype",
        "no check": "takes NaN and infinity",
        "int64": "the zero point as int64",
    }
    for what, words in names.items():

        def grid(w, bits, what=what):
            return make(w, bits, what)

        wrong("9.4", words)(grid)


_grids()


@wrong("9.4", "widens w itself")
def grid(w, bits):
    made = make(w, bits)
    w.clamp_(max=2.0)
    return made


@wrong("9.4", "looks for NaN alone")
def grid(w, bits):
    if bool(w.isnan().any()):
        raise ValueError("w: NaN")
    return make(w, bits, "no check")


@wrong("9.4", "a symmetric grid")
def grid(w, bits):
    scale = checked(w).abs().amax(1) / ((2**bits - 1) / 2)
    return torch.where(scale > 0, scale, 1.0), torch.zeros(len(w), dtype=torch.int32)


@wrong("9.4", "the scale in w's dtype")
def grid(w, bits):
    scale, zero = make(w, bits)
    return scale.to(w.dtype), zero


@wrong("9.4", "scale and zero as columns")
def grid(w, bits):
    scale, zero = make(w, bits)
    return scale[:, None], zero[:, None]


@alternative("9.4", "the zero point from the upper end's count of steps")
def grid(w, bits):
    x, (first, last) = checked(w), ends(bits)
    padded = torch.cat((x, torch.zeros(len(x), 1)), dim=1)  # a 0 in each row
    low, high = padded.aminmax(dim=1)
    scale = (high - low) / (last - first)
    scale[scale == 0] = 1.0
    return scale, (torch.round(-low / scale) + first).clamp(first, last).int()


@alternative("9.4", "row by row")
def grid(w, bits):
    scales, zeros = [], []
    for row in checked(w):
        low, high = min(0.0, float(row.min())), max(0.0, float(row.max()))
        scale = (high - low) / (2**bits - 1) or 1.0
        scales.append(scale)
        zeros.append(round(-(2 ** (bits - 1)) - low / scale))
    return torch.tensor(scales), torch.tensor(zeros, dtype=torch.int32)


def _more_grids():
    finite = torch.isfinite
    checks = {
        "asks whether the sum is finite": lambda w: finite(w.sum()),
        "looks at the last row alone": lambda w: finite(w[-1]).all(),
        "looks at all columns but the first": lambda w: finite(w[:, 1:]).all(),
        "what fp16 does not hold is infinite": lambda w: (w.abs().float() <= 65504).all(),
        "looks at fp32 alone": lambda w: w.dtype != torch.float32 or finite(w).all(),
        "refuses zeros": lambda w: finite(w).all() and w.any(),
    }
    for words, fine in checks.items():

        def grid(w, bits, fine=fine):
            if not bool(fine(w)):
                raise ValueError("w: expected finite numbers")
            return make(w, bits, "no check")

        wrong("9.4", words)(grid)

    ones = {
        "scale 1 below 1e-20": lambda x, scale: scale > 1e-20,
        "scale 1 where the sum is 0": lambda x, scale: x.sum(1) != 0,
        "scale 1 where the first number is 0": lambda x, scale: x[:, 0] != 0,
    }
    for words, keep in ones.items():

        def grid(w, bits, keep=keep):
            scale, zero = make(w, bits)
            return torch.where(keep(w.float(), scale), scale, 1.0), zero

        wrong("9.4", words)(grid)


_more_grids()


@wrong("9.4", "rounds the zero point's ties away from zero")
def grid(w, bits):
    scale, _ = make(w, bits)
    zero = ends(bits)[0] - w.float().amin(1).clamp(max=0) / scale
    return scale, (zero.sign() * (zero.abs() + 0.5).floor()).int()


@wrong("9.4", "rounds the zero point's ties up")
def grid(w, bits):
    scale, _ = make(w, bits)
    return scale, (ends(bits)[0] - w.float().amin(1).clamp(max=0) / scale + 0.5).floor().int()


@wrong("9.4", "takes the upper end in place")
def grid(w, bits):
    made = make(w, bits)
    w.float().clamp_(min=0)
    return made


@wrong("9.4", "views what is not contiguous")
def grid(w, bits):
    return make(w.view(-1).view(w.shape), bits)


@alternative("9.4", "times the reciprocal of the scale")
def grid(w, bits):
    scale, _ = make(w, bits)
    first, last = ends(bits)
    return scale, (first - w.float().amin(1).clamp(max=0) * scale.reciprocal()).round().clamp(first, last).int()


@alternative("9.4", "the zero point from the upper end; 0 for rows of zeros")
def grid(w, bits):
    scale, _ = make(w, bits)
    zero = (ends(bits)[1] - w.float().amax(1).clamp(min=0) / scale).round()
    return scale, zero.masked_fill(~w.any(1), 0).int()


# ---- 9.5 ------------------------------------------------------------------------------------------------------------


def fake(w, bits, group, what=""):
    first, last = ends(bits)
    if what != "no error" and w.shape[-1] % group:
        raise ValueError("group: expected a divisor of the row length")
    if what == "no error":
        group = math.gcd(group, w.shape[-1])
    x = w if what == "half" else w.float()
    if what == "one row":
        x = x.reshape(1, -1)
    if what == "view":
        x = x.view(-1, group)
    elif what == "down the rows" and x.dim() == 2 and len(x) % group == 0:
        x = x.t().unflatten(-1, (-1, group))
    elif what == "interleaved":
        x = x.unflatten(-1, (group, -1)).transpose(-1, -2)
    else:
        x = x.unflatten(-1, (-1, group))
    largest = x.amax(-1, keepdim=True) if what == "no abs" else x.abs().amax(-1, keepdim=True)
    if what == "whole rows":
        largest = largest.amax(-2, keepdim=True)
    half = {"7": last, "8": last + 1}.get(what, (last - first) / 2)
    scale = largest / half
    if what == "epsilon":
        scale = scale + 1e-8
    elif what == "clamped":
        scale = scale.clamp(min=1e-6)
    elif what != "zeros":
        scale = torch.where(scale > 0, scale, 1.0)
    q = x / scale
    if what == "truncates":
        q = q.trunc()
    elif what == "half up":
        q = (q + 0.5).floor()
    elif what == "half away":
        q = q.sign() * (q.abs() + 0.5).floor()
    else:
        q = q.round()
    if what == "narrow":
        q = q.clamp(-last, last)
    elif what == "wide":
        q = q.clamp(first, last + 1)
    else:
        q = q.clamp(first, last)
    out = q * scale
    if what == "interleaved":
        out = out.transpose(-1, -2)
    if what == "down the rows" and w.dim() == 2 and len(w) % group == 0:
        return out.flatten(-2).t().to(w.dtype)
    return out.reshape(w.shape) if what == "fp32" else out.reshape(w.shape).to(w.dtype)


def _fakes():
    names = {
        "7": "max|w| over 7: the lowest integer is never used",
        "8": "max|w| over 8",
        "no abs": "the largest number instead of the largest size",
        "whole rows": "one scale a row",
        "one row": "groups across all rows of a tensor that they do not fill",
        "interleaved": "every n-th number instead of neighbors",
        "down the rows": "groups down the rows",
        "truncates": "cuts instead of rounding",
        "half up": "ties up",
        "half away": "ties away from zero",
        "narrow": "cut to -7 ... 7",
        "wide": "cut to -8 ... 8",
        "zeros": "0 / 0 in a group of zeros",
        "epsilon": "adds 1e-8 to the scale",
        "clamped": "scales of 1e-6 or more",
        "half": "computes in w's dtype",
        "fp32": "returns fp32",
        "view": "views what is not contiguous",
        "no error": "finds other groups where they do not fill a row",
    }
    for what, words in names.items():
        if what == "one row":
            continue

        def fake_quantize(w, bits, group, what=what):
            return fake(w, bits, group, what)

        wrong("9.5", words)(fake_quantize)


_fakes()


@wrong("9.5", "lets torch's RuntimeError say that groups do not fill a row")
def fake_quantize(w, bits, group):
    return fake(w, bits, group) if w.shape[-1] % group == 0 else w.unflatten(-1, (-1, group))


@wrong("9.5", "asks that groups fill the tensor, not the row")
def fake_quantize(w, bits, group):
    if w.numel() % group:
        raise ValueError("group: does not fill w")
    return fake(w.reshape(1, -1), bits, group).reshape(w.shape)


@wrong("9.5", "only for two dimensions: flattens the rest")
def fake_quantize(w, bits, group):
    rows = [fake(row[None], bits, group) for row in w]
    return torch.cat(rows)


@wrong("9.5", "rounds in place")
def fake_quantize(w, bits, group):
    return w.copy_(fake(w, bits, group))


@wrong("9.5", "returns integers")
def fake_quantize(w, bits, group):
    first, last = ends(bits)
    x = w.float().unflatten(-1, (-1, group))
    scale = x.abs().amax(-1, keepdim=True) / ((last - first) / 2)
    return (x / torch.where(scale > 0, scale, 1.0)).round().clamp(first, last).reshape(w.shape)


@alternative("9.5", "reshaped to two dimensions, the scale of zeros clamped to the smallest float")
def fake_quantize(w, bits, group):
    if w.shape[-1] % group:
        raise ValueError("group: does not fill a row")
    x = w.to(torch.float32).contiguous().reshape(-1, group)
    half = (2**bits - 1) / 2
    scale = (x.abs().max(dim=1, keepdim=True).values / half).clamp(min=torch.finfo(torch.float32).tiny)
    q = torch.clamp(torch.round(x / scale), -half - 0.5, half - 0.5)
    return (q * scale).view(w.shape).to(w.dtype)


@alternative("9.5", "with repeated scales")
def fake_quantize(w, bits, group):
    if w.shape[-1] % group != 0:
        raise ValueError("group: does not fill a row")
    x, (first, last) = w.float(), ends(bits)
    scale = torch.stack([part.abs().amax(-1) for part in x.split(group, -1)], -1) * 2 / (last - first)
    scale = scale.masked_fill(scale == 0, 1.0).repeat_interleave(group, -1)
    return ((x / scale).round().clamp(first, last) * scale).to(w.dtype)


@wrong("9.5", "computes in fp64")
def fake_quantize(w, bits, group):
    if w.shape[-1] % group:
        raise ValueError("group: does not fill a row")
    first, last = ends(bits)
    x = w.double().unflatten(-1, (-1, group))
    scale = x.abs().amax(-1, keepdim=True) / ((last - first) / 2)
    return ((x / torch.where(scale > 0, scale, 1.0)).round().clamp(first, last) * scale).reshape(w.shape).to(w.dtype)


@wrong("9.5", "returns fp32 for fp64")
def fake_quantize(w, bits, group):
    return fake(w, bits, group, "fp32" if w.dtype == torch.float64 else "")


@wrong("9.5", "scale 1 below 1e-20")
def fake_quantize(w, bits, group):
    return torch.where(w.abs() < 1e-20, 0.0, fake(w, bits, group)).to(w.dtype)


@wrong("9.5", "views three dimensions as two")
def fake_quantize(w, bits, group):
    return fake(w.view(-1, w.shape[-1]), bits, group).view(w.shape)


def _in_place():
    branches = {
        "a group is a row": lambda w, group: group == w.shape[-1],
        "w has one dimension": lambda w, group: w.dim() == 1,
        "w is transposed": lambda w, group: not w.is_contiguous(),
        "w is fp16": lambda w, group: w.dtype == torch.float16,
        "w is fp64": lambda w, group: w.dtype == torch.float64,
    }
    for words, here in branches.items():

        def fake_quantize(w, bits, group, here=here):
            out = fake(w, bits, group)
            if here(w, group):
                w.copy_(out)
            return out

        wrong("9.5", f"in place where {words}")(fake_quantize)


_in_place()


@wrong("9.5", "hands zeros back as they came")
def fake_quantize(w, bits, group):
    return fake(w, bits, group) if w.any() or w.shape[-1] % group else w


@alternative("9.5", "cut first, then rounded; never below the first integer anyway")
def fake_quantize(w, bits, group):
    if w.shape[-1] % group:
        raise ValueError("group: does not fill a row")
    out = torch.empty(w.shape, dtype=w.dtype)
    for begin in range(0, w.shape[-1], group):
        x = w[..., begin : begin + group].float()
        scale = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
        scale = scale + (scale == 0)
        out[..., begin : begin + group] = (x / scale).clamp(max=ends(bits)[1]).round() * scale
    return out


@alternative("9.5", "times the reciprocal of the scale")
def fake_quantize(w, bits, group):
    if w.shape[-1] % group:
        raise ValueError("group: does not fill a row")
    x = w.float().reshape(-1, group)
    scale = x.abs().amax(1, keepdim=True) / (2**bits - 1) * 2
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return ((x * inverse).round().clamp(*ends(bits)) * scale).reshape(w.shape).type_as(w)


# ---- 9.6 ------------------------------------------------------------------------------------------------------------


class RightInt4:
    SHIFTS = tuple(range(0, 32, 4))
    OFFSET, FILL = 8, 0

    @classmethod
    def pack(cls, q):
        if bool(((q < -8) | (q > 7)).any()):
            raise ValueError("q: expected -8 to 7")
        return cls._pack(q)

    @classmethod
    def _pack(cls, q):
        digits = q.long() + cls.OFFSET
        rest = torch.full((len(q), -q.shape[1] % 8), cls.FILL, dtype=torch.int64)
        digits = (torch.cat((digits, rest), dim=1) & 15).reshape(len(q), -(-q.shape[1] // 8), 8)
        words = (digits << torch.tensor(cls.SHIFTS)).sum(-1)
        return torch.where(words < 2**31, words, words - 2**32).int()

    @classmethod
    def unpack(cls, words, k):
        digits = (words.long()[..., None] >> torch.tensor(cls.SHIFTS)) & 15
        return (digits.flatten(1)[:, :k] - cls.OFFSET).to(torch.int8)


@alternative("9.6", "bytes first: two numbers a byte, four bytes a word by a view")
class Int4(RightInt4):
    @classmethod
    def _pack(cls, q):
        padded = torch.zeros(len(q), -(-q.shape[1] // 8) * 8, dtype=torch.uint8)
        padded[:, : q.shape[1]] = (q + 8).to(torch.uint8)
        both = padded[:, 0::2] | (padded[:, 1::2] << 4)
        return both.contiguous().view(torch.int32)

    @classmethod
    def unpack(cls, words, k):
        data = words.contiguous().view(torch.uint8)
        return (torch.stack((data & 15, data >> 4), -1).flatten(1)[:, :k].to(torch.int16) - 8).to(torch.int8)


@wrong("9.6", "the first number in the highest bits")
class Int4(RightInt4):
    SHIFTS = tuple(range(28, -4, -4))


@wrong("9.6", "AWQ's order")
class Int4(RightInt4):
    SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


@wrong("9.6", "packs two's complement")
class Int4(RightInt4):
    @classmethod
    def _pack(cls, q):
        return super()._pack(q - 8)


@wrong("9.6", "unpacks two's complement")
class Int4(RightInt4):
    @classmethod
    def unpack(cls, words, k):
        q = super().unpack(words, k)
        return torch.where(q >= 0, q - 8, q + 8)


@wrong("9.6", "fills the last word with zeros of the numbers instead of bits")
class Int4(RightInt4):
    FILL = 8


@wrong("9.6", "int64 words")
class Int4(RightInt4):
    @classmethod
    def _pack(cls, q):
        return super()._pack(q).long() & 0xFFFFFFFF


@wrong("9.6", "unpacks by shifts without a mask")
class Int4(RightInt4):
    @classmethod
    def unpack(cls, words, k):
        digits = words[..., None] >> torch.tensor(cls.SHIFTS, dtype=torch.int32)
        return (digits.flatten(1)[:, :k] - 8).to(torch.int8)


@wrong("9.6", "saturates where the sign bit would be set")
class Int4(RightInt4):
    @classmethod
    def _pack(cls, q):
        return (super()._pack(q).long() & 0xFFFFFFFF).clamp(max=2**31 - 1).int()


@wrong("9.6", "drops the last, incomplete word")
class Int4(RightInt4):
    @classmethod
    def _pack(cls, q):
        return super()._pack(q[:, : q.shape[1] // 8 * 8])


@wrong("9.6", "unpacks all numbers of the words")
class Int4(RightInt4):
    @classmethod
    def unpack(cls, words, k):
        return super().unpack(words, 8 * words.shape[1])


@wrong("9.6", "unpacks to int32")
class Int4(RightInt4):
    @classmethod
    def unpack(cls, words, k):
        return super().unpack(words, k).int()


@wrong("9.6", "unpacks to 0 ... 15")
class Int4(RightInt4):
    @classmethod
    def unpack(cls, words, k):
        return super().unpack(words, k) + 8


@wrong("9.6", "packs numbers that are too large")
class Int4(RightInt4):
    @classmethod
    def pack(cls, q):
        return cls._pack(q)


@wrong("9.6", "looks at the upper limit alone")
class Int4(RightInt4):
    @classmethod
    def pack(cls, q):
        if bool((q > 7).any()):
            raise ValueError("q: too large")
        return cls._pack(q)


@wrong("9.6", "looks at the largest size alone: -8 is refused or 8 taken")
class Int4(RightInt4):
    @classmethod
    def pack(cls, q):
        if q.numel() and int(q.int().abs().max()) > 8:
            raise ValueError("q: too large")
        return cls._pack(q)


@wrong("9.6", "needs a row to find the limits")
class Int4(RightInt4):
    @classmethod
    def pack(cls, q):
        if q.min() < -8 or q.max() > 7:
            raise ValueError("q: expected -8 to 7")
        return cls._pack(q)


@wrong("9.6", "adds the offset in place")
class Int4(RightInt4):
    @classmethod
    def _pack(cls, q):
        words = super()._pack(q)
        q += 8
        return words


@wrong("9.6", "shifts the words in place")
class Int4(RightInt4):
    @classmethod
    def unpack(cls, words, k):
        q = super().unpack(words, k)
        words >>= 4
        return q


@wrong("9.6", "packs down the rows, as GPTQ does")
class Int4(RightInt4):
    @classmethod
    def _pack(cls, q):
        return super()._pack(q.t()).t()


def _checks():
    parts = {
        "the last row": lambda q: q[-1:],
        "the first word": lambda q: q[:, :8],
        "full words": lambda q: q[:, : q.shape[1] // 8 * 8],
        "the first row": lambda q: q[:1],
    }
    for words, part in parts.items():

        class Int4(RightInt4):
            PART = staticmethod(part)

            @classmethod
            def pack(cls, q):
                some = cls.PART(q)
                if bool(((some < -8) | (some > 7)).any()):
                    raise ValueError("q: expected -8 to 7")
                return cls._pack(q)

        wrong("9.6", f"looks for numbers that are too large in {words} alone")(Int4)


_checks()


@wrong("9.6", "adds the offset in place where the last word is not full")
class Int4(RightInt4):
    @classmethod
    def _pack(cls, q):
        words = super()._pack(q)
        if q.shape[1] % 8:
            q += 8
        return words


@wrong("9.6", "a vector for one row")
class Int4(RightInt4):
    @classmethod
    def unpack(cls, words, k):
        return super().unpack(words, k).squeeze(0)


@wrong("9.6", "a vector for one number a row")
class Int4(RightInt4):
    @classmethod
    def unpack(cls, words, k):
        return super().unpack(words, k).squeeze(1)


@wrong("9.6", "leaves out rows that pack to zeros")
class Int4(RightInt4):
    @classmethod
    def _pack(cls, q):
        words = super()._pack(q)
        return words[words.any(1)] if len(words) else words


@wrong("9.6", "packs views alone")
class Int4(RightInt4):
    @classmethod
    def _pack(cls, q):
        return super()._pack(q.view(-1).view(q.shape))


@wrong("9.6", "unpacks the order of memory")
class Int4(RightInt4):
    @classmethod
    def unpack(cls, words, k):
        return super().unpack(words.as_strided(words.shape, (words.shape[1], 1)), k)


@alternative("9.6", "a loop over the eight places, in int32")
class Int4(RightInt4):
    @classmethod
    def _pack(cls, q):
        words = torch.zeros(len(q), -(-q.shape[1] // 8), dtype=torch.int32)
        for i in range(8):
            part = q[:, i::8].int() + 8
            words[:, : part.shape[1]] |= part << 4 * i
        return words

    @classmethod
    def unpack(cls, words, k):
        q = torch.empty(len(words), words.shape[1] * 8, dtype=torch.int8)
        for i in range(8):
            q[:, i::8] = ((words >> 4 * i) & 15) - 8
        return q[:, :k]


@alternative("9.6", "a product with powers of 16, in fp64")
class Int4(RightInt4):
    @classmethod
    def _pack(cls, q):
        digits = torch.nn.functional.pad(q.double() + 8, (0, -q.shape[1] % 8))
        powers = 16.0 ** torch.arange(8, dtype=torch.float64)
        return (digits.unflatten(1, (-(-q.shape[1] // 8), 8)) @ powers).long().to(torch.int32)


# ---- 9.7 ------------------------------------------------------------------------------------------------------------


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, scale, bits):
        ctx.save_for_backward(w, scale)
        ctx.limits = ends(bits)
        return (w / scale).round().clamp(*ctx.limits) * scale

    @staticmethod
    def backward(ctx, grad):
        w, scale = ctx.saved_tensors
        first, last = ctx.limits
        x = w / scale
        inside = (x >= first) & (x <= last)
        slope = torch.where(inside, x.round() - x, x.clamp(first, last))
        return grad * inside, (grad * slope).sum(1, keepdim=True), None


@alternative("9.7", "an autograd.Function")
def fake_quantize_ste(w, scale, bits):
    return Function.apply(w, scale, bits)


@alternative("9.7", "torch.where for the limits")
def fake_quantize_ste(w, scale, bits):
    first, last = ends(bits)
    x = w / scale
    rounded = x + (torch.round(x) - x).detach()
    cut = torch.where(x > last, float(last), torch.where(x < first, float(first), rounded))
    return cut * scale


@wrong("9.7", "no estimator: round has slope 0")
def fake_quantize_ste(w, scale, bits):
    return (w / scale).round().clamp(*ends(bits)) * scale


@wrong("9.7", "no gradient at all")
def fake_quantize_ste(w, scale, bits):
    return ((w / scale).round().clamp(*ends(bits)) * scale).detach()


@wrong("9.7", "straight through, cut numbers included")
def fake_quantize_ste(w, scale, bits):
    out = (w / scale).round().clamp(*ends(bits)) * scale
    return w + (out - w).detach()


@wrong("9.7", "the scale gets no gradient")
def fake_quantize_ste(w, scale, bits):
    x = (w / scale.detach()).clamp(*ends(bits))
    return (x + (x.round() - x).detach()) * scale.detach()


@wrong("9.7", "the scale as a plain factor: the slope is round(x)")
def fake_quantize_ste(w, scale, bits):
    x = (w / scale.detach()).clamp(*ends(bits))
    return (x + (x.round() - x).detach()) * scale


@wrong("9.7", "the scale through the division alone")
def fake_quantize_ste(w, scale, bits):
    x = (w / scale).clamp(*ends(bits))
    return (x + (x.round() - x).detach()) * scale.detach()


@wrong("9.7", "does not cut")
def fake_quantize_ste(w, scale, bits):
    x = w / scale
    return (x + (x.round() - x).detach()) * scale


@wrong("9.7", "cuts to a symmetric range")
def fake_quantize_ste(w, scale, bits):
    x = (w / scale).clamp(-ends(bits)[1], ends(bits)[1])
    return (x + (x.round() - x).detach()) * scale


@wrong("9.7", "the limits count as outside")
def fake_quantize_ste(w, scale, bits):
    class Open(Function):
        @staticmethod
        def backward(ctx, grad):
            w, scale = ctx.saved_tensors
            first, last = ctx.limits
            x = w / scale
            inside = (x > first) & (x < last)
            slope = torch.where(inside, x.round() - x, x.clamp(first, last))
            return grad * inside, (grad * slope).sum(1, keepdim=True), None

    return Open.apply(w, scale, bits)


@wrong("9.7", "inside is what rounds to an integer inside")
def fake_quantize_ste(w, scale, bits):
    class Rounded(Function):
        @staticmethod
        def backward(ctx, grad):
            w, scale = ctx.saved_tensors
            first, last = ctx.limits
            x = w / scale
            inside = (x.round() >= first) & (x.round() <= last)
            slope = torch.where(inside, x.round() - x, x.clamp(first, last))
            return grad * inside, (grad * slope).sum(1, keepdim=True), None

    return Rounded.apply(w, scale, bits)


@wrong("9.7", "the gradient of w times the scale")
def fake_quantize_ste(w, scale, bits):
    class Scaled(Function):
        @staticmethod
        def backward(ctx, grad):
            of_w, of_scale, _ = Function.backward(ctx, grad)
            return of_w * ctx.saved_tensors[1], of_scale, None

    return Scaled.apply(w, scale, bits)


@wrong("9.7", "ignores the gradient that comes from above")
def fake_quantize_ste(w, scale, bits):
    class Ones(Function):
        @staticmethod
        def backward(ctx, grad):
            return Function.backward(ctx, torch.ones_like(grad))

    return Ones.apply(w, scale, bits)


@wrong("9.7", "x - round(x): the scale moves the wrong way")
def fake_quantize_ste(w, scale, bits):
    class Turned(Function):
        @staticmethod
        def backward(ctx, grad):
            of_w, of_scale, _ = Function.backward(ctx, grad)
            return of_w, -of_scale, None

    return Turned.apply(w, scale, bits)


@wrong("9.7", "the mean over the row instead of the sum")
def fake_quantize_ste(w, scale, bits):
    class Mean(Function):
        @staticmethod
        def backward(ctx, grad):
            of_w, of_scale, _ = Function.backward(ctx, grad)
            return of_w, of_scale / grad.shape[1], None

    return Mean.apply(w, scale, bits)


@wrong("9.7", "one more bit")
def fake_quantize_ste(w, scale, bits):
    return Function.apply(w, scale, bits + 1)


@wrong("9.7", "rounds in fp32 whatever comes")
def fake_quantize_ste(w, scale, bits):
    return Function.apply(w.float(), scale.float(), bits)


@wrong("9.7", "divides w in place")
def fake_quantize_ste(w, scale, bits):
    out = Function.apply(w, scale, bits)
    w.data.div_(scale.data * 2)
    return out


def ste(w, scale, bits):
    x = (w / scale).clamp(*ends(bits))
    return (x + (x.round() - x).detach()) * scale


@wrong("9.7", "computes in fp32, returns w's dtype")
def fake_quantize_ste(w, scale, bits):
    return Function.apply(w.float(), scale.float(), bits).to(w.dtype)


@wrong("9.7", "computes in fp64 and returns it")
def fake_quantize_ste(w, scale, bits):
    return Function.apply(w.double(), scale.double(), bits)


@wrong("9.7", "rounds what fp16 holds of the quotient")
def fake_quantize_ste(w, scale, bits):
    x = (w / scale).clamp(*ends(bits))
    return (x + (x.half().round().to(x.dtype) - x).detach()) * scale


@wrong("9.7", "no scale below 1e-8")
def fake_quantize_ste(w, scale, bits):
    return ste(w, scale.clamp(min=1e-8), bits)


@wrong("9.7", "adds 1e-8 to the scale")
def fake_quantize_ste(w, scale, bits):
    return ste(w, scale + 1e-8, bits)


@wrong("9.7", "multiplies by the reciprocal: ties fall elsewhere")
def fake_quantize_ste(w, scale, bits):
    x = (w * (1 / scale)).clamp(*ends(bits))
    return (x + (x.round() - x).detach()) * scale


@wrong("9.7", "not exactly: w is added and taken off again")
def fake_quantize_ste(w, scale, bits):
    return w.detach() + (ste(w, scale, bits) - w.detach())


@wrong("9.7", "ties away from zero")
def fake_quantize_ste(w, scale, bits):
    x = (w / scale).clamp(*ends(bits))
    return (x + (x.sign() * (x.abs() + 0.5).floor() - x).detach()) * scale


@wrong("9.7", "8 bits as 7")
def fake_quantize_ste(w, scale, bits):
    return ste(w, scale, min(bits, 7))


@wrong("9.7", "raises small scales in place")
def fake_quantize_ste(w, scale, bits):
    scale.data.clamp_(min=1e-8)
    return ste(w, scale, bits)


@wrong("9.7", "cuts large weights in place")
def fake_quantize_ste(w, scale, bits):
    w.data.clamp_(-1000, 1000)
    return ste(w, scale, bits)


@wrong("9.7", "a little gradient for cut numbers")
def fake_quantize_ste(w, scale, bits):
    return ste(w, scale, bits) + 0.001 * (w - w.detach())


@wrong("9.7", "views what is not contiguous")
def fake_quantize_ste(w, scale, bits):
    return ste(w.view(-1).view(w.shape), scale, bits)


@alternative("9.7", "a Function that rounds and passes the gradient")
def fake_quantize_ste(w, scale, bits):
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, grad):
            return grad

    return Round.apply(torch.clip(w / scale, *ends(bits))) * scale


@alternative("9.7", "the integers, and a zero that has the gradient")
def fake_quantize_ste(w, scale, bits):
    first, last = ends(bits)
    x = w / scale
    soft = torch.where((x >= first) & (x <= last), x, x.detach())
    return (x.detach().round().clamp(first, last) + (soft - soft.detach())) * scale


# ---- 9.8 ------------------------------------------------------------------------------------------------------------


class RightCodec:
    """As the format says; what subclasses change is what can be wrong."""

    UP, HALF, SHIFT = tuple(range(0, 32, 4)), 7.5, 0
    READ_UP, READ_SHIFT, OFFSET = UP, 0, 8

    @classmethod
    def grid(cls, groups, symmetric):
        if symmetric:
            scale = groups.abs().amax(-1) / cls.HALF
            return scale, torch.zeros_like(scale)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (high - low) / 15
        return scale, (-8 - low / scale).round().clamp(-8, 7)

    @classmethod
    def write(cls, w, group, symmetric):
        groups = w.unflatten(1, (-1, group))
        scale, zero = cls.grid(groups, symmetric)
        q = ((groups / scale[..., None]).round() + zero[..., None]).clamp(-8, 7).long().flatten(1) + 8
        words = (q.unflatten(1, (-1, 8)) << torch.tensor(cls.UP)).sum(-1)
        file = {"packed": torch.where(words < 2**31, words, words - 2**32).int(), "scale": scale}
        if not symmetric:
            file["zero"] = (zero + cls.SHIFT).int()
        return file

    @classmethod
    def read(cls, file, group):
        q = ((file["packed"].long()[..., None] >> torch.tensor(cls.READ_UP)) & 15).flatten(1) - cls.OFFSET
        zero = file["zero"] + cls.READ_SHIFT if "zero" in file else torch.zeros_like(file["scale"])
        return ((q.unflatten(1, (-1, group)) - zero[..., None]) * file["scale"][..., None]).flatten(1)


DOWN = tuple(range(28, -4, -4))


@alternative("9.8", "small methods")
class Mended(RightCodec):
    pass


@wrong("9.8", "as it was")
class Mended(RightCodec):
    HALF, SHIFT, UP, READ_UP = 7, -1, DOWN, DOWN


@wrong("9.8", "still divides by 7")
class Mended(RightCodec):
    HALF = 7


@wrong("9.8", "divides by 8")
class Mended(RightCodec):
    HALF = 8


@wrong("9.8", "still stores zero - 1")
class Mended(RightCodec):
    SHIFT = -1


@wrong("9.8", "stores zero - 1 and adds 1 on reading: right for its own files alone")
class Mended(RightCodec):
    SHIFT, READ_SHIFT = -1, 1


@wrong("9.8", "still from the highest bits down, both ways")
class Mended(RightCodec):
    UP, READ_UP = DOWN, DOWN


@wrong("9.8", "the writer's order mended, the reader's not")
class Mended(RightCodec):
    READ_UP = DOWN


@wrong("9.8", "the reader's order mended, the writer's not")
class Mended(RightCodec):
    UP = DOWN


@wrong("9.8", "mends a half: reads 7 levels below 0")
class Mended(RightCodec):
    OFFSET = 7


@wrong("9.8", "the asymmetric range does not hold 0")
class Mended(RightCodec):
    @classmethod
    def grid(cls, groups, symmetric):
        if symmetric:
            return super().grid(groups, symmetric)
        scale = (groups.amax(-1) - groups.amin(-1)) / 15
        return scale, (-8 - groups.amin(-1) / scale).round().clamp(-8, 7)


@wrong("9.8", "one scale a row")
class Mended(RightCodec):
    @classmethod
    def grid(cls, groups, symmetric):
        scale, zero = super().grid(groups.flatten(1)[:, None], symmetric)
        return scale.expand(-1, groups.shape[1]).clone(), zero.expand(-1, groups.shape[1]).clone()


@wrong("9.8", "stores a zero point where there is none")
class Mended(RightCodec):
    @classmethod
    def write(cls, w, group, symmetric):
        file = super().write(w, group, symmetric)
        return file | {"zero": file.get("zero", torch.zeros_like(file["scale"]).int())}


@wrong("9.8", "reads symmetric files alone")
class Mended(RightCodec):
    @classmethod
    def read(cls, file, group):
        return super().read({name: file[name] for name in ("packed", "scale")}, group)


@wrong("9.8", "reads asymmetric files alone")
class Mended(RightCodec):
    @classmethod
    def read(cls, file, group):
        return super().read(file | {"zero": file["zero"]}, group)


def rounds(mistake):
    class Mended(RightCodec):
        @classmethod
        def write(cls, w, group, symmetric):
            groups = w.unflatten(1, (-1, group))
            scale, zero = cls.grid(groups, symmetric)
            file = super().write(w, group, symmetric)
            q = mistake(groups / scale[..., None], zero[..., None]).clamp(-8, 7).long().flatten(1) + 8
            words = (q.unflatten(1, (-1, 8)) << torch.tensor(cls.UP)).sum(-1)
            return file | {"packed": words.to(torch.int32)}

    return Mended


wrong("9.8", "adds the zero point before it rounds")(rounds(lambda x, z: (x + z).round()))
wrong("9.8", "weights' ties away from zero")(rounds(lambda x, z: x.sign() * (x.abs() + 0.5).floor() + z))
wrong("9.8", "weights' ties up")(rounds(lambda x, z: (x + 0.5).floor() + z))
wrong("9.8", "never the lowest integer if symmetric")(rounds(lambda x, z: (x.round() + z).clamp(min=-7 - 99 * z.any())))


def zeros(mistake):
    class Mended(RightCodec):
        @classmethod
        def grid(cls, groups, symmetric):
            scale, zero = super().grid(groups, symmetric)
            if symmetric:
                return scale, zero
            return scale, mistake(-8 - groups.amin(-1).clamp(max=0) / scale).clamp(-8, 7)

    return Mended


wrong("9.8", "zero points' ties up")(zeros(lambda z: (z + 0.5).floor()))
wrong("9.8", "zero points' ties away from zero")(zeros(lambda z: z.sign() * (z.abs() + 0.5).floor()))


@wrong("9.8", "takes it that groups fill words")
class Mended(RightCodec):
    @classmethod
    def write(cls, w, group, symmetric):
        return super().write(w, group if group % 8 == 0 else 8, symmetric)


@wrong("9.8", "views what is not contiguous")
class Mended(RightCodec):
    @classmethod
    def write(cls, w, group, symmetric):
        return super().write(w.view(-1).view(w.shape), group, symmetric)


def eats(words, what):
    class Mended(RightCodec):
        @classmethod
        def read(cls, file, group):
            w = super().read(file, group)
            what(file)
            return w

    wrong("9.8", words)(Mended)


eats("takes the zero point out of the file", lambda file: file.pop("zero", None))
eats("adds a zero point to the file", lambda file: file.setdefault("zero", torch.zeros_like(file["scale"]).int()))
eats("shifts the words in place", lambda file: file["packed"].bitwise_right_shift_(4))
eats("doubles the scale in place", lambda file: file["scale"].mul_(2))


@wrong("9.8", "divides w in place")
class Mended(RightCodec):
    @classmethod
    def write(cls, w, group, symmetric):
        file = super().write(w, group, symmetric)
        w.div_(file["scale"].repeat_interleave(group, 1))
        return file


@wrong("9.8", "reads groups of words: three axes")
class Mended(RightCodec):
    @classmethod
    def read(cls, file, group):
        return super().read(file, group).unflatten(1, (-1, group))


@alternative("9.8", "bytes first, zero points from the upper end, scales repeated")
class Mended:
    @staticmethod
    def write(w, group, symmetric):
        x = w.reshape(len(w), -1, group)
        largest = x.abs().amax(2)
        low, high = (-largest, largest) if symmetric else (x.amin(2).clamp(max=0), x.amax(2).clamp(min=0))
        scale = (high - low) / 15
        zero = torch.zeros_like(scale) if symmetric else (7 - high / scale).round()
        q = (torch.round(x / scale[..., None]) + zero[..., None]).clamp(-8, 7).reshape(w.shape)
        nibbles = (q + 8).to(torch.uint8)
        file = {"scale": scale, "packed": (nibbles[:, ::2] | nibbles[:, 1::2] << 4).contiguous().view(torch.int32)}
        return file if symmetric else {**file, "zero": zero.to(torch.int32)}

    @staticmethod
    def read(file, group):
        data = file["packed"].contiguous().view(torch.uint8)
        q = torch.stack((data & 15, data >> 4), -1).flatten(1).float() - 8
        if "zero" in file:
            q -= file["zero"].repeat_interleave(group, 1)
        return q * file["scale"].repeat_interleave(group, 1)
