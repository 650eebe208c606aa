"""What chapter 9 quotes: SmolLM2 in fewer bits by granularity, error against theory, channels that matter, ranges of
activations, training with rounding, products on a CPU.

    python benchmarks/chapter_09.py                  everything (twenty minutes on one core, SmolLM2 in fp32)
    python benchmarks/chapter_09.py speed salience   these parts again; the rest of the recorded file stays

Perplexities are of the first 512 tokens of held-out topics, none of which stands in the calibration text. Weights are
rounded by `minillm.quant`, computed with in fp32; embedding and head stay. A difference to fp32 has a standard error
over windows, as the same windows are scored both times.
"""

import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from chapter_03 import BATCH, END, MERGES, WINDOW, batches, clean_split, scored, train_small
from common import ROOT, device, record
from torch import Tensor

from minillm.config import ModelConfig
from minillm.model import Transformer
from minillm.model.linear import Dense
from minillm.model.tokenizer import Tokenizer
from minillm.model.weights import load, model_path
from minillm.quant import Grid, Scheme, error_grid, fake_quantize, minmax_grid

MODEL, LENGTH, WINDOWS = "smollm2-135m-instruct", 512, 6


class Seen(Dense):
    """A layer that shows its input to `see`, or computes with what `see` makes of it."""

    see: Callable[[str, Tensor], Tensor] | None = None  # set on the class
    name = ""

    def forward(self, x: Tensor, batch: object = None) -> Tensor:
        return super().forward(x if Seen.see is None else Seen.see(self.name, x))


def seen(name: str, in_features: int, parts: dict[str, int], bias: bool) -> Dense:
    if name == "lm_head":
        return Dense(in_features, parts, bias)
    layer = Seen(in_features, parts, bias)
    layer.name = name
    return layer


def model_and_text() -> tuple[Transformer, Tensor, Tensor]:
    """SmolLM2 in fp32, held-out windows [WINDOWS, LENGTH + 1], calibration windows [16, LENGTH]."""
    tokenizer = Tokenizer.from_pretrained(model_path(MODEL))
    train, held_out, _ = clean_split()

    def long(texts: dict[str, str], count: int) -> Tensor:
        ids = (tokenizer.encode(text)[: LENGTH + 1] for text in texts.values() if len(text) > 2 * LENGTH)
        return torch.tensor([row for row in ids if len(row) == LENGTH + 1][:count])

    return load(MODEL, "cpu", "float32", linear=seen), long(held_out, WINDOWS), long(train, 16)[:, :-1]


@torch.inference_mode()
def losses(model: Transformer, rows: Tensor) -> list[float]:
    """Nats a token of each window."""
    found = []
    for row in rows:
        logits = model.logits(model(row[None, :-1]))[0]
        found.append(float(F.cross_entropy(logits, row[1:])))
    return found


