"""GPTQ and AWQ: the numbers that others packed arrive, and what is damaged is refused by name.

The packers here follow the description of the formats; they share nothing with the readers.
"""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minillm.quant import Scheme
from minillm.quant.importers import awq, gptq, parse, wanted

GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, "checkpoint_format": "gptq",
}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}


def words(u: np.ndarray, bits: int) -> np.ndarray:
    """Numbers side by side into uint32, the first lowest.  [R, C] -> [R, C · bits / 32]"""
    cells = u.astype(np.uint32).reshape(len(u), -1, 32 // bits)
    return (cells << np.arange(0, 32, bits, dtype=np.uint32)).sum(-1, dtype=np.uint32)


def tensor(a: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(a).view(np.int32))


class Layer:
    """Random integers u [N, K], zero points z [N, G], scales s [N, G], groups g [K], and the weight they mean."""

    def __init__(self, seed=0, n=16, k=64, bits=4, size=32, symmetric=False, act_order=False):
        rng = np.random.default_rng(seed)
        self.n, self.k, self.bits, groups = n, k, bits, k // (size or k)
        self.scheme = Scheme(bits, "int", symmetric, "group" if size else "channel", size)
        self.u = rng.integers(0, 2**bits, (n, k))
        self.z = np.full((n, groups), 2 ** (bits - 1)) if symmetric else rng.integers(0, 2**bits, (n, groups))
        self.s = rng.uniform(0.001, 0.1, (n, groups)).astype(np.float16)
        self.g = np.arange(k) // (k // groups)
        if act_order:
            self.g = rng.permutation(self.g)
        w = (self.u - self.z[:, self.g]).astype(np.float32) * self.s[:, self.g].astype(np.float32)
        self.weight = torch.from_numpy(w)

    def gptq(self, zeros="v1"):
        z, top = self.z.T, 2**self.bits
        qzeros = {
            "v1": lambda: words((z - 1) % top, self.bits),
            "v1 by words": lambda: words(z, self.bits) - words(np.ones_like(z), self.bits),
            "v2": lambda: words(z, self.bits),
        }[zeros]()
        return {
            "qweight": tensor(words(self.u, self.bits).T), "qzeros": tensor(qzeros),
            "scales": torch.from_numpy(self.s.T.copy()), "g_idx": torch.from_numpy(self.g.astype(np.int32)),
        }  # fmt: skip

    def awq(self):
        def packed(a):  # [R, C]
            return tensor(words(a.reshape(len(a), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(a.shape), 4))

        return {"qweight": packed(self.u.T), "qzeros": packed(self.z.T), "scales": torch.from_numpy(self.s.T.copy())}

    def read_gptq(self, zeros="v1", stored=None):
        return gptq(self.gptq(stored or zeros), self.k, self.n, self.scheme, zeros)

    def read_awq(self):
        return awq(self.awq(), self.k, self.n, self.scheme)


class TestGPTQ:
    @given(
        st.integers(0, 99), st.sampled_from([2, 4, 8]), st.sampled_from([16, 32, None]), st.booleans(), st.booleans(),
        st.sampled_from(["v1", "v1 by words", "v2"]),
    )  # fmt: skip
    @settings(max_examples=60)
    def test_the_weight_arrives(self, seed, bits, size, symmetric, act_order, zeros):
        layer = Layer(seed, bits=bits, size=size, symmetric=symmetric, act_order=act_order)
        found, order = layer.read_gptq(zeros)
        assert found.q.dtype == torch.int8
        assert (found.grid.zero is None) == symmetric
        w = found.dequantize()
        assert torch.equal(w if order is None else w[:, order.argsort()], layer.weight)

    def test_symmetric_words_are_those_of_the_format(self):
        """0x77777777 is what every symmetric v1 checkpoint holds."""
        assert (Layer(symmetric=True).gptq()["qzeros"] == 0x77777777).all()

    @pytest.mark.parametrize("zeros", ["v1", "v1 by words"])
    def test_a_zero_point_of_zero(self, zeros):
        layer = Layer()
        layer.z[:8, 0] = [0, 5, 0, 0, 9, 15, 1, 0]
        assert layer.read_gptq(zeros)[0].grid.zero[:8, 0].tolist() == [-8, -3, -8, -8, 1, 7, -7, -8]

    def test_the_two_ways_of_v1_differ_by_zeros_alone(self):
        layer = Layer()
        layer.z = layer.z.clip(1)
        assert torch.equal(layer.gptq("v1")["qzeros"], layer.gptq("v1 by words")["qzeros"])
        layer.z[0, 0] = 0
        assert not torch.equal(layer.gptq("v1")["qzeros"], layer.gptq("v1 by words")["qzeros"])

    def test_act_order_permutes_the_input(self):
        layer = Layer(k=128, act_order=True)
        found, order = layer.read_gptq()
        x = torch.randn(3, 128)
        torch.testing.assert_close(x[..., order] @ found.dequantize().T, x @ layer.weight.T)

    def test_groups_in_order_need_no_permutation(self):
        assert Layer().read_gptq()[1] is None

    @pytest.mark.parametrize(("says", "is_"), [("v1", "v2"), ("v2", "v1"), ("v1 by words", "v2")])
    def test_symmetric_files_with_the_wrong_format_are_read(self, says, is_):
        layer = Layer(symmetric=True)
        assert torch.equal(layer.read_gptq(says, is_)[0].dequantize(), layer.weight)

    def test_other_zero_points_are_not_symmetric(self):
        layer = Layer(symmetric=True)
        layer.z[3, 1] = 7
        with pytest.raises(ValueError, match="^qzeros: expected zero points of 8 alone.* got 7 to 8"):
            layer.read_gptq()


class TestAWQ:
    @given(st.integers(0, 99), st.sampled_from([16, 32, None]), st.booleans())
    def test_the_weight_arrives(self, seed, size, symmetric):
        layer = Layer(seed, size=size, symmetric=symmetric)
        assert torch.equal(layer.read_awq().dequantize(), layer.weight)

    def test_as_compressed_tensors_reads_it(self):
        pytest.importorskip("compressed_tensors", exc_type=ImportError)
        from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

        layer = Layer()
        stored, found = layer.awq(), layer.read_awq()
        q, scale, zero = AutoAWQConverter()._convert_gemm_module(stored["qweight"], stored["scales"], stored["qzeros"])
        assert torch.equal(found.q, q)
        assert torch.equal(found.grid.scale, scale.float())
        assert torch.equal(found.grid.zero, zero.float())

    def test_other_zero_points_are_not_symmetric(self):
        layer = Layer(symmetric=True)
        layer.z[:] = 7  # which GPTQ's v1 would be read from
        with pytest.raises(ValueError, match="^qzeros: .* got 7 to 7"):
            layer.read_awq()


class TestWanted:
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_gptq(self, bits):
        layer = Layer(n=32, bits=bits)
        assert wanted("gptq", 64, 32, layer.scheme) == {name: t.shape for name, t in layer.gptq().items()}

    def test_awq(self):
        assert wanted("awq", 64, 16, Layer().scheme) == {name: t.shape for name, t in Layer().awq().items()}

    @pytest.mark.parametrize(
        ("error", "arguments"),
        [
            ("group_size: expected a divisor of the row length 576, got 128", ("gptq", 576, 8, Scheme(group_size=128))),
            ("in_features: expected a multiple of 8", ("gptq", 60, 8, Scheme(group_size=4))),
            ("rows: expected a multiple of 8", ("awq", 60, 12, Scheme(group_size=4))),
            ("method", ("awq", 64, 8, Scheme(8, group_size=32))),
            ("method", ("exl2", 64, 8, Scheme(group_size=32))),
            ("method", ("gptq", 64, 8, Scheme(3, group_size=32))),
            ("strategy", ("gptq", 64, 8, Scheme(strategy="tensor"))),
        ],
    )
    def test_what_the_format_cannot_hold(self, error, arguments):
        with pytest.raises(ValueError, match=f"^{error}"):
            wanted(*arguments)


def without(name):
    return lambda t: {key: value for key, value in t.items() if key != name}


def changed(name, change):
    return lambda t: t | {name: change(t[name])}


def put(index, value):
    def change(t):
        t = t.clone()
        t.view(-1)[index] = value
        return t

    return change


SHAPES = [
    lambda t: t[:-1], lambda t: t[1:], lambda t: t[:0], lambda t: t[None], lambda t: t.flatten()[0],
    lambda t: torch.cat((t, t)), lambda t: t.flatten() if t.ndim > 1 else t[:, None],
    lambda t: t[..., :-1], lambda t: t.T.contiguous() if t.ndim > 1 else t[::2],
]  # fmt: skip
DTYPES = [torch.int64, torch.uint8, torch.int16, torch.bool, torch.float64, torch.float8_e4m3fn]
BROKEN = st.one_of(
    st.tuples(st.sampled_from(["qweight", "qzeros", "scales", "g_idx"]), st.sampled_from([*SHAPES, *DTYPES, None])),
    st.tuples(
        st.just("scales"),
        st.builds(put, st.integers(0, 31), st.sampled_from([float("nan"), float("inf"), float("-inf")])),
    ),
    st.tuples(st.just("g_idx"), st.builds(put, st.integers(0, 31), st.integers(-(2**31), 2**31 - 1).filter(bool))),
)


class TestDamage:
    @given(BROKEN, st.sampled_from(["gptq", "awq"]), st.sampled_from(["", "q_proj."]))
    @settings(max_examples=100)
    def test_is_refused_by_the_tensors_name(self, broken, method, prefix):
        name, how = broken
        layer = Layer(n=32)
        stored = getattr(layer, method)()
        if name not in stored:
            return
        change = without(name) if how is None else changed(name, how if callable(how) else lambda t: t.to(how))
        stored = {prefix + key: value for key, value in change(stored).items()}
        read = {"gptq": gptq, "awq": awq}[method]
        with pytest.raises(ValueError, match=f"^{prefix}{name}: "):
            read(stored, layer.k, layer.n, layer.scheme, prefix=prefix)

    def test_groups_of_another_size(self):
        layer = Layer()
        layer.g[0] = 1
        with pytest.raises(ValueError, match="^g_idx: expected 32 columns in each group, got 31 in group 0"):
            layer.read_gptq()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["gemm", "gptq"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    *GPTQ, *AWQ, "w_bit", "q_group_size", "format", "pack_dtype", "is_marlin_format", "dynamic", "lm_head", "meta",
    "modules_in_block_to_quantize", "modules_to_not_convert",
]  # fmt: skip


def attempt(parse, config):
    """What comes of it, and the message of a ValueError."""
    try:
        return parse(config), ""
    except ValueError as e:
        return None, str(e)


class TestConfig:
    def test_gptq(self):
        recipe = parse(GPTQ)
        assert (recipe.method, recipe.zeros) == ("gptq", "v1")
        assert recipe.scheme == Scheme(4, "int", False, "group", 32)
        assert parse(GPTQ | {"group_size": -1, "sym": True, "bits": 8}).scheme == Scheme(8, strategy="channel")
        assert parse(GPTQ | {"checkpoint_format": "gptq_v2"}).zeros == "v2"
        assert parse(GPTQ | {"meta": {"quantizer": ["optimum:1.2", "gptqmodel:5.6"]}}).zeros == "v1 by words"

    def test_awq(self):
        assert parse(AWQ).scheme == Scheme(4, "int", False, "group", 32)
        old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "gemm"}
        assert parse(old) == parse(AWQ)

    @pytest.mark.parametrize(
        ("field", "value", "base"),
        [
            ("quant_method", "exl2", GPTQ), ("bits", 3, GPTQ), ("bits", 8, AWQ), ("bits", 4.0, GPTQ),
            ("bits", True, AWQ), ("bits", None, AWQ), ("group_size", 0, GPTQ), ("group_size", "128", AWQ),
            ("group_size", True, GPTQ),
            ("sym", "yes", GPTQ), ("checkpoint_format", "marlin", GPTQ), ("is_marlin_format", True, GPTQ),
            ("pack_dtype", "int8", GPTQ),
            ("dynamic", {"-:lm_head": {}}, GPTQ), ("version", "gemv", AWQ), ("zero_point", 1, AWQ),
            ("modules_to_not_convert", "lm_head", AWQ), ("modules_in_block_to_quantize", [[3]], GPTQ),
        ],
    )  # fmt: skip
    def test_what_is_not_supported_is_named(self, field, value, base):
        with pytest.raises(ValueError, match=f"^{field}: "):
            parse(base | {field: value})

    @given(st.sampled_from([GPTQ, AWQ]), st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
    @example(GPTQ, {"modules_in_block_to_quantize": 5})
    @settings(max_examples=150)
    def test_whatever_it_holds(self, base, changes):
        recipe, error = attempt(parse, base | changes)
        if recipe is None:
            assert error.partition(":")[0] in FIELDS
            return
        asked = {**base, **{key: value for key, value in changes.items() if value is not None}}
        assert recipe.scheme.bits == asked["bits"]
        assert (recipe.scheme.group_size or -1) == asked["group_size"]
        assert recipe.converts("layers.0.mlp.down_proj", ["down_proj"]) in (True, False)

    def test_which_layers(self):
        attention = ("layers.3.self_attn.qkv_proj", ["q_proj", "k_proj", "v_proj"])
        head = ("lm_head", ["lm_head"])
        assert parse(GPTQ).converts(*attention)
        assert not parse(GPTQ).converts(*head)
        assert parse(GPTQ | {"lm_head": True}).converts(*head)
        assert not parse(AWQ | {"modules_to_not_convert": ["self_attn"]}).converts(*attention)
        assert not parse(AWQ | {"modules_to_not_convert": ["model.layers.3."]}).converts(*attention)
        some = parse(GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["self_attn.k_proj"]]})
        assert not some.converts("layers.3.mlp.down_proj", ["down_proj"])
        with pytest.raises(ValueError, match=r"all parts of layers.3.self_attn.qkv_proj.*v_proj is not"):
            some.converts(*attention)
