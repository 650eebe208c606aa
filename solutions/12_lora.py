# %% [markdown]
# # Exercises 12: LoRA
#
# Eight exercises on [chapter 12](../chapters/12_lora.md) and its [lab](../notebooks/12_lora.ipynb): two **warm-ups** of
# five minutes (12.1 and 12.2), the **core** (12.3 and 12.4), and four steps **beyond** (12.5 to 12.8, optional), which
# neither chapter nor lab shows in this form.
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.
#
# Conventions, in all of them: a layer computes y = x Wᵀ, W [N, K]. Its adapter is **A** [r, K] and **B** [N, r],
# and the layer with it computes x (W + γ B A)ᵀ. The **scale** γ is alpha / r, with rsLoRA alpha / √r. Tensors need not
# be contiguous, and inputs stay as they are, unless an exercise says otherwise.

# %%
import hashlib
import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from minillm.learn import check

# %% [markdown]
# ## Exercise 12.1: count trainable parameters
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: what is trained, and what that takes of memory | 1 of 5 | 5 | Hu et al., 2022, 4.2; Dettmers et al., 2023 |
#
# A model has `layers` decoder layers. `shapes` has the matrices of one, {name: (N, K)}; all layers are alike. Beside
# them there are `rest` parameters: the embedding, the norms.
#
# - **Full fine-tuning** trains all of them, in fp32 with Adam: each takes a weight, a gradient and two moments of 4
#   bytes.
# - **LoRA** of rank r trains A and B of each matrix in `targets`, in every layer, and takes as much for each of their
#   numbers. All parameters of the model itself are frozen, and stored in `base_bits` bits each (32, 16, or 4: QLoRA).
#
# Return how many numbers LoRA trains, the bytes of full fine-tuning, and those of LoRA. (Activations, and scales of the
# 4-bit weights, are left out.) A target that `shapes` does not have is a ValueError.


# %%
def budget(
    shapes: Mapping[str, tuple[int, int]], layers: int, rest: int, targets: set[str], r: int, base_bits: int
) -> tuple[int, float, float]:
    """(numbers that LoRA trains, bytes of full fine-tuning, bytes of LoRA)"""
    ### BEGIN SOLUTION
    if unknown := targets - shapes.keys():
        raise ValueError(f"targets: expected names of {', '.join(shapes)}, got {', '.join(sorted(unknown))}")
    whole = rest + layers * sum(n * k for n, k in shapes.values())
    trained = layers * sum(r * (n + k) for name, (n, k) in shapes.items() if name in targets)
    return trained, 16 * whole, whole * base_bits / 8 + 16 * trained
    ### END SOLUTION


# %%
check("12.1", budget)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A has r · K numbers, B has N · r. With LoRA the matrices are still there, all of them: frozen, without gradients
# and moments.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# 4 + 4 + 8 bytes for each number that is trained, `base_bits / 8` for each that is not. `targets - shapes.keys()` are
# the names that nobody has.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** With r = 8 on all seven matrices SmolLM2-135M trains 2.4 million numbers, 1.8 %: 39 MB with gradients and
# moments, beside 2.2 GB for the whole. Most of what is left is the frozen model, and that is what QLoRA stores in 4
# bits: for an 8B model 128 GB becomes 16 GB plus the adapter in bf16, and 4 GB plus the adapter in 4 bits.
#
# A matrix gains as long as r (N + K) is below N · K: for a square one up to half of its side. Of two matrices
# with the same input the smaller one gains less: k and v with few heads least.

# %% [markdown]
# ## Exercise 12.2: the scale
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: alpha / r, for each module its own | 1 of 5 | 10 | Hu et al., 2022, 4.1; Kalajdzievski, 2023 |
#
# `config` is what `adapter_config.json` holds. Say which rank and which scale the module `name` has, such as
# `"model.layers.3.self_attn.q_proj"`.
#
# - `r` and `lora_alpha` hold for all modules, but for those that a pattern matches.
# - `rank_pattern` and `alpha_pattern`: {key: value}. A key is a regular expression. It matches a module if the **whole
#   name** matches, or **an end of it that begins after a dot**: `q_proj` matches the name above, `proj` does not. Of
#   several that match the **first** counts. Ranks and alphas are looked up apart from each other.
# - The scale is alpha / r with the module's own alpha and its own r; with `use_rslora` alpha / √r.
# - A key of the config that is missing, or null (`None`), means PEFT's default: r 8, lora_alpha 8, no patterns, no
#   rsLoRA. Other keys do not matter.


