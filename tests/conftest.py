"""What all tests share: hypothesis profiles, the real model, and whose implementation the exercise checks look at."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Without a GPU, Triton kernels run in its interpreter; it reads this when a kernel is decorated, so before any import.
if not Path("/proc/driver/nvidia").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# Each of several processes (`make test` has two) takes its share of the cores; OpenMP reads this as torch is imported.
if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))

# How much is drawn: `make quick`, `make test`, `make deep`. A test that says how many examples it takes means those of
# `make test`; `scaled` makes it more or fewer. No deadlines: a slow machine is no defect; timing lives in benchmarks/.
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "full")
SCALES = {"quick": 1 / 3, "full": 1, "deep": 7}
LEAST = 15  # not even `quick` draws fewer, unless a test says so
settings.register_profile("full", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", parent=settings.get_profile("full"), max_examples=LEAST)
settings.register_profile("deep", parent=settings.get_profile("full"), max_examples=700)
settings.load_profile(PROFILE)

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--impl",
        default="solutions",
        help="tests/exercises: check `solutions` (default), `exercises` (your notebooks), or the file PATH",
    )


def scaled(chosen: settings) -> settings:
    """A test's own settings, with as many examples as the profile wants."""
    if chosen.max_examples == settings.default.max_examples:  # it said nothing, and has the profile's already
        return chosen
    return settings(
        chosen, max_examples=max(round(chosen.max_examples * SCALES[PROFILE]), min(chosen.max_examples, LEAST))
    )


def scale_examples(items: list[pytest.Item]) -> None:
    """Every drawn test takes the profile's share of the examples that it asks for."""
    owners = {(item.function, "_hypothesis_internal_use_settings") for item in items if hasattr(item, "function")}
    owners |= {(item.cls, "settings") for item in items if getattr(item, "cls", None)}  # state machines
    for owner, name in owners:
        if isinstance(chosen := getattr(owner, name, None), settings):
            setattr(owner, name, scaled(chosen))


def pytest_terminal_summary(terminalreporter) -> None:
    """A table of what each check of an exercise was held against (test_exercises.py)."""
    passed = [dict(report.user_properties) for report in terminalreporter.stats.get("passed", [])]
    if rows := sorted(properties["four runs"] for properties in passed if "four runs" in properties):
        terminalreporter.write_line("exercise  solution  stub     contracts  wrong refused  alternatives accepted")
        for number, contracts, wrong, alternatives in rows:
            counts = f"{contracts:9}  {wrong:13}  {alternatives:21}"
            terminalreporter.write_line(f"{number:8}  passes    missing  {counts}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    scale_examples(items)
    # These fork often, which takes longer the more the process holds: before any model is loaded.
    items.sort(key=lambda item: item.path.name != "test_exercises.py")
    skip_gpu = pytest.mark.skip(reason="needs a CUDA GPU")
    skip_browser = pytest.mark.skip(reason="run by `make test-browser`")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_gpu)
        if "browser" in item.keywords and "browser" not in (config.getoption("-m") or ""):
            item.add_marker(skip_browser)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    """The converted SmolLM2; fetched when it is not there."""
    from minillm.model.weights import model_path

    return model_path("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm(smollm_path: Path):
    """Our SmolLM2 in fp32 on the CPU."""
    from minillm.model.weights import load

    return load(smollm_path, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def smollm_llm(smollm_path: Path):
    """SmolLM2 behind an engine, for all who take no other options. Its cache may hold what others asked for."""
    from minillm import LLM

    return LLM(smollm_path, device="cpu", max_model_len=512, max_num_batched_tokens=128)


@pytest.fixture(scope="session")
def smollm_reference(smollm_path: Path):
    """transformers' SmolLM2 in fp32 on the CPU: the independent reference."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm_path, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def hf_tokenizer(smollm_path: Path):
    """transformers' tokenizer of SmolLM2: the independent reference."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm_path)


def tiny_directory(folder: Path, tokenizer=None, **changes) -> Path:
    """A model directory of a few kilobytes: random weights, always the same; with `tokenizer`, or ours of 287 tokens.

    The model has 64 more rows than the tokenizer has tokens, as Qwen3's has. changes: of its `ModelConfig`.
    """
    import torch

    from minillm.config import ModelConfig
    from minillm.model import Transformer
    from minillm.model.tokenizer import Tokenizer
    from minillm.model.weights import save

    if tokenizer is None:
        text = "hello world, the quick brown fox. " * 20
        tokenizer = Tokenizer.train(text, 30, ["<|end|>"], eos_token="<|end|>")
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes |= {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 128, "eos_token_ids": (0,)}
    torch.manual_seed(0)
    save(Transformer(ModelConfig(**{"vocab_size": tokenizer.vocab_size + 64, **sizes, **changes})), folder)
    if isinstance(tokenizer, Tokenizer):
        tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory) -> Path:
    """Such a directory; who changes it makes a copy."""
    return tiny_directory(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_llm(tiny_path: Path):
    """An LLM of it. Whoever breaks it mends it."""
    from minillm import LLM

    return LLM(tiny_path, device="cpu")


@pytest.fixture(scope="module")
def browser():
    """Chromium, driven by playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=flags)
        yield running
        running.close()
