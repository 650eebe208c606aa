"""Wrong and alternative implementations for the exercises of chapter 10: they keep the checks honest."""

import math
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from minillm.kernels.common import tl, triton
from minillm.learn.testing import alternative, wrong

# ---- 10.1


RIGHT = [[2, 1], [1, 1]], 0.65, 0.7, 0.25, 0.45


def answer(**changes):
    names = ("h", "nearest", "moves", "loss", "other")
    found = dict(zip(names, RIGHT, strict=True)) | changes
    return lambda: tuple(found[name] for name in names)


for changes, why in (
    ({"h": [[1, 0.5], [0.5, 0.5]]}, "the mean instead of the sum"),
    ({"h": [[1, 1], [1, 2]]}, "the weights exchanged"),
    ({"h": [[1, 0], [1, 1]]}, "the inputs themselves"),
    ({"h": [[2, 0], [0, 1]]}, "the diagonal alone"),
    ({"nearest": 0.25}, "the sum of the weights' squared errors"),
    ({"nearest": 0.41}, "inputs' squares times weights' squared errors, no product between"),
    ({"nearest": 0.325}, "the mean loss"),
    ({"moves": -0.1}, "the second weight moves the wrong way"),
    ({"moves": 0.5}, "the second weight takes half of the error"),
    ({"moves": 0.3}, "the second weight stays"),
    ({"moves": 1.0}, "the number that it is rounded to"),
    ({"loss": 0.09}, "the second output's loss alone"),
    ({"loss": 0.65}, "the loss of rounding to the nearest"),
    ({"loss": 0.41}, "the error counts from where the weight had moved, not from the original"),
    ({"other": 0.25}, "the same in both orders"),
    ({"other": 0.65}, "the first weight stays in the other order"),
    ({"other": 0.09}, "the error of the moved weight"),
):
    wrong("10.1", why)(answer(**changes))


@alternative("10.1", "computed")
def by_hand():
    x, w = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([0.4, 0.3])
    h = x.T @ x
    losses = [float((x @ (w - torch.tensor(q))).square().sum()) for q in ([0.0, 0.0], [0.0, 1.0], [1.0, 0.0])]
    return h.tolist(), losses[0], 0.3 + 0.4 * float(h[1, 0] / h[1, 1]), losses[1], losses[2]


# ---- 10.2


def words(count):
    return math.ceil(count / 8)


@alternative("10.2", "in bytes")
def bits_per_weight(n, k, group, zeros, order):
    groups = k // (group or k)
    data = 4 * n * words(k) + 2 * n * groups + (4 * words(n) * groups if zeros else 0) + (4 * k if order else 0)
    return 8 * data / (n * k)


@wrong("10.2", "by the formula, without words that are not full")
def bits_per_weight(n, k, group, zeros, order):
    group = group or k
    return 4 + (16 + (4 if zeros else 0)) / group + (32 / n if order else 0)


@wrong("10.2", "zero points packed along the rows")
def bits_per_weight(n, k, group, zeros, order):
    groups = k // (group or k)
    bits = 32 * n * words(k) + 16 * n * groups + (32 * n * words(groups) if zeros else 0) + (32 * k if order else 0)
    return bits / (n * k)


@wrong("10.2", "words of weights are rounded down")
def bits_per_weight(n, k, group, zeros, order):
    groups = k // (group or k)
    bits = 32 * n * (k // 8) + 16 * n * groups + (32 * words(n) * groups if zeros else 0) + (32 * k if order else 0)
    return bits / (n * k)


@wrong("10.2", "all weights in one row of words")
def bits_per_weight(n, k, group, zeros, order):
    groups = k // (group or k)
    bits = 32 * words(n * k) + 16 * n * groups + (32 * words(n) * groups if zeros else 0) + (32 * k if order else 0)
    return bits / (n * k)


@wrong("10.2", "all zero points in one row of words")
def bits_per_weight(n, k, group, zeros, order):
    groups = k // (group or k)
    bits = 32 * n * words(k) + 16 * n * groups + (32 * words(n * groups) if zeros else 0) + (32 * k if order else 0)
    return bits / (n * k)


@wrong("10.2", "zero points of 16 bits")
def bits_per_weight(n, k, group, zeros, order):
    groups = k // (group or k)
    return (32 * n * words(k) + 16 * n * groups * (2 if zeros else 1) + (32 * k if order else 0)) / (n * k)


@wrong("10.2", "group 0 has no scale")
def bits_per_weight(n, k, group, zeros, order):
    groups = k // group if group else 0
    bits = 32 * n * words(k) + 16 * n * groups + (32 * words(n) * groups if zeros else 0) + (32 * k if order else 0)
    return bits / (n * k)


@wrong("10.2", "the order for each row")
def bits_per_weight(n, k, group, zeros, order):
    groups = k // (group or k)
    bits = 32 * n * words(k) + 16 * n * groups + (32 * words(n) * groups if zeros else 0) + (32 * n * k if order else 0)
    return bits / (n * k)


@wrong("10.2", "an order of groups, not of columns")
def bits_per_weight(n, k, group, zeros, order):
    groups = k // (group or k)
    bits = 32 * n * words(k) + 16 * n * groups + (32 * words(n) * groups if zeros else 0) + (32 * groups * order)
    return bits / (n * k)


@wrong("10.2", "scales of 32 bits")
def bits_per_weight(n, k, group, zeros, order):
    groups = k // (group or k)
    bits = 32 * n * words(k) + 32 * n * groups + (32 * words(n) * groups if zeros else 0) + (32 * k if order else 0)
    return bits / (n * k)


@wrong("10.2", "each group begins a new word")
def bits_per_weight(n, k, group, zeros, order):
    groups, group = k // (group or k), group or k
    bits = 32 * n * groups * words(group) + 16 * n * groups + (32 * words(n) * groups if zeros else 0)
    return (bits + (32 * k if order else 0)) / (n * k)


@wrong("10.2", "no order where there is one group")
def bits_per_weight(n, k, group, zeros, order):
    groups = k // (group or k)
    bits = 32 * n * words(k) + 16 * n * groups + (32 * words(n) * groups if zeros else 0)
    return (bits + (32 * k if order and groups > 1 else 0)) / (n * k)


# ---- 10.3


class RightHessian:
    """The right one; what subclasses change is what can be wrong."""

    def __init__(self, k):
        self.k, self.sum, self.count = k, torch.zeros(k, k), 0

    @property
    def matrix(self):
        return self.sum / max(self.count, 1)

    def rows(self, x, mask):
        return (x.reshape(-1, self.k) if mask is None else x[mask]).float()

    def add(self, x, mask=None):
        rows = self.rows(x, mask)
        self.sum = self.sum + rows.T @ rows
        self.count += len(rows)


@alternative("10.3", "a sum and a count")
class Hessian(RightHessian):
    pass


@alternative("10.3", "moves the mean, in place, one einsum a batch")
class Hessian:
    def __init__(self, k):
        self.matrix, self.count = torch.zeros((k, k)), 0

    def add(self, x, mask=None):
        x, fresh = x.float(), x.shape[0] * x.shape[1]
        if mask is not None:
            x, fresh = x.masked_fill(~mask[..., None], 0.0), int(mask.sum())
        if fresh:
            self.count += fresh
            self.matrix *= 1 - fresh / self.count
            self.matrix += torch.einsum("bti,btj->ij", x, x) / self.count


@alternative("10.3", "gathers in fp64")
class Hessian(RightHessian):
    def __init__(self, k):
        super().__init__(k)
        self.sum = self.sum.double()

    @property
    def matrix(self):
        return (self.sum / max(self.count, 1)).float()

    def rows(self, x, mask):
        return super().rows(x, mask).double()


@wrong("10.3", "the sum")
class Hessian(RightHessian):
    @property
    def matrix(self):
        return self.sum


@wrong("10.3", "twice the mean, as in the paper")
class Hessian(RightHessian):
    @property
    def matrix(self):
        return 2 * self.sum / max(self.count, 1)


@wrong("10.3", "divides by one token less")
class Hessian(RightHessian):
    @property
    def matrix(self):
        return self.sum / max(self.count - 1, 1)


@wrong("10.3", "the covariance: the mean is taken off")
class Hessian(RightHessian):
    def add(self, x, mask=None):
        rows = self.rows(x, mask)
        if len(rows):
            rows = rows - rows.mean(0)
        self.sum = self.sum + rows.T @ rows
        self.count += len(rows)


@wrong("10.3", "padding counts")
class Hessian(RightHessian):
    def rows(self, x, mask):
        return x.reshape(-1, self.k).float()


@wrong("10.3", "padding is multiplied by 0: NaN stays NaN")
class Hessian(RightHessian):
    def add(self, x, mask=None):
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        rows = (x * mask[..., None]).reshape(-1, self.k).float()
        self.sum = self.sum + rows.T @ rows
        self.count += int(mask.sum())


@wrong("10.3", "padding is 0 and counts in the divisor")
class Hessian(RightHessian):
    def rows(self, x, mask):
        return super().rows(x if mask is None else x.masked_fill(~mask[..., None], 0), None)


@wrong("10.3", "the mask the other way around")
class Hessian(RightHessian):
    def rows(self, x, mask):
        return super().rows(x, None if mask is None else ~mask)


@wrong("10.3", "takes padding for a suffix")
class Hessian(RightHessian):
    def rows(self, x, mask):
        if mask is not None:
            mask = torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)
        return super().rows(x, mask)


