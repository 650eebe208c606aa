"""The package alone: its wheel, built and installed, runs with what it says it needs, and says what the rest needs.

Nothing is downloaded: the new environment sees this one's packages through a folder of links, and of them only those
that the wheel's metadata asks for, with all that they ask for. `.ci/wheel` does the same from nothing.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
import venv
import zipfile
from collections.abc import Mapping
from email.parser import Parser
from functools import cache
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import minillm
from minillm.extras import require
from minillm.learn.paths import root

from .test_gates import FILES


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root() / name, folder)
    shutil.copytree(root() / "minillm", folder / "minillm", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [found] = (folder / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def closure(texts: list[str], extra: str = "") -> set[str]:
    """Names of the distributions that these requirements bring, with those that they bring in turn."""
    found: set[str] = set()
    waiting = [(Requirement(text), extra) for text in texts]
    while waiting:
        requirement, asked = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": asked}):
            continue
        if (name := requirement.name.lower().replace("_", "-")) in found and not requirement.extras:
            continue
        found.add(name)
        for of in ("", *requirement.extras):
            waiting += [(Requirement(text), of) for text in distribution(name).requires or []]
    return found - {"minillm"}


def link(names: set[str], folder: Path) -> None:
    """Links to what these distributions have installed."""
    folder.mkdir()
    for name in names:
        found = distribution(name)
        for top in {Path(file).parts[0] for file in found.files or []} - {"..", "__pycache__", "bin"}:
            source = Path(str(found.locate_file(top)))
            if source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)


class Installed:
    """An environment with the wheel and what it needs, and nothing else."""

    def __init__(self, folder: Path, wheel: Path, needs: list[str]) -> None:
        self.needs, self.folder = needs, folder
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        self.bin = folder / "venv" / "bin"
        install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python")]
        subprocess.run([*pip, *install], check=True, env=self.environment())
        link(closure(needs), folder / "packages")
        site = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
        (Path(site) / "packages.pth").write_text(str(folder / "packages"))
        self.elsewhere = folder / "elsewhere"  # no checkout around it
        self.elsewhere.mkdir()

    def environment(self, extra: str = "", **more: str) -> dict[str, str]:
        """With an extra: its packages beside the others."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        if extra:
            packages = self.folder / extra
            if not packages.is_dir():
                link(closure(self.needs, extra) - closure(self.needs), packages)
            kept["PYTHONPATH"] = str(packages)
        return kept | more

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        """`minillm ...`, or another program of the environment."""
        program, *rest = command if command[0] == "python" else ("minillm", *command)
        return subprocess.run(
            [str(self.bin / program), *rest], cwd=self.elsewhere, capture_output=True, text=True, timeout=300,
            env=self.environment(**environment),
        )  # fmt: skip

    def out(self, *command: str, **environment: str) -> str:
        done = self.run(*command, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel, metadata) -> Installed:
    return Installed(tmp_path_factory.mktemp("alone"), wheel, metadata.get_all("Requires-Dist"))


# ---- what is in it --------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_its_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {p.relative_to(root()).as_posix() for p in (root() / "minillm").rglob("*") if p.is_file()}
    assert {name for name in names if name.startswith("minillm/")} == {p for p in package if "__pycache__" not in p}
    others = {name.partition("/")[0] for name in names} - {"minillm"}
    assert others == {f"minillm-{minillm.__version__}.dist-info"}
    assert any(name.endswith("LICENSE") for name in names)


def test_the_wheel_says_its_version_and_what_it_needs(wheel, metadata):
    assert metadata["Version"] == minillm.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) >= {"serve", "cache", "transformers", "lab", "dev"}


