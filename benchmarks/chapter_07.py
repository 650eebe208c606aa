"""What chapter 7 quotes: waste by reservation and by blocks, hit rates of the prefix cache, the allocator's speed, CPU.

    python benchmarks/chapter_07.py          on the CPU, recorded under results/<device>/chapter_07.json
    python benchmarks/chapter_07.py gpu      the paged kernel on a GPU, recorded in the same way there
    python benchmarks/chapter_07.py --cpu    the GPU part at tiny sizes in Triton's interpreter: checked, not recorded

`reservation` and `prefix` are simulations. What they decide with is real (minillm's BlockPool and BlockTable); the
requests are drawn, with a fixed seed, from the distributions stated in LENGTHS and CHAT.
"""

# ruff: noqa: E402
import hashlib
import heapq
import importlib
import math
import os
import statistics
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

CPU = "--cpu" in sys.argv
if CPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import torch
import torch.nn.functional as F
from common import median_seconds, record
from torch import Tensor

from minillm.cache.blocks import BlockPool, BlockTable, OutOfBlocks, chain_hash
from minillm.kernels import KERNELS, AttentionPlan, paged_attention, use

BLOCK_SIZES = (16, 32, 64, 128, 256)
# Log-normal, with the means of prompts and answers of the ShareGPT conversations in Kwon et al., 2023, figure 11. The
# spread (the standard deviation of the logarithm) and the limit on the sum are ours.
LENGTHS = {"mean prompt": 161.31, "mean answer": 337.99, "spread": 1.0, "limit": 2048, "seed": 7}
CHAT = {
    "system prompts": (120, 400, 1200), "mean turns": 5, "mean message": 60, "mean answer": 338, "spread": 1.0,
    "tokens a second": 40, "mean pause": 30.0, "conversations a second": 0.4, "seconds": 600.0, "limit": 8192,
    "seed": 7,
}  # fmt: skip


def lognormal(rng: np.random.Generator, mean: float, spread: float, count: int) -> np.ndarray:
    """Whole numbers of at least 1 with a log-normal distribution of this mean."""
    return np.maximum(1, np.rint(rng.lognormal(math.log(mean) - spread**2 / 2, spread, count))).astype(int)


def lengths(count: int) -> list[tuple[int, int]]:
    """(prompt, answer) of `count` requests: those of LENGTHS whose sum is within the limit."""
    rng, x = np.random.default_rng(LENGTHS["seed"]), LENGTHS
    prompt, answer = (lognormal(rng, x[f"mean {name}"], x["spread"], 2 * count) for name in ("prompt", "answer"))
    fit = prompt + answer <= x["limit"]
    return list(zip(prompt[fit][:count].tolist(), answer[fit][:count].tolist(), strict=True))


# ---- waste ---------------------------------------------------------------------------------------------------------

POOL = 65_536  # tokens
STEPS = 6000  # decoding steps, one token a running request each; the first fifth is not counted


class FirstFit:
    """One stretch of slots; a request gets the first gap that holds its reservation."""

    def __init__(self, size: int) -> None:
        self.taken: list[tuple[int, int]] = []  # (start, end), sorted
        self.size = size

    def take(self, wanted: int) -> tuple[int, int] | None:
        at = 0
        for i, (start, end) in enumerate([*self.taken, (self.size, self.size)]):
            if start - at >= wanted:
                self.taken.insert(i, (at, at + wanted))
                return at, at + wanted
            at = end
        return None


RESERVE: dict[str, Callable[[int, int], int]] = {
    "the longest that is allowed": lambda p, a: LENGTHS["limit"],
    "the next power of 2": lambda p, a: 1 << (p + a - 1).bit_length(),
    "exactly, by an oracle": lambda p, a: p + a,
}


