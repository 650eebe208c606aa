"""What chapter 12 quotes: SmolLM2 learns to write orders down, by adapters of many ranks and whole; what that needs in
memory, which learning rates it bears, what merging loses, adapters that cannot be merged, products of many adapters.

    python benchmarks/chapter_12.py               everything (two minutes on an H100)
    python benchmarks/chapter_12.py task merge    these parts again; the rest of the recorded file stays
    python benchmarks/chapter_12.py --small       three layers, a few steps: does it run? Nothing is recorded

Training orders are `data.orders`': 350 to train on, 50 to choose learning rates by; the 200 held out judge. A trained
model is judged without sampling: greedy decoding writes an order's JSON exactly if each of its tokens is the likeliest
after those before, which one pass shows. The base model, whose JSON may look otherwise, generates, and the first object
in its output counts. All but the rows called bf16 compute in fp32, by torch's products. On a CPU there are fewer
ranks, rates, seeds, steps and orders.
"""

import copy
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import median_seconds, parts_asked, recorded, run_parts
from torch import Tensor, nn

from minillm.adapters import Adapter, LoraConfig, adapted, adapter_of, attach, merge
from minillm.adapters.bottleneck import bottlenecked
from minillm.adapters.lora import LoraLinear, modules
from minillm.adapters.training import Example, asked, loss_of, train
from minillm.data import Order, held_out, orders
from minillm.generate import cached_batch
from minillm.kernels import LoraPlan, multi_lora, use
from minillm.model import Transformer
from minillm.model.tokenizer_hf import load_tokenizer
from minillm.model.weights import load, model_path
from minillm.prompting import share
from minillm.quant.calibrate import replace_weight, sites
from minillm.quant.linear import QuantLinear
from minillm.quant.methods import quantize_model
from minillm.quant.rtn import QuantizedTensor
from minillm.sampling import SamplingParams

MODEL = "smollm2-135m-instruct"
GPU, SMALL = torch.cuda.is_available(), "--small" in sys.argv[1:]
DEVICE = "cuda" if GPU else "cpu"
DEV = 50  # of the training orders, to choose by
QUERY_VALUE, ATTENTION = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
INSTRUCTION = (
    "Write the order down as one JSON object with the keys item (singular), count (a number), size (small, medium,"
    " large or null), extras (a list, as they are named) and to_go (true or false). Order: "
)


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    steps: int
    seeds: tuple[int, ...]
    ranks: tuple[int, ...]
    test: int
    windows: int  # of other text, 512 tokens each
    lora_rates: tuple[float, ...]
    full_rates: tuple[float, ...]
    rate_steps: int
    scale_ranks: tuple[int, ...]
    tokens: tuple[int, ...]  # in the batches whose memory is looked at, in orders


FULL = Sizes(
    50, (0, 1, 2), (1, 2, 4, 8, 16, 32), 200, 24, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3), 50, (1, 4, 16, 64, 256), (8, 64),
)  # fmt: skip
ON_CPU = Sizes(12, (0,), (8,), 40, 2, (1e-3, 1e-2), (1e-4, 1e-3), 6, (1, 4, 16, 64), (8,))
LITTLE = Sizes(2, (0,), (1, 8), 6, 1, (1e-3,), (1e-4,), 1, (1, 4), (2,))
SIZES = LITTLE if SMALL else FULL if GPU else ON_CPU
RATES = {"LoRA": 3e-3, "whole model": 1e-4}  # until the part `rates` has chosen, on orders that neither train nor judge
Save = Callable[[dict], None]


