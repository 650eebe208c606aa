"""`minillm`: the command line. Imports happen inside the commands, so that `minillm --help` answers at once."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__

__all__ = ["app"]

MODEL = "smollm2-135m-instruct"
EXPECTED = (ValueError, OSError, RuntimeError, MemoryError, ImportError)  # their messages are written for the user


class Commands(TyperGroup):
    """What every command shares: errors without a traceback, and output that any terminal can show."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal without é, an ASCII log: "?" instead of a crash
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # the end; typer keeps `minillm ... | head` quiet
            raise
        except KeyboardInterrupt:
            typer.secho("\nminillm: interrupted", fg="red", err=True)
            raise typer.Exit(130) from None
        except EXPECTED as error:
            typer.secho(f"minillm: {str(error) or type(error).__name__}", fg="red", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="LLM inference, read in one sitting.",
)
exercises = typer.Typer(no_args_is_help=True, help="The exercise notebooks, generated from solutions/.")
app.add_typer(exercises, name="exercises")
bench = typer.Typer(no_args_is_help=True, help="Measure kernels, the engine, or a server.")
app.add_typer(bench, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"minillm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """LLM inference, read in one sitting."""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    room: Annotated[bool, typer.Option("--room", help="One line to read out, for a room of people.")] = False,
) -> None:
    """Is everything here that is needed, in a checkout by the curriculum, else by the package? Exit status 1 if not."""
    from .learn.doctor import examine

    if room:
        from .learn.room import line

        said, well = line()
        print(said)
        raise typer.Exit(0 if well else 1)
    findings = examine()
    if as_json:
        print(json.dumps([f.as_dict() for f in findings], indent=1))
    else:
        colors = {"OK": "green", "FAIL": "red", "SKIP": "yellow"}
        for f in findings:
            print(typer.style(f"{f.status:4}", fg=colors[f.status]), f"{f.name:16} {f.detail}")
            if f.status == "FAIL":
                print(f"     → {f.remedy}")
    if any(f.status == "FAIL" for f in findings):
        raise typer.Exit(1)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A known model.")] = MODEL,
    again: Annotated[
        bool, typer.Option("--again", help="Replace what is there, once the new one is complete.")
    ] = False,
) -> None:
    """Download a known model and convert it into a Hugging Face directory in the user's cache."""
    from . import fetch as fetching

    print(fetching.fetch(name, again=again))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help='What to ask, or to continue with --raw. "-" reads standard input.')],
    model: Annotated[str, typer.Option(help="A known name, a Hugging Face directory or id.")] = MODEL,
    max_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that hold this share.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens already seen less likely.")] = 1.1,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="int8, int4, w8a8 or fp8: round as it is loaded.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, or int8, fp8 and the like for keys and values.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence, prompt included.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.")] = 256,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="New tokens a step.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens of a block of the cache.")] = 16,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the GPU's memory to use.")] = 0.9,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")] = False,
) -> None:
    """Answer a question, streamed; then print tokens per second."""
    from . import LLM, SamplingParams

    params = SamplingParams(
        temperature=temperature, top_p=top_p, max_tokens=max_tokens, repetition_penalty=repetition_penalty, seed=seed
    )
    llm = LLM(
        model, device=device, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens, block_size=block_size, enforce_eager=enforce_eager,
        gpu_memory_utilization=gpu_memory_utilization, quantization=quantization, kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip
    text = sys.stdin.read() if prompt == "-" else prompt
    messages = [{"role": role, "content": said} for role, said in (("system", system), ("user", text)) if said]
    stream = llm.stream(text if raw else llm.chat_prompt(messages), params)
    for piece in stream:
        print(piece, end="", flush=True)
    m = stream.output.metrics
    rate = f"{m.num_generated_tokens} tokens in {m.total_time:.1f} s: {m.tokens_per_second:.1f} tokens/s"
    more = f"first after {m.time_to_first_token:.2f} s, finished by {stream.output.finish_reason}"
    typer.secho(f"\n[{rate}, {more}]", dim=True, err=True)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A known name, a Hugging Face directory or id.")] = MODEL,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets the network in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8000,
    api_key: Annotated[list[str] | None, typer.Option(envvar="MINILLM_API_KEY", help="One is needed.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    lora_modules: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER: an adapter in PEFT's format.")] = None,
    max_lora_rank: Annotated[int, typer.Option(help="Of an adapter.")] = 16,
    max_queued_requests: Annotated[int, typer.Option(help="That wait for their first token.")] = 1024,
    max_queued_tokens: Annotated[int, typer.Option(help="Of their prompts.")] = 1 << 20,
    tokens_per_minute: Annotated[float | None, typer.Option(help="Of each key.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    cache_url: Annotated[str | None, typer.Option(help="redis://host:port/0: give determined answers again.")] = None,
    cache_ttl: Annotated[float, typer.Option(help="Seconds that an answer is kept.")] = 3600.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="int8, int4, w8a8 or fp8: round as it is loaded.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, or int8, fp8 and the like for keys and values.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence, prompt included.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.")] = 256,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="New tokens a step.")] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the GPU's memory to use.")] = 0.9,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")] = False,
    speculative_config: Annotated[str | None, typer.Option(help='JSON, as {"method": "ngram"}: guess ahead.')] = None,
) -> None:
    """Serve a model to OpenAI's clients, on this machine alone unless --host says otherwise."""
    adapters = dict([_pair(one) for one in lora_modules or []])
    from .server.run import EngineProcess, ServerConfig, listen

    cache = _cache(cache_url, model, cache_ttl, device, dtype, quantization, kv_cache_dtype)
    limits = (max_queued_requests, max_queued_tokens, tokens_per_minute, timeout)
    config = ServerConfig(served_model_name or model, adapters, tuple(api_key or ()), *limits, cache=cache)
    engine = EngineProcess(
        model, adapters, device=device, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens, enforce_eager=enforce_eager, quantization=quantization,
        gpu_memory_utilization=gpu_memory_utilization, kv_cache_dtype=kv_cache_dtype, max_loras=len(adapters),
        max_lora_rank=max_lora_rank, speculative_config=_json("--speculative-config", speculative_config),
    )  # fmt: skip
    listen(engine, config, host, port)


