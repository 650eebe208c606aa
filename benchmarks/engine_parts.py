"""The parts of benchmarks/engine.py that measure minillm alone. Each prints its lines and returns what is recorded."""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import workloads as w
from common import device

from minillm import LLM, SamplingParams
from minillm.adapters.lora import Adapter, LoraConfig, Pair, modules
from minillm.adapters.serving import LoRARequest
from minillm.config import ModelConfig
from minillm.engine.constraints import Constraints
from minillm.model.tokenizer_hf import load_tokenizer
from minillm.model.weights import model_path

GPU = torch.cuda.is_available()
DTYPE = "bfloat16" if GPU else "float32"
LIMITS = {"max_model_len": 4096, "max_num_seqs": 256, "max_num_batched_tokens": 8192}
TTFT_LIMIT, TOKEN_LIMIT = 0.2, 0.025  # seconds: what counts as good service


class Bench:
    """One shape, its directory, and its engine: one at a time, since each takes most of the memory."""

    def __init__(self, shape: str, sizes: w.Sizes, copy_rate: float, options: dict) -> None:
        self.shape, self.sizes, self.copy_rate, self.options = shape, sizes, copy_rate, options
        self.config = w.SHAPES[shape]
        self.directory = Path(tempfile.mkdtemp(prefix="minillm-bench-"))
        (self.directory / "config.json").write_text(json.dumps(self.config.to_dict()))
        self.bytes = self.config.weight_bytes(DTYPE), self.config.kv_bytes_per_token(DTYPE)
        self._llm: tuple[bool, LLM] | None = None

    def llm(self, enable_prefix_caching: bool = False) -> LLM:
        """The engine, built when it is not there yet."""
        if self._llm is None or self._llm[0] != enable_prefix_caching:
            self.free()
            start = time.perf_counter()
            built = LLM(
                self.directory, load_format="dummy", enable_prefix_caching=enable_prefix_caching,
                **LIMITS, **self.options,
            )  # fmt: skip
            self._llm = enable_prefix_caching, built
            print(f"{w.NAMES[self.shape]}: engine ready in {time.perf_counter() - start:.1f} s", flush=True)
        return self._llm[1]

    def free(self) -> None:
        """Give the memory back."""
        self._llm = None
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()


def params(job: w.Job) -> SamplingParams:
    return SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=job.max_tokens)


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def run(llm: LLM, jobs: Sequence[w.Job]) -> tuple[float, list]:
    """(seconds, outputs) of `jobs` at once; every token that was asked for must have come."""
    synchronize()
    start = time.perf_counter()
    outputs = llm.generate([j.prompt for j in jobs], [params(j) for j in jobs], use_tqdm=False)
    synchronize()
    seconds = time.perf_counter() - start
    wrong = [i for i, (o, j) in enumerate(zip(outputs, jobs, strict=True)) if len(o.token_ids) != j.max_tokens]
    if wrong:
        raise AssertionError(f"request {wrong[0]}: expected {jobs[wrong[0]].max_tokens} tokens")
    return seconds, outputs


# ---- correctness ---------------------------------------------------------------------------------------------------


def check_tokens() -> int:
    """Greedy tokens through the engine, chunks and prefix hits included, must be the oracle's -> requests compared."""
    from minillm.generate import naive
    from minillm.model import Transformer
    from minillm.model.weights import load, save

    torch.manual_seed(0)
    config = ModelConfig(199, 128, 192, 2, 4, 2, 64, max_position_embeddings=256)
    model = Transformer(config)
    model.reset_parameters(std=0.4)  # so large that no two logits come near each other
    common = [7, 1, 8, 2, 8] * 4
    prompts = [common[: 3 * i] + list(range(1 + 5 * i)) for i in range(8)]
    greedy = SamplingParams(temperature=0, max_tokens=16)
    with tempfile.TemporaryDirectory() as folder:
        path = save(model, Path(folder) / "model")
        reference = load(path, device="cuda" if GPU else "cpu", dtype="float32")
        expected = [[int(t) for t in naive(reference, prompt, greedy)] for prompt in prompts]
        for caching in (False, True):
            llm = LLM(
                path, dtype="float32", max_num_seqs=4, max_num_batched_tokens=24, max_model_len=128,
                enable_prefix_caching=caching, gpu_memory_utilization=0.1,
            )  # fmt: skip
            for again in range(2):  # the second time out of the cache
                outputs = llm.generate(prompts, greedy, use_tqdm=False)
                for i, (output, tokens) in enumerate(zip(outputs, expected, strict=True)):
                    if list(output.token_ids) != tokens:
                        raise AssertionError(
                            f"request {i}, caching {caching}, run {again}: {output.token_ids}, not {tokens}"
                        )
            del llm
    gc.collect()
    return 4 * len(prompts)


