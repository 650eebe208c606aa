"""The contracts of chapter 2's exercises: attention, norm, rotary positions, grouped queries, the layer, accounting."""

import math
from types import SimpleNamespace

import torch

from minillm.learn.testing import exercise, expect, expect_close, expect_equal


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax_average(q: list[float], keys: list[list[float]], values: list[list[float]], scale: float) -> list[float]:
    """Attention of one query, in plain Python."""
    scores = [sum(a * b for a, b in zip(q, key, strict=True)) * scale for key in keys]
    weights = [math.exp(s - max(scores)) for s in scores]
    return [
        sum(w * value[i] for w, value in zip(weights, values, strict=True)) / sum(weights)
        for i in range(len(values[0]))
    ]


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same for q [T, D], k [S, D], v [S, D_v], mask [T, S]."""
    rows = []
    for t in range(q.shape[0]):
        seen = [s for s in range(k.shape[0]) if mask[t, s]]
        rows.append(
            softmax_average(
                q[t].tolist(), [k[s].tolist() for s in seen], [v[s].tolist() for s in seen], q.shape[1] ** -0.5
            )
        )
    return torch.tensor(rows)


@exercise("2.1", "attention")
class TestAttention:
    def test_by_hand(self, impl):
        """two keys with scores 0 and ln 3 (D = 4, so dot products 0 and 2 ln 3) get the weights 1/4 and 3/4"""
        q = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
        k = torch.tensor([[0.0, 1.0, 0.0, 0.0], [math.log(3), 0.0, 0.0, 0.0]])
        v = torch.tensor([[4.0, 0.0], [0.0, 8.0]])
        expect_close("output", impl(q, k, v), [[1.0, 6.0]])

    def test_random(self, impl):
        """it equals a loop over queries and keys, also where T, S, D and D_v all differ"""
        q, k, v = random(3, 8), random(5, 8, seed=1), random(5, 6, seed=2)
        expect_close("output", impl(q, k, v), plain_attention(q, k, v, torch.ones(3, 5, dtype=torch.bool)))

    def test_mask(self, impl):
        """a False in the mask takes the key out: the rest shares the whole weight"""
        q, k, v = random(4, 8), random(4, 8, seed=1), random(4, 8, seed=2)
        mask = torch.ones(4, 4, dtype=torch.bool).tril()
        expect_close("output under a causal mask", impl(q, k, v, mask), plain_attention(q, k, v, mask))

    def test_masked_is_gone(self, impl):
        """what stands at a masked position changes nothing, however large"""
        q, k, v = random(1, 8), random(3, 8, seed=1), random(3, 8, seed=2)
        mask = torch.tensor([[True, False, True]])
        before = impl(q, k, v, mask)
        k[1], v[1] = 1e4, 1e4
        expect_close("output after the masked key and value changed", impl(q, k, v, mask), before)

    def test_leading_dimensions(self, impl):
        """[B, H, T, D] works, each head by itself, and a [T, S] mask serves all of them"""
        q, k, v = random(2, 3, 4, 8), random(2, 3, 4, 8, seed=1), random(2, 3, 4, 8, seed=2)
        mask = torch.ones(4, 4, dtype=torch.bool).tril()
        got = impl(q, k, v, mask)
        expect_equal("output shape", tuple(got.shape), (2, 3, 4, 8))
        expect_close("batch 1, head 2", got[1, 2], plain_attention(q[1, 2], k[1, 2], v[1, 2], mask))

    def test_large_scores(self, impl):
        """scores in the hundreds give no inf or NaN"""
        q, k, v = torch.full((1, 4), 20.0), torch.tensor([[20.0] * 4, [19.0] * 4]), torch.tensor([[1.0], [0.0]])
        expect_close("output", impl(q, k, v), [[1.0]])

    def test_inputs_untouched(self, impl):
        """q, k, v and mask are as before the call"""
        q, k, v, mask = (
            random(3, 4),
            random(3, 4, seed=1),
            random(3, 4, seed=2),
            torch.ones(3, 3, dtype=torch.bool).tril(),
        )
        copies = [x.clone() for x in (q, k, v, mask)]
        impl(q, k, v, mask)
        for name, x, copy in zip(("q", "k", "v", "mask"), (q, k, v, mask), copies, strict=True):
            expect_close(f"{name} after the call", x, copy, atol=0, rtol=0)


@exercise("2.2", "rms_norm")
class TestRMSNorm:
    def test_by_hand(self, impl):
        """[1, 7] has root mean square 5: the result is [0.2, 1.4], times the weight"""
        expect_close("output", impl(torch.tensor([1.0, 7.0]), torch.tensor([1.0, 10.0]), 0.0), [0.2, 14.0])

    def test_random(self, impl):
        """each vector of the last dimension is normalized by itself"""
        x, weight = 3 * random(2, 3, 8) + 1, random(8, seed=1)
        rows = [
            [w * a / math.sqrt(sum(b * b for b in row) / 8 + 1e-5) for a, w in zip(row, weight.tolist(), strict=True)]
            for row in x.reshape(6, 8).tolist()
        ]
        expect_close("output", impl(x, weight, 1e-5), torch.tensor(rows).reshape(2, 3, 8))

    def test_mean_stays(self, impl):
        """a constant vector stays constant: no mean is subtracted"""
        expect_close("output", impl(torch.full((4,), 5.0), torch.ones(4), 0.0), torch.ones(4))

    def test_eps(self, impl):
        """eps is added to the mean of squares, under the root"""
        expect_close(
            "output for x = 0.3 and eps = 0.16", impl(torch.full((4,), 0.3), torch.ones(4), 0.16), torch.full((4,), 0.6)
        )
        expect_close("output for x = 0", impl(torch.zeros(4), torch.ones(4), 1e-5), torch.zeros(4))

    def test_half_precision(self, impl):
        """fp16 in, fp16 out, and squares beyond fp16's range (65,504) do not overflow"""
        got = impl(
            torch.tensor([300.0, -300.0, 300.0, -300.0], dtype=torch.float16), torch.ones(4, dtype=torch.float16), 1e-5
        )
        expect_equal("output dtype", got.dtype, torch.float16)
        expect_close("output", got, [1.0, -1.0, 1.0, -1.0], atol=1e-3)

    def test_inputs_untouched(self, impl):
        """x is as before the call"""
        x = random(2, 4)
        copy = x.clone()
        impl(x, torch.full((4,), 2.0), 1e-5)
        expect_close("x after the call", x, copy, atol=0, rtol=0)


