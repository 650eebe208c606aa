"""What chapter 13 quotes: prompts and constraints, measured on SmolLM2.

    python benchmarks/chapter_13.py                   all parts for this device; a GPU needs some two minutes
    python benchmarks/chapter_13.py shots cot         these parts again; the rest of the recorded file stays
    python benchmarks/chapter_13.py --small           three layers, few cases: does it run? Nothing is recorded

Accuracy is computed in fp32, over `data.reviews` and `data.word_problems`; every share has Wilson's interval, every
difference is paired, with a bootstrap. On a CPU there are fewer cases: how many, the record says.
"""

import dataclasses
import itertools
import json
import math
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import parts_asked, run_parts
from torch import Tensor

from minillm import LLM, SamplingParams
from minillm.config import LLAMA_3_8B
from minillm.constrained import Vocabulary, compile_constraint
from minillm.data import held_out, reviews, word_problems
from minillm.model import Transformer
from minillm.model.weights import model_path
from minillm.prompting import (
    Difference,
    Shot,
    answer_of,
    calibrated,
    difference,
    few_shot,
    label_scores,
    pick,
    share,
)

MODEL = "smollm2-135m-instruct"
GPU, SMALL = torch.cuda.is_available(), "--small" in sys.argv[1:]
TEMPLATE = "Review: {text}\nSentiment:{label}"
LABELS = (" positive", " negative")
NOTHING = ("N/A", "[MASK]", "")  # texts that say nothing, as in Zhao et al., 2021


def size(gpu: int, cpu: int, small: int) -> int:
    """How many, by device."""
    return small if SMALL else gpu if GPU else cpu


def language_model(dtype: str, count: int) -> LLM:
    llm = LLM(MODEL, dtype=dtype, max_num_seqs=count, max_model_len=2048, num_blocks=8192 if GPU else 1024)
    if SMALL:
        llm.model.layers = llm.model.layers[:3]
    return llm


class Bench:
    """The model in fp32 with its engine, and the texts."""

    def __init__(self) -> None:
        self.llm = language_model("float32", 256 if GPU else 32)
        self.model, self.tokenizer = self.llm.model, self.llm.tokenizer
        pool, test = reviews()
        self.pool = [Shot(r.text, f" {r.label}") for r in pool]
        balanced = [r for pair in zip(*by_label(test), strict=True) for r in pair]
        self.test = balanced[: size(200, 32, 4)]
        self.texts, self.expected = [r.text for r in self.test], [LABELS.index(f" {r.label}") for r in self.test]

    def right(self, scores: Tensor) -> Tensor:
        return scores.argmax(1) == torch.tensor(self.expected)


def by_label(found: Sequence[Any]) -> tuple[list, list]:
    return tuple([r for r in found if f" {r.label}" == label] for label in LABELS)  # type: ignore[return-value]


def mean(values: Tensor) -> float:
    return float(values.double().mean())


def interval(d: Difference) -> dict:
    return {"mean": d.mean, "low": d.low, "high": d.high, "count": d.count}


# ---- attention written out -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class At:
    """Where the tokens of a call stand."""

    positions: Tensor  # [B, T]


Silenced = Mapping[tuple[int, int], Tensor | float]  # (layer, head) -> what its output is replaced by, [D] or 0