@wrong("10.3", "leaves out tokens that are not finite instead of padding")
class Hessian(RightHessian):
    def rows(self, x, mask):
        rows = x.reshape(-1, self.k).float()
        return rows[rows.isfinite().all(1)]


@wrong("10.3", "a mean of means")
class Hessian(RightHessian):
    def add(self, x, mask=None):
        rows = self.rows(x, mask)
        if len(rows):
            self.sum = self.sum + rows.T @ rows / len(rows)
            self.count += 1


@wrong("10.3", "counts sequences, as the first code does")
class Hessian(RightHessian):
    def add(self, x, mask=None):
        rows = self.rows(x, mask)
        if len(rows):
            self.sum = self.sum + rows.T @ rows
            self.count += len(x)


@wrong("10.3", "counts places, padding included, between batches")
class Hessian(RightHessian):
    def add(self, x, mask=None):
        rows, places = self.rows(x, mask), x.shape[0] * x.shape[1]
        if len(rows):
            mean = rows.T @ rows / len(rows)
            self.sum = self.sum + mean * places
            self.count += places


@wrong("10.3", "the last batch alone")
class Hessian(RightHessian):
    def add(self, x, mask=None):
        rows = self.rows(x, mask)
        if len(rows):
            self.sum, self.count = rows.T @ rows, len(rows)


@wrong("10.3", "an exponential mean")
class Hessian(RightHessian):
    def add(self, x, mask=None):
        rows = self.rows(x, mask)
        if len(rows):
            mean = rows.T @ rows / len(rows)
            self.sum, self.count = (0.9 * self.sum + 0.1 * mean if self.count else mean), 1


@wrong("10.3", "a batch of padding gives NaN")
class Hessian:
    def __init__(self, k):
        self.matrix, self.count = torch.zeros(k, k), 0

    def add(self, x, mask=None):
        rows = (x.flatten(0, 1) if mask is None else x[mask]).float()
        self.count += len(rows)
        self.matrix = self.matrix.lerp(rows.T @ rows / len(rows), len(rows) / max(self.count, 1))


@wrong("10.3", "NaN before anything was seen")
class Hessian(RightHessian):
    @property
    def matrix(self):
        return self.sum / self.count


@wrong("10.3", "the diagonal alone")
class Hessian(RightHessian):
    @property
    def matrix(self):
        return torch.diag(super().matrix.diagonal())


@wrong("10.3", "products in the dtype of x")
class Hessian(RightHessian):
    def add(self, x, mask=None):
        rows = x.flatten(0, 1) if mask is None else x[mask]
        self.sum = self.sum + (rows.T @ rows).float()
        self.count += len(rows)


@wrong("10.3", "a matrix in the dtype of x")
class Hessian(RightHessian):
    dtype = torch.float32

    def add(self, x, mask=None):
        super().add(x, mask)
        self.dtype = x.dtype

    @property
    def matrix(self):
        return super().matrix.to(self.dtype)


@wrong("10.3", "a matrix in fp64")
class Hessian(RightHessian):
    @property
    def matrix(self):
        return super().matrix.double()


@wrong("10.3", "x xᵀ: tokens instead of channels")
class Hessian(RightHessian):
    def add(self, x, mask=None):
        rows = self.rows(x, mask)
        self.sum = rows @ rows.T
        self.count = max(len(rows), 1)


@wrong("10.3", "sets padding to 0 in place")
class Hessian(RightHessian):
    def add(self, x, mask=None):
        super().add(x, mask)
        if mask is not None:
            x[~mask] = 0


SHARED = {}


@wrong("10.3", "one sum for all of them")
class Hessian(RightHessian):
    def add(self, x, mask=None):
        rows, kept = self.rows(x, mask), SHARED.setdefault(self.k, RightHessian(self.k))
        kept.sum += rows.T @ rows
        kept.count += len(rows)
        self.sum, self.count = kept.sum, kept.count


@wrong("10.3", "leaves out tokens whose numbers are all 0")
class Hessian(RightHessian):
    def rows(self, x, mask):
        rows = super().rows(x, mask)
        return rows[(rows != 0).any(1)]


@wrong("10.3", "counts a token once, however often it comes")
class Hessian(RightHessian):
    def rows(self, x, mask):
        return super().rows(x, mask).unique(dim=0)


@wrong("10.3", "takes a batch that is the last one's object for seen")
class Hessian(RightHessian):
    before = None

    def add(self, x, mask=None):
        if x is not self.before:
            super().add(x, mask)
        self.before = x


@wrong("10.3", "uses the last mask where none is given")
class Hessian(RightHessian):
    mask = None

    def add(self, x, mask=None):
        if mask is None and self.mask is not None and self.mask.shape == x.shape[:2]:
            mask = self.mask
        self.mask = mask
        super().add(x, mask)


@wrong("10.3", "needs contiguous batches")
class Hessian(RightHessian):
    def rows(self, x, mask):
        rows = x.view(-1, self.k)
        return (rows if mask is None else rows[mask.view(-1)]).float()


@wrong("10.3", "squeezes: one channel is taken for one token")
class Hessian(RightHessian):
    def rows(self, x, mask):
        return torch.atleast_2d(super().rows(x, mask).squeeze())


@wrong("10.3", "keeps the batches themselves and computes when asked")
class Hessian(RightHessian):
    def __init__(self, k):
        super().__init__(k)
        self.seen = []

    def add(self, x, mask=None):
        self.seen.append((x, mask))

    @property
    def matrix(self):
        rows = torch.cat([torch.zeros(0, self.k), *(self.rows(x, mask) for x, mask in self.seen)])
        return rows.T @ rows / max(len(rows), 1)


@alternative("10.3", "keeps real tokens and computes when asked")
class Hessian(RightHessian):
    def __init__(self, k):
        super().__init__(k)
        self.seen = torch.zeros(0, k)

    def add(self, x, mask=None):
        self.seen = torch.cat((self.seen, self.rows(x, mask)))

    @property
    def matrix(self):
        return self.seen.T @ self.seen / max(len(self.seen), 1)


@wrong("10.3", "counts in fp16")
class Hessian(RightHessian):
    def add(self, x, mask=None):
        super().add(x, mask)
        self.count = float(torch.tensor(float(self.count)).half())


@wrong("10.3", "cuts bf16 to fp16's range")
class Hessian(RightHessian):
    def rows(self, x, mask):
        return super().rows(x, mask).clamp(-65504, 65504)


@wrong("10.3", "a batch of one sequence has its padding at the end")
class Hessian(RightHessian):
    def rows(self, x, mask):
        if mask is not None and len(x) == 1:
            x, mask = x[:, : int(mask.sum())], None
        return super().rows(x, mask)


# ---- 10.4


