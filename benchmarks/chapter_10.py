"""What chapter 10 quotes: every way to 4 bits on SmolLM2, what it is worth to choose, the first token, all roundings of
few weights.

    python benchmarks/chapter_10.py                  all parts for this device; a GPU needs some three minutes
    python benchmarks/chapter_10.py ladder choices   these parts again; the rest of the recorded file stays
    python benchmarks/chapter_10.py --small          three layers, few windows: does it run? Nothing is recorded

Three texts, of which no two share a window: what methods look at (`data.calibration`), other windows of the same topics
to choose settings by, and held-out topics, 24 windows of 512 tokens, to judge by. Weights are rounded by
`minillm.quant` and computed with in fp32; embedding and head stay. On a CPU there are fewer windows, and the ladder
has asymmetric schemes alone, without its slowest row: half an hour on a core of one's own. As long again takes the part
`damping`, whose answer is a default of the package: it has all windows everywhere.
"""

import copy
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from chapter_09 import thread_seconds
from common import parts_asked, run_parts
from torch import Tensor

from minillm.data import calibration, held_out
from minillm.evaluate import Comparison, compare
from minillm.model import Transformer
from minillm.model.linear import Dense
from minillm.model.tokenizer_hf import load_tokenizer
from minillm.model.weights import load, model_path
from minillm.quant.awq import awq_model
from minillm.quant.calibrate import Site, gptq_model, quantize_layers, replace_weight, rtn_model, sites, walk
from minillm.quant.formats import CompressedTensors
from minillm.quant.gptq import Hessian, gptq
from minillm.quant.linear import QuantLinear
from minillm.quant.methods import quantize_model
from minillm.quant.rotation import rotate_model
from minillm.quant.rtn import QuantizedTensor, Scheme, minmax_grid

MODEL = "smollm2-135m-instruct"
GPU, SMALL = torch.cuda.is_available(), "--small" in sys.argv[1:]
LENGTH = 128 if SMALL else 512
DEVICE = "cuda" if GPU else "cpu"
# windows: to look at, to choose by, to judge by
ALL = (2, 2, 2) if SMALL else (64, 24, 24)
WINDOWS = ALL if GPU or SMALL else (8, 2, 4)
SYMMETRIC, ASYMMETRIC = Scheme(4, "int", True, "group", 64), Scheme(4, "int", False, "group", 64)
BOS = 1


class Bench:
    """The model in fp32 and its texts, read once; quantized models that more than one part looks at."""

    def __init__(self, look: int, choose: int, judge: int) -> None:
        self.base = load(MODEL, DEVICE, "float32")
        if SMALL:
            self.base.layers = self.base.layers[:3]
        tokenizer = load_tokenizer(model_path(MODEL))
        ids = calibration(tokenizer, look + choose, LENGTH).to(DEVICE)
        self.look, self.choose = ids[:look], ids[look:]
        self.judge = held_out(tokenizer, judge, LENGTH).to(DEVICE)
        self.kept: dict[str, Transformer] = {}

    def scores(self, model: Transformer) -> dict:
        """On the text to judge by and on that to choose by."""
        return {name: summary(self.compared(model, ids)) for name, ids in self.texts().items()}

    def texts(self) -> dict[str, Tensor]:
        return {"judge": self.judge, "choose": self.choose}

    def compared(self, model: Transformer, ids: Tensor, bos: int | None = None) -> Comparison:
        return compare(outputs(self.base), {"": outputs(model)}, ids, bos)[""]


def outputs(model: Transformer) -> Callable[[Tensor], Tensor]:
    return lambda ids: model.logits(model(ids))


def summary(c: Comparison) -> dict:
    """Beside the same model in fp32; losses in nats a token, errors paired over windows."""
    return {
        "fp32": c.reference_perplexity, "perplexity": c.perplexity, "nats": c.log_ratio, "error": c.log_ratio_error,
        "unpaired error": c.perplexity_error / c.perplexity, "kl": c.kl.mean().item(), "flips": c.flips.mean().item(),
        "nats by window": (c.nll - c.reference_nll).tolist(),
    }  # fmt: skip


