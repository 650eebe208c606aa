"""check(): verdicts, what a failure says, time and output limits; on a small curriculum of its own."""

import ctypes
import functools
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import numpy as np
import psutil
import pytest
import torch

from minillm.learn import checker as checking
from minillm.learn import exercises, paths, progress
from minillm.learn.isolation import neutral_state

SOURCE = '''
# %% [markdown]
# # Exercises 1

# %%
from minillm.learn import check

# %% [markdown]
# ## Exercise 1.1: add

# %%
def add(a, b):
    """a + b"""
    ### BEGIN SOLUTION
    return a + b
    ### END SOLUTION

# %%
check("1.1", add)

# %% [markdown] tags=["solution"]
# **Why.** Because.
'''
CHECKS = '''
from minillm.learn.testing import exercise, expect_close, expect_equal

@exercise("1.1", "add")
class TestAdd:
    def test_sum(self, impl):
        """the sum of two numbers"""
        expect_close("add(2, 3)", impl(2, 3), 5)

    def test_lists(self, impl):
        """lists are joined"""
        expect_equal("add([1], [2])", impl([1], [2]), [1, 2])
        impl([1], [2])[0] + 1
'''


@pytest.fixture(autouse=True)
def curriculum(tmp_path, monkeypatch):
    for folder, name, text in (
        ("solutions", "01_small.py", SOURCE),
        ("tests/exercises", "test_01_small.py", CHECKS),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert paths.root() == tmp_path
    exercises.build()
    return tmp_path


def test_pass_is_printed_and_remembered(capsys):
    assert checking.check("1.1", lambda a, b: a + b)
    assert capsys.readouterr().out.splitlines() == [
        "✓ 1.1: 2 of 2 contracts hold",
        "  ✓ the sum of two numbers",
        "  ✓ lists are joined",
    ]
    assert progress.load()["1.1"]["contracts"] == 2


def test_failure_shows_expected_got_and_position(capsys):
    assert not checking.check("1.1", lambda a, b: a + b if isinstance(a, int) else [1, 3])
    out = capsys.readouterr().out
    assert "✗ 1.1: 1 of 2 contracts hold" in out
    assert "expected [1, 2]" in out
    assert "got      [1, 3]" in out
    assert "first difference at position 1" in out
    assert progress.load() == {}


def test_stub_is_told_from_a_failure(capsys):
    def add(a, b):
        raise NotImplementedError("Exercise 1.1: add")

    assert not checking.check("1.1", add)
    assert "not written yet" in capsys.readouterr().out


def test_exception_names_the_learners_line(capsys):
    def add(a, b):
        return a + b + undefined_name  # noqa: F821

    checking.check("1.1", add)
    out = capsys.readouterr().out
    assert "your code raised NameError" in out
    assert "in add: return a + b + undefined_name" in out
    assert "\n      with a = " in out


def test_arguments_are_shown_by_dtype_and_shape():
    assert checking._describe(np.zeros((2, 3), np.float32)) == "float32 [2, 3]"
    assert checking._describe(torch.zeros(4)) == "float32 [4]"
    assert checking._describe("x" * 1000).count("...") == 1


def test_unusable_result_is_not_blamed_on_a_line(capsys):
    checking.check(
        "1.1", lambda a, b: a + b if isinstance(a, int) else type("L", (list,), {"__getitem__": None})([1, 2])
    )
    assert "what your code returned could not be used" in capsys.readouterr().out


def test_missing_return_is_named(capsys):
    checking.check("1.1", lambda a, b: None)
    assert "is a `return` missing?" in capsys.readouterr().out


@pytest.mark.parametrize("swallow", [False, True])
def test_endless_loop_is_stopped(capsys, monkeypatch, swallow):
    monkeypatch.setattr(checking, "TIME_LIMIT", 0.2)

    def endless(a, b):
        while True:
            try:
                sum(range(100))
            except Exception:
                if not swallow:
                    raise

    assert not checking.check("1.1", endless)
    assert "does a loop never end" in capsys.readouterr().out


def test_endless_sleep_is_stopped(capsys, monkeypatch):

    monkeypatch.setattr(checking, "TIME_LIMIT", 0.2)
    assert not checking.check("1.1", lambda a, b: time.sleep(60))
    assert "stopped after 0.2 s" in capsys.readouterr().out


@pytest.mark.parametrize("loop", ["bare except", "one call of C"])
def test_what_no_exception_stops_is_killed(capsys, monkeypatch, loop):
    monkeypatch.setattr(checking, "TIME_LIMIT", 0.2)
    monkeypatch.setattr(checking, "GRACE", 0.5)

    def endless(a, b):
        if loop == "one call of C":
            return sum(range(10**12))
        while True:
            try:  # noqa: SIM105
                sum(range(100))
            except:  # noqa: E722
                pass

    assert not checking.check("1.1", endless)
    assert "stopped after 0.2 s: does a loop never end?" in capsys.readouterr().out


def test_where_nothing_can_be_forked(capsys, monkeypatch):
    """macOS, and a GPU in use: in this process, with the limit that a Python loop obeys."""
    monkeypatch.setattr(checking, "TIME_LIMIT", 0.2)
    monkeypatch.setattr(checking, "can_fork", lambda: False)
    assert checking.check("1.1", lambda a, b: a + b)

    def endless(a, b):
        while True:
            pass

    assert not checking.check("1.1", endless)
    assert "stopped after 0.2 s" in capsys.readouterr().out
    assert [o.status for o in checking.check_chapter("1")["1.1"]] == ["missing"]


def test_a_crash_is_told(capsys):

    def overrun(a, b):
        ctypes.memset(1, 0, 1000)

    assert not checking.check("1.1", overrun)
    out = capsys.readouterr().out
    assert "✗ the sum of two numbers\n      your code crashed (SIGSEGV): is memory outside" in out
    assert "in overrun" in out


def test_the_end_of_the_process_is_told(capsys):

    assert not checking.check("1.1", lambda a, b: os._exit(0))
    assert "your code ended the process" in capsys.readouterr().out


def test_what_the_code_starts_does_not_outlive_the_check(tmp_path):

    def starts(a, b):
        started = subprocess.Popen(["sleep", "60"])
        (tmp_path / "pid").write_text(str(started.pid))
        return a + b

    def lives(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # one that nobody has waited for yet is dead
        except psutil.NoSuchProcess:
            return False

    start = time.monotonic()
    assert checking.check("1.1", starts)
    pid = int((tmp_path / "pid").read_text())
    while lives(pid):
        assert time.monotonic() - start < 30, "it lives on, or the check waited for it"
        time.sleep(0.01)
    assert time.monotonic() - start < 30


def _settings():

    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().tolist(),
        sys.getrecursionlimit(),
        np.geterr(),
        list(warnings.filters),
        dict(os.environ),
        os.getcwd(),
        random.getstate(),
    )


def _change_settings():

    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(7)
    sys.setrecursionlimit(200)
    np.seterr(all="raise")
    warnings.simplefilter("error")
    os.environ["LEFT_BEHIND"] = "1"
    os.environ.pop("PATH", None)
    os.chdir("/")
    random.seed(7)


@pytest.mark.parametrize("fork", [True, False])
def test_settings_stay_with_the_code_that_changed_them(monkeypatch, fork):
    if not fork:
        monkeypatch.setattr(checking, "can_fork", lambda: False)
    before = _settings()

    def add(a, b):
        _change_settings()
        return a + b

    assert checking.check("1.1", add)
    assert _settings() == before


@pytest.mark.parametrize("fork", [True, False])
def test_settings_of_the_notebook_do_not_reach_a_check(curriculum, monkeypatch, fork):
    """A cell that set the default dtype, or closed the door to gradients, fails no right answer."""
    if not fork:
        monkeypatch.setattr(checking, "can_fork", lambda: False)

    def add(a, b):
        got = torch.zeros(1).dtype, torch.is_grad_enabled(), np.geterr()["over"]
        if got != (torch.float32, True, "warn"):
            raise ValueError(f"dtype, gradients, overflow: {got}")
        return a + b

    with neutral_state():  # restores what is changed here
        _change_settings()
        os.chdir(curriculum)
        assert checking.check("1.1", add)


def test_display_and_input_in_a_check(capsys):
    assert not checking.check("1.1", lambda a, b: input("a number, please"))
    assert "input() in a check: nobody is there to type" in capsys.readouterr().out


def test_a_function_that_runs_threads_beside_is_checked(request):
    """Threads of torch do not survive a fork: the child works with one."""
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)  # `make test` gives each of its processes one
    x = torch.randn(600, 600)
    x @ x

    def add(a, b):
        (x @ x).softmax(-1).sum()
        return a + b

    assert checking.check("1.1", add)