def turned(x: torch.Tensor, positions: list[int], theta: float) -> torch.Tensor:
    """RoPE through complex numbers: pair i of a head is one number, multiplied by e^(i·angle).  x [B, T, H, D]"""
    half = x.shape[-1] // 2
    numbers = torch.complex(x[..., :half].double(), x[..., half:].double())  # [B, T, H, D/2]
    angles = torch.tensor(
        [[p * theta ** (-2 * i / x.shape[-1]) for i in range(half)] for p in positions], dtype=torch.float64
    )
    numbers = numbers * torch.polar(torch.ones_like(angles), angles)[None, :, None, :]
    return torch.cat((numbers.real, numbers.imag), dim=-1)


@exercise("2.3", "rope")
class TestRope:
    def test_quarter_turn(self, impl):
        """with D = 2 there is one pair of frequency 1: position p turns (1, 0) to (cos p, sin p)"""
        x = torch.tensor([1.0, 0.0]).expand(1, 4, 1, 2).clone()
        expected = [[[[math.cos(p), math.sin(p)]] for p in range(4)]]
        expect_close("output", impl(x, torch.arange(4), 10_000.0), expected)

    def test_position_zero(self, impl):
        """position 0 turns nothing, and the shape stays"""
        x = random(2, 1, 3, 8)
        expect_close("output", impl(x, torch.zeros(1, dtype=torch.long), 10_000.0), x)

    def test_distance_only(self, impl):
        """q·k is the same for positions (5, 2), (105, 102) and (1005, 1002)"""
        q, k = random(1, 1, 1, 16), random(1, 1, 1, 16, seed=1)

        def score(m: int, n: int) -> torch.Tensor:
            return (impl(q, torch.tensor([m]), 10_000.0) * impl(k, torch.tensor([n]), 10_000.0)).sum()

        for m, n in ((105, 102), (1005, 1002)):
            expect_close(f"q·k at positions ({m}, {n}), against ({5}, {2})", score(m, n), score(5, 2), atol=2e-3)
        expect(
            abs(float(score(5, 2) - score(9, 2))) > 1e-2,
            "q·k must differ between distance 3 and distance 7; it does not",
        )

    def test_length(self, impl):
        """turning changes no vector's length"""
        x = random(2, 5, 3, 8)
        expect_close("lengths", impl(x, torch.arange(5) * 7, 10_000.0).norm(dim=-1), x.norm(dim=-1), atol=1e-5)

    def test_values(self, impl):
        """it equals multiplication by e^(i·angle) with the two halves as pairs, every token by its own position"""
        x, positions = random(2, 4, 3, 8), [3, 0, 17, 40]
        for theta in (10_000.0, 100.0):
            expect_close(
                f"output for theta {theta:g}",
                impl(x, torch.tensor(positions), theta),
                turned(x, positions, theta),
                atol=1e-5,
            )

    def test_inputs_untouched(self, impl):
        """x is as before the call"""
        x = random(1, 3, 2, 4)
        copy = x.clone()
        impl(x, torch.arange(3), 10_000.0)
        expect_close("x after the call", x, copy, atol=0, rtol=0)


