"""What chapter 6 quotes: generation with and without a cache, prefill against decode, how exact a cache is, windows,
static batches.

    python benchmarks/chapter_06.py                  everything on the CPU, with SmolLM2 (four minutes on two cores)
    python benchmarks/chapter_06.py steps exact      these parts again; the rest of the recorded file stays
    python benchmarks/chapter_06.py gpu              prefill and decode on a GPU, random weights, against the roofline
    python benchmarks/chapter_06.py gpu --cpu        the same code at tiny sizes on the CPU: checked, not recorded

FLOPs and bytes beside the seconds are formulas (`work`): products and attention, no norms; the weights once, every key
and value that the step touches once, no activations.
"""

import contextlib
import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import workloads
from common import ROOT, device, median_seconds, record
from torch import Tensor

from minillm.cache.contiguous import ContiguousCache
from minillm.cache.paged import PagedCache
from minillm.config import LLAMA_3_8B, ModelConfig
from minillm.data import reference_text
from minillm.generate import cached, cached_batch, naive, occupancy
from minillm.model import Transformer
from minillm.model.layers import NoCache, NoCacheLayer, attention
from minillm.model.tokenizer import Tokenizer
from minillm.model.weights import load, model_path
from minillm.sampling import SamplingParams

MODEL = "smollm2-135m-instruct"


def work(config: ModelConfig, batch: int, before: int, new: int, size: int) -> dict[str, float]:
    """FLOPs and bytes of a step that brings `new` tokens to each of `batch` sequences with `before` tokens cached.

    The head is computed for each sequence's last token; `size` is the bytes of a number.
    """
    flops = config.flops_per_token(1)
    head, context = flops.pop("lm_head"), flops.pop("attention over context")
    pairs = new * before + new * (new + 1) // 2
    parts = config.parameters()
    read = config.num_parameters() - (0 if config.tie_word_embeddings else parts["embedding"])
    cache = 2 * config.num_hidden_layers * config.kv_size * size
    return {
        "flops": batch * (new * sum(flops.values()) + pairs * context + head),
        "bytes": read * size + batch * (before + new) * cache,
    }


def filled(model: Transformer, batch: int, before: int, window: int = 0) -> ContiguousCache:
    """A cache of `batch` sequences with `before` random keys and values each (speed does not depend on them)."""
    weight = model.embed_tokens.weight
    cache = ContiguousCache(model.config, batch, before + 1, window, weight.device, weight.dtype)
    cache.k.normal_()
    cache.v.normal_()
    cache.lengths = [before] * batch
    return cache


def step(model: Transformer, cache: ContiguousCache, rows: Tensor) -> Tensor:
    """Logits of each sequence's last token.  rows [B, T] new tokens of each -> [B, vocab]"""
    batch = cache.extend([rows.shape[1]] * len(rows))
    return model.logits(model(rows, batch, cache)[:, -1])


def text_ids(count: int) -> list[int]:
    """The first tokens of the reference text."""
    text = "\n\n".join(reference_text().values())[: 12 * count]
    return Tokenizer.from_pretrained(model_path(MODEL)).encode(text)[:count]


# ---- on the CPU: generation ----------------------------------------------------------------------------------------


def stamps(steps: Iterator, count: int) -> list[float]:
    """Seconds from the start until each of the first `count` tokens."""
    start, times = time.perf_counter(), []
    for _ in zip(range(count), steps, strict=False):
        times.append(time.perf_counter() - start)
    return times


class Watch:
    """A streamer for transformers' generate that keeps tokens and the time of each."""

    def __init__(self) -> None:
        self.start, self.times, self.tokens = time.perf_counter(), [], []

    def put(self, value: Tensor) -> None:
        if value.numel() == 1:  # the prompt comes first, whole
            self.times.append(time.perf_counter() - self.start)
            self.tokens.append(int(value))

    def end(self) -> None:
        pass


