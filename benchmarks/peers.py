"""The parts of benchmarks/engine.py that compare with transformers on the same requests, in the same run."""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from logging import getLogger
from pathlib import Path

import torch
import workloads as w
from engine_parts import DTYPE, GPU, Bench, run

from minillm import LLM, SamplingParams
from minillm.model.weights import model_path

Prompts = list[list[int]]
COUNTRIES = ["France", "Japan", "Brazil", "Kenya", "Canada", "Egypt", "Norway", "Peru"]
COUNTRIES += ["India", "Italy", "Ghana", "Chile", "Turkey", "Spain", "Vietnam", "Mexico"]


def against_transformers(bench: Bench) -> dict:
    """transformers on the same requests: equally long ones, which suits its static batch best."""
    count, prompt, output = bench.sizes.peers

    def jobs(seed: int) -> list[w.Job]:
        return w.random_jobs(count, (prompt, prompt), (output, output), seed)

    def ours(size: int) -> float:
        run(bench.llm(), jobs(0)[:size])
        return size * output / statistics.median(run(bench.llm(), jobs(s)[:size])[0] for s in range(1, 6))

    rows = {"minillm": {"output tokens/s": ours(count)}, "minillm, one stream": {"output tokens/s": ours(1)}}
    bench.free()
    rows |= measure(bench.directory, lambda seed: [j.prompt for j in jobs(seed)], output, getattr(torch, DTYPE))
    for name, row in rows.items():
        if "error" in row:
            print(f"  peers    {name}: {row['error']}", flush=True)
            continue
        rate, base = row["output tokens/s"], rows["minillm" + (", one stream" if "one stream" in name else "")]
        row["minillm against it"] = base["output tokens/s"] / rate
        print(f"  peers    {name:34} {rate:9,.1f} tokens/s; minillm {row['minillm against it']:.2f} times", flush=True)
    return {"requests": count, "prompt": prompt, "output": output, "rows": rows}


def measure(directory: Path, prompts: Callable[[int], Prompts], new_tokens: int, dtype: torch.dtype) -> dict:
    """Output tokens/s of each way, or {"error": text}: random weights of the shape in `directory`, on the GPU if any.

    prompts(seed): equally many and equally long prompts, others for every seed, so that nothing is found in a cache.
    Each way is warmed up first: for continuous batching that includes the capture of its graphs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, logging

    logging.set_verbosity_error()
    getLogger("ContinuousBatchingLogger").setLevel("ERROR")
    with torch.device("cuda" if GPU else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=dtype).eval()
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    config = GenerationConfig(max_new_tokens=new_tokens, **settings)
    short = GenerationConfig(max_new_tokens=4, **settings)
    ways = {
        "transformers generate": lambda: generate(model, prompts, config, short),
        "transformers generate, one stream": lambda: generate(model, lambda seed: prompts(seed)[:1], config, short),
        "transformers continuous batching": lambda: continuous(model, prompts, config),
    }
    rows = {}
    for name, way in ways.items():
        try:
            rows[name] = {"output tokens/s": way()}
        except Exception as error:
            lines = str(error).splitlines() or [""]
            rows[name] = {"error": f"{type(error).__name__}: {lines[0][:200]}"}
    return rows


@torch.inference_mode()
def generate(model, prompts: Callable[[int], Prompts], config, short) -> float:
    """Tokens/s of one static batch, no padding."""

    def once(seed: int, settings) -> int:
        token_ids = torch.tensor(prompts(seed), device=model.device)  # [B, T]
        out = model.generate(token_ids, attention_mask=torch.ones_like(token_ids), generation_config=settings)
        return out[:, token_ids.shape[1] :].numel()

    once(0, short)
    start = time.perf_counter()
    count = once(1, config)  # looks at the tokens after every step, so that nothing is left to wait for
    return rate(count, len(prompts(1)) * config.max_new_tokens, time.perf_counter() - start)


def continuous(model, prompts: Callable[[int], Prompts], config) -> float:
    """Tokens/s of `generate_batch`, its manager kept from the warm-up on.

    From the first request's creation to the last one's end, as it stamps them: starting and stopping its thread does
    not count.
    """

    from transformers import ContinuousBatchingConfig

    # On a GPU its own choice; on a CPU that would be most of the memory.
    batching = None if GPU else ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)

    def once(seed: int) -> tuple[int, float]:
        start = time.perf_counter()
        outputs = model.generate_batch(
            prompts(seed), config, continuous_batching_config=batching, persistent_manager=True, progress_bar=False
        ).values()
        whole = time.perf_counter() - start
        if errors := [o.error for o in outputs if o.error]:
            raise RuntimeError(errors[0])
        stamped = max(o.lifespan[1] for o in outputs) - min(o.created_time for o in outputs)
        return sum(len(o.generated_tokens) for o in outputs), stamped if 0 < stamped < whole else whole

    try:
        once(0)
        count, seconds = once(1)
        return rate(count, len(prompts(1)) * config.max_new_tokens, seconds)
    finally:
        model.destroy_cached_continuous_batching_manager()


def rate(count: int, expected: int, seconds: float) -> float:
    """Tokens/s, when all tokens came."""
    if count != expected:
        raise RuntimeError(f"expected {expected} tokens, got {count}")
    return count / seconds


def one_after_another(output: int) -> Callable[[Prompts], Prompts]:
    """transformers' SmolLM2, greedy, `output` tokens a prompt whatever they are."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(model_path("smollm2-135m-instruct"), dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=output, pad_token_id=0)
    model.config.eos_token_id = None  # goes on after the end token, as ignore_eos says

    def theirs(prompts: Prompts) -> Prompts:
        outputs = []
        for prompt in prompts:
            token_ids = torch.tensor([prompt])  # [1, T]
            out = model.generate(token_ids, attention_mask=torch.ones_like(token_ids))
            outputs.append(out[0, len(prompt) :].tolist())
        return outputs

    return theirs