def limits(bits):
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def right_gptq(w, h, scale, bits, damping=0.01, mistake="", dtype=torch.float64):
    """The right one, but for what `mistake` names."""
    first, last = limits(bits)
    if mistake == "-7 to 7":
        first = -last
    w, h, scale = w.to(dtype, copy=True), h.to(dtype, copy=True), scale.to(dtype)
    k, original = w.shape[1], w.clone()
    diagonal = h.diagonal().clone()
    dead = diagonal == 0
    if mistake == "threshold":
        dead = diagonal < 1e-5
    if mistake != "dead columns crash":
        h += torch.diag(dead.to(dtype))
    if mistake not in ("dead keep", "dead columns crash"):
        w[:, dead] = 0
    share = damping * diagonal
    if mistake == "mean":
        share = damping * diagonal.mean().expand(k)
    if mistake == "largest":
        share = damping * diagonal.max().expand(k)
    if mistake == "plain":
        share = torch.full((k,), damping, dtype=dtype)
    if mistake == "undamped":
        share = share * 0
    if mistake == "twice":
        share = 2 * share
    h = h * (1 + damping) if mistake == "all of h" else h + torch.diag(share)
    inverse = torch.linalg.inv(h)
    upper = torch.linalg.cholesky(h if mistake == "h itself" else inverse, upper=True)
    if mistake == "lower":
        upper = torch.linalg.cholesky(inverse)
    if mistake == "turned":  # h = U' U instead of the inverse's factor, inverted
        upper = torch.linalg.inv(torch.linalg.cholesky(h))
    if mistake == "plain inverse":
        upper = inverse
    if mistake == "scaled rows":
        scale = scale.amax().expand(len(w), 1)
    columns = range(k)
    if mistake == "last to first":
        upper, columns = torch.linalg.cholesky(inverse), range(k - 1, -1, -1)
    if mistake == "sorted":
        by_size = diagonal.argsort(descending=True)
        turned = right_gptq(original[:, by_size], h0(h, diagonal, share)[by_size][:, by_size], scale, bits, damping)
        return turned[:, by_size.argsort()]
    q = torch.zeros_like(w)
    for j in columns:
        at = original[:, j] if mistake == "rounds the original" else w[:, j]
        x = at / scale[:, 0]
        x = x.floor() if mistake == "floor" else x.trunc() if mistake == "trunc" else x.round()
        q[:, j] = x if mistake == "no clamp" else x.clamp(first, last)
        if mistake == "nearest":
            continue
        read = (x if mistake == "before clamping" else q[:, j]) * scale[:, 0]
        error = (original[:, j] if mistake == "original error" else w[:, j]) - read
        if mistake == "no scale":
            error = w[:, j] - q[:, j]
        rest = slice(0, j) if mistake == "last to first" else slice(j + 1, None)
        factor = upper[j, rest] / upper[j, j]
        if mistake == "not divided":
            factor = upper[j, rest]
        if mistake == "by the square":
            factor = upper[j, rest] / upper[j, j] ** 2
        if mistake == "next column alone":
            rest = slice(j + 1, j + 2)
            factor = upper[j, rest] / upper[j, j]
        w[:, rest] -= torch.outer(error, factor) * (-1 if mistake == "the wrong way" else 1)
    if mistake == "dead keep":
        q[:, dead] = (original[:, dead] / scale).round().clamp(first, last)
    return {"dequantized": (q * scale).float(), "int32": q.int(), "float": q.float()}.get(mistake, q.to(torch.int8))


def h0(h, diagonal, share):
    return h - torch.diag(share + (diagonal == 0))


def with_mistake(mistake):
    def gptq(w, h, scale, bits, damping=0.01):
        return right_gptq(w, h, scale, bits, damping, mistake)

    return gptq


for mistake, why in (
    ("nearest", "rounds to the nearest"),
    ("the wrong way", "errors are added instead of made up for"),
    ("plain inverse", "rows of the plain inverse: right for the first column alone"),
    ("h itself", "the factor of h instead of its inverse's"),
    ("lower", "the lower factor: nothing moves"),
    ("turned", "the inverse of h's own factor: the order is turned around"),
    ("not divided", "the error is not divided by the factor's diagonal"),
    ("by the square", "divided twice"),
    ("next column alone", "only the next column moves"),
    ("no clamp", "does not clamp"),
    ("-7 to 7", "a symmetric range"),
    ("before clamping", "the error before clamping"),
    ("original error", "the error counts from the original weight"),
    ("rounds the original", "the weights move, but the original ones are rounded"),
    ("no scale", "the error from the integer, not from what is read back"),
    ("mean", "damps by the mean of the diagonal, as the paper does"),
    ("largest", "damps by the largest of the diagonal"),
    ("plain", "damping as a plain number"),
    ("undamped", "does not damp"),
    ("twice", "damps twice as much"),
    ("all of h", "all of h grows"),
    ("dead keep", "dead columns are rounded like others"),
    ("dead columns crash", "dead columns have no inverse"),
    ("threshold", "takes small inputs for none"),
    ("scaled rows", "one scale for all rows"),
    ("last to first", "from the last column to the first"),
    ("sorted", "by order of activations"),
    ("floor", "rounds down"),
    ("trunc", "rounds toward 0"),
    ("dequantized", "returns what is read back"),
    ("int32", "returns int32"),
    ("float", "returns floats"),
):
    wrong("10.4", why)(with_mistake(mistake))


@wrong("10.4", "another default")
def gptq(w, h, scale, bits, damping=0.1):
    return right_gptq(w, h, scale, bits, damping)


@wrong("10.4", "moves the caller's w")
def gptq(w, h, scale, bits, damping=0.01):
    q = right_gptq(w, h, scale, bits, damping)
    w.sub_(w - q.to(w.dtype) * scale.to(w.dtype))
    return q


@wrong("10.4", "damps the caller's h")
def gptq(w, h, scale, bits, damping=0.01):
    q = right_gptq(w, h, scale, bits, damping)
    h.diagonal().mul_(1 + damping)
    return q


@wrong("10.4", "keeps the moved weights in the dtype of w")
def gptq(w, h, scale, bits, damping=0.01):
    if w.dtype == torch.float64:
        return right_gptq(w, h, scale, bits, damping)
    w, dtype = w.clone(), w.dtype
    h = h.double() + torch.diag(damping * h.double().diagonal() + (h.diagonal() == 0))
    w[:, dead_of(h)] = 0
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True).to(dtype)
    q = torch.zeros(w.shape)
    for j in range(w.shape[1]):
        q[:, j] = (w[:, j].float() / scale[:, 0]).round().clamp(*limits(bits))
        w[:, j + 1 :] -= torch.outer((w[:, j] - q[:, j] * scale[:, 0]).to(dtype) / upper[j, j], upper[j, j + 1 :])
    return q.to(torch.int8)


def dead_of(h):
    """Damped already: their row holds 1 and nothing else."""
    return (h.abs().sum(1) == 1) & (h.diagonal() == 1)


@alternative("10.4", "the transposed lower factor, in fp32")
def gptq(w, h, scale, bits, damping=0.01):
    w, h = w.float(), h.float()
    dead = h.diagonal() == 0
    h = h + torch.diag(h.diagonal() * damping)
    h[dead, dead] = 1
    upper = torch.linalg.cholesky(torch.linalg.inv(h)).T
    w = torch.where(dead, 0.0, w)
    q = []
    for j in range(w.shape[1]):
        q.append((w[:, j] / scale[:, 0].float()).round().clamp(*limits(bits)))
        error = (w[:, j] - q[-1] * scale[:, 0].float()) / upper[j, j]
        w = w - torch.outer(error, torch.nn.functional.pad(upper[j, j + 1 :], (j + 1, 0)))
    return torch.stack(q, 1).to(torch.int8)


@alternative("10.4", "eliminates each column from the inverse, in fp32, dead columns left out")
def gptq(w, h, scale, bits, damping=0.01):
    alive = h.diagonal() != 0
    part, h = w[:, alive].float().clone(), h[alive][:, alive].float()
    q, found = torch.zeros(w.shape, dtype=torch.int8), torch.zeros(part.shape)
    inverse = torch.linalg.inv(h + torch.diag(h.diagonal() * damping)) if len(h) else h
    for j in range(part.shape[1]):
        found[:, j] = (part[:, j] / scale[:, 0]).round().clamp(*limits(bits))
        error = (part[:, j] - found[:, j] * scale[:, 0].float()) / inverse[j, j]
        part[:, j:] -= error[:, None] * inverse[j, j:]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    q[:, alive] = found.to(torch.int8)
    return q


@alternative("10.4", "a solution for each column")
def gptq(w, h, scale, bits, damping=0.01):
    w, h = w.double().clone(), h.double()
    dead = h.diagonal() == 0
    h = h + torch.diag(h.diagonal() * damping) + torch.diag(dead.double())
    q = torch.zeros_like(w)
    for j in range(w.shape[1]):
        q[:, j] = (w[:, j] / scale[:, 0]).round().clamp(*limits(bits))
        q[:, j][dead[j].expand(len(w))] = 0
        error = w[:, j] - q[:, j] * scale[:, 0]
        if j + 1 < w.shape[1]:
            w[:, j + 1 :] += torch.outer(error, torch.linalg.solve(h[j + 1 :, j + 1 :], h[j + 1 :, j]))
    return q.to(torch.int8)