class Bench:
    """The model in fp32, and orders as token ids."""

    def __init__(self) -> None:
        self.base = self.loaded("float32")
        self.tokenizer = load_tokenizer(model_path(MODEL))
        shown, hidden = orders()
        self.orders = hidden[: SIZES.test]
        self.shots = shown
        examples = [self.example(order) for order in shown]
        self.train, self.dev = examples[:-DEV], examples[-DEV:]
        self.test = [self.example(order) for order in self.orders]
        self.text = held_out(self.tokenizer, SIZES.windows).to(DEVICE)
        self.losses = other_losses(self.base, self.text)

    def loaded(self, dtype: str) -> Transformer:
        model = load(MODEL, DEVICE, dtype)
        if SMALL:
            model.layers = model.layers[:3]
        return model

    def example(self, order: Order) -> Example:
        prompt = self.tokenizer.encode(order.prompt, add_special_tokens=False)
        answer = self.tokenizer.encode(order.answer, add_special_tokens=False)
        return Example([*prompt, *answer, self.tokenizer.eos_token_id], len(prompt))

    def fresh(self) -> Transformer:
        return copy.deepcopy(self.base)

    def score(self, model: Transformer, examples: Sequence[Example] | None = None, other: bool = False) -> dict:
        """Of orders: which are written exactly, and nats a token. other: what another text's loss has changed by."""
        nll, count, exact = judged(model, self.test if examples is None else examples)
        found: dict[str, Any] = {"nats": nll / count, **about(exact)}
        if other:
            change = other_losses(model, self.text) - self.losses
            error = float(change.std() / math.sqrt(len(change))) if len(change) > 1 else 0.0
            found |= {"other text": float(change.mean()), "other text's error": error}
        return found


def about(exact: Sequence[bool]) -> dict:
    found = share(exact)
    return {"right": sum(exact), "of": len(exact), "share": found.mean, "low": found.low, "high": found.high,
            "which": "".join("01"[x] for x in exact)}  # fmt: skip


@torch.no_grad()
def judged(model: Transformer, examples: Sequence[Example]) -> tuple[float, int, list[bool]]:
    """Sum of -ln p of the answers' tokens; how many; whether each answer's tokens are all the likeliest."""
    total, count, exact = 0.0, 0, []
    for part in chunks(examples, 50):
        logits, target = asked(model, part)
        total += float(F.cross_entropy(logits, target, reduction="sum"))
        hit = logits.argmax(-1) == target
        exact += [bool(x.all()) for x in hit.split([e.count for e in part])]
        count += len(target)
    return total, count, exact


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


@torch.no_grad()
def other_losses(model: Transformer, windows: Tensor) -> Tensor:
    """Nats a token of text that has nothing to do with orders.  -> [windows]"""
    found = []
    for ids in windows.split(8):
        logits = model.logits(model(ids))[:, :-1]
        found.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1))
    return torch.cat(found).double().cpu()


def clock() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def trained_of(model: Transformer) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def fitted(
    bench: Bench, model: Transformer, rate: float, seed: int = 0, steps: int | None = None
) -> tuple[Transformer, dict]:  # fmt: skip
    """Train what has gradients on the orders.  -> the model, how it went"""
    start = clock()
    losses = train(model, bench.train, steps or SIZES.steps, lr=rate, seed=seed, progress=False)
    return model, {"parameters": trained_of(model), "rate": rate, "steps": len(losses), "losses": losses,
                   "seconds a step": (clock() - start) / len(losses)}  # fmt: skip


def with_lora(model: Transformer, r: int, targets: Any = "all-linear", seed: int = 0, **more: Any) -> Transformer:
    """alpha 16 for all ranks: the rate that is right for one is then about right for others."""
    return adapted(model, LoraConfig(**{"r": r, "lora_alpha": 16, "target_modules": targets} | more), seed)


def whole(model: Transformer) -> Transformer:
    return model.requires_grad_(True)


# ---- the task --------------------------------------------------------------------------------------------------------


def first_object(text: str) -> str:
    """The first JSON object in a text, wherever it ends; or the text."""
    begin = text.find("{")
    try:
        _, end = json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError, IndexError):
        return text
    return text[begin:end]


def generated(bench: Bench, prompts: Sequence[list[int]]) -> list[str]:
    """What the base model writes, greedily."""
    out: list[str] = []
    for part in chunks(prompts, 100):
        outputs = cached_batch(bench.base, part, SamplingParams(temperature=0, max_tokens=4 if SMALL else 80))
        out += [bench.tokenizer.decode(ids, skip_special_tokens=True) for ids in outputs]
    return out


