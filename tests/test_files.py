"""Folders that appear whole or not at all, modes, and where the cache is."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from minillm import files
from minillm.kernels import common


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


class TestAtomicDirectory:
    def test_replaces(self, tmp_path):
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "old").touch()
        with files.atomic_directory(tmp_path / "d") as folder:
            (folder / "new").touch()
            assert names(tmp_path / "d") == ["old"], "the old one stays until the new one is complete"
        assert names(tmp_path / "d") == ["new"]
        with pytest.raises(RuntimeError), files.atomic_directory(tmp_path / "d") as folder:
            raise RuntimeError
        assert names(tmp_path) == ["d"]
        assert names(tmp_path / "d") == ["new"]

    def test_keeps_what_is_complete(self, tmp_path):
        with files.atomic_directory(tmp_path / "d", keep="done") as folder:
            (folder / "mine").touch()
            (tmp_path / "d").mkdir()
            (tmp_path / "d" / "done").touch()
        assert names(tmp_path / "d") == ["done"]
        assert names(tmp_path) == ["d"]

    def test_many_at_once_all_succeed(self, tmp_path):
        errors, gate = [], threading.Barrier(8)

        def one(k):
            try:
                for i in range(20):
                    with files.atomic_directory(tmp_path / "d") as folder:
                        (folder / "a").write_text(f"{k} {i}")
                        if i == 0:
                            gate.wait()
            except OSError as error:
                errors.append(error)

        each = [threading.Thread(target=one, args=(k,)) for k in range(8)]
        [thread.start() for thread in each]
        [thread.join() for thread in each]
        assert not errors
        assert names(tmp_path) == ["d"]
        assert names(tmp_path / "d") == ["a"]

    def test_what_stood_there_comes_back_when_the_rename_fails(self, tmp_path, monkeypatch):
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "old").touch()
        rename = Path.rename

        def failing(self, target):
            if (self / "new").exists():
                raise PermissionError(13, "no")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(PermissionError), files.atomic_directory(tmp_path / "d") as folder:
            (folder / "new").touch()
        assert names(tmp_path) == ["d"]
        assert names(tmp_path / "d") == ["old"]

    def test_a_file_is_not_replaced(self, tmp_path):
        (tmp_path / "d").write_text("precious")
        expected = pytest.raises(NotADirectoryError, match="expected a directory or nothing, got a file")
        with expected, files.atomic_directory(tmp_path / "d"):
            pass
        assert (tmp_path / "d").read_text() == "precious"

    def test_through_a_link(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        with files.atomic_directory(tmp_path / "link") as folder:
            (folder / "new").touch()
        assert (tmp_path / "link").is_symlink()
        assert names(tmp_path / "real") == ["new"]

    @pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
    def test_modes(self, tmp_path, mask, file, folder):
        before = os.umask(mask)
        try:
            with files.atomic_directory(tmp_path / "d") as place:
                files.write_json(place / "a.json", {"é": 1})
                files.write_tensors(place / "a.safetensors", {"a": torch.ones(2)})
                files.write_tensors(place / "a.safetensors", {"a": torch.ones(3)})
        finally:
            os.umask(before)
        assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "d").iterdir()} == {file}
        assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == folder
        assert json.loads((tmp_path / "d" / "a.json").read_text(encoding="utf-8")) == {"é": 1}
        assert names(tmp_path / "d") == ["a.json", "a.safetensors"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/a/b", "/a/b"),
        ("~/models", "{home}/models"),
        ("models", "{home}/models"),
        ("./m", "{home}/m"),
        ("~", "{home}"),
    ],
)
def test_the_cache_is_one_folder(monkeypatch, tmp_path, value, expected):
    """Wherever a program starts, and also where no shell expands the ~."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MINILLM_CACHE", value)
    monkeypatch.chdir(tmp_path)
    expected = Path(expected.format(home=tmp_path / "home"))
    assert files.cache_dir() == expected
    assert common.tuned_folder() == expected / "tuned"
    assert names(tmp_path) == []


def test_the_cache_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILLM_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_dir().is_absolute()
    assert files.cache_dir().name == "minillm"