def clock() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def bits(model: Transformer, scheme: Scheme) -> dict[str, float]:
    """Bits a weight: of those that were rounded, and of the whole file, whose embedding and head have 16."""
    shapes = [layer.weight.shape for layer in sites(model).values()]
    inside = sum(n * k for n, k in shapes)
    stored = sum(n * k * scheme.bits_per_weight(n, k) for n, k in shapes)
    others = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()) - inside
    count = model.config.num_parameters()
    return {"bits a weight": stored / inside, "of the file": (stored + 16 * others) / count}


# ---- the ladder ------------------------------------------------------------------------------------------------------


DAMPINGS = ("own", "mean", "larger")


def damped(h: Tensor, of: str, share: float = 0.01) -> Tensor:
    """h with a share added to its diagonal: of each column's "own"; of the "mean" of all, as in the paper; or of the
    "larger" of its own and the median, which is what `gptq` does by itself.
    """
    own = h.diagonal()
    added = {"own": own, "mean": own.mean().expand_as(own), "larger": own.clamp(min=own[own > 0].median())}[of]
    return h + share * torch.diag(added)


def otherwise(
    site: Site, scheme: Scheme, damping: float, order: str | None, grid: str, of: str, skip: int, even: bool
) -> QuantizedTensor:
    """GPTQ with another damping; or blind to the first `skip` tokens of each window; or with inputs of one length, so
    that every token counts alike.
    """
    h = Hessian(site.linear.in_features, site.linear.weight.device)
    for x in site.inputs:
        x = x.unflatten(0, (-1, LENGTH))[:, skip:]
        h.add(x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6) if even else x)
    return gptq(site.linear.weight, damped(h.matrix, of, damping), scheme, damping=0, order=order, grid=grid)[0]


def quantized(
    bench: Bench, scheme: Scheme, *, first: str = "", method: str = "rtn", grid: str = "minmax",
    order: str | None = None, seen: bool = True, damping: float = 0.01, of: str = "larger", skip: int = 0,
    even: bool = False, look: Tensor | None = None,
) -> tuple[Transformer, dict]:  # fmt: skip
    """A copy of the model, quantized. first: "awq" or "rotate" before it. seen: whether grids by error count a column's
    errors by its inputs, where nothing else is calibrated.
    """
    ids, start = bench.look if look is None else look, clock()
    model = rotate_model(bench.base) if first == "rotate" else copy.deepcopy(bench.base)
    batches, about = ids.split(8), {}
    if first == "awq":
        awq_model(model, batches, scheme, grid=grid)
    if method == "rtn":
        rtn_model(model, scheme, grid, batches if grid == "error" and seen else None)
    elif of != "larger" or skip or even:
        how = {"damping": damping, "order": order, "grid": grid, "of": of, "skip": skip, "even": even}
        quantize_layers(model, batches, partial(otherwise, scheme=scheme, **how))
    else:
        _, reports = gptq_model(model, batches, scheme, damping=damping, order=order, grid=grid)
        about["loss of RTN's"] = statistics.median(r.loss / r.rtn_loss for r in reports.values())
        about["fallbacks"] = sum(r.fallback is not None for r in reports.values())
    return model, about | {"seconds": clock() - start}


BEST = {"method": "gptq", "order": "activations", "grid": "error"}
LADDER: dict[str, dict] = {
    "RTN": {},
    "RTN, grid by error": {"grid": "error", "seen": False},
    "RTN, grid by the output's error": {"grid": "error"},
    "AWQ": {"first": "awq"},
    "AWQ, grid by the output's error": {"first": "awq", "grid": "error"},
    "GPTQ": {"method": "gptq"},
    "GPTQ, act-order": {"method": "gptq", "order": "activations"},
    "GPTQ, act-order, grid by error": BEST,
    "rotation, RTN": {"first": "rotate"},
    "rotation, GPTQ": BEST | {"first": "rotate"},
}
AT_LAST = "GPTQ, act-order, grid by error"
SLOW = ("AWQ, grid by the output's error",)  # on a CPU