def prompts_of(bench: Bench) -> dict[str, list[list[int]]]:
    def plain(count: int) -> list[list[int]]:
        shots = "".join(f"{order.prompt}{order.answer}\n\n" for order in bench.shots[:count])
        return [bench.tokenizer.encode(shots + order.prompt, add_special_tokens=False) for order in bench.orders]

    def asked(order: Order) -> list[int]:
        text = f"<|im_start|>user\n{INSTRUCTION}{order.text}<|im_end|>\n<|im_start|>assistant\n"
        return bench.tokenizer.encode(text, add_special_tokens=False)

    return {"prompt alone": plain(0), "instruction": [asked(order) for order in bench.orders],
            "3 examples": plain(3), **({"10 examples": plain(10)} if GPU else {})}  # fmt: skip


def task_part(bench: Bench, save: Save) -> None:
    """Before; with examples in the prompt; by rank; by what is adapted; whole."""
    prompted: dict[str, dict] = {}
    rows: list[dict] = []
    result = {"orders": len(bench.orders), "train": len(bench.train), "batch": 8, "prompted": prompted, "rows": rows,
              "steps": SIZES.steps}  # fmt: skip
    tokens = [e.count for e in bench.train], [len(e.token_ids) for e in bench.train]
    result |= {"answer tokens": statistics.mean(tokens[0]), "tokens": statistics.mean(tokens[1])}
    for name, prompts in prompts_of(bench).items():
        texts = generated(bench, prompts)
        met = [order.is_met_by(first_object(text)) for order, text in zip(bench.orders, texts, strict=True)]
        prompted[name] = about(met) | {"sample": texts[0], "tokens": statistics.mean(map(len, prompts))}
        print(name, prompted[name]["right"], "of", len(met), repr(texts[0][:100]), flush=True)
        save(result)
    ways: dict[str, tuple[Callable[[int], Transformer], float]] = {
        f"LoRA, r = {r}": (lambda seed, r=r: with_lora(bench.fresh(), r, seed=seed), RATES["LoRA"]) for r in SIZES.ranks
    }
    ways["whole model"] = (lambda seed: whole(bench.fresh()), RATES["whole model"])
    if GPU or SMALL:
        ways["LoRA, r = 8, q and v"] = (lambda seed: with_lora(bench.fresh(), 8, QUERY_VALUE, seed), RATES["LoRA"])
        ways["LoRA, r = 24, attention"] = (lambda seed: with_lora(bench.fresh(), 24, ATTENTION, seed), RATES["LoRA"])
        mlp = ("gate_proj", "up_proj", "down_proj")
        ways["LoRA, r = 8, MLP"] = (lambda seed: with_lora(bench.fresh(), 8, mlp, seed), RATES["LoRA"])
    for (name, (make, rate)), seed in itertools.product(ways.items(), SIZES.seeds):
        model, how = fitted(bench, make(seed), rate, seed)
        rows.append({"name": name, "seed": seed, **how, **bench.score(model, other=True)})
        show(rows[-1])
        save(result)