def generate_part(prompt_tokens: int = 32, new: int = 192) -> dict:
    """Greedy tokens after a prompt: seconds until 24, 48, 96 and 192, four ways, and that all agree."""
    from transformers import AutoModelForCausalLM

    model, prompt = load(MODEL, "cpu", "float32"), text_ids(prompt_tokens)
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    tokens, times = {}, {}
    for name, way in (("naive", naive), ("cached", cached)):
        list(way(model, prompt, dataclasses.replace(params, max_tokens=4)))  # warm-up
        tokens[name] = []
        times[name] = stamps((tokens[name].append(int(t)) for t in way(model, prompt, params)), new)
    peer = AutoModelForCausalLM.from_pretrained(model_path(MODEL), dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    for name, use_cache in (("transformers, no cache", False), ("transformers", True)):
        options = {
            "do_sample": False,
            "use_cache": use_cache,
            "attention_mask": torch.ones_like(ids),
            "pad_token_id": 0,
        }
        peer.generate(ids, max_new_tokens=4, **options)
        watch = Watch()
        peer.generate(ids, max_new_tokens=new, min_new_tokens=new, streamer=watch, **options)
        tokens[name], times[name] = watch.tokens, watch.times
    assert all(t == tokens["naive"] for t in tokens.values()), "greedy tokens differ"
    marks = [n for n in (24, 48, 96, 192) if n <= new]
    config = model.config

    def flops(way: str, count: int) -> float:
        lengths = range(prompt_tokens, prompt_tokens + count)
        if way == "naive":
            return sum(work(config, 1, 0, t, 4)["flops"] for t in lengths)
        return work(config, 1, 0, prompt_tokens, 4)["flops"] + sum(
            work(config, 1, t, 1, 4)["flops"] for t in lengths[:-1]
        )

    return {
        "prompt": prompt_tokens,
        "tokens": marks,
        "seconds": {name: [t[n - 1] for n in marks] for name, t in times.items()},
        "each": {name: [t[i - 1] for i in range(1, new + 1, 4)] for name, t in times.items()},
        "flops": {name: [flops(name, n) for n in marks] for name in ("naive", "cached")},
    }


# ---- on the CPU: one step ------------------------------------------------------------------------------------------


def ceilings() -> dict:
    """What these cores can do: a large fp32 product, and reading memory."""
    a, b, source = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.randn(2**27)
    return {
        "matmul FLOP/s": 2 * 2048**3 / median_seconds(lambda: a @ b, 9, 2),
        "read bytes/s": source.nbytes / median_seconds(source.sum, 9, 2),
    }


@torch.inference_mode()
def steps_part() -> dict:
    """Seconds of a prompt, of a decode step by batch and context, and of the naive step that it replaces."""
    model = load(MODEL, "cpu", "float32")
    vocab, rows = model.config.vocab_size, []

    def timed(kind: str, batch: int, before: int, new: int, run: Callable[[], object]) -> None:
        seconds = median_seconds(run)
        case = {"kind": kind, "batch": batch, "before": before, "new": new}
        rows.append(case | {"seconds": seconds} | work(model.config, batch, before, new, 4))
        print(rows[-1], flush=True)

    for new in (1, 4, 16, 64, 256, 1024, 2048):
        ids = torch.randint(0, vocab, (1, new))
        timed("prefill", 1, 0, new, lambda ids=ids: step(model, ContiguousCache(model.config, 1, ids.shape[1]), ids))
    for before in (256, 2048):
        for batch in (1, 2, 4, 8, 16, 32) if before == 256 else (1, 4, 16):
            ids, cache = torch.randint(0, vocab, (batch, 1)), filled(model, batch, before)
            placed = cache.extend([1] * batch)
            timed("decode", batch, before, 1, lambda i=ids, b=placed, c=cache: model.logits(model(i, b, c)[:, -1]))
    for before in (63, 1023):
        ids, cache = torch.randint(0, vocab, (1, 1)), filled(model, 1, before)
        placed = cache.extend([1])
        timed("decode", 1, before, 1, lambda i=ids, b=placed, c=cache: model.logits(model(i, b, c)[:, -1]))
    return {"ceilings": ceilings(), "rows": rows}


# ---- on the CPU: how exact -----------------------------------------------------------------------------------------


@torch.inference_mode()
def exact_part(length: int = 256) -> dict:
    """Logits of one text computed at once, and in steps of 64, 16 and 1 with a cache, and in a batch; fp32 and bf16."""
    ids, result = text_ids(length), {"tokens": length}
    for dtype in ("float32", "bfloat16"):
        model = load(MODEL, "cpu", dtype)
        whole = model.logits(model(torch.tensor([ids])))[0].double()  # [T, vocab]
        best, two = whole.argmax(-1), whole.topk(2).values
        gap = two[:, 0] - two[:, 1]  # [T]
        rows = {}
        for name, chunk, batch in (("at once again", length, 1), ("steps of 64", 64, 1), ("steps of 16", 16, 1),
                                   ("steps of 1", 1, 1), ("at once, in a batch of 3", length, 3)):  # fmt: skip
            cache = ContiguousCache(model.config, batch, length, dtype=model.embed_tokens.weight.dtype)
            parts = []
            for first in range(0, length, chunk):
                piece = torch.tensor([ids[first : first + chunk]]).expand(batch, -1)
                placed = cache.extend([piece.shape[1]] * batch)
                parts.append(model.logits(model(piece, placed, cache))[0].double())
            logits = torch.cat(parts)
            other = logits.argmax(-1) != best
            difference = (logits - whole).norm(dim=-1) / whole.norm(dim=-1)  # [T]
            rows[name] = {
                "bitwise equal": bool((logits == whole).all()),
                "largest difference": float(difference.max()),
                "median difference": float(difference.median()),
                "same best": float((~other).float().mean()),
                "largest gap where not": float(gap[other].max()) if other.any() else None,
            }
            print(dtype, name, rows[name], flush=True)
        result[dtype] = {"rows": rows, "median gap": float(gap.median())}
    return result


# ---- on the CPU: windows -------------------------------------------------------------------------------------------


class Sinks(NoCacheLayer):
    """Causal attention to the first `sinks` tokens and the last `window` - `sinks`; a cache of such layers."""

    def __init__(self, window: int, sinks: int, layers: int) -> None:
        super().__init__(window)
        self.sinks, self.layers = sinks, [self] * layers

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: object) -> Tensor:
        causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
        keep = causal.triu(1 - self.window + self.sinks)
        keep[:, : self.sinks] = True
        return attention(q, k, v, keep & causal)