@app.command()
def route(
    replica: Annotated[list[str], typer.Option(help="http://host:port of a server; once for each.")],
    policy: Annotated[str, typer.Option(help="round_robin, least_loaded, two_choices, prefix or session.")] = "prefix",
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets the network in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8080,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="MINILLM_API_KEY", help="As the replicas': clients need one of these.")
    ] = None,
    attempts: Annotated[int, typer.Option(help="Replicas to try a request on, until its first token.")] = 3,
) -> None:
    """Answer in front of several servers of one model, on this machine alone unless --host says otherwise."""
    from .server.listener import Keys, Listener
    from .server.policies import POLICIES
    from .server.router import Router, RouterConfig

    if policy not in POLICIES:
        raise ValueError(f"--policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    keys = tuple(api_key or ())
    config = RouterConfig(attempts, api_key=keys[0] if keys else None)
    app = Keys(Router(replica, POLICIES[policy](), config), keys)
    Listener(app, host, port, log_level="warning").listen("router", keys)


def _cache(url: str | None, model: str, ttl: float, *facts: object) -> Any:
    """facts: what else decides the answers."""
    if url is None:
        return None
    from .model.weights import model_path
    from .server.response_cache import CacheConfig, digest

    return CacheConfig(url, digest(model_path(model), __version__, *facts), ttl)


def _json(option: str, given: str | None) -> Any:
    try:
        return None if given is None else json.loads(given)
    except ValueError:
        raise ValueError(f"{option}: expected JSON, got {given!r}") from None


def _pair(given: str) -> tuple[str, str]:
    name, _, folder = given.partition("=")
    if not name or not folder:
        raise ValueError(f"--lora-modules: expected NAME=FOLDER, got {given!r}")
    return name, folder


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A known name, a Hugging Face directory or id.")],
    out: Annotated[Path, typer.Option(help="The directory to write; it must not exist.")],
    method: Annotated[str, typer.Option(help="rtn, gptq, awq, smoothquant or fp8.")] = "gptq",
    bits: Annotated[int | None, typer.Option(help="Of a weight: 2 to 8; 4 unless the method says 8.")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale; 0: a whole row. By default up to 128, as rows allow."),
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="With zero points.")] = False,
    windows: Annotated[int, typer.Option(help="Texts to calibrate on.")] = 64,
    window: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Write a model in fewer bits, for `minillm generate --model`, transformers and vLLM to read."""
    import time

    from .progress import progress_bar
    from .quant import quantize_checkpoint

    start = time.perf_counter()
    with progress_bar(total=0, desc=method, unit="layer") as bar:
        quantize_checkpoint(
            model, out, method, bits=bits, group_size=group_size, symmetric=not asymmetric, windows=windows,
            window=window, device=device, progress=lambda name: bar.update(),
        )  # fmt: skip
    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6
    typer.echo(f"{out}: {size:.0f} MB of weights, in {time.perf_counter() - start:.0f} s")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A known shape, as llama-3.1-8b, or a folder with a config.json.")],
    gpu: Annotated[str, typer.Option(help="h100 or h200; another one with the three figures below.")] = "h100",
    context: Annotated[int, typer.Option(help="Tokens of a request at its end, prompt and answer.")] = 2048,
    output: Annotated[int | None, typer.Option(help="Of them, the answer's; by default an eighth.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second: how many GPUs, and how fast then?")] = None,
    price: Annotated[float | None, typer.Option(help="Of a GPU's hour, in dollars.")] = None,
    quantization: Annotated[str | None, typer.Option(help="int4, int8, w8a8 or fp8; by default 16 bits.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto (16 bits), int8 or fp8.")] = "auto",
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once, at most.")] = 256,
    memory: Annotated[float | None, typer.Option(help="Of the GPU, in GB.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Of a copy, bytes read and written, in GB/s.")] = None,
    tflops: Annotated[float | None, typer.Option(help="Of a large 16-bit product, in TFLOP/s.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """What a GPU would do for a model: requests that fit, tokens a second, cost. Reckoned: nothing runs."""
    from .capacity import find_gpu, table
    from .capacity import plan as planned

    found = planned(
        model, find_gpu(gpu, memory, bandwidth, tflops), context, output, rate, price, quantization, kv_cache_dtype,
        max_num_seqs,
    )  # fmt: skip
    print(json.dumps(found, indent=1) if as_json else table(found))


@app.command()
def check(
    chapter: Annotated[str, typer.Argument(help="A chapter, as 2, 02 or 02_transformer.")],
    file: Annotated[
        Path | None, typer.Option(help="Another notebook or Python file than exercises/NN_stem.ipynb.")
    ] = None,
) -> None:
    """Check your exercise notebook. Exit status 1 while anything is open."""
    from .learn import checker as checking

    results = checking.check_chapter(chapter, file)
    for number, outcomes in results.items():
        print(checking.report(number, outcomes))
    done = sum(all(o.status == "passed" for o in outcomes) for outcomes in results.values())
    print(f"{done} of {len(results)} exercises done")
    if done < len(results):
        raise typer.Exit(1)


QUICK = Annotated[bool, typer.Option("--quick", help="A minute's worth, nothing recorded.")]


def _run_script(suite: str, *options: str) -> None:
    import subprocess

    from .learn.paths import root

    raise typer.Exit(subprocess.run([sys.executable, str(root() / "benchmarks" / f"{suite}.py"), *options]).returncode)


@bench.command("kernels")
def bench_kernels(quick: QUICK = False) -> None:
    """Kernels against peers, floors and ceilings; recorded under benchmarks/results/ on a GPU."""
    _run_script("kernels", *["--quick"] * quick)


@bench.command("engine")
def bench_engine(
    quick: QUICK = False,
    only: Annotated[str, typer.Option(help="These parts, for example workload,stream.")] = "",
    shapes: Annotated[str, typer.Option(help="These models, for example smollm2,qwen3.")] = "",
) -> None:
    """The engine against its floor and other engines; recorded under benchmarks/results/ on a GPU."""
    chosen = [part for name, value in (("--only", only), ("--shapes", shapes)) if value for part in (name, value)]
    _run_script("engine", *["--quick"] * quick, *chosen)


@bench.command("tune")
def bench_tune(quick: QUICK = False) -> None:
    """Find the kernels' sizes for this GPU."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("tune needs a GPU; on a CPU the torch paths run, which have nothing to tune")
    _run_script("tune", *["--quick"] * quick)