class HeadLayer:
    """Attention by the formula, so that weights can be looked at and a head's output replaced. It may begin behind the
    keys and values of a prefix that all rows share.
    """

    def __init__(self, index: int, heads: "Heads") -> None:
        self.index, self.heads = index, heads
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def slots(self, batch: At | None) -> None:
        """Nowhere."""

    def write(self, k: Tensor, v: Tensor, batch: At | None) -> None:
        """`attend` does."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: At | None) -> Tensor:
        """q [B, T, H, D], k and v [B, T, H_kv, D] -> [B, T, H, D]"""
        if self.k is not None and self.v is not None:
            k, v = (torch.cat([old.expand(len(q), -1, -1, -1), new], 1) for old, new in ((self.k, k), (self.v, v)))
        if self.heads.keeps:
            self.k, self.v = k, v
        group = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
        tokens, seen = scores.shape[2:]
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=q.device).tril(seen - tokens)
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        out = torch.einsum("bhts,bshd->bthd", weights, v)
        if self.heads.look is not None:
            self.heads.look(self.index, weights, out)
        for (layer, head), value in self.heads.silenced.items():
            if layer == self.index:
                out[:, :, head] = value
        return out


class Heads:
    """A cache of `HeadLayer`s. look(layer, weights [B, H, T, S], outputs [B, T, H, D]) is called in each."""

    def __init__(self, model: Transformer, silenced: Silenced | None = None, look: Callable | None = None) -> None:
        self.layers = [HeadLayer(i, self) for i in range(len(model.layers))]
        self.silenced, self.look, self.keeps = silenced or {}, look, False


def scored(bench: Bench, prompts: Sequence[str], labels: Sequence[str], silenced: Silenced | None = None) -> Tensor:
    """What `label_scores` gives, for labels of one token: what all prompts begin with is computed once.  -> [P, L]"""
    ids = [bench.tokenizer.encode(prompt) for prompt in prompts]
    words = [bench.tokenizer.encode(label, add_special_tokens=False) for label in labels]
    assert all(len(word) == 1 for word in words), "labels of one token"
    shared = min(len(row) for row in ids) - 1
    while any(row[:shared] != ids[0][:shared] for row in ids):
        shared -= 1
    heads, on = Heads(bench.model, silenced), bench.model.device
    if shared:
        heads.keeps = True
        bench.model(torch.tensor([ids[0][:shared]], device=on), None, heads)
        heads.keeps = False
    found = []
    for begin in range(0, len(ids), 100):
        rows = [row[shared:] for row in ids[begin : begin + 100]]
        longest = max(map(len, rows))
        batch = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=on)  # causal: nobody sees them
        positions = (shared + torch.arange(longest, device=on)).expand_as(batch)
        hidden = bench.model(batch, At(positions), heads)
        last = hidden[torch.arange(len(rows), device=on), torch.tensor([len(row) - 1 for row in rows], device=on)]
        scores = bench.model.logits(last).log_softmax(-1)[:, [word[0] for word in words]]
        found.append(scores.double().cpu())
    return torch.cat(found)


# ---- induction heads -------------------------------------------------------------------------------------------------


def repeated(bench: Bench, count: int, length: int, seed: int) -> Tensor:
    """Random tokens, then the same again.  -> [count, 2 · length]"""
    first = max(bench.tokenizer.special_tokens.values()) + 1
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(first, bench.tokenizer.vocab_size, (count, length), generator=generator)
    return torch.cat([half, half], 1).to(bench.model.device)


def nll(bench: Bench, ids: Tensor, heads: Heads) -> Tensor:
    """Of each token but the first.  [B, T] -> [B, T - 1]"""
    logits = bench.model.logits(bench.model(ids, None, heads)[:, :-1])
    return -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


class Scores:
    """Looks at weights over repeated tokens: how much of a second half's attention goes to the token behind the same
    token's first place (prefix matching), and to the token before. Each [layers, heads].
    """

    def __init__(self, length: int) -> None:
        self.length, self.induction, self.previous = length, {}, {}  # type: int, dict[int, Tensor], dict[int, Tensor]

    def __call__(self, layer: int, weights: Tensor, _: Tensor) -> None:
        second = torch.arange(self.length, 2 * self.length, device=weights.device)
        self.induction[layer] = weights[:, :, second, second - self.length + 1].mean((0, 2)).cpu()
        self.previous[layer] = weights[:, :, second, second - 1].mean((0, 2)).cpu()

    def table(self, which: dict[int, Tensor]) -> Tensor:
        return torch.stack([which[i] for i in sorted(which)])


class Means:
    """Each head's mean output, over all tokens from `begin` on of all that it sees."""

    def __init__(self, begin: int = 0) -> None:
        self.begin, self.sums, self.counts = begin, {}, {}  # type: int, dict[int, Tensor], dict[int, int]

    def __call__(self, layer: int, _: Tensor, out: Tensor) -> None:
        out = out[:, self.begin :].flatten(0, 1)  # [tokens, H, D]
        self.sums[layer] = self.sums.get(layer, 0) + out.sum(0)
        self.counts[layer] = self.counts.get(layer, 0) + len(out)

    def of(self, heads: Sequence[tuple[int, int]]) -> Silenced:
        return {(layer, head): self.sums[layer][head] / self.counts[layer] for layer, head in heads}


def ranked(table: Tensor) -> list[tuple[int, int]]:
    """(layer, head), the highest first."""
    return [divmod(int(i), table.shape[1]) for i in table.flatten().argsort(descending=True)]


def others_of(top: Sequence[tuple[int, int]], table: Tensor, seed: int) -> list[tuple[int, int]]:
    """As many heads of the same layers, drawn from those that match no prefixes."""
    draw, found = random.Random(seed), set()  # type: random.Random, set[tuple[int, int]]
    for layer, _ in top:
        left = [(layer, h) for h in range(table.shape[1]) if table[layer, h] < 0.1 and (layer, h) not in found]
        found.add(draw.choice(left) if left else draw.choice([x for x in ranked(table) if table[x] < 0.1]))
    return sorted(found)


def induction_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """Heads are ranked on some sequences, and silenced on others; so are controls."""
    count, length, draws = size(32, 4, 2), 50, size(8, 2, 1)
    look, judge, on = repeated(bench, count, length, 0), repeated(bench, count, length, 1), bench.model.device
    text = held_out(bench.tokenizer, size(8, 2, 1), 256).to(on)
    scores, means, of_text = Scores(length), Means(length), Means()
    nll(bench, look, Heads(bench.model, look=scores))
    nll(bench, look, Heads(bench.model, look=means))
    nll(bench, text, Heads(bench.model, look=of_text))
    induction, previous = scores.table(scores.induction), scores.table(scores.previous)
    tops, before = ranked(induction), ranked(previous)

    def effect(name: str, chosen: Sequence[tuple[int, int]], mean: bool = True, **about: Any) -> dict:
        now = Scores(length)
        silenced = means.of(chosen) if mean else dict.fromkeys(chosen, 0.0)
        lost = nll(bench, judge, Heads(bench.model, silenced, now)).double().cpu()
        in_text = nll(bench, text, Heads(bench.model, of_text.of(chosen) if mean else silenced)).double().cpu()
        second = lost[:, length:].mean(1)
        left = now.table(now.induction)
        return {
            "name": name, "heads": [f"{layer}.{head}" for layer, head in chosen], **about,
            "first": float(lost[:, : length - 1].mean()), "second": float(second.mean()),
            "error": float(second.std() / math.sqrt(len(second))), "text": float(in_text.mean()),
            "score of the first induction head": float(left[tops[0]]),
        }  # fmt: skip

    plain = nll(bench, judge, Heads(bench.model)).double().cpu()
    rows = [effect("none", [])]
    found: dict[str, Any] = {
        "sequences": count, "length": length, "by position": plain.mean(0).tolist(),
        "induction": induction.tolist(), "previous": previous.tolist(),
        "top": [[f"{layer}.{head}", float(induction[layer, head])] for layer, head in tops[:12]],
        "before": [[f"{layer}.{head}", float(previous[layer, head])] for layer, head in before[:6]],
        "above 0.3": int((induction > 0.3).sum()), "heads": induction.numel(), "text tokens": text.numel(),
        "chance": statistics.mean(1 / (i + 1) for i in range(length, 2 * length)), "rows": rows,
    }  # fmt: skip
    for n in (1, 2, 4, 8, 16):
        rows.append(effect("induction", tops[:n], n=n))
        rows += [effect("control", others_of(tops[:n], induction, seed), n=n, seed=seed) for seed in range(draws)]
    rows += [effect("previous", before[:n], n=n) for n in (1, 2, 3)]
    first_layer = [(0, head) for head in range(induction.shape[1])]  # none of them matches prefixes
    rows += [effect("layer 0", first_layer), effect("layer 0, zeroed", first_layer, mean=False)]
    for row in rows:
        print(row["name"], row.get("n"), f"{row['first']:.2f} {row['second']:.2f} text {row['text']:.3f}", flush=True)
    save(found)
    found["task"] = silenced_task(bench, tops, before, induction, draws)
    save(found)


