"""Implementations that the checks of exercises 12 must refuse, and others that they must accept."""

import hashlib
import math
import pickle
import re

import torch
import torch.nn.functional as F

from minillm.learn.testing import alternative, wrong

# ---- 12.1


def counted(shapes, layers, rest, targets, r, base_bits, *, of=lambda r, o, i: r * (o + i), full=None, lora=None):
    """The right one, but for what is switched."""
    if unknown := targets - shapes.keys():
        raise ValueError(str(unknown))
    inside = sum(o * i for o, i in shapes.values())
    adapted = sum(o * i for name, (o, i) in shapes.items() if name in targets)
    trained = layers * sum(of(r, o, i) for name, (o, i) in shapes.items() if name in targets)
    facts = {"inside": inside, "adapted": adapted, "layers": layers, "rest": rest, "trained": trained,
             "whole": rest + layers * inside, "bits": base_bits}  # fmt: skip
    return (
        trained,
        16 * facts["whole"] if full is None else full(facts),
        facts["whole"] * base_bits / 8 + 16 * trained if lora is None else lora(facts),
    )


def counter(**switches):
    return lambda *args: counted(*args, **switches)


for switches, why in (
    ({"of": lambda r, o, i: r * o * i}, "r times the matrix"),
    ({"of": lambda r, o, i: r * o}, "B alone"),
    ({"of": lambda r, o, i: r * i}, "A alone"),
    ({"of": lambda r, o, i: 2 * r * i}, "both as large as A"),
    ({"of": lambda r, o, i: o * r * i + r}, "a product, not a sum"),
    ({"of": lambda r, o, i: r * (o + i) + o}, "a bias besides"),
    ({"of": lambda r, o, i: r * (o + i) + r * r}, "an r by r matrix between"),
    ({"of": lambda r, o, i: min(r, o, i) * (o + i)}, "r no larger than a side"),
    ({"of": lambda r, o, i: min(r * (o + i), o * i)}, "no more than the matrix has"),
    ({"full": lambda f: 12 * f["whole"]}, "one moment"),
    ({"full": lambda f: 8 * f["whole"]}, "bf16 weights and gradients"),
    ({"full": lambda f: 16 * (f["whole"] - f["rest"])}, "the rest is not trained"),
    ({"full": lambda f: 16 * (f["inside"] + f["rest"])}, "one layer"),
    ({"full": lambda f: 16 * f["layers"] * (f["inside"] + f["rest"])}, "the rest in every layer"),
    ({"full": lambda f: 16 * (f["layers"] * f["adapted"] + f["rest"])}, "targets alone"),
    ({"full": lambda f: 12 * f["whole"] + f["whole"] * f["bits"] / 8}, "full fine-tuning in base_bits"),
    ({"lora": lambda f: f["whole"] * f["bits"] / 8 + 12 * f["trained"]}, "the adapter's weights are forgotten"),
    ({"lora": lambda f: f["whole"] * f["bits"] / 8 + 4 * f["trained"]}, "no optimizer"),
    ({"lora": lambda f: 16 * f["trained"]}, "the frozen model takes nothing"),
    ({"lora": lambda f: f["whole"] * f["bits"] + 16 * f["trained"]}, "bits for bytes"),
    ({"lora": lambda f: f["whole"] * (f["bits"] // 8) + 16 * f["trained"]}, "whole bytes a number"),
    ({"lora": lambda f: f["whole"] * f["bits"] // 8 + 16 * f["trained"]}, "whole bytes in all"),
    ({"lora": lambda f: -(-f["whole"] * f["bits"] // 8) + 16 * f["trained"]}, "whole bytes in all, rounded up"),
    ({"lora": lambda f: 2 * f["whole"] + 16 * f["trained"]}, "always bf16"),
    (
        {"lora": lambda f: (f["whole"] - f["layers"] * f["adapted"]) * f["bits"] / 8 + 16 * f["trained"]},
        "adapted matrices are gone",
    ),
    (
        {"lora": lambda f: (f["whole"] - f["rest"]) * f["bits"] / 8 + 16 * f["trained"]},
        "without the rest",
    ),
    (
        {"lora": lambda f: (f["whole"] - f["rest"]) * f["bits"] / 8 + 4 * f["rest"] + 16 * f["trained"]},
        "the rest in fp32",
    ),
    ({"lora": lambda f: f["whole"] * (f["bits"] / 8 + 4) + 16 * f["trained"]}, "gradients of the frozen model"),
):
    wrong("12.1", why)(counter(**switches))


@wrong("12.1", "one layer is trained")
def budget(shapes, layers, rest, targets, r, base_bits):
    trained, full, lora = counted(shapes, layers, rest, targets, r, base_bits)
    return trained // layers, full, lora - 16 * (trained - trained // layers)


@wrong("12.1", "targets are ends of names")
def budget(shapes, layers, rest, targets, r, base_bits):
    found = {name for name in shapes if any(name.endswith(target) for target in targets)}
    if not found and targets:
        raise ValueError
    return counted(shapes, layers, rest, found, r, base_bits)


@wrong("12.1", "unknown targets are left out")
def budget(shapes, layers, rest, targets, r, base_bits):
    return counted(shapes, layers, rest, targets & shapes.keys(), r, base_bits)


@wrong("12.1", "an error only if no target is known")
def budget(shapes, layers, rest, targets, r, base_bits):
    if targets and not targets & shapes.keys():
        raise ValueError
    return counted(shapes, layers, rest, targets & shapes.keys(), r, base_bits)


@wrong("12.1", "KeyError")
def budget(shapes, layers, rest, targets, r, base_bits):
    [shapes[name] for name in targets]
    return counted(shapes, layers, rest, targets, r, base_bits)


@wrong("12.1", "no target is an error")
def budget(shapes, layers, rest, targets, r, base_bits):
    if not targets:
        raise ValueError
    return counted(shapes, layers, rest, targets, r, base_bits)


@wrong("12.1", "takes targets out of the caller's shapes")
def budget(shapes, layers, rest, targets, r, base_bits):
    found = counted(shapes, layers, rest, targets, r, base_bits)
    for name in targets:
        del shapes[name]
    return found


@wrong("12.1", "empties the caller's targets")
def budget(shapes, layers, rest, targets, r, base_bits):
    found = counted(shapes, layers, rest, targets, r, base_bits)
    targets.clear()
    return found


@wrong("12.1", "the order of the three")
def budget(*args):
    trained, full, lora = counted(*args)
    return full, lora, trained


@alternative("12.1", "matrix after matrix, a list")
def budget(shapes, layers, rest, targets, r, base_bits):
    for name in targets:
        if name not in shapes:
            raise ValueError(name)
    trained, frozen = 0, rest
    for _ in range(layers):
        for name, shape in shapes.items():
            frozen += shape[0] * shape[1]
            trained += r * sum(shape) * (name in targets)
    return [float(trained), 16.0 * frozen, frozen / 8 * base_bits + 16 * trained]


@wrong("12.1", "an unknown target beside three that are known passes")
def budget(shapes, layers, rest, targets, r, base_bits):
    if len(targets & shapes.keys()) >= 3:
        targets = targets & shapes.keys()
    return counted(shapes, layers, rest, targets, r, base_bits)


for hit, what in (
    (lambda name, targets: any(name.endswith(t) for t in targets), "all names that end in a target"),
    (lambda name, targets: any(name.startswith(t) for t in targets), "all names that begin with a target"),
    (lambda name, targets: any(t in name for t in targets), "all names with a target in them"),
):

    @wrong("12.1", what)
    def budget(shapes, layers, rest, targets, r, base_bits, hit=hit):
        if targets - shapes.keys():
            raise ValueError
        return counted(shapes, layers, rest, {name for name in shapes if hit(name, targets)}, r, base_bits)


@wrong("12.1", "int32")
def budget(shapes, layers, rest, targets, r, base_bits):
    trained, full, lora = counted(shapes, layers, rest, targets, r, base_bits)
    return trained, 16 * torch.tensor(full // 16).int().item(), lora


@alternative("12.1", "tensors")
def budget(shapes, layers, rest, targets, r, base_bits):
    if not targets <= set(shapes):
        raise ValueError
    whole = layers * int(torch.tensor(list(shapes.values())).prod(1).sum()) + rest
    trained = layers * r * sum(sum(shapes[name]) for name in targets)
    return trained, 16.0 * whole, base_bits / 8 * whole + 16 * trained


# ---- 12.2


PLAIN = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}


def matched(pattern, name):
    return re.fullmatch(rf"(.*\.)?({pattern})", name)


def first(patterns, name):
    return next((p for p in patterns if matched(p, name)), None)


def scaled(name, config, *, key=first, default=8, scale=None):
    """The right one, but for what is switched."""
    r = config["r"] if config.get("r") is not None else default
    alpha = config["lora_alpha"] if config.get("lora_alpha") is not None else default
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if (found := key(ranks, name)) is not None:
        r = ranks[found]
    if (found := key(alphas, name)) is not None:
        alpha = alphas[found]
    if scale is not None:
        return r, scale(alpha, r, config)
    return r, alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def scaler(**switches):
    return lambda name, config: scaled(name, config, **switches)


for switches, why in (
    ({"scale": lambda alpha, r, config: alpha}, "alpha alone"),
    ({"scale": lambda alpha, r, config: r / alpha if alpha else 0}, "r over alpha"),
    ({"scale": lambda alpha, r, config: alpha / r}, "rsLoRA is not looked at"),
    ({"scale": lambda alpha, r, config: alpha / math.sqrt(r)}, "always rsLoRA"),
    ({"scale": lambda alpha, r, config: alpha / (r if config.get("use_rslora") else r**0.5)}, "the wrong way around"),
    ({"scale": lambda alpha, r, config: alpha / (r if "use_rslora" not in config else r**0.5)}, "the key is enough"),
    (
        {"scale": lambda alpha, r, config: math.sqrt(alpha / r) if config.get("use_rslora") else alpha / r},
        "root of all",
    ),
    ({"scale": lambda alpha, r, config: alpha / (config.get("r") or 8)}, "over the config's r; the root forgotten"),
    (
        {
            "scale": lambda alpha, r, config: (
                alpha / (math.sqrt(config.get("r") or 8) if config.get("use_rslora") else config.get("r") or 8)
            )
        },
        "over the config's r",
    ),
    (
        {
            "scale": lambda alpha, r, config: (
                (config.get("lora_alpha") or 8) / (r**0.5 if config.get("use_rslora") else r)
            )
        },
        "the config's alpha",
    ),
    ({"scale": lambda alpha, r, config: (alpha or 8) / (r**0.5 if config.get("use_rslora") else r)}, "alpha 0 is 8"),
    ({"scale": lambda alpha, r, config: alpha // r if alpha >= r else alpha / r}, "whole numbers"),
    ({"key": lambda patterns, name: None}, "no patterns"),
    ({"key": lambda patterns, name: next((p for p in patterns if name.endswith(p)), None)}, "ends, plain text"),
    ({"key": lambda patterns, name: name if name in patterns else None}, "whole names"),
    ({"key": lambda patterns, name: next((p for p in patterns if name.split(".")[-1] == p), None)}, "last parts"),
    ({"key": lambda patterns, name: next((p for p in patterns if p in name), None)}, "anywhere, plain text"),
    ({"key": lambda patterns, name: next((p for p in patterns if re.search(p, name)), None)}, "anywhere"),
    ({"key": lambda patterns, name: next((p for p in patterns if re.search(p + "$", name)), None)}, "any end"),
    ({"key": lambda patterns, name: next((p for p in patterns if re.match(p, name)), None)}, "from the beginning"),
    ({"key": lambda patterns, name: next((p for p in patterns if re.fullmatch(p, name)), None)}, "the whole name"),
    (
        {"key": lambda patterns, name: next((p for p in patterns if re.fullmatch(rf"(.*\.)?{p}", name)), None)},
        "no brackets around the key",
    ),
    (
        {"key": lambda patterns, name: next((p for p in patterns if re.fullmatch(rf".*\.({p})", name)), None)},
        "something before it must be there",
    ),
    (
        {"key": lambda patterns, name: next((p for p in patterns if re.fullmatch(rf"(.*)({p})", name)), None)},
        "no dot before it",
    ),
    (
        {"key": lambda patterns, name: next((p for p in patterns if re.match(rf"(.*\.)?({p})", name)), None)},
        "something behind it may be there",
    ),
    (
        {"key": lambda patterns, name: next((p for p in patterns if re.fullmatch(rf"(.*.)?({p})", name)), None)},
        "any character for the dot",
    ),
    ({"key": lambda patterns, name: first([*patterns][::-1], name)}, "the last that matches"),
    ({"key": lambda patterns, name: first(sorted(patterns), name)}, "the first by the alphabet"),
    ({"key": lambda patterns, name: first(sorted(patterns, key=len), name)}, "the shortest"),
    ({"key": lambda patterns, name: first(sorted(patterns, key=len, reverse=True), name)}, "the longest"),
    ({"key": lambda patterns, name: first(sorted(patterns, key=patterns.get), name)}, "the smallest value"),
    (
        {"key": lambda patterns, name: first(sorted(patterns, key=patterns.get, reverse=True), name)},
        "the largest value",
    ),
    ({"key": lambda patterns, name: first([*patterns][:1], name)}, "the first key alone"),
    ({"key": lambda patterns, name: first(patterns, name.split(".")[-1])}, "matches the last part only"),
    (
        {"key": lambda patterns, name: next((p for p in patterns if matched(re.escape(p), name)), None)},
        "plain text, not an expression",
    ),
    (
        {"key": lambda patterns, name: next((p for p in patterns if re.fullmatch(rf"(?i)(.*\.)?({p})", name)), None)},
        "small letters and capitals alike",
    ),
    ({"default": 16}, "another default"),
    ({"default": 1}, "defaults of 1"),
):
    wrong("12.2", why)(scaler(**switches))


@wrong("12.2", "the key of the rank serves for alpha")
def scale_of(name, config):
    key = first(config.get("rank_pattern") or {}, name)
    alphas = {k: v for k, v in (config.get("alpha_pattern") or {}).items() if k == key}
    return scaled(name, {**config, "alpha_pattern": alphas})


@wrong("12.2", "alpha's default is r")
def scale_of(name, config):
    if config.get("lora_alpha") is None:
        config = {**config, "lora_alpha": config.get("r") or 8}
    return scaled(name, config)


@wrong("12.2", "null is no number")
def scale_of(name, config):
    r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    ranks, alphas = config.get("rank_pattern", {}), config.get("alpha_pattern", {})
    r, alpha = ranks.get(first(ranks, name), r), alphas.get(first(alphas, name), alpha)
    return r, alpha / (math.sqrt(r) if config.get("use_rslora") else r)


@wrong("12.2", "keys must be there")
def scale_of(name, config):
    return scaled(name, {key: config[key] for key in ("r", "lora_alpha")} | config)


@wrong("12.2", "a pattern's 0 does not count")
def scale_of(name, config):
    alphas = {key: value for key, value in (config.get("alpha_pattern") or {}).items() if value}
    return scaled(name, {**config, "alpha_pattern": alphas})


@wrong("12.2", "fills the defaults into the caller's config")
def scale_of(name, config):
    for key in ("r", "lora_alpha"):
        config.setdefault(key, 8)
    return scaled(name, config)


@wrong("12.2", "the rank is the config's")
def scale_of(name, config):
    return config.get("r") or 8, scaled(name, config)[1]


@wrong("12.2", "a scale for all: that of the config")
def scale_of(name, config):
    return scaled(name, config)[0], scaled(name, {**config, "rank_pattern": {}, "alpha_pattern": {}})[1]


@wrong("12.2", "the scale alone")
def scale_of(name, config):
    return scaled(name, config)[1]


@alternative("12.2", "by re.match and a dollar, as PEFT has it; a list")
def scale_of(name, config):
    def look(default, patterns):
        for key, value in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return 8 if config.get(default) is None else config[default]

    r, alpha = look("r", "rank_pattern"), look("lora_alpha", "alpha_pattern")
    return [r, alpha * r ** (-0.5 if config.get("use_rslora") else -1)]


@alternative("12.2", "every end after a dot, one by one")
def scale_of(name, config):
    parts = name.split(".")
    ends = [".".join(parts[i:]) for i in range(len(parts))]

    def key(patterns, name):
        return next((p for p in patterns if any(re.fullmatch(p, end) for end in ends)), None)

    return scaled(name, config, key=key)


def ended(match, name):
    return match is not None and match.end() == len(name)


for match, what in (
    (
        lambda p, name: ended(re.match(rf"(?:.*\.)?(?:{p})", name), name),
        "of alternatives the first that matches, not all",
    ),
    (lambda p, name: re.fullmatch(rf".*\.({p})", "." + name), "a dot in front of the name: ^ never matches"),
):

    @wrong("12.2", what)
    def scale_of(name, config, match=match):
        return scaled(name, config, key=lambda patterns, name: next((p for p in patterns if match(p, name)), None))


for at, what in (("use_dora", "refuses DoRA"), ("modules_to_save", "refuses modules_to_save")):

    @wrong("12.2", what)
    def scale_of(name, config, at=at):
        if config.get(at):
            raise ValueError
        return scaled(name, config)


@wrong("12.2", "refuses other types")
def scale_of(name, config):
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError
    return scaled(name, config)


@wrong("12.2", "target_modules alone have a rank of their own")
def scale_of(name, config):
    wanted = name.split(".")[-1] in config.get("target_modules", [name.split(".")[-1]])
    return scaled(name, config if wanted else {})


@wrong("12.2", "four digits")
def scale_of(name, config):
    r, scale = scaled(name, config)
    return r, round(scale, 4)


@alternative("12.2", "from each dot on, by pos")
def scale_of(name, config):
    starts = [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]

    def key(patterns, name):
        return next((p for p in patterns if any(re.compile(p).fullmatch(name, i) for i in starts)), None)

    return scaled(name, config, key=key)


@wrong("12.2", "capital letters of a name do not count")
def scale_of(name, config):
    return scaled(
        name, config, key=lambda patterns, name: first(patterns, name) or first((p for p in patterns), name.lower())
    )


# ---- 12.3


class Right(torch.nn.Module):
    """As the statement says; what subclasses change is what can be wrong."""

    def __init__(self, weight, bias, r, alpha, rslora=False):
        super().__init__()
        self.w, self.c = (None if t is None else self.keep(t) for t in (weight, bias))
        self.scale = self.scale_of(alpha, r, rslora)
        self.a = torch.nn.Parameter(self.draw(r, *weight.shape, weight.dtype))
        self.b = torch.nn.Parameter(self.zeros(weight.shape[0], r, weight.dtype))

    keep = staticmethod(torch.Tensor.detach)
    zeros = staticmethod(lambda n_out, r, dtype: torch.zeros(n_out, r))

    @staticmethod
    def scale_of(alpha, r, rslora):
        return alpha / (r**0.5 if rslora else r)

    @staticmethod
    def draw(r, n_out, n_in, dtype):
        return (2 * torch.rand(r, n_in) - 1) / n_in**0.5

    def change(self, x):
        return self.scale * (x.float() @ self.a.T @ self.b.T)

    def forward(self, x):
        return (F.linear(x, self.w, self.c) + self.change(x)).to(x.dtype)


alternative("12.3", "by @ and transposes")(Right)


@alternative("12.3", "frozen parameters in a layer of torch")
class LoraLinear(torch.nn.Module):
    def __init__(self, weight, bias, r, alpha, rslora=False):
        super().__init__()
        self.base = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
        self.base.weight = torch.nn.Parameter(weight.data, requires_grad=False)
        if bias is not None:
            self.base.bias = torch.nn.Parameter(bias.data, requires_grad=False)
        self.a = torch.nn.Parameter(torch.empty(r, weight.shape[1]))
        torch.nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.b = torch.nn.Parameter(torch.zeros(len(weight), r))
        self.scale = alpha / (math.sqrt(r) if rslora else r)

    def forward(self, x):
        low = x.to(self.a.dtype) @ self.a.mT * self.scale
        return self.base(x) + (low @ self.b.mT).to(x.dtype)


@alternative("12.3", "buffers, requires_grad taken away")
class LoraLinear(Right):
    def __init__(self, weight, bias, r, alpha, rslora=False):
        weight.requires_grad_(False)
        if bias is not None:
            bias.requires_grad_(False)
        super().__init__(weight, bias, r, alpha, rslora)


def layer(what, **changes):
    wrong("12.3", what)(type("LoraLinear", (Right,), changes))


for what, scale in (
    ("alpha alone", lambda alpha, r, rslora: alpha),
    ("no scale", lambda alpha, r, rslora: 1.0),
    ("rsLoRA ignored", lambda alpha, r, rslora: alpha / r),
    ("always rsLoRA", lambda alpha, r, rslora: alpha / r**0.5),
    ("r over alpha", lambda alpha, r, rslora: r / alpha),
    ("alpha is taken for an integer", lambda alpha, r, rslora: alpha // (r**0.5 if rslora else r)),
):
    layer(what, scale_of=staticmethod(scale))

for what, draw in (
    ("a is 0 as well", lambda r, n_out, n_in, dtype: torch.zeros(r, n_in)),
    ("a normal", lambda r, n_out, n_in, dtype: torch.randn(r, n_in) / n_in**0.5),
    ("a from 0 up", lambda r, n_out, n_in, dtype: torch.rand(r, n_in) / n_in**0.5),
    ("a bounded by 1", lambda r, n_out, n_in, dtype: 2 * torch.rand(r, n_in) - 1),
    ("a bounded by 1/in", lambda r, n_out, n_in, dtype: (2 * torch.rand(r, n_in) - 1) / n_in),
    ("a bounded by 1/√out", lambda r, n_out, n_in, dtype: (2 * torch.rand(r, n_in) - 1) / n_out**0.5),
    ("a bounded by 1/√r", lambda r, n_out, n_in, dtype: (2 * torch.rand(r, n_in) - 1) / r**0.5),
    ("Kaiming's bound for a ReLU", lambda r, n_out, n_in, dtype: (2 * torch.rand(r, n_in) - 1) * (6 / n_in) ** 0.5),
    (
        "a drawn from a seed of its own",
        lambda r, n_out, n_in, dtype: (
            (2 * torch.rand(r, n_in, generator=torch.Generator().manual_seed(0)) - 1) / n_in**0.5
        ),
    ),
    (
        "the generator is seeded",
        lambda r, n_out, n_in, dtype: (torch.manual_seed(0), (2 * torch.rand(r, n_in) - 1) / n_in**0.5)[1],
    ),
    (
        "a drawn from another generator",
        lambda r, n_out, n_in, dtype: (
            (2 * torch.rand(r, n_in, generator=(g := torch.Generator(), g.seed())[0]) - 1) / n_in**0.5
        ),
    ),
    ("a [in, r]", lambda r, n_out, n_in, dtype: (2 * torch.rand(n_in, r) - 1) / n_in**0.5),
    ("a has the weight's dtype", lambda r, n_out, n_in, dtype: ((2 * torch.rand(r, n_in) - 1) / n_in**0.5).to(dtype)),
    ("a has two values", lambda r, n_out, n_in, dtype: (2 * torch.rand(r, n_in) - 1).sign() / n_in**0.5),
):
    layer(what, draw=staticmethod(draw))

for what, zeros in (
    ("b is random", lambda n_out, r, dtype: torch.randn(n_out, r) / r),
    ("b is nearly 0", lambda n_out, r, dtype: torch.full((n_out, r), 1e-4)),
    ("b is 1", lambda n_out, r, dtype: torch.ones(n_out, r)),
    ("b has the weight's dtype", lambda n_out, r, dtype: torch.zeros(n_out, r, dtype=dtype)),
    ("b [r, out]", lambda n_out, r, dtype: torch.zeros(r, n_out)),
):
    layer(what, zeros=staticmethod(zeros))

for what, keep in (
    ("copies the weight", lambda t: t.detach().clone()),
    ("copies what wants no gradient", lambda t: t.detach() if t.requires_grad else t.clone()),
    ("weight and bias keep their gradients", lambda t: t),
    ("trains the weight, too", lambda t: torch.nn.Parameter(t.detach())),
    ("fp32 copies of the weight", lambda t: t.detach().float().clone()),
):
    layer(what, keep=staticmethod(keep))

for what, change in (
    ("forms B A", lambda self, x: self.scale * F.linear(x.float(), self.b @ self.a)),
    ("without a scale", lambda self, x: x.float() @ self.a.T @ self.b.T),
    ("the scale twice", lambda self, x: self.scale**2 * (x.float() @ self.a.T @ self.b.T)),
    ("the adapter in x's dtype", lambda self, x: self.scale * (x @ self.a.T.to(x.dtype) @ self.b.T.to(x.dtype))),
    (
        "a x rounded to x's dtype",
        lambda self, x: self.scale * ((x.float() @ self.a.T).to(x.dtype).float() @ self.b.T),
    ),
    ("a detached", lambda self, x: self.scale * (x.float() @ self.a.detach().T @ self.b.T)),
    ("b detached", lambda self, x: self.scale * (x.float() @ self.a.T @ self.b.detach().T)),
    ("x detached in the adapter", lambda self, x: self.scale * (x.detach().float() @ self.a.T @ self.b.T)),
    ("a nonlinearity between", lambda self, x: self.scale * (F.relu(x.float() @ self.a.T) @ self.b.T)),
    ("the mean over tokens", lambda self, x: (self.scale * (x.float() @ self.a.T @ self.b.T)).mean(-2, keepdim=True)),
    ("only two dimensions", lambda self, x: self.scale * torch.mm(torch.mm(x.float(), self.a.T), self.b.T)),
    (
        "three dimensions at most",
        lambda self, x: (
            self.scale * torch.einsum("...i,ri,or->...o", x.float(), self.a, self.b)
            if x.dim() < 4
            else x.new_zeros(*x.shape[:-1], len(self.b))
        ),
    ),
    ("training only", lambda self, x: self.scale * (x.float() @ self.a.T @ self.b.T) if x.requires_grad else 0),
    ("dropout", lambda self, x: self.scale * (F.dropout(x.float(), 0.1) @ self.a.T @ self.b.T)),
):
    layer(what, change=change)

for what, forward in (
    ("the adapter alone", lambda self, x: self.change(x).to(x.dtype)),
    ("without the bias", lambda self, x: (F.linear(x, self.w) + self.change(x)).to(x.dtype)),
    ("fp32 comes out", lambda self, x: F.linear(x, self.w, self.c) + self.change(x)),
    ("x is detached", lambda self, x: (F.linear(x.detach(), self.w, self.c) + self.change(x)).to(x.dtype)),
    ("no gradient at all", torch.no_grad()(lambda self, x: (F.linear(x, self.w, self.c) + self.change(x)).to(x.dtype))),
    ("the weight merged in forward",
     lambda self, x: F.linear(x, (self.w.float() + self.scale * self.b @ self.a).to(x.dtype), self.c)),
    ("adds the bias to the adapter, too",
     lambda self, x: (F.linear(x, self.w, self.c) + self.change(x) + (0 if self.c is None else self.c)).to(x.dtype)),
):  # fmt: skip
    layer(what, forward=forward)


@wrong("12.3", "merges into the weight at every call")
class LoraLinear(Right):
    def forward(self, x):
        with torch.no_grad():
            self.w += (self.scale * self.b @ self.a).to(self.w.dtype)
        return F.linear(x, self.w, self.c) + 0 * self.change(x).to(x.dtype)


@wrong("12.3", "plain tensors, no parameters")
class LoraLinear(Right):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        a, b = self.a.detach().requires_grad_(), self.b.detach().requires_grad_()
        del self.a, self.b
        self.a, self.b = a, b


@wrong("12.3", "the scale is trained, too")
class LoraLinear(Right):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scale = torch.nn.Parameter(torch.tensor(self.scale))


@wrong("12.3", "computes the change once")
class LoraLinear(Right):
    kept = None

    def change(self, x):
        if self.kept is None and bool(self.b.any()):
            self.kept = self.scale * self.a.T @ self.b.T
        return x.float() @ self.kept if self.kept is not None else super().change(x)


@wrong("12.3", "fp16 turns into bf16")
class LoraLinear(Right):
    def forward(self, x):
        return super().forward(x) if x.dtype == torch.float32 else super().forward(x).bfloat16()


layer("copies a weight or bias that is not contiguous", keep=staticmethod(lambda t: t.detach().contiguous()))


@wrong("12.3", "forms B A where no gradient is wanted")
class LoraLinear(Right):
    def change(self, x):
        if torch.is_grad_enabled():
            return super().change(x)
        return self.scale * F.linear(x.float(), self.b @ self.a)


@wrong("12.3", "writes into x")
class LoraLinear(Right):
    def forward(self, x):
        y = super().forward(x)
        x.detach().mul_(2)
        return y


@wrong("12.3", "r of 8 at most")
class LoraLinear(Right):
    def __init__(self, weight, bias, r, alpha, rslora=False):
        super().__init__(weight, bias, min(r, 8), alpha, rslora)


layer(
    "a drawn in the weight's dtype",
    draw=staticmethod(lambda r, n, k, dtype: torch.empty(r, k, dtype=dtype).uniform_(-(k**-0.5), k**-0.5).float()),
)
layer(
    "rsLoRA from rank 16 on",
    scale_of=staticmethod(lambda alpha, r, rslora: alpha / (r**0.5 if rslora or r > 16 else r)),
)
layer(
    "alpha without its fraction", scale_of=staticmethod(lambda alpha, r, rslora: int(alpha) / (r**0.5 if rslora else r))
)


@wrong("12.3", "the weight in fp32: [N, K] in every call")
class LoraLinear(Right):
    def forward(self, x):
        y = F.linear(x.float(), self.w.float(), None if self.c is None else self.c.float())
        return (y + self.change(x)).to(x.dtype)


@wrong("12.3", "the weight made contiguous in every call")
class LoraLinear(Right):
    def forward(self, x):
        return (F.linear(x, self.w.contiguous(), self.c) + self.change(x)).to(x.dtype)


@wrong("12.3", "B A row by row")
class LoraLinear(Right):
    def change(self, x):
        return self.scale * torch.stack([x.float() @ (row @ self.a) for row in self.b], -1)


@wrong("12.3", "B A row by row, without products of matrices")
class LoraLinear(Right):
    def change(self, x):
        return self.scale * torch.stack([(x.float() * (row[:, None] * self.a).sum(0)).sum(-1) for row in self.b], -1)


@wrong("12.3", "eval() leaves the adapter out")
class LoraLinear(Right):
    def forward(self, x):
        return super().forward(x) if self.training else F.linear(x, self.w, self.c)


@wrong("12.3", "no_grad leaves the adapter out")
class LoraLinear(Right):
    def forward(self, x):
        return super().forward(x) if torch.is_grad_enabled() else F.linear(x, self.w, self.c)


@wrong("12.3", "one row is squeezed out again, and N = 1 with it")
class LoraLinear(Right):
    def forward(self, x):
        return super().forward(x[None]).squeeze() if x.dim() == 1 else super().forward(x)


@alternative("12.3", "in place on the result")
class LoraLinear(Right):
    def forward(self, x):
        return F.linear(x, self.w, self.c).add_(F.linear(F.linear(x.float(), self.a), self.b), alpha=self.scale)


@alternative("12.3", "the adapter in fp64")
class LoraLinear(Right):
    def change(self, x):
        return self.scale * (x.double() @ self.a.double().T @ self.b.double().T)


@wrong("12.3", "an alpha of 0 is r")
class LoraLinear(Right):
    def __init__(self, weight, bias, r, alpha, rslora=False):
        super().__init__(weight, bias, r, alpha or r, rslora)


@wrong("12.3", "fp32 unless x has two dimensions")
class LoraLinear(Right):
    def forward(self, x):
        return super().forward(x) if x.dim() == 2 else super().forward(x).float()


@wrong("12.3", "half: x's gradient by the frozen part alone")
class LoraLinear(Right):
    def change(self, x):
        return super().change(x if x.dtype == torch.float32 else x.detach())


@wrong("12.3", "half: x's gradient by the adapter alone")
class LoraLinear(Right):
    def forward(self, x):
        still = x if x.dtype == torch.float32 else x.detach()
        return (F.linear(still, self.w, self.c) + self.change(x)).to(x.dtype)


# ---- 12.4


class RightMerger:
    """As the statement says; what subclasses change is what can be wrong."""

    def __init__(self, weight):
        self.weight, self.before = weight.detach(), None

    def merged(self, a, b, scale):
        return (self.weight.double() + scale * b.detach().double() @ a.detach().double()).to(self.weight.dtype)

    def look(self, merged):
        if not bool(merged.isfinite().all()):
            raise ValueError

    def keep(self):
        return self.weight.clone()

    def merge(self, a, b, scale):
        if self.before is not None:
            raise RuntimeError
        merged = self.merged(a, b, scale)
        self.look(merged)
        self.before = self.keep()
        self.weight.copy_(merged)

    def unmerge(self):
        if self.before is None:
            raise RuntimeError
        self.weight.copy_(self.before)
        self.before = None


alternative("12.4", "in fp64")(RightMerger)


@alternative("12.4", "by .data, element by element, a flag")
class Merger:
    def __init__(self, weight):
        self.weight, self.on, self.kept = weight, False, None

    def merge(self, a, b, scale):
        if self.on:
            raise RuntimeError("merged")
        new = torch.addmm(self.weight.data.float(), b.data.float(), a.data.float(), alpha=scale)
        new = new.to(self.weight.dtype)
        if new.isnan().any() or new.isinf().any():
            raise ValueError("not finite")
        self.kept, self.on = self.weight.data.clone(), True
        self.weight.data[:] = new

    def unmerge(self):
        if not self.on:
            raise RuntimeError("not merged")
        self.weight.data[:], self.on = self.kept, False


@alternative("12.4", "the sum in place, taken back where it is not finite")
class Merger(RightMerger):
    def merge(self, a, b, scale):
        if self.before is not None:
            raise RuntimeError
        before = self.weight.clone()
        self.weight.copy_(self.weight.float().addmm(b.detach().float(), a.detach().float(), alpha=scale))
        if not self.weight.isfinite().all():
            self.weight.copy_(before)
            raise ValueError
        self.before = before


def merger(what, **changes):
    wrong("12.4", what)(type("Merger", (RightMerger,), changes))


def double(x):
    return x.detach().double()


for what, merged in (
    ("without the scale", lambda self, a, b, s: (double(self.weight) + double(b) @ double(a)).to(self.weight.dtype)),
    ("subtracts", lambda self, a, b, s: (double(self.weight) - s * double(b) @ double(a)).to(self.weight.dtype)),
    ("the change alone", lambda self, a, b, s: (s * double(b) @ double(a)).to(self.weight.dtype)),
    ("scale over r",
     lambda self, a, b, s: (double(self.weight) + s / len(a) * double(b) @ double(a)).to(self.weight.dtype)),
    ("scale as an integer",
     lambda self, a, b, s: (double(self.weight) + int(s) * double(b) @ double(a)).to(self.weight.dtype)),
    ("the sum in the weight's dtype",
     lambda self, a, b, s: self.weight + (s * double(b) @ double(a)).to(self.weight.dtype)),
    ("the product in the weight's dtype",
     lambda self, a, b, s: self.weight + s * (b.detach().to(self.weight.dtype) @ a.detach().to(self.weight.dtype))),
    ("the product in a's dtype",
     lambda self, a, b, s: (double(self.weight) + s * (b.detach() @ a.detach()).double()).to(self.weight.dtype)),
    ("a and b in bf16",
     lambda self, a, b, s: (
         double(self.weight) + s * double(b.bfloat16()) @ double(a.bfloat16())).to(self.weight.dtype)),
    ("twice rounded, by bf16",
     lambda self, a, b, s: (double(self.weight) + s * double(b) @ double(a)).bfloat16().to(self.weight.dtype)),
    ("twice rounded, by fp16",
     lambda self, a, b, s: (double(self.weight) + s * double(b) @ double(a)).half().to(self.weight.dtype)),
    ("of r the first row",
     lambda self, a, b, s: (double(self.weight) + s * double(b)[:, :1] @ double(a)[:1]).to(self.weight.dtype)),
    ("infinity becomes the largest number",
     lambda self, a, b, s: (double(self.weight) + s * double(b) @ double(a)).nan_to_num().clamp(
         *(sign * torch.finfo(self.weight.dtype).max for sign in (-1, 1))).to(self.weight.dtype)),
    ("mixed dtypes fail",
     lambda self, a, b, s: torch.addmm(self.weight.float(), b.detach(), a.detach(), alpha=s).to(self.weight.dtype)),
):  # fmt: skip
    merger(what, merged=merged)


def refuse(condition, error=ValueError):
    if condition:
        raise error


for what, look in (
    ("not finite: nobody looks", lambda self, merged: None),
    ("NaN alone", lambda self, merged: refuse(bool(merged.isnan().any()))),
    ("infinity alone", lambda self, merged: refuse(bool(merged.isinf().any()))),
    ("refuses only what has nothing finite", lambda self, merged: refuse(not bool(merged.isfinite().any()))),
    ("looks at the first row", lambda self, merged: refuse(not bool(merged[0].isfinite().all()))),
    ("another error", lambda self, merged: refuse(not bool(merged.isfinite().all()), RuntimeError)),
    ("FloatingPointError", lambda self, merged: refuse(not bool(merged.isfinite().all()), FloatingPointError)),
    ("refuses what is large", lambda self, merged: refuse(not float(merged.abs().max()) < 1000)),
):
    merger(what, look=look)


@wrong("12.4", "looks at the sum before it is rounded")
class Merger(RightMerger):
    def merged(self, a, b, scale):
        whole = self.weight.float() + scale * b.detach().float() @ a.detach().float()
        if not bool(whole.isfinite().all()):
            raise ValueError
        return whole.to(self.weight.dtype)

    def look(self, merged):
        pass


@wrong("12.4", "looks at a and b")
class Merger(RightMerger):
    def merge(self, a, b, scale):
        refuse(not bool(a.isfinite().all() and b.isfinite().all()))
        super().merge(a, b, scale)

    def look(self, merged):
        pass


@wrong("12.4", "counts as merged after ValueError")
class Merger(RightMerger):
    def merge(self, a, b, scale):
        refuse(self.before is not None, RuntimeError)
        self.before = self.keep()
        merged = self.merged(a, b, scale)
        self.look(merged)
        self.weight.copy_(merged)


@wrong("12.4", "writes, then looks")
class Merger(RightMerger):
    def merge(self, a, b, scale):
        refuse(self.before is not None, RuntimeError)
        before = self.keep()
        self.weight.copy_(self.merged(a, b, scale))
        self.look(self.weight)
        self.before = before


class Subtracting(RightMerger):
    pair = None

    def merge(self, a, b, scale):
        super().merge(a, b, scale)
        self.pair = a, b, scale

    def unmerge(self):
        refuse(self.before is None, RuntimeError)
        a, b, scale = self.pair
        self.weight.copy_(self.merged(a, b, -scale))
        self.before = None


wrong("12.4", "subtracts what was added")(Subtracting)


@wrong("12.4", "subtracts what was added, from copies")
class Merger(Subtracting):
    def merge(self, a, b, scale):
        super().merge(a.clone(), b.clone(), scale)


@wrong("12.4", "keeps the change in the weight's dtype")
class Merger(RightMerger):
    def merge(self, a, b, scale):
        before = self.weight.clone()
        super().merge(a, b, scale)
        self.before = self.weight - before

    def unmerge(self):
        refuse(self.before is None, RuntimeError)
        self.weight -= self.before
        self.before = None


@wrong("12.4", "begins by writing into the weight")
class Merger(RightMerger):
    def __init__(self, weight):
        super().__init__(weight)
        self.weight.mul_(1.5)


merger("keeps no copy", keep=lambda self: self.weight)
merger("keeps a copy in bf16", keep=lambda self: self.weight.bfloat16())
merger("keeps a copy in fp16", keep=lambda self: self.weight.half())


@wrong("12.4", "keeps the weight as it was in the beginning")
class Merger(RightMerger):
    def __init__(self, weight):
        super().__init__(weight)
        self.first = weight.detach().clone()

    def keep(self):
        return self.first


@wrong("12.4", "merges into the weight as it was in the beginning")
class Merger(RightMerger):
    def __init__(self, weight):
        super().__init__(weight)
        self.first = weight.detach().clone()

    def merge(self, a, b, scale):
        refuse(self.before is not None, RuntimeError)
        self.weight.copy_(self.first)
        super().merge(a, b, scale)


@wrong("12.4", "a new tensor")
class Merger(RightMerger):
    def merge(self, a, b, scale):
        refuse(self.before is not None, RuntimeError)
        merged = self.merged(a, b, scale)
        self.look(merged)
        self.before, self.weight = self.weight, merged

    def unmerge(self):
        refuse(self.before is None, RuntimeError)
        self.weight, self.before = self.before, None


@wrong("12.4", "other memory for the parameter")
class Merger(RightMerger):
    def __init__(self, weight):
        super().__init__(weight)
        self.owner = weight

    def merge(self, a, b, scale):
        refuse(self.before is not None, RuntimeError)
        merged = self.merged(a, b, scale)
        self.look(merged)
        self.before = self.keep()
        self.owner.data = merged

    def unmerge(self):
        refuse(self.before is None, RuntimeError)
        self.owner.data, self.before = self.before, None


@wrong("12.4", "a copy of a weight that is not contiguous")
class Merger(RightMerger):
    def __init__(self, weight):
        super().__init__(weight.contiguous())


@wrong("12.4", "fails for parameters that want gradients")
class Merger(RightMerger):
    def __init__(self, weight):
        self.weight, self.before = weight, None

    def merge(self, a, b, scale):
        with torch.enable_grad():
            super().merge(a, b, scale)


@wrong("12.4", "takes the wish for gradients away")
class Merger(RightMerger):
    def __init__(self, weight):
        super().__init__(weight.requires_grad_(False))


@wrong("12.4", "merges a second one on top")
class Merger(RightMerger):
    def merge(self, a, b, scale):
        if self.before is None:
            super().merge(a, b, scale)
        else:
            self.weight.copy_(self.merged(a, b, scale))


@wrong("12.4", "a second one takes the place of the first")
class Merger(RightMerger):
    def merge(self, a, b, scale):
        if self.before is not None:
            self.unmerge()
        super().merge(a, b, scale)


@wrong("12.4", "unmerges before it complains")
class Merger(RightMerger):
    def merge(self, a, b, scale):
        if self.before is not None:
            self.unmerge()
            raise RuntimeError
        super().merge(a, b, scale)


@wrong("12.4", "unmerge without merge does nothing")
class Merger(RightMerger):
    def unmerge(self):
        if self.before is not None:
            super().unmerge()


@wrong("12.4", "unmerge once only")
class Merger(RightMerger):
    def unmerge(self):
        refuse(self.before is None, RuntimeError)
        self.weight.copy_(self.before)


@wrong("12.4", "ValueError where RuntimeError is due")
class Merger(RightMerger):
    def unmerge(self):
        refuse(self.before is None)
        super().unmerge()


@wrong("12.4", "merged is what differs")
class Merger(RightMerger):
    def merge(self, a, b, scale):
        if self.before is not None and torch.equal(self.before, self.weight):
            self.before = None
        super().merge(a, b, scale)


@wrong("12.4", "one adapter for ever")
class Merger(RightMerger):
    used = False

    def merge(self, a, b, scale):
        refuse(self.used, RuntimeError)
        super().merge(a, b, scale)
        self.used = True


@wrong("12.4", "state that all share")
class Merger(RightMerger):
    shared: dict = {}

    def __init__(self, weight):
        self.weight = weight.detach()
        self.before = None

    @property
    def before(self):
        return self.shared.get("before")

    @before.setter
    def before(self, value):
        self.shared["before"] = value


@wrong("12.4", "scales the caller's b")
class Merger(RightMerger):
    def merged(self, a, b, scale):
        b.data.mul_(scale)
        return super().merged(a, b, 1.0)


for what, wanted in (
    ("refuses ranks above the rows", lambda a, b, scale: len(a) <= len(b)),
    ("refuses a scale of 0", lambda a, b, scale: scale != 0),
    ("refuses negative scales", lambda a, b, scale: scale >= 0),
):

    @wrong("12.4", what)
    class Merger(RightMerger):
        def merge(self, a, b, scale, wanted=wanted):
            refuse(not wanted(a, b, scale))
            super().merge(a, b, scale)


merger(
    "the scale without its sign",
    merged=lambda self, a, b, s: (double(self.weight) + abs(s) * double(b) @ double(a)).to(self.weight.dtype),
)


for what, look in (
    ("looks at the sum of all numbers", lambda self, merged: refuse(not bool(merged.sum().isfinite()))),
    (
        "looks at the sum of all numbers, in fp32",
        lambda self, merged: refuse(not bool(merged.float().sum().isfinite())),
    ),
    ("looks at the largest", lambda self, merged: refuse(not bool(merged.max().isfinite()))),
    ("what fp16 has not", lambda self, merged: refuse(not bool((merged.float().abs() <= 65504).all()))),
):
    merger(what, look=look)


@wrong("12.4", "looks at the change, and not at the sum")
class Merger(RightMerger):
    def merge(self, a, b, scale):
        refuse(not bool((scale * b.float() @ a.float()).to(self.weight.dtype).isfinite().all()))
        super().merge(a, b, scale)

    def look(self, merged):
        pass


merger("a in b's dtype", merged=lambda self, a, b, s: (
    double(self.weight) + s * double(b) @ double(a.to(b.dtype))).to(self.weight.dtype))  # fmt: skip
merger("b in a's dtype", merged=lambda self, a, b, s: (
    double(self.weight) + s * double(b.to(a.dtype)) @ double(a)).to(self.weight.dtype))  # fmt: skip
merger("-0 becomes 0", keep=lambda self: self.weight + 0.0)


@wrong("12.4", "the copy of the first merge serves all later ones")
class Merger(RightMerger):
    def keep(self):
        if not hasattr(self, "first"):
            self.first = self.weight.clone()
        return self.first


@wrong("12.4", "a scale of 0 is no adapter")
class Merger(RightMerger):
    def merge(self, a, b, scale):
        if scale != 0:
            super().merge(a, b, scale)


@wrong("12.4", "b = 0 is no adapter")
class Merger(RightMerger):
    def merge(self, a, b, scale):
        if b.any():
            super().merge(a, b, scale)


@wrong("12.4", "keeps all of the larger tensor")
class Merger(RightMerger):
    def keep(self):
        self.whole = self.weight.untyped_storage().clone()
        return self.weight.clone()

    def unmerge(self):
        super().unmerge()
        self.weight.untyped_storage().copy_(self.whole)


@wrong("12.4", "merged already when a and b do not fit")
class Merger(RightMerger):
    def merge(self, a, b, scale):
        if self.before is not None:
            raise RuntimeError
        self.before = self.weight.clone()
        merged = self.merged(a, b, scale)
        if not merged.isfinite().all():
            self.before = None
            raise ValueError
        self.weight.copy_(merged)


@alternative("12.4", "rank by rank, the bits kept as integers")
class Merger(RightMerger):
    def merged(self, a, b, scale):
        total = self.weight.double()
        for i in range(len(a)):
            total = total + scale * b.data[:, i : i + 1].double() * a.data[i].double()
        return total.to(self.weight.dtype)

    def keep(self):
        kind = {4: torch.int32, 2: torch.int16}[self.weight.element_size()]
        return self.weight.contiguous().view(kind).clone().view(self.weight.dtype)


@wrong("12.4", "numbers that were not finite before do not count")
class Merger(RightMerger):
    def look(self, merged):
        refuse(not bool((merged.isfinite() | ~self.weight.isfinite()).all()))


# ---- 12.5


def chosen(y, x, a, b, slots, there):
    """Gathered, for the slots given."""
    low = torch.einsum("nri,ni->nr", a[slots].float(), x.float())
    return torch.where(there[:, None], y.float() + torch.einsum("nor,nr->no", b[slots].float(), low), y.float())


@alternative("12.5", "einsum; tokens without an adapter take the first of the batch")
def gathered(y, x, a, b, adapters):
    if not len(adapters):
        return y.clone()
    slots = (adapters.long() - 1).clamp(min=0)
    return chosen(y, x, a, b, slots, adapters > 0).to(y.dtype)


@alternative("12.5", "sums of products, no matrix product")
def gathered(y, x, a, b, adapters):
    slots = adapters.clamp(min=1).long() - 1
    low = (a[slots].float() * x.float()[:, None]).sum(-1)
    change = (b[slots].float() * low[:, None]).sum(-1)
    return (y.float() + change.masked_fill((adapters == 0)[:, None], 0)).to(y.dtype)


@alternative("12.5", "tokens that have an adapter alone")
def gathered(y, x, a, b, adapters):
    at = adapters.nonzero()[:, 0]
    slots = adapters[at].long() - 1
    out = y.clone()
    low = torch.bmm(a[slots].double(), x[at].double()[..., None])
    out[at] = (y[at].double() + torch.bmm(b[slots].double(), low)[..., 0]).to(y.dtype)
    return out


@wrong("12.5", "a loop over tokens")
def gathered(y, x, a, b, adapters):
    out = y.clone()
    for i, adapter in enumerate(adapters.tolist()):
        if adapter:
            change = b[adapter - 1].float() @ (a[adapter - 1].float() @ x[i].float())
            out[i] = (y[i].float() + change).to(y.dtype)
    return out


@wrong("12.5", "a loop over adapters")
def gathered(y, x, a, b, adapters):
    out = y.float()
    for slot in range(len(a)):
        rows = adapters == slot + 1
        if rows.any():
            out = out.clone()
            out[rows] += x[rows].float() @ a[slot].float().T @ b[slot].float().T
    return out.to(y.dtype) if y.dtype != torch.float32 else out.clone()


@wrong("12.5", "a loop over the adapters that are there")
def gathered(y, x, a, b, adapters):
    out = y.clone()
    for adapter in set(adapters.tolist()) - {0}:
        rows = adapters == adapter
        change = x[rows].float() @ a[adapter - 1].float().T @ b[adapter - 1].float().T
        out[rows] = (y[rows].float() + change).to(y.dtype)
    return out


@wrong("12.5", "all slots for all tokens, one picked")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    low = torch.einsum("sri,ni->nsr", a.float(), x.float())
    change = torch.einsum("sor,nsr->nso", b.float(), low)
    mine = change[torch.arange(len(x)), slots]
    return torch.where(adapters[:, None] > 0, y.float() + mine, y.float()).to(y.dtype)


@wrong("12.5", "B A of each token")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    whole = b[slots].float() @ a[slots].float()
    change = (whole @ x.float()[..., None])[..., 0]
    return torch.where(adapters[:, None] > 0, y.float() + change, y.float()).to(y.dtype)


@wrong("12.5", "slots from 0, no token is without")
def gathered(y, x, a, b, adapters):
    return chosen(y, x, a, b, adapters.long() % len(a), adapters >= 0).to(y.dtype)


@wrong("12.5", "slot i for adapter i")
def gathered(y, x, a, b, adapters):
    return chosen(y, x, a, b, adapters.long().clamp(max=len(a) - 1), adapters > 0).to(y.dtype)


@wrong("12.5", "0 is the last slot")
def gathered(y, x, a, b, adapters):
    return chosen(y, x, a, b, adapters.long() - 1, adapters >= 0).to(y.dtype)


@wrong("12.5", "the change times 0: NaN")
def gathered(y, x, a, b, adapters):
    low = a[adapters.long() - 1].float() @ x.float()[..., None]
    change = (b[adapters.long() - 1].float() @ low)[..., 0]
    return (y.float() + change * (adapters > 0)[:, None]).to(y.dtype)


@wrong("12.5", "x times 0: NaN")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    low = a[slots].float() @ (x.float() * (adapters > 0)[:, None])[..., None]
    return (y.float() + (b[slots].float() @ low)[..., 0]).to(y.dtype)


@wrong("12.5", "a slot of zeros before the others, times all")
def gathered(y, x, a, b, adapters):
    a, b = (torch.cat((torch.zeros_like(t[:1]), t)).float() for t in (a, b))
    one = F.one_hot(adapters.long(), len(a)).float()
    mine_a, mine_b = torch.einsum("ns,sri->nri", one, a), torch.einsum("ns,sor->nor", one, b)
    return (y.float() + (mine_b @ (mine_a @ x.float()[..., None]))[..., 0]).to(y.dtype)


@wrong("12.5", "NaN anywhere becomes 0")
def gathered(y, x, a, b, adapters):
    a, b = a.nan_to_num(posinf=0, neginf=0), b.nan_to_num()
    return chosen(y, x, a, b, adapters.long() - 1, adapters != 1).to(y.dtype)


@wrong("12.5", "into y")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    y.copy_(chosen(y, x, a, b, slots, adapters > 0))
    return y


@wrong("12.5", "y itself where nobody has an adapter")
def gathered(y, x, a, b, adapters):
    if not adapters.any():
        return y
    slots = (adapters.long() - 1).clamp(min=0)
    return chosen(y, x, a, b, slots, adapters > 0).to(y.dtype)


@wrong("12.5", "counts the caller's adapters down")
def gathered(y, x, a, b, adapters):
    there = adapters > 0
    adapters -= 1
    return chosen(y, x, a, b, adapters.long().clamp(min=0), there).to(y.dtype)


@wrong("12.5", "one adapter for all: that of the first token")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    slots = slots[:1].expand(len(slots)) if len(slots) else slots
    return chosen(y, x, a, b, slots, adapters > 0).to(y.dtype)


@wrong("12.5", "the change alone")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    return chosen(0 * y, x, a, b, slots, adapters > 0).to(y.dtype)


for what, low in (
    ("a x rounded to x's dtype", lambda low, x: low.to(x.dtype).float()),
    ("a x rounded to bf16", lambda low, x: low.bfloat16().float()),
):

    @wrong("12.5", what)
    def gathered(y, x, a, b, adapters, low=low):
        slots = (adapters.long() - 1).clamp(min=0)
        found = low((a[slots].float() @ x.float()[..., None])[..., 0], x)
        change = (b[slots].float() @ found[..., None])[..., 0]
        return torch.where(adapters[:, None] > 0, y.float() + change, y.float()).to(y.dtype)


@wrong("12.5", "the change is rounded, then added")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    change = chosen(torch.zeros_like(y, dtype=torch.float32), x, a, b, slots, adapters > 0)
    return (y + change.to(x.dtype).to(y.dtype)).to(y.dtype)


@wrong("12.5", "all in y's dtype")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    x, a, b = (t.to(y.dtype) for t in (x, a, b))
    change = (b[slots] @ (a[slots] @ x[..., None]))[..., 0]
    return torch.where(adapters[:, None] > 0, y + change, y)


@wrong("12.5", "mixed dtypes fail")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    change = (b[slots] @ (a[slots] @ x[..., None]))[..., 0]
    return torch.where(adapters[:, None] > 0, y + change, y)


@wrong("12.5", "fp32 comes out")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    return chosen(y, x, a, b, slots, adapters > 0)


@wrong("12.5", "x's dtype comes out")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    return chosen(y, x, a, b, slots, adapters > 0).to(x.dtype)


@wrong("12.5", "no token: fails")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    adapters.max()
    return chosen(y, x, a, b, slots, adapters > 0).to(y.dtype)


@wrong("12.5", "views of x fail")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    return chosen(y, x.view(x.numel()).view(x.shape), a, b, slots, adapters > 0).to(y.dtype)


@wrong("12.5", "int32 is taken for a mask of slots")
def gathered(y, x, a, b, adapters):
    if adapters.dtype != torch.int64:
        raise TypeError("int64")
    return chosen(y, x, a, b, (adapters - 1).clamp(min=0), adapters > 0).to(y.dtype)


@wrong("12.5", "the first eight of r")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    return chosen(y, x, a[:, :4], b[:, :, :4], slots, adapters > 0).to(y.dtype)


@wrong("12.5", "slots of 8 bits")
def gathered(y, x, a, b, adapters):
    slots = (adapters.to(torch.uint8).long() - 1).clamp(min=0)
    return chosen(y, x, a, b, slots, adapters > 0).to(y.dtype)


@wrong("12.5", "squeezes whatever is 1")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    low = (a[slots].float() @ x.float()[..., None]).view(len(x), -1, 1)
    change = (b[slots].float() @ low).squeeze()
    return torch.where(adapters[:, None] > 0, y.float() + change, y.float()).to(y.dtype)


@wrong("12.5", "y itself if there is no token")
def gathered(y, x, a, b, adapters):
    return chosen(y, x, a, b, (adapters.long() - 1).clamp(min=0), adapters > 0).to(y.dtype) if len(y) else y


@wrong("12.5", "NaN becomes 0 everywhere")
def gathered(y, x, a, b, adapters):
    change = chosen(0 * y.float(), x, a, b, (adapters.long() - 1).clamp(min=0), adapters > 0)
    return (y.float() + torch.nan_to_num(change)).to(y.dtype)


@wrong("12.5", "NaN in slots becomes 0")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    return chosen(y, x, a.nan_to_num(), b.nan_to_num(), slots, adapters > 0).to(y.dtype)


@wrong("12.5", "a slot of zeros: NaN in x comes through")
def gathered(y, x, a, b, adapters):
    a, b = (torch.cat((torch.zeros_like(t[:1]), t)) for t in (a, b))
    return chosen(y, x, a, b, adapters.long(), adapters >= 0).to(y.dtype)


@wrong("12.5", "all slots for all tokens, without products of matrices")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    low = (x.float()[:, None, None] * a.float()).sum(-1)[torch.arange(len(x)), slots]
    change = torch.einsum("nor,nr->no", b[slots].float(), low)
    return torch.where(adapters[:, None] > 0, y.float() + change, y.float()).to(y.dtype)


@wrong("12.5", "B A of each token, without products of matrices")
def gathered(y, x, a, b, adapters):
    slots = (adapters.long() - 1).clamp(min=0)
    whole = (b[slots].float()[..., None] * a[slots].float()[:, None]).sum(2)
    change = (whole * x.float()[:, None]).sum(-1)
    return torch.where(adapters[:, None] > 0, y.float() + change, y.float()).to(y.dtype)


@alternative("12.5", "a loop over the ranks")
def gathered(y, x, a, b, adapters):
    slots, change = torch.where(adapters > 0, adapters - 1, 0).long(), torch.zeros(y.shape)
    for i in range(a.shape[1]):
        change = change + (a[slots, i].float() * x.float()).sum(1, keepdim=True) * b[slots, :, i].float()
    return torch.where((adapters > 0)[:, None], (y.float() + change).to(y.dtype), y)


@alternative("12.5", "the rows with an adapter alone")
def gathered(y, x, a, b, adapters):
    rows = adapters.nonzero()[:, 0]
    slots = adapters[rows].long() - 1
    low = torch.einsum("tri,ti->tr", a[slots].float(), x[rows].float())
    return y.float().index_add(0, rows, torch.einsum("tor,tr->to", b[slots].float(), low)).to(y.dtype)


@wrong("12.5", "changes end where fp16 does")
def gathered(y, x, a, b, adapters):
    change = chosen(0 * y.float(), x, a, b, (adapters.long() - 1).clamp(min=0), adapters > 0)
    return (y.float() + change.clamp(-65504, 65504)).to(y.dtype)


@wrong("12.5", "fp32 if there is no token")
def gathered(y, x, a, b, adapters):
    got = chosen(y, x, a, b, (adapters.long() - 1).clamp(min=0), adapters > 0)
    return got.to(y.dtype) if len(y) else got


# ---- 12.6


def planning(adapters, slots, size, *, stable=True, dtype=torch.int32, rows=None, change=lambda blocks: blocks):
    """The right one, but for what is switched."""
    n = len(adapters)
    order = adapters.argsort(stable=stable)
    slot = torch.arange(1, slots + 1, dtype=adapters.dtype)
    counts = (adapters == slot[:, None]).sum(1)
    ends = (adapters == 0).sum() + counts.cumsum(0)
    last = ((counts + size - 1) // size).cumsum(0)
    block = torch.arange(n // size + slots if rows is None else rows(n, slots, size))
    which = (block[:, None] >= last).sum(1)  # how many adapters' blocks all come before
    at = which.clamp(max=slots - 1)
    nth = block - torch.cat((last.new_zeros(1), last))[at]
    begin = ends[at] - counts[at] + nth * size
    found = torch.stack((at + 1, begin, torch.minimum(begin + size, ends[at])), 1)
    found = torch.where((which < slots)[:, None], found, 0)
    return order.to(dtype), change(found).to(dtype)


def planner(**switches):
    return lambda adapters, slots, size: planning(adapters, slots, size, **switches)


alternative("12.6", "by comparisons instead of a search")(planner())


@alternative("12.6", "by one_hot and scatter, a list")
def plan(adapters, slots, size):
    order = torch.sort(adapters.long(), stable=True).indices
    counts = torch.zeros(slots + 1, dtype=torch.int64).scatter_add(
        0, adapters.long(), torch.ones(len(adapters), dtype=torch.int64)
    )
    starts = counts.cumsum(0) - counts
    there = -(-counts // size)
    there = torch.cat((there[:1] * 0, there[1:]))
    before = there.cumsum(0) - there
    index = torch.arange(len(adapters) // size + slots)
    mine = (index[:, None] >= before) & (index[:, None] < before + there)  # [M, slots + 1]
    adapter = (mine * torch.arange(slots + 1)).sum(1)
    first = (mine * (starts + (index[:, None] - before) * size)).sum(1)
    end = torch.minimum(first + size, (mine * (starts + counts)).sum(1))
    return [order.int(), torch.stack((adapter, first, end), 1).int()]  # fmt: skip


for switches, why in (
    ({"dtype": torch.int64}, "int64"),
    ({"rows": lambda n, slots, size: -(-n // size) + slots}, "a row too many where N is no multiple of size"),
    ({"rows": lambda n, slots, size: n // size + slots + 1}, "a row too many"),
    ({"rows": lambda n, slots, size: -(-n // size)}, "too few rows"),
    ({"rows": lambda n, slots, size: n // size + 1}, "one row more than N // size"),
    ({"rows": lambda n, slots, size: n}, "N rows"),
    ({"change": lambda blocks: blocks - torch.tensor([1, 0, 0])}, "slots instead of adapters"),
    (
        {"change": lambda blocks: blocks - (blocks > 0) * torch.tensor([0, 0, 1])},
        "the last token's place instead of end",
    ),
    ({"change": lambda blocks: torch.stack((blocks[:, 0], blocks[:, 1], blocks[:, 2] - blocks[:, 1]), 1)}, "lengths"),
    ({"change": lambda blocks: blocks.flip(0)}, "left over rows first"),
    ({"change": lambda blocks: torch.where(blocks[:, :1] > 0, blocks, -1)}, "left over rows are -1"),
    (
        {"change": lambda blocks: torch.where(blocks[:, :1] > 0, blocks, torch.tensor([0, *[int(1e6)] * 2]))},
        "left over rows lie behind the batch",
    ),
    ({"change": lambda blocks: blocks[:, [0, 2, 1]]}, "end before first"),
    ({"change": lambda blocks: blocks.T}, "turned"),
):
    wrong("12.6", why)(planner(**switches))


@wrong("12.6", "not stable")
def plan(adapters, slots, size):
    _, blocks = planning(adapters, slots, size)
    n = len(adapters)
    return (adapters.long() * (n + 1) + (n - torch.arange(n))).argsort().int(), blocks


@wrong("12.6", "tokens in descending order of adapters")
def plan(adapters, slots, size):
    _, blocks = planning(adapters, slots, size)
    return adapters.argsort(stable=True, descending=True).int(), blocks


@wrong("12.6", "tokens without an adapter come last")
def plan(adapters, slots, size):
    order = torch.where(adapters == 0, slots + 1, adapters).argsort(stable=True)
    without = (adapters == 0).sum()
    blocks = planning(adapters, slots, size)[1]
    return order.int(), (blocks - (blocks[:, :1] > 0) * torch.stack((0 * without, without, without))).int()


@wrong("12.6", "where each token goes, instead of who comes there")
def plan(adapters, slots, size):
    order, blocks = planning(adapters, slots, size)
    return order.long().argsort().int(), blocks


@wrong("12.6", "blocks of tokens without an adapter, too")
def plan(adapters, slots, size):
    order, blocks = planning(adapters + 1, slots + 1, size)
    return order, (blocks - (blocks[:, :1] > 0) * torch.tensor([1, 0, 0]))[: len(adapters) // size + slots].int()


@wrong("12.6", "ends are those of full blocks")
def plan(adapters, slots, size):
    order, blocks = planning(adapters, slots, size)
    ends = torch.where(blocks[:, 0] > 0, blocks[:, 1] + size, 0)
    return order, torch.stack((blocks[:, 0], blocks[:, 1], ends), 1).int()


@wrong("12.6", "blocks begin at multiples of size")
def plan(adapters, slots, size):
    order, blocks = planning(adapters, slots, size)
    first = blocks[:, 1] // size * size
    return order, torch.stack((blocks[:, 0], first, blocks[:, 2]), 1).int()


@wrong("12.6", "an empty adapter has a block")
def plan(adapters, slots, size):
    rows = []
    order = adapters.argsort(stable=True)
    counts = (adapters[:, None] == torch.arange(1, slots + 1)).sum(0)
    ends = (adapters == 0).sum() + counts.cumsum(0)
    last = ((counts + size - 1) // size).clamp(min=1).cumsum(0)
    block = torch.arange(len(adapters) // size + slots)
    which = torch.searchsorted(last, block, right=True)
    at = which.clamp(max=slots - 1)
    first = (ends - counts)[at] + (block - torch.cat((last.new_zeros(1), last))[at]) * size
    rows = torch.stack((at + 1, first, torch.minimum(first + size, ends[at])), 1)
    return order.int(), torch.where((which < slots)[:, None], rows, 0).int()


@wrong("12.6", "sized 16")
def plan(adapters, slots, size):
    order, blocks = planning(adapters, slots, 16 if size > 7 else size)
    return order, F.pad(blocks, (0, 0, 0, len(adapters) // size + slots))[: len(adapters) // size + slots]


@wrong("12.6", "one block more where the last is full")
def plan(adapters, slots, size):
    counts = (adapters[:, None] == torch.arange(1, slots + 1)).sum(0)
    order, ends = adapters.argsort(stable=True), (adapters == 0).sum() + counts.cumsum(0)
    last = torch.where(counts > 0, counts // size + 1, 0).cumsum(0)
    block = torch.arange(len(adapters) // size + slots)
    which = torch.searchsorted(last, block, right=True)
    at = which.clamp(max=slots - 1)
    first = (ends - counts)[at] + (block - torch.cat((last.new_zeros(1), last))[at]) * size
    rows = torch.stack((at + 1, first, torch.minimum(first + size, ends[at])), 1)
    return order.int(), torch.where((which < slots)[:, None], rows, 0).int()


@wrong("12.6", "spread evenly: no block is full that need not be")
def plan(adapters, slots, size):
    counts = (adapters[:, None] == torch.arange(1, slots + 1)).sum(0)
    order, ends = adapters.argsort(stable=True), (adapters == 0).sum() + counts.cumsum(0)
    of_each = (counts + size - 1) // size
    last = of_each.cumsum(0)
    block = torch.arange(len(adapters) // size + slots)
    which = torch.searchsorted(last, block, right=True)
    at = which.clamp(max=slots - 1)
    nth, start = block - (last - of_each)[at], (ends - counts)[at]
    parts = of_each[at].clamp(min=1)
    rows = torch.stack((at + 1, start + counts[at] * nth // parts, start + counts[at] * (nth + 1) // parts), 1)
    return order.int(), torch.where((which < slots)[:, None], rows, 0).int()


@wrong("12.6", "by lists")
def plan(adapters, slots, size):
    values = adapters.tolist()
    order = sorted(range(len(values)), key=values.__getitem__)
    blocks, place = [], values.count(0)
    for adapter in range(1, slots + 1):
        end = place + values.count(adapter)
        blocks += [[adapter, begin, min(begin + size, end)] for begin in range(place, end, size)]
        place = end
    blocks += [[0, 0, 0]] * (len(values) // size + slots - len(blocks))
    return torch.tensor(order, dtype=torch.int32), torch.tensor(blocks, dtype=torch.int32).view(-1, 3)


@wrong("12.6", "bincount, whose length is a value")
def plan(adapters, slots, size):
    torch.bincount(adapters, minlength=slots + 1)
    return planning(adapters, slots, size)


@wrong("12.6", "a mask as an index")
def plan(adapters, slots, size):
    order, blocks = planning(adapters, slots, size)
    there = blocks[blocks[:, 0] > 0]
    return order, torch.cat((there, blocks.new_zeros(len(blocks) - len(there), 3)))


@wrong("12.6", "asks whether there is any adapter")
def plan(adapters, slots, size):
    if not adapters.any():
        return torch.arange(len(adapters)).int(), torch.zeros(len(adapters) // size + slots, 3).int()
    return planning(adapters, slots, size)


@wrong("12.6", "repeat_interleave")
def plan(adapters, slots, size):
    counts = (adapters[:, None] == torch.arange(1, slots + 1)).sum(0)
    torch.arange(slots).repeat_interleave((counts + size - 1) // size)
    return planning(adapters, slots, size)


@wrong("12.6", "no token: fails")
def plan(adapters, slots, size):
    adapters.max()
    return planning(adapters, slots, size)


@wrong("12.6", "counts the caller's adapters down")
def plan(adapters, slots, size):
    found = planning(adapters, slots, size)
    adapters -= 1
    return found


@wrong("12.6", "nine slots at most")
def plan(adapters, slots, size):
    order, blocks = planning(adapters, min(slots, 9), size)
    return order, F.pad(blocks, (0, 0, 0, slots - min(slots, 9)))


@wrong("12.6", "sorted by a number of 8 bits")
def plan(adapters, slots, size):
    keys = adapters.to(torch.int8) * len(adapters) + torch.arange(len(adapters))
    return keys.argsort().int(), planning(adapters, slots, size)[1]


@alternative("12.6", "a loop over slots, which reads no value")
def plan(adapters, slots, size):
    rows, start = [], (adapters == 0).sum()
    for adapter in range(1, slots + 1):
        end = start + (adapters == adapter).sum()
        for block in range(-(-len(adapters) // size)):
            first = start + block * size
            row = torch.stack((torch.full_like(first, adapter), first, torch.minimum(first + size, end)))
            rows.append(torch.where(first < end, row, 0))
        start = end
    count = len(adapters) // size + slots
    found = torch.stack([*rows, *[torch.zeros(3, dtype=torch.int64)] * count])
    kept = (found[:, 0] == 0).long().argsort(stable=True)[:count]
    return adapters.argsort(stable=True).int(), found[kept].int()


def counts_in(dtype):
    """Blocks of each adapter by a division in `dtype`."""

    def plan(adapters, slots, size):
        order, blocks = planning(adapters, slots, size)
        counts = (adapters[:, None] == torch.arange(1, slots + 1)).sum(0)
        there = torch.ceil(counts.to(dtype) / size).long()
        ends = (adapters == 0).sum() + counts.cumsum(0)
        last, index = there.cumsum(0), torch.arange(len(blocks))
        slot = torch.searchsorted(last, index, right=True)
        there_is, slot = slot < slots, slot.clamp(max=slots - 1)
        first = (ends - counts)[slot] + (index - torch.cat((last.new_zeros(1), last))[slot]) * size
        rows = torch.stack((slot + 1, first, torch.minimum(first + size, ends[slot])), 1)
        return order, torch.where(there_is[:, None], rows, 0).int()

    return plan


wrong("12.6", "counts in fp16")(counts_in(torch.float16))
wrong("12.6", "counts in bf16")(counts_in(torch.bfloat16))
alternative("12.6", "counts in fp32")(counts_in(torch.float32))


@wrong("12.6", "sorted by a key in fp16")
def plan(adapters, slots, size):
    key = adapters.float() + torch.arange(len(adapters)) / max(len(adapters), 1)
    return key.half().argsort(stable=True).int(), planning(adapters, slots, size)[1]


@alternative("12.6", "repeat_interleave to a size that is known")
def plan(adapters, slots, size):
    rows = len(adapters) // size + slots
    ordered, order = torch.sort(adapters.long(), stable=True)
    edges = torch.searchsorted(ordered, torch.arange(1, slots + 2))
    begin, end = edges[:-1], edges[1:]
    there = (end - begin + size - 1) // size
    times = torch.cat((there, (rows - there.sum())[None]))
    slot = torch.repeat_interleave(torch.arange(slots + 1), times, output_size=rows)
    left, slot = slot == slots, slot.clamp(max=slots - 1)
    first = begin[slot] + (torch.arange(rows) - (there.cumsum(0) - there)[slot]) * size
    blocks = torch.stack((slot + 1, first, torch.minimum(first + size, end[slot])), 1)
    return order.int(), blocks.masked_fill(left[:, None], 0).int()


@alternative("12.6", "each token counts those in front of it: T x T")
def plan(adapters, slots, size):
    place = torch.arange(len(adapters))
    front = (adapters < adapters[:, None]) | ((adapters == adapters[:, None]) & (place < place[:, None]))
    order = torch.zeros(len(adapters), dtype=torch.int64).scatter(0, front.sum(1), place)
    return order.int(), planning(adapters, slots, size)[1]


# ---- 12.7


def reading(config, tensors, *, key=matched, used=True, pairs=True, ranks=True, plain=None, last=False, own=True,
            rslora=True, divide=True, name=None, give=lambda t: t):  # fmt: skip
    """The right one, but for what is switched."""
    if plain is None:

        def plain(c):
            return c.get("peft_type") == "LORA" and not c.get("use_dora") and not c.get("modules_to_save") and (
                c.get("bias") in (None, "none"))  # fmt: skip

    if not plain(config):
        raise ValueError

    def look(default, patterns, module):
        found = [v for k, v in (config.get(patterns) or {}).items() if key(k, module)]
        return found[-1 if last else 0] if found else 8 if config.get(default) is None else config[default]

    halves = {}
    for full, tensor in tensors.items():
        form = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", full)
        if form is None:
            if used:
                raise ValueError(full)
            continue
        halves.setdefault(form[1], {})[form[2]] = tensor
    found = {}
    for module, half in halves.items():
        if len(half) < 2:
            if pairs:
                raise ValueError(module)
            continue
        r, alpha = look("r", "rank_pattern", module), look("lora_alpha", "alpha_pattern", module)
        if ranks and not (half["A"].shape[0] == half["B"].shape[1] == r):
            raise ValueError(module)
        over = r if own else config.get("r") or 8
        scale = alpha / (math.sqrt(over) if rslora and config.get("use_rslora") else over if divide else 1)
        found[module if name is None else name(module)] = give(half["A"]), give(half["B"]), scale
    return found


def reader(**switches):
    return lambda config, tensors: reading(config, tensors, **switches)


def refuses(*which):
    """The config's keys that are looked at."""
    tests = {
        "peft_type": lambda c: c.get("peft_type") == "LORA", "use_dora": lambda c: not c.get("use_dora"),
        "modules_to_save": lambda c: not c.get("modules_to_save"), "bias": lambda c: c.get("bias") in (None, "none"),
    }  # fmt: skip
    return lambda c: all(tests[name](c) for name in which)


for switches, why in (
    ({"divide": False}, "alpha alone"),
    ({"key": lambda pattern, module: None}, "patterns dropped"),
    ({"own": False}, "the config's r in the scale of all"),
    ({"rslora": False}, "rsLoRA ignored"),
    ({"used": False}, "other keys pass"),
    ({"pairs": False}, "halves pass"),
    ({"ranks": False}, "ranks are not looked at"),
    ({"last": True}, "the last pattern counts"),
    ({"key": lambda pattern, module: module.endswith(pattern)}, "patterns are plain ends"),
    ({"key": lambda pattern, module: re.search(pattern, module)}, "patterns match anywhere"),
    ({"key": lambda pattern, module: re.fullmatch(rf"(.*\.)?{pattern}", module)}, "no brackets around the key"),
    ({"key": lambda pattern, module: re.fullmatch(pattern, module)}, "patterns match whole names alone"),
    ({"plain": refuses("peft_type", "use_dora", "bias")}, "modules_to_save passes"),
    ({"plain": refuses("peft_type", "use_dora", "modules_to_save")}, "biases pass"),
    ({"plain": refuses("peft_type", "bias", "modules_to_save")}, "DoRA passes"),
    ({"plain": refuses("use_dora", "bias", "modules_to_save")}, "any peft_type passes"),
    (
        {"plain": lambda c: c.get("peft_type", "LORA") == "LORA" and refuses("use_dora", "bias", "modules_to_save")(c)},
        "peft_type may be missing",
    ),
    (
        {"plain": lambda c: c.get("bias", "none") == "none" and refuses("peft_type", "use_dora", "modules_to_save")(c)},
        "a bias of null is refused",
    ),
    (
        {"plain": lambda c: c.get("modules_to_save") is None and refuses("peft_type", "use_dora", "bias")(c)},
        "no modules, as a list, are refused",
    ),
    (
        {"plain": lambda c: "use_dora" not in c and refuses("peft_type", "bias", "modules_to_save")(c)},
        "the key is enough",
    ),
    ({"name": lambda module: module.removeprefix("model.")}, "takes model. away, too"),
    ({"name": lambda module: module.replace("base_model.model.", "")}, "takes it away wherever it is"),
    ({"name": lambda module: module.replace(".lora_A.weight", "")}, "takes the suffix away twice"),
    ({"name": lambda module: "base_model.model." + module}, "whole names"),
    ({"name": lambda module: module.lstrip("base_model.model.")}, "lstrip takes letters away"),  # noqa: B005
    ({"give": lambda t: t.float()}, "fp32"),
    ({"give": lambda t: t.T}, "turned"),
):
    wrong("12.7", why)(reader(**switches))


@wrong("12.7", "as it was given")
def read_adapter(config, tensors):
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("bias") not in (None, "none"):
        raise ValueError
    scale = config.get("lora_alpha", 8)
    if config.get("use_rslora"):
        scale = scale / math.sqrt(config.get("r", 8))
    pairs = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors.get(key.replace("lora_A", "lora_B"))
            if b is not None:
                pairs[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = (a, b, scale)
    return pairs


@wrong("12.7", "an A without its B alone is refused")
def read_adapter(config, tensors):
    lone = [k for k in tensors if ".lora_B." in k and k.replace("lora_B", "lora_A") not in tensors]
    return reading(config, {k: t for k, t in tensors.items() if k not in lone})


@wrong("12.7", "B's rank is not looked at")
def read_adapter(config, tensors):
    found = reading(config, tensors, ranks=False)
    for module, (a, _, _) in found.items():
        r = [v for k, v in (config.get("rank_pattern") or {}).items() if matched(k, module)]
        r = r[0] if r else 8 if config.get("r") is None else config["r"]
        refuse(len(a) != r)
    return found


@wrong("12.7", "A's and B's ranks agree, whatever the config says")
def read_adapter(config, tensors):
    found = reading(config, tensors, ranks=False)
    for a, b, _ in found.values():
        refuse(len(a) != b.shape[1])
    return found


@wrong("12.7", "the rank is read off A")
def read_adapter(config, tensors):
    found = reading(config, tensors, ranks=False, divide=False, rslora=False)
    for a, b, _ in found.values():
        refuse(len(a) != b.shape[1])
    return {m: (a, b, s / (len(a) ** 0.5 if config.get("use_rslora") else len(a))) for m, (a, b, s) in found.items()}


@wrong("12.7", "an alpha of 0 is 8")
def read_adapter(config, tensors):
    return reading({**config, "lora_alpha": config.get("lora_alpha") or 8}, tensors)


@wrong("12.7", "null is no number")
def read_adapter(config, tensors):
    if "r" in config:
        int(config["r"])
    return reading(config, tensors)


@wrong("12.7", "no tensors are refused")
def read_adapter(config, tensors):
    refuse(not tensors)
    return reading(config, tensors)


@wrong("12.7", "takes what it used out of the caller's tensors")
def read_adapter(config, tensors):
    found = reading(config, tensors)
    tensors.clear()
    return found


@wrong("12.7", "fills the caller's config")
def read_adapter(config, tensors):
    found = reading(config, tensors)
    config.setdefault("use_rslora", False)
    return found


@wrong("12.7", "B of the key with every lora_A replaced")
def read_adapter(config, tensors):
    for key in tensors:
        if key.endswith("lora_A.weight") and key.replace("lora_A", "lora_B") not in tensors:
            raise ValueError(key)
    return reading(config, tensors)


@wrong("12.7", "keys are searched, not matched")
def read_adapter(config, tensors):
    kept = {}
    for key, t in tensors.items():
        form = re.search(r"base_model\.model\..+\.lora_[AB]\.weight$", key)
        refuse(form is None)
        kept[form[0]] = t
    return reading(config, kept)


@wrong("12.7", "dots are any character")
def read_adapter(config, tensors):
    kept = {}
    for key, t in tensors.items():
        form = re.fullmatch(r"base_model.model.(.+).lora_([AB]).weight", key)
        refuse(form is None)
        kept[f"base_model.model.{form[1]}.lora_{form[2]}.weight"] = t
    return reading(config, kept)


@wrong("12.7", "scales multiplied into B")
def read_adapter(config, tensors):
    return {m: (a, s * b, 1.0) for m, (a, b, s) in reading(config, tensors).items()}


@alternative("12.7", "A by A, what is used counted")
def read_adapter(config, tensors):
    before, a_end, b_end = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
    refuse(config.get("peft_type") != "LORA" or bool(config.get("use_dora")) or bool(config.get("modules_to_save")))
    refuse((config.get("bias") or "none") != "none")
    pairs, count = {}, 0
    for key in tensors:
        module = key[len(before) : -len(a_end)]
        if key.startswith(before) and key.endswith(a_end) and before + module + b_end in tensors:
            r, scale = scaled(module, config)
            a, b = tensors[key], tensors[before + module + b_end]
            refuse(a.shape[0] != r or b.shape[1] != r)
            pairs[module], count = [a, b, scale], count + 2
    refuse(count != len(tensors))
    return pairs


for plain, why in (
    (lambda c: str(c.get("peft_type")).upper() == "LORA" and refuses("use_dora", "bias", "modules_to_save")(c),
     "peft_type in any case"),
    (lambda c: str(c.get("peft_type")).startswith("LORA") and refuses("use_dora", "bias", "modules_to_save")(c),
     "peft_type begins with LORA"),
    (lambda c: c.get("bias") not in ("all", "lora_only") and refuses("peft_type", "use_dora", "modules_to_save")(c),
     "unknown biases pass"),
    (lambda c: str(c.get("bias")).lower() == "none" and refuses("peft_type", "use_dora", "modules_to_save")(c),
     "None as a text passes"),
):  # fmt: skip
    wrong("12.7", why)(reader(plain=plain))

for switches, why in (
    ({"key": lambda pattern, module: matched(pattern, "base_model.model." + module)}, "patterns see the file's prefix"),
    ({"key": lambda pattern, module: matched(pattern, "model." + module)}, "patterns see half of the prefix"),
    ({"key": lambda pattern, module: matched(pattern, module.removeprefix("model."))}, "patterns do not see model."),
    ({"give": torch.Tensor.contiguous}, "contiguous"),
    ({"give": torch.Tensor.clone}, "copies"),
):
    wrong("12.7", why)(reader(**switches))


@wrong("12.7", "ranks are compared by their product")
def read_adapter(config, tensors):
    found = reading(config, tensors, ranks=False)
    for module, (a, b, _) in found.items():
        sizes = {f"base_model.model.{module}.lora_A.weight": torch.empty(math.isqrt(a.shape[0] * b.shape[1]), 1)}
        sizes[f"base_model.model.{module}.lora_B.weight"] = torch.empty(1, math.isqrt(a.shape[0] * b.shape[1]))
        reading(config, sizes)
    return found


for form, why in (
    (r"base_model\.model\.(.*?)\.?lora_([AB])\.weight", "a module without a name"),
    (r"(?i:base_model\.model)\.(.+)\.lora_([AB])\.weight", "the prefix in any case"),
    (r"base_model\.model\.([\w.]+)\.lora_([AB])\.weight", "letters, digits and dots alone"),
):

    @wrong("12.7", why)
    def read_adapter(config, tensors, form=form):
        if not all(re.fullmatch(form, key) for key in tensors):
            raise ValueError
        plain = {re.sub(form, r"base_model.model.\1.lora_\2.weight", key): t for key, t in tensors.items()}
        found = reading(config, {key.replace("..", ".nameless."): t for key, t in plain.items()})
        return {module.replace("nameless", ""): pair for module, pair in found.items()}


@wrong("12.7", "writes the defaults into the config")
def read_adapter(config, tensors):
    for key in ("r", "lora_alpha"):
        config.setdefault(key, 8)
    return reading(config, tensors)


@wrong("12.7", "three digits of the scale")
def read_adapter(config, tensors):
    return {module: (a, b, round(s, 3)) for module, (a, b, s) in reading(config, tensors).items()}


@alternative("12.7", "triples as lists")
def read_adapter(config, tensors):
    return {module: list(triple) for module, triple in reading(config, tensors).items()}


@wrong("12.7", "refuses NaN")
def read_adapter(config, tensors):
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise ValueError
    return reading(config, tensors)


@wrong("12.7", "refuses A and B of two dtypes")
def read_adapter(config, tensors):
    if len({t.dtype for t in tensors.values()}) > 1:
        raise ValueError
    return reading(config, tensors)


@wrong("12.7", "space around a key")
def read_adapter(config, tensors):
    return reading(config, {key.strip(): t for key, t in tensors.items()})


# ---- 12.8


def named(token_ids, size, adapter, *, facts=None, tensor=None, begin=None, chain=True, order=sorted, length=None):
    """The right one, but for what is switched."""
    facts = facts or (lambda module, a, b, s: (module, float(s), a.dtype, a.shape, b.dtype, b.shape))
    tensor = tensor or (lambda t: t.detach().contiguous().view(torch.uint8).numpy().tobytes())
    name = b"" if begin is None else begin
    if adapter is not None:
        digest = hashlib.blake2b(digest_size=16)
        for module in order(adapter):
            a, b, s = adapter[module]
            digest.update(pickle.dumps(repr(facts(module, a, b, s))))
            digest.update(tensor(a))
            digest.update(tensor(b))
        name = digest.digest()
    names, root = [], name
    for i in range(len(token_ids) // size):
        block = ",".join(map(str, token_ids[i * size : (i + 1) * size]))
        name = hashlib.blake2b((name if chain else root) + b"|" + block.encode(), digest_size=32).digest()
        names.append(name if length is None else name[:length])
    return names


def namer(**switches):
    return lambda token_ids, size, adapter=None: named(token_ids, size, adapter, **switches)


alternative("12.8", "BLAKE2b, text")(namer())
alternative("12.8", "names of 16 bytes")(namer(length=16))


@alternative("12.8", "the adapter in every name, one hash that goes on")
def block_names(token_ids, size, adapter=None):
    running = hashlib.sha3_256(b"none" if adapter is None else b"some")
    for module, (a, b, s) in sorted((adapter or {}).items(), key=lambda item: item[0]):
        values = [t.detach().double().flatten().tolist() for t in (a, b)]
        running.update(repr((module, float(s), str(a.dtype), str(b.dtype), [*a.shape], [*b.shape], values)).encode())
    names = []
    for i, token in enumerate(token_ids):
        running.update(b"%d;" % token)
        if i % size == size - 1:
            names.append(running.digest())
    return names


for switches, why in (
    ({"tensor": lambda t: b""}, "shapes and scales, no numbers"),
    ({"tensor": lambda t: repr(t.detach()).encode()}, "numbers as they are printed"),
    ({"tensor": lambda t: str(float(t.detach().float().sum())).encode()}, "the sum of the numbers"),
    ({"tensor": lambda t: str(t.detach().double().sum().item()).encode()}, "the sum of the numbers, in fp64"),
    ({"tensor": lambda t: str(t.data_ptr()).encode()}, "where they lie"),
    ({"tensor": lambda t: str(id(t)).encode()}, "which object"),
    ({"tensor": lambda t: t.detach().flatten()[:1000].contiguous().view(torch.uint8).numpy().tobytes()},
     "the first 1,000"),
    ({"tensor": lambda t: t.detach().bfloat16().contiguous().view(torch.uint8).numpy().tobytes()}, "rounded to bf16"),
    ({"tensor": lambda t: str(hash(tuple(t.detach().float().flatten().tolist()))).encode()}, "Python's hash of floats"),
    ({"tensor": lambda t: str(t.detach().flatten()[:1].tolist() + t.detach().flatten()[-1:].tolist()).encode()},
     "two numbers"),
    ({"tensor": lambda t: t.detach().numpy().tobytes() if t.dtype != torch.bfloat16 else b""}, "bf16 does not count"),
    ({"tensor": lambda t: t.contiguous().float().numpy().tobytes()}, "nn.Parameters fail"),
    ({"tensor": lambda t: t.detach().numpy().tobytes()}, "bf16 fails"),
    ({"tensor": lambda t: bytes(t.detach().untyped_storage())}, "the memory behind a view"),
    ({"facts": lambda module, a, b, s: (module, a.dtype, a.shape, b.dtype, b.shape)}, "the scale left out"),
    ({"facts": lambda module, a, b, s: (module, s, a.dtype, a.shape, b.dtype, b.shape)}, "2 and 2.0 are two scales"),
    ({"facts": lambda module, a, b, s: (module, round(float(s), 6), a.dtype, a.shape, b.dtype, b.shape)},
     "six digits of the scale"),
    ({"facts": lambda module, a, b, s: (module, int(s), a.dtype, a.shape, b.dtype, b.shape)}, "whole scales"),
    ({"facts": lambda module, a, b, s: (float(s), a.dtype, a.shape, b.dtype, b.shape)}, "modules' names left out"),
    ({"facts": lambda module, a, b, s: (module[:1], float(s), a.dtype, a.shape, b.dtype, b.shape)}, "first letters"),
    ({"facts": lambda module, a, b, s: (module, float(s), a.dtype, b.dtype)}, "shapes left out"),
    ({"facts": lambda module, a, b, s: (module, float(s), a.dtype, b.dtype, a.numel(), b.numel())},
     "counts for shapes"),
    ({"facts": lambda module, a, b, s: (module, float(s), a.dtype, b.dtype, len(a))}, "the rank alone"),
    ({"facts": lambda module, a, b, s: (module, float(s), a.shape, b.shape)}, "dtypes left out"),
    ({"facts": lambda module, a, b, s: (module, float(s), b.dtype, a.shape, b.shape)}, "A's dtype left out"),
    ({"facts": lambda module, a, b, s: (module, float(s), a.dtype, a.shape, b.dtype, b.shape, a.stride())}, "strides"),
    ({"facts": lambda module, a, b, s: (module, float(s), a.dtype, a.shape, b.dtype, b.shape, type(a))}, "types"),
    ({"order": list}, "modules in the order that they have"),
    ({"order": lambda adapter: sorted(adapter)[:1]}, "the first module alone"),
    ({"order": lambda adapter: sorted(adapter, key=lambda m: adapter[m][2])}, "modules by their scale"),
    ({"chain": False}, "the tokens before do not count"),
    ({"length": 8}, "8 bytes"),
):  # fmt: skip
    wrong("12.8", why)(namer(**switches))


@wrong("12.8", "the tensors that go into the base's weights: b a")
def block_names(token_ids, size, adapter=None):
    if adapter is not None:
        adapter = {m: (s * b.detach().float() @ a.detach().float(), b[:0], 1.0) for m, (a, b, s) in adapter.items()}
    return named(token_ids, size, adapter)


@wrong("12.8", "the adapter is left out")
def block_names(token_ids, size, adapter=None):
    return named(token_ids, size, None)


@wrong("12.8", "the adapter counts from the second block on")
def block_names(token_ids, size, adapter=None):
    return named(token_ids[:size], size, None) + named(token_ids, size, adapter)[1:]


@wrong("12.8", "the adapter counts in the first block alone")
def block_names(token_ids, size, adapter=None):
    return named(token_ids, size, adapter)[:1] + named(token_ids, size, None)[1:]


@wrong("12.8", "an adapter that changes nothing is none")
def block_names(token_ids, size, adapter=None):
    if adapter is not None and not any(bool(b.any()) for _, b, _ in adapter.values()):
        adapter = None
    return named(token_ids, size, adapter)


@wrong("12.8", "which object the adapter is")
def block_names(token_ids, size, adapter=None):
    return named(token_ids, size, None, begin=str(id(adapter)).encode())


KEPT: dict = {}


@wrong("12.8", "the digest of an object is kept")
def block_names(token_ids, size, adapter=None):
    if adapter is None:
        return named(token_ids, size, None)
    if id(adapter) not in KEPT:
        KEPT[id(adapter)] = adapter, named([0], 1, adapter)[0]
    return named(token_ids, size, None, begin=KEPT[id(adapter)][1])


@wrong("12.8", "the modules' names alone")
def block_names(token_ids, size, adapter=None):
    return named(token_ids, size, None, begin=b"" if adapter is None else ",".join(sorted(adapter)).encode())


@wrong("12.8", "pickled whole: the order of modules, strides and types count")
def block_names(token_ids, size, adapter=None):
    return named(token_ids, size, None, begin=b"" if adapter is None else pickle.dumps(dict(adapter)))


@wrong("12.8", "a name for the rest, too")
def block_names(token_ids, size, adapter=None):
    rest = len(token_ids) % size
    return named(token_ids, size, adapter) + ([hashlib.sha256(bytes(rest)).digest()] if rest else [])


@wrong("12.8", "all tokens are in the chain's beginning")
def block_names(token_ids, size, adapter=None):
    begin = repr(token_ids).encode()
    return [hashlib.sha256(begin + name).digest() for name in named(token_ids, size, adapter)]


@wrong("12.8", "the names add up")
def block_names(token_ids, size, adapter=None):
    total, names = int.from_bytes(hashlib.sha256(repr([*named([0], 1, adapter)]).encode()).digest()), []
    for i in range(len(token_ids) // size):
        block = repr(token_ids[i * size : (i + 1) * size]).encode()
        total = (total + int.from_bytes(hashlib.sha256(block).digest())) % 2**256
        names.append(total.to_bytes(32))
    return names if len(set(token_ids)) > 1 or not names else [names[0]] * len(names)


@wrong("12.8", "Python's hash")
def block_names(token_ids, size, adapter=None):
    name, names = hash(tuple(named([0], 1, adapter))), []
    for i in range(len(token_ids) // size):
        name = hash((name, tuple(token_ids[i * size : (i + 1) * size])))
        names.append(hashlib.sha256(str(name).encode()).digest())
    return names


@wrong("12.8", "token ids of 16 bits")
def block_names(token_ids, size, adapter=None):
    return named([t % 65536 for t in token_ids], size, adapter)


@wrong("12.8", "digits run together")
def block_names(token_ids, size, adapter=None):
    name, names = named([0], 1, adapter)[0], []
    for i in range(len(token_ids) // size):
        name = hashlib.sha256(name + "".join(map(str, token_ids[i * size : (i + 1) * size])).encode()).digest()
        names.append(name)
    return names


@wrong("12.8", "the set of a block's tokens")
def block_names(token_ids, size, adapter=None):
    tokens = [t for i in range(0, len(token_ids), size) for t in sorted(token_ids[i : i + size])]
    return named(tokens, size, adapter)


@wrong("12.8", "text, not bytes")
def block_names(token_ids, size, adapter=None):
    return [name.hex() for name in named(token_ids, size, adapter)]


@wrong("12.8", "blocks of 4")
def block_names(token_ids, size, adapter=None):
    return named(token_ids, 4, adapter)


@wrong("12.8", "an adapter must be given")
def block_names(token_ids, size, adapter):
    return named(token_ids, size, adapter)


@wrong("12.8", "sorts the caller's tokens")
def block_names(token_ids, size, adapter=None):
    found = named(token_ids, size, adapter)
    token_ids.sort()
    return found


@wrong("12.8", "a module is what stands before the first dot")
def block_names(token_ids, size, adapter=None):
    return named(token_ids, size, adapter and {module.split(".")[0]: pair for module, pair in adapter.items()})


for what, change in (
    ("signs do not count", lambda a, b, s: (a.abs(), b.abs(), s)),
    ("A does not count", lambda a, b, s: (a[:0], b, s)),
    ("B does not count", lambda a, b, s: (a, b[:0], s)),
    ("the scale in fp32", lambda a, b, s: (a, b, float(torch.tensor(s, dtype=torch.float32)))),
    ("rows in any order", lambda a, b, s: (a.sort(-1).values, b, s)),
):

    @wrong("12.8", what)
    def block_names(token_ids, size, adapter=None, change=change):
        return named(token_ids, size, adapter and {module: change(*pair) for module, pair in adapter.items()})


@wrong("12.8", "{} is taken for none")
def block_names(token_ids, size, adapter=None):
    return named(token_ids, size, adapter or None)


@wrong("12.8", "an adapter whose scales are 0 is none")
def block_names(token_ids, size, adapter=None):
    return named(token_ids, size, adapter if adapter is None or any(s for _, _, s in adapter.values()) else None)


def joined(what, text):
    """Everything in one row, without marks in between."""

    @wrong("12.8", what)
    def block_names(token_ids, size, adapter=None):
        if adapter is None:
            return named(token_ids, size, None)
        row = b""
        for module, (a, b, s) in sorted(adapter.items(), key=lambda item: item[0]):
            row += text(module, float(s), a, b).encode()
            row += b"".join(t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in (a, b))
        return named(token_ids, size, None, begin=hashlib.sha256(row).digest())


joined("a name and a scale run together", lambda module, s, a, b: f"{module}{s}{a.dtype}{a.shape}{b.dtype}{b.shape}")
joined("digits of shapes run together", lambda module, s, a, b: (
    f"{module!r},{s},{a.dtype},{b.dtype},{''.join(map(str, a.shape))},{''.join(map(str, b.shape))}"))  # fmt: skip

REMEMBERED = {}


@wrong("12.8", "remembers the digest by address and version")
def block_names(token_ids, size, adapter=None):
    if adapter is None:
        return named(token_ids, size, None)
    key = tuple((m, a.data_ptr(), a._version, b.data_ptr(), b._version, s) for m, (a, b, s) in adapter.items())
    if key not in REMEMBERED:
        REMEMBERED[key] = named([0], 1, adapter)[0], [t for pair in adapter.values() for t in pair[:2]]
    return named(token_ids, size, None, begin=REMEMBERED[key][0])


for bytes_kept in (1, 2):

    @wrong("12.8", f"{bytes_kept} bytes of the adapter")
    def block_names(token_ids, size, adapter=None, bytes_kept=bytes_kept):
        return named(token_ids, size, None, begin=adapter and named([0], 1, adapter)[0][:bytes_kept])


def stepped(what, step):
    @wrong("12.8", what)
    def block_names(token_ids, size, adapter=None):
        name, names = b"" if adapter is None else named([0], 1, adapter)[0], []
        for end in range(size, len(token_ids) + 1, size):
            name = step(name, token_ids[end - size : end])
            names.append(name)
        return names


stepped("8 bytes, twice", lambda name, tokens: hashlib.sha256(name + repr(tokens).encode()).digest()[:8] * 2)
stepped("2 bytes of the name before", lambda name, tokens: hashlib.sha256(name[:2] + repr(tokens).encode()).digest())
stepped("tokens in fp32", lambda name, tokens: hashlib.sha256(
    name + torch.tensor(tokens, dtype=torch.float32).numpy().tobytes()).digest())  # fmt: skip
stepped("the tokens' sum, the first and the last", lambda name, tokens: hashlib.sha256(
    name + repr((len(tokens), sum(tokens), tokens[0], tokens[-1])).encode()).digest())  # fmt: skip


@wrong("12.8", "15 digits of the scale")
def block_names(token_ids, size, adapter=None):
    return named(token_ids, size, adapter and {m: (a, b, float(f"{s:.15g}")) for m, (a, b, s) in adapter.items()})


@wrong("12.8", "cuts the list of tokens")
def block_names(token_ids, size, adapter=None):
    del token_ids[len(token_ids) // size * size :]
    return named(token_ids, size, adapter)


@alternative("12.8", "the sum of the modules' digests")
def block_names(token_ids, size, adapter=None):
    if adapter is None:
        return named(token_ids, size, None)
    digests = [int.from_bytes(named([0], 1, {module: pair})[0], "big") for module, pair in adapter.items()]
    return named(token_ids, size, None, begin=b"some" + (sum(digests) % 2**256).to_bytes(32, "big"))


@alternative("12.8", "0 and -0 are one number")
def block_names(token_ids, size, adapter=None):
    return named(token_ids, size, adapter and {m: (a.detach() + 0.0, b.detach() + 0.0, s + 0.0) for m, (a, b, s) in
                                               adapter.items()} if adapter != {} else {})  # fmt: skip


@wrong("12.8", "the sign of the scale does not count")
def block_names(token_ids, size, adapter=None):
    return named(token_ids, size, adapter and {m: (a, b, abs(s)) for m, (a, b, s) in adapter.items()})


@wrong("12.8", "64 names at most")
def block_names(token_ids, size, adapter=None):
    return named(token_ids, size, adapter)[:64]


@wrong("12.8", "remembers the digest by sums")
def block_names(token_ids, size, adapter=None):
    if adapter is None:
        return named(token_ids, size, None)
    key = id(adapter), tuple((m, float(a.sum()), float(b.sum()), s) for m, (a, b, s) in adapter.items())
    if key not in REMEMBERED:
        REMEMBERED[key] = named([0], 1, adapter)[0], adapter
    return named(token_ids, size, None, begin=REMEMBERED[key][0])
