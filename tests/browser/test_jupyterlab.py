"""A reader's first minutes in JupyterLab, in a real Chromium: start page, chapter 1, its lab, a cell, its exercises."""

import os
import re
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.browser
SHOTS = os.environ.get("MINILLM_SCREENSHOTS")  # a folder to save screenshots in


@pytest.fixture(scope="module")
def address(root, tmp_path_factory):
    """`make lab` without a browser of its own: its start page, with the token."""
    log, workspaces = tmp_path_factory.mktemp("jupyter") / "log", tmp_path_factory.mktemp("workspaces")
    flags = "--no-browser --port=0 --port-retries=0"
    with log.open("w") as out:
        server = subprocess.Popen(
            ["make", "lab", f"LAB_FLAGS={flags}"],
            cwd=root,
            env={**os.environ, "JUPYTERLAB_WORKSPACES_DIR": str(workspaces)},  # nothing open from an earlier run
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            found = re.search(r"http://127\.0\.0\.1:\d+/lab\S*\?token=\w+", log.read_text())
            if found:
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        assert found, log.read_text()
        yield found[0]
    finally:
        if server.poll() is None:
            os.killpg(server.pid, 15)
            server.wait(20)


@pytest.fixture(scope="module")
def page(browser, address):
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    page.goto(address)
    page.wait_for_selector(".jp-RenderedMarkdown h1", timeout=60_000)
    return page


def shot(page, name: str) -> None:
    if SHOTS:
        page.wait_for_timeout(1500)
        page.screenshot(path=f"{SHOTS}/{name}.png")


def visible(page, selector: str):
    """The element of the document in front (JupyterLab keeps hidden ones)."""
    return page.locator(f"{selector} >> visible=true").first


def test_start_page_is_rendered(page):
    visible(page, ".jp-RenderedMarkdown h1:has-text('minillm')").wait_for(timeout=60_000)
    visible(page, ".jp-RenderedMarkdown table").wait_for(timeout=60_000)
    shot(page, "start")


def test_chapter_renders_mathematics_and_figures(page):
    visible(page, ".jp-RenderedMarkdown a:text-is('chapter 1')").click()
    visible(page, ".jp-RenderedMarkdown h1:has-text('1.')").wait_for(timeout=60_000)
    visible(page, ".jp-RenderedMarkdown mjx-container, .jp-RenderedMarkdown .MathJax").wait_for(timeout=60_000)
    figure = visible(page, ".jp-RenderedMarkdown img")
    figure.scroll_into_view_if_needed()
    page.wait_for_function("e => e.naturalWidth > 0", arg=figure.element_handle(), timeout=30_000)
    assert "[[[cog" not in visible(page, ".jp-RenderedMarkdown").inner_text()
    shot(page, "chapter")


# The longest line of prose on the page: characters whose boxes share a height, formulas and pictures left out.
LONGEST = """() => {
  let longest = '';
  for (const part of document.querySelectorAll('.jp-RenderedHTMLCommon > p, .jp-RenderedHTMLCommon > ul > li')) {
    if (!part.offsetParent || part.querySelector('mjx-container, img')) continue;
    const lines = {}, walker = document.createTreeWalker(part, NodeFilter.SHOW_TEXT);
    for (let node; node = walker.nextNode();) for (let i = 0; i < node.length; i++) {
      const range = document.createRange();
      range.setStart(node, i); range.setEnd(node, i + 1);
      const box = range.getClientRects()[0];
      if (box) { const at = Math.round(box.bottom / 8); lines[at] = (lines[at] || '') + node.data[i]; }
    }
    for (const line of Object.values(lines)) if (line.length > longest.length) longest = line;
  }
  return longest;
}"""


def test_lines_of_prose_are_short(page):
    visible(page, ".jp-RenderedMarkdown h1:has-text('1.')").wait_for(timeout=60_000)
    longest = page.evaluate(LONGEST)
    assert 50 < len(longest.strip()) <= 90, longest


def test_lab_opens_and_a_cell_runs(page):
    visible(page, ".jp-RenderedMarkdown a[href*='notebooks/01_backpropagation.ipynb']").click()
    cell = visible(page, ".jp-NotebookPanel .jp-CodeCell")
    cell.wait_for(timeout=60_000)
    shot(page, "lab")
    page.wait_for_timeout(3000)  # the kernel connects
    page.keyboard.press("Escape")
    visible(page, ".jp-NotebookPanel .jp-CodeCell .cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.type("print(6 * 7, 'from this kernel')")
    page.keyboard.press("Shift+Enter")
    visible(page, ".jp-OutputArea-output:has-text('42 from this kernel')").wait_for(timeout=60_000)


def test_exercise_opens_from_the_chapter(page):
    page.goto(page.url.split("/lab/")[0] + "/lab/tree/chapters/01_backpropagation.md")
    link = visible(page, ".jp-RenderedMarkdown a[href*='exercises/01_backpropagation.ipynb']")
    link.wait_for(timeout=60_000)
    link.click()
    visible(page, ".jp-NotebookPanel :text('raise NotImplementedError')").wait_for(timeout=60_000)
    shot(page, "exercise")


def test_mermaid_renders(page, root):
    """JupyterLab draws Mermaid diagrams offline."""
    scratch = root / "mermaid-check.tmp.md"
    scratch.write_text("```mermaid\ngraph LR; a[prompt] --> b[token]\n```\n")
    try:
        page.goto(page.url.split("/lab/")[0] + f"/lab/tree/{scratch.name}")
        page.wait_for_selector(
            ".jp-RenderedMermaid img, .jp-RenderedMermaid svg, img[src^='data:image/svg']", timeout=60_000
        )
    finally:
        scratch.unlink()


def test_python_is_this_environment(root):
    assert str(root / ".venv") in sys.prefix or "CI" not in os.environ