def silenced_task(
    bench: Bench, tops: list[tuple[int, int]], before: list[tuple[int, int]], table: Tensor, draws: int
) -> list[dict]:
    """Eight examples, with their labels as they are or as letters without a meaning: what do the examples do, once
    heads are silent? The means are of the prompts themselves.
    """
    rows: list[dict] = []
    for name, labels in (("words", LABELS), ("letters", (" A", " B"))):
        shots = [Shot(s.text, labels[LABELS.index(s.label)]) for s in pick(bench.pool, 8, seed=0)]
        prompts = [few_shot(shots, text, TEMPLATE) for text in bench.texts]
        means = Means()
        for prompt in prompts[:4]:
            ids = torch.tensor([bench.tokenizer.encode(prompt)], device=bench.model.device)
            bench.model(ids, None, Heads(bench.model, look=means))
        nothing = [few_shot(shots, text, TEMPLATE) for text in NOTHING]
        cases = [("none", []), ("induction", tops[:8]), ("previous", before[:2])]
        cases += [("control", others_of(tops[:8], table, seed)) for seed in range(min(draws, 4))]
        plain: tuple[Tensor, Tensor] | None = None
        for which, chosen in cases:
            silenced = means.of(chosen)
            scores = scored(bench, prompts, labels, silenced)
            after = calibrated(scores, scored(bench, nothing, labels, silenced))
            rights = bench.right(scores), bench.right(after)
            plain = plain or rights
            rows.append({
                "labels": name, "name": which, "said the first": mean(scores.argmax(1) == 0),
                "accuracy": interval(share(rights[0])), "against none": interval(difference(rights[0], plain[0])),
                "calibrated": interval(share(rights[1])),
                "calibrated against none": interval(difference(rights[1], plain[1])),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


# ---- examples --------------------------------------------------------------------------------------------------------

# The same question; the last is in the chat format that the model was trained on.
WORDINGS: dict[str, tuple[str, tuple[str, str]]] = {
    "Review: … Sentiment:": (TEMPLATE, LABELS),
    "Input: … Label:": ("Input: {text}\nLabel:{label}", LABELS),
    "… This review is": ("{text}\nThis review is{label}", LABELS),
    "positive or negative?": ("{text}\nQuestion: Is this review positive or negative?\nAnswer:{label}", LABELS),
    "negative or positive?": ("{text}\nQuestion: Is this review negative or positive?\nAnswer:{label}", LABELS),
    "… It was great / terrible": ("{text} It was{label}", (" great", " terrible")),
    "… good or bad?": ("{text}\nQuestion: Was it good or bad?\nAnswer:{label}", (" good", " bad")),
    "the writer is happy / sad": ("{text}\nThe writer is{label}", (" happy", " sad")),
}


def wordings_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """Without examples: one question in many words."""
    first: Tensor | None = None
    rows: list[dict] = []
    ways: list[tuple[str, Callable[[str], str], tuple[str, str]]] = [
        (name, lambda text, template=template: few_shot([], text, template), labels)  # type: ignore[misc]
        for name, (template, labels) in WORDINGS.items()
    ]
    for name, which in (("chat: one word", "positive or negative"), ("chat: negative first", "negative or positive")):
        question = f"Is this review {which}? Answer with one word."

        def chat(text: str, question: str = question) -> str:
            return bench.tokenizer.apply_chat_template([{"role": "user", "content": f"{question}\n\n{text}"}])

        ways.append((name, chat, ("Positive", "Negative")))
    for name, prompt, labels in ways:
        scores = scored(bench, [prompt(text) for text in bench.texts], labels)
        empty = scored(bench, [prompt(text) for text in NOTHING], labels)
        right, after = bench.right(scores), bench.right(calibrated(scores, empty))
        first = right if first is None else first
        rows.append({
            "name": name, "labels": list(labels), "accuracy": interval(share(right)),
            "against the first": interval(difference(right, first)), "calibrated": interval(share(after)),
            "calibration gains": interval(difference(after, right)),
            "said positive": float((scores.argmax(1) == 0).double().mean()),
            "of nothing": float(empty.softmax(1)[:, 0].mean()),
        })  # fmt: skip
        print(name, rows[-1]["accuracy"], rows[-1]["said positive"], rows[-1]["calibrated"]["mean"], flush=True)
    save({"texts": len(bench.texts), "rows": rows})


def one_setting(bench: Bench, shots: Sequence[Shot], labels: tuple[str, str] = LABELS) -> tuple[Tensor, Tensor, Tensor]:
    """right, right when calibrated, said the first label; each bool [texts]"""
    scores = scored(bench, [few_shot(shots, text, TEMPLATE) for text in bench.texts], labels)
    empty = scored(bench, [few_shot(shots, text, TEMPLATE) for text in NOTHING], labels)
    return bench.right(scores), bench.right(calibrated(scores, empty)), scores.argmax(1) == 0


def shots_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """How many examples, drawn how, in which order, with which words for the labels."""
    found: dict[str, Any] = {"texts": len(bench.texts), "agrees": agreement(bench)}
    zero = one_setting(bench, [])
    rows, by_k = [], []
    for k in (0, 2) if SMALL else (0, 1, 2, 4, 8, 16):
        results = []
        for seed in range(size(16, 2, 2) if k else 1):
            shots = pick(bench.pool, k, seed=seed)
            right, after, first = one_setting(bench, shots)
            results.append((right, after))
            rows.append({
                "k": k, "seed": seed, "accuracy": mean(right), "calibrated": mean(after),
                "said positive": mean(first), "last": shots[-1].label.strip() if shots else None,
            })  # fmt: skip
        raw, after = (torch.stack([r[i] for r in results]).double().mean(0) for i in (0, 1))  # a text's share of seeds
        by_k.append({
            "k": k, "seeds": len(results), "accuracy": interval(difference(raw, torch.zeros_like(raw))),
            "calibrated": interval(difference(after, torch.zeros_like(raw))),
            "calibration gains": interval(difference(after, raw)),
            "against none": interval(difference(raw, zero[0].double())),
            "against none, both calibrated": interval(difference(after, zero[1].double())),
            "lowest": min(mean(r) for r, _ in results),
            "highest": max(mean(r) for r, _ in results),
            "lowest calibrated": min(mean(r) for _, r in results),
            "highest calibrated": max(mean(r) for _, r in results),
        })  # fmt: skip
        print(by_k[-1], flush=True)
        save(found | {"rows": rows, "by k": by_k})
    found |= {"rows": rows, "by k": by_k}
    found["orders"] = [orders(bench, seed) for seed in range(size(2, 1, 1))]
    save(found)
    found["words"] = words(bench)
    save(found)


def agreement(bench: Bench) -> float:
    """The largest difference between `scored` and `minillm.prompting.label_scores`."""
    prompts = [few_shot(pick(bench.pool, 4), text, TEMPLATE) for text in bench.texts[:6]]
    return float((scored(bench, prompts, LABELS) - label_scores(bench.llm, prompts, LABELS)).abs().max())


def orders(bench: Bench, seed: int) -> dict:
    """Four examples in all their orders, judged by the test, and by the rest of the pool, by which one may choose."""
    shots = pick(bench.pool, 4, seed=seed)
    rest = [s for s in bench.pool if s not in shots]
    expected = torch.tensor([LABELS.index(s.label) for s in rest])
    rows, rights = [], []
    for order in itertools.islice(itertools.permutations(shots), size(24, 6, 3)):
        right, after, first = one_setting(bench, order)
        rights.append((right, after))
        chosen = scored(bench, [few_shot(order, s.text, TEMPLATE) for s in rest], LABELS).argmax(1) == expected
        rows.append({
            "last": order[-1].label.strip(), "accuracy": mean(right),
            "calibrated": mean(after), "said positive": mean(first),
            "on the pool": mean(chosen), "labels": [s.label.strip() for s in order],
        })  # fmt: skip
    accuracy = [r["accuracy"] for r in rows]
    best, worst = max(range(len(rows)), key=accuracy.__getitem__), min(range(len(rows)), key=accuracy.__getitem__)
    picked = max(range(len(rows)), key=lambda i: rows[i]["on the pool"])
    return {
        "seed": seed, "rows": rows, "pool": len(rest), "picked by the pool": accuracy[picked],
        "best against worst": interval(difference(rights[best][0], rights[worst][0])),
        "the same two, calibrated": interval(difference(rights[best][1], rights[worst][1])),
        "correlation": correlation([r["on the pool"] for r in rows], accuracy),
    }  # fmt: skip


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    try:
        return statistics.correlation(a, b)
    except statistics.StatisticsError:  # all alike
        return 0.0


def words(bench: Bench) -> list[dict]:
    """Other words for the labels, and labels that are wrong. Each over the same draws of examples."""
    rows: list[dict] = []
    ways: dict[str, tuple[tuple[str, str], str]] = {
        "positive / negative": (LABELS, "right"), "good / bad": ((" good", " bad"), "right"),
        "great / terrible": ((" great", " terrible"), "right"), "A / B": ((" A", " B"), "right"),
        "foo / bar": ((" foo", " bar"), "right"), "positive / negative, drawn": (LABELS, "drawn"),
        "positive / negative, swapped": (LABELS, "swapped"),
    }  # fmt: skip
    for k in (0, 8):
        plain: Tensor | None = None
        for name, (labels, truth) in ways.items():
            if not k and truth != "right":
                continue
            results, fixed = [], []
            for seed in range(size(8, 1, 1) if k else 1):
                draw, shots = random.Random(seed), []
                for shot in pick(bench.pool, k, seed=seed):
                    i = LABELS.index(shot.label)
                    i = 1 - i if truth == "swapped" else draw.randrange(2) if truth == "drawn" else i
                    shots.append(Shot(shot.text, labels[i]))
                right, after, _ = one_setting(bench, shots, labels)
                results.append(right)
                fixed.append(after)
            raw, after = (torch.stack(r).double().mean(0) for r in (results, fixed))
            plain = raw if plain is None else plain
            rows.append({
                "k": k, "name": name, "seeds": len(results), "accuracy": interval(difference(raw, raw * 0)),
                "calibrated": interval(difference(after, after * 0)),
                "against the first": interval(difference(raw, plain)),
            })  # fmt: skip
            print(k, name, rows[-1]["accuracy"], rows[-1]["calibrated"]["mean"], flush=True)
    return rows


# ---- chain of thought ------------------------------------------------------------------------------------------------


def cot_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """Word problems: answered at once, and step by step. Greedy."""
    problems, pool = word_problems(size(400, 24, 3), seed=1), word_problems(200, seed=2)
    kinds = {steps: [p for p in pool if p.steps.count("=") == steps] for steps in (1, 2, 3)}
    shots = [kinds[steps][i] for i in (0, 1) for steps in (1, 2, 3)]
    answers = torch.tensor([p.answer for p in problems])

    def asked(shown: Callable[[Any], str], question: str, begin: str) -> str:
        lines = [f"Question: {p.question}\nAnswer: {shown(p)}" for p in shots]
        return "\n\n".join([*lines, f"Question: {question}\nAnswer:{begin}"])

    def chat(question: str, wanted: str) -> list[int]:
        return bench.llm.chat_prompt([{"role": "user", "content": f"{question} {wanted}"}])

    number = r"(-?\d[\d,]*)"
    ways: dict[str, tuple[list, int, str, list[str]]] = {
        "at once": ([asked(lambda p: f"The answer is {p.answer}.", p.question, " The answer is") for p in problems], 8,
                    rf"^\s*{number}", ["\n"]),
        "step by step": ([asked(lambda p: f"{p.steps} The answer is {p.answer}.", p.question, "") for p in problems],
                         64, rf"answer is {number}", ["\n"]),
        "chat, at once": ([chat(p.question, "Answer with the number alone.") for p in problems], 24, number, []),
        "chat, step by step": ([chat(p.question, "Let's think step by step.") for p in problems], 160, number, []),
    }  # fmt: skip
    rights, rows, found = {}, [], {}  # type: dict[str, Tensor], list[dict], dict[str, Any]
    for name, (prompts, limit, pattern, stop) in ways.items():
        params = SamplingParams(temperature=0, max_tokens=limit, stop=stop)
        outputs = bench.llm.generate(prompts, params, use_tqdm=False)
        given = [answer_of(o.text, pattern) for o in outputs]
        right = torch.tensor([a is not None and int(a.replace(",", "")) == int(b) for a, b in zip(given, answers)])  # noqa: B905
        rights[name] = right
        by_steps = {
            steps: interval(share(right[[i for i, p in enumerate(problems) if p.steps.count("=") == steps]]))
            for steps in (1, 2, 3) if any(p.steps.count("=") == steps for p in problems)
        }  # fmt: skip
        rows.append({
            "name": name, "accuracy": interval(share(right)), "by steps": by_steps,
            "no answer": sum(a is None for a in given), "tokens": statistics.mean(len(o.token_ids) for o in outputs),
            "example": {"question": problems[0].question, "answer": problems[0].answer, "output": outputs[0].text},
        })  # fmt: skip
        print(name, rows[-1]["accuracy"], rows[-1]["by steps"], repr(outputs[0].text), flush=True)
        found = {"problems": len(problems), "shots": len(shots), "rows": rows}
        save(found)
    found["step by step against at once"] = interval(difference(rights["step by step"], rights["at once"]))
    found["chat, step by step against at once"] = interval(
        difference(rights["chat, step by step"], rights["chat, at once"])
    )
    save(found | {"sums": sums(bench, problems, pool)})


def sums(bench: Bench, problems: Sequence[Any], pool: Sequence[Any]) -> dict:
    """The sums that the steps consist of, by themselves."""
    step = re.compile(r"(\d+ [-+*] \d+) = (\d+)")
    shown = [f"{a} = {b}" for p in pool[:8] for a, b in step.findall(p.steps)[:1]]
    wanted = list(dict.fromkeys(pair for p in problems for pair in step.findall(p.steps)))
    prompts = ["\n".join([*shown, f"{a} ="]) for a, _ in wanted]
    outputs = bench.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6, stop=["\n"]), use_tqdm=False)
    right = torch.tensor([o.text.strip() == b for o, (_, b) in zip(outputs, wanted, strict=True)])
    rows = {sign: interval(share(right[[f" {sign} " in a for a, _ in wanted]])) for sign in "+-*"}
    print(rows, flush=True)
    return {"all": interval(share(right)), "by sign": rows}


