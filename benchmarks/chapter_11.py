"""What chapter 11 quotes: where SmolLM2's activations are large, weights and activations in 8 bits by several roads,
the cache in 8 bits, short contexts and long ones.

    python benchmarks/chapter_11.py                  everything (minutes on an H100)
    python benchmarks/chapter_11.py methods cache    these parts again; the rest of the recorded file stays
    python benchmarks/chapter_11.py --small          two windows and little calibration, to try it on a CPU

Perplexities are of `data.held_out`, 24 windows of 512 tokens of topics that no calibration text has; differences to
fp32 are paired over windows. All but the rows called "package" compute in fp32 with numbers that were rounded and read
back; the package's own layers run their 8-bit kernels.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from common import ROOT, device, record
from torch import Tensor

from minillm.config import ModelConfig
from minillm.data import calibration, held_out, reference_text
from minillm.evaluate import Comparison, compare
from minillm.kernels import use
from minillm.kernels.rope import quantize_heads
from minillm.model import Transformer
from minillm.model.layers import NoCache, NoCacheLayer
from minillm.model.linear import Dense
from minillm.model.tokenizer_hf import load_tokenizer
from minillm.model.weights import load, model_path
from minillm.quant import Grid, Scheme, fake_quantize, minmax_grid, quantize_model
from minillm.quant.calibrate import gptq_model, replace_weight, sites
from minillm.quant.rotation import rotate_model
from minillm.quant.smoothquant import (
    ALL,
    NORMS,
    activation_maxima,
    best_alphas,
    outlier_channels,
    residual_streams,
    round_activations,
    smooth,
    watched,
)

MODEL, LENGTH, LONG = "smollm2-135m-instruct", 512, 4096
SMALL = "--small" in sys.argv
WINDOWS, LONG_WINDOWS, CALIBRATION, NEEDLES = (2, 1, 2, 2) if SMALL else (24, 24, 64, 32)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT8, FP8 = Scheme(8, strategy="channel"), Scheme(8, "float", strategy="channel")

Change = Callable[[Tensor], Tensor]


class Rounded(Dense):
    """A layer that computes with what `change` makes of its input."""

    change: Change | None = None

    def forward(self, x: Tensor, batch: object = None) -> Tensor:
        return F.linear(x if self.change is None else self.change(x), self.weight, self.bias)


def rounded(name: str, in_features: int, parts: dict[str, int], bias: bool) -> Dense:
    return (Dense if name == "lm_head" else Rounded)(in_features, parts, bias)


class Lab:
    """The model in fp32, its texts, and what it says of the held-out windows, computed once."""

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer(model_path(MODEL))
        self.model = load(MODEL, DEVICE, "float32", linear=rounded)
        self.rows = held_out(self.tokenizer, WINDOWS, LENGTH).to(DEVICE)
        self.calibration = calibration(self.tokenizer, CALIBRATION, LENGTH).to(DEVICE)
        with use("torch"):
            self.maxima = activation_maxima(self.model, self.calibration)
        self._kept: dict[bytes, Tensor] = {}
        self.found: dict[str, dict] = {}

    def new(self) -> Transformer:
        return copy.deepcopy(self.model)

    def reference(self, ids: Tensor) -> Tensor:
        key = ids.cpu().numpy().tobytes()
        if key not in self._kept:
            with use("torch"):
                self._kept[key] = self.model.logits(self.model(ids))
        return self._kept[key]

    def judge(self, name: str, answer: Callable[[Tensor], Tensor], path: str = "torch") -> None:
        start = time.perf_counter()
        with use(path):
            got = compare(self.reference, {name: answer}, self.rows)[name]
        self.found[name] = numbers(got)
        print(f"{name:44} {got}  {time.perf_counter() - start:.1f} s", flush=True)

    def simulate(self, name: str, model: Transformer, change: Change | dict[str, Change] | None) -> None:
        """Judge a model whose layers' inputs go through `change`, of all layers or by name."""
        for layer, linear in sites(model).items():
            assert isinstance(linear, Rounded)
            linear.change = change.get(layer) if isinstance(change, dict) else change
        self.judge(name, lambda ids: model.logits(model(ids)))


def numbers(got: Comparison) -> dict:
    count = len(got.kl)
    return {
        "perplexity": got.perplexity, "loss": got.log_ratio, "error": got.log_ratio_error,
        "kl": got.kl.mean().item(), "kl error": got.kl.std().item() / math.sqrt(count) if count > 1 else math.nan,
        "flips": got.flips.mean().item(),
    }  # fmt: skip