@alternative("10.4", "the factor of h from back to front, in blocks of 4, in fp32")
def gptq(w, h, scale, bits, damping=0.01):
    w, h = w.float().clone(), h.float()
    dead = h.diagonal() == 0
    w[:, dead] = 0
    h = h + torch.diag(h.diagonal() * damping) + torch.diag(dead.float())
    lower = torch.linalg.cholesky(h.flip(0, 1))
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(h)), upper=True)
    q = torch.zeros_like(w)
    for begin in range(0, w.shape[1], 4):
        end = min(begin + 4, w.shape[1])
        errors = torch.zeros(len(w), end - begin)
        for j in range(begin, end):
            q[:, j] = (w[:, j] / scale[:, 0]).round().clamp(*limits(bits))
            errors[:, j - begin] = (w[:, j] - q[:, j] * scale[:, 0]) / upper[j, j]
            w[:, j + 1 : end] -= torch.outer(errors[:, j - begin], upper[j, j + 1 : end])
        w[:, end:] -= errors @ upper[begin:end, end:]
    return q.to(torch.int8)


@wrong("10.4", "blocks of 4 whose errors never leave their block")
def gptq(w, h, scale, bits, damping=0.01):
    parts = [slice(begin, begin + 4) for begin in range(0, w.shape[1], 4)]
    return torch.cat([right_gptq(w[:, part], h[part, part], scale, bits, damping) for part in parts], 1)


@wrong("10.4", "blocks of 128 whose errors never leave their block")
def gptq(w, h, scale, bits, damping=0.01):
    parts = [slice(begin, begin + 128) for begin in range(0, w.shape[1], 128)]
    return torch.cat([right_gptq(w[:, part], h[part, part], scale, bits, damping) for part in parts], 1)


@wrong("10.4", "a plain 1e-8 on top of the damping")
def gptq(w, h, scale, bits, damping=0.01):
    return right_gptq(w, h + 1e-8 * torch.diag((h.diagonal() != 0).to(h.dtype)), scale, bits, damping)


@wrong("10.4", "takes channels a billion times smaller for dead")
def gptq(w, h, scale, bits, damping=0.01):
    h = h.clone()
    dead = h.diagonal() < 1e-9 * h.diagonal().max()
    h[dead], h[:, dead] = 0, 0
    return right_gptq(w, h, scale, bits, damping)


@wrong("10.4", "h in the dtype of w")
def gptq(w, h, scale, bits, damping=0.01):
    return right_gptq(w, h.to(w.dtype), scale, bits, damping)


@wrong("10.4", "damps in the dtype of h")
def gptq(w, h, scale, bits, damping=0.01):
    h = h.clone()
    h.diagonal().mul_(1 + damping)
    return right_gptq(w, h, scale, bits, 0.0)


@wrong("10.4", "rounds to the nearest where there is one row")
def gptq(w, h, scale, bits, damping=0.01):
    return right_gptq(w, h, scale, bits, damping, "nearest" if len(w) == 1 and len(h) > 2 else "")


@wrong("10.4", "needs contiguous tensors")
def gptq(w, h, scale, bits, damping=0.01):
    return right_gptq(w.view(-1).view(w.shape), h.view(-1).view(h.shape), scale, bits, damping)


@wrong("10.4", "-127 to 127 in 8 bits")
def gptq(w, h, scale, bits, damping=0.01):
    return right_gptq(w, h, scale, bits, damping, "-7 to 7" if bits == 8 else "")


@wrong("10.4", "no integers of one bit")
def gptq(w, h, scale, bits, damping=0.01):
    return right_gptq(w, h, scale, max(bits, 2), damping)


@alternative("10.4", "errors are kept apart, each column gathers what it should make up for, in fp32")
def gptq(w, h, scale, bits, damping=0.01):
    w, h = w.float(), h.float()
    dead = h.diagonal() == 0
    w = w.masked_fill(dead, 0)
    h = h + torch.diag(h.diagonal() * damping + dead)
    upper = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)  # h = upper upperᵀ
    errors, q = torch.zeros_like(w), torch.zeros_like(w)
    for j in range(len(h)):
        at = w[:, j] + errors[:, :j] @ upper[:j, j] / upper[j, j]
        q[:, j] = (at / scale[:, 0]).round().clamp(*limits(bits))
        errors[:, j] = w[:, j] - q[:, j] * scale[:, 0]  # from the original: h already knows how errors add up
    return q.to(torch.int8)


# ---- 10.5


def stack(
    weights, batches, quantize, *, padding=False, means=False, original=False, relu=True, places=False, zeros=False,
    total=False, dtype=torch.float32, last=False,
):  # fmt: skip
    """The right one, batch by batch, but for what is switched."""
    done, inputs = [], [x.clone() for x, _ in batches]
    masks = [torch.ones_like(mask) if padding else mask for _, mask in batches]
    for w in weights:
        found = []
        for x, mask in zip(inputs, masks, strict=True):
            rows = (x * mask[..., None]).flatten(0, 1) if zeros else x[mask]
            found.append((rows.T @ rows, mask.numel() if places else int(mask.sum())))
        if last:
            found = found[-1:]
        if means:
            h = torch.stack([product / count for product, count in found if count]).mean(0)
        else:
            h = sum(product for product, _ in found) / (1 if total else sum(count for _, count in found))
        done.append(quantize(w, h.to(dtype)))
        inputs = [x @ (w if original else done[-1]).T for x in inputs]
        inputs = [torch.relu(x) for x in inputs] if relu else inputs
    return done


def switched(**switches):
    return lambda weights, batches, quantize: stack(weights, batches, quantize, **switches)


for switches, why in (
    ({"padding": True, "means": True, "original": True}, "as it was"),
    ({"padding": True}, "padding still counts"),
    ({"original": True}, "the inputs are still those of the unquantized network"),
    ({"means": True}, "still a mean of means"),
    ({"padding": True, "means": True}, "one of three mended: the inputs"),
    ({"original": True, "means": True}, "one of three mended: padding"),
    ({"padding": True, "original": True}, "one of three mended: the mean"),
    ({"zeros": True}, "padding is multiplied by 0: NaN stays NaN"),
    ({"places": True}, "divides by all places"),
    ({"total": True}, "the sum"),
    ({"relu": False}, "without relu between layers"),
    ({"dtype": torch.float64}, "h in fp64"),
    ({"last": True}, "the last batch alone"),
):
    wrong("10.5", why)(switched(**switches))


@alternative("10.5", "batch by batch, with masks")
def quantize_stack(weights, batches, quantize):
    return stack(weights, batches, quantize)


@alternative("10.5", "padding set to 0 first: 0 stays 0 through all layers")
def quantize_stack(weights, batches, quantize):
    inputs = [torch.where(mask[..., None], x, 0.0) for x, mask in batches]
    count, done = sum(int(mask.sum()) for _, mask in batches), []
    for w in weights:
        total = torch.zeros(w.shape[1], w.shape[1])
        for x in inputs:
            total += torch.einsum("bti,btj->ij", x, x)
        new = quantize(w, total / count)
        done.append(new)
        inputs = [(x @ new.T).clamp(min=0) for x in inputs]
    return done


@wrong("10.5", "all Hessians first, then all layers")
def quantize_stack(weights, batches, quantize):
    hessians = []
    stack(weights, batches, lambda w, h: (hessians.append(h), w)[1])
    return [quantize(w, h) for w, h in zip(weights, hessians, strict=True)]


@wrong("10.5", "puts the new weights into the caller's list")
def quantize_stack(weights, batches, quantize):
    weights[:] = stack(weights, batches, quantize)
    return list(weights)


@wrong("10.5", "writes into the caller's weights")
def quantize_stack(weights, batches, quantize):
    done = stack(weights, batches, quantize)
    for w, new in zip(weights, done, strict=True):
        w.copy_(new)
    return done


@wrong("10.5", "sets padding to 0 in the caller's batches")
def quantize_stack(weights, batches, quantize):
    done = stack(weights, batches, quantize)
    for x, mask in batches:
        x[~mask] = 0
    return done


@wrong("10.5", "quantizes a layer once for each batch")
def quantize_stack(weights, batches, quantize):
    for batch in batches[:-1]:
        stack(weights, [batch], quantize)
    return stack(weights, batches, quantize)


@wrong("10.5", "quantizes the first layer twice")
def quantize_stack(weights, batches, quantize):
    stack(weights[:1], batches, quantize)
    return stack(weights, batches, quantize)


@wrong("10.5", "returns the weights as they were")
def quantize_stack(weights, batches, quantize):
    stack(weights, batches, quantize)
    return list(weights)


@wrong("10.5", "skips what is 0 instead of padding")
def quantize_stack(weights, batches, quantize):
    rows = torch.cat([x.flatten(0, 1) for x, _ in batches])
    rows, done = rows[rows.isfinite().all(1) & (rows != 0).any(1)], []
    for w in weights:
        done.append(quantize(w, rows.T @ rows / len(rows)))
        rows = torch.relu(rows @ done[-1].T)
    return done