def ladder_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """Every method, and what `quantize_model` makes of the model: packed, and computed by the kernels."""
    rows: list[dict] = []
    result = {"look": list(bench.look.shape), "judge": list(bench.judge.shape), "choose": list(bench.choose.shape)}
    quantized(bench, SYMMETRIC, look=bench.look[:1], **BEST | {"method": "rtn"})  # kernels are compiled now
    for scheme in (ASYMMETRIC, SYMMETRIC) if GPU or SMALL else (ASYMMETRIC,):
        for name, how in LADDER.items():
            if name in SLOW and not (GPU or SMALL):
                continue
            model, about = quantized(bench, scheme, **how)
            row = {"name": name, "symmetric": scheme.symmetric, **about, **bits(model, scheme), **bench.scores(model)}
            rows.append(row)
            show(row)
            save(result | {"rows": rows})
            if not scheme.symmetric and name in ("RTN", AT_LAST):
                bench.kept[name] = model
    model, start = copy.deepcopy(bench.base), clock()
    quantize_model(model, "gptq", bits=4, group_size=64, calibration=bench.look)
    seconds = clock() - start
    if GPU:
        model = model.to(torch.bfloat16)
    row = {"name": "quantize_model", "symmetric": True, "dtype": str(model.dtype).removeprefix("torch.")}
    rows.append(row | {"seconds": seconds, "fallbacks": 0, **bench.scores(model)})
    show(rows[-1])
    save(result | {"rows": rows})


def show(row: dict) -> None:
    about = {key: round(value, 3) for key, value in row.items() if isinstance(value, float)}
    score = {key: round(value, 4) for key, value in row["judge"].items() if isinstance(value, float)}
    print(row["name"], "symmetric" if row.get("symmetric") else "", about, score, flush=True)


def choices_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """The last step of the ladder by damping and by the text that it looks at; judged as the ladder is."""
    rows: list[dict] = []
    ways: list[dict] = [
        {"damping": 0.001},
        {"damping": 0.1},
        {"of": "own"},
        {"of": "mean"},
        {"skip": 1},
        {"even": True},
    ]
    ways += [{"windows": count} for count in ((4, 16) if GPU else (1,) if SMALL else (4,))]
    for way in ways:
        how = BEST | {key: value for key, value in way.items() if key != "windows"}
        model, about = quantized(bench, ASYMMETRIC, look=bench.look[: way.get("windows")], **how)
        rows.append({"name": str(way), **way, **about, **bench.scores(model)})
        show(rows[-1])
        save({"rows": rows})


# ---- the first token -------------------------------------------------------------------------------------------------


def bos_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """Perplexity with and without a token in front of each window; GPTQ that looked at either."""
    for name, how in (("RTN", {}), (AT_LAST, BEST)):
        if name not in bench.kept:
            bench.kept[name], _ = quantized(bench, ASYMMETRIC, **how)
    front = torch.full((len(bench.look), 1), BOS, device=DEVICE)
    models = {
        "RTN": bench.kept["RTN"],
        "GPTQ": bench.kept[AT_LAST],
        "GPTQ, looked at text with BOS": quantized(bench, ASYMMETRIC, look=torch.cat((front, bench.look), 1), **BEST)[
            0
        ],
    }
    plain, with_bos = (
        compare(outputs(bench.base), {k: outputs(m) for k, m in models.items()}, bench.judge, bos)
        for bos in (None, BOS)
    )
    gap = with_bos["RTN"].reference_nll - plain["RTN"].reference_nll
    found = {"fp32": {"nats": gap.mean().item(), "error": gap.std().item() / math.sqrt(len(gap))}}
    rows = {name: {"without": summary(plain[name]), "with": summary(with_bos[name])} for name in models}
    print({name: [round(x["nats"], 4) for x in row.values()] for name, row in rows.items()}, found, flush=True)
    save({"models": rows, **found})