def per_token(scheme: Scheme) -> Change:
    return lambda x: round_activations(x, scheme)


def nearest(model: Transformer, scheme: Scheme) -> Transformer:
    """Every layer's weight rounded, in place."""
    for linear in sites(model).values():
        replace_weight(model, linear, fake_quantize(linear.weight, minmax_grid(linear.weight, scheme), scheme))
    return model


def static(maxima: dict[str, Tensor], kind: str = "int") -> dict[str, Change]:
    """One scale for all numbers of a layer's input, found beforehand."""
    scheme, half = Scheme(8, kind, strategy="tensor"), 127.5 if kind == "int" else 448.0

    def of(largest: Tensor) -> Change:
        grid = Grid((largest.max() / half).view(1, 1))
        return lambda x: fake_quantize(x.flatten(0, -2), grid, scheme).view_as(x)

    return {name: of(largest) for name, largest in maxima.items()}


# ---- what the activations are ----------------------------------------------------------------------------------------


def outliers_part(lab: Lab) -> dict:
    """Channels and tokens whose activations are far larger than others'; who has them; how large a crest rows have."""
    model, result = lab.model, {}
    layers = {}
    for name, x in lab.maxima.items():
        w = sites(model)[name].weight.abs().amax(0)
        layers[name] = {
            "largest": float(x.max()), "median": float(x.median()), "channel": int(x.argmax()),
            "over 10": sum(o.name == name for o in outlier_channels({name: x})), "channels": len(x),
            "weight, largest over median": float(w.max() / w.median()),
        }  # fmt: skip
    result["layers"] = layers
    smoothed = lab.new()
    smooth(smoothed, lab.maxima, 0.5)
    tokens, crest, power = crests(model, lab.calibration[:1])
    smoother = crests(smoothed, lab.calibration[:1])[1]
    rotated = rotate_model(model)
    turned = crests(rotated, lab.calibration[:1])[1]
    norms = {
        f"layers.{i}.{slot}": norm.weight
        for i, layer in enumerate(model.layers)
        for slot, norm in (
            ("self_attn.qkv_proj", layer.input_layernorm), ("mlp.gate_up_proj", layer.post_attention_layernorm),
        )
    }  # fmt: skip
    for name, entry in layers.items():
        entry["tokens"] = {"first": float(tokens[name][0]), "median": float(tokens[name].median())}
        entry["crest"] = {"activations": float(crest[name].median()), "weights": of_rows(sites(model)[name].weight)}
        entry["crest, smoothed"] = {
            "activations": float(smoother[name].median()), "weights": of_rows(sites(smoothed)[name].weight),
        }  # fmt: skip
        entry["crest, rotated"] = {
            "activations": float(turned[name].median()), "weights": of_rows(sites(rotated)[name].weight),
        }  # fmt: skip
        if name in norms:
            weight = sites(model)[name].weight
            entry["noise of fp8, rotated over plain"] = rotated_noise(power[name], norms[name], weight)
    with torch.inference_mode(), use("torch"):
        streams = residual_streams(model, lab.calibration[:1])[:, 0].abs()  # [layers + 1, T, hidden]
    result["streams"] = [
        {
            "first": float(s[0].max()), "channel": int(s[0].argmax()), "rest": float(s[1:].max()),
            "rest, channel": int(s[1:].amax(0).argmax()), "median": float(s[1:].median()),
        }
        for s in streams
    ]  # fmt: skip
    result["picture"] = picture(lab)
    return result


def of_rows(w: Tensor) -> float:
    """The crest factor of the middle row: its largest number over its root mean square."""
    return float((w.abs().amax(-1) / w.square().mean(-1).sqrt()).median())


def rotated_noise(power: Tensor, norm: Tensor, w: Tensor) -> float:
    """An error in proportion to each number adds noise like sum_k x_k² |w_k|² to the outputs of a norm's reader. A
    rotation moves the norm's weight g [K] into the reader and evens out both: |x / g|² |g W|² / K. power [K]: mean
    x_k². -> the second over the first
    """
    columns = w.square().sum(0)  # [K]
    return float((power / norm**2).mean() * (norm**2 * columns).sum() / (power * columns).sum())