@bench.command("serve")
def bench_serve(
    url: Annotated[str, typer.Argument(help="Any server that speaks OpenAI's API.")] = "http://127.0.0.1:8000",
    rates: Annotated[str, typer.Option(help="Open loop: requests a second on average, for example 1,2,4.")] = "",
    clients: Annotated[str, typer.Option(help="Closed loop: so many at once, for example 1,8.")] = "",
    seconds: Annotated[float, typer.Option(help="Of each run, in which requests come.")] = 20.0,
    prompts: Annotated[
        Path | None, typer.Option(help="A prompt a line: text, or JSON with prompt or messages. Else words are drawn.")
    ] = None,
    words: Annotated[int, typer.Option(help="Of a drawn prompt.")] = 128,
    shared_words: Annotated[int, typer.Option(help="Of them, which all prompts begin with.")] = 0,
    distinct: Annotated[int, typer.Option(help="Different prompts, in turn: few are a warm cache. 0: all.")] = 0,
    cold: Annotated[bool, typer.Option("--cold", help="No prompt finds another's blocks (cache_salt).")] = False,
    max_tokens: Annotated[int, typer.Option(help="Of an answer, all of which come unless --natural.")] = 64,
    natural: Annotated[bool, typer.Option("--natural", help="Answers may end by themselves.")] = False,
    completions: Annotated[bool, typer.Option("--completions", help="/v1/completions, no chat template.")] = False,
    model: Annotated[str | None, typer.Option(help="By default the first that the server names.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="MINILLM_API_KEY")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds, after which a client gives up.")] = 600.0,
    ttft_limit: Annotated[float, typer.Option(help="Goodput: seconds until the first token.")] = 1.0,
    token_limit: Annotated[float, typer.Option(help="Goodput: seconds for each later one, on average.")] = 0.1,
    seed: Annotated[int | None, typer.Option(help="By default drawn: a second run shall find no cache warm.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file, as JSON.")] = None,
) -> None:
    """Put load on a server: how long its users wait at which rate, and how many of them are served well."""
    from .server import load

    asked_rates, asked_clients = _numbers("--rates", rates, float), _numbers("--clients", clients, int)
    jobs = load.prompts_of(prompts, max_tokens, words, shared_words, distinct)
    target = load.Target(url, model, api_key, not completions, natural, cold, timeout)
    target = replace(target, model=model or target.first_model())
    limits, seed = load.Limits(ttft_limit, token_limit), random.getrandbits(32) if seed is None else seed
    found = []
    typer.echo(load.TITLE)
    for row in load.sweep(target, jobs, asked_rates or [1.0] * (not clients), asked_clients, seconds, seed, limits):
        found.append(row)
        typer.echo(load.line(row))
    if out:
        source = str(prompts) if prompts else {"words": words, "shared": shared_words, "distinct": distinct}
        asked = {"url": url, "model": target.model, "seconds": seconds, "seed": seed, "max_tokens": max_tokens,
                 "prompts": source, "cold": cold, "limits, s": vars(limits)}  # fmt: skip
        out.write_text(json.dumps({"asked": asked, "runs": found}, indent=1) + "\n", encoding="utf-8")


