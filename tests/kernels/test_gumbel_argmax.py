"""Drawing tokens in one kernel: the noise is what a draw needs, and every path computes the same numbers."""

import pytest
import torch

from minillm.kernels import KERNELS, gumbel_argmax, gumbel_noise, use


def logits_of(rows: int, size: int, device, dtype=torch.float32) -> torch.Tensor:
    return (3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(size))).to(device, dtype)


def row_options(rows: int, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    temperatures = torch.tensor([0.0, 1.0, 0.6, 2.5, 1e-6])[torch.arange(rows) % 5]
    seeds = torch.arange(rows) * 987654321987 - 5
    return temperatures.to(device), seeds.to(device), (torch.arange(rows) * 7).to(device, torch.int32)


def test_noise_has_the_gumbel_distribution():
    """Kolmogorov-Smirnov: with 400,000 numbers the largest distance from exp(-exp(-x)) exceeds 0.0031 once in 1000."""
    noise = gumbel_noise(torch.arange(8), torch.arange(8) * 3, 50_000).flatten().double().sort().values
    distance = (torch.exp(-torch.exp(-noise)) - torch.linspace(0, 1, noise.numel(), dtype=torch.float64)).abs().max()
    assert distance < 0.0031
    assert noise.isfinite().all()


def test_noise_of_neighbors_is_independent():
    """Correlation of 100,000 pairs of independent numbers exceeds 0.0104 once in 1000; seeds are fixed."""
    one = gumbel_noise(torch.tensor([5]), torch.tensor([9]), 100_000)[0]
    near = {
        "next position": gumbel_noise(torch.tensor([5]), torch.tensor([10]), 100_000)[0],
        "next seed": gumbel_noise(torch.tensor([6]), torch.tensor([9]), 100_000)[0],
        "other half of the seed": gumbel_noise(torch.tensor([5 + (1 << 32)]), torch.tensor([9]), 100_000)[0],
        "next token": one.roll(1),
    }
    for name, other in near.items():
        assert torch.corrcoef(torch.stack((one, other)))[0, 1].abs() < 0.0104, name


def test_draws_follow_the_softmax():
    """Chi-square over 20,000 positions: 9 degrees of freedom exceed 27.9 once in a thousand."""
    logits, n = torch.randn(10, generator=torch.Generator().manual_seed(3)), 20_000
    tokens = gumbel_argmax(
        logits.expand(n, -1), torch.full((n,), 0.7), torch.zeros(n, dtype=torch.int64), torch.arange(n)
    )
    expected = (logits / 0.7).softmax(-1) * n
    assert float(((tokens.bincount(minlength=10) - expected) ** 2 / expected).sum()) < 27.9


@pytest.mark.parametrize("shape", [(1, 7), (3, 2048), (5, 2049), (2, 9000), (9, 300)])
@pytest.mark.usefixtures("triton")
def test_kernel_equals_reference(device, dtype, shape):
    logits, options = logits_of(*shape, device, dtype), row_options(shape[0], device)
    assert gumbel_argmax(logits, *options).tolist() == KERNELS["gumbel_argmax"].reference(logits, *options).tolist()


@pytest.mark.usefixtures("triton")
def test_of_equal_logits_the_first_wins(device):
    logits = torch.zeros(2, 5000, device=device)
    logits[1, 4000:] = 1.0
    temperatures, seeds, positions = row_options(2, device)
    assert gumbel_argmax(logits, temperatures * 0, seeds, positions).tolist() == [0, 4000]


def test_a_row_does_not_depend_on_its_neighbors():
    logits, options = logits_of(5, 400, "cpu"), row_options(5, "cpu")
    together = gumbel_argmax(logits, *options)
    for i in range(5):
        assert gumbel_argmax(logits[i : i + 1], *(x[i : i + 1] for x in options)) == together[i]


def test_bad_arguments():
    logits, (temperatures, seeds, positions) = logits_of(2, 10, "cpu"), row_options(2, "cpu")
    with pytest.raises(ValueError, match=r"logits: expected \[rows"):
        gumbel_argmax(logits[0], temperatures, seeds, positions)
    with pytest.raises(ValueError, match="seeds: expected"):
        gumbel_argmax(logits, temperatures, seeds.int(), positions)
    with pytest.raises(ValueError, match="positions: expected"):
        gumbel_argmax(logits, temperatures, seeds, positions[:1])
    with pytest.raises(TypeError, match="logits: expected a floating"), use("auto"):
        gumbel_argmax(logits.int(), temperatures, seeds, positions)
