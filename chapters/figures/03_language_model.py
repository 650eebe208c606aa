"""Draws the figures of chapter 3: `python chapters/figures/03_language_model.py`.

03_bpe.svg from SmolLM2's merges, 03_windows.svg by hand; 03_training.svg, 03_bits.svg and 03_sampling.svg from
benchmarks/results/.
"""

import math
from itertools import pairwise

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle
from style import look, save

from minillm.learn import COLORS
from minillm.learn.excerpts import results
from minillm.model.tokenizer import BYTE_TO_CHAR, Tokenizer
from minillm.model.weights import model_path

BLUE, _, RED, _, _ = COLORS
GRAY, LIGHT, PALE = "#666666", "#eef3f9", "#d9d9d9"
look(11)


def merge_history(tokenizer: Tokenizer, word: str) -> tuple[list[bytes], list[tuple[int, int, int, int]]]:
    """The bytes of `word`, and each join as (rank, first byte, byte between the two, last byte + 1), in order."""
    data = word.encode()
    ids = [tokenizer.encode(BYTE_TO_CHAR[b] if b != 0x20 else " ")[0] for b in data]
    spans = [(i, i + 1) for i in range(len(data))]
    joins = []
    while True:
        known = [(tokenizer._merges[a, b], i) for i, (a, b) in enumerate(pairwise(ids)) if (a, b) in tokenizer._merges]
        if not known:
            return [data[a:b] for a, b in spans], joins
        (rank, new_id), i = min(known, key=lambda item: (item[0][0], item[1]))
        joins.append((rank, spans[i][0], spans[i][1], spans[i + 1][1]))
        ids[i : i + 2] = [new_id]
        spans[i : i + 2] = [(spans[i][0], spans[i + 1][1])]


def bpe() -> None:
    """How SmolLM2 joins a word: a tree over its bytes, each join with its rank."""
    tokenizer = Tokenizer.from_pretrained(model_path("smollm2-135m-instruct"))
    word = " unbelievably"
    tokens, joins = merge_history(tokenizer, word)
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode(word)] == tokens
    figure, ax = plt.subplots(figsize=(10.5, 4.6))
    height = {(i, i + 1): 0.0 for i in range(len(word))}
    center = {(i, i + 1): i + 0.5 for i in range(len(word))}
    for number, (rank, a, b, c) in enumerate(joins, 1):
        left, right = (a, b), (b, c)
        y = max(height[left], height[right]) + 1.0
        for part in (left, right):
            ax.plot([center[part]] * 2, [height[part] + 0.28, y], color=GRAY, lw=1.2, zorder=1)
        ax.plot([center[left], center[right]], [y, y], color=GRAY, lw=1.2, zorder=1)
        height[a, c], center[a, c] = y, (center[left] + center[right]) / 2
        text = f"{number}. {word[a:c].replace(' ', '␣')}\nrank {rank:,}"
        ax.text(center[a, c], y, text, ha="center", va="center", fontsize=8.5, color=BLUE, zorder=3,
                bbox={"boxstyle": "round,pad=0.25", "fc": LIGHT, "ec": BLUE, "lw": 0.8})  # fmt: skip
    for i, character in enumerate(word):
        ax.text(
            i + 0.5, 0, character.replace(" ", "␣"), ha="center", va="center", fontsize=14, family="DejaVu Sans Mono"
        )
    end = 0
    for token in tokens:
        ax.add_patch(
            FancyBboxPatch((end + 0.1, -1.15), len(token) - 0.2, 0.55, boxstyle="round,pad=0.02", fc=RED, ec="none")
        )
        ax.text(end + len(token) / 2, -0.87, token.decode().replace(" ", "␣"), ha="center", va="center", color="white",
                fontsize=12, family="DejaVu Sans Mono")  # fmt: skip
        end += len(token)
    ax.set_xlim(-0.3, len(word) + 0.3)
    ax.set_ylim(-1.4, max(height.values()) + 0.7)
    ax.axis("off")
    save(figure, "03_bpe")


def windows() -> None:
    """Which window scores which token: stride = window, and stride = window / 2."""
    count, window = 17, 8
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4))
    for ax, stride, title in zip(axes, (8, 4), ("stride 8 = window", "stride 4 = half a window"), strict=True):
        scored, row = 0, 0
        for begin in range(0, count - 1, stride):
            end = min(begin + window, count - 1)
            y = -row
            ax.add_patch(Rectangle((begin - 0.5, y - 0.38), end - begin, 0.76, fc="none", ec=GRAY, lw=1.2))
            for i in range(begin, end):
                ax.text(i, y, str(i), ha="center", va="center", fontsize=8.5, color=GRAY)
            for i in range(scored + 1, end + 1):
                ax.add_patch(Rectangle((i - 0.44, y - 0.86), 0.88, 0.44, fc=BLUE, ec="none"))
                ax.text(i, y - 0.65, str(i), ha="center", va="center", fontsize=8, color="white")
            scored, row = end, row + 1.45
            if end == count - 1:
                break
        ax.set_title(title, fontsize=11)
        ax.set_xlim(-0.8, count - 0.2)
        ax.set_ylim(-5.35, 0.7)
        ax.axis("off")
    axes[0].text(-0.5, -4.4, "box: the tokens that the model reads", fontsize=9.5, color=GRAY, va="center")
    axes[0].text(-0.5, -5.0, "blue: the tokens that this window scores", fontsize=9.5, color=BLUE, va="center")
    save(figure, "03_windows")


