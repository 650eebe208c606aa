"""The map of the curriculum: what each chapter builds, and, read off the files, which chapters are there."""

from .paths import root

__all__ = ["PARTS", "chapter_map", "exists", "is_draft", "title_of"]

NAMES = {"gpu": "GPU", "triton": "Triton", "kv": "KV", "gptq": "GPTQ", "lora": "LoRA", "smoothquant": "SmoothQuant"}
# Part -> chapters: (stem, what the reader builds, where it is in minillm)
PARTS: dict[str, list[tuple[str, str, str]]] = {
    "I. Foundations": [
        (
            "01_backpropagation",
            "a reverse-mode autograd engine; a network that reads handwritten digits",
            "`autograd/`",
        ),
        (
            "02_transformer",
            "attention, positions, norms; the real SmolLM2, equal to `transformers`",
            "`config.py` `model/`",
        ),
        (
            "03_language_model",
            "a tokenizer, a small model trained from nothing, sampling, perplexity",
            "`model/tokenizer.py` `sampling.py` `evaluate.py`",
        ),
    ],
    "II. The GPU": [
        ("04_gpu_and_triton", "the roofline; softmax, norm, RoPE, SwiGLU and matmul kernels", "`kernels/`"),
        ("05_flash_attention", "online softmax, tiling, the kernel", "`kernels/flash_attention.py`"),
    ],
    "III. The cache": [
        ("06_kv_cache", "the cache, its memory, its variants", "`cache/contiguous.py` `generate.py`"),
        ("07_paged_attention", "blocks, block tables, prefix caching, the paged kernel", "`cache/`"),
        ("08_continuous_batching", "the scheduler, chunked prefill, preemption, CUDA graphs", "`engine/`"),
    ],
    "IV. Fewer bits": [
        ("09_quantization", "formats, error, round-to-nearest, quantization-aware training", "`quant/`"),
        ("10_gptq", "second-order rounding, packed int4 and its kernel", "`quant/gptq.py`"),
        ("11_smoothquant", "activation outliers, W8A8 and its kernel, an int8 cache", "`quant/smoothquant.py`"),
    ],
    "V. Adapting": [
        ("12_lora", "LoRA, QLoRA, many adapters in one batch", "`adapters/`"),
        ("13_prompting", "templates, few-shot, constrained decoding", "`prompting.py`"),
    ],
    "VI. Production": [
        (
            "14_speculative_decoding",
            "draft and verify, the acceptance rule and its proof, a trained draft head",
            "`engine/speculative.py` `engine/draft_head.py`",
        ),
        ("15_serving", "streaming, admission, back-pressure, routing, answers given again, load tests", "`server/`"),
        ("16_engines_and_scale", "production engines side by side; tensor parallelism", "`distributed/`"),
        ("17_outlook", "what comes next, one small lab each", ""),
    ],
}


def exists(stem: str) -> bool:
    """Whether a chapter is complete: reading, lab, exercises and checks."""
    parts = ("chapters/{}.md", "notebooks/{}.ipynb", "exercises/{}.ipynb", "tests/exercises/test_{}.py")
    return all((root() / part.format(stem)).is_file() for part in parts)


def is_draft(stem: str) -> bool:
    """Whether a chapter says in its first line that it is not finished: `<!-- draft: what is missing -->`."""
    path = root() / "chapters" / f"{stem}.md"
    return path.is_file() and path.read_text(encoding="utf-8").startswith("<!-- draft")


def title_of(stem: str) -> str:
    """A chapter's title, from its stem: "GPU and Triton"."""
    words = [NAMES.get(word, word) for word in stem[3:].split("_")]
    return " ".join([words[0][0].upper() + words[0][1:], *words[1:]])


def chapter_map(prefix: str = "") -> str:
    """The map as a Markdown table, with links to what exists; `prefix` leads from the page to the repository's root."""
    lines = ["| | chapter | you build | in `minillm/` | read · run · solve |", "|---|---|---|---|---|"]
    for part, chapters in PARTS.items():
        lines.append(f"| | **{part}** | | | |")
        for stem, builds, where in chapters:
            links = "planned"
            if exists(stem):
                links = (
                    f"[chapter]({prefix}chapters/{stem}.md) · [lab]({prefix}notebooks/{stem}.ipynb)"
                    f" · [exercises]({prefix}exercises/{stem}.ipynb)"
                ) + (" (draft)" if is_draft(stem) else "")
            lines.append(f"| {int(stem[:2])} | {title_of(stem)} | {builds} | {where} | {links} |")
    return "\n".join(lines)
