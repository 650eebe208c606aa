"""Guesses in a lab: what is asked, what is shown, what is kept."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from minillm.learn import predict, prediction, progress, reveal

QUESTION = "How many times faster is token 500?"


@pytest.fixture(autouse=True)
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_file", lambda: tmp_path / ".minillm" / "progress.json")
    monkeypatch.setattr(prediction, "_asked", {})
    return tmp_path


def test_number(capsys):
    predict("6.a", QUESTION, guess=8, unit="times")
    assert capsys.readouterr().out == f"6.a  {QUESTION}\n     your guess: 8 times (kept)\n"
    reveal("6.a", 41.26, why="Each step computes one row.")
    assert capsys.readouterr().out.splitlines() == [
        f"6.a  {QUESTION}",
        "     your guess: 8 times",
        "     answer:     41.3 times",
        "     5.16 times too low",
        "     Each step computes one row.",
    ]
    kept = progress.predictions()["6.a"]
    assert (kept["question"], kept["guess"], kept["answer"]) == (QUESTION, 8, 41.26)


def test_without_a_guess_it_runs_through_and_nothing_is_kept(capsys, record):
    for _ in range(2):
        predict("6.a", QUESTION, unit="times")
        assert "write a number (times) in place of None" in capsys.readouterr().out
        reveal("6.a", 41)
        assert capsys.readouterr().out == f"6.a  {QUESTION}\n     answer: 41 times\n"
    assert not (record / ".minillm").exists()


def test_choice(capsys):
    predict("2.b", "What is the floor?", guess="b", choices=["arithmetic", "memory"])
    assert "     (a) arithmetic\n     (b) memory\n     your guess: (b) memory (kept)\n" in capsys.readouterr().out
    reveal("2.b", "b")
    assert "answer:     (b) memory\n     right\n" in capsys.readouterr().out
    reveal("2.b", "a")
    assert "not this time" in capsys.readouterr().out


def test_text(capsys):
    predict("3.a", "Which token comes next?", guess=" Paris")
    reveal("3.a", "paris")
    assert "     right\n" in capsys.readouterr().out
    reveal("3.a", "Lyon")
    assert "compare the two" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("guess", "answer", "says"),
    [
        (100, 100, "right"),
        (101, 100, "close: within 1 %"),
        (91, 100, "close: within 10 %"),
        (200, 100, "2 times too high"),
        (0.5, 2.0, "4 times too low"),
        (-4.0, -2.0, "2 times too low"),
        (-2.0, -4.0, "2 times too high"),
        (0, 5, "5 too low"),
        (-1, 2.5, "3.5 too low"),
        (1, np.float32(4.0), "4 times too low"),
        (1, torch.tensor(2), "2 times too low"),
    ],
)
def test_how_far_off(capsys, guess, answer, says):
    predict("1.a", "How many?", guess=guess)
    reveal("1.a", answer)
    assert capsys.readouterr().out.splitlines()[-1] == f"     {says}"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(174762, "174,762"), (0.000123456, "0.000123"), (12345.678, "12,346"), (3.0, "3"), (1e30, "1e+30"), (True, "yes")],
)
def test_form_of_numbers(capsys, value, shown):
    predict("1.a", "How many?", guess=value)
    assert f"your guess: {shown} (kept)" in capsys.readouterr().out


def test_first_guess_stays_until_the_question_is_another():
    predict("1.a", "How many?", guess=1)
    predict("1.a", "How many?", guess=2)
    assert progress.predictions()["1.a"]["guess"] == 1
    predict("1.a", "How many bytes?", guess=3)
    assert progress.predictions()["1.a"]["guess"] == 3
    progress.remember("1.1", 2)
    assert set(progress.predictions()) == {"1.a"}
    assert set(progress.load()) == {"1.1"}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: predict("6.1", "q"), "key: expected"),
        (lambda: predict(6, "q"), "key: expected"),
        (lambda: predict("6.a", "q", guess="many", unit="B"), "guess: expected a number of B, got 'many'"),
        (lambda: predict("6.a", "q", guess=float("nan")), "guess: expected a number, got nan"),
        (lambda: predict("6.a", "q", guess="c", choices=["x", "y"]), "guess: expected one of a, b, in quotes"),
        (lambda: predict("6.a", "q", choices=["x"]), "choices: expected 2 to 26"),
        (lambda: predict("6.a", "q", choices="xyz"), "choices: expected 2 to 26"),
        (lambda: reveal("6.a", 3), "key: no question '6.a' was asked"),
        (lambda: (predict("6.a", "q", unit="B"), reveal("6.a", "x")), "answer: expected a number of B"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_in_a_notebook_an_answer_that_nobody_guessed_is_folded_away(tmp_path):
    """In a process of its own, as the kernel's settings stay in a process."""
    ask = "predict('6.a', 'How <many>?', guess={}, unit='B')"
    cells = ["from minillm.learn import predict, reveal", ask.format(None), "reveal('6.a', 5, 'Because.')"]
    cells += [ask.format(4), "reveal('6.a', 5)"]
    code = f"""
import json, nbclient, nbformat
book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in {cells!r}])
nbclient.NotebookClient(book, timeout=60, kernel_name="python3").execute()
print(json.dumps([c.outputs for c in book.cells]))
"""
    for name in ("solutions", "tests/exercises"):
        (tmp_path / name).mkdir(parents=True)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    outputs = json.loads(done.stdout.splitlines()[-1])
    folded, opened = outputs[2][0]["data"], outputs[4][0]["data"]
    assert folded["text/html"].startswith("<details><summary><b>6.a</b> How &lt;many&gt;?")
    assert "answer: 5 B" in folded["text/plain"]
    assert "details" not in opened["text/html"]
    assert "<td>4 B</td>" in opened["text/html"]
    assert json.loads((tmp_path / ".minillm" / "progress.json").read_text())["predictions"]["6.a"]["answer"] == 5