def test_the_changelog_has_this_version():
    """What comes next stands above it, as `Unreleased`."""
    text = (root() / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (\S+)", text, re.MULTILINE)
    assert minillm.__version__ in headings[:2]
    assert headings[0] in ("Unreleased", minillm.__version__)


def _imports(path: Path) -> set[str]:
    """The packages of others that a file imports, wherever in it; not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    left_out = {id(inner) for block in typing for inner in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        found |= {name.partition(".")[0] for name in names}
    return found - sys.stdlib_module_names - {"minillm"}


@cache
def _owners() -> Mapping[str, list[str]]:
    return packages_distributions()


def _asks(path: Path) -> str:
    """Of which extra a file, or the package that it is part of, says that it needs it."""
    texts = [p.read_text(encoding="utf-8") for p in (path, path.parent / "__init__.py")]
    return " ".join(re.findall(r'^ *require\("(\w+)"', "\n".join(texts), re.MULTILINE))


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_what_is_imported_is_required_or_asked_for(path, metadata):
    needed = {""} | set(_asks(path).split()) | ({"lab", "dev"} if path.parent.name == "learn" else set())
    allowed = set()
    for text in metadata.get_all("Requires-Dist"):
        requirement = Requirement(text)
        extra = re.search(r'extra == "(\w+)"', str(requirement.marker or ""))
        if (extra[1] if extra else "") in needed:
            allowed.add(requirement.name.lower().replace("_", "-"))
    brought = closure(metadata.get_all("Requires-Dist"), "lab") if path.parent.name == "learn" else set()
    for module in _imports(path):
        owners = {name.lower().replace("_", "-") for name in _owners().get(module, [module])}
        assert owners & (allowed | brought), (
            f"{path.name} imports {module}: neither required nor asked for by require()"
        )


def test_a_missing_extra_is_named():
    require("serve", "json", "sys")
    with pytest.raises(ImportError, match=r"^nothing_such: not installed, .* pip install 'minillm\[serve\]==\d"):
        require("serve", "json", "nothing_such")


# ---- what it does ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_what_is_required_is_there(installed):
    code = "import importlib.util as u, json; print(json.dumps([bool(u.find_spec(n)) for n in {!r}]))"
    there, absent = ["torch", "tokenizers", "minillm"], ["starlette", "transformers", "sklearn", "matplotlib", "pytest"]
    assert json.loads(installed.out("python", "-c", code.format(there))) == [True] * len(there)
    assert json.loads(installed.out("python", "-c", code.format(absent))) == [False] * len(absent)
    where = installed.out("python", "-c", "import minillm; print(minillm.__file__)")
    assert Path(where).is_relative_to(installed.folder / "venv")


@pytest.mark.slow
def test_it_answers(installed, tiny_path):
    assert installed.out("--version") == f"minillm {minillm.__version__}\n"
    code = f"""
from minillm import LLM, SamplingParams
llm = LLM({str(tiny_path)!r}, device="cpu")
outs = llm.generate(["hello", "world"], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
print([len(out.token_ids) for out in outs])
"""
    assert installed.out("python", "-c", code) == "[5, 5]\n"
    done = installed.run("generate", "hello", "--model", str(tiny_path), "--max-tokens", "5", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    assert "as many" not in installed.out("plan", "llama-3.1-8b", "--rate", "4")


@pytest.mark.slow
def test_it_quantizes(installed, tiny_path, tmp_path):
    target = str(tmp_path / "four")
    few = ["--windows", "2", "--window", "32", "--device", "cpu"]
    assert "MB of weights" in installed.out("quantize", str(tiny_path), "--out", target, "--method", "gptq", *few)
    done = installed.run("generate", "hello", "--model", target, "--max-tokens", "5", "--device", "cpu")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_doctor_asks_for_nothing_of_the_curriculum(installed, tmp_path):
    """Nor for a model that nobody has used yet."""
    findings = json.loads(installed.out("doctor", "--json", MINILLM_CACHE=str(tmp_path)))
    status = {f["name"]: f["status"] for f in findings}
    assert status["torch"] == "OK"
    assert status["[serve]"] == status["[transformers]"] == status["model"] == "SKIP"
    said = json.dumps(findings).replace(str(installed.folder), "").replace(str(tmp_path), "")
    assert "pip install 'minillm[serve]==" in said
    assert not re.search(r"jupyter|pytest|ruff|matplotlib|make |solutions", said, re.IGNORECASE)
    [serve] = [f for f in json.loads(installed.out("doctor", "--json", extra="serve")) if f["name"] == "[serve]"]
    assert serve["status"] == "OK"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["serve", "x"], "pip install 'minillm[serve]=="),
        (["route", "--replica", "http://127.0.0.1:1"], "pip install 'minillm[serve]=="),
        (["bench", "serve"], "pip install 'minillm[serve]=="),
        (["check", "2"], "get minillm's repository, run `make setup` in it"),
        (["progress"], "get minillm's repository"),
        (["exercises", "build", "--check"], "get minillm's repository"),
        (["bench", "kernels", "--quick"], "get minillm's repository"),
    ],
)
def test_what_it_cannot_do_alone_it_says(installed, command, says):
    done = installed.run(*command)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import minillm.server.app", "starlette, uvicorn"),
        ("from minillm.data import digits; digits()", r"minillm[lab]"),
        ("from minillm.learn import use_colors; use_colors()", r"minillm[lab]"),
        ("from minillm.learn import check; check('2.3', print)", "get minillm's repository"),
    ],
)
def test_python_says_so_too(installed, code, says):
    done = installed.run("python", "-c", code)
    assert done.returncode == 1
    assert says in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_with_its_extra_it_serves(installed, tiny_path):
    command = [str(installed.bin / "minillm"), "serve", str(tiny_path), "--port", "0", "--device", "cpu"]
    environment = installed.environment(extra="serve")
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=installed.elsewhere
    ) as server:  # fmt: skip
        address = next(filter(None, (re.search(r"http://[\d.]+:\d+", line) for line in server.stderr)))[0]
        body = json.dumps({"prompt": "hello", "max_tokens": 4, "ignore_eos": True}).encode()
        asked = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        assert json.load(urllib.request.urlopen(asked, timeout=60))["usage"]["completion_tokens"] == 4
        assert b"<html" in urllib.request.urlopen(address, timeout=60).read().lower()
        server.terminate()
        server.stderr.read()


def test_ci_installs_it_from_nothing():
    """.ci/wheel, which the workflow calls, tries every command that the package has alone."""
    script = (root() / ".ci" / "wheel").read_text(encoding="utf-8")
    assert os.access(root() / ".ci" / "wheel", os.X_OK)
    assert ".ci/wheel" in (root() / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    for command in ("--version", "doctor", "plan", "generate", "quantize", "serve", "check"):
        assert re.search(rf"minillm {command}\b" if command[0] != "-" else r"minillm --version", script), command
