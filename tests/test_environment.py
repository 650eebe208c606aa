"""The pins are the same wherever they stand, and the two commands' files are what they should be."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from minillm.learn.doctor import read_pins
from minillm.learn.paths import root


def _name(text: str) -> str:
    return text.lower().replace("_", "-")


def _project() -> dict:
    return tomllib.loads((root() / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _direct() -> list[Requirement]:
    """What the package needs, and the extras that `make setup` installs."""
    project, found = _project(), {}
    for requirement in map(Requirement, [*project["dependencies"], *_of_extra("dev")]):
        found.setdefault(_name(requirement.name), requirement)
    return list(found.values())


def _of_extra(extra: str) -> list[str]:
    """With those of the extras that it names: minillm[serve,cache]."""
    found = []
    for text in _project()["optional-dependencies"][extra]:
        requirement = Requirement(text)
        of_others = [one for other in sorted(requirement.extras) for one in _of_extra(other)]
        found += of_others if requirement.name == "minillm" else [text]
    return found


def test_every_dependency_is_pinned_within_its_range():
    pins = read_pins()
    for requirement in _direct() + [Requirement(r) for r in _project()["optional-dependencies"]["browser"]]:
        assert _name(requirement.name) in pins, requirement.name
        assert requirement.specifier.contains(pins[_name(requirement.name)]), requirement.name


def test_conda_has_the_same_pins():
    text = (root() / "environment.yml").read_text(encoding="utf-8")
    conda = {_name(n): v for n, v in re.findall(r"^\s+- ([A-Za-z0-9_.-]+)==([^\s;]+)", text, re.MULTILINE)}
    pins = read_pins()
    assert conda == {_name(r.name): pins[_name(r.name)] for r in _direct()}
    assert re.search(r"^\s+- -e \.$", text, re.MULTILINE)


def test_the_gpu_stack_is_the_tested_pair():
    """torch 2.13.0's CUDA build asks for exactly this Triton; both stay on Linux."""
    assert read_pins()["torch"] == "2.13.0"
    assert read_pins()["triton"] == "3.7.1"
    for file in ("constraints.txt", "environment.yml"):
        line = next(line for line in (root() / file).read_text().splitlines() if "triton==" in line)
        assert "platform_system" in line, file


def test_ranges_admit_the_oldest_supported_stack():
    oldest = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}
    for requirement in _direct():
        if requirement.name in oldest:
            assert requirement.specifier.contains(Version(oldest[requirement.name])), requirement.name


def test_types_ship():
    """Type checkers of whoever imports the package look for the file `py.typed`."""
    data = tomllib.loads((root() / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    assert "py.typed" in data["minillm"]
    assert (root() / "minillm" / "py.typed").is_file()


def test_markdown_opens_as_preview():
    overrides = json.loads((root() / "jupyter" / "overrides.json").read_text(encoding="utf-8"))
    viewers = overrides["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"]
    assert viewers == {"markdown": "Markdown Preview"}


def test_notebooks_have_a_style_sheet_of_their_own():
    """JupyterLab is told to read one, and finds ours behind the reader's own."""
    copied = [line.split()[1:] for line in (root() / "postBuild").read_text().splitlines() if line.startswith("cp ")]
    assert ["jupyter/custom.css", '"$custom/custom.css"'] in copied
    assert ["jupyter/jupyter_lab_config.json", '"$prefix/etc/jupyter/jupyter_lab_config.json"'] in copied
    assert json.loads((root() / "jupyter" / "jupyter_lab_config.json").read_text())["LabApp"]["custom_css"] is True


def test_ci_calls_make_test():
    assert re.search(r"^make test$", (root() / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)


def _make(folder: Path, *words: str) -> subprocess.CompletedProcess:
    shutil.copy(root() / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt", "jupyter/overrides.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    (folder / "postBuild").write_text("")
    # A false Python and pip: the recipes run, and nothing is installed.
    (folder / "bin").mkdir()
    (folder / "bin" / "pip").symlink_to(shutil.which("true"))
    return subprocess.run(["make", "PYTHON=true", "BIN=bin", *words], cwd=folder, capture_output=True, text=True)


class TestEnvironmentFolder:
    """`make` removes a .venv only where it made one itself, and never before a recipe runs."""

    @pytest.mark.parametrize("words", [["-n", "help"], ["help"], ["-n", "setup"], ["setup"], ["clean"], ["-n", "lab"]])
    def test_a_foreign_one_is_left_alone(self, tmp_path, words):
        (tmp_path / ".venv").mkdir()
        (tmp_path / ".venv" / "pyvenv.cfg").write_text("mine")
        done = _make(tmp_path, *words)
        assert [path.name for path in (tmp_path / ".venv").iterdir()] == ["pyvenv.cfg"], done.stdout
        if words == ["setup"]:
            assert done.returncode != 0
            assert "not made by make" in done.stdout

    @pytest.mark.parametrize("words", [["-n", "help"], ["help"], ["-n", "setup"]])
    def test_a_moved_one_is_left_alone_until_setup_runs(self, tmp_path, words):
        (tmp_path / ".venv").mkdir()
        (tmp_path / ".venv" / "home").write_text("/elsewhere")
        (tmp_path / ".venv" / "old").write_text("")
        assert _make(tmp_path, *words).returncode == 0
        assert (tmp_path / ".venv" / "old").exists()

    def test_a_moved_one_is_built_anew(self, tmp_path):
        (tmp_path / ".venv").mkdir()
        for name, text in (("home", "/elsewhere"), ("old", ""), ("ready", "")):
            (tmp_path / ".venv" / name).write_text(text)
        done = _make(tmp_path, "setup")
        assert done.returncode == 0, done.stderr
        assert "building it anew" in done.stdout
        assert (tmp_path / ".venv" / "home").read_text() == str(tmp_path)
        assert not (tmp_path / ".venv" / "old").exists()
        again = subprocess.run(["make", "PYTHON=true", "setup"], cwd=tmp_path, capture_output=True, text=True)
        assert "1/4" not in again.stdout, "one that is ready is not built again"

    def test_clean_removes_its_own(self, tmp_path):
        (tmp_path / ".venv").mkdir()
        (tmp_path / ".venv" / "home").write_text(str(tmp_path))
        assert _make(tmp_path, "clean").returncode == 0
        assert not (tmp_path / ".venv").exists()