# ---- parts ---------------------------------------------------------------------------------------------------------


def workload(bench: Bench) -> dict:
    """nano-vllm's workload."""
    llm, jobs = bench.llm(), w.workload(*bench.sizes.workload)
    tokens = sum(job.max_tokens for job in jobs)
    run(llm, jobs)
    llm.engine.metrics.reset()
    seconds = [run(llm, jobs)[0] for _ in range(2)]
    rate = tokens / min(seconds)
    steps, moved = w.decode_bytes(jobs, *bench.bytes, LIMITS["max_num_seqs"])
    floor = tokens / (moved / bench.copy_rate)
    row = {
        "requests": len(jobs), "prompt tokens": sum(len(j.prompt) for j in jobs), "output tokens": tokens,
        "seconds": seconds, "output tokens/s": rate, "preemptions": llm.engine.metrics.num_preemptions,
        "floor": {"decode steps": steps, "bytes": moved, "output tokens/s": floor, "reached": rate / floor},
        **published("workload", bench.shape, rate),
    }  # fmt: skip
    ratios = "".join(f", {ratio:.2f} of {name}" for name, ratio in row["against published"].items())
    print(f"  workload {rate:9,.0f} tokens/s, {rate / floor:.1%} of the byte floor{ratios}", flush=True)
    return row


def published(part: str, shape: str, rate: float, case: str = "") -> dict:
    """Ratios to other engines: figures from elsewhere, marked as such, on the same kind of GPU; or measured beside.
    Where a part has cases, an engine's name ends with ": " and one of them.
    """
    comparable = device()[0] == "h100" or w.PUBLISHED_LABEL == w.BESIDE
    figures = w.PUBLISHED[part].get(shape, {}) if comparable else {}
    if case:
        named = {name.partition(": "): figure for name, figure in figures.items()}
        figures = {name: figure for (name, _, of), figure in named.items() if of == case}
    return {"published": figures, "against published": {name: rate / figure for name, figure in figures.items()}}


def stream(bench: Bench) -> dict:
    """One request alone."""
    llm, (prompt, output) = bench.llm(), bench.sizes.stream
    seconds, first = [], []
    for seed in range(bench.sizes.stream_runs + 1):
        took, [out] = run(llm, w.random_jobs(1, (prompt, prompt), (output, output), seed))
        seconds.append(took)
        first.append(out.metrics.time_to_first_token)
    took, ttft = statistics.median(seconds[1:]), statistics.median(first[1:])
    rate, decoding = output / took, (output - 1) / (took - ttft)
    steps, moved = w.decode_bytes([w.Job([0] * prompt, output)], *bench.bytes, 1)
    floor = steps / (moved / bench.copy_rate)
    row = {
        "prompt": prompt, "output": output, "seconds": seconds[1:], "output tokens/s": rate, "TTFT, s": ttft,
        "decoding tokens/s": decoding, "floor": {"decoding tokens/s": floor, "reached": decoding / floor},
        **published("stream", bench.shape, rate),
    }  # fmt: skip
    ratios = "".join(f", {ratio:.2f} of {name}" for name, ratio in row["against published"].items())
    print(f"  stream   {rate:9,.0f} tokens/s, {decoding / floor:.1%} of the byte floor{ratios}", flush=True)
    return row