@torch.inference_mode()
def windows_part(length: int = 1024, window: int = 256, texts: int = 6, bin_size: int = 64) -> dict:
    """Loss by position of SmolLM2, which was trained without a window; and a decode step's time with one."""
    model, tokenizer = load(MODEL, "cpu", "float32"), Tokenizer.from_pretrained(model_path(MODEL))
    long = [ids for text in reference_text().values() if len(ids := tokenizer.encode(text)[: length + 1]) > length]
    ways = {
        "all tokens": NoCache(),
        "window": NoCache(window),
        "window with 4 sinks": Sinks(window, 4, len(model.layers)),
    }
    losses = {name: torch.zeros(length) for name in ways}
    for ids in long[:texts]:
        ids = torch.tensor(ids)
        for name, cache in ways.items():
            losses[name] += F.cross_entropy(
                model.logits(model(ids[None, :-1], None, cache))[0], ids[1:], reduction="none"
            )
    used = min(texts, len(long))
    late = {name: float(x[window:].mean()) / used for name, x in losses.items()}
    print(late, flush=True)
    rows, x = [], torch.zeros(1, 1, dtype=torch.long)
    for before in (255, 1023, 4095):
        row = {"before": before}
        for name, w in (("all tokens", 0), ("window", window)):
            cache = filled(model, 1, before, w)
            placed = cache.extend([1])
            row[name] = {"seconds": median_seconds(lambda b=placed, c=cache: model(x, b, c), 9), "bytes": cache.nbytes}
        rows.append(row)
    by_bin = {name: (x.view(-1, bin_size).mean(1) / used).tolist() for name, x in losses.items()}
    return {
        "texts": used,
        "length": length,
        "window": window,
        "bin": bin_size,
        "loss": by_bin,
        "late": late,
        "steps": rows,
    }


# ---- on the CPU: a static batch ------------------------------------------------------------------------------------


def lifetime(prompts: list[int], outputs: list[int], capacity: int | None = None) -> dict:
    """What a static batch's slots hold, summed over its steps: used, of finished rows, empty. Counted, not run.

    A row has `capacity` slots, or as many as the package's cache would have: doubled from 64 as the longest grows.
    """
    total, slots, used, dead = max(outputs), 64, 0, 0
    held = 0
    for done in range(1, total + 1):  # tokens that every row has been asked for
        live = [p + done - 1 for p, n in zip(prompts, outputs, strict=True) if done <= n]
        over = [p + n - 1 for p, n in zip(prompts, outputs, strict=True) if done > n]
        while slots < max(live + over):
            slots *= 2
        used, dead, held = used + sum(live), dead + sum(over), held + len(prompts) * (capacity or slots)
    return {"used": used / held, "finished": dead / held, "empty": 1 - (used + dead) / held}