def crests(model: Transformer, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Of each layer's inputs: each token's largest number and crest factor; each channel's mean square, without the
    first token's.
    """
    tokens: dict[str, Tensor] = {}
    crest: dict[str, Tensor] = {}
    power: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2)
        tokens[name] = x.abs().amax(-1)
        crest[name] = tokens[name] / x.square().mean(-1).sqrt()
        power[name] = x[1:].square().mean(0)

    with torch.inference_mode(), use("torch"), watched(model, see):
        model(ids)
    return tokens, crest, power


def picture(lab: Lab, layer: str = "layers.15.self_attn.qkv_proj", deep: str = "layers.11.mlp.down_proj") -> dict:
    """Sorted channel maxima before and after migration, and each token's largest number, of a layer each."""
    smoothed = lab.new()
    with use("torch"):
        smooth(smoothed, lab.maxima, 0.5)
        after = activation_maxima(smoothed, lab.calibration[:4])
    w, v = (sites(m)[layer].weight.abs().amax(0) for m in (lab.model, smoothed))
    order = lab.maxima[layer].argsort(descending=True)
    chosen = order[torch.linspace(0, len(order) - 1, 96, device=order.device).round().long().unique()]
    seen: list[Tensor] = []
    with (
        torch.inference_mode(),
        use("torch"),
        watched(lab.model, lambda name, x: seen.append(x[0]) if name == deep else None),
    ):
        lab.model(lab.calibration[:1, :64])
    return {
        "layer": layer, "deep": deep,
        "x": lab.maxima[layer][chosen].tolist(), "w": w[chosen].tolist(),
        "x, smoothed": after[layer][chosen].tolist(), "w, smoothed": v[chosen].tolist(),
        "tokens": seen[0].abs().amax(-1).tolist(), "tokens' median number": float(seen[0][1:].abs().median()),
    }  # fmt: skip


# ---- weights and activations in 8 bits -------------------------------------------------------------------------------


def methods_part(lab: Lab) -> dict:
    """Rounded in many ways, each judged beside fp32."""
    lab.found = {}
    int8_roads(lab)
    fp8_roads(lab)
    repaired_roads(lab)
    package_roads(lab)
    return {
        "fp32": float(compare(lab.reference, {"": lab.reference}, lab.rows)[""].perplexity),
        "windows": list(lab.rows.shape), "calibration": list(lab.calibration.shape), "rows": lab.found,
    }  # fmt: skip


def int8_roads(lab: Lab) -> None:
    token = per_token(INT8)
    lab.simulate("int8: weights", nearest(lab.new(), INT8), None)
    lab.simulate("int8: activations", lab.new(), token)
    for slot in ALL:
        which = {name: token for name in sites(lab.model) if name.endswith(slot)}
        lab.simulate(f"int8: activations of {slot}", lab.new(), which)
    lab.simulate("int8: plain", nearest(lab.new(), INT8), token)
    for where, alphas in ((NORMS, (0.5,)), (ALL, (0.0, 0.25, 0.5, 0.65, 0.8, 1.0))):
        for alpha in alphas:
            model = lab.new()
            smooth(model, lab.maxima, alpha, where)
            lab.simulate(f"int8: {'norms' if where == NORMS else 'all'}, {alpha}", nearest(model, INT8), token)
    model = lab.new()
    with use("torch"):
        smooth(model, lab.maxima, best_alphas(model, lab.calibration[:2], lab.maxima))
    lab.simulate("int8: all, a strength a layer", nearest(model, INT8), token)
    lab.simulate("int8: rotated", nearest(rotate_model(lab.model), INT8), token)
    lab.simulate("int8: static", nearest(lab.new(), INT8), static(lab.maxima))
    for alpha in (0.5, 0.8):
        model = lab.new()
        smooth(model, lab.maxima, alpha)
        with use("torch"):
            maxima = activation_maxima(model, lab.calibration)
        lab.simulate(f"int8: static, all, {alpha}", nearest(model, INT8), static(maxima))
    shape = {name: change for name, change in static(lab.maxima).items() if not name.endswith("down_proj")}
    shape |= {name: token for name in lab.maxima if name.endswith("down_proj")}
    lab.simulate("int8: static, down_proj a token", nearest(lab.new(), INT8), shape)


def fp8_roads(lab: Lab) -> None:
    token = per_token(FP8)
    lab.simulate("fp8: weights", nearest(lab.new(), FP8), None)
    lab.simulate("fp8: activations", lab.new(), token)
    for slot in ALL:
        which = {name: token for name in sites(lab.model) if name.endswith(slot)}
        lab.simulate(f"fp8: activations of {slot}", lab.new(), which)
    lab.simulate("fp8: plain", nearest(lab.new(), FP8), token)
    lab.simulate("fp8: static", nearest(lab.new(), FP8), static(lab.maxima, "float"))
    model = lab.new()
    smooth(model, lab.maxima, 0.5)
    lab.simulate("fp8: all, 0.5", nearest(model, FP8), token)
    lab.simulate("fp8: rotated", nearest(rotate_model(lab.model), FP8), token)


def repaired_roads(lab: Lab) -> None:
    """Weights rounded by GPTQ, on inputs as they are ("exact") or rounded as they will be, and so those of all layers
    before ("rounded"). For int8 after migration.
    """
    for name, scheme, inputs in (("fp8", FP8, "exact"), ("fp8", FP8, "rounded"), ("int8", INT8, "rounded")):
        start, model, token = time.perf_counter(), lab.new(), per_token(scheme)
        with use("torch"):
            if name == "int8":
                smooth(model, lab.maxima, best_alphas(model, lab.calibration[:2], lab.maxima))
            gptq_model(
                model, lab.calibration.split(8), scheme, order="activations", grid="error",
                read=token if inputs == "rounded" else None,
            )  # fmt: skip
        seconds = time.perf_counter() - start
        lab.simulate(f"{name}: GPTQ, inputs {inputs}, weights", model, None)
        lab.simulate(f"{name}: GPTQ, inputs {inputs}", model, token)
        lab.found[f"{name}: GPTQ, inputs {inputs}"]["seconds"] = seconds


def package_roads(lab: Lab) -> None:
    """What `minillm quantize` makes of the model, by the kernels that serve it."""
    original = load(MODEL, DEVICE, "bfloat16")
    lab.judge("package, bfloat16: none", lambda ids: original.logits(original(ids)), "auto")
    for method in ("smoothquant", "fp8"):
        start = time.perf_counter()
        model = quantize_model(load(MODEL, DEVICE, "float32"), method, calibration=lab.calibration)
        seconds = time.perf_counter() - start
        for dtype in (torch.float32, torch.bfloat16):
            name = f"package, {str(dtype).removeprefix('torch.')}: {method}"
            model = model.to(dtype)
            lab.judge(name, lambda ids, m=model: m.logits(m(ids)), "auto")
            lab.found[name]["seconds"] = seconds


# ---- the cache -------------------------------------------------------------------------------------------------------


def heads(dtype: torch.dtype) -> Change:
    """As the package's caches do it: a scale for each head of each token.  [B, T, H_kv, D]"""

    def change(x: Tensor) -> Tensor:
        q, scale = quantize_heads(x, dtype, torch.float32)
        return q.float() * scale[..., None]

    return change


def integers(bits: int) -> Change:
    scheme = Scheme(bits, strategy="channel")
    return lambda x: round_activations(x, scheme)


def by_channel(change: Change, tokens: int = 32) -> Change:
    """Blocks of `tokens` tokens share a scale in each channel (KIVI's keys); a block not yet full stays as it is."""

    def of(x: Tensor) -> Tensor:
        whole = x.shape[1] // tokens * tokens
        blocks = x[:, :whole].unflatten(1, (-1, tokens)).transpose(2, -1)  # [B, blocks, D, H_kv, tokens]
        done = change(blocks).transpose(2, -1).flatten(1, 2)
        return torch.cat((done, x[:, whole:]), 1)

    return of


def one_scale(dtype: torch.dtype, largest: float) -> Change:
    """One scale for everything, as an engine without calibration has it."""
    if dtype == torch.int8:
        grid, scheme = Grid(torch.full((1, 1), largest / 127.5, device=DEVICE)), Scheme(8, strategy="tensor")
        return lambda x: fake_quantize(x.flatten(0, -2), grid, scheme).view_as(x)
    return lambda x: x.clamp(-448, 448).to(dtype).float()


def same(x: Tensor) -> Tensor:
    return x


def caches(largest: float) -> dict[str, tuple[Change, Change]]:
    """{name: (what keys go through, what values do)}"""
    int8, fp8, int4 = heads(torch.int8), heads(torch.float8_e4m3fn), integers(4)
    return {
        "int8": (int8, int8),
        "fp8": (fp8, fp8),
        "int8, keys only": (int8, same),
        "int8, values only": (same, int8),
        "fp8, keys only": (fp8, same),
        "fp8, values only": (same, fp8),
        "fp8, scale 1": (one_scale(torch.float8_e4m3fn, 0),) * 2,
        "int8, one scale": (one_scale(torch.int8, largest),) * 2,
        "int8, keys by channel": (by_channel(int8), int8),
        "fp8, keys by channel": (by_channel(fp8), fp8),
        "int4": (int4, int4),
        "int4, keys by channel": (by_channel(int4), int4),
        "int4, keys only": (int4, same),
        "int4, values only": (same, int4),
    }


class Through(NoCacheLayer):
    """A layer whose keys and values go through a change before they are read."""

    changes: tuple[Change, Change] = (same, same)  # set on the class

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: object) -> Tensor:
        of_keys, of_values = Through.changes
        return super().attend(q, of_keys(k), of_values(v), None)