def prompts(bench: Bench) -> dict:
    """Long prompts, which nobody has asked before, and few tokens behind them."""
    bench.free()
    limits = {**LIMITS, "max_model_len": bench.sizes.prompts_limit}
    if bench.config.max_position_embeddings < bench.sizes.prompts_limit:
        raise ValueError(f"{bench.shape}: its context is shorter than {bench.sizes.prompts_limit} tokens")
    llm = LLM(bench.directory, load_format="dummy", enable_prefix_caching=False, **limits, **bench.options)
    rows = []
    for count, length, output in bench.sizes.prompts:
        seconds = [
            run(llm, w.random_jobs(count, (length, length), (output, output), seed=seed))[0] for seed in range(4)
        ]
        best = min(seconds[1:])
        case, rate = f"{count} x {length} + {output}", count * length / best
        rows.append({"case": case, "seconds": seconds[1:], "prompt tokens/s": rate,
                     **published("prompts", bench.shape, rate, case)})  # fmt: skip
        ratios = "".join(f", {ratio:.2f} of {name}" for name, ratio in rows[-1]["against published"].items())
        print(f"  prompts  {case:16} {1e3 * best:8.1f} ms, {rate:9,.0f} tokens/s{ratios}", flush=True)
    return {"cases": rows}


QUANTIZED = {
    "bf16": {}, "int4": {"quantization": "int4"}, "w8a8": {"quantization": "w8a8"}, "fp8": {"quantization": "fp8"},
}  # fmt: skip


def quantized(bench: Bench) -> dict:
    """The workload and one stream with fewer bits, on the fly, against the same engine's in full."""
    rows: dict[str, dict] = {}
    prompt, output = bench.sizes.stream
    jobs = w.workload(*bench.sizes.workload)
    for name, options in QUANTIZED.items():
        bench.free()
        llm = LLM(bench.directory, load_format="dummy", enable_prefix_caching=False, **LIMITS, **options)
        run(llm, jobs[:8])
        seconds = min(run(llm, jobs)[0] for _ in range(bench.sizes.quantized_runs))
        alone = []
        for seed in range(3):
            took, [out] = run(llm, w.random_jobs(1, (prompt, prompt), (output, output), seed))
            alone.append((output - 1) / (took - out.metrics.time_to_first_token))
        rows[name] = {
            "output tokens/s": sum(job.max_tokens for job in jobs) / seconds, "decoding tokens/s": max(alone),
        }  # fmt: skip
        of = {key: rows[name][key] / rows["bf16"][key] for key in ("output tokens/s", "decoding tokens/s")}
        rows[name]["of bf16"] = of
        print(
            f"  {name:20} {rows[name]['output tokens/s']:9,.0f} tokens/s ({of['output tokens/s']:.2f}), one stream"
            f" {rows[name]['decoding tokens/s']:7,.0f} ({of['decoding tokens/s']:.2f})", flush=True,
        )  # fmt: skip
        del llm
    bench.free()
    return rows


def adapters(bench: Bench) -> dict:
    """A batch of 64 requests: without adapters, all with one, with 8 and 64 different ones, in turn."""
    count, (prompt, output), kinds = bench.sizes.adapted, bench.sizes.special, bench.sizes.adapter_kinds
    bench.free()
    start = time.perf_counter()
    llm = LLM(
        bench.directory, load_format="dummy", enable_prefix_caching=False, **{**LIMITS, "max_num_seqs": count},
        max_loras=max(kinds), max_lora_rank=16, **bench.options,
    )  # fmt: skip
    ready = time.perf_counter()
    wanted = [LoRARequest(f"a{i}", i + 1, adapter) for i, adapter in enumerate(random_adapters(llm, max(kinds)))]
    for request in wanted:
        llm.engine.registry.get(request)
    packed = time.perf_counter()
    print(f"  engine with adapters ready in {ready - start:.1f} s, adapters in {packed - ready:.1f} s more", flush=True)
    rates: dict[int, list[float]] = {n: [] for n in (0, *kinds)}
    for seed in range(bench.sizes.adapted_runs + 1):
        for n in rates:
            jobs = w.random_jobs(count, (prompt, prompt), (output, output), 7 * seed + n)
            mine = [wanted[i % n] if n else None for i in range(count)]
            synchronize()
            start = time.perf_counter()
            llm.generate([j.prompt for j in jobs], [params(j) for j in jobs], use_tqdm=False, lora_request=mine)
            synchronize()
            if seed:  # the first brings adapters to the device
                rates[n].append(count * output / (time.perf_counter() - start))
    rows = {
        str(n): {"output tokens/s": max(found), "of none": max(found) / max(rates[0])} for n, found in rates.items()
    }
    for n, row in rows.items():
        print(f"  adapters {n:>3} {row['output tokens/s']:9,.0f} tokens/s, {row['of none']:.2f} of none", flush=True)
    del llm
    bench.free()
    return {"requests": count, "prompt": prompt, "output": output, "rank": 16, "targets": "all-linear", "rows": rows}