def static_part() -> dict:
    """A batch that runs until its longest is done: measured on a small one, counted on 256 requests."""
    model, generator = load(MODEL, "cpu", "float32"), random.Random(0)
    ids = text_ids(1200)
    prompts = [ids[40 * i : 40 * i + generator.randint(8, 40)] for i in range(16)]
    lengths = [generator.randint(8, 96) for _ in prompts]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    start = time.perf_counter()
    outputs = cached_batch(model, prompts, params)
    seconds = time.perf_counter() - start
    for i in (0, 1):  # two of them alone
        alone = [int(t) for t in cached(model, prompts[i], params[i])]
        assert alone == outputs[i], "greedy tokens of a batch differ from those of a sequence alone"
    measured = {
        "prompts": [len(p) for p in prompts],
        "lengths": lengths,
        "seconds": seconds,
        "occupancy": occupancy(outputs),
    }
    jobs = workloads.workload()
    p, n = [len(job.prompt) for job in jobs], [job.max_tokens for job in jobs]
    counted = {"requests": len(p), "output tokens": sum(n), "mean": statistics.mean(n)}
    for size in (8, 32, 64, 256):
        groups = [(p[i : i + size], n[i : i + size]) for i in range(0, len(p), size)]
        steps = sum(max(outs) for _, outs in groups)
        counted[str(size)] = {
            "occupancy": sum(n) / (size * steps),
            "prefill": sum(p) / sum(size * max(g[0]) for g in groups),
        }
        for name, capacity in (("doubled", None), ("2048 reserved", 2048), ("4096 reserved", 4096)):
            each = [(lifetime(a, b, capacity), max(b)) for a, b in groups]
            counted[str(size)][name] = {
                k: sum(x[k] * w for x, w in each) / steps for k in ("used", "finished", "empty")
            }
    return {"measured": measured, "counted": counted}


# ---- on a GPU ------------------------------------------------------------------------------------------------------

TINY = ModelConfig(256, 64, 96, 2, 4, 2, 16, max_position_embeddings=512)
SHAPES = {
    "SmolLM2-135M": workloads.SHAPES["smollm2"],
    "Llama 3 8B, 8 of its layers": dataclasses.replace(LLAMA_3_8B, num_hidden_layers=8),
}
PROMPTS = (1, 16, 64, 256, 1024, 4096, 8192)
DECODES = [(b, 1024) for b in (1, 4, 16, 64, 256)] + [(b, 8191) for b in (1, 4, 16, 64)]
BLOCK = 16


def random_model(config: ModelConfig, where: str) -> Transformer:
    with torch.device(where):
        model = Transformer(config)
    if where == "cuda":
        for parameter in model.parameters():  # not model.to(dtype): RoPE's tables stay fp32, as in `load`
            parameter.data = parameter.data.bfloat16()
    return model.to(where).eval().requires_grad_(False)


def paged(model: Transformer, batch: int, before: int) -> tuple[PagedCache, SimpleNamespace]:
    """Chapter 7's cache with the sequences' blocks one after another, and the batch of one more token each."""
    weight = model.embed_tokens.weight
    width = -(-(before + 1) // BLOCK)
    cache = PagedCache(model.config, batch * width, BLOCK, weight.device, weight.dtype)
    cache.k.normal_()
    cache.v.normal_()
    every = torch.arange(batch, device=weight.device)
    return cache, SimpleNamespace(
        positions=torch.full_like(every, before), slots=every * width * BLOCK + before, max_seqlen_q=1,
        max_seqlen_k=None, cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device=weight.device),
        context_lens=torch.full_like(every, before + 1, dtype=torch.int32),
        block_tables=torch.arange(batch * width, dtype=torch.int32, device=weight.device).view(batch, width), plan=None,
    )  # fmt: skip