def _numbers(option: str, given: str, kind: type) -> list:
    try:
        found = [kind(one) for one in given.split(",") if one]
    except ValueError:
        found = [0]
    if not all([one > 0 for one in found]):
        raise ValueError(f"{option}: expected numbers above 0, as 1,2,4, got {given!r}")
    return found


@app.command()
def progress(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, for an instructor.")] = False,
) -> None:
    """What is done, by chapter, from the record of checks passed."""
    from .learn.progress import summary

    rows = summary()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("chapter", "exercise", "", "passed")
    for row in rows:
        seen = " solution shown" if row["shown_at"] else ""
        table.add_row(
            row["chapter"],
            f"{row['number']} {row['title']}",
            "✓" if row["passed_at"] else "·",
            ((row["passed_at"] or "")[:10] + seen).strip(),
        )
    done = sum(bool(row["passed_at"]) for row in rows)
    Console().print(table)
    filled = round(30 * done / max(1, len(rows)))
    print(f"{'█' * filled}{'░' * (30 - filled)} {done} of {len(rows)} exercises")


@exercises.command("build")
def build(
    check_only: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit status 1 when a notebook is not what its source gives.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite notebooks that a learner has worked in.")] = False,
) -> None:
    """Write exercises/*.ipynb from solutions/*.py."""
    from .learn import exercises as generator

    if check_only:
        stale = generator.stale()
        for path in stale:
            print(f"{path}: differs from its source in solutions/; `minillm exercises build` writes it")
        if stale:
            raise typer.Exit(1)
        return
    written, kept = generator.build(force)
    for path in written:
        print(f"wrote {path}")
    for path in kept:
        print(f"kept {path}: it holds somebody's work (`minillm exercises update` spares it, --force overwrites it)")