def outlier_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """How much of every layer's Hessian the first token of a window is; what damping makes of the worst layer, on the
    text to judge by. There a first token that comes twice is huge twice: tokens are told apart by their energy.
    """
    found: dict[str, dict] = {}
    count = min(16, len(bench.look))
    worst: tuple[float, str] = (0.0, "")
    kept: dict[str, tuple[Tensor, ...]] = {}
    for site in walk(bench.base, [*bench.look[:count].split(8), *bench.judge.split(8)]):
        x = torch.cat(site.inputs).unflatten(0, (-1, LENGTH))  # [windows, tokens, K]
        x, unseen = x[:count], x[count:].flatten(0, 1)
        energy = x.square().sum((0, 2))  # [tokens]
        mean_square = x.square().mean((0, 1))
        about = {
            "of the first token": float(energy[0] / energy.sum()),
            "mean over median of the diagonal": float(mean_square.mean() / mean_square.median()),
            "largest": float(x.abs().max()), "median of |x|": float(x.abs().median()),
        }  # fmt: skip
        found[site.name] = about
        if site.name.endswith("down_proj") and about["mean over median of the diagonal"] > worst[0]:
            worst = about["mean over median of the diagonal"], site.name
            size = unseen.square().sum(1)
            texts = (x.flatten(0, 1), x[:, 1:].flatten(0, 1), F.normalize(x.flatten(0, 1), dim=-1),
                     unseen[size > 100 * size.median()], unseen[size <= 100 * size.median()])  # fmt: skip
            kept = {site.name: (site.linear.weight.detach().float(), *(y.T @ y / len(y) for y in texts))}
    name = worst[1]
    w, h, no_first, alike, first, others = kept[name]

    def losses(e: Tensor) -> dict[str, float]:
        return {key: float(((e @ m) * e).sum()) for key, m in (("first token", first), ("others", others))}

    by_order = partial(gptq, scheme=ASYMMETRIC, order="activations")
    ways = {"RTN": QuantizedTensor.round(w, minmax_grid(w, ASYMMETRIC), ASYMMETRIC)}
    for share, of in itertools.product((0.001, 0.01, 0.1), DAMPINGS):
        ways[f"{share}, {of}"] = by_order(w, damped(h, of, share), damping=0.0)[0]
    ways["0.01, without first tokens"] = by_order(w, no_first, damping=0.01)[0]
    ways["0.01, tokens of one length"] = by_order(w, alike, damping=0.01)[0]
    lost = {key: losses(w - q.dequantize()) for key, q in ways.items()}
    diagonal = h.diagonal().sort(descending=True).values
    print(name, found[name], lost, flush=True)
    save({"layers": found, "worst": name, "damping": lost, "output": losses(w), "windows": count,
          "largest column of the trace": float(diagonal[0] / diagonal.sum())})  # fmt: skip


def groups_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """GPTQ that fits each group's grid as the group begins, by each damping: in every layer the group that becomes the
    widest, beside what it is to nearest, and the loss, of that of rounding to nearest; then the model's.
    """
    found: dict[str, dict[str, Any]] = {}
    for site in walk(bench.base, bench.look[:16].split(8)):
        w, h = site.linear.weight.detach().float(), site.hessian
        diagonal, plain = h.diagonal(), minmax_grid(w, ASYMMETRIC)
        e = w - QuantizedTensor.round(w, plain, ASYMMETRIC).dequantize()
        rtn_loss = ((e @ h) * e).sum()
        found[site.name] = {"smallest over median of the diagonal": float(diagonal.min() / diagonal.median())}
        for of in DAMPINGS:
            q, _ = gptq(w, damped(h, of), ASYMMETRIC, damping=0)
            wider, e = q.grid.scale / plain.scale, w - q.dequantize()  # [N, G], [N, K]
            found[site.name][of] = {
                "wider": float(wider.median(0).values.max()), "loss of RTN's": float(((e @ h) * e).sum() / rtn_loss)
            }  # fmt: skip
    worst = max(found, key=lambda name: found[name]["own"]["loss of RTN's"])
    print(worst, found[worst], flush=True)
    models: dict[str, dict] = {}
    for of in DAMPINGS:
        model, about = quantized(bench, ASYMMETRIC, method="gptq", of=of)
        models[of] = {"name": of, **about, **bench.scores(model)}
        show(models[of])
        save({"layers": found, "worst": worst, "models": models})