def show(row: dict) -> None:
    kept = {k: round(v, 4) for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    print(row.get("name", ""), kept, flush=True)


# ---- learning rates, scales ------------------------------------------------------------------------------------------


def rates_part(bench: Bench, save: Save) -> None:
    """LoRA of rank 8 and the whole model, by learning rate: on orders to choose by, and on those held out."""
    rows: list[dict] = []
    ways = [("LoRA", rate) for rate in SIZES.lora_rates] + [("whole model", rate) for rate in SIZES.full_rates]
    for kind, rate in ways:
        model = with_lora(bench.fresh(), 8) if kind == "LoRA" else whole(bench.fresh())
        try:
            model, how = fitted(bench, model, rate, steps=SIZES.rate_steps)
        except FloatingPointError as e:
            rows.append({"name": kind, "rate": rate, "failed": str(e)})
        else:
            dev = bench.score(model, bench.dev)
            rows.append({"name": kind, **how, "dev": dev, **bench.score(model, other=True)})
        show(rows[-1])
        save({"steps": SIZES.rate_steps, "rows": rows})
    choose_rates(rows)


def choose_rates(rows: list[dict]) -> None:
    """Those of the least loss on orders to choose by, for the parts to come."""
    for kind in RATES:
        tried = [x for x in rows if x["name"] == kind and "dev" in x]
        RATES[kind] = min(tried, key=lambda x: x["dev"]["nats"])["rate"] if tried else RATES[kind]


def scale_part(bench: Bench, save: Save) -> None:
    """How much one step changes a layer's output, by rank: with scale alpha / r and alpha / sqrt(r), by Adam's first
    step, whose every entry is the rate, and by the gradient's. alpha is such that rank 16 has the scale 2 by both.
    """
    rows: list[dict] = []
    formula = formula_errors()
    print(formula, flush=True)
    for r, rslora in itertools.product(SIZES.scale_ranks, (False, True)):
        alpha = 2 * (16**0.5 if rslora else 16)
        model = with_lora(bench.fresh(), r, lora_alpha=alpha, use_rslora=rslora)
        loss, count = loss_of(model, bench.train[: 8 if GPU else 2])
        (loss / count).backward()
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
        zero = all(not p.grad.any() for layer in layers for p in layer.lora_a.values())
        some = all(p.grad.any() for layer in layers for p in layer.lora_b.values())
        row = {"r": r, "rsLoRA": rslora, "scale": layers[0].scales[next(iter(layers[0].scales))],
               "gradients of A are 0": zero, "gradients of B are not": some}  # fmt: skip
        for name, step in (("Adam", torch.sign), ("gradient", lambda g: g)):
            changes = []
            hooks = [layer.register_forward_hook(sizes_into(changes)) for layer in layers]
            for layer in layers:
                for p in layer.lora_b.values():
                    p.data = -(1e-4 if name == "Adam" else 1e-2) * step(p.grad)
            with torch.no_grad():
                loss_of(model, bench.train[: 8 if GPU else 2])
            for hook in hooks:
                hook.remove()
            row[name] = statistics.median(changes)
        rows.append(row)
        show(row)
        save({"formula": formula, "rows": rows})


class PlainLora(nn.Module):
    """x Wᵀ + γ (x Aᵀ) Bᵀ and nothing else.  weight [N, K], a [r, K], b [N, r]"""

    def __init__(self, weight: Tensor, r: int, alpha: float) -> None:
        super().__init__()
        bound = weight.shape[1] ** -0.5
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.a = nn.Parameter(torch.empty(r, weight.shape[1]).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(len(weight), r))
        self.scale = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, self.a), self.b)

    @torch.no_grad()
    def merge(self) -> None:
        self.weight += self.scale * self.b @ self.a


def formula_errors(n: int = 48, k: int = 64, r: int = 4, rate: float = 0.1) -> dict[str, float]:
    """Autograd's gradients against γ G Aᵀ and γ Bᵀ G, at B = 0 and after a step; what the step made of W."""
    torch.manual_seed(0)
    layer, x, g = PlainLora(torch.randn(n, k), r, 2.0 * r), torch.randn(32, k), torch.randn(32, n)
    big, errors, before = g.T @ x, {}, layer.weight.clone()  # G [N, K]
    for when in ("at first", "then"):
        layer.zero_grad()
        (layer(x) * g).sum().backward()
        for name, p, formula in (("A", layer.a, layer.b.T @ big), ("B", layer.b, big @ layer.a.T)):
            assert p.grad is not None
            errors[f"{name}, {when}"] = float((p.grad - layer.scale * formula).detach().norm() / (1e-9 + p.grad.norm()))
        if when == "at first":
            assert not layer.a.grad.any()
            with torch.no_grad():
                layer.b -= rate * layer.b.grad
                step = -rate * layer.scale**2 * big @ layer.a.T @ layer.a
                errors["W"] = float((layer.scale * layer.b @ layer.a - step).norm() / step.norm())
    y = layer(x)
    layer.merge()
    errors["merged"] = float((F.linear(x, layer.weight) - y).detach().norm() / y.detach().norm())
    assert not torch.equal(before, layer.weight)
    return errors


