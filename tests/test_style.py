"""Lint, format, types and spelling."""

import json
import subprocess
import sys

import pytest

from minillm.learn.paths import root


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["codespell_lib"]],
    ids=["lint", "format", "spelling"],
)
def test_clean(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=root(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_types():
    """mypy, as pyproject.toml configures it."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary"]
    done = subprocess.run(command, cwd=root(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_spelling_of_notebooks(tmp_path):
    """Their text alone: stored images are base64, in which every misspelling occurs."""
    for path in sorted((root() / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        (tmp_path / f"{path.stem}.txt").write_text(
            "\n".join("".join(cell["source"]) for cell in cells), encoding="utf-8"
        )
    command = [sys.executable, "-m", "codespell_lib", str(tmp_path)]
    done = subprocess.run(command, cwd=root(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_large_files_and_nothing_but_this_project():
    """Weights and data never enter git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root(), capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = root() / name
        if path.is_file():
            assert path.stat().st_size <= 2**20, f"{name} is over 1 MiB"
            assert path.suffix not in {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".pkl"}, name
