"""What chapter 3 quotes: the tokenizer against Hugging Face's, a small model's training, scores, sampling.

python benchmarks/chapter_03.py                      everything (about 10 minutes on two cores)
python benchmarks/chapter_03.py tokenizer sampling   these parts again; the rest of the recorded file stays
"""

import bz2
import json
import lzma
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import regex
import torch
import torch.nn.functional as F
from common import ROOT, device, median_seconds, record
from torch import Tensor

from minillm.config import ModelConfig
from minillm.data import reference_text, split_topics
from minillm.evaluate import Score, perplexity
from minillm.model import Transformer
from minillm.model.tokenizer import Tokenizer, merge_pair
from minillm.model.weights import load, model_path
from minillm.sampling import SamplingParams, distribution, keep_min_p, keep_top_k, keep_top_p, sample

MODEL = "smollm2-135m-instruct"
END = "<|endoftext|>"
MERGES, WINDOW, BATCH, STEPS, PEAK_LR, INIT_STD = 1000, 128, 8, 400, 6e-3, 0.06
# Article 1 of the Universal Declaration of Human Rights (United Nations, 1948), first sentence.
HUMAN_RIGHTS = {
    "English": "All human beings are born free and equal in dignity and rights.",
    "French": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "Japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
}
PROMPT = "The best way to learn a language is to"
SURE_PROMPT = "The capital of France is"


def num_bytes(text: str) -> int:
    return len(text.encode())


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, white space evened out."""
    return [" ".join(part.split()) for part in regex.split(r"\n\s*\n", text) if part.strip()]


def clean_split() -> tuple[dict[str, str], dict[str, str], float]:
    """Training topics, held-out topics, and the share of held-out characters that stood in both.

    The reference prints some paragraphs in several topics. Those that are held out are dropped from the training text.
    """
    train, held_out = split_topics()
    unseen = {paragraph for text in held_out.values() for paragraph in paragraphs(text)}
    seen = {paragraph for text in train.values() for paragraph in paragraphs(text)}
    everything = [paragraph for text in held_out.values() for paragraph in paragraphs(text)]
    shared = sum(len(p) for p in everything if p in seen) / sum(map(len, everything))
    clean = {
        name: "\n\n".join(part for part in regex.split(r"\n\s*\n", text) if " ".join(part.split()) not in unseen)
        for name, text in train.items()
    }
    return clean, held_out, shared


# ---- the tokenizer -------------------------------------------------------------------------------------------------


def their_training(documents: list[str]):
    """Hugging Face's library, set to learn what ours learns."""
    from tokenizers import Tokenizer as Theirs
    from tokenizers import models, pre_tokenizers, trainers

    theirs = Theirs(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + MERGES, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator(documents, trainer)
    return theirs


def plain_merges(words: dict[str, list[int]], counts: dict[str, int], num_merges: int) -> list[tuple[int, int]]:
    """The most frequent pair of neighbors, again and again, everything counted anew.  word -> its symbols, how often"""
    merges = []
    for new_id in range(256, 256 + num_merges):
        pairs: Counter = Counter()
        for word, ids in words.items():
            for pair in pairwise(ids):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: merge_pair(ids, best, new_id) for word, ids in words.items()}
    return merges