def test_endless_loop_in_another_thread_is_stopped(monkeypatch):
    """Where there is no SIGALRM (Windows, or not the main thread)."""

    monkeypatch.setattr(checking, "TIME_LIMIT", 0.2)

    def endless(a, b):
        while True:
            pass

    result = []
    thread = threading.Thread(target=lambda: result.extend(checking.run("1.1", endless)))
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert "does a loop never end" in result[0].message


def test_flood_of_output_is_stopped(capsys):
    def flood(a, b):
        while True:
            print("again and again")

    assert not checking.check("1.1", flood)
    out = capsys.readouterr().out
    assert "characters of output" in out
    assert "your code printed:\n        again and again" in out
    assert len(out) < 2000


def test_what_the_code_printed_is_shown_with_a_failure(capsys):
    def add(a, b):
        print("a is", a)
        return

    checking.check("1.1", add)
    assert "your code printed:\n        a is 2" in capsys.readouterr().out


def test_exit_is_no_pass(capsys, curriculum):
    assert not checking.check("1.1", lambda a, b: exit())
    assert "your code called exit()" in capsys.readouterr().out
    notebook = curriculum / "exercises" / "01_small.ipynb"
    notebook.write_text(notebook.read_text().replace("from minillm.learn import check", "raise SystemExit"))
    assert checking.check_chapter("1")["1.1"][0].status != "passed"