@contextmanager
def through(model: Transformer, changes: tuple[Change, Change]) -> Iterator[NoCache]:
    cache, Through.changes = NoCache(), changes
    cache.layers = [Through() for _ in model.layers]
    try:
        yield cache
    finally:
        Through.changes = (same, same)


def largest_key(lab: Lab) -> tuple[float, dict]:
    """The largest |k| and |v| of any layer on calibration text, and how keys and values of one layer spread."""
    sizes: list[tuple[Tensor, Tensor]] = []

    class See(NoCacheLayer):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: object) -> Tensor:
            sizes.append((k[0].abs().amax(0), v[0].abs().amax(0)))  # [H_kv, D] each
            return super().attend(q, k, v, None)

    cache = NoCache()
    cache.layers = [See() for _ in lab.model.layers]
    with torch.inference_mode(), use("torch"):
        lab.model(lab.calibration[:1], cache=cache)
    spread = {
        kind: [float((x[i].amax(-1) / x[i].median(-1).values).max()) for x in sizes]
        for i, kind in enumerate(("keys", "values"))
    }
    worst = max(range(len(sizes)), key=lambda i: spread["keys"][i])
    shown = {kind: sizes[worst][i].tolist() for i, kind in enumerate(("keys", "values"))}
    largest = max(float(x.max()) for pair in sizes for x in pair)
    return largest, {"largest over median channel": spread, "layer": worst, "channels": shown, "largest": largest}