def damping_part(_: Bench, save: Callable[[dict], None]) -> None:
    """Which damping? For the last step of the ladder, with zero points and without."""
    bench, rows = Bench(*ALL), []
    texts = {name: list(getattr(bench, name).shape) for name in ("look", "choose", "judge")}
    for scheme, of in itertools.product((ASYMMETRIC, SYMMETRIC), DAMPINGS):
        model, about = quantized(bench, scheme, of=of, **BEST)
        rows.append({"name": of, "symmetric": scheme.symmetric, **about, **bench.scores(model)})
        show(rows[-1])
        save({**texts, "rows": rows})


def rotation_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """Rounding to nearest before and after rotation: errors of the outputs, as shares of these, on first tokens and on
    all others; the model's loss where one kind of layers alone is rounded; and how many times as large the error of
    gate and up should become: rotation moves the norm's weight from their inputs into their columns, and noise that is
    alike in all columns goes as mean w² · mean x².
    """
    count = min(8, len(bench.look))
    found: dict[str, dict] = {}
    nats: dict[str, dict] = {}
    predicted: list[float] = []
    for name, model in (("as it is", bench.base), ("rotated", rotate_model(bench.base))):
        kinds: dict[str, dict[str, list[float]]] = {}
        rounded = {}
        for site in walk(model, [bench.look[:count]]):
            x = torch.cat(site.inputs).unflatten(0, (count, -1))
            kind, w = site.name.split(".")[-1], site.linear.weight.detach()
            rounded[site.name] = QuantizedTensor.round(w, minmax_grid(w, ASYMMETRIC), ASYMMETRIC).dequantize()
            for tokens, y in (("first token", x[:, 0]), ("others", x[:, 1:].flatten(0, 1))):
                share = F.linear(y, w - rounded[site.name]).square().sum() / F.linear(y, w).square().sum()
                kinds.setdefault(kind, {}).setdefault(tokens, []).append(float(share))
            if name == "as it is" and kind == "gate_up_proj":
                norm = model.layers[int(site.name.split(".")[1])].post_attention_layernorm.weight.square()
                energy, squares = x[:, 1:].square().mean((0, 1)), w.square().mean(0)
                predicted.append(
                    float((energy / norm).mean() * (norm * squares).mean() / energy.mean() / squares.mean())
                )
        found[name] = {kind: {t: statistics.median(v) for t, v in by.items()} for kind, by in kinds.items()}
        nats[name] = {}
        for kind in kinds:
            alone = copy.deepcopy(model)
            for site_name, linear in sites(alone).items():
                if site_name.endswith(kind):
                    replace_weight(alone, linear, rounded[site_name])
            score = bench.compared(alone, bench.judge)
            nats[name][kind] = {"nats": score.log_ratio, "error": score.log_ratio_error}
    print(found, nats, statistics.median(predicted), flush=True)
    save({"errors": found, "nats": nats, "predicted for gate and up": statistics.median(predicted)})


# ---- all roundings of few weights ------------------------------------------------------------------------------------

REACH = (-1, 0, 1, 2)  # above the integer below a weight: which ones are tried