# %%
def scale_of(name: str, config: Mapping) -> tuple[int, float]:
    """(rank, scale) of the module called so"""

    ### BEGIN SOLUTION
    def value(default: str, patterns: str) -> float:
        found = config.get(patterns) or {}
        keys = [key for key in found if re.fullmatch(rf"(.*\.)?({key})", name)]
        return found[keys[0]] if keys else 8 if config.get(default) is None else config[default]

    r, alpha = value("r", "rank_pattern"), value("lora_alpha", "alpha_pattern")
    return r, alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    ### END SOLUTION


# %%
check("12.2", scale_of)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `re.fullmatch(rf"(.*\.)?({key})", name)` is the rule in one line: perhaps something that ends in a dot, then the key.
# Why are the brackets around the key needed?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Look up rank and alpha by the same few lines: the first key that matches, or else the config's number, or else 8.
# `config.get(...) or {}` takes care of null.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A key such as `q_proj|k_proj` needs the brackets, or "perhaps something with a dot" belongs to its first
# half only. With rank 32 at some modules and 8 at the others, alpha / 8 everywhere is 4 times too large at the former:
# the model answers, badly, and nothing is raised. vLLM's reader dropped both patterns (the version that chapter 12
# names), several engines forgot the root of rsLoRA, and one took alpha for the scale.
#
# Why divide by r at all? So that the same learning rate serves when r is tried out: in the beginning the r columns of B
# push the same way, and with alpha / r a step gains as much at every rank (the lab's second section). rsLoRA keeps the
# *size* of the change level instead, and so takes larger steps with a large r.

# %% [markdown]
# ## Exercise 12.3: the layer
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: a frozen linear layer and what is trained beside it | 2 of 5 | 25 | Hu et al., 2022, 4.1 |
#
# `LoraLinear(weight, bias, r, alpha, rslora)` is a layer around a frozen one: weight [N, K], bias [N] or None, of
# one dtype (fp32, fp16, bf16).
#
# - Its attributes `a` [r, K] and `b` [N, r] are fp32 `nn.Parameter`s, whatever the weight's dtype. a is drawn in fp32,
#   uniformly from -1/√K to 1/√K, by torch's global generator (`torch.manual_seed` makes it the same again); b is 0.
# - `layer(x)` for x [..., K], in the weight's dtype, is x Wᵀ + bias + γ (x Aᵀ) Bᵀ, in x's dtype. The adapter's part is
#   computed in fp32.
# - Gradients reach a, b and x. **None reaches weight and bias**, even if they ask for one (`requires_grad`).
# - weight and bias are used as they are, not copied: if somebody changes them in place, the layer computes with that.
#   The layer does not change their numbers.
# - A token costs r (N + K) multiplications more than the frozen layer, when it is computed and in backward: **no
#   [N, K] tensor is made**, B A least of all, nor a copy of the weight in another dtype.


# %%
class LoraLinear(torch.nn.Module):
    """x Wᵀ + bias + γ (x Aᵀ) Bᵀ, of which a [r, K] and b [N, r] are trained."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, r: int, alpha: float, rslora: bool = False
    ) -> None:
        super().__init__()
        ### BEGIN SOLUTION
        n, k = weight.shape
        self.frozen = weight.detach(), None if bias is None else bias.detach()
        self.scale = alpha / (math.sqrt(r) if rslora else r)
        bound = 1 / math.sqrt(k)
        self.a = torch.nn.Parameter(torch.empty(r, k, dtype=torch.float32).uniform_(-bound, bound))
        self.b = torch.nn.Parameter(torch.zeros(n, r, dtype=torch.float32))
        ### END SOLUTION

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]"""
        ### BEGIN SOLUTION
        y = F.linear(x, *self.frozen)
        change = self.scale * F.linear(F.linear(x.float(), self.a), self.b)  # [..., r] in between
        return (y + change).to(x.dtype)
        ### END SOLUTION