@wrong("10.5", "each batch through its own first new weights: quantizes, then measures")
def quantize_stack(weights, batches, quantize):
    x, done = torch.cat([part[mask] for part, mask in batches]), []
    for w in weights:
        done.append(quantize(w, x.T @ x / len(x)))
        x = torch.relu(x @ done[0].T) if done[0].shape[1] == x.shape[1] else torch.relu(x @ w.T)
    return done


@wrong("10.5", "counts a token once, however often it comes")
def quantize_stack(weights, batches, quantize):
    rows = torch.cat([x[mask] for x, mask in batches]).unique(dim=0)
    return stack(weights, [(rows[None], torch.ones(1, len(rows), dtype=torch.bool))], quantize)


@wrong("10.5", "needs contiguous batches")
def quantize_stack(weights, batches, quantize):
    rows = torch.cat([x.view(-1, x.shape[-1])[mask.view(-1)] for x, mask in batches])
    return stack(weights, [(rows[None], torch.ones(1, len(rows), dtype=torch.bool))], quantize)


@wrong("10.5", "means weighted by tokens: a batch of padding gives NaN")
def quantize_stack(weights, batches, quantize):
    inputs, done = [x[mask] for x, mask in batches], []
    for w in weights:
        shares = [len(x) * (x.T @ x / len(x)) for x in inputs]
        done.append(quantize(w, sum(shares) / sum(len(x) for x in inputs)))
        inputs = [torch.relu(x @ done[-1].T) for x in inputs]
    return done


@wrong("10.5", "starts from a first batch that has real tokens")
def quantize_stack(weights, batches, quantize):
    return stack(weights, batches if batches[0][1].any() else batches[:1], quantize)


@wrong("10.5", "returns the new weights in bf16")
def quantize_stack(weights, batches, quantize):
    return [w.bfloat16() for w in stack(weights, batches, quantize)]


@wrong("10.5", "returns a tuple")
def quantize_stack(weights, batches, quantize):
    return tuple(stack(weights, batches, quantize))


@wrong("10.5", "empties the caller's list of weights")
def quantize_stack(weights, batches, quantize):
    done = stack(weights, batches, quantize)
    weights.clear()
    return done


# ---- 10.6

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
INVERSE = [0, 4, 1, 5, 2, 6, 3, 7]


def convert(qweight, qzeros, scales, *, take=tuple(INVERSE), signed=False, shift=8, up=tuple(range(8)), reads=None):
    """The right one, but for what is switched."""

    def unpacked(stored):
        digits = (stored[..., None] >> torch.tensor([4 * i for i in reads or range(8)], dtype=torch.int32)).long()
        digits = torch.where(torch.arange(8) == 7, digits, digits & 15) if signed else digits & 15
        return digits[..., list(take)].flatten(1).T.contiguous()

    q, z = unpacked(qweight), unpacked(qzeros)
    total = (q.unflatten(1, (-1, 8)) << torch.tensor([4 * i for i in up])).sum(-1) & 0xFFFFFFFF
    packed = torch.where(total < 2**31, total, total - 2**32).int()
    return packed, scales.T.float(), (z - shift).to(torch.int8)


def converter(**switches):
    return lambda qweight, qzeros, scales: convert(qweight, qzeros, scales, **switches)


for switches, why in (
    ({"take": ORDER, "signed": True, "shift": 0}, "as it was"),
    ({"take": ORDER}, "takes by the order instead of its inverse"),
    ({"take": range(8)}, "no order at all"),
    ({"take": range(7, -1, -1)}, "from the highest bits down"),
    ({"take": [0, 4, 2, 6, 1, 5, 3, 7]}, "another order"),
    ({"signed": True}, "the highest nibble keeps its sign"),
    ({"shift": 0}, "zero points stay unsigned"),
    ({"shift": 7}, "zero points as GPTQ's first format has them, off by one"),
    ({"shift": 16}, "zero points shifted the wrong way, twice"),
    ({"up": range(7, -1, -1)}, "packs from the highest bits down"),
    ({"up": ORDER}, "packs in AWQ's order"),
    ({"signed": True, "shift": 0}, "one of three mended: the order"),
    ({"take": ORDER, "shift": 0}, "one of three mended: the sign"),
    ({"take": ORDER, "signed": True}, "one of three mended: the zero points"),
):
    wrong("10.6", why)(converter(**switches))


@alternative("10.6", "by bytes")
def convert_awq(qweight, qzeros, scales):
    def unpacked(stored):
        octets = stored.contiguous().view(torch.uint8)
        nibbles = torch.stack((octets & 15, octets >> 4), -1).unflatten(1, (-1, 4)).flatten(2)  # [R, N/8, 8]
        return nibbles[..., INVERSE].flatten(1)

    q = unpacked(qweight).T.contiguous()
    packed = (q[:, 0::2] | (q[:, 1::2] << 4)).contiguous().view(torch.int32)
    return packed, scales.to(torch.float32).t().contiguous(), (unpacked(qzeros).T.to(torch.int16) - 8).to(torch.int8)


