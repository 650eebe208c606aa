"""`minillm plan`: within a quarter of what the engine was recorded to do; memory is what models and caches take."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from minillm.cache.paged import PagedCache
from minillm.capacity import SHAPES, Estimate, find_gpu, find_shape, plan, table
from minillm.cli import app
from minillm.config import ModelConfig
from minillm.kernels.common import ceil_div
from minillm.learn.paths import root
from minillm.model import Transformer
from minillm.quant.methods import format_of, round_model

PARTS = ("workload", "stream")
H100 = find_gpu("h100")


@pytest.fixture(scope="module")
def benchmark():
    """benchmarks/capacity.py, and benchmarks/workloads.py, which it imports."""
    sys.path.insert(0, str(root() / "benchmarks"))
    spec = importlib.util.spec_from_file_location("bench_capacity", root() / "benchmarks" / "capacity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(root() / "benchmarks"))
    sys.modules.pop("workloads")


def test_the_table_is_what_the_records_say(benchmark):
    assert benchmark.TARGET.read_text() == benchmark.text(), "`make cog` writes minillm/gpus.json from the records"


def test_the_records_hold_nothing_but_what_was_measured(benchmark):
    """Figures of the table that no record has: the memory, as sold."""
    found = json.loads(benchmark.TARGET.read_text())["gpus"]
    for device, row in found.items():
        ceilings = [r["results"]["ceilings"] for r in benchmark.records(device).values() if "ceilings" in r["results"]]
        copies = [c["copy bytes/s"] for c in ceilings]
        assert min(copies) <= row["copy, bytes/s"] <= max(copies)
        assert device in row["name"].lower()


def test_the_plan_is_within_a_quarter_of_every_record(benchmark):
    """Of both cards, all four shapes, 16 and 4 bits; benchmarks/NOTES.md shows them."""
    ratios = {case[:4]: benchmark.planned(*case[:4]) / case[4] for case in benchmark.recorded()}
    assert {k: round(r, 2) for k, r in ratios.items() if not 0.75 <= r <= 1.25} == {}
    assert {(device, part) for device, part, *_ in ratios} >= {(d, p) for d in ("h100", "h200") for p in PARTS}
    assert {shape for _, _, shape, _ in ratios} == {"smollm2", "qwen3", "llama1b", "llama8b"}
    assert {part for _, part, _, bits in ratios if bits == "int4"} == set(PARTS)


# ---- memory ---------------------------------------------------------------------------------------------------------

CONFIG = ModelConfig(320, 256, 512, 2, 4, 2, 64, 512)


def test_weights_are_what_a_model_has():
    for name, config in SHAPES.items():
        assert Estimate(config, H100).weight_bytes == config.weight_bytes(), name
    for bits, method in (("int4", ("rtn", 4)), ("int8", ("rtn", 8)), ("w8a8", ("w8a8", 8)), ("fp8", ("fp8", 8))):
        model = Transformer(CONFIG).to(torch.bfloat16)
        round_model(model, format_of(*method, None, True, {"any": 256}))
        held = [{**layer._parameters, **layer._buffers} for name, layer in model.named_modules() if name]
        stored = sum(tensor.nbytes for tensors in held for tensor in tensors.values() if tensor is not None)
        assert Estimate(CONFIG, H100, bits).weight_bytes == pytest.approx(stored, rel=0.03), bits


@pytest.mark.parametrize(
    ("name", "dtype"), [("auto", torch.bfloat16), ("int8", torch.int8), ("fp8", torch.float8_e4m3fn)]
)
def test_a_token_takes_what_the_cache_keeps_of_it(name, dtype):
    cache = PagedCache(CONFIG, 2, 16, torch.device("cpu"), dtype)
    assert Estimate(CONFIG, H100, kv_cache_dtype=name).kv_bytes == cache.bytes_per_token


def test_requests_fit_in_blocks_into_what_is_left():
    gpu, config = replace(H100, memory=20e9), SHAPES["llama-3.1-8b"]
    estimate = Estimate(config, gpu, "int4")
    left = 0.9 * 20e9 - estimate.weight_bytes - estimate.step_bytes
    for context in (15, 16, 17, 1000):
        blocks = ceil_div(context, 16) * estimate.requests_that_fit(context)
        room = left / (16 * config.kv_bytes_per_token())
        assert blocks <= room < blocks + ceil_div(context, 16)


# ---- time -----------------------------------------------------------------------------------------------------------


def test_a_step_is_bytes_flops_and_kernels():
    """By hand, on a machine with round figures."""
    gpu = find_gpu("mine", 1000, 1, 0.001)  # 1e9 bytes/s, 1e9 FLOP/s
    gpu = replace(gpu, kernel_seconds={"alone": 1.0, "several": 10.0})
    layers = 2 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512)
    norms, head = 5 * 256, 320 * 256
    read = 2 * (layers + norms + head)
    token = 2 * 2 * 128 * 2  # layers, key and value, features, bytes
    flops = 2 * (layers + head) + 4 * 2 * 256 * 100
    for running, kernels in ((1, 7 * 2 + 9), (3, 10 * (10 * 2 + 8))):
        expected = (read + running * 101 * token) / 1e9 + running * flops / 1e9 + kernels
        assert Estimate(CONFIG, gpu).step_seconds(running, 100) == pytest.approx(expected)
    assert Estimate(CONFIG, gpu, "int4").step_seconds(1, 100) > 280, "only 16-bit weights have kernels for one"
    reading = 2 * 100 * layers + 4 * 2 * 256 * 100 * 50
    assert Estimate(CONFIG, gpu).prompt_seconds(100) == pytest.approx(reading / 1e9)


def test_a_window_bounds_what_is_read():
    estimate = Estimate(replace(CONFIG, sliding_window=64), H100)
    assert estimate.step_seconds(8, 64) == estimate.step_seconds(8, 500)
    half = Estimate(replace(CONFIG, sliding_window=64, layer_types=("full_attention", "sliding_attention")), H100)
    assert estimate.step_seconds(8, 500) < half.step_seconds(8, 500) < Estimate(CONFIG, H100).step_seconds(8, 500)


@pytest.mark.parametrize("share", [0.001, 0.2, 0.7, 1.0, 2.5])
def test_a_rate_is_served_by_what_runs_then(share):
    full = plan("llama-3.1-8b", H100)["loads"][1]
    rate = share * full["requests/s"]
    found = plan("llama-3.1-8b", H100, rate=rate, price=2.0)["loads"][2]
    assert found["GPUs"] == max(1, -(-share // 1))
    assert found["requests/s"] * found["GPUs"] == pytest.approx(rate)
    assert found["running"] == pytest.approx(found["tokens/s"] * found["ms a token"] / 1e3)  # Little's law
    assert found["running"] <= full["running"] * (1 + 1e-9)
    if share == 1:
        assert found["running"] == pytest.approx(full["running"])
        assert found["ms a token"] == pytest.approx(full["ms a token"])
    hour = found["tokens/s"] * 3600 * found["GPUs"]
    assert found["$ a million"] == pytest.approx(2.0 * found["GPUs"] / hour * 1e6)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_folder_needs_a_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-0.6b"].to_dict()))
    assert find_shape(str(tmp_path)) == find_shape(str(tmp_path / "config.json")) == find_shape("Qwen/Qwen3-0.6B")
    about = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-0.6b"].to_dict() | about))
    with pytest.raises(ValueError, match="--quantization: expected int4"):
        plan(str(tmp_path), H100)
    assert plan(str(tmp_path), H100, quantization="int4")["weights"] == "int4"


def test_a_gpu_of_ones_own():
    known = find_gpu("h100", memory=94)
    assert (known.memory, known.bandwidth) == (94e9, H100.bandwidth)
    own = find_gpu("a100", 40, 1400, 250)
    assert (own.name, own.memory, own.bandwidth, own.rate) == ("a100", 40e9, 1.4e12, 250e12)
    assert "given" in plan("qwen3-0.6b", own)["assumed"][0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gpt-5"], "model: expected smollm2-135m, qwen3-0.6b"),
        (["qwen3-0.6b", "--gpu", "a100"], "'a100' is not recorded; expected one of h100, h200, or give its figures"),
        (["qwen3-0.6b", "--gpu", "a100", "--memory", "40", "--tflops", "250"], "--bandwidth (GB/s)"),
        (["qwen3-0.6b", "--bandwidth", "-1"], "--bandwidth: expected a number above 0, got -1"),
        (["qwen3-0.6b", "--rate", "0"], "--rate: expected a number above 0"),
        (["qwen3-0.6b", "--price", "nan"], "--price: expected a number above 0"),
        (["qwen3-0.6b", "--context", "64", "--output", "64"], "--context: expected more than --output (64)"),
        (["smollm2-135m", "--context", "9000"], "at most the model's 8192, got 9000"),
        (["qwen3-0.6b", "--quantization", "int3"], "--quantization: expected one of int4, int8, w8a8, fp8"),
        (["qwen3-0.6b", "--kv-cache-dtype", "int4"], "--kv-cache-dtype: expected auto, int8 or fp8"),
        (["llama-3.1-8b", "--memory", "16"], "take fewer bits (--quantization)"),
    ],
)
def test_errors_say_what_to_do(arguments, says):
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 1
    assert says in result.output


def test_the_command_prints_the_plan():
    arguments = ["plan", "llama-3.1-8b", "--rate", "4", "--price", "2.5", "--quantization", "int4"]
    found = plan("llama-3.1-8b", H100, rate=4, price=2.5, quantization="int4")
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output) == found
    text = CliRunner().invoke(app, arguments).output
    assert text == table(found) + "\n"
    for words in ("4 requests/s", "$ a million", "int4 weights", *found["assumed"]):
        assert words in text
    assert "$" not in table(plan("llama-3.1-8b", H100))


def test_it_imports_no_torch():
    code = "import sys, minillm.cli as c; c.app(['plan', 'qwen3-0.6b'], standalone_mode=False)"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_it_is_read_in_one_sitting():
    assert len((root() / "minillm" / "capacity.py").read_text(encoding="utf-8").splitlines()) <= 250