def random_adapters(llm: LLM, count: int) -> list[Adapter]:
    """Of all layers, small: random numbers shared by all, a scale for each, so that no two are the same."""
    model, pairs = llm.engine.model, {}
    for name, layer in modules(model).items():
        if name != "lm_head":
            rows = layer.parts[name.rpartition(".")[2]]
            pairs[name] = torch.randn(16, layer.in_features) / 64, torch.randn(rows, 16) / 64
    config = LoraConfig(r=16)
    return [Adapter(config, {k: Pair(a, b, 0.01 + 1e-4 * i) for k, (a, b) in pairs.items()}) for i in range(count)]


def constrained(bench: Bench) -> dict:
    """64 requests whose output must fit a schema, of eight, against as many free ones with outputs of the same lengths.

    Tokens are SmolLM2's (its vocabulary filled up with what never may come), weights random. A text's second run finds
    every mask, a new one under a known schema lacks some, the first of all lacks schemas, masks and graphs.
    """
    count, (prompt, most), runs = bench.sizes.constrained
    llm = bench.llm()
    whole, size = load_tokenizer(model_path("smollm2-135m-instruct")), llm.engine.model_config.vocab_size
    tokenizer = SimpleNamespace(
        vocab_size=min(size, whole.vocab_size), special_tokens=whole.special_tokens, token_bytes=whole.token_bytes
    )
    ends = [i for i in [whole.eos_token_id] if i is not None]
    llm.engine.constraints = Constraints(tokenizer, ends, size)
    llm.engine.end_token_ids = frozenset(ends)
    rates: dict[str, list[float]] = {"constrained": [], "new texts": [], "free": []}
    finished = 0
    for seed in range(runs + 1):
        jobs = w.random_jobs(count, (prompt, prompt), (most, most), seed)
        wanted = [
            SamplingParams(temperature=0.6, seed=i, max_tokens=most, structured_outputs={"json": w.schema(i % 8)})
            for i in range(count)
        ]
        outputs, seconds = timed(llm, jobs, wanted)
        lengths = [len(output.token_ids) for output in outputs]
        finished = sum([output.finish_reason == "stop" for output in outputs])
        rates["new texts"].append(sum(lengths) / seconds)
        again, seconds = timed(llm, jobs, wanted)
        rates["constrained"].append(sum(len(output.token_ids) for output in again) / seconds)
        free = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length) for length in lengths]
        rates["free"].append(sum(lengths) / timed(llm, jobs, free)[1])
    best = {kind: max(found[1:]) for kind, found in rates.items()}
    row = {
        "requests": count, "prompt": prompt, "output, most": most, "schemas": 8, "ended by themselves": finished,
        "constrained, output tokens/s": best["constrained"], "free, output tokens/s": best["free"],
        "of free": best["constrained"] / best["free"], "new texts, output tokens/s": best["new texts"],
        "new texts, of free": best["new texts"] / best["free"], "first, output tokens/s": rates["new texts"][0],
    }  # fmt: skip
    print("  constrained", {k: round(v, 2) for k, v in row.items()}, flush=True)
    return row


def timed(llm: LLM, jobs: list[w.Job], wanted: list[SamplingParams]) -> tuple[list, float]:
    """Outputs, and seconds that they took."""
    synchronize()
    start = time.perf_counter()
    outputs = llm.generate([job.prompt for job in jobs], wanted, use_tqdm=False)
    synchronize()
    return outputs, time.perf_counter() - start


SPECIAL = {
    "greedy": {"temperature": 0.0}, "top_p 0.9": {"top_p": 0.9}, "top_k 50": {"top_k": 50},
    "min_p 0.05": {"min_p": 0.05}, "top_k 20, top_p 0.95": {"top_k": 20, "top_p": 0.95},
    "repetition 1.1, greedy": {"temperature": 0.0, "repetition_penalty": 1.1}, "logprobs 1": {"logprobs": 1},
    "min_tokens, greedy": {"temperature": 0.0, "min_tokens": 16, "ignore_eos": False},
}  # fmt: skip