def test_wrong_number_of_parameters(capsys):
    checking.check("1.1", lambda a: a)
    assert "could not be called as the stub is" in capsys.readouterr().out


def test_an_endless_loop_costs_one_limit(monkeypatch):
    monkeypatch.setattr(checking, "TIME_LIMIT", 0.2)

    def endless(a, b):
        while True:
            pass

    assert [o.status for o in checking.run("1.1", endless)] == ["stopped"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("def add(a, b):", "def add(a, b)"), "cannot be read: expected ':', in line 1"),
        (("def add(a, b):", "while True: pass\\ndef add(a, b):"), "an endless loop?"),
        (("def add(a, b):", "1 / 0\\ndef add(a, b):"), "raised ZeroDivisionError"),
    ],
)
def test_a_cell_that_fails_is_named(curriculum, monkeypatch, change, says):
    monkeypatch.setattr(checking, "TIME_LIMIT", 0.2)
    notebook = curriculum / "exercises" / "01_small.ipynb"
    text = notebook.read_text()
    assert change[0] in text
    notebook.write_text(text.replace(*change))
    assert says in checking.check_chapter("1")["1.1"][0].message


def test_a_broken_notebook_is_named(curriculum):
    (curriculum / "exercises" / "01_small.ipynb").write_text("")
    with pytest.raises(ValueError, match=r"01_small\.ipynb: not a notebook any more"):
        checking.check_chapter("1")


def test_number_without_quotes():
    with pytest.raises(ValueError, match="in quotes"):
        checking.check(1.1, None)


def test_unknown_number():
    with pytest.raises(ValueError, match=r"expected one of 1\.1"):
        checking.check("1.9", None)
    with pytest.raises(ValueError, match="chapter"):
        checking.check("7.1", None)


def test_chapter_from_the_notebook(curriculum, capsys):
    notebook = curriculum / "exercises" / "01_small.ipynb"
    assert [o.status for o in checking.check_chapter("1")["1.1"]] == ["missing"]
    solved = json.loads(notebook.read_text())
    cell = next(c for c in solved["cells"] if "NotImplementedError" in "".join(c["source"]))
    cell["source"] = ["def add(a, b):\n", "    return a + b\n"]
    notebook.write_text(json.dumps(solved))
    assert [o.status for o in checking.check_chapter("01")["1.1"]] == ["passed", "passed"]
    assert capsys.readouterr().out == "", "the notebook's own check cells stay silent"
    assert "1.1" in progress.load()


