"""What chapter 14 quotes: SmolLM2 on three tasks, with guesses and without: how many are right, what that gains for one
stream and for many, what a step with guesses costs, and how often an early layer already knows the next token.

    python benchmarks/chapter_14.py               everything
    python benchmarks/chapter_14.py tasks exits   these parts again; the rest of the recorded file stays
    python benchmarks/chapter_14.py --small       few tokens: does it run? Nothing is recorded

Engines run in turn, the same requests; the median of the rounds counts. Prompts come out of the prefix cache, so
decoding is what is timed. Guesses: "chosen" checks as many as promise the most tokens a second, "always 8" all of them,
both by prompt lookup; "head" is the head that draft_head.py has trained, where it is, as many as promise the most. On a
CPU there are fewer requests and shorter answers, and what counts is processor time, which others on the machine disturb
less: set OMP_NUM_THREADS=1.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import parts_asked, run_parts
from speculation import MODEL, TASKS, asked, chat, head_folder

from minillm import LLM, SamplingParams
from minillm.engine.speculative import look_up_one
from minillm.generate import cached
from minillm.kernels import use
from minillm.model import Transformer
from minillm.model.weights import load

GPU, SMALL = torch.cuda.is_available(), "--small" in sys.argv[1:]
DEVICE, DTYPE = ("cuda", "bfloat16") if GPU else ("cpu", "float32")
COUNT = 8  # guesses


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    prompts: int  # of each task, one after another
    tokens: int  # of an answer, at most
    rounds: int
    temperatures: tuple[float, ...]
    batches: tuple[int, ...]
    batch_tokens: int  # of each answer, exactly
    texts: int  # of each task, for the early exits


FULL = Sizes(6, 192, 3, (0.0, 0.8), (1, 2, 4, 8, 16, 32, 64, 128, 256), 96, 16)
ON_CPU = Sizes(1, 64, 2, (0.0,), (1, 4), 24, 1)
LITTLE = Sizes(1, 8, 1, (0.0, 0.8), (1, 2), 4, 1)
SIZES = LITTLE if SMALL else FULL if GPU else ON_CPU
Save = Callable[[dict], None]
clock = time.perf_counter if GPU else time.process_time
ENGINES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "chosen": {"method": "ngram", "num_speculative_tokens": COUNT},
    "always 8": {"method": "ngram", "num_speculative_tokens": COUNT, "adaptive": False},
    "head": None,  # once it is trained
}


class Bench:
    """The engines, each made when it is first asked for, and the tasks as token ids."""

    def __init__(self) -> None:
        self._llms: dict[str, LLM] = {}

    def llm(self, name: str) -> LLM:
        if name not in self._llms:
            given = ENGINES[name]
            if name == "head":
                given = {"method": "draft_head", "path": head_folder(), "num_speculative_tokens": 4}
            start = time.perf_counter()
            self._llms[name] = LLM(
                MODEL, dtype=DTYPE, max_model_len=512, max_num_seqs=max(SIZES.batches), enable_prefix_caching=True,
                num_blocks=16_384 if GPU else 1024, speculative_config=given,
            )  # fmt: skip
            print(f"{name}: ready in {time.perf_counter() - start:.1f} s", flush=True)
        return self._llms[name]

    def names(self) -> list[str]:
        return [name for name in ENGINES if name != "head" or head_folder().is_dir()]

    def prompts(self, task: str, count: int) -> list[list[int]]:
        return chat(self.llm("plain"), asked(task, count))


def seconds_of(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams, together: bool) -> tuple[float, list]:
    """How long these take, at once or one after another; the tokens of each."""
    jobs = [list(prompts)] if together else [[prompt] for prompt in prompts]
    start, outputs = clock(), []
    for job in jobs:
        outputs += [list(o.token_ids) for o in llm.generate(job, params, use_tqdm=False)]
    return clock() - start, outputs


def counted(llm: LLM, requests: int) -> dict:
    """What the engine counted since the last reset. Of a request all tokens but the first come in decode steps, each
    of which gives one and those of its guesses that are right.
    """
    m = llm.engine.metrics
    decoded = m.num_generated_tokens - requests
    return {
        "tokens": m.num_generated_tokens, "checks": m.num_drafts, "guesses": m.num_draft_tokens,
        "right": m.num_accepted_tokens, "right by place": list(m.num_accepted_tokens_per_pos),
        "tokens a step": decoded / max(1, decoded - m.num_accepted_tokens),
    }  # fmt: skip


def sameness(outputs: Sequence[list[int]], plain: Sequence[list[int]]) -> dict:
    """How many answers are the same, and the share of tokens before the first that is not."""
    before = [next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))
              for x, y in zip(outputs, plain, strict=True)]  # fmt: skip
    return {"same": sum(x == y for x, y in zip(outputs, plain, strict=True)),
            "of": len(plain), "share of tokens": sum(before) / sum(map(len, plain))}  # fmt: skip


def compared(
    bench: Bench, names: Sequence[str], prompts: Sequence[list[int]], params: SamplingParams, together: bool
) -> dict[str, dict]:  # fmt: skip
    """The same requests by each engine, in turn, after a round that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, dict] = {}
    plain: list[list[int]] = []
    for turn in range(1 + SIZES.rounds):
        for name in names:
            llm = bench.llm(name)
            llm.engine.metrics.reset()
            seconds, outputs = seconds_of(llm, prompts, params, together)
            if turn == 0:
                plain = outputs if name == "plain" else plain
                continue
            times[name].append(seconds)
            found[name] = counted(llm, len(prompts)) | sameness(outputs, plain)
    for name, row in found.items():
        row["seconds"] = times[name]
        row["tokens/s"] = row["tokens"] / statistics.median(times[name])
        row["of plain"] = row["tokens/s"] / found["plain"]["tokens/s"]
    return found


