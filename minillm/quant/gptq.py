"""GPTQ: round a weight column by column, and let the columns still to come make up for each error.

Rounding to the nearest makes the error of each weight small; what matters is the error of the layer's output. Over
inputs x that is, for a row w of the weight that became q,

    mean((x · (w - q))²) = (w - q) H (w - q)ᵀ,        H = mean(xᵀ x)  [K, K]

Inputs are correlated, so an error in one column can be undone, in part, by the others. Fix column j at its rounded
value and ask which change of the later columns serves best: the answer is a multiple of row j of U, the upper factor
of H⁻¹ = Uᵀ U,

    e = (w_j - q_j) / U_jj,        w_i <- w_i - e U_ji  for i > j,

and the loss grows by e². All rows of the weight share U. So the cost is K steps, of a row's length each.

Sources: Frantar et al., 2023, "GPTQ"; Chen et al., 2025, "The Geometry of LLM Quantization: GPTQ as Babai's Nearest
Plane Algorithm" (run from the last column to the first, it is that). Act-order and the first code: IST-DASLab/gptq.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .rtn import Grid, QuantizedTensor, Scheme, dequantize, error_grid, minmax_grid, quantize

__all__ = ["GRIDS", "Hessian", "Report", "fit_grid", "gptq"]

GRIDS = ("minmax", "error")
ORDERS = (None, "activations")


class Hessian:
    """H = mean(xᵀ x) over all inputs seen, in fp32: `matrix` [K, K]; `count`, how many.

    A running mean, so H neither grows with the number of inputs nor depends on how they are cut into batches. Padding
    must not be among them.
    """

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(k, k, device=device)
        self.count = 0

    def add(self, x: Tensor) -> "Hessian":
        """See more inputs.  x [..., K]. Raises ValueError for another K and for NaN and infinity."""
        if x.shape[-1] != len(self.matrix):
            raise ValueError(f"x: expected inputs of length {len(self.matrix)}, got the shape {list(x.shape)}")
        x = x.reshape(-1, x.shape[-1]).float()
        self.count += len(x)
        if len(x):
            self.matrix.lerp_(x.T @ x / len(x), len(x) / self.count)
        if not bool(self.matrix.diagonal().isfinite().all()):
            raise ValueError("x: expected finite inputs, got NaN, infinity or a square beyond fp32; is the model fp16?")
        return self


@dataclass(frozen=True)
class Report:
    """How it went.

    - loss, rtn_loss: the mean squared error of the layer's output on the inputs in H, summed over its features; by
      GPTQ, and by rounding to the nearest on a grid of the same kind.
    - damping: the share of H's diagonal that was added to it; None where GPTQ was not used.
    - dead: columns whose input was always 0; their weights became 0.
    - fallback: why the weight was rounded to the nearest instead; None where it was not.
    """

    loss: float
    rtn_loss: float
    damping: float | None
    dead: int = 0
    fallback: str | None = None


def fit_grid(
    w: Tensor, scheme: Scheme, kind: str = "minmax", weight: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Grid:  # fmt: skip
    """`minmax_grid` or `error_grid`, by name; `weight` [K], how much an error in each column counts, is for the latter.

    w [N, K]. Raises ValueError for another name.
    """
    if kind not in GRIDS:
        raise ValueError(f"grid: expected {' or '.join(GRIDS)}, got {kind!r}")
    if kind == "error":
        return error_grid(w, scheme, weight, scale_dtype)
    return minmax_grid(w, scheme, scale_dtype)


def gptq(
    w: Tensor, h: Tensor, scheme: Scheme, *, block: int = 128, damping: float = 0.01, order: str | None = None,
    grid: str = "minmax", scale_dtype: torch.dtype = torch.float32,
) -> tuple[QuantizedTensor, Report]:  # fmt: skip
    """Round w [N, K] for inputs with Hessian h [K, K], such as `Hessian.matrix` (any multiple of it does the same).

    - block: columns after which the rest of the weight is brought up to date, in one product. Changes time alone.
    - damping: share of h's diagonal that is added to it: less trust in what few inputs say. Each column gets a share of
      its own number, or of the median where that is larger: of a nearly dead input's own a share is nothing, and
      repairs run wild there. (The paper adds the mean's to all. A single huge channel, as the first token of a text
      has, makes that more than the others have, and GPTQ does nothing for them.) It grows tenfold as long as h has no
      factor; beyond 1 the weight is rounded to the nearest, with a warning.
    - order: None, from the first column to the last; each group's grid fits the weights as they are when the group
      begins. "activations": columns with the largest inputs first, while the others can still make up for them; grids
      then are those of the original groups of the original weight, so nothing remembers the order.
    - grid: "minmax", or "error": the smallest squared error, each column's counted by how much GPTQ's loss does.

    Computes in fp32. Raises ValueError for shapes that do not fit, NaN, or options that do not exist.
    """
    w, h = w.detach().float(), h.detach().float()
    _check(w, h, block, damping, order, grid)
    diagonal = h.diagonal()
    dead = diagonal <= 0
    nearest = QuantizedTensor.round(w, fit_grid(w, scheme, grid, diagonal, scale_dtype), scheme)
    rtn_loss = _loss(w, nearest, h)
    if bool(dead.all()):
        return nearest, _gave_up("all inputs that it was given are 0", rtn_loss, len(dead))
    columns = torch.arange(w.shape[1], device=w.device)
    if order == "activations":
        columns = diagonal.argsort(descending=True, stable=True)
    living = h + torch.diag(dead * diagonal[~dead].median())  # which that leaves the median
    upper, used = _inverse_factor(living[columns][:, columns], damping)
    if upper is None:
        return nearest, _gave_up(f"the Hessian has no Cholesky factor, even damped by {used:g}", rtn_loss, 0)

    alive = w.masked_fill(dead, 0)
    importance = torch.empty_like(diagonal)
    importance[columns] = upper.diagonal() ** -2  # the loss is the sum over j of (w_j - q_j)² / U_jj²

    def fit(part: Tensor, weight: Tensor) -> Grid:
        return fit_grid(part, scheme, grid, weight, scale_dtype)

    grids = [] if order is None else _split(fit(alive, importance))
    q = _round_columns(alive[:, columns], upper, scheme, grids, columns, importance, fit, _aligned(block, scheme))
    q = q[:, columns.argsort()]
    result = QuantizedTensor(q.contiguous(), _joined(grids), scheme)
    return result, Report(_loss(w, result, h), rtn_loss, used, int(dead.sum()))


def _round_columns(
    w: Tensor, upper: Tensor, scheme: Scheme, grids: list[Grid], columns: Tensor, importance: Tensor,
    fit: Callable[[Tensor, Tensor], Grid], block: int,
) -> Tensor:  # fmt: skip
    """The algorithm itself.  w [N, K], its columns in the order they are rounded in -> q [N, K], in that order

    columns [K]: which column of the weight each one is. A group that has no grid in `grids` yet gets one as it begins.
    """
    column_scheme = replace(scheme, strategy="channel", group_size=None)  # of a column, [N, 1], every row has a scale
    k, size = len(columns), scheme.group_size or len(columns)
    groups = (columns // size).tolist()
    rest = w.T.contiguous()  # [K, N], so that a column's numbers lie together
    q: list[Tensor] = []
    for begin in range(0, k, block):
        end = min(begin + block, k)
        errors = torch.empty_like(rest[begin:end])  # [block, N]
        for j in range(begin, end):
            if groups[j] == len(grids):
                grids.append(fit(rest[j : j + size].T.contiguous(), importance[j : j + size]))
            grid, column = grids[groups[j]], rest[j, :, None]  # [N, 1]
            q.append(quantize(column, grid, column_scheme))
            rounded = dequantize(q[-1], grid, column_scheme)
            error = torch.div((column - rounded)[:, 0], upper[j, j], out=errors[j - begin])  # [N]
            rest[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
        rest[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    return torch.cat(q, 1)


def _inverse_factor(h: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """U, upper triangular, with Uᵀ U = (h + damping · max(h's diagonal, its median))⁻¹, and the damping that it took;
    None, and the damping that was too little.

    Turned back to front, a lower factor is an upper one: h = V Vᵀ, so U = V⁻¹. The inverse of h, which would lose half
    of the digits, is never formed.
    """
    identity, diagonal = torch.eye(len(h), device=h.device), h.diagonal()
    size = diagonal.clamp(min=diagonal.median())
    while True:
        damped = h + torch.diag(damping * size)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if bool(upper.isfinite().all()):
                return upper, damping
        if damping * 10 > 1:
            return None, damping
        damping = damping * 10 or 1e-3


def _aligned(block: int, scheme: Scheme) -> int:
    """Where groups have grids of their own, a block holds whole groups: all of a group is up to date as it begins."""
    return block if scheme.group_size is None else max(block // scheme.group_size, 1) * scheme.group_size


def _loss(w: Tensor, rounded: QuantizedTensor, h: Tensor) -> float:
    """The sum over rows of (w - q) H (w - q)ᵀ."""
    error = w - rounded.dequantize()
    return float(((error @ h) * error).sum())


def _gave_up(why: str, loss: float, dead: int) -> Report:
    warnings.warn(f"GPTQ: {why}; the weight is rounded to the nearest", stacklevel=3)
    return Report(loss, loss, None, dead, why)


def _split(grid: Grid) -> list[Grid]:
    return [grid[group] for group in range(grid.scale.shape[1])]


def _joined(grids: list[Grid]) -> Grid:
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    return Grid(torch.cat([grid.scale for grid in grids], 1), torch.cat(zeros, 1) if zeros else None)


def _check(w: Tensor, h: Tensor, block: int, damping: float, order: str | None, grid: str) -> None:
    if w.dim() != 2:
        raise ValueError(f"w: expected a matrix [N, K], got the shape {list(w.shape)}")
    if h.shape != (w.shape[1], w.shape[1]):
        raise ValueError(f"h: expected [{w.shape[1]}, {w.shape[1]}] for w {list(w.shape)}, got {list(h.shape)}")
    for name, matrix in (("w", w), ("h", h)):
        if not bool(matrix.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    if block < 1:
        raise ValueError(f"block: expected 1 column or more, got {block}")
    if not 0 <= damping <= 1:
        raise ValueError(f"damping: expected a share of h's diagonal, 0 to 1, got {damping}")
    if order not in ORDERS:
        raise ValueError(f'order: expected None or "activations", got {order!r}')
    if grid not in GRIDS:
        raise ValueError(f"grid: expected {' or '.join(GRIDS)}, got {grid!r}")