def test_notebook_without_the_function(curriculum):
    (curriculum / "mine.py").write_text("x = 1\n")
    assert "defines no `add`" in checking.check_chapter("1", curriculum / "mine.py")["1.1"][0].message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ('import os\\n",\n    "os._exit(3)\\n', "ended the process"),
        ('import ctypes\\n",\n    "ctypes.memset(1, 0, 9)\\n', r"crashed \(SIGSEGV\)"),
        (
            'while True:\\n",\n    "    try: sum(range(9))\\n",\n    "    except: pass\\n',
            "never end|an endless loop",
        ),  # now and then it is interrupted between two tries
        ("sum(range(10**12))\\n", "does a loop never end"),
    ],
)
def test_a_cell_that_ends_or_holds_up_the_process_is_named(curriculum, monkeypatch, change, says):
    monkeypatch.setattr(checking, "TIME_LIMIT", 0.3)
    monkeypatch.setattr(checking, "GRACE", 0.7)
    notebook = curriculum / "exercises" / "01_small.ipynb"
    text = notebook.read_text()
    assert "def add(a, b):" in text
    notebook.write_text(text.replace("def add(a, b):", change + '",\n    "def add(a, b):'))
    message = checking.check_chapter("1")["1.1"][0].message
    assert "01_small.ipynb defines no `add`" in message
    assert re.search(says, message)


def test_a_python_file_that_ends_the_process_is_named(curriculum):
    (curriculum / "mine.py").write_text("import os\nos._exit(0)\n")
    with pytest.raises(ValueError, match=r"mine\.py: your code ended the process"):
        checking.check_chapter("1", curriculum / "mine.py")


def test_torchs_own_error_is_no_stub(capsys):
    def add(a, b):
        raise NotImplementedError("Could not run 'aten::add' on this backend")

    assert not checking.check("1.1", add)
    out = capsys.readouterr().out
    assert "not written yet" not in out
    assert "your code raised NotImplementedError: Could not run" in out


def test_an_error_in_the_reference_is_not_blamed_on_the_learner(curriculum, capsys):
    file = curriculum / "tests" / "exercises" / "test_01_small.py"
    file.write_text(
        file.read_text()
        .replace("impl(2, 3), 5)", "impl(2, 3), json.loads(''))")
        .replace("from", "import json\nfrom", 1)
    )
    assert not checking.check("1.1", lambda a, b: a + b)
    out = capsys.readouterr().out
    assert "an error within the check, raised by no line of yours" in out
    assert "your code raised" not in out


def test_a_kernel_without_its_decorator(curriculum, capsys):
    file = curriculum / "tests" / "exercises" / "test_01_small.py"
    file.write_text(file.read_text().replace("impl(2, 3)", "impl[(1,)](2, 3)"))
    checking.check("1.1", lambda a, b: a + b)
    assert "is `@triton.jit` missing" in capsys.readouterr().out


def test_what_is_marked_last_waits_for_the_others(curriculum, capsys):
    file = curriculum / "tests" / "exercises" / "test_01_small.py"
    text = file.read_text().replace("import exercise", "import NOTES, last, exercise")
    text = text.replace("    def test_sum", "    @last\n    def test_sum").replace(
        "impl(2, 3), 5)", "impl(2, 3), 5); NOTES.append('5 of 5')"
    )
    file.write_text(text)
    assert checking.check("1.1", lambda a, b: a + b)
    assert capsys.readouterr().out.splitlines()[1:] == ["  ✓ lists are joined", "  ✓ the sum of two numbers: 5 of 5"]
    assert not checking.check("1.1", lambda a, b: 5)
    out = capsys.readouterr().out
    assert "✗ 1.1: 0 of 2 contracts hold" in out
    assert "  · the sum of two numbers (tried once the others hold)" in out