def sizes_into(changes: list[float]) -> Callable[..., None]:
    def hook(layer: LoraLinear, inputs: tuple, output: Tensor) -> None:
        y = layer.base(inputs[0])
        changes.append(float((output - y).norm() / y.norm()))

    return hook


# ---- memory and time -------------------------------------------------------------------------------------------------


def memory_part(bench: Bench, save: Save) -> None:
    """Bytes that stay between two steps, counted from tensors, and the peak of a step; seconds a step."""
    rows: list[dict] = []
    bits = {"QLoRA, r = 8": ("float32", True), "QLoRA, r = 8, bf16": ("bfloat16", True),
            "LoRA, r = 8, bf16": ("bfloat16", False), "LoRA, r = 8": ("float32", False),
            "whole model": ("float32", False)}  # fmt: skip
    for (name, (dtype, few)), batch in itertools.product(bits.items(), SIZES.tokens):
        if GPU:
            torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated() if GPU else 0
        model = bench.loaded(dtype)
        if few:
            quantize_model(model, "rtn", bits=4, group_size=64)
        model = whole(model) if name == "whole model" else with_lora(model, 8)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        seconds = []
        for _ in range(4 if GPU else 2):
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            start = clock()
            optimizer.zero_grad()
            loss, count = loss_of(model, bench.train[:batch])
            (loss / count).backward()
            optimizer.step()
            seconds.append(clock() - start)
        weights = {id(t): nbytes(t) for t in (*model.parameters(), *model.buffers()) if t is not None}
        trained = [p for p in model.parameters() if p.requires_grad]
        state = sum(nbytes(t) for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
        row = {"name": name, "batch": batch, "tokens": sum(len(e.token_ids) for e in bench.train[:batch]),
               "parameters": trained_of(model), "weights": sum(weights.values()),
               "gradients": sum(nbytes(p.grad) for p in trained if p.grad is not None), "optimizer": state,
               "seconds": min(seconds)}  # fmt: skip
        row["counted"] = row["weights"] + row["gradients"] + row["optimizer"]
        if GPU:
            row["allocated"] = torch.cuda.memory_allocated() - before
            row["peak"] = torch.cuda.max_memory_allocated() - before
        del model, optimizer, loss, trained
        rows.append(row)
        show(row)
        save({"rows": rows})


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ---- merging ---------------------------------------------------------------------------------------------------------


def merge_part(bench: Bench, save: Save) -> None:
    """One adapter trained beside weights in fp32, one beside weights in 4 bits: what they are worth on, and merged
    into, weights of 32, 16 and 4 bits; how much of the change is left.
    """
    rows: list[dict] = []
    result: dict[str, Any] = {"rows": rows}

    def add(name: str, model: Transformer, **more: Any) -> None:
        rows.append({"name": name, **bench.score(model, other=True), **more})
        show(rows[-1])
        save(result)

    def four(model: Transformer) -> Transformer:
        return quantize_model(model, "rtn", bits=4, group_size=64)

    model, how = fitted(bench, with_lora(bench.fresh(), 8), RATES["LoRA"])
    adapter = adapter_of(model)
    result["trained in fp32"] = how
    add("fp32, adapter beside", model)
    merge(model)
    merged = model
    add("fp32, merged", model)
    del model
    half = bench.fresh().bfloat16()
    add("bf16, adapter beside", attach(half, adapter))
    merge(half)
    add("bf16, merged", half)
    del half
    add("4 bits, adapter of fp32 beside", attach(four(bench.fresh()), adapter))
    add("fp32, merged, then 4 bits", four(merged))
    del merged

    base = four(bench.fresh())
    result["share of the 4-bit step"] = against_steps(base, adapter)
    add("4 bits, none", base)
    model, how = fitted(bench, with_lora(base, 8), RATES["LoRA"])
    result["QLoRA"] = how
    few = adapter_of(model)
    add("QLoRA, adapter beside", model)
    before = {name: layer.base.quantized() for name, layer in lora_layers(model)}
    kept, grids = {n: q.dequantize(torch.float32) for n, q in before.items()}, {n: q.grid for n, q in before.items()}
    result["share of the 4-bit step, QLoRA"] = against_steps(model, few)
    merge(model)
    add("QLoRA, merged into 4 bits", model, **lost(model, kept, few))
    for name, layer in sites_of(model):  # the integers that it had, and those alone may move
        old = grids[name]
        weight = kept[name] + change_of(name, layer, few)
        layer.set(QuantizedTensor.round(weight, old, layer.format.scheme), layer.bias, weight.device)
    add("QLoRA, merged into 4 bits on the old grid", model, **lost(model, kept, few))
    opened = bench.fresh()
    for name, weight in kept.items():
        replace_weight(opened, sites(opened)[name], weight)
    attach(opened, few)
    merge(opened)
    add("QLoRA, merged into weights read back to fp32", opened)
    add("QLoRA, the same in bf16", opened.bfloat16())


def lora_layers(model: Transformer) -> list[tuple[str, LoraLinear]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLinear)]


