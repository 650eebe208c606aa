"""Every chapter has the anatomy of CONTRIBUTING.md, its links and figures resolve, and what it quotes is up to date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_every_glossary_entry_is_sorted_and_linked():
    text = (root() / "chapters" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE)
    assert len(terms) >= 20
    assert terms == sorted(terms, key=str.lower)
    assert len(set(terms)) == len(terms)
    for stem in stems():
        assert f"]({stem}.md" in text, f"no term of {stem} is in the glossary"
