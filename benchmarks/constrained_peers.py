"""llguidance and xgrammar on the same schemas and instances, where they are installed: what they keep, masks."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
Spread = Callable[[list[float]], dict[str, float]]


class _Tally:
    def __init__(self, encode: Any, end: int) -> None:
        self.names: list[str] = []
        self.compile_ms: list[float] = []
        self.micros: list[float] = []
        self.wrong = self.missed = 0
        self._encode, self._end = encode, end

    def instances(self, row: dict[str, Any], accept: Callable[[list[int], list[float]], bool]) -> None:
        for test in row["tests"]:
            tokens = [*self._encode(json.dumps(test["data"], ensure_ascii=False)), self._end]
            accepted = accept(tokens, self.micros if test["valid"] else [])
            self.wrong += accepted and not test["valid"]
            self.missed += test["valid"] and not accepted

    def results(self, spread: Spread) -> dict[str, Any]:
        return {
            "names": self.names, "kept": len(self.names), "wrong": self.wrong, "missed": self.missed,
            "compile ms": spread(self.compile_ms), "mask us": spread(self.micros),
        }  # fmt: skip


def _encode(tokenizer: Any) -> Any:
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def llguidance(rows: Rows, model: Path, spread: Spread) -> dict[str, Any] | None:
    """Lexer of regex derivatives and an Earley parser, in Rust."""
    try:
        import llguidance as library
        import llguidance.hf
        import llguidance.numpy as masks
    except ImportError:
        return None
    from transformers import AutoTokenizer

    hugging_face = AutoTokenizer.from_pretrained(model)
    tokenizer = library.hf.from_tokenizer(hugging_face)
    bitmask = masks.allocate_token_bitmask(1, tokenizer.vocab_size)
    tally = _Tally(_encode(hugging_face), tokenizer.eos_token)
    for row in rows:
        start = time.thread_time()
        matcher = library.LLMatcher(tokenizer, library.LLMatcher.grammar_from_json_schema(row["schema"]))
        if matcher.is_error():
            continue
        tally.compile_ms.append(1e3 * (time.thread_time() - start))
        tally.names.append(row["name"])

        def accept(tokens: list[int], micros: list[float], matcher: Any = matcher) -> bool:
            matcher.reset()
            for token in tokens:
                start = time.thread_time()
                masks.fill_next_token_bitmask(matcher, bitmask, 0)
                micros.append(1e6 * (time.thread_time() - start))
                if not bitmask[0, token // 32] >> (token % 32) & 1 or not matcher.consume_token(token):
                    return False
            return bool(matcher.is_stopped())

        tally.instances(row, accept)
    return tally.results(spread)


def xgrammar(rows: Rows, model: Path, spread: Spread) -> dict[str, Any] | None:
    """Pushdown automata with masks computed beforehand, in C++."""
    try:
        import xgrammar as library
    except ImportError:
        return None
    from transformers import AutoTokenizer

    hugging_face = AutoTokenizer.from_pretrained(model)
    info = library.TokenizerInfo.from_huggingface(hugging_face)
    compiler = library.GrammarCompiler(info, max_threads=1)
    bitmask = library.allocate_token_bitmask(1, info.vocab_size)
    tally = _Tally(_encode(hugging_face), hugging_face.eos_token_id)
    for row in rows:
        start = time.thread_time()
        try:
            grammar = compiler.compile_json_schema(json.dumps(row["schema"]), any_whitespace=False, strict_mode=False)
        except RuntimeError:
            continue
        tally.compile_ms.append(1e3 * (time.thread_time() - start))
        tally.names.append(row["name"])
        matcher = library.GrammarMatcher(grammar)

        def accept(tokens: list[int], micros: list[float], matcher: Any = matcher) -> bool:
            matcher.reset()
            for token in tokens:
                start = time.thread_time()
                matcher.fill_next_token_bitmask(bitmask)
                micros.append(1e6 * (time.thread_time() - start))
                if not int(bitmask[0, token // 32]) >> (token % 32) & 1 or not matcher.accept_token(token):
                    return False
            return bool(matcher.is_terminated())

        tally.instances(row, accept)
    return tally.results(spread)


PEERS: dict[str, Callable[[Rows, Path, Spread], dict[str, Any] | None]] = {
    "llguidance": llguidance, "xgrammar": xgrammar,
}  # fmt: skip
