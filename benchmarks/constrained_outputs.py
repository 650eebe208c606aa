"""A thousand outputs of the real model under MaskBench's schemas: is every one that ended by itself valid?

    python benchmarks/constrained_outputs.py maskbench.jsonl.gz [--outputs 1000] [--record]

Schemas that cannot be kept are left out; the others take turns. SmolLM2 is asked for an example of the schema, with
temperature 0.8; outputs that reach the limit of tokens are cut, and counted apart. `jsonschema` judges, in the draft
that a schema names (2020-12 where it names none).
"""

import argparse
import collections
import gzip
import json
import time
from pathlib import Path
from typing import Any

from common import record
from jsonschema.validators import validator_for

from minillm import LLM, SamplingParams

MODEL, LIMIT = "smollm2-135m-instruct", 96


def prompt(llm: LLM, schema: Any) -> list[int]:
    """A question as a user asks it; long schemas are cut, since the constraint knows them."""
    text = json.dumps(schema)[:600]
    return llm.chat_prompt([{"role": "user", "content": f"Write an example of JSON for this schema: {text}"}])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--outputs", type=int, default=1000)
    parser.add_argument("--record", action="store_true", help="write results/<device>/constrained_outputs.json")
    arguments = parser.parse_args()
    with gzip.open(arguments.file, "rt", encoding="utf-8") as file:
        schemas = [json.loads(line)["schema"] for line in file]
    llm, counts, wrong = LLM(MODEL, num_blocks=2000), collections.Counter(), []
    engine, start, asked, turn = llm.engine, time.perf_counter(), [], 0
    while len(asked) < arguments.outputs and turn < 20 * len(schemas):
        schema, seed = schemas[turn % len(schemas)], turn
        turn += 1
        params = SamplingParams(temperature=0.8, seed=seed, max_tokens=LIMIT, structured_outputs={"json": schema})
        try:
            asked.append((engine.add(prompt(llm, schema), params)[0], schema))
        except ValueError:
            counts["refused"] += 1
            continue
        while len(engine.requests) >= 64:
            engine.step()
    while engine.has_unfinished():
        engine.step()
    for request, schema in asked:
        counts[request.finish_reason] += 1
        if request.finish_reason == "stop":
            value = json.loads(request.text)
            if not validator_for(schema)(schema).is_valid(value):
                wrong.append([schema, request.text])
    results = {
        "outputs": len(asked), "limit": LIMIT, "ended": counts["stop"], "cut by length": counts["length"],
        "failed": counts["error"], "refused when added": counts["refused"], "ended and invalid": len(wrong),
        "seconds": time.perf_counter() - start, "tokens": sum(len(request.output_token_ids) for request, _ in asked),
    }  # fmt: skip
    print(json.dumps(results, indent=2), *wrong[:5], sep="\n")
    if arguments.record:
        print(record("constrained_outputs", results, ("torch", "jsonschema")))


if __name__ == "__main__":
    main()