def enumeration_part(bench: Bench, save: Callable[[dict], None], layer: str = "layers.10.self_attn.o_proj") -> None:
    """Rows of K weights of one layer and their block of its Hessian: all roundings, and where each method lands."""
    layer = "layers.2.self_attn.o_proj" if SMALL else layer
    site = next(s for s in walk(bench.base, bench.look[:16].split(8)) if s.name == layer)
    whole = site.hessian.double().cpu()
    w = site.linear.weight.detach().double().cpu()
    scale = minmax_grid(w, SYMMETRIC).scale[:, :1].double()  # the first group has all columns below
    columns = whole.diagonal()[:64].argsort(descending=True)[:8]
    by_k = []
    for k in range(2, 9):
        chosen = columns[:k]
        h = whole[chosen][:, chosen]
        rows = [one_row(w[i, chosen] / scale[i], h) for i in range(0, len(w), len(w) // (16 if SMALL else 256))]
        names = ("RTN", "front to back", "back to front")
        by_k.append({
            "k": k, "rows": len(rows), "same as Babai": sum(r["same as Babai"] for r in rows),
            "over the least": {n: statistics.mean(r[n] / r["least"] for r in rows) for n in names},
            "is the least": {n: sum(r[n] <= r["least"] * (1 + 1e-9) for r in rows) / len(rows) for n in names},
        })  # fmt: skip
        print(by_k[-1], flush=True)
    apart = [
        r for r in rows if r["RTN"] > r["back to front"] > r["front to back"]
    ] or rows  # of K = 8; all of them differ
    picked = sorted(apart, key=lambda r: r["RTN"] / r["least"])[len(apart) // 2]
    best = {key: picked[key] for key in ("RTN", "front to back", "back to front", "least")}
    ranks = {key: sum(x < value * (1 - 1e-9) for x in picked["nearest two"]) for key, value in best.items()}
    correlation = h / h.diagonal().outer(h.diagonal()).sqrt()
    off = correlation[~torch.eye(8, dtype=torch.bool)].abs()
    save({
        "layer": layer, "by k": by_k, "losses": sorted(picked["nearest two"]), "picked": best, "rank": ranks,
        "tried": len(REACH) ** 8, "correlation": {"median": float(off.median()), "largest": float(off.max())},
    })  # fmt: skip


def one_row(w: Tensor, h: Tensor) -> dict:
    """w [K] in units of the grid. Losses of all roundings, and of three ways to one."""
    v = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)  # upper, h = v vᵀ
    offsets = torch.tensor(list(itertools.product(REACH, repeat=len(w))), dtype=torch.float64)
    q = w.floor() + offsets  # [4^K, K]
    loss = ((w - q) @ v).square().sum(1)
    two = ((offsets >= 0) & (offsets <= 1)).all(1)
    back = column_by_column(w.flip(0), h.flip(0, 1)).flip(0)
    found = {
        "least": float(loss.min()), "nearest two": loss[two].tolist(), "RTN": loss_of(w, w.round(), h),
        "front to back": loss_of(w, column_by_column(w, h), h), "back to front": loss_of(w, back, h),
    }  # fmt: skip
    return found | {"same as Babai": torch.equal(back, babai(w, h))}


def loss_of(w: Tensor, q: Tensor, h: Tensor) -> float:
    return float((w - q) @ h @ (w - q))


def column_by_column(w: Tensor, h: Tensor) -> Tensor:
    """GPTQ, with the factor of the inverse, on a grid of all integers."""
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, q = w.clone(), torch.empty_like(w)
    for j in range(len(w)):
        q[j] = w[j].round()
        w[j:] -= (w[j] - q[j]) / upper[j, j] * upper[j, j:]
    return q


def babai(w: Tensor, h: Tensor) -> Tensor:
    """The nearest plane, without an inverse: columns of R, h = Rᵀ R, are the basis; the last is decided first."""
    r = torch.linalg.cholesky(h, upper=True)
    target, q = r @ w, torch.empty_like(w)
    for j in reversed(range(len(w))):
        q[j] = (target[j] / r[j, j]).round()
        target -= q[j] * r[:, j]
    return q


# ---- products on a CPU -----------------------------------------------------------------------------------------------


def speed_part(bench: Bench, save: Callable[[dict], None], n: int = 4096, k: int = 4096) -> None:
    """x Wᵀ on a CPU, one thread: in fp32 and bf16, and as `QuantLinear` does it with 4-bit weights, and 8-bit both."""
    torch.set_num_threads(1)
    rows: list[dict] = []
    n, k = (256, 256) if SMALL else (n, k)
    dense = Dense(k, {"y": n}, False)
    replace_weight(bench.base, dense, torch.randn(n, k) / math.sqrt(k))
    w, half = dense.weight.detach(), dense.weight.detach().bfloat16()
    layers = {}
    for name, scheme in (("W4A16", SYMMETRIC), ("W8A8", Scheme(8, strategy="channel"))):
        format = CompressedTensors(scheme, name == "W8A8")
        layers[name] = QuantLinear.of(dense, QuantizedTensor.round(w, minmax_grid(w, scheme), scheme), format)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "fp32": lambda x: F.linear(x, w), "bf16": lambda x: F.linear(x.bfloat16(), half), **layers,
    }  # fmt: skip
    for m in (1, 4, 16, 64, 256):
        x = torch.randn(m, k)
        expected = F.linear(x, w)
        seconds = {}
        for name, way in ways.items():
            close = float((way(x).float() - expected).norm() / expected.norm())
            assert close < (0.2 if name == "W4A16" else 0.03), (name, close)
            seconds[name] = thread_seconds(lambda way=way, x=x: way(x), 25 if m < 64 else 9)
        rows.append({"rows": m, "seconds": seconds})
        print(rows[-1], flush=True)
        save({"shape": [n, k], "rows": rows})


def crossover_part(bench: Bench, save: Callable[[dict], None]) -> None:
    """One layer of an 8B model on a GPU, by tokens: in bf16 by cuBLAS; 4-bit weights by the kernel, and decoded whole
    in every call, for cuBLAS; 8-bit weights and activations, with the rounding of these.
    """
    import kernels as suites  # benchmarks/kernels.py

    from minillm import kernels

    k, n = (512, 256) if SMALL else (4096, 14_336)
    w8 = kernels.quantize_rows(suites.randn(n, k), torch.int8)

    def eight(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return kernels.w8a8(*kernels.quantize_rows(x, torch.int8), w, scale, None, x.dtype)

    ceilings, rows = {}, []
    if GPU:
        from gpu import ceilings as measure

        ceilings = measure()
    for m in (1, 8) if SMALL else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048):
        case = suites.w4a16_case(m, k, n)
        runs = {
            "bf16": case.runs["cuBLAS bf16" if GPU else "torch"],
            "W4A16": case.runs["minillm"],
            "W4A16, decoded first": lambda x, tiles, scales, w: kernels.KERNELS["w4a16"].torch(x, tiles, scales),
        }
        seconds = {name: suites.timed(case, run) for name, run in runs.items()}
        case8 = suites.Case("w8a8", "", (case.inputs[0], *w8), {}, 0.0)
        rows.append({"tokens": m, "seconds": seconds | {"W8A8": suites.timed(case8, eight)}})
        print(m, {name: f"{1e6 * s:.1f} µs" for name, s in rows[-1]["seconds"].items()}, flush=True)
        save({"k": k, "n": n, "group": 128, "ceilings": ceilings, "rows": rows})


PARTS = {
    "outlier": outlier_part, "rotation": rotation_part, "groups": groups_part, "ladder": ladder_part, "bos": bos_part,
    "choices": choices_part, "damping": damping_part, "crossover": crossover_part, "enumeration": enumeration_part,
    "speed": speed_part,
}  # fmt: skip


@torch.no_grad()
def main() -> None:
    wanted = parts_asked(PARTS, ("enumeration", "speed") if GPU else ("crossover",))
    run_parts("chapter_10", PARTS, wanted, Bench(*WINDOWS), not SMALL)


if __name__ == "__main__":
    main()
