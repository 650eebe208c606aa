"""What loading a model takes: peak memory, what of it is mapped from the file, seconds; and what a mapped weight costs later.

    python benchmarks/load_memory.py            # SmolLM2 in fp32 on the CPU, each way in a process of its own

Ways: as it is stored; with queries, keys and values side by side in the file, so that they need no copy to be one matrix;
and with every weight copied out of the file. Linux only: it reads /proc.
"""

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "smollm2-135m-instruct"


def memory() -> dict[str, int]:
    """Bytes of this process: resident, of that its own, of files; the most there was since `reset`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"resident": "VmRSS", "anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
    return {ours: int(lines[theirs].split()[0]) * 1024 for ours, theirs in names.items()}


def one(path: str, copy: bool, dtype: str) -> dict[str, float]:
    """Load once, in this process: figures beyond what Python and torch take."""
    import torch

    from minillm.generate import cached
    from minillm.model.weights import load
    from minillm.sampling import SamplingParams

    torch.zeros(8, 8) @ torch.zeros(8, 8)  # what the first product allocates is not the model's
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = memory(), time.perf_counter()
    model = load(path, "cpu", dtype)
    seconds = time.perf_counter() - started
    if copy:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    loaded = memory()
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.sum()  # touches every page
    touched = memory()
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    times = []
    for _ in range(3):
        steps = cached(model, [1, 2, 3], params)
        next(steps)
        started = time.perf_counter()
        count = len(list(steps))
        times.append((time.perf_counter() - started) / count)
    size = sum(p.nbytes for p in model.parameters())
    return {
        "model bytes": size,
        "load seconds": seconds,
        "peak of loading / model": (loaded["peak"] - before["resident"]) / size,
        "touched: anonymous / model": (touched["anonymous"] - before["anonymous"]) / size,
        "touched: file / model": (touched["file"] - before["file"]) / size,
        "peak until all is touched / model": (touched["peak"] - before["resident"]) / size,
        "decode ms": 1e3 * min(times),
    }


def reordered(source: Path, target: Path) -> None:
    """A copy of a model directory whose file has q, k and v of a layer one after another: still ordinary safetensors."""
    for file in source.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    data = (source / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    rank = {part: i for i, part in enumerate(("q_proj", "k_proj", "v_proj"))}
    names = [name for name in header if name != "__metadata__"]
    names.sort(key=lambda n: (n.replace(n.split(".")[-2], "qkv") if n.split(".")[-2] in rank else n,
                              rank.get(n.split(".")[-2], 0)))  # fmt: skip
    place, body, new = 0, [], {}
    for name in names:
        start, end = header[name]["data_offsets"]
        body.append(data[8 + size + start : 8 + size + end])
        new[name] = {**header[name], "data_offsets": [place, place + end - start]}
        place += end - start
    text = json.dumps(new).encode()
    text += b" " * (-len(text) % 64 + 56)  # the numbers begin at a multiple of 64
    (target / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(body))


def main() -> None:
    """All ways, each in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("PATH", "COPY", "DTYPE"))
    arguments = parser.parse_args()
    if arguments.one:
        path, copy, dtype = arguments.one
        print(json.dumps(one(path, copy == "True", dtype)))
        return
    from common import record

    from minillm.model.weights import model_path

    stored, results = model_path(MODEL), {}
    with tempfile.TemporaryDirectory() as folder:
        reordered(stored, Path(folder))
        ways = {
            "as stored": (str(stored), False, "float32"),
            "q, k, v side by side": (folder, False, "float32"),
            "all copied": (str(stored), True, "float32"),
            "to bfloat16": (str(stored), False, "bfloat16"),
        }
        for name, way in ways.items():
            command = [sys.executable, __file__, "--one", *map(str, way)]
            results[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(name, {key: round(value, 3) for key, value in results[name].items()}, flush=True)
    record("load_memory", {"model": MODEL, "ways": results})


if __name__ == "__main__":
    main()