def against_steps(model: Transformer, adapter: Adapter) -> dict:
    """Of each module: the root mean square of its change, in steps of the grid; the largest change. Medians."""
    rms, largest = [], []
    layers = modules(model)
    for name, pair in adapter.pairs.items():
        layer = getattr(layers[name], "base", layers[name])
        assert isinstance(layer, QuantLinear)
        step = float(layer.quantized().grid.scale.float().median())
        change = pair.delta().to(DEVICE)
        rms.append(float(change.square().mean().sqrt()) / step)
        largest.append(float(change.abs().max()) / step)
    return {"rms": statistics.median(rms), "largest": statistics.median(largest)}


def lost(model: Transformer, before: dict[str, Tensor], adapter: Adapter) -> dict:
    """What merging into 4 bits made of the change D: |what W became - W - D| / |D|, and the share of weights that are
    what they were, but for a quarter of a step. Medians of layers.
    """
    errors, still = [], []
    for name, layer in sites_of(model):
        q, change = layer.quantized(), change_of(name, layer, adapter)
        now = q.dequantize(torch.float32) - before[name]
        errors.append(float((now - change).norm() / change.norm()))
        step = q.grid.scale.float()
        step = step.repeat_interleave(now.shape[1] // step.shape[1], 1)
        still.append(float((now.abs() < step / 4).float().mean()))
    return {"error over change": statistics.median(errors), "weights that stayed": statistics.median(still)}


def change_of(name: str, layer: QuantLinear, adapter: Adapter) -> Tensor:
    """Of all of a layer's parts, [N, K]."""
    prefix = f"model.{name.rpartition('.')[0]}."
    return torch.cat([adapter.pairs[prefix + part].delta().to(DEVICE) for part in layer.parts])


def sites_of(model: Transformer) -> list[tuple[str, QuantLinear]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantLinear)]


# ---- bottlenecks -----------------------------------------------------------------------------------------------------


def bottleneck_part(bench: Bench, save: Save) -> None:
    """Bottleneck adapters, learnt alike; and what a token's pass takes with each kind, on this device."""
    rows: list[dict] = []
    ids = torch.randint(100, 1000, (1, 1), device=DEVICE)

    def seconds(model: Transformer) -> float:
        if GPU:  # the GPU's own time: a host's launches differ from run to run
            from gpu import graph_seconds

            with torch.no_grad():
                return graph_seconds([lambda: model(ids)])
        times = []
        for _ in range(30):
            start = clock()
            model(ids)
            times.append(clock() - start)
        return statistics.median(times[5:])

    with torch.no_grad():
        result: dict[str, Any] = {"rows": rows, "seconds of the base": seconds(bench.base)}
        lora = with_lora(bench.fresh(), 8)
        result["seconds of LoRA beside"] = seconds(lora)
        merge(lora)
        result["seconds of LoRA merged"] = seconds(lora)
        del lora
    kinds = [("pfeiffer", 16)] + ([("houlsby", 16), ("pfeiffer", 64)] if GPU else [])
    for (kind, factor), rate in itertools.product(kinds, (1e-3, 3e-3) if GPU else (1e-3,)):
        model = bottlenecked(bench.fresh(), kind, factor)
        model, how = fitted(bench, model, rate)
        with torch.no_grad():
            took = seconds(model)
        dev = bench.score(model, bench.dev)["nats"]
        found = bench.score(model, other=True)
        rows.append({"name": kind, "factor": factor, **how, **found, "dev nats": dev, "seconds": took})
        show(rows[-1])
        save(result)