def plain_encode(ids: list[int], merges: list[tuple[int, int]]) -> list[int]:
    """Join the pair that was learned first, as long as there is one.  a word's bytes -> its tokens"""
    rank = {pair: i for i, pair in enumerate(merges)}
    while known := [(rank[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in rank]:
        first, i = min(known)
        ids = [*ids[:i], 256 + first, *ids[i + 2 :]]
    return ids


def plain_top_p(probabilities: list[float], top_p: float) -> list[int]:
    """The likeliest tokens, until they have top_p together."""
    kept, total = [], 0.0
    for i in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if total >= top_p:
            break
        kept.append(i)
        total += probabilities[i]
    return kept


def naive_training(documents: list[str], num_merges: int) -> list[tuple[bytes, bytes]]:
    """`plain_merges` of a text, as bytes; `plain_encode` and `plain_top_p` held against the package besides."""
    plain = Tokenizer.train("", 0)
    counts = Counter(word for document in documents for word in plain._words(document))
    merges = plain_merges({word: plain.encode(word) for word in counts}, counts, num_merges)
    spelled = {i: plain.token_bytes(i) for i in range(256)}
    for i, (left, right) in enumerate(merges):
        spelled[256 + i] = spelled[left] + spelled[right]
    trained = Tokenizer.train(documents, num_merges)
    assert all(plain_encode(plain.encode(word), merges) == trained.encode(word) for word in list(counts)[:500])
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    kept = (keep_top_p(logits, 0.8) > float("-inf")).nonzero().flatten().tolist()
    assert sorted(plain_top_p(logits.softmax(-1).tolist(), 0.8)) == kept
    return [(spelled[left], spelled[right]) for left, right in merges]


def learned(tokenizer: Tokenizer, count: int) -> list[bytes]:
    """The first `count` tokens that training added."""
    return [tokenizer.token_bytes(256 + i) for i in range(count)]


def tokenizer_part() -> dict:
    from tokenizers import Tokenizer as Theirs

    train, held_out, _ = clean_split()
    documents, everything = list(reference_text().values()), "\n\n".join(reference_text().values())
    ours, theirs = Tokenizer.train(documents, MERGES), their_training(documents)
    assert json.loads(theirs.to_str())["model"]["merges"] == ours._spec["model"]["merges"], "learned another tokenizer"
    start = time.perf_counter()
    naive = naive_training(documents, 50)
    naive_seconds = (time.perf_counter() - start) / 50
    assert [left + right for left, right in naive] == learned(ours, 50)

    path = model_path(MODEL)
    smollm, peer = Tokenizer.from_pretrained(path), Theirs.from_file(str(path / "tokenizer.json"))
    ids = smollm.encode(everything)
    assert ids == peer.encode(everything).ids

    def cold() -> None:
        smollm._cache.clear()
        smollm.encode(everything)

    words = Counter(word for document in documents for word in ours._words(document))
    sizes = [0, 100, 300, 1000, 3000]
    text = {"train": "\n\n".join(train.values()), "held out": "\n\n".join(held_out.values())}
    by_merges = {}
    for size in sizes:
        small = Tokenizer.train(train.values(), size)
        by_merges[str(size)] = {name: num_bytes(t) / len(small.encode(t)) for name, t in text.items()}
    ratio = {name: num_bytes(t) / len(smollm.encode(t)) for name, t in text.items()}
    long_word = "ab" * 50_000
    return {
        "characters": len(everything),
        "bytes": num_bytes(everything),
        "words": {"all": sum(words.values()), "distinct": len(words)},
        "merges": MERGES,
        "first merges": [token.decode() for token in learned(ours, 12)],
        "train seconds": {
            "minillm": median_seconds(lambda: Tokenizer.train(documents, MERGES), warmup=0),
            "tokenizers": median_seconds(lambda: their_training(documents), warmup=0),
            "naive": naive_seconds * MERGES,
        },
        "load seconds": {
            "minillm": median_seconds(lambda: Tokenizer.from_pretrained(path)),
            "tokenizers": median_seconds(lambda: Theirs.from_file(str(path / "tokenizer.json"))),
        },
        "encode seconds": {
            "minillm, first time": median_seconds(cold),
            "minillm, words known": median_seconds(lambda: smollm.encode(everything)),
            "tokenizers": median_seconds(lambda: peer.encode(everything)),
        },
        "decode seconds": {
            "minillm": median_seconds(lambda: smollm.decode(ids)),
            "tokenizers": median_seconds(lambda: peer.decode(ids)),
        },
        "long word seconds": {
            "minillm": median_seconds(lambda: smollm._join([smollm._byte_ids[b] for b in long_word.encode()])),
            "tokenizers": median_seconds(lambda: peer.encode(long_word)),
        },
        "smollm2 tokens": len(ids),
        "bytes per token": by_merges | {"smollm2": ratio},
        "languages": languages(smollm),
        "words and tokens": {
            word: [smollm.token_bytes(i).decode() for i in smollm.encode(word)]
            for word in (" tokenization", " unbelievably", " language")
        },
    }


def languages(tokenizer: Tokenizer) -> dict:
    """What the same sentence costs in each language."""
    counts = {name: len(tokenizer.encode(text)) for name, text in HUMAN_RIGHTS.items()}
    return {
        name: {"tokens": counts[name], "bytes": num_bytes(text), "times English": counts[name] / counts["English"]}
        for name, text in HUMAN_RIGHTS.items()
    }


# ---- the small model -----------------------------------------------------------------------------------------------


def batches(ids: Tensor, generator: torch.Generator) -> Tensor:
    """Random pieces of the token stream, one longer than the window.  [BATCH, WINDOW + 1]"""
    starts = torch.randint(len(ids) - WINDOW, (BATCH,), generator=generator)
    return ids[starts[:, None] + torch.arange(WINDOW + 1)]


def scored(model: Transformer, tokenizer: Tokenizer, texts: dict[str, str], window: int, stride: int) -> Score:
    """All of the texts, the end token in front of each so that its first token is scored too."""

    def logits(ids: Tensor) -> Tensor:
        return model.logits(model(ids))

    end = tokenizer.special_tokens[END]
    total = Score(0.0, 0, 0)
    for text in texts.values():
        total += perplexity(logits, [end, *tokenizer.encode(text)], window, stride, num_bytes(text))
    return total


def as_dict(score: Score) -> dict:
    return {
        "tokens": score.num_tokens,
        "bytes": score.num_bytes,
        "cross_entropy": score.cross_entropy,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }


def train_small(
    tokenizer: Tokenizer, texts: dict[str, str], held_out: dict[str, str], init_std: float = INIT_STD
) -> tuple[Transformer, dict]:
    """The lab's model and its lesson: AdamW, warm-up, then a straight line to zero, gradients clipped to norm 1."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
    )  # fmt: skip
    end = tokenizer.special_tokens[END]
    ids = torch.tensor([i for text in texts.values() for i in [end, *tokenizer.encode(text)]])
    torch.manual_seed(0)
    model, generator = Transformer(config), torch.Generator().manual_seed(0)
    model.reset_parameters(init_std)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer.zero_grad()  # the first use imports torch's compiler: seconds that are not training
    curve, recent, seconds = {"step": [], "train": [], "held out": []}, [], []
    for step in range(STEPS + 1):
        if step % 40 == 0:
            curve["step"].append(step)
            curve["held out"].append(scored(model, tokenizer, held_out, WINDOW, WINDOW).cross_entropy)
            curve["train"].append(statistics.mean(recent) if recent else curve["held out"][0])
            print(step, curve["train"][-1], curve["held out"][-1], f"{sum(seconds):.1f} s", flush=True)
            recent = []
        if step == STEPS:
            break
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min((step + 1) / 20, 1 - step / STEPS)
        batch = batches(ids, generator)
        loss = F.cross_entropy(model.logits(model(batch[:, :-1])).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        seconds.append(time.perf_counter() - start)
    step_seconds = statistics.median(seconds)  # of all steps, so that a busy moment of the machine does not count
    return model.eval(), {
        "parameters": config.num_parameters(),
        "vocabulary": config.vocab_size,
        "train tokens": len(ids),
        "steps": STEPS,
        "tokens per step": BATCH * WINDOW,
        "seconds": STEPS * step_seconds,
        "tokens per second": BATCH * WINDOW / step_seconds,
        "flops": 3 * STEPS * BATCH * WINDOW * sum(config.flops_per_token(WINDOW // 2).values()),
        "curve": curve,
    }


def unigram(tokenizer: Tokenizer, train: dict[str, str], held_out: dict[str, str]) -> Score:
    """Every token by its own frequency, one added to each count: the model that reads no context."""
    counts = Counter(range(tokenizer.vocab_size))
    for text in train.values():
        counts.update(tokenizer.encode(text))
    total = counts.total()
    ids = [i for text in held_out.values() for i in tokenizer.encode(text)]
    nll = sum(-math.log(counts[i] / total) for i in ids)
    return Score(nll, len(ids), sum(map(num_bytes, held_out.values())))


def compressed(pack: Callable[[bytes], bytes], train: dict[str, str], held_out: dict[str, str]) -> float:
    """Bits a byte of held-out text that a compressor needs after it has seen the training text."""
    before = "\n\n".join(train.values()).encode()
    after = "\n\n".join(held_out.values()).encode()
    return 8 * (len(pack(before + after)) - len(pack(before))) / len(after)


@torch.inference_mode()
def written(model: Transformer, prompts: Tensor, params: SamplingParams, count: int, seed: int = 0) -> Tensor:
    """`count` tokens after each prompt, all prompts of one length.  [B, T] -> [B, count]"""
    generator = torch.Generator().manual_seed(seed)
    ids = prompts
    for _ in range(count):
        logits = model.logits(model(ids)[:, -1])  # [B, V]
        ids = torch.cat([ids, sample(logits, params, ids, generator)[:, None]], dim=1)
    return ids[:, prompts.shape[1] :]


def repeated(rows: list[list[int]], n: int = 4) -> float:
    """The share of n-grams that stood earlier in the same row."""
    grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
    return sum(len(row) - len(set(row)) for row in grams) / sum(map(len, grams))


def training_part() -> dict:
    train, held_out, shared = clean_split()
    leaky, _ = split_topics()
    tokenizer = Tokenizer.train(train.values(), MERGES, [END], eos_token=END)
    model, result = train_small(tokenizer, train, held_out)
    starts = torch.tensor([[0, *tokenizer.encode(text)[:7]] for text in held_out.values()])
    human = [tokenizer.encode(text)[7:107] for text in held_out.values()]
    ways = {
        "greedy": SamplingParams(temperature=0),
        "temperature 1": SamplingParams(),
        "top-p 0.9": SamplingParams(top_p=0.9),
    }
    before = Transformer(model.config).eval()
    before.reset_parameters(INIT_STD)  # as training starts
    gpt2s_start, _ = train_small(tokenizer, train, held_out, init_std=0.02)
    leaked, _ = train_small(tokenizer, leaky, held_out)
    prompt = "A function is"
    ids = torch.tensor([[0, *tokenizer.encode(prompt)]])
    samples = {"prompt": prompt, "before": tokenizer.decode(written(before, ids, SamplingParams(), 30)[0].tolist())}
    for name, params in {"greedy": ways["greedy"], "sampled": SamplingParams(temperature=0.8, top_p=0.9)}.items():
        samples[name] = tokenizer.decode(written(model, ids, params, 60)[0].tolist())
    return result | {
        "held-out topics": len(held_out),
        "overlap": shared,
        "scores": {
            "before": as_dict(scored(before, tokenizer, held_out, WINDOW, WINDOW)),
            "unigram": as_dict(unigram(tokenizer, train, held_out)),
            "small": as_dict(scored(model, tokenizer, held_out, WINDOW, WINDOW)),
            "small, stride 32": as_dict(scored(model, tokenizer, held_out, WINDOW, 32)),
            "small, started with std 0.02": as_dict(scored(gpt2s_start, tokenizer, held_out, WINDOW, WINDOW)),
            "small, overlap not removed": as_dict(scored(leaked, tokenizer, held_out, WINDOW, WINDOW)),
            "small, training text": as_dict(scored(model, tokenizer, dict(list(train.items())[:8]), WINDOW, WINDOW)),
        },
        "compressors": {
            "bzip2": compressed(bz2.compress, train, held_out),
            "xz": compressed(lzma.compress, train, held_out),
            "xz, overlap not removed": compressed(lzma.compress, leaky, held_out),
        },
        "samples": samples,
        "repeated 4-grams": {"human": repeated(human)}
        | {name: repeated(written(model, starts, params, 100).tolist()) for name, params in ways.items()},
    }


# ---- the real model ------------------------------------------------------------------------------------------------


def smollm2_part() -> dict:
    _, held_out = split_topics()
    model, tokenizer = load(model_path(MODEL), "cpu", "float32"), Tokenizer.from_pretrained(model_path(MODEL))
    start = time.perf_counter()
    whole = scored(model, tokenizer, held_out, 512, 512)
    seconds = time.perf_counter() - start
    shortest = sorted(held_out, key=lambda name: len(held_out[name]))
    some = {name: held_out[name] for name in shortest[len(shortest) // 2 :][:3]}
    strides = {}
    for window, stride in ((64, 64), (64, 16), (128, 128), (128, 32), (512, 512)):
        strides[f"{window}, {stride}"] = as_dict(scored(model, tokenizer, some, window, stride))
        print("window, stride", window, stride, strides[f"{window}, {stride}"]["perplexity"], flush=True)
    return {
        "held out": as_dict(whole),
        "tokens per second": whole.num_tokens / seconds,
        "strides": strides,
        "repeated 4-grams": repetition(tokenizer, held_out),
    }


def repetition(tokenizer: Tokenizer, held_out: dict[str, str]) -> dict:
    """SmolLM2 continues eight held-out texts; transformers generates, since it has a cache already."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path(MODEL), dtype=torch.float32).eval()
    ids = [tokenizer.encode(text) for text in list(held_out.values())[:8]]
    prompts = torch.tensor([row[:16] for row in ids])
    common = {"max_new_tokens": 120, "min_new_tokens": 120, "attention_mask": torch.ones_like(prompts)}
    ways = {
        "greedy": {"do_sample": False},
        "temperature 1": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
        "top-p 0.9": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9},
    }
    result = {"human": repeated([row[16:136] for row in ids])}
    for name, options in ways.items():
        torch.manual_seed(0)
        with torch.inference_mode():
            out = model.generate(prompts, **common, **options)[:, 16:]
        result[name] = repeated(out.tolist())
        print(name, result[name], repr(tokenizer.decode(out[0].tolist()))[:200], flush=True)
    return result


# ---- sampling ------------------------------------------------------------------------------------------------------


METHODS = {
    "temperature 0.5": SamplingParams(temperature=0.5),
    "temperature 1": SamplingParams(),
    "temperature 1.5": SamplingParams(temperature=1.5),
    "top-k 5": SamplingParams(top_k=5),
    "top-p 0.8": SamplingParams(top_p=0.8),
    "min-p 0.1": SamplingParams(min_p=0.1),
}


@torch.inference_mode()
def pictures(model: Transformer, tokenizer: Tokenizer) -> dict:
    """What each method leaves of two distributions: one flat, one peaked."""
    result = {}
    for prompt in (PROMPT, SURE_PROMPT):
        logits = model.logits(model(torch.tensor([tokenizer.encode(prompt)])))[0, -1]  # [V]
        top = logits.topk(24).indices
        result[prompt] = {
            "tokens": [tokenizer.decode([i]) for i in top.tolist()],
            "left": {name: distribution(logits, params)[top].tolist() for name, params in METHODS.items()},
            "kept": {name: int((distribution(logits, params) > 0).sum()) for name, params in METHODS.items()},
            "tail": float(logits.softmax(-1).sort(descending=True).values[100:].sum()),
        }
    return result


@torch.inference_mode()
def trailing_space(model: Transformer, tokenizer: Tokenizer) -> dict:
    """The likeliest token after the same prompt with and without a space at its end."""
    result: dict = {"prompt": SURE_PROMPT}
    for name, prompt in {"without": SURE_PROMPT, "with": SURE_PROMPT + " "}.items():
        p, i = model.logits(model(torch.tensor([tokenizer.encode(prompt)])))[0, -1].softmax(-1).max(-1)
        result[name] = {"token": tokenizer.decode([int(i)]), "p": float(p)}
    return result


@torch.inference_mode()
def set_sizes(model: Transformer, tokenizer: Tokenizer) -> dict:
    """How many tokens each filter keeps, and how often the true next token is among them, over held-out text."""
    _, held_out = split_topics()
    ways = {
        "top-k 40": lambda x: keep_top_k(x, 40),
        "top-p 0.9": lambda x: keep_top_p(x, 0.9),
        "min-p 0.1": lambda x: keep_min_p(x, 0.1),
    }
    sizes, hits, tail = {name: [] for name in ways}, {name: [] for name in ways}, []
    for text in list(held_out.values())[:4]:
        ids = torch.tensor([tokenizer.special_tokens[END], *tokenizer.encode(text)[:512]])
        logits = model.logits(model(ids[None, :-1]))[0]  # [T, V]
        ordered = logits.softmax(-1).sort(descending=True).values
        tail += ordered[:, 1000:].sum(-1).tolist()
        for name, keep in ways.items():
            stays = keep(logits) > float("-inf")
            sizes[name] += stays.sum(-1).tolist()
            hits[name] += stays.gather(1, ids[1:, None])[:, 0].tolist()
    percentiles = (10, 50, 90)
    result = {
        name: {
            "percentiles": {str(q): statistics.quantiles(s, n=100)[q - 1] for q in percentiles},
            "one": sum(x == 1 for x in s) / len(s),
            "largest": max(s),
            "next token kept": sum(hits[name]) / len(s),
        }
        for name, s in sizes.items()
    }
    return {"positions": len(tail), "beyond the best 1000": statistics.mean(tail), "filters": result}


def timings() -> dict:
    """Seconds a step takes for a vocabulary of 49,152, ours and transformers' processors."""
    from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper
    from transformers import TopPLogitsWarper as TopP

    peers = {
        "temperature": [TemperatureLogitsWarper(0.7)],
        "top-k 40": [TopKLogitsWarper(40)],
        "top-p 0.9": [TopP(0.9)],
        "min-p 0.05": [MinPLogitsWarper(0.05)],
    }
    ours = {
        "greedy": SamplingParams(temperature=0),
        "temperature": SamplingParams(temperature=0.7),
        "top-k 40": SamplingParams(top_k=40),
        "top-p 0.9": SamplingParams(top_p=0.9),
        "min-p 0.05": SamplingParams(min_p=0.05),
        "top-k 40, top-p 0.9": SamplingParams(top_k=40, top_p=0.9),
    }
    result = {}
    for rows in (1, 32):
        logits = 3 * torch.randn(rows, 49_152, generator=torch.Generator().manual_seed(0))
        for name, params in ours.items():
            case = {"minillm": median_seconds(lambda p=params, x=logits: sample(x, p), repeats=9)}
            if name in peers:
                chain = LogitsProcessorList(peers[name])
                kept = chain(None, logits.clone()).softmax(-1)
                # The token on a filter's border may fall on either side: they add up in the other direction.
                assert (distribution(logits, params) - kept).abs().sum(-1).max() < 1e-3

                def theirs(chain=chain, x=logits) -> Tensor:
                    return torch.multinomial(chain(None, x).softmax(-1), 1)

                case["transformers"] = median_seconds(theirs, repeats=9)
            result[f"{rows}, {name}"] = case
    return result


def sampling_part() -> dict:
    model, tokenizer = load(model_path(MODEL), "cpu", "float32"), Tokenizer.from_pretrained(model_path(MODEL))
    return {
        "pictures": pictures(model, tokenizer),
        "trailing space": trailing_space(model, tokenizer),
        "set sizes": set_sizes(model, tokenizer),
        "seconds": timings(),
    }


PARTS = {"tokenizer": tokenizer_part, "training": training_part, "smollm2": smollm2_part, "sampling": sampling_part}


def main() -> None:
    wanted = sys.argv[1:] or list(PARTS)
    torch.set_num_threads(2)
    path = ROOT / "benchmarks" / "results" / device()[0] / "chapter_03.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else {}
    for name in wanted:
        print(f"== {name}", flush=True)
        results[name] = PARTS[name]()
        written_to = record("chapter_03", results, ("torch", "tokenizers", "transformers", "regex"))
        print(written_to)


if __name__ == "__main__":
    main()
