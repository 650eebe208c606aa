"""GGUF: blocks as the package `gguf` decodes them, and whole files as the conversion to fp32 reads them."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from minillm import LLM, SamplingParams, fetch
from minillm.kernels import use
from minillm.model.weights import load
from minillm.quant import QuantizedTensor, QuantLinear
from minillm.quant.gguf import BYTES, blocks, opened, read_gguf

SHAPES = {
    "token_embd": (64, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
    "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32),
    "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
}  # fmt: skip


def write(path: Path, kind: Kind = Kind.Q4_1, change=None, **fields) -> dict[str, np.ndarray]:
    """A random llama with matrices of one type, the embedding in Q8_0; returns what is in it, decoded, with the rows
    of q and k in Hugging Face's order. `change` edits {name: (bytes, type)}.
    """
    rng = np.random.default_rng(0)
    w = gguf.GGUFWriter(path, fields.get("arch", "llama"))
    w.add_context_length(32)
    w.add_embedding_length(32)
    w.add_block_count(fields.get("layers", 1))
    w.add_feed_forward_length(64)
    w.add_head_count(4)
    w.add_head_count_kv(2)
    if isinstance(eps := fields.get("eps", 1e-5), list):
        w.add_array("llama.attention.layer_norm_rms_epsilon", eps)
    else:
        w.add_layer_norm_rms_eps(eps)
    w.add_rope_freq_base(10_000.0)
    w.add_rope_dimension_count(8)
    if "scaling" in fields:
        w.add_rope_scaling_type(fields["scaling"])
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(["<|end|>", "<|start|>", *"abcdefgh", "ab", *map(chr, range(0x100, 0x100 + 53))])
    w.add_token_types([3, 3] + [1] * 62)
    w.add_token_merges(["a b"])
    w.add_eos_token_id(0)
    stored, decoded = {}, {}
    for name, shape in SHAPES.items():
        this = Kind.F32 if len(shape) == 1 else Kind.Q8_0 if name == "token_embd" else kind
        values = rng.normal(size=shape).astype(np.float32)
        data = gguf.quantize(values, this)
        decoded[name] = gguf.dequantize(data, this)
        if name in ("blk.0.attn_q", "blk.0.attn_k"):  # from halves to neighbors, as llama.cpp's converter does
            data = data.reshape(len(data) // 8, 2, 4, -1).swapaxes(1, 2).reshape(data.shape)
        stored[f"{name}.weight"] = (data, this)
    for name, (data, this) in (change(stored) if change else stored).items():
        w.add_tensor(name, np.ascontiguousarray(data), raw_dtype=this)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return decoded


class TestBlocks:
    @pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
    @given(seed=st.integers(0, 99))
    def test_any_bytes_as_gguf_decodes_them(self, kind, seed):
        """Random bytes, scales of all sizes among them: negative, tiny, zero."""
        rng = np.random.default_rng(seed)
        raw = rng.integers(0, 256, (4, 3, BYTES[kind]), dtype=np.uint8)
        raw[..., :2] = rng.normal(size=(4, 3, 1)).astype(np.float16).view(np.uint8)
        raw[0, 0, :2] = 0
        raw[0, 1, :2] = (1, 0)  # the smallest there is
        raw = raw.reshape(4, -1)
        found = blocks("w", kind, torch.from_numpy(raw))
        np.testing.assert_array_equal(found.dequantize().numpy(), gguf.dequantize(raw, Kind[kind]))

    @given(st.integers(0, 999), st.floats(-6, 3), st.floats(-6, 3), st.booleans())
    def test_q4_1_but_for_the_rounding_of_fp32(self, seed, d, m, flat):
        """Off by a few of fp32's steps at the size of the larger term, however the minimum compares to the scale."""
        rng = np.random.default_rng(seed)
        raw = rng.integers(0, 256, (4, 3, 20), dtype=np.uint8)
        numbers = (rng.normal(size=(4, 3, 2)) * (10**d, 10**m)).astype(np.float16)
        numbers[0, 0, 0] *= not flat
        raw[..., :4] = numbers.view(np.uint8)
        raw = raw.reshape(4, -1)
        right = gguf.dequantize(raw, Kind.Q4_1)
        size = np.abs(numbers.astype(np.float64)) @ (15, 1)  # [4, 3]: the largest |d q| + |m|
        error = np.abs(blocks("w", "Q4_1", torch.from_numpy(raw)).dequantize().numpy() - right).reshape(4, 3, 32)
        assert (error <= 3 * 2.0**-24 * size[..., None]).all()
        if flat:
            np.testing.assert_array_equal(error[0, 0], 0)

    @pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_scales_that_are_no_numbers(self, kind, value):
        raw = torch.zeros(2, 2 * BYTES[kind], dtype=torch.uint8)
        raw[1, :2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
        with pytest.raises(ValueError, match="^here: expected finite"):
            blocks("here", kind, raw)

    @pytest.mark.parametrize("raw", [torch.zeros(2, 19), torch.zeros(2, 20), torch.zeros(40), torch.zeros(0, 20)])
    def test_what_fills_no_blocks(self, raw):
        raw = raw if raw.shape == (2, 20) else raw.to(torch.uint8)
        with pytest.raises(ValueError, match="^here: expected rows of blocks of 20 bytes"):
            blocks("here", "Q4_1", raw)

    def test_an_unknown_type(self):
        with pytest.raises(ValueError, match="^here: expected one of Q8_0.* got Q4_K"):
            blocks("here", "Q4_K", torch.zeros(2, 144, dtype=torch.uint8))


class TestFile:
    @pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.F16, Kind.F32])
    def test_as_the_conversion_reads_it(self, tmp_path, kind):
        decoded = write(tmp_path / "m.gguf", kind)
        config, tensors = read_gguf(tmp_path / "m.gguf")
        (tmp_path / "out").mkdir()
        fetch.convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
        right = load_file(tmp_path / "out" / "model.safetensors")
        assert tensors.keys() == right.keys()
        assert (config.hidden_size, config.tie_word_embeddings) == (32, True)
        for name, found in tensors.items():
            is_packed = right[name].ndim == 2 and (kind.name in BYTES or "embed" in name)
            assert isinstance(found, QuantizedTensor) == is_packed
            w = found.dequantize() if isinstance(found, QuantizedTensor) else found.float()
            torch.testing.assert_close(w, right[name], rtol=0, atol=1e-6 if kind == Kind.Q4_1 else 0)
        q = tensors["model.layers.0.self_attn.q_proj.weight"]
        q = q.dequantize() if isinstance(q, QuantizedTensor) else q.float()
        np.testing.assert_allclose(q.numpy(), decoded["blk.0.attn_q"], rtol=0, atol=1e-6)

    def test_other_types_become_fp32_said_aloud(self, tmp_path):
        write(tmp_path / "m.gguf", Kind.Q5_0)
        with pytest.warns(UserWarning, match=r"7 tensors, such as blk.0.attn_k.weight \(Q5_0\), are decoded to fp32"):
            _, tensors = read_gguf(tmp_path / "m.gguf")
        assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32

    @pytest.mark.parametrize(
        ("error", "fields"),
        [
            ("general.architecture: expected llama, got 'gemma'", {"arch": "gemma"}),
            ("llama.rope.scaling.type: scaled", {"scaling": gguf.RopeScalingType.LINEAR}),
            ("lacks tensor blk.1.attn_k.weight", {"layers": 2}),
            ("has the surplus tensor blk.0.attn_k.weight", {"layers": 1, "change": lambda t: t | {
                "blk.0.attn_q.bias": (np.zeros(32, np.float32), Kind.F32)}}),
            ("lacks tensor", {"layers": 2**32 - 1}),
            ("rms_norm_eps: expected a positive", {"eps": 0.0}),
            ("unsupported format string", {"eps": [1.0, 2.0]}),
            ("lacks tensor blk.0.ffn_up.weight", {"change": lambda t: {n: v for n, v in t.items() if "up" not in n}}),
            (r"blk.0.attn_v.weight: expected shape \(16, 32\), got \(15, 20\)", {"change": lambda t: t | {
                "blk.0.attn_v.weight": (t["blk.0.attn_v.weight"][0][:15], Kind.Q4_1)}}),
            (r"blk.0.attn_norm.weight: expected shape \(32,\)", {"change": lambda t: t | {
                "blk.0.attn_norm.weight": (gguf.quantize(np.ones(32, np.float32), Kind.Q8_0), Kind.Q8_0)}}),
            ("blk.0.ffn_up.weight: expected finite", {"change": lambda t: t | {
                "blk.0.ffn_up.weight": (np.full_like(t["blk.0.ffn_up.weight"][0], 255), Kind.Q4_1)}}),
        ],
    )  # fmt: skip
    def test_what_is_refused_is_named(self, tmp_path, error, fields):
        write(tmp_path / "m.gguf", **fields)
        with pytest.raises(ValueError, match=f"^m.gguf: {error.replace('attn_k.weight', 'attn_.')}"):
            read_gguf(tmp_path / "m.gguf")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none.gguf"):
            read_gguf(tmp_path / "none.gguf")

    @given(st.data())
    @settings(max_examples=60)
    def test_damage(self, tmp_path_factory, data):
        """Cut off, or with other bytes: a ValueError that names the file, or finite numbers of the right shape."""
        path = tmp_path_factory.getbasetemp() / "damage.gguf"
        whole = tmp_path_factory.getbasetemp() / "whole.gguf"
        if not whole.exists():
            write(whole)
        content = bytearray(whole.read_bytes())
        if cut := data.draw(st.booleans()):
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        else:
            for _ in range(data.draw(st.integers(1, 3))):
                content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        try:
            config, tensors = read_gguf(path)
        except ValueError as e:
            if not str(e).startswith("damage.gguf: "):
                raise
            return
        assert not cut or len(content) > whole.stat().st_size - 32, "only what fills the last block up may be missing"
        for tensor in tensors.values():
            w = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
            assert w.shape[-1] in (config.hidden_size, config.intermediate_size)


