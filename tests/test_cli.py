"""The command line: what it prints, its exit status, and errors without a traceback."""

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from minillm.cli import app
from minillm.learn import progress
from minillm.learn.paths import root

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def record(monkeypatch, tmp_path):
    """The learner's own record stays as it is."""
    monkeypatch.setattr(progress, "_file", lambda: tmp_path / "record" / "progress.json")
    (tmp_path / "record").mkdir()


@pytest.mark.slow
def test_generate_streams_an_answer_and_its_speed():
    done = subprocess.run(
        [sys.executable, "-m", "minillm.cli", "generate", "What is the capital of France?", "--max-tokens", "16"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert re.search(r"\[\d+ tokens in [\d.]+ s: [\d.]+ tokens/s", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "x", "--model", "smolm2-135m-instruct"], "did you mean smollm2-135m-instruct"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--max-tokens", "0"], "max_tokens"),
        (["generate", "word " * 9000], "shorten it"),
        (["fetch", "unknown"], "expected one of smollm2-135m-instruct"),
        (["check", "99"], "chapter: expected one of"),
        (["check", "1", "--file", "missing.ipynb"], "no such file"),
        (["bench", "kernel"], "suite: expected one of kernels, engine, tune, got 'kernel'"),
        (["bench", "kernels", "--only", "stream"], "expected with engine"),
    ],
)
def test_errors_are_one_line(arguments, says):
    result = run(app, arguments)
    assert result.exit_code == 1
    assert says in result.output
    assert "Traceback" not in result.output


def test_tuning_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run(app, ["bench", "tune"])
    assert result.exit_code == 1
    assert "tune needs a GPU" in result.output


@pytest.fixture
def nothing_recorded():
    """No file of recorded results is new, changed or gone after the test."""

    def state() -> dict:
        return {path: path.stat().st_mtime for path in (root() / "benchmarks" / "results").rglob("*")}

    before = state()
    yield
    assert state() == before


@pytest.mark.slow
def test_quick_bench_compares_and_records_nothing(nothing_recorded):
    done = subprocess.run(
        [sys.executable, "-m", "minillm.cli", "bench", "kernels", "--quick"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"µs .* of ceiling; peers take torch", done.stdout)) >= 8


@pytest.mark.slow
def test_quick_bench_of_the_engine(nothing_recorded):
    command = [
        sys.executable,
        "-m",
        "minillm.cli",
        "bench",
        "engine",
        "--quick",
        "--only",
        "chat,workload,stream,poisson",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "greedy tokens as the oracle's: 32 requests" in done.stdout
    for line in (
        r"workload +[\d,]+ tokens/s",
        r"stream +[\d,]+ tokens/s",
        r"90%: .* goodput",
        "prefix caching on .* hits [1-9]",
    ):
        assert re.search(line, done.stdout), line


def test_check_on_stubs_and_on_solutions():
    untouched = run(app, ["check", "1"])
    assert untouched.exit_code == 1
    assert "not written yet" in untouched.output
    solved = run(app, ["check", "01", "--file", str(root() / "solutions" / "01_backpropagation.py")])
    assert solved.exit_code == 0, solved.output
    rows = json.loads(run(app, ["progress", "--json"]).output)
    assert all(bool(row["passed_at"]) == (row["chapter"] == "01_backpropagation") for row in rows)
    table = run(app, ["progress"]).output
    assert "1.1" in table
    assert re.search(r"█+░+ \d+ of \d+ exercises", table)


def test_exercises_are_generated():
    assert run(app, ["exercises", "build", "--check"]).exit_code == 0


def test_help_is_quick_to_import():
    """Nothing heavy is imported before a command needs it."""
    code = "import sys, minillm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