# ---- prompts and the prefix cache ------------------------------------------------------------------------------------


def prefix_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """One prompt's parts in several orders: tokens found in the prefix cache, and the time to the first token."""
    llm = language_model("bfloat16" if GPU else "float32", 64)
    count = size(64, 12, 3)
    shots = pick(bench.pool, 16, seed=0)
    task = "Decide whether a review is positive or negative. Answer with one word."
    shown = "\n\n".join(f"Review: {s.text}\nSentiment:{s.label}" for s in shots)
    parts = [
        (f"Request {i} of user {100 + i}, 12:{i // 60:02}:{i % 60:02}.", f"Review: {bench.texts[i % len(bench.texts)]}")
        for i in range(count)
    ]
    ways = {
        "fixed parts first": [f"{task}\n\n{shown}\n\n{who}\n{review}\nSentiment:" for who, review in parts],
        "time and user first": [f"{who}\n{task}\n\n{shown}\n\n{review}\nSentiment:" for who, review in parts],
        "examples shuffled": [
            "\n\n".join([task, *[f"Review: {s.text}\nSentiment:{s.label}" for s in random.Random(i).sample(shots, 16)],
                         f"{who}\n{review}\nSentiment:"]) for i, (who, review) in enumerate(parts)
        ],
        "review first": [f"{review}\n\n{task} Examples:\n\n{shown}\n\n{who}\nSentiment of the first:"
                         for who, review in parts],
    }  # fmt: skip
    one, rows = SamplingParams(temperature=0, max_tokens=1), []
    for _ in range(2):  # whatever is made at the first call
        llm.generate([{"prompt": p, "cache_salt": "first"} for p in ways["review first"][:2]], one, use_tqdm=False)
    for name, prompts in ways.items():
        alone = []
        for prompt in prompts:
            alone += llm.generate([{"prompt": prompt, "cache_salt": name}], one, use_tqdm=False)
        begin = time.perf_counter()
        together = llm.generate(
            [{"prompt": p, "cache_salt": f"{name}, together"} for p in prompts], one, use_tqdm=False
        )
        seconds = time.perf_counter() - begin
        tokens = sum(o.metrics.num_prompt_tokens for o in alone[1:])
        rows.append({
            "name": name, "requests": count, "tokens": tokens / (count - 1),
            "cached": sum(o.metrics.num_cached_tokens for o in alone[1:]) / tokens,
            "ttft": statistics.median(o.metrics.time_to_first_token for o in alone[1:]),
            "ttft of the first": alone[0].metrics.time_to_first_token, "together": seconds,
            "cached together": sum(o.metrics.num_cached_tokens for o in together)
            / sum(o.metrics.num_prompt_tokens for o in together),
        })  # fmt: skip
        print(rows[-1], flush=True)
        save({"block": llm.engine.config.block_size, "shots": len(shots), "rows": rows})


