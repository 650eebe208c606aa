"""SmolLM2's draft head: what the model says itself, a head trained on that, how often its guesses are right.

    python benchmarks/draft_head.py            on a GPU: two minutes and a half at most; the head goes into the cache
    python benchmarks/draft_head.py --small    a few texts and steps: does it run? Nothing is recorded or kept

The texts to learn from and those to judge by share no names, places, topics or sentences (speculation.py). Judged is
how often guess 1, 2, ... is the model's likeliest token where those before it were: `draft_training.agreement`, over
greedy answers; then with an engine that always checks as many guesses, by what it accepted.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import record
from speculation import MODEL, TASKS, asked, chat, head_folder, training_prompts

from minillm import LLM, SamplingParams
from minillm.adapters.training import Example
from minillm.engine.draft_head import DraftHead, save_head
from minillm.engine.draft_training import agreement, new_head, own_outputs, train_head
from minillm.model import Transformer

GPU, SMALL = torch.cuda.is_available(), "--small" in sys.argv[1:]
PROMPTS, ANSWER, STEPS, BATCH, MOST_TOKENS = (12, 24, 6, 4, 2048) if SMALL else (6144, 256, 1000, 64, 8192)
SECONDS = 60  # that training may take: fewer steps on a slower device
JUDGED = 2 if SMALL else 64  # texts of each task
COUNT = 4  # guesses
OPTIONS: dict[str, Any] = {"device": "cuda" if GPU else "cpu", "max_model_len": 1024, "enable_prefix_caching": False}


def texts() -> tuple[Transformer, list[Example], dict[str, list[Example]], dict]:
    """The model; what it says, half of it greedily; its greedy answers to each task; and what that took."""
    llm, start = LLM(MODEL, **OPTIONS), time.perf_counter()
    prompts = chat(llm, training_prompts(PROMPTS))
    params = [SamplingParams(temperature=0.0 if i % 2 else 0.8, seed=i, max_tokens=ANSWER) for i in range(len(prompts))]
    examples = own_outputs(llm.engine, prompts, params)
    seconds = time.perf_counter() - start
    greedy = SamplingParams(temperature=0, max_tokens=ANSWER)
    judged = {task: own_outputs(llm.engine, chat(llm, asked(task, JUDGED)), greedy) for task in TASKS}
    tokens = sum(example.count for example in examples)
    print(f"{len(examples)} answers of {tokens} tokens in {seconds:.1f} s", flush=True)
    return llm.model, examples, judged, {"answers": len(examples), "tokens": tokens, "seconds": seconds}


def step_seconds(model: Transformer, examples: list[Example]) -> float:
    """Of one training step, by a head that is thrown away."""
    head, some = new_head(model, examples, MOST_TOKENS), examples[: 2 * BATCH]
    train_head(head, some, 3, batch_size=BATCH, progress=False)
    start = time.perf_counter()
    train_head(head, some, 10, batch_size=BATCH, progress=False)
    return (time.perf_counter() - start) / 10


def learn(head: DraftHead, examples: list[Example]) -> dict:
    """Train -> what is recorded of it."""
    steps = min(STEPS, max(10, int(SECONDS / step_seconds(head.model, examples))))
    start = time.perf_counter()
    losses = train_head(head, examples, steps, batch_size=BATCH, progress=False)
    seconds, every = time.perf_counter() - start, max(1, steps // 50)
    print(f"{steps} steps in {seconds:.1f} s, loss {losses[0]:.2f} to {losses[-1]:.2f}", flush=True)
    curve = [[step, sum(losses[step : step + every]) / every] for step in range(0, steps - every + 1, every)]
    return {"steps": steps, "seconds": seconds, "batch": BATCH, "[step, mean loss from there on]": curve}


def accepted(judged: dict[str, list[Example]], folder: Path) -> dict:
    """By an engine that always checks all guesses: of each task the share accepted by place, and tokens a step."""
    config = {"method": "draft_head", "path": str(folder), "num_speculative_tokens": COUNT, "adaptive": False}
    llm, found = LLM(MODEL, speculative_config=config, **OPTIONS), {}
    for task, examples in judged.items():
        m = llm.engine.metrics
        before = [m.num_drafts, *(m.num_accepted_tokens_per_pos or [0] * COUNT)]
        prompts = [list(example.token_ids[: example.given]) for example in examples]
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=ANSWER), use_tqdm=False)
        drafts, *right = (b - a for a, b in zip(before, [m.num_drafts, *m.num_accepted_tokens_per_pos], strict=True))
        found[task] = {
            "accepted by place, of drafts": [n / max(1, drafts) for n in right],
            "tokens a step": 1 + sum(right) / max(1, drafts),
        }
        print(f"  {task:10} {found[task]['tokens a step']:.2f} tokens a step", flush=True)
    return found


def main() -> None:
    begin = time.perf_counter()
    model, examples, judged, generated = texts()
    head = new_head(model, examples, MOST_TOKENS)
    before = {task: agreement(head, texts, COUNT) for task, texts in judged.items()}
    training = learn(head, examples)
    after = {task: agreement(head, texts, COUNT) for task, texts in judged.items()}
    for task in TASKS:
        print(f"  {task:10} {[round(x, 2) for x in before[task]]} to {[round(x, 2) for x in after[task]]}", flush=True)
    head.rates = [sum(rates) / len(rates) for rates in zip(*after.values(), strict=True)]
    folder = save_head(head, Path(tempfile.mkdtemp()) / "head" if SMALL else head_folder())
    parameters = sum(p.numel() for p in head.parameters())
    engine = accepted(judged, folder)
    results = {
        "model": MODEL, "generated": generated, "training": training, "parameters": parameters,
        "tokens that it can guess": len(head.token_ids),
        "agreement of guess 1, 2, ..., those before right": {
            task: {"untrained": before[task], "trained": after[task]} for task in TASKS
        },
        "engine": engine, "seconds in all": time.perf_counter() - begin,
    }  # fmt: skip
    if SMALL:
        shutil.rmtree(folder.parent)
    else:
        print(record("draft_head", results))


if __name__ == "__main__":
    main()
