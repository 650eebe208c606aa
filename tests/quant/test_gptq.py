"""GPTQ: what must hold for any weight, against roundings that were found otherwise."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.quant.gptq import Hessian, _inverse_factor, fit_grid, gptq
from minillm.quant.rtn import Grid, QuantizedTensor, Scheme, quantize

GROUPS = Scheme(4, "int", True, "group", 16)
SCHEMES = [
    GROUPS,
    Scheme(4, "int", False, "group", 16),
    Scheme(3, "int", True, "channel"),
    Scheme(8, "float", True, "channel"),
    Scheme(4, "int", False, "tensor"),
    Scheme(4, "nf", True, "group", 16),
]
IDS = ["sym", "asym", "channel", "fp8", "tensor", "nf4"]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
orders = pytest.mark.parametrize("order", [None, "activations"])
seeds = st.integers(0, 2**31)


def problem(n: int = 24, k: int = 64, seed: int = 0, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs, some channels of which are large."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g) / k**0.5 + torch.eye(k)
    x = torch.randn(tokens, k, generator=g) @ mix * torch.rand(k, generator=g).mul(3).exp()
    return torch.randn(n, k, generator=g), Hessian(k).add(x).matrix


def loss(w, q: QuantizedTensor, h) -> float:
    e = (w - q.dequantize()).double()
    return float(torch.einsum("nk,kl,nl->", e, h.double(), e))


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Bit for bit."""
    zeros = (a.grid.zero is None) == (b.grid.zero is None) and (
        a.grid.zero is None or torch.equal(a.grid.zero, b.grid.zero)
    )
    return torch.equal(a.q.float(), b.q.float()) and torch.equal(a.grid.scale, b.grid.scale) and zeros


def nearly(a: QuantizedTensor, b: QuantizedTensor, rows: float = 0.8) -> bool:
    """So many rows are the same: where sums were made in another order, a near tie turns and takes its row along."""
    return float((a.q.float() == b.q.float()).all(1).float().mean()) >= rows


class TestHessian:
    def test_mean_of_outer_products(self):
        x = torch.randn(3, 50, 7)
        h = Hessian(7).add(x)
        assert h.count == 150
        torch.testing.assert_close(h.matrix, torch.einsum("btk,btl->kl", x, x) / 150)

    @given(seeds, st.lists(st.integers(0, 30), min_size=1, max_size=5))
    def test_batches_do_not_matter(self, seed, sizes):
        x = torch.randn(sum(sizes) + 1, 5, generator=torch.Generator().manual_seed(seed))
        h = Hessian(5)
        for part in x.split([*sizes, 1]):
            h.add(part)
        torch.testing.assert_close(h.matrix, Hessian(5).add(x).matrix)

    def test_half_precision_is_summed_in_fp32(self):
        x = torch.full((4096, 2), 3.0, dtype=torch.float16)
        assert Hessian(2).add(x).matrix.tolist() == [[9.0, 9.0], [9.0, 9.0]]

    @pytest.mark.parametrize(
        ("x", "message"), [(torch.ones(2, 3), "length 4"), (torch.full((1, 4), torch.inf), "finite")]
    )
    def test_refused(self, x, message):
        with pytest.raises(ValueError, match=message):
            Hessian(4).add(x)