def reserved(policy: str) -> dict:
    """A queue that never ends, over one pool: each request takes its reservation before it starts.

    Shares of the pool, averaged over steps: held by tokens; reserved for tokens to come; reserved for tokens that
    never come; free, but in gaps too small for the next request.
    """
    memory, queue, running = FirstFit(POOL), deque(lengths(30_000)), []
    total, count, steps = np.zeros(4), 0, 0
    for step in range(STEPS):
        while queue:
            prompt, answer = queue[0]
            place = memory.take(RESERVE[policy](prompt, answer))
            if place is None:
                break
            queue.popleft()
            running.append([prompt, prompt + answer, place])
        if step >= STEPS // 5:
            held, final = sum(r[0] for r in running), sum(r[1] for r in running)
            taken = sum(end - start for *_, (start, end) in running)
            total += [held, final - held, taken - final, POOL - taken]
            count, steps = count + len(running), steps + 1
        for r in running:
            r[0] += 1
        for r in [r for r in running if r[0] >= r[1]]:
            running.remove(r)
            memory.taken.remove(r[2])
    assert queue, "the queue ran dry"
    names = ("held", "to come", "never", "gaps")
    return {"running": count / steps, **dict(zip(names, (total / steps / POOL).tolist(), strict=True))}


def paged(block_size: int, spare: float = 0.01) -> dict:
    """The same queue over a BlockPool: blocks as tokens come. Where none is free, the youngest gives all of its own
    back, waits at the head of the queue, and its tokens are computed once more. Newcomers leave a `spare` share free,
    so that those who run can grow.
    """
    pool, queue, running = BlockPool(POOL // block_size, block_size, enable_prefix_caching=False), deque(), []
    queue.extend(lengths(30_000))
    preempted = recomputed = made = 0
    total, count, steps = np.zeros(4), 0, 0
    for step in range(STEPS):
        while queue and pool.num_free - -(-queue[0][0] // block_size) >= spare * pool.num_blocks:
            prompt, answer = queue.popleft()
            table = BlockTable(pool)
            table.extend(0, prompt)
            running.append([prompt, prompt + answer, table])
        if step >= STEPS // 5:
            held, taken = sum(r[0] for r in running), pool.num_used * block_size
            total += [held, 0, taken - held, POOL - taken]
            count, steps = count + len(running), steps + 1
        index = 0
        while index < len(running):
            try:
                running[index][2].extend(running[index][0], running[index][0] + 1)
            except OutOfBlocks:
                victim = running.pop()
                victim[2].free()
                queue.appendleft((victim[0], victim[1] - victim[0]))
                if step >= STEPS // 5:
                    preempted, recomputed = preempted + 1, recomputed + victim[0]
                continue
            running[index][0] += 1
            made += step >= STEPS // 5
            index += 1
        for r in [r for r in running if r[0] >= r[1]]:
            running.remove(r)
            r[2].free()
    names = ("held", "to come", "last block", "free")
    shares = dict(zip(names, (total / steps / POOL).tolist(), strict=True))
    return {"running": count / steps, **shares, "preempted": preempted, "recomputed": recomputed / made}


def reservation() -> dict:
    """Shares of memory and requests at once, for every way to divide it; and the last block's formula."""
    drawn = lengths(30_000)
    prompt, answer = np.array(drawn).T
    context = float((answer * (prompt + (answer - 1) / 2)).sum() / answer.sum())  # the mean over all steps
    result = {
        "lengths": LENGTHS, "pool": POOL, "steps": STEPS, "mean prompt": float(prompt.mean()),
        "mean answer": float(answer.mean()), "mean context": context,
        "reserved": {name: reserved(name) for name in RESERVE},
        "paged": {str(size): paged(size) for size in (1, 8, *BLOCK_SIZES)}, "16, a tenth spare": paged(16, 0.1),
    }  # fmt: skip
    for name, row in (result["reserved"] | result["paged"] | {"spare": result["16, a tenth spare"]}).items():
        print(f"  {name:30}", {k: round(v, 3) for k, v in row.items()}, flush=True)
    return result


# ---- the prefix cache ----------------------------------------------------------------------------------------------


@dataclass(order=True)
class Turn:
    """One request of a conversation: all that was said before, and a new message."""

    at: float
    order: int
    tokens: list[int] = field(compare=False)
    answers: list[int] = field(compare=False)  # lengths, this turn's first
    messages: list[int] = field(compare=False)  # lengths of the user's next messages
    pauses: list[float] = field(compare=False)  # seconds before each


def conversations() -> list[Turn]:
    """First turns of all conversations, as they come."""
    rng, x = np.random.default_rng(CHAT["seed"]), CHAT
    systems = [rng.integers(0, 49_152, n).tolist() for n in x["system prompts"]]
    at, turns = 0.0, []
    while (at := at + rng.exponential(1 / x["conversations a second"])) < x["seconds"]:
        count = rng.geometric(1 / x["mean turns"])
        messages = lognormal(rng, x["mean message"], x["spread"], count).tolist()
        answers = lognormal(rng, x["mean answer"], x["spread"], count).tolist()
        pauses = rng.exponential(x["mean pause"], count - 1).tolist()
        first = systems[rng.integers(len(systems))] + rng.integers(0, 49_152, messages[0]).tolist()
        turns.append(Turn(at, len(turns), first, answers, messages[1:], pauses))
    return turns


def replay(block_size: int, pool_tokens: int, last_first: bool = True) -> dict:
    """All conversations over one pool -> tokens of prompts, and the share of them that was found in the cache.

    last_first: a table gives its last block back first, as BlockTable.free does.
    """
    rng, pool = np.random.default_rng(CHAT["seed"] + 1), BlockPool(pool_tokens // block_size, block_size)
    arrivals, leaving, waiting = conversations(), [], deque()
    heapq.heapify(arrivals)
    prompts = found = requests = refused = peak = 0
    while arrivals or leaving:
        if leaving and (not arrivals or leaving[0][0] <= arrivals[0].at):
            now, _, table, turn = heapq.heappop(leaving)
            table.publish(turn.tokens, len(turn.tokens))
            if not last_first:
                table.blocks.reverse()
            table.free()
            if turn.messages and len(turn.tokens) < CHAT["limit"] // 2:
                tokens = turn.tokens + rng.integers(0, 49_152, turn.messages[0]).tolist()
                later = (turn.answers[1:], turn.messages[1:], turn.pauses[1:])
                heapq.heappush(arrivals, Turn(now + turn.pauses[0], turn.order, tokens, *later))
        else:
            turn = heapq.heappop(arrivals)
            now = turn.at
            waiting.append(turn)
        while waiting:
            turn, table = waiting[0], BlockTable(pool)
            hit = table.match_prefix(turn.tokens)
            answer = min(turn.answers[0], CHAT["limit"] - len(turn.tokens))
            try:
                table.extend(hit, len(turn.tokens) + answer)
            except OutOfBlocks:
                table.free()
                refused += 1
                break
            waiting.popleft()
            prompts, found, requests = prompts + len(turn.tokens), found + hit, requests + 1
            table.publish(turn.tokens, len(turn.tokens))
            turn.tokens = turn.tokens + rng.integers(0, 49_152, answer).tolist()
            heapq.heappush(leaving, (now + answer / CHAT["tokens a second"], turn.order, table, turn))
            peak = max(peak, pool.num_used * block_size)
    assert pool.num_used == 0, "blocks were lost"
    return {"requests": requests, "prompt tokens": prompts, "hit rate": found / prompts, "waited": refused,
            "peak tokens in use": peak}  # fmt: skip


def prefix() -> dict:
    """Hit rates by block size and pool size; token by token without a limit is the most there is to find."""
    pools, plenty = (65_536, 98_304, 131_072, 196_608, 1 << 21), 1 << 21
    result = {"chat": {k: list(v) if isinstance(v, tuple) else v for k, v in CHAT.items()},
              "pools": list(pools), "most": replay(1, plenty), "rows": {}}  # fmt: skip
    print("  most", result["most"], flush=True)
    for size in BLOCK_SIZES:
        result["rows"][str(size)] = {str(tokens): replay(size, tokens) for tokens in pools}
        print(f"  {size:4}", {k: round(v["hit rate"], 3) for k, v in result["rows"][str(size)].items()}, flush=True)
    result["first block first"] = {str(tokens): replay(16, tokens, last_first=False) for tokens in pools}
    print("  released from the start", {k: round(v["hit rate"], 3) for k, v in result["first block first"].items()})
    return result


# ---- the allocator's own time --------------------------------------------------------------------------------------


def each(run: Callable[[], object], count: int) -> float:
    """Seconds of one of the `count` operations in `run`."""
    return median_seconds(run, repeats=9) / count


def allocator() -> dict:
    """Seconds of single operations, in Python."""
    pool = BlockPool(4096, 16)
    tokens = np.random.default_rng(0).integers(0, 49_152, 16 * 256).tolist()

    def allocate() -> None:
        for block in [pool.allocate() for _ in range(4096)]:
            pool.release(block)

    def grow() -> None:
        table = BlockTable(pool)
        for i in range(4096):
            table.extend(i, i + 1)
        table.free()

    def admit() -> None:
        table = BlockTable(pool)
        table.extend(0, 4096)
        table.free()

    def found() -> None:
        table = BlockTable(pool)
        assert table.match_prefix([*tokens, 0]) == 4096
        table.free()

    result = {"allocate and release": each(allocate, 4096), "extend by a token": each(grow, 4096),
              "extend by a block": each(admit, 256)}  # fmt: skip
    table = BlockTable(pool)
    table.extend(0, 4096)
    table.publish(tokens, 4096)
    result["fork, a block"] = each(lambda: table.fork(4096).free(), 256)
    table.free()
    result["match a block"] = each(found, 256)
    data = [tokens[i : i + 16] for i in range(0, 4096, 16)]
    parent = b"p" * 16
    hashes = {
        "BLAKE2b, 16 bytes (minillm)": lambda x: chain_hash(parent, x),
        "SHA-256": lambda x: hashlib.sha256(parent + array("q", x).tobytes()).digest(),
        "Python's hash of a tuple": lambda x: hash((parent, tuple(x))),
    }
    result["hash a block of 16"] = {
        name: each(lambda f=f: [f(x) for x in data], len(data)) for name, f in hashes.items()
    }
    print(" ", result, flush=True)
    return result


# ---- decoding from blocks ------------------------------------------------------------------------------------------


def decode_inputs(heads: int, kv: int, size: int, sequences: int, context: int, block_size: int, device: str,
                  dtype: torch.dtype, shuffled: bool = True) -> tuple[tuple, tuple]:  # fmt: skip
    """The same keys and values in a row, (q, k, v) for SDPA, and in blocks, the arguments of paged_attention."""
    q, k, v = (
        torch.randn(sequences, n, length, size, device=device).to(dtype)
        for n, length in ((heads, 1), (kv, context), (kv, context))
    )
    width = context // block_size
    order = torch.randperm(sequences * width) if shuffled else torch.arange(sequences * width)
    order = order.to(device)
    blocks = (x.transpose(1, 2).reshape(-1, block_size, kv, size).contiguous() for x in (k, v))
    caches = [torch.empty_like(x).index_copy_(0, order, x).flatten(0, 1) for x in blocks]
    tables = order.view(sequences, width).int()
    context_lens = torch.full((sequences,), context, dtype=torch.int32, device=device)
    bounds = torch.arange(sequences + 1, dtype=torch.int32, device=device)
    return (q, k, v), (q[:, :, 0].contiguous(), *caches, tables, context_lens, bounds, 1, block_size)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0]


def difference(got: Tensor, expected: Tensor) -> float:
    if not got.isfinite().all():
        return math.inf
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def cpu_decode() -> dict:
    """torch's path: a plan of the step says which slots to gather into a row, then SDPA is called. One thread.

    "paged" is what each layer does, "plan" what all layers share: one call alone, less a layer's.
    """
    torch.set_num_threads(1)
    result = {"heads": "9/3", "head size": 64, "sequences": 8, "context": 1024, "rows": []}
    for block_size in BLOCK_SIZES:
        row, blocks = decode_inputs(9, 3, 64, 8, 1024, block_size, "cpu", torch.float32)
        assert difference(paged_attention(*blocks), sdpa(*row)) < 1e-5
        q, *caches = blocks[:3]
        plan = AttentionPlan(*blocks[3:6], block_size)
        assert difference(plan.attend(q, *caches), sdpa(*row)) < 1e-5
        calls = plan.calls[0, q.dtype]
        copied = [[call._taken(c, q.dtype) for c in caches] for call in calls]
        runs = {
            "contiguous": lambda row=row: sdpa(*row),
            "paged": lambda plan=plan, args=(q, *caches): plan.attend(*args),
            "alone": lambda blocks=blocks: paged_attention(*blocks),
            "gather": lambda calls=calls, caches=caches: [
                call._taken(c, torch.float32) for call in calls for c in caches
            ],
            "attention": lambda calls=calls, copied=copied, q=q: [
                F.scaled_dot_product_attention(q[call.rows][:, :, None], *kv, attn_mask=call.mask, enable_gqa=True)
                for call, kv in zip(calls, copied, strict=True)
            ],
        }  # fmt: skip
        times = {name: [] for name in runs}
        for _ in range(3):  # in turns
            for name, run in runs.items():
                times[name].append(median_seconds(run, repeats=9))
        seconds = {name: statistics.median(t) for name, t in times.items()}
        seconds["plan"] = max(0.0, seconds.pop("alone") - seconds["paged"])
        result["rows"].append({"block size": block_size, **seconds})
        print(" ", result["rows"][-1], flush=True)
    return result


# ---- the kernel on a GPU -------------------------------------------------------------------------------------------

LAYOUTS = {"d128 h32/8": (32, 8, 128), "d64 h9/3": (9, 3, 64)}
KERNEL = importlib.import_module("minillm.kernels.paged_attention")  # the module: the package's name is the operation


def timed(run: Callable, args: tuple) -> float:
    """Seconds of a call; copies of the large inputs take turns, so that none is in the L2 cache."""
    if CPU:
        return median_seconds(lambda: run(*args), repeats=1, warmup=0)
    from gpu import copies, seconds

    tensors = [a for a in args if isinstance(a, Tensor)]
    rest = args[len(tensors) :]
    return seconds([lambda c=c: run(*c, *rest) for c in copies(*tensors)])


def held(name: str, got: Tensor, expected: Tensor) -> None:
    found = difference(got, expected)
    if not found < (1e-5 if CPU else 1e-2):
        raise AssertionError(f"{name}: differs by {found}")


def gpu_case(layout: str, sequences: int, context: int, block_sizes: tuple[int, ...], device: str, dtype: torch.dtype,
             orders: tuple[bool, ...] = (True,)) -> dict:  # fmt: skip
    """One row: seconds in a row by SDPA and in blocks of each size; outputs compared first."""
    heads, kv, size = LAYOUTS[layout]
    result = {"layout": layout, "sequences": sequences, "context": context, "paged": {}, "paged, in order": {},
              "bytes": 2 * sequences * context * kv * size * dtype.itemsize,
              "splits": KERNEL.splits(sequences, kv, torch.device(device))}  # fmt: skip
    for block_size in block_sizes:
        for shuffled in orders:
            row, blocks = decode_inputs(heads, kv, size, sequences, context, block_size, device, dtype, shuffled)
            held(f"{layout} {sequences} x {context}, blocks of {block_size}", paged_attention(*blocks), sdpa(*row))
            key = "paged" if shuffled else "paged, in order"
            result[key][str(block_size)] = timed(paged_attention, blocks)
    result["SDPA, contiguous"] = timed(sdpa, row)
    print(" ", result, flush=True)
    return result


def gpu_splits(contexts: tuple[int, ...], counts: tuple[int, ...], device: str, dtype: torch.dtype) -> dict:
    """One sequence, its context cut into n parts, for each n, and into as many as the package takes."""
    heads, kv, size = LAYOUTS["d128 h32/8"]
    automatic, rows = KERNEL.splits(1, kv, torch.device(device)), []
    original = KERNEL.splits
    for context in contexts:
        row, blocks = decode_inputs(heads, kv, size, 1, context, 16, device, dtype)
        expected, seconds = sdpa(*row), {}
        try:
            for count in sorted({*counts, automatic}):
                KERNEL.splits = lambda *_, count=count, **__: count
                held(f"{count} splits of {context}", paged_attention(*blocks), expected)
                seconds[str(count)] = timed(paged_attention, blocks)
        finally:
            KERNEL.splits = original
        size_bytes = 2 * context * kv * size * dtype.itemsize
        rows.append({"context": context, "bytes": size_bytes, "seconds": seconds, "SDPA, contiguous": timed(sdpa, row)})
        print(" ", rows[-1], flush=True)
    return {"layout": "d128 h32/8", "automatic": automatic, "rows": rows}


def gpu_reference(device: str, dtype: torch.dtype) -> None:
    """Decoding, a chunk and a mixture against the reference, before anything is timed."""
    for counts, contexts in (([1, 1, 1], [5, 700, 64]), ([40, 1, 7], [90, 33, 7])):
        tables = torch.randperm(3 * 64)[: 3 * 48].view(3, 48).int().to(device)
        caches = torch.randn(2, 3 * 64 * 16, 3, 64, device=device).to(dtype)
        q = torch.randn(sum(counts), 9, 64, device=device).to(dtype)
        context_lens, bounds = (
            torch.tensor(x, dtype=torch.int32, device=device) for x in (contexts, np.cumsum([0, *counts]).tolist())
        )
        args = (q, *caches, tables, context_lens, bounds, max(counts), 16)
        held(f"{counts} queries", paged_attention(*args), KERNELS["paged_attention"].reference(*args))


def gpu_suite() -> dict:
    """Everything that needs the GPU; the same with tiny sizes under --cpu."""
    device, dtype = ("cpu", torch.float32) if CPU else ("cuda", torch.bfloat16)
    gpu_reference(device, dtype)
    sizes = (16, 64) if CPU else BLOCK_SIZES
    shapes = [(1, 128), (3, 64)] if CPU else [(1, 8192), (64, 2048)]
    result = {"ceilings": {}, "rows": []}
    if not CPU:
        from gpu import ceilings

        result["ceilings"] = ceilings()
    for layout in LAYOUTS:
        for shape in shapes:
            orders = (True, False) if shape == shapes[1] else (True,)
            result["rows"].append(gpu_case(layout, *shape, sizes, device, dtype, orders))
    contexts, counts = ((128,), (1, 2)) if CPU else ((8192, 32_768, 131_072), (1, 4, 16, 64))
    result["splits"] = gpu_splits(contexts, counts, device, dtype)
    return result


@torch.inference_mode()
def main() -> None:
    """Measure and record."""
    torch.manual_seed(0)
    start = time.perf_counter()
    if CPU:
        with use("triton"):
            gpu_suite()
        return
    if "gpu" in sys.argv[1:]:
        result, packages = gpu_suite(), ("torch", "triton")
    else:
        parts = {"reservation": reservation, "prefix": prefix, "allocator": allocator, "cpu decode": cpu_decode}
        result, packages = {}, ("torch", "numpy")
        for name, part in parts.items():
            print(name, flush=True)
            result[name] = part()
    print(record("chapter_07", result, packages=packages), f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
