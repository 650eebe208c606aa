"""What chapter 2 quotes: cost of a forward pass, agreement with transformers, positions compared, heads of SmolLM2.

python benchmarks/chapter_02.py                  everything (about 20 minutes on two cores)
python benchmarks/chapter_02.py positions heads  these parts again; the rest of the recorded file stays
"""

import dataclasses
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import ROOT, device, median_seconds, record
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minillm.config import ModelConfig
from minillm.data import reference_text
from minillm.model.layers import Attention, NoCache, NoCacheLayer, RMSNorm, rope_tables
from minillm.model.transformer import Transformer
from minillm.model.weights import load, model_path

MODEL = "smollm2-135m-instruct"
LENGTHS = (1, 16, 64, 256, 1024, 2048, 4096)
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Ada Lovelace met Charles Babbage in 1833. Years later Ada Lovelace wrote about Charles",
    "1, 1, 2, 3, 5, 8, 13, 21,",
)


# ---- the real model: its tensors, its FLOPs, its agreement ---------------------------------------------------------


def tokenizer():
    """The model's tokenizer (chapter 3 builds it; here the library's)."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model_path(MODEL) / "tokenizer.json"))


def peer(attention: str = "sdpa") -> nn.Module:
    """The same model in transformers, with torch's fused attention ("sdpa") or its own ("eager")."""
    from transformers import AutoModelForCausalLM

    path = model_path(MODEL)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention).eval()


def numbers(model: Transformer) -> dict:
    """Count the tensors in the file, and FLOPs with torch's own counter."""
    from safetensors import safe_open

    with safe_open(model_path(MODEL) / "model.safetensors", framework="pt") as opened:
        shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118 (not a dict)
    elements = {key: torch.Size(shape).numel() for key, shape in shapes.items()}
    tokens = 128
    counted = {}
    for name, backend in (("fused", SDPBackend.FLASH_ATTENTION), ("matrix products", SDPBackend.MATH)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(backend), torch.inference_mode():
            model.logits(model(torch.zeros(1, tokens, dtype=torch.long)))
        counted[name] = counter.get_total_flops()
    return {
        "config": model.config.to_dict(),
        "tensors": len(shapes),
        "parameters in the file": sum(elements.values()),
        "file bytes": (model_path(MODEL) / "model.safetensors").stat().st_size,
        "counted FLOPs": counted,  # torch 2.13's counter knows no rule for the fused CPU kernel and passes over it
        "counted tokens": tokens,
    }


@torch.inference_mode()
def agreement(model: Transformer) -> dict:
    """Largest difference of logits, and whether the best next token is the same at every position."""
    encode = tokenizer()
    long = encode.encode("\n\n".join(reference_text().values())[:4000]).ids[:512]
    batches = [torch.tensor([encode.encode(prompt).ids]) for prompt in PROMPTS] + [torch.tensor([long])]
    result: dict = {"tokens": [x.shape[1] for x in batches]}
    for name in ("sdpa", "eager"):
        other = peer(name)
        pairs = [(model.logits(model(x)), other(x).logits) for x in batches]
        result[name] = {
            "max difference": max(float((ours - theirs).abs().max()) for ours, theirs in pairs),
            "same best": all(bool((ours.argmax(-1) == theirs.argmax(-1)).all()) for ours, theirs in pairs),
            "largest logit": max(float(theirs.abs().max()) for _, theirs in pairs),
        }
    return result


# ---- time ----------------------------------------------------------------------------------------------------------


def ceilings() -> dict:
    """What these cores can do: a large fp32 matmul, and reading memory (a copy counts bytes read and written)."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    source = torch.randn(2**27)  # 512 MiB
    target = torch.empty_like(source)
    flops = 2 * 2048**3 / median_seconds(lambda: a @ b, 9, 2)
    read = source.numel() * 4 / median_seconds(source.sum, 9, 2)
    copy = 2 * source.numel() * 4 / median_seconds(lambda: target.copy_(source), 9, 2)
    return {"matmul FLOP/s": flops, "read bytes/s": read, "copy bytes/s": copy}


class Timer:
    """A cache that is none: it times attention, and by hooks the other parts."""

    def __init__(self, model: Transformer) -> None:
        self.seconds: Counter[str] = Counter()
        self.layers = [TimedLayer(self)] * model.config.num_hidden_layers
        names = {"qkv_proj": "projections", "o_proj": "projections", "mlp": "mlp", "lm_head": "head",
                 "embed_tokens": "other"}  # fmt: skip
        for name, module in model.named_modules():
            part = "norms" if isinstance(module, RMSNorm) else names.get(name.rsplit(".", 1)[-1])
            if part:
                module.register_forward_pre_hook(lambda module, args: setattr(module, "started", time.perf_counter()))
                module.register_forward_hook(lambda module, args, out, part=part: self.add(part, module.started))

    def add(self, part: str, started: float) -> None:
        self.seconds[part] += time.perf_counter() - started


class TimedLayer(NoCacheLayer):
    """One layer of a `Timer`, and all others."""

    def __init__(self, timer: Timer) -> None:
        super().__init__()
        self.timer = timer

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: object) -> Tensor:
        started = time.perf_counter()
        out = super().attend(q, k, v, batch)
        self.timer.add("attention", started)
        return out


def shares(length: int, repeats: int = 5) -> dict[str, float]:
    """Median seconds by part of a forward and the last token's logits; `other` is RoPE and residual sums."""
    model = load(MODEL, device="cpu")
    timer, x = Timer(model), torch.randint(0, model.config.vocab_size, (1, length))
    runs = [timed_run(model, timer, x) for _ in range(repeats + 1)][1:]
    return {part: statistics.median(run[part] for run in runs) for part in runs[0]}


@torch.inference_mode()
def timed_run(model: Transformer, timer: Timer, x: Tensor) -> dict[str, float]:
    timer.seconds.clear()
    started = time.perf_counter()
    model.logits(model(x, cache=timer)[:, -1:])
    total = time.perf_counter() - started
    parts = {part: timer.seconds[part] for part in ("projections", "attention", "mlp", "norms", "head")}
    return parts | {"other": total - sum(parts.values())}


@torch.inference_mode()
def forward(model: Transformer, other: nn.Module) -> list[dict]:
    """Seconds of a forward by length, ours and transformers' in turn, outputs compared before."""
    rows = []
    for length in LENGTHS:
        x = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))

        def ours(x: Tensor = x) -> Tensor:
            return model.logits(model(x)[:, -1:])

        def theirs(x: Tensor = x) -> Tensor:
            return other(x, logits_to_keep=1, use_cache=False).logits

        difference = float((ours() - theirs()).abs().max())
        assert difference < 1e-3, f"outputs differ by {difference}"
        seconds, peer_seconds = alternate(ours, theirs, 5 if length > 1000 else 9)
        row = {"tokens": length, "seconds": seconds, "transformers": peer_seconds, "ratio": peer_seconds / seconds}
        rows.append(
            row | {"max difference": difference, "flops": prompt_flops(model.config, length), "parts": shares(length)}
        )
        print(rows[-1], flush=True)
    return rows