class TestGenerator:
    def test_stub_and_link(self, curriculum):
        cells = json.loads((curriculum / "exercises" / "01_small.ipynb").read_text())["cells"]
        sources = ["".join(c["source"]) for c in cells]
        assert sources[4] == 'def add(a, b):\n    """a + b"""\n    raise NotImplementedError("Exercise 1.1: add")'
        assert "[Solution 1.1, and why](../solutions/01_small.py)" in sources[-1]
        assert not any("Because" in s or "a + b\n" in s for s in sources)

    def test_stale_is_seen_and_rebuilt(self, curriculum):
        source = curriculum / "solutions" / "01_small.py"
        source.write_text(source.read_text().replace("# Exercises 1", "# Exercises one"))
        assert [p.name for p in exercises.stale()] == ["01_small.ipynb"]
        written, kept = exercises.build()
        assert (len(written), kept, exercises.stale()) == (1, [], [])

    def test_a_learners_work_is_kept(self, curriculum):
        notebook = curriculum / "exercises" / "01_small.ipynb"
        notebook.write_text(notebook.read_text().replace("raise NotImplementedError", "return 5 # "))
        written, kept = exercises.build()
        assert (written, kept) == ([], [notebook])
        assert exercises.build(force=True) == ([notebook], [])

    def test_orphan_is_seen(self, curriculum):
        (curriculum / "exercises" / "02_gone.ipynb").write_text("{}")
        assert [p.name for p in exercises.stale()] == ["02_gone.ipynb"]

    @pytest.mark.parametrize(
        ("source", "error"),
        [
            (SOURCE.replace("    ### END SOLUTION\n", ""), "without"),
            (SOURCE.replace("    ### BEGIN SOLUTION\n", ""), "unbalanced"),
            (SOURCE.replace("## Exercise 1.1: add", "## Something"), "before the first"),
        ],
    )
    def test_bad_markers(self, source, error):
        with pytest.raises(ValueError, match=error):
            exercises.render(source, "01_small")

    def test_region_at_the_margin_vanishes(self):
        source = textwrap.dedent("""
            # %% [markdown]
            # ## Exercise 1.1: add

            # %%
            ### BEGIN SOLUTION
            import secret
            ### END SOLUTION
            x = 1
            """)
        assert "secret" not in exercises.render(source, "01_small")
        assert "NotImplementedError" not in exercises.render(source, "01_small")


class TestProgress:
    def test_moves_with_the_folder(self, curriculum, monkeypatch, tmp_path_factory):
        checking.check("1.1", lambda a, b: a + b)
        moved = tmp_path_factory.mktemp("elsewhere") / "moved"
        curriculum.rename(moved)
        monkeypatch.chdir(moved)
        assert progress.summary()[0]["passed_at"]

    def test_damaged_record_is_set_aside(self, curriculum, capsys):
        (curriculum / ".minillm").mkdir()
        (curriculum / ".minillm" / "progress.json").write_text('{"passed": ')
        assert progress.load() == {}
        assert "damaged" in capsys.readouterr().out
        assert (curriculum / ".minillm" / "progress.damaged1.json").exists()

    def test_a_second_damaged_record_does_not_overwrite_the_first(self, curriculum):
        (curriculum / ".minillm").mkdir()
        for text in ("one", "[]", '{"passed": 3}'):
            (curriculum / ".minillm" / "progress.json").write_text(text)
            assert progress.load() == {}
        assert len(list((curriculum / ".minillm").glob("progress.damaged*.json"))) == 3

    def test_where_nothing_can_be_written_a_line_says_so_once(self, curriculum, capsys, monkeypatch):
        monkeypatch.setattr(progress, "_said", set())
        (curriculum / ".minillm").write_text("in the way, as a folder that is read-only would be")
        for _ in range(2):
            assert checking.check("1.1", lambda a, b: a + b)
        assert capsys.readouterr().out.count("not recorded") == 1
        assert progress.load() == {}

    def test_a_full_disk_leaves_nothing_behind(self, curriculum, capsys, monkeypatch):
        monkeypatch.setattr(progress, "_said", set())
        progress.remember("1.1", 2)
        before = progress.load()

        def full(self, *_, **__):
            self.touch()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.write_text", full)
        progress.remember("1.2", 2)
        assert "No space left" in capsys.readouterr().out
        assert progress.load() == before
        assert sorted(p.name for p in (curriculum / ".minillm").iterdir()) == ["lock", "progress.json"]

    def test_several_at_once(self, curriculum):
        code = "import sys; from minillm.learn import progress\n"
        code += "for i in range(20): progress.remember(f'{sys.argv[1]}.{i}', 1)"
        runs = [subprocess.Popen([sys.executable, "-c", code, str(n)], cwd=curriculum) for n in range(1, 4)]
        assert [run.wait() for run in runs] == [0, 0, 0]
        assert len(progress.load()) == 60

    def test_first_pass_stays(self):
        progress.remember("1.1", 2)
        first = progress.load()["1.1"]
        progress.remember("1.1", 3)
        assert progress.load()["1.1"] == first
