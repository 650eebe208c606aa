"""The part of benchmarks/engine.py that measures speculation: SmolLM2's own weights, tasks that repeat much or little.

First whether tokens are those of plain decoding: in fp32, and then in 16 bits with graphs, where two ways to compute
the same sum differ and a near tie may fall otherwise; of each first difference it is recorded how near the tie was.
"""

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch
from engine_parts import GPU, Bench, synchronize
from speculation import MODEL, TASKS, asked, chat, head_folder

from minillm import LLM, SamplingParams

LIMITS = {"max_model_len": 1024, "max_num_batched_tokens": 8192 if GPU else 512, "enable_prefix_caching": False}
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "ngram": {"method": "ngram", "num_speculative_tokens": 8},
    "head": {"method": "draft_head", "num_speculative_tokens": 4, "path": str(head_folder())},
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OUTPUT, RUNS = 128, 2  # tokens; runs of each method, in turn, of which the best counts
DEFINITION = {
    "tokens/s": f"of greedy answers of up to {OUTPUT} tokens, prompts included in the time; batches one after another,"
    " a batch's requests all at once; how many guesses are checked is chosen by goodput; the best of some runs",
    "ratio": "to plain decoding, on the same machine in turn",
    "margin": "logit of the token that plain decoding gave, less that of the one given here, at the first difference",
}


def engines(**options: Any) -> dict[str, LLM]:
    """One of each method; without a trained head only the other two."""
    made = {}
    for name, config in METHODS.items():
        if name == "head" and not head_folder().is_dir():
            print("no draft head: train one by benchmarks/draft_head.py", flush=True)
            continue
        start = time.perf_counter()
        made[name] = LLM(MODEL, speculative_config=config, **{**LIMITS, **options})
        print(f"{name}: engine ready in {time.perf_counter() - start:.1f} s", flush=True)
        if (speculation := made[name].engine.speculation) is not None and speculation.costs is not None:
            print(f"  costs {speculation.costs}", flush=True)
    return made


def answers(llm: LLM, prompts: Sequence[list[int]], output: int) -> list[list[int]]:
    made = llm.generate(list(prompts), SamplingParams(temperature=0, max_tokens=output), use_tqdm=False)
    return [list(one.token_ids) for one in made]


def differences(llms: dict[str, LLM], count: int, output: int) -> dict:
    """How many of all tasks' answers are plain decoding's, token by token, and how near the tie was elsewhere."""
    plain, found = llms["plain"], {}
    prompts = chat(plain, [text for task in TASKS for text in asked(task, count, seed=7)])
    expected = answers(plain, prompts, output)
    for name in [name for name in llms if name != "plain"]:
        got = answers(llms[name], prompts, output)
        margins = [margin(plain, *three) for three in zip(prompts, expected, got, strict=True) if three[1] != three[2]]
        found[name] = {"answers": len(prompts), "equal": len(prompts) - len(margins), "margins": sorted(margins)}
        print(f"  {name}: {found[name]}", flush=True)
    return found


@torch.inference_mode()
def margin(llm: LLM, prompt: list[int], expected: list[int], got: list[int]) -> float:
    """By how much plain decoding's token was the likelier one, where the two part; of equal beginnings 0."""
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
    if at is None:
        return 0.0
    ids = torch.tensor([[*prompt, *expected[:at]]], device=llm.model.device)
    logits = llm.model.logits(llm.model(ids)[0, -1])
    return float(logits[expected[at]] - logits[got[at]])


def measure(llm: LLM, prompts: Sequence[list[int]], batch: int, output: int) -> dict:
    """One run: batches one after another."""
    m = llm.engine.metrics
    before = m.num_drafts, m.num_draft_tokens, m.num_accepted_tokens, m.num_generated_tokens
    synchronize()
    start = time.perf_counter()
    for first in range(0, len(prompts), batch):
        answers(llm, prompts[first : first + batch], output)
    seconds = time.perf_counter() - start
    after = m.num_drafts, m.num_draft_tokens, m.num_accepted_tokens, m.num_generated_tokens
    drafts, guesses, right, tokens = (b - a for a, b in zip(before, after, strict=True))
    return {
        "tokens/s": tokens / seconds, "drafts": drafts, "guesses": guesses, "accepted": right,
        "tokens": tokens, "tokens a request's step": tokens / max(1, tokens - right),
    }  # fmt: skip


def speculative(bench: Bench) -> dict | None:
    """Tasks by batch sizes by methods; of SmolLM2 alone."""
    if bench.shape != "smollm2" and GPU:
        return None
    batches, output, runs = (BATCHES, OUTPUT, RUNS) if GPU else ((1, 2), 24, 1)
    bench.free()
    exact = differences(engines(dtype="float32", enforce_eager=True, max_num_seqs=32), 8 if GPU else 1, 96)
    gc.collect()
    llms = engines(**bench.options) if GPU else engines(max_num_seqs=4)
    rows: dict[str, Any] = {"fp32": exact, "16 bits, graphs": differences(llms, 8, output) if GPU else {}}
    for task in TASKS:
        rows[task] = {}
        for batch in batches:
            prompts = chat(llms["plain"], asked(task, max(batch, 4 if GPU else 1), seed=batch))
            found: dict[str, dict] = {}
            for _ in range(runs):
                for name, llm in llms.items():
                    one = measure(llm, prompts, batch, output)
                    found[name] = max(found.get(name, one), one, key=lambda row: row["tokens/s"])
            for row in found.values():
                row["ratio"] = row["tokens/s"] / found["plain"]["tokens/s"]
            rows[task][str(batch)] = found
            said = ", ".join(f"{name} {row['tokens/s']:,.0f} ({row['ratio']:.2f})" for name, row in found.items())
            print(f"  {task:10} x {batch:3}: {said}", flush=True)
    methods = {name: {**(METHODS[name] or {}), "path": None} for name in llms}
    return {"model": MODEL, "methods": methods, "output": output, **rows}