def grouped_case(num_heads: int, num_kv_heads: int, head_dim: int = 4, hidden: int = 12, tokens: int = 5) -> tuple:
    """x and weights of one grouped-query attention, scaled so that weights of attention differ clearly."""
    x = random(2, tokens, hidden, seed=7)
    shapes = [(num_heads, hidden), (num_kv_heads, hidden), (num_kv_heads, hidden)]
    q, k, v = (random(heads * head_dim, inputs, seed=i) / 2 for i, (heads, inputs) in enumerate(shapes))
    return x, q, k, v, random(hidden, num_heads * head_dim, seed=9) / 2


def grouped_reference(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    w_o: torch.Tensor,
    heads: int,
    kv_heads: int,
) -> torch.Tensor:
    """Head by head, in slices of the weights."""
    size = w_q.shape[0] // heads
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for h in range(heads):
            own, shared = (
                slice(h * size, (h + 1) * size),
                slice(h // (heads // kv_heads) * size, (h // (heads // kv_heads) + 1) * size),
            )
            q, k, v = x[b] @ w_q[own].T, x[b] @ w_k[shared].T, x[b] @ w_v[shared].T  # [T, D] each
            mask = torch.ones(len(q), len(q), dtype=torch.bool).tril()
            out[b] += plain_attention(q, k, v, mask) @ w_o[:, own].T
    return out


@exercise("2.4", "grouped_query_attention")
class TestGroupedQueryAttention:
    def test_shape(self, impl):
        """[B, T, hidden] comes back as [B, T, hidden], also where H · D is not hidden"""
        got = impl(*grouped_case(6, 2), 6, 2)
        expect_equal("output shape", tuple(got.shape), (2, 5, 12))

    def test_one_head(self, impl):
        """with one head it is plain causal attention between two projections"""
        case = grouped_case(1, 1)
        expect_close("output", impl(*case, 1, 1), grouped_reference(*case, 1, 1), atol=1e-5)

    def test_multi_head(self, impl):
        """with as many key/value heads as query heads it is multi-head attention"""
        case = grouped_case(3, 3)
        expect_close("output", impl(*case, 3, 3), grouped_reference(*case, 3, 3), atol=1e-5)

    def test_grouped(self, impl):
        """with 6 query and 2 key/value heads, heads 0 to 2 read key/value head 0 and heads 3 to 5 head 1"""
        case = grouped_case(6, 2)
        expect_close("output", impl(*case, 6, 2), grouped_reference(*case, 6, 2), atol=1e-5)

    def test_multi_query(self, impl):
        """with 1 key/value head all query heads share it"""
        case = grouped_case(4, 1)
        expect_close("output", impl(*case, 4, 1), grouped_reference(*case, 4, 1), atol=1e-5)

    def test_causal(self, impl):
        """a change of the last token changes no earlier output"""
        x, *weights = grouped_case(4, 2)
        before = impl(x.clone(), *weights, 4, 2)
        x[:, -1] += 1
        after = impl(x, *weights, 4, 2)
        expect_close("outputs before the last token", after[:, :-1], before[:, :-1])
        expect(
            not torch.allclose(after[:, -1], before[:, -1]), "the last token changed, yet its own output is the same"
        )

    def test_inputs_untouched(self, impl):
        """x and the weights are as before the call"""
        case = grouped_case(2, 1)
        copies = [x.clone() for x in case]
        impl(*case, 2, 1)
        for name, x, copy in zip(("x", "w_q", "w_k", "w_v", "w_o"), case, copies, strict=True):
            expect_close(f"{name} after the call", x, copy, atol=0, rtol=0)


def layer_case(hidden: int = 6, intermediate: int = 10) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    shapes = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    weights = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    weights["input_layernorm"] = 1 + random(hidden, seed=5) / 2
    weights["post_attention_layernorm"] = 1 + random(hidden, seed=6) / 2
    return random(2, 4, hidden, seed=7) * 3, weights


def mean_of_past(h: torch.Tensor) -> torch.Tensor:
    """A stand-in for attention: each token gets the mean of itself and what came before."""
    return h.cumsum(1) / torch.arange(1, h.shape[1] + 1)[None, :, None]


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@exercise("2.5", "decoder_layer")
class TestDecoderLayer:
    def test_identity(self, impl):
        """when attention gives 0 and down_proj is 0, the stream passes unchanged"""
        x, weights = layer_case()
        weights["down_proj"].zero_()
        expect_close("output", impl(x.clone(), weights, torch.zeros_like), x)

    def test_attention_input(self, impl):
        """attention is called once, with the stream normalized by input_layernorm"""
        x, weights = layer_case()
        seen = []

        def attend(h: torch.Tensor) -> torch.Tensor:
            seen.append(h.clone())
            return torch.zeros_like(h)

        impl(x.clone(), weights, attend, 0.1)
        expect_equal("calls of attend", len(seen), 1)
        expect_close("input of attend", seen[0], normalized(x, weights["input_layernorm"], 0.1), atol=1e-5)

    def test_attention_is_added(self, impl):
        """what attention gives is added to the stream"""
        x, weights = layer_case()
        weights["down_proj"].zero_()
        expected = x + mean_of_past(normalized(x, weights["input_layernorm"], 1e-5))
        expect_close("output with down_proj = 0", impl(x.clone(), weights, mean_of_past), expected, atol=1e-5)

    def test_mlp(self, impl):
        """without attention, SwiGLU of the stream normalized by post_attention_layernorm is added"""
        x, weights = layer_case()
        h = normalized(x, weights["post_attention_layernorm"], 1e-5)
        gate, up = h @ weights["gate_proj"].T, h @ weights["up_proj"].T
        expected = x + (gate / (1 + torch.exp(-gate)) * up) @ weights["down_proj"].T
        expect_close("output with attention = 0", impl(x.clone(), weights, torch.zeros_like), expected, atol=1e-4)

    def test_order(self, impl):
        """the MLP reads the stream after attention was added"""
        x, weights = layer_case()
        middle = x + mean_of_past(normalized(x, weights["input_layernorm"], 1e-5))
        h = normalized(middle, weights["post_attention_layernorm"], 1e-5)
        gate, up = h @ weights["gate_proj"].T, h @ weights["up_proj"].T
        expected = middle + (gate * torch.sigmoid(gate) * up) @ weights["down_proj"].T
        expect_close("output", impl(x.clone(), weights, mean_of_past), expected, atol=1e-4)

    def test_inputs_untouched(self, impl):
        """x is as before the call (`x += ...` would change the caller's tensor)"""
        x, weights = layer_case()
        copy = x.clone()
        impl(x, weights, mean_of_past)
        expect_close("x after the call", x, copy, atol=0, rtol=0)


def shape(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int, tied: bool
) -> SimpleNamespace:
    return SimpleNamespace(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
    )


SMOLLM2 = (49_152, 576, 1536, 30, 9, 3, 64, True)
LLAMA_3_8B = (128_256, 4096, 14_336, 32, 32, 8, 128, False)


def product_flops(c: SimpleNamespace, tokens: int) -> int:
    """Every matrix product of a forward, (rows, inner, columns) one by one."""
    products = []
    for _ in range(c.num_hidden_layers):
        products += [
            (tokens, c.hidden_size, c.num_attention_heads * c.head_dim),
            (tokens, c.num_attention_heads * c.head_dim, c.hidden_size),
        ]
        products += [(tokens, c.hidden_size, c.num_key_value_heads * c.head_dim)] * 2
        products += [(tokens, c.hidden_size, c.intermediate_size)] * 2 + [(tokens, c.intermediate_size, c.hidden_size)]
        for seen in range(1, tokens + 1):  # one query against the keys it may see, then its weights against the values
            products += [(1, c.head_dim, seen), (1, seen, c.head_dim)] * c.num_attention_heads
    products.append((tokens, c.hidden_size, c.vocab_size))
    return sum(2 * rows * inner * columns for rows, inner, columns in products)


def module_parameters(c: SimpleNamespace) -> int:
    """Count the elements of real tensors (on torch's meta device: shapes without memory)."""
    with torch.device("meta"):
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        shapes = [
            (q_size, c.hidden_size),
            (kv_size, c.hidden_size),
            (kv_size, c.hidden_size),
            (c.hidden_size, q_size),
            (c.hidden_size,),
            (c.hidden_size,),
        ]
        shapes += [
            (c.intermediate_size, c.hidden_size),
            (c.intermediate_size, c.hidden_size),
            (c.hidden_size, c.intermediate_size),
        ]
        tensors = [torch.empty(s) for _ in range(c.num_hidden_layers) for s in shapes] + [
            torch.empty(c.vocab_size, c.hidden_size),
            torch.empty(c.hidden_size),
        ]
        tensors += [] if c.tie_word_embeddings else [torch.empty(c.vocab_size, c.hidden_size)]
    return sum(t.numel() for t in tensors)


TINY = (11, 6, 10, 2, 3, 1, 4, False)  # 3 heads of 4 are 12 features, twice hidden


@exercise("2.6", "account")
class TestAccount:
    def test_smollm2(self, impl):
        """SmolLM2-135M has 134,515,008 parameters"""
        expect_equal('"parameters"', impl(shape(*SMOLLM2), 1)["parameters"], 134_515_008)

    def test_llama(self, impl):
        """Llama 3 8B has 8,030,261,248 parameters: its head is not tied"""
        expect_equal('"parameters"', impl(shape(*LLAMA_3_8B), 1)["parameters"], 8_030_261_248)

    def test_parameters(self, impl):
        """the count is that of the tensors, tied or not, also where H · D is not hidden"""
        for tied in (True, False):
            c = shape(*TINY[:-1], tied)
            expect_equal(f'"parameters", tied: {tied}', impl(c, 3)["parameters"], module_parameters(c))

    def test_flops(self, impl):
        """FLOPs are those of the matrix products listed one by one, the causal half of attention only"""
        for tokens in (1, 2, 7):
            c = shape(*TINY)
            expect_equal(f'"flops" for {tokens} tokens', impl(c, tokens)["flops"], product_flops(c, tokens))

    def test_flops_tied(self, impl):
        """a tied head costs the same FLOPs as one of its own"""
        tied, untied = shape(*TINY[:-1], True), shape(*TINY)
        expect_equal('"flops" of the tied model', impl(tied, 5)["flops"], product_flops(untied, 5))

    def test_kv_bytes(self, impl):
        """SmolLM2 keeps 23,040 bytes a token in 16 bits, Llama 3 8B 131,072"""
        expect_equal('"kv_bytes" of SmolLM2, 1 token', impl(shape(*SMOLLM2), 1)["kv_bytes"], 23_040)
        expect_equal('"kv_bytes" of Llama 3 8B, 100 tokens', impl(shape(*LLAMA_3_8B), 100)["kv_bytes"], 13_107_200)