# ---- many adapters ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def products_part(bench: Bench, save: Save, tokens: int = 64, size: int = 4096, r: int = 16) -> None:
    """What adapters add to one product, by how many different ones are in a batch: a loop over adapters with a product
    over all tokens each, vectors gathered for each token, and minillm's: tokens sorted by adapter.
    """
    rows: list[dict] = []
    size = 256 if SMALL else size
    dtype = torch.bfloat16 if GPU else torch.float32
    draw = torch.Generator(DEVICE).manual_seed(0)
    x, w = (torch.randn(n, size, generator=draw, device=DEVICE, dtype=dtype) for n in (tokens, size))
    for distinct in (1, 8, 64):
        a = torch.randn(distinct, 1, r, size, generator=draw, device=DEVICE, dtype=dtype) / size**0.5
        b = torch.randn(distinct, size, r, generator=draw, device=DEVICE, dtype=dtype)
        mine = torch.arange(tokens, device=DEVICE) % distinct
        plan = LoraPlan.of(mine.int() + 1, distinct)
        there = torch.ones(distinct, 1, dtype=torch.int32, device=DEVICE)
        y = F.linear(x, w)

        def ours(y: Tensor, x: Tensor, a: Tensor, b: Tensor, plan: LoraPlan = plan, there: Tensor = there) -> Tensor:
            multi_lora(y, x, a, b, there, (size,), plan.adapters, plan.order, plan.starts)
            return y

        with use("auto"):
            want = loop(x, a[:, 0], b, mine)
            for found in (ours(torch.zeros_like(y), x, a, b), gathered(x, a[:, 0], b, mine)):
                assert float((found - want).float().norm() / want.float().norm()) < 0.02
            rows.append({
                "adapters": distinct, "base": seconds_of(F.linear, x, w),
                "loop": seconds_of(loop, x, a[:, 0], b, mine), "gathered": seconds_of(gathered, x, a[:, 0], b, mine),
                "sorted": seconds_of(ours, y, x, a, b),
            })  # fmt: skip
        show(rows[-1])
        save(
            {
                "tokens": tokens,
                "size": size,
                "rank": r,
                "all in graphs": GPU,
                "dtype": str(dtype).removeprefix("torch."),
                "rows": rows,
            }
        )


def loop(x: Tensor, a: Tensor, b: Tensor, mine: Tensor) -> Tensor:
    """Adapter by adapter, over all tokens.  x [T, K], a [n, r, K], b [n, N, r], mine [T]"""
    y = x.new_zeros(len(x), b.shape[1])
    for i in range(len(a)):
        y += torch.where((mine == i)[:, None], F.linear(F.linear(x, a[i]), b[i]), 0)
    return y


def gathered(x: Tensor, a: Tensor, b: Tensor, mine: Tensor) -> Tensor:
    """Every token with a copy of its adapter."""
    low = torch.bmm(a[mine], x[:, :, None])  # [T, r, 1]
    return torch.bmm(b[mine], low)[:, :, 0]


def seconds_of(run: Callable[..., Tensor], *inputs: Tensor) -> float:
    """On a GPU inside a graph, with weights from memory."""
    if GPU:
        from gpu import copies, graph_seconds

        return graph_seconds([lambda i=i: run(*i) for i in copies(*inputs)])
    return median_seconds(lambda: run(*inputs), 7, 2)


PARTS = {
    "rates": rates_part, "task": task_part, "scale": scale_part, "memory": memory_part, "merge": merge_part,
    "bottleneck": bottleneck_part, "products": products_part,
}  # fmt: skip


def main() -> None:
    wanted = parts_asked(PARTS)
    choose_rates(recorded("chapter_12").get("rates", {}).get("rows", []))
    with use("torch"):  # training takes torch's path, so judging does
        run_parts("chapter_12", PARTS, wanted, Bench(), not SMALL)


if __name__ == "__main__":
    main()
