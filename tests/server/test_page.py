"""The page at `/`: what it is allowed to do, and what it does in Chromium."""

import base64
import hashlib
import json
import re

import pytest

from minillm.server.page import PAGE
from minillm.server.service import ServerConfig

from .conftest import MODEL, until

CHAT = "**/v1/chat/completions"


def test_it_lets_run_what_stands_in_it_and_nothing_else(server):
    answer = server.http.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    rules = dict(rule.split(maxsplit=1) for rule in answer.headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        [inside] = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["connect-src"] == "'self'"


def test_it_asks_nobody_else_and_writes_no_markup():
    text = PAGE.decode()
    assert not re.findall(
        r"https?://|//\w+\.\w|@import|url\(|innerHTML|insertAdjacentHTML|document\.write|eval\(", text
    )
    assert re.findall(r"fetch\((.*?),", text) == ["path"]
    assert set(re.findall(r'ask\("(.*?)"', text)) == {"v1/chat/completions", "v1/models", "metrics"}


# ---- in Chromium -----------------------------------------------------------------------------------------------------


class Opened:
    """The page of a server, and what went wrong on it."""

    def __init__(self, browser, server, **options) -> None:
        self.tab, self.server = browser.new_page(**options), server
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("console", lambda said: said.type == "error" and self.wrong.append(said.text))
        self.tab.goto(f"{server.url}/")

    def until(self, happened: str) -> None:
        """Playwright's own waiting evaluates text in the page, which its policy forbids."""
        until(lambda: self.tab.evaluate(happened))

    def say(self, text: str) -> None:
        """By keyboard alone."""
        self.until("document.activeElement.id === 'prompt'")
        self.tab.keyboard.type(text)
        self.tab.keyboard.press("Enter")

    def ready(self) -> "Opened":
        """Once it knows the model."""
        self.until("document.getElementById('model').options.length")
        return self

    def text(self, selector: str) -> str:
        """Of the last such element, once there is one."""
        return self.tab.locator(selector).last.inner_text()


@pytest.fixture
def opened(browser, request):
    """Open the page of a server; at the end nothing was asked of others, and nothing went wrong."""
    pages: list[Opened] = []

    def opening(server, **options) -> Opened:
        pages.append(Opened(browser, server, **options))
        return pages[-1]

    yield opening
    for page in pages:
        page.tab.close()
        assert all(url.startswith((page.server.url, "data:")) for url in page.asked)
        assert [w for w in page.wrong if "status of" not in w] == []  # a refusal is shown, and Chromium notes it


def events(*pieces: str) -> str:
    chunks = [{"choices": [{"delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


@pytest.mark.browser
def test_a_conversation(opened, server):
    page = opened(server).ready()
    page.tab.fill("#tokens", "6")
    page.tab.focus("#prompt")
    for said in ("not words of the tokenizer", "and again"):
        page.say(said)
        page.tab.wait_for_selector("#send:visible")
        assert page.text("#log .user .said") == said
        assert re.match(r"first token after \d+ ms · [\d.]+ tokens/s · \d+ \+ 6 tokens", page.text("#log .facts"))
        assert page.text("#log .facts").endswith("cut at max tokens")
    assert "of the prompt's in the cache" in page.text("#log .facts")
    sent = page.tab.evaluate("messages.map((one) => one.role)")
    assert sent == ["user", "assistant"] * 2
    page.tab.click("#new")
    assert page.tab.locator("#log .user").count() == 0
    assert page.tab.evaluate("messages") == []


@pytest.mark.browser
def test_what_is_sent(opened, server):
    page, bodies = opened(server).ready(), []
    page.tab.route(CHAT, lambda route: (bodies.append(route.request.post_data_json), route.fulfill(body=events("ok"))))
    page.tab.fill("#system", "Be brief.")
    page.tab.fill("#temperature", "0.3")
    page.tab.fill("#tokens", "9")
    page.tab.focus("#prompt")
    page.say("hello")
    page.tab.wait_for_selector("#send:visible")
    [body] = bodies
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert (body["model"], body["temperature"], body["max_tokens"], body["stream"]) == (MODEL, 0.3, 9, True)


@pytest.mark.browser
def test_what_the_model_says_is_text(opened, server):
    page = opened(server).ready()
    evil = ["<img src=x onerror='window.evil=1'>", "<script>window.evil=1</script>", "&amp; é 🙂 </div>"]
    page.tab.route(CHAT, lambda route: route.fulfill(body=events(*evil)))
    page.say("<b onclick='window.evil=1'>hello</b>")
    page.tab.wait_for_selector("#send:visible")
    assert page.text("#log .assistant .said") == "".join(evil)
    assert page.text("#log .user .said") == "<b onclick='window.evil=1'>hello</b>"
    assert page.tab.evaluate("[...document.querySelectorAll('#log img, #log script, #log b')].length") == 0
    assert page.tab.evaluate("window.evil") is None


@pytest.mark.browser
@pytest.mark.parametrize("how", ["key", "button"])
def test_stop(opened, server, how):
    page = opened(server).ready()
    with server.held() as waits:
        page.say("hello")
        page.tab.wait_for_selector("#log .running")
        until(waits.is_set)
        assert page.text("#log .facts") == "waiting for the first token"
        assert page.tab.get_attribute("#log", "aria-busy") == "true"
        page.tab.keyboard.press("Escape") if how == "key" else page.tab.click("#stop")
        page.tab.wait_for_selector("#send:visible")
    assert page.text("#log .facts") == "stopped"
    assert page.tab.get_attribute("#log", "aria-busy") is None
    assert page.tab.evaluate("document.activeElement.id") == "prompt"


@pytest.mark.browser
def test_errors_are_shown(opened, server):
    page = opened(server).ready()
    page.tab.fill("#tokens", "6")
    page.tab.focus("#prompt")
    page.say("hello" * 200)
    page.tab.wait_for_selector("#log .error")
    assert "expected at most" in page.text("#log .error")
    busy = {"status": 429, "headers": {"Retry-After": "7"}, "json": {"error": {"message": "full"}}}
    page.tab.route(CHAT, lambda route: route.fulfill(**busy))
    page.say("hello")
    page.until("document.querySelectorAll('#log .error').length === 2")
    assert page.text("#log .error") == "full; try again in 7 s"
    page.tab.unroute(CHAT)
    page.say("hello")  # what failed is not sent again
    page.until("document.querySelectorAll('#log .facts').length === 3 && !running")
    assert len(page.tab.evaluate("messages")) == 2


@pytest.mark.browser
def test_a_key(start, opened):
    server = start(ServerConfig(MODEL, api_keys=("secret",)))
    page = opened(server)
    page.tab.wait_for_selector("#key:visible")
    page.tab.fill("#key", "secret")
    page.ready()
    page.tab.focus("#prompt")
    page.say("hello")
    page.tab.wait_for_selector("#log .facts:has-text('tokens/s')")


@pytest.mark.browser
def test_the_engine_is_drawn(opened, server):
    page = opened(server).ready()
    with server.held() as waits:
        page.say("hello")
        until(waits.is_set)
        page.until("document.getElementById('requests').textContent !== '0 / 0'")
    page.until("document.getElementById('requests').textContent === '0 / 0'")
    page.until("history.length > 2")
    paths = page.tab.evaluate("[...document.querySelectorAll('svg path')].map((one) => one.getAttribute('d'))")
    assert len(paths) == 9
    assert all(re.fullmatch(r"M[\d.]+ [\d.]+(L[\d.]+ [\d.]+)+(V29H[\d.]+Z)?", path) for path in paths)
    assert page.text("#hits").endswith("%")


@pytest.mark.browser
def test_narrow_and_dark(opened, server):
    grounds = []
    for scheme in ("light", "dark"):
        page = opened(server, viewport={"width": 400, "height": 800}, color_scheme=scheme).ready()
        assert page.tab.evaluate("document.documentElement.scrollWidth") <= 400
        grounds.append(page.tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        reached = set()
        for _ in range(14):
            page.tab.keyboard.press("Tab")
            reached.add(page.tab.evaluate("document.activeElement.id || document.activeElement.className"))
        assert {"new", "log", "prompt", "send", "model", "system", "temperature", "tokens"} <= reached
    assert grounds[0] != grounds[1]