NUMBER = Annotated[str, typer.Argument(help="An exercise, as 7.2 or 7.w1.")]
RELOAD = "Open in JupyterLab? File > Reload Notebook from Disk, before anything is saved there."


@exercises.command("reset")
def reset(number: NUMBER) -> None:
    """Put the stub of one exercise back; all other cells stay as they are."""
    from .learn import workbook

    _tell(number, "the stub", workbook.reset(number))


@exercises.command("solve")
def solve(number: NUMBER) -> None:
    """Put the solution of one exercise into its cell; it does not count as yours."""
    from .learn import workbook

    _tell(number, "the solution", workbook.solve(number))


def _tell(number: str, what: str, change: Any) -> None:
    if not change:
        print(f"{number}: {change.path} holds {what} already")
        return
    print(f"{number}: {what} is in {change.path}")
    if change.copy:
        print(f"what you had written is kept in {change.copy}")
    print(RELOAD)


@exercises.command("update")
def update(
    chapter: Annotated[str | None, typer.Argument(help="A chapter, as 2 or 02; by default all.")] = None,
) -> None:
    """Bring new statements, hints, stubs and checks into your notebooks; no cell that you filled is touched."""
    from .learn import workbook

    changes, problems = workbook.update(chapter)
    for change in changes:
        told = [("new text", change.changed), ("added", change.added), ("removed", change.removed)]
        for what, names in [(what, names) for what, names in told if names]:
            print(f"{change.path.name}: {len(names)} {what}, in {workbook.exercises_of(names)}")
        if change.outdated:
            numbers = workbook.exercises_of(change.outdated)
            print(f"{change.path.name}: you filled what is another text now, and it stays: {numbers}")
    print(RELOAD if any(changes) else "nothing else to update" if problems else "nothing to update")
    for problem in problems:
        typer.secho(f"minillm: {problem}", fg="red", err=True)
    if problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