def cpu16(sizes: w.Sizes) -> dict:
    """16 requests at once through the engine against transformers one after another, greedy, the same tokens."""
    count, output, passes = sizes.cpu16
    llm = LLM("smollm2-135m-instruct", device="cpu", dtype="float32", max_num_seqs=count, max_model_len=512)
    prompts = [
        llm.chat_prompt([{"role": "user", "content": f"Tell me about {country}."}]) for country in COUNTRIES[:count]
    ]
    greedy = SamplingParams(temperature=0, ignore_eos=True, max_tokens=output)
    theirs = one_after_another(output)

    def ours(prompts: Prompts) -> Prompts:
        return [list(out.token_ids) for out in llm.generate(prompts, greedy, use_tqdm=False)]

    ours(prompts)
    theirs(prompts[:1])
    seconds: dict[str, list[float]] = {"minillm": [], "transformers": []}
    for _ in range(passes):
        found = {}
        for name, way in (("minillm", ours), ("transformers", theirs)):
            start = time.perf_counter()
            found[name] = way(prompts)
            seconds[name].append(time.perf_counter() - start)
        if found["minillm"] != found["transformers"]:
            raise AssertionError("greedy tokens differ from those of transformers")
    rates = {name: count * output / statistics.median(times) for name, times in seconds.items()}
    ratio = rates["minillm"] / rates["transformers"]
    print(
        f"SmolLM2, {count} requests: minillm at once {rates['minillm']:.1f} tokens/s, transformers one after another"
        f" {rates['transformers']:.1f}: {ratio:.2f} times (expected: at least 3)",
        flush=True,
    )
    return {
        "requests": count, "prompt tokens": sum(map(len, prompts)), "output": output, "seconds": seconds,
        "output tokens/s": rates, "ratio": ratio,
    }  # fmt: skip


def cpu_stream(sizes: w.Sizes) -> dict:
    """One answer on a CPU, what a reader sees first: a question in the chat format, greedy and with top-p, and with
    weights in fewer bits, in turn with transformers; and llama.cpp on the 4-bit file, where xllamacpp is installed and
    $GGUF names that file.
    """
    output, passes = sizes.cpu_stream
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 512, "enable_prefix_caching": False}
    llm = LLM("smollm2-135m-instruct", **options)
    prompt = llm.chat_prompt([{"role": "user", "content": "Tell me about France."}])
    greedy = {"temperature": 0.0, "ignore_eos": True, "max_tokens": output}
    theirs = one_after_another(output)

    def ours(llm: LLM = llm, **more: float) -> list[int]:
        return llm.generate([prompt], SamplingParams(**{**greedy, **more}), use_tqdm=False)[0].token_ids

    peer: dict[str, Callable[[], object]] = {"transformers": lambda: theirs([prompt])[0]}
    if ours() != theirs([prompt])[0]:
        raise AssertionError("greedy tokens differ from those of transformers")
    # A round for each kind: engines that only wait disturb the caches, and llama.cpp's threads the cores.
    rounds = [
        _in_turn(peer | {"minillm": ours, "minillm, top_p 0.9": lambda: ours(temperature=0.7, top_p=0.9)}, passes)
    ]
    fewer = {q: LLM("smollm2-135m-instruct", quantization=q, **options) for q in ("int8", "int4", "w8a8")}
    rounds.append(
        _in_turn(peer | {f"minillm, {q}": partial(ours, quantized) for q, quantized in fewer.items()}, passes)
    )
    if llama := _llama_cpp(prompt, output):
        same = LLM(os.environ["GGUF"], **options)
        both = {"llama.cpp, 4 bits": llama, "minillm, the same file": partial(ours, same)}
        rounds.append(_in_turn(peer | both, passes))
    rates = {name: output / statistics.median(times) for seconds in rounds for name, times in seconds.items()}
    rates["transformers"] = output / statistics.median(rounds[0]["transformers"])
    ratios = {
        name: statistics.median(seconds["transformers"]) / statistics.median(times)
        for seconds in rounds for name, times in seconds.items()
    }  # fmt: skip
    for name, rate in rates.items():
        print(f"SmolLM2, one stream: {name:20} {rate:6.1f} tokens/s, {ratios[name]:.2f} of transformers", flush=True)
    return {
        "prompt tokens": len(prompt), "output": output, "seconds": rounds, "output tokens/s": rates,
        "of transformers": ratios,
    }  # fmt: skip


def _in_turn(ways: dict[str, Callable[[], object]], passes: int) -> dict[str, list[float]]:
    """Seconds of each way, one after another, `passes` times."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(passes):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _llama_cpp(prompt: list[int], output: int) -> Callable[[], None] | None:
    try:
        import xllamacpp
    except ImportError:
        return None
    if not (path := os.environ.get("GGUF")):
        return None
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = path, 512, 1
    params.cpuparams.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    request = {
        "prompt": prompt, "n_predict": output, "max_tokens": output, "temperature": 0, "ignore_eos": True,
        "cache_prompt": False,
    }  # fmt: skip
    return lambda: server.handle_completions(request)