def special(bench: Bench) -> dict:
    """What requests cost that ask for more than a temperature: many at once, and one alone; each between plain ones."""
    llm, (prompt, output) = bench.llm(), bench.sizes.special
    rows: dict[str, dict[str, dict]] = {}
    for count in (bench.sizes.special_requests, 1):
        for name, options in SPECIAL.items():
            base = {"temperature": 0.0} if options.get("temperature") == 0 else {}
            rates: dict[str, list[float]] = {"special": [], "plain": []}
            for seed in range(bench.sizes.special_runs + 1):
                for kind, more in (("plain", base), ("special", options)):
                    jobs = w.random_jobs(count, (prompt, prompt), (output, output), 2 * seed + (kind == "special"))
                    given = {"temperature": 0.6, "ignore_eos": True, "max_tokens": output, **more}
                    if "min_tokens" in more:
                        given["min_tokens"] = output  # so that every step forbids the end
                    synchronize()
                    start = time.perf_counter()
                    llm.generate([job.prompt for job in jobs], SamplingParams(**given), use_tqdm=False)
                    rates[kind].append(count * output / (time.perf_counter() - start))
            best = {kind: max(values[1:]) for kind, values in rates.items()}  # a busy host only ever slows down
            rows.setdefault(str(count), {})[name] = {
                "output tokens/s": best["special"], "plain, output tokens/s": best["plain"],
                "of plain": best["special"] / best["plain"],
            }  # fmt: skip
            print(
                f"  special  {count:3} x {name:24} {best['special']:9,.0f} tokens/s,"
                f" {best['special'] / best['plain']:.2f} of {'greedy' if base else 'plain'}",
                flush=True,
            )
    return {"prompt": prompt, "output": output, **rows}


def steady(llm: LLM, batch: int, outputs: int) -> list[str]:
    """`batch` requests that all decode, under way -> their keys."""
    keys = [
        llm.engine.add_request(job.prompt, params(job))
        for job in w.random_jobs(batch, (128, 128), (outputs, outputs), seed=batch)
    ]
    waiting = set(keys)
    while waiting:
        waiting -= {out.request_id for out in llm.engine.step() if out.new_token_ids}
    for _ in range(5):
        llm.engine.step()
    synchronize()
    return keys