def cache_part(lab: Lab) -> dict:
    """Windows of 512: the cache in 8 and in 4 bits."""
    lab.found = {}
    largest, spread = largest_key(lab)
    for name, changes in caches(largest).items():
        with through(lab.model, changes) as cache:
            lab.judge(name, lambda ids, c=cache: lab.model.logits(lab.model(ids, cache=c)))
    return {"windows": list(lab.rows.shape), "rows": lab.found, "spread": spread}


LONG_NAMES = ("int8", "fp8", "fp8, scale 1", "int8, one scale", "int4", "int4, keys by channel")


@torch.inference_mode()
def long_part(lab: Lab) -> dict:
    """Windows of 4,096 tokens of the whole reference (nothing here is calibrated on it): loss and KL by position; and a
    number to be found again.
    """
    ids = lab.tokenizer.encode("\n\n".join(reference_text().values()), add_special_tokens=False)
    length = 1024 if SMALL else LONG
    rows = torch.tensor(ids[: len(ids) // length * length], device=DEVICE).view(-1, length)[:LONG_WINDOWS]
    largest, _ = largest_key(lab)
    chosen = {name: changes for name, changes in caches(largest).items() if name in LONG_NAMES}
    nll: dict[str, list[Tensor]] = {name: [] for name in ("fp32", *chosen)}
    kl: dict[str, list[Tensor]] = {name: [] for name in chosen}
    model, bucket = lab.model, length // 8

    def log_probs(row: Tensor, changes: tuple[Change, Change]) -> Tensor:
        with use("torch"), through(model, changes) as cache:
            return model.logits(model(row[None], cache=cache))[0, :-1].log_softmax(-1)

    for row in rows:
        expected = log_probs(row, (same, same))
        for name, changes in (("fp32", (same, same)), *chosen.items()):
            got = expected if name == "fp32" else log_probs(row, changes)
            loss = F.pad(-got.gather(-1, row[1:, None])[:, 0], (1, 0))  # [T]; of the first token there is none
            nll[name].append(loss.double().view(8, bucket).mean(1).cpu())
            if name != "fp32":
                apart = F.pad((expected.exp() * (expected - got)).sum(-1), (1, 0))
                kl[name].append(apart.double().view(8, bucket).mean(1).cpu())
    base = torch.stack(nll["fp32"])  # [N, 8]
    result: dict = {"windows": list(rows.shape), "until": [bucket * (i + 1) for i in range(8)], "rows": {}}
    result["fp32"] = base.mean(0).exp().tolist()
    result["perplexity"] = base.mean().exp().item()
    for name in chosen:
        gap = torch.stack(nll[name]) - base
        whole = gap.mean(1)
        result["rows"][name] = {
            "loss": whole.mean().item(), "error": error_of(whole), "kl": torch.stack(kl[name]).mean().item(),
            "loss by position": gap.mean(0).tolist(), "error by position": [error_of(gap[:, i]) for i in range(8)],
            "kl by position": torch.stack(kl[name]).mean(0).tolist(),
        }  # fmt: skip
        print(f"long, {name:30} {result['rows'][name]['loss']:+.5f} ± {result['rows'][name]['error']:.5f}", flush=True)
    result["needles"] = needles(lab, length, {"fp32": (same, same), **chosen})
    return result


def error_of(x: Tensor) -> float:
    return x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan


NAMES = ("Alice", "Bruno", "Clara", "David", "Emma", "Felix", "Grace", "Henry")


def needles(lab: Lab, length: int, ways: dict[str, tuple[Change, Change]]) -> dict:
    """A sentence with a number of five digits somewhere in a long text, asked for at its end: how sure each cache makes
    the model of the right digits (nats a digit), and how often each of them is its first choice.
    """
    generator, encode = torch.Generator().manual_seed(0), lab.tokenizer.encode
    text = held_out(lab.tokenizer, WINDOWS, LENGTH).flatten().tolist()
    text = (text * (1 + length // len(text)))[: 2 * length]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for i in range(NEEDLES):
        digits = "".join(str(int(d)) for d in torch.randint(0, 10, (5,), generator=generator))
        who = NAMES[i % len(NAMES)]
        said = encode(f"\n\nThe secret number of {who} is {digits}.\n\n", add_special_tokens=False)
        asked = encode(f"\n\nThe secret number of {who} is", add_special_tokens=False)
        space, *answer, _ = encode(f" {digits}.", add_special_tokens=False)  # scored are the digits alone
        asked.append(space)
        room = length - len(said) - len(asked) - len(answer)
        at = int(room * (i + 0.5) / NEEDLES)
        row = text[:at] + said + text[at:room] + asked + answer
        ids = torch.tensor(row, device=DEVICE)
        for name, changes in ways.items():
            with use("torch"), through(lab.model, changes) as cache:
                hidden = lab.model(ids[None], cache=cache)[0, -len(answer) - 1 : -1]
                logits = lab.model.logits(hidden)
            target = ids[-len(answer) :]
            right = logits.argmax(-1) == target
            found[name].append((float(F.cross_entropy(logits, target)), float(right.float().mean())))
    result = {}
    for name, pairs in found.items():
        loss, right = torch.tensor(pairs, dtype=torch.float64).unbind(1)
        result[name] = {"loss": loss.mean().item(), "loss error": error_of(loss),
                        "right": right.mean().item(), "right error": error_of(right)}  # fmt: skip
        print(f"needle, {name:28} {result[name]}", flush=True)
    return {"count": NEEDLES, "tokens": length, "rows": result}


PARTS = {"outliers": outliers_part, "methods": methods_part, "cache": cache_part, "long": long_part}


def main() -> None:
    wanted = [name for name in sys.argv[1:] if name != "--small"] or list(PARTS)
    path = ROOT / "benchmarks" / "results" / device()[0] / "chapter_11.json"
    results = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else {}
    results["config"] = ModelConfig.from_pretrained(model_path(MODEL)).to_dict()
    lab = Lab()
    torch.set_grad_enabled(False)
    for name in wanted:
        start = time.perf_counter()
        results[name] = PARTS[name](lab)
        written_to = record("chapter_11", results)
        print(f"{name}: {time.perf_counter() - start:.0f} s, {written_to}", flush=True)


if __name__ == "__main__":
    main()