class TestFactor:
    def test_is_that_of_the_inverse(self):
        _, h = problem()
        upper, used = _inverse_factor(h, 0.01)
        size = h.diagonal().clamp(min=h.diagonal().median())
        damped = (h + 0.01 * torch.diag(size)).double()
        expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        assert used == 0.01
        torch.testing.assert_close(upper.double(), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(upper, upper.triu())

    def test_damping_is_a_share_of_each_columns_own_or_of_the_median(self):
        upper, _ = _inverse_factor(torch.diag(torch.tensor([1e6, 1.0, 0.25, 3.0, 1.0])), 0.5)
        torch.testing.assert_close(upper.diagonal() ** -2, torch.tensor([1.5e6, 1.5, 0.75, 4.5, 1.5]))

    def test_grows_tenfold(self):
        h = torch.tensor([[1.0, 1.05], [1.05, 1.0]])  # positive from 0.05 on
        assert _inverse_factor(h, 0.001)[1] == pytest.approx(0.1)
        assert _inverse_factor(h, 0.0)[1] == pytest.approx(0.1)


class TestProperties:
    @schemes
    @orders
    @pytest.mark.parametrize("grid", ["minmax", "error"])
    @pytest.mark.parametrize("c", [1.0, 0.37])
    def test_uncorrelated_inputs_of_one_size_give_rtn_bit_for_bit(self, scheme, order, grid, c):
        w, _ = problem()
        q, report = gptq(w, c * torch.eye(64), scheme, order=order, grid=grid)
        assert same(q, QuantizedTensor.round(w, fit_grid(w, scheme, grid), scheme))
        assert report.loss == report.rtn_loss

    @schemes
    @orders
    @pytest.mark.parametrize("grid", ["minmax", "error"])
    def test_blocked_is_unblocked(self, scheme, order, grid):
        w, h = problem()
        whole, _ = gptq(w, h, scheme, block=10**6, order=order, grid=grid)
        for block in (1, 7, 16, 24, 48):
            q, _ = gptq(w, h, scheme, block=block, order=order, grid=grid)
            assert nearly(q, whole)
            assert loss(w, q, h) == pytest.approx(loss(w, whole, h), rel=0.05)

    @orders
    def test_a_group_begins_in_the_middle_of_a_block(self, order):
        w, h = problem(k=96)
        scheme = Scheme(4, "int", False, "group", 24)
        assert same(gptq(w, h, scheme, block=64, order=order)[0], gptq(w, h, scheme, block=48, order=order)[0])

    @given(seeds, st.integers(-15, 15))
    def test_scaling_the_hessian_changes_nothing(self, seed, exponent):
        """By a power of 4 not a bit, since nothing is rounded otherwise."""
        w, h = problem(8, 32, seed)
        for order in (None, "activations"):
            assert same(gptq(w, h, GROUPS, order=order)[0], gptq(w, h * 4.0**exponent, GROUPS, order=order)[0])

    @orders
    @pytest.mark.parametrize("c", [1e-6, 0.3, 7.0, 1e6])
    def test_scaling_it_by_any_number(self, order, c):
        w, h = problem(96)
        h[5], h[:, 5] = 0, 0  # a dead column among them
        assert nearly(gptq(w, h, GROUPS, order=order)[0], gptq(w, c * h, GROUPS, order=order)[0])

    def test_rows_are_rounded_each_for_itself(self):
        w, h = problem(96)
        alone, _ = gptq(w[16:48], h, GROUPS)
        together, _ = gptq(w, h, GROUPS)
        assert nearly(alone, QuantizedTensor(together.q[16:48], together.grid, GROUPS))

    @pytest.mark.parametrize("seed", range(3))
    def test_permuted_channels(self, seed):
        """Act-order sorts, so the order that channels come in does not matter, if all share a grid."""
        w, h = problem(96, 32, seed)
        p = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
        scheme = Scheme(4, "int", False, "channel")
        a, _ = gptq(w, h, scheme, order="activations")
        b, _ = gptq(w[:, p], h[p][:, p], scheme, order="activations")
        assert nearly(QuantizedTensor(a.q[:, p], a.grid, scheme), b)

    @orders
    def test_act_order_keeps_the_grids_of_the_original_groups(self, order):
        w, h = problem()
        q, _ = gptq(w, h, GROUPS, order=order)
        assert torch.equal(q.grid.scale, fit_grid(w, GROUPS).scale) == (order is not None)

    def test_later_groups_fit_the_weights_as_they_have_become(self):
        w, h = problem()
        q, _ = gptq(w, h, GROUPS)
        static = fit_grid(w, GROUPS).scale
        assert torch.equal(q.grid.scale[:, 0], static[:, 0])
        assert not torch.isclose(q.grid.scale[:, 1:], static[:, 1:]).all(0).any()
        ratio = q.grid.scale / static
        assert ratio[:, 1:].log().abs().mean() < 1

    @schemes
    def test_the_first_column_is_just_rounded(self, scheme):
        w, h = problem()
        q, _ = gptq(w, h, scheme)
        first = Scheme(scheme.bits, scheme.kind, scheme.symmetric, "channel")
        assert torch.equal(q.q[:, :1].float(), quantize(w[:, :1], q.grid[0], first).float())


class TestLoss:
    @schemes
    @orders
    @pytest.mark.parametrize("grid", ["minmax", "error"])
    @pytest.mark.parametrize("seed", range(3))
    def test_correlated_inputs_lose_less_than_by_rtn(self, scheme, order, grid, seed):
        w, h = problem(seed=seed)
        q, report = gptq(w, h, scheme, order=order, grid=grid)
        rtn = QuantizedTensor.round(w, fit_grid(w, scheme, grid, h.diagonal()), scheme)
        assert report.loss == pytest.approx(loss(w, q, h), rel=1e-3)
        assert report.rtn_loss == pytest.approx(loss(w, rtn, h), rel=1e-3)
        assert report.loss < 0.8 * report.rtn_loss
        assert (report.damping, report.dead, report.fallback) == (0.01, 0, None)

    def test_is_the_sum_of_the_columns_own_losses(self):
        """Without damping and clipping, sum over j of (w_j - q_j)² / U_jj²: what `grid="error"` counts by."""
        w, h = problem(16, 32)
        upper, _ = _inverse_factor(h, 0.0)
        scheme = Scheme(8, "int", True, "channel")
        q, _ = gptq(w, h, scheme, damping=0.0)
        rest, total = w.double(), 0.0
        for j in range(32):
            error = (rest[:, j] - q.dequantize()[:, j].double()) / upper[j, j].double()
            total += float((error**2).sum())
            rest = rest - error[:, None] * upper[j].double()
        assert total == pytest.approx(loss(w, q, h), rel=1e-3)

    def test_one_huge_channel_does_not_hide_the_others(self):
        """As the first token of a text has: were it in the damping of all, they would be rounded to the nearest."""
        w, h = problem()
        alone = gptq(w, h, GROUPS)[1]
        h[63], h[:, 63] = 0, 0
        h[63, 63] = 1e5 * h.diagonal().mean()
        w[:, 63] = 0  # no error of its own
        report = gptq(w, h, GROUPS)[1]
        assert report.loss / report.rtn_loss < 1.3 * alone.loss / alone.rtn_loss

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_a_nearly_dead_channel_does_not_widen_the_grid_of_its_group(self, symmetric):
        """Repairs of its weights cost nothing; 1 % of so little would not hold them."""
        w, h = problem()
        h[40] *= 1e-4
        h[:, 40] *= 1e-4
        q, report = gptq(w, h, Scheme(4, "int", symmetric, "group", 16))
        wider = q.grid.scale / fit_grid(w, q.scheme).scale
        assert wider[:, 2].median() < 1.5
        assert report.loss < 0.6 * report.rtn_loss

    def test_damping_is_used(self):
        """With all damping there is, columns count almost as if uncorrelated."""
        w, h = problem()
        losses = [gptq(w, h, GROUPS, damping=d)[1] for d in (0.01, 1.0)]
        assert losses[0].loss < losses[1].loss < losses[1].rtn_loss
        assert losses[1].damping == 1.0

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_between_rtn_and_the_best_of_all_roundings(self, symmetric):
        """2 bits, 6 columns: 4^6 roundings of each row, enumerated."""
        scheme, k = Scheme(2, "int", symmetric, "channel"), 6
        first, last = scheme.limits
        every = torch.tensor(list(itertools.product(range(first, last + 1), repeat=k)))  # [4096, K]
        ours, nearest, best = [], [], []
        for seed in range(60):
            w, h = problem(8, k, seed)
            q, _ = gptq(w, h, scheme)
            rtn = QuantizedTensor.round(w, fit_grid(w, scheme), scheme)
            for row in range(8):
                grid = Grid(q.grid.scale[row, None], None if symmetric else q.grid.zero[row, None])
                zero = 0.0 if symmetric else float(grid.zero)
                e = w[row] - (every - zero) * float(grid.scale)
                best.append(float(((e @ h) * e).sum(-1).min()))
                for found, by in ((ours, q), (nearest, rtn)):
                    found.append(loss(w[row, None], QuantizedTensor(by.q[row, None], grid, scheme), h))
                assert ours[-1] >= best[-1] * (1 - 1e-4)
        assert sum(ours) < sum(nearest)
        assert sum(math.log(o / n) for o, n in zip(ours, nearest, strict=True)) < len(ours) * math.log(0.9)
        assert sum(o <= b * 1.0001 for o, b in zip(ours, best, strict=True)) > 75, "often it is the best there is"


def babai(w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Babai's nearest plane, as the textbook has it: the point of the lattice of B's columns near B (w / s), found from
    the last Gram-Schmidt vector to the first.  w [K] -> integers [K]
    """
    b = torch.linalg.cholesky(h).T * scale  # bᵀ b = s² h: a basis, one vector a column
    orthogonal = b.clone()
    for i in range(len(w)):
        for j in range(i):
            along = (b[:, i] @ orthogonal[:, j]) / (orthogonal[:, j] @ orthogonal[:, j])
            orthogonal[:, i] -= along * orthogonal[:, j]
    target, q = b @ (w / scale), torch.zeros_like(w)
    for i in reversed(range(len(w))):
        q[i] = (target @ orthogonal[:, i] / (orthogonal[:, i] @ orthogonal[:, i])).round()
        target = target - q[i] * b[:, i]
    return q


@pytest.mark.parametrize("seed", range(6))
def test_back_to_front_it_is_babais_nearest_plane(seed):
    w, h = problem(4, 12, seed)
    scheme = Scheme(6, "int", True, "channel")
    q, _ = gptq(w.flip(1), h.flip(0, 1), scheme, damping=0.0)
    for row in range(4):
        expected = babai(w[row].double(), h.double(), q.grid.scale[row].double())
        inside = (expected >= -32) & (expected <= 31)
        stop = 12 if inside.all() else 0  # past a clipped coordinate the two part
        assert stop == 0 or torch.equal(q.q[row].flip(0).double(), expected)
    rows = [babai(w[r].double(), h.double(), q.grid.scale[r].double()) for r in range(4)]
    assert any(((x >= -32) & (x <= 31)).all() for x in rows), "no row that can show it"


class TestTrouble:
    @pytest.mark.parametrize("order", [None, "activations"])
    @pytest.mark.parametrize("scheme", SCHEMES[:2], ids=IDS[:2])
    def test_dead_columns_become_zero_and_change_nothing_else(self, order, scheme):
        w, h = problem()
        dead = torch.tensor([3, 17, 63])
        h[dead], h[:, dead] = 0, 0
        q, report = gptq(w, h, scheme, order=order)
        assert report.dead == 3
        assert report.fallback is None
        assert (q.dequantize()[:, dead] == 0).all()
        zeroed = w.clone()
        zeroed[:, dead] = 0
        assert same(q, gptq(zeroed, h, scheme, order=order)[0])
        assert report.loss < report.rtn_loss

    @orders
    def test_the_median_that_damps_is_that_of_living_columns(self, order):
        """Of 64 columns 40 are dead: what is left is rounded as it would be by itself."""
        w, h = problem()
        scheme, living = Scheme(4, "int", True, "channel"), torch.arange(64) >= 40
        alone, _ = gptq(w[:, living], 1e-4 * h[living][:, living], scheme, order=order)
        h[~living], h[:, ~living] = 0, 0
        q, report = gptq(w.masked_fill(~living, 0), 1e-4 * h, scheme, order=order)
        assert report.dead == 40
        assert nearly(QuantizedTensor(q.q[:, living], q.grid, scheme), alone)

    def test_fewer_tokens_than_channels(self):
        w, h = problem(tokens=20)
        q, report = gptq(w, h, GROUPS)
        assert q.dequantize().isfinite().all()
        assert report.loss < 0.3 * report.rtn_loss

    def test_a_matrix_that_needs_more_damping(self):
        w, h = problem(tokens=20)
        h = 1.05 * h - 0.05 * torch.diag(h.diagonal())  # directions that no token had now count less than nothing
        _, report = gptq(w, h, GROUPS, damping=0.001)
        assert report.damping == pytest.approx(0.1)
        assert report.fallback is None
        assert report.loss < report.rtn_loss

    @orders
    def test_a_matrix_without_a_factor_is_rounded_to_the_nearest_and_said(self, order):
        w, h = problem()
        h = torch.diag(h.diagonal()) + (1 - torch.eye(64)) * 100 * h.diagonal().max()
        with pytest.warns(UserWarning, match="no Cholesky factor, even damped by 1; the weight is rounded"):
            q, report = gptq(w, h, GROUPS, order=order)
        assert same(q, QuantizedTensor.round(w, fit_grid(w, GROUPS), GROUPS))
        assert "Cholesky" in report.fallback
        assert report.damping is None
        assert report.loss == report.rtn_loss

    def test_inputs_of_zeros_alone_are_said(self):
        w, h = problem()
        with pytest.warns(UserWarning, match="are 0"):
            q, report = gptq(w, torch.zeros_like(h), GROUPS)
        assert same(q, QuantizedTensor.round(w, fit_grid(w, GROUPS), GROUPS))
        assert report.dead == 64

    def test_weights_of_zeros(self):
        _, h = problem()
        for scheme in SCHEMES:
            q, _ = gptq(torch.zeros(4, 64), h, scheme)
            assert (q.dequantize() == 0).all()

    def test_half_precision_and_gradients(self):
        w, h = problem()
        q, _ = gptq(torch.nn.Parameter(w.bfloat16()), h, GROUPS)
        assert same(q, gptq(w.bfloat16().float(), h, GROUPS)[0])

    def test_stored_scales(self):
        w, h = problem()
        q, _ = gptq(w, h, GROUPS, scale_dtype=torch.float16)
        assert torch.equal(q.grid.scale, q.grid.scale.half().float())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"w": torch.ones(3)}, "w: expected a matrix"),
            ({"h": torch.eye(3)}, "h: expected"),
            ({"w": torch.full((2, 64), torch.nan)}, "w: expected finite"),
            ({"h": torch.full((64, 64), torch.inf)}, "h: expected finite"),
            ({"block": 0}, "block"),
            ({"damping": -1.0}, "damping"),
            ({"order": "random"}, "order"),
            ({"grid": "best"}, "grid"),
            ({"scheme": Scheme(4, "int", True, "group", 48)}, "group_size"),
        ],
        ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
    )
    def test_refused(self, change, message):
        w, h = problem(2)
        with pytest.raises(ValueError, match=message):
            gptq(**{"w": w, "h": h, "scheme": GROUPS, **change})