def alternate(first: Callable, second: Callable, repeats: int) -> tuple[float, float]:
    """Median seconds of both, run in turn, so that what else the machine does hits both alike."""
    first(), second()
    times = [(median_seconds(first, 1, 0), median_seconds(second, 1, 0)) for _ in range(repeats)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def prompt_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of a forward over a prompt, logits of the last token only."""
    parts = config.flops_per_token(1)
    context = parts.pop("attention over context") * tokens * (tokens + 1) // 2
    head = parts.pop("lm_head")
    return sum(parts.values()) * tokens + context + head


# ---- positions -----------------------------------------------------------------------------------------------------

SYMBOLS, TRAINED, TESTED = 16, 32, 128
KINDS = ("none", "learned", "sinusoidal", "rotary")


class Tiny(nn.Module):
    """Two layers of attention and nothing else, and one of four ways to tell positions.

    token ids [B, T] -> [B, T, SYMBOLS]
    """

    def __init__(self, kind: str, hidden: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        shape = {
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": hidden // heads,
        }
        self.config = ModelConfig(
            SYMBOLS, intermediate_size=1, num_hidden_layers=layers, max_position_embeddings=TESTED, **shape
        )
        self.embed = nn.Embedding(SYMBOLS, hidden)
        self.norms = nn.ModuleList(RMSNorm(hidden, 1e-5) for _ in range(layers + 1))
        self.layers = nn.ModuleList(Attention(self.config) for _ in range(layers))
        self.head = nn.Linear(hidden, SYMBOLS, bias=False)
        cos, sin = rope_tables(self.config)
        self.rope = (
            (cos, sin) if kind == "rotary" else (torch.ones_like(cos), torch.zeros_like(sin))
        )  # angle 0: no turn
        self.table = nn.Parameter(torch.randn(TESTED, hidden) * 0.02) if kind == "learned" else None
        if kind == "sinusoidal":
            self.table = sinusoidal(TESTED, hidden)

    def forward(self, x: Tensor, cache: NoCache | None = None) -> Tensor:
        stream = self.embed(x)
        if self.table is not None:
            stream = stream + self.table[: x.shape[1]]
        rope = tuple(table[: x.shape[1]] for table in self.rope)
        caches = (cache or NoCache()).layers
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=False)):
            stream = stream + layer(norm(stream), rope, caches[i])
        return self.head(self.norms[-1](stream))


def sinusoidal(length: int, size: int) -> Tensor:
    """Vaswani et al., 2017, section 3.5, sines first.  -> [length, size]"""
    angles = torch.outer(torch.arange(length).float(), 10_000.0 ** (-torch.arange(0, size, 2) / size))
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def three_back(x: Tensor) -> Tensor:
    """Target: the token that stood three places before; -100 where there is none."""
    y = torch.full_like(x, -100)
    y[:, 3:] = x[:, :-3]
    return y


def first(x: Tensor) -> Tensor:
    """Target: the first token of the sequence; -100 at the first itself."""
    y = x[:, :1].expand_as(x).clone()
    y[:, 0] = -100
    return y


TASKS = {"three back": three_back, "first": first}


def train(kind: str, task: Callable, seed: int, steps: int = 300, lr: float = 0.01) -> tuple[Tiny, list[float]]:
    """Train on random sequences of TRAINED symbols, 64 a step; the loss of every step."""
    torch.manual_seed(seed)
    model, generator = Tiny(kind), torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        x = torch.randint(0, SYMBOLS, (64, TRAINED), generator=generator)
        loss = F.cross_entropy(model(x).flatten(0, 1), task(x).flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@torch.inference_mode()
def accuracy(model: Tiny, task: Callable, cache: NoCache | None = None) -> list[float | None]:
    """Share of right answers at each position of 1,024 fresh sequences of TESTED symbols; None without a target."""
    x = torch.randint(0, SYMBOLS, (1024, TESTED), generator=torch.Generator().manual_seed(999))
    y = task(x)
    right = (model(x, cache).argmax(-1) == y).float().mean(0)
    return [None if target < 0 else value for target, value in zip(y[0].tolist(), right.tolist(), strict=True)]


def positions(seeds: tuple[int, ...] = (0, 1, 2)) -> dict:
    """Both tasks, four kinds, three seeds: loss by step and accuracy by position, means over the seeds."""
    result: dict = {
        "symbols": SYMBOLS,
        "trained length": TRAINED,
        "tested length": TESTED,
        "seeds": len(seeds),
        "runs": {},
    }
    for name, task in TASKS.items():
        for kind in KINDS:
            trained = [train(kind, task, seed) for seed in seeds]
            row = {"loss": mean_lists([losses for _, losses in trained])}
            caches = {"": None, ", window": NoCache(TRAINED)} if kind == "rotary" else {"": None}
            for suffix, cache in caches.items():
                curves = [accuracy(model, task, cache) for model, _ in trained]
                row[f"accuracy{suffix}"] = mean_lists(curves)
                inside = [statistics.mean(a for a in curve[:TRAINED] if a is not None) for curve in curves]
                beyond = [statistics.mean(curve[TRAINED:]) for curve in curves]
                row[f"inside{suffix}"], row[f"beyond{suffix}"] = inside, beyond
                print(name, kind + suffix, "inside", inside, "beyond", beyond, flush=True)
            result["runs"].setdefault(name, {})[kind] = row
    return result


def mean_lists(lists: list[list]) -> list:
    return [None if None in values else statistics.mean(values) for values in zip(*lists, strict=True)]


@torch.inference_mode()
def beyond(model: Transformer, tokens: int = 12_288, bin_size: int = 1024) -> dict:
    """SmolLM2's loss by position past its trained context, plain and with stretched rotary positions, not retrained."""
    ids = torch.tensor(tokenizer().encode("\n\n".join(reference_text().values())[:80_000]).ids[: tokens + 1])
    trained = model.config
    longer = dataclasses.replace(trained, max_position_embeddings=2 * trained.max_position_embeddings)
    low_high = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": trained.max_position_embeddings,
    }
    ways = {
        "plain": None,
        "linear": {"rope_type": "linear", "factor": 2.0},
        "llama3": {"rope_type": "llama3", "factor": 2.0, **low_high},
    }
    result: dict = {"trained context": trained.max_position_embeddings, "tokens": tokens, "bin": bin_size, "loss": {}}
    for name, scaling in ways.items():
        model.config = dataclasses.replace(longer, rope_scaling=scaling)
        model.rope_cos, model.rope_sin = rope_tables(model.config)
        hidden = model(ids[None, :-1])[0]  # [tokens, hidden]
        bins = zip(hidden.split(bin_size), ids[1:].split(bin_size), strict=True)
        result["loss"][name] = [float(F.cross_entropy(model.logits(h), y)) for h, y in bins]
        print(name, result["loss"][name], flush=True)
    model.config = trained
    model.rope_cos, model.rope_sin = rope_tables(trained)
    return result