# ---- constraints -----------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"about": {"type": "string", "maxLength": 30}, "sentiment": {"enum": ["positive", "negative"]}},
    "required": ["about", "sentiment"],
    "additionalProperties": False,
}


def is_valid(text: str) -> bool:
    """Whether a text is JSON that fits SCHEMA, and nothing else."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(value, dict) and value.keys() == {"about", "sentiment"} and isinstance(value["about"], str)
        and len(value["about"]) <= 30 and value["sentiment"] in ("positive", "negative")
    )  # fmt: skip


def constrained_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """Reviews to JSON, free and constrained: how many are valid, how many are right."""
    pool, rows = reviews()[0], []

    def record_of(r: Any) -> str:
        return json.dumps({"about": r.about, "sentiment": r.label})

    both: dict[str, Tensor] = {}
    for k, gap in (
        (("chat", ""), (2, "\n"), (2, " ")) if SMALL else (("chat", ""), *((k, "\n") for k in (1, 2, 4, 8)), (4, " "))
    ):
        shots = [] if k == "chat" else [r for pair in zip(*by_label(pool), strict=True) for r in pair][:k]
        shown = [f"Review: {r.text}\nJSON:{gap}{record_of(r)}" for r in shots]
        if k == "chat":
            ask = f"Answer with JSON that fits this schema: {json.dumps(SCHEMA)}\n\nReview: "
            prompts = [bench.llm.chat_prompt([{"role": "user", "content": ask + r.text}]) for r in bench.test]
        else:  # a space is left out at the end: in the examples it is part of the token " {"
            prompts = [
                bench.tokenizer.encode("\n\n".join([*shown, f"Review: {r.text}\nJSON:{gap.strip(' ')}"]))
                for r in bench.test
            ]
        for name in ("free", "constrained"):
            options: dict[str, Any] = {"structured_outputs": {"json": SCHEMA}}
            if name == "free":
                options = {"stop": () if k == "chat" else "\n"}
            limit = 128 if k == "chat" else 64
            begin = time.perf_counter()
            outputs = bench.llm.generate(
                prompts, SamplingParams(temperature=0, max_tokens=limit, **options), use_tqdm=False
            )
            seconds = time.perf_counter() - begin
            texts = [o.text.strip() for o in outputs]
            inside = [found[0] if (found := re.search(r"\{.*?\}", text, re.S)) else "" for text in texts]
            valid, lenient = (torch.tensor([is_valid(t) for t in of]) for of in (texts, inside))
            values = [json.loads(t) if ok else {} for t, ok in zip(inside, lenient.tolist(), strict=True)]
            about = torch.tensor([
                v.get("about", "").strip().lower() == r.about for v, r in zip(values, bench.test, strict=True)
            ])  # fmt: skip
            label = torch.tensor([v.get("sentiment") == r.label for v, r in zip(values, bench.test, strict=True)])
            both[name] = about & label
            rows.append({
                "shots": k, "gap": gap, "name": name, "valid": interval(share(valid)),
                "valid inside": interval(share(lenient)), "right": interval(share(both[name])),
                "about": interval(share(about)), "sentiment": interval(share(label)),
                "cut": sum(o.finish_reason == "length" for o in outputs),
                "cut and invalid": sum(o.finish_reason == "length" and not is_valid(o.text) for o in outputs),
                "tokens": statistics.mean(len(o.token_ids) for o in outputs), "seconds": seconds,
                "example": {"review": bench.test[0].text, "output": outputs[0].text},
            })  # fmt: skip
            shares = {key: round(x["mean"], 3) for key, x in rows[-1].items() if isinstance(x, dict) and "mean" in x}
            print(rows[-1]["shots"], name, shares, rows[-1]["cut"], repr(outputs[0].text), flush=True)
        rows[-1]["right against free"] = interval(difference(both["constrained"], both["free"]))
        save({"texts": len(bench.test), "rows": rows})


CHOICES = (" good", " bad", " very good", " very bad", " not good", " mixed")


def mask_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """Choices of several tokens: what a mask in each step makes of p(y) / sum of p, exactly; and what greedy takes."""
    prompts = [f"Review: {text}\nIn short, the reviewer found it" for text in bench.texts]
    constraint = compile_constraint("choice", CHOICES, bench.tokenizer)
    paths = [bench.tokenizer.encode(choice, add_special_tokens=False) for choice in CHOICES]
    masks = []  # of each choice, the tokens allowed before each of its tokens, and at its end
    for path in paths:
        state, of_path = constraint.start, []
        for token in path:
            of_path.append(torch.tensor(constraint.allowed(state)))
            state = constraint.advance(state, token)
        masks.append([*of_path, torch.tensor(constraint.allowed(state))])
    end = int(bench.tokenizer.eos_token_id)
    whole, masked = torch.empty(len(prompts), len(CHOICES)), torch.empty(len(prompts), len(CHOICES))
    whole, masked = whole.double(), masked.double()
    on = bench.model.device
    longest = max(map(len, paths))
    for i, prompt in enumerate(prompts):
        given = bench.tokenizer.encode(prompt)
        ids = torch.tensor([given + path + [end] * (longest - len(path)) for path in paths], device=on)
        hidden = bench.model(ids)[:, len(given) - 1 :]
        logits = bench.model.logits(hidden).double().cpu()  # [choices, tokens + 1, vocabulary]
        for j, path in enumerate(paths):
            whole[i, j] = sum(logits[j, n].log_softmax(-1)[token] for n, token in enumerate(path))
            allowed = zip(logits[j], masks[j], [*path, end], strict=False)
            masked[i, j] = sum(
                x.masked_fill(~mask[: len(x)], -math.inf).log_softmax(-1)[token] for x, mask, token in allowed
            )
    exact, drawn = whole.softmax(1), masked.exp()  # the rest of drawn: other spellings of the same choices
    params = SamplingParams(temperature=0, max_tokens=8, structured_outputs={"choice": list(CHOICES)})
    greedy = [CHOICES.index(o.text) for o in bench.llm.generate(prompts, params, use_tqdm=False)]
    best = exact.argmax(1)
    same = best == torch.tensor(greedy)
    distance = (exact - drawn).abs().sum(1) / 2
    ratio = [float(exact[i, best[i]] / exact[i, g]) for i, g in enumerate(greedy)]
    worst = max(range(len(prompts)), key=lambda i: ratio[i])
    print(*zip(CHOICES, exact.mean(0).tolist(), drawn.mean(0).tolist(), strict=True), mean(same), flush=True)
    save({
        "texts": len(prompts), "choices": list(CHOICES),
        "exact": exact.mean(0).tolist(), "masked": drawn.mean(0).tolist(),
        "other spellings": float(1 - drawn.sum(1).mean()), "greedy is the best": interval(share(same)),
        "distance": float(distance.mean()), "greedy": [greedy.count(i) for i in range(len(CHOICES))],
        "best": [int((best == i).sum()) for i in range(len(CHOICES))], "largest ratio": ratio[worst],
        "worst": {"review": bench.texts[worst], "greedy": CHOICES[greedy[worst]], "best": CHOICES[int(best[worst])]},
    })  # fmt: skip


# ---- the plainest automaton ------------------------------------------------------------------------------------------

Regex = tuple  # ("byte", set of bytes), ("cat", a, b), ("alt", a, b), ("star", a), and these two
NOTHING_FITS: Regex = ("byte", frozenset())  # the language without a string
EMPTY: Regex = ("star", NOTHING_FITS)  # that of the empty string alone


def cat(a: Regex, b: Regex) -> Regex:
    if NOTHING_FITS in (a, b):
        return NOTHING_FITS
    return b if a == EMPTY else a if b == EMPTY else ("cat", a, b)


def alt(a: Regex, b: Regex) -> Regex:
    return b if a in (NOTHING_FITS, b) else a if b == NOTHING_FITS else ("alt", a, b)


def accepts_empty(r: Regex) -> bool:
    kind = r[0]
    if kind == "cat":
        return accepts_empty(r[1]) and accepts_empty(r[2])
    return kind == "star" or (kind == "alt" and (accepts_empty(r[1]) or accepts_empty(r[2])))


def derivative(r: Regex, byte: int) -> Regex:
    kind = r[0]
    if kind == "byte":
        return EMPTY if byte in r[1] else NOTHING_FITS
    if kind == "alt":
        return alt(derivative(r[1], byte), derivative(r[2], byte))
    if kind == "star":
        return cat(derivative(r[1], byte), r)
    first = cat(derivative(r[1], byte), r[2])
    return alt(first, derivative(r[2], byte)) if accepts_empty(r[1]) else first


def mask_of(r: Regex, tokens: Sequence[bytes], end: int) -> list[bool]:
    mask = []
    for token in tokens:
        rest = r
        for byte in token:
            rest = derivative(rest, byte)
        mask.append(rest != NOTHING_FITS)
    mask[end] = accepts_empty(r)
    return mask


def text_of(r: Regex) -> str:
    """A regex as a pattern, for the chapter's table."""
    kind = r[0]
    if r == EMPTY:
        return "ε"
    if kind == "byte":
        return "[0-9]" if len(r[1]) == 10 else "".join(map(chr, sorted(r[1])))
    if kind == "star":
        return f"{text_of(r[1])}*"
    if kind == "alt":
        return f"{text_of(r[2])}?" if r[1] == EMPTY else f"({text_of(r[1])}|{text_of(r[2])})"
    return text_of(r[1]) + text_of(r[2])