def show(*words: Any, **rows: dict) -> None:
    for name, row in rows.items():
        print(*words, name, f"{row['tokens/s']:.0f} tokens/s, {row['of plain']:.2f} of plain, "
              f"{row['tokens a step']:.2f} tokens a step, same {row['same']}/{row['of']}", flush=True)  # fmt: skip


# ---- one stream ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def speculate(
    model: Transformer, tokens: list[int], count: int, guess: Callable[[list[int]], list[int]]
) -> tuple[list[int], int]:  # fmt: skip
    """Greedy decoding of `count` tokens, several a step, without a cache.  -> tokens, steps"""
    end, steps = len(tokens) + count, 0
    while len(tokens) < end:
        guesses = guess(tokens)[: end - len(tokens) - 1]
        logits = model.logits(model(torch.tensor([tokens + guesses], device=model.device)))[0]
        drawn = logits[len(tokens) - 1 :].argmax(-1).tolist()  # one more than there are guesses
        right = next((j for j, token in enumerate(guesses) if token != drawn[j]), len(guesses))
        tokens, steps = tokens + drawn[: right + 1], steps + 1
    return tokens, steps


def plain_part(bench: Bench, save: Save) -> None:
    """The function above gives what a step a token gives, in fewer steps."""
    model, prompt = load(MODEL, DEVICE, "float32"), bench.prompts("copy-edit", 1)[0]
    with use("torch"):
        expected = list(cached(model, prompt, SamplingParams(temperature=0, max_tokens=SIZES.batch_tokens)))
        found, steps = speculate(model, prompt, len(expected), lambda tokens: look_up_one(tokens, COUNT, 3, 2))
    assert found == prompt + expected
    save({"tokens": len(expected), "steps": steps})


def tasks_part(bench: Bench, save: Save) -> None:
    """One request at a time, until its answer ends."""
    rows: list[dict] = []
    for task in TASKS:
        prompts = bench.prompts(task, SIZES.prompts)
        for temperature in SIZES.temperatures:
            params = SamplingParams(temperature=temperature, seed=0, max_tokens=SIZES.tokens)
            found = compared(bench, bench.names(), prompts, params, together=False)
            rows.append({"task": task, "temperature": temperature, "engines": found})
            show(task, temperature, **found)
            save(
                {"requests": SIZES.prompts, "most tokens": SIZES.tokens, "guesses": COUNT, "dtype": DTYPE, "rows": rows}
            )


# ---- many requests ---------------------------------------------------------------------------------------------------


def batches_part(bench: Bench, save: Save) -> None:
    """As many requests at once, different ones, with answers of equal length; and what the engine measured of steps."""
    rows: list[dict] = []
    costs = bench.llm("chosen").engine.speculation.costs
    params = SamplingParams(temperature=0, max_tokens=SIZES.batch_tokens, ignore_eos=True)
    for task in TASKS:
        prompts = bench.prompts(task, max(SIZES.batches))
        for batch in SIZES.batches:
            found = compared(bench, bench.names(), prompts[:batch], params, together=True)
            rows.append({"task": task, "batch": batch, "engines": found})
            show(task, batch, **found)
            save({"tokens": SIZES.batch_tokens, "guesses": COUNT, "rows": rows,
                  "costs": {"plain": costs.plain, "checked": costs.checked}})  # fmt: skip


# ---- early exits -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def exits_part(bench: Bench, save: Save) -> None:
    """The model's own greedy answers, read once: at how many places would the head, put behind an early layer, have
    said the same token, and how often for j places in a row.
    """
    params = SamplingParams(temperature=0, max_tokens=SIZES.tokens)
    texts = [prompt for task in TASKS for prompt in bench.prompts(task, SIZES.texts)]
    _, outputs = seconds_of(bench.llm("plain"), texts, params, together=True)
    model = load(MODEL, DEVICE, DTYPE)
    layers, rows = len(model.layers), {}
    hidden: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, out: hidden.append(out))
    right: dict[int, list[torch.Tensor]] = {n: [] for n in range(1, layers)}
    for prompt, answer in zip(texts, outputs, strict=True):
        hidden.clear()
        with use("torch"):
            last = model(torch.tensor([prompt + answer], device=DEVICE))
            said = model.logits(last)[0, len(prompt) - 1 : -1].argmax(-1)
            for n in right:
                early = model.logits(model.norm(hidden[n - 1]))[0, len(prompt) - 1 : -1].argmax(-1)
                right[n].append((early == said).cpu())
    for n, found in right.items():
        agree = torch.cat(found).double()
        rows[n] = {"agree": float(agree.mean()), "in a row": [in_a_row(found, j) for j in range(1, COUNT + 1)]}
    print({n: round(row["agree"], 3) for n, row in rows.items() if n % 4 == 0 or n > 25}, flush=True)
    c = model.config
    save({"layers": layers, "texts": len(texts), "tokens": sum(map(len, outputs)), "rows": rows,
          "head's share": c.vocab_size * c.hidden_size / c.num_parameters()})  # fmt: skip


def in_a_row(found: Sequence[torch.Tensor], length: int) -> float:
    """At what share of places the next `length` are all right, of those that have so many behind them."""
    windows = [x.unfold(0, length, 1).all(1).double() for x in found if len(x) >= length]
    return float(torch.cat(windows).mean()) if windows else 0.0


PARTS = {"plain": plain_part, "exits": exits_part, "tasks": tasks_part, "batches": batches_part}


def main() -> None:
    run_parts("chapter_14", PARTS, parts_asked(PARTS), Bench(), not SMALL)


if __name__ == "__main__":
    main()