# %%
check("12.3", LoraLinear)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two products, one after the other: first x Aᵀ, which is [..., r], then that times Bᵀ. `F.linear(x, A)` is x Aᵀ.
# `detach()` gives a tensor with the same memory that wants no gradient.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `nn.Parameter(torch.empty(r, k).uniform_(-bound, bound))` draws with the global generator. Turn x into fp32 for the
# adapter, and the sum back into x's dtype.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** B = 0 makes a new adapter no change at all. The gradients are dB = γ dYᵀ (x Aᵀ) and dA = γ (dY B)ᵀ x: with
# B = 0 the one of A is 0 in the first step, the one of B is not, as A is random. Were both 0, neither would ever move.
# Both random: training would begin from a model that was damaged.
#
# `(W + γ B A)` computed in `forward` gives the same numbers and costs N · K · r multiplications and an [N, K]
# tensor in every call, and autograd then makes a gradient of that size as well: memory that LoRA was to save.
#
# A is fp32 beside a bf16 model because Adam's steps are small: 1e-4 added to 0.05 in bf16 is 0.05.

# %% [markdown]
# ## Exercise 12.4: merge and unmerge
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | core: add an adapter into the weight, and take it out to the bit | 2 of 5 | 20 | Hu et al., 2022, 4.1 |
#
# `Merger(weight)` looks after a weight [N, K], fp32, fp16 or bf16, that a model computes with. It is changed **in
# place**: the model keeps the tensor that it has.
#
# - `merge(a, b, scale)`: the weight becomes W + γ B A. a [r, K], b [N, r], in any floating dtype, which may differ
#   from the weight's. The sum is made in fp32 (or more) and rounded **once**, to the weight's dtype.
# - `unmerge()`: the weight is what it was before, **bit for bit**, whatever has happened to the caller's a and b
#   since.
# - One adapter at a time: `merge` on a merged weight is a RuntimeError, as is `unmerge` on one that is not merged.
#   After `unmerge` another one may be merged. One that changes nothing (scale 0) is an adapter, too.
# - If a number of the merged weight would be infinite or NaN, `merge` raises ValueError.
# - After an error all is as if the call had not been made.
# - The weight may be an `nn.Parameter` that wants gradients, and a part of a larger tensor (the rows of q in a merged
#   q, k and v); the rest of that stays as it is.


