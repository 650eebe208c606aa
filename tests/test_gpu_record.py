"""The record of the tests that need a GPU: what it says, and whether it was made with the kernels as they are."""

import importlib.util
import json
import os
import shutil
import sys
import warnings

import pytest

from minillm.learn.paths import root


@pytest.fixture(scope="module")
def g():
    """benchmarks/gpu_tests.py; benchmarks/ is no package."""
    folder = str(root() / "benchmarks")
    sys.path.insert(0, folder)
    try:
        spec = importlib.util.spec_from_file_location("bench_gpu_tests", f"{folder}/gpu_tests.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


def test_the_kernels_are_not_newer_than_their_gpu_tests(g):
    """A warning, since who has no GPU cannot mend it; `make deep`, which is for releases, fails."""
    why = g.outdated(g.load_records(), g.digest())
    if why is None:
        return
    message = f"{why}; on a machine with a GPU: python benchmarks/gpu_tests.py"
    if os.environ.get("HYPOTHESIS_PROFILE") == "deep":
        pytest.fail(message)
    warnings.warn(message, stacklevel=1)


def test_any_change_of_the_kernels_shows(g, tmp_path):
    folder = shutil.copytree(g.KERNELS, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    before = g.digest(folder)
    assert before == g.digest()
    (folder / "tuned" / "new.json").write_text("{}")
    assert g.digest(folder) == before  # tuned sizes change no result
    (folder / "swiglu.py").rename(folder / "swiglu2.py")
    renamed = g.digest(folder)
    (folder / "swiglu2.py").rename(folder / "swiglu.py")
    with (folder / "rope.py").open("a") as file:
        file.write(" ")
    assert len({before, renamed, g.digest(folder)}) == 3


def test_counts_are_those_of_pytest(g, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert False\n"
        "@pytest.mark.skip\ndef test_c(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "def test_d(broken): pass\n"
        "def test_e(): pass\n"
    )
    report = tmp_path / "report.xml"
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path), f"--junitxml={report}"]
    quickly = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    assert g.subprocess.run(run, capture_output=True, cwd=tmp_path, env=quickly).returncode == 1
    assert g.counts(report.read_text()) == {"passed": 2, "failed": 2, "skipped": 1}
    for bad in ("", "<testsuites>", '<testsuites><testsuite name="x"/></testsuites>'):
        with pytest.raises(ValueError, match="junit: expected pytest's report"):
            g.counts(bad)


def test_what_a_record_is_worth(g, tmp_path):
    def record(kernels: str, failed: int = 0, date: str = "2026-01-01", passed: int = 5) -> dict:
        provenance = {"device": "GPU", "date": date, "commit": "abc"}
        return {"provenance": provenance, "results": {"kernels": kernels, "passed": passed, "failed": failed}}

    assert "never recorded" in g.outdated([], "k")
    assert g.outdated([record("k")], "k") is None
    assert g.outdated([record("k"), record("old", 3)], "k") is None
    assert "newer than their GPU tests (GPU, 2026-02-02, commit abc: 5 passed, 0 failed)" in g.outdated(
        [record("old"), record("older", date="2026-02-02")], "k"
    )
    assert "failed on a GPU (GPU, 2026-01-01, commit abc: 5 passed, 3 failed)" in g.outdated([record("k", 3)], "k")
    assert "failed on a GPU" in g.outdated([record("k", passed=0)], "k")
    for device in ("a", "b"):
        (tmp_path / device).mkdir()
        (tmp_path / device / "gpu_tests.json").write_text(json.dumps(record(device)))
    assert [one["results"]["kernels"] for one in g.load_records(tmp_path)] == ["a", "b"]
