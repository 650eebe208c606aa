"""Drawing tokens on the device, option by option, beside `gumbel_argmax`, which knows only a temperature.

    python benchmarks/sampler.py            recorded under results/<device>/sampler.json
    python benchmarks/sampler.py --quick    small; on a CPU the torch path, nothing recorded

Tokens are compared with the reference's before anything is timed. Calls are replayed from a CUDA graph as in the
engine, with programmatic dependent launch.
"""

import sys
from collections.abc import Iterator

import torch
from common import median_seconds, record
from torch import Tensor

from minillm.kernels import KERNELS, dependent_launch, draw_tokens, gumbel_argmax

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
NAMES = ("temperatures", "seeds", "positions", "top_k", "top_p", "min_p", "repetition", "presence", "frequency", "rows")
OPTIONS = {
    "temperature": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50": {"top_k": 50},
    "top_k 20, top_p 0.95": {"top_k": 20, "top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
    "repetition 1.1": {"repetition": 1.1},
    "all of them": {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition": 1.1, "presence": 0.2, "frequency": 0.1},
    "every eighth top_p 0.9": {"top_p": 0.9, "every": 8},
}


def logits_of(kind: str, rows: int, size: int) -> Tensor:
    """Of a model with random weights ("flat"), or with a few likely tokens far above the others ("peaked")."""
    x = torch.randn(rows, size, device=DEVICE)
    if kind == "flat":
        return (0.6 * x).to(DTYPE)
    likely = torch.randint(size, (rows, 40), device=DEVICE)
    return (2 * x).scatter(1, likely, 12 + 2 * torch.randn(rows, 40, device=DEVICE)).to(DTYPE)


def arguments(logits: Tensor, every: int = 1, **options: float) -> list[Tensor]:
    """The arguments of `draw_tokens`: these options in every `every`-th row."""
    n, size = logits.shape
    values = {
        "temperatures": torch.ones(n), "seeds": torch.randint(2**62, (n,)), "positions": torch.arange(n).int() + 100,
        "top_k": torch.zeros(n, dtype=torch.int32), "top_p": torch.ones(n), "min_p": torch.zeros(n),
        "repetition": torch.ones(n), "presence": torch.zeros(n), "frequency": torch.zeros(n),
        "rows": torch.arange(n, dtype=torch.int32),
    }  # fmt: skip
    for name, value in options.items():
        values[name][::every] = value
    counts = (torch.rand(n, size, device=DEVICE) < 0.005).to(torch.int16)
    return [logits, *(values[name].to(DEVICE) for name in NAMES), counts]


def differing(arguments: list[Tensor]) -> int:
    """Rows whose token is not the reference's, for p itself or for a p 1e-5 beside it."""
    reference = KERNELS["draw_tokens"].reference
    wrong = (draw_tokens(*arguments) != reference(*arguments)).nonzero()[:, 0]
    if len(wrong):
        logits, *options, counts = arguments
        some, got = [x[wrong] for x in (logits, *options)], draw_tokens(*arguments)[wrong]
        right = torch.zeros_like(got, dtype=torch.bool)
        for shift in (-1e-5, 1e-5):
            top_p = torch.where(some[5] < 1, some[5] + shift, some[5])
            right |= got == reference(*some[:5], top_p, *some[6:], counts)
        wrong = wrong[~right]
    return len(wrong)


def timed(run, inputs: list[Tensor]) -> float:
    """Seconds of a call, with logits and counts that rotate."""
    if not GPU:
        return median_seconds(lambda: run(*inputs))
    from gpu import copies, graph_seconds

    logits, *options, counts = inputs
    runs = [lambda x=x, c=c: run(x, *options, c) for x, c in copies(logits, counts)]
    runs[0]()  # compiles
    with dependent_launch():
        return graph_seconds(runs)


def cases(quick: bool) -> Iterator[tuple[int, int, str]]:
    for size in (1_000,) if quick else (49_152, 151_936):
        for rows in (1, 4) if quick else (1, 32, 256):
            for kind in ("flat", "peaked"):
                yield size, rows, kind


def measured(size: int, rows: int, kind: str) -> dict:
    """One row of the table: seconds of `gumbel_argmax`, and of `draw_tokens` by its options."""
    torch.manual_seed(0)
    logits = logits_of(kind, rows, size)
    plain = timed(lambda *x: gumbel_argmax(*x[:4]), arguments(logits))
    row = {"vocabulary": size, "rows": rows, "logits": kind, "gumbel_argmax": plain, "draw_tokens": {}}
    for name, options in OPTIONS.items():
        inputs = arguments(logits, **options)
        if wrong := differing(inputs):
            raise AssertionError(f"{name}, {kind}, {rows} x {size}: {wrong} rows differ from the reference")
        row["draw_tokens"][name] = timed(draw_tokens, inputs)
    return row


def main(arguments: list[str]) -> None:
    if unknown := set(arguments) - {"--quick"}:
        sys.exit(f"argument: expected --quick or nothing, got {sorted(unknown)[0]}")
    rows = []
    for case in cases("--quick" in arguments):
        rows.append(row := measured(*case))
        plain = row["gumbel_argmax"]
        print(f"{row['rows']} x {row['vocabulary']}, {row['logits']}: gumbel_argmax {plain * 1e6:.1f} µs")
        for name, seconds in row["draw_tokens"].items():
            print(f"    {name:24} {seconds * 1e6:8.1f} µs   {(seconds - plain) * 1e6:+8.1f}", flush=True)
    if GPU and not arguments:
        print(record("sampler", {"rows": rows}, ("torch", "triton")))


if __name__ == "__main__":
    main(sys.argv[1:])
