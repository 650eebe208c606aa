"""On disk as compressed-tensors has it: its own library packs alike, and transformers loads what we wrote."""

import dataclasses
import json

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minillm.config import ModelConfig
from minillm.kernels import use
from minillm.model import Transformer
from minillm.model.weights import load, save
from minillm.quant import CompressedTensors, QuantizedTensor, QuantLinear, Scheme, minmax_grid
from minillm.quant.formats import pack, unpack

CONFIG = ModelConfig(500, 64, 160, 2, 4, 2, 16, max_position_embeddings=256)
FORMATS = {
    "int4": CompressedTensors(Scheme(4, group_size=32)),
    "int4 asymmetric": CompressedTensors(Scheme(4, symmetric=False, group_size=32)),
    "int4 a row": CompressedTensors(Scheme(4, strategy="channel")),
    "int3": CompressedTensors(Scheme(3, symmetric=False, group_size=16)),
    "int8": CompressedTensors(Scheme(8, strategy="channel")),
    "int8 and activations": CompressedTensors(Scheme(8, strategy="channel"), True),
    "fp8 and activations": CompressedTensors(Scheme(8, "float", strategy="channel"), True),
}
EACH = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def linears(model: Transformer):
    for layer in model.layers:
        for module, names in ((layer.self_attn, ("qkv_proj", "o_proj")), (layer.mlp, ("gate_up_proj", "down_proj"))):
            for name in names:
                yield module, name, getattr(module, name)


def rounded(format: CompressedTensors, config: ModelConfig = CONFIG) -> Transformer:
    """A random model whose layers are rounded to the nearest."""
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(config, quantization_config=format.to_config()))
    model.reset_parameters(0.2)
    for module, name, layer in linears(model):
        grid = minmax_grid(layer.weight.detach(), format.scheme)
        weight = QuantizedTensor.round(layer.weight.detach(), grid, format.scheme)
        setattr(module, name, QuantLinear.of(layer, weight, format))
    return model.eval().requires_grad_(False)


@given(st.integers(2, 8), st.integers(1, 100), st.integers(0, 99))
def test_packed_as_the_library_packs(bits, k, seed):
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, k), generator=g).to(torch.int8)
    words = pack(q, bits)
    assert torch.equal(words, pack_to_int32(q, bits))
    assert torch.equal(unpack(words, bits, k), q)


@EACH
@pytest.mark.parametrize("more", [{}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}], ids=["", "biases"])
def test_transformers_loads_what_we_wrote(tmp_path, format, more):
    model = rounded(format, dataclasses.replace(CONFIG, **more))
    for module, name, _ in linears(model):
        bias = getattr(module, name).bias
        if bias is not None:
            bias.normal_()
    save(model, tmp_path / "model")
    options = {}
    if not format.scheme.symmetric:  # transformers expects zero points that are not packed, unless it dequantizes
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    theirs, about = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True, **options
    )
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    ours = load(tmp_path / "model", device="cpu", dtype="float32")
    if not format.activations:
        found = dict(theirs.named_modules())
        for i, layer in enumerate(ours.layers):
            weight = layer.mlp.gate_up_proj.quantized().dequantize()
            gate = getattr(found[f"model.layers.{i}.mlp.gate_proj"], "weight", None)
            if gate is not None and gate.dtype == torch.float32:
                assert torch.equal(gate, weight[: len(gate)])
    ids = torch.randint(0, 500, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), use("reference"):
        expected, got = theirs(ids).logits, ours.logits(ours(ids))
    # With quantized activations a last bit of x decides whether a number is rounded up or down.
    tolerance = 0.02 if format.activations and format.scheme.kind == "int" else 2e-5
    assert (got - expected).abs().max() < tolerance * expected.abs().max()


@EACH
def test_saved_and_loaded_it_is_the_same(tmp_path, format):
    model = rounded(format)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model", device="cpu", dtype="float32")
    for (_, _, one), (_, _, other) in zip(linears(model), linears(again), strict=True):
        a, b = one.quantized(), other.quantized()
        assert torch.equal(a.q.float(), b.q.float())
        assert torch.equal(a.grid.scale, b.grid.scale)
        assert torch.equal(a.dequantize(), b.dequantize())
    ids = torch.randint(0, 500, (1, 9))
    assert torch.equal(model(ids), again(ids))
    save(again, tmp_path / "again")
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")[name].float(), tensor.float())
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "model" / "config.json").read_text()


@EACH
def test_a_config_describes_its_format(format):
    about = json.loads(json.dumps(format.to_config()))
    assert CompressedTensors.from_config(about) == format


def broken(**changes):
    about = json.loads(json.dumps(FORMATS["int8 and activations"].to_config()))
    group = about["config_groups"]["group_0"]
    for path, value in changes.items():
        *where, last = path.split("__")
        target = about
        for part in where:
            target = group[part] if part in group else group if part == "group" else target[part]
        target[last] = value
    return about


