"""Every chapter has the anatomy of CONTRIBUTING.md, its links and figures resolve, and what it quotes is up to date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.learn import COLORS
from minillm.learn.curriculum import is_draft
from minillm.learn.paths import root, stems

SECTIONS = [
    "At a glance",
    "The problem",
    "The idea",
    "The code",
    "What it costs",
    "Measured",
    "In production",
    "Pitfalls",
    "Check yourself",
    "Exercises",
    "Further reading",
]
DRAFT = pytest.mark.skip(reason="a draft, by its first line")
ALL = [root() / "chapters" / f"{stem}.md" for stem in stems()]
CHAPTERS = [pytest.param(path, marks=DRAFT if is_draft(path.stem) else ()) for path in ALL]
DOCUMENTS = [
    *[p for p in ALL if not is_draft(p.stem)],
    root() / "chapters" / "glossary.md",
    root() / "README.md",
    root() / "CONTRIBUTING.md",
    root() / "CHANGELOG.md",
    root() / "ARCHITECTURE.md",
    root() / "benchmarks" / "NOTES.md",
]
by_stem = pytest.mark.parametrize("path", CHAPTERS, ids=[path.stem for path in ALL])


def prose(text: str) -> str:
    """The words of a chapter: without quoted code, comments, tables, collapsed answers and link targets."""
    for pattern in (r"```.*?```", r"<!--.*?-->", r"<details>.*?</details>", r"\$\$.*?\$\$"):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("|"))
    return re.sub(r"\]\([^)]*\)", "]", text)


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@by_stem
class TestChapter:
    def test_sections_in_order(self, path):
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert re.match(rf"# {int(path.stem[:2])}\. \S", text), "starts with `# N. Title`"
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS

    def test_at_a_glance(self, path):
        part = path.read_text(encoding="utf-8").split("## At a glance")[1].split("\n## ")[0]
        for row in ("Reading", "Lab and exercises", "Difficulty", "Needs", "GPU"):
            assert re.search(rf"^\|\s*\**{row}\**\s*\|\s*\S", part, re.MULTILINE), row

    def test_word_count(self, path):
        words = len(prose(path.read_text(encoding="utf-8")).split())
        assert 1500 <= words <= 3000, words

    def test_quiz(self, path):
        part = path.read_text(encoding="utf-8").split("## Check yourself")[1].split("\n## ")[0]
        assert 4 <= part.count("<details>") == part.count("</details>") <= 6

    def test_excerpts_and_numbers_come_from_cog(self, path):
        text = path.read_text(encoding="utf-8")
        assert text.count("[[[cog") >= 3
        outside = re.sub(r"\[\[\[cog.*?\[\[\[end\]\]\]", "", text, flags=re.DOTALL)
        code = re.findall(r"```python\n(.*?)```", outside, re.DOTALL)
        assert not [c for c in code if re.search(r"^(class|def) ", c, re.MULTILINE)], "package code is quoted by cog"

    def test_measured_numbers_have_provenance(self, path):
        text = path.read_text(encoding="utf-8")
        assert f'provenance("{"chapter_" + path.stem[:2]}"' in text
        assert re.search(r"^\*Measured \d{4}-\d\d-\d\d on ", text, re.MULTILINE)

    def test_figures(self, path):
        figures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
        assert any(target.endswith(".svg") for _, target in figures)
        script = (root() / "chapters" / "figures" / f"{path.stem}.py").read_text(encoding="utf-8")
        for alt, target in figures:
            assert len(alt.split()) >= 4, f"alt text of {target}: say what the figure shows"
            assert (path.parent / target).is_file(), target
            assert Path(target).stem in script, f"{target} is not made by {path.stem}.py"

    def test_links_to_its_parts_and_the_next_chapter(self, path):
        text = path.read_text(encoding="utf-8")
        for target in (
            f"../notebooks/{path.stem}.ipynb",
            f"../exercises/{path.stem}.ipynb",
            f"../solutions/{path.stem}.py",
        ):
            assert f"]({target})" in text, target
        last = text.strip().splitlines()[-1]
        assert re.search(r"\]\([^)]+\)", last), "the last line links to what comes next"

    def test_papers_have_years(self, path):
        part = path.read_text(encoding="utf-8").split("## Further reading")[1]
        items = re.findall(r"^- .+?(?=^- |\Z|^\S)", part, re.MULTILINE | re.DOTALL)
        assert len(items) >= 3
        assert all(re.search(r"\b(19|20)\d\d\b", item) for item in items)


@pytest.mark.parametrize("path", [d for d in DOCUMENTS if d.exists()], ids=lambda p: p.name)
def test_links_and_anchors_resolve(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), target
        if anchor and other.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [slug(h) for h in headings], target


QUOTING = [root() / "README.md", root() / "benchmarks" / "NOTES.md"]


@pytest.mark.parametrize("path", [*CHAPTERS, *QUOTING], ids=[*[p.stem for p in ALL], *[p.stem for p in QUOTING]])
def test_in_step_with_the_code(path):
    """cog would print the same again; `make cog` regenerates."""
    done = subprocess.run(
        [sys.executable, "-m", "cogapp", "-P", "--check", str(path.relative_to(root()))],
        cwd=root(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Amber that can be read as text on white; beside COLORS a figure has grays and pale grounds.
DARK_AMBER = {"#8a5a00", "#8f6100", "#9a6a00"}


def colors_of_its_own(source: str) -> list[str]:
    """Colors of a figure's script that are neither of minillm.learn's five, gray, nor pale."""

    def harmless(color: str) -> bool:
        red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
        return max(red, green, blue) - min(red, green, blue) <= 8 or min(red, green, blue) >= 0xA8

    found = {c.lower() for c in re.findall(r"#[0-9a-fA-F]{6}\b", source)}
    named = re.findall(r"""["'](?:tab:\w+|C\d|red|green|blue|orange|purple|brown|pink|cyan|magenta)["']""", source)
    return sorted(c for c in found if not harmless(c) and c not in {*COLORS, *DARK_AMBER}) + sorted(named)


@pytest.mark.parametrize("path", sorted((root() / "chapters" / "figures").glob("[0-9]*.py")), ids=lambda p: p.stem)
def test_figures_have_colors_that_all_tell_apart(path):
    """Of the five in minillm.learn any two are far enough apart for the color-blind, too: tests/learn/test_pictures."""
    assert colors_of_its_own(path.read_text(encoding="utf-8")) == []


def test_another_color_is_seen():
    assert colors_of_its_own('x = "#C0392B"; y = "tab:green"; z = "#777777", "#fde9d2", "#2a6fdb"') == [
        "#c0392b", '"tab:green"'
    ]  # fmt: skip


GREEK = re.findall(
    r"\w+",
    "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi varphi chi psi"
    " omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell partial nabla",
)


def symbols(math: str) -> set[str]:
    """The letters of a formula: x, \\alpha, \\mathcal V, \\mathbf H; no words, no operators."""
    math = re.sub(r"\\(?:text|mathrm|operatorname|mathtt|texttt|begin|end)\{[^{}]*\}", " ", math)
    fonts = re.findall(r"(\\math(?:cal|bf))\s*\{?\s*([A-Za-z])", math)
    math = re.sub(r"\\math(?:cal|bf)\s*\{?\s*[A-Za-z]", " ", math)
    commands = {f"\\{c}" for c in re.findall(r"\\([A-Za-z]+)", math) if c in GREEK}
    letters = set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", math)))
    return letters | commands | {f"{font} {letter}" for font, letter in fonts}


def formulas(text: str) -> list[str]:
    text = re.sub(r"```.*?```|<!--.*?-->|`[^`\n]*`", " ", text, flags=re.DOTALL)
    return [a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", text, re.DOTALL)]


@by_stem
def test_every_symbol_is_in_the_table(path):
    """The glossary's table of symbols says what each letter of a formula means."""
    rows = (root() / "chapters" / "glossary.md").read_text(encoding="utf-8").split("## Symbols")[1].splitlines()
    known = set().union(*[symbols(f) for row in rows if row.startswith("| $") for f in formulas(row.split("|")[1])])
    used = set().union(*[symbols(f) for f in formulas(path.read_text(encoding="utf-8"))])
    assert used <= known, f"the glossary's table of symbols lacks {', '.join(sorted(used - known))}"


def test_symbols_are_read_off_formulas():
    assert symbols(r"\frac{\partial \ell}{\partial w_i} \cdot \mathbf{H} + \text{softmax}(\mathcal V, x)") == {
        r"\partial", r"\ell", "w", "i", r"\mathbf H", r"\mathcal V", "x"
    }  # fmt: skip
    assert formulas("costs `$x` and $$a\n b$$ or $c$, <!-- $d$ -->") == ["a\n b", "c"]


def test_every_glossary_entry_is_sorted_and_linked():
    text = (root() / "chapters" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE)
    assert len(terms) >= 20
    assert terms == sorted(terms, key=str.lower)
    assert len(set(terms)) == len(terms)
    for stem in stems():
        assert f"]({stem}.md" in text, f"no term of {stem} is in the glossary"