DIGIT: Regex = ("byte", frozenset(b"0123456789"))
NUMBER = cat(alt(EMPTY, ("byte", frozenset(b"-"))), cat(DIGIT, ("star", DIGIT)))  # -?[0-9][0-9]*


def walk_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """One state's mask over the whole vocabulary: token by token, by the trie, and again. One thread; no model."""
    tokenizer, end = bench.tokenizer, int(bench.tokenizer.eos_token_id)
    vocabulary = Vocabulary.of(tokenizer)
    tokens = [token or b"" for token in vocabulary.tokens]
    cases = {"number": ("-?[0-9]+", NUMBER), "string": ('"[^"]*"', None)}
    rows, thread = [], time.thread_time
    for name, (pattern, plain) in cases.items():
        start = thread()
        vocabulary = Vocabulary.of(tokenizer)
        build = thread() - start
        constraint = compile_constraint("regex", pattern, vocabulary)
        state = constraint.start if name == "number" else constraint.walk(constraint.start, b'"')
        seconds = []
        for _ in range(101):
            start = thread()
            mask = constraint.allowed(state)
            seconds.append(thread() - start)
        if name == "number":  # its mask was made when it was compiled: that of another state is cold
            start = thread()
            constraint.allowed(constraint.walk(state, b"-"))
            seconds[0] = thread() - start
        row = {"name": name, "pattern": pattern, "allowed": int(mask.sum()), "tokens": len(tokens),
               "cold": seconds[0], "warm": statistics.median(seconds[1:]), "trie": build}  # fmt: skip
        if plain is not None:
            start = thread()
            found = mask_of(plain, tokens, end)
            row["plain"] = thread() - start
            empty = torch.tensor([not token for token in tokens])
            agree = torch.tensor(found)[~empty] == torch.tensor(mask[: len(tokens)])[~empty]
            assert bool(agree.all()), "both masks"
        rows.append(row)
        print(row, flush=True)
    save(
        {"rows": rows, "bytes": sum(map(len, tokens)), "nodes": len({t[:n] for t in tokens for n in range(len(t) + 1)})}
    )


ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20}, "count": {"type": "integer"},
        "kind": {"enum": ["new", "used", "lost"]},
    },
    "required": ["name", "count", "kind"],
}  # fmt: skip
ITEMS = {"type": "array", "minItems": 400, "items": ITEM}  # it cannot end before a request's tokens do


