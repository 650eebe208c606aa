"""Names, files and what can be wrong with them."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minillm.config import ModelConfig
from minillm.model import Transformer
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
