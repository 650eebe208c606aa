"""Constrained decoding on the schemas of MaskBench: what is kept, what is wrong, how long a mask takes.

    python benchmarks/constrained.py maskbench.jsonl.gz [--schemas 100] [--record]

The file is of github.com/guidance-ai/jsonschemabench, a line of JSON a schema: {name, schema, tests: [{valid, data}]}.
Tokens are SmolLM2's. llguidance and xgrammar are measured beside it where they are installed.

kept      the schema is compiled; else it is refused, counted by the keyword that the error names
wrong     an invalid instance is accepted, as `json.dumps` writes it
missed    a valid one is not, with its keys in the schema's order; apart from these: how many are accepted only in that
          order, and how many would be if further properties were allowed where the schema does not speak of them
passed    of all schemas: kept, nothing wrong, nothing missed in the order in which it comes (MaskBench's count)
mask      microseconds of one core for each token of the valid instances; cold: the first time that this schema is
          walked, with what is kept of others; warm: again
"""

import argparse
import collections
import gc
import gzip
import json
import time
from pathlib import Path
from typing import Any

import constrained_peers
import numpy as np
from common import record

from minillm.constrained import FINISHED, Constraint, ConstraintError, Limits, Vocabulary, compile_constraint
from minillm.model.tokenizer_hf import load_tokenizer
from minillm.model.weights import model_path

MODEL = "smollm2-135m-instruct"


def texts(data: Any) -> list[str]:
    """The two spellings of `json.dumps`."""
    return list(dict.fromkeys([json.dumps(data, ensure_ascii=False), json.dumps(data)]))


def accepts(constraint: Constraint, text: str) -> bool:
    state = constraint.walk(constraint.start, text.encode())
    return constraint.accepts(state)


def in_order(data: Any, schema: Any, root: Any, depth: int = 12) -> Any:
    """The instance with its keys in the order in which a schema names them."""
    if depth == 0 or not isinstance(schema, dict):
        return data
    for inner in _beside(schema, root):
        data = in_order(data, inner, root, depth - 1)
    if isinstance(data, dict):
        declared = schema.get("properties", {})
        rest = schema.get("additionalProperties")
        names = [n for n in dict.fromkeys([*declared, *schema.get("required", [])]) if n in data]
        names += [n for n in data if n not in names]
        return {n: in_order(data[n], declared.get(n, rest), root, depth - 1) for n in names}
    if isinstance(data, list):
        items = schema.get("items")
        each = [items[i] if i < len(items) else None for i in range(len(data))] if isinstance(items, list) else None
        return [in_order(one, each[i] if each else items, root, depth - 1) for i, one in enumerate(data)]
    return data


def _beside(schema: dict, root: Any) -> list[Any]:
    found = [one for keyword in ("oneOf", "anyOf", "allOf") for one in schema.get(keyword, [])]
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#"):
        at = root
        for step in reference.split("/")[1:]:
            at = at.get(step, {}) if isinstance(at, dict) else {}
        found.append(at)
    return found


def opened(schema: Any) -> Any:
    """The schema, with further properties wherever it does not speak of them."""
    if isinstance(schema, list):
        return [opened(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: one if key in ("enum", "const", "required") else opened(one) for key, one in schema.items()}
    if isinstance(schema.get("properties"), dict) and isinstance(schema.get("type", "object"), str | list):
        found.setdefault("additionalProperties", True)
    return found


def walk(constraint: Constraint, tokens: list[int], micros: list[float]) -> bool:
    """Whether each token is in its mask; the time of each mask is added to `micros`."""
    state = constraint.start
    for token in tokens:
        start = time.thread_time()
        mask = constraint.allowed(state)
        micros.append(1e6 * (time.thread_time() - start))
        if not mask[token]:
            return False
        state = constraint.advance(state, token)
    return state == FINISHED


class Counts:
    """What was found in all schemas."""

    def __init__(self, vocabulary: Vocabulary, encode: Any) -> None:
        self.vocabulary, self.encode = vocabulary, encode
        self.refused: collections.Counter[str] = collections.Counter()
        self.total: collections.Counter[str] = collections.Counter()
        self.compile_ms: list[float] = []
        self.cold: list[float] = []
        self.warm: list[float] = []
        self.kept: set[str] = set()

    def schema(self, row: dict[str, Any]) -> None:
        start = time.thread_time()
        try:
            constraint = compile_constraint("json", row["schema"], self.vocabulary)
        except ConstraintError as e:
            words = str(e).split(": ")
            self.refused[words[2] if words[0] == "json schema" and len(words) > 3 else words[-1]] += 1
            return
        finally:
            self.compile_ms.append(1e3 * (time.thread_time() - start))
        self.kept.add(row["name"])
        passed = all([self.instance(constraint, row["schema"], test) for test in row["tests"]])
        self.total["passed"] += passed

    def instance(self, constraint: Constraint, schema: Any, test: dict[str, Any]) -> bool:
        """Whether the instance is accepted or refused as it should be, in the order in which it comes."""
        found = [text for text in texts(test["data"]) if accepts(constraint, text)]
        self.total["valid" if test["valid"] else "invalid"] += 1
        if not test["valid"]:
            self.total["wrong"] += bool(found)
            return not found
        plain = bool(found)
        if not found:
            found = [t for t in texts(in_order(test["data"], schema, schema)) if accepts(constraint, t)]
            self.total["accepted only in the schema's order"] += bool(found)
        if found:
            tokens = [*self.encode(found[0]), int(self.vocabulary.end_ids[0])]
            self.total["token not in mask"] += not walk(constraint, tokens, self.cold)
            walk(constraint, tokens, self.warm)
        else:
            self.total["missed"] += 1
            wider = compile_constraint("json", opened(schema), self.vocabulary, Limits(seconds=20))
            found = [t for t in texts(in_order(test["data"], schema, schema)) if accepts(wider, t)]
            self.total["missed for further properties"] += bool(found)
        return plain

    def results(self) -> dict[str, Any]:
        return {
            "kept": len(self.kept), "refused": dict(self.refused.most_common()), **self.total,
            "compile ms": spread(self.compile_ms),
            "mask us, cold": spread(self.cold), "mask us, warm": spread(self.warm),
        }  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile, largest and mean."""
    if not values:
        return {}
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "max": max(values), "mean": float(np.mean(values)), "n": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--schemas", type=int, help="only so many")
    parser.add_argument("--record", action="store_true", help="write results/<device>/constrained.json")
    arguments = parser.parse_args()
    with gzip.open(arguments.file, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][: arguments.schemas]
    tokenizer = load_tokenizer(model_path(MODEL))
    gc.freeze()  # as a server does: else a collection looks at all that the imports made, again and again
    start = time.thread_time()
    vocabulary = Vocabulary.of(tokenizer)
    results: dict[str, Any] = {"schemas": len(rows), "vocabulary ms": 1e3 * (time.thread_time() - start)}
    counts = Counts(vocabulary, lambda text: tokenizer.encode(text, add_special_tokens=False))
    for row in rows:
        counts.schema(row)
    results["minillm"] = counts.results()
    for name, measure in constrained_peers.PEERS.items():
        if found := measure(rows, model_path(MODEL), spread):
            both = len(counts.kept & set(found.pop("names")))
            results[name] = {**found, "kept by both": both}
    print(json.dumps(results, indent=2))
    if arguments.record:
        print(record("constrained", results, ("numpy", "llguidance", "xgrammar")))


if __name__ == "__main__":
    main()