# ---- heads ---------------------------------------------------------------------------------------------------------


class Watch:
    """Keeps every layer's attention weights and value lengths; silences the heads in `silent`, (layer, head) each."""

    def __init__(self, layers: int, silent: tuple = (), keep: bool = True) -> None:
        self.silent, self.keep, self.weights, self.values = set(silent), keep, {}, {}
        self.layers = [WatchedLayer(self, i) for i in range(layers)]


class WatchedLayer(NoCacheLayer):
    """One layer of a `Watch`."""

    def __init__(self, watch: Watch, layer: int) -> None:
        super().__init__()
        self.watch, self.layer = watch, layer

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: object) -> Tensor:
        if self.watch.keep:
            groups = q.shape[2] // k.shape[2]
            scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(groups, dim=2)) / q.shape[-1] ** 0.5
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, float("-inf")).softmax(-1)  # [B, H, T, T]
            self.watch.weights[self.layer] = weights
            self.watch.values[self.layer] = v.norm(dim=-1).repeat_interleave(groups, dim=2)  # [B, T, H]
        out = super().attend(q, k, v, batch)
        for head in [head for layer, head in self.watch.silent if layer == self.layer]:
            out[:, :, head] = 0
        return out


def repeated(model: Transformer, sequences: int, half: int) -> Tensor:
    """Random tokens, then the same again: the second half can only be predicted by looking back."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, model.config.vocab_size, (sequences, half), generator=generator)
    return torch.cat((tokens, tokens), dim=1)  # [sequences, 2 · half]


def copy_loss(model: Transformer, x: Tensor, silent: tuple = ()) -> tuple[float, float]:
    """Mean loss on the first and on the second half of repeated sequences."""
    half = x.shape[1] // 2
    logits = model.logits(
        model(x, cache=Watch(len(model.layers), silent, keep=False))[:, :-1]
    )  # [B, 2 · half - 1, vocab]
    losses = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none").view(len(x), -1)
    return float(losses[:, : half - 1].mean()), float(losses[:, half:].mean())


def scores(model: Transformer, x: Tensor, silent: tuple = ()) -> tuple[dict[str, Tensor], Watch]:
    """How much each head does of three things, [layers, H] each, on repeated sequences."""
    watch, half, total = Watch(len(model.layers), silent), x.shape[1] // 2, x.shape[1]
    model(x, cache=watch)
    weights = torch.stack([watch.weights[i].mean(0) for i in range(model.config.num_hidden_layers)])  # [L, H, T, T]
    late, each = torch.arange(half, total), torch.arange(1, total)
    found = {
        "previous token": weights[:, :, each, each - 1].mean(-1),
        "first token": weights[:, :, 2:, 0].mean(-1),
        "induction": weights[:, :, late, late - half + 1].mean(-1),  # the token after this one's earlier self
    }
    return found, watch


@torch.inference_mode()
def heads(model: Transformer) -> dict:
    """Rank heads by what they attend to, then silence every head in turn and see what it does to copying."""
    x = repeated(model, 4, 50)
    found, watch = scores(model, x)
    best = {name: [divmod(int(i), s.shape[1]) for i in s.flatten().topk(5).indices] for name, s in found.items()}
    previous, induction = best["previous token"][0], best["induction"]
    after = scores(model, x, (previous,))[0]["induction"]
    silenced = {
        "previous token 1": (previous,),
        "induction 1": induction[:1],
        "induction 5": induction,
        "first token 5": best["first token"],
        "first token over 0.9": [tuple(i) for i in (found["first token"] > 0.9).nonzero().tolist()],
    }
    layers, per_layer = found["induction"].shape
    generator = torch.Generator().manual_seed(0)
    control = [
        copy_loss(model, x, tuple(divmod(int(i), per_layer) for i in row[:5]))[1]
        for row in (torch.randperm(layers * per_layer, generator=generator) for _ in range(15))
    ]
    result = {
        "best": {name: [[*head, float(found[name][head])] for head in top] for name, top in best.items()},
        "mean by layer": {name: score.mean(1).tolist() for name, score in found.items()},
        "loss": copy_loss(model, x),
        "value lengths, first token and others": [value_lengths(watch, head) for head in best["first token"]],
        "induction without the previous-token head": [float(after[head]) for head in induction],
        "silenced": {name: copy_loss(model, x, tuple(silent)) for name, silent in silenced.items()},
        "heads with first token over 0.9": len(silenced["first token over 0.9"]),
        "any 5, fifteen draws": control,
        "each": [[copy_loss(model, x, ((i, h),))[1] for h in range(per_layer)] for i in range(layers)],
    }
    print(json.dumps({k: v for k, v in result.items() if k != "each"}), flush=True)
    return result | {"sentence": sentence(model, best)}


def value_lengths(watch: Watch, head: tuple[int, int]) -> list[float]:
    """Mean length of a head's value vector at the first token and at all others."""
    lengths = watch.values[head[0]][:, :, head[1]]
    return [float(lengths[:, 0].mean()), float(lengths[:, 1:].mean())]