def batch_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """64 requests decode together, free and constrained: tokens a second."""
    rows: list[dict] = []
    count, tokens = size(64, 8, 2), size(128, 24, 4)
    for shape in ("SmolLM2-135M", "Llama-3-8B") if GPU else ("SmolLM2-135M",):
        with tempfile.TemporaryDirectory() as folder:
            path = model_path(MODEL)
            if shape != "SmolLM2-135M":  # its shape with SmolLM2's vocabulary, and random weights
                config = dataclasses.replace(LLAMA_3_8B, vocab_size=bench.model.config.vocab_size)
                for file in ("tokenizer.json", "tokenizer_config.json"):
                    shutil.copy(path / file, folder)
                path = Path(folder)
                (path / "config.json").write_text(json.dumps(config.to_dict()))
            options = {"load_format": "dummy"} if path == Path(folder) else {}
            engine = LLM(
                path, dtype="bfloat16" if GPU else "float32", max_num_seqs=count, max_model_len=512, num_blocks=2048,
                **options,
            ).engine  # fmt: skip
        prompts = [bench.tokenizer.encode(f"Review: {t}\nJSON:") for t in bench.texts[:count]]
        prompts = [prompts[i % len(prompts)] for i in range(count)]
        ways: dict[str, dict] = {
            "free": {"ignore_eos": True}, "regex": {"structured_outputs": {"regex": "[a-z ]{4000}"}},
            "json": {"structured_outputs": {"json": ITEMS}},
        }  # fmt: skip
        for name, options in ways.items():
            seconds = []
            for _ in range(3):
                params = SamplingParams(temperature=0, max_tokens=tokens, **options)
                requests = [engine.add(ids, params)[0] for ids in prompts]
                begin = time.perf_counter()
                while engine.has_unfinished():
                    engine.step()
                seconds.append(time.perf_counter() - begin)
                assert all(len(r.output_token_ids) == tokens for r in requests), [r.error for r in requests if r.error]
            rows.append({"shape": shape, "name": name, "requests": count, "tokens": tokens,
                         "tokens/s": count * tokens / min(seconds[1:])})  # fmt: skip
            print(rows[-1], flush=True)
            save({"rows": rows})
        del engine


PARTS = {
    "induction": induction_part, "wordings": wordings_part, "shots": shots_part, "cot": cot_part,
    "prefix": prefix_part, "constrained": constrained_part, "mask": mask_part, "batch": batch_part, "walk": walk_part,
}  # fmt: skip


@torch.no_grad()
def main() -> None:
    run_parts("chapter_13", PARTS, parts_asked(PARTS, ("walk" if GPU else "batch",)), Bench(), not SMALL)


if __name__ == "__main__":
    main()
