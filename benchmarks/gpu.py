"""How GPU code is timed here: ceilings measured first, medians, graphs for what is short, inputs that rotate."""

import statistics
from collections.abc import Callable, Sequence

import torch

L2_BYTES = 128 << 20  # inputs of less than this rotate among copies, so that none is still in the L2 cache


def seconds(runs: Sequence[Callable[[], object]]) -> float:
    """Seconds of one call, taking `runs` (the same work on copies of the inputs) in turns.

    Work of more than 500 µs is timed by events (`triton.testing.do_bench`, which empties the L2 cache in between). What
    is shorter is captured into one graph, all copies one after another, and the graph is replayed: otherwise the time
    could be Python's, which needs up to 100 µs for a launch.
    """
    from triton.testing import do_bench

    for run in runs[:2]:
        run()
    torch.cuda.synchronize()
    try:
        rough = do_bench(runs[0], warmup=5, rep=20, return_mode="median") * 1e-3
        if rough > 500e-6 or len(runs) == 1:
            return do_bench(runs[0], warmup=25, rep=150, return_mode="median") * 1e-3
        return graph_seconds(runs)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        raise


def graph_seconds(runs: Sequence[Callable[[], object]], replays: int = 20) -> float:
    rounds = max(1, 32 // len(runs))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for run in runs:
                run()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / (rounds * len(runs)))
    return statistics.median(times)


def copies(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Enough copies of the inputs to exceed the L2 cache, at least 2 and at most 64."""
    size = sum(t.numel() * t.element_size() for t in tensors)
    count = min(64, 2 + L2_BYTES // max(1, size))
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(count - 1))]


def ceilings() -> dict[str, float]:
    """What this GPU can do at most, by two measurements: bytes/s of a 2 GiB copy, FLOP/s of an 8192³ bf16 product."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds([lambda: target.copy_(source)])
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / seconds([lambda: a @ b.T])
    return {"copy bytes/s": copy, "matmul FLOP/s": product}
