"""The command line: what it prints, its exit status, and errors without a traceback."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from typer.testing import CliRunner

import minillm
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
        (["generate", "x", "--max-model-len", "100000"], "max_model_len: expected 2 to 8192"),
        (["generate", "x", "--max-num-seqs", "0"], "max_num_seqs"),
        (["generate", "x", "--max-num-batched-tokens", "0"], "max_num_batched_tokens"),
        (["generate", "x", "--block-size", "0"], "block_size"),
        (["generate", "x", "--gpu-memory-utilization", "2"], "gpu_memory_utilization"),
        (["generate", "x", "--dtype", "float8"], "dtype"),
        (["generate", "x", "--device", "tpu"], "device"),
        (["fetch", "unknown"], "expected one of smollm2-135m-instruct"),
        (["check", "99"], "chapter: expected one of"),
        (["check", "1", "--file", "missing.ipynb"], "no such file"),
        (["bench", "serve", "--rates", "1,x"], "--rates: expected numbers above 0, as 1,2,4, got '1,x'"),
        (["bench", "serve", "--clients", "0"], "--clients: expected numbers above 0"),
        (["bench", "serve", "localhost:8000"], "url: expected http://host:port, got 'localhost:8000'"),
    ],
)
def test_errors_are_one_line(arguments, says):
    result = run(app, arguments)
    assert result.exit_code == 1
    assert says in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("arguments", [["kernel"], ["kernels", "--only", "stream"]])
def test_a_bench_that_is_none(arguments):
    assert run(app, ["bench", *arguments]).exit_code == 2


@pytest.mark.parametrize(
    ("error", "says", "status"),
    [
        (MemoryError("no room for the cache"), "no room for the cache", 1),
        (MemoryError(), "MemoryError", 1),
        (RuntimeError("CUDA error"), "CUDA error", 1),
        (ImportError("no module named torch"), "no module named torch", 1),
        (PermissionError(13, "Permission denied", "/cache"), "Permission denied: '/cache'", 1),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
@pytest.mark.parametrize("arguments", [["fetch"], ["exercises", "build"], ["progress"], ["check", "1"]])
def test_what_the_library_raises_is_one_line_in_every_command(monkeypatch, arguments, error, says, status):
    def fail(*_, **__):
        raise error

    for name in ("fetch.fetch", "learn.exercises.build", "learn.progress.summary", "learn.checker.check_chapter"):
        monkeypatch.setattr(f"minillm.{name}", fail)
    result = run(app, arguments)
    assert result.exit_code == status
    assert says in result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_a_defect_shows_its_traceback(monkeypatch):
    monkeypatch.setattr("minillm.fetch.fetch", lambda *_, **__: {}["missing"])
    assert isinstance(run(app, ["fetch"]).exception, KeyError)


def test_version_stands_in_one_place():
    assert run(app, ["--version"]).output == f"minillm {minillm.__version__}\n"
    with (root() / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "minillm.__version__"}


def test_fetch_again_reaches_the_library(monkeypatch):
    calls = []
    monkeypatch.setattr("minillm.fetch.fetch", lambda name, again: calls.append((name, again)) or "there")
    assert run(app, ["fetch", "--again"]).output == run(app, ["fetch", "x"]).output == "there\n"
    assert calls == [("smollm2-135m-instruct", True), ("x", False)]


def test_a_terminal_without_the_character(tmp_path):
    """The bars and ticks of `progress` on an ASCII terminal."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code = "import minillm.cli as c; c.app(['progress'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "of" in done.stdout


def test_a_reader_that_leaves():
    """`minillm exercises build --check | head -c 1`"""
    code = "import minillm.cli as c, minillm.learn.exercises as e; e.stale = lambda: ['x' * 99] * 10_000"
    command = [sys.executable, "-c", f"{code}; c.app(['exercises', 'build', '--check'])"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
    assert (errors, process.returncode) == ("", 1)


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


@pytest.mark.slow
def test_quick_bench_of_the_server(nothing_recorded):
    command = [sys.executable, str(root() / "benchmarks" / "serve.py"), "--small", "http", "attacks"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"tiny: \d+ tokens/s of \d+ .* first token after", done.stdout)
    assert re.search(r"tiny: p99 between tokens .* in peace", done.stdout)
    assert set(re.findall(r"^  \S.*? (\d{3}) ", done.stdout, re.MULTILINE)) <= {"400", "404", "413"}


def test_check_on_stubs_and_on_solutions(tmp_path):
    untouched = run(app, ["check", "1"])
    assert untouched.exit_code == 1
    assert "not written yet" in untouched.output
    solutions = root() / "solutions" / "01_backpropagation.py"
    assert run(app, ["check", "01", "--file", str(solutions)]).exit_code == 0
    assert not any(row["passed_at"] for row in json.loads(run(app, ["progress", "--json"]).output))
    mine = shutil.copy(solutions, tmp_path / "mine.py")
    solved = run(app, ["check", "01", "--file", str(mine)])
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
