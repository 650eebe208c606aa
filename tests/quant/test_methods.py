"""From a model, or its directory, to a quantized one: what cannot work is refused before anything is written."""

import json

import pytest
import torch
import transformers
from typer.testing import CliRunner

from minillm import LLM, SamplingParams
from minillm.cli import app
from minillm.config import ModelConfig
from minillm.data import reference_text
from minillm.kernels import use
from minillm.model import Transformer
from minillm.model.linear import Dense
from minillm.model.tokenizer import Tokenizer
from minillm.model.weights import load, save
from minillm.quant import (
    METHODS,
    ON_THE_FLY,
    CompressedTensors,
    QuantLinear,
    Scheme,
    check_device,
    load_on_the_fly,
    on_the_fly,
    quantize_checkpoint,
    quantize_model,
    round_model,
)

CONFIG = ModelConfig(400, 96, 192, 2, 6, 2, 16, max_position_embeddings=128)
TEXT = torch.randint(0, 400, (4, 32), generator=torch.Generator().manual_seed(0))


def model_of(config: ModelConfig = CONFIG) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config).eval().requires_grad_(False)


@pytest.fixture
def folder(tmp_path):
    save(model_of(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_near_the_model(method):
    model, original = model_of(), model_of()
    names = []
    quantize_model(model, method, calibration=TEXT, progress=names.append)
    assert len(set(names)) == 8
    assert all(isinstance(layer.mlp.down_proj, QuantLinear) for layer in model.layers)
    assert model.config.quantization_config["quant_method"] == "compressed-tensors"
    with use("reference"):
        error = (model.logits(model(TEXT)) - original.logits(original(TEXT))).norm()
    assert error < 0.25 * original.logits(original(TEXT)).norm()


@pytest.mark.parametrize(("options", "says"), [
    ({"method": "int4"}, "method: expected one of rtn, gptq, awq, smoothquant, fp8, got 'int4'"),
    ({"method": "gptq", "calibration": None}, "calibration: expected token ids .* for method 'gptq', got none"),
    ({"method": "rtn", "group_size": 128}, r"group_size: expected a divisor .* got 128; such as 32, 96 \(layer layers"),
    ({"method": "rtn", "bits": 1}, "bits: expected 2 to 8"),
    ({"method": "fp8", "bits": 4}, "bits: expected 8 for method 'fp8', whose activations are in 8 bits too, got 4"),
    ({"method": "smoothquant", "group_size": 32}, "group_size, symmetric: expected one scale a row"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_changes(options, says):
    model = model_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        quantize_model(model, **{"calibration": TEXT, **options})
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_quantized_model_is_not_quantized_again(folder, tmp_path):
    model = quantize_model(model_of(), "rtn")
    with pytest.raises((TypeError, ValueError), match="layers.0.self_attn.qkv_proj"):
        quantize_model(model, "rtn")
    quantize_checkpoint(folder, tmp_path / "q", "rtn")
    with pytest.raises(ValueError, match="name: .* is quantized already; start from the unquantized model"):
        quantize_checkpoint(tmp_path / "q", tmp_path / "again", "rtn")
    with pytest.raises(ValueError, match="out: .* exists"):
        quantize_checkpoint(folder, tmp_path / "q", "rtn")
    assert not (tmp_path / "again").exists()


def test_default_groups_are_those_that_a_cpu_has_a_product_for(folder, tmp_path):
    quantize_checkpoint(folder, tmp_path / "q", "rtn")
    group = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert group["weights"]["group_size"] == 32


@pytest.mark.parametrize("quantization", ["int8", "int4", "w8a8", "fp8"])
def test_on_the_fly_equals_the_checkpoint(folder, tmp_path, quantization):
    bits = {"int8": 8, "int4": 4}.get(quantization)  # the others have no method that rounds to the nearest
    llm = LLM(folder, device="cpu", quantization=quantization, max_model_len=64)
    model = load(folder, device="cpu")
    if bits is not None:
        quantize_checkpoint(folder, tmp_path / "q", "rtn", bits=bits, device="cpu")
        model = load(tmp_path / "q", device="cpu")
        assert torch.equal(model(TEXT), llm.model(TEXT))
    assert (
        len(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)[0].token_ids) == 4
    )


@pytest.mark.parametrize("quantization", ON_THE_FLY)
def test_rounded_as_it_is_read_it_is_the_same(folder, quantization, monkeypatch):
    """And of unrounded layers there is the head alone, at any time."""
    made = []
    init = Dense.__init__
    monkeypatch.setattr(
        Dense, "__init__", lambda self, *args, **more: (made.append(args), init(self, *args, **more))[1]
    )
    model = load_on_the_fly(folder, quantization, device="cpu")
    assert [parts for _, parts, *_ in made] == [{"lm_head": CONFIG.vocab_size}]
    expected = on_the_fly(load(folder, device="cpu"), quantization)
    assert torch.equal(model(TEXT), expected(TEXT))
    assert model.config.quantization_config == expected.config.quantization_config


def test_what_llm_refuses(folder, tmp_path):
    with pytest.raises(ValueError, match="quantization: expected one of int8, int4, w8a8, fp8 or None, got 'gptq'"):
        LLM(folder, quantization="gptq")
    quantize_checkpoint(folder, tmp_path / "q", "rtn")
    with pytest.raises(ValueError, match="quantization: expected None, as .* is quantized already, got 'int8'"):
        LLM(tmp_path / "q", quantization="int8")
    dummy = LLM(tmp_path / "q", load_format="dummy", device="cpu", max_model_len=64)
    assert isinstance(dummy.model.layers[0].mlp.down_proj, QuantLinear)


def test_fp8_loses_less_than_rounding_to_the_nearest():
    """On text like the one it was calibrated on, and with the activations rounded, too."""
    exact, repaired, nearest = model_of(), model_of(), model_of()
    text = torch.randint(0, 400, (8, 64), generator=torch.Generator().manual_seed(1))
    quantize_model(repaired, "fp8", calibration=text)
    round_model(nearest, CompressedTensors(Scheme(8, "float", strategy="channel"), True))
    assert repaired.config.quantization_config == nearest.config.quantization_config
    assert repaired.layers[0].mlp.down_proj.weight.dtype == torch.float8_e4m3fn
    with use("reference"):
        expected = exact(TEXT)
        errors = [(model(TEXT) - expected).square().mean() for model in (repaired, nearest)]
    assert errors[0] < 0.9 * errors[1], errors


def test_the_command(folder, tmp_path):
    Tokenizer.train(reference_text().values(), 100).save(folder)
    run = CliRunner().invoke(app, ["quantize", str(folder), "--out", str(tmp_path / "q"), "--method", "fp8"])
    assert run.exit_code == 0, run.output
    assert "MB of weights" in run.output
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ours = load(tmp_path / "q", device="cpu", dtype="float32")
    with torch.inference_mode():
        expected = theirs(TEXT).logits
        off = (ours.logits(ours(TEXT)) - expected).abs().amax(-1)  # [windows, T]
    # A sum in another order may round an activation to its neighbor in fp8, which the rest of that window then sees.
    assert off.median() < 1e-4 * expected.abs().max() > off.max() / 100
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        weight = ours.layers[1].get_submodule(part).quantized().dequantize()
        assert torch.equal(weight, theirs.model.layers[1].get_submodule(part).weight)
    run = CliRunner().invoke(app, ["quantize", str(folder), "--out", str(tmp_path / "r"), "--group-size", "50",
                                   "--method", "rtn"])  # fmt: skip
    assert run.exit_code == 1
    assert "group_size: expected a divisor" in run.output
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("quantization", "least"), [("w8a8", (8, 0)), ("fp8", (8, 9)), ("int8", None), ("int4", None)])
def test_what_a_gpu_cannot_multiply_is_refused(monkeypatch, quantization, least):
    """Before a weight is read, on the fly and from a checkpoint; a CPU takes everything."""
    gpu, formats = torch.device("cuda"), {"w8a8": "int-quantized", "fp8": "float-quantized"}
    asked = [(quantization, None), (None, {"format": formats.get(quantization, "pack-quantized")})]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    for has in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, has=has: has)
        for question in asked:
            check_device(torch.device("cpu"), *question)
            if least is None or has >= least:
                check_device(gpu, *question)
                continue
            with pytest.raises(ValueError, match=f"quantization: {quantization} needs a GPU of .* got some GPU; take"):
                check_device(gpu, *question)
