"""`doctor --room`: one line, whatever is wrong, and a code that differs where machines do."""

import re
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from minillm.cli import app
from minillm.learn import doctor, room


@pytest.fixture(autouse=True)
def well(monkeypatch, smollm_path):
    """A machine on which all is well, whatever this one is like."""
    monkeypatch.setattr(doctor, "MIN_DISK_GB", 0.0)
    monkeypatch.setattr(doctor, "MIN_MEMORY_GB", 0.0)
    return monkeypatch


def said(status: int) -> str:
    result = CliRunner().invoke(app, ["doctor", "--room"])
    assert result.exit_code == status, result.output
    (line,) = result.output.splitlines()
    return line


def test_all_is_well():
    assert re.fullmatch(
        r"OK: Python 3\.\d+\.\d+\S*, torch \d\S*, model there, code (\w{4})-[0-9a-f]{4}(, \d+ files changed)?", said(0)
    )


def test_the_first_that_fails_and_what_to_do(well, tmp_path):
    well.setenv("MINILLM_CACHE", str(tmp_path))
    line = said(1)
    assert line.startswith("FAIL model: smollm2-135m-instruct is not in")
    assert "minillm fetch" in line
    assert "model missing, code" in line


def test_without_torch(well):
    def version(name):
        if name == "torch":
            raise room.PackageNotFoundError(name)
        return real(name)

    def examine(model):
        raise ModuleNotFoundError("No module named 'torch'")

    real = room.version
    well.setattr(room, "version", version)
    well.setattr(doctor, "examine", examine)
    assert said(1).startswith("FAIL torch: not installed, `make setup` installs it. Python")


def test_what_nobody_thought_of(well):
    def examine(model):
        raise OSError("driver\nlost")

    well.setattr(doctor, "examine", examine)
    assert said(1).startswith("FAIL OSError: driver. Python")


def test_the_code_of_the_environment(well):
    """Another package, and another Python, make another code; a build tag does not."""
    names, real = room._names(), room.version
    assert "torch" in names
    assert not {"triton", "playwright", "minillm"} & set(names), "what not every system has"
    before = room._environment()
    well.setattr(room, "version", lambda name: real(name).partition("+")[0] + "+cu126")
    assert room._environment() == before
    well.setattr(room, "version", lambda name: "0.0.1" if name == "numpy" else real(name))
    assert room._environment() != before
    well.undo()
    well.setattr(room.platform, "python_version_tuple", lambda: ("3", "99", "0"))
    assert room._environment() != before


def test_the_code_of_the_commit(well, tmp_path):
    """What is not committed is counted, but for the folders that people work in; without git a word stands there."""
    if not shutil.which("git"):
        pytest.skip("no git")
    well.setattr(room, "root", lambda: tmp_path)
    assert room._commit() == "none"
    for folder in ("solutions", "exercises", "notebooks"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert (room._commit(), room._changed()) == (head[:4], 0)
    for folder in ("exercises", "notebooks"):
        (tmp_path / folder / "a").write_text("2")
    assert room._changed() == 0
    (tmp_path / "solutions" / "a").write_text("2")
    assert room._code().endswith(f"code {head[:4]}-{room._environment()}, 1 files changed".removeprefix("code "))
    well.setenv("PATH", "")
    assert (room._commit(), room._changed()) == ("none", 0)


def test_as_a_process():
    done = subprocess.run([sys.executable, "-m", "minillm.cli", "doctor", "--room"], capture_output=True, text=True)
    assert done.returncode == done.stdout.startswith("FAIL")
    assert done.stdout.count("\n") == 1
