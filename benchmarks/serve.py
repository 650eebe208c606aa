"""The server: through HTTP and server-sent events against the engine alone, under attack, and held against guidellm.

    python benchmarks/serve.py [http] [attacks] [guidellm] [guidellm_mock] [--shapes llama8b,qwen3,smollm2] [--small]

http      tokens/s of requests that come all at once, and the time to the first token of one alone, through the server
          and of the engine alone, in turn on this machine; the engine of a server is a process of its own, clients are
          four. Weights are random (`load_format="dummy"`), prompts are token ids.
attacks   clients stream while others send what has felled servers: how soon each of these gets its 4xx, and what the
          clients' time between tokens becomes.
guidellm  the same requests sent by `minillm bench serve`'s client and by guidellm, in turn, to our server with SmolLM2;
          guidellm_mock: to guidellm's own mock server, whose times are known. GUIDELLM names its program; without it
          both are left out.

Recorded in results/<device>/serve.json, after every shape. --small: a tiny shape, nothing recorded.
"""

import asyncio
import itertools
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import workloads as w
from common import parts_asked, recorded, run_parts

from minillm.server import load
from minillm.server.load import Job, Limits, Target

OURS = "minillm bench serve"
MODEL = "smollm2-135m-instruct"
MOCK = {"TTFT": 0.2, "ITL": 0.03}  # seconds


@dataclass(frozen=True)
class Sizes:
    """requests at once with their prompts and outputs; one alone: how often, its prompt. clients: processes. Of the
    attacks: streams beside them, attackers, seconds. guidellm: requests, their words and tokens, rounds.
    """

    requests: int = 256
    prompts: tuple[int, int] = (64, 256)
    outputs: tuple[int, int] = (128, 384)
    alone: tuple[int, int] = (20, 128)
    clients: int = 4
    streams: int = 16
    attackers: int = 8
    seconds: float = 6.0
    guidellm: tuple[int, int, int, int] = (8, 64, 32, 3)


FULL = Sizes()
SMALL = Sizes(8, (8, 32), (8, 16), (5, 16), 1, 2, 2, 2.0, (4, 8, 8, 1))
CPU = Sizes(16, (32, 64), (16, 32), (5, 64), 1, 2, 2, 15.0)


# ---- servers and engines, each in a process of its own ---------------------------------------------------------------


def directory(shape: str) -> Path:
    """A model directory of this shape without weights, whose tokenizer has a text for every token."""
    from minillm.model.tokenizer import Tokenizer

    config, folder = w.SHAPES[shape], Path(tempfile.mkdtemp(prefix="minillm-bench-"))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    spec = Tokenizer.train("some text", 0, ["<|end|>"], eos_token="<|end|>")._spec
    known = spec["model"]["vocab"]
    used = {*known.values(), *[token["id"] for token in spec["added_tokens"]]}
    known |= {f"Ġw{number}": number for number in range(config.vocab_size) if number not in used}
    Tokenizer(spec, eos_token="<|end|>").save(folder)
    return folder


def limits() -> dict:
    import engine_parts

    return engine_parts.LIMITS