def steps_seconds(llm: LLM, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        llm.engine.step()
    synchronize()
    return (time.perf_counter() - start) / count


def idle(bench: Bench) -> dict | None:
    """The GPU's idle time, by batch: with the profiler's timeline, and against the time of steps without it."""
    if not GPU:
        print("  idle     skipped: needs a GPU")
        return None
    return {str(batch): idle_row(bench.llm(), batch, bench.sizes.idle_steps) for batch in bench.sizes.idle_batches}


def idle_row(llm: LLM, batch: int, count: int) -> dict:
    from torch.profiler import ProfilerActivity, profile

    keys, traces = steady(llm, batch, 20 * count), []
    for steps in (3, count, count, count):  # the first profile pays for the start of CUPTI
        before = steps_seconds(llm, count)
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            profiled = steps_seconds(llm, steps)
        plain = (before + steps_seconds(llm, count)) / 2  # contexts grow: this is the mean of what lies in between
        traces.append((w.idle(spans(trace), steps), plain, profiled))
    found, plain, profiled = sorted(traces[1:], key=lambda t: t[0]["idle"])[1]
    for key in keys:
        llm.engine.abort(key)
    while llm.engine.has_unfinished():
        llm.engine.step()
    busy = found.pop("busy") * 1e-6 / count
    split = "" if found["between steps"] is None else f", {found['between steps']:.1%} between steps"
    print(
        f"  idle     batch {batch:3}: step {1e6 * plain:7.0f} µs, GPU idle {found['idle']:.1%} of the trace{split};"
        f" {1 - busy / plain:.1%} of a step without the profiler",
        flush=True,
    )
    return {
        "step, s": plain, "step with the profiler, s": profiled, "busy a step, s": busy,
        "idle without the profiler": 1 - busy / plain, "whole, s": found.pop("whole") * 1e-6, **found,
    }  # fmt: skip


def spans(trace) -> list[w.Span]:
    """The GPU's work in a profile, in µs."""
    from torch.autograd import DeviceType

    found = [e for e in trace.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    other = ("Memcpy", "Memset")
    return [
        w.Span(e.time_range.start, e.time_range.end, not e.name.startswith(other), e.name.startswith("Memcpy DtoH"))
        for e in found
    ]


def poisson(bench: Bench) -> dict:
    """Requests that arrive at fractions of the saturated rate."""
    llm, sizes = bench.llm(), bench.sizes
    lengths = sizes.open_prompts, sizes.open_outputs
    saturating = w.random_jobs(sizes.open_requests, *lengths, seed=1)
    run(llm, saturating[: sizes.open_requests // 4])
    tokens = sum(job.max_tokens for job in saturating)
    saturated = tokens / run(llm, saturating)[0]
    per_second, rows = saturated / tokens * len(saturating), {}
    for fraction in sizes.open_fractions:
        jobs = w.poisson_jobs(fraction * per_second, sizes.open_seconds, *lengths, seed=2)
        served = w.serve(llm.engine, jobs, params, sizes.open_limit, time.perf_counter, time.sleep)
        row = w.summary(served, sizes.open_seconds, TTFT_LIMIT, TOKEN_LIMIT)
        rows[str(fraction)] = {"requests/s": fraction * per_second, **row}
        print(f"  poisson  {fraction:4.0%}: {fraction * per_second:6.1f} requests/s, {latencies(row)}", flush=True)
    return {"saturated output tokens/s": saturated, "saturated requests/s": per_second, "rates": rows}


def latencies(row: dict) -> str:
    parts = []
    for name in ("TTFT, s", "ITL, s"):
        if row[name]:
            parts.append(f"{name[:4].rstrip(',')} {'/'.join(f'{1e3 * x:.1f}' for x in row[name].values())} ms")
    return f"{', '.join(parts)} (p50/p90/p99), goodput {row['goodput, requests/s']:.1f}/s"


def chat(bench: Bench) -> dict:
    """Conversations with a common beginning, with and without the prefix cache."""
    on, off = (chat_row(bench, caching) for caching in (True, False))  # the latter's engine stays for the next part
    return {"on": on, "off": off, "on against off": on["output tokens/s"] / off["output tokens/s"]}


def chat_row(bench: Bench, caching: bool) -> dict:
    llm = bench.llm(enable_prefix_caching=caching)
    conversations(llm, bench.sizes, seed=0)
    llm.engine.metrics.reset()
    runs = [conversations(llm, bench.sizes, seed) for seed in range(1, bench.sizes.chat_runs + 1)]
    hits = llm.engine.metrics.num_cached_tokens / llm.engine.metrics.num_prompt_tokens
    if (hits > 0) != caching:
        raise AssertionError(f"prefix caching {caching}, but {hits:.1%} of the prompts' tokens were cached")
    row = {
        "output tokens/s": statistics.median(tokens / seconds for tokens, seconds, _ in runs),
        "seconds": [seconds for _, seconds, _ in runs], "hit rate": hits,
        "TTFT, s": w.spread([t for *_, ttft in runs for t in ttft]),
    }  # fmt: skip
    ttft = "/".join(f"{1e3 * t:.0f}" for t in row["TTFT, s"].values())
    print(
        f"  chat     prefix caching {'on ' if caching else 'off'} {row['output tokens/s']:9,.0f} tokens/s,"
        f" hits {hits:.1%}, TTFT {ttft} ms (p50/p90/p99)",
        flush=True,
    )
    return row


def conversations(llm: LLM, sizes: w.Sizes, seed: int) -> tuple[int, float, list[float]]:
    """All turns of all conversations, turn by turn -> (output tokens, seconds, every TTFT)."""
    system, users = w.messages(sizes.conversations, sizes.turns, sizes.system, sizes.message, seed)
    histories, whole, ttft = [list(system) for _ in users], 0.0, []
    for turn in range(sizes.turns):
        for history, said in zip(histories, users, strict=True):
            history += said[turn]
        seconds, outputs = run(llm, [w.Job(list(history), sizes.message) for history in histories])
        whole += seconds
        for history, output in zip(histories, outputs, strict=True):
            history += output.token_ids
            ttft.append(output.metrics.time_to_first_token)
    return sizes.conversations * sizes.turns * sizes.message, whole, ttft