def sentence(model: Transformer, best: dict) -> dict:
    """The maps of the best head of each kind on a real sentence, and what the model says comes next."""
    encode, watch = tokenizer(), Watch(len(model.layers))
    ids = encode.encode(PROMPTS[2]).ids
    logits = model.logits(model(torch.tensor([ids]), cache=watch)[:, -1])[0]
    probability, token = logits.softmax(-1).max(-1)
    maps = {
        name: [[round(w, 3) for w in row] for row in watch.weights[top[0][0]][0, top[0][1]].tolist()]
        for name, top in best.items()
    }
    return {
        "tokens": [encode.decode([i]) for i in ids],
        "maps": maps,
        "next": [encode.decode([int(token)]), float(probability)],
    }


@torch.inference_mode()
def stream(model: Transformer) -> dict:
    """The residual stream of a short prompt: its length after each layer, and what the head would say then."""
    encode = tokenizer()
    x = torch.tensor([encode.encode(PROMPTS[0]).ids])
    states, rope = [model.embed_tokens(x)], (model.rope_cos[: x.shape[1]], model.rope_sin[: x.shape[1]])
    for layer in model.layers:
        states.append(layer(states[-1], rope, NoCacheLayer()))
    best = [model.logits(model.norm(state[0, -1])).softmax(-1).max(-1) for state in states]
    return {
        "prompt": PROMPTS[0],
        "first token": [float(state[0, 0].norm()) for state in states],
        "others": [float(state[0, 1:].norm(dim=-1).mean()) for state in states],
        "largest entry": [float(state.abs().max()) for state in states],
        "best next": [[encode.decode([int(token)]), float(probability)] for probability, token in best],
    }


# ---- all of it -----------------------------------------------------------------------------------------------------


def main(wanted: list[str]) -> None:
    """Run the wanted parts (all without any named) and record them beside those recorded before."""
    path = ROOT / "benchmarks" / "results" / device()[0] / "chapter_02.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"] if wanted and path.is_file() else {}
    model = load(MODEL, device="cpu")
    parts: dict[str, Callable[[], object]] = {
        "numbers": lambda: numbers(model),
        "agreement": lambda: agreement(model),
        "ceilings": ceilings,
        "forward": lambda: forward(model, peer()),
        "positions": positions,
        "heads": lambda: heads(model),
        "stream": lambda: stream(model),
        "beyond": lambda: beyond(model),
    }
    for name, part in parts.items():
        if not wanted or name in wanted:
            print(f"--- {name}", flush=True)
            results[name] = part()
    print(record("chapter_02", results))


if __name__ == "__main__":
    main(sys.argv[1:])