@contextmanager
def serving(shape: str, *options: str) -> Iterator[str]:
    """A server of random weights, or of SmolLM2 -> its address."""
    command = [sys.executable, __file__, "--server", shape, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                if line.startswith(f"{shape}: http"):
                    break
                print(line, end="", flush=True)
            else:
                raise RuntimeError("the server ended")
            yield line.split()[1]
        finally:
            process.terminate()
            process.wait(30)


def serve(shape: str) -> None:
    from minillm.server.process import EngineProcess
    from minillm.server.run import listen
    from minillm.server.service import ServerConfig

    if shape == MODEL:
        engine = EngineProcess(MODEL, max_num_seqs=16, max_model_len=2048)
    else:
        engine = EngineProcess(directory(shape), load_format="dummy", **limits())
    listen(engine, ServerConfig(shape), port=0)


def alone(shape: str, small: str) -> None:
    """The engine without a server -> one line of JSON."""
    import engine_parts

    from minillm import LLM

    sizes, llm = sizes_of(small), LLM(directory(shape), load_format="dummy", **limits())
    asked = jobs(sizes)
    engine_parts.run(llm, asked[: max(1, len(asked) // 4)])
    seconds = min(engine_parts.run(llm, asked)[0] for _ in range(2))
    first = []
    for prompt in single(sizes):
        start = time.perf_counter()
        stream = llm.stream(prompt, engine_parts.params(w.Job(prompt, 8)))
        next(iter(stream))
        first.append(time.perf_counter() - start)
        for _ in stream:
            pass
    print(json.dumps({"tokens/s": sum(j.max_tokens for j in asked) / seconds, "TTFT, s": statistics.median(first[1:])}))


def sizes_of(name: str) -> Sizes:
    return {"small": SMALL, "cpu": CPU, "full": FULL}[name]


def jobs(sizes: Sizes) -> list[w.Job]:
    return w.random_jobs(sizes.requests, sizes.prompts, sizes.outputs, seed=1)


def single(sizes: Sizes) -> list[list[int]]:
    count, length = sizes.alone
    return [job.prompt for job in w.random_jobs(count + 1, (length, length), (8, 8), seed=2)]


# ---- parts -----------------------------------------------------------------------------------------------------------


def _send(url: str, asked: Sequence[w.Job]) -> list[load.Seen]:
    target = Target(url, chat=False)
    return asyncio.run(load.open_loop(target, [Job(job.prompt, job.max_tokens) for job in asked]))


def _at_once(pool: ProcessPoolExecutor, url: str, asked: Sequence[w.Job], clients: int) -> float:
    """Seconds until all have their answers, every token of them."""
    start = time.perf_counter()
    found = list(pool.map(_send, [url] * clients, [asked[i::clients] for i in range(clients)]))
    seconds = time.perf_counter() - start
    for part, seen in enumerate(found):
        for one, job in zip(seen, asked[part::clients], strict=True):
            if one.error or one.tokens != job.max_tokens:
                raise AssertionError(f"{one.error}: {one.tokens} of {job.max_tokens} tokens")
    return seconds


def through_http(url: str, sizes: Sizes) -> dict:
    asked = jobs(sizes)
    with ProcessPoolExecutor(sizes.clients) as pool:
        _at_once(pool, url, asked[: max(sizes.clients, len(asked) // 4)], sizes.clients)
        seconds = min(_at_once(pool, url, asked, sizes.clients) for _ in range(2))
    prompts = iter([Job(prompt, 8) for prompt in single(sizes)])
    _, *seen = asyncio.run(load.closed_loop(Target(url, chat=False), prompts, 1, 1e9))
    first = statistics.median([one.texts[0] - one.at for one in seen])
    return {"tokens/s": sum(job.max_tokens for job in asked) / seconds, "TTFT, s": first}


def http(bench: tuple[str, list[str]], save: Callable[[dict], None]) -> None:
    """Every shape through the server and without it."""
    name, shapes = bench
    results = dict(recorded("serve").get("http", {}))  # of other shapes
    for shape in shapes:
        command = [sys.executable, __file__, "--alone", shape, name]
        engine = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        with serving(shape) as url:
            server = through_http(url, sizes_of(name))
        ratio, more = server["tokens/s"] / engine["tokens/s"], server["TTFT, s"] - engine["TTFT, s"]
        results[shape] = {"engine alone": engine, "server": server, "ratio": ratio, "TTFT more, s": more}
        print(f"{shape}: {server['tokens/s']:.0f} tokens/s of {engine['tokens/s']:.0f} ({ratio:.2f}); first token after"
              f" {1e3 * server['TTFT, s']:.1f} ms, {1e3 * more:.1f} more", flush=True)  # fmt: skip
        save(results)


CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO: dict = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
PROMPT: dict = {"prompt": "hello", "max_tokens": 2}


def attacks() -> dict[str, tuple[str, bytes]]:
    """What has felled servers: tests/server/test_attacks.py says where."""
    deep: dict = {"type": "string"}
    for _ in range(40):
        deep = {"anyOf": [deep, {"type": "null"}]}
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}
    bodies: dict[str, tuple[str, dict]] = {
        "n": (COMPLETION, PROMPT | {"n": 10**6}), "prompts": (COMPLETION, PROMPT | {"prompt": ["x"] * 100_000}),
        "a long text": (COMPLETION, PROMPT | {"prompt": "x" * 1_900_000}),
        "a long conversation": (CHAT, HELLO | {"messages": HELLO["messages"] * 40_000}),
        "logit_bias": (COMPLETION, PROMPT | {"logit_bias": {str(i): 1 for i in range(100_000)}}),
        "stop_token_ids": (COMPLETION, PROMPT | {"stop_token_ids": [*range(200_000)]}),
        "stop": (COMPLETION, PROMPT | {"stop": ["x" * 100] * 10_000}),
        "logprobs": (COMPLETION, PROMPT | {"logprobs": 10**9}),
        "a pattern that nests": (CHAT, HELLO | {"structured_outputs": {"regex": "((a{1,1000}){1,1000}){1,1000}"}}),
        "brackets": (CHAT, HELLO | {"structured_outputs": {"regex": "(" * 60_000}}),
        "a schema of itself": (CHAT, HELLO | {"structured_outputs": {"json": {"$ref": "#/a", "a": {"$ref": "#/a"}}}}),
        "a deep schema": (CHAT, HELLO | {"structured_outputs": {"json": deep}}),
        "a template": (CHAT, HELLO | {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"}),
        "an image": (CHAT, HELLO | {"messages": [{"role": "user", "content": [image]}]}),
        "another model": (COMPLETION, PROMPT | {"model": "../../etc/passwd"}),
    }  # fmt: skip
    found = {name: (path, json.dumps(body).encode()) for name, (path, body) in bodies.items()}
    found["nested JSON"] = (COMPLETION, b'{"a":' * 300_000)
    found["an endless number"] = (COMPLETION, b'{"seed": ' + b"9" * 1_000_000 + b"}")
    return found | {"a large body": (COMPLETION, b" " * 3_000_000)}


async def attack(url: str, attackers: int, seconds: float) -> dict[str, list]:
    """Send them in turn, by several at once -> of each its status and the seconds until its answer was there."""
    host, port = url.removeprefix("http://").split(":")
    end, found, turns = time.perf_counter() + seconds, dict[str, list](), itertools.cycle(attacks().items())

    async def one() -> None:
        while time.perf_counter() < end:
            name, (path, body) = next(turns)
            start = time.perf_counter()
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            status = b""
            try:
                status = (await reader.readline()).split()[1]
                await reader.read()
            except (OSError, IndexError):  # refused before all of it was sent
                pass
            found.setdefault(name, []).append((status.decode(), time.perf_counter() - start))
            writer.close()

    await asyncio.gather(*[one() for _ in range(attackers)])
    return found


def neighbors(url: str, sizes: Sizes, seconds: float) -> dict:
    """Who streams meanwhile -> times between tokens, in seconds."""
    asked = itertools.cycle([Job(job.prompt, job.max_tokens) for job in jobs(sizes)])
    seen = asyncio.run(load.closed_loop(Target(url, chat=False, cold=True), asked, sizes.streams, seconds))
    found = load.summary(seen, seconds, Limits())
    if found["errors"]:
        raise AssertionError(f"neighbors of an attack failed: {found['errors']}")
    return {"ITL, s": found["ITL, s"], "tokens/s": found["output tokens/s"]}


def under_attack(bench: tuple[str, list[str]], save: Callable[[dict], None]) -> None:
    """The last shape's server, in peace, attacked, and in peace again."""
    name, shapes = bench
    sizes, shape = sizes_of(name), shapes[-1]
    with serving(shape) as url:
        neighbors(url, sizes, 1.0)
        before = neighbors(url, sizes, sizes.seconds)
        command = [sys.executable, __file__, "--attack", url, str(sizes.attackers), str(sizes.seconds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as attackers:
            attackers.stdout.readline()  # they begin
            during = neighbors(url, sizes, sizes.seconds)
            answers = json.loads(attackers.stdout.read())
        after = neighbors(url, sizes, sizes.seconds)
    rows = {
        attack: {"status": sorted({status for status, _ in told}), "sent": len(told),
                 "median, s": statistics.median([s for _, s in told]), "longest, s": max([s for _, s in told])}
        for attack, told in answers.items()
    }  # fmt: skip
    peace = [one["ITL, s"]["p99"] for one in (before, after)]
    ratio = during["ITL, s"]["p99"] / statistics.mean(peace)
    for attack, row in rows.items():
        print(f"  {attack:22} {'/'.join(row['status'])} {row['sent']:5} {1e3 * row['median, s']:8.1f} ms, longest"
              f" {1e3 * row['longest, s']:.1f}")  # fmt: skip
    print(f"{shape}: p99 between tokens {1e3 * during['ITL, s']['p99']:.1f} ms; in peace"
          f" {1e3 * peace[0]:.1f} and {1e3 * peace[1]:.1f}: {ratio:.2f}", flush=True)  # fmt: skip
    streams = {"before": before, "during": during, "after": after}
    save({"shape": shape, "streams": sizes.streams, "attackers": sizes.attackers, **streams, "p99 ratio": ratio,
          "attacks": rows})  # fmt: skip


def held(server: str, bench: tuple[str, list[str]], save: Callable[[dict], None]) -> None:
    """The same requests by two tools, in turn. server: guidellm's mock or ours."""
    program = shutil.which(os.environ.get("GUIDELLM", "guidellm"))
    if program is None:
        print("guidellm: not installed; GUIDELLM names its program")
        return
    count, words, tokens, rounds = sizes_of(bench[0]).guidellm
    drawn = load.words(words, 0, 0, random.Random(server))
    running = mock(program) if server == "mock" else serving(MODEL)
    with running as url, tempfile.TemporaryDirectory() as folder:
        tools = {"guidellm": partial(_guidellm, program, folder=Path(folder)), OURS: _ours}
        for tool in tools.values():  # both are warm then
            tool(url, [*itertools.islice(drawn, 4)], 1, tokens)
        rows = {f"{n} clients": _in_turn(tools, url, drawn, n, (count, tokens, rounds)) for n in (1, 2)}
    times = {"mock server, s": MOCK} if server == "mock" else {}
    save({"requests": count, "words": words, "tokens": tokens, "rounds": rounds, **times, "loads": rows})


@contextmanager
def mock(program: str) -> Iterator[str]:
    """guidellm's server of known times -> its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    times = ["--ttft-ms", f"{1e3 * MOCK['TTFT']:.0f}", "--itl-ms", f"{1e3 * MOCK['ITL']:.0f}"]
    command = [program, "mock-server", "--port", str(port), "--model", "mock", *times]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _in_turn(tools: dict[str, Callable], url: str, drawn: Iterator[str], clients: int, sizes: Sequence[int]) -> dict:
    """The median of each tool's runs, which begin with another one each round; no prompt is sent twice."""
    count, tokens, rounds = sizes
    runs: dict[str, list[dict]] = {tool: [] for tool in tools}
    for number in range(rounds):
        for tool in [*tools] if number % 2 else [*tools][::-1]:
            runs[tool].append(tools[tool](url, [*itertools.islice(drawn, count)], clients, tokens))
            print(f"  {clients} clients, {tool}: {json.dumps(runs[tool][-1])}", flush=True)
    middle = {
        tool: {key: statistics.median([one[key] for one in told]) for key in told[0]} for tool, told in runs.items()
    }
    return {**middle, "ours of guidellm's": {key: middle[OURS][key] / v for key, v in middle["guidellm"].items()}}


def _ours(url: str, prompts: list[str], clients: int, tokens: int) -> dict[str, float]:
    target, asked = Target(url, Target(url).first_model()), iter([Job(prompt, tokens) for prompt in prompts])
    start = time.perf_counter()
    seen = asyncio.run(load.closed_loop(target, asked, clients, 1e9))
    found = load.summary(seen, time.perf_counter() - start, Limits())
    if found["finished"] < len(prompts):
        raise AssertionError(str(found["errors"]))
    return {"TTFT, s": found["TTFT, s"]["p50"], "per token, s": found["per token, s"]["p50"],
            "latency, s": found["latency, s"]["p50"], "output tokens/s": found["output tokens/s"]}  # fmt: skip


def _guidellm(program: str, url: str, prompts: list[str], clients: int, tokens: int, folder: Path) -> dict[str, float]:
    from minillm.model.weights import model_path

    rows = [json.dumps({"prompt": prompt, "output_tokens_count": tokens}) for prompt in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    options = {
        "backend": f"kind=openai_http,target={url}", "profile": f"kind=concurrent,streams={clients}",
        "constraint": f"kind=max_requests,count={len(prompts)}", "output": f"kind=json,path={folder / 'out.json'}",
        "data": f"kind=json_file,path={folder / 'prompts.jsonl'}",
        "tokenizer": f"kind=hf_auto,model={model_path(MODEL)}",
    }  # fmt: skip
    command = [program, "run", "--disable-console", *[f"--{k}={value}" for k, value in options.items()]]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300)
    [run] = json.loads((folder / "out.json").read_text())["benchmarks"]
    found = {name: run["metrics"][name]["successful"]["median"] for name in
             ("time_to_first_token_ms", "inter_token_latency_ms", "request_latency")}  # fmt: skip
    done = run["requests"]["successful"]
    if len(done) < len(prompts):
        raise AssertionError(f"guidellm: {run['metrics']['request_totals']}")
    seconds = max(one["request_end_time"] for one in done) - min(one["request_start_time"] for one in done)
    return {"TTFT, s": found["time_to_first_token_ms"] / 1e3, "per token, s": found["inter_token_latency_ms"] / 1e3,
            "latency, s": found["request_latency"], "output tokens/s": tokens * len(done) / seconds}  # fmt: skip


PARTS: dict[str, Callable] = {
    "http": http,
    "attacks": under_attack,
    "guidellm": partial(held, "minillm"),
    "guidellm_mock": partial(held, "mock"),
}


def main(arguments: list[str]) -> None:
    match arguments:
        case ["--server", shape]:
            return serve(shape)
        case ["--alone", shape, name]:
            return alone(shape, name)
        case ["--attack", url, attackers, seconds]:
            attacks()
            print("ready", flush=True)
            return print(json.dumps(asyncio.run(attack(url, int(attackers), float(seconds)))))
    import torch

    small, gpu = "--small" in arguments, torch.cuda.is_available()
    name = "small" if small else "full" if gpu else "cpu"
    shapes = ["tiny"] if small else ["llama8b", "smollm2", "qwen3"] if gpu else ["smollm2"]
    if "--shapes" in arguments:
        place = sys.argv.index("--shapes")
        shapes = sys.argv[place + 1].split(",")
        del sys.argv[place : place + 2]
    return run_parts("serve", PARTS, parts_asked(PARTS), (name, shapes), not small)


if __name__ == "__main__":
    main(sys.argv[1:])