class TestModel:
    """A file in the place of a model's name."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache" / "gguf"

    @staticmethod
    def logits(model) -> torch.Tensor:
        tokens = torch.arange(20).view(2, 10)
        with use("reference"), torch.inference_mode():
            return model(tokens)

    @staticmethod
    def mixed(tensors: dict) -> dict:
        """One part of two in another type than its neighbor, and a layer in a third."""
        change = {"blk.0.attn_k.weight": Kind.Q8_0, "blk.0.ffn_up.weight": Kind.F16, "blk.0.ffn_down.weight": Kind.Q4_1}
        for name, kind in change.items():
            tensors[name] = (gguf.quantize(gguf.dequantize(*tensors[name]), kind), kind)
        return tensors

    @pytest.mark.parametrize("change", [None, "mixed"])
    @pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.F16])
    def test_logits_are_those_of_the_converted_model(self, tmp_path, kind, change):
        write(tmp_path / "m.gguf", kind, change and self.mixed)
        (tmp_path / "dense").mkdir()
        fetch.convert_gguf(tmp_path / "m.gguf", tmp_path / "dense")
        model, right = load(tmp_path / "m.gguf"), load(tmp_path / "dense")
        packed = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
        expected = {None: {"Q4_0": 4, "Q4_1": 4}, "mixed": {"Q4_0": 2, "Q4_1": 2, "Q8_0": 1, "F16": 1}}
        assert len(packed) == expected[change].get(kind.name, 0)
        torch.testing.assert_close(self.logits(model), self.logits(right), rtol=1e-4, atol=1e-4)

    def test_it_generates_with_its_tokenizer(self, tmp_path):
        write(tmp_path / "m.gguf", Kind.Q4_1)
        llm = LLM(tmp_path / "m.gguf", dtype="float32")
        [output] = llm.generate(["abab"], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
        assert len(output.token_ids) == 4
        with pytest.raises(ValueError, match="is quantized already"):
            LLM(tmp_path / "m.gguf", quantization="int4")

    def test_it_is_laid_out_once_and_anew_when_it_changes(self, tmp_path, cache, monkeypatch):
        file = tmp_path / "m.gguf"
        write(file, Kind.Q4_0)
        first = opened(file)
        monkeypatch.setattr("minillm.quant.gguf._contents", None)  # not read again
        assert opened(file) == first
        monkeypatch.undo()
        monkeypatch.setenv("MINILLM_CACHE", str(cache.parent))
        write(file, Kind.Q8_0)
        assert opened(file) != first

    def test_of_a_damaged_file_nothing_stays(self, tmp_path, cache):
        file = tmp_path / "m.gguf"
        write(file, Kind.Q4_0)
        file.write_bytes(file.read_bytes()[:-400])
        with pytest.raises(ValueError, match=r"m.gguf: "):
            load(file)
        assert not [path for path in cache.iterdir() if not path.name.endswith(".lock")]