@alternative("10.6", "output by output")
def convert_awq(qweight, qzeros, scales):
    k, n = qweight.shape[0], 8 * qweight.shape[1]
    q, z = torch.zeros(n, k, dtype=torch.int64), torch.zeros(n, len(qzeros), dtype=torch.int8)
    for output in range(n):
        shift = 4 * ORDER.index(output % 8)
        q[output] = (qweight[:, output // 8] >> shift) & 15
        z[output] = ((qzeros[:, output // 8] >> shift) & 15) - 8
    packed = torch.zeros(n, k // 8, dtype=torch.int32)
    for i in range(8):
        part = q[:, i::8] << (4 * i)
        packed |= torch.where(part < 2**31, part, part - 2**32).to(torch.int32)
    return packed, scales.T.float(), z


@wrong("10.6", "the inverse order for the weights, the order for the zero points")
def convert_awq(qweight, qzeros, scales):
    packed, scales, _ = convert(qweight, qzeros, scales)
    return packed, scales, convert(qweight, qzeros, scales.T.half(), take=ORDER)[2]


@wrong("10.6", "zero points mended by moving the weights instead: q wraps")
def convert_awq(qweight, qzeros, scales):
    packed, scales, zeros = convert(qweight, qzeros, scales, shift=0)
    return packed ^ -2004318072, scales, zeros  # 0x88888888


@wrong("10.6", "scales stay fp16")
def convert_awq(qweight, qzeros, scales):
    packed, _, zeros = convert(qweight, qzeros, scales)
    return packed, scales.T, zeros


@wrong("10.6", "scales stay [K/g, N]")
def convert_awq(qweight, qzeros, scales):
    packed, _, zeros = convert(qweight, qzeros, scales)
    return packed, scales.float(), zeros


@wrong("10.6", "zeros as int32")
def convert_awq(qweight, qzeros, scales):
    packed, scales, zeros = convert(qweight, qzeros, scales)
    return packed, scales, zeros.int()


@wrong("10.6", "packed as int64")
def convert_awq(qweight, qzeros, scales):
    packed, scales, zeros = convert(qweight, qzeros, scales)
    return packed.long(), scales, zeros


@wrong("10.6", "packs along the outputs")
def convert_awq(qweight, qzeros, scales):
    _, scales, zeros = convert(qweight, qzeros, scales)
    return qweight.T.contiguous(), scales, zeros


@wrong("10.6", "reshapes where it should transpose")
def convert_awq(qweight, qzeros, scales):
    packed, _, zeros = convert(qweight, qzeros, scales)
    return packed, scales.float().reshape(scales.shape[1], -1), zeros


@wrong("10.6", "masks the caller's words in place")
def convert_awq(qweight, qzeros, scales):
    found = convert(qweight, qzeros, scales)
    qweight &= 0x0F0F0F0F
    return found


for change, why in (
    (lambda s: s.abs(), "scales without their sign"),
    (lambda s: s.clamp(min=1e-6), "scales of 1e-6 at least"),
    (lambda s: torch.where(s.abs() < 6.2e-5, 0, s), "small scales become 0"),
    (lambda s: s.bfloat16().float(), "scales by way of bf16"),
):

    @wrong("10.6", why)
    def convert_awq(qweight, qzeros, scales, change=change):
        packed, scales, zeros = convert(qweight, qzeros, scales)
        return packed, change(scales), zeros


@wrong("10.6", "needs contiguous words")
def convert_awq(qweight, qzeros, scales):
    return convert(qweight.view(-1).view(qweight.shape), qzeros.view(-1).view(qzeros.shape), scales)


@wrong("10.6", "zeros are not turned around where they are square")
def convert_awq(qweight, qzeros, scales):
    packed, found, zeros = convert(qweight, qzeros, scales)
    return packed, found, zeros.T if zeros.shape[0] == zeros.shape[1] else zeros


@wrong("10.6", "words of which the first bit is set are cut")
def convert_awq(qweight, qzeros, scales):
    packed, scales, zeros = convert(qweight, qzeros, scales)
    return (packed.long() & 0xFFFFFFFF).clamp(max=2**31 - 1).int(), scales, zeros


# ---- 10.7


@triton.jit
def switched_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, y_ptr, m, n, k, group,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WRONG: tl.constexpr,
):  # fmt: skip
    """The right kernel, but for what WRONG names."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    in_n, in_m = offs_n < n, offs_m < m
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    end = k - BLOCK_K if WRONG == "last step" else k
    if WRONG == "first step":
        end = BLOCK_K
    for begin in range(0, end, BLOCK_K):
        columns = begin + offs_k
        x_ptrs = x_ptr + offs_m[:, None] * k + columns[None, :]
        x = tl.load(x_ptrs, mask=in_m[:, None], other=0.0)
        w_ptrs = packed_ptr + offs_n[:, None] * (k // 8) + (columns // 8)[None, :]
        if WRONG == "w transposed":
            w_ptrs = packed_ptr + offs_n[:, None] + (columns // 8)[None, :] * n
        words = tl.load(w_ptrs, mask=in_n[:, None], other=0)
        at = offs_n * (k // group) + begin // group
        if WRONG == "one group":
            at = offs_n * (k // group)
        if WRONG == "groups transposed":
            at = begin // group * n + offs_n
        if WRONG == "group by step":
            at = offs_n * (k // group) + tl.minimum(begin // BLOCK_K, k // group - 1)
        scale, zero = tl.load(scale_ptr + at, mask=in_n, other=0.0), tl.load(zero_ptr + at, mask=in_n, other=0)
        shift = columns % 8 * 4
        if WRONG == "order":
            shift = 28 - columns % 8 * 4
        if WRONG == "awq":
            shift = (columns % 2 * 4 + columns % 8 // 2) * 4
        if WRONG == "bits":
            shift = columns % 8
        q = (words >> shift[None, :]) & 15
        if WRONG == "no mask":
            q = words >> shift[None, :]
        if WRONG == "three bits":
            q = (words >> shift[None, :]) & 7
        if WRONG == "no offset":
            q = q - zero[:, None]
        elif WRONG == "plus zero":
            q = q - 8 + zero[:, None]
        elif WRONG == "no zero":
            q = q - 8
        elif WRONG == "two's complement":
            q = tl.where(q > 7, q - 16, q) - zero[:, None]
        else:
            q = q - 8 - zero[:, None]
        w = q.to(tl.float32) * scale[:, None]
        if WRONG == "zero after scale":
            w = (q + zero[:, None]).to(tl.float32) * scale[:, None] - zero[:, None].to(tl.float32)
        if WRONG == "no scale":
            w = q.to(tl.float32)
        if WRONG == "scale in fp16":
            w = q.to(tl.float32) * scale.to(tl.float16).to(tl.float32)[:, None]
        if WRONG == "size of the scale":
            w = q.to(tl.float32) * tl.abs(scale)[:, None]
        if WRONG == "no scale of 0":
            w = q.to(tl.float32) * tl.where(scale == 0, 1.0, scale)[:, None]
        if WRONG == "fp32":
            part = tl.dot(x.to(tl.float32), tl.trans(w), input_precision="ieee")
        elif WRONG == "tf32":
            part = tl.dot(x, tl.trans(w.to(x.dtype)))
        else:
            part = tl.dot(x, tl.trans(w.to(x.dtype)), input_precision="ieee")
        if WRONG == "not added":
            acc = part
        elif WRONG == "sums in fp16":
            acc = (acc + part).to(x.dtype).to(tl.float32)
        else:
            acc += part
    keep = in_m[:, None] & in_n[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    if WRONG == "y transposed":
        tl.store(y_ptr + offs_n[None, :] * m + offs_m[:, None], y, mask=keep)
    elif WRONG == "columns unmasked":
        tl.store(y_ptr + offs_m[:, None] * n + offs_n[None, :], y, mask=in_m[:, None] & (offs_n >= 0)[None, :])
    elif WRONG == "rows unmasked":
        tl.store(y_ptr + offs_m[:, None] * n + offs_n[None, :], y, mask=(offs_m >= 0)[:, None] & in_n[None, :])
    else:
        tl.store(y_ptr + offs_m[:, None] * n + offs_n[None, :], y, mask=keep)


def launch(x, packed, scales, zeros, what="", kernel=switched_kernel, block_n=32):
    (m, k), n = x.shape, len(packed)
    y = torch.empty(m, n, dtype=torch.float32 if what == "fp32 out" else x.dtype, device=x.device)
    more = {"WRONG": what} if kernel is switched_kernel else {}
    programs = n // block_n if what == "grid" else triton.cdiv(n, block_n)
    kernel[(max(programs, 1),)](
        x, packed, scales, zeros, y, m, n, k, k // scales.shape[1],
        BLOCK_M=max(16, triton.next_power_of_2(m)), BLOCK_N=block_n, BLOCK_K=32, **more,
    )  # fmt: skip
    return y


def launch_with(what):
    return lambda *args: launch(*args, what)


for what, why in (
    ("order", "the first weight in the highest bits"),
    ("awq", "AWQ's order"),
    ("bits", "shifts by bits, not by nibbles"),
    ("no mask", "does not mask the nibble"),
    ("three bits", "masks three bits"),
    ("no offset", "forgets the 8"),
    ("two's complement", "reads two's complement"),
    ("no zero", "forgets the zero point"),
    ("plus zero", "adds the zero point"),
    ("zero after scale", "takes the zero point off after scaling"),
    ("no scale", "forgets the scale"),
    ("one group", "the first group's scale for the whole row"),
    ("groups transposed", "scales as [K/group, N]"),
    ("group by step", "the next group with each step"),
    ("w transposed", "words as [K/8, N]"),
    ("last step", "leaves out the last step"),
    ("first step", "does the first step alone"),
    ("not added", "keeps the last step's product"),
    ("sums in fp16", "sums in the dtype of x"),
    ("rows unmasked", "stores rows beyond y"),
    ("columns unmasked", "stores columns beyond y"),
    ("y transposed", "stores y as [N, M]"),
    ("scale in fp16", "a scale in fp16"),
    ("size of the scale", "a scale without its sign"),
    ("no scale of 0", "a scale of 0 counts as 1"),
    ("fp32", "fp16 is multiplied in fp32"),
    ("tf32", "no input_precision"),
    ("grid", "a program too few where N is no multiple"),
    ("fp32 out", "y in fp32 for fp16"),
):
    wrong("10.7", why)(launch_with(what))


@triton.jit
def grouped_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, y_ptr, m, n, k, group,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Group by group: products with q - z, exact, and the sum of a group scaled; words come as [BLOCK_K, BLOCK_N]."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for index in range(k // group):
        at = offs_n * (k // group) + index
        scale = tl.load(scale_ptr + at, mask=offs_n < n, other=1.0)
        zero = tl.load(zero_ptr + at, mask=offs_n < n, other=0).to(tl.int32) + 8
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(group // BLOCK_K):
            columns = index * group + step * BLOCK_K + offs_k
            words = tl.load(
                packed_ptr + (columns // 8)[:, None] + (offs_n * (k // 8))[None, :], mask=(offs_n < n)[None, :], other=0
            )
            w = ((words >> (4 * (columns % 8))[:, None]) & 15) - zero[None, :]
            x = tl.load(x_ptr + offs_m[:, None] * k + columns[None, :], mask=(offs_m < m)[:, None], other=0.0)
            part = tl.dot(x, w.to(x.dtype), part, input_precision="ieee")
        acc += part * scale[None, :]
    keep = (offs_m < m)[:, None] & (offs_n < n)[None, :]
    tl.store(y_ptr + offs_m[:, None] * n + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=keep)


@alternative("10.7", "products with q - z, the sum of a group scaled")
def w4_linear(*args):
    return launch(*args, kernel=grouped_kernel)


@alternative("10.7", "the same loop, blocks of 16 rows")
def w4_linear(*args):
    return launch(*args, block_n=16)


@wrong("10.7", "unpacks in torch and multiplies there")
def w4_linear(x, packed, scales, zeros):
    q = (packed[..., None] >> torch.arange(0, 32, 4, device=x.device, dtype=torch.int32)) & 15
    q = q.flatten(1).unflatten(1, (scales.shape[1], -1)) - 8 - zeros[..., None]
    return (x.float() @ (q * scales[..., None]).flatten(1).T).to(x.dtype)


@triton.jit
def multiply_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, y_ptr, m, n, k, group,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x times a weight that lies in memory."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, k, BLOCK_K):
        x = tl.load(x_ptr + offs_m[:, None] * k + (begin + offs_k)[None, :], mask=(offs_m < m)[:, None], other=0.0)
        w = tl.load(w_ptr + offs_n[:, None] * k + (begin + offs_k)[None, :], mask=(offs_n < n)[:, None], other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    keep = (offs_m < m)[:, None] & (offs_n < n)[None, :]
    tl.store(y_ptr + offs_m[:, None] * n + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=keep)


@wrong("10.7", "unpacks in torch, multiplies in the kernel")
def w4_linear(x, packed, scales, zeros):
    q = (packed[..., None] >> torch.arange(0, 32, 4, device=x.device, dtype=torch.int32)) & 15
    q = q.flatten(1).unflatten(1, (scales.shape[1], -1)) - 8 - zeros[..., None]
    return launch(x, (q * scales[..., None]).flatten(1).to(x.dtype), scales, zeros, kernel=multiply_kernel)


@triton.jit
def unpack_kernel(packed_ptr, scale_ptr, zero_ptr, w_ptr, k, group, BLOCK_K: tl.constexpr):
    """One row of the weight, into memory."""
    row = tl.program_id(0)
    for begin in range(0, k, BLOCK_K):
        columns = begin + tl.arange(0, BLOCK_K)
        at = row * (k // group) + begin // group
        scale, zero = tl.load(scale_ptr + at), tl.load(zero_ptr + at)
        q = ((tl.load(packed_ptr + row * (k // 8) + columns // 8) >> (columns % 8 * 4)) & 15) - 8 - zero
        tl.store(w_ptr + row * k + columns, (q.to(tl.float32) * scale).to(w_ptr.dtype.element_ty))


@wrong("10.7", "a kernel unpacks into memory, another multiplies")
def w4_linear(x, packed, scales, zeros):
    w = torch.empty(len(packed), x.shape[1], dtype=x.dtype, device=x.device)
    unpack_kernel[(len(w),)](packed, scales, zeros, w, x.shape[1], x.shape[1] // scales.shape[1], BLOCK_K=32)
    return launch(x, w, scales, zeros, kernel=multiply_kernel)


@triton.jit
def untyped_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, y_ptr, m, n, k, group,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The weights stay fp32 beside x in fp16: the interpreter does not mind."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    acc = 0
    for begin in range(0, k, BLOCK_K):
        columns = begin + offs_k
        x = tl.load(x_ptr + offs_m[:, None] * k + columns[None, :], mask=(offs_m < m)[:, None], other=0.0)
        at = offs_n * (k // group) + begin // group
        scale = tl.load(scale_ptr + at, mask=offs_n < n, other=1.0)
        zero = tl.load(zero_ptr + at, mask=offs_n < n, other=0)
        words = tl.load(
            packed_ptr + offs_n[:, None] * (k // 8) + (columns // 8)[None, :], mask=(offs_n < n)[:, None], other=0
        )
        q = ((words >> (columns % 8 * 4)[None, :]) & 15) - 8 - zero[:, None]
        w = (q.to(tl.float32) * scale[:, None]).to(x.dtype)
        acc += tl.dot(x, tl.trans(w), input_precision="ieee")
    keep = (offs_m < m)[:, None] & (offs_n < n)[None, :]
    tl.store(y_ptr + offs_m[:, None] * n + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=keep)


@wrong("10.7", "does not compile: the sum begins as the integer 0")
def w4_linear(*args):
    return launch(*args, kernel=untyped_kernel)


# ---- 10.8


def search(w, x, quantize, steps=20, *, size=None, spread=None, loss=None, alphas=None, last=False, half=False):
    """The right one, but for what is switched."""
    if not half:
        w, x = w.float(), x.float()
    size = size or (lambda x: x.abs().mean(0))
    spread = spread or (lambda s: (s.max() * s.min()).sqrt())
    loss = loss or (lambda w, x, s: ((x / s) @ quantize(w * s).T - x @ w.T).pow(2).mean())
    m = size(x)
    alive = x.abs().amax(0) > 0
    best, strength, least = None, 0.0, math.inf
    for alpha in alphas(steps) if alphas else [i / steps for i in range(steps + 1)]:
        s = torch.ones_like(m)
        if alive.any():
            s[alive] = m[alive] ** alpha
            s[alive] /= spread(s[alive])
        found = float(loss(w, x, s))
        if found < least or (last and found <= least) or best is None:
            best, strength, least = s, alpha, found
    return best, strength


def searcher(**switches):
    return lambda w, x, quantize, steps=20: search(w, x, quantize, steps, **switches)


def weight_error(quantizing):
    def awq_scale(w, x, quantize, steps=20):
        return search(w, x, quantize, steps, loss=lambda w, x, s: quantizing(w, x, s, quantize))

    return awq_scale


for switches, why in (
    ({"size": lambda x: x.mean(0)}, "without abs: powers of negative numbers"),
    ({"size": lambda x: x.mean(0).abs()}, "|mean x| instead of mean |x|"),
    ({"size": lambda x: x.square().mean(0).sqrt()}, "the root of the mean square"),
    ({"size": lambda x: x.square().mean(0)}, "the mean square"),
    ({"size": lambda x: x.abs().amax(0)}, "the maximum"),
    ({"size": lambda x: x.abs().median(0).values}, "the median"),
    ({"spread": lambda s: 1.0}, "does not scale"),
    ({"spread": lambda s: s.mean()}, "divided by the mean"),
    ({"spread": lambda s: s.max()}, "divided by the largest"),
    ({"spread": lambda s: s.max() * s.min()}, "forgets the root"),
    ({"alphas": lambda steps: [i / steps for i in range(steps)]}, "leaves out α = 1, as the first code does"),
    ({"alphas": lambda steps: [i / steps for i in range(1, steps + 1)]}, "leaves out α = 0"),
    ({"alphas": lambda steps: [i / (steps + 1) for i in range(steps + 1)]}, "divides by steps + 1"),
    ({"alphas": lambda steps: [-i / steps for i in range(steps + 1)]}, "scales down what is large"),
    ({"alphas": lambda steps: [0.5]}, "always α = 1/2"),
    ({"alphas": lambda steps: [i / 20 for i in range(21)]}, "always 20 steps"),
    ({"last": True}, "of equal losses the last"),
):
    wrong("10.8", why)(searcher(**switches))
alternative("10.8", "the sum instead of the mean: what it is divided by takes that off")(
    searcher(size=lambda x: x.abs().sum(0))
)

for error, why in (
    (lambda w, x, s, quantize: (quantize(w * s) / s - w).square().mean(), "the weight's error"),
    (lambda w, x, s, quantize: (quantize(w * s) - w * s).square().mean(), "the scaled weight's error"),
    (lambda w, x, s, quantize: (x @ quantize(w * s).T - x @ w.T).square().mean(), "does not divide the input"),
    (lambda w, x, s, quantize: ((x * s) @ quantize(w / s).T - x @ w.T).square().mean(), "scales the other way around"),
    (lambda w, x, s, quantize: ((x / s) @ quantize(w * s).T - x @ w.T).abs().mean(), "the mean size of the error"),
    (
        lambda w, x, s, quantize: ((quantize(w * s) / s - w) * x.abs().mean(0)).square().mean(),
        "errors weighted by size, correlations left out",
    ),
    (lambda w, x, s, quantize: ((x / s) @ quantize(w * s).T - x @ w.T).abs().max(), "the largest error"),
    (lambda w, x, s, quantize: -((x / s) @ quantize(w * s).T - x @ w.T).square().mean(), "the largest loss wins"),
):
    wrong("10.8", why)(weight_error(error))


@alternative("10.8", "all tries first, then the least")
def awq_scale(w, x, quantize, steps=20):
    w, x = w.float(), x.float()
    m = x.abs().mean(0)
    alive = m > 0
    tries, losses = [], []
    for step in range(steps + 1):
        s = torch.where(alive, m, 1.0) ** (step / steps)
        if alive.any():
            s = torch.where(alive, s / (s[alive].max() * s[alive].min()) ** 0.5, 1.0)
        tries.append(s)
        losses.append(((x @ (w - quantize(w * s) / s).T) ** 2).sum().item())
    best = min(range(steps + 1), key=losses.__getitem__)
    return tries[best], best / steps


@alternative("10.8", "by H instead of the outputs")
def awq_scale(w, x, quantize, steps=20):
    h = x.double().T @ x.double() / len(x)

    def loss(w, x, s):
        error = (w - quantize(w * s) / s).double()
        return (error @ h * error).sum()

    return search(w, x, quantize, steps, loss=loss)


@wrong("10.8", "dead channels are clamped, as the first code does")
def awq_scale(w, x, quantize, steps=20):
    m = x.float().abs().mean(0)
    best, strength, least = None, 0.0, math.inf
    for step in range(steps + 1):
        s = m.pow(step / steps).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        loss = ((x.float() / s) @ quantize(w.float() * s).T - x.float() @ w.float().T).square().mean()
        if loss < least:
            best, strength, least = s, step / steps, loss
    return best, strength


@wrong("10.8", "dead channels get scale 0: NaN")
def awq_scale(w, x, quantize, steps=20):
    m = x.float().abs().mean(0)
    best, strength, least = torch.ones_like(m), 0.0, math.inf
    for step in range(steps + 1):
        s = m ** (step / steps)
        s = s / (s.max() * s.min()).sqrt()
        loss = float(((x.float() / s) @ quantize(w.float() * s).T - x.float() @ w.float().T).square().mean())
        if loss < least:
            best, strength, least = s, step / steps, loss
    return best, strength


@wrong("10.8", "dead channels take part with 1")
def awq_scale(w, x, quantize, steps=20):
    m = x.float().abs().mean(0)
    m[m == 0] = 1
    best, strength, least = torch.ones_like(m), 0.0, math.inf
    for step in range(steps + 1):
        s = m ** (step / steps)
        s = s / (s.max() * s.min()).sqrt()
        loss = float(((x.float() / s) @ quantize(w.float() * s).T - x.float() @ w.float().T).square().mean())
        if loss < least:
            best, strength, least = s, step / steps, loss
    return best, strength


@wrong("10.8", "dead channels take part with their neighbors' mean")
def awq_scale(w, x, quantize, steps=20):
    s, strength = search(w, x, quantize, steps)
    dead = x.abs().amax(0) == 0
    return torch.where(dead, s.mean(), s), strength


@wrong("10.8", "returns 1/s")
def awq_scale(w, x, quantize, steps=20):
    s, strength = search(w, x, quantize, steps)
    return 1 / s, strength


@wrong("10.8", "returns the step, not α")
def awq_scale(w, x, quantize, steps=20):
    s, strength = search(w, x, quantize, steps)
    return s, round(strength * steps)


@wrong("10.8", "returns the last try's s")
def awq_scale(w, x, quantize, steps=20):
    tries = []
    _, strength = search(w, x, lambda v: (tries.append(v), quantize(v))[1], steps)
    s, _ = search(w, x, quantize, steps, alphas=lambda steps: [1.0])
    return s, strength


@wrong("10.8", "means in the dtype of x")
def awq_scale(w, x, quantize, steps=20):
    m = x.abs().sum(0) / len(x)
    return search(w, x, quantize, steps, size=lambda _: m.float())


@wrong("10.8", "s in fp64")
def awq_scale(w, x, quantize, steps=20):
    s, strength = search(w, x, quantize, steps)
    return s.double(), strength


@wrong("10.8", "scales the caller's w")
def awq_scale(w, x, quantize, steps=20):
    s, strength = search(w, x, quantize, steps)
    w *= s
    return s, strength


@wrong("10.8", "takes |x| in place")
def awq_scale(w, x, quantize, steps=20):
    found = search(w, x, quantize, steps)
    x.abs_()
    return found


def first_dip(patience):
    def awq_scale(w, x, quantize, steps=20):
        best, strength, least, bad = None, 0.0, math.inf, 0
        for step in range(steps + 1):
            s, alpha = search(w, x, quantize, steps, alphas=lambda steps, step=step: [step / steps])
            loss = float(((x.float() / s) @ quantize(w * s).T - x.float() @ w.T).square().mean())
            bad += loss >= least
            if bad == patience:
                break
            if loss < least:
                best, strength, least, bad = s, alpha, loss, 0
        return best, strength

    return awq_scale


wrong("10.8", "stops where the loss rises")(first_dip(1))
wrong("10.8", "stops after three tries that are no better")(first_dip(3))


@wrong("10.8", "a coarse search, then its neighbors")
def awq_scale(w, x, quantize, steps=20):
    _, near = search(w, x, quantize, steps, alphas=lambda steps: [i / steps for i in range(0, steps + 1, 2)])
    around = [i for i in range(steps + 1) if abs(i - near * steps) < 1.5]
    return search(w, x, quantize, steps, alphas=lambda steps: [i / steps for i in around])


@wrong("10.8", "another default")
def awq_scale(w, x, quantize, steps=10):
    return search(w, x, quantize, steps)


@wrong("10.8", "needs a loss below 1e9")
def awq_scale(w, x, quantize, steps=20):
    def loss(w, x, s):
        found = ((x / s) @ quantize(w * s).T - x @ w.T).square().mean()
        return found if found < 1e9 else math.inf

    return search(w, x, quantize, steps, loss=loss)


@wrong("10.8", "one token tells nothing")
def awq_scale(w, x, quantize, steps=20):
    return search(w, x, quantize, steps) if len(x) > 1 else (torch.ones(x.shape[1]), 0.0)


for switches, why in (
    ({"alphas": lambda steps: [i / steps for i in range(steps + 2)]}, "goes beyond α = 1"),
    ({"size": lambda x: x.abs().sum(0) / (x != 0).sum(0).clamp(min=1)}, "the mean over what is not 0"),
    ({"size": lambda x: x.abs().mean(0).clamp(min=1e-4) * (x != 0).any(0)}, "sizes of 1e-4 at least"),
    (
        {"spread": lambda s: (s.max().clamp(min=1) * s.min().clamp(max=1)).sqrt()},
        "1 takes part in largest and smallest",
    ),
):
    wrong("10.8", why)(searcher(**switches))

for error, why in (
    (
        lambda w, x, s, quantize: ((x / s) @ quantize(w * s).T - x @ w.T).square().mean().bfloat16(),
        "compares losses in bf16",
    ),
    (
        lambda w, x, s, quantize: ((x / s) @ quantize(w * s).T - x @ w.T)[:32].square().mean(),
        "the loss of the first 32 tokens",
    ),
    (
        lambda w, x, s, quantize: ((x / s) @ quantize(w * s).T - x @ w.T)[:, :8].square().mean(),
        "of the first 8 outputs",
    ),
):
    wrong("10.8", why)(weight_error(error))


@wrong("10.8", "an equal loss is one within 0.1 %")
def awq_scale(w, x, quantize, steps=20):
    tries = []
    for step in range(steps + 1):
        found = search(w, x, quantize, steps, alphas=lambda steps, step=step: [step / steps])
        tries.append(
            (float(((x.float() / found[0]) @ quantize(w * found[0]).T - x.float() @ w.T).square().mean()), found)
        )
    least = min(loss for loss, _ in tries)
    return next(found for loss, found in tries if loss <= 1.001 * least)


for alive, why in (
    (lambda x: x.float().abs().mean(0) > 1e-5, "takes small channels for dead"),
    (lambda x: x[0] != 0, "takes channels for dead whose first token is 0"),
    (lambda x: (x != 0).all(0), "takes channels with some zeros for dead"),
):

    @wrong("10.8", why)
    def awq_scale(w, x, quantize, steps=20, alive=alive):
        kept, tries = alive(x), []
        for step in range(steps + 1):
            s = torch.ones(x.shape[1])
            if kept.any():
                s[kept] = x.float().abs().mean(0)[kept] ** (step / steps)
                s[kept] /= (s[kept].max() * s[kept].min()).sqrt()
            loss = float(((x.float() / s) @ quantize(w * s).T - x.float() @ w.T).square().mean())
            tries.append((loss, step, s))
        _, step, s = min(tries, key=lambda found: found[:2])
        return s, step / steps


@wrong("10.8", "products in the dtype of x")
def awq_scale(w, x, quantize, steps=20):
    def loss(w, _, s):
        read = quantize(w * s).to(x.dtype)
        return (x @ w.to(x.dtype).T - (x / s.to(x.dtype)) @ read.T).float().square().mean()

    return search(w, x, quantize, steps, loss=loss)


@wrong("10.8", "w in the dtype of x")
def awq_scale(w, x, quantize, steps=20):
    return search(w.to(x.dtype), x, quantize, steps)


@alternative("10.8", "s by logarithms, in fp64")
def awq_scale(w, x, quantize, steps=20):
    live = x.ne(0).any(0)
    size, best = x.double().abs().mean(0)[live].log(), None
    for step in range(steps + 1):
        s, powers = torch.ones(x.shape[1]), step / steps * size
        if len(powers):
            s[live] = (powers - (powers.max() + powers.min()) / 2).exp().float()
        error = (w - quantize(w * s) / s).double()
        loss = (x.double() @ error.T).square().sum().item()
        if best is None or loss < best[0]:
            best = loss, s, step / steps
    return list(best[1:])