def training() -> None:
    """Loss on training and held-out text while the small model learns."""
    r = results("chapter_03")["training"]
    curve = r["curve"]
    figure, ax = plt.subplots(figsize=(8, 3.9))
    ax.plot(
        curve["step"], curve["train"], color=GRAY, marker="o", ms=4, label="training text (mean of the last 40 steps)"
    )
    ax.plot(curve["step"], curve["held out"], color=BLUE, marker="o", ms=4, label="held-out topics")
    floor = r["scores"]["unigram"]["cross_entropy"]
    ax.axhline(floor, color=RED, lw=1.2, ls="--")
    ax.text(curve["step"][-1], floor + 0.06, "token frequencies alone", color=RED, ha="right", va="bottom", fontsize=10)
    ax.set_xlabel("step")
    ax.set_ylabel("cross-entropy, nats a token")
    ax.set_ylim(bottom=min(curve["train"] + curve["held out"]) - 0.3)
    ax.legend(frameon=False)
    save(figure, "03_training")


def bits() -> None:
    """Bits per byte of the held-out text, from knowing nothing to SmolLM2."""
    r = results("chapter_03")
    scores, packed = r["training"]["scores"], r["training"]["compressors"]
    tokens, size = (scores["before"][key] for key in ("tokens", "bytes"))
    fair = math.log2(r["training"]["vocabulary"]) * tokens / size
    rows = [
        ("nothing known: bytes", 8.0, GRAY),
        ("tokens, all equally likely", fair, GRAY),
        ("small model, before training", scores["before"]["bits_per_byte"], GRAY),
        ("token frequencies", scores["unigram"]["bits_per_byte"], GRAY),
        ("bzip2 after the training text", packed["bzip2"], GRAY),
        ("xz after the training text", packed["xz"], GRAY),
        ("small model, trained", scores["small"]["bits_per_byte"], BLUE),
        ("SmolLM2-135M-Instruct", r["smollm2"]["held out"]["bits_per_byte"], RED),
    ]
    rows.sort(key=lambda row: -row[1])
    figure, ax = plt.subplots(figsize=(8.5, 3.4))
    for i, (name, value, color) in enumerate(rows):
        ax.barh(-i, value, color=color, height=0.66)
        ax.text(value + 0.08, -i, f"{value:.2f}", va="center", color=color)
        ax.text(-0.1, -i, name, ha="right", va="center")
    ax.set_xlabel("bits per byte of held-out text")
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_xlim(0, 8.8)
    save(figure, "03_bits")


def sampling() -> None:
    """The same distribution after each method: what is drawn from, of the 24 likeliest tokens."""
    pictures = results("chapter_03")["sampling"]["pictures"]
    prompt, picture = next(iter(pictures.items()))
    own = picture["left"]["temperature 1"]
    figure, axes = plt.subplots(2, 3, figsize=(11.5, 6.4), sharey=True)
    for ax, (name, left) in zip(axes.flat, picture["left"].items(), strict=True):
        positions = range(len(left))
        ax.bar(positions, own, color=PALE, width=0.85)
        ax.bar(positions, left, color=BLUE, width=0.5)
        kept = picture["kept"][name]
        ax.set_title(f"{name}: {kept:,} token{'s' * (kept != 1)}", fontsize=11)
        ax.set_xticks([])
        ax.set_xlim(-0.7, len(left) - 0.3)
        ax.set_yscale("log")
        ax.set_ylim(3e-4, 1.5)
    for ax in axes[1]:
        ax.set_xticks(range(len(own)), [t.replace("\n", "↵").replace(" ", "␣") for t in picture["tokens"]], rotation=90)
        ax.tick_params(axis="x", labelsize=8, length=0)
    for ax in axes[:, 0]:
        ax.set_ylabel("probability (log scale)")
    figure.suptitle(f"“{prompt} …”   gray: the model's own distribution, blue: what is drawn from", fontsize=11.5)
    figure.tight_layout()
    save(figure, "03_sampling")


if __name__ == "__main__":
    bpe()
    windows()
    training()
    bits()
    sampling()
