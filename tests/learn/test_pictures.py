"""Pictures carry their words, and colors can be told apart."""

import base64
import itertools
import json
import subprocess
import sys

import matplotlib
import numpy as np
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt

from minillm.learn import COLORS, show, use_colors

ALT = 'A line that rises from 0 to 1, "straight" & <even>.'
# Machado, Oliveira and Fernandes, 2009: what the color-blind see, in linear sRGB.
EYES = {
    "all colors": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def _linear(color: str) -> np.ndarray:
    c = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / to_xyz.sum(1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eyes", EYES)
def test_colors_can_be_told_apart(eyes):
    for a, b in itertools.combinations((*COLORS, "#ffffff"), 2):
        apart = np.linalg.norm(_lab(EYES[eyes] @ _linear(a)) - _lab(EYES[eyes] @ _linear(b)))
        assert apart >= 25, f"{a} and {b}: {apart:.0f}"


def test_lines_in_these_colors():
    with plt.rc_context():
        use_colors()
        figure, ax = plt.subplots()
        lines = [ax.plot([0, 1])[0] for _ in COLORS]
        assert [line.get_color() for line in lines] == list(COLORS)
        assert len({str(line.get_linestyle()) + str(line._dash_pattern) for line in lines}) == len(COLORS)
        plt.close(figure)


def test_outside_of_a_notebook(capsys):
    figure, _ = plt.subplots()
    show(figure, alt=ALT)
    assert capsys.readouterr().out == f"[picture: {ALT}]\n"
    assert not plt.fignum_exists(figure.number)


@pytest.mark.parametrize("alt", ["", "   ", "a plot", None])
def test_a_picture_needs_words(alt):
    figure, _ = plt.subplots()
    with pytest.raises(ValueError, match="alt: expected a sentence"):
        show(figure, alt=alt)
    plt.close(figure)


def test_in_a_notebook():
    cell = f"""
import matplotlib.pyplot as plt
from minillm.learn import show
figure, ax = plt.subplots(figsize=(2, 1))
ax.plot([0, 1])
show(figure, alt={ALT!r})
"""
    code = f"""
import json, nbclient, nbformat
book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell({cell!r})])
nbclient.NotebookClient(book, timeout=60, kernel_name="python3").execute()
print(json.dumps(book.cells[0].outputs))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    outputs = json.loads(done.stdout.splitlines()[-1])
    shown = [o["data"] for o in outputs if "data" in o and "text/html" in o["data"]]
    assert len(shown) == 1
    assert not [o for o in outputs if "image/png" in o.get("data", {})], "Jupyter shows it a second time"
    assert 'alt="A line that rises from 0 to 1, &quot;straight&quot; &amp; &lt;even&gt;."' in shown[0]["text/html"]
    data = shown[0]["text/html"].split("base64,")[1].split('"')[0]
    assert base64.b64decode(data).startswith(b"\x89PNG")
