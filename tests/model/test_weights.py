"""Names, files and what can be wrong with them."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minillm.config import ModelConfig
from minillm.model import Transformer, weights
from minillm.model.checkpoint import Checkpoint
from minillm.model.linear import Dense, dense
from minillm.model.weights import load, model_path, resolve_dtype, save

CONFIG = ModelConfig(60, 32, 64, 2, 4, 2, 8, max_position_embeddings=32, tie_word_embeddings=True, eos_token_ids=(2,))


@pytest.fixture
def small(tmp_path) -> Path:
    """A small model on disk, as one safetensors file."""
    torch.manual_seed(0)
    return save(Transformer(CONFIG), tmp_path / "small")


def edit(file: Path, **changes) -> None:
    """Change fields of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change(directory: Path, edit) -> None:
    """Rewrite the tensors of a model directory."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


class TestNames:
    def test_directory(self, small):
        assert model_path(small) == model_path(str(small)) == small

    @pytest.mark.parametrize("name", ["smolm2-135m-instruct", "smollm2", "SmolLM2-135M"])
    def test_unknown_name_has_the_nearest(self, name):
        with pytest.raises(ValueError, match="did you mean smollm2-135m-instruct"):
            model_path(name)

    def test_nothing_near(self):
        with pytest.raises(ValueError, match="known: smollm2-135m-instruct"):
            model_path("zzzz")

    def test_case_does_not_matter(self, smollm_path):
        assert model_path("SmolLM2-135M-Instruct") == smollm_path

    def test_a_file_is_refused(self, small):
        with pytest.raises(ValueError, match="expected a directory"):
            model_path(small / "config.json")

    @pytest.mark.parametrize("name", ["model.bin", "model.pt", "checkpoint.pth"])
    def test_a_pickle_is_refused_with_the_reason(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(ValueError, match="pickled checkpoint.*run code"):
            model_path(tmp_path / name)

    def test_device_and_dtype(self, small, monkeypatch):
        model = load(small, dtype="bfloat16", device="cpu")
        assert {p.dtype for p in model.parameters()} == {model.dtype} == {torch.bfloat16}
        assert model.device == torch.device("cpu")
        with pytest.raises(ValueError, match="dtype: expected"):
            load(small, device="cpu", dtype="int3")
        with pytest.raises(ValueError, match="device: expected"):
            load(small, device="abacus")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="sees no GPU"):
            load(small, device="cuda")

    @pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
    def test_auto_is_what_the_gpu_can_do(self, monkeypatch, capability, expected):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert resolve_dtype("auto", torch.device("cuda")) == expected
        assert resolve_dtype("auto", torch.device("cpu")) == torch.float32

    def test_bf16_needs_a_gpu_that_has_it(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        for dtype in ("bfloat16", torch.bfloat16):
            with pytest.raises(ValueError, match=r'dtype: expected "auto", float16 or float32.*8.0.*, got Tesla T4'):
                resolve_dtype(dtype, torch.device("cuda"))
        assert resolve_dtype("float16", torch.device("cuda")) == torch.float16
        assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch, small, tmp_path):
        """What was asked of a repository, and the cache that it is downloaded to."""
        import huggingface_hub

        asked, cache = [], tmp_path / "cache"
        (small / "consolidated.safetensors").write_bytes(b"the same again")
        (small / "original.pth").write_bytes(b"and again")

        def download(repo, allow_patterns):
            asked.append((repo, allow_patterns))
            cache.mkdir(exist_ok=True)
            for file in small.iterdir():
                if any(file.match(pattern) for pattern in allow_patterns):
                    shutil.copy(file, cache)
            return str(cache)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return asked, cache

    def test_small_files_first_and_then_the_weights(self, hub, small):
        asked, cache = hub
        assert model_path("Qwen/Qwen3-0.6B") == cache
        assert asked == [("Qwen/Qwen3-0.6B", ["*.json", "*.jinja"]), ("Qwen/Qwen3-0.6B", ["model.safetensors"])]
        load("Qwen/Qwen3-0.6B", device="cpu")
        assert not (cache / "consolidated.safetensors").exists()
        assert len(asked) == 3  # the weights are there

    def test_shards_are_those_of_the_index(self, hub, small):
        AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).save_pretrained(small, max_shard_size="30KB")
        (small / "model.safetensors").unlink(missing_ok=True)
        load("Qwen/Qwen3-0.6B", device="cpu")
        assert hub[0][1][1] == sorted(p.name for p in small.glob("model-*.safetensors"))

    @pytest.mark.parametrize(
        ("file", "content", "says"),
        [
            ("config.json", {"model_type": "mamba"}, "model_type"),
            (
                "config.json",
                {**CONFIG.to_dict(), "quantization_config": {"quant_method": "aqlm"}},
                "quantized by 'aqlm'",
            ),
            ("tokenizer.json", {"model": {"type": "Unigram"}}, "tokenizer.json"),
        ],
    )
    def test_what_cannot_be_used_is_refused_before_the_weights(self, hub, small, file, content, says):
        (small / file).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=says):
            model_path("Qwen/Qwen3-0.6B")
        assert [patterns for _, patterns in hub[0]] == [["*.json", "*.jinja"]]

    def test_no_safetensors(self, hub, small):
        (small / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"has no model\.safetensors on the Hugging Face Hub"):
            model_path("Qwen/Qwen3-0.6B")

    def test_no_network(self, monkeypatch):
        import huggingface_hub

        def fail(*_, **__):
            raise OSError("no route")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ValueError, match="could not be downloaded.*no route.*local directory"):
            model_path("Qwen/Qwen3-0.6B")


class TestFiles:
    def test_round_trip(self, small):
        ours = load(small, device="cpu")
        theirs = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
        ids = torch.arange(20)[None]
        with torch.no_grad():
            torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-5, rtol=0)
        assert ours.lm_head.weight is ours.embed_tokens.weight
        assert not any(p.requires_grad for p in ours.parameters())

    def test_shards(self, small):
        theirs = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
        theirs.save_pretrained(small.parent / "sharded", max_shard_size="30KB")
        assert len(list((small.parent / "sharded").glob("*.safetensors"))) > 1
        a, b = load(small, device="cpu"), load(small.parent / "sharded", device="cpu")
        for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
            assert torch.equal(x, y), name
        index = small.parent / "sharded" / "model.safetensors.index.json"
        index.write_text("{}")
        with pytest.raises(ValueError, match="not a safetensors index"):
            load(small.parent / "sharded", device="cpu")

    def test_missing_tensor(self, small):
        change(small, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
        with pytest.raises(ValueError, match=r"lacks tensor model\.layers\.1\.mlp\.up_proj\.weight"):
            load(small, device="cpu")

    def test_surplus_tensor(self, small):
        change(small, lambda t: t.update({"model.layers.7.extra": torch.zeros(1)}))
        with pytest.raises(ValueError, match=r"has the surplus tensor model\.layers\.7\.extra"):
            load(small, device="cpu")

    def test_wrong_shape(self, small):
        change(small, lambda t: t.update({"model.norm.weight": torch.zeros(31)}))
        with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(31,\), expected \(32,\)"):
            load(small, device="cpu")
        # One of three that are stacked: a wrong row count must not shift the others unseen.
        change(small, lambda t: t.update({"model.norm.weight": torch.zeros(32)}))
        change(small, lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(8, 32)}))
        with pytest.raises(ValueError, match="k_proj.weight has shape"):
            load(small, device="cpu")

    @pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj"])
    def test_biases_of_which_config_says_nothing(self, small, name):
        change(small, lambda t: t.update({f"model.layers.0.{name}.bias": torch.zeros(32)}))
        field = "attention_bias" if "attn" in name else "mlp_bias"
        with pytest.raises(
            ValueError, match=rf"surplus tensor model\.layers\.0\.{name}\.bias; are? .*{field} in config"
        ):
            load(small, device="cpu")
        change(small, lambda t: t.pop(f"model.layers.0.{name}.bias"))
        edit(small / "config.json", attention_bias=True)
        with pytest.raises(ValueError, match=r"lacks tensor .*bias.* and 5 more; .*attention_bias in config"):
            load(small, device="cpu")

    @pytest.mark.parametrize("keep", [0, 5, 100, 5000])
    def test_cut_off(self, small, keep):
        file = small / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ValueError, match="corrupt or cut off"):
            load(small, device="cpu")

    def test_corrupt_header(self, small):
        file = small / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[8:40] = os.urandom(32)
        file.write_bytes(data)
        with pytest.raises(ValueError, match="corrupt or cut off"):
            load(small, device="cpu")

    def test_no_weights(self, small):
        (small / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="fetch the model again"):
            load(small, device="cpu")
        (small / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(ValueError, match=r"only the pickled checkpoint pytorch_model\.bin"):
            load(small, device="cpu")

    def test_redundant_tied_head_and_old_buffers_are_accepted(self, small):
        def edit(t):
            t["lm_head.weight"] = t["model.embed_tokens.weight"].clone()
            t["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

        change(small, edit)
        load(small, device="cpu")

    def test_what_need_not_be_merged_or_converted_stays_in_the_file(self, small):
        """Gate and up are neighbors in a file sorted by name, so they need no copy either; q, k and v are not."""
        if not Path("/proc/self/maps").exists():
            pytest.skip("needs Linux")
        model = load(small, device="cpu")
        mapped = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith(str(small / "model.safetensors")):
                mapped.append([int(address, 16) for address in line.split()[0].split("-")])
        copied = {n for n, p in model.named_parameters() if not any(a <= p.data_ptr() < b for a, b in mapped)}
        assert copied == {f"layers.{i}.self_attn.qkv_proj.weight" for i in (0, 1)}
        before = (small / "model.safetensors").read_bytes()
        model.embed_tokens.weight.zero_()
        model.layers[0].mlp.gate_up_proj.weight.zero_()
        assert (small / "model.safetensors").read_bytes() == before, "a change stays in this process"

    def test_saving_over_what_is_mapped(self, small):
        model = load(small, device="cpu")
        expected = [p.clone() for p in model.parameters()]
        save(model, small)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(load(small, "cpu").parameters(), expected, strict=True))

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.sampled_from(["float32", "bfloat16"]), st.booleans())
    def test_reads_what_safetensors_wrote(self, rows, dtype, mixed):
        """In any order, of several dtypes, with empty ones."""
        tensors = {f"t{i}": torch.randn(n, 3).to(getattr(torch, dtype)) for i, n in enumerate(rows)}
        if mixed:
            tensors |= {"a": torch.arange(3, dtype=torch.uint8), "b": torch.ones(2, dtype=torch.float64)}
        with tempfile.TemporaryDirectory() as folder:
            save_file(tensors, Path(folder) / "model.safetensors")
            got = Checkpoint(Path(folder)).read(f"model.{name}" for name in tensors)
        for name, tensor in tensors.items():
            assert torch.equal(got[f"model.{name}"], tensor)
            assert got[f"model.{name}"].dtype == tensor.dtype

    @pytest.mark.parametrize("shift", range(1, 8))
    def test_tensors_that_begin_anywhere(self, small, shift):
        """A header of any length is allowed: what follows may lie askew."""
        file = small / "model.safetensors"
        data = file.read_bytes()
        expected = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")
        head = data[8 : 8 + size].rstrip() + b" " * shift
        file.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])
        found = Checkpoint(small).read(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        load(small, device="cpu")


class TestTied:
    """As transformers 5 reads them."""

    @pytest.mark.parametrize("kind", ["another head", "only the head", "base model", "the head twice"])
    def test_as_transformers(self, small, kind):
        def edit(t):
            embedding = t["model.embed_tokens.weight"]
            if kind == "another head":
                t["lm_head.weight"] = torch.randn_like(embedding)
            elif kind == "the head twice":
                t["lm_head.weight"] = embedding.clone()
            elif kind == "only the head":
                t["lm_head.weight"] = t.pop("model.embed_tokens.weight")
            else:
                for name in list(t):
                    t[name.removeprefix("model.")] = t.pop(name)

        change(small, edit)
        ids = torch.arange(20)[None]
        theirs = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
        if kind == "another head":
            with pytest.warns(UserWarning, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
                ours = load(small, device="cpu")
        else:
            ours = load(small, device="cpu")
        assert ours.tied == ours.config.tie_word_embeddings == (kind != "another head")
        again = load(save(ours, small.parent / "again"), device="cpu")
        with torch.no_grad():
            torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-5, rtol=0)
            assert torch.equal(ours.logits(ours(ids)), again.logits(again(ids)))

    def test_a_base_model_has_no_head(self, small):
        edit(small / "config.json", tie_word_embeddings=False)
        with pytest.raises(ValueError, match=r"lacks tensor lm_head\.weight"):
            load(small, device="cpu")


class TestQuantized:
    """Numbers that mean nothing without a scale are never taken for weights."""

    def test_by_config(self, small):
        edit(small / "config.json", quantization_config={"quant_method": "fp8"})
        with pytest.raises(ValueError, match="quantization_config: .*quantized by 'fp8' is not supported"):
            load(small, device="cpu")
        edit(small / "config.json", quantization_config="fp8")
        with pytest.raises(ValueError, match="quantization_config"):
            load(small, device="cpu")

    def test_a_method_has_its_layers(self, small, monkeypatch):
        asked = []
        monkeypatch.setitem(weights.QUANTIZED, "toy", lambda about: asked.append(about) or dense)
        edit(small / "config.json", quantization_config={"quant_method": "toy", "bits": 3})
        assert load(small, device="cpu").config.quantization_config == asked[0] == {"quant_method": "toy", "bits": 3}

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
    @pytest.mark.parametrize(
        "name", ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
    )
    def test_by_dtype(self, small, dtype, name):
        change(small, lambda t: t.update({name: t[name].to(dtype)}))
        with pytest.raises(ValueError, match=f"{name} holds .*quantized"):
            load(small, device="cpu")

    @pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "qweight", "scales", "weight_packed"])
    def test_by_names(self, small, name):
        change(small, lambda t: t.update({f"model.layers.0.self_attn.q_proj.{name}": torch.ones(1)}))
        with pytest.raises(ValueError, match=f"q_proj.{name}; these weights are quantized"):
            load(small, device="cpu")

    def test_by_the_dtype_of_what_is_surplus(self, small):
        change(small, lambda t: t.update({"model.layers.0.mlp.table": torch.ones(1, dtype=torch.int8)}))
        with pytest.raises(ValueError, match="mlp.table; these weights are quantized"):
            load(small, device="cpu")


@pytest.mark.parametrize(("first", "second"), [((0, 2), (2, 5)), ((3, 5), (0, 3)), ((0, 2), (3, 6)), ((0, 3), (2, 5))])
@pytest.mark.parametrize("bias", [False, True])
def test_parts_need_no_copy_only_when_they_follow_one_another(first, second, bias):
    """In one storage, in order, without a gap; whatever lies where, they are stacked."""
    whole, biases = torch.arange(18.0).view(6, 3), torch.arange(6.0)
    parts = {"a": slice(*first), "b": slice(*second)}
    layer = Dense(3, {part: rows.stop - rows.start for part, rows in parts.items()}, bias)
    tensors = {f"{part}.weight": whole[rows] for part, rows in parts.items()}
    tensors |= {f"{part}.bias": biases[rows] for part, rows in parts.items()} if bias else {}
    assert {name: tensor.shape for name, tensor in tensors.items()} == layer.wanted()
    layer.load(tensors, torch.device("cpu"), torch.float32)
    assert torch.equal(layer.weight, torch.cat([whole[rows] for rows in parts.values()]))
    assert bias == (layer.bias is not None)
    assert not bias or torch.equal(layer.bias, torch.cat([biases[rows] for rows in parts.values()]))
    assert (layer.weight.data_ptr() == whole.data_ptr()) == (first == (0, 2) and second == (2, 5))
    for name, tensor in layer.tensors().items():
        assert torch.equal(tensor, tensors[name])


class TestIndex:
    @pytest.fixture
    def sharded(self, small) -> Path:
        theirs = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
        theirs.save_pretrained(small.parent / "sharded", max_shard_size="30KB")
        return small.parent / "sharded"

    @pytest.mark.parametrize(
        ("weight_map", "says"),
        [
            (["model.norm.weight"], "weight_map: expected an object"),
            ({"model.norm.weight": 3}, "weight_map: expected an object"),
            ({"model.norm.weight": "../other.safetensors"}, "weight_map: expected names of files beside it"),
            ({"model.norm.weight": "/etc/passwd"}, "weight_map: expected names of files beside it"),
        ],
    )
    def test_broken(self, sharded, weight_map, says):
        edit(sharded / "model.safetensors.index.json", weight_map=weight_map)
        with pytest.raises(ValueError, match=says):
            load(sharded, device="cpu")

    def test_a_file_that_is_not_there(self, sharded):
        edit(sharded / "model.safetensors.index.json", weight_map={"model.norm.weight": "model-9.safetensors"})
        with pytest.raises(FileNotFoundError, match=r"model-9\.safetensors: not found; fetch the model again"):
            load(sharded, device="cpu")

    def test_one_file_goes_before_a_stale_index(self, small, sharded):
        """As in transformers."""
        shutil.copy(sharded / "model.safetensors.index.json", small)
        load(small, device="cpu")

    def test_a_tensor_in_two_files(self, sharded):
        first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
        one, two = load_file(first), load_file(second)
        name = next(iter(one))
        save_file({**two, name: one[name].clone()}, second)
        load(sharded, device="cpu")
        save_file({**two, name: one[name] + 1}, second)
        with pytest.raises(ValueError, match=f"{name} stands in {first.name} and, with other values, in {second.name}"):
            load(sharded, device="cpu")