# %%
class Merger:
    """Merges adapters into a weight [N, K], in place, and takes them out again."""

    def __init__(self, weight: torch.Tensor) -> None:
        ### BEGIN SOLUTION
        self.weight, self.before = weight.detach(), None
        ### END SOLUTION

    def merge(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        """W + scale · b a, in place.  a [r, K], b [N, r]"""
        ### BEGIN SOLUTION
        if self.before is not None:
            raise RuntimeError("expected a weight without an adapter; unmerge the one that it has")
        change = scale * (b.detach().float() @ a.detach().float())
        merged = (self.weight.float() + change).to(self.weight.dtype)
        if not bool(merged.isfinite().all()):
            raise ValueError("expected finite numbers; the merged weight would have others")
        self.before = self.weight.clone()
        self.weight.copy_(merged)
        ### END SOLUTION

    def unmerge(self) -> None:
        """The weight as it was, in place."""
        ### BEGIN SOLUTION
        if self.before is None:
            raise RuntimeError("expected a weight with an adapter in it")
        self.weight.copy_(self.before)
        self.before = None
        ### END SOLUTION


# %%
check("12.4", Merger)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# (W + γ B A) - γ B A is not W when sums are rounded, least of all in bf16. What must be kept?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Compute the merged weight first, look whether it is finite *in the weight's dtype* (fp16 ends at 65,504), and only
# then keep a copy and write. `detach()` shares memory with the parameter and may be written to.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** In bf16 a weight of 0.5 has steps of 1/256. A change of 1/1000 is gone once it is added, and subtracting it
# again may move the weight by a step. PEFT unmerges by subtraction, as does the package (`unmerge` says so), which is
# right to rounding; after ten merges the model is another one. Keeping the weight costs as much memory as the weight
# of one layer, or of the whole model if all are merged at once.
#
# Merged weights cost nothing when the model runs, and serve one adapter at a time: for many at once W must stay as it
# is, and x A and (x A) B are computed beside it.

# %% [markdown]
# ## Exercise 12.5: many adapters in one batch (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: the gathered product, without a loop | 3 of 5 | 20 | Chen et al., 2023 (Punica) |
#
# A batch of T tokens, each with an adapter of its own or none. Slots hold the adapters: a [S, r, K], b [S, N, r],
# the scale already multiplied into b. `adapters` [T] (int32 or int64) says which: **0 for none, i for slot i - 1**.
#
# Return y [T, N] plus what each token's adapter makes of its row of x [T, K]:
#
# - A new tensor in y's dtype. x, a and b may have other dtypes (fp32, fp16, bf16); compute in fp32 and round once.
# - Tokens without an adapter keep their row of y, whatever x has there. **Slots that no token uses may hold anything**,
#   NaN too; NaN in an adapter that is used is seen, in the rows of its tokens.
# - **No loop** over tokens or slots: the number of torch operations is the same for all T and S. And the work is that
#   of T tokens with one adapter each: T · r (N + K) multiplications, whatever S is. No tensor is larger than all
#   adapters together, or than one for each token.
# - T may be 0.


# %%
def gathered(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, adapters: torch.Tensor
) -> torch.Tensor:
    """y [T, N], x [T, K], a [S, r, K], b [S, N, r], adapters [T] of 0 to S -> [T, N]"""
    ### BEGIN SOLUTION
    slots = (adapters.long() - 1).clamp(min=0)  # [T]
    low = a[slots].float() @ x.float()[:, :, None]  # [T, r, 1]
    change = (b[slots].float() @ low)[:, :, 0]  # [T, N]
    return torch.where(adapters[:, None] > 0, y.float() + change, y.float()).to(y.dtype)
    ### END SOLUTION


# %%
check("12.5", gathered)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `a[slots]` with slots [T] is [T, r, K]: each token's own matrix, beside its row of x. A product of stacks, [T, r, K]
# by [T, K, 1], does the rest.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# 0 - 1 = -1 is the *last* slot to Python, which may hold NaN: gather from any slot, and choose by `torch.where`
# afterwards. Multiplying by 0 does not help against NaN.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** This is BGMV, "batched gather matrix-vector": a kernel reads `a[slots]` where it lies, ours makes a copy
# first. It suits decode, where every token is of another request. In prefill, hundreds of tokens have one adapter, and
# each reads all of A and B for itself: r (N + K) numbers a token instead of an adapter. Sorted by adapter (the next
# exercise) they are one product.
#
# Computing all slots for all tokens and picking one gives the same numbers, too, at S times the work: with 64 adapters
# of rank 16 on 4,096 x 4,096 that is half of the base layer's own work.

# %% [markdown]
# ## Exercise 12.6: sort by adapter (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: the plan of blocks that a kernel's programs follow | 4 of 5 | 35 | Chen et al., 2023 (Punica: SGMV) |
#
# Tokens are sorted by adapter, and cut into **blocks** of at most `size` tokens of **one** adapter: a program
# multiplies the rows of a block by one A. `adapters` [T] is int32 or int64, 0 for none and i for slot i - 1, of `slots`
# in all.
#
# Return `(order, blocks)`, both int32:
#
# - `order` [T]: the tokens' indices, those without an adapter first, then those of adapter 1, of 2, ...; tokens of
#   one adapter in the order they have in the batch.
# - `blocks` [T // size + slots, 3]: a row a block, (adapter, first, end), whose tokens are order[first] to
#   order[end - 1]. Adapters ascend, and within one the places do. All blocks of an adapter but its last have `size`
#   tokens. Tokens without an adapter are in no block. **Rows that are left over come last and are (0, 0, 0).**
# - **Nothing waits for a value**: shapes depend on T, slots and size alone, and no number of a tensor is turned into a
#   Python number (no `item`, `tolist`, `if tensor`, no mask as an index). On a GPU the host would stand still, and
#   a CUDA graph could not be replayed for the next batch.
# - T may be 0; slots and size are 1 or more.


# %%
def plan(adapters: torch.Tensor, slots: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """adapters [T] -> order [T] and blocks [T // size + slots, 3] of (adapter, first, end), int32"""
    ### BEGIN SOLUTION
    order = adapters.argsort(stable=True)
    counts = (adapters[:, None] == torch.arange(1, slots + 1, device=adapters.device)).sum(0)  # [slots]
    ends = len(adapters) - counts.sum() + counts.cumsum(0)  # where in `order` each adapter's tokens end
    of_each = (counts + size - 1) // size  # blocks
    last = of_each.cumsum(0)  # one past each adapter's last block
    block = torch.arange(len(adapters) // size + slots, device=adapters.device)  # [M]
    slot = torch.searchsorted(last, block, right=True)  # `slots` for rows that are left over
    there, slot = slot < slots, slot.clamp(max=slots - 1)
    first = (ends - counts)[slot] + (block - (last - of_each)[slot]) * size
    rows = torch.stack((slot + 1, first, torch.minimum(first + size, ends[slot])), 1)
    return order.int(), (rows * there[:, None]).int()
    ### END SOLUTION


# %%
check("12.6", plan)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Count the tokens of each adapter by comparing with `torch.arange(1, slots + 1)`. Running sums say where in `order` an
# adapter begins, and which of all blocks is its first.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Turn it around: for each number of a block, whose is it? `torch.searchsorted(last, block, right=True)` finds the first
# adapter whose running sum of blocks is larger. Rows beyond the last block are multiplied by 0.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Each adapter with tokens may waste at most one block that is not full, so T // size + slots rows are always
# enough: a grid of that size serves every batch, and what is left over ends at once. The package does without the
# table: a program searches `starts` for its adapter, as in paged attention, which is a handful of loads from the
# cache, and one tensor less to make in every step.
#
# Stable sorting matters twice: equal batches give equal sums in equal order, and tokens of a prompt stay together.

# %% [markdown]
# ## Exercise 12.7: four bugs in a reader (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: mend what reads an adapter | 3 of 5 | 25 | three were in known engines: see the chapter's pitfalls |
#
# `config` is what `adapter_config.json` holds, `tensors` what `adapter_model.safetensors` does. The function below
# should keep to this:
#
# - Return {module: (A, B, scale)}, tensors as they are, not copied. Their keys are
#   `base_model.model.<module>.lora_A.weight` [r, K] and `base_model.model.<module>.lora_B.weight` [N, r].
# - Each module has the rank and scale of exercise 12.2: its own by `rank_pattern` and `alpha_pattern` (the first key
#   for which `re.fullmatch(rf"(.*\.)?({key})", module)` holds), over r or, with `use_rslora`, √r. Of the keys that may
#   be missing `r` and `lora_alpha` are 8, the rest null; a value may be null.
# - If A or B does not have that rank: ValueError.
# - **Every tensor is used.** An A without its B, a B without its A, a key of any other form: ValueError.
# - What is not supported is refused: `use_dora` true, `bias` other than "none" or null, `modules_to_save` that is not
#   empty, a `peft_type` other than "LORA" (it must be there): ValueError.
#
# Mistakes of four kinds were planted; with each, adapters are read, and the model answers. Besides, nulls and ranks are
# not looked at. Write the mended function.


# %%
def broken(config: Mapping, tensors: Mapping[str, torch.Tensor]) -> dict:
    """{module: (A, B, scale)}, with mistakes of four kinds."""
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("bias") not in (None, "none"):
        raise ValueError("expected a plain LoRA")
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


# %% [markdown]
# The function that keeps to it:


# %%
def read_adapter(
    config: Mapping, tensors: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """{module: (A [r, K], B [N, r], scale)}"""
    ### BEGIN SOLUTION
    plain = config.get("bias") in (None, "none") and not config.get("use_dora") and not config.get("modules_to_save")
    if config.get("peft_type") != "LORA" or not plain:
        raise ValueError("config: expected a plain LoRA, without DoRA, biases and modules_to_save")

    def value(default: str, patterns: str, module: str) -> float:
        found = config.get(patterns) or {}
        keys = [key for key in found if re.fullmatch(rf"(.*\.)?({key})", module)]
        return found[keys[0]] if keys else 8 if config.get(default) is None else config[default]

    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        form = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if form is None:
            raise ValueError(f"{key}: expected lora_A and lora_B of modules; this one would be left out")
        halves.setdefault(form[1], {})[form[2]] = tensor
    pairs = {}
    for module, half in halves.items():
        r, alpha = value("r", "rank_pattern", module), value("lora_alpha", "alpha_pattern", module)
        if half.keys() != {"A", "B"}:
            raise ValueError(f"{module}: expected lora_A and lora_B, got one of them")
        if half["A"].shape[0] != r or half["B"].shape[1] != r:
            raise ValueError(f"{module}: expected rank {r} by the config")
        pairs[module] = half["A"], half["B"], alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return pairs
    ### END SOLUTION


# %%
check("12.7", read_adapter)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Go through the list above, sentence by sentence, and look for the line that keeps it. Which config gives a scale that
# is right? What happens to `base_model.model.lm_head.weight`?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Scales: alpha is not divided by r, and patterns are not looked at. Silence: tensors that no line takes, and
# `modules_to_save`. Sort the tensors by module and half first; what does not fit the form is refused there.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** (1) alpha instead of alpha / r (mlx-vlm #845): the change is 8 times too large for r = 8. (2) `rank_pattern`
# and `alpha_pattern` dropped in silence: wrong where they apply, and right in every test without them. (3) A half whose
# other is missing is skipped, and so is every key of another form: half of the adapter may be gone, which shows in the
# quality of answers only. PEFT itself loads with `strict=False`. (4) `modules_to_save` has whole matrices, a trained
# head for instance, that were left out (vllm #9280 asked for it).
#
# All of these are cured by one rule: whatever is in the file is used or refused by its name.

# %% [markdown]
# ## Exercise 12.8: names of blocks (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: a prefix cache that never mixes adapters | 2 of 5 | 20 | Kwon et al., 2023, 4.4 |
#
# A prefix cache finds a block of keys and values by its name (chapter 7). An adapter on k or v changes them, so it must
# be part of the name. `block_names(token_ids, size, adapter)` names the full blocks of a sequence, in order, `bytes`
# each. `adapter` is None or {module: (A, B, scale)}.
#
# - Two names for one `size` are equal **exactly if** the blocks hold the same tokens, after the same tokens, with the
#   same adapter. Tokens behind the last full block have no name, and change none.
# - Two adapters are the same if they have the same modules, and each of these the same scale and A and B of the same
#   shapes, dtypes and numbers. **Neither what they are called nor where they lie counts**: objects that were loaded
#   twice are the same adapter, one that has been overwritten in place is another one. Nor does the order of modules.
# - No adapter (None) differs from every adapter, one that changes nothing and one without modules ({}) included.
# - Names are the same in every process, and long enough that no two meet by chance (16 bytes or more).
# - A and B may be fp32, fp16 or bf16, and `nn.Parameter`s.


# %%
def block_names(
    token_ids: list[int], size: int, adapter: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]] | None = None
) -> list[bytes]:
    """A name for each of the len(token_ids) // size full blocks"""
    ### BEGIN SOLUTION
    name = b""
    if adapter is not None:
        digest = hashlib.sha256()
        for module, (a, b, scale) in sorted(adapter.items(), key=lambda item: item[0]):
            digest.update(repr((module, float(scale), a.dtype, a.shape, b.dtype, b.shape)).encode())
            for x in (a, b):
                digest.update(x.detach().contiguous().view(torch.uint8).numpy().tobytes())
        name = digest.digest()
    names = []
    for end in range(size, len(token_ids) + 1, size):
        name = hashlib.sha256(name + repr(list(token_ids[end - size : end])).encode()).digest()
        names.append(name)
    return names
    ### END SOLUTION


# %%
check("12.8", block_names)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Names are a chain: a block's name is a hash of the name before it and its own tokens. Only the chain's beginning need
# know the adapter.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Hash everything that decides what is computed: modules in sorted order, scale, dtypes, shapes, and the tensors' bytes:
# `x.detach().contiguous().view(torch.uint8).numpy().tobytes()`. Python's `hash` differs from process to process, and
# `repr` of a large tensor leaves numbers out.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** vLLM named blocks by the adapter's *name* (#30931, #42125): whoever trained again, and loaded the new adapter
# under the old name, was served keys and values of the old one. An id that counts up is no better across processes or a
# restart, when blocks lie in a store that outlives them (#44250). The content decides, so the content is the name: 16
# bytes of a hash over some megabytes, once when an adapter is loaded.
#
# An adapter that leaves k and v alone, in all layers? Its keys and values still differ: from the second layer on they
# are made of a stream that the first layer's adapter has changed.