@pytest.mark.parametrize(("changes", "says"), [
    ({"config_groups": {}}, "config_groups: expected one group for all layers, got 0"),
    ({"config_groups": []}, r"config_groups: expected a dict, got \[\]"),
    ({"group__targets": ["re:.*mlp.*"]}, r"config_groups: expected a group with targets \['Linear'\]"),
    ({"group__output_activations": {}}, "output_activations: expected null"),
    ({"group__weights": None}, "weights: expected a dict, got None"),
    ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: expected null"),
    ({"ignore": ["lm_head", "model.layers.0.mlp.up_proj"]}, "ignore: expected all parts of layers.0.mlp.gate_up_proj"),
    ({"ignore": ["re:.*down_proj"]}, "ignore: expected names of modules, got 're:.*down_proj'"),
    ({"format": "pack-quantized"}, "format: expected 'int-quantized' for these config_groups, got 'pack-quantized'"),
    ({"weights__num_bits": 16}, "bits: expected 2 to 8"),
    ({"weights__num_bits": "8"}, "num_bits: expected a int, got '8'"),
    ({"weights__dynamic": True}, "dynamic: expected False for weights"),
    ({"weights__actorder": "group"}, "actorder: expected null or 'static', got 'group'"),
    ({"weights__strategy": "tensor"}, "strategy: expected 'channel' or 'group', got 'tensor'"),
    ({"weights__symmetric": False}, "activations: expected symmetric weights of 8 bits with a scale for each channel"),
    ({"input_activations__dynamic": False}, "input_activations: expected 8 bits, symmetric, strategy 'token', dynamic"),
    ({"input_activations__strategy": "tensor"}, "got num_bits 8, symmetric True, strategy 'tensor', dynamic True"),
])  # fmt: skip
def test_what_is_not_supported_is_refused(tmp_path, changes, says):
    about = broken(**changes)
    save(rounded(FORMATS["int8 and activations"]), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    with pytest.raises(ValueError, match=f"quantization_config: .*{says}"):
        load(tmp_path / "model", device="cpu")


def test_layers_may_be_left_out(tmp_path):
    """As it was, beside others in few bits; transformers sees it so, too."""
    model = rounded(FORMATS["int4"])
    plain = Transformer(CONFIG).eval().requires_grad_(False).layers[1].mlp
    model.layers[1].mlp = plain
    save(model, tmp_path / "model")
    about = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert about["ignore"] == [*(f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")), "lm_head"]
    ours = load(tmp_path / "model", device="cpu", dtype="float32")
    assert torch.equal(ours.layers[1].mlp.down_proj.weight, plain.down_proj.weight)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.randint(0, 500, (1, 9))
    with torch.inference_mode(), use("reference"):
        assert (ours.logits(ours(ids)) - theirs(ids).logits).abs().max() < 1e-4
    model.layers[0].mlp = rounded(FORMATS["int8"]).layers[0].mlp
    with pytest.raises(ValueError, match="model: expected layers that are all quantized alike"):
        save(model, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


PART = "model.layers.1.mlp.up_proj."


@pytest.mark.parametrize(("name", "change", "says"), [
    ("weight_scale", lambda x: x * float("nan"), "up_proj.weight_scale: expected finite numbers"),
    ("weight_scale", lambda x: x.to(torch.int32), "up_proj.weight_scale: expected 16 or 32 bits, got torch.int32"),
    ("weight_scale", lambda x: x[:, :1], "up_proj.weight_scale has shape"),
    ("weight_shape", lambda x: x + 1, r"up_proj.weight_shape: expected \[160, 64\], got \[161, 65\]"),
    ("weight_packed", lambda x: x.to(torch.int64), "up_proj.weight_packed: expected int32, got torch.int64"),
    ("weight_packed", lambda x: x[:, 1:].contiguous(), "up_proj.weight_packed has shape"),
    ("weight_zero_point", lambda x: x.float(), "up_proj.weight_zero_point: expected int32"),
    ("weight_zero_point", None, "lacks tensor model.layers.1.mlp.up_proj.weight_zero_point"),
])  # fmt: skip
def test_broken_tensors_are_named(tmp_path, name, change, says):
    save(rounded(FORMATS["int4 asymmetric"]), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensor = tensors.pop(PART + name)
    if change is not None:
        tensors[PART + name] = change(tensor).contiguous()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=says):
        load(tmp_path / "model", device="cpu")


@pytest.mark.parametrize(("options", "says"), [
    ((Scheme(4, "nf", group_size=64),), "kind: compressed-tensors has no NF4"),
    ((Scheme(8, strategy="tensor"),), "strategy: expected 'channel' or 'group'"),
    ((Scheme(8, "float", strategy="channel"),), "activations: expected True with fp8 weights"),
    ((Scheme(8, group_size=32), True), "activations: expected symmetric weights of 8 bits"),
])  # fmt: skip
def test_schemes_without_a_name(options, says):
    with pytest.raises(ValueError, match=says):
        CompressedTensors(*options)