def summary(found: list[float], base: list[float]) -> dict:
    """Perplexity, and the difference in nats a token to `base` with its standard error."""
    gaps = [a - b for a, b in zip(found, base, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    return {"perplexity": math.exp(statistics.mean(found)), "nats": statistics.mean(gaps), "error": error}


def layers(model: Transformer) -> dict[str, Dense]:
    return {layer.name: layer for layer in model.modules() if isinstance(layer, Seen)}


@torch.no_grad()
def with_weights(model: Transformer, change: Callable[[str, Tensor], Tensor], run: Callable[[], list[float]]) -> list:
    """What `run()` gives while each layer's weight is `change(name, weight)`."""
    kept = {name: layer.weight.data for name, layer in layers(model).items()}
    try:
        for name, layer in layers(model).items():
            layer.weight.data = change(name, kept[name])
        return run()
    finally:
        for name, layer in layers(model).items():
            layer.weight.data = kept[name]


def rounded(scheme: Scheme, grid: Callable[[Tensor, Scheme], Grid] = minmax_grid) -> Callable[[str, Tensor], Tensor]:
    return lambda name, w: fake_quantize(w, grid(w, scheme), scheme)


def asymmetric(bits: int, who: str | int) -> Scheme:
    if isinstance(who, int):
        return Scheme(bits, "int", False, "group", who)
    return Scheme(bits, "int", False, who)


# ---- error against theory --------------------------------------------------------------------------------------------


def decibel(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise else math.inf


def error_part() -> dict:
    """SQNR by bits: uniform numbers, a normal distribution, SmolLM2's weights; the best clipping for a normal one."""
    generator = torch.Generator().manual_seed(0)
    data = {
        "uniform": torch.rand(512, 4096, generator=generator) * 2 - 1,
        "normal": torch.randn(512, 4096, generator=generator),
    }
    weights = [layer.weight.detach() for layer in layers(load(MODEL, "cpu", "float32", linear=seen)).values()]
    bits, result = list(range(2, 9)), {}

    def sqnr(tensors: list[Tensor], scheme: Scheme) -> float:
        noise = sum(float((fake_quantize(w, minmax_grid(w, scheme), scheme) - w).square().sum()) for w in tensors)
        return decibel(sum(float(w.square().sum()) for w in tensors), noise)

    for name, tensors in (("uniform", [data["uniform"]]), ("normal", [data["normal"]]), ("SmolLM2", weights)):
        for who in ("tensor", "channel", 192, 64, 32):
            if name == "SmolLM2" or who == "channel":
                result[f"{name}, {who}"] = [sqnr(tensors, asymmetric(b, who)) for b in bits]
                print(name, who, result[f"{name}, {who}"], flush=True)
    clip = {}
    x, steps = data["normal"].flatten(), torch.linspace(0.8, 5.2, 45)
    for b in (2, 3, 4, 8):
        scheme, rows = Scheme(b, "int", True, "tensor"), []
        for most in steps.tolist():
            grid = Grid(torch.tensor([[2 * most / (2**b - 1)]]))
            error = (fake_quantize(x[None], grid, scheme)[0] - x).square()
            outside = x.abs() > most
            rows.append([float(error[~outside].sum()) / len(x), float(error[outside].sum()) / len(x)])
        clip[str(b)] = rows
    blocks = weights[0].unflatten(1, (-1, 32))  # [N, G, 32]
    least, most = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    own = (most - least) / 15
    back = ((blocks - least) / own).round() * own + least
    return {
        "bits": bits,
        "sqnr": result,
        "clip at": steps.tolist(),
        "clipping": clip,
        "own grid, largest relative error": float((back - blocks).abs().max() / blocks.abs().max()),
        "largest of a normal row of 4096": float(data["normal"].abs().amax(1).mean()),
    }


# ---- granularity -----------------------------------------------------------------------------------------------------


def granularity_part() -> dict:
    """Perplexity by bits and by who shares a scale; symmetric ones, fp8, NF4, and grids of the least error beside."""
    model, rows, _ = model_and_text()
    base, found = losses(model, rows), []

    def measure(name: str, scheme: Scheme, grid: Callable[[Tensor, Scheme], Grid] = minmax_grid) -> None:
        got = summary(with_weights(model, rounded(scheme, grid), lambda: losses(model, rows)), base)
        parts = [(layer.weight.shape, layer.weight.numel()) for layer in layers(model).values()]
        cost = sum(scheme.bits_per_weight(*shape) * n for shape, n in parts) / sum(n for _, n in parts)
        about = {"scheme": name, "bits": scheme.bits, "who": str(scheme.group_size or scheme.strategy)}
        found.append(about | {"symmetric": scheme.symmetric, "bits a weight": cost} | got)
        print(found[-1], flush=True)

    for bits in (8, 4, 3, 2):
        for who in ("tensor", "channel", 192, 64, 32):
            measure("minmax", asymmetric(bits, who))
        for who in ("channel", 64):
            if bits > 2:
                measure("minmax", dataclasses.replace(asymmetric(bits, who), symmetric=True))
    for bits in (4, 3, 2):
        for who in ("channel", 64):
            measure("least error", asymmetric(bits, who), error_grid)
    measure("fp8", Scheme(8, "float", True, "channel"))
    measure("nf4", Scheme(4, "nf", True, "group", 64))
    return {
        "fp32": math.exp(statistics.mean(base)), "windows": [len(rows), LENGTH], "rows": found,
        "weights": sum(layer.weight.numel() for layer in layers(model).values()),
    }  # fmt: skip


# ---- channels that matter --------------------------------------------------------------------------------------------


@torch.inference_mode()
def mean_size(model: Transformer, rows: Tensor) -> dict[str, Tensor]:
    """The mean |x| of every input feature of every layer."""
    sums: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> Tensor:
        sums[name] = sums.get(name, 0) + x.abs().flatten(0, -2).sum(0)
        return x

    Seen.see = see
    for row in rows:
        model(row[None])
    Seen.see = None
    return {name: total / rows.numel() for name, total in sums.items()}


def salience_part(share: float = 0.01) -> dict:
    """3 bits; 1 % of input features keep their weights: those of the largest activations, of the largest weights, and
    any. They are left out of the grids, too.
    """
    model, rows, calibration = model_and_text()
    base, size = losses(model, rows), mean_size(model, calibration[:8])
    generator, result = torch.Generator().manual_seed(0), {}

    def pick(how: str, name: str, w: Tensor) -> Tensor:
        count = max(1, round(share * w.shape[1]))
        if how == "activations":
            return size[name].topk(count).indices
        if how == "weights":
            return w.norm(dim=0).topk(count).indices
        return torch.randperm(w.shape[1], generator=generator)[:count]

    for who in ("channel", 64):
        scheme = asymmetric(3, who)

        def keep(how: str, scheme: Scheme = scheme) -> Callable[[str, Tensor], Tensor]:
            def change(name: str, w: Tensor) -> Tensor:
                if not how:
                    return fake_quantize(w, minmax_grid(w, scheme), scheme)
                columns = pick(how, name, w)
                rest = w.index_fill(1, columns, 0.0)
                return fake_quantize(rest, minmax_grid(rest, scheme), scheme).index_copy(1, columns, w[:, columns])

            return change

        result[str(who)] = {}
        for how in ("", "activations", "weights", "random 1", "random 2"):
            found = with_weights(model, keep(how), lambda: losses(model, rows))
            result[str(who)][how or "none"] = summary(found, base)
            print(who, how, result[str(who)][how or "none"], flush=True)
    largest = {name: float(x.max() / x.median()) for name, x in size.items()}
    return {"fp32": math.exp(statistics.mean(base)), "share": share, "ppl": result, "largest over median": largest}


# ---- ranges of activations -------------------------------------------------------------------------------------------


def activations_part() -> dict:
    """Activations in 8 bits, symmetric: a scale for each layer found on 1 or on 16 calibration windows, or for each
    token as it comes; how often the held-out text leaves the range.
    """
    model, rows, calibration = model_and_text()
    base, result = losses(model, rows), {}
    limits: dict[str, list[float]] = {name: [] for name in layers(model)}
    cut: dict[str, list[float]] = {name: [] for name in layers(model)}

    def note(name: str, x: Tensor) -> Tensor:
        limits[name].append(float(x.abs().max()))
        cut[name].append(float(x.abs().flatten().kthvalue(math.ceil(0.9999 * x.numel())).values))
        return x

    Seen.see = note
    with torch.inference_mode():
        for row in calibration:
            model(row[None])
        seen_limits, seen_cut = ({name: list(x) for name, x in found.items()} for found in (limits, cut))
        for found in (*limits.values(), *cut.values()):
            found.clear()
        for row in rows:
            model(row[None, :-1])
    held = {name: max(x) for name, x in limits.items()}
    token = Scheme(8, "int", True, "channel")

    def per_token(name: str, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        return fake_quantize(flat, minmax_grid(flat, token), token).view_as(x)

    def static(most: dict[str, float]) -> Callable[[str, Tensor], Tensor]:
        whole = Scheme(8, "int", True, "tensor")
        grids = {name: Grid(torch.tensor([[2 * value / 255]])) for name, value in most.items()}
        return lambda name, x: fake_quantize(x.flatten(0, -2), grids[name], whole).view_as(x)

    ways: dict[str, Callable[[str, Tensor], Tensor]] = {"a token, as it comes": per_token}
    for count in (1, 16):
        most = {name: max(x[:count]) for name, x in seen_limits.items()}
        ways[f"{count} windows"] = static(most)
        result[f"{count} windows: layers beyond"] = sum(held[name] > value for name, value in most.items())
        result[f"{count} windows: largest over"] = max(held[name] / value for name, value in most.items())
    ways["16 windows, 99.99 %"] = static({name: max(x) for name, x in seen_cut.items()})
    for name, way in ways.items():
        Seen.see = way
        result[name] = summary(losses(model, rows), base)
        print(name, result[name], flush=True)
    Seen.see = None
    spread = {name: seen_limits[name][0] / seen_cut[name][0] for name in seen_limits}
    return {"fp32": math.exp(statistics.mean(base)), "ways": result, "largest over 99.99 %": spread}


# ---- training with rounding ------------------------------------------------------------------------------------------


class Rounding(Dense):
    """Computes with its weight rounded, and gives the weight the gradient of the rounded one."""

    scheme: Scheme | None = None  # set on the class

    def forward(self, x: Tensor, batch: object = None) -> Tensor:
        if Rounding.scheme is None:
            return super().forward(x)
        w, scheme = self.weight, Rounding.scheme
        back = fake_quantize(w.detach(), minmax_grid(w.detach(), scheme), scheme)
        return F.linear(x, w + (back - w).detach(), self.bias)


def rounding(name: str, in_features: int, parts: dict[str, int], bias: bool) -> Dense:
    return (Dense if name == "lm_head" else Rounding)(in_features, parts, bias)


def qat_part(steps: int = 120, seeds: int = 2) -> dict:
    """Chapter 3's model: rounded after training, and trained on with rounding; the same steps without it beside."""
    texts, held_out, _ = clean_split()
    tokenizer = Tokenizer.train(texts.values(), MERGES, special_tokens=[END], eos_token=END)
    first, about = train_small(tokenizer, texts, held_out)
    ids = torch.tensor([i for t in texts.values() for i in [tokenizer.special_tokens[END], *tokenizer.encode(t)]])
    rows = []

    def score(model: Transformer, scheme: Scheme | None) -> float:
        Rounding.scheme = scheme
        found = scored(model, tokenizer, held_out, WINDOW, WINDOW).cross_entropy
        Rounding.scheme = None
        return found

    def train(scheme: Scheme | None, seed: int) -> tuple[Transformer, float]:
        model = Transformer(first.config, rounding)
        model.load_state_dict(first.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        generator, Rounding.scheme = torch.Generator().manual_seed(seed), scheme
        start = time.perf_counter()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min((step + 1) / 10, 1 - step / steps)
            batch = batches(ids, generator)
            loss = F.cross_entropy(model.logits(model(batch[:, :-1])).flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        Rounding.scheme = None
        return model, (time.perf_counter() - start) / steps

    schemes = {bits: Scheme(bits, "int", True, "channel") for bits in (3, 2)}
    same = Transformer(first.config, rounding)
    same.load_state_dict(first.state_dict())
    float_loss = score(same, None)
    for seed in range(1, seeds + 1):
        control, seconds = train(None, seed)
        row = {"seed": seed, "control": score(control, None), "seconds a step": seconds}
        for bits, scheme in schemes.items():
            model, slower = train(scheme, seed)
            old, new = control.layers[0].mlp.down_proj.weight, model.layers[0].mlp.down_proj.weight
            row[str(bits)] = {
                "control, rounded": score(control, scheme), "trained with": score(model, scheme),
                "trained with, not rounded": score(model, None), "seconds a step": slower,
                "moved": float((new - old).norm() / old.norm()),
            }  # fmt: skip
        rows.append(row)
        print(row, flush=True)
    after = {str(bits): score(same, scheme) for bits, scheme in schemes.items()}
    parameters = {
        "all": about["parameters"],
        "rounded": sum(p.weight.numel() for p in same.modules() if isinstance(p, Rounding)),
    }
    return {
        "steps": steps, "batch": BATCH, "first": {"steps": about["steps"], "loss": float_loss, "rounded": after},
        "parameters": parameters, "rows": rows,
    }  # fmt: skip


# ---- products on a CPU -----------------------------------------------------------------------------------------------


def thread_seconds(run: Callable[[], object], repeats: int) -> float:
    """The median processor time of this thread in `run()`: what others do on the machine counts less."""
    run()
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def speed_part() -> dict:
    """x W^T for one layer's W by the rows of x, one thread: fp32, bf16, 8 and 4 bits by torch, and decoded first."""
    torch.set_num_threads(1)
    rows = []
    for n, k in ((3072, 576), (4096, 4096)):
        w = torch.randn(n, k) / math.sqrt(k)
        group = Scheme(4, "int", True, "group", 64)
        grid = minmax_grid(w, group)
        levels = (w.unflatten(1, (-1, 64)) / grid.scale[..., None]).round().clamp(-8, 7).flatten(1).int() + 8
        pairs = torch.stack((grid.scale, torch.zeros_like(grid.scale)), -1).transpose(0, 1).contiguous().bfloat16()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        eight = Scheme(8, "int", True, "channel")
        grid8 = minmax_grid(w, eight)
        q8 = (w / grid8.scale).round().clamp(-128, 127).to(torch.int8)
        scale8, half = grid8.scale[:, 0].bfloat16(), w.bfloat16()

        bytes_ = levels.to(torch.int8)

        def decoded(x: Tensor, q: Tensor = bytes_, s: Tensor = grid.scale) -> Tensor:
            return F.linear(x, ((q.float() - 8).unflatten(1, (-1, 64)) * s[..., None]).flatten(1))

        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "fp32": lambda x, w=w: F.linear(x, w),
            "bf16": lambda x, half=half: F.linear(x.bfloat16(), half),
            "int8": lambda x, q8=q8, scale8=scale8: torch._weight_int8pack_mm(x.bfloat16(), q8, scale8),
            "int4": lambda x, packed=packed, pairs=pairs: torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.bfloat16(), packed, 64, pairs
            ),
            "int4, decoded first": decoded,
        }
        for m in (1, 4, 16, 64, 256):
            x = torch.randn(m, k)
            seconds = {}
            for name, way in ways.items():
                got = way(x).float()
                close = float((got - F.linear(x, w)).norm() / F.linear(x, w).norm())
                assert close < (0.2 if "int4" in name else 0.02), (name, close)
                seconds[name] = thread_seconds(lambda way=way, x=x: way(x), 25 if m < 64 else 9)
            rows.append({"shape": [n, k], "rows": m, "seconds": seconds})
            print(rows[-1], flush=True)
    return {"rows": rows}


PARTS = {
    "error": error_part, "granularity": granularity_part, "salience": salience_part,
    "activations": activations_part, "qat": qat_part, "speed": speed_part,
}  # fmt: skip


def main() -> None:
    wanted = sys.argv[1:] or list(PARTS)
    path = ROOT / "benchmarks" / "results" / device()[0] / "chapter_09.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else {}
    results["config"] = ModelConfig.from_pretrained(model_path(MODEL)).to_dict()
    for name in wanted:
        start = time.perf_counter()
        results[name] = PARTS[name]()
        written_to = record("chapter_09", results)
        print(f"{name}: {time.perf_counter() - start:.0f} s, {written_to}", flush=True)


if __name__ == "__main__":
    main()