def replayed(run: Callable[[], object]) -> float:
    """Seconds of one run without Python: captured into a graph, the median of replays."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times[2:])


def waited(run: Callable[[], object]) -> float:
    """Seconds of one run as Python launches it, the GPU waited for."""

    def whole() -> None:
        run()
        torch.cuda.synchronize()

    return median_seconds(whole, 5, 2)


def same(what: str, got: Tensor, expected: Tensor, bound: float) -> float:
    difference = float((got.double() - expected.double()).norm() / expected.double().norm())
    if not difference < bound:
        raise AssertionError(f"{what}: differs by {difference}")
    return difference


def agree(model: Transformer, length: int) -> dict:
    """Last logits: a prompt at once, against all but its last token and one step, with both caches."""
    weight = model.embed_tokens.weight
    bound = 5e-2 if weight.dtype == torch.bfloat16 else 1e-4
    ids = torch.randint(0, model.config.vocab_size, (3, length), device=weight.device)
    expected = model.logits(model(ids)[:, -1])
    cache = ContiguousCache(model.config, 3, length, device=weight.device, dtype=weight.dtype)
    step(model, cache, ids[:, :-1])
    blocks, batch = paged(model, 3, length - 1)
    for ours, theirs in ((blocks.k, cache.k), (blocks.v, cache.v)):
        rows = ours.view(len(ours), 3, -1, *ours.shape[2:])  # [layers, B, slots of one, H_kv, D]
        rows[:, :, : length - 1] = theirs[:, :, : length - 1]
    return {
        "contiguous": same("contiguous", step(model, cache, ids[:, -1:]), expected, bound),
        "paged": same("paged", model.logits(model(ids[:, -1], batch, blocks)), expected, bound),
    }


@torch.inference_mode()
def gpu_part(tiny: bool) -> dict:
    """For both shapes: prompts by length, decode steps by batch and context, with both caches and without Python."""
    where = "cpu" if tiny else "cuda"
    shapes = {"tiny": TINY} if tiny else SHAPES
    result: dict = {}
    if not tiny:
        from gpu import ceilings as gpu_ceilings

        result["ceilings"] = gpu_ceilings()
    timers = {"seconds": median_seconds} if tiny else {"seconds": replayed, "with Python": waited}
    for name, config in shapes.items():
        model = random_model(config, where)
        entry = {"differences": agree(model, 40 if tiny else 300), "rows": []}
        print(name, entry["differences"], flush=True)

        def timed(run: Callable[[], object], entry: dict = entry, config: ModelConfig = config, **case: object) -> None:
            row = case | work(config, case["batch"], case["before"], case["new"], 2)
            row |= {key: timer(run) for key, timer in timers.items()}
            row |= {"FLOP/s": row["flops"] / row["seconds"], "bytes/s": row["bytes"] / row["seconds"]}
            entry["rows"].append(row)
            print({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)

        weight = model.embed_tokens.weight
        for new in (1, 16) if tiny else PROMPTS:
            ids = torch.randint(0, config.vocab_size, (1, new), device=where)
            cache = ContiguousCache(config, 1, new, device=where, dtype=weight.dtype)
            batch = cache.extend([new])
            timed(lambda i=ids, b=batch, c=cache, m=model: m.logits(m(i, b, c)[:, -1]),
                  kind="prefill", cache="contiguous", batch=1, before=0, new=new)  # fmt: skip
        for count, before in [(2, 40)] if tiny else DECODES:
            ids = torch.randint(0, config.vocab_size, (count, 1), device=where)
            cache = filled(model, count, before)
            batch = cache.extend([1] * count)
            with contextlib.suppress(torch.OutOfMemoryError):  # SDPA may write keys out once a query head
                timed(lambda i=ids, b=batch, c=cache, m=model: m.logits(m(i, b, c)[:, -1]),
                      kind="decode", cache="contiguous", batch=count, before=before, new=1)  # fmt: skip
            del cache, batch
            blocks, batch = paged(model, count, before)
            timed(lambda i=ids[:, 0], b=batch, c=blocks, m=model: m.logits(m(i, b, c)),
                  kind="decode", cache="paged", batch=count, before=before, new=1)  # fmt: skip
            del blocks, batch
            if not tiny:
                torch.cuda.empty_cache()
        result[name] = entry
        del model, timed
    return result


PARTS = {
    "generate": generate_part,
    "steps": steps_part,
    "exact": exact_part,
    "windows": windows_part,
    "static": static_part,
}


def main() -> None:
    """Measure and record; without a part named, all of the CPU's."""
    torch.manual_seed(0)
    wanted = [word for word in sys.argv[1:] if not word.startswith("--")]
    if "gpu" in wanted:
        tiny = "--cpu" in sys.argv
        results = gpu_part(tiny)
        if not tiny:
            print(record("chapter_06", results, ("torch", "triton")))
        return
    torch.set_num_threads(2)
    path = ROOT / "benchmarks" / "results" / device()[0] / "chapter_06.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else {}
    results["config"] = ModelConfig.from_pretrained(model_path(MODEL)).to_dict()
    for name in wanted or PARTS:
        start = time.perf_counter()
        results[name] = PARTS[name]()
        written_to = record("chapter_06", results)
        print(f"{name}: {time.perf_counter() - start:.0f} s, {written_to}", flush=True)


if __name__ == "__main__":
    main()
